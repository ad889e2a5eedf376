"""What a tokenizer has published for SGLang: a block a feature, which goes with it, whoever drops it and when."""

from __future__ import annotations

import gc
import os
import threading

import pytest

import shmcast
from shmcast.integrations.sglang import features
from shmcast.own_arena import close_own_arena, own_arena

pytestmark = [pytest.mark.torch, pytest.mark.without_sglang]


@pytest.fixture(autouse=True)
def arena(namespace):
    yield
    close_own_arena()


def live() -> int:
    gc.collect()
    return own_arena().stats()["slots_used"]


def promised(tensor) -> None:
    """Sent and dropped."""
    features.take_back(features.promise(tensor)[0])


def test_a_feature_that_is_refilled_keeps_one_block() -> None:
    import torch

    feature = torch.zeros(50_000)
    for value in range(5):
        feature.numpy()[:] = value  # as torch does not notice
        promised(feature)
        assert live() == 1
    close_own_arena()
    promised(feature)  # in another arena
    assert live() == 1
    del feature
    assert live() == 0


def test_a_feature_is_let_go_in_the_middle_of_anything() -> None:
    """The garbage collector may do it in a thread that holds what another one waits for, which publishes meanwhile."""
    import torch

    cycle = [torch.zeros(50_000)]
    promised(cycle[0])
    cycle.append(cycle)
    del cycle
    collector = threading.Thread(target=gc.collect)
    with features._lock:  # as while another feature is published
        collector.start()
        collector.join(20.0)
        assert not collector.is_alive()
    collector.join()
    assert live() == 0


def test_a_forked_child_has_nothing_of_it() -> None:
    import torch

    feature = torch.zeros(50_000)
    promised(feature)
    with features._lock:  # its thread is not in the child
        forker = threading.Thread(target=in_a_child, args=(feature, exits := []))
        forker.start()
        forker.join()
    assert exits == [0]
    assert live() == 1


def in_a_child(feature, exits: list[int]) -> None:
    pid = os.fork()
    if not pid:
        try:
            ended = threading.Thread(target=promised, args=(feature,), daemon=True)
            ended.start()
            ended.join(20.0)
            alone = live() == 1
            close_own_arena()
            os._exit(0 if alone and not ended.is_alive() else 1)
        except BaseException:
            os._exit(2)
    exits.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def test_a_view_that_finds_no_slot_travels_inline(monkeypatch) -> None:
    """As OSError, on which SGLang falls back; not as a handle that nobody was promised."""
    import torch

    (view,) = shmcast.share([torch.zeros(50_000)], own_arena())
    promised(view)

    def full(*_: object, **__: object):
        raise shmcast.ArenaFullError(28, "no slot, for this test")

    monkeypatch.setattr(type(own_arena()), "alias", full)
    with pytest.raises(OSError, match="no slot"):
        features.promise(view)
    del view
    assert live() == 0
