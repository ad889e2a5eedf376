"""Which requests repeat an earlier one, and what an exact cache would make of them: decided before the run, from a seed.

A cache is compared with `Lru`, an exact model: least recently used first, by bytes and by entries, where
a request is looked up, and stored at once if it is not there. So is the cache of a caster as long as one request ends before
the next one comes. Where several are under way at once an equal one joins the first (it is neither found nor made), which
the model calls a hit: found and joined together are then the model's hits, as long as nothing has to be evicted; what is
evicted depends on which of them was ready first, which no model of the sequence knows.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

K = TypeVar("K", bound=Hashable)

SEQUENCE = (
    "round(ratio * n) of the n places, all but the first, are repeats: the first so many of "
    "default_rng(seed).permutation(n - 1) + 1. In order of places, a repeat shows one of the contents shown before, each as "
    "likely (integers(count) of the same generator); every other place shows the next content, numbered from 0."
)

ENTRY_BYTES = (
    1024  # what a result counts for besides its arrays, about: whether it fits is not a matter of so few bytes
)


def key_sequence(n: int, ratio: float, seed: int | Sequence[int]) -> list[int]:
    """Which content each of `n` requests has, as `SEQUENCE` says: numbers from 0, in order of first appearance."""
    if not 0 <= ratio <= 1:
        raise ValueError(f"make a sequence of keys: ratio {ratio} is not between 0 and 1")
    rng = np.random.default_rng(seed)
    repeats = {int(place) + 1 for place in rng.permutation(max(0, n - 1))[: round(ratio * n)]}
    keys: list[int] = []
    count = 0
    for place in range(n):
        if place in repeats:
            keys.append(int(rng.integers(count)))
        else:
            keys.append(count)
            count += 1
    return keys


class Simulated(NamedTuple):
    """What an exact cache has done so far."""

    hits: int = 0
    misses: int = 0
    evicted: int = 0

    def __sub__(self, before: Simulated) -> Simulated:
        """What it has done since."""
        return Simulated(self.hits - before.hits, self.misses - before.misses, self.evicted - before.evicted)


class Lru(Generic[K]):
    """An exact cache; it sees keys one by one and stores whatever it has not got.

    What is larger than the whole budget is not stored, and evicts nothing. None: no limit."""

    def __init__(self, budget_bytes: int | None, max_entries: int | None) -> None:
        self.done = Simulated()
        self.nbytes = 0
        self._budget_bytes, self._max_entries = budget_bytes, max_entries
        self._stored: OrderedDict[K, int] = OrderedDict()

    def see(self, key: K, nbytes: int) -> None:
        """A request, and what its result counts for."""
        hits, misses, evicted = self.done
        if key in self._stored:
            self._stored.move_to_end(key)
            self.done = Simulated(hits + 1, misses, evicted)
            return
        if self._max_entries != 0 and (self._budget_bytes is None or nbytes <= self._budget_bytes):
            self._stored[key] = nbytes
            self.nbytes += nbytes
            while self._is_over():
                self.nbytes -= self._stored.popitem(last=False)[1]
                evicted += 1
        self.done = Simulated(hits, misses + 1, evicted)

    def _is_over(self) -> bool:
        return (self._budget_bytes is not None and self.nbytes > self._budget_bytes) or (
            self._max_entries is not None and len(self._stored) > self._max_entries
        )


def simulate_lru(
    keys: Iterable[K], sizes: Mapping[K, int], budget_bytes: int | None, max_entries: int | None
) -> Simulated:
    """What an empty cache would make of `keys`; `sizes`: bytes of each."""
    cache = Lru[K](budget_bytes, max_entries)
    for key in keys:
        cache.see(key, sizes[key])
    return cache.done


def compared(counters: Mapping[str, int], simulated: Iterable[Simulated]) -> dict[str, Any]:
    """What a cache has counted over some runs, beside what the model of each says; see above for when they are the same."""
    models = list(simulated)
    hits, joined = counters.get("cache_hits", 0), counters.get("cache_joined", 0)
    model_hits = sum(model.hits for model in models)
    return {
        "hits": hits,
        "joined": joined,
        "misses": counters.get("cache_misses", 0),
        "evicted": counters.get("cache_evicted", 0),
        "simulated_hits": model_hits,
        "simulated_misses": sum(model.misses for model in models),
        "simulated_evicted": sum(model.evicted for model in models),
        "same_hits": hits + joined == model_hits,
    }


def counted(counters: Iterable[Mapping[str, int]], simulated: Iterable[Simulated | None]) -> dict[str, Any]:
    """For the report: what a strategy has counted in its runs, all together, and for one with a cache the comparison."""
    total = Counter[str]()
    for of_run in counters:
        total.update(of_run)
    models = [model for model in simulated if model is not None]
    result: dict[str, Any] = {"counters": dict(total)} if total else {}
    return result | ({"cache": compared(total, models)} if models else {})
