"""Starts the processes of a run, commands them, watches them from outside, and ends them whatever happens.

Only processes that were started here are ever signalled, and only segments that bear this run's token are removed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any, NamedTuple

from tp.arrivals import Request
from tp.config import Config

SHM = Path("/dev/shm")
LEAD_NS = 2_000_000  # between the command and the arrival of a batch, so that all ranks are awake when it comes
SAMPLE_S = 0.004  # between two looks at memory
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 10.0


class ChildError(RuntimeError):
    """A child failed or died; the run's processes are no longer in step."""


class Served(NamedTuple):
    """One batch or stream, as seen from outside."""

    arrival_ns: int
    replies: list[Any]  # by rank; a batch: `Reply`, a stream: `StreamReply`
    cpu_ns: int  # of all processes of the run, from before the command until after the last reply


class Memory(NamedTuple):
    """Bytes over all processes of the run."""

    shared: int  # allocated in segments of this run
    private: int  # anonymous pages


class World:
    """The ranks and, with `--producer tokenizer`, the tokenizer."""

    def __init__(self, config: Config, directory: str) -> None:
        self.config, self.directory = config, directory
        self._starts = 0
        self._processes: list[subprocess.Popen[bytes]] = []
        self._pipes: list[Connection] = []
        self._reaped_ns: list[int] = []

    def start(self) -> None:
        """Start all processes and wait until each is ready; start-up is over when this returns."""
        self._starts += 1
        store = str(Path(self.directory) / f"store{self._starts}")
        read_end, write_end = Pipe(duplex=False)
        with contextlib.closing(read_end), contextlib.closing(write_end):
            tokenizer = self.config.producer == "tokenizer"
            for rank in range(self.config.tp):
                self._spawn(["rank", str(rank)], read_end if tokenizer and rank == 0 else None)
            if tokenizer:
                self._spawn(["tokenizer"], write_end)
        for pipe in self._pipes:
            pipe.send((self.config, store, self.directory))
        self._gather(START_TIMEOUT_S)
        self._reaped_ns = [0] * len(self._pipes)

    def stop(self) -> None:
        """End all processes: ask, then kill; wait for each. Idempotent."""
        with blocked_signals():
            for pipe in self._pipes:
                with contextlib.suppress(OSError):
                    pipe.send(("stop",))
            deadline = time.monotonic() + STOP_TIMEOUT_S
            with contextlib.suppress(ChildError, OSError):
                self._gather(STOP_TIMEOUT_S)
            for pipe in self._pipes:
                pipe.close()
            for process in self._processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.1, deadline - time.monotonic()))
                if process.poll() is None:
                    process.kill()
                    process.wait()
            self._pipes, self._processes = [], []

    def kill(self) -> None:
        """End all processes at once, wait for each, remove what they left in shared memory."""
        with blocked_signals():
            for process in self._processes:
                process.kill()
            for process in self._processes:
                process.wait()
            for pipe in self._pipes:
                pipe.close()
            self._pipes, self._processes = [], []
            self.remove_leftovers()

    def command(self, *message: Any, timeout_s: float = 0.0) -> list[Any]:
        """The same command to all processes; their answers, ranks first. `timeout_s`: if it may take longer than any."""
        for pipe in self._pipes:
            try:
                pipe.send(message)
            except OSError as error:
                raise ChildError(f"send {message[0]!r}: {error}") from error
        return self._gather(max(timeout_s, self.config.timeout_s) + 30)

    def serve(self, strategy: str, batch: Sequence[int]) -> Served:
        """Let one batch arrive and wait until every rank has done with it."""
        return self._window(strategy, "serve", batch, 0.0)

    def serve_stream(self, strategy: str, requests: Sequence[Request], timeout_s: float) -> Served:
        """Let a stream arrive and wait until every rank has done with all of it; `timeout_s`: how long that may take."""
        return self._window(strategy, "stream", requests, timeout_s)

    def _window(self, strategy: str, command: str, what: Any, timeout_s: float) -> Served:
        cpu_ns = self.cpu_ns()
        arrival_ns = time.monotonic_ns() + LEAD_NS
        replies = self.command(command, strategy, what, arrival_ns, timeout_s=timeout_s)
        cpu_ns = self.cpu_ns() - cpu_ns
        ranks = replies[: self.config.tp]
        reaped_ns = [r.reaped_cpu_ns for r in ranks] + replies[self.config.tp :]
        cpu_ns += sum(reaped_ns) - sum(self._reaped_ns)
        self._reaped_ns = reaped_ns
        return Served(arrival_ns, ranks, cpu_ns)

    def cpu_ns(self) -> int:
        """CPU so far of all live processes of the run and of their descendants; exact, read from outside."""
        return sum(_process_cpu_ns(pid) for pid in _with_descendants([p.pid for p in self._processes]))

    def memory(self) -> Memory:
        """Shared and private memory in use now."""
        private = sum(_anonymous_bytes(pid) for pid in _with_descendants([p.pid for p in self._processes]))
        return Memory(sum(_allocated_bytes(path) for path in self.segments()), private)

    def segments(self) -> list[Path]:
        """Segments in /dev/shm that this run has made."""
        prefixes = (f"{self.config.token}.", f"shmcast.{self.config.token}.")
        return [path for path in SHM.iterdir() if path.name.startswith(prefixes)]

    def remove_leftovers(self) -> list[str]:
        """Remove this run's segments, when its processes are gone; the names of those that were there."""
        left = self.segments()
        for path in left:
            path.unlink(missing_ok=True)
        return [path.name for path in left]

    def _spawn(self, arguments: list[str], extra: Connection | None) -> None:
        ours, theirs = Pipe()
        script = str(Path(__file__).resolve().parent.parent / "tp_shm.py")
        descriptors = [theirs.fileno()] + ([extra.fileno()] if extra else [])
        command = [sys.executable, script, "--child", ",".join(map(str, descriptors)), *arguments]
        threads = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")}
        extra_env = {"GLOO_SOCKET_IFNAME": "lo", "SHMCAST_NAMESPACE": self.config.token, **threads}
        with contextlib.closing(theirs):
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                pass_fds=descriptors,
                env=os.environ | extra_env,
                start_new_session=True,  # a Ctrl-C reaches the parent alone, which then ends the children
            )
        self._processes.append(process)
        self._pipes.append(ours)

    def _gather(self, timeout_s: float) -> list[Any]:
        """One answer from each process; the first failure ends the wait."""
        waiting: dict[Any, int] = {pipe: i for i, pipe in enumerate(self._pipes)}
        answers: list[Any] = [None] * len(self._pipes)
        deadline = time.monotonic() + timeout_s
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                raise ChildError(f"wait for children {sorted(waiting.values())}: nothing in {timeout_s:.0f} s")
            for pipe in ready:
                child = waiting.pop(pipe)
                try:
                    status, answers[child] = self._pipes[child].recv()
                except (EOFError, ConnectionResetError):
                    code = self._processes[child].wait(STOP_TIMEOUT_S)
                    raise ChildError(f"child {child} died, exit code {code}") from None
                if status != "ok":
                    raise ChildError(f"child {child}:\n{answers[child]}")
        return answers


class MemoryPeak:
    """The highest `Memory` while the context is open, from samples of a thread of the parent."""

    def __init__(self, world: World, sample_s: float = SAMPLE_S) -> None:
        self.world = world
        self.peak = Memory(0, 0)
        self._sample_s = sample_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryPeak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(self._sample_s):
            now = self.world.memory()
            self.peak = Memory(max(now.shared, self.peak.shared), max(now.private, self.peak.private))


@contextlib.contextmanager
def blocked_signals() -> Iterator[None]:
    """Finish cleaning up even if the user presses Ctrl-C again."""
    signals = (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _with_descendants(pids: Sequence[int]) -> list[int]:
    found = list(pids)
    for pid in found:  # grows
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{pid}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
    return found


def _process_cpu_ns(pid: int) -> int:
    """The process's CPU-time clock (clock_getcpuclockid(3)); 0 if it is gone."""
    with contextlib.suppress(OSError):
        return time.clock_gettime_ns((~pid << 3) | 2)
    return 0


def _anonymous_bytes(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


def _allocated_bytes(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_blocks * 512
    return 0
