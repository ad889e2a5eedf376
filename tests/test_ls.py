"""`shmcast ls`: what is there, from outside, while real processes hold it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shmcast
from child import Child, Link
from shmcast import _native, looks, names, procfs
from shmcast.cli import main as cli

SHM = Path("/dev/shm")
ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: runs a process as another user")


def owner(parent: Link, count: int) -> None:
    with shmcast.Arena.create("4MiB", segment_bytes="1MiB", max_blocks=64) as arena:
        handles = [arena.publish(np.zeros(1000, "uint8"), readers=1) for _ in range(count)]
        parent.send([handle.to_bytes() for handle in handles])
        parent.receive()


def reader(parent: Link, raws: list[bytes]) -> None:
    leases = [shmcast.attach(raw) for raw in raws]
    parent.send("attached")
    parent.receive()
    del leases


def only(namespace: str) -> dict[str, Any]:
    (seen,) = looks.survey(namespace)
    return seen


def test_a_live_arena(namespace: str, child: Callable[..., Child]) -> None:
    publisher = child(owner, 5)
    raws = publisher.receive()
    holder = child(reader, raws[:2])
    assert holder.receive() == "attached"
    seen = only(namespace)
    assert seen["namespace"] == namespace
    assert seen["arena"] == f"{shmcast.Handle.from_bytes(raws[0]).arena:016x}"
    assert (seen["state"], seen["why"]) == ("live", "its owner is alive")
    assert (seen["uid"], seen["mode"], seen["segments"]) == (os.getuid(), "0600", 1)
    assert seen["max_bytes"] == 4 << 20
    assert seen["reserved_bytes"] == 1 << 20
    assert seen["file_bytes"] > seen["reserved_bytes"]
    assert seen["used_bytes"] == seen["peak_used_bytes"] == 5 * 1024
    assert seen["blocks"] == {"claimed": 5, "held": 2, "granted": 3, "awaited": 3, "entrusted": 0, "free": 59}
    assert 0 <= seen["age_s"] < 3600
    assert (seen["owner"]["pid"], seen["owner"]["alive"], seen["owner"]["state"]) == (publisher.pid, True, "running")
    (held,) = seen["holders"]
    assert (held["pid"], held["holds"], held["held_bytes"], held["alive"]) == (holder.pid, 2, 2000, True)
    assert "child.py" in held["command"]


def test_a_stopped_owner_is_alive(namespace: str, child: Callable[..., Child]) -> None:
    publisher = child(owner, 1)
    publisher.receive()
    publisher.signal(signal.SIGSTOP)
    os.waitid(os.P_PID, publisher.pid, os.WSTOPPED | os.WNOWAIT)
    seen = only(namespace)
    assert (seen["state"], seen["owner"]["alive"], seen["owner"]["state"]) == ("live", True, "stopped")


def test_a_dead_owner_and_a_live_reader(namespace: str, child: Callable[..., Child]) -> None:
    publisher = child(owner, 2)
    holder = child(reader, publisher.receive())
    assert holder.receive() == "attached"
    publisher.kill()
    seen = only(namespace)
    assert seen["state"] == "dead"
    assert seen["why"] == "its owner is dead: the next sweep removes it; 1 live reader keeps what it has mapped"
    assert (seen["owner"]["alive"], seen["owner"]["state"]) == (False, "gone")
    assert [peer["holds"] for peer in seen["holders"]] == [2]
    before = sorted(SHM.glob(f"shmcast.{namespace}.*"))
    assert looks.survey(namespace)[0]["state"] == "dead"
    assert sorted(SHM.glob(f"shmcast.{namespace}.*")) == before
    shmcast.sweep()
    assert looks.survey(namespace) == []


def test_a_zombie_is_dead_by_its_lock(namespace: str, child: Callable[..., Child]) -> None:
    publisher = child(owner, 1)
    publisher.receive()
    publisher.signal(signal.SIGKILL)
    os.waitid(os.P_PID, publisher.pid, os.WEXITED | os.WNOWAIT)
    seen = only(namespace)
    assert (seen["state"], seen["owner"]["alive"], seen["owner"]["state"]) == ("dead", False, "zombie")
    publisher.kill()
    shmcast.sweep()


def test_a_pid_that_is_another_process_by_now(namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with shmcast.Arena.create("1MiB"):
        monkeypatch.setattr(procfs, "start_ticks", lambda pid: 1)
        assert only(namespace)["owner"]["state"] == "elsewhere"


def test_what_is_no_arena_yet_or_any_more(namespace: str) -> None:
    made = [names.segment_name(namespace, arena, number) for arena, number in ((1, 0), (2, 3), (3, 0))]
    for name in made:
        os.close(names.create(name))
    (SHM / made[2][1:]).write_bytes(b"\1" * 100_000)
    states = {int(seen["arena"], 16): (seen["state"], seen["why"]) for seen in looks.survey(namespace)}
    assert states[1] == ("starting", "it is being made; where its maker died over it, the next sweep removes it")
    assert states[2] == ("orphan", "its control segment is gone: the next sweep removes the rest")
    assert states[3][0] == "damaged"
    assert "magic" in states[3][1]
    for name in made:
        names.unlink(name)


def test_a_symbolic_link_is_not_followed(namespace: str, tmp_path: Path) -> None:
    path = SHM / names.segment_name(namespace, 1, 0)[1:]
    path.symlink_to(tmp_path)
    assert only(namespace)["state"] == "damaged"
    path.unlink()


@ROOT_ONLY
def test_an_arena_of_another_user(namespace: str, child: Callable[..., Child]) -> None:
    with shmcast.Arena.create("1MiB"):
        assert child(stranger, namespace).receive() == ("unreadable", 0)


def stranger(parent: Link, namespace: str) -> None:
    os.setgroups(())
    os.setgid(65534)
    os.setuid(65534)
    (seen,) = looks.survey(namespace)
    assert "blocks" not in seen
    parent.send((seen["state"], seen["uid"]))


# ---- the look itself


def test_looking_needs_no_right_to_write(namespace: str) -> None:
    with shmcast.Arena.create("1MiB") as arena:
        fd = names.open_readable(names.segment_name(namespace, arena.id, 0))
        seen = _native.inspect(fd)
        os.close(fd)
        assert seen["arena_id"] == arena.id
        assert [peer["alive"] for peer in seen["peers"]] == [True]


@pytest.mark.parametrize("length", [0, 1, 4095, 4096, 20480, 50_000])
def test_a_control_segment_that_was_cut(namespace: str, child: Callable[..., Child], length: int) -> None:
    publisher = child(owner, 1)
    publisher.receive()
    publisher.kill()
    (found,) = [found for found in names.listing(namespace) if found.number == 0]
    os.truncate(SHM / names.segment_name(namespace, found.arena, 0)[1:], length)
    assert only(namespace)["state"] in ("damaged", "starting")
    for found in names.listing(namespace):
        names.unlink(names.segment_name(namespace, found.arena, found.number))


def cutter(parent: Link, path: str, length: int) -> None:
    """Cuts a file and makes it whole again, until it is told to end."""
    whole = Path(path).read_bytes()
    fd = os.open(path, os.O_RDWR)
    parent.send("ready")
    os.set_blocking(parent._read_fd, False)
    while True:
        os.ftruncate(fd, length)
        os.pwrite(fd, whole, 0)
        try:
            os.read(parent._read_fd, 1)
            return
        except BlockingIOError:
            continue


def test_a_control_segment_that_is_cut_while_we_look(namespace: str, child: Callable[..., Child]) -> None:
    """A mapping would be SIGBUS for whoever looks."""
    publisher = child(owner, 1)
    publisher.receive()
    publisher.kill()
    (found,) = [found for found in names.listing(namespace) if found.number == 0]
    process = child(cutter, str(SHM / names.segment_name(namespace, found.arena, 0)[1:]), 8192)
    assert process.receive() == "ready"
    states = set()
    for _ in range(20_000):
        states.add(only(namespace)["state"])
        if {"dead", "damaged"} <= states:
            break
    assert states <= {"dead", "damaged", "starting"}
    process.join()
    for found in names.listing(namespace):
        names.unlink(names.segment_name(namespace, found.arena, found.number))


# ---- the command


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "shmcast", *arguments], capture_output=True, text=True, timeout=60)


def test_the_command(namespace: str, child: Callable[..., Child]) -> None:
    publisher = child(owner, 3)
    holder = child(reader, publisher.receive()[:1])
    assert holder.receive() == "attached"
    done = run("ls", "--namespace", namespace, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    (seen,) = json.loads(done.stdout)
    assert (seen["state"], seen["owner"]["pid"]) == ("live", publisher.pid)
    text = run("ls", "--namespace", namespace).stdout
    for part in (
        namespace, seen["arena"], "live: its owner is alive", f"pid {publisher.pid}", "alive by its lock, running",
        "3.0 KiB used", "1.0 MiB reserved in 1 segments", "4.0 MiB allowed", "3 live: 1 held, 2 promised (2 to anybody",
        f"pid {holder.pid}", "holds 1 (1000 B), promised 0",
    ):  # fmt: skip
        assert part in text


def test_all_namespaces(namespace: str, capsys: pytest.CaptureFixture[str]) -> None:
    with shmcast.Arena.create("1MiB"):
        assert cli.main(["ls", "--json"]) == 0
        assert namespace in {seen["namespace"] for seen in json.loads(capsys.readouterr().out)}


def test_nothing_there(namespace: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ls", "--namespace", namespace]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == ("", "no arenas in /dev/shm\n")
    assert cli.main(["ls", "--namespace", namespace, "--json"]) == 0
    assert capsys.readouterr().out == "[]\n"


def test_unreadable_and_orphaned_arenas_have_a_line(namespace: str, capsys: pytest.CaptureFixture[str]) -> None:
    name = names.segment_name(namespace, 2, 3)
    os.close(names.create(name))
    assert cli.main(["ls", "--namespace", namespace]) == 0
    assert "orphan: its control segment is gone" in capsys.readouterr().out
    names.unlink(name)


@pytest.mark.parametrize("arguments", [[], ["what"], ["ls", "--namespace", "a/b"], ["doctor", "--expect", "many"]])
def test_a_wrong_command_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 64
    assert "shmcast" in capsys.readouterr().err


def test_nobody_reads_on(namespace: str) -> None:
    command = [sys.executable, "-m", "shmcast", "ls"]
    with (
        shmcast.Arena.create("1MiB"),
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process,
    ):
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
        assert process.wait(60) == 0
