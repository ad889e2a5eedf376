"""Asynchronous strategies over the process group, given batches: an engine's loop that has nothing else to do.

After each iteration the entry rank waits until something is ready or the next decode tick is due, whichever is first; the
other ranks are paced by its message.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from tp.pools import ObjectAsync, Pooled, RawAsync
from tp.rank import Rank, now_ns
from tp.servers import Ending
from tp.strategies import Strategy


class Background(Strategy):
    """Iterations of a server until the batch has ended."""

    server: ClassVar[type[Pooled]]

    def __init__(self, rank: Rank) -> None:
        super().__init__(rank)
        self._server = self.server(rank)

    def setup(self) -> None:
        self._server.setup()

    def serve(self, batch: Sequence[int]) -> None:
        rank, server = self.rank, self._server
        self.submit(batch)
        left = len(batch)
        while left:
            endings = self.outcomes()
            for number, _, features in endings:
                rank.usable(number)
                if features is not None:
                    rank.consume(number, features)
            rank.tick.poll()
            left -= len(endings)
            if left and rank.is_entry:
                del endings
                server.idle(max(0, rank.tick.due_ns - now_ns()) / 1e9)

    def teardown(self) -> None:
        self._server.teardown()

    @abstractmethod
    def submit(self, batch: Sequence[int]) -> None:
        """Of the first iteration, with marks."""

    @abstractmethod
    def outcomes(self) -> list[Ending]:
        """Of each iteration, with marks."""


class RawBackground(Background):
    """What travels are raw requests, in the first iteration."""

    server = RawAsync

    def submit(self, batch: Sequence[int]) -> None:
        if self.rank.is_entry:
            self.rank.sending(*batch)
            self.rank.messaging(*batch)
        self._server.submit(batch)
        self.rank.received(*batch)

    def outcomes(self) -> list[Ending]:
        return self._server.outcomes(())


class ObjectBackground(Background):
    """What travels are objects that are ready; the message's time has their pickling."""

    server = ObjectAsync

    def submit(self, batch: Sequence[int]) -> None:
        self._server.submit(batch)

    def outcomes(self) -> list[Ending]:
        rank = self.rank
        if rank.is_entry and (ready := self._server.ready()):
            rank.sending(*ready)
            rank.messaging(*ready)
        endings = self._server.outcomes(())
        rank.received(*(ending.number for ending in endings))
        return endings
