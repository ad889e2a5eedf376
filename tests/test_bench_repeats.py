"""The benchmark's repeated requests: the sequence is as stated, and the model of a cache counts as one would by hand."""

from __future__ import annotations

import numpy as np
import pytest

from tp import counted_report
from tp.repeats import Lru, Simulated, counted, key_sequence, simulate_lru
from tp.strategies import BATCHED, STRATEGIES, spec_of, with_executors


def repeats(keys: list[int]) -> int:
    return len(keys) - len(set(keys))


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("n", [1, 2, 10, 201])
def test_as_many_repeat_as_the_ratio_says(n: int, ratio: float, rng: np.random.Generator) -> None:
    keys = key_sequence(n, ratio, int(rng.integers(1 << 30)))
    assert len(keys) == n
    assert repeats(keys) == min(n - 1, round(ratio * n))  # the first can not be one


def test_contents_are_numbered_as_they_first_appear(rng: np.random.Generator) -> None:
    keys = key_sequence(500, 0.5, int(rng.integers(1 << 30)))
    assert list(dict.fromkeys(keys)) == list(range(250))


def test_the_same_seed_gives_the_same_sequence(rng: np.random.Generator) -> None:
    seed = int(rng.integers(1 << 30))
    assert key_sequence(100, 0.5, seed) == key_sequence(100, 0.5, seed) != key_sequence(100, 0.5, seed + 1)
    assert key_sequence(100, 0.5, [seed, 1]) != key_sequence(100, 0.5, [seed, 2])
    assert key_sequence(0, 0.5, seed) == []


def test_the_stated_sequence_stays_what_it_is() -> None:
    assert key_sequence(12, 0.5, 1) == [0, 0, 0, 1, 2, 2, 0, 3, 1, 4, 5, 3]


def test_repeats_show_old_and_new_contents_alike() -> None:
    keys = key_sequence(4000, 0.5, 3)
    places = {key: place for place, key in reversed(list(enumerate(keys)))}
    ages = [keys[place] / (max(keys[:place]) + 1) for place in range(1, 4000) if places[keys[place]] != place]
    assert np.mean(ages) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
def test_a_ratio_that_is_none_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="not between 0 and 1"):
        key_sequence(10, ratio, 1)


# ---- the model

ONES = dict.fromkeys("abcdef", 1)


@pytest.mark.parametrize(
    ("keys", "budget_bytes", "max_entries", "expected"),
    [
        ("", None, None, Simulated(0, 0, 0)),
        ("abcabc", None, None, Simulated(3, 3, 0)),
        ("abcabc", 3, None, Simulated(3, 3, 0)),
        ("abcabc", 2, None, Simulated(0, 6, 4)),  # each has just gone when it comes again
        ("abcabc", None, 2, Simulated(0, 6, 4)),
        ("abacab", 2, None, Simulated(2, 4, 2)),  # a was used after b, so b goes for c, and then c for b
        ("abcabc", 0, None, Simulated(0, 6, 0)),
        ("abcabc", None, 0, Simulated(0, 6, 0)),
        ("aaaa", 1, 1, Simulated(3, 1, 0)),
    ],
)
def test_the_model_counts(keys: str, budget_bytes: int | None, max_entries: int | None, expected: Simulated) -> None:
    assert simulate_lru(keys, ONES, budget_bytes, max_entries) == expected


def test_bytes_make_room_for_what_is_large() -> None:
    sizes = {"a": 4, "b": 3, "c": 6, "d": 11}
    # a goes for c, which fits beside b; d never fits, and takes nothing away; a needs the room of c, which is older than b.
    assert simulate_lru("abcdcbc", sizes, 9, None) == Simulated(3, 4, 1)
    assert simulate_lru("abcdcba", sizes, 9, None) == Simulated(2, 5, 2)


def test_what_a_model_has_done_since_is_counted_apart() -> None:
    model = Lru[str](2, None)
    for key in "ab":
        model.see(key, 1)
    before = model.done
    for key in "bca":
        model.see(key, 1)
    assert (model.done - before, model.nbytes) == (Simulated(1, 2, 2), 2)


def test_the_model_agrees_with_stack_distances(rng: np.random.Generator) -> None:
    """Of entries of one size, a request is found exactly if fewer than so many others came since it was last there."""
    keys = key_sequence(300, 0.7, int(rng.integers(1 << 30)))
    for entries in (1, 5, 40):
        hits = 0
        for place, key in enumerate(keys):
            before = keys[:place]
            if key in before:
                last = place - 1 - before[::-1].index(key)
                hits += len(set(keys[last + 1 : place])) < entries
        assert simulate_lru(keys, dict.fromkeys(keys, 7), None, entries).hits == hits
        assert simulate_lru(keys, dict.fromkeys(keys, 7), 7 * entries + 6, None).hits == hits


# ---- the table of strategies


def test_a_strategy_with_a_caster_is_run_by_each_executor() -> None:
    executors = (("thread", 1), ("process", 2))
    assert with_executors("shm-cast", executors) == ["shm-cast@thread:1", "shm-cast@process:2"]
    assert with_executors("shm-cast", executors[:1]) == ["shm-cast"]
    assert with_executors("replicate", executors) == ["replicate"]
    spec = spec_of("cache@process:2")
    assert (spec.executor, spec.workers, spec.cached) == ("process", 2, True)
    assert spec_of("cache") == STRATEGIES["cache"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--executor fibre", "fibre: not among thread, process, inline"),
        ("--executor thread:0", "thread:0: 0 is not at least 1"),
        ("--repeat-ratio 1.5", "1.5 is not between 0 and 1"),
        ("--cache-bytes much", "'much' is not a size"),
        ("--switch-every 0.1", "--switch-every: for streams"),
        ("--switch-every 0.1 --rate 5 --strategies object", "--switch-every: for streams, by cache"),
        ("--rate 5 --strategies shm-cast", "shm-cast: for batches only"),
        ("--producer tokenizer --strategies cache", "cache: for --producer entry only"),
        ("--preset origin --repeat-ratio 0.5", "--repeat-ratio: --preset origin"),
    ],
)
def test_what_can_not_be_measured_is_refused(line: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("PIL", "tqdm"):
        pytest.importorskip(package)
    from tp.run import main

    with pytest.raises(SystemExit, match="2"):
        main(line.split())
    assert says in capsys.readouterr().err


def test_all_strategies_of_the_story_are_in_the_table_of_batches() -> None:
    story = [
        "replicate",
        "object",
        "raw",
        "raw-async",
        "object-async",
        "object-batch",
        "eager",
        "cache",
        "shm-naive",
        "shm",
        "shm-zmq",
    ]
    assert set(story) <= set(BATCHED)


@pytest.mark.parametrize(
    ("counters", "says"),
    [
        ({"cache_hits": 3, "cache_joined": 1}, "the same: yes"),
        ({"cache_hits": 4, "cache_evicted": 9}, "the same: yes"),
        ({"cache_hits": 3}, "the same: NO"),
        ({"cache_hits": 5, "cache_joined": 1}, "the same: NO"),
        ({"cache_hits": 3, "cache_joined": 1, "cache_evicted": 1}, "the same: yes"),
        ({"cache_hits": 4, "cache_joined": 1, "cache_evicted": 1}, "not to be compared"),
    ],
)
def test_a_report_says_whether_a_cache_is_as_its_model(counters: dict[str, int], says: str) -> None:
    config = {"cache_bytes": 1 << 20, "cache_entries": None, "repeat_ratio": 0.5, "seed": 1, "stream": None}
    result = {"strategy": "cache", "wall_s": 1.0, **counted([counters], [Simulated(1, 2, 0), Simulated(3, 0, 0)])}
    lines = counted_report.lines({"config": config, "results": [result, {"strategy": "shm", "wall_s": 1.0}]})
    assert [says in line for line in lines if "an exact LRU: 4 hits, 2 misses" in line] == [True]
