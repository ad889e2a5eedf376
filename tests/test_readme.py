"""README is tested as printed: its example runs, and the commands that it names exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def first_example(text: str) -> tuple[str, str | None]:
    """The first python block, and the text block right after it if that shows its output."""
    python = re.search(r"^```python\n(.*?)^```\s*$", text, re.DOTALL | re.MULTILINE)
    if python is None:
        raise ValueError("README has no ```python block")
    following = re.match(r"(?:(?!^```).)*?^```text\n(.*?)^```\s*$", text[python.end() :], re.DOTALL | re.MULTILINE)
    return python.group(1), following.group(1) if following else None


def named_targets(text: str) -> set[str]:
    """Targets of the ``make`` commands in code: lines of a block, or between backticks."""
    code = re.findall(r"^```(?:\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE) + re.findall(r"`([^`\n]+)`", text)
    return {target for part in code for target in re.findall(r"^(?:\$ )?make ([a-z][a-z-]*)", part, re.MULTILINE)}


def makefile_targets(text: str) -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", text, re.MULTILINE))


def needs_torch(code: str) -> bool:
    return re.search(r"^\s*(import|from) torch\b", code, re.MULTILINE) is not None


def test_example_runs_as_printed(tmp_path: Path) -> None:
    code, output = first_example(README)
    if needs_torch(code):
        pytest.importorskip("torch")
    script = tmp_path / "example.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=100, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    if output is not None:
        assert done.stdout == output


def test_named_commands_exist() -> None:
    named = named_targets(README)
    assert {"bench", "test"} <= named
    assert named <= makefile_targets((ROOT / "Makefile").read_text())


def test_the_example_is_found() -> None:
    text = "# x\n```sh\nmake bench # all\n```\n\n```python\nprint(1)\n```\nprints\n```text\n1\n```\nSay `make test`, make sure.\n"
    assert first_example(text) == ("print(1)\n", "1\n")
    assert first_example(text.replace("text", "json")) == ("print(1)\n", None)
    assert named_targets(text) == {"bench", "test"}


@pytest.mark.parametrize("name", ["README.md", "docs/strategies.md"])
def test_links_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)(#[^)]*)?\)", (ROOT / name).read_text())
    assert links
    assert [path for path, _ in links if not (ROOT / name).parent.joinpath(path).exists()] == []
