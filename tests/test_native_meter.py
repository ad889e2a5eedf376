"""The table of metrics and who writes it: each kind, buckets, several processes at once, forked children, lifetimes."""

import bisect
import gc
import os
import re
import subprocess
import weakref
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from raw import Raw, joined
from shmcast import _native, names
from shmcast.errors import ArenaFullError

ROOT = Path(__file__).parents[1]
U64 = (1 << 64) - 1
BUCKETS = 28
WORDS = {"counter": 1, "gauge": 1, "peak": 1, "histogram": 2 + BUCKETS, "sizes": 2 + BUCKETS}
CALLS = {"counter": "add", "gauge": "set", "peak": "peak", "histogram": "observe", "sizes": "observe"}
BLOCK_WORDS = 384
ONE_OF = {"counter": "requests", "gauge": "pending", "peak": "peak_pending", "histogram": "step_ns"} | {
    "sizes": "batch_requests"
}
ENDS = {"histogram": _native.HISTOGRAM_ENDS_NS, "sizes": _native.SIZES_ENDS}

values = st.one_of(st.integers(0, U64), st.integers(0, 63).flatmap(lambda b: st.integers(1 << b, (2 << b) - 1)))


@pytest.fixture
def raw(namespace):
    arena = Raw(namespace)
    yield arena
    arena.close()


def words_of(meter, name):
    _, kind, first, _ = _native.METRICS[_native.metric(name)]
    return meter.words()[first : first + WORDS[kind]]


# ---- the table


def test_the_table_is_total():
    assert len({name for name, *_ in _native.METRICS}) == len(_native.METRICS)
    at = 0
    for index, (name, kind, first, text) in enumerate(_native.METRICS):
        assert _native.metric(name) == index
        assert first == at, f"{name} starts where the one before it ends"
        at += WORDS[kind]
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", name)
        assert text[0].islower() or text[0].isdigit(), f"{name} says what it counts"
        assert (text.split()[0] == "ns") == name.endswith("_ns"), f"{name} has its unit in its name"
        assert ("bytes" in text.split()[:2]) == name.endswith("_bytes"), f"{name} has its unit in its name"
    assert at == len(_native.Meter().words()) <= BLOCK_WORDS


def test_the_table_is_that_of_the_header():
    rows = re.findall(r'^    X\((\w+), [A-Z]+, "([^"]+)"\)', (ROOT / "native/metrics.h").read_text(), re.MULTILINE)
    assert rows == [(name, text) for name, _, _, text in _native.METRICS]


def test_the_first_words_are_where_they_always_were():
    first = "reserved_bytes used_bytes peak_used_bytes published published_bytes grown revoked swept"
    assert [row[0] for row in _native.METRICS[:8]] == first.split()
    assert [row[2] for row in _native.METRICS[:8]] == list(range(8))


def test_a_metric_that_does_not_exist():
    with pytest.raises(ValueError, match="'no_such_thing'; see METRICS"):
        _native.metric("no_such_thing")
    with pytest.raises(ValueError, match="metric 3"):
        _native.metric(3)
    with pytest.raises(ValueError, match=f"the table has {len(_native.METRICS)}"):
        _native.Meter().add(len(_native.METRICS), 1)


@pytest.mark.parametrize("kind", CALLS)
def test_a_call_is_for_one_kind(kind):
    meter = _native.Meter()
    for call in set(CALLS.values()) - {CALLS[kind]}:
        with pytest.raises(ValueError, match=f"{call}: metric '{ONE_OF[kind]}' is a {kind}, .* by {CALLS[kind]}"):
            getattr(meter, call)(_native.metric(ONE_OF[kind]), 1)
    write = getattr(meter, CALLS[kind])
    for wrong in (-1, U64 + 1):
        with pytest.raises(OverflowError):
            write(_native.metric(ONE_OF[kind]), wrong)
    for wrong in (1.5, "1", None):
        with pytest.raises(TypeError):
            write(_native.metric(ONE_OF[kind]), wrong)
    with pytest.raises(TypeError, match="2 arguments, 1"):
        write(_native.metric(ONE_OF[kind]))
    assert set(meter.words()) == {0}


# ---- kinds


@given(st.lists(values))
def test_counter_gauge_and_peak(given_values):
    meter = _native.Meter()
    for value in given_values:
        meter.add(_native.metric("requests"), value)
        meter.set(_native.metric("pending"), value)
        meter.peak(_native.metric("peak_pending"), value)
    assert words_of(meter, "requests") == [sum(given_values) & U64]
    assert words_of(meter, "pending") == given_values[-1:] or [0]
    assert words_of(meter, "peak_pending") == [max(given_values, default=0)]
    assert sum(meter.words()) == sum(sum(words_of(meter, ONE_OF[kind])) for kind in ("counter", "gauge", "peak"))


@pytest.mark.parametrize("kind", ENDS)
@given(observed=st.lists(values))
@example([0])
@example([1023, 1024, 2047, 2048])
@example([(1 << 36) - 1, 1 << 36, U64])
@example([(1 << 26) - 1, 1 << 26])
def test_buckets(kind, observed):
    meter = _native.Meter()
    for value in observed:
        meter.observe(_native.metric(ONE_OF[kind]), value)
    expected = [0] * BUCKETS
    for value in observed:
        expected[bisect.bisect_right(ENDS[kind], value)] += 1
    assert words_of(meter, ONE_OF[kind]) == [sum(observed) & U64, max(observed, default=0), *expected]
    assert sum(meter.words()) == sum(words_of(meter, ONE_OF[kind]))


def test_bucket_ends():
    assert tuple(1 << (10 + bucket) for bucket in range(BUCKETS - 1)) == _native.HISTOGRAM_ENDS_NS
    assert _native.HISTOGRAM_ENDS_NS[-1] >= 64 * 10**9
    assert tuple(1 << bucket for bucket in range(BUCKETS - 1)) == _native.SIZES_ENDS


# ---- whose memory


def test_memory_of_its_own():
    one, two = _native.Meter(), _native.Meter(None)
    one.add(_native.metric("requests"), 5)
    assert (sum(one.words()), sum(two.words())) == (5, 0)
    assert not one.shared
    for wrong in ((1,), ("member",), (None, None)):
        with pytest.raises(TypeError):
            _native.Meter(*wrong)


def test_the_memory_of_an_arena(raw):
    meter, again = _native.Meter(raw.member), _native.Meter(raw.member)
    assert meter.shared
    meter.add(_native.metric("requests"), 5)
    assert words_of(again, "requests") == [5]
    fd = names.open_writable(raw.name(0))
    try:
        assert _native.inspect(fd)["metrics"] == meter.words()
    finally:
        os.close(fd)


def test_a_meter_keeps_its_member(raw):
    meter = _native.Meter(raw.member)
    member = weakref.ref(raw.member)
    raw.owner.end()
    owner, raw.owner, raw.member = raw.owner, None, None
    del owner
    gc.collect()
    assert member() is not None
    meter.add(_native.metric("requests"), 1)
    assert words_of(meter, "requests") == [1]
    del meter
    gc.collect()
    assert member() is None
    raw.close = lambda: [names.unlink(raw.name(number)) for number in (1, 0)]


# ---- several processes


ROUNDS = 20_000
RANKS = 4


def counting(parent, namespace, arena, rank):
    """Joins and adds, as fast as it can, at the same time as the others."""
    meter = _native.Meter(joined(namespace, arena))
    counter, peak = _native.metric("requests"), _native.metric("peak_pending")
    histogram, sizes = _native.metric("step_ns"), _native.metric("batch_requests")
    parent.send("ready")
    parent.receive()
    for number in range(ROUNDS):
        meter.add(counter, rank + 1)
        meter.peak(peak, number * RANKS + rank)
        meter.observe(histogram, 1000 << rank)
        meter.observe(sizes, number)
    parent.send("done")
    parent.receive()


def test_totals_of_several_processes_are_exact(child, raw):
    meter = _native.Meter(raw.member)
    ranks = [child(counting, raw.namespace, raw.id, rank) for rank in range(RANKS)]
    for process in ranks:
        assert process.receive() == "ready"
    for process in ranks:
        process.send("go")
    for process in ranks:
        assert process.receive() == "done"
    assert words_of(meter, "requests") == [ROUNDS * sum(range(1, RANKS + 1))]
    assert words_of(meter, "peak_pending") == [ROUNDS * RANKS - 1]
    total, largest, *buckets = words_of(meter, "step_ns")
    assert (total, largest) == (ROUNDS * sum(1000 << rank for rank in range(RANKS)), 8000)
    assert buckets[:4] == [ROUNDS] * RANKS
    total, largest, *buckets = words_of(meter, "batch_requests")
    assert (total, largest, sum(buckets)) == (RANKS * ROUNDS * (ROUNDS - 1) // 2, ROUNDS - 1, RANKS * ROUNDS)
    ranks[0].kill()
    for process in ranks[1:]:
        process.join()
    assert words_of(meter, "requests") == [ROUNDS * sum(range(1, RANKS + 1))]  # what they counted stays


def test_nothing_is_lost_where_processes_meet(tmp_path):
    """The same from C, where they meet within nanoseconds: peaks never fall either."""
    program = tmp_path / "metrics_check"
    sources = [ROOT / "tests/native/metrics_check.c", ROOT / "native/metrics.c"]
    flags = ["-std=c11", "-D_GNU_SOURCE=1", "-O1", "-g", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'native'}"]
    subprocess.run(["cc", *flags, *sources, "-o", program], check=True)
    done = subprocess.run([program, "4", "500000"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "metrics_check: ok\n"), done.stdout + done.stderr


def forking(parent, namespace, arena):
    """Joins, forks, and lets the child try every call, then its own meter of its own memory."""
    member = joined(namespace, arena)
    meter, own = _native.Meter(member), _native.Meter()
    meter.add(_native.metric("requests"), 1)
    own.add(_native.metric("requests"), 1)
    pid = os.fork()
    if pid == 0:
        meters = (meter, _native.Meter(member), own)
        for kind, name in ONE_OF.items():
            for one in meters:
                getattr(one, CALLS[kind])(_native.metric(name), 7)
        os._exit(0 if words_of(own, "requests") == [8] else 1)
    _, status = os.waitpid(pid, 0)
    parent.send((os.waitstatus_to_exitcode(status), words_of(meter, "requests"), words_of(own, "requests")))
    member.leave()
    meter.add(_native.metric("requests"), 1)
    parent.send("left")


def test_a_forked_child_and_who_has_left_write_nothing(child, raw):
    meter = _native.Meter(raw.member)
    before = meter.words()
    process = child(forking, raw.namespace, raw.id)
    assert process.receive() == (0, [1], [1])
    assert process.receive() == "left"
    after = meter.words()
    after[_native.METRICS[_native.metric("requests")][2]] -= 1
    assert after == before


# ---- what the owner counts itself


def test_what_the_owner_counts(raw):
    meter = _native.Meter(raw.member)

    def seen(*wanted):
        return [words_of(meter, name)[0] for name in wanted]

    assert seen("reserved_bytes", "grown", "retired", "live_blocks", "peak_live_blocks") == [1 << 20, 1, 0, 0, 0]
    blocks = [raw.publish(bytes(1000), keep=True) for _ in range(5)]
    assert seen("published", "published_bytes", "live_blocks", "peak_live_blocks") == [5, 5000, 5, 5]
    assert seen("used_bytes", "peak_used_bytes") == [5 * 1024, 5 * 1024]
    raw.owner.alias(*blocks[0][:2], 0, (), True, 0)
    assert seen("published", "published_bytes", "live_blocks") == [6, 6000, 6]
    for slot, generation, *_ in blocks[1:]:
        raw.owner.release(slot, generation)
    assert raw.used() == 2
    assert seen("live_blocks", "peak_live_blocks") == [2, 6]
    assert seen("used_bytes", "peak_used_bytes") == [1024, 5 * 1024]
    raw.add_segment(1 << 20)
    assert raw.owner.retire_segment(2)
    names.unlink(raw.name(2))
    assert seen("reserved_bytes", "grown", "retired") == [1 << 20, 2, 1]


def test_what_was_not_published_is_not_counted(raw):
    meter = _native.Meter(raw.member)
    assert raw.publish(bytes(2 << 20), keep=True) is None
    assert raw.owner.publish_many([bytes(900_000)] * 2, 0, (), True, 0, True) is None
    raw.owner.reserve(100).abort()
    assert words_of(meter, "live_blocks") == [0]
    assert words_of(meter, "used_bytes") == [0]


def test_live_blocks_where_slots_are_the_limit(namespace):
    raw = Raw(namespace, slots=2)
    try:
        meter = _native.Meter(raw.member)
        for _ in range(2):
            raw.publish(b"x", keep=True)
        with pytest.raises(ArenaFullError):
            raw.publish(b"x", keep=True)
        assert words_of(meter, "live_blocks") == [2]
    finally:
        raw.close()
