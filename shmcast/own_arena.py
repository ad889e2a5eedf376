"""`own_arena`: what this process publishes in where nobody has made an arena for it, as for functions that stand in for an
engine's own, whose signature has no place for one. Made when it is first needed, used until `close_own_arena`.
"""

import os
import threading

from .arena import Arena
from .sizes import MAX_BYTES_VARIABLE

_lock = threading.Lock()
_arena: Arena | None = None


def configured_max_bytes() -> str:
    """Size of arenas that are made without anybody asking for one: `MAX_BYTES_VARIABLE`, "2GiB" where it is not set."""
    return os.environ.get(MAX_BYTES_VARIABLE) or "2GiB"


def own_arena() -> Arena:
    """This process's arena. ArenaError, ArenaFullError and ValueError as for `Arena.create`."""
    global _arena
    with _lock:
        if _arena is None or _arena.closed:
            _arena = Arena.create(configured_max_bytes())
        return _arena


def is_own(arena: int) -> Arena | None:
    """This process's arena, if that is its id."""
    own = _arena
    return own if own is not None and own.id == arena and not own.closed else None


def close_own_arena() -> None:
    """Close it, if there is one: views stay valid, what was sent and not read is gone. A later use makes another one."""
    global _arena
    with _lock:
        arena, _arena = _arena, None
    if arena is not None:
        arena.close()


def _forget() -> None:
    global _arena, _lock
    _lock = threading.Lock()
    _arena = None  # the parent's, of which a forked child can make no use


os.register_at_fork(after_in_child=_forget)
