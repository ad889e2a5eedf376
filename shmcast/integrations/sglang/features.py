"""What this process has published for SGLang: a block a feature, however often the feature is sent."""

import os
import threading
import weakref
from typing import Any, NamedTuple

from ... import _native, arrays, tensors
from ...arena import Arena
from ...attach import ANYBODY, Lease, attach, lease_of
from ...errors import HandleError, StaleHandleError, UnsupportedArrayError
from ...handle import Handle
from ...own_arena import is_own, own_arena


class _Kept(NamedTuple):
    tensor: "weakref.ref[Any]"
    handle: Handle
    arena: "weakref.ref[Arena]"
    let_go: "weakref.finalize[[int, Handle], Any]"


_kept: dict[int, _Kept] = {}
"""By id of the tensor, which is looked at through the reference: ids are used again."""
_lock = threading.RLock()


def promise(tensor: Any) -> tuple[Handle, Lease]:
    """The handle of a CPU tensor's values, with the promise that one more process may attach it; and a lease on them.

    The first time the tensor is copied and hashed in one pass. As long as it lives its block is kept, and sending it again
    costs a look at its bytes, lest a tensor that was refilled travels as what it was. A view of a block that is there already
    is not copied at all. OSError where it can not be shared: SGLang sends it inline then."""
    try:
        origin = lease_of(tensor)
        if origin is not None:
            return _promised(origin.handle), attach(origin.handle)
        arena = own_arena()
        with _lock:
            kept = _kept.get(id(tensor))
            if kept is None or kept.tensor() is not tensor or kept.arena() is not arena or not _holds(kept, tensor):
                kept = _keep(arena, tensor)
            return arena.alias(kept.handle), attach(kept.handle)
    except (UnsupportedArrayError, HandleError) as error:
        raise OSError(str(error)) from error
    except ValueError as error:  # of the configuration
        raise OSError(f"make an arena: {error}") from error


def again(handle: Handle) -> Handle:
    """A handle of the same block, with one promise more; the same one where that can not be had, as the block is gone or there is no slot."""
    try:
        return _promised(handle)
    except (StaleHandleError, OSError, ValueError):
        return handle  # who receives it finds that out, and says it


def take_back(handle: Handle) -> None:
    """End a promise that nobody will make use of."""
    try:
        arena = is_own(handle.arena)
        if arena is not None:
            arena.withdraw(handle)
        else:
            attach(handle).release()
    except (StaleHandleError, OSError, ValueError):
        pass  # it has ended already


def block_of(tensor: Any) -> Handle | None:
    """The block that has a tensor's values; None where there is none."""
    origin = lease_of(tensor)
    if origin is not None:
        return origin.handle
    kept = _kept.get(id(tensor))
    if kept is None or kept.tensor() is not tensor:
        return None
    arena = kept.arena()
    return None if arena is None or arena.closed else kept.handle


def _promised(handle: Handle) -> Handle:
    arena = is_own(handle.arena)
    if arena is not None:
        return arena.alias(handle)
    with attach(handle) as lease:
        lease.grant_to((ANYBODY,))
    return handle


def _keep(arena: Arena, tensor: Any) -> _Kept:
    before = _kept.get(id(tensor))
    if before is not None:
        before.let_go()  # of other values, or in an arena that is closed
    handle = arena.publish(tensor, readers=0, keep=True)
    let_go = weakref.finalize(tensor, _let_go, id(tensor), handle)
    let_go.atexit = False
    kept = _kept[id(tensor)] = _Kept(weakref.ref(tensor), handle, weakref.ref(arena), let_go)
    return kept


def _holds(kept: _Kept, tensor: Any) -> bool:
    """Whether the tensor's values are still those that were published."""
    form, handle = tensors.describe(tensor), kept.handle
    same = (form.dtype, form.shape) == (handle.dtype, handle.shape)
    return same and _native.hash128(arrays.contiguous(form)) == handle.hash


def _let_go(key: int, handle: Handle) -> None:
    """What was promised outlives the tensor, or the values that it had; the rest of its block does not.

    Takes no lock: the garbage collector calls this in any thread, whatever that holds."""
    kept = _kept.get(key)
    if kept is None or kept.handle != handle:
        return
    del _kept[key]
    arena = kept.arena()
    if arena is not None and not arena.closed:
        arena.release(handle)


def _forget() -> None:
    global _lock
    _lock = threading.RLock()
    _kept.clear()  # the parent's


os.register_at_fork(after_in_child=_forget)
