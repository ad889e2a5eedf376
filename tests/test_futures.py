"""Futures of a caster: done by whoever steps, and by nothing else."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import CancelledError, Future, wait
from typing import Any

import pytest

import shmcast
from makers import LONG_S, MIB, Maker, all_ready
from ranks import in_use
from shmcast import Caster, FutureCaster, GroupError, MaterializeError


def test_futures_are_done_in_steps(group: shmcast.Group, maker: Maker) -> None:
    with FutureCaster(Caster(group, maker, workers=1)) as futures:
        good, bad, none = futures.submit("good", 5), futures.submit("bad", "bad"), futures.submit("none")
        told: list[Any] = []
        good.add_done_callback(told.append)
        all_ready(futures.caster, 3)
        assert not any(future.done() for future in (good, bad, none))
        outcomes = futures.step()
        assert {outcome.rid for outcome in outcomes} == {"good", "bad", "none"}
        assert (good.result()["x"] == 5).all()
        assert none.result() is None
        assert isinstance(bad.exception(), MaterializeError)
        assert told == [good]
        assert group.step == 1


def test_collect_and_apply(group: shmcast.Group) -> None:
    with FutureCaster(Caster(group, Maker(), executor="inline")) as futures:
        future = futures.submit("a", None)
        futures.apply(futures.collect())
        assert future.result(timeout=0) is None


def test_cancel_is_a_request(group: shmcast.Group, maker: Maker) -> None:
    with FutureCaster(Caster(group, maker, workers=1)) as futures:
        running = futures.submit("running", maker.gate("running"))
        queued, other = futures.submit("queued", 1), futures.submit("other", 1)
        assert not queued.cancel()
        assert not queued.cancelled()
        futures.cancel(lambda rid: rid == "other")
        futures.step()
        assert queued.cancelled()
        assert queued.cancel()
        assert other.cancelled()
        with pytest.raises(CancelledError):
            queued.result()
        assert wait([queued, other], timeout=0).done == {queued, other}
        maker.open("running")
        while not running.done():
            futures.step(LONG_S)
        assert not running.cancel()
        assert running.result()["name"] == "running"


def test_the_same_id_twice(group: shmcast.Group, maker: Maker) -> None:
    with FutureCaster(Caster(group, maker)) as futures:
        first = futures.submit("a", maker.gate("a"))
        with pytest.raises(ValueError, match="with this id"):
            futures.submit("a", 1)
        futures.caster.submit("b", None)
        with pytest.raises(ValueError, match="with this id"):
            futures.submit("b", 1)
        with pytest.raises(TypeError):
            futures.submit([], 1)
        maker.open("a")
        futures.close()
        assert first.result()["name"] == "a"


def test_close_ends_all_futures(group: shmcast.Group, maker: Maker) -> None:
    futures = FutureCaster(Caster(group, maker, workers=1))
    running, ready = futures.submit("running", maker.gate("running")), futures.submit("none")
    outcomes = futures.close(wait=False)
    assert len(outcomes) == 2
    assert isinstance(running.exception(timeout=0), MaterializeError)
    assert ready.result(timeout=0) is None


def test_leaving_by_an_exception_ends_all_futures(group: shmcast.Group) -> None:
    with pytest.raises(ZeroDivisionError), FutureCaster(Caster(group, Maker())) as futures:
        future = futures.submit("a", MIB)
        _ = 1 / 0
    assert isinstance(future.exception(timeout=0), GroupError)
    assert futures.caster._intake._pool.join(LONG_S)
    assert in_use(group.arena) == 0


def test_another_thread_may_wait(group: shmcast.Group) -> None:
    with FutureCaster(Caster(group, Maker())) as futures:
        future = futures.submit("a", 7)
        got: list[Any] = []
        thread = threading.Thread(target=lambda: got.append(future.result(timeout=LONG_S)))
        thread.start()
        while not future.done():
            futures.step(LONG_S)
        thread.join(LONG_S)
        assert got[0]["x"][0] == 7


def test_asyncio(group: shmcast.Group) -> None:
    async def main(futures: FutureCaster) -> Any:
        future: Future[Any] = futures.submit("a", 7)
        waiting = asyncio.wrap_future(future)
        while not future.done():
            futures.step(LONG_S)
        return await waiting

    with FutureCaster(Caster(group, Maker())) as futures:
        assert asyncio.run(main(futures))["x"][0] == 7
