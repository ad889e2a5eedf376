"""Channels: one suite for every one of them, then what is the gloo channel's own."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ranks import Rank, Ranks
from shmcast import GroupError, GroupTimeoutError, PeerLostError
from shmcast.channels import RECORD_BYTES, LoopbackChannel, Rendezvous

pytestmark = pytest.mark.torch

# A new channel enters the suite here: how a rank makes it, and which sizes of group it is for.
MAKERS: dict[str, Callable[[Rank, int], Rendezvous]] = {
    "loopback": lambda here, entry: LoopbackChannel(),
    "group": lambda here, entry: _group_channel(here, entry),
}
CASES = [
    ("loopback", (0,), 0),
    ("group", (0,), 0),
    ("group", (0, 1), 1),
    ("group", (0, 1, 2, 3), 0),
    ("group", (1, 2, 3), 2),
]
# Around the sizes at which a message stops fitting into one frame, and far beyond.
SIZES = (0, 1, 4000, 4055, 4056, 4057, 4096, 65536, 3_000_001)

every_channel = pytest.mark.parametrize(("maker", "members", "entry"), CASES)


def _group_channel(here: Rank, entry: int, **options: Any) -> Rendezvous:
    from shmcast.channels.group import GroupChannel

    return GroupChannel(here.group, entry, **options)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(4) as started:
        yield started


def message(number: int, size: int) -> bytes:
    return (zlib.crc32(b"%d" % number).to_bytes(4, "little") * (size // 4 + 1))[:size]


# ---- every channel


def in_order(here: Rank, maker: str, entry: int) -> bool:
    channel = MAKERS[maker](here, entry)
    assert (channel.rank, channel.size, channel.entry) == (here.rank, here.size, entry)
    for number in range(200):
        expected = message(number, number % 50)
        assert channel.broadcast(expected if here.rank == entry else None) == expected
    channel.close()
    return True


@every_channel
def test_messages_arrive_in_order(ranks: Ranks, maker: str, members: tuple[int, ...], entry: int) -> None:
    assert all(ranks.run(in_order, maker, entry, ranks=members))


def of_all_sizes(here: Rank, maker: str, entry: int) -> bool:
    channel = MAKERS[maker](here, entry)
    for number, size in enumerate((*SIZES, *reversed(SIZES))):
        expected = message(number, size)
        received = channel.broadcast(expected if here.rank == entry else b"is not looked at")
        assert type(received) is bytes
        assert received == expected
    channel.close()
    return True


@every_channel
def test_messages_of_all_sizes(ranks: Ranks, maker: str, members: tuple[int, ...], entry: int) -> None:
    assert all(ranks.run(of_all_sizes, maker, entry, ranks=members))


def gathered(here: Rank, maker: str, entry: int) -> list[list[bytes]]:
    channel = MAKERS[maker](here, entry)
    rounds = [
        channel.gather(b"rank %d" % here.rank),
        channel.gather(b""),
        channel.gather(bytes([here.rank]) * RECORD_BYTES),
    ]
    channel.broadcast(b"and on" if here.rank == entry else None)
    channel.close()
    return rounds


@every_channel
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
    channel = MAKERS[maker](here, entry)
    with pytest.raises(ValueError, match=f"{RECORD_BYTES + 1} bytes"):
        channel.gather(b"x" * (RECORD_BYTES + 1))
    if here.rank == entry:
        with pytest.raises(TypeError, match="NoneType"):
            channel.broadcast(None)
    # none of that has moved anything
    assert channel.broadcast(b"fine" if here.rank == entry else None) == b"fine"
    channel.close()
    channel.close()
    return True


@every_channel
def test_misuse_is_refused_before_anything_is_sent(
    ranks: Ranks, maker: str, members: tuple[int, ...], entry: int
) -> None:
    assert all(ranks.run(misused, maker, entry, ranks=members))


class Enough(Exception):
    """What a watch raises."""


def never_sent(here: Rank, maker: str, entry: int) -> str:
    channel = MAKERS[maker](here, entry)
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
    channel = MAKERS[maker](here, entry)
    channel.broadcast(b"first" if here.rank == entry else None)
    if here.rank == entry:
        here.parent.receive()
        return "sent nothing"
    with pytest.raises(GroupTimeoutError, match=r"0\.2 s"):
        channel.broadcast(timeout=0.2)
    here.parent.send("gave up")
    return "timeout"


WAITING = [case for case in CASES if len(case[1]) > 1]


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


# ---- over gloo


def garbage(here: Rank, kind: str) -> str:
    import torch
    import torch.distributed as dist

    from shmcast.channels import group as module

    channel = module.GroupChannel(here.group, 0)
    channel.broadcast(b"good" if here.rank == 0 else None)
    if here.rank == 0:
        if kind == "another collective":
            frame = torch.arange(module.FRAME_BYTES).to(torch.uint8)
        else:
            if kind == "skipped":
                channel.sent += 1
            elif kind == "repeated":
                channel.sent -= 1
            start = channel._start
            frame = channel._tensor

            def changed(tensor: Any, timeout: float | None) -> Any:
                if kind == "version":
                    tensor[4] = 9
                elif kind == "header":
                    tensor[16] += 1
                elif kind == "payload":
                    tensor[45] += 1
                elif kind == "overflow" and len(tensor) != module.FRAME_BYTES:
                    tensor = tensor.clone()
                    tensor[70000] += 1
                return start(tensor, timeout)

            channel._start = changed  # type: ignore[method-assign]
            channel.broadcast(b"x" * 100000 if kind == "overflow" else b"hello world")
            return ""
        dist.broadcast(frame, here.ranks[0], here.group)
        return ""
    with pytest.raises(GroupError) as caught:
        channel.broadcast()
    assert not isinstance(caught.value, (PeerLostError, GroupTimeoutError))
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("another collective", r"message 2: it starts with b'\x00\x01\x02\x03', not b'shmM'"),
        ("version", "version 9, this build reads 1"),
        ("header", "message 2: it hashes to "),
        ("payload", "message 2: it hashes to "),
        ("overflow", "message 2: its 100000 bytes hash to "),
        ("skipped", "message 2: number 3 came"),
        ("repeated", "message 2: number 1 came"),
    ],
)
def test_garbage_is_named(ranks: Ranks, kind: str, expected: str) -> None:
    entry, *others = ranks.run(garbage, kind, ranks=(0, 2, 3))
    assert entry == ""
    for text in others:
        assert expected in text


def wrong_groups(here: Rank) -> bool:
    import torch.distributed as dist

    from shmcast.channels import group as module

    with pytest.raises(ValueError, match="entry 2: the group has the ranks 0 to 1"):
        module.GroupChannel(here.group, 2)
    with pytest.raises(ValueError, match="not in the group"):
        module.GroupChannel(dist.GroupMember.NON_GROUP_MEMBER)
    channel = module.GroupChannel(here.group)
    assert channel.process_group is here.group
    channel.close()
    with pytest.raises(GroupError, match="closed"):
        channel.broadcast(b"")
    return True


def test_groups_that_can_not_be_used(ranks: Ranks) -> None:
    assert all(ranks.run(wrong_groups, ranks=(0, 1)))
