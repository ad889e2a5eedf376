"""What owners, readers and sweepers do when their parent tells them to: one verb a message, one answer each.

An answer is ``(kind, value)``: "ok" and what the verb gives; "refused" and ``(class, text)`` of an error that shmcast
raises on purpose; "wrong" and what was read instead of what was published; "crashed" and a traceback.
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
import time
import traceback
from typing import Any, NamedTuple

import numpy as np

import shmcast
from shmcast import process

from .board import Board
from .link import ClosedError, Link

try:
    from shmcast.cli import gc as collector
except ImportError:
    collector = None

GRANT_TIMEOUT_S = 0.5
SEGMENT_BYTES = 256 << 10
MAX_BYTES = 2 << 20
MAX_BLOCKS = 96
DRAIN_S = 15.0
_MIX = np.uint64(0x9E3779B97F4A7C15)


class WrongBytesError(Exception):
    """Other bytes than were published."""


class Spec(NamedTuple):
    """An array to publish, and what it has to be found to be."""

    seed: int
    nbytes: int


class Terms(NamedTuple):
    """How it is published."""

    readers: int | tuple[int, ...] | str
    keep: bool
    timeout: float | None
    """Seconds that promises are in force; None: for ever."""
    hashed: bool


def pattern(spec: Spec) -> np.ndarray:
    """What is published under that seed: every word another one, and others than under any other seed."""
    words = np.arange(-(-spec.nbytes // 8), dtype=np.uint64)
    words += np.uint64(spec.seed)
    words *= _MIX
    return words.view(np.uint8)[: spec.nbytes]


def check(found: np.ndarray, spec: Spec, where: str) -> None:
    """WrongBytesError unless every byte is as published."""
    expected = pattern(spec)
    flat = found.reshape(-1).view(np.uint8)
    if flat.nbytes == spec.nbytes and np.array_equal(flat, expected):
        return
    differ = np.flatnonzero(flat != expected) if flat.nbytes == spec.nbytes else np.arange(1)
    at = int(differ[0])
    raise WrongBytesError(
        f"{where}: {spec}: {flat.nbytes} bytes, {len(differ)} of them differ, from {at} on: "
        f"{flat[at : at + 8].tobytes().hex()} instead of {expected[at : at + 8].tobytes().hex()}"
    )


class Actor:
    """A process that does what it is told until its link is closed."""

    def __init__(self, link: Link, board: Board, namespace: str) -> None:
        self.link, self.board, self.namespace = link, board, namespace

    def serve(self) -> None:
        """Answer every message."""
        self.link.send(("ok", (shmcast.process_token(), len(os.listdir("/proc/self/fd")) - 1)))
        while True:
            try:
                verb, *args = self.link.receive()
            except ClosedError:
                return
            answer = self.obey(verb, args)
            self.board.leave()
            self.board.holds(self.held())
            try:
                self.link.send(answer)
            except ClosedError:
                return

    def obey(self, verb: str, args: list[Any]) -> tuple[str, Any]:
        self.board.enter()
        try:
            return "ok", getattr(self, verb)(*args)
        except WrongBytesError as error:
            return "wrong", str(error)
        except shmcast.ShmcastError as error:
            return "refused", (type(error).__name__, str(error))
        except Exception:
            return "crashed", traceback.format_exc()

    def held(self) -> int:
        """Blocks that this process keeps others from reusing."""
        return 0


class Owner(Actor):
    """Publishes into one arena at a time."""

    arena: shmcast.Arena | None = None
    reservation: shmcast.Reservation | None = None

    def __init__(self, link: Link, board: Board, namespace: str) -> None:
        super().__init__(link, board, namespace)
        self.kept: dict[bytes, shmcast.Handle] = {}

    def held(self) -> int:
        return len(self.kept) + (self.reservation is not None)

    def create(self) -> int:
        """A new arena; returns its id."""
        self.arena = shmcast.Arena.create(
            MAX_BYTES,
            namespace=self.namespace,
            segment_bytes=SEGMENT_BYTES,
            max_blocks=MAX_BLOCKS,
            grant_timeout=GRANT_TIMEOUT_S,
            idle_timeout=0.3,
        )
        return self.arena.id

    def close(self) -> None:
        """The end of it, with whatever readers hold."""
        self.kept, self.reservation = {}, None
        self.arena.close()
        self.arena = None

    def _options(self, terms: Terms) -> dict[str, Any]:
        readers = list(terms.readers) if isinstance(terms.readers, tuple) else terms.readers
        return {"readers": readers, "keep": terms.keep, "hash": terms.hashed, "grant_timeout": terms.timeout}

    def _published(self, handle: shmcast.Handle, spec: Spec, terms: Terms) -> bytes:
        raw = handle.to_bytes()
        if terms.keep:
            self.kept[raw] = handle
        if terms.hashed and handle.hash != shmcast.hash128(pattern(spec)):
            raise WrongBytesError(f"publish {spec}: the handle has hash {handle.hash:032x}, not that of the array")
        return raw

    def publish(self, spec: Spec, terms: Terms, timeout: float) -> bytes:
        handle = self.arena.publish(pattern(spec), timeout=timeout, **self._options(terms))
        return self._published(handle, spec, terms)

    def publish_many(self, specs: list[Spec], terms: Terms) -> list[bytes]:
        handles = self.arena.publish_many([pattern(spec) for spec in specs], **self._options(terms))
        return [self._published(handle, spec, terms) for handle, spec in zip(handles, specs, strict=True)]

    def fill(self, spec: Spec, terms: Terms) -> None:
        """A reservation, half written: `seal` is another message, or never comes."""
        self.reservation = None
        reserved = self.arena.reserve(spec.nbytes, "uint8", **self._options(terms))
        self.board.holds(self.held() + 1)
        reserved.array[: spec.nbytes // 2] = pattern(spec)[: spec.nbytes // 2]
        self.reservation = reserved

    def seal(self, spec: Spec, terms: Terms) -> bytes:
        reserved, self.reservation = self.reservation, None
        reserved.array[spec.nbytes // 2 :] = pattern(spec)[spec.nbytes // 2 :]
        return self._published(reserved.seal(), spec, terms)

    def dumps(self, specs: list[Spec], readers: int) -> bytes:
        tree = {"arrays": [pattern(spec) for spec in specs], "seeds": [spec.seed for spec in specs]}
        return shmcast.dumps(tree, self.arena, readers=readers, min_bytes=1)

    def alias(self, raw: bytes, spec: Spec, terms: Terms) -> bytes:
        options = self._options(terms)
        del options["hash"]
        handle = self.arena.alias(self.kept[raw], **options)
        return self._published(handle, spec, terms._replace(hashed=False))

    def release(self, raw: bytes) -> bool:
        return self.arena.release(self.kept.pop(raw))

    def withdraw(self, raw: bytes) -> bool:
        self.kept.pop(raw, None)
        return self.arena.withdraw(shmcast.Handle.from_bytes(raw))

    def scrub(self) -> int:
        """What the dead have held ends, as when there is no room."""
        swept = self.arena._member.sweep_peers()
        self.arena._owner.reclaim(True)
        return swept

    def report(self) -> tuple[list[int], dict[str, int]]:
        """Numbers of the data segments, and counts."""
        return [number for number, *_ in self.arena._owner.segments()], self.arena.stats()

    def drain(self, raws: list[bytes]) -> dict[str, int]:
        """Once no reader holds anything: take these back, wait for other promises to be late. Everything must be free."""
        self.reservation = None
        for raw in raws:
            self.arena.withdraw(shmcast.Handle.from_bytes(raw))
        self.kept = {}
        gc.collect()
        deadline = time.monotonic() + DRAIN_S
        while True:
            self.scrub()
            stats = self.arena.stats()
            if not stats["slots_used"] or time.monotonic() > deadline:
                return stats
            time.sleep(0.02)  # nothing tells when a deadline has passed


class Reader(Actor):
    """Attaches, holds on to some of it, passes on, leaves and joins again."""

    def __init__(self, link: Link, board: Board, namespace: str) -> None:
        super().__init__(link, board, namespace)
        self.leases: dict[int, tuple[shmcast.Lease, Spec]] = {}
        self.trees: dict[int, tuple[dict[str, Any], list[Spec]]] = {}

    def held(self) -> int:
        return len(self.leases) + len(self.trees)

    def attach(self, key: int, raw: bytes, spec: Spec, hold: bool) -> None:
        lease = shmcast.attach(raw, verify=False)
        self.board.holds(self.held() + 1)
        check(lease.array, spec, "attach")
        if lease.handle.hash is not None:
            lease.verify()
            if lease.content_hash != lease.handle.hash:
                raise WrongBytesError(f"attach {spec}: content_hash {lease.content_hash}, not {lease.handle.hash}")
        if hold:
            self.leases[key] = lease, spec
        else:
            lease.release()

    def loads(self, key: int, blob: bytes, specs: list[Spec], hold: bool) -> None:
        tree = shmcast.loads(blob)
        self.board.holds(self.held() + len(specs))
        self._check_tree(tree, specs, "loads")
        if hold:
            self.trees[key] = tree, specs

    def _check_tree(self, tree: dict[str, Any], specs: list[Spec], where: str) -> None:
        if tree["seeds"] != [spec.seed for spec in specs]:
            raise WrongBytesError(f"{where}: a tree of {tree['seeds']} instead of {specs}")
        for array, spec in zip(tree["arrays"], specs, strict=True):
            check(array, spec, where)

    def check(self) -> int:
        """Everything that is held is what it was; returns how many arrays were read."""
        for lease, spec in self.leases.values():
            check(lease.array, spec, "hold")
        for tree, specs in self.trees.values():
            self._check_tree(tree, specs, "hold")
        return len(self.leases) + sum(len(specs) for _, specs in self.trees.values())

    def release(self, keys: list[int]) -> None:
        """Look once more, and let go."""
        for key in keys:
            if key in self.leases:
                lease, spec = self.leases.pop(key)
                check(lease.array, spec, "release")
                lease.release()
            else:
                self._check_tree(*self.trees.pop(key), "release")

    def pass_on(self, key: int, peers: int | list[int]) -> bytes:
        return self.leases[key][0].pass_on(peers).to_bytes()

    def dumps(self, key: int, readers: int) -> bytes:
        """A tree of the view itself: it travels as what it is, from an arena that is not ours."""
        lease, spec = self.leases[key]
        return shmcast.dumps({"arrays": [lease.array], "seeds": [spec.seed]}, readers=readers, min_bytes=1)

    def leave(self, arena: int, keys: list[int]) -> None:
        """Give everything of an arena back, and then the byte."""
        self.release(keys)
        process.leave(self.namespace, arena)

    def drop(self) -> int:
        """Let go of everything; returns how many arrays were looked at."""
        count = self.check()
        self.release([*self.leases, *self.trees])
        gc.collect()
        return count


class Sweeper(Actor):
    """Gives back what the dead have left, and looks at what is there."""

    def sweep(self) -> int:
        return len(shmcast.sweep(self.namespace).segments)

    def collect(self) -> int:
        """The same by `shmcast-gc --once`, as far as this build has it."""
        if collector is None:
            return self.sweep()
        with contextlib.redirect_stdout(io.StringIO()) as output:
            status = collector.main(["--once", "--json", "--namespace", self.namespace])
        if status:
            raise RuntimeError(f"shmcast-gc ends with {status}: {output.getvalue()}")
        return status

    def look(self) -> int:
        """Who only looks disturbs nobody."""
        return len(shmcast.metrics.read(self.namespace))


ROLES: dict[str, type[Actor]] = {"owner": Owner, "reader": Reader, "sweeper": Sweeper}
