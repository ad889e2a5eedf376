"""XXH3-128 on every path, alone and riding in the copy, against the xxhash package: any length, alignment and seed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xxhash

import shmcast
from shmcast import _native

PATHS = ("portable", "avx2", "avx512")
STORES = ("plain", "streaming", "auto")
HASH_VARIABLES = ("SHMCAST_HASH_PATH", "SHMCAST_STREAM_BYTES")
SEEDS = (0, 1, 2**63, 2**64 - 1)
GUARD = 0xA5
GUARD_BYTES = 64
ALIGN_BYTES = 128
# Where the algorithm takes another turn: formulas up to 240 bytes, stripes of 64, blocks of 1024.
TURNS = (1, 3, 4, 8, 9, 16, 17, 128, 129, 240, 241, 256, 320, 1024, 2048, 3072, 16 << 10)
EDGES = sorted({0, *(turn + step for turn in TURNS for step in (-1, 0, 1, 63, 64))})


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> str:
    if request.param not in _native.hash_paths():
        pytest.skip(f"this processor has no {request.param}")
    return request.param


def reference(data: np.ndarray, seed: int) -> int:
    return xxhash.xxh3_128_intdigest(data, seed=seed)


def random_seed(rng: np.random.Generator) -> int:
    return int(rng.integers(0, 2**64, dtype=np.uint64))


def aligned_bytes(length: int) -> np.ndarray:
    """Zeroed bytes that start on a multiple of ALIGN_BYTES, so that a slice's offset is its alignment."""
    room = np.zeros(length + ALIGN_BYTES, np.uint8)
    start = -room.ctypes.data % ALIGN_BYTES
    return room[start : start + length]


class Copier:
    """Copies out of random bytes into guarded room, at any alignment of both, and checks everything about it."""

    def __init__(self, rng: np.random.Generator, length_max: int) -> None:
        self.source = aligned_bytes(length_max + ALIGN_BYTES)
        self.source[:] = rng.integers(0, 256, self.source.size, np.uint8)
        self.target = aligned_bytes(length_max + 2 * ALIGN_BYTES + 2 * GUARD_BYTES)

    def check(self, path: str, stores: str, length: int, seed: int, source_at: int = 0, target_at: int = 0) -> None:
        what = f"{path}, {stores}, {length} bytes, seed {seed:#x}, source at {source_at}, target at {target_at}"
        data = self.source[source_at : source_at + length]
        begin = GUARD_BYTES + target_at
        room = self.target[begin - GUARD_BYTES : begin + length + GUARD_BYTES]
        room[:] = GUARD
        target = self.target[begin : begin + length]
        assert _native.hash_copy_with(path, stores, target, data, seed) == reference(data, seed), what
        assert np.array_equal(target, data), what
        assert (room[:GUARD_BYTES] == GUARD).all(), f"wrote before the target: {what}"
        assert (room[GUARD_BYTES + length :] == GUARD).all(), f"wrote behind the target: {what}"


def test_portable_is_always_there() -> None:
    paths = _native.hash_paths()
    assert "portable" in paths
    assert set(paths) <= set(PATHS)


def test_published_value() -> None:
    # XXH3-128 of nothing, as the algorithm's author prints it: high64 first.
    assert shmcast.hash128(b"") == 0x99AA06D3014798D86001C324468D497F


def test_hash128_is_the_published_hash(rng: np.random.Generator) -> None:
    data = rng.integers(0, 256, 5000, np.uint8)
    for length in EDGES:
        piece = data[:length]
        seed = random_seed(rng)
        assert shmcast.hash128(piece) == reference(piece, 0), length
        assert shmcast.hash128(piece.tobytes(), seed=seed) == reference(piece, seed), (length, seed)
        assert shmcast.hash128(memoryview(piece), seed) == reference(piece, seed), (length, seed)


def test_every_length_alone(path: str, rng: np.random.Generator) -> None:
    data = aligned_bytes(4096 + ALIGN_BYTES)
    data[:] = rng.integers(0, 256, data.size, np.uint8)
    for length in range(4097):
        at = int(rng.integers(ALIGN_BYTES))
        piece = data[at : at + length]
        for seed in (0, SEEDS[length % len(SEEDS)], random_seed(rng)):
            assert _native.hash_with(path, piece, seed) == reference(piece, seed), (length, seed, at)


@pytest.mark.parametrize("stores", STORES)
def test_every_length_copied(path: str, stores: str, rng: np.random.Generator) -> None:
    copier = Copier(rng, 4096)
    for length in range(4097):
        source_at, target_at = (int(at) for at in rng.integers(ALIGN_BYTES, size=2))
        copier.check(path, stores, length, random_seed(rng), source_at, target_at)


@pytest.mark.parametrize("stores", STORES)
def test_every_alignment_of_the_target(path: str, stores: str, rng: np.random.Generator) -> None:
    copier = Copier(rng, max(EDGES))
    for length in EDGES:
        for target_at in (*range(ALIGN_BYTES // 2), 64, 80, 96, 127):
            copier.check(path, stores, length, 0, target_at // 3, target_at)


@pytest.mark.parametrize("stores", STORES)
def test_random_lengths_copied(path: str, stores: str, rng: np.random.Generator) -> None:
    """As many small as large ones: lengths are spread evenly over their logarithm."""
    length_max = 4 << 20
    copier = Copier(rng, length_max)
    lengths = np.exp(rng.uniform(np.log(241), np.log(256 << 10), 1200)).astype(int).tolist()
    lengths += rng.integers(256 << 10, length_max, 12).tolist()
    for length in lengths:
        source_at, target_at = (int(at) for at in rng.integers(ALIGN_BYTES, size=2))
        if rng.integers(2):
            target_at &= 64  # the usual case has code of its own
        copier.check(path, stores, length, random_seed(rng), source_at, target_at)


def test_paths_agree_where_accumulators_overflow(path: str) -> None:
    for value in (0x00, 0xFF, 0x80):
        data = np.full(100_003, value, np.uint8)
        for seed in SEEDS:
            assert _native.hash_with(path, data, seed) == reference(data, seed), (value, seed)


PROGRAM = """
import numpy, xxhash, shmcast
from shmcast import _native
data = numpy.random.default_rng(int({seed})).integers(0, 256, 300_001, numpy.uint8)
for length in (0, 7, 100, 241, 70_000, data.size):
    want = xxhash.xxh3_128_intdigest(data[:length], seed=length)
    assert shmcast.hash128(data[:length], length) == want, length
    target = numpy.zeros(length, numpy.uint8)
    assert _native.hash_copy_with("portable", "auto", target, data[:length], length) == want, length
    assert numpy.array_equal(target, data[:length]), length
print("agrees")
"""


def run_with(seed: int, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that hashes, with these variables and none of the caller's own choices."""
    environment = {name: value for name, value in os.environ.items() if name not in HASH_VARIABLES}
    environment["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(seed=seed)],
        env=environment | variables,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SHMCAST_HASH_PATH": "", "SHMCAST_STREAM_BYTES": ""},
        *({"SHMCAST_HASH_PATH": path} for path in PATHS),
        *({"SHMCAST_STREAM_BYTES": text} for text in ("0", "241", str(2**40))),
    ],
    ids=str,
)
def test_choices_of_the_environment_agree(variables: dict[str, str], seed: int, tmp_path: Path) -> None:
    wanted = variables.get("SHMCAST_HASH_PATH")
    if wanted and wanted not in _native.hash_paths():
        pytest.skip(f"this processor has no {wanted}")
    done = run_with(seed, tmp_path, **variables)
    assert (done.returncode, done.stdout) == (0, "agrees\n"), done.stderr


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SHMCAST_HASH_PATH", "mmx"),
        ("SHMCAST_HASH_PATH", "AVX2"),
        *(("SHMCAST_HASH_PATH", path) for path in PATHS),
        ("SHMCAST_STREAM_BYTES", "lots"),
        ("SHMCAST_STREAM_BYTES", "-1"),
        ("SHMCAST_STREAM_BYTES", "9" * 30),
    ],
)
def test_choices_that_can_not_be_followed_are_refused(name: str, value: str, seed: int, tmp_path: Path) -> None:
    if value in _native.hash_paths():
        pytest.skip(f"this processor has {value}")
    done = run_with(seed, tmp_path, **{name: value})
    assert done.returncode != 0
    last_line = done.stderr.strip().splitlines()[-1]
    assert name in last_line and f"'{value}'" in last_line, done.stderr
    if name == "SHMCAST_HASH_PATH":
        assert all(path in last_line for path in _native.hash_paths()), done.stderr


def test_a_path_that_is_not_there_is_refused() -> None:
    missing = [path for path in (*PATHS, "mmx", "") if path not in _native.hash_paths()]
    for path in missing:
        with pytest.raises(ValueError, match=f"'{path}'"):
            _native.hash_with(path, b"bytes", 0)


def test_a_target_that_is_too_small_is_refused() -> None:
    for length in (0, 4):
        with pytest.raises(ValueError, match="5"):
            _native.hash_copy_with("portable", "plain", bytearray(length), b"bytes", 0)


def test_a_target_that_is_read_only_is_refused() -> None:
    with pytest.raises((BufferError, TypeError)):
        _native.hash_copy_with("portable", "plain", bytes(5), b"bytes", 0)
