"""What owners, readers and sweepers are told to do, and whether their answers are what they have to be."""

from __future__ import annotations

import itertools
import random
import time
from collections import defaultdict, deque
from collections.abc import Callable
from functools import partial
from typing import Any

from . import census
from .actors import GRANT_TIMEOUT_S, Spec, Terms
from .herd import Process
from .ledger import Arena, Block, block_of
from .link import ClosedError

Done = Callable[[str, Any], None]
Joined = dict[int, tuple[int, int]]

_POOL = 80
"""Handles under way to anybody; owners wait while there are more."""
_INBOX = 16
_HELD = 8
_KEPT = 10
_GONE = ("StaleHandleError", "ArenaGoneError")
_SIZES = ((64, 2000), (64, 2000), (2000, 16_000), (16_000, 70_000), (16_000, 70_000), (70_000, 330_000))


class Work:
    """The parent's knowledge of who should see what. ``complain``: takes a violation as text."""

    def __init__(
        self,
        rng: random.Random,
        processes: dict[int, Process],
        complain: Callable[[str], None],
        namespace: str,
    ) -> None:
        self._random, self._processes, self._complain, self._namespace = rng, processes, complain, namespace
        self.arenas: dict[int, Arena] = {}
        """Of owners that live, by process id."""
        self._inbox: dict[int, deque[Block]] = defaultdict(lambda: deque(maxlen=_INBOX))
        self._pool: deque[Block] = deque(maxlen=2 * _POOL)
        self._holds: dict[int, tuple[int, Block]] = {}
        self._filling: dict[int, tuple[Spec, Terms, Joined]] = {}
        self._keys = itertools.count(1)
        self.publishes = self.reads = self.passed_on = self.stale = self.full = 0

    # ---- processes

    def tell(self, process: Process, verb: str, *args: Any, done: Done) -> None:
        """One message; ``done`` gets the answer, unless the process dies first."""
        process.asked, process.busy, process.since = verb, done, time.monotonic()
        try:
            process.link.send((verb, *args))
        except ClosedError:
            pass  # it has died; the parent hears of it in its own time

    def next(self, process: Process) -> None:
        """Tell an idle process what to do; nothing, if there is nothing sensible."""
        if process.role == "owner":
            self._next_of_owner(process)
        elif process.role == "reader":
            self._next_of_reader(process)
        else:
            verb = self._random.choices(("sweep", "collect", "look"), (6, 2, 2))[0]
            self.tell(process, verb, done=partial(self._expect_ok, process, verb))

    def doom(self, process: Process) -> None:
        """From now on nothing can be relied on that this process holds or serves."""
        arena = self.arenas.get(process.pid)
        if arena is not None:
            arena.open = False
        for key in self._held_by(process.pid):
            _, block = self._holds.pop(key)
            block.holders.pop(process.pid, None)
            block.arena.let_go(key)

    def bury(self, process: Process) -> None:
        """It is dead."""
        self.doom(process)
        self.arenas.pop(process.pid, None)
        self._filling.pop(process.pid, None)
        self._inbox.pop(process.pid, None)
        for arena in self.arenas.values():
            arena.leave(process.pid)

    def dropped(self) -> dict[int, list[bytes]]:
        """Every reader lets go of everything, and every owner takes back what it has promised and nobody will come for.
        What that is, by the owner's process id, as far as promises do not end by themselves."""
        owed: dict[int, list[bytes]] = {}
        alive = {process.token: process.pid for process in self._processes.values()}
        for pid, arena in self.arenas.items():
            owed[pid] = [block.raw for block in [*arena.owed(alive), *arena.kept()]]
            arena.held.clear()
            arena.lasting.clear()
            for block in arena.blocks:
                block.void()
                block.holders.clear()
        self._pool.clear()
        self._inbox.clear()
        self._filling.clear()
        self._holds.clear()
        return owed

    def _held_by(self, pid: int) -> list[int]:
        return [key for key, (holder, _) in self._holds.items() if holder == pid]

    def _expect_ok(self, process: Process, what: str, kind: str, value: Any) -> None:
        if kind != "ok":
            self._complain(f"{process}: {what}: {kind}: {value}")

    # ---- owners

    def _next_of_owner(self, process: Process) -> None:
        arena = self.arenas.get(process.pid)
        if arena is None:
            self._create(process)
        elif self._random.random() < 0.004:
            self._close(process, arena)
        elif process.pid in self._filling and self._random.random() < 0.5:
            self._seal(process, arena)
        elif len(arena.kept()) > _KEPT:
            self._release_kept(process, arena)
        elif len(self._pool) > _POOL:
            if self._random.random() < 0.02:
                self.tell(process, "scrub", done=partial(self._expect_ok, process, "scrub"))
        else:
            acts = (self._publish, self._publish_many, self._fill, self._dumps, self._alias, self._release_kept)
            act = self._random.choices((*acts, self._withdraw), (50, 8, 10, 10, 6, 10, 4))[0]
            act(process, arena)

    def _close(self, process: Process, arena: Arena) -> None:
        arena.open = False
        self._filling.pop(process.pid, None)

        def done(kind: str, value: Any) -> None:
            self._expect_ok(process, "close", kind, value)
            arena.closed = True
            self.arenas.pop(process.pid, None)
            left = census.segments(self._namespace).get(arena.id)
            if left:
                self._complain(f"{process}: has closed arena {arena.id:016x}, and left {sorted(left)}")

        self.tell(process, "close", done=done)

    def _create(self, process: Process) -> None:
        def done(kind: str, value: Any) -> None:
            if kind == "ok":
                self.arenas[process.pid] = Arena(value, process.pid, open=not process.doomed)
            else:
                self._complain(f"{process}: create: {kind}: {value}")

        self.tell(process, "create", done=done)

    def _spec(self) -> Spec:
        return Spec(self._random.getrandbits(64), self._random.randint(*self._random.choice(_SIZES)))

    def _terms(self, arena: Arena) -> Terms:
        roll = self._random.random()
        keep, timeout = self._random.random() < 0.08, GRANT_TIMEOUT_S
        readers: int | str | tuple[int, ...] = self._random.randint(1, 3)
        if roll < 0.1:
            readers, keep = 0, True
        elif roll < 0.15:
            readers, keep = "all", True
        elif roll < 0.5 and arena.joined:
            tokens = [token for token, _ in arena.joined.values()]
            readers = tuple(self._random.sample(tokens, self._random.randint(1, min(3, len(tokens)))))
            timeout = None if self._random.random() < 0.15 else timeout
        return Terms(readers, keep, timeout, self._random.random() < 0.85)

    def _publish(self, process: Process, arena: Arena) -> None:
        spec, terms = self._spec(), self._terms(arena)
        wait = 0.02 if self._random.random() < 0.1 else 0.0
        done = partial(self._published, process, arena, [spec], terms, dict(arena.joined), time.monotonic())
        self.tell(process, "publish", spec, terms, wait, done=done)

    def _publish_many(self, process: Process, arena: Arena) -> None:
        specs, terms = [self._spec() for _ in range(self._random.randint(2, 5))], self._terms(arena)
        done = partial(self._published, process, arena, specs, terms, dict(arena.joined), time.monotonic())
        self.tell(process, "publish_many", specs, terms, done=done)

    def _fill(self, process: Process, arena: Arena) -> None:
        if process.pid in self._filling:
            return
        spec, terms, joined = self._spec(), self._terms(arena), dict(arena.joined)

        def done(kind: str, value: Any) -> None:
            if kind == "ok":
                self._filling[process.pid] = spec, terms, joined
            else:
                self._refused_publish(process, arena, terms, joined, kind, value)

        self.tell(process, "fill", spec, terms, done=done)

    def _seal(self, process: Process, arena: Arena) -> None:
        spec, terms, joined = self._filling.pop(process.pid)
        done = partial(self._published, process, arena, [spec], terms, joined, time.monotonic())
        self.tell(process, "seal", spec, terms, done=done)

    def _alias(self, process: Process, arena: Arena) -> None:
        kept = arena.kept()
        if not kept:
            return
        block, terms = self._random.choice(kept), self._terms(arena)
        done = partial(self._published, process, arena, block.specs, terms, dict(arena.joined), time.monotonic())
        self.tell(process, "alias", block.raw, block.specs[0], terms, done=done)

    def _published(
        self,
        process: Process,
        arena: Arena,
        specs: list[Spec],
        terms: Terms,
        joined: Joined,
        began: float,
        kind: str,
        value: Any,
    ) -> None:
        if kind != "ok":
            self._refused_publish(process, arena, terms, joined, kind, value)
            return
        for raw, spec in zip(value if isinstance(value, list) else [value], specs, strict=True):
            self.publishes += 1
            for problem in arena.overlaps(raw, spec.seed):
                self._complain(f"{process}: publish {spec}: {problem}")
            block = block_of(arena, raw, spec, terms, began, joined)
            arena.add(block)
            block.note(f"published by {process.asked} for {terms}")
            self._send_out(block)

    def _refused_publish(
        self, process: Process, arena: Arena, terms: Terms, joined: Joined, kind: str, value: Any
    ) -> None:
        if kind == "refused" and value[0] == "ArenaFullError":
            self.full += 1
            return
        if kind == "refused" and value[0] == "PeerLostError" and not isinstance(terms.readers, (int, str)):
            # Right where one of them has left or is dying; wrong where all of them are there, paused or not.
            named = [pid for pid, (token, _) in joined.items() if token in terms.readers]
            if any(not self._stayed(pid, arena, joined[pid]) for pid in named):
                return
        self._complain(f"{process}: publish for {terms}: {kind}: {value}; {self._history(arena)}")

    def _stayed(self, pid: int, arena: Arena, joined: tuple[int, int] | None) -> bool:
        """Whether that process lives and has been in the arena ever since. Who notices that an arena has ended leaves it."""
        process = self._processes.get(pid)
        there = joined is not None and arena.joined.get(pid) == joined
        return arena.open and there and process is not None and not process.doomed

    def _history(self, arena: Arena) -> str:
        """Who came and left lately, and who is in now."""
        return f"{list(arena.told)}; now {census.members(self._namespace, arena.id)}"

    def _send_out(self, block: Block) -> None:
        """Handles to their readers; some are lost on the way, but those that would be in force for ever."""
        for pid in block.named:
            if block.lasting or self._random.random() < 0.95:
                self._inbox[pid].append(block)
        # now and then one more than may come: who is late finds another block in its place
        more = self._random.random() < 0.15
        for _ in range(max(block.anonymous, 1) + more if block.anonymous or block.keep else 0):
            if self._random.random() < 0.95:
                self._pool.append(block)

    def _dumps(self, process: Process, arena: Arena) -> None:
        specs, readers = [self._spec() for _ in range(self._random.randint(1, 3))], self._random.randint(1, 3)
        began = time.monotonic()

        def done(kind: str, value: Any) -> None:
            if kind == "ok":
                self.publishes += len(specs)
                block = Block(arena, value, specs, True, began, began + GRANT_TIMEOUT_S, anonymous=readers)
                self._send_out(block)
            elif kind != "refused" or value[0] != "ArenaFullError":
                self._complain(f"{process}: dumps: {kind}: {value}")

        self.tell(process, "dumps", specs, readers, done=done)

    def _release_kept(self, process: Process, arena: Arena) -> None:
        kept = arena.kept()
        if not kept:
            return
        block = self._random.choice(kept)
        block.keep = False
        block.note("released")

        def done(kind: str, value: Any) -> None:
            if (kind, value) != ("ok", True):
                self._complain(f"{process}: release of a kept block: {kind}: {value}")

        self.tell(process, "release", block.raw, done=done)

    def _withdraw(self, process: Process, arena: Arena) -> None:
        blocks = [block for block in arena.blocks if not block.is_tree]
        if blocks:
            block = self._random.choice(blocks)
            block.void()
            block.note("withdrawn")
            self.tell(process, "withdraw", block.raw, done=partial(self._expect_ok, process, "withdraw"))

    # ---- readers

    def _next_of_reader(self, process: Process) -> None:
        held, roll = self._held_by(process.pid), self._random.random()
        if len(held) > _HELD or (held and roll < 0.22):
            self._release(process, self._random.sample(held, self._random.randint(1, len(held))))
        elif held and roll < 0.26:
            self.tell(process, "check", done=partial(self._checked, process))
        elif held and roll < 0.36:
            self._pass_on(process, self._random.choice(held))
        elif held and roll < 0.40:
            self._dump_view(process, self._random.choice(held))
        elif held and roll < 0.415:
            self._leave(process, self._holds[self._random.choice(held)][1].arena)
        else:
            block = self._pick(process)
            if block is not None:
                self.deliver(process, block, self._random.random() < 0.7)

    def _pick(self, process: Process) -> Block | None:
        if self._random.random() < 0.08 and self.arenas:
            old = self._random.choice(list(self.arenas.values())).blocks
            if old:
                return self._random.choice(old)
        inbox = self._inbox[process.pid]
        if inbox:
            return inbox.popleft() if self._random.random() < 0.8 else inbox.pop()
        return self._pool.popleft() if self._pool else None

    def deliver(self, process: Process, block: Block, hold: bool) -> None:
        """A handle, or a tree of them, reaches a reader."""
        key, pid = next(self._keys), process.pid
        reasons, voids, closed = block.reasons(pid, time.monotonic()), block.voids, block.arena.closed
        block.deliver(pid)
        block.note(f"sent to {pid}")

        def done(kind: str, value: Any) -> None:
            now = time.monotonic()
            holds = kind == "ok" and hold and not process.doomed
            block.answered(pid, now, holds)
            block.note(f"{kind} at {pid}")
            if kind == "ok":
                self.reads += len(block.specs)
                if closed:
                    self._complain(f"{process}: attach: succeeds after the arena was closed")
            elif kind != "refused" or value[0] not in _GONE:
                self._complain(f"{process}: attach: {kind}: {value}")
            elif standing := block.stand(reasons, voids, now):
                self._complain(f"{process}: attach of what is {' and '.join(standing)}: {value}; {block.told}")
            else:
                self.stale += 1
            if kind == "ok" or (kind == "refused" and value[0] == "StaleHandleError"):
                block.arena.join(pid, process.token)
            if holds:
                self._holds[key] = pid, block
                block.arena.hold(key, block)

        if block.is_tree:
            self.tell(process, "loads", key, block.raw, block.specs, hold, done=done)
        else:
            self.tell(process, "attach", key, block.raw, block.specs[0], hold, done=done)

    def _let_go(self, keys: list[int]) -> None:
        for key in keys:
            pid, block = self._holds.pop(key)
            block.let_go(pid)
            block.note(f"let go by {pid}")
            block.arena.let_go(key)

    def _release(self, process: Process, keys: list[int]) -> None:
        self._let_go(keys)
        self.reads += len(keys)
        self.tell(process, "release", keys, done=partial(self._expect_ok, process, "release"))

    def _checked(self, process: Process, kind: str, value: Any) -> None:
        self._expect_ok(process, "hold", kind, value)
        self.reads += value if kind == "ok" else 0

    def _leave(self, process: Process, arena: Arena) -> None:
        keys = [key for key in self._held_by(process.pid) if self._holds[key][1].arena is arena]
        self._let_go(keys)
        arena.leave(process.pid)
        self.tell(process, "leave", arena.id, keys, done=partial(self._expect_ok, process, "leave"))

    def _pass_on(self, process: Process, key: int) -> None:
        block = self._holds[key][1]
        others = [other for other in self._processes.values() if other.role == "reader" and other is not process]
        if block.is_tree or block.lasting or not others:
            return
        other = self._random.choice(others) if self._random.random() < 0.7 else None
        joined = block.arena.joined.get(other.pid) if other else None
        began = time.monotonic()

        def done(kind: str, value: Any) -> None:
            if kind == "ok":
                self.passed_on += 1
                block.note(f"passed on by {process.pid} to {other}")
                if other is None:
                    block.trust = max(block.trust, began + GRANT_TIMEOUT_S)
                elif joined is not None and block.arena.joined.get(other.pid) == joined:
                    block.passed_on(other.pid, began, GRANT_TIMEOUT_S)
                (self._pool if other is None else self._inbox[other.pid]).append(block)
            elif (kind, value[0]) != ("refused", "PeerLostError") or (
                other is None or self._stayed(other.pid, block.arena, joined)
            ):
                self._complain(
                    f"{process}: pass on to {other} since {began:.3f}: {kind}: {value}; {self._history(block.arena)}"
                )

        self.tell(process, "pass_on", key, 1 if other is None else [other.token], done=done)

    def _dump_view(self, process: Process, key: int) -> None:
        block = self._holds[key][1]
        if block.is_tree or block.lasting:
            return
        began = time.monotonic()

        def done(kind: str, value: Any) -> None:
            if kind == "ok":
                tree = Block(block.arena, value, block.specs, True, began, began + GRANT_TIMEOUT_S)
                tree.trust = tree.expires
                block.derived.append(tree)
                self._pool.append(tree)
            else:
                self._complain(f"{process}: dumps of a view: {kind}: {value}")

        self.tell(process, "dumps", key, 1, done=done)
