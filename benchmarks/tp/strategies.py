"""The table of strategies, and what all of them have in common.

A new strategy is a class (below `Strategy`, or `servers.Server` if it serves streams alone; in a file of its own
family) and one line in `STRATEGIES`. Classes are
named, not imported, here: a strategy that needs a package is no burden for the others.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tp.rank import Rank
    from tp.tokenizer import Tokenizer


class Strategy(ABC):
    """One way to serve requests on all ranks. An instance lives on each rank, from first use to the end.

    `serve` is the window: it must hand every request of the batch to `rank.consume`, on every rank.
    """

    def __init__(self, rank: Rank) -> None:
        self.rank = rank

    def setup(self) -> None:
        """Outside every window, on all ranks together."""

    @abstractmethod
    def serve(self, batch: Sequence[int]) -> None:
        """Serve the requests with these indexes, in one iteration, on all ranks together."""

    def counters(self) -> dict[str, int]:
        """What it has counted so far, and the report shall have."""
        return {}

    def teardown(self) -> None:
        """Outside every window, on all ranks together; also after a failure."""


class TokenizerSide(ABC):
    """What the tokenizer process does under one strategy, where it is the one that materializes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def setup(self) -> None:
        """Outside every window."""

    @abstractmethod
    def serve(self, index: int) -> None:
        """Materialize one request and send it to rank 0."""

    def teardown(self) -> None:
        """Outside every window."""


@dataclass(frozen=True)
class Spec:
    """One line of the table. Places are `module:class`."""

    name: str
    summary: str
    place: str = ""  # its `Strategy`; none: it is asynchronous, and serves streams alone
    tokenizer: str | None = None  # its `TokenizerSide`; None: the tokenizer has no part in it
    once: bool = True  # one materialization a request, not one a rank
    server: str = ""  # its `Server`; none: it serves a stream synchronously
    caster: bool = False  # it has a `Caster`, which may have other executors, and, in a stream, other modes
    cached: bool = False  # and a cache
    executor: str = ""  # in place of the configured one
    workers: int = 0


_PICKLED = "tp.tokenizer:Pickled"

STRATEGIES: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        Spec("replicate", "every rank materializes the raw request", "tp.collectives:Replicate", once=False),
        Spec("raw", "broadcast the raw request, every rank materializes", "tp.collectives:Raw", once=False),
        Spec(
            "raw-async",
            "the same in threads; a reduction says what is ready",
            "tp.background:RawBackground",
            once=False,
            server="tp.pools:RawAsync",
        ),
        Spec("object", "materialize once, pickle, one broadcast a request", "tp.collectives:Object", _PICKLED),
        Spec(
            "object-async",
            "the same in threads; what is ready in one broadcast",
            "tp.background:ObjectBackground",
            server="tp.pools:ObjectAsync",
        ),
        Spec("object-batch", "object, one broadcast a batch", "tp.collectives:ObjectBatch", _PICKLED),
        Spec(
            "eager", "materialize once, pickle, to each rank over ZMQ", "tp.sockets:Eager", "tp.sockets:EagerTokenizer"
        ),
        Spec("tensor", "metadata, then dist.broadcast array by array", "tp.collectives:Tensor", _PICKLED),
        Spec("shm-naive", "a fresh segment an array, barrier, all_reduce", "tp.naive:ShmNaive", _PICKLED),
        Spec("shm", "shmcast: in place, warm, handles", "tp.shm:Shm", "tp.in_place:ShmTokenizer"),
        Spec(
            "shm-zmq",
            "shmcast: in place, handles to each rank over ZMQ",
            "tp.sockets:ShmZmq",
            "tp.sockets:ShmZmqTokenizer",
        ),
        Spec("shm-cast", "shmcast's Caster, synchronous: cast", "tp.casting:ShmCast", caster=True),
        Spec(
            "cache",
            "the same, and results are remembered by content",
            "tp.casting:Cache",
            server="tp.casters:ShmCache",
            caster=True,
            cached=True,
        ),
        Spec("shm-async", "its message over the process group", server="tp.casters:ShmAsync", caster=True),
        Spec("shm-ring", "its message over the ring in shared memory", server="tp.casters:ShmRing", caster=True),
        Spec("shm-ride", "its message inside that of the engine", server="tp.casters:ShmRide", caster=True),
    )
}
BATCHED = tuple(name for name, spec in STRATEGIES.items() if spec.place)  # the others serve streams alone
STREAMED = tuple(name for name, spec in STRATEGIES.items() if spec.server or not spec.caster)
TOKENIZED = tuple(name for name in BATCHED if STRATEGIES[name].tokenizer or not STRATEGIES[name].once)
SWITCHED = tuple(name for name in STREAMED if STRATEGIES[name].caster)  # may go on in another mode


def spec_of(name: str) -> Spec:
    """Of a strategy, or of ``strategy@executor:workers``."""
    base, _, executing = name.partition("@")
    executor, _, workers = executing.partition(":")
    return replace(STRATEGIES[base], name=name, executor=executor, workers=int(workers or 0))


def with_executors(name: str, executors: Sequence[tuple[str, int]]) -> list[str]:
    """The names of a strategy with each of them: its own if there is one, or if it has no `Caster`."""
    if len(executors) < 2 or not STRATEGIES[name].caster:
        return [name]
    return [f"{name}@{executor}:{workers}" for executor, workers in executors]


def load(place: str) -> Any:
    """The class at `module:class`."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)
