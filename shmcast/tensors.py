"""torch's side of things, and the only module of the core that imports it, and only when there is a tensor.

An object can not be a tensor in a process that has not imported torch, so nothing is imported to find out.
"""

import math
import pickle
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from . import arrays
from .arrays import Form
from .errors import HandleError, UnsupportedArrayError

if TYPE_CHECKING:
    import torch

# By torch's names, which are numpy's for what numpy has. `True`: Tensor.numpy() can be asked for it in every version.
_KNOWN = {
    "float32": True, "float64": True, "float16": True, "bfloat16": False,
    "uint8": True, "int8": True, "int16": True, "int32": True, "int64": True,
    "uint16": False, "uint32": False, "uint64": False, "bool": True,
    "complex32": False, "complex64": True, "complex128": True,
    "float8_e4m3fn": False, "float8_e5m2": False, "float8_e4m3fnuz": False, "float8_e5m2fnuz": False,
    "float8_e8m0fnu": False,
}  # fmt: skip

_LONGEST = (1 << 63) - 1  # of a dimension

_codes: dict[Any, tuple[str, bool]] = {}


def tensor_type() -> "type[torch.Tensor] | None":
    """torch.Tensor, or None where torch has not been imported, so nothing can be one."""
    return getattr(sys.modules.get("torch"), "Tensor", None)


def is_tensor(thing: object) -> bool:
    """Whether it is a tensor, of a subclass too."""
    kind = tensor_type()
    return kind is not None and isinstance(thing, kind)


def import_torch(action: str) -> Any:
    """The module; UnsupportedArrayError with the action in it where it is not installed."""
    try:
        import torch
    except ImportError as error:
        raise UnsupportedArrayError(
            f"{action}: a tensor was published and torch can not be imported here ({error})"
        ) from error
    return torch


# ---- tensors as bytes


def describe(thing: object) -> Form:
    """What has to be published of an ndarray or a tensor. UnsupportedArrayError for anything else."""
    if isinstance(thing, arrays.NDARRAY):
        return arrays.describe(thing)
    if is_tensor(thing):
        return _describe_tensor(thing)
    raise UnsupportedArrayError(
        f"publish: a numpy.ndarray or a torch.Tensor is needed, not {type(thing).__name__}; pass numpy.asarray(x), or use dumps()"
    )


def describe_all(things: Iterable[Any]) -> list[Form]:
    """`describe` of each of many."""
    return arrays.describe_all(things, describe)


def _describe_tensor(tensor: Any) -> Form:
    _check_supported(tensor)
    code, plain = _codes.get(tensor.dtype) or _learn(tensor.dtype)
    if tensor.requires_grad:
        tensor = tensor.detach()
    shape = tuple(tensor.shape)
    nbytes = tensor.numel() * tensor.element_size()
    if tensor.is_conj() or tensor.is_neg() or not tensor.is_contiguous():
        return Form("torch", code, shape, nbytes, None, lambda target: _copy(tensor, code, target))
    source = tensor.numpy() if plain else _bytes_of(tensor).numpy()
    return Form("torch", code, shape, nbytes, source, None)


def _check_supported(tensor: Any) -> None:
    if tensor.device.type != "cpu":
        if tensor.device.type == "meta":
            raise UnsupportedArrayError("publish: a tensor on device 'meta' has no data")
        raise UnsupportedArrayError(
            f"publish: the tensor is on device '{tensor.device}'; only host memory is shared: copy it with tensor.cpu() first"
        )
    if tensor.layout is not sys.modules["torch"].strided:
        raise UnsupportedArrayError(f"publish: layout {tensor.layout}; pass tensor.to_dense(), or its parts")
    if tensor.is_quantized:
        raise UnsupportedArrayError("publish: a quantized tensor; pass tensor.int_repr() and its scale and zero point")
    if tensor.is_nested:
        raise UnsupportedArrayError("publish: a nested tensor; pass the list tensor.unbind()")


def _learn(dtype: Any) -> tuple[str, bool]:
    code = str(dtype).removeprefix("torch.")
    if code not in _KNOWN:
        raise UnsupportedArrayError(f"publish: torch dtype {code}; view the tensor as one of {', '.join(_KNOWN)} first")
    _codes[dtype] = code, _KNOWN[code]
    return _codes[dtype]


def _bytes_of(tensor: Any) -> Any:
    return tensor.reshape(-1).view(sys.modules["torch"].uint8)


def _copy(tensor: Any, code: str, target: arrays.Buffer) -> None:
    nbytes = tensor.numel() * tensor.element_size()
    over_bytes(arrays.flat(target, nbytes), code, tuple(tensor.shape)).copy_(tensor)


# ---- bytes as tensors


def over_bytes(flat: arrays.ndarray, code: str, shape: tuple[int, ...]) -> "torch.Tensor":
    """A tensor over a writable vector of uint8, which it keeps alive. HandleError where dtype and shape do not fit."""
    torch_ = import_torch("make a tensor")
    dtype = getattr(torch_, code, None) if code in _KNOWN else None
    if dtype is None:
        raise UnsupportedArrayError(
            f"torch {torch_.__version__} has no dtype {code[:200]!r}; take the block as an ndarray"
        )
    # Counted here: versions of torch differ in whether they notice that a product has wrapped.
    if math.prod(shape) * dtype.itemsize != flat.size or max(shape, default=0) > _LONGEST:
        raise HandleError(f"the handle says dtype {code!r}, shape {shape}, and there are {flat.size} bytes")
    try:
        # an empty vector has strides that torch will not see as another dtype
        whole = torch_.from_numpy(flat).view(dtype) if flat.size else torch_.empty(0, dtype=dtype)
        tensor: torch.Tensor = whole.view(shape)
        return tensor
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise HandleError(f"the handle says dtype {code!r}, shape {shape}: {error}") from None


def dtype_named(dtype: object) -> "tuple[str, int] | None":
    """``(code, item size in bytes)`` of a torch dtype; None where it is none."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(dtype, torch.dtype):
        return None
    return (_codes.get(dtype) or _learn(dtype))[0], dtype.itemsize


def item_bytes(code: str) -> int:
    """Bytes of one element. UnsupportedArrayError where torch is not installed, or has no such dtype."""
    dtype = getattr(import_torch("make a tensor"), code, None) if code in _KNOWN else None
    if dtype is None:
        raise UnsupportedArrayError(f"torch has no dtype {code[:200]!r}; take the block as an ndarray")
    length: int = dtype.itemsize
    return length


# ---- tensors that are views of blocks


def storage_address(tensor: Any) -> int:
    """Address of the memory that a tensor is a view of; 0 where it has none."""
    try:
        pointer: int = tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0  # sparse, meta, fake
    return pointer


def storage_bytes(tensor: Any) -> int:
    """Length of that memory."""
    length: int = tensor.untyped_storage().nbytes()
    return length


def address(tensor: Any) -> int:
    """Address of the first element."""
    pointer: int = tensor.data_ptr()
    return pointer


def is_plain(tensor: Any) -> bool:
    """Whether the bytes at `address` are the tensor's values, in C order."""
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def shape_of(tensor: Any) -> tuple[str, tuple[int, ...], int]:
    """``(dtype, shape, bytes)`` of a tensor."""
    return (
        (_codes.get(tensor.dtype) or _learn(tensor.dtype))[0],
        tuple(tensor.shape),
        tensor.numel() * tensor.element_size(),
    )


def size_bytes(tensor: Any) -> int:
    """Bytes of a tensor's elements; 0 for kinds that have no such thing."""
    try:
        length: int = tensor.numel() * tensor.element_size()
    except RuntimeError:
        return 0
    return length


def is_elsewhere(thing: Any) -> bool:
    """Whether that is a tensor whose values are not in this host's memory."""
    return is_tensor(thing) and thing.device.type != "cpu"


def is_values_alone(tensor: Any) -> bool:
    """Whether nothing but values would be lost by copying a tensor out of its storage."""
    if tensor.requires_grad or tensor.device.type != "cpu" or tensor.layout is not sys.modules["torch"].strided:
        return False
    return not (tensor.is_quantized or tensor.is_nested or tensor.__dict__)


_pickles: dict[Any, bool] = {}


def torch_pickles(tensor: Any) -> bool:
    """Whether torch reads back what it pickles of this dtype. torch 2.13 does not for float8, complex32 and uint16 to
    uint64, whose storages have no type of their own; so it is tried, once for each dtype."""
    dtype = tensor.dtype
    known = _pickles.get(dtype)
    if known is None:
        try:
            pickle.loads(pickle.dumps(sys.modules["torch"].empty(1, dtype=dtype)))
            known = True
        except Exception:
            known = False
        _pickles[dtype] = known
    return known
