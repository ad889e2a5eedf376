"""What is there: names in /dev/shm, descriptors, mapped bytes, memory. Looked at from outside, without shmcast where it is
shmcast that is in question."""

from __future__ import annotations

import fcntl
import os
import statistics
import struct
from collections import defaultdict
from pathlib import Path

from shmcast import _native

SHM = Path("/dev/shm")
_F_OFD_GETLK = 36
_FLOCK = struct.Struct("hhqqi4x")


def segments(namespace: str) -> dict[int, set[int]]:
    """``{arena id: numbers}`` of the names that exist now."""
    found: dict[int, set[int]] = defaultdict(set)
    for name in os.listdir(SHM):
        if name.startswith(f"shmcast.{namespace}."):
            _, _, arena, number = name.split(".")
            found[int(arena, 16)].add(int(number))
    return found


def owner_lives(namespace: str, arena: int) -> bool:
    """Whether somebody has the lock on the owner's byte; False where there is no control segment."""
    try:
        fd = os.open(SHM / f"shmcast.{namespace}.{arena:016x}.0", os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        answer = fcntl.fcntl(fd, _F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0))
        return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
    finally:
        os.close(fd)


def members(namespace: str, arena: int) -> str:
    """Who is in an arena, for people."""
    try:
        fd = os.open(SHM / f"shmcast.{namespace}.{arena:016x}.0", os.O_RDWR)
    except FileNotFoundError:
        return "gone"
    try:
        peers = _native.inspect(fd)["peers"]
    finally:
        os.close(fd)
    keys = "index", "incarnation", "alive", "pid"
    return ", ".join(" ".join(f"{key} {peer[key]}" for key in keys) for peer in peers)


def orphans(namespace: str) -> list[int]:
    """Arenas of which there are names, and whose owner is dead."""
    return [arena for arena in segments(namespace) if not owner_lives(namespace, arena)]


def descriptors(pid: int | str) -> list[str]:
    """What a process has open; empty where it is gone."""
    found = []
    try:
        for entry in os.listdir(f"/proc/{pid}/fd"):
            try:
                found.append(os.readlink(f"/proc/{pid}/fd/{entry}"))
            except OSError:
                continue  # of the listing itself, or closed meanwhile
    except OSError:
        return []
    return found


def mapped_bytes(pid: int | str, namespace: str) -> int:
    """Bytes of segments of the namespace that a process has mapped, also of those whose names are gone."""
    total = 0
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return 0
    for line in lines:
        if f"/shmcast.{namespace}." in line:
            start, end = line.split(" ", 1)[0].split("-")
            total += int(end, 16) - int(start, 16)
    return total


def own_bytes(pid: int | str) -> int:
    """Memory that belongs to a process alone: anonymous pages that are in use."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


class Growth:
    """Is something that may go up and down the same late in the run as it was early?"""

    def __init__(self, what: str, share: float, more: float) -> None:
        """``share``, ``more``: by how much it may be larger: that part of it, and so much besides."""
        self.what, self._share, self._more = what, share, more
        self._seen: list[float] = []

    def see(self, value: float) -> None:
        self._seen.append(value)

    def problems(self) -> list[str]:
        """The second quarter against the last one; nothing to say of fewer than eight looks."""
        quarter = len(self._seen) // 4
        if quarter < 2:
            return []
        early = statistics.median(self._seen[quarter : 2 * quarter])
        late = statistics.median(self._seen[-quarter:])
        bound = early * (1 + self._share) + self._more
        if late <= bound:
            return []
        return [
            f"{self.what} grows: {early:.0f} in the second quarter, {late:.0f} in the last, {bound:.0f} would be allowed"
        ]


class Flatness:
    """Of the processes that live as long as the run."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._series: dict[tuple[str, str], Growth] = {}

    def see(self, who: str, pid: int | str, besides: int = 0) -> None:
        """Look at one of them. ``besides``: descriptors that it has to have now and not at other times."""
        values = {
            "descriptors": (float(len(descriptors(pid)) - besides), 0.0, 1.0),
            "mapped bytes": (float(mapped_bytes(pid, self._namespace)), 0.5, 4 << 20),
            "own bytes": (float(own_bytes(pid)), 0.1, 4 << 20),
        }
        for what, (value, share, more) in values.items():
            series = self._series.setdefault((who, what), Growth(f"{who}: {what}", share, more))
            series.see(value)

    def problems(self) -> list[str]:
        return [problem for series in self._series.values() for problem in series.problems()]
