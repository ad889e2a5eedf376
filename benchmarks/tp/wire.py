"""The engine's own small broadcast: a socket from the entry rank to each of the others.

Engines differ in how they send it. The cheaper it is, the more of what is measured is the strategy's, and a broadcast of
the process group every 10 ms costs 4 ranks on 2 cores a tenth of both. The ranks of a stream never leave early, so nobody
looks for those that have.
"""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener


class Wire:
    """All ranks of a run; made once, by all together. `barrier`: returns when all ranks have called it."""

    def __init__(self, rank: int, size: int, path: str, barrier: Callable[[], object]) -> None:
        self._others: list[Connection] = []
        self._entry: Connection | None = None
        if rank == 0:
            with Listener(path, "AF_UNIX", backlog=size) as listener:
                barrier()
                self._others = [listener.accept() for _ in range(size - 1)]
        else:
            barrier()
            self._entry = Client(path, "AF_UNIX")

    def broadcast(self, payload: bytes = b"") -> bytes:
        """From the entry rank to all."""
        if self._entry is not None:
            return self._entry.recv_bytes()
        for other in self._others:
            other.send_bytes(payload)
        return payload

    def close(self) -> None:
        """Leave."""
        for connection in [*self._others, self._entry]:
            if connection is not None:
                connection.close()
