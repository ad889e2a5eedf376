"""The tokenizer process of `--producer tokenizer`: it materializes and sends to rank 0 over a pipe."""

from __future__ import annotations

import fcntl
import gc
import io
import os
import pickle
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from tp.children import command_loop, give_back_memory, reaped_cpu_ns
from tp.config import Config
from tp.inputs import Inputs
from tp.records import Arrival
from tp.strategies import TokenizerSide, load, spec_of
from tp.workloads import Features, NewArray, make_workload

PIPE_BYTES = 1 << 20  # the most that an unprivileged process may have


class Tokenizer:
    """The tokenizer, as the strategies' halves see it."""

    def __init__(self, config: Config, inputs: Inputs, outbox: Connection) -> None:
        self.config, self.inputs, self.outbox = config, inputs, outbox
        self.workload = make_workload(config)

    def materialize(self, index: int, new: NewArray = np.empty) -> Features:
        """Materialize request `index`; the caller takes the time."""
        return self.workload.materialize(self.inputs.raws[self.inputs.keys[index]], new)

    def send(self, payload: bytes | memoryview, materialized_ns: int, materialize_ns: int, publish_ns: int) -> None:
        """Hand one request to rank 0."""
        self.tell(Arrival(len(payload), materialized_ns, materialize_ns, publish_ns))
        self.outbox.send_bytes(payload)

    def tell(self, arrival: Arrival) -> None:
        """Tell rank 0 of a request that comes by another way."""
        self.outbox.send(tuple(arrival))


class Pickled(TokenizerSide):
    """The arrays go through the pipe, pickled (protocol 5) into warm memory."""

    def setup(self) -> None:
        self.buffer = io.BytesIO()

    def serve(self, index: int) -> None:
        start_ns = time.monotonic_ns()
        features = self.tokenizer.materialize(index)
        materialized_ns = time.monotonic_ns()
        self.buffer.seek(0)
        pickle.Pickler(self.buffer, protocol=5).dump(features)
        with self.buffer.getbuffer() as whole, whole[: self.buffer.tell()] as payload:
            publish_ns = time.monotonic_ns() - materialized_ns
            self.tokenizer.send(payload, materialized_ns, materialized_ns - start_ns, publish_ns)


def main(pipe: Connection, outbox: Connection) -> None:
    """The process."""
    config, _, directory = pipe.recv()
    fcntl.fcntl(outbox.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    me = Tokenizer(config, Inputs.load(directory), outbox)
    active: dict[str, TokenizerSide] = {}

    def setup(name: str) -> None:
        place = spec_of(name).tokenizer
        if place is not None:
            active[name] = load(place)(me)
            active[name].setup()

    def serve(name: str, batch: Sequence[int], arrival_ns: int) -> int:
        time.sleep(max(0, arrival_ns - time.monotonic_ns()) / 1e9)
        if name in active:
            for index in batch:
                active[name].serve(index)
        return reaped_cpu_ns()

    def teardown(name: str) -> None:
        side = active.pop(name, None)
        if side is not None:
            side.teardown()

    def stop() -> None:
        for name in list(active):
            teardown(name)

    handlers: dict[str, Any] = {
        "setup": setup,
        "serve": serve,
        "verify": list,
        "teardown": teardown,
        "trim": give_back_memory,
        "stop": stop,
    }
    gc.freeze()
    pipe.send(("ok", os.getpid()))
    command_loop(pipe, handlers)
