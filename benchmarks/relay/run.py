"""The command line of `sglang.py`."""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import sys
from importlib import metadata
from multiprocessing import resource_tracker
from typing import Any

from relay import report
from relay.plan import SIZES, TPS, VARIANTS, Plan, size_of
from relay.session import Session, progress
from tp import machine
from tp.world import ChildError

ENGINE = "sglang"


def main(arguments: list[str]) -> int:
    """Measure and report; exit code 1 where contents were wrong or a process failed, 2 where it can not be run."""
    plan, options = _parse(arguments)
    why = _why_not()
    if why:
        print(why, file=sys.stderr)
        return 2
    try:
        _prepare()
        document = _measure(plan)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        gc.unfreeze()  # or libraries complain at the end of what nobody could collect
    print("\n".join(report.tables(document)))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(document, file, indent=1)
    if options.plot and document["results"]:
        report.plot(document, options.plot)
    return 1 if document["problems"] else 0


def _measure(plan: Plan) -> dict[str, Any]:
    document: dict[str, Any] = {"machine": machine.describe(), "config": _config(plan)}
    document["machine"]["versions"][ENGINE] = metadata.version(ENGINE)
    print("\n".join(report.heading(document)), flush=True)
    session = Session(plan)
    try:
        session.run(progress)
    except ChildError as error:
        session.problems.append(str(error))
    document |= {
        "results": session.results(),
        "problems": session.problems,
        "overhead_cpu_ms": session.overhead,
        "left_in_shm": session.left_in_shm,
    }
    return document


def _parse(arguments: list[str]) -> tuple[Plan, argparse.Namespace]:
    what = sys.modules["__main__"].__doc__
    parser = argparse.ArgumentParser(description=what, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured")
    parser.add_argument("--plot", metavar="FILE", help="write a plot; the suffix decides the format")
    parser.add_argument("--rounds", type=int, help="requests of each kind (40)")
    parser.add_argument("--quick", action="store_true", help="fewer rounds (8): under two minutes")
    parser.add_argument("--sizes", default=",".join(SIZES), metavar="MIB,...", help=f"({','.join(SIZES)}), float32")
    parser.add_argument("--tp", default=",".join(map(str, TPS)), metavar="N,...", help="how many ranks (2,4)")
    parser.add_argument("--variants", default=",".join(VARIANTS), metavar="NAME,...", help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--seed", type=int, default=1, help="of contents and order (1)")
    options = parser.parse_args(arguments)
    names = options.variants.split(",")
    if not set(names) <= set(VARIANTS):
        parser.error(f"--variants: {options.variants}: there are {', '.join(VARIANTS)}")
    rounds = options.rounds or (8 if options.quick else 40)
    try:
        sizes = tuple([size_of(name) for name in options.sizes.split(",")])
        tps = tuple([int(tp) for tp in options.tp.split(",")])
    except ValueError as error:
        parser.error(str(error))
    if min(tps) < 2 or rounds < 1:
        parser.error("at least two ranks and one round are needed")
    return Plan(tps, sizes, tuple([VARIANTS[name] for name in names]), rounds, options.seed), options


def _config(plan: Plan) -> dict[str, Any]:
    return {
        "tps": list(plan.tps),
        "sizes": [size.name for size in plan.sizes],
        "variants": [variant.name for variant in plan.variants],
        "rounds": plan.rounds,
        "seed": plan.seed,
    }


def _why_not() -> str:
    from shmcast.integrations.sglang import KNOWN

    try:
        found = metadata.version(ENGINE)
    except metadata.PackageNotFoundError:
        return f"needs SGLang {' or '.join(KNOWN)}, which is not installed here: make bench-sglang"
    return "" if found in KNOWN else f"needs SGLang {' or '.join(KNOWN)}, this is {found}"


def _prepare() -> None:
    """This process becomes what all others are forked from: SGLang is imported, and there is one thread."""
    os.environ |= {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")}
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    for name in ("SGLANG_MM_SKIP_COMPUTE_HASH", "SHMCAST_SGLANG", "SHMCAST_SGLANG_HASH"):
        os.environ.pop(name, None)
    signal.signal(signal.SIGTERM, _interrupted)
    from relay import engine

    engine.load()
    resource_tracker.ensure_running()  # one for all, as under SGLang
    gc.collect()
    gc.freeze()


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt
