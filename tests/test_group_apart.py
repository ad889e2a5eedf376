"""Groups whose ranks do not share memory, in one way or another: all raise the same, or all send pickles."""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

import shmcast
from ranks import Patched, Rank, Ranks
from shmcast import GroupError, meeting
from trees import a_tree, same

torch_only = pytest.mark.torch


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(3) as started:
        yield started


def private_shm() -> Any:
    """A /dev/shm of this thread's own; None where the system does not allow it. Returns how to go back."""
    libc = ctypes.CDLL(None, use_errno=True)
    before = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY)
    if libc.unshare(0x00020000) != 0:  # CLONE_NEWNS
        os.close(before)
        return None

    def back() -> None:
        assert libc.setns(before, 0) == 0
        os.close(before)

    private = libc.mount(b"none", b"/", None, 0x44000, None)  # MS_REC | MS_PRIVATE
    if private != 0 or libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, None) != 0:
        back()
        return None
    return back


def other_answer(hello: Any, opened: Any, at_entry: bool) -> bytes:
    answer = bytearray(_answer(hello, opened, at_entry))
    answer[20] ^= 0xFF
    return bytes(answer)


_answer = meeting._answer


def apart(here: Rank, how: str, blind: int, fallback: str) -> str:
    back = None
    patch = Patched()
    if here.rank == blind:
        if how == "own tmpfs":
            back = private_shm()
        elif how == "same name":
            patch = Patched(meeting, "_answer", other_answer)
        elif how == "no arena":
            patch = Patched(meeting.Arena, "create", _full)
    try:
        with patch, warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            # The entry rank alone decides.
            group = shmcast.Group(here.group, fallback=fallback if here.rank == 0 else "raise", max_bytes="16MiB")
    except GroupError as error:
        return "raised " + str(error)
    finally:
        if back is not None:
            back()
    if group.mode == "shared":
        assert how == "own tmpfs"
        group.close()
        return "impossible"
    with group:
        assert group.mode == "object"
        for seed in range(3):
            expected = a_tree(seed, plain_pickle=group.mode == "object")
            assert same(group.broadcast(expected if here.rank == 0 else None), expected)
    return " ".join(str(warning.message) for warning in warned if warning.category is RuntimeWarning)


def _full(*_: Any, **__: Any) -> Any:
    raise shmcast.ArenaFullError(28, "/dev/shm has 0 bytes free of 67108864 (says the test)")


APART = {
    "own tmpfs": (2, "rank 2: ArenaGoneError: "),
    "same name": (1, "in its control segment, not "),
    "no arena": (0, "rank 0, the entry rank, has no arena: ArenaFullError: [Errno 28] /dev/shm has 0 bytes free"),
}


@torch_only
@pytest.mark.parametrize("how", APART)
def test_ranks_apart_all_raise_the_same(ranks: Ranks, how: str) -> None:
    blind, expected = APART[how]
    said = ranks.run(apart, how, blind, "raise", ranks=(0, 1, 2))
    if "impossible" in said:
        pytest.skip("this process may not have a /dev/shm of its own")
    assert len(set(said)) == 1
    assert said[0].startswith("raised make a group: its 3 ranks do not share memory: ")
    assert expected in said[0]
    assert "fallback='object'" in said[0]


@torch_only
@pytest.mark.parametrize("how", APART)
def test_ranks_apart_send_pickles(ranks: Ranks, how: str) -> None:
    blind, expected = APART[how]
    entry, *others = ranks.run(apart, how, blind, "object", ranks=(0, 1, 2))
    if entry == "impossible":
        pytest.skip("this process may not have a /dev/shm of its own")
    assert expected in entry
    assert others == ["", ""]
