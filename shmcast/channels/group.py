"""`GroupChannel`: messages over a gloo group of ``torch.distributed``. Above the core, only this and `pair` import torch.

A message is one broadcast of a tensor of `FRAME_BYTES`, whatever its length, since a second collective would double its
cost. What does not fit goes in a second broadcast, whose length the first one announces, so that every rank runs the
same collectives. The frame, integers little-endian::

    4  magic "shmM"    1  version (1)    3  zero
    8  number of the message, from 1 on
    8  length of the payload, bytes
    8  low half of the XXH3-128 (seed 0) of the overflow, 0 where there is none
    8  low half of the XXH3-128 (seed 0) of the 32 bytes above and of the payload, if it lies in the frame
    payload, if it fits; whatever follows it means nothing

The backend is called below ``torch.distributed.broadcast``: that takes no timeout, and costs 0.1 ms more.
"""

import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from struct import Struct
from typing import Any

import torch
import torch.distributed as dist

from .. import _native
from ..errors import GroupError, GroupTimeoutError, PeerLostError
from . import DEFAULT_TIMEOUT_S, RECORD_BYTES, Rendezvous, Watch, check_payload, check_record

MAGIC = b"shmM"
VERSION = 1
# On 2 cores and 4 ranks a broadcast of 1 KiB takes 0.6 to 0.7 ms and one of 4 KiB the same: some 25 handles fit.
FRAME_BYTES = 4096

_HEAD = Struct("<4sB3xQQQ")
_CHECK = Struct("<Q")
_RECORD = Struct("<H")
_PAYLOAD_AT = _HEAD.size + _CHECK.size
INLINE_BYTES = FRAME_BYTES - _PAYLOAD_AT
"""Longest payload that needs no second broadcast."""

_SLICE_S = 0.5
_LONGEST_S = 10.0 * 365 * 86400
_MASK_64 = (1 << 64) - 1


class GroupChannel(Rendezvous):
    """Messages over the cpu part of a process group; ``cpu_group`` None means the default group."""

    name = "group"

    def __init__(self, cpu_group: Any = None, entry: int = 0, *, timeout: float | None = None) -> None:
        """``entry``: rank within the group. ``timeout``: seconds that a collective may take; None: as the group was made.

        ValueError where this process is not in the group, or the group has no backend for the cpu. Not collective."""
        self._group = resolve(cpu_group)
        self.rank = dist.get_rank(self._group)
        self.size = dist.get_world_size(self._group)
        if not 0 <= entry < self.size:
            raise ValueError(f"entry {entry}: the group has the ranks 0 to {self.size - 1}")
        if not has_cpu(self._group):
            raise ValueError(
                f"the group's backend is {dist.get_backend_config(self._group)!r}, which moves no host memory; pass the "
                "cpu group, made by torch.distributed.new_group(ranks, backend='gloo')"
            )
        self.entry = entry
        self.sent = 0
        """Messages so far."""
        self.overflows = 0
        self._timeout = timeout
        self.timeout = _own_timeout(self._group) if timeout is None else timeout
        self._frame = bytearray(FRAME_BYTES)  # never resized, so the tensor stays valid
        self._tensor = torch.frombuffer(self._frame, dtype=torch.uint8)

    @property
    def process_group(self) -> Any:
        """The group of ``torch.distributed``."""
        return self._group

    def broadcast(
        self, payload: bytes | None = None, *, timeout: float | None = None, watch: Watch | None = None
    ) -> bytes:
        """See `Channel.broadcast`."""
        if self.rank != self.entry:
            return self._receive(timeout, watch)
        payload = check_payload(payload)
        size = len(payload)
        overflow = size > INLINE_BYTES
        self.sent += 1
        head = _HEAD.pack(MAGIC, VERSION, self.sent, size, _native.hash128(payload) & _MASK_64 if overflow else 0)
        inline = b"" if overflow else payload
        self._frame[: len(head)] = head
        self._frame[_PAYLOAD_AT : _PAYLOAD_AT + len(inline)] = inline
        self._frame[len(head) : _PAYLOAD_AT] = _CHECK.pack(_native.hash128(head + inline) & _MASK_64)
        self._collect(lambda: self._start(self._tensor, timeout), timeout, watch)
        if overflow:
            self.overflows += 1
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", UserWarning
                )  # that bytes can not be written: a broadcast only reads them
                tensor = torch.frombuffer(payload, dtype=torch.uint8)
            self._collect(lambda: self._start(tensor, timeout), timeout, watch)
        return payload

    def gather(self, record: bytes, *, timeout: float | None = None, watch: Watch | None = None) -> list[bytes]:
        """See `Rendezvous.gather`."""
        raw = _RECORD.pack(len(check_record(record))) + record
        mine = torch.frombuffer(bytearray(raw.ljust(_RECORD.size + RECORD_BYTES, b"\0")), dtype=torch.uint8)
        all_ranks = [torch.zeros_like(mine) for _ in range(self.size)]
        self._collect(lambda: dist.all_gather(all_ranks, mine, self._group, async_op=True), timeout, watch)
        records = []
        for rank, tensor in enumerate(all_ranks):
            found = tensor.numpy().tobytes()
            (length,) = _RECORD.unpack_from(found)
            if length > RECORD_BYTES:
                raise GroupError(
                    f"gather: rank {rank} sent a record of {length} bytes, at most {RECORD_BYTES} are carried"
                )
            records.append(found[_RECORD.size : _RECORD.size + length])
        return records

    def poll(self) -> bool:
        """GroupError on all but the entry rank: whether a collective has begun elsewhere, nobody knows."""
        if self.rank != self.entry:
            raise GroupError(
                "poll: a process group can not tell whether a message is there; a group with channel='auto' whose ranks "
                "share memory can"
            )
        return False

    def close(self) -> None:
        """Forget the process group; whoever made it destroys it."""
        self._group = None

    def _receive(self, timeout: float | None, watch: Watch | None) -> bytes:
        self._collect(lambda: self._start(self._tensor, timeout), timeout, watch)
        self.sent += 1
        size, check = self._parse()
        if size <= INLINE_BYTES:
            return bytes(self._frame[_PAYLOAD_AT : _PAYLOAD_AT + size])
        self.overflows += 1
        tensor = torch.empty(size, dtype=torch.uint8)
        self._collect(lambda: self._start(tensor, timeout), timeout, watch)
        payload = tensor.numpy().tobytes()
        found = _native.hash128(payload) & _MASK_64
        if found != check:
            raise GroupError(
                f"receive message {self.sent}: its {size} bytes hash to {found:016x}, it says {check:016x}; "
                "another collective has run on this group meanwhile, or memory is damaged"
            )
        return payload

    def _parse(self) -> tuple[int, int]:
        """``(length of the payload, hash of the overflow)`` of the frame that has come."""
        magic, version, number, size, overflow_check = _HEAD.unpack_from(self._frame)
        advice = "has another collective run on this group, or another program taken part in it?"
        if magic != MAGIC:
            raise GroupError(f"receive message {self.sent}: it starts with {magic!r}, not {MAGIC!r}; {advice}")
        if version != VERSION:
            raise GroupError(f"receive message {self.sent}: version {version}, this build reads {VERSION}")
        end = _PAYLOAD_AT + size if size <= INLINE_BYTES else _PAYLOAD_AT
        (check,) = _CHECK.unpack_from(self._frame, _HEAD.size)
        found = _native.hash128(bytes(self._frame[: _HEAD.size]) + self._frame[_PAYLOAD_AT:end]) & _MASK_64
        if found != check:
            raise GroupError(f"receive message {self.sent}: it hashes to {found:016x}, it says {check:016x}; {advice}")
        if number != self.sent:
            raise GroupError(f"receive message {self.sent}: number {number} came; ranks have called it unequally often")
        return size, overflow_check

    # ---- collectives

    def _start(self, tensor: torch.Tensor, timeout: float | None) -> Any:
        options = dist.BroadcastOptions()
        options.rootRank = self.entry
        options.rootTensor = 0
        seconds = self._timeout if timeout is None else timeout
        if seconds is not None:
            options.timeout = timedelta(seconds=min(max(seconds, 0.001), _LONGEST_S))
        return self._group.broadcast([tensor], options)

    def _collect(self, start: Callable[[], Any], timeout: float | None, watch: Watch | None) -> None:
        """Run one collective to its end, in slices, so that ``watch`` is asked and Ctrl-C is heard."""
        if self._group is None:
            raise GroupError("broadcast: the channel is closed")
        seconds = self._timeout if timeout is None else timeout
        deadline = None if seconds is None else time.monotonic() + seconds
        work: Any = None
        try:
            work = start()
            while True:
                left = _SLICE_S if deadline is None else min(_SLICE_S, max(deadline - time.monotonic(), 0.001))
                try:
                    work.wait(timedelta(seconds=left))
                    return
                except RuntimeError:
                    if work.is_completed():
                        # With an error, or well at the very end of the slice: now the wait says which.
                        work.wait()
                        return
                if deadline is not None and time.monotonic() >= deadline:
                    raise GroupTimeoutError(f"broadcast: a rank did not come within {seconds} s")
                if watch is not None:
                    watch()
        except GroupError:
            raise
        except (RuntimeError, ValueError) as error:
            # gloo says what happened in text alone
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            if "imed out" in text or "imeout" in text:
                waited = f" within {seconds} s" if seconds is not None else ""
                raise GroupTimeoutError(f"broadcast: a rank did not come{waited}: {text}") from error
            raise PeerLostError(f"broadcast: a connection is broken: {text}") from error


def _own_timeout(group: Any) -> float:
    """Seconds that the process group gives a collective."""
    try:
        seconds: float = group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
        return seconds
    except (AttributeError, RuntimeError):
        return DEFAULT_TIMEOUT_S


# ---- what else the layers above ask torch.distributed


def available() -> bool:
    """Whether there is a default process group."""
    return dist.is_available() and dist.is_initialized()


def resolve(cpu_group: Any) -> Any:
    """The process group itself, also for None. ValueError where there is none, or this process is not in it."""
    if not available():
        raise ValueError("torch.distributed is not initialised: call init_process_group first")
    group = dist.group.WORLD if cpu_group is None else cpu_group
    if group == dist.GroupMember.NON_GROUP_MEMBER or dist.get_rank(group) < 0:
        raise ValueError("this process is not in the group")
    return group


def has_cpu(group: Any) -> bool:
    """Whether the group moves host memory."""
    return any(part.split(":")[0] == "cpu" for part in str(dist.get_backend_config(group)).split(","))


def is_alive(group: Any) -> bool:
    """Whether a process group has not been destroyed."""
    try:
        return available() and dist.get_rank(group) >= 0
    except (ValueError, RuntimeError):
        return False


def rank_in(group: Any, global_rank: int) -> int:
    """Rank within the group of a rank of the default group. ValueError where it is not in the group."""
    return global_rank if group is dist.group.WORLD else dist.get_group_rank(group, global_rank)


def rank_of(group: Any) -> int:
    """This process's rank within the group."""
    return dist.get_rank(group)


def global_rank() -> int:
    """This process's rank in the default group."""
    return dist.get_rank()


def broadcast_object(data: Any, group: Any, source: int) -> Any:
    """``torch.distributed.broadcast_object_list`` of one object; ``source``: global rank. For groups without a cpu part."""
    boxed = [data]
    dist.broadcast_object_list(boxed, source, group)
    return boxed[0]
