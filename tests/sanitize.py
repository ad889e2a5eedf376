"""The C core and its tests under sanitizers: ``sanitize.py [PYTEST ARGUMENTS]``, as `make sanitize` runs it.

- tests/native/*.c, which drive the core without Python, for addresses and undefined behaviour, and what has threads
  for races; with gcc, and with clang where it is installed
- the Python tests of TESTS with a ``_native`` for addresses and undefined behaviour (variant.py), two files at a time

A compiler without a sanitizer is a failure, not a skip: this is what the command is for. Leaks are not looked for:
CPython ends without giving back what it has interned, so every run would report some.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import variant

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
AT_ONCE = 2
SEED = random.SystemRandom().getrandbits(31)

CORE = [path for path in sorted((ROOT / "native").glob("*.c")) if not path.name.startswith("module")]
FLAGS = ["-std=c11", "-D_GNU_SOURCE=1", "-g", "-O1", "-pthread", f"-I{ROOT / 'native'}", "-fno-sanitize-recover=all"]
PAUSES = ("-include", str(TESTS / "native/jitter.h"))


class Check(NamedTuple):
    """A program of tests/native: what of native/ it needs, its arguments with the sanitizer for addresses and with the one
    for threads, where it has any, and how it is built."""

    sources: list[Path]
    addresses: list[str]
    threads: list[str] | None = None
    flags: tuple[str, ...] = ()


CHECKS = {
    "blocks_check": Check([ROOT / "native/blocks.c"], [str(SEED), "100000"]),
    "metrics_check": Check([ROOT / "native/metrics.c"], ["4", "100000"]),
    "ring_check": Check(CORE, [str(SEED), "6000"], [str(SEED), "600"]),
    "claims_check": Check(CORE, [str(SEED), "10000"], [str(SEED), "10000"], (*PAUSES, "-Wl,--wrap=fcntl")),
}
ADDRESSES, THREADS = "address,undefined", "thread"

# What goes through the C code, and what reads bytes of strangers. Left out: what is about torch, and what starts dozens of
# processes, or whole groups, to come by the same lines of C.
PYTHON_TESTS = (
    "test_ls.py", "test_codec_plain.py", "test_modes.py", "test_sweep.py", "test_gc.py",
    "test_native_claims.py", "test_native_ring.py", "test_native_agree.py", "test_native_meter.py", "test_hostile.py",
    "test_native_window.py", "test_drafts.py",
    "test_arena.py", "test_attach.py", "test_codec.py", "test_hash.py", "test_handle.py", "test_arrays.py",
    "test_reservation.py", "test_in_place.py", "test_message.py", "test_lockstep.py", "test_metrics.py",
)  # fmt: skip
DESELECTED = ("test_native_claims.py::test_the_32nd_process_is_told",)


def compilers() -> list[str]:
    return [name for name in ("gcc", "clang") if shutil.which(name)]


def run(name: str, command: list[str | Path], environment: dict[str, str] | None = None) -> bool:
    """One line where it is good, all of its output where it is not."""
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        check=False,
    )
    said = done.stdout.strip().splitlines()[-1:] or [""]
    print(f"sanitize {name}: {'ok' if done.returncode == 0 else f'STATUS {done.returncode}'}; {said[0]}", flush=True)
    if done.returncode != 0:
        print(done.stdout[-20000:], flush=True)
    return done.returncode == 0


def check(folder: Path, name: str, compiler: str, sanitizer: str, arguments: list[str]) -> bool:
    """Build one program and run it."""
    program = folder / f"{name}-{compiler}-{sanitizer[:6]}"
    source = TESTS / "native" / f"{name}.c"
    title = f"{name}, {compiler} -fsanitize={sanitizer}"
    build: list[str | Path] = [compiler, *FLAGS, f"-fsanitize={sanitizer}", *CHECKS[name].flags, source]
    build += [*CHECKS[name].sources, "-o", program]
    done = subprocess.run(build, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        print(f"sanitize {title}: it can not be built:\n{done.stdout}", flush=True)
        return False
    environment = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return run(title, [program, *arguments], environment)


def in_python(name: str, environment: dict[str, str], extra: list[str]) -> bool:
    command: list[str | Path] = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", TESTS / name]
    command += [f"--deselect=tests/{test}" for test in DESELECTED if test.startswith(name)]
    return run(name, [*command, *extra], environment)


def proves_itself(environment: dict[str, str]) -> bool:
    """Whether Python has the variant, and the variant its sanitizers: a run without them would look like a good one."""
    program = "import shmcast._native as n; print(n.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        check=True,
    )
    path = Path(done.stdout.strip())
    good = ROOT / "build" / "asan" in path.parents and re.search(rb"__asan_report_load8", path.read_bytes()) is not None
    if not good:
        print(f"sanitize: Python took {path}, which is not the variant, or has no sanitizers", flush=True)
    return good


def main() -> int:
    environment = variant.build("asan")
    if not proves_itself(environment):
        return 1
    print(f"sanitize: seed {SEED}, {AT_ONCE} at a time", flush=True)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(AT_ONCE) as pool:
        jobs = [pool.submit(in_python, name, environment, sys.argv[1:]) for name in PYTHON_TESTS]
        for compiler in compilers():
            for name, wanted in CHECKS.items():
                jobs.append(pool.submit(check, Path(folder), name, compiler, ADDRESSES, wanted.addresses))
                if wanted.threads is not None:
                    jobs.append(pool.submit(check, Path(folder), name, compiler, THREADS, wanted.threads))
        good = [job.result() for job in jobs]
    print(f"sanitize: {sum(good)} of {len(good)} are good", flush=True)
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
