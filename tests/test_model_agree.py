"""Agreement (native/layout.h, AGREEMENT) explored: fellows that agree on two of three messages, every interleaving.

A step is one access to shared memory. Any fellow may lose patience and give up, one may die at any step, and its byte may
be taken over. Whatever happens, of every message all have the same answer, made of the masks of that message, or none has
any; and each of the mistakes below breaks that."""

from __future__ import annotations

from typing import NamedTuple

import pytest

AGREED = (1, 3)
"""Message 2 passes in between: it overwrites masks, and nobody waits for anybody."""
NONE = (0, False)


class Fellow(NamedTuple):
    """Where one is, and what it has loaded."""

    at: str = "mask"
    n: int = 1
    before: tuple[int, int, bool] = (0, 0, False)
    """The verdict: message, finder, broken."""
    other: int = 0
    """Whose word is read next."""
    good: bool = True
    """Whether all masks so far were those of message n."""
    answers: tuple[str, ...] = ()


class World(NamedTuple):
    """What is shared, and where everybody is."""

    last: int
    fellows: tuple[Fellow, ...]
    words: tuple[int, ...]
    masks: tuple[int, ...]
    """Of which message each is."""
    incarnations: tuple[int, ...]
    decided: tuple[tuple[int, bool], ...]
    """Of which message each answer is, and whether it is right."""
    verdict: tuple[int, int, bool] = (0, 0, False)
    dead: int = -1
    taken_over: int = 0


def beginning(fellows: int, last: int) -> World:
    zeros = (0,) * fellows
    return World(last, (Fellow(),) * fellows, zeros, zeros, zeros, (NONE,) * fellows)


def put(values: tuple, index: int, value: object) -> tuple:
    return (*values[:index], value, *values[index + 1 :])


def moved(world: World, who: int, shared: dict[str, object] | None = None, **local: object) -> World:
    fellow = world.fellows[who]._replace(**local)
    return world._replace(fellows=put(world.fellows, who, fellow), **(shared or {}))


def over(world: World, who: int, answer: str) -> World:
    """This fellow has its answer on message n, or has none and takes in nothing more."""
    fellow = world.fellows[who]
    at = "end" if answer == "none" or fellow.n == world.last else "mask"
    return moved(world, who, at=at, n=fellow.n + 1, answers=(*fellow.answers, answer))


def next_steps(world: World, who: int, mistake: str) -> list[World]:
    fellow = world.fellows[who]
    here, n = fellow.at, fellow.n
    if here == "mask" and n not in AGREED:  # one step is enough of what nobody reads in time
        both = {"masks": put(world.masks, who, n), "words": put(world.words, who, n)}
        return [moved(world, who, both, n=n + 1, answers=(*fellow.answers, "not asked"))]
    if here in ("mask", "word"):
        mask = {"masks": put(world.masks, who, n)}
        word = {"words": put(world.words, who, n)}
        first, second = (word, mask) if mistake == "word before mask" else (mask, word)
        if here == "mask":
            return [moved(world, who, first, at="word")]
        return [moved(world, who, second, at="verdict")]
    if here == "verdict":
        seen, finder, broken = world.verdict
        if seen >= n:
            return [moved(world, who, at="answer", before=world.verdict)]
        if broken:
            return [over(world, who, "none")]
        looks = moved(world, who, at="read word", before=world.verdict, other=0 if who else 1, good=True)
        return [looks, moved(world, who, at="give up")]
    if here == "answer":
        number, right = world.decided[fellow.before[1]]
        return [over(world, who, "right" if number == n and right else "wrong")]
    if here == "read word":
        if fellow.other == len(world.fellows):
            return [moved(world, who, at="write answer")]
        if world.words[fellow.other] < n:
            gone = world.incarnations[fellow.other] != 0
            return [moved(world, who, at="give up" if gone else "verdict")]
        return [moved(world, who, at="read mask")]
    if here == "read mask":
        good = fellow.good and world.masks[fellow.other] == n
        return [moved(world, who, at="read incarnation", good=good)]
    if here == "read incarnation":
        if world.incarnations[fellow.other] != 0 and mistake != "incarnation not read again":
            return [moved(world, who, at="give up")]
        following = fellow.other + 1
        return [moved(world, who, at="read word", other=following + (following == who))]
    if here == "write answer":
        at = "swap again" if mistake == "answer after verdict" else "swap"
        if at == "swap again":
            return [moved(world, who, at=at)]
        place = 0 if mistake == "one answer for all" else who
        return [moved(world, who, {"decided": put(world.decided, place, (n, fellow.good))}, at=at)]
    if here in ("swap", "swap again"):
        expected = world.verdict if mistake == "swaps against what is there now" else fellow.before
        if world.verdict != expected:
            return [moved(world, who, at="verdict")]
        place = 0 if mistake == "one answer for all" else who
        verdict = {"verdict": (n, place, False)}
        after = "late answer" if here == "swap again" else "verdict"
        return [moved(world, who, verdict, at=after)]
    if here == "late answer":
        return [moved(world, who, {"decided": put(world.decided, who, (n, fellow.good))}, at="verdict")]
    if here == "give up":
        seen, finder, broken = world.verdict
        if mistake == "gives up alone":
            return [over(world, who, "none")]
        if seen >= n and mistake != "gives up what is agreed on":
            return [moved(world, who, at="verdict")]
        return [over(moved(world, who, {"verdict": (0 if seen >= n else seen, finder, True)}), who, "none")]
    return []


def disasters(world: World, mistake: str) -> list[World]:
    """One fellow dies, and another process takes its byte over: raises the incarnation, resets the word, then the mask."""
    if world.dead < 0:
        alive = [who for who, fellow in enumerate(world.fellows) if fellow.at != "end"]
        return [moved(world._replace(dead=who), who, at="end") for who in alive]
    if world.taken_over == 3:
        return []
    raised = {"incarnations": put(world.incarnations, world.dead, 1)}
    steps = [raised, {"words": put(world.words, world.dead, world.last)}, {"masks": put(world.masks, world.dead, 0)}]
    if mistake == "resets before it raises":
        steps = [*steps[1:], raised]
    next_world = world._replace(taken_over=world.taken_over + 1, **steps[world.taken_over])
    if mistake == "resets answers":
        next_world = next_world._replace(decided=put(next_world.decided, world.dead, NONE))
    return [next_world]


def broken(world: World) -> bool:
    for n in AGREED:
        found = {fellow.answers[n - 1] for fellow in world.fellows if len(fellow.answers) >= n}
        if len(found) > 1 or "wrong" in found:
            return True
    return False


def explore(fellows: int, last: int, death: bool, mistake: str = "") -> tuple[int, World | None]:
    """How many worlds there are, and one in which answers differ."""
    worlds = {beginning(fellows, last)}
    front = list(worlds)
    while front:
        world = front.pop()
        nexts = [step for who in range(fellows) for step in next_steps(world, who, mistake)]
        if death:
            nexts += disasters(world, mistake)
        for step in nexts:
            if step not in worlds:
                if broken(step):
                    return len(worlds), step
                worlds.add(step)
                front.append(step)
    return len(worlds), None


# Three fellows over all three messages, without a death, is 404,629 worlds and half a minute: done once, nothing found.
CASES = [(2, 3, True), (3, 1, True)]


@pytest.mark.parametrize(("fellows", "last", "death"), CASES)
def test_all_have_the_same_answer(fellows: int, last: int, death: bool) -> None:
    worlds, found = explore(fellows, last, death)
    assert found is None
    assert worlds > 10000


@pytest.mark.parametrize(
    "mistake",
    [
        "word before mask",
        "incarnation not read again",
        "resets before it raises",
        "resets answers",
        "answer after verdict",
        "one answer for all",
        "swaps against what is there now",
        "gives up alone",
        "gives up what is agreed on",
    ],
)
def test_a_mistake_makes_answers_differ(mistake: str) -> None:
    assert any(explore(*case, mistake)[1] for case in CASES)
