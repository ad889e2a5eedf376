"""Every harness for a while, two at a time: ``run.py [--seconds N] [--seed S] [HARNESS...]``; the status is 1 where one
has found something.

``control`` and ``entries`` are C, under sanitizers: with libFuzzer where there is a clang that has it, else with whatever
compiler there is and replay.c, which changes what the corpus has. ``control`` runs once more with a thread that writes
to the control segment all the time. The others are fuzz.py's; ``tree`` runs once more where there are tensors to decode,
in the environment of `make test`.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CORPUS = HERE / "corpus"
BUILD = ROOT / "build" / "fuzz"
AT_ONCE = 2
PATIENCE_S = 120  # beyond the time that a run is given: to start, and to find out that it hangs

SOURCES = [HERE / "world.c", *(path for path in sorted((ROOT / "native").glob("*.c")) if "module" not in path.name)]
# -O1: with more a compiler merges reads that a fuzzer should see one by one
FLAGS = ["-std=c11", "-D_GNU_SOURCE=1", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{ROOT / 'native'}"]
LINK = ["-Wl,--wrap=mmap,--wrap=munmap"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# A member is not freed where the input ends in the middle: leaks are for the tests of Python.
ENVIRONMENT = {"ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1", "UBSAN_OPTIONS": "print_stacktrace=1"}


@dataclass
class Harness:
    """One run."""

    name: str
    command: list[str | Path]
    environment: dict[str, str] = field(default_factory=dict)


def compile_replay(name: str, folder: Path, *flags: str) -> Path:
    """A harness with replay.c's main. subprocess.CalledProcessError."""
    program = folder / f"{name}-replay"
    sources = [HERE / f"{name}.c", HERE / "replay.c", *SOURCES]
    command = [os.environ.get("CC", "cc"), *FLAGS, *(flags or SANITIZE), *sources, *LINK, "-o", program]
    subprocess.run(command, check=True)
    return program


def compile_guided(name: str) -> Path | None:
    """A harness with libFuzzer's main; None where there is no clang that has it."""
    program = BUILD / name
    if not shutil.which("clang"):
        return None
    command = ["clang", *FLAGS, *SANITIZE, "-fsanitize=fuzzer", HERE / f"{name}.c", *SOURCES, *LINK, "-o", program]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        print(f"fuzz {name}: this clang can not build it, replay.c instead:\n{done.stdout}", flush=True)
        return None
    return program


def c_harnesses(names: list[str], seconds: int, seed: int) -> list[Harness]:
    made = []
    for name in names:
        folder = CORPUS / name
        guided = compile_guided(name)
        replay = [compile_replay(name, BUILD)] if guided is None or name == "control" else []
        if guided is not None:
            found = BUILD / f"corpus-{name}"
            found.mkdir(exist_ok=True)
            options = [f"-max_total_time={seconds}", f"-seed={seed}", "-timeout=10", "-max_len=384", "-len_control=0"]
            options += [f"-artifact_prefix={BUILD}/crash-{name}-", "-print_final_stats=1"]
            made.append(Harness(f"{name} (libFuzzer)", [guided, *options, found, folder]))
        else:
            made.append(Harness(f"{name} (replay)", [*replay, str(seconds), str(seed), folder]))
        if name == "control":
            beside = {"SHMCAST_FUZZ_PEER": "1"}
            made.append(Harness("control beside a writer", [*replay, str(seconds), str(seed), folder], beside))
    return made


def with_torch() -> Path | None:
    """A Python that has torch and the package: ours, or that of `make test`; None where there is none."""
    for python in (Path(sys.executable), ROOT / ".venv/bin/python"):
        command = [python, "-c", "import torch, shmcast"]
        if python.exists() and subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0:
            return python
    print("fuzz tree: no torch here and no .venv that has it (make test): tensors are not decoded", flush=True)
    return None


def python_harnesses(names: list[str], seconds: int, seed: int) -> list[Harness]:
    made = []
    for name in names:
        arguments = [HERE / "fuzz.py", name, str(seconds), str(seed)]
        made.append(Harness(name, [sys.executable, *arguments]))
        other = with_torch() if name == "tree" else None
        if other is not None and other != Path(sys.executable):
            made.append(Harness("tree with torch", [other, *arguments]))
    return made


def run(harness: Harness, seconds: int) -> tuple[Harness, int, str]:
    folder = BUILD / harness.name.replace(" ", "-")
    folder.mkdir(exist_ok=True)  # where replay.c leaves what it was at
    try:
        done = subprocess.run(
            harness.command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={**os.environ, **ENVIRONMENT, **harness.environment},
            timeout=seconds + PATIENCE_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        return harness, 124, (error.stdout or b"").decode(errors="replace")
    return harness, done.returncode, done.stdout.decode(errors="replace")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="for each harness")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1, 1 << 31))
    parser.add_argument("harness", nargs="*", help="of those that have a folder in corpus; all where none is named")
    given = parser.parse_args()
    names = given.harness or sorted(path.name for path in CORPUS.iterdir())
    BUILD.mkdir(parents=True, exist_ok=True)
    in_c = [name for name in names if (HERE / f"{name}.c").exists()]
    runs = c_harnesses(in_c, given.seconds, given.seed)
    runs += python_harnesses([name for name in names if name not in in_c], given.seconds, given.seed)
    print(f"fuzz: {len(runs)} runs of {given.seconds} s, {AT_ONCE} at a time, seed {given.seed}", flush=True)
    failures = 0
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for harness, status, output in pool.map(lambda each: run(each, given.seconds), runs):
            lines = [line for line in output.splitlines() if "number_of_executed_units" in line or ": ok" in line]
            print(
                f"fuzz {harness.name}: {'ok' if status == 0 else f'STATUS {status}'}; {' '.join(lines[-1:])}",
                flush=True,
            )
            if status != 0:
                failures += 1
                print(output[-8000:], f"its input is in {BUILD}", sep="\n", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
