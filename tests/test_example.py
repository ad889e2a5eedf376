"""The example of a scheduler's loop: every request ends as it should, and nothing stays behind, however it is stopped."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shmcast

pytestmark = [pytest.mark.torch, pytest.mark.zmq, pytest.mark.watchdog(300)]

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "scheduler_loop.py"
TIMEOUT_S = 200
FOR_EVER = 1_000_000


@pytest.fixture
def directory() -> Iterator[str]:
    """Not ``tmp_path``: a socket's path has 107 characters at most."""
    with tempfile.TemporaryDirectory() as path:
        yield path


@contextmanager
def started(directory: str, *options: str) -> Iterator[subprocess.Popen[str]]:
    """The example in a session of its own, as in a terminal of its own: ``os.killpg`` is Ctrl-C."""
    process = subprocess.Popen(
        [sys.executable, EXAMPLE, "--json", *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "TMPDIR": directory},
    )
    with process:
        try:
            yield process
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise


@pytest.fixture(scope="module")
def example() -> Iterator[Any]:
    """The example as a module."""
    pytest.importorskip("PIL")
    spec = importlib.util.spec_from_file_location("scheduler_loop", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[spec.name]


def expected_tokens(request: dict[str, Any], images: list[bytes]) -> list[int]:
    """What one process makes of a request, patch by patch."""
    from PIL import Image

    rows_of_bits = []
    for raw in images:
        image = Image.open(io.BytesIO(raw))
        image.thumbnail((672, 672))
        down, across = image.height // 14, image.width // 14
        pixels = np.array(image.resize((across * 14, down * 14)), np.float64)
        for top in range(0, down * 14, 14):
            for left in range(0, across * 14, 14):
                patch = (pixels[top : top + 14, left : left + 14] / 127.5).astype(np.float32) - np.float32(1)
                rows_of_bits.append(sum(np.frombuffer(patch.tobytes(), "<u4").tolist()))
    prompt = sum(map(ord, request["prompt"]))
    return [(sum(rows_of_bits[number % 8 :: 8]) + prompt) % 50257 for number in range(request["max_tokens"])]


@pytest.mark.parametrize("size", [2, 4])
def test_every_request_ends_as_it_should(directory: str, example: Any, size: int) -> None:
    with started(directory, "--tp", str(size), "--requests", "24") as process:
        output, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, output + errors
    assert errors == ""
    *lines, summary = output.splitlines()
    answers = {answer["rid"]: answer for answer in map(json.loads, lines)}
    assert len(answers) == len(lines)
    requests = list(example.workload(24))
    assert set(answers) == {request["rid"] for request, _, _ in requests}
    for request, images, hang_up in requests:
        answer = answers[request["rid"]]
        if hang_up:
            assert answer == {"rid": request["rid"], "state": "aborted"}
        elif images == [b"no image"]:
            assert answer["state"] == "failed"
            assert "cannot identify image file" in answer["error"]
        else:
            assert answer == {"rid": request["rid"], "state": "answered", "tokens": expected_tokens(request, images)}
    assert re.fullmatch(
        r"24 requests: 21 answered, 1 failed \(.*cannot identify image file.*\), 2 aborted; shared memory back to 0 blocks",
        summary,
    )
    assert os.listdir(directory) == []


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """Pids of the ranks, in order of their start."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return sorted(int(pid) for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text())


@pytest.mark.usefixtures("example")
@pytest.mark.parametrize("what", ["Ctrl-C", "the front end is killed", "a rank is killed"])
def test_nothing_stays_behind(directory: str, what: str) -> None:
    """Of segments: see `namespace`. Of processes: one that is left has our pipes open, and we read to the end of them."""
    with started(directory, "--requests", str(FOR_EVER)) as process:
        assert process.stdout is not None
        json.loads(process.stdout.readline())
        if what == "Ctrl-C":
            os.killpg(process.pid, signal.SIGINT)
        elif what == "the front end is killed":
            process.kill()
        else:
            os.kill(ranks_of(process)[0], signal.SIGKILL)
        output, errors = process.communicate(timeout=TIMEOUT_S)
    if what == "Ctrl-C":
        assert (process.returncode, errors) == (1, ""), output
        summary = output.splitlines()[-1]
        assert re.match(r"\d+ requests: \d+ answered, .* aborted; shared memory back to \d+ blocks$", summary)
    elif what == "the front end is killed":
        assert (process.returncode, errors) == (-signal.SIGKILL, "")
    else:
        assert process.returncode == 1
        assert re.search(r"^ranks have ended with ", errors, re.MULTILINE)


class FakeDoor:
    def __init__(self, *images: bytes) -> None:
        self.images = deque(images)
        self.said: list[tuple[str, str]] = []

    def send(self, rid: str, state: str, **more: Any) -> None:
        self.said.append((rid, state))


def test_an_id_that_is_under_way_is_refused(example: Any) -> None:
    """Also within one round; each request still has its own image, and the first of an id is not touched."""
    picture = example.photo(1, (28, 28))
    door = FakeDoor(picture, b"no image", b"no image", picture)
    with shmcast.Group(max_bytes="1MiB") as group, shmcast.Caster(group, example.materialize) as caster:
        loop = example.Loop(None, caster, door)
        new = [example.Request(rid, "", 1, image) for rid, image in [("a", 1), ("a", 1), ("b", 0), ("b", 1), ("c", 1)]]
        assert not loop.take_in(example.Round(new, [], False))
        assert door.said == [("a", "failed"), ("b", "failed")]
        assert caster.pending == ("a", "c")
        for outcome in caster.close():
            loop.admit(loop.waiting.pop(outcome.rid), outcome)
        assert sorted(loop.running) == ["a", "b", "c"]
        loop.take_in(example.Round([], ["a", "b", "c", "unknown"], True))
        assert door.said[2:] == [(rid, "aborted") for rid in "abc"]
        assert not loop.running
