"""Agreement through words in shared memory: the same answer for all ranks, whoever is late, leaves or dies."""

import random

import pytest

from party import AGREED, ENDED, LONG_NS, Control, Party, agree, meet
from raw import Raw, joined
from shmcast import _native
from shmcast.errors import GroupError, PeerLostError

ABSENT = (1 << 62, 0)
VERDICT = 448
"""Offset in the control segment."""


@pytest.fixture
def raw(namespace):
    arena = Raw(namespace)
    yield arena
    arena.close()


@pytest.fixture
def control(raw):
    mapped = Control(raw)
    yield mapped
    mapped.map.close()


def test_all_see_the_same_masks(raw, child):
    party = Party(raw, child, 3)
    for step in range(1, 50):
        masks = [step, step << 1 if step % 3 else 0, 0, 1 << 63 if step % 5 == 0 else 0]
        for process, mask in zip(party.children, masks[1:], strict=True):
            process.send(("record", 2 * step, mask))
        party.answers()
        party.tell(("agree", step, LONG_NS))
        party.fellows.record(2 * step, masks[0])
        expected = (masks[0] | masks[1] | masks[2] | masks[3], sum(bool(mask) << n for n, mask in enumerate(masks)))
        assert agree(party.fellows, step) == expected
        assert party.answers() == [expected] * 3


def test_words_are_what_was_recorded(raw, child):
    party = Party(raw, child, 2)
    party.fellows.record(3)
    one, other = party.children
    for words in (("record", 2, 1), ("record", 4, 0), ("record", 5, 0)):
        one.send(words)
        one.receive()
    other.send(("leave",))
    other.receive()
    assert party.fellows.words() == [(3, 0), (5, 2), ABSENT]
    one.send(("words",))
    assert one.receive() == [(3, 0), (5, 2), ABSENT]
    assert [party.fellows.has(1, step) for step in (1, 2, 3)] == [True, True, False]
    with pytest.raises(IndexError):
        party.fellows.has(3, 1)
    with pytest.raises(OverflowError):
        party.fellows.agree(1 << 60, 0)
    with pytest.raises(PeerLostError, match="not in the arena"):
        _native.Fellows(raw.member, party.tokens, party.name)
    with pytest.raises(PeerLostError, match="not in the arena"):
        _native.Fellows(raw.member, party.tokens[1:2], party.name)  # we are not in it


# ---- who is late, ends, leaves or dies


def test_a_rank_that_is_late_is_waited_for(raw, child, control):
    party = Party(raw, child, 2)
    one, other = party.children
    assert party.fellows.agree(1, 0) is None
    party.fellows.record(2)
    assert party.fellows.agree(1, 1000) is None
    one.send(("record", 2, 0))
    one.receive()
    one.send(("agree", 1, LONG_NS))
    control.wait_for_sleepers(AGREED)
    other.send(("record", 2, 4))  # the last one: wakes who sleeps, also if it never asks itself
    other.receive()
    assert one.receive() == (4, 0b100)


def test_a_rank_that_has_ended_ends_the_wait(raw, child, control):
    party = Party(raw, child, 2)
    one, other = party.children
    other.send(("agree", 1, LONG_NS))
    control.wait_for_sleepers(AGREED)
    one.send(("record", ENDED))
    one.receive()
    assert other.receive() is None
    assert party.fellows.agree(1, LONG_NS) is None


def test_an_end_claims_no_more_than_was_recorded(raw, child):
    party = Party(raw, child, 1)
    (other,) = party.children
    for word, found in ((2, 2), (ENDED | 8, ENDED | 2), (ENDED | 0, ENDED | 0)):
        other.send(("record", word, 0))
        other.receive()
        assert party.fellows.words()[1] == (found, 0)
        assert party.fellows.has(1, 1) is (found & ~ENDED == 2)
    other.send(("record", ENDED | 0, 1))
    other.receive()
    assert party.fellows.words()[1] == (ENDED, ENDED)


@pytest.mark.parametrize("how", ["ends", "leaves", "is killed", "is killed and swept"])
def test_what_a_rank_has_recorded_counts_after_it_is_gone(raw, child, how):
    party = Party(raw, child, 2)
    gone, other = party.children
    assert party.ask("record", 2, 8) == [None, None]
    if how == "ends":
        gone.send(("record", ENDED | 2, 0))
        gone.receive()
    elif how == "leaves":
        gone.send(("leave",))
        gone.receive()
    else:
        gone.kill()
        assert raw.member.sweep_peers() == 1 if "swept" in how else True
    party.fellows.record(2)
    assert party.fellows.has(1, 1)
    assert agree(party.fellows, 1) == (8, 0b110)
    other.send(("agree", 1, LONG_NS))
    assert other.receive() == (8, 0b110)
    # but it will not record the next one
    party.fellows.record(4)
    other.send(("record", 4, 0))
    other.receive()
    assert party.fellows.agree(2, 0 if how == "is killed" else LONG_NS) is None


def test_what_was_agreed_on_stays_when_the_finder_is_gone_and_replaced(raw, child):
    party = Party(raw, child, 2)
    finder, slow = party.children
    party.fellows.record(2, 1)
    assert party.ask("record", 2, 2) == [None, None]
    finder.send(("agree", 1, LONG_NS))
    assert finder.receive() == (3, 0b111)
    finder.kill()
    newcomer = child(joins, raw.namespace, raw.id)
    index, token = newcomer.receive()
    assert index == party.indices[1]
    assert raw.member.steps()[token] == (0, 0)  # nothing of what was there
    assert not party.fellows.has(1, 1)
    slow.send(("agree", 1, LONG_NS))
    assert slow.receive() == (3, 0b111)
    assert agree(party.fellows, 1) == (3, 0b111)
    assert party.fellows.words()[1] == ABSENT


def joins(parent, namespace, arena):
    member = joined(namespace, arena)
    parent.send((member.index, _native.process_token()))
    parent.receive()


def test_words_of_a_byte_that_was_taken_over_are_not_the_ranks(raw, child):
    party = Party(raw, child, 2)
    gone, other = party.children
    assert party.ask("record", 2, 0) == [None, None]
    gone.send(("leave",))
    gone.receive()
    newcomer = child(obeys_as_newcomer, raw.namespace, raw.id)
    assert newcomer.receive() == party.indices[1]
    party.fellows.record(2)
    assert party.fellows.agree(1, LONG_NS) is None  # its mask is gone with it
    other.send(("agree", 1, LONG_NS))
    assert other.receive() is None


def obeys_as_newcomer(parent, namespace, arena):
    member = joined(namespace, arena)
    member.set_step(2)
    parent.send(member.index)
    parent.receive()


# ---- giving up


def test_who_gives_up_decides_for_all(raw, child, control):
    party = Party(raw, child, 2)
    assert party.ask("record", 2, 0) == [None, None]
    one, other = party.children
    one.send(("agree", 1, LONG_NS))
    control.wait_for_sleepers(AGREED)
    assert party.fellows.give_up(1)
    assert one.receive() is None
    party.fellows.record(2)
    assert party.fellows.agree(1, LONG_NS) is None
    other.send(("give_up", 1))
    assert other.receive() is True


def test_what_was_agreed_on_is_not_given_up(raw, child):
    party = Party(raw, child, 2)
    assert party.ask("record", 2, 4) == [None, None]
    party.fellows.record(2, 8)
    assert agree(party.fellows, 1) == (12, 0b111)
    assert party.ask("give_up", 1) == [False, False]
    assert party.fellows.give_up(2)
    assert party.ask("agree", 1, LONG_NS) == [(12, 0b111)] * 2
    assert party.fellows.agree(2, LONG_NS) is None


def test_a_new_group_starts_over(raw, child, control):
    party = Party(raw, child, 2)
    first = control.word(VERDICT)
    party.fellows.record(2, 1)
    party.ask("record", 2, 1)
    assert agree(party.fellows, 1) == (1, 0b111)
    assert party.fellows.give_up(2)
    party.tell(("meet",))
    _native.Fellows.reset(raw.member)
    party.begin()
    assert control.word(VERDICT) != first  # who has read that before does not mistake the one for the other
    assert party.fellows.words() == [(0, 0)] * 3
    party.ask("record", 2, 0)
    assert party.fellows.agree(1, 0) is None
    party.fellows.record(2)
    assert party.ask("agree", 1, LONG_NS) == [(0, 0)] * 2


def test_a_fellow_of_an_earlier_group_neither_decides_nor_believes_for_a_later_one(raw, child):
    party = Party(raw, child, 3)
    straggler, one, late = party.children
    assert party.ask("record", 2, 0) == [None] * 3  # the owner never does: the group breaks, and the next one begins
    assert party.fellows.give_up(1)
    party.children = [one, late]
    party.tell(("meet",))
    party.begin()
    party.fellows.record(2)
    one.send(("record", 2, 0))
    one.receive()
    # `late` has not come, and may not be able to take it in
    for verb, answer in (
        (("agree", 1, 0), None),
        (("give_up", 1), True),
        (("given_up",), True),
        (("agree", 1, 0), None),
    ):
        straggler.send(verb)
        assert straggler.receive() == answer
    assert party.fellows.agree(1, 0) is None
    assert not party.fellows.given_up()
    late.send(("record", 2, 4))
    late.receive()
    assert agree(party.fellows, 1) == (4, 0b100)
    for verb, answer in ((("agree", 1, 0), None), (("give_up", 1), True)):
        straggler.send(verb)
        assert straggler.receive() == answer


def test_the_end_of_an_earlier_group_does_not_end_a_later_one(raw, child):
    party = Party(raw, child, 1)
    earlier = party.fellows
    earlier.record(2)
    assert party.ask("record", 2, 0) == [None]
    _native.Fellows.reset(raw.member)
    party.tell(("meet",))
    party.begin()
    earlier.record(ENDED | 2)
    assert party.fellows.words() == [(0, 0), (0, 0)]
    party.fellows.record(2)
    assert party.ask("record", 2, 1) == [None]
    assert agree(party.fellows, 1) == (1, 0b10)


def test_a_question_for_what_is_over_is_refused(raw, child):
    party = Party(raw, child, 1)
    for step in (1, 2):
        party.fellows.record(2 * step)
        party.ask("record", 2 * step, 0)
        assert agree(party.fellows, step) == (0, 0)
    with pytest.raises(GroupError, match="agreed on message 2 already, this rank asks for 1"):
        party.fellows.agree(1, 0)


# ---- at random


def masks_of(seed, step, ranks):
    """What each rank can not take in of a message, or None where nobody asks; the same for the same seed."""
    rng = random.Random(seed * 1_000_003 + step)
    if rng.random() < 0.3:
        return None
    return [rng.getrandbits(64) if rng.random() < 0.3 else 0 for _ in range(ranks)]


def takes_part(fellows, rank, ranks, seed, steps):
    """All steps, at its own pace; what is not as expected."""
    pace = random.Random()
    for step in range(1, steps + 1):
        masks = masks_of(seed, step, ranks)
        for _ in range(pace.choice((0, 0, 0, 1000))):
            pass
        if pace.random() < 0.5:
            fellows.record(2 * step - 1)
        # A message that nobody asks about still has failures, which must not be taken for those of another one.
        fellows.record(2 * step, pace.getrandbits(64) if masks is None else masks[rank])
        if masks is None:
            continue
        every = 0
        for mask in masks:
            every |= mask
        found = agree(fellows, step)
        if found != (every, sum(bool(mask) << r for r, mask in enumerate(masks))):
            return step, masks, found
    return None


def takes_part_in_a_child(parent, namespace, arena, seed, steps):
    member = joined(namespace, arena)
    _, fellows = meet(parent, member)
    rank, ranks = parent.receive()
    parent.send(takes_part(fellows, rank, ranks, seed, steps))
    parent.receive()


@pytest.mark.watchdog(110)
def test_ranks_at_their_own_pace_always_agree(raw, child, seed):
    steps = 8000
    party = Party(raw, child, 3, takes_part_in_a_child, seed, steps)
    for rank, process in enumerate(party.children, 1):
        process.send((rank, 4))
    assert takes_part(party.fellows, 0, 4, seed, steps) is None
    assert party.answers() == [None] * 3


def gives_up_or_not(fellows, step, rank, rng):
    """One rank's end of a step at which somebody has no patience: what all agreed on, or None."""
    if rng.random() < 0.4:
        for _ in range(rng.randrange(2000)):
            pass
    fellows.record(2 * step, 1 << rank)
    if rng.random() < 0.3:
        if fellows.give_up(step):
            return None
        return fellows.agree(step, LONG_NS)
    return fellows.agree(step, LONG_NS)


def has_no_patience(parent, namespace, arena, seed, rounds):
    member = joined(namespace, arena)
    rng = random.Random()
    for _ in range(rounds):
        _, fellows = meet(parent, member)
        rank, step = parent.receive()
        found = None
        for at in range(1, step + 1):
            found = gives_up_or_not(fellows, at, rank, rng)
            if found is None:
                break
        parent.send((at, found))
    parent.receive()


@pytest.mark.watchdog(110)
def test_all_end_alike_whoever_gives_up_when(raw, child, seed):
    rounds, steps = 300, 20
    party = Party(raw, child, 3, has_no_patience, seed, rounds)
    rng = random.Random(seed)
    ends = []
    for round_ in range(rounds):
        if round_:
            _native.Fellows.reset(raw.member)
            party.begin()
        for rank, process in enumerate(party.children, 1):
            process.send((rank, steps))
        found = None
        for at in range(1, steps + 1):
            found = gives_up_or_not(party.fellows, at, 0, rng)
            if found is None:
                break
        assert party.answers() == [(at, found)] * 3
        ends.append(found is None)
    assert any(ends)
