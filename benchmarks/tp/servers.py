"""How a strategy serves a stream: what the engine's loop asks of it in every iteration.

A synchronous strategy is served by `Synchronous`; an asynchronous one is a `Server` of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tp.engine import StreamRank
    from tp.rank import Rank
    from tp.strategies import Strategy
    from tp.workloads import Features

OK, FAILED, CANCELLED = "ok", "failed", "cancelled"


class Ending(NamedTuple):
    """What became of a request."""

    number: int
    status: str
    features: Features | None = None  # of one that is ok, to be read; None: the strategy has read it itself


class Server(ABC):
    """One way to serve a stream, on one rank. All calls come from the engine's thread, equally often on all ranks."""

    def __init__(self, rank: Rank) -> None:
        self.rank = rank

    def setup(self) -> None:
        """Outside every window, on all ranks together."""

    def rider(self) -> bytes:
        """What shall travel in the engine's own message of this iteration. Entry rank only."""
        return b""

    @abstractmethod
    def iterate(self, arrived: Sequence[int], cancelled: Sequence[int], rider: bytes) -> list[Ending]:
        """One iteration: take in what has arrived and what was cancelled, give out what has ended, on all ranks alike.

        A request that is cancelled may have ended before."""

    def counters(self) -> dict[str, int]:
        """What it has counted so far, and the report shall have."""
        return {}

    def teardown(self) -> None:
        """Outside every window, on all ranks together."""


class Synchronous(Server):
    """A strategy that serves what has arrived at once, while the engine waits; a few requests in each iteration."""

    def __init__(self, rank: StreamRank, strategy: Strategy) -> None:
        super().__init__(rank)
        self.loop = rank
        self.strategy = strategy
        self.waiting: OrderedDict[int, None] = OrderedDict()

    def setup(self) -> None:
        self.strategy.setup()

    def iterate(self, arrived: Sequence[int], cancelled: Sequence[int], rider: bytes) -> list[Ending]:
        self.waiting.update(dict.fromkeys(arrived))
        endings = []
        for number in cancelled:
            if number in self.waiting:
                del self.waiting[number]
                endings.append(Ending(number, CANCELLED))
        batch = list(self.waiting)[: self.rank.config.batch]
        if batch:
            for number in batch:
                del self.waiting[number]
            self.rank.begin(batch)
            self.strategy.serve(batch)
            endings += [Ending(number, self.loop.taken[number].status) for number in batch]
        return endings

    def counters(self) -> dict[str, int]:
        return self.strategy.counters()

    def teardown(self) -> None:
        self.strategy.teardown()
