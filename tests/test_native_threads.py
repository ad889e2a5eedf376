"""The ring and the agreement, driven from C by threads, as they are and under a thread sanitizer."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [path for path in sorted((ROOT / "native").glob("*.c")) if not path.name.startswith("module")]
FLAGS = ["-std=c11", "-D_GNU_SOURCE=1", "-g", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'native'}", "-pthread"]


def build(folder, *flags):
    program = folder / "ring_check"
    command = ["cc", *FLAGS, *flags, ROOT / "tests/native/ring_check.c", *SOURCES, "-o", program]
    return subprocess.run(command, capture_output=True, text=True), program


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        (["-O2"], 20000),
        (["-O2", "-include", ROOT / "tests/native/jitter.h"], 20000),
        (["-O1", "-fsanitize=thread"], 600),
    ],
    ids=["as it is", "with pauses between accesses", "thread sanitizer"],
)
def test_ranks_as_threads(tmp_path, rng, flags, steps):
    built, program = build(tmp_path, *flags)
    if built.returncode != 0 and "-fsanitize=thread" in flags:
        pytest.skip(f"this compiler has no thread sanitizer: {built.stderr.splitlines()[0]}")
    assert built.returncode == 0, built.stderr
    seed = int(rng.integers(1 << 62))
    done = subprocess.run([program, str(seed), str(steps)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "ring_check: ok\n"), (
        f"ring_check {seed} {steps}: {done.stdout}{done.stderr}"
    )
