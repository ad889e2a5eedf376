"""Groups that break where every rank was given the raw requests: each goes on alone, and all have the same outcomes."""

from __future__ import annotations

import concurrent.futures
import logging
import os
import select
import signal
import threading
from typing import Any

import pytest

import shmcast
from makers import LONG_S, Maker, Mixed, all_ready, free, outcomes_of
from ranks import in_use
from shmcast import Caster, FutureCaster, GroupError, MaterializeError
from shmcast import caster as caster_module
from test_caster_modes import MODES

CLOSES = pytest.mark.parametrize(
    ("wait", "cancel_pending"), [(True, False), (False, False), (True, True), (False, True)]
)


def broken(group: shmcast.Group) -> GroupError:
    return group.give_up(GroupError("broken (says the test)"))


# ---- one rank


def alone(group: shmcast.Group, materialize: Any, **options: Any) -> Caster:
    return Caster(group, materialize, raw_everywhere=True, inline_bytes=0, **options)


def readable(caster: Caster) -> bool:
    return bool(select.select([caster.fileno()], [], [], 0)[0])


@pytest.mark.parametrize("executor", ["thread", "inline"])
def test_all_that_is_pending_comes_in_the_next_step(
    group: shmcast.Group, maker: Maker, executor: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with alone(group, maker, executor=executor) as caster:
        assert caster.alone is None
        for rid, raw in [("a", 3), ("none", None), ("b", 70_000), ("bad", "bad")]:
            caster.submit(rid, raw)
        broken(group)
        with caplog.at_level(logging.ERROR, "shmcast"):
            a, none, b, bad = caster.step()
        assert outcomes_of([a, none, b]) == {"a": 3, "none": None, "b": 70_000 % 251}
        assert (bad.rid, bad.error.kind, bad.error.text) == ("bad", "LookupError", "bad")
        assert "broken (says the test)" in str(caster.alone)
        assert type(caster.alone) is GroupError
        assert caster.alone.__traceback__ is None
        assert [record.getMessage() for record in caplog.records] == [
            f"the ranks go on without each other, each materializes everything: {caster.alone}"
        ]
        assert caster.step() == []
        for number in range(5):
            caster.submit(number, number + 1)
        assert caster.pending == (0, 1, 2, 3, 4)
        assert outcomes_of(caster.step()) == {number: number + 1 for number in range(5)}
        assert outcomes_of(caster.cast([("c", 5), ("d", None)])) == {"c": 5, "d": None}
        assert caster.pending == ()
        assert in_use(group.arena) == 0


def test_without_raw_requests_it_is_an_error(group: shmcast.Group, maker: Maker) -> None:
    caster = Caster(group, maker)
    caster.submit("a", 3)
    broken(group)
    for _ in range(2):
        with pytest.raises(GroupError, match="says the test"):
            caster.step()
        with pytest.raises(GroupError, match="says the test"):
            caster.collect()
    assert caster.alone is None
    (outcome,) = caster.close()
    assert isinstance(outcome.error, GroupError)


def test_a_group_that_was_closed_is_an_error(group: shmcast.Group, maker: Maker) -> None:
    caster = alone(group, maker)
    caster.submit("a", 3)
    group.close()
    with pytest.raises(GroupError, match="the group is closed"):
        caster.step()
    assert caster.alone is None
    (outcome,) = caster.close()
    assert isinstance(outcome.error, GroupError)


def test_the_group_may_be_closed_then(group: shmcast.Group, maker: Maker) -> None:
    with alone(group, maker) as caster:
        caster.submit("a", 3)
        broken(group)
        assert outcomes_of(caster.step()) == {"a": 3}
        group.close()
        caster.submit("b", 4)
        assert outcomes_of(caster.step()) == {"b": 4}


def test_every_call_notices(group: shmcast.Group, maker: Maker) -> None:
    for call in ("cast", "collect", "apply", "close"):
        with shmcast.Group(max_bytes="16MiB") as own, alone(own, maker) as caster:
            caster.submit("a", 3)
            broken(own)
            if call == "cast":
                assert outcomes_of(caster.cast([("b", 4)])) == {"b": 4}
                assert caster.pending == ("a",)
            elif call == "collect":
                assert outcomes_of(caster.apply(caster.collect())) == {"a": 3}
                assert caster.collect() == b""
                assert caster.apply(b"") == []
                caster.submit("c", 5)
                assert outcomes_of(caster.apply(b"")) == {"c": 5}
            elif call == "apply":
                assert outcomes_of(caster.apply(b"anything")) == {"a": 3}
            else:
                assert outcomes_of(caster.close()) == {"a": 3}
            assert caster.alone is not None


def test_what_was_collected_and_not_applied(group: shmcast.Group, maker: Maker) -> None:
    with alone(group, maker) as caster:
        caster.submit("a", 3)
        all_ready(caster)
        blob = caster.collect()
        broken(group)
        assert outcomes_of(caster.apply(blob)) == {"a": 3}
        caster.submit("b", 4)
        assert outcomes_of(caster.step()) == {"b": 4}


@pytest.mark.parametrize("call", ["collect", "step"])
def test_the_group_may_break_between_a_look_and_the_message(group: shmcast.Group, maker: Maker, call: str) -> None:
    with alone(group, maker) as caster:
        caster.submit("a", 3)
        all_ready(caster)
        pack = group.pack

        def breaks(*args: Any, **options: Any) -> bytes:
            broken(group)
            return pack(*args, **options)

        group.pack = breaks  # type: ignore[method-assign]
        assert outcomes_of(caster.step() if call == "step" else caster.apply(caster.collect())) == {"a": 3}


def test_the_descriptor_shows_what_is_pending(group: shmcast.Group, maker: Maker) -> None:
    with alone(group, maker) as caster:
        assert not readable(caster)
        broken(group)
        caster.submit("a", 3)
        all_ready(caster)
        assert readable(caster)
        assert outcomes_of(caster.apply(caster.collect())) == {"a": 3}
        assert not readable(caster)
        caster.submit("b", 4)
        assert readable(caster)
        assert outcomes_of(caster.step()) == {"b": 4}
        assert not readable(caster)
    with pytest.raises(ValueError, match="closed"):
        caster.fileno()


def test_a_descriptor_that_is_asked_for_only_then(group: shmcast.Group, maker: Maker) -> None:
    with alone(group, maker) as caster:
        caster.submit("a", 3)
        broken(group)
        caster.step()
        assert not readable(caster)
        caster.submit("b", None)
        assert readable(caster)


def test_nothing_is_decided_any_more(group: shmcast.Group, maker: Maker) -> None:
    with alone(group, maker, timeout=0.0, mode="shm") as caster:
        broken(group)
        caster.submit("before", 1)
        caster.cast([("goes", None)])
        caster.submit("slow", maker.gate("slow"), timeout=0.0)
        caster.submit("cancelled", 3)
        caster.cancel("cancelled")
        caster.cancel(lambda rid: True)
        caster.switch("object-sync")
        timer = threading.Thread(target=lambda: maker.begun("slow") and maker.open("slow"))
        timer.start()
        assert outcomes_of(caster.step()) == {"before": 1, "slow": "slow", "cancelled": 3}
        timer.join()


def test_what_was_cancelled_before_is_pending_again(group: shmcast.Group, maker: Maker) -> None:
    with alone(group, maker) as caster:
        caster.submit("a", 3)
        caster.cancel("a")
        broken(group)
        assert outcomes_of(caster.step()) == {"a": 3}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("executor", ["thread", "inline"])
def test_whatever_way_requests_have_begun_to_go(group: shmcast.Group, maker: Maker, mode: str, executor: Any) -> None:
    with alone(group, maker, mode=mode, executor=executor, workers=2) as caster:
        for number in range(20):
            caster.submit(number, number + 1)
        early = caster.step() if mode.endswith("-async") else []
        caster.submit("last", 100)
        broken(group)
        assert outcomes_of(early + free(caster)) == {**{number: number + 1 for number in range(20)}, "last": 100}
        caster.close()
        assert in_use(group.arena) == 0


def test_a_message_whose_agreement_fails_was_not_delivered(group: shmcast.Group, maker: Maker) -> None:
    made = Maker()
    with alone(group, made, mode="raw", workers=1) as caster:
        caster.submit("a", 3)
        all_ready(caster)
        assert caster.step() == []
        all_ready(caster)
        finish = caster._delivery.finish

        def breaks(head: bytes, parts: Any) -> Any:
            finish(head, parts)
            raise broken(group)

        caster._delivery.finish = breaks  # type: ignore[method-assign]
        assert outcomes_of(caster.step()) == {"a": 3}
        assert made.made == [3, 3]  # what it had made was lost with the message


def test_what_ends_a_program_ends_one_request(group: shmcast.Group) -> None:
    mixed = Mixed(1)
    with alone(group, mixed, workers=2) as caster:
        broken(group)
        numbers = range(200)
        for number in numbers:
            caster.submit(number, number)
        kinds = {(outcome.error.kind, outcome.rid % 2) for outcome in caster.step() if mixed.check(outcome) == "failed"}
        assert kinds == {("ValueError", 0), ("SystemExit", 1)}


def test_an_interrupt_loses_nothing(group: shmcast.Group, maker: Maker) -> None:
    with alone(group, maker, workers=1) as caster:
        broken(group)
        caster.submit("a", 3)
        caster.submit("slow", maker.gate("slow"))

        def interrupt() -> None:
            while not caster._replicas._changed._waiters:
                os.sched_yield()
            os.kill(os.getpid(), signal.SIGINT)

        signalled = threading.Thread(target=interrupt)
        assert maker.begun("slow")
        signalled.start()
        with pytest.raises(KeyboardInterrupt):
            caster.step()
        signalled.join()
        maker.open("slow")
        assert outcomes_of(caster.step()) == {"a": 3, "slow": "slow"}


def test_a_thread_that_can_not_be_had_is_an_error(
    group: shmcast.Group, maker: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_thread(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with alone(group, maker) as caster:
        with monkeypatch.context() as patch:
            broken(group)
            patch.setattr(threading.Thread, "start", no_thread)
            caster.cast([("first", None)])
            caster.submit("a", 3)
            caster.submit("b", 4)
        a, b = caster.step()
        assert [each.error.kind for each in (a, b)] == ["RuntimeError"] * 2
        assert "no thread can be started" in a.error.text
        caster.submit("c", 5)
        assert outcomes_of(caster.step()) == {"c": 5}


def test_submit_while_it_breaks(group: shmcast.Group) -> None:
    """From another thread, at any moment: what was taken is pending, what was not is not."""
    for _ in range(20):
        with shmcast.Group(max_bytes="16MiB") as own, alone(own, Maker(), workers=1) as caster:
            go = threading.Event()
            count = 50

            def submit(caster: Caster = caster, go: threading.Event = go, count: int = count) -> None:
                for number in range(count):
                    if number == 5:
                        go.set()
                    caster.submit(number, 1)

            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                done = pool.submit(submit)
                assert go.wait(LONG_S)
                broken(own)
                found = []
                while not done.done() or caster.pending:
                    found += caster.step()
                done.result()
            assert [outcome.rid for outcome in found] == list(range(count))
            assert all(outcome.ok for outcome in found)


@CLOSES
def test_close(group: shmcast.Group, maker: Maker, wait: bool, cancel_pending: bool) -> None:
    caster = alone(group, maker, workers=1)
    broken(group)
    caster.cast([("goes", None)])
    caster.submit("slow", maker.gate("slow"))
    caster.submit("none", None)
    caster.submit("queued", 3)
    if wait and not cancel_pending:
        maker.open("slow")
    slow, none, queued = caster.close(wait, cancel_pending)
    if cancel_pending:
        assert slow.cancelled
        assert none.cancelled
        assert queued.cancelled
    elif wait:
        assert outcomes_of([slow, none, queued]) == {"slow": "slow", "none": None, "queued": 3}
    else:
        assert none.result() is None
        for each in (slow, queued):
            assert (each.error.kind, each.error.text) == (
                "GroupError",
                "the caster was closed before it was materialized",
            )
    assert caster.close() == []
    assert caster._raws == {}
    with pytest.raises(GroupError, match="closed"):
        caster.submit("more", 1)
    maker.open_all()
    assert caster._replicas._pool.join(LONG_S)


def test_close_does_not_wait_for_ever(group: shmcast.Group, maker: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caster_module, "_HUNG_S", 0.02)
    caster = alone(group, maker, workers=1)
    broken(group)
    caster.submit("hangs", maker.gate("hangs"))
    caster.submit("behind", 3)
    hangs, behind = caster.close()
    assert hangs.error.kind == "TimeoutError"
    assert behind.ok or behind.error.kind == "TimeoutError"
    maker.open_all()
    maker.join_all()


def test_futures(group: shmcast.Group, maker: Maker) -> None:
    with FutureCaster(alone(group, maker)) as caster:
        futures = [caster.submit(number, number + 1) for number in range(3)]
        broken(group)
        caster.step()
        assert [int(future.result(0)["x"][0]) for future in futures] == [1, 2, 3]
        bad = caster.submit("bad", "bad")
        last = caster.submit("last", 5)
    assert isinstance(bad.exception(0), MaterializeError)
    assert last.result(0)["x"].shape == (5,)


def test_limits_hold_then(group: shmcast.Group, maker: Maker) -> None:
    with alone(group, maker, max_pending=2, max_inflight_bytes=10) as caster:
        broken(group)
        caster.submit(0, b"x" * 100 and 1)
        caster.submit(1, 1)
        with pytest.raises(shmcast.BackpressureError):
            caster.submit(2, 1)
        assert outcomes_of(caster.step()) == {0: 1, 1: 1}
        caster.submit(2, 1)
        assert outcomes_of(caster.step()) == {2: 1}
