"""What segments are called, and the only door to posix_ipc, which creates, opens and unlinks them.

``/shmcast.<namespace>.<arena id, 16 hex digits>.<n>``: number 0 is the control segment of an arena, 1, 2, ... are its
data segments. A name is never used twice; whoever opens one checks that it still means the same file.
"""

import errno
import functools
import os
import re
import stat
from typing import NamedTuple

import posix_ipc

from . import _native
from .errors import ArenaError

DIRECTORY = "/dev/shm"
NAMESPACE_VARIABLE = "SHMCAST_NAMESPACE"
PREFIX = "shmcast."
CONTROL = 0
MODES = (0o600, 0o660)
"""Permissions that a control segment may have."""

_STEPS = _native.STEPS
_CREATE, _OPEN, _UNLINK = _STEPS["NAME_CREATE"], _STEPS["NAME_OPEN"], _STEPS["NAME_UNLINK"]
_IS_CURRENT, _STATUS, _LIST = _STEPS["NAME_IS_CURRENT"], _STEPS["NAME_SIZE"], _STEPS["NAME_LIST"]

_NAMESPACE = re.compile(r"[A-Za-z0-9_-]{1,32}", re.ASCII)
_FILE = re.compile(r"shmcast\.([A-Za-z0-9_-]{1,32})\.([0-9a-f]{16})\.(0|[1-9][0-9]{0,9})", re.ASCII)


class Found(NamedTuple):
    """A segment that exists: whose it is and which one."""

    namespace: str
    arena: int
    number: int


def check_namespace(namespace: str) -> str:
    """The same text, or ValueError where it can not be part of a name."""
    if not isinstance(namespace, str) or not _NAMESPACE.fullmatch(namespace):
        raise ValueError(f"namespace {namespace!r}: 1 to 32 of the characters A-Z a-z 0-9 _ - are allowed")
    return namespace


def default_namespace() -> str:
    """SHMCAST_NAMESPACE, or the user id where that is not set."""
    given = os.environ.get(NAMESPACE_VARIABLE)
    if not given:
        return str(os.getuid())
    try:
        return check_namespace(given)
    except ValueError as error:
        raise ValueError(f"{NAMESPACE_VARIABLE}: {error}") from None


def segment_name(namespace: str, arena: int, number: int) -> str:
    """Name of a segment as POSIX wants it, with the leading slash."""
    return f"/shmcast.{namespace}.{arena:016x}.{number}"


def check_mode(mode: int) -> int:
    """The same permissions, or ValueError where segments can not have them."""
    if mode not in MODES:
        raise ValueError(
            f"mode {mode:#o}: {' or '.join(f'{known:#o}' for known in MODES)} are possible; who is in no group with the "
            "owner can not be given a part"
        )
    return mode


def data_mode(mode: int) -> int:
    """Permissions of data segments where those of the control segment are ``mode``: only the owner writes there."""
    return mode & ~0o020


def create(name: str, mode: int = 0o600) -> int:
    """Create an empty segment that did not exist and return its descriptor. FileExistsError, OSError."""
    fd = _open(name, posix_ipc.O_CREX, read_only=False)
    try:
        os.fchmod(fd, mode)  # what the umask has no say in
    except BaseException:
        os.close(fd)
        unlink(name)
        raise
    return fd


def open_writable(name: str, *, anybodys: bool = False) -> int:
    """Open a segment for reading and writing. FileNotFoundError, PermissionError, ArenaError (not a regular file, or of
    a user whom this process shares no group with). ``anybodys``: whoever owns it; for tools that root runs."""
    return _checked(name, _open(name, 0, read_only=False), anybodys)


def open_readable(name: str, *, anybodys: bool = False) -> int:
    """Open a segment for reading. Raises as `open_writable` does."""
    return _checked(name, _open(name, 0, read_only=True), anybodys)


def unlink(name: str) -> bool:
    """Take a name away; False where it was gone already. Mappings of the segment stay what they are."""
    _native.step(_UNLINK)
    try:
        posix_ipc.unlink_shared_memory(name)
    except posix_ipc.ExistentialError:
        return False
    except posix_ipc.PermissionsError:
        raise PermissionError(errno.EACCES, f"unlink segment: {_why_not(name)}", name) from None
    return True


def _why_not(name: str) -> str:
    """Why a name can not be taken away."""
    found = os.lstat(DIRECTORY + name) if os.path.lexists(DIRECTORY + name) else None
    if found is not None and found.st_uid not in (os.geteuid(), 0):
        return f"it belongs to uid {found.st_uid}, this process runs as uid {os.geteuid()}"
    return f"{DIRECTORY} is not to be written, or the file is immutable (lsattr, chattr -i)"


def is_current(name: str, fd: int) -> bool:
    """Whether the name still means the file behind ``fd``, and not nothing or a later file of that name."""
    _native.step(_IS_CURRENT)
    try:
        now = os.stat(DIRECTORY + name, follow_symlinks=False)
    except FileNotFoundError:
        return False
    mine = os.fstat(fd)
    return (now.st_dev, now.st_ino) == (mine.st_dev, mine.st_ino)


def exists(name: str) -> bool:
    """Whether there is a file of that name."""
    return os.path.lexists(DIRECTORY + name)


def status(name: str) -> os.stat_result | None:
    """What the name itself is, not what a link points to; None where it means nothing."""
    _native.step(_STATUS)
    try:
        return os.stat(DIRECTORY + name, follow_symlinks=False)
    except FileNotFoundError:
        return None


def listing(namespace: str | None = None) -> list[Found]:
    """The segments that exist now, of one namespace or of all, in no order."""
    _native.step(_LIST)
    try:
        files = os.listdir(DIRECTORY)
    except FileNotFoundError:
        return []
    prefix = PREFIX if namespace is None else f"{PREFIX}{namespace}."
    found = (_FILE.fullmatch(file) for file in files if file.startswith(prefix))
    return [Found(match[1], int(match[2], 16), int(match[3])) for match in found if match]


def parse(file: str) -> Found | None:
    """What a name in /dev/shm says, None where it is no segment's."""
    match = _FILE.fullmatch(file)
    return Found(match[1], int(match[2], 16), int(match[3])) if match else None


def strangers() -> list[str]:
    """Names in /dev/shm that begin as ours do and are none of ours."""
    try:
        files = os.listdir(DIRECTORY)
    except FileNotFoundError:
        return []
    return [file for file in files if file.startswith(PREFIX) and not _FILE.fullmatch(file)]


def room() -> tuple[int, int]:
    """``(free, total)`` bytes of /dev/shm; both 0 where it can not be asked."""
    try:
        system = os.statvfs(DIRECTORY)
    except OSError:
        return 0, 0
    return system.f_bavail * system.f_frsize, system.f_blocks * system.f_frsize


def failed(action: str, error: OSError) -> ArenaError:
    """The error for what the system has refused for a reason that is not ours to know: what was tried, and what to do."""
    advice = _ADVICE.get(error.errno or 0, "")
    return ArenaError(error.errno, f"{action}: {error.strerror or error}{advice}")


_ADVICE = {
    errno.EMFILE: "; raise the limit of open files of this process (ulimit -n), or close some",
    errno.ENFILE: "; raise the limit of open files of this host (sysctl fs.file-max)",
    errno.ENOMEM: "; raise the limit of address space of this process (ulimit -v), or free memory on this host "
    "(sysctl vm.overcommit_memory says whether promises count)",
    errno.EFBIG: "; raise the limit of file length of this process (ulimit -f)",
}


@functools.cache
def host_id() -> int:
    """64 bits that name this boot of this host, the same in all its containers: handles of another one are refused."""
    with open("/proc/sys/kernel/random/boot_id", "rb") as file:
        return _native.hash128(file.read().strip()) & (1 << 64) - 1


def _open(name: str, flags: int, *, read_only: bool) -> int:
    _native.step(_CREATE if flags else _OPEN)
    try:
        # O_NONBLOCK: in a directory where anybody chooses names, a fifo or a lease must not make us wait
        fd: int = posix_ipc.SharedMemory(name, flags | os.O_NONBLOCK, mode=0o600, size=0, read_only=read_only).fd
    except posix_ipc.ExistentialError:
        if flags:
            raise FileExistsError(errno.EEXIST, "create segment", name) from None
        raise FileNotFoundError(errno.ENOENT, "open segment", name) from None
    except posix_ipc.PermissionsError:
        raise PermissionError(errno.EACCES, "open segment: it belongs to another user", name) from None
    except ValueError:
        raise ArenaError(
            errno.EINVAL, f"open segment {name}: it is a directory, or something else that is no file"
        ) from None
    except OSError as error:
        if error.errno is None:  # posix_ipc has words of its own for these two
            number = errno.ENFILE if "system" in str(error) else errno.EMFILE
            raise OSError(number, os.strerror(number), name) from None
        if error.errno == errno.EAGAIN:
            raise ArenaError(
                error.errno, f"open segment {name}: somebody has a lease on it, as none of us takes"
            ) from None
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR, errno.EINVAL):
            raise ArenaError(error.errno, f"open segment {name}: it is no regular file: {error.strerror}") from None
        raise
    return fd


def _checked(name: str, fd: int, anybodys: bool) -> int:
    file = os.fstat(fd)
    if not stat.S_ISREG(file.st_mode):
        os.close(fd)
        raise ArenaError(errno.EINVAL, f"open segment {name}: mode {file.st_mode:#o} is not that of a regular file")
    # root may open everything, and a world-writable directory lets anybody choose names: what opens is not yet a friend's
    if not anybodys and file.st_uid not in (os.geteuid(), 0) and not _is_for_our_group(file):
        os.close(fd)
        raise ArenaError(
            errno.EACCES,
            f"open segment {name}: it belongs to uid {file.st_uid} (mode {file.st_mode & 0o777:#o}, gid {file.st_gid}), this "
            f"process runs as uid {os.geteuid()}; run both as one user, or share a group and create the arena with mode=0o660",
        )
    return fd


def _is_for_our_group(file: os.stat_result) -> bool:
    return file.st_mode & 0o040 != 0 and file.st_gid in (os.getegid(), *os.getgroups())
