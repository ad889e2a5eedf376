"""The C core: bytes in shared memory, claims, hash and copy. Typed here, written in ``native/module*.c``.

Everything below is mechanism. Names, policy, dtypes and wire formats are Python's; see ``arena``, ``process``, ``attach``.
Buffers given to the core are C-contiguous. Counts are bytes unless the name says otherwise. Where a call could need
another data segment it returns ``None`` and changes nothing: the caller adds one and calls again.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, TypeAlias, TypeVar

from typing_extensions import Buffer

FORMAT: Final[int]
"""Format number of the control segment (``native/layout.h``)."""
PEER_COUNT: Final[int]
"""Processes that can be in one arena at once, the owner included (31)."""
SLOT_COUNT_MAX: Final[int]
SEGMENT_COUNT: Final[int]
"""Data segments that an arena can have at once (256)."""
BLOCK_ALIGN_BYTES: Final[int]
PAGE_BYTES: Final[int]
RING_ENTRIES: Final[int]
"""Messages, or pieces of one, that a reader of the ring may be behind before the writer waits (64)."""
RING_PAYLOAD_BYTES: Final[int]
"""Longest message, or piece of one, that fits into one entry of the ring."""

Published: TypeAlias = tuple[int, int, int, int, int | None]
"""``(slot, generation, segment, offset, hash)``; ``hash`` is XXH3-128 of the bytes, seed 0, or None where none was asked for."""

_LeaseT = TypeVar("_LeaseT", bound=Lease)

def hash128(buffer: Buffer, seed: int = 0, /) -> int: ...
def hash_paths() -> tuple[str, ...]: ...
def hash_with(path: str, buffer: Buffer, seed: int, /) -> int: ...
def hash_copy_with(path: str, stores: str, target: Buffer, source: Buffer, seed: int, /) -> int: ...
def copy_with(method: str, target: Buffer, source: Buffer, /) -> None:
    """Benchmark reference: ``method`` is ``"memcpy"`` or ``"streaming"`` (non-temporal stores, no hash)."""

def process_token() -> int:
    """Random non-zero 64-bit name of this process; another one in a forked child, also after a raw fork."""

STEPS: Final[dict[str, int]]
"""The numbered steps of ``native/steps.h``."""

def step(number: int, /) -> None:
    """Pass a step of `STEPS` that is taken in Python. Nothing happens in ordinary builds."""

def take_owner_byte(fd: int, /) -> bool:
    """Take the owner's lock through ``fd``; False where a live process has it. Held until ``fd`` and its mappings are gone."""

def mark_ended(fd: int, /) -> bool:
    """Mark the arena behind ``fd`` as ended, by who has taken its owner byte. False where there is no header yet."""

def probe(fd: int, /) -> tuple[bool, int]:
    """``(whether a live process has the owner's byte, format)`` of a control segment, through a fresh descriptor, which
    may be open for reading alone. Format 0: no header of ours, or not yet. Takes no lock and maps nothing."""

def scrub_dead_peers(fd: int, /) -> int:
    """End the claims of every dead peer of a live arena, as any of its peers may, without joining. ``fd``: a fresh
    descriptor of the control segment, open for writing. Returns how many there were. Raises as `inspect` does."""

def inspect(fd: int, /) -> dict[str, Any]:
    """Look at a control segment without joining: header, metrics, peers (with liveness by lock), blocks by state.
    ``fd`` may be open for reading alone. All is read from a private copy: a file that is cut meanwhile is an error, and
    what is being changed at that moment may be seen in part. Of the blocks that are ``"claimed"``: ``"held"`` by somebody,
    ``"granted"`` to somebody who has not come yet, of which ``"awaited"`` by anybody and ``"entrusted"`` to the owner until
    a deadline; of each peer ``"holds"``, ``"held_bytes"`` and ``"grants"``.
    ``"metrics"`` are the words of the block, as `METRICS` lays them out."""

METRICS: Final[tuple[tuple[str, str, int, str], ...]]
"""``(name, kind, first word, what it counts)`` of every metric (``native/metrics.h``).

Kinds: "counter", "gauge", "peak": one word; "histogram" (of ns) and "sizes" (of counts): the sum of what was observed,
the largest value, then how many values fell in each bucket."""
HISTOGRAM_ENDS_NS: Final[tuple[int, ...]]
"""The first value that is too large for each bucket of a histogram but the last, which has no end."""
SIZES_ENDS: Final[tuple[int, ...]]
"""The same for sizes."""

def metric(name: str, /) -> int:
    """Index of a metric in `METRICS`, for the calls of `Meter`. ValueError where there is none."""

class Meter:
    """Adds to metrics: to those of a member's arena, together with all its other processes, or, without a member, to
    words of its own. Keeps the member. Writes nothing in a forked child, nor once the member has left.

    ``index``: see `metric`. Values are 0 to 2**64 - 1. ValueError for a metric of another kind."""

    def __init__(self, member: Member | None = None, /) -> None: ...
    def add(self, index: int, more: int, /) -> None:
        """Counters."""

    def set(self, index: int, value: int, /) -> None:
        """Gauges."""

    def peak(self, index: int, value: int, /) -> None:
        """Peaks: becomes the value where it was less."""

    def observe(self, index: int, value: int, /) -> None:
        """Histograms, in ns, and sizes."""

    def words(self) -> list[int]: ...
    @property
    def shared(self) -> bool:
        """Whether it writes into an arena."""

class Member:
    """This process in one arena: a peer index, its lock, the mapped control segment and the data segments mapped so far."""

    @classmethod
    def create(
        cls,
        map_fd: int,
        lock_fd: int,
        opener: Callable[[int], int],
        arena_id: int,
        host: int,
        max_bytes: int,
        slot_count: int,
        /,
    ) -> Member:
        """Become the owner: ``lock_fd`` already has the owner byte (`take_owner_byte`). Reserves, writes the header, magic last."""

    @classmethod
    def join(cls, map_fd: int, lock_fd: int, opener: Callable[[int], int], arena_id: int, /) -> Member:
        """Take a free byte. ArenaGoneError (ended), LayoutMismatchError, ArenaError (not ready, short, no byte free)."""

    @property
    def index(self) -> int: ...
    @property
    def incarnation(self) -> int: ...
    @property
    def arena_id(self) -> int: ...
    @property
    def nonce(self) -> bytes: ...
    @property
    def max_bytes(self) -> int: ...
    @property
    def ended(self) -> bool: ...
    @property
    def inherited(self) -> bool:
        """True in a forked child of the process that joined: every operation refuses, and releases do nothing."""

    def attach(
        self,
        lease_type: type[_LeaseT],
        slot: int,
        generation: int,
        segment: int,
        offset: int,
        nbytes: int,
        /,
    ) -> _LeaseT:
        """Pin, validate, map if need be (``opener(segment)``), and return a lease of exactly these bytes.

        StaleHandleError, ArenaGoneError, HandleError (the range is not inside the block), OSError from the opener."""

    def map_segment(self, segment: int, populate: bool, /) -> None: ...
    def tokens(self) -> dict[int, int]:
        """``{token: peer index}`` of the processes that have joined and not left, the owner's included; liveness not probed."""

    def alive(self, token: int, /) -> bool:
        """Whether the process of that token still holds its byte of this arena (probes the lock: some 10 µs)."""

    def sweep_peers(self) -> int:
        """Scrub every dead peer's claims; returns how many there were."""

    @property
    def step(self) -> int:
        """This peer's step word."""

    def set_step(self, step: int, failed: bool = False, /) -> None: ...
    def steps(self) -> dict[int, tuple[int, int]]:
        """``{token: (step, failed_step)}`` of all joined processes."""

    def leave(self) -> None:
        """Scrub our own claims, then give the byte up. The owner does not leave: see `Owner.end`."""

class Lease:
    """The right to read a range of a block. Exports a read-only buffer. Dropping the last reference releases it."""

    def __buffer__(self, flags: int, /) -> memoryview: ...
    @property
    def address(self) -> int:
        """Address of the first byte in the shared read-only mapping."""

    @property
    def nbytes(self) -> int: ...
    @property
    def released(self) -> bool: ...
    @property
    def owns_pages(self) -> bool:
        """Whether the block may be mapped privately (it shares no page with another block)."""

    def view(self, private: bool = False, /) -> View:
        """An exporter of the lease's bytes: read-only, or writable copy-on-write, which other leases do not see. Keeps the
        lease alive; counts as an export.

        ``private=True`` raises ValueError unless `owns_pages`, OSError where the private mapping can not be made."""

    def modified(self) -> bool:
        """Whether somebody has written into a private view of this lease."""

    def release(self) -> None:
        """Give the hold up now. BufferError while views or buffers are exported. Idempotent; nothing in a forked child."""

    @property
    def content_hash(self) -> int | None:
        """XXH3-128 (seed 0) of the block as published; None where it was not hashed or the lease covers a part of it."""

    def grant_to(self, tokens: Iterable[int], /) -> int:
        """Pass the block on: grant the block to these processes; the owner becomes trustee for those that have not joined. Returns how many
        were granted by name. PeerLostError where one died meanwhile."""

    def pending(self, tokens: Iterable[int], /) -> int:
        """How many of these processes still have an unconsumed grant on the block and are alive by their incarnation."""

class View:
    """Exports a lease's bytes through the buffer protocol (``numpy.ndarray(..., buffer=view)``)."""

    def __buffer__(self, flags: int, /) -> memoryview: ...
    @property
    def lease(self) -> Lease: ...
    @property
    def private(self) -> bool: ...
    @property
    def address(self) -> int: ...

class Reservation:
    """A block that is being written in place. Exports a writable buffer until it is sealed or aborted."""

    def __buffer__(self, flags: int, /) -> memoryview: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def place(self) -> tuple[int, int]:
        """``(number of the data segment, offset in it)``."""

    def seal(
        self, count: int, tokens: Sequence[int] | None, keep: bool, timeout_ns: int, hashed: bool, /
    ) -> Published: ...
    def abort(self) -> None: ...

class Window:
    """One block of somebody else's arena, to be written by a worker process of its owner: ``Window(fd of the data segment,
    offset, size)``. Exports a writable buffer until it is closed. Around it are pages that nobody may touch, and forked
    children do not get it. ValueError, LayoutMismatchError (the segment ends before it does), OSError."""

    def __init__(self, fd: int, offset_bytes: int, size_bytes: int, /) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def close(self) -> None:
        """Nothing that this process does reaches the block any more: who has kept an array, or writes in a thread, has
        private memory in its place, zeros at first. Idempotent."""

def end_with_parent(parent: int, /) -> bool:
    """Have this process killed when the thread ends that has started it. ``parent``: its process; False where it has ended
    already. OSError."""

def keep_freed(nbytes: int, /) -> bool:
    """Have this process's malloc keep so many freed bytes for what comes next; False where it can not be told."""

class Owner:
    """Publisher's side of an arena: allocator, slots, deadlines; all of it private memory of this process.

    ``count``: anonymous claims (readers=n, 0 for none). ``tokens``: processes that get a grant each; PeerLostError where
    one has not joined or died meanwhile; None: whoever has joined, and nobody is missed. ``keep``: the arena itself holds the block until `release`. ``timeout_ns``: how
    long unclaimed grants are in force; 0: for ever. Every call first takes back what became free."""

    def __init__(self, member: Member, /) -> None: ...
    def add_segment(self, number: int, fd: int, size_bytes: int, /) -> None:
        """Reserve (OSError ENOSPC), map, prefault and start to serve from a new data segment. Drops the GIL."""

    def retire_segment(self, number: int, /) -> bool:
        """Stop serving from an empty, unpinned segment and punch its pages; False where it is neither. Caller unlinks."""

    def segments(self) -> list[tuple[int, int, int, int]]:
        """``(number, size_bytes, used_bytes, idle_since_ns)`` of live segments; idle_since_ns is 0 unless used_bytes is 0."""

    def publish(
        self, buffer: Buffer, count: int, tokens: Sequence[int] | None, keep: bool, timeout_ns: int, hashed: bool, /
    ) -> Published | None: ...
    def publish_many(
        self,
        buffers: Sequence[Buffer],
        count: int,
        tokens: Sequence[int] | None,
        keep: bool,
        timeout_ns: int,
        hashed: bool,
        /,
    ) -> list[Published] | None: ...
    def reserve(self, nbytes: int, /) -> Reservation | None: ...
    def alias(
        self, slot: int, generation: int, count: int, tokens: Sequence[int] | None, keep: bool, timeout_ns: int, /
    ) -> Published:
        """Publish the same bytes again under a new generation. StaleHandleError where the block is gone."""

    def release(self, slot: int, generation: int, /) -> bool:
        """Drop the arena's own hold (``keep``); False where there was none."""

    def withdraw(self, slot: int, generation: int, /) -> bool:
        """Take back what was never sent: unclaimed grants, anonymous claims, trusteeship and keep."""

    def is_live(self, slot: int, generation: int, /) -> bool:
        """Whether anybody has a claim on the block; what nobody has one on any more is taken back."""

    def takers(self, slot: int, generation: int, /) -> tuple[int, ...]:
        """Tokens of the processes that have taken one of the anonymous claims and are in the arena; of a block that the
        owner holds."""

    def reclaim(self, revoke: bool = False, /) -> int:
        """Take back blocks that became free; with ``revoke`` also those past their deadline. Returns bytes taken back."""

    def wait_freed(self, timeout_ns: int, /) -> bool:
        """Wait (futex, GIL dropped) until some block may have become free."""

    def stats(self) -> dict[str, int]: ...
    def end(self) -> None:
        """Mark the arena ended; leases stay valid, new attaches fail. Caller unlinks data segments, then control."""

class Fellows:
    """The ranks of a group as peers of one arena: what they say in their words, and agreement without a collective.

    A word: ``2 n``: message n is taken in; ``2 n + 1``: waiting for the next; top bit: ended, will take in nothing more."""

    def __init__(self, member: Member, tokens: Sequence[int], group: int, /) -> None:
        """``tokens``: of all ranks, by rank, this process's own included. ``group``: what `begin` gave the owner. PeerLostError
        where one has not joined."""

    @classmethod
    def begin(cls, member: Member, /) -> int:
        """On the owner: the name of a new group, in which nothing has been agreed on. Earlier ones are given up by that, and
        their ranks record nothing any more. Before any rank's `reset`. ValueError elsewhere, ArenaError in a forked child."""

    @classmethod
    def reset(cls, member: Member, /) -> None:
        """Our word, as if there had never been a group. Each process does it before any other can make its `Fellows`."""

    def record(self, word: int, failures: int = 0, /) -> None:
        """Set our word. ``failures``: what of that message could not be taken in, a bit each (64); not 0: also the failed step.

        With the top bit, the word never claims more than was recorded before, and every rank that waits looks again.
        ArenaError in a forked child."""

    def words(self) -> list[tuple[int, int]]:
        """``[(word, failed step)]`` by rank; ``(1 << 62, 0)`` where that process is not joined (any more)."""

    def has(self, rank: int, step: int, /) -> bool:
        """Whether that rank had recorded message ``step`` as taken in, also if it has ended or left since."""

    def agree(self, step: int, timeout_ns: int, /) -> tuple[int, int] | None:
        """``(all failures of the message, ranks that had one as bits)``, once every rank has recorded it; decided once, the
        same for all. To be called after recording it and before the next. None: the time is up, or at once: the agreement was
        given up, or a rank has ended or left before that message; look why, then `give_up` or call again. Waits without
        the GIL."""

    def give_up(self, step: int, /) -> bool:
        """Decide for all that nothing from message ``step`` on will be agreed on. False where it has been already: `agree` will
        say what."""

    def given_up(self) -> bool:
        """Whether some rank has done that."""

class Ring:
    """One end of the ring: messages from the owner of an arena to all other ranks of a group."""

    def __init__(self, member: Member, tokens: Sequence[int], start: int, /) -> None:
        """``tokens`` of all ranks, by rank. ``start``: `position` when the group came about, as its entry rank saw it. Until
        every reader has made its end the writer has no more room than the ring has. On the owner PeerLostError where one
        has not joined, GroupError where the ring has gone on since."""

    @classmethod
    def position(cls, member: Member, /) -> int:
        """How many entries were ever sent."""

    def send(self, payload: Buffer, done: int, timeout_ns: int, /) -> int | None:
        """On the owner: send a message from byte ``done`` on, and return how many bytes of it are in; None where not a single
        entry was, which for an empty message is not 0. Less than all: there was no room in that time, or somebody has
        ended; look why, and call again. PeerLostError where a reader that has left is in the way."""

    def receive(self, timeout_ns: int, /) -> bytes | None:
        """On the others: the next message; None where it is not there, or not whole, in that time, or somebody has ended: look
        why, and call again. GroupError where an entry is not what it has to be."""

    def poll(self) -> bool:
        """On the others: whether at least the start of a message is there."""
