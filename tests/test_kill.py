"""Whoever is killed at whatever step: one sweep, and nothing leaks, no byte of a survivor changes, the arena still serves.

`killing.py` plays the roles, in a build with numbered steps; here they run, two at a time, and the deaths are counted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import steps
import variant

KILLING = Path(__file__).with_name("killing.py")
KINDS = ("sweeper's sweeper", "rank", "owner", "reader", "sweeper", "passer-on")
LAB_TIMEOUT_S = 900

# Steps at which nobody dies here, and why.
NOT_REACHED = {
    "ANCHOR_UNDO": "only on a kernel without MADV_DONTFORK",
    "TOKEN_UNMAP": "only on a kernel without MADV_WIPEONFORK",
    "SCRUB_MARK": "marks are for pages that a GPU driver has pinned; nothing pins any yet",
}

pytestmark = pytest.mark.watchdog(LAB_TIMEOUT_S + 60)


def play(environment: dict[str, str], kind: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, KILLING, kind],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=LAB_TIMEOUT_S,
        check=False,
    )
    assert done.returncode in (0, 1), f"{kind}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def played() -> dict[str, Future[list[dict[str, Any]]]]:
    environment = variant.build("faults", "-DSHMCAST_FAULTS=ON")
    with ThreadPoolExecutor(2) as pool:  # all are over before the first test begins
        return {kind: pool.submit(play, environment, kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_every_step(
    played: dict[str, Future[list[dict[str, Any]]]], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    reports = played[kind].result()
    with capsys.disabled():
        print()
        for report in reports:
            print(f"  killed: {report['cases']:>4} times, at {len(report['steps']):>2} steps  {kind}: {report['role']}")
    violations = [line for report in reports for line in report["violations"]]
    assert not violations, "\n".join(violations)
    for report in reports:
        assert report["steps"], report
        assert report["missed"] * 2 < report["cases"], report


def test_no_step_is_left_out(
    played: dict[str, Future[list[dict[str, Any]]]], capsys: pytest.CaptureFixture[str]
) -> None:
    reports = [report for future in played.values() for report in future.result()]
    reached = {step for report in reports for step in report["steps"]}
    cases = sum(report["cases"] for report in reports)
    with capsys.disabled():
        print(f"\n  killed: {cases} times in all, at {len(reached)} of {len(steps.table())} steps")
    assert set(steps.table()) - reached == set(NOT_REACHED)
