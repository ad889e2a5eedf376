"""Words in memory that ranks share, each a futex: what a wake-up costs on this machine, and how ranks wait for each other
without a collective.

The system call itself, through ctypes: of a round trip some 5 µs are Python's.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import time
from multiprocessing.context import BaseContext

PING, PONG, GO, DONE, READY = range(5)
"""Words. From READY on one a rank."""
_MAX_RANKS = 16
_APART = 16  # words: a cache line
_SYSTEM_CALL = {"x86_64": 202, "aarch64": 98}
_WAIT, _WAKE = 0, 1
_EVERYBODY = (1 << 31) - 1
_PATIENCE_S = 120.0


class _Timespec(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("ns", ctypes.c_long)]


_SECOND, _MOMENT = ctypes.byref(_Timespec(1, 0)), ctypes.byref(_Timespec(0, 5_000_000))


class Board:
    """Made by the parent and given to every rank; each word has one writer, and only grows."""

    def __init__(self, context: BaseContext) -> None:
        self._words = context.RawArray(ctypes.c_uint32, _APART * (READY + _MAX_RANKS))
        self._prepare()

    def __getstate__(self) -> object:
        return self._words

    def __setstate__(self, words: ctypes.Array[ctypes.c_uint32]) -> None:
        self._words = words
        self._prepare()

    def _prepare(self) -> None:
        self._futex = ctypes.CDLL(None, use_errno=True).syscall
        self._futex.restype = ctypes.c_long
        self._number = ctypes.c_long(_SYSTEM_CALL[platform.machine()])
        begin = ctypes.addressof(self._words)
        self._at = [ctypes.c_void_p(begin + 4 * place) for place in range(0, len(self._words), _APART)]

    def tell(self, word: int, value: int) -> None:
        """Set a word and wake who sleeps on it."""
        self._words[word * _APART] = value
        self._futex(self._number, self._at[word], _WAKE, _EVERYBODY, None, None, 0)

    def wait(self, word: int, value: int) -> None:
        """Sleep until a word has come so far; at once, without looking for a while first."""
        deadline = time.monotonic() + _PATIENCE_S
        while (seen := self._words[word * _APART]) < value:
            self._sleep(word, seen, _SECOND, deadline)

    # ---- ranks that wait for each other

    def arrive(self, rank: int, tp: int, value: int) -> None:
        """A rank other than 0 has come so far. The last of them, and no other, wakes rank 0, so that it does not take a core
        from those that have not come."""
        words = self._words
        words[(READY + rank) * _APART] = value
        for other in range(READY + 1, READY + tp):
            if words[other * _APART] < value:
                return
        self.tell(DONE, value)

    def gather(self, tp: int, value: int) -> None:
        """On rank 0: sleep until all others have come so far."""
        words = self._words
        deadline = time.monotonic() + _PATIENCE_S
        # Of two that come at the same time each may miss the other: then rank 0 finds out by itself.
        while min(words[other * _APART] for other in range(READY + 1, READY + tp)) < value:
            seen = words[DONE * _APART]
            if seen >= value:
                break
            self._sleep(DONE, seen, _MOMENT, deadline)

    def meet(self, rank: int, tp: int, value: int) -> None:
        """Come so far together."""
        if rank == 0:
            self.gather(tp, value)
            self.tell(GO, value)
        else:
            self.arrive(rank, tp, value)
            self.wait(GO, value)

    def _sleep(self, word: int, seen: int, at_most: object, deadline: float) -> None:
        failed = self._futex(self._number, self._at[word], _WAIT, ctypes.c_uint32(seen), at_most, None, 0) != 0
        if failed and ctypes.get_errno() not in (errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT):
            raise OSError(ctypes.get_errno(), f"futex wait for word {word}")
        if time.monotonic() > deadline:
            raise TimeoutError(f"word {word} is {seen} after {_PATIENCE_S} s: has a rank died?")
