"""What /proc says of processes and mounts. For people and for judgement by others; nothing here decides anything."""

import os
from typing import NamedTuple

PROC = "/proc"
_INITIAL_PID_NAMESPACE = 0xEFFFFFFC  # PROC_PID_INIT_INO: this inode number is part of the kernel's interface
_KERNEL_THREAD = 0x00200000  # PF_KTHREAD
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


def is_kernel_thread(pid: int) -> bool:
    """Whether it is a thread of the kernel's own, which has neither files nor memory."""
    fields = _stat(pid)
    return len(fields) > 6 and int(fields[6]) & _KERNEL_THREAD != 0


def state(pid: int) -> str:
    """ "running", "stopped", "zombie", or "gone"."""
    fields = _stat(pid)
    return _STATES.get(fields[0], "gone") if fields else "gone"


def start_ticks(pid: int) -> int:
    """When it started, in clock ticks since boot; 0 where it is gone. Tells a process from a later one of that pid."""
    fields = _stat(pid)
    return int(fields[19]) if len(fields) > 19 else 0


def command(pid: int) -> str:
    """Its command line, cut; its name in brackets where it has none; empty where it is gone."""
    try:
        with open(f"{PROC}/{pid}/cmdline", "rb") as file:
            line = file.read(4096)
        if line:
            return line.rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace")[:_COMMAND_LENGTH]
        with open(f"{PROC}/{pid}/comm", "rb") as file:
            return f"[{file.read().strip().decode(errors='replace')}]"
    except OSError:
        return ""


def capable(number: int) -> bool:
    """Whether this process has that capability in effect."""
    with open(f"{PROC}/self/status", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("CapEff:"):
                return int(line.split()[1], 16) >> number & 1 == 1
    return False


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third on; the second is a name in which anything may stand."""
    try:
        with open(f"{PROC}/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return []


def _unescaped(path: str) -> str:
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        path = path.replace(code, character)
    return path
