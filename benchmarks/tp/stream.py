"""The order in which streams are measured: raw requests, processes, then every strategy in each round.

In a round every strategy is set up, warmed up with a few requests, given the same stream as the others, verified, and
torn down again, so that none keeps memory or threads while another one is measured.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from tp.arrivals import Request, plan, sources
from tp.config import Config, Stream
from tp.inputs import Cost, prepare
from tp.machine import bounds
from tp.repeats import ENTRY_BYTES, Lru, Simulated
from tp.session import check_memory, progress
from tp.strategies import spec_of
from tp.stream_measure import StreamCollected, account
from tp.workloads import make_workload
from tp.world import ChildError, MemoryPeak, World

SLOTS = 4  # requests that a rank has room to read into: the last ones are compared whole
WARM_UP = 4
SAMPLE_S = 0.2  # between two looks at memory; rare, as they are taken while times are
SLOWEST = 5  # times what replicate would take, before a run is given up


def measure(config: Config, stream: Stream, directory: str) -> dict[str, Any]:
    """All of the JSON report but the machine. `directory` is empty and goes away afterwards."""
    sizes = sources(stream)
    workload = make_workload(config)
    with progress(len(sizes), "request") as bar:
        bar.set_description("make requests")
        inputs, costs = prepare(workload, workload.make_sized(sizes), [], SLOTS, directory, bar.update)
    check_memory(config.tp * inputs.slot_bytes * (SLOTS + config.batch))
    plans = [plan(stream, sizes, config.requests, [config.seed, n], config.repeat_ratio) for n in range(config.rounds)]
    work = [costs[request.source] for request in plans[0] if not request.fails]
    limits = bounds(config, work)
    world = World(config, directory)
    collected = [StreamCollected(name) for name in config.strategies]
    try:
        with progress(config.rounds * len(collected), "run") as bar:
            bar.set_description("start processes")
            world.start()
            _Session(config, world, bar, plans, inputs.prints, costs).run(collected)
        world.stop()
        left = world.remove_leftovers()
    finally:
        world.kill()
    keys = [[request.content for request in requests] for requests in plans]
    described = {name: value for name, value in asdict(config).items() if name != "token"}
    return {
        "config": described | {"sizes": sizes, "request_bytes": [cost.nbytes for cost in costs], "keys": keys},
        "bounds": limits,
        "results": [c.result() for c in collected],
        "left_in_shm": left,
    }


class _Session:
    """All rounds. A strategy that fails is left out from then on, and says why."""

    def __init__(
        self,
        config: Config,
        world: World,
        bar: tqdm[Any],
        plans: Sequence[Sequence[Request]],
        prints: Sequence[int],
        costs: Sequence[Cost],
    ) -> None:
        self.config, self.world, self.bar = config, world, bar
        self.plans, self.prints, self.costs = plans, prints, costs
        largest = sorted(range(len(costs)), key=lambda i: -costs[i].nbytes)
        self.warm_up = [Request(source, 0, content=-1 - n) for n, source in enumerate((largest * WARM_UP)[:WARM_UP])]

    def run(self, all_collected: Sequence[StreamCollected]) -> None:
        """Strategies in another order in each round."""
        order = random.Random(self.config.seed)
        for requests in self.plans:
            for collected in order.sample(all_collected, len(all_collected)):
                if collected.error is None:
                    self.bar.set_description(f"stream of {len(requests)}, {collected.strategy}", refresh=False)
                    self._guarded(collected, requests)
                self.bar.update()

    def _guarded(self, collected: StreamCollected, requests: Sequence[Request]) -> None:
        try:
            self._run(collected, requests)
        except ChildError as error:
            collected.error = str(error)
            tqdm.write(f"{collected.strategy}: {error}")
            self.bar.set_description("restart processes")
            self.world.kill()
            self.world.start()

    def _run(self, collected: StreamCollected, requests: Sequence[Request]) -> None:
        world, name = self.world, collected.strategy
        world.command("trim")
        before = world.memory()
        world.command("setup", name)
        warm = world.serve_stream(name, self.warm_up, self._timeout_s(self.warm_up))
        collected.problems += account(self.warm_up, warm, self.prints, self.config.late_ms).problems + self._verify()
        with MemoryPeak(world, SAMPLE_S) as watched:
            served = world.serve_stream(name, requests, self._timeout_s(requests))
        run = account(requests, served, self.prints, self.config.late_ms)
        if spec_of(name).cached and not (self.config.stream and self.config.stream.switch_every_s):
            run.simulated = self._simulated(requests)  # some modes do without the cache
        collected.runs.append(run)
        collected.problems += self._verify()
        world.command("teardown", name)
        collected.peak_shared = max(collected.peak_shared, watched.peak.shared - before.shared)
        collected.peak_private = max(collected.peak_private, watched.peak.private - before.private)

    def _simulated(self, requests: Sequence[Request]) -> Simulated:
        """What an exact cache would count. What fails is never stored; what is cancelled may or may not be."""
        model = Lru[int](self.config.cache_bytes, self.config.cache_entries)
        for stream in (self.warm_up, requests):
            before = model.done
            for request in stream:
                if not request.fails:
                    model.see(request.content, self.costs[request.source].nbytes + ENTRY_BYTES)
        return model.done - before

    def _verify(self) -> list[str]:
        return [problem for found in self.world.command("verify") for problem in found]

    def _timeout_s(self, requests: Sequence[Request]) -> float:
        arrival_s = max((request.arrival_ns or 0) for request in requests) / 1e9
        return arrival_s + SLOWEST * self.config.tp * sum(self.costs[request.source].cpu_s for request in requests)
