"""Requests that do not get from a tokenizer to all ranks: failed, dropped, aborted, damaged. Each concerns itself alone, and
its memory comes back: at once where everybody who was promised it has come or been asked, else after a ``grant_timeout``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("zmq")
pytest.importorskip("torch")
pytestmark = [pytest.mark.zmq, pytest.mark.torch]

import shmcast  # noqa: E402
from hop import (  # noqa: E402
    LARGE,
    Crew,
    Forks,
    Raised,
    Scheduler,
    Tokenizer,
    Worker,
    acquaint,
    alike,
    features,
    ready,
    together,
)
from hop_casting import Casting, Delivering  # noqa: E402

SOON_S = 0.05
"""A ``grant_timeout``. Nobody reads too late for it: what it has passed for is taken back where room is needed, which is in
`Tokenizer.wait_for_all`."""


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks() as started:
        yield started


@pytest.fixture
def crew(forks: Forks, namespace: str) -> Iterator[Crew]:
    with forks.crew() as crew:
        yield crew


# ---- failed


@pytest.mark.parametrize("executor", ["inline", "thread"])
@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("raises", "ValueError: no image: "),
        ("can not be pickled", "TypeError: cannot pickle 'generator' object"),
        ("is too large", "ArenaFullError: "),
        ("is elsewhere", "UnsupportedArrayError: "),
    ],
)
def test_a_failure_is_the_outcome_on_all_ranks(crew: Crew, seed: int, executor: str, how: str, says: str) -> None:
    address = crew.address()
    ranks = crew.ranks(3, Casting, address, executor)
    tokenizers = [crew.start(Delivering, address) for _ in range(2)]
    ready(*ranks, *tokenizers)
    acquaint(ranks, *tokenizers)
    tokenizers[0].ask("deliver", "first", seed)
    alike(ranks, "submit", 1)
    tokenizers[0].ask("deliver", "fails", seed + 1, how)
    alike(ranks, "submit", 1)
    tokenizers[1].ask("deliver", "other", seed + 2)
    alike(ranks, "submit", 1)
    tokenizers[0].ask("deliver", "last", seed + 3)
    alike(ranks, "submit", 1)
    ends = alike(ranks, "step_to_the_end")
    kind, text = ends.pop("fails")
    assert kind == "MaterializeError" and text.startswith(f"materialize request 'fails': {says}")
    assert ends == {"first": True, "other": True, "last": True}
    alike(ranks, "drop")
    assert tokenizers[0].ask("counts")["slots"] == tokenizers[1].ask("counts")["slots"] == 0
    assert alike(ranks[1:], "counts")["publishes"] == ranks[0].ask("counts")["publishes"] == 0


# ---- dropped


def test_dropped_by_the_tokenizer_before_sending(crew: Crew, seed: int) -> None:
    tokenizer = crew.start(Tokenizer, crew.address())
    ready(tokenizer)
    tokenizer.ask("share", "r", seed)
    assert tokenizer.ask("counts")["slots"] == LARGE
    tokenizer.ask("end", "r")
    assert tokenizer.ask("counts")["slots"] == 0


def test_dropped_by_rank_0_before_broadcasting(crew: Crew, seed: int) -> None:
    address = crew.address()
    ranks = crew.ranks(2, Scheduler, address)
    tokenizer = crew.start(Tokenizer, address)
    ready(*ranks, tokenizer)
    acquaint(ranks, tokenizer)
    tokenizer.ask("share", "r", seed)
    tokenizer.ask("samples", "r", 3)
    tokenizer.ask("end", "r")
    assert ranks[0].ask("receive", 3) == ["r.0", "r.1", "r.2"]
    assert tokenizer.ask("counts")["slots"] == 3 * LARGE
    ranks[0].ask("drop_inbox")
    assert tokenizer.ask("counts")["slots"] == 0
    tokenizer.ask("share", "s", seed + 1)
    tokenizer.ask("send", "s")
    assert alike(ranks, "take", 1) == {"s": True}
    alike(ranks, "drop")


def test_sent_and_never_read(crew: Crew, seed: int) -> None:
    """Rank 0 ends with it in its socket."""
    address = crew.address()
    ranks = crew.ranks(2, Scheduler, address)
    tokenizer = crew.start(Tokenizer, address, "16MiB", SOON_S)
    ready(*ranks, tokenizer)
    tokenizer.ask("share", "r", seed)
    tokenizer.ask("samples", "r", 4)
    tokenizer.ask("end", "r")
    assert ranks[0].ask("receive", 1) == ["r.0"]  # so the others have been sent
    assert alike(ranks, "broadcast") == {"r.0": True}
    alike(ranks, "drop")
    together(ranks, "leave")
    assert tokenizer.ask("counts")["slots"] == 4 * LARGE  # the first one was passed on to ranks that it did not know
    assert tokenizer.ask("wait_for_all") == 0


def test_passed_on_to_ranks_that_the_tokenizer_does_not_know(crew: Crew, seed: int) -> None:
    """Its first request: taken back after its deadline at the latest, and never before all have let go."""
    address = crew.address()
    ranks = crew.ranks(3, Scheduler, address)
    tokenizer = crew.start(Tokenizer, address, "16MiB", SOON_S)
    ready(*ranks, tokenizer)
    tokenizer.ask("share", "r", seed)
    tokenizer.ask("send", "r")
    tokenizer.ask("end", "r")
    assert alike(ranks, "take", 1) == {"r": True}
    for rank in ranks:
        assert tokenizer.ask("wait_for_all", 4 * SOON_S).kind == "ArenaFullError"
        assert rank.ask("still_right") == {"r": True}
        rank.ask("drop")
    assert tokenizer.ask("wait_for_all") == 0


# ---- aborted


def casting(crew: Crew, **options: Any) -> tuple[list[Worker], Worker]:
    """Three ranks with a worker at a closed gate, and a tokenizer that they know."""
    address = crew.address()
    ranks = crew.ranks(3, Casting, address, "thread", True)
    tokenizer = crew.start(Delivering, address, "16MiB", SOON_S)
    ready(*ranks, tokenizer)
    acquaint(ranks, tokenizer)
    return ranks, tokenizer


def deliver_all(ranks: list[Worker], tokenizer: Worker, *rids: str) -> None:
    for number, rid in enumerate(rids):
        tokenizer.ask("deliver", rid, number)
    assert alike(ranks, "submit", len(rids)) == list(rids)


def test_aborted_while_it_waits(crew: Crew) -> None:
    ranks, tokenizer = casting(crew)
    deliver_all(ranks, tokenizer, "first", "aborted", "last")
    ranks[0].ask("wait_until_running")  # the first
    together(ranks, "cancel", "aborted")
    assert alike(ranks, "step") == {"aborted": "cancelled"}
    assert tokenizer.ask("counts")["slots"] == 2 * LARGE
    ranks[0].ask("open_gate")
    assert alike(ranks, "step_to_the_end") == {"first": True, "last": True}
    alike(ranks, "drop")
    assert tokenizer.ask("counts")["slots"] == 0


def test_aborted_while_it_is_at_work(crew: Crew) -> None:
    ranks, tokenizer = casting(crew)
    deliver_all(ranks, tokenizer, "aborted", "last")
    ranks[0].ask("wait_until_running")
    together(ranks, "cancel", "aborted", "aborted")
    assert alike(ranks, "step") == {"aborted": "cancelled"}
    ranks[0].ask("open_gate")
    assert alike(ranks, "step_to_the_end") == {"last": True}
    alike(ranks, "drop")
    assert tokenizer.ask("wait_for_all") == 0  # it may have been passed on when the worker came back with it


def test_aborted_when_it_is_ready(crew: Crew) -> None:
    """The ranks were promised it by then, and will never come."""
    ranks, tokenizer = casting(crew)
    deliver_all(ranks, tokenizer, "aborted")
    ranks[0].ask("open_gate")
    ranks[0].ask("wait_until_ready")
    together(ranks, "cancel", "aborted")
    assert alike(ranks, "step") == {"aborted": "cancelled"}
    assert tokenizer.ask("wait_for_all") == 0
    deliver_all(ranks, tokenizer, "next")
    assert alike(ranks, "step_to_the_end") == {"next": True}
    alike(ranks, "drop")


def test_aborted_when_it_is_on_its_way(crew: Crew) -> None:
    """Some rank may have it, so all do; they drop what nobody waits for."""
    ranks, tokenizer = casting(crew)
    deliver_all(ranks, tokenizer, "aborted")
    ranks[0].ask("open_gate")
    ranks[0].ask("wait_until_ready")
    ranks[0].ask("collect")
    together(ranks, "cancel", "aborted")
    assert alike(ranks, "apply") == {"aborted": True}
    alike(ranks, "drop")
    assert tokenizer.ask("counts")["slots"] == 0


# ---- what is no message, or none of ours


def test_garbage_concerns_itself(crew: Crew, seed: int) -> None:
    address = crew.address()
    ranks = crew.ranks(3, Scheduler, address)
    tokenizers = [crew.start(Tokenizer, address, "16MiB", SOON_S) for _ in range(2)]
    ready(*ranks, *tokenizers)
    acquaint(ranks, *tokenizers)
    for number, frames in enumerate(([b""], [b"garbage" * 99], [b"shmT" + bytes(99)], [b"one", b"two"])):
        for which, tokenizer in enumerate(tokenizers):
            tokenizer.ask("share", f"{which}", seed + number)
            tokenizer.ask("send", f"{which}")
        tokenizers[0].ask("raw", *frames)
        tokenizers[0].ask("send", "0", "after")
        answers = ranks[0].ask("receive", 4)
        (garbage,) = [answer for answer in answers if not isinstance(answer, str)]
        assert garbage[0] == "HandleError"
        assert set(answers) - {garbage} == {"0", "1", "after"}
        assert alike(ranks, "broadcast_each") == dict.fromkeys([rid for rid in answers if rid is not garbage], True)
        for which, tokenizer in enumerate(tokenizers):
            tokenizer.ask("end", f"{which}")
        alike(ranks, "drop")
        assert [tokenizer.ask("counts")["slots"] for tokenizer in tokenizers] == [0, 0]


class Stranger(Tokenizer):
    """On another host, as far as its handles tell; and one whose messages are cut on their way."""

    def send_from_elsewhere(self, rid: str, seed: int) -> None:
        from shmcast.channels import zmq

        here = self.arena._head
        self.arena._head = (*here[:2], here[2] ^ 1)
        try:
            zmq.send(self.socket, {"rid": rid, "seed": seed, "features": features(seed)}, self.arena)
        finally:
            self.arena._head = here

    def send_cut(self, rid: str, at: int) -> None:
        blob = shmcast.dumps({"rid": rid, "seed": self.seeds[rid], "features": self.shared[rid]}, self.arena)
        self.raw(blob[: at % len(blob)])


def test_of_another_host(crew: Crew, seed: int) -> None:
    address = crew.address()
    ranks = crew.ranks(2, Scheduler, address)
    stranger = crew.start(Stranger, address, "16MiB", SOON_S)
    ready(*ranks, stranger)
    stranger.ask("send_from_elsewhere", "r", seed)
    stranger.ask("share", "s", seed + 1)
    stranger.ask("send", "s")
    answers = ranks[0].ask("receive", 2)
    assert answers[0][0] == "HandleError" and "this is host" in answers[0][1]
    assert answers[1] == "s"
    assert alike(ranks, "broadcast") == {"s": True}
    alike(ranks, "drop")
    stranger.ask("end", "s")
    assert stranger.ask("wait_for_all") == 0


def test_cut_on_its_way(crew: Crew, rng: np.random.Generator) -> None:
    address = crew.address()
    ranks = crew.ranks(2, Scheduler, address)
    stranger = crew.start(Stranger, address, "16MiB", SOON_S)
    ready(*ranks, stranger)
    stranger.ask("share", "r", 1)
    cuts = [int(at) for at in rng.integers(0, 600, 20)]
    for at in cuts:
        stranger.ask("send_cut", "r", at)
    stranger.ask("send", "r")
    answers = ranks[0].ask("receive", len(cuts) + 1)
    assert [kind for kind, _ in answers[:-1]] == ["HandleError"] * len(cuts)
    assert alike(ranks, "broadcast") == {"r": True}
    alike(ranks, "drop")
    stranger.ask("end", "r")
    assert stranger.ask("wait_for_all") == 0


def test_for_a_group_that_is_broken(crew: Crew, seed: int) -> None:
    """An error for the request, which rank 0 still has: good for the group that is made next."""
    address = crew.address()
    ranks = crew.ranks(3, Scheduler, address)
    tokenizer = crew.start(Tokenizer, address, "16MiB", SOON_S)
    ready(*ranks, tokenizer)
    acquaint(ranks, tokenizer)
    for number in range(3):
        tokenizer.ask("share", f"r{number}", seed + number)
        tokenizer.ask("send", f"r{number}")
        tokenizer.ask("end", f"r{number}")
    assert alike(ranks, "take", 1) == {"r0": True}
    ranks[2].ask("leave")
    for number in (1, 2):
        assert ranks[0].ask("receive", 1) == [f"r{number}"]
        for answer in together(ranks[:2], "broadcast"):
            assert isinstance(answer, Raised) and answer.kind in ("GroupError", "PeerLostError")
            # Who hears of it second may see that the other one has given up, too.
            assert re.search(r"rank 2 |ranks [01], 2 ", answer.text), answer.text
    assert together(ranks[:2], "still_right") == [{"r0": True}] * 2
    together(ranks, "join")
    assert alike(ranks, "broadcast") == {"r1": True, "r2": True}
    alike(ranks, "drop")
    assert tokenizer.ask("counts")["publishes"] == 3 * LARGE
    assert tokenizer.ask("wait_for_all") == 0
