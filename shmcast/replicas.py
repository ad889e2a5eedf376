"""`Replicas`: what a rank materializes itself because every rank does, in the background or at once."""

import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from . import lockstep
from .errors import MaterializeError, without_frames
from .in_place import InPlace
from .materializing import call, out_parameter
from .pool import Pool
from .tally import Tally

_GRACE_S = 10.0
"""How long a materialization that nobody waits for any more may keep its worker."""


class _Replica:
    """One request that every rank materializes. Its fields change under the lock of its `Replicas`."""

    __slots__ = ("dropped", "ended", "error", "raw", "serial", "started", "value")

    def __init__(self, serial: int, raw: Any) -> None:
        self.serial = serial
        self.raw = raw
        self.started = self.ended = self.dropped = False
        self.value: Any = None
        self.error: BaseException | None = None


class Watch(Protocol):
    """Who wants to know how far requests are, by their serial numbers; called in any thread."""

    def started(self, serial: int) -> None:
        """A worker has begun with it."""

    def made(self, serial: int) -> None:
        """`Replicas.take` would not wait for it any more, or would make it."""


class Replicas:
    """Requests that have begun on this rank, until their values are taken or nobody wants them any more."""

    def __init__(
        self,
        materialize: Callable[..., Any],
        *,
        workers: int,
        tally: Tally,
        watch: Watch | None = None,
    ) -> None:
        """``workers``: threads; 0: everything is materialized in the thread that takes it."""
        self._materialize = materialize
        self._out_name = out_parameter(materialize)
        self._workers = workers
        self._tally = tally
        self._watch = watch
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._begun: dict[int, _Replica] = {}
        self._pool: Pool[_Replica] | None = None
        self._late: dict[_Replica, float] = {}  # when the workers of what was dropped are given up

    def begin(self, serial: int, raw: Any) -> None:
        """Materialize a request in the background. Where no thread can be had, `take` says so."""
        replica = _Replica(serial, raw)
        self.expire()
        with self._lock:
            self._begun[serial] = replica
            if self._workers and self._pool is None:
                self._pool = Pool(self._run, self._workers, name="shmcast-replica")
            pool = self._pool
        if pool is not None:
            try:
                pool.put(replica)
            except RuntimeError as error:
                self.fail(serial, error)
        else:
            self._say_made(serial)  # as far as it goes without a thread

    def fail(self, serial: int, error: Exception) -> None:
        """A request that can not be begun: `take` raises this."""
        replica = _Replica(serial, None)
        replica.started = replica.ended = True
        replica.error = without_frames(error)
        with self._lock:
            self._begun[serial] = replica
        self._say_made(serial)

    def has(self, serial: int) -> bool:
        """Whether a request has begun, and its value was not taken."""
        return serial in self._begun

    def take(self, serial: int, timeout: float) -> Any:
        """The value of what has begun; waits for it. Raises what materializing raised, and TimeoutError."""
        until = time.monotonic() + timeout
        with self._lock:
            replica = self._begun.get(serial)
            if replica is None:
                raise RuntimeError(f"request {serial} (counted from 0) has not begun on this rank")
            here = self._pool is None and not replica.started
            if here:
                replica.started = True
        if here:
            self._make(replica, here=True)
        done = self._wait(replica, until)
        with self._lock:
            self._begun.pop(serial, None)
            replica.dropped = True
            value, replica.value = replica.value, None
            error, replica.error = replica.error, None
        if not done:
            self._abandon(replica)
            raise TimeoutError(f"not materialized on this rank, which has waited for it for {timeout:.3g} s")
        if error is not None:
            raise error
        return value

    def _wait(self, replica: _Replica, until: float) -> bool:
        """Whether it ends until then. Meanwhile too, workers are given up: one of them may be what it waits for."""
        while True:
            self.expire()
            with self._lock:
                now = time.monotonic()
                if replica.ended or now >= until:
                    return replica.ended
                self._changed.wait(min(min([until, *self._late.values()]) - now, threading.TIMEOUT_MAX))

    def now(self, raw: Any) -> Any:
        """Materialize a raw request in this thread."""
        began_ns = time.monotonic_ns()
        place = InPlace(None, tokens=(), keep=False, grant_timeout=None)
        try:
            return call(self._materialize, raw, self._out_name, place.array)
        finally:
            place.end()
            self._tally.observe("replicas_ns", time.monotonic_ns() - began_ns)

    def drop(self, serial: int, grace: float = _GRACE_S) -> None:
        """Nobody wants it any more: what runs goes on alone, and after ``grace`` seconds another worker takes its place. Nothing
        where it has not begun."""
        with self._lock:
            replica = self._begun.pop(serial, None)
            if replica is None:
                return
            replica.dropped = True
            replica.raw = replica.value = replica.error = None
            if replica.started and not replica.ended:
                self._late[replica] = time.monotonic() + grace
        self.expire()

    def close(self) -> None:
        """Forget everything; what runs is not waited for. Idempotent."""
        with self._lock:
            for replica in self._begun.values():
                replica.dropped = True
                replica.raw = replica.value = replica.error = None
            self._begun.clear()
            pool = self._pool
        if pool is not None:
            pool.close()

    def expire(self) -> None:
        """Give up the workers whose time has come; to be called now and then."""
        now = time.monotonic()
        with self._lock:
            gone = [replica for replica, until in self._late.items() if replica.ended or until <= now]
            for replica in gone:
                del self._late[replica]
        for replica in gone:
            self._abandon(replica)

    def _abandon(self, replica: _Replica) -> None:
        if not replica.ended and self._pool is not None and self._pool.abandon(replica):
            self._tally.add("abandoned_workers")

    def _run(self, replica: _Replica) -> None:
        with self._lock:
            if replica.dropped:
                return
            replica.started = True
        if self._watch is not None:
            self._watch.started(replica.serial)
        self._make(replica)
        if not replica.dropped:
            self._say_made(replica.serial)

    def _say_made(self, serial: int) -> None:
        if self._watch is not None:
            self._watch.made(serial)

    def _make(self, replica: _Replica, here: bool = False) -> None:
        """``here``: in the thread that takes it, where an interrupt is meant for whoever waits there."""
        value: Any = None
        error: BaseException | None = None
        raw, replica.raw = replica.raw, None
        try:
            value = self.now(raw)
        except BaseException as failure:
            if isinstance(failure, Exception):
                error = without_frames(failure)
            elif here and isinstance(failure, KeyboardInterrupt):
                error = failure
            else:  # what ends a program or a thread where it is raised on purpose ends one request here
                error = MaterializeError.of(replica.serial, *lockstep.failure_of(failure))
        with self._lock:
            if not replica.dropped:
                replica.value, replica.error = value, error
            replica.ended = True
            self._changed.notify_all()
