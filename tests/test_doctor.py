"""`shmcast doctor`: hosts as they are found in the field, and this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import shmcast
from shmcast import doctor, foreign
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
    return {"state": state, "namespace": "n", "why": "w", "max_bytes": 4 * GiB, "reserved_bytes": GiB, "file_bytes": GiB,
            **figures}  # fmt: skip


def left(name: str, removable: bool = True, users: tuple[foreign.User, ...] = ()) -> foreign.Leftover:
    return foreign.Leftover(name, 1 << 20, 1e6, 0, users, removable, "reason")


def test_a_healthy_host() -> None:
    findings = doctor.judge(HEALTHY, 4 * GiB)
    assert {finding.level for finding in findings} == {"ok"}
    assert doctor.status(findings) == 0


def test_every_complaint_says_why_and_what_mends_it() -> None:
    for system, expect in [(host, expect) for host, _, _, expect in SICK]:
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
    (HEALTHY._replace(arenas=(arena("damaged"),)), "leftovers", "warning", None),
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
    assert (finding.level, finding.what) == ("ok", "1 segments of others")


def test_exit_status() -> None:
    ok, warning, fault = (doctor.Finding(kind, "c", "w") for kind in ("ok", "warning", "fault"))  # type: ignore[arg-type]
    assert [doctor.status(findings) for findings in ([], [ok], [ok, warning], [warning, fault, ok])] == [0, 0, 1, 2]


# ---- reading files of other hosts


def write(base: Path, path: str, text: str) -> None:
    (base / path).parent.mkdir(parents=True, exist_ok=True)
    (base / path).write_text(text)


def test_no_logind(tmp_path: Path) -> None:
    assert doctor.remove_ipc(tmp_path) is None


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
    assert doctor.remove_ipc(tmp_path) is expected


def test_cgroups(tmp_path: Path) -> None:
    assert doctor.cgroup(tmp_path) == (None, 0)
    write(tmp_path, "proc/self/cgroup", "0::/a/b\n")
    assert doctor.cgroup(tmp_path) == (None, 0)
    write(tmp_path, "sys/fs/cgroup/a/b/memory.max", "max\n")
    write(tmp_path, "sys/fs/cgroup/a/memory.max", f"{8 * GiB}\n")
    write(tmp_path, "sys/fs/cgroup/a/memory.current", f"{GiB}\n")
    assert doctor.cgroup(tmp_path) == (8 * GiB, GiB)
    write(tmp_path, "sys/fs/cgroup/memory.max", f"{4 * GiB}\n")
    assert doctor.cgroup(tmp_path) == (4 * GiB, 0)


def test_cgroups_of_a_container_and_of_version_1(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "0::/../../docker/abc\n")
    write(tmp_path, "sys/fs/cgroup/memory.max", f"{GiB}\n")
    assert doctor.cgroup(tmp_path)[0] == GiB
    other = tmp_path / "v1"
    write(other, "proc/self/cgroup", "5:cpu:/x\n4:memory:/x\n")
    write(other, "sys/fs/cgroup/memory/x/memory.limit_in_bytes", "1000000\n")
    write(other, "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    assert doctor.cgroup(other)[0] == 1000000


def test_an_empty_root(tmp_path: Path) -> None:
    """Nothing that is missing is an exception."""
    system = doctor.read(str(tmp_path))
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
    system = doctor.read(str(tmp_path))
    assert (system.memory_total, system.memory_available, system.commit_free) == (1 << 20, 512 << 10, 60 << 10)
    assert (system.overcommit, system.shmem_huge) == (2, "never")


# ---- this host


def test_this_host(namespace: str) -> None:
    with shmcast.Arena.create("1MiB"):
        system = doctor.read()
        assert system.shm_kind == "tmpfs"
        assert 0 < system.shm_free <= system.shm_total
        assert system.memory_total > system.memory_available > 0
        assert namespace in {seen["namespace"] for seen in system.arenas}
        assert all(there for name, there in system.features.items() if name in ("OFD locks", "futex", "MADV_DONTFORK"))
        assert doctor.judge(system)


def test_features_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(22, "no")

    monkeypatch.setattr(doctor, "_try_lock", refuse)
    monkeypatch.setattr(doctor, "_try_lease", refuse)
    found = doctor.features()
    assert (found["OFD locks"], found["write leases"], found["MADV_DONTFORK"]) == (False, False, True)


def test_trying_leaves_nothing(namespace: str) -> None:
    before = {name for name in os.listdir("/dev/shm") if name.startswith("tmp")}
    doctor.features()
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
