"""Forks without exec, of every kind: a lock ends with the process that took it, whatever its children have inherited."""

import ctypes
import os
import platform
import signal

import numpy as np
import pytest

import shmcast
from shmcast import process
from shmcast.errors import ArenaError, ArenaFullError, ArenaGoneError
from situations import (
    all_is_well,
    ended,
    ended_at_last,
    files,
    forked,
    free_again,
    mapped,
    pause_for_ever,
    stays_with,
    until,
)

BIG = 700_000  # in an arena of 1 MiB there is room for one of these
CLONE = {"x86_64": 56, "aarch64": 220}.get(platform.machine())


def libc_fork() -> int:
    """A fork of which Python knows nothing: no handler of `os.register_at_fork` runs."""
    return ctypes.PyDLL(None).fork()


def raw_clone() -> int:
    """A fork of which the C library knows nothing either."""
    return ctypes.PyDLL(None).syscall(CLONE, signal.SIGCHLD, 0, 0, 0, 0)


FORKS = {"os.fork": os.fork, "libc's fork": libc_fork, "clone": raw_clone}
every_fork = pytest.mark.parametrize(
    "kind",
    [
        "os.fork",
        "libc's fork",
        pytest.param("clone", marks=pytest.mark.skipif(CLONE is None, reason="the number of clone is not known here")),
    ],
)


def content(value: int, nbytes: int = BIG) -> np.ndarray:
    return np.full(nbytes, value, np.uint8)


def refused(action, what: str) -> bool:
    try:
        action()
    except ArenaError as error:
        assert what in str(error), error
        return True
    raise AssertionError(f"{action} was not refused")


# ---- the child outlives the parent


def reader_that_forks(parent, raw: bytes, kind: str) -> None:
    lease = shmcast.attach(raw)
    stays_with(forked(survivor_of_a_reader, parent, raw, lease, fork=FORKS[kind]))


def survivor_of_a_reader(parent, raw: bytes, lease) -> None:
    assert any(name.endswith(".0") for name in mapped()), mapped()  # the control segment, inherited
    parent.send(os.getpid())
    if parent.receive() == "attach":
        own = shmcast.attach(raw, verify=True)
        lease.release()  # does nothing: the hold was the parent's
        parent.send(int(own.array[7]))
        parent.receive()
        own.release()
    parent.send("released")
    parent.receive()


@every_fork
def test_a_readers_child_does_not_keep_it_alive(child, namespace, kind) -> None:
    with shmcast.Arena.create("1MiB") as arena:
        peer = child(reader_that_forks, arena.publish(content(1)).to_bytes(), kind)
        survivor = peer.receive()
        with ended_at_last(survivor):
            with pytest.raises(ArenaFullError):
                arena.publish(content(2))
            peer.kill()
            arena.publish(content(2), readers=0, keep=True)
            os.kill(survivor, 0)
            assert arena.stats()["swept"] == 1
    all_is_well(namespace)


@every_fork
def test_a_child_that_has_attached_itself_holds_itself(child, namespace, kind) -> None:
    with shmcast.Arena.create("1MiB") as arena:
        peer = child(reader_that_forks, arena.publish(content(1)).to_bytes(), kind)
        survivor = peer.receive()
        with ended_at_last(survivor):
            peer.send("attach")
            assert peer.receive() == 1
            assert len(arena.peers) == 2
            peer.kill()
            assert arena._member.sweep_peers() == 1
            with pytest.raises(ArenaFullError):
                arena.publish(content(2))
            peer.send("release")
            assert peer.receive() == "released"
            arena.publish(content(2))
    all_is_well(namespace)


@every_fork
def test_a_child_that_has_attached_itself_dies_itself(child, namespace, kind) -> None:
    """The other way round: the parent lives on, and keeps what is its own."""
    with shmcast.Arena.create("2MiB", segment_bytes="2MiB") as arena:
        mine, its = arena.publish(content(1)), arena.publish(content(2))
        peer = child(reader_whose_child_is_killed, mine.to_bytes(), its.to_bytes(), kind)
        assert peer.receive() == "attached"
        assert len(arena.peers) == 2
        peer.send("kill it")
        assert peer.receive() == -signal.SIGKILL
        assert arena._member.sweep_peers() == 1
        assert len(arena.peers) == 1
        arena.publish(content(3), readers=0, keep=True)  # where the child's was
        peer.send("look")
        assert peer.receive() == 1
        peer.join()
    all_is_well(namespace)


def reader_whose_child_is_killed(parent, mine: bytes, its: bytes, kind: str) -> None:
    lease = shmcast.attach(mine)

    def attaches() -> None:
        held = shmcast.attach(its, verify=True)
        parent.send("attached")
        pause_for_ever()
        held.release()

    pid = forked(attaches, fork=FORKS[kind])
    parent.receive()
    os.kill(pid, signal.SIGKILL)
    parent.send(ended(pid))
    parent.receive()
    lease.verify()
    parent.send(int(lease.array[3]))
    lease.release()


def owner_that_forks(parent, kind: str) -> None:
    arena = shmcast.Arena.create("1MiB")
    handle = arena.publish(content(1), readers=0, keep=True)
    lease = shmcast.attach(handle)
    stays_with(forked(survivor_of_an_owner, parent, arena, lease, fork=FORKS[kind]))


def survivor_of_an_owner(parent, arena, lease) -> None:
    parent.send((os.getpid(), lease.handle.to_bytes()))
    parent.receive()
    assert (lease.array == 1).all()  # mapped still, though nothing is promised
    refused(lambda: arena.publish(content(2, 100)), "forked")
    try:
        shmcast.attach(lease.handle)
    except ArenaGoneError:
        parent.send("gone")
    before = files()
    arena.close()
    assert files() == before  # of others
    with shmcast.Arena.create("1MiB") as own:
        assert (shmcast.attach(own.publish(content(3))).array == 3).all()
    parent.send("has one of its own")
    parent.receive()


@every_fork
def test_an_owners_child_does_not_keep_it_alive(child, namespace, kind) -> None:
    peer = child(owner_that_forks, kind)
    survivor, raw = peer.receive()
    with ended_at_last(survivor):
        lease = shmcast.attach(raw)
        assert shmcast.sweep().arenas == 0
        peer.kill()
        assert len(shmcast.sweep().segments) == 2
        os.kill(survivor, 0)
        peer.send("go on")
        assert peer.receive() == "gone"
        assert peer.receive() == "has one of its own"
        lease.verify()
        lease.release()
    all_is_well(namespace)


# ---- the parent outlives the child


def parent_of(parent, raw: bytes, kind: str, end: str) -> None:
    lease = shmcast.attach(raw)
    with shmcast.Arena.create("1MiB") as arena:
        own = arena.publish(content(4, 5000), readers=0, keep=True)
        pid = forked(ends, end, lease, arena, fork=FORKS[kind])
        parent.send(ended(pid))
        parent.receive()
        assert (lease.array == 1).all()
        assert (shmcast.attach(own).array == 4).all()
        assert (shmcast.attach(arena.publish(content(5, 100))).array == 5).all()
        parent.send("whole")
        parent.receive()
    lease.release()
    parent.send("released")
    parent.receive()


def ends(end: str, lease, arena) -> None:
    """Drops all it has, or ends without doing so."""
    lease.release()
    process.leave_all()
    if end == "close":
        arena.close()
    elif end == "drop":
        del lease, arena
    elif end == "_exit":
        os._exit(7)
    else:
        os.kill(os.getpid(), signal.SIGKILL)


@every_fork
@pytest.mark.parametrize(("end", "status"), [("close", 0), ("drop", 0), ("_exit", 7), ("kill", -signal.SIGKILL)])
def test_the_end_of_a_child_takes_nothing_from_its_parent(child, namespace, kind, end, status) -> None:
    with shmcast.Arena.create("1MiB") as arena:
        peer = child(parent_of, arena.publish(content(1)).to_bytes(), kind, end)
        assert peer.receive() == status
        assert arena._member.sweep_peers() == 0
        with pytest.raises(ArenaFullError):
            arena.publish(content(2))
        assert shmcast.sweep().arenas == 0
        peer.send("look")
        assert peer.receive() == "whole"
        peer.send("release")
        assert peer.receive() == "released"
        arena.publish(content(2))
        peer.join()
    all_is_well(namespace)


def test_generations_of_forks(child, namespace) -> None:
    """Each of five generations attaches itself and dies before its child does; what each holds ends with itself."""
    with shmcast.Arena.create("5MiB", segment_bytes="1MiB") as arena:
        raws = [arena.publish(content(n)).to_bytes() for n in range(5)]
        peer = child(generation, raws, 0)
        pids = [peer.receive() for _ in raws]
        with ended_at_last(pids[-1]):
            for dead, pid in enumerate(pids):
                assert arena.stats()["slots_used"] == 5 - dead
                os.kill(pid, signal.SIGKILL)
                if dead == 0:
                    peer.kill()
                until(lambda: arena._member.sweep_peers() == 1, "its lock to be dropped")
            free_again(arena)
    all_is_well(namespace)


def generation(parent, raws: list[bytes], n: int) -> None:
    held = shmcast.attach(raws[n], verify=True)
    parent.send(os.getpid())
    if n + 1 < len(raws):
        stays_with(forked(generation, parent, raws, n + 1))
    pause_for_ever()
    held.release()


# ---- daemons


def daemonized(function, *args) -> None:
    """Run a function in a process of a session of its own that init is the parent of."""

    def middle() -> None:
        os.setsid()
        forked(function, *args)

    assert ended(forked(middle)) == 0


def becomes_a_daemon(parent, raw: bytes, when: str) -> None:
    """An owner, and a reader of another arena, that daemonizes in the middle of it or before."""
    if when == "before":
        daemonized(daemon, parent, raw)
        parent.receive()
        return
    lease = shmcast.attach(raw)
    arena = shmcast.Arena.create("1MiB")
    daemonized(daemon_that_came_late, parent, lease, arena)
    pause_for_ever()


def daemon(parent, raw: bytes) -> None:
    with shmcast.Arena.create("1MiB") as arena:
        lease = shmcast.attach(raw)
        parent.send((os.getpid(), arena.publish(content(3), readers=0, keep=True).to_bytes()))
        pause_for_ever()
        lease.release()


def test_a_daemon_is_a_process_like_any_other(child, namespace) -> None:
    with shmcast.Arena.create("1MiB") as arena:
        peer = child(becomes_a_daemon, arena.publish(content(1)).to_bytes(), "before")
        pid, raw = peer.receive()
        with ended_at_last(pid):
            peer.join()
            lease = shmcast.attach(raw)
            assert shmcast.sweep().arenas == 0
            with pytest.raises(ArenaFullError):
                arena.publish(content(2))
        arena.publish(content(2))
        assert shmcast.sweep().arenas == 1
        lease.verify()
        lease.release()
    all_is_well(namespace)


def daemon_that_came_late(parent, lease, arena) -> None:
    parent.send((os.getpid(), arena.id))
    parent.receive()
    refused(lambda: arena.publish(content(2, 100)), "forked")
    lease.release()
    with shmcast.Arena.create("1MiB") as own:
        assert (shmcast.attach(own.publish(content(3))).array == 3).all()
        parent.send("has one of its own")
        pause_for_ever()


def test_what_is_joined_before_daemonizing_ends_with_the_parent(child, namespace) -> None:
    with shmcast.Arena.create("1MiB") as arena:
        peer = child(becomes_a_daemon, arena.publish(content(1)).to_bytes(), "after")
        pid, _ = peer.receive()
        with ended_at_last(pid):
            peer.kill()
            assert shmcast.sweep().arenas == 1
            arena.publish(content(2), readers=0, keep=True)
            peer.send("go on")
            assert peer.receive() == "has one of its own"
            assert shmcast.sweep().arenas == 0
    all_is_well(namespace)
