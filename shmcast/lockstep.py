"""What the entry rank tells the others of requests: the head of a group's message.

Requests go by their serial numbers, the how-manieth `submit` or `cast` of a caster they came in with. That is the same
number on every rank if all ranks submit the same in the same order, which is what ``submitted`` and ``names`` are for: a
rank that was given something else says so, rather than that it gives one request the features of another.

Integers little-endian::

    4  magic "shmL"    1  version (2)    1  call: 0 step, collect or close, 1 cast    2  zero
    8  submitted: requests that the entry rank had been given when it packed this
    8  names: of those, in their order; see `chain`
    8  bytes that are in flight on the entry rank once this is delivered
    4  count of records, in the order of delivery; then, for each,
       8  serial number, from 0 on    1  end, see below
       where it failed or was refused: 4 + 4 + 4 lengths in bytes of kind, text and traceback; those, UTF-8

What a record says of its request::

    0  value          the part is the value
    1  None           2  failed           3  refused          4  cancelled
    5  begin raw      the part is the raw request; every rank begins to materialize it, in the background
    6  begin own      the same of the raw request that every rank was given itself
    7  begun          the value is what every rank has made of what it began
    8  raw            the part is the raw request; every rank materializes it before it goes on
    9  own            the same of the raw request that every rank was given itself

The n-th record that has a part belongs to the n-th part of the message. Of the bytes themselves the message has a hash;
what is checked here is that they make sense.
"""

import traceback
from collections.abc import Hashable, Sequence
from enum import Enum
from struct import Struct
from typing import NamedTuple
from uuid import UUID

from . import _native
from .errors import HandleError, MaterializeError

MAGIC = b"shmL"
VERSION = 2
STEP, CAST = 0, 1
"""Calls."""
VALUE, NONE, FAILED, REFUSED, CANCELLED, BEGIN_RAW, BEGIN_OWN, BEGUN, RAW, OWN = range(10)
"""Ends, and what there is before the end."""
BEGINS = frozenset((BEGIN_RAW, BEGIN_OWN))
"""Are followed by another record of the same request, whatever becomes of it on a rank."""
MADE_AT_ONCE = frozenset((RAW, OWN))
"""Are materialized by every rank when the message comes."""
HAVE_PART = frozenset((VALUE, BEGIN_RAW, RAW))
CAN_FAIL = frozenset((VALUE, BEGUN, RAW, OWN))
"""Of which a rank may have to say that it could not do it."""

_FIXED = Struct("<4sBB2xQQQI")
_RECORD = Struct("<QB")
_LENGTHS = Struct("<III")
_PADDING = slice(6, 8)
_MASK_64 = (1 << 64) - 1
_MAX_TEXT_CHARS = 8192
_MAX_TRACE_CHARS = 32768
"""A message is for all ranks to wait for: of a traceback the last calls are what is read."""


class Failure(NamedTuple):
    """An exception as text, which is all of it that every rank can have."""

    kind: str
    """Name of its type."""
    text: str
    traceback: str


class Record(NamedTuple):
    """How one request has ended."""

    serial: int
    end: int
    failure: Failure | None = None
    """Where it has `FAILED` or was `REFUSED`."""


class Head(NamedTuple):
    """What one message says."""

    call: int
    submitted: int
    names: int
    inflight_bytes: int
    records: Sequence[Record]


def chain(names: int, rid: Hashable) -> int:
    """Names of one request more: 64 bits of a hash that depends on all ids so far and on their order.

    Of ids that are no text, numbers, UUIDs, enum members or tuples of these only the type counts: what else there is may
    look different in another process."""
    return _native.hash128(_name(rid).encode("utf-8", "surrogatepass"), names) & _MASK_64


def _name(rid: object) -> str:
    if isinstance(rid, Enum):
        return f"{type(rid).__qualname__}.{rid.name}"
    if isinstance(rid, str):
        return str.__repr__(rid)
    if rid is None or type(rid) in (int, float, bytes, bool):
        return repr(rid)
    if isinstance(rid, tuple):
        return f"({','.join([_name(item) for item in rid])})"
    return str(rid) if type(rid) is UUID else type(rid).__qualname__


def failure_of(error: BaseException) -> Failure:
    """An exception with its traceback, whatever its own ``__str__`` does. A MaterializeError is one that has been told of
    before, by another process: what it says of itself stays."""
    if isinstance(error, MaterializeError) and error.kind:
        return Failure(error.kind, _short(error.text), error.traceback[-_MAX_TRACE_CHARS:])
    try:
        text = str(error)
        trace = "".join(traceback.format_exception(error))
    except BaseException as second:
        text, trace = f"its text can not be had: {type(second).__name__}", ""
    return Failure(type(error).__name__, _short(text), trace[-_MAX_TRACE_CHARS:])


def _short(text: str) -> str:
    return text if len(text) <= _MAX_TEXT_CHARS else f"{text[:_MAX_TEXT_CHARS]}... ({len(text)} characters)"


def write(head: Head) -> bytes:
    """Bytes from which `read` makes an equal head."""
    pieces = [
        _FIXED.pack(MAGIC, VERSION, head.call, head.submitted, head.names, head.inflight_bytes, len(head.records))
    ]
    for serial, end, failure in head.records:
        pieces.append(_RECORD.pack(serial, end))
        if failure is not None:
            texts = [text.encode("utf-8", "replace") for text in failure]
            pieces.append(_LENGTHS.pack(*map(len, texts)))
            pieces += texts
    return b"".join(pieces)


def read(raw: bytes, parts: int) -> Head:
    """The head that comes with so many parts. HandleError where it is none, or does not fit them."""
    if len(raw) < _FIXED.size:
        raise HandleError(f"decode head: {len(raw)} bytes, at least {_FIXED.size} are needed")
    magic, version, call, submitted, names, inflight_bytes, count = _FIXED.unpack_from(raw)
    if magic != MAGIC:
        raise HandleError(f"decode head: it starts with {magic!r}, not {MAGIC!r}")
    if version != VERSION:
        raise HandleError(f"decode head: version {version}, this build reads {VERSION}")
    if call not in (STEP, CAST) or any(raw[_PADDING]):
        raise HandleError(f"decode head: call {call}, padding {raw[_PADDING].hex()}: neither is what this build writes")
    records: list[Record] = []
    at = _FIXED.size
    for number in range(count):
        record, at = _read_record(raw, at, f"record {number} of {count}")
        records.append(record)
    if at != len(raw):
        raise HandleError(f"decode head: {count} records end at {at}, it has {len(raw)} bytes")
    serials = {record.serial for record in records}
    if len(serials) != count or max(serials, default=-1) >= submitted:
        raise HandleError(
            f"decode head: {count} records name {len(serials)} requests, the last {max(serials, default=-1)}, "
            f"of {submitted}"
        )
    wanted = sum([record.end in HAVE_PART for record in records])
    if wanted != parts:
        raise HandleError(f"decode head: {wanted} records have a part, {parts} parts came")
    return Head(call, submitted, names, inflight_bytes, records)


def _read_record(raw: bytes, at: int, which: str) -> tuple[Record, int]:
    """A record and where it ends."""
    if at + _RECORD.size > len(raw):
        raise HandleError(f"decode head: {which} starts at {at}, it has {len(raw)} bytes")
    serial, end = _RECORD.unpack_from(raw, at)
    at += _RECORD.size
    if end not in (FAILED, REFUSED):
        if end > OWN:
            raise HandleError(f"decode head: {which} has end {end}")
        return Record(serial, end), at
    if at + _LENGTHS.size > len(raw):
        raise HandleError(f"decode head: the texts of {which} start at {at}, it has {len(raw)} bytes")
    lengths = _LENGTHS.unpack_from(raw, at)
    at += _LENGTHS.size
    if sum(lengths) > len(raw) - at:
        raise HandleError(f"decode head: the texts of {which} have {lengths} bytes, {len(raw) - at} are left")
    texts = []
    for length in lengths:
        try:
            texts.append(raw[at : at + length].decode())
        except UnicodeDecodeError as error:
            raise HandleError(f"decode head: a text of {which}: {error}") from None
        at += length
    return Record(serial, end, Failure(*texts)), at
