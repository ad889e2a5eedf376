"""`Pair`: byte strings from one rank of a gloo group to another, in order, as pipeline stages send them.

A message is one tensor of `FRAME_BYTES`, and a second one where it does not fit. The frame, integers little-endian::

    4  magic "shmD"    1  version (1)    3  zero
    8  number of the message on this way, from 1 on
    8  length of the payload, bytes
    8  low half of the XXH3-128 (seed 0) of the second tensor, 0 where there is none
    8  low half of the XXH3-128 (seed 0) of the 32 bytes above and of the payload, if it lies in the frame
    payload, if it fits; whatever follows it means nothing
"""

import warnings
from struct import Struct
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from .. import _native
from ..errors import GroupError, GroupTimeoutError, PeerLostError

MAGIC = b"shmD"
VERSION = 1
FRAME_BYTES = 4096

_HEAD = Struct("<4sB3xQQQ")
_CHECK = Struct("<Q")
_PAYLOAD_AT = _HEAD.size + _CHECK.size
INLINE_BYTES = FRAME_BYTES - _PAYLOAD_AT
"""Longest payload that needs no second tensor."""
_MASK_64 = (1 << 64) - 1


class Work(NamedTuple):
    """A tensor that is being sent: wait for ``work``, and keep ``payload`` until then."""

    work: Any
    payload: torch.Tensor


class Pair:
    """One way from this rank to another of a process group, or from another to this. ``other``: its rank in the default
    group. One thread a way."""

    def __init__(self, process_group: Any, other: int) -> None:
        """ValueError where that is not another rank of the group: to send there would wait for its timeout."""
        ranks = dist.get_process_group_ranks(process_group)
        if other not in ranks or other == dist.get_rank():
            raise ValueError(
                f"from one rank to another: this is rank {dist.get_rank()}, the other one {other}, and the group has {ranks}; "
                "src and dst are ranks in the default group"
            )
        self._group = process_group
        self._other = other
        self._number = 0

    def send(self, payload: bytes) -> list[Work]:
        """Begin to send; the caller waits. PeerLostError."""
        self._number += 1
        overflow = payload if len(payload) > INLINE_BYTES else b""
        inline = b"" if overflow else payload
        head = _HEAD.pack(
            MAGIC, VERSION, self._number, len(payload), _native.hash128(overflow) & _MASK_64 if overflow else 0
        )
        frame = bytearray(head + _CHECK.pack(_native.hash128(head + inline) & _MASK_64) + inline).ljust(
            FRAME_BYTES, b"\0"
        )
        tensors = [torch.frombuffer(frame, dtype=torch.uint8)]
        if overflow:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that bytes can not be written: sending only reads them
                tensors.append(torch.frombuffer(overflow, dtype=torch.uint8))
        try:
            return [Work(dist.isend(tensor, self._other, self._group), tensor) for tensor in tensors]
        except (RuntimeError, ValueError) as error:
            raise self._failed("send to", error) from error

    def wait(self, works: list[Work]) -> None:
        """Until it is sent. PeerLostError, GroupTimeoutError."""
        try:
            for work, _ in works:
                work.wait()
        except RuntimeError as error:
            raise self._failed("send to", error) from error

    def receive(self) -> bytes:
        """The next message. GroupError (it is not), PeerLostError, GroupTimeoutError."""
        self._number += 1
        frame = bytearray(FRAME_BYTES)
        self._fill(torch.frombuffer(frame, dtype=torch.uint8))
        size, check = self._parse(frame)
        if size <= INLINE_BYTES:
            return bytes(frame[_PAYLOAD_AT : _PAYLOAD_AT + size])
        payload = bytearray(size)
        self._fill(torch.frombuffer(payload, dtype=torch.uint8))
        found = _native.hash128(payload) & _MASK_64
        if found != check:
            raise GroupError(
                f"receive message {self._number} from rank {self._other}: its {size} bytes hash to {found:016x}, it says "
                f"{check:016x}; something else was sent on this group meanwhile, or memory is damaged"
            )
        return bytes(payload)

    def _fill(self, tensor: torch.Tensor) -> None:
        try:
            work: Any = dist.irecv(tensor, self._other, self._group)
            work.wait()
        except (RuntimeError, ValueError) as error:
            raise self._failed("receive from", error) from error

    def _parse(self, frame: bytearray) -> tuple[int, int]:
        magic, version, number, size, overflow_check = _HEAD.unpack_from(frame)
        where = f"receive message {self._number} from rank {self._other}"
        if magic != MAGIC or version != VERSION:
            raise GroupError(
                f"{where}: it starts with {magic!r}, version {version}, not {MAGIC!r}, version {VERSION}; does that rank use "
                "the same function of the same shmcast?"
            )
        end = _PAYLOAD_AT + size if size <= INLINE_BYTES else _PAYLOAD_AT
        (check,) = _CHECK.unpack_from(frame, _HEAD.size)
        found = _native.hash128(bytes(frame[: _HEAD.size]) + frame[_PAYLOAD_AT:end]) & _MASK_64
        if found != check:
            raise GroupError(f"{where}: it hashes to {found:016x}, it says {check:016x}; it was cut or changed")
        if number != self._number:
            raise GroupError(f"{where}: number {number} came; the ranks have called it unequally often")
        return size, overflow_check

    def _failed(self, action: str, error: Exception) -> GroupError:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "imed out" in text or "imeout" in text:
            return GroupTimeoutError(f"{action} rank {self._other}: it did not come in time: {text}")
        return PeerLostError(f"{action} rank {self._other}: the connection is broken: {text}")
