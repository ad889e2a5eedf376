"""Several ranks whose group breaks, each of which goes on alone: the same outcomes on all of them, in the same order."""

from __future__ import annotations

import os
import random
import re
import signal
from collections.abc import Iterator
from typing import Any

import pytest

import shmcast
from makers import LONG_S, Maker, Mixed, all_ready
from ranks import Patched, Rank, Ranks, together
from shmcast import Caster, GroupError, MaterializeError, delivery, lockstep
from test_caster_alone import alone, broken
from test_caster_modes import MODES
from test_caster_ranks import all_the_same, make_group, told, torch_broadcast

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(3) as started:
        yield started


def check(mixed: Mixed, outcome: shmcast.Outcome) -> None:
    if outcome.error is not None:
        assert isinstance(outcome.error, MaterializeError), outcome
        assert mixed.fails(outcome.rid)
    else:
        mixed.check(outcome)


def breaks(here: Rank, channel: str, how: str, raw_everywhere: bool, by: str, seed: int) -> tuple[str, list[Any]]:
    mixed = Mixed(seed)
    found: list[Any] = []
    kind = ""
    # Over gloo nobody sees that another has given up before its own time is over.
    timeouts = {"late": 0.5, "given up": LONG_S if channel == "auto" else 5.0}
    group = make_group(here, channel, timeout=timeouts.get(how, LONG_S))
    caster = Caster(group, mixed, raw_everywhere=raw_everywhere, workers=2, mode="shm")
    submitted = 0

    def submit(count: int) -> None:
        nonlocal submitted
        for _ in range(count):
            caster.submit(submitted, submitted)
            submitted += 1

    def step() -> bool:
        if by == "step":
            outcomes = caster.step(0.01)
        else:
            blob = caster.collect() if here.rank == group.entry else b""
            outcomes = caster.apply(torch_broadcast(here, blob))
        for outcome in outcomes:
            check(mixed, outcome)
            found.append(told(outcome)[:3])
        return bool(outcomes)

    submit(10)
    while len(found) < 3:
        step()
    together(here)
    submit(5)
    try:
        with Patched(lockstep, "write", garbage) if how == "garbage" and here.rank == 0 else Patched():
            if how == "given up" and here.rank == 1:
                broken(group)
            if how == "late" and here.rank == 1:
                together(here)
            try:
                for _ in range(3 if how == "garbage" and by == "apply" else 1):
                    step()
            finally:
                if how == "late" and here.rank != 1:
                    together(here)
        for _ in range(5):
            submit(3)
            step()
            while caster.pending:
                step()
    except GroupError as error:
        kind = type(error).__name__
        assert caster.alone is None
    else:
        assert caster.alone is not None
        assert len(found) == submitted
    outcomes = caster.close()
    assert bool(outcomes) == bool(kind)
    if channel == "auto" or how != "given up":  # else gloo itself has given the connections up
        together(here)
    group.close()
    return kind, found


def misses(here: Rank, channel: str) -> list[Any]:
    """A message without values, which one rank does not come to take in."""
    with make_group(here, channel) as group:
        caster = alone(group, Maker(), workers=1)
        caster.submit("a", 3)
        caster.submit("bad", "bad")
        if here.rank == 0:
            all_ready(caster, 2)
        caster.cancel("a")

        def breaks(head: bytes, parts: Any) -> Any:
            raise broken(group)

        if here.rank == 2:
            caster._delivery.finish = breaks  # type: ignore[method-assign]
        found = [told(outcome)[:3] for outcome in caster.step()]
        assert caster.alone is not None
        together(here)
        assert caster.close() == []
    return found


@pytest.mark.parametrize("channel", ["auto", "group"])
def test_an_end_that_one_rank_misses_none_has(ranks: Ranks, channel: str) -> None:
    a, bad = all_the_same(ranks.run(misses, channel))
    assert a[1] is False  # not cancelled: nobody else can know that it was
    assert bad[1] == "MaterializeError"


def garbage(head: lockstep.Head) -> bytes:
    return b"no head"


# Without those in which what the test itself does goes over connections that gloo has given up by then.
BREAKS = [
    *[("auto", how, by) for how in ("given up", "garbage") for by in ("step", "apply")],
    ("auto", "late", "step"),
    *[(channel, "garbage", by) for channel in ("group", "object") for by in ("step", "apply")],
    ("group", "given up", "step"),
    ("object", "given up", "step"),
]


@pytest.mark.parametrize(("channel", "how", "by"), BREAKS)
def test_all_go_on(ranks: Ranks, channel: str, how: str, by: str, seed: int) -> None:
    kind, found = all_the_same(ranks.run(breaks, channel, how, True, by, seed % 1000))
    assert kind == ""
    assert [int(rid) for rid, *_ in found[-10:]] == list(range(20, 30))


@pytest.mark.parametrize("how", ["given up", "garbage", "late"])
def test_without_raw_requests_none_goes_on(ranks: Ranks, how: str, seed: int) -> None:
    answers = ranks.run(breaks, "auto", how, False, "step", seed % 1000)
    for kind, _ in answers:
        assert kind in ("GroupError", "GroupTimeoutError", "PeerLostError")


def disagrees(here: Rank, mode: str) -> tuple[list[str], list[Any], str]:
    """One rank was given other requests than the others."""
    group = make_group(here, "auto")
    caster = Caster(group, Maker(), raw_everywhere=True, workers=2, mode=mode)
    odd = here.rank == 1
    errors: list[str] = []
    found: list[Any] = []
    for number in range(3):
        caster.submit("odd" if odd and number == 1 else number, number + 1)
    for _ in range(4):
        try:
            found += [told(outcome) for outcome in caster.step(LONG_S)]
        except GroupError as error:
            errors.append(str(error))
    caster.submit("later", 100)
    try:
        found += [told(outcome) for outcome in caster.step(LONG_S)]
        found += [told(outcome) for outcome in caster.cast([("last", 7)])]
    except GroupError as error:
        errors.append(str(error))
    why = str(caster.alone)
    for outcome in caster.close():
        assert isinstance(outcome.error, GroupError)
    together(here)
    group.close()
    return errors, found, why


@pytest.mark.parametrize("mode", ["shm", "object-sync", "raw", "raw-sync", "replicate", "replicate-sync"])
def test_a_rank_that_was_given_others_does_not_go_on(ranks: Ranks, mode: str) -> None:
    entry, odd, other = ranks.run(disagrees, mode)
    errors, found, why = odd
    assert len(errors) == 5
    assert "of the first 3 requests the ids are not the same here as on the entry rank" in errors[0]
    for error in errors[1:]:
        assert "the group is broken" in error
    assert found == []
    assert why == "None"
    assert entry[0] == other[0] == []
    assert sorted(rid for rid, *_ in entry[1]) == sorted(["0", "1", "2", "'later'", "'last'"])
    assert entry[1] == other[1]
    for _, _, why in (entry, other):
        assert re.search("ranks? (0, )?1(, 2)? closed the group or gave it up", why)  # or who has noticed that already


# ---- killed


WHENS = ["between steps", "taking in", "taken in", "materializing"]


def killed(here: Rank, channel: str, victim: int, when: str, seed: int) -> tuple[list[Any], str]:
    mixed = Mixed(seed)
    dice = random.Random(seed)
    last = dice.randrange(3, 12)
    group = make_group(here, channel, timeout=LONG_S)
    steps = 0

    def die(moment: str) -> None:
        if here.rank == victim and when == moment and steps >= last:
            os.kill(os.getpid(), signal.SIGKILL)

    def materialize(raw: Any, out: Any) -> Any:
        die("materializing")
        return mixed(raw, out)

    original = delivery.Delivery.finish

    def finish(self: Any, head: bytes, parts: Any) -> Any:
        die("taking in")
        done = original(self, head, parts)
        die("taken in")
        return done

    caster = Caster(group, materialize, raw_everywhere=True, workers=2)
    found = []
    with Patched(delivery.Delivery, "finish", finish):
        caster._delivery.finish = finish.__get__(caster._delivery)  # type: ignore[method-assign]
        count = 150
        submitted = 0
        while submitted < count or caster.pending:
            caster.switch(dice.choice(MODES))
            for _ in range(min(dice.randrange(8), count - submitted)):
                caster.submit(submitted, submitted)
                if mixed.cancel_when(submitted):
                    caster.cancel(submitted)
                submitted += 1
            die("between steps")
            for outcome in caster.step(0.005):
                check(mixed, outcome)
                found.append(told(outcome)[:3])
            steps += 1
    assert len(found) == count
    why = type(caster.alone).__name__
    assert caster.close() == []
    group.close()
    return found, why


@pytest.mark.parametrize(
    ("channel", "victim", "when"),
    [("auto", victim, when) for victim in (0, 2) for when in WHENS]
    + [("group", 0, "taken in"), ("group", 2, "taking in")],
)
def test_a_rank_is_killed(channel: str, victim: int, when: str, seed: int) -> None:
    with Ranks(3) as own:
        children = own.start(killed, channel, victim, when, seed % 1000)
        own._usable = False
        answers = [child.receive() for rank, child in enumerate(children) if rank != victim]
        for kind, answer in answers:
            assert kind == "done", answer
        shmcast.sweep()  # what the entry rank has left, if that is who died
        found, why = all_the_same([answer[0] for _, answer in answers]), {answer[1] for _, answer in answers}
        assert len(found) == 150
        assert why <= {"PeerLostError", "GroupError"}
