"""Publish, attach, reserve and seal: one process, and a second one that reads."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

import shmcast
from parts.figures import KIB, MIB, median_us, name_of, timed
from shmcast import _native

POOL_BYTES = 512 * MIB  # sources rotate through it: larger than any cache, so each copy reads from memory
SIZES = [4 * KIB, 64 * KIB, MIB, 4 * MIB, 10 * MIB, 64 * MIB, 256 * MIB]
ATTACH_SIZES = [64 * KIB, MIB, 64 * MIB]
MANY, MANY_BYTES = 500, 2 * KIB


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


# ---- all of it


def bench_memory(sizes: list[int], repeats: int) -> dict[str, Any]:
    """All of the above."""
    results: dict[str, Any] = {"publish": bench_publish(source_pool(), sizes, repeats)}
    results["publish_many"] = bench_publish_many(repeats)
    results["attach"] = bench_attach(ATTACH_SIZES, 1000)
    results["reserve_seal"], results["random_reservations"] = bench_reserve(sizes, repeats)
    return results


def report(results: dict[str, Any]) -> None:
    """What was measured here, with the project's bars beside it."""
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
