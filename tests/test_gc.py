"""What is to be done with what was seen: `plan` on scans made by hand, `scan` and `apply` on files made by hand."""

from __future__ import annotations

import errno
import itertools
import os
import random
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

import shmcast
from shmcast import _native, gc, names
from shmcast.gc import Control, Scan, Segment

SHM = Path(names.DIRECTORY)
UID = 1000
KEY = ("space", 0xABC)


def segment(number: int, key: gc.Key | None = KEY, **fields: object) -> Segment:
    name = names.segment_name(*key, number)[1:] if key else "shmcast.odd"
    return Segment(name, key, number, "file", 4096, UID)._replace(**fields)


def seen(control: Control | None, *segments: Segment) -> Scan:
    return Scan(UID, 2, segments or (segment(0), segment(1)), {} if control is None else {KEY: control})


CASES = {
    "owner-alive": seen(Control(True, 2, pid=7, command="serve")),
    "owner-paused": seen(Control(True, 2, pid=7, command="serve", paused=True)),
    "at-work": seen(Control(True, 0)),
    "ending": seen(Control(True, 2, ended=True)),
    "newer-format": seen(Control(False, 3)),
    "unknown": seen(Control(None, trouble="Too many open files")),
    "owner-dead": seen(Control(False, 2, pid=7, command="serve")),
    "unfinished": seen(Control(False, 0)),
    "no-control": seen(None, segment(1), segment(2)),
    "other-user": seen(Control(False, 2), segment(0, uid=UID + 1)),
    "no-file": seen(Control(False, 2), segment(0, kind="symlink")),
    "no-arena": seen(None, segment(0, uid=UID + 1), segment(1)),
    "no-name": seen(None, segment(-1, None)),
}


@pytest.mark.parametrize("reason", CASES)
def test_every_reason(reason: str) -> None:
    verdicts = gc.plan(CASES[reason]).verdicts
    assert reason in {verdict.reason for verdict in verdicts}
    for verdict in verdicts:
        assert verdict.action == gc.REASONS[verdict.reason].split(":")[0]
        assert verdict.why


def test_no_reason_is_without_a_case() -> None:
    assert set(CASES) == set(gc.REASONS)


@pytest.mark.parametrize("reason", ["owner-alive", "owner-paused", "at-work", "ending", "newer-format", "unknown"])
def test_the_living_and_the_doubtful_keep_all_they_have(reason: str) -> None:
    assert not gc.plan(CASES[reason]).removals


def test_an_older_format_goes_a_newer_one_stays() -> None:
    assert gc.plan(seen(Control(False, 1))).removals
    assert not gc.plan(seen(Control(False, 3))).removals


def test_what_is_said_names_the_process() -> None:
    for reason in ("owner-alive", "owner-paused", "owner-dead"):
        (why,) = {verdict.why for verdict in gc.plan(CASES[reason]).verdicts}
        assert "pid 7, serve" in why
    assert "paused" in gc.plan(CASES["owner-paused"]).verdicts[0].why
    assert "format 3, this build reads 2" in gc.plan(CASES["newer-format"]).verdicts[0].why


def test_odd_things_in_a_dead_arena_stay_the_rest_goes() -> None:
    scan = seen(
        Control(False, 2),
        segment(0),
        segment(1),
        segment(2, kind="directory"),
        segment(3, uid=UID + 1),
        segment(4, kind="symlink"),
    )
    assert [verdict.segment.number for verdict in gc.plan(scan).removals] == [0, 1]


def test_data_of_an_arena_whose_control_is_not_ours_stays() -> None:
    for odd in (segment(0, kind="symlink"), segment(0, uid=UID + 1)):
        plan = gc.plan(seen(None, odd, segment(1)))
        assert not plan.removals
        assert plan.verdicts[1].reason == "no-arena"


def test_control_that_went_meanwhile_leaves_data_to_nobody() -> None:
    assert {verdict.reason for verdict in gc.plan(seen(None, segment(0), segment(1))).verdicts} == {"no-control"}


def test_only_the_living_are_scrubbed() -> None:
    assert gc.plan(seen(Control(True, 2, lost_peers=1))).scrubs == (KEY,)
    assert gc.plan(seen(Control(True, 2, lost_peers=1, paused=True))).scrubs == (KEY,)
    for control in (Control(True, 2), Control(False, 2, lost_peers=1), Control(True, 2, lost_peers=1, ended=True)):
        assert gc.plan(seen(control)).scrubs == ()


def test_the_order_of_what_was_seen_does_not_matter(seed: int) -> None:
    keys = [("space", n) for n in range(4)]
    segments = [segment(number, key) for key in keys for number in range(3)]
    controls = dict(zip(keys, [Control(True, 2), Control(False, 2), Control(False, 0), Control(True, 2)], strict=True))
    expected = gc.plan(Scan(UID, 2, tuple(segments), controls))
    random.Random(seed).shuffle(segments)
    shuffled = dict(reversed(controls.items()))
    assert gc.plan(Scan(UID, 2, tuple(segments), shuffled)) == expected
    assert [verdict.segment.key for verdict in expected.removals] == [keys[1]] * 3 + [keys[2]] * 3


# ---- files made by hand: a control segment without a header, which nobody has locked, is a dead arena


def dead(namespace: str, arena: int, data: int = 1) -> None:
    for number in range(data + 1):
        (SHM / names.segment_name(namespace, arena, number)[1:]).write_bytes(b"x" * 100)


def files(namespace: str) -> set[str]:
    return {path.name for path in SHM.glob(f"shmcast.{namespace}.*")}


def sweep(namespace: str, **options: object) -> gc.Report:
    return gc.apply(gc.plan(gc.scan(namespace)), **options)


def test_a_dead_arena_goes_and_what_went_is_said(namespace: str) -> None:
    dead(namespace, 5, data=2)
    left = files(namespace)
    report = sweep(namespace)
    assert files(namespace) == set()
    assert {one.name for one in report.removed} == left
    assert report.removed[-1].name.endswith(".0")
    assert (report.arenas, report.nbytes, report.failed, report.stopped) == (1, 300, (), False)
    assert sweep(namespace) == gc.Report(stopped=False)


def test_the_listing_is_made_anew_under_the_lock(namespace: str) -> None:
    """The owner may have grown between the look and its death."""
    dead(namespace, 5)
    plan = gc.plan(gc.scan(namespace))
    dead(namespace, 5, data=4)
    assert len(gc.apply(plan).removed) == 5
    assert files(namespace) == set()


def limit_files(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """As if so many files might be open: a sweep takes a quarter of them."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (number, number))


def noted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is done, in order: "take", "list" and "unlink"."""
    done: list[str] = []
    take, listing, unlink = _native.take_owner_byte, names.listing, names.unlink
    monkeypatch.setattr(_native, "take_owner_byte", lambda fd: done.append("take") or take(fd))
    monkeypatch.setattr(names, "listing", lambda *args: done.append("list") or listing(*args))
    monkeypatch.setattr(names, "unlink", lambda name: done.append("unlink") or unlink(name))
    return done


def test_one_listing_serves_many_arenas(namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for arena in range(200):
        dead(namespace, arena)
    limit_files(monkeypatch, 1024)
    done = noted(monkeypatch)
    assert sweep(namespace).arenas == 200
    assert done.count("list") == 2  # the look, and the one under all locks


@pytest.mark.parametrize("limit", [resource.RLIM_INFINITY, 3, 1 << 20])
def test_any_limit_of_open_files_will_do(namespace: str, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    for arena in range(3):
        dead(namespace, arena)
    limit_files(monkeypatch, limit)
    assert sweep(namespace).arenas == 3


def test_much_to_free_is_removed_in_parts(namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever forks waits for one part."""
    for arena in range(10):
        dead(namespace, arena)
    monkeypatch.setattr(gc, "_TOGETHER_BYTES", 400)
    done = noted(monkeypatch)
    assert sweep(namespace).arenas == 10
    assert done.count("list") == 1 + 5


def test_a_listing_serves_only_those_that_were_locked_before_it(
    namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who was taken for dead before it had locked its own byte may have lived, and grown, until then."""
    for arena in range(40):
        dead(namespace, arena)
    plan = gc.plan(gc.scan(namespace))
    limit_files(monkeypatch, 128)
    done = noted(monkeypatch)
    gc.apply(plan)
    assert done.count("take") == 40
    assert not any(pair == ("take", "unlink") for pair in itertools.pairwise(done))
    assert done.count("list") == 2


def test_whoever_has_come_back_to_life_is_left_alone(namespace: str) -> None:
    dead(namespace, 5)
    plan = gc.plan(gc.scan(namespace))
    fd = names.open_writable(names.segment_name(namespace, 5, 0))
    try:
        assert _native.take_owner_byte(fd)
        assert gc.apply(plan).removed == ()
        assert {verdict.reason for verdict in gc.plan(gc.scan(namespace)).verdicts} == {"at-work"}
    finally:
        os.close(fd)
    assert gc.apply(plan).arenas == 1


def test_data_whose_control_has_come_since_is_left_alone(namespace: str) -> None:
    dead(namespace, 5)
    control = SHM / names.segment_name(namespace, 5, 0)[1:]
    control.unlink()
    plan = gc.plan(gc.scan(namespace))
    assert {verdict.reason for verdict in plan.verdicts} == {"no-control"}
    control.touch()
    assert gc.apply(plan).removed == ()
    control.unlink()
    assert len(gc.apply(plan).removed) == 1


def stop_after(removed: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """Says stop once so many names are gone."""
    gone: list[str] = []
    unlink = names.unlink
    monkeypatch.setattr(names, "unlink", lambda name: gone.append(name) or unlink(name))
    return lambda: len(gone) >= removed


@pytest.mark.parametrize("count", range(1, 8))
def test_told_to_stop_it_stops_before_the_next_name(
    namespace: str, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    for arena in (5, 6):
        dead(namespace, arena, data=3)
    report = sweep(namespace, stop=stop_after(count, monkeypatch))
    assert (len(report.removed), report.stopped) == (count, True)
    assert len(files(namespace)) == 8 - count
    report = sweep(namespace, stop=lambda: False)
    assert (len(report.removed), report.stopped) == (8 - count, False)


def test_told_to_stop_after_the_last_name_it_is_through(namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dead(namespace, 5, data=3)
    assert not sweep(namespace, stop=stop_after(4, monkeypatch)).stopped


def test_whoever_comes_back_until_all_is_done_gets_there(namespace: str) -> None:
    """Even where there is never time for more than one name."""
    dead(namespace, 5, data=3)
    plan = gc.plan(gc.scan(namespace))
    reports = []
    while not reports or (reports[-1].stopped and len(reports) < 9):
        asked = itertools.count()
        reports.append(gc.apply(plan, stop=lambda asked=asked: next(asked) > 0))
    assert [len(report.removed) for report in reports] == [1, 1, 1, 1]


def test_told_to_stop_a_look_has_seen_whole_arenas(namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for arena in range(5):
        dead(namespace, arena, data=2)
    looks: list[str] = []
    status = names.status
    monkeypatch.setattr(names, "status", lambda name: looks.append(name) or status(name))
    asked = itertools.count()
    scan = gc.scan(namespace, stop=lambda: next(asked) == 2)
    assert len(looks) == len(scan.segments) == 6
    assert {verdict.reason for verdict in gc.plan(scan).verdicts} == {"unfinished"}
    assert sweep(namespace).arenas == 5


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_listing_that_fails_loses_nothing_of_the_report(
    namespace: str, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    for arena in (5, 6):
        dead(namespace, arena)
    plan = gc.plan(gc.scan(namespace))
    limit_files(monkeypatch, 4)  # one at a time
    count = itertools.count(1)
    listing = names.listing

    def fail() -> list[names.Found]:
        if next(count) == fails_at:
            raise OSError(errno.EIO, "Input/output error")
        return listing()

    monkeypatch.setattr(names, "listing", fail)
    report = gc.apply(plan)
    ((name, why),) = report.failed
    assert name == names.segment_name(namespace, 4 + fails_at, 0)[1:]
    assert "Input/output error" in why
    assert {one.key[1] for one in report.removed} == {7 - fails_at}
    monkeypatch.undo()
    assert sweep(namespace).arenas == 1


@pytest.mark.parametrize("number", [0, 1])
def test_data_that_can_not_be_looked_at_stays(namespace: str, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Whether itself or the control segment that would keep it."""
    dead(namespace, 5)
    (SHM / names.segment_name(namespace, 5, 0)[1:]).unlink()
    plan = gc.plan(gc.scan(namespace))
    blind = names.segment_name(namespace, 5, number)
    status = names.status

    def refuse(name: str) -> os.stat_result | None:
        if name == blind:
            raise PermissionError(errno.EACCES, "Permission denied")
        return status(name)

    monkeypatch.setattr(names, "status", refuse)
    report = gc.apply(plan)
    assert report.removed == ()
    assert [name for name, _ in report.failed] == [names.segment_name(namespace, 5, 1)[1:]]
    monkeypatch.undo()
    assert len(gc.apply(plan).removed) == 1


def test_what_can_not_be_removed_is_said_and_the_rest_goes(namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dead(namespace, 5, data=2)
    dead(namespace, 6)
    stuck = names.segment_name(namespace, 5, 1)
    unlink = names.unlink

    def refuse(name: str) -> bool:
        if name == stuck:
            raise PermissionError(1, "not permitted")
        return unlink(name)

    monkeypatch.setattr(names, "unlink", refuse)
    report = sweep(namespace)
    assert [name for name, _ in report.failed] == [stuck[1:]]
    # with its control segment, so that whoever comes next finds an arena
    assert files(namespace) == {stuck[1:], names.segment_name(namespace, 5, 0)[1:]}
    monkeypatch.undo()
    assert len(sweep(namespace).removed) == 2


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("kind", ["directory", "symlink", "fifo"])
def test_odd_kinds_stay_and_disturb_nobody(namespace: str, kind: str, number: int, tmp_path: Path) -> None:
    dead(namespace, 5, data=2)
    dead(namespace, 6)
    odd = SHM / names.segment_name(namespace, 5, number)[1:]
    odd.unlink()
    target = tmp_path / "target"
    target.write_bytes(b"mine")
    {"directory": odd.mkdir, "symlink": lambda: odd.symlink_to(target), "fifo": lambda: os.mkfifo(odd)}[kind]()
    try:
        plan = gc.plan(gc.scan(namespace, closely=True))
        reasons = {verdict.segment.name: verdict.reason for verdict in plan.verdicts}
        assert reasons[odd.name] == "no-file"
        assert not gc.apply(plan).failed
        # an odd control says nothing of its data; an odd data segment keeps nobody
        kept = {odd.name} | {names.segment_name(namespace, 5, n)[1:] for n in (1, 2) if number == 0}
        assert files(namespace) == kept
        assert target.read_bytes() == b"mine"
    finally:
        odd.rmdir() if kind == "directory" else odd.unlink()
        shmcast.sweep()


def test_segments_of_another_user_stay(namespace: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to make files of another user")
    dead(namespace, 5, data=2)
    paths = [SHM / names.segment_name(namespace, 5, number)[1:] for number in range(3)]
    os.chown(paths[2], 12345, 12345)
    assert {one.name for one in sweep(namespace).removed} == {path.name for path in paths[:2]}
    dead(namespace, 6)
    control = SHM / names.segment_name(namespace, 6, 0)[1:]
    os.chown(control, 12345, 12345)
    reasons = {verdict.segment.name: verdict.reason for verdict in gc.plan(gc.scan(namespace)).verdicts}
    assert reasons[control.name] == "other-user"
    assert sweep(namespace).removed == ()
    for path in (paths[2], control):
        path.unlink()
    sweep(namespace)


def test_names_that_are_none_of_ours_are_shown_where_all_are_asked_for(namespace: str) -> None:
    odd = SHM / f"shmcast.{namespace}.oddity"
    odd.touch()
    try:
        everything = gc.plan(gc.scan(closely=True))
        (verdict,) = (one for one in everything.verdicts if one.segment.name == odd.name)
        assert (verdict.action, verdict.reason) == ("keep", "no-name")
    finally:
        odd.unlink()


def few_descriptors(parent, namespace: str) -> None:
    plan = gc.plan(gc.scan(namespace))
    others = [os.open("/", os.O_RDONLY) for _ in range(40)]  # so that a quarter is more than there are left
    opened = len(os.listdir("/proc/self/fd")) - 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 4, opened + 4))
    report = gc.apply(plan)
    parent.send((report.arenas, report.failed))
    for fd in others:
        os.close(fd)


def test_few_descriptors_are_enough(child, namespace: str) -> None:
    for arena in range(50):
        dead(namespace, arena)
    assert child(few_descriptors, namespace).receive() == (50, ())


def test_a_look_opens_for_reading_alone(namespace: str) -> None:
    """What --watch relies on: it would wake itself otherwise."""
    inotify = pytest.importorskip("inotify_simple")
    with shmcast.Arena.create("1MiB"), inotify.INotify() as events:
        events.add_watch(names.DIRECTORY, inotify.flags.CLOSE_WRITE | inotify.flags.CLOSE_NOWRITE)
        assert gc.scan(namespace, closely=True).controls
        masks = [event.mask for event in events.read(timeout=0) if event.name.startswith(f"shmcast.{namespace}.")]
        assert masks
        assert not any(mask & inotify.flags.CLOSE_WRITE for mask in masks)


def test_where_there_is_no_dev_shm_there_is_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(names, "DIRECTORY", str(tmp_path / "nowhere"))
    assert gc.scan(closely=True).segments == ()
