"""Under SGLang: multimodal features travel between its processes through shmcast.

Where both packages are installed, SGLang loads this as a plugin in each of its processes, and nothing else has to be done;
`install` does the same by hand. ``SHMCAST_SGLANG=0`` leaves SGLang as it is.

============================== ==================================================================================
what SGLang does               what it does with this
============================== ==================================================================================
``ShmPointerMMData``           a segment a tensor   → a block of the tokenizer's arena; one, however often it is sent
``_finalize_shm_features``     barrier, all_reduce  → ranks read each other's words in shared memory
``broadcast_pyobj``            pickle over gloo     → a ring in shared memory
``point_to_point_pyobj``       pickle over gloo     → the same, from stage to stage
``_process_and_broadcast_...`` pickled arrays       → handles
``item.hash``                  SHA-256 a rank       → once, in the tokenizer
============================== ==================================================================================

What it can not share travels as before: tensors on a GPU, segments that others have made (the Rust front end), everything
where ranks are on several nodes, and what finds no room (`SHMCAST_MAX_BYTES`).
"""

import logging
import os
from collections.abc import Sequence
from importlib import metadata

from ...compat import close_groups
from ...errors import ShmcastError
from ...own_arena import close_own_arena
from ...stages import close_stages
from . import leftovers, patches
from .hashing import HASHES, set_hash

KNOWN = ("0.5.23",)
"""Versions of SGLang that this was written for and tested with."""
SWITCH = "SHMCAST_SGLANG"
"""Environment variable: 0 switches the integration off."""
HASH_VARIABLE = "SHMCAST_SGLANG_HASH"
"""Environment variable: "sha256" (default), "xxh3" or "off", see `install`."""

_log = logging.getLogger(__name__)


def install(*, hash: str | None = None) -> bool:
    """Put shmcast under the SGLang of this process. Idempotent. False where `SWITCH` says not to.

    ``hash``: how features are named that nobody has named, once and in the tokenizer: "sha256", SGLang's own 64 bits, so that
    cache keys stay what they were; "xxh3", which costs nothing beside the copy, but is no identity against who makes
    collisions on purpose; "off": by each rank, as before. None: as `HASH_VARIABLE` says.

    ShmcastError on an SGLang that is not known or not what it was, with both versions; ValueError for another hash: nothing is
    changed then."""
    if os.environ.get(SWITCH) == "0":
        return False
    name = hash or os.environ.get(HASH_VARIABLE) or "sha256"
    if name not in HASHES:
        given = "" if hash else f", which {HASH_VARIABLE} says"
        raise ValueError(f"install under SGLang: hash is {', '.join(HASHES)}, not {name!r}{given}")
    _check_version()
    patches.apply(_targets)
    set_hash(name)
    leftovers.reclaim()
    return True


def uninstall() -> None:
    """Give SGLang its own functions back, and end what was made for it in this process. Features that were materialized stay
    valid; what is on its way is lost. Not while requests are under way. Idempotent."""
    patches.take_back()
    close_stages()
    close_groups()
    close_own_arena()


def installed() -> bool:
    """Whether SGLang runs on shmcast in this process."""
    return patches.applied()


def plugin() -> None:
    """What SGLang calls in each of its processes: `install`; where that is refused, a warning, and SGLang as it is."""
    try:
        if install():
            _log.info("shmcast carries the multimodal features of this process")
    except (ShmcastError, ValueError) as error:
        _log.warning("%s", error)


def _targets() -> Sequence[patches.Target]:
    try:
        from . import targets  # only now: it imports SGLang

        return targets.targets()
    except (ImportError, AttributeError) as error:
        raise ShmcastError(
            f"install under SGLang {', '.join(KNOWN)}: it is not the one that this build knows, and goes on as it is: "
            f"{type(error).__name__}: {error}"
        ) from error


def _check_version() -> None:
    try:
        found = metadata.version("sglang")
    except metadata.PackageNotFoundError:
        raise ShmcastError("install under SGLang: it is not installed") from None
    if found not in KNOWN:
        raise ShmcastError(
            f"install under SGLang {found}: this build of shmcast knows {', '.join(KNOWN)}; SGLang goes on as it is. "
            f"Use one of these, or a shmcast that knows {found}"
        )
