"""`Reservation`: a block that is written in place, so that publishing it costs no pass over its bytes at all."""

import math
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from . import _native, arrays, tensors
from .handle import Handle

if TYPE_CHECKING:
    import torch


class Reservation:
    """A block of an arena that only its publisher sees until it is sealed. Made by `Arena.reserve`.

    As a context manager it seals at the end of the block, or aborts if an exception leaves it."""

    def __init__(
        self,
        block: _native.Reservation,
        form: tuple[str, str, tuple[int, ...]],
        seal: Callable[[_native.Reservation], Handle],
    ) -> None:
        """Not for callers: `Arena.reserve` makes reservations."""
        self._block: _native.Reservation | None = block
        self._kind, self._dtype, self._shape = form
        self._seal = seal
        self._array: arrays.ndarray | None = None
        self._handle: Handle | None = None

    @property
    def array(self) -> arrays.ndarray:
        """The ndarray to write: writable, not initialized, in C order. ValueError once sealed or aborted.

        It is made read-only then. So must be what was derived from it, which nobody checks: the bytes are the readers'."""
        if self._array is None:
            self._array = arrays.over(self._open(), self._dtype, self._shape)
        return self._array

    @property
    def tensor(self) -> "torch.Tensor":
        """The same memory as a tensor. ValueError once sealed or aborted; torch has no read-only tensors, so do not write
        to it after that."""
        block = self._open()
        return tensors.over_bytes(arrays.flat(block, block.nbytes), self._dtype, self._shape)

    @property
    def place(self) -> tuple[int, int]:
        """``(number of the data segment, offset in it)``, for a process that maps the block to write it. ValueError once
        sealed or aborted."""
        return self._open().place

    @property
    def handle(self) -> Handle:
        """The handle of the sealed block. ValueError before that."""
        if self._handle is None:
            raise ValueError(f"handle of {self!r}: only what is sealed has one")
        return self._handle

    def seal(self) -> Handle:
        """Publish what was written, on the terms given to `Arena.reserve`, and return the handle. ValueError the second time."""
        if self._block is None:
            raise ValueError(f"seal {self!r}: it is not open")
        self._handle = self._seal(self._block)
        self._close()
        return self._handle

    def abort(self) -> None:
        """Give the block back unpublished, as soon as no array over it is left. Idempotent; nothing once sealed."""
        if self._block is not None:
            self._close()

    def _open(self) -> _native.Reservation:
        if self._block is None:
            raise ValueError(f"write to {self!r}: its bytes are not yours any more")
        return self._block

    def _close(self) -> None:
        if self._array is not None:
            arrays.seal(self._array)
        # Arrays that were given out keep the core's reservation, and so their memory, whatever becomes of the block.
        self._block = self._array = None

    def __enter__(self) -> "Reservation":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        if self._block is None:
            return
        if kind is not None:
            self.abort()
            return
        try:
            self.seal()
        except BaseException:
            self.abort()
            raise

    def __repr__(self) -> str:
        state = "open" if self._block is not None else "sealed" if self._handle is not None else "aborted"
        return f"<Reservation {state}: {self._kind} {self._dtype} {self._shape}>"


def form_of(shape: Any, dtype: object) -> tuple[tuple[str, str, tuple[int, ...]], int]:
    """``((kind, dtype, shape), bytes)`` of an array to be: shape an int or a sequence of ints, dtype numpy's or torch's."""
    lengths = (shape,) if isinstance(shape, int) else tuple(shape)
    for length in lengths:
        if isinstance(length, bool) or not hasattr(length, "__index__") or length < 0:
            raise ValueError(f"reserve: shape {shape!r} is not made of lengths")
    named = tensors.dtype_named(dtype)
    kind = "numpy" if named is None else "torch"
    code, item_bytes = arrays.dtype_named(dtype) if named is None else named
    lengths = tuple(int(length) for length in lengths)
    return (kind, code, lengths), math.prod(lengths) * item_bytes
