"""`measured_bytes`: from how many bytes on arrays are better published than carried in the message.

For sizes that double, the medians of what one message of one array costs all ranks together: encoded once, decoded by
each, and where it travels in the message also written into the channel and read from it by each. The threshold is the
first size at which publishing costs no more; below it, all sizes that were tried cost less in the message.
"""

import logging
import statistics
import time
from collections.abc import Callable
from functools import partial

from . import arrays, codec
from .arena import Arena
from .errors import ArenaError
from .group import Group
from .sizes import parse_bytes
from .tally import Tally

SIZES_BYTES = tuple(1 << power for power in range(10, 19))
"""1 KiB to 256 KiB: what is larger than all of them is always published."""
_ROUNDS = 9
_ARENA_BYTES = 1 << 20

_log = logging.getLogger("shmcast")


def told(inline_bytes: int | str) -> int | None:
    """In bytes, as a caster was told; None: to be measured. ValueError, TypeError where it is none, on all ranks alike."""
    if inline_bytes == "measure":
        return None
    return 0 if inline_bytes == 0 else parse_bytes(inline_bytes, "inline_bytes")


def threshold(group: Group, wanted: int | None, tally: Tally) -> int:
    """In bytes, as `told`, or measured; also in the metrics."""
    found = wanted
    if found is None:
        found = 0 if group.arena is None else measured_bytes(group.arena.namespace, group.size)
    tally.gauge("inline_bytes", found)
    return found


def measured_bytes(namespace: str, ranks: int) -> int:
    """The threshold for so many ranks; 0 where publishing is never dearer, or where there is no room to find out. Some 10 ms,
    in an arena of its own; says what it found in the log, at level INFO."""
    began_ns = time.monotonic_ns()
    try:
        with Arena.create(_ARENA_BYTES, namespace=namespace, max_blocks=64) as arena:
            found = _measure(arena, ranks)
    except ArenaError as error:
        _log.info("results of whatever size are published: no measurement: %s", error)
        return 0
    _log.info(
        "results of less than %d bytes of arrays travel in the message: measured for %d ranks in %.1f ms",
        found,
        ranks,
        (time.monotonic_ns() - began_ns) / 1e6,
    )
    return found


def _measure(arena: Arena, ranks: int) -> int:
    for nbytes in SIZES_BYTES:
        array = arrays.empty((nbytes,), "uint8")
        array[:] = 1
        published_ns = _median_ns(partial(_published_ns, arena, array, ranks))
        if published_ns <= _median_ns(partial(_inline_ns, arena, array, ranks)):
            return 0 if nbytes == SIZES_BYTES[0] else nbytes
    return SIZES_BYTES[-1]


def _published_ns(arena: Arena, array: arrays.ndarray, ranks: int) -> int:
    began_ns = time.monotonic_ns()
    encoded = codec.encode(array, arena, readers=0, keep=True, min_bytes=0)
    try:
        encoded_ns = time.monotonic_ns() - began_ns
        codec.loads(encoded.blob)
        return encoded_ns + ranks * (time.monotonic_ns() - began_ns - encoded_ns)
    finally:
        encoded.withdraw()


def _inline_ns(arena: Arena, array: arrays.ndarray, ranks: int) -> int:
    began_ns = time.monotonic_ns()
    blob = codec.encode(array, arena, readers=0, keep=True, min_bytes=0, inline_below=array.nbytes + 1).blob
    carried = bytearray(blob)  # one write into the channel
    encoded_ns = time.monotonic_ns() - began_ns
    codec.loads(bytes(carried))
    return encoded_ns + ranks * (time.monotonic_ns() - began_ns - encoded_ns)


def _median_ns(once: Callable[[], int]) -> float:
    once()
    return statistics.median([once() for _ in range(_ROUNDS)])
