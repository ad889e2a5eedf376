"""How features are named: once, in the tokenizer, so that no rank reads their bytes for it."""

from collections.abc import Sequence
from typing import Any, Literal

from ... import tensors
from ...attach import digest
from ...errors import UnsupportedArrayError
from ...handle import Handle
from . import features, patches

HashName = Literal["sha256", "xxh3", "off"]
HASHES = ("sha256", "xxh3", "off")
_MASK_64 = (1 << 64) - 1
_MOST = 1024

_chosen: str = "sha256"
_known: dict[tuple[Handle, ...], int] = {}
"""SHA-256 by SGLang of what lies in these blocks: a feature that is sent n times is hashed once. By block, not by the digest
that we have: whoever can make two contents of one XXH3 would give the second the name of the first."""


def set_hash(name: str) -> None:
    """One of `HASHES`."""
    global _chosen
    _chosen = name


def wrap_shm_features(obj: Any) -> Any:
    """SGLang's function of that name: features become stubs. Items that have no hash get one before."""
    from sglang.srt.managers import mm_utils
    from sglang.srt.runtime_context import get_serving

    shared = not (mm_utils._get_is_default_transport() or get_serving().skip_tokenizer_init)
    items = obj.mm_inputs.mm_items if shared and obj.mm_inputs else ()
    before = [(item, item.feature if item.feature is not None else item.precomputed_embeddings) for item in items]
    wrapped = patches.original(mm_utils, "wrap_shm_features")(obj)
    for item, value in before:
        if item.hash is None and _chosen != "off" and _is_hashable(value):
            item.hash = _hash(value)
            for stub in _stubs(item):
                stub.precomputed_hash = item.hash
    return wrapped


def _is_hashable(value: Any) -> bool:
    """Tensors in host memory, as SGLang shares them."""
    parts = value if isinstance(value, (list, tuple)) else [value]
    return bool(parts) and all(tensors.is_tensor(part) and part.is_cpu for part in parts)


def _hash(value: Any) -> int | None:
    from sglang.srt.environ import envs

    if envs.SGLANG_MM_SKIP_COMPUTE_HASH.get():
        return None  # a random one, which each rank makes for itself
    parts = value if isinstance(value, (list, tuple)) else [value]
    try:
        return _xxh3(parts) if _chosen == "xxh3" else _sha256(value, parts)
    except UnsupportedArrayError:
        return None  # sparse, quantized: for SGLang to do as it can


def _xxh3(parts: Sequence[Any]) -> int:
    return (_digest(parts[0]) if len(parts) == 1 else digest(list(parts))) & _MASK_64


def _digest(part: Any) -> int:
    """Of a tensor that has just been published for free."""
    block = features.block_of(part)
    known = None if block is None else block.digest
    return digest(part) if known is None else known


def _sha256(value: Any, parts: Sequence[Any]) -> int:
    from sglang.srt.managers.mm_utils import hash_feature

    tensors.describe_all(parts)  # or it is none that can be hashed
    blocks = tuple([block for part in parts if (block := features.block_of(part)) is not None])
    found = _known.get(blocks) if len(blocks) == len(parts) else None
    if found is None:
        # A list as a list, whatever it is: SGLang hashes the bytes of tuples in another way, and pickles them.
        found = int(hash_feature(list(value) if isinstance(value, (list, tuple)) else value))
        if len(blocks) == len(parts):
            if len(_known) >= _MOST:
                _known.clear()
            _known[blocks] = found
    return found


def _stubs(item: Any) -> list[Any]:
    """Of one tensor: a list's hash covers all of its elements, and none of them alone."""
    return [value for value in (item.feature, item.precomputed_embeddings) if hasattr(value, "precomputed_hash")]
