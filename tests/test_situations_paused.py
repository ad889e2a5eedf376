"""SIGSTOP for longer than any deadline: who is paused is alive, is not swept, keeps what it holds, and goes on."""

import os
import signal

import numpy as np
import pytest

import shmcast
from shmcast import names
from shmcast.errors import ArenaFullError, ArenaGoneError, StaleHandleError
from situations import (
    MIB,
    all_is_well,
    ended,
    files,
    forked,
    free_again,
    pause_for_ever,
    state_of,
    stays_with,
    stop,
    stopped,
    until,
)

AT_ONCE_S = 1e-6
"""A deadline that is over before anybody could look."""


def content(value: int, nbytes: int = MIB) -> np.ndarray:
    return np.full(nbytes, value, np.uint8)


def publisher(parent) -> None:
    with shmcast.Arena.create("4MiB", segment_bytes="2MiB", grant_timeout=AT_ONCE_S) as arena:
        handles = [arena.publish(content(1), readers=0, keep=True), arena.publish(content(2), readers=1)]
        parent.send([handle.to_bytes() for handle in handles])
        while True:
            for value in range(10):
                arena.publish(content(value), timeout=30)  # nobody attaches these: revoked when the next one needs room
            parent.send(arena.stats()["revoked"])
            parent.receive()


def sweeper(parent, count: int) -> None:
    parent.send(sum(len(shmcast.sweep().segments) for _ in range(count)))


def reader(parent, raw: bytes) -> None:
    lease = shmcast.attach(raw)
    parent.send(shmcast.process_token())
    parent.receive()
    lease.verify()
    parent.send(int(lease.array[5]))
    parent.receive()


def late_reader(parent, joined: bytes, raw: bytes) -> None:
    """Has joined, and is stopped between getting a handle and attaching it."""
    shmcast.attach(joined).release()
    parent.send(shmcast.process_token())
    raw = parent.receive()
    os.kill(os.getpid(), signal.SIGSTOP)
    try:
        parent.send(int(shmcast.attach(raw, verify=True).array[5]))
    except StaleHandleError:
        parent.send("stale")
    parent.receive()


def test_a_paused_owner_is_not_swept(child, namespace) -> None:
    owner = child(publisher)
    kept, promised = owner.receive()
    assert owner.receive() >= 5
    stop(owner.pid)
    before = files(namespace)
    assert [shmcast.sweep() for _ in range(20)] == [(0, (), 0)] * 20
    assert child(sweeper, 20).receive() == 0
    with shmcast.Arena.create("1MiB"):
        pass  # has swept, too
    assert files(namespace) == before
    lease = shmcast.attach(kept, verify=True)  # joins while the owner can do nothing
    with pytest.raises(StaleHandleError):
        shmcast.attach(promised)  # revoked before the pause
    victim = child(reader, kept)
    victim.receive()
    victim.kill()
    owner.signal(signal.SIGCONT)
    owner.send("go on")
    assert owner.receive() >= 15
    lease.verify()
    lease.release()
    owner.join()
    all_is_well(namespace)


def test_a_promise_of_a_paused_owner_is_good_whatever_its_deadline(child, namespace) -> None:
    """Only the owner revokes, and only when it needs the space: nobody does it for an owner that is paused."""
    owner = child(promises)
    raw = owner.receive()
    stop(owner.pid)
    shmcast.sweep()
    lease = shmcast.attach(raw, verify=True)
    owner.signal(signal.SIGCONT)
    owner.send("fill")
    assert owner.receive() == "full"
    assert (lease.array == 3).all()
    lease.release()
    owner.send("fill")
    assert owner.receive() == "room"
    owner.join()
    all_is_well(namespace)


def promises(parent) -> None:
    with shmcast.Arena.create("1MiB", grant_timeout=AT_ONCE_S) as arena:
        parent.send(arena.publish(content(3)).to_bytes())
        while True:
            parent.receive()
            try:
                arena.publish(content(4))
                parent.send("room")
            except ArenaFullError:
                parent.send("full")


def test_a_paused_reader_keeps_its_block(child, namespace) -> None:
    with shmcast.Arena.create("4MiB", segment_bytes="1MiB", grant_timeout=AT_ONCE_S, idle_timeout=AT_ONCE_S) as arena:
        peer = child(reader, arena.publish(content(5), readers=1, grant_timeout=60).to_bytes())
        token = peer.receive()
        stop(peer.pid)
        for value in range(20):
            arena.publish(content(value), timeout=30)
        assert arena.stats()["revoked"] >= 15  # deadlines of the same length are over many times
        assert arena._member.sweep_peers() == 0
        with pytest.raises(ArenaFullError):  # all but the block that the paused one holds
            arena.publish(content(6, 4 * MIB))
        assert child(sweeper, 5).receive() == 0
        assert arena.peers == (token,)
        peer.signal(signal.SIGCONT)
        peer.send("look")
        assert peer.receive() == 5
        stop(peer.pid)
        peer.kill()  # now it is dead: its block is free at once
        arena.publish(content(6, 4 * MIB), readers=0, keep=True)
    all_is_well(namespace)


@pytest.mark.parametrize("how", ["anybody", "by name"])
@pytest.mark.parametrize("deadline", [AT_ONCE_S, None])
def test_a_promise_to_a_paused_reader(child, namespace, deadline, how) -> None:
    """With a deadline it may be taken back, as of any process that is too late; it is stale then, never other bytes."""
    with shmcast.Arena.create("2MiB", grant_timeout=deadline) as arena:
        first = arena.publish(content(9, 100), readers=0, keep=True)
        peer = child(late_reader, first.to_bytes(), b"")
        token = peer.receive()
        promised = arena.publish(content(7), readers=1 if how == "anybody" else [token])
        peer.send(promised.to_bytes())
        stopped(peer.pid)
        arena.release(first)
        if deadline is None:
            with pytest.raises(ArenaFullError):
                arena.publish(content(8, 2 * MIB))
        else:
            arena.publish(content(8, 2 * MIB), readers=0, keep=True)
        assert arena._member.sweep_peers() == 0
        peer.signal(signal.SIGCONT)
        assert peer.receive() == (7 if deadline is None else "stale")
        peer.join()
        if deadline is None:
            free_again(arena)
    all_is_well(namespace)


# ---- sweepers and creators


def dies_with_an_arena(parent) -> None:
    with shmcast.Arena.create("3MiB", segment_bytes="1MiB") as arena:
        handles = [arena.publish(content(value), readers=0, keep=True) for value in range(3)]
        parent.send(handles[0].to_bytes())
        parent.receive()


def stops_midway(parent, count: int) -> None:
    """Sweeps, and stops itself after so many names are gone, with the owner byte in its hands."""
    unlink = names.unlink
    done = []

    def unlink_and_stop(name: str) -> bool:
        if len(done) == count:
            os.kill(os.getpid(), signal.SIGSTOP)
        done.append(name)
        return unlink(name)

    names.unlink = unlink_and_stop
    parent.send(len(shmcast.sweep().segments))
    parent.receive()


@pytest.mark.parametrize("end", ["goes on", "is killed"])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_paused_sweeper_is_not_disturbed_and_its_work_is_finished(child, namespace, count, end) -> None:
    owner = child(dies_with_an_arena)
    raw = owner.receive()
    owner.kill()
    peer = child(stops_midway, count)
    stopped(peer.pid)
    left = files(namespace)
    assert len(left) == 4 - count
    assert shmcast.sweep() == (0, (), 0)  # that arena has its sweeper
    with pytest.raises(ArenaGoneError):
        shmcast.attach(raw)  # it is marked already
    with shmcast.Arena.create("1MiB") as arena:
        assert len(files(namespace)) == len(left) + 2
        arena.publish(content(1, 100))
    if end == "goes on":
        peer.signal(signal.SIGCONT)
        assert peer.receive() == 4
        assert files(namespace) == []
    else:
        peer.kill()
        assert shmcast.sweep().segments == tuple(sorted(left, reverse=True))
    all_is_well(namespace)


def creates_slowly(parent) -> None:
    """Stops itself when the file is there and not locked yet, once."""
    open_writable = names.open_writable

    def stop_and_open(name: str) -> int:
        names.open_writable = open_writable
        parent.send(name)
        os.kill(os.getpid(), signal.SIGSTOP)
        return open_writable(name)

    names.open_writable = stop_and_open
    with shmcast.Arena.create("1MiB") as arena:
        lease = shmcast.attach(arena.publish(content(6, 100)))
        parent.send((arena.id, int(lease.array[0])))
        parent.receive()
        lease.release()


def test_a_creator_that_is_paused_before_it_has_locked_creates_another(child, namespace) -> None:
    """The one moment when a living owner looks dead, and it has published nothing yet."""
    peer = child(creates_slowly)
    name = peer.receive()
    stopped(peer.pid)
    assert shmcast.sweep().segments == (name[1:],)
    peer.signal(signal.SIGCONT)
    arena, value = peer.receive()
    assert value == 6
    assert f"{arena:016x}" not in name
    assert shmcast.sweep() == (0, (), 0)
    peer.join()
    all_is_well(namespace)


def parent_of_a_paused_reader(parent, raw: bytes) -> None:
    """The paused one is forked from a process that dies, so that it is init's."""
    pid = forked(reader, parent, raw)
    parent.send(pid)
    stays_with(pid)


def test_a_paused_orphan_is_alive(child, namespace) -> None:
    with shmcast.Arena.create("1MiB", grant_timeout=AT_ONCE_S) as arena:
        peer = child(parent_of_a_paused_reader, arena.publish(content(5), grant_timeout=60).to_bytes())
        said = [peer.receive(), peer.receive()]
        (pid,) = (one for one in said if one < 1 << 32 and state_of(one))
        stop(pid)
        peer.kill()
        assert arena._member.sweep_peers() == 0
        with pytest.raises(ArenaFullError):
            arena.publish(content(6))
        os.kill(pid, signal.SIGCONT)
        peer.send("look")
        assert peer.receive() == 5
        os.kill(pid, signal.SIGKILL)
        until(lambda: state_of(pid) in ("", "Z"), "the orphan to end")
        arena.publish(content(6))
    all_is_well(namespace)


def test_a_stopped_zombie_is_dead(child, namespace) -> None:
    """Killed while it is stopped, and not reaped."""
    peer = child(owner_with_a_stopped_child)
    pid = peer.receive()
    assert state_of(pid) == "Z"
    assert len(shmcast.sweep().segments) == 2
    peer.send("reap")
    assert peer.receive() == -signal.SIGKILL
    peer.join()
    all_is_well(namespace)


def owner_with_a_stopped_child(parent) -> None:
    read_fd, write_fd = os.pipe()

    def owner() -> None:
        arena = shmcast.Arena.create("1MiB")
        os.write(write_fd, b"!")
        pause_for_ever()
        arena.close()

    pid = forked(owner)
    assert os.read(read_fd, 1) == b"!"
    stop(pid)
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    parent.send(pid)
    parent.receive()
    parent.send(ended(pid))
