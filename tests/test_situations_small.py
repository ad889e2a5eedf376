"""A /dev/shm of one megabyte: full is an error with words, never SIGBUS, and what the dead have left makes room.

Needs the right to mount (root, as a rule) and is skipped, with the reason, where there is none. In such a namespace of
mounts everything is one child of the test with processes of its own; it says "done" when all held."""

import errno
import gc
import os
import signal
import threading

import numpy as np
import pytest

import shmcast
from shmcast import names
from shmcast.errors import ArenaFullError
from situations import (
    all_is_well,
    ended,
    files,
    forked,
    free_again,
    held_open,
    pause_for_ever,
    serves,
    small_shm,
    stop,
    until,
)

KIB = 1 << 10
STEP = 100 * KIB
"""A segment, and a block that fills it."""


def content(value: int, nbytes: int = STEP) -> np.ndarray:
    return np.full(nbytes, value, np.uint8)


def arena(**options: object) -> shmcast.Arena:
    """As small as it gets: some 300 KiB of control segment, one data segment."""
    return shmcast.Arena.create("64MiB", **{"segment_bytes": STEP, "max_blocks": 64, **options})


def in_the_small(parent, scenario: str) -> None:
    why = small_shm("1m")
    if why:
        parent.send(why)
        return
    SCENARIOS[scenario]()
    assert os.listdir("/dev/shm") == [], os.listdir("/dev/shm")
    until(gives_all_back, "what was mapped to be let go of, also by threads")
    all_is_well_in_a_megabyte()
    parent.send("done")
    parent.receive()


def gives_all_back() -> bool:
    gc.collect()
    free, total = names.room()
    return free == total


def all_is_well_in_a_megabyte() -> None:
    with arena() as fresh:
        serves(fresh)
    assert os.listdir("/dev/shm") == []
    assert held_open() == []


def full(action) -> None:
    """Refused for want of room on the host, with words about it."""
    before = os.listdir("/dev/shm")
    try:
        action()
    except ArenaFullError as error:
        assert error.errno == errno.ENOSPC
        assert "/dev/shm has" in str(error) and "--shm-size" in str(error), error
    else:
        raise AssertionError("there was room")
    # Maintenance threads grow ahead, here and elsewhere; they, too, leave nothing where that fails.
    until(lambda: set(os.listdir("/dev/shm")) <= set(before), "what was begun to be taken back")


def other(function) -> int:
    """A process beside this one that runs the function and then waits to be killed; returns once it has run it."""
    read_fd, write_fd = os.pipe()

    def run() -> None:
        kept = function()
        os.write(write_fd, b"!")
        pause_for_ever()
        del kept

    pid = forked(run)
    os.close(write_fd)
    assert os.read(read_fd, 1) == b"!"
    os.close(read_fd)
    return pid


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    assert ended(pid) == -signal.SIGKILL


def fill(one: shmcast.Arena) -> list[shmcast.Handle]:
    """Publish until the host is full."""
    handles: list[shmcast.Handle] = []
    try:
        while True:
            handles.append(one.publish(content(len(handles)), readers=0, keep=True))
    except ArenaFullError as error:
        assert error.errno == errno.ENOSPC and "/dev/shm has" in str(error), error
    return handles


def whole(handles: list[shmcast.Handle]) -> None:
    for n, handle in enumerate(handles):
        with shmcast.attach(handle, verify=True) as lease:
            assert (lease.array == n).all()


# ---- scenarios


def grow_until_full() -> None:
    """Publish, grow, be refused, give back, publish again: many times, and nothing is used up by it."""
    with arena(idle_timeout=1000) as one:
        rounds = set()
        for _ in range(5):
            handles = fill(one)
            rounds.add(len(handles))
            whole(handles)
            full(lambda: one.publish(content(9, 3 * STEP)))
            full(lambda: one.reserve(3 * STEP, "u1"))
            whole(handles)
            for handle in handles:
                one.release(handle)
            free_again(one)
        assert len(rounds) == 1 and rounds.pop() >= 5
        with one._segments.lock:
            assert len(files()) == one.stats()["segments"] + 1


def full_midway() -> None:
    """posix_fallocate fails half way: what it had got goes back, and the name with it."""
    with arena() as one, one._segments.lock:  # its maintenance thread grows nothing meanwhile
        handle = one.publish(content(0), readers=0, keep=True)
        free, _ = names.room()
        full(lambda: one.publish(content(1, free + 4096)))
        assert names.room()[0] == free
        whole([handle])
        one.publish(content(1, free))  # all that there is
        assert names.room()[0] == 0
        whole([handle])
        full(lambda: one.publish(content(2)))
        assert len(files()) == one.stats()["segments"] + 1


def other_files_fill_it() -> None:
    """Somebody else's file takes the room: there is some again when it goes, also for who waits."""
    with arena() as one:
        handle = one.publish(content(0), readers=0, keep=True)
        with open("/dev/shm/somebody.else", "wb") as file:
            with one._segments.lock, pytest.raises(OSError):  # its maintenance thread is not in the middle of growing
                while True:
                    file.write(bytes(4096))
                    file.flush()
            whole(fill(one))  # it may have grown ahead before
            whole([handle])
            os.unlink(file.name)
            full(lambda: one.publish(content(1)))
            goes = threading.Thread(target=file.close)
            goes.start()
            again = one.publish(content(1), readers=0, keep=True, timeout=60)
            goes.join()
        whole([handle, again])


def dead_owner_fills_it() -> None:
    """A leftover that fills /dev/shm does not stop a new arena: create sweeps first."""
    pid = other(fill_and_keep)
    assert names.room()[0] < STEP
    full(arena)
    stop(pid)
    full(arena)  # alive all the same
    kill(pid)
    with arena() as one:
        serves(one)
        assert len(files()) == 2


def fill_and_keep() -> object:
    one = arena()
    return one, fill(one)


def dead_owner_makes_room_for_a_living_one() -> None:
    """Who is refused can sweep, and so can anybody; a publish that waits then goes on."""
    with arena() as one:
        serves(one)
        pid = other(fill_and_keep)
        serves(one)
        full(lambda: one.publish(content(1, 3 * STEP)))
        kill(pid)
        waiting = threading.Thread(target=shmcast.sweep)
        waiting.start()
        handle = one.publish(content(0, 3 * STEP), readers=0, keep=True, timeout=60)
        waiting.join()
        whole([handle])


def readers_keep_what_is_swept() -> None:
    """Pages that a reader of a swept arena has mapped are room only when it lets go: no bytes change under it."""
    read_fd, write_fd = os.pipe()

    def owns() -> object:
        one = arena()
        handles = fill(one)
        os.write(write_fd, repr([handle.to_bytes() for handle in handles]).encode() + b"\n")
        return one

    pid = other(owns)
    raws = eval(os.read(read_fd, 1 << 16))
    os.close(read_fd)
    os.close(write_fd)
    leases = [shmcast.attach(raw) for raw in raws]
    kill(pid)
    assert shmcast.sweep().arenas == 1
    full(lambda: shmcast.Arena.create("64MiB", segment_bytes=4 * STEP, max_blocks=64))
    for n, lease in enumerate(leases):
        lease.verify()
        assert (lease.array == n).all()
        lease.release()
    del lease, leases
    shmcast.process.leave_all()
    with arena() as one:
        serves(one)
        whole(fill(one))


def killed_while_it_grows() -> None:
    """Again and again: an owner at work in a full /dev/shm is killed, whatever it is doing, and the next one starts."""
    for _ in range(10):
        read_fd, write_fd = os.pipe()

        def works(write_fd: int = write_fd) -> None:
            with arena(idle_timeout=0.0) as one:
                while True:
                    handles = []
                    try:
                        while True:
                            handles.append(one.publish(content(1), readers=0, keep=True))
                    except ArenaFullError:
                        os.write(write_fd, b"!")
                    for handle in handles:
                        one.release(handle)
                    one._keep_once()

        pid = forked(works)
        os.close(write_fd)
        for _ in range(3):
            assert os.read(read_fd, 1)
        kill(pid)
        os.close(read_fd)
        with arena() as one:
            serves(one)
            assert len(files()) == 2


SCENARIOS = {
    each.__name__: each
    for each in (
        grow_until_full,
        full_midway,
        other_files_fill_it,
        dead_owner_fills_it,
        dead_owner_makes_room_for_a_living_one,
        readers_keep_what_is_swept,
        killed_while_it_grows,
    )
}


@pytest.mark.parametrize("scenario", list(SCENARIOS))
def test_in_a_megabyte(child, namespace, scenario) -> None:
    peer = child(in_the_small, scenario)
    if (said := peer.receive()) != "done":
        pytest.skip(f"needs a /dev/shm of its own: {said}")
    peer.join()
    all_is_well(namespace)
