"""`loads(..., allow_pickle=False)`: plain things come through, and no pickle of anybody's does anything."""

from __future__ import annotations

import builtins
import collections
import dataclasses
import itertools
import math
import os
import pickle
import pickletools
import random
import struct
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import shmcast
from shmcast import codec, plain
from shmcast.errors import HandleError

BLOCK = "shmcast.codec._block"
HIT: list[object] = []


def hit(*given: object) -> None:
    HIT.append(given)


@pytest.fixture(autouse=True)
def nothing_happened() -> Any:
    HIT.clear()
    yield
    assert HIT == []


def nothing(number: int) -> Any:
    raise HandleError(f"no array {number}")


def load(raw: bytes) -> Any:
    return plain.load(raw, BLOCK, nothing)


def wrapped(raw: bytes) -> bytes:
    """A pickle as `dumps` would send it."""
    body = codec._COUNT.pack(0) + raw
    return codec._HEAD.pack(codec.MAGIC, codec.VERSION, shmcast.hash128(body) & (1 << 64) - 1) + body


def same(a: Any, b: Any) -> bool:
    """Equal, of the same types all the way down, NaN equal to itself."""
    if type(a) is not type(b):
        return False
    if isinstance(a, (np.ndarray, np.generic)):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, float):
        return (a == b and math.copysign(1, a) == math.copysign(1, b)) or (math.isnan(a) and math.isnan(b))
    return bool(a == b)


PLAIN: list[Any] = [
    None, True, False, 0, 255, 256, 65536, -1, -(1 << 31), 1 << 40, -(1 << 2000), 1 << 40000,
    0.0, -0.0, 1.5, float("inf"), float("nan"), 1 + 2j, complex(-0.0, math.inf),
    "", "abc", "\0é\ud800𝄞", "x" * 300, "x" * 70000, b"", b"abc", b"x" * 300, b"x" * 70000, bytearray(b"abc"),
    [], [1], list(range(3000)), (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), {}, {1: 2}, {n: str(n) for n in range(3000)},
    set(), {1, "a", (1, (2, b"x"))}, set(range(3000)), frozenset(), frozenset([1, frozenset([2])]),
    {"a": [{"b": (1, {"c": None})}]}, [[]] * 3, {("k", 1): {frozenset([1]): []}},
    np.float32(1.5), np.int8(-3), np.bool_(True), np.complex128(1j), np.uint64(1 << 63), np.str_("é"), np.bytes_(b"x"),
    np.datetime64("2020-01-01"), np.timedelta64(5, "ms"), np.datetime64("NaT"),
    np.arange(5), np.arange(5.0, dtype=">f4"), np.zeros(0), np.zeros((3, 0, 2)), np.array(7), np.ones((2, 3), order="F"),
    np.arange(10)[::2], np.arange(12).reshape(3, 4).T[::2], np.array(["a", "bc"]), np.array([b"a"]), np.zeros(3, bool),
    np.array(["2020", "NaT"], "M8[us]"), np.float16([1, 2]), np.zeros((1,) * 20), np.str_(""), np.bytes_(b""),
    np.zeros(0, "S5"), np.zeros((2, 0), "U3"), {np.int64(3): 1, np.float32(2): 2, np.str_("x"): 3, np.datetime64("2020", "D"): 4},
    dict.fromkeys(itertools.product(range(-3, 3), repeat=4), 1), {frozenset(key) for key in itertools.combinations(range(-3, 9), 3)},
    {1 << n: n for n in range(3000)}, {0.5 * n: n for n in range(3000)}, {complex(n, -n) for n in range(500)},
    {"x" * n for n in range(300)}, {str(n): n for n in range(40000)}, {n.to_bytes(4, "big") for n in range(40000)},
    {frozenset(map(str, range(500))): 1}, {tuple(range(900)): 1}, {"x" * (1 << 21): 1}, {b"x" * (1 << 21)},
    [{(1, "key"): n} for n in range(1000)],
]  # fmt: skip


@pytest.mark.parametrize("thing", PLAIN, ids=lambda thing: type(thing).__name__)
def test_plain_things(thing: Any) -> None:
    for raw in (shmcast.dumps(thing), shmcast.dumps([thing, thing, {"again": thing}])):
        assert same(shmcast.loads(raw, allow_pickle=False), shmcast.loads(raw))
    assert same(shmcast.loads(shmcast.dumps(thing), allow_pickle=False), thing)


def test_the_same_thing_twice_is_one_thing() -> None:
    shared, array = [1], np.arange(9)[::3]
    tree = shmcast.loads(shmcast.dumps([shared, shared, array, array]), allow_pickle=False)
    assert tree[0] is tree[1]
    assert tree[2] is tree[3]


def test_what_contains_itself() -> None:
    loop: list[Any] = [1]
    loop.append(loop)
    back = shmcast.loads(shmcast.dumps(loop), allow_pickle=False)
    assert back[1] is back
    inner: list[Any] = []
    for pair in ((inner, 1), (inner, 1, 2, 3, 4)):
        inner[:] = [pair]
        back = shmcast.loads(shmcast.dumps(pair), allow_pickle=False)
        assert back[0][0] is back


def test_arrays_keep_what_they_are() -> None:
    fixed = np.arange(3)
    fixed.flags.writeable = False
    first, second = shmcast.loads(shmcast.dumps([fixed, np.arange(3)]), allow_pickle=False)
    assert (first.flags.writeable, second.flags.writeable) == (False, True)
    strided = shmcast.loads(shmcast.dumps(np.arange(9)[::3]), allow_pickle=False)
    assert strided.flags.writeable


def test_blocks(namespace: str) -> None:
    with shmcast.Arena.create("1MiB") as arena:
        tree = {"pixels": np.arange(50_000, dtype="i4"), "grid": (1, 2), "small": np.ones(3, "f4")}
        back = shmcast.loads(shmcast.dumps(tree, arena), allow_pickle=False)
        assert same(back, tree)
        assert not back["pixels"].flags.writeable
        del back


@pytest.mark.torch
def test_tensors() -> None:
    import torch

    with shmcast.Arena.create("1MiB") as arena:
        big, small = torch.arange(50_000), torch.ones(3, dtype=torch.bfloat16)
        back = shmcast.loads(shmcast.dumps([big, small, small], arena), allow_pickle=False)
        assert torch.equal(back[0], big)
        assert torch.equal(back[1], small)
        assert back[1] is back[2]
        back[1] += 1
        del back
    for other in (torch.ones(3, requires_grad=True), torch.nn.Parameter(torch.ones(2)), torch.Size([1]), torch.float32):
        assert pickle.loads(pickle.dumps(other)) is not None
        with pytest.raises(HandleError, match="neither an array nor a plain container"):
            shmcast.loads(shmcast.dumps([other]), allow_pickle=False)


# ---- what is refused


@dataclasses.dataclass
class Item:
    value: int = 1


class Reduces:
    def __init__(self, *how: Any) -> None:
        self.how = how

    def __reduce__(self) -> Any:
        return self.how


class Text(str):
    pass


NOT_PLAIN: list[Any] = [
    Item(), Text("x"), hit, os.system, print, getattr, int, dict, len, range(3), slice(1), ..., NotImplemented, Exception("x"),
    collections.OrderedDict(a=1), collections.Counter("a"), collections.deque([1]), collections.namedtuple,
    np.dtype("f4"), np.ndarray, np.float32, np.array([object()], object)[:0], np.array([None]), np.array([[], 1], object),
    np.zeros(2, [("a", "i4")]), np.void(b"abc"), np.ma.array([1]), np.random.default_rng, partial(hit, 1),
    Reduces(hit, (1,)), Reduces(os.system, ("exit 1",)), Reduces(eval, ("HIT.append(1)",)), Reduces(exec, ("1",)),
    Reduces(getattr, ("", "join")), Reduces(builtins.__import__, ("os",)), Reduces(type, ("X", (), {})),
    Reduces(bytearray, (10,)), Reduces(complex, ("1",)), Reduces(complex, (Item(), 1.0)), Reduces(np.dtype, ("O",)),
    Reduces(np.dtype, ([("a", "O")],)), Reduces(np.load, ("x",)), Reduces(np.frombuffer, (b"x",)),
    Reduces(shmcast.loads, (b"x",)), Reduces(pickle.loads, (b"N.",)), Reduces(codec._block, (0,)),
    Reduces(codec._block, ("0",)), Reduces(codec._block, (-1,)),
]  # fmt: skip


@pytest.mark.parametrize(
    "thing", NOT_PLAIN, ids=lambda thing: f"{type(thing).__name__}-{getattr(thing, 'how', '')}"[:60]
)
def test_what_is_not_plain_is_refused(thing: Any) -> None:
    for tree in (thing, [thing], {"a": (1, thing)}, [1, [thing, thing]]):
        with pytest.raises(HandleError):
            shmcast.loads(wrapped(pickle.dumps(tree, 5)), allow_pickle=False)


@pytest.mark.parametrize("protocol", range(6))
def test_hostile_pickles_of_every_protocol(protocol: int) -> None:
    for thing in (Reduces(hit, (1,)), Reduces(os.system, ("exit 1",)), Item(), Reduces(hit, (), {"a": 1})):
        with pytest.raises(HandleError):
            shmcast.loads(wrapped(pickle.dumps([thing], protocol)), allow_pickle=False)


def test_the_error_names_what_was_refused() -> None:
    raw = wrapped(pickle.dumps(Reduces(os.system, ("exit 1",))))
    with pytest.raises(HandleError, match=r"posix.system.* neither an array nor a plain container; allow_pickle=False"):
        shmcast.loads(raw, allow_pickle=False)


def named(module: str, name: str) -> bytes:
    return b"\x8c" + bytes([len(module)]) + module.encode() + b"\x8c" + bytes([len(name)]) + name.encode() + b"\x93"


DTYPE = named("numpy", "dtype") + b"\x8c\x02f4\x89\x88\x87R"
NOTHING = named("numpy", "dtype") + b"\x8c\x02S0\x89\x88\x87R"
RECONSTRUCT = named("numpy._core.multiarray", "_reconstruct") + named("numpy", "ndarray") + b"K\0\x85C\x01b\x87R"
HOSTILE: dict[str, bytes] = {
    "text global": b"cos\nsystem\n(S'exit 1'\ntR.",
    "inst": b"(S'exit 1'\nios\nsystem\n.",
    "obj": b"(cos\nsystem\nS'exit 1'\no.",
    "newobj": named("builtins", "complex") + b")\x81.",
    "newobj with keywords": named("builtins", "complex") + b")}\x92.",
    "extension": b"\x82\x01.",
    "persistent id": b"\x8c\x01aQ.",
    "out of band": b"\x97.",
    "a dotted name": named("builtins", "complex.__class__") + b".",
    "a name of an allowed module": named("numpy", "load") + b".",
    "a name through ours": named("shmcast.codec", "os.system") + b".",
    "the reader's own": named("shmcast.plain", "_Name") + b".",
    "a name that is no text": b"K\x01\x8c\x01a\x93.",
    "a function as a value": b"]" + named("builtins", "complex") + b"a.",
    "a function at the end": named("builtins", "complex") + b".",
    "a function in a tuple": named("builtins", "complex") + b"\x85.",
    "a function in a tuple in a list": b"]" + named("builtins", "complex") + b"\x85\x85a.",
    "a function as a key": b"}" + named("builtins", "complex") + b"K\x01s.",
    "a function in a set": b"\x8f(" + named("builtins", "complex") + b"\x90.",
    "a function in a frozenset": b"(" + named("builtins", "complex") + b"\x91.",
    "a state of a function": named("builtins", "complex") + b"}b.",
    "a state of a list": b"]}b.",
    "a state of an array": named("numpy._core.multiarray", "scalar") + DTYPE + b"C\x04abcd\x86R(K\x01)N\x89C\x00tb.",
    "a dtype as a value": DTYPE + b".",
    "an array that is never made": named("numpy._core.multiarray", "_reconstruct") + b")R.",
    "an array class that is called": named("numpy", "ndarray") + b"K\x05\x85\x85R.",
    "a dtype of objects": named("numpy", "dtype") + b"\x8c\x02O8\x89\x88\x87R.",
    "a dtype by a list": named("numpy", "dtype") + b"]\x85R.",
    "a dtype with commas": named("numpy", "dtype") + b"\x8c\x05f4,f4\x85R.",
    "an element size of its own": named("numpy._core.multiarray", "scalar") + DTYPE
        + b"(K\x03\x8c\x01<NNNJ\x00\x00\x10\x00K\x01K\x00tbC\x02ab\x86R.",
    "fields of its own": named("numpy._core.multiarray", "scalar")
    + DTYPE
    + b"(K\x03\x8c\x01|N)}K\x04K\x01K\x00tbC\x04abcd\x86R.",
    "an unknown byte order": DTYPE + b"(K\x03\x8c\x01!NNNK\x04K\x01K\x00tb.",
    "bytes that are too few": named("numpy._core.numeric", "_frombuffer")
        + b"(C\x04abcd" + DTYPE + b"J\xff\xff\xff\x7f\x85\x8c\x01CtR.",
    "bytes that are too many": named("numpy._core.numeric", "_frombuffer") + b"(C\x08abcdefgh" + DTYPE + b"K\x01\x85\x8c\x01CtR.",
    "a negative length": named("numpy._core.numeric", "_frombuffer")
        + b"(C\x04abcd" + DTYPE + b"J\xff\xff\xff\xff\x85\x8c\x01CtR.",
    "a length that is no int": named("numpy._core.numeric", "_frombuffer") + b"(C\x04abcd" + DTYPE + b"\x88\x85\x8c\x01CtR.",
    "an order of its own": named("numpy._core.numeric", "_frombuffer") + b"(C\x04abcd" + DTYPE + b"K\x01\x85\x8c\x01AtR.",
    "elements of no bytes": named("numpy._core.numeric", "_frombuffer")
        + b"(C\0" + NOTHING + b"\x8a\x08" + (1 << 62).to_bytes(8, "little") + b"\x85\x8c\x01CtR.",
    "a gigabyte of elements of no bytes": RECONSTRUCT + b"(K\x01J\0\0\0\x40\x85" + NOTHING + b"\x89C\0tb.",
    "a terabyte of text of no bytes": RECONSTRUCT + b"(K\x01\x8a\x06\0\0\0\0\0\x01\x85" + NOTHING.replace(b"S0", b"U0") + b"\x89C\0tb.",
    "a length beyond all": named("numpy._core.numeric", "_frombuffer")
        + b"(C\0" + DTYPE + b"K\0\x8b\0\x01\0\0" + b"\x7f" * 256 + b"\x86\x8c\x01CtR.",
    "more dimensions than there are": named("numpy._core.numeric", "_frombuffer")
        + b"(C\x04abcd" + DTYPE + b"(" + b"K\x01" * 65 + b"t\x8c\x01CtR.",
    "a unit of time beyond all": named("numpy", "dtype") + b"\x8c\x02M8\x85R(K\x04\x8c\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0"
        + b"N(C\x01s\x8b\0\x01\0\0" + b"\x7f" * 256 + b"K\x01K\x01t\x86tb0N.",
    "a memo that is far": b"Nr\xff\xff\xff\x7f.",
    "a list for bytes": named("numpy._core.numeric", "_frombuffer") + b"(]" + DTYPE + b"K\x01\x85\x8c\x01CtR.",
    "an array for bytes": named("numpy._core.multiarray", "scalar") + DTYPE + b"]\x86R.",
    "nothing": b"",
    "only a stop": b".",
    "no stop": b"N",
    "two things": b"NN.",
    "a mark at the end": b"(.",
    "a mark in a tuple": b"(\x85.",
    "a mark in a list": b"](a.",
    "no mark": b"]Ne.",
    "an empty stack": b"0.",
    "a tuple of nothing": b"\x87.",
    "a memo that is not there": b"h\x05.",
    "a memo of nothing": b"\x94.",
    "an append to a tuple": b")Na.",
    "an append to an array": named("numpy._core.multiarray", "scalar") + DTYPE + b"C\x04abcd\x86RNa.",
    "items of a list": b"]K\x00Ns.",
    "an odd dict": b"}(Nu.",
    "an unhashable key": b"}]Ns.",
    "text that ends early": b"\x8c\x05ab.",
    "text beyond the end": b"\x8d\xff\xff\xff\xff\xff\xff\xff\xff.",
    "bytes beyond the end": b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
    "a long beyond the end": b"\x8b\xff\xff\xff\x7f.",
    "text that is no text": b"\x8c\x01\xff.",
    "an unknown opcode": b"\xff.",
}  # fmt: skip


@pytest.mark.parametrize("raw", HOSTILE.values(), ids=HOSTILE)
def test_hostile_bytes(raw: bytes) -> None:
    with pytest.raises(HandleError, match="decode tree"):
        load(raw)


def test_a_key_that_takes_for_ever_to_hash() -> None:
    """((((),),),) of a hundred thousand, and a tuple of itself twice, sixty times over: 2**60 steps."""
    deep = b"})" + b"\x85" * 100_000 + b"Ns."
    wide = b"})" + b"".join(b"\x94h" + bytes([n]) + b"\x86" for n in range(60)) + b"Ns."
    for raw in (deep, wide, b"\x8f(" + wide[1:-2] + b"\x90.", b"(" + deep[1:-2] + b"\x91."):
        with pytest.raises(HandleError, match="parts"):
            load(raw)
    assert load(b")" + b"\x85" * 100_000 + b".") is not None


def test_a_key_that_takes_for_ever_to_compare() -> None:
    """{(x, x)} forty times over, twice: equal, and 2**40 steps to find out. And a chain that is deeper than the stack."""
    for length, pair in ((40, b"\x86"), (3000, b"")):
        raw = b"("
        for first in (0, length + 1):
            raw += b"(\x91\x94"
            for number in range(first, first + length):
                mention = b"j" + number.to_bytes(4, "little")
                raw += b"(" + mention + (mention + pair if pair else b"") + b"\x91\x94"
        with pytest.raises(HandleError, match="parts"):
            load(raw + b"\x91.")


P61 = (1 << 61) - 1
"""The hash of an int is what is left of it after division by this."""


def ints(*values: int) -> bytes:
    return b"".join(b"\x8a\x10" + value.to_bytes(16, "little", signed=True) for value in values)


def floats(*values: float) -> bytes:
    return b"".join(b"G" + struct.pack(">d", value) for value in values)


COMPLEX = named("builtins", "complex") + b"\x940"
ALIKE: dict[str, tuple[bytes, list[bytes]]] = {
    "ints": (b"", [ints(n * P61) for n in range(2000)]),
    "negative ints": (b"", [ints(-5 - n * P61) for n in range(2000)]),
    "complex numbers": (COMPLEX, [b"h\0" + floats(7.0 - 1000003.0 * n, n) + b"\x86R" for n in range(2000)]),
    "tuples": (b"", [b"(" + b"".join(b"J" + pick.to_bytes(4, "little", signed=True) for pick in key) + b"t"
                     for key in itertools.product((-1, -2), repeat=11)]),
    "frozensets": (b"", [b"(" + ints(n * P61, (n + 1) * P61) + b"\x91" for n in range(2000)]),
}  # fmt: skip


@pytest.mark.parametrize("name", ALIKE)
@pytest.mark.parametrize(
    "how", ["at once", "one by one", "in a set", "in a set, one by one", "in a frozenset", "text between"]
)
def test_keys_of_the_same_hash(name: str, how: str) -> None:
    """Each is compared with all the others: 40,000 take half a megabyte and ten seconds."""
    before, keys = ALIKE[name]
    assert len({hash(key) for key in load(before + b"(" + b"".join(keys) + b"l.".replace(b"l", b"t"))}) == 1
    few = before + b"}(" + b"".join(key + b"N" for key in keys[:20]) + b"u."
    assert len(load(few)) == 20
    match how:
        case "at once":
            raw = b"}(" + b"".join(key + b"N" for key in keys) + b"u."
        case "one by one":
            raw = b"}" + b"".join(key + b"Ns" for key in keys) + b"."
        case "in a set":
            raw = b"\x8f(" + b"".join(keys) + b"\x90."
        case "in a set, one by one":
            raw = b"\x8f" + b"".join(b"(" + key + b"\x90" for key in keys) + b"."
        case "in a frozenset":
            raw = b"(" + b"".join(keys) + b"\x91."
        case "text between":
            raw = b"}(" + b"".join(key + b"N\x8c\x01" + b"%cN" % (65 + n % 26) for n, key in enumerate(keys)) + b"u."
    with pytest.raises(HandleError, match="again and again"):
        load(before + raw)


def test_few_of_the_same_hash_in_each_of_many() -> None:
    """What is counted is counted for each dict: 0 is a key of all of them."""
    raw = b"](" + (b"}(" + b"".join(ints(n * P61) + b"N" for n in range(10)) + b"u") * 2000 + b"e."
    assert len(load(raw)) == 2000


@pytest.mark.parametrize(
    "key",
    [b"(" + b"K\1" * 900 + b"t", b"\x8d\0\0\1\0\0\0\0\0" + b"a" * (1 << 16), b"\x8b\0\x80\0\0" + b"a" * (1 << 15)],
    ids=["tuple", "text", "int"],
)
def test_keys_are_mentioned_again_and_again(key: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three bytes to look for a long one once more, in the same dict, and each time in another one."""
    monkeypatch.setattr(plain, "_PART_BYTES", 64)  # or a text that is long enough would take its time here as well
    both = b"(" + key + b"q\0" + key + b"q\1"
    with pytest.raises(HandleError, match="again and again"):
        load(both + b"}(" + b"h\0Nh\1N" * 10_000 + b"ut.")
    with pytest.raises(HandleError, match="again and again"):
        load(both + b"}(h\0Nh\1Nu" * 10_000 + b"t.")
    assert len(load(both + b"}(h\0Nh\1Nut.")[-1]) == 1


@pytest.mark.parametrize("levels", [2, 8])
def test_frozensets_whose_elements_have_the_same_hash(levels: int) -> None:
    """Three alike on every level, two of them in each of the next. With eight levels there are 511 in all, and to find out
    that two of these are equal takes 65,536 steps."""
    raw, count = b"(", 3 * (1 + levels)
    mentions = [b"j" + n.to_bytes(4, "little") for n in range(2 * count)]
    for start in (0, count):
        raw += b"\x94".join((ints(0), ints(P61), ints(2 * P61), b""))
        for level in range(start, start + 3 * levels, 3):
            for first, second in itertools.combinations(mentions[level : level + 3], 2):
                raw += b"(" + first + second + b"\x91\x94"
    raw += b"}(" + mentions[count - 1] + b"N" + mentions[-1] + b"Nut."
    if levels == 2:
        assert len(load(raw)[-1]) == 1
    else:
        with pytest.raises(HandleError, match="parts"):
            load(raw)


@pytest.mark.parametrize("last", [0, 1])
def test_numbers_in_one_container_are_bounded(last: int) -> None:
    """Not the same hash, but numbers can be chosen so that they meet in the table, each with all that are there."""
    keys = [b"J" + n.to_bytes(4, "little") for n in range(plain._KEYS_CHOSEN + last)]
    texts = [b"\x8c\x05%05d" % n for n in range(3 * plain._KEYS_CHOSEN)]
    forms = {
        "a dict": b"}(" + b"N".join(keys) + b"Nu.",
        "a dict one by one": b"}" + b"Ns".join(keys) + b"Ns.",
        "a set": b"\x8f(" + b"".join(keys[:1000]) + b"\x90(" + b"".join(keys[1000:]) + b"\x90.",
        "a frozenset": b"(" + b"".join(keys) + b"\x91.",
        "a dict with texts": b"}(" + b"N".join(keys + texts) + b"Nu.",
    }
    for form, raw in forms.items():
        if last:
            with pytest.raises(HandleError, match="more than 16384 keys"):
                load(raw)
        else:
            assert len(load(raw)) == len(keys) + (len(texts) if "texts" in form else 0), form
    assert len(load(b"](" + (b"}(" + b"N".join(keys[:10000]) + b"Nu") * 3 + b"e.")) == 3


def test_no_memory_is_an_error_of_ours() -> None:
    def no_memory(number: int) -> Any:
        raise MemoryError("1 TiB")

    with pytest.raises(HandleError, match="there is no memory"):
        plain.load(named("shmcast.codec", "_block") + b"K\x00\x85R.", BLOCK, no_memory)


def test_an_error_does_not_repeat_what_has_no_end() -> None:
    """A tuple of ten thousand times the same text of ten thousand characters, where the number of an array belongs."""
    text = b"\x8d" + (10_000).to_bytes(8, "little") + b"a" * 10_000
    raw = named("shmcast.codec", "_block") + b"(" + text + b"q\0" + b"h\0" * 10_000 + b"t\x85R."
    with pytest.raises(HandleError, match="by a tuple") as caught:
        shmcast.loads(wrapped(raw), allow_pickle=False)
    assert len(str(caught.value)) < 1000


def test_bytes_are_copied_once() -> None:
    """A scalar of all of them, and an array, again and again: some bytes each, and another copy."""
    scalar = b"\x8c\x16numpy._core.multiarray\x8c\x06scalar\x93"
    dtype = b"\x8c\x05numpy\x8c\x05dtype\x93\x8c\x05S1000\x85R"
    raw = b"(B" + (1000).to_bytes(4, "little") + b"a" * 1000 + b"q\x000" + dtype + b"q\x010" + scalar + b"q\x020"
    assert len(load(raw + b"h\x02h\x01h\x00\x86R" + b"t.")) == 1
    with pytest.raises(HandleError, match="again and again"):
        load(raw + b"h\x02h\x01h\x00\x86R" * 10 + b"t.")


def test_many_states_take_time_in_proportion() -> None:
    """Every one of them used to be looked up among all that came before."""
    raw = DTYPE.replace(b"R", b"R\x94") + b"(K\x03\x8c\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb0"
    assert load(raw * 20_000 + b"N.") is None


def test_pickles_are_read_as_ever_where_they_are_allowed() -> None:
    assert shmcast.loads(shmcast.dumps(Item(3))) == Item(3)
    assert shmcast.loads(shmcast.dumps(Item(3)), allow_pickle=True) == Item(3)


TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.complex_numbers() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=30,
)


@given(TREES)
def test_any_plain_tree(tree: Any) -> None:
    assert same(load(pickle.dumps(tree, 5)), tree)
    assert same(load(pickle.dumps(tree, 4)), tree)


def test_damaged_pickles_give_plain_things_or_an_error(rng: np.random.Generator, seed: int) -> None:
    """Bytes of good pickles changed at random, and opcodes strung together: never another exception, never a call."""
    random.seed(seed)
    codes = [ord(op.code) for op in pickletools.opcodes]
    good = [pickle.dumps(thing, 5) for thing in PLAIN if len(pickle.dumps(thing, 5)) < 500]
    refused = 0
    for _ in range(20_000):
        raw = bytearray(random.choice(good))
        for _ in range(random.randint(1, 6)):
            at = random.randrange(len(raw))
            raw[at : at + random.randint(0, 2)] = bytes(random.choices([*codes, 0, 1, 2, 255], k=random.randint(0, 3)))
            raw = raw or bytearray(b".")
        try:
            found = load(bytes(raw))
        except (HandleError, MemoryError):
            refused += 1
        else:
            assert_plain(found)
    assert refused > 5_000


def assert_plain(tree: Any) -> None:
    kinds = (type(None), bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset)
    left, seen = [tree], set()
    while left:
        thing = left.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        assert type(thing) in kinds or isinstance(thing, np.generic) or type(thing) is np.ndarray, type(thing)
        if isinstance(thing, np.ndarray):
            thing.tobytes()
        if isinstance(thing, dict):
            left += [*thing, *thing.values()]
        elif isinstance(thing, (list, tuple, set, frozenset)):
            left += thing
