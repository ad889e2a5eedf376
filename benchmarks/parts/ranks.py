"""Tensor-parallel ranks: processes in one gloo group, for one function."""

from __future__ import annotations

import gc
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from parts.board import Board


def run_ranks(tp: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """``function(rank, tp, board, *arguments)`` on every rank, each a process: what they return, by rank."""
    context = multiprocessing.get_context("spawn")
    reports = []
    board = Board(context)
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(tp):
            ours, theirs = context.Pipe()
            store = os.path.join(folder, "store")
            process = context.Process(target=_serve, args=(theirs, store, function, rank, tp, board, arguments))
            process.start()
            theirs.close()
            ranks.append((process, ours))
        try:
            reports = [pipe.recv() for _, pipe in ranks]
        finally:
            for process, _ in ranks:
                process.join(20 if reports else 0.1)
                if process.is_alive():
                    process.kill()
                    process.join()
    return reports


def _serve(
    pipe: Connection,
    store: str,
    function: Callable[..., Any],
    rank: int,
    tp: int,
    board: Board,
    arguments: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=tp)
    # All that torch consists of is looked at by a full collection, for some 300 ms, whenever it happens to come.
    gc.collect()
    gc.freeze()
    result = function(rank, tp, board, *arguments)
    dist.destroy_process_group()
    pipe.send(result)
