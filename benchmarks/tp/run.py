"""The command line, and the order in which things happen."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType

from shmcast.sizes import parse_bytes
from tp import counted_report, report, stream, stream_report
from tp.config import PRESETS, Config, Stream, quick, quick_stream
from tp.machine import describe, warnings
from tp.session import measure
from tp.strategies import BATCHED, STRATEGIES, STREAMED, SWITCHED, TOKENIZED, with_executors
from tp.workloads import WORKLOADS

STREAM_ROUNDS = 2
STREAM_REQUESTS = 200  # from so many latencies on there is a 99th percentile
STREAM_BATCH = 8  # as much as a synchronous strategy serves in one iteration
STREAM_MIX = (("small", 5.0), ("medium", 3.0), ("large", 2.0))
STREAM_HELP = """With --rate or --concurrency requests arrive while others are served, and every rank runs the loop of an
engine: one iteration each decode tick. All strategies take part, the asynchronous ones in this way alone. Where two
defaults are given above, the second is that of streams."""
EXECUTORS = ("thread", "process", "inline")
EXECUTOR_HELP = """where those with a Caster materialize: thread, process or inline, with N workers (%(default)s); where more than
one are given, with each of them. `shm`, `shm-zmq`: always in the rank's own thread"""
SWITCH_HELP = "s: shmcast's strategies go on in the next of all modes so often (0: never)"


def main(argv: Sequence[str]) -> int:
    """Run it; 0, or 1 if a strategy failed or contents were wrong, or 2 for a wrong command line."""
    options = parser().parse_args(argv)
    _check(options)
    config = configure(options)
    signal.signal(signal.SIGTERM, _terminate)
    machine = describe()
    heading = report.heading(config, machine)
    if config.stream is not None:
        heading.append(stream_report.describe(config, config.stream))
    for line in [*heading, *warnings(config, machine), ""]:
        print(line, flush=True)
    try:
        with tempfile.TemporaryDirectory(prefix="tp_shm.") as directory:
            if config.stream is None:
                measured = measure(config, directory)
            else:
                measured = stream.measure(config, config.stream, directory)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    document = {"machine": machine, "repeats": counted_report.described_keys(measured["config"])} | measured
    shown = report if config.stream is None else stream_report
    print("\n".join(shown.tables(document)))
    if options.json:
        Path(options.json).write_text(json.dumps(document, indent=1) + "\n")
    if options.plot:
        shown.plot(document, options.plot)
    good = not document["left_in_shm"] and all(result["verified"] for result in document["results"])
    return 0 if good else 1


def parser() -> argparse.ArgumentParser:
    """The command line."""
    default = Config()
    strategies = "\n".join(f"  {s.name:14}{s.summary}" for s in STRATEGIES.values())
    workloads = "\n".join(f"  {w.name:14}{w.summary}" for w in WORKLOADS.values())
    result = argparse.ArgumentParser(
        prog="tp_shm.py",
        description="One request's arrays on every tensor-parallel rank, by every strategy, side by side.",
        epilog=f"workloads:\n{workloads}\n\nstrategies:\n{strategies}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("--tp", type=_positive, default=default.tp, help="ranks (%(default)s)")
    add("--workload", choices=WORKLOADS, default=default.workload, help="(%(default)s)")
    add("--producer", choices=("entry", "tokenizer"), default=default.producer, help="who materializes (%(default)s)")
    add("--strategies", default="", metavar="A,B", help="some of those below (all)")
    add("--rounds", type=_positive, default=0, help=f"each with every strategy ({default.rounds}; {STREAM_ROUNDS})")
    add("--requests", type=_positive, default=0, help=f"a run (the workload's own number; {STREAM_REQUESTS})")
    add("--batch", type=_positive, default=0, help=f"requests that arrive together ({default.batch})")
    add("--seed", type=int, default=default.seed, help="of the requests and of the order of strategies (%(default)s)")
    add("--work-ms", type=float, default=default.work_ms, help="spin, wait: a materialization (%(default)s)")
    add("--array-mb", type=float, default=default.array_mb, help="spin, wait: its array, MiB (%(default)s)")
    add("--images", metavar="DIR", help="photographs to use instead of scikit-learn's")
    add("--workers", type=_positive, default=default.workers, help="that materialize on a rank, of those (%(default)s)")
    add("--executor", default="thread", metavar="E[:N],..", help=EXECUTOR_HELP)
    add("--repeat-ratio", type=_ratio, default=0.0, metavar="R", help="so many of all repeat an earlier one (0)")
    add("--cache-bytes", type=_bytes, default=default.cache_bytes, metavar="N", help="budget of `cache` (256MiB)")
    add("--cache-entries", type=_positive, metavar="N", help="and at most so many results (no limit)")
    add("--timeout", type=float, default=default.timeout_s, help="of a batch and of a collective, s (%(default)s)")
    add("--preset", choices=PRESETS, help="origin: the table that this project grew from, with its targets")
    add("--tick-ms", type=float, default=default.tick_ms, help="period of the decode tick (%(default)s)")
    add(
        "--late-ms",
        type=float,
        default=None,
        help=f"a tick that begins later is late ({default.late_ms}; half a period)",
    )
    add("--quick", action="store_true", help="under 60 s on 2 cores")
    add("--json", metavar="FILE", help="write everything that was measured")
    add("--plot", metavar="FILE.svg|png", help="draw it")
    _add_stream(result.add_argument_group("stream", STREAM_HELP).add_argument)
    return result


def _add_stream(add: Callable[..., object]) -> None:
    default = Stream()
    add("--rate", type=_not_negative, metavar="R", help="a second, Poisson; 0: all at once")
    add("--concurrency", type=_positive, metavar="N", help="instead: the next arrives when one of N has ended")
    add("--mix", type=_mix, metavar="S:W,...", help="sizes (small, medium, large; images only) and weights (5:3:2)")
    add("--distinct", type=_positive, default=default.distinct, help="raw requests to draw from (%(default)s)")
    add("--cancel-ratio", type=_ratio, default=0.0, metavar="Q", help="so many of all are cancelled")
    add("--cancel-within-ms", type=float, default=default.cancel_within_ms, help="of their arrival (%(default)s)")
    add("--fail-ratio", type=_ratio, default=0.0, metavar="Q", help="so many of all can not be materialized")
    add("--switch-every", type=_not_negative, default=0.0, metavar="S", help=SWITCH_HELP)


def _check(options: argparse.Namespace) -> None:
    """What argparse does not see."""
    error = parser().error
    names = _names(options)
    if unknown := set(names) - set(STRATEGIES):
        error(f"--strategies: {', '.join(sorted(unknown))}: not among {', '.join(STRATEGIES)}")
    sizes = WORKLOADS[options.workload].sizes
    if options.mix and (unknown := {size for size, _ in options.mix} - set(sizes)):
        error(f"--mix: {', '.join(sorted(unknown))}: {options.workload} has {', '.join(sizes)}")
    if options.rate is not None and options.concurrency:
        error("--rate, --concurrency: one of them")
    if (is_stream := _is_stream(options)) and (unknown := set(names) - set(STREAMED)):
        error(f"--strategies: {', '.join(sorted(unknown))}: for batches only")
    if options.producer == "tokenizer" and (unknown := set(names) - set(TOKENIZED)):
        error(f"--producer tokenizer: {', '.join(sorted(unknown))}: for --producer entry only")
    if options.switch_every and (not is_stream or set(names) - set(SWITCHED)):
        error(f"--switch-every: for streams, by {', '.join(SWITCHED)}")
    try:
        if unknown := {name for name, _ in _executors(options)} - set(EXECUTORS):
            error(f"--executor: {', '.join(sorted(unknown))}: not among {', '.join(EXECUTORS)}")
    except (ValueError, argparse.ArgumentTypeError) as problem:
        error(f"--executor {options.executor}: {problem}")
    if options.repeat_ratio and options.preset:
        error(f"--repeat-ratio: --preset {options.preset} has parts of different sizes")
    if is_stream and options.preset:
        error(f"--preset {options.preset}: is made of batches")
    if is_stream and options.producer != "entry":
        error("--producer tokenizer: for batches only")


def _names(options: argparse.Namespace) -> tuple[str, ...]:
    return tuple(name for name in options.strategies.split(",") if name)


def _executors(options: argparse.Namespace) -> tuple[tuple[str, int], ...]:
    """Each with its workers; ValueError."""
    parts = [part.partition(":") for part in options.executor.split(",")]
    counts = [
        _positive(workers) if workers else 1 if name == "inline" else options.workers for name, _, workers in parts
    ]
    return tuple((name, count) for (name, _, _), count in zip(parts, counts, strict=True))


def _expanded(options: argparse.Namespace, usual: Sequence[str]) -> tuple[str, ...]:
    """The strategies to run, each with a `Caster` by each of its executors."""
    executors = _executors(options)
    return tuple(each for name in _names(options) or usual for each in with_executors(name, executors))


def _is_stream(options: argparse.Namespace) -> bool:
    """Whether a stream is asked for, or a strategy that serves nothing else."""
    return bool(options.rate is not None or options.concurrency or set(_names(options)) - set(BATCHED))


def configure(options: argparse.Namespace) -> Config:
    """The configuration that the command line asks for."""
    default = Config()
    config = Config(
        tp=options.tp,
        workload=options.workload,
        producer=options.producer,
        strategies=_expanded(options, TOKENIZED if options.producer == "tokenizer" else BATCHED),
        rounds=options.rounds or default.rounds,
        requests=options.requests,
        batch=options.batch or default.batch,
        seed=options.seed,
        work_ms=options.work_ms,
        array_mb=options.array_mb,
        images=options.images,
        workers=options.workers,
        executors=_executors(options),
        repeat_ratio=options.repeat_ratio,
        cache_bytes=options.cache_bytes,
        cache_entries=options.cache_entries,
        tick_ms=options.tick_ms,
        late_ms=default.late_ms if options.late_ms is None else options.late_ms,
        timeout_s=options.timeout,
        token=f"tpshm{os.getpid()}",
    )
    if _is_stream(options):
        return _configure_stream(config, options)
    if options.preset:
        config = replace(PRESETS[options.preset](config), preset=options.preset)
    return quick(config) if options.quick else config


def _configure_stream(config: Config, options: argparse.Namespace) -> Config:
    sizes = WORKLOADS[options.workload].sizes
    stream = Stream(
        rate=options.rate or 0.0,
        concurrency=options.concurrency or 0,
        mix=options.mix or tuple((size, weight) for size, weight in STREAM_MIX if size in sizes),
        distinct=options.distinct,
        cancel_ratio=options.cancel_ratio,
        cancel_within_ms=options.cancel_within_ms,
        fail_ratio=options.fail_ratio,
        switch_every_s=options.switch_every,
    )
    config = replace(
        config,
        strategies=_expanded(options, SWITCHED if options.switch_every else STREAMED),
        rounds=options.rounds or STREAM_ROUNDS,
        requests=options.requests or (0 if options.quick else STREAM_REQUESTS),
        batch=options.batch or STREAM_BATCH,
        late_ms=config.tick_ms / 2 if options.late_ms is None else options.late_ms,
        stream=stream,
    )
    return quick_stream(config, stream) if options.quick else config


def _mix(text: str) -> tuple[tuple[str, float], ...]:
    pairs = [part.partition(":") for part in text.split(",")]
    mix = tuple((size, float(weight or 1)) for size, _, weight in pairs)
    if not all(weight > 0 for _, weight in mix):
        raise argparse.ArgumentTypeError(f"{text}: weights are positive")
    return mix


def _ratio(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and 1")
    return value


def _not_negative(text: str) -> float:
    value = float(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


def _bytes(text: str) -> int:
    try:
        return parse_bytes(text, "--cache-bytes")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def _terminate(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt  # unwinds through the same clean-up
