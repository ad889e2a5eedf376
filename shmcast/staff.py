"""`Staff`: the worker processes of a caster, as the rank sees them: started, hired for a request each, replaced, ended.

::

                  ready                hire                answered
     starting ──────────────► idle ──────────────► hired ────────────► idle
        │                      │ │                   │
        │ ended, or not ready  │ │ found dead        │ died, is not to be trusted, nobody waits: killed if need be
        │ in time              │ ▼                   ▼
        └──────────────────────┼► buried: waited for and reaped ─► missing ─► starting, by who has lost or needs one
                         close ▼
                             ended

All are started by one thread that lives as long as they may: it is with the end of that thread that the kernel ends them,
so that they end with the rank, whatever becomes of it.
"""

import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing import connection, spawn

from . import worker
from .errors import GroupError, MaterializeError
from .request import Request

START_TIMEOUT_S = 120.0
"""A worker that has not imported what it needs by then is taken for one that hangs."""
_STARTS_A_REQUEST = 3
"""So many workers are started for one request that finds none; then it fails."""
_QUIT_S = 5.0
"""How long a worker that has nothing to do may take to end by itself."""
_DYING_S = 2.0
"""How long one that has closed its connection may take to have ended; then it is killed."""
_MAX_MESSAGE_BYTES = 1 << 34
_BOOT = "import sys; sys.path[:] = {path!r}; from shmcast.worker import main; main({fd}, {rank})"


class LostError(Exception):
    """The worker has ended; or, where there is a text, it was or is to be ended, for having said what none says."""


class Staff:
    """So many worker processes. Thread-safe; nothing is waited for while its lock is held."""

    def __init__(
        self, setup: bytes, path: list[str], count: int, *, started: Callable[[], object], lost: Callable[[], object]
    ) -> None:
        """All are ready once this returns. ``setup``: see `worker.Setup`. ``path``: where they find modules. ``started``,
        ``lost``: called for each that is. RuntimeError where they do not come up."""
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._on_start, self._on_loss = started, lost
        self._idle: list[Process] = []
        self._hired: dict[int, Process] = {}  # by id of the request
        self._coming: set[Process] = set()
        self._starting = 0
        self._missing = count
        self._problem = ""
        self._closed = False
        self._setup = setup
        self._nursery = _Nursery(path)
        try:
            with self._lock:
                while self._missing and not self._problem:
                    self._start()
                self._changed.wait_for(lambda: len(self._idle) == count or self._problem, START_TIMEOUT_S)
                ready, problem = len(self._idle), self._problem
            if ready < count:
                problem = problem or f"{ready} are ready after {START_TIMEOUT_S} s"
                raise RuntimeError(f"start {count} worker processes: {problem}")
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        """Of all that are ready."""
        with self._lock:
            return [process.pid for process in [*self._idle, *self._hired.values()]]

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def hire(self, request: Request) -> "Process":
        """A worker that is ready, for `dismiss` when it has answered. MaterializeError where none comes up; GroupError once
        closed, TimeoutError once the request is given up."""
        started = 0
        with self._lock:
            while True:
                if self._closed:
                    raise GroupError("the caster is closed")
                if request.given_up:
                    raise TimeoutError("nobody waits for it any more")
                if self._idle:
                    process = self._idle.pop()
                    if process.alive:
                        self._hired[id(request)] = process
                        return process
                    process.bury()  # which waits for nothing
                    self._miss(f"worker process {process.pid} {process.end_text}, while it had nothing to do")
                elif self._missing and started < _STARTS_A_REQUEST:
                    started += 1
                    self._start()
                elif self._starting or self._hired:
                    self._changed.wait()
                else:
                    text = f"no worker process comes up, {started} were started for it; the last: {self._problem}"
                    raise MaterializeError.of(None, "WorkerLostError", text, "")

    def dismiss(self, request: Request, process: "Process", answered: bool) -> None:
        """It is free again; or it is not to be trusted, and has ended when this returns."""
        with self._lock:
            if answered and not request.given_up and not self._closed:
                del self._hired[id(request)]
                self._idle.append(process)
                self._changed.notify_all()
                return
        process.bury()
        with self._lock:
            del self._hired[id(request)]
            self._miss(f"worker process {process.pid} {process.end_text}")
            if not self._closed:
                self._start()

    def give_up(self, request: Request) -> None:
        """Kill the worker that a request has, if it has one. Waits for nothing."""
        with self._lock:
            request.given_up = True
            process = self._hired.get(id(request))
            if process is not None:
                process.kill()
            self._changed.notify_all()

    def close(self) -> None:
        """End all of them; they have ended when this returns. Idempotent."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            for process in [*self._hired.values(), *self._coming]:
                process.kill()
            self._changed.notify_all()
        until = time.monotonic() + _QUIT_S
        for process in idle:
            process.quit()
        for process in idle:
            process.bury(until)
        with self._lock:
            self._changed.wait_for(lambda: not self._hired and not self._starting, _QUIT_S)
        self._nursery.end()

    def _miss(self, problem: str, was_there: bool = True) -> None:
        """With the lock held: one is not there any more, or has not come."""
        self._missing += 1
        self._problem = problem
        if was_there and not self._closed:
            self._on_loss()
        self._changed.notify_all()

    def _start(self) -> None:
        """With the lock held: see to it that one comes that is missing."""
        try:
            threading.Thread(target=self._bring, name="shmcast-usher", daemon=True).start()
        except RuntimeError as error:  # no thread to be had
            self._problem = str(error)
        else:
            self._missing -= 1
            self._starting += 1

    def _bring(self) -> None:
        """On a thread of its own: start one, and wait until it is ready."""
        process, problem = None, ""
        try:
            process = self._nursery.start()
            self._on_start()
            with self._lock:
                self._coming.add(process)
                if self._closed:
                    process.kill()
            process.set_up(self._setup, time.monotonic() + START_TIMEOUT_S)
        except Exception as error:
            problem = str(error) or type(error).__name__
        if process is not None and (problem or not self._joins(process)):
            process.bury()
        with self._lock:
            self._starting -= 1
            if process is not None:
                self._coming.discard(process)
            if problem:
                self._miss(problem, process is not None)
            self._changed.notify_all()

    def _joins(self, process: "Process") -> bool:
        with self._lock:
            if not self._closed:
                self._idle.append(process)
            return not self._closed


class Process:
    """One worker process, as the rank sees it."""

    def __init__(self, path: list[str]) -> None:
        """``path``: where it finds this module."""
        self._lock = threading.Lock()
        self._status: int | None = None
        self._link, theirs = connection.Pipe()
        with theirs:
            fd = theirs.fileno()
            code = _BOOT.format(path=path, fd=fd, rank=os.getpid())
            flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
            try:
                self._process = subprocess.Popen(
                    [spawn.get_executable(), *flags, "-c", code], stdin=subprocess.DEVNULL, pass_fds=[fd]
                )
            except BaseException:
                self._link.close()
                raise
        self.pid = self._process.pid
        try:
            self._pidfd = os.pidfd_open(self.pid)  # it is not reaped, so the number is still its own
        except BaseException:
            self._process.kill()
            self._process.wait()
            self._link.close()
            raise

    @property
    def alive(self) -> bool:
        """Whether it has not ended yet."""
        return self._status is None and not connection.wait([self._pidfd], 0)

    def set_up(self, setup: bytes, until: float) -> None:
        """Wait until it has imported everything; LostError where it has ended, or does not get there."""
        try:
            self.send(setup)
            message = self.receive(until)
        except LostError as error:
            self.bury()
            raise LostError(f"worker process {self.pid} {str(error) or self.end_text}, before it was ready") from None
        if message[:1] == worker.FAILED:
            failure = worker.failure_in(message)
            raise LostError(
                f"worker process {self.pid} could not start: {failure.kind}: {failure.text}\n{failure.traceback}"
            )

    def send(self, message: bytes) -> None:
        """LostError where it has ended."""
        try:
            self._link.send_bytes(message)
        except OSError:
            raise LostError from None

    def receive(self, until: float | None = None) -> bytes:
        """Its next message. LostError where it has ended, or closed its connection."""
        left = None if until is None else max(until - time.monotonic(), 0.0)
        ready = connection.wait([self._link, self._pidfd], left)
        if not ready:
            raise LostError(f"was waited for up to {START_TIMEOUT_S} s")
        if self._link not in ready:
            raise LostError
        try:
            return self._link.recv_bytes(_MAX_MESSAGE_BYTES)
        except (EOFError, OSError) as error:
            why = "" if isinstance(error, (EOFError, ConnectionError)) else f"its message could not be read: {error}"
            raise LostError(why) from None

    def kill(self) -> None:
        """From any thread; waits for nothing."""
        with self._lock:
            if self._status is None:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def quit(self) -> None:
        """Ask it to end, which it listens to while it has nothing to do."""
        with suppress(OSError):
            self._link.send_bytes(worker.QUIT)

    def bury(self, until: float | None = None) -> None:
        """It has ended when this returns: by itself by then, by default soon, or it is killed. Idempotent; one thread at a
        time."""
        if self._status is not None:
            return
        if until is None and connection.wait([self._link], 0) == []:
            until = 0.0  # it has not closed its connection: it does not die by itself
        left = _DYING_S if until is None else max(until - time.monotonic(), 0.0)
        if not connection.wait([self._pidfd], left):
            self.kill()
            connection.wait([self._pidfd])
        status = self._process.wait()
        with self._lock:
            self._status = status
            os.close(self._pidfd)
        self._link.close()

    @property
    def end_text(self) -> str:
        """How it has ended, for people."""
        status = self._status or 0
        if status >= 0:
            return f"ended by itself, with exit status {status}"
        names = {each.value: each.name for each in signal.Signals}
        text = f"was ended by signal {-status} ({names.get(-status, 'unknown')})"
        if -status == signal.SIGKILL:
            return f"{text}: somebody has killed it, or the kernel for want of memory (dmesg says so)"
        return f"{text}: stderr has where it was, if it could say so"


class _Nursery:
    """The thread that starts workers. See above why it is one."""

    def __init__(self, path: list[str]) -> None:
        self._path = path
        self._wanted: queue.SimpleQueue[Future[Process] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="shmcast-nursery", daemon=True)
        self._thread.start()

    def start(self) -> Process:
        """A new worker, which is not ready yet. OSError where the system refuses."""
        future: Future[Process] = Future()
        self._wanted.put(future)
        return future.result()

    def end(self) -> None:
        """What still runs is killed with it. Idempotent."""
        self._wanted.put(None)
        self._thread.join(_QUIT_S)

    def _serve(self) -> None:
        while (future := self._wanted.get()) is not None:
            try:
                future.set_result(Process(self._path))
            except BaseException as error:
                future.set_exception(error)
            del future
