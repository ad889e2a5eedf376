"""Which way a request goes, and how a deployment says so: `Mode.parse`, ``SHMCAST_MODE``.

::

    shm         materialized on the entry rank; arrays lie in shared memory, handles travel
    object      materialized on the entry rank; the pickle of the whole result travels
    raw         the raw request travels, and every rank materializes it
    replicate   every rank materializes the raw request that it was given itself

    WAY[-sync|-async][:PERCENT%]      "shm", "raw-sync", "shm:10%", "object-async:2.5%"

``async`` (where nothing is said): in the background, and the outcome comes with the first step that finds it done.
``sync``: the next step has it, and waits for it, up to 10 s and a third of the group's timeout, in which the others wait
for the entry rank; what every rank materializes is then materialized in the step, up to 63 of them, without a timeout of
their own. A percentage is a roll-out: of all request ids that share go this way, the same ids in every process and as long
as the percentage is not lowered; the others go the old way: ``replicate`` where every rank is given raw requests, ``object``
elsewhere. 0 % is none of them, 100 % is all. Ids of one type that `lockstep.chain` knows nothing of go the same way.

The entry rank alone chooses, for each request as it comes, and its message says which way that was: ranks can not diverge,
whatever is switched when and where.
"""

import os
import re
from collections.abc import Hashable
from enum import Enum
from typing import NamedTuple

from . import lockstep

VARIABLE = "SHMCAST_MODE"
"""Environment variable: the mode of every caster of the process, whatever its maker says, until it is switched."""

_SYNTAX = re.compile(r"(?P<way>[a-z]+)(-(?P<when>sync|async))?(:(?P<percent>[0-9]+(\.[0-9]+)?)%)?")
_SHARES = 1 << 32


class Way(Enum):
    """How a request becomes the same value on all ranks."""

    SHM = "shm"
    OBJECT = "object"
    RAW = "raw"
    REPLICATE = "replicate"

    @property
    def everywhere(self) -> bool:
        """Whether every rank materializes it."""
        return self in (Way.RAW, Way.REPLICATE)


class Route(NamedTuple):
    """What is chosen for one request."""

    way: Way = Way.SHM
    sync: bool = False


DEFAULT_ROUTE = Route()


class Mode(NamedTuple):
    """What chooses."""

    text: str
    """As it was said."""
    route: Route
    percent: float
    """Of the requests."""
    rest: Route
    """Of the others."""

    @staticmethod
    def parse(text: str, raw_everywhere: bool) -> "Mode":
        """ValueError where it is no mode, or needs raw requests on every rank that are not there."""
        found = _SYNTAX.fullmatch(text) if isinstance(text, str) else None
        ways = {way.value: way for way in Way}
        if found is None or found["way"] not in ways:
            raise ValueError(
                f"mode {text!r}: one of {', '.join(ways)} is needed, with -sync or -async and a percentage behind it if need "
                "be, as in 'shm', 'raw-sync', 'shm:10%'"
            )
        way = ways[found["way"]]
        if way is Way.REPLICATE and not raw_everywhere:
            raise ValueError(f"mode {text!r}: every rank has to be given the raw requests: raw_everywhere=True")
        percent = 100.0 if found["percent"] is None else float(found["percent"])
        if percent > 100:
            raise ValueError(f"mode {text!r}: {found['percent']} % of the requests is more than all of them")
        sync = found["when"] == "sync"
        rest = Way.REPLICATE if raw_everywhere else Way.OBJECT
        return Mode(text, Route(way, sync), percent, Route(rest, sync))

    def route_of(self, rid: Hashable) -> Route:
        """Which way a request goes. By its id alone, so that a retry goes as the first try did."""
        if self.percent >= 100:
            return self.route
        share = lockstep.chain(0, rid) % _SHARES
        return self.route if share < self.percent / 100 * _SHARES else self.rest


def first(mode: str | None, raw_everywhere: bool) -> Mode:
    """What is in force at first: `VARIABLE`, else what the caster was made with, else "shm". ValueError as for `Mode.parse`."""
    text = os.environ.get(VARIABLE)
    if not text:
        return Mode.parse(mode or Way.SHM.value, raw_everywhere)
    try:
        return Mode.parse(text, raw_everywhere)
    except ValueError as error:
        raise ValueError(f"{VARIABLE}: {error}") from None
