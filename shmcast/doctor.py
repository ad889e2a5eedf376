"""`shmcast doctor`: what is wrong with a host, why it matters, and the command that mends it.

`host.read` looks at the system once; `judge` is a function of what it has seen, one small check after the other.
"""

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from . import _native, looks, names
from .host import System as System
from .host import read as read
from .sizes import MAX_BYTES_VARIABLE, format_bytes, parse_bytes

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


def status(findings: list[Finding]) -> int:
    """Exit status: 0 nothing to mend, 1 warnings, 2 faults."""
    levels = {finding.level for finding in findings}
    return 2 if "fault" in levels else 1 if "warning" in levels else 0


def judge(system: System, expect: int | None = None) -> list[Finding]:
    """What is to be said of a host; ``expect``: bytes of arenas that are to be created on it, as SHMCAST_MAX_BYTES says
    where nothing else does."""
    expect = expected(system) if expect is None else expect
    return [finding for check in CHECKS for finding in check(system, expect)]


def expected(system: System) -> int | None:
    """Bytes of the arena that SHMCAST_MAX_BYTES asks for; None where it is not set, says nothing that can be understood, or
    there is one already."""
    try:
        nbytes = _asked(system.variables.get(MAX_BYTES_VARIABLE, ""))
    except ValueError:
        return None
    there = [arena["max_bytes"] for arena in _live(system) if arena["namespace"] == system.namespace]
    return nbytes if nbytes and max(there, default=0) < nbytes else None


def _asked(text: str) -> int:
    """The arena that it stands for, in whole pages; 0 where it is not set. ValueError for what is no size of an arena."""
    if not text:
        return 0
    try:
        nbytes = parse_bytes(text, MAX_BYTES_VARIABLE) // _native.PAGE_BYTES * _native.PAGE_BYTES
    except OverflowError:
        nbytes = 0
    if not nbytes:
        raise ValueError(f"{MAX_BYTES_VARIABLE}: {text!r} is no size of an arena, which has at least one page")
    return nbytes


# ---- checks


Findings = Iterator[Finding]


def check_settings(system: System, expect: int | None) -> Findings:
    """What the environment says, which an engine that is started from here inherits."""
    text = system.variables.get(MAX_BYTES_VARIABLE, "")
    try:
        nbytes = _asked(text)
        if nbytes:
            told = ", which is to fit" if expect == nbytes else "" if expect else ", as a live arena has already"
            yield Finding("ok", "settings", f"{MAX_BYTES_VARIABLE}={text}{told}")
    except ValueError as error:
        yield Finding("fault", "settings", str(error), "broadcast_pyobj raises it instead of making an arena",
                      f"export {MAX_BYTES_VARIABLE}=2GiB, or unset it")  # fmt: skip
    try:
        names.check_namespace(system.variables.get(names.NAMESPACE_VARIABLE, "") or "0")
    except ValueError as error:
        yield Finding("fault", "settings", f"{names.NAMESPACE_VARIABLE}: {error}", "no arena can be created or swept",
                      f"unset {names.NAMESPACE_VARIABLE}, or give it such a name")  # fmt: skip


def check_mount(system: System, expect: int | None) -> Findings:
    """Is /dev/shm there, memory, and writable?"""
    if system.shm_kind is None:
        yield Finding("fault", "mount", f"{names.DIRECTORY} does not exist", "arenas are made there, and nowhere else",
                      f"mount -t tmpfs -o rw,nosuid,nodev,size=50% tmpfs {names.DIRECTORY}")  # fmt: skip
    elif system.shm_kind != "tmpfs":
        yield Finding("fault", "mount", f"{names.DIRECTORY} is a {system.shm_kind}, not a tmpfs",
                      "pages may be written to a disk, or not be shared between containers",
                      f"mount -t tmpfs -o rw,nosuid,nodev,size=50% tmpfs {names.DIRECTORY}")  # fmt: skip
    elif "ro" in system.shm_options:
        yield Finding("fault", "mount", f"{names.DIRECTORY} is mounted read-only", "no arena can be created",
                      f"mount -o remount,rw {names.DIRECTORY}")  # fmt: skip
    elif system.shm_trouble:
        yield Finding("fault", "mount", f"{names.DIRECTORY}: {system.shm_trouble}", "no arena can be created or found",
                      f"chmod 1777 {names.DIRECTORY}")  # fmt: skip
    else:
        yield Finding("ok", "mount", f"{names.DIRECTORY} is a tmpfs ({','.join(system.shm_options)})")


def _resize(system: System, nbytes: int) -> str:
    """How to have so many bytes, in use and free, in /dev/shm."""
    if 0 < system.memory_total < nbytes:
        return f"create arenas with a smaller max_bytes: the host has {format_bytes(system.memory_total)} of memory"
    size = _power(nbytes)
    return (
        f"mount -o remount,size={size} /dev/shm; in Docker: docker run --shm-size={size}; in Kubernetes: an emptyDir with "
        f"medium: Memory and sizeLimit: {size}, mounted at /dev/shm"
    )


_CLEAR = "shmcast ls shows what is in use, shmcast-gc --once removes what dead processes have left; or "


def check_size(system: System, expect: int | None) -> Findings:
    """Does what is configured fit?"""
    total, free = system.shm_total, system.shm_free
    if system.shm_kind is None:
        return
    if not total:
        yield Finding(
            "ok", "size", f"{names.DIRECTORY} has no limit of its own: it takes memory as long as there is some"
        )
        return
    room = f"{names.DIRECTORY} has {format_bytes(total)}, {format_bytes(free)} of them free"
    why = "publishing fails with ArenaFullError once it is full; messages then carry the arrays"
    enough = _resize(system, max(total - free + (expect or 0), 2 * _configured(system), 4 << 30))
    if expect is not None and total < expect:
        yield Finding("fault", "size", f"{room}; {format_bytes(expect)} are expected to fit", why, enough)
    elif expect is not None and free < expect:
        yield Finding("fault", "size", f"{room}; {format_bytes(expect)} are expected to be free", why, _CLEAR + enough)
    elif total <= DOCKER_BYTES:
        default = "Docker's default, " if total == DOCKER_BYTES else ""
        yield Finding("warning", "size", f"{room}: {default}too little for a request or two", why, enough)
    elif free < total // 10:
        yield Finding("warning", "size", f"{room}: less than a tenth", why, _CLEAR + _resize(system, 2 * total))
    else:
        yield Finding("ok", "size", room)


def check_growth(system: System, expect: int | None) -> Findings:
    """May the arenas that exist grow as far as they are allowed to?"""
    wanted = _growth(system)
    if system.shm_total and wanted > system.shm_free:
        yield Finding(
            "warning", "growth",
            f"live arenas may still grow by {format_bytes(wanted)}, {format_bytes(system.shm_free)} are free",
            "the last of them to grow gets ArenaFullError, though it is within its max_bytes",
            f"create arenas with a smaller max_bytes; or {_resize(system, system.shm_total - system.shm_free + wanted)}",
        )  # fmt: skip


def check_memory(system: System, expect: int | None) -> Findings:
    """Is there memory behind the pages?"""
    if expect is not None and 0 < system.memory_available < expect:
        yield Finding(
            "warning", "memory",
            f"{format_bytes(expect)} are expected, {format_bytes(system.memory_available)} of memory are available",
            "pages of /dev/shm are memory: they are swapped, or the OOM killer ends somebody",
            "create arenas with a smaller max_bytes, or end what uses the memory",
        )  # fmt: skip
    if 0 < system.memory_total < system.shm_total:
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
    room = f"the memory cgroup of this process allows {format_bytes(limit)}, {format_bytes(left)} are left"
    wanted = expect or _growth(system)
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
        yield Finding("ok", "RemoveIPC", "no systemd here" if system.remove_ipc is None else "RemoveIPC=no")
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
            why, mend = _OPTIONAL[name]
            yield Finding(
                "warning", "kernel", f"the kernel has no {name}", why, f"{mend}, without a sandbox that hides it"
            )
    if not missing:
        untried = [name for name in (*_NEEDED, *_OPTIONAL) if name not in system.features]
        yield Finding("ok", "kernel", f"has {', '.join(system.features)}"
                      + (f"; could not be tried: {', '.join(untried)}" if untried else ""))  # fmt: skip


_OPTIONAL = {
    "MADV_POPULATE_WRITE": ("arenas can not be prefaulted: the first publications are slower", "run on Linux 5.14 or newer"),
    "PAGEMAP_SCAN": ("written pages of tensors can not be told from others: dropping them is slower",
                     "run on Linux 6.7 or newer"),
    "write leases": ("nobody can prove that a file is unused: shmcast-gc --foreign --remove keeps everything",
                     "sysctl fs.leases-enable=1; or run on Linux 5.3 or newer"),
}  # fmt: skip


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
    """What shmcast-gc would remove, and, for information, what it would not."""
    dead = [arena for arena in system.arenas if arena["verdict"] == "remove"]
    live = [arena for arena in system.arenas if arena["state"] == "live"]
    staying = [arena for arena in system.arenas if arena["verdict"] == "keep" and _is_left(arena)]
    text = f"{len(live)} live arenas, nothing of dead processes that shmcast-gc would remove"
    if dead:
        spaces = sorted({arena["namespace"] for arena in dead})
        text = (
            f"{len(dead)} arenas of dead processes, {format_bytes(sum(arena['removable_bytes'] for arena in dead))} long "
            f"together (namespaces {', '.join(spaces[:5])}{', ...' if len(spaces) > 5 else ''})"
        )
    if staying:
        first = staying[0]
        text += f"; {len(staying)} stay, such as {first['namespace']} {first['arena']}: {first['why']}"
    if dead:
        yield Finding("warning", "leftovers", text,
                      "they take memory until a process creates or joins an arena of their namespace",
                      "shmcast-gc --once")  # fmt: skip
    else:
        yield Finding("ok", "leftovers", text)


def _is_left(arena: looks.Seen) -> bool:
    """Whether nobody lives there, as far as can be told from here."""
    dead = arena["state"] in ("dead", "ended", "orphan") and arena["reason"] != "ending"
    return dead or arena["reason"] in ("no-file", "newer-format")


def check_strange_arenas(system: System, expect: int | None) -> Findings:
    """Arenas of ours that somebody uses and that this build can not read."""
    strange = [arena for arena in system.arenas if arena["reason"] in ("owner-alive", "owner-paused", "at-work")
               and arena["state"] in ("damaged", "unreadable")]  # fmt: skip
    if strange:
        yield Finding("warning", "builds", f"{len(strange)} arenas in use can not be read: {strange[0]['why']}",
                      "processes of this build can not join them; another build of shmcast, or another program, has written "
                      "there", "use one build on the host; shmcast ls names them")  # fmt: skip


def check_foreign_leftovers(system: System, expect: int | None) -> Findings:
    """What others have left."""
    free = [leftover for leftover in system.census.leftovers if leftover.removable]
    unsure = [leftover for leftover in system.census.leftovers if not leftover.users and not leftover.removable]
    if free:
        yield Finding(
            "warning", "leftovers of others",
            f"{len(free)} files that nobody is seen to use, {format_bytes(sum(leftover.nbytes for leftover in free))} long "
            f"together, such as {free[0].name}",
            "a crashed engine, or multiprocessing, has left them; they take memory until somebody removes them",
            "shmcast-gc --foreign, then shmcast-gc --foreign --remove, which asks the kernel whether anybody has them open",
        )  # fmt: skip
    else:
        text = f"{len(system.census.leftovers)} files of others"
        if unsure:
            text += f", {len(unsure)} without a user that can be seen (such as {unsure[0].name}: {unsure[0].reason})"
        if not system.census.complete:
            text += f"; {system.census.why}"
        yield Finding("ok", "leftovers of others", text)


CHECKS: tuple[Callable[[System, int | None], Findings], ...] = (
    check_settings, check_mount, check_size, check_growth, check_memory, check_cgroup, check_remove_ipc, check_overcommit,
    check_huge_pages, check_limits, check_features, check_hash, check_own_leftovers, check_strange_arenas, check_foreign_leftovers,
)  # fmt: skip


def _live(system: System) -> list[looks.Seen]:
    """Arenas that are alive and could be read, of this user; of all for root, who answers for the host. What a stranger's
    file says is no complaint of others."""
    return [arena for arena in system.arenas
            if arena["state"] == "live" and "max_bytes" in arena and system.uid in (0, arena["uid"])]  # fmt: skip


def _configured(system: System) -> int:
    return sum(arena["max_bytes"] for arena in _live(system))


def _growth(system: System) -> int:
    return sum(max(arena["max_bytes"] - arena["reserved_bytes"], 0) for arena in _live(system))


def _power(nbytes: int) -> str:
    """At least that, as mount and docker take it."""
    return f"{-(-nbytes // (1 << 30))}g"
