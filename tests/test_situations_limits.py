"""Limits of a process at each operation: who meets one is told with the system's errno, and nothing is lost or left.

The process that is tested is a child, as limits on its own would hit the test runner; it says "done" when all held."""

import contextlib
import errno
import os
import resource
import signal
from collections.abc import Callable, Iterator

import numpy as np
import pytest

import shmcast
from shmcast import names, process
from situations import (
    MIB,
    all_is_well,
    ended,
    files,
    forked,
    free_again,
    held_open,
    mapped,
    pause_for_ever,
    serves,
    until,
)

BIG = 64 * MIB
"""More than an address space has left that was limited to some megabytes more than are in use."""


def content(value: int, nbytes: int) -> np.ndarray:
    return np.full(nbytes, value, np.uint8)


@contextlib.contextmanager
def limited(kind: int, limit: int) -> Iterator[None]:
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def descriptors(more: int) -> contextlib.AbstractContextManager[None]:
    """Room for so many descriptors beside those that are open."""
    free = [number for number in range(4096) if not os.path.lexists(f"/proc/self/fd/{number}")]
    return limited(resource.RLIMIT_NOFILE, free[more])


def address_space(more: int) -> contextlib.AbstractContextManager[None]:
    """Room for so many bytes beside those that are mapped."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    return limited(resource.RLIMIT_AS, used + more)


def state() -> tuple[list[str], list[str], int]:
    """What a failure must not change."""
    return files(), held_open(), len(os.listdir("/proc/self/fd"))


def fails(limit: contextlib.AbstractContextManager[None], number: int, action: Callable[[], object]) -> None:
    """Under that limit the action raises an OSError that says what and why, and leaves nothing."""
    before = state()
    try:
        with limit:
            action()
    except OSError as error:
        assert error.errno == number, repr(error)
        assert os.strerror(number) in str(error), error
    else:
        raise AssertionError(f"{action} did not fail")
    assert state() == before


def at_each_descriptor(action: Callable[[], object], least: int) -> object:
    """Let each opening of a file fail in turn, then none; returns what it gave in the end."""
    for more in range(100):
        before = state()
        try:
            with descriptors(more):
                result = action()
        except OSError as error:
            assert error.errno == errno.EMFILE, repr(error)
            assert os.strerror(errno.EMFILE) in str(error), error
            assert state() == before
        else:
            assert more >= least, f"needs {more} descriptors, {least} were expected"
            return result
    raise AssertionError("it always fails")


def passes(child, function, *args) -> None:
    peer = child(function, *args)
    while (said := peer.receive()) != "done":
        raise AssertionError(said)
    peer.join()


# ---- RLIMIT_NOFILE


def creates_and_grows(parent) -> None:
    shmcast.Arena.create("1MiB").close()  # whatever is loaded or looked up once
    names.host_id.cache_clear()
    with at_each_descriptor(lambda: shmcast.Arena.create("4MiB", segment_bytes="1MiB"), 2) as arena:
        handles = [arena.publish(content(1, 700_000), readers=0, keep=True)]
        with descriptors(0):
            serves(arena)  # no descriptor is needed for what is there
        for value in (2, 3):
            publish = lambda value=value: arena.publish(content(value, 700_000), readers=0, keep=True)  # noqa: E731
            handles.append(at_each_descriptor(publish, 1))
        with at_each_descriptor(lambda: arena.reserve(700_000, "u1"), 1) as reservation:
            reservation.array[:] = 4
        handles.append(reservation.handle)
        assert [int(shmcast.attach(handle, verify=True).array[9]) for handle in handles] == [1, 2, 3, 4]
        for handle in handles:
            arena.release(handle)
        free_again(arena)
        with descriptors(0):
            arena.close()
    assert files() == []
    parent.send("done")
    parent.receive()


def test_descriptors_run_out_for_an_owner(child, namespace) -> None:
    passes(child, creates_and_grows)
    all_is_well(namespace)


def joins_and_attaches(parent, first: bytes, second: bytes) -> None:
    import shmcast.metrics

    shmcast.metrics.read()
    names.host_id.cache_clear()
    lease = at_each_descriptor(lambda: shmcast.attach(first, verify=True), 2)
    assert (lease.array == 1).all()
    other = at_each_descriptor(lambda: shmcast.attach(second, verify=True), 1)
    assert (other.array == 2).all()
    with descriptors(0):
        again = shmcast.attach(first, verify=True)
        for each in (lease, again, other):
            each.release()
        process.leave_all()
    parent.send("done")
    parent.receive()


def test_descriptors_run_out_for_a_reader(child, namespace) -> None:
    """What was promised to it is there still when it comes again."""
    with shmcast.Arena.create("2MiB", segment_bytes="1MiB") as arena:
        raws = [arena.publish(content(value, 700_000)).to_bytes() for value in (1, 2)]
        passes(child, joins_and_attaches, *raws)
        free_again(arena)
    all_is_well(namespace)


def dies_with_an_arena(ready: int) -> None:
    arena = shmcast.Arena.create("3MiB", segment_bytes="1MiB")
    for value in range(3):
        arena.publish(content(value, 700_000), readers=0, keep=True)
    os.write(ready, b"!")
    pause_for_ever()


def dead_arena() -> None:
    read_fd, write_fd = os.pipe()
    pid = forked(dies_with_an_arena, write_fd)
    assert os.read(read_fd, 1) == b"!"
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    os.close(read_fd)
    os.close(write_fd)


def sweeps(parent) -> None:
    """With too few descriptors it removes all, or leaves all to the next."""
    dead_arena()
    for more in range(10):
        with descriptors(more):
            try:
                report = shmcast.sweep()
            except OSError as error:
                assert error.errno == errno.EMFILE, repr(error)
                report = None
        assert held_open() == []
        if report is not None and report.segments:
            break
        assert len(files()) == 4
    assert more >= 2
    assert len(report.segments) == 4
    parent.send("done")
    parent.receive()


def test_descriptors_run_out_for_a_sweeper(child, namespace) -> None:
    passes(child, sweeps)
    all_is_well(namespace)


def needs_the_room_of_a_dead_reader(parent) -> None:
    """The owner opens the control segment to see whether the holder lives: without a descriptor it can not know."""
    with shmcast.Arena.create("1MiB") as arena:
        raw = arena.publish(content(1, 700_000)).to_bytes()
        read_fd, write_fd = os.pipe()

        def holds() -> None:
            lease = shmcast.attach(raw)
            os.write(write_fd, b"!")
            pause_for_ever()
            lease.release()

        pid = forked(holds)
        assert os.read(read_fd, 1) == b"!"
        os.kill(pid, signal.SIGKILL)
        ended(pid)
        os.close(read_fd)
        os.close(write_fd)
        handle = at_each_descriptor(lambda: arena.publish(content(2, 700_000)), 1)
        assert (shmcast.attach(handle, verify=True).array == 2).all()
    parent.send("done")
    parent.receive()


def test_descriptors_run_out_for_an_owner_that_looks_for_the_dead(child, namespace) -> None:
    passes(child, needs_the_room_of_a_dead_reader)
    all_is_well(namespace)


# ---- RLIMIT_AS


def no_memory_to_create(parent) -> None:
    shmcast.Arena.create("1MiB").close()
    for size, blocks in ((BIG, 1000), (MIB, 1 << 20)):  # the data segment; the control segment
        create = lambda size=size, blocks=blocks: shmcast.Arena.create(size, max_blocks=blocks)  # noqa: E731
        fails(address_space(16 * MIB), errno.ENOMEM, create)
        assert files() == []
        assert mapped() == []
    no_memory_to_grow()
    until(lambda: mapped() == [], "the arena's maintenance thread to let go of it")
    parent.send("done")
    parent.receive()


def no_memory_to_grow() -> None:
    with shmcast.Arena.create("1GiB", segment_bytes="1MiB") as arena:
        kept = arena.publish(content(1, 700_000), readers=0, keep=True)
        fails(address_space(16 * MIB), errno.ENOMEM, lambda: arena.reserve(BIG, "u1"))  # a segment of its own
        with address_space(16 * MIB):
            serves(arena)
            serves(arena, 2 * MIB)  # a smaller one
        reservation = arena.reserve(BIG, "u1")
        reservation.array[:] = 7
        handle = reservation.seal()
        del reservation
        assert shmcast.attach(handle).array[BIG - 1] == 7
        assert (shmcast.attach(kept, verify=True).array == 1).all()


def test_address_space_runs_out_for_an_owner(child, namespace) -> None:
    passes(child, no_memory_to_create)
    all_is_well(namespace)


def no_memory_to_attach(parent, small: bytes, raw: bytes) -> None:
    shmcast.attach(small).release()
    for _ in range(3):
        fails(address_space(16 * MIB), errno.ENOMEM, lambda: shmcast.attach(raw))
        with address_space(16 * MIB):
            assert (shmcast.attach(small, verify=True).array == 1).all()
    with shmcast.attach(raw, verify=True) as lease:
        parent.send("attached")
        assert parent.receive() == "still promised"
        assert lease.array[BIG - 1] == 2
    parent.send("done")
    parent.receive()


def test_address_space_runs_out_for_a_reader(child, namespace) -> None:
    """What it was promised is there still when it has more, and was not used up by trying."""
    with shmcast.Arena.create("80MiB", segment_bytes="1MiB") as arena:
        small = arena.publish(content(1, 5000), readers=0, keep=True)
        big = arena.publish(content(2, BIG))
        peer = child(no_memory_to_attach, small.to_bytes(), big.to_bytes())
        assert peer.receive() == "attached"
        assert arena.stats()["slots_used"] == 2
        peer.send("still promised")
        assert peer.receive() == "done"
        peer.join()
        arena.release(small)
        free_again(arena)
    all_is_well(namespace)


def no_memory_to_join(parent, raw: bytes) -> None:
    fails(address_space(16 * MIB), errno.ENOMEM, lambda: shmcast.attach(raw))
    assert not process.members
    assert mapped() == []
    shmcast.attach(raw, verify=True).release()
    parent.send("done")
    parent.receive()


def test_address_space_runs_out_for_who_joins(child, namespace) -> None:
    with shmcast.Arena.create("1MiB", max_blocks=1 << 20) as arena:
        raw = arena.publish(content(1, 5000)).to_bytes()
        passes(child, no_memory_to_join, raw)
        free_again(arena)
    all_is_well(namespace)


def no_memory_to_map_privately(parent, raw: bytes) -> None:
    import torch

    torch.zeros(3).add_(1)
    with shmcast.attach(raw) as lease:
        for more in (0, 16 * MIB):
            fails(address_space(more), errno.ENOMEM, lease.tensor)
            assert (lease.array == 2).all()
        tensor = lease.tensor()
        tensor[0] = 7
        assert lease.array[0] == 2
        del tensor
    parent.send("done")
    parent.receive()


@pytest.mark.torch
def test_address_space_runs_out_for_a_tensor(child, namespace) -> None:
    with shmcast.Arena.create(BIG) as arena:
        passes(child, no_memory_to_map_privately, arena.publish(content(2, BIG)).to_bytes())
        free_again(arena)
    all_is_well(namespace)


# ---- RLIMIT_FSIZE


def files_may_not_be_long(parent) -> None:
    """Python ignores SIGXFSZ, so that the system's answer is an errno."""
    shmcast.Arena.create("1MiB").close()
    for size, blocks in ((8 * MIB, 100), (MIB, 100_000)):
        create = lambda size=size, blocks=blocks: shmcast.Arena.create(size, max_blocks=blocks)  # noqa: E731
        fails(limited(resource.RLIMIT_FSIZE, 2 * MIB), errno.EFBIG, create)
        assert files() == []
    with shmcast.Arena.create("8MiB", segment_bytes="1MiB") as arena:
        kept = arena.publish(content(1, 700_000), readers=0, keep=True)
        fails(limited(resource.RLIMIT_FSIZE, 2 * MIB), errno.EFBIG, lambda: arena.publish(content(2, 3 * MIB)))
        with limited(resource.RLIMIT_FSIZE, 2 * MIB):
            serves(arena, MIB)
        serves(arena, 3 * MIB)
        assert (shmcast.attach(kept, verify=True).array == 1).all()
    parent.send("done")
    parent.receive()


def test_files_may_not_be_long(child, namespace) -> None:
    passes(child, files_may_not_be_long)
    all_is_well(namespace)


def dies_of_a_long_file(parent) -> None:
    """As in a program that has not made Python's choice: the signal comes in the middle of growing."""
    with shmcast.Arena.create("8MiB", segment_bytes="1MiB") as arena:
        parent.send(arena.publish(content(1, 700_000), readers=0, keep=True).to_bytes())
        parent.receive()
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MIB, 2 * MIB))
        arena.publish(content(2, 3 * MIB))


def test_a_signal_in_the_middle_of_growth(child, namespace) -> None:
    peer = child(dies_of_a_long_file)
    lease = shmcast.attach(peer.receive())
    peer.send("grow")
    peer.wait(-signal.SIGXFSZ)
    assert len(files(namespace)) == 3  # with the one that was being reserved
    assert len(shmcast.sweep().segments) == 3
    lease.verify()
    lease.release()
    all_is_well(namespace)
