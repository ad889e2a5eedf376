"""What engines ship today: a fresh shared-memory segment an array, a barrier, a private map, a reduction.

As SGLang 0.5 does it without its hash: the entry rank copies each array into a segment of its own and broadcasts
pickled stubs; every rank opens the segments, a barrier says that all have, the entry rank unlinks, every rank maps
privately, and an all_reduce(MAX) of a failure mask makes the ranks agree.
"""

from __future__ import annotations

import mmap
import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tp.rank import Rank
from tp.strategies import Strategy
from tp.workloads import Array, Features

SHM = "/dev/shm"


@dataclass
class Stub:
    """One array, as it travels."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    nbytes: int


class ShmNaive(Strategy):
    """A segment an array, for one message only."""

    def __init__(self, rank: Rank) -> None:
        super().__init__(rank)
        self._sequence = 0

    def serve(self, batch: Sequence[int]) -> None:
        rank = self.rank
        payload = None
        if rank.is_entry:
            made = [rank.produce(i) for i in batch]
            rank.sending(*batch)
            with rank.span("publish", *batch):
                stubs = [(f.meta, [self._share(a) for a in f.arrays]) for f in made]
                payload = rank.collectives.pickle(stubs)
            del made
            rank.messaging(*batch)
        stubs = pickle.loads(rank.collectives.broadcast(payload))
        descriptors = [[self._open(stub) for stub in request] for _, request in stubs]
        rank.collectives.barrier()
        rank.received(*batch)
        if rank.is_entry:
            for _, request in stubs:
                for stub in request:
                    os.unlink(f"{SHM}/{stub.name}")
        with rank.span("attach", *batch):
            shared = [
                Features(meta, [_map(*pair) for pair in zip(opened, request, strict=True)])
                for opened, (meta, request) in zip(descriptors, stubs, strict=True)
            ]
            failed = np.array([any(d < 0 for d in opened) for opened in descriptors], np.int32)
            if rank.collectives.on_any(failed).any():
                raise RuntimeError(f"shm-naive: open segments: failed on some rank, by request: {failed.tolist()}")
        rank.usable(*batch)
        for i, features in zip(batch, shared, strict=True):
            rank.consume(i, features)  # the last reference to an array unmaps its segment

    def _share(self, array: Array) -> Stub:
        self._sequence += 1
        stub = Stub(f"{self.rank.config.token}.{self._sequence}", array.shape, array.dtype, array.nbytes)
        descriptor = os.open(f"{SHM}/{stub.name}", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            os.ftruncate(descriptor, max(1, stub.nbytes))
            mapped = mmap.mmap(descriptor, max(1, stub.nbytes))
        finally:
            os.close(descriptor)
        np.copyto(np.ndarray(array.shape, array.dtype, mapped), array)
        return stub

    @staticmethod
    def _open(stub: Stub) -> int:
        try:
            return os.open(f"{SHM}/{stub.name}", os.O_RDONLY)
        except OSError:
            return -1


def _map(descriptor: int, stub: Stub) -> Array:
    """The array of `stub` over private pages; closes `descriptor`."""
    if descriptor < 0:
        return np.empty(0, stub.dtype)
    try:
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        mapped = mmap.mmap(descriptor, max(1, stub.nbytes), flags=mmap.MAP_PRIVATE, prot=protection)
    finally:
        os.close(descriptor)
    array: Array = np.ndarray(stub.shape, stub.dtype, mapped)
    return array
