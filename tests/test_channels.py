"""Channels: one suite for every one of them. What is a channel's own: test_channel_<name>.py."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest

from ranks import Rank, Ranks
from raw import Raw, joined
from shmcast import GroupError, GroupTimeoutError, _native
from shmcast.channels import RECORD_BYTES, Channel, LoopbackChannel, Rendezvous

pytestmark = pytest.mark.torch

TIMEOUT_S = 60.0


@contextmanager
def loopback(here: Rank, entry: int) -> Iterator[Channel]:
    channel = LoopbackChannel()
    yield channel
    channel.close()


@contextmanager
def group(here: Rank, entry: int) -> Iterator[Channel]:
    from shmcast.channels.group import GroupChannel

    channel = GroupChannel(here.group, entry)
    yield channel
    channel.close()


@contextmanager
def ring(here: Rank, entry: int) -> Iterator[Channel]:
    from shmcast.channels.group import GroupChannel
    from shmcast.channels.ring import RingChannel

    rendezvous = GroupChannel(here.group, entry)
    raw = Raw(os.environ["SHMCAST_NAMESPACE"]) if here.rank == entry else None
    arena = int(rendezvous.broadcast(b"" if raw is None else b"%d" % raw.id))
    member = joined(os.environ["SHMCAST_NAMESPACE"], arena) if raw is None else raw.member
    tokens = [int(token) for token in rendezvous.gather(b"%d" % _native.process_token())]
    channel = RingChannel(_native.Ring(member, tokens, 0), here.rank, here.size, entry, timeout=TIMEOUT_S)
    try:
        yield channel
    finally:
        channel.close()
        if raw is not None:
            raw.close()


# A new channel enters the suite here: how a rank makes it, and which sizes of group it is for.
MAKERS: dict[str, Callable[[Rank, int], AbstractContextManager[Channel]]] = {
    "loopback": loopback,
    "group": group,
    "ring": ring,
}
CASES = [
    ("loopback", (0,), 0),
    *(
        (name, members, entry)
        for name in ("group", "ring")
        for members, entry in [((0,), 0), ((0, 1), 1), ((0, 1, 2, 3), 0), ((1, 2, 3), 2)]
    ),
]
RENDEZVOUS = [case for case in CASES if case[0] != "ring"]
WAITING = [case for case in CASES if len(case[1]) > 1]
# Around the sizes at which a message stops fitting into one frame or entry, into a whole ring of those, and far beyond.
SIZES = (0, 1, 4000, 4047, 4048, 4049, 4055, 4056, 4057, 4096, 65536, 4048 * 64 - 1, 4048 * 64 + 1, 3_000_001)

every_channel = pytest.mark.parametrize(("maker", "members", "entry"), CASES)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(4) as started:
        yield started


def message(number: int, size: int) -> bytes:
    return (zlib.crc32(b"%d" % number).to_bytes(4, "little") * (size // 4 + 1))[:size]


# ---- every channel


def in_order(here: Rank, maker: str, entry: int) -> bool:
    with MAKERS[maker](here, entry) as channel:
        assert (channel.name, channel.rank, channel.size, channel.entry) == (maker, here.rank, here.size, entry)
        for number in range(200):
            expected = message(number, number % 50)
            assert channel.broadcast(expected if here.rank == entry else None) == expected
        assert channel.overflows == 0
    return True


@every_channel
def test_messages_arrive_in_order(ranks: Ranks, maker: str, members: tuple[int, ...], entry: int) -> None:
    assert all(ranks.run(in_order, maker, entry, ranks=members))


def of_all_sizes(here: Rank, maker: str, entry: int) -> int:
    with MAKERS[maker](here, entry) as channel:
        for number, size in enumerate((*SIZES, *reversed(SIZES))):
            expected = message(number, size)
            received = channel.broadcast(expected if here.rank == entry else b"is not looked at")
            assert type(received) is bytes
            assert received == expected
        return channel.overflows


@every_channel
def test_messages_of_all_sizes(ranks: Ranks, maker: str, members: tuple[int, ...], entry: int) -> None:
    overflows = set(ranks.run(of_all_sizes, maker, entry, ranks=members))
    longest = {"loopback": max(SIZES), "group": 4056, "ring": _native.RING_PAYLOAD_BYTES}[maker]
    assert overflows == {2 * sum(size > longest for size in SIZES)}


def gathered(here: Rank, maker: str, entry: int) -> list[list[bytes]]:
    with MAKERS[maker](here, entry) as channel:
        assert isinstance(channel, Rendezvous)
        assert channel.timeout > 0
        rounds = [
            channel.gather(b"rank %d" % here.rank),
            channel.gather(b""),
            channel.gather(bytes([here.rank]) * RECORD_BYTES),
        ]
        with pytest.raises(ValueError, match=f"{RECORD_BYTES + 1} bytes"):
            channel.gather(b"x" * (RECORD_BYTES + 1))
        channel.broadcast(b"and on" if here.rank == entry else None)
    return rounds


@pytest.mark.parametrize(("maker", "members", "entry"), RENDEZVOUS)
def test_records_are_gathered_in_the_order_of_ranks(
    ranks: Ranks, maker: str, members: tuple[int, ...], entry: int
) -> None:
    size = len(members)
    expected = [
        [b"rank %d" % rank for rank in range(size)],
        [b""] * size,
        [bytes([rank]) * RECORD_BYTES for rank in range(size)],
    ]
    assert ranks.run(gathered, maker, entry, ranks=members) == [expected] * size


def misused(here: Rank, maker: str, entry: int) -> bool:
    with MAKERS[maker](here, entry) as channel:
        if here.rank == entry:
            for wrong in (None, "text", bytearray(b"bytes")):
                with pytest.raises(TypeError, match=type(wrong).__name__):
                    channel.broadcast(wrong)  # type: ignore[arg-type]
        # none of that has moved anything
        assert channel.broadcast(b"fine" if here.rank == entry else None) == b"fine"
        channel.close()
        channel.close()
        if maker != "loopback":
            with pytest.raises(GroupError, match="closed"):
                channel.broadcast(b"")
    return True


@every_channel
def test_misuse_is_refused_before_anything_is_sent(
    ranks: Ranks, maker: str, members: tuple[int, ...], entry: int
) -> None:
    assert all(ranks.run(misused, maker, entry, ranks=members))


def polled(here: Rank, maker: str, entry: int) -> bool:
    with MAKERS[maker](here, entry) as channel:
        if here.rank == entry:
            for _ in range(here.size - 1):
                here.parent.receive()  # another rank has looked in vain
            channel.broadcast(b"first")
            channel.broadcast(b"second")
            return channel.poll()
        if maker == "group":
            with pytest.raises(GroupError, match="can not tell"):
                channel.poll()
            here.parent.send("looked")
            return [channel.broadcast(), channel.broadcast()] != [b"first", b"second"]
        assert channel.poll() is False
        here.parent.send("looked")
        for expected in (b"first", b"second"):
            while not channel.poll():
                pass
            assert channel.broadcast(timeout=0.0) == expected
        return channel.poll()


@every_channel
def test_poll_tells_whether_a_message_is_there(ranks: Ranks, maker: str, members: tuple[int, ...], entry: int) -> None:
    running = ranks.start(polled, maker, entry, ranks=members)
    for rank, process in enumerate(running):
        if rank != entry:
            assert process.receive() == "looked"
            running[entry].send("go on")
    assert ranks.results(running) == [False] * len(members)


class Enough(Exception):
    """What a watch raises."""


def never_sent(here: Rank, maker: str, entry: int) -> str:
    with MAKERS[maker](here, entry) as channel:
        channel.broadcast(b"first" if here.rank == entry else None)
        if here.rank == entry:
            here.parent.receive()  # until the others have given up
            return "sent nothing"
        looks: list[int] = []

        def watch() -> None:
            looks.append(1)
            if len(looks) == 2:
                raise Enough

        with pytest.raises(Enough):
            channel.broadcast(timeout=1000.0, watch=watch)
        here.parent.send("gave up")
        return "watch"


def never_sent_timeout(here: Rank, maker: str, entry: int) -> str:
    with MAKERS[maker](here, entry) as channel:
        channel.broadcast(b"first" if here.rank == entry else None)
        if here.rank == entry:
            here.parent.receive()
            return "sent nothing"
        with pytest.raises(GroupTimeoutError, match=r"0\.2 s"):
            channel.broadcast(timeout=0.2)
        here.parent.send("gave up")
        return "timeout"


@pytest.mark.parametrize(("maker", "members", "entry"), WAITING)
@pytest.mark.parametrize("how", [never_sent, never_sent_timeout])
def test_a_wait_ends(ranks: Ranks, how: Any, maker: str, members: tuple[int, ...], entry: int) -> None:
    running = ranks.start(how, maker, entry, ranks=members)
    # They give up while the entry rank still waits for us.
    assert [child.receive() for rank, child in enumerate(running) if rank != entry] == ["gave up"] * (len(members) - 1)
    running[entry].send("go on")
    expected = ["watch" if how is never_sent else "timeout"] * len(members)
    expected[entry] = "sent nothing"
    assert ranks.results(running) == expected
