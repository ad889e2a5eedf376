"""`Replicas`: what a rank materializes itself because every rank does, in the background or at once."""

import threading
import time
from collections.abc import Callable
from typing import Any

from .errors import without_frames
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


class Replicas:
    """Requests that have begun on this rank, until their values are taken or nobody wants them any more."""

    def __init__(
        self,
        materialize: Callable[..., Any],
        *,
        workers: int,
        tally: Tally,
        ended: Callable[[int], object] = lambda serial: None,
    ) -> None:
        """``workers``: threads; 0: everything is materialized in the thread that takes it. ``ended``: called with the serial
        number of what has been materialized, or has failed, in the background."""
        self._materialize = materialize
        self._out_name = out_parameter(materialize)
        self._workers = workers
        self._tally = tally
        self._ended = ended
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._begun: dict[int, _Replica] = {}
        self._pool: Pool[_Replica] | None = None
        self._late: dict[_Replica, float] = {}  # when the workers of what was dropped are given up

    def begin(self, serial: int, raw: Any) -> None:
        """Materialize a request in the background. RuntimeError where no thread can be had."""
        replica = _Replica(serial, raw)
        self._expire()
        with self._lock:
            self._begun[serial] = replica
            if self._workers and self._pool is None:
                self._pool = Pool(self._run, self._workers, name="shmcast-replica")
            pool = self._pool
        if pool is not None:
            try:
                pool.put(replica)
            except BaseException:
                self.drop(serial, 0.0)
                raise
        else:
            self._ended(serial)  # as far as it goes without a thread

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
            self._make(replica)
        with self._lock:
            done = self._changed.wait_for(
                lambda: replica.ended, min(max(until - time.monotonic(), 0.0), threading.TIMEOUT_MAX)
            )
            del self._begun[serial]
            replica.dropped = True
            value, replica.value = replica.value, None
            error, replica.error = replica.error, None
        if not done:
            self._abandon(replica)
            raise TimeoutError(f"not materialized on this rank {timeout} s after the entry rank had it")
        if error is not None:
            raise error
        return value

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
        self._expire()

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

    def _expire(self) -> None:
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
        self._make(replica)
        if not replica.dropped:
            self._ended(replica.serial)

    def _make(self, replica: _Replica) -> None:
        value, error = None, None
        raw, replica.raw = replica.raw, None
        try:
            value = self.now(raw)
        except BaseException as failure:
            error = without_frames(failure) if isinstance(failure, Exception) else failure
        with self._lock:
            if not replica.dropped:
                replica.value, replica.error = value, error
            replica.ended = True
            self._changed.notify_all()
