"""The loop of an engine, on every rank: one iteration each decode tick, whatever else there is to do.

An iteration begins on the entry rank when its tick is due. It broadcasts what has arrived and what was cancelled: the
small message that every engine sends (`wire`), under every strategy. Then the strategy takes that in and gives out what has
ended, then the tick starts (late, if one of this or of the iterations before has taken its time), then what has ended
is read and freed. The other ranks are paced by the message.
"""

from __future__ import annotations

import itertools
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from tp.arrivals import Arrivals, Request
from tp.children import reaped_cpu_ns
from tp.config import Config, Stream
from tp.contents import Slot
from tp.inputs import Inputs
from tp.jobs import RequestError, refuse
from tp.rank import Rank, now_ns
from tp.records import Ended, StreamReply, changes
from tp.servers import FAILED, OK, Ending, Server
from tp.wire import Wire
from tp.workloads import Features, NewArray

_FAILURE = "failure"  # in the meta of features that stand for a failed request


class Taken(NamedTuple):
    """A request that this rank has read and freed."""

    status: str
    freed_ns: int
    fingerprint: int


class StreamRank(Rank):
    """A rank that serves streams. Index of a request, to a strategy: its number in the stream."""

    def __init__(self, rank: int, config: Config, inputs: Inputs, store: str) -> None:
        self.requests: Sequence[Request] = ()
        self.taken: dict[int, Taken] = {}
        self._ring: Iterator[Slot] | None = None
        super().__init__(rank, config, inputs, None, store)
        self.wire = Wire(rank, config.tp, f"{store}.wire", self.collectives.barrier)

    @property
    def stream(self) -> Stream:
        """How this stream is configured."""
        if self.config.stream is None:
            raise RuntimeError("this rank serves batches")
        return self.config.stream

    # What a strategy calls -------------------------------------------------------------------------------------

    def begin(self, batch: Sequence[int]) -> None:
        super().begin(batch)
        self._ring = self._ring or itertools.cycle(self.slots)
        self._free_slots = self._ring

    def source(self, index: int) -> int:
        return self.requests[index].source

    def attempt(self, index: int, raw: Any, new: NewArray = np.empty) -> Features:
        """What `raw` becomes; RequestError for a request that fails, which it does where it asks for its array."""
        return self.workload.materialize(raw, refuse if self.requests[index].fails else new)

    def make(self, index: int, raw: Any, new: NewArray = np.empty) -> Features:
        try:
            return self.attempt(index, raw, new)
        except RequestError as error:  # travels as what the request became
            return Features({_FAILURE: str(error)})

    def consume(self, index: int, features: Features, release: Callable[[], None] | None = None) -> None:
        super().consume(index, features, release)
        slot = next(slot for slot in self.slots if slot.index == index)
        status = FAILED if _FAILURE in features.meta else OK
        self.taken[index] = Taken(status, self.records[index].freed_ns, slot.fingerprint())

    # What the command loop calls -------------------------------------------------------------------------------

    def serve_stream(self, server: Server, requests: Sequence[Request], start_ns: int) -> StreamReply:
        """All of these requests."""
        self.requests, self.taken = requests, {}
        self.tick.start(start_ns)
        before, counted = self.collectives.snapshot(), server.counters()
        self.fallbacks = 0
        arrivals = Arrivals(requests, start_ns)
        ended: list[Ended] = []
        for iteration in itertools.count():
            message = self._next(server, arrivals)
            if message is None:
                break
            endings = server.iterate(*message)
            self.tick.poll()
            ended += self._take(endings, iteration)
            arrivals.end(len(endings), now_ns())
        messages, calls, nbytes = (b - a for a, b in zip(before, self.collectives.snapshot(), strict=True))
        arrived_ns = arrivals.arrived_ns if self.is_entry else {}
        counters = changes(counted, server.counters())
        counts = (messages, calls, nbytes, self.fallbacks, reaped_cpu_ns(), counters)
        return StreamReply(ended, arrived_ns, iteration, self.tick.lateness_ns, *counts)

    def verify(self) -> list[str]:
        """What of the requests that were read last differs from an independently materialized copy."""
        problems = []
        for slot in self.slots:
            if slot.index >= 0 and _FAILURE not in slot.meta:
                difference = slot.differences(self.inputs.expected(self.source(slot.index)))
                if difference is not None:
                    problems.append(f"rank {self.rank}, request {slot.index}: {difference}")
            slot.spoil()
        return problems

    def _next(self, server: Server, arrivals: Arrivals) -> tuple[list[int], list[int], bytes] | None:
        """What the engine's message of this iteration says: arrived, cancelled, rider. None: all have ended."""
        message = b""
        if self.is_entry:
            time.sleep(max(0, self.tick.due_ns - now_ns()) / 1e9)
            what = None if arrivals.over else (*arrivals.take(now_ns()), server.rider())
            message = pickle.dumps(what, protocol=5)
        found: tuple[list[int], list[int], bytes] | None = pickle.loads(self.wire.broadcast(message))
        return found

    def _take(self, endings: Sequence[Ending], iteration: int) -> list[Ended]:
        """Read and free what has ended."""
        self.begin([ending.number for ending in endings if ending.features is not None])
        ended = []
        for number, status, features in endings:
            if features is not None:
                self.consume(number, features)
            taken = self.taken.get(number) or Taken(status, now_ns(), 0)
            ended.append(Ended(iteration, number, status, taken.freed_ns, taken.fingerprint))
        return ended
