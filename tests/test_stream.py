"""The benchmark's streams: which requests come when, what a run is accounted for, and what is noticed if it is wrong."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tp.arrivals import Arrivals, Request, plan, sources
from tp.config import Stream
from tp.contents import Slot, fingerprint
from tp.records import Ended, StreamReply, changes
from tp.repeats import Simulated, key_sequence
from tp.servers import CANCELLED, FAILED, OK, Ending, Synchronous
from tp.stream_measure import StreamCollected, StreamRun, account
from tp.world import Served

MIX = (("small", 5.0), ("medium", 3.0), ("large", 2.0))
SIZES = ["small"] * 3 + ["medium"] * 2 + ["large"]
MS = 1_000_000


# ---- which requests come when


def test_the_same_seed_gives_the_same_stream(rng: np.random.Generator) -> None:
    seed = [int(rng.integers(1 << 30)), 7]
    stream = Stream(rate=50, mix=MIX, cancel_ratio=0.2, fail_ratio=0.1)
    first = plan(stream, SIZES, 100, seed)
    assert first == plan(stream, SIZES, 100, seed)
    assert first != plan(stream, SIZES, 100, [seed[0], 8])


def test_a_repeat_has_the_source_of_its_content_and_the_rest_of_the_stream_stays() -> None:
    stream = Stream(rate=50, mix=MIX, fail_ratio=0.1)
    requests, without = plan(stream, SIZES, 100, [1], 0.5), plan(stream, SIZES, 100, [1])
    assert [request.content for request in without] == list(range(100))
    assert [request.content for request in requests] == key_sequence(100, 0.5, [1])
    assert len({(request.content, request.source) for request in requests}) == 50
    assert [(a.arrival_ns, a.fails) for a in requests] == [(a.arrival_ns, a.fails) for a in without]


def test_ratios_are_kept_to_the_request() -> None:
    requests = plan(Stream(rate=50, mix=MIX, cancel_ratio=0.25, fail_ratio=0.1), SIZES, 200, [1])
    assert sum(request.fails for request in requests) == 20
    cancelled = [request.cancel_ns for request in requests if request.cancel_ns is not None]
    assert len(cancelled) == 50
    assert all(0 <= cancel_ns <= Stream().cancel_within_ms * MS for cancel_ns in cancelled)


def test_a_rate_is_kept_and_times_only_grow() -> None:
    times = [request.arrival_ns or 0 for request in plan(Stream(rate=200, mix=MIX), SIZES, 20_000, [1])]
    assert times == sorted(times)
    assert times[-1] / 1e9 == pytest.approx(100, rel=0.03)
    gaps = np.diff(times)
    assert np.std(gaps) == pytest.approx(np.mean(gaps), rel=0.05)  # as of a Poisson process


def test_no_rate_is_all_at_once_and_concurrency_is_so_many() -> None:
    assert {request.arrival_ns for request in plan(Stream(mix=MIX), SIZES, 30, [1])} == {0}
    requests = plan(Stream(concurrency=4, mix=MIX), SIZES, 10, [1])
    assert [request.arrival_ns for request in requests] == [0] * 4 + [None] * 6


def test_sizes_are_as_the_mix_has_them() -> None:
    requests = plan(Stream(mix=MIX), SIZES, 10_000, [1])
    shares = [sum(SIZES[request.source] == size for request in requests) / 10_000 for size, _ in MIX]
    assert shares == pytest.approx([0.5, 0.3, 0.2], abs=0.02)
    assert {request.source for request in requests} == set(range(len(SIZES)))


@pytest.mark.parametrize(
    ("distinct", "counts"), [(1, [1, 1, 1]), (3, [1, 1, 1]), (4, [2, 1, 1]), (20, [10, 6, 4]), (21, [10, 6, 5])]
)
def test_each_size_is_among_the_raw_requests(distinct: int, counts: list[int]) -> None:
    found = sources(Stream(mix=MIX, distinct=distinct))
    assert [found.count(size) for size, _ in MIX] == counts


def test_arrivals_and_cancellations_are_taken_once_when_they_are_due() -> None:
    arrivals = Arrivals([Request(0, 20), Request(0, 10, cancel_ns=5), Request(0, 10, cancel_ns=0)], 1000)
    assert arrivals.take(1009) == ([], [])
    assert arrivals.take(1010) == ([1, 2], [2])
    assert arrivals.take(1014) == ([], [])
    assert arrivals.take(2000) == ([0], [1])
    assert arrivals.take(3000) == ([], [])
    assert arrivals.arrived_ns == {0: 1020, 1: 1010, 2: 1010}


def test_the_next_comes_when_one_has_ended() -> None:
    arrivals = Arrivals([Request(0, 0), Request(0, 0), Request(0, None), Request(0, None, cancel_ns=7)], 100)
    assert arrivals.take(100) == ([0, 1], [])
    arrivals.end(1, 150)
    assert arrivals.take(150) == ([2], [])
    arrivals.end(2, 160)
    assert arrivals.take(166) == ([3], [])
    assert arrivals.take(167) == ([], [3])
    assert not arrivals.over
    arrivals.end(1, 170)
    assert arrivals.over
    assert arrivals.arrived_ns == {0: 100, 1: 100, 2: 150, 3: 160}


# ---- synchronous strategies


class Recorder:
    """In place of a strategy: remembers what it was given."""

    def __init__(self, rank: Any) -> None:
        self.rank, self.served = rank, list[list[int]]()

    def serve(self, batch: list[int]) -> None:
        self.served.append(batch)
        for number in batch:
            self.rank.taken[number] = SimpleNamespace(status=FAILED if number == 3 else OK)


def synchronous(batch: int) -> tuple[Synchronous, Recorder]:
    rank: Any = SimpleNamespace(config=SimpleNamespace(batch=batch), taken={}, begin=lambda batch: None)
    recorder: Any = Recorder(rank)
    return Synchronous(rank, recorder), recorder


def test_a_synchronous_strategy_serves_what_waits_a_few_at_a_time() -> None:
    server, strategy = synchronous(2)
    assert server.iterate([0, 1, 2], [], b"") == [Ending(0, OK), Ending(1, OK)]
    assert server.iterate([3], [], b"") == [Ending(2, OK), Ending(3, FAILED)]
    assert server.iterate([], [], b"") == []
    assert strategy.served == [[0, 1], [2, 3]]


def test_what_is_cancelled_while_it_waits_is_not_served() -> None:
    server, strategy = synchronous(1)
    assert server.iterate([0, 1, 2], [1], b"") == [Ending(1, CANCELLED), Ending(0, OK)]
    assert server.iterate([], [0, 1], b"") == [Ending(2, OK)]  # they have ended already
    assert strategy.served == [[0], [2]]


# ---- what a run is accounted for

PRINTS = [11, 22]
REQUESTS = [Request(0, 0), Request(1, 5), Request(1, 6, fails=True), Request(0, 7, cancel_ns=1)]


def good(offset_ns: int = 0) -> list[Ended]:
    ended = [
        Ended(3, 1, OK, 1_000 * MS + offset_ns, 22),
        Ended(3, 3, CANCELLED, 1_001 * MS, 0),
        Ended(5, 0, OK, 2_000 * MS, 11),
        Ended(6, 2, FAILED, 2_001 * MS, 0),
    ]
    return ended


def reply(ended: list[Ended], lateness_ms: list[int] | None = None, entry: bool = True) -> StreamReply:
    arrived_ns = {0: 500 * MS, 1: 600 * MS, 2: 600 * MS, 3: 600 * MS} if entry else {}
    return StreamReply(ended, arrived_ns, 7, [ms * MS for ms in lateness_ms or []], 9, 10, 1000, 0, 0, {})


def accounted(*replies: StreamReply) -> StreamRun:
    return account(REQUESTS, Served(500 * MS, list(replies), 3_000 * MS), PRINTS, late_ms=5)


@pytest.mark.parametrize("last", [0, 1])
def test_a_request_ends_when_the_last_rank_has_freed_it(last: int) -> None:
    offset_ns = [0, 0]
    offset_ns[last] = 40 * MS
    run = accounted(reply(good(offset_ns[0]), [0, 6]), reply(good(offset_ns[1]), [5, 90], entry=False))
    assert run.problems == [] and run.alike
    assert run.latencies_ms == [440.0, 1500.0]  # only of those that ended well
    assert run.wall_s == 1.501
    assert run.cpu_s == 3.0
    assert dict(run.statuses) == {OK: 2, FAILED: 1, CANCELLED: 1}
    assert (run.late_ticks, len(run.lateness_ms)) == (2, 4)
    assert (run.iterations, run.broadcasts, run.collectives, run.bytes_broadcast) == (7, 9, 10, 1000)


@pytest.mark.parametrize("place", [0, 3])
@pytest.mark.parametrize("field", ["iteration", "status", "number"])
def test_ranks_that_differ_are_noticed(place: int, field: str) -> None:
    other = good()
    other[place] = other[place]._replace(**{field: {"iteration": 4, "status": CANCELLED, "number": 9}[field]})
    run = accounted(reply(good()), reply(other, entry=False))
    assert not run.alike
    assert any("ranks differ" in problem for problem in run.problems)


def test_the_order_of_outcomes_counts() -> None:
    other = good()
    other[0], other[1] = other[1], other[0]
    assert not accounted(reply(good()), reply(other, entry=False)).alike


@pytest.mark.parametrize(
    ("place", "change", "says"),
    [
        (0, {"fingerprint": 11}, "request 1: what was read"),
        (1, {"status": OK, "fingerprint": 22}, "request 3: what was read"),
        (2, {"status": CANCELLED}, "request 0: cancelled, expected ok"),
        (2, {"status": FAILED}, "request 0: failed, expected ok"),
        (3, {"status": OK, "fingerprint": 22}, "request 2: ok, expected failed"),
        (3, {"number": 0, "status": OK, "fingerprint": 11}, "request 0: ended 2 times"),
        (3, {"number": 0, "status": OK, "fingerprint": 11}, "request 2: ended 0 times"),
    ],
)
def test_wrong_outcomes_and_contents_are_noticed(place: int, change: dict[str, Any], says: str) -> None:
    ended = good()
    ended[place] = ended[place]._replace(**change)
    run = accounted(reply(ended), reply(ended, entry=False))
    assert run.alike  # on all ranks alike, and still wrong
    assert [problem for problem in run.problems if says in problem and problem.startswith("rank 1")]


def test_a_report_pools_latencies_and_takes_medians_of_the_rest() -> None:
    runs = [accounted(reply(good(offset_ms * MS), [0, 6]), reply(good(), entry=False)) for offset_ms in (0, 10, 20)]
    runs[2].wall_s = 9.0
    result = StreamCollected("shm", runs).result()
    assert result["verified"] and result["outcomes_identical"]
    assert result["outcomes"] == {OK: 6, FAILED: 3, CANCELLED: 3}
    assert (result["wall_s"], result["wall_range_s"]) == (1.501, [1.501, 9.0])
    assert result["throughput_rps"] == 2 / 1.501
    assert (result["latency_ms"]["samples"], result["latency_ms"]["max"], result["latency_ms"]["p99"]) == (
        6,
        1500,
        None,
    )
    assert (result["ticks"], result["late_ticks"]) == (2, 1)


def test_a_report_adds_up_what_was_counted_and_compares_a_cache_with_its_model() -> None:
    runs = [accounted(reply(good()), reply(good(), entry=False)) for _ in range(2)]
    assert "cache" not in StreamCollected("shm", runs).result()
    for hits, run in enumerate(runs):
        run.counters, run.simulated = {"cache_hits": hits, "cache_joined": 1, "mode_shm": 7}, Simulated(2, 5, 1)
    result = StreamCollected("cache", runs).result()
    assert result["counters"] == {"cache_hits": 1, "cache_joined": 2, "mode_shm": 14}
    cache = result["cache"]
    assert (cache["hits"], cache["joined"], cache["misses"], cache["simulated_hits"]) == (1, 2, 0, 4)
    assert not cache["same_hits"]
    runs[0].counters["cache_hits"] = 1
    assert StreamCollected("cache", runs).result()["cache"]["same_hits"]


def test_changes_are_of_what_is_counted_now() -> None:
    assert changes({"a": 1, "gone": 3}, {"a": 4, "new": 2}) == {"a": 3, "new": 2}


def test_a_report_is_not_verified_after_a_problem_or_an_error() -> None:
    assert not StreamCollected("shm").result()["verified"]
    runs = [accounted(reply(good()), reply(good(), entry=False))]
    assert not StreamCollected("shm", runs, problems=["wrong"]).result()["verified"]
    assert not StreamCollected("shm", runs, error="died").result()["verified"]
    runs[0].problems.append("wrong")
    assert StreamCollected("shm", runs).result()["problems"] == ["wrong"]


# ---- contents


def test_a_slot_holds_what_was_read(rng: np.random.Generator) -> None:
    arrays = [rng.random((5, 7), np.float32), rng.integers(0, 9, 3, np.int16), np.float64(3).reshape(())]
    features: Any = SimpleNamespace(meta={"a": 1}, arrays=arrays)
    slot = Slot(np.zeros(1024, np.uint8))
    slot.read(4, features)
    assert slot.differences(features) is None
    assert slot.fingerprint() == fingerprint({"a": 1}, arrays)
    slot.buffer[139] ^= 1  # the last byte of the first array
    assert "array 0: 1 of 35" in str(slot.differences(features))
    assert slot.fingerprint() != fingerprint({"a": 1}, arrays)
    slot.read(4, features)
    slot.spoil()
    assert slot.index == -1 and slot.differences(features) is not None


def test_a_fingerprint_covers_every_page_shape_and_meta(rng: np.random.Generator) -> None:
    array = rng.random(1 << 16, np.float32)
    found = fingerprint({}, [array])
    for page in range(array.nbytes // 4096):
        spoiled = array.copy()
        spoiled[page * 1024 : (page + 1) * 1024] = 0
        assert fingerprint({}, [spoiled]) != found
    assert fingerprint({}, [array.reshape(256, 256)]) != found
    assert fingerprint({}, [array.view(np.int32)]) != found
    assert fingerprint({"a": 1}, [array]) != found
