"""What a rank materializes itself because every rank does: in the background, at once, never, and too slowly."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from makers import LONG_S, Maker
from shmcast import MaterializeError, _native, metrics
from shmcast.replicas import Replicas
from shmcast.tally import Tally

BOTH = pytest.mark.parametrize("workers", [1, 0])


class Watched:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.heard: list[tuple[str, int]] = []

    def _hear(self, what: str, serial: int) -> None:
        with self._changed:
            self.heard.append((what, serial))
            self._changed.notify_all()

    def started(self, serial: int) -> None:
        self._hear("started", serial)

    def made(self, serial: int) -> None:
        self._hear("made", serial)

    def wait_for(self, what: str, serial: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: (what, serial) in self.heard, LONG_S)


class Made:
    """Replicas of a function, and who watches them."""

    def __init__(self, materialize: Any, workers: int) -> None:
        self.meter = _native.Meter(None)
        self.watch = Watched()
        self.replicas = Replicas(materialize, workers=workers, tally=Tally(self.meter), watch=self.watch)

    def counted(self, name: str) -> int:
        return int(metrics.snapshot(self.meter)["counters"][name])


@pytest.fixture
def make() -> Iterator[Any]:
    started: list[Replicas] = []

    def make(materialize: Any, workers: int = 1) -> Made:
        made = Made(materialize, workers)
        started.append(made.replicas)
        return made

    yield make
    for each in started:
        each.close()
        assert each._pool is None or not each._pool._waiting


# ---- values


@BOTH
def test_begin_and_take(make: Any, maker: Maker, workers: int) -> None:
    made = make(maker, workers)
    for serial in (5, 0, 3):
        made.replicas.begin(serial, 100 + serial)
        assert made.replicas.has(serial)
    for serial in (0, 3, 5):
        assert (made.replicas.take(serial, LONG_S)["x"] == 100 + serial).all()
        assert not made.replicas.has(serial)
        made.watch.wait_for("made", serial)
        with pytest.raises(RuntimeError, match=f"request {serial} .* has not begun on this rank"):
            made.replicas.take(serial, LONG_S)
    assert sorted(maker.made) == [100, 103, 105]


def test_without_threads_who_takes_materializes(make: Any, maker: Maker) -> None:
    made = make(maker, 0)
    made.replicas.begin(0, 7)
    assert made.watch.heard == [("made", 0)]  # as far as it goes
    assert maker.made == []
    assert made.replicas.take(0, 0.0)["x"].shape == (7,)  # it can not be too late: nobody else works at it


@pytest.mark.parametrize("workers", [1, 3])
def test_there_are_so_many_threads(make: Any, maker: Maker, workers: int) -> None:
    made = make(maker, workers)
    gates = [maker.gate(f"gate {number}") for number in range(workers + 1)]
    for serial, gate in enumerate(gates):
        made.replicas.begin(serial, gate)
    for gate in gates[:-1]:
        assert maker.begun(gate)
    assert ("started", workers) not in made.watch.heard
    maker.open(gates[0])
    assert maker.begun(gates[-1])
    maker.open_all()
    for serial, gate in enumerate(gates):
        assert made.replicas.take(serial, LONG_S)["name"] == gate


def in_place(raw: int, out: Any) -> Any:
    array = out((raw,), "float32")
    array[:] = raw
    return array


@BOTH
def test_places_are_private_and_stay_writable(make: Any, workers: int) -> None:
    made = make(in_place, workers)
    made.replicas.begin(0, 50_000)
    array = made.replicas.take(0, LONG_S)
    array += 1
    assert (array == 50_001).all()
    assert (made.replicas.now(50_000) == 50_000).all()


# ---- failures


class Raises:
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __call__(self, raw: Any) -> Any:
        raise self.error


@BOTH
def test_what_fails_is_raised_where_it_is_taken(make: Any, workers: int) -> None:
    made = make(Raises(ValueError("bad")), workers)
    made.replicas.begin(0, "a")
    made.watch.wait_for("made", 0)
    with pytest.raises(ValueError, match="bad"):
        made.replicas.take(0, LONG_S)
    assert not made.replicas.has(0)


def test_a_failure_keeps_no_frames_that_wait(make: Any) -> None:
    made = make(Raises(ValueError("bad")))
    made.replicas.begin(0, "a")
    made.watch.wait_for("made", 0)
    assert made.replicas._begun[0].error.__traceback__ is None


@pytest.mark.parametrize("error", [SystemExit("bye"), GeneratorExit("bye"), KeyboardInterrupt("bye")])
def test_what_ends_a_thread_ends_one_request(make: Any, error: BaseException) -> None:
    made = make(Raises(error))
    made.replicas.begin(0, "a")
    made.watch.wait_for("made", 0)
    with pytest.raises(MaterializeError) as caught:
        made.replicas.take(0, LONG_S)
    assert (caught.value.kind, caught.value.text) == (type(error).__name__, "bye")


@pytest.mark.parametrize(
    ("error", "raised"), [(SystemExit("bye"), MaterializeError), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_an_interrupt_is_for_who_waits(make: Any, error: BaseException, raised: type[BaseException]) -> None:
    made = make(Raises(error), 0)
    made.replicas.begin(0, "a")
    with pytest.raises(raised):
        made.replicas.take(0, LONG_S)
    assert not made.replicas.has(0)


def test_what_can_not_begin_says_so_when_it_is_taken(make: Any, maker: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    made = make(maker)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        made.replicas.begin(0, 5)
    made.replicas.fail(1, LookupError("no raw request"))
    assert made.replicas.has(0)
    assert made.replicas.has(1)
    assert made.watch.heard == [("made", 0), ("made", 1)]
    with pytest.raises(RuntimeError, match="no thread can be started"):
        made.replicas.take(0, LONG_S)
    with pytest.raises(LookupError, match="no raw request"):
        made.replicas.take(1, LONG_S)
    made.replicas.begin(2, 5)
    assert made.replicas.take(2, LONG_S)["x"].shape == (5,)


# ---- too slow


def test_take_waits_no_longer(make: Any, maker: Maker) -> None:
    made = make(maker)
    made.replicas.begin(0, maker.gate("hangs"))
    assert maker.begun("hangs")
    with pytest.raises(TimeoutError, match=r"waited for it for 0\.01 s"):
        made.replicas.take(0, 0.01)
    assert not made.replicas.has(0)
    assert made.counted("abandoned_workers") == 1
    made.replicas.begin(1, 5)  # another worker has its place
    assert made.replicas.take(1, LONG_S)["x"].shape == (5,)
    maker.open("hangs")
    assert maker.ended("hangs")
    maker.join_all()
    assert ("made", 0) not in made.watch.heard


def test_what_waits_for_a_worker_may_be_too_late_too(make: Any, maker: Maker) -> None:
    made = make(maker)
    made.replicas.begin(0, maker.gate("slow"))
    made.replicas.begin(1, 5)
    assert maker.begun("slow")
    with pytest.raises(TimeoutError):
        made.replicas.take(1, 0.01)
    assert made.counted("abandoned_workers") == 0
    maker.open("slow")
    assert made.replicas.take(0, LONG_S)["name"] == "slow"
    assert maker.made == ["slow"]


@pytest.mark.parametrize("state", ["queued", "running", "made"])
def test_drop(make: Any, maker: Maker, state: str) -> None:
    made = make(maker)
    if state == "queued":
        made.replicas.begin(0, maker.gate("before"))
        assert maker.begun("before")
    made.replicas.begin(1, maker.gate("dropped"))
    if state != "queued":
        assert maker.begun("dropped")
    if state == "made":
        maker.open("dropped")
        made.watch.wait_for("made", 1)
    made.replicas.drop(1)
    made.replicas.drop(1)
    made.replicas.drop(99)
    assert not made.replicas.has(1)
    maker.open_all()
    made.replicas.begin(2, 5)
    assert made.replicas.take(2, LONG_S)["x"].shape == (5,)
    assert maker.made.count("dropped") == (state != "queued")
    assert (("made", 1) in made.watch.heard) == (state == "made")
    assert made.counted("abandoned_workers") == 0


@pytest.mark.parametrize("who", ["take", "begin", "drop", "expire"])
def test_a_hanging_worker_is_replaced_after_the_grace(make: Any, maker: Maker, who: str) -> None:
    made = make(maker)
    made.replicas.begin(0, maker.gate("hangs"))
    assert maker.begun("hangs")
    made.replicas.drop(0, 1e6 if who == "drop" else 0.02)
    if who == "drop":
        assert made.counted("abandoned_workers") == 0
        made.replicas._late = dict.fromkeys(made.replicas._late, 0.0)
    made.replicas.begin(1, 5)  # behind the one that hangs
    if who == "drop":
        made.replicas.drop(99)
        made.replicas.begin(2, 1)
        made.replicas.drop(2)
    while who in ("begin", "expire") and ("made", 1) not in made.watch.heard:
        made.replicas.expire() if who == "expire" else made.replicas.begin(3, 1)
        os.sched_yield()
    # Whoever waits for what is behind it notices by itself.
    assert made.replicas.take(1, LONG_S)["x"].shape == (5,)
    assert made.counted("abandoned_workers") == 1
    assert not made.replicas._late


def test_who_comes_back_within_the_grace_keeps_its_place(make: Any, maker: Maker) -> None:
    made = make(maker)
    made.replicas.begin(0, maker.gate("slow"))
    assert maker.begun("slow")
    made.replicas.drop(0, 1e6)
    made.replicas.begin(1, 5)
    maker.open("slow")
    assert made.replicas.take(1, LONG_S)["x"].shape == (5,)
    made.replicas.expire()
    assert not made.replicas._late
    assert made.counted("abandoned_workers") == 0
    assert made.replicas._pool._started == 1


def test_close_waits_for_nobody(make: Any, maker: Maker) -> None:
    made = make(maker)
    made.replicas.begin(0, maker.gate("hangs"))
    made.replicas.begin(1, 5)
    assert maker.begun("hangs")
    made.replicas.close()
    made.replicas.close()
    assert not made.replicas.has(0)
    assert not made.replicas.has(1)
    maker.open("hangs")
    assert made.replicas._pool.join(LONG_S)
    maker.join_all()
    assert maker.made == ["hangs"]
    assert [what for what, _ in made.watch.heard] == ["started"]


def test_nobody_watches(maker: Maker) -> None:
    made = Replicas(maker, workers=1, tally=Tally(_native.Meter(None)))
    made.begin(0, 5)
    assert made.take(0, LONG_S)["x"].shape == (5,)
    made.fail(1, ValueError("bad"))
    made.close()


def test_many_threads_take_what_one_begins(make: Any) -> None:
    made = make(lambda raw: raw * 2, 3)
    found: dict[int, Any] = {}

    def take(serials: range) -> None:
        for serial in serials:
            while not made.replicas.has(serial):
                os.sched_yield()
            found[serial] = made.replicas.take(serial, LONG_S)

    threads = [threading.Thread(target=take, args=(range(first, 3000, 3),)) for first in range(3)]
    for thread in threads:
        thread.start()
    for serial in range(3000):
        made.replicas.begin(serial, serial)
    for thread in threads:
        thread.join(LONG_S)
    assert found == {serial: serial * 2 for serial in range(3000)}
