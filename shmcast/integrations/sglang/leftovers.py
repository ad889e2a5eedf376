"""What earlier SGLangs have left in /dev/shm: reclaimed when one starts, by the rules of `foreign`."""

import logging

from ... import foreign

PATTERN = "sgl_shm_mm_*"
"""Segments of multimodal features, ``sgl_shm_mm_<pid>_<random>``. What a crash leaves of them fills /dev/shm in time."""

_log = logging.getLogger(__name__)


def reclaim() -> list[str]:
    """Remove those that provably nobody uses; the names of what was removed. Says in the log what was removed and what
    stays. Never raises: a start must not fail for what others have left."""
    try:
        found = foreign.scan([PATTERN]).leftovers
    except OSError as error:
        _log.info("shmcast: leftovers of SGLang can not be looked for: %s", error)
        return []
    removed = [one for one in found if _is_removed(one)]
    if found:
        _log.info(
            "shmcast: %d of %d leftover segments of SGLang removed, %d bytes; see shmcast-gc --foreign for the others",
            len(removed),
            len(found),
            sum(one.nbytes for one in removed),
        )
    return [one.name for one in removed]


def _is_removed(one: foreign.Leftover) -> bool:
    try:
        return foreign.remove(one)
    except OSError as error:
        _log.info("shmcast: %s stays: %s", one.name, error)
        return False
