"""The ring, seen through _native alone: order, room, wake-ups, and what a reader makes of garbage."""

import os
import random
import signal
import threading
import time

import pytest

from party import ENDED, LONG_NS, MASK_64, READ, SENT, Control, Party, agree, meet, receive
from raw import Raw, joined
from shmcast import _native
from shmcast.errors import ArenaError, GroupError, PeerLostError

ENTRIES, PAYLOAD_BYTES = _native.RING_ENTRIES, _native.RING_PAYLOAD_BYTES
NUMBER, GROUP, MESSAGE, OFFSET, HASH, BYTES, PAYLOAD = 0, 8, 16, 24, 32, 40, 48  # in an entry


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


# ---- order and room


def test_messages_arrive_in_order_on_all_ranks(raw, child):
    party = Party(raw, child, 3)
    assert party.ask("poll") == [False] * 3
    sent = [b"x" * (7 * n) + bytes([n]) for n in range(200)]
    party.tell(("receive", 200))
    for message in sent:
        party.send(message)
    assert party.answers() == [sent] * 3
    party.send(b"")
    assert party.ask("poll") == [True] * 3
    assert party.ask("receive", 1) == [[b""]] * 3
    assert party.ask("poll") == [False] * 3


def random_messages(seed, count):
    """Of all sizes, small ones most of all; the same for the same seed."""
    rng = random.Random(seed)
    for number in range(count):
        size = int(rng.choice((40, PAYLOAD_BYTES + 2, PAYLOAD_BYTES * 3, PAYLOAD_BYTES * 200)) * rng.random() ** 3)
        yield bytes([number % 251]) * size


def reads_random_messages(parent, namespace, arena, seed, count):
    ring, _ = meet(parent, joined(namespace, arena))
    rng = random.Random()  # its own pace
    for number, expected in enumerate(random_messages(seed, count)):
        assert receive(ring) == expected, number
        if rng.random() < 0.02:
            time.sleep(rng.random() * 0.001)
    parent.send("all of them")
    parent.receive()


def test_messages_of_random_sizes_go_round_the_ring_many_times(raw, child, seed):
    count = 3000
    party = Party(raw, child, 3, reads_random_messages, seed, count)
    for message in random_messages(seed, count):
        party.send(message)
    assert party.answers() == ["all of them"] * 3
    assert _native.Ring.position(raw.member) > 20 * ENTRIES


def test_the_writer_is_as_far_ahead_as_the_ring_is_long(raw, child):
    party = Party(raw, child, 2)
    one, other = party.children
    for number in range(ENTRIES):
        assert party.ring.send(b"%d" % number, 0, 0) is not None
    assert party.ring.send(b"too much", 0, 0) is None
    one.send(("receive", ENTRIES))
    assert one.receive() == [b"%d" % number for number in range(ENTRIES)]
    assert party.ring.send(b"too much", 0, 0) is None  # the other has not read
    other.send(("receive", 1))
    assert other.receive() == [b"0"]
    assert party.ring.send(b"fits", 0, 0) == 4
    assert party.ring.send(b"too much", 0, 0) is None


def test_what_did_not_fit_goes_on_where_it_stopped(raw, child):
    party = Party(raw, child, 1)
    message = random.Random(1).randbytes(PAYLOAD_BYTES * (ENTRIES + 10) + 5)
    assert party.ring.send(message, 0, 0) == PAYLOAD_BYTES * ENTRIES
    assert party.ring.send(message, PAYLOAD_BYTES * ENTRIES, 0) is None
    assert party.ask("poll") == [True]
    assert party.ask("receive once", 0) == [None]  # takes what is there
    assert party.ask("poll") == [True]
    assert party.ring.send(message, PAYLOAD_BYTES * ENTRIES, 0) == len(message)
    assert party.ask("receive", 1) == [[message]]
    with pytest.raises(ValueError, match="6 bytes are said to be in, the message has 5"):
        party.ring.send(b"short", 6, 0)


def test_a_paused_reader_stops_nobody_before_the_ring_is_full(raw, child):
    party = Party(raw, child, 2)
    paused, other = party.children
    paused.signal(signal.SIGSTOP)
    other.send(("receive", ENTRIES))
    for number in range(ENTRIES):
        party.send(b"%d" % number)
    assert len(other.receive()) == ENTRIES
    assert party.ring.send(b"no room", 0, 0) is None
    paused.signal(signal.SIGCONT)
    paused.send(("receive", ENTRIES))
    party.send(b"room again")
    assert paused.receive() == [b"%d" % number for number in range(ENTRIES)]
    assert party.ask("receive", 1) == [[b"room again"]] * 2


# ---- sleeping and waking


def test_who_sleeps_is_woken(raw, child, control):
    party = Party(raw, child, 3)
    for number in range(300):
        party.tell(("receive", 1))
        control.wait_for_sleepers(SENT, 3)
        party.send(b"%d" % number)
        assert party.answers() == [[b"%d" % number]] * 3
    assert control.word(SENT + 4, 4) == 0


def test_a_writer_that_sleeps_is_woken(raw, child, control):
    party = Party(raw, child, 2)

    def let_them_read():
        control.wait_for_sleepers(READ)
        party.tell(("receive", ENTRIES + 1))

    for _ in range(50):
        for number in range(ENTRIES):
            assert party.ring.send(b"%d" % number, 0, 0) is not None
        helper = threading.Thread(target=let_them_read)
        helper.start()
        party.send(b"one more")
        helper.join()
        assert [answer[-1] for answer in party.answers()] == [b"one more"] * 2


def pings(parent, namespace, arena, rank, rounds, seed):
    """Every round in a random order of who is early and who is late; a wake-up that is lost takes longer than the test."""
    ring, fellows = meet(parent, joined(namespace, arena))
    rng = random.Random(seed + rank)
    for step in range(1, rounds + 1):
        linger(rng)
        assert receive(ring) == b"%d" % step
        linger(rng)
        fellows.record(2 * step, step if rng.random() < 0.1 else 0)
        agree(fellows, step)
    parent.send("done")
    parent.receive()


def linger(rng):
    """A moment or none: sometimes long enough to let the others fall asleep."""
    if rng.random() < 0.3:
        time.sleep(rng.random() * 0.0002)


@pytest.mark.watchdog(110)
def test_no_wake_up_is_lost(raw, child, seed):
    rounds = 5000
    party = Party(raw, child, 3, pings, 1, rounds, seed)
    rng = random.Random(seed)
    for step in range(1, rounds + 1):
        linger(rng)
        party.send(b"%d" % step)
        party.fellows.record(2 * step)
        agree(party.fellows, step)
    assert party.answers() == ["done"] * 3


def test_who_ends_wakes_those_that_wait_for_messages(raw, child, control):
    party = Party(raw, child, 2)
    party.tell(("receive once", LONG_NS))
    control.wait_for_sleepers(SENT, 2)
    party.fellows.record(ENDED)
    assert party.answers() == [None, None]


def test_a_reader_that_leaves_wakes_the_writer(raw, child):
    party = Party(raw, child, 2)
    one, other = party.children
    for _ in range(ENTRIES):
        party.ring.send(b"", 0, 0)
    other.send(("receive", ENTRIES))
    other.receive()
    one.send(("record", ENDED))
    one.receive()
    one.send(("leave",))
    assert one.receive() == "left"
    with pytest.raises(PeerLostError, match=f"rank 1, peer {party.indices[1]}, has left the arena"):
        party.ring.send(b"", 0, LONG_NS)


def test_a_killed_reader_leaves_nothing(raw, child, control):
    party = Party(raw, child, 2)
    victim, other = party.children
    party.tell(("receive", 1))
    control.wait_for_sleepers(SENT, 2)
    victim.kill()
    assert control.word(SENT + 4, 4) == 0b110
    assert raw.member.sweep_peers() == 1
    assert control.word(SENT + 4, 4) == 1 << party.indices[2]
    for _ in range(ENTRIES):
        party.send(b"to the other")
    assert other.receive() == [b"to the other"]
    other.send(("receive", ENTRIES - 1))
    other.receive()
    with pytest.raises(PeerLostError, match="rank 1"):
        party.ring.send(b"", 0, LONG_NS)


def interrupted(parent, namespace, arena):
    ring, fellows = meet(parent, joined(namespace, arena))
    for wait in (lambda: ring.receive(LONG_NS), lambda: fellows.agree(1, LONG_NS)):
        try:
            wait()
        except KeyboardInterrupt:
            parent.send("interrupted")
    parent.receive()


def test_a_signal_is_heard_while_waiting(raw, child, control):
    (process,) = (party := Party(raw, child, 1, interrupted)).children
    for bell in (SENT, SENT + 128):
        control.wait_for_sleepers(bell)
        process.signal(signal.SIGINT)
        assert process.receive() == "interrupted"
    del party


# ---- one ring, several groups


def test_a_second_group_goes_on_where_the_first_has_stopped(raw, child):
    party = Party(raw, child, 2)
    for round_ in range(3):
        for number in range(40):
            party.send(b"%d of %d" % (number, round_))
        assert party.ask("receive", 40) == [[b"%d of %d" % (number, round_) for number in range(40)]] * 2
        party.tell(("meet",))
        party.begin()
        assert party.start == 40 * (round_ + 1)


def test_the_writer_waits_for_a_reader_that_has_not_begun(raw, child, control):
    party = Party(raw, child, 1)
    (reader,) = party.children
    for _ in range(3 * ENTRIES):
        party.send(b"first group")
        reader.send(("receive", 1))
        reader.receive()
    reader.send(("meet",))
    tokens = [_native.process_token(), reader.receive()]
    control.put(party.ring_read, 5)  # as if it had been in another group long ago
    ring = _native.Ring(raw.member, tokens, 3 * ENTRIES)
    assert ring.send(b"second group", 0, 0) is None
    reader.send((tokens, 3 * ENTRIES, party.name))
    assert ring.send(b"second group", 0, LONG_NS) == 12
    assert reader.receive() == "ready"
    reader.send(("receive", 1))
    assert reader.receive() == [b"second group"]


def test_a_reader_of_another_group_notices(raw, child):
    party = Party(raw, child, 2)
    left_out, _ = party.children
    ring = _native.Ring(raw.member, [party.tokens[0], party.tokens[2]], party.start)
    ring.send(b"not for all", 0, 0)
    left_out.send(("receive", 1))
    assert "GroupError: receive from the ring, entry 0: the entry is for group" in left_out.receive()
    with pytest.raises(GroupError, match="begin at entry 0 of the ring, which is at 1"):
        _native.Ring(raw.member, party.tokens, party.start)


# ---- who may


def test_each_end_does_what_is_its_own(raw, child):
    party = Party(raw, child, 1)
    with pytest.raises(ValueError, match="this is peer 0"):
        party.ring.receive(0)
    with pytest.raises(ValueError, match="this is peer 0"):
        party.ring.poll()
    with pytest.raises(PeerLostError, match="0x7b is not in the arena"):
        _native.Ring(raw.member, [*party.tokens, 123], 0)


def test_a_forked_child_is_nobody(raw, child):
    party = Party(raw, child, 1)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            for forbidden in (
                lambda: party.ring.send(b"", 0, 0),
                lambda: party.fellows.record(2),
                lambda: party.fellows.agree(1, 0),
                lambda: party.fellows.give_up(1),
                lambda: _native.Ring(raw.member, party.tokens, 0),
                lambda: _native.Fellows(raw.member, party.tokens, party.name),
                lambda: _native.Fellows.reset(raw.member),
            ):
                with pytest.raises(ArenaError, match="forked"):
                    forbidden()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert party.ask("poll") == [False]


# ---- garbage


def entry_hash(payload, message_bytes):
    return _native.hash128(payload, message_bytes) & MASK_64


@pytest.mark.parametrize(
    ("field", "size", "value", "text"),
    [
        (NUMBER, 8, 77, "says that it is number 77, this is 0"),
        (GROUP, 8, 0xABC, "is for group 0xabc, this is 0x"),
        (OFFSET, 8, 4048, "goes on at byte 4048 of its message, 0 are here"),
        (BYTES, 4, 12, "carries 12 bytes, 11 belong there"),
        (BYTES, 4, 0xFFFFFFFF, "carries 4294967295 bytes, 11 belong there"),
        (MESSAGE, 8, 10, "carries 11 bytes, 10 belong there"),
        (MESSAGE, 8, 1 << 63, "carries 11 bytes, 4048 belong there"),
        (HASH, 8, 0x123, "it says 0x123; memory is damaged"),
        (PAYLOAD, 1, 0xFF, "bytes hash to 0x"),
    ],
)
def test_a_damaged_entry_is_named(raw, child, control, field, size, value, text):
    party = Party(raw, child, 2)
    party.send(b"eleven char")
    control.put(control.entry(0) + field, value, size)
    for answer in party.ask("receive", 1):
        assert answer.startswith("GroupError: receive from the ring, entry 0: ")
        assert text in answer
    assert party.ask("poll") == [True] * 2  # alive, and still of that opinion


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        (OFFSET, 0, "goes on at byte 0 of its message, 4048 are here; the entry rank has given one up midway"),
        (MESSAGE, 9001, "is of a message of 9001 bytes, it began as one of 9000"),
        (MESSAGE, 1 << 62, f"is of a message of {1 << 62} bytes, it began as one of 9000"),
        (NUMBER, 65, "says that it is number 65, this is 1"),
    ],
)
def test_a_damaged_continuation_is_named(raw, child, control, field, value, text):
    party = Party(raw, child, 1)
    party.send(b"x" * 9000)
    control.put(control.entry(1) + field, value)
    (answer,) = party.ask("receive", 1)
    assert text in answer


def test_a_message_of_any_length_can_not_be_claimed(raw, child, control):
    party = Party(raw, child, 1)
    party.send(b"x" * PAYLOAD_BYTES)
    for claimed in (1 << 46, 1 << 62, MASK_64):
        control.put(control.entry(0) + MESSAGE, claimed)
        control.put(control.entry(0) + HASH, entry_hash(b"x" * PAYLOAD_BYTES, PAYLOAD_BYTES))
        (answer,) = party.ask("receive", 1)
        assert "bytes hash to" in answer
        control.put(control.entry(0) + HASH, entry_hash(b"x" * PAYLOAD_BYTES, claimed))  # malice, not damage
        (answer,) = party.ask("receive", 1)
        assert f"has {claimed} bytes, for which this process has no memory" in answer


def test_counts_that_can_not_be_do_no_harm(raw, child, control):
    party = Party(raw, child, 1)
    for head in (MASK_64, 1 << 63, 0):
        control.put(control.ring, head)
        assert party.ask("receive once", 0) == [None]
    control.put(control.ring, 5)
    assert "the entry is for group 0, this is" in party.ask("receive once", 0)[0]
    party.send(b"puts it right")
    assert party.ask("receive", 1) == [[b"puts it right"]]
    for number in range(2 * ENTRIES):
        control.put(party.ring_read, (1 << 40) + number)  # ahead of the writer: as if everything had been read
        assert party.ring.send(b"", 0, 0) is not None
    control.put(party.ring_read, 1)
    for _ in range(2 * ENTRIES):
        party.ring.send(b"", 0, 0)
    assert party.ring.send(b"", 0, 0) is None


def test_noise_is_no_message(raw, child, control, rng):
    """Whatever lies in the ring, a reader gives out what was sent, or says what is wrong; it never crashes."""
    party = Party(raw, child, 2)
    for number in range(300):
        message = rng.bytes(int(rng.integers(3 * PAYLOAD_BYTES)))
        start = _native.Ring.position(raw.member)
        party.send(message)
        for _ in range(int(rng.integers(1, 20))):
            at = int(rng.integers(PAYLOAD_BYTES)) if rng.random() < 0.3 else int(rng.integers(PAYLOAD))
            at += control.entry(start + int(rng.integers(3)))
            control.map[at] = int(rng.integers(256))
        answers = party.ask("receive once", 0)
        for answer in answers:
            assert answer == message or answer is None or answer.startswith("GroupError: receive from"), number
        if answers != [message] * 2:
            party.tell(("meet",))
            party.begin()
