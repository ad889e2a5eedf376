"""Casters whose requests go every way there is: cancelled, late, too many, closed, and called in every way."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from makers import LONG_S, Maker, all_ready, free
from ranks import Rank, Ranks
from shmcast import BackpressureError, Caster, FutureCaster
from test_caster_modes import MODES, nothing_left
from test_caster_ranks import all_the_same, make_group, told

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(3) as started:
        yield started


# ---- cancelled, late, too much


def cancelled(here: Rank, mode: str, moment: str) -> tuple[list[Any], int]:
    maker = Maker()
    with make_group(here, "auto") as group:
        caster = Caster(group, maker, mode=mode, raw_everywhere=True, workers=1)
        entry = here.rank == 0
        caster.submit("a", maker.gate("a"))
        if moment == "at once":
            caster.cancel("a")
        elif moment == "ready":
            if entry:
                all_ready(caster)
            caster.cancel("a")
        else:  # it has begun everywhere
            if entry:
                all_ready(caster)
            assert caster.step() == []
            assert maker.begun("a")
            if moment == "made":
                maker.open("a")
                if entry:
                    all_ready(caster)
            caster.cancel("a")
            caster.cancel("a")
        found = [told(outcome) for outcome in caster.step(LONG_S)]
        caster.submit("b", 3)
        maker.open_all()
        found += [told(outcome) for outcome in free(caster)]
        steps = group.step
        caster.close()
        nothing_left(here, group, caster)
    return found, steps


@pytest.mark.parametrize("moment", ["at once", "ready", "begun", "made"])
@pytest.mark.parametrize("mode", ["raw", "replicate"])
def test_cancelled_at_any_moment(ranks: Ranks, mode: str, moment: str) -> None:
    found, _ = all_the_same(ranks.run(cancelled, mode, moment))
    a, b = found
    assert a == ("'a'", True, None)
    assert b[1] is False


def too_late(here: Rank, mode: str) -> list[Any]:
    maker = Maker()
    with make_group(here, "auto") as group:
        caster = Caster(group, maker, mode=mode, raw_everywhere=True, workers=1)
        caster.submit("hangs", maker.gate("hangs"), timeout=0.05)
        # Its time counts from when a worker has it, so it is not over while another one hangs.
        caster.submit("behind", 3, timeout=LONG_S)
        found = [told(outcome) for outcome in free(caster)]
        maker.open_all()
        caster.close()
        maker.join_all()
        nothing_left(here, group, caster)
    return found


@pytest.mark.parametrize("mode", ["shm", "object", "raw", "replicate"])
def test_what_hangs_everywhere_loses_its_workers(ranks: Ranks, mode: str) -> None:
    hangs, behind = all_the_same(ranks.run(too_late, mode))
    assert "TimeoutError: not materialized within 0.05 s" in hangs[2]
    assert behind[1] is False


def queued(here: Rank, mode: str) -> list[Any]:
    maker = Maker()
    with make_group(here, "auto") as group:
        caster = Caster(group, maker, mode=mode, raw_everywhere=True, workers=1)
        caster.submit("slow", maker.gate("slow"))
        caster.submit("queued", 3, timeout=LONG_S)
        if here.rank == 0:
            all_ready(caster, 2)
        assert caster.step() == []
        assert maker.begun("slow")
        for _ in range(3):
            assert caster.step() == []
        if caster._intake is not None:
            assert caster._intake._requests[1].deadline is None
        maker.open("slow")
        found = [told(outcome) for outcome in free(caster)]
        caster.close()
        nothing_left(here, group, caster)
    return found


@pytest.mark.parametrize("mode", ["raw", "replicate"])
def test_time_in_the_queue_does_not_count(ranks: Ranks, mode: str) -> None:
    slow, _ = all_the_same(ranks.run(queued, mode))
    assert slow[0] == "'slow'"


def slow_on_one(here: Rank, mode: str) -> list[Any]:
    """One rank hangs with several that the entry rank has: it is given up there, in time for the others."""
    maker = Maker()

    def materialize(raw: int) -> Any:
        return maker("hangs") if here.rank == 2 and raw < 0 else {"x": np.full(3, 1)}

    maker.gate("hangs")
    with make_group(here, "auto", timeout=4.0) as group:
        caster = Caster(group, materialize, mode=mode, raw_everywhere=True, workers=3)
        for number in range(3):
            caster.submit(number, -1 - number)
        caster.submit("good", 1)
        found = [told(outcome) for outcome in free(caster)]
        assert caster.alone is None
        maker.open_all()
        caster.close()
        maker.join_all()
        nothing_left(here, group, caster)
    return sorted(found, key=repr)


@pytest.mark.parametrize("mode", ["raw", "replicate"])
def test_a_rank_that_hangs_alone_does_not_break_the_group(ranks: Ranks, mode: str) -> None:
    good, *slow = all_the_same(ranks.run(slow_on_one, mode))
    for each in slow:
        assert "rank 2 can not rebuild" in each[2]
    assert good[0] == "'good'"


def many_at_once(here: Rank, channel: str, mode: str) -> list[Any]:
    with make_group(here, channel) as group:
        caster = Caster(group, Maker(), mode=mode, raw_everywhere=True, workers=2)
        for number in range(200):
            caster.submit(number, "bad" if number % 50 == 0 else 2000 + number)
        first = caster.step()
        found = [told(outcome) for outcome in first + free(caster)]
        if mode.endswith("-sync"):
            assert len(first) == (63 if mode.startswith(("raw", "replicate")) else 200)
        del first
        found += [
            told(outcome)
            for outcome in caster.cast([(number, "bad" if number % 70 == 0 else 3000) for number in range(300)])
        ]
        caster.close()
        nothing_left(here, group, caster)
    return sorted(found, key=repr)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("channel", ["auto", "object"])
def test_more_than_a_message_has_bits_for(ranks: Ranks, channel: str, mode: str) -> None:
    found = all_the_same(ranks.run(many_at_once, channel, mode))
    assert len(found) == 500
    failed = [each for each in found if each[1] == "MaterializeError"]
    assert len(failed) == 4 + 5  # each alone


def in_flight(here: Rank, mode: str) -> list[Any]:
    maker = Maker()
    found = []

    def materialize(raw: Any) -> Any:
        return maker(raw[0] if isinstance(raw, tuple) else raw)

    with make_group(here, "auto") as group:
        caster = Caster(
            group, materialize, mode=mode, raw_everywhere=True, workers=1, max_pending=3, max_inflight_bytes=10_000
        )
        caster.submit("a", (maker.gate("a"), b"x" * 20_000 if mode == "shm" else b"x" * 9_500))
        if here.rank == 0:
            all_ready(caster, 1)
        assert caster.step() == []
        found.append(caster._limits.reported_bytes >= 9_500)
        found.append(caster._intake is None or caster._intake.inflight_bytes >= 9_500)
        assert maker.begun("a")
        maker.open("a")
        found += [told(outcome) for outcome in free(caster)]
        caster.submit("large", b"x" * 20_000)
        found += [told(outcome) for outcome in free(caster)]
        for number in range(3):
            caster.submit(number, 1)
        with pytest.raises(BackpressureError):
            caster.submit("more", 1)
        found += sorted([told(outcome) for outcome in free(caster)], key=repr)
        caster.close()
        if caster._intake is not None:
            assert caster._intake.inflight_bytes == 0
        nothing_left(here, group, caster)
    return found


@pytest.mark.parametrize("mode", ["raw", "replicate"])
def test_what_has_begun_is_in_flight(ranks: Ranks, mode: str) -> None:
    reported, counted, a, large, *others = all_the_same(ranks.run(in_flight, mode))
    assert reported is counted is True
    assert a[1] is False
    assert "20000 bytes (19.5 KiB) of raw data are more than max_inflight_bytes" in large[2]
    assert len(others) == 3


# ---- every way to close, and other ways to call


def closes(here: Rank, mode: str, begun: bool, wait: bool, cancel_pending: bool) -> list[Any]:
    maker = Maker()
    with make_group(here, "auto") as group:
        caster = Caster(group, maker, mode=mode, raw_everywhere=True, workers=1)
        caster.submit("slow", maker.gate("slow"))
        if begun:
            if here.rank == 0:
                all_ready(caster)
            assert caster.step() == []
            assert maker.begun("slow")
        caster.submit("none", None)
        caster.submit("queued", 3)
        if wait and not cancel_pending:
            threading.Timer(0.0, maker.open_all).start()
        found = [told(outcome) for outcome in caster.close(wait, cancel_pending)]
        assert caster.close() == []
        maker.open_all()
        nothing_left(here, group, caster)
    return sorted(found, key=repr)


@pytest.mark.parametrize(("wait", "cancel_pending"), [(True, False), (False, False), (True, True), (False, True)])
@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize("mode", ["raw", "replicate"])
def test_close(ranks: Ranks, mode: str, begun: bool, wait: bool, cancel_pending: bool) -> None:
    none, queued, slow = all_the_same(ranks.run(closes, mode, begun, wait, cancel_pending))
    if cancel_pending:
        assert slow[1] is queued[1] is none[1] is True
    elif wait:
        assert slow[1] is queued[1] is none[1] is False
    else:
        assert none[1] is False
        assert "closed before it was materialized" in slow[2]
        assert "closed before it was materialized" in queued[2]


def inline(here: Rank, channel: str, mode: str) -> list[Any]:
    with make_group(here, channel) as group:
        caster = Caster(group, Maker(), mode=mode, raw_everywhere=True, executor="inline")
        for number in range(20):
            caster.submit(number, 2000 + number)
        caster.submit("bad", "bad")
        caster.submit("cancelled", 7)
        caster.cancel("cancelled")
        found = [told(outcome) for outcome in free(caster)]
        found += [told(outcome) for outcome in caster.cast([("a", 5), ("b", None)])]
        caster.submit("last", 4)
        found += [told(outcome) for outcome in caster.close()]
        nothing_left(here, group, caster)
        assert not [
            thread for thread in threading.enumerate() if thread.name.startswith(("shmcast-worker", "shmcast-rep"))
        ]
    return sorted(found, key=repr)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("channel", ["auto", "object"])
def test_without_threads(ranks: Ranks, channel: str, mode: str) -> None:
    found = {rid: rest for rid, *rest in all_the_same(ranks.run(inline, channel, mode))}
    assert len(found) == 25
    assert found["'cancelled'"][0] is True
    assert found["'bad'"][0] == "MaterializeError"
    assert sum(rest[0] is False for rest in found.values()) == 23


def futures(here: Rank, mode: str) -> list[Any]:
    maker = Maker()
    with (
        make_group(here, "auto") as group,
        FutureCaster(Caster(group, maker, mode=mode, raw_everywhere=True)) as caster,
    ):
        good, bad, gone = caster.submit(1, 5), caster.submit(2, "bad"), caster.submit(3, maker.gate("gone"))
        gone.cancel()
        maker.open("gone") if "sync" in mode else None
        while not (good.done() and bad.done() and gone.done()):
            caster.step(0.01)
        found = [int(good.result()["x"][0]), str(bad.exception())[:30], gone.cancelled()]
        maker.open_all()
    return found


@pytest.mark.parametrize("mode", MODES)
def test_futures(ranks: Ranks, mode: str) -> None:
    value, error, gone = all_the_same(ranks.run(futures, mode))
    assert (value, gone) == (5, True)
    assert error.startswith("materialize request 2: ")


def threads_of_many(here: Rank, mode: str) -> list[int]:
    found = []
    with make_group(here, "auto") as group, Caster(group, Maker(), mode=mode, raw_everywhere=True, workers=2) as caster:
        for _ in range(5):
            caster.cast([("a", 5)])
            for number in range(20):
                caster.submit(number, 5)
            free(caster)
            found.append(threading.active_count())
    return found


@pytest.mark.parametrize("mode", ["raw", "replicate", "object"])
def test_threads_do_not_grow(ranks: Ranks, mode: str) -> None:
    for counts in ranks.run(threads_of_many, mode):
        assert len(set(counts)) == 1
