"""What lies in /dev/shm under our names, what of it may go, and why: all the thinking of `sweep` and of shmcast-gc.

::

    apply(plan(scan(namespace)))

`scan` looks: it takes no lock, joins nothing and changes nothing. `plan` is a function of what was seen, and of nothing
else. `apply` alone acts, and looks again before it does: any number of sweepers may work at once, each may be killed at
any moment, and the next one finishes what is left.

An arena is dead when nobody holds the lock on its owner byte. Whoever takes that lock, and finds that the name still
means the file that was locked, is the only one who may unlink: data segments first, the control segment last. A pid is
for people to read; nothing is decided by it.
"""

import errno
import os
import resource
import stat
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

from . import _native, names

Key: TypeAlias = tuple[str, int]
"""(namespace, arena id)."""
Action: TypeAlias = Literal["keep", "remove"]
Guard: TypeAlias = Callable[[], AbstractContextManager[object]]

Stop: TypeAlias = Callable[[], bool]

# Dead arenas that are locked at once, as one listing of /dev/shm is complete for all of them: at most so many, of so many
# bytes or little more. Who wants `guard` waits until they are gone, and removing takes long where there is much to free.
_TOGETHER = 1024
_TOGETHER_BYTES = 1 << 30


# ---- what is seen


class Segment(NamedTuple):
    """A name in /dev/shm that begins as ours do."""

    name: str
    key: Key | None
    """None where the rest of the name is none of ours."""
    number: int
    kind: str
    """"file", "directory", "symlink" or "special file"."""
    nbytes: int
    uid: int


@dataclass(frozen=True)
class Control:
    """What was seen of an arena through its control segment. Nothing but `held` and `format` decides anything."""

    held: bool | None
    """Whether a live process has the owner byte; None where that could not be asked."""
    format: int = 0
    """0: no header of ours, or not yet."""
    trouble: str = ""
    ended: bool = False
    pid: int = 0
    command: str = ""
    paused: bool = False
    peers: int = 0
    """Processes that are in it and alive, the owner included."""
    lost_peers: int = 0
    """Dead ones that still have claims, or a place."""
    used_bytes: int = 0
    reserved_bytes: int = 0


@dataclass(frozen=True)
class Scan:
    """What there was at one moment. The user, and the newest format that this build reads, belong to it."""

    uid: int
    format: int
    segments: tuple[Segment, ...] = ()
    controls: Mapping[Key, Control] = field(default_factory=dict)
    """Of arenas whose control segment is a file of this user and could be opened, or could not for a reason."""


def _never() -> bool:
    return False


def scan(
    namespace: str | None = None,
    *,
    closely: bool = False,
    listed: Iterable[names.Found] | None = None,
    stop: Stop = _never,
) -> Scan:
    """Look at the segments of a namespace, None: of all, or only at those ``listed``.

    ``closely``: read the headers of live arenas too, which costs some 0.1 ms each; without it only what decides is
    looked at, some 10 µs an arena. ``stop``: asked before each arena; what was seen until then is seen whole. Takes no
    lock and opens for reading alone. OSError where /dev/shm can not be read."""
    arenas: dict[Key, set[int]] = {}
    for found in names.listing(namespace) if listed is None else listed:
        # its control segment may have been created while the directory was read
        arenas.setdefault((found.namespace, found.arena), {names.CONTROL}).add(found.number)
    uid = os.geteuid()
    segments: list[Segment] = []
    controls: dict[Key, Control] = {}
    for key, numbers in arenas.items():
        if stop():
            break
        there = [one for number in numbers if (one := _look_at(names.Found(*key, number))) is not None]
        segments += there
        for one in there:
            if one.number == names.CONTROL and one.kind == "file" and one.uid == uid:
                inside = _look_inside(f"/{one.name}", closely)
                if inside is not None:
                    controls[key] = inside
    if closely and namespace is None and listed is None:
        segments += [odd for name in names.strangers() if (odd := _described(name, None, -1)) is not None]
    return Scan(uid, _native.FORMAT, tuple(segments), controls)


def _look_at(found: names.Found) -> Segment | None:
    return _described(names.segment_name(*found)[1:], (found.namespace, found.arena), found.number)


def _described(name: str, key: Key | None, number: int) -> Segment | None:
    status = names.status(f"/{name}")
    if status is None:
        return None
    kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "symlink"}
    kind = kinds.get(stat.S_IFMT(status.st_mode), "special file")
    return Segment(name, key, number, kind, status.st_size, status.st_uid)


def _look_inside(name: str, closely: bool) -> Control | None:
    """None where the control segment is gone."""
    try:
        fd = names.open_readable(name)
    except FileNotFoundError:
        return None
    except OSError as error:
        return Control(None, trouble=str(error))
    try:
        held, number = _native.probe(fd)
        seen = Control(held, number)
        return _details(seen, fd) if number == _native.FORMAT and (closely or not held) else seen
    finally:
        os.close(fd)


def _details(seen: Control, fd: int) -> Control:
    try:
        inside = _native.inspect(fd)
    except OSError as error:
        return Control(seen.held, seen.format, trouble=str(error))
    owner = next((peer for peer in inside["peers"] if peer["index"] == 0), None)
    return Control(
        seen.held,
        seen.format,
        ended=inside["ended"],
        pid=owner["pid"] if owner else 0,
        command=owner["command"].strip() if owner else "",
        paused=bool(owner and seen.held and _paused(owner["pid"], owner["start_ticks"])),
        peers=sum(peer["alive"] for peer in inside["peers"]),
        lost_peers=sum(_lost(peer) for peer in inside["peers"]),
        used_bytes=inside["used_bytes"],
        reserved_bytes=inside["reserved_bytes"],
    )


def _lost(peer: dict[str, Any]) -> bool:
    """Whether it died with a place or with claims; the owner's death is the arena's."""
    return not peer["alive"] and peer["index"] != 0 and bool(peer["ready"] or peer["holds"] or peer["grants"])


def _paused(pid: int, start_ticks: int) -> bool:
    """For people: whether the process is stopped, where it can be seen from this pid namespace at all."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        return fields[0] in (b"T", b"t") and int(fields[19]) == start_ticks
    except (OSError, IndexError, ValueError):
        return False


# ---- what is to be done


class Verdict(NamedTuple):
    """What is to happen to one segment, and why."""

    segment: Segment
    action: Action
    reason: str
    """One of `REASONS`."""
    why: str
    """The same for people."""


REASONS: Mapping[str, str] = {
    "owner-alive": "keep: a live process holds the owner byte",
    "owner-paused": "keep: the owner is stopped (SIGSTOP, a debugger), which is not dead",
    "at-work": "keep: its creator has the owner byte and has not finished",
    "ending": "keep: its owner or another sweeper is removing it just now",
    "newer-format": "keep: of a newer build, which may tell the living from the dead in another way",
    "other-user": "keep: it belongs to another user",
    "no-file": "keep: a symlink, a directory or a device, which we never make",
    "no-arena": "keep: its control segment is no file of this user",
    "no-name": "keep: the name begins as ours do and goes on otherwise",
    "unknown": "keep: it could not be asked",
    "owner-dead": "remove: nobody holds the owner byte",
    "unfinished": "remove: its creator died before there was a header",
    "no-control": "remove: a control segment is created first and removed last, so this arena is gone",
}
"""Every reason there is."""


class Plan(NamedTuple):
    """What `apply` is to do."""

    verdicts: tuple[Verdict, ...]
    scrubs: tuple[Key, ...] = ()
    """Live arenas in which dead processes still have claims."""

    @property
    def removals(self) -> tuple[Verdict, ...]:
        """The verdicts that say remove."""
        return tuple(verdict for verdict in self.verdicts if verdict.action == "remove")


def plan(seen: Scan) -> Plan:
    """What is to happen to each segment, from what was seen alone."""
    controls = {one.key: one for one in seen.segments if one.number == names.CONTROL}
    fates = {one.key: _fate(seen, one.key, controls.get(one.key)) for one in seen.segments if one.key is not None}
    verdicts = []
    for one in sorted(seen.segments):
        if one.key is None:
            fate: tuple[str, str] = "no-name", "no name of ours: shmcast.<namespace>.<16 hex digits>.<number>"
        elif one.kind != "file":
            fate = "no-file", f"a {one.kind}, which we never make"
        elif one.uid != seen.uid:
            fate = "other-user", f"of user {one.uid}; this is user {seen.uid}"
        else:
            fate = fates[one.key]
        action: Action = "remove" if REASONS[fate[0]].startswith("remove") else "keep"
        verdicts.append(Verdict(one, action, *fate))
    alive = {"owner-alive", "owner-paused"}
    scrubs = [key for key, inside in seen.controls.items() if inside.lost_peers and fates[key][0] in alive]
    return Plan(tuple(verdicts), tuple(sorted(scrubs)))


def _fate(seen: Scan, key: Key, control: Segment | None) -> tuple[str, str]:
    """Reason and text for all that an arena has."""
    if control is None:
        return "no-control", "data without a control segment: its arena is gone"
    if control.kind != "file" or control.uid != seen.uid:
        whose = f"a {control.kind}" if control.kind != "file" else f"of user {control.uid}"
        return "no-arena", f"its control segment is {whose}"
    inside = seen.controls.get(key)
    if inside is None:
        return "no-control", "its control segment has gone meanwhile"
    if inside.held is None:
        return "unknown", f"it could not be asked whether its owner is alive: {inside.trouble}"
    if inside.held:
        return _fate_of_the_held(inside)
    if inside.format > seen.format:
        return "newer-format", f"format {inside.format}, this build reads {seen.format}: sweep it with that build"
    if not inside.format:
        return "unfinished", "its creator died before it was ready"
    return "owner-dead", f"its owner is dead{_process(inside)}" + (" and had closed it" if inside.ended else "")


def _fate_of_the_held(inside: Control) -> tuple[str, str]:
    if inside.ended:
        return "ending", "its owner or another sweeper is removing it just now"
    if not inside.format:
        return "at-work", "its creator is at work"
    text = f"its owner is alive{_process(inside)}"
    if inside.paused:
        return "owner-paused", f"{text}, and paused"
    return "owner-alive", text


def _process(inside: Control) -> str:
    return f": pid {inside.pid}, {inside.command or 'no command'}" if inside.pid else ""


# ---- doing it


class Removed(NamedTuple):
    """A name that was taken away."""

    name: str
    nbytes: int
    key: Key


class Report(NamedTuple):
    """What `apply` has done."""

    removed: tuple[Removed, ...] = ()
    scrubbed: Mapping[Key, int] = {}
    """How many dead processes' claims were ended, by arena."""
    failed: tuple[tuple[str, str], ...] = ()
    """(name, why): what should have gone and could not."""
    stopped: bool = False
    """Whether it was told to stop before it was through."""

    @property
    def arenas(self) -> int:
        """Of how many arenas something was removed."""
        return len({one.key for one in self.removed})

    @property
    def nbytes(self) -> int:
        """Sum of the lengths of what was removed, bytes; a mapping that is still in use keeps its pages."""
        return sum(one.nbytes for one in self.removed)


def apply(todo: Plan, *, guard: Guard = nullcontext, stop: Stop = _never) -> Report:
    """Remove what the plan says may go, each arena only once its owner byte is ours, and scrub what dead peers claim.

    ``guard``: entered while descriptors with locks are open, so that no forked child inherits one. ``stop``: asked before
    each name, but for the first, so that whoever comes back until all is done gets there. Raises no OSError: what can not
    be removed is in the report, with all that was."""
    sizes: dict[Key, int] = {}
    for one in todo.removals:
        if one.segment.key is not None and one.reason != "no-control":
            sizes[one.segment.key] = sizes.get(one.segment.key, 0) + one.segment.nbytes
    sweep = _Sweep(sizes, stop)
    pending = deque(sorted(sizes))
    while pending and not stop():
        with guard():
            sweep.some(pending)
    orphans = [one.segment for one in todo.removals if one.reason == "no-control"]
    while orphans and not stop():
        sweep.orphan(orphans.pop())
    scrubs = deque(todo.scrubs)
    while scrubs and not stop():
        with guard():
            sweep.scrub(scrubs.popleft())
    return Report(tuple(sweep.removed), sweep.scrubbed, tuple(sweep.failed), bool(pending or orphans or scrubs))


def _most_together() -> int:
    """How many descriptors a sweep takes: whoever sweeps may have threads that need some as well."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _TOGETHER if limit == resource.RLIM_INFINITY else max(min(limit // 4, _TOGETHER), 1)


class _Sweep:
    def __init__(self, sizes: Mapping[Key, int], stop: Stop) -> None:
        self.removed: list[Removed] = []
        self.scrubbed: dict[Key, int] = {}
        self.failed: list[tuple[str, str]] = []
        self._sizes = sizes
        self._stop = stop
        self._most = _most_together()

    def some(self, pending: deque[Key]) -> None:
        """Take as many dead arenas as go together, then list once: their owners are dead and can not come back, as their
        bytes are ours, so the listing has every segment that they will ever have."""
        taken: dict[Key, int] = {}
        nbytes = 0
        try:
            while pending and len(taken) < self._most and nbytes < _TOGETHER_BYTES:
                nbytes += self._sizes[pending[0]]
                if not self._take(pending, taken):
                    break
            if taken:
                for key, numbers in self._listing(pending, taken).items():
                    if not self._remove(key, numbers):
                        pending.append(key)
        except OSError as error:
            self.failed += [(names.segment_name(*key, names.CONTROL)[1:], str(error)) for key in taken]
        finally:
            for fd in taken.values():
                os.close(fd)

    def _take(self, pending: deque[Key], taken: dict[Key, int]) -> bool:
        """Lock the next one; False where there is no descriptor left for it, so that those before it have to do."""
        key = pending.popleft()
        name = names.segment_name(*key, names.CONTROL)
        try:
            fd = names.open_writable(name)
        except FileNotFoundError:
            return True  # another sweeper was faster
        except OSError as error:
            if taken and error.errno in (errno.EMFILE, errno.ENFILE):
                pending.appendleft(key)
                return False
            self.failed.append((name[1:], str(error)))
            return True
        try:
            if self._dead(name, fd):
                taken[key] = fd
        except OSError as error:
            self.failed.append((name[1:], str(error)))
        finally:
            if key not in taken:
                os.close(fd)
        return True

    @staticmethod
    def _dead(name: str, fd: int) -> bool:
        """Whether the arena is ours to remove: looked at again, as the plan is from a moment ago."""
        if os.fstat(fd).st_uid != os.geteuid() or not _native.take_owner_byte(fd) or not names.is_current(name, fd):
            return False
        if _native.probe(fd)[1] > _native.FORMAT:
            return False
        _native.mark_ended(fd)
        return True

    def _listing(self, pending: deque[Key], taken: dict[Key, int]) -> dict[Key, list[int]]:
        while True:
            try:
                found = names.listing()
                break
            except OSError as error:
                if len(taken) == 1 or error.errno not in (errno.EMFILE, errno.ENFILE):
                    raise
                key, fd = taken.popitem()  # the listing needs a descriptor as well
                os.close(fd)
                pending.append(key)
        numbers: dict[Key, list[int]] = {key: [] for key in taken}
        for one in found:
            if (one.namespace, one.arena) in numbers:
                numbers[one.namespace, one.arena].append(one.number)
        return numbers

    def _remove(self, key: Key, numbers: list[int]) -> bool:
        """Data first; control only when no data is left that we may remove, so that who comes next finds the arena. False
        where it was told to stop before it was through."""
        for number in sorted(numbers, reverse=True):
            if self.removed and self._stop():
                return False
            if not self._unlink(names.Found(*key, number)):
                break
        return True

    def orphan(self, one: Segment) -> None:
        """Control comes before data and goes after it, and ids are never used twice: still without one, it is nobody's."""
        if one.key is None:
            return
        try:
            control = _look_at(names.Found(*one.key, names.CONTROL))
        except OSError as error:
            self.failed.append((one.name, str(error)))
            return
        if control is None:
            self._unlink(names.Found(*one.key, one.number))

    def _unlink(self, found: names.Found) -> bool:
        """False where it should have gone and could not; what is no file of this user is left where it is."""
        name = names.segment_name(*found)
        try:
            one = _look_at(found)
            if one is None or one.kind != "file" or one.uid != os.geteuid():
                return True
            if names.unlink(name):
                self.removed.append(Removed(one.name, one.nbytes, (found.namespace, found.arena)))
            return True
        except OSError as error:
            self.failed.append((name[1:], str(error)))
            return False

    def scrub(self, key: Key) -> None:
        """End what dead peers of a live arena claim; whoever lives there has its byte, and is left alone."""
        name = names.segment_name(*key, names.CONTROL)
        try:
            fd = names.open_writable(name)
        except FileNotFoundError:
            return
        except OSError as error:
            self.failed.append((name[1:], str(error)))
            return
        try:
            if names.is_current(name, fd) and (count := _native.scrub_dead_peers(fd)):
                self.scrubbed[key] = count
        except OSError as error:
            self.failed.append((name[1:], str(error)))
        finally:
            os.close(fd)
