"""Results of few bytes travel in the message: from where on they do not, and what is counted of it."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest

import shmcast
from ranks import in_use
from shmcast import ArenaFullError, Caster, inline, metrics


def copied(nbytes: int) -> Any:
    return {"x": np.full(nbytes, nbytes % 251, np.uint8), "n": nbytes}


def in_place(nbytes: int, out: Any) -> Any:
    array = out((nbytes,), "uint8")
    array[:] = nbytes % 251
    return {"x": array, "n": nbytes}


def two_arrays(nbytes: int) -> Any:
    return [np.full(nbytes // 2, nbytes % 251, np.uint8) for _ in range(2)]


def published(group: shmcast.Group) -> int:
    return group.stats()["arrays"]


def figures(group: shmcast.Group) -> tuple[int, int]:
    found = metrics.snapshot(group)
    return found["gauges"]["inline_bytes"], found["counters"]["inline_results"]


@pytest.mark.parametrize("materialize", [copied, in_place])
@pytest.mark.parametrize(
    ("threshold", "in_the_message"),
    [
        (0, []),
        (1, []),
        (20_000, [17_000, 19_999]),
        ("20000", [17_000, 19_999]),
        ("1MiB", [17_000, 19_999, 20_000, 90_000]),
    ],
)
def test_a_threshold(group: shmcast.Group, materialize: Any, threshold: Any, in_the_message: list[int]) -> None:
    sizes = [17_000, 19_999, 20_000, 90_000]
    with Caster(group, materialize, executor="inline", inline_bytes=threshold) as caster:
        for size in sizes:
            before = published(group)
            (outcome,) = caster.cast([(size, size)])
            assert published(group) - before == (size not in in_the_message), size
            value = outcome.result()
            assert value["n"] == size
            assert value["x"].shape == (size,)
            assert (value["x"] == size % 251).all()
            del value, outcome
        assert figures(group)[1] == len(in_the_message)
        assert in_use(group.arena) == 0


def test_the_arrays_of_a_result_count_together(group: shmcast.Group) -> None:
    with Caster(group, two_arrays, executor="inline", inline_bytes=10_000) as caster:
        for size, count in [(9_998, 0), (10_000, 2)]:
            before = published(group)
            (outcome,) = caster.cast([(size, size)])
            assert published(group) - before == count
            assert [(array.size, int(array[0])) for array in outcome.result()] == [(size // 2, size % 251)] * 2
            del outcome
        assert figures(group) == (10_000, 1)


def test_results_without_arrays_are_not_counted(group: shmcast.Group) -> None:
    with Caster(group, str, executor="inline", inline_bytes=10_000) as caster:
        assert caster.cast([("a", 1)])[0].result() == "1"
        assert figures(group) == (10_000, 0)


def test_views_of_blocks_travel_as_what_they_are(group: shmcast.Group) -> None:
    lease = shmcast.attach(group.arena.publish(np.full(2000, 7, np.uint8), readers=1))
    with Caster(group, lambda raw: lease.array, executor="inline", inline_bytes=10_000) as caster:
        (outcome,) = caster.cast([("a", 1)])
        assert (outcome.result() == 7).all()
        assert figures(group)[1] == 0
        stats = group.stats()
        assert stats["arrays"] + stats["passed_on"] == 1
        del outcome


@pytest.mark.parametrize("mode", ["object", "raw", "replicate"])
def test_other_ways_are_not_counted(group: shmcast.Group, mode: str) -> None:
    with Caster(group, in_place, executor="inline", inline_bytes="1MiB", mode=mode, raw_everywhere=True) as caster:
        (outcome,) = caster.cast([("a", 20_000)])
        assert (outcome.result()["x"] == 20_000 % 251).all()
        assert published(group) == 0
        assert figures(group) == (1 << 20, 0)


def test_what_goes_as_a_pickle_is_not_made_in_shared_memory(
    group: shmcast.Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **options: Any) -> Any:
        raise AssertionError("the arena may be what fails")

    monkeypatch.setattr(shmcast.Arena, "reserve", full)
    with Caster(group, in_place, executor="inline", mode="object") as caster:
        (outcome,) = caster.cast([("a", 20_000)])
        assert (outcome.result()["x"] == 20_000 % 251).all()
        caster.switch("shm")
        (outcome,) = caster.cast([("b", 20_000)])
        assert "the arena may be what fails" in str(outcome.error)


@pytest.mark.parametrize("wrong", [-1, "no size", "-5", "0"])
def test_what_is_no_threshold(group: shmcast.Group, wrong: Any) -> None:
    with pytest.raises(ValueError, match="inline_bytes"):
        Caster(group, copied, inline_bytes=wrong)
    with pytest.raises(TypeError, match="inline_bytes"):
        Caster(group, copied, inline_bytes=None)  # type: ignore[arg-type]


# ---- measured


def test_it_is_measured_and_said(group: shmcast.Group, caplog: pytest.LogCaptureFixture, namespace: str) -> None:
    with caplog.at_level(logging.INFO, "shmcast"), Caster(group, copied) as caster:
        threshold, _ = figures(group)
    assert threshold == 0 or threshold in inline.SIZES_BYTES
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(
        f"results of less than {threshold} bytes of arrays travel in the message: measured for 1 ranks in "
    )
    assert caster.pending == ()


@pytest.mark.parametrize(
    ("published_ns", "inline_ns", "threshold"),
    [
        (1024, lambda nbytes: nbytes, 0),  # already the smallest is no dearer published
        (5000, lambda nbytes: nbytes, 8192),
        (5000, lambda nbytes: 1, 1 << 18),  # never
    ],
)
def test_where_the_costs_cross(
    monkeypatch: pytest.MonkeyPatch, published_ns: int, inline_ns: Any, threshold: int, namespace: str
) -> None:
    monkeypatch.setattr(inline, "_published_ns", lambda arena, array, ranks: published_ns)
    monkeypatch.setattr(inline, "_inline_ns", lambda arena, array, ranks: inline_ns(array.nbytes))
    assert inline.measured_bytes(namespace, 4) == threshold


def test_without_room_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, namespace: str
) -> None:
    class Full:
        @staticmethod
        def create(*args: Any, **options: Any) -> Any:
            raise ArenaFullError(28, "no room (says the test)")

    monkeypatch.setattr(inline, "Arena", Full)
    with caplog.at_level(logging.INFO, "shmcast"):
        assert inline.measured_bytes(namespace, 2) == 0
    assert "no room (says the test)" in caplog.text
