"""A bell (native/layout.h, A BELL) explored: two sleepers with a condition each, a ringer for either, every interleaving.

A step is one access to shared memory. Nobody sleeps for ever; and each of the mistakes below makes somebody do so."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

SLEEPERS = (0, 1)
DONE = "done"


@dataclass(frozen=True)
class World:
    """What is shared, and where everybody is: sleepers 0 and 1, then who rings for them."""

    met: tuple[bool, bool] = (False, False)
    bits: frozenset[int] = frozenset()
    rung: int = 0
    asleep: frozenset[int] = frozenset()
    at: tuple[str, ...] = ("begin", "begin", "make", "make")
    seen: tuple[int, ...] = (0, 0, 0, 0)
    """What each has loaded last: rung, or how many bits."""

    def move(self, who: int, to: str, seen: int | None = None, **shared: object) -> World:
        at = (*self.at[:who], to, *self.at[who + 1 :])
        loaded = self.seen if seen is None else (*self.seen[:who], seen, *self.seen[who + 1 :])
        return replace(self, at=at, seen=loaded, **shared)


def sleeper_step(world: World, who: int, mistake: str) -> World | None:
    here = world.at[who]
    order = ["number", "bit", "check"]
    if mistake == "number after bit":
        order = ["bit", "number", "check"]
    if mistake == "bit after check":
        order = ["number", "check", "bit"]
    after = dict(zip(order, [*order[1:], "sleep"], strict=True))
    if here == "begin":
        return world.move(who, order[0])
    if here == "number":
        return world.move(who, after[here], seen=world.rung)
    if here == "bit":
        return world.move(who, after[here], bits=world.bits | {who})
    if here == "check":
        return world.move(who, "forget" if world.met[who] else after[here])
    if here == "sleep":  # the kernel compares and sleeps in one
        if world.rung == world.seen[who]:
            return world.move(who, "asleep", asleep=world.asleep | {who})
        return world.move(who, "forget")
    if here == "asleep":
        return None if who in world.asleep else world.move(who, "forget")
    if here == "forget":
        gone = set(SLEEPERS) if mistake == "forgets all" else {who}
        return world.move(who, "look", bits=world.bits - gone)
    if here == "look":
        if world.met[who] or mistake == "does not look again":
            return world.move(who, DONE if world.met[who] else "asleep", asleep=world.asleep | {who})
        return world.move(who, "begin")
    return None


def ringer_step(world: World, who: int, mistake: str) -> World | None:
    here, whose = world.at[who], who - len(SLEEPERS)
    early = mistake == "looks for sleepers first"
    if here == "make" and early and world.seen[who] == 0:
        return world.move(who, "make", seen=1 + len(world.bits))
    if here == "make":
        met = tuple(met or sleeper == whose for sleeper, met in enumerate(world.met))
        if early:
            return world.move(who, "take" if world.seen[who] > 1 else DONE, met=met)
        return world.move(who, "load", met=met)
    if here == "load":
        return world.move(who, "take" if world.bits else DONE)
    if here == "take":
        return world.move(who, "raise" if world.bits else DONE, bits=frozenset())
    if here == "raise":
        return world.move(who, "wake", rung=world.rung + (mistake != "number stays"))
    if here == "wake":
        return world.move(who, DONE, asleep=frozenset())
    return None


def explore(mistake: str = "") -> tuple[int, World | None]:
    """How many worlds there are, and one in which nobody moves and somebody sleeps."""
    worlds = {World()}
    front = [World()]
    while front:
        world = front.pop()
        steps = [sleeper_step(world, who, mistake) for who in SLEEPERS]
        steps += [ringer_step(world, who, mistake) for who in (2, 3)]
        nexts = [step for step in steps if step is not None]
        if not nexts and world.at != (DONE,) * 4:
            return len(worlds), world
        for step in nexts:
            if step not in worlds:
                worlds.add(step)
                front.append(step)
    return len(worlds), None


def test_nobody_sleeps_for_ever() -> None:
    worlds, stuck = explore()
    assert stuck is None
    assert worlds > 1000


@pytest.mark.parametrize(
    "mistake",
    [
        "number after bit",
        "bit after check",
        "forgets all",
        "number stays",
        "looks for sleepers first",
        "does not look again",
    ],
)
def test_a_mistake_lets_somebody_sleep(mistake: str) -> None:
    assert explore(mistake)[1] is not None
