"""Pid namespaces over one /dev/shm, and pids that are used again: nothing is decided by a pid.

They need the right to make namespaces (root, as a rule) and are skipped, with the reason, where there is none."""

import os
import signal
import time

import numpy as np
import pytest

import shmcast
from shmcast.errors import ArenaFullError, StaleHandleError
from situations import (
    NEW_PIDS,
    NEW_TIMES,
    all_is_well,
    dies_with_us,
    ended,
    files,
    forked,
    pause_for_ever,
    stop,
    unshared,
)

BIG = 700_000  # in an arena of 1 MiB there is room for one of these
LAST_PID = "/proc/sys/kernel/ns_last_pid"


def content(value: int, nbytes: int = BIG) -> np.ndarray:
    return np.full(nbytes, value, np.uint8)


# ---- processes in pid namespaces of their own


def apart(parent, role: str, *args: object) -> None:
    """Run one of `ROLES` as process 1 of a new pid namespace; says its pid as this side sees it first."""
    why = unshared(NEW_PIDS)
    if why:
        parent.send(why)
        return
    go, started = os.pipe()

    def begin() -> None:
        dies_with_us()
        assert os.read(go, 1) == b"!"
        assert os.getpid() == 1
        ROLES[role](parent, *args)

    pid = forked(begin)
    parent.send(pid)
    os.write(started, b"!")
    status = ended(pid)
    os._exit(status if status >= 0 else 128 - status)


def owner(parent) -> None:
    with shmcast.Arena.create("1MiB") as arena:
        parent.send(arena.publish(content(1), readers=0, keep=True).to_bytes())
        while True:
            parent.receive()
            scrubbed = arena._member.sweep_peers()
            parent.send((shmcast.sweep().arenas, scrubbed, len(arena.peers)))


def reader(parent, raw: bytes) -> None:
    lease = shmcast.attach(raw, verify=True)
    parent.send("attached")
    while True:
        parent.receive()
        lease.verify()
        parent.send(shmcast.sweep().arenas)


def sweeper(parent) -> None:
    while True:
        parent.send(len(shmcast.sweep().segments))
        parent.receive()


ROLES = {"owner": owner, "reader": reader, "sweeper": sweeper}


class Apart:
    """The test's end of a process that is number 1 where it lives."""

    def __init__(self, child, *args: object) -> None:
        self.child = child(apart, *args)
        self.pid = self.child.receive()
        if not isinstance(self.pid, int):
            pytest.skip(f"needs a pid namespace: {self.pid}")
        self.receive, self.send = self.child.receive, self.child.send

    def kill(self) -> None:
        """SIGKILL; reaped when this returns."""
        os.kill(self.pid, signal.SIGKILL)
        self.child.wait(128 + signal.SIGKILL)


def test_everybody_is_number_1(child, namespace) -> None:
    """Owner, two readers and a sweeper, each process 1 of its own namespace, and the test in another one."""
    chief = Apart(child, "owner")
    raw = chief.receive()
    readers = [Apart(child, "reader", raw) for _ in range(2)]
    assert [peer.receive() for peer in readers] == ["attached"] * 2
    broom = Apart(child, "sweeper")
    assert broom.receive() == 0
    before = files(namespace)
    assert shmcast.sweep().arenas == 0
    for peer in readers:
        peer.send("sweep")
        assert peer.receive() == 0
    chief.send("sweep")
    assert chief.receive() == (0, 0, 2)  # two others, of its own number, and both alive
    readers[0].kill()
    chief.send("sweep")
    assert chief.receive() == (0, 1, 1)
    assert files(namespace) == before
    chief.kill()
    broom.send("sweep")
    assert broom.receive() == 2
    readers[1].send("look")
    assert readers[1].receive() == 0
    readers[1].kill()
    broom.kill()
    all_is_well(namespace)


@pytest.mark.parametrize("where", ["here", "there"])
def test_an_owner_and_readers_on_two_sides(child, namespace, where) -> None:
    """The owner in this namespace and a reader in another, or the other way round; both sides sweep, both sides die."""
    if where == "here":
        with shmcast.Arena.create("1MiB") as arena:
            for _ in range(2):
                peer = Apart(child, "reader", arena.publish(content(1)).to_bytes())
                assert peer.receive() == "attached"
                peer.send("sweep")
                assert peer.receive() == 0
                assert arena._member.sweep_peers() == 0
                with pytest.raises(ArenaFullError):
                    arena.publish(content(2))
                peer.kill()
            arena.publish(content(2), readers=0, keep=True)
    else:
        chief = Apart(child, "owner")
        raw = chief.receive()
        for _ in range(2):
            lease = shmcast.attach(raw)
            assert shmcast.sweep().arenas == 0
            chief.send("sweep")
            assert chief.receive() == (0, 0, 1)
            lease.release()
        lease = shmcast.attach(raw)
        chief.kill()
        assert len(shmcast.sweep().segments) == 2
        lease.verify()
        lease.release()
    all_is_well(namespace)


def test_a_paused_owner_of_another_pid_namespace(child, namespace) -> None:
    chief = Apart(child, "owner")
    raw = chief.receive()
    stop(chief.pid)
    broom = Apart(child, "sweeper")
    assert broom.receive() == 0
    assert shmcast.sweep().arenas == 0
    with shmcast.attach(raw, verify=True) as lease:
        assert lease.array[0] == 1
    os.kill(chief.pid, signal.SIGCONT)
    chief.send("sweep")
    assert chief.receive() == (0, 0, 1)
    chief.kill()
    broom.send("sweep")
    assert broom.receive() == 2
    broom.kill()
    all_is_well(namespace)


def family(parent) -> None:
    """An owner as process 1, whose death takes its children, readers of it, along: the kernel ends the namespace."""
    arena = shmcast.Arena.create("1MiB")
    raw = arena.publish(content(1), readers=0, keep=True).to_bytes()
    for _ in range(3):
        forked(reader, parent, raw)
    parent.send(raw)
    pause_for_ever()


def test_a_pid_namespace_dies_at_once(child, namespace) -> None:
    chief = Apart(child, "family")
    said = [chief.receive() for _ in range(4)]
    assert said.count("attached") == 3
    (raw,) = (one for one in said if one != "attached")
    lease = shmcast.attach(raw)
    chief.kill()
    assert len(shmcast.sweep().segments) == 2
    lease.verify()
    lease.release()
    all_is_well(namespace)


# ---- a pid that comes again


def forked_as(pid: int, function, *args) -> int:
    """A forked child with that pid, which must be free."""
    with open(LAST_PID, "w") as file:
        file.write(str(pid - 1))
    found = forked(function, *args)
    if found != pid:
        os.kill(found, signal.SIGKILL)
        ended(found)
    return found


def pids_come_again(parent) -> None:
    """Process 1 of a namespace in which nobody else takes pids."""
    said, says = os.pipe()

    def tell(text: bytes) -> None:
        os.write(says, text + b"\n")

    def hears() -> bytes:
        text = b""
        while not text.endswith(b"\n"):
            text += os.read(said, 1)
        return text.strip()

    def owns() -> None:
        arena = shmcast.Arena.create("1MiB")
        tell(arena.publish(content(1), readers=0, keep=True).to_bytes().hex().encode())
        pause_for_ever()

    def reads(raw: bytes) -> None:
        lease = shmcast.attach(raw)
        tell(str(lease.array[5]).encode())
        pause_for_ever()

    def only_lives() -> None:
        tell(b"lives")
        pause_for_ever()

    def dies(pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) == -signal.SIGKILL

    # An owner; then somebody of that pid who has nothing to do with it; then another owner of that pid.
    assert forked_as(500, owns) == 500
    first = bytes.fromhex(hears().decode())
    dies(500)
    assert forked_as(500, only_lives) == 500
    assert hears() == b"lives"
    assert shmcast.sweep().arenas == 1
    dies(500)
    assert forked_as(500, owns) == 500
    second = bytes.fromhex(hears().decode())
    dies(500)
    assert forked_as(500, owns) == 500  # create sweeps: its own number is no reason to leave the last one's arena
    third = bytes.fromhex(hears().decode())
    assert len(files()) == 2
    assert shmcast.sweep().arenas == 0
    for raw in (first, second):
        with pytest.raises(OSError, match="there is no arena"):
            shmcast.attach(raw)
    with shmcast.attach(third, verify=True) as lease:
        assert lease.array[0] == 1
    dies(500)
    assert shmcast.sweep().arenas == 1
    # A reader; then another reader of that pid, which holds nothing of what the first one held.
    with shmcast.Arena.create("2MiB", segment_bytes="2MiB") as arena:
        held, other = arena.publish(content(2)), arena.publish(content(3))
        assert forked_as(600, reads, held.to_bytes()) == 600
        assert hears() == b"2"
        dies(600)
        assert forked_as(600, reads, other.to_bytes()) == 600
        assert hears() == b"3"
        assert arena._scrub(0) is None
        assert arena.stats()["slots_used"] == 1
        with pytest.raises(StaleHandleError):
            shmcast.attach(held)
        arena.publish(content(4), readers=0, keep=True)
        dies(600)
        assert arena._member.sweep_peers() == 1
    parent.send("done")
    parent.receive()


ROLES |= {"family": family, "pids": pids_come_again}


@pytest.mark.skipif(not os.path.exists(LAST_PID), reason=f"needs {LAST_PID}")
def test_a_pid_that_is_used_again(child, namespace) -> None:
    chief = Apart(child, "pids")
    assert chief.receive() == "done"
    chief.kill()
    all_is_well(namespace)


# ---- clocks


def clocks_apart(parent, raw: bytes, seconds: int) -> None:
    """A reader whose monotonic clock is that many seconds ahead of its owner's, or behind."""
    why = unshared(NEW_TIMES)
    if not why:
        try:
            with open("/proc/self/timens_offsets", "w") as file:
                file.write(f"monotonic {seconds} 0\n")
        except OSError as error:
            why = f"time namespace: {error}"
    if why:
        parent.send(why)
        return
    before = time.monotonic()

    def begin() -> None:
        dies_with_us()
        assert abs(time.monotonic() - before - seconds) < 1000
        with shmcast.attach(raw, verify=True) as lease:
            parent.send("attached")
            parent.receive()
            lease.verify()
            with shmcast.Arena.create("1MiB", grant_timeout=1000) as arena:
                handle = arena.publish(content(3))
                try:
                    arena.publish(content(4))
                    raise AssertionError("a promise of 1,000 s was over at once")
                except ArenaFullError:
                    parent.send(int(shmcast.attach(handle, verify=True).array[0]))
            parent.receive()

    assert ended(forked(begin)) == 0


@pytest.mark.parametrize("seconds", [1_000_000, -10])
def test_a_clock_that_runs_elsewhere(child, namespace, seconds) -> None:
    """Deadlines are on the owner's clock alone."""
    with shmcast.Arena.create("1MiB", grant_timeout=1000) as arena:
        peer = child(clocks_apart, arena.publish(content(1), readers=2).to_bytes(), seconds)
        if (said := peer.receive()) != "attached":
            pytest.skip(said)
        with pytest.raises(ArenaFullError):
            arena.publish(content(2))
        peer.send("look")
        assert peer.receive() == 3
        peer.join()
        with pytest.raises(ArenaFullError):  # of its two readers one has not come, and has time
            arena.publish(content(2))
    all_is_well(namespace)
