"""The tokenizer's process: it makes a request, wraps it, and sends it over ZMQ, each when it is told."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from relay import engine
from relay.plan import COLUMNS, ITEM_BYTES, Variant
from tp.children import command_loop


class Wrapped(NamedTuple):
    """What wrapping has done."""

    wrap_ns: int
    cpu_ns: int
    problem: str
    """Where features are not carried in the way that the variant says."""


def main(pipe: Connection, address: str, installed: bool, largest: int, seed: int) -> None:
    """Until the parent says stop, or is gone. ``largest``: bytes of the largest feature."""
    import torch
    import zmq

    from shmcast.integrations import sglang as integration

    torch.set_num_threads(1)
    if installed:
        integration.install()
    socket: Any = zmq.Context.instance().socket(zmq.PUSH)
    socket.connect(address)
    gc.disable()
    generator = torch.Generator().manual_seed(seed)
    tokenizer = _Tokenizer(socket, torch.rand(largest // ITEM_BYTES, generator=generator))

    def stop() -> str:
        socket.close(linger=0)
        left = _blocks() if installed else 0
        integration.uninstall()
        return f"{left} blocks are left in the tokenizer's arena" if left else ""

    handlers: dict[str, Callable[..., Any]] = {
        "ready": tokenizer.ready,
        "wrap": tokenizer.wrap,
        "serve": tokenizer.send,
        "nothing": nothing,
        "stop": stop,
    }
    with engine.maker().context():
        pipe.send(("ok", os.getpid()))
        command_loop(pipe, handlers)


class Sent(NamedTuple):
    """When a request began to be sent."""

    at_ns: int
    cpu_ns: int
    """CPU of this process until then."""


def nothing(at_ns: int) -> int:
    """CPU of this process when there is nothing left to do but to answer."""
    sleep_until(at_ns)
    return time.process_time_ns()


def sleep_until(at_ns: int) -> None:
    """Of `time.monotonic_ns`."""
    time.sleep(max(0, at_ns - time.monotonic_ns()) / 1e9)


class _Tokenizer:
    def __init__(self, socket: Any, source: Any) -> None:
        self._socket, self._source = socket, source
        self._request: Any = None

    def ready(self, variant: Variant, items: Sequence[int], number: int) -> list[int]:
        """Make request ``number``, of contents that no other has; the hash of each feature's bytes."""
        from shmcast.integrations import sglang as integration

        engine.skip_hash(variant.skip_hash)
        if variant.installed:
            integration.install(hash=variant.hash)
        features = [self._feature(nbytes, place, number) for place, nbytes in enumerate(items)]
        hashes = _hashes(features)
        self._request = engine.maker().request(f"request {number}", features)
        gc.collect()
        return hashes

    def wrap(self, variant: Variant) -> Wrapped:
        """As `TokenizerManager` does before it sends. Nobody but the request has the features: they are freed here."""
        from sglang.srt.managers import tokenizer_manager

        request, self._request = self._request, None
        began_ns, cpu_ns = time.monotonic_ns(), time.process_time_ns()
        request = tokenizer_manager.wrap_shm_features(request)
        request.wrap_pickle_fields()
        ended_ns, cpu_ns = time.monotonic_ns(), time.process_time_ns() - cpu_ns
        self._request = request
        return Wrapped(ended_ns - began_ns, cpu_ns, _problem(request, variant))

    def send(self, _: Variant, at_ns: int) -> Sent:
        """Send it at that moment."""
        from sglang.srt.managers.io_struct import sock_send

        request, self._request = self._request, None
        sleep_until(at_ns)
        sent = Sent(time.monotonic_ns(), time.process_time_ns())
        sock_send(self._socket, request)
        del request
        return sent

    def _feature(self, nbytes: int, place: int, number: int) -> Any:
        import torch

        feature = torch.empty(nbytes // ITEM_BYTES // COLUMNS, COLUMNS)
        feature.copy_(self._source[: feature.numel()].reshape(feature.shape))
        feature[0, 0], feature[-1, -1] = number, place
        return feature


def _hashes(features: Sequence[Any]) -> list[int]:
    import shmcast

    return [shmcast.hash128(feature.numpy()) for feature in features]


def _problem(request: Any, variant: Variant) -> str:
    from sglang.srt.managers.mm_utils import ShmPointerMMData

    from shmcast.integrations.sglang import stubs

    for item in request.mm_inputs.mm_items:
        if not isinstance(item.feature, ShmPointerMMData):
            return "a feature travels inline: /dev/shm is full, or the arena"
        if stubs.is_ours(item.feature) is not variant.installed:
            return "a feature is not carried by whom the variant says"
    return ""


def _blocks() -> int:
    from shmcast.own_arena import own_arena

    used: int = own_arena().stats()["slots_used"]
    return used
