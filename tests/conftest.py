"""What every test gets: a namespace of its own, a watchdog, a printed seed, and a look for what it has left behind."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib.util
import os
import secrets
import signal
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import shmcast
from child import Child, untidy
from makers import Maker

if TYPE_CHECKING:
    import numpy as np

SHM_DIRECTORY = Path("/dev/shm")
WATCHDOG_S = 120
# The same with torch and without, and long: `make test` runs them, `make test-core` does not.
ONCE = {
    "test_kill", "test_soak", "test_model", "test_model_agree", "test_model_bell", "test_model_tie", "test_native_threads",
    "test_fuzz_corpus", "test_hostile", "test_situations_ends", "test_situations_forks", "test_situations_limits",
    "test_situations_paused", "test_situations_pids", "test_situations_small", "test_foreign", "test_foreign_users", "test_gc_watch",
    "test_gc_output", "test_steps", "test_workers_death",
}  # fmt: skip
SEED_VARIABLE = "SHMCAST_TEST_SEED"
# The watchdog's second bite must reach the terminal, so stderr is kept from before pytest captures it.
STDERR_KEY = pytest.StashKey[int]()
SEED_KEY = pytest.StashKey[int]()
FAILED_KEY = pytest.StashKey[bool]()
# Opened once by libraries for the rest of the process, whatever test comes first.
BENIGN_FILES = ("/dev/urandom", "/dev/random", "/proc/", "/sys/")


def pytest_configure(config: pytest.Config) -> None:
    # A shell that runs us in the background has us ignore it, and so would every child that a test interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.stash[STDERR_KEY] = os.dup(2)
    config.stash[SEED_KEY] = int(os.environ.get(SEED_VARIABLE) or secrets.randbits(32))
    if importlib.util.find_spec("hypothesis"):
        from hypothesis import settings

        # A slow machine is no failure: tests never measure.
        settings.register_profile("shmcast", deadline=None, print_blob=True)
        settings.load_profile("shmcast")
    if os.environ.get("SHMCAST_TEST_CORE"):
        present = [name for name in ("torch", "zmq") if importlib.util.find_spec(name)]
        if present:
            raise pytest.UsageError(f"SHMCAST_TEST_CORE: this environment must not have {' and '.join(present)}")


def pytest_unconfigure(config: pytest.Config) -> None:
    os.close(config.stash[STDERR_KEY])


def pytest_report_header(config: pytest.Config) -> str:
    return f"{SEED_VARIABLE}={config.stash[SEED_KEY]}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.path.stem in ONCE and os.environ.get("SHMCAST_TEST_CORE"):
        pytest.skip("the same with torch and without: `make test` runs it")
    for name in ("torch", "zmq"):
        if item.get_closest_marker(name) and not importlib.util.find_spec(name):
            pytest.skip(f"needs {name}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if report.failed:
        item.stash[FAILED_KEY] = True
        report.sections.append(("seed", f"{SEED_VARIABLE}={item.config.stash[SEED_KEY]}"))
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Stop a test that hangs: an exception in Python, and where that is not heard (C code that waits), the process."""
    marker = item.get_closest_marker("watchdog")
    seconds = int(marker.args[0]) if marker else WATCHDOG_S

    def bite(*_: object) -> None:
        faulthandler.dump_traceback(item.config.stash[STDERR_KEY])
        pytest.fail(f"watchdog: {item.nodeid} has run for {seconds} s")

    previous = signal.signal(signal.SIGALRM, bite)
    signal.alarm(seconds)
    faulthandler.dump_traceback_later(seconds + 15, exit=True, file=item.config.stash[STDERR_KEY])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def segments_of(namespace: str) -> list[str]:
    """Names of the shared-memory objects of a namespace that exist now."""
    return sorted(path.name for path in SHM_DIRECTORY.glob(f"shmcast.{namespace}.*"))


def open_files() -> dict[tuple[int, str], str]:
    """Descriptors of this process: ``{(fd, what it is open on): the same for people}``."""
    found = {}
    for entry in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{entry}")
        except OSError:
            continue  # the descriptor of the listing itself
        if not target.startswith(BENIGN_FILES):
            found[int(entry), target] = f"fd {entry} -> {target}"
    return found


@pytest.fixture(autouse=True)
def tidy(request: pytest.FixtureRequest) -> Iterator[None]:
    """Nothing runs in the background that a test has not asked for."""
    with untidy() if request.path.stem != "test_tidy" else contextlib.nullcontext():
        yield


@pytest.fixture(autouse=True)
def namespace(request: pytest.FixtureRequest) -> Iterator[str]:
    """This test's own namespace; fails the test if a segment of it or a file descriptor outlives the test."""
    name = f"t{os.getpid()}x{secrets.token_hex(6)}"
    before_variable = os.environ.get("SHMCAST_NAMESPACE")
    before_files = open_files()
    os.environ["SHMCAST_NAMESPACE"] = name
    try:
        yield name
    finally:
        if before_variable is None:
            del os.environ["SHMCAST_NAMESPACE"]
        else:
            os.environ["SHMCAST_NAMESPACE"] = before_variable
        left = _left_behind(name, before_files)
        for segment in segments_of(name):
            (SHM_DIRECTORY / segment).unlink(missing_ok=True)
    # A failed test holds its variables in the traceback: what those keep is no second failure.
    if left and not request.node.stash.get(FAILED_KEY, False):
        pytest.fail(f"left behind by {request.node.nodeid}:\n  " + "\n  ".join(left), pytrace=False)


def _left_behind(name: str, before_files: dict[tuple[int, str], str]) -> list[str]:
    left = _look(name, before_files)
    if left:  # collected only where that may mend something: it takes long once torch is there
        gc.collect()
        left = _look(name, before_files)
    return left


def _look(name: str, before_files: dict[tuple[int, str], str]) -> list[str]:
    files = open_files()
    return [f"/dev/shm/{segment}" for segment in segments_of(name)] + [
        text for key, text in files.items() if key not in before_files
    ]


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A number that is this test's own and follows from SHMCAST_TEST_SEED."""
    return zlib.crc32(request.node.nodeid.encode(), request.config.stash[SEED_KEY] & 0xFFFFFFFF)


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    """numpy's generator, seeded with `seed`."""
    import numpy as np

    return np.random.default_rng(seed)


@pytest.fixture
def child(namespace: str) -> Iterator[Callable[..., Child]]:
    """Start real processes: ``child(function, *literals, NAME="environment")``; see child.py."""
    started: list[Child] = []

    def start(function: Callable[..., object], *args: object, **environment: str) -> Child:
        started.append(Child(function, *args, **environment))
        return started[-1]

    yield start
    errors = []
    for process in started:
        try:
            process.finish()
        except AssertionError as error:
            errors.append(str(error))
    if errors:
        pytest.fail("\n".join(errors), pytrace=False)


@pytest.fixture
def group() -> Iterator[shmcast.Group]:
    """This process alone, with an arena."""
    with shmcast.Group(max_bytes="64MiB") as group:
        yield group


@pytest.fixture
def maker() -> Iterator[Maker]:
    """Whatever still waits in it when the test ends goes on."""
    maker = Maker()
    yield maker
    maker.open_all()
