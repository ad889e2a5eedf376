"""shmcast-gc --metrics-port: what is served where one can not look."""

from __future__ import annotations

import os

import pytest

import shmcast
from shmcast import names

pytest.importorskip("prometheus_client")
from shmcast.cli import exporter
from shmcast.cli.watch import Totals


def values(census: exporter._Census) -> dict[str, float]:
    return {sample.name: sample.value for metric in census.collect() for sample in metric.samples}


def refuse(*_: object) -> None:
    raise OSError(24, "Too many open files")


@pytest.mark.parametrize(("where", "what"), [(names, "listing"), (os, "statvfs")])
def test_what_can_not_be_seen_now_is_as_it_was_last(namespace, monkeypatch, where, what) -> None:
    census = exporter._Census(namespace, Totals())
    with shmcast.Arena.create("1MiB"):
        seen = values(census)
        assert (seen["shmcast_arenas"], seen["shmcast_segments"], seen["shmcast_gc_errors_total"]) == (1, 2, 0)
        with monkeypatch.context() as patch:
            patch.setattr(where, what, refuse)
            blind = values(census)
        assert blind.pop("shmcast_gc_errors_total") == 1
        for name, value in blind.items():
            assert value == seen[name]
    assert values(census)["shmcast_arenas"] == 0


def test_what_was_never_seen_is_not_served(namespace, monkeypatch) -> None:
    monkeypatch.setattr(names, "listing", refuse)
    blind = values(exporter._Census(namespace, Totals()))
    assert blind["shmcast_gc_errors_total"] == 1
    assert not any(name for name in blind if not name.startswith("shmcast_gc_"))
