"""`Request`: a raw request on the entry rank, and about how large it is."""

from collections import deque
from collections.abc import Hashable, Iterable
from itertools import chain, islice
from typing import Any

from . import lockstep
from .codec import Encoded
from .lockstep import Failure, Record
from .modes import DEFAULT_ROUTE, Route

NEW, ASKED, WAITING, QUEUED, RUNNING, READY, TAKEN = range(7)
"""States: see the diagram in `intake`."""
_MAX_NODES = 10_000


class Request:
    """One raw request. Its fields change under the lock of its `Intake`."""

    __slots__ = (
        "deadline",
        "end",
        "expired",
        "failure",
        "given_up",
        "key",
        "part",
        "raw",
        "raw_bytes",
        "result_bytes",
        "rid",
        "route",
        "serial",
        "state",
        "timeout",
        "urgent",
    )

    def __init__(
        self,
        serial: int,
        rid: Hashable,
        raw: Any,
        timeout: float | None,
        urgent: bool = False,
        route: Route = DEFAULT_ROUTE,
    ) -> None:
        self.serial = serial
        self.rid = rid
        self.raw = raw
        self.timeout = timeout
        self.urgent = urgent
        self.route = route
        self.key: bytes | None = None
        """Of its content, where a cache has asked for one and there is one."""
        self.state = NEW
        self.end = lockstep.NONE
        self.failure: Failure | None = None
        self.part: Encoded | None = None
        self.deadline: float | None = None
        """When its worker is given up."""
        self.expired = False
        """Whether its end is that it ran out of time."""
        self.given_up = False
        """Whether its `Maker` was told that nobody waits for it; under the maker's lock."""
        self.raw_bytes = self.result_bytes = 0
        """What it counts for in `Intake.inflight_bytes`."""

    @property
    def ready(self) -> bool:
        """Whether its end is known, so that it takes no more than a message."""
        return self.state == READY and self.end not in lockstep.BEGINS | lockstep.MADE_AT_ONCE

    @property
    def record(self) -> Record:
        """For the message that it is taken into."""
        return Record(self.serial, self.end, self.failure)


def size_of(raw: Any) -> int:
    """About how many bytes of memory a raw request is: texts, bytes, and whatever has ``nbytes``, inside of containers and
    objects too. Cheap: of very many small things the rest is not looked at."""
    total = 0
    stack = [raw]
    seen: set[int] = set()
    for _ in range(_MAX_NODES):
        if not stack:
            break
        thing = stack.pop()
        if isinstance(thing, (str, bytes, bytearray)):
            total += len(thing)
        elif thing is not None and not isinstance(thing, (int, float, type)) and id(thing) not in seen:
            seen.add(id(thing))
            try:
                own, inside = _look_into(thing)
                total += own
                stack.extend(islice(inside, _MAX_NODES))
            except Exception:  # whatever its properties do: it is an estimate
                continue
    return total


def _look_into(thing: Any) -> tuple[int, Iterable[Any]]:
    nbytes = getattr(thing, "nbytes", None)
    if isinstance(nbytes, int):
        return nbytes, ()
    if isinstance(thing, dict):
        return 0, chain(thing.keys(), thing.values())
    if isinstance(thing, (list, tuple, set, frozenset, deque)):
        return 0, thing
    return 0, () if callable(thing) else getattr(thing, "__dict__", {}).values()
