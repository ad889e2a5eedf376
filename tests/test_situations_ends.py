"""How processes change and end: exec, spawned children, descriptors that somebody closes, exits in the middle, zombies."""

import ctypes
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

import shmcast
from child import Link, untidy
from shmcast.errors import ArenaFullError
from situations import all_is_well, ended, files, forked, free_again, held_open, mapped, pause_for_ever, state_of, until

BIG = 700_000  # in an arena of 1 MiB there is room for one of these
EXIT = {"x86_64": 60, "aarch64": 93}.get(platform.machine())
TELLS = "import os, sys; os.write(int(sys.argv[1]), repr({}).encode() + b'\\n'); sys.stdin.read()"
"""A program that says what it finds, and waits."""
FINDS_NOTHING = TELLS.format(
    "[os.readlink('/proc/self/fd/' + fd) for fd in os.listdir('/proc/self/fd') if int(fd) > 2 and "
    "'shmcast' in os.path.realpath('/proc/self/fd/' + fd)] + [line for line in open('/proc/self/maps') "
    "if 'shmcast.' in line]"
)


def content(value: int, nbytes: int = BIG) -> np.ndarray:
    return np.full(nbytes, value, np.uint8)


def on_standard_descriptors(link: Link) -> Link:
    """The same link over 0 and 1, so that all others may be closed."""
    os.dup2(link._read_fd, 0)
    os.dup2(link._write_fd, 1)
    return Link(0, 1)


# ---- exec


def execs(parent, raw: bytes | None) -> None:
    """A reader, or an owner where there is nothing to read, that becomes another program under its own pid."""
    if raw is None:
        arena = shmcast.Arena.create("1MiB")
        lease = shmcast.attach(arena.publish(content(1), readers=0, keep=True))
        parent.send(lease.handle.to_bytes())
    else:
        lease = shmcast.attach(raw)
        parent.send("attached")
    parent.receive()
    os.set_inheritable(parent._write_fd, True)
    os.dup2(parent._read_fd, 0)
    os.execv(sys.executable, [sys.executable, "-c", FINDS_NOTHING, str(parent._write_fd)])


def test_a_reader_that_execs_holds_nothing(child, namespace) -> None:
    with shmcast.Arena.create("1MiB") as arena:
        peer = child(execs, arena.publish(content(1)).to_bytes())
        assert peer.receive() == "attached"
        with pytest.raises(ArenaFullError):
            arena.publish(content(2))
        peer.send("exec")
        assert peer.receive() == []  # the new program has neither descriptors nor mappings of ours
        assert state_of(peer.pid) in ("R", "S")
        arena.publish(content(2))
        peer.join()
    all_is_well(namespace)


def test_the_arena_of_an_owner_that_execs_is_swept(child, namespace) -> None:
    peer = child(execs, None)
    lease = shmcast.attach(peer.receive())
    assert shmcast.sweep().arenas == 0
    peer.send("exec")
    assert peer.receive() == []
    assert state_of(peer.pid) in ("R", "S")
    assert shmcast.sweep().arenas == 1
    lease.verify()
    lease.release()
    peer.join()
    all_is_well(namespace)


# ---- other programs, started while there is something to inherit


def by_subprocess(command: list[str], fd: int) -> int:
    return subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[fd]).pid


def by_subprocess_with_everything(command: list[str], fd: int) -> int:
    return subprocess.Popen(command, stdin=subprocess.PIPE, close_fds=False).pid


def by_posix_spawn(command: list[str], fd: int) -> int:
    read_fd, _ = os.pipe()
    return os.posix_spawn(command[0], command, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, read_fd, 0)])


WAYS = {
    "subprocess": by_subprocess,
    "subprocess that closes nothing": by_subprocess_with_everything,
    "posix_spawn": by_posix_spawn,
}


def starts_programs(parent, raw: bytes, way: str) -> None:
    """A reader and owner that starts another program, which is there when it is killed."""
    lease = shmcast.attach(raw)
    with shmcast.Arena.create("1MiB") as arena:
        own = arena.publish(content(3), readers=0, keep=True)
        os.set_inheritable(parent._write_fd, True)
        pid = WAYS[way]([sys.executable, "-c", FINDS_NOTHING, str(parent._write_fd)], parent._write_fd)
        parent.send(pid)
        parent.receive()
        assert (shmcast.attach(own).array == 3).all()
        lease.verify()
        parent.send("whole")
        pause_for_ever()


@pytest.mark.parametrize("way", list(WAYS))
def test_programs_that_are_started_inherit_nothing(child, namespace, way) -> None:
    with shmcast.Arena.create("1MiB") as arena:
        peer = child(starts_programs, arena.publish(content(1)).to_bytes(), way)
        said = [peer.receive(), peer.receive()]
        assert [] in said
        said.remove([])
        pid = said[0]
        peer.send("look")
        assert peer.receive() == "whole"
        assert shmcast.sweep().arenas == 0
        os.kill(pid, signal.SIGSTOP)  # or it would end with the pipe that it reads
        peer.kill()
        assert state_of(pid) not in ("", "Z")
        assert shmcast.sweep().arenas == 1
        arena.publish(content(2))
        os.kill(pid, signal.SIGKILL)
    all_is_well(namespace)


def looks(raw: bytes, results) -> None:
    with untidy():  # however this worker was started
        lease = shmcast.attach(raw, verify=True)
        results.put((int(lease.array[9]), len(held_open())))
        del lease


def uses_multiprocessing(parent, raw: bytes, method: str) -> None:
    context = multiprocessing.get_context(method)
    lease = shmcast.attach(raw)
    with shmcast.Arena.create("1MiB") as arena:
        own = arena.publish(content(3), readers=0, keep=True)
        results = context.Queue()
        workers = [context.Process(target=looks, args=(each, results)) for each in (raw, own.to_bytes())]
        for worker in workers:
            worker.start()
        parent.send(sorted(results.get(timeout=60) for _ in workers))
        for worker in workers:
            worker.join()
        parent.send([worker.exitcode for worker in workers])
        parent.receive()
        lease.verify()
        arena._scrub(0)
        assert arena.stats()["slots_used"] == 1
        assert (shmcast.attach(own).array == 3).all()
    lease.release()


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_workers_of_multiprocessing(child, namespace, method) -> None:
    """A handle goes to a worker, which is a process of its own however it was started; resource trackers touch nothing."""
    with shmcast.Arena.create("1MiB") as arena:
        peer = child(uses_multiprocessing, arena.publish(content(1)).to_bytes(), method)
        assert peer.receive() == [(1, 0), (3, 0)]
        assert peer.receive() == [0, 0]
        assert shmcast.sweep().arenas == 0
        with pytest.raises(ArenaFullError):
            arena.publish(content(2))
        peer.send("end")
        peer.join()
        free_again(arena)
    all_is_well(namespace)


# ---- descriptors that somebody else closes


def reader_without_descriptors(parent, raws: list[bytes]) -> None:
    link = on_standard_descriptors(parent)
    lease = shmcast.attach(raws[0])
    os.closerange(3, 4096)
    link.send(len(mapped()))
    link.receive()
    lease.verify()
    for raw in raws[1:]:  # of the same segment, of another segment, of another arena
        with shmcast.attach(raw, verify=True) as other:
            link.send(int(other.array[0]))
    link.receive()
    lease.release()
    link.send("released")
    link.receive()


def test_a_reader_whose_descriptors_are_closed_is_alive(child, namespace) -> None:
    with shmcast.Arena.create("2MiB", segment_bytes="1MiB") as arena, shmcast.Arena.create("1MiB") as other:
        first = arena.publish(content(1))
        raws = [arena.publish(content(n, nbytes)).to_bytes() for n, nbytes in ((2, 1000), (3, BIG))]
        raws = [first.to_bytes(), *raws, other.publish(content(4)).to_bytes()]
        peer = child(reader_without_descriptors, raws)
        assert peer.receive() == 3  # the page of the lock, control, data
        assert arena._member.sweep_peers() == 0
        with pytest.raises(ArenaFullError):
            arena.publish(content(5, 2 * BIG))
        peer.send("attach")
        assert [peer.receive() for _ in raws[1:]] == [2, 3, 4]
        peer.send("release")
        assert peer.receive() == "released"
        assert arena._member.sweep_peers() == 0
        assert arena.stats()["slots_used"] == 0
        peer.kill()
        assert arena._member.sweep_peers() == 1
    all_is_well(namespace)


def owner_without_descriptors(parent) -> None:
    link = on_standard_descriptors(parent)
    with shmcast.Arena.create("4MiB", segment_bytes="1MiB", idle_timeout=0) as arena:
        os.closerange(3, 4096)
        handles = [arena.publish(content(n), readers=0, keep=True) for n in range(4)]  # grows
        link.send([handle.to_bytes() for handle in handles])
        link.receive()
        for handle in handles:
            arena.release(handle)
        arena.publish(content(7, 3 << 20), timeout=60)  # idle segments make way for one that is large enough
        link.send("published")
        link.receive()


@pytest.mark.parametrize("end", ["close", "kill"])
def test_an_owner_whose_descriptors_are_closed_is_alive(child, namespace, end) -> None:
    peer = child(owner_without_descriptors)
    for n, raw in enumerate(peer.receive()):
        with shmcast.attach(raw, verify=True) as lease:
            assert lease.array[0] == n
        assert shmcast.sweep().arenas == 0
    peer.send("go on")
    assert peer.receive() == "published"
    assert shmcast.sweep().arenas == 0
    if end == "close":
        peer.send("end")
        peer.wait()
        assert files(namespace) == []
    else:
        peer.kill()
        assert shmcast.sweep().arenas == 1
    all_is_well(namespace)


# ---- ends in the middle of something


def ends_with_leases(parent, raw: bytes, end: str) -> None:
    leases = [shmcast.attach(raw) for _ in range(3)]
    arrays = [lease.array for lease in leases]
    arena = shmcast.Arena.create("1MiB")
    own = shmcast.attach(arena.publish(content(3), readers=0, keep=True))
    reservation = arena.reserve(1000, "u1").__enter__()
    parent.send(own.handle.to_bytes())
    parent.receive()
    if end == "os._exit":
        os._exit(0)
    if end == "sys.exit":
        sys.exit(0)
    if end == "SystemExit of a thread":
        thread = threading.Thread(target=sys.exit, args=(1,))
        thread.start()
        thread.join()
    if end == "abort":
        os.abort()
    if end == "SIGSEGV":
        ctypes.string_at(8)
    if end == "exec of what is not there":
        with pytest.raises(FileNotFoundError):
            os.execv("/nowhere", ["nowhere"])
        assert (arrays[0] == 1).all() and not own.released
        return
    assert arrays and reservation


ENDS = {
    "os._exit": 0,
    "sys.exit": 0,
    "SystemExit of a thread": 0,
    "return": 0,
    "abort": -signal.SIGABRT,
    "SIGSEGV": -signal.SIGSEGV,
    "exec of what is not there": 0,
}


@pytest.mark.parametrize("end", list(ENDS))
def test_an_end_in_the_middle_of_leases(child, namespace, end) -> None:
    with shmcast.Arena.create("1MiB") as arena:
        peer = child(ends_with_leases, arena.publish(content(1)).to_bytes(), end)
        raw = peer.receive()
        assert shmcast.sweep().arenas == 0
        lease = shmcast.attach(raw)
        peer.send("end")
        peer.wait(ENDS[end])
        assert shmcast.sweep().arenas == 1
        lease.verify()
        lease.release()
        arena.publish(content(2))
        free = arena._member.tokens()
        assert len(free) == 1, free
    all_is_well(namespace)


def fails_in_a_thread(parent, raw: bytes) -> None:
    """A thread that dies of an exception takes its lease with it, and nobody else's."""
    kept = shmcast.attach(raw[0])
    failures = []

    def work() -> None:
        lease = shmcast.attach(raw[1])
        array = lease.array
        raise RuntimeError(f"in the middle of {array.nbytes} bytes of {lease}")

    threading.excepthook = lambda failure: failures.append(str(failure.exc_value))
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    del thread
    parent.send(failures)
    parent.receive()
    kept.verify()
    parent.send("whole")
    parent.receive()
    kept.release()


def test_an_exception_in_a_thread(child, namespace) -> None:
    with shmcast.Arena.create("2MiB", segment_bytes="2MiB") as arena:
        raws = [arena.publish(content(n)).to_bytes() for n in (1, 2)]
        peer = child(fails_in_a_thread, raws)
        assert len(peer.receive()) == 1
        assert arena.stats()["slots_used"] == 1
        arena.publish(content(3), readers=0, keep=True)
        peer.send("look")
        assert peer.receive() == "whole"
        peer.join()
    all_is_well(namespace)


# ---- between life and death


def zombie(parent, raw: bytes) -> None:
    """A parent that does not reap: owner and reader are dead as soon as they are killed."""
    read_fd, write_fd = os.pipe()

    def victim() -> None:
        lease = shmcast.attach(raw)
        arena = shmcast.Arena.create("1MiB")
        os.write(write_fd, b"!")
        pause_for_ever()
        lease.release()
        arena.close()

    pid = forked(victim)
    assert os.read(read_fd, 1) == b"!"
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    parent.send(pid)
    parent.receive()
    parent.send(ended(pid))


def test_a_zombie_is_dead(child, namespace) -> None:
    with shmcast.Arena.create("1MiB") as arena:
        peer = child(zombie, arena.publish(content(1)).to_bytes())
        pid = peer.receive()
        assert state_of(pid) == "Z"
        assert shmcast.sweep().arenas == 1
        arena.publish(content(2))
        assert state_of(pid) == "Z"
        peer.send("reap")
        assert peer.receive() == -signal.SIGKILL
        peer.join()
    all_is_well(namespace)


def without_its_main_thread(parent, raw: bytes) -> None:
    lease = shmcast.attach(raw)
    arena = shmcast.Arena.create("1MiB")

    def goes_on() -> None:
        until(lambda: state_of(os.getpid()) == "Z", "the main thread to end")
        parent.send(arena.publish(content(3), readers=0, keep=True).to_bytes())
        parent.receive()
        lease.verify()
        arena.close()
        parent.send("closed")
        os._exit(0)

    threading.Thread(target=goes_on).start()
    ctypes.CDLL(None).syscall(EXIT, 0)


@pytest.mark.skipif(EXIT is None, reason="the number of exit is not known here")
def test_a_process_without_its_main_thread_looks_like_a_zombie_and_is_alive(child, namespace) -> None:
    with shmcast.Arena.create("1MiB") as arena:
        peer = child(without_its_main_thread, arena.publish(content(1)).to_bytes())
        lease = shmcast.attach(peer.receive(), verify=True)
        assert state_of(peer.pid) == "Z"
        assert shmcast.sweep().arenas == 0
        assert arena._member.sweep_peers() == 0
        with pytest.raises(ArenaFullError):
            arena.publish(content(2))
        lease.release()
        peer.send("close")
        assert peer.receive() == "closed"
        peer.wait()
        arena.publish(content(2))
    all_is_well(namespace)
