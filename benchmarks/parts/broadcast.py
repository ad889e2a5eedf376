"""Arrays from the entry rank to all ranks, until every rank has read every byte once: `Group.broadcast` by both channels,
and what engines do."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np

import shmcast
from parts.board import Board
from parts.figures import KIB, MIB, name_of
from parts.ranks import run_ranks

SIZES = [64 * KIB, MIB, 10 * MIB, 64 * MIB]
METHODS = ("ring", "gloo", "object_list", "tensor")


def broadcast_rank(
    rank: int, tp: int, board: Board, sizes: list[int], repeats: int
) -> tuple[dict[str, dict[int, list[tuple[float, float]]]], int]:
    """One rank: every method for every size, in turn; reports when it had read the last byte."""
    import torch
    import torch.distributed as dist

    # One segment each, so that nothing grows within the window.
    room = 4 * max(sizes) + 64 * MIB
    arenas = [shmcast.Arena.create(room, segment_bytes=room) for _ in range(2)] if rank == 0 else [None, None]
    groups = {
        "ring": shmcast.Group(arena=arenas[0]),
        "gloo": shmcast.Group(arena=arenas[1], channel="group"),
    }
    results: dict[str, dict[int, list[tuple[float, float]]]] = {m: {n: [] for n in sizes} for m in METHODS}
    wrong = 0
    for nbytes in sizes:
        sources = [np.random.default_rng((nbytes, i)).random(nbytes // 4, dtype=np.float32) for i in range(2)]
        incoming = torch.zeros(nbytes // 4)
        for number in range(repeats + 1):
            source = sources[number % 2]
            for method in METHODS:
                dist.barrier()
                if rank == 0:
                    time.sleep(0.003)  # the others leave the barrier later; a rank that serves waits for its message
                began = time.monotonic()
                if method in groups:
                    array = groups[method].broadcast(source if rank == 0 else None)
                elif method == "object_list":
                    box = [source if rank == 0 else None]
                    dist.broadcast_object_list(box, 0)
                    array = box[0]
                else:
                    tensor = torch.from_numpy(source) if rank == 0 else incoming
                    dist.broadcast(tensor, 0)
                    array = tensor.numpy()
                shmcast.hash128(array)  # the fastest way at hand to read every byte once, the same for all
                ended = time.monotonic()
                dist.barrier()  # who is done early must not take a core from those that are not
                if number:  # the first is the warm-up of all
                    results[method][nbytes].append((began, ended))
                wrong += not np.array_equal(array, source)
                del array
    for group in groups.values():
        group.close()
    for arena in arenas:
        if arena is not None:
            arena.close()
    return results, wrong


def bench_broadcast(tp: int, sizes: list[int], repeats: int) -> list[dict[str, Any]]:
    """From the entry rank's start until the last rank has read every byte once."""
    reports = run_ranks(tp, broadcast_rank, sizes, repeats)
    rows = []
    for nbytes in sizes:
        row: dict[str, Any] = {"tp": tp, "bytes": nbytes}
        for method in METHODS:
            spans = zip(*(results[method][nbytes] for results, _ in reports), strict=True)
            times = [max(ended for _, ended in span) - span[0][0] for span in spans]
            row[f"{method}_ms"] = statistics.median(times) * 1e3
        row["verified"] = not any(wrong for _, wrong in reports)
        rows.append(row)
    return rows


def report(rows: list[dict[str, Any]]) -> None:
    """With the project's bars beside it."""
    print(
        "\nbroadcast, until the last rank has read every byte (bars at TP=4, against object_list and tensor: 12 and 4 times at "
        "10 MiB,\n30 and 7 at 64 MiB; over the ring against over gloo: 2 times at 1 MiB)"
    )
    for row in rows:
        ours = row["ring_ms"]
        print(
            f"  TP={row['tp']} {name_of(row['bytes']):>8}  {ours:8.2f} ms  over gloo {row['gloo_ms']:8.2f} ms "
            f"({row['gloo_ms'] / ours:4.1f} x)  object_list {row['object_list_ms']:8.2f} ms "
            f"({row['object_list_ms'] / ours:5.1f} x)  tensor {row['tensor_ms']:8.2f} ms ({row['tensor_ms'] / ours:4.1f} x)"
        )
