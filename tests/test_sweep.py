"""Giving back what the dead have left, and nothing else."""

import os
import threading
from pathlib import Path

import numpy as np
import pytest

import shmcast
from shmcast import _native, names
from shmcast.errors import ArenaError, ArenaGoneError

SHM = Path(names.DIRECTORY)


def owner(parent) -> None:
    with shmcast.Arena.create("3MiB", segment_bytes="1MiB") as arena:
        handles = [arena.publish(np.full(1 << 20, n, np.uint8), readers=0, keep=True) for n in range(3)]
        parent.send([handle.to_bytes() for handle in handles])
        parent.receive()


def reader(parent, raws) -> None:
    leases = [shmcast.attach(raw) for raw in raws]
    parent.send(len(leases))
    parent.receive()


def kill_owners(child, count: int) -> None:
    """That many dead arenas; the owners live at the same time, or each would sweep those before it."""
    owners = [child(owner) for _ in range(count)]
    for process in owners:
        process.receive()
    for process in owners:
        process.kill()


def files(namespace: str) -> set[str]:
    return {path.name for path in SHM.glob(f"shmcast.{namespace}.*")}


def test_nothing_to_do() -> None:
    assert shmcast.sweep() == (0, (), 0)
    with pytest.raises(ValueError, match="namespace"):
        shmcast.sweep("a/b")


def test_kill_everybody_then_one_sweep(child, namespace) -> None:
    peer = child(owner)
    raws = peer.receive()
    readers = [child(reader, raws) for _ in range(3)]
    for process in readers:
        assert process.receive() == 3
    for process in [peer, *readers]:
        process.kill()
    left = files(namespace)
    assert len(left) == 4
    report = shmcast.sweep()
    assert (report.arenas, set(report.segments)) == (1, left)
    assert report.nbytes > 3 << 20
    assert files(namespace) == set()
    for raw in raws:
        with pytest.raises(ArenaGoneError):
            shmcast.attach(raw)


@pytest.mark.parametrize("stopped", [False, True])
def test_the_living_are_left_alone(child, namespace, stopped) -> None:
    peer = child(owner)
    raws = peer.receive()
    if stopped:
        peer.signal(19)
    before = files(namespace)
    with shmcast.Arena.create("1MiB") as mine:
        assert shmcast.sweep().arenas == 0
        assert mine.publish(np.zeros(3)).nbytes == 24
    assert files(namespace) == before
    assert shmcast.attach(raws[2]).array[5] == 2
    if stopped:
        peer.signal(18)


def test_create_sweeps_its_namespace_and_no_other(child, namespace, monkeypatch) -> None:
    kill_owners(child, 3)
    with shmcast.Arena.create("1MiB", namespace=f"{namespace}-b"):
        assert len(files(namespace)) == 12
        monkeypatch.setenv("SHMCAST_NAMESPACE", f"{namespace}-b")
        assert shmcast.sweep().arenas == 0
        assert shmcast.sweep(namespace).arenas == 3
    assert files(namespace) == set()


@pytest.mark.parametrize("content", [b"", b"x", b"x" * 100_000, bytes(100_000)])
def test_a_control_segment_of_a_creator_that_died_early(namespace, content) -> None:
    name = names.segment_name(namespace, 5, 0)
    (SHM / name[1:]).write_bytes(content)
    assert shmcast.sweep() == (1, (name[1:],), len(content))


def test_a_creator_at_work_is_left_alone(namespace) -> None:
    name = names.segment_name(namespace, 5, 0)
    fd = names.create(name)
    lock = names.open_writable(name)
    try:
        assert _native.take_owner_byte(lock)
        assert shmcast.sweep() == (0, (), 0)
        assert names.exists(name)
    finally:
        os.close(lock)
        os.close(fd)
    assert shmcast.sweep().arenas == 1


def test_data_without_control(namespace) -> None:
    for number in (1, 7):
        os.close(names.create(names.segment_name(namespace, 5, number)))
    assert set(shmcast.sweep().segments) == files(namespace) | {
        names.segment_name(namespace, 5, number)[1:] for number in (1, 7)
    }
    assert files(namespace) == set()


def test_control_that_appears_after_the_listing_protects_its_data(namespace, monkeypatch) -> None:
    """Data of an arena that was being created while /dev/shm was read."""
    with shmcast.Arena.create("1MiB") as arena:
        listing = names.listing
        monkeypatch.setattr(names, "listing", lambda space=None: [found for found in listing(space) if found.number])
        assert shmcast.sweep() == (0, (), 0)
        assert shmcast.attach(arena.publish(np.arange(3))).array[2] == 2


def test_a_name_that_means_another_file_by_now(child, namespace, monkeypatch) -> None:
    """Between opening and locking, another sweeper has finished and the name was taken again."""
    peer = child(owner)
    peer.receive()
    peer.kill()
    (control,) = (found for found in names.listing(namespace) if found.number == 0)
    name = names.segment_name(namespace, control.arena, 0)
    take = _native.take_owner_byte

    def take_late(fd: int) -> bool:
        monkeypatch.undo()
        assert shmcast.sweep().arenas == 1
        os.close(names.create(name))
        return take(fd)

    monkeypatch.setattr(_native, "take_owner_byte", take_late)
    assert shmcast.sweep(namespace).arenas == 0
    assert names.exists(name)
    names.unlink(name)


def test_a_directory_of_that_name(namespace) -> None:
    path = SHM / names.segment_name(namespace, 5, 0)[1:]
    path.mkdir()
    try:
        assert shmcast.sweep() == (0, (), 0)
    finally:
        path.rmdir()


def sweeps(parent, count: int) -> None:
    parent.send("ready")
    parent.receive()
    parent.send(sum(len(shmcast.sweep().segments) for _ in range(count)))


def test_sweepers_share_the_work(child, namespace) -> None:
    kill_owners(child, 5)
    sweepers = [child(sweeps, 5) for _ in range(3)]
    for sweeper in sweepers:
        assert sweeper.receive() == "ready"
    for sweeper in sweepers:
        sweeper.send()
    assert sum(sweeper.receive() for sweeper in sweepers) == 20
    assert files(namespace) == set()


def test_creating_and_sweeping_at_once(namespace) -> None:
    """Threads, as create() sweeps itself: whoever creates an arena gets it, whoever else sweeps meanwhile."""
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for n in range(10):
                with shmcast.Arena.create("1MiB") as arena:
                    assert shmcast.attach(arena.publish(np.full(3, n))).array[0] == n
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert files(namespace) == set()


def test_a_link_in_place_of_a_control_segment_disturbs_nobody(namespace) -> None:
    link = f"/dev/shm/shmcast.{namespace}.{0:016x}.0"
    os.symlink("/nowhere", link)
    try:
        assert shmcast.sweep() == (0, (), 0)
        with shmcast.Arena.create("1MiB") as arena:
            foreign = arena.publish(np.zeros(4), keep=True)
            with pytest.raises(ArenaError, match="no regular file"):
                shmcast.attach(foreign._replace(arena=0))
    finally:
        os.unlink(link)
