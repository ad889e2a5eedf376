"""The head of a message: what is written is read, and what is not written is refused, without any other exception."""

from __future__ import annotations

import enum
import struct
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmcast import lockstep
from shmcast.errors import HandleError, MaterializeError
from shmcast.lockstep import Failure, Head, Record

FAILURE = Failure("ValueError", "no such färbe \N{CAT FACE}", "Traceback (most recent call last):\n  ...")
RECORDS = [
    Record(3, lockstep.VALUE),
    Record(0, lockstep.NONE),
    Record(6, lockstep.FAILED, FAILURE),
    Record(4, lockstep.REFUSED, Failure("", "full", "")),
    Record(1, lockstep.CANCELLED),
    Record(5, lockstep.VALUE),
    Record(2, lockstep.BEGIN_RAW),
    Record(8, lockstep.BEGIN_OWN),
    Record(9, lockstep.BEGUN),
    Record(10, lockstep.RAW),
    Record(7, lockstep.OWN),
]
HEAD = Head(lockstep.STEP, 11, 0x0123456789ABCDEF, 1 << 40, RECORDS)
PARTS = 4


def test_what_is_written_is_read() -> None:
    assert lockstep.read(lockstep.write(HEAD), PARTS) == HEAD
    empty = Head(lockstep.CAST, 0, 0, 0, [])
    assert lockstep.read(lockstep.write(empty), 0) == empty


TEXTS = st.text(max_size=20)
ENDS = st.sampled_from([lockstep.VALUE, lockstep.NONE, *range(lockstep.CANCELLED, lockstep.OWN + 1)])
FAILURES = st.builds(Failure, TEXTS, TEXTS, TEXTS)


@given(
    st.sampled_from([lockstep.STEP, lockstep.CAST]),
    st.integers(0, (1 << 64) - 1),
    st.integers(0, (1 << 64) - 1),
    st.dictionaries(st.integers(0, 1 << 40), ENDS | FAILURES, max_size=20),
)
def test_any_head(call: int, names: int, inflight_bytes: int, ends: dict[int, Any]) -> None:
    records = [
        Record(serial, lockstep.FAILED, end) if isinstance(end, Failure) else Record(serial, end)
        for serial, end in ends.items()
    ]
    head = Head(call, max(ends, default=-1) + 1, names, inflight_bytes, records)
    values = sum(record.end in lockstep.HAVE_PART for record in records)
    assert lockstep.read(lockstep.write(head), values) == head


def test_what_is_cut_is_refused() -> None:
    raw = lockstep.write(HEAD)
    for size in range(len(raw)):
        with pytest.raises(HandleError, match="decode head"):
            lockstep.read(raw[:size], PARTS)
    with pytest.raises(HandleError, match="records end at"):
        lockstep.read(raw + b"\0", PARTS)


def test_a_flipped_bit_is_refused_or_gives_another_head() -> None:
    # The hash of the whole message finds it in any case (test_message); nothing here may go wrong in another way.
    raw = lockstep.write(HEAD)
    refused = 0
    for changed in flipped(raw):
        try:
            assert lockstep.read(changed, PARTS) != HEAD
        except HandleError as error:
            refused += 1
            assert str(error).startswith("decode head: ")
    assert refused > 4 * len(raw)


def flipped(raw: bytes) -> Iterator[bytes]:
    for bit in range(8 * len(raw)):
        changed = bytearray(raw)
        changed[bit // 8] ^= 1 << bit % 8
        yield bytes(changed)


@pytest.mark.parametrize(
    ("head", "parts", "text"),
    [
        (HEAD, 1, "4 records have a part, 1 parts came"),
        (HEAD, 5, "4 records have a part, 5 parts came"),
        (HEAD._replace(submitted=10), PARTS, "the last 10, of 10"),
        (HEAD._replace(records=[*RECORDS, Record(0, lockstep.NONE)]), PARTS, "12 records name 11 requests"),
        (HEAD._replace(call=2), PARTS, "call 2"),
        (HEAD._replace(records=[Record(0, 10)]), 0, "record 0 of 1 has end 10"),
    ],
)
def test_what_makes_no_sense_is_refused(head: Head, parts: int, text: str) -> None:
    with pytest.raises(HandleError, match=text):
        lockstep.read(lockstep.write(head), parts)


def test_other_bytes_are_refused() -> None:
    raw = lockstep.write(HEAD)
    for changed, text in (
        (b"", "0 bytes"),
        (b"shmT" + raw[4:], "starts with b'shmT'"),
        (raw[:4] + b"\1" + raw[5:], "version 1, this build reads 2"),
        (raw[:6] + b"\1" + raw[7:], "padding 0100"),
        (raw[:32] + struct.pack("<I", 1 << 31) + raw[36:], "record 11 of 2147483648"),
        (raw.replace("ä".encode(), b"\xff\xff"), "invalid start byte"),
    ):
        with pytest.raises(HandleError, match=text):
            lockstep.read(changed, PARTS)


# ---- errors as text


class Unprintable(Exception):
    def __str__(self) -> str:
        raise SystemExit("no text")


def failure_of(error: BaseException) -> Failure:
    try:
        raise error
    except BaseException as caught:
        return lockstep.failure_of(caught)


def test_an_exception_as_text() -> None:
    failure = failure_of(KeyError("x"))
    assert (failure.kind, failure.text) == ("KeyError", "'x'")
    assert failure.traceback.startswith("Traceback")
    assert "raise error" in failure.traceback


def test_a_failure_of_another_process_is_told_as_it_was_there() -> None:
    first = failure_of(KeyError("x"))
    assert failure_of(MaterializeError.of("r1", *first)) == first
    assert failure_of(MaterializeError("made by hand")).kind == "MaterializeError"


def test_an_exception_without_a_text() -> None:
    assert failure_of(Unprintable()) == ("Unprintable", "its text can not be had: SystemExit", "")


def test_long_texts_are_cut() -> None:
    failure = failure_of(ValueError("x" * 10_000_000))
    assert failure.text.endswith("... (10000000 characters)")
    raw = lockstep.write(Head(lockstep.STEP, 1, 0, 0, [Record(0, lockstep.FAILED, failure)]))
    assert len(raw) < 50_000


def test_what_is_no_unicode_is_sent_all_the_same() -> None:
    failure = failure_of(ValueError("bad \udc80 name"))
    raw = lockstep.write(Head(lockstep.STEP, 1, 0, 0, [Record(0, lockstep.FAILED, failure)]))
    assert lockstep.read(raw, 0).records[0].failure.text == "bad ? name"


# ---- names


class Color(enum.Enum):
    RED = 1


class Opaque:
    """Its repr has its address."""


def chained(*rids: Any) -> int:
    names = 0
    for rid in rids:
        names = lockstep.chain(names, rid)
    return names


def test_names_depend_on_ids_and_order() -> None:
    rids = [
        "a",
        "b",
        "1",
        1,
        b"a",
        None,
        1.5,
        ("a", 1),
        ("a", ("1",)),
        Color.RED,
        uuid.UUID(int=1),
        uuid.UUID(int=2),
        "\udc80",
    ]
    assert len({chained(rid) for rid in rids}) == len(rids)
    assert chained("a", "b") != chained("b", "a")
    assert chained("a", "b") != chained("ab")
    assert chained(*rids) == chained(*rids)


def test_names_of_ids_that_look_different_elsewhere_are_equal() -> None:
    assert chained(Opaque()) == chained(Opaque())
    assert chained(frozenset("ab")) == chained(frozenset("ba"))
    assert chained(Opaque()) != chained(frozenset("ab"))
