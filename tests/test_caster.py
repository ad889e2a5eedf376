"""Casters of one process: what becomes of a request, at whatever moment it is cancelled, fails, hangs or finds no room.

Materializations that hang, inline, in place: `test_caster_work`. Limits and the end: `test_caster_limits`. Several ranks:
`test_caster_ranks`."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import Any

import numpy as np
import pytest

import shmcast
from child import Child
from makers import LONG_S, MIB, Maker, all_ready, free, outcomes_of
from ranks import in_use
from shmcast import BackpressureError, Caster, GroupError, HandleError, MaterializeError, intake

BOTH = pytest.mark.parametrize("executor", ["thread", "inline"])


# ---- one batch at once


@BOTH
def test_cast(group: shmcast.Group, executor: Any) -> None:
    with Caster(group, Maker(), executor=executor) as caster:
        first, nothing, failed, last = caster.cast([("a", 1000), (("b", 2), None), ("c", "bad"), ("a2", 70_000)])
        assert [outcome.rid for outcome in (first, nothing, failed, last)] == ["a", ("b", 2), "c", "a2"]
        assert (first.value["x"] == 1000 % 251).all()
        assert (last.result()["x"] == 70_000 % 251).all()
        assert not last.value["x"].flags.writeable
        assert nothing == (("b", 2), None, None, False)
        assert first.ok
        assert nothing.ok
        assert not failed.ok
        with pytest.raises(MaterializeError, match="materialize request 'c': LookupError: bad") as caught:
            failed.result()
        error = caught.value
        assert (error.rid, error.kind, error.text) == ("c", "LookupError", "bad")
        assert "in __call__" in error.traceback
        assert caster.pending == ()
        assert caster.cast([]) == []
        assert group.step == 1
        del first, last
        assert in_use(group.arena) == 0


def test_cast_leaves_others_alone(group: shmcast.Group, maker: Maker) -> None:
    with Caster(group, maker, workers=1) as caster:
        caster.submit("slow", maker.gate("slow"))
        caster.submit("ready", None)
        assert maker.begun("slow")
        maker.open("slow")
        assert outcomes_of(caster.cast([("b", 10), ("c", 20)])) == {"b": 10, "c": 20}
        assert caster.pending == ("slow", "ready")
        assert outcomes_of(free(caster)) == {"slow": "slow", "ready": None}


def test_cast_refuses_ids_that_are_pending_or_twice(group: shmcast.Group, maker: Maker) -> None:
    with Caster(group, maker) as caster:
        caster.submit("a", None)
        for batch in ([("b", 1), ("a", 2)], [("b", 1), ("b", 2)]):
            with pytest.raises(ValueError, match="id"):
                caster.cast(batch)
            assert caster.pending == ("a",)
        with pytest.raises(TypeError):
            caster.cast([([], 1)])
        with pytest.raises(ValueError, match="expected 2"):
            caster.cast([("b", 1, 2)])  # type: ignore[list-item]
        assert outcomes_of(caster.step()) == {"a": None}
        assert not maker.made


# ---- one by one


class Unshown:
    def __repr__(self) -> str:
        raise RuntimeError("no repr (says the test)")


def test_ids_that_can_not_be_shown_cost_no_outcome(group: shmcast.Group, maker: Maker) -> None:
    with Caster(group, maker) as caster:
        unshown = Unshown()
        for rid, raw in ((unshown, "bad"), ("b", 10)):
            caster.submit(rid, raw)
        all_ready(caster, 2)
        outcomes = caster.step()
        assert {outcome.rid: outcome.ok for outcome in outcomes} == {unshown: False, "b": True}
        before = caster._ledger.submitted
        with pytest.raises(ValueError, match="digits"):
            caster.submit(10**5000, 1)
        assert caster._ledger.submitted == before


def test_submit_and_step(group: shmcast.Group, maker: Maker) -> None:
    with Caster(group, maker, workers=2) as caster:
        assert caster.step() == []
        assert caster.step(timeout=LONG_S) == []
        assert group.step == 0
        for rid in ("a", "b", "c"):
            caster.submit(rid, maker.gate(rid))
        assert caster.pending == ("a", "b", "c")
        assert maker.begun("b")
        assert caster.step() == []
        maker.open("b")
        # in the order in which they get ready
        assert outcomes_of(caster.step(LONG_S)) == {"b": "b"}
        assert caster.pending == ("a", "c")
        assert maker.begun("c")
        maker.open("a", "c")
        assert outcomes_of(free(caster)) == {"a": "a", "c": "c"}
        assert caster.pending == ()
        steps = group.step
        assert caster.step() == []
        assert group.step == steps


def test_more_values_than_a_message_tells_apart(group: shmcast.Group) -> None:
    with Caster(group, Maker(), executor="inline") as caster:
        for number in range(intake.MAX_VALUES + 3):
            caster.submit(number, 10)
        assert [outcome.rid for outcome in caster.step()] == list(range(intake.MAX_VALUES))
        assert len(caster.step()) == 3


def test_an_id_is_free_again_with_its_outcome(group: shmcast.Group, maker: Maker) -> None:
    with Caster(group, maker) as caster:
        caster.submit("a", maker.gate("a"))
        with pytest.raises(ValueError, match="'a': a request with this id is pending"):
            caster.submit("a", 1)
        with pytest.raises(TypeError):
            caster.submit(["a"], 1)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="timeout: -1"):
            caster.submit("b", 1, timeout=-1)
        maker.open("a")
        assert outcomes_of(free(caster)) == {"a": "a"}
        caster.submit("a", 5)
        assert outcomes_of(free(caster)) == {"a": 5}


def test_submit_from_several_threads(group: shmcast.Group) -> None:
    with Caster(group, Maker(), workers=4) as caster:

        def submit(start: int) -> None:
            for number in range(start, start + 100):
                caster.submit(number, number + 1)

        threads = [threading.Thread(target=submit, args=(1000 * start,)) for start in range(4)]
        for thread in threads:
            thread.start()
        found: dict[Any, Any] = {}
        while any(thread.is_alive() for thread in threads) or caster.pending:
            found |= outcomes_of(caster.step(0.01))
        expected = [number for start in range(4) for number in range(1000 * start, 1000 * start + 100)]
        assert found == {number: (number + 1) % 251 for number in expected}


# ---- in a broadcast of the engine's own


def test_collect_and_apply(group: shmcast.Group, maker: Maker) -> None:
    with Caster(group, maker) as caster:
        assert caster.collect() == b""
        assert caster.apply(b"") == []
        caster.submit("a", maker.gate("a"))
        assert caster.collect() == b""
        maker.open("a")
        caster.submit("b", None)
        outcomes = []
        while caster.pending:
            blob = collected(caster)
            caster.submit(("later", len(outcomes)), None) if not outcomes else None
            outcomes += caster.apply(memoryview(blob))
        assert {outcome.rid for outcome in outcomes} == {"a", "b", ("later", 0)}
        assert group.step >= 2


def collected(caster: Caster) -> bytes:
    """The next blob that is not empty."""
    all_ready(caster)
    blob = caster.collect()
    assert blob
    return blob


def test_it_rides_in_the_groups_own_broadcast(group: shmcast.Group, maker: Maker) -> None:
    with Caster(group, maker) as caster:
        found: dict[Any, Any] = {}
        for number in range(5):
            caster.submit(number, MIB + number)
            tree = group.broadcast({"requests": [np.ones(5000)], "blob": collected(caster)})
            found |= outcomes_of(caster.apply(tree["blob"]))
            assert group.broadcast("something else") == "something else"
            found |= outcomes_of(caster.cast([(f"cast {number}", 3)]))
        assert len(found) == 10
        del tree
        assert in_use(group.arena) == 0


def test_what_is_collected_is_applied_once_and_first(group: shmcast.Group) -> None:
    with Caster(group, Maker()) as caster:
        caster.submit("a", 2000)
        blob = collected(caster)
        for use in (caster.step, caster.collect, lambda: caster.cast([("b", None)])):
            with pytest.raises(GroupError, match="has not been applied yet"):
                use()
        with pytest.raises(HandleError):
            caster.apply(b"garbage")
        for use in (caster.step, caster.collect, lambda: caster.cast([("b", None)])):
            with pytest.raises(GroupError, match="has not been applied yet"):
                use()
        for garbage in (b"x", blob[:-1], blob + b"x", blob[:30] + b"?" + blob[31:], b"shmP" * 100):
            with pytest.raises(HandleError):
                caster.apply(garbage)
        assert caster.pending == ("a",)
        assert outcomes_of(caster.apply(blob)) == {"a": 2000 % 251}
        with pytest.raises(HandleError, match="message 1, this rank is to take in message 2"):
            caster.apply(blob)
        assert group.broadcast("goes on") == "goes on"
        assert outcomes_of(caster.cast([("a", 3)])) == {"a": 3}


def test_close_without_the_last_apply(group: shmcast.Group) -> None:
    caster = Caster(group, Maker())
    caster.submit("a", 200_000)
    blob = collected(caster)
    (outcome,) = caster.close()
    assert isinstance(outcome.error, GroupError)
    with pytest.raises(GroupError, match="closed"):
        caster.apply(blob)


# ---- errors of one request


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


ERRORS: dict[str, Callable[[], BaseException]] = {
    "SystemExit": lambda: SystemExit(3),
    "GeneratorExit": GeneratorExit,
    "MemoryError": MemoryError,
    "Unprintable": Unprintable,
    "StopIteration": lambda: StopIteration("x"),
    "RecursionError": lambda: RecursionError("deep"),
}


@BOTH
@pytest.mark.parametrize("kind", ERRORS)
def test_an_error_is_one_requests_alone(group: shmcast.Group, executor: Any, kind: str) -> None:
    def materialize(raw: Any) -> Any:
        if raw == "bad":
            raise ERRORS[kind]()
        return np.full(10_000, raw)

    with Caster(group, materialize, executor=executor, workers=1) as caster:
        good, bad, also = caster.cast([("good", 1), ("bad", "bad"), ("also", 2)])
        assert good.ok
        assert also.ok
        assert isinstance(bad.error, MaterializeError)
        assert bad.error.kind == kind


def test_a_result_that_can_not_be_pickled(group: shmcast.Group) -> None:
    with Caster(group, lambda raw: [np.zeros(100_000), threading.Lock()] if raw else 1) as caster:
        bad, good = caster.cast([("bad", 1), ("good", 0)])
        assert isinstance(bad.error, MaterializeError)
        assert bad.error.kind == "TypeError"
        assert "pickle" in bad.error.text
        assert good.value == 1
        assert in_use(group.arena) == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda big: np.empty(0),
        lambda big: big[: big.size // 2],
        lambda big: big[::2],
        lambda big: big[10:12],
        lambda big: b"",
        lambda big: {"deep": [big[5:50_000]]},
    ],
)
def test_odd_results(group: shmcast.Group, make: Callable[[Any], Any]) -> None:
    big = np.arange(1_000_000, dtype=np.int32)
    with Caster(group, lambda raw: make(big)) as caster:
        (outcome,) = caster.cast([("a", 1)])
        expected = make(big)
        value, expected = (
            (outcome.value["deep"][0], expected["deep"][0]) if isinstance(expected, dict) else (outcome.value, expected)
        )
        assert np.array_equal(value, expected)
        assert group.stats()["array_bytes"] <= 4 * expected.size if isinstance(expected, np.ndarray) else True
        del outcome, value
        assert in_use(group.arena) == 0


# ---- cancel


def test_cancel_queued(group: shmcast.Group, maker: Maker) -> None:
    with Caster(group, maker, workers=1) as caster:
        caster.submit("running", maker.gate("running"))
        caster.submit("queued", 1)
        assert maker.begun("running")
        for _ in range(2):
            caster.cancel("queued")
        assert caster.pending == ("running", "queued")
        (outcome,) = caster.step()
        assert outcome == ("queued", None, None, True)
        assert not outcome.ok
        with pytest.raises(CancelledError):
            outcome.result()
        maker.open("running")
        assert outcomes_of(free(caster)) == {"running": "running"}
        assert maker.made == ["running"]


def test_cancel_running(group: shmcast.Group, maker: Maker) -> None:
    with Caster(group, maker, workers=1) as caster:
        caster.submit("a", maker.gate("a", MIB))
        assert maker.begun("a")
        caster.cancel("a")
        (outcome,) = caster.step()
        assert outcome.cancelled
        caster.submit("next", 3)
        maker.open("a")
        # the same worker, after it has taken back what it made
        assert outcomes_of(free(caster)) == {"next": 3}
        assert in_use(group.arena) == 0


def test_what_comes_after_a_cancel_changes_nothing(group: shmcast.Group, maker: Maker) -> None:
    with Caster(group, maker, workers=1) as caster:
        caster.submit("a", maker.gate("a", MIB))
        assert maker.begun("a")
        caster.cancel("a")
        maker.open("a")
        # by the same worker, so it is done with the other one
        assert outcomes_of(caster.cast([("next", 3)])) == {"next": 3}
        assert in_use(group.arena) == 0
        assert caster.step() == [("a", None, None, True)]


def test_cancel_published(group: shmcast.Group) -> None:
    with Caster(group, Maker()) as caster:
        caster.submit("a", MIB)
        all_ready(caster)
        assert in_use(group.arena) == 1
        assert caster._intake.inflight_bytes > MIB
        caster.cancel(lambda rid: rid == "a")
        assert in_use(group.arena) == 0
        assert caster._intake.inflight_bytes == 0
        caster.cancel("a")
        assert [outcome.cancelled for outcome in caster.step()] == [True]
        assert group.step == 1


@pytest.mark.parametrize("raw", [None, "bad"])
def test_cancel_what_is_ready_without_a_value(group: shmcast.Group, raw: Any) -> None:
    with Caster(group, Maker()) as caster:
        caster.submit("a", raw)
        all_ready(caster)
        caster.cancel("a")
        assert caster.step() == [("a", None, None, True)]


def test_cancel_keeps_the_order(group: shmcast.Group) -> None:
    with Caster(group, Maker(), executor="inline") as caster:
        for rid in "abc":
            caster.submit(rid, None)
        caster.cancel("a")
        assert [(outcome.rid, outcome.cancelled) for outcome in caster.step()] == [
            ("a", True),
            ("b", False),
            ("c", False),
        ]


def test_cancel_what_is_in_a_message_or_delivered(group: shmcast.Group) -> None:
    with Caster(group, Maker()) as caster:
        caster.submit("a", MIB)
        blob = collected(caster)
        caster.cancel("a")
        (outcome,) = caster.apply(blob)
        assert outcome.ok
        caster.cancel("a")
        caster.cancel("never seen")
        caster.cancel(lambda rid: True)
        assert caster.step() == []
        assert (outcome.value["x"] == MIB % 251).all()
        del outcome
        assert in_use(group.arena) == 0


def test_cancel_by_predicate(group: shmcast.Group, maker: Maker) -> None:
    with Caster(group, maker, workers=1) as caster:
        caster.submit("first", maker.gate("first"))
        assert maker.begun("first")
        for number in range(6):
            caster.submit(number, number)
        caster.cancel(lambda rid: rid != "first" and rid % 2 == 0)
        with pytest.raises(ZeroDivisionError):
            caster.cancel(lambda rid: 1 / 0)
        with pytest.raises(TypeError):
            caster.cancel([])
        assert [outcome.rid for outcome in caster.step()] == [0, 2, 4]
        maker.open("first")
        assert outcomes_of(free(caster)) == {"first": "first", 1: 1, 3: 3, 5: 5}


def test_an_id_that_can_be_called_is_an_id(group: shmcast.Group, maker: Maker) -> None:
    with Caster(group, maker, workers=1) as caster:
        caster.submit(len, maker.gate("a"))
        caster.submit(print, maker.gate("b"))
        caster.cancel(print)
        assert [outcome.rid for outcome in caster.step()] == [print]
        maker.open("a")
        assert [outcome.ok for outcome in free(caster)] == [True]


# ---- processes


def test_a_forked_child_is_no_rank(group: shmcast.Group, maker: Maker) -> None:
    with Caster(group, maker, workers=1) as caster:
        caster.submit("a", maker.gate("a"))
        assert maker.begun("a")
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                refused = 0
                for use in (
                    caster.step,
                    caster.collect,
                    lambda: caster.submit("b"),
                    lambda: caster.cast([("b", None)]),
                ):
                    try:
                        use()
                    except GroupError as error:
                        refused += "forked" in str(error)
                status = 0 if refused == 4 and caster.close() == [] else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        maker.open("a")
        assert outcomes_of(free(caster)) == {"a": "a"}


def ends_with_a_hung_worker(parent: Any) -> None:
    group = shmcast.Group(max_bytes="16MiB")
    caster = Caster(group, lambda raw: threading.Event().wait(), timeout=0.01)
    caster.submit("a", 1)
    outcomes = caster.step(LONG_S)
    caster.submit("b", 1, timeout=LONG_S)
    parent.send([outcome.error.kind for outcome in outcomes])
    if parent.receive():
        caster.close(cancel_pending=True)
    group.close()


@pytest.mark.parametrize("closed", [True, False])
def test_a_hung_worker_does_not_keep_the_process(child: Any, closed: bool) -> None:
    process: Child = child(ends_with_a_hung_worker)
    assert process.receive() == ["TimeoutError"]
    process.send(closed)
    process.wait()


def test_wrong_arguments(group: shmcast.Group) -> None:
    for options, error, text in (
        ({"executor": "fork"}, ValueError, "executor"),
        ({"on_full": "hope"}, ValueError, "on_full"),
        ({"workers": 0}, ValueError, "workers"),
        ({"max_pending": 0}, ValueError, "max_pending"),
        ({"max_inflight_bytes": "3 furlongs"}, ValueError, "max_inflight_bytes"),
        ({"timeout": float("nan")}, ValueError, "timeout"),
        ({"block_timeout": "1"}, ValueError, "block_timeout"),
    ):
        with pytest.raises(error, match=text):
            Caster(group, len, **options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="materialize"):
        Caster(group, 3)  # type: ignore[arg-type]
    with Caster(group, len) as caster, pytest.raises(ValueError, match="timeout: True"):
        caster.submit("a")
        caster.step(True)
    assert issubclass(BackpressureError, shmcast.ShmcastError)
