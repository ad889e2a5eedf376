"""What tests of casters materialize with: functions that wait where the test says so, and ways to look at outcomes."""

from __future__ import annotations

import hashlib
import random
import threading
import time
from typing import Any

import numpy as np

import shmcast

LONG_S = 60.0
MIB = 1 << 20


class Maker:
    """Makes arrays of a raw request: of as many bytes as a number says; "bad" fails; a gate waits until it is opened.

    Give workers something to wait for, then say when: ``maker.gate(name)``, ``maker.begun(name)``, ``maker.open(name)``."""

    def __init__(self) -> None:
        self._gates: dict[str, tuple[threading.Event, threading.Event, threading.Event, int]] = {}
        self._threads: set[threading.Thread] = set()
        self.made: list[Any] = []

    def __call__(self, raw: Any) -> Any:
        self.made.append(raw)
        if raw == "bad":
            raise LookupError("bad")
        if isinstance(raw, int):
            return {"x": np.full(raw, raw % 251, np.uint8)}
        begun, opened, ended, nbytes = self._gates[raw]
        self._threads.add(threading.current_thread())
        begun.set()
        try:
            assert opened.wait(LONG_S)
            return {"x": np.zeros(nbytes, np.uint8), "name": raw}
        finally:
            ended.set()

    def gate(self, name: str, nbytes: int = 10) -> str:
        """A raw request that waits; it gives an array of so many bytes."""
        self._gates[name] = threading.Event(), threading.Event(), threading.Event(), nbytes
        return name

    def begun(self, name: str) -> bool:
        return self._gates[name][0].wait(LONG_S)

    def ended(self, name: str) -> bool:
        return self._gates[name][2].wait(LONG_S)

    def open(self, *names: str) -> None:
        for name in names:
            self._gates[name][1].set()

    def open_all(self) -> None:
        """And wait for all that were inside."""
        self.open(*self._gates)

    def join_all(self) -> None:
        """Wait for the threads that waited in here: pools whose workers these are must be closed, or have given them up."""
        for thread in self._threads:
            thread.join(LONG_S)
            assert not thread.is_alive()


def outcomes_of(outcomes: list[shmcast.Outcome]) -> dict[Any, Any]:
    """``{rid: what tells the values of `Maker` apart}``; all must be values."""
    found = {}
    for outcome in outcomes:
        value = outcome.result()
        if value is not None:
            array = value["x"]
            value = value.get("name") or (int(array[0]) if array.size else 0)
        found[outcome.rid] = value
    assert len(found) == len(outcomes)
    return found


def all_ready(caster: shmcast.Caster, count: int = 1) -> None:
    """Wait until that many requests have ended on the entry rank and wait for a message."""
    intake = caster._intake
    assert intake is not None
    assert intake._wait(lambda: len(intake._ready) >= count, time.monotonic() + LONG_S)


def free(caster: shmcast.Caster) -> list[shmcast.Outcome]:
    """Step until nothing is pending."""
    outcomes: list[shmcast.Outcome] = []
    while caster.pending:
        outcomes += caster.step(LONG_S)
    return outcomes


def digest_of(value: Any) -> Any:
    """A tree with a digest in place of each array, as a literal."""
    if isinstance(value, np.ndarray):
        return hashlib.sha256(value.tobytes()).hexdigest()
    return {key: digest_of(each) for key, each in value.items()} if isinstance(value, dict) else value


CANCEL_WHEN = [
    "at once",
    "before a step",
    "being materialized",
    "ready",
    "in a message",
    "by another thread",
    "delivered",
]


class Mixed:
    """Sizes, kinds and failures by number, so that any rank knows what each should have become."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.caster: shmcast.Caster | None = None

    def of(self, number: int) -> random.Random:
        return random.Random(self.seed * 1_000_003 + number)

    def fails(self, number: int) -> bool:
        return self.of(number).random() < 0.05

    def cancel_when(self, number: int) -> str:
        """When it is cancelled, if it is."""
        return random.Random(f"{self.seed} {number}").choice([*CANCEL_WHEN, *[""] * (9 * len(CANCEL_WHEN))])

    def expected(self, number: int) -> Any:
        rng = self.of(number)
        rng.random()
        sizes = [0, 10, 5_000, rng.randrange(200_000), rng.randrange(40_000)]
        array = np.frombuffer(rng.randbytes(sizes[rng.randrange(len(sizes))]), np.uint8)
        return [{"x": array, "n": number}, array[: array.size // 2], None, number][rng.choice([0, 0, 0, 1, 2, 3])]

    def __call__(self, raw: int, out: Any) -> Any:
        if self.caster is not None and self.cancel_when(raw) == "being materialized":
            self.caster.cancel(raw)
        if self.fails(raw):
            raise (SystemExit if raw % 2 else ValueError)(f"number {raw}")
        value = self.expected(raw)
        if isinstance(value, dict) and value["x"].size:
            array = out(value["x"].shape, "uint8")
            array[:] = value["x"]
            value["x"] = array
        return value

    def check(self, outcome: shmcast.Outcome) -> str:
        """What has become of it, which must be what may become of it."""
        number = outcome.rid
        if outcome.cancelled:
            assert self.cancel_when(number), number
            return "cancelled"
        if outcome.error is not None:
            assert isinstance(outcome.error, shmcast.MaterializeError), outcome
            assert self.fails(number), number
            assert outcome.error.kind == ("SystemExit" if number % 2 else "ValueError")
            assert outcome.error.text == f"number {number}"
            return "failed"
        assert digest_of(outcome.value) == digest_of(self.expected(number)), number
        return "ok"
