"""What a group's messages are: some parts, each an encoded tree, that travel together, and a head that travels with them.

::

    4  magic "shmP"    1  version (1)    1  kind: 0 parts, 1 the entry rank's error, 2 parts that ride    2  zero
    8  number of the message, from 1 on; those that ride, in a broadcast of somebody else's, are counted by themselves
    4  length of the head, bytes         4  count of parts
    8  low half of the XXH3-128 (seed 0) of the 24 bytes above and of all that follows
    8  for each part: its length, bytes
    the head; the parts
    where it is an error: the head alone, JSON: type, text, traceback
"""

import json
import traceback
from collections.abc import Sequence
from struct import Struct
from typing import NamedTuple

from . import _native
from .errors import HandleError

MAGIC = b"shmP"
VERSION = 1
_FIXED = Struct("<4sBB2xQII")
_CHECK = Struct("<Q")
_MASK_64 = (1 << 64) - 1
_PARTS, _ERROR, _RIDING = 0, 1, 2


class Message(NamedTuple):
    """One message, taken apart."""

    number: int
    head: bytes
    parts: list[memoryview]
    error: dict[str, str] | None
    """What the entry rank could not do, in place of parts."""
    rides: bool = False


def pack(number: int, head: bytes, parts: Sequence[bytes], rides: bool = False) -> bytes:
    """Bytes of a message; ``parts``: encoded trees."""
    return _pack(_RIDING if rides else _PARTS, number, head, parts)


def pack_error(number: int, error: BaseException) -> bytes:
    """Bytes of a message that says what the entry rank could not do, so that the others do not wait for it."""
    try:
        text, trace = str(error), "".join(traceback.format_exception(error))
    except Exception as second:  # the others wait for a message, whatever the error's own __str__ does
        text, trace = f"its text can not be had: {type(second).__name__}", ""
    told = {"type": type(error).__name__, "text": text, "traceback": trace}
    return _pack(_ERROR, number, json.dumps(told).encode(), ())


def unpack(blob: "bytes | bytearray | memoryview") -> Message:
    """HandleError where the bytes are no message, or were cut or changed."""
    raw = memoryview(blob).cast("B")
    fixed = _FIXED.size + _CHECK.size
    if len(raw) < fixed:
        raise HandleError(f"decode message: {len(raw)} bytes, at least {fixed} are needed")
    magic, version, kind, number, head_bytes, count = _FIXED.unpack_from(raw)
    if magic != MAGIC:
        raise HandleError(f"decode message: it starts with {magic!r}, not {MAGIC!r}")
    if version != VERSION:
        raise HandleError(f"decode message: version {version}, this build reads {VERSION}")
    (check,) = _CHECK.unpack_from(raw, _FIXED.size)
    found = _check(raw[: _FIXED.size], raw[fixed:])
    if found != check:
        raise HandleError(f"decode message: its hash is {found:016x}, it says {check:016x}; it was cut or changed")
    at = fixed + 8 * count
    if kind not in (_PARTS, _ERROR, _RIDING) or at + head_bytes > len(raw):
        raise HandleError(f"decode message: kind {kind}, {count} parts and a head of {head_bytes} in {len(raw)} bytes")
    lengths = raw[fixed:at].cast("Q").tolist()
    head = bytes(raw[at : at + head_bytes])
    at += head_bytes
    if at + sum(lengths) != len(raw):
        raise HandleError(f"decode message: its parts end at {at + sum(lengths)}, it has {len(raw)} bytes")
    parts = []
    for length in lengths:
        parts.append(raw[at : at + length])
        at += length
    return Message(number, head, parts, _read_error(head) if kind == _ERROR else None, kind == _RIDING)


def _pack(kind: int, number: int, head: bytes, parts: Sequence[bytes]) -> bytes:
    fixed = _FIXED.pack(MAGIC, VERSION, kind, number, len(head), len(parts))
    lengths = b"".join([len(part).to_bytes(8, "little") for part in parts])
    rest = b"".join([lengths, head, *parts])
    return b"".join([fixed, _CHECK.pack(_check(fixed, rest)), rest])


def _read_error(head: bytes) -> dict[str, str]:
    try:
        error = json.loads(head)
    except (ValueError, RecursionError) as wrong:
        raise HandleError(f"decode message: its error can not be read: {wrong}") from None
    if not isinstance(error, dict) or not all(isinstance(text, str) for text in error.values()):
        raise HandleError(f"decode message: its error is a {type(error).__name__}, not a dict of texts")
    return error


def _check(fixed: "bytes | memoryview", rest: "bytes | memoryview") -> int:
    # The hash of the rest seeds the hash of the fixed part: no copy of either.
    return _native.hash128(fixed, _native.hash128(rest) & _MASK_64) & _MASK_64
