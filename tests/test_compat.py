"""`broadcast_pyobj` as engines call it."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import shmcast
from ranks import Patched, Rank, Ranks
from shmcast import compat, process
from shmcast.compat import broadcast_pyobj
from shmcast.sizes import MAX_BYTES_VARIABLE
from trees import Item, a_tree, noise, same

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(3) as started:
        yield started


def test_engines_call_it_by_these_names() -> None:
    parameters = list(inspect.signature(broadcast_pyobj).parameters)
    assert parameters == ["data", "rank", "group", "src", "force_cpu_device", "dist_group"]
    assert shmcast.broadcast_pyobj is broadcast_pyobj


def as_engines_do(here: Rank, source: int) -> bool:
    me = here.ranks[here.rank]
    is_source = me == source
    try:
        for number in range(3):
            sent = [Item("request", noise(200_000, number)), {"text": "x"}, number]
            received = broadcast_pyobj(sent if is_source else [], me, here.group, source)
            assert (received is sent) == is_source
            assert same(received, sent)
            assert broadcast_pyobj([], me, here.group, src=source) == []
            assert broadcast_pyobj(None, me, dist_group=here.group, src=source, force_cpu_device=True) == []
        sent = [a_tree(1)]
        received = broadcast_pyobj(sent if is_source else None, me, here.group, source)
        assert same(received, sent)
        assert list(compat._groups) == [(id(here.group), source)]
        assert next(iter(compat._groups.values()))[1].mode == "shared"
        # another source in the same group is another group of ours, with an arena of its own
        other = here.ranks[0] if source != here.ranks[0] else here.ranks[-1]
        assert broadcast_pyobj([me], me, here.group, other) == [other]
        assert len(compat._groups) == (1 if other == source else 2)
    finally:
        compat.close_groups()
    assert not compat._groups
    assert same(received, sent)
    return True


@pytest.mark.parametrize(
    ("members", "source"), [((0,), 0), ((0, 1), 0), ((0, 1, 2), 2), ((1, 2), 1), ((1, 2), 2), ((2,), 2)]
)
def test_source_is_a_rank_of_the_default_group(ranks: Ranks, members: tuple[int, ...], source: int) -> None:
    assert all(ranks.run(as_engines_do, source, ranks=members))


def over_the_default_group(here: Rank) -> bool:
    try:
        return all(broadcast_pyobj([number, here.rank], here.rank, src=2) == [number, 2] for number in range(3))
    finally:
        compat.close_groups()


def test_the_default_group(ranks: Ranks) -> None:
    assert all(ranks.run(over_the_default_group))


def wrong(here: Rank) -> bool:
    me = here.ranks[here.rank]
    with pytest.raises(ValueError, match=f"this process has rank {me}"):
        # A rank that lies about itself, on all ranks: nothing is sent.
        broadcast_pyobj([], 1 if me == 2 else 2, here.group, 2)
    with pytest.raises(ValueError):
        broadcast_pyobj([], me, here.group, 0)
    assert not compat._groups
    return True


def test_ranks_that_do_not_fit(ranks: Ranks) -> None:
    assert all(ranks.run(wrong, ranks=(1, 2)))


def no_memory(key: Any) -> Any:
    raise shmcast.ArenaGoneError(2, "there is no such arena (says the test)")


def without_shared_memory(here: Rank) -> bool:
    try:
        with (
            Patched(process, "join", no_memory) if here.rank == 1 else Patched(),
            warnings.catch_warnings(record=True) as warned,
        ):
            warnings.simplefilter("always")
            sent = [noise(200_000, 1), "text"]
            received = broadcast_pyobj(sent if here.rank == 0 else [], here.rank, here.group, 0)
        assert same(received, sent)
        assert bool([1 for warning in warned if "sends pickles" in str(warning.message)]) == (here.rank == 0)
        assert same(broadcast_pyobj(sent if here.rank == 0 else [], here.rank, here.group, 0), sent)
    finally:
        compat.close_groups()
    return True


def test_ranks_that_share_no_memory_still_get_it(ranks: Ranks) -> None:
    assert all(ranks.run(without_shared_memory))


def over_torch_alone(here: Rank) -> bool:
    sent = [np.arange(5), "text"]
    assert same(broadcast_pyobj(sent if here.rank == 1 else [], here.rank, here.group, 1, force_cpu_device=False), sent)
    assert not compat._groups
    return True


def test_groups_without_a_cpu_part_go_over_torch(ranks: Ranks) -> None:
    assert all(ranks.run(over_torch_alone))


def groups_come_and_go(here: Rank) -> bool:
    import torch.distributed as dist

    try:
        for number in range(4):
            group = dist.new_group(list(here.ranks), backend="gloo")
            assert broadcast_pyobj([number, here.rank], here.rank, group, 0) == [number, 0]
            # That of the process group before is gone: its process group was destroyed.
            assert len(compat._groups) == 1
            dist.destroy_process_group(group)
    finally:
        compat.close_groups()
    return True


def test_groups_of_destroyed_process_groups_are_closed(ranks: Ranks) -> None:
    assert all(ranks.run(groups_come_and_go))


def sized(here: Rank) -> int:
    os.environ[MAX_BYTES_VARIABLE] = "20MiB"
    try:
        broadcast_pyobj([], here.rank, here.group, 0)
        group = next(iter(compat._groups.values()))[1]
        return group._memory.member.max_bytes
    finally:
        del os.environ[MAX_BYTES_VARIABLE]
        compat.close_groups()


def test_the_arena_is_sized_by_the_environment(ranks: Ranks) -> None:
    assert ranks.run(sized) == [20 << 20] * 3
