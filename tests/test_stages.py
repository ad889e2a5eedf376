"""`point_to_point_pyobj` between ranks: what comes is what was sent, by handle once memory is known to be shared."""

from __future__ import annotations

import gc

import numpy as np
import pytest

import shmcast
from ranks import Rank, Ranks, in_use, together

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def ranks():
    with Ranks(3) as started:
        yield started


def request(number: int, nbytes: int = 100_000) -> list:
    return [{"rid": number, "pixels": np.full(nbytes, number % 251, "uint8")}]


def is_right(data: list, number: int) -> bool:
    (tree,) = data
    return tree["rid"] == number and bool((tree["pixels"] == number % 251).all())


def hand_on(here: Rank, data, src: int, dst: int, **options):
    """With ranks of the run's group, as an engine has global ones."""
    all_ranks = here.ranks
    return shmcast.point_to_point_pyobj(
        data, all_ranks[here.rank], here.group, all_ranks[src], all_ranks[dst], **options
    )


def end(here: Rank, entrusted: int = 0) -> None:
    """No rank ends its arena while another reads; nothing is left in it then but what its owner was made trustee of."""
    from shmcast import own_arena, stages

    gc.collect()
    together(here)
    left = in_use(own_arena._arena) if own_arena._arena is not None else 0
    stages.close_stages()
    own_arena.close_own_arena()
    assert left == entrusted, f"{left} blocks are left"


def kinds(monkey: list):
    """Kinds of the messages that this rank packs: 0 nothing, 1 pickle, 2 tree."""
    from shmcast import stages

    pack = stages._Sender._pack

    def noted(self, data):
        payload = pack(self, data)
        monkey.append(payload[0])
        return payload

    return stages._Sender, "_pack", noted


# ---- there


def one_after_another(here: Rank, count: int):
    from ranks import Patched

    packed: list[int] = []
    with Patched(*kinds(packed)):
        for number in range(count):
            got = hand_on(here, request(number) if here.rank == 0 else [], 0, 1)
            if here.rank == 1:
                assert is_right(got, number)
                assert got[0]["pixels"].flags.writeable is (number == 0)  # pickled, then views
            else:
                assert got == []
            together(here)
    del got
    end(here)
    return packed


def test_the_first_is_pickled_and_the_others_are_views(ranks) -> None:
    assert ranks.run(one_after_another, 5) == [[1, 2, 2, 2, 2], [], []]


def nothing_and_small_things(here: Rank):
    got = []
    for data in ([], [1, "two"], [], [np.arange(3)], [b"x" * 100_000]):
        got.append(hand_on(here, data, 0, 2))
    ends = [[], [1, "two"], []]
    if here.rank == 2:
        assert got[:3] == ends
        assert got[3][0].tolist() == [0, 1, 2]
        assert got[4] == [b"x" * 100_000]
    end(here)


def test_nothing_and_small_things(ranks) -> None:
    ranks.run(nothing_and_small_things)


def chain(here: Rank, count: int):
    """0 → 1 → 2: the bytes are put into an arena once, by whoever had them first."""
    published = []
    for number in range(count):
        if here.rank == 0:
            hand_on(here, request(number), 0, 1)
        elif here.rank == 1:
            data = hand_on(here, [], 0, 1)
            assert is_right(data, number)
            hand_on(here, data, 1, 2)
            del data
        else:
            data = hand_on(here, [], 1, 2)
            assert is_right(data, number)
            del data
        together(here)
    for stage in (0, 1):
        hand_on(here, [], stage, stage + 1)  # nothing to do: what was taken is let go of
    together(here)
    from shmcast import own_arena

    if own_arena._arena is not None:
        counters = shmcast.metrics.snapshot(own_arena._arena)["counters"]
        published = [counters["published_bytes"] // 100_000, counters["passed_on"]]
    # What the middle passed on to the last before that had joined the first one's arena could not be granted by name.
    end(here, entrusted=here.rank == 0)
    return published


def test_a_chain_of_stages_copies_once(ranks) -> None:
    first, middle, last = ranks.run(chain, 6)
    assert first[0] == 5  # the first went as a pickle
    assert middle[0] <= 1  # what came as a pickle
    assert middle[1] >= 4
    assert last == []


def both_ways(here: Rank, count: int):
    """A ring of stages, where everybody sends before anybody receives."""
    other = 1 - here.rank
    for number in range(count):
        works = hand_on(here, request(number + here.rank), here.rank, other, async_send=True)
        got = hand_on(here, [], other, here.rank)
        assert is_right(got, number + other)
        for sent in works:
            sent.work.wait()
        del got
        together(here)
    end(here)


def test_both_ways_without_waiting(ranks) -> None:
    ranks.run(both_ways, 8, ranks=(0, 2))


def several_under_way(here: Rank, count: int):
    works = []
    if here.rank == 0:
        for number in range(count):
            works += hand_on(here, request(number), 0, 1, async_send=True)
        for sent in works:
            sent.work.wait()
        together(here)
        for number in range(count):
            hand_on(here, request(number), 0, 1)
    else:
        for number in range(count):
            assert is_right(hand_on(here, [], 0, 1), number)
        together(here)
        for number in range(count):
            assert is_right(hand_on(here, [], 0, 1), number)
    end(here)


def test_several_under_way(ranks) -> None:
    ranks.run(several_under_way, 5, ranks=(0, 1))


def tensors(here: Rank):
    import torch

    for number in range(3):
        sent = torch.full((300, 200), float(number), dtype=torch.bfloat16)
        got = hand_on(here, [sent] if here.rank == 0 else [], 0, 1)
        if here.rank == 1:
            assert got[0].dtype == torch.bfloat16 and bool((got[0] == number).all())
            got[0][0, 0] = 99.0
        together(here)
    del got
    end(here)


def test_tensors_that_may_be_written(ranks) -> None:
    ranks.run(tensors, ranks=(0, 1))


# ---- what goes wrong


def without_shared_memory(here: Rank, count: int):
    """The other rank can not attach: everything stays a pickle, and comes."""
    from ranks import Patched
    from shmcast import stages

    def refuse(receipt, **_):
        raise shmcast.ArenaGoneError("another /dev/shm")

    packed: list[int] = []
    with Patched(*kinds(packed)), Patched(stages, "attach", refuse):
        for number in range(count):
            got = hand_on(here, request(number) if here.rank == 0 else [], 0, 1)
            assert here.rank == 0 or is_right(got, number)
            together(here)
    together(here)
    stages.close_stages()  # takes the offer back
    end(here)
    return packed


def test_ranks_that_share_no_memory(ranks) -> None:
    assert ranks.run(without_shared_memory, 4, ranks=(0, 1)) == [[1, 1, 1, 1], []]


def no_room(here: Rank):
    from shmcast import own_arena

    if here.rank == 0:
        arena = own_arena.own_arena()
        free = arena.stats()["max_bytes"]
    for number in range(6):
        if here.rank == 0 and number == 3:
            kept = [arena.publish(np.zeros(free // 8, "uint8"), readers=0, keep=True) for _ in range(8)]
        got = hand_on(here, request(number, 300_000) if here.rank == 0 else [], 0, 1)
        if here.rank == 1:
            assert is_right(got, number)
        del got
        together(here)
    if here.rank == 0:
        for handle in kept:
            arena.release(handle)
    end(here)


def test_an_arena_that_is_full(ranks, monkeypatch) -> None:
    ranks.run(with_small_arena, no_room.__name__, ranks=(0, 1))


def with_small_arena(here: Rank, name: str):
    import os

    os.environ["SHMCAST_MAX_BYTES"] = "4MiB"
    try:
        return globals()[name](here)
    finally:
        del os.environ["SHMCAST_MAX_BYTES"]


def no_arena(here: Rank):
    import os

    os.environ["SHMCAST_MAX_BYTES"] = "nonsense"
    try:
        got = hand_on(here, request(7) if here.rank == 0 else [], 0, 1)
    finally:
        del os.environ["SHMCAST_MAX_BYTES"]
    return here.rank == 0 or is_right(got, 7)


def test_no_arena_can_be_made(ranks) -> None:
    assert ranks.run(no_arena, ranks=(0, 1)) == [True, True]


def garbage(here: Rank):
    import torch
    import torch.distributed as dist

    if here.rank == 0:
        dist.send(torch.full((4096,), 7, dtype=torch.uint8), here.ranks[1], here.group)
        return None
    with pytest.raises(shmcast.GroupError, match="it starts with"):
        hand_on(here, [], 0, 1)
    from shmcast import stages

    stages.close_stages()
    return None


def test_something_else_was_sent(ranks) -> None:
    ranks.run(garbage, ranks=(0, 1))


def test_a_rank_that_is_killed_is_noticed(namespace) -> None:
    with Ranks(2) as started:
        here, other = started.start(killed)
        assert other.receive() == "ready"
        other.kill()
        assert here.receive() == "PeerLostError"
        here.send()
        started._usable = False


def killed(here: Rank):
    if here.rank == 1:
        here.parent.send("ready")
        here.parent.receive()
    try:
        hand_on(here, [], 1, 0)
    except shmcast.GroupError as error:
        here.parent.send(type(error).__name__)
        here.parent.receive()


def other_memory(here: Rank):
    """A receipt that names memory with other bytes in it, as another host's could: the message counts, and goes on."""
    from shmcast import stages

    if here.rank == 0:
        before = stages._receipt

        def wrong(*args):
            receipt = before(*args)
            return receipt and receipt._replace(hash=receipt.hash ^ 1)

        stages._receipt = wrong
        try:
            hand_on(here, request(0), 0, 1)
        finally:
            stages._receipt = before
    elif here.rank == 1:
        assert is_right(hand_on(here, [], 0, 1), 0)
    together(here)
    if here.rank == 0:
        hand_on(here, request(1), 0, 1)
    elif here.rank == 1:
        assert is_right(hand_on(here, [], 0, 1), 1)
    together(here)
    end(here)


def test_a_receipt_of_other_memory(ranks) -> None:
    ranks.run(other_memory)


def wrong_ranks(here: Rank) -> None:
    for other in (here.rank, 7):
        with pytest.raises(ValueError, match=r"this is rank .* the other one"):
            shmcast.point_to_point_pyobj([1], here.ranks[here.rank], here.group, here.ranks[here.rank], other)
    end(here)


def test_what_is_not_another_rank_is_refused(ranks) -> None:
    ranks.run(wrong_ranks)
