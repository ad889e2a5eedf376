"""Modes switched under load, all the time, with everything compared.

    .venv/bin/python tests/modes_soak.py --seconds 60 --seed 1     # the seed repeats what is decided, not when it happens

Three ranks with a caster take random requests in random numbers, some of which fail or are cancelled, while a thread on the
entry rank goes through all ways, synchronous and not, whole and rolled out. Every rank checks what it gets, and all of it is
the same on all ranks. Prints violations as they are found, and last a summary. Exit status: 0: no violation; 1: some; 2: wrong
arguments. Nothing is left in /dev/shm.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import itertools
import os
import random
import secrets
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import shmcast
from child import ChildFailedError
from makers import Mixed
from ranks import Rank, Ranks, in_use, settle, together
from shmcast import Caster, MaterializeError, metrics

RANKS = 3
WAYS = ("shm", "object", "raw", "replicate")
SHARES = ("", ":0%", ":10%", ":50%", ":100%")
MODES = [f"{way}-{when}{share}" for share in SHARES for way in WAYS for when in ("sync", "async")]
PENDING = 100
"""Requests are added while fewer are pending."""
MAX_VIOLATIONS = 20
PATIENCE_S = 120.0


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long (60)")
    parser.add_argument("--seed", type=int, default=None, help="of what is decided; default: a random one")
    parser.add_argument("--every", type=float, default=0.1, metavar="SECONDS", help="another mode (0.1)")
    parser.add_argument("--channel", choices=("auto", "group"), default="auto", help="how messages go (auto)")
    options = parser.parse_args()
    if options.seconds <= 0 or options.every <= 0:
        parser.error("--seconds and --every are more than 0")
    if options.seed is None:
        options.seed = secrets.randbits(31)
    return options


class Switches:
    """A thread that goes through all modes."""

    def __init__(self, caster: Caster, every_s: float) -> None:
        self._caster = caster
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="switches")
        self.count = 0

    def _run(self) -> None:
        for mode in itertools.cycle(MODES):
            self._caster.switch(mode)
            self.count += 1
            if self._stop.wait(self._every_s):
                return

    def __enter__(self) -> Switches:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


class Stream:
    """What one rank has got, and what is wrong with it."""

    def __init__(self, mixed: Mixed) -> None:
        self._mixed = mixed
        self._digest = hashlib.sha256()
        self.counts = {"ok": 0, "failed": 0, "cancelled": 0}
        self.violations: list[str] = []

    def add(self, outcomes: list[shmcast.Outcome]) -> None:
        for outcome in outcomes:
            try:
                name, value = self._became(outcome)
            except Exception as error:
                self.complain(f"request {outcome.rid}: {type(error).__name__}: {error}")
                continue
            self.counts[name] += 1
            self._digest.update(repr((outcome.rid, name, value)).encode())

    def _became(self, outcome: shmcast.Outcome) -> tuple[str, Any]:
        error = outcome.error
        if error is not None:
            if not isinstance(error, MaterializeError) or not self._mixed.fails(outcome.rid):
                raise AssertionError(f"it has failed: {error!r}")
            return "failed", str(error)
        # ... which compares its bytes; so what it is follows from its number
        return self._mixed.check(outcome), None

    def complain(self, text: str) -> None:
        if len(self.violations) < MAX_VIOLATIONS:
            self.violations.append(text)

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()


def serve(here: Rank, seconds: float, seed: int, every_s: float, channel: str) -> dict[str, Any]:
    """One rank."""
    warnings.simplefilter("ignore", RuntimeWarning)
    mixed, dice = Mixed(seed), random.Random(seed)
    stream = Stream(mixed)
    found: dict[str, Any] = {"switches": 0, "modes": {}}
    with shmcast.Group(here.group, channel=channel, max_bytes="64MiB") as group:
        caster = Caster(group, mixed, raw_everywhere=True, workers=2, inline_bytes=20_000)
        entry = here.rank == group.entry
        mixed.caster = caster if entry else None
        if entry:
            with Switches(caster, every_s) as switches:
                submitted = run(caster, stream, mixed, dice, time.monotonic() + seconds, group)
            found["switches"] = switches.count
            found["modes"] = {way: metrics.snapshot(group)["counters"][f"mode_{way}"] for way in WAYS}
            found["inline"] = metrics.snapshot(group)["counters"]["inline_results"]
        else:
            submitted = run(caster, stream, mixed, dice, None, group)
        here.parent.send("over")
        stream.add(caster.close())
        if sum(stream.counts.values()) != submitted and not stream.violations:
            stream.complain(f"{submitted} requests were submitted, {stream.counts} have ended")
        if caster.alone is not None:
            stream.complain(f"it went on alone: {caster.alone}")
        look(here, group, caster, stream)
    return {**found, "digest": stream.digest, "counts": stream.counts, "violations": stream.violations}


def run(
    caster: Caster, stream: Stream, mixed: Mixed, dice: random.Random, until: float | None, group: shmcast.Group
) -> int:
    """Requests in, outcomes out, until the entry rank says that the time is up. Returns how many were submitted."""
    submitted = 0
    kept: list[shmcast.Outcome] = []
    while group.broadcast(until is None or time.monotonic() < until):  # what the others say does not count
        for _ in range(8):
            for _ in range(min(dice.randrange(20), max(PENDING - len(caster.pending), 0))):
                caster.submit(submitted, submitted)
                if mixed.cancel_when(submitted) == "at once":
                    caster.cancel(submitted)
                submitted += 1
            caster.cancel(lambda rid: mixed.cancel_when(rid) == "before a step")
            arrived = caster.step(0.002)
            stream.add(arrived)
            kept = [each for each in kept + arrived if dice.random() < 0.5][:50]
            del arrived
    return submitted


def look(here: Rank, group: shmcast.Group, caster: Caster, stream: Stream) -> None:
    """For what is left: in books, threads and arena."""
    for pool in (caster._replicas._pool, None if caster._intake is None else caster._intake._pool):
        if pool is not None and not pool.join(30.0):
            stream.complain("a worker has not ended")
    if caster._intake is not None and (caster._intake.inflight_bytes or caster._intake.unfinished):
        stream.complain(f"in flight: {caster._intake.inflight_bytes} bytes, {caster._intake.unfinished} requests")
    gc.collect()
    settle(here, group)
    if group.arena is not None and (left := in_use(group.arena)):
        stream.complain(f"{left} blocks of the arena are in use")
    together(here)


def violations_of(answers: list[dict[str, Any]], namespace: str, switches: int) -> list[str]:
    """All that is wrong."""
    found = [f"rank {rank}: {text}" for rank, answer in enumerate(answers) for text in answer["violations"]]
    for rank, answer in enumerate(answers):
        if answer["digest"] != answers[0]["digest"] or answer["counts"] != answers[0]["counts"]:
            found.append(f"rank {rank}: other outcomes than rank 0: {answer['counts']}, {answers[0]['counts']}")
    left = [name for name in os.listdir("/dev/shm") if name.startswith(f"shmcast.{namespace}.")]
    found += [f"left in /dev/shm: {name}" for name in left]
    for name in left:
        Path("/dev/shm", name).unlink(missing_ok=True)
    if not switches:
        found.append("nothing was switched")
    return found


def main() -> int:
    options = arguments()
    namespace = os.environ["SHMCAST_NAMESPACE"] = f"modes{os.getpid()}x{secrets.token_hex(4)}"
    began = time.monotonic()
    with Ranks(RANKS) as ranks:
        children = ranks.start(serve, options.seconds, options.seed, options.every, options.channel)
        for child in children:
            if (said := child.receive(options.seconds + PATIENCE_S)) != "over":
                raise ChildFailedError(f"a rank has failed:\n{said[1]}")
        answers = ranks.results(children)
    violations = violations_of(answers, namespace, answers[0]["switches"])
    for text in violations:
        print(f"violation: {text}")
    counts = answers[0]["counts"]
    print(
        f"modes soak: {time.monotonic() - began:.0f} s, seed {options.seed}, {answers[0]['switches']} switches, "
        f"{sum(counts.values())} requests ({', '.join(f'{name} {count}' for name, count in counts.items())}; "
        f"{', '.join(f'{way} {count}' for way, count in answers[0]['modes'].items())}; {answers[0]['inline']} inline), "
        f"{len(violations)} violations"
    )
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
