"""What `shmcast ls` shows: every arena of the host, from outside. Joins nothing, takes no lock, changes nothing.

What stays and what goes is decided in `gc`, here as everywhere: for the user that looks. Whether a process lives is the
verdict of its lock; what /proc says of its pid is for reading, and is left out where that pid is of another pid
namespace, or another process has it by now.
"""

import os
import time
from typing import Any, TypeAlias

from . import _native, gc, names, procfs
from .errors import LayoutMismatchError

Seen: TypeAlias = dict[str, Any]
"""Plain values, fit for JSON."""

_BLOCKS = ("claimed", "held", "granted", "awaited", "entrusted")
_FIGURES = ("max_bytes", "reserved_bytes", "used_bytes", "peak_used_bytes", "published", "slots")
_STATES = {
    "owner-alive": "live",
    "owner-paused": "live",
    "at-work": "starting",
    "ending": "ended",
    "owner-dead": "dead",
    "unfinished": "dead",
    "no-control": "orphan",
    "no-file": "damaged",
    "newer-format": "unreadable",
    "unknown": "unreadable",
}


def survey(namespace: str | None = None) -> list[Seen]:
    """All arenas, of one namespace or of all, by namespace and age. OSError where /dev/shm can not be read.

    Of each: "namespace", "arena" (hex), "uid", "mode", "segments" (data files), "file_bytes" (length of all its files),
    "state", "verdict" ("remove" where a sweep by this user takes something away, "keep"), "reason" (one of `gc.REASONS`),
    "why" (for people), "removable_bytes" (length of what such a sweep takes away), and, where it could be read, "owner",
    "age_s", "max_bytes", "reserved_bytes", "used_bytes", "peak_used_bytes", "published", "slots", "blocks" (how many are
    "claimed"; of these "held" by a process, "granted" to one that has not come yet, of which "awaited" by whoever comes
    and "entrusted" to the owner), "holders" (processes that hold blocks or may).

    States: "live", "dead" (its owner is), "ended" (closed, names still there), "starting" (no header yet), "orphan" (data
    without a control segment), "damaged" (what lies there is no arena), "unreadable" (of a user or a format of which this
    process can not read it)."""
    if namespace is not None:
        names.check_namespace(namespace)
    scan = gc.scan(namespace, closely=True)
    arenas: dict[gc.Key, list[gc.Verdict]] = {}
    for verdict in gc.plan(scan).verdicts:
        if verdict.segment.key is not None:
            arenas.setdefault(verdict.segment.key, []).append(verdict)
    seen = [_look(*key, sorted(verdicts, key=_number), scan.uid) for key, verdicts in arenas.items()]
    return sorted(
        (arena for arena in seen if arena),
        key=lambda arena: (arena["namespace"], -arena.get("age_s", 0), arena["arena"]),
    )


def _number(verdict: gc.Verdict) -> int:
    return verdict.segment.number


def _look(namespace: str, arena: int, verdicts: list[gc.Verdict], uid: int) -> Seen | None:
    """None where it is gone by now."""
    first = verdicts[0].segment
    files = [one for one in verdicts if one.segment.kind == "file"]
    going = [one for one in verdicts if one.action == "remove"]
    status = names.status(f"/{first.name}")
    if status is None:
        return None
    # That of its control segment is the arena's; without one, each of its files has its own.
    fate = verdicts[0] if first.number == names.CONTROL else [*going, *files, *verdicts][0]
    seen: Seen = {
        "namespace": namespace,
        "arena": f"{arena:016x}",
        "uid": first.uid,
        "mode": f"{status.st_mode & 0o777:04o}",
        "segments": sum(one.segment.number != names.CONTROL for one in files),
        "file_bytes": sum(one.segment.nbytes for one in files),
        "verdict": "remove" if going else "keep",
        "reason": fate.reason,
        "removable_bytes": sum(one.segment.nbytes for one in going),
    }
    if first.number == names.CONTROL and first.kind == "file":
        inside = _inside(verdicts, uid)
        if inside is None:
            return None
        seen.update(inside)
    elif first.number == names.CONTROL or not files:
        seen.update(state="damaged", why=fate.why)
    else:
        seen.update(state="orphan", why=_why_for_whom(fate, verdicts)[1])
    seen["why"] += _outlook(verdicts, seen)
    return seen


def _outlook(verdicts: list[gc.Verdict], seen: Seen) -> str:
    """What a sweep does about it, and what it does not take from whom."""
    text = ""
    staying = [one for one in verdicts if one.action == "keep"]
    if seen["verdict"] == "remove":
        text += "; the next sweep removes it"
        if staying:
            text += f", but for {', '.join(f'{one.segment.name} ({one.why})' for one in staying)}"
    readers = sum(peer["alive"] and peer["index"] != 0 for peer in seen.get("holders", ()))
    if readers and seen["state"] in ("dead", "ended"):
        text += f"; {readers} live reader{' keeps what it has' if readers == 1 else 's keep what they have'} mapped"
    return text


def _inside(verdicts: list[gc.Verdict], uid: int) -> Seen | None:
    """State, why, and what else its control segment says; None where that is gone by now."""
    fate = verdicts[0]
    try:
        fd = names.open_readable(f"/{fate.segment.name}", anybodys=True)
    except FileNotFoundError:
        return None
    except OSError as error:
        why = fate.why
        if fate.reason == "other-user":
            denied = isinstance(error, PermissionError)
            why += f"; look as that user{', or as root' if uid else ''}" if denied else f"; {error.strerror}"
        return {"state": "unreadable", "why": why}
    found: Seen | None = None
    trouble = ""
    try:
        held, number = _native.probe(fd)
        found = _native.inspect(fd)
    except LayoutMismatchError as error:
        trouble = str(error)
    except OSError:
        pass  # there is no header yet, or any more
    finally:
        os.close(fd)
    reason, why = _why_for_whom(fate, verdicts, _control(held, number, found))
    if found is not None:
        return _describe(found, reason, why)
    state = _STATES[reason]
    if trouble:
        state = "damaged" if number in (0, _native.FORMAT) else "unreadable"
    if trouble and reason != "newer-format":
        why += f"; {trouble}"
    return {"state": state, "why": why}


def _control(held: bool, number: int, found: Seen | None) -> gc.Control:
    if found is None:
        return gc.Control(held, number)
    owner: Seen = next((peer for peer in found["peers"] if peer["index"] == 0), {"pid": 0, "command": ""})
    return gc.Control(held, number, ended=found["ended"], pid=owner["pid"], command=owner["command"].strip())


def _why_for_whom(fate: gc.Verdict, verdicts: list[gc.Verdict], control: gc.Control | None = None) -> tuple[str, str]:
    """Reason and text of a fate; of what is another user's those that this user's own sweep would give."""
    key, uid = fate.segment.key, fate.segment.uid
    if fate.reason != "other-user" or key is None:
        return fate.reason, fate.why
    segments = tuple(one.segment for one in verdicts)
    theirs = gc.plan(gc.Scan(uid, _native.FORMAT, segments, {} if control is None else {key: control}))
    (there,) = (one for one in theirs.verdicts if one.segment == fate.segment)
    outlook = ": the next sweep of that user removes it" if there.action == "remove" else ""
    return there.reason, f"{there.why}; {fate.why}{outlook}"


def _describe(found: Seen, reason: str, why: str) -> Seen:
    peers = [_process(peer) for peer in found["peers"]]
    owner = next((peer for peer in peers if peer["index"] == 0), None)
    holders = [peer for peer in peers if peer["holds"] or peer["grants"] or (peer["alive"] and peer["index"] != 0)]
    state = _STATES[reason]
    return {
        "state": "ended" if state == "dead" and found["ended"] else state,
        "why": why,
        "age_s": max(time.time() - found["created_ns"] / 1e9, 0.0),
        "owner": owner,
        **{name: found[name] for name in _FIGURES},
        "blocks": {**{name: found[name] for name in _BLOCKS}, "free": found["slots"] - found["claimed"]},
        "holders": holders,
    }


def _process(peer: dict[str, Any]) -> Seen:
    """A peer for people. A pid is that of the pid namespace in which it joined; its start time tells whether that is ours."""
    here = peer["start_ticks"] != 0 and procfs.start_ticks(peer["pid"]) == peer["start_ticks"]
    state = procfs.state(peer["pid"]) if here else "elsewhere" if peer["alive"] else "gone"
    keys = ("index", "pid", "command", "alive", "holds", "held_bytes", "grants")
    return {**{key: peer[key] for key in keys}, "state": state}
