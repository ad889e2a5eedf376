"""Worker threads that may be given up.

Not ``concurrent.futures.ThreadPoolExecutor``: that one joins its threads when the interpreter exits, so that one job that
hangs hangs the process, and a thread that hangs stays one of its threads for ever. Here a worker that does not come back is
replaced, and no thread keeps the process alive.

::

                  put (anybody)               run returns (worker)
    job:  ──────► waiting ──────► running ──────────────────────────► done
                     worker that is free,        │ abandon (anybody)
                     once `may_start` says so    ▼
                                              running still, on a thread that ends with it; another takes its place

Threads are started when there is work for them. They hold the pool, and the pool holds ``run``.
"""

import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class _Worker:
    """One thread; ``abandoned`` under the pool's lock."""

    __slots__ = ("abandoned", "thread")

    thread: threading.Thread

    def __init__(self) -> None:
        self.abandoned = False


class Pool(Generic[T]):
    """Runs jobs, each once, in the order in which they were put, by up to so many threads at once."""

    def __init__(
        self,
        run: Callable[[T], object],
        workers: int,
        *,
        may_start: Callable[[T], bool] = lambda job: True,
        name: str = "shmcast-worker",
    ) -> None:
        """``run``: called on a worker with each job; what it raises goes to ``threading.excepthook`` and costs no worker.
        ``may_start``: asked about the first of the jobs that wait, with the pool's lock held, whenever a worker is free and
        after `nudge`."""
        if workers < 1:
            raise ValueError(f"workers={workers}: at least 1 is needed")
        self._run = run
        self._limit = workers
        self._may_start = may_start
        self._name = name
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._ended = threading.Condition(self._lock)
        self._urgent: deque[T] = deque()
        self._waiting: deque[T] = deque()
        self._workers: set[_Worker] = set()
        self._running: dict[int, _Worker] = {}  # by id of the job, which the worker keeps alive
        self._free = 0
        self._closed = False
        self._started = 0

    def put(self, job: T, *, urgent: bool = False) -> None:
        """Have a job run. ``urgent``: before all that are not, and without asking ``may_start``. ValueError once closed,
        RuntimeError where no thread can be had."""
        with self._lock:
            if self._closed:
                raise ValueError(f"put a job into {self._name}: it is closed")
            jobs = self._urgent if urgent else self._waiting
            jobs.append(job)
            self._work.notify()
            # One that was woken and has not come yet still counts as free: what counts is jobs, not wake-ups.
            if len(self._urgent) + len(self._waiting) > self._free:
                self._start()
                if not self._workers:
                    jobs.pop()
                    raise RuntimeError(f"put a job into {self._name}: no thread can be started")

    def abandon(self, job: T) -> bool:
        """Count the worker that runs this job as lost, and take another one. False where none runs it."""
        with self._lock:
            worker = self._running.pop(id(job), None)
            if worker is None:
                return False
            worker.abandoned = True
            self._workers.discard(worker)
            self._ended.notify_all()
            if self._urgent or self._waiting:
                self._start()
            return True

    def hasten(self, job: T) -> None:
        """Make a job urgent, if it waits still."""
        with self._lock:
            try:
                self._waiting.remove(job)
            except ValueError:
                return
            self._urgent.append(job)
            self._work.notify()

    def nudge(self) -> None:
        """``may_start`` may give another answer now."""
        with self._lock:
            if self._waiting:
                self._work.notify_all()

    def close(self) -> None:
        """Start nothing any more, and forget what waits. What runs goes on, and its workers end with it. Idempotent."""
        with self._lock:
            self._closed = True
            self._urgent.clear()
            self._waiting.clear()
            self._work.notify_all()

    def join(self, timeout: float) -> bool:
        """After `close`: wait until all workers that were not abandoned have ended; False if some have not in time."""
        with self._lock:
            return self._ended.wait_for(lambda: not self._workers, timeout)

    def _start(self) -> None:
        """With the lock held: another worker, if there may be one."""
        if self._closed or len(self._workers) >= self._limit:
            return
        worker = _Worker()
        self._started += 1
        # Not one of those that the interpreter waits for when it exits.
        worker.thread = threading.Thread(
            target=self._serve, args=(worker,), name=f"{self._name}-{self._started}", daemon=True
        )
        self._workers.add(worker)
        try:
            worker.thread.start()
        except RuntimeError:  # no more threads on this machine, or the interpreter exits: those that there are go on
            self._workers.discard(worker)

    def _serve(self, worker: _Worker) -> None:
        while True:
            job = self._take(worker)
            if job is None:
                return
            try:
                self._run(job[0])
            except BaseException:
                threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), worker.thread)))
            with self._lock:
                if worker.abandoned:
                    return
                del self._running[id(job[0])]
            del job  # it may hold much memory, and the next one may be long in coming

    def _take(self, worker: _Worker) -> tuple[T] | None:
        """The next job, once there is one that may start; None when there will be none."""
        with self._lock:
            while True:
                job = self._next()
                if job is not None:
                    self._running[id(job[0])] = worker
                    return job
                if self._closed:
                    self._workers.discard(worker)
                    self._ended.notify_all()
                    return None
                self._free += 1
                try:
                    self._work.wait()
                finally:
                    self._free -= 1

    def _next(self) -> tuple[T] | None:
        if self._urgent:
            return (self._urgent.popleft(),)
        if self._waiting and self._may_start(self._waiting[0]):
            return (self._waiting.popleft(),)
        return None
