"""What is kept on the entry rank is everybody's: the same outcomes on all ranks, over every channel, and nothing left."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import shmcast
from makers import LONG_S, MIB, digest_of
from ranks import Rank, Ranks, in_use, settle
from shmcast import Caster, cache
from test_cache import Lru, counted, kept_of
from test_caster_ranks import all_the_same, make_group, ride_along, told

pytestmark = pytest.mark.torch

over_each_channel = pytest.mark.parametrize("channel", ["auto", "group", "object"])


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(3) as started:
        yield started


class Repeated:
    """Content by key, of numpy, torch and plain things; some keys fail."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.made: list[int] = []

    def fails(self, key: int) -> bool:
        return key % 11 == 7

    def expected(self, key: int) -> Any:
        import torch

        rng = random.Random(f"{self.seed} {key}")
        array = np.frombuffer(rng.randbytes(rng.choice([0, 900, 9000, 100_000, 700_000])), np.uint8)
        return {"x": array, "t": torch.arange(rng.choice([10, 3000])) + key, "list": [key, {"k": key}]}

    def __call__(self, raw: Any) -> Any:
        key = raw["key"]
        self.made.append(key)
        if self.fails(key):
            raise ValueError(f"key {key}")
        return self.expected(key)

    def check(self, key: int, outcome: shmcast.Outcome) -> str:
        """And spoil it, as whoever has got it may."""
        if outcome.cancelled:
            return "cancelled"
        if outcome.error is not None:
            assert isinstance(outcome.error, shmcast.MaterializeError), outcome
            assert self.fails(key)
            assert outcome.error.text == f"key {key}"
            return "failed"
        value, wanted = outcome.value, self.expected(key)
        assert digest_of(value["x"]) == digest_of(wanted["x"]), key
        assert (value["t"] == wanted["t"]).all(), key
        assert value["list"] == wanted["list"], key
        value["t"].fill_(-1)
        value["list"][1]["k"] = "spoilt"
        return "ok"


def one_by_one(here: Rank, channel: str, seed: int, max_bytes: int | None, max_entries: int | None) -> list[Any]:
    lockstep = random.Random(seed)
    repeated = Repeated(seed)
    lru = Lru(max_bytes, max_entries)
    keys = [int(25 * lockstep.random() ** 2) for _ in range(150)]
    found = []
    with (
        make_group(here, channel, entry=1) as group,
        Caster(group, repeated, inline_bytes=0, cache_bytes=max_bytes, cache_entries=max_entries) as caster,
    ):
        costs = {}
        if group.rank == group.entry:
            for key in set(keys):
                part = group.prepare(repeated.expected(key))
                costs[key] = part.published_bytes + len(part.blob) + cache.ENTRY_BYTES
                part.withdraw()
        for count, key in enumerate(keys):
            before = len(repeated.made)
            (outcome,) = caster.cast([(count, {"key": key})])
            found.append((key, repeated.check(key, outcome)))
            del outcome
            if group.rank == group.entry:
                kept = kept_of(caster)._results.get(shmcast.key_of({"key": key}))
                if channel == "object" and kept is not None:
                    costs[key] = kept.own_bytes  # how long a pickle of torch's is depends on addresses
                del kept
                hit = not repeated.fails(key) and lru.ask(key, costs[key])
                assert (len(repeated.made) == before) == hit, f"request {count}, key {key}, seed {seed}"
        if group.rank == group.entry:
            assert counted(caster)["hits"] == lru.hits > 0
            assert counted(caster)["entries"] == len(lru.sizes)
            assert counted(caster)["bytes"] == sum(lru.sizes.values())
        else:
            assert repeated.made == []
        caster.close()
        settle(here, group)
        if group.arena is not None:
            assert in_use(group.arena) == 0
    return found


@over_each_channel
def test_hits_are_those_of_an_exact_simulation(ranks: Ranks, seed: int, channel: str) -> None:
    all_the_same(ranks.run(one_by_one, channel, seed, 2 * MIB, 9))


def test_so_they_are_by_number_alone(ranks: Ranks, seed: int) -> None:
    all_the_same(ranks.run(one_by_one, "auto", seed, None, 5))


def many(here: Rank, channel: str, seed: int, count: int, by: str, max_bytes: str) -> tuple[str, dict[str, int]]:
    lockstep = random.Random(seed)
    repeated = Repeated(seed)
    keys = [int(40 * lockstep.random() ** 2) for _ in range(count)]
    counts = {"ok": 0, "failed": 0, "cancelled": 0}
    outcomes: list[Any] = []
    kept: list[shmcast.Outcome] = []
    with (
        make_group(here, channel, max_bytes="16MiB") as group,
        Caster(group, repeated, inline_bytes=0, cache_bytes=max_bytes, workers=3) as caster,
    ):
        submitted = 0
        while submitted < count or caster.pending:
            for _ in range(min(lockstep.randrange(30), count - submitted)):
                caster.submit(submitted, {"key": keys[submitted]})
                if lockstep.random() < 0.1:
                    caster.cancel(submitted)
                submitted += 1
            arrived = ride_along(here, group, caster, lambda *_: None, by) if by else caster.step(0.01)
            for outcome in arrived:
                counts[repeated.check(keys[outcome.rid], outcome)] += 1
                if outcome.error is None:  # where it was raised differs between those that were tried
                    outcomes.append((outcome.rid, outcome.cancelled))
                else:
                    outcomes.append(told(outcome))
            kept = [each for each in kept + arrived if lockstep.random() < 0.7]
            del arrived
            outcome = None
        kept.clear()
        caster.close()
        if caster._intake is not None:
            assert caster._intake._pool.join(LONG_S)
            assert caster._intake._clerk.join(LONG_S)
            found = counted(caster)
            assert found["hits"] > 0
            assert found["joined"] > 0
            assert found["evicted"] > 0 or max_bytes == "16MiB"
            assert len(repeated.made) < count
        assert len(outcomes) == count
        settle(here, group)
        if group.arena is not None:
            assert in_use(group.arena) == 0
    return hashlib.sha256(repr(outcomes).encode()).hexdigest(), counts


@over_each_channel
@pytest.mark.parametrize("max_bytes", ["1MiB", "16MiB"])
def test_many_equal_ones_at_once(ranks: Ranks, seed: int, channel: str, max_bytes: str) -> None:
    _, counts = all_the_same(ranks.run(many, channel, seed, 400, "", max_bytes))
    assert min(counts.values()) > 0, counts


@pytest.mark.parametrize("by", ["the group", "torch"])
def test_they_ride_in_other_broadcasts(ranks: Ranks, seed: int, by: str) -> None:
    all_the_same(ranks.run(many, "auto", seed, 200, by, "16MiB"))


def kept_for_a_rank(here: Rank) -> None:
    """What a rank holds of what was given up stays; what all hold of what is kept is one block."""
    with make_group(here, "auto", max_bytes="16MiB") as group:
        with Caster(group, lambda raw: np.full(MIB, raw, np.uint8), inline_bytes=0, cache_bytes="4MiB") as caster:
            held = {}
            for raw in range(8):
                (outcome,) = caster.cast([(raw, raw)])
                if here.rank == 2 and raw % 2:
                    held[raw] = outcome.value
                del outcome
            settle(here, group)
            if group.arena is not None:
                assert in_use(group.arena) == 5  # 1 and 3 are held; 5, 6 and 7 are kept: so many fit
            assert all((value == raw).all() for raw, value in held.items())
            again = [caster.cast([(raw, 7)])[0].value for raw in range(20)]
            assert all((value == 7).all() for value in again)
            settle(here, group)
            if group.arena is not None:
                assert group.arena.stats()["used_bytes"] < 8 * MIB
            held.clear()
            del again
        settle(here, group)
        if group.arena is not None:
            assert in_use(group.arena) == 0


def test_what_a_rank_holds_stays(ranks: Ranks) -> None:
    ranks.run(kept_for_a_rank)


def twice_in_one(here: Rank) -> None:
    """Arrays that are equal in one result, and to those of another one: each promise is made as often as it is kept."""
    with make_group(here, "auto", max_bytes="16MiB") as group:
        with Caster(
            group, lambda raw: [np.full(50_000, 5), np.full(50_000, 5), raw], inline_bytes=0, cache_bytes="4MiB"
        ) as caster:
            for number in range(30):
                (outcome,) = caster.cast([(number, number % 3)])
                first, second, raw = outcome.value
                assert (first == second).all()
                assert (first[0], raw) == (5, number % 3)
                del outcome, first, second
            settle(here, group)
            if group.arena is not None:
                assert counted(caster)["reused"] == 5
                assert counted(caster)["hits"] == 27
                assert in_use(group.arena) == 1
        settle(here, group)
        if group.arena is not None:
            assert in_use(group.arena) == 0


def test_what_is_twice_in_one_result(ranks: Ranks) -> None:
    ranks.run(twice_in_one)
