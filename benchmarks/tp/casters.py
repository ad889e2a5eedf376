"""shmcast's asynchronous way: a `Caster`, which materializes in shared memory in the background.

`shm-async` and `shm-ring` send a message of their own in an iteration in which something is pending, over the process
group and over the ring; `shm-ride` puts it into the message that the engine sends anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch.distributed as dist

import shmcast
from tp.config import MIB
from tp.engine import StreamRank
from tp.servers import CANCELLED, FAILED, OK, Ending, Server
from tp.workloads import Features, NewArray

MIN_ARENA_BYTES = 256 * MIB
ARENA_REQUESTS = 16  # of the largest: room for what is in the making, and for what some rank has not freed yet


class ShmAsync(Server):
    """`Caster.step` in every iteration."""

    channel: ClassVar[Literal["auto", "group"]] = "group"

    def __init__(self, rank: StreamRank) -> None:
        super().__init__(rank)
        self._before: dict[str, int] = {}

    def setup(self) -> None:
        rank = self.rank
        max_bytes = max(MIN_ARENA_BYTES, ARENA_REQUESTS * rank.inputs.slot_bytes)
        self.group = shmcast.Group(dist.group.WORLD, entry=0, max_bytes=max_bytes, channel=self.channel)
        self.caster = shmcast.Caster(self.group, self._materialize, workers=rank.stream.workers, hash=False)

    def iterate(self, arrived: Sequence[int], cancelled: Sequence[int], rider: bytes) -> list[Ending]:
        self._take_in(arrived, cancelled)
        return self._endings(self.caster.step())

    def teardown(self) -> None:
        self.caster.close()
        self.group.close()

    def _take_in(self, arrived: Sequence[int], cancelled: Sequence[int]) -> None:
        rank = self.rank
        for number in arrived:
            self.caster.submit(number, (number, rank.raw(number)) if rank.is_entry else None)
        for number in cancelled:
            self.caster.cancel(number)

    def _materialize(self, numbered: tuple[int, Any], out: NewArray) -> Features:
        return self.rank.attempt(*numbered, out)

    def _endings(self, outcomes: Sequence[shmcast.Outcome]) -> list[Ending]:
        stats = self.group.stats()
        messages, nbytes, overflows = (
            stats[name] - self._before.get(name, 0) for name in ("messages", "message_bytes", "overflows")
        )
        self._before = stats
        self.rank.collectives.count(messages, self._calls(messages, overflows), nbytes)
        return [
            Ending(outcome.rid, OK, outcome.value)
            if outcome.ok
            else Ending(outcome.rid, CANCELLED if outcome.cancelled else FAILED)
            for outcome in outcomes
        ]

    def _calls(self, messages: int, overflows: int) -> int:
        """Calls of the process group."""
        return messages + overflows


class ShmRing(ShmAsync):
    """The same over the ring in shared memory."""

    channel = "auto"

    def _calls(self, messages: int, overflows: int) -> int:
        return 0


class ShmRide(ShmAsync):
    """`collect` and `apply`: no message of its own."""

    channel = "auto"

    def rider(self) -> bytes:
        return self.caster.collect()

    def iterate(self, arrived: Sequence[int], cancelled: Sequence[int], rider: bytes) -> list[Ending]:
        endings = self._endings(self.caster.apply(rider))  # it was collected before these arrived
        self._take_in(arrived, cancelled)
        return endings

    def _calls(self, messages: int, overflows: int) -> int:
        return 0
