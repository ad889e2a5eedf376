"""`shmcast doctor`: what is wrong with a host, why it matters, and the command that mends it.

`read` looks at the system once; `judge` is a function of what it has seen, one small check after the other.
"""

import ctypes
import fcntl
import functools
import mmap
import os
import platform
import resource
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from . import _native, foreign, looks, names, procfs
from .sizes import format_bytes

Level = Literal["ok", "warning", "fault"]
DOCKER_BYTES = 64 << 20
"""What Docker, and Kubernetes with it, give a container as /dev/shm where nobody says otherwise."""
_LAST_SYSTEM_UID = 999  # SYS_UID_MAX; logind spares the segments of users up to here, and of root
_NEEDED = ("OFD locks", "MADV_DONTFORK", "MADV_WIPEONFORK", "futex")


class Finding(NamedTuple):
    """One thing that was looked at."""

    level: Level
    check: str
    what: str
    why: str = ""
    """Why it matters; empty where it is as it should be."""
    mend: str = ""
    """The command, or the setting, that mends it."""


class System(NamedTuple):
    """A host as `read` finds it. Bytes; None: there is no such thing, or it can not be asked."""

    shm_kind: str | None = "tmpfs"
    shm_options: tuple[str, ...] = ("rw",)
    shm_total: int = 32 << 30
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
    limits: dict[str, int | None] = {}  # noqa: RUF012
    """Soft limits by name: "nofile", "as", "memlock"; None: unlimited."""
    features: dict[str, bool] = {}  # noqa: RUF012
    hash_paths: tuple[str, ...] = ("portable", "avx2")
    hash_asked: str | None = None
    arenas: tuple[looks.Seen, ...] = ()
    census: foreign.Census = foreign.Census((), True, "")


def status(findings: list[Finding]) -> int:
    """Exit status: 0 nothing to mend, 1 warnings, 2 faults."""
    levels = {finding.level for finding in findings}
    return 2 if "fault" in levels else 1 if "warning" in levels else 0


def judge(system: System, expect: int | None = None) -> list[Finding]:
    """What is to be said of a host; ``expect``: bytes of arenas that are to be created on it."""
    return [finding for check in CHECKS for finding in check(system, expect)]


# ---- checks


Findings = Iterator[Finding]


def check_mount(system: System, expect: int | None) -> Findings:
    """Is /dev/shm there, memory, and writable?"""
    if system.shm_kind is None:
        yield Finding("fault", "mount", f"{names.DIRECTORY} does not exist", "arenas are made there, and nowhere else",
                      f"mount -t tmpfs -o rw,nosuid,nodev,size=50% tmpfs {names.DIRECTORY}")  # fmt: skip
    elif system.shm_kind != "tmpfs":
        yield Finding("fault", "mount", f"{names.DIRECTORY} is a {system.shm_kind}, not a tmpfs",
                      "pages would be written to a disk, or not be shared between containers",
                      f"mount -t tmpfs -o rw,nosuid,nodev,size=50% tmpfs {names.DIRECTORY}")  # fmt: skip
    elif "ro" in system.shm_options:
        yield Finding("fault", "mount", f"{names.DIRECTORY} is mounted read-only", "no arena can be created",
                      f"mount -o remount,rw {names.DIRECTORY}")  # fmt: skip
    else:
        yield Finding("ok", "mount", f"{names.DIRECTORY} is a tmpfs ({','.join(system.shm_options)})")


_RESIZE = (
    "mount -o remount,size={size} /dev/shm; in Docker: docker run --shm-size={size}; in Kubernetes: an emptyDir with "
    "medium: Memory and sizeLimit: {size}, mounted at /dev/shm"
)


def check_size(system: System, expect: int | None) -> Findings:
    """Does what is configured fit?"""
    total, free = system.shm_total, system.shm_free
    room = f"{names.DIRECTORY} has {format_bytes(total)}, {format_bytes(free)} of them free"
    mend = _RESIZE.format(size=_power(max(expect or 0, 2 * _configured(system), 4 << 30)))
    why = "publishing fails with ArenaFullError once it is full; messages then carry the arrays"
    if expect is not None and total < expect:
        yield Finding("fault", "size", f"{room}; {format_bytes(expect)} are expected to fit", why, mend)
    elif expect is not None and free < expect:
        yield Finding("fault", "size", f"{room}; {format_bytes(expect)} are expected to be free", why,
                      "shmcast ls shows what is in use, shmcast-gc --once removes what is not; or " + mend)  # fmt: skip
    elif total <= DOCKER_BYTES:
        yield Finding("warning", "size", f"{room}: Docker's default, too little for a request or two", why, mend)
    elif total and free < total // 10:
        yield Finding("warning", "size", f"{room}: less than a tenth", why,
                      "shmcast ls shows what is in use, shmcast-gc --once removes what is not; or " + mend)  # fmt: skip
    else:
        yield Finding("ok", "size", room)


def check_growth(system: System, expect: int | None) -> Findings:
    """May the arenas that exist grow as far as they are allowed to?"""
    wanted = sum(max(arena["max_bytes"] - arena["reserved_bytes"], 0) for arena in _of_state(system, "live"))
    if wanted > system.shm_free:
        yield Finding(
            "warning", "growth",
            f"live arenas may still grow by {format_bytes(wanted)}, {format_bytes(system.shm_free)} are free",
            "the last of them to grow gets ArenaFullError, though it is within its max_bytes",
            "create arenas with a smaller max_bytes; or " + _RESIZE.format(size=_power(system.shm_total + wanted)),
        )  # fmt: skip


def check_memory(system: System, expect: int | None) -> Findings:
    """Is there memory behind the pages?"""
    if expect is not None and expect > system.memory_available:
        yield Finding(
            "warning", "memory",
            f"{format_bytes(expect)} are expected, {format_bytes(system.memory_available)} of memory are available",
            "pages of /dev/shm are memory: they are swapped, or the OOM killer ends somebody",
            "create arenas with a smaller max_bytes, or end what uses the memory",
        )  # fmt: skip
    if system.shm_total > system.memory_total:
        yield Finding(
            "warning", "memory",
            f"{names.DIRECTORY} may hold {format_bytes(system.shm_total)}, the host has {format_bytes(system.memory_total)}",
            "it lets more be reserved than there is; the OOM killer ends somebody instead of an ArenaFullError",
            f"mount -o remount,size=50% {names.DIRECTORY}",
        )  # fmt: skip


def check_cgroup(system: System, expect: int | None) -> Findings:
    """Pages of a tmpfs are charged to the memory cgroup of the process that touches them first."""
    limit = system.cgroup_limit
    if limit is None:
        yield Finding("ok", "cgroup", "no memory limit of a cgroup")
        return
    left = max(limit - system.cgroup_used, 0)
    room = f"the memory cgroup allows {format_bytes(limit)}, {format_bytes(left)} are left"
    wanted = expect or sum(max(arena["max_bytes"] - arena["reserved_bytes"], 0) for arena in _of_state(system, "live"))
    why = (
        "pages of /dev/shm count as memory of the container that publishes: at the limit the OOM killer ends it, and no "
        "exception says so"
    )
    mend = f"docker run --memory={_power(limit + wanted)} (Kubernetes: resources.limits.memory), or a smaller max_bytes"
    if wanted > left:
        level: Level = "fault" if expect else "warning"
        yield Finding(level, "cgroup", f"{room}; arenas may need {format_bytes(wanted)} more", why, mend)
    else:
        yield Finding("ok", "cgroup", room)


def check_remove_ipc(system: System, expect: int | None) -> Findings:
    """systemd-logind removes the segments of a user who logs out."""
    if not system.remove_ipc:
        yield Finding("ok", "RemoveIPC", "no logind here" if system.remove_ipc is None else "RemoveIPC=no")
    elif system.uid <= _LAST_SYSTEM_UID:
        yield Finding("ok", "RemoveIPC", f"RemoveIPC=yes, which spares system users such as uid {system.uid}")
    elif system.lingers:
        yield Finding("ok", "RemoveIPC", f"RemoveIPC=yes, but uid {system.uid} lingers")
    else:
        yield Finding(
            "fault", "RemoveIPC", f"RemoveIPC=yes in logind, and uid {system.uid} is no system user",
            "when the user's last session ends, systemd unlinks its files in /dev/shm under the engine that runs on: "
            "arenas can not be joined or grow any more",
            "loginctl enable-linger $USER; or RemoveIPC=no in /etc/systemd/logind.conf and systemctl restart "
            "systemd-logind; or run the engine as a system user",
        )  # fmt: skip


def check_overcommit(system: System, expect: int | None) -> Findings:
    """Strict overcommit counts copy-on-write mappings as if all of it were written."""
    wanted = expect or _configured(system)
    if system.overcommit != 2:
        yield Finding("ok", "overcommit", f"vm.overcommit_memory={system.overcommit}")
    else:
        short = system.commit_free < wanted
        yield Finding(
            "fault" if short else "warning", "overcommit",
            f"vm.overcommit_memory=2, {format_bytes(max(system.commit_free, 0))} may still be committed"
            + (f", arenas may need {format_bytes(wanted)} a process" if short else ""),
            "torch tensors are copy-on-write views: strict overcommit counts every byte of them in every process, as if "
            "it were written; mapping fails with ENOMEM",
            "sysctl vm.overcommit_memory=0; or raise vm.overcommit_ratio; or take arrays instead of tensors",
        )  # fmt: skip


def check_huge_pages(system: System, expect: int | None) -> Findings:
    """Huge pages of shared memory: more memory for the same bytes."""
    mounted = next((option for option in system.shm_options if option.startswith("huge=")), "huge=never")
    text = f"{names.DIRECTORY}: {mounted}; shmem_enabled: {system.shmem_huge or 'not there'}"
    if system.shmem_huge == "force" or (mounted == "huge=always" and system.shmem_huge != "deny"):
        yield Finding(
            "warning", "huge pages", text,
            "every segment takes whole huge pages (2 MiB), control segments too, so small arenas need more than they say",
            "mount -o remount,huge=within_size /dev/shm; echo never > /sys/kernel/mm/transparent_hugepage/shmem_enabled",
        )  # fmt: skip
    else:
        yield Finding("ok", "huge pages", text)


def check_limits(system: System, expect: int | None) -> Findings:
    """Limits of this process, which an engine started from here inherits."""
    files, space = system.limits.get("nofile"), system.limits.get("as")
    wanted = max(expect or 0, _configured(system))
    short = [("nofile", f"{files} descriptors", "an engine has sockets, libraries and a few descriptors an arena: "
              "OSError EMFILE", "ulimit -n 65536 (systemd: LimitNOFILE=65536)")] if files and files < 1024 else []  # fmt: skip
    if space is not None:
        short.append(("as", f"{format_bytes(space)} of address space", "every process maps the whole arena, tensors twice: "
                      "mapping fails with ENOMEM", "ulimit -v unlimited (systemd: LimitAS=infinity)"))  # fmt: skip
    for name, what, why, mend in short:
        level: Level = "fault" if name == "as" and (space or 0) < 2 * wanted else "warning"
        yield Finding(level, "limits", f"ulimit allows {what}", why, mend)
    if not short:
        yield Finding(
            "ok", "limits", f"{'unlimited' if files is None else files} descriptors, address space without limit"
        )
    locked = system.limits.get("memlock")
    if expect is not None and locked is not None and locked < expect:
        yield Finding("ok", "limits", f"{format_bytes(locked)} may be locked, which matters only to who pins pages for a GPU "
                      "without root")  # fmt: skip


def check_features(system: System, expect: int | None) -> Findings:
    """What the core asks of the kernel."""
    missing = [name for name, there in system.features.items() if not there]
    for name in missing:
        if name in _NEEDED:
            yield Finding("fault", "kernel", f"the kernel has no {name}", "liveness, and what forked children may see, hang "
                          "on it: arenas can not be used", "run on Linux 4.14 or newer; gVisor and the like lack it")  # fmt: skip
        else:
            yield Finding("warning", "kernel", f"the kernel has no {name}", _OPTIONAL.get(name, "something is slower without it"),
                          "run on Linux 6.7 or newer, without a sandbox that hides it")  # fmt: skip
    if not missing:
        yield Finding("ok", "kernel", f"has {', '.join(system.features)}")


_OPTIONAL = {
    "MADV_POPULATE_WRITE": "arenas can not be prefaulted (Linux 5.14): the first publications are slower",
    "PAGEMAP_SCAN": "written pages of tensors can not be told from others (Linux 6.7): dropping them is slower",
    "write leases": "nobody can prove that a file is unused: shmcast-gc --foreign --remove keeps everything",
}


def check_hash(system: System, expect: int | None) -> Findings:
    """Which code hashes payloads."""
    best = system.hash_paths[-1]
    chosen = system.hash_asked or best
    if chosen not in system.hash_paths:
        yield Finding("fault", "hash", f"SHMCAST_HASH_PATH={chosen}, this processor has {', '.join(system.hash_paths)}",
                      "importing shmcast fails", "unset SHMCAST_HASH_PATH")  # fmt: skip
    elif chosen == "portable":
        yield Finding("warning", "hash", "payloads are hashed by portable code", "publishing takes several times as long",
                      "unset SHMCAST_HASH_PATH" if best != chosen
                      else "run on a processor with AVX2, or publish with hash=False")  # fmt: skip
    else:
        yield Finding("ok", "hash", f"payloads are hashed with {chosen}")


def check_own_leftovers(system: System, expect: int | None) -> Findings:
    """Arenas whose owners are dead."""
    dead = [arena for arena in system.arenas if arena["state"] in ("dead", "ended", "orphan")]
    damaged = _of_state(system, "damaged")
    if dead:
        spaces = sorted({arena["namespace"] for arena in dead})
        yield Finding(
            "warning", "leftovers",
            f"{len(dead)} arenas of dead processes hold {format_bytes(sum(arena['file_bytes'] for arena in dead))} "
            f"(namespaces {', '.join(spaces[:5])})",
            "they take memory until the next arena of their namespace is created", "shmcast-gc --once",
        )  # fmt: skip
    if damaged:
        yield Finding("warning", "leftovers", f"{len(damaged)} arenas can not be read: {damaged[0]['why']}",
                      "nobody can join them; another build of shmcast, or another program, has written there",
                      "use one build on the host; shmcast ls names them")  # fmt: skip
    if not dead and not damaged:
        yield Finding("ok", "leftovers", f"{len(_of_state(system, 'live'))} live arenas, none of dead processes")


def check_foreign_leftovers(system: System, expect: int | None) -> Findings:
    """What others have left."""
    free = [leftover for leftover in system.census.leftovers if leftover.removable]
    unsure = [leftover for leftover in system.census.leftovers if not leftover.users and not leftover.removable]
    if free:
        yield Finding(
            "warning", "leftovers of others",
            f"{len(free)} files that nobody uses hold {format_bytes(sum(leftover.nbytes for leftover in free))}, such as "
            f"{free[0].name}",
            "a crashed engine, or multiprocessing, has left them; they take memory until somebody removes them",
            "shmcast-gc --foreign, then shmcast-gc --foreign --remove",
        )  # fmt: skip
    else:
        text = f"{len(system.census.leftovers)} segments of others"
        if unsure:
            text += f", {len(unsure)} without a user that can be seen ({unsure[0].reason})"
        yield Finding("ok", "leftovers of others", text)


CHECKS: tuple[Callable[[System, int | None], Findings], ...] = (
    check_mount, check_size, check_growth, check_memory, check_cgroup, check_remove_ipc, check_overcommit,
    check_huge_pages, check_limits, check_features, check_hash, check_own_leftovers, check_foreign_leftovers,
)  # fmt: skip


def _of_state(system: System, state: str) -> list[looks.Seen]:
    return [arena for arena in system.arenas if arena["state"] == state]


def _configured(system: System) -> int:
    return sum(arena["max_bytes"] for arena in _of_state(system, "live"))


def _power(nbytes: int) -> str:
    """At least that, as mount and docker take it."""
    return f"{-(-nbytes // (1 << 30))}g"


# ---- reading


def read(root: str = "/") -> System:
    """This host, now. ``root``: where /etc, /proc, /run, /sys and /usr are looked for."""
    base = Path(root)
    mount = _mount()
    free, total = names.room()
    memory = _fields(base / "proc/meminfo")
    limit, used = cgroup(base)
    return System(
        shm_kind=None if mount is None else mount.kind,
        shm_options=() if mount is None else mount.options,
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
        limits={name: _limit(number) for name, number in _LIMITS.items()},
        features=features(),
        hash_paths=tuple(_native.hash_paths()),
        hash_asked=os.environ.get("SHMCAST_HASH_PATH") or None,
        arenas=tuple(looks.survey()),
        census=foreign.scan(),
    )


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
    """``(limit, used)`` in bytes of the tightest memory cgroup around this process; no limit where there is none."""
    tightest: tuple[int | None, int] = None, 0
    for line in _text(base / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory") and "memory" not in controllers.split(","):
            continue
        root = base / "sys/fs/cgroup" / ("memory" if controllers else "")
        files = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        here = root / path.lstrip("/")
        # In a container the path may be that on the host, which is not there: its own is then at the root.
        for folder in (here, *here.parents):
            limit, used = (_text(folder / name) for name in files)
            if limit.isdecimal() and int(limit) < 1 << 60:
                left = int(limit) - int(used or 0)
                if tightest[0] is None or left < tightest[0] - tightest[1]:
                    tightest = int(limit), int(used or 0)
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


def features() -> dict[str, bool]:
    """What the core asks of the kernel, and whether it is there."""
    return {
        "OFD locks": _works(_try_lock),
        "MADV_DONTFORK": _works(functools.partial(_try_advice, 10)),
        "MADV_WIPEONFORK": _works(functools.partial(_try_advice, 18)),
        "MADV_POPULATE_WRITE": _works(functools.partial(_try_advice, 23)),
        "futex": _works(_try_futex),
        "PAGEMAP_SCAN": _works(_try_scan),
        "write leases": _works(_try_lease),
    }


def _works(attempt: Callable[[], Any]) -> bool:
    try:
        attempt()
    except OSError:
        return False
    return True


def _try_advice(number: int) -> None:
    with mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(number)


def _try_lock() -> None:
    lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0)
    with tempfile.TemporaryFile(dir=names.DIRECTORY) as file:
        fcntl.fcntl(file, getattr(fcntl, "F_OFD_SETLK", 37), lock)


def _try_lease() -> None:
    with tempfile.NamedTemporaryFile(dir=names.DIRECTORY) as file:
        fd = os.open(file.name, os.O_RDONLY)
        file.file.close()
        try:
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        finally:
            os.close(fd)


def _try_futex() -> None:
    number = {"x86_64": 202, "aarch64": 98, "riscv64": 98}.get(platform.machine())
    if number is None:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    word = ctypes.c_uint32(0)
    if libc.syscall(ctypes.c_long(number), ctypes.byref(word), 1, 1, None, None, 0) < 0:
        raise OSError(ctypes.get_errno(), "futex")


def _try_scan() -> None:
    """PAGEMAP_SCAN of nothing: a kernel that knows it says 0, others ENOTTY."""
    request = bytearray(struct.pack("12Q", 96, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0))
    with open("/proc/self/pagemap", "rb") as file:
        fcntl.ioctl(file, 0xC0606610, request)
