"""Casters of several ranks: the same outcomes everywhere, over every channel, whatever fails, hangs or is cancelled."""

from __future__ import annotations

import contextlib
import hashlib
import random
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest

import shmcast
from makers import LONG_S, MIB, Maker, Mixed, all_ready, digest_of
from ranks import Patched, Rank, Ranks, in_use, settle, together
from shmcast import BackpressureError, Caster, GroupError, HandleError, caster, codec, process

pytestmark = pytest.mark.torch

CHANNELS = ["auto", "group", "object"]
over_each_channel = pytest.mark.parametrize("channel", CHANNELS)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(4) as started:
        yield started


def make_group(here: Rank, channel: str, **options: Any) -> shmcast.Group:
    """ "object": as where the ranks share no memory."""
    options = {"max_bytes": "64MiB", **options}
    if channel != "object":
        return shmcast.Group(here.group, channel=channel, **options)
    refuse = here.rank == here.size - 1
    with Patched(process, "join", _no_memory) if refuse else Patched(), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        group = shmcast.Group(here.group, fallback="object", **options)
    assert group.mode == "object"
    return group


def _no_memory(key: Any) -> Any:
    raise shmcast.ArenaGoneError(2, "there is no such arena (says the test)")


def told(outcome: shmcast.Outcome) -> Any:
    """All of an outcome that can be compared between processes."""
    error = outcome.error
    if error is not None:
        return repr(outcome.rid), type(error).__name__, str(error), getattr(error, "traceback", "")
    return repr(outcome.rid), outcome.cancelled, digest_of(outcome.value)


def all_the_same(answers: list[Any]) -> Any:
    for rank, answer in enumerate(answers):
        assert answer == answers[0], f"rank {rank} differs from rank 0"
    return answers[0]


# ---- what every rank gets


def batch(here: Rank, channel: str, entry: int) -> list[Any]:
    found = []
    with make_group(here, channel, entry=entry) as group, Caster(group, Maker()) as caster:
        requests = [("a", 100_000), (("b", 2), None), ("c", "bad"), (4, 0), ("big", 3 * MIB)]
        mine = requests if here.rank == entry else [(rid, "ignored") for rid, _ in requests]
        found += [told(outcome) for outcome in caster.cast(mine)]
        assert group.step == 1
        for rid, raw in requests:
            caster.submit(rid, raw if here.rank == entry else None)
        if here.rank == entry:
            all_ready(caster, len(requests))
        assert caster.pending == tuple(rid for rid, _ in requests)
        found += sorted(told(outcome) for outcome in caster.step())
        assert caster.step() == []
        assert group.step == 2
        settle(here, group)
        if group.arena is not None:
            assert in_use(group.arena) == 0
    return found


MEMBERS = [((0, 1, 2, 3), 0), ((0, 1, 2), 2), ((1,), 0)]


@pytest.mark.parametrize(
    ("channel", "members", "entry"),
    [(channel, *each) for channel in CHANNELS for each in MEMBERS if channel != "object" or len(each[0]) > 1],
)
def test_every_rank_gets_the_same(ranks: Ranks, channel: str, members: tuple[int, ...], entry: int) -> None:
    found = all_the_same(ranks.run(batch, channel, entry, ranks=members))
    assert found[1] == ("('b', 2)", False, None)
    assert found[2][1:3] == ("MaterializeError", "materialize request 'c': LookupError: bad")
    assert "in __call__" in found[2][3]


# ---- many requests


def many(here: Rank, channel: str, seed: int, count: int, by: str) -> tuple[str, dict[str, int]]:
    lockstep = random.Random(seed)  # what all ranks do alike
    mixed = Mixed(seed)
    outcomes: list[Any] = []
    counts = {"ok": 0, "failed": 0, "cancelled": 0}
    kept: list[shmcast.Outcome] = []
    options: dict[str, Any] = {"max_inflight_bytes": "2MiB", "max_pending": 200, "workers": 3, "on_full": "block"}
    with make_group(here, channel) as group, Caster(group, mixed, **options) as caster:
        mixed.caster = caster if group.rank == group.entry else None
        with cancelling(caster, mixed, count) as cancel:
            submitted = 0
            while submitted < count or caster.pending:
                for _ in range(min(lockstep.randrange(30), count - submitted)):
                    caster.submit(submitted, submitted)
                    cancel(submitted, "at once")
                    submitted += 1
                arrived = ride_along(here, group, caster, cancel, by) if by else walk(caster, cancel)
                for outcome in arrived:
                    counts[mixed.check(outcome)] += 1
                    outcomes.append(told(outcome))
                    cancel(outcome.rid, "delivered")
                # As long as their requests live, and they do for some time.
                kept = [each for each in kept + arrived if lockstep.random() < 0.5]
                del arrived
                outcome = None
            kept.clear()
        # What is being materialized for nobody ends before the memory is looked at.
        caster.close()
        if caster._intake is not None:
            assert caster._intake._pool.join(LONG_S)
            assert caster._intake.inflight_bytes == 0
        assert len(outcomes) == count
        settle(here, group)
        if group.arena is not None:
            assert in_use(group.arena) == 0
    return hashlib.sha256(repr(outcomes).encode()).hexdigest(), counts


@contextlib.contextmanager
def cancelling(caster: Caster, mixed: Mixed, count: int) -> Iterator[Any]:
    """Cancels what is to be cancelled then; and a thread that does so whenever it likes."""
    stop = threading.Event()

    def by_another_thread() -> None:
        chosen = [number for number in range(count) if mixed.cancel_when(number) == "by another thread"]
        while not stop.is_set():
            for number in chosen:
                caster.cancel(number)
            caster.cancel(lambda rid: mixed.cancel_when(rid) == "by another thread")

    def cancel(number: int | None, when: str) -> None:
        if number is not None:
            if mixed.cancel_when(number) == when:
                caster.cancel(number)
            return
        caster.cancel(lambda rid: mixed.cancel_when(rid) == when)

    thread = threading.Thread(target=by_another_thread)
    if caster._intake is not None:
        thread.start()
    try:
        yield cancel
    finally:
        stop.set()
        if caster._intake is not None:
            thread.join()


def walk(caster: Caster, cancel: Any) -> list[shmcast.Outcome]:
    cancel(None, "before a step")
    if caster._intake is not None:
        for serial, request in list(caster._intake._ready.items()):
            assert serial == request.rid
            cancel(serial, "ready")
    return caster.step(0.005)


def ride_along(here: Rank, group: shmcast.Group, caster: Caster, cancel: Any, by: str) -> list[shmcast.Outcome]:
    """In a broadcast that is made anyway."""
    cancel(None, "before a step")
    blob = b""
    if caster._intake is not None:
        caster._intake.wait(0.0)
        blob = caster.collect()
        cancel(None, "in a message")
    return caster.apply(group.broadcast(blob) if by == "the group" else torch_broadcast(here, blob))


@over_each_channel
@pytest.mark.parametrize("by", ["", "the group", "torch"], ids=["step", "apply", "apply-torch"])
@pytest.mark.watchdog(400)
def test_two_thousand_requests(ranks: Ranks, seed: int, channel: str, by: str) -> None:
    count = 2000
    _, counts = all_the_same(ranks.run(many, channel, seed % 1000, count, by))
    assert sum(counts.values()) == count
    assert counts["failed"] > count // 50
    assert counts["cancelled"] > count // 100


# ---- one rank that can not


def attach_fails(here: Rank, where: int) -> list[Any]:
    from shmcast.attach import attach

    def sometimes(handle: Any, **options: Any) -> Any:
        if shmcast.Handle.from_bytes(handle.to_bytes()).nbytes == 20_000:
            raise shmcast.StaleHandleError("gone (says the test)")
        return attach(handle, **options)

    found = []
    with make_group(here, "auto") as group, Caster(group, Maker(), executor="inline") as caster:
        patch: AbstractContextManager[Any] = Patched()
        if here.rank == where:
            patch = Patched(codec, "attach", sometimes)
        for size in (10_000, 20_000, 30_000):
            caster.submit(size, size)
        with patch:
            found += [told(outcome) for outcome in caster.step()]
            found += [told(outcome) for outcome in caster.cast([("b", 20_000), ("c", None)])]
        found += [told(outcome) for outcome in caster.cast([("again", 20_000)])]
        settle(here, group)
        if group.arena is not None:
            assert in_use(group.arena) == 0
        together(here)
    return found


@pytest.mark.parametrize("where", [0, 2])
def test_what_one_rank_can_not_attach_fails_on_all(ranks: Ranks, where: int) -> None:
    first, failed, third, also, none, again = all_the_same(ranks.run(attach_fails, where))
    assert first[1] is third[1] is again[1] is none[1] is False
    for each in (failed, also):
        assert each[1] == "GroupError"
        assert f"rank {where} can not rebuild tree" in each[2]


# ---- ranks that do not do the same


def disagree(here: Rank, how: str) -> str:
    group = make_group(here, "auto")
    caster = Caster(group, Maker(), executor="inline")
    odd = here.rank == 1
    ids = ["a", "b"]
    if odd and how == "order":
        ids.reverse()
    if odd and how == "fewer":
        ids.pop()
    if odd and how == "more":
        ids.append("c")
    with pytest.raises(GroupError) as caught:
        for rid in ids:
            caster.submit(rid, None)
        if how == "skips a step":
            if not odd:
                caster.step()
            caster.submit("next", None)
        if odd and how == "casts":
            caster.cast([("c", None)])
        # The odd one knows at once, and so it is broken for all.
        for number in range(1_000_000):
            caster.step()
            caster.submit(number, None)
    # Nobody hangs, nothing stays.
    for outcome in caster.close():
        assert isinstance(outcome.error, GroupError)
    together(here)
    group.close()
    return str(caught.value)


def torch_broadcast(here: Rank, blob: bytes) -> bytes:
    import torch.distributed as dist

    box = [blob]
    dist.broadcast_object_list(box, here.ranks[0], here.group)
    return box[0]


DISAGREEMENTS = {
    "order": "rank 1: of the first 2 requests the ids are not the same here as on the entry rank",
    "fewer": "rank 1: 1 requests were submitted here so far, 2 on the entry rank",
    "more": "rank 1: 3 requests were submitted here so far, 2 on the entry rank",
    "skips a step": "rank 1: 3 requests were submitted here so far, 2 on the entry rank",
    "casts": "rank 1: the entry rank is in step(), this rank in cast()",
}


@pytest.mark.parametrize("how", DISAGREEMENTS)
def test_a_rank_that_does_something_else_says_so(ranks: Ranks, how: str) -> None:
    entry, odd, other = ranks.run(disagree, how, ranks=(0, 1, 2))
    assert DISAGREEMENTS[how] in odd
    for said in (entry, other):
        # ... or another one that has noticed that already
        assert re.search("ranks? (0, )?1(, 2)? closed the group or gave it up before", said)


def garbage_once(here: Rank) -> list[Any]:
    with make_group(here, "auto") as group, Caster(group, Maker(), executor="inline") as caster:
        caster.submit("a", 5000)
        blob = torch_broadcast(here, caster.collect() if here.rank == 0 else b"")
        if here.rank == 1:
            for changed in (blob[:-1], blob[:40] + b"?" + blob[41:], b"", b"nonsense"):
                if changed:
                    with pytest.raises(HandleError):
                        caster.apply(changed)
            caster.submit("early", None)
        found = [told(outcome) for outcome in caster.apply(blob)]
        if here.rank != 1:
            caster.submit("early", None)
        return found + [told(outcome) for outcome in caster.step()]


def test_garbage_changes_nothing(ranks: Ranks) -> None:
    # ... and what was submitted after the blob was made does not count for it
    assert len(all_the_same(ranks.run(garbage_once))) == 2


def rank_that_never_comes(here: Rank) -> str:
    group = make_group(here, "auto", timeout=0.5)
    caster = Caster(group, Maker(), executor="inline")
    caster.submit("a", 100_000)
    said = ""
    if here.rank != 1:
        with pytest.raises(GroupError) as caught:
            caster.step()
        said = str(caught.value)
        (outcome,) = caster.close()
        assert isinstance(outcome.error, GroupError)
    together(here)
    if here.rank == 1:
        with pytest.raises(GroupError):
            caster.step()
        (outcome,) = caster.close()
        assert isinstance(outcome.error, GroupError)
    together(here)
    group.close()
    return said


def test_a_rank_that_never_comes_is_named(ranks: Ranks) -> None:
    entry, _, other = ranks.run(rank_that_never_comes, ranks=(0, 1, 2))
    for said in (entry, other):
        assert "rank 1 is at step 0" in said


# ---- limits, timeouts, the end


def limits(here: Rank, channel: str) -> list[Any]:
    found: list[Any] = []
    maker = Maker()
    with make_group(here, channel) as group:
        caster = Caster(group, maker, max_pending=3, max_inflight_bytes=1000, workers=1)
        caster.submit("hangs", maker.gate("hangs"), timeout=LONG_S)
        caster.submit("queued", b"x" * 1000)
        found += [told(outcome) for outcome in caster.step()]
        # What is in flight on the entry rank all ranks know from that message.
        found.append(refused(caster))
        caster.cancel("queued")
        found += [told(outcome) for outcome in caster.step()]
        caster.submit("fits", None)
        caster.submit("just fits", None)
        found.append(refused(caster))
        found += [told(outcome) for outcome in caster.step()]
        caster.submit("large", b"x" * 2000)
        if here.rank == 0:
            all_ready(caster, 1)
        found += [told(outcome) for outcome in caster.step()]
        caster.submit("none", None)
        found += [told(outcome) for outcome in caster.close(wait=False)]
        assert caster.pending == ()
        with pytest.raises(GroupError, match="closed"):
            caster.submit("more", None)
        maker.open_all()
        if caster._intake is not None:
            assert caster._intake._pool.join(LONG_S)
        settle(here, group)
        if here.rank == 0:  # though every rank has refused them
            assert shmcast.metrics.snapshot(group)["counters"]["backpressure_raised"] == 2
        together(here)
    return found


def refused(caster: Caster) -> str:
    before = caster.pending
    with pytest.raises(BackpressureError) as caught:
        caster.submit("more", None)
    assert caster.pending == before
    return str(caught.value)


@over_each_channel
def test_limits_and_the_end_are_alike(ranks: Ranks, channel: str) -> None:
    found = all_the_same(ranks.run(limits, channel, ranks=(0, 1, 2)))
    assert found[0] == "submit 'more': 1005 bytes are in flight, max_inflight_bytes is 1000 bytes"
    assert found[1] == ("'queued'", True, None)
    assert found[2] == "submit 'more': 3 requests are pending, max_pending is 3"
    assert found[3:5] == [("'fits'", False, None), ("'just fits'", False, None)]
    assert "2000 bytes (2.0 KiB) of raw data are more than max_inflight_bytes" in found[5][2]
    assert {each[0] for each in found[6:]} == {"'hangs'", "'none'"}


def hangs(here: Rank, channel: str) -> list[Any]:
    maker = Maker()
    with (
        Patched(caster, "_LONGEST_SILENCE_S", 0.05),
        Patched(caster, "_HUNG_S", 0.2),
        make_group(here, channel) as group,
    ):
        first = Caster(group, maker, workers=1, timeout=0.1)
        found = [told(each) for each in first.cast([("hangs", maker.gate("hangs")), ("good", 5000)])]
        # It took longer than a rank would have to hear nothing.
        assert group.step > 1
        assert first.close() == []
        second = Caster(group, maker, workers=1)
        second.submit("hangs for ever", maker.gate("more"))
        second.submit("behind", 1)
        found += [told(each) for each in second.close()]
        maker.open_all()
        for each in (first, second):
            if each._intake is not None:
                assert each._intake._pool.join(LONG_S)
        maker.join_all()
        settle(here, group)
        if group.arena is not None:
            assert in_use(group.arena) == 0
    return found


@over_each_channel
def test_what_hangs_stops_nobody(ranks: Ranks, channel: str) -> None:
    found = all_the_same(ranks.run(hangs, channel, ranks=(0, 1, 2)))
    assert "TimeoutError: not materialized within 0.1 s" in found[0][2]
    assert found[1][1] is False
    for each in found[2:]:
        assert "nothing was materialized for 0.2 s, and the caster is being closed" in each[2]


def closes(here: Rank, wait: bool, cancel_pending: bool) -> tuple[int, list[Any]]:
    maker = Maker()
    with make_group(here, "auto") as group:
        caster = Caster(group, maker, workers=1)
        caster.submit("ready", 50_000)
        if here.rank == 0:
            all_ready(caster)
        caster.submit("running", maker.gate("running", MIB))
        caster.submit("queued", 5)
        if here.rank == 0 and wait and not cancel_pending:
            assert maker.begun("running")
            threading.Timer(0.0, maker.open_all).start()
        found = [told(outcome) for outcome in caster.close(wait, cancel_pending)]
        steps = group.step
        maker.open_all()
        if caster._intake is not None:
            assert caster._intake._pool.join(LONG_S)
        settle(here, group)
        if group.arena is not None:
            assert in_use(group.arena) == 0
    return steps, found


@pytest.mark.parametrize(("wait", "cancel_pending"), [(True, False), (False, False), (True, True), (False, True)])
def test_close_ends_in_the_same_step(ranks: Ranks, wait: bool, cancel_pending: bool) -> None:
    steps, found = all_the_same(ranks.run(closes, wait, cancel_pending, ranks=(0, 1, 2)))
    ready, running, queued = found
    assert ready[1] is cancel_pending
    if cancel_pending:
        assert running[1] is queued[1] is True
        assert steps == 1
    elif wait:
        assert running[1] is queued[1] is False
    else:
        assert "closed before it was materialized" in running[2]
        assert "closed before it was materialized" in queued[2]
        assert steps == 1


def nothing_to_send(here: Rank, channel: str) -> dict[str, int]:
    with make_group(here, channel) as group, Caster(group, Maker()) as caster:
        for _ in range(100):
            assert caster.step() == []
            assert caster.apply(b"") == []
        together(here)
        return group.stats()


@over_each_channel
def test_with_nothing_pending_nothing_is_sent(ranks: Ranks, channel: str) -> None:
    for stats in ranks.run(nothing_to_send, channel):
        assert stats["messages"] == 0
        assert stats["step"] == 0


# ---- a rank that dies


def dies(here: Rank, last: int) -> list[str]:
    maker = Maker()
    group = make_group(here, "auto", timeout=LONG_S)
    caster = Caster(group, maker, workers=1)
    (outcome,) = caster.cast([("kept", 100_000)])
    here.parent.send("ready")
    assert here.parent.receive() == "go"
    if here.rank == last:
        here.parent.receive()
    said = []
    with pytest.raises(GroupError) as caught:
        caster.cast([("a", 100_000), ("b", 100_000)])
    said.append(type(caught.value).__name__)
    caster_outcomes = caster.close()
    said += [type(each.error).__name__ for each in caster_outcomes]
    assert (outcome.value["x"] == 100_000 % 251).all()
    arena = group.arena
    group.close()
    if arena is not None:
        assert arena.closed
    return said


def test_a_rank_that_dies_hangs_nobody() -> None:
    with Ranks(3) as own:
        children = own.start(dies, 2)
        for child in children:
            assert child.receive() == "ready"
        children[2].kill()
        for child in children[:2]:
            child.send("go")
        answers = [child.receive() for child in children[:2]]
        own._usable = False
        for kind, said in answers:
            assert kind == "done", said
            assert said[0] in ("PeerLostError", "GroupError")
            assert len(said) == 3
