"""Worker threads: every job runs once, a worker that hangs is replaced and stops nobody."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from child import Child
from shmcast.pool import Pool

LONG_S = 60.0


class Job:
    """Says when it has begun, and ends when it may."""

    def __init__(self) -> None:
        self.begun, self.may_end, self.ended = threading.Event(), threading.Event(), threading.Event()
        self.thread = ""

    def run(self) -> None:
        self.thread = threading.current_thread().name
        self.begun.set()
        assert self.may_end.wait(LONG_S)
        self.ended.set()


@pytest.fixture
def pools() -> Iterator[Any]:
    made: list[Pool[Job]] = []
    jobs: list[Job] = []

    def make(workers: int, **options: Any) -> tuple[Pool[Job], list[Job]]:
        made.append(Pool(Job.run, workers, **options))
        return made[-1], jobs

    yield make
    for job in jobs:
        job.may_end.set()
    for pool in made:
        pool.close()
        assert pool.join(LONG_S)


def some(pool: Pool[Job], jobs: list[Job], count: int, **options: Any) -> list[Job]:
    new = [Job() for _ in range(count)]
    jobs += new
    for job in new:
        pool.put(job, **options)
    return new


def test_jobs_run_at_once_and_in_order(pools: Any) -> None:
    pool, jobs = pools(2)
    first, second, third = some(pool, jobs, 3)
    assert first.begun.wait(LONG_S)
    assert second.begun.wait(LONG_S)
    assert not third.begun.is_set()
    second.may_end.set()
    assert third.begun.wait(LONG_S)
    assert third.thread == second.thread != first.thread


def test_many_jobs_all_run_once() -> None:
    ran: list[int] = []
    done = threading.Event()

    def run(number: int) -> None:
        ran.append(number)
        if len(ran) == 2000:
            done.set()

    pool = Pool(run, 4)
    for number in range(2000):
        pool.put(number)
    assert done.wait(LONG_S)
    pool.close()
    assert pool.join(LONG_S)
    assert sorted(ran) == list(range(2000))


def test_as_many_threads_as_there_are_jobs_at_most(pools: Any) -> None:
    pool, jobs = pools(8)
    (one,) = some(pool, jobs, 1)
    one.may_end.set()
    assert one.ended.wait(LONG_S)
    for job in some(pool, jobs, 3):
        assert job.begun.wait(LONG_S)
    assert len(pool._workers) <= 4


def test_urgent_jobs_come_first(pools: Any) -> None:
    pool, jobs = pools(1)
    (running,) = some(pool, jobs, 1)
    assert running.begun.wait(LONG_S)
    (later,) = some(pool, jobs, 1)
    (urgent,) = some(pool, jobs, 1, urgent=True)
    running.may_end.set()
    assert urgent.begun.wait(LONG_S)
    assert not later.begun.is_set()
    urgent.may_end.set()
    assert later.begun.wait(LONG_S)


def test_a_job_that_waits_can_be_made_urgent(pools: Any) -> None:
    pool, jobs = pools(1, may_start=lambda job: job is jobs[0])
    (first,) = some(pool, jobs, 1)
    assert first.begun.wait(LONG_S)
    second, third = some(pool, jobs, 2)
    pool.hasten(third)
    pool.hasten(first)  # it runs already
    pool.hasten(Job())  # it was never here
    first.may_end.set()
    assert third.begun.wait(LONG_S)
    third.may_end.set()
    assert third.ended.wait(LONG_S)
    assert not second.begun.is_set()


def test_what_may_not_start_waits_and_urgent_jobs_pass_it(pools: Any) -> None:
    open_ = threading.Event()
    asked = threading.Event()

    def may_start(job: Job) -> bool:
        asked.set()
        return open_.is_set()

    pool, jobs = pools(1, may_start=may_start)
    (gated,) = some(pool, jobs, 1)
    assert asked.wait(LONG_S)
    (urgent,) = some(pool, jobs, 1, urgent=True)
    urgent.may_end.set()
    assert urgent.ended.wait(LONG_S)
    assert not gated.begun.is_set()
    open_.set()
    pool.nudge()
    assert gated.begun.wait(LONG_S)


def test_a_worker_that_hangs_is_replaced(pools: Any) -> None:
    pool, jobs = pools(1)
    hung, waiting = some(pool, jobs, 2)
    assert hung.begun.wait(LONG_S)
    assert pool.abandon(hung)
    assert waiting.begun.wait(LONG_S)
    assert waiting.thread != hung.thread
    assert not pool.abandon(hung)
    waiting.may_end.set()
    # The one that was given up ends with its job, and takes no other.
    hung.may_end.set()
    assert hung.ended.wait(LONG_S)
    (third,) = some(pool, jobs, 1)
    assert third.begun.wait(LONG_S)
    assert third.thread != hung.thread


def test_a_worker_is_replaced_when_there_is_work_again(pools: Any) -> None:
    pool, jobs = pools(1)
    (hung,) = some(pool, jobs, 1)
    assert hung.begun.wait(LONG_S)
    assert pool.abandon(hung)
    (next_,) = some(pool, jobs, 1)
    assert next_.begun.wait(LONG_S)


def test_abandon_what_does_not_run(pools: Any) -> None:
    pool, jobs = pools(1)
    running, waiting = some(pool, jobs, 2)
    assert running.begun.wait(LONG_S)
    assert not pool.abandon(waiting)
    running.may_end.set()
    assert waiting.begun.wait(LONG_S)
    assert not pool.abandon(running)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("error", [ValueError("x"), SystemExit(3), KeyboardInterrupt()])
def test_what_a_job_raises_costs_no_worker(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", told.append)
    done = threading.Event()

    def run(job: Any) -> None:
        if job is None:
            done.set()
        else:
            raise job

    pool: Pool[Any] = Pool(run, 1)
    pool.put(error)
    pool.put(None)
    assert done.wait(LONG_S)
    pool.close()
    assert pool.join(LONG_S)
    assert [each.exc_value for each in told] == [error]


def test_close_starts_nothing_and_waits_for_nobody(pools: Any) -> None:
    pool, jobs = pools(1)
    running, waiting = some(pool, jobs, 2)
    assert running.begun.wait(LONG_S)
    pool.close()
    pool.close()
    assert not pool.join(0.0)
    with pytest.raises(ValueError, match="closed"):
        pool.put(waiting)
    running.may_end.set()
    assert pool.join(LONG_S)
    assert not waiting.begun.is_set()


def test_close_lets_free_workers_go(pools: Any) -> None:
    pool, jobs = pools(2)
    for job in some(pool, jobs, 2):
        job.may_end.set()
        assert job.ended.wait(LONG_S)
    pool.close()
    assert pool.join(LONG_S)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="workers=0"):
        Pool(print, 0)


def test_no_thread_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    pool: Pool[int] = Pool(print, 1)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(RuntimeError, match="no thread can be started"):
            pool.put(1)
    assert not pool._waiting
    pool.close()
    assert pool.join(LONG_S)


def hangs(parent: Any) -> None:
    pool: Pool[int] = Pool(lambda job: threading.Event().wait(), 2)
    pool.put(1)
    pool.put(2)
    pool.abandon(1)
    parent.send("exits")


def test_a_worker_that_hangs_does_not_keep_the_process(child: Any) -> None:
    process: Child = child(hangs)
    assert process.receive() == "exits"
    process.wait()
