"""shmcast: `Group.broadcast`; what is large has been materialized in place, see `in_place`.

Views own their leases: dropping the arrays, in `Rank.consume`, releases the blocks.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence

import torch.distributed as dist

import shmcast
from tp.in_place import MIN_SEGMENT_BYTES, InPlace, views
from tp.rank import Rank
from tp.strategies import Strategy
from tp.workloads import Features


class Shm(Strategy):
    """`Group.broadcast`, once a batch. With a tokenizer, rank 0 passes its holds on."""

    def __init__(self, rank: Rank) -> None:
        super().__init__(rank)
        self.producer: InPlace | None = None

    def setup(self) -> None:
        if self.rank.is_entry and self.rank.inbox is None:
            self.producer = InPlace(self.rank.inputs)
        arena = self.producer.arena if self.producer is not None else None
        self.group = shmcast.Group(dist.group.WORLD, entry=0, arena=arena, max_bytes=MIN_SEGMENT_BYTES)

    def serve(self, batch: Sequence[int]) -> None:
        rank = self.rank
        made, before = None, self.group.stats()
        if rank.is_entry:
            made = [self._produce(i) for i in batch]
            rank.sending(*batch)
            rank.messaging(*batch)
        shared = self.group.broadcast(made, local=True)
        rank.received(*batch)
        rank.usable(*batch)
        del made
        self._count(batch, before, self.group.stats())
        for i, features in zip(batch, shared, strict=True):
            rank.consume(i, features)

    def teardown(self) -> None:
        self.group.close()
        if self.producer is not None:
            self.producer.arena.close()

    def _count(self, batch: Sequence[int], before: dict[str, int], after: dict[str, int]) -> None:
        """What the group says of its last message; what it does not tell apart stays in the message's time."""

        def change(name: str) -> int:
            return after.get(name, 0) - before.get(name, 0)

        for record in map(self.rank.records.__getitem__, batch):
            record.publish_ns += change("encode_ns") // len(batch)
            record.message_ns += change("encode_ns")
            record.attach_ns += change("attach_ns") // len(batch)
            record.received_ns -= change("attach_ns")
        messages, nbytes = change("messages"), change("message_bytes")
        self.rank.collectives.count(messages, messages + change("overflows"), nbytes)

    def _produce(self, index: int) -> Features:
        """The arrays of one request, the large ones as views of blocks. Entry only."""
        rank = self.rank
        if self.producer is None:
            with rank.receive(index) as payload, rank.span("attach", index):
                return views(*pickle.loads(payload))
        meta, parts = self.producer.materialize(lambda new: rank.materialize(index, new))
        record = rank.records[index]
        record.materialize_ns -= self.producer.reserve_ns
        record.publish_ns += self.producer.reserve_ns + self.producer.seal_ns
        with rank.span("publish", index):
            return views(meta, parts)
