"""What the tests of `foreign` share: files as others leave them, and processes that use them."""

from __future__ import annotations

import ctypes
import mmap
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from child import Child, Link
from shmcast import foreign, procfs

SHM = Path("/dev/shm")
HOST_ONLY = pytest.mark.skipif(
    not procfs.in_initial_pid_namespace(), reason="not in the initial pid namespace: nothing can be removed from here"
)


def own_names() -> Iterator[str]:
    """What the names of a test's files begin with; they are taken away afterwards."""
    name = f"psm_test{os.getpid()}x{secrets.token_hex(6)}_"
    yield name
    for path in SHM.glob(f"{name}*"):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


def make(name: str, nbytes: int = 8192) -> Path:
    path = SHM / name
    path.write_bytes(b"x" * nbytes)
    path.chmod(0o600)
    return path


def look(prefix: str, **terms: object) -> dict[str, foreign.Leftover]:
    """What a scan says of the test's own files, by what follows the prefix; of any age unless it is told otherwise."""
    census = foreign.scan((f"{prefix}*",), **{"min_age_s": 0.0, **terms})
    return {leftover.name.removeprefix(prefix): leftover for leftover in census.leftovers}


def removed(leftover: foreign.Leftover) -> bool:
    """Whether it goes, where that is not known beforehand."""
    try:
        return foreign.remove(leftover)
    except OSError:
        return False


def user(parent: Link, path: str, how: str) -> None:
    fd = os.open(path, os.O_RDONLY if how == "reads" else os.O_RDWR)
    if how in ("maps", "both"):
        map_shared(fd)
    if how == "maps":
        os.close(fd)
    parent.send("ready")
    parent.receive()


def map_shared(fd: int) -> None:
    """Map a page of a file; Python's own mmap would keep a descriptor, too."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    address = libc.mmap(None, ctypes.c_size_t(4096), mmap.PROT_READ, mmap.MAP_SHARED, fd, ctypes.c_long(0))
    assert address != ctypes.c_void_p(-1).value


def started(child: Callable[..., Child], path: Path, how: str) -> Child:
    process = child(user, str(path), how)
    assert process.receive() == "ready"
    return process
