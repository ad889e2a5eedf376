"""One small message from the entry rank to all others: how long until all of them have it, beside futex round trips between
two of the same processes and beside what engines do; what it costs in CPU; what waiting for it costs.

Back to back: the next is sent as soon as all have said that they have the one before; so they are just falling asleep, or
still awake. Paced: all of them, and the cores, have been asleep for a while.

CPU is that of the threads that send and receive: a gloo group has a thread of its own in each rank that wakes up a hundred
times a second, whoever uses it. Of whole processes the CPU is given too, and what they take while nothing is sent.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import shmcast
from parts.board import PING, PONG, Board
from parts.figures import median_us, p99_us
from parts.ranks import run_ranks

TP = 4
MESSAGE_BYTES = 291
PACES = {"burst": 0.0, "paced": 0.02}
"""Seconds before each message."""
ROUND_TRIP = "futex"
NOTHING = "nothing"
METHODS = ("channel", "exchange", "broadcast", "object_list")
SUMMARIES = {
    "futex": "futex, there and back between two ranks",
    "channel": "ring: the channel alone",
    "exchange": "Group.exchange of a message without parts",
    "broadcast": "Group.broadcast of bytes",
    "object_list": "dist.broadcast_object_list of bytes",
}

Send = Callable[["bytes | None"], "bytes | None"]


def sending(rank: int, group: shmcast.Group) -> dict[str, Send]:
    """The ways of METHODS. Given a message on rank 0; what they return is the message, on every rank."""
    import torch.distributed as dist

    def exchange(message: bytes | None) -> bytes:
        return group.exchange(None if message is None else group.pack(message, ()))[0]

    def object_list(message: bytes | None) -> bytes | None:
        box = [message]
        dist.broadcast_object_list(box, 0)
        return box[0]

    # What `Group` sends through, without what else it does for a message.
    channel = group._channel
    return {
        "channel": channel.broadcast,
        "exchange": exchange,
        "broadcast": group.broadcast,
        "object_list": object_list,
    }


class _Rank:
    """One rank of all this."""

    def __init__(self, rank: int, tp: int, board: Board, group: shmcast.Group) -> None:
        self.rank, self.tp, self.board = rank, tp, board
        self.ways = sending(rank, group)
        self.number = self.trips = 0  # so far
        self.wrong = 0

    def round_trips(self, count: int, pace_s: float) -> list[float]:
        """Between ranks 0 and 1; on 0: how long they took."""
        samples = []
        for _ in range(count if self.rank < 2 else 0):
            self.trips += 1
            if self.rank == 1:
                self.board.wait(PING, self.trips)
                self.board.tell(PONG, self.trips)
                continue
            if pace_s:
                time.sleep(pace_s)
            began = time.monotonic()
            self.board.tell(PING, self.trips)
            self.board.wait(PONG, self.trips)
            samples.append(time.monotonic() - began)
        return samples

    def nothing(self, count: int, pace_s: float) -> list[float]:
        """What sending costs without sending."""
        for _ in range(count if self.rank == 0 else 0):
            time.sleep(pace_s)
        self.number += 1
        self.board.meet(self.rank, self.tp, self.number)
        return []

    def messages(self, method: str, count: int, pace_s: float) -> list[float]:
        """On rank 0: when each was sent; elsewhere: when it was there."""
        send = self.ways[method]
        moments = []
        for _ in range(count):
            self.number += 1
            expected = self.number.to_bytes(8, "little") * (MESSAGE_BYTES // 8) + bytes(MESSAGE_BYTES % 8)
            if self.rank == 0:
                if pace_s:
                    time.sleep(pace_s)
                moments.append(time.monotonic())
                send(expected)
                if not pace_s:
                    self.board.gather(self.tp, self.number)
            else:
                message = send(None)
                moments.append(time.monotonic())
                if not pace_s:
                    self.board.arrive(self.rank, self.tp, self.number)
                self.wrong += message != expected
        return moments


def message_rank(rank: int, tp: int, board: Board, rounds: int, burst: int, paced: int, idle_s: float) -> Any:
    """All ways in turn, some messages each, round by round. Returns moments, CPU seconds, what waiting took and what was
    wrong."""
    with shmcast.Group(max_bytes="64MiB") as group:
        here = _Rank(rank, tp, board, group)
        moments: dict[str, dict[str, list[float]]] = {pace: {m: [] for m in (ROUND_TRIP, *METHODS)} for pace in PACES}
        cpu_s = {method: [0.0, 0.0] for method in (NOTHING, *METHODS)}
        for number in range(rounds + 1):
            for pace, pace_s in PACES.items():
                count = {"burst": burst, "paced": paced}[pace] if number else 5  # the first round is the warm-up of all
                trips = here.round_trips(count, pace_s)
                for method in (NOTHING, *METHODS) if pace_s else METHODS:
                    began_s = _cpu_s()
                    samples = here.nothing(count, pace_s) if method == NOTHING else here.messages(method, count, pace_s)
                    if number and pace_s:
                        cpu_s[method] = [a + b - c for a, b, c in zip(cpu_s[method], _cpu_s(), began_s, strict=True)]
                    if number and method != NOTHING:
                        moments[pace][method] += samples
                moments[pace][ROUND_TRIP] += trips if number else []
        idle = _idle(rank, group, idle_s)
        return moments, cpu_s, idle, here.wrong


def _cpu_s() -> tuple[float, float]:
    """Of this thread, of this process."""
    return time.thread_time(), time.process_time()


def _idle(rank: int, group: shmcast.Group, idle_s: float) -> float:
    """CPU of this thread while it waits for a message, as a share of one core."""
    if rank == 0:
        time.sleep(idle_s)
    began, began_cpu = time.monotonic(), time.thread_time()
    group.broadcast(b"" if rank == 0 else None)
    return (time.thread_time() - began_cpu) / (time.monotonic() - began)


def bench_messages(rounds: int, burst: int, paced: int, idle_s: float) -> dict[str, Any]:
    """Figures by pace and method, in µs; CPU in ms a message, of all ranks together."""
    reports = run_ranks(TP, message_rank, rounds, burst, paced, idle_s)
    result: dict[str, Any] = {"tp": TP, "bytes": MESSAGE_BYTES, "pace_ms": PACES["paced"] * 1e3}
    for pace in PACES:
        moments = [report[0][pace] for report in reports]
        samples = {ROUND_TRIP: moments[0][ROUND_TRIP]}
        for method in METHODS:
            turns = zip(*(each[method] for each in moments), strict=True)
            samples[method] = [max(received) - sent for sent, *received in turns]
        result[pace] = {m: {"p50_us": median_us(s), "p99_us": p99_us(s), "samples": len(s)} for m, s in samples.items()}
    result["paced"][NOTHING] = {}
    for method in (NOTHING, *METHODS):
        for number, name in enumerate(("cpu_ms", "process_cpu_ms")):
            cpu_s = sum(report[1][method][number] for report in reports)
            result["paced"][method][name] = cpu_s / (rounds * paced) * 1e3
    result["idle_share"] = max(report[2] for report in reports[1:])
    result["idle_s"] = idle_s
    result["verified"] = not any(report[3] for report in reports)
    return result


def report(result: dict[str, Any]) -> None:
    """With the project's bars beside it."""
    print(
        f"\nmessage of {result['bytes']} bytes, TP={result['tp']}, until the others have it (bars for the ring: 3 round trips, "
        "10 times faster than object_list)"
    )
    for pace, title in (("burst", "back to back"), ("paced", f"every {result['pace_ms']:.0f} ms")):
        rows = result[pace]
        for method, title_of in SUMMARIES.items():
            row = rows[method]
            line = f"  {title:>12}  {title_of:<44} p50 {row['p50_us']:8.1f} us  p99 {row['p99_us']:8.1f} us"
            if method != ROUND_TRIP:
                line += f"  {row['p50_us'] / rows[ROUND_TRIP]['p50_us']:5.1f} round trips"
                line += f"  object_list {rows['object_list']['p50_us'] / row['p50_us']:4.1f} x"
            print(line)
    for name, who in (("cpu_ms", "the threads that do it"), ("process_cpu_ms", "whole processes")):
        cpu = ", ".join(f"{method} {result['paced'][method][name]:.2f}" for method in (NOTHING, *METHODS))
        print(f"  CPU of all ranks a message every {result['pace_ms']:.0f} ms, {who}, ms: {cpu} (bar for the ring: 1)")
    print(f"  a reader that waits: {result['idle_share']:.3%} of a core (bar: 0.1 %)")
