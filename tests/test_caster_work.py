"""What casters do with `materialize`: in threads that it may never come back to, inline, and in place."""

from __future__ import annotations

import os
import select
import threading
from typing import Any

import pytest

import shmcast
from makers import LONG_S, MIB, Maker, free, outcomes_of
from ranks import in_use
from shmcast import Caster, MaterializeError, intake
from shmcast import caster as caster_module
from shmcast.attach import lease_of

BOTH = pytest.mark.parametrize("executor", ["thread", "inline"])


# ---- materializations that take too long


def test_timeout(group: shmcast.Group, maker: Maker) -> None:
    with Caster(group, maker, workers=1, timeout=0.01) as caster:
        caster.submit("hangs", maker.gate("hangs", MIB))
        caster.submit("next", 3)
        (outcome,) = caster.step(LONG_S)
        assert isinstance(outcome.error, MaterializeError)
        assert (outcome.error.kind, outcome.error.rid) == ("TimeoutError", "hangs")
        assert "within 0.01 s" in outcome.error.text
        assert outcomes_of(free(caster)) == {"next": 3}
        maker.open("hangs")
        assert maker.ended("hangs")
        caster.close()
        assert caster._intake._pool.join(LONG_S)
        maker.join_all()
        assert in_use(group.arena) == 0


def test_timeout_of_one_request(group: shmcast.Group, maker: Maker) -> None:
    with Caster(group, maker, workers=2) as caster:
        caster.submit("slow", maker.gate("slow"))
        caster.submit("hangs", maker.gate("hangs"), timeout=0.0)
        assert [outcome.rid for outcome in caster.step(LONG_S)] == ["hangs"]
        assert caster.pending == ("slow",)
        maker.open("slow")
        assert outcomes_of(free(caster)) == {"slow": "slow"}
        hangs, good = caster.cast([("hangs2", maker.gate("hangs2")), ("good", 1)], timeout=0.01)
        assert hangs.error is not None
        assert good.error is None or good.error.kind == "TimeoutError"  # type: ignore[attr-defined]


def test_queued_time_does_not_count(group: shmcast.Group, maker: Maker) -> None:
    with Caster(group, maker, workers=1) as caster:
        caster.submit("slow", maker.gate("slow"))
        caster.submit("next", 1, timeout=LONG_S)
        assert maker.begun("slow")
        assert caster.step() == []
        assert caster._intake._running.keys() == {0}
        maker.open("slow")
        assert outcomes_of(free(caster)) == {"slow": "slow", "next": 1}


def test_what_is_cancelled_and_does_not_end_loses_its_worker(
    group: shmcast.Group, maker: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "_CANCEL_GRACE_S", 0.01)
    with Caster(group, maker, workers=1) as caster:
        caster.submit("hangs", maker.gate("hangs"))
        assert maker.begun("hangs")
        caster.cancel("hangs")
        caster.submit("next", 1)
        assert [outcome.rid for outcome in caster.step()] == ["hangs"]
        assert outcomes_of(free(caster)) == {"next": 1}


def test_a_timeout_that_begins_during_a_wait_ends_it(maker: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caster_module, "_LONGEST_SILENCE_S", 1e6)
    with shmcast.Group(max_bytes="16MiB", timeout=1e7) as group, Caster(group, maker, workers=2) as caster:
        caster.submit("slow", maker.gate("slow"))
        arrived: list[Any] = []
        thread = threading.Thread(target=lambda: arrived.extend(caster.step(1e6)))
        thread.start()
        while not caster._intake._changed._waiters:
            os.sched_yield()
        caster.submit("hangs", maker.gate("hangs"), timeout=0.0)
        thread.join(LONG_S)
        assert [outcome.rid for outcome in arrived] == ["hangs"]
        maker.open("slow")
        thread.join()
        assert outcomes_of(free(caster)) == {"slow": "slow"}


def test_timeouts_are_noticed_by_collect(group: shmcast.Group, maker: Maker) -> None:
    with Caster(group, maker, workers=1, timeout=0.0) as caster:
        caster.submit("hangs", maker.gate("hangs"))
        assert maker.begun("hangs")
        assert [outcome.rid for outcome in caster.apply(caster.collect())] == ["hangs"]


# ---- inline


def test_inline_materializes_in_the_step(group: shmcast.Group) -> None:
    threads = []
    with Caster(group, lambda raw: threads.append(threading.get_ident()), executor="inline") as caster:
        caster.submit("a", 1)
        caster.submit("b", 1)
        caster.submit("c", 1)
        caster.cancel("b")
        assert threads == []
        outcomes = caster.step()
        assert [(outcome.rid, outcome.cancelled) for outcome in outcomes] == [("b", True), ("a", False), ("c", False)]
        caster.submit("d", 1)
        caster.submit("e", None)
        assert len(caster.apply(caster.collect())) == 2
        assert caster.cast([("f", 1)])[0].ok
        assert threads == [threading.get_ident()] * 4


def test_an_interrupt_goes_to_whoever_steps(group: shmcast.Group) -> None:
    def materialize(raw: Any) -> Any:
        if raw == "interrupt":
            raise KeyboardInterrupt
        return raw

    with Caster(group, materialize, executor="inline") as caster:
        caster.submit("a", "interrupt")
        caster.submit("b", 1)
        with pytest.raises(KeyboardInterrupt):
            caster.step()
        first, second = caster.step()
        assert first.error.kind == "KeyboardInterrupt"
        assert second.value == 1
        with pytest.raises(KeyboardInterrupt):
            caster.cast([("c", "interrupt"), ("d", 2)])
        assert [outcome.rid for outcome in caster.step()] == ["c", "d"]


# ---- in place


def in_place_by_name(raw: int, scale: float = 2.0, *, out: Any) -> Any:
    array = out((raw, 1024), "float32")
    array[:] = scale
    return {"x": array}


def in_place_by_position(raw: int, reserve: Any) -> Any:
    return in_place_by_name(raw, out=reserve)


def in_place_if_given(raw: int, out: Any = None) -> Any:
    return in_place_by_name(raw, out=out)


class InPlaceMethod:
    def materialize(self, raw: int, out: Any, /) -> Any:
        return in_place_by_name(raw, out=out)


@BOTH
@pytest.mark.parametrize(
    "materialize", [in_place_by_name, in_place_by_position, in_place_if_given, InPlaceMethod().materialize]
)
def test_in_place(group: shmcast.Group, executor: Any, materialize: Any) -> None:
    with Caster(group, materialize, executor=executor) as caster:
        (outcome,) = caster.cast([("a", 512)])
        assert outcome.value["x"].shape == (512, 1024)
        assert (outcome.value["x"] == 2).all()
        assert shmcast.attach(lease_handle(outcome.value["x"])).nbytes == 2 * MIB
        assert group.arena.stats()["published"] == 2  # this one, and the probe of the group
        assert group.stats()["inline_bytes"] == 0
        del outcome
        assert in_use(group.arena) == 0


def lease_handle(array: Any) -> shmcast.Handle:
    origin = lease_of(array)
    return origin.handle


def test_in_place_failing_gives_back(group: shmcast.Group) -> None:
    def materialize(raw: Any, out: Any) -> Any:
        out((MIB,), "u1")[:] = 1
        raise ValueError("after all")

    with Caster(group, materialize) as caster:
        assert caster.cast([("a", 1)])[0].error.text == "after all"
        assert in_use(group.arena) == 0


def test_in_place_of_an_earlier_request_is_refused(group: shmcast.Group) -> None:
    kept: list[Any] = []

    def materialize(raw: Any, out: Any) -> Any:
        if not kept:
            kept.append(out((MIB,), "u1"))
        return kept[0]

    with Caster(group, materialize) as caster:
        first, second = caster.cast([("a", 1)]) + caster.cast([("b", 1)])
        assert first.ok
        assert "was not reserved for this tree" in second.error.text
        kept.clear()


def test_out_after_the_end(group: shmcast.Group) -> None:
    kept: list[Any] = []
    with Caster(group, lambda raw, out: kept.append(out)) as caster:
        assert caster.cast([("a", 1)])[0].value is None
        with pytest.raises(ValueError, match="has been encoded"):
            kept[0]((MIB,), "u1")


# ---- waiting for something to send


def readable(caster: Caster, seconds: float) -> bool:
    poller = select.poll()
    poller.register(caster, select.POLLIN)
    return bool(poller.poll(seconds * 1000))


def test_a_descriptor_tells_when_there_is_something_to_send(group: shmcast.Group, maker: Maker) -> None:
    with Caster(group, maker, workers=1) as caster:
        caster.submit("before", None)
        assert readable(caster, 0), "made after something was ready"
        assert [outcome.rid for outcome in caster.step()] == ["before"]
        assert not readable(caster, 0)
        caster.submit("a", maker.gate("held"))
        assert maker.begun("held")
        assert not readable(caster, 0)
        maker.open("held")
        assert readable(caster, LONG_S)
        assert readable(caster, 0), "nobody has taken it"
        assert [outcome.rid for outcome in caster.apply(caster.collect())] == ["a"]
        assert not readable(caster, 0)
        caster.submit("b", maker.gate("held too"))
        caster.cancel("b")
        assert readable(caster, LONG_S)
        number = caster.fileno()
        maker.open("held too")
    with pytest.raises(ValueError, match="closed"):
        caster.fileno()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


def test_a_descriptor_tells_of_work_for_the_caller(group: shmcast.Group) -> None:
    with Caster(group, str, executor="inline") as caster:
        assert not readable(caster, 0)
        caster.submit("a", 5)
        assert readable(caster, 0)
        assert [(outcome.rid, outcome.value) for outcome in caster.step()] == [("a", "5")]
        assert not readable(caster, 0)
