"""shmcast-gc --watch: waits until the kernel says that somebody's segments were closed, and looks at those.

A process that dies closes its mappings, and the directory's watch says so just before the lock on its byte is dropped; so
one looks a moment later, and again while the lock is still there. Only files that were open for writing count: whoever
lives in an arena has its control segment open so, while our own looks open for reading alone and wake nobody. What is
missed (a full event queue, a process that takes long to die) the slow rescan finds. An arena with which something fails
is not listened to until the rescan, as whoever tries in vain has opened it for writing: two daemons would wake each other.
"""

import argparse
import contextlib
import errno
import json
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from .. import gc, names
from ..sizes import format_bytes
from . import output
from .codes import DONE, NotBegunError

_JSON_VERSION = 1  # of the lines
_LOOKS_S = (0.01, 0.05, 0.2, 0.6)  # after an event: looks at that arena, each so much later than the one before it
_REST_S = 0.05  # between two looks, however many events there are
_LONGEST_WAIT_S = 86400.0  # poll counts milliseconds in 32 bits
_NAMES_A_LINE = 64
_ADVICE = {errno.EMFILE: "; raise sysctl fs.inotify.max_user_instances, or the limit of open files (ulimit -n)"}


@dataclass
class Totals:
    """Since it began."""

    sweeps: int = 0
    arenas: int = 0
    segments: int = 0
    nbytes: int = 0
    processes: int = 0
    """Dead ones in live arenas whose claims were ended."""
    errors: int = 0


class Signals:
    """SIGTERM and SIGINT, as something that can be polled."""

    def __init__(self) -> None:
        self.got: int | None = None
        self._ours, self._theirs = socket.socketpair()
        for end in (self._ours, self._theirs):
            end.setblocking(False)
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        self._wakeup = signal.set_wakeup_fd(self._theirs.fileno())

    def _note(self, number: int, frame: object) -> None:
        self.got = number

    def fileno(self) -> int:
        """Readable once one has come."""
        return self._ours.fileno()

    def stop(self) -> bool:
        """Whether one has come."""
        return self.got is not None

    def close(self) -> None:
        """As it was before."""
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._ours.close()
        self._theirs.close()


class Watch:
    """What waits for a look, and the looks themselves."""

    def __init__(
        self, namespace: str | None, say: Callable[..., None], stop: Callable[[], bool], rescan_s: float
    ) -> None:
        self.totals = Totals()
        self._namespace = namespace
        self._say = say
        self._stop = stop
        self._rescan_s = rescan_s
        self._next_rescan = 0.0
        self._last_look = 0.0
        self._pending: dict[gc.Key, tuple[int, float]] = {}
        self._deaf: set[gc.Key] = set()  # until the next rescan
        self._said: set[tuple[str, str]] = set()
        self._kept: dict[str, str] = {}  # {name: reason}, at the last rescan

    def heard(self, file: str, now: float) -> None:
        """A file of that name was closed by somebody who could write."""
        found = names.parse(file)
        if found is None or found.number != names.CONTROL or self._namespace not in (None, found.namespace):
            return
        key = (found.namespace, found.arena)
        if key in self._deaf:
            return
        due = max(now + _LOOKS_S[0], self._last_look + _REST_S)
        self._pending[key] = (0, min(due, self._pending[key][1]) if key in self._pending else due)

    def overflown(self, now: float) -> None:
        """Events were lost: look at everything, but not before the dying have let go."""
        self._next_rescan = min(self._next_rescan, now + _LOOKS_S[-1])

    def wait_s(self, now: float) -> float:
        """Until the next look is due."""
        due = min((due for _, due in self._pending.values()), default=self._next_rescan)
        return max(min(due, self._next_rescan) - now, 0.0)

    def look(self, now: float) -> None:
        """Whatever is due."""
        if now >= self._next_rescan:
            self._next_rescan = now + self._rescan_s
            self._sweep(None)
        due = {key for key, (_, when) in self._pending.items() if when <= now}
        if due:
            self._last_look = now
            there = self._sweep(due)
            for key in due:
                attempt = self._pending.pop(key)[0] + 1
                if key in there and attempt < len(_LOOKS_S):
                    self._pending[key] = (attempt, now + _LOOKS_S[attempt])

    def _sweep(self, only: set[gc.Key] | None) -> set[gc.Key]:
        """Of these arenas, None: of all. Returns which of them are still there."""
        try:
            listed = None
            if only is not None:
                listed = [one for one in names.listing(self._namespace) if (one.namespace, one.arena) in only]
            todo = gc.plan(gc.scan(self._namespace, closely=True, listed=listed, stop=self._stop))
        except OSError as error:
            self._failed(names.DIRECTORY, str(error))
            return only or set()
        report = gc.apply(todo, stop=self._stop)
        stuck = {(one.namespace, one.arena) for name, _ in report.failed if (one := names.parse(name)) is not None}
        if only is None:
            self._deaf.clear()
            self._said &= set(report.failed)
        self._deaf |= stuck
        self._count(todo, report)
        if only is None and not self._stop():
            self._tell_what_stays(todo)
        there = {one.segment.key for one in todo.verdicts if one.segment.key is not None}
        return there - ({one.key for one in report.removed} - stuck)

    def _count(self, todo: gc.Plan, report: gc.Report) -> None:
        totals = self.totals
        totals.sweeps += 1
        totals.arenas += report.arenas
        totals.segments += len(report.removed)
        totals.nbytes += report.nbytes
        totals.processes += sum(report.scrubbed.values())
        fates = {one.segment.key: (one.reason, one.why) for one in todo.removals}
        self._tell("removed", ((one, fates[one.key]) for one in report.removed))
        for (namespace, arena), count in report.scrubbed.items():
            self._say("scrubbed", namespace=namespace, arena=f"{arena:016x}", processes=count)
        for name, why in report.failed:
            self._failed(name, why)

    def _tell_what_stays(self, todo: gc.Plan) -> None:
        """Once for each reason that a segment has, as long as it has it."""
        kept = [one for one in todo.verdicts if one.action == "keep"]
        new = [one for one in kept if self._kept.get(one.segment.name) != one.reason]
        self._kept = {one.segment.name: one.reason for one in kept}
        self._tell("stays", ((one.segment, (one.reason, one.why)) for one in new))

    def _tell(self, event: str, segments: Iterable[tuple[gc.Removed | gc.Segment, tuple[str, str]]]) -> None:
        """Some lines for each reason, of so many names at most; an arena is counted in the first that has it."""
        alike: dict[tuple[str, str], list[gc.Removed | gc.Segment]] = {}
        for one, fate in segments:
            alike.setdefault(fate, []).append(one)
        for (reason, why), those in alike.items():
            counted: set[gc.Key | None] = {None}
            for first in range(0, len(those), _NAMES_A_LINE):
                some = those[first : first + _NAMES_A_LINE]
                arenas = {one.key for one in some} - counted
                counted |= arenas
                self._say(
                    event,
                    arenas=len(arenas),
                    segments=[one.name for one in some],
                    nbytes=sum(one.nbytes for one in some),
                    reason=reason,
                    why=why,
                )

    def _failed(self, name: str, why: str) -> None:
        self.totals.errors += 1
        if (name, why) not in self._said:  # once: it may be there for good
            self._said.add((name, why))
            self._say("failed", name=name, why=why)


def watch(options: argparse.Namespace) -> int:
    """Until SIGTERM or SIGINT. NotBegunError where something is missing."""
    describe = _describer(options.json)
    with contextlib.ExitStack() as stack:
        try:
            signals = stack.enter_context(contextlib.closing(Signals()))
            events = stack.enter_context(_events())
            lines = output.Lines(output.stdout_fd(), lambda count: describe("lost", lines=count))
        except (OSError, RuntimeError) as error:
            raise NotBegunError(f"--watch: {error}") from None
        stack.enter_context(contextlib.closing(lines))

        def say(event: str, **fields: Any) -> None:
            lines.put(describe(event, **fields))

        here = Watch(options.namespace, say, signals.stop, options.rescan)
        port = None
        if options.metrics_port is not None:
            port = stack.enter_context(_served(options, here.totals))
        say("watching", namespace=options.namespace, metrics_port=port)
        _loop(here, events, signals)
        totals = here.totals
        name = signal.Signals(signals.got).name if signals.got else ""
        say("stopped", signal=name, arenas=totals.arenas, segments=totals.segments, nbytes=totals.nbytes)
    return DONE


def _loop(here: Watch, events: Any, signals: Signals) -> None:
    from inotify_simple import flags

    poll = select.poll()
    poll.register(events, select.POLLIN)
    poll.register(signals, select.POLLIN)
    rest = select.poll()
    rest.register(signals, select.POLLIN)
    while not signals.stop():
        poll.poll(min(here.wait_s(time.monotonic()), _LONGEST_WAIT_S) * 1e3 + 1)
        now = time.monotonic()
        for event in events.read(timeout=0):
            if event.mask & flags.Q_OVERFLOW:
                here.overflown(now)
            else:
                here.heard(event.name, now)
        if not signals.stop():
            here.look(now)
            rest.poll(
                _REST_S * 1e3
            )  # what others do in /dev/shm meanwhile is one event more or less, not one wake-up each


def _events() -> Any:
    try:
        from inotify_simple import INotify, flags
    except ImportError as error:
        raise NotBegunError(f"--watch: {error}; install the extra: pip install 'shmcast[gc]'") from None
    with contextlib.ExitStack() as undo:
        try:
            events = undo.enter_context(INotify())
            events.add_watch(names.DIRECTORY, flags.CLOSE_WRITE | flags.ONLYDIR)
        except OSError as error:
            raise NotBegunError(
                f"--watch: watch {names.DIRECTORY}: {error}{_ADVICE.get(error.errno or 0, '')}"
            ) from None
        undo.pop_all()
    return events


@contextlib.contextmanager
def _served(options: argparse.Namespace, totals: Totals) -> Iterator[int]:
    try:
        from . import exporter
    except ImportError as error:
        raise NotBegunError(f"--metrics-port: {error}; install the extra: pip install 'shmcast[gc]'") from None
    try:
        port, close = exporter.serve(options.metrics_address, options.metrics_port, options.namespace, totals)
    except (OSError, OverflowError, RuntimeError) as error:
        where = f"{options.metrics_address}:{options.metrics_port}"
        raise NotBegunError(f"--metrics-port: listen at {where}: {error}") from None
    try:
        yield port
    finally:
        close()


def _describer(as_json: bool) -> Callable[..., str]:
    def describe(event: str, **fields: Any) -> str:
        if as_json:
            record = {"version": _JSON_VERSION, "event": event, "time": round(time.time(), 6), "pid": os.getpid()}
            return json.dumps({**record, **fields})
        return f"shmcast-gc: {event}{_in_words(fields)}"

    return describe


def _in_words(fields: dict[str, Any]) -> str:
    words = []
    for name, value in fields.items():
        if isinstance(value, list):
            words.append(f"{len(value)} {name}: {' '.join(value)}")
        elif name == "nbytes":
            words.append(format_bytes(value))
        elif name == "why":
            words.append(value)
        elif value is not None and name != "reason":  # which `why` says in words
            words.append(f"{name} {value}")
    return "".join(f", {word}" for word in words).replace(",", "", 1)
