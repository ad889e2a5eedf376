"""Blocks that are written in place: sealed, aborted, dropped, and what becomes of the arrays over them."""

import gc

import numpy as np
import pytest

import shmcast
from shmcast.errors import ArenaError

MIB = 1 << 20


def block(nbytes: int, value: int = 1) -> np.ndarray:
    return np.full(nbytes, value, np.uint8)


@pytest.fixture
def arena():
    with shmcast.Arena.create("8MiB") as arena:
        yield arena


def test_reserve_and_seal(arena) -> None:
    with arena.reserve((4, 5), "float32", readers=0, keep=True) as reservation:
        array = reservation.array
        assert array.flags.writeable
        assert array is reservation.array
        array[:] = np.arange(20).reshape(4, 5)
        with pytest.raises(ValueError, match="open"):
            _ = reservation.handle
    handle = reservation.handle
    lease = shmcast.attach(handle, verify=True)
    assert (lease.array == np.arange(20).reshape(4, 5)).all()
    assert handle.digest == shmcast.digest(lease.array)
    with pytest.raises(ValueError, match="read-only"):
        array[0, 0] = 1
    for use in (reservation.seal, lambda: reservation.array):
        with pytest.raises(ValueError, match="sealed"):
            use()
    reservation.abort()  # nothing once sealed
    shmcast.attach(handle).release()


def test_reserve_and_abort(arena) -> None:
    with pytest.raises(KeyError), arena.reserve(MIB, "u1") as reservation:
        reservation.array[:] = 1
        raise KeyError
    assert "aborted" in repr(reservation)
    with pytest.raises(ValueError, match="aborted"):
        reservation.seal()
    with pytest.raises(ValueError, match="aborted"):
        _ = reservation.handle
    reservation.abort()
    arena.publish(block(8 * MIB))


def test_a_dropped_reservation_gives_its_block_back(arena) -> None:
    arena.reserve(8 * MIB, "u1")
    arena.publish(block(8 * MIB))


def test_seal_by_hand_inside_the_block(arena) -> None:
    with arena.reserve(10, np.int16, hash=False, digest=4) as reservation:
        reservation.array[:] = 3
        handle = reservation.seal()
    assert (handle, handle.digest, handle.hash) == (reservation.handle, 4, None)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((), "f8"), ((0, 3), "f8"), (5, [("a", "u1"), ("b", "M8[s]")]), ([2, 3], ">i4")]
)
def test_reserve_forms(arena, shape, dtype) -> None:
    with arena.reserve(shape, dtype) as reservation:
        reservation.array[...] = np.zeros((), dtype)
    seen = shmcast.attach(reservation.handle).array
    assert seen.dtype == np.dtype(dtype)
    assert seen.shape == np.empty(shape).shape


@pytest.mark.parametrize("shape", [-1, (2, -1), (True,), (1.5,), ("3",)])
def test_bad_shapes(arena, shape) -> None:
    with pytest.raises(ValueError, match="shape"):
        arena.reserve(shape, "u1")


@pytest.mark.parametrize("dtype", ["O", "nonsense"])
def test_bad_dtypes(arena, dtype) -> None:
    with pytest.raises(TypeError):
        arena.reserve(3, dtype)


def test_an_open_reservation_when_the_arena_closes() -> None:
    with shmcast.Arena.create("1MiB") as arena:
        reservation = arena.reserve(1000, "u1")
        array = reservation.array
    array[:] = 5
    with pytest.raises(ArenaError, match="closed"):
        reservation.seal()
    reservation.abort()
    del arena, reservation
    gc.collect()
    assert array.sum() == 5000  # the memory stays mapped while an array over it lives


def test_an_array_over_a_sealed_reservation_survives_giving_back() -> None:
    with shmcast.Arena.create("2MiB", segment_bytes="1MiB", idle_timeout=0.01) as arena:
        full = arena.publish(block(MIB), readers=0, keep=True)
        with arena.reserve(MIB, "u1") as reservation:
            array = reservation.array
            array[:] = 7
        assert reservation.handle.segment != full.segment
        shmcast.attach(reservation.handle).release()
        arena._owner.reclaim()
        assert arena._segments.retire(reservation.handle.segment)
        assert array.sum() == 0  # its pages were given back to the host, but it is mapped still
