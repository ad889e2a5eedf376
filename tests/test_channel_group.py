"""`GroupChannel`: what is its own; what every channel promises is in test_channels.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from ranks import Rank, Ranks
from shmcast import GroupError, GroupTimeoutError, PeerLostError

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(4) as started:
        yield started


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
