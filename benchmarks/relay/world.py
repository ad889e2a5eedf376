"""The processes of one side: a tokenizer and its ranks. Started, commanded and ended from here.

They are forked from this process, which has imported SGLang and has one thread. Only what was started here is ever
signalled, and only segments of these processes are removed. Should this process die, they die with it.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from relay import rank, tokenizer
from relay.plan import Plan, Size, Variant
from tp.world import SHM, ChildError, blocked_signals

LEAD_NS = 3_000_000  # between a command and its moment, so that all processes are awake when it comes
STOP_TIMEOUT_S = 15.0
_PR_SET_PDEATHSIG = 1


class Served(NamedTuple):
    """One request, as this side's processes tell of it."""

    wrap_ns: int
    wrap_cpu_ns: int
    sent_ns: int
    cpu_ns: int  # of all processes, in the window
    read_cpu_ns: int  # of it, of all ranks together, to read the bytes once
    marks: list[rank.Marks]
    problems: list[str]


class World:
    """One side."""

    def __init__(self, plan: Plan, tp: int, installed: bool, folder: str, namespace: str) -> None:
        self.tp, self.installed = tp, installed
        self._plan, self._namespace = plan, namespace
        self._folder = Path(folder)
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self._pids: list[int] = []

    def start(self) -> None:
        """Start all processes; `wait_until_ready` before the first command."""
        name = f"{'ours' if self.installed else 'theirs'}{self.tp}"
        address = f"ipc://{self._folder / name}"
        os.environ["SHMCAST_NAMESPACE"] = self._namespace
        largest = max(nbytes for size in self._plan.sizes for nbytes in size.items)
        for number in range(self.tp):
            store = str(self._folder / f"{name}.store")
            self._spawn(rank.main, address, self.installed, number, self.tp, store)
        self._spawn(tokenizer.main, address, self.installed, largest, self._plan.seed)

    def wait_until_ready(self) -> None:
        """ChildError where one can not start."""
        self._gather()

    def request(self, variant: Variant, size: Size, number: int) -> Served:
        """One request, from making it until all is freed."""
        *_, expected = self.command("ready", variant, size.items, number)
        (wrapped,) = self._ask(self._pipes[-1:], "wrap", variant)
        *marks, sent = self.command("serve", variant, time.monotonic_ns() + LEAD_NS)
        cpu_ns = self._tokenizer_cpu_ns() - sent.cpu_ns + sum(mark.cpu_since(sent.at_ns) for mark in marks)
        problems = [wrapped.problem] if wrapped.problem else []
        for number, mark in enumerate(marks):
            if mark.digests != expected:
                problems.append(f"rank {number} has read other bytes than were sent")
            if not mark.freed:
                problems.append(f"rank {number} has not freed what it dropped")
            if not variant.skip_hash and mark.hashes != marks[0].hashes:
                problems.append(f"rank {number} names items otherwise than rank 0")
        read_cpu_ns = sum(mark.read_cpu_ns for mark in marks)
        return Served(wrapped.wrap_ns, wrapped.cpu_ns, sent.at_ns, cpu_ns, read_cpu_ns, marks, problems)

    def overhead_cpu_ns(self) -> int:
        """CPU in every window that is the benchmark's own: the tokenizer's answer."""
        *_, cpu_ns = self.command("nothing", time.monotonic_ns() + LEAD_NS)
        return self._tokenizer_cpu_ns() - int(cpu_ns)

    def command(self, *message: Any) -> list[Any]:
        """The same command to all processes; their answers, ranks first."""
        return self._ask(self._pipes, *message)

    def stop(self) -> list[str]:
        """End all processes in their own way; what they complain of."""
        complaints: list[str] = []
        with blocked_signals():
            complaints += [str(answer) for answer in self.command("stop") if answer]
            for process in self._processes:
                process.join(STOP_TIMEOUT_S)
            complaints += [f"a process did not end: {p.name}" for p in self._processes if p.is_alive()]
            self.kill()
        return complaints

    def kill(self) -> None:
        """End all processes at once and wait for each. Idempotent."""
        with blocked_signals():
            for process in self._processes:
                process.kill()
            for process in self._processes:
                process.join()
            for pipe in self._pipes:
                pipe.close()
            self._processes, self._pipes = [], []

    def remove_leftovers(self) -> list[str]:
        """Remove what these processes have left in /dev/shm, once they are gone; the names."""
        prefixes = (f"shmcast.{self._namespace}.", *(f"sgl_shm_mm_{pid}_" for pid in self._pids))
        left = [path for path in SHM.iterdir() if path.name.startswith(prefixes)]
        for path in left:
            path.unlink(missing_ok=True)
            if not path.name.startswith("shmcast."):
                resource_tracker.unregister(f"/{path.name}", "shared_memory")  # or it looks for it at its end
        return sorted(path.name for path in left)

    def _spawn(self, main: Callable[..., None], *arguments: Any) -> None:
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("fork").Process(
            target=_child, args=(main, os.getpid(), theirs, [*self._pipes, ours], arguments), daemon=True
        )
        with blocked_signals():
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
            self._pids.append(process.pid or 0)

    def _ask(self, pipes: list[Connection], *message: Any) -> list[Any]:
        for pipe in pipes:
            try:
                pipe.send(message)
            except OSError:
                raise self._died(pipe) from None
        return self._gather(pipes)

    def _gather(self, pipes: list[Connection] | None = None) -> list[Any]:
        """One answer from each; the first failure ends the wait."""
        waiting: list[Any] = list(self._pipes if pipes is None else pipes)
        answers: dict[Any, Any] = dict.fromkeys(waiting)
        deadline = time.monotonic() + self._plan.timeout_s
        while waiting:
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                names = ", ".join(self._name(pipe) for pipe in waiting)
                raise ChildError(f"wait for {names}: nothing in {self._plan.timeout_s:.0f} s")
            for pipe in ready:
                waiting.remove(pipe)
                answers[pipe] = self._answer(pipe)
        return list(answers.values())

    def _answer(self, pipe: Any) -> Any:
        try:
            status, answer = pipe.recv()
        except (EOFError, ConnectionResetError):
            raise self._died(pipe) from None
        if status != "ok":
            raise ChildError(f"{self._name(pipe)}:\n{answer}")
        return answer

    def _died(self, pipe: Connection) -> ChildError:
        process = self._processes[self._pipes.index(pipe)]
        process.join(STOP_TIMEOUT_S)
        return ChildError(f"{self._name(pipe)} died, exit code {process.exitcode}")

    def _name(self, pipe: Connection) -> str:
        number = self._pipes.index(pipe)
        who = f"rank {number}" if number < self.tp else "the tokenizer"
        return f"{who} {'with shmcast' if self.installed else 'of SGLang as it is'}"

    def _tokenizer_cpu_ns(self) -> int:
        """CPU so far of the tokenizer, all threads, also those that send behind its back (clock_getcpuclockid(3))."""
        return time.clock_gettime_ns((~self._pids[-1] << 3) | 2)


def _child(
    main: Callable[..., None], parent: int, pipe: Connection, others: list[Connection], arguments: tuple[Any, ...]
) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has died before that
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other in others:
        other.close()
    main(pipe, *arguments)
