"""What the entry rank does with raw requests until their ends go out in a message.

How a request goes on the entry rank (others only count it, from `submit` to its outcome)::

     submit: caller                                                              step, collect, cast, close:
          │                                                                      the one thread of the group
          │      None, refused, too large
          ├──────────────────────────────────────────────────────┐
          ▼                          cancel: caller              ▼          pack                 unpack
       queued ────────────────────────────────────────────────► ready ──────────────► taken ──────────────► ended
          │                                                      ▲ │
          │ start: worker                                        │ └─ cancel: caller; what was published is
          │ (the group's thread where it is executor="inline")   │    withdrawn, the end is another
          ▼       materialized and published, or failed: worker  │
       running ──────────────────────────────────────────────────┤
          │                          cancel: caller              │
          ├──────────────────────────────────────────────────────┤
          │                  out of time: the group's thread     │
          └──────────────────────────────────────────────────────┘
              and its worker goes on alone: what it brings is withdrawn by it; if it is out of time, or does not come
              back soon after a cancel, another worker takes its place

Where there is a cache, two states come before "queued", and can be cancelled like it::

       submit ──► asked ──────────► ready      clerk: an equal one has been answered
                    │ └───────────► queued     clerk: nothing is known, or it has no key
                    ▼ clerk: an equal one is queued or running, its leader
                 waiting ─────────► ready      worker: the leader has ended with a value, or None
                      └───────────► queued     whoever ends the leader without; the first that waits leads the others now

The clerk is a thread of its own, so what is known waits for no worker (the group's thread where executor="inline").

"ready" knows its end: a value (published, a part of the next message), None, an error, cancelled. From "taken" on nothing
changes it any more, because some rank may have it. So each request has exactly one end, which the entry rank decides, and
each message says in which order they come. The other ranks do what it says and nothing else.

One lock guards all states. It is never held while a request is materialized or published, nor while something is withdrawn.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

from . import lockstep
from .cache import VALUES, Kept
from .codec import Encoded
from .desk import Desk
from .lockstep import Failure, Record
from .materializing import Made, Maker
from .modes import DEFAULT_ROUTE, Route, Way
from .parts import LAST_BIT
from .pool import Pool
from .request import ASKED, QUEUED, READY, RUNNING, TAKEN, WAITING, Request
from .sizes import format_bytes
from .tally import Tally

MAX_VALUES = LAST_BIT + 1
"""So many values a message, so that one that can not be rebuilt somewhere fails alone."""
_CANCEL_GRACE_S = 10.0
"""How long a materialization that nobody waits for any more may keep its worker."""
_NOT_STARTED = (ASKED, WAITING, QUEUED)
"""States of requests whose raw data is here."""


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
        desk: Desk | None = None,
    ) -> None:
        """``workers``: threads; 0: `work` materializes in its caller's thread. ``desk``: where there is a cache: a thread more
        asks it, so that what is known waits for no worker."""
        self._maker = maker
        self._desk = desk
        self._max_bytes = max_bytes
        self._tally = tally
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._requests: dict[int, Request] = {}  # all that are not taken, by serial number
        self._ready: dict[int, Request] = {}  # in the order in which they became so
        self._running: dict[int, Request] = {}  # whose workers are not given up, cancelled ones included
        self._asked: deque[Request] = deque()  # of `work`, as the next
        self._queue: deque[Request] = deque()
        self._raw_bytes = 0
        self._result_bytes = 0
        self._unfinished = 0
        self._closed = False
        self._event: int | None = None
        self._lasts = False  # whether the descriptor stays though this is closed
        self._shown = False  # whether it is to be readable though nothing is here
        self._pool = Pool(self._run, workers, may_start=self._may_start, name="shmcast-worker") if workers else None
        self._clerk = Pool(self._ask, 1, name="shmcast-clerk") if workers and desk is not None else None

    @property
    def inflight_bytes(self) -> int:
        """Of raw requests that are not materialized, and of results that are not taken."""
        return self._raw_bytes + self._result_bytes

    @property
    def unfinished(self) -> int:
        """How many requests have not ended."""
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
        request = Request(serial, rid, raw, timeout, urgent, route)
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
                self._enqueue(request, raw_bytes)
            self._level()

    def _enqueue(self, request: Request, raw_bytes: int) -> None:
        request.raw_bytes = raw_bytes
        self._raw_bytes += raw_bytes
        self._unfinished += 1
        if self._desk is None or request.route.way is not Way.SHM:
            self._queue_up(request)
        else:
            request.state = ASKED
            self._put(request, self._clerk, self._asked)

    def _queue_up(self, request: Request) -> None:
        """With the lock held: it is to be materialized."""
        request.state = QUEUED
        self._put(request, self._pool, self._queue)

    def _put(self, request: Request, pool: "Pool[Request] | None", queue: deque[Request]) -> None:
        if pool is None:
            queue.append(request)
            self._signal()
            return
        try:
            pool.put(request, urgent=request.urgent)
        except RuntimeError as error:
            failure = lockstep.failure_of(error)
            for each in (request, *self._landed(request)):  # nor would there be a thread for the next of them
                self._settle(each, lockstep.FAILED, failure=failure)

    def room(self, raw_bytes: int) -> bool:
        """Whether so many bytes more are within the limit. What is alone in flight always is."""
        return self._max_bytes is None or not self.inflight_bytes or self.inflight_bytes + raw_bytes <= self._max_bytes

    @property
    def empty(self) -> bool:
        """Whether nothing is here that `take` would ever give."""
        return not self._requests

    @property
    def goes_on(self) -> bool:
        """Whether something is to end by itself: otherwise it takes a message, or `work`, to make room."""
        if self._pool is None or not self._unfinished:
            return False
        if self._running or self._max_bytes is None or self._result_bytes < self._max_bytes:
            return True
        return any(each.urgent and each.state in _NOT_STARTED for each in self._requests.values())

    def wait_room(
        self, raw_bytes: int, max_unfinished: int, timeout: float, *, only_while_it_goes_on: bool = False
    ) -> bool:
        """Wait for `room`, and for fewer than so many requests that are not materialized."""

        def there_is() -> bool:
            if only_while_it_goes_on and not self.goes_on:
                return True
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
        began_ns = time.monotonic_ns()
        made = self._maker.make(request, raw, partial(self.started, request.serial))
        del raw
        if request.route.way is not Way.RAW:  # which every rank materializes, and counts, itself
            self._tally.observe("materialize_ns", time.monotonic_ns() - began_ns)
        end, part, failure, interrupt = made
        kept = None
        try:
            kept = self._keep(request, made)
        except BaseException as error:  # what was made is as good as without a cache
            interrupt = interrupt or _interrupt(error)
        joined: list[Request] = []
        with self._lock:
            self._running.pop(request.serial, None)
            self._drop_raw(request)
            if request.state == RUNNING:
                if kept is not None:
                    joined = self._landed(request)
                self._settle(request, end, part, failure)
                self._tally.add("materialized_bytes", 0 if part is None else part.array_bytes)
                part = None
            self._level()
        if part is not None:
            part.withdraw()  # nobody wants it any more
        for each in joined:
            interrupt = self._answer(each, kept) or interrupt
        return interrupt

    def work(self, until: float, serials: Sequence[int] | None = None) -> None:
        """Without workers: materialize here, first come first served, until then, or until results take the bytes that may be
        in flight; of ``serials`` all, whatever the limit."""
        if self._pool is not None:
            return
        with self._lock:
            urgent = [self._requests[serial] for serial in serials or () if serial in self._requests]
        for request in urgent:
            while request.state in _NOT_STARTED:
                if time.monotonic() >= until:
                    return
                self._work_on(request)
        while serials is None and time.monotonic() < until:
            with self._lock:
                if self._asked:
                    request = self._asked.popleft()
                elif self._queue and self._may_start(self._queue[0]):
                    request = self._queue.popleft()
                else:
                    return
            self._work_on(request)

    def _work_on(self, request: Request) -> None:
        leader = None
        with self._lock:
            if self._desk is not None and request.state == WAITING:
                leader = self._desk.leader(request)
        interrupt = self._ask(request) if request.state == ASKED else self._run(leader or request)
        if interrupt is not None:
            raise interrupt

    # ---- what is known already

    def _ask(self, request: Request) -> BaseException | None:
        """On the clerk's thread, or in `work`: what is to be done for a request that has come. Returns as `_run` does."""
        desk = self._desk
        with self._lock:
            raw = request.raw
            if request.state != ASKED or desk is None:
                return None
        try:
            key = desk.key(raw)
        except BaseException as error:
            self._end([request.serial], lockstep.FAILED, lockstep.failure_of(error))
            return _interrupt(error)
        del raw
        with self._lock:
            if request.state != ASKED:
                return None
            kept, leader = desk.ask(request, key)
            if leader is not None:
                request.state = WAITING
                if request.urgent and self._pool is not None:
                    self._pool.hasten(leader)
            elif kept is None:
                self._queue_up(request)
        return None if kept is None else self._answer(request, kept)

    def _keep(self, request: Request, made: Made) -> Kept | None:
        """What can be sent again for whoever has waited for this one; None: they have to go on without. Raises where the arena
        has ended, or no mapping can be had."""
        if self._desk is None or request.key is None or request.state != RUNNING or made.end not in VALUES:
            return None
        return self._desk.cache.keep(request.key, made.end, made.part)

    def _answer(self, request: Request, kept: Kept | None) -> BaseException | None:
        """End a request that has not started with what an equal one has given. Returns as `_run` does."""
        if self._desk is None or kept is None:
            return None
        end, part, failure, interrupt = kept.end, None, None, None
        try:
            if request.state in _NOT_STARTED and kept.end == lockstep.VALUE:
                part = self._desk.cache.send(kept)
        except BaseException as error:
            end, failure, interrupt = lockstep.FAILED, lockstep.failure_of(error), _interrupt(error)
        with self._lock:
            if request.state in _NOT_STARTED:
                self._settle(request, end, part, failure, known=True)
                part = None
            self._level()
        if part is not None:
            part.withdraw()
        return interrupt

    def _landed(self, request: Request) -> list[Request]:
        """With the lock held: who has waited for it, if anybody has."""
        return [] if self._desk is None else self._desk.land(request)

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
                if request.state == RUNNING:
                    latest = time.monotonic() + _CANCEL_GRACE_S
                    request.deadline = latest if request.deadline is None else min(request.deadline, latest)
                self._settle(request, end, failure=failure)
            self._level()
        for part in parts:
            part.withdraw()

    def _settle(
        self,
        request: Request,
        end: int,
        part: Encoded | None = None,
        failure: Failure | None = None,
        known: bool = False,
    ) -> None:
        """With the lock held: how a request ends, if that does not change before it is taken. ``known``: what the blocks of
        the value take has been counted for an equal one, or by the cache."""
        if request.state in _NOT_STARTED:
            request.raw = None
            self._drop_raw(request)
        if request.state in (*_NOT_STARTED, RUNNING):
            self._unfinished -= 1
        self._result_bytes -= request.result_bytes
        request.result_bytes = 0 if part is None else len(part.blob) + (0 if known else part.published_bytes)
        self._result_bytes += request.result_bytes
        request.state = READY
        request.end, request.part, request.failure, request.expired = end, part, failure, False
        self._ready[request.serial] = request
        self._signal()
        self._changed.notify_all()
        following = None if self._desk is None else self._desk.next(request)
        if following is not None:
            self._queue_up(following)

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
        """A worker has begun with it: its time counts from here on. From any thread."""
        with self._lock:
            request = self._running.get(serial)
            if request is not None and request.state == RUNNING and request.timeout is not None:
                request.deadline = time.monotonic() + request.timeout
                self._changed.notify_all()  # who waits, waits until then at most

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
            for queue, state in ((self._asked, ASKED), (self._queue, QUEUED)):
                while queue and queue[0].state != state:  # it has ended, or a cast has made it
                    queue.popleft()
            if self._ready or self._asked or self._queue or self._shown:
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
            self._asked.clear()
            self._queue.clear()
            self._raw_bytes = self._result_bytes = self._unfinished = 0
            self._lasts = self._shown = shown
            self._signal()
            if not shown and self._event is not None:
                event, self._event = self._event, None
                os.close(event)
            self._level()
            self._changed.notify_all()
        for pool in (self._clerk, self._pool):
            if pool is not None:
                pool.close()
        self._maker.close()
        if self._desk is not None:
            self._desk.close()
        for part in parts:
            part.withdraw()

    def _level(self) -> None:
        """With the lock held: after something has changed."""
        self._tally.level("inflight_bytes", self.inflight_bytes)
        if self._pool is not None and self._max_bytes is not None:
            self._pool.nudge()


def _interrupt(error: BaseException) -> BaseException | None:
    """What is to be raised in the caller's thread too, if it is the caller's."""
    return error if isinstance(error, KeyboardInterrupt) else None
