"""SGLang's `ShmPointerMMData` over shmcast in one process, beside the original: same results, and what only one of them can."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest

import shmcast


@pytest.fixture
def pointer(sgl):
    from sglang.srt.managers.mm_utils import ShmPointerMMData

    return ShmPointerMMData


def arena():
    from shmcast.own_arena import own_arena

    return own_arena()


def live() -> int:
    gc.collect()
    return arena().stats()["slots_used"]


def copies() -> int:
    counters = shmcast.metrics.snapshot(arena())["counters"]
    return counters["published"] - counters["aliased"]


def over_pickle(stub):
    return pickle.loads(pickle.dumps(stub))


def over_msgpack(stub):
    import msgspec
    from sglang.srt.utils.msgpack_utils import enc_hook, ext_hook

    return msgspec.msgpack.decode(msgspec.msgpack.encode(stub, enc_hook=enc_hook), ext_hook=ext_hook)


WAYS = [over_pickle, over_msgpack]
DTYPES = ["float32", "float16", "bfloat16", "float64", "int64", "int32", "uint8", "int8", "bool", "float8_e4m3fn"]


def tensors():
    import torch

    made = [torch.arange(60_000).reshape(200, 300).to(getattr(torch, name)) for name in DTYPES]
    made += [torch.zeros(1), torch.arange(24.0).reshape(2, 3, 4).transpose(0, 2), torch.arange(100.0)[10:20]]
    made += [torch.full((64, 64), 2.0, requires_grad=True).detach()]
    return made


# ---- the same as the original


@pytest.mark.parametrize("way", WAYS)
def test_results_are_the_originals(pointer, namespace, way) -> None:
    from shmcast.integrations import sglang

    def travel():
        results = []
        for tensor in tensors():
            stub = way(pointer(tensor, precomputed_hash=77))
            results.append((stub.shape, stub.dtype, stub.precomputed_hash, stub.materialize()))
        return results

    def there_without(tensor) -> bool:
        return tensor.numel() > 0 and tensor.dim() > 0

    assert all(there_without(tensor) for tensor in tensors())
    theirs = travel()
    sglang.install()
    try:
        ours = travel()
        for (shape, dtype, known, before), (our_shape, our_dtype, our_known, after), sent in zip(
            theirs, ours, tensors(), strict=True
        ):
            assert (shape, dtype, known) == (our_shape, our_dtype, our_known)
            assert before.dtype == after.dtype == sent.dtype and before.shape == after.shape == sent.shape
            assert before.is_contiguous() == after.is_contiguous()
            assert bool((after.float() == sent.float()).all()) and bool((before.float() == sent.float()).all())
            after.zero_()  # independently writable
        del ours, after
        assert live() == 0
    finally:
        sglang.uninstall()


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 5)])
def test_empty_and_0d_tensors(pointer, namespace, shape) -> None:
    import torch

    from shmcast.integrations import sglang

    tensor = torch.full(shape, 5.0)
    with pytest.raises((ValueError, RuntimeError)):  # with the original
        pointer(tensor)
    with sglang_installed(sglang):
        for way in WAYS:
            got = way(pointer(tensor)).materialize()
            assert got.shape == tensor.shape and got.dtype == tensor.dtype
            assert got.tolist() == tensor.tolist()


class sglang_installed:
    def __init__(self, sglang) -> None:
        self._sglang = sglang

    def __enter__(self) -> None:
        self._sglang.install()

    def __exit__(self, *_: object) -> None:
        self._sglang.uninstall()


# ---- consumed as often as one likes


def test_the_same_stub_twice(pointer, namespace) -> None:
    """SGLang issues 19784, 26304."""
    import torch

    from shmcast.integrations import sglang

    stub = over_pickle(pointer(torch.arange(50_000.0)))
    stub.materialize()
    with pytest.raises((RuntimeError, AttributeError)):  # with the original
        stub.materialize()
    with sglang_installed(sglang):
        sent = torch.arange(50_000.0)
        raw = pickle.dumps(pointer(sent))
        stub = pickle.loads(raw)
        first, second = stub.materialize(), stub.materialize()
        third = pickle.loads(raw).materialize()  # the same bytes again
        first.zero_()
        assert torch.equal(second, sent) and torch.equal(third, sent)
        again = over_pickle(stub).materialize()
        assert torch.equal(again, sent)


def test_states_at_any_time(pointer, installed) -> None:
    import torch

    sent = torch.arange(50_000.0)
    stub = pointer(sent)
    states = [stub.__getstate__() for _ in range(5)]
    assert set(states[0]) >= {"shm_name", "shape", "dtype", "precomputed_hash"}
    copied = copy.copy(stub)
    del stub
    got = []
    for state in states:
        other = pointer.__new__(pointer)
        other.__setstate__(state)
        got.append(other.materialize())
    got.append(copied.materialize())
    assert all(torch.equal(tensor, sent) for tensor in got)
    assert copies() == 1
    del got, other, copied, sent
    assert live() == 0


def test_a_stub_is_sent_again_after_it_was_consumed(pointer, installed) -> None:
    """What became of a state elsewhere does not matter where the stub was made."""
    import torch

    sent = torch.arange(50_000.0)
    stub = pointer(sent)
    for _ in range(3):
        assert torch.equal(over_pickle(stub).materialize(), sent)
        assert live() > 0  # what was consumed has been reclaimed
        assert torch.equal(stub.tensor, sent) and torch.equal(stub.materialize(), sent)
    assert copies() == 1
    del stub, sent
    assert live() == 0


def test_n_samples_after_a_finished_warm_up(pointer, installed) -> None:
    """One publish in all, though the warm-up was consumed and freed before the samples were sent."""
    import torch

    feature = torch.arange(100_000.0)
    over_msgpack(pointer(feature)).materialize()
    gc.collect()
    got = [over_msgpack(pointer(feature)).materialize() for _ in range(8)]
    assert all(torch.equal(tensor, feature) for tensor in got)
    assert copies() == 1
    got[0].zero_()
    assert torch.equal(got[1], feature)
    del got
    assert live() == 1  # the tokenizer still has the feature
    del feature
    assert live() == 0


def test_a_feature_that_was_refilled_is_published_anew(pointer, installed) -> None:
    import torch

    feature = torch.zeros(100_000)
    first = over_pickle(pointer(feature))
    feature.numpy()[:] = 7.0  # as torch does not notice
    second = over_pickle(pointer(feature))
    assert not first.materialize().any() and bool((second.materialize() == 7.0).all())
    assert copies() == 2


# ---- what is dropped comes back


@pytest.mark.parametrize("end", ["dropped", "discarded", "received and dropped", "received and discarded", "consumed"])
def test_the_memory_comes_back(pointer, installed, end) -> None:
    import torch

    stub = pointer(torch.arange(50_000.0))
    gc.collect()
    assert live() > 0
    if end.startswith("received"):
        stub = over_pickle(stub)
    if end.endswith("discarded"):
        stub.close_and_unlink()
        stub.close_and_unlink()
    if end == "consumed":
        over_pickle(stub).materialize()
    del stub
    assert live() == 0


def test_a_dead_tokenizer_is_told(pointer, installed, child, namespace) -> None:
    peer = child(sends_and_waits)
    raw = peer.receive()
    first = pickle.loads(raw)
    assert first.materialize().sum() == 50_000
    peer.kill()
    shmcast.sweep(namespace)
    late = pickle.loads(raw)  # never raises
    with pytest.raises(RuntimeError, match=r"GoneError|StaleHandle"):
        late.materialize()
    assert late.tensor is None


def sends_and_waits(parent) -> None:
    import sgl

    sgl.prepare()
    import torch
    from sglang.srt.managers.mm_utils import ShmPointerMMData

    from shmcast.integrations import sglang

    sglang.install()
    kept = torch.ones(50_000)
    parent.send(pickle.dumps(ShmPointerMMData(kept)))
    parent.receive()


@pytest.mark.parametrize("lost", ["shape", "dtype", "shm_name", "precomputed_hash"])
def test_a_state_that_lacks_something_never_raises(pointer, installed, lost) -> None:
    import torch

    state = pointer(torch.arange(50_000.0)).__getstate__()
    del state[lost]
    stub = pointer.__new__(pointer)
    stub.__setstate__(state)
    if lost in ("shape", "dtype"):
        with pytest.raises(RuntimeError):
            stub.materialize()
    del stub
    assert live() == 0


@pytest.mark.parametrize("damage", [b"", b"garbage", None, 5])
def test_a_damaged_handle_is_told_later(pointer, installed, damage) -> None:
    import torch

    state = pointer(torch.arange(50_000.0)).__getstate__()
    stub = pointer.__new__(pointer)
    stub.__setstate__({**state, "shmcast": damage})
    with pytest.raises(RuntimeError):
        stub.materialize()
    with pytest.raises(RuntimeError):
        over_pickle(stub).materialize()
    stub.close_and_unlink()


# ---- where there is no room, and what is not ours


def test_no_room_travels_inline(sgl, installed, monkeypatch) -> None:
    """OSError is what SGLang falls back on."""
    import torch
    from sglang.srt.managers import mm_utils

    kept = arena().publish(torch.zeros(1 << 20), readers=0, keep=True)
    free = arena().stats()["max_bytes"]
    monkeypatch.setattr(type(arena()), "publish", refuses)
    feature = torch.arange(50_000.0)
    with pytest.raises(OSError):
        mm_utils.ShmPointerMMData(feature)
    with sgl.context():
        obj = mm_utils.wrap_shm_features(sgl.request("a", [feature]))
    assert obj.mm_inputs.mm_items[0].feature is feature
    assert free and arena().release(kept)


def refuses(self, *_, **__):
    raise shmcast.ArenaFullError(28, "full, for this test")


def test_what_can_not_be_shared_travels_inline(sgl, installed) -> None:
    import torch
    from sglang.srt.managers import mm_utils

    sparse = torch.eye(300).to_sparse()
    with sgl.context():
        obj = mm_utils.wrap_shm_features(sgl.request("a", [sparse]))
    assert obj.mm_inputs.mm_items[0].feature is sparse


def test_segments_of_others_pass_through(pointer, namespace) -> None:
    """Stubs of the Rust front end: exactly four keys, a segment by name, unlinked by who consumes it."""
    import os
    from multiprocessing import shared_memory

    import torch

    from shmcast.integrations import sglang

    with sglang_installed(sglang):
        segment = shared_memory.SharedMemory(create=True, size=400, name=f"sgl_shm_mm_test_{os.getpid()}")
        segment.buf[:400] = torch.arange(100, dtype=torch.float32).numpy().tobytes()
        stub = pointer.__new__(pointer)
        stub.__setstate__({"shm_name": segment.name, "shape": (10, 10), "dtype": torch.float32, "precomputed_hash": 5})
        again = stub.__getstate__()
        assert set(again) == {"shm_name", "shape", "dtype", "precomputed_hash"}
        assert stub.tensor.shape == (10, 10)
        got = stub.materialize()
        assert got[9, 9] == 99 and not os.path.exists(f"/dev/shm/{segment.name}")
        segment.close()


# ---- bounds


def test_2000_live_tensors_under_1024_descriptors(child, namespace, sgl) -> None:
    peer = child(holds_many, "ours")
    assert peer.receive() == 2000
    peer.join()
    peer = child(holds_many, "theirs")
    assert peer.receive() < 1024  # a descriptor or two a tensor
    peer.join()


def holds_many(parent, which: str) -> None:
    import resource

    import sgl

    sgl.prepare()
    import torch
    from sglang.srt.managers.mm_utils import ShmPointerMMData

    from shmcast.integrations import sglang

    if which == "ours":
        sglang.install()
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
    stubs, kept = [], []
    try:
        for number in range(2000):
            stub = over_pickle(ShmPointerMMData(torch.full((5000,), float(number))))
            stubs.append(stub)
            if stub.tensor is None:
                raise OSError(stub._materialization_error)
    except OSError:
        stubs.pop().close_and_unlink()
    kept = [stub.materialize() for stub in stubs]
    assert all(int(tensor[-1]) == number for number, tensor in enumerate(kept))
    parent.send(len(kept))
    del stubs, kept
    if which == "ours":
        sglang.uninstall()
