"""A page that a process shares with its parent: the process says there where it is (native/steps.h), the parent where to
stop. What the process has done last can be read when it is dead."""

from __future__ import annotations

import mmap
import signal

from shmcast import _native

PAGE_BYTES = 4096
# As in native/steps.h; the words between COUNT and TRACE are free, and ours.
STEP, LEFT, SIGNAL, LAST, COUNT = range(5)
HELD, INSIDE, PROGRESS = 8, 9, 10
TRACE = 16

STEP_NAMES = {number: name for name, number in _native.STEPS.items()}


class Board:
    """Both ends."""

    def __init__(self, words: memoryview) -> None:
        self._words = words
        for index in range(TRACE):
            words[index] = 0

    # ---- the process itself

    def watch(self) -> None:
        """This process passes its steps here from now on. Nothing in a build without steps."""
        if hasattr(_native, "fault_board"):
            _native.fault_board(self._words)

    def holds(self, count: int) -> None:
        """So many blocks are held, or being written."""
        self._words[HELD] = count

    def enter(self) -> None:
        """A call into shmcast begins."""
        self._words[INSIDE] = 1

    def leave(self) -> None:
        """It is over."""
        self._words[INSIDE] = 0

    def progress(self, count: int) -> None:
        """So many rounds are done."""
        self._words[PROGRESS] = count

    # ---- the parent

    def arm(self, step: int, times: int, number: signal.Signals) -> None:
        """At the ``times``-th pass of a step from now on the process sends itself that signal."""
        self._words[STEP] = 0
        self._words[LEFT], self._words[SIGNAL] = times, number
        self._words[STEP] = step

    def disarm(self) -> None:
        """Not any more. What has been seen just before may still come."""
        self._words[STEP] = 0

    def forget_trace(self) -> None:
        """`trace` begins anew."""
        self._words[COUNT] = 0

    @property
    def trace(self) -> set[int]:
        """Steps that were passed since `forget_trace`, as long as there was room."""
        end = min(TRACE + self._words[COUNT], len(self._words))
        return set(self._words[TRACE:end])

    @property
    def last(self) -> str:
        """Name of the step that was reached last; "none" before the first."""
        return STEP_NAMES.get(self._words[LAST], "none")

    @property
    def held(self) -> int:
        return int(self._words[HELD])

    @property
    def inside(self) -> bool:
        return bool(self._words[INSIDE])

    @property
    def rounds(self) -> int:
        return int(self._words[PROGRESS])


class Boards:
    """Pages for so many processes at once, in memory that children of this process share with it."""

    def __init__(self, count: int) -> None:
        self._memory = mmap.mmap(-1, count * PAGE_BYTES)
        self._free = list(range(count))

    def take(self) -> tuple[int, Board]:
        """A fresh board, and the number to give it back by."""
        index = self._free.pop()
        page = memoryview(self._memory)[index * PAGE_BYTES : (index + 1) * PAGE_BYTES]
        return index, Board(page.cast("I"))

    def give_back(self, index: int) -> None:
        """Its process is gone."""
        self._free.append(index)
