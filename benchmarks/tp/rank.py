"""One tensor-parallel rank: what a strategy sees of it, and its command loop.

Marks are CLOCK_MONOTONIC, which all processes of a host share, in nanoseconds. The loop serves one command at a time
from the parent over a pipe; when the pipe ends, so does the process.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from tp.children import command_loop, give_back_memory, reaped_cpu_ns
from tp.config import Config
from tp.gloo import Collectives
from tp.inputs import ALIGN_BYTES, Inputs
from tp.records import Arrival, Record, Reply
from tp.strategies import STRATEGIES, Strategy, load
from tp.workloads import Array, Features, NewArray, make_workload

now_ns = time.monotonic_ns
ENTRY = 0


class DecodeTick:
    """A decode step due every `period_ns` on the scheduler's own thread, from a batch's arrival on.

    A strategy that blocks the thread makes ticks late; one that returns in between calls `poll`.
    """

    def __init__(self, period_ns: int, late_ns: int) -> None:
        self.period_ns, self.late_ns = period_ns, late_ns
        self.start(0)

    def start(self, arrival_ns: int) -> None:
        """Begin to count at a batch's arrival."""
        self.due_ns = arrival_ns + self.period_ns
        self.ticks = self.late_ticks = 0

    def poll(self) -> None:
        """Serve what has become due."""
        now = now_ns()
        while self.due_ns <= now:
            self.ticks += 1
            self.late_ticks += now - self.due_ns > self.late_ns
            self.due_ns += self.period_ns


@dataclass
class Slot:
    """Where the reads of one request of the batch go: the stand-in for a GPU's memory, and what is verified."""

    buffer: Array  # uint8
    index: int = -1
    meta: dict[str, Any] = field(default_factory=dict)
    shapes: list[tuple[tuple[int, ...], np.dtype[Any]]] = field(default_factory=list)

    def read(self, index: int, features: Features) -> None:
        """Copy every byte of `features` out."""
        self.index, self.meta = index, features.meta
        self.shapes = [(a.shape, a.dtype) for a in features.arrays]
        at = 0
        for array in features.arrays:
            np.copyto(self.buffer[at : at + array.nbytes].view(array.dtype).reshape(array.shape), array)
            at += -(-array.nbytes // ALIGN_BYTES) * ALIGN_BYTES

    def differences(self, expected: Features) -> str | None:
        """What differs from an independently materialized copy, or None."""
        if self.meta != expected.meta:
            return f"meta {self.meta!r}, expected {expected.meta!r}"
        if self.shapes != (shapes := [(a.shape, a.dtype) for a in expected.arrays]):
            return f"shapes {self.shapes!r}, expected {shapes!r}"
        at = 0
        for i, array in enumerate(expected.arrays):
            got = self.buffer[at : at + array.nbytes].view(array.dtype).reshape(array.shape)
            if not np.array_equal(got, array):
                return f"array {i}: {np.count_nonzero(got != array)} of {array.size} elements differ"
            at += -(-array.nbytes // ALIGN_BYTES) * ALIGN_BYTES
        return None


class Rank:
    """One rank, as strategies see it."""

    def __init__(self, rank: int, config: Config, inputs: Inputs, inbox: Connection | None, store: str) -> None:
        self.rank, self.config, self.inputs, self.inbox = rank, config, inputs, inbox
        self.size = config.tp
        self.workload = make_workload(config)
        self.collectives = Collectives(rank, config.tp, store, config.timeout_s)
        self.tick = DecodeTick(round(config.tick_ms * 1e6), round(config.late_ms * 1e6))
        self.fallbacks = 0
        self._arriving = bytearray()
        self.slots = [Slot(np.zeros(inputs.slot_bytes, np.uint8)) for _ in range(inputs.slots)]
        for slot in self.slots:
            slot.buffer.fill(1)  # touched: its pages are there before the first window
        self.begin(())

    @property
    def is_entry(self) -> bool:
        """Whether this rank is the one that raw requests come to."""
        return self.rank == ENTRY

    def begin(self, batch: Sequence[int]) -> None:
        """Start new records."""
        self.records = {i: Record(i) for i in batch}
        self._free_slots = iter(self.slots)

    # What a strategy calls -------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def span(self, what: str, *batch: int) -> Iterator[None]:
        """Time a stage (`publish`, `attach`, ...) of the requests in `batch`, shared evenly."""
        start_ns = now_ns()
        try:
            yield
        finally:
            share_ns = (now_ns() - start_ns) // max(1, len(batch))
            for i in batch:
                record, name = self.records[i], f"{what}_ns"
                setattr(record, name, getattr(record, name) + share_ns)

    def materialize(self, index: int, new: NewArray = np.empty) -> Features:
        """Materialize here."""
        with self.span("materialize", index):
            return self.workload.materialize(self.inputs.raws[index], new)

    def produce(self, index: int) -> Features:
        """The arrays of a request, where one process makes them for all: here, or by the tokenizer. Entry only."""
        if self.inbox is None:
            return self.materialize(index)
        with self.receive(index) as payload, self.span("attach", index):
            features: Features = pickle.loads(payload)
        return features

    def receive(self, index: int) -> memoryview:
        """What the tokenizer sent for this request, good until the next one. Entry only."""
        if self.inbox is None:
            raise RuntimeError("receive from the tokenizer: there is none with --producer entry")
        arrival = Arrival(*self.inbox.recv())
        if len(self._arriving) < arrival.payload_bytes:
            self._arriving = bytearray(arrival.payload_bytes)
        size = self.inbox.recv_bytes_into(self._arriving)
        record = self.records[index]
        record.materialize_ns, record.publish_ns = arrival.materialize_ns, arrival.publish_ns
        record.sent_ns = arrival.materialized_ns
        return memoryview(self._arriving)[:size]

    def sending(self, *batch: int) -> None:
        """Mark: all that one message will carry is materialized, now or earlier by the tokenizer. Entry only."""
        records = [self.records[i] for i in batch]
        by_tokenizer = max(record.sent_ns for record in records)
        for record in records:
            record.sent_ns = by_tokenizer or now_ns()
            record.early_publish_ns = 0 if by_tokenizer else record.publish_ns

    def messaging(self, *batch: int) -> None:
        """Mark: one message for these requests leaves. Entry only."""
        now = now_ns()
        for i in batch:
            self.records[i].message_ns = now
            self.records[i].shared_by = len(batch)

    def received(self, *batch: int) -> None:
        """Mark: the message for these requests is here."""
        now = now_ns()
        for i in batch:
            self.records[i].received_ns = now

    def usable(self, *batch: int) -> None:
        """Mark: the arrays of these requests are here."""
        now = now_ns()
        for i in batch:
            self.records[i].usable_ns = now

    def consume(self, index: int, features: Features, release: Callable[[], None] | None = None) -> None:
        """Read every byte once, give everything back. The caller keeps no reference to the arrays."""
        record = self.records[index]
        start_ns = now_ns()
        next(self._free_slots).read(index, features)
        read_ns = now_ns()
        features.arrays.clear()
        if release is not None:
            release()
        record.freed_ns = now_ns()
        record.read_ns = read_ns - start_ns
        record.release_ns = record.freed_ns - read_ns

    def report(self, message: str) -> None:
        """Tell the user."""
        print(f"rank {self.rank}: {message}", file=sys.stderr, flush=True)

    # What the command loop calls -------------------------------------------------------------------------------

    def serve(self, strategy: Strategy, batch: Sequence[int], arrival_ns: int) -> Reply:
        """One batch: sleep until it arrives, serve it, report."""
        self.begin(batch)
        self.tick.start(arrival_ns)
        before = self.collectives.snapshot()
        self.fallbacks = 0
        time.sleep(max(0, arrival_ns - now_ns()) / 1e9)
        strategy.serve(batch)
        self.tick.poll()
        messages, calls, nbytes = (b - a for a, b in zip(before, self.collectives.snapshot(), strict=True))
        counts = (self.fallbacks, self.tick.ticks, self.tick.late_ticks, reaped_cpu_ns())
        return Reply(list(self.records.values()), messages, calls, nbytes, *counts)

    def verify(self) -> list[str]:
        """What of the last batch differs from the independently materialized copy; empty: nothing."""
        problems = []
        read = {slot.index: slot for slot in self.slots if slot.index in self.records}
        for index in self.records:
            if index not in read:
                problems.append(f"rank {self.rank}, request {index}: never read")
            elif (difference := read[index].differences(self.inputs.expected(index))) is not None:
                problems.append(f"rank {self.rank}, request {index}: {difference}")
        for slot in self.slots:
            slot.index = -1
            slot.buffer[: 1 << 16] = 0xA5  # so that a request that was never copied cannot pass
        return problems


def main(rank: int, pipe: Connection, inbox: Connection | None) -> None:
    """The process of one rank."""
    config, store, directory = pipe.recv()
    me = Rank(rank, config, Inputs.load(directory), inbox, store)
    active: dict[str, Strategy] = {}

    def setup(name: str) -> None:
        active[name] = load(STRATEGIES[name].place)(me)
        active[name].setup()

    def serve(name: str, batch: Sequence[int], arrival_ns: int) -> Reply:
        return me.serve(active[name], batch, arrival_ns)

    def teardown(name: str) -> None:
        strategy = active.pop(name, None)
        if strategy is not None:
            strategy.teardown()

    def trim() -> None:
        me.collectives.trim()
        give_back_memory()

    def stop() -> None:
        for name in list(active):
            teardown(name)
        me.collectives.close()

    handlers: dict[str, Any] = {
        "setup": setup,
        "serve": serve,
        "verify": me.verify,
        "teardown": teardown,
        "trim": trim,
        "stop": stop,
    }
    gc.collect()
    gc.freeze()
    pipe.send(("ok", os.getpid()))
    command_loop(pipe, handlers)
