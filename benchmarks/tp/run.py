"""The command line, and the order in which things happen."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType

from tp import report
from tp.config import PRESETS, Config, quick
from tp.machine import describe, warnings
from tp.session import measure
from tp.strategies import STRATEGIES
from tp.workloads import WORKLOADS


def main(argv: Sequence[str]) -> int:
    """Run it; 0, or 1 if a strategy failed or contents were wrong, or 2 for a wrong command line."""
    options = parser().parse_args(argv)
    config = configure(options)
    if unknown := set(config.strategies) - set(STRATEGIES):
        parser().error(f"--strategies: {', '.join(sorted(unknown))}: not among {', '.join(STRATEGIES)}")
    signal.signal(signal.SIGTERM, _terminate)
    machine = describe()
    for line in [*report.heading(config, machine), *warnings(config, machine), ""]:
        print(line, flush=True)
    try:
        with tempfile.TemporaryDirectory(prefix="tp_shm.") as directory:
            document = {"machine": machine} | measure(config, directory)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print("\n".join(report.tables(document)))
    if options.json:
        Path(options.json).write_text(json.dumps(document, indent=1) + "\n")
    if options.plot:
        report.plot(document, options.plot)
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
    add("--rounds", type=_positive, default=default.rounds, help="each with every strategy (%(default)s)")
    add("--requests", type=_positive, default=0, help="a run (the workload's own number)")
    add("--batch", type=_positive, default=default.batch, help="requests that arrive together (%(default)s)")
    add("--seed", type=int, default=default.seed, help="of the requests and of the order of strategies (%(default)s)")
    add("--work-ms", type=float, default=default.work_ms, help="spin, wait: a materialization (%(default)s)")
    add("--array-mb", type=float, default=default.array_mb, help="spin, wait: its array, MiB (%(default)s)")
    add("--images", metavar="DIR", help="photographs to use instead of scikit-learn's")
    add("--timeout", type=float, default=default.timeout_s, help="of a batch and of a collective, s (%(default)s)")
    add("--preset", choices=PRESETS, help="origin: the table that this project grew from, with its targets")
    add("--quick", action="store_true", help="under 60 s on 2 cores")
    add("--json", metavar="FILE", help="write everything that was measured")
    add("--plot", metavar="FILE.svg|png", help="draw it")
    return result


def configure(options: argparse.Namespace) -> Config:
    """The configuration that the command line asks for."""
    config = Config(
        tp=options.tp,
        workload=options.workload,
        producer=options.producer,
        strategies=tuple(name for name in options.strategies.split(",") if name) or tuple(STRATEGIES),
        rounds=options.rounds,
        requests=options.requests,
        batch=options.batch,
        seed=options.seed,
        work_ms=options.work_ms,
        array_mb=options.array_mb,
        images=options.images,
        timeout_s=options.timeout,
        token=f"tpshm{os.getpid()}",
    )
    if options.preset:
        config = replace(PRESETS[options.preset](config), preset=options.preset)
    return quick(config) if options.quick else config


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def _terminate(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt  # unwinds through the same clean-up
