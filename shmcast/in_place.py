"""`InPlace`: memory to make one tree in, so that encoding the tree costs no copy.

::

    array(shape, dtype)   reserves a block of the arena, or gives private memory where that has no room
    encode(tree)          asks `spot` of every array that it meets, and seals what it has met
    end()                 aborts the rest; no more arrays

An array belongs to a block if its bytes lie in it, whatever it was made of: a part, another shape, another dtype, a tensor.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

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


class Spots(Protocol):
    """Blocks that a tree was made in."""

    def spot(self, thing: Any) -> Spot | None:
        """See `InPlace.spot`."""


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

    @property
    def shared(self) -> bool:
        """Whether there is an arena to make things in."""
        return self._arena is not None

    def array(self, shape: int | Sequence[int], dtype: Any) -> arrays.ndarray:
        """A writable ndarray in C order, not initialized. It is made read-only when the tree that holds it, or a part of it,
        is encoded, and is not to be kept beyond that: its bytes are the readers' then, and others' after them.

        ValueError for a shape that is none, and once the tree has been encoded; TypeError for a dtype that is none."""
        (_, code, lengths), nbytes = form_of(shape, dtype)
        reservation = self._reserved(lengths, dtype, nbytes)
        if reservation is not None:
            return self._added(reservation, nbytes)[1]
        self._check_open()
        return arrays.empty(lengths, code)

    def block(self, nbytes: int) -> "tuple[int, arrays.ndarray, tuple[int, int]] | None":
        """``(number, bytes, (data segment, offset in it))`` of a block for another process to write; None where there is no
        room. Whoever ends this tree has made sure that nobody writes any more. ValueError as for `array`."""
        reservation = self._reserved((nbytes,), "uint8", nbytes)
        if reservation is None:
            self._check_open()
            return None
        place = reservation.place
        number, array = self._added(reservation, nbytes)
        return number, array, place

    def _reserved(self, lengths: Sequence[int], dtype: Any, nbytes: int) -> Reservation | None:
        if self._arena is None or nbytes < self._min_bytes:
            return None
        try:
            return self._arena.reserve(lengths, dtype, **self._terms)
        except ArenaFullError:
            self._no_room(nbytes)
            return None

    def spot(self, thing: Any) -> Spot | None:
        """Where an ndarray or tensor lies in these blocks; None: not there, or not in one piece.

        ValueError where it lies in a block of an earlier tree."""
        if not self._blocks and self._arena is None:
            return None
        return find_spot(thing, [(block.start, block.nbytes) for block in self._blocks], _native.Reservation)

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

    def _added(self, reservation: Reservation, nbytes: int) -> "tuple[int, arrays.ndarray]":
        array = reservation.array
        with self._lock:
            if not self._ended:
                self._blocks.append(_Block(reservation, arrays.address(array), nbytes))
                return len(self._blocks) - 1, array
        reservation.abort()
        self._check_open()
        return -1, array

    def _check_open(self) -> None:
        if self._ended:
            raise ValueError("reserve an array for a tree: it has been encoded, or has failed")


def find_spot(thing: Any, blocks: Sequence[tuple[int, int]], memory: type) -> Spot | None:
    """Where an ndarray or tensor lies in blocks, each an address and a length; None: not there, or not in one piece.

    ValueError where it lies in a block of an earlier tree; ``memory``: what arrays over blocks are made of."""
    found = _bytes_of(thing)
    if found is not None:
        address, kind, dtype, shape, nbytes = found
        for number, (start, length) in enumerate(blocks):
            offset = address - start
            if 0 <= offset <= length - nbytes:
                return Spot(number, offset, kind, dtype, shape, nbytes)
    if isinstance(thing, arrays.NDARRAY) and type(arrays.origin(thing)) is memory:
        address = arrays.address(thing)  # of its first element, wherever the others are
        if thing.nbytes and not any(0 <= address - start < length for start, length in blocks):
            raise ValueError(
                f"encode an array of {thing.nbytes} bytes: it lies in a block that was not reserved for this tree, so its bytes "
                "may be those of another one by now; return a copy instead, or a view of a lease"
            )
    return None


def _bytes_of(thing: Any) -> tuple[int, str, str, tuple[int, ...], int] | None:
    """``(address, kind, dtype, shape, bytes)`` of an array whose bytes are its values in C order; None for others."""
    if isinstance(thing, arrays.NDARRAY):
        if not thing.flags.c_contiguous or not thing.nbytes:
            return None
        return arrays.address(thing), "numpy", arrays.code_of(thing.dtype), thing.shape, thing.nbytes
    if not tensors.storage_address(thing) or not tensors.is_plain(thing) or not tensors.size_bytes(thing):
        return None
    return (tensors.address(thing), "torch", *tensors.shape_of(thing))
