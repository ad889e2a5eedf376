"""`Caster` while photographs are being materialized on the entry rank: what a step takes beside a message that carries
nothing, over the same channel and under the same load; and what it costs where nothing has happened.

The two, and a broadcast of one small value, take turns. Before each one all ranks wait for each other, and rank 0 sleeps as
long as a short iteration of an engine takes, so every one finds the others asleep and the workers in the middle of something.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

import shmcast
from parts.board import Board
from parts.figures import MIB, median_us, p99_us
from parts.ranks import run_ranks
from tp import photos

TP = 4
WORKERS = (1, 2)
REQUESTS = 6  # different ones, again and again
PACE_S = 0.002
METHODS = ("bare", "broadcast", "step")
IDLE_CALLS = 2000


def materialize(raw: dict[str, Any], out: Callable[[tuple[int, ...], DTypeLike], NDArray[Any]]) -> list[NDArray[Any]]:
    """The patches of the photographs of one request, written where they are to lie."""
    return [photos.image_patches(image["base64"], image["max_pixels"], out)[0] for image in raw["images"]]


def make_requests() -> tuple[list[Any], list[list[int]]]:
    """Raw requests and what they become: hashes of their arrays."""
    sources = photos.load(None)
    raws = [photos.image_request(sources, [7, number]) for number in range(REQUESTS)]
    return raws, [_hashes(materialize(raw, np.empty)) for raw in raws]


def _hashes(arrays: list[Any]) -> list[int]:
    return [shmcast.hash128(array) for array in arrays]


class _Load:
    """What is pending: always one request more than there are workers."""

    def __init__(self, caster: shmcast.Caster, raws: list[Any] | None, digests: list[list[int]], wanted: int) -> None:
        """``raws``: None but on the entry rank."""
        self._caster, self._raws, self._digests, self._wanted = caster, raws, digests, wanted
        self._submitted = 0
        self.outcomes = self.wrong = 0

    def feed(self) -> None:
        while len(self._caster.pending) < self._wanted:
            raw = None if self._raws is None else self._raws[self._submitted % len(self._raws)]
            self._caster.submit(self._submitted, raw)
            self._submitted += 1

    def check(self, outcomes: list[shmcast.Outcome]) -> None:
        """Every byte of what came."""
        for outcome in outcomes:
            found = _hashes(outcome.value) if outcome.ok else None
            self.wrong += found != self._digests[outcome.rid % len(self._digests)]
            self.outcomes += 1


class _Turns:
    """One rank, and what it has timed: `(began, ended, CPU seconds, outcomes)` by method."""

    def __init__(self, rank: int, tp: int, board: Board) -> None:
        self.rank, self.tp, self.board = rank, tp, board
        self.number = 0
        self.samples: dict[str, list[tuple[float, float, float, int]]] = {}

    def take(self, method: str, action: Callable[[], Any], keep: bool) -> Any:
        self.number += 1
        if self.rank == 0:
            self.board.gather(self.tp, self.number)
            time.sleep(PACE_S)
        else:
            self.board.arrive(self.rank, self.tp, self.number)
        began_cpu = time.thread_time()
        began = time.monotonic()
        result = action()
        ended = time.monotonic()
        cpu = time.thread_time() - began_cpu
        # Who is back early must not take a core from those that are not: what is next is to look at every byte.
        self.number += 1
        self.board.meet(self.rank, self.tp, self.number)
        if keep:
            outcomes = len(result) if method == "step" else 0
            self.samples.setdefault(method, []).append((began, ended, cpu, outcomes))
        return result


def cast_rank(
    rank: int, tp: int, board: Board, count: int, raws: list[Any], digests: list[list[int]]
) -> tuple[dict[int, Any], dict[str, Any], int]:
    """Samples by number of workers, what is said of nothing, and how many outcomes were wrong."""
    arena = shmcast.Arena.create(512 * MIB, segment_bytes=512 * MIB) if rank == 0 else None
    group = shmcast.Group(arena=arena)
    turns, wrong = _Turns(rank, tp, board), 0
    by_workers = {}
    for workers in WORKERS:
        turns.samples = {}
        with shmcast.Caster(group, materialize, workers=workers) as caster:
            load = _Load(caster, raws if rank == 0 else None, digests, workers + 1)
            actions: dict[str, Callable[[], Any]] = {
                "bare": partial(_bare, group, rank),
                "broadcast": partial(group.broadcast, b"small" if rank == 0 else None),
                "step": caster.step,
            }
            for number in range(count + 20):
                for method in METHODS:
                    load.feed()
                    result = turns.take(method, actions[method], number >= 20)
                    if method == "step":
                        load.check(result)
                    del result
            load.check(caster.close(cancel_pending=False))
        by_workers[workers] = turns.samples
        wrong += load.wrong
    nothing = _nothing(rank, group)
    group.close()
    if arena is not None:
        arena.close()
    return by_workers, nothing, wrong


def _bare(group: shmcast.Group, rank: int) -> None:
    group.exchange(group.pack(b"small", ()) if rank == 0 else None)


def _nothing(rank: int, group: shmcast.Group) -> dict[str, Any]:
    """What calls cost where nothing has happened: medians, and messages that were sent meanwhile."""
    started, gate = threading.Event(), threading.Event()

    def wait(_: object) -> None:
        started.set()
        gate.wait()

    with shmcast.Caster(group, wait, workers=1) as caster:
        messages = group.stats()["messages"]
        steps = _samples(caster.step)
        sent = group.stats()["messages"] - messages
        collect = partial(_collect_apply, caster, rank)
        idle = _samples(collect)
        caster.submit("waits", b"" if rank == 0 else None)
        if rank == 0:
            started.wait()
        pending = _samples(collect)
        gate.set()
        while caster.pending:
            caster.step(0.1)
    return {
        "step_us": median_us(steps),
        "step_messages": sent,
        "collect_us": median_us(idle),
        "collect_pending_us": median_us(pending),
        "collect_pending_p99_us": p99_us(pending),
    }


def _collect_apply(caster: shmcast.Caster, rank: int) -> None:
    caster.apply(caster.collect() if rank == 0 else b"")


def _samples(action: Callable[[], Any]) -> list[float]:
    samples = []
    for _ in range(IDLE_CALLS):
        began = time.perf_counter()
        action()
        samples.append(time.perf_counter() - began)
    return samples


def bench_caster(count: int) -> dict[str, Any]:
    """Figures in µs. ``all``: until the last rank has come back; ``entry``: on the entry rank."""
    raws, digests = make_requests()
    reports = run_ranks(TP, cast_rank, count, raws, digests)
    rows = []
    for workers in WORKERS:
        row: dict[str, Any] = {"workers": workers, "tp": TP, "count": count}
        for method in METHODS:
            turns = list(zip(*(report[0][workers][method] for report in reports), strict=True))
            row[method] = _figures(turns)
            if method == "step":
                for name, with_outcomes in (("step_empty", False), ("step_outcomes", True)):
                    row[name] = _figures([turn for turn in turns if bool(turn[0][3]) is with_outcomes])
        rows.append(row)
    return {
        "loaded": rows,
        "nothing": reports[0][1] | {"step_messages": max(report[1]["step_messages"] for report in reports)},
        "verified": not any(report[2] for report in reports),
    }


def _figures(turns: list[tuple[tuple[float, float, float, int], ...]]) -> dict[str, Any]:
    """Of turns, each a sample by rank."""
    if not turns:
        return {"samples": 0}
    spans = [max(rank[1] for rank in turn) - turn[0][0] for turn in turns]
    entry = [turn[0][1] - turn[0][0] for turn in turns]
    cpu = [turn[0][2] for turn in turns]
    others = [rank[2] for turn in turns for rank in turn[1:]]
    return {
        "samples": len(turns),
        "outcomes": sum(turn[0][3] for turn in turns),
        "all_p50_us": median_us(spans),
        "all_p99_us": p99_us(spans),
        "entry_p50_us": median_us(entry),
        "entry_p99_us": p99_us(entry),
        "entry_cpu_us": median_us(cpu),
        "entry_cpu_mean_us": sum(cpu) / len(cpu) * 1e6,
        "other_cpu_mean_us": sum(others) / len(others) * 1e6,
    }


def report(result: dict[str, Any]) -> None:
    """With the project's bars beside it."""
    print(
        "\ncaster, while photographs are being materialized, TP=4 (bars: p99 of step 1.5 times that of a bare message, its own "
        "CPU on the\nentry rank 300 us)"
    )
    for row in result["loaded"]:
        bare = row["bare"]
        for method in (*METHODS, "step_empty", "step_outcomes"):
            figures = row[method]
            if not figures["samples"]:
                continue
            print(
                f"  workers={row['workers']} {method:<13} {figures['samples']:5d}  until all have it p50 {figures['all_p50_us']:7.1f} "
                f"p99 {figures['all_p99_us']:8.1f} us ({figures['all_p99_us'] / bare['all_p99_us']:4.2f} x)  entry rank p50 "
                f"{figures['entry_p50_us']:7.1f} p99 {figures['entry_p99_us']:8.1f} us "
                f"({figures['entry_p99_us'] / bare['entry_p99_us']:4.2f} x), CPU {figures['entry_cpu_us']:6.1f} us, "
                f"mean {figures['entry_cpu_mean_us']:6.1f}, others {figures['other_cpu_mean_us']:6.1f}"
            )
    nothing = result["nothing"]
    print(
        f"  where nothing has happened: collect + apply {nothing['collect_us']:.1f} us with nothing pending, "
        f"{nothing['collect_pending_us']:.1f} us with a request under way (bar: 10)"
    )
    print(f"  step with nothing pending: {nothing['step_us']:.1f} us, {nothing['step_messages']} messages (bar: 0)")
