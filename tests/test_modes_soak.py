"""The soak of modes itself: a short run passes, and what is wrong is noticed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import modes_soak
import shmcast
from makers import Mixed
from modes_soak import Stream, violations_of
from shmcast.modes import Mode

SOAK = Path(__file__).with_name("modes_soak.py")
SUMMARY = re.compile(r"modes soak: \d+ s, seed (\d+), (\d+) switches, (\d+) requests \(.*\), (\d+) violations")


@pytest.mark.torch
@pytest.mark.watchdog(240)
def test_a_short_run(seed: int) -> None:
    command = [sys.executable, str(SOAK), "--seconds", "5", "--every", "0.05", "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    said = SUMMARY.fullmatch(done.stdout.strip())
    assert said is not None, done.stdout
    assert int(said[1]) == seed
    assert int(said[2]) > 1
    assert int(said[3]) > len(modes_soak.MODES)
    assert said[4] == "0"


@pytest.mark.parametrize("wrong", [["--seconds", "0"], ["--every", "-1"], ["--channel", "pigeon"], ["--seed", "x"]])
def test_wrong_arguments(wrong: list[str]) -> None:
    done = subprocess.run([sys.executable, str(SOAK), *wrong], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "usage" in done.stderr


def test_every_mode_is_one_of_them() -> None:
    assert len(set(modes_soak.MODES)) == 8 * len(modes_soak.SHARES)
    for mode in modes_soak.MODES:
        assert Mode.parse(mode, True).text == mode


def answer(**changes: Any) -> dict[str, Any]:
    return {"digest": "d", "counts": {"ok": 1}, "violations": [], **changes}


def test_what_differs_is_noticed(namespace: str) -> None:
    assert violations_of([answer(), answer()], namespace, 5) == []
    assert violations_of([answer(), answer()], namespace, 0) == ["nothing was switched"]
    assert len(violations_of([answer(), answer(digest="e"), answer(counts={"ok": 2})], namespace, 5)) == 2
    assert violations_of([answer(), answer(violations=["so"])], namespace, 5) == ["rank 1: so"]


def test_what_is_left_is_noticed_and_removed(namespace: str) -> None:
    path = Path("/dev/shm", f"shmcast.{namespace}.left.0")
    path.touch()
    assert violations_of([answer()], namespace, 5) == [f"left in /dev/shm: {path.name}"]
    assert not path.exists()


@pytest.fixture
def mixed() -> Mixed:
    return Mixed(1)


def number_that(mixed: Mixed, fails: bool) -> int:
    return next(number for number in range(1000) if mixed.fails(number) is fails and not mixed.cancel_when(number))


def test_wrong_outcomes_are_noticed(mixed: Mixed) -> None:
    good, bad = number_that(mixed, False), number_that(mixed, True)
    error = shmcast.MaterializeError.of(bad, "ValueError", "x", "")
    for outcome in (
        shmcast.Outcome(good, "other bytes"),
        shmcast.Outcome(good, cancelled=True),
        shmcast.Outcome(good, error=error),
        shmcast.Outcome(bad, error=shmcast.GroupError("no")),
    ):
        stream = Stream(mixed)
        stream.add([outcome])
        assert len(stream.violations) == 1, outcome
    stream = Stream(mixed)
    stream.add([shmcast.Outcome(good, mixed.expected(good)), shmcast.Outcome(bad, error=error)])
    assert stream.violations == []
    assert stream.counts == {"ok": 1, "failed": 1, "cancelled": 0}


def test_the_order_is_part_of_the_digest(mixed: Mixed) -> None:
    outcomes = [shmcast.Outcome(number, mixed.expected(number)) for number in range(20) if not mixed.fails(number)]
    digests = set()
    for order in (outcomes, outcomes[::-1], outcomes[:-1]):
        stream = Stream(mixed)
        stream.add(order)
        assert stream.violations == []
        digests.add(stream.digest)
    assert len(digests) == 3
