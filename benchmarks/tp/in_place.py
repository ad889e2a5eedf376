"""Requests that are materialized in shared memory that is warm: by the entry rank, or by the tokenizer. No torch here.

Arrays of `IN_PLACE_BYTES` and more are asked of the arena and written by the last step of materializing, so nobody
copies them. Smaller ones are made as they come, and published together. No strategy of the table hashes; neither does
this one.
"""

from __future__ import annotations

import math
import pickle
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

import shmcast
from tp.config import MIB
from tp.inputs import Inputs
from tp.strategies import TokenizerSide
from tp.tokenizer import Tokenizer
from tp.workloads import Array, Features, NewArray

IN_PLACE_BYTES = MIB
PUBLISH_BYTES = 16 << 10  # smaller arrays travel in the pickle
MIN_SEGMENT_BYTES = 16 * MIB

Part = bytes | Array  # a handle, or what was too small to be materialized in place


class ShmTokenizer(TokenizerSide):
    """The tokenizer materializes in its own arena and sends handles; it keeps nothing."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        self.producer = InPlace(tokenizer.inputs)

    def serve(self, index: int) -> None:
        start_ns = time.monotonic_ns()
        meta, parts = self.producer.materialize(lambda new: self.tokenizer.materialize(index, new))
        sealed_ns = time.monotonic_ns()
        payload = pickle.dumps((meta, self.producer.publish(parts)), protocol=5)
        publish_ns = self.producer.reserve_ns + self.producer.seal_ns + time.monotonic_ns() - sealed_ns
        materialized_ns = time.monotonic_ns() - publish_ns
        self.tokenizer.send(payload, materialized_ns, materialized_ns - start_ns, publish_ns)

    def teardown(self) -> None:
        self.producer.arena.close()


class InPlace:
    """An arena of this process, sized for one batch, and requests that are materialized in it."""

    def __init__(self, inputs: Inputs) -> None:
        # Two batches are alive at once: a group gives up its hold on one when the next goes out.
        segment_bytes = max(MIN_SEGMENT_BYTES, 2 * inputs.slot_bytes * inputs.slots * 5 // 4)
        self.arena = shmcast.Arena.create(max_bytes=4 * segment_bytes, segment_bytes=segment_bytes)
        self.reserve_ns = self.seal_ns = 0  # of the last request

    def materialize(self, make: Callable[[NewArray], Features]) -> tuple[dict[str, Any], list[Part]]:
        """Meta and parts of one request, from `make` and the places that it shall write to."""
        self.reserve_ns = 0
        with ExitStack() as unsealed:  # aborted if `make` fails
            reserved: dict[int, shmcast.Reservation] = {}

            def new(shape: tuple[int, ...], dtype: DTypeLike) -> Array:
                if math.prod(shape) * np.dtype(dtype).itemsize < IN_PLACE_BYTES:
                    return np.empty(shape, dtype)
                start_ns = time.monotonic_ns()
                reservation = unsealed.enter_context(self.arena.reserve(shape, dtype, readers=1, hash=False))
                array = reservation.array
                reserved[id(array)] = reservation
                self.reserve_ns += time.monotonic_ns() - start_ns
                return array

            features = make(new)
            start_ns = time.monotonic_ns()
            parts: list[Part] = []
            for array in features.arrays:
                reservation = reserved.get(id(array))
                parts.append(array if reservation is None else reservation.seal().to_bytes())
        self.seal_ns = time.monotonic_ns() - start_ns
        return features.meta, parts

    def publish(self, parts: list[Part]) -> list[Part]:
        """The same with what was too small to be materialized in place published too, all of it at once."""
        places = [i for i, part in enumerate(parts) if not isinstance(part, bytes) and part.nbytes >= PUBLISH_BYTES]
        small: list[Any] = [parts[i] for i in places]
        handles = dict(zip(places, self.arena.publish_many(small, readers=1, hash=False), strict=True))
        return [handles[i].to_bytes() if i in handles else part for i, part in enumerate(parts)]


def views(meta: dict[str, Any], parts: Sequence[Part]) -> Features:
    """Features whose large arrays are views of attached blocks."""
    return Features(meta, [shmcast.attach(part).array if isinstance(part, bytes) else part for part in parts])
