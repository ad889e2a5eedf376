"""Casters whose requests go every way there is, and change it while they run: the same outcomes on all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from makers import LONG_S, Mixed
from ranks import Rank, Ranks, in_use, settle
from shmcast import Caster, MaterializeError, metrics
from test_caster_ranks import all_the_same, make_group, over_each_channel, told

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
                check(mixed, outcome, mode)
                found.append(told(outcome))
            del outcomes
            outcome = None
        if "-sync" in mode:
            assert steps == [30]
        for outcome in caster.cast([(number, number) for number in range(30, 40)]):
            check(mixed, outcome, mode)
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


def check(mixed: Mixed, outcome: Any, mode: str) -> None:
    if outcome.error is not None and mode.startswith(("raw", "replicate")):
        assert isinstance(outcome.error, MaterializeError)
        assert mixed.fails(outcome.rid)
    else:
        mixed.check(outcome)


@over_each_channel
@pytest.mark.parametrize("mode", MODES)
def test_every_way_gives_the_same(ranks: Ranks, channel: str, mode: str, rng: Any) -> None:
    all_the_same(ranks.run(one_mode, channel, mode, int(rng.integers(1 << 30))))
