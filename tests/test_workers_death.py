"""Workers that die, hang, write where they should not or say what no worker says: the one request fails, clearly, and
everything else goes on. And ranks that die: their workers go with them."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable

import numpy as np
import pytest

import jobs
import shmcast
from child import Child, Link
from jobs import LONG_S, all_there, counters, job, pids_of, right, staff_of
from makers import free
from ranks import in_use
from shmcast import Caster, MaterializeError


def loss(outcome: shmcast.Outcome) -> str:
    """What is said of a worker that was lost."""
    assert isinstance(outcome.error, MaterializeError), outcome
    assert outcome.error.kind == "WorkerLostError", outcome
    return outcome.error.text


DEATHS = {
    "segfault": r"was ended by signal 11 \(SIGSEGV\): stderr",
    "kill": r"was ended by signal 9 \(SIGKILL\): .*dmesg",
    "exit": r"ended by itself, with exit status 7",
    "shut": r"was ended by signal 9 \(SIGKILL\)",
}


@pytest.mark.parametrize("action", DEATHS)
def test_a_death_costs_one_request(group: shmcast.Group, action: str) -> None:
    with Caster(group, job, executor="process", workers=2) as caster:
        pids = pids_of(caster)
        for number in range(20):
            caster.submit(number, (action if number in (3, 4, 12) else "", number))
        outcomes = {outcome.rid: outcome for outcome in free(caster)}
        for number in (3, 4, 12):
            text = loss(outcomes.pop(number))
            assert re.match(rf"worker process \d+ {DEATHS[action]}", text), text
        assert len(outcomes) == 17
        assert all(right(outcome, number) for number, outcome in outcomes.items())
        assert counters(group)["workers_lost"] == 3
        assert all_there(caster, 2)
        assert counters(group)["workers_started"] == 5
        # some of the three that were lost were there from the start
        assert len(set(pids) & set(pids_of(caster))) < 2
        del outcomes
        assert in_use(group.arena) == 0


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "answered with b'xyz'"), (1, "draft"), (2, "asked for a block in 2 bytes"), (3, "could not be read")],
)
def test_what_no_worker_says(group: shmcast.Group, number: int, text: str) -> None:
    with Caster(group, job, executor="process", workers=1) as caster:
        bad, good = caster.cast([("bad", ("babble", number)), ("good", ("", 1))])
        assert text in loss(bad)
        assert "was ended: " in loss(bad)
        assert right(good, 1)


def test_writes_past_the_end(group: shmcast.Group) -> None:
    with Caster(group, job, executor="process", workers=1) as caster:
        neighbours = [caster.cast([(number, ("", number))])[0] for number in range(3)]
        first = caster.cast([("within the last page", ("fill", 0))])[0]
        neighbours += [caster.cast([(number, ("", number))])[0] for number in range(3, 6)]
        assert set(first.value["x"].tolist()) == {1}
        for where in (-1, 1):
            (outcome,) = caster.cast([("outside", ("fill", where))])
            assert "SIGSEGV" in loss(outcome)
        assert all(right(outcome, outcome.rid) for outcome in neighbours)


@pytest.mark.watchdog(240)
def test_kills_at_random(group: shmcast.Group, rng: np.random.Generator) -> None:
    kills = failed = good = 0
    with Caster(group, job, executor="process", workers=2) as caster:
        for number in range(400):
            caster.submit(number, ("", number))
            if number % 10 == 9:
                for _ in range(int(rng.integers(20_000))):
                    pass
                staff = staff_of(caster)
                with staff._lock:  # alive until that is over, so the numbers are theirs
                    chosen = [*staff._hired.values(), *staff._idle]
                    if chosen:
                        chosen[int(rng.integers(len(chosen)))].kill()
                        kills += 1
            while len(caster.pending) > 8:
                for outcome in caster.step(LONG_S):
                    if outcome.ok:
                        assert right(outcome, outcome.rid)
                        good += 1
                    else:
                        assert "SIGKILL" in loss(outcome)
                        failed += 1
        for outcome in free(caster):
            assert right(outcome, outcome.rid) if outcome.ok else loss(outcome)
            good += outcome.ok
            failed += not outcome.ok
        assert good + failed == 400
        assert 0 <= failed <= kills
        assert good >= 400 - kills
        del outcome
        assert in_use(group.arena) == 0


def test_an_idle_worker_that_dies_costs_nothing(group: shmcast.Group) -> None:
    with Caster(group, job, executor="process", workers=2) as caster:
        for number in range(3):
            fds = []
            for process in staff_of(caster)._idle:
                fds.append(os.pidfd_open(process.pid))
                process.kill()
            assert all(map(jobs.ended, fds))
            for fd in fds:
                os.close(fd)
            assert all(right(outcome, outcome.rid) for outcome in caster.cast([(n, ("", n)) for n in range(4)])), number
        assert counters(group)["outcomes_failed"] == 0


# ---- the rank


def serve(parent: Link, action: str, how: str) -> None:
    """A rank with two workers that are in the middle of something."""
    group = shmcast.Group(max_bytes="64MiB")
    caster = Caster(group, job, executor="process", workers=2)
    if action:
        for number in range(2):
            caster.submit(number, action)
        while len(staff_of(caster)._hired) < 2:
            caster.step(0.001)
    if how == "forked" and not os.fork():
        signal.pause()  # has all that the rank has, and goes on
    parent.send(pids_of(caster))
    parent.receive()
    if how == "interrupted":
        interrupt_all()
        (outcome,) = caster.cast([("after", ("", 3))])
        assert right(outcome, 3)
        del outcome
        parent.send(pids_of(caster))
        caster.close()


def interrupt_all() -> None:
    """As from a terminal."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.killpg(0, signal.SIGINT)


def started(child: Callable[..., Child], action: str, how: str) -> tuple[Child, list[int], list[int]]:
    rank = child(serve, action, how)
    pids = rank.receive()
    assert len(pids) == 2
    return rank, pids, [os.pidfd_open(pid) for pid in pids]


def all_ended(fds: list[int]) -> bool:
    try:
        return all(map(jobs.ended, fds))
    finally:
        for fd in fds:
            os.close(fd)


@pytest.mark.parametrize("how", ["", "forked"])
@pytest.mark.parametrize("action", ["", "hang midway", "hang in C"])
def test_workers_end_with_the_rank(child: Callable[..., Child], namespace: str, action: str, how: str) -> None:
    rank, _, fds = started(child, action, how)
    rank.kill()
    assert all_ended(fds)
    shmcast.sweep(namespace)


@pytest.mark.parametrize("action", ["", "hang in C"])
def test_a_rank_that_ends_without_close(child: Callable[..., Child], namespace: str, action: str) -> None:
    rank, _, fds = started(child, action, "forgotten")
    rank.send()
    rank.wait()
    assert all_ended(fds)
    shmcast.sweep(namespace)


def test_what_the_terminal_interrupts(child: Callable[..., Child], namespace: str) -> None:
    rank, pids, fds = started(child, "", "interrupted")
    rank.send()
    assert rank.receive() == pids
    rank.wait()
    assert all_ended(fds)
    shmcast.sweep(namespace)
