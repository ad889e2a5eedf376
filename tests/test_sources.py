"""Rules that a compiler does not check: how long files are, who touches Python.h, where atomics are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("shmcast", "native", "tests", "benchmarks", "examples")
LINES_MAX = 600

# (what, pattern, files that may). Comments and strings are taken out before the search.
C_RULES = (
    ("includes Python.h", r"#\s*include\s*[<\"]Python\.h", r"module(_\w+)?\.[ch]"),
    ("includes stdatomic.h", r"#\s*include\s*[<\"]stdatomic\.h", r"atomics\.h"),
    ("uses an atomic of the language", r"\b(_Atomic|atomic_[a-z]\w*|memory_order_\w+)\b", r"atomics\.h"),
    ("uses an atomic of the compiler", r"\b__(sync|atomic)_\w+", r"atomics\.h"),
    ("uses volatile", r"\bvolatile\b", r"atomics\.h"),
)


def without_comments(source: str) -> str:
    """C source with comments and the contents of literals blanked; line numbers stay. Include lines stay whole."""

    def blank(match: re.Match[str]) -> str:
        text = match.group()
        if text.startswith("/"):
            return re.sub(r"[^\n]", " ", text)
        return text if match.group("include") else '""'

    pattern = (
        r"""//[^\n]*|/\*.*?\*/|(?P<include>^[ \t]*\#[ \t]*include[^\n/]*)|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'"""
    )
    return re.sub(pattern, blank, source, flags=re.DOTALL | re.MULTILINE)


def c_violations(native: Path) -> list[str]:
    """What C files do that only another file may."""
    found = []
    for path in sorted([*native.rglob("*.c"), *native.rglob("*.h")]):
        lines = without_comments(path.read_text()).splitlines()
        for number, line in enumerate(lines, 1):
            for what, pattern, may in C_RULES:
                if re.search(pattern, line) and not re.fullmatch(may, path.name):
                    found.append(f"{path.name}:{number}: {what}: {line.strip()}")
    return found


def long_files(root: Path) -> list[str]:
    """Source files of more than LINES_MAX lines."""
    found = []
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".pyi", ".c", ".h"):
                count = len(path.read_text().splitlines())
                if count > LINES_MAX:
                    found.append(f"{path.relative_to(root)}: {count} lines, at most {LINES_MAX}")
    return found


def test_c_sources_keep_their_doors() -> None:
    assert c_violations(ROOT / "native") == []


def test_no_file_is_too_long() -> None:
    assert long_files(ROOT) == []


@pytest.mark.parametrize(
    ("name", "line", "reports"),
    [
        ("slots.c", "#include <Python.h>", 1),
        ("slots.c", '# include "Python.h"', 1),
        ("module.c", "#include <Python.h>", 0),
        ("module_arena.c", "#include <Python.h>", 0),
        ("modules.c", "#include <Python.h>", 1),
        ("slots.h", "#include <stdatomic.h>", 1),
        ("atomics.h", "#include <stdatomic.h>", 0),
        ("slots.c", "static volatile int flag;", 1),
        ("slots.c", "/* volatile is not for this */ // nor __sync_add", 0),
        ("slots.c", 'puts("volatile");', 0),
        ("slots.c", "__atomic_load_n(p, 0);", 1),
        ("slots.c", "__sync_synchronize();", 1),
        ("slots.c", "_Atomic int flag;", 1),
        ("slots.c", "atomic_fetch_add(p, 1);", 1),
        ("slots.c", "shmc_atomic_u64 *word;", 0),
    ],
)
def test_a_c_rule_reports(tmp_path: Path, name: str, line: str, reports: int) -> None:
    (tmp_path / name).write_text(f"/* two\n lines */\n{line}\n")
    found = c_violations(tmp_path)
    assert len(found) == reports
    assert all(text.startswith(f"{name}:3: ") for text in found)


def test_a_long_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "native").mkdir()
    (tmp_path / "native" / "slots.c").write_text("\n" * LINES_MAX)
    assert long_files(tmp_path) == []
    (tmp_path / "native" / "slots.c").write_text("\n" * (LINES_MAX + 1))
    assert long_files(tmp_path) == [f"native/slots.c: {LINES_MAX + 1} lines, at most {LINES_MAX}"]
