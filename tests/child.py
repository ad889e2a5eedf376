"""Real processes for tests: one runs a function of a test module, and both ends speak in lines.

A test gets the `child` fixture of conftest.py::

    def reader(parent, raw):                     # module level, in the test module
        lease = shmcast.attach(shmcast.Handle.from_bytes(raw))
        parent.send("attached")
        parent.receive()                         # ends the child cleanly when the test ends or closes the link

    def test_something(child):
        peer = child(reader, handle.to_bytes())
        assert peer.receive() == "attached"      # a message is the synchronisation; nobody sleeps
        peer.kill()                              # SIGKILL, reaped
        child(reader, handle.to_bytes()).join()  # closes the link, waits, fails on an error in the child

Arguments and messages are Python literals (numbers, strings, bytes, tuples, lists, dicts, None), one a line. A child has
the namespace of its test, dies with the test process, and its output is in the message of whatever went wrong with it.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import importlib.util
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

RECEIVE_TIMEOUT_S = 60.0
EXIT_TIMEOUT_S = 20.0


class ChildFailedError(AssertionError):
    """A child ended or kept silent where the test expected otherwise; the message has its output."""


class LinkClosedError(EOFError):
    """The other end is gone. In a child this is the test's way to say "that is all"."""


class Link:
    """One end of two pipes that carry literals, one a line."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self._read_fd = read_fd
        self._write_fd = write_fd
        self._pending = b""
        self._open = True

    def send(self, value: object = None) -> None:
        """Send one literal. LinkClosedError where the other end is gone."""
        line = repr(value)
        if ast.literal_eval(line) != value:
            raise TypeError(f"send to the other process: not a literal: {line}")
        data = line.encode() + b"\n"
        try:
            while data:
                data = data[os.write(self._write_fd, data) :]
        except BrokenPipeError:
            raise LinkClosedError("send to the other process: it has closed the link") from None

    def receive(self, timeout: float = RECEIVE_TIMEOUT_S) -> Any:
        """The next message. LinkClosedError where the other end is gone, TimeoutError after ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        while b"\n" not in self._pending:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._read_fd], [], [], left)[0]:
                raise TimeoutError(f"receive from the other process: nothing for {timeout} s")
            data = os.read(self._read_fd, 1 << 16)
            if not data:
                raise LinkClosedError("receive from the other process: it has closed the link")
            self._pending += data
        line, self._pending = self._pending.split(b"\n", 1)
        return ast.literal_eval(line.decode())

    def close(self) -> None:
        """Close both pipes; the other end reads the end of file. Idempotent."""
        if self._open:
            self._open = False
            os.close(self._read_fd)
            os.close(self._write_fd)


class Child:
    """The test's end: a running child. Made by the `child` fixture, which also ends and reaps it."""

    def __init__(self, function: Callable[..., object], *args: object, **environment: str) -> None:
        self.name = function.__qualname__
        child_read, parent_write = os.pipe()
        parent_read, child_write = os.pipe()
        self._output = tempfile.TemporaryFile()
        self._expected = 0
        self._link = Link(parent_read, parent_write)
        call = repr((function.__code__.co_filename, function.__qualname__, args))
        command = [sys.executable, __file__, str(os.getpid()), str(child_read), str(child_write), call]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                pass_fds=(child_read, child_write),
                start_new_session=True,
                env={**os.environ, **environment},
            )
        except BaseException:
            self._link.close()
            self._output.close()
            raise
        finally:
            os.close(child_read)
            os.close(child_write)

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, value: object = None) -> None:
        """Send one literal to the child."""
        try:
            self._link.send(value)
        except LinkClosedError:
            self._fail("has ended before it could be told something")

    def receive(self, timeout: float = RECEIVE_TIMEOUT_S) -> Any:
        """The child's next message."""
        try:
            return self._link.receive(timeout)
        except LinkClosedError:
            self._fail("has ended where the test waits for a message")
        except TimeoutError:
            self._fail(f"has said nothing for {timeout} s")

    def signal(self, number: int) -> None:
        """Send a signal, SIGSTOP for example."""
        self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, then reap: when this returns the process is gone."""
        self._process.kill()
        self._process.wait(EXIT_TIMEOUT_S)
        self._expected = -signal.SIGKILL

    def wait(self, status: int = 0, timeout: float = EXIT_TIMEOUT_S) -> None:
        """Wait until the child ends by itself with this exit status (minus the signal number for a signal)."""
        self._expected = status
        try:
            found = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._fail(f"still runs after {timeout} s")
        if found != status:
            self._fail(f"has ended with status {found}, expected {status}")

    def join(self, timeout: float = EXIT_TIMEOUT_S) -> None:
        """Close the link, which ends a child that waits for a message, and wait for a clean end."""
        self._link.close()
        self.wait(0, timeout)

    def finish(self) -> None:
        """End of the test: end and reap what still runs; fail if a child has failed and nobody has noticed."""
        self._link.close()
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)
        try:
            status = self._process.wait(EXIT_TIMEOUT_S)
            if status != self._expected:
                self._fail(f"has ended with status {status}, expected {self._expected}")
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            self._fail(f"did not end within {EXIT_TIMEOUT_S} s after its link was closed")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # what it forked and left behind
            self._output.close()

    def _fail(self, what: str) -> None:
        self._output.seek(0)
        text = self._output.read().decode(errors="replace")
        raise ChildFailedError(f"child {self.name} (pid {self.pid}) {what}; it printed:\n{text}") from None


@contextlib.contextmanager
def untidy() -> Iterator[None]:
    """Without what removes leftovers of the dead in the background, and may be faster than a test that looks for them."""
    from shmcast import process

    tidy, process.tidy_now_and_then = process.tidy_now_and_then, lambda *_: None
    try:
        yield
    finally:
        process.tidy_now_and_then = tidy


def _main(parent_pid: int, read_fd: int, write_fd: int, call: str) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent_pid:
        sys.exit("the test process has died already")
    os.set_inheritable(read_fd, False)
    os.set_inheritable(write_fd, False)
    sys.modules["child"] = sys.modules["__main__"]  # one LinkClosedError, also for a test module that imports it
    path, name, args = ast.literal_eval(call)
    sys.path.append(str(Path(path).parent))  # what the module imports from its own folder
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    # Contexts are left in order and buffers released when the test closes the link.
    with contextlib.suppress(LinkClosedError), untidy():
        getattr(module, name)(Link(read_fd, write_fd), *args)


if __name__ == "__main__":
    _main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
