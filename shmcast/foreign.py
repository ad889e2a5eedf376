"""What others have left in /dev/shm: `scan` says who still uses it, `remove` takes away what provably nobody uses.

Others have no lock that tells the living from the dead, so two witnesses are asked. /proc says who has a file mapped or
open: names are listed first, users afterwards, so that what was made after the listing is not in it. It is walked once a
scan, however many files there are, and tells people who uses what; what it shows in use stays. It misses whoever comes
after the walk, descriptors on their way through a socket or in a table of a thread's own, and other pid namespaces.

What it misses, the kernel knows. It grants a write lease on a file (fcntl F_SETLEASE) only while no other open file
description of it exists on the host, be it behind a descriptor, a mapping, a message in a socket, or in a pid namespace
that we can not see. `remove` asks for one on each file, and for nothing else: if the file is still the one of the scan,
and untouched, it is unlinked while the lease is held, so that nobody has opened it in between either. Only a descriptor
made with O_PATH is no open file to the kernel; whoever has one reaches the file without its name.

Neither can see a *name* that somebody is about to open: SGLang creates a segment, closes it, and sends the name. Files
are left alone until nobody has created, resized or written them by a system call for ``min_age_s``.

Nothing is removed from a pid namespace other than the initial one, as /dev/shm may be shared with processes outside of it
(`docker run --ipc=host`, a pod's memory volume), and nothing that can be seen from inside says whether it is. Run it on
the host, or with `--pid=host`; where you know that all who use the mount are in this pid namespace (a container with a
/dev/shm of its own), ``sole_pid_namespace=True`` says so.
"""

import errno
import fcntl
import fnmatch
import os
import signal
import stat
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

from . import names, procfs

DEFAULT_PATTERNS = ("sgl_shm_*", "psm_*", "torch_*", "sem.loky-*", "sem.mp-*")
"""SGLang; Python's `multiprocessing.shared_memory`; torch's file_system sharing; semaphores of loky and multiprocessing.
Not all of ``sem.*``: a named semaphore may be meant to outlive its users."""

MIN_AGE_S = 600.0
"""How long nobody must have touched a file: a request that waits in a queue has segments that nobody has open."""

_OURS = "shmcast."
_LISTING_ATTEMPTS = 16
_CAP_FOWNER, _CAP_SYS_PTRACE, _CAP_LEASE = 3, 19, 28
# From all but the members of a group, and from all who may not trace; with hidepid=1 processes are there and can be counted.
_HIDING, _HIDING_FROM_ALL = ("hidepid=2", "hidepid=invisible"), ("hidepid=4", "hidepid=ptraceable")

Identity = tuple[int, ...]
"""(device, inode): which file; then all that changes when somebody touches it."""


class User(NamedTuple):
    """A process that uses a file."""

    pid: int
    command: str
    how: str
    """"maps", "opens" or "maps and opens"."""


@dataclass(frozen=True)
class Terms:
    """On which a scan judges."""

    min_age_s: float = MIN_AGE_S
    sole_pid_namespace: bool = False


@dataclass(frozen=True)
class Leftover:
    """A file of somebody else's in /dev/shm."""

    name: str
    """As in /dev/shm."""
    nbytes: int
    """Its length."""
    age_s: float
    """Since it was last created, resized, or written by a system call. What is written through a mapping leaves no trace."""
    uid: int
    users: tuple[User, ...]
    removable: bool
    reason: str
    """Why it stays, or may go."""
    identity: Identity = ()


@dataclass(frozen=True)
class Census:
    """What a scan has found, by name."""

    leftovers: tuple[Leftover, ...]
    complete: bool
    """Whether every process that may use the files could be looked at."""
    why: str
    """Why not; empty where it is complete."""


class _Users(NamedTuple):
    of: dict[tuple[int, int], dict[int, str]]
    """``{(device, inode): {pid: how}}``"""
    unreadable: int
    """Processes that could not be looked at."""
    complete: bool = True
    """Whether processes did not start faster than they were looked at."""


def scan(
    patterns: Iterable[str] = DEFAULT_PATTERNS, *, min_age_s: float = MIN_AGE_S, sole_pid_namespace: bool = False
) -> Census:
    """Every file in /dev/shm whose name matches one of the globs, ours (``shmcast.*``) never. Changes nothing.

    ``min_age_s``, ``sole_pid_namespace``: see the top of this module. OSError where /proc is not there."""
    return _scan(_listing(tuple(patterns)), Terms(min_age_s, sole_pid_namespace))


def remove(leftover: Leftover) -> bool:
    """Unlink the file if it is still the one that was seen, untouched, and the kernel says that nobody has it open.

    False for what is not ``removable``, and where it is gone already. OSError that says why where it stays: it was
    touched or replaced since the scan, somebody has it open, or the system refuses. Looks at no process: see the top."""
    if not leftover.removable:
        return False
    path = _path(leftover.name)
    try:
        # O_NONBLOCK: whatever lies there by now, a fifo for example, must not make us wait
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError as error:
        _stays(leftover, error, "it can not be opened")
    try:
        if _identity(os.fstat(fd)) != leftover.identity:
            _stays(leftover, errno.EBUSY, "it was touched, or replaced by another file, since it was looked at")
        return _unlink_leased(leftover, path, fd)
    finally:
        os.close(fd)  # ends the lease


def _unlink_leased(leftover: Leftover, path: str, fd: int) -> bool:
    try:
        # Who opens a leased file makes the kernel tell us, by SIGIO, which ends a process that does not expect it.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except BlockingIOError:
        _stays(leftover, errno.EBUSY, "somebody has it open or maps it")
    except OSError as error:
        _stays(leftover, error, "the kernel does not say whether anybody has it open")
    if fcntl.fcntl(fd, fcntl.F_GETLEASE) != fcntl.F_WRLCK:
        _stays(leftover, errno.EBUSY, "somebody waits to open it")
    try:
        there, mine = os.lstat(path), os.fstat(fd)
        if (there.st_dev, there.st_ino) != (mine.st_dev, mine.st_ino):
            _stays(leftover, errno.EBUSY, "another file has its name by now")
    except FileNotFoundError:
        return False
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        _stays(leftover, error, "it can not be unlinked")
    return True


def _stays(leftover: Leftover, error: OSError | int, why: str) -> NoReturn:
    """Raise what says why the file is still there."""
    if isinstance(error, int):
        raise OSError(error, f"not removed: {why}", leftover.name)
    raise OSError(error.errno, f"not removed: {why}: {error.strerror}", leftover.name) from None


# ---- names


def _listing(patterns: tuple[str, ...]) -> list[str]:
    try:
        files = os.listdir(names.DIRECTORY)
    except FileNotFoundError:
        return []
    return sorted(file for file in files if any(fnmatch.fnmatchcase(file, pattern) for pattern in patterns))


def _path(name: str) -> str:
    return f"{names.DIRECTORY}/{name}"


def _identity(file: os.stat_result) -> Identity:
    return file.st_dev, file.st_ino, file.st_mode, file.st_uid, file.st_size, file.st_mtime_ns, file.st_ctime_ns


def _age_s(file: os.stat_result) -> float:
    return max(time.time() - max(file.st_mtime, file.st_ctime), 0.0)


def _scan(listed: list[str], terms: Terms) -> Census:
    files: dict[str, os.stat_result] = {}
    for name in listed:
        try:
            if not name.startswith(_OURS):
                files[name] = os.lstat(_path(name))
        except FileNotFoundError:
            continue
    try:
        device = os.stat(names.DIRECTORY).st_dev
    except FileNotFoundError:
        return Census((), True, "")
    users = _users({(file.st_dev, file.st_ino) for file in files.values()})
    blind = _why_blind(device, terms)
    unseen = _why_unseen(users)
    return Census(
        tuple(_judge(name, file, users, device, blind, terms) for name, file in files.items()),
        not blind and not unseen,
        "; ".join(why for why in (blind, unseen) if why),
    )


def _judge(name: str, file: os.stat_result, users: _Users, device: int, blind: str, terms: Terms) -> Leftover:
    found = users.of.get((file.st_dev, file.st_ino), {})
    using = tuple(User(pid, procfs.command(pid), how) for pid, how in sorted(found.items()))
    age_s = _age_s(file)
    reason = _why_it_stays(file, using, age_s, device, blind, terms) or _why_not_ours(name, file)
    return Leftover(
        name=name,
        nbytes=file.st_size,
        age_s=age_s,
        uid=file.st_uid,
        users=using,
        removable=not reason,
        reason=reason or _why_it_may_go(users.unreadable),
        identity=_identity(file),
    )


def _why_it_stays(
    file: os.stat_result, using: tuple[User, ...], age_s: float, device: int, blind: str, terms: Terms
) -> str:
    if not stat.S_ISREG(file.st_mode):
        return f"it is a {_kind(file.st_mode)}, not a segment"
    if file.st_dev != device:
        return "something else is mounted there"
    if file.st_nlink > 1:
        return f"it has {file.st_nlink} names; remove the others first"
    if using:
        return f"used by {_processes(len(using))}"
    if blind:
        return blind
    if age_s < terms.min_age_s:
        return f"{age_s:.0f} s old, may be about to be opened by name; left alone until {terms.min_age_s:.0f} s"
    return ""


def _why_not_ours(name: str, file: os.stat_result) -> str:
    """Why this process may not lease or unlink it, or empty. The kernel counts capabilities for that only on the host."""
    uid = os.geteuid()
    at_home = procfs.in_initial_user_namespace()
    if not at_home and file.st_uid == procfs.nobody():
        return (
            "it belongs to a user whom this user namespace does not know; run as that user, or as root, outside of it"
        )
    if file.st_uid != uid and not (at_home and procfs.capable(_CAP_LEASE) and procfs.capable(_CAP_FOWNER)):
        root = "as root with CAP_LEASE and CAP_FOWNER" if at_home else "as root outside of this user namespace"
        return f"it belongs to uid {file.st_uid}, this is uid {uid}; run as that user, or {root}"
    if not os.path.lexists(_path(name)):
        return "it is gone meanwhile"
    if not os.access(_path(name), os.R_OK, effective_ids=True):
        return (
            f"it can not be opened for reading (mode {file.st_mode & 0o7777:04o}), so that the kernel can not be asked"
        )
    if not os.access(names.DIRECTORY, os.W_OK | os.X_OK, effective_ids=True):
        return f"{names.DIRECTORY} can not be written"
    return ""


def _why_it_may_go(unreadable: int) -> str:
    if not unreadable:
        return "no process is seen to use it; the kernel is asked when it is removed"
    return (
        f"no process that can be looked at uses it; for the other {unreadable} the kernel is asked when it is removed"
    )


def _processes(number: int) -> str:
    return f"{number} process{'' if number == 1 else 'es'}"


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "directory"
    return "symbolic link" if stat.S_ISLNK(mode) else "special file"


# ---- users


def _why_blind(device: int, terms: Terms) -> str:
    """Why nothing can be proven from here, or empty."""
    if not any(mount.device == device and mount.kind == "tmpfs" for mount in procfs.mounts()):
        return f"{names.DIRECTORY} is not a tmpfs, so that users of its files can not be told from others"
    if terms.sole_pid_namespace or procfs.in_initial_pid_namespace():
        return ""
    return (
        f"this pid namespace can not see every process that may use {names.DIRECTORY}; run it on the host (docker run "
        "--pid=host --ipc=host), or with --sole-pid-namespace where nobody outside shares this /dev/shm"
    )


def _why_unseen(users: _Users) -> str:
    """Why some process may not have been looked at, and what to do; or empty."""
    if not _sees_everybody() and _hidden():
        return f"/proc is mounted with hidepid: processes of other users are not shown; {_advice()}"
    if users.unreadable:
        return f"{_processes(users.unreadable)} could not be looked at (no permission); {_advice()}"
    return "" if users.complete else "processes start faster than they can be looked at"


def _sees_everybody() -> bool:
    return procfs.in_initial_user_namespace() and procfs.capable(_CAP_SYS_PTRACE)


def _hidden() -> bool:
    """Whether /proc leaves out processes of others."""
    options = next((mount.options for mount in reversed(procfs.mounts()) if mount.point == procfs.PROC), ())
    shown = any(f"gid={group}" in options for group in (os.getegid(), *os.getgroups()))
    return any(option in _HIDING_FROM_ALL or (option in _HIDING and not shown) for option in options)


def _advice() -> str:
    if not procfs.in_initial_user_namespace():
        return "run as root outside of this user namespace"
    if os.geteuid() != 0:
        return "run as root"
    if not procfs.capable(_CAP_SYS_PTRACE):
        return "this root has no CAP_SYS_PTRACE (docker run --cap-add SYS_PTRACE)"
    return "this is root with CAP_SYS_PTRACE: something else forbids it, such as a security module or a sandbox"


def _users(files: set[tuple[int, int]]) -> _Users:
    """Who has one of these files mapped or open. A process that was started while we looked is looked at, too."""
    of: dict[tuple[int, int], dict[int, str]] = {}
    unreadable = 0
    if not files:
        return _Users(of, 0)
    seen: set[int] = set()
    for _ in range(_LISTING_ATTEMPTS):
        new = [pid for pid in procfs.pids() if pid not in seen]
        if not new:
            return _Users(of, unreadable)
        seen.update(new)
        for pid in new:
            mapped, opened, readable = _used_by(pid, files)
            unreadable += not readable
            for file in mapped | opened:
                how = "maps and opens" if file in mapped & opened else "maps" if file in mapped else "opens"
                of.setdefault(file, {})[pid] = how
    return _Users(of, unreadable, complete=False)


def _used_by(pid: int, files: set[tuple[int, int]]) -> tuple[set[tuple[int, int]], set[tuple[int, int]], bool]:
    """Which of the files a process maps and opens, and whether it could be asked; one that has ended does neither.

    Asked where it can be seen, then once more: its main thread, or the last that was seen, may have ended meanwhile."""
    mapped: set[tuple[int, int]] = set()
    opened: set[tuple[int, int]] = set()
    readable = True
    looked: set[str] = set()
    try:
        for _ in range(_LISTING_ATTEMPTS):
            new = [folder for folder in procfs.folders(pid) if folder not in looked]
            if not new:
                break
            looked.update(new)
            for folder in new:
                more_mapped, may_read_maps = _mapped(folder, files)
                more_opened, may_read_files = _opened(f"{folder}/fd", files)
                mapped |= more_mapped
                opened |= more_opened
                readable = readable and may_read_maps and may_read_files
    except PermissionError:
        readable = False
    return mapped, opened, readable


def _mapped(folder: str, files: set[tuple[int, int]]) -> tuple[set[tuple[int, int]], bool]:
    """Which of the files a process or thread maps, and whether it could be asked; one that has ended maps none."""
    try:
        with open(f"{folder}/maps", "rb") as file:
            text = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return set(), True
    except OSError:
        return set(), False
    found = set()
    for device in {device for device, _ in files}:
        token = b" %02x:%02x " % (os.major(device), os.minor(device))
        for line in text.splitlines() if token in text else ():
            fields = line.split(None, 5)
            if fields[3] == token.strip() and (device, int(fields[4])) in files:
                found.add((device, int(fields[4])))
    return found, True


def _opened(folder: str, files: set[tuple[int, int]]) -> tuple[set[tuple[int, int]], bool]:
    """Which of the files a process or thread has descriptors of, and whether it could be asked."""
    found = set()
    try:
        for number in os.listdir(folder):
            try:
                if os.readlink(f"{folder}/{number}")[:1] == "/":  # sockets, pipes and the like are no files
                    file = os.stat(f"{folder}/{number}")
                    found.add((file.st_dev, file.st_ino))
            except (FileNotFoundError, ProcessLookupError):
                continue  # closed meanwhile
    except (FileNotFoundError, ProcessLookupError):
        return set(), True
    except OSError:
        return found & files, False
    return found & files, True
