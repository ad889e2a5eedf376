"""shmcast's `Caster` with what the command line says of it: executor, workers, cache, modes. And a strategy for batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch.distributed as dist

import shmcast
from tp.config import MIB
from tp.jobs import Job, Work
from tp.rank import Rank, now_ns
from tp.shm import Shm

MIN_ARENA_BYTES = 256 * MIB
ARENA_REQUESTS = 16  # of the largest: room for what is in the making, and for what some rank has not freed yet
COUNTED = (
    "cache_hits",
    "cache_joined",
    "cache_misses",
    "cache_evicted",
    "cache_reused",
    "mode_shm",
    "mode_object",
    "mode_raw",
    "mode_replicate",
    "workers_lost",
)


def make_group(rank: Rank, channel: Literal["auto", "group"] = "auto", cached: bool = False) -> shmcast.Group:
    """A group with an arena for what is under way, and for what a cache keeps."""
    config, inputs = rank.config, rank.inputs
    batch_bytes = ARENA_REQUESTS * inputs.slot_bytes if config.stream else 4 * inputs.slots * inputs.slot_bytes
    max_bytes = max(MIN_ARENA_BYTES, batch_bytes) + (2 * config.cache_bytes if cached else 0)
    return shmcast.Group(dist.group.WORLD, entry=0, max_bytes=max_bytes, channel=channel)


def make_caster(rank: Rank, group: shmcast.Group, cached: bool = False) -> shmcast.Caster:
    """As the command line says."""
    config = rank.config
    more: dict[str, Any] = {}
    if cached:
        more |= {"cache_bytes": config.cache_bytes, "cache_entries": config.cache_entries}
    if config.stream is not None and config.stream.switch_every_s:
        more |= {"raw_everywhere": True}
    executor: Any = rank.executor
    return shmcast.Caster(group, Work(config), executor=executor, workers=rank.workers, hash=False, **more)


def counters(caster: shmcast.Caster) -> dict[str, int]:
    """What the report shall have of it, as far as it counts that."""
    found = shmcast.metrics.snapshot(caster)["counters"]
    return {name: found[name] for name in COUNTED if name in found}


class ShmCast(Shm):
    """`Caster.cast`, once a batch.

    What materializing took is known from the metrics alone: evenly of each request, over as many workers as there are."""

    cached: ClassVar[bool] = False

    def setup(self) -> None:
        self.group = make_group(self.rank, cached=self.cached)
        self.caster = make_caster(self.rank, self.group, self.cached)
        self._passes, self._workers = 0, self.rank.workers

    def serve(self, batch: Sequence[int]) -> None:
        rank = self.rank
        self._passes += batch[0] == 0  # what another pass over the requests has is no repeat
        jobs: list[Job | None] = [(self._passes, False, rank.raw(i)) if rank.is_entry else None for i in batch]
        group_before, metrics_before, began_ns = self.group.stats(), self._materialize_ns(), now_ns()
        outcomes = self.caster.cast(list(zip(batch, jobs, strict=True)))
        rank.received(*batch)
        rank.usable(*batch)
        if rank.is_entry:
            spent_ns = self._materialize_ns() - metrics_before
            for record in map(rank.records.__getitem__, batch):
                record.materialize_ns = spent_ns // len(batch)
                record.sent_ns = record.message_ns = began_ns + spent_ns // min(self._workers, len(batch))
                record.shared_by = len(batch)
        self._count(batch, group_before, self.group.stats())
        values = [(outcome.rid, outcome.result()) for outcome in outcomes]
        del outcomes
        for i, features in values:
            rank.consume(i, features)

    def counters(self) -> dict[str, int]:
        return counters(self.caster) if self.rank.is_entry else {}

    def teardown(self) -> None:
        self.caster.close()
        self.group.close()

    def _materialize_ns(self) -> int:
        if not self.rank.is_entry:
            return 0
        spent_ns: int = shmcast.metrics.snapshot(self.caster)["histograms"]["materialize_ns"]["sum_ns"]
        return spent_ns


class Cache(ShmCast):
    """The same, with a cache of results by content of the raw request."""

    cached = True
