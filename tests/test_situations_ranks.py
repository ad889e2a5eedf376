"""A group of which one rank is stopped, or meets a limit: one outcome for all, and the group goes on."""

import ctypes
import errno
import os
import signal

import numpy as np
import pytest

import shmcast
from ranks import Patched, Rank, Ranks, in_use, settle, together
from shmcast import GroupError, GroupTimeoutError, roster
from situations import MIB, libc, small_shm, stop
from test_situations_limits import address_space, descriptors
from trees import noise, same

pytestmark = pytest.mark.torch
NEW_MOUNTS, OWN_FILES = 0x20000, 0x200
LOOKS = 3


@pytest.fixture(scope="module")
def ranks():
    with Ranks(3) as started:
        yield started


def tells_when_it_has_looked(here: Rank) -> Patched:
    """Whoever waits looks after the others again and again; says so to the test after the third time."""
    dead = roster.Roster.dead
    looks = []

    def look(self: roster.Roster) -> list[int]:
        found = dead(self)
        looks.append(found)
        if len(looks) == LOOKS:
            here.parent.send("has looked")
        return found

    return Patched(roster.Roster, "dead", look)


# ---- paused ranks


def waits_for_the_paused(here: Rank, paused: int, channel: str) -> bool:
    with shmcast.Group(here.group, max_bytes="16MiB", channel=channel) as group:
        group.broadcast()
        here.parent.send("ready")
        here.parent.receive()
        with tells_when_it_has_looked(here) if here.rank != paused else Patched():
            for number in range(5):
                assert same(group.broadcast(noise(100_000, number) if here.rank == 0 else None), noise(100_000, number))
        settle(here, group)
    return True


@pytest.mark.parametrize(("paused", "channel"), [(1, "auto"), (0, "auto")])
def test_a_paused_rank_is_waited_for(ranks: Ranks, paused: int, channel: str) -> None:
    """As long as the group's time-out allows, and nobody takes it for dead, however often they look."""
    running = ranks.start(waits_for_the_paused, paused, channel, ranks=(0, 1, 2))
    for child in running:
        assert child.receive() == "ready"
    stop(running[paused].pid)
    for child in running:
        child.send("go on")
    for rank, child in enumerate(running):
        if rank != paused:
            assert child.receive() == "has looked"
    running[paused].signal(signal.SIGCONT)
    assert ranks.results(running) == [True] * 3


def gives_the_paused_up(here: Rank, paused: int) -> tuple[str, str]:
    group = shmcast.Group(here.group, max_bytes="16MiB")
    kept = group.broadcast(noise(100_000, 1) if here.rank == 0 else None)
    here.parent.send("ready")
    here.parent.receive()
    group._timeout = 0.5
    with pytest.raises(GroupError) as caught:
        for _ in range(100):
            group.broadcast(noise(100_000, 2) if here.rank == 0 else None)
    here.parent.send("gave up")
    here.parent.receive()
    assert np.array_equal(kept, noise(100_000, 1))
    said = type(caught.value).__name__, str(caught.value)
    del kept, caught
    group.close()
    together(here)
    with shmcast.Group(here.group, max_bytes="16MiB") as fresh:  # the processes are as good as ever
        assert same(fresh.broadcast(noise(100_000, 3) if here.rank == 0 else None), noise(100_000, 3))
        settle(here, fresh)
    return said


@pytest.mark.parametrize("paused", [1, 0])
def test_a_rank_that_is_paused_for_too_long_is_late_and_not_dead(ranks: Ranks, paused: int) -> None:
    running = ranks.start(gives_the_paused_up, paused, ranks=(0, 1, 2))
    for child in running:
        assert child.receive() == "ready"
    stop(running[paused].pid)
    for child in running:
        child.send("go on")
    for rank, child in enumerate(running):
        if rank != paused:
            assert child.receive() == "gave up"
    assert shmcast.sweep().arenas == 0
    running[paused].signal(signal.SIGCONT)
    assert running[paused].receive() == "gave up"
    for child in running:
        child.send("make another")
    said = ranks.results(running)
    assert not [text for kind, text in said if "died" in text and "died or closed" not in text]
    others = [kind for rank, (kind, _) in enumerate(said) if rank != paused]
    assert GroupTimeoutError.__name__ in others
    assert all(f"rank {paused} is at step 1" in text for kind, text in said if kind == GroupTimeoutError.__name__)


# ---- ranks that meet a limit


def one_meets_a_limit(here: Rank, limit: str, limited: int) -> list[str]:
    """Three messages: before, under the limit of one rank, and after. The second needs a segment that is new to all."""
    nbytes = 64 * MIB if limit == "memory" else 3 * MIB
    arena = shmcast.Arena.create("160MiB", segment_bytes="1MiB") if here.rank == 0 else None
    said = []
    with shmcast.Group(here.group, arena=arena) as group:
        small = group.broadcast(noise(100_000, 1) if here.rank == 0 else None)
        together(here)
        what = address_space(8 * MIB) if limit == "memory" else descriptors(0)
        tree = noise(nbytes, 2) if here.rank == 0 else None
        if here.rank == limited:
            with what:
                said.append(attempt(group, tree))
        else:
            said.append(attempt(group, tree))
        together(here)
        for number in (3, 4):
            received = group.broadcast(noise(nbytes, number) if here.rank == 0 else None)
            assert same(received, noise(nbytes, number))
            del received
        assert same(small, noise(100_000, 1))
        del small, tree
        settle(here, group)
        if arena is not None:
            assert in_use(arena) == 0
        together(here)
    if arena is not None:
        arena.close()
    return said


def attempt(group: shmcast.Group, tree: object) -> str:
    try:
        group.broadcast(tree)
    except GroupError as error:
        return str(error)
    except OSError as error:  # the entry rank's own
        assert error.errno in (errno.EMFILE, errno.ENOMEM), error
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("limited", [1, 2])
@pytest.mark.parametrize("limit", ["descriptors", "memory"])
def test_a_rank_that_can_not_map(ranks: Ranks, limit: str, limited: int) -> None:
    said = ranks.run(one_meets_a_limit, limit, limited)
    assert said == [[f"step 2: rank {limited} can not rebuild tree 0 of the message"]] * 3


@pytest.mark.parametrize("limit", ["descriptors", "memory"])
def test_an_entry_rank_that_can_not_grow(ranks: Ranks, limit: str) -> None:
    (entry,), (first,), (second,) = ranks.run(one_meets_a_limit, limit, 0)
    assert entry.startswith("ArenaError: ")
    assert first == second
    assert first.startswith("step 2: rank 0 could not encode the tree: ArenaError: ")
    assert os.strerror(errno.ENOMEM if limit == "memory" else errno.EMFILE) in first


def waits_without_descriptors(here: Rank) -> bool:
    with shmcast.Group(here.group, max_bytes="16MiB") as group:
        group.broadcast()
        if here.rank == 0:
            here.parent.receive()
            received = group.broadcast("at last")
        else:
            with tells_when_it_has_looked(here), descriptors(0):
                received = group.broadcast()
        assert received == "at last"
        settle(here, group)
    return True


def test_who_can_not_look_whether_others_live_takes_them_for_alive(ranks: Ranks) -> None:
    running = ranks.start(waits_without_descriptors)
    for child in running[1:]:
        assert child.receive() == "has looked"
    running[0].send("go on")
    assert ranks.results(running) == [True] * 3


def in_a_small_shm(here: Rank) -> list[int] | str:
    """All ranks in one namespace of mounts with two megabytes of /dev/shm; what finds no room travels in the message."""
    import torch.distributed as dist

    if here.rank == 0:
        why = small_shm("2m")
        where = [why or f"/proc/{os.getpid()}/ns/mnt"]
    else:
        where = [None]
    dist.broadcast_object_list(where, here.ranks[0], here.group)
    if not where[0].startswith("/proc/"):
        return where[0]
    if here.rank != 0:
        with open(where[0]) as mounts:
            assert libc.unshare(OWN_FILES) == 0 and libc.setns(mounts.fileno(), NEW_MOUNTS) == 0, ctypes.get_errno()
    options = {"segment_bytes": "256KiB", "max_blocks": 64}
    arena = shmcast.Arena.create("64MiB", **options) if here.rank == 0 else None
    kept = []
    with shmcast.Group(here.group, arena=arena) as group:
        for number in range(6):
            kept.append(group.broadcast(noise(500_000, number) if here.rank == 0 else None))
        assert all(same(each, noise(500_000, number)) for number, each in enumerate(kept))
        inline = group.stats()["inline_bytes"]
        kept.clear()
        settle(here, group)
        assert same(group.broadcast(noise(500_000, 7) if here.rank == 0 else None), noise(500_000, 7))
        assert group.stats()["inline_bytes"] == inline
        settle(here, group)
        if arena is not None:
            assert in_use(arena) == 0
        together(here)
    if arena is not None:
        arena.close()
        assert os.listdir("/dev/shm") == []
    return inline


def test_a_host_without_room() -> None:
    with Ranks(3) as own:
        inline, *others = own.run(in_a_small_shm)
        if isinstance(inline, str):
            pytest.skip(f"needs a /dev/shm of its own: {inline}")
        assert inline >= 1_000_000
        assert others == [0, 0]
