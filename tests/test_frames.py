"""Errors keep nothing alive: not by themselves, not by who keeps them. Engines switch the garbage collector off."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytestmark = pytest.mark.torch

import shmcast  # noqa: E402
from ranks import Rank, Ranks  # noqa: E402
from shmcast.errors import GroupError  # noqa: E402

SIZE = 100_000


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(2) as started:
        yield started


@contextmanager
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Features:
    """What a caller holds while it calls."""


class Refusing:
    """Can not be rebuilt anywhere but on the entry rank."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __reduce__(self) -> Any:
        return refuse, ()


def refuse() -> Refusing:
    raise ValueError("not here")


def failed(call: Any, *args: Any) -> Any:
    """A call that raises, from a frame that holds something; what tells whether that is still there."""
    features = Features()
    found = weakref.ref(features)
    try:
        call(*args)
    except GroupError:
        return found
    raise AssertionError("it has not failed")


def broadcasts_what_fails(here: Rank) -> bool:
    with shmcast.Group(here.group, max_bytes="16MiB") as group, no_collector():
        return failed(group.broadcast, Refusing(here.rank))() is None


def test_a_broadcast_that_fails(ranks: Ranks) -> None:
    assert ranks.run(broadcasts_what_fails) == [True, True]


def keeps_the_error(here: Rank) -> tuple[str, list[int]]:
    """Of a message whose first tree fails; what else was in it goes when it is dropped."""
    with shmcast.Group(here.group, max_bytes="16MiB") as group, no_collector():
        blob = None
        if here.rank == 0:
            trees = [{"x": Refusing(0)}, {"x": np.ones(SIZE, "uint8")}]
            blob = group.pack(b"", [group.prepare(tree) for tree in trees])
        _, received = group.exchange(blob)
        error, value = received[0].error, weakref.ref(received[1].value["x"])
        gone = [value() is not None]
        del received
        gone.append(value() is None)
        return type(error.__cause__).__name__, gone


def test_an_error_that_is_kept(ranks: Ranks) -> None:
    assert ranks.run(keeps_the_error) == [("ValueError", [True, True])] * 2


def loses_a_rank(here: Rank, late: bool) -> None:
    """``late``: the other rank dies when it has had the message, before all agree on it."""
    group = shmcast.Group(here.group, max_bytes="16MiB")
    group.broadcast(1)
    here.parent.send("ready")
    if here.rank == 1:
        group._take_in = lambda failures: here.parent.receive()  # never
        if not late:
            here.parent.receive()
        group.broadcast()
    with no_collector():
        gone = failed(group.broadcast, 2)() is None
        again = failed(group.broadcast, 3)() is None
    here.parent.send((gone, again, str(group.broken)))
    group.close()


@pytest.mark.parametrize("late", [False, True])
def test_a_rank_that_is_lost(namespace: str, late: bool) -> None:
    with Ranks(2) as own:
        running = own.start(loses_a_rank, late)
        for rank in running:
            assert rank.receive() == "ready"
        running[1].kill()
        gone, again, text = running[0].receive()
        assert gone and again
        assert "rank 1 died" in text
    shmcast.sweep()


def closes_a_caster(here: Rank) -> None:
    """A value has come when the other rank dies; the errors of what was pending do not keep it."""
    group = shmcast.Group(here.group, max_bytes="16MiB")
    caster = shmcast.Caster(group, lambda raw: raw, executor="inline")
    caster.submit("a", np.ones(SIZE, "uint8"))
    caster.submit("b", np.ones(SIZE, "uint8"))
    here.parent.send("ready")
    if here.rank == 1:
        here.parent.receive()
    with no_collector():
        lost = caster.close()
        here.parent.send([(type(outcome.error).__name__, outcome.error.__traceback__ is None) for outcome in lost])
    group.close()


def test_a_caster_that_is_closed_in_a_broken_group(namespace: str) -> None:
    with Ranks(2) as own:
        running = own.start(closes_a_caster)
        for rank in running:
            assert rank.receive() == "ready"
        running[1].kill()
        assert running[0].receive() == [("PeerLostError", True)] * 2
    shmcast.sweep()


def test_without_frames() -> None:
    try:
        try:
            raise ValueError("first")
        except ValueError as first:
            raise KeyError("second") from first
    except KeyError as second:
        error = second
    assert shmcast.errors.without_frames(error) is error
    assert error.__traceback__ is None
    assert error.__cause__ is not None and error.__cause__.__traceback__ is None
    error.__cause__.__context__ = error  # a ring
    error.with_traceback(None)
    assert shmcast.errors.without_frames(error) is error
