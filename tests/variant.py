"""Another build of the C core beside the installed one, and the environment in which Python uses it.

    .venv-core/bin/python tests/variant.py asan                      # sanitizers for addresses and undefined behaviour
    .venv-core/bin/python tests/variant.py tsan                      # for threads
    .venv-core/bin/python tests/variant.py faults -DOPTION=VALUE     # any other name: a plain build with these options

builds ``build/<name>/site`` and prints the environment, one ``NAME=value`` a line, so that a run is::

    env $(.venv-core/bin/python tests/variant.py asan) .venv-core/bin/python -m pytest tests/test_arena.py

``site/shmcast`` holds the variant's ``_native`` and links to the package's Python files. PYTHONPATH alone would not do: an
editable install hooks into the import system before any path is searched. So ``site`` has a ``sitecustomize`` as well,
which puts a finder for ``shmcast`` in front of that hook. It is the environment that selects a variant, so whatever the
process starts uses the same one. From a test: ``os.environ | variant.build("faults", "-DSHMCAST_FAULTS=ON")``.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CODE = ROOT / "shmcast"

SITECUSTOMIZE = '''\
"""Made by tests/variant.py: `shmcast` comes from this folder, whatever else is installed."""
import os
import sys
from importlib.machinery import PathFinder

HERE = os.path.dirname(os.path.abspath(__file__))


class Variant:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return PathFinder.find_spec(name, [HERE] if path is None else path, target) if name.split(".")[0] == "shmcast" else None


sys.meta_path.insert(0, Variant)
'''

# What each sanitizer is built with, which runtime must be there before Python is, and how it is told to behave.
SANITIZERS = {
    "asan": (
        "address,undefined",
        "libasan.so",
        {
            # Leaks: CPython keeps what it has interned until the process ends, and ends without giving it back.
            # Allocation: a size that somebody else has written must give MemoryError, which is ours to test.
            # Signals: what a test kills a process with stays a signal; faulthandler shows where.
            "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:handle_segv=0:handle_sigbus=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        },
    ),
    "tsan": ("thread", "libtsan.so", {"TSAN_OPTIONS": "halt_on_error=1:handle_segv=0:handle_sigbus=0"}),
}


def _run(*command: str | Path) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(
            f"build a variant: {' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout}"
        )


def _tool(name: str) -> str:
    """cmake or ninja: of the environment that this Python is of, else whatever PATH has."""
    own = Path(sys.executable).with_name(name)
    return str(own) if own.exists() else name


def _compile(folder: Path, options: list[str]) -> None:
    programs = [f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}", f"-DPython_EXECUTABLE={sys.executable}"]
    _run(_tool("cmake"), "-S", ROOT, "-B", folder / "cmake", "-G", "Ninja", *programs, *options)
    _run(_tool("cmake"), "--build", folder / "cmake")
    _run(_tool("cmake"), "--install", folder / "cmake", "--prefix", folder / "site")


def _link(site: Path) -> None:
    """Links to the package's files and folders, those that are gone taken away."""
    package = site / "shmcast"
    for path in package.iterdir():
        if path.is_symlink():
            path.unlink()
    for path in CODE.iterdir():
        if path.name != "__pycache__" and not path.name.startswith("_native."):
            (package / path.name).symlink_to(path)
    (package / "_native.pyi").symlink_to(CODE / "_native.pyi")
    (site / "sitecustomize.py").write_text(SITECUSTOMIZE)


def _runtime(compiler: str, library: str) -> str:
    found = subprocess.run([compiler, f"-print-file-name={library}"], stdout=subprocess.PIPE, text=True, check=True)
    path = found.stdout.strip()
    if not os.path.isabs(path):
        raise RuntimeError(
            f"build a variant: {compiler} has no {library}; install the sanitizers of gcc, or say CC=..."
        )
    return os.path.realpath(path)


def build(name: str, *options: str) -> dict[str, str]:
    """Build, or bring up to date, ``build/<name>``; what to add to the environment. RuntimeError with the output.

    Two at once wait for each other. The Python that runs this is the one that the variant is for.
    """
    folder = ROOT / "build" / name
    environment = {"PYTHONPATH": str(folder / "site")}
    settings = list(options)
    if name in SANITIZERS:
        compiler = os.environ.get("CC", "gcc")  # clang's runtimes are not made to be there before the program is
        sanitizers, library, extra = SANITIZERS[name]
        settings += [f"-DSHMCAST_SANITIZE={sanitizers}", f"-DCMAKE_C_COMPILER={compiler}"]
        environment |= {"LD_PRELOAD": _runtime(compiler, library), **extra}
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _compile(folder, settings)
        _link(folder / "site")
    return environment


def main() -> int:
    if len(sys.argv) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        environment = build(*sys.argv[1:])
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    for name, value in environment.items():
        print(f"{name}={value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
