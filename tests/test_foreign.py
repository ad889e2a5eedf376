"""Leftovers of others, with real processes that use them."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import fnmatch
import os
import platform
import secrets
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from child import Child, Link, LinkClosedError
from leftovers import HOST_ONLY, SHM, look, make, map_shared, own_names, started
from shmcast import foreign, procfs


@pytest.fixture
def prefix() -> Iterator[str]:
    yield from own_names()


def stays(leftover: foreign.Leftover, why: str) -> None:
    """It was removable when it was looked at; the kernel, or what lies there by now, says otherwise."""
    assert leftover.removable
    with pytest.raises(OSError, match=f"not removed: {why}.*{leftover.name}"):
        foreign.remove(leftover)


OPEN = "somebody has it open or maps it"
CHANGED = "it was touched, or replaced by another file"


@pytest.mark.parametrize(
    ("how", "says"), [("maps", "maps"), ("opens", "opens"), ("reads", "opens"), ("both", "maps and opens")]
)
def test_a_file_in_use_stays(prefix: str, child: Callable[..., Child], how: str, says: str) -> None:
    path = make(f"{prefix}used")
    process = started(child, path, how)
    leftover = look(prefix)["used"]
    assert [(found.pid, found.how) for found in leftover.users] == [(process.pid, says)]
    assert "child.py" in leftover.users[0].command
    assert not leftover.removable
    assert leftover.reason == "used by 1 process"
    assert not foreign.remove(leftover)
    assert path.exists()


def test_a_stopped_process_is_a_user(prefix: str, child: Callable[..., Child]) -> None:
    path = make(f"{prefix}used")
    process = started(child, path, "maps")
    process.signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    assert procfs.state(process.pid) == "stopped"
    leftover = look(prefix)["used"]
    assert [found.pid for found in leftover.users] == [process.pid]
    assert not foreign.remove(leftover)


def leaderless(parent: Link, path: str, how: str) -> None:
    """A process whose main thread ends while another one goes on: what /proc shows of the process itself is empty."""
    fd = os.open(path, os.O_RDONLY)
    if how == "maps":
        map_shared(fd)
        os.close(fd)

    def go_on() -> None:
        while procfs._stat(f"/proc/self/task/{os.getpid()}")[0] != "Z":
            os.sched_yield()  # the watchdog bounds this
        with contextlib.suppress(LinkClosedError):
            parent.send("ready")
            parent.receive()
        os._exit(0)

    threading.Thread(target=go_on).start()
    ctypes.CDLL(None).syscall(60 if platform.machine() == "x86_64" else 93, 0)  # exit: of this thread alone


@pytest.mark.parametrize("how", ["maps", "opens"])
def test_a_process_whose_main_thread_has_ended_is_a_user(prefix: str, child: Callable[..., Child], how: str) -> None:
    path = make(f"{prefix}used")
    process = child(leaderless, str(path), how)
    assert process.receive() == "ready"
    leftover = look(prefix)["used"]
    assert [(found.pid, found.how) for found in leftover.users] == [(process.pid, how)]
    assert "child.py" in leftover.users[0].command
    assert (leftover.removable, leftover.reason) == (False, "used by 1 process")
    assert procfs.state(process.pid) == "running"


def test_a_main_thread_that_ends_while_we_look(
    prefix: str, child: Callable[..., Child], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(f"{prefix}used")
    process = child(leaderless, str(path), "maps")
    assert process.receive() == "ready"
    look_under = procfs.folders
    calls = []

    def folders(pid: int) -> list[str]:
        if pid == process.pid and not calls:
            calls.append(pid)
            return [f"/proc/{pid}"]  # as it was a moment ago
        return look_under(pid)

    monkeypatch.setattr(procfs, "folders", folders)
    assert [found.pid for found in look(prefix)["used"].users] == [process.pid]


@HOST_ONLY
def test_processes_are_looked_at_once_however_many_files_there_are(
    prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(30):
        make(f"{prefix}{number}", 1)
    list_pids, used_by = procfs.pids, foreign._used_by
    walks: list[str] = []
    looked_at: list[int] = []
    monkeypatch.setattr(procfs, "pids", lambda: walks.append("walk") or list_pids())
    monkeypatch.setattr(foreign, "_used_by", lambda pid, files: looked_at.append(pid) or used_by(pid, files))
    found = look(prefix)
    assert len(found) == 30
    assert len(looked_at) == len(set(looked_at))
    walks.clear()
    looked_at.clear()
    assert all(foreign.remove(leftover) for leftover in found.values())
    assert (walks, looked_at) == ([], [])


@HOST_ONLY
def test_a_path_descriptor_reaches_its_file_without_the_name(prefix: str) -> None:
    path = make(f"{prefix}left")
    leftover = look(prefix)["left"]
    fd = os.open(path, os.O_PATH)
    try:
        assert [found.how for found in look(prefix)["left"].users] == ["opens"]
        assert foreign.remove(leftover)
        assert Path(f"/proc/self/fd/{fd}").read_bytes() == b"x" * 8192
    finally:
        os.close(fd)


@HOST_ONLY
def test_what_nobody_uses_goes_once_it_is_asked_for(prefix: str, child: Callable[..., Child]) -> None:
    path = make(f"{prefix}left", 12345)
    process = started(child, path, "maps")
    process.kill()
    leftover = look(prefix)["left"]
    assert (leftover.nbytes, leftover.uid, leftover.users) == (12345, os.getuid(), ())
    assert leftover.removable
    assert path.exists()
    assert foreign.remove(leftover)
    assert not path.exists()
    assert not foreign.remove(leftover)


@HOST_ONLY
def test_who_comes_after_the_scan_is_seen(prefix: str, child: Callable[..., Child]) -> None:
    path = make(f"{prefix}left")
    leftover = look(prefix)["left"]
    assert leftover.removable
    process = started(child, path, "maps")
    stays(leftover, OPEN)
    process.kill()
    assert foreign.remove(leftover)


@HOST_ONLY
@pytest.mark.parametrize("how", ["opens", "maps", "reads"])
def test_the_kernel_sees_whom_proc_does_not_show(
    prefix: str, child: Callable[..., Child], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    path = make(f"{prefix}left")
    started(child, path, how)
    monkeypatch.setattr(foreign, "_users", lambda files: foreign._Users({}, 0))
    stays(look(prefix)["left"], OPEN)
    assert path.exists()


@HOST_ONLY
def test_a_descriptor_on_its_way_through_a_socket(prefix: str) -> None:
    path = make(f"{prefix}left")
    here, there = socket.socketpair()
    with here, there:
        fd = os.open(path, os.O_RDWR)
        socket.send_fds(here, [b"x"], [fd])
        os.close(fd)
        leftover = look(prefix)["left"]
        assert leftover.users == ()
        stays(leftover, OPEN)
    assert foreign.remove(leftover)


@HOST_ONLY
def test_a_name_that_means_another_file_by_now(prefix: str) -> None:
    path = make(f"{prefix}left")
    leftover = look(prefix)["left"]
    path.unlink()
    assert not foreign.remove(leftover)
    make(f"{prefix}left")
    stays(leftover, CHANGED)
    assert path.exists()


@HOST_ONLY
def test_a_file_that_was_touched_since(prefix: str) -> None:
    path = make(f"{prefix}left")
    leftover = look(prefix)["left"]
    with path.open("r+b") as file:
        file.write(b"x")  # of the same length, and the same as before
    stays(leftover, CHANGED)
    assert foreign.remove(look(prefix)["left"])


@HOST_ONLY
def test_replaced_between_the_last_look_and_the_unlinking(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(f"{prefix}left")
    leftover = look(prefix)["left"]
    make(f"{prefix}new")
    leased = fcntl.fcntl

    def replace_then(fd: int, command: int, *value: int) -> int:
        result = leased(fd, command, *value)
        if command == fcntl.F_SETLEASE:
            (SHM / f"{prefix}new").replace(path)
        return result

    monkeypatch.setattr(fcntl, "fcntl", replace_then)
    stays(leftover, "another file has its name by now")
    assert path.exists()


def opener(parent: Link, path: str) -> None:
    parent.send("ready")
    fd = os.open(path, os.O_RDWR)  # waits while the file is leased
    parent.send(os.fstat(fd).st_nlink)


@HOST_ONLY
def test_who_waits_to_open_it_is_heard(
    prefix: str, child: Callable[..., Child], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(f"{prefix}left")
    leftover = look(prefix)["left"]
    leased = fcntl.fcntl
    processes = []

    def open_then(fd: int, command: int, *value: int) -> int:
        result = leased(fd, command, *value)
        if command == fcntl.F_SETLEASE:
            processes.append(child(opener, str(path)))
            assert processes[0].receive() == "ready"
            while leased(fd, fcntl.F_GETLEASE) == fcntl.F_WRLCK:
                os.sched_yield()  # the watchdog bounds this
        return result

    monkeypatch.setattr(fcntl, "fcntl", open_then)
    stays(leftover, "somebody waits to open it")
    assert processes[0].receive() == 1
    assert path.exists()


def test_only_old_files_are_left_over(prefix: str) -> None:
    path = make(f"{prefix}new")
    os.utime(path, (1, 1))  # says it is old; when the file was changed last can not be set
    leftover = look(prefix, min_age_s=3600.0)["new"]
    assert 0 <= leftover.age_s < 3600
    assert not leftover.removable
    assert "left alone until 3600 s" in leftover.reason or not procfs.in_initial_pid_namespace()
    assert not foreign.remove(leftover)
    assert path.exists()
    if procfs.in_initial_pid_namespace():
        assert "left alone until 600 s" in foreign.scan((f"{prefix}*",)).leftovers[0].reason


def test_what_is_no_file_stays(prefix: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"x")
    (SHM / f"{prefix}link").symlink_to(target)
    (SHM / f"{prefix}folder").mkdir()
    os.mkfifo(SHM / f"{prefix}fifo")
    path = make(f"{prefix}twice")
    os.link(path, SHM / f"{prefix}again")
    seen = look(prefix)
    assert {name: leftover.reason for name, leftover in seen.items()} == {
        "link": "it is a symbolic link, not a segment",
        "folder": "it is a directory, not a segment",
        "fifo": "it is a special file, not a segment",
        "twice": "it has 2 names; remove the others first",
        "again": "it has 2 names; remove the others first",
    }
    assert not any(foreign.remove(leftover) for leftover in seen.values())
    assert target.exists()


@HOST_ONLY
@pytest.mark.parametrize(
    ("other", "why"), [("symlink", "it can not be opened"), ("folder", CHANGED), ("fifo", CHANGED)]
)
def test_what_is_no_file_any_more_stays(prefix: str, tmp_path: Path, other: str, why: str) -> None:
    path = make(f"{prefix}left")
    leftover = look(prefix)["left"]
    path.unlink()
    {"symlink": lambda: path.symlink_to(tmp_path), "folder": path.mkdir, "fifo": lambda: os.mkfifo(path)}[other]()
    stays(leftover, why)
    assert os.path.lexists(path)


def test_ours_are_never_foreign(namespace: str) -> None:
    path = make(f"shmcast.{namespace}.{1:016x}.0")
    assert foreign.scan((f"shmcast.{namespace}.*", f"*{namespace}*"), min_age_s=0.0).leftovers == ()
    path.unlink()


def test_globs_are_of_whole_names_and_of_exact_case(prefix: str) -> None:
    make(f"{prefix}a1")
    make(f"{prefix}A1")
    make(f"{prefix}b1x")
    names = [leftover.name for leftover in foreign.scan((f"{prefix}a*", f"{prefix}b?")).leftovers]
    assert names == [f"{prefix}a1"]


def test_the_default_patterns() -> None:
    mine = ["sgl_shm_0_ab", "psm_12ab34cd", "torch_12_34_0", "sem.loky-1-abc", "sem.mp-abc"]
    theirs = ["sem.postgres", "shmcast.1.0123456789abcdef.0", "xpsm_1", "nccl-abc"]

    def matches(name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in foreign.DEFAULT_PATTERNS)

    assert [name for name in mine + theirs if matches(name)] == mine


def loky_like(parent: Link, name: str) -> None:
    """A named semaphore as loky makes it: mapped, its descriptor closed."""
    import _multiprocessing

    lock = _multiprocessing.SemLock(1, 1, 1, name, False)
    try:
        parent.send("ready")
        parent.receive()
    finally:
        _multiprocessing.sem_unlink(name)
    del lock


def test_semaphores_are_seen(child: Callable[..., Child]) -> None:
    name = f"/loky-{os.getpid()}-{secrets.token_hex(4)}"
    process = child(loky_like, name)
    assert process.receive() == "ready"
    found = [leftover for leftover in foreign.scan().leftovers if leftover.name == f"sem.{name[1:]}"]
    assert [(user.pid, user.how) for user in found[0].users] == [(process.pid, "maps")]
    process.join()


def test_a_process_started_while_we_look(
    prefix: str, child: Callable[..., Child], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its parent ends as soon as the process is there; whoever lists processes once misses both."""
    path = make(f"{prefix}used")
    list_pids = procfs.pids
    calls = []

    def pids() -> list[int]:
        found = list_pids()
        if not calls:
            calls.append(started(child, path, "maps"))
        return found

    monkeypatch.setattr(procfs, "pids", pids)
    assert [found.pid for found in look(prefix)["used"].users] == [calls[0].pid]
