"""Groups: what every rank gets, also when a tree or a rank can not be served. Ranks that do not come: `test_group_lost`."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import shmcast
from ranks import Patched, Rank, Ranks, in_use, settle, together
from shmcast import GroupError, codec, process
from trees import a_tree, noise, same

torch_only = pytest.mark.torch


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(4) as started:
        yield started


# ---- without torch.distributed


def test_a_process_alone_is_a_group() -> None:
    with shmcast.Group(max_bytes="32MiB") as group:
        assert (group.rank, group.size, group.entry, group.mode) == (0, 1, 0, "shared")
        assert group.peers == (shmcast.process_token(),)
        source = np.arange(100_000.0)
        received = group.broadcast({"array": source, "text": "x"})
        source[:] = 0
        assert received["text"] == "x"
        assert np.array_equal(received["array"], np.arange(100_000.0))
        assert not received["array"].flags.writeable
        assert group.broadcast(source, local=True) is source
        assert group.stats()["messages"] == 0
        assert group.step == 2
        del received
        assert in_use(group._memory.arena) == 0
    group.close()
    with pytest.raises(GroupError, match="closed"):
        group.broadcast(1)


def test_views_outlive_the_group() -> None:
    with shmcast.Group(max_bytes="32MiB") as group:
        received = group.broadcast(np.arange(100_000.0))
    assert np.array_equal(received, np.arange(100_000.0))


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="fallback"):
        shmcast.Group(fallback="hope")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="channel"):
        shmcast.Group(channel="pigeon")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="entry 1"):
        shmcast.Group(entry=1)
    with pytest.raises(GroupError, match="no arena: ValueError: max_bytes: '3 furlongs'"):
        shmcast.Group(max_bytes="3 furlongs")


def test_an_arena_serves_one_group_at_a_time() -> None:
    with shmcast.Arena.create("32MiB") as arena:
        with shmcast.Group(arena=arena) as group:
            received = group.broadcast(np.ones(10_000))
            with pytest.raises(GroupError, match="serves another group"):
                shmcast.Group(arena=arena)
        assert not arena.closed
        assert in_use(arena) == 1
        with shmcast.Group(arena=arena) as group:
            assert np.array_equal(group.broadcast(received), np.ones(10_000))
        del received
        assert in_use(arena) == 0


class Reenters:
    """Broadcasts while it is pickled."""

    def __init__(self, group: shmcast.Group) -> None:
        self.group = group

    def __reduce__(self) -> Any:
        return self.group.broadcast(1), ()


def test_broadcast_is_not_reentered() -> None:
    with shmcast.Group(max_bytes="16MiB") as group:
        with pytest.raises(GroupError, match="under way"):
            group.broadcast(Reenters(group))
        assert group.broadcast("fine") == "fine"


def test_a_forked_child_is_no_rank() -> None:
    with shmcast.Group(max_bytes="16MiB") as group:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                group.broadcast(1)
            except GroupError as error:
                group.close()
                status = 0 if "forked" in str(error) else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert group.broadcast(np.ones(10_000)).sum() == 10_000


# ---- ranks


def everything(here: Rank, entry: int, channel: str) -> list[Any]:
    import torch

    from shmcast.channels.group import INLINE_BYTES

    def options() -> dict[str, Any]:
        return {"max_bytes": "64MiB", "fallback": "object", "channel": channel} if here.rank == entry else {}

    group = shmcast.Group(here.group, entry, **options())
    assert group.mode == "shared"
    assert group.channel == ("ring" if channel == "auto" and here.size > 1 else "group")
    assert (group.rank, group.size, group.entry) == (here.rank, here.size, entry)
    for seed in range(3):
        expected = a_tree(seed)
        received = group.broadcast(expected if here.rank == entry else None)
        assert same(received, expected), seed
        large = received["numpy int64"]
        assert isinstance(large, np.ndarray)
        assert not large.flags.writeable
        # one object in the tree is one object there
        assert received["nested"].extra["same"] is received["nested"].feature[0]
    large_message = [np.full(100, number) for number in range(200)]
    for tree in (None, [], 17, b"x" * (3 * INLINE_BYTES), large_message, "again"):
        assert same(group.broadcast(tree if here.rank == entry else None), tree)
    # what one rank writes is its own
    tensor = group.broadcast(torch.arange(50_000) if here.rank == entry else None)
    tensor += here.rank
    assert torch.equal(group.broadcast(tensor + 0 if here.rank == entry else None), torch.arange(50_000) + entry)
    assert torch.equal(tensor, torch.arange(50_000) + here.rank)
    del received, large, tensor
    settle(here, group)
    assert group.stats()["unconfirmed"] == 0
    peers = list(group.peers)
    group.close()
    return peers


@torch_only
@pytest.mark.parametrize("channel", ["auto", "group"])
@pytest.mark.parametrize(
    ("members", "entry"), [((0,), 0), ((0, 1), 0), ((0, 1, 2, 3), 0), ((0, 1, 2, 3), 3), ((1, 3), 1), ((1, 2, 3), 0)]
)
def test_every_rank_gets_the_same(ranks: Ranks, members: tuple[int, ...], entry: int, channel: str) -> None:
    seen = ranks.run(everything, entry, channel, ranks=members)
    assert all(peers == seen[0] for peers in seen)
    assert len(set(seen[0])) == len(members)


def views_go_on(here: Rank) -> bool:
    with shmcast.Group(here.group, 1, max_bytes="64MiB") as group:
        first = group.broadcast(noise(1_000_000, 1) if here.rank == 1 else None)
        # A view of the entry rank's own arena gets a new handle, a part of one too; neither is copied.
        second = group.broadcast({"whole": first, "half": first[500_000:]} if here.rank == 1 else None)
        assert np.array_equal(second["whole"], noise(1_000_000, 1))
        assert np.array_equal(second["half"], noise(1_000_000, 1)[500_000:])
        if here.rank == 1:
            assert group._memory.arena.stats()["used_bytes"] < 1_100_000
        del first, second
        for seed in range(12):
            array = group.broadcast(noise(8_000_000, seed) if here.rank == 1 else None)
            assert np.array_equal(array, noise(8_000_000, seed))
            del array
            settle(here, group)
        if here.rank == 1:
            stats = group.stats()
            assert stats["arrays"] == 15
            assert stats["inline_bytes"] == 0, "memory did not come back"
            assert in_use(group._memory.arena) == 0
    return True


@torch_only
def test_views_are_sent_on_and_memory_comes_back(ranks: Ranks) -> None:
    assert all(ranks.run(views_go_on, ranks=(0, 1, 2)))


def without_room(here: Rank) -> list[dict[str, int]]:
    seen = []
    with shmcast.Group(here.group, max_bytes="1MiB") as group:
        for count in (1, 3, 0, 1):
            trees = [noise(600_000, seed) for seed in range(count)]
            received = group.broadcast(trees if here.rank == 0 else None)
            assert same(received, trees)
            seen.append(group.stats())
            del received
            settle(here, group)
    return seen


@torch_only
def test_what_finds_no_room_travels_in_the_message(ranks: Ranks) -> None:
    entry, other = ranks.run(without_room, ranks=(0, 1))
    assert [stats["inline_bytes"] for stats in entry] == [0, 1_200_000, 1_200_000, 1_200_000]
    assert [stats["arrays"] for stats in entry] == [1, 2, 2, 3]
    assert other[1]["message_bytes"] > 1_200_000


# ---- trees that one rank can not handle

_fails_here = False


def rebuilt(value: int) -> int:
    if _fails_here:
        raise LookupError(f"no {value} here")
    return value


class FailsSomewhere:
    def __init__(self, value: int) -> None:
        self.value = value

    def __reduce__(self) -> Any:
        return rebuilt, (self.value,)


def bad_trees(here: Rank, mode: str) -> list[str]:
    global _fails_here
    said = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        refuse = mode == "object" and here.rank == 2
        with Patched(process, "join", _no_memory) if refuse else Patched():
            group = shmcast.Group(here.group, max_bytes="64MiB", fallback="object")
    with group:
        assert group.mode == mode
        array = noise(100_000, 7)
        if here.rank == 0:
            with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
                group.broadcast([array, lambda: None])
        else:
            with pytest.raises(GroupError, match=r"step 1: rank 0 could not encode .*lambda") as caught:
                group.broadcast()
            assert "Traceback" in str(caught.value)
            said.append(str(caught.value).splitlines()[0])
        _fails_here = here.rank == 2
        with pytest.raises(GroupError) as caught:
            group.broadcast([array, FailsSomewhere(5)] if here.rank == 0 else None)
        said.append(str(caught.value))
        assert isinstance(caught.value.__cause__, LookupError) == _fails_here
        _fails_here = False
        assert same(group.broadcast(array if here.rank == 0 else None), array)
        settle(here, group)
        if here.rank == 0 and mode == "shared":
            assert [failed // 2 for _, failed in group._roster._fellows.words()] == [1, 1, 2]
            assert in_use(group._memory.arena) == 0
        together(here)
    return said


def _no_memory(key: Any) -> Any:
    raise shmcast.ArenaGoneError(2, "there is no such arena (says the test)")


@torch_only
@pytest.mark.parametrize("mode", ["shared", "object"])
def test_a_bad_tree_leaves_the_group_usable(ranks: Ranks, mode: str) -> None:
    entry, *others = ranks.run(bad_trees, mode, ranks=(0, 1, 2))
    assert others[0] == others[1]
    assert entry == others[0][1:] == ["step 2: rank 2 can not rebuild tree 0 of the message"]


class InterruptsSomewhere:
    def __reduce__(self) -> Any:
        return interrupted, ()


def interrupted() -> int:
    if _fails_here:
        raise KeyboardInterrupt
    return 5


def rebuild_is_interrupted(here: Rank, mode: str) -> list[str]:
    global _fails_here
    said = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        refuse = mode == "object" and here.rank == 2
        with Patched(process, "join", _no_memory) if refuse else Patched():
            group = shmcast.Group(here.group, max_bytes="64MiB", fallback="object", timeout=5)
    with group:
        for where in (0, 1, 2) * 10:
            _fails_here = here.rank == where
            tree = [noise(5000, 1), InterruptsSomewhere()] if here.rank == 0 else None
            with pytest.raises(KeyboardInterrupt if _fails_here else GroupError) as caught:
                group.broadcast(tree)
            said.append("" if _fails_here else str(caught.value))
            _fails_here = False
        assert group.broadcast("go on" if here.rank == 0 else None) == "go on"
        del caught
        settle(here, group)
        if here.rank == 0 and mode == "shared":
            assert in_use(group._memory.arena) == 0
        together(here)
    return said


@torch_only
@pytest.mark.parametrize("mode", ["shared", "object"])
def test_a_rank_that_is_interrupted_while_it_rebuilds_says_so_to_all(ranks: Ranks, mode: str) -> None:
    for rank, said in enumerate(ranks.run(rebuild_is_interrupted, mode, ranks=(0, 1, 2))):
        for step, where in enumerate((0, 1, 2) * 10, 1):
            assert said[step - 1] == (
                "" if rank == where else f"step {step}: rank {where} can not rebuild tree 0 of the message"
            )


def attach_fails(here: Rank) -> bool:
    def stale(handle: Any, **_: Any) -> Any:
        raise shmcast.StaleHandleError("gone (says the test)")

    with shmcast.Group(here.group, max_bytes="64MiB") as group:
        tree = [noise(100_000, 1), noise(100_000, 2)]
        with Patched(codec, "attach", stale) if here.rank == 1 else Patched(), pytest.raises(GroupError) as caught:
            group.broadcast(tree if here.rank == 0 else None)
        assert str(caught.value) == "step 1: rank 1 can not rebuild tree 0 of the message"
        assert isinstance(caught.value.__cause__, shmcast.StaleHandleError) == (here.rank == 1)
        caught.value.__cause__ = None
        assert group.broadcast("go on" if here.rank == 0 else None) == "go on"
        settle(here, group)
        if here.rank == 0:
            # What was granted to the rank that failed is taken back.
            assert in_use(group._memory.arena) == 0
            assert group._roster._fellows.words()[1][1] // 2 == 1
        together(here)
    return True


@torch_only
def test_a_rank_that_can_not_attach_says_so(ranks: Ranks) -> None:
    assert all(ranks.run(attach_fails, ranks=(0, 1)))


def parts_fail_alone(here: Rank, channel: str, fallback_mode: bool) -> list[str]:
    """Of 70 trees in one message rank 1 can not take in the third, and rank 2 not the last."""
    global _fails_here
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with Patched(process, "join", _no_memory) if fallback_mode and here.rank == 2 else Patched():
            group = shmcast.Group(here.group, max_bytes="64MiB", channel=channel, fallback="object")
    said = []
    with group:
        assert group.mode == ("object" if fallback_mode else "shared")
        for bad in ((1, 2), (2, 69)):
            blob = None
            if here.rank == 0:
                trees = [FailsSomewhere(number) if number == bad[1] else noise(5000, number) for number in range(70)]
                blob = group.pack(b"head", [group.prepare(tree) for tree in trees])
                with pytest.raises(GroupError, match="has not been unpacked"):
                    group.pack(b"", [])
            _fails_here = here.rank == bad[0]
            head, received = group.exchange(blob)
            _fails_here = False
            assert head == b"head"
            assert len(received) == 70
            for number, (value, error) in enumerate(received):
                if error is not None:
                    assert value is None
                    said.append(str(error))
                elif number != bad[1]:
                    assert same(value, noise(5000, number))
            del value, error, received
        settle(here, group)
        if here.rank == 0 and not fallback_mode:
            assert in_use(group._memory.arena) == 0
        together(here)
    return said


@torch_only
@pytest.mark.parametrize(("channel", "fallback_mode"), [("auto", False), ("group", False), ("auto", True)])
def test_parts_of_a_message_fail_alone_and_everywhere(ranks: Ranks, channel: str, fallback_mode: bool) -> None:
    first, *others = ranks.run(parts_fail_alone, channel, fallback_mode, ranks=(0, 1, 2))
    assert others == [first, first]
    expected = ["step 1: rank 1 can not rebuild tree 2 of the message"]
    # The last of the 64 bits stands for all trees from there on.
    expected += [f"step 2: rank 2 can not rebuild tree {number} of the message" for number in range(63, 70)]
    assert first == expected


def without_consensus(here: Rank) -> str:
    global _fails_here
    with shmcast.Group(here.group, max_bytes="64MiB", consensus=here.rank != 0) as group:
        assert not group.consensus  # the entry rank's to say
        _fails_here = here.rank == 1
        tree = [FailsSomewhere(5)] if here.rank == 0 else None
        text = ""
        if _fails_here:
            with pytest.raises(GroupError) as caught:
                group.broadcast(tree)
            text = str(caught.value)
        else:
            assert group.broadcast(tree) == [5]
        _fails_here = False
        assert group.broadcast(6 if here.rank == 0 else None) == 6
        settle(here, group)
    return text


@torch_only
def test_without_consensus_a_rank_fails_alone(ranks: Ranks) -> None:
    said = ranks.run(without_consensus, ranks=(0, 1, 2))
    assert said == ["", "step 1: rank 1 can not rebuild tree 0 of the message: LookupError: no 5 here", ""]


def not_the_next(here: Rank) -> bool:
    with shmcast.Group(here.group, max_bytes="64MiB") as group:
        blobs = []
        for number in range(2):
            blob = group.pack(b"", [group.prepare(number)]) if here.rank == 0 else None
            blob = here_broadcast(here, blob)
            blobs.append(blob)
            for wrong in (b"garbage", blob[:-1], blobs[0] if number else b""):
                with pytest.raises(shmcast.HandleError):
                    group.unpack(wrong)
            assert group.step == number
            _, (received,) = group.unpack(blob)
            assert received.value == number
        with pytest.raises(shmcast.HandleError, match="message 2, this rank is to take in message 3"):
            group.unpack(blobs[1])
        assert group.broadcast("go on" if here.rank == 0 else None) == "go on"
    return True


def here_broadcast(here: Rank, blob: bytes | None) -> bytes:
    """An engine's own broadcast."""
    import torch.distributed as dist

    boxed = [blob]
    dist.broadcast_object_list(boxed, here.ranks[0], here.group)
    assert boxed[0] is not None
    return boxed[0]


@torch_only
def test_what_is_not_the_next_message_changes_nothing(ranks: Ranks) -> None:
    assert all(ranks.run(not_the_next, ranks=(0, 1, 2)))


def polls(here: Rank, channel: str) -> list[bool]:
    with shmcast.Group(here.group, max_bytes="64MiB", channel=channel) as group:
        seen = []
        if channel == "group" and here.rank != 0:
            with pytest.raises(GroupError, match="process group can not tell"):
                group.poll()
        else:
            together(here) if channel == "auto" else None
            seen.append(group.poll())
        if channel == "auto":
            together(here)
            if here.rank == 0:
                blob = group.pack(b"", [group.prepare(5)])
                group._carry(blob)  # is in the ring, and nobody has read it
                together(here)
                group._unpack(blob)
            else:
                together(here)
                seen.append(group.poll())
                assert group.broadcast() == 5
                seen.append(group.poll())
        together(here)
    return seen


@torch_only
def test_poll_tells_whether_a_message_is_there(ranks: Ranks) -> None:
    assert ranks.run(polls, "auto", ranks=(0, 1, 2)) == [[False], [False, True, False], [False, True, False]]
    assert ranks.run(polls, "group", ranks=(0, 1)) == [[False], []]


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class FailsUnprintably:
    def __reduce__(self) -> object:
        raise Unprintable


def test_an_error_without_a_text_is_still_told() -> None:
    with shmcast.Group(max_bytes="1MiB") as group:
        with pytest.raises(Unprintable):
            group.broadcast(FailsUnprintably())
        assert group.broadcast(1) == 1
