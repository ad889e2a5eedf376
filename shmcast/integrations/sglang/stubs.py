"""The methods of SGLang's ``ShmPointerMMData``: what stands for a feature on its way from a tokenizer to the ranks.

A stub of ours has a handle, and attaches it when somebody wants the values: not in a process that hands it on. It carries a
promise for one process more (see `features`); who hands it on hands the promise on, and who drops it ends it. Where it was
made, and where somebody has wanted the values, it has a lease: it can be handed on again whatever became of it elsewhere.

::

    tokenizer            init, getstate                   a promise for every state that is given out
    DP controller        setstate, getstate               the same promise goes on
    rank 0               setstate, getstate, materialize  } one promise for all, `handed_round`: every rank attaches and holds
    other ranks          setstate, materialize            } before any goes on (see `ranks`)

A state that has none of ours (the Rust front end makes such) is left to SGLang's own methods.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ...attach import Lease, attach
from ...handle import Handle
from . import features, patches

KEY = "shmcast"
"""In the state: the handle's bytes."""

_HANDLE, _LEASE, _PROMISED = "_shmcast_handle", "_shmcast_lease", "_shmcast_promised"
"""Attributes of a stub: its handle; a lease, from the start where it was made, elsewhere once somebody has wanted the values;
whether it has a promise to hand on."""


_round = threading.local()


@contextmanager
def handed_round() -> Iterator[None]:
    """States that are made meanwhile go to processes that all keep what they have until each has it: they share a promise."""
    _round.depth = getattr(_round, "depth", 0) + 1
    try:
        yield
    finally:
        _round.depth -= 1


def is_ours(stub: Any) -> bool:
    """Whether a stub is one that shmcast carries."""
    return _HANDLE in vars(stub)


def init(self: Any, tensor: Any, precomputed_hash: int | None = None) -> None:
    """``ShmPointerMMData(tensor, precomputed_hash)``. OSError where shared memory is short."""
    if not tensor.is_cpu:
        tensor = tensor.cpu()
    handle, lease = features.promise(tensor)
    _fill(self, handle, tensor.shape, tensor.dtype, precomputed_hash, promised=True)
    vars(self)[_LEASE] = lease


def getstate(self: Any) -> dict[str, Any]:
    """The state to send; called any number of times."""
    if not is_ours(self):
        state: dict[str, Any] = _original("__getstate__")(self)
        return state
    attributes = vars(self)
    handle = attributes[_HANDLE]
    if handle is not None and not getattr(_round, "depth", 0):
        if attributes[_PROMISED]:
            attributes[_PROMISED] = False
        else:
            lease = attributes[_LEASE]
            handle = features.again(handle if lease is None else lease.handle)
    return {
        "shm_name": self.shm_name,
        "shape": self.shape,
        "dtype": self.dtype,
        "precomputed_hash": self.precomputed_hash,
        KEY: b"" if handle is None else handle.to_bytes(),
    }


def setstate(self: Any, state: dict[str, Any]) -> None:
    """Never raises for a state of ours: what is wrong with it `materialize` says."""
    if KEY not in state:
        _original("__setstate__")(self, state)
        return
    error = None
    try:
        handle: Handle | None = Handle.from_bytes(state[KEY])
    except Exception as wrong:
        handle, error = None, f"{type(wrong).__name__}: {wrong}"
    shape, dtype = state.get("shape"), state.get("dtype")
    _fill(self, handle, shape, dtype, state.get("precomputed_hash"), promised=handle is not None)
    self._materialization_error = error


def materialize(self: Any) -> Any:
    """A tensor of one's own to write to, as often as one likes. RuntimeError where the values can not be had."""
    if not is_ours(self):
        return _original("materialize")(self)
    return _values(self)


def close_and_unlink(self: Any) -> None:
    """This process needs it no more. Idempotent."""
    if not is_ours(self):
        _original("close_and_unlink")(self)
        return
    attributes = vars(self)
    attributes[_LEASE] = None
    if attributes[_PROMISED]:
        attributes[_PROMISED] = False
        if attributes[_HANDLE] is not None:
            features.take_back(attributes[_HANDLE])


def delete(self: Any) -> None:
    """Who drops a stub without having handed it on ends its promise."""
    if is_ours(self):
        close_and_unlink(self)
    elif "_shm_handle" in vars(self):
        _original("__del__")(self)


def _get_tensor(self: Any) -> Any:
    """The values, for who only looks (SGLang's hash); None where they can not be had."""
    if not is_ours(self):
        return vars(self).get("tensor")
    try:
        return _values(self)
    except RuntimeError:
        return None


def _set_tensor(self: Any, value: Any) -> None:
    vars(self)["tensor"] = value


tensor = property(_get_tensor, _set_tensor)


def _fill(
    self: Any, handle: Handle | None, shape: Any, dtype: Any, precomputed_hash: int | None, *, promised: bool
) -> None:
    vars(self).update({_HANDLE: handle, _LEASE: None, _PROMISED: promised})
    self.shape, self.dtype, self.precomputed_hash = shape, dtype, precomputed_hash
    self.shm_name = "" if handle is None else f"shmcast.{handle.namespace}.{handle.arena:016x}.{handle.generation}"
    self._shm_handle = None
    self._materialization_error = None


def _values(self: Any) -> Any:
    if self._materialization_error is None:
        try:
            values = _attached(self).tensor()
            return values.view(self.dtype).reshape(self.shape)
        except Exception as error:
            self._materialization_error = f"{type(error).__name__}: {error}"
    raise RuntimeError(self._materialization_error)


def _attached(self: Any) -> Lease:
    """A lease of its own for each tensor, so that one who writes does not write into another's; one of them stays with the
    stub, so that the block does."""
    attributes = vars(self)
    if attributes[_LEASE] is not None:
        return attach(attributes[_LEASE].handle)
    lease = attributes[_LEASE] = attach(attributes[_HANDLE])
    attributes[_PROMISED] = False  # attaching has used it up
    return lease


def _original(name: str) -> Any:
    from sglang.srt.managers.mm_utils import ShmPointerMMData

    return patches.original(ShmPointerMMData, name)


__all__ = ["KEY", "close_and_unlink", "delete", "getstate", "init", "is_ours", "materialize", "setstate", "tensor"]
