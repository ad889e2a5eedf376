"""What `shmcast ls` shows: every arena of the host, from outside. Joins nothing, takes no lock, changes nothing.

Whether a process lives is the verdict of its lock; what /proc says of its pid is for reading, and is left out where that
pid is of another pid namespace, or another process has it by now.
"""

import os
import time
from typing import Any, TypeAlias

from . import _native, names, procfs
from .errors import ArenaError, LayoutMismatchError

Seen: TypeAlias = dict[str, Any]
"""Plain values, fit for JSON."""

_BLOCKS = ("claimed", "held", "granted", "awaited", "entrusted")
_FIGURES = ("max_bytes", "reserved_bytes", "used_bytes", "peak_used_bytes", "published", "slots")


def survey(namespace: str | None = None) -> list[Seen]:
    """All arenas, of one namespace or of all, by namespace and age.

    Of each: "namespace", "arena" (hex), "uid", "file_bytes" (of all its segments), "state", "why" (it stays, or goes), and,
    where it could be read, "owner", "age_s", "max_bytes", "reserved_bytes", "used_bytes", "peak_used_bytes", "published",
    "slots", "blocks" (how many are "claimed"; of these "held" by a process, "granted" to one that has not come yet, of
    which "awaited" by whoever comes and "entrusted" to the owner), "holders" (processes that hold blocks or may).

    States: "live", "dead" (its owner is), "ended" (closed, names still there), "starting" (no header yet), "orphan" (data
    without a control segment), "damaged", "unreadable" (of another user)."""
    if namespace is not None:
        names.check_namespace(namespace)
    numbers: dict[tuple[str, int], list[int]] = {}
    for found in names.listing(namespace):
        numbers.setdefault((found.namespace, found.arena), []).append(found.number)
    seen = [_look(*key, sorted(segments)) for key, segments in numbers.items()]
    return sorted(
        (arena for arena in seen if arena),
        key=lambda arena: (arena["namespace"], -arena.get("age_s", 0), arena["arena"]),
    )


def _look(namespace: str, arena: int, numbers: list[int]) -> Seen | None:
    paths = [names.DIRECTORY + names.segment_name(namespace, arena, number) for number in numbers]
    files = []
    for path in paths:
        try:
            files.append(os.lstat(path))
        except FileNotFoundError:
            continue
    if not files:
        return None
    seen: Seen = {
        "namespace": namespace,
        "arena": f"{arena:016x}",
        "uid": files[0].st_uid,
        "mode": f"{files[0].st_mode & 0o777:04o}",
        "segments": len([number for number in numbers if number != names.CONTROL]),
        "file_bytes": sum(file.st_size for file in files),
    }
    seen.update(_read(names.segment_name(namespace, arena, names.CONTROL)))
    return seen


def _read(control: str) -> Seen:
    try:
        fd = names.open_readable(control, anybodys=True)
    except FileNotFoundError:
        return {"state": "orphan", "why": "its control segment is gone: the next sweep removes the rest"}
    except PermissionError as error:
        return {
            "state": "unreadable",
            "why": f"it belongs to another user ({error.strerror}); look as that user, or as root",
        }
    except ArenaError as error:
        return {"state": "damaged", "why": str(error)}
    try:
        found = _native.inspect(fd)
    except LayoutMismatchError as error:
        return {"state": "damaged", "why": f"{error}; a sweep removes it once its owner is dead"}
    except ArenaError:
        return {"state": "starting", "why": "it is being made; where its maker died over it, the next sweep removes it"}
    finally:
        os.close(fd)
    return _describe(found)


def _describe(found: dict[str, Any]) -> Seen:
    peers = [_process(peer) for peer in found["peers"]]
    owner = next((peer for peer in peers if peer["index"] == 0), None)
    holders = [peer for peer in peers if peer["holds"] or peer["grants"] or (peer["alive"] and peer["index"] != 0)]
    state, why = _verdict(found, owner, holders)
    return {
        "state": state,
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


def _verdict(found: dict[str, Any], owner: Seen | None, holders: list[Seen]) -> tuple[str, str]:
    alive = owner is not None and owner["alive"]
    readers = len([peer for peer in holders if peer["alive"] and peer["index"] != 0])
    if found["ended"]:
        return (
            "ended",
            "its owner is closing it" if alive else "closed or swept half way: the next sweep removes the rest",
        )
    if alive:
        return "live", "its owner is alive"
    keep = (
        f"; {readers} live reader{' keeps what it has' if readers == 1 else 's keep what they have'} mapped"
        if readers
        else ""
    )
    return "dead", f"its owner is dead: the next sweep removes it{keep}"
