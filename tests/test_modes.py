"""Who may open segments: the same user, or a group where that was asked for; never a stranger's file."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import shmcast
from child import Child, Link
from shmcast import names

SHM = Path("/dev/shm")
NOBODY = 65534
ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: runs processes as other users")


def modes(namespace: str) -> list[tuple[str, int]]:
    return sorted((path.name[-1], stat.S_IMODE(path.stat().st_mode)) for path in SHM.glob(f"shmcast.{namespace}.*"))


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o000])
@pytest.mark.parametrize(
    ("mode", "found"), [(0o600, [("0", 0o600), ("1", 0o600)]), (0o660, [("0", 0o660), ("1", 0o640)])]
)
def test_segments_have_the_mode_that_was_asked_for(
    namespace: str, umask: int, mode: int, found: list[tuple[str, int]]
) -> None:
    before = os.umask(umask)
    try:
        with shmcast.Arena.create("1MiB", mode=mode):
            assert modes(namespace) == found
    finally:
        os.umask(before)


def test_segments_that_are_added_later_too(namespace: str) -> None:
    with shmcast.Arena.create("4MiB", segment_bytes="1MiB", mode=0o660) as arena:
        for _ in range(3):
            arena.publish(np.zeros(900_000, "uint8"), readers=1)
        assert len(modes(namespace)) >= 3
        assert {mode for number, mode in modes(namespace) if number != "0"} == {0o640}


@pytest.mark.parametrize("mode", [0o666, 0o640, 0o777, 0o400, 0, 0o1660, -1])
def test_other_modes_are_refused(mode: int, namespace: str) -> None:
    with pytest.raises(ValueError, match="0o600 or 0o660 are possible"):
        shmcast.Arena.create("1MiB", mode=mode)
    assert modes(namespace) == []


def become(uid: int, gid: int, groups: tuple[int, ...] = ()) -> None:
    os.setgroups(groups)
    os.setgid(gid)
    os.setuid(uid)


def publisher(parent: Link, uid: int, gid: int, mode: int) -> None:
    become(uid, gid)
    with shmcast.Arena.create("1MiB", mode=mode) as arena:
        parent.send(arena.publish(np.arange(1000), readers=1).to_bytes())
        parent.receive()


def reader(parent: Link, uid: int, gid: int, groups: tuple[int, ...], raw: bytes) -> None:
    become(uid, gid, groups)
    try:
        with shmcast.attach(raw) as lease:
            parent.send(("read", int(lease.array.sum())))
    except OSError as error:
        parent.send((type(error).__name__, error.errno, str(error)))


def read_as(child: Callable[..., Child], raw: bytes, uid: int, gid: int, groups: tuple[int, ...] = ()) -> tuple:
    return child(reader, uid, gid, groups, raw).receive()


@ROOT_ONLY
def test_another_user_may_not_join(child: Callable[..., Child]) -> None:
    owner = child(publisher, 1001, 2001, 0o600)
    raw = owner.receive()
    assert read_as(child, raw, 1002, 2001)[:2] == ("ArenaError", errno.EACCES)
    assert read_as(child, raw, 1001, 2009) == ("read", 499500)


@ROOT_ONLY
@pytest.mark.parametrize(("gid", "groups"), [(2001, ()), (2009, (2001,))])
def test_a_group_may_where_the_owner_says_so(child: Callable[..., Child], gid: int, groups: tuple[int, ...]) -> None:
    owner = child(publisher, 1001, 2001, 0o660)
    assert read_as(child, owner.receive(), 1002, gid, groups) == ("read", 499500)


@ROOT_ONLY
def test_who_is_not_in_the_group_may_not(child: Callable[..., Child]) -> None:
    owner = child(publisher, 1001, 2001, 0o660)
    assert read_as(child, owner.receive(), 1002, 2009, (2010,))[:2] == ("ArenaError", errno.EACCES)


@ROOT_ONLY
def test_root_does_not_fall_for_a_strangers_file(child: Callable[..., Child]) -> None:
    """root could open it, but whoever may write there can cut it while root reads."""
    owner = child(publisher, 1001, 2001, 0o600)
    kind, number, text = read_as(child, owner.receive(), 0, 0)
    assert (kind, number) == ("ArenaError", errno.EACCES)
    assert "belongs to uid 1001 (mode 0o600, gid 2001), this process runs as uid 0" in text
    assert "mode=0o660" in text


@ROOT_ONLY
def test_who_only_looks_as_root_may(namespace: str, child: Callable[..., Child]) -> None:
    owner = child(publisher, 1001, 2001, 0o600)
    handle = shmcast.Handle.from_bytes(owner.receive())
    name = names.segment_name(namespace, handle.arena, 0)
    with pytest.raises(shmcast.ArenaError, match="belongs to uid 1001"):
        names.open_readable(name)
    os.close(names.open_readable(name, anybodys=True))
    os.close(names.open_writable(name, anybodys=True))


@ROOT_ONLY
def test_a_file_of_roots_is_fine(namespace: str) -> None:
    """root can do to us what it likes without that."""
    name = names.segment_name(namespace, 1, 0)
    os.close(names.create(name))
    before = os.geteuid()
    os.chmod(SHM / name[1:], 0o644)
    os.seteuid(NOBODY)
    try:
        os.close(names.open_readable(name))
    finally:
        os.seteuid(before)
        names.unlink(name)


@ROOT_ONLY
@pytest.mark.parametrize("mode", [0o600, 0o606, 0o660, 0o644])
def test_a_file_of_a_stranger_is_refused_whatever_its_mode(namespace: str, mode: int) -> None:
    name = names.segment_name(namespace, 1, 0)
    os.close(names.create(name))
    os.chmod(SHM / name[1:], mode)
    os.chown(SHM / name[1:], 1001, 2001)
    try:
        with pytest.raises(shmcast.ArenaError, match="belongs to uid 1001"):
            names.open_readable(name)
    finally:
        names.unlink(name)


def test_a_symbolic_link_is_refused(namespace: str, tmp_path: Path) -> None:
    name = names.segment_name(namespace, 1, 0)
    (tmp_path / "target").write_bytes(b"x" * 4096)
    (SHM / name[1:]).symlink_to(tmp_path / "target")
    try:
        for door in (names.open_readable, names.open_writable):
            with pytest.raises(shmcast.ArenaError, match="no regular file"):
                door(name)
    finally:
        (SHM / name[1:]).unlink()
