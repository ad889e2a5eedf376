"""Every system call and atomic of the core has a numbered step before it, or a written reason to have none."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import steps
from shmcast import _native


@pytest.fixture
def native(tmp_path: Path) -> Path:
    """A copy of the core to spoil."""
    return Path(shutil.copytree(steps.NATIVE, tmp_path / "native"))


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_the_core_is_numbered() -> None:
    assert steps.problems() == []
    assert len(steps.all_accesses()) > 150
    assert {name: number for name, (number, _) in steps.table().items()} == _native.STEPS


def test_nothing_is_overlooked() -> None:
    """What the parser attributes to functions is all that there is."""
    own = steps.own_functions(steps.NATIVE)
    for path in steps.NATIVE.glob("*.[ch]"):
        if path.name != "atomics.h":
            in_bodies = [access.call for access in steps.accesses(path, own)]
            everywhere = steps.calls(steps.without_comments(path.read_text()), own)
            assert in_bodies == [name for name in everywhere if name in in_bodies], path.name
            outside = {name for name in everywhere if name not in in_bodies and not name.startswith("shmc_")}
            assert outside <= {"__attribute__", "vector_size", "aligned", "bool", "meter_words"}, path.name


def test_an_atomic_without_a_step(native: Path) -> None:
    edit(native / "slots.c", "SHMC_STEP(PUBLISH_EXCHANGE);", "")
    wrong = steps.problems(native)
    assert any("slots.c" in line and "shmc_seq_exchange in shmc_slot_publish" in line for line in wrong)
    assert "steps.h: PUBLISH_EXCHANGE stands nowhere in the code" in wrong


def test_a_step_counts_for_one_statement(native: Path) -> None:
    edit(native / "bell.c", "    SHMC_STEP(BELL_WAKE);\n", "")
    assert any("bell.c" in line and "syscall in shmc_bell_ring" in line for line in steps.problems(native))


def test_a_system_call_without_a_step(native: Path) -> None:
    edit(native / "segment.c", "SHMC_STEP(SEGMENT_RESERVE);", "/* SHMC_STEP(SEGMENT_RESERVE); */")
    assert any("posix_fallocate in shmc_segment_reserve" in line for line in steps.problems(native))


@pytest.mark.parametrize(
    "call", ["msync(0, 0, 0)", "dup(1)", "mlock2(0, 1, 0)", "__atomic_fetch_add(&at, 1, 0)", "__sync_synchronize()"]
)
def test_a_call_that_nobody_has_heard_of(native: Path, call: str) -> None:
    edit(native / "segment.c", "SHMC_STEP(SEGMENT_RESERVE);", f"{call};\n    SHMC_STEP(SEGMENT_RESERVE);")
    name = call.partition("(")[0]
    assert any(f"{name} in shmc_segment_reserve" in line for line in steps.problems(native))


def test_a_reason_that_nothing_needs(native: Path) -> None:
    edit(native / "clock.c", "clock_gettime(", "memset(")
    assert steps.problems(native) == ["EXEMPT: nothing needs clock.c *"]


def test_a_number_stands_once(native: Path) -> None:
    edit(native / "steps.h", "X(102,", "X(101,")
    assert "steps.h: number 101 stands twice" in steps.problems(native)


def test_the_list_for_people() -> None:
    done = subprocess.run([sys.executable, steps.__file__], capture_output=True, text=True, check=True)
    assert any("RING_HEAD" in line and "shmc_ring_put" in line for line in done.stdout.splitlines())


def test_an_ordinary_build_has_no_board() -> None:
    assert not hasattr(_native, "fault_board")
    assert _native.step(_native.STEPS["NAME_UNLINK"]) is None
    with pytest.raises(TypeError):
        _native.step("NAME_UNLINK")
