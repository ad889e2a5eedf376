"""`sweep`: give back what dead publishers have left in /dev/shm. Any process may, at any time; sweepers do not disturb
each other, nor whoever creates, opens or closes an arena meanwhile.

An arena is dead when nobody holds the lock on its owner byte. Whoever takes that lock, and finds that the name still
means the file that was locked, is the only one who may unlink: data segments first, the control segment last.
"""

import os
from typing import NamedTuple

from . import _native, names
from .errors import ArenaError


class SweepReport(NamedTuple):
    """What a sweep has removed."""

    arenas: int
    """Arenas of which something was removed."""
    segments: tuple[str, ...]
    """Names, as in /dev/shm."""
    nbytes: int
    """Sum of their lengths; a mapping that is still in use keeps its pages."""


def sweep(namespace: str | None = None) -> SweepReport:
    """Remove every arena of a namespace (default: this process's own) whose owner is dead. Costs next to nothing where
    there is none. Readers of a removed arena keep what they have mapped. Segments of other users are left alone."""
    namespace = names.default_namespace() if namespace is None else names.check_namespace(namespace)
    arenas: dict[int, list[int]] = {}
    for found in names.listing(namespace):
        arenas.setdefault(found.arena, []).append(found.number)
    removed: list[str] = []
    nbytes = swept = 0
    for arena, numbers in arenas.items():
        try:
            here, length = _sweep_arena(namespace, arena, numbers)
        except OSError:
            continue  # of another user, no file of ours, or damaged: one such name must not keep the others
        removed += here
        nbytes += length
        swept += bool(here)
    return SweepReport(swept, tuple(removed), nbytes)


def _sweep_arena(namespace: str, arena: int, numbers: list[int]) -> tuple[list[str], int]:
    control = names.segment_name(namespace, arena, names.CONTROL)
    try:
        fd = names.open_writable(control)
    except FileNotFoundError:
        # Control comes before data and goes after it: data that was listed before this look belongs to nobody.
        return _unlink_all(namespace, arena, [number for number in numbers if number != names.CONTROL])
    except ArenaError:
        return [], 0  # a directory or a device of that name is not ours
    try:
        if not _native.take_owner_byte(fd) or not names.is_current(control, fd):
            return [], 0
        _native.mark_ended(fd)
        # Listed again, as the owner may have grown since: it is dead now, so this list is complete.
        numbers = [found.number for found in names.listing(namespace) if found.arena == arena]
        return _unlink_all(namespace, arena, sorted(numbers, reverse=True))
    finally:
        os.close(fd)


def _unlink_all(namespace: str, arena: int, numbers: list[int]) -> tuple[list[str], int]:
    removed: list[str] = []
    nbytes = 0
    for number in numbers:
        name = names.segment_name(namespace, arena, number)
        length = names.size_bytes(name)
        if names.unlink(name):
            removed.append(name[1:])
            nbytes += length
    return removed, nbytes
