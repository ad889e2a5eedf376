"""From what the ranks say of a stream to figures; see `measure` for batches."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tp.arrivals import Request
from tp.measure import percentiles
from tp.records import Ended, StreamReply
from tp.repeats import Simulated, counted
from tp.servers import CANCELLED, FAILED, OK
from tp.world import Served


@dataclass
class StreamRun:
    """One strategy in one round."""

    wall_s: float  # from the start until the last rank has freed the last request
    cpu_s: float
    latencies_ms: list[float]  # of requests that ended well: arrival → the last rank has read every byte and freed it
    statuses: Counter[str]
    lateness_ms: list[float]  # of every tick of every rank
    late_ticks: int
    iterations: int
    broadcasts: int
    collectives: int
    bytes_broadcast: int
    fallbacks: int
    alike: bool  # the same requests ended in the same way, order and iteration on all ranks
    problems: list[str]  # what is wrong with outcomes or contents
    counters: dict[str, int] = field(default_factory=dict)  # the strategy's own
    simulated: Simulated | None = None  # what an exact cache would count


def account(requests: Sequence[Request], served: Served, prints: Sequence[int], late_ms: float) -> StreamRun:
    """One run from the replies of all ranks; `prints`: the fingerprint of each raw request's arrays."""
    replies: list[StreamReply] = served.replies
    entry = replies[0]
    alike = all(_outcomes(reply) == _outcomes(entry) for reply in replies)
    freed_ns: dict[int, int] = {}
    for reply in replies:
        for ended in reply.ended:
            freed_ns[ended.number] = max(freed_ns.get(ended.number, 0), ended.freed_ns)
    statuses = {ended.number: ended.status for ended in entry.ended}
    latencies_ms = [(freed_ns[n] - entry.arrived_ns[n]) / 1e6 for n, status in statuses.items() if status == OK]
    lateness_ms = [late_ns / 1e6 for reply in replies for late_ns in reply.lateness_ns]
    problems = [] if alike else ["ranks differ in what ended, how, in which order or in which iteration"]
    for rank, reply in enumerate(replies):
        problems += _problems(rank, reply.ended, requests, prints)
    return StreamRun(
        wall_s=(max(freed_ns.values()) - served.arrival_ns) / 1e9,
        cpu_s=served.cpu_ns / 1e9,
        latencies_ms=latencies_ms,
        statuses=Counter(statuses.values()),
        lateness_ms=lateness_ms,
        late_ticks=sum(lateness > late_ms for lateness in lateness_ms),
        iterations=entry.iterations,
        broadcasts=entry.broadcasts,
        collectives=entry.collectives,
        bytes_broadcast=entry.bytes_broadcast,
        fallbacks=sum(reply.fallbacks for reply in replies),
        alike=alike,
        problems=problems,
        counters=entry.counters,
    )


def _outcomes(reply: StreamReply) -> list[tuple[int, int, str]]:
    return [(ended.iteration, ended.number, ended.status) for ended in reply.ended]


def _problems(rank: int, found: Sequence[Ended], requests: Sequence[Request], prints: Sequence[int]) -> list[str]:
    problems = []
    times = Counter(dict.fromkeys(range(len(requests)), 0))
    times.update(ended.number for ended in found)
    for number, count in times.items():
        if count != (1 if number < len(requests) else 0):
            problems.append(f"rank {rank}, request {number}: ended {count} times")
    for ended in found:
        if ended.number >= len(requests):
            continue
        request = requests[ended.number]
        may = {FAILED if request.fails else OK} | ({CANCELLED} if request.cancel_ns is not None else set())
        if ended.status not in may:
            problems.append(f"rank {rank}, request {ended.number}: {ended.status}, expected {' or '.join(sorted(may))}")
        elif ended.status == OK and ended.fingerprint != prints[request.source]:
            problems.append(f"rank {rank}, request {ended.number}: what was read has another fingerprint")
    return problems


@dataclass
class StreamCollected:
    """All that is known of one strategy."""

    strategy: str
    runs: list[StreamRun] = field(default_factory=list)
    peak_shared: int = 0
    peak_private: int = 0
    problems: list[str] = field(default_factory=list)
    error: str | None = None

    def result(self) -> dict[str, Any]:
        """The line of the JSON report."""
        problems = list(dict.fromkeys(self.problems + [p for run in self.runs for p in run.problems]))
        head: dict[str, Any] = {
            "strategy": self.strategy,
            "rounds": len(self.runs),
            "verified": bool(self.runs) and not problems and self.error is None,
        }
        if problems:
            head["problems"] = problems[:10]
        if self.error is not None:
            head["error"] = self.error
        return head | self._figures() if self.runs else head

    def _figures(self) -> dict[str, Any]:
        def over_rounds(figure: Callable[[StreamRun], float]) -> list[float]:
            return [figure(run) for run in self.runs]

        def pooled(name: str) -> list[float]:
            return [value for run in self.runs for value in getattr(run, name)]

        walls, cpus = over_rounds(lambda run: run.wall_s), over_rounds(lambda run: run.cpu_s)
        rates = over_rounds(lambda run: run.statuses[OK] / run.wall_s)
        statuses = sum((run.statuses for run in self.runs), Counter[str]())
        last = self.runs[-1]
        return {
            "outcomes_identical": all(run.alike for run in self.runs),
            "outcomes": {status: statuses[status] for status in (OK, FAILED, CANCELLED)},
            "wall_s": statistics.median(walls),
            "wall_range_s": [min(walls), max(walls)],
            "cpu_s": statistics.median(cpus),
            "cpu_range_s": [min(cpus), max(cpus)],
            "throughput_rps": statistics.median(rates),
            "throughput_range_rps": [min(rates), max(rates)],
            "latency_ms": percentiles(pooled("latencies_ms") or [0.0]),
            "ticks": statistics.median(over_rounds(lambda run: len(run.lateness_ms))),
            "late_ticks": statistics.median(over_rounds(lambda run: run.late_ticks)),
            "lateness_ms": percentiles(pooled("lateness_ms") or [0.0]),
            "iterations": last.iterations,
            "broadcasts": last.broadcasts,
            "collectives": last.collectives,
            "bytes_broadcast": last.bytes_broadcast,
            "fallbacks": sum(run.fallbacks for run in self.runs),
            "peak_shm_bytes": self.peak_shared,
            "peak_private_bytes": self.peak_private,
            **counted([run.counters for run in self.runs], [run.simulated for run in self.runs]),
        }
