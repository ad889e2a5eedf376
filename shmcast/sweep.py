"""`sweep`: give back what dead processes have left in /dev/shm. Any process may, at any time; sweepers do not disturb each
other, nor whoever creates, opens or closes an arena meanwhile. What goes and what stays is decided in `gc`."""

from typing import NamedTuple

from . import gc, names, process


class SweepReport(NamedTuple):
    """What a sweep has removed."""

    arenas: int
    """Arenas of which something was removed."""
    segments: tuple[str, ...]
    """Names, as in /dev/shm."""
    nbytes: int
    """Sum of their lengths; a mapping that is still in use keeps its pages."""


def sweep(namespace: str | None = None, *, peers: bool = True) -> SweepReport:
    """Remove every arena of a namespace (default: this process's own) whose owner is dead, and end what dead processes
    hold in the others. Costs next to nothing where there is nothing to do. Readers of a removed arena keep what they have
    mapped. Segments of other users are left alone, and so is what can not be removed: shmcast-gc says why.

    ``peers=False``: only the arenas of dead owners, which costs some 10 µs a live arena instead of 0.1 ms."""
    namespace = names.default_namespace() if namespace is None else names.check_namespace(namespace)
    return _sweep(namespace, peers)


def sweep_everywhere() -> SweepReport:
    """All namespaces of this user: where the host has no room, it does not matter whose leftovers are in the way."""
    return _sweep(None, False)


def _sweep(namespace: str | None, peers: bool) -> SweepReport:
    seen = gc.scan(namespace, closely=peers)
    report = gc.apply(gc.plan(seen), guard=lambda: process.fork_guard)
    return SweepReport(report.arenas, tuple(one.name for one in report.removed), report.nbytes)
