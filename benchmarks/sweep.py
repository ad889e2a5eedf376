#!/usr/bin/env python3
"""What shmcast-gc costs: removing many arenas whose owners were killed together, how soon --watch notices a death, and
what it costs while nothing happens.

Owners are real processes, forked from this one, alive at once and then killed. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import resource
import secrets
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import shmcast
from shmcast import names
from tp import machine

COMMAND = (sys.executable, "-m", "shmcast.cli.gc")
ARENA_BYTES = "1MiB"
BLOCKS = 64
PROCESSES = 100  # that share the arenas which are killed together


class Owners:
    """Processes that have ``each`` small arenas, and wait."""

    def __init__(self, namespace: str, count: int, each: int = 1) -> None:
        self.pids: list[int] = []
        reading, writing = os.pipe()
        for _ in range(count):
            pid = os.fork()
            if not pid:
                _own(namespace, each, writing)
            self.pids.append(pid)
        os.close(writing)
        with os.fdopen(reading, "rb") as ready:
            if len(ready.read(count)) != count:
                raise RuntimeError(f"start {count} owners: some have died")

    def kill(self) -> None:
        """All of them, by SIGKILL; they are gone when this returns."""
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
        for pid in self.pids:
            os.waitpid(pid, 0)
        self.pids.clear()


def _own(namespace: str, each: int, ready: int) -> None:
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        arenas = [shmcast.Arena.create(ARENA_BYTES, namespace=namespace, max_blocks=BLOCKS) for _ in range(each)]
        os.write(ready, b".")
        while True:
            signal.pause()
            arenas[0].stats()
    finally:
        os._exit(1)


@contextlib.contextmanager
def _owners(namespace: str, count: int, each: int = 1) -> Iterator[Owners]:
    owners = Owners(namespace, count, each)
    try:
        yield owners
    finally:
        owners.kill()
        shmcast.sweep(namespace)


@contextlib.contextmanager
def _watching(namespace: str, *options: str) -> Iterator[tuple[subprocess.Popen[str], IO[str]]]:
    command = [*COMMAND, "--watch", "--json", "--namespace", namespace, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as daemon:
        assert daemon.stdout is not None
        try:
            if json.loads(daemon.stdout.readline())["event"] != "watching":
                raise RuntimeError("start shmcast-gc --watch: it does not watch")
            yield daemon, daemon.stdout
        finally:
            daemon.terminate()
            daemon.communicate()


def bench_reclaim(count: int) -> dict[str, Any]:
    """One ``shmcast-gc --once`` after that many owners were killed together."""
    namespace = f"bench-{secrets.token_hex(4)}"
    began = time.monotonic()
    each = max(count // PROCESSES, 1)
    with _owners(namespace, -(-count // each), each) as owners:
        created_s = time.monotonic() - began
        alive = len({found.arena for found in names.listing(namespace)})
        owners.kill()
        began, used_before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([*COMMAND, "--once", "--json", "--namespace", namespace], capture_output=True, text=True)
        wall_s, used = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        left = len(names.listing(namespace))
    said = json.loads(done.stdout)
    removed = said["removed"]
    return {
        "arenas": alive,
        "create_s": created_s,
        "wall_s": wall_s,
        "inside_s": said["seconds"],
        "cpu_s": used.ru_utime + used.ru_stime - used_before.ru_utime - used_before.ru_stime,
        "removed": removed["segments"],
        "removed_bytes": removed["nbytes"],
        "left": left,
        "exit_code": done.returncode,
    }


def bench_detection(repeats: int) -> dict[str, Any]:
    """From the signal to the line that says that all was removed."""
    namespace = f"bench-{secrets.token_hex(4)}"
    took_s = []
    with _watching(namespace, "--rescan", "3600") as (_, lines):
        for _ in range(repeats):
            with _owners(namespace, 1) as owners:
                began = time.monotonic()
                os.kill(owners.pids[0], signal.SIGKILL)
                while json.loads(lines.readline())["event"] != "removed":
                    pass  # what stays
                took_s.append(time.monotonic() - began)
    return {"repeats": repeats, "median_s": statistics.median(took_s), "max_s": max(took_s)}


def bench_idle(seconds: float, arenas: int, rescan_s: float) -> dict[str, Any]:
    """CPU of the daemon, all threads, while it serves metrics and nothing happens."""
    namespace = f"bench-{secrets.token_hex(4)}"
    with (
        _owners(namespace, arenas),
        _watching(namespace, "--rescan", str(rescan_s), "--metrics-port", "0") as (daemon, _),
    ):
        time.sleep(2.0)  # the first look, and those after the events of the owners' creation
        before, began = _cpu_s(daemon.pid), time.monotonic()
        time.sleep(seconds)
        share = (_cpu_s(daemon.pid) - before) / (time.monotonic() - began)
        status = Path(f"/proc/{daemon.pid}/status").read_text()
        rss = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))
    return {"seconds": seconds, "arenas": arenas, "rescan_s": rescan_s, "cpu_share": share, "rss_bytes": rss * 1024}


def _cpu_s(pid: int) -> float:
    """As /proc/<pid>/stat has it, but in ns."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def report(results: dict[str, Any]) -> None:
    """A line each."""
    reclaim, detection, idle = results["reclaim"], results["detection"], results["idle"]
    print(
        f"reclaim    {reclaim['arenas']} arenas ({reclaim['removed']} segments, {reclaim['removed_bytes'] / 2**20:.0f} MiB), "
        f"alive at once, killed together: {reclaim['wall_s']:.2f} s with the start of Python, {reclaim['inside_s']:.2f} s "
        f"without; CPU {reclaim['cpu_s']:.2f} s; {reclaim['left']} left (bar: 2 s)"
    )
    print(
        f"detection  from SIGKILL until it is said that all was removed: median {detection['median_s'] * 1e3:.0f} ms, "
        f"longest of {detection['repeats']} {detection['max_s'] * 1e3:.0f} ms (bar: 1 s)"
    )
    print(
        f"idle       {idle['cpu_share']:.4%} of a core over {idle['seconds']:.0f} s, with {idle['arenas']} arenas, a rescan "
        f"every {idle['rescan_s']:.0f} s and metrics served; {idle['rss_bytes'] / 2**20:.0f} MiB (bar: 0.1 %)"
    )


def main() -> int:
    """Measure all three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured")
    parser.add_argument("--arenas", type=int, default=1000, help="whose owners are killed together (1000)")
    parser.add_argument("--kills", type=int, default=20, help="noticed by --watch, one after another (20)")
    parser.add_argument("--idle-seconds", type=float, default=20.0, help="of doing nothing (20)")
    options = parser.parse_args()
    described = machine.describe()
    print(
        f"{described['cpu']}, {described['cores']} cores, Linux {described['kernel']}, load {described['load'][0]:.2f}"
    )
    results = {
        "machine": described,
        "reclaim": bench_reclaim(options.arenas),
        "detection": bench_detection(options.kills),
        "idle": bench_idle(options.idle_seconds, arenas=10, rescan_s=60.0),
    }
    report(results)
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
