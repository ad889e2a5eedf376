"""The soak test itself: its parts, that a short run passes, that it notices what is wrong, and that it leaves nothing."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import shmcast
from soaking import actors, board, census, ledger, link, party
from soaking.actors import Spec, Terms

SOAK = Path(__file__).with_name("soak.py")
SMALL = ("--owners", "2", "--readers", "3", "--sweepers", "1", "--groups", "1")
SUMMARY = re.compile(
    r"soak: (\d+) s, seed (\d+), (\d+) kills \((\d+) held, (\d+) inside\), (\d+) publishes, (\d+) reads, (\d+) violations"
)


# ---- runs


@pytest.fixture
def soak() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start one; whatever becomes of it, it is over when the test is."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, str(SOAK), *map(str, arguments)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stdout.close()


def left_by(process: subprocess.Popen[str]) -> list[str]:
    """What a run has in /dev/shm; its namespace begins with its pid."""
    return [name for name in os.listdir("/dev/shm") if name.startswith(f"shmcast.soak{process.pid}x")]


def children_of(pid: int) -> list[int]:
    """Processes that it has started and that live."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(entry))
    return found


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Poll: nothing outside tells how far a run is."""
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


@pytest.mark.watchdog(300)
def test_a_short_run(soak: Callable[..., subprocess.Popen[str]], seed: int) -> None:
    run = soak("--seconds", 6, "--seed", seed, "--rate", 8, *SMALL)
    output = run.communicate()[0]
    assert run.returncode == 0, output
    last = SUMMARY.fullmatch(output.splitlines()[-1])
    assert last is not None, output
    _, found_seed, kills, held, inside, publishes, reads, violations = map(int, last.groups())
    assert (found_seed, violations) == (seed, 0)
    assert kills > 5 and held + inside > 0 and publishes > 20 and reads > 20, output
    assert left_by(run) == []


@pytest.mark.watchdog(300)
def test_what_is_wrong_is_noticed(soak: Callable[..., subprocess.Popen[str]], seed: int) -> None:
    """Somebody takes the names of live arenas away."""
    run = soak("--seconds", 100, "--seed", seed, "--rate", 2, *SMALL)
    wait_for(lambda: sum(name.endswith(".0") for name in left_by(run)) >= 2, run)
    for name in left_by(run):
        Path("/dev/shm", name).unlink(missing_ok=True)
    # It ends at the tenth violation; the first is enough here.
    assert any("VIOLATION" in line for line in run.stdout)
    run.send_signal(signal.SIGINT)
    output = run.communicate()[0]
    assert run.returncode == 1, output
    assert f"--seed {seed}" in output
    assert left_by(run) == []


@pytest.mark.watchdog(300)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing(soak: Callable[..., subprocess.Popen[str]], number: signal.Signals) -> None:
    run = soak("--seconds", 100, *SMALL)
    wait_for(lambda: left_by(run) and len(children_of(run.pid)) > 5, run)
    children = children_of(run.pid)
    run.send_signal(number)
    output = run.communicate()[0]
    assert run.returncode == 130, output
    assert SUMMARY.fullmatch(output.splitlines()[-1])
    assert left_by(run) == []
    assert [pid for pid in children if Path(f"/proc/{pid}").exists()] == []


@pytest.mark.parametrize(
    ("option", "what"), [("--owners", "at least one owner"), ("--seconds", "more than 0"), ("--rate", "more than 0")]
)
def test_wrong_arguments(soak: Callable[..., subprocess.Popen[str]], option: str, what: str) -> None:
    run = soak(option, "0")
    assert what in run.communicate()[0]
    assert run.returncode == 2


# ---- contents


def test_any_other_byte_is_found(rng: np.random.Generator) -> None:
    spec = Spec(int(rng.integers(1 << 63)), 1001)
    good = actors.pattern(spec)
    actors.check(good, spec, "here")
    for at in (0, 500, 1000):
        bad = good.copy()
        bad[at] ^= 1
        with pytest.raises(actors.WrongBytesError, match=f"1 of them differ, from {at} on"):
            actors.check(bad, spec, "here")
    with pytest.raises(actors.WrongBytesError, match="1000 bytes"):
        actors.check(good[:1000], spec, "here")
    with pytest.raises(actors.WrongBytesError):
        actors.check(actors.pattern(Spec(spec.seed + 1, 1001)), spec, "here")


def test_messages_of_groups_differ() -> None:
    tree = party.tree_of(5, 7, False)
    party.verify(tree, 5, 7, "here")
    for seed, step in ((5, 8), (6, 7)):
        with pytest.raises(actors.WrongBytesError):
            party.verify(tree, seed, step, "here")


# ---- what is owed to whom


ONCE = Terms(2, False, 1.0, True)


def handle_of(offset: int, nbytes: int, generation: int) -> bytes:
    """Bytes of a handle that nobody has published."""
    head = "soak", 1, 1, "numpy", "|u1", (nbytes,), nbytes, None
    return shmcast.Handle(*head, 0, generation, 1, offset, None).to_bytes()


@pytest.fixture
def arena() -> ledger.Arena:
    return ledger.Arena(1, 100)


def block(arena: ledger.Arena, terms: Terms = ONCE) -> ledger.Block:
    spec = Spec(9, 100)
    return ledger.block_of(arena, handle_of(0, 100, 1), spec, terms, 10.0, dict(arena.joined))


def due(one: ledger.Block, pid: int, now: float, later: float | None = None) -> list[str]:
    """Why an attach that is sent now, and answered later, has to succeed."""
    return one.stand(one.reasons(pid, now), one.voids, now if later is None else later)


def test_the_first_that_come(arena: ledger.Arena) -> None:
    one = block(arena)
    assert due(one, 1, 10.5) == ["one of the first"]
    assert due(one, 1, 10.5, 11.5) == due(one, 1, 11.5) == []
    one.deliver(1)
    assert due(one, 1, 10.5) == []
    assert due(one, 2, 10.5) == ["one of the first"]
    reasons = one.reasons(2, 10.5)
    one.deliver(2)
    assert due(one, 3, 10.5) == []
    assert one.stand(reasons, one.voids, 10.5) == ["one of the first"]
    one.deliver(3)
    assert one.stand(reasons, one.voids, 10.5) == []  # that one was faster


def test_who_leaves_and_comes_again_counts_twice(arena: ledger.Arena) -> None:
    one = block(arena)
    one.deliver(1)
    arena.leave(1)
    one.deliver(1)
    assert due(one, 2, 10.5) == []


def test_those_that_are_named(arena: ledger.Arena) -> None:
    arena.join(1, 111)
    arena.join(2, 222)
    one = block(arena, Terms((111,), False, None, True))
    assert due(one, 1, 1e9) == ["named"] and due(one, 2, 10.5) == []
    arena.leave(1)
    arena.join(1, 111)
    assert due(one, 1, 10.5) == []
    everybody = block(arena, Terms("all", False, 1.0, True))
    assert due(everybody, 1, 10.5) == due(everybody, 2, 10.5) == ["named"]


def test_who_dies_is_owed_nothing(arena: ledger.Arena) -> None:
    arena.join(1, 111)
    arena.join(2, 222)
    arena.add(block(arena, Terms((111, 222), False, None, True)))
    arena.add(block(arena, Terms((111,), False, 1.0, True)))
    alive = {222: 2}
    assert arena.owed(alive) == [arena.blocks[0]]
    arena.leave(1)
    assert arena.owed(alive) == [arena.blocks[0]]
    arena.blocks[0].deliver(2)
    assert arena.owed(alive) == []
    arena.blocks[0].sure.clear()  # it had left and come again meanwhile: it may have been promised that or not
    assert arena.owed(alive) == [arena.blocks[0]]
    assert arena.owed({}) == []


def test_who_holds_keeps_it_for_others(arena: ledger.Arena) -> None:
    one = block(arena)
    one.deliver(1)
    one.answered(1, 10.1, holds=True)
    assert due(one, 3, 99.0) == ["held by 1"]
    reasons = one.reasons(3, 99.0)
    one.let_go(1)
    assert one.stand(reasons, one.voids, 99.0) == []


def test_what_is_taken_back_is_not_owed(arena: ledger.Arena) -> None:
    one = block(arena, Terms(1, True, 1.0, True))
    reasons = one.reasons(1, 10.5)
    voids = one.voids
    assert one.stand(reasons, voids, 10.5) == ["kept", "one of the first"]
    one.keep = False
    assert one.stand(reasons, voids, 10.5) == ["one of the first"]
    one.void()
    assert one.stand(reasons, voids, 10.5) == [] == due(one, 1, 10.5)


def test_what_is_passed_on(arena: ledger.Arena) -> None:
    arena.join(1, 111)
    one = block(arena, Terms((111,), False, 1.0, True))
    one.deliver(1)
    one.passed_on(1, began=12.0, timeout=1.0)
    assert due(one, 1, 12.5) == []  # its attach is under way, and may use that up
    one.answered(1, 11.0, holds=False)
    one.passed_on(1, began=12.0, timeout=1.0)
    assert due(one, 1, 12.5) == ["named"] and due(one, 1, 13.5) == []
    one.trust = 14.0
    assert due(one, 2, 13.5) == ["trusted"]


def test_an_arena_that_ends_owes_nothing(arena: ledger.Arena) -> None:
    one = block(arena, Terms(0, True, None, True))
    assert one.lasting and one.expires == math.inf
    assert due(one, 1, 10.5) == ["kept"]
    arena.open = False
    assert due(one, 1, 10.5) == []


def test_reuse_of_what_is_held(arena: ledger.Arena) -> None:
    one = block(arena)
    arena.hold(5, one)
    assert list(arena.overlaps(handle_of(64, 100, 2), seed=8)) == [
        "bytes 64 to 164 of segment 1 were reused, 0 to 100 are held"
    ]
    assert list(arena.overlaps(handle_of(128, 100, 2), seed=8)) == []
    assert list(arena.overlaps(handle_of(0, 100, 2), seed=9)) == []  # the same bytes once more
    arena.let_go(5)
    assert list(arena.overlaps(handle_of(64, 100, 2), seed=8)) == []


def test_what_is_kept_is_not_forgotten(arena: ledger.Arena) -> None:
    kept = block(arena, Terms(0, True, None, True))
    arena.add(kept)
    for _ in range(3 * ledger.REMEMBERED):
        arena.add(block(arena))
    assert arena.kept() == [kept]


# ---- looks


def own_arena(parent: object, namespace: str) -> None:
    with shmcast.Arena.create("1MiB", namespace=namespace) as made:
        parent.send(made.id)
        parent.receive()


def test_whose_arena_it_is(child: Callable[..., object], namespace: str) -> None:
    alive, dead = child(own_arena, namespace), child(own_arena, namespace)
    ids = alive.receive(), dead.receive()
    assert census.orphans(namespace) == []
    assert set(census.segments(namespace)) == set(ids)
    dead.kill()
    assert census.orphans(namespace) == [ids[1]]
    assert census.members(namespace, ids[0]) == f"index 0 incarnation 1 alive True pid {alive.pid}"
    assert census.members(namespace, 1) == "gone"
    assert shmcast.sweep(namespace).arenas == 1
    assert census.orphans(namespace) == []
    assert census.mapped_bytes(alive.pid, namespace) >= 1 << 20
    assert census.descriptors(alive.pid) and census.own_bytes(alive.pid) > 1 << 20


@pytest.mark.parametrize(
    ("values", "wrong"),
    [
        ([5.0] * 40, False),
        (list(range(40)), True),
        ([0.0] * 10 + [30.0] * 30, False),
        ([5.0] * 30 + [9.0] * 10, True),
        ([1.0, 100.0], False),
    ],
)
def test_growth(values: list[float], wrong: bool) -> None:
    growth = census.Growth("this", 0.1, 1.0)
    for value in values:
        growth.see(value)
    assert bool(growth.problems()) == wrong


def test_the_board() -> None:
    words = memoryview(bytearray(board.PAGE_BYTES)).cast("I")
    one = board.Board(words)
    one.holds(3)
    one.enter()
    assert (one.held, one.inside, one.last, one.trace) == (3, True, "none", set())
    words[board.LAST], words[board.COUNT] = 101, 2
    words[board.TRACE : board.TRACE + 2] = memoryview(np.array([101, 102], np.uint32))
    assert (one.last, one.trace) == ("CONTROL_CLOCK", {101, 102})
    one.arm(308, 2, signal.SIGKILL)
    assert list(words[:3]) == [308, 2, signal.SIGKILL]
    one.disarm()
    assert words[0] == 0
    boards = board.Boards(1)
    index, _ = boards.take()
    boards.give_back(index)
    assert boards.take()[0] == index


def test_the_link() -> None:
    one, other = link.Link.pair()
    one.send({"some": 1})
    assert other.poll() and other.receive() == {"some": 1}
    with pytest.raises(TimeoutError):
        other.receive(timeout=0.0)
    one.close()
    with pytest.raises(link.ClosedError):
        other.receive()
    with pytest.raises(link.ClosedError):
        other.send(1)
    other.close()
