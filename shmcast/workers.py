"""`Workers`: a `Maker` whose materializations run in processes of their own, which write into the rank's arena.

::

     started ──────► idle ◄──────────────────────── answered
                      │  │ make: a job                 ▲ the draft is read; nothing is mapped there any more
          close: quit │  ▼                             │
                      │ hired ─────────────────────────┘
                      ▼  │ died, garbage, `give_up`, `close`: killed, waited for, its blocks given back;
                    ended│ the one request fails, and another process is started
                      ▲  ▼
                      └──┘

The rank reserves what a worker asks for, hashes and publishes it once the worker has answered; array bytes never go through
the connection where the arena has room. A block that was reserved for a worker is given to nobody else before the worker has
answered or is known to have ended.

A worker that means harm can do what any process of the same user can: README, "Security". What one does by mistake stays its
own: it has mapped its blocks alone, between pages that nobody may touch, and only until it answers.

All workers are started by one thread that lives as long as they may: it is with the end of that thread that the kernel ends
them, so that they end with the rank, whatever becomes of it.
"""

import os
import pickle
import queue
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing import connection, spawn
from typing import Any

from . import arrays, codec, drafts, lockstep, worker
from .content import Hash
from .errors import GroupError, MaterializeError, shown
from .group import Group
from .in_place import InPlace
from .lockstep import Failure
from .materializing import Made, place_for
from .request import Request
from .sending import Sender
from .tally import Tally

START_TIMEOUT_S = 120.0
"""A worker that has not imported what it needs by then is taken for one that hangs."""
_STARTS_A_REQUEST = 3
"""So many workers that end before they are given it, and the request fails."""
_QUIT_S = 5.0
"""How long a worker that has nothing to do may take to end by itself."""
_DYING_S = 2.0
"""How long one that has closed its connection may take to have ended; then it is killed."""
_MAX_MESSAGE_BYTES = 1 << 34
_BOOT = "import sys; sys.path[:] = {path!r}; from shmcast.worker import main; main({fd}, {rank})"


class _LostError(Exception):
    """The worker has ended, or has said something that none says."""


def pickled(materialize: Callable[..., Any]) -> bytes:
    """What workers get. TypeError where the function can not be sent to another process."""
    try:
        return pickle.dumps(materialize, 5)
    except Exception as error:
        raise TypeError(
            f"materialize {shown(materialize)} can not be sent to worker processes: {error}; with executor='process' it is a "
            "function of a module, no lambda and none of inside a function, or an object that can be pickled"
        ) from None


class Workers:
    """See above. Its processes have been started and are ready once it is made."""

    def __init__(
        self,
        group: Group,
        sender: Sender,
        materialize: Callable[..., Any],
        *,
        count: int,
        tally: Tally,
        hash: Hash = True,
    ) -> None:
        """``hash``: of what is made in place. TypeError as for `pickled`; RuntimeError where workers do not come up."""
        arena = group.arena
        preparation = spawn.get_preparation_data("shmcast-worker")
        preparation.pop("authkey", None)  # refuses to be pickled; nobody needs it
        place = None if arena is None else (arena.namespace, arena.id)
        setup = worker.Setup(preparation, pickled(materialize), place)
        self._nursery = _Nursery(pickle.dumps(tuple(setup), 5), preparation["sys_path"])
        self._group = group
        self._sender = sender
        self._tally = tally
        self._hash = hash
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._idle: deque[_Process] = deque()
        self._hired: dict[int, _Process] = {}  # by id of the request
        self._missing = count  # that have to be started, by whoever needs one
        self._busy = 0  # threads that start or bury one
        self._closed = False
        try:
            for _ in range(count):
                self._replace()
            until = time.monotonic() + START_TIMEOUT_S
            for process in list(self._idle):
                process.await_ready(until)
        except BaseException as error:
            self.close()
            if isinstance(error, (_LostError, OSError)):
                raise RuntimeError(f"start {count} worker processes: {error}") from None
            raise

    def make(self, request: Request, raw: Any) -> Made:
        """See `Maker`."""
        place = None
        try:
            try:
                job = worker.JOB + pickle.dumps(raw, 5)
            except Exception as error:
                raise TypeError(f"the raw request can not be sent to a worker process: {error}") from error
            place = place_for(self._group, request, lambda nbytes: None, self._hash)
            draft = self._ask(request, job, place)
            if draft is None:
                return Made(lockstep.NONE)
            tree = codec.put_together(*draft)
            del draft
            return Made(lockstep.VALUE, self._sender.prepare(request, tree, place))
        except BaseException as error:
            return Made(lockstep.FAILED, failure=lockstep.failure_of(error))
        finally:
            if place is not None:
                place.end()

    def give_up(self, request: Request) -> None:
        """See `Maker`: its worker is killed."""
        with self._lock:
            request.given_up = True
            process = self._hired.get(id(request))
            if process is not None:
                process.kill()
            self._changed.notify_all()

    def close(self) -> None:
        """See `Maker`. Its processes have ended when this returns."""
        with self._lock:
            self._closed = True
            idle = list(self._idle)
            self._idle.clear()
            for process in self._hired.values():
                process.kill()
            self._changed.notify_all()
        until = time.monotonic() + _QUIT_S
        for process in idle:
            process.quit()
        for process in idle:
            process.bury(until)
        with self._lock:
            self._changed.wait_for(lambda: not self._hired and not self._busy, _QUIT_S)
        self._nursery.end()

    # ---- one request

    def _ask(self, request: Request, job: bytes, place: InPlace) -> "tuple[memoryview, list[Any]] | None":
        """A draft that can be put together; None where the value is None. Raises what is to be told of a failure."""
        process = self._hire(request)
        answered = False
        blocks: list[arrays.ndarray] = []
        try:
            answer = _answer_in(self._converse(process, job, place, blocks), blocks)
            answered = True
        except _LostError as error:
            process.bury()
            raise self._loss(request, process, str(error)) from None
        finally:
            self._dismiss(request, process, answered)
        if isinstance(answer, Failure):
            raise MaterializeError.of(None, *answer)
        return answer

    def _converse(self, process: "_Process", job: bytes, place: InPlace, blocks: list[arrays.ndarray]) -> bytes:
        """Give a worker a request, and the blocks that it asks for; its answer."""
        process.send(job)
        while (message := process.receive())[:1] == worker.WANT:
            if len(message) != 1 + worker.WANTED.size:
                raise _LostError(f"it asked for a block in {len(message)} bytes")
            nbytes, wanted = worker.WANTED.unpack(message[1:])
            block = place.block(nbytes)
            if block is None:
                if wanted and place.shared:
                    self._tally.add("out_full")
                process.send(worker.NO_ROOM)
                continue
            number, array, where = block
            blocks.append(array)
            process.send(worker.BLOCK + worker.PLACE.pack(number, *where))
        return message

    def _loss(self, request: Request, process: "_Process", why: str) -> MaterializeError:
        """``why``: it was ended, if it was."""
        if request.given_up or self._closed:
            why = "the caster was closed" if self._closed else "nobody waited for it any more"
        how = f"was ended: {why}" if why else process.end_text
        return MaterializeError.of(None, "WorkerLostError", f"worker process {process.pid} {how}", "")

    # ---- processes

    def _hire(self, request: Request) -> "_Process":
        """A worker for a request, ready. MaterializeError where none comes up, OSError where none can be started."""
        lost = 0
        while True:
            process = self._next(request)
            try:
                process.await_ready(time.monotonic() + START_TIMEOUT_S)
                return process
            except BaseException as error:
                self._dismiss(request, process, False)
                lost += 1
                # It has not been given the request, which another one can have.
                if not isinstance(error, _LostError):
                    raise
                if lost == _STARTS_A_REQUEST:
                    text = f"{lost} worker processes ended before they had the request, the last: {error}"
                    raise MaterializeError.of(None, "WorkerLostError", text, "") from None

    def _next(self, request: Request) -> "_Process":
        while True:
            with self._lock:
                self._changed.wait_for(lambda: self._idle or self._missing or self._closed or request.given_up)
                if self._closed:
                    raise GroupError("the caster is closed")
                if request.given_up:
                    raise TimeoutError("nobody waits for it any more")
                if self._idle:
                    process = self._idle.pop()
                    self._hired[id(request)] = process
                    return process
            self._replace()

    def _dismiss(self, request: Request, process: "_Process", answered: bool) -> None:
        """A worker is free again; or it is not to be trusted, and another takes its place."""
        with self._lock:
            del self._hired[id(request)]
            if answered and not request.given_up and not self._closed:
                self._idle.append(process)
                self._changed.notify()
                return
            self._busy += 1
        try:
            process.bury()
            self._tally.add("workers_lost", int(not self._closed))
        finally:
            with self._lock:
                self._busy -= 1
                self._missing += 1
                self._changed.notify_all()
        with suppress(OSError, RuntimeError):  # who needs one tries again, and says so
            self._replace()

    def _replace(self) -> None:
        """Start what is missing, one of it. OSError where the system refuses."""
        with self._lock:
            if not self._missing or self._closed:
                return
            self._missing -= 1
            self._busy += 1
        process = None
        try:
            process = self._nursery.start()
            self._tally.add("workers_started")
            if not self._takes(process):
                process.bury()
        finally:
            with self._lock:
                self._missing += process is None
                self._busy -= 1
                self._changed.notify_all()

    def _takes(self, process: "_Process") -> bool:
        """Not once closed. New ones come last, so that they have time to import things."""
        with self._lock:
            if not self._closed:
                self._idle.appendleft(process)
            return not self._closed


def _answer_in(message: bytes, blocks: list[arrays.ndarray]) -> "tuple[memoryview, list[Any]] | Failure | None":
    """A draft that can be put together; how it has failed; None for None. _LostError where it is none of these."""
    kind, rest = message[:1], memoryview(message)[1:]
    try:
        if kind == worker.DRAFT:
            return drafts.read(rest, blocks)
        if kind == worker.FAILED:
            return worker.failure_in(message)
    except (ValueError, TypeError) as error:
        raise _LostError(f"its answer could not be read: {error}") from None
    if kind != worker.NONE:
        raise _LostError(f"it answered with {message[:16]!r}, {len(message)} bytes, which is no answer")
    return None


class _Process:
    """One worker process, as the rank sees it."""

    def __init__(self, setup: bytes, path: list[str]) -> None:
        """``path``: where it finds this module."""
        self._lock = threading.Lock()
        self._ready = False
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
        self._pidfd = os.pidfd_open(self.pid)  # it is not reaped, so the number is still its own
        with suppress(OSError):  # it has ended: `await_ready` says so
            self._link.send_bytes(setup)

    def await_ready(self, until: float) -> None:
        """Wait until it has imported everything; _LostError where it has ended, or does not get there."""
        if self._ready:
            if connection.wait([self._pidfd], 0):
                self.bury()
                raise _LostError(f"worker process {self.pid} {self.end_text}, while it had nothing to do")
            return
        try:
            message = self.receive(until)
        except _LostError as error:
            self.bury()
            raise _LostError(f"worker process {self.pid} {str(error) or self.end_text}, before it was ready") from None
        if message[:1] == worker.FAILED:
            failure = worker.failure_in(message)
            raise _LostError(
                f"worker process {self.pid} could not start: {failure.kind}: {failure.text}\n{failure.traceback}"
            )
        self._ready = True

    def send(self, message: bytes) -> None:
        """_LostError where it has ended."""
        try:
            self._link.send_bytes(message)
        except OSError:
            raise _LostError from None

    def receive(self, until: float | None = None) -> bytes:
        """Its next message. _LostError where it has ended, or closed its connection."""
        left = None if until is None else max(until - time.monotonic(), 0.0)
        ready = connection.wait([self._link, self._pidfd], left)
        if not ready:
            raise _LostError(f"was waited for up to {START_TIMEOUT_S} s")
        if self._link not in ready:
            raise _LostError
        try:
            return self._link.recv_bytes(_MAX_MESSAGE_BYTES)
        except (EOFError, OSError) as error:
            why = "" if isinstance(error, (EOFError, ConnectionError)) else f"its message could not be read: {error}"
            raise _LostError(why) from None

    def kill(self) -> None:
        """From any thread; waits for nothing."""
        with self._lock:
            if self._status is None:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def quit(self) -> None:
        """Ask it to end, if it is listening."""
        if self._ready:
            with suppress(OSError):
                self._link.send_bytes(worker.QUIT)
        else:
            self.kill()

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

    def __init__(self, setup: bytes, path: list[str]) -> None:
        self._setup, self._path = setup, path
        self._wanted: queue.SimpleQueue[Future[_Process] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="shmcast-nursery", daemon=True)
        self._thread.start()

    def start(self) -> _Process:
        """A new worker, which is not ready yet. OSError where the system refuses."""
        future: Future[_Process] = Future()
        self._wanted.put(future)
        return future.result()

    def end(self) -> None:
        """What still runs is killed with it. Idempotent."""
        self._wanted.put(None)
        self._thread.join(_QUIT_S)

    def _serve(self) -> None:
        while (future := self._wanted.get()) is not None:
            try:
                future.set_result(_Process(self._setup, self._path))
            except BaseException as error:
                future.set_exception(error)
            del future
