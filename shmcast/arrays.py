"""numpy's side of things, and the only module that imports it: dtypes as text, arrays as bytes, bytes as arrays."""

import ast
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from .errors import HandleError, UnsupportedArrayError

ndarray: TypeAlias = np.ndarray[Any, Any]
NDARRAY = np.ndarray
SCALAR = np.generic
Buffer: TypeAlias = Any
"""Whatever exports its bytes in one piece; no type says that before Python 3.12."""

_MAX_CODE_LENGTH = 0xFFFF
_MAX_CACHED = 1024
_PIECE_WORDS = 1 << 16
_MAX_CACHED_LENGTH = 256  # of a code; longer ones come from strangers who fill the cache, hardly from anybody else


class Form(NamedTuple):
    """An array as the arena sees it."""

    kind: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    source: Buffer | None
    """C-contiguous bytes, or None where they have to be put together by `fill`."""
    fill: Callable[[Buffer], None] | None
    """Writes the bytes in C order into a buffer of ``nbytes``."""


# ---- dtypes


_codes: dict[np.dtype[Any], str] = {}
_dtypes: dict[str, np.dtype[Any]] = {}


def code_of(dtype: np.dtype[Any]) -> str:
    """A dtype as text; `dtype_of` gives an equal one. UnsupportedArrayError for objects, for elements of no bytes (`_encode`
    says why) and for what can not be written down."""
    code = _codes.get(dtype)
    if code is None:
        code = _encode(dtype)
        if len(_codes) >= _MAX_CACHED:
            _codes.clear()
        _codes[dtype] = code
    return code


def dtype_of(code: str) -> np.dtype[Any]:
    """The dtype that a text names. HandleError where it names none; UnsupportedArrayError for those that only torch has."""
    dtype = _dtypes.get(code)
    if dtype is None:
        dtype = _decode(code)
        if dtype is None or _encode(dtype) != code:
            if code.isidentifier():
                raise UnsupportedArrayError(f"numpy has no dtype {code!r}; take the block as a tensor")
            raise HandleError(f"the handle's dtype {code[:200]!r} is none that this build writes")
        if len(_dtypes) >= _MAX_CACHED:
            _dtypes.clear()
        if len(code) <= _MAX_CACHED_LENGTH:
            _dtypes[code] = dtype
    return dtype


def _encode(dtype: np.dtype[Any]) -> str:
    if dtype.itemsize == 0:
        # A handle of a hundred bytes would name an array of as many of them as it likes: no bytes bear it out, and
        # whoever copies it, or makes a list of it, is at it for ever. So there is no such handle, and none is read.
        raise UnsupportedArrayError(
            f"dtype {str(dtype)[:200]} has elements of no bytes, of which there is nothing to share; say how long they are "
            "(S5, U7), or let dumps() pickle the array"
        )
    if dtype.hasobject:
        raise UnsupportedArrayError(
            f"dtype {dtype} holds Python objects, which no other process can read; convert the array to numbers or to "
            "fixed-size bytes ('S') or text ('U') first, or let dumps() pickle it"
        )
    if dtype.kind in "biufc" and dtype.isnative:
        code = dtype.name
    elif dtype.names is None and dtype.subdtype is None:
        code = dtype.str
    else:
        try:
            code = repr(np.lib.format.dtype_to_descr(dtype))
        except (TypeError, ValueError) as error:
            raise UnsupportedArrayError(
                f"dtype {dtype} has no descriptor: {error}; copy its fields to plain arrays"
            ) from None
    if len(code.encode()) > _MAX_CODE_LENGTH or _decode(code) != dtype:
        raise UnsupportedArrayError(
            f"dtype {str(dtype)[:200]} can not be written down (as {code[:200]!r} it would come back another); view the array as "
            "plain numbers, e.g. array.view('uint8')"
        )
    return str(code)


def _decode(code: str) -> np.dtype[Any] | None:
    try:
        dtype: np.dtype[Any]
        if code.startswith("["):
            dtype = np.lib.format.descr_to_dtype(ast.literal_eval(code))
        else:
            dtype = np.dtype(code)
    except Exception:  # of a text that may be anybody's, and what ast and numpy say to one differs between versions
        return None
    return None if dtype.hasobject or dtype.itemsize == 0 else dtype


# ---- arrays as bytes


def describe(array: ndarray) -> Form:
    """What has to be published of an ndarray: one pass over its bytes at most, made by whoever takes `source` or `fill`."""
    if type(array) is not NDARRAY:
        if isinstance(array, np.ma.MaskedArray):
            raise UnsupportedArrayError("publish: a masked array is two arrays; pass array.data and array.mask")
        array = array.view(NDARRAY)
    dtype = array.dtype
    code = _codes.get(dtype) or code_of(dtype)
    if array.flags.c_contiguous:
        return _new(Form, ("numpy", code, array.shape, array.nbytes, array, None))
    return Form("numpy", code, array.shape, array.nbytes, None, lambda target: _copy(array, target))


_new = tuple.__new__


def describe_all(things: Iterable[Any], other: Callable[[Any], Form]) -> list[Form]:
    """`describe` of each ndarray, and what ``other`` says of everything else; made for hundreds of small ones."""
    forms: list[Form] = []
    dtype, code = None, ""
    for thing in things:
        if type(thing) is not NDARRAY or not thing.flags.c_contiguous:
            forms.append(other(thing))
            continue
        if thing.dtype is not dtype:
            dtype = thing.dtype
            code = code_of(dtype)
        forms.append(_new(Form, ("numpy", code, thing.shape, thing.nbytes, thing, None)))
    return forms


def _copy(array: ndarray, target: Buffer) -> None:
    np.copyto(np.ndarray(array.shape, array.dtype, target), array, casting="no")


def same_bytes(first: Buffer, second: Buffer) -> bool:
    """Whether two buffers have the same bytes. Without the GIL, piece by piece, so that nothing large is made for it."""
    one, other = np.frombuffer(first, np.uint8), np.frombuffer(second, np.uint8)
    if one.size != other.size:
        return False
    end = one.size // 8 * 8  # by words, which takes half the time
    words, others = one[:end].view(np.uint64), other[:end].view(np.uint64)
    return np.array_equal(one[end:], other[end:]) and all(
        np.array_equal(words[at : at + _PIECE_WORDS], others[at : at + _PIECE_WORDS])
        for at in range(0, words.size, _PIECE_WORDS)
    )


def contiguous(form: Form) -> Buffer:
    """The bytes of a form, put together in private memory if they are not in one piece."""
    if form.source is not None:
        return form.source
    target = np.empty(form.nbytes, np.uint8)
    if form.fill is not None:
        form.fill(target)
    return target


def write(form: Form, target: Buffer) -> None:
    """Copy the bytes of a form into a buffer of as many; without the GIL."""
    if form.source is not None:
        np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(form.source, np.uint8))
    elif form.fill is not None:
        form.fill(target)


# ---- bytes as arrays


def over(buffer: Buffer, code: str, shape: tuple[int, ...]) -> ndarray:
    """An ndarray over a buffer; writable where the buffer is. HandleError where dtype and shape do not fit its length."""
    dtype = _dtypes.get(code) or dtype_of(code)
    try:
        array: ndarray = NDARRAY(shape, dtype, buffer)
    except (TypeError, ValueError, OverflowError) as error:
        raise HandleError(f"the handle says dtype {code[:200]!r}, shape {shape}: {error}") from None
    return array


def flat(buffer: Buffer, nbytes: int) -> ndarray:
    """The bytes of a buffer as a vector of uint8."""
    vector: ndarray = NDARRAY((nbytes,), np.uint8, buffer)
    return vector


def empty(shape: tuple[int, ...], code: str) -> ndarray:
    """Private memory, writable and not initialized."""
    return np.empty(shape, dtype_of(code))


def copy(array: ndarray) -> ndarray:
    """A private, writable copy in C order."""
    return np.array(array, order="C", copy=True, subok=False)


def seal(array: ndarray) -> None:
    """Make an array refuse writes from here on."""
    array.flags.writeable = False


# ---- arrays as numpy pickles them, for who does not let numpy read a stranger's pickle


_PLAIN = re.compile(r"[biufc]\d{1,2}|[SU]\d{1,9}", re.ASCII)
_TIMES = re.compile(r"[mM]8(\[\d{0,9}(Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as)\])?", re.ASCII)


def plain_dtype(code: str) -> np.dtype[Any]:
    """A dtype of numbers, times, fixed-size bytes or text, in native order. ValueError for all others, TypeError."""
    if not _PLAIN.fullmatch(code) and not _TIMES.fullmatch(code):
        raise ValueError(f"dtype {code[:50]!r} is not one of numbers, times, bytes or text")
    return np.dtype(code)


def in_order(dtype: np.dtype[Any], order: str) -> np.dtype[Any]:
    """The same with that byte order: "<", ">", "=" or "|". ValueError."""
    if order not in ("<", ">", "=", "|"):
        raise ValueError(f"byte order {order!r} of dtype {dtype}")
    turned: np.dtype[Any] = dtype.newbyteorder(">") if order == ">" else dtype
    return turned


def over_pickled(buffer: Buffer, dtype: np.dtype[Any], shape: tuple[int, ...], order: str) -> ndarray:
    """An ndarray over the bytes of a pickle. TypeError, ValueError where they do not fit."""
    if order not in ("C", "F"):
        raise ValueError(f"order {order!r} of an array")
    array: ndarray = np.ndarray(shape, dtype, buffer, order="C" if order == "C" else "F")
    if array.nbytes != len(buffer):
        raise ValueError(f"an array of {array.nbytes} bytes from {len(buffer)}")
    return array


def scalar(raw: Buffer, dtype: np.dtype[Any]) -> Any:
    """A numpy scalar. TypeError, ValueError where the bytes do not fit."""
    return over_pickled(raw, dtype, (), "C")[()]


class Span:
    """Memory that arrays are built over by its address; keeps what it belongs to alive, and can be watched by weakref."""

    __slots__ = ("__array_interface__", "__weakref__", "owners")

    def __init__(self, address: int, nbytes: int, *owners: object) -> None:
        self.owners = owners
        self.__array_interface__ = {"version": 3, "shape": (nbytes,), "typestr": "|u1", "data": (address, False)}

    @property
    def array(self) -> ndarray:
        """The bytes as a vector of uint8 that says it may be written, though its pages may be read-only."""
        return np.asarray(self)


# ---- arrays that are views of blocks


def origin(array: ndarray) -> object:
    """What the memory of an array belongs to at the end: the array itself, or the last of its chain of bases."""
    base: object = array
    while isinstance(base, NDARRAY) and base.base is not None:
        base = base.base
    return base


def dtype_named(dtype: Any) -> tuple[str, int]:
    """``(code, item size in bytes)`` of whatever numpy takes for a dtype. TypeError, UnsupportedArrayError."""
    made = np.dtype(dtype)
    return code_of(made), made.itemsize


def address(array: ndarray) -> int:
    """Address of the first element."""
    pointer: int = array.__array_interface__["data"][0]
    return pointer
