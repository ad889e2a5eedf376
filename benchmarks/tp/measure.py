"""From time stamps to figures: one batch → numbers a request → one run → one line of the table."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tp.records import Record
from tp.repeats import Lru, Simulated, counted
from tp.world import Served

P99_SAMPLES = 200  # below that, a 99th percentile is the maximum under another name


@dataclass
class RequestTimes:
    """One request over all ranks, milliseconds."""

    latency: float  # arrival → the last rank has read every byte and given it back
    handle: float  # arrival → the last rank has usable arrays
    transport: float  # materialized (raw: arrived) → the last rank has what was sent; publishing included
    materialize: float  # the slowest rank's
    publish: float
    message: float  # a request's share, where a message carried several
    attach: float  # the slowest rank's, as the following
    read: float
    release: float
    skew: float  # first rank done → last rank done


SPLIT = ("materialize", "publish", "message", "attach", "read", "release")


@dataclass
class Run:
    """One strategy in one round."""

    wall_s: float = 0.0  # sum over batches: arrival → last rank done
    cpu_s: float = 0.0
    times: list[RequestTimes] = field(default_factory=list)
    batch_sizes: list[int] = field(default_factory=list)
    broadcasts: int = 0
    collectives: int = 0
    bytes_broadcast: int = 0
    fallbacks: int = 0
    ticks: int = 0
    late_ticks: int = 0
    counters: Counter[str] = field(default_factory=Counter)  # the strategy's own
    simulated: list[Simulated] = field(default_factory=list)  # what an exact cache would count, batch by batch

    def add(self, served: Served, once: bool, simulated: Simulated | None = None) -> None:
        """Take in one batch."""
        ranks = [{r.index: r for r in reply.records} for reply in served.replies]
        last_ns = max(r.freed_ns for records in ranks for r in records.values())
        self.wall_s += (last_ns - served.arrival_ns) / 1e9
        self.cpu_s += served.cpu_ns / 1e9
        self.batch_sizes.append(len(ranks[0]))
        self.times += [request_times([records[i] for records in ranks], served.arrival_ns, once) for i in ranks[0]]
        entry = served.replies[0]
        self.broadcasts += entry.broadcasts
        self.collectives += entry.collectives
        self.bytes_broadcast += entry.bytes_broadcast
        self.fallbacks += sum(reply.fallbacks for reply in served.replies)
        self.ticks += sum(reply.ticks for reply in served.replies)
        self.late_ticks += sum(reply.late_ticks for reply in served.replies)
        self.counters.update(entry.counters)
        self.simulated += [] if simulated is None else [simulated]


def request_times(ranks: Sequence[Record], arrival_ns: int, once: bool) -> RequestTimes:
    """One request from what every rank recorded, entry rank first."""

    def slowest(mark: str) -> int:
        return max(int(getattr(r, mark)) for r in ranks)

    entry = ranks[0]
    there_ns = slowest("usable_ns") if once else slowest("received_ns")
    message_ns = slowest("received_ns") - entry.message_ns if entry.message_ns else 0
    freed_ns = slowest("freed_ns")
    return RequestTimes(
        latency=(freed_ns - arrival_ns) / 1e6,
        handle=(slowest("usable_ns") - arrival_ns) / 1e6,
        transport=(there_ns - entry.sent_ns + entry.early_publish_ns) / 1e6,
        materialize=slowest("materialize_ns") / 1e6,
        publish=slowest("publish_ns") / 1e6,
        message=message_ns / entry.shared_by / 1e6,
        attach=slowest("attach_ns") / 1e6,
        read=slowest("read_ns") / 1e6,
        release=slowest("release_ns") / 1e6,
        skew=(freed_ns - min(r.freed_ns for r in ranks)) / 1e6,
    )


@dataclass
class Collected:
    """All that is known of one strategy in one scenario."""

    strategy: str
    batch_size: int
    requests: int
    once: bool
    runs: list[Run] = field(default_factory=list)
    cold_ms: float | None = None
    peak_shared: int = 0
    peak_private: int = 0
    problems: list[str] = field(default_factory=list)  # of verification
    error: str | None = None
    model: Lru[tuple[int, int]] | None = None  # of its cache, where it has one
    passes: int = 0  # over the requests: what one pass has is no repeat in another

    def result(self) -> dict[str, Any]:
        """The line of the JSON report."""
        head: dict[str, Any] = {
            "strategy": self.strategy,
            "batch_size": self.batch_size,
            "requests": self.requests,
            "rounds": len(self.runs),
            "verified": bool(self.runs) and not self.problems and self.error is None,
        }
        if self.problems:
            head["problems"] = list(dict.fromkeys(self.problems))[:10]
        if self.error is not None:
            head["error"] = self.error
        return head | self._figures() if self.runs else head

    def _figures(self) -> dict[str, Any]:
        def over_rounds(figure: Callable[[Run], float]) -> list[float]:
            return [figure(run) for run in self.runs]

        def pooled(name: str) -> list[float]:
            return [getattr(times, name) for run in self.runs for times in run.times]

        walls, cpus = over_rounds(lambda run: run.wall_s), over_rounds(lambda run: run.cpu_s)
        wall_s, cpu_s = statistics.median(walls), statistics.median(cpus)
        split = {f"{name}_ms": statistics.median(pooled(name)) for name in SPLIT}
        last = self.runs[-1]
        return {
            "wall_s": wall_s,
            "wall_range_s": [min(walls), max(walls)],
            "cpu_s": cpu_s,
            "cpu_range_s": [min(cpus), max(cpus)],
            "cpu_percent": statistics.median(over_rounds(lambda run: 100 * run.cpu_s / run.wall_s)),
            "throughput_rps": self.requests / wall_s,
            "latency_ms": percentiles(pooled("latency")),
            "handle_ms": percentiles(pooled("handle")),
            "cold_ms": self.cold_ms,
            "materialize_ms": split["materialize_ms"],
            "transport_ms": percentiles(pooled("transport")),
            "first_read_ms": split["read_ms"],
            "split_ms": split,
            "skew_ms": percentiles(pooled("skew")),
            "bytes_broadcast": last.bytes_broadcast,
            "broadcasts": last.broadcasts,
            "collectives": last.collectives,
            "batch_sizes": last.batch_sizes,
            "fallbacks": sum(run.fallbacks for run in self.runs),
            "ticks": statistics.median(over_rounds(lambda run: run.ticks)),
            "late_ticks": statistics.median(over_rounds(lambda run: run.late_ticks)),
            "peak_shm_bytes": self.peak_shared,
            "peak_private_bytes": self.peak_private,
            **counted([run.counters for run in self.runs], [s for run in self.runs for s in run.simulated]),
        }


def percentiles(values: Iterable[float]) -> dict[str, float | int | None]:
    """Median, 99th percentile (None below `P99_SAMPLES` values), range."""
    ordered = sorted(values)
    count = len(ordered)
    p99 = ordered[-(-99 * count // 100) - 1] if count >= P99_SAMPLES else None
    return {"p50": statistics.median(ordered), "p99": p99, "min": ordered[0], "max": ordered[-1], "samples": count}
