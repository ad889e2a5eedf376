"""Digests name values: the same however an array travels and in whatever process; hashes are the published functions."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import xxhash

import shmcast
from shmcast import content
from shmcast.content import array_digest, check_digest, list_digest
from shmcast.errors import IntegrityError

SIZES = [(), (0,), (3, 5), (300, 100)]


def first_16(raw: bytes) -> int:
    return int.from_bytes(hashlib.sha256(raw).digest()[:16], "big")


@pytest.fixture
def arena():
    with shmcast.Arena.create("8MiB") as arena:
        yield arena


# ---- the published functions


def test_digests_are_the_published_algorithms() -> None:
    text = b"array\0float32\0" + b"4,1176\0" + (99).to_bytes(16, "big")
    assert array_digest("float32", (4, 1176), 99) == xxhash.xxh3_128_intdigest(text)
    assert array_digest("float32", (4, 1176), 99, "sha256") == first_16(text)
    pair = b"list\0" + (1).to_bytes(16, "big") + (2).to_bytes(16, "big")
    assert list_digest([1, 2]) == xxhash.xxh3_128_intdigest(pair)
    assert list_digest([1, 2], "sha256") == first_16(pair)


def test_digest_covers_dtype_and_shape() -> None:
    forms = [("float32", (4, 6)), ("int32", (4, 6)), ("float32", (6, 4)), ("float32", (24,)), ("float32", (4, 6, 1))]
    assert len({array_digest(dtype, shape, 12345) for dtype, shape in forms}) == len(forms)


def test_digest_must_fit() -> None:
    assert check_digest(0) == 0
    assert check_digest((1 << 128) - 1) == (1 << 128) - 1
    for bad in (-1, 1 << 128):
        with pytest.raises(ValueError, match="128 bits"):
            check_digest(bad)
    for bad in (True, "x", 1.0):
        with pytest.raises(TypeError, match="128 bits"):
            check_digest(bad)  # type: ignore[arg-type]


# ---- however it travels


@pytest.mark.parametrize("name", ["xxh3", "sha256"])
@pytest.mark.parametrize("shape", SIZES)
def test_the_same_for_shared_and_inline(arena, rng, shape, name) -> None:
    original = rng.standard_normal(shape).astype("float32")
    expected = shmcast.digest(original, hash=name)
    handle = arena.publish(original, hash=name, readers=0, keep=True)
    assert handle.digest == expected
    lease = shmcast.attach(handle, verify=True)
    assert shmcast.digest(lease.array, hash=name) == expected
    assert shmcast.digest(lease.to_private(), hash=name) == expected
    for min_bytes in (0, 1 << 30):
        sent = shmcast.loads(shmcast.dumps({"a": original}, arena, hash=name, min_bytes=min_bytes))
        assert shmcast.digest(sent["a"], hash=name) == expected


@pytest.mark.parametrize("name", ["xxh3", "sha256"])
def test_it_composes_over_lists(arena, rng, name) -> None:
    parts = [rng.standard_normal((size, 1176)).astype("float32") for size in (3, 40, 7)]
    expected = list_digest([shmcast.digest(part, hash=name) for part in parts], name)
    assert shmcast.digest(parts, hash=name) == expected
    mixed = [shmcast.attach(arena.publish(parts[0], hash=name)).array, parts[1], shmcast.share(parts[2], arena)]
    assert shmcast.digest(mixed, hash=name) == expected
    assert shmcast.digest([parts, parts[0]], hash=name) == list_digest(
        [expected, shmcast.digest(parts[0], hash=name)], name
    )
    assert shmcast.digest(parts[::-1], hash=name) != expected


def test_a_block_of_the_other_hash_is_read_once_more(arena) -> None:
    array = np.arange(50_000, dtype="int32")
    for published, asked in (("xxh3", "sha256"), ("sha256", "xxh3")):
        view = shmcast.attach(arena.publish(array, hash=published)).array
        assert shmcast.digest(view, hash=asked) == shmcast.digest(array, hash=asked)
        assert shmcast.digest(view, hash=published) != shmcast.digest(view, hash=asked)


@pytest.mark.torch
def test_the_same_for_torch_and_numpy(arena, rng) -> None:
    import torch

    array = rng.standard_normal((300, 40)).astype("float32")
    tensor = torch.from_numpy(array)
    for name in ("xxh3", "sha256"):
        shared = shmcast.attach(arena.publish(tensor, hash=name)).tensor()
        turned = torch.from_numpy(np.asfortranarray(array))  # the same values in another order
        values = [shmcast.digest(thing, hash=name) for thing in (array, tensor, shared, turned)]
        assert len(set(values)) == 1
        shared[0, 0] += 1
        assert shmcast.digest(shared, hash=name) not in values


def say_digest(parent, raw: bytes) -> None:
    """Of what was sent, and of the same values made here."""
    tree = shmcast.loads(raw)
    own = np.arange(10_000, dtype="float32")
    parent.send([[shmcast.digest(thing, hash=name) for name in ("xxh3", "sha256")] for thing in (tree, own)])
    del tree


def test_the_same_in_every_process(arena, child) -> None:
    array = np.arange(10_000, dtype="float32")
    expected = [shmcast.digest(array, hash=name) for name in ("xxh3", "sha256")]
    for hash_seed in ("0", "77"):
        peer = child(say_digest, shmcast.dumps(array, arena), PYTHONHASHSEED=hash_seed)
        assert peer.receive() == [expected, expected]
        peer.join()


def test_the_seed_is_configured(arena, child) -> None:
    """It is the digest that it changes: blocks are verified whoever looks, and SHA-256 has none."""
    array = np.arange(10_000, dtype="float32")
    plain, strong = (shmcast.digest(array, hash=name) for name in ("xxh3", "sha256"))
    found = []
    for seed in ("0x1234", "4660", "5"):
        peer = child(say_digest, shmcast.dumps(array, arena), SHMCAST_DIGEST_SEED=seed)
        shared, own = peer.receive()
        assert shared == own and own[1] == strong and own[0] != plain
        found.append(own[0])
        peer.join()
    assert found[0] == found[1] != found[2]
    text = b"array\0float32\0" + b"10000\0" + xxhash.xxh3_128_digest(array.tobytes())
    assert found[2] == xxhash.xxh3_128_intdigest(text, seed=5)


@pytest.mark.parametrize("value", ["x", "-1", str(1 << 64), "1.5"])
def test_a_seed_that_is_none(monkeypatch, value) -> None:
    monkeypatch.setenv("SHMCAST_DIGEST_SEED", value)
    with pytest.raises(ValueError, match=f"SHMCAST_DIGEST_SEED: '{value}'"):
        content.digest_seed.__wrapped__()


# ---- hashes of blocks


def test_sha256_of_a_block(arena, rng) -> None:
    array = rng.integers(0, 256, (123, 457), np.uint8)
    turned = array.T
    with arena.reserve(array.shape, "uint8", hash="sha256") as reservation:
        reservation.array[:] = array
    handles = [
        arena.publish(array, hash="sha256"),
        arena.publish(turned, hash="sha256"),
        *arena.publish_many([array, turned], hash="sha256"),
        reservation.handle,
    ]
    for handle, expected in zip(handles, (array, turned, array, turned, array), strict=True):
        assert (handle.hash, handle.hash_name) == (first_16(expected.tobytes()), "sha256")
        assert shmcast.Handle.from_bytes(handle.to_bytes()) == handle
        with shmcast.attach(handle, verify=True) as lease:
            assert (lease.array == expected).all()


def test_sha256_notices_what_was_changed(arena) -> None:
    array = np.zeros(5000, np.uint8)
    lease = shmcast.attach(arena.publish(array, hash="sha256"))
    lease.handle = lease.handle._replace(hash=lease.handle.hash ^ 1)
    with pytest.raises(IntegrityError, match="sha256"):
        lease.verify()


def test_a_given_digest_stays(arena, child) -> None:
    array = np.arange(50_000, dtype="float32")
    handle = arena.publish(array, digest=7, hash="sha256", readers=0, keep=True)
    again = arena.alias(handle)
    lease = shmcast.attach(again)
    assert (handle.digest, again.digest, lease.digest, lease.pass_on(1).digest) == (7, 7, 7, 7)
    assert arena.publish(lease.array).digest == 7
    assert arena.publish(lease.array, digest=8).digest == 8
    assert shmcast.digest(lease.array) == shmcast.digest(array)  # of the values, whatever the publisher calls them


@pytest.mark.parametrize("bad", ["md5", "", None, 3])
def test_another_hash_is_refused(arena, bad) -> None:
    array = np.zeros(20_000, np.uint8)
    for publish in (
        lambda: arena.publish(array, hash=bad),
        lambda: arena.publish_many([array], hash=bad),
        lambda: arena.reserve(3, "u1", hash=bad),
        lambda: shmcast.dumps(array, arena, hash=bad),
        lambda: shmcast.digest(array, hash=bad),
    ):
        with pytest.raises(ValueError, match="'xxh3' or 'sha256', not"):
            publish()
    assert arena.stats()["slots_used"] == 0


def test_no_hash(arena) -> None:
    array = np.arange(5000)
    handle = arena.publish(array, hash=False)
    assert (handle.hash, handle.digest) == (None, None)
    assert shmcast.digest(shmcast.attach(handle).array) == shmcast.digest(array)
    with pytest.raises(ValueError, match="hash=False"):
        shmcast.digest(array, hash=False)  # type: ignore[arg-type]
