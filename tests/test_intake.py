"""How large a raw request is taken to be, and how a function says that it makes things in place."""

from __future__ import annotations

import dataclasses
import functools
from collections import deque
from typing import Any

import numpy as np
import pytest

from shmcast import request
from shmcast.materializing import out_parameter
from shmcast.request import size_of


@dataclasses.dataclass
class Holder:
    image: Any
    note: str = ""


class Nasty:
    @property
    def nbytes(self) -> int:
        raise RuntimeError("not now")


def cycle() -> list[Any]:
    items: list[Any] = [b"x" * 10]
    items.append(items)
    return items


@pytest.mark.parametrize(
    ("raw", "nbytes"),
    [
        (b"x" * 100, 100),
        (bytearray(7), 7),
        ("abc", 3),
        (np.zeros((10, 10), "f4"), 400),
        (memoryview(bytes(30)), 30),
        ({"image": b"x" * 100, "more": [b"y", ("z", {"k": b"w"})]}, 100 + 1 + 1 + 1 + len("image" + "more" + "k")),
        (Holder(b"x" * 50, "note"), 54),
        ([Holder(np.zeros(8, "u1"))], 8),
        (deque([b"ab", {b"c"}, frozenset("d")]), 4),
        (None, 0),
        ([1, 2.5, None, True], 0),
        (Holder, 0),
        (lambda: b"x" * 100, 0),
        (Nasty(), 0),
        ([Nasty(), b"abc"], 3),
        (cycle(), 10),
    ],
)
def test_size(raw: Any, nbytes: int) -> None:
    assert size_of(raw) == nbytes


@pytest.mark.torch
def test_size_of_tensors() -> None:
    import torch

    assert size_of([torch.zeros(10, 10)]) == 400


def test_of_very_many_things_not_all_are_looked_at() -> None:
    assert size_of([b"x"] * 10_000_000) < request._MAX_NODES


def test_the_same_thing_twice_is_one() -> None:
    image = np.zeros(100, "u1")
    assert size_of([image, image]) == 100


class Method:
    def plain(self, raw: Any) -> Any: ...

    def second(self, raw: Any, reserve: Any) -> Any: ...

    @classmethod
    def made(cls, raw: Any, *, out: Any = None) -> Any: ...


def plain(raw: Any) -> Any: ...


def with_default(raw: Any, scale: float = 1.0) -> Any: ...


def named(raw: Any, scale: float = 1.0, *, out: Any = None) -> Any: ...


def positional(raw: Any, out: Any = None, /) -> Any: ...


def second(raw: Any, reserve: Any) -> Any: ...


def anything(*args: Any, **kwargs: Any) -> Any: ...


@pytest.mark.parametrize(
    ("function", "how"),
    [
        (plain, None),
        (with_default, None),
        (named, "out"),
        (positional, ""),
        (second, ""),
        (anything, None),
        (functools.partial(second, reserve=1), None),
        (functools.partial(named, scale=2), "out"),
        (Method().plain, None),
        (Method().second, ""),
        (Method.made, "out"),
        (lambda raw, out: None, "out"),
        (lambda out: None, None),
        (len, None),
        (int, None),
        (dict.fromkeys, None),
    ],
)
def test_out_parameter(function: Any, how: str | None) -> None:
    assert out_parameter(function) == how
