"""Everything that shmcast raises on purpose. Each is also the built-in by which a caller who does not know us catches it.

::

    ShmcastError(Exception)
    ├── ArenaError(OSError)              an arena can not be made, joined or used
    │   ├── ArenaFullError               no room in the arena, or in /dev/shm
    │   ├── ArenaGoneError               its owner closed it, or died and was swept
    │   └── LayoutMismatchError          what lies there is not an arena that this build reads
    ├── HandleError(ValueError)          not a handle, or not one of this host
    │   └── StaleHandleError             the block that it names is gone
    ├── IntegrityError(ValueError)       bytes and hash differ
    ├── UnsupportedArrayError(TypeError) an array that can not lie in shared memory as it is
    ├── GroupError(RuntimeError)         the ranks of a group can not go on together
    │   ├── PeerLostError                a process is not there (any more)
    │   └── GroupTimeoutError(TimeoutError)
    ├── MaterializeError(RuntimeError)   a raw request could not be turned into arrays
    └── BackpressureError(RuntimeError)  more requests or bytes than a caster takes at once; later is another matter

A message says action, object and both values, and what to do where there is something to do.
"""

from typing import Any


class ShmcastError(Exception):
    """Base of everything below."""


class ArenaError(ShmcastError, OSError):
    """An arena can not be made, joined or used; ``errno`` is set where the system gave one."""


class ArenaFullError(ArenaError):
    """There is no room: every byte, slot or segment that the arena may have is in use, or /dev/shm is full."""


class ArenaGoneError(ArenaError):
    """The arena was closed by its owner, or the owner died and it was swept. Leases that exist stay valid."""


class LayoutMismatchError(ArenaError):
    """The file is no control segment, or one of another format, or something has cut it."""


class HandleError(ShmcastError, ValueError):
    """The bytes are not a handle, or the handle is not of this host, arena or block."""


class StaleHandleError(HandleError):
    """The block that the handle names was reused or freed: every claim on it had ended."""


class IntegrityError(ShmcastError, ValueError):
    """Bytes do not have the hash that was published with them."""


class UnsupportedArrayError(ShmcastError, TypeError):
    """The array can not lie in shared memory as it is; the message says what to pass instead."""


class GroupError(ShmcastError, RuntimeError):
    """The ranks of a group can not go on together."""


class PeerLostError(GroupError):
    """A process that was named has died, or has not joined the arena."""


class GroupTimeoutError(GroupError, TimeoutError):
    """A rank did not come in time; the message names it."""


class MaterializeError(ShmcastError, RuntimeError):
    """A raw request could not be turned into arrays. The same on all ranks, so the cause itself is text."""

    rid: Any = None
    """Of the request."""
    kind: str = ""
    """Name of the exception's type on the entry rank; "TimeoutError" where it took too long."""
    text: str = ""
    """What the exception said."""
    traceback: str = ""
    """As the entry rank would have printed it."""

    @staticmethod
    def of(rid: object, kind: str, text: str, traceback: str) -> "MaterializeError":
        """With all that is known."""
        error = MaterializeError(f"materialize request {shown(rid)}: {kind}: {text}")
        error.rid, error.kind, error.text, error.traceback = rid, kind, text, traceback
        return error


class BackpressureError(ShmcastError, RuntimeError):
    """A caster has as many requests, or as many bytes in flight, as it may have: this one was not taken."""


def without_frames(error: BaseException) -> BaseException:
    """The same exception, and those behind it, without the frames that they have come through: who keeps it keeps nothing of
    what was held there."""
    chain: list[BaseException | None] = [error]
    for each in chain:  # grows
        if each is not None and each.__traceback__ is not None:
            each.__traceback__ = None
            chain += [each.__cause__, each.__context__]
    return error


def shown(thing: object) -> str:
    """``repr`` of somebody else's object, for messages that have to be made whatever it does."""
    try:
        return repr(thing)
    except Exception as error:
        return f"<{type(thing).__name__}, whose repr raises {type(error).__name__}>"
