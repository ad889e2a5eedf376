"""The bytes of a group's messages: what goes in comes out, and what was cut or changed is refused."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmcast import HandleError, message


@given(st.integers(1, 2**64 - 1), st.binary(max_size=50), st.lists(st.binary(max_size=50), max_size=5), st.booleans())
def test_round_trip(number: int, head: bytes, parts: list[bytes], rides: bool) -> None:
    received = message.unpack(bytearray(message.pack(number, head, parts, rides)))
    assert (received.number, received.head, received.error, received.rides) == (number, head, None, rides)
    assert [bytes(part) for part in received.parts] == parts


def test_an_error_is_told() -> None:
    try:
        raise LookupError("no such image")
    except LookupError as error:
        received = message.unpack(message.pack_error(7, error))
    assert received.number == 7
    assert received.parts == []
    assert received.error is not None
    assert (received.error["type"], received.error["text"]) == ("LookupError", "no such image")
    assert "test_message.py" in received.error["traceback"]


def test_every_cut_and_every_changed_bit_is_refused(seed: int) -> None:
    blob = message.pack(3, b"head", [b"first part", b"", b"second"])
    for length in range(len(blob)):
        with pytest.raises(HandleError):
            message.unpack(blob[:length])
    with pytest.raises(HandleError):
        message.unpack(blob + b"\0")
    for bit in range(8 * len(blob)):
        changed = bytearray(blob)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(HandleError):
            message.unpack(changed)
    rng = random.Random(seed)
    for _ in range(1000):
        with pytest.raises(HandleError):
            message.unpack(rng.randbytes(rng.randrange(200)))


def forged(kind: int, step: int, head_bytes: int, count: int, rest: bytes) -> bytes:
    """With a hash that is right."""
    fixed = message._FIXED.pack(message.MAGIC, message.VERSION, kind, step, head_bytes, count)
    return fixed + message._CHECK.pack(message._check(fixed, rest)) + rest


@pytest.mark.parametrize(
    ("kind", "head_bytes", "count", "rest"),
    [
        (0, 4, 0, b"abc"),
        (0, 0, 2**32 - 1, b""),
        (0, 2**32 - 1, 0, b""),
        (0, 0, 1, (2**64 - 1).to_bytes(8, "little")),
        (0, 0, 1, (0).to_bytes(8, "little") + b"more"),
        (3, 0, 0, b""),
        (1, 3, 0, b"{{{"),
        (1, 2, 0, b"[]"),
        (1, 2, 0, b"\xff\xff"),
    ],
)
def test_what_can_not_be_is_refused(kind: int, head_bytes: int, count: int, rest: bytes) -> None:
    with pytest.raises(HandleError):
        message.unpack(forged(kind, 1, head_bytes, count, rest))
