"""What runs in a worker process of a caster: materializes what it is told to, in blocks of the rank's arena.

::

    rank    setup, a pickle          once; the worker says "ready" or "failed"
            job, a pickled request   the worker answers with a draft, "none" or "failed"; before that it may ask for
              worker: blocks, each   where to write; the rank says where, or that there is no room
            quit

A message is one byte that says what it is, and the rest. `workers` has the rank's side.

A worker maps a block only from the moment at which it was given it until it answers; `_native.Window` says what becomes of
arrays that somebody keeps.
"""

import faulthandler
import json
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Sequence
from multiprocessing import spawn
from multiprocessing.connection import Connection
from struct import Struct
from typing import Any, NamedTuple

from . import _native, arrays, codec, drafts, lockstep, names, tensors
from .in_place import MIN_BYTES, Spot, find_spot
from .lockstep import Failure
from .materializing import call, out_parameter
from .reservation import form_of

READY, WANT, DRAFT, NONE, FAILED = b"r", b"w", b"d", b"n", b"f"
"""From the worker."""
JOB, BLOCK, NO_ROOM, QUIT = b"j", b"b", b"-", b"q"
"""From the rank."""
WANTED = Struct("<QB")
"""Bytes; whether the function has asked for it."""
PLACE = Struct("<IIQ")
"""Number of the block, of the data segment, offset in that."""


_KEPT_BYTES = 256 << 20
"""Freed memory that a worker keeps, so that the next request finds it mapped."""


class Setup(NamedTuple):
    """What a worker is started with."""

    preparation: dict[str, Any]
    """See `multiprocessing.spawn`: how modules are found, and what ``__main__`` was."""
    materialize: bytes
    """A pickle."""
    arena: tuple[str, int] | None
    """Namespace and id; None where the ranks share no memory."""


def main(fd: int, rank: int) -> None:
    """The process. ``fd``: of its end of the connection. ``rank``: the process that has started it."""
    if not _native.end_with_parent(rank):
        os._exit(1)
    # What the terminal sends to all, the rank decides about.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    if not any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        _native.keep_freed(_KEPT_BYTES)
    os.set_inheritable(fd, False)
    link = Connection(fd)
    os.register_at_fork(after_in_child=link.close)  # a child of the function's does not keep it open
    try:
        worker = _begin(Setup(*pickle.loads(link.recv_bytes())), link)
    except EOFError:
        return
    except BaseException as error:
        link.send_bytes(failed(lockstep.failure_of(error)))
        return
    link.send_bytes(READY)
    try:
        while (message := link.recv_bytes())[:1] == JOB:
            link.send_bytes(worker.answer(memoryview(message)[1:]))
            del message
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def failed(failure: Failure) -> bytes:
    """The message that says so; see `failure_in`."""
    return FAILED + json.dumps(failure).encode()


def failure_in(message: "bytes | memoryview") -> Failure:
    """What `failed` was given. ValueError where it is no such message."""
    kind, text, trace = json.loads(bytes(message[1:]))
    return Failure(str(kind), str(text), str(trace))


def _begin(setup: Setup, link: Connection) -> "_Worker":
    current: Any = multiprocessing.current_process()
    current._inheriting = True  # a script that starts workers when it is imported is told so
    try:
        spawn.prepare(setup.preparation)
        materialize = pickle.loads(setup.materialize)
    finally:
        del current._inheriting
    if setup.arena is not None:
        os.close(names.open_writable(names.segment_name(*setup.arena, names.CONTROL)))  # or jobs would fail, one by one
    return _Worker(materialize, link, setup.arena)


class _Blocks:
    """Blocks for the tree that is being made: what `InPlace` is in the rank's own threads."""

    def __init__(self, link: Connection, arena: tuple[str, int] | None) -> None:
        self._link = link
        self._arena = arena
        self._lock = threading.Lock()
        self._windows: list[tuple[_native.Window, arrays.ndarray]] = []
        self._extents: list[tuple[int, int]] = []
        self._closed = False

    def array(self, shape: int | Sequence[int], dtype: Any) -> arrays.ndarray:
        """See `InPlace.array`."""
        (_, code, lengths), nbytes = form_of(shape, dtype)
        found = self._block(nbytes, wanted=True)
        if found is None:
            return arrays.empty(lengths, code)
        array = arrays.over(found[1], code, lengths)
        self._windows[found[0]] = found[1], array
        return array

    def spot(self, thing: Any) -> Spot | None:
        """See `InPlace.spot`."""
        return find_spot(thing, self._extents, _native.Window)

    def part(self, taken: codec.Taken) -> drafts.Part:
        """Where an array of the tree lies; it is copied into a block, or into the answer, if it lies in none."""
        if taken.spot is not None:
            number, offset, kind, dtype, shape, _ = taken.spot
            return drafts.Part(kind, dtype, shape, number, offset)
        form = taken.form or tensors.describe(taken.array)
        found = None if taken.inline else self._block(form.nbytes, wanted=False)
        if found is None:
            return drafts.Part(*form[:3], source=arrays.contiguous(form))
        arrays.write(form, found[1])
        return drafts.Part(*form[:3], found[0], 0)

    def close(self) -> None:
        """From here on nothing that this process does reaches a block."""
        with self._lock:
            self._closed = True
            for window, array in self._windows:
                arrays.seal(array)
                window.close()
            self._windows.clear()
            self._extents.clear()

    def _block(self, nbytes: int, wanted: bool) -> "tuple[int, _native.Window] | None":
        with self._lock:  # the function may have threads
            if self._closed:
                raise ValueError("reserve an array for a tree: it has been encoded, or has failed")
            if self._arena is None or nbytes < MIN_BYTES:
                return None
            return self._ask(self._arena, nbytes, wanted)

    def _ask(self, arena: tuple[str, int], nbytes: int, wanted: bool) -> "tuple[int, _native.Window] | None":
        self._link.send_bytes(WANT + WANTED.pack(nbytes, wanted))
        answer = self._link.recv_bytes()
        if answer[:1] == NO_ROOM:
            return None
        number, segment, offset = PLACE.unpack(answer[1:])
        fd = names.open_writable(names.segment_name(*arena, segment))
        try:
            window = _native.Window(fd, offset, nbytes)
        finally:
            os.close(fd)
        array = arrays.flat(window, nbytes)
        self._windows.append((window, array))
        self._extents.append((arrays.address(array), nbytes))
        return number, window


class _Worker:
    def __init__(self, materialize: Callable[..., Any], link: Connection, arena: tuple[str, int] | None) -> None:
        self._materialize = materialize
        self._out_name = out_parameter(materialize)
        self._link = link
        self._arena = arena

    def answer(self, job: memoryview) -> bytes:
        """What has become of a request. Nothing of it is in reach any more when this returns."""
        blocks = _Blocks(self._link, self._arena)
        try:
            value = call(self._materialize, pickle.loads(job), self._out_name, blocks.array)
            if value is None:
                return NONE
            pickled, taken = codec.take_apart(value, blocks, MIN_BYTES)
            return DRAFT + drafts.write(pickled, [blocks.part(each) for each in taken])
        except BaseException as error:
            return failed(lockstep.failure_of(error))
        finally:
            blocks.close()
