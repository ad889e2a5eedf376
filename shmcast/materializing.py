"""`Maker`: who makes a value of a raw request on the entry rank, ready to be sent."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from . import lockstep
from .codec import Encoded
from .content import Hash
from .group import Group
from .in_place import InPlace
from .lockstep import Failure
from .modes import Way
from .request import Request
from .sending import Sender
from .tally import Tally


class Made(NamedTuple):
    """What has become of a raw request."""

    end: int
    """`lockstep.VALUE`, `NONE` or `FAILED`."""
    part: Encoded | None = None
    """Where it is a value."""
    failure: Failure | None = None
    """Where it has failed."""
    interrupt: BaseException | None = None
    """What is to be raised in the caller's thread too, if it is the caller's."""


class Maker(Protocol):
    """Called on worker threads, or on the group's own where there are none; several at once."""

    def make(self, request: Request, raw: Any, begun: Callable[[], object]) -> Made:
        """Materialize and publish. ``begun`` is called when it begins, which may be long after this: from then on the time
        counts that it may take. Raises nothing: whatever goes wrong is the one request's alone."""

    @property
    def pids(self) -> list[int]:
        """Of worker processes that are ready, where there are any: what they take of CPU is the rank's."""

    def give_up(self, request: Request) -> None:
        """Nobody waits any more for the `make` that runs for this request; from any thread."""

    def close(self) -> None:
        """Nothing more is made; what runs is not waited for. Idempotent."""


class Here:
    """A `Maker` that calls the function in its own process."""

    def __init__(
        self, group: Group, sender: Sender, materialize: Callable[..., Any], *, tally: Tally, hash: Hash = True
    ) -> None:
        """``hash``: of what is made in place."""
        self._group = group
        self._sender = sender
        self._materialize = materialize
        self._out_name = out_parameter(materialize)
        self._hash = hash
        self._tally = tally

    def make(self, request: Request, raw: Any, begun: Callable[[], object]) -> Made:
        """See `Maker`."""
        begun()
        place = None
        try:
            if self._out_name is not None:
                place = place_for(self._group, request, self._no_room, self._hash)
            value = call(self._materialize, raw, self._out_name, None if place is None else place.array)
            if value is None:
                return Made(lockstep.NONE)
            return Made(lockstep.VALUE, self._sender.prepare(request, value, place))
        except BaseException as error:
            interrupt = error if isinstance(error, KeyboardInterrupt) else None
            return Made(lockstep.FAILED, failure=lockstep.failure_of(error), interrupt=interrupt)
        finally:
            if place is not None:
                place.end()

    @property
    def pids(self) -> list[int]:
        """See `Maker`."""
        return []

    def give_up(self, request: Request) -> None:
        """See `Maker`: a thread can not be ended, so it goes on alone."""

    def close(self) -> None:
        """See `Maker`."""

    def _no_room(self, nbytes: int) -> None:
        self._tally.add("out_full")


class ByWay:
    """A `Maker` that makes nothing of raw requests that go raw."""

    def __init__(self, sender: Sender, maker: Maker) -> None:
        """``maker``: for all others."""
        self._sender = sender
        self._maker = maker

    def make(self, request: Request, raw: Any, begun: Callable[[], object]) -> Made:
        """See `Maker`."""
        if request.route.way is not Way.RAW:
            return self._maker.make(request, raw, begun)
        begun()
        try:
            end = lockstep.RAW if request.route.sync else lockstep.BEGIN_RAW
            return Made(end, self._sender.prepare(request, raw))
        except BaseException as error:
            interrupt = error if isinstance(error, KeyboardInterrupt) else None
            return Made(lockstep.FAILED, failure=lockstep.failure_of(error), interrupt=interrupt)

    @property
    def pids(self) -> list[int]:
        """See `Maker`."""
        return self._maker.pids

    def give_up(self, request: Request) -> None:
        """See `Maker`."""
        self._maker.give_up(request)

    def close(self) -> None:
        """See `Maker`."""
        self._maker.close()


def place_for(group: Group, request: Request, no_room: Callable[[int], object], hash: Hash) -> InPlace:
    """Where the value of a request is made. What is not sent as handles is not made in shared memory either, which may be
    what fails."""
    if request.route.way is Way.SHM:
        return group.in_place(no_room, hash)
    return InPlace(None, tokens=(), keep=False, grant_timeout=None)


def call(materialize: Callable[..., Any], raw: Any, out_name: str | None, out: "Callable[..., Any] | None") -> Any:
    """What the function makes of a raw request; ``out_name``: see `out_parameter`."""
    if out_name is None:
        return materialize(raw)
    return materialize(raw, **{out_name: out}) if out_name else materialize(raw, out)


def out_parameter(materialize: Callable[..., Any]) -> str | None:
    """How a function takes `InPlace.array`: the name of a parameter, "" for its second one; None where it does not.

    It does with a parameter called ``out``, or a second one that must be given. Other parameters with defaults are its own
    business."""
    try:
        parameters = list(inspect.signature(materialize).parameters.values())
    except (TypeError, ValueError):  # some functions in C
        return None
    positional = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    for each in parameters[1:]:
        if each.name == "out" and each.kind in (each.KEYWORD_ONLY, each.POSITIONAL_OR_KEYWORD):
            return "out"
    second = positional[1:2]
    return "" if second and (second[0].default is second[0].empty or second[0].name == "out") else None
