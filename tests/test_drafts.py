"""What worker processes answer with: it comes back as it was, and whatever else comes is refused."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmcast import _native, codec, drafts, worker
from shmcast.drafts import Part
from shmcast.errors import HandleError, UnsupportedArrayError
from shmcast.lockstep import Failure

PICKLE = codec.take_apart({"a": 1}, None, 1 << 20)[0]  # type: ignore[arg-type]


def blocks() -> list[np.ndarray]:
    return [np.arange(64, dtype=np.uint8), np.zeros(1024, np.uint8)]


def part(dtype: str = "uint8", shape: tuple[int, ...] = (4,), **where: Any) -> Part:
    return Part(where.pop("kind", "numpy"), dtype, shape, **where)


def signed(body: bytes, magic: bytes = b"shmD", version: int = 1) -> bytes:
    """With a hash that is right, as only who wants to would write it."""
    return struct.pack("<4sB3xQ", magic, version, _native.hash128(body) & (1 << 64) - 1) + body


def test_round_trip() -> None:
    there = blocks()
    own = np.arange(6.0).reshape(2, 3)
    raw = drafts.write(
        b"pickle",
        [
            part(offset=8),
            part("float32", (2, 8), block=1, offset=64),
            part("float64", (2, 3), source=own),
            part("int16", (0, 7), source=b""),
            part("int16", (), source=np.array(7, "i2")),
        ],
    )
    pickled, things = drafts.read(raw, there)
    assert bytes(pickled) == b"pickle"
    assert [(str(thing.dtype), thing.shape) for thing in things] == [
        ("uint8", (4,)),
        ("float32", (2, 8)),
        ("float64", (2, 3)),
        ("int16", (0, 7)),
        ("int16", ()),
    ]
    assert things[0].tolist() == [8, 9, 10, 11]
    assert np.shares_memory(things[0], there[0])
    assert np.shares_memory(things[1], there[1])
    assert (things[2] == own).all()
    assert things[4] == 7


def test_trees(rng: np.random.Generator) -> None:
    tree = {"x": rng.random(5000), "same": None, "small": np.arange(3), "text": "text"}
    tree["same"] = tree["x"]
    pickled, taken = codec.take_apart(tree, worker._Blocks(None, None), 16384)  # type: ignore[arg-type]
    assert [each.array is tree["x"] for each in taken] == [True]
    raw = drafts.write(pickled, [part("float64", (5000,), source=tree["x"])])
    found = codec.put_together(*drafts.read(raw, []))
    assert found["same"] is found["x"]
    assert found["x"].tolist() == tree["x"].tolist()
    assert (found["small"].tolist(), found["text"]) == ([0, 1, 2], "text")


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (part(block=2), "block 2, 2 were reserved"),
        (part(block=2**32 - 1), "2 were reserved"),
        (part(offset=61), "4 bytes at 61 of block 0, which has 64"),
        (part(offset=2**64 - 1), "of block 0, which has 64"),
        (part(shape=(65,)), "65 bytes at 0 of block 0"),
        (part(shape=(2**63, 2**63)), "bytes"),
        (part(shape=(2**40, 0, 2**62), offset=3), "shape"),
        (part("float64", (129,), block=1), "1032 bytes at 0 of block 1"),
        (part("object"), "dtype 'object'|no dtype"),
        (part("nonsense"), "dtype"),
        (part("V0"), "dtype"),
        (part("|O"), "dtype"),
        (part(shape=(1,) * 65), "65 dimensions"),
        (part("nonsense", kind="torch"), "torch"),
    ],
)
def test_what_is_not_there_is_refused(bad: Part, text: str) -> None:
    with pytest.raises((HandleError, UnsupportedArrayError), match=text):
        drafts.read(drafts.write(PICKLE, [part(), bad]), blocks())


@pytest.mark.torch
def test_tensors_are_inside_too() -> None:
    good = drafts.write(PICKLE, [part("bfloat16", (32,), kind="torch"), part("int64", (0,), kind="torch", source=b"")])
    _, things = drafts.read(good, blocks())
    assert [(str(thing.dtype), tuple(thing.shape)) for thing in things] == [
        ("torch.bfloat16", (32,)),
        ("torch.int64", (0,)),
    ]
    for bad in (part("bfloat16", (33,), kind="torch"), part("bfloat16", (1,), kind="torch", offset=63)):
        with pytest.raises(HandleError, match="of block 0, which has 64"):
            drafts.read(drafts.write(PICKLE, [bad]), blocks())


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"", "0 bytes, at least 28"),
        (signed(bytes(12), magic=b"shmT"), "starts with b'shmT'"),
        (signed(bytes(12), version=2), "version 2"),
        (signed(struct.pack("<IQ", 1, 0)), "array 0 of 1 starts at 12"),
        (signed(struct.pack("<IQ", 2**32 - 1, 0)), "array 0 of 4294967295"),
        (signed(struct.pack("<IQ", 0, 1)), "pickle has 1 bytes, 0 are left"),
        (signed(struct.pack("<IQ", 0, 2**64 - 1)), "0 are left"),
        (signed(struct.pack("<IQ", 0, 0) + b"x"), "0 arrays end at 12, it has 13"),
        (signed(struct.pack("<IQBBHBIQ", 1, 0, 2, 0, 0, 0, 0, 0)), "kind 2"),
        (signed(struct.pack("<IQBBHBIQ", 1, 0, 0, 9, 0, 0, 0, 0)), "place 9"),
        (signed(struct.pack("<IQBBHBIQ", 1, 0, 0, 0, 65535, 0, 0, 0)), "ends at"),
        (
            signed(struct.pack("<IQBBHBIQ", 1, 0, 0, 1, 5, 1, 0, 0) + b"uint8" + bytes([9]) + bytes(7)),
            "9 bytes, 0 are left",
        ),
    ],
)
def test_forged_heads(raw: bytes, text: str) -> None:
    with pytest.raises(HandleError, match=text):
        drafts.read(raw, blocks())


GOOD = drafts.write(PICKLE, [part(), part("float32", (2, 8), block=1, offset=64), part(shape=(3,), source=b"abc")])


@given(st.binary(max_size=200))
def test_any_bytes(raw: bytes) -> None:
    for each in (raw, signed(raw)):
        try:
            _, things = drafts.read(each, blocks())
        except (HandleError, UnsupportedArrayError):
            continue
        assert all(thing.nbytes <= 1024 for thing in things)


@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255), st.booleans())
def test_any_byte_changed(at: int, change: int, right_hash: bool) -> None:
    """As an accident, and by who writes the hash that goes with it."""
    raw = bytearray(GOOD)
    raw[at] ^= change
    there = blocks()
    if right_hash:
        raw[8:16] = signed(bytes(raw[16:]))[8:16]
    try:
        _, things = drafts.read(bytes(raw), there)
    except (HandleError, UnsupportedArrayError):
        return
    assert right_hash or 4 < at < 8  # padding
    for thing in things[:2]:
        if isinstance(thing, np.ndarray) and thing.size:
            assert any(np.shares_memory(thing, block) for block in there) or thing.nbytes <= 3


@given(st.integers(0, len(GOOD) - 1))
def test_any_length(length: int) -> None:
    with pytest.raises(HandleError):
        drafts.read(GOOD[:length], blocks())


def test_failures() -> None:
    failure = Failure("KeyError", "'\udcff ü'", "line\nline")
    assert worker.failure_in(worker.failed(failure)) == failure
    for bad in (b"f", b"f{}", b"f[1]", b"f[1, 2, 3, 4]", b"f\xff", b"fnull"):
        with pytest.raises((ValueError, TypeError)):
            worker.failure_in(bad)
