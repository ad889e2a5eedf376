"""Casters whose requests go every way there is, and change it while they run: the same outcomes on all ranks."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import shmcast
from makers import LONG_S, Maker, Mixed, free
from ranks import Rank, Ranks, in_use, settle, together
from shmcast import Caster, MaterializeError, metrics
from shmcast.modes import Mode
from test_caster_ranks import all_the_same, cancelling, make_group, over_each_channel, ride_along, told, walk

pytestmark = pytest.mark.torch

WAYS = ["shm", "object", "raw", "replicate"]
MODES = [f"{way}-{when}" for way in WAYS for when in ("sync", "async")]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(3) as started:
        yield started


def one_mode(here: Rank, channel: str, mode: str, seed: int) -> list[Any]:
    mixed = Mixed(seed)
    found = []
    with (
        make_group(here, channel) as group,
        Caster(group, mixed, mode=mode, raw_everywhere=True, workers=2, inline_bytes=0) as caster,
    ):
        assert caster.mode == mode
        for number in range(30):
            caster.submit(number, number)
        steps = []
        while caster.pending:
            outcomes = caster.step(LONG_S)
            steps.append(len(outcomes))
            for outcome in outcomes:
                checked(mixed, outcome)
                found.append(told(outcome))
            del outcomes
            outcome = None
        if "-sync" in mode:
            assert steps == [30]
        for outcome in caster.cast([(number, number) for number in range(30, 40)]):
            checked(mixed, outcome)
            found.append(told(outcome))
        outcome = None
        assert [rid for rid, *_ in found[-10:]] == [repr(number) for number in range(30, 40)]
        if here.rank == group.entry:
            counters = metrics.snapshot(caster)["counters"]
            assert {way: counters[f"mode_{way}"] for way in WAYS} == {way: 40 * mode.startswith(way) for way in WAYS}
            if not mode.startswith("shm") and group.arena is not None:
                assert group.stats()["arrays"] == 0
        settle(here, group)
        if group.arena is not None:
            assert in_use(group.arena) == 0
    return found


@over_each_channel
@pytest.mark.parametrize("mode", MODES)
def test_every_way_gives_the_same(ranks: Ranks, channel: str, mode: str, rng: Any) -> None:
    all_the_same(ranks.run(one_mode, channel, mode, int(rng.integers(1 << 30))))


# ---- switched while it runs


def switched(here: Rank, channel: str, seed: int, count: int, by: str) -> tuple[str, dict[str, int]]:
    mixed = Mixed(seed)
    lockstep_dice = random.Random(seed)
    digest = hashlib.sha256()
    counts = {"ok": 0, "failed": 0, "cancelled": 0}
    options: dict[str, Any] = {"max_inflight_bytes": "8MiB", "max_pending": 300, "workers": 2, "on_full": "block"}
    with make_group(here, channel) as group:
        # Whatever the others are told, the entry rank decides.
        mode = "shm:10%" if here.rank == group.entry else ["object", "raw-sync", "replicate"][here.rank]
        caster = Caster(group, mixed, mode=mode, raw_everywhere=True, inline_bytes=20_000, **options)
        mixed.caster = caster if here.rank == group.entry else None
        with caster, switching(caster, seed) as switches, cancelling(caster, mixed, count) as cancel:
            submitted = delivered = 0
            while submitted < count or caster.pending:
                for _ in range(min(lockstep_dice.randrange(30), count - submitted)):
                    caster.submit(submitted, submitted)
                    cancel(submitted, "at once")
                    submitted += 1
                arrived = ride_along(here, group, caster, cancel, by) if by else walk(caster, cancel)
                for outcome in arrived:
                    counts[checked(mixed, outcome)] += 1
                    digest.update(repr(told(outcome)).encode())
                    cancel(outcome.rid, "delivered")
                delivered += len(arrived)
                del arrived
                outcome = None
        assert delivered == count
        caster.close()
        if here.rank == group.entry:
            counters = metrics.snapshot(group)["counters"]
            assert counters["mode_switches"] == switches[0] > 0
            assert sum(counters[f"mode_{way}"] for way in WAYS) == count
        nothing_left(here, group, caster)
    return digest.hexdigest(), counts


@contextlib.contextmanager
def switching(caster: Caster, seed: int) -> Iterator[list[int]]:
    """From another thread, without a pause: every mode and shares of it."""
    stop, count = threading.Event(), [0]

    def switch() -> None:
        dice = random.Random(seed)
        while not stop.is_set() or not count[0]:
            caster.switch(dice.choice(MODES) + dice.choice(["", ":0%", ":10%", ":50%", ":100%"]))
            count[0] += 1
            stop.wait(0.001)

    thread = threading.Thread(target=switch)
    thread.start()
    try:
        yield count
    finally:
        stop.set()
        thread.join()


def checked(mixed: Mixed, outcome: Any) -> str:
    """What has become of it; the error of what every rank has materialized is another one."""
    if outcome.error is not None:
        assert isinstance(outcome.error, MaterializeError), outcome
        assert mixed.fails(outcome.rid)
        return "failed"
    return mixed.check(outcome)


def nothing_left(here: Rank, group: shmcast.Group, caster: Caster) -> None:
    """After `close`: no thread goes on, and nothing lies in the arena."""
    if caster._intake is not None:
        assert caster._intake.inflight_bytes == caster._intake.unfinished == 0
    for pool in (caster._replicas._pool, None if caster._intake is None else caster._intake._pool):
        assert pool is None or pool.join(LONG_S)
    settle(here, group)
    if group.arena is not None:
        assert in_use(group.arena) == 0
    together(here)


@over_each_channel
@pytest.mark.parametrize("by", ["", "the group", "torch"], ids=["step", "apply", "apply-torch"])
@pytest.mark.watchdog(300)
def test_modes_are_switched_all_the_time(ranks: Ranks, channel: str, by: str, seed: int) -> None:
    count = 400
    _, counts = all_the_same(ranks.run(switched, channel, seed % 1000, count, by))
    assert sum(counts.values()) == count
    assert counts["failed"] > count // 100
    assert counts["cancelled"] > count // 200


# ---- the entry rank decides


def rolled_out(here: Rank, entry: int, mode: str, by_variable: bool) -> tuple[list[Any], dict[str, int]]:
    if here.rank == entry:
        said: str | None = mode
    else:
        said = ["object-sync", "raw", "shm"][here.rank]
    if by_variable and said is not None:
        os.environ["SHMCAST_MODE"], said = said, None if here.rank == entry else "shm"
    try:
        with (
            make_group(here, "auto", entry=entry) as group,
            Caster(group, Maker(), mode=said, raw_everywhere=True, workers=2, inline_bytes=0) as caster,
        ):
            found = [told(outcome) for outcome in caster.cast([(number, 5000 + number) for number in range(300)])]
            for number in range(300, 600):
                caster.submit(number, 100)
            found += [told(outcome) for outcome in free(caster)]
            together(here)
            counters = metrics.snapshot(group)["counters"]
            together(here)
            return found, {way: counters[f"mode_{way}"] for way in WAYS}
    finally:
        os.environ.pop("SHMCAST_MODE", None)


@pytest.mark.parametrize("by_variable", [False, True])
@pytest.mark.parametrize(("entry", "mode"), [(0, "shm:10%"), (2, "raw-sync:50%"), (0, "object:0%"), (1, "raw:100%")])
def test_shares_are_the_entry_ranks(ranks: Ranks, entry: int, mode: str, by_variable: bool) -> None:
    _, counts = all_the_same(ranks.run(rolled_out, entry, mode, by_variable))
    parsed = Mode.parse(mode, True)
    ways = [parsed.route_of(number).way.value for number in range(600)]
    assert counts == {way: ways.count(way) for way in WAYS}
    if "%" in mode and mode[-4:] not in ("100%",):
        assert counts["replicate"] > 200


# ---- one rank that can not


def fails_on_one(here: Rank, channel: str, mode: str, where: int, how: str, consensus: bool) -> list[Any]:
    def materialize(raw: int) -> Any:
        if raw == 20 and here.rank == where and how != "no raw":
            raise (SystemExit if how == "exits" else ValueError)("here alone")
        return {"x": raw}

    found = []
    with (
        make_group(here, channel, consensus=consensus) as group,
        Caster(group, materialize, mode=mode, raw_everywhere=True, workers=2) as caster,
    ):
        for number in (10, 20, 30):
            given = None if number == 20 and here.rank == where and how == "no raw" else number
            caster.submit(number, given)
        while caster.pending:
            found += caster.step(LONG_S)
        found += caster.cast([("again", 40)])
        if here.rank == where and how == "raises":
            failed = next(outcome for outcome in found if outcome.rid == 20)
            assert isinstance(failed.error.__cause__, ValueError)
        assert caster.alone is None
        nothing = [told(outcome) for outcome in found]
        found.clear()
        failed = None
        caster.close()
        nothing_left(here, group, caster)
    return sorted(nothing, key=repr)


# What the entry rank is given None for is None: no raw request is missing there.
@pytest.mark.parametrize(("how", "where"), [("raises", 0), ("raises", 1), ("exits", 0), ("exits", 1), ("no raw", 1)])
@pytest.mark.parametrize("mode", ["raw", "raw-sync", "replicate", "replicate-sync"])
@pytest.mark.parametrize("channel", ["auto", "object"])
def test_what_one_rank_can_not_materialize_fails_on_all(
    ranks: Ranks, channel: str, mode: str, where: int, how: str
) -> None:
    again, ten, twenty, thirty = all_the_same(ranks.run(fails_on_one, channel, mode, where, how, True))
    assert again[1] is ten[1] is thirty[1] is False
    if how == "no raw" and mode.startswith("raw"):
        assert twenty[1] is False  # the raw request came with the message
    else:
        assert twenty[1] == "MaterializeError"
        assert "not every rank has materialized it: step " in twenty[2]
        assert f"rank {where} can not rebuild" in twenty[2]


@pytest.mark.parametrize("mode", ["raw", "raw-sync", "replicate", "replicate-sync"])
def test_without_consensus_it_fails_there_alone(ranks: Ranks, mode: str) -> None:
    zero, one, two = ranks.run(fails_on_one, "auto", mode, 1, "raises", False)
    assert zero == two
    for mine, others in zip(one, zero, strict=True):
        if mine[0] == "20":
            assert mine[1] == "MaterializeError"
            assert "here alone" in mine[2]
            assert others[1] is False
        else:
            assert mine == others


class Unloadable:
    """Raw data that one rank can not unpickle."""

    def __init__(self, where: int) -> None:
        self.where = where

    def __reduce__(self) -> Any:
        return _load, (self.where,)


def _load(where: int) -> Any:
    import torch.distributed as dist

    if dist.get_rank() == where:
        raise LookupError("can not be unpickled here")
    return 5


def not_unpickled(here: Rank, mode: str, where: int) -> list[Any]:
    with (
        make_group(here, "auto") as group,
        Caster(group, Maker(), mode=mode, raw_everywhere=True, workers=2) as caster,
    ):
        caster.submit("a", Unloadable(where))
        caster.submit("b", 6)
        found = sorted([told(outcome) for outcome in free(caster)], key=repr)
        caster.close()
        nothing_left(here, group, caster)
    return found


@pytest.mark.parametrize("where", [0, 2])
@pytest.mark.parametrize("mode", ["raw", "raw-sync"])
def test_raw_data_that_one_rank_can_not_unpickle(ranks: Ranks, mode: str, where: int) -> None:
    a, b = all_the_same(ranks.run(not_unpickled, mode, where))
    assert a[1] == "MaterializeError"
    assert f"rank {where} can not rebuild" in a[2]
    assert b[1] is False
