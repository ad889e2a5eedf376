"""What worker processes materialize in tests: functions that they can import, and ways to look at the workers."""

from __future__ import annotations

import ctypes
import dataclasses
import mmap
import multiprocessing
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import shmcast
from shmcast.staff import Staff
from shmcast.workers import Workers

LONG_S = 60.0
MIB = 1 << 20
KEPT: list[Any] = []
"""Of a worker."""


@dataclasses.dataclass
class Pair:
    left: Any
    right: Any


def workers_of(caster: shmcast.Caster) -> Workers:
    maker = caster._intake._maker._maker  # behind the one that sends raw requests as they are
    assert isinstance(maker, Workers)
    return maker


def staff_of(caster: shmcast.Caster) -> Staff:
    return workers_of(caster)._staff


def pids_of(caster: shmcast.Caster) -> list[int]:
    """Of all workers that are ready."""
    return sorted(workers_of(caster).pids)


def counters(group: shmcast.Group) -> dict[str, int]:
    return shmcast.metrics.snapshot(group)["counters"]


def all_there(caster: shmcast.Caster, count: int) -> bool:
    """Wait until so many workers are ready and have nothing to do: who is lost is replaced in the background."""
    staff = staff_of(caster)
    with staff._lock:
        return staff._changed.wait_for(lambda: len(staff._idle) == count, LONG_S)


def ended(pidfd: int) -> bool:
    """Wait for the end of a process."""
    import select

    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(LONG_S * 1000))


def numbered(raw: int, nbytes: int) -> np.ndarray:
    """Bytes that only this request has."""
    return np.random.default_rng(raw).integers(0, 256, nbytes, np.uint8)


# ---- trees of all kinds


def tree_of(raw: Any, new: Callable[..., Any] = np.empty) -> Any:
    if raw == "bad":
        raise LookupError("bad")
    if raw == "exit":
        raise SystemExit(3)
    if raw == "interrupt":
        raise KeyboardInterrupt
    if raw == "lambda":
        return lambda: 0
    if raw == "none":
        return None
    if raw == "tensors":
        return tensors(new)
    rng = np.random.default_rng(7)
    large = new((100, 1000), "float32")
    large[:] = rng.random((100, 1000), np.float32)
    whole = new(30_000, "int16")
    whole[:] = np.arange(30_000)
    tree = {
        "large": large,
        "part": large[10:20],
        "turned": large.T,
        "other dtype": whole.view("uint8"),
        "small": np.arange(10.0),
        "scalar": np.float32(1.5),
        "0-d": np.array(7),
        "empty": np.zeros((0, 3), "f2"),
        "empty in place": new((3, 0), "f8"),
        "private": rng.random(5000),
        "order": np.asfortranarray(rng.random((200, 300))),
        "fields": np.zeros(3000, [("a", "i4"), ("b", "f8", (2,))]),
        "objects": np.array([1, "two", None], object),
        "text": ["one", ("two", 3, None), {"four": b"5"}],
        "pair": Pair(large, whole),
    }
    return {"list": [np.full(20_000, each, "u1") for each in range(5)], "bytes": b"x" * 100_000, "tree": tree}[raw]


def tree_of_out(raw: Any, out: Callable[..., Any]) -> Any:
    return tree_of(raw, out)


def tensors(new: Callable[..., Any]) -> Any:
    import torch

    array = new((64, 256), "float32")
    array[:] = 3
    over = torch.from_numpy(array)
    return {
        "over": over,
        "part": over[3:9],
        "turned": over.t(),
        "own": torch.arange(20_000),
        "half": torch.ones(20_000, dtype=torch.bfloat16),
        "small": torch.arange(3),
        "small odd": torch.ones(3, dtype=torch.float8_e4m3fn),
        "empty": torch.zeros((0, 4)),
        "0-d": torch.tensor(2.5),
        "grad": torch.ones(3, requires_grad=True),
    }


def same(left: Any, right: Any) -> bool:
    """Whether two trees are equal in types, dtypes, shapes and values."""
    if type(left) is not type(right):
        return False
    if isinstance(left, np.ndarray):
        if left.dtype != right.dtype or left.shape != right.shape:
            return False
        return left.tolist() == right.tolist() if left.dtype.hasobject else left.tobytes() == right.tobytes()
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, Pair):
        return same(left.left, right.left) and same(left.right, right.right)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(left, torch.Tensor):
        if left.dtype != right.dtype or left.shape != right.shape or left.requires_grad != right.requires_grad:
            return False
        ours, theirs = (each.detach().contiguous().reshape(-1).view(torch.uint8) for each in (left, right))
        return bool(torch.equal(ours, theirs))
    return bool(left == right)


# ---- what goes wrong


def job(raw: Any, out: Callable[..., Any]) -> Any:
    """A number: so many bytes, see `numbered`, but what a name says."""
    action, number = raw if isinstance(raw, tuple) else (raw, 0)
    if isinstance(action, str):
        found = ACTIONS[action](number, out)
        if found is not None:
            return found
    nbytes = 50_000 + 4096 * (number % 40)
    array = out(nbytes, "uint8")
    array[:] = numbered(number, nbytes)
    return {"x": array, "number": number}


def right(outcome: shmcast.Outcome, number: int) -> bool:
    """Whether it is what `job` makes of a number."""
    value = outcome.result()
    return value["number"] == number and same(value["x"], numbered(number, value["x"].nbytes))


def hang(path: int, out: Any) -> None:
    while True:
        time.sleep(3600)


def hang_midway(number: int, out: Any) -> None:
    out(MIB, "uint8")[: MIB // 2] = 255
    hang(number, out)


def hang_in_c(number: int, out: Any) -> None:
    """Holding the GIL."""
    ctypes.PyDLL(None).pause()


def segfault(number: int, out: Any) -> None:
    out(MIB, "uint8")[:] = 255
    ctypes.string_at(0)


def fill_past_the_end(number: int, out: Any) -> Any:
    """In the last page, which is the block's own; and before its start, behind its last page: where ``number`` says."""
    array = out(50_000, "uint8")
    array[:] = 1
    start, end = array.ctypes.data, array.ctypes.data + 50_000
    if number == 0:
        ctypes.memset(end, 255, -end % mmap.PAGESIZE)
        return {"x": array, "number": 0}
    ctypes.memset(start - 1 if number < 0 else end + -end % mmap.PAGESIZE, 255, 1)
    return None


def keep(number: int, out: Any) -> Any:
    KEPT.append(out(MIB, "uint8"))
    KEPT[-1][:] = 77
    return {"x": KEPT[-1], "number": number}


def write_kept(number: int, out: Any) -> Any:
    array = KEPT.pop()
    refused = not array.flags.writeable
    ctypes.memset(array.ctypes.data, 255, array.nbytes)
    return {"x": np.array(refused), "number": number}


def return_kept(number: int, out: Any) -> Any:
    return {"x": KEPT[-1][:100_000], "number": number}


def write_later(number: int, out: Any) -> Any:
    """A thread that does not end with the request."""
    array = out(MIB, "uint8")
    array[:] = 5
    address = array.ctypes.data

    def write() -> None:
        while True:
            ctypes.memset(address, 255, MIB)

    KEPT.append(array)
    thread = threading.Thread(target=write, daemon=True)
    result = {"x": np.array(0), "number": number}
    thread.start()
    return result


def from_threads(number: int, out: Any) -> Any:
    arrays: list[Any] = [None] * 8

    def make(index: int) -> None:
        arrays[index] = out(20_000 + index, "uint8")
        arrays[index][:] = index

    threads = [threading.Thread(target=make, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"x": arrays, "number": number}


def babble(number: int, out: Any) -> None:
    """Writes where only the worker's own code has anything to say."""
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        try:
            is_link = stat.S_ISSOCK(os.fstat(fd).st_mode)
        except OSError:
            continue
        if is_link:
            os.write(fd, [b"\0\0\0\3xyz", b"\0\0\0\5drest", b"\0\0\0\2w?", b"\xff\xff\xff\xff\x7f" + b"x" * 20][number])


def shut(number: int, out: Any) -> None:
    """Closes what it has not opened."""
    os.closerange(3, 1000)
    hang(number, out)


def fork(number: int, out: Any) -> Any:
    """A child that outlives the request, and writes where it can not."""
    array = out(MIB, "uint8")
    array[:] = 9
    pid = os.fork()
    if not pid:
        ctypes.memset(array.ctypes.data, 255, MIB)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    return {"x": array, "status": status, "number": number}


def daemon(number: int, out: Any) -> Any:
    """Uses multiprocessing itself."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return {"x": np.array(pool.apply(len, ("four",))), "number": number}


ACTIONS: dict[str, Callable[[int, Any], Any]] = {
    "hang": hang,
    "hang midway": hang_midway,
    "hang in C": hang_in_c,
    "segfault": segfault,
    "kill": lambda number, out: os.kill(os.getpid(), signal.SIGKILL),
    "exit": lambda number, out: os._exit(7),
    "fill": fill_past_the_end,
    "keep": keep,
    "write kept": write_kept,
    "return kept": return_kept,
    "write later": write_later,
    "threads": from_threads,
    "babble": babble,
    "shut": shut,
    "fork": fork,
    "daemon": daemon,
    "pid": lambda number, out: {"x": np.array(os.getpid()), "number": number},
    "stop": lambda number, out: os.kill(os.getpid(), signal.SIGSTOP),
    "": lambda number, out: None,
}


class Fragile:
    """Can be sent to workers, and be taken in by them unless there is a file, or once somebody writes into the pipe there."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        if os.path.exists(self._path):
            if not stat.S_ISFIFO(os.stat(self._path).st_mode):
                raise FileExistsError(self._path)
            with open(self._path) as pipe:
                pipe.read()

    def __call__(self, raw: Any, out: Any) -> Any:
        return job(raw, out)
