"""All parts of a caster together: the cache, worker processes and modes, whatever is cancelled, switched or crashes meanwhile."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import jobs
import mixing
import shmcast
from makers import LONG_S, Maker, all_ready, free, outcomes_of
from ranks import Rank, Ranks, in_use, settle, together
from shmcast import Caster, GroupError, metrics
from test_caster_ranks import all_the_same, make_group, ride_along

WAYS = ["shm", "object", "raw", "replicate"]
MODES = [f"{way}{when}" for way in WAYS for when in ("-sync", "")]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(3) as started:
        yield started


def told(outcome: shmcast.Outcome) -> Any:
    """What is the same of an outcome on all ranks; not which of equal ones was tried."""
    error = outcome.error
    return outcome.rid, outcome.cancelled, "" if error is None else f"{type(error).__name__} {error}"


@contextlib.contextmanager
def switching(caster: Caster, seed: int) -> Iterator[None]:
    """From another thread: every mode, and mostly the one that a cache counts for."""
    stop = threading.Event()

    def switch() -> None:
        dice = random.Random(seed)
        while not stop.wait(0.005):
            caster.switch(dice.choice(["shm", "shm-sync", *MODES]) + dice.choice(["", "", "", ":50%"]))
            caster.switch("shm" if dice.random() < 0.5 else caster.mode)

    thread = threading.Thread(target=switch)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def everything(here: Rank, channel: str, executor: Any, seed: int, count: int, by: str) -> tuple[str, dict[str, int]]:
    dice = random.Random(seed)  # the same on all ranks
    own = random.Random(seed + here.rank)
    keys = [int(60 * dice.random() ** 2) for _ in range(count)]
    counts = {"ok": 0, "failed": 0, "cancelled": 0}
    digest = hashlib.sha256()
    kept: list[shmcast.Outcome] = []
    used: list[tuple[int, int]] = []
    options: dict[str, Any] = {"max_inflight_bytes": "4MiB", "max_pending": 200, "workers": 2, "on_full": "block"}
    with make_group(here, channel, max_bytes="16MiB", entry=1) as group:
        caster = Caster(
            group, mixing.by_key, executor=executor, raw_everywhere=True, inline_bytes=20_000, cache_bytes="1MiB",
            cache_entries=20, block_timeout=0.01, **options,
        )  # fmt: skip
        with caster, switching(caster, seed):
            submitted = 0

            def take(arrived: list[shmcast.Outcome]) -> None:
                nonlocal kept
                for outcome in arrived:
                    if isinstance(outcome.error, shmcast.BackpressureError):
                        counts["shed"] = counts.get("shed", 0) + 1
                    else:
                        counts[mixing.check(keys[outcome.rid], outcome)] += 1
                    digest.update(repr(told(outcome)).encode())
                kept = [each for each in kept + arrived if own.random() < 0.5]

            while submitted < count or caster.pending:
                for _ in range(min(dice.randrange(30), count - submitted)):
                    caster.submit(submitted, {"key": keys[submitted]}, timeout=dice.choice([None, LONG_S]))
                    if own.random() < 0.1:
                        caster.cancel(submitted)
                    submitted += 1
                if own.random() < 0.3:
                    caster.cancel(lambda rid: own.random() < 0.1)
                if dice.random() < 0.1:
                    batch = range(submitted, min(submitted + 5, count))
                    submitted += len(batch)
                    take(caster.cast([(number, {"key": keys[number]}) for number in batch]))
                elif by:
                    take(ride_along(here, group, caster, lambda *_: None, by))
                else:
                    take(caster.step(0.01))
                if len(used) < submitted // (count // 4):
                    used.append((threading.active_count(), len(os.listdir("/proc/self/fd"))))
        assert sum(counts.values()) == count
        kept.clear()
        if caster._intake is not None:
            assert caster._intake.inflight_bytes == caster._intake.unfinished == 0
            assert caster._intake._desk._flights == {}
            found = metrics.snapshot(group)["counters"]
            assert found["requests"] == count
            assert found["outcomes_ok"] == counts["ok"]
            assert found["outcomes_cancelled"] == counts["cancelled"]
            assert found["outcomes_failed"] == counts["failed"] + counts.get("shed", 0)
            assert sum(found[f"mode_{way}"] for way in WAYS) == count
            asked = sum(found[f"cache_{what}"] for what in ("hits", "misses", "joined", "keyless"))
            assert 0 < asked <= found["mode_shm"]
            assert found["cache_hits"] > 0, found
            print(counts, found)
        for pool in (
            caster._replicas._pool,
            *(() if caster._intake is None else (caster._intake._pool, caster._intake._clerk)),
        ):
            assert pool is None or pool.join(LONG_S)
        settle(here, group)
        if group.arena is not None:
            assert in_use(group.arena) == 0
        assert used[-1][0] <= used[0][0] + 8, used
        assert used[-1][1] <= used[0][1] + 8, used
        together(here)
    return digest.hexdigest(), counts


@pytest.mark.torch
@pytest.mark.parametrize("executor", ["thread", "process", "inline"])
@pytest.mark.parametrize("channel", ["auto", "object"])
@pytest.mark.parametrize("by", ["", "the group"], ids=["step", "apply"])
@pytest.mark.watchdog(300)
def test_everything_at_once(ranks: Ranks, channel: str, executor: str, by: str, seed: int) -> None:
    count = 600
    _, counts = all_the_same(ranks.run(everything, channel, executor, seed % 1000, count, by))
    assert min(counts[end] for end in ("ok", "failed", "cancelled")) > 0, counts


# ---- equal ones, of which one ends its worker, or does not end


@pytest.mark.parametrize("how", ["crash", "hang"])
def test_who_waits_goes_on_when_a_worker_is_lost(namespace: str, tmp_path: Path, how: str) -> None:
    """And is answered by what the next one has made."""
    raw = {"key": 5, "path": str(tmp_path / "there"), "how": how}
    with (
        shmcast.Group(max_bytes="16MiB") as group,
        Caster(group, mixing.lost_once, executor="process", workers=1, cache_bytes="1MiB", inline_bytes=0) as caster,
    ):
        for number in range(6):
            caster.submit(number, dict(raw), timeout=LONG_S if number == 0 else None)
        caster.cancel(5)
        found: dict[Any, shmcast.Outcome] = {}
        while not os.path.exists(raw["path"]):
            found |= {outcome.rid: outcome for outcome in caster.step(0.01)}
        if how == "hang":
            assert caster._intake is not None
            caster._intake._running[0].deadline = 0.0  # its time is over, says the test
        caster.switch("raw")  # which changes nothing for those
        found |= {outcome.rid: outcome for outcome in free(caster)}
        caster.switch("shm")
        found |= {outcome.rid: outcome for outcome in caster.cast([("again", raw)])}
        assert found[5].cancelled
        error = found[0].error
        assert isinstance(error, shmcast.MaterializeError)
        assert error.kind == ("TimeoutError" if how == "hang" else "WorkerLostError")
        for rid in (1, 2, 3, 4, "again"):
            assert mixing.check(5, found[rid]) == "ok"
        counters = metrics.snapshot(group)["counters"]
        assert (counters["workers_started"], counters["workers_lost"], counters["cache_misses"]) == (2, 1, 1)
        assert counters["cache_hits"] == 1
        found.clear()
        caster.close()
        assert group.arena is not None
        assert in_use(group.arena) == 0


# ---- a rank is killed


def killed(here: Rank, victim: int, seed: int) -> tuple[list[Any], str]:
    dice = random.Random(seed)
    last = dice.randrange(3, 10)
    group = make_group(here, "auto", timeout=LONG_S)
    options: dict[str, Any] = {"executor": "process", "workers": 2, "cache_bytes": "1MiB", "inline_bytes": 5000}
    caster = Caster(group, mixing.by_key, raw_everywhere=True, **options)
    if caster._intake is not None:
        here.parent.send(jobs.pids_of(caster))
    found = []
    submitted = steps = 0
    while submitted < 100 or caster.pending:
        caster.switch(dice.choice(["shm", *MODES]))
        for _ in range(min(dice.randrange(8), 100 - submitted)):
            caster.submit(submitted, {"key": submitted % 6})
            submitted += 1
        if here.rank == victim and steps == last:
            os.kill(os.getpid(), signal.SIGKILL)
        for outcome in caster.step(0.005):
            assert mixing.check(outcome.rid % 6, outcome) == "ok"
            found.append(outcome.rid)
        steps += 1
    why = type(caster.alone).__name__
    assert caster.close() == []
    group.close()
    return sorted(found), why


@pytest.mark.torch
@pytest.mark.parametrize("victim", [0, 2])
def test_all_go_on_without_a_rank_and_its_workers(namespace: str, victim: int, seed: int) -> None:
    with Ranks(3) as own:
        children = own.start(killed, victim, seed)
        own._usable = False
        fds = [os.pidfd_open(pid) for pid in children[0].receive()]
        for rank, child in enumerate(children):
            if rank != victim:
                kind, (found, why) = child.receive()
                assert kind == "done"
                assert found == list(range(100))
                assert why in ("PeerLostError", "GroupError")
        try:
            assert all(map(jobs.ended, fds))
        finally:
            for fd in fds:
                os.close(fd)
        shmcast.sweep()  # what the entry rank has left, if that is who died


# ---- arguments


def wrong(here: Rank, options: dict[str, Any]) -> str:
    """Whether all ranks go on together afterwards, and with what they have told of the arguments."""
    with make_group(here, "auto") as group:
        try:
            Caster(group, mixing.by_key, **options)
        except (ValueError, TypeError) as error:
            said = f"{type(error).__name__}: {error}"
        else:
            said = "nothing"
        with Caster(group, mixing.by_key, inline_bytes=0) as caster:
            assert mixing.check(1, caster.cast([(1, {"key": 1})])[0]) == "ok"
        return said


@pytest.mark.torch
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"inline_bytes": "some"}, "ValueError: inline_bytes: 'some' is not a size"),
        ({"inline_bytes": 1.5}, "TypeError: inline_bytes: a number of bytes"),
        ({"hash": "md5"}, "ValueError: hash is True, False"),
        ({"workers": 1.5}, "TypeError: workers: a number of threads or processes, or None, not 1.5"),
        ({"workers": True, "executor": "process"}, "TypeError: workers"),
        ({"workers": "2"}, "TypeError: workers"),
        ({"mode": "shm:101%"}, "ValueError: mode 'shm:101%'"),
        ({"cache_entries": 0}, "ValueError: cache_entries=0"),
    ],
)
def test_what_is_wrong_is_wrong_on_all_ranks(ranks: Ranks, options: dict[str, Any], text: str) -> None:
    """On one alone the others would wait for it in their first step."""
    assert all_the_same(ranks.run(wrong, options)).startswith(text)


def test_a_caster_that_could_not_be_made_leaves_nothing(namespace: str, tmp_path: Path) -> None:
    path = tmp_path / "there"
    path.touch()
    with shmcast.Group(max_bytes="16MiB") as group:
        assert group.arena is not None
        with pytest.raises(RuntimeError, match="FileExistsError"):
            Caster(group, jobs.Fragile(str(path)), executor="process", workers=1, cache_bytes="1MiB")
        assert group.arena._givers == ()  # whom it asks for room


# ---- limits


@pytest.mark.parametrize("way", ["inline", "replicate", "results"])
def test_block_does_not_wait_for_what_only_a_message_changes(namespace: str, way: str) -> None:
    """All ranks would wait with it, and in vain."""
    options: dict[str, Any] = {
        "inline": {"executor": "inline", "max_pending": 1},
        "replicate": {"mode": "replicate", "raw_everywhere": True, "max_inflight_bytes": 1000},
        "results": {"max_inflight_bytes": 1000, "workers": 1},
    }[way]
    raw = b"x" * 900 if way == "replicate" else 900
    with (
        shmcast.Group(max_bytes="16MiB") as group,
        Caster(group, Maker(), on_full="block", block_timeout=LONG_S, inline_bytes=0, **options) as caster,
    ):
        assert caster.step() == []  # this is the thread that steps
        caster.submit("a", 2000 if way == "results" else raw)
        if way == "results":
            all_ready(caster)
        caster.submit("b", b"x" * 900 if way == "results" else raw)
        assert metrics.snapshot(group)["counters"]["backpressure_waits"] == 0
        caster.cancel(lambda rid: True)
        assert {outcome.rid: outcome.cancelled for outcome in free(caster)} == {"a": True, "b": True}


def test_block_waits_for_the_step_of_another_thread(namespace: str) -> None:
    options: dict[str, Any] = {"on_full": "block", "block_timeout": LONG_S, "executor": "inline"}
    with shmcast.Group(max_bytes="16MiB") as group, Caster(group, Maker(), max_pending=1, **options) as caster:
        assert caster.step() == []
        caster.submit("a", 5)
        thread = threading.Thread(target=caster.submit, args=("b", 6))
        thread.start()
        found = free(caster)
        thread.join(LONG_S)
        found += free(caster)
        assert outcomes_of(found) == {"a": 5, "b": 6}


# ---- metrics


def test_a_request_that_goes_raw_is_no_materialization_of_the_entry_rank(namespace: str) -> None:
    with (
        shmcast.Group(max_bytes="16MiB") as group,
        Caster(group, Maker(), raw_everywhere=True, cache_bytes="1MiB", inline_bytes=0) as caster,
    ):
        for number, way in enumerate(WAYS):
            caster.switch(way)
            assert caster.cast([(number, 5000)])[0].ok
        caster.switch("shm")
        assert caster.cast([("again", 5000)])[0].ok
        seen = metrics.snapshot(group)
        assert seen["counters"]["cache_hits"] == 1
        assert seen["histograms"]["materialize_ns"]["count"] == 2  # as "shm", as "object"
        assert seen["histograms"]["replicas_ns"]["count"] == 2


# ---- the end, and one after the other


def ended(here: Rank, executor: Any, consensus: bool, seed: int) -> tuple[str, list[int]]:
    dice = random.Random(seed)
    digest = hashlib.sha256()
    counts = [0, 0, 0]
    with make_group(here, "auto", max_bytes="16MiB", entry=2, consensus=consensus) as group:
        for turn in range(8):
            caster = Caster(
                group,
                mixing.by_key,
                executor=executor,
                workers=2,
                raw_everywhere=True,
                cache_bytes="1MiB",
                inline_bytes=5000,
            )
            futures = shmcast.FutureCaster(caster)
            keys = [dice.randrange(12) for _ in range(60)]
            made = {}
            with switching(caster, seed + turn):
                for number, key in enumerate(keys):
                    if executor == "process" and key % 13 == 7:
                        key = keys[number] = 8  # worker processes take their time to come up
                    made[number] = futures.submit(number, {"key": key})
                    if dice.random() < 0.2:
                        futures.cancel(number)
                    if dice.random() < 0.1:
                        futures.step(0.001)
                if turn % 2:
                    futures.step(0.1)
                ends = [(True, False), (False, False), (True, True)][turn % 3]
                outcomes = futures.close(*ends)
            assert caster.pending == ()
            outcome = future = None
            for outcome in outcomes:
                if outcome.error is not None and "closed" in str(outcome.error):
                    assert not ends[0]
                else:
                    mixing.check(keys[outcome.rid], outcome)
            for number, future in made.items():
                assert future.done(), number
                kind = 2 if future.cancelled() else 1 if future.exception() is not None else 0
                counts[kind] += 1
                digest.update(f"{number} {kind}".encode())
            del outcomes, outcome, made, future
            if caster._intake is not None:
                gauges = metrics.snapshot(group)["gauges"]
                assert (
                    gauges["pending"]
                    == gauges["inflight_bytes"]
                    == gauges["cache_bytes"]
                    == gauges["cache_entries"]
                    == 0
                )
                for pool in (caster._intake._pool, caster._intake._clerk):
                    assert pool is None or pool.join(LONG_S)
            assert caster._replicas._pool is None or caster._replicas._pool.join(LONG_S)
        settle(here, group)
        if group.arena is not None:
            assert in_use(group.arena) == 0
            assert group.arena._givers == ()
        assert not any(thread.name.startswith("shmcast") for thread in threading.enumerate())
        together(here)
    return digest.hexdigest(), counts


@pytest.mark.torch
@pytest.mark.parametrize("executor", ["thread", "process", "inline"])
@pytest.mark.parametrize("consensus", [True, False])
@pytest.mark.watchdog(300)
def test_one_caster_after_the_other(ranks: Ranks, executor: str, consensus: bool, seed: int) -> None:
    _, counts = all_the_same(ranks.run(ended, executor, consensus, seed % 1000))
    assert sum(counts) == 8 * 60
    assert min(counts[0], counts[2]) > 0


# ---- interrupts


def interrupted(here: Rank, mode: str, where: int, raw_everywhere: bool, executor: Any) -> tuple[list[Any], str]:
    """One rank is interrupted while it takes in a message, and goes on all the same."""

    def materialize(raw: int) -> int:
        if raw == 1 and here.rank == where and not seen:
            seen.append(raw)
            raise KeyboardInterrupt
        return raw

    seen: list[int] = []
    found: list[shmcast.Outcome] = []
    said = ""
    with make_group(here, "auto", timeout=LONG_S) as group:
        caster = Caster(
            group, materialize, mode=mode, raw_everywhere=raw_everywhere, executor=executor, cache_bytes="1MiB"
        )
        for number in range(4):
            caster.submit(number, number)
        try:
            found += free(caster)
        except KeyboardInterrupt:
            assert here.rank == where
            together(here)
            try:
                found += free(caster)
            except GroupError as error:
                said = str(error)
        except GroupError as error:
            said = str(error)
            together(here)
        else:
            together(here)
        caster.submit(4, 4)
        try:
            found += free(caster)
        except GroupError as error:
            said = str(error)
        found += caster.close()
        assert sorted(outcome.rid for outcome in found) == list(range(5))
        assert bool(caster.alone) is raw_everywhere
        together(here)
    return [(outcome.rid, outcome.value) for outcome in found if here.rank == where], said


@pytest.mark.torch
@pytest.mark.parametrize("where", [0, 2])
@pytest.mark.parametrize("raw_everywhere", [True, False])
@pytest.mark.parametrize(("mode", "executor"), [("raw-sync", "thread"), ("raw-sync", "inline"), ("raw", "inline")])
def test_who_is_interrupted_in_a_message_does_not_go_on_with_the_others(
    ranks: Ranks, mode: str, executor: str, raw_everywhere: bool, where: int
) -> None:
    """It has no outcomes where they have some: all of them say so, or it makes its own."""
    answers = ranks.run(interrupted, mode, where, raw_everywhere, executor)
    if raw_everywhere:
        assert sorted(answers[where][0]) == [(number, number) for number in range(5)]
    else:
        assert "interrupted by KeyboardInterrupt" in answers[where][1]
        assert all("gave it up" in said for rank, (_, said) in enumerate(answers) if rank != where), answers


def test_close_ends_though_an_interrupt_has_kept_a_request_out(namespace: str) -> None:
    def interrupt(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with shmcast.Group(max_bytes="16MiB") as group:
        caster = Caster(group, Maker())
        assert caster._intake is not None
        caster._intake.admit, admit = interrupt, caster._intake.admit  # type: ignore[method-assign, assignment]
        with pytest.raises(KeyboardInterrupt):
            caster.submit("a", 5)
        caster._intake.admit = admit  # type: ignore[method-assign]
        caster.submit("b", 5)
        ends = {outcome.rid: outcome.ok for outcome in caster.close()}
        assert ends == {"a": False, "b": True}


# ---- forked children


@pytest.mark.parametrize("lock", ["caster", "intake"])
def test_a_forked_child_waits_for_no_lock(namespace: str, lock: str) -> None:
    """That a thread had when it was forked."""
    with shmcast.Group(max_bytes="16MiB") as group, Caster(group, Maker(), cache_bytes="1MiB") as caster:
        assert caster._intake is not None
        caster.submit("a", 5)
        with (caster if lock == "caster" else caster._intake)._lock:
            child = os.fork()
            if not child:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(10)
                refused = 0
                for call in (
                    lambda: caster.pending,
                    lambda: caster.submit("b", 6),
                    lambda: caster.cancel("a"),
                    caster.step,
                    caster.collect,
                    lambda: caster.cast([("c", 7)]),
                    lambda: caster.apply(b"no blob"),
                    caster.fileno,
                ):
                    try:
                        call()
                    except GroupError:
                        refused += 1
                caster.close()
                os._exit(refused)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 8
        assert outcomes_of(free(caster)) == {"a": 5}


# ---- cancelled at any moment


def test_a_batch_can_be_cancelled_as_soon_as_it_is_pending(namespace: str) -> None:
    maker = Maker()
    with shmcast.Group(max_bytes="16MiB") as group, Caster(group, maker, cache_bytes="1MiB", workers=2) as caster:
        intake = caster._intake
        assert intake is not None
        admit = intake.admit

        def cancel() -> None:
            while "b" not in caster.pending:
                pass
            caster.cancel("b")
            maker.open("gate")

        canceller = threading.Thread(target=cancel)

        def admitting(serial: int, *args: Any, **options: Any) -> None:
            if serial == 0:
                canceller.start()
                if not caster._lock.locked():
                    canceller.join()
            admit(serial, *args, **options)

        intake.admit = admitting  # type: ignore[method-assign, assignment]
        gate = maker.gate("gate")
        first, second = caster.cast([("a", 5), ("b", gate)])
        canceller.join()
        assert first.ok
        assert second.cancelled
