"""A random walk through an arena, beside a model of what must be there."""

from __future__ import annotations

import random
import warnings

import numpy as np
import pytest

import shmcast
from shmcast.errors import ArenaFullError, StaleHandleError

MIB = 1 << 20


def test_random_walk(seed) -> None:
    """Every block is there exactly as long as somebody claims it, with the bytes that were published."""
    rng = random.Random(seed)
    leases: list[tuple[shmcast.Lease, int]] = []
    blocks: dict[int, dict] = {}

    def alive(number: int) -> bool:
        state = blocks[number]
        return state["kept"] or state["unclaimed"] or any(held == number for _, held in leases)

    with shmcast.Arena.create("8MiB", segment_bytes="1MiB", idle_timeout=0.02) as arena, warnings.catch_warnings():
        warnings.simplefilter("error")
        for turn in range(3000):
            action = rng.random()
            if action < 0.35:
                size = rng.choice([0, 1, 63, 64, 1000, 4096, 16384, 100_000, rng.randrange(2 * MIB)])
                content = np.frombuffer(rng.randbytes(size), np.uint8)
                keep = rng.random() < 0.3
                readers = 0 if keep and rng.random() < 0.5 else 1
                try:
                    handle = arena.publish(content, readers=readers, keep=keep)
                except ArenaFullError:
                    live = sum(len(state["content"]) for number, state in blocks.items() if alive(number))
                    assert live + size > MIB, f"turn {turn}: full with {live} bytes"
                    for number in [n for n in blocks if rng.random() < 0.5]:
                        arena.withdraw(blocks[number]["handle"])
                        blocks[number].update(kept=False, unclaimed=False)
                    continue
                blocks[turn] = {"handle": handle, "content": content, "kept": keep, "unclaimed": readers == 1}
            elif action < 0.7 and blocks:
                number = rng.choice(list(blocks))
                state = blocks[number]
                if alive(number):
                    lease = shmcast.attach(state["handle"], verify=True)
                    assert (lease.array == state["content"]).all(), f"turn {turn}: block {number}"
                    leases.append((lease, number))
                    state["unclaimed"] = False
                else:
                    with pytest.raises(StaleHandleError):
                        shmcast.attach(state["handle"])
            elif action < 0.9 and leases:
                lease, number = leases.pop(rng.randrange(len(leases)))
                assert (lease.array == blocks[number]["content"]).all(), f"turn {turn}: block {number}"
                lease.release()
            elif blocks:
                number = rng.choice(list(blocks))
                assert arena.release(blocks[number]["handle"]) is blocks[number]["kept"]
                blocks[number]["kept"] = False
                if not alive(number) and rng.random() < 0.5:
                    del blocks[number]
        for lease, _ in leases:
            lease.release()
        leases.clear()
        for state in blocks.values():
            arena.withdraw(state["handle"])
        arena.publish(np.zeros(1, np.uint8))
        assert arena.stats()["used_bytes"] == 64
