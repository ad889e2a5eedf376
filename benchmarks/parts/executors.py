"""Photographs materialized by a caster's worker processes and by its threads, one or two of them, beside the bare function.

They take turns, in an order that is turned from round to round: each materializes the same requests once. What a request
takes of CPU is that of the rank and of its workers, whatever they do for it; the bare function writes into private memory, in
the rank itself, and nothing is sent. The rank is alone, so that two workers have two cores.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

import shmcast
from parts.casting import make_requests, materialize
from parts.figures import MIB

EXECUTORS: tuple[tuple[Literal["process", "thread"], int], ...] = (
    ("process", 1),
    ("process", 2),
    ("thread", 1),
    ("thread", 2),
)
ARENA_BYTES = 1024 * MIB
WAIT_S = 60.0


class Turn(NamedTuple):
    """One way, once through all requests."""

    seconds: float
    cpu_s: float
    wrong: int


def _cpu_of(pid: int) -> float:
    """Seconds of CPU that a process has taken: its clock, as clock_getcpuclockid(3) names it."""
    return time.clock_gettime((~pid << 3) | 2)


def _pids(caster: shmcast.Caster) -> list[int]:
    intake = caster._intake
    return [] if intake is None else intake._maker.pids


def _wrong(value: Any, digests: list[int]) -> bool:
    return [shmcast.hash128(array) for array in value] != digests


def _bare(raws: list[Any], digests: list[list[int]]) -> Turn:
    began, began_cpu = time.perf_counter(), time.process_time()
    values = [materialize(raw, np.empty) for raw in raws]
    seconds, cpu_s = time.perf_counter() - began, time.process_time() - began_cpu
    return Turn(seconds, cpu_s, sum(map(_wrong, values, digests)))


def _cast(caster: shmcast.Caster, raws: list[Any], digests: list[list[int]]) -> Turn:
    pids = _pids(caster)
    began, began_cpu = time.perf_counter(), time.process_time() + sum(map(_cpu_of, pids))
    for number, raw in enumerate(raws):
        caster.submit(number, raw)
    outcomes: list[shmcast.Outcome] = []
    while caster.pending:
        outcomes += caster.step(WAIT_S)
    seconds = time.perf_counter() - began
    cpu_s = time.process_time() + sum(map(_cpu_of, pids)) - began_cpu
    return Turn(seconds, cpu_s, sum([not each.ok or _wrong(each.value, digests[each.rid]) for each in outcomes]))


def bench_executors(rounds: int, repeats: int) -> dict[str, Any]:
    """``repeats``: how often the requests are materialized in one turn."""
    raws, digests = make_requests()
    raws, digests = raws * repeats, digests * repeats
    turns: dict[str, list[Turn]] = {}
    with shmcast.Group(max_bytes=ARENA_BYTES) as group:
        casters = {
            f"{executor} {workers}": shmcast.Caster(group, materialize, executor=executor, workers=workers)
            for executor, workers in EXECUTORS
        }
        actions: dict[str, Callable[[], Turn]] = {"bare": partial(_bare, raws, digests)}
        actions |= {name: partial(_cast, caster, raws, digests) for name, caster in casters.items()}
        names = list(actions)
        for number in range(rounds + 1):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                turn = actions[name]()
                if number:  # the first round warms up
                    turns.setdefault(name, []).append(turn)
        for caster in casters.values():
            caster.close()
        counters = shmcast.metrics.snapshot(group)["counters"]
    rows = [_row(name, turns[name], turns["bare"], len(raws)) for name in names]
    gains = {executor: _gain(turns[f"{executor} 1"], turns[f"{executor} 2"]) for executor in ("process", "thread")}
    return {
        "requests": len(raws),
        "rounds": rounds,
        "ways": rows,
        "two_against_one": gains,
        "inline_full": counters["inline_full"],
        "verified": not any(turn.wrong for each in turns.values() for turn in each),
    }


def _gain(one: list[Turn], two: list[Turn]) -> dict[str, float]:
    """``best``: of the quickest turn of each, which is what others on the machine have disturbed least."""
    return {
        "median": statistics.median(single.seconds / double.seconds for single, double in zip(one, two, strict=True)),
        "best": min(turn.seconds for turn in one) / min(turn.seconds for turn in two),
    }


def _row(name: str, turns: list[Turn], bare: list[Turn], requests: int) -> dict[str, Any]:
    ratios = [turn.cpu_s / beside.cpu_s for turn, beside in zip(turns, bare, strict=True)]
    return {
        "way": name,
        "requests_per_s": requests / statistics.median(turn.seconds for turn in turns),
        "cpu_ms_per_request": statistics.median(turn.cpu_s for turn in turns) / requests * 1e3,
        "cpu_against_bare": statistics.median(ratios),
        "cpu_against_bare_least": min(ratios),
        "cpu_against_bare_most": max(ratios),
    }


def report(result: dict[str, Any]) -> None:
    """With the project's bars beside it."""
    print(
        "\nexecutors, photographs, a rank alone (bars: 2 worker processes 1.7 times as much as 1; CPU of a request within 5 % of "
        "one\nmaterialization)"
    )
    for row in result["ways"]:
        print(
            f"  {row['way']:<10} {row['requests_per_s']:6.1f} requests/s   CPU {row['cpu_ms_per_request']:6.1f} ms a request, "
            f"{row['cpu_against_bare']:5.3f} x the bare function ({row['cpu_against_bare_least']:5.3f} to "
            f"{row['cpu_against_bare_most']:5.3f})"
        )
    for executor, gain in result["two_against_one"].items():
        print(f"  two against one, {executor}: {gain['median']:4.2f} x, quickest turns {gain['best']:4.2f} x")
    print(f"  arrays that found no room: {result['inline_full']} (bar: 0)")
