"""What a process has joined: once an arena, refused with words where the file is not an arena, empty after a fork."""

import fcntl
import os
import struct
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest

import shmcast
from shmcast import _native, names, process
from shmcast.errors import ArenaError, ArenaGoneError, LayoutMismatchError

SHM = Path(names.DIRECTORY)


def owner(parent) -> None:
    """Publishes the numbers 0..9 as often as it is told to."""
    with shmcast.Arena.create("1MiB") as arena:
        while True:
            parent.send(arena.publish(np.arange(10), readers=0, keep=True).to_bytes())
            parent.receive()


@pytest.fixture
def foreign(child):
    """A handle of an arena of another process."""
    return shmcast.Handle.from_bytes(child(owner).receive())


@pytest.fixture
def orphan(child):
    """A handle of an arena whose owner is dead, so that nobody else trips over what a test does to its files."""
    peer = child(owner)
    handle = shmcast.Handle.from_bytes(peer.receive())
    peer.kill()
    yield handle
    control(handle).unlink(missing_ok=True)  # a sweep leaves alone what a newer build may have made
    shmcast.sweep()


def control(handle) -> Path:
    return SHM / names.segment_name(handle.namespace, handle.arena, 0)[1:]


def test_joins_once(foreign) -> None:
    first = shmcast.attach(foreign)
    member = process.members[foreign[:3]]
    second = shmcast.attach(foreign)
    assert process.members[foreign[:3]] is member
    assert member.index == 1
    assert _native.process_token() in member.tokens()
    del first, second


def test_leave_and_come_again(foreign) -> None:
    lease = shmcast.attach(foreign)
    with pytest.raises(BufferError):
        process.leave(foreign.namespace, foreign.arena)
    lease.release()
    shmcast.attach(foreign).release()
    process.leave(foreign.namespace, foreign.arena)
    process.leave(foreign.namespace, foreign.arena)
    assert foreign[:3] not in process.members
    assert (shmcast.attach(foreign).array == np.arange(10)).all()
    process.leave_all()
    assert foreign[:3] not in process.members


def test_threads_join_once(foreign) -> None:
    seen = []
    start = threading.Barrier(8)

    def work() -> None:
        start.wait()
        for _ in range(50):
            seen.append(int(shmcast.attach(foreign).array.sum()))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [45] * 400
    assert process.members[foreign[:3]].index == 1


def test_the_owner_is_its_own_member() -> None:
    with shmcast.Arena.create("1MiB") as arena:
        handle = arena.publish(np.arange(10))
        assert process.members[handle[:3]].index == 0
        process.leave_all()
        assert (shmcast.attach(handle).array == np.arange(10)).all()
        assert arena.peers == ()
    assert handle[:3] not in process.members


def test_memberships_of_ended_arenas_are_dropped(child) -> None:
    peer = child(owner)
    old = shmcast.Handle.from_bytes(peer.receive())
    shmcast.attach(old).release()
    peer.kill()
    shmcast.sweep()
    with shmcast.Arena.create("1MiB") as arena:
        shmcast.attach(arena.publish(np.arange(3)))
    fresh = child(owner)
    shmcast.attach(fresh.receive())
    assert old[:3] not in process.members
    with pytest.raises(ArenaGoneError):
        shmcast.attach(old)


def damage(handle, offset: int, data: bytes) -> None:
    with open(control(handle), "r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.mark.parametrize(
    ("offset", "data", "what"),
    [
        (0, b"\0" * 8, "magic"),
        (0, b"notmagic", "magic is 0x"),
        (8, struct.pack("<I", 77), "format 77, this build reads 2"),
        (12, struct.pack("<I", 128), "128"),
        (16, struct.pack("<Q", 1 << 40), "1099511627776"),
        (24, struct.pack("<Q", 5), "arena 0x5"),
        (72, struct.pack("<I", 0), "is 0"),
        (72, struct.pack("<I", 1 << 31), "2147483648"),
        (80, struct.pack("<I", 1), "is 1"),
    ],
)
def test_a_control_segment_that_is_none(orphan, offset, data, what) -> None:
    damage(orphan, offset, data)
    with pytest.raises(ArenaError, match=f"open /shmcast.*{what}") as caught:
        shmcast.attach(orphan)
    assert isinstance(caught.value, LayoutMismatchError) or offset == 0
    assert orphan[:3] not in process.members


@pytest.mark.parametrize("length", [0, 1, 100, 4096, 20480, 50_000])
def test_a_control_segment_that_is_short(orphan, length) -> None:
    os.truncate(control(orphan), length)
    with pytest.raises(ArenaError, match=r"bytes long|magic"):
        shmcast.attach(orphan)


def test_a_data_segment_that_is_short(orphan) -> None:
    data = SHM / names.segment_name(orphan.namespace, orphan.arena, 1)[1:]
    os.truncate(data, 0)
    with pytest.raises((ArenaError, LayoutMismatchError)):
        shmcast.attach(orphan)


def test_a_data_segment_that_is_gone(orphan) -> None:
    (SHM / names.segment_name(orphan.namespace, orphan.arena, 1)[1:]).unlink()
    with pytest.raises(ArenaGoneError, match="data segment is gone"):
        shmcast.attach(orphan)


def joins_and_waits(parent, raw: bytes) -> None:
    try:
        lease = shmcast.attach(raw)
    except ArenaError as error:
        parent.send(str(error))
    else:
        parent.send(None)
        parent.receive()
        lease.release()


def test_too_many_processes(child) -> None:
    """30 beside the owner; each a real process would take long, so one process joins under many byte numbers."""
    with shmcast.Arena.create("1MiB") as arena:
        handle = arena.publish(np.arange(10), readers=0, keep=True)
        opener = process.opener(handle.namespace, handle.arena)
        members = []
        for _ in range(30):
            fds = opener(0), opener(0)
            members.append(_native.Member.join(*fds, opener, handle.arena))
            for fd in fds:
                os.close(fd)
        peer = child(joins_and_waits, handle.to_bytes())
        assert "31 of 31" in peer.receive()
        del members[7]
        peer = child(joins_and_waits, handle.to_bytes())
        assert peer.receive() is None


def test_a_byte_that_a_sweeper_has_for_a_moment(child, monkeypatch) -> None:
    """The last free one: who joins meanwhile waits for it."""
    with shmcast.Arena.create("1MiB") as arena:
        handle = arena.publish(np.arange(10), readers=0, keep=True)
        opener = process.opener(handle.namespace, handle.arena)
        members = []
        for _ in range(29):
            fds = opener(0), opener(0)
            members.append(_native.Member.join(*fds, opener, handle.arena))
            for fd in fds:
                os.close(fd)
        peer = child(joins_when_it_is_freed, handle.to_bytes())
        assert peer.receive() == "joined after a pause"


def joins_when_it_is_freed(parent, raw: bytes) -> None:
    handle = shmcast.Handle.from_bytes(raw)
    fd = process.opener(handle.namespace, handle.arena)(0)
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 30, 1, 0))
    pauses = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        os.close(fd) if len(pauses) == 1 else None

    process.time = types.SimpleNamespace(sleep=pause, monotonic=time.monotonic)
    shmcast.attach(handle).release()
    parent.send("joined after a pause" if len(pauses) == 1 else pauses)


def test_fork_while_another_thread_joins(child, foreign) -> None:
    peer = child(forks_while_joining, foreign.to_bytes())
    assert peer.receive() == "ended"


def forks_while_joining(parent, raw: bytes) -> None:
    """A child that was forked in the middle of a join must not keep the lock of its parent alive, nor find ours held."""
    handle = shmcast.Handle.from_bytes(raw)
    going = True

    def join_and_leave() -> None:
        while going:
            shmcast.attach(handle).release()
            process.leave(handle.namespace, handle.arena)

    thread = threading.Thread(target=join_and_leave)
    thread.start()
    children = []
    for _ in range(30):
        pid = os.fork()
        if pid == 0:
            held = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if int(fd) > 2 and
                    os.path.exists(f"/proc/self/fd/{fd}")]  # fmt: skip
            free = process.fork_guard.acquire(blocking=False)
            os._exit(0 if free and not any(name.endswith(".0") for name in held) and not process.members else 1)
        children.append(pid)
    statuses = {os.waitpid(pid, 0)[1] for pid in children}
    going = False
    thread.join()
    assert statuses == {0}, statuses
    parent.send("ended")


INTERRUPTED_FORK = """
import ctypes, functools, logging, os, signal, threading, numpy

class Interrupt(Exception):
    pass

def interrupt(*_):
    raise Interrupt

signal.signal(signal.SIGUSR1, interrupt)
os.register_at_fork(after_in_parent=functools.partial(getattr(ctypes.CDLL(None), "raise"), int(signal.SIGUSR1)))
from shmcast import process

try:
    if os.fork() == 0:
        os._exit(0)
except Interrupt:
    print("interrupted")
free = []
thread = threading.Thread(target=lambda: free.append(process.fork_guard.acquire(blocking=False)))
thread.start()
thread.join()
print(free)
"""


def test_an_interrupt_in_a_fork_leaves_nothing_held() -> None:
    """It comes just before the guard is let go, where Python ignores what handlers raise."""
    run = subprocess.run([sys.executable, "-c", INTERRUPTED_FORK], capture_output=True, text=True, timeout=60)
    assert run.stdout.split() == ["interrupted", "[True]"], run


def forgets_and_attaches_again(parent, first: bytes, second: bytes) -> None:
    lease = shmcast.attach(first)
    process.forget(lease.handle[:3])
    again = shmcast.attach(second)
    parent.send((len(process.members), int(again.array.sum()) == 4))
    parent.receive()


def test_a_process_has_one_byte_of_an_arena(child) -> None:
    with shmcast.Arena.create("1MiB") as arena:
        handles = [arena.publish(np.full(4, 1, "u1"), readers=0, keep=True) for _ in range(2)]
        peer = child(forgets_and_attaches_again, *(handle.to_bytes() for handle in handles))
        assert peer.receive() == (1, True)
        assert len(arena.peers) == 1
        assert sorted(arena._member.tokens().values()) == [0, 1]
        peer.join()
