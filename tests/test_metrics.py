"""What people are told: snapshots and percentiles, from this process, from another one, from a dead one, from garbage."""

import bisect
import json
import math
import mmap
import os
import random
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import shmcast
from shmcast import _native, metrics, names
from shmcast.errors import ArenaFullError

ROOT = Path(__file__).parents[1]
MIB = 1 << 20
SECTIONS = {"counters", "gauges", "peaks", "histograms", "sizes"}
METRICS_OFFSET = 1024
FORMAT_OFFSET = 8
ENDS = _native.HISTOGRAM_ENDS_NS
WORD_COUNT = len(_native.Meter().words())
words = st.integers(0, (1 << 64) - 1)


def block(nbytes: int) -> np.ndarray:
    return np.ones(nbytes, np.uint8)


@pytest.fixture
def arena():
    with shmcast.Arena.create("4MiB", segment_bytes="1MiB") as arena:
        yield arena


def control_file(arena_id: int) -> str:
    return names.DIRECTORY + names.segment_name(names.default_namespace(), arena_id, 0)


def overwrite(path: str, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as control:
        control[offset : offset + len(data)] = data


def numbers_in(tree: object) -> list[object]:
    if isinstance(tree, dict):
        return [number for value in tree.values() for number in numbers_in(value)]
    return [number for value in tree for number in numbers_in(value)] if isinstance(tree, list) else [tree]


# ---- snapshot


def test_nothing_counted_yet() -> None:
    seen = metrics.snapshot(_native.Meter())
    assert set(seen) == SECTIONS
    assert {name for section in seen.values() for name in section} == {name for name, *_ in _native.METRICS}
    assert set(seen["counters"].values()) == set(seen["gauges"].values()) == set(seen["peaks"].values()) == {0}
    for histogram in seen["histograms"].values():
        assert histogram["buckets"] == [[end, 0] for end in (*ENDS, None)]
        del histogram["buckets"]
        assert histogram == {
            "count": 0,
            "sum_ns": 0,
            "mean_ns": None,
            "p50_ns": None,
            "p99_ns": None,
            "max_ns": None,
        }
    assert set(seen["sizes"]["batch_requests"]) == {"count", "sum", "mean", "p50", "p99", "max", "buckets"}


def test_each_kind() -> None:
    meter = _native.Meter()
    meter.add(_native.metric("requests"), 3)
    meter.set(_native.metric("pending"), 2)
    meter.peak(_native.metric("peak_pending"), 4)
    for ns in (100, 1500, 3000, 3000):
        meter.observe(_native.metric("step_ns"), ns)
    meter.observe(_native.metric("batch_requests"), 5)
    seen = metrics.snapshot(meter)
    assert (seen["counters"]["requests"], seen["gauges"]["pending"], seen["peaks"]["peak_pending"]) == (3, 2, 4)
    step = seen["histograms"]["step_ns"]
    assert (step["count"], step["sum_ns"], step["mean_ns"], step["max_ns"]) == (4, 7600, 1900.0, 3000)
    assert step["buckets"][:4] == [[1024, 1], [2048, 1], [4096, 2], [8192, 0]]
    assert step["p50_ns"] == 2048.0  # half of them are in the first two buckets
    assert 2048 < step["p99_ns"] <= 3000
    sizes = seen["sizes"]["batch_requests"]
    assert (sizes["count"], sizes["sum"], sizes["max"], sizes["buckets"][3]) == (1, 5, 5, [8, 1])
    assert json.loads(json.dumps(seen)) == seen


def test_targets(arena) -> None:
    class Private:
        _meter = arena.meter

    assert metrics.snapshot(arena) == metrics.snapshot(arena.meter) == metrics.snapshot(Private())
    with pytest.raises(TypeError, match="has no meter"):
        metrics.snapshot(object())


def test_what_an_arena_counts(arena) -> None:
    arena.publish(block(1000))
    arena.publish_many([block(10)] * 3)
    with arena.reserve(100, "uint8"):
        pass
    arena.publish(np.ones((10, 10))[:, ::2])  # put together in the block
    seen = metrics.snapshot(arena)
    assert seen["counters"]["published"] == 6
    assert seen["counters"]["published_bytes"] == 1000 + 30 + 100 + 400
    assert seen["histograms"]["publish_ns"]["count"] == 4
    assert 0 < seen["histograms"]["publish_ns"]["p50_ns"] <= seen["histograms"]["publish_ns"]["max_ns"]
    assert seen["gauges"]["live_blocks"] == seen["peaks"]["peak_live_blocks"] == 6
    assert seen["gauges"]["reserved_bytes"] == arena.stats()["reserved_bytes"]
    assert seen["counters"]["publish_retries"] == 0
    with pytest.raises(ArenaFullError):
        [arena.publish(block(MIB)) for _ in range(5)]
    assert metrics.snapshot(arena)["counters"]["publish_retries"] >= 1
    assert metrics.snapshot(arena)["counters"]["grown"] == arena.stats()["grown"] > 1
    arena.close()
    assert metrics.snapshot(arena)["counters"]["published"] >= 6


def test_why_arrays_travel_in_the_message(arena) -> None:
    held = arena.publish(block(100_000), readers=0, keep=True)
    tree = {
        "shared": block(20_000),
        "small": [block(100), block(200)],
        "unsupported": np.array([object()] * 5000, dtype=object),
        "view": shmcast.attach(held).array,
        "too much": block(5 * MIB),
    }
    shmcast.dumps(tree, arena, on_full="inline")
    seen = metrics.snapshot(arena)["counters"]
    assert (seen["inline_full"], seen["inline_full_bytes"]) == (1, 5 * MIB)
    assert (seen["inline_small"], seen["inline_small_bytes"]) == (2, 300)
    assert seen["inline_unsupported"] == 1
    assert seen["passed_on"] == 1
    with pytest.raises(ArenaFullError):
        shmcast.dumps(tree, arena)
    assert metrics.snapshot(arena)["counters"]["inline_full"] == 1  # what was not sent did not travel
    shmcast.dumps(tree)  # without an arena there is nothing to count in


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:.*quantized tensor")
def test_an_array_is_counted_for_one_reason(arena) -> None:
    import torch

    large = torch.quantize_per_tensor(torch.ones(50_000), 0.5, 0, torch.qint8)
    part = large[:10]  # small, and can not be shared
    shmcast.dumps([large, part, torch.ones(10), torch.ones(50_000)[:10]], arena)
    seen = metrics.snapshot(arena)["counters"]
    assert (seen["inline_small"], seen["inline_unsupported"]) == (3, 1)
    assert seen["inline_small_bytes"] == 10 + 40 + 40


# ---- percentiles


@given(st.lists(st.one_of(st.integers(0, 1 << 40), st.integers(0, 1 << 20)), min_size=1), st.floats(0, 1))
def test_a_percentile_is_in_the_bucket_of_the_true_one(observed: list[int], share: float) -> None:
    counts = [0] * (len(ENDS) + 1)
    for value in observed:
        counts[bisect.bisect_right(ENDS, value)] += 1
    found = metrics.percentile(share, counts, ENDS, max(observed))
    true = sorted(observed)[max(math.ceil(share * len(observed)) - 1, 0)]
    bucket = bisect.bisect_right(ENDS, true)
    assert (ENDS[bucket - 1] if bucket else 0) <= found <= max(observed)
    assert bucket == len(ENDS) or found <= ENDS[bucket]


@given(st.lists(words, min_size=28, max_size=28), words)
def test_percentiles_do_not_fall(counts: list[int], largest: int) -> None:
    found = [metrics.percentile(share, counts, ENDS, largest) for share in (0.0, 0.01, 0.5, 0.5, 0.9, 0.99, 1.0)]
    assert found == sorted(found) if sum(counts) else set(found) == {None}


def test_interpolation() -> None:
    counts = [0, 4] + [0] * 26
    assert metrics.percentile(0.5, counts, ENDS, 0) == 1024 + 512  # the largest value is not in: the bucket's own end
    assert metrics.percentile(0.5, counts, ENDS, 1224) == 1024 + 100
    assert metrics.percentile(0.25, counts, ENDS, 2047 + 1) == 1024 + 256
    assert metrics.percentile(1.0, [0] * 27 + [1], ENDS, 1 << 40) == 1 << 40
    assert metrics.percentile(1.0, [0] * 27 + [1], ENDS, 5) == 2 * ENDS[-1]
    assert metrics.percentile(0.5, [0] * 28, ENDS, 5) is None


@given(st.lists(words, min_size=WORD_COUNT, max_size=WORD_COUNT))
def test_any_words_give_numbers(content: list[int]) -> None:
    seen = metrics.of_words(content)
    for number in numbers_in(seen):
        assert number is None or (number >= 0 and math.isfinite(number))
    json.dumps(seen)


# ---- from another process


def publishing(parent, _unused) -> None:
    with shmcast.Arena.create("1MiB") as arena:
        for _ in range(3):
            arena.publish(block(100), readers=0, keep=True)
        parent.send((arena.id, os.getpid()))
        parent.receive()


def reading(parent, arena) -> None:
    """Looks at an arena; what is sent is what changes with each look."""
    while True:
        (seen,) = metrics.read(arena=arena).values()
        parent.send((seen["counters"]["published"], seen["owner_alive"], seen["peers"]))
        parent.receive()


def test_of_another_process_alive_and_killed(child) -> None:
    process = child(publishing, 0)
    arena, pid = process.receive()
    (living,) = metrics.read().values()
    assert living["owner_alive"] and not living["ended"]
    assert living["owner"]["pid"] == pid
    assert living["owner"]["command"]
    assert living["peers"] == 1
    assert living["counters"]["published"] == 3
    assert living["histograms"]["publish_ns"]["count"] == 3
    process.kill()
    (dead,) = metrics.read(arena=arena).values()
    assert not dead["owner_alive"]
    assert dead["peers"] == 0
    assert {name: dead[name] for name in SECTIONS} == {name: living[name] for name in SECTIONS}
    assert shmcast.sweep().arenas == 1
    assert metrics.read() == {}


def test_the_reader_joins_nothing(child, arena) -> None:
    process = child(reading, arena.id)
    assert process.receive() == (0, True, 1)
    arena.publish(block(10))
    process.send("again")
    assert process.receive() == (1, True, 1)
    assert arena.peers == ()
    process.join()
    assert metrics.read(arena=arena.id)[arena.id]["counters"] == metrics.snapshot(arena)["counters"]
    assert metrics.read(arena=arena.id + 1) == {}
    assert metrics.read(namespace="of-somebody-else") == {}
    with pytest.raises(ValueError, match="namespace"):
        metrics.read(namespace="no such/namespace")


def test_what_is_no_arena_is_left_out(namespace, arena) -> None:
    odd = [names.segment_name(namespace, number, 0) for number in (1, 2, 3)]
    other = shmcast.Arena.create("1MiB")
    try:
        with open(names.DIRECTORY + odd[0], "wb"):
            pass  # created, not yet reserved
        with open(names.DIRECTORY + odd[1], "wb") as file:
            file.write(bytes(1 << 16))  # reserved, no magic yet
        with open(names.DIRECTORY + odd[2], "wb") as file:
            file.write(random.Random(1).randbytes(1 << 16))
        overwrite(control_file(other.id), FORMAT_OFFSET, struct.pack("<I", _native.FORMAT + 1))
        assert set(metrics.read()) == {arena.id}
    finally:
        overwrite(control_file(other.id), FORMAT_OFFSET, struct.pack("<I", _native.FORMAT))
        other.close()
        for name in odd:
            names.unlink(name)


def test_garbage_in_the_block(arena, rng) -> None:
    for content in (rng.bytes(3072), b"\xff" * 3072, bytes(3072)):
        overwrite(control_file(arena.id), METRICS_OFFSET, content)
        for seen in (metrics.snapshot(arena), metrics.read()[arena.id]):
            assert all(math.isfinite(number) for name in SECTIONS for number in numbers_in(seen[name]) if number)
        arena.publish(block(100))  # counts go on from whatever is there
        arena.meter.peak(_native.metric("peak_pending"), 1)
        arena.meter.observe(_native.metric("step_ns"), 1)
    seen = metrics.snapshot(arena)
    assert (seen["counters"]["published"], seen["histograms"]["step_ns"]["count"]) == (1, 1)


def test_the_stats_of_an_arena_are_its_metrics(arena) -> None:
    arena.publish(block(100))
    seen = metrics.snapshot(arena)
    flat = {**seen["counters"], **seen["gauges"], **seen["peaks"]}
    both = set(flat) & set(arena.stats())
    assert {"published", "published_bytes", "grown", "revoked", "swept", "used_bytes", "reserved_bytes"} <= both
    assert {name: flat[name] for name in both} == {name: arena.stats()[name] for name in both}


def test_readme_names_every_metric() -> None:
    section = re.search(r"^## Metrics\n(.*?)^## ", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    table = re.findall(r"^\| [^|`]+ \|(.*)\|$", section[1], re.MULTILINE)
    named = [name for row in table for name in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted(name for name, *_ in _native.METRICS)
