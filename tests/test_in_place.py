"""Trees that are made in shared memory: what is returned of it is not copied, the rest leaves nothing behind."""

from __future__ import annotations

import gc
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import shmcast
from ranks import in_use
from shmcast import codec
from shmcast.attach import lease_of
from shmcast.errors import ArenaFullError
from shmcast.in_place import MIN_BYTES, InPlace

MIB = 1 << 20
ROWS = (256, 1024)  # of float32: 1 MiB


@pytest.fixture
def arena() -> Iterator[shmcast.Arena]:
    with shmcast.Arena.create("8MiB") as arena:
        yield arena


@pytest.fixture
def place(arena: shmcast.Arena) -> Iterator[InPlace]:
    place = new_place(arena)
    yield place
    place.end()


def new_place(arena: shmcast.Arena | None, **options: Any) -> InPlace:
    return InPlace(arena, tokens=(), keep=True, grant_timeout=None, **options)


def encode(tree: Any, place: InPlace, arena: shmcast.Arena, **options: Any) -> codec.Encoded:
    return codec.encode(
        tree, arena, readers=(), keep=True, grant_timeout=None, min_bytes=1024, in_place=place, **options
    )


def give_back(encoded: codec.Encoded, arena: shmcast.Arena) -> None:
    for handle in encoded.handles:
        assert arena.release(handle)
    assert in_use(arena) == 0


def test_an_array_is_not_copied(arena: shmcast.Arena, place: InPlace) -> None:
    array = place.array(ROWS, "float32")
    assert array.flags.writeable
    array[:] = np.arange(ROWS[1])
    encoded = encode({"x": array}, place, arena)
    assert not array.flags.writeable
    assert [handle.nbytes for handle in encoded.handles] == [MIB]
    assert arena.stats()["published"] == 1
    received = codec.loads(encoded.blob)["x"]
    assert shmcast.attach(encoded.handles[0]).address == received.__array_interface__["data"][0]
    assert received.dtype == np.float32
    assert np.array_equal(received, np.broadcast_to(np.arange(ROWS[1]), ROWS))
    # hashed like everything else that is published
    assert encoded.handles[0].digest == shmcast.digest(received)
    del received
    place.end()
    del array
    give_back(encoded, arena)


def test_parts_of_it_are_not_copied_either(arena: shmcast.Arena, place: InPlace) -> None:
    array = place.array(ROWS, "float32")
    array[:] = np.arange(array.size).reshape(ROWS)
    tree = [array[:128], array[128:].reshape(-1), array[3], array.view("int32"), array]
    expected = [np.array(part) for part in tree]
    encoded = encode(tree, place, arena)
    assert len(encoded.handles) == 1
    received = codec.loads(encoded.blob)
    for got, want in zip(received, expected, strict=True):
        assert got.dtype == want.dtype
        assert np.array_equal(got, want)
        assert not got.flags.writeable
    assert received[3].base is not None
    del received, got, tree, array
    place.end()
    give_back(encoded, arena)


@pytest.mark.torch
def test_tensors_over_it(arena: shmcast.Arena, place: InPlace) -> None:
    import torch

    array = place.array(ROWS, "float32")
    tensor = torch.from_numpy(array)
    tensor[:] = torch.arange(ROWS[1])
    half = tensor[128:]
    encoded = encode({"whole": tensor, "half": half, "bf16": tensor.view(torch.bfloat16)}, place, arena)
    assert len(encoded.handles) == 1
    received = codec.loads(encoded.blob)
    assert torch.equal(received["whole"], torch.arange(ROWS[1], dtype=torch.float32).expand(ROWS))
    assert torch.equal(received["half"], half)
    assert received["bf16"].dtype == torch.bfloat16
    assert torch.equal(received["bf16"].view(torch.float32), tensor)
    del received, tensor, half, array
    place.end()
    give_back(encoded, arena)


def test_what_is_not_in_one_piece_is_copied(arena: shmcast.Arena, place: InPlace) -> None:
    array = place.array(ROWS, "float32")
    array[:] = np.arange(array.size).reshape(ROWS)
    expected = [array.T.copy(), array[:, ::2].copy()]
    encoded = encode([array.T, array[:, ::2]], place, arena)
    assert len(encoded.handles) == 2
    for got, want in zip(codec.loads(encoded.blob), expected, strict=True):
        assert np.array_equal(got, want)
    place.end()
    del array, got
    give_back(encoded, arena)


def test_a_small_part_of_a_large_block_is_copied(arena: shmcast.Arena, place: InPlace) -> None:
    array = place.array(ROWS, "float32")
    array[:] = 5
    encoded = encode({"part": array[7:20]}, place, arena)
    assert [handle.nbytes for handle in encoded.handles] == [13 * 4096]
    assert array.flags.writeable
    place.end()
    assert not array.flags.writeable
    del array
    gc.collect()
    assert arena.stats()["used_bytes"] < MIB
    assert (codec.loads(encoded.blob)["part"] == 5).all()
    give_back(encoded, arena)


def test_blocks_that_are_not_returned_are_given_back(arena: shmcast.Arena, place: InPlace) -> None:
    first, second = place.array(ROWS, "float32"), place.array(ROWS, "float32")
    second[:] = 2
    encoded = encode(second, place, arena)
    place.end()
    del first
    gc.collect()
    assert arena.stats()["used_bytes"] < 2 * MIB
    assert (codec.loads(encoded.blob) == 2).all()
    del second
    give_back(encoded, arena)


def test_small_arrays_are_private(arena: shmcast.Arena, place: InPlace) -> None:
    small = place.array(MIN_BYTES - 1, "u1")
    empty = place.array((0, 3), "f8")
    assert small.flags.writeable
    assert empty.shape == (0, 3)
    assert arena.stats()["used_bytes"] == 0
    small[:] = 3
    encoded = encode([small, empty], place, arena)
    received = codec.loads(encoded.blob)
    assert (received[0] == 3).all()
    assert received[1].shape == (0, 3)
    del received
    give_back(encoded, arena)


def test_a_full_arena_gives_private_memory(arena: shmcast.Arena) -> None:
    lost: list[int] = []
    place = new_place(arena, no_room=lost.append)
    full = arena.publish(np.zeros(7 * MIB, np.uint8), readers=0, keep=True)
    array = place.array(2 * MIB, "u1")
    array[:] = 9
    assert lost == [2 * MIB]
    with pytest.raises(ArenaFullError):
        encode(array, place, arena)
    encoded = encode(array, place, arena, on_full="inline")
    assert encoded.inline_bytes == 2 * MIB
    assert not encoded.handles
    assert (codec.loads(encoded.blob) == 9).all()
    place.end()
    arena.release(full)
    give_back(encoded, arena)


def test_without_an_arena_all_is_private() -> None:
    place = new_place(None)
    array = place.array(ROWS, np.float32)
    array[:] = 1
    assert pickle.loads(pickle.dumps(array)).sum() == array.size
    assert place.spot(array) is None
    place.end()


def test_a_tree_that_can_not_be_pickled_leaves_nothing(arena: shmcast.Arena, place: InPlace) -> None:
    array = place.array(ROWS, "float32")
    with pytest.raises((pickle.PicklingError, AttributeError)):
        encode([array, lambda: None], place, arena)
    place.end()
    del array
    assert in_use(arena) == 0


def test_what_fails_after_a_seal_leaves_nothing(
    arena: shmcast.Arena, place: InPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = place.array(ROWS, "float32")

    def fail(*_: Any) -> Any:
        raise shmcast.PeerLostError("says the test")

    monkeypatch.setattr(shmcast.Arena, "publish_forms", fail)
    with pytest.raises(shmcast.PeerLostError):
        encode([array, np.zeros(100_000)], place, arena)
    place.end()
    del array
    assert in_use(arena) == 0


def test_without_a_slot_for_the_seal_it_travels_in_the_bytes(
    arena: shmcast.Arena, place: InPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = place.array(ROWS, "float32")
    array[:] = 4

    def full(*_: Any) -> Any:
        raise ArenaFullError(28, "no slot (says the test)")

    monkeypatch.setattr(shmcast.Reservation, "seal", full)
    monkeypatch.setattr(shmcast.Arena, "publish_forms", full)
    with pytest.raises(ArenaFullError):
        encode(array, place, arena)
    encoded = encode(array, place, arena, on_full="inline")
    assert encoded.inline_bytes == MIB
    assert (codec.loads(encoded.blob) == 4).all()
    place.end()
    del array
    give_back(encoded, arena)


def test_an_array_of_an_earlier_tree_is_refused(arena: shmcast.Arena, place: InPlace) -> None:
    kept = place.array(ROWS, "float32")
    encoded = encode(kept, place, arena)
    place.end()
    later = new_place(arena)
    for stale in (kept, kept[10:], kept.reshape(-1), kept.T, kept[::-2]):
        with pytest.raises(ValueError, match="was not reserved for this tree"):
            encode({"again": stale}, later, arena)
    later.end()
    del kept, stale
    give_back(encoded, arena)


def test_after_the_end(arena: shmcast.Arena, place: InPlace) -> None:
    place.end()
    place.end()
    for shape in (ROWS, 3):
        with pytest.raises(ValueError, match="has been encoded, or has failed"):
            place.array(shape, "float32")
    assert in_use(arena) == 0


def test_blocks_for_another_process(arena: shmcast.Arena, place: InPlace) -> None:
    assert place.block(100) is None
    found = [place.block(20_000 + number) for number in range(2)]
    assert [(number, array.nbytes) for number, array, _ in found] == [(0, 20_000), (1, 20_001)]
    (_, first, at), (_, second, behind) = (each for each in found if each is not None)
    assert at[0] == behind[0]
    assert at[1] % 4096 == behind[1] % 4096 == 0
    assert second.ctypes.data - first.ctypes.data == behind[1] - at[1]
    second[:] = 3
    encoded = encode({"x": second[:20_000].view("float32")}, place, arena)
    (received,) = codec.loads(encoded.blob).values()
    assert received.tobytes() == bytes([3]) * 20_000
    assert len(encoded.handles) == 1
    del received, first, second, found
    place.end()
    with pytest.raises(ValueError, match="has been encoded, or has failed"):
        place.block(20_000)
    give_back(encoded, arena)


@pytest.mark.parametrize(
    ("shape", "dtype", "error"), [(-1, "u1", ValueError), (3, "O", TypeError), (3, "x", TypeError)]
)
def test_wrong_forms(place: InPlace, shape: Any, dtype: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        place.array(shape, dtype)


def test_arrays_from_several_threads(arena: shmcast.Arena, place: InPlace) -> None:
    arrays: list[Any] = [None] * 4

    def make(number: int) -> None:
        arrays[number] = place.array((64, 1024), "float32")
        arrays[number][:] = number

    threads = [threading.Thread(target=make, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    encoded = encode(arrays, place, arena)
    assert len(encoded.handles) == 4
    received = codec.loads(encoded.blob)
    assert [int(array[0, 0]) for array in received] == [0, 1, 2, 3]
    del received, arrays[:]
    place.end()
    give_back(encoded, arena)


@pytest.mark.parametrize("hashed", [True, False])
def test_hash_is_the_makers_choice(arena: shmcast.Arena, hashed: bool) -> None:
    place = new_place(arena, hash=hashed)
    array = place.array(ROWS, "float32")
    array[:] = 7
    encoded = encode([array], place, arena)
    assert [handle.hash is not None for handle in encoded.handles] == [hashed]
    encoded.withdraw()
    place.end()


@pytest.mark.parametrize("hashed", [True, False])
def test_a_caster_hashes_what_is_made_in_place_unless_told_not_to(hashed: bool) -> None:
    def materialize(raw: int, out: Any) -> Any:
        array = out(ROWS, "float32")
        array[:] = raw
        return array

    with shmcast.Group(max_bytes="32MiB") as group, shmcast.Caster(group, materialize, hash=hashed) as caster:
        (outcome,) = caster.cast([("a", 3)])
        origin = lease_of(outcome.result())
        assert origin is not None
        assert (origin.handle.hash is not None) == hashed
        del outcome, origin
