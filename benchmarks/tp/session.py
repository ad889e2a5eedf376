"""The order in which things are measured: inputs, processes, a first round, then the rounds that count."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from tp.config import Config, Scenario, scenarios
from tp.inputs import prepare
from tp.machine import available_bytes, bounds
from tp.measure import Collected, Run
from tp.repeats import ENTRY_BYTES, Lru, key_sequence
from tp.strategies import spec_of
from tp.workloads import make_workload
from tp.world import ChildError, MemoryPeak, World

WATCHED_BATCHES = 2  # of the first round, after the cold one: memory is sampled, times are not taken


def measure(config: Config, directory: str) -> dict[str, Any]:
    """All of the JSON report but the machine. `directory` is empty and goes away afterwards."""
    workload = make_workload(config)
    parts = scenarios(config, workload.requests)
    count, slots = max(p.requests for p in parts), max(min(p.batch, p.requests) for p in parts)
    keys = key_sequence(count, config.repeat_ratio, config.seed)
    with progress(max(keys) + 1, "request") as bar:
        bar.set_description("make requests")
        raws = workload.make(max(keys) + 1)
        inputs, costs = prepare(workload, raws, keys, slots, directory, bar.update)
    check_memory(config.tp * inputs.slot_bytes * slots)
    limits = bounds(config, [costs[key] for key in keys[: parts[0].requests]])
    world, collected = World(config, directory), list[Collected]()
    try:
        with progress(sum(_batches(p, config.rounds) for p in parts), "batch") as bar:
            bar.set_description("start processes")
            world.start()
            for part in parts:
                keyed_bytes = [(key, costs[key].nbytes) for key in keys[: part.requests]]
                collected += _Part(config, part, world, bar, keyed_bytes).run()
        world.stop()
        left = world.remove_leftovers()
    finally:
        world.kill()
    sizes = [costs[key].nbytes for key in keys]
    described = {name: value for name, value in asdict(config).items() if name != "token"}
    return {
        "config": described | {"scenarios": [asdict(p) for p in parts], "request_bytes": sizes, "keys": keys},
        "bounds": limits,
        "results": [c.result() for c in collected],
        "left_in_shm": left,
    }


class _Part:
    """One scenario. A strategy that fails is left out from then on, and says why."""

    def __init__(
        self, config: Config, part: Scenario, world: World, bar: tqdm[Any], keyed_bytes: list[tuple[int, int]]
    ) -> None:
        """`keyed_bytes`: content of each request, and bytes of its arrays."""
        self.config, self.part, self.world, self.bar, self.keyed_bytes = config, part, world, bar, keyed_bytes
        self.all = [Collected(s, part.batch, part.requests, spec_of(s).once) for s in part.strategies]
        for collected in self.all:
            self._model(collected)

    def run(self) -> list[Collected]:
        """A first round that warms up, then the rounds that count, strategies in another order in each."""
        for collected in self.all:
            self._guarded(collected, self._first_round, "first round")
        order = random.Random(self.config.seed)
        for number in range(self.config.rounds):
            for collected in order.sample(self.all, len(self.all)):
                self._guarded(collected, self._round, f"round {number + 1}")
        for collected in self._alive():
            self.world.command("teardown", collected.strategy)
        return self.all

    def _first_round(self, collected: Collected) -> None:
        """Set up; the cold request; then the peak of memory over what there was before the set-up."""
        self.world.command("trim")
        before = self.world.memory()
        self.world.command("setup", collected.strategy)
        batches = self.part.batches
        cold = Run()
        self._serve(collected, batches[0], cold)
        collected.cold_ms = max(times.latency for times in cold.times)
        with MemoryPeak(self.world) as watched:
            for batch in (batches[1:] or batches)[:WATCHED_BATCHES]:
                self._serve(collected, batch, None)
        collected.peak_shared = max(0, watched.peak.shared - before.shared)
        collected.peak_private = max(0, watched.peak.private - before.private)

    def _round(self, collected: Collected) -> None:
        """One batch to warm up again after the other strategies, then all batches."""
        self._serve(collected, self.part.batches[0], None)
        run = Run()
        for batch in self.part.batches:
            self._serve(collected, batch, run)
        collected.runs.append(run)

    def _serve(self, collected: Collected, batch: range, run: Run | None) -> None:
        served = self.world.serve(collected.strategy, batch)
        simulated = None
        if collected.model is not None:
            before = collected.model.done
            collected.passes += batch[0] == 0
            for index in batch:
                key, nbytes = self.keyed_bytes[index]
                collected.model.see((collected.passes, key), nbytes + ENTRY_BYTES)
            simulated = collected.model.done - before
        if run is not None:
            run.add(served, collected.once, simulated)
        collected.problems += [problem for found in self.world.command("verify") for problem in found]
        self.bar.update()

    def _guarded(self, collected: Collected, step: Callable[[Collected], None], what: str) -> None:
        if collected.error is not None:
            return
        self.bar.set_description(f"batches of {self.part.batch}, {what}, {collected.strategy}", refresh=False)
        try:
            step(collected)
        except ChildError as error:
            collected.error = str(error)
            tqdm.write(f"{collected.strategy}: {error}")
            self._restart()

    def _restart(self) -> None:
        """The processes are out of step: new ones, and the strategies that had been set up."""
        self.bar.set_description("restart processes")
        self.world.kill()
        self.world.start()
        for collected in self._alive():
            if collected.cold_ms is not None:
                self._model(collected)
                self.world.command("setup", collected.strategy)

    def _model(self, collected: Collected) -> None:
        """An empty cache's model, for a strategy that has one."""
        if spec_of(collected.strategy).cached:
            collected.model, collected.passes = Lru(self.config.cache_bytes, self.config.cache_entries), 0

    def _alive(self) -> list[Collected]:
        return [c for c in self.all if c.error is None]


def progress(total: int, unit: str) -> tqdm[Any]:
    """A bar for a person; a line now and then for a log."""
    return tqdm(total=total, unit=unit, leave=False, mininterval=0.2 if sys.stderr.isatty() else 10.0)


def _batches(part: Scenario, rounds: int) -> int:
    watched = min(WATCHED_BATCHES, max(1, len(part.batches) - 1))
    return len(part.strategies) * (1 + watched + rounds * (1 + len(part.batches)))


def check_memory(buffers: int) -> None:
    """Refuse what would drive the machine into swapping: private buffers, and as much again for transport."""
    available = available_bytes()
    if 2 * buffers > available:
        raise SystemExit(
            f"allocate read buffers: {buffers >> 20} MiB over all ranks, and as much for transport, "
            f"of {available >> 20} MiB available; take a smaller --batch, --array-mb or --tp"
        )
