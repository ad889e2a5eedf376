"""From samples to figures."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

KIB, MIB = 1 << 10, 1 << 20


def median_us(samples: Sequence[float]) -> float:
    """Median of seconds, in microseconds."""
    return statistics.median(samples) * 1e6


def p99_us(samples: Sequence[float]) -> float:
    """Of a hundred samples the second largest, of fewer the largest; of seconds, in microseconds."""
    return sorted(samples)[math.ceil(len(samples) * 0.99) - 1] * 1e6


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """``(seconds, result)``."""
    began = time.perf_counter()
    result = action()
    return time.perf_counter() - began, result


def name_of(nbytes: int) -> str:
    """4 KiB, 10 MiB."""
    return f"{nbytes // MIB} MiB" if nbytes >= MIB else f"{nbytes // KIB} KiB"
