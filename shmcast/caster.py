"""`Caster`: raw requests in, the same outcomes on every rank, materialized once.

::

     submit, cast: all ranks, in the same order             `ledger` counts them, `limits` refuses
          │ on the entry rank, which alone decides          `modes` chooses the way of each
          ▼
     materialized in the background                         `intake` has the states, `pool` the threads, `materializing`
          │                                                 makes values, `desk` and `cache` know what was made before
          ▼
     step, cast, collect and apply: one message             `sending` encodes, `lockstep` has its bytes, `group` moves it
          │ on every rank
          ▼
     outcomes, the same everywhere                          `delivery`; `replicas` where every rank materializes; `alone`
                                                            where the group is broken
"""

import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeAlias

from . import _native, alone, executors, inline, lockstep, modes
from .alone import Alone
from .content import Hash, hash_name
from .delivery import Delivery
from .desk import CacheKey, make_desk
from .errors import GroupError, HandleError
from .executors import Executor
from .group import Group
from .intake import Intake
from .ledger import CALLS, Ledger
from .limits import Limits, OnFull, seconds
from .lockstep import Head, Record
from .modes import Mode, Route
from .outcome import Outcome, count
from .parts import Received
from .replicas import Replicas
from .request import size_of
from .sending import Sender
from .tally import Tally

Predicate: TypeAlias = Callable[[Any], bool]

_ALONE = b"shmcast: the entry rank goes on alone"
"""What `Caster.collect` gives then."""
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
        executor: Executor = "thread",
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
        mode: str | None = None,
        raw_everywhere: bool = False,
        inline_bytes: int | str = "measure",
    ) -> None:
        """All ranks pass the same.

        ``materialize``: ``materialize(raw)`` makes of a raw request any tree that can be pickled. With a parameter called
        ``out``, or a second one that must be given, it gets there a function ``out(shape, dtype)`` that returns an ndarray
        in shared memory to be written: what is returned of such arrays is not copied. ``hash=False``: nor are they hashed,
        which saves the one pass over their bytes; `digest` makes one of its own then.

        ``executor``: "thread": in up to ``workers`` threads of the entry rank (default: one a core, 4 at most); "process": in
        as many processes of its own, which are there and have imported all when this returns, and write into the arena: for a
        function that holds the GIL, may crash or never end (``materialize`` and raw requests are pickled for it; see
        `workers`); "inline": in the thread that calls `step`, `collect`, `cast` or `close` there. ``timeout``: seconds that a
        materialization may take in a thread or a process, which is killed then; None: any time.

        ``max_pending``: requests between `submit` and outcome. ``max_inflight_bytes``: about what raw requests and results
        that are not delivered may take on the entry rank; nothing more is materialized while results take that much, and one
        request of more fails. ``on_full``: what `submit` does at either limit; see there.

        ``cache_bytes``, ``cache_entries``: answer requests by what equal ones have given, of which that much at most is kept
        in the arena (what counts: see `cache`), the least recently used given up first, and all of it before there is no
        room for others. Of equal ones that come while one is materialized the others wait for it. Only what goes as "shm" is
        kept and answered so. None for both: nothing is kept. ``cache_key``: what names the content of a raw request, bytes or
        text, None: nothing does; in place of `key_of`, in a thread that all requests pass. What ``materialize`` makes must
        depend on the raw request alone then, which nobody changes.

        ``mode``: which way requests go, see `modes`; "shm" where neither it nor ``SHMCAST_MODE`` says another. ``raw_everywhere``:
        `submit` and `cast` are given the raw requests on every rank, which "replicate" needs; and if the group breaks, each
        rank materializes everything itself from then on, see `alone`. What every rank materializes lies in private memory, and
        is made in threads, or in the step itself where that is to have it ("-sync"). ``inline_bytes``: results with fewer bytes
        of arrays travel in the message; "measure": from where on shared memory is cheaper here, which the entry rank finds out
        in some 10 ms.

        ValueError, TypeError for arguments that are wrong, on all ranks alike. On the entry rank alone, which then has none:
        ValueError for a cache that is larger than the arena, RuntimeError where worker processes do not come up."""
        workers = executors.checked(executor, materialize, workers)
        hash_name(hash)
        inline_below = inline.told(inline_bytes)
        self._group = group
        self._timeout = None if timeout is None else seconds("timeout", timeout)
        self._silence_s = min(_LONGEST_SILENCE_S, group.timeout / 3)
        self.meter = group.meter
        """Where it counts; see `metrics`."""
        self._tally = Tally(group.meter)
        block_timeout = min(seconds("block_timeout", block_timeout), self._silence_s)
        self._limits = Limits(max_pending, max_inflight_bytes, on_full, block_timeout, self._tally)
        self._token = _native.process_token()
        self._busy = threading.Lock()  # one collective call at a time
        self._stepper = 0  # the thread that made the last of these
        self._lock = threading.Lock()  # the books below; never held while something is waited for
        self._ledger = Ledger(group.rank == group.entry)
        self._collected = self._closed = False
        self._mode = modes.first(mode, raw_everywhere)
        self._raws: dict[int, Any] | None = {} if raw_everywhere else None
        self._awaited: list[int] = []  # requests that the next step waits for
        self._ending: alone.Ending = ""
        limits: dict[str, Any] = {"cache_bytes": cache_bytes, "cache_entries": cache_entries, "cache_key": cache_key}
        desk = make_desk(group, **limits, tally=self._tally)
        self._intake: Intake | None = None
        threads = 0 if executor == "inline" else workers
        if group.rank == group.entry:
            sender = Sender(group, self._tally, inline.threshold(group, inline_below, self._tally))
            ends: dict[str, Any] = {
                "max_bytes": self._limits.max_bytes,
                "desk": desk,
                "tally": self._tally,
                "hash": hash,
            }
            self._intake = executors.make_intake(executor, group, sender, materialize, workers, **ends)
        self._replicas = Replicas(materialize, workers=threads, tally=self._tally, watch=self._intake)
        raws = {} if self._raws is None else self._raws
        self._delivery = Delivery(self._replicas, raws, group.timeout / 2, always_agree=raw_everywhere)
        self._alone = Alone(group, self._ledger, self._raws, self._replicas)

    # ---- any thread

    @property
    def pending(self) -> tuple[Any, ...]:
        """Ids of requests that have no outcome yet, in the order of `submit`; the same on all ranks between two steps."""
        self._check_own("pending")
        with self._lock:
            return tuple(self._ledger.pending)

    @property
    def mode(self) -> str:
        """Which way requests go that come now, as the entry rank was told; elsewhere, as this rank was."""
        return self._mode.text

    @property
    def alone(self) -> GroupError | None:
        """Why the ranks go on without each other, if they do: the group is broken, and ``raw_everywhere`` is set.

        From then on every step has the outcomes of all that is pending, in the order in which it was submitted, and waits for
        them. Nothing is decided any more: `cancel`, timeouts of single requests and modes change nothing."""
        return self._alone.cause

    def switch(self, mode: str) -> None:
        """Send requests that come from now on another way, see `modes`. At any moment, on the entry rank; elsewhere it changes
        nothing. ValueError where it is no mode, or needs ``raw_everywhere``."""
        self._mode = Mode.parse(mode, self._raws is not None)
        if self._intake is not None:
            self._tally.add("mode_switches")

    def submit(self, rid: Hashable, raw: Any = None, *, timeout: float | None = None) -> None:
        """Have a request materialized. On all ranks, in the same order; without ``raw_everywhere`` ``raw`` counts on the entry rank
        alone. None is ready at once, with the value None. ``timeout``: in place of the caster's.

        At a limit, with ``on_full``

        - "raise": BackpressureError, on all ranks alike. What counts of the bytes is what the last message said of them.
        - "shed": taken, and its outcome is a BackpressureError.
        - "block": the entry rank waits, up to ``block_timeout`` seconds between two steps (at most 10 s, and a third of the
          group's timeout, in which the others wait for it), for materializations to end (in
          ``max_pending`` only what is not materialized counts here); if that does not help, "shed". In the thread that
          steps only as long as some are under way: what is made or sent in a step it would wait for in vain.

        ValueError where a request with this id is pending, TypeError where the id can not be hashed: on all ranks alike, and
        nothing has happened then. GroupError once closed."""
        hash(rid)
        timeout = self._timeout if timeout is None else seconds("timeout", timeout)
        self._check_own("submit")
        with self._lock:
            self._check_new(rid)
            self._limits.check(rid, len(self._ledger.pending), decides=self._intake is not None)
        intake = self._intake if self._alone.cause is None else None
        raw_bytes = 0 if intake is None else size_of(raw)
        if intake is not None and raw is not None:
            self._limits.wait(intake, raw_bytes, steps=self._stepper == threading.get_ident())
        with self._lock:
            self._check_new(rid)
            if intake is None or self._alone.cause is not None:
                self._enter(rid, raw)
                return
            refusal = "" if raw is None else self._limits.shed(intake, raw_bytes, len(self._ledger.pending))
            route = self._route(rid)
            # Under the lock, so that who sees it pending can cancel it.
            serial = self._enter(rid, raw)
            if route.sync:
                self._awaited.append(serial)
            terms: dict[str, Any] = {"timeout": timeout, "urgent": route.sync, "refusal": refusal}
            intake.admit(serial, rid, raw, raw_bytes=raw_bytes, route=route, **terms)

    def cancel(self, which: "Hashable | Predicate") -> None:
        """Ask that a request, by its id, or all for whose ids a function is true, end as cancelled, whatever is being done
        for them. What a message has been made of already ends as that says.

        The entry rank decides, by what it was asked before it made the message; asking on another rank changes nothing. What
        is not pending, or is cancelled already, is left alone."""
        if not callable(which):
            hash(which)
        self._check_own("cancel")
        if self._intake is None or self._alone.cause is not None:
            return
        with self._lock:
            rids = tuple(self._ledger.pending)
        chosen = {rid for rid in rids if which(rid)} if callable(which) and which not in rids else {which}
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
        with self._collective("step"):
            if not self._ledger.pending:
                return []
            outcomes = self._exchange(lockstep.STEP, seconds("timeout", timeout))
        self._tally.observe("step_ns", time.monotonic_ns() - began_ns)
        return outcomes

    def cast(self, requests: "Iterable[tuple[Hashable, Any]]", *, timeout: float | None = None) -> list[Outcome]:
        """Materialize these, ``[(rid, raw), ...]``, and wait for their outcomes, which come in this order, and in one message
        but for more than 63 that every rank materializes.

        Others that are pending stay so. Limits do not apply, but for a request that is larger than ``max_inflight_bytes``.
        Errors as for `submit` and `step`."""
        batch = list(requests)
        sizes = [0 if self._intake is None else size_of(raw) for _, raw in batch]
        timeout = self._timeout if timeout is None else seconds("timeout", timeout)
        with self._collective("cast"):
            with self._lock:
                rids = [rid for rid, _ in batch]
                if len(set(rids)) != len(rids):
                    raise ValueError(f"cast: {len(rids)} requests have {len(set(rids))} ids")
                for rid in rids:
                    self._check_new(rid)
                serials = [self._enter(rid, raw) for rid, raw in batch]
                if self._intake is not None and self._alone.cause is None:
                    # Under the lock, for the same reason as in `submit`.
                    terms: dict[str, Any] = {"timeout": timeout, "urgent": True}
                    for serial, (rid, raw), size in zip(serials, batch, sizes, strict=True):
                        route = self._route(rid)._replace(sync=True)
                        self._intake.admit(serial, rid, raw, raw_bytes=size, route=route, **terms)
            del batch  # raw requests are not needed for the whole of it
            outcomes: list[Outcome] = []
            while len(outcomes) < len(serials):  # messages that say nothing yet come before those that say all
                outcomes += self._exchange(lockstep.CAST, self._silence_s, serials[len(outcomes) :])
            return outcomes

    def collect(self) -> bytes:
        """On the entry rank: what `step` would send, for a broadcast of the engine's own; b"" if nothing has happened.

        `apply` takes it on all ranks, this one included, before anything else that all ranks do together with this caster.
        ValueError elsewhere."""
        with self._collective("collect"):
            intake = self._intake
            if intake is None:
                raise ValueError(f"collect: this is rank {self._group.rank}, the entry rank is {self._group.entry}")
            if not self._ledger.pending:
                return b""
            try:
                self._group.check("collect")
                self._wait_ready(intake, 0.0, None)
                if not intake.any_ready():
                    return b""
                blob = self._pack(intake, lockstep.STEP, None, rides=True)
            except GroupError as error:
                self._go_alone(error)
                return _ALONE
            self._collected = True
            return blob

    def fileno(self) -> int:
        """On the entry rank: a descriptor for ``select``, ``poll`` and their like, readable while there is something for
        `collect` or `step` to send; for loops that sleep until something happens. Good until `close`; not to be read.

        Nobody writes to it when a materialization runs out of time, which `collect` and `step` find out: sleep with a time
        limit. ValueError elsewhere, and once closed."""
        if self._intake is None:
            raise ValueError(f"fileno: this is rank {self._group.rank}, the entry rank is {self._group.entry}")
        self._check_own("fileno")
        return self._intake.fileno()

    def apply(self, blob: "bytes | bytearray | memoryview") -> list[Outcome]:
        """On all ranks: the outcomes in what `collect` gave, [] for b"". In their order, each once.

        HandleError where it is not that, and nothing has happened then; GroupError as for `step`."""
        if not blob and self._alone.cause is None:
            return []
        with self._collective("apply", applies=True):
            if self._alone.cause is not None or blob == _ALONE:
                self._collected = False
                cause = GroupError("the entry rank goes on without the others")
                return self._outcomes_alone(self._group.give_up(cause))
            with self._alone.unless_whole():
                try:
                    _, received = self._group.unpack(blob, self._delivery.finish)
                except HandleError:
                    raise
                except BaseException as error:
                    self._collected = False  # no other blob will do either: the group is broken
                    if isinstance(error, GroupError):
                        return self._outcomes_alone(error)
                    raise
                self._collected = False
                return self._deliver(lockstep.STEP, received, exact=False)

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
        with self._collective("close", applies=True):
            with self._lock:
                self._closed = True
            outcomes: list[Outcome] = []
            try:
                if self._collected:
                    raise GroupError("close: what collect() gave was not applied")
                self._ending = "cancelled" if cancel_pending else "" if wait else "failed"
                self._begin_end()
                patience = time.monotonic() + _HUNG_S
                while self._ledger.pending:
                    arrived = self._exchange(lockstep.STEP, self._silence_s)
                    outcomes += arrived
                    if arrived:
                        patience = time.monotonic() + _HUNG_S
                    elif self._intake is not None and self._intake.empty and self._alone.cause is None:
                        never = GroupError("close: an interrupt has kept requests from being taken on")
                        raise self._group.give_up(never)
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

    def _check_own(self, action: str) -> None:
        """Before any lock: a forked child may have been left one that nobody gives back."""
        if self._token != _native.process_token():
            raise GroupError(f"{action}: this process was forked from a rank; it is none itself")

    def _check_new(self, rid: Hashable) -> None:
        if self._closed:
            raise GroupError(f"submit {rid!r}: the caster is closed")
        if rid in self._ledger.pending:
            raise ValueError(f"submit {rid!r}: a request with this id is pending; an id is free again with its outcome")

    def _enter(self, rid: Hashable, raw: Any) -> int:
        """Into the books, which are the same on every rank. Returns the serial number."""
        serial = self._ledger.enter(rid)
        if self._raws is not None and raw is not None:
            self._raws[serial] = raw
        if self._intake is not None:
            self._tally.add("requests")
        if self._alone.cause is not None:
            self._alone.begin(serial)
            if self._intake is not None:
                self._intake.show(True)
        self._tally_pending()
        return serial

    def _route(self, rid: Hashable) -> Route:
        route = self._mode.route_of(rid)
        self._tally.add(f"mode_{route.way.value}")
        return route

    # ---- out

    @contextmanager
    def _collective(self, action: str, applies: bool = False) -> Iterator[None]:
        self._check_own(action)
        if not self._busy.acquire(blocking=False):
            raise GroupError(f"{action}: a call that all ranks make together is under way in another thread")
        try:
            if self._closed:
                raise GroupError(f"{action}: the caster is closed")
            if self._collected and not applies:
                raise GroupError(f"{action}: what collect() gave has not been applied yet")
            self._stepper = threading.get_ident()
            yield
        finally:
            self._busy.release()

    def _exchange(self, call: int, timeout: float, serials: Sequence[int] | None = None) -> list[Outcome]:
        """One message, of what is ready by then, or of ``serials`` once all of them are."""
        try:
            blob = None
            # Before anything is waited for that can not be sent.
            self._group.check(CALLS[call])
            if self._intake is not None:
                complete = self._wait_ready(self._intake, timeout, serials)
                blob = self._pack(self._intake, call, serials if serials is None or complete else ())
        except GroupError as error:
            return self._outcomes_alone(error, serials)
        with self._alone.unless_whole():
            try:
                _, received = self._group.exchange(blob, self._delivery.finish)
            except GroupError as error:
                return self._outcomes_alone(error, serials)
            return self._deliver(call, received, exact=True, serials=serials)

    def _wait_ready(self, intake: Intake, timeout: float, serials: Sequence[int] | None) -> bool:
        """Wait for ``serials``, or for what was submitted to be done in this step, or for anything. False in vain."""
        now = time.monotonic()
        until = now + self._silence_s
        awaited = serials
        if serials is None:
            with self._lock:
                awaited = tuple(self._awaited) or None
        if awaited is not None:
            intake.work(until, awaited)
        if serials is None:
            intake.work(until)
        return intake.wait(now + min(timeout, self._silence_s) if awaited is None else until, awaited)

    def _pack(self, intake: Intake, call: int, serials: Sequence[int] | None, rides: bool = False) -> bytes:
        taken = intake.take(serials)
        with self._lock:
            # After that: who submits in another thread may have been taken already.
            submitted, names = self._ledger.submitted, self._ledger.names
            self._limits.may_wait_again()
            gone = {each.record.serial for each in taken}
            self._awaited = [serial for serial in self._awaited if serial not in gone]
        parts = [each.part for each in taken if each.part is not None]
        records = [each.record for each in taken]
        try:
            head = lockstep.write(Head(call, submitted, names, intake.inflight_bytes, records))
            return self._group.pack(head, parts, rides=rides)
        except BaseException as error:
            for part in parts:
                part.withdraw()
            # Their outcomes are lost with it, and the others wait for it.
            self._group.give_up(GroupError(f"step {self._group.step + 1}: no message could be made: {error!r}"))
            raise

    def _deliver(
        self, call: int, received: list[Received], exact: bool, serials: Sequence[int] | None = None
    ) -> list[Outcome]:
        """``exact``: this rank makes the call that the entry rank has made the message in, so both were given the same."""
        said = self._delivery.said
        if isinstance(said, HandleError):
            return self._outcomes_alone(self._group.give_up(GroupError(f"step {self._group.step}: {said}")), serials)
        with self._lock:
            problem = self._ledger.disagreement(said, call, exact)
            if not problem:
                values = iter(received)
                all_outcomes = [self._outcome(record, values) for record in said.records]
                outcomes = [outcome for outcome in all_outcomes if outcome is not None]
                # What workers hold of requests that have ended would never be reported as gone: there is no message for it.
                self._limits.reported_bytes = said.inflight_bytes if self._ledger.pending else 0
                self._tally_outcomes(outcomes)
        if problem:
            self._alone.forbid()
            raise self._group.give_up(GroupError(f"step {self._group.step}, rank {self._group.rank}: {problem}"))
        return outcomes

    def _outcome(self, record: Record, values: Iterator[Received]) -> Outcome | None:
        """None where it has only begun."""
        outcome = self._delivery.outcome(self._ledger.rids[record.serial], record, values)
        if outcome is not None:
            self._leave(record.serial)
        return outcome

    def _leave(self, serial: int) -> Hashable:
        if self._raws is not None:
            self._raws.pop(serial, None)
        return self._ledger.leave(serial)

    # ---- without the others

    def _outcomes_alone(self, cause: GroupError, serials: Sequence[int] | None = None) -> list[Outcome]:
        """Of ``serials``, or of all; whatever the group has become. Raises the cause where this rank can not go on."""
        self._go_alone(cause)
        outcomes = self._alone.outcomes(serials, self._ending, _HUNG_S if self._closed else alone.FOR_EVER_S)
        with self._lock:
            for outcome in outcomes:
                self._leave(self._ledger.pending[outcome.rid])
            if self._intake is not None:
                self._intake.show(bool(self._ledger.pending))
            self._tally_outcomes(outcomes)
        return outcomes

    def _go_alone(self, cause: GroupError) -> None:
        if self._alone.cause is None:
            self._alone.check(cause)
            with self._lock:
                self._limits.reported_bytes = 0
                self._alone.go(cause)
            if self._intake is not None:
                self._intake.close(shown=True)

    # ---- the end

    def _begin_end(self) -> None:
        if self._intake is None:
            return
        if self._ending == "cancelled":
            with self._lock:
                serials = list(self._ledger.rids)
            self._intake.cancel(serials)
        elif self._ending == "failed":
            self._intake.fail_unfinished(GroupError(alone.CLOSED))

    def _end(self) -> None:
        with self._lock:
            self._closed = True
            self._ledger.clear()
            self._tally_pending()
            if self._raws is not None:
                self._raws.clear()
        self._replicas.close()
        if self._intake is not None:
            self._intake.close()

    # ---- metrics

    def _tally_pending(self) -> None:
        if self._intake is not None:
            self._tally.level("pending", len(self._ledger.pending))

    def _tally_outcomes(self, outcomes: list[Outcome]) -> None:
        if self._intake is not None and outcomes:
            count(outcomes, self._tally)
            self._tally_pending()
