"""Channels move small byte strings, in order, from the entry rank of a group to the other ranks.

A channel knows nothing of arenas, handles or trees. What it promises:

- Every rank calls `broadcast` equally often; call n on the entry rank reaches call n of every other rank, or that call
  raises. Nothing is skipped, repeated or reordered without being noticed.
- A message is checked before it is given out.
- Every wait ends: with the message, after ``timeout`` seconds, when a connection breaks, or when ``watch`` raises.
- After an error from `broadcast` the ranks may be at different messages, so the channel is of no use any more.

One thread a channel. The conformance tests in ``tests/test_channels.py`` say the same and run over all of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeAlias

Watch: TypeAlias = Callable[[], None]
"""Called about twice a second while a rank waits. Knows what a channel can not see; what it raises ends the wait."""


DEFAULT_TIMEOUT_S = 1800.0
"""What ``torch.distributed`` gives a gloo group that is made without a timeout."""


class Channel(ABC):
    """The ranks of a group as one of them sees them, and the way from the entry rank to the others."""

    name: str
    """Of the kind of channel."""
    rank: int
    """Of this process, within the group."""
    size: int
    """How many ranks there are."""
    entry: int
    """The rank that sends."""
    overflows: int = 0
    """Messages so far that were too long to be sent in one piece."""

    @abstractmethod
    def broadcast(
        self, payload: bytes | None = None, *, timeout: float | None = None, watch: Watch | None = None
    ) -> bytes:
        """On the entry rank: send ``payload`` to all others and return it. Elsewhere: the next message; ``payload`` is
        not looked at.

        ``timeout``: seconds; None: as the channel was made. GroupTimeoutError (a rank did not come), PeerLostError (a
        connection is closed), GroupError (what came is not the next message), and whatever ``watch`` raises."""

    @abstractmethod
    def poll(self) -> bool:
        """Whether a message is there, so that `broadcast` would not wait for one; never on the entry rank.

        GroupError where a channel can not tell."""

    @abstractmethod
    def close(self) -> None:
        """Give up what the channel holds in this process. Idempotent; involves no other rank."""


class Rendezvous(Channel):
    """A channel on which ranks that share nothing yet can also learn about each other."""

    timeout: float
    """Seconds that a message may take where nothing else is said."""

    @abstractmethod
    def gather(self, record: bytes, *, timeout: float | None = None, watch: Watch | None = None) -> list[bytes]:
        """Every rank's ``record``, in the order of ranks, on every rank. At most `RECORD_BYTES` each; errors as above."""


RECORD_BYTES = 1000
"""Longest record that `Rendezvous.gather` carries."""


class LoopbackChannel(Rendezvous):
    """For a group of one: what is sent is received, in the same call."""

    name = "loopback"
    rank = 0
    size = 1
    entry = 0
    timeout = DEFAULT_TIMEOUT_S

    def broadcast(
        self, payload: bytes | None = None, *, timeout: float | None = None, watch: Watch | None = None
    ) -> bytes:
        """Return ``payload``."""
        return check_payload(payload)

    def gather(self, record: bytes, *, timeout: float | None = None, watch: Watch | None = None) -> list[bytes]:
        """Return the one record."""
        return [check_record(record)]

    def poll(self) -> bool:
        """False: this rank is the entry rank."""
        return False

    def close(self) -> None:
        """Nothing to give up."""


def check_payload(payload: bytes | None) -> bytes:
    """What the entry rank is about to send. TypeError where it is no byte string."""
    if not isinstance(payload, bytes):
        raise TypeError(f"broadcast: the entry rank sends bytes, not {type(payload).__name__}")
    return payload


def check_record(record: bytes) -> bytes:
    """ValueError where a record is too long to be gathered."""
    if len(record) > RECORD_BYTES:
        raise ValueError(f"gather: a record of {len(record)} bytes, at most {RECORD_BYTES} are carried")
    return record
