"""Trees as bytes: arrays leave the pickle and come back as views; nothing stays behind when something goes wrong."""

import copy
import dataclasses
import gc
import pickle
import random
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import shmcast
from shmcast import arrays, codec
from shmcast.attach import lease_of
from shmcast.errors import (
    ArenaFullError,
    HandleError,
    PeerLostError,
    ShmcastError,
    StaleHandleError,
    UnsupportedArrayError,
)

BIG = 50_000


@pytest.fixture
def arena():
    with shmcast.Arena.create("8MiB") as arena:
        yield arena


def numbers(start: int = 0) -> np.ndarray:
    return np.arange(start, start + BIG, dtype=np.int32)


@dataclasses.dataclass
class Item:
    pixels: Any
    rows: list
    name: str = "item"


class Slotted:
    __slots__ = ("array", "other")

    def __init__(self, array) -> None:
        self.array = array
        self.other = {"again": array}


class Lazy:
    """Materializes only when it is pickled."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.made = None

    def __getstate__(self):
        return {"count": self.count, "made": np.full(self.count, 7, np.uint8)}


class Reduced:
    def __init__(self, array=None) -> None:
        self.array = array

    def __reduce_ex__(self, protocol):
        return Reduced, (np.full(BIG, 9, np.uint8),)


class Unpicklable:
    def __reduce_ex__(self, protocol):
        raise RuntimeError("not me")


class Loud(np.ndarray):
    """A subclass is its own business."""


def test_a_tree_of_everything(arena) -> None:
    array = numbers()
    tree = {
        "item": Item(array, [array, numbers(5)]),
        "slotted": Slotted(numbers(9)),
        "pair": (array.reshape(5, -1), OrderedDict(a=numbers(1))),
        "small": np.arange(5),
        "plain": [1, "two", None, {3.0}, b"four", range(5)],
        "lazy": Lazy(BIG),
        "reduced": Reduced(),
    }
    blob = shmcast.dumps(tree, arena)
    assert len(blob) < 6000
    seen = shmcast.loads(blob)
    assert isinstance(seen["item"], Item)
    assert (seen["item"].pixels == array).all()
    assert seen["item"].pixels is seen["item"].rows[0]  # once there, once here
    assert (seen["item"].rows[1] == numbers(5)).all()
    assert (seen["slotted"].array == numbers(9)).all()
    assert seen["slotted"].other["again"] is seen["slotted"].array
    assert (seen["pair"][0] == array.reshape(5, -1)).all()
    assert (seen["pair"][1]["a"] == numbers(1)).all()
    assert (seen["small"] == np.arange(5)).all()
    assert seen["plain"] == tree["plain"]
    assert seen["lazy"].made.sum() == 7 * BIG
    assert seen["reduced"].array.sum() == 9 * BIG
    assert not seen["item"].pixels.flags.writeable
    assert lease_of(seen["item"].pixels) is not None
    assert lease_of(seen["small"]) is None


def test_leases_live_as_long_as_the_arrays(arena) -> None:
    seen = shmcast.loads(shmcast.dumps([numbers(), numbers(1)], arena))
    slots = arena.stats()["slots_used"]
    first = seen[0][10:20]
    del seen
    gc.collect()
    arena.publish(np.zeros(1), keep=True)
    assert arena.stats()["slots_used"] == slots  # one has gone, one has come
    assert (first == np.arange(10, 20)).all()


def test_without_an_arena_everything_is_inline() -> None:
    tree = [numbers(), {"a": np.arange(3)}]
    blob = shmcast.dumps(tree)
    assert len(blob) > 4 * BIG
    seen = shmcast.loads(blob)
    assert (seen[0] == tree[0]).all()
    assert lease_of(seen[0]) is None
    assert shmcast.digest(seen[0]) == shmcast.digest(tree[0])


def test_min_bytes(arena) -> None:
    array = np.arange(10, dtype=np.uint8)
    assert lease_of(shmcast.loads(shmcast.dumps(array, arena))) is None
    assert lease_of(shmcast.loads(shmcast.dumps(array, arena, min_bytes=10))) is not None
    assert lease_of(shmcast.loads(shmcast.dumps(array, arena, min_bytes=11))) is None


def test_any_layout_and_dtype(arena) -> None:
    square = np.arange(40_000, dtype=">f8").reshape(200, 200)
    tree = {
        "fortran": np.asfortranarray(square),
        "strided": square[::2],
        "reversed": square[::-1, ::-1],
        "structured": np.zeros(20_000, [("a", "u1"), ("b", "M8[s]")]),
        "text": np.full(20_000, "ab", "U5"),
        "broadcast": np.broadcast_to(np.arange(200.0), (200, 200)),
    }
    seen = shmcast.loads(shmcast.dumps(tree, arena))
    for name, original in tree.items():
        assert (seen[name].dtype, seen[name].shape) == (original.dtype, original.shape), name
        assert seen[name].tobytes() == original.tobytes(), name
        assert lease_of(seen[name]) is not None, name


def test_what_can_not_be_shared_is_pickled(arena) -> None:
    objects = np.array([1, "a", None] * 10_000, dtype=object)
    masked = np.ma.masked_array(numbers(), numbers() % 2)
    seen = shmcast.loads(shmcast.dumps([objects, masked, numbers().view(Loud)], arena))
    assert seen[0].tolist() == objects.tolist()
    assert (seen[1].mask == masked.mask).all()
    assert type(seen[2]) is Loud


# ---- views of blocks


def test_views_travel_as_what_they_are(arena) -> None:
    """Without a copy and without an arena; parts as parts."""
    handle = arena.publish(numbers(), readers=0, keep=True)
    array = shmcast.attach(handle).array
    before = arena.stats()["used_bytes"]
    for where in (None, arena):
        blob = shmcast.dumps({"all": array, "part": array[1000:], "other": array.reshape(100, -1)}, where)
        seen = shmcast.loads(blob)
        assert arena.stats()["used_bytes"] == before
        assert lease_of(seen["all"]).handle.offset == handle.offset
        assert (seen["part"] == numbers()[1000:]).all()
        assert lease_of(seen["part"]).handle.offset == handle.offset + 4000
        assert seen["other"].shape == (100, 500)
        del seen


def test_a_view_that_is_not_contiguous_is_copied(arena) -> None:
    array = shmcast.attach(arena.publish(numbers().reshape(100, -1), readers=0, keep=True)).array
    seen = shmcast.loads(shmcast.dumps(array.T, arena))
    assert (seen == array.T).all()
    seen = shmcast.loads(shmcast.dumps(array.T))
    assert (seen == array.T).all()
    assert lease_of(seen) is None


def reader(parent, blob: bytes) -> None:
    tree = shmcast.loads(blob)
    parent.send(shmcast.process_token())
    parent.receive()
    parent.send([array.tobytes() for array in tree])


def passes_on(parent, blob: bytes) -> None:
    """Rank 0 of the other topology: what it has been given goes on to the others, who may come after it has gone."""
    tree = shmcast.loads(blob)
    while True:
        readers = parent.receive()
        parent.send(shmcast.dumps([tree[1], tree[0]], readers=readers))


@pytest.mark.parametrize("readers", ["by token", 1])
def test_pass_on_without_an_arena(child, arena, readers) -> None:
    last = child(reader, shmcast.dumps([numbers()], arena))
    token = last.receive()
    middle = child(passes_on, shmcast.dumps([numbers(), numbers(7)], arena))
    middle.send([token] if readers == "by token" else readers)
    blob = middle.receive()
    middle.kill()
    arena.publish(np.zeros(1))
    peer = child(reader, blob)
    peer.receive()
    peer.send()
    assert peer.receive() == [numbers(7).tobytes(), numbers().tobytes()]


def passes_parts_on(parent, blob: bytes) -> None:
    """Several views of one block in one message."""
    (array,) = shmcast.loads(blob)
    again = shmcast.attach(lease_of(array).handle).array  # another lease on the same block
    parent.send(shmcast.dumps([array[:200], array[200:], array, again], readers=[parent.receive()], min_bytes=1))
    del array, again
    parent.send("dropped")
    parent.receive()


def test_parts_of_one_block_are_passed_on_once(child, arena) -> None:
    """A second grant to the same process would make the owner trustee, and the block would stay after all have let go."""
    last = child(drops_all)
    last.send(shmcast.dumps([numbers()], arena))
    token = last.receive()
    middle = child(passes_parts_on, shmcast.dumps([numbers(7)], arena))
    middle.send(token)
    blob = middle.receive()
    assert middle.receive() == "dropped"
    last.send(blob)
    assert last.receive() == token
    assert arena.stats()["slots_used"] == 0


def drops_all(parent) -> None:
    while True:
        tree = shmcast.loads(parent.receive())
        assert sum(array.nbytes for array in tree) in (BIG * 4, 3 * BIG * 4)
        del tree
        parent.send(shmcast.process_token())


# ---- encode, as a group uses it


def test_encode_for_named_readers(child, arena) -> None:
    foreign = shmcast.Arena.create("1MiB")
    peer = child(reader, shmcast.dumps([numbers()], arena))
    token = peer.receive()
    other = shmcast.attach(foreign.publish(numbers(3), readers=0, keep=True)).array
    encoded = codec.encode(
        [numbers(), other, np.arange(3)],
        arena,
        readers=[token],
        keep=True,
        grant_timeout=None,
        min_bytes=1000,
        on_full="raise",
    )
    assert [handle.shape for handle in encoded.handles] == [(BIG,)]
    assert [lease.handle.arena for lease in encoded.leases] == [foreign.id]
    assert encoded.inline_bytes == 0
    seen = shmcast.loads(encoded.blob)
    assert (seen[1] == numbers(3)).all()
    own = shmcast.attach(encoded.handles[0])
    assert own.pending([token]) == 1
    own.release()
    del seen
    (handle,) = encoded.handles
    encoded.withdraw()
    assert encoded.handles == []
    with pytest.raises(StaleHandleError):
        shmcast.attach(handle)
    del other, encoded
    foreign.close()


def test_an_unknown_reader_leaves_nothing(arena) -> None:
    slots = arena.stats()["slots_used"]
    with pytest.raises(PeerLostError):
        shmcast.dumps([numbers(), numbers(1)], arena, readers=[99])
    arena.publish(np.zeros(1))
    assert arena.stats()["slots_used"] == slots + 1


@pytest.mark.parametrize(("readers", "what"), [(0, "nobody"), ("all", "nobody"), ([], "nobody"), ("some", "'all'")])
def test_bad_readers(arena, readers, what) -> None:
    with pytest.raises(ValueError, match=what):
        shmcast.dumps(numbers(), arena, readers=readers)
    with pytest.raises(ValueError, match="on_full"):
        shmcast.dumps(numbers(), arena, on_full="later")


# ---- when something goes wrong


def test_what_can_not_be_pickled_leaves_nothing(arena) -> None:
    with pytest.raises(RuntimeError, match="not me"):
        shmcast.dumps([numbers(), Unpicklable(), numbers()], arena)
    with pytest.raises((pickle.PicklingError, AttributeError)):
        shmcast.dumps([numbers(), lambda: None], arena)
    assert arena.stats()["slots_used"] == 0


def test_full_raises_and_leaves_nothing(arena) -> None:
    tree = [np.zeros(3 << 20, np.uint8) for _ in range(3)]
    with pytest.raises(ArenaFullError):
        shmcast.dumps(tree, arena)
    assert (arena.publish(np.zeros(8 << 20, np.uint8))).nbytes == 8 << 20


def test_what_fails_late_takes_back_what_was_published_before() -> None:
    with shmcast.Arena.create("2MiB", max_blocks=2) as arena:
        view = shmcast.attach(arena.publish(numbers(), readers=0, keep=True)).array
        with pytest.raises(ArenaFullError, match="max_blocks"):
            shmcast.dumps([numbers(1), view], arena)  # a slot for the copy, none for the alias
        assert arena.publish(numbers(2)).nbytes == view.nbytes
        del view


def test_full_goes_inline_if_asked(arena) -> None:
    tree = [np.full(3 << 20, n, np.uint8) for n in range(3)] + [np.asfortranarray(np.arange(1 << 20).reshape(1024, -1))]
    blob = shmcast.dumps(tree, arena, on_full="inline")
    seen = shmcast.loads(blob)
    assert [lease_of(array) is not None for array in seen] == [True, True, False, False]
    for array, original in zip(seen, tree, strict=True):
        assert (array == original).all()
        assert not array.flags.writeable  # it looks the same however it has travelled
    del array, seen
    encoded = codec.encode(tree, arena, readers=[], keep=True, grant_timeout=None, on_full="inline")
    assert len(encoded.handles) == 2
    assert encoded.inline_bytes == (3 << 20) + (8 << 20)
    encoded.withdraw()


def test_a_block_that_is_gone(arena) -> None:
    """Every grant is ended, also of those that come after the one that is gone."""
    encoded = codec.encode([numbers(), numbers(1), numbers(2)], arena, readers=[], keep=True, grant_timeout=None)
    arena.release(encoded.handles[1])
    arena.publish(np.zeros(1), readers=0, keep=True)
    with pytest.raises(StaleHandleError):
        shmcast.loads(encoded.blob)
    blob = shmcast.dumps([numbers(5), numbers(6)], arena)
    first, second = (entry for entry in codec._parse(blob)[0])
    shmcast.attach(blob[first[1] : first[2]]).release()
    with pytest.raises(StaleHandleError) as caught:
        shmcast.loads(blob)
    assert caught.traceback  # which must not keep what was attached
    with pytest.raises(StaleHandleError):
        shmcast.attach(blob[second[1] : second[2]])


@given(st.binary(max_size=200))
def test_garbage(raw: bytes) -> None:
    with pytest.raises(HandleError, match="decode tree"):
        shmcast.loads(raw)


def test_cut_or_changed_blobs(seed, arena) -> None:
    blob = shmcast.dumps({"a": numbers(), "b": [1, 2, 3]}, arena, readers=3)
    rng = random.Random(seed)
    for length in range(len(blob)):
        with pytest.raises(HandleError):
            shmcast.loads(blob[:length])
    for _ in range(500):
        raw = bytearray(blob)
        raw[rng.randrange(len(raw))] ^= rng.randrange(1, 256)
        try:
            shmcast.loads(raw)
        except ShmcastError:
            continue
        assert raw[5:8] != blob[5:8]  # nothing is read there
    with pytest.raises(HandleError, match="version 2, this build reads 1"):
        shmcast.loads(blob[:4] + b"\x02" + blob[5:])
    assert shmcast.loads(bytearray(blob))["b"] == [1, 2, 3]


def resealed(body: bytes) -> bytes:
    return codec._HEAD.pack(codec.MAGIC, codec.VERSION, shmcast.hash128(body) & (1 << 64) - 1) + body


@pytest.mark.parametrize(
    "body",
    [
        codec._COUNT.pack(1),
        codec._COUNT.pack(1 << 31),
        codec._COUNT.pack(1) + codec._ENTRY.pack(0, 100),
        codec._COUNT.pack(1) + codec._ENTRY.pack(9, 0),
        codec._COUNT.pack(1) + codec._ENTRY.pack(0, 3) + b"abc",
        codec._COUNT.pack(1) + codec._ENTRY.pack(1, 3) + b"abc",
        codec._COUNT.pack(1) + codec._ENTRY.pack(1, 6) + codec._INLINE.pack(0, 50, 1) + b"xx",
        codec._COUNT.pack(1) + codec._ENTRY.pack(1, 7) + codec._INLINE.pack(0, 2, 0) + b"u1" + b"",
        codec._COUNT.pack(1) + codec._ENTRY.pack(1, 1 << 63),
    ],
)
def test_bodies_that_are_none(body) -> None:
    with pytest.raises((ShmcastError, EOFError)):
        shmcast.loads(resealed(body))


def test_an_array_number_that_is_none(arena) -> None:
    blob = shmcast.dumps(numbers(), arena)
    entries, at = codec._parse(blob)
    assert len(entries) == 1
    body = codec._COUNT.pack(0) + blob[at:]
    with pytest.raises(HandleError, match="array 0"):
        shmcast.loads(resealed(body))


def with_inline(dtype: str, shape: tuple[int, ...], data: bytes = b"", torch: bool = False) -> bytes:
    """The blob of one array that travels as bytes."""
    code = dtype.encode()
    entry = codec._INLINE.pack(torch, len(code), len(shape)) + code
    entry += b"".join(length.to_bytes(8, "little") for length in shape) + data
    block = b"\x80\x05\x8c\x0dshmcast.codec\x8c\x06_block\x93K\x00\x85R."
    return resealed(codec._COUNT.pack(1) + codec._ENTRY.pack(1, len(entry)) + entry + block)


@pytest.mark.parametrize("allow_pickle", [True, False])
@pytest.mark.parametrize("dtype", ["|S0", "<U0", "|V0", "[]", "[('a', '<f4', (0,))]", "[('a', '|S0')]"])
def test_elements_of_no_bytes_are_refused(arena, dtype: str, allow_pickle: bool) -> None:
    """Of those a blob of 75 bytes would hold 2**62."""
    assert shmcast.loads(with_inline("uint8", (2, 3), b"abcdef"), allow_pickle=allow_pickle).shape == (2, 3)
    for shape in ((1 << 62,), (1 << 31, 1 << 31), (3,), (0,), ()):
        with pytest.raises(HandleError):
            shmcast.loads(with_inline(dtype, shape), allow_pickle=allow_pickle)
    handle = arena.publish(np.zeros(0, "uint8"))
    with pytest.raises(HandleError):
        _ = shmcast.attach(handle._replace(dtype=dtype, shape=(1 << 62,))).array


def test_arrays_of_elements_of_no_bytes_travel_in_the_pickle(arena) -> None:
    """Empty arrays do not: nothing is odd about them."""
    for empty in (np.zeros(3, "V0"), np.zeros(2, [("a", "f4", (0,))]), np.ndarray((3,), "S0", b"")):
        with pytest.raises(UnsupportedArrayError, match="elements of no bytes"):
            arena.publish(empty)
        seen = shmcast.loads(shmcast.dumps(empty, arena, min_bytes=0))
        assert (seen.dtype, seen.shape) == (empty.dtype, empty.shape)
    with pytest.raises(UnsupportedArrayError, match="say how long"):
        arena.reserve((3,), "S")
    for nothing in (np.zeros(0), np.zeros((3, 0, 2), "S5"), np.zeros(0, [("a", "i4")])):
        seen = shmcast.loads(shmcast.dumps(nothing, arena, min_bytes=0), allow_pickle=False)
        assert (seen.dtype, seen.shape) == (nothing.dtype, nothing.shape)
        assert lease_of(seen) is not None


@pytest.mark.parametrize("allow_pickle", [True, False])
def test_shapes_that_are_none(allow_pickle: bool) -> None:
    """Whatever they say, they are refused by an error of ours."""
    for torch in (False, True):
        for shape in (
            ((1 << 64) - 1, 4), (1 << 63,), (0, 1 << 63), ((1 << 64) - 1, 0), (1 << 32, 1 << 32), (1 << 62, 4), (0,), (2,),
            (1 << 61, 8), (1,) * 255, (0, 1 << 62, 1 << 62), ((1 << 32) + 1, (1 << 32) - 1),
        ):  # fmt: skip
            for dtype in (
                "int32",
                "uint8",
                "bool",
                "complex128",
                "bfloat16",
                "float8_e5m2",
                "Tensor",
                "__class__",
                "\0",
            ):
                for data in (b"", b"abcd"):
                    try:
                        seen = shmcast.loads(with_inline(dtype, shape, data, torch), allow_pickle=allow_pickle)
                    except (HandleError, UnsupportedArrayError):
                        continue
                    assert (0 in shape) == (data == b"")
                    assert seen.nbytes == len(data)


def test_long_dtypes_are_not_kept() -> None:
    """A stranger could fill the cache with megabytes each."""
    code = repr([(f"field{number}", "|u1") for number in range(50)])
    assert shmcast.loads(with_inline(code, (1,), bytes(50))).dtype.itemsize == 50
    assert code not in arrays._dtypes


def test_the_pickle_inside_is_of_no_use_alone(arena) -> None:
    blob = shmcast.dumps(numbers(), arena)
    with pytest.raises(pickle.UnpicklingError, match=r"shmcast\.loads"):
        pickle.loads(blob[codec._parse(blob)[1] :])


def test_handles_travel_as_values(arena) -> None:
    handle = arena.publish(numbers())
    assert shmcast.loads(shmcast.dumps([handle, copy.deepcopy(handle)])) == [handle, handle]
    assert type(shmcast.loads(shmcast.dumps(handle))) is shmcast.Handle


# ---- tensors


def test_tensors(arena) -> None:
    torch = pytest.importorskip("torch")
    big, small = torch.arange(BIG).to(torch.bfloat16), torch.ones(3)
    tree = {
        "big": big,
        "again": big,
        "small": small,
        "bits": torch.zeros(BIG, dtype=torch.bool),
        "t": big.view(100, -1).t(),
    }
    seen = shmcast.loads(shmcast.dumps(tree, arena))
    assert seen["big"] is seen["again"]
    for name, original in tree.items():
        assert seen[name].dtype == original.dtype
        assert torch.equal(seen[name], original)
    assert lease_of(seen["big"]) is not None
    seen["big"][0] = 5
    assert torch.equal(shmcast.loads(shmcast.dumps(seen["big"]))[:2], torch.tensor([5, 1]).to(torch.bfloat16))
    inline = shmcast.loads(shmcast.dumps([big, small]))
    assert torch.equal(inline[0], big)


def test_written_tensors_travel_as_they_are_now(arena) -> None:
    torch = pytest.importorskip("torch")
    seen = shmcast.loads(shmcast.dumps(torch.zeros(BIG), arena))
    blob = shmcast.dumps(seen)
    assert len(blob) < 1000
    seen[7] = 3
    blob = shmcast.dumps(seen)
    assert len(blob) > 4 * BIG
    assert float(shmcast.loads(blob)[7]) == 3


def test_a_small_part_of_a_large_tensor_does_not_take_it_along(arena) -> None:
    torch = pytest.importorskip("torch")
    large = torch.arange(1 << 20)
    view = shmcast.loads(shmcast.dumps(large, arena))
    for tensor in (large, view):
        blob = shmcast.dumps({"part": tensor[5:10], "column": tensor.view(1024, -1)[:10, 3]})
        assert len(blob) < 1000
        seen = shmcast.loads(blob)
        assert seen["part"].tolist() == [5, 6, 7, 8, 9]
        assert seen["column"].tolist() == list(range(3, 3 + 10 * 1024, 1024))
    encoded = codec.encode([large[:5]], None, readers=[], keep=False, grant_timeout=None)
    assert encoded.inline_bytes == 0


def test_full_goes_inline_for_tensors(arena) -> None:
    torch = pytest.importorskip("torch")
    tree = [torch.full((5 << 20,), n, dtype=torch.int8) for n in range(2)] + [torch.ones(0), torch.tensor(3.0)]
    seen = shmcast.loads(shmcast.dumps(tree, arena, on_full="inline", min_bytes=0))
    assert all(torch.equal(a, b) for a, b in zip(seen, tree, strict=True))
    seen[0][0] = seen[1][0] = 9


@pytest.mark.torch
@pytest.mark.parametrize(
    "name", ["float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64", "complex32", "bfloat16"]
)
@pytest.mark.parametrize("with_arena", [True, False])
@pytest.mark.parametrize("length", [3, 20000])
def test_dtypes_that_torch_does_not_read_back(arena, name, with_arena, length) -> None:
    import torch

    dtype = getattr(torch, name)
    tensor = torch.arange(length * dtype.itemsize, dtype=torch.int64).to(torch.uint8).view(dtype)
    found = shmcast.loads(shmcast.dumps([tensor], arena if with_arena else None))[0]
    assert (found.dtype, found.shape) == (dtype, tensor.shape)
    assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))
