"""Tokenizers that send their failures, too, and ranks with a caster, for tests of the hop."""

from __future__ import annotations

import select
import threading
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np

import shmcast
from hop import Scheduler, Tokenizer, features, is_right

# ---- a failure of the tokenizer's is the outcome on all ranks: what a user would copy


def deliver(
    socket: Any, rid: str, materialize: Callable[[Any], Any], raw: Any, arena: shmcast.Arena, **more: Any
) -> None:
    """In the tokenizer: to rank 0 with the features of a request, or with why there are none."""
    from shmcast.channels.zmq import send

    try:
        shared = shmcast.share(materialize(raw), arena)
        send(socket, {"rid": rid, "features": shared, **more}, arena)
    except Exception as error:
        text = traceback.format_exc()
        failure = shmcast.MaterializeError.of(rid, type(error).__name__, str(error), text)
        send(socket, {"rid": rid, "features": failure, **more})


def delivered(found: Any) -> Any:
    """On rank 0, what a `Caster` materializes with: that has been done, or has failed, which is every rank's outcome then."""
    if isinstance(found, shmcast.MaterializeError):
        raise found
    return found


# ---- the actors that do so


class Delivering(Tokenizer):
    def deliver(self, rid: str, seed: int, how: str = "good") -> None:
        ways = {
            "good": features,
            "raises": fails,
            "can not be pickled": odd,
            "is too large": huge,
            "is elsewhere": meta,
        }
        deliver(self.socket, rid, ways[how], seed, self.arena, seed=seed)


def fails(seed: int) -> Any:
    raise ValueError(f"no image: {seed}")


def odd(seed: int) -> Any:
    return features(seed) | {"why": (number for number in range(seed))}


def huge(seed: int) -> Any:
    return features(seed) | {"more": np.zeros(32 << 20, "uint8")}


def meta(seed: int) -> Any:
    """What there is without a GPU."""
    import torch

    return features(seed) | {"more": torch.empty(100_000, device="meta")}


class Casting(Scheduler):
    """Ranks with a caster. A worker waits at a gate, for tests that want to know what is where."""

    def join(self, executor: Any = "inline", closed: bool = False, **options: Any) -> None:
        super().join(**options)
        self.gate, self.entered = threading.Event(), threading.Semaphore(0)
        if not closed:
            self.gate.set()
        self.blob = b""
        self.caster = shmcast.Caster(self.group, self._materialize, executor=executor, workers=1)

    def _materialize(self, found: Any) -> Any:
        self.entered.release()
        self.gate.wait()
        return delivered(found)

    def submit(self, count: int) -> list[str]:
        """Rank 0 receives so many messages, and all ranks submit them."""
        assert all(isinstance(answer, str) for answer in self.receive(count))
        messages, self.inbox = self.inbox, []
        names = self.group.broadcast([(message["rid"], message["seed"]) for message in messages])
        self.seeds = getattr(self, "seeds", {}) | dict(names)
        for number, (rid, _) in enumerate(names):
            self.caster.submit(rid, messages[number]["features"] if self.here.rank == 0 else None)
        return [rid for rid, _ in names]

    def step(self, timeout: float = 0.0) -> dict[str, Any]:
        return self._ends(self.caster.step(timeout))

    def step_to_the_end(self) -> dict[str, Any]:
        """Outcomes of all that is pending, in their order."""
        ends: dict[str, Any] = {}
        while self.caster.pending:
            ends |= self.step(1.0)
        return ends

    def _ends(self, outcomes: list[shmcast.Outcome]) -> dict[str, Any]:
        ends: dict[str, Any] = {}
        for rid, value, error, cancelled in outcomes:
            if cancelled:
                ends[rid] = "cancelled"
            elif error is not None:
                ends[rid] = type(error).__name__, str(error)
            else:
                self.held[rid] = {"features": value, "seed": self.seeds[rid]}
                ends[rid] = is_right(self.held[rid])
        return ends

    def cancel(self, *rids: str) -> None:
        for rid in rids:
            self.caster.cancel(rid)

    # on rank 0 with workers

    def wait_until_running(self) -> None:
        self.entered.acquire()

    def wait_until_ready(self) -> None:
        select.select([self.caster.fileno()], [], [])

    def open_gate(self) -> None:
        self.gate.set()

    def collect(self) -> None:
        """Make the message, for `apply`."""
        self.blob = self.caster.collect()

    def apply(self) -> dict[str, Any]:
        blob = self.group.broadcast(self.blob)
        self.blob = b""
        return self._ends(self.caster.apply(blob))

    def close(self) -> None:
        self.gate.set()
        self.caster.close()
        super().close()
