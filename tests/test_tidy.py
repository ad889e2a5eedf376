"""Where a sweep runs by itself: who creates an arena, who joins one, who finds the host full. Nobody waits for it who need not."""

from __future__ import annotations

import errno
import itertools
import os
import threading
import types

import numpy as np
import pytest

import shmcast
from shmcast import gc, growth, names, process


def owner(parent) -> None:
    """An arena with three blocks, kept."""
    with shmcast.Arena.create("1MiB") as arena:
        handles = [arena.publish(np.full(3, n, "u1"), readers=0, keep=True) for n in range(3)]
        parent.send([handle.to_bytes() for handle in handles])
        parent.receive()


def arenas(namespace: str | None) -> set[int]:
    return {found.arena for found in names.listing(namespace)}


def tidied() -> None:
    """Wait for what runs in the background."""
    for thread in threading.enumerate():
        if thread.name == "shmcast-tidy":
            thread.join()


@pytest.fixture(autouse=True)
def afresh(monkeypatch):
    """As in a process that has not tidied up yet."""
    monkeypatch.setattr(process, "_tidied_s", {})
    yield
    tidied()


@pytest.fixture
def scans(monkeypatch):
    """Arguments of the scans that are made."""
    made = []
    scan = gc.scan
    monkeypatch.setattr(gc, "scan", lambda *args, **how: made.append(how) or scan(*args, **how))
    return made


def test_who_joins_sweeps(child, namespace) -> None:
    dying, living = child(owner), child(owner)
    old, (fresh, *_) = dying.receive(), living.receive()
    dying.kill()
    assert len(arenas(namespace)) == 2
    assert shmcast.attach(fresh).array[0] == 0
    tidied()
    assert arenas(namespace) == {shmcast.Handle.from_bytes(fresh).arena}
    with pytest.raises(shmcast.ArenaGoneError):
        shmcast.attach(old[0])


def holder(parent, raw: bytes) -> None:
    lease = shmcast.attach(raw)
    parent.send("has it")
    parent.receive()
    lease.release()


def test_who_comes_gives_back_what_dead_readers_hold(child, namespace) -> None:
    living = child(owner)
    raws = living.receive()
    reader = child(holder, raws[1])
    reader.receive()
    reader.kill()
    control = f"/dev/shm{names.segment_name(namespace, shmcast.Handle.from_bytes(raws[0]).arena, 0)}"
    with open(control, "rb") as file:
        assert gc.plan(gc.scan(namespace, closely=True)).scrubs
        with shmcast.Arena.create("1MiB"):
            tidied()
        assert not gc.plan(gc.scan(namespace, closely=True)).scrubs
        assert file.read(8)


def test_the_arena_that_is_joined_is_spared(child, namespace) -> None:
    """Its owner may have sent the handle, and died."""
    peer = child(owner)
    raws = peer.receive()
    peer.kill()
    assert shmcast.attach(raws[1]).array[0] == 1
    tidied()
    assert arenas(namespace)
    assert shmcast.sweep().arenas == 1


def test_who_comes_again_soon_does_not_tidy_up_again(child, scans) -> None:
    handles = [child(owner).receive()[0] for _ in range(3)]
    for raw in handles:
        shmcast.attach(raw).release()
    tidied()
    assert len(scans) == 1
    process._tidied_s.clear()
    process.leave_all()
    shmcast.attach(handles[0]).release()
    tidied()
    assert len(scans) == 2


def test_so_many_arenas_and_no_more(namespace, scans) -> None:
    for arena in range(100):
        os.close(names.create(names.segment_name(namespace, arena, 0)))
    process.tidy_now_and_then(namespace, 0)
    tidied()
    assert [len(how["listed"]) for how in scans] == [process._TIDY_ARENAS]
    assert len(arenas(namespace)) == 100 - process._TIDY_ARENAS
    shmcast.sweep()


def test_nobody_waits_for_it(child, namespace, monkeypatch) -> None:
    """Neither who attaches nor who forks, however much the dead have left."""
    dying, living = child(owner), child(owner)
    dying.receive()
    raw = living.receive()[0]
    dying.kill()
    go_on = threading.Event()
    scan = gc.scan
    monkeypatch.setattr(gc, "scan", lambda *args, **how: go_on.wait() and scan(*args, **how))
    assert shmcast.attach(raw).array[0] == 0
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert len(arenas(namespace)) == 2
    go_on.set()
    tidied()
    assert len(arenas(namespace)) == 1


def test_it_is_done_in_slices(child, namespace, monkeypatch) -> None:
    """Between which who forks gets the guard."""
    peers = [child(owner) for _ in range(3)]
    for peer in peers:
        peer.receive()
    for peer in peers:
        peer.kill()
    todo = gc.plan(gc.scan(namespace))
    ticks = itertools.count()
    with monkeypatch.context() as patched:
        patched.setattr(process, "_TIDY_SLICE_S", 1.5)
        patched.setattr(process, "time", types.SimpleNamespace(monotonic=lambda: next(ticks)))
        assert process._tidy_a_little(todo)
    assert len(names.listing(namespace)) == 5  # one of two a process
    assert not process._tidy_a_little(todo)
    assert arenas(namespace) == set()


# ---- a full host


def make_full(monkeypatch, until) -> None:
    """Segments can be added only once ``until`` says so."""
    add = growth.Segments.add

    def add_if_there_is_room(segments: growth.Segments, size: int) -> None:
        if not until():
            raise OSError(errno.ENOSPC, "no space")
        add(segments, size)

    monkeypatch.setattr(growth.Segments, "add", add_if_there_is_room)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_full_host_is_swept_before_growing_fails(child, namespace, monkeypatch, elsewhere) -> None:
    """What the dead have left is in the way of a segment, in whatever namespace: it goes, and the segment is made."""
    theirs = f"{namespace}-b" if elsewhere else namespace
    monkeypatch.setattr(growth.Segments, "grow_ahead", lambda segments: 1 << 62)
    with shmcast.Arena.create("3MiB", segment_bytes="1MiB") as arena:
        tidied()
        arena.publish(np.zeros(1 << 20, np.uint8), readers=0, keep=True)
        peer = child(owner, SHMCAST_NAMESPACE=theirs)
        peer.receive()
        peer.kill()
        make_full(monkeypatch, lambda: not arenas(theirs) - {arena.id})
        handle = arena.publish(np.ones(1 << 20, np.uint8), readers=0, keep=True)
        assert shmcast.attach(handle).array[5] == 1
        assert arenas(theirs) <= {arena.id}


def test_a_host_that_stays_full_is_not_swept_all_the_time(monkeypatch) -> None:
    from shmcast import arena as arena_module

    monkeypatch.setattr(growth.Segments, "grow_ahead", lambda segments: 1 << 62)
    with shmcast.Arena.create("3MiB", segment_bytes="1MiB") as arena:
        arena.publish(np.zeros(1 << 20, np.uint8), readers=0, keep=True)
        sweeps = []
        sweep = arena_module.sweep_everywhere
        monkeypatch.setattr(arena_module, "sweep_everywhere", lambda: sweeps.append(1) or sweep())
        monkeypatch.setattr(arena_module, "_SWEEP_AGAIN_S", 3600.0)
        make_full(monkeypatch, lambda: False)
        for _ in range(5):
            with pytest.raises(shmcast.ArenaFullError, match="bytes free of"):
                arena.publish(np.ones(1 << 20, np.uint8), readers=0, keep=True)
        assert sweeps == [1]
