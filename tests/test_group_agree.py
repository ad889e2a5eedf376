"""`Group.agree` and messages of nothing: a step without a message, and a message without a step to wait for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import shmcast
from ranks import Rank, Ranks, together
from shmcast import GroupError, PeerLostError

pytestmark = pytest.mark.torch
ALL = (1 << 64) - 1


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(4) as started:
        yield started


every_way = pytest.mark.parametrize(
    "options", [{}, {"channel": "group"}, {"pretend": True}], ids=["ring", "gloo", "apart"]
)


def group_of(here: Rank, options: dict[str, Any]) -> shmcast.Group:
    if options.get("pretend"):
        # As where memory is not shared: the entry rank has no arena to show.
        return shmcast.Group(here.group, fallback="object", max_bytes="1PiB")
    return shmcast.Group(here.group, max_bytes="16MiB", **options)


def says(here: Rank, options: dict[str, Any], masks: list[list[int]]) -> list[tuple[int, list[int]]]:
    """What a rank learns, between messages of all kinds."""
    found = []
    with group_of(here, options) as group:
        assert group.mode == ("object" if options.get("pretend") else "shared")
        for number, all_masks in enumerate(masks):
            step = group.step
            found.append(group.agree(all_masks[here.rank]))
            assert group.step == step + 1
            assert group.broadcast(np.full(30_000, number), nothing=number % 2 == 1) is None or number % 2 == 0
        together(here)
    return found


@every_way
@pytest.mark.filterwarnings("ignore:shmcast sends pickles")
def test_all_learn_what_some_could_not(ranks: Ranks, options: dict[str, Any]) -> None:
    masks = [[0, 0, 0, 0], [1, 0, 4, 0], [0, 0, 0, ALL], [8, 8, 8, 8], [0, 0, 0, 0], [1 << 63, 1, 0, 0]]
    expected = [(0, []), (5, [0, 2]), (ALL, [3]), (8, [0, 1, 2, 3]), (0, []), (1 << 63 | 1, [0, 1])]
    assert ranks.run(says, options, masks) == [expected] * 4


def test_a_process_alone_agrees_with_itself() -> None:
    with shmcast.Group(max_bytes="16MiB") as group:
        assert group.agree() == (0, [])
        assert group.agree(6) == (6, [0])
        for wrong in (-1, 1 << 64):
            with pytest.raises(ValueError, match="64 bits"):
                group.agree(wrong)
        assert group.step == 2
    with pytest.raises(GroupError, match="closed"):
        group.agree()


def nothing(here: Rank, count: int) -> list[Any]:
    """Many messages of nothing, and a tree at the end: the entry rank waits for nobody meanwhile."""
    with shmcast.Group(here.group, max_bytes="16MiB") as group:
        if here.rank == 0:
            for _ in range(count):
                assert group.broadcast(nothing=True) is None
            here.parent.send("sent")  # though no other rank has taken in one of them
            here.parent.receive()
        else:
            here.parent.receive()
            for _ in range(count):
                assert group.broadcast() is None
        got = group.broadcast({"a": 1})
        together(here)
    return [got, group.step]


def test_nobody_waits_for_a_message_of_nothing(ranks: Ranks) -> None:
    running = ranks.start(nothing, 30)
    assert running[0].receive() == "sent"
    for rank in running:
        rank.send()
    assert ranks.results(running) == [[{"a": 1}, 31]] * 4


def dies(here: Rank, victim: int) -> None:
    with shmcast.Group(here.group, max_bytes="16MiB") as group:
        group.broadcast(1)
        here.parent.send("ready")
        if here.rank == victim:
            here.parent.receive()
        try:
            group.agree()
        except GroupError as error:
            here.parent.send((type(error).__name__, str(error), str(group.broken) == str(error)))
            here.parent.receive()


@pytest.mark.parametrize("victim", [0, 2])
def test_who_dies_is_named(namespace: str, victim: int) -> None:
    with Ranks(3) as own:
        running = own.start(dies, victim)
        for rank in running:
            assert rank.receive() == "ready"
        running[victim].kill()
        survivors = [rank for number, rank in enumerate(running) if number != victim]
        said = [rank.receive() for rank in survivors]
        for kind, text, broken in said:
            assert kind == PeerLostError.__name__ and broken, text
            assert f"rank {victim} died" in text
        for rank in survivors:
            rank.send()
    shmcast.sweep()
