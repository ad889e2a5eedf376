#!/usr/bin/env python3
"""What the parts cost: publish, attach, reserve and seal, broadcast; each beside what it is compared with, interleaved.

Medians. Contents are verified outside the timed windows; what differs is reported and makes the exit code 1. Nothing is
asserted: the bars that are printed beside the figures are the project's own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

import shmcast
from shmcast import _native
from tp import machine

KIB, MIB = 1 << 10, 1 << 20
POOL_BYTES = 512 * MIB  # sources rotate through it: larger than any cache, so each copy reads from memory
SIZES = [4 * KIB, 64 * KIB, MIB, 4 * MIB, 10 * MIB, 64 * MIB, 256 * MIB]
ATTACH_SIZES = [64 * KIB, MIB, 64 * MIB]
BROADCAST_SIZES = [64 * KIB, MIB, 10 * MIB, 64 * MIB]
MANY, MANY_BYTES = 500, 2 * KIB
METHODS = ("shmcast", "object_list", "tensor")


def median_us(samples: list[float]) -> float:
    """Median of seconds, in microseconds."""
    return statistics.median(samples) * 1e6


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """``(seconds, result)``."""
    began = time.perf_counter()
    result = action()
    return time.perf_counter() - began, result


def name_of(nbytes: int) -> str:
    """4 KiB, 10 MiB."""
    return f"{nbytes // MIB} MiB" if nbytes >= MIB else f"{nbytes // KIB} KiB"


# ---- publish


def source_pool() -> np.ndarray:
    """Random bytes, more than caches hold."""
    block = np.random.default_rng(1).integers(0, 256, MIB, dtype=np.uint8)
    pool = np.tile(block, POOL_BYTES // MIB)
    pool[::4096] = np.arange(len(pool[::4096]), dtype=np.uint8)  # no two windows alike
    return pool


def windows(pool: np.ndarray, nbytes: int) -> Iterator[np.ndarray]:
    """Parts of the pool, one after another, none of which is still in a cache when its turn comes."""
    at = 0
    while True:
        if at + nbytes > len(pool):
            at = 0
        yield pool[at : at + nbytes]
        at += max(nbytes, 64 * KIB)


def bench_publish(pool: np.ndarray, sizes: list[int], repeats: int) -> list[dict[str, Any]]:
    """publish (copy and hash) beside the faster of two copies without hash, into warm memory of the same arena."""
    rows = []
    with shmcast.Arena.create(4 * max(sizes) + 64 * MIB, segment_bytes=4 * max(sizes) + 64 * MIB) as arena:
        for nbytes in sizes:
            source, wrong = windows(pool, nbytes), 0
            reservation = arena.reserve(nbytes, "uint8")
            target: Any = reservation.array  # Python 3.10 has no name for what has a buffer
            actions: dict[str, Callable[[Any], Any]] = {
                "publish": partial(arena.publish, readers=0, keep=True),
                "memcpy": partial(_native.copy_with, "memcpy", target),
                "streaming": partial(_native.copy_with, "streaming", target),
                "hash": shmcast.hash128,
            }
            samples: dict[str, list[float]] = {name: [] for name in actions}
            for number in range(max(repeats, min(20 * repeats, 512 * MIB // nbytes))):
                for name, action in actions.items():
                    # Twice, the first untimed: what one leaves in the caches must not be another's loss.
                    for keep in (False, True):
                        array = next(source)
                        seconds, result = timed(partial(action, array))
                        if keep:
                            samples[name].append(seconds)
                        if name == "publish":
                            if keep and number < 2:
                                with shmcast.attach(result) as lease:
                                    wrong += not np.array_equal(lease.array, array)
                            arena.release(result)
            del actions
            reservation.abort()
            del target, reservation
            copy = min(median_us(samples["memcpy"]), median_us(samples["streaming"]))
            publish = median_us(samples["publish"])
            rows.append(
                {
                    "bytes": nbytes,
                    "publish_us": publish,
                    "copy_us": copy,
                    "ratio": publish / copy,
                    "memcpy_us": median_us(samples["memcpy"]),
                    "streaming_us": median_us(samples["streaming"]),
                    "hash_us": median_us(samples["hash"]),
                    "samples": len(samples["publish"]),
                    "verified": not wrong,
                }
            )
    return rows


def bench_publish_many(repeats: int) -> dict[str, Any]:
    """Hundreds of small arrays at once, beside one copy of their bytes."""
    rng = np.random.default_rng(2)
    arrays = [rng.integers(0, 256, MANY_BYTES, dtype=np.uint8) for _ in range(MANY)]
    joined = np.concatenate(arrays)
    target = np.empty_like(joined)
    published, copied = [], []
    with shmcast.Arena.create(64 * MIB) as arena:
        for _ in range(3 * repeats):
            seconds, handles = timed(lambda: arena.publish_many(arrays, readers=0, keep=True))
            published.append(seconds)
            for handle in handles:
                arena.release(handle)
            copied.append(timed(lambda: np.copyto(target, joined))[0])
    each, copy = median_us(published) / MANY, median_us(copied) / MANY
    return {"arrays": MANY, "bytes": MANY_BYTES, "us": each, "copy_us": copy, "over_copy_us": each - copy}


# ---- attach


def attach_reader(pipe: Connection) -> None:
    """Another process: attaches every handle that it is sent once, in turn by size."""
    by_size: dict[int, list[bytes]] = pipe.recv()
    decode: dict[int, list[float]] = {nbytes: [] for nbytes in by_size}
    first: dict[int, list[float]] = {nbytes: [] for nbytes in by_size}
    read: dict[int, float] = {}
    sums: dict[int, int] = {}
    for turn in zip(*by_size.values(), strict=True):
        for nbytes, raw in zip(by_size, turn, strict=True):
            seconds, handle = timed(partial(shmcast.Handle.from_bytes, raw))
            decode[nbytes].append(seconds)
            began = time.perf_counter()
            array = shmcast.attach(handle).array
            first[nbytes].append(time.perf_counter() - began)
            if nbytes not in read:
                private: Any = np.zeros(nbytes, np.uint8)
                read[nbytes] = timed(partial(np.copyto, private, array))[0] * 1e6
                sums[nbytes] = shmcast.hash128(private)
            del array
    pipe.send(({n: median_us(s) for n, s in decode.items()}, {n: median_us(s) for n, s in first.items()}, read, sums))


def bench_attach(sizes: list[int], handles: int) -> list[dict[str, Any]]:
    """First attach of handles that the other process has never seen, up to a usable ndarray."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    reader = context.Process(target=attach_reader, args=(theirs,))
    reader.start()
    theirs.close()
    try:
        with shmcast.Arena.create(2 * sum(sizes) + 64 * MIB, segment_bytes=2 * sum(sizes) + 64 * MIB) as arena:
            raws, expected = {}, {}
            for nbytes in sizes:
                array: Any = np.random.default_rng(nbytes).integers(0, 256, nbytes, dtype=np.uint8)
                one = arena.publish(array, readers=0, keep=True)
                expected[nbytes] = shmcast.hash128(array)
                # A handle of its own each, and the same bytes: a thousand blocks of 64 MiB would not fit.
                raws[nbytes] = [arena.alias(one, readers=0, keep=True).to_bytes() for _ in range(handles)]
            ours.send(raws)
            decode, first, read, sums = ours.recv()
    finally:
        reader.join(20)
        if reader.is_alive():
            reader.kill()
            reader.join()
    return [
        {
            "bytes": nbytes,
            "us": first[nbytes],
            "decode_us": decode[nbytes],
            "first_read_us": read[nbytes],
            "handles": handles,
            "verified": sums[nbytes] == expected[nbytes],
        }
        for nbytes in sizes
    ]


# ---- reserve and seal


def bench_reserve(sizes: list[int], repeats: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """reserve + seal without hash: from warm memory, and where a segment has to be added for it."""

    def once(arena: shmcast.Arena, nbytes: int) -> float:
        began = time.perf_counter()
        reservation = arena.reserve(nbytes, "uint8", readers=0, keep=True, hash=False)
        handle = reservation.seal()
        seconds = time.perf_counter() - began
        arena.release(handle)
        return seconds

    rows = []
    for nbytes in sizes:
        with shmcast.Arena.create(2 * nbytes + 16 * MIB, segment_bytes=2 * nbytes + 16 * MIB) as arena:
            warm = [once(arena, nbytes) for _ in range(20 * repeats)]
        cold = []
        for _ in range(3):
            size = max(nbytes, _native.PAGE_BYTES)
            with shmcast.Arena.create(size + 64 * KIB, segment_bytes=64 * KIB) as arena:
                arena.reserve(64 * KIB, "uint8", readers=0, keep=True, hash=False).seal()
                cold.append(once(arena, nbytes))
        rows.append({"bytes": nbytes, "warm_us": median_us(warm), "cold_us": median_us(cold)})
    return rows, random_reservations()


def random_reservations(count: int = 1000, seed: int = 3) -> dict[str, Any]:
    """Random sizes (64 KiB to 16 MiB) and lifetimes in a default arena: how many found memory that was warm."""
    rng = np.random.default_rng(seed)
    live: list[shmcast.Handle] = []
    cold, samples = 0, []
    with shmcast.Arena.create("1GiB") as arena:
        for nbytes in np.exp(rng.uniform(np.log(64 * KIB), np.log(16 * MIB), count)).astype(int):
            before = arena.stats()["grown"]
            seconds, reservation = timed(partial(arena.reserve, int(nbytes), "uint8", readers=0, keep=True, hash=False))
            cold += arena.stats()["grown"] != before
            samples.append(seconds)
            live.append(reservation.seal())
            del reservation
            while len(live) > rng.integers(1, 32):
                arena.release(live.pop(int(rng.integers(len(live)))))
        for handle in live:
            arena.release(handle)
    return {"count": count, "seed": seed, "warm_share": 1 - cold / count, "reserve_us": median_us(samples)}


# ---- broadcast


def broadcast_rank(rank: int, tp: int, store: str, sizes: list[int], repeats: int, pipe: Connection) -> None:
    """One rank: every method for every size, in turn; reports when it had read the last byte."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=tp)
    # One segment, so that nothing grows within the window.
    room = 4 * max(sizes) + 64 * MIB
    arena = shmcast.Arena.create(room, segment_bytes=room) if rank == 0 else None
    group = shmcast.Group(arena=arena)
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
                if method == "shmcast":
                    array = group.broadcast(source if rank == 0 else None)
                elif method == "object_list":
                    box = [source if rank == 0 else None]
                    dist.broadcast_object_list(box, 0)
                    array = box[0]
                else:
                    tensor = torch.from_numpy(source) if rank == 0 else incoming
                    dist.broadcast(tensor, 0)
                    array = tensor.numpy()
                shmcast.hash128(array)  # the fastest way at hand to read every byte once, the same for all three
                ended = time.monotonic()
                if number:  # the first is the warm-up of all three
                    results[method][nbytes].append((began, ended))
                wrong += not np.array_equal(array, source)
                del array
    group.close()
    if arena is not None:
        arena.close()
    dist.destroy_process_group()
    pipe.send((results, wrong))


def bench_broadcast(tp: int, sizes: list[int], repeats: int) -> list[dict[str, Any]]:
    """From the entry rank's start until the last rank has read every byte once, by three ways."""
    context = multiprocessing.get_context("spawn")
    reports = []
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(tp):
            ours, theirs = context.Pipe()
            arguments = (rank, tp, os.path.join(folder, "store"), sizes, repeats, theirs)
            process = context.Process(target=broadcast_rank, args=arguments)
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


# ---- report


def report(results: dict[str, Any]) -> None:
    """The figures, with the project's bars beside them."""
    print("\npublish: copy + hash, beside the faster copy without hash (bar: 1.6 at 1 MiB, 1.15 from 10 MiB on)")
    for row in results["publish"]:
        print(
            f"  {name_of(row['bytes']):>8}  {row['publish_us']:10.1f} us  copy {row['copy_us']:10.1f} us  "
            f"ratio {row['ratio']:5.2f}  hash alone {row['hash_us']:9.1f} us"
        )
    many = results["publish_many"]
    print(
        f"  publish_many: {many['us']:.2f} us an array of {many['bytes']} bytes, {many['over_copy_us']:.2f} over its copy (bar: 3)"
    )
    print(
        "\nattach: first of its handle in another process, to a usable ndarray (bar: 6 us, 64 MiB at most 1 us over 1 MiB)"
    )
    for row in results["attach"]:
        print(
            f"  {name_of(row['bytes']):>8}  {row['us']:6.2f} us  (decoding the handle {row['decode_us']:.2f} us)  "
            f"first read {row['first_read_us']:9.1f} us"
        )
    print("\nreserve + seal without hash (bar: 20 us warm, at any size)")
    for row in results["reserve_seal"]:
        print(f"  {name_of(row['bytes']):>8}  warm {row['warm_us']:7.2f} us  with growth {row['cold_us']:10.1f} us")
    random = results["random_reservations"]
    print(f"  {random['count']} random sizes: {random['warm_share']:.1%} warm (bar: 99 %)")
    print(
        "\nbroadcast, until the last rank has read every byte (bars at TP=4: 12 and 4 times at 10 MiB, 30 and 7 at 64 MiB)"
    )
    for row in results["broadcast"]:
        ours = row["shmcast_ms"]
        print(
            f"  TP={row['tp']} {name_of(row['bytes']):>8}  {ours:8.2f} ms  object_list {row['object_list_ms']:8.2f} ms "
            f"({row['object_list_ms'] / ours:5.1f} x)  tensor {row['tensor_ms']:8.2f} ms ({row['tensor_ms'] / ours:4.1f} x)"
        )


def main() -> int:
    """Run all parts; exit code 1 if contents were wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured")
    parser.add_argument("--quick", action="store_true", help="fewer repeats, nothing above 64 MiB")
    parser.add_argument(
        "--sizes", metavar="BYTES,...", help="instead of the usual ones, for publish, reserve and broadcast"
    )
    parser.add_argument("--repeats", type=int, default=15, help="of each measurement (15)")
    options = parser.parse_args()
    repeats = 5 if options.quick else options.repeats
    sizes = [size for size in SIZES if not options.quick or size <= 64 * MIB]
    broadcast_sizes = BROADCAST_SIZES
    if options.sizes:
        sizes = broadcast_sizes = [int(size) for size in options.sizes.split(",")]
    described = machine.describe()
    results: dict[str, Any] = {"machine": described, "config": {"repeats": repeats, "pool_bytes": POOL_BYTES}}
    print(
        f"{described['cpu']}, {described['cores']} cores, Linux {described['kernel']}, load {described['load'][0]:.2f}"
    )
    pool = source_pool()
    results["publish"] = bench_publish(pool, sizes, repeats)
    del pool
    results["publish_many"] = bench_publish_many(repeats)
    results["attach"] = bench_attach(ATTACH_SIZES, 1000)
    results["reserve_seal"], results["random_reservations"] = bench_reserve(sizes, repeats)
    results["broadcast"] = [row for tp in (2, 4) for row in bench_broadcast(tp, broadcast_sizes, repeats)]
    report(results)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file, indent=1)
    wrong = [row for part in ("publish", "attach", "broadcast") for row in results[part] if not row["verified"]]
    for row in wrong:
        print(f"WRONG CONTENTS: {row}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
