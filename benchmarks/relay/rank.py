"""The process of a tensor-parallel rank: SGLang's receiver, and what its scheduler does with a request that came."""

from __future__ import annotations

import gc
import os
import time
import weakref
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any, NamedTuple

from relay import engine
from relay.plan import Variant
from relay.tokenizer import nothing, sleep_until
from tp.children import command_loop


class Marks(NamedTuple):
    """When a rank had come how far with a request."""

    polls: list[tuple[int, int]]
    """When each call of the receiver began, the last one brought the request: the clock, this process's CPU until then."""
    received_ns: int
    """The request is here, its features are tensors, and all ranks agree on that."""
    built_ns: int
    """Its inputs are built, and each item has its hash and pad value."""
    read_ns: int
    """Every byte was read once."""
    freed_ns: int
    """Everything is given back."""
    cpu_ns: int
    """CPU of this process until then."""
    read_cpu_ns: int
    """What reading took of it."""
    digests: list[int]
    """Of each feature, from that reading."""
    hashes: list[int]
    """SGLang's names of the items."""
    freed: bool

    def cpu_since(self, sent_ns: int) -> int:
        """CPU from the call on that was under way when the request was sent."""
        before = [cpu_ns for began_ns, cpu_ns in self.polls if began_ns <= sent_ns]
        return self.cpu_ns - (before[-1] if before else self.polls[0][1])


def main(pipe: Connection, address: str, installed: bool, rank: int, tp: int, store: str) -> None:
    """Until the parent says stop, or is gone."""
    import torch
    import torch.distributed as dist
    import zmq

    from shmcast.integrations import sglang as integration

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=tp)
    if installed:
        integration.install()
    socket: Any = None
    if rank == 0:
        socket = zmq.Context.instance().socket(zmq.PULL)
        socket.bind(address)
    gc.disable()
    ranks = tuple(range(tp))
    with engine.maker().tensor_parallel(dist.group.WORLD, ranks, rank):
        scheduler = _Scheduler(engine.maker().receiver(socket), dist.group.WORLD, ranks, rank)

        def stop() -> str:
            if socket is not None:
                socket.close(linger=0)
            integration.uninstall()
            dist.destroy_process_group()
            return ""

        handlers: dict[str, Callable[..., Any]] = {
            "ready": scheduler.ready,
            "serve": scheduler.serve,
            "nothing": nothing,
            "stop": stop,
        }
        pipe.send(("ok", os.getpid()))
        command_loop(pipe, handlers)


class _Scheduler:
    """As much of SGLang's as a request meets until its inputs are there."""

    def __init__(self, receiver: Any, process_group: Any, ranks: Sequence[int], rank: int) -> None:
        from sglang.srt.managers import scheduler

        self._receiver = receiver
        self._class = scheduler.Scheduler
        self._self: Any = SimpleNamespace(
            dp_tp_group=engine.maker().coordinator(process_group, ranks, rank),
            dp_tp_cpu_group=process_group,
            model_config=SimpleNamespace(requires_mm_token_modalities=False),
            _process_and_broadcast_mm_inputs=lambda raw: self._class._process_and_broadcast_mm_inputs(self._self, raw),
        )

    def ready(self, variant: Variant, *_: Any) -> None:
        """For requests of this variant."""
        from sglang.srt.runtime_context import get_mm

        engine.skip_hash(variant.skip_hash)
        get_mm().enable_broadcast_mm_inputs_process = variant.built_once
        gc.collect()

    def serve(self, _: Variant, at_ns: int) -> Marks:
        """Take in one request, as the scheduler's loop does, read it and drop it."""
        import shmcast

        polls: list[tuple[int, int]] = []
        requests: list[Any] = []
        sleep_until(at_ns)
        while not requests:
            polls.append((time.monotonic_ns(), time.process_time_ns()))
            requests = self._receiver.recv_requests()
        received_ns = time.monotonic_ns()
        inputs = self._class._get_multimodal_inputs(self._self, requests[0].mm_inputs)
        built_ns, read_cpu_ns = time.monotonic_ns(), time.thread_time_ns()
        digests = [shmcast.hash128(item.feature.numpy()) for item in inputs.mm_items]
        read_ns, read_cpu_ns = time.monotonic_ns(), time.thread_time_ns() - read_cpu_ns
        hashes = [item.hash for item in inputs.mm_items]
        watched = [weakref.ref(item.feature) for item in inputs.mm_items]
        del inputs, requests
        freed_ns, cpu_ns = time.monotonic_ns(), time.process_time_ns()
        freed = all(reference() is None for reference in watched)
        return Marks(polls, received_ns, built_ns, read_ns, freed_ns, cpu_ns, read_cpu_ns, digests, hashes, freed)
