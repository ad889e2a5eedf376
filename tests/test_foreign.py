"""Leftovers of others, with real processes that use them."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import fnmatch
import mmap
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from child import Child, Link
from shmcast import foreign, procfs

SHM = Path("/dev/shm")
HOST_ONLY = pytest.mark.skipif(
    not procfs.in_initial_pid_namespace(), reason="not in the initial pid namespace: nothing can be removed from here"
)


@pytest.fixture
def prefix() -> Iterator[str]:
    name = f"psm_test{os.getpid()}x{secrets.token_hex(6)}_"
    yield name
    for path in SHM.glob(f"{name}*"):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


def make(name: str, nbytes: int = 8192) -> Path:
    path = SHM / name
    path.write_bytes(b"x" * nbytes)
    path.chmod(0o600)
    return path


def look(prefix: str, **terms: object) -> dict[str, foreign.Leftover]:
    """What a scan says of the test's own files, by what follows the prefix; of any age unless it is told otherwise."""
    census = foreign.scan((f"{prefix}*",), **{"min_age_s": 0.0, **terms})
    return {leftover.name.removeprefix(prefix): leftover for leftover in census.leftovers}


def user(parent: Link, path: str, how: str) -> None:
    fd = os.open(path, os.O_RDONLY if how == "reads" else os.O_RDWR)
    if how in ("maps", "both"):
        map_shared(fd)
    if how == "maps":
        os.close(fd)
    parent.send("ready")
    parent.receive()


def map_shared(fd: int) -> None:
    """Map a page of a file; Python's own mmap would keep a descriptor, too."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    address = libc.mmap(None, ctypes.c_size_t(4096), mmap.PROT_READ, mmap.MAP_SHARED, fd, ctypes.c_long(0))
    assert address != ctypes.c_void_p(-1).value


def started(child: Callable[..., Child], path: Path, how: str) -> Child:
    process = child(user, str(path), how)
    assert process.receive() == "ready"
    return process


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
    assert not foreign.remove(leftover)
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
    leftover = look(prefix)["left"]
    assert leftover.removable
    assert not foreign.remove(leftover)
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
        assert not foreign.remove(leftover)
    assert foreign.remove(leftover)


@HOST_ONLY
def test_a_name_that_means_another_file_by_now(prefix: str) -> None:
    path = make(f"{prefix}left")
    leftover = look(prefix)["left"]
    path.unlink()
    assert not foreign.remove(leftover)
    make(f"{prefix}left")
    assert not foreign.remove(leftover)
    assert path.exists()


@HOST_ONLY
def test_a_file_that_was_touched_since(prefix: str) -> None:
    path = make(f"{prefix}left")
    leftover = look(prefix)["left"]
    with path.open("r+b") as file:
        file.write(b"x")  # of the same length, and the same as before
    assert not foreign.remove(leftover)
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
    assert not foreign.remove(leftover)
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
    assert not foreign.remove(leftover)
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
    assert foreign.scan((f"{prefix}*",)).leftovers[0].terms.min_age_s == foreign.MIN_AGE_S


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
@pytest.mark.parametrize("other", ["symlink", "folder", "fifo"])
def test_what_is_no_file_any_more_stays(prefix: str, tmp_path: Path, other: str) -> None:
    path = make(f"{prefix}left")
    leftover = look(prefix)["left"]
    path.unlink()
    {"symlink": lambda: path.symlink_to(tmp_path), "folder": path.mkdir, "fifo": lambda: os.mkfifo(path)}[other]()
    assert not foreign.remove(leftover)
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


# ---- other users


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: gives a file to another user")
def test_a_file_of_another_user(prefix: str, child: Callable[..., Child]) -> None:
    path = make(f"{prefix}theirs")
    os.chown(path, 65534, 65534)
    process = child(as_nobody, prefix)
    answer = process.receive()
    assert answer == {"removable": procfs.in_initial_pid_namespace(), "removed": procfs.in_initial_pid_namespace()}
    assert path.exists() is not procfs.in_initial_pid_namespace()


def as_nobody(parent: Link, prefix: str) -> None:
    """The owner of a file, who may not look at all processes, may remove it: the kernel says that nobody uses it."""
    os.setgid(65534)
    os.setuid(65534)
    leftover = look(prefix)["theirs"]
    assert "the kernel is asked" in leftover.reason or not leftover.removable
    parent.send({"removable": leftover.removable, "removed": foreign.remove(leftover)})


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: looks as another user")
def test_who_may_not_look_says_so(prefix: str, child: Callable[..., Child]) -> None:
    path = make(f"{prefix}used")
    child(stranger, prefix).join()
    assert path.exists()


def stranger(parent: Link, prefix: str) -> None:
    os.setgid(65534)
    os.setuid(65534)
    census = foreign.scan((f"{prefix}*",), min_age_s=0.0, sole_pid_namespace=True)
    assert not census.complete
    assert "could not be looked at" in census.why
    assert "run as root" in census.why
    assert "belongs to uid 0, this is uid 65534" in census.leftovers[0].reason
    assert not foreign.remove(census.leftovers[0])


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: looks as another user")
@HOST_ONLY
def test_what_a_user_may_not_look_at_is_still_a_user(prefix: str, child: Callable[..., Child]) -> None:
    path = make(f"{prefix}theirs")
    started(child, path, "maps")  # of root, which nobody may not look at
    os.chown(path, 65534, 65534)
    process = child(as_nobody, prefix)
    assert process.receive() == {"removable": True, "removed": False}
    assert path.exists()


# ---- other pid namespaces


def unshared(code: str) -> list[str]:
    """Run Python in a pid namespace of its own, over the same /dev/shm; skips where that is not allowed."""
    if os.geteuid() != 0:
        pytest.skip("needs root: makes a pid namespace")
    if not shutil.which("unshare"):
        pytest.skip("needs unshare(1): makes a pid namespace")
    inside = ["unshare", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*inside, "true"], capture_output=True).returncode != 0:
        pytest.skip("this root may not make a pid namespace")
    return subprocess.run(
        [*inside, sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True, timeout=60
    ).stdout.split("\n")


LOOK = """
from shmcast import foreign
for sole in (False, True):
    census = foreign.scan(("{prefix}*",), min_age_s=0.0, sole_pid_namespace=sole)
    leftover, = census.leftovers
    print(census.complete, leftover.removable, len(leftover.users), foreign.remove(leftover))
    print(census.why)
"""


def test_another_pid_namespace_is_refused(prefix: str) -> None:
    path = make(f"{prefix}left")
    said = unshared(LOOK.format(prefix=prefix))
    assert said[0] == "False False 0 False"
    assert "can not see every process" in said[1]
    assert "--sole-pid-namespace" in said[1]
    # what the caller vouches for is believed, and nobody has the file open
    assert said[2] == "True True 0 True"
    assert not path.exists()


def test_a_wrong_word_about_the_pid_namespace_costs_nothing(prefix: str, child: Callable[..., Child]) -> None:
    path = make(f"{prefix}used")
    started(child, path, "maps")
    assert unshared(LOOK.format(prefix=prefix))[2] == "True True 0 False"
    assert path.exists()


def test_a_user_in_another_pid_namespace_is_seen_from_the_host(prefix: str) -> None:
    if not procfs.in_initial_pid_namespace():
        pytest.skip("not in the initial pid namespace")
    path = make(f"{prefix}used")
    code = (
        "from shmcast import foreign; import os, sys, subprocess;"
        f"fd = os.open({str(path)!r}, os.O_RDWR); print('ready', flush=True); sys.stdin.read()"
    )
    unshared("pass")
    with subprocess.Popen(
        ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", code],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        leftover = look(prefix)["used"]
        assert [found.how for found in leftover.users] == ["opens"]
        assert not foreign.remove(leftover)
        with contextlib.suppress(BrokenPipeError):
            process.communicate(timeout=60)


# ---- reading /proc


def test_mounts() -> None:
    text = "22 1 0:21 / /dev/sh\\040m rw,nosuid shared:2 master:1 - tmpfs tmpfs rw,size=65536k\nnonsense\n"
    mount, *others = procfs.mounts(text)
    assert others == []
    assert (mount.device, mount.point, mount.kind) == (os.makedev(0, 21), "/dev/sh m", "tmpfs")
    assert mount.options == ("rw", "nosuid", "rw", "size=65536k")
    assert any(mount.point == "/" for mount in procfs.mounts())


def test_hidepid_is_incomplete(monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    make(f"{prefix}left")
    seen = [*procfs.mounts(), procfs.Mount(0, "/proc", "proc", ("rw", "hidepid=invisible"))]
    monkeypatch.setattr(procfs, "mounts", lambda: seen)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    census = foreign.scan((f"{prefix}*",), min_age_s=0.0)
    assert not census.complete
    assert "hidepid" in census.why


def test_a_directory_that_is_no_tmpfs_is_refused(monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    path = make(f"{prefix}left")
    monkeypatch.setattr(procfs, "mounts", list)
    leftover = look(prefix)["left"]
    assert "is not a tmpfs" in leftover.reason
    assert not foreign.remove(leftover)
    assert path.exists()


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
