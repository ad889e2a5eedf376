"""The benchmark of SGLang's path and ours: what it makes of marks, and one short run. What it measures is nobody's business here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from relay.plan import VARIANTS, size_of
from relay.rank import Marks

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "sglang.py"


@pytest.mark.without_sglang
def test_sizes() -> None:
    assert size_of("64").items == (64 << 20,)
    assert size_of("16x4").items == (4 << 20,) * 16
    assert size_of("16x4").title == "16 x 4 MiB"
    for wrong in ("0", "0x4", "0.0001"):
        with pytest.raises(ValueError, match="rows"):
            size_of(wrong)


@pytest.mark.without_sglang
def test_cpu_is_that_of_the_window() -> None:
    polls = [(100, 10), (200, 17), (300, 25)]
    marks = Marks(polls, 0, 0, 0, 0, 40, 0, [], [], True)
    assert [marks.cpu_since(sent) for sent in (50, 100, 250, 999)] == [30, 30, 23, 15]


def test_bars_name_variants_and_sizes_that_there_are() -> None:
    from relay import report  # which needs what the benchmarks need

    for bar in report.BARS:
        assert not VARIANTS[bar.other].installed
        assert size_of(bar.size)


def test_a_short_run(namespace: str, tmp_path: Path) -> None:
    written, plot = tmp_path / "figures.json", tmp_path / "plot.svg"
    variants = ["sglang", "sglang-nohash", "sglang-once", "shmcast", "shmcast-xxh3", "shmcast-nohash", "shmcast-once"]
    options = ["--tp", "2", "--sizes", "1,2x1", "--rounds", "1", "--json", str(written), "--plot", str(plot)]
    done = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(written.read_text())
    assert found["problems"] == found["left_in_shm"] == []
    assert [(row["size"], row["variant"]) for row in found["results"]] == [
        (size, name) for size in ("1", "2x1") for name in variants
    ]
    assert "TP=2, 2 x 1 MiB, 1 samples of each" in done.stdout
    assert plot.stat().st_size
