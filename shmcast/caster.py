"""`Caster`: raw requests in, the same outcomes on every rank, materialized once.

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

Who does what: `intake` has these states, `pool` the workers, `desk` who waits for whom, `cache` what is kept, `lockstep` the
bytes, `group` moves them.
"""

import os
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal, TypeAlias

from . import _native, lockstep
from .content import Hash
from .desk import CacheKey, make_desk
from .errors import BackpressureError, GroupError, HandleError, MaterializeError, shown
from .group import Group, Received
from .intake import Intake
from .ledger import Ledger
from .lockstep import Head, Record
from .materializing import Here
from .outcome import Outcome
from .request import size_of
from .sizes import format_bytes, parse_bytes
from .tally import Tally

Predicate: TypeAlias = Callable[[Any], bool]
OnFull: TypeAlias = Literal["block", "raise", "shed"]

_CALLS = {lockstep.STEP: "step", lockstep.CAST: "cast"}
_MAX_WORKERS = 4
_LONGEST_SILENCE_S = 10.0
"""A rank that waits for a materialization hears from the entry rank at least this often, and in a third of the time that it
would wait at all: a long materialization is not to be taken for a dead entry rank."""
_HUNG_S = 30.0
"""If nothing gets ready for so long, `Caster.close` waits no longer."""


class Caster:
    """Materializes requests on the entry rank of a group, in the background, and gives every rank the same outcomes.

    On all ranks the same calls in the same order: `submit` and `cast` with the same ids, and `step`, `apply`, `cast` and
    `close`, each from one thread at a time. `submit`, `cancel` and `pending` may be called from any thread, as long as that
    order is kept. Not for forked children. Close it before its group, or use it as a context manager."""

    def __init__(
        self,
        group: Group,
        materialize: Callable[..., Any],
        *,
        executor: Literal["thread", "inline"] = "thread",
        workers: int | None = None,
        max_pending: int = 4096,
        max_inflight_bytes: int | str | None = None,
        on_full: OnFull = "raise",
        block_timeout: float = 5.0,
        timeout: float | None = None,
        hash: Hash = True,
        cache_bytes: int | str | None = None,
        cache_entries: int | None = None,
        cache_key: CacheKey | None = None,
    ) -> None:
        """All ranks pass the same.

        ``materialize``: ``materialize(raw)`` makes of a raw request any tree that can be pickled. With a parameter called
        ``out``, or a second one that must be given, it gets there a function ``out(shape, dtype)`` that returns an ndarray
        in shared memory to be written: what is returned of such arrays is not copied. ``hash=False``: nor are they hashed,
        which saves the one pass over their bytes; `digest` makes one of its own then.

        ``executor``: "thread": in up to ``workers`` threads of the entry rank (default: one a core, 4 at most); "inline": in
        the thread that calls `step`, `collect`, `cast` or `close` there. ``timeout``: seconds that a materialization may take
        in a thread; None: any time.

        ``max_pending``: requests between `submit` and outcome. ``max_inflight_bytes``: about what raw requests and results
        that are not delivered may take on the entry rank; nothing more is materialized while results take that much, and one
        request of more fails. ``on_full``: what `submit` does at either limit; see there.

        ``cache_bytes``, ``cache_entries``: answer requests by what equal ones have given, of which that much at most is kept
        in the arena (what counts: see `cache`), the least recently used given up first, and all of it before there is no
        room for others. Of equal ones that come while one is materialized the others wait for it. None for both: nothing is
        kept. ``cache_key``: what names the content of a raw request, bytes or text, None: nothing does; in place of `key_of`,
        in a thread that all requests pass. What ``materialize`` makes must depend on the raw request alone then, which
        nobody changes.

        ValueError, TypeError for arguments that are wrong."""
        if executor not in ("thread", "inline"):
            raise ValueError(f"executor is 'thread' or 'inline', not {executor!r}")
        if on_full not in ("block", "raise", "shed"):
            raise ValueError(f"on_full is 'block', 'raise' or 'shed', not {on_full!r}")
        if not callable(materialize):
            raise TypeError(f"materialize: a function of the raw request is needed, not {materialize!r}")
        if max_pending < 1:
            raise ValueError(f"max_pending={max_pending}: at least 1 is needed")
        workers = default_workers() if workers is None else workers
        if workers < 1:
            raise ValueError(f"workers={workers}: at least 1 is needed")
        self._group = group
        self._max_pending = max_pending
        self._max_bytes = None if max_inflight_bytes is None else parse_bytes(max_inflight_bytes, "max_inflight_bytes")
        self._on_full = on_full
        self._timeout = None if timeout is None else _seconds("timeout", timeout)
        self._silence_s = min(_LONGEST_SILENCE_S, group.timeout / 3)
        self._block_timeout = min(_seconds("block_timeout", block_timeout), self._silence_s)
        self.meter = group.meter
        """Where it counts; see `metrics`."""
        self._tally = Tally(group.meter)
        self._token = _native.process_token()
        self._busy = threading.Lock()  # one collective call at a time
        self._lock = threading.Lock()  # the books below; never held while something is waited for
        self._ledger = Ledger(group.rank == group.entry)
        self._reported_bytes = 0
        self._block_left = self._block_timeout
        self._collected = self._closed = False
        limits: dict[str, Any] = {"cache_bytes": cache_bytes, "cache_entries": cache_entries, "cache_key": cache_key}
        desk = make_desk(group, **limits, tally=self._tally)
        self._intake: Intake | None = None
        if group.rank == group.entry:
            threads = workers if executor == "thread" else 0
            maker = Here(group, materialize, tally=self._tally, hash=hash)
            self._intake = Intake(maker, workers=threads, max_bytes=self._max_bytes, tally=self._tally, desk=desk)

    # ---- any thread

    @property
    def pending(self) -> tuple[Any, ...]:
        """Ids of requests that have no outcome yet, in the order of `submit`; the same on all ranks between two steps."""
        with self._lock:
            return tuple(self._ledger.pending)

    def submit(self, rid: Hashable, raw: Any = None, *, timeout: float | None = None) -> None:
        """Have a request materialized. On all ranks, in the same order; ``raw`` counts on the entry rank alone, and None is
        ready at once, with the value None. ``timeout``: in place of the caster's.

        At a limit, with ``on_full``

        - "raise": BackpressureError, on all ranks alike. What counts of the bytes is what the last message said of them.
        - "shed": taken, and its outcome is a BackpressureError.
        - "block": the entry rank waits, up to ``block_timeout`` seconds between two steps (at most 10 s, and a third of the
          group's timeout, in which the others wait for it), for materializations to end (in
          ``max_pending`` only what is not materialized counts here); if that does not help, "shed".

        ValueError where a request with this id is pending, TypeError where the id can not be hashed: on all ranks alike, and
        nothing has happened then. GroupError once closed."""
        hash(rid)
        timeout = self._timeout if timeout is None else _seconds("timeout", timeout)
        with self._lock:
            self._check_new(rid)
            if self._on_full == "raise":
                self._check_room(rid)
        intake = self._intake
        if intake is None:
            with self._lock:
                self._check_new(rid)
                self._enter(rid)
            return
        raw_bytes = size_of(raw)
        if self._on_full == "block" and raw is not None:
            self._wait_room(intake, raw_bytes)
        with self._lock:
            self._check_new(rid)
            refusal = "" if raw is None or self._on_full == "raise" else self._refusal(intake, raw_bytes)
            if refusal:
                self._tally.add("backpressure_shed")
            # Under the lock, so that who sees it pending can cancel it.
            intake.admit(self._enter(rid), rid, raw, raw_bytes=raw_bytes, timeout=timeout, refusal=refusal)

    def cancel(self, which: "Hashable | Predicate") -> None:
        """Ask that a request, by its id, or all for whose ids a function is true, end as cancelled, whatever is being done
        for them. What a message has been made of already ends as that says.

        The entry rank decides, by what it was asked before it made the message; asking on another rank changes nothing. What
        is not pending, or is cancelled already, is left alone."""
        if not callable(which):
            hash(which)
        if self._intake is None:
            return
        with self._lock:
            rids = tuple(self._ledger.pending)
        if callable(which) and which not in rids:
            chosen = {rid for rid in rids if which(rid)}
        else:
            chosen = {which}
        with self._lock:
            serials = [self._ledger.pending[rid] for rid in rids if rid in chosen and rid in self._ledger.pending]
        self._intake.cancel(serials)

    # ---- all ranks together

    def step(self, timeout: float = 0.0) -> list[Outcome]:
        """What has become of requests since the last step: the same list in the same order on every rank. One message, none
        while nothing is pending.

        ``timeout``: up to how many seconds the entry rank waits if nothing is ready; the others wait for its message. It
        sends one at least every 10 s, so this may be less.

        GroupError, PeerLostError, GroupTimeoutError: the ranks can not go on together; see `Group.broadcast`. Also where a
        rank was not given the same requests as the entry rank."""
        began_ns = time.monotonic_ns()
        with self._alone("step"):
            if not self._ledger.pending:
                return []
            outcomes = self._exchange(lockstep.STEP, _seconds("timeout", timeout))
        self._tally.observe("step_ns", time.monotonic_ns() - began_ns)
        return outcomes

    def cast(self, requests: "Iterable[tuple[Hashable, Any]]", *, timeout: float | None = None) -> list[Outcome]:
        """Materialize these, ``[(rid, raw), ...]``, and wait for their outcomes, which come in one message and in this order.

        Others that are pending stay so. Limits do not apply, but for a request that is larger than ``max_inflight_bytes``.
        Errors as for `submit` and `step`."""
        batch = list(requests)
        timeout = self._timeout if timeout is None else _seconds("timeout", timeout)
        with self._alone("cast"):
            with self._lock:
                rids = [rid for rid, _ in batch]
                if len(set(rids)) != len(rids):
                    raise ValueError(f"cast: {len(rids)} requests have {len(set(rids))} ids")
                for rid in rids:
                    self._check_new(rid)
                serials = [self._enter(rid) for rid in rids]
            if self._intake is not None:
                for serial, (rid, raw) in zip(serials, batch, strict=True):
                    self._intake.admit(serial, rid, raw, raw_bytes=size_of(raw), timeout=timeout, urgent=True)
            del batch  # raw requests are not needed for the whole of it
            outcomes: list[Outcome] = []
            while len(outcomes) < len(serials):  # messages that say nothing yet come before the one that says all
                outcomes = self._exchange(lockstep.CAST, self._silence_s, serials)
            return outcomes

    def collect(self) -> bytes:
        """On the entry rank: what `step` would send, for a broadcast of the engine's own; b"" if nothing has happened.

        `apply` takes it on all ranks, this one included, before anything else that all ranks do together with this caster.
        ValueError elsewhere."""
        with self._alone("collect"):
            intake = self._intake
            if intake is None:
                raise ValueError(f"collect: this is rank {self._group.rank}, the entry rank is {self._group.entry}")
            if not self._ledger.pending:
                return b""
            intake.work(time.monotonic() + self._silence_s)
            if not intake.any_ready():
                return b""
            blob = self._pack(intake, lockstep.STEP, None, rides=True)
            self._collected = True
            return blob

    def fileno(self) -> int:
        """On the entry rank: a descriptor for ``select``, ``poll`` and their like, readable while there is something for
        `collect` or `step` to send; for loops that sleep until something happens. Good until `close`; not to be read.

        Nobody writes to it when a materialization runs out of time, which `collect` and `step` find out: sleep with a time
        limit. ValueError elsewhere, and once closed."""
        if self._intake is None:
            raise ValueError(f"fileno: this is rank {self._group.rank}, the entry rank is {self._group.entry}")
        return self._intake.fileno()

    def apply(self, blob: "bytes | bytearray | memoryview") -> list[Outcome]:
        """On all ranks: the outcomes in what `collect` gave, [] for b"". In their order, each once.

        HandleError where it is not that, and nothing has happened then; GroupError as for `step`."""
        if not blob:
            return []
        with self._alone("apply", applies=True):
            try:
                head, received = self._group.unpack(blob)
            except HandleError:
                raise
            except BaseException:
                self._collected = False  # no other blob will do either: the group is broken
                raise
            self._collected = False
            return self._deliver(lockstep.STEP, head, received, exact=False)

    def close(self, wait: bool = True, cancel_pending: bool = False) -> list[Outcome]:
        """End it, on all ranks in the same step. Returns the outcomes of what was pending. Idempotent.

        Waits for materializations, but for those without a timeout only as long as something gets ready every 30 s; then what
        is left fails. ``cancel_pending``: cancel all that is pending instead. ``wait=False``: what is not ready fails.
        Materializations that are under way are not waited for then; what they bring is taken back when it comes.

        If the group can not go on, or is closed, what is pending has that error as its outcome, on this rank."""
        if self._token != _native.process_token():
            return []  # a forked child has none of its threads, and its locks may be held for ever
        with self._lock:
            if self._closed:
                return []
        with self._alone("close", applies=True):
            with self._lock:
                self._closed = True
            outcomes: list[Outcome] = []
            try:
                if self._collected:
                    raise GroupError("close: what collect() gave was not applied")
                self._begin_end(wait, cancel_pending)
                patience = time.monotonic() + _HUNG_S
                while self._ledger.pending:
                    arrived = self._exchange(lockstep.STEP, self._silence_s)
                    outcomes += arrived
                    if arrived:
                        patience = time.monotonic() + _HUNG_S
                    elif self._intake is not None and time.monotonic() >= patience and self._intake.may_hang():
                        text = f"nothing was materialized for {_HUNG_S} s, and the caster is being closed"
                        self._intake.fail_unfinished(TimeoutError(text))
            except GroupError as error:
                # Another one: its frames hold the outcomes.
                lost = [Outcome(rid, error=type(error)(*error.args)) for rid in self._ledger.pending]
                self._tally_outcomes(lost)
                outcomes += lost
            finally:
                self._end()
            return outcomes

    def __enter__(self) -> "Caster":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        """`close`; but after an exception, which the other ranks may not have, without a message."""
        if kind is None:
            self.close()
        elif self._token == _native.process_token():
            self._end()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._ledger.pending)} pending"
        return f"<Caster rank {self._group.rank} of {self._group.size}, {state}, {self._ledger.submitted} submitted>"

    # ---- in

    def _check_new(self, rid: Hashable) -> None:
        if self._token != _native.process_token():
            raise GroupError(f"submit {rid!r}: this process was forked from a rank; it is none itself")
        if self._closed:
            raise GroupError(f"submit {rid!r}: the caster is closed")
        if rid in self._ledger.pending:
            raise ValueError(f"submit {rid!r}: a request with this id is pending; an id is free again with its outcome")

    def _check_room(self, rid: Hashable) -> None:
        """By what all ranks know alike."""
        problem = ""
        if len(self._ledger.pending) >= self._max_pending:
            problem = f"{len(self._ledger.pending)} requests are pending, max_pending is {self._max_pending}"
        elif self._max_bytes is not None and self._reported_bytes >= self._max_bytes:
            problem = f"{format_bytes(self._reported_bytes)} are in flight, max_inflight_bytes is {format_bytes(self._max_bytes)}"
        if problem:
            if self._intake is not None:  # all ranks refuse it alike, and it is one request
                self._tally.add("backpressure_raised")
            raise BackpressureError(f"submit {rid!r}: {problem}")

    def _refusal(self, intake: Intake, raw_bytes: int) -> str:
        count = intake.unfinished if self._on_full == "block" else len(self._ledger.pending)
        if count >= self._max_pending:
            return f"{count} requests are pending, max_pending is {self._max_pending}"
        if not intake.room(raw_bytes):
            return (
                f"{format_bytes(raw_bytes)} and {format_bytes(intake.inflight_bytes)} in flight are more than "
                f"max_inflight_bytes, {format_bytes(self._max_bytes or 0)}"
            )
        return ""

    def _wait_room(self, intake: Intake, raw_bytes: int) -> None:
        with self._lock:
            if not self._refusal(intake, raw_bytes):
                return
            left = self._block_left
        began_ns = time.monotonic_ns()
        intake.wait_room(raw_bytes, self._max_pending, left)
        waited_ns = time.monotonic_ns() - began_ns
        with self._lock:
            # The others wait in their step: all waits before the next message together are bounded.
            self._block_left = max(self._block_left - waited_ns / 1e9, 0.0)
        self._tally.add("backpressure_waits")
        self._tally.add("backpressure_wait_ns", waited_ns)

    def _enter(self, rid: Hashable) -> int:
        """Into the books, which are the same on every rank. Returns the serial number."""
        serial = self._ledger.enter(rid)
        if self._intake is not None:
            self._tally.add("requests")
        self._tally_pending()
        return serial

    # ---- out

    @contextmanager
    def _alone(self, action: str, applies: bool = False) -> Iterator[None]:
        if self._token != _native.process_token():
            raise GroupError(f"{action}: this process was forked from a rank; it is none itself")
        if not self._busy.acquire(blocking=False):
            raise GroupError(f"{action}: a call that all ranks make together is under way in another thread")
        try:
            if self._closed:
                raise GroupError(f"{action}: the caster is closed")
            if self._collected and not applies:
                raise GroupError(f"{action}: what collect() gave has not been applied yet")
            yield
        finally:
            self._busy.release()

    def _exchange(self, call: int, timeout: float, serials: Sequence[int] | None = None) -> list[Outcome]:
        """One message, of what is ready by then, or of ``serials`` once all of them are."""
        blob = None
        if self._intake is not None:
            # Before anything is waited for that can not be sent.
            self._group.check(_CALLS[call])
            now = time.monotonic()
            self._intake.work(now + self._silence_s, serials)
            complete = self._intake.wait(now + min(timeout, self._silence_s), serials)
            blob = self._pack(self._intake, call, serials if serials is None or complete else ())
        head, received = self._group.exchange(blob)
        return self._deliver(call, head, received, exact=True)

    def _pack(self, intake: Intake, call: int, serials: Sequence[int] | None, rides: bool = False) -> bytes:
        taken = intake.take(serials)
        with self._lock:
            # After that: who submits in another thread may have been taken already.
            submitted, names = self._ledger.submitted, self._ledger.names
            self._block_left = self._block_timeout
        parts = [request.part for request in taken if request.part is not None]
        records = [request.record for request in taken]
        try:
            head = lockstep.write(Head(call, submitted, names, intake.inflight_bytes, records))
            return self._group.pack(head, parts, rides=rides)
        except BaseException as error:
            for part in parts:
                part.withdraw()
            # Their outcomes are lost with it, and the others wait for it.
            self._group.give_up(GroupError(f"step {self._group.step + 1}: no message could be made: {error!r}"))
            raise

    def _deliver(self, call: int, head: bytes, received: list[Received], exact: bool) -> list[Outcome]:
        """``exact``: this rank makes the call that the entry rank has made the message in, so both were given the same."""
        try:
            said = lockstep.read(head, len(received))
        except HandleError as error:
            raise self._group.give_up(GroupError(f"step {self._group.step}: {error}")) from error
        with self._lock:
            problem = self._ledger.disagreement(said, call, exact)
            if not problem:
                values = iter(received)
                outcomes = [self._outcome(record, values) for record in said.records]
                # What workers hold of requests that have ended would never be reported as gone: there is no message for it.
                self._reported_bytes = said.inflight_bytes if self._ledger.pending else 0
                self._tally_outcomes(outcomes)
        if problem:
            raise self._group.give_up(GroupError(f"step {self._group.step}, rank {self._group.rank}: {problem}"))
        return outcomes

    def _outcome(self, record: Record, values: Iterator[Received]) -> Outcome:
        serial, end, failure = record
        rid = self._ledger.leave(serial)
        if end == lockstep.VALUE:
            value, error = next(values)
            return Outcome(rid, value, error)
        if end == lockstep.CANCELLED:
            return Outcome(rid, cancelled=True)
        if failure is None:
            return Outcome(rid)
        if end == lockstep.REFUSED:
            return Outcome(rid, error=BackpressureError(f"request {shown(rid)} was shed: {failure.text}"))
        return Outcome(rid, error=MaterializeError.of(rid, *failure))

    # ---- the end

    def _begin_end(self, wait: bool, cancel_pending: bool) -> None:
        if self._intake is None:
            return
        if cancel_pending:
            with self._lock:
                serials = list(self._ledger.rids)
            self._intake.cancel(serials)
        elif not wait:
            self._intake.fail_unfinished(GroupError("the caster was closed before it was materialized"))

    def _end(self) -> None:
        with self._lock:
            self._closed = True
            self._ledger.clear()
            self._tally_pending()
        if self._intake is not None:
            self._intake.close()

    # ---- metrics

    def _tally_pending(self) -> None:
        if self._intake is not None:
            self._tally.level("pending", len(self._ledger.pending))

    def _tally_outcomes(self, outcomes: list[Outcome]) -> None:
        if self._intake is None or not outcomes:
            return
        for outcome in outcomes:
            name = "cancelled" if outcome.cancelled else "ok" if outcome.error is None else "failed"
            self._tally.add(f"outcomes_{name}")
        self._tally.observe("batch_requests", len(outcomes))
        self._tally_pending()


def default_workers() -> int:
    """One a core that this process may use, a few at most: the ranks need cores too."""
    return min(len(os.sched_getaffinity(0)), _MAX_WORKERS)


def _seconds(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise ValueError(f"{name}: {value!r} is not a number of seconds")
    return float(value)
