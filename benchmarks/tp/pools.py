"""Materializing in background threads over the process group alone, as the origin of this project wrote it.

A thread pool and futures; what is aborted is cancelled if it has not begun, and otherwise thrown away when it is done;
the pool is shut down at the end. Results are given out in the order in which requests came, as far as they are ready.
"""

from __future__ import annotations

import pickle
import time
from abc import abstractmethod
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import numpy as np

from tp.jobs import RequestError
from tp.rank import Rank
from tp.servers import CANCELLED, FAILED, OK, Ending, Server
from tp.workloads import Features


class Pooled(Server):
    """Requests that are under way in a thread pool of this rank, by number."""

    def __init__(self, rank: Rank) -> None:
        super().__init__(rank)
        self.pending: dict[int, Future[Features]] = {}

    def setup(self) -> None:
        self.pool = ThreadPoolExecutor(self.rank.workers)

    def abort(self, number: int) -> None:
        """Stop a request if it has not begun; its result is not looked at in any case."""
        self.pending.pop(number).cancel()

    def ending(self, number: int) -> Ending:
        """Of a request whose future is done, and which is no longer pending then."""
        try:
            return Ending(number, OK, self.pending.pop(number).result())
        except RequestError:
            return Ending(number, FAILED)

    def ready(self) -> list[int]:
        """Requests that are materialized here."""
        return [number for number, future in self.pending.items() if future.done()]

    def idle(self, timeout_s: float) -> None:
        """Wait until there may be something to give out. Entry rank only."""
        wait(self.pending.values(), timeout_s, FIRST_COMPLETED)

    def iterate(self, arrived: Sequence[int], cancelled: Sequence[int], rider: bytes) -> list[Ending]:
        self.submit(arrived)
        return self.outcomes([number for number in cancelled if number in self.pending])

    @abstractmethod
    def submit(self, arrived: Sequence[int]) -> None:
        """Requests are pending from now on, on every rank."""

    @abstractmethod
    def outcomes(self, cancelled: Sequence[int]) -> list[Ending]:
        """Of all ranks alike; `cancelled` are pending."""

    def teardown(self) -> None:
        self.pool.shutdown(cancel_futures=True)


class ObjectAsync(Pooled):
    """The entry rank materializes; what is ready in an iteration goes out pickled, in one broadcast."""

    def submit(self, arrived: Sequence[int]) -> None:
        rank = self.rank
        for number in arrived:
            if rank.is_entry:
                self.pending[number] = self.pool.submit(rank.attempt, number, rank.raw(number))
            else:
                self.pending[number] = Future()

    def outcomes(self, cancelled: Sequence[int]) -> list[Ending]:
        if not self.pending:
            return []
        rank = self.rank
        if not rank.is_entry:
            received: list[Ending] = pickle.loads(rank.collectives.broadcast(None))
            for ending in received:
                del self.pending[ending.number]
            return received
        for number in cancelled:
            self.abort(number)
        endings = [Ending(number, CANCELLED) for number in cancelled]
        endings += [self.ending(number) for number in self.ready()]
        rank.collectives.broadcast(rank.collectives.pickle(endings))
        return endings


class RawAsync(Pooled):
    """Every rank materializes; a reduction says what is ready on all of them."""

    WINDOW = 64  # pending requests that are looked at in an iteration, so that the reduction is of a fixed size

    def submit(self, arrived: Sequence[int]) -> None:
        if not arrived:
            return
        rank = self.rank
        payload = rank.collectives.pickle([rank.raw(number) for number in arrived]) if rank.is_entry else None
        raws = pickle.loads(rank.collectives.broadcast(payload))
        for number, raw in zip(arrived, raws, strict=True):
            self.pending[number] = self.pool.submit(rank.attempt, number, raw)

    def idle(self, timeout_s: float) -> None:
        unready = [future for future in self.pending.values() if not future.done()]
        if unready:
            wait(unready, timeout_s, FIRST_COMPLETED)
        else:
            time.sleep(timeout_s)  # for the other ranks: nobody tells when they are

    def outcomes(self, cancelled: Sequence[int]) -> list[Ending]:
        for number in cancelled:  # every rank has heard of it in the same iteration
            self.abort(number)
        endings = [Ending(number, CANCELLED) for number in cancelled]
        if not self.pending:
            return endings
        window = list(self.pending)[: self.WINDOW]
        unready = np.zeros(self.WINDOW, np.int32)
        unready[: len(window)] = [not self.pending[number].done() for number in window]
        self.rank.collectives.on_any(unready)
        ready = [number for number, is_unready in zip(window, unready, strict=False) if not is_unready]
        return endings + [self.ending(number) for number in ready]
