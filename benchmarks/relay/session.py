"""The order in which things are measured, and from marks to figures."""

from __future__ import annotations

import random
import secrets
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from parts.figures import p99_us
from relay.plan import Plan, Size, Variant
from relay.world import Served, World

WARM_UP_ROUNDS = 2
OVERHEAD_ROUNDS = 10

Key = tuple[int, str, str]
"""TP, size, variant."""


class Session:
    """All that is measured in one invocation."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.samples: dict[Key, list[Served]] = {}
        self.first: dict[Key, Served] = {}
        self.problems: list[str] = []
        self.overhead: dict[str, float] = {}
        """CPU of a window that is the benchmark's own, ms, by TP and side."""
        self.left_in_shm: list[str] = []
        self.number = 0

    def run(self, say: Callable[[str], object]) -> None:
        """Measure. ChildError where a process fails; what was measured until then stays."""
        for tp in self.plan.tps:
            with self._worlds(tp) as worlds:
                for number in range(WARM_UP_ROUNDS):
                    self._round(worlds, tp, random.Random(self.plan.seed), warm_up=number + 1)
                for installed, world in worlds.items():
                    samples = [world.overhead_cpu_ns() for _ in range(OVERHEAD_ROUNDS)]
                    self.overhead[f"TP={tp} {'shmcast' if installed else 'sglang'}"] = statistics.median(samples) / 1e6
                chance = random.Random(self.plan.seed + tp)
                for number in range(self.plan.rounds):
                    say(f"TP={tp}: round {number + 1} of {self.plan.rounds}")
                    self._round(worlds, tp, chance)
        say("")

    @contextmanager
    def _worlds(self, tp: int) -> Iterator[dict[bool, World]]:
        token = f"bench-{secrets.token_hex(4)}"
        sides = sorted({variant.installed for variant in self.plan.variants})
        with tempfile.TemporaryDirectory() as folder:
            worlds = {installed: World(self.plan, tp, installed, folder, token) for installed in sides}
            try:
                for world in worlds.values():
                    world.start()
                for world in worlds.values():
                    world.wait_until_ready()
                yield worlds
                for world in worlds.values():
                    self.problems += world.stop()
            finally:
                for world in worlds.values():
                    world.kill()
                for world in worlds.values():
                    self.left_in_shm += world.remove_leftovers()

    def _round(self, worlds: dict[bool, World], tp: int, chance: random.Random, warm_up: int = 0) -> None:
        """Every size by every variant, in an order of chance: none always follows the same one."""
        for size in self.plan.sizes:
            for variant in chance.sample(self.plan.variants, len(self.plan.variants)):
                self.number += 1
                served = worlds[variant.installed].request(variant, size, self.number)
                key = tp, size.name, variant.name
                self.problems += [f"TP={tp}, {size.title}, {variant.name}: {problem}" for problem in served.problems]
                if warm_up == 1:
                    self.first[key] = served
                elif not warm_up:
                    self.samples.setdefault(key, []).append(served)

    def results(self) -> list[dict[str, Any]]:
        """A line for each that has samples."""
        lines = []
        for tp in self.plan.tps:
            for size in self.plan.sizes:
                for variant in self.plan.variants:
                    key = tp, size.name, variant.name
                    if self.samples.get(key):
                        lines.append(_line(tp, size, variant, self.samples[key], self.first[key]))
        return lines


def _line(tp: int, size: Size, variant: Variant, samples: list[Served], first: Served) -> dict[str, Any]:
    def median(figure: Callable[[Served], float]) -> float:
        return statistics.median(map(figure, samples)) / 1e6

    def p99(figure: Callable[[Served], float]) -> float:
        return p99_us([figure(sample) / 1e9 for sample in samples]) / 1e3

    return {
        "tp": tp,
        "size": size.name,
        "items": list(size.items),
        "variant": variant.name,
        "samples": len(samples),
        "wrap_ms": {"p50": median(_wrap), "p99": p99(_wrap)},
        "window_ms": {"p50": median(_window), "p99": p99(_window)},
        "total_ms": {"p50": median(_total), "p99": p99(_total)},
        "split_ms": {
            "received": median(lambda one: max(mark.received_ns for mark in one.marks) - one.sent_ns),
            "built": median(lambda one: max(mark.built_ns - mark.received_ns for mark in one.marks)),
            "read": median(lambda one: max(mark.read_ns - mark.built_ns for mark in one.marks)),
            "freed": median(lambda one: max(mark.freed_ns - mark.read_ns for mark in one.marks)),
        },
        "cpu_ms": {
            "wrap": median(lambda one: one.wrap_cpu_ns),
            "window": median(lambda one: one.cpu_ns),
            "read": median(lambda one: one.read_cpu_ns),
            "total": median(lambda one: one.wrap_cpu_ns + one.cpu_ns),
        },
        "polls": statistics.median(len(one.marks[0].polls) - 1 for one in samples),
        "first_ms": {"wrap": first.wrap_ns / 1e6, "window": _window(first) / 1e6, "total": _total(first) / 1e6},
        "windows_ms": [round(_window(sample) / 1e6, 4) for sample in samples],
        "totals_ms": [round(_total(sample) / 1e6, 4) for sample in samples],
    }


def _wrap(served: Served) -> int:
    return served.wrap_ns


def _window(served: Served) -> int:
    return max(mark.freed_ns for mark in served.marks) - served.sent_ns


def _total(served: Served) -> int:
    return served.wrap_ns + _window(served)


def progress(text: str) -> None:
    """On a terminal, in place."""
    if sys.stderr.isatty():
        print(f"\r{text:<60}", end="" if text else "\r", file=sys.stderr, flush=True)
