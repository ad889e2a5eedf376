"""Casters with worker processes: the same values as in threads, in place, from workers that are there before the first
request; what can not be sent to them is said at once."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import jobs
import shmcast
from jobs import LONG_S, counters, job, pids_of, right, same, staff_of, tree_of, tree_of_out
from makers import free
from ranks import Patched, Rank, Ranks, in_use, settle
from shmcast import Caster, MaterializeError, process, staff
from shmcast.attach import lease_of

TREES = ["tree", "list", "bytes", "none", *(["tensors"] if importlib.util.find_spec("torch") else [])]


def cast(caster: Caster, *raws: Any) -> list[shmcast.Outcome]:
    return caster.cast(list(enumerate(raws)))


def results(outcomes: list[shmcast.Outcome]) -> list[Any]:
    return [outcome.result() for outcome in outcomes]


def told(outcome: shmcast.Outcome) -> tuple[str, str]:
    assert isinstance(outcome.error, MaterializeError), outcome
    return outcome.error.kind, outcome.error.text


# ---- values


@pytest.mark.parametrize("function", [tree_of, tree_of_out])
def test_values_are_those_of_threads(group: shmcast.Group, function: Any) -> None:
    with Caster(group, function, workers=1) as caster:
        expected = results(cast(caster, *TREES))
    with Caster(group, function, executor="process", workers=2) as caster:
        found = results(cast(caster, *TREES))
    for name, ours, theirs in zip(TREES, found, expected, strict=True):
        assert same(ours, theirs), name
    tree = found[0]
    assert tree["pair"].left is tree["large"]
    assert not tree["large"].flags.writeable
    assert (lease_of(tree["large"]), lease_of(tree["private"])) != (None, None)


@pytest.mark.parametrize("function", [tree_of, tree_of_out])
def test_arrays_do_not_go_through_the_connection(
    group: shmcast.Group, function: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    received = []
    receive = staff.Process.receive

    def counting(self: Any, *args: Any) -> bytes:
        message = receive(self, *args)
        received.append(len(message))
        return message

    monkeypatch.setattr(staff.Process, "receive", counting)
    with Caster(group, function, executor="process", workers=1) as caster:
        before = counters(group)["published_bytes"]
        (tree,) = results(cast(caster, "tree"))
        assert counters(group)["published_bytes"] - before > 400_000
        assert sum(received) < 6000
        assert counters(group)["inline_full"] == 0
        for name in ("large", "part", "turned", "other dtype", "private", "order", "fields"):
            assert lease_of(tree[name]) is not None, name
    del tree
    assert in_use(group.arena) == 0


def test_what_was_made_in_place_is_not_copied(group: shmcast.Group) -> None:
    with Caster(group, job, executor="process", workers=1) as caster:
        before = counters(group)["published"]
        (value,) = results(cast(caster, 3))
        lease = lease_of(value["x"]).lease
        lease.verify()
        assert lease.handle.nbytes == 50_000
        assert counters(group)["published"] == before + 1


@pytest.mark.parametrize("hashed", [True, False, "sha256"])
def test_hash_is_the_casters_choice(group: shmcast.Group, hashed: Any) -> None:
    with Caster(group, job, executor="process", workers=1, hash=hashed) as caster:
        (value,) = results(cast(caster, 3))
        handle = lease_of(value["x"]).handle
        assert (handle.hash is None) == (hashed is False)
        assert handle.hash_name == (hashed if hashed == "sha256" else "xxh3")


def test_failures_are_text(group: shmcast.Group) -> None:
    with Caster(group, tree_of, executor="process", workers=1) as caster:
        pids = pids_of(caster)
        outcomes = cast(caster, "bad", "exit", "interrupt", "lambda", "bytes", "unknown", lambda: 0)
        assert told(outcomes[0]) == ("LookupError", "bad")
        assert "in tree_of" in outcomes[0].error.traceback  # type: ignore[union-attr]
        assert told(outcomes[1]) == ("SystemExit", "3")
        assert told(outcomes[2])[0] == "KeyboardInterrupt"
        assert "lambda" in told(outcomes[3])[1]
        assert outcomes[4].result() == b"x" * 100_000
        assert told(outcomes[5])[0] == "KeyError"
        assert told(outcomes[6])[0] == "TypeError"
        assert "can not be sent to a worker process" in told(outcomes[6])[1]
        assert pids_of(caster) == pids
        assert counters(group)["workers_lost"] == 0
    assert in_use(group.arena) == 0


def test_a_full_arena() -> None:
    with (
        shmcast.Group(max_bytes="128KiB") as group,
        Caster(group, tree_of_out, executor="process", workers=1) as caster,
    ):
        (tree,) = results(cast(caster, "tree"))
        assert same(tree, tree_of("tree"))
        assert counters(group)["out_full"] >= 1
        assert counters(group)["inline_full"] >= 1


def test_out_from_several_threads(group: shmcast.Group) -> None:
    with Caster(group, job, executor="process", workers=1) as caster:
        (value,) = results(cast(caster, ("threads", 0)))
        assert [(array.size, set(array.tolist())) for array in value["x"]] == [
            (20_000 + each, {each}) for each in range(8)
        ]


def test_what_a_worker_keeps_is_out_of_reach(group: shmcast.Group) -> None:
    with Caster(group, job, executor="process", workers=1) as caster:
        (first,) = results(cast(caster, ("keep", 1)))
        (refused,) = results(cast(caster, ("write kept", 2)))
        assert refused["x"]
        assert set(first["x"].tolist()) == {77}
        second, third = cast(caster, ("keep", 3), ("return kept", 4))
        assert told(third)[0] == "ValueError"
        assert "not reserved for this tree" in told(third)[1]
        del second
        _, later = cast(caster, ("write later", 5), 6)
        assert right(later, 0)
        for number in range(20):  # in blocks that the thread has had
            (outcome,) = caster.cast([(number, ("", number))])
            assert right(outcome, number)


def test_a_fork_of_the_function_has_no_block(group: shmcast.Group) -> None:
    with Caster(group, job, executor="process", workers=1) as caster:
        forked, pooled = results(cast(caster, ("fork", 0), ("daemon", 1)))
        assert set(forked["x"].tolist()) == {9}
        assert os.WTERMSIG(forked["status"]) == 11
        assert pooled["x"] == 4


# ---- the pool


def test_workers_are_there_before_the_first_request(group: shmcast.Group) -> None:
    with Caster(group, job, executor="process", workers=2) as caster:
        assert len(staff_of(caster)._idle) == 2
        pids = pids_of(caster)
        assert counters(group)["workers_started"] == 2
        for number, outcome in enumerate(caster.cast([(number, ("", number)) for number in range(30)])):
            assert right(outcome, number)
        assert pids_of(caster) == pids
        fds = [os.pidfd_open(pid) for pid in pids]
        caster.close()
        caster.close()
        assert all(map(jobs.ended, fds))
        for fd, pid in zip(fds, pids, strict=True):
            os.close(fd)
            with pytest.raises(ProcessLookupError):  # reaped
                os.kill(pid, 0)
        assert counters(group)["workers_lost"] == 0


def test_what_can_not_be_sent_is_refused(group: shmcast.Group) -> None:
    def local(raw: Any) -> Any:
        return raw

    for function in (local, lambda raw: raw, partial(job, open(os.devnull))):
        with pytest.raises(TypeError, match=r"can not be sent to worker processes.*function of a module"):
            Caster(group, function, executor="process", workers=1)
    assert counters(group)["workers_started"] == 0


def test_what_workers_can_not_take_in_is_said_at_once(group: shmcast.Group, tmp_path: Path) -> None:
    path = tmp_path / "there"
    path.touch()
    with pytest.raises(RuntimeError, match=r"start 2 worker processes: .*could not start: FileExistsError: "):
        Caster(group, jobs.Fragile(str(path)), executor="process", workers=2)


def test_a_successor_that_does_not_come_up(group: shmcast.Group, tmp_path: Path) -> None:
    path = tmp_path / "there"
    with Caster(group, jobs.Fragile(str(path)), executor="process", workers=1) as caster:
        path.touch()
        killed, after = cast(caster, ("kill", 0), 1)
        assert told(killed)[0] == "WorkerLostError"
        assert told(after)[0] == "WorkerLostError"
        assert "FileExistsError" in told(after)[1]
        path.unlink()
        (outcome,) = caster.cast([(1, ("", 1))])
        assert right(outcome, 1)


def test_a_successor_that_is_slow(group: shmcast.Group, tmp_path: Path) -> None:
    path = tmp_path / "there"
    with Caster(group, jobs.Fragile(str(path)), executor="process", workers=1) as caster:
        os.mkfifo(path)
        caster.submit(0, ("kill", 0))
        for number in (1, 2):
            caster.submit(number, ("", number), timeout=LONG_S)
        assert [outcome.rid for outcome in caster.step(LONG_S)] == [0]
        waits = staff_of(caster)
        with waits._lock:
            assert waits._changed.wait_for(lambda: not waits._hired, LONG_S)
        # What waits for a worker does not use its time up.
        assert not any(request.deadline for request in caster._intake._running.values())
        with open(path, "w"):  # waits for the one that waits for it
            path.unlink()
        outcomes = free(caster)
        assert [outcome.rid for outcome in outcomes] == [1, 2]
        assert all(right(outcome, outcome.rid) for outcome in outcomes)
        assert counters(group)["workers_started"] == 2


def test_timeout(group: shmcast.Group) -> None:
    with Caster(group, job, executor="process", workers=1) as caster:
        caster.submit("hangs", "hang midway", timeout=0.01)
        caster.submit("hangs in C", "hang in C", timeout=0.01)
        caster.submit("stopped", "stop", timeout=0.01)
        caster.submit("at once", "hang", timeout=0.0)
        caster.submit("next", ("", 5), timeout=LONG_S)
        outcomes = {outcome.rid: outcome for outcome in free(caster)}
        assert right(outcomes.pop("next"), 5)
        assert {told(outcome)[0] for outcome in outcomes.values()} == {"TimeoutError"}
        assert len(outcomes) == 4
    assert in_use(group.arena) == 0


def test_a_cancelled_one_loses_its_worker(group: shmcast.Group, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shmcast.intake._CANCEL_GRACE_S", 0.0)
    with Caster(group, job, executor="process", workers=1) as caster:
        caster.submit("hangs", "hang midway")
        intake = caster._intake
        while not intake._running:
            caster.step(0.001)
        caster.cancel("hangs")
        caster.submit("next", ("", 5))
        outcomes = {outcome.rid: outcome for outcome in free(caster)}
        assert outcomes.pop("hangs").cancelled
        assert right(outcomes.pop("next"), 5)
    assert in_use(group.arena) == 0


def test_close_does_not_wait_for_what_hangs(group: shmcast.Group) -> None:
    caster = Caster(group, job, executor="process", workers=2)
    for number in range(3):
        caster.submit(number, "hang midway")
    hired = staff_of(caster)._hired
    while len(hired) < 2:
        caster.step(0.001)
    fds = [os.pidfd_open(pid) for pid in pids_of(caster)]
    outcomes = caster.close(wait=False)
    assert [told(outcome)[0] for outcome in outcomes] == ["GroupError"] * 3
    assert all(map(jobs.ended, fds))
    for fd in fds:
        os.close(fd)
    assert caster._intake._pool.join(LONG_S)
    assert in_use(group.arena) == 0


# ---- scripts

SCRIPT = """
import numpy, shmcast

class Raw:
    def __init__(self, number):
        self.number = number

def materialize(raw, out):
    array = out((raw.number,), "uint8")
    array[:] = raw.number % 251
    return array

{guard}
    with shmcast.Group(max_bytes="16MiB") as group, shmcast.Caster(group, materialize, executor="process", workers=1) as caster:
        (outcome,) = caster.cast([("r", Raw(100000))])
        print(outcome.result().sum(), shmcast.metrics.snapshot(group)["counters"]["published_bytes"])
"""


def run(path: Path, guard: str) -> subprocess.CompletedProcess[str]:
    path.write_text(SCRIPT.format(guard=guard))
    return subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=LONG_S, cwd=path.parent)


def test_a_function_of_the_script_itself(tmp_path: Path) -> None:
    done = run(tmp_path / "script.py", 'if __name__ == "__main__":')
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(100000 % 251 * 100000), "100064"]


def test_a_script_without_a_guard(tmp_path: Path) -> None:
    done = run(tmp_path / "script.py", "if True:")
    assert done.returncode == 1
    assert "if __name__ == '__main__':" in done.stderr


# ---- ranks


def cast_on_ranks(here: Rank, refuse: bool) -> Any:
    def no_memory(key: Any) -> Any:
        raise shmcast.ArenaGoneError(2, "there is no such arena (says the test)")

    with Patched(process, "join", no_memory) if refuse and here.rank == here.size - 1 else Patched():
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            group = shmcast.Group(here.group, max_bytes="64MiB", fallback="object")
    with group:
        assert (group.mode == "object") == refuse
        with Caster(group, tree_of_out, executor="process", workers=2) as caster:
            names = [each for each in TREES if not refuse or each != "tensors"]  # torch can not pickle all of them
            outcomes = caster.cast([(each, each if here.rank == 0 else None) for each in [*names, "bad"]])
            answers = [
                told(outcome) if outcome.error else same(outcome.value, tree_of(outcome.rid)) for outcome in outcomes
            ]
        del outcomes
        settle(here, group)
    return answers


@pytest.mark.torch
def test_ranks() -> None:
    with Ranks(2) as ranks:
        for refuse, trees in ((False, len(TREES)), (True, len(TREES) - 1)):
            assert ranks.run(cast_on_ranks, refuse) == [[*[True] * trees, ("LookupError", "bad")]] * 2
