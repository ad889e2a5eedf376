"""What others have left in /dev/shm: `scan` says who still uses it, `remove` takes away what provably nobody uses.

Others have no lock that tells the living from the dead, so two witnesses are asked. /proc says who has a file mapped or
open: names are listed first, users afterwards, so that what was made after the listing is not in it. And the kernel says
whether anybody has: it grants a write lease on a file (fcntl F_SETLEASE) only while no other open file description of it
exists on the host, be it behind a descriptor, a mapping, a message in a socket, or in a pid namespace that we can not
see. `remove` unlinks while it holds that lease, so nobody has opened the file in between either.

Neither can see a *name* that somebody is about to open: SGLang creates a segment, closes it, and sends the name. Files
are left alone until nobody has created, resized or written them by a system call for ``min_age_s``.

Nothing is removed from a pid namespace other than the initial one, as /dev/shm may be shared with processes outside of it
(`docker run --ipc=host`, a pod's memory volume), and nothing that can be seen from inside says whether it is. Run it on
the host, or with `--pid=host`; where you know that all who use the mount are in this pid namespace (a container with a
/dev/shm of its own), ``sole_pid_namespace=True`` says so.
"""

import fcntl
import fnmatch
import os
import signal
import stat
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from . import names, procfs

DEFAULT_PATTERNS = ("sgl_shm_*", "psm_*", "torch_*", "sem.loky-*", "sem.mp-*")
"""SGLang; Python's `multiprocessing.shared_memory`; torch's file_system sharing; semaphores of loky and multiprocessing.
Not all of ``sem.*``: a named semaphore may be meant to outlive its users."""

MIN_AGE_S = 600.0
"""How long nobody must have touched a file: a request that waits in a queue has segments that nobody has open."""

_OURS = "shmcast."
_LISTING_ATTEMPTS = 16
_CAP_FOWNER, _CAP_LEASE = 3, 28
_HIDING = ("hidepid=1", "hidepid=2", "hidepid=4", "hidepid=noaccess", "hidepid=invisible", "hidepid=ptraceable")

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
    terms: Terms = Terms()


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


def scan(
    patterns: Iterable[str] = DEFAULT_PATTERNS, *, min_age_s: float = MIN_AGE_S, sole_pid_namespace: bool = False
) -> Census:
    """Every file in /dev/shm whose name matches one of the globs, ours (``shmcast.*``) never. Changes nothing.

    ``min_age_s``, ``sole_pid_namespace``: see the top of this module. OSError where /proc is not there."""
    return _scan(_listing(tuple(patterns)), Terms(min_age_s, sole_pid_namespace))


def remove(leftover: Leftover) -> bool:
    """Look once more, on the same terms, and unlink the file if nobody uses it; False where it stays.

    What is not ``removable`` stays. A later file of that name stays, as does one that was touched since the scan."""
    if not leftover.removable:
        return False
    now = _scan([leftover.name], leftover.terms).leftovers
    if not now or not now[0].removable:
        return False
    path = _path(leftover.name)
    try:
        # O_NONBLOCK: whatever lies there by now, a fifo for example, must not make us wait
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return _identity(os.fstat(fd)) == leftover.identity and _unlink_leased(path, fd)
    finally:
        os.close(fd)  # ends the lease


def _unlink_leased(path: str, fd: int) -> bool:
    try:
        # Who opens a leased file makes the kernel tell us, by SIGIO, which ends a process that does not expect it.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        if fcntl.fcntl(fd, fcntl.F_GETLEASE) != fcntl.F_WRLCK:
            return False  # somebody waits to open it
        there, mine = os.lstat(path), os.fstat(fd)
        if (there.st_dev, there.st_ino) != (mine.st_dev, mine.st_ino):
            return False
        os.unlink(path)
    except OSError:
        return False  # EAGAIN: somebody has it open; or nobody says that nobody has
    return True


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
    unseen = _why_unseen(users.unreadable)
    return Census(
        tuple(_judge(name, file, users, device, blind, terms) for name, file in files.items()),
        not blind and not unseen,
        "; ".join(why for why in (blind, unseen) if why),
    )


def _judge(name: str, file: os.stat_result, users: _Users, device: int, blind: str, terms: Terms) -> Leftover:
    found = users.of.get((file.st_dev, file.st_ino), {})
    using = tuple(User(pid, procfs.command(pid), how) for pid, how in sorted(found.items()))
    age_s = _age_s(file)
    reason = _why_it_stays(file, using, age_s, device, blind, terms)
    return Leftover(
        name=name,
        nbytes=file.st_size,
        age_s=age_s,
        uid=file.st_uid,
        users=using,
        removable=not reason,
        reason=reason or _why_it_may_go(users.unreadable),
        identity=_identity(file),
        terms=terms,
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
        return f"used by {len(using)} process{'es' if len(using) > 1 else ''}"
    if blind:
        return blind
    if age_s < terms.min_age_s:
        return f"{age_s:.0f} s old, may be about to be opened by name; left alone until {terms.min_age_s:.0f} s"
    uid = os.geteuid()
    if file.st_uid != uid and not (procfs.capable(_CAP_LEASE) and procfs.capable(_CAP_FOWNER)):
        return f"it belongs to uid {file.st_uid}, this is uid {uid}; run as that user, or as root with CAP_LEASE"
    return ""


def _why_it_may_go(unreadable: int) -> str:
    if not unreadable:
        return "no process uses it"
    return (
        f"no process that can be looked at uses it; for the other {unreadable} the kernel is asked when it is removed"
    )


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


def _why_unseen(unreadable: int) -> str:
    if os.geteuid() != 0 and any(
        option in _HIDING for mount in procfs.mounts() if mount.kind == "proc" for option in mount.options
    ):
        return "/proc is mounted with hidepid: processes of other users are not shown; run as root"
    if unreadable:
        return f"{unreadable} processes of others could not be looked at (no permission); run as root"
    return ""


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
            break
        seen.update(new)
        for pid in new:
            if procfs.is_kernel_thread(pid):
                continue
            mapped, may_read_maps = _mapped(pid, files)
            opened, may_read_files = _opened(pid, files)
            unreadable += not (may_read_maps and may_read_files)
            for file in mapped | opened:
                how = "maps and opens" if file in mapped & opened else "maps" if file in mapped else "opens"
                of.setdefault(file, {})[pid] = how
    return _Users(of, unreadable)


def _mapped(pid: int, files: set[tuple[int, int]]) -> tuple[set[tuple[int, int]], bool]:
    """Which of the files a process maps, and whether it could be asked; one that has ended maps none."""
    try:
        with open(f"{procfs.PROC}/{pid}/maps", "rb") as file:
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


def _opened(pid: int, files: set[tuple[int, int]]) -> tuple[set[tuple[int, int]], bool]:
    """Which of the files a process has descriptors of, and whether it could be asked."""
    folder = f"{procfs.PROC}/{pid}/fd"
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
