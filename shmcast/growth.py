"""The data segments of one arena, as its owner sees them: adding, giving back, and what to say when there is no room."""

import errno
import os
import secrets
import threading

from . import _native, names
from .errors import ArenaError, ArenaFullError
from .sizes import format_bytes

SEGMENT_LEAST = 16 << 20
_CREATE_ATTEMPTS = 8
_SKIP = 1 << 20
SEGMENT_MOST = 1 << 30
_WAKE_LEAST = 1 << 20


def pages(nbytes: int) -> int:
    """Rounded up to whole pages."""
    return -(-nbytes // _native.PAGE_BYTES) * _native.PAGE_BYTES


def default_segment_bytes(max_bytes: int) -> int:
    """An eighth of the arena, within 16 MiB and 1 GiB, and no more than the arena."""
    return min(pages(min(max(max_bytes // 8, SEGMENT_LEAST), SEGMENT_MOST)), max_bytes)


class Segments:
    """The data segments of an arena. `lock` is held by whoever changes them."""

    def __init__(
        self,
        owner: _native.Owner,
        namespace: str,
        arena: int,
        max_bytes: int,
        segment_bytes: int,
        idle_ns: int,
        mode: int = 0o600,
    ) -> None:
        self.owner = owner
        self.namespace = namespace
        self.arena = arena
        self.max_bytes = max_bytes
        self.segment_bytes = segment_bytes
        self.idle_ns = idle_ns
        self.mode = mode
        self.lock = threading.RLock()
        self._number = 0
        self._made: set[int] = set()
        """Numbers of the names that there are, or may be."""

    def name(self, number: int) -> str:
        return names.segment_name(self.namespace, self.arena, number)

    @property
    def budget(self) -> int:
        """Bytes that segments may still be added for."""
        return self.max_bytes - sum(size for _, size, _, _ in self.owner.segments())

    def add(self, size: int) -> None:
        """One more segment of ``size`` bytes, a multiple of the page: created, reserved, mapped and prefaulted.

        OSError with ENOSPC where /dev/shm has no room, ArenaFullError where the format has none; nothing is left then."""
        with self.lock:
            number, fd = self._create()
            try:
                self.owner.add_segment(number, fd, size)
            except BaseException:
                # A signal's exception may come when the segment is in service already.
                if number not in [known for known, *_ in self.owner.segments()]:
                    self._unlink(number)
                raise
            finally:
                os.close(fd)

    def _create(self) -> tuple[int, int]:
        """Number and descriptor of a new segment. Names that a stranger has taken are passed over, the next ones too: who
        sees the arena's id can take what comes next, but not what nobody can guess."""
        attempts = _CREATE_ATTEMPTS
        while True:
            self._number += 1 if attempts == _CREATE_ATTEMPTS else 1 + secrets.randbelow(_SKIP)
            self._made.add(self._number)  # before there is such a name, as a signal may come right behind
            attempts -= 1
            try:
                return self._number, names.create(self.name(self._number), self.mode)
            except OSError as error:
                self._made.discard(self._number)  # not ours to unlink
                if not attempts or not isinstance(error, FileExistsError):
                    raise

    def _unlink(self, number: int) -> None:
        names.unlink(self.name(number))
        self._made.discard(number)

    def grow(self, nbytes: int) -> bool:
        """Add a segment that a block of ``nbytes`` fits in; idle segments make way for it if need be. False where the
        arena may not have that much, OSError with ENOSPC where the host does not have it."""
        need = max(pages(nbytes), _native.PAGE_BYTES)
        with self.lock:
            budget = self.budget
            if budget < need:
                idle = [(number, size) for number, size, used, _ in self.owner.segments() if not used]
                if budget + sum(size for _, size in idle) < need:
                    return False
                for number, size in idle:
                    if budget < need and self.retire(number):
                        budget += size
                if budget < need:
                    return False
            size = min(max(self.segment_bytes, need), budget)
            while True:
                try:
                    self.add(size)
                    return True
                except OSError as error:
                    if error.errno != errno.ENOSPC or size <= need:
                        raise
                    size = max(pages(size // 2), need)

    def retire(self, number: int) -> bool:
        """Give an idle segment back to the host; False where it is in use, or its pages are pinned."""
        with self.lock:
            if not self.owner.retire_segment(number):
                return False
            self._unlink(number)
            return True

    def retire_idle(self, now_ns: int) -> int | None:
        """Give back what has been idle for long, the first segment excepted, and not if that leaves little room.

        Returns ns until there may be something to give back; None where one segment is left."""
        with self.lock:
            segments = self.owner.segments()
            used = sum(used for _, _, used, _ in segments)
            reserved = sum(size for _, size, _, _ in segments)
            wait = None
            for number, size, _, idle_since in segments[1:]:
                left = idle_since + self.idle_ns - now_ns if idle_since else self.idle_ns
                if left > 0 or (reserved - size - used) * 4 < used or not self.retire(number):
                    left = left if left > 0 else self.idle_ns
                    wait = left if wait is None else min(wait, left)
                else:
                    reserved -= size
            return wait

    def grow_ahead(self) -> int:
        """Add a segment if what is warm and free is less than a quarter of what is used. Returns how many bytes may be
        published before the next look."""
        with self.lock:
            stats = self.owner.stats()
            if not stats:
                return 1 << 62
            free, used = stats["free_bytes"], stats["used_bytes"]
            size = min(self.segment_bytes, self.budget)
            if size < min(SEGMENT_LEAST, self.segment_bytes):
                return 1 << 62
            if free * 4 < used:
                try:
                    self.add(size)
                    free += size
                except OSError:
                    pass  # /dev/shm has no room for it now; whoever needs the memory says so
            return max((free - used // 4) // 2, _WAKE_LEAST)

    def unlink_all(self) -> None:
        """End of the arena: data segments first, the control segment last."""
        with self.lock:
            for number in sorted(self._made, reverse=True):
                self._unlink(number)
            names.unlink(self.name(names.CONTROL))

    def full(self, action: str, nbytes: int, waited: float) -> ArenaFullError:
        """The error that says how full the arena is and what to do."""
        stats = self.owner.stats()
        if nbytes > self.max_bytes:
            advice = "create the arena with a larger max_bytes"
        else:
            short = "max_blocks" if stats and stats["slots_used"] == stats["slots"] else "max_bytes"
            advice = f"release handles and leases sooner, wait with timeout=, or create the arena with a larger {short}"
        return ArenaFullError(
            errno.ENOSPC,
            f"{action} {format_bytes(nbytes)} in arena {self.name(0)[:-2]}: used {stats.get('used_bytes', 0)} of "
            f"{stats.get('reserved_bytes', 0)} reserved, max_bytes {self.max_bytes}, largest free "
            f"{stats.get('largest_free_bytes', 0)}, slots {stats.get('slots_used', 0)} of {stats.get('slots', 0)}"
            + (f", waited {waited:.3f} s" if waited else "")
            + f"; {advice}",
        )


def refused(action: str, nbytes: int, error: OSError) -> ArenaError:
    """The error for what the host did not give: room in /dev/shm, or something that a limit of the process forbids."""
    if error.errno == errno.ENOSPC:
        return host_full(action, nbytes)
    return names.failed(f"{action} {format_bytes(nbytes)}", error)


def host_full(action: str, nbytes: int) -> ArenaFullError:
    """The error for a /dev/shm without room."""
    free, total = names.room()
    return ArenaFullError(
        errno.ENOSPC,
        f"{action} {format_bytes(nbytes)}: {names.DIRECTORY} has {free} bytes free of {total}; enlarge it (Docker: "
        "--shm-size, Kubernetes: an emptyDir with medium Memory), remove what others left there, or ask for less "
        "(max_bytes, segment_bytes)",
    )
