"""`InPlace`: memory to make one tree in, so that encoding the tree costs no copy.

::

    array(shape, dtype)   reserves a block of the arena, or gives private memory where that has no room
    encode(tree)          asks `spot` of every array that it meets, and seals what it has met
    end()                 aborts the rest; no more arrays

An array belongs to a block if its bytes lie in it, whatever it was made of: a part, another shape, another dtype, a tensor.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from . import _native, arrays, tensors
from .arena import Arena
from .attach import Peer
from .content import Hash
from .errors import ArenaFullError
from .handle import Handle
from .reservation import Reservation, form_of

MIN_BYTES = 16384
"""Smaller arrays are copied when the tree is encoded: cheaper than a block for each, which nobody may return after all."""


class Spot(NamedTuple):
    """Where in which block an array lies."""

    block: int
    offset: int
    """Bytes."""
    kind: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class _Block(NamedTuple):
    reservation: Reservation
    start: int
    """Address."""
    nbytes: int


class InPlace:
    """Blocks of an arena for one tree that is being made. `array` may be called from any thread, the rest from one."""

    def __init__(
        self,
        arena: Arena | None,
        *,
        tokens: Sequence[Peer],
        keep: bool,
        grant_timeout: float | None,
        hash: Hash = True,
        min_bytes: int = MIN_BYTES,
        no_room: Callable[[int], object] = lambda nbytes: None,
    ) -> None:
        """``arena``: None: all memory is private. ``tokens``, ``keep``, ``grant_timeout``, ``hash``: terms of what is published.
        ``no_room``: called with the bytes of each array that found none."""
        self._arena = arena
        self._terms: dict[str, Any] = {
            "readers": tuple(tokens),
            "keep": keep,
            "grant_timeout": grant_timeout,
            "hash": hash,
        }
        self._min_bytes = min_bytes
        self._no_room = no_room
        self._lock = threading.Lock()
        self._blocks: list[_Block] = []
        self._ended = False

    def array(self, shape: int | Sequence[int], dtype: Any) -> arrays.ndarray:
        """A writable ndarray in C order, not initialized. It is made read-only when the tree that holds it, or a part of it,
        is encoded, and is not to be kept beyond that: its bytes are the readers' then, and others' after them.

        ValueError for a shape that is none, and once the tree has been encoded; TypeError for a dtype that is none."""
        (_, code, lengths), nbytes = form_of(shape, dtype)
        if self._arena is not None and nbytes >= self._min_bytes:
            try:
                reservation = self._arena.reserve(lengths, dtype, **self._terms)
            except ArenaFullError:
                self._no_room(nbytes)
            else:
                return self._added(reservation, nbytes)
        self._check_open()
        return arrays.empty(lengths, code)

    def spot(self, thing: Any) -> Spot | None:
        """Where an ndarray or tensor lies in these blocks; None: not there, or not in one piece.

        ValueError where it lies in a block of an earlier tree."""
        if not self._blocks and self._arena is None:
            return None
        found = _bytes_of(thing)
        if found is not None:
            address, kind, dtype, shape, nbytes = found
            for number, block in enumerate(self._blocks):
                offset = address - block.start
                if 0 <= offset <= block.nbytes - nbytes:
                    return Spot(number, offset, kind, dtype, shape, nbytes)
        self._check_origin(thing)
        return None

    def _check_origin(self, thing: Any) -> None:
        """ValueError where it lies in a block of an earlier tree, in one piece or not."""
        if not isinstance(thing, arrays.NDARRAY) or type(arrays.origin(thing)) is not _native.Reservation:
            return
        address = arrays.address(thing)  # of its first element, wherever the others are
        if thing.nbytes and not any(0 <= address - block.start < block.nbytes for block in self._blocks):
            raise ValueError(
                f"encode an array of {thing.nbytes} bytes: it lies in a block that was not reserved for this tree, so its bytes "
                "may be those of another one by now; return a copy instead, or a view of a lease"
            )

    def worth_sealing(self, spots: Sequence[Spot]) -> set[int]:
        """Numbers of the blocks of which these take half at least. Of others the parts are better copied, so that what
        nobody asked for does not live as long as they do."""
        taken = dict.fromkeys(range(len(self._blocks)), 0)
        for spot in set(spots):
            taken[spot.block] += spot.nbytes
        return {number for number, nbytes in taken.items() if nbytes and 2 * nbytes >= self._blocks[number].nbytes}

    def seal(self, number: int) -> Handle:
        """Publish a block; its array is read-only from here on. Errors as for `Arena.publish`."""
        return self._blocks[number].reservation.seal()

    def end(self) -> None:
        """Give back what was not sealed, as soon as no array is left on it. Idempotent."""
        with self._lock:
            self._ended = True
            blocks, self._blocks = self._blocks, []
        for block in blocks:
            block.reservation.abort()

    def _added(self, reservation: Reservation, nbytes: int) -> arrays.ndarray:
        array = reservation.array
        with self._lock:
            if not self._ended:
                self._blocks.append(_Block(reservation, arrays.address(array), nbytes))
                return array
        reservation.abort()
        self._check_open()
        return array

    def _check_open(self) -> None:
        if self._ended:
            raise ValueError("reserve an array for a tree: it has been encoded, or has failed")


def _bytes_of(thing: Any) -> tuple[int, str, str, tuple[int, ...], int] | None:
    """``(address, kind, dtype, shape, bytes)`` of an array whose bytes are its values in C order; None for others."""
    if isinstance(thing, arrays.NDARRAY):
        if not thing.flags.c_contiguous or not thing.nbytes:
            return None
        return arrays.address(thing), "numpy", arrays.code_of(thing.dtype), thing.shape, thing.nbytes
    if not tensors.storage_address(thing) or not tensors.is_plain(thing) or not tensors.size_bytes(thing):
        return None
    return (tensors.address(thing), "torch", *tensors.shape_of(thing))
