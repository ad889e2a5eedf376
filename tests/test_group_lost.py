"""Groups whose ranks die, leave, come late or are slow: who is named, and that nobody loses what was promised."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import shmcast
from child import Link
from ranks import Patched, Rank, Ranks, in_use, settle
from shmcast import GroupError, GroupTimeoutError, PeerLostError, codec, group
from trees import Item, noise

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(3) as started:
        yield started


# ---- ranks that do not come


def killed(here: Rank, channel: Any) -> None:
    arena = shmcast.Arena.create("64MiB") if here.rank == 0 else None
    group = shmcast.Group(here.group, arena=arena, channel=channel)
    kept = group.broadcast(noise(300_000, 1) if here.rank == 0 else None)
    here.parent.send("ready")
    here.parent.receive()
    with pytest.raises(GroupError) as first:
        for _ in range(10):  # a rank without a connection to the dead one may get a message or two through
            group.broadcast(noise(300_000, 2) if here.rank == 0 else None)
    with pytest.raises(GroupError, match="broken since step"):
        group.broadcast()
    assert np.array_equal(kept, noise(300_000, 1))
    del kept
    group.close()
    here.parent.send((type(first.value).__name__, str(first.value)))
    here.parent.receive()
    if arena is not None:
        # Everybody who lives has let go, and of what the dead one had nothing is left after a scrub.
        arena._member.sweep_peers()
        here.parent.send(in_use(arena))
        arena.close()


every_channel = pytest.mark.parametrize("channel", ["auto", "group"])


@every_channel
@pytest.mark.parametrize("victim", [3, 0])
def test_a_killed_rank_is_named(victim: int, channel: str) -> None:
    with Ranks(4) as own:
        running = own.start(killed, channel)
        for child in running:
            assert child.receive() == "ready"
        running[victim].kill()
        survivors = [child for rank, child in enumerate(running) if rank != victim]
        for child in survivors:
            child.send("go on")
        for child in survivors:
            kind, text = child.receive()
            assert kind == PeerLostError.__name__, text
            assert f"rank {victim} died or closed the group" in text
        for child in survivors:
            child.send("all have let go")
        if victim != 0:
            assert running[0].receive() == 0
            assert running[0].receive() == ("done", None)
    shmcast.sweep()


def late(here: Rank, absent: int, channel: Any) -> tuple[str, str]:
    with shmcast.Group(here.group, max_bytes="16MiB", channel=channel) as group:
        for _ in range(2):
            group.broadcast()
        here.parent.send("ready")
        here.parent.receive()
        group._timeout = 2.0
        with pytest.raises(GroupError) as first:
            for _ in range(10):  # a message may reach a rank that gets it without the one that is late
                group.broadcast()
        here.parent.send("gave up")
        with pytest.raises(GroupError, match="broken since step") as second:
            group.broadcast()
        assert str(second.value.__cause__) == str(first.value)
        assert str(first.value) in str(second.value)
    return type(first.value).__name__, str(first.value)


@every_channel
@pytest.mark.parametrize("absent", [1, 0])
def test_a_late_rank_is_named(ranks: Ranks, absent: int, channel: str) -> None:
    running = ranks.start(late, absent, channel, ranks=(0, 1, 2))
    others = [child for rank, child in enumerate(running) if rank != absent]
    for child in running:
        assert child.receive() == "ready"
    for child in others:
        child.send("go on")
    for child in others:
        assert child.receive() == "gave up"
    running[absent].send("go on")
    assert running[absent].receive() == "gave up"
    results = ranks.results(running)
    kind, text = results.pop(absent)
    assert kind in ("GroupError", "PeerLostError")  # the others have given the group up, or closed it by now
    assert "closed the group" in text
    named = [kind for kind, text in results if f"rank {absent} is at step 2, this is step " in text]
    assert GroupTimeoutError.__name__ in named


def leaves_early(here: Rank, channel: Any) -> str:
    group = shmcast.Group(here.group, max_bytes="16MiB", channel=channel)
    group.broadcast()
    if here.rank == 1:
        group.close()
        here.parent.send("closed")
        return ""
    here.parent.receive()
    with pytest.raises(GroupError) as caught:
        for _ in range(3):
            group.broadcast()
    group.close()
    return str(caught.value)


@every_channel
def test_a_rank_that_closes_early_is_named(ranks: Ranks, channel: str) -> None:
    running = ranks.start(leaves_early, channel, ranks=(0, 1, 2))
    assert running[1].receive() == "closed"
    running[0].send("go on")
    running[2].send("go on")
    results = ranks.results(running)
    assert any("rank 1 " in text for text in results)
    assert all("closed the group" in text for text in (results[0], results[2]))


# ---- slow ranks


def slow_loads(here: Rank) -> Patched:
    """The next rebuilding of a tree waits for the test."""
    loads = codec.loads

    def wait(blob: bytes) -> Any:
        here.parent.send("has the message")
        here.parent.receive()
        return loads(blob)

    return Patched(codec, "loads", wait)


def says_when_it_waits(here: Rank) -> Patched:
    """Waiting by polling tells the test, once."""
    sleep = time.sleep
    told: list[float] = []

    def tell(seconds: float) -> None:
        if not told:
            here.parent.send("waits")
        told.append(seconds)
        sleep(seconds)

    return Patched(time, "sleep", tell)


def closes_at_once(here: Rank) -> bool:
    group = shmcast.Group(here.group, max_bytes="64MiB", consensus=False)
    if here.rank == 0:
        group.broadcast(noise(1_000_000, 3))
        with says_when_it_waits(here):
            group.close()
    else:
        with slow_loads(here):
            received = group.broadcast()
        group.close()
        assert np.array_equal(received, noise(1_000_000, 3))
    return True


def test_the_last_message_reaches_slow_ranks(ranks: Ranks) -> None:
    entry, other = running = ranks.start(closes_at_once, ranks=(0, 1))
    assert other.receive() == "has the message"
    assert entry.receive() == "waits"
    other.send("go on")
    assert ranks.results(running) == [True, True]


def outrun(here: Rank) -> int:
    """The entry rank needs the room of a block that the other has not come to attach."""
    first, second = noise(1_000_000, 4), noise(1_000_000, 5)
    encode = codec.encode

    def tell(*args: Any, **options: Any) -> Any:
        encoded = encode(*args, **options)
        here.parent.send("encoded")
        return encoded

    with shmcast.Group(here.group, max_bytes="1500KiB", consensus=False) as group:
        if here.rank == 0:
            group.broadcast(first, local=True)
            with Patched(codec, "encode", tell):
                group.broadcast(second, local=True)
        else:
            with slow_loads(here):
                received = group.broadcast()
            assert np.array_equal(received, first)
            assert np.array_equal(group.broadcast(), second)
        return group.stats()["inline_bytes"]


def test_what_ranks_were_promised_has_no_deadline(ranks: Ranks) -> None:
    entry, other = running = ranks.start(outrun, ranks=(0, 1))
    assert other.receive() == "has the message"
    assert entry.receive() == "encoded"
    other.send("go on")
    assert ranks.results(running) == [1_000_000, 0]


def tokenizer(parent: Link, nbytes: int) -> None:
    """Publishes into an arena of its own with a short deadline, and takes back what nobody has attached."""
    with shmcast.Arena.create(f"{4 * nbytes}", segment_bytes=nbytes, grant_timeout=0.02) as arena:
        parent.send(arena.publish(noise(nbytes, 11), readers=1).to_bytes())
        parent.receive()
        # Everything that is not held is revoked many times over while we fill the arena with what nobody attaches.
        for _ in range(20):
            arena.publish(noise(nbytes, 12), readers=1, timeout=30.0)
        parent.send(arena.stats()["revoked"])
        parent.receive()
        parent.send(in_use(arena))


def passes_on(here: Rank, raw: bytes | None) -> int:
    with shmcast.Group(here.group, max_bytes="16MiB", consensus=False) as group:
        if here.rank == 0:
            lease = shmcast.attach(shmcast.Handle.from_bytes(raw))
            tree = Item("from elsewhere", lease.array)
            received = group.broadcast(tree)
            assert group.stats()["passed_on"] == 1
            del lease, tree, received
            gc.collect()
            # The engine on rank 0 is done with it. The group is not, as rank 1 has not attached.
            here.parent.send("done with it")
            here.parent.receive()
        else:
            with slow_loads(here):
                received = group.broadcast()
            assert np.array_equal(received.feature, noise(received.feature.nbytes, 11))
            del received
        settle(here, group)
        return group.stats()["unconfirmed"]


def test_a_block_of_a_tokenizer_is_passed_on_whatever_its_deadline(ranks: Ranks, child: Any) -> None:
    publisher = child(tokenizer, 1 << 20)
    raw = publisher.receive()
    entry, other = running = ranks.start(passes_on, raw, ranks=(0, 1))
    assert entry.receive() == "done with it"
    assert other.receive() == "has the message"
    publisher.send("go on")
    assert publisher.receive() > 10
    other.send("go on")
    entry.send("go on")
    assert ranks.results(running) == [0, 0]
    publisher.send("count")
    publisher.receive()
    publisher.join()


def made_and_closed(here: Rank) -> bool:
    made = group.Roster

    def slowly(*args: Any) -> Any:
        here.parent.send("has met the others")
        here.parent.receive()
        return made(*args)

    with Patched(group, "Roster", slowly) if here.rank == 1 else Patched():
        made_one = shmcast.Group(here.group, max_bytes="16MiB")
    made_one.close()
    return True


def test_a_group_may_be_closed_at_once(ranks: Ranks) -> None:
    running = ranks.start(made_and_closed, ranks=(0, 1, 2))
    assert running[1].receive() == "has met the others"
    running[1].send("go on")
    assert ranks.results(running) == [True] * 3
