"""Leftovers of others: whose they are, who may look at whom, and from which namespace."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from child import Child, Link
from leftovers import HOST_ONLY, look, make, own_names, removed, started
from shmcast import foreign, procfs


@pytest.fixture
def prefix() -> Iterator[str]:
    yield from own_names()


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
    parent.send({"removable": leftover.removable, "removed": removed(leftover)})


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


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: looks as another user")
def test_a_zombie_uses_nothing_whosever_it_is(child: Callable[..., Child]) -> None:
    process = child(sleeper)
    process.signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert procfs.state(process.pid) == "zombie"
    assert child(looks_at, process.pid).receive() == (set(), set(), True)
    process.kill()


def sleeper(parent: Link) -> None:
    parent.receive()


def looks_at(parent: Link, pid: int) -> None:
    os.setgid(65534)
    os.setuid(65534)
    parent.send(foreign._used_by(pid, {(1, 1)}))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: looks as another user")
@HOST_ONLY
def test_a_file_that_can_not_be_read_is_not_removable(prefix: str, child: Callable[..., Child]) -> None:
    path = make(f"{prefix}theirs")
    os.chown(path, 65534, 65534)
    path.chmod(0)
    assert child(reads_not, prefix).receive() == (
        False, "it can not be opened for reading (mode 0000), so that the kernel can not be asked",
    )  # fmt: skip


def reads_not(parent: Link, prefix: str) -> None:
    os.setgid(65534)
    os.setuid(65534)
    leftover = look(prefix)["theirs"]
    parent.send((leftover.removable, leftover.reason))


def test_advice_is_for_who_asks(monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    make(f"{prefix}left")

    def advice(uid: int, at_home: bool, capable: bool) -> str:
        monkeypatch.setattr(os, "geteuid", lambda: uid)
        monkeypatch.setattr(procfs, "in_initial_user_namespace", lambda: at_home)
        monkeypatch.setattr(procfs, "capable", lambda number: capable)
        return foreign.scan((f"{prefix}*",), sole_pid_namespace=True).why

    monkeypatch.setattr(foreign, "_hidden", lambda: False)
    monkeypatch.setattr(foreign, "_users", lambda files: foreign._Users({}, 1))
    refused = "1 process could not be looked at (no permission); "
    assert advice(1000, True, False) == f"{refused}run as root"
    assert advice(0, True, False) == f"{refused}this root has no CAP_SYS_PTRACE (docker run --cap-add SYS_PTRACE)"
    assert advice(0, False, True) == f"{refused}run as root outside of this user namespace"
    assert advice(0, True, True).startswith(f"{refused}this is root with CAP_SYS_PTRACE: something else forbids it")
    monkeypatch.setattr(foreign, "_users", lambda files: foreign._Users({}, 0, complete=False))
    assert advice(0, True, True) == "processes start faster than they can be looked at"


def test_processes_that_start_faster_than_they_are_looked_at(monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    make(f"{prefix}left")
    starting = itertools.count(1 << 40)  # no pid is as large: gone when it is looked at
    monkeypatch.setattr(procfs, "pids", lambda: [next(starting)])
    census = foreign.scan((f"{prefix}*",), sole_pid_namespace=True)
    assert (census.complete, census.why) == (False, "processes start faster than they can be looked at")


def test_who_may_not_lease_it_is_told_what_he_lacks(monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    make(f"{prefix}left")
    monkeypatch.setattr(procfs, "in_initial_pid_namespace", lambda: True)
    uid = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    monkeypatch.setattr(procfs, "in_initial_user_namespace", lambda: True)
    monkeypatch.setattr(procfs, "capable", lambda number: False)
    told = f"it belongs to uid {uid}, this is uid {uid + 1}; run as that user, or as root "
    assert look(prefix)["left"].reason == f"{told}with CAP_LEASE and CAP_FOWNER"
    monkeypatch.setattr(procfs, "capable", lambda number: True)
    assert look(prefix)["left"].removable
    monkeypatch.setattr(procfs, "in_initial_user_namespace", lambda: False)
    assert look(prefix)["left"].reason == f"{told}outside of this user namespace"


# ---- other user namespaces


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: gives a file to another user")
@HOST_ONLY
def test_root_of_a_user_namespace_may_remove_its_own_alone(prefix: str) -> None:
    """Its capabilities do not count for the files of others, though it has them all."""
    theirs, mine = make(f"{prefix}theirs"), make(f"{prefix}zmine")
    os.chown(theirs, 12345, 12345)
    if not shutil.which("unshare") or subprocess.run(["unshare", "-Ur", "true"], capture_output=True).returncode != 0:
        pytest.skip("no user namespace can be made here")
    code = (
        f"from shmcast import foreign\ncensus = foreign.scan(('{prefix}*',), min_age_s=0.0)\n"
        "for one in census.leftovers: print(one.removable, one.reason)\nprint(foreign.remove(census.leftovers[1]))"
    )
    said = subprocess.run(
        ["unshare", "-Ur", sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True, timeout=60
    ).stdout.splitlines()
    assert said[0].startswith("False it belongs to a user whom this user namespace does not know; run as ")
    assert said[1].startswith("True ")
    assert said[2:] == ["True"]
    assert (theirs.exists(), mine.exists()) == (True, False)


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
def removed(leftover):
    try:
        return foreign.remove(leftover)
    except OSError:
        return False
for sole in (False, True):
    census = foreign.scan(("{prefix}*",), min_age_s=0.0, sole_pid_namespace=sole)
    leftover, = census.leftovers
    print(census.complete, leftover.removable, len(leftover.users), removed(leftover))
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
    monkeypatch.setattr(procfs, "capable", lambda number: False)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert foreign.scan((f"{prefix}*",), min_age_s=0.0).why.endswith(
        "processes of other users are not shown; run as root"
    )
    for option, gid, hides in (
        ("hidepid=noaccess", 7, False), ("hidepid=2", 7, True), ("hidepid=2", os.getegid(), False),
        ("hidepid=ptraceable", os.getegid(), True),
    ):  # fmt: skip
        seen[-1] = seen[-1]._replace(options=("rw", option, f"gid={gid}"))
        assert ("hidepid" in foreign.scan((f"{prefix}*",), min_age_s=0.0).why) is hides


def test_a_directory_that_is_no_tmpfs_is_refused(monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    path = make(f"{prefix}left")
    monkeypatch.setattr(procfs, "mounts", list)
    leftover = look(prefix)["left"]
    assert "is not a tmpfs" in leftover.reason
    assert not foreign.remove(leftover)
    assert path.exists()
