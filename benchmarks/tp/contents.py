"""What a rank has read, and whether it is what it should be."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tp.workloads import Array, Features

ALIGN_BYTES = 64  # of each array in the buffer that it is read into
SAMPLE_WORDS = 509  # a fingerprint takes one word of so many: a prime, so that it moves through the pages


@dataclass
class Slot:
    """Where the reads of one request go: the stand-in for a GPU's memory, and what is verified."""

    buffer: Array  # uint8
    index: int = -1
    meta: dict[str, Any] = field(default_factory=dict)
    shapes: list[tuple[tuple[int, ...], np.dtype[Any]]] = field(default_factory=list)

    def read(self, index: int, features: Features) -> None:
        """Copy every byte of `features` out."""
        self.index, self.meta = index, features.meta
        self.shapes = [(a.shape, a.dtype) for a in features.arrays]
        for target, array in zip(self.arrays(), features.arrays, strict=True):
            np.copyto(target, array)

    def arrays(self) -> list[Array]:
        """What was read, as views of the buffer."""
        views, at = [], 0
        for shape, dtype in self.shapes:
            flat = self.buffer[at : at + math.prod(shape) * dtype.itemsize]
            views.append(flat.view(dtype).reshape(shape))
            at += aligned_bytes(flat.nbytes)
        return views

    def fingerprint(self) -> int:
        """See `fingerprint`."""
        return fingerprint(self.meta, self.arrays())

    def differences(self, expected: Features) -> str | None:
        """What differs from an independently materialized copy, or None."""
        if self.meta != expected.meta:
            return f"meta {self.meta!r}, expected {expected.meta!r}"
        if self.shapes != (shapes := [(a.shape, a.dtype) for a in expected.arrays]):
            return f"shapes {self.shapes!r}, expected {shapes!r}"
        for i, (got, array) in enumerate(zip(self.arrays(), expected.arrays, strict=True)):
            if not np.array_equal(got, array):
                return f"array {i}: {np.count_nonzero(got != array)} of {array.size} elements differ"
        return None

    def spoil(self) -> None:
        """Make sure that a request which is never copied here can not pass."""
        self.index = -1
        self.buffer[: 1 << 16] = 0xA5


def aligned_bytes(nbytes: int) -> int:
    """Room for an array of `nbytes` in a slot."""
    return -(-nbytes // ALIGN_BYTES) * ALIGN_BYTES


def fingerprint(meta: dict[str, Any], arrays: Sequence[Array]) -> int:
    """A number that tells the contents apart, from one word in `SAMPLE_WORDS`: tens of microseconds, no full pass."""
    found = zlib.crc32(repr((meta, [(a.shape, str(a.dtype)) for a in arrays])).encode())
    for array in arrays:
        flat = array.reshape(-1).view(np.uint8)
        words = flat[: flat.size & ~7].view(np.uint64)
        found = zlib.crc32(flat[-8:].tobytes(), zlib.crc32(words[::SAMPLE_WORDS].tobytes(), found))
    return found
