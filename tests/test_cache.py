"""What a caster keeps: exactly what the least recently used rule says, never anybody else's, and nothing that is in the way.

Equal requests at once: `test_cache_flight`, `test_cache_storm`. Several ranks: `test_cache_ranks`. Keys: `test_keys`."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import shmcast
from makers import MIB, outcomes_of
from ranks import in_use
from shmcast import Arena, Caster, cache, metrics
from shmcast.attach import lease_of

BOTH = pytest.mark.parametrize("executor", ["thread", "inline"])


@pytest.fixture
def group() -> Iterator[shmcast.Group]:
    with shmcast.Group(max_bytes="64MiB") as group:
        yield group


class Derived:
    """Makes of a number content that is that number's alone; ``sizes``: bytes by number."""

    def __init__(self, sizes: Callable[[int], int]) -> None:
        self.sizes = sizes
        self.made: list[int] = []
        self._contents: dict[int, bytes] = {}

    def expected(self, number: int) -> dict[str, Any]:
        content = self._contents.get(number)
        if content is None:
            content = self._contents[number] = random.Random(number).randbytes(self.sizes(number))
        array = np.frombuffer(content, np.uint8)
        return {"x": array, "half": array[: array.size // 2], "n": number, "pad": "p" * (number % 700)}

    def __call__(self, raw: int) -> dict[str, Any]:
        self.made.append(raw)
        return self.expected(raw)

    def check(self, number: int, value: Any) -> None:
        wanted = self.expected(number)
        assert value["n"] == number
        assert value["pad"] == wanted["pad"]
        for name in ("x", "half"):
            assert value[name].tobytes() == wanted[name].tobytes(), f"{name} of {number} is not its own"


def counted(caster: Caster) -> dict[str, int]:
    """What the metrics say of the cache, without the prefix."""
    found = metrics.snapshot(caster)
    return {
        name.removeprefix("cache_"): value
        for section in ("counters", "gauges")
        for name, value in found[section].items()
        if name.startswith("cache_")
    }


def kept_of(caster: Caster) -> cache.Cache:
    return caster._intake._desk.cache


def one(caster: Caster, raw: Any, rid: Any = "one") -> Any:
    (outcome,) = caster.cast([(rid, raw)])
    return outcome.result()


# ---- what is kept


class Lru:
    """The rule, written down as simply as can be."""

    def __init__(self, max_bytes: int | None, max_entries: int | None) -> None:
        self.max_bytes, self.max_entries = max_bytes, max_entries
        self.sizes: OrderedDict[int, int] = OrderedDict()
        self.hits = self.evicted = 0

    def ask(self, number: int, nbytes: int) -> bool:
        if number in self.sizes:
            self.sizes.move_to_end(number)
            self.hits += 1
            return True
        if self.max_bytes is None or nbytes <= self.max_bytes:
            self.sizes[number] = nbytes
            while (self.max_bytes is not None and sum(self.sizes.values()) > self.max_bytes) or (
                self.max_entries is not None and len(self.sizes) > self.max_entries
            ):
                self.sizes.popitem(last=False)
                self.evicted += 1
        return False


def sizes_in_the_cache(group: shmcast.Group, derived: Derived, numbers: range) -> dict[int, int]:
    """What each counts for: what it takes of the arena, what travels, and the books."""
    found = {}
    for number in numbers:
        part = group.prepare(derived.expected(number))
        found[number] = part.published_bytes + len(part.blob) + cache.ENTRY_BYTES
        part.withdraw()
    return found


@BOTH
@pytest.mark.parametrize(
    ("max_bytes", "max_entries"),
    [(600_000, None), (None, 7), (600_000, 12), (2000, None), (60_000, 3), (1 << 25, 1000)],
)
def test_hits_are_those_of_an_exact_simulation(
    group: shmcast.Group, seed: int, executor: Any, max_bytes: int | None, max_entries: int | None
) -> None:
    rng = random.Random(seed)
    sizes = [rng.choice([0, 100, 3000, 20_000, 60_000, 200_000, 300_000]) for _ in range(40)]
    derived = Derived(sizes.__getitem__)
    weights = [rng.random() ** 3 for _ in sizes]
    cost = sizes_in_the_cache(group, derived, range(len(sizes)))
    lru = Lru(max_bytes, max_entries)
    arena = group.arena
    with Caster(
        group, derived, inline_bytes=0, cache_bytes=max_bytes, cache_entries=max_entries, executor=executor
    ) as caster:
        for count in range(500):
            (number,) = rng.choices(range(len(sizes)), weights)
            before = len(derived.made)
            derived.check(number, one(caster, number))
            hit = lru.ask(number, cost[number])
            assert (len(derived.made) == before) == hit, (
                f"request {count}: {number} is {'' if hit else 'no '}hit (seed {seed})"
            )
            if count % 50 == 0:
                assert counted(caster)["bytes"] == sum(lru.sizes.values())
        found = counted(caster)
        assert found["hits"] == lru.hits
        assert found["misses"] == 500 - lru.hits
        assert found["evicted"] == lru.evicted
        assert (found["bytes"], found["entries"]) == (sum(lru.sizes.values()), len(lru.sizes))
        assert found["joined"] == found["keyless"] == 0
        peaks = metrics.snapshot(caster)["peaks"]
        assert max_entries is None or peaks["peak_cache_entries"] <= max_entries
        assert max_bytes is None or peaks["peak_cache_bytes"] <= max_bytes
    assert in_use(arena) == 0
    assert counted(caster)["bytes"] == counted(caster)["entries"] == 0


def test_nothing_is_kept_unless_asked_for(group: shmcast.Group) -> None:
    derived = Derived(lambda number: 100)
    with Caster(group, derived, cache_key=lambda raw: b"all the same") as caster:
        for number in (1, 1, 2):
            derived.check(number, one(caster, number))
        assert derived.made == [1, 1, 2]
        assert set(counted(caster).values()) == {0}


def test_a_hit_is_the_same_block_under_another_name(group: shmcast.Group) -> None:
    with Caster(group, Derived(lambda number: 100_000), inline_bytes=0, cache_bytes="8MiB") as caster:
        first, second = one(caster, 1)["x"], one(caster, 1)["x"]
        handles = [lease_of(array).handle for array in (first, second)]
        assert len({(handle.segment, handle.offset, handle.nbytes, handle.hash) for handle in handles}) == 1
        assert handles[0].generation != handles[1].generation
        assert counted(caster)["hits"] == 1
        assert in_use(group.arena) == 3  # x and its half, which are kept and have arrived; x once more


def test_none_is_kept_and_failures_are_not(group: shmcast.Group) -> None:
    made = []

    def materialize(raw: Any) -> None:
        made.append(raw)
        if raw == "bad":
            raise ValueError("bad")

    with Caster(group, materialize, inline_bytes=0, cache_bytes="1MiB") as caster:
        for _ in range(3):
            good, bad = caster.cast([("a", "good"), ("b", "bad")])
            assert good.result() is None
            assert bad.error is not None
        assert made.count("good") == 1
        assert made.count("bad") == 3
        assert counted(caster)["hits"] == 2


def test_what_has_no_key_is_made_each_time(group: shmcast.Group) -> None:
    made = []

    def materialize(raw: Any) -> int:
        made.append(raw)
        return len(made)

    with Caster(group, materialize, inline_bytes=0, cache_bytes="1MiB") as caster:
        assert [one(caster, raw) for raw in (object(), (iter(()),), len)] == [1, 2, 3]
        assert counted(caster)["keyless"] == 3
        assert counted(caster)["entries"] == counted(caster)["misses"] == 0


def test_keys_of_ones_own(group: shmcast.Group) -> None:
    answers: dict[str, Any] = {"a": b"1", "b": "1", "c": None, "d": b"1", "e": "1", "f": 7}

    def key(raw: str) -> Any:
        if raw == "g":
            raise LookupError("no key")
        return answers[raw]

    with Caster(group, lambda raw: {"of": raw}, inline_bytes=0, cache_bytes="1MiB", cache_key=key) as caster:
        assert [one(caster, raw)["of"] for raw in "abcdefg"] == ["a", "b", "c", "a", "b", "f", "g"]
        found = counted(caster)
        assert (found["hits"], found["misses"], found["keyless"]) == (2, 2, 3)


def test_what_is_larger_than_the_budget_is_not_kept(group: shmcast.Group) -> None:
    derived = Derived(lambda number: number)
    with Caster(group, derived, inline_bytes=0, cache_bytes=300_000) as caster:
        for number in (1000, 400_000, 1000, 400_000, 1001):
            derived.check(number, one(caster, number))
        assert derived.made == [1000, 400_000, 400_000, 1001]
        assert counted(caster)["entries"] == 2
        assert counted(caster)["evicted"] == 0


# ---- arguments


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"cache_bytes": 0}, ValueError, "cache_bytes: 0"),
        ({"cache_bytes": -1}, ValueError, "cache_bytes: -1"),
        ({"cache_bytes": "lots"}, ValueError, "cache_bytes: 'lots'"),
        ({"cache_bytes": 1.5}, TypeError, "cache_bytes: a number of bytes"),
        ({"cache_bytes": "65MiB"}, ValueError, r"cache_bytes=68157440 bytes.* max_bytes .* 67108864 bytes"),
        ({"cache_entries": 0}, ValueError, "cache_entries=0"),
        ({"cache_entries": True}, TypeError, "cache_entries"),
        ({"cache_entries": "7"}, TypeError, "cache_entries"),
        ({"cache_key": "sha"}, TypeError, "cache_key"),
    ],
)
def test_wrong_arguments(group: shmcast.Group, options: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Caster(group, lambda raw: raw, **options)
    with Caster(group, lambda raw: raw, inline_bytes=0, cache_bytes="64MiB", cache_entries=1) as caster:
        assert one(caster, 5) == 5


# ---- what is kept is nobody's to change


@BOTH
def test_what_receivers_write_is_theirs_alone(group: shmcast.Group, executor: Any) -> None:
    torch = pytest.importorskip("torch")

    def materialize(raw: int) -> Any:
        big = torch.arange(50_000) + raw
        return {
            "big": big,
            "small": torch.arange(200) + raw,
            "array": np.arange(50_000) + raw,
            "list": [raw, {"k": raw}],
        }

    with Caster(group, materialize, inline_bytes=0, cache_bytes="16MiB", executor=executor) as caster:
        for _ in range(4):
            value = one(caster, 3)
            assert (value["big"] == torch.arange(50_000) + 3).all()
            assert (value["small"] == torch.arange(200) + 3).all()
            assert (value["array"] == np.arange(50_000) + 3).all()
            assert value["list"] == [3, {"k": 3}]
            value["big"].zero_()
            value["small"].zero_()
            with pytest.raises(ValueError, match="read-only"):
                value["array"][0] = 1
            value["list"][1]["k"] = "changed"
            value.clear()
        assert counted(caster)["hits"] == 3


def test_what_is_written_while_it_is_held(group: shmcast.Group) -> None:
    torch = pytest.importorskip("torch")
    with Caster(group, lambda raw: torch.full((50_000,), raw), inline_bytes=0, cache_bytes="16MiB") as caster:
        held = [one(caster, 7) for _ in range(3)]
        for count, tensor in enumerate(held):
            tensor.fill_(count)
        held.append(one(caster, 7))
        assert [int(tensor.sum()) for tensor in held] == [0, 50_000, 100_000, 350_000]


# ---- blocks that are there already


def test_equal_blocks_are_kept_once(group: shmcast.Group) -> None:
    shared = np.random.default_rng(1).integers(0, 256, 500_000, dtype=np.uint8)

    def materialize(raw: int) -> Any:
        return {"same": shared.copy(), "own": np.full(5000, raw, np.uint8), "shape": shared.reshape(500, 1000).copy()}

    arena = group.arena
    with Caster(group, materialize, inline_bytes=0, cache_bytes="8MiB") as caster:
        for number in (1, 2, 3, 1, 2, 3):
            value = one(caster, number)
            assert (value["same"] == shared).all()
            assert (value["shape"].ravel() == shared).all()
            assert value["shape"].shape == (500, 1000)
            assert (value["own"] == number).all()
        del value
        found = counted(caster)
        assert (found["hits"], found["entries"]) == (3, 3)
        # the first has it twice itself
        assert (found["reused"], found["reused_bytes"]) == (5, 5 * 500_000)
        assert 500_000 + 3 * 5000 < found["bytes"] < 500_000 + 3 * (5000 + 3 * cache.ENTRY_BYTES)
        assert in_use(arena) == 4
        assert arena.stats()["used_bytes"] < 600_000
        # one by one, what the others have stays
        for left in (2, 1):
            assert kept_of(caster).give_up()
            assert counted(caster)["bytes"] > 500_000
            assert in_use(arena) == 1 + left
        assert (one(caster, 3)["same"] == shared).all()
        assert kept_of(caster).give_up()
        assert not kept_of(caster).give_up()
        assert counted(caster)["bytes"] == 0
        assert in_use(arena) == 0


def test_equal_hashes_are_not_believed(group: shmcast.Group, monkeypatch: pytest.MonkeyPatch) -> None:
    class Colliding(cache.Block):
        @property
        def names(self) -> tuple[Any, ...]:
            return (self.handle.nbytes, "any hash")

    monkeypatch.setattr(cache, "Block", Colliding)
    derived = Derived(lambda number: 50_000)
    with Caster(group, derived, inline_bytes=0, cache_bytes="8MiB") as caster:
        for _ in range(2):
            for number in range(10):
                derived.check(number, one(caster, number))
        assert counted(caster)["reused"] == 0
        assert counted(caster)["hits"] == 10


def in_place(raw: int, out: Any) -> Any:
    array = out((2, 50_000), "uint8")
    array[:] = 7
    return {"x": array[0], "y": array[1:], "raw": raw}


@pytest.mark.parametrize("hashed", [True, False])
def test_what_was_made_in_place(group: shmcast.Group, hashed: bool) -> None:
    arena = group.arena
    with Caster(group, in_place, inline_bytes=0, cache_bytes="8MiB", hash=hashed) as caster:
        held = []
        for number in (1, 2, 1, 2):
            value = one(caster, number)
            assert value["raw"] == number
            assert (value["x"] == 7).all()
            assert value["y"].shape == (1, 50_000)
            held.append(value)
        assert counted(caster)["reused"] == hashed
        assert counted(caster)["hits"] == 2
        del held, value
        assert in_use(arena) == 2 - hashed
    assert in_use(arena) == 0


def test_views_of_what_is_kept_are_not_kept_twice(group: shmcast.Group) -> None:
    values: dict[int, Any] = {}

    def materialize(raw: int) -> Any:
        return values[raw - 1] if raw - 1 in values else np.full(100_000, 5, np.uint8)

    arena = group.arena
    with Caster(group, materialize, inline_bytes=0, cache_bytes="1MiB") as caster:
        for raw in (1, 2, 3, 3):
            values[raw] = one(caster, raw)
            assert (values[raw] == 5).all()
        values.clear()
        assert 100_000 < counted(caster)["bytes"] < 110_000
        assert in_use(arena) == 1
    assert in_use(arena) == 0


def test_what_lies_in_other_arenas_is_not_kept(group: shmcast.Group) -> None:
    with Arena.create("16MiB") as other:
        handle = other.publish(np.arange(10_000), keep=True)
        with Caster(
            group, lambda raw: shmcast.attach(handle).array, inline_bytes=0, cache_bytes="1MiB", executor="inline"
        ) as caster:
            for _ in range(2):
                assert (one(caster, 1) == np.arange(10_000)).all()
            assert counted(caster)["misses"] == 2
            assert counted(caster)["entries"] == 0
        other.release(handle)
        assert in_use(other) == 0


# ---- no room


def test_what_is_kept_makes_room_for_what_is_live(seed: int) -> None:
    rng = random.Random(seed)
    derived = Derived(lambda number: MIB - 5000)
    with shmcast.Group(max_bytes="16MiB") as group:
        arena = group.arena
        with Caster(group, derived, inline_bytes=0, cache_bytes="16MiB") as caster:
            for number in range(9):
                derived.check(number, one(caster, number))
            assert counted(caster)["entries"] == 9
            live = {}
            before = list(kept_of(caster)._results)
            for number in range(100, 110):  # live ones, of which each is kept too
                live[number] = one(caster, number)
            assert group.stats()["inline_bytes"] == 0
            assert 0 < counted(caster)["evicted"] < 18
            left = list(kept_of(caster)._results)
            assert left[0] in [*before, shmcast.key_of(100), shmcast.key_of(101)]
            assert left[-1] == shmcast.key_of(109)
            # given up in the order of their last use: what is left of the old ones are the last of them
            assert [key for key in left if key in before] == before[
                len(before) - len([key for key in left if key in before]) :
            ]
            while group.stats()["inline_bytes"] == 0:
                number = max(live) + 1
                live[number] = one(caster, number)
            assert counted(caster)["entries"] == 0  # everything that was kept has gone before anything went another way
            for number, value in live.items():
                derived.check(number, value)
            value = None
            for number in rng.sample(sorted(live), 5):
                del live[number]
            for number in range(200, 203):
                derived.check(number, one(caster, number))
            for number, value in live.items():
                derived.check(number, value)
            del value
            live.clear()
        assert in_use(arena) == 0


def test_it_makes_room_for_what_is_reserved_and_for_what_is_larger_than_a_segment() -> None:
    def materialize(raw: int, out: Any) -> Any:
        array = out(raw, "uint8")
        array[:] = raw % 251
        return array

    with Arena.create("64MiB", segment_bytes="16MiB") as arena:
        with (
            shmcast.Group(arena=arena) as group,
            Caster(group, materialize, inline_bytes=0, cache_bytes="60MiB") as caster,
        ):
            for number in range(18):
                assert one(caster, 3 * MIB + number)[-1] == (3 * MIB + number) % 251
            assert counted(caster)["entries"] >= 12
            value = one(caster, 40 * MIB)
            assert (value == (40 * MIB) % 251).all()
            assert lease_of(value) is not None
            assert group.stats()["inline_bytes"] == 0
            assert metrics.snapshot(caster)["counters"]["out_full"] == 0
            del value
        assert in_use(arena) == 0


def test_it_makes_room_where_slots_are_short() -> None:
    derived = Derived(lambda number: 5000)
    with Arena.create("16MiB", max_blocks=20) as arena:
        with shmcast.Group(arena=arena) as group, Caster(group, derived, inline_bytes=0, cache_bytes="8MiB") as caster:
            live = []
            for number in range(30):
                derived.check(number, one(caster, number))
            assert counted(caster)["entries"] > 3
            for number in range(100, 130):
                live.append((number, one(caster, number)))
            for number, value in live:
                derived.check(number, value)
            derived.check(5, one(caster, 5))
            live.clear()
            del value
        assert in_use(arena) == 0


def test_a_hit_without_a_slot_travels_in_the_message() -> None:
    torch = pytest.importorskip("torch")

    def materialize(raw: int) -> Any:
        return {"x": np.arange(5000) + raw, "t": torch.arange(5000, dtype=torch.bfloat16).reshape(50, 100)}

    with Arena.create("16MiB", max_blocks=4) as arena:
        with (
            shmcast.Group(arena=arena) as group,
            Caster(group, materialize, inline_bytes=0, cache_bytes="8MiB") as caster,
        ):
            held = one(caster, 1)
            more = [arena.publish(np.arange(10), readers=0, keep=True) for _ in range(2)]
            value = one(caster, 1)
            assert counted(caster)["hits"] == 1
            assert group.stats()["inline_bytes"] > 0
            for each in (held, value):
                assert (each["x"] == np.arange(5000) + 1).all()
                assert torch.equal(each["t"], torch.arange(5000, dtype=torch.bfloat16).reshape(50, 100))
            del held, value, each
            for handle in more:
                arena.release(handle)
        assert in_use(arena) == 0


# ---- the end


def test_what_is_closed_gives_all_of_it_back() -> None:
    with Arena.create("16MiB") as arena, shmcast.Group(arena=arena) as group:
        for _ in range(2):
            caster = Caster(group, Derived(lambda number: 10_000), inline_bytes=0, cache_bytes="8MiB")
            kept = kept_of(caster)
            held = one(caster, 1)
            assert in_use(arena) == 2
            caster.close()
            assert in_use(arena) == 2
            del held
            assert in_use(arena) == 0
            assert arena._givers == ()
            part = group.prepare(np.arange(5000))
            result = kept.keep(b"late", 0, part)  # a worker that comes back only now
            assert kept.find(b"late") is None
            del result
            part.withdraw()
            assert in_use(arena) == 0


def test_several_casters_of_one_arena_give_up_what_they_keep() -> None:
    derived = Derived(lambda number: MIB - 5000)
    with (
        shmcast.Group(max_bytes="16MiB") as group,
        Caster(group, derived, inline_bytes=0, cache_bytes="8MiB") as first,
        Caster(group, derived, inline_bytes=0, cache_bytes="8MiB") as second,
    ):
        for number in range(5):
            derived.check(number, one(first, number))
            derived.check(number, one(second, number))
        live = [one(second, number) for number in range(100, 109)]
        assert group.stats()["inline_bytes"] == 0
        for number, value in enumerate(live, 100):
            derived.check(number, value)
        assert len(kept_of(first)._results) < 5
        del live, value


def test_outcomes_in_one_batch(group: shmcast.Group) -> None:
    from makers import Maker

    maker = Maker()
    with Caster(group, maker, inline_bytes=0, cache_bytes="8MiB", workers=2) as caster:
        for _ in range(2):
            assert outcomes_of(caster.cast([(name, 1000 * number) for name, number in zip("abcdef", [1, 2, 3, 1, 2, 1], strict=True)])) == {
                name: 1000 * number % 251 for name, number in zip("abcdef", [1, 2, 3, 1, 2, 1], strict=True)
            }  # fmt: skip
        assert sorted(maker.made) == [1000, 2000, 3000]
