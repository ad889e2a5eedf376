"""What /proc says of processes and mounts. For people and for judgement by others; nothing here decides anything."""

import os
from typing import NamedTuple

PROC = "/proc"
_INITIAL_PID_NAMESPACE = 0xEFFFFFFC  # PROC_PID_INIT_INO: these inode numbers are part of the kernel's interface
_INITIAL_USER_NAMESPACE = 0xEFFFFFFD  # PROC_USER_INIT_INO
_EXITING, _KERNEL_THREAD = 0x00000004, 0x00200000  # PF_EXITING, PF_KTHREAD
_COMMAND_LENGTH = 96
_STATES = {
    "R": "running",
    "S": "running",
    "D": "running",
    "I": "running",
    "T": "stopped",
    "t": "stopped",
    "Z": "zombie",
}


class Mount(NamedTuple):
    """A line of /proc/self/mountinfo."""

    device: int
    """As `os.stat` gives it."""
    point: str
    kind: str
    options: tuple[str, ...]
    """Of the mount, then of the file system."""


def mounts(text: str | None = None) -> list[Mount]:
    """All mounts that this process sees, the later ones on top of the earlier; OSError where /proc is not there.

    ``text``: of a mountinfo file, instead of this process's own."""
    if text is None:
        with open(f"{PROC}/self/mountinfo", encoding="utf-8", errors="replace") as file:
            text = file.read()
    found = []
    for line in text.splitlines():
        before, separator, after = line.partition(" - ")
        fields, system = before.split(" "), after.split(" ")
        if not separator or len(fields) < 6 or len(system) < 3:
            continue
        major, minor = fields[2].split(":")
        options = (*fields[5].split(","), *system[2].split(","))
        found.append(Mount(os.makedev(int(major), int(minor)), _unescaped(fields[4]), system[0], options))
    return found


def pids() -> list[int]:
    """Processes that this process sees, itself included."""
    return [int(entry) for entry in os.listdir(PROC) if entry.isdecimal()]


def in_initial_pid_namespace() -> bool:
    """Whether this process, and so its /proc, is in the pid namespace that holds all others."""
    try:
        # /proc/self is there only in a /proc of this namespace or of one around it, and around the initial one is none.
        return os.stat(f"{PROC}/self/ns/pid").st_ino == _INITIAL_PID_NAMESPACE
    except OSError:
        return False


def in_initial_user_namespace() -> bool:
    """Whether capabilities of this process count everywhere, and users are those of the host."""
    try:
        return os.stat(f"{PROC}/self/ns/user").st_ino == _INITIAL_USER_NAMESPACE
    except FileNotFoundError:
        return True  # a kernel that has no others
    except OSError:
        return False


def nobody() -> int:
    """As whom a user namespace shows all users that it does not know."""
    try:
        with open(f"{PROC}/sys/kernel/overflowuid", encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):
        return 65534


def folders(pid: int) -> list[str]:
    """Where in /proc the files and the memory of a process are to be seen: under the process itself, and, where its main
    thread ends while others go on, under each of those. None where it has ended, or is a thread of the kernel's own.

    PermissionError where its threads can not be listed."""
    fields = _stat(f"{PROC}/{pid}")
    flags = int(fields[6]) if len(fields) > 6 else 0
    if flags & _KERNEL_THREAD:
        return []
    ended = fields[:1] == ["Z"]
    return [*([] if ended else [f"{PROC}/{pid}"]), *(_threads(pid) if ended or flags & _EXITING else [])]


def _threads(pid: int) -> list[str]:
    """The folders of all its threads but the first."""
    try:
        found = os.listdir(f"{PROC}/{pid}/task")
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [f"{PROC}/{pid}/task/{thread}" for thread in found if thread != str(pid)]


def state(pid: int) -> str:
    """ "running", "stopped", "zombie", or "gone"; of a process whose main thread has ended, that of the others."""
    state = _state(f"{PROC}/{pid}")
    if state != "zombie":
        return state
    try:
        others = [_state(folder) for folder in _threads(pid)]
    except OSError:
        return state
    return next((other for other in others if other in ("running", "stopped")), state)


def _state(folder: str) -> str:
    fields = _stat(folder)
    return _STATES.get(fields[0], "gone") if fields else "gone"


def start_ticks(pid: int) -> int:
    """When it started, in clock ticks since boot; 0 where it is gone. Tells a process from a later one of that pid."""
    fields = _stat(f"{PROC}/{pid}")
    return int(fields[19]) if len(fields) > 19 else 0


def command(pid: int) -> str:
    """Its command line, cut; its name in brackets where it has none; empty where it is gone."""
    try:
        shown = folders(pid)
    except OSError:
        shown = []
    for folder in shown:
        line = _read(f"{folder}/cmdline").rstrip(b"\0")
        if line:
            return line.replace(b"\0", b" ").decode(errors="replace")[:_COMMAND_LENGTH]
    name = _read(f"{PROC}/{pid}/comm").strip()
    return f"[{name.decode(errors='replace')}]" if name else ""


def _read(path: str) -> bytes:
    """The beginning of a file; nothing where it can not be read."""
    try:
        with open(path, "rb") as file:
            return file.read(4096)
    except OSError:
        return b""


def capable(number: int) -> bool:
    """Whether this process has that capability in effect."""
    with open(f"{PROC}/self/status", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("CapEff:"):
                return int(line.split()[1], 16) >> number & 1 == 1
    return False


def _stat(folder: str) -> list[str]:
    """The fields of /proc/PID/stat, or of a thread's, from the third on; the second is a name in which anything may stand."""
    try:
        with open(f"{folder}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return []


def _unescaped(path: str) -> str:
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        path = path.replace(code, character)
    return path
