"""Readers' side: `attach` a handle, get a `Lease`, look at the bytes; and the way back from an array to its lease."""

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from . import _native, arrays, content, names, process, tensors
from .content import HashName
from .errors import ArenaError, ArenaGoneError, HandleError, IntegrityError, StaleHandleError
from .handle import Handle

if TYPE_CHECKING:
    import torch

Peer: TypeAlias = int
"""A process: its token (`process_token`), the same in every arena that it joins."""

ANYBODY: Peer = 0
"""No process has this token. Passing on to it makes the arena's owner trustee until its deadline."""

process_token = _native.process_token


class Lease(_native.Lease):
    """The right to read a block in this process. Dropping the last reference, views included, gives it up.

    Also a context manager and a read-only buffer of the block's bytes. Made by `attach`."""

    __slots__ = ("__weakref__", "_twin", "handle")

    handle: Handle
    """What was attached."""

    _twin: "Lease | None"

    @property
    def array(self) -> arrays.ndarray:
        """A read-only ndarray of the handle's dtype and shape over read-only pages; it keeps the lease alive.

        A new view object each time. UnsupportedArrayError for dtypes that only torch has."""
        handle = self.handle
        array = arrays.over(self.view(), handle.dtype, handle.shape)
        if array.nbytes != handle.nbytes:
            raise _wrong_size(handle, array.nbytes)
        return array

    def tensor(self, mode: Literal["cow", "read"] = "cow") -> "torch.Tensor":
        """A tensor over the block's bytes; it keeps the lease alive.

        ``"cow"``: copy-on-write. A write copies the page and is seen by the tensors of this lease alone, not by those of
        other leases on the block, here or elsewhere; with the lease the written pages go. A small block that shares pages
        with others (less than 16 KiB) is copied instead.

        ``"read"``: over the read-only pages that everybody shares. torch has no read-only tensors: an in-place
        operation on it ends the process with SIGSEGV."""
        if mode not in ("cow", "read"):
            raise ValueError(f"tensor: mode is 'cow' or 'read', not {mode!r}")
        tensors.import_torch(f"attach {self.handle!r}")
        handle = self.handle
        if mode == "read":
            view = self.view()
            flat = arrays.Span(view.address, self.nbytes, view).array
        elif self.owns_pages:
            view = self.view(True)
            flat = arrays.flat(view, self.nbytes)
        else:
            return tensors.over_bytes(arrays.copy(arrays.flat(self.view(), self.nbytes)), handle.dtype, handle.shape)
        tensor = tensors.over_bytes(flat, handle.dtype, handle.shape)
        if self.nbytes:
            self._remember(view.address)
        return tensor

    def to_private(self) -> "arrays.ndarray | torch.Tensor":
        """A private, writable copy, ndarray or tensor as it was published; the lease is not needed for it any more."""
        handle = self.handle
        if handle.kind == "numpy":
            return arrays.copy(self.array)
        copied = arrays.copy(arrays.flat(self.view(), self.nbytes))
        return tensors.over_bytes(copied, handle.dtype, handle.shape)

    def verify(self) -> None:
        """Hash the shared bytes and compare with the publisher's hash: IntegrityError with both values.

        ValueError where the handle has no hash: published with ``hash=False``, or only a part of a block."""
        expected, by = self.handle.hash, self.handle.hash_name
        if expected is None:
            raise ValueError(f"verify {self.handle!r}: it was published without a hash, or is a part of a block")
        found = content.hash_bytes(self, by)
        if found != expected:
            raise IntegrityError(
                f"verify {self.handle!r}: the bytes hash to {found:032x} ({by}), {expected:032x} was published"
            )

    @property
    def digest(self) -> int | None:
        """128 bits that name the content; see `Handle.digest`."""
        return self.handle.digest

    def pass_on(self, peers: Iterable[Peer] | int) -> Handle:
        """Promise the block to other processes and return the handle to send them. They need not hurry: what they were
        promised outlives this lease.

        ``peers``: process tokens, or how many processes. Those that have joined the arena are granted by name; for the
        others the owner is trustee until its ``grant_timeout`` has passed. PeerLostError where one dies meanwhile."""
        if isinstance(peers, int):
            if peers < 0:
                raise ValueError(f"pass_on: {peers} processes")
            self.grant_to((ANYBODY,) if peers else ())
        else:
            self.grant_to(peers)
        return self.handle

    def release(self) -> None:
        """Give the block up now. BufferError while arrays or tensors on it exist. Idempotent; nothing in a forked child."""
        super().release()

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self.release()
        except BufferError:
            if kind is None:
                raise
            # An exception is on its way, and its traceback may hold the views: they end the lease when they go.

    def __repr__(self) -> str:
        state = "released" if self.released else f"{self.nbytes} bytes"
        return f"<Lease {state} of {self.handle!r}>"

    def _remember(self, address: int) -> None:
        """So that `lease_of` finds us from a tensor's storage."""
        known = _tensors.get(address)
        if known is self:
            return
        if known is not None and not known.released and known.handle == self.handle:
            self._twin = known  # two leases, one hold: as long as we live the entry stays true
        else:
            _tensors[address] = self


_tensors: "weakref.WeakValueDictionary[int, Lease]" = weakref.WeakValueDictionary()
"""Leases that have given out tensors, by the address of the tensor's storage."""


def attach(handle: "Handle | bytes | bytearray | memoryview", *, verify: bool = False) -> Lease:
    """The right to read a block, by its handle or the handle's bytes; joins the arena if need be. Microseconds at any size.

    ``verify``: also compare the bytes with their hash, one pass over them. Raises StaleHandleError (the block is gone),
    ArenaGoneError, HandleError (not a handle, another host, not of this block), LayoutMismatchError, ArenaError,
    IntegrityError."""
    if type(handle) is not Handle:
        handle = Handle.from_bytes(handle)  # type: ignore[arg-type]
    namespace, arena, host, _, _, _, nbytes, _, slot, generation, segment, offset, _, _ = handle
    member = process.members.get((namespace, arena, host))
    try:
        if member is None:
            member = process.join((namespace, arena, host))
        lease = member.attach(Lease, slot, generation, segment, offset, nbytes)
    except OSError as error:
        lease = _attach_anew(handle, member, error)
    except HandleError as error:
        raise type(error)(f"{error} ({handle!r})") from None
    lease.handle = handle
    if verify:
        lease.verify()
    return lease


def _attach_anew(handle: Handle, member: _native.Member | None, error: OSError) -> Lease:
    """A membership that is no good any more is made again, once; what fails then fails for good."""
    try:
        if member is not None and (member.inherited or member.ended):
            member = process.join(handle[:3])
            return member.attach(Lease, handle.slot, handle.generation, handle.segment, handle.offset, handle.nbytes)
        raise error
    except FileNotFoundError as missing:
        raise ArenaGoneError(
            missing.errno, f"attach {handle!r}: its data segment is gone: the owner closed the arena, or it was swept"
        ) from None
    except ArenaError:
        raise
    except OSError as failure:
        raise names.failed(f"attach {handle!r}", failure) from failure
    finally:
        del error  # what it is raised with would keep itself


def _wrong_size(handle: Handle, found: int) -> HandleError:
    return HandleError(f"{handle!r}: dtype and shape need {found} bytes, it names {handle.nbytes}")


# ---- from arrays back to blocks


class Origin(NamedTuple):
    """Where in a block a contiguous array lies."""

    lease: Lease
    offset: int
    """Bytes from the start of what the lease covers."""
    handle: Handle
    """Of just these bytes, as this array."""

    @property
    def whole(self) -> bool:
        """Whether that is all that was attached, so all of a block that was published as one array."""
        return self.offset == 0 and self.handle.nbytes == self.lease.nbytes


def lease_of(thing: Any) -> Origin | None:
    """The live block that an ndarray or tensor is a view of, if its bytes are what everybody sees there.

    None for arrays of other memory, for views that are not contiguous, and for copy-on-write memory that was written."""
    if isinstance(thing, arrays.NDARRAY):
        return _array_origin(thing)
    if tensors.is_tensor(thing):
        return _tensor_origin(thing)
    return None


def _array_origin(array: arrays.ndarray) -> Origin | None:
    if array.base is None or not array.flags.c_contiguous:
        return None
    base = arrays.origin(array)
    if type(base) is _native.View:
        lease, start, private = base.lease, base.address, base.private
    elif tensors.is_tensor(base):
        found = _tensor_lease(base)
        if found is None:
            return None
        lease, start = found
        private = start != lease.address
    else:
        return None
    if not isinstance(lease, Lease):
        return None
    return _origin(
        lease, arrays.address(array) - start, private, "numpy", arrays.code_of(array.dtype), array.shape, array.nbytes
    )


def _tensor_origin(tensor: Any) -> Origin | None:
    found = _tensor_lease(tensor)
    if found is None or not tensors.is_plain(tensor):
        return None
    lease, start = found
    code, shape, nbytes = tensors.shape_of(tensor)
    offset = tensors.address(tensor) - start
    return _origin(lease, offset, start != lease.address, "torch", code, shape, nbytes)


def _tensor_lease(tensor: Any) -> tuple[Lease, int] | None:
    if not _tensors:
        return None
    start = tensors.storage_address(tensor)
    lease = _tensors.get(start) if start else None
    return None if lease is None or lease.released else (lease, start)


def _origin(
    lease: Lease, offset: int, private: bool, kind: str, code: str, shape: tuple[int, ...], nbytes: int
) -> Origin | None:
    if not 0 <= offset <= lease.nbytes - nbytes or (private and lease.modified()):
        return None
    return Origin(lease, offset, lease.handle.part(offset, nbytes, kind, code, shape))


# ---- digest


def digest(array: Any, *, hash: HashName = "xxh3") -> int:
    """128 bits that name the content of an ndarray or tensor, or of a list or tuple of such: dtype, shape and values.

    The same for numpy and torch where the dtype has the same name, however the array has travelled, and in every process
    (see `content.SEED_VARIABLE`). ``hash``: see `content.HashName`. One pass over the bytes, none for an untouched view of a
    block that was published with that hash. UnsupportedArrayError for anything else, ValueError for an unknown hash."""
    name = content.hash_name(hash)
    if name is None:
        raise ValueError("digest: hash=False, but a digest is made of a hash")
    return _digest(array, name)


def _digest(array: Any, name: HashName) -> int:
    if isinstance(array, (list, tuple)) and not isinstance(array, Handle):
        return content.list_digest([_digest(item, name) for item in array], name)
    origin = lease_of(array)
    handle = None if origin is None else origin.handle
    if handle is not None and handle.hash is not None and handle.hash_name == name:
        return content.array_digest(handle.dtype, handle.shape, handle.hash, name)
    form = tensors.describe(array)
    return content.array_digest(form.dtype, form.shape, content.hash_bytes(arrays.contiguous(form), name), name)


__all__ = ["ANYBODY", "Lease", "Origin", "Peer", "StaleHandleError", "attach", "digest", "lease_of", "process_token"]
