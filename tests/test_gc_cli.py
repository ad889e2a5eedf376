"""shmcast-gc --once: what it says, what it removes, how it ends."""

from __future__ import annotations

import itertools
import json
import os
import resource
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import shmcast
from shmcast import names
from shmcast.cli import gc as cli

SHM = Path(names.DIRECTORY)
SEGMENT_KEYS = {
    "name": str,
    "namespace": str,
    "arena": str,
    "number": int,
    "kind": str,
    "nbytes": int,
    "uid": int,
    "verdict": str,
    "reason": str,
    "why": str,
    "state": str,
}


def dead(namespace: str, arena: int = 5) -> list[str]:
    """An arena of which nobody has the lock; its segments."""
    made = [names.segment_name(namespace, arena, number)[1:] for number in range(2)]
    for name in made:
        (SHM / name).write_bytes(b"x" * 4096)
    return made


def files(namespace: str) -> set[str]:
    return {path.name for path in SHM.glob(f"shmcast.{namespace}.*")}


def asked(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = cli.main([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_it_removes_the_dead_and_keeps_the_living(namespace, capsys) -> None:
    gone = dead(namespace)
    with shmcast.Arena.create("1MiB", namespace=f"{namespace}-b"):
        pass
    code, said = asked(capsys, "--namespace", namespace)
    assert (code, said["exit_code"], said["version"], said["dry_run"]) == (0, 0, 1, False)
    assert files(namespace) == set()
    assert said["removed"] == {"arenas": 1, "segments": 2, "nbytes": 8192}
    assert {one["name"] for one in said["segments"]} == set(gone)
    for one in said["segments"]:
        assert {key: type(value) for key, value in one.items()} == SEGMENT_KEYS
        assert (one["state"], one["verdict"], one["reason"]) == ("removed", "remove", "unfinished")
    assert set(said) == {
        "version",
        "namespace",
        "dry_run",
        "shm",
        "segments",
        "removed",
        "scrubbed",
        "failed",
        "seconds",
        "exit_code",
    }
    assert set(said["shm"]) == {"total_bytes", "free_bytes"}


def test_again_there_is_nothing_to_do(namespace, capsys) -> None:
    dead(namespace)
    assert asked(capsys, "--namespace", namespace)[0] == 0
    code, said = asked(capsys, "--namespace", namespace)
    assert (code, said["segments"], said["removed"]["segments"]) == (0, [], 0)


def test_a_live_arena_is_said_to_be_alive(namespace, capsys) -> None:
    with shmcast.Arena.create("1MiB") as arena:
        assert cli.main(["--namespace", namespace]) == 0
        text = capsys.readouterr().out
        assert f"its owner is alive: pid {os.getpid()}, " in text
        assert text.count("kept") == 2
        assert "2 segments, 0 removed" in text
        assert not arena.closed
        code, said = asked(capsys, "--namespace", namespace)
        assert code == 0
        assert {one["reason"] for one in said["segments"]} == {"owner-alive"}


def test_dry_run_removes_nothing_and_says_so(namespace, capsys) -> None:
    gone = dead(namespace)
    code, said = asked(capsys, "--dry-run", "--namespace", namespace)
    assert (code, said["dry_run"]) == (3, True)
    assert {one["state"] for one in said["segments"]} == {"would remove"}
    assert cli.main(["--dry-run", "--namespace", namespace]) == 3
    assert "2 to remove" in capsys.readouterr().out
    assert files(namespace) == set(gone)
    assert cli.main(["--namespace", namespace]) == 0
    capsys.readouterr()
    assert asked(capsys, "--dry-run", "--namespace", namespace)[0] == 0


def test_all_namespaces_unless_one_is_named(namespace, capsys) -> None:
    gone = dead(namespace)
    code, said = asked(capsys, "--dry-run")
    assert code == 3
    assert said["namespace"] is None
    assert set(gone) <= {one["name"] for one in said["segments"]}
    code, said = asked(capsys, "--dry-run", "--namespace", f"{namespace}-b")
    assert (code, said["segments"]) == (0, [])
    assert cli.main(["--namespace", namespace]) == 0


def test_what_can_not_be_removed_is_exit_code_1(namespace, capsys, monkeypatch) -> None:
    dead(namespace)

    def refuse(name: str) -> bool:
        raise PermissionError(1, "not permitted")

    monkeypatch.setattr(names, "unlink", refuse)
    code, said = asked(capsys, "--namespace", namespace)
    assert code == 1
    (failed,) = said["failed"]
    assert "not permitted" in failed["why"]
    assert cli.text({**said, "segments": []})[0].startswith(f"failed  {failed['name']}")  # it has come since the look
    assert {one["state"] for one in said["segments"]} == {"failed", "left"}
    assert cli.main(["--namespace", namespace]) == 1
    assert "not permitted" in capsys.readouterr().out
    monkeypatch.undo()
    assert cli.main(["--namespace", namespace]) == 0


def test_what_goes_wrong_half_way_loses_nothing_of_the_report(namespace, capsys, monkeypatch) -> None:
    dead(namespace, 5)
    dead(namespace, 6)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (4, 4))  # one arena at a time
    count = itertools.count()
    listing = names.listing

    def fail(*args: str) -> list[names.Found]:
        if next(count) == 2:  # the look, the first arena, the second
            raise OSError(5, "Input/output error")
        return listing(*args)

    monkeypatch.setattr(names, "listing", fail)
    code, said = asked(capsys, "--namespace", namespace)
    assert code == 1
    assert said["removed"]["arenas"] == 1
    assert sorted(one["state"] for one in said["segments"]) == ["failed", "left", "removed", "removed"]
    assert "Input/output error" in said["failed"][0]["why"]
    monkeypatch.undo()
    assert asked(capsys, "--namespace", namespace)[0] == 0


def test_where_dev_shm_can_not_be_read_nothing_is_begun(namespace, capsys, monkeypatch, tmp_path) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setattr(names, "DIRECTORY", str(file))
    assert cli.main([]) == 2
    assert "Not a directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--namespace", "a/b"],
        ["--once", "--watch"],
        ["--watch", "--dry-run"],
        ["--watch", "--foreign"],
        ["--metrics-port", "1"],
        ["--remove"],
        ["--pattern", "x*"],
        ["--min-age", "3"],
        ["--sole-pid-namespace"],
        ["--watch", "--rescan", "-1"],
        ["--watch", "--rescan", "nan"],
        ["--bogus"],
    ],
)
def test_options_that_make_no_sense(arguments, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "shmcast-gc: error" in capsys.readouterr().err


def test_help_has_the_exit_codes(capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    for code in (cli.DONE, cli.LEFT, cli.NOT_BEGUN, cli.WOULD_REMOVE):
        assert f"\n  {code}  " in text


@pytest.mark.parametrize("library", ["inotify_simple", "prometheus_client"])
def test_without_the_extra_once_works_and_the_rest_names_it(namespace, library) -> None:
    dead(namespace)
    program = (
        f"import sys; sys.modules[{library!r}] = None\nfrom shmcast.cli.gc import main; sys.exit(main(sys.argv[1:]))"
    )
    run = [sys.executable, "-c", program, "--namespace", namespace]
    done = subprocess.run([*run, "--watch", "--metrics-port", "0"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert library in done.stderr
    assert "pip install 'shmcast[gc]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert files(namespace)
    assert subprocess.run([*run, "--once"], capture_output=True, timeout=60).returncode == 0
    assert files(namespace) == set()


def test_the_console_script(namespace) -> None:
    dead(namespace)
    script = Path(sys.executable).with_name("shmcast-gc")
    for command in ([str(script)], [sys.executable, "-m", "shmcast.cli.gc"]):
        done = subprocess.run([*command, "--namespace", namespace], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
    assert files(namespace) == set()


# ---- what others have left: the interface of `foreign`, not its work


class Others(types.ModuleType):
    """Two leftovers, one of which may go; it records what it was asked."""

    def __init__(self, *, obeys: bool = True, complete: bool = True) -> None:
        super().__init__("shmcast.foreign")
        self.asked: list[dict[str, Any]] = []
        self.removed: list[str] = []
        self.obeys = obeys
        user = types.SimpleNamespace(pid=12, command="python serve", how="maps")
        self.census = types.SimpleNamespace(
            leftovers=(leftover("sgl_shm_1", (user,), "pid 12 maps it"), leftover("psm_2", (), "nobody uses it")),
            complete=complete,
            why="" if complete else "another pid namespace",
        )

    def scan(self, **terms: Any) -> Any:
        self.asked.append(terms)
        return self.census

    def remove(self, one: Any) -> bool:
        self.removed.append(one.name)
        return self.obeys


def leftover(name: str, users: tuple[Any, ...], reason: str) -> Any:
    return types.SimpleNamespace(
        name=name, nbytes=4096, age_s=60.5, uid=0, users=users, removable=not users, reason=reason
    )


@pytest.fixture
def others(monkeypatch) -> Others:
    fake = Others()
    monkeypatch.setattr(shmcast, "foreign", fake, raising=False)
    return fake


def test_foreign_reports_and_removes_nothing(namespace, capsys, others) -> None:
    code, said = asked(capsys, "--foreign", "--namespace", namespace)
    assert code == 0
    assert (others.asked, others.removed) == ([{}], [])
    assert said["foreign"]["complete"] is True
    first, second = said["foreign"]["leftovers"]
    assert first["users"] == [{"pid": 12, "command": "python serve", "how": "maps"}]
    assert (first["state"], second["state"]) == ("kept", "removable")
    assert cli.main(["--foreign", "--namespace", namespace]) == 0
    text = capsys.readouterr().out
    assert "pid 12 (python serve) maps it" in text
    assert "2 segments of others" in text


def test_foreign_removes_on_request_what_may_go(namespace, capsys, others) -> None:
    code, said = asked(capsys, "--foreign", "--remove", "--namespace", namespace)
    assert code == 0
    assert others.removed == ["psm_2"]
    assert [one["state"] for one in said["foreign"]["leftovers"]] == ["kept", "removed"]
    others.removed.clear()
    code, said = asked(capsys, "--foreign", "--remove", "--dry-run", "--namespace", namespace)
    assert code == 3
    assert [one["state"] for one in said["foreign"]["leftovers"]] == ["kept", "would remove"]
    assert others.removed == []
    # what is only reported is not to go
    assert asked(capsys, "--foreign", "--dry-run", "--namespace", namespace)[0] == 0


def test_foreign_on_terms(namespace, capsys, others) -> None:
    options = ["--pattern", "a*", "--pattern", "b*", "--min-age", "3", "--sole-pid-namespace"]
    assert asked(capsys, "--foreign", "--namespace", namespace, *options)[0] == 0
    assert others.asked == [{"patterns": ("a*", "b*"), "min_age_s": 3.0, "sole_pid_namespace": True}]


def test_foreign_that_is_gone_already(namespace, capsys, monkeypatch) -> None:
    monkeypatch.setattr(shmcast, "foreign", Others(obeys=False, complete=False), raising=False)
    code, said = asked(capsys, "--foreign", "--remove", "--namespace", namespace)
    assert code == 0
    assert said["foreign"]["leftovers"][1]["state"] == "gone"
    cli.main(["--foreign", "--namespace", namespace])
    assert "another pid namespace" in capsys.readouterr().out


def test_foreign_that_can_not_be_looked_for_means_that_nothing_was_done(namespace, capsys, others, monkeypatch) -> None:
    gone = dead(namespace)

    def fail(**terms: Any) -> Any:
        raise FileNotFoundError(2, "No such file or directory", "/proc")

    monkeypatch.setattr(others, "scan", fail)
    assert cli.main(["--foreign", "--namespace", namespace]) == 2
    out, err = capsys.readouterr()
    assert (out, "/proc" in err) == ("", True)
    assert files(namespace) == set(gone)
    assert cli.main(["--namespace", namespace]) == 0


def test_foreign_that_stays_though_it_should_go_says_why(namespace, capsys, others, monkeypatch) -> None:
    dead(namespace)

    def fail(one: Any) -> bool:
        raise OSError(16, "not removed: somebody has it open or maps it", one.name)

    monkeypatch.setattr(others, "remove", fail)
    code, said = asked(capsys, "--foreign", "--remove", "--namespace", namespace)
    assert (code, said["removed"]["arenas"]) == (1, 1)
    _, second = said["foreign"]["leftovers"]
    assert (second["state"], "somebody has it open" in second["reason"]) == ("left", True)
