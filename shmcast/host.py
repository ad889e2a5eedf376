"""This host as `doctor` judges it: /dev/shm, memory, limits, what the kernel can do, and what lies about."""

import ctypes
import fcntl
import functools
import mmap
import os
import platform
import re
import resource
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from . import _native, foreign, looks, names, procfs
from .sizes import MAX_BYTES_VARIABLE


class System(NamedTuple):
    """A host as `read` finds it. Bytes; None, and 0 of memory: there is no such thing, or it can not be asked."""

    shm_kind: str | None = "tmpfs"
    shm_options: tuple[str, ...] = ("rw",)
    shm_trouble: str = ""
    """Why it can not be read or written."""
    shm_total: int = 32 << 30
    """0: it has no limit of its own."""
    shm_free: int = 32 << 30
    memory_total: int = 64 << 30
    memory_available: int = 60 << 30
    cgroup_limit: int | None = None
    cgroup_used: int = 0
    overcommit: int = 0
    commit_free: int = 1 << 60
    """CommitLimit less Committed_AS; counts where overcommit is 2."""
    shmem_huge: str | None = "never"
    remove_ipc: bool | None = None
    """None: no logind runs here."""
    uid: int = 0
    lingers: bool = False
    namespace: str = ""
    """In which an engine that is started from here creates its arenas."""
    variables: dict[str, str] = {}  # noqa: RUF012
    """Of those that shmcast reads while it works, those that are set."""
    limits: dict[str, int | None] = {}  # noqa: RUF012
    """Soft limits by name: "nofile", "as", "memlock"; None: unlimited."""
    features: dict[str, bool] = {}  # noqa: RUF012
    hash_paths: tuple[str, ...] = ("portable", "avx2")
    hash_asked: str | None = None
    arenas: tuple[looks.Seen, ...] = ()
    census: foreign.Census = foreign.Census((), True, "")


def read(root: str = "/") -> System:
    """This host, now. ``root``: where /etc, /proc, /run, /sys and /usr are looked for."""
    base = Path(root)
    mount = _mount()
    free, total = names.room()
    trouble, arenas = _arenas()
    memory = _fields(base / "proc/meminfo")
    limit, used = cgroup(base)
    return System(
        shm_kind=None if mount is None else mount.kind,
        shm_options=() if mount is None else mount.options,
        shm_trouble=trouble,
        shm_total=total,
        shm_free=free,
        memory_total=memory.get("MemTotal", 0),
        memory_available=memory.get("MemAvailable", 0),
        cgroup_limit=limit,
        cgroup_used=used,
        overcommit=int(_text(base / "proc/sys/vm/overcommit_memory") or 0),
        commit_free=memory.get("CommitLimit", 1 << 60) - memory.get("Committed_AS", 0),
        shmem_huge=_chosen(_text(base / "sys/kernel/mm/transparent_hugepage/shmem_enabled")),
        remove_ipc=remove_ipc(base),
        uid=os.geteuid(),
        lingers=_lingers(base),
        namespace=os.environ.get(names.NAMESPACE_VARIABLE) or str(os.getuid()),
        variables={name: os.environ[name] for name in _VARIABLES if os.environ.get(name)},
        limits={name: _limit(number) for name, number in _LIMITS.items()},
        features=features(),
        hash_paths=tuple(_native.hash_paths()),
        hash_asked=os.environ.get("SHMCAST_HASH_PATH") or None,
        arenas=arenas,
        census=_census(),
    )


_VARIABLES = (MAX_BYTES_VARIABLE, names.NAMESPACE_VARIABLE)


def _arenas() -> tuple[str, tuple[looks.Seen, ...]]:
    """Why /dev/shm can not be read or written, and what arenas there are."""
    try:
        found = tuple(looks.survey())
    except OSError as error:
        return f"it can not be read: {error.strerror}", ()
    writable = os.access(names.DIRECTORY, os.W_OK | os.X_OK, effective_ids=True)
    return "" if writable else f"uid {os.geteuid()} may not write there", found


def _census() -> foreign.Census:
    try:
        return foreign.scan()
    except OSError as error:
        return foreign.Census((), False, f"they can not be looked at: {error}")


_LIMITS = {"nofile": resource.RLIMIT_NOFILE, "as": resource.RLIMIT_AS, "memlock": resource.RLIMIT_MEMLOCK}


def _limit(number: int) -> int | None:
    soft, _ = resource.getrlimit(number)
    return None if soft == resource.RLIM_INFINITY else soft


def _mount() -> procfs.Mount | None:
    try:
        device = os.stat(names.DIRECTORY).st_dev
    except FileNotFoundError:
        return None
    found = [mount for mount in procfs.mounts() if mount.device == device]
    there = [mount for mount in found if mount.point == names.DIRECTORY]
    return (there or found or [procfs.Mount(device, "", "directory on a disk", ())])[-1]


def cgroup(base: Path) -> tuple[int | None, int]:
    """``(limit, used)`` in bytes of the tightest memory cgroup around this process; no limit where there is none. What the
    kernel gives up before it kills, pages of files that nobody has read lately, is not used."""
    tightest: tuple[int | None, int] = None, 0
    for line in _text(base / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory") and "memory" not in controllers.split(","):
            continue
        root = base / "sys/fs/cgroup" / ("memory" if controllers else "")
        files = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        idle = re.compile(r"^total_inactive_file (\d+)$" if controllers else r"^inactive_file (\d+)$", re.MULTILINE)
        here = root / path.lstrip("/")
        # In a container the path may be that on the host, which is not there: its own is then at the root.
        for folder in (here, *here.parents):
            limit, used = (_text(folder / name) for name in files)
            if limit.isdecimal() and int(limit) < 1 << 60:
                spare = idle.search(_text(folder / "memory.stat"))
                busy = max(int(used or 0) - (int(spare[1]) if spare else 0), 0)
                if tightest[0] is None or int(limit) - busy < tightest[0] - tightest[1]:
                    tightest = int(limit), busy
            if folder == root:
                break
    return tightest


def remove_ipc(base: Path) -> bool | None:
    """Whether logind removes segments of users who log out; None where it does not run. Its default is yes.

    Drop-ins come after the main file, in the order of their names wherever they lie, and the last word counts."""
    if not (base / "run/systemd/system").is_dir():
        return None
    folders = [base / folder / "systemd" for folder in ("usr/lib", "usr/local/lib", "run", "etc")]
    main = [folder / "logind.conf" for folder in reversed(folders) if (folder / "logind.conf").exists()][:1]
    drop_ins = {path.name: path for folder in folders for path in sorted(folder.glob("logind.conf.d/*.conf"))}
    word = True
    for path in (*main, *(drop_ins[name] for name in sorted(drop_ins))):
        for line in _text(path).splitlines():
            key, _, value = line.partition("=")
            if key.strip() == "RemoveIPC" and value.strip():
                word = value.strip().lower() in ("1", "yes", "y", "true", "t", "on")
    return word


def _lingers(base: Path) -> bool:
    import pwd

    try:
        return (base / "var/lib/systemd/linger" / pwd.getpwuid(os.geteuid()).pw_name).exists()
    except KeyError:
        return False


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _fields(path: Path) -> dict[str, int]:
    """The lines of /proc/meminfo, in bytes."""
    found = {}
    for line in _text(path).splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdecimal():
            found[name] = int(words[0]) << (10 if words[1:] == ["kB"] else 0)
    return found


def _chosen(text: str) -> str | None:
    """The bracketed one of some words, as sysfs has them."""
    return next((word[1:-1] for word in text.split() if word[0] == "["), None)


# ---- features of the kernel, by trying them


class _UntriedError(Exception):
    """What the attempt needs could not be had, which says nothing of the feature."""


def features() -> dict[str, bool]:
    """What the core asks of the kernel, and whether it is there; without what could not be tried."""
    attempts: dict[str, Callable[[], Any]] = {
        "OFD locks": _try_lock,
        "MADV_DONTFORK": functools.partial(_try_advice, 10),
        "MADV_WIPEONFORK": functools.partial(_try_advice, 18),
        "MADV_POPULATE_WRITE": functools.partial(_try_advice, 23),
        "futex": _try_futex,
        "PAGEMAP_SCAN": _try_scan,
        "write leases": _try_lease,
    }
    found = {name: _works(attempt) for name, attempt in attempts.items()}
    return {name: works for name, works in found.items() if works is not None}


def _works(attempt: Callable[[], Any]) -> bool | None:
    try:
        attempt()
    except _UntriedError:
        return None
    except OSError:
        return False
    return True


def _try_advice(number: int) -> None:
    with mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(number)


def _file() -> "tempfile._TemporaryFileWrapper[bytes]":
    try:
        return tempfile.NamedTemporaryFile(dir=names.DIRECTORY)
    except OSError as error:  # full, or not to be written
        raise _UntriedError from error


def _try_lock() -> None:
    lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0)
    with _file() as file:
        fcntl.fcntl(file, getattr(fcntl, "F_OFD_SETLK", 37), lock)


def _try_lease() -> None:
    with _file() as file:
        fd = os.open(file.name, os.O_RDONLY)
        file.file.close()
        try:
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        finally:
            os.close(fd)


def _try_futex() -> None:
    number = {"x86_64": 202, "aarch64": 98, "riscv64": 98}.get(platform.machine())
    if number is None:
        raise _UntriedError
    libc = ctypes.CDLL(None, use_errno=True)
    word = ctypes.c_uint32(0)
    if libc.syscall(ctypes.c_long(number), ctypes.byref(word), 1, 1, None, None, 0) < 0:
        raise OSError(ctypes.get_errno(), "futex")


def _try_scan() -> None:
    """PAGEMAP_SCAN of nothing: a kernel that knows it says 0, others ENOTTY."""
    request = bytearray(struct.pack("12Q", 96, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0))
    with open("/proc/self/pagemap", "rb") as file:
        fcntl.ioctl(file, 0xC0606610, request)
