"""The cpu process group, and byte strings over it as well as it can be done: warm buffers, one fixed-size message.

Every strategy that sends bytes uses this, so none is slow for want of care.
"""

from __future__ import annotations

import io
import pickle
import struct
import warnings
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

HEADER_BYTES = 1024  # the fixed-size message: a length, and as much of the payload as fits
_LENGTH = struct.Struct("<q")

warnings.filterwarnings("ignore", message="The given (NumPy array|buffer) is not writable")


class Counts(NamedTuple):
    """What was sent from here so far."""

    messages: int
    calls: int
    nbytes: int


class Collectives:
    """The gloo group of all ranks, entry rank 0."""

    def __init__(self, rank: int, size: int, store: str, timeout_s: float) -> None:
        torch.set_num_threads(1)
        self.rank, self.size = rank, size
        timeout = timedelta(seconds=timeout_s)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timeout)
        # Below `dist.broadcast`, which costs 0.1 ms more a rank.
        self._group: Any = dist.group.WORLD
        self._options = dist.BroadcastOptions()
        self._options.rootRank = self._options.rootTensor = 0
        self._header = bytearray(HEADER_BYTES)
        self._header_tensor = torch.frombuffer(self._header, dtype=torch.uint8)
        self._incoming = torch.empty(0, dtype=torch.uint8)
        self._outgoing = io.BytesIO()
        self._payload = memoryview(b"")
        self._messages = self._calls = self._nbytes = 0

    def snapshot(self) -> Counts:
        """Counts so far; on the entry rank they are those of the group."""
        return Counts(self._messages, self._calls, self._nbytes)

    def count(self, messages: int, calls: int, nbytes: int) -> None:
        """Add what a strategy sent by other means."""
        self._messages += messages
        self._calls += calls
        self._nbytes += nbytes

    def pickle(self, tree: Any) -> memoryview:
        """`tree` pickled (protocol 5) into warm memory; good until the next call."""
        self._payload.release()
        self._outgoing.seek(0)
        pickle.Pickler(self._outgoing, protocol=5).dump(tree)
        with self._outgoing.getbuffer() as whole:
            self._payload = whole[: self._outgoing.tell()]
        return self._payload

    def broadcast(self, payload: memoryview | None) -> memoryview:
        """One byte string from the entry rank (None elsewhere) to all; good until the next call.

        One message of 1 KiB; what does not fit follows in a second.
        """
        room = HEADER_BYTES - _LENGTH.size
        if payload is not None:
            _LENGTH.pack_into(self._header, 0, len(payload))
            head = payload[:room]
            self._header[_LENGTH.size : _LENGTH.size + len(head)] = head
        self._send(self._header_tensor)
        (length,) = _LENGTH.unpack_from(self._header)
        self.count(1, 1, length)
        if length <= room:
            return memoryview(self._header)[_LENGTH.size : _LENGTH.size + length]
        self._calls += 1
        if payload is not None:
            self._send(torch.frombuffer(payload, dtype=torch.uint8))
            return payload
        if self._incoming.numel() < length:
            self._incoming = torch.empty(length, dtype=torch.uint8)
        incoming = self._incoming[:length]
        self._send(incoming)
        return incoming.numpy().data

    def _send(self, tensor: torch.Tensor) -> None:
        self._group.broadcast([tensor], self._options).wait()

    def broadcast_arrays(self, tensors: Sequence[torch.Tensor]) -> None:
        """Each of `tensors` from the entry rank into the same one elsewhere; all under way at once."""
        works = [dist.broadcast(tensor, 0, async_op=True) for tensor in tensors]
        for work in works:
            if work is not None:
                work.wait()
        self.count(0, len(tensors), sum(t.numel() * t.element_size() for t in tensors))

    def barrier(self) -> None:
        """All ranks are here."""
        dist.barrier()
        self._calls += 1

    def on_any(self, flags: np.ndarray[Any, np.dtype[np.int32]]) -> np.ndarray[Any, np.dtype[np.int32]]:
        """The maximum over ranks of each element, in place: int32, one a request."""
        dist.all_reduce(torch.from_numpy(flags), op=dist.ReduceOp.MAX)
        self._calls += 1
        return flags

    def trim(self) -> None:
        """Give warm buffers back."""
        self._payload.release()
        self._outgoing = io.BytesIO()
        self._incoming = torch.empty(0, dtype=torch.uint8)

    def close(self) -> None:
        """Leave the group; all ranks together."""
        dist.destroy_process_group()
