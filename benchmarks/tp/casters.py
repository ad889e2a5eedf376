"""shmcast's asynchronous way: a `Caster`, which materializes in shared memory in the background.

`shm-async` and `shm-ring` send a message of their own in an iteration in which something is pending, over the process
group and over the ring; `shm-ride` puts it into the message that the engine sends anyway. Each may go on in another mode
every so often, as the entry rank says.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import shmcast
from tp.casting import counters, make_caster, make_group
from tp.engine import StreamRank
from tp.servers import CANCELLED, FAILED, OK, Ending, Server

MODES = ("shm", "shm-sync", "object", "object-sync", "raw", "raw-sync", "replicate", "replicate-sync")


class Switcher(threading.Thread):
    """Switches a caster to the next mode every so often, whatever the engine's thread is doing. Entry rank only."""

    def __init__(self, caster: shmcast.Caster, period_s: float) -> None:
        super().__init__(name="switcher", daemon=True)
        self.switches = 0
        self._caster: Any = caster
        self._period_s = period_s
        self._over = threading.Event()

    @property
    def mode(self) -> str:
        """In force."""
        return MODES[self.switches % len(MODES)]

    def run(self) -> None:
        due_s = time.monotonic() + self._period_s
        while not self._over.wait(max(0.0, due_s - time.monotonic())):
            due_s += self._period_s
            self._caster.switch(MODES[(self.switches + 1) % len(MODES)])
            self.switches += 1

    def end(self) -> None:
        """No more."""
        self._over.set()
        self.join()


class ShmAsync(Server):
    """`Caster.step` in every iteration."""

    channel: ClassVar[Literal["auto", "group"]] = "group"
    cached: ClassVar[bool] = False

    def __init__(self, rank: StreamRank) -> None:
        super().__init__(rank)
        self.loop = rank
        self._before: dict[str, int] = {}
        self._submitted = Counter[str]()  # by the mode that was in force, or has just been
        self._switcher: Switcher | None = None

    def setup(self) -> None:
        self.group = make_group(self.rank, self.channel, self.cached)
        self.caster = make_caster(self.rank, self.group, self.cached)
        if self.rank.is_entry and self.loop.stream.switch_every_s:
            self._switcher = Switcher(self.caster, self.loop.stream.switch_every_s)
            self._switcher.start()

    def iterate(self, arrived: Sequence[int], cancelled: Sequence[int], rider: bytes) -> list[Ending]:
        self._take_in(arrived, cancelled)
        return self._endings(self.caster.step())

    def counters(self) -> dict[str, int]:
        if not self.rank.is_entry:
            return {}
        found = counters(self.caster)
        if self._switcher is not None:
            found |= {f"submitted_{mode}": self._submitted[mode] for mode in MODES}
            found["switches"] = self._switcher.switches
        return found

    def teardown(self) -> None:
        if self._switcher is not None:
            self._switcher.end()
        self.caster.close()
        self.group.close()

    def _take_in(self, arrived: Sequence[int], cancelled: Sequence[int]) -> None:
        rank = self.loop
        has_raw = rank.is_entry or rank.stream.switch_every_s > 0  # some modes need it on all ranks
        for number in arrived:
            request = rank.requests[number]
            job = (request.content, request.fails, rank.raw(number)) if has_raw else None
            self.caster.submit(number, job)
            if self._switcher is not None:
                self._submitted[self._switcher.mode] += 1
        for number in cancelled:
            self.caster.cancel(number)

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
