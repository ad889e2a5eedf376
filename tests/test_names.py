"""Names of segments: what is allowed, what is found, and whether a name still means the same file. Sizes as text."""

import fcntl
import os
import signal
from pathlib import Path

import posix_ipc
import pytest

import shmcast.metrics
from shmcast import looks, names
from shmcast.errors import ArenaError
from shmcast.sizes import format_bytes, parse_bytes

SHM = Path(names.DIRECTORY)


@pytest.mark.parametrize("namespace", ["a", "0", "A-b_9", "x" * 32])
def test_good_namespace(namespace: str) -> None:
    assert names.check_namespace(namespace) == namespace


@pytest.mark.parametrize("namespace", ["", "x" * 33, "a.b", "a/b", "..", "a b", "ä", "a\n", None, 7])
def test_bad_namespace(namespace: object) -> None:
    with pytest.raises(ValueError, match="1 to 32"):
        names.check_namespace(namespace)  # type: ignore[arg-type]


def test_default_namespace(monkeypatch: pytest.MonkeyPatch, namespace: str) -> None:
    assert names.default_namespace() == namespace
    monkeypatch.setenv("SHMCAST_NAMESPACE", "")
    assert names.default_namespace() == str(os.getuid())
    monkeypatch.setenv("SHMCAST_NAMESPACE", "../etc")
    with pytest.raises(ValueError, match=r"SHMCAST_NAMESPACE.*\.\./etc"):
        names.default_namespace()


def test_life_of_a_name(namespace: str) -> None:
    name = names.segment_name(namespace, 0xABC, 1)
    assert name == f"/shmcast.{namespace}.0000000000000abc.1"
    with pytest.raises(FileNotFoundError):
        names.open_readable(name)
    first = names.create(name)
    try:
        assert not os.get_inheritable(first)
        assert os.fstat(first).st_mode & 0o777 == 0o600
        with pytest.raises(FileExistsError):
            names.create(name)
        assert names.listing(namespace) == [(namespace, 0xABC, 1)]
        assert names.is_current(name, first)
        os.ftruncate(first, 100)
        assert names.status(name).st_size == 100
        reader = names.open_readable(name)
        with pytest.raises(OSError):
            os.write(reader, b"x")
        os.close(reader)
        assert names.unlink(name)
        assert not names.unlink(name)
        assert not names.is_current(name, first)
        assert names.status(name) is None
        second = names.create(name)  # a later file of that name is another file
        try:
            assert not names.is_current(name, first)
            assert names.is_current(name, second)
        finally:
            os.close(second)
            names.unlink(name)
    finally:
        os.close(first)


@pytest.mark.parametrize(
    "file",
    ["{}.0000000000000abc", "{}.0000000000000abc.", "{}.0000000000000abc.01", "{}.0000000000000ABC.1",
     "{}.abc.1", "{}.0000000000000abc.1.tmp", "{}x.0000000000000abc.1"],
)  # fmt: skip
def test_other_files_are_not_listed(namespace: str, file: str) -> None:
    path = SHM / ("shmcast." + file.format(namespace))
    path.touch()
    try:
        assert names.listing(namespace) == []
    finally:
        path.unlink()


def test_what_is_no_file_is_refused(namespace: str) -> None:
    name = names.segment_name(namespace, 1, 0)
    os.mkfifo(SHM / name[1:])
    try:
        with pytest.raises(ArenaError, match="regular file"):
            names.open_writable(name)
        with pytest.raises(ArenaError, match="regular file"):
            names.open_readable(name)  # without waiting for somebody who writes
        assert shmcast.metrics.read(namespace) == {}
        assert [arena["state"] for arena in looks.survey(namespace)] == ["damaged"]
    finally:
        (SHM / name[1:]).unlink()


@pytest.mark.parametrize("kind", [fcntl.F_RDLCK, fcntl.F_WRLCK])
def test_who_has_a_lease_on_his_file_keeps_nobody_waiting(namespace: str, kind: int) -> None:
    """Whoever opens such a file is made to wait by the kernel, 45 s as a rule."""
    name = names.segment_name(namespace, 1, 0)
    fd = os.open(SHM / name[1:], os.O_RDONLY | os.O_CREAT, 0o644)
    try:
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, kind)
        with pytest.raises(ArenaError, match="lease"):
            names.open_writable(name)
    finally:
        os.close(fd)
        (SHM / name[1:]).unlink()


def test_symbolic_links_are_not_followed(namespace: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"mine")
    name = names.segment_name(namespace, 1, 0)
    (SHM / name[1:]).symlink_to(target)
    try:
        with pytest.raises(OSError):
            names.open_writable(name)
    finally:
        (SHM / name[1:]).unlink()


def test_host_id_is_stable_and_not_the_boot_id_itself() -> None:
    assert names.host_id() == names.host_id()
    assert 0 < names.host_id() < 1 << 64


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [(4096, 4096), ("1", 1), ("64MiB", 64 << 20), ("2 GiB", 2 << 30), ("1.5KiB", 1536), ("2GB", 2 * 10**9),
     ("10 mb", 10**7), ("3TiB", 3 << 40), (" 7 B ", 7)],
)  # fmt: skip
def test_parse_bytes(text: int | str, nbytes: int) -> None:
    assert parse_bytes(text, "x") == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "1 XiB", "-1", "1e9", "0", 0, -1, 1 << 63, "99999999TiB"])
def test_bad_sizes(text: int | str) -> None:
    with pytest.raises(ValueError, match="max_bytes"):
        parse_bytes(text, "max_bytes")


@pytest.mark.parametrize("text", [None, 1.5, True])
def test_sizes_of_a_wrong_type(text: object) -> None:
    with pytest.raises(TypeError, match="max_bytes"):
        parse_bytes(text, "max_bytes")  # type: ignore[arg-type]


def test_format_bytes() -> None:
    assert format_bytes(5) == "5 bytes"
    assert format_bytes(10 << 20) == "10485760 bytes (10.0 MiB)"


@pytest.mark.parametrize("umask", [0o000, 0o077, 0o277, 0o777])
@pytest.mark.parametrize("mode", names.MODES)
def test_modes_are_what_was_asked_for(namespace: str, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        os.close(names.create(names.segment_name(namespace, 1, 0), mode))
    finally:
        os.umask(before)
    name = names.segment_name(namespace, 1, 0)
    status = names.status(name)
    names.unlink(name)
    assert status is not None
    assert status.st_mode & 0o777 == mode


def test_why_a_name_can_not_be_taken_away(namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = names.segment_name(namespace, 1, 0)
    os.close(names.create(name))

    def refuse(_: str) -> None:
        raise posix_ipc.PermissionsError("no")

    with monkeypatch.context() as patched:
        patched.setattr(posix_ipc, "unlink_shared_memory", refuse)
        with pytest.raises(PermissionError, match="immutable"):  # our own file
            names.unlink(name)
        patched.setattr(os, "geteuid", lambda: os.getuid() + 1)
        if os.getuid():
            with pytest.raises(PermissionError, match=f"uid {os.getuid()}, this process runs as uid {os.getuid() + 1}"):
                names.unlink(name)
    names.unlink(name)
