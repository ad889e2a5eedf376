"""Equal requests from many threads, that fail, are cancelled and find no room by chance: each gets what is its own."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import shmcast
from makers import LONG_S, MIB
from ranks import in_use
from shmcast import Caster
from test_cache import counted

BOTH = pytest.mark.parametrize("executor", ["thread", "inline"])


@pytest.fixture
def group() -> Iterator[shmcast.Group]:
    with shmcast.Group(max_bytes="64MiB") as group:
        yield group
        assert group.arena is not None
        assert in_use(group.arena) == 0


def test_from_many_threads(group: shmcast.Group) -> None:
    lock = threading.Lock()
    made: list[int] = []

    def materialize(raw: dict[str, int]) -> Any:
        with lock:
            made.append(raw["number"])
        return {"x": np.full(20_000, raw["number"], np.uint8), "n": raw["number"]}

    with Caster(group, materialize, cache_bytes="16MiB", workers=3) as caster:

        def submit(thread: int) -> None:
            for count in range(100):
                caster.submit((thread, count), {"pad": thread * 0, "number": (thread + count) % 50})

        threads = [threading.Thread(target=submit, args=(thread,)) for thread in range(5)]
        for thread in threads:
            thread.start()
        arrived = 0
        while arrived < 500:
            for outcome in caster.step(0.1):
                wanted = sum(outcome.rid) % 50
                assert outcome.result()["n"] == wanted
                assert (outcome.value["x"] == wanted).all()
                arrived += 1
            outcome = None  # type: ignore[assignment]
        for thread in threads:
            thread.join()
        assert sorted(made) == list(range(50))
        found = counted(caster)
        assert found["misses"] == 50
        assert found["hits"] + found["joined"] == 450


class Fickle:
    """Content by key; fails or dawdles by chance, so that whoever waits has to go on."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.lock = threading.Lock()
        self.count = 0

    def expected(self, key: int) -> np.ndarray:
        rng = random.Random(key)
        return np.frombuffer(rng.randbytes(rng.choice([0, 50, 5000, 60_000, 300_000])), np.uint8)

    def __call__(self, raw: int) -> Any:
        with self.lock:
            self.count += 1
            rng = random.Random(f"{self.seed} {self.count}")
        if rng.random() < 0.3:
            raise ValueError("by chance")
        return None if raw % 10 == 9 else {"x": self.expected(raw), "key": raw}


@BOTH
@pytest.mark.parametrize("budget", ["400kB", "16MiB"])
def test_any_ends_at_any_time(seed: int, executor: Any, budget: str) -> None:
    rng = random.Random(seed)
    fickle = Fickle(seed)
    keys = [int(30 * rng.random() ** 2) for _ in range(800)]
    counts = {"ok": 0, "failed": 0, "cancelled": 0}
    options: dict[str, Any] = {"max_inflight_bytes": "2MiB", "on_full": "block", "executor": executor, "workers": 3}
    with shmcast.Group(max_bytes="16MiB") as group:
        arena = group.arena
        with Caster(group, fickle, cache_bytes=budget, **options) as caster:
            submitted = 0
            while submitted < len(keys) or caster.pending:
                for _ in range(min(rng.randrange(20), len(keys) - submitted)):
                    caster.submit(submitted, keys[submitted], timeout=rng.choice([None, LONG_S, LONG_S]))
                    submitted += 1
                for rid in rng.sample(caster.pending, len(caster.pending) // 10):
                    caster.cancel(rid)
                if rng.random() < 0.1:
                    group.prepare(np.zeros(rng.randrange(8 * MIB), np.uint8)).withdraw()
                for outcome in caster.step(0.05):
                    end = "cancelled" if outcome.cancelled else "failed" if outcome.error else "ok"
                    counts[end] += 1
                    if end == "ok":
                        key = keys[outcome.rid]
                        if key % 10 == 9:
                            assert outcome.value is None
                        else:
                            assert outcome.value["key"] == key
                            assert outcome.value["x"].tobytes() == fickle.expected(key).tobytes(), f"seed {seed}"
                    elif end == "failed":
                        assert "by chance" in str(outcome.error)
            assert sum(counts.values()) == len(keys)
            assert min(counts.values()) > 0, counts
            found = counted(caster)
            assert found["hits"] > 0
            assert (found["joined"] > 0) or executor == "inline"
            assert caster._intake._desk._flights == {}
            assert caster._intake.inflight_bytes == 0
            outcome = None  # type: ignore[assignment]
        for pool in (caster._intake._pool, caster._intake._clerk):
            assert pool is None or pool.join(LONG_S)
        assert in_use(arena) == 0
