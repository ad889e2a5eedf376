"""What one invocation does: sizes, strategies, rounds; and the presets that set several of these at once."""

from __future__ import annotations

from dataclasses import dataclass, replace

MIB = 1 << 20


@dataclass(frozen=True)
class Stream:
    """Requests that arrive while others are served, instead of batches."""

    rate: float = 0.0  # a second, Poisson; 0: all at once
    concurrency: int = 0  # instead of a rate: the next arrives when one of so many has ended
    mix: tuple[tuple[str, float], ...] = ()  # sizes of requests, and their weights
    distinct: int = 20  # raw requests, from which those that arrive are drawn
    cancel_ratio: float = 0.0  # are cancelled
    cancel_within_ms: float = 1000.0  # after their arrival
    fail_ratio: float = 0.0  # can not be materialized
    switch_every_s: float = 0.0  # shmcast's strategies go on in another mode so often; 0: never


@dataclass(frozen=True)
class Config:
    """One invocation. Everything that a child process must know travels in it, so it is a plain value."""

    tp: int = 4
    workload: str = "images"
    producer: str = "entry"  # who materializes: "entry" or "tokenizer"
    strategies: tuple[str, ...] = ()
    rounds: int = 3
    requests: int = 0  # a run; 0: the workload's own number
    batch: int = 1  # requests that arrive together and are served in one iteration; of a stream: at most so many
    seed: int = 1
    work_ms: float = 500.0  # spin, wait: what one materialization costs
    array_mb: float = 10.0  # spin, wait: what it makes, MiB
    images: str | None = None  # a directory of photographs
    workers: int = 2  # threads that materialize on a rank, where a strategy has such
    executors: tuple[tuple[str, int], ...] = (("thread", 2),)  # and workers, of each strategy that has a `Caster`
    repeat_ratio: float = 0.0  # of the requests have contents that an earlier one had; see `repeats`
    cache_bytes: int = 256 * MIB  # what a strategy that remembers results may keep
    cache_entries: int | None = None
    tick_ms: float = 10.0  # period of the decode tick
    late_ms: float = 1.0  # a tick later than this is late
    quick: bool = False
    timeout_s: float = 120.0  # a batch, and any collective in it
    stream: Stream | None = None  # None: batches
    preset: str | None = None
    token: str = "tpshm"  # in the name of every segment of this run


@dataclass(frozen=True)
class Scenario:
    """One part of an invocation: `requests` requests in batches of `batch`, by each of `strategies`."""

    batch: int
    requests: int
    strategies: tuple[str, ...]

    @property
    def batches(self) -> list[range]:
        """Indexes of the requests of each batch, in order of arrival."""
        step = self.batch
        return [range(i, min(i + step, self.requests)) for i in range(0, self.requests, step)]


# The figures that the origin of this project published for its own attempts, with 4 ranks on at least 4 cores.
ORIGIN_BATCHES = (5, 10, 20, 50)  # besides 1
QUICK_BATCHES = (5, 10)
ORIGIN_BATCHED = ("object", "object-batch", "shm")  # the strategies for which a batch is more than a loop


def origin(config: Config) -> Config:
    """The historical table: ten requests (more where the batch is larger) of 500 ms at TP=4."""
    return replace(config, tp=4, workload="spin", work_ms=500.0, batch=1, requests=10, preset="origin")


def quick(config: Config) -> Config:
    """Under a minute on two cores: few rounds, few requests, little work."""
    rounds = 1 if config.preset else min(config.rounds, 2)
    work_ms = min(config.work_ms, 50.0 if config.preset else 100.0)
    return replace(config, rounds=rounds, requests=config.requests or 3, work_ms=work_ms, quick=True)


def quick_stream(config: Config, stream: Stream) -> Config:
    """The same for a stream."""
    stream = replace(stream, distinct=min(stream.distinct, 6))
    return replace(config, rounds=1, requests=config.requests or 16, quick=True, stream=stream)


PRESETS = {"origin": origin}


def scenarios(config: Config, default_requests: int) -> list[Scenario]:
    """The parts of this invocation, the main one first."""
    requests = config.requests or default_requests
    main = Scenario(config.batch, requests, config.strategies)
    if config.preset != "origin":
        return [main]
    batched = tuple(s for s in config.strategies if s in ORIGIN_BATCHED)
    batches = QUICK_BATCHES if config.quick else ORIGIN_BATCHES
    return [main] + [Scenario(b, max(requests, b), batched) for b in batches if batched]
