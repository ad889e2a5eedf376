"""What the entry rank does with raw requests until their ends go out in a message: see the diagram in `caster`.

One lock guards all states. It is never held while a request is materialized or published, nor while something is withdrawn.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from . import lockstep
from .codec import Encoded
from .lockstep import Failure, Record
from .materializing import Maker
from .modes import DEFAULT_ROUTE, Route, Way
from .parts import LAST_BIT
from .pool import Pool
from .request import QUEUED, READY, RUNNING, TAKEN, Request
from .sizes import format_bytes
from .tally import Tally

MAX_VALUES = LAST_BIT + 1
"""So many values a message, so that one that can not be rebuilt somewhere fails alone."""
_CANCEL_GRACE_S = 10.0
"""How long a materialization that nobody waits for any more may keep its worker."""


class Taken(NamedTuple):
    """What a message says of a request, and the part that goes with it."""

    record: Record
    part: Encoded | None


class Intake:
    """The requests of the entry rank, from `admit` to `take`, and who materializes them."""

    def __init__(
        self,
        maker: Maker,
        *,
        workers: int,
        max_bytes: int | None,
        tally: Tally,
    ) -> None:
        """``workers``: threads; 0: `work` materializes in its caller's thread."""
        self._maker = maker
        self._max_bytes = max_bytes
        self._tally = tally
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._requests: dict[int, Request] = {}  # all that are not taken, by serial number
        self._ready: dict[int, Request] = {}  # in the order in which they became so
        self._running: dict[int, Request] = {}  # whose workers are not given up, cancelled ones included
        self._queue: deque[Request] = deque()  # of `work`
        self._raw_bytes = 0
        self._result_bytes = 0
        self._unfinished = 0
        self._closed = False
        self._event: int | None = None
        self._lasts = False  # whether the descriptor stays though this is closed
        self._shown = False  # whether it is to be readable though nothing is here
        self._pool = Pool(self._run, workers, may_start=self._may_start, name="shmcast-worker") if workers else None

    @property
    def inflight_bytes(self) -> int:
        """Of raw requests that are not materialized, and of results that are not taken."""
        return self._raw_bytes + self._result_bytes

    @property
    def unfinished(self) -> int:
        """How many requests wait for a worker or have one."""
        return self._unfinished

    # ---- in

    def admit(
        self,
        serial: int,
        rid: Hashable,
        raw: Any,
        *,
        raw_bytes: int,
        timeout: float | None,
        route: Route = DEFAULT_ROUTE,
        urgent: bool = False,
        refusal: str = "",
    ) -> None:
        """Take a request on. ``route``: which way it goes. ``urgent``: before all others, whatever is in flight. ``refusal``:
        why it is not to be materialized, if it is not."""
        request = Request(serial, rid, raw, timeout, route)
        with self._lock:
            self._requests[serial] = request
            if raw is None:
                self._settle(request, lockstep.NONE)
            elif refusal:
                self._settle(request, lockstep.REFUSED, failure=Failure("", refusal, ""))
            elif self._max_bytes is not None and raw_bytes > self._max_bytes:
                text = f"{format_bytes(raw_bytes)} of raw data are more than max_inflight_bytes, {format_bytes(self._max_bytes)}"
                self._settle(request, lockstep.FAILED, failure=Failure("ValueError", text, ""))
            elif route.way is Way.REPLICATE:
                request.raw = None  # every rank keeps its own
                request.raw_bytes = raw_bytes
                self._raw_bytes += raw_bytes
                self._settle(request, lockstep.OWN if route.sync else lockstep.BEGIN_OWN)
            else:
                self._enqueue(request, raw_bytes, urgent)
            self._level()

    def _enqueue(self, request: Request, raw_bytes: int, urgent: bool) -> None:
        request.state = QUEUED
        request.raw_bytes = raw_bytes
        self._raw_bytes += raw_bytes
        self._unfinished += 1
        if self._pool is None:
            self._queue.append(request)
            self._signal()
            return
        try:
            self._pool.put(request, urgent=urgent)
        except RuntimeError as error:
            request.raw = None
            self._drop_raw(request)
            self._settle(request, lockstep.FAILED, failure=lockstep.failure_of(error))

    def room(self, raw_bytes: int) -> bool:
        """Whether so many bytes more are within the limit. What is alone in flight always is."""
        return self._max_bytes is None or not self.inflight_bytes or self.inflight_bytes + raw_bytes <= self._max_bytes

    def wait_room(self, raw_bytes: int, max_unfinished: int, timeout: float) -> bool:
        """Wait for `room`, and for fewer than so many requests that are not materialized."""

        def there_is() -> bool:
            return self._closed or (self._unfinished < max_unfinished and self.room(raw_bytes))

        return self._wait(there_is, time.monotonic() + timeout)

    # ---- materialize

    def _may_start(self, request: Request) -> bool:
        """Asked by the pool, which holds its lock: no other one is taken. Results that wait to be taken wait for a message
        only, so this can not last."""
        return self._max_bytes is None or self._result_bytes < self._max_bytes

    def _run(self, request: Request) -> BaseException | None:
        """On a worker, or in `work`. Returns what is to be raised in the caller's thread, if it is the caller's."""
        with self._lock:
            if request.state != QUEUED:
                return None
            request.state = RUNNING
            self._running[request.serial] = request
            raw, request.raw = request.raw, None
            if request.timeout is not None and self._pool is not None:
                request.deadline = time.monotonic() + request.timeout
                self._changed.notify_all()  # who waits, waits until then at most
        began_ns = time.monotonic_ns()
        end, part, failure, interrupt = self._maker.make(request, raw)
        del raw
        self._tally.observe("materialize_ns", time.monotonic_ns() - began_ns)
        with self._lock:
            self._running.pop(request.serial, None)
            self._drop_raw(request)
            if request.state == RUNNING:
                self._settle(request, end, part, failure)
                self._tally.add("materialized_bytes", 0 if part is None else part.array_bytes)
                part = None
            self._level()
        if part is not None:
            part.withdraw()  # nobody wants it any more
        return interrupt

    def work(self, until: float, serials: Sequence[int] | None = None) -> None:
        """Without workers: materialize here, first come first served, until then, or until results take the bytes that may be
        in flight; of ``serials`` all, whatever the limit."""
        if self._pool is not None:
            return
        with self._lock:
            urgent = [self._requests[serial] for serial in serials or () if serial in self._requests]
        for request in urgent:
            if time.monotonic() >= until:
                return
            self._run_here(request)
        while serials is None and time.monotonic() < until:
            with self._lock:
                if not self._queue or not self._may_start(self._queue[0]):
                    return
                request = self._queue.popleft()
            self._run_here(request)

    def _run_here(self, request: Request) -> None:
        interrupt = self._run(request)
        if interrupt is not None:
            raise interrupt

    # ---- ends

    def cancel(self, serials: Iterable[int]) -> None:
        """End these as cancelled, as far as they are not taken."""
        self._end(serials, lockstep.CANCELLED)

    def fail_unfinished(self, error: BaseException) -> None:
        """End as failed what is not materialized yet."""
        self._end(None, lockstep.FAILED, lockstep.failure_of(error))

    def _end(self, serials: Iterable[int] | None, end: int, failure: Failure | None = None) -> None:
        """``serials``: None: all that are not ready."""
        parts: list[Encoded] = []
        with self._lock:
            if serials is None:
                serials = [serial for serial, request in self._requests.items() if not request.ready]
            for serial in serials:
                request = self._requests.get(serial)
                if request is None:
                    continue
                if request.part is not None:
                    parts.append(request.part)
                if request.route.way.everywhere:
                    self._drop_raw(request)
                if request.state == QUEUED:
                    request.raw = None
                    self._drop_raw(request)
                elif request.state == RUNNING:
                    latest = time.monotonic() + _CANCEL_GRACE_S
                    request.deadline = latest if request.deadline is None else min(request.deadline, latest)
                self._settle(request, end, failure=failure)
            self._level()
        for part in parts:
            part.withdraw()

    def _settle(self, request: Request, end: int, part: Encoded | None = None, failure: Failure | None = None) -> None:
        """With the lock held: how a request ends, if that does not change before it is taken."""
        if request.state in (QUEUED, RUNNING):
            self._unfinished -= 1
        self._result_bytes -= request.result_bytes
        request.result_bytes = 0 if part is None else part.published_bytes + len(part.blob)
        self._result_bytes += request.result_bytes
        request.state = READY
        request.end, request.part, request.failure, request.expired = end, part, failure, False
        self._ready[request.serial] = request
        self._signal()
        self._changed.notify_all()

    def _expire(self) -> None:
        """With the lock held: give up the workers whose time has come."""
        now = time.monotonic()
        for request in list(self._running.values()):
            if request.deadline is None or request.deadline > now or self._pool is None:
                continue
            del self._running[request.serial]
            self._drop_raw(request)
            if self._pool.abandon(request):
                self._tally.add("abandoned_workers")
            self._maker.give_up(request)
            if request.state == RUNNING:
                text = f"not materialized within {request.timeout} s; its worker was given up"
                self._settle(request, lockstep.FAILED, failure=Failure("TimeoutError", text, ""))
                request.expired = True

    def _drop_raw(self, request: Request) -> None:
        self._raw_bytes -= request.raw_bytes
        request.raw_bytes = 0

    # ---- out

    def any_ready(self) -> bool:
        """Whether `take` would give something."""
        with self._lock:
            if self._running:
                self._expire()
            return bool(self._ready)

    def wait(self, until: float, serials: Sequence[int] | None = None) -> bool:
        """Wait until something is ready, or all of ``serials``; False if it is not by then."""
        if serials is None:
            return self._wait(lambda: bool(self._ready), until)
        left = list(serials)

        def all_ready() -> bool:
            while left and left[-1] in self._ready:
                left.pop()
            return not left

        return self._wait(all_ready, until)

    def _wait(self, condition: Callable[[], bool], until: float) -> bool:
        with self._lock:
            while True:
                self._expire()
                if self._closed or condition():
                    return True
                now = time.monotonic()
                if now >= until:
                    return False
                deadlines = [request.deadline for request in self._running.values() if request.deadline is not None]
                left = min([until, *deadlines]) - now
                self._changed.wait(min(max(left, 0.0), threading.TIMEOUT_MAX))

    def take(self, serials: Sequence[int] | None = None) -> list[Taken]:
        """What goes into the next message: what is ready, in that order, or ``serials``, or as much of either as one message
        takes. It is the caller's from here on."""
        requests: list[Request] = []
        values = 0
        with self._lock:
            self._expire()
            ready = self._ready.values() if serials is None else [self._ready[serial] for serial in serials]
            for request in ready:
                values += request.end in lockstep.CAN_FAIL
                # What is to be in this message is in it, but for what a rank may well fail at, each of which is to fail alone.
                whatever = not request.route.way.everywhere and (serials is not None or request.route.sync)
                if whatever or values <= MAX_VALUES - request.route.way.everywhere:
                    requests.append(request)
                elif serials is not None:
                    break
            # As they are now: what only begins with this message may be cancelled before it is made.
            taken = [Taken(request.record, request.part) for request in requests]
            for request in requests:
                del self._ready[request.serial]
                if request.end in lockstep.BEGINS:
                    self._begin_everywhere(request)
                else:
                    del self._requests[request.serial]
                    if request.route.way.everywhere:
                        self._drop_raw(request)  # of others a worker may have it still
                    request.state = TAKEN
                if request.expired:
                    self._tally.add("outcomes_timeout")
                self._result_bytes -= request.result_bytes
                request.result_bytes = 0
            self._signal()
            self._level()
        return taken

    def _begin_everywhere(self, request: Request) -> None:
        """With the lock held: every rank materializes it from here on, this one too, and `made` says when it is done."""
        if not request.raw_bytes:  # it went raw: as much as was sent
            request.raw_bytes = request.result_bytes
            self._raw_bytes += request.raw_bytes
        # Not yet: its time is counted from when a worker has it.
        request.state, request.part, request.deadline = RUNNING, None, None
        self._unfinished += 1
        self._running[request.serial] = request

    def started(self, serial: int) -> None:
        """Of what every rank materializes: a worker of this one has begun with it. From any thread."""
        with self._lock:
            request = self._running.get(serial)
            if request is not None and request.state == RUNNING and request.timeout is not None:
                request.deadline = time.monotonic() + request.timeout
                self._changed.notify_all()

    def made(self, serial: int) -> None:
        """Of what every rank materializes: this one is done with it. From any thread."""
        with self._lock:
            request = self._running.pop(serial, None)
            if request is not None and request.state == RUNNING:
                self._drop_raw(request)
                self._settle(request, lockstep.BEGUN)

    def fileno(self) -> int:
        """A descriptor that is readable while something is ready, or is for `work` to do. Made when first asked for."""
        with self._lock:
            if self._closed and not self._lasts:
                raise ValueError("fileno: the caster is closed")
            if self._event is None:
                self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                self._signal()
            return self._event

    def _signal(self) -> None:
        """With the lock held: have the descriptor show how things are."""
        if self._event is not None:
            with suppress(BlockingIOError):  # it is empty already
                os.eventfd_read(self._event)
            if self._ready or self._queue or self._shown:
                os.eventfd_write(self._event, 1)

    def may_hang(self) -> bool:
        """Whether all that is being materialized may take any time."""
        with self._lock:
            return all(request.deadline is None for request in self._running.values())

    def show(self, ready: bool) -> None:
        """After `close` with ``shown``: have the descriptor be readable, or not."""
        with self._lock:
            self._shown = ready
            self._signal()

    def close(self, shown: bool = False) -> None:
        """Forget everything, and take back what was prepared. What is being materialized goes on and is taken back when it
        comes. Idempotent. ``shown``: the descriptor stays, and is readable until `show` or another `close`."""
        with self._lock:
            self._closed = True
            parts = [request.part for request in self._requests.values() if request.part is not None]
            for request in [*self._requests.values(), *self._running.values()]:
                request.state = TAKEN
                request.raw = None
                request.raw_bytes = 0
            self._requests.clear()
            self._ready.clear()
            self._queue.clear()
            self._raw_bytes = self._result_bytes = self._unfinished = 0
            self._lasts = self._shown = shown
            self._signal()
            if not shown and self._event is not None:
                event, self._event = self._event, None
                os.close(event)
            self._level()
            self._changed.notify_all()
        if self._pool is not None:
            self._pool.close()
        self._maker.close()
        for part in parts:
            part.withdraw()

    def _level(self) -> None:
        """With the lock held: after something has changed."""
        self._tally.level("inflight_bytes", self.inflight_bytes)
        if self._pool is not None and self._max_bytes is not None:
            self._pool.nudge()
