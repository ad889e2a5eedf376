"""shmcast-gc --watch: it notices who dies, leaves the living alone, and ends when it is told to."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shmcast
from shmcast import _native, gc, names
from shmcast.cli import gc as cli
from shmcast.cli import watch as watching

inotify_simple = pytest.importorskip("inotify_simple")

SHM = Path(names.DIRECTORY)
LINE_TIMEOUT_S = 60.0


class Daemon:
    """A running shmcast-gc --watch; its first line was read."""

    def __init__(self, namespace: str, *options: str) -> None:
        command = [sys.executable, "-m", "shmcast.cli.gc", "--watch", "--json", "--namespace", namespace]
        # Longer than any test: what is removed was noticed, not found by chance.
        self.process = subprocess.Popen([*command, "--rescan", "3600", *options], stdout=subprocess.PIPE)
        self._pending = b""
        self.first = self.event()
        assert self.first["event"] == "watching"

    def event(self, *, stays: bool = False) -> dict[str, Any]:
        """Its next line; those of what stays are left out, as the first look may come before or after the test's arenas."""
        said = self._line()
        while said["event"] == "stays" and not stays:
            said = self._line()
        return said

    def _line(self) -> dict[str, Any]:
        stdout = self.process.stdout
        assert stdout is not None
        while b"\n" not in self._pending:
            assert select.select([stdout], [], [], LINE_TIMEOUT_S)[0], "the daemon says nothing"
            data = os.read(stdout.fileno(), 1 << 16)
            assert data, f"the daemon has ended with {self.process.wait()}"
            self._pending += data
        line, self._pending = self._pending.split(b"\n", 1)
        return json.loads(line)

    def end(self, number: int) -> tuple[int, dict[str, Any]]:
        self.process.send_signal(number)
        last = self.event()
        return self.process.wait(LINE_TIMEOUT_S), last


@pytest.fixture
def daemon(namespace: str) -> Iterator[Callable[..., Daemon]]:
    started: list[Daemon] = []

    def start(*options: str) -> Daemon:
        started.append(Daemon(namespace, *options))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()
        one.process.stdout.close()


def owner(parent) -> None:
    with shmcast.Arena.create("2MiB", segment_bytes="1MiB", max_blocks=64) as arena:
        parent.send(arena.publish(np.full(1000, 7, np.uint8), readers=0, keep=True).to_bytes())
        parent.receive()


def reader(parent, raw) -> None:
    lease = shmcast.attach(raw)
    parent.send(int(lease.array[0]))
    parent.receive()


def files(namespace: str) -> set[str]:
    return {path.name for path in SHM.glob(f"shmcast.{namespace}.*")}


def test_a_killed_owner_is_noticed(child, namespace, daemon) -> None:
    running = daemon()
    assert running.first["namespace"] == namespace
    for _ in range(3):
        peer = child(owner)
        peer.receive()
        left = files(namespace)
        peer.kill()
        said = running.event()
        assert (said["event"], said["arenas"], said["reason"]) == ("removed", 1, "owner-dead")
        assert said["why"].startswith(f"its owner is dead: pid {peer.pid}, ")
        assert set(said["segments"]) == left
        assert files(namespace) == set()
    code, last = running.end(signal.SIGTERM)
    assert (code, last["event"], last["signal"]) == (0, "stopped", "SIGTERM")
    assert (last["arenas"], last["segments"]) == (3, 6)


def test_what_was_there_before_goes_first(namespace, daemon) -> None:
    (SHM / names.segment_name(namespace, 5, 0)[1:]).touch()
    running = daemon()
    assert running.event()["segments"] == [f"shmcast.{namespace}.{5:016x}.0"]
    code, last = running.end(signal.SIGINT)
    assert (code, last["signal"]) == (0, "SIGINT")


def test_a_killed_reader_is_scrubbed_and_the_living_stay(child, namespace, daemon) -> None:
    peer, stopped = child(owner), child(owner)
    raw = peer.receive()
    stopped.receive()
    dying, living = child(reader, raw), child(reader, raw)
    assert (dying.receive(), living.receive()) == (7, 7)
    running = daemon()
    for _ in range(2):
        said = running.event(stays=True)
        assert (said["event"], said["reason"]) == ("stays", "owner-alive")
    stopped.signal(signal.SIGSTOP)
    dying.kill()
    said = running.event()
    assert (said["event"], said["processes"]) == ("scrubbed", 1)
    assert said["arena"] == f"{shmcast.Handle.from_bytes(raw).arena:016x}"
    before = files(namespace)
    other = child(owner)
    other.receive()
    other.kill()
    assert running.event()["event"] == "removed"
    assert files(namespace) == before
    stopped.signal(signal.SIGCONT)
    assert shmcast.attach(raw).array[0] == 7


def test_other_namespaces_are_not_its_business(child, namespace, daemon) -> None:
    running = daemon()
    foreign, own = child(owner, SHMCAST_NAMESPACE=f"{namespace}-b"), child(owner)
    foreign.receive()
    own.receive()
    foreign.kill()
    own.kill()
    assert all(name.startswith(f"shmcast.{namespace}.") for name in running.event()["segments"])
    assert files(f"{namespace}-b")
    assert shmcast.sweep(f"{namespace}-b").arenas == 1


def test_metrics_are_served(child, namespace, daemon) -> None:
    pytest.importorskip("prometheus_client")
    running = daemon("--metrics-port", "0")
    living, dying = child(owner), child(owner)
    living.receive()
    dying.receive()
    dying.kill()
    assert running.event()["event"] == "removed"

    with urllib.request.urlopen(f"http://127.0.0.1:{running.first['metrics_port']}/metrics", timeout=60) as page:
        text = page.read().decode()
    values = {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if line[0] != "#"}
    assert values["shmcast_arenas"] == 1
    assert values["shmcast_processes"] == 1
    assert values["shmcast_segments"] == 2
    assert values["shmcast_used_bytes"] >= 1000
    assert values["shmcast_reserved_bytes"] == 1 << 20
    assert values["shmcast_segment_bytes"] > 1 << 20
    assert values["shmcast_gc_removed_arenas_total"] == 1
    assert values["shmcast_gc_removed_segments_total"] == 2
    assert values["shmcast_gc_removed_bytes_total"] > 1 << 20
    assert values["shmcast_gc_sweeps_total"] >= 1
    assert values["shmcast_gc_errors_total"] == 0
    assert values["shmcast_gc_scrubbed_processes_total"] == 0
    assert 0 < values["shmcast_shm_free_bytes"] <= values["shmcast_shm_size_bytes"]
    assert running.end(signal.SIGTERM)[0] == 0


def test_a_port_that_is_taken(namespace) -> None:
    pytest.importorskip("prometheus_client")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        command = [sys.executable, "-m", "shmcast.cli.gc", "--watch", "--namespace", namespace, "--metrics-port"]
        done = subprocess.run([*command, str(taken.getsockname()[1])], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "--metrics-port: listen at 127.0.0.1:" in done.stderr


def stdout_full(stack: contextlib.ExitStack) -> Any:
    return stack.enter_context(open("/dev/full", "w"))


def stdout_unread(stack: contextlib.ExitStack) -> Any:
    reading, writing = os.pipe()
    os.close(reading)
    return stack.enter_context(os.fdopen(writing, "w"))


def stdout_stuck(stack: contextlib.ExitStack) -> Any:
    """A pipe that is full, and that nobody drains."""
    reading, writing = os.pipe()
    stack.callback(os.close, reading)
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, bytes(1 << 16))
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, b"x")
    os.set_blocking(writing, True)
    return stack.enter_context(os.fdopen(writing, "w"))


@pytest.mark.parametrize("stdout", [stdout_full, stdout_unread, stdout_stuck])
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_what_it_says_is_taken_by_nobody(child, namespace, stdout, form) -> None:
    (SHM / names.segment_name(namespace, 5, 0)[1:]).touch()
    with contextlib.ExitStack() as stack:
        command = [sys.executable, "-m", "shmcast.cli.gc", "--watch", "--namespace", namespace, "--rescan", "3600"]
        process = subprocess.Popen([*command, *form], stdout=stdout(stack), stderr=subprocess.PIPE)
        stack.enter_context(process)
        stack.callback(process.kill)
        gone(namespace, process)  # the first look
        for _ in range(2):
            peer = child(owner)
            peer.receive()
            peer.kill()
            gone(namespace, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(LINE_TIMEOUT_S) == 0
        assert process.stderr.read() == b""


def gone(namespace: str, process: subprocess.Popen[bytes]) -> None:
    """Wait until nothing is left. There is no line to wait for."""
    while files(namespace):
        assert process.poll() is None, process.stderr.read()
        os.sched_yield()


@pytest.mark.parametrize("seconds", ["3000000", "1e10", "inf"])
def test_any_time_between_rescans_will_do(child, namespace, daemon, seconds) -> None:
    running = daemon("--rescan", seconds)
    peer = child(owner)
    peer.receive()
    peer.kill()
    assert running.event()["event"] == "removed"
    assert running.end(signal.SIGTERM)[0] == 0


def test_no_inotify_instance_left_is_not_begun(namespace, capsys, monkeypatch) -> None:
    def refuse() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(inotify_simple, "INotify", refuse)
    assert cli.main(["--watch", "--namespace", namespace]) == cli.NOT_BEGUN
    assert "fs.inotify.max_user_instances" in capsys.readouterr().err


# ---- what is looked at when


class Said:
    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, event: str, **fields: Any) -> None:
        self.events.append((event, fields))


def made(namespace: str | None, rescan_s: float = 1000.0) -> tuple[watching.Watch, Said]:
    said = Said()
    watch = watching.Watch(namespace, said, lambda: False, rescan_s)
    watch.look(0.0)  # the first look is at everything
    return watch, said


def test_an_event_is_looked_at_a_moment_later_and_a_few_times(namespace) -> None:
    with shmcast.Arena.create("1MiB") as arena:
        watch, said = made(namespace)
        watch.heard(f"shmcast.{namespace}.{arena.id:016x}.0", 10.0)
        looks = []
        now = 10.0
        while (wait := watch.wait_s(now)) < 100.0:
            now += wait
            watch.look(now)
            looks.append(round(now - 10.0, 3))
        assert looks == [0.01, 0.06, 0.26, 0.86]
        assert looks[-1] < 1.0
        assert [event for event, _ in said.events] == ["stays"]  # said by the first look


def test_many_events_are_one_look(namespace) -> None:
    for arena in range(50):
        (SHM / names.segment_name(namespace, arena, 0)[1:]).touch()
    watch = watching.Watch(namespace, Said(), lambda: False, 1000.0)
    watch._next_rescan = 1000.0
    for arena in range(50):
        watch.heard(f"shmcast.{namespace}.{arena:016x}.0", 10.0 + arena / 1e5)
    watch.look(10.02)
    assert (watch.totals.sweeps, watch.totals.arenas) == (1, 50)
    assert watch.wait_s(10.02) == pytest.approx(989.98)


def test_a_look_is_not_sooner_than_the_rest_after_the_last(namespace) -> None:
    with shmcast.Arena.create("1MiB") as arena:
        watch, _ = made(namespace)
        name = f"shmcast.{namespace}.{arena.id:016x}.0"
        watch.heard(name, 10.0)
        watch.look(10.01)
        watch.heard(name, 10.011)
        assert watch.wait_s(10.011) == pytest.approx(0.049)


@pytest.mark.parametrize(
    "file", ["x", "shmcast.odd", "shmcast.{}.0000000000000005.1", "shmcast.other.0000000000000005.0"]
)
def test_what_is_no_control_segment_here_is_not_heard(namespace, file) -> None:
    watch, _ = made(namespace)
    watch.heard(file.format(namespace), 10.0)
    assert watch.wait_s(10.0) == pytest.approx(990.0)


def test_events_that_were_lost_mean_a_look_at_everything(namespace) -> None:
    watch, said = made(namespace)
    (SHM / names.segment_name(namespace, 5, 0)[1:]).touch()
    watch.overflown(10.0)
    assert watch.wait_s(10.0) < 1.0
    watch.look(10.0 + watch.wait_s(10.0))
    assert [event for event, _ in said.events] == ["removed"]


def test_the_rescan_finds_what_nobody_has_heard_of(namespace) -> None:
    watch, said = made(namespace, rescan_s=5.0)
    (SHM / names.segment_name(namespace, 5, 0)[1:]).touch()
    watch.look(4.9)
    assert said.events == []
    watch.look(5.0)
    assert [event for event, _ in said.events] == ["removed"]
    assert watch.wait_s(5.0) == pytest.approx(5.0)


def test_a_failure_is_said_once_and_counted_each_time(namespace, monkeypatch) -> None:
    (SHM / names.segment_name(namespace, 5, 0)[1:]).touch()

    def refuse(name: str) -> bool:
        raise PermissionError(1, "not permitted")

    monkeypatch.setattr(names, "unlink", refuse)
    watch, said = made(namespace, rescan_s=5.0)
    watch.look(5.0)
    assert [event for event, _ in said.events] == ["failed"]
    assert watch.totals.errors == 2
    monkeypatch.undo()
    watch.look(10.0)
    assert said.events[-1][0] == "removed"


def test_a_listing_that_fails_does_not_end_it(namespace, monkeypatch) -> None:
    watch, said = made(namespace, rescan_s=5.0)

    def fails(space: str | None = None) -> list[names.Found]:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(names, "listing", fails)
        watch.look(5.0)
    assert said.events == [("failed", {"name": names.DIRECTORY, "why": "[Errno 24] Too many open files"})]
    watch.look(10.0)
    assert gc.scan(namespace).segments == ()


# ---- what fails again and again


def hear(watch: watching.Watch, events: Any, now: float) -> None:
    """What the daemon's own work has made the kernel say."""
    for event in events.read(timeout=0):
        watch.heard(event.name, now)


def looks_until_quiet(watch: watching.Watch, events: Any, now: float) -> int:
    """How many looks there are before the rescan, if nobody else does anything; some 20 at most."""
    before = watch.totals.sweeps
    while watch.wait_s(now) < 100.0 and watch.totals.sweeps < before + 20:
        now += watch.wait_s(now)
        watch.look(now)
        hear(watch, events, now)
    return watch.totals.sweeps - before


def fails(*_: object) -> None:
    raise PermissionError(errno.EPERM, "not permitted")


@pytest.mark.parametrize("first", ["event", "rescan"])
@pytest.mark.parametrize(("where", "what"), [(names, "unlink"), (_native, "mark_ended"), (_native, "scrub_dead_peers")])
def test_it_is_not_woken_for_ever_by_its_own_failures(child, namespace, monkeypatch, where, what, first) -> None:
    peer = child(owner)
    raw = peer.receive()
    dying = child(reader, raw)
    dying.receive()
    (dying if what == "scrub_dead_peers" else peer).kill()
    if what != "scrub_dead_peers":
        dying.join()
    (control,) = (name for name in files(namespace) if name.endswith(".0"))
    watch = watching.Watch(namespace, Said(), lambda: False, 1000.0)
    with inotify_simple.INotify() as events, monkeypatch.context() as patch:
        events.add_watch(names.DIRECTORY, inotify_simple.flags.CLOSE_WRITE)
        patch.setattr(where, what, fails)
        if first == "event":
            watch._next_rescan = 1000.0
            watch.heard(control, 10.0)
            assert looks_until_quiet(watch, events, 10.0) == len(watching._LOOKS_S)
        else:
            watch.look(10.0)
            hear(watch, events, 10.0)
            assert looks_until_quiet(watch, events, 10.0) == 0
        # the rescan tries once more, and hears nothing of that either
        errors = watch.totals.errors
        watch.look(2000.0)
        hear(watch, events, 2000.0)
        assert looks_until_quiet(watch, events, 2000.0) == 0
        assert watch.totals.errors == errors + 1
    watch.look(3000.0)
    watch.heard(control, 3000.0)
    assert watch.wait_s(3000.0) < 1.0  # it listens again
    assert watch.totals.arenas + watch.totals.processes == 1


def test_told_to_stop_it_looks_no_further(namespace, monkeypatch) -> None:
    (SHM / names.segment_name(namespace, 5, 0)[1:]).touch()
    looks: list[str] = []
    status = names.status
    monkeypatch.setattr(names, "status", lambda name: looks.append(name) or status(name))
    said = Said()
    watching.Watch(namespace, said, lambda: True, 1000.0).look(0.0)
    assert (looks, said.events) == ([], [])
    monkeypatch.undo()
    assert shmcast.sweep().arenas == 1


# ---- what is said


def test_what_goes_is_said_with_its_reason(namespace) -> None:
    for number in (1, 2):
        (SHM / names.segment_name(namespace, 5, number)[1:]).touch()
    (SHM / names.segment_name(namespace, 6, 0)[1:]).touch()
    _, said = made(namespace)
    assert {fields["reason"]: (event, fields["arenas"], len(fields["segments"])) for event, fields in said.events} == {
        "no-control": ("removed", 1, 2),
        "unfinished": ("removed", 1, 1),
    }


def test_a_line_has_so_many_names_at_most(namespace) -> None:
    for arena in range(50):
        for number in range(3):
            (SHM / names.segment_name(namespace, arena, number)[1:]).touch()
    _, said = made(namespace)
    lines = [fields for event, fields in said.events if event == "removed"]
    assert [len(fields["segments"]) for fields in lines] == [64, 64, 22]
    assert len({name for fields in lines for name in fields["segments"]}) == 150
    assert sum(fields["arenas"] for fields in lines) == 50


def test_what_stays_is_said_once_and_when_that_changes(child, namespace) -> None:
    odd = SHM / names.segment_name(namespace, 5, 0)[1:]
    odd.mkdir()
    try:
        peer = child(owner)
        peer.receive()
        watch, said = made(namespace, rescan_s=5.0)
        assert {fields["reason"]: len(fields["segments"]) for _, fields in said.events} == {
            "owner-alive": 2, "no-file": 1,
        }  # fmt: skip
        assert {event for event, _ in said.events} == {"stays"}
        said.events.clear()
        watch.look(5.0)
        assert said.events == []
        peer.signal(signal.SIGSTOP)
        os.waitid(os.P_PID, peer.pid, os.WSTOPPED | os.WNOWAIT)
        watch.look(10.0)
        ((event, fields),) = said.events
        assert (event, fields["reason"], fields["arenas"]) == ("stays", "owner-paused", 1)
        assert "paused" in fields["why"]
        peer.signal(signal.SIGCONT)
    finally:
        odd.rmdir()


def test_names_that_are_none_of_ours_stay_too(namespace) -> None:
    odd = SHM / f"shmcast.{namespace}.oddity"
    odd.touch()
    try:
        said = Said()
        watching.Watch(None, said, lambda: False, 1000.0)._tell_what_stays(gc.plan(gc.scan(closely=True)))
        strays = [fields for _, fields in said.events if fields["reason"] == "no-name"]
        assert odd.name in {name for fields in strays for name in fields["segments"]}
    finally:
        odd.unlink()


def test_a_line_for_people_has_it_all() -> None:
    fields = {"arenas": 1, "segments": ["a", "b"], "nbytes": 4096, "reason": "owner-dead", "why": "its owner is dead"}
    line = watching._describer(False)("removed", **fields)
    assert line == "shmcast-gc: removed arenas 1, 2 segments: a b, 4096 bytes (4.0 KiB), its owner is dead"
