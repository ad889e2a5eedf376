#!/usr/bin/env python3
"""What the parts cost: publish, attach, reserve and seal, broadcast, messages, caster, its executors; each beside what it is
compared with, interleaved.

Medians and 99th percentiles. Contents are verified outside the timed windows; what differs is reported and makes the exit
code 1. Nothing is asserted: the bars that are printed beside the figures are the project's own.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from parts import broadcast, casting, executors, memory, messages
from parts.figures import MIB
from tp import machine

PARTS = ("memory", "broadcast", "messages", "caster", "executors")


def run(parts: list[str], sizes: list[int] | None, repeats: int, quick: bool) -> dict[str, Any]:
    """Measure these parts, and print each as soon as it is there."""
    results: dict[str, Any] = {}
    if "memory" in parts:
        usual = [size for size in memory.SIZES if not quick or size <= 64 * MIB]
        results |= memory.bench_memory(sizes or usual, repeats)
        memory.report(results)
    if "broadcast" in parts:
        usual = broadcast.SIZES
        results["broadcast"] = [row for tp in (2, 4) for row in broadcast.bench_broadcast(tp, sizes or usual, repeats)]
        broadcast.report(results["broadcast"])
    if "messages" in parts:
        rounds, burst, paced, idle_s = (2, 50, 25, 1.0) if quick else (5, 200, 40, 5.0)
        results["messages"] = messages.bench_messages(rounds, burst, paced, idle_s)
        messages.report(results["messages"])
    if "caster" in parts:
        results["caster"] = casting.bench_caster(200 if quick else 1500)
        casting.report(results["caster"])
    if "executors" in parts:
        results["executors"] = executors.bench_executors(*((4, 1) if quick else (10, 2)))
        executors.report(results["executors"])
    return results


def wrong_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What did not arrive as it was sent."""
    rows = [row for part in ("publish", "attach", "broadcast") for row in results.get(part, ())]
    rows += [results[part] for part in ("messages", "caster", "executors") if part in results]
    return [row for row in rows if not row["verified"]]


def main() -> int:
    """Run all parts; exit code 1 if contents were wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured")
    parser.add_argument("--quick", action="store_true", help="fewer repeats, nothing above 64 MiB")
    parser.add_argument("--only", metavar="PART,...", help=f"of {', '.join(PARTS)}")
    parser.add_argument(
        "--sizes", metavar="BYTES,...", help="instead of the usual ones, for publish, reserve and broadcast"
    )
    parser.add_argument("--repeats", type=int, default=15, help="of each measurement of memory and broadcasts (15)")
    options = parser.parse_args()
    repeats = 5 if options.quick else options.repeats
    parts = options.only.split(",") if options.only else list(PARTS)
    if not set(parts) <= set(PARTS):
        parser.error(f"--only: {options.only}: there are {', '.join(PARTS)}")
    sizes = [int(size) for size in options.sizes.split(",")] if options.sizes else None
    described = machine.describe()
    print(
        f"{described['cpu']}, {described['cores']} cores, Linux {described['kernel']}, load {described['load'][0]:.2f}"
    )
    results = {
        "machine": described,
        "config": {"repeats": repeats, "pool_bytes": memory.POOL_BYTES},
        **run(parts, sizes, repeats, options.quick),
    }
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file, indent=1)
    wrong = wrong_rows(results)
    for row in wrong:
        print(f"WRONG CONTENTS: {row}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
