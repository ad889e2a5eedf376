"""The process of one rank: it serves one command at a time from the parent over a pipe, and ends when the pipe does."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from tp.arrivals import Request
from tp.children import command_loop, give_back_memory
from tp.config import Config
from tp.engine import StreamRank
from tp.inputs import Inputs
from tp.rank import Rank
from tp.records import Reply, StreamReply
from tp.servers import Server, Synchronous
from tp.strategies import Strategy, load, spec_of


def main(rank: int, pipe: Connection, inbox: Connection | None) -> None:
    """Until the parent says stop, or is gone."""
    config, store, directory = pipe.recv()
    inputs = Inputs.load(directory)
    handlers = (
        _batches(rank, config, inputs, inbox, store) if config.stream is None else _stream(rank, config, inputs, store)
    )
    gc.collect()
    gc.freeze()
    pipe.send(("ok", os.getpid()))
    command_loop(pipe, handlers)


def _batches(rank: int, config: Config, inputs: Inputs, inbox: Connection | None, store: str) -> dict[str, Any]:
    me = Rank(rank, config, inputs, inbox, store)
    active: dict[str, Strategy] = {}

    def setup(name: str) -> None:
        spec = spec_of(name)
        me.execute_by(spec)
        active[name] = load(spec.place)(me)
        active[name].setup()

    def serve(name: str, batch: Sequence[int], arrival_ns: int) -> Reply:
        return me.serve(active[name], batch, arrival_ns)

    return {**_common(me, active, setup), "serve": serve}


def _stream(rank: int, config: Config, inputs: Inputs, store: str) -> dict[str, Any]:
    me = StreamRank(rank, config, inputs, store)
    active: dict[str, Server] = {}

    def setup(name: str) -> None:
        spec = spec_of(name)
        me.execute_by(spec)
        active[name] = load(spec.server)(me) if spec.server else Synchronous(me, load(spec.place)(me))
        active[name].setup()

    def serve(name: str, requests: Sequence[Request], start_ns: int) -> StreamReply:
        return me.serve_stream(active[name], requests, start_ns)

    common = _common(me, active, setup)

    def stop() -> None:
        common["stop"]()
        me.wire.close()

    return {**common, "stream": serve, "stop": stop}


def _common(me: Rank, active: dict[str, Any], setup: Any) -> dict[str, Any]:
    """What is commanded of a rank whatever it serves."""

    def teardown(name: str) -> None:
        strategy = active.pop(name, None)
        if strategy is not None:
            strategy.teardown()

    def trim() -> None:
        me.collectives.trim()
        give_back_memory()

    def stop() -> None:
        for name in list(active):
            teardown(name)
        me.collectives.close()

    return {"setup": setup, "verify": me.verify, "teardown": teardown, "trim": trim, "stop": stop}
