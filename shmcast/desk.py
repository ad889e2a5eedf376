"""`Desk`: which requests are answered by a cache, which wait for an equal one, and which are materialized.

Of requests with one key that come while none is known, the first leads and is materialized, the others wait for it. When it
ends without a value, the next of them leads. Has no lock of its own: its intake's guards it, but for `key`, and `close`,
after which nothing else is called.
"""

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from .cache import Cache, Kept
from .group import Group
from .keys import key_of
from .request import WAITING, Request
from .sizes import parse_bytes
from .tally import Tally

CacheKey: TypeAlias = Callable[[Any], "bytes | str | None"]


class _Flight:
    """Requests with one key, of which one is being materialized."""

    __slots__ = ("leader", "waiting")

    def __init__(self, leader: Request) -> None:
        self.leader = leader
        self.waiting: deque[Request] = deque()


class Answer(NamedTuple):
    """What is to be done for a request."""

    kept: Kept | None = None
    """Send this."""
    leader: Request | None = None
    """Wait for this one; neither: it is to be materialized."""


class Desk:
    """A cache, and the requests that ask it."""

    def __init__(self, cache: Cache, make_key: CacheKey | None, tally: Tally) -> None:
        self.cache = cache
        self._make_key = make_key
        self._tally = tally
        self._flights: dict[bytes, _Flight] = {}

    def key(self, raw: Any) -> bytes | None:
        """Of a raw request, without the lock; None where it has none, whatever stands in the way."""
        try:
            if self._make_key is None:
                return key_of(raw)
            made = self._make_key(raw)
            return key_of(made) if isinstance(made, (bytes, str)) else None
        except Exception:  # it is materialized then, which will say what is wrong with it if anything is
            return None

    def ask(self, request: Request, key: bytes | None) -> Answer:
        """What is to be done for a request that has come."""
        if key is None:
            self._tally.add("cache_keyless")
            return Answer()
        request.key = key
        kept = self.cache.find(key)
        if kept is not None:
            self._tally.add("cache_hits")
            return Answer(kept)
        flight = self._flights.get(key)
        if flight is None:
            self._flights[key] = _Flight(request)
        elif _has_as_much_patience(request, flight.leader):
            flight.waiting.append(request)
            self._tally.add("cache_joined")
            return Answer(leader=flight.leader)
        self._tally.add("cache_misses")
        return Answer()

    def leader(self, request: Request) -> Request | None:
        """Whom a request waits for."""
        flight = None if request.key is None else self._flights.get(request.key)
        return None if flight is None else flight.leader

    def land(self, request: Request) -> list[Request]:
        """Who has waited for a request that has ended; nobody waits for it from here on."""
        if request.key is None or self.leader(request) is not request:
            return []
        return [each for each in self._flights.pop(request.key).waiting if each.state == WAITING]

    def next(self, request: Request) -> Request | None:
        """Who is to be materialized now that a request has ended and nothing can be had of it; None: nobody waits for it."""
        if request.key is None or self.leader(request) is not request:
            return None
        flight = self._flights[request.key]
        flight.waiting = deque([each for each in flight.waiting if each.state == WAITING])
        if not flight.waiting:
            del self._flights[request.key]
            return None
        urgent = any(each.urgent for each in flight.waiting)
        flight.leader = flight.waiting.popleft()
        flight.leader.urgent = urgent
        return flight.leader

    def close(self) -> None:
        """Forget everything. Idempotent."""
        self._flights.clear()
        self.cache.close()


def _has_as_much_patience(request: Request, leader: Request) -> bool:
    """A request that is to fail sooner than the one that is being materialized does not wait for it."""
    return request.timeout is None or (leader.timeout is not None and leader.timeout <= request.timeout)


def make_desk(
    group: Group,
    *,
    cache_bytes: int | str | None,
    cache_entries: int | None,
    cache_key: CacheKey | None,
    tally: Tally,
) -> Desk | None:
    """For the arguments of `Caster`; None on the other ranks, and where no cache is asked for. ValueError, TypeError."""
    max_bytes = None if cache_bytes is None else parse_bytes(cache_bytes, "cache_bytes")
    if cache_entries is not None and (isinstance(cache_entries, bool) or not isinstance(cache_entries, int)):
        raise TypeError(f"cache_entries: a number of results or None, not {cache_entries!r}")
    if cache_entries is not None and cache_entries < 1:
        raise ValueError(
            f"cache_entries={cache_entries}: at least 1 is needed; None: any number, and no cache of its own"
        )
    if cache_key is not None and not callable(cache_key):
        raise TypeError(f"cache_key: a function of the raw request is needed, not {cache_key!r}")
    if group.rank != group.entry or (max_bytes is None and cache_entries is None):
        return None
    cache = Cache(group, max_bytes=max_bytes, max_entries=cache_entries, tally=tally)
    return Desk(cache, cache_key, tally)
