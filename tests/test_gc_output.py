"""What the console scripts print: names of anybody's, output that nobody takes, and what the exit code says then."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import shmcast
from shmcast import doctor, looks, names
from shmcast.cli import main as tool
from shmcast.cli import output

SHM = Path(names.DIRECTORY)
PIPE_BYTES = 4096
FORGED = b"\xff\n\x1b[2Jremoved\r\xe2\x80\xae"  # no UTF-8, a line of its own, an empty screen, an override of direction
ESCAPED = r"\xff\n\x1b[2Jremoved\r\u202e"


@contextlib.contextmanager
def file_of(name: bytes) -> Iterator[None]:
    path = os.fsencode(SHM) + b"/" + name
    with open(path, "wb"):
        pass
    try:
        yield
    finally:
        os.unlink(path)


def run(
    *arguments: str, module: str = "shmcast.cli.gc", encoding: str = "utf-8", **options: object
) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "PYTHONIOENCODING": f"{encoding}:strict"}
    environment.pop("PYTHONUNBUFFERED", None)  # what a buffer keeps is written again at the end
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run([sys.executable, "-m", module, *arguments], env=environment, timeout=60, **piped)


# ---- text of anybody's


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain, größer, 日本", "plain, größer, 日本"),
        (os.fsdecode(FORGED), ESCAPED),
        ("\x7f\x9b\u2028\0", r"\x7f\x9b\u2028\x00"),
    ],
)
def test_what_is_not_printable_is_escaped(text: str, expected: str) -> None:
    assert output.printable(text) == expected


def test_names_of_anybodys_do_not_disturb_what_is_printed(namespace: str) -> None:
    stray, others = (f"{prefix}.{namespace}".encode() + FORGED for prefix in ("shmcast", "others"))
    with file_of(stray), file_of(others):
        done = run("--dry-run", "--foreign", "--pattern", f"others.{namespace}*")
    assert done.returncode in (0, 3)  # there may be others' arenas
    assert done.stderr == b""
    assert f"shmcast.{namespace}{ESCAPED}" in done.stdout.decode()
    assert f"others.{namespace}{ESCAPED}" in done.stdout.decode()
    assert b"\x1b" not in done.stdout
    assert not any(line.startswith(b"\x1b[2Jremoved") for line in done.stdout.splitlines())


def test_what_the_encoding_lacks_is_escaped(namespace: str) -> None:
    with file_of(f"shmcast.{namespace}.ü".encode()):
        done = run("--dry-run", encoding="ascii")
    assert rf"shmcast.{namespace}.\xfc".encode() in done.stdout
    assert done.stderr == b""


def test_commands_of_anybodys_are_escaped_by_ls(namespace: str, capsys, monkeypatch) -> None:
    with shmcast.Arena.create("1MiB"):
        seen = looks.survey(namespace)
    seen[0]["owner"]["command"] = os.fsdecode(FORGED)
    monkeypatch.setattr(looks, "survey", lambda _: seen)
    assert tool.main(["ls", "--namespace", namespace]) == 0
    said = capsys.readouterr()
    assert f"({ESCAPED}), alive" in said.out
    assert (said.out.count("\n"), said.err) == (4, "")


def test_names_of_anybodys_are_escaped_by_doctor(capsys, monkeypatch) -> None:
    text = os.fsdecode(FORGED)
    monkeypatch.setattr(doctor, "read", lambda: None)
    monkeypatch.setattr(doctor, "judge", lambda *_: [doctor.Finding("fault", "leftovers", text, text, text)])
    assert tool.main(["doctor"]) == 2
    assert capsys.readouterr().out.splitlines() == [
        f"fault   {ESCAPED}", f"        why:  {ESCAPED}", f"        mend: {ESCAPED}",
    ]  # fmt: skip


# ---- output that can not be written


def dead(namespace: str) -> str:
    name = names.segment_name(namespace, 5, 0)[1:]
    (SHM / name).touch()
    return name


@pytest.fixture(params=["full", "unread", "closed"])
def nowhere(request: pytest.FixtureRequest) -> Iterator[tuple[dict[str, object], bytes]]:
    """A stdout that takes nothing, and what is said of it on stderr."""
    reading, writing = os.pipe()
    os.close(reading)
    with open("/dev/full", "w") as full, os.fdopen(writing) as unread:
        yield {
            "full": ({"stdout": full}, b"write to stdout: [Errno 28] No space left on device\n"),
            "unread": ({"stdout": unread}, b""),
            "closed": ({"stdout": None, "preexec_fn": lambda: os.close(1)}, b""),
        }[request.param]


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_the_exit_code_is_what_was_done_whoever_reads(namespace: str, form: list[str], nowhere) -> None:
    stdout, said = nowhere
    name = dead(namespace)
    for arguments, code in ((["--dry-run"], 3), ([], 0)):
        done = run("--namespace", namespace, *form, *arguments, **stdout)
        assert (done.returncode, done.stderr) == (code, said)
        assert (SHM / name).exists() == bool(code)


def test_the_exit_code_is_what_was_found_whoever_reads(namespace: str, nowhere) -> None:
    stdout, said = nowhere
    for arguments, code in ((["ls", "--json", "--namespace", namespace], 0), (["doctor", "--expect", "999TiB"], 2)):
        done = run(*arguments, module="shmcast", **stdout)
        assert (done.returncode, done.stderr) == (code, said)


def test_where_there_is_no_stderr_either(namespace: str) -> None:
    with open("/dev/full", "w") as full:
        assert run("--namespace", namespace, stdout=full, stderr=full).returncode == 0


# ---- lines that nobody waits for


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    yield reading, writing
    for fd in (reading, writing):
        with contextlib.suppress(OSError):
            os.close(fd)


def lines_of(fd: int) -> Iterator[str]:
    with os.fdopen(os.dup(fd)) as file:
        for line in file:
            yield line.rstrip("\n")


def test_lines_that_nobody_takes_are_counted(pipe, monkeypatch) -> None:
    monkeypatch.setattr(output, "_MOST_BYTES", 10 * PIPE_BYTES)
    reading, writing = pipe
    lines = output.Lines(writing, lambda count: f"lost {count}")
    for number in range(10_000):
        lines.put(f"line {number}".ljust(99))
    got = lines_of(reading)
    numbers: list[int] = []
    lost = 0
    while len(numbers) + lost < 10_000:
        word, number = next(got).split()
        if word == "line":
            numbers.append(int(number))
        else:
            lost += int(number)
    assert numbers == sorted(numbers)
    assert lost > 0
    lines.put("and so on")
    assert next(got) == "and so on"
    lines.close()
    got.close()


def test_lines_that_can_not_be_written_are_counted(pipe, monkeypatch) -> None:
    reading, writing = pipe
    tried = threading.Semaphore(0)
    write = os.write

    def note(fd: int, data: bytes) -> int:
        try:
            return write(fd, data[:7])  # the disk is full in the middle of a line
        finally:
            if fd == target:
                tried.release()

    with open("/dev/full", "w") as full:
        target = os.dup(full.fileno())
    monkeypatch.setattr(os, "write", note)
    lines = output.Lines(target, lambda count: f"lost {count}")
    for _ in range(3):
        lines.put("nobody reads this")
        tried.acquire()
    os.dup2(writing, target)
    lines.put("the disk has room")
    got = lines_of(reading)
    assert next(got) == "the disk has room"
    assert next(got) == "lost 3"
    lines.close()
    got.close()
    os.close(target)


def test_a_line_that_was_torn_is_not_the_beginning_of_the_next(pipe, monkeypatch) -> None:
    reading, writing = pipe
    write = os.write
    outcomes = iter([5, OSError(28, "No space left on device")])

    def tear(fd: int, data: bytes) -> int:
        outcome = next(outcomes, len(data)) if fd == writing else len(data)
        if isinstance(outcome, OSError):
            failed.set()
            raise outcome
        return write(fd, data[:outcome])

    failed = threading.Event()
    monkeypatch.setattr(os, "write", tear)
    lines = output.Lines(writing, lambda count: f"lost {count}")
    lines.put("a line that is torn")
    failed.wait()
    lines.put("another")
    lines.close()
    os.close(writing)
    assert list(lines_of(reading)) == ["a lin", "another", "lost 1"]


def test_a_descriptor_that_does_not_block_is_waited_for(pipe) -> None:
    reading, writing = pipe
    os.set_blocking(writing, False)
    lines = output.Lines(writing, lambda count: f"lost {count}")
    for number in range(1000):
        lines.put(f"line {number}")
    got = lines_of(reading)
    assert [next(got) for _ in range(1000)] == [f"line {number}" for number in range(1000)]
    lines.close()
    got.close()


def test_lines_for_nowhere() -> None:
    lines = output.Lines(None, lambda count: f"lost {count}")
    lines.put("x")
    lines.close()
    assert not lines._thread.is_alive()
