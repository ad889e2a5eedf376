"""`Cache`: results by the keys of their raw requests, held in the arena of the entry rank, the least recently used given up.

What is kept of a result are the bytes that its arrays travel as handles in, and a lease on each block that these name: no
rank, and nothing in this process, has a view of it that could be written. To send it again, every block is published once
more under another slot (`Arena.alias`), which copies nothing, and the bytes get these handles.

What a result counts for: its blocks, each once however many results have it, the bytes that it travels as, and `ENTRY_BYTES`
for the books. One that counts for more than the budget by itself is not kept; nor is one of which an array found no room in
the arena, or lies in an arena of somebody else, who would have to do without the room.

Where the ranks share no memory it keeps pickles. Lock order: an `Intake`'s lock, then the one here, under which nothing is
published, compared or released.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from . import _native, arrays, lockstep
from .arena import Arena
from .attach import Lease, attach
from .codec import Encoded, with_handles
from .errors import ArenaFullError
from .group import Group
from .handle import Handle
from .sizes import format_bytes
from .tally import Tally

ENTRY_BYTES = 1024
"""About what a result costs besides, in private memory: results may be a few bytes, and many."""


@dataclass(eq=False)
class Block:
    """A block of the arena with the right to read it, which ends with the last result that has it."""

    lease: Lease
    handle: Handle
    users: int = field(default=0)
    """Results in the cache that have it; under the cache's lock."""

    @property
    def names(self) -> tuple[Any, ...]:
        """Under which it is found by what may be the same: where it lies, and what its bytes are said to be."""
        handle = self.handle
        place = (handle.segment, handle.offset, handle.nbytes)
        return (place,) if handle.hash is None else (place, (handle.nbytes, handle.hash, handle.hash_name))


class Kept(NamedTuple):
    """A result that can be sent again, whether it is in the cache (still) or not."""

    end: int
    """`lockstep.VALUE` or `NONE`."""
    blob: bytes
    """With the handles of ``blocks``."""
    blocks: Sequence[Block]
    leases: Sequence[Lease]
    """On what lies in other arenas."""
    complete: bool
    """Whether all arrays that are large enough lie in blocks."""

    @property
    def own_bytes(self) -> int:
        """What it counts for if no other result has any of its blocks."""
        return ENTRY_BYTES + len(self.blob) + sum([block.handle.nbytes for block in self.blocks])


class Cache:
    """Results by key. From any thread."""

    def __init__(self, group: Group, *, max_bytes: int | None, max_entries: int | None, tally: Tally) -> None:
        """``max_bytes``: None: as much as the arena has; ValueError where that is less than asked for."""
        self._arena: Arena | None = group.arena
        own = _native.process_token()
        self._others = tuple([peer for peer in group.peers if peer != own])
        self._max_bytes = max_bytes
        self._max_entries = max_entries
        self._tally = tally
        self._lock = threading.Lock()
        self._results: dict[bytes, Kept] = {}  # the one that was used last stands last
        self._blocks: dict[Any, Block] = {}  # by each of their names
        self._bytes = 0
        self._closed = False
        if self._arena is not None:
            arena_bytes = self._arena.stats()["max_bytes"]
            if max_bytes is not None and max_bytes > arena_bytes:
                raise ValueError(
                    f"cache_bytes={format_bytes(max_bytes)} is more than the max_bytes of the arena that results lie in, "
                    f"{format_bytes(arena_bytes)}: ask for less, or make the group with a larger max_bytes"
                )
            self._arena.on_pressure(self.give_up)

    # ---- keep

    def find(self, key: bytes) -> Kept | None:
        """What is kept under a key, which is thereby the one that was used last."""
        with self._lock:
            kept = self._results.pop(key, None)
            if kept is not None:
                self._results[key] = kept
            return kept

    def keep(self, key: bytes, end: int, part: Encoded | None) -> Kept:
        """Keep what has become of a request, if it may be. ``part`` is changed where some of it was here before: then that
        is what it sends, and its own blocks are withdrawn. Where this raises, ``part`` is as it was."""
        if part is None:
            kept = Kept(end, b"", (), (), True)
        else:
            blocks = [Block(attach(handle), handle) for handle in part.handles]
            kept = Kept(end, part.blob, blocks, tuple(part.leases), part.inline_arrays == 0)
        if not self._fits(kept):
            return kept
        if part is not None and kept.blocks:
            kept = self._reuse(kept, part)
        self._insert(key, kept)
        return kept

    def _fits(self, kept: Kept) -> bool:
        within = self._max_bytes is None or kept.own_bytes <= self._max_bytes
        return within and kept.complete and not kept.leases

    def _insert(self, key: bytes, kept: Kept) -> None:
        gone = []
        with self._lock:
            if self._closed:
                return
            if key in self._results:
                gone.append(self._remove(key))
            self._results[key] = kept
            self._bytes += ENTRY_BYTES + len(kept.blob)
            for block in kept.blocks:
                block.users += 1
                if block.users == 1:
                    self._bytes += block.handle.nbytes
                    self._blocks.update(dict.fromkeys(block.names, block))
            while self._over():
                gone.append(self._remove(next(iter(self._results))))
                self._tally.add("cache_evicted")
            self._level()
        del gone  # leases end here, without the lock

    def _over(self) -> bool:
        """More than the newest alone never is: who keeps it has looked."""
        return (self._max_bytes is not None and self._bytes > self._max_bytes) or (
            self._max_entries is not None and len(self._results) > self._max_entries
        )

    def _remove(self, key: bytes) -> Kept:
        """With the lock held."""
        kept = self._results.pop(key)
        self._bytes -= ENTRY_BYTES + len(kept.blob)
        for block in kept.blocks:
            block.users -= 1
            if not block.users:
                self._bytes -= block.handle.nbytes
                for name in block.names:
                    if self._blocks.get(name) is block:
                        del self._blocks[name]
        return kept

    def give_up(self) -> bool:
        """Give up the result that was not used for the longest time; False where there is none."""
        gone = None
        with self._lock:
            if self._results:
                gone = self._remove(next(iter(self._results)))
                self._tally.add("cache_evicted")
                self._level()
        return gone is not None

    def close(self) -> None:
        """Give up everything, and keep nothing any more. Idempotent."""
        if self._arena is not None:
            self._arena.off_pressure(self.give_up)
        with self._lock:
            self._closed = True
            gone = list(self._results.values()), list(self._blocks.values())
            self._results.clear()
            self._blocks.clear()
            self._bytes = 0
            self._level()
        del gone

    def _level(self) -> None:
        self._tally.level("cache_bytes", self._bytes)
        self._tally.level("cache_entries", len(self._results))

    # ---- blocks that are there already

    def _reuse(self, kept: Kept, part: Encoded) -> Kept:
        """The same result of blocks that were here before, as far as there are any, in the cache or in the result itself."""
        held: list[Block] = []
        for block in kept.blocks:
            held.append(self._same(block, held))
        old = [have for have, block in zip(held, kept.blocks, strict=True) if have is not block]
        if not old:
            return kept
        again = Encoded(self._arena)
        sent: list[Handle] = []
        try:
            for have, block in zip(held, kept.blocks, strict=True):
                if _place(have.handle) == _place(block.handle):
                    sent.append(block.handle)
                else:
                    sent.append(self._alias(have))
                    again.handles.append(sent[-1])
            sent_blob = _renamed(kept.blob, kept.blocks, sent)
            held_blob = _renamed(kept.blob, kept.blocks, [block.handle for block in held])
        except ArenaFullError:  # no slot is left: better twice than not at all
            again.withdraw()
            return kept
        except BaseException:
            again.withdraw()
            raise
        twice = Encoded(self._arena)
        twice.handles = [handle for handle in part.handles if handle not in sent]
        part.blob, part.handles = sent_blob, sent
        twice.withdraw()
        self._tally.add("cache_reused", len(old))
        self._tally.add("cache_reused_bytes", sum([block.handle.nbytes for block in old]))
        return kept._replace(blob=held_blob, blocks=tuple(dict.fromkeys(held)))

    def _same(self, block: Block, others: Sequence[Block]) -> Block:
        """A block that has the same bytes, compared with them: one of the cache's, or of these; or itself."""
        with self._lock:
            found = [self._blocks[name] for name in block.names if name in self._blocks]
        found += [other for other in others if set(other.names) & set(block.names)]
        for old in found:
            if _place(old.handle) == _place(block.handle) or arrays.same_bytes(old.lease, block.lease):
                return old
        return block

    # ---- send

    def send(self, kept: Kept) -> Encoded:
        """A part of a message to be, as `Group.prepare` gives it. Raises what publishing raises."""
        encoded = Encoded(self._arena)
        encoded.blob = kept.blob
        if not kept.blocks and not kept.leases:
            return encoded
        handles: dict[tuple[int, int], Handle] = {}
        try:
            for block in kept.blocks:
                try:
                    handle = self._alias(block)
                except ArenaFullError:  # no slot is left
                    continue
                handles[block.handle.slot, block.handle.generation] = handle
                encoded.handles.append(handle)
            for lease in kept.leases:
                lease.grant_to(self._others)
                encoded.leases.append(lease)
            encoded.blob = with_handles(kept.blob, lambda handle: self._travels(handle, handles, encoded))
        except BaseException:
            encoded.withdraw()
            raise
        return encoded

    def _travels(
        self, handle: Handle, handles: dict[tuple[int, int], Handle], encoded: Encoded
    ) -> "Handle | arrays.Form":
        if self._arena is None or handle.arena != self._arena.id:
            return handle
        alias = handles.get((handle.slot, handle.generation))
        if alias is not None:
            return handle._replace(slot=alias.slot, generation=alias.generation)
        lease = attach(handle)  # the block is held, so this can not come too late
        encoded.inline_arrays += 1
        encoded.inline_bytes += handle.nbytes
        source = arrays.flat(lease.view(), handle.nbytes)
        return arrays.Form(handle.kind, handle.dtype, handle.shape, handle.nbytes, source, None)

    def _alias(self, block: Block) -> Handle:
        """The block once more, on the terms of `Group.prepare`."""
        if self._arena is None:
            raise ValueError("publish again: there is no arena")
        return self._arena.alias(block.handle, readers=self._others, keep=True, grant_timeout=None)


def _place(handle: Handle) -> tuple[int, int]:
    return handle.segment, handle.offset


def _renamed(blob: bytes, blocks: Sequence[Block], handles: Sequence[Handle]) -> bytes:
    """A tree with these handles in place of those of the blocks."""
    renamed = {
        (old.handle.slot, old.handle.generation): (old.handle, new) for old, new in zip(blocks, handles, strict=True)
    }

    def other(handle: Handle) -> Handle:
        whole, new = renamed.get((handle.slot, handle.generation), (handle, handle))
        return handle._replace(
            slot=new.slot,
            generation=new.generation,
            segment=new.segment,
            offset=new.offset + handle.offset - whole.offset,
        )

    return with_handles(blob, other)


VALUES = (lockstep.VALUE, lockstep.NONE)
"""Ends that can be kept."""
