"""shmcast's asynchronous way: a `Caster`, which materializes in shared memory in the background.

`shm-async` and `shm-ring` send a message of their own in an iteration in which something is pending, over the process
group and over the ring; `shm-ride` puts it into the message that the engine sends anyway. Each may go on in another mode
every so often, as the entry rank says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import ClassVar, Literal

import shmcast
from tp.casting import counters, make_caster, make_group
from tp.engine import StreamRank
from tp.rank import now_ns
from tp.servers import CANCELLED, FAILED, OK, Ending, Server

MODES = ("shm", "shm-sync", "object", "object-sync", "raw", "raw-sync", "replicate", "replicate-sync")


class ShmAsync(Server):
    """`Caster.step` in every iteration."""

    channel: ClassVar[Literal["auto", "group"]] = "group"
    cached: ClassVar[bool] = False

    def __init__(self, rank: StreamRank) -> None:
        super().__init__(rank)
        self.loop = rank
        self._before: dict[str, int] = {}
        self._submitted = Counter[str]()  # by mode
        self._switches = 0
        self._switched_ns = now_ns()

    def setup(self) -> None:
        self.group = make_group(self.rank, self.channel, self.cached)
        self.caster = make_caster(self.rank, self.group, self.cached)

    def iterate(self, arrived: Sequence[int], cancelled: Sequence[int], rider: bytes) -> list[Ending]:
        self._take_in(arrived, cancelled)
        return self._endings(self.caster.step())

    def counters(self) -> dict[str, int]:
        if not self.rank.is_entry:
            return {}
        by_mode = {f"submitted_{mode}": self._submitted[mode] for mode in MODES} if self._period_ns else {}
        return counters(self.caster) | by_mode | {"switches": self._switches}

    def teardown(self) -> None:
        self.caster.close()
        self.group.close()

    def _take_in(self, arrived: Sequence[int], cancelled: Sequence[int]) -> None:
        self._switch()
        rank = self.loop
        has_raw = rank.is_entry or self._period_ns > 0  # some modes need it on all ranks
        for number in arrived:
            request = rank.requests[number]
            job = (request.content, request.fails, rank.raw(number)) if has_raw else None
            self.caster.submit(number, job)
            self._submitted[MODES[self._switches % len(MODES)]] += 1
        for number in cancelled:
            self.caster.cancel(number)

    @property
    def _period_ns(self) -> int:
        return round(self.loop.stream.switch_every_s * 1e9)

    def _switch(self) -> None:
        """The next mode, if it is time for it; what was submitted before goes as it would have."""
        if not self.rank.is_entry or not self._period_ns or now_ns() < self._switched_ns + self._period_ns:
            return
        self._switched_ns = now_ns()
        self._switches += 1
        switch_mode(self.caster, MODES[self._switches % len(MODES)])

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


class ShmCache(ShmRing):
    """The same, with a cache of results by content of the raw request."""

    cached = True


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


def switch_mode(caster: shmcast.Caster, mode: str) -> None:
    """New requests go that way."""
    caster.switch(mode)  # type: ignore[attr-defined]
