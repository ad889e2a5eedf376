"""Object trees as bytes: arrays leave the pickle and travel as handles, and come back as views.

What `dumps` writes, integers little-endian::

    4  magic "shmT"    1  version (1)    3  zero
    8  low half of the XXH3-128 (seed 0) of all that follows
    4  count of arrays that left the pickle; then, for each,
       1  tag: 0 handle, 1 array        8  length of what follows
       handle: see `handle`
       array:  1 kind (0 numpy, 1 torch), 2 length of dtype, 1 dimensions, dtype, 8 for each dimension, the bytes
    the rest: a pickle, protocol 5; where an array was, it calls ``shmcast.codec._block`` with the array's number
"""

import io
import pickle
from collections.abc import Callable, Iterable
from functools import partial
from struct import Struct
from struct import error as struct_error
from typing import Any, Literal, NamedTuple, TypeAlias

from . import _native, arrays, plain, tensors
from .arena import DEFAULT, Arena
from .attach import ANYBODY, Lease, Origin, Peer, attach, lease_of
from .content import Hash
from .errors import ArenaFullError, HandleError, UnsupportedArrayError
from .handle import Handle
from .in_place import InPlace, Spot, Spots
from .terms import Readers

MAGIC = b"shmT"
VERSION = 1
MIN_BYTES = 16384
"""Smaller arrays stay in the pickle: they would share pages, and a handle costs about as much as their bytes."""

_HEAD = Struct("<4sB3xQ")
_COUNT = Struct("<I")
_ENTRY = Struct("<BQ")
_INLINE = Struct("<BHB")
_HANDLE_TAG, _ARRAY_TAG = 0, 1
_MASK_64 = (1 << 64) - 1
_FULL, _FULL_BYTES = _native.metric("inline_full"), _native.metric("inline_full_bytes")
_SMALL, _SMALL_BYTES = _native.metric("inline_small"), _native.metric("inline_small_bytes")
_UNSUPPORTED, _PASSED_ON = _native.metric("inline_unsupported"), _native.metric("passed_on")

OnFull: TypeAlias = Literal["raise", "inline"]


class Encoded:
    """What `encode` gives: the bytes to send, and what has been promised for them."""

    def __init__(self, arena: Arena | None) -> None:
        self._arena = arena
        self.blob = b""
        self.handles: list[Handle] = []
        """Published by this call, in the encoder's arena."""
        self.leases: list[Lease] = []
        """Of blocks that were there before and have been passed on."""
        self.granted: set[tuple[int, int, int]] = set()
        """Which blocks these are: arena, slot, generation."""
        self.inline_bytes = 0
        """Bytes of arrays that travel in the blob though they are large enough for the arena."""
        self.inline_arrays = 0
        """How many these are."""
        self.inlined = False
        """Whether arrays travel in the blob because they are little together."""
        self.passed_on = 0
        """Arrays that lay in shared memory already."""

    @property
    def published_bytes(self) -> int:
        """Bytes that this call has taken of the arena."""
        return sum([handle.nbytes for handle in self.handles])

    @property
    def array_bytes(self) -> int:
        """Bytes of arrays that are large enough for the arena and were not there before."""
        return self.published_bytes + self.inline_bytes

    def withdraw(self) -> None:
        """Take back what this call has published. For a blob that was never sent to anybody."""
        if self._arena is not None and not self._arena.closed:
            for handle in self.handles:
                self._arena.withdraw(handle)
        self.handles = []


def dumps(
    tree: Any,
    arena: Arena | None = None,
    *,
    readers: Readers = 1,
    min_bytes: int = MIN_BYTES,
    on_full: OnFull = "raise",
    hash: Hash = True,
    grant_timeout: float | None = DEFAULT,
    timeout: float = 0.0,
) -> bytes:
    """Bytes from which `loads`, in other processes of this host, makes an equal tree.

    Any picklable tree. ndarrays and CPU tensors in it of at least ``min_bytes`` are published in ``arena`` and leave the
    pickle; those that are views of blocks (what `loads` gave, or a lease) travel as they are, without a copy and also
    without an arena. Without an arena all others stay in the pickle, as do arrays that can not be shared. Tensors arrive
    detached; non-contiguous arrays arrive in C order.

    ``readers``, ``hash``, ``grant_timeout``, ``timeout``: see `Arena.publish`. ``on_full="inline"``: what finds no room in the arena
    travels in the bytes. Where this raises, nothing stays published."""
    return encode(
        tree,
        arena,
        readers=readers,
        grant_timeout=grant_timeout,
        timeout=timeout,
        min_bytes=min_bytes,
        on_full=on_full,
        hash=hash,
    ).blob


def share(
    tree: Any,
    arena: Arena,
    *,
    min_bytes: int = MIN_BYTES,
    on_full: OnFull = "raise",
    hash: Hash = True,
    timeout: float = 0.0,
) -> Any:
    """An equal tree whose large arrays are views of blocks of the arena, which this process holds until the views go.

    For what is sent more than once: wherever the views go then, in whatever trees, no bytes are copied any more. ndarrays
    are read-only. Arguments and errors as for `dumps`."""
    encoded = encode(
        tree, arena, readers=0, keep=True, timeout=timeout, min_bytes=min_bytes, on_full=on_full, hash=hash
    )
    try:
        return loads(encoded.blob)
    finally:
        for handle in encoded.handles:
            arena.release(handle)


def loads(blob: "bytes | bytearray | memoryview", *, allow_pickle: bool = True) -> Any:
    """The tree that `dumps` was given. Its large arrays are views of shared memory, which live as long as the arrays do:
    read-only ndarrays, and tensors that copy what they write.

    Unpickles: only for bytes from processes that you trust. ``allow_pickle=False`` does not: it makes arrays, tensors of
    values alone (no gradients, on the CPU), numpy scalars, and None, bool, int, float, complex, str, bytes, bytearray, list,
    tuple, dict, set and frozenset; whatever else is named there is a HandleError and is neither imported nor called, and so
    is what would take more memory or time than its length warrants (module `plain`).

    HandleError (not from `dumps`, cut, changed, another host), StaleHandleError, ArenaGoneError, ArenaError,
    UnsupportedArrayError (a tensor where torch is not installed); and whatever unpickling raises, where it is allowed."""
    raw = blob if isinstance(blob, bytes) else bytes(blob)
    entries, pickle_at = _parse(raw)
    things: list[Any] = []
    failure: Exception | None = None
    for tag, start, end in entries:
        # All of them, also after one has failed: each was promised to us, and attaching is what ends the promise.
        try:
            things.append(_attached(raw[start:end]) if tag == _HANDLE_TAG else _inlined(raw, start, end))
        except Exception as error:
            failure = failure or error
    if failure is not None:
        things.clear()  # a traceback that somebody keeps must not keep leases
        try:
            raise failure
        finally:
            del failure
    try:
        if not allow_pickle:
            return plain.load(memoryview(raw)[pickle_at:], f"{__name__}._block", partial(_thing, things))
        stream = io.BytesIO(raw)
        stream.seek(pickle_at)
        return _Unpickler(stream, things).load()
    except BaseException:
        things.clear()  # for the same reason
        raise


# ---- out


class Taken(NamedTuple):
    """An array that has left the pickle."""

    array: Any
    origin: Origin | None
    form: arrays.Form | None
    """None where it is a view that has not been looked at as an array."""
    inline: bool
    spot: Spot | None = None
    """Where it lies in a block that was reserved for the tree."""


class _Pickler(pickle.Pickler):
    def __init__(
        self,
        stream: io.BytesIO,
        shares: bool,
        min_bytes: int,
        in_place: Spots | None,
        refuse_devices: bool,
    ) -> None:
        super().__init__(stream, protocol=5)
        self._refuse_devices = refuse_devices
        self._shares = shares
        self._min_bytes = min_bytes
        self._in_place = in_place
        self.taken: list[Taken] = []
        self.small = self.small_bytes = self.unsupported = 0
        """Arrays that travel in the message whatever room there is, by the reason."""

    def reducer_override(self, thing: Any) -> Any:
        # Exact types: what a subclass adds is its own to pickle.
        kind = type(thing)
        if kind is arrays.NDARRAY:
            return NotImplemented if self._is_small(thing.nbytes) else self._take(thing)
        if kind is not tensors.tensor_type():
            return NotImplemented
        small = self._is_small(tensors.size_bytes(thing))
        if not tensors.torch_pickles(thing):
            return self._take(thing, inline=small, always=True)
        if not small:
            return self._take(thing)
        # torch pickles the storage, all of it, as a pickle in the pickle, which who refuses pickles can not read
        return self._take(thing, inline=True) if tensors.is_values_alone(thing) else NotImplemented

    def _is_small(self, nbytes: int) -> bool:
        """Whether an array is below the threshold; counted if it is."""
        if nbytes >= self._min_bytes:
            return False
        self.small += 1
        self.small_bytes += nbytes
        return True

    def _take(self, thing: Any, inline: bool = False, always: bool = False) -> Any:
        """Take an array out of the pickle; ``inline``: as bytes; ``always``: rather as bytes than not at all."""
        origin = form = spot = None
        try:
            if not inline:
                spot = None if self._in_place is None else self._in_place.spot(thing)
                origin = None if spot is not None else lease_of(thing)
            if origin is None and spot is None:
                if not self._shares and not inline:
                    if not always:
                        return NotImplemented
                    inline = True
                form = tensors.describe(thing)
        except UnsupportedArrayError:
            if self._refuse_devices and not inline and tensors.is_elsewhere(thing):
                raise
            self.unsupported += not inline  # what is inline has been counted as small
            return NotImplemented
        self.taken.append(Taken(thing, origin, form, inline, spot))
        return _block, (len(self.taken) - 1,)


def take_apart(tree: Any, in_place: Spots, min_bytes: int) -> "tuple[bytes, list[Taken]]":
    """A tree's pickle without its arrays, and these, for `put_together`. ``in_place``: whose ``spot`` is asked of each; see
    `InPlace.spot`. Raises what pickling raises."""
    stream = io.BytesIO()
    pickler = _Pickler(stream, True, min_bytes, in_place, refuse_devices=False)
    pickler.dump(tree)
    return stream.getvalue(), pickler.taken


def put_together(pickled: "bytes | memoryview", things: list[Any]) -> Any:
    """The tree that `take_apart` was given, with these in place of its arrays. Unpickles; raises what that raises."""
    return _Unpickler(io.BytesIO(pickled), things).load()


def encode(
    tree: Any,
    arena: Arena | None,
    *,
    readers: Readers,
    keep: bool = False,
    grant_timeout: float | None = DEFAULT,
    timeout: float = 0.0,
    min_bytes: int = MIN_BYTES,
    on_full: OnFull = "raise",
    hash: Hash = True,
    in_place: InPlace | None = None,
    refuse_devices: bool = False,
    inline_below: int = 0,
) -> Encoded:
    """`dumps`, with what was promised besides the bytes.

    ``keep``: see `Arena.publish`. ``in_place``: arrays that lie in its blocks travel as they are; the blocks are published on
    the same terms, which its maker has given it. What the tree does not use is for the caller to end. ``refuse_devices``:
    UnsupportedArrayError for a large tensor that is not in this host's memory, which torch would move to pickle it.
    ``inline_below``: arrays that would be published travel in the blob where they are fewer bytes than that together."""
    if on_full not in ("raise", "inline"):
        raise ValueError(f"dumps: on_full is 'raise' or 'inline', not {on_full!r}")
    readers = readers if isinstance(readers, (int, str)) else tuple(readers)
    if arena is not None:
        terms = arena.terms(readers, keep, grant_timeout, hash)
    stream = io.BytesIO()
    pickler = _Pickler(stream, arena is not None, min_bytes, in_place, refuse_devices)
    pickler.dump(tree)
    # Nothing has been published so far, so a tree that can not be pickled leaves nothing behind.
    encoded = Encoded(arena)
    all_taken = _small_together(pickler, inline_below, encoded) if inline_below else pickler.taken
    entries: list[bytes | None] = [None] * len(all_taken)
    try:
        if in_place is not None:
            all_taken, entries = _seal(in_place, all_taken, on_full, encoded)
        if arena is not None:
            wanted = [number for number, taken in enumerate(all_taken) if taken.form and not taken.inline]
            forms = [taken.form for taken in all_taken if taken.form and not taken.inline]
            for number, handle in zip(wanted, _publish(arena, forms, terms, timeout, on_full, encoded), strict=True):
                if handle is not None:
                    entries[number] = handle.to_bytes()
        for number, taken in enumerate(all_taken):
            if taken.origin is not None:
                entries[number] = _send_view(arena, taken.origin, readers, keep, grant_timeout, on_full, encoded)
        parts: list[Any] = [_COUNT.pack(len(entries))]
        for taken, entry in zip(all_taken, entries, strict=True):
            if entry is not None:
                parts += _ENTRY.pack(_HANDLE_TAG, len(entry)), entry
                encoded.passed_on += taken.origin is not None
            else:
                form = taken.form or tensors.describe(taken.array)
                if not taken.inline:
                    encoded.inline_arrays += 1
                    encoded.inline_bytes += form.nbytes
                parts += _inline_parts(form)
        parts.append(stream.getbuffer())
        encoded.blob = _whole(parts)
    except BaseException:
        encoded.withdraw()
        raise
    if arena is not None:
        _count(arena.meter, pickler, encoded)
    return encoded


def _small_together(pickler: _Pickler, inline_below: int, encoded: Encoded) -> list[Taken]:
    """What was taken, inline where it is little."""
    forms = [
        None if taken.inline or taken.origin is not None else taken.form or tensors.describe(taken.array)
        for taken in pickler.taken
    ]
    total = sum([form.nbytes for form in forms if form is not None])
    if total >= inline_below or not any(form is not None for form in forms):
        return pickler.taken
    encoded.inlined = True
    pickler.small += len([form for form in forms if form is not None])
    pickler.small_bytes += total
    return [
        taken if form is None else taken._replace(form=form, inline=True, spot=None)
        for taken, form in zip(pickler.taken, forms, strict=True)
    ]


def _seal(
    in_place: InPlace, all_taken: list[Taken], on_full: OnFull, encoded: Encoded
) -> tuple[list[Taken], list[bytes | None]]:
    """Publish the blocks that the tree was made in: what is left to publish otherwise, and entries of what was."""
    worth = in_place.worth_sealing([taken.spot for taken in all_taken if taken.spot is not None])
    handles: dict[int, Handle] = {}
    for number in worth:
        try:
            handles[number] = in_place.seal(number)
        except ArenaFullError:
            if on_full == "raise":
                raise
            continue
        encoded.handles.append(handles[number])
    left: list[Taken] = []
    entries: list[bytes | None] = []
    for taken in all_taken:
        handle = None if taken.spot is None else handles.get(taken.spot.block)
        if taken.spot is None or handle is not None:
            left.append(taken)
        else:
            left.append(taken._replace(form=tensors.describe(taken.array)))
        if taken.spot is None or handle is None:
            entries.append(None)
        else:
            _, offset, kind, dtype, shape, nbytes = taken.spot
            entries.append(handle.part(offset, nbytes, kind, dtype, shape).to_bytes())
    return left, entries


def _count(meter: _native.Meter, pickler: _Pickler, encoded: Encoded) -> None:
    for metric, more in (
        (_FULL, encoded.inline_arrays),
        (_FULL_BYTES, encoded.inline_bytes),
        (_SMALL, pickler.small),
        (_SMALL_BYTES, pickler.small_bytes),
        (_UNSUPPORTED, pickler.unsupported),
        (_PASSED_ON, encoded.passed_on),
    ):
        if more:
            meter.add(metric, more)


def _publish(
    arena: Arena, forms: list[arrays.Form], terms: Any, timeout: float, on_full: OnFull, encoded: Encoded
) -> list[Handle | None]:
    """Handles, None for what is to travel in the blob."""
    handles: list[Handle | None] = []
    try:
        handles += arena.publish_forms(forms, terms, timeout) if forms else []
    except ArenaFullError:
        if on_full == "raise":
            raise
        for form in forms:
            try:
                handles += arena.publish_forms([form], terms, 0.0)
            except ArenaFullError:
                handles.append(None)
            except BaseException:
                encoded.handles += [handle for handle in handles if handle is not None]
                raise
    encoded.handles += [handle for handle in handles if handle is not None]
    return handles


def _send_view(
    arena: Arena | None,
    origin: Origin,
    readers: int | str | tuple[Peer, ...],
    keep: bool,
    grant_timeout: float | None,
    on_full: OnFull,
    encoded: Encoded,
) -> bytes | None:
    handle = origin.handle
    if arena is not None and handle.arena == arena.id:
        try:
            handle = arena.alias(handle, readers=readers, keep=keep, grant_timeout=grant_timeout)
        except ArenaFullError:
            if on_full == "raise":
                raise
            return None
        encoded.handles.append(handle)
        return handle.to_bytes()
    block = handle.arena, handle.slot, handle.generation
    if block not in encoded.granted:
        # Once for all views of it: who reads the message holds the block until it has them all (see `loads`), and a second
        # grant, which nobody would use up, would make the owner trustee until its deadline.
        origin.lease.grant_to(_named(arena, readers))
        encoded.granted.add(block)
    encoded.leases.append(origin.lease)
    return handle.to_bytes()


def _named(arena: Arena | None, readers: int | str | tuple[Peer, ...]) -> Iterable[Peer]:
    if isinstance(readers, int):
        return (ANYBODY,) if readers else ()
    if isinstance(readers, str):
        if arena is None:
            raise ValueError("dumps: readers='all' means all that have joined the arena; none was given")
        return arena.peers
    return readers


def _inline_parts(form: arrays.Form) -> list[Any]:
    dtype = form.dtype.encode()
    head = _INLINE.pack(form.kind == "torch", len(dtype), len(form.shape)) + dtype
    head += b"".join(length.to_bytes(8, "little") for length in form.shape)
    return [_ENTRY.pack(_ARRAY_TAG, len(head) + form.nbytes), head, arrays.contiguous(form)]


def _whole(parts: list[Any]) -> bytes:
    body = b"".join(parts)
    return _HEAD.pack(MAGIC, VERSION, _native.hash128(body) & _MASK_64) + body


def with_handles(blob: bytes, other: Callable[[Handle], "Handle | arrays.Form"]) -> bytes:
    """The same tree with another handle in place of each that it has, or with the bytes of an array."""
    entries, pickle_at = _parse(blob)
    parts: list[Any] = [_COUNT.pack(len(entries))]
    for tag, start, end in entries:
        if tag == _ARRAY_TAG:
            parts.append(memoryview(blob)[start - _ENTRY.size : end])
            continue
        found = other(Handle.from_bytes(blob[start:end]))
        if isinstance(found, Handle):
            raw = found.to_bytes()
            parts += _ENTRY.pack(_HANDLE_TAG, len(raw)), raw
        else:
            parts += _inline_parts(found)
    parts.append(memoryview(blob)[pickle_at:])
    return _whole(parts)


# ---- in


def _block(number: int) -> Any:
    """Stands in a pickle where an array was; never called: the unpickler puts the array there itself."""
    raise pickle.UnpicklingError(f"array {number} is outside of this pickle; shmcast.loads() reads it")


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, things: list[Any]) -> None:
        super().__init__(stream)
        self._things = things

    def find_class(self, module: str, name: str) -> Any:
        if name == "_block" and module == __name__:
            # not a method of ours: the unpickler's memo keeps it, and a cycle would keep every lease
            return partial(_thing, self._things)
        return super().find_class(module, name)


def _thing(things: list[Any], number: int) -> Any:
    if not isinstance(number, int) or not 0 <= number < len(things):
        # what it names instead may be without end, so it is said only where it is a number that a pickle of ours may have
        named = number if isinstance(number, int) and -1 <= number < 1 << 32 else f"by a {type(number).__name__}"
        raise HandleError(f"decode tree: its pickle names array {named}, it has {len(things)}")
    return things[number]


def _parse(raw: bytes) -> tuple[list[tuple[int, int, int]], int]:
    """``([(tag, start, end)], start of the pickle)``."""
    if len(raw) < _HEAD.size + _COUNT.size:
        raise HandleError(f"decode tree: {len(raw)} bytes, at least {_HEAD.size + _COUNT.size} are needed")
    magic, version, check = _HEAD.unpack_from(raw)
    if magic != MAGIC:
        raise HandleError(f"decode tree: it starts with {magic!r}, not {MAGIC!r}")
    if version != VERSION:
        raise HandleError(f"decode tree: version {version}, this build reads {VERSION}")
    found = _native.hash128(memoryview(raw)[_HEAD.size :]) & _MASK_64
    if found != check:
        raise HandleError(f"decode tree: its hash is {found:016x}, it says {check:016x}; it was cut or changed")
    (count,) = _COUNT.unpack_from(raw, _HEAD.size)
    at = _HEAD.size + _COUNT.size
    entries: list[tuple[int, int, int]] = []
    for number in range(count):
        if at + _ENTRY.size > len(raw):
            raise HandleError(f"decode tree: {len(raw)} bytes, array {number} of {count} starts at {at}")
        tag, length = _ENTRY.unpack_from(raw, at)
        at += _ENTRY.size
        if tag not in (_HANDLE_TAG, _ARRAY_TAG) or length > len(raw) - at:
            raise HandleError(f"decode tree: array {number} has tag {tag} and {length} bytes, {len(raw) - at} are left")
        entries.append((tag, at, at + length))
        at += length
    return entries, at


def _attached(raw: bytes) -> Any:
    handle = Handle.from_bytes(raw)
    lease = attach(handle)
    return lease.array if handle.kind == "numpy" else lease.tensor()


def _inlined(raw: bytes, start: int, end: int) -> Any:
    """As if it had come through shared memory: a read-only ndarray, or a tensor."""
    try:
        is_torch, dtype_size, dimensions = _INLINE.unpack_from(raw, start)
    except struct_error as error:
        raise HandleError(f"decode tree: array of {end - start} bytes: {error}") from None
    dtype_at = start + _INLINE.size
    shape_at = dtype_at + dtype_size
    data_at = shape_at + 8 * dimensions
    if data_at > end:
        raise HandleError(f"decode tree: array of {end - start} bytes, its head needs {data_at - start}")
    dtype = raw[dtype_at:shape_at].decode(errors="replace")
    shape = tuple([int.from_bytes(raw[at : at + 8], "little") for at in range(shape_at, data_at, 8)])
    flat = arrays.copy(arrays.flat(memoryview(raw)[data_at:end], end - data_at))
    if is_torch:
        return tensors.over_bytes(flat, dtype, shape)
    array = arrays.over(flat, dtype, shape)
    if array.nbytes != end - data_at:
        raise HandleError(
            f"decode tree: dtype {dtype!r}, shape {shape} need {array.nbytes} bytes, {end - data_at} came"
        )
    arrays.seal(array)
    return array
