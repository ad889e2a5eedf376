"""For tests of unusual situations: processes that fork, stop, and live in namespaces of their own; and the look afterwards.

Whatever has happened, the end of such a test is `all_is_well`: one sweep leaves nothing, and shmcast still serves.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator

import numpy as np

import shmcast
from child import LinkClosedError
from shmcast import names

WAIT_S = 60.0
MIB = 1 << 20
NEW_MOUNTS, NEW_PIDS, NEW_TIMES = 0x20000, 0x20000000, 0x80
_PRIVATE, _RECURSIVE = 1 << 18, 1 << 14
_SET_DEATH_SIGNAL = 1
libc = ctypes.CDLL(None, use_errno=True)


def until(condition: Callable[[], object], what: str) -> None:
    """Look again and again, as there is nothing to wait for; fails after a minute."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {WAIT_S} s for: {what}"
        time.sleep(0.001)


# ---- processes


def state_of(pid: int) -> str:
    """The letter that the kernel has for it: R, S, T (stopped), Z (dead, not reaped); empty: gone."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def stopped(pid: int) -> None:
    """Returns when it has stopped."""

    def look() -> bool:
        state = state_of(pid)
        assert state not in ("", "Z"), f"process {pid} has ended and not stopped"
        return state == "T"

    until(look, f"process {pid} to be stopped")


def stop(pid: int) -> None:
    """SIGSTOP; returns when it has stopped."""
    os.kill(pid, signal.SIGSTOP)
    stopped(pid)


def ended(pid: int) -> int:
    """Wait for a child of this process; its exit status, minus the number of a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def dies_with_us() -> None:
    """In a child: SIGKILL when the parent ends."""
    libc.prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)


def forked(function: Callable[..., object], *args: object, fork: Callable[[], int] = os.fork) -> int:
    """Run a function in a forked child that has all that we have, and ends with it; returns its pid."""
    sys.stdout.flush()
    pid = fork()
    if pid:
        return pid
    status = 1
    try:
        with contextlib.suppress(LinkClosedError):
            function(*args)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def stays_with(pid: int) -> None:
    """In a process that is to be killed before its child: wait for that. A child that ends first has failed."""
    sys.exit(f"forked child {pid} has ended with status {ended(pid)}")


def pause_for_ever() -> None:
    """Do nothing until a signal ends the process."""
    while True:
        signal.pause()


# ---- namespaces


def unshared(flags: int) -> str:
    """Leave these namespaces of the kernel for new ones; empty, or why that can not be done here."""
    if libc.unshare(flags):
        return f"unshare {flags:#x}: {os.strerror(ctypes.get_errno())}"
    return ""


def small_shm(size: str) -> str:
    """A /dev/shm of that size for this process and its children alone; empty, or why not."""
    why = unshared(NEW_MOUNTS)
    if not why and (
        libc.mount(b"none", b"/", None, _PRIVATE | _RECURSIVE, None)
        or libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, f"size={size}".encode())
    ):
        why = f"mount tmpfs on /dev/shm: {os.strerror(ctypes.get_errno())}"
    return why


# ---- what is there


def files(namespace: str | None = None) -> list[str]:
    """Segments in /dev/shm of a namespace, this process's own if none is given."""
    return sorted(names.segment_name(*found)[1:] for found in names.listing(namespace or names.default_namespace()))


def held_open(pid: int | str = "self") -> list[str]:
    """Segments of shmcast that a process has descriptors of; there are none between two calls."""
    found = []
    for entry in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            target = os.readlink(f"/proc/{pid}/fd/{entry}")
            if "shmcast." in target:
                found.append(target)
    return found


def mapped(pid: int | str = "self") -> list[str]:
    """Segments of shmcast that a process has mapped."""
    with open(f"/proc/{pid}/maps") as file:
        return [line.split(maxsplit=5)[5].strip() for line in file if "shmcast." in line]


def serves(arena: shmcast.Arena, nbytes: int = 5000) -> None:
    """What is published can be read, and its room is used again."""
    for value in range(3):
        lease = shmcast.attach(arena.publish(np.full(nbytes, value, np.uint8)), verify=True)
        assert (lease.array == value).all()
        lease.release()


def free_again(arena: shmcast.Arena) -> None:
    """Nobody has a claim on any block once the dead are looked for, without a deadline being waited for."""
    arena._scrub(0)
    assert arena.stats()["slots_used"] == 0


def all_is_well(namespace: str) -> None:
    """One sweep leaves nothing of the namespace, and it can be used as if nothing had been."""
    shmcast.sweep(namespace)
    assert files(namespace) == []
    with shmcast.Arena.create("1MiB", namespace=namespace) as arena:
        serves(arena)
    assert files(namespace) == []
    assert held_open() == []


@contextlib.contextmanager
def ended_at_last(pid: int) -> Iterator[None]:
    """For a process that is nobody's child by now: gone when the test is over."""
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        until(lambda: state_of(pid) in ("", "Z"), f"process {pid} to end")
