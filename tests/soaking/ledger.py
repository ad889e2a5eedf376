"""What the parent knows of every published block: who was promised it, who holds it, where it lies.

`Block.reasons` says why an attach has to succeed, if it has to. A promise counts from before the publisher was told until
`expires`, so what the parent takes for certain is never more than what shmcast has promised.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from shmcast import Handle

from .actors import Spec, Terms

REMEMBERED = 60
"""Blocks an arena of which old handles are tried again."""


@dataclass
class Block:
    """One handle, or one tree of handles, and what was promised with it. Processes are named by pid."""

    arena: Arena
    raw: bytes
    specs: list[Spec]
    is_tree: bool
    began: float
    """When its publisher was told to; monotonic seconds."""
    expires: float
    """Until when promises are in force."""
    keep: bool = False
    anonymous: int = 0
    """How many processes may come, the first ones."""
    named: dict[int, tuple[float, tuple[int, int]]] = field(default_factory=dict)
    """Who may come for sure: until when, and as what it had joined (`Arena.joined`)."""
    tokens: tuple[int, ...] = ()
    sure: set[int] = field(default_factory=set)
    """For whom it was published, and those of them that were in all the while; the others may be promised it or not."""
    voids: int = 0
    """How often its publisher has taken back what it had promised."""
    trust: float = -math.inf
    """Until when anybody may come, since a reader has passed it on."""
    delivered: set[tuple[int, int]] = field(default_factory=set)
    """Process ids, and how often each had left the arena before: who leaves and comes again counts twice."""
    derived: list[Block] = field(default_factory=list)
    """Trees in which the same block was passed on."""
    told: list[str] = field(default_factory=list)
    """What has happened to it, for the text of a violation."""
    holders: dict[int, int] = field(default_factory=dict)
    """How many leases each has, of those it was not told to release."""
    attached: dict[int, float] = field(default_factory=dict)
    """When each has last answered to an attach; infinite while one is under way."""

    @property
    def lasting(self) -> bool:
        return self.expires == math.inf

    def reasons(self, pid: int, now: float) -> list[tuple[str, float]]:
        """Why an attach that is about to be sent has to succeed: what, and until when. To be asked before `deliver`."""
        found = []
        if self.keep:
            found.append(("kept", math.inf))
        until, joined = self.named.get(pid, (-math.inf, None))
        if joined is not None and self.arena.joined.get(pid) == joined:
            found.append(("named", until))
        if self.anonymous and self._visit(pid) not in self.delivered and len(self.delivered) < self.anonymous:
            found.append(("one of the first", self.expires))
        found.append(("trusted", self.trust))
        found += [(f"held by {holder}", math.inf) for holder in self.holders]
        return [(what, until) for what, until in found if until > now]

    def stand(self, reasons: list[tuple[str, float]], voids: int, now: float) -> list[str]:
        """Those of the reasons that still hold now that the answer is here; none once the arena ends. ``voids``: as it was
        when they were asked for."""
        if not self.arena.open:
            return []
        holders = {f"held by {holder}" for holder in self.holders}
        good = holders | ({"kept"} if self.keep else set())
        if voids == self.voids:
            good |= {"named", "trusted"}
            if len(self.delivered) <= self.anonymous:  # or others were faster
                good.add("one of the first")
        return [what for what, until in reasons if until > now and what in good]

    def deliver(self, pid: int) -> None:
        """An attach is sent to that process."""
        self.named.pop(pid, None)
        self.delivered.add(self._visit(pid))
        self.attached[pid] = math.inf

    def _visit(self, pid: int) -> tuple[int, int]:
        return pid, self.arena.left.get(pid, 0)

    def note(self, text: str) -> None:
        """For `told`."""
        self.told.append(f"{time.monotonic() - self.began:.3f} {text}")

    def answered(self, pid: int, now: float, holds: bool) -> None:
        """It has answered; ``holds``: and keeps a lease."""
        self.attached[pid] = now
        if holds:
            self.holders[pid] = self.holders.get(pid, 0) + 1

    def let_go(self, pid: int) -> None:
        """It is told to release one lease."""
        self.holders[pid] -= 1
        if not self.holders[pid]:
            del self.holders[pid]

    def passed_on(self, pid: int, began: float, timeout: float) -> None:
        """A holder has promised it to that process. An attach of the same process at the same time may use it up."""
        if self.attached.get(pid, -math.inf) < began:
            self.named[pid] = began + timeout, self.arena.joined[pid]

    def void(self) -> None:
        """The publisher takes back what nobody has made use of."""
        self.voids += 1
        self.keep = False
        self.anonymous = 0
        self.named.clear()
        self.trust = -math.inf
        for tree in self.derived:
            tree.void()


@dataclass
class Arena:
    """One arena, until it is closed or its owner dies."""

    id: int
    owner: int
    """Process id."""
    open: bool = True
    """Whether it will serve for sure: not told to close, owner not about to be killed."""
    closed: bool = False
    """Whether its end is over: from here on every attach is refused."""
    joined: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Readers that are in it, by process id: token, and a number that is another one each time they join."""
    joins: int = 0
    told: deque[str] = field(default_factory=lambda: deque(maxlen=40))
    """Who came and left lately, for the text of a violation."""
    left: dict[int, int] = field(default_factory=dict)
    """How often each has left."""
    blocks: deque[Block] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    lasting: list[Block] = field(default_factory=list)
    """Those of them that are promised for ever."""
    held: dict[int, tuple[int, int, int, int]] = field(default_factory=dict)
    """Where what readers hold for sure lies: ``(segment, from, to, seed)`` by key of the lease."""

    def add(self, block: Block) -> None:
        """Remember it. What is kept is not forgotten before it is released."""
        while len(self.blocks) == REMEMBERED and self.blocks[0].keep:
            self.blocks.rotate(-1)
        self.blocks.append(block)
        if block.lasting:
            self.lasting.append(block)

    def join(self, pid: int, token: int) -> None:
        """That process is in, if it was not before."""
        if pid not in self.joined:
            self.joins += 1
            self.joined[pid] = token, self.joins
            self.note(f"{pid} is in")

    def leave(self, pid: int) -> None:
        """It is told to leave, or dies: what it was promised by name goes with it."""
        if self.joined.pop(pid, None) is not None:
            self.note(f"{pid} leaves")
        self.left[pid] = self.left.get(pid, 0) + 1

    def note(self, text: str) -> None:
        """For `told`."""
        self.told.append(f"{time.monotonic():.3f} {text}")

    def owed(self, alive: dict[int, int]) -> list[Block]:
        """What is promised for ever to somebody who lives and has not come. What the dead were promised ends with them.
        ``alive``: process ids by token."""
        found = []
        for block in self.lasting:
            pids = {alive[token] for token in block.tokens if token in alive}
            waits = any(self.joined.get(pid) == joined for pid, (_, joined) in block.named.items())
            if waits or pids - block.sure:
                found.append(block)
        return found

    def kept(self) -> list[Block]:
        return [block for block in self.blocks if block.keep and not block.is_tree]

    def hold(self, key: int, block: Block) -> None:
        """A reader has a lease under that key."""
        if not block.is_tree:
            self.held[key] = (*place(block.raw), block.specs[0].seed)

    def let_go(self, key: int) -> None:
        self.held.pop(key, None)

    def overlaps(self, raw: bytes, seed: int) -> Iterator[str]:
        """What is held and lies where a new block was put. The same seed is the same bytes under another handle."""
        segment, start, end = place(raw)
        for there, begins, ends, other in self.held.values():
            if there == segment and begins < end and start < ends and other != seed:
                yield f"bytes {start} to {end} of segment {segment} were reused, {begins} to {ends} are held"


def place(raw: bytes) -> tuple[int, int, int]:
    """Segment, first byte and end of a block."""
    handle = Handle.from_bytes(raw)
    return handle.segment, handle.offset, handle.offset + handle.nbytes


def block_of(
    arena: Arena, raw: bytes, spec: Spec, terms: Terms, began: float, joined: dict[int, tuple[int, int]]
) -> Block:
    """A block that was published on these terms by an owner that was told to at ``began``; ``joined``: who was in then."""
    expires = math.inf if terms.timeout is None else began + terms.timeout
    block = Block(arena, raw, [spec], False, began, expires, keep=terms.keep)
    if isinstance(terms.readers, int):
        block.anonymous = terms.readers
    else:
        tokens = None if terms.readers == "all" else terms.readers
        block.named = {
            pid: (expires, there)
            for pid, there in arena.joined.items()
            if joined.get(pid) == there and (tokens is None or there[0] in tokens)
        }
        block.tokens, block.sure = tokens or (), set(block.named)
    return block
