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


def takes_in(here: Rank, options: dict[str, Any], masks: list[list[int]]) -> list[int]:
    """What all learn of what some could not do with a tree, which all get nevertheless."""
    found = []
    with group_of(here, options) as group:
        for number, all_masks in enumerate(masks):
            tree = {"number": number, "values": np.full(30_000, number)}
            for local in (False, True):
                seen = []

                def take_in(got: Any, mask: int = all_masks[here.rank], seen: list[Any] = seen) -> int:
                    seen.append(got)
                    return mask

                step = group.step
                got = group.broadcast(tree if here.rank == 0 else None, local=local, take_in=take_in)
                assert seen[0] is got and len(seen) == 1 and group.step == step + 1
                assert (got is tree) == (local and here.rank == 0)
                assert got["number"] == number and (got["values"] == number).all()
                found.append(group.failures)
            assert group.broadcast(nothing=True, take_in=take_in) is None and len(seen) == 1
            assert group.failures == 0
        assert group.stats()["errors"] == 0
        together(here)
    return found


@every_way
@pytest.mark.filterwarnings("ignore:shmcast sends pickles")
def test_a_tree_that_some_could_not_take_in(ranks: Ranks, options: dict[str, Any]) -> None:
    masks = [[0, 0, 0, 0], [1, 0, 4, 0], [0, 0, 0, ALL >> 1], [0, 0, 0, 0]]
    expected = [0, 0, 5, 5, ALL >> 1, ALL >> 1, 0, 0]
    assert ranks.run(takes_in, options, masks) == [expected] * 4


def answers_wrong(here: Rank, options: dict[str, Any], answer: Any) -> str:
    """What is no answer counts as if that rank could not have the tree: the others must not wait for it."""
    with group_of(here, options) as group:
        with pytest.raises(GroupError) as raised:
            group.broadcast([1, 2], take_in=lambda _: answer if here.rank == 1 else 0)
        assert (raised.value.__cause__ is not None) == (here.rank == 1)
        assert group.broadcast([3]) == [3]
        together(here)
        return str(raised.value)


@every_way
@pytest.mark.parametrize("answer", [1 << 63, 1 << 64, -1, None, "1"])
@pytest.mark.filterwarnings("ignore:shmcast sends pickles")
def test_taking_in_that_answers_wrong(ranks: Ranks, options: dict[str, Any], answer: Any) -> None:
    said = ranks.run(answers_wrong, options, answer)
    assert said == ["step 1: rank 1 can not rebuild tree 0 of the message"] * 4


def can_not(here: Rank, options: dict[str, Any]) -> list[str]:
    """A rank that raises: nobody has the tree, all the same error, and the group goes on."""

    def take_in(got: Any) -> int:
        if here.rank == 2:
            raise KeyError("says the test")
        return 1

    with group_of(here, options) as group:
        with pytest.raises(GroupError) as raised:
            group.broadcast([1, 2], take_in=take_in)
        assert isinstance(raised.value.__cause__, KeyError) == (here.rank == 2)
        assert group.broadcast([3]) == [3]
        together(here)
        return [str(raised.value)]


@every_way
@pytest.mark.filterwarnings("ignore:shmcast sends pickles")
def test_taking_in_that_raises(ranks: Ranks, options: dict[str, Any]) -> None:
    # The others say only that they could not do all with it; who could not have it is not agreed on.
    text = "step 1: one or more of ranks 0, 1, 2, 3 can not rebuild tree 0 of the message"
    assert ranks.run(can_not, options) == [[text]] * 4


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
