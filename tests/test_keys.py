"""What names the content of a raw request: equal content one key, everything else another, and no key where state is unseen."""

from __future__ import annotations

import dataclasses
import enum
import functools
import io
import itertools
import os
import pathlib
import random
import subprocess
import sys
import threading
import time as clock
import uuid
from collections import OrderedDict, defaultdict, deque
from datetime import date, datetime, time, timedelta, timezone, tzinfo
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import shmcast
from shmcast import key_of

# ---- things to make keys of


@dataclasses.dataclass
class Image:
    pixels: Any
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Frozen:
    pixels: Any
    note: str = ""


class Slotted:
    __slots__ = ("__private", "a")

    def __init__(self, a: Any, private: Any = None) -> None:
        self.a = a
        if private is not None:
            self.__private = private


class Both(Slotted):
    __slots__ = ("b",)

    def __init__(self, a: Any, b: Any) -> None:
        super().__init__(a)
        self.b = b


class Loose(Both):
    pass


class Point(NamedTuple):
    x: Any
    y: Any


class Pair(NamedTuple):
    x: Any
    y: Any


class Color(enum.Enum):
    RED = 1
    BLUE = 2


class Number(enum.IntEnum):
    ONE = 1


class Bits(enum.Flag):
    A = 1
    B = 2


class MyDict(dict):  # type: ignore[type-arg]
    pass


class MyStr(str):
    __slots__ = ()


class MyError(Exception):
    pass


class MyFile(io.RawIOBase):
    pass


class Elsewhere(tzinfo):
    pass


class Nothing:
    __slots__ = ()


class Empty:
    pass


def loose(**more: Any) -> Loose:
    thing = Loose(1, 2)
    thing.__dict__.update(more)
    return thing


# ---- one key


def test_a_key_is_32_bytes_and_the_same_in_every_process() -> None:
    raw = {
        "a": [1, 2.5, "x", b"y", None, True],
        "b": {3, "z"},
        "c": np.arange(6).reshape(2, 3),
        "d": {"e": (), "f": []},
    }
    code = (
        "import numpy as np, shmcast\n"
        "raw = {'d': {'f': [], 'e': ()}, 'c': np.arange(6).reshape(2, 3), 'b': {'z', 3}, 'a': [1, 2.5, 'x', b'y', None, True]}\n"
        "print(shmcast.key_of(raw).hex())"
    )
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        found = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
        assert found.stdout.strip() == key_of(raw).hex()
    assert len(key_of(raw)) == 32


MANY = list(range(1000))
SAME = [
    ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
    ({1, 2, "c"}, {"c", 2, 1}),
    ([*MANY], list(MANY)),
    (np.arange(10), np.arange(20)[::2] // 2),
    (np.arange(12).reshape(3, 4), np.asfortranarray(np.arange(12).reshape(3, 4))),
    (np.arange(4), np.broadcast_to(np.arange(4), (4,))),
    (float("nan"), float("nan")),
    (Image(b"x" * 10_000), Image(b"x" * 10_000)),
    (Slotted(1, 2), Slotted(1, 2)),
    (loose(z=1, y=2), loose(y=2, z=1)),
    (Point(1, 2), Point(1, 2)),
    (pathlib.Path("a/b"), pathlib.Path("a") / "b"),
    (uuid.UUID(int=5), uuid.UUID(int=5)),
    (datetime(2026, 1, 2, 3, tzinfo=timezone.utc), datetime(2026, 1, 2, 3, tzinfo=timezone.utc)),
    (memoryview(b"abcd")[::2], memoryview(b"ac")),
    (np.float32(0.5), np.float32(0.5)),
    (np.datetime64("2026-01-01"), np.datetime64("2026-01-01")),
]


@pytest.mark.parametrize(("first", "second"), SAME)
def test_equal_content_is_one_key(first: Any, second: Any) -> None:
    assert key_of(first) == key_of(second)
    assert key_of([first, {"k": first}]) == key_of([second, {"k": second}])


def test_what_occurs_twice_is_the_same_as_two_that_are_equal() -> None:
    inner = ["x", {"y": b"z" * 5000}]
    assert key_of([inner, inner]) == key_of([["x", {"y": b"z" * 5000}], ["x", {"y": bytes(b"z" * 5000)}]])


def test_what_occurs_in_itself_many_times_over_is_read_once() -> None:
    tree: Any = ["leaf"]
    for _ in range(100):
        tree = [tree, tree]
    assert key_of(tree) == key_of(list(tree))


# ---- other keys

structured = np.dtype([("x", "<i4"), ("y", "<i4")])
DIFFERENT: list[Any] = [
    None, ..., True, False, 0, 1, -1, 255, 256, -256, 1 << 64, -(1 << 64), 1.0, 0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1j, 0j,
    complex(0, -0.0), complex(-0.0, 0), "", "a", "b", "1", "None", b"", b"a", b"1", bytearray(), bytearray(b"a"), memoryview(b"a"), memoryview(b"a").cast("c"),
    memoryview(bytes(4)).cast("B", (2, 2)), memoryview(bytes(4)), "\udc80",
    (), [], {}, set(), frozenset(), (1,), [1], {1: None}, {1}, frozenset({1}), [True], [1.0], [[]], [()], ((),), [[], []], [[[]]], {1: 1}, {True: 1}, {1.0: 1}, {1: True},
    ["ab", "c"], ["a", "bc"], ["abc"], ["a", "b", "c"], [["a", "b"], "c"], ["a", ["b", "c"]], [b"ab", b"c"], [b"a", b"bc"], ["a", b"bc"],
    {"a": "b"}, {"b": "a"}, ["a", "b"], [["a", "b"]], [("a", "b")], {("a", "b")}, {"a": "b", "c": "d"}, {"a": "d", "c": "b"}, {"a": ["b"]},
    {"a": b"x", "b": b"y"}, {"a": b"y", "b": b"x"}, {"ab": b"x"}, {"a": {"b": b"x"}}, {"pixels": b"x", "note": ""},
    OrderedDict(), OrderedDict(a=1, b=2), OrderedDict(b=2, a=1), {"a": 1, "b": 2},
    MANY, tuple(MANY), [float(i) for i in MANY], MANY[:-1], [*MANY[:-1], True], [*MANY[:-1], 999.0], [*MANY[:-1], 1 << 63], [*MANY[:-1], 1 << 64], [0] * 16, [0] * 17,
    [0.0] * 16, [-0.0] * 16, (0,) * 16, [False] * 16, b"\0" * 128, [b"\0" * 128],
    b"x" * 4096, b"x" * 4097, "x" * 4097, bytearray(b"x" * 4097), [b"x" * 4097],
    np.zeros(4, "f4"), np.zeros(4, "i4"), np.zeros(4, "u4"), np.zeros(16, "u1"), np.zeros((2, 2), "f4"), np.zeros((4, 1), "f4"), np.zeros((1, 4), "f4"), np.zeros(4, ">f4"),
    np.zeros(2, "f8"), np.zeros(2, "M8[s]"), np.zeros(2, "M8[ms]"), np.zeros(2, "m8[s]"), np.zeros(4, "S4"), np.zeros(4, "U1"), np.zeros(2, structured), np.zeros(2, [("x", "<i4"), ("z", "<i4")]),
    np.zeros(0, "f4"), np.zeros((0, 3), "f4"), np.zeros((3, 0), "f4"), np.zeros((), "f4"), np.float32(0), np.float64(0), np.int32(0), np.bool_(False), np.bytes_(b"a"), np.str_("a"),
    np.full(4, -0.0, "f4"), np.arange(4), np.arange(4).tolist(), np.arange(4).tobytes(),
    Image(b"x"), Image("x"), Image(b"x", "y"), Image(b"", "x"), Frozen(b"x"), Frozen(b"x", "y"), Slotted(1), Slotted(1, 2), Slotted(2, 1), Slotted(None), Both(1, 2), Both(2, 1),
    loose(), loose(c=3), loose(c=4), Point(1, 2), Point(2, 1), Pair(1, 2), (1, 2), Nothing(), Empty(),
    Color.RED, Color.BLUE, Number.ONE, Bits.A, Bits.B, Bits.A | Bits.B,
    pathlib.PurePosixPath("a"), pathlib.PureWindowsPath("a"), pathlib.Path("a"), pathlib.Path("b"),
    date(2026, 1, 1), datetime(2026, 1, 1), datetime(2026, 1, 1, fold=1), datetime(2026, 1, 1, tzinfo=timezone.utc), datetime(2026, 1, 1, tzinfo=timezone(timedelta(0), "x")),
    time(1), timedelta(1), timedelta(seconds=1), timezone.utc, "datetime.date(2026, 1, 1)",
]  # fmt: skip


def shown(thing: Any) -> str:
    return f"{type(thing).__name__} {str(thing)[:60]}"


def test_other_content_is_another_key() -> None:
    wrapped = [[thing] for thing in DIFFERENT] + [{"k": thing} for thing in DIFFERENT if thing is not None]
    found: dict[bytes, Any] = {}
    known = {
        repr([1]),
        repr([()]),
        repr([[]]),
        repr([True]),
        repr([1.0]),
        repr([[], []]),
        repr([b"x" * 4097]),
        repr([b"\0" * 128]),
    }
    for thing in [*DIFFERENT, *[each for each in wrapped if repr(each) not in known]]:
        key = key_of(thing)
        if key in found:
            # what the two lists have in common
            assert repr(found[key]) == repr(thing), f"{shown(found[key])} and {shown(thing)} have one key"
            assert type(found[key]) is type(thing)
        found[key] = thing
    assert len({key_of(thing) for thing in DIFFERENT}) == len(DIFFERENT)


def test_bits_of_a_nan_count() -> None:
    quiet, other = np.array([0x7FF8000000000000, 0x7FF8000000000001], "u8").view("f8").tolist()
    assert key_of(quiet) != key_of(other)
    assert key_of([quiet] * 20) != key_of([other] * 20)


@pytest.mark.torch
def test_tensors() -> None:
    import torch

    made = [
        torch.zeros(4), torch.zeros(4, dtype=torch.int32), torch.zeros(2, 2), torch.zeros(8, dtype=torch.float16),
        torch.zeros(8, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.bool), torch.full((4,), -0.0), np.zeros(4, "f4"),
        torch.zeros(0), torch.zeros(0, 2), torch.zeros(()), torch.arange(4), torch.arange(4).tolist(), torch.zeros(4, dtype=torch.complex64),
        torch.zeros(4, dtype=torch.float8_e5m2),
    ]  # fmt: skip
    assert len({key_of(each) for each in made}) == len(made)
    assert key_of(torch.arange(12).reshape(3, 4)) == key_of(torch.arange(12).reshape(3, 4).T.contiguous().T)
    assert key_of(torch.zeros(4).conj()) == key_of(torch.zeros(4))
    whole = torch.arange(10)
    assert key_of(whole[2:4]) == key_of(torch.tensor([2, 3]))
    noted = torch.zeros(2)
    noted.note = "x"  # type: ignore[attr-defined]
    for refused in (
        torch.zeros(2, device="meta"), torch.zeros(2, requires_grad=True), torch.nn.Parameter(torch.zeros(2)), noted,
        torch.zeros(2, 2).to_sparse(), torch.Size([1]), torch.float32,
    ):  # fmt: skip
        with pytest.raises(TypeError):
            key_of({"x": refused})


def test_images() -> None:
    image_module = pytest.importorskip("PIL.Image")
    image = image_module.new("RGB", (4, 2), (1, 2, 3))
    others = [
        image_module.new("RGB", (2, 4), (1, 2, 3)),
        image_module.new("RGB", (4, 2), (1, 2, 4)),
        image_module.new("L", (4, 6), 1),
    ]
    noted = image.copy()
    noted.info["dpi"] = (1, 1)
    paletted = [image.convert("P"), image.convert("P")]
    paletted[1].putpalette([9] * 768)
    assert len({key_of(each) for each in (image, *others, noted, *paletted)}) == 1 + len(others) + 3
    assert key_of(image) == key_of(image.copy())
    stream = io.BytesIO()
    image.save(stream, "PNG")
    with image_module.open(stream) as lazy, pytest.raises(TypeError):  # it reads its file when it is looked at
        key_of(lazy)


# ---- no key


def local() -> Any:
    class Local:
        pass

    return Local()


def cyclic_list() -> Any:
    items: list[Any] = []
    items.append(items)
    return items


def cyclic_object() -> Any:
    thing = Image(None)
    thing.pixels = {"of": thing}
    return thing


def deep(count: int) -> Any:
    tree: Any = 1
    for _ in range(count):
        tree = [tree]
    return tree


def shadowed() -> Any:
    made = type("Image", (), {"__module__": __name__})
    return made()


NO_KEY: list[Any] = [
    object(), lambda: 1, len, int, Image, (i for i in range(3)), iter([1]), io.BytesIO(b"x"), MyFile(), threading.Lock(), threading.local(), sys,
    MyDict(a=1), MyStr("a"), MyError("x"), defaultdict(list), deque([1]), functools.partial(len), clock.localtime(), os.stat("."), range(3), slice(1),
    np.array([None, 1]), np.ma.masked_array([1, 2]), np.rec.array([(1, 2)]), np.zeros(3, "V0"), np.dtype("f4"), np.zeros(2, np.dtype("f4", metadata={"a": 1})),
    local(), shadowed(), cyclic_list(), cyclic_object(), deep(200), deep(100_000), uuid, datetime(2026, 1, 1, tzinfo=Elsewhere()), random.Random(1), Image.__init__,
]  # fmt: skip


@pytest.mark.parametrize("thing", NO_KEY, ids=lambda thing: type(thing).__name__)
def test_what_can_not_be_seen_has_no_key(thing: Any) -> None:
    for raw in (thing, [thing], {"a": {"b": thing}}, Image(thing), Slotted(thing), Point(1, thing)):
        with pytest.raises(TypeError, match=r"key_of|publish|dtype"):
            key_of(raw)


def test_the_error_says_what_of() -> None:
    with pytest.raises(TypeError, match="key_of: a generator is a generator, whose state can not be seen"):
        key_of({"a": [(i for i in range(3))]})
    with pytest.raises(TypeError, match=r"key_of: class local.<locals>.Local is not to be found in module"):
        key_of(local())
    with pytest.raises(TypeError, match="key_of: a list that contains itself"):
        key_of(cyclic_list())


def test_what_is_deep_but_not_too_deep_has_one() -> None:
    assert key_of(deep(100)) != key_of(deep(101))


# ---- anything

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.binary().map(bytearray),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers() | st.booleans(), inner)
        | st.sets(st.integers() | st.text())
        | st.builds(Image, inner, st.text())
        | st.builds(Point, inner, inner)
    ),
    max_leaves=15,
)


def canonical(thing: Any) -> Any:
    """What is equal exactly where the content is, types included: the slow way."""
    kind = type(thing).__name__
    if isinstance(thing, float):
        return kind, np.float64(thing).tobytes()
    if isinstance(thing, dict):
        return kind, frozenset((canonical(key), canonical(value)) for key, value in thing.items())
    if isinstance(thing, set):
        return kind, frozenset(map(canonical, thing))
    if isinstance(thing, (list, tuple)):
        return kind, tuple(map(canonical, thing))
    if isinstance(thing, Image):
        return kind, canonical(thing.pixels), canonical(thing.note)
    return kind, bytes(thing) if isinstance(thing, bytearray) else thing


@given(plain, plain)
@example([1], [True])
@example([0.0], [-0.0])
@example({"a": 1, "b": [2]}, {"b": [2], "a": 1})
def test_keys_are_equal_exactly_where_contents_are(first: Any, second: Any) -> None:
    assert (key_of(first) == key_of(second)) == (canonical(first) == canonical(second))


def mutated(thing: Any, rng: random.Random) -> Any:
    """Almost the same."""
    if isinstance(thing, (list, tuple)) and thing and rng.random() < 0.7:
        items = list(thing)
        at = rng.randrange(len(items))
        items[at] = mutated(items[at], rng)
        return Point(*items) if isinstance(thing, Point) else type(thing)(items)
    if isinstance(thing, dict) and thing and rng.random() < 0.7:
        key = rng.choice(list(thing))
        return {**thing, key: mutated(thing[key], rng)}
    if isinstance(thing, (str, bytes)) and thing and rng.random() < 0.5:
        return thing[:-1]
    return rng.choice([[thing], (thing,), None, True, 1, str(thing), {"": thing}])


@given(plain, st.integers())
def test_almost_the_same_is_another(thing: Any, seed: int) -> None:
    other = mutated(thing, random.Random(seed))
    assert (key_of(thing) == key_of(other)) == (canonical(thing) == canonical(other))


@given(
    st.lists(st.tuples(st.text(max_size=3), st.binary(max_size=3)), unique_by=lambda item: item[0], max_size=6),
    st.randoms(),
)
def test_the_order_of_a_dict_does_not_count(items: list[Any], shuffler: random.Random) -> None:
    other = list(items)
    shuffler.shuffle(other)
    assert key_of(dict(items)) == key_of(dict(other))


@given(st.lists(st.binary(max_size=4), max_size=4))
def test_where_one_ends_and_the_next_begins_counts(pieces: list[bytes]) -> None:
    whole = b"".join(pieces)
    for cut in range(len(whole) + 1):
        split = [whole[:cut], whole[cut:]]
        assert (key_of(split) == key_of(pieces)) == (split == pieces)


def test_every_byte_counts(rng: np.random.Generator) -> None:
    array = rng.integers(0, 256, (64, 100), dtype=np.uint8)
    keys = {key_of(array), key_of(array.tobytes())}
    for row, column in itertools.product((0, 31, 63), (0, 50, 99)):
        other = array.copy()
        other[row, column] ^= 1 << int(rng.integers(8))
        keys |= {key_of(other), key_of(other.tobytes())}
    assert len(keys) == 20


def test_it_is_public() -> None:
    assert shmcast.key_of is key_of
