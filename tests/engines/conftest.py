"""Tests against an engine's own classes, in the environment of `make test-sglang`."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import pytest

from shmcast.integrations.sglang import KNOWN

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
# A benchmark there has the name of the package that it measures: that folder is searched last.
sys.path.sort(key=lambda place: Path(place).resolve() == BENCHMARKS)


def _why_not() -> str:
    try:
        found = metadata.version("sglang")
    except metadata.PackageNotFoundError:
        return f"needs SGLang {' or '.join(KNOWN)}, which is not installed here: make test-sglang"
    return "" if found in KNOWN else f"needs SGLang {' or '.join(KNOWN)}, this is {found}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    why = _why_not()
    for item in items:
        if item.path.parent.name == "engines":
            item.add_marker(pytest.mark.watchdog(600))
            if why and item.get_closest_marker("without_sglang") is None:
                item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope="session", autouse=True)
def tracker() -> None:
    """What SGLang's own segments start once a process, and keep a pipe to."""
    if not _why_not():
        from multiprocessing import resource_tracker

        resource_tracker.ensure_running()


@pytest.fixture
def sgl():
    """What makes SGLang's objects; see sgl.py."""
    import sgl

    sgl.prepare()
    return sgl


@pytest.fixture
def installed(namespace, sgl):
    """The integration, for the time of a test."""
    from shmcast.integrations import sglang

    assert sglang.install(hash="sha256")
    yield sglang
    sglang.uninstall()
