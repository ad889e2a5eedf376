"""What a worker process answers with: a tree whose arrays lie in blocks that were reserved for it.

What `write` writes, integers little-endian::

    4  magic "shmD"    1  version (1)    3  zero
    8  low half of the XXH3-128 (seed 0) of all that follows
    4  count of arrays that left the pickle    8  length of the pickle; then, for each array,
       1  kind (0 numpy, 1 torch)    1  place (0 in a block, 1 behind the pickle)    2  length of dtype    1  dimensions
       4  number of the block    8  offset in it; zero where it is in none
       dtype, 8 for each dimension
    the pickle, as `codec.take_apart` makes it; the bytes of the arrays that are in no block

The hash finds accidents of a process that is about to die. It is no proof against a process that means harm, as no rank
has one against its peers: the pickle is code of the worker's. What `read` makes sure of is that every array lies inside
of a block of this request.
"""

import math
from collections.abc import Sequence
from struct import Struct
from struct import error as struct_error
from typing import Any, NamedTuple

from . import _native, arrays, tensors
from .errors import HandleError

MAGIC = b"shmD"
VERSION = 1

_HEAD = Struct("<4sB3xQ")
_COUNTS = Struct("<IQ")
_PART = Struct("<BBHBIQ")
_MASK_64 = (1 << 64) - 1
_MAX_DIMENSIONS = 64  # of numpy; torch has as many


class Part(NamedTuple):
    """One array of a draft."""

    kind: str
    dtype: str
    shape: tuple[int, ...]
    block: int = 0
    offset: int = 0
    """Bytes."""
    source: arrays.Buffer | None = None
    """Its bytes where it is in no block."""


def write(pickled: bytes, parts: Sequence[Part]) -> bytes:
    """Bytes of which `read` makes the same."""
    pieces: list[Any] = [_COUNTS.pack(len(parts), len(pickled))]
    for kind, dtype, shape, block, offset, source in parts:
        code = dtype.encode()
        pieces.append(_PART.pack(kind == "torch", source is not None, len(code), len(shape), block, offset))
        pieces.append(code)
        pieces += [length.to_bytes(8, "little") for length in shape]
    pieces.append(pickled)
    pieces += [part.source for part in parts if part.source is not None]
    body = b"".join(pieces)
    return _HEAD.pack(MAGIC, VERSION, _native.hash128(body) & _MASK_64) + body


def read(raw: "bytes | memoryview", blocks: Sequence[arrays.ndarray]) -> tuple[memoryview, list[Any]]:
    """A pickle, and the arrays and tensors that belong into it. ``blocks``: the bytes of each that was reserved.

    HandleError where it is no draft, was cut or changed, or names what is not there; UnsupportedArrayError for a tensor where
    torch is not installed."""
    view = memoryview(raw)
    if len(view) < _HEAD.size + _COUNTS.size:
        raise HandleError(f"read draft: {len(view)} bytes, at least {_HEAD.size + _COUNTS.size} are needed")
    magic, version, check = _HEAD.unpack_from(view)
    if magic != MAGIC or version != VERSION:
        raise HandleError(f"read draft: it starts with {magic!r}, version {version}, not {MAGIC!r}, version {VERSION}")
    body = view[_HEAD.size :]
    found = _native.hash128(body) & _MASK_64
    if found != check:
        raise HandleError(f"read draft: its hash is {found:016x}, it says {check:016x}; it was cut or changed")
    count, pickle_bytes = _COUNTS.unpack_from(body)
    at = _COUNTS.size
    forms: list[tuple[Part, bool]] = []
    for number in range(count):
        part, at, inline = _read_part(body, at, f"array {number} of {count}")
        forms.append((part, inline))
    if pickle_bytes > len(body) - at:
        raise HandleError(f"read draft: its pickle has {pickle_bytes} bytes, {len(body) - at} are left")
    pickled = body[at : at + pickle_bytes]
    at += pickle_bytes
    things: list[Any] = []
    for number, (part, inline) in enumerate(forms):
        nbytes = _length(part, f"array {number} of {count}")
        if inline:
            things.append(_over(part, arrays.copy(arrays.flat(_cut(body, at, nbytes, number), nbytes))))
            at += nbytes
        else:
            things.append(_over(part, _inside(part, nbytes, blocks, number)))
    if at != len(body):
        raise HandleError(f"read draft: {count} arrays end at {at}, it has {len(body)} bytes")
    return pickled, things


def _read_part(body: memoryview, at: int, which: str) -> tuple[Part, int, bool]:
    try:
        is_torch, inline, code_bytes, dimensions, block, offset = _PART.unpack_from(body, at)
    except struct_error:
        raise HandleError(f"read draft: {which} starts at {at}, it has {len(body)} bytes") from None
    code_at = at + _PART.size
    shape_at = code_at + code_bytes
    end = shape_at + 8 * dimensions
    if end > len(body) or is_torch > 1 or inline > 1 or dimensions > _MAX_DIMENSIONS:
        raise HandleError(
            f"read draft: {which} has kind {is_torch}, place {inline}, {dimensions} dimensions and ends at {end} of {len(body)}"
        )
    code = bytes(body[code_at:shape_at]).decode(errors="replace")
    shape = tuple([int.from_bytes(body[each : each + 8], "little") for each in range(shape_at, end, 8)])
    return Part("torch" if is_torch else "numpy", code, shape, block, offset), end, bool(inline)


def _length(part: Part, which: str) -> int:
    """Bytes that the array has by what is said of it."""
    known = arrays.dtype_of(part.dtype).itemsize if part.kind == "numpy" else tensors.item_bytes(part.dtype)
    nbytes = math.prod(part.shape) * known
    if nbytes >= 1 << 62:
        raise HandleError(f"read draft: {which} has dtype {part.dtype!r}, shape {part.shape}: {nbytes} bytes")
    return nbytes


def _cut(body: memoryview, at: int, nbytes: int, number: int) -> memoryview:
    if nbytes > len(body) - at:
        raise HandleError(f"read draft: array {number} has {nbytes} bytes, {len(body) - at} are left")
    return body[at : at + nbytes]


def _inside(part: Part, nbytes: int, blocks: Sequence[arrays.ndarray], number: int) -> arrays.ndarray:
    if part.block >= len(blocks):
        raise HandleError(
            f"read draft: array {number} lies in block {part.block}, {len(blocks)} were reserved for the request"
        )
    block = blocks[part.block]
    if part.offset > block.nbytes or nbytes > block.nbytes - part.offset:
        raise HandleError(
            f"read draft: array {number} has {nbytes} bytes at {part.offset} of block {part.block}, which has {block.nbytes}"
        )
    return block[part.offset : part.offset + nbytes]


def _over(part: Part, flat: arrays.ndarray) -> Any:
    if part.kind == "numpy":
        return arrays.over(flat, part.dtype, part.shape)
    return tensors.over_bytes(flat, part.dtype, part.shape)
