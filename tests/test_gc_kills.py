"""Sweeping among real processes: who is killed, stopped, or sweeps at the same time."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest

import shmcast
from shmcast import _native, gc, names

SHM = Path(names.DIRECTORY)


def owner(parent) -> None:
    with shmcast.Arena.create("4MiB", segment_bytes="1MiB", max_blocks=64) as arena:
        handles = [arena.publish(np.full(1 << 20, n, np.uint8), readers=0, keep=True) for n in range(2)]
        parent.send([handle.to_bytes() for handle in handles])
        while True:
            parent.receive()
            parent.send(arena.publish(np.full(100, 7, np.uint8), readers=0, keep=True).to_bytes())


def reader(parent, raws) -> None:
    leases = [shmcast.attach(raw) for raw in raws]
    parent.send(len(leases))
    parent.receive()
    parent.send([int(lease.array[0]) for lease in leases])


def files(namespace: str) -> set[str]:
    return {path.name for path in SHM.glob(f"shmcast.{namespace}.*")}


def inside(raw: bytes) -> dict:
    handle = shmcast.Handle.from_bytes(raw)
    fd = names.open_readable(names.segment_name(handle.namespace, handle.arena, 0))
    try:
        return _native.inspect(fd)
    finally:
        os.close(fd)


def holders(raw: bytes) -> dict[int, int]:
    return {peer["index"]: peer["holds"] for peer in inside(raw)["peers"] if peer["index"]}


def reasons(namespace: str) -> set[str]:
    return {verdict.reason for verdict in gc.plan(gc.scan(namespace, closely=True)).verdicts}


# ---- the living


def test_a_stopped_owner_is_paused_not_dead(child, namespace) -> None:
    peer = child(owner)
    raws = peer.receive()
    assert reasons(namespace) == {"owner-alive"}
    peer.signal(signal.SIGSTOP)
    os.waitid(os.P_PID, peer.pid, os.WSTOPPED | os.WNOWAIT)
    before = files(namespace)
    assert reasons(namespace) == {"owner-paused"}
    assert gc.apply(gc.plan(gc.scan(namespace, closely=True))) == gc.Report()
    assert files(namespace) == before
    peer.signal(signal.SIGCONT)
    peer.send()
    assert shmcast.attach(peer.receive()).array[0] == 7
    assert shmcast.attach(raws[1]).array[0] == 1


def test_dead_readers_of_a_live_arena_are_scrubbed_and_no_others(child, namespace) -> None:
    raws = child(owner).receive()
    living, dying, stopped = (child(reader, raws) for _ in range(3))
    for process_ in (living, dying, stopped):
        assert process_.receive() == 2
    stopped.signal(signal.SIGSTOP)
    dying.kill()
    seen = gc.scan(namespace, closely=True)
    (control,) = seen.controls.values()
    assert (control.peers, control.lost_peers) == (3, 1)
    assert sorted(holders(raws[0]).values()) == [2, 2, 2]
    report = gc.apply(gc.plan(seen))
    assert list(report.scrubbed.values()) == [1]
    assert report.removed == ()
    assert sorted(holders(raws[0]).values()) == [0, 2, 2]
    assert inside(raws[0])["metrics"][_first_word("swept")] == 1
    assert gc.plan(gc.scan(namespace, closely=True)).scrubs == ()
    stopped.signal(signal.SIGCONT)
    for process_ in (living, stopped):
        process_.send()
        assert process_.receive() == [0, 1]


def _first_word(name: str) -> int:
    return next(first for metric, _, first, _ in _native.METRICS if metric == name)


def test_sweep_scrubs_too(child) -> None:
    raws = child(owner).receive()
    dying = child(reader, raws)
    dying.receive()
    dying.kill()
    assert shmcast.sweep(peers=False) == (0, (), 0)
    assert holders(raws[0]) == {1: 2}
    assert shmcast.sweep() == (0, (), 0)
    assert holders(raws[0]) == {1: 0}


def test_what_is_no_live_arena_is_not_scrubbed(child, namespace) -> None:
    raws = child(owner).receive()
    dying = child(reader, raws)
    dying.receive()
    dying.kill()
    handle = shmcast.Handle.from_bytes(raws[0])
    name = names.segment_name(namespace, handle.arena, 0)
    fd = names.open_writable(name)
    try:
        assert _native.mark_ended(fd)
        assert _native.scrub_dead_peers(fd) == 0
    finally:
        os.close(fd)
    with pytest.raises(TypeError):
        _native.scrub_dead_peers("0")
    path = SHM / f"shmcast.{namespace}.{5:016x}.0"
    path.write_bytes(b"x" * 100_000)
    fd = names.open_writable(f"/{path.name}")
    try:
        assert _native.probe(fd) == (False, 0)
        with pytest.raises(shmcast.ArenaError):
            _native.scrub_dead_peers(fd)
    finally:
        os.close(fd)
    path.unlink()


def test_probe(child, namespace) -> None:
    peer = child(owner)
    handle = shmcast.Handle.from_bytes(peer.receive()[0])
    name = names.segment_name(namespace, handle.arena, 0)
    for killed in (False, True):
        if killed:
            peer.kill()
        for opened in (names.open_readable, names.open_writable):
            fd = opened(name)
            try:
                assert _native.probe(fd) == (not killed, _native.FORMAT)
            finally:
                os.close(fd)
    shmcast.sweep()


# ---- sweepers that are killed


def dies_at(parent, namespace: str, count: int) -> None:
    """Removes that many names, and is killed before the next one."""
    unlink = names.unlink

    def unlink_or_die(name: str) -> bool:
        nonlocal count
        if not count:
            os.kill(os.getpid(), signal.SIGKILL)
        count -= 1
        return unlink(name)

    names.unlink = unlink_or_die
    gc.apply(gc.plan(gc.scan(namespace)))
    parent.send("through")


@pytest.mark.parametrize("count", range(8))
def test_a_sweeper_killed_half_way_is_finished_by_the_next(child, namespace, count) -> None:
    """Two arenas of a control segment and three data segments: it dies before every one of the eight names."""
    for arena in (5, 6):
        for number in range(4):
            (SHM / names.segment_name(namespace, arena, number)[1:]).write_bytes(b"x")
    child(dies_at, namespace, count).wait(-signal.SIGKILL)
    left = names.listing(namespace)
    assert len(left) == 8 - count
    # whoever comes next finds an arena, not loose ends: data goes first
    assert {found.arena for found in left} == {found.arena for found in left if found.number == 0}
    report = gc.apply(gc.plan(gc.scan(namespace)))
    assert len(report.removed) == 8 - count
    assert files(namespace) == set()


def stops_at_first(parent, namespace: str) -> None:
    unlink = names.unlink

    def unlink_later(name: str) -> bool:
        parent.send("has the byte")
        parent.receive()
        names.unlink = unlink
        return unlink(name)

    names.unlink = unlink_later
    parent.send(len(gc.apply(gc.plan(gc.scan(namespace))).removed))


@pytest.mark.parametrize("killed", [False, True])
def test_one_sweeper_an_arena(child, namespace, killed) -> None:
    peer = child(owner)
    peer.receive()
    peer.kill()
    first = child(stops_at_first, namespace)
    assert first.receive() == "has the byte"
    before = files(namespace)
    assert reasons(namespace) == {"ending"}
    assert shmcast.sweep() == (0, (), 0)
    assert files(namespace) == before
    if killed:
        first.kill()
        assert shmcast.sweep().arenas == 1
    else:
        first.send()
        assert first.receive() == len(before)
    assert files(namespace) == set()
