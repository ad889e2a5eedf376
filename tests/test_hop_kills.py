"""SIGKILL of a tokenizer, of rank 0 or of another rank, at every point of a request's way: what it held comes back, what the
others hold stays right, and they go on; with a new group where a rank has died."""

from __future__ import annotations

import collections
import gc
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("zmq")
pytest.importorskip("torch")
pytestmark = [pytest.mark.zmq, pytest.mark.torch, pytest.mark.watchdog(300)]  # many deaths a test, on a busy machine

import shmcast  # noqa: E402
from conftest import segments_of  # noqa: E402
from hop import Crew, Forks, Raised, Scheduler, Tokenizer, Worker, _joined, acquaint, alike, ready, together  # noqa: E402
from hop_casting import Casting, Delivering, is_right  # noqa: E402

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
        others = [rank for rank in ranks if rank.alive]
        held = alike(others, "still_right")
        assert held == {"kept": True} | ({"r": True} if ends[0] is True else {})
        waiting = victim == 0 and point == "shared"  # sent to nobody, it waits for a rank 0
        if not waiting:
            together(others, "leave")  # a group holds what it has passed on until all have it, or it is closed
            if "r" in held:
                together(others, "drop", "r")
            assert tokenizers[0].ask("wait_for_all") == 0, point
        renew(crew, ranks, victim, address)
        assert alike(others, "still_right") == {"kept": True}
        if waiting:
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


# ---- all of it, at random


REQUESTS = 1000
EACH_ROUND = 8
"""Requests of a tokenizer."""
VICTIMS = ("tokenizer", "rank 0", "nobody", "tokenizer", "other rank", "nobody", "nobody", "nobody")
"""In each so many rounds, in an order of their own."""


class Restless(Delivering):
    """A tokenizer that does much at once: does what it is told with each of many requests."""

    def work(self, plan: list[tuple[str, int, str, int]]) -> None:
        """``plan``: ``(rid, seed, what becomes of it, how many samples)``. What was sent the last time has ended."""
        self.shared.clear()
        for rid, seed, how, copies in plan:
            if how == "garbage":
                self.raw(rid.encode())
            elif how in ("good", "dropped"):
                self.share(rid, seed)
                self.samples(rid, copies if how == "good" else 0)
            else:
                self.deliver(rid, seed, how)


class Busy(Survivor, Casting):
    """A rank in the loop of an engine: rank 0 takes in what has come, drops some of it, aborts some that is under way."""

    def join(self) -> None:
        gc.disable()  # as engines do: what only that would free stays
        self.wrong: list[str] = getattr(self, "wrong", [])
        super().join("thread")

    def iterate(self, count: int, seed: int | None = None) -> dict[str, Any]:
        """So many times: a broadcast of what is new, and a step. ``seed``: of what is dropped and aborted; None: nothing is.
        ``ends``: what has become of requests, in the order in which it did; ``errors``, ``dropped``: on rank 0, of messages."""
        rng = None if seed is None else random.Random(seed)
        said: dict[str, Any] = {"ends": [], "errors": [], "dropped": 0}
        try:
            for _ in range(count):
                found, aborted = self._hear(rng, said) if self.here.rank == 0 else ([], [])
                new, aborted = self.group.broadcast(([(each["rid"], each["seed"]) for each in found], aborted))
                self.seeds = getattr(self, "seeds", {}) | dict(new)
                for number, (rid, _) in enumerate(new):
                    self.caster.submit(rid, found[number]["features"] if self.here.rank == 0 else None)
                del found
                self.cancel(*aborted)
                said["ends"] += self.step(0.001).items()
                self._let_go(rng)
        except shmcast.GroupError:
            said["ends"] += self._close_caster()
        return said

    def _hear(self, rng: random.Random | None, said: dict[str, Any]) -> tuple[list[Any], list[str]]:
        from shmcast.channels import zmq

        found = []
        while len(found) < EACH_ROUND and self.socket.poll(0):
            try:
                message = zmq.recv(self.socket)
            except shmcast.ShmcastError as error:
                said["errors"].append(type(error).__name__)
                continue
            if rng is not None and rng.random() < 0.05:
                said["dropped"] += 1
            else:
                found.append(message)
        names = [*self.caster.pending, *[message["rid"] for message in found]]
        return found, [name for name in names if rng is not None and rng.random() < 0.05]

    def _let_go(self, rng: random.Random | None) -> None:
        """Of some that are held, which have to be right to the last."""
        for rid in [rid for rid in self.held if rng is None or rng.random() < 0.3]:
            if not is_right(self.held.pop(rid)):
                self.wrong.append(rid)

    def _close_caster(self) -> list[tuple[str, Any]]:
        ends = self._ends(self.caster.close())
        lost = {rid for rid, end in ends.items() if isinstance(end, tuple) and end[0] != "MaterializeError"}
        return [(rid, "lost" if rid in lost else end) for rid, end in ends.items()]  # each rank has a text of its own

    def rejoin(self, store: str) -> list[tuple[str, Any]]:
        """What has become of what was pending."""
        ends = self._close_caster()
        super().rejoin(store)
        return ends

    def all_right(self) -> list[str]:
        """Drop everything; what was not right."""
        self._let_go(None)
        return self.wrong


class World:
    """The processes of the test, and what has become of its requests."""

    def __init__(self, crew: Crew, rng: random.Random) -> None:
        self.crew, self.rng = crew, rng
        self.address = crew.address()
        self.ranks = crew.ranks(4, Busy, self.address)
        self.tokenizers = [self._tokenizer() for _ in range(2)]
        ready(*self.ranks, *self.tokenizers)
        self.requests = 0
        self.ends: collections.Counter[str] = collections.Counter()
        self.killed: collections.Counter[str] = collections.Counter()
        self.round_s = 0.05

    def round(self, victim: str) -> None:
        """Requests, and while they are under way a death."""
        rng = self.rng
        for tokenizer in self.tokenizers:
            tokenizer.tell("work", [self._request() for _ in range(EACH_ROUND)])
        self._tell_ranks(rng.randrange(4, 12), rng.randrange(1 << 30))
        began = time.monotonic()
        died = None if victim == "nobody" else self._kill(victim, rng.random() * self.round_s)
        self._hear_ranks()
        self.round_s = (self.round_s + time.monotonic() - began) / 2
        for tokenizer in self.tokenizers:
            if tokenizer is not died:
                assert tokenizer.receive() is None
        if rng.random() < 0.5:
            shmcast.sweep()
        if died in self.tokenizers:
            self.tokenizers[self.tokenizers.index(died)] = new = self._tokenizer()
            ready(new)
        elif died is not None:
            self._renew(self.ranks.index(died))

    def settle(self) -> None:
        """Until all that was sent before has come to its end."""
        last = {f"last of {which}" for which in range(len(self.tokenizers))}
        for rid, tokenizer in zip(sorted(last), self.tokenizers, strict=True):
            assert tokenizer.ask("work", [(rid, 1, "raises", 1)]) is None
        while last:
            self._tell_ranks(4, None)
            last -= {rid for rid, _ in self._hear_ranks()}

    def _tokenizer(self) -> Worker:
        return self.crew.start(Restless, self.address, "32MiB", 0.5)

    def _request(self) -> tuple[str, int, str, int]:
        how = self.rng.choices(("good", "raises", "dropped", "garbage"), (16, 2, 2, 1))[0]
        copies = self.rng.choice((1, 1, 1, 3)) if how == "good" else 1
        self.requests += copies
        return f"r{self.requests}", self.rng.randrange(1 << 30), how, copies

    def _kill(self, victim: str, after_s: float) -> Worker:
        if victim == "tokenizer":
            died = self.rng.choice(self.tokenizers)
        else:
            died = self.ranks[0 if victim == "rank 0" else self.rng.randrange(1, len(self.ranks))]
        time.sleep(after_s)  # nobody waits for anything by that: it is the random moment
        died.kill()
        self.killed[victim] += 1
        return died

    def _tell_ranks(self, count: int, seed: int | None) -> None:
        for rank in self.ranks:
            rank.tell("iterate", count, seed)

    def _hear_ranks(self) -> list[tuple[str, Any]]:
        """What the ranks that live say, which is the same."""
        said = [rank.receive() for rank in self.ranks if rank.alive]
        for each in said:
            self.ends.update(each["errors"])
            self.ends["dropped by rank 0"] += each["dropped"]
        return self._count([each["ends"] for each in said])

    def _count(self, ends: list[list[tuple[str, Any]]]) -> list[tuple[str, Any]]:
        assert all(each == ends[0] for each in ends), ends
        for _, end in ends[0]:
            self.ends[end[0] if isinstance(end, tuple) else str(end)] += 1
        return ends[0]

    def _renew(self, dead: int) -> None:
        store = self.crew.path("store")
        others = [rank for rank in self.ranks if rank.alive]
        self.ranks[dead] = self.crew._start(Busy, (store, dead, len(self.ranks)), (self.address,))
        self._count(together(others, "rejoin", store))
        ready(self.ranks[dead])


@pytest.mark.watchdog(400)
def test_a_thousand_requests(crew: Crew, namespace: str, seed: int) -> None:
    """Dropped, aborted and damaged, and processes killed, at random moments: the ranks that live have the same outcomes in
    the same order, what they hold is right, and nothing is left."""
    rng = random.Random(seed)
    world = World(crew, rng)
    while world.requests < REQUESTS:
        for victim in rng.sample(VICTIMS, len(VICTIMS)):
            world.round(victim)
    world.settle()
    assert together(world.ranks, "all_right") == [[]] * 4
    for tokenizer in world.tokenizers:
        assert tokenizer.ask("work", []) is None
        assert tokenizer.ask("wait_for_all") == 0
    assert world.ranks[0].ask("counts")["slots"] == 0
    shmcast.sweep()
    assert len({name.split(".")[2] for name in segments_of(namespace)}) == 3  # of those that live
    print(f"{world.requests} requests: {dict(world.ends)}; killed: {dict(world.killed)}")
    assert world.ends["True"] > REQUESTS / 2
    assert world.ends["False"] == 0
    for end in ("cancelled", "MaterializeError", "lost", "dropped by rank 0", "HandleError"):
        assert world.ends[end] > 0, world.ends
    assert min(world.killed.values()) > 2 and len(world.killed) == 3
