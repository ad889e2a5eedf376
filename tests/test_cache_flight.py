"""Equal requests at once: one is materialized and the others wait for it, whatever becomes of it and of them."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import shmcast
from makers import LONG_S, MIB, Maker, all_ready, free, outcomes_of
from ranks import in_use
from shmcast import Caster, MaterializeError
from shmcast.request import QUEUED, READY, WAITING
from test_cache import counted

BOTH = pytest.mark.parametrize("executor", ["thread", "inline"])


@pytest.fixture
def group() -> Iterator[shmcast.Group]:
    with shmcast.Group(max_bytes="64MiB") as group:
        yield group
        arena = group.arena
        assert arena is not None
        assert in_use(arena) == 0


def cached(group: shmcast.Group, materialize: Callable[[Any], Any], **options: Any) -> Caster:
    return Caster(group, materialize, inline_bytes=0, cache_bytes="16MiB", **options)


def states(caster: Caster, *wanted: int) -> bool:
    """Wait until the requests that are not taken have these states, in the order of their submission."""
    inside = caster._intake
    while True:
        with inside._lock:
            if tuple(request.state for request in inside._requests.values()) == wanted:
                return True
        os.sched_yield()


def joined(caster: Caster, count: int) -> None:
    """Wait until so many requests have been asked for and wait for another one."""
    while counted(caster)["joined"] < count:
        os.sched_yield()


# ---- ten at once


def test_ten_equal_ones_are_materialized_once(group: shmcast.Group, maker: Maker) -> None:
    with cached(group, maker, workers=4) as caster:
        maker.gate("slow", MIB)
        for number in range(10):
            caster.submit(number, "slow")
        assert maker.begun("slow")
        joined(caster, 9)
        assert caster.step() == []
        maker.open("slow")
        outcomes = free(caster)
        assert outcomes_of(outcomes) == dict.fromkeys(range(10), "slow")
        assert all((outcome.value["x"] == 0).all() for outcome in outcomes)
        assert maker.made == ["slow"]
        found = counted(caster)
        assert (found["joined"], found["misses"], found["hits"], found["entries"]) == (9, 1, 0, 1)
        assert caster._intake.inflight_bytes == 0
        assert caster._intake.unfinished == 0


@BOTH
def test_ten_equal_ones_in_one_cast(group: shmcast.Group, executor: Any) -> None:
    maker = Maker()
    with cached(group, maker, executor=executor) as caster:
        outcomes = caster.cast([(number, 5000 + number % 2) for number in range(10)])
        assert outcomes_of(outcomes) == {number: (5000 + number % 2) % 251 for number in range(10)}
        assert sorted(maker.made) == [5000, 5001]
        found = counted(caster)
        assert found["joined"] + found["hits"] == 8
        del outcomes


def test_those_that_wait_get_what_is_not_kept(group: shmcast.Group, maker: Maker) -> None:
    with Caster(group, maker, inline_bytes=0, cache_bytes=10_000, workers=2) as caster:
        maker.gate("large", MIB)
        for number in range(3):
            caster.submit(number, "large")
        joined(caster, 2)
        maker.open("large")
        assert outcomes_of(free(caster)) == dict.fromkeys(range(3), "large")
        assert maker.made == ["large"]
        assert counted(caster)["entries"] == 0


def test_those_that_wait_get_what_lies_in_another_arena(group: shmcast.Group) -> None:
    gate = threading.Event()
    with shmcast.Arena.create("16MiB") as other:
        handle = other.publish(np.arange(10_000), readers=0, keep=True)

        def materialize(raw: Any) -> Any:
            assert gate.wait(LONG_S)
            return {"there": shmcast.attach(handle).array, "here": np.full(5000, 3)}

        with cached(group, materialize) as caster:
            for number in range(3):
                caster.submit(number, "same")
            joined(caster, 2)
            gate.set()
            for outcome in free(caster):
                assert (outcome.value["there"] == np.arange(10_000)).all()
                assert (outcome.value["here"] == 3).all()
            assert counted(caster)["entries"] == 0
            del outcome
        other.release(handle)
        assert in_use(other) == 0


def test_none_for_all(group: shmcast.Group) -> None:
    gate = threading.Event()
    made = []

    def materialize(raw: Any) -> None:
        made.append(raw)
        assert gate.wait(LONG_S)

    with cached(group, materialize) as caster:
        for number in range(5):
            caster.submit(number, "same")
        joined(caster, 4)
        gate.set()
        assert [outcome.result() for outcome in free(caster)] == [None] * 5
        assert made == ["same"]


# ---- the leader ends without a value


class Series(Maker):
    """What a gate gives goes by turns: "fail", or a value that says whose turn it was."""

    def __init__(self, *turns: str) -> None:
        super().__init__()
        self.turns = iter(turns)
        for turn in set(turns):
            self.gate(turn)

    def __call__(self, raw: Any) -> Any:
        turn = next(self.turns)
        value = super().__call__(turn)
        if turn.startswith("fail"):
            raise LookupError(turn)
        return value


def test_the_next_one_goes_on_when_one_fails(group: shmcast.Group) -> None:
    series = Series("fail 1", "fail 2", "good")
    with cached(group, series, workers=3) as caster:
        for number in range(5):
            caster.submit(number, "same")
        joined(caster, 4)
        for count, turn in enumerate(("fail 1", "fail 2")):
            assert series.begun(turn)
            series.open(turn)
            (outcome,) = caster.step(LONG_S)
            assert outcome.rid == count
            assert isinstance(outcome.error, MaterializeError)
            assert turn in outcome.error.text
        series.open("good")
        assert outcomes_of(free(caster)) == dict.fromkeys((2, 3, 4), "good")
        assert series.made == ["fail 1", "fail 2", "good"]
        found = counted(caster)
        assert (found["misses"], found["joined"], found["hits"]) == (1, 4, 0)
        caster.submit(5, "same")
        assert outcomes_of(free(caster)) == {5: "good"}
    series.open_all()


@pytest.mark.parametrize("when", ["queued", "running"])
def test_the_next_one_goes_on_when_one_is_cancelled(group: shmcast.Group, when: str) -> None:
    series = Series("first", "second") if when == "running" else Series("busy", "second")
    with cached(group, series, workers=2 if when == "running" else 1) as caster:
        if when == "queued":
            caster.submit("busy", "something else")
            assert series.begun("busy")
        for number in range(4):
            caster.submit(number, "same")
        joined(caster, 3)
        if when == "running":
            assert series.begun("first")
        caster.cancel(0)
        caster.cancel(2)
        cancelled = caster.step(LONG_S)
        assert [(outcome.rid, outcome.cancelled) for outcome in cancelled] == [(0, True), (2, True)]
        series.open("busy" if when == "queued" else "second")
        if when == "queued":
            assert outcomes_of(caster.step(LONG_S)) == {"busy": "busy"}
        series.open("second")
        assert outcomes_of(free(caster)) == {1: "second", 3: "second"}
        series.open_all()
        caster.close()
        assert caster._intake._pool.join(LONG_S)
    series.join_all()


def test_the_next_one_goes_on_when_one_runs_out_of_time(group: shmcast.Group) -> None:
    series = Series("first", "second")
    with cached(group, series, workers=1) as caster:
        caster.submit(0, "same", timeout=0.05)
        for number in range(1, 4):
            caster.submit(number, "same", timeout=LONG_S)
        (outcome,) = caster.step(LONG_S)
        assert (outcome.rid, outcome.error.kind) == (0, "TimeoutError")  # type: ignore[union-attr]
        assert series.begun("second")
        series.open("second")
        assert outcomes_of(free(caster)) == dict.fromkeys((1, 2, 3), "second")
        series.open_all()
    series.join_all()


def test_who_is_to_fail_sooner_does_not_wait(group: shmcast.Group) -> None:
    series = Series("first", "second", "third")
    with cached(group, series, workers=3) as caster:
        caster.submit("patient", "same")
        assert series.begun("first")
        caster.submit("in a hurry", "same", timeout=LONG_S)
        assert series.begun("second")
        series.open("second")
        assert outcomes_of(caster.step(LONG_S)) == {"in a hurry": "second"}
        # that one is kept now, but who leads goes its own way
        caster.submit("late", "same", timeout=0.0)
        assert outcomes_of(caster.step(LONG_S)) == {"late": "second"}
        series.open("first")
        assert outcomes_of(free(caster)) == {"patient": "first"}
    series.open_all()


def test_all_of_them_are_cancelled(group: shmcast.Group, maker: Maker) -> None:
    with cached(group, maker, workers=1) as caster:
        maker.gate("busy")
        caster.submit("busy", "busy")
        assert maker.begun("busy")
        for number in range(5):
            caster.submit(number, 1000)
        joined(caster, 4)
        caster.cancel(lambda rid: rid != "busy")
        assert [outcome.cancelled for outcome in caster.step(LONG_S)] == [True] * 5
        assert caster._intake.unfinished == 1
        maker.open("busy")
        assert outcomes_of(free(caster)) == {"busy": "busy"}
        assert maker.made == ["busy"]
        assert caster._intake._desk._flights == {}
        assert outcomes_of(caster.cast([("again", 1000)])) == {"again": 1000 % 251}


def test_a_value_that_is_ready_and_cancelled_is_known_all_the_same(group: shmcast.Group, maker: Maker) -> None:
    with cached(group, maker) as caster:
        caster.submit(0, 5000)
        all_ready(caster)
        caster.cancel(0)
        caster.submit(1, 5000)
        all_ready(caster, 2)
        first, second = caster.step()
        assert first.cancelled
        assert outcomes_of([second]) == {1: 5000 % 251}
        assert maker.made == [5000]
        del second


# ---- what is known waits for nobody


def test_what_is_known_does_not_wait_for_workers(group: shmcast.Group, maker: Maker) -> None:
    with cached(group, maker, workers=1) as caster:
        assert outcomes_of(caster.cast([("a", 100)])) == {"a": 100}
        maker.gate("slow")
        caster.submit("slow", "slow")
        caster.submit("behind", 101)
        assert maker.begun("slow")
        caster.submit("known", 100)
        assert outcomes_of(caster.step(LONG_S)) == {"known": 100}
        assert caster.pending == ("slow", "behind")
        maker.open("slow")
        assert outcomes_of(free(caster)) == {"slow": "slow", "behind": 101}


def test_who_submits_makes_no_key(group: shmcast.Group) -> None:
    threads: list[threading.Thread] = []

    def key(raw: Any) -> bytes:
        threads.append(threading.current_thread())
        return str(raw).encode()

    with cached(group, Maker(), cache_key=key) as caster:
        for number in (1, 1, 2):
            caster.submit(number + len(threads) * 10, number)
            free(caster)
        assert {thread.name for thread in threads} == {"shmcast-clerk-1"}
    threads.clear()
    with cached(group, Maker(), cache_key=key, executor="inline") as caster:
        caster.submit(1, 1)
        assert not threads
        assert outcomes_of(free(caster)) == {1: 1}
        assert threads == [threading.current_thread()]


def test_inline_asks_before_it_makes(group: shmcast.Group) -> None:
    maker = Maker()
    with cached(group, maker, executor="inline") as caster:
        one = caster.cast([("a", 1000)])
        poll = select.poll()
        poll.register(caster.fileno(), select.POLLIN)
        assert poll.poll(0) == []
        for number, raw in enumerate((2000, 1000, 2000, "bad", "bad")):
            caster.submit(number, raw)
        assert poll.poll(0)
        outcomes = caster.step()
        # what is known first; then what was made, and who has waited for it; each that fails is tried by the next
        assert [outcome.rid for outcome in outcomes] == [1, 0, 2, 3, 4]
        assert [outcome.ok for outcome in outcomes] == [True, True, True, False, False]
        assert maker.made == [1000, 2000, "bad", "bad"]
        assert poll.poll(0) == []
        del one, outcomes


def test_cast_makes_what_it_waits_for_urgent(group: shmcast.Group, maker: Maker) -> None:
    """Results that nobody takes keep others from being started; those that a cast waits for must be, whoever leads."""
    with cached(group, maker, workers=1, max_inflight_bytes=MIB) as caster:
        maker.gate("large", 2 * MIB)
        maker.gate("wanted", 1000)
        caster.submit("large", "large")
        maker.open("large")
        all_ready(caster)
        caster.submit("leads", "wanted")
        caster.submit("follows", "wanted")
        assert states(caster, READY, QUEUED, WAITING)
        maker.open("wanted")
        assert outcomes_of(caster.cast([("cast", "wanted")])) == {"cast": "wanted"}
        assert maker.made == ["large", "wanted"]
        assert outcomes_of(free(caster)) == {"large": "large", "leads": "wanted", "follows": "wanted"}


def test_cast_goes_on_when_who_it_waited_for_is_cancelled(group: shmcast.Group) -> None:
    series = Series("large", "second")
    with cached(group, series, workers=1, max_inflight_bytes=MIB) as caster:
        series.gate("large", 2 * MIB)
        caster.submit("large", "large")
        series.open("large")
        all_ready(caster)
        caster.submit("leads", "same")
        caster.submit("follows", "same")
        assert states(caster, READY, QUEUED, WAITING)

        def cancel() -> None:
            assert series.begun("second")
            caster.cancel("leads")
            series.open("second", "third")

        series.turns = iter(["second", "third"])
        series.gate("third")
        thread = threading.Thread(target=cancel)
        thread.start()
        (outcome,) = caster.cast([("cast", "same")])
        thread.join()
        assert outcome.result()["name"] in ("second", "third")
        del outcome
        outcomes = {each.rid: each for each in free(caster)}
        assert outcomes["leads"].cancelled or outcomes["leads"].ok
        assert outcomes["follows"].ok
        outcomes.clear()
        caster.close()
        assert caster._intake._pool.join(LONG_S)


# ---- limits and the end


def test_raw_requests_that_wait_count(group: shmcast.Group) -> None:
    gate = threading.Event()

    def materialize(raw: bytes) -> int:
        assert gate.wait(LONG_S)
        return len(raw)

    with cached(group, materialize, max_inflight_bytes=5000, on_full="shed", workers=1) as caster:
        for number in range(4):
            caster.submit(number, b"x" * 1500)
        joined(caster, 2)
        assert caster._intake.inflight_bytes == 4500
        gate.set()
        outcomes = {outcome.rid: outcome for outcome in free(caster)}
        assert [outcomes[number].ok for number in range(4)] == [True, True, True, False]
        assert isinstance(outcomes[3].error, shmcast.BackpressureError)
        assert caster._intake.inflight_bytes == 0


@pytest.mark.parametrize("how", ["cancel", "fail", "leave"])
def test_close_while_some_wait(group: shmcast.Group, maker: Maker, how: str) -> None:
    caster = cached(group, maker, workers=1)
    maker.gate("slow", MIB)
    for number in range(3):
        caster.submit(number, "slow")
    assert maker.begun("slow")
    joined(caster, 2)
    if how == "leave":
        with pytest.raises(LookupError, match="out"), caster:
            raise LookupError("out")
        outcomes = []
    else:
        outcomes = caster.close(wait=False, cancel_pending=how == "cancel")
        assert [outcome.rid for outcome in outcomes] == [0, 1, 2]
    assert [outcome.cancelled for outcome in outcomes] == [how == "cancel"] * len(outcomes)
    assert not any(outcome.ok for outcome in outcomes)
    maker.open("slow")
    assert caster._intake._pool.join(LONG_S)
    assert caster._intake._clerk.join(LONG_S)
    maker.join_all()
    assert maker.made == ["slow"]


def test_close_waits_for_those_that_wait(group: shmcast.Group, maker: Maker) -> None:
    caster = cached(group, maker, workers=1)
    maker.gate("slow", MIB)
    for number in range(3):
        caster.submit(number, "slow")
    joined(caster, 2)
    maker.open("slow")
    assert outcomes_of(caster.close()) == dict.fromkeys(range(3), "slow")


@pytest.mark.parametrize("end", ["cancel", "close"])
def test_a_request_ends_while_its_key_is_made(group: shmcast.Group, end: str) -> None:
    begun, gate = threading.Event(), threading.Event()

    def key(raw: Any) -> bytes:
        begun.set()
        assert gate.wait(LONG_S)
        return b"key"

    maker = Maker()
    caster = cached(group, maker, cache_key=key)
    caster.submit(0, 1000)
    caster.submit(1, 1000)
    assert begun.wait(LONG_S)
    if end == "cancel":
        caster.cancel(lambda rid: True)
        assert [outcome.cancelled for outcome in caster.step(LONG_S)] == [True, True]
        gate.set()
        assert outcomes_of(caster.cast([(2, 1000)])) == {2: 1000 % 251}
        assert counted(caster)["misses"] == 1
        caster.close()
    else:
        assert not any(outcome.ok for outcome in caster.close(wait=False))
        gate.set()
    assert caster._intake._clerk.join(LONG_S)
    assert maker.made == ([1000] if end == "cancel" else [])


def test_no_thread_can_be_started(group: shmcast.Group, monkeypatch: pytest.MonkeyPatch) -> None:
    with cached(group, Maker(), workers=1) as caster:
        caster.cast([("a", None), ("known", 5000)])
        inside = caster._intake
        start = threading.Thread.start

        def refuse(thread: threading.Thread) -> None:
            if thread.name.startswith("shmcast-worker"):
                raise RuntimeError("can't start new thread (says the test)")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", refuse)
        inside._pool._workers.clear()
        inside._pool._free = 0
        failed, known = caster.cast([("b", 6000), ("c", 5000)])
        assert "no thread can be started" in failed.error.text  # type: ignore[union-attr]
        assert known.ok
        del known


# ---- interrupts and cancels in between


@pytest.mark.parametrize("where", ["key", "keep", "send"])
def test_an_interrupt_costs_one_request_and_is_raised(
    group: shmcast.Group, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    maker = Maker()
    with cached(group, maker, executor="inline") as caster:
        assert outcomes_of(caster.cast([("a", 1000)])) == {"a": 1000 % 251}
        desk = caster._intake._desk
        owner = desk if where == "key" else desk.cache
        before = getattr(owner, where)

        def interrupted(*arguments: Any) -> Any:
            monkeypatch.setattr(owner, where, before)
            raise KeyboardInterrupt

        monkeypatch.setattr(owner, where, interrupted)
        for number, raw in enumerate((1000, 2000, 2000)):
            caster.submit(number, raw)
        with pytest.raises(KeyboardInterrupt):
            caster.step()
        outcomes = {outcome.rid: outcome for outcome in free(caster)}
        assert outcomes[0].ok == (where == "keep")
        assert outcomes_of([outcomes[1], outcomes[2]]) == {1: 2000 % 251, 2: 2000 % 251}
        assert caster._intake.inflight_bytes == 0


def test_what_is_cancelled_while_it_is_sent_again_is_taken_back(
    group: shmcast.Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    with cached(group, Maker()) as caster:
        assert outcomes_of(caster.cast([("a", 50_000)])) == {"a": 50_000 % 251}
        kept = caster._intake._desk.cache
        send = kept.send

        def cancelled(what: Any) -> Any:
            part = send(what)
            caster.cancel("b")
            return part

        monkeypatch.setattr(kept, "send", cancelled)
        caster.submit("b", 50_000)
        (outcome,) = caster.step(LONG_S)
        assert outcome.cancelled
        assert caster._intake.inflight_bytes == 0
        caster.close()
        assert caster._intake._clerk.join(LONG_S)  # and the fixture finds nothing left
