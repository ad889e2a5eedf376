"""Which requests come when, which of them fail and which are cancelled: decided before the run, from a seed.

Every strategy of a round is given the same list. Only the entry rank looks at the times, as only it hears from clients.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tp.config import Stream
from tp.repeats import key_sequence


@dataclass(frozen=True)
class Request:
    """One request of a stream; its number is its place in the list."""

    source: int  # which of the raw requests it is
    arrival_ns: int | None  # after the start; None: when another one has ended
    fails: bool = False
    cancel_ns: int | None = None  # after its arrival
    content: int = 0  # requests with the same one are repeats of each other, and have the same source


def sources(stream: Stream) -> list[str]:
    """The sizes of the raw requests that are drawn from, as the mix has them; at least one of each size."""
    weights = np.array([weight for _, weight in stream.mix])
    shares = weights / weights.sum() * max(0, stream.distinct - len(weights))
    counts = 1 + np.floor(shares).astype(int)
    for i in np.argsort(np.floor(shares) - shares, kind="stable")[: max(0, stream.distinct - int(counts.sum()))]:
        counts[i] += 1
    return [size for (size, _), count in zip(stream.mix, counts, strict=True) for _ in range(count)]


def plan(
    stream: Stream, sizes: Sequence[str], count: int, seed: Sequence[int], repeat_ratio: float = 0.0
) -> list[Request]:
    """`count` requests, each one of the raw requests whose `sizes` are given. The same seed gives the same list.

    Who is no repeat may still have the same source as another one; it counts as different all the same."""
    rng = np.random.default_rng(seed)
    names, weights = zip(*stream.mix, strict=True)
    drawn = rng.choice(len(names), count, p=np.array(weights) / sum(weights))
    places = [[i for i, size in enumerate(sizes) if size == name] for name in names]
    source = [int(rng.choice(places[kind])) for kind in drawn]
    content = key_sequence(count, repeat_ratio, seed)
    source = [source[content.index(key)] for key in content]
    gaps_s = rng.exponential(1.0, count) / stream.rate if stream.rate > 0 else np.zeros(count)
    arrival_ns = [int(at) for at in np.cumsum(gaps_s) * 1e9]
    fails = _some(rng, count, stream.fail_ratio)
    cancelled = _some(rng, count, stream.cancel_ratio)
    after_ns = [int(at) for at in rng.uniform(0, stream.cancel_within_ms * 1e6, count)]
    return [
        Request(
            source[i],
            arrival_ns[i] if not stream.concurrency else 0 if i < stream.concurrency else None,
            i in fails,
            after_ns[i] if i in cancelled else None,
            content[i],
        )
        for i in range(count)
    ]


def _some(rng: np.random.Generator, count: int, ratio: float) -> set[int]:
    """That part of all numbers, to the nearest whole one."""
    return {int(i) for i in rng.permutation(count)[: round(ratio * count)]}


class Arrivals:
    """What the entry rank has heard from clients so far."""

    def __init__(self, requests: Sequence[Request], start_ns: int) -> None:
        self.requests = requests
        self.arrived_ns: dict[int, int] = {}  # when each came, whether it has been taken or not
        self._coming: list[tuple[int, int]] = []
        self._cancels: list[tuple[int, int]] = []
        self._waiting = [i for i, request in enumerate(requests) if request.arrival_ns is None][::-1]
        self._ended = 0
        for number, request in enumerate(requests):
            if request.arrival_ns is not None:
                self._arrive(number, start_ns + request.arrival_ns)

    def take(self, now_ns: int) -> tuple[list[int], list[int]]:
        """Numbers of the requests that have come since the last call, and of those that have been cancelled."""
        return _due(self._coming, now_ns), _due(self._cancels, now_ns)

    def end(self, count: int, now_ns: int) -> None:
        """So many have ended; where a client was waiting for that, it sends its next one now."""
        self._ended += count
        for _ in range(min(count, len(self._waiting))):
            self._arrive(self._waiting.pop(), now_ns)

    @property
    def over(self) -> bool:
        """All have ended."""
        return self._ended == len(self.requests)

    def _arrive(self, number: int, at_ns: int) -> None:
        self.arrived_ns[number] = at_ns
        heapq.heappush(self._coming, (at_ns, number))
        cancel_ns = self.requests[number].cancel_ns
        if cancel_ns is not None:
            heapq.heappush(self._cancels, (at_ns + cancel_ns, number))


def _due(times: list[tuple[int, int]], now_ns: int) -> list[int]:
    found = []
    while times and times[0][0] <= now_ns:
        found.append(heapq.heappop(times)[1])
    return found
