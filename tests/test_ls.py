"""`shmcast ls`: what is there, from outside, while real processes hold it."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shmcast
from child import Child, Link
from shmcast import _native, gc, looks, names, procfs
from shmcast.cli import main as cli

SHM = Path("/dev/shm")
OTHER_UID = 54321
"""Of nobody who sweeps meanwhile."""
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
    assert (seen["state"], seen["verdict"], seen["reason"]) == ("live", "keep", "owner-alive")
    assert seen["why"].startswith(f"its owner is alive: pid {publisher.pid}, ")
    assert seen["removable_bytes"] == 0
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
    assert seen["why"].endswith(", and paused")


def test_a_dead_owner_and_a_live_reader(namespace: str, child: Callable[..., Child]) -> None:
    publisher = child(owner, 2)
    holder = child(reader, publisher.receive())
    assert holder.receive() == "attached"
    publisher.kill()
    seen = only(namespace)
    assert seen["state"] == "dead"
    assert seen["why"].startswith(f"its owner is dead: pid {publisher.pid}, ")
    assert seen["why"].endswith("; the next sweep removes it; 1 live reader keeps what it has mapped")
    assert (seen["verdict"], seen["removable_bytes"]) == ("remove", seen["file_bytes"])
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
    assert states[1] == ("dead", "its creator died before it was ready; the next sweep removes it")
    assert states[2] == ("orphan", "data without a control segment: its arena is gone; the next sweep removes it")
    assert states[3][0] == "damaged"
    assert "magic" in states[3][1]
    assert states[3][1].endswith("; the next sweep removes it")
    fd = names.open_writable(made[0])
    assert _native.take_owner_byte(fd)
    seen = next(seen for seen in looks.survey(namespace) if int(seen["arena"], 16) == 1)
    assert (seen["state"], seen["verdict"], seen["why"]) == ("starting", "keep", "its creator is at work")
    os.close(fd)
    for name in made:
        names.unlink(name)


def test_a_symbolic_link_is_not_followed(namespace: str, tmp_path: Path) -> None:
    path = SHM / names.segment_name(namespace, 1, 0)[1:]
    path.symlink_to(tmp_path)
    seen = only(namespace)
    assert (seen["state"], seen["verdict"], seen["why"]) == ("damaged", "keep", "a symlink, which we never make")
    path.unlink()


@ROOT_ONLY
def test_an_arena_of_another_user(namespace: str, child: Callable[..., Child]) -> None:
    with shmcast.Arena.create("1MiB"):
        assert child(stranger, namespace).receive() == (
            "unreadable", 0, "of user 0; this is user 65534; look as that user, or as root"
        )  # fmt: skip


def stranger(parent: Link, namespace: str) -> None:
    os.setgroups(())
    os.setgid(65534)
    os.setuid(65534)
    (seen,) = looks.survey(namespace)
    assert "blocks" not in seen
    parent.send((seen["state"], seen["uid"], seen["why"]))


# ---- what a sweep does about it: `gc` decides, and nobody else


def put(namespace: str, arena: int, number: int, data: bytes) -> Path:
    path = SHM / names.segment_name(namespace, arena, number)[1:]
    path.write_bytes(data)
    path.chmod(0o600)
    return path


def control_of(namespace: str) -> bytes:
    (found,) = [found for found in names.listing(namespace) if found.number == names.CONTROL]
    return (SHM / names.segment_name(*found)[1:]).read_bytes()


def of_format(raw: bytes, number: int) -> bytes:
    return raw[:8] + struct.pack("<I", number) + raw[12:]


def odd_things(namespace: str, other: str) -> None:
    """All that may lie under our names, beside an arena that is alive; of another user as well where we may."""
    raw = control_of(namespace)
    put(namespace, 0x10, 0, raw)
    put(namespace, 0x11, 0, b"")
    put(namespace, 0x12, 0, raw[:100])
    put(namespace, 0x14, 0, raw[: len(raw) // 2])
    put(namespace, 0x15, 0, of_format(raw, _native.FORMAT + 1))
    put(namespace, 0x16, 0, of_format(raw, _native.FORMAT - 1))
    put(namespace, 0x17, 0, b"\xff" * len(raw))
    os.mkfifo(put(namespace, 0x18, 1, b"x").with_suffix(".0"))
    put(namespace, 0x19, 1, b"x").with_suffix(".0").mkdir()
    put(namespace, 0x1A, 1, b"x").with_suffix(".0").symlink_to("/etc/passwd")
    put(namespace, 0x1B, 0, raw).with_suffix(".1").mkdir()
    put(namespace, 0x1B, 2, b"x")
    put(namespace, 0x1C, 5, b"xyz")
    put(namespace, 0x1C, 6, b"z").with_suffix(".7").mkdir()
    (SHM / names.segment_name(namespace, 0x1D, 1)[1:]).mkdir()
    for arena, number in ((0x20, 0), (0x21, 1), (0x22, 1)) if os.geteuid() == 0 else ():
        os.chown(put(other, arena, number, raw), OTHER_UID, OTHER_UID)
    if os.geteuid() == 0:
        put(other, 0x22, 0, raw)


def clear(*namespaces: str) -> None:
    for namespace in namespaces:
        for path in SHM.glob(f"shmcast.{namespace}.*"):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


def test_what_is_said_of_everything_is_what_a_sweep_does(namespace: str, child: Callable[..., Child]) -> None:
    other = f"{namespace}-b"
    publisher = child(owner, 1)
    publisher.receive()
    try:
        odd_things(namespace, other)
        for space in (namespace, other):
            said = {arena["arena"]: arena for arena in looks.survey(space)}
            assert {arena["verdict"] for arena in said.values()} <= {"keep", "remove"}
            for arena in said.values():
                assert ("the next sweep removes it" in arena["why"]) == (arena["verdict"] == "remove"), arena
            done = gc.apply(gc.plan(gc.scan(space, closely=True)))
            went: dict[str, int] = {}
            for one in done.removed:
                went[f"{one.key[1]:016x}"] = went.get(f"{one.key[1]:016x}", 0) + one.nbytes
            assert done.failed == ()
            assert went == {arena: one["removable_bytes"] for arena, one in said.items() if one["verdict"] == "remove"}
            assert set(said) >= set(went)
    finally:
        clear(namespace, other)
        publisher.kill()


def test_an_arena_of_a_newer_build(namespace: str, child: Callable[..., Child]) -> None:
    """Dead as far as this build can tell, which a sweep does not trust."""
    publisher = child(owner, 1)
    publisher.receive()
    (found,) = [found for found in names.listing(namespace) if found.number == 0]
    path = SHM / names.segment_name(*found)[1:]
    with path.open("r+b") as file:
        file.seek(8)
        file.write(struct.pack("<I", _native.FORMAT + 1))
    seen = only(namespace)
    assert (seen["state"], seen["verdict"], seen["reason"]) == ("unreadable", "keep", "owner-alive")
    assert seen["why"].startswith("its owner is alive; ")
    assert f"format {_native.FORMAT + 1}, this build reads {_native.FORMAT}" in seen["why"]
    publisher.kill()
    seen = only(namespace)
    assert (seen["state"], seen["verdict"], seen["reason"]) == ("unreadable", "keep", "newer-format")
    assert "sweep it with that build" in seen["why"]
    assert "next sweep" not in seen["why"]
    clear(namespace)


def test_what_is_damaged_is_asked_for_its_lock(namespace: str, child: Callable[..., Child]) -> None:
    publisher = child(owner, 1)
    publisher.receive()
    (found,) = [found for found in names.listing(namespace) if found.number == 0]
    with (SHM / names.segment_name(*found)[1:]).open("r+b") as file:
        file.write(b"\1" * 8)
    seen = only(namespace)
    assert (seen["state"], seen["verdict"], seen["reason"]) == ("damaged", "keep", "at-work")
    publisher.kill()
    seen = only(namespace)
    assert (seen["state"], seen["verdict"], seen["reason"]) == ("damaged", "remove", "unfinished")
    shmcast.sweep()


def test_a_folder_of_that_name_is_no_orphan(namespace: str) -> None:
    path = SHM / names.segment_name(namespace, 2, 1)[1:]
    path.mkdir()
    try:
        seen = only(namespace)
    finally:
        path.rmdir()
    assert (seen["state"], seen["verdict"], seen["why"]) == ("damaged", "keep", "a directory, which we never make")
    assert (seen["segments"], seen["file_bytes"], seen["removable_bytes"]) == (0, 0, 0)


def test_what_can_not_be_opened_though_it_is_ours(namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, *, anybodys: bool = False) -> int:
        raise PermissionError(13, "open segment: it belongs to another user", name)

    with shmcast.Arena.create("1MiB"):
        monkeypatch.setattr(names, "open_readable", refuse)
        seen = only(namespace)
        assert (seen["state"], seen["verdict"], seen["reason"]) == ("unreadable", "keep", "unknown")
        assert "it could not be asked whether its owner is alive" in seen["why"]


def stranger_who_owns(parent: Link) -> None:
    os.setgroups(())
    os.setgid(OTHER_UID)
    os.setuid(OTHER_UID)
    with shmcast.Arena.create("1MiB"):
        parent.send("made")
        parent.receive()


@ROOT_ONLY
def test_root_reads_arenas_of_others_and_says_who_removes_them(namespace: str, child: Callable[..., Child]) -> None:
    process = child(stranger_who_owns)
    process.receive()
    of_whom = f"; of user {OTHER_UID}; this is user 0"

    def said() -> dict[bool, dict[str, Any]]:
        found = {int(seen["arena"], 16) == 2: seen for seen in looks.survey(namespace)}
        for seen in found.values():
            assert (seen["verdict"], seen["reason"], seen["removable_bytes"]) == ("keep", "other-user", 0)
        return found

    live = said()[False]
    assert live["state"] == "live"
    assert live["why"].startswith(f"its owner is alive: pid {process.pid}, ")
    assert live["why"].endswith(of_whom)
    process.kill()
    os.chown(put(namespace, 2, 3, b"x"), OTHER_UID, OTHER_UID)
    found = said()
    assert found[False]["state"] == "dead"
    assert found[False]["why"].endswith(f"{of_whom}: the next sweep of that user removes it")
    assert found[True]["state"] == "orphan"
    assert found[True]["why"] == (
        f"data without a control segment: its arena is gone{of_whom}: the next sweep of that user removes it"
    )
    shmcast.sweep()
    assert len(said()) == 2
    clear(namespace)


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
    seen = only(namespace)
    assert (seen["state"], seen["verdict"]) == ("damaged" if length else "dead", "remove")
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
        namespace, seen["arena"], "live: its owner is alive: ", f"pid {publisher.pid}", "alive by its lock, running",
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
    assert "orphan: data without a control segment" in capsys.readouterr().out
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
