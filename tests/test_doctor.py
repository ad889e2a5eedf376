"""`shmcast doctor`: hosts as they are found in the field, and this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

import shmcast
from shmcast import doctor, foreign, host, looks
from shmcast.cli import main as cli
from shmcast.doctor import System

GiB = 1 << 30
FEATURES = {"OFD locks": True, "futex": True, "PAGEMAP_SCAN": True}
HEALTHY = System(limits={"nofile": 65536, "as": None, "memlock": None}, features=FEATURES)


def of(system: System, check: str, expect: int | None = None) -> list[doctor.Finding]:
    return [finding for finding in doctor.judge(system, expect) if finding.check == check]


def level(system: System, check: str, expect: int | None = None) -> str:
    (finding,) = of(system, check, expect)
    return finding.level


def arena(state: str = "live", **figures: Any) -> dict[str, Any]:
    """As `looks` describes it to its own user."""
    reason = {"live": "owner-alive", "dead": "owner-dead", "orphan": "no-control", "unreadable": "other-user"}[state]
    goes = state in ("dead", "orphan")
    return {
        "state": state, "namespace": "n", "arena": "0" * 16, "why": "w", "uid": 0, "reason": reason,
        "max_bytes": 4 * GiB, "reserved_bytes": GiB, "file_bytes": GiB, "removable_bytes": GiB if goes else 0,
        "verdict": "remove" if goes else "keep", **figures,
    }  # fmt: skip


def kept(state: str, reason: str, **figures: Any) -> dict[str, Any]:
    return {**arena(), "state": state, "reason": reason, **figures}


def left(name: str, removable: bool = True, users: tuple[foreign.User, ...] = ()) -> foreign.Leftover:
    return foreign.Leftover(name, 1 << 20, 1e6, 0, users, removable, "reason")


def test_a_healthy_host() -> None:
    findings = doctor.judge(HEALTHY, 4 * GiB)
    assert {finding.level for finding in findings} == {"ok"}
    assert doctor.status(findings) == 0


def test_every_complaint_says_why_and_what_mends_it() -> None:
    for system, expect in [(sick, expect) for sick, _, _, expect in SICK]:
        for finding in doctor.judge(system, expect):
            assert finding.what
            assert (finding.level == "ok") == (finding.why == "") == (finding.mend == "")


SICK: list[tuple[System, str, str, int | None]] = [
    (HEALTHY._replace(shm_kind=None, shm_total=0, shm_free=0), "mount", "fault", None),
    (HEALTHY._replace(shm_kind="overlay"), "mount", "fault", None),
    (HEALTHY._replace(shm_options=("ro", "size=1k")), "mount", "fault", None),
    (HEALTHY._replace(shm_total=64 << 20, shm_free=64 << 20), "size", "warning", None),
    (HEALTHY._replace(shm_total=64 << 20, shm_free=64 << 20), "size", "fault", 4 * GiB),
    (HEALTHY._replace(shm_free=2 * GiB), "size", "fault", 4 * GiB),
    (HEALTHY._replace(shm_free=GiB), "size", "warning", None),
    (HEALTHY._replace(shm_free=0), "size", "warning", None),
    (HEALTHY._replace(shm_free=5 * GiB, arenas=(arena(), arena())), "growth", "warning", None),
    (HEALTHY._replace(memory_available=GiB), "memory", "warning", 4 * GiB),
    (HEALTHY._replace(memory_total=16 * GiB), "memory", "warning", None),
    (HEALTHY._replace(cgroup_limit=8 * GiB, cgroup_used=6 * GiB), "cgroup", "fault", 4 * GiB),
    (HEALTHY._replace(cgroup_limit=2 * GiB, arenas=(arena(),)), "cgroup", "warning", None),
    (HEALTHY._replace(remove_ipc=True, uid=1000), "RemoveIPC", "fault", None),
    (HEALTHY._replace(overcommit=2, commit_free=GiB), "overcommit", "fault", 4 * GiB),
    (HEALTHY._replace(overcommit=2), "overcommit", "warning", None),
    (HEALTHY._replace(shmem_huge="force"), "huge pages", "warning", None),
    (HEALTHY._replace(shm_options=("rw", "huge=always")), "huge pages", "warning", None),
    (HEALTHY._replace(limits={"nofile": 256, "as": None}), "limits", "warning", None),
    (HEALTHY._replace(limits={"nofile": 65536, "as": 6 * GiB}), "limits", "fault", 4 * GiB),
    (HEALTHY._replace(limits={"nofile": 65536, "as": 64 * GiB}), "limits", "warning", 4 * GiB),
    (HEALTHY._replace(features={**FEATURES, "OFD locks": False}), "kernel", "fault", None),
    (HEALTHY._replace(features={**FEATURES, "PAGEMAP_SCAN": False}), "kernel", "warning", None),
    (HEALTHY._replace(hash_paths=("portable",)), "hash", "warning", None),
    (HEALTHY._replace(hash_asked="portable"), "hash", "warning", None),
    (HEALTHY._replace(hash_asked="avx512"), "hash", "fault", None),
    (HEALTHY._replace(arenas=(arena("dead"), arena("orphan"))), "leftovers", "warning", None),
    (HEALTHY._replace(arenas=(kept("damaged", "at-work"),)), "builds", "warning", None),
    (HEALTHY._replace(arenas=(kept("unreadable", "owner-alive"),)), "builds", "warning", None),
    (HEALTHY._replace(shm_trouble="uid 7 may not write there"), "mount", "fault", None),
    (HEALTHY._replace(variables={"SHMCAST_MAX_BYTES": "500GiB"}), "size", "fault", None),
    (HEALTHY._replace(variables={"SHMCAST_MAX_BYTES": "lots"}), "settings", "fault", None),
    (HEALTHY._replace(variables={"SHMCAST_MAX_BYTES": "100"}), "settings", "fault", None),
    (HEALTHY._replace(variables={"SHMCAST_MAX_BYTES": "9" * 400 + ".5GiB"}), "settings", "fault", None),
    (HEALTHY._replace(variables={"SHMCAST_NAMESPACE": "a/b"}), "settings", "fault", None),
    (HEALTHY._replace(census=foreign.Census((left("psm_1"),), True, "")), "leftovers of others", "warning", None),
]


@pytest.mark.parametrize(("system", "check", "expected", "expect"), SICK)
def test_a_sick_host(system: System, check: str, expected: str, expect: int | None) -> None:
    assert level(system, check, expect) == expected
    assert doctor.status(doctor.judge(system, expect)) == (2 if expected == "fault" else 1) or check in (
        "mount",
        "size",
    )


FINE: list[tuple[System, str, int | None]] = [
    (HEALTHY._replace(shm_free=5 * GiB), "size", 4 * GiB),
    (HEALTHY._replace(cgroup_limit=8 * GiB, cgroup_used=GiB), "cgroup", 4 * GiB),
    (HEALTHY._replace(remove_ipc=True, uid=0), "RemoveIPC", None),
    (HEALTHY._replace(remove_ipc=True, uid=999), "RemoveIPC", None),
    (HEALTHY._replace(remove_ipc=True, uid=1000, lingers=True), "RemoveIPC", None),
    (HEALTHY._replace(remove_ipc=False, uid=1000), "RemoveIPC", None),
    (HEALTHY._replace(overcommit=1), "overcommit", 4 * GiB),
    (HEALTHY._replace(shm_options=("rw", "huge=always"), shmem_huge="deny"), "huge pages", None),
    (HEALTHY._replace(limits={"nofile": None, "as": None}), "limits", None),
    (HEALTHY._replace(arenas=(arena("live"), arena("unreadable"))), "leftovers", None),
    (HEALTHY._replace(arenas=(kept("dead", "other-user"), kept("orphan", "other-user"))), "leftovers", None),
    (HEALTHY._replace(arenas=(kept("damaged", "no-file"), kept("unreadable", "newer-format"))), "leftovers", None),
    (HEALTHY._replace(shm_total=0, shm_free=0), "size", 4 * GiB),
    (HEALTHY._replace(variables={"SHMCAST_MAX_BYTES": "4GiB"}), "size", None),
    (HEALTHY._replace(variables={"SHMCAST_MAX_BYTES": "500GiB"}), "size", 4 * GiB),
    (HEALTHY._replace(features={"OFD locks": True}), "kernel", None),
    (HEALTHY._replace(census=foreign.Census((left("psm_1", False),), False, "w")), "leftovers of others", None),
]


@pytest.mark.parametrize(("system", "check", "expect"), FINE)
def test_what_is_no_complaint(system: System, check: str, expect: int | None) -> None:
    assert level(system, check, expect) == "ok"


def test_the_advice_has_the_size_that_is_needed() -> None:
    docker = HEALTHY._replace(shm_total=64 << 20, shm_free=64 << 20)
    (finding,) = of(docker, "size", 6 * GiB + 1)
    assert "--shm-size=7g" in finding.mend
    assert "medium: Memory" in finding.mend
    assert "6442450945 bytes" in finding.what


def test_a_file_in_use_is_no_leftover() -> None:
    used = left("psm_1", False, (foreign.User(1, "x", "maps"),))
    (finding,) = of(HEALTHY._replace(census=foreign.Census((used,), True, "")), "leftovers of others")
    assert (finding.level, finding.what) == ("ok", "1 files of others")


def test_only_what_this_users_sweep_removes_is_a_leftover() -> None:
    """What a stranger has put there is no reason to complain to everybody: shmcast-gc would not help."""
    others = (kept("damaged", "no-file", arena="2" * 16, why="a directory, which we never make"),
              kept("dead", "other-user"), kept("unreadable", "newer-format"))  # fmt: skip
    (finding,) = of(HEALTHY._replace(arenas=others), "leftovers")
    assert finding.what == (
        "0 live arenas, nothing of dead processes that shmcast-gc would remove; 3 stay, such as n 2222222222222222: a "
        "directory, which we never make"
    )
    assert doctor.status(doctor.judge(HEALTHY._replace(arenas=others))) == 0
    (finding,) = of(HEALTHY._replace(arenas=(*others, arena("dead", removable_bytes=5))), "leftovers")
    assert (finding.level, finding.mend) == ("warning", "shmcast-gc --once")
    assert finding.what.startswith("1 arenas of dead processes, 5 bytes long together (namespaces n); 3 stay, such as ")


def test_what_a_strangers_arena_says_is_roots_business() -> None:
    boastful = HEALTHY._replace(shm_free=20 * GiB, arenas=(arena(max_bytes=1 << 62, uid=1001),))
    assert of(boastful._replace(uid=1000), "growth") == []
    assert level(boastful, "growth") == "warning"


def test_the_configured_size_is_what_is_expected() -> None:
    system = HEALTHY._replace(variables={"SHMCAST_MAX_BYTES": "40GiB"}, namespace="n")
    (finding,) = of(system, "size")
    assert (finding.level, f"{40 * GiB} bytes (40.0 GiB) are expected to fit" in finding.what) == ("fault", True)
    assert of(system, "settings") == [doctor.Finding("ok", "settings", "SHMCAST_MAX_BYTES=40GiB, which is to fit")]
    assert of(system, "settings", GiB) == [doctor.Finding("ok", "settings", "SHMCAST_MAX_BYTES=40GiB")]
    assert level(system, "size", GiB) == "ok"


def test_a_configured_arena_that_is_there_is_not_expected_again() -> None:
    system = HEALTHY._replace(
        variables={"SHMCAST_MAX_BYTES": "4GiB"}, namespace="n", shm_total=8 * GiB, shm_free=3 * GiB
    )
    there = arena(max_bytes=4 * GiB, reserved_bytes=4 * GiB)
    assert level(system, "size") == "fault"
    assert level(system._replace(arenas=(there,)), "size") == "ok"
    assert of(system._replace(arenas=(there,)), "settings")[0].what.endswith("=4GiB, as a live arena has already")
    for other in ({"namespace": "m"}, {"max_bytes": 2 * GiB}):
        assert level(system._replace(arenas=({**there, **other},)), "size") == "fault"


def test_a_size_that_can_not_be_understood_is_said_and_raises_nothing() -> None:
    (finding,) = of(HEALTHY._replace(variables={"SHMCAST_MAX_BYTES": "lots"}), "settings")
    assert finding.what.startswith("SHMCAST_MAX_BYTES: 'lots' is not a size")
    assert finding.mend.startswith("export SHMCAST_MAX_BYTES=2GiB")


def test_no_advice_makes_it_smaller_or_larger_than_memory() -> None:
    (finding,) = of(HEALTHY._replace(shm_free=2 * GiB), "size", 4 * GiB)
    assert "remount,size=34g" in finding.mend
    (finding,) = of(HEALTHY._replace(shm_free=GiB), "size")
    assert "remount,size=64g" in finding.mend
    (finding,) = of(HEALTHY, "size", 500 * GiB)
    assert "remount" not in finding.mend
    assert "the host has 68719476736 bytes (64.0 GiB) of memory" in finding.mend


def test_docker_is_named_only_where_it_may_be_docker() -> None:
    for nbytes, named in ((64 << 20, True), (16 << 20, False)):
        (finding,) = of(HEALTHY._replace(shm_total=nbytes, shm_free=nbytes), "size")
        assert ("Docker's default" in finding.what) is named


def test_what_is_not_known_is_not_said() -> None:
    unknown = HEALTHY._replace(memory_total=0, memory_available=0, shm_total=0, shm_free=0, arenas=(arena(),))
    assert of(unknown, "memory", 4 * GiB) == of(unknown, "growth") == []
    assert of(HEALTHY._replace(shm_kind=None, shm_total=0, shm_free=0), "size", 4 * GiB) == []
    assert "no limit of its own" in of(unknown, "size")[0].what
    assert "could not be tried: MADV_DONTFORK" in of(HEALTHY, "kernel")[0].what


def test_exit_status() -> None:
    ok, warning, fault = (doctor.Finding(kind, "c", "w") for kind in ("ok", "warning", "fault"))  # type: ignore[arg-type]
    assert [doctor.status(findings) for findings in ([], [ok], [ok, warning], [warning, fault, ok])] == [0, 0, 1, 2]


# ---- reading files of other hosts


def write(base: Path, path: str, text: str) -> None:
    (base / path).parent.mkdir(parents=True, exist_ok=True)
    (base / path).write_text(text)


def test_no_logind(tmp_path: Path) -> None:
    assert host.remove_ipc(tmp_path) is None


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, True),
        ({"etc/systemd/logind.conf": "[Login]\n#RemoveIPC=no\n"}, True),
        ({"etc/systemd/logind.conf": "[Login]\nRemoveIPC=no\n"}, False),
        ({"etc/systemd/logind.conf": "RemoveIPC = false"}, False),
        ({"usr/lib/systemd/logind.conf": "RemoveIPC=no"}, False),
        ({"usr/lib/systemd/logind.conf": "RemoveIPC=no", "etc/systemd/logind.conf": "[Login]\n"}, True),
        ({"etc/systemd/logind.conf": "RemoveIPC=no", "usr/lib/systemd/logind.conf.d/9.conf": "RemoveIPC=yes"}, True),
        (
            {"etc/systemd/logind.conf.d/1.conf": "RemoveIPC=no", "run/systemd/logind.conf.d/2.conf": "RemoveIPC=yes"},
            True,
        ),
        (
            {"etc/systemd/logind.conf.d/1.conf": "RemoveIPC=no", "usr/lib/systemd/logind.conf.d/1.conf": "RemoveIPC=1"},
            False,
        ),
    ],
)
def test_remove_ipc(tmp_path: Path, files: dict[str, str], expected: bool) -> None:
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    for path, text in files.items():
        write(tmp_path, path, text)
    assert host.remove_ipc(tmp_path) is expected


def test_cgroups(tmp_path: Path) -> None:
    assert host.cgroup(tmp_path) == (None, 0)
    write(tmp_path, "proc/self/cgroup", "0::/a/b\n")
    assert host.cgroup(tmp_path) == (None, 0)
    write(tmp_path, "sys/fs/cgroup/a/b/memory.max", "max\n")
    write(tmp_path, "sys/fs/cgroup/a/memory.max", f"{8 * GiB}\n")
    write(tmp_path, "sys/fs/cgroup/a/memory.current", f"{GiB}\n")
    assert host.cgroup(tmp_path) == (8 * GiB, GiB)
    write(tmp_path, "sys/fs/cgroup/a/memory.stat", f"anon 5\nactive_file 7\ninactive_file {GiB // 4}\n")
    assert host.cgroup(tmp_path) == (8 * GiB, GiB * 3 // 4)
    write(tmp_path, "sys/fs/cgroup/memory.max", f"{4 * GiB}\n")
    assert host.cgroup(tmp_path) == (4 * GiB, 0)


def test_cgroups_of_a_container_and_of_version_1(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "0::/../../docker/abc\n")
    write(tmp_path, "sys/fs/cgroup/memory.max", f"{GiB}\n")
    assert host.cgroup(tmp_path)[0] == GiB
    other = tmp_path / "v1"
    write(other, "proc/self/cgroup", "5:cpu:/x\n4:memory:/x\n")
    write(other, "sys/fs/cgroup/memory/x/memory.limit_in_bytes", "1000000\n")
    write(other, "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    write(other, "sys/fs/cgroup/memory/x/memory.usage_in_bytes", "500000\n")
    write(other, "sys/fs/cgroup/memory/x/memory.stat", "inactive_file 1\ntotal_inactive_file 100000\n")
    assert host.cgroup(other) == (1000000, 400000)


def test_an_empty_root(tmp_path: Path) -> None:
    """Nothing that is missing is an exception."""
    system = host.read(str(tmp_path))
    assert (system.remove_ipc, system.shmem_huge, system.memory_total) == (None, None, 0)
    doctor.judge(system, GiB)


def test_a_root_with_things_in_it(tmp_path: Path) -> None:
    write(
        tmp_path, "proc/meminfo", "MemTotal:  1024 kB\nMemAvailable: 512 kB\nCommitLimit: 100 kB\nCommitted_AS: 40 kB\n"
    )
    write(tmp_path, "proc/sys/vm/overcommit_memory", "2\n")
    write(
        tmp_path, "sys/kernel/mm/transparent_hugepage/shmem_enabled", "always within_size advise [never] deny force\n"
    )
    system = host.read(str(tmp_path))
    assert (system.memory_total, system.memory_available, system.commit_free) == (1 << 20, 512 << 10, 60 << 10)
    assert (system.overcommit, system.shmem_huge) == (2, "never")


# ---- this host


def test_this_host(namespace: str) -> None:
    with shmcast.Arena.create("1MiB"):
        system = host.read()
        assert system.shm_kind == "tmpfs"
        assert 0 < system.shm_free <= system.shm_total
        assert system.memory_total > system.memory_available > 0
        assert namespace in {seen["namespace"] for seen in system.arenas}
        assert all(there for name, there in system.features.items() if name in ("OFD locks", "futex", "MADV_DONTFORK"))
        assert doctor.judge(system)


def test_features_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(22, "no")

    monkeypatch.setattr(host, "_try_lock", refuse)
    monkeypatch.setattr(host, "_try_lease", refuse)
    found = host.features()
    assert (found["OFD locks"], found["write leases"], found["MADV_DONTFORK"]) == (False, False, True)


def test_where_no_file_can_be_made_nothing_is_said_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", full)
    found = host.features()
    assert "OFD locks" not in found
    assert "write leases" not in found
    assert found["MADV_DONTFORK"]


def test_trying_leaves_nothing(namespace: str) -> None:
    before = {name for name in os.listdir("/dev/shm") if name.startswith("tmp")}
    host.features()
    assert {name for name in os.listdir("/dev/shm") if name.startswith("tmp")} <= before


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "read", lambda: HEALTHY._replace(shm_total=64 << 20, shm_free=64 << 20))
    assert cli.main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "warning " in text
    assert "why:  publishing fails" in text
    assert "mend: mount -o remount" in text
    assert cli.main(["doctor", "--expect", "4GiB", "--json"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert told["status"] == 2
    assert {finding["level"] for finding in told["findings"]} == {"ok", "fault"}
    monkeypatch.setattr(doctor, "read", lambda: HEALTHY)
    assert cli.main(["doctor", "--expect", "1073741824"]) == 0


def test_the_command_on_this_host() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "shmcast", "doctor", "--json"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == json.loads(done.stdout)["status"]
    assert done.stderr == ""


def test_the_command_takes_the_size_from_the_environment() -> None:
    for text, status in (("8000000TiB", "are expected to fit"), ("lots", "is not a size")):
        done = subprocess.run(
            [sys.executable, "-m", "shmcast", "doctor"], capture_output=True, text=True, timeout=60,
            env={**os.environ, "SHMCAST_MAX_BYTES": text},
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (2, "")
        assert status in done.stdout


def test_a_strangers_folder_is_no_reason_to_complain(namespace: str) -> None:
    """What `shmcast-gc` keeps is not what it is advised for."""
    path = Path(f"/dev/shm/shmcast.{namespace}.{2:016x}.1")
    path.mkdir()
    try:
        system = HEALTHY._replace(arenas=tuple(looks.survey(namespace)))
        assert len(system.arenas) == 1
        assert doctor.status(doctor.judge(system)) == 0
        assert f"1 stay, such as {namespace} {2:016x}: a directory" in of(system, "leftovers")[0].what
    finally:
        path.rmdir()
