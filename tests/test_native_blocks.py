"""The owner's allocator, driven from C against a byte map."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def blocks_check(tmp_path_factory):
    program = tmp_path_factory.mktemp("blocks") / "blocks_check"
    sources = [ROOT / "tests/native/blocks_check.c", ROOT / "native/blocks.c"]
    flags = ["-std=c11", "-D_GNU_SOURCE=1", "-O1", "-g", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'native'}"]
    subprocess.run(["cc", *flags, *sources, "-o", program], check=True)
    return program


@pytest.mark.parametrize("run", range(8))
def test_random_takes_and_drops(blocks_check, rng, run):
    seed = int(rng.integers(1 << 62))
    done = subprocess.run([blocks_check, str(seed), "100000"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "blocks_check: ok\n"), (
        f"blocks_check {seed} 100000: {done.stdout}{done.stderr}"
    )
