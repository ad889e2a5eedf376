"""torch's tensors as bytes and back; copy-on-write views; and what happens without torch."""

import sys

import numpy as np
import pytest

import shmcast
from shmcast.attach import lease_of
from shmcast.errors import HandleError, UnsupportedArrayError

torch = pytest.importorskip("torch")

NAMES = ["float32", "float64", "float16", "bfloat16", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32",
         "uint64", "bool", "complex32", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz",
         "float8_e5m2fnuz", "float8_e8m0fnu"]  # fmt: skip
DTYPES = [getattr(torch, name) for name in NAMES if hasattr(torch, name)]


@pytest.fixture
def arena():
    with shmcast.Arena.create("32MiB") as arena:
        yield arena


def same(a, b) -> bool:
    """Bit by bit."""
    return (a.dtype, a.shape) == (b.dtype, b.shape) and a.contiguous().reshape(-1).view(
        torch.uint8
    ).tolist() == b.contiguous().reshape(-1).view(torch.uint8).tolist()


def filled(dtype, shape, rng):
    count = int(np.prod(shape, dtype=int))
    if dtype is torch.bool:
        return torch.from_numpy(rng.integers(0, 2, count).astype(bool)).view(shape)
    return torch.frombuffer(bytearray(rng.bytes(count * dtype.itemsize) + b"\0" * 16), dtype=torch.uint8)[
        : count * dtype.itemsize
    ].view(dtype).view(shape)  # fmt: skip


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_trip(arena, rng, dtype) -> None:
    for shape in ((), (0,), (5,), (3, 0, 2), (2, 3, 4)):
        original = filled(dtype, shape, rng)
        handle = arena.publish(original)
        assert (handle.kind, handle.dtype) == ("torch", str(dtype).removeprefix("torch."))
        lease = shmcast.attach(handle, verify=True)
        for seen in (lease.tensor(), lease.tensor("read"), lease.to_private()):
            assert same(seen, original)
        del seen
        lease.release()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_digest_is_numpys_where_it_has_the_dtype(arena, rng, dtype) -> None:
    original = filled(dtype, (3, 5), rng)
    handle = arena.publish(original, readers=0, keep=True)
    assert handle.digest == shmcast.digest(original) == shmcast.digest(shmcast.attach(handle).tensor())
    try:
        array = np.frombuffer(original.view(torch.uint8).numpy().tobytes(), str(dtype).removeprefix("torch."))
    except TypeError:
        return
    assert arena.publish(array.reshape(3, 5)).digest == handle.digest == shmcast.digest(array.reshape(3, 5))
    assert (shmcast.attach(handle).array.tobytes()) == array.tobytes()


VIEWS = {
    "transposed": lambda t: t.t(),
    "strided": lambda t: t[::2, ::3],
    "a column": lambda t: t[:, 5:6],
    "expanded": lambda t: t[:1].expand(7, -1),
    "conjugated": lambda t: t.to(torch.complex64).mul(1j).conj(),
    "negated": lambda t: t.to(torch.complex64).mul(1j).conj().imag,
    "with gradients": lambda t: t.float().requires_grad_() * 2,
    "a parameter": lambda t: torch.nn.Parameter(t.float()),
    "flipped": lambda t: t.flip(0),
}


@pytest.mark.parametrize("make", VIEWS.values(), ids=VIEWS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_layout(arena, dtype, make) -> None:
    original = make(torch.arange(40 * 60).reshape(40, 60).to(dtype))
    for handle in (arena.publish(original), arena.publish_many([original])[0]):
        seen = shmcast.attach(handle, verify=True).tensor()
        assert same(seen, original.detach().resolve_conj().resolve_neg())
        assert not seen.requires_grad


@pytest.mark.filterwarnings("ignore:torch.quantize", "ignore:The PyTorch API of nested")
def test_refused_with_advice(arena) -> None:
    refused = {
        "device 'meta'": torch.empty(3, device="meta"),
        "to_dense": torch.eye(3).to_sparse(),
        "int_repr": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "unbind": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.strided),
    }
    for advice, tensor in refused.items():
        with pytest.raises(UnsupportedArrayError, match=advice):
            arena.publish(tensor)
    assert arena.stats()["slots_used"] == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_gpu_tensors_are_refused(arena) -> None:
    with pytest.raises(UnsupportedArrayError, match=r"cpu\(\)"):
        arena.publish(torch.ones(3, device="cuda"))


BIG = 100_000  # bytes: a block with pages of its own


def publish_at(arena, place, value: int):
    """A block of that value in the memory that a block of before had; what lands elsewhere is kept there."""
    for _ in range(1000):
        handle = arena.publish(np.full(BIG, value, np.uint8), readers=0, keep=True)
        if (handle.segment, handle.offset) == (place.segment, place.offset):
            return handle
    raise AssertionError(f"{place!r} was never used again")


def test_writes_stay_in_this_process_and_end_with_the_lease(arena) -> None:
    zeros = np.zeros(BIG, np.uint8)
    handle = arena.publish(zeros, readers=0, keep=True)
    lease = shmcast.attach(handle)
    tensor, other, shared = lease.tensor(), lease.tensor(), lease.array
    assert not lease.modified()
    tensor[5], tensor[-1] = 1, 2
    assert lease.modified()
    assert (int(other[5]), int(other[-1])) == (1, 2)  # private to the lease, not to the tensor
    assert not shared.any()
    assert lease_of(tensor) is None
    assert lease_of(shared) is not None
    del tensor, other, shared, lease
    arena.release(handle)
    again = publish_at(arena, handle, 9)
    fresh = shmcast.attach(again).tensor()
    assert fresh.tolist() == [9] * BIG


def test_a_recycled_block_is_seen_fresh_though_its_neighbour_is_written(arena) -> None:
    first, second = (arena.publish(np.full(BIG, n, np.uint8), readers=0, keep=True) for n in (1, 2))
    kept = shmcast.attach(second).tensor()
    kept.fill_(22)
    written = shmcast.attach(first).tensor()
    written.fill_(11)
    del written
    arena.release(first)
    third = publish_at(arena, first, 3)
    assert set(shmcast.attach(third).tensor().tolist()) == {3}
    assert set(kept.tolist()) == {22}


def test_neighbours_in_a_page_are_copied(arena) -> None:
    """A private page would hide what is published later beside the written bytes."""
    first = arena.publish(np.full(100, 1, np.uint8), readers=0, keep=True)
    tensor = shmcast.attach(first).tensor()
    tensor.fill_(77)
    second = arena.publish(np.full(100, 2, np.uint8), readers=0, keep=True)
    assert first.offset // 4096 == second.offset // 4096
    lease = shmcast.attach(second)
    assert not lease.owns_pages
    assert set(lease.tensor().tolist()) == {2}
    assert set(tensor.tolist()) == {77}
    assert set(shmcast.attach(first).tensor().tolist()) == {1}


def test_leases_on_one_block_write_for_themselves(arena) -> None:
    """As requests do that share one image: n samples, a session, a retry."""
    handle = arena.publish(np.zeros(BIG, np.uint8), readers=0, keep=True)
    again = arena.alias(handle, readers=0, keep=True)
    tensors = [shmcast.attach(either).tensor() for either in (handle, handle, again)]
    for number, tensor in enumerate(tensors, 1):
        tensor[number] = number
    for number, tensor in enumerate(tensors, 1):
        assert tensor[:5].tolist() == [number if at == number else 0 for at in range(5)]
        assert lease_of(tensor) is None
    untouched = shmcast.attach(handle).tensor()
    assert not untouched.any()
    assert lease_of(untouched).handle.digest == handle.digest
    del tensor, tensors[0]
    assert not shmcast.attach(handle).tensor().any()  # what was written went with its lease, also where others go on
    assert int(tensors[0][2]) == 2


def private_mappings(handle) -> int:
    with open("/proc/self/maps") as maps:
        return sum(f".{handle.arena:016x}.{handle.segment}" in line and "rw-p" in line for line in maps)


def test_private_mappings_are_used_again(arena) -> None:
    handles = [arena.publish(np.full(BIG, n, np.uint8), readers=0, keep=True) for n in range(3)]
    for _ in range(5):
        tensors = [shmcast.attach(handles[0]).tensor() for _ in range(4)]
        tensors += [shmcast.attach(handle).tensor() for handle in handles[1:]]
        for tensor in tensors:
            tensor[0] = 99
        assert private_mappings(handles[0]) == 4
        tensors.clear()


def test_lease_is_found_from_any_tensor_on_it(arena) -> None:
    original = torch.arange(BIG, dtype=torch.int32)
    handle = arena.publish(original, readers=0, keep=True)
    first, second = shmcast.attach(handle), shmcast.attach(handle)
    one, two = first.tensor(), second.tensor()
    read = first.tensor("read")
    del first
    for tensor in (one, two, read):
        assert lease_of(tensor).handle == handle
    del tensor
    part = lease_of(two[100:300].view(20, 10)).handle
    assert (part.offset, part.nbytes, part.shape, part.digest) == (handle.offset + 400, 800, (20, 10), None)
    assert (shmcast.attach(part).array == np.arange(100, 300).reshape(20, 10)).all()
    assert lease_of(two.view(torch.uint8)).handle.dtype == "uint8"
    assert lease_of(two.numpy()[10:20]).handle.offset == handle.offset + 40
    assert lease_of(two.view(1000, -1).t()) is None
    assert lease_of(two.clone()) is None
    del second, one, read
    assert lease_of(two).handle == handle
    two[0] = 1
    assert lease_of(two) is None


def test_a_written_tensor_is_published_as_it_is_now(arena) -> None:
    handle = arena.publish(torch.zeros(BIG), readers=0, keep=True)
    tensor = shmcast.attach(handle).tensor()
    assert arena.publish(tensor).offset == handle.offset  # untouched: the same bytes
    tensor[3] = 4
    copied = arena.publish(tensor)
    assert copied.offset != handle.offset
    assert shmcast.attach(copied).array[3] == 4
    assert shmcast.attach(handle).array[3] == 0


def test_modes(arena) -> None:
    lease = shmcast.attach(arena.publish(np.arange(BIG, dtype=np.uint8)))
    with pytest.raises(ValueError, match="'write'"):
        lease.tensor("write")
    assert lease.tensor("read").data_ptr() == lease.address
    assert lease.tensor().data_ptr() != lease.address
    with pytest.raises(BufferError):
        tensor = lease.tensor()
        lease.release()
    del tensor


def test_numpy_dtypes_that_torch_lacks(arena) -> None:
    lease = shmcast.attach(arena.publish(np.array(["2020-01-01"], "M8[D]")))
    with pytest.raises(UnsupportedArrayError, match="ndarray"):
        lease.tensor()
    bfloat = shmcast.attach(arena.publish(torch.ones(3, dtype=torch.bfloat16)))
    with pytest.raises(UnsupportedArrayError, match="tensor"):
        _ = bfloat.array


@pytest.mark.parametrize("changes", [{"shape": (7,)}, {"shape": (1 << 62,)}, {"dtype": "float64", "shape": (13,)}])
def test_a_handle_whose_form_does_not_fit_its_bytes(arena, changes) -> None:
    lease = shmcast.attach(arena.publish(torch.ones(25))._replace(**changes))
    with pytest.raises(HandleError):
        lease.tensor()


def test_reserve_a_tensor(arena) -> None:
    with arena.reserve((4, 5), torch.bfloat16) as reservation:
        reservation.tensor.copy_(torch.arange(20).view(4, 5))
    assert reservation.handle.kind == "torch"
    assert shmcast.attach(reservation.handle).tensor().flatten().tolist() == list(range(20))
    with pytest.raises(ValueError, match="not yours"):
        _ = reservation.tensor


def a_write_through_read_only_pages(parent) -> None:
    import torch as _  # noqa: F401

    with shmcast.Arena.create("1MiB") as arena:
        lease = shmcast.attach(arena.publish(np.zeros(BIG, np.uint8)))
        tensor = lease.tensor("read")
        shmcast.sweep()
        parent.send("writing")
        tensor[0] = 1


def test_a_write_to_mode_read_is_fatal_as_documented(child) -> None:
    peer = child(a_write_through_read_only_pages)
    assert peer.receive() == "writing"
    peer.wait(-11)
    assert len(shmcast.sweep().segments) == 2


def without_torch(parent, raw: bytes, blob: bytes) -> None:
    sys.modules["torch"] = None  # type: ignore[assignment]
    lease = shmcast.attach(raw)
    parent.send(lease.array.tolist())
    for take in (lease.tensor, lease.to_private, lambda: shmcast.loads(blob)):
        try:
            take()
        except UnsupportedArrayError as error:
            parent.send(str(error))


def test_a_process_without_torch_gets_words(child, arena) -> None:
    handle = arena.publish(torch.ones(3), readers=0, keep=True)
    blob = shmcast.dumps(torch.ones(BIG), arena)
    peer = child(without_torch, handle.to_bytes(), blob)
    assert peer.receive() == [1.0, 1.0, 1.0]
    for _ in range(3):
        assert "torch can not be imported" in peer.receive()
    peer.join()
