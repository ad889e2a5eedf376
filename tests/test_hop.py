"""From tokenizers over sockets to rank 0 and on to all ranks: one publish, and no copy after it, however they are arranged.

Everything here is counted. Tokenizers take nothing back (no ``grant_timeout``), so whatever was promised to somebody who did
not come would show in the end as a block that is in use.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("zmq")
pytest.importorskip("torch")
pytestmark = [pytest.mark.zmq, pytest.mark.torch]

import shmcast  # noqa: E402
from hop import (  # noqa: E402
    LARGE,
    Crew,
    Forks,
    Scheduler,
    Tokenizer,
    Worker,
    acquaint,
    alike,
    ready,
    slots,
    together,
)

MESSAGE_BYTES = 2000
"""More than a message of one request needs, and less than the smallest of its large arrays."""


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks() as started:
        yield started


@pytest.fixture
def crew(forks: Forks, namespace: str) -> Iterator[Crew]:
    with forks.crew() as crew:
        yield crew


def nobody_copied(ranks: list[Worker], requests: int) -> None:
    """No rank has put anything into an arena, or sent features as bytes; each has let go of everything."""
    for counts in together(ranks, "counts"):
        assert counts["publishes"] == 0
        assert counts["inline"] == 0
        assert counts["message_bytes"] < requests * MESSAGE_BYTES
        assert counts["slots"] == 0


def published_once(tokenizer: Worker, requests: int) -> None:
    """Every large array of every request once, and all of it is free again."""
    assert tokenizer.ask("counts") == {"publishes": LARGE * requests, "inline": 0, "slots": 0}


# ---- several tokenizers, n copies, any number of ranks


@pytest.mark.parametrize(("size", "tokenizers"), [(3, 1), (4, 3)])
def test_one_publish_however_many_copies_and_ranks(crew: Crew, size: int, tokenizers: int, seed: int) -> None:
    """Parallel sampling as engines do it: a warm-up, and when it has finished, n copies."""
    address, count, copies = crew.address(), 3, 8
    ranks = crew.ranks(size, Scheduler, address)
    started = [crew.start(Tokenizer, address) for _ in range(tokenizers)]
    ready(*ranks, *started)
    acquaint(ranks, *started)
    sent = 0
    for number in range(count):
        rid = f"r{number}"
        for which, tokenizer in enumerate(started):
            tokenizer.ask("share", rid, seed + 100 * which + number)
            tokenizer.ask("send", rid, f"warm-up {which}")
        assert alike(ranks, "take", tokenizers) == {f"warm-up {which}": True for which in range(tokenizers)}
        arenas = alike(ranks, "where")
        for which, tokenizer in enumerate(started):
            assert arenas[f"warm-up {which}"] == tokenizer.ask("arena_id")
        alike(ranks, "drop")  # it has finished before the samples are sent
        for tokenizer in started:
            assert len(tokenizer.ask("samples", rid, copies)) == copies
        taken = alike(ranks, "take", copies * tokenizers)
        assert all(taken.values())
        for tokenizer in started:
            tokenizer.ask("end", rid)
        assert all(alike(ranks, "still_right").values())  # whoever has sent it holds it no more
        alike(ranks, "drop")
        sent += tokenizers * (1 + copies)
    nobody_copied(ranks, sent)
    assert ranks[0].ask("counts")["passed_on"] == LARGE * sent
    for tokenizer in started:
        published_once(tokenizer, count)


def test_a_request_that_is_broadcast_again(crew: Crew, seed: int) -> None:
    """Retracted and scheduled anew: what rank 0 holds, it can send as often as it likes."""
    address = crew.address()
    ranks = crew.ranks(3, Scheduler, address)
    tokenizer = crew.start(Tokenizer, address)
    ready(*ranks, tokenizer)
    acquaint(ranks, tokenizer)
    tokenizer.ask("share", "r", seed)
    tokenizer.ask("send", "r")
    tokenizer.ask("end", "r")
    assert alike(ranks, "take", 1) == {"r": True}
    for _ in range(3):
        together(ranks[1:], "drop")
        ranks[0].ask("again", "r")
        assert alike(ranks, "broadcast") == {"r": True}
    alike(ranks, "drop")
    nobody_copied(ranks, 4)
    published_once(tokenizer, 1)


class AsyncTokenizer(Tokenizer):
    """One that sends from a loop, as engines have it: all copies at once."""

    def samples(self, rid: str, count: int) -> list[str]:
        import asyncio

        import zmq.asyncio

        from shmcast.channels import zmq as channel

        names = [f"{rid}.{number}" for number in range(count)]

        async def send_all() -> None:
            with zmq.asyncio.Context() as context, context.socket(zmq.PUSH) as out:
                out.connect(self.socket.last_endpoint.decode())
                shared, seed = self.shared[rid], self.seeds[rid]
                messages = [{"rid": name, "seed": seed, "features": shared} for name in names]
                await asyncio.gather(*[channel.send(out, message, self.arena) for message in messages])

        asyncio.run(send_all())
        return names


def test_a_tokenizer_with_a_loop(crew: Crew, seed: int) -> None:
    address = crew.address()
    ranks = crew.ranks(2, Scheduler, address)
    tokenizer = crew.start(AsyncTokenizer, address)
    ready(*ranks, tokenizer)
    acquaint(ranks, tokenizer)
    tokenizer.ask("share", "r", seed)
    names = tokenizer.ask("samples", "r", 8)
    assert alike(ranks, "take", 8) == dict.fromkeys(names, True)
    tokenizer.ask("end", "r")
    alike(ranks, "drop")
    nobody_copied(ranks, 8)
    published_once(tokenizer, 1)


# ---- data parallelism


class Controller:
    """Between tokenizers and shards: hands messages on unread, to whichever shard it likes."""

    def __init__(self, address: str, shards: list[str], seed: int) -> None:
        import zmq

        self.context = zmq.Context()
        self.inbox = self.context.socket(zmq.PULL)
        self.inbox.bind(address)
        self.shards = []
        for shard in shards:
            self.shards.append(self.context.socket(zmq.PUSH))
            self.shards[-1].connect(shard)
        self.random = random.Random(seed)

    def forward(self, count: int, to: int | None = None) -> list[int]:
        """To which shard each message went."""
        chosen = [self.random.randrange(len(self.shards)) if to is None else to for _ in range(count)]
        for shard in chosen:
            self.shards[shard].send(self.inbox.recv())
        return chosen

    def close(self) -> None:
        self.context.destroy(linger=0)


def test_one_of_two_shards_reads(crew: Crew, seed: int) -> None:
    """Nobody tells the tokenizers which, and whoever does not read owes nothing."""
    front, back = crew.address(), [crew.address(), crew.address()]
    shards = [crew.ranks(2, Scheduler, address) for address in back]
    tokenizers = [crew.start(Tokenizer, front) for _ in range(2)]
    controller = crew.start(Controller, front, back, seed)
    ready(*shards[0], *shards[1], *tokenizers, controller)
    for which, ranks in enumerate(shards):
        for tokenizer in tokenizers:
            tokenizer.ask("introduce")
            controller.ask("forward", 1, which)
            acquaint(ranks, tokenizer, introduced=True)
    count = 12
    for number in range(count):
        for which, tokenizer in enumerate(tokenizers):
            tokenizer.ask("share", f"{which}.{number}", seed + number)
            tokenizer.ask("send", f"{which}.{number}")
            tokenizer.ask("end", f"{which}.{number}")
    chosen = controller.ask("forward", 2 * count)
    assert set(chosen) == {0, 1}
    found: list[str] = []
    for which, ranks in enumerate(shards):
        taken = alike(ranks, "take", chosen.count(which))
        assert len(taken) == chosen.count(which) and all(taken.values())
        found += taken
    assert sorted(found) == sorted(f"{which}.{number}" for which in range(2) for number in range(count))
    for ranks in shards:
        alike(ranks, "drop")
        nobody_copied(ranks, 2 * count)
    for tokenizer in tokenizers:
        published_once(tokenizer, count)


# ---- groups in groups


class Nested(Scheduler):
    """2 x 2: rank 0 to the column of rank 2, and both of them to their rows."""

    def join(self, **options: Any) -> None:
        import torch.distributed as dist

        made = {ranks: dist.new_group(list(ranks)) for ranks in ((0, 2), (0, 1), (2, 3))}
        rank = self.here.rank
        row = (0, 1) if rank < 2 else (2, 3)
        self.column = shmcast.Group(made[0, 2], max_bytes="16MiB", **options) if rank in (0, 2) else None
        self.group = shmcast.Group(made[row], max_bytes="16MiB", **options)

    def broadcast(self) -> dict[str, bool]:
        messages = self.inbox
        self.inbox = []
        if self.column is not None:
            messages = self.column.broadcast(messages)
        return self.keep(self.group.broadcast(messages))

    def column_counts(self) -> dict[str, int]:
        if self.column is None:
            return {}
        stats = self.column.stats()
        arena = self.column.arena
        return {"publishes": stats["arrays"], "inline": stats["inline_bytes"], "slots": slots(arena) if arena else 0}

    def close(self) -> None:
        if self.column is not None:
            self.column.close()
        super().close()


def test_nested_groups(crew: Crew, seed: int) -> None:
    address = crew.address()
    ranks = crew.ranks(4, Nested, address)
    tokenizer = crew.start(Tokenizer, address)
    ready(*ranks, tokenizer)
    acquaint(ranks, tokenizer)
    for number in range(4):
        tokenizer.ask("share", f"r{number}", seed + number)
        tokenizer.ask("samples", f"r{number}", 3)
        tokenizer.ask("end", f"r{number}")
        taken = alike(ranks, "take", 3)
        assert len(taken) == 3 and all(taken.values())
        assert set(alike(ranks, "where").values()) == {tokenizer.ask("arena_id")}
        alike(ranks, "drop", *taken)
    nobody_copied(ranks, 12)
    assert ranks[0].ask("counts")["passed_on"] == ranks[2].ask("counts")["passed_on"] == 12 * LARGE
    for counts in together(ranks, "column_counts"):
        assert not any(counts.values())
    published_once(tokenizer, 4)


# ---- pipeline stages


class Staged(Scheduler):
    """Two stages of two ranks: rank 0 to its group, and to rank 2, which hands it to its own."""

    def join(self, **options: Any) -> None:
        import torch.distributed as dist

        made = [dist.new_group(list(ranks)) for ranks in ((0, 1), (2, 3))]
        self.group = shmcast.Group(made[self.here.rank // 2], max_bytes="16MiB", **options)

    def broadcast(self) -> dict[str, bool]:
        messages = self.inbox
        self.inbox = []
        if self.here.rank < 2:
            messages = self.group.broadcast(messages)
        if self.here.rank in (0, 2):
            data = shmcast.point_to_point_pyobj(messages, self.here.rank, self.here.group, 0, 2)
            messages = messages if self.here.rank == 0 else data
        if self.here.rank >= 2:
            messages = self.group.broadcast(messages)
        return self.keep(messages)

    def hand_on_something_small(self) -> None:
        """The first message of a way is pickled, whatever it is: see `shmcast.stages`."""
        if self.here.rank in (0, 2):
            shmcast.point_to_point_pyobj(["are you there?"], self.here.rank, self.here.group, 0, 2)

    def drop(self, *rids: str) -> None:
        super().drop(*rids)
        self.hand_on_something_small()  # whereby rank 0 sees that what it has handed on was taken

    def publishes_in_all(self) -> int:
        return self.group.stats()["arrays"]

    def own_bytes(self) -> int:
        """Bytes in the arena that this process has for what it hands on."""
        from shmcast import own_arena

        arena = own_arena._arena
        return 0 if arena is None else shmcast.metrics.snapshot(arena)["counters"]["published_bytes"]

    def close(self) -> None:
        from shmcast import own_arena, stages

        stages.close_stages()
        own_arena.close_own_arena()
        super().close()


def test_pipeline_stages(crew: Crew, seed: int) -> None:
    address = crew.address()
    ranks = crew.ranks(4, Staged, address)
    tokenizers = [crew.start(Tokenizer, address) for _ in range(2)]
    ready(*ranks, *tokenizers)
    together(ranks, "hand_on_something_small")
    acquaint(ranks, *tokenizers)
    count = 4
    for number in range(count):
        for which, tokenizer in enumerate(tokenizers):
            tokenizer.ask("share", f"{which}.{number}", seed + 10 * which + number)
            tokenizer.ask("send", f"{which}.{number}")
            tokenizer.ask("end", f"{which}.{number}")
        taken = alike(ranks, "take", 2)
        assert len(taken) == 2 and all(taken.values())
        arenas = alike(ranks, "where")
        for which, tokenizer in enumerate(tokenizers):
            assert arenas[f"{which}.{number}"] == tokenizer.ask("arena_id")
        alike(ranks, "drop")
    nobody_copied(ranks, 2 * count)
    assert ranks[2].ask("counts")["passed_on"] == 2 * count * LARGE
    # Receipts, of 64 bytes each: less than the smallest array, for all messages together.
    assert 0 < ranks[0].ask("own_bytes") < 1000
    assert together(ranks[1:], "own_bytes") == [0, 0, 0]
    for tokenizer in tokenizers:
        published_once(tokenizer, count)


def test_the_first_message_to_the_next_stage_is_copied_once_for_its_group(crew: Crew, seed: int) -> None:
    """And right, and forgotten; what comes later is not copied."""
    address = crew.address()
    ranks = crew.ranks(4, Staged, address)
    tokenizer = crew.start(
        Tokenizer, address, "16MiB", 0.05
    )  # its second message is the first that stage two has by handle
    ready(*ranks, tokenizer)
    acquaint(ranks, tokenizer)
    for number in range(3):
        tokenizer.ask("share", f"r{number}", seed + number)
        tokenizer.ask("send", f"r{number}")
        tokenizer.ask("end", f"r{number}")
        assert alike(ranks, "take", 1) == {f"r{number}": True}
        alike(ranks, "drop")
    assert together(ranks, "publishes_in_all") == [0, 0, LARGE, 0]
    nobody_copied(ranks, 3)
    assert tokenizer.ask("counts")["publishes"] == 3 * LARGE
    assert tokenizer.ask("wait_for_all") == 0
