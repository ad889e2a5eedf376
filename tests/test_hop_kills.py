"""SIGKILL of a tokenizer, of rank 0 or of another rank, at every point of a request's way: what it held comes back, what the
others hold stays right, and they go on; with a new group where a rank has died."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("zmq")
pytest.importorskip("torch")
pytestmark = [pytest.mark.zmq, pytest.mark.torch]

import shmcast  # noqa: E402
from conftest import segments_of  # noqa: E402
from hop import Crew, Forks, Raised, Scheduler, Tokenizer, Worker, _joined, acquaint, alike, ready, together  # noqa: E402

SOON_S = 0.05
"""A ``grant_timeout``. What is promised for longer than that is taken back where room is needed, and nowhere else."""

MIDWAY = {"sending": "_carry", "attaching": "_rebuild", "agreeing": "_agree"}
"""Points in a broadcast, each with the step of `Group` that comes next. When they agree all ranks hold the blocks."""
POINTS = ("shared", "sent", "received", *MIDWAY, "held")
"""How far a request has come when somebody is killed."""


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks() as started:
        yield started


@pytest.fixture
def crew(forks: Forks, namespace: str) -> Iterator[Crew]:
    with forks.crew() as crew:
        yield crew


class Survivor(Scheduler):
    """A rank that can be stopped midway, and joined again by others."""

    def wait_until_there(self) -> None:
        """On rank 0: a message is in the socket."""
        assert self.socket.poll(60_000)

    def pause_at(self, point: str) -> None:
        """In the next broadcast, say "paused" at this point and wait for a word."""
        name = MIDWAY[point]
        go_on = getattr(self.group, name)

        def paused(*args: Any) -> Any:
            delattr(self.group, name)
            self.here.parent.send("paused")
            self.here.parent.receive()
            return go_on(*args)

        setattr(self.group, name, paused)

    def rejoin(self, store: str) -> None:
        """Make a new group, with somebody else in the place of who has died."""
        import torch.distributed as dist

        self.group.close()
        dist.destroy_process_group()
        self.here = _joined(self.here.parent, store, self.here.rank, self.here.size)  # type: ignore[arg-type]
        self.join()


def renew(crew: Crew, ranks: list[Worker], dead: int, address: str) -> None:
    """A new process in the place of a rank that was killed, and a new group of all."""
    store = crew.path("store")
    ranks[dead] = crew._start(Survivor, (store, dead, len(ranks)), (address,))
    others = [rank for rank in ranks if rank is not ranks[dead]]
    assert together(others, "rejoin", store) == [None] * len(others)
    ready(ranks[dead])


def send(tokenizer: Worker, rid: str, seed: int) -> None:
    """From materializing to having forgotten it."""
    tokenizer.ask("share", rid, seed)
    tokenizer.ask("send", rid)
    tokenizer.ask("end", rid)


def is_gone(namespace: str, arena: int) -> bool:
    return not [name for name in segments_of(namespace) if f".{arena:016x}." in name]


# ---- a tokenizer


def killed_tokenizer(ranks: list[Worker], victim: Worker, point: str, seed: int, swept: bool) -> Any:
    """Play until this point, kill, go on. What the ranks have of the request in the end, or what rank 0 has instead."""

    def die() -> None:
        victim.kill()
        if swept:
            assert shmcast.sweep().arenas == 1

    victim.ask("share", "r", seed)
    if point == "shared":
        die()
        return None
    victim.ask("send", "r")
    ranks[0].ask("wait_until_there")
    if point == "sent":
        die()
    (answer,) = ranks[0].ask("receive", 1)
    if answer != "r":
        return answer
    if point == "received":
        die()
    if point in MIDWAY:
        together(ranks, "pause_at", point)
    for rank in ranks:
        rank.tell("broadcast_each")
    if point in MIDWAY:
        assert [rank.receive() for rank in ranks] == ["paused"] * len(ranks)
        die()
        for rank in ranks:
            rank.send("go on")
    ends = [rank.receive() for rank in ranks]
    assert ends == ends[:1] * len(ranks)
    if point == "held":
        die()
    return ends[0]["r"]


@pytest.mark.parametrize("swept", [False, True], ids=["not swept", "swept at once"])
def test_a_tokenizer_is_killed(crew: Crew, namespace: str, seed: int, swept: bool) -> None:
    """What it has sent is good until somebody has taken its arena away; who has it by then keeps it."""
    address = crew.address()
    ranks = crew.ranks(3, Survivor, address)
    other = crew.start(Tokenizer, address, "16MiB", SOON_S)
    ready(*ranks, other)
    acquaint(ranks, other)
    send(other, "kept", seed)
    assert alike(ranks, "take", 1) == {"kept": True}
    for number, point in enumerate(POINTS):
        victim = crew.start(Tokenizer, address, "16MiB", SOON_S)
        ready(victim)
        acquaint(ranks, victim)
        arena = victim.ask("arena_id")
        end = killed_tokenizer(ranks, victim, point, seed + number, swept)
        if point == "shared":
            assert end is None
        elif swept and point == "sent":
            assert end[0] == "ArenaGoneError", end
        elif swept and point in ("received", "sending", "attaching"):
            assert end[0] == "GroupError" and "can not rebuild" in end[1], (point, end)
        else:
            assert end is True, (point, end)
        shmcast.sweep()
        assert is_gone(namespace, arena)
        send(other, f"after {point}", seed + 100 + number)
        assert alike(ranks, "take", 1) == {f"after {point}": True}
        held = alike(ranks, "still_right")
        assert all(held.values()) and {"kept", f"after {point}"} <= set(held)
        assert ("r" in held) is (end is True)
        alike(ranks, "drop", *(set(held) - {"kept"}))
    alike(ranks, "drop")
    assert other.ask("counts")["slots"] == 0
    assert ranks[0].ask("counts")["slots"] == 0


# ---- a rank


def killed_rank(ranks: list[Worker], victim: int, tokenizer: Worker, point: str, seed: int) -> list[Any]:
    """Play until this point, kill, go on. What those that live have of the request: True, or an error."""
    others = [rank for number, rank in enumerate(ranks) if number != victim]
    die = ranks[victim].kill
    tokenizer.ask("share", "r", seed)
    if point == "shared":
        die()
    tokenizer.ask("send", "r")
    tokenizer.ask("end", "r")
    if point != "shared" or victim:
        ranks[0].ask("wait_until_there")
    if point == "sent":
        die()
    if ranks[0].alive:
        assert ranks[0].ask("receive", 1) == ["r"]
    if point == "received":
        die()
    if point in MIDWAY:
        ranks[victim].ask("pause_at", point)
    alive = [rank for rank in ranks if rank.alive]
    for rank in alive:
        rank.tell("broadcast_each")
    if point in MIDWAY:
        assert ranks[victim].receive() == "paused"
        die()
    ends = [rank.receive() for rank in (alive if point == "held" else others)]
    if point == "held":
        die()
        del ends[victim]
    return [end if isinstance(end, Raised) else end["r"] for end in ends]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_is_killed(crew: Crew, namespace: str, seed: int, victim: int) -> None:
    """The others have the request, or all of them an error that names who has died; then a new group does."""
    address = crew.address()
    ranks = crew.ranks(3, Survivor, address)
    tokenizers = [crew.start(Tokenizer, address, "16MiB", SOON_S) for _ in range(2)]
    ready(*ranks, *tokenizers)
    for number, point in enumerate(POINTS):
        acquaint(ranks, *tokenizers)
        send(tokenizers[1], "kept", seed)
        assert alike(ranks, "take", 1) == {"kept": True}
        ends = killed_rank(ranks, victim, tokenizers[0], point, seed + number)
        if point in ("agreeing", "held"):  # it had what all need it to have
            assert ends == [True, True], (point, ends)
        else:
            assert all(isinstance(end, Raised) for end in ends), (point, ends)
            assert any(f"rank {victim} died" in end.text for end in ends), (point, ends)
        shmcast.sweep()
        others = [rank for rank in ranks if rank.alive]
        held = alike(others, "still_right")
        assert held == {"kept": True} | ({"r": True} if ends[0] is True else {})
        renew(crew, ranks, victim, address)
        assert alike(others, "still_right") == held
        if victim == 0 and point == "shared":  # sent to nobody, it has waited for a rank 0
            assert alike(ranks, "take", 1) == {"r": True}
        for which, tokenizer in enumerate(tokenizers):
            send(tokenizer, f"after {which}", seed + 100 + which)
        assert alike(ranks, "take", 2) == {"after 0": True, "after 1": True}
        together(ranks, "drop")
        for tokenizer in tokenizers:
            assert tokenizer.ask("wait_for_all") == 0, point
        assert ranks[0].ask("counts")["slots"] == 0
        assert shmcast.sweep().arenas == 0
        assert len({name.split(".")[2] for name in segments_of(namespace)}) == 3  # one a tokenizer, and the new group's
