"""What fuzzing has kept, played once more: nothing of it crashes, hangs, or raises what is not ours. `make fuzz` goes on
from there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parent / "fuzz"
sys.path.insert(0, str(FUZZ))
import run  # noqa: E402

IN_C = sorted(path.stem for path in FUZZ.glob("*.c") if (FUZZ / "corpus" / path.stem).is_dir())
IN_PYTHON = sorted(path.name for path in (FUZZ / "corpus").iterdir() if path.name not in IN_C)


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    try:
        return {name: run.compile_replay(name, folder) for name in IN_C}
    except subprocess.CalledProcessError:
        return {name: run.compile_replay(name, folder, "-O1") for name in IN_C}  # a compiler without sanitizers


@pytest.mark.parametrize(
    ("name", "beside"),
    [("entries", {}), ("control", {}), ("control", {"SHMCAST_FUZZ_PEER": "1"})],
    ids=["entries", "control", "control beside a writer"],
)
def test_the_corpus_of_the_core(programs, tmp_path, seed, name, beside):
    command = [programs[name], "2", str(seed), FUZZ / "corpus" / name]
    environment = {**os.environ, **run.ENVIRONMENT, **beside}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, f"replay 2 {seed}: {done.stdout}{done.stderr}"
    assert done.stdout.startswith(f"replay: ok, {len(list((FUZZ / 'corpus' / name).iterdir()))} inputs")


@pytest.mark.parametrize("name", IN_PYTHON)
def test_the_corpus_of_a_decoder(name):
    done = subprocess.run([sys.executable, FUZZ / "fuzz.py", name, "0", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_target_has_a_corpus():
    assert IN_C == ["control", "entries"]
    assert IN_PYTHON == ["attach", "group_message", "handle", "plain", "tree"]
