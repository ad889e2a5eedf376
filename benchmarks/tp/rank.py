"""One tensor-parallel rank: what a strategy sees of it, and how it serves a batch.

Marks are CLOCK_MONOTONIC, which all processes of a host share, in nanoseconds.
"""

from __future__ import annotations

import contextlib
import pickle
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from tp.children import reaped_cpu_ns
from tp.config import Config
from tp.contents import Slot
from tp.gloo import Collectives
from tp.inputs import Inputs
from tp.records import Arrival, Record, Reply, changes
from tp.strategies import Spec, Strategy
from tp.workloads import Features, NewArray, make_workload

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
        self.lateness_ns: list[int] = []

    def poll(self) -> None:
        """Serve what has become due."""
        now = now_ns()
        while self.due_ns <= now:
            self.lateness_ns.append(now - self.due_ns)
            self.due_ns += self.period_ns

    @property
    def ticks(self) -> int:
        """Served so far."""
        return len(self.lateness_ns)

    @property
    def late_ticks(self) -> int:
        """Those of them that were late."""
        return sum(late_ns > self.late_ns for late_ns in self.lateness_ns)


class Rank:
    """One rank, as strategies see it."""

    def __init__(self, rank: int, config: Config, inputs: Inputs, inbox: Connection | None, store: str) -> None:
        self.rank, self.config, self.inputs, self.inbox = rank, config, inputs, inbox
        self.size = config.tp
        self.workload = make_workload(config)
        self.collectives = Collectives(rank, config.tp, store, config.timeout_s)
        self.tick = DecodeTick(round(config.tick_ms * 1e6), round(config.late_ms * 1e6))
        self.fallbacks = 0
        self.executor, self.workers = config.executors[0]
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

    def source(self, index: int) -> int:
        """Which of the contents the request with this index has."""
        return self.inputs.keys[index]

    def raw(self, index: int) -> Any:
        """The raw request with this index."""
        return self.inputs.raws[self.source(index)]

    def make(self, index: int, raw: Any, new: NewArray = np.empty) -> Features:
        """What `raw`, which is this request's, becomes."""
        return self.workload.materialize(raw, new)

    def materialize(self, index: int, new: NewArray = np.empty) -> Features:
        """Materialize here."""
        with self.span("materialize", index):
            return self.make(index, self.raw(index), new)

    def attempt(self, index: int, raw: Any, new: NewArray = np.empty) -> Features:
        """Materialize `raw`, which is this request's, in whatever thread this is called."""
        with self.span("materialize", index):
            return self.make(index, raw, new)

    def produce(self, index: int) -> Features:
        """The arrays of a request, where one process makes them for all: here, or by the tokenizer. Entry only."""
        if self.inbox is None:
            return self.materialize(index)
        with self.receive(index) as payload, self.span("attach", index):
            features: Features = pickle.loads(payload)
        return features

    def receive(self, index: int) -> memoryview:
        """What the tokenizer sent for this request, good until the next one. Entry only."""
        inbox = self._open_inbox()
        arrival = self.arrival(index)
        if len(self._arriving) < arrival.payload_bytes:
            self._arriving = bytearray(arrival.payload_bytes)
        size = inbox.recv_bytes_into(self._arriving)
        return memoryview(self._arriving)[:size]

    def arrival(self, index: int) -> Arrival:
        """What the tokenizer tells of this request: the rest of it, where it comes by another way. Entry only."""
        arrival = Arrival(*self._open_inbox().recv())
        record = self.records[index]
        record.materialize_ns, record.publish_ns = arrival.materialize_ns, arrival.publish_ns
        record.sent_ns = arrival.materialized_ns
        return arrival

    def _open_inbox(self) -> Connection:
        if self.inbox is None:
            raise RuntimeError("receive from the tokenizer: there is none with --producer entry")
        return self.inbox

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

    def execute_by(self, spec: Spec) -> None:
        """What the strategy that is set up next materializes by, and how many of it."""
        executor, workers = self.config.executors[0]
        self.executor, self.workers = spec.executor or executor, spec.workers or workers

    def serve(self, strategy: Strategy, batch: Sequence[int], arrival_ns: int) -> Reply:
        """One batch: sleep until it arrives, serve it, report."""
        self.begin(batch)
        self.tick.start(arrival_ns)
        before, counted = self.collectives.snapshot(), strategy.counters()
        self.fallbacks = 0
        time.sleep(max(0, arrival_ns - now_ns()) / 1e9)
        strategy.serve(batch)
        self.tick.poll()
        messages, calls, nbytes = (b - a for a, b in zip(before, self.collectives.snapshot(), strict=True))
        counts = (self.fallbacks, self.tick.ticks, self.tick.late_ticks, reaped_cpu_ns())
        counters = changes(counted, strategy.counters())
        return Reply(list(self.records.values()), messages, calls, nbytes, *counts, counters)

    def verify(self) -> list[str]:
        """What of the last batch differs from the independently materialized copy; empty: nothing."""
        problems = []
        read = {slot.index: slot for slot in self.slots if slot.index in self.records}
        for index in self.records:
            if index not in read:
                problems.append(f"rank {self.rank}, request {index}: never read")
            elif (difference := read[index].differences(self.inputs.expected(self.source(index)))) is not None:
                problems.append(f"rank {self.rank}, request {index}: {difference}")
        for slot in self.slots:
            slot.spoil()
        return problems
