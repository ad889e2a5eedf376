"""Random kills under load, with everything checked all the time.

    .venv/bin/python tests/soak.py --seconds 60 --seed 1        # the seed repeats what is decided, not when it happens

Owners, readers, sweepers and groups of ranks are forked, told what to do, killed at random steps and moments, and paused;
their parent knows what each should see (tests/soaking). Prints violations as they are found, at the end at which steps the
victims died, and last a summary. Exit status: 0: no violation; 1: some; 2: wrong arguments; 130: interrupted before the
time was up. Nothing is left in /dev/shm.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import sys
import textwrap
import time

import variant

SHARE = 0.5
"""Of the victims that have to hold something, or to be inside a call, when they die."""
FEW = 40
"""Kills below which nothing is said of shares."""
INTERRUPTED = 130
WARM_S, LEAST_A_SECOND = 10.0, 0.5
"""A run of that long that kills less often than that has shown nothing."""


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long (60)")
    parser.add_argument("--seed", type=int, default=None, help="of the parent's decisions; default: a random one")
    parser.add_argument("--owners", type=int, default=4, help="at any time (4)")
    parser.add_argument("--readers", type=int, default=7, help="at any time (7)")
    parser.add_argument("--sweepers", type=int, default=2, help="at any time (2)")
    parser.add_argument("--groups", type=int, default=2, help="of three ranks each (2)")
    parser.add_argument("--rate", type=float, default=24.0, help="kills and pauses a second (24)")
    parser.add_argument("--json", metavar="PATH", help="figures and the histogram of steps")
    options = parser.parse_args()
    if options.owners < 1 or options.readers < 2:
        parser.error("at least one owner and two readers")
    if options.seconds <= 0 or options.rate <= 0:
        parser.error("--seconds and --rate are more than 0")
    if options.seed is None:
        options.seed = secrets.randbits(31)
    return options


def with_steps() -> None:
    """Go on as a Python whose shmcast has numbered steps (native/steps.h). Built first, where it is not."""
    environment = variant.build("faults", "-DSHMCAST_FAULTS=ON")
    if any(os.environ.get(name) != value for name, value in environment.items()):
        os.environ.update(environment)
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # no threads where we fork
        os.execv(sys.executable, [sys.executable, *sys.argv])


def histogram(steps: dict[str, int]) -> str:
    """At which steps victims died, for people."""
    text = ", ".join(f"{name} {count}" for name, count in sorted(steps.items(), key=lambda item: (-item[1], item[0])))
    return textwrap.fill(f"died at: {text}", 120, subsequent_indent="  ")


def clean(namespace: str) -> None:
    """Take away whatever the run has left; on a good day the arenas of those that lived to its end."""
    for name in os.listdir("/dev/shm"):
        if name.startswith(f"shmcast.{namespace}."):
            os.unlink(f"/dev/shm/{name}")


def main() -> int:
    options = arguments()
    with_steps()
    from soaking.conductor import Conductor, Size

    namespace = f"soak{os.getpid()}x{secrets.token_hex(4)}"
    os.environ["SHMCAST_NAMESPACE"] = namespace  # of groups, which make arenas of their own
    size = Size(options.owners, options.readers, options.sweepers, options.groups, options.rate)
    run = Conductor(options.seed, size, namespace)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, run.interrupt)
    began = time.monotonic()
    done = False
    try:
        run.run(options.seconds)
        done = not run.interrupted
    except Exception as error:
        run.complain(f"the run itself: {type(error).__name__}: {error}")
        raise
    finally:
        clean(namespace)
    seconds = time.monotonic() - began
    if done and seconds > WARM_S and run.deaths.kills < LEAST_A_SECOND * seconds:
        run.complain(f"{run.deaths.kills} kills in {seconds:.0f} s are too few to say anything")
    outcome = report(run, options, seconds)
    return outcome if done or outcome else INTERRUPTED


def report(run: object, options: argparse.Namespace, seconds: float) -> int:
    """Print what was done and found; the exit status."""
    deaths, work, groups = run.deaths, run.work, run.groups
    if deaths.kills >= FEW and deaths.either < SHARE * deaths.kills:
        run.complain(f"{deaths.either} of {deaths.kills} died holding something or inside a call: too few to say much")
    print(histogram(deaths.steps))
    print(
        f"{len(deaths.steps)} steps, {deaths.either} of {deaths.kills} holding or inside, {run.pauses} pauses, "
        f"{run.quiets} looks, {run.drains} of them with everything free; {work.passed_on} passed on, {work.stale} stale, "
        f"{work.full} full; groups: {groups.steps} steps, {groups.closed} closed, {groups.broken} broken, "
        f"{groups.timeouts} ranks late for no reason of ours"
    )
    if options.json:
        figures = {"seconds": seconds, "seed": options.seed, "kills": deaths.kills, "steps": dict(deaths.steps)}
        with open(options.json, "w") as file:
            json.dump(figures | {"violations": run.violations}, file, indent=1)
    if run.violations:
        print(
            f"again: {sys.executable} {' '.join(sys.argv)}{'' if '--seed' in sys.argv else f' --seed {options.seed}'}"
        )
    print(
        f"soak: {seconds:.0f} s, seed {options.seed}, {deaths.kills} kills ({deaths.held} held, {deaths.inside} inside), "
        f"{work.publishes} publishes, {work.reads} reads, {len(run.violations)} violations"
    )
    return 1 if run.violations else 0


if __name__ == "__main__":
    sys.exit(main())
