"""What the console scripts print: text of anybody's made harmless, and output that can not be written, which changes
nothing of what was done, nor of the exit code that says so."""

import os
import select
import sys
import threading
from collections.abc import Callable, Iterable
from typing import TextIO

_MOST_BYTES = 4 << 20  # that wait to be written: whoever reads may be slow
_FAREWELL_S = 0.25  # for what waits at the end


def printable(line: str) -> str:
    """One line in which nothing moves the cursor: names in /dev/shm and command lines are anybody's."""
    return "".join(character if character.isprintable() else _escaped(character) for character in line)


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"  # a byte that is no UTF-8, as os.fsdecode has it
    return character.encode("unicode_escape").decode()


def show(lines: Iterable[str]) -> None:
    """Print lines. Nobody who reads them is no failure; anything else in the way is said on stderr."""
    if sys.stdout is None:
        return
    encoding = _encoding()
    text = "".join(f"{printable(line)}\n" for line in lines)
    try:
        sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except OSError as error:
        _give_up(sys.stdout)
        if not isinstance(error, BrokenPipeError):
            complain(f"write to stdout: {error}")


def complain(line: str) -> None:
    """Print a line on stderr, if there is one."""
    if sys.stderr is None:
        return
    try:
        print(printable(line), file=sys.stderr, flush=True)
    except OSError:
        _give_up(sys.stderr)


def stdout_fd() -> int | None:
    """Descriptor of stdout; None where it was closed: that number may mean any file by now."""
    return None if sys.stdout is None else sys.stdout.fileno()


def _encoding() -> str:
    return getattr(sys.stdout, "encoding", None) or "utf-8"


def _give_up(stream: TextIO) -> None:
    """What is in its buffer would fail again when the interpreter ends, and change the exit code."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


class Lines:
    """Lines for a descriptor that may take none for as long as it likes: a thread waits for it, nobody else does.

    What finds too much waiting, or fails to be written, is lost; how many lines that were is said as soon as some can be."""

    def __init__(self, fd: int | None, lost: Callable[[int], str]) -> None:
        """``fd``: None for nowhere. ``lost``: the line that says so. RuntimeError where there is no thread to be had."""
        self._fd = fd
        self._say_lost = lost
        self._encoding = _encoding()
        self._changed = threading.Condition()
        self._waiting: list[bytes] = []
        self._nbytes = 0
        self._lost = 0
        self._closed = False
        self._torn = False
        self._thread = threading.Thread(target=self._run, name="shmcast-lines", daemon=True)
        self._thread.start()

    def put(self, line: str) -> None:
        """Never waits."""
        data = self._encoded(line)
        with self._changed:
            if self._nbytes + len(data) > _MOST_BYTES:
                self._lost += 1
                return
            self._waiting.append(data)
            self._nbytes += len(data)
            self._changed.notify()

    def close(self) -> None:
        """Give what waits a moment more."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(_FAREWELL_S)

    def _encoded(self, line: str) -> bytes:
        return f"{printable(line)}\n".encode(self._encoding, "backslashreplace")

    def _run(self) -> None:
        closed = False
        while not closed:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                waiting, self._waiting, self._nbytes = self._waiting, [], 0
                lost, self._lost = self._lost, 0
                closed = self._closed
            if lost:
                waiting.append(self._encoded(self._say_lost(lost)))
            left = self._write(b"".join(waiting))
            if left:
                with self._changed:
                    self._lost += left + max(lost - 1, 0)  # the line that says so is none of those that were lost

    def _write(self, data: bytes) -> int:
        """How many lines can not be written."""
        if self._fd is None:
            return 0
        lines = data.count(b"\n")
        if self._torn:
            data = b"\n" + data
        try:
            while data:
                try:
                    written = os.write(self._fd, data)
                except BlockingIOError:  # somebody else has made it so
                    select.select([], [self._fd], [])
                    continue
                self._torn = data[written - 1 : written] != b"\n"
                data = data[written:]
        except OSError:
            return min(data.count(b"\n"), lines)
        return 0
