"""Windows: one block of an arena in the hands of another process, and nothing else."""

from __future__ import annotations

import mmap
import os
import signal
from collections.abc import Callable, Iterator

import numpy as np
import pytest

import shmcast
from child import Child, Link
from shmcast import _native, names
from shmcast.errors import LayoutMismatchError

PAGE = mmap.PAGESIZE
MIB = 1 << 20


@pytest.fixture
def arena() -> Iterator[shmcast.Arena]:
    with shmcast.Arena.create("32MiB") as arena:
        yield arena


@pytest.fixture
def block(arena: shmcast.Arena) -> Iterator[tuple[shmcast.Reservation, int, int]]:
    """A block that does not lie at the start of its segment, a descriptor of that, and where it lies."""
    before = arena.reserve(20_000, "uint8", keep=True)
    reservation = arena.reserve(5 * MIB + 100, "uint8", keep=True)
    number, offset = reservation.place
    assert offset >= 20_000
    fd = names.open_writable(names.segment_name(arena.namespace, arena.id, number))
    try:
        yield reservation, fd, offset
    finally:
        os.close(fd)
        before.abort()
        reservation.abort()


def test_what_is_written_is_there(block: tuple[shmcast.Reservation, int, int], rng: np.random.Generator) -> None:
    reservation, fd, offset = block
    for size in (16384, MIB, 5 * MIB + 100):
        window = _native.Window(fd, offset, size)
        array = np.frombuffer(window, np.uint8)
        assert array.size == size
        written = rng.integers(0, 256, size, np.uint8)
        array[:] = written
        assert (reservation.array[:size] == written).all()
        window.close()
        window.close()
        assert not array.any()
        array[:] = 7  # somebody has kept it
        assert (reservation.array[:size] == written).all()
        with pytest.raises(BufferError, match="closed"):
            memoryview(window)


@pytest.mark.parametrize(
    ("offset", "size"), [(1, 16384), (PAGE - 64, 16384), (0, 16383), (0, 0), (0, 2**63), (2**64 - PAGE, 16384)]
)
def test_what_is_no_block(block: tuple[shmcast.Reservation, int, int], offset: int, size: int) -> None:
    _, fd, _ = block
    with pytest.raises((ValueError, LayoutMismatchError)):
        _native.Window(fd, offset, size)


def test_what_is_not_in_the_segment(block: tuple[shmcast.Reservation, int, int]) -> None:
    _, fd, _ = block
    length = os.fstat(fd).st_size
    with pytest.raises(LayoutMismatchError, match=f"{length} bytes long, {length + PAGE} are needed"):
        _native.Window(fd, length - 16384, 16384 + PAGE)
    with pytest.raises(OSError, match="open window"):
        _native.Window(10_000, 0, 16384)
    with pytest.raises(TypeError):
        _native.Window(fd, 0)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        _native.Window(fd, 0, 16384, size=1)  # type: ignore[call-arg]


def write_at(parent: Link, name: str, offset: int, size: int, at: int) -> None:
    fd = names.open_writable(name)
    window = _native.Window(fd, offset, size)
    address = np.frombuffer(window, np.uint8).ctypes.data
    import ctypes

    parent.send("there")
    ctypes.memset(address + at, 255, 1)


@pytest.mark.parametrize("size", [20_000, 5 * MIB + 100])
def test_outside_of_it(
    block: tuple[shmcast.Reservation, int, int], arena: shmcast.Arena, child: Callable[..., Child], size: int
) -> None:
    reservation, _, offset = block
    name = names.segment_name(arena.namespace, arena.id, reservation.place[0])
    for at, status in ((-1, -signal.SIGSEGV), (size + -size % PAGE, -signal.SIGSEGV), (size - 1, 0)):
        writer = child(write_at, name, offset, size, at)
        assert writer.receive() == "there"
        writer.wait(status)


def test_children_do_not_get_it(block: tuple[shmcast.Reservation, int, int]) -> None:
    _, fd, offset = block
    window = _native.Window(fd, offset, MIB)
    array = np.frombuffer(window, np.uint8)
    pid = os.fork()
    if not pid:
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        array[0] = 1
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGSEGV
    window.close()


def test_end_with_parent(child: Callable[..., Child]) -> None:
    assert child(end_with, 1).receive() is False
    assert child(end_with, os.getpid()).receive() is True


def end_with(parent: Link, pid: int) -> None:
    parent.send(_native.end_with_parent(pid))


def test_keep_freed(child: Callable[..., Child]) -> None:
    assert child(keep_freed).receive() in (True, False)  # as the C library can


def keep_freed(parent: Link) -> None:
    parent.send(_native.keep_freed(1 << 40))
    with pytest.raises(TypeError):
        _native.keep_freed("all")  # type: ignore[arg-type]
