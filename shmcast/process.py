"""What this process has joined: one membership an arena, made when the first handle of it is attached.

A forked child starts with none: what it inherited it may not use (see `_native.Member.inherited`).
"""

import errno
import os
import random
import threading
import time
import weakref
from collections.abc import Callable

from . import _native, gc, names
from .errors import ArenaError, ArenaGoneError, HandleError

Key = tuple[str, int, int]
"""(namespace, arena id, host): the first three fields of a handle."""

members: dict[Key, _native.Member] = {}
"""Read by `attach` on its fast path; written only here."""

fork_guard = threading.RLock()
"""Held while a descriptor is open whose lock must end with this process: a child forked meanwhile would keep it alive."""

_alive: "weakref.WeakValueDictionary[Key, _native.Member]" = weakref.WeakValueDictionary()
"""Also memberships that were forgotten while leases keep them: a process has one byte of an arena, never two, or grants
would be given to the one and consumed with the other."""

_JOIN_ATTEMPTS = 8
_JOIN_PAUSE_S = 0.005
_TIDY_EVERY_S = 60.0
_TIDY_ARENAS = 64  # some 0.1 ms each; where there are more, others are looked at by the next process that comes
_TIDY_SLICE_S = 0.05  # and no fork waits for longer than that, and one removal
_tidied_s: dict[str, float] = {}
"""When this process has last tidied a namespace up because it came to it."""


def opener(namespace: str, arena: int) -> Callable[[int], int]:
    """How the core opens segments of an arena: number 0 for reading and writing, afresh, the others for reading."""

    def open_segment(number: int) -> int:
        name = names.segment_name(namespace, arena, number)
        return names.open_readable(name) if number else names.open_writable(name)

    return open_segment


def join(key: Key) -> _native.Member:
    """This process's membership in an arena; joins it if need be.

    HandleError (another host), ArenaGoneError, LayoutMismatchError, ArenaError (not ready, no byte free, no permission)."""
    namespace, arena, host = key
    if host != names.host_id():
        raise HandleError(
            f"attach: the handle is of host {host:016x}, this is host {names.host_id():016x}; shared memory does not "
            "leave its host, and a reboot ends it"
        )
    with fork_guard:
        member = members.get(key)
        if member is None or member.inherited or member.ended:
            _forget_ended()
            member = _alive.get(key)
            if member is None or member.inherited or member.ended:
                member = _alive[key] = _join(namespace, arena)
            members[key] = member
    tidy_now_and_then(namespace, arena)
    return member


def adopt(key: Key, member: _native.Member) -> None:
    """Make the owner's own membership known, so that it attaches what it has published itself."""
    with fork_guard:
        members[key] = _alive[key] = member


def forget(key: Key) -> None:
    """Drop a membership; leases that exist keep it alive until they are gone."""
    with fork_guard:
        members.pop(key, None)


def leave(namespace: str, arena: int) -> None:
    """Give this process's byte of an arena up at once. BufferError while leases exist; the owner closes instead."""
    key = namespace, arena, names.host_id()
    with fork_guard:
        member = _alive.get(key)
        if member is not None and member.index != 0:
            member.leave()
            _alive.pop(key, None)
            members.pop(key, None)


def leave_all() -> None:
    """Leave every arena that this process does not own."""
    for namespace, arena, _ in [key for key, member in members.items() if member.index != 0]:
        leave(namespace, arena)


def _forget_ended() -> None:
    for key, member in list(members.items()):
        if member.inherited or member.ended:
            del members[key]


def _join(namespace: str, arena: int) -> _native.Member:
    name = names.segment_name(namespace, arena, names.CONTROL)
    for attempt in range(_JOIN_ATTEMPTS):
        try:
            map_fd = names.open_writable(name)
        except FileNotFoundError:
            raise ArenaGoneError(
                errno.ENOENT,
                f"attach: there is no arena {name} on this host: its owner closed it or died and it was swept, or this "
                "process does not see the owner's /dev/shm",
            ) from None
        except PermissionError as error:
            raise ArenaError(errno.EACCES, f"attach: open arena {name}: {error.strerror}") from None
        try:
            # A description of its own: the lock must not live on in what a forked child inherits through the mapping.
            lock_fd = names.open_writable(name)
        except FileNotFoundError:
            os.close(map_fd)
            continue
        except BaseException:
            os.close(map_fd)
            raise
        try:
            if os.path.sameopenfile(map_fd, lock_fd):
                return _native.Member.join(map_fd, lock_fd, opener(namespace, arena), arena)
        except ArenaError as error:
            # Not for long, maybe: its creator is at work, or a sweeper has the one byte that is free.
            if type(error) is not ArenaError or attempt == _JOIN_ATTEMPTS - 1:
                raise type(error)(f"open {name}: {error}") from None
            time.sleep(_JOIN_PAUSE_S)
        finally:
            os.close(map_fd)
            os.close(lock_fd)
    raise ArenaError(errno.EAGAIN, f"attach: {name} was replaced {_JOIN_ATTEMPTS} times while it was being opened")


def tidy_now_and_then(namespace: str, spared: int) -> None:
    """Whoever comes removes what the dead have left, so that nobody has to: in the background, as who attaches must not pay
    for what others have left, nor who forks. ``spared``: an arena whose owner may have died after it sent what we were about
    to read."""
    now_s = time.monotonic()
    if now_s < _tidied_s.get(namespace, -_TIDY_EVERY_S) + _TIDY_EVERY_S:
        return
    _tidied_s[namespace] = now_s
    try:
        threading.Thread(target=_tidy, args=(namespace, spared), name="shmcast-tidy", daemon=True).start()
    except RuntimeError:
        pass  # no thread to be had, or the interpreter ends: somebody else will


def _tidy(namespace: str, spared: int) -> None:
    try:
        found = names.listing(namespace)
        arenas = list({one.arena for one in found if one.arena != spared})
        if len(arenas) > _TIDY_ARENAS:
            arenas = random.sample(arenas, _TIDY_ARENAS)
        if not arenas:
            return
        todo = gc.plan(gc.scan(namespace, closely=True, listed=[one for one in found if one.arena in arenas]))
        while _tidy_a_little(todo):
            time.sleep(0.001)  # who waits for the guard gets it
    except OSError:
        pass  # whose process this is can do nothing about it


def _tidy_a_little(todo: gc.Plan) -> bool:
    """Some of it; whether there is more, and it goes."""
    until_s = time.monotonic() + _TIDY_SLICE_S
    report = gc.apply(todo, guard=lambda: fork_guard, stop=lambda: time.monotonic() > until_s)
    return report.stopped and bool(report.removed or report.scrubbed)


def _start_afresh() -> None:
    members.clear()
    _alive.clear()
    _tidied_s.clear()


# The lock's own methods: Python code would be interrupted (KeyboardInterrupt) before it lets go, and what is raised here is
# ignored, so that the guard were held for ever. In the child the thread that forked holds it, as it did in the parent.
os.register_at_fork(after_in_child=_start_afresh)
os.register_at_fork(before=fork_guard.acquire, after_in_parent=fork_guard.release, after_in_child=fork_guard.release)
