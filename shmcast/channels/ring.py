"""`RingChannel`: messages through a ring in the control segment of the entry rank's arena; nothing but shared memory.

Readers sleep until the entry rank has written, and cost nothing meanwhile. The entry rank waits only where a reader is a
whole ring behind. Who is dead or late the ring does not know: ``watch`` does. It is also asked as soon as a rank ends.
"""

import time

from .. import _native
from ..errors import GroupError, GroupTimeoutError
from . import Channel, Watch, check_payload

_SLICE_S = 0.5


class RingChannel(Channel):
    """One end of an arena's ring: the entry rank, which owns the arena, sends to all other ranks.

    A message that timed out before anything of it was in the ring was not sent, and the next one may be. One that the entry
    rank has given up midway ends the channel."""

    name = "ring"

    def __init__(self, ring: _native.Ring, rank: int, size: int, entry: int, *, timeout: float) -> None:
        """``timeout``: seconds that a message may take where `broadcast` is given none."""
        self._ring: _native.Ring | None = ring
        self.rank, self.size, self.entry = rank, size, entry
        self.overflows = 0
        self._timeout = timeout
        self._given_up = ""

    def broadcast(
        self, payload: bytes | None = None, *, timeout: float | None = None, watch: Watch | None = None
    ) -> bytes:
        """See `Channel.broadcast`."""
        seconds = self._timeout if timeout is None else timeout
        if self.rank == self.entry:
            message = self._send(self._open("broadcast"), check_payload(payload), seconds, watch)
        else:
            message = self._receive(self._open("broadcast"), seconds, watch)
        self.overflows += len(message) > _native.RING_PAYLOAD_BYTES
        return message

    def poll(self) -> bool:
        """See `Channel.poll`. Of a long message the rest may still be on its way."""
        return self._open("poll").poll() if self.rank != self.entry else False

    def close(self) -> None:
        """Forget the ring; it ends with its arena."""
        self._ring = None

    def _send(self, ring: _native.Ring, payload: bytes, seconds: float, watch: Watch | None) -> bytes:
        done = 0
        deadline = time.monotonic() + seconds
        try:
            while True:
                left = deadline - time.monotonic()
                now = ring.send(payload, done, _slice_ns(left))
                done = done if now is None else now
                if now == len(payload):
                    return payload
                _look_around(watch)
                if left <= 0:
                    raise GroupTimeoutError(f"broadcast: a rank did not read what was sent before within {seconds} s")
        except BaseException as error:
            # what is interrupted does not tell how much of it was in the ring by then
            if done or not isinstance(error, Exception):
                self._given_up = f"a message of {len(payload)} bytes was given up after {done} or more"
            raise

    def _receive(self, ring: _native.Ring, seconds: float, watch: Watch | None) -> bytes:
        deadline = time.monotonic() + seconds
        while True:
            left = deadline - time.monotonic()
            message = ring.receive(_slice_ns(left))
            if message is not None:
                return message
            _look_around(watch)
            if left <= 0:
                raise GroupTimeoutError(f"broadcast: rank {self.entry} sent no message within {seconds} s")

    def _open(self, action: str) -> _native.Ring:
        if self._ring is None or self._given_up:
            raise GroupError(f"{action}: {self._given_up or 'the channel is closed'}")
        return self._ring


def _slice_ns(left: float) -> int:
    return int(min(max(left, 0.0), _SLICE_S) * 1e9)


def _look_around(watch: Watch | None) -> None:
    if watch is not None:
        watch()
