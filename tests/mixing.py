"""What casters of every kind materialize in tests of all their parts together; for worker processes to import, so little is."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from collections.abc import Callable
from typing import Any

import numpy as np

SIZES = [0, 900, 5_000, 30_000, 70_000, 300_000]


def fails(key: int) -> bool:
    return key % 13 == 7


def content(key: int) -> bytes:
    rng = random.Random(key)
    return rng.randbytes(rng.choice(SIZES))


def by_key(raw: dict[str, Any], out: Callable[..., Any]) -> Any:
    """Depends on the key alone; of some keys it ends the worker process, or raises where there is none, or makes None."""
    key = raw["key"]
    if fails(key):
        if multiprocessing.current_process().name == "shmcast-worker" and key % 2:
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError(f"key {key}")
    if key % 13 == 3:
        return None
    wanted = np.frombuffer(content(key), np.uint8)
    array = out(wanted.size, "uint8") if key % 3 else np.empty(wanted.size, np.uint8)
    array[:] = wanted
    return {"x": array, "half": array[: wanted.size // 2], "small": np.arange(key), "key": key}


def lost_once(raw: dict[str, Any], out: Callable[..., Any]) -> Any:
    """The first that comes with a path crashes, or never ends."""
    try:
        os.close(os.open(raw["path"], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return by_key(raw, out)
    if raw["how"] == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


def check(key: int, outcome: Any) -> str:
    """What has become of it, which must be what becomes of this key."""
    if outcome.cancelled:
        return "cancelled"
    if outcome.error is not None:
        assert type(outcome.error).__name__ == "MaterializeError", outcome
        assert fails(key), outcome
        return "failed"
    assert not fails(key), outcome
    if key % 13 == 3:
        assert outcome.value is None
        return "ok"
    assert outcome.value["x"].tobytes() == content(key), key
    assert outcome.value["half"].tobytes() == content(key)[: len(content(key)) // 2], key
    assert outcome.value["small"].tolist() == list(range(key))
    assert outcome.value["key"] == key
    return "ok"
