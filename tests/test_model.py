"""The protocol is checked before it is built: every configuration of `tests/model` is explored to its end, and every
mistake that is put into the protocol on purpose is found. `tests/model/README.md` says what the model is."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

MODEL = Path(__file__).parent / "model"
PROCESSES = 2  # explorations at a time; each takes up to 0.6 GB
WATCHDOG_S = 500  # for one exploration that takes seconds: it never ends, or the machine is not usable

# The mistakes that the model must know whatever else it knows.
REQUIRED_BUGS = {
    "no-second-look",
    "grant-before-hold",
    "incarnation-after-scrub",
    "grant-after-recheck",
    "free-from-two-words",
    "generation-wraps",
    "scrub-after-unlock",
    "create-current-unchecked",
    "lock-not-anchored",
    "number-reused",
    "give-back-in-use",
    "give-back-ignores-marks",
    "give-back-only-looks",
    "scrub-forgets-marks",
    "end-unlinks-first",
    "control-unlinked-first",
    "sweeper-probes",
    "sweeper-current-unchecked",
    "sweeper-lets-go-early",
    "sweeper-lists-before-lock-only",
    "sweeper-looks-before-list",
    "sweeper-unlinks-control-first",
    "attach-skips-state",
}


@dataclass(frozen=True)
class Run:
    """What one exploration said."""

    name: str
    returncode: int
    output: str

    @property
    def lines(self) -> list[list[str]]:
        return [line.split("\t") for line in self.output.splitlines()]

    @property
    def broken(self) -> str:
        return next((line[1] for line in self.lines if line[0] == "broken"), "")

    @property
    def states(self) -> int:
        return next((int(line[1]) for line in self.lines if line[0] == "states"), 0)

    @property
    def taken(self) -> set[str]:
        return {line[1] for line in self.lines if line[0] == "taken"}


@dataclass(frozen=True)
class Explorer:
    """The compiled model and its tables."""

    program: Path
    tables: list[list[str]]

    def rows(self, kind: str) -> list[list[str]]:
        return [row[1:] for row in self.tables if row[0] == kind]

    def run(self, *arguments: str) -> Run:
        done = subprocess.run(
            [self.program, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=WATCHDOG_S,
            check=False,
        )
        return Run(" ".join(arguments), done.returncode, done.stdout)

    def run_all(self, arguments: list[list[str]]) -> list[Run]:
        with ThreadPoolExecutor(PROCESSES) as pool:
            return list(pool.map(lambda each: self.run(*each), arguments))


def build_explorer(program: Path) -> Explorer:
    flags = ["-O2", "-std=c11", "-Wall", "-Wextra", "-Werror"]
    sources = sorted(MODEL.glob("*.c"))
    subprocess.run([os.environ.get("CC", "cc"), *flags, *sources, "-o", program], check=True)
    listed = subprocess.run([program, "list"], stdout=subprocess.PIPE, text=True, check=True)
    return Explorer(program, [line.split("\t") for line in listed.stdout.splitlines()])


@pytest.fixture(scope="module")
def explorer(tmp_path_factory: pytest.TempPathFactory) -> Explorer:
    return build_explorer(tmp_path_factory.mktemp("model") / "explore")


@pytest.mark.watchdog(2 * WATCHDOG_S)
def test_the_protocol_holds(explorer: Explorer, capsys: pytest.CaptureFixture[str]) -> None:
    """Every configuration is explored to its end without a violation, and together they take every kind of step."""
    runs = explorer.run_all([[name] for name, _ in explorer.rows("config")])
    with capsys.disabled():
        print()
        for run in runs:
            print(f"  model: {run.states:>10,} states  {run.name}  {run.broken or 'holds'}")
        print(f"  model: {sum(run.states for run in runs):>10,} states in all")
    wrong = [f"{run.name}: exit {run.returncode}\n{run.output}" for run in runs if run.returncode]
    assert not wrong, "\n".join(wrong)
    assert all(run.states > 1000 for run in runs)
    taken = set().union(*(run.taken for run in runs))
    assert taken == {name for name, _ in explorer.rows("action")}


@pytest.mark.watchdog(2 * WATCHDOG_S)
def test_every_seeded_bug_is_found(explorer: Explorer, capsys: pytest.CaptureFixture[str]) -> None:
    """Each mistake breaks the guarantee that it should break, and the shortest way there is printed."""
    bugs = explorer.rows("bug")
    assert {bug for bug, _, _ in bugs} >= REQUIRED_BUGS
    runs = explorer.run_all([[config, bug] for bug, config, _ in bugs])
    wrong = []
    with capsys.disabled():
        print()
        for run, (bug, _, guarantee) in zip(runs, bugs, strict=True):
            print(f"  model: {run.states:>10,} states  {bug}: {run.broken or 'NOT FOUND'}")
            trace = [line for line in run.output.splitlines() if line.startswith(" ")]
            if run.returncode != 1 or not run.broken.startswith(guarantee) or not trace:
                wrong.append(f"{bug}: exit {run.returncode}, {guarantee} expected\n{run.output}")
    assert not wrong, "\n".join(wrong)


def test_unknown_names_are_refused(explorer: Explorer) -> None:
    assert explorer.run("no-such-configuration").returncode == 2
    assert explorer.run("grants", "no-such-bug").returncode == 2
