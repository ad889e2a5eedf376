"""Messages between a process and its parent, and between ranks that do not share memory yet: whole or not at all."""

from __future__ import annotations

import pickle
import select
import socket
from typing import Any

_LONGEST_BYTES = 1 << 18


class ClosedError(EOFError):
    """The other end is gone."""


class Link:
    """One end of a pair of sockets. A message is one datagram, so who is killed leaves no half of one."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    @staticmethod
    def pair() -> tuple[Link, Link]:
        """Both ends."""
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return Link(one), Link(other)

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Any) -> None:
        """ClosedError where the other end is gone."""
        try:
            self._socket.send(pickle.dumps(message, 5))
        except (BrokenPipeError, ConnectionResetError):
            raise ClosedError("send: the other end is gone") from None

    def receive(self, timeout: float | None = None) -> Any:
        """The next message. ClosedError, and TimeoutError after so many seconds."""
        if timeout is not None and not select.select([self._socket], [], [], max(timeout, 0))[0]:
            raise TimeoutError(f"receive: nothing for {timeout} s")
        try:
            data = self._socket.recv(_LONGEST_BYTES)
        except ConnectionResetError:
            data = b""
        if not data:
            raise ClosedError("receive: the other end is gone")
        return pickle.loads(data)

    def poll(self) -> bool:
        """Whether there is something to receive, if only the end."""
        return bool(select.select([self._socket], [], [], 0)[0])

    def close(self) -> None:
        self._socket.close()
