"""The ring and the agreement, and the claims on blocks, driven from C by threads, as they are and under a thread sanitizer."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [path for path in sorted((ROOT / "native").glob("*.c")) if not path.name.startswith("module")]
FLAGS = ["-std=c11", "-D_GNU_SOURCE=1", "-g", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'native'}", "-pthread"]
LINK = {"ring_check": [], "claims_check": ["-Wl,--wrap=fcntl"]}
PLAIN, PAUSES, THREADS = ["-O2"], ["-include", ROOT / "tests/native/jitter.h"], ["-O1", "-fsanitize=thread"]


def build(folder, name, *flags):
    program = folder / name
    command = ["cc", *FLAGS, *flags, ROOT / f"tests/native/{name}.c", *SOURCES, *LINK[name], "-o", program]
    return subprocess.run(command, capture_output=True, text=True), program


@pytest.mark.parametrize(
    ("name", "flags", "steps"),
    [
        pytest.param("ring_check", PLAIN, 20000, id="ring"),
        pytest.param("ring_check", PLAIN + PAUSES, 20000, id="ring with pauses between accesses"),
        pytest.param("ring_check", THREADS, 600, id="ring, thread sanitizer"),
        pytest.param("claims_check", PLAIN, 60000, id="claims"),
        pytest.param("claims_check", PLAIN + PAUSES, 10000, id="claims with pauses between accesses"),
        pytest.param("claims_check", THREADS, 10000, id="claims, thread sanitizer"),
    ],
)
def test_processes_as_threads(tmp_path, rng, name, flags, steps):
    built, program = build(tmp_path, name, *flags)
    if built.returncode != 0 and "-fsanitize=thread" in flags:
        pytest.skip(f"this compiler has no thread sanitizer: {built.stderr.splitlines()[0]}")
    assert built.returncode == 0, built.stderr
    seed = int(rng.integers(1 << 62))
    done = subprocess.run([program, str(seed), str(steps)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{name}: ok\n"), f"{name} {seed} {steps}: {done.stdout}{done.stderr}"
