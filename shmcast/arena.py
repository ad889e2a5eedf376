"""Publishers' side: an `Arena` is warm shared memory that one process publishes into."""

import errno
import os
import secrets
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from . import _native, arrays, content, growth, names, process, tensors
from .attach import Peer, lease_of
from .content import Hash
from .errors import ArenaError, ArenaFullError, HandleError
from .handle import Handle
from .reservation import Reservation, form_of
from .sizes import parse_bytes
from .sweep import sweep, sweep_everywhere
from .terms import Readers, Terms, terms, timeout_ns

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


class _AsCreated:
    def __repr__(self) -> str:
        return "<as the arena was created>"


DEFAULT: Any = _AsCreated()
_CREATE_ATTEMPTS = 8
_WAIT_SLICE_S = 0.05  # a release is noticed at once; deaths and deadlines are seen at the next look
_SWEEP_AGAIN_S = 1.0  # while the host stays full
_FOR_EVER = 1 << 62
_new = tuple.__new__
_PUBLISH_NS = _native.metric("publish_ns")
_PUBLISH_RETRIES = _native.metric("publish_retries")


class Arena:
    """Shared memory of this process's own, reserved, mapped and warm, that it publishes arrays into.

    Thread-safe; not for forked children. Close it, or use it as a context manager: what is not closed stays in /dev/shm
    until a `sweep` after this process has ended, and every `create` in the namespace begins with one."""

    def __init__(
        self,
        namespace: str,
        member: _native.Member,
        segments: growth.Segments,
        grant_timeout_ns: int,
    ) -> None:
        """Not for callers: `create` makes arenas."""
        self._member = member
        self._meter = _native.Meter(member)
        self._owner = segments.owner
        self._head = (namespace, member.arena_id, names.host_id())
        self._segments = segments
        self._grant_timeout_ns = grant_timeout_ns
        self._closed = False
        self._givers: tuple[Callable[[], bool], ...] = ()
        self._sweep_again = 0.0
        self._keeper: threading.Thread | None = None
        self._wake = threading.Event()
        # Bytes that may be published before it is time to see whether the arena should grow ahead.
        self._credit = segments.segment_bytes // 2 if segments.segment_bytes < segments.max_bytes else _FOR_EVER

    @staticmethod
    def create(
        max_bytes: int | str = "2GiB",
        *,
        namespace: str | None = None,
        segment_bytes: int | str | None = None,
        max_blocks: int = 16384,
        grant_timeout: float | None = 60.0,
        idle_timeout: float = 60.0,
        mode: int = 0o600,
    ) -> "Arena":
        """A new arena with one data segment, reserved and prefaulted.

        ``max_bytes``: bound on all data segments; an array stays as long as its request lives, so this is peak
        concurrent requests times bytes a request. ``segment_bytes``: by how much it grows (default: an eighth of
        ``max_bytes``, 16 MiB to 1 GiB). ``max_blocks``: published arrays alive at once. ``grant_timeout``: seconds
        after which what nobody has attached may be taken back, None: never. ``idle_timeout``: seconds after which an
        unused data segment is given back to the host. ``mode``: 0o660 lets all processes of the owner's group join, which
        may then do all that README's "Security" says of peers; 0o600, those of the same user alone.

        Raises ArenaFullError where /dev/shm is too small, ArenaError, ValueError."""
        namespace = names.default_namespace() if namespace is None else names.check_namespace(namespace)
        limit = parse_bytes(max_bytes, "max_bytes") // _native.PAGE_BYTES * _native.PAGE_BYTES
        if not limit:
            raise ValueError(f"max_bytes {max_bytes!r}: an arena has at least one page, {_native.PAGE_BYTES} bytes")
        step = growth.default_segment_bytes(limit)
        if segment_bytes is not None:
            step = growth.pages(parse_bytes(segment_bytes, "segment_bytes"))
            if step > limit:
                raise ValueError(f"segment_bytes {segment_bytes!r} is more than max_bytes {max_bytes!r}")
        if not 1 <= max_blocks <= _native.SLOT_COUNT_MAX:
            raise ValueError(f"max_blocks {max_blocks}: 1 to {_native.SLOT_COUNT_MAX} are possible")
        grant_ns = timeout_ns("grant_timeout", grant_timeout)
        idle_ns = timeout_ns("idle_timeout", idle_timeout)
        names.check_mode(mode)
        sweep(namespace, peers=False)  # whose room this arena may need
        with process.fork_guard:
            member = _create_control(namespace, limit, max_blocks, mode)
        data_mode = names.data_mode(mode)
        segments = growth.Segments(_native.Owner(member), namespace, member.arena_id, limit, step, idle_ns, data_mode)
        arena = Arena(namespace, member, segments, grant_ns)
        try:
            segments.add(step)
        except BaseException as error:
            arena.close()
            if isinstance(error, OSError) and not isinstance(error, ArenaError):
                raise growth.refused(f"create arena in namespace {namespace}: reserve", step, error) from None
            raise
        process.adopt(arena._head, member)
        process.tidy_now_and_then(namespace, arena.id)
        return arena

    # ---- what it is

    @property
    def namespace(self) -> str:
        """Which deployment on the host it belongs to."""
        return self._head[0]

    @property
    def id(self) -> int:
        """64 bits, random; part of its segments' names."""
        return self._head[1]

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    @property
    def peers(self) -> tuple[Peer, ...]:
        """Tokens of the other processes that have joined it; whether they are alive is not looked at."""
        own = _native.process_token()
        return tuple(token for token in self._member.tokens() if token != own)

    @property
    def nonce(self) -> bytes:
        """16 random bytes in the control segment: who reads the same there sees the same memory."""
        return self._member.nonce

    @property
    def meter(self) -> _native.Meter:
        """Adds to the arena's metrics; `metrics.snapshot` reads them, also once the arena is closed."""
        return self._meter

    def stats(self) -> dict[str, int]:
        """Counts and bytes: reserved, used, free, peak, slots, published, segments and more; empty once closed.

        What nobody has a claim on any more is found free first."""
        self._owner.reclaim()
        stats = self._owner.stats()
        if stats:
            stats["max_bytes"] = self._segments.max_bytes
            stats["segments"] = len(self._owner.segments())
        return stats

    # ---- publish

    def publish(
        self,
        array: "arrays.ndarray | torch.Tensor",
        *,
        readers: Readers = 1,
        keep: bool = False,
        digest: int | None = None,
        hash: Hash = True,
        grant_timeout: float | None = DEFAULT,
        timeout: float = 0.0,
    ) -> Handle:
        """Copy an ndarray or CPU tensor into the arena, hash it in the same pass, and return its handle.

        ``readers``: how many processes will attach it, the first n that come; or which, by their tokens; or "all", the
        others that have joined by now. ``keep``: the arena itself holds it besides, until `release`. ``digest``: 128 bits
        that the caller knows the content by, instead of ours. ``hash``: "sha256" for contents that strangers choose, see
        `content.HashName`; False: none, and no `verify`. ``timeout``: seconds to wait for room. A view of a whole block of this arena is not copied but gets a new handle of the same bytes.

        Raises ArenaFullError (the arena stays usable), UnsupportedArrayError, PeerLostError, ArenaError (closed, or this
        is a forked child), ValueError."""
        began_ns = time.monotonic_ns()
        form = tensors.describe(array)
        terms = self.terms(readers, keep, grant_timeout, hash)
        if digest is not None:
            content.check_digest(digest)
        origin = lease_of(array)
        if origin is not None and self._owns(origin.handle) and origin.whole:
            return self._alias(origin.handle, terms, digest, timeout)
        published = self._publish(form, terms, timeout)
        self._spend(form.nbytes)
        self._meter.observe(_PUBLISH_NS, time.monotonic_ns() - began_ns)
        return _new(Handle, (*self._head, *form[:4], digest, *published, terms.hash or "xxh3"))

    def publish_many(
        self,
        arrays: "Sequence[arrays.ndarray | torch.Tensor]",
        *,
        readers: Readers = 1,
        keep: bool = False,
        hash: Hash = True,
        grant_timeout: float | None = DEFAULT,
        timeout: float = 0.0,
    ) -> list[Handle]:
        """Publish all of them, or none: what `publish` does, a few microseconds each for hundreds of small arrays.

        Views of blocks are copied like any other array. Arguments and errors as for `publish`."""
        forms = tensors.describe_all(arrays)
        return self.publish_forms(forms, self.terms(readers, keep, grant_timeout, hash), timeout)

    def publish_forms(self, forms: "list[arrays.Form]", terms: Terms, timeout: float) -> list[Handle]:
        """`publish_many` of arrays that are described already, for `codec`."""
        began_ns = time.monotonic_ns()
        head = self._head
        published = None
        sources: list[Any] = [form[4] for form in forms if form[4] is not None]
        if len(sources) == len(forms) and terms.hash != "sha256":
            try:
                published = self._owner.publish_many(sources, *terms.native)
            except ArenaFullError:
                pass  # one by one, so that room is made for each
        if published is None:
            published = self._publish_one_by_one(forms, terms, timeout)
        self._spend(sum([form[3] for form in forms]))
        self._meter.observe(_PUBLISH_NS, time.monotonic_ns() - began_ns)
        return [
            _new(Handle, (*head, kind, dtype, shape, nbytes, None, *block, terms.hash or "xxh3"))
            for (kind, dtype, shape, nbytes, _, _), block in zip(forms, published, strict=True)
        ]

    def reserve(
        self,
        shape: int | Sequence[int],
        dtype: Any,
        *,
        readers: Readers = 1,
        keep: bool = False,
        digest: int | None = None,
        hash: Hash = True,
        grant_timeout: float | None = DEFAULT,
        timeout: float = 0.0,
    ) -> Reservation:
        """A block to materialize into in place; its bytes are whatever was there before. ``dtype``: numpy's or torch's.

        A context manager: sealed at its end, aborted if an exception leaves it. A ``hash`` costs one pass when it is
        sealed. Other arguments and errors as for `publish`."""
        form, nbytes = form_of(shape, dtype)
        terms = self.terms(readers, keep, grant_timeout, hash)
        if digest is not None:
            content.check_digest(digest)
        block = self._get("reserve", partial(self._owner.reserve, nbytes), nbytes, timeout)
        self._spend(nbytes)

        def seal(block: _native.Reservation) -> Handle:
            began_ns = time.monotonic_ns()
            published = self._seal("seal", block, terms, timeout)
            self._meter.observe(_PUBLISH_NS, time.monotonic_ns() - began_ns)
            return _new(Handle, (*self._head, *form, nbytes, digest, *published, terms.hash or "xxh3"))

        return Reservation(block, form, seal)

    def alias(
        self,
        handle: Handle,
        *,
        readers: Readers = 1,
        keep: bool = False,
        digest: int | None = None,
        grant_timeout: float | None = DEFAULT,
        timeout: float = 0.0,
    ) -> Handle:
        """Publish the bytes of a live block of this arena once more, under a new handle and without a copy.

        StaleHandleError where the block is gone: hold it, by a lease or by ``keep``. Other arguments as for `publish`."""
        self._check_own(handle, "alias")
        if digest is not None:
            content.check_digest(digest)
        return self._alias(handle, self.terms(readers, keep, grant_timeout, True), digest, timeout)

    def release(self, handle: Handle) -> bool:
        """End the arena's own hold on a block that was published with ``keep``; False where there is none."""
        self._check_own(handle, "release")
        return self._owner.release(handle.slot, handle.generation)

    def is_live(self, handle: Handle) -> bool:
        """Whether anybody still has a claim on a block: holds it, or was promised it and has not come yet."""
        self._check_own(handle, "look for")
        return self._owner.is_live(handle.slot, handle.generation)

    def takers(self, handle: Handle) -> tuple[Peer, ...]:
        """Which processes have attached a block that was published for ``readers=n`` and is still kept: the first n that
        came, as far as they are in the arena. Empty for any other block."""
        self._check_own(handle, "look for readers of")
        return self._owner.takers(handle.slot, handle.generation)

    def withdraw(self, handle: Handle) -> bool:
        """Take a handle back that was never sent: every claim that nobody has made use of ends, ``keep`` too. False where
        the block is gone."""
        self._check_own(handle, "withdraw")
        return self._owner.withdraw(handle.slot, handle.generation)

    # ---- what can be given up

    def on_pressure(self, give_up: Callable[[], bool]) -> None:
        """Have ``give_up`` called wherever there is no room, again and again until there is: in any thread, with no lock held.

        It gives up something that it holds in this arena; False: it has nothing any more."""
        with self._segments.lock:
            self._givers = (*self._givers, give_up)

    def off_pressure(self, give_up: Callable[[], bool]) -> None:
        """Not any more."""
        with self._segments.lock:
            self._givers = tuple([each for each in self._givers if each != give_up])

    # ---- the end

    def close(self) -> None:
        """End the arena: its names go, new attaches fail with ArenaGoneError, leases stay valid. Idempotent.

        In a forked child it changes nothing."""
        if self._closed:
            return
        if self._member.inherited:
            self._closed = True
            return
        with self._segments.lock:
            self._owner.end()
            self._segments.unlink_all()
            process.forget(self._head)
            self._closed = True  # last: a close that was interrupted can be called again
        self._wake.set()

    def __enter__(self) -> "Arena":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True) and not self._member.inherited:
            # Unlinking is for close() and for sweepers. What we do here is to stop looking alive.
            process.members.pop(self._head, None)
            self._wake.set()
            warnings.warn(
                f"{self!r} was not closed; a sweep will remove it", ResourceWarning, source=self, stacklevel=2
            )

    def __repr__(self) -> str:
        state = " closed" if self._closed else ""
        return f"<Arena {self._head[0]}.{self._head[1]:016x}{state}, max_bytes {self._segments.max_bytes}>"

    # ---- inside

    def terms(self, readers: Readers, keep: bool, grant_timeout: float | None, hash: Hash) -> Terms:
        """The arguments of `publish` as the core takes them. ValueError where nobody would hold the block."""
        grant_ns = self._grant_timeout_ns if grant_timeout is DEFAULT else timeout_ns("grant_timeout", grant_timeout)
        return terms(readers, keep, grant_ns, hash, alone=readers == "all" and not self.peers)

    def _owns(self, handle: Handle) -> bool:
        return handle[:3] == self._head

    def _check_own(self, handle: Handle, action: str) -> None:
        if not self._owns(handle):
            raise HandleError(f"{action} {handle!r}: it is of another arena than {self!r}")

    def _alias(self, handle: Handle, terms: Terms, digest: int | None, timeout: float) -> Handle:
        attempt = partial(self._owner.alias, handle.slot, handle.generation, *terms.native[:4])
        slot, generation, *_ = self._get("publish again", attempt, 0, timeout)
        return handle._replace(slot=slot, generation=generation, given=handle.given if digest is None else digest)

    def _publish(self, form: arrays.Form, terms: Terms, timeout: float) -> "_native.Published":
        if form.source is not None and terms.hash != "sha256":
            attempt = partial(self._owner.publish, form.source, *terms.native)
            return self._get("publish", attempt, form.nbytes, timeout)
        # What is not in one piece is put in order in the block itself; a hash of another kind is made of the copy.
        block = self._get("publish", partial(self._owner.reserve, form.nbytes), form.nbytes, timeout)
        try:
            arrays.write(form, block)
            return self._seal("publish", block, terms, timeout)
        except BaseException:
            block.abort()
            raise

    def _seal(self, action: str, block: _native.Reservation, terms: Terms, timeout: float) -> "_native.Published":
        made = content.hash_bytes(block, "sha256") if terms.hash == "sha256" else None
        published = self._get(action, partial(block.seal, *terms.native), 0, timeout)
        return published if made is None else (*published[:4], made)

    def _publish_one_by_one(self, forms: list[arrays.Form], terms: Terms, timeout: float) -> "list[_native.Published]":
        deadline = time.monotonic() + timeout
        done: list[_native.Published] = []
        try:
            for form in forms:
                left = max(deadline - time.monotonic(), 0.0)
                done.append(self._publish(form, terms, left))
        except BaseException:
            for slot, generation, *_ in done:
                self._owner.withdraw(slot, generation)
            raise
        return done

    def _get(self, action: str, attempt: Callable[[], T | None], nbytes: int, timeout: float) -> T:
        """What the attempt gives once there is room for it; room is made, and waited for, if there is none."""
        try:
            result = attempt()
        except ArenaFullError:  # no slot, which is room too
            result = None
        return result if result is not None else self._get_slowly(action, attempt, nbytes, timeout)

    def _get_slowly(self, action: str, attempt: Callable[[], T | None], nbytes: int, timeout: float) -> T:
        if not timeout >= 0:
            raise ValueError(f"{action}: timeout={timeout!r} is not a number of seconds")
        began = time.monotonic()
        if nbytes > self._segments.max_bytes:
            raise self._segments.full(action, nbytes, 0.0)
        self._meter.add(_PUBLISH_RETRIES, 1)
        while True:
            result, host_is_full = self._make_room((self._revoke, self._scrub, self._grow), action, attempt, nbytes)
            while result is None and any(give_up() for give_up in self._givers):
                result, host_is_full = self._make_room((self._revoke, self._grow), action, attempt, nbytes)
            if result is not None:
                return result
            waited = time.monotonic() - began
            if waited >= timeout:
                if host_is_full:
                    raise growth.host_full(f"{action} in {self!r}: grow for", nbytes) from None
                raise self._segments.full(action, nbytes, waited if timeout else 0.0)
            self._owner.wait_freed(int(min(timeout - waited, _WAIT_SLICE_S) * 1e9) + 1)

    def _make_room(
        self, steps: Sequence[Callable[[int], None]], action: str, attempt: Callable[[], T | None], nbytes: int
    ) -> tuple[T | None, bool]:
        """What the attempt gives after one of these steps, and whether the host has refused memory."""
        host_is_full = False
        with self._segments.lock:
            for make_room in steps:
                try:
                    make_room(nbytes)
                    result = attempt()
                except ArenaFullError:
                    continue
                except ArenaError:
                    raise
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise growth.refused(f"{action} in {self!r}: room for", nbytes, error) from None
                    host_is_full = True
                    continue
                if result is not None:
                    return result, False
        return None, host_is_full

    def _revoke(self, nbytes: int) -> None:
        self._owner.reclaim(True)

    def _scrub(self, nbytes: int) -> None:
        with process.fork_guard:  # it opens and locks the control segment for a moment
            swept = self._member.sweep_peers()
        if swept:
            self._owner.reclaim()

    def _grow(self, nbytes: int) -> None:
        stats = self._owner.stats()
        if stats and stats["slots_used"] < stats["slots"] and self._grow_or_sweep(nbytes):
            self._start_keeper()

    def _grow_or_sweep(self, nbytes: int) -> bool:
        try:
            return self._segments.grow(nbytes)
        except ArenaFullError:
            raise
        except OSError as error:  # the host has no room: what the dead have left is in the way
            now = time.monotonic()
            if error.errno != errno.ENOSPC or now < self._sweep_again:
                raise
            self._sweep_again = now + _SWEEP_AGAIN_S
            if not sweep_everywhere().segments:
                raise
        return self._segments.grow(nbytes)

    def _spend(self, nbytes: int) -> None:
        self._credit -= nbytes
        if self._credit < 0:
            self._credit = _FOR_EVER  # until the keeper has looked
            self._start_keeper()
            self._wake.set()

    def _start_keeper(self) -> None:
        with self._segments.lock:
            if self._keeper is None and not self._closed:
                name = f"shmcast-keeper-{self.id:016x}"
                self._keeper = threading.Thread(
                    target=_keep, args=(weakref.ref(self), self._wake), name=name, daemon=True
                )
                self._keeper.start()

    def _keep_once(self) -> float | None:
        """Give back and grow ahead. Returns seconds until the next look is due by itself, None for never."""
        with self._segments.lock:
            if self._closed or self._member.inherited:
                return None
            self._owner.reclaim()
            self._credit = self._segments.grow_ahead()
            try:
                wait_ns = self._segments.retire_idle(time.monotonic_ns())
            except OSError:
                return None  # what can not be given back now stays until there is something to grow for
        return None if wait_ns is None else max(wait_ns / 1e9, 0.01)


def _keep(arena: "weakref.ref[Arena]", wake: threading.Event) -> None:
    """The maintenance thread of an arena, which does not keep the arena alive."""
    timeout: float | None = 0.0
    while True:
        wake.wait(timeout)
        wake.clear()
        strong = arena()
        if strong is None or strong.closed:
            return
        timeout = strong._keep_once()
        del strong


def _create_control(namespace: str, max_bytes: int, max_blocks: int, mode: int) -> _native.Member:
    """A control segment of our own, ready for others; a sweeper that takes it for dead before we have locked it wins."""
    for _ in range(_CREATE_ATTEMPTS):
        arena = secrets.randbits(63) + 1
        name = names.segment_name(namespace, arena, names.CONTROL)
        try:
            map_fd = names.create(name, mode)
        except FileExistsError:
            continue
        except OSError as error:
            raise names.failed(f"create arena in namespace {namespace}: create {name}", error) from None
        lock_fd = -1
        try:
            # A description of its own, so that nothing that a forked child inherits keeps the lock.
            lock_fd = names.open_writable(name)
            if not _native.take_owner_byte(lock_fd):
                continue
            if not names.is_current(name, map_fd) or not names.is_current(name, lock_fd):
                continue
            open_segment = process.opener(namespace, arena)
            return _native.Member.create(map_fd, lock_fd, open_segment, arena, names.host_id(), max_bytes, max_blocks)
        except FileNotFoundError:
            continue
        except BaseException as error:
            names.unlink(name)
            if isinstance(error, OSError) and not isinstance(error, ArenaError):
                action = f"create arena in namespace {namespace}: control segment for"
                raise growth.refused(action, max_blocks * 72, error) from None
            raise
        finally:
            os.close(map_fd)
            if lock_fd >= 0:
                os.close(lock_fd)
    raise ArenaError(
        errno.EAGAIN, f"create arena in namespace {namespace}: swept {_CREATE_ATTEMPTS} times before it was locked"
    )
