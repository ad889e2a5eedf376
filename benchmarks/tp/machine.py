"""The machine that the figures are from, and the bounds that no strategy on it can beat."""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from tp.config import Config
from tp.inputs import Cost

COPY_REPEATS = 5
MAX_COPY_BYTES = 256 << 20
IDLE_LOAD = 0.3  # of a one-minute load average, per core: above it figures are not to be trusted


def describe() -> dict[str, Any]:
    """Hardware, system, versions, load now."""
    return {
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": cores(),
        "memory_bytes": int((_field("/proc/meminfo", "MemTotal") or "0").split()[0]) * 1024,
        "shm_bytes": shutil.disk_usage("/dev/shm").total,
        "shm_huge_pages": _bracketed("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
        "kernel": platform.release(),
        "page_bytes": os.sysconf("SC_PAGE_SIZE"),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("shmcast", "torch", "numpy", "pillow")},
        "load": list(os.getloadavg()),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def available_bytes() -> int:
    """Memory that can be had without swapping."""
    return int((_field("/proc/meminfo", "MemAvailable") or "0").split()[0]) * 1024


def warnings(config: Config, machine: dict[str, Any]) -> list[str]:
    """What a reader of the figures must know."""
    lines = []
    if machine["cores"] < config.tp:
        lines.append(
            f"warning: {config.tp} ranks on {machine['cores']} cores: wall times contain waiting for a core, which a "
            "machine with a core a rank would not show (compare CPU, and --workload wait)"
        )
    if machine["load"][0] > IDLE_LOAD * machine["cores"]:
        lines.append(f"warning: the machine is busy: load {machine['load'][0]:.2f} at start")
    return lines


def bounds(config: Config, costs: Sequence[Cost]) -> dict[str, Any]:
    """For one run of the main scenario; the copy is measured here, the rest when the requests were made.

    cpu_s               one materialization of every request
    wall_once_s         the same one after another, by one thread
    wall_replicate_s    every rank materializes, work spread evenly over the cores
    wall_cores_s        one materialization of every request, spread evenly over all cores
    copy_floor_s        every rank copies every byte out once, from warm memory, on as many cores as there are
    """
    count = cores()
    cpu_s, wall_s, nbytes = sum(c.cpu_s for c in costs), sum(c.wall_s for c in costs), sum(c.nbytes for c in costs)
    rate = copy_bytes_per_s(max(c.nbytes for c in costs))
    return {
        "requests": len(costs),
        "bytes": nbytes,
        "cpu_s": cpu_s,
        "wall_once_s": wall_s,
        "wall_replicate_s": max(wall_s, config.tp * cpu_s / count),
        "wall_cores_s": cpu_s / count,
        "copy_bytes_per_s": rate,
        "copy_floor_s": config.tp * nbytes / rate / min(config.tp, count),
    }


def copy_bytes_per_s(nbytes: int) -> float:
    """Speed of one thread that copies `nbytes` between warm private buffers: the best of a few."""
    size = min(nbytes, MAX_COPY_BYTES)
    source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
    times = []
    for _ in range(COPY_REPEATS):
        start_s = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - start_s)
    return size / min(times)


def _field(path: str, name: str) -> str | None:
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None


def _bracketed(path: str) -> str | None:
    try:
        return next((word[1:-1] for word in Path(path).read_text().split() if word.startswith("[")), None)
    except OSError:
        return None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
