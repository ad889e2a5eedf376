"""Casters at their limits, and at their end: full, hung, broken; nothing waits for ever, and memory comes back."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

import shmcast
from makers import LONG_S, MIB, Maker, all_ready, free, outcomes_of
from ranks import in_use
from shmcast import BackpressureError, Caster, GroupError, MaterializeError, caster, metrics


def raw(nbytes: int) -> Any:
    """Half a request in bytes, half in an array."""
    return [b"x" * (nbytes // 2), np.zeros(nbytes - nbytes // 2, np.uint8)]


class Sized:
    """Materializes as many bytes as `size` says, once it may."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.may = threading.Event()
        self.begun: list[int] = []
        self.first = threading.Event()

    def __call__(self, raw: Any) -> Any:
        self.begun.append(1)
        self.first.set()
        assert self.may.wait(LONG_S)
        return np.zeros(self.size, np.uint8)


# ---- on_full="raise"


def test_too_many_pending_raise(group: shmcast.Group, maker: Maker) -> None:
    with Caster(group, maker, max_pending=3) as caster:
        for number in range(3):
            caster.submit(number, None)
        with pytest.raises(BackpressureError, match="submit 3: 3 requests are pending, max_pending is 3"):
            caster.submit(3, None)
        assert caster.pending == (0, 1, 2)
        with pytest.raises(ValueError, match="with this id"):
            caster.submit(0, None)
        assert len(caster.step()) == 3
        caster.submit(3, None)
        assert len(caster.step()) == 1


def test_too_many_bytes_raise_once_a_message_has_said_so(group: shmcast.Group, maker: Maker) -> None:
    with Caster(group, maker, max_inflight_bytes="1MiB", workers=1) as caster:
        caster.submit("first", maker.gate("first"))
        assert maker.begun("first")
        for number in range(3):
            # All ranks decide alike, so by what all of them know.
            caster.submit(number, raw(MIB // 2))
        assert caster.step() == []
        with pytest.raises(BackpressureError, match=r"1572869 bytes \(1.5 MiB\) are in flight, max_inflight_bytes is"):
            caster.submit("more", 1)
        caster.cancel(lambda rid: rid != "first")
        assert len(caster.step()) == 3
        caster.submit("more", 1)
        maker.open("first")
        assert outcomes_of(free(caster)) == {"first": "first", "more": 1}
        # nothing pending: nothing in flight, whatever the last message said
        caster.submit("more", 1)


def test_what_a_worker_still_holds_is_not_in_flight_for_ever(group: shmcast.Group, maker: Maker) -> None:
    with Caster(group, maker, max_inflight_bytes=5, workers=1) as caster:
        caster.submit("first", maker.gate("first"))
        assert maker.begun("first")
        caster.cancel("first")
        assert caster.step() == [("first", None, None, True)]
        assert caster._intake.inflight_bytes == 5
        # There is nothing pending, so no message would ever say that it is gone.
        caster.submit("none", None)
        assert len(caster.step()) == 1
        maker.open("first")


# ---- on_full="shed"


def test_too_many_pending_are_shed(group: shmcast.Group, maker: Maker) -> None:
    with Caster(group, maker, max_pending=2, on_full="shed", workers=1) as caster:
        caster.submit("a", maker.gate("a"))
        caster.submit("b", 1)
        caster.submit("c", 1)
        caster.submit("none", None)
        shed, none = caster.step()
        assert none.ok
        assert shed.rid == "c"
        assert isinstance(shed.error, BackpressureError)
        assert str(shed.error) == "request 'c' was shed: 2 requests are pending, max_pending is 2"
        maker.open("a")
        assert outcomes_of(free(caster)) == {"a": "a", "b": 1}


def test_too_many_bytes_are_shed(group: shmcast.Group, maker: Maker) -> None:
    with Caster(group, maker, max_inflight_bytes=1000, on_full="shed", workers=1) as caster:
        caster.submit("a", maker.gate("a"))
        caster.submit("b", raw(500))
        caster.submit("c", raw(500))
        (shed,) = caster.step()
        assert shed.rid == "c"
        assert "500 bytes and 501 bytes in flight are more than max_inflight_bytes, 1000 bytes" in str(shed.error)
        caster.cancel("b")
        caster.submit("d", raw(500))
        caster.cancel("d")
        assert [outcome.cancelled for outcome in caster.step()] == [True, True]
        maker.open("a")
        assert outcomes_of(free(caster)) == {"a": "a"}


@pytest.mark.parametrize("on_full", ["raise", "shed", "block"])
def test_one_request_that_is_too_large(group: shmcast.Group, on_full: Any) -> None:
    with Caster(group, lambda raw: len(raw), max_inflight_bytes="256MiB", on_full=on_full) as caster:
        huge = bytes(500 * MIB)
        caster.submit("huge", huge)
        caster.submit("good", b"x")
        first, second = (*caster.step(), *free(caster))[:2]
        assert isinstance(first.error, MaterializeError)
        assert first.error.kind == "ValueError"
        assert "524288000 bytes (500.0 MiB) of raw data are more than max_inflight_bytes" in first.error.text
        assert second.value == 1
        again, none = caster.cast([("huge", huge), ("none", None)])
        assert again.error is not None
        assert none.ok


def test_a_large_request_without_a_limit(group: shmcast.Group) -> None:
    with Caster(group, len) as caster:
        assert caster.cast([("huge", bytes(500 * MIB))])[0].value == 500 * MIB


# ---- on_full="block"


def test_block_waits_for_materializations(group: shmcast.Group, maker: Maker) -> None:
    with Caster(group, maker, max_pending=1, on_full="block", block_timeout=LONG_S, workers=1) as caster:
        caster.submit("a", maker.gate("a"))
        assert maker.begun("a")
        thread = threading.Thread(target=caster.submit, args=("b", 2))
        thread.start()
        # Who blocks does so without keeping others from stepping, or from what needs no room.
        caster.submit("none", None)
        assert outcomes_of(caster.step()) == {"none": None}
        assert caster.pending == ("a",)
        maker.open("a")
        thread.join(LONG_S)
        assert not thread.is_alive()
        assert caster.pending == ("a", "b")
        assert outcomes_of(free(caster)) == {"a": "a", "b": 2}


def test_block_ends_with_room_for_bytes(group: shmcast.Group, maker: Maker) -> None:
    options: dict[str, Any] = {"on_full": "block", "block_timeout": LONG_S, "workers": 1}
    with Caster(group, maker, max_inflight_bytes=1000, **options) as caster:
        caster.submit("a", maker.gate("a"))
        caster.submit("b", raw(900))
        thread = threading.Thread(target=caster.submit, args=("c", raw(900)))
        thread.start()
        assert caster.step() == []
        caster.cancel("b")
        thread.join(LONG_S)
        assert not thread.is_alive()
        assert caster.pending == ("a", "b", "c")
        caster.cancel("c")
        maker.open("a")
        assert sum(outcome.cancelled for outcome in free(caster)) == 2


def test_block_that_does_not_help_sheds(group: shmcast.Group, maker: Maker) -> None:
    with Caster(group, maker, max_pending=1, on_full="block", block_timeout=0.02, workers=1) as caster:
        caster.submit("a", maker.gate("a"))
        for number in range(3):
            caster.submit(number, 5)
        # All waits between two messages together are bounded, because other ranks wait for the next one.
        assert caster._limits._block_left == 0.0
        outcomes = caster.step()
        assert [outcome.rid for outcome in outcomes] == [0, 1, 2]
        assert all(isinstance(outcome.error, BackpressureError) for outcome in outcomes)
        assert caster._limits._block_left == 0.02
        maker.open("a")
        assert outcomes_of(free(caster)) == {"a": "a"}


# ---- results that take the bytes


def test_nothing_more_is_materialized_while_results_take_the_bytes(group: shmcast.Group) -> None:
    sized = Sized(2 * MIB)
    with Caster(group, sized, max_inflight_bytes="1MiB", workers=2) as caster:
        sized.may.set()
        for number in range(6):
            caster.submit(number, 1)
        all_ready(caster)
        seen = []
        while caster.pending:
            seen += caster.step(LONG_S)
            # each worker may have begun one before there was a result
            assert len(sized.begun) <= len(seen) + 2 + 2
        assert sorted(outcome.rid for outcome in seen) == list(range(6))
        del seen
        assert in_use(group.arena) == 0


def test_a_batch_passes_what_waits_for_bytes(group: shmcast.Group) -> None:
    sized = Sized(2 * MIB)
    sized.may.set()
    with Caster(group, sized, max_inflight_bytes="1MiB", workers=1) as caster:
        caster.submit("a", 1)
        caster.submit("b", 1)
        all_ready(caster)
        # "a" is ready and is not delivered by this, "b" waits for that
        outcomes = caster.cast([("c", 1), ("d", 1)])
        assert [outcome.ok for outcome in outcomes] == [True, True]
        assert len(sized.begun) == 3
        assert caster.pending == ("a", "b")
        assert len(free(caster)) == 2


@pytest.mark.parametrize("in_place", [True, False])
def test_an_arena_full_of_leases_leads_to_the_inline_path(in_place: bool) -> None:
    def fill(raw: int, out: Any) -> Any:
        array = out((MIB,), "u1")
        array[:] = raw
        return array

    materialize = fill if in_place else lambda raw: np.full(MIB, raw, np.uint8)
    with shmcast.Group(max_bytes="4MiB") as group, Caster(group, materialize) as caster:
        kept = caster.cast([(number, number) for number in range(10)])
        for number, outcome in enumerate(kept):
            assert (outcome.value == number).all()
        assert group.stats()["inline_bytes"] >= 6 * MIB
        assert in_use(group.arena) >= 3
        assert (shmcast.metrics.snapshot(caster)["counters"]["out_full"] > 0) is in_place
        kept.clear()
        del outcome
        assert in_use(group.arena) == 0
        before = group.stats()["inline_bytes"]
        assert (caster.cast([("again", 7)])[0].value == 7).all()
        assert group.stats()["inline_bytes"] == before


# ---- what is counted


def test_metrics(group: shmcast.Group, maker: Maker) -> None:
    with Caster(group, maker, workers=1, max_pending=3, max_inflight_bytes=2 * MIB) as caster:
        caster.submit("good", MIB)
        all_ready(caster)
        caster.submit("hangs", maker.gate("hangs"), timeout=0.0)
        caster.submit("cancelled", b"x" * 1000)
        caster.cancel("cancelled")
        with pytest.raises(BackpressureError):
            caster.submit("more", 1)
        assert len(caster.step(LONG_S)) >= 2
        free(caster)
        caster.cast([("bad", "bad"), ("none", None)])
        seen = shmcast.metrics.snapshot(caster)
    counters, peaks = seen["counters"], seen["peaks"]
    expected = {
        "requests": 5,
        "outcomes_ok": 2,
        "outcomes_failed": 2,
        "outcomes_timeout": 1,
        "outcomes_cancelled": 1,
        "abandoned_workers": 1,
        "backpressure_raised": 1,
        "backpressure_shed": 0,
        "backpressure_waits": 0,
    }
    assert {name: counters[name] for name in expected} == expected
    assert counters["materialized_bytes"] == MIB
    assert seen["gauges"]["pending"] == seen["gauges"]["inflight_bytes"] == 0
    assert peaks["peak_pending"] == 3
    assert MIB < peaks["peak_inflight_bytes"] < MIB + 10_000
    assert seen["histograms"]["step_ns"]["count"] >= 1
    assert seen["sizes"]["batch_requests"]["sum"] == 5


def test_what_ran_out_of_time_and_was_then_cancelled_counts_as_cancelled(group: shmcast.Group, maker: Maker) -> None:
    with Caster(group, maker, workers=1) as caster:
        caster.submit("hangs", maker.gate("hangs"), timeout=0.0)
        assert maker.begun("hangs")
        all_ready(caster)
        caster.cancel("hangs")
        assert [outcome.cancelled for outcome in caster.step(LONG_S)] == [True]
        counters = shmcast.metrics.snapshot(caster)["counters"]
        counted = {name: counters[f"outcomes_{name}"] for name in ("ok", "failed", "timeout", "cancelled")}
        assert counted == {"ok": 0, "failed": 0, "timeout": 0, "cancelled": 1}


def test_a_wait_for_room_is_shorter_than_others_wait_for_us(maker: Maker) -> None:
    with shmcast.Group(max_bytes="16MiB", timeout=0.3) as group:
        caster = Caster(group, maker, max_pending=1, on_full="block", block_timeout=1000.0, workers=1)
        caster.submit("a", maker.gate("a"))
        caster.submit("b", 1)  # not taken: waits for "a", which never ends
        waited_ns = shmcast.metrics.snapshot(caster)["counters"]["backpressure_wait_ns"]
        assert waited_ns < 1000e9
        maker.open("a")
        assert {outcome.rid: outcome.ok for outcome in caster.close()} == {"a": True, "b": False}


def test_metrics_of_limits(group: shmcast.Group, maker: Maker) -> None:
    with Caster(group, maker, max_pending=1, on_full="block", block_timeout=0.0, workers=1) as caster:
        caster.submit("a", maker.gate("a"))
        caster.submit("b", 1)
        counters = shmcast.metrics.snapshot(caster)["counters"]
        assert (counters["backpressure_shed"], counters["backpressure_waits"]) == (1, 1)
        assert counters["backpressure_wait_ns"] > 0
        maker.open("a")
        assert len(free(caster)) == 2


# ---- the end


def test_close_waits(group: shmcast.Group, maker: Maker) -> None:
    caster = Caster(group, maker, workers=1)
    caster.submit("a", maker.gate("a"))
    caster.submit("b", "bad")
    caster.submit("c", MIB)
    assert maker.begun("a")
    threading.Timer(0.0, maker.open, ("a",)).start()
    outcomes = caster.close()
    assert [(outcome.rid, outcome.ok) for outcome in outcomes] == [("a", True), ("b", False), ("c", True)]
    assert caster.close() == []
    assert caster.pending == ()
    for use in (caster.step, caster.collect, lambda: caster.submit("d"), lambda: caster.cast([])):
        with pytest.raises(GroupError, match="the caster is closed"):
            use()
    assert caster.apply(b"") == []
    caster.cancel("a")
    assert caster._intake._pool.join(LONG_S)
    del outcomes
    assert in_use(group.arena) == 0


@pytest.mark.parametrize("wait", [True, False])
def test_close_cancels(group: shmcast.Group, maker: Maker, wait: bool) -> None:
    caster = Caster(group, maker, workers=1)
    caster.submit("running", maker.gate("running", MIB))
    caster.submit("queued", 5)
    assert maker.begun("running")
    outcomes = caster.close(wait, cancel_pending=True)
    assert [(outcome.rid, outcome.cancelled) for outcome in outcomes] == [("running", True), ("queued", True)]
    assert group.step == 1
    maker.open("running")
    assert caster._intake._pool.join(LONG_S)
    assert maker.made == ["running"]
    assert in_use(group.arena) == 0


def test_close_without_waiting(group: shmcast.Group, maker: Maker) -> None:
    caster = Caster(group, maker, workers=1)
    caster.submit("ready", MIB)
    all_ready(caster)
    caster.submit("running", maker.gate("running"))
    assert maker.begun("running")
    caster.submit("queued", 5)
    ready, running, queued = caster.close(wait=False)
    assert ready.ok
    for outcome in (running, queued):
        assert isinstance(outcome.error, MaterializeError)
        assert outcome.error.text == "the caster was closed before it was materialized"
    maker.open("running")
    assert caster._intake._pool.join(LONG_S)
    del ready
    assert in_use(group.arena) == 0


def test_close_does_not_wait_for_what_hangs(
    group: shmcast.Group, maker: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caster, "_HUNG_S", 0.02)
    monkeypatch.setattr(caster, "_LONGEST_SILENCE_S", 0.01)
    hung = Caster(group, maker, workers=1)
    hung.submit("hangs", maker.gate("hangs"))
    hung.submit("behind", 1)
    outcomes = hung.close()
    assert [outcome.error.text for outcome in outcomes] == [
        "nothing was materialized for 0.02 s, and the caster is being closed"
    ] * 2


def test_close_waits_for_what_has_a_timeout(
    group: shmcast.Group, maker: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caster, "_HUNG_S", 0.0)
    monkeypatch.setattr(caster, "_LONGEST_SILENCE_S", 0.01)
    slow = Caster(group, maker, workers=1, timeout=LONG_S)
    slow.submit("slow", maker.gate("slow"))
    assert maker.begun("slow")
    # after some messages that say nothing
    original = group.exchange

    def exchange(blob: Any = None, finish: Any = None) -> Any:
        if group.step >= 3:
            maker.open("slow")
        return original(blob, finish)

    monkeypatch.setattr(group, "exchange", exchange)
    assert outcomes_of(slow.close()) == {"slow": "slow"}
    assert group.step >= 4


def test_a_batch_that_takes_long_is_not_silent(
    group: shmcast.Group, maker: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caster, "_LONGEST_SILENCE_S", 0.01)
    original = group.exchange
    values: list[int] = []

    def exchange(blob: Any = None, finish: Any = None) -> Any:
        if group.step >= 3:
            maker.open("slow")
        head, received = original(blob, finish)
        values.append(len(received))
        return head, received

    monkeypatch.setattr(group, "exchange", exchange)
    with Caster(group, maker, workers=1) as slow:
        assert outcomes_of(slow.cast([("a", 1), ("slow", maker.gate("slow"))])) == {"a": 1, "slow": "slow"}
    assert group.step >= 4
    # but what it has to say comes in one message
    assert values == [0] * (group.step - 1) + [2]


def test_close_after_the_group(maker: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    # Who can not send does not wait for something to send.
    monkeypatch.setattr(caster, "_LONGEST_SILENCE_S", 1e6)
    group = shmcast.Group(max_bytes="16MiB", timeout=1e7)
    late = Caster(group, maker, workers=1)
    late.submit("running", maker.gate("running", MIB))
    assert maker.begun("running")
    late.submit("queued", MIB)
    group.close()
    with pytest.raises(GroupError, match="step: the group is closed"):
        late.step(LONG_S)
    outcomes = late.close()
    assert [(outcome.rid, str(outcome.error)) for outcome in outcomes] == [
        ("running", "step: the group is closed"),
        ("queued", "step: the group is closed"),
    ]
    maker.open("running")
    assert late._intake._pool.join(LONG_S)


def test_close_of_a_group_that_broke(group: shmcast.Group, maker: Maker) -> None:
    with shmcast.Arena.create("16MiB") as arena, shmcast.Group(arena=arena) as lost:
        caster = Caster(lost, maker, workers=1)
        caster.submit("ready", MIB)
        all_ready(caster)
        caster.submit("running", maker.gate("running", MIB))
        lost.give_up(GroupError("says the test"))
        for use in (caster.step, lambda: caster.cast([("b", None)])):
            with pytest.raises(GroupError, match="says the test"):
                use()
        outcomes = caster.close()
        assert {outcome.rid for outcome in outcomes} == {"ready", "running", "b"}
        assert all("says the test" in str(outcome.error) for outcome in outcomes)
        maker.open("running")
        assert caster._intake._pool.join(LONG_S)
        assert in_use(arena) == 0


def test_leaving_by_an_exception_sends_nothing(group: shmcast.Group, maker: Maker) -> None:
    with pytest.raises(ZeroDivisionError), Caster(group, maker, workers=1) as caster:
        caster.submit("ready", MIB)
        all_ready(caster)
        caster.submit("running", maker.gate("running", MIB))
        assert maker.begun("running")
        _ = 1 / 0
    assert group.step == 0
    assert caster.pending == ()
    maker.open("running")
    assert caster._intake._pool.join(LONG_S)
    assert in_use(group.arena) == 0


def test_one_call_at_a_time(group: shmcast.Group, maker: Maker) -> None:
    with Caster(group, maker, workers=1) as caster:
        caster.submit("a", maker.gate("a"))
        thread = threading.Thread(target=caster.cast, args=([("b", maker.gate("b"))],))
        thread.start()
        maker.open("a")
        assert maker.begun("b")
        for use in (caster.step, caster.collect, caster.close, lambda: caster.apply(b"x")):
            with pytest.raises(GroupError, match="under way in another thread"):
                use()
        assert set(caster.pending) == {"a", "b"}
        maker.open("b")
        thread.join(LONG_S)
        assert outcomes_of(free(caster)) == {"a": "a"}


def test_metrics_come_to_an_end_with_the_caster(group: shmcast.Group, maker: Maker) -> None:
    before = metrics.snapshot(group)
    caster = Caster(group, maker, workers=1)
    caster.submit("held", maker.gate("held", 3 * MIB))
    assert maker.begun("held")
    caster.submit("a", 2 * MIB)
    maker.open("held")
    all_ready(caster, 2)
    group.close()
    outcomes = caster.close()
    assert sorted(outcome.rid for outcome in outcomes) == ["a", "held"]
    assert all(isinstance(outcome.error, shmcast.GroupError) for outcome in outcomes)
    after = metrics.snapshot(group)

    def more(name: str) -> int:
        return int(after["counters"][name] - before["counters"][name])

    assert (more("requests"), more("outcomes_failed")) == (2, 2)
    assert more("materialized_bytes") == 5 * MIB
    assert (after["gauges"]["pending"], after["gauges"]["inflight_bytes"]) == (0, 0)
