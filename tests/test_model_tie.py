"""The model and the code have the same steps: what one side has and the other lacks is an error."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import steps
import ties
from test_model import Explorer, build_explorer

Rows = list[tuple[str, str]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    explorer: Explorer = build_explorer(tmp_path_factory.mktemp("model") / "explore")
    return [(name, code) for name, code in explorer.rows("action")]


@pytest.fixture
def native(tmp_path: Path) -> Path:
    """A copy of the core to spoil."""
    return Path(shutil.copytree(steps.NATIVE, tmp_path / "native"))


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package to spoil."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    return Path(shutil.copytree(ties.PACKAGE, tmp_path / "shmcast", ignore=ignored))


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_the_model_and_the_code_have_the_same_steps(rows: Rows) -> None:
    assert ties.problems(rows) == []
    assert len(rows) > 100
    assert set(ties.NAMES.values()) == {step for step, (number, _) in steps.table().items() if number > 1000}


def test_a_step_that_the_model_lacks(rows: Rows, native: Path) -> None:
    edit(native / "steps.h", "X(402, GROW_NUMBER,", 'X(499, GROW_TWICE, "new")\\\n    X(402, GROW_NUMBER,')
    assert ties.problems(rows, native) == ["steps.h: no transition stands for 499 GROW_TWICE, and no reason is written"]


def test_a_step_that_the_code_has_elsewhere(rows: Rows, native: Path) -> None:
    edit(native / "owner.c", "SHMC_STEP(RETIRE_NUMBER);", "")
    edit(native / "owner.c", "SHMC_STEP(GROW_NUMBER);", "SHMC_STEP(GROW_NUMBER);\n    SHMC_STEP(RETIRE_NUMBER);")
    assert ties.problems(rows, native) == [
        "RETIRE_NUMBER: shmc_owner_retire_segment has no step RETIRE_NUMBER, nor has what it calls"
    ]


def test_a_function_that_has_another_name(rows: Rows, native: Path) -> None:
    edit(native / "slots.c", "static bool take_one(", "static bool take_some(")
    assert "ATT_TOOK: there is no function take_one" in ties.problems(rows, native)


def test_python_that_unlinks_where_the_model_does_not(rows: Rows, package: Path) -> None:
    edit(package / "pool.py", "import threading\n", "import threading\nfrom . import names\n")
    with (package / "pool.py").open("a") as file:
        file.write("\n\ndef tidy(name: str) -> None:\n    names.unlink(name)\n")
    assert ties.problems(rows, package=package) == [
        "pool.tidy: no transition stands for its NAME_UNLINK, and no reason is written"
    ]


def test_python_that_does_not_look_any_more(rows: Rows, package: Path) -> None:
    edit(package / "arena.py", "if not names.is_current(name, map_fd) or not names.is_current(name, lock_fd):", "if 0:")
    assert ties.problems(rows, package=package) == [
        "CREATE_CURRENT: arena._create_control has no step NAME_IS_CURRENT, nor has what it calls"
    ]


def test_a_transition_that_stands_for_nothing(rows: Rows) -> None:
    spoilt = [(name, "" if name == "END_STATE" else code) for name, code in rows]
    assert ties.problems(spoilt) == ["END_STATE: '' is not a function with steps, or with a reason in brackets"]


def test_a_transition_less(rows: Rows) -> None:
    left = [(name, code) for name, code in rows if name != "ATT_LOOK_AGAIN"]
    assert ties.problems(left) == ["steps.h: no transition stands for 316 ATTACH_LOOK_AGAIN, and no reason is written"]


def test_a_reason_beside_a_transition(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ties.EXEMPT, "RETIRE_MARK", "no reason")
    assert ties.problems(rows) == ["steps.h: 403 RETIRE_MARK has a transition, and a reason to have none"]
