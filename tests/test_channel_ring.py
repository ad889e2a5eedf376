"""`RingChannel`: what is its own; what every channel promises is in test_channels.py. Needs no torch."""

import os
import random
import signal
import threading

import pytest

from party import ENDED, Control, Party, meet
from raw import Raw, joined
from shmcast import GroupError, GroupTimeoutError, PeerLostError, _native, names
from shmcast.channels.ring import RingChannel

ENTRIES, PAYLOAD_BYTES = _native.RING_ENTRIES, _native.RING_PAYLOAD_BYTES
MIB = 1 << 20
FOR_EVER_S = 1000.0


@pytest.fixture
def raw(namespace):
    arena = Raw(namespace)
    yield arena
    arena.close()


def reader(parent, namespace, arena):
    """Another rank: receives, polls or leaves when it is told; a long message is answered by its hash."""
    member = joined(namespace, arena)
    ring, fellows = meet(parent, member)
    rank, size = parent.receive()
    channel = RingChannel(ring, rank, size, 0, timeout=FOR_EVER_S)
    while True:
        verb, *args = parent.receive()
        if verb == "receive":
            for _ in range(*args):
                try:
                    message = channel.broadcast()
                    parent.send(message if len(message) < 100 else (len(message), _native.hash128(message)))
                except GroupError as error:
                    parent.send(str(error))
        elif verb == "poll":
            parent.send(channel.poll())
        elif verb == "end":
            fellows.record(ENDED)
            parent.send("ended")


@pytest.fixture
def start(raw, child):
    def start_readers(others):
        party = Party(raw, child, others, reader)
        for rank, process in enumerate(party.children, 1):
            process.send((rank, others + 1))
        party.channel = RingChannel(party.ring, 0, others + 1, 0, timeout=FOR_EVER_S)
        return party

    return start_readers


def fill(channel):
    for number in range(ENTRIES):
        channel.broadcast(b"%d" % number, timeout=0.0)


def wants(process, *messages):
    """Let a rank receive so many messages, and compare."""
    process.send(("receive", len(messages)))
    for message in messages:
        found = process.receive()
        assert found == (message if len(message) < 100 else (len(message), _native.hash128(message)))


# ---- back-pressure


def test_a_reader_that_does_not_read_stops_the_entry_rank(start):
    party = start(2)
    lazy, other = party.children
    fill(party.channel)
    wants(other, *(b"%d" % number for number in range(ENTRIES)))
    looks = []
    with pytest.raises(GroupTimeoutError, match=r"did not read what was sent before within 0\.1 s"):
        party.channel.broadcast(b"not sent", timeout=0.1, watch=lambda: looks.append(1))
    assert looks
    # nothing of it was sent, so all goes on once there is room
    lazy.send(("receive", ENTRIES))
    party.channel.broadcast(b"sent")
    for number in range(ENTRIES):
        assert lazy.receive() == b"%d" % number
    for process in party.children:
        wants(process, b"sent")


def test_a_paused_reader_gets_everything_later(start):
    party = start(2)
    paused, other = party.children
    paused.signal(signal.SIGSTOP)
    fill(party.channel)
    wants(other, *(b"%d" % number for number in range(ENTRIES)))
    with pytest.raises(GroupTimeoutError):
        party.channel.broadcast(b"", timeout=0.0)
    paused.signal(signal.SIGCONT)
    wants(paused, *(b"%d" % number for number in range(ENTRIES)))


# ---- long messages


@pytest.mark.parametrize("size", [PAYLOAD_BYTES * ENTRIES, PAYLOAD_BYTES * ENTRIES + 1, 30 * MIB, 47 * MIB + 11])
def test_messages_longer_than_the_ring(start, size):
    party = start(3)
    message = random.Random(size).randbytes(size)
    party.tell(("receive", 2))
    assert party.channel.broadcast(message) == message
    party.channel.broadcast(b"next")
    assert party.channel.overflows == 1
    for process in party.children:
        assert process.receive() == (size, _native.hash128(message))
        assert process.receive() == b"next"


def test_the_start_of_a_message_can_be_polled(start):
    party = start(1)
    (other,) = party.children
    with pytest.raises(GroupTimeoutError):
        party.channel.broadcast(bytes(MIB), timeout=0.0)
    other.send(("poll",))
    assert other.receive() is True


def test_a_message_that_was_interrupted_midway_ends_the_channel(start):
    party = start(1)
    channel = party.channel

    # nobody reads: it waits
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        channel.broadcast(bytes(MIB))
    with pytest.raises(GroupError, match="was given up"):
        channel.broadcast(b"next", timeout=1.0)


def test_a_message_that_was_given_up_midway_ends_the_channel(start):
    party = start(1)
    with pytest.raises(GroupTimeoutError):
        party.channel.broadcast(bytes(MIB), timeout=0.0)
    with pytest.raises(
        GroupError, match=f"a message of {MIB} bytes was given up after {ENTRIES * PAYLOAD_BYTES}"
    ) as caught:
        party.channel.broadcast(b"next")
    assert not isinstance(caught.value, GroupTimeoutError)


class Noticed(Exception):
    """What a watch raises."""


def test_a_reader_that_is_killed_midway_is_noticed_by_watch(start, raw):
    party = start(2)
    victim, other = party.children
    control = Control(raw)
    party.tell(("receive", 1))
    killed_at = []

    def watch():
        if not raw.member.alive(party.tokens[1]):
            raise Noticed

    def kill_midway():
        read = control.word(party.ring_read)
        if read and not killed_at:
            victim.kill()
            killed_at.append(read)

    message, done = bytes(30 * MIB), 0
    while not killed_at:
        done = party.ring.send(message, done, 0) or done
        kill_midway()
    with pytest.raises(Noticed):
        party.channel.broadcast(message, watch=watch)
    # once it has been swept nobody waits for it, even without a watch
    assert raw.member.sweep_peers() == 1
    party.channel = RingChannel(party.ring, 0, 3, 0, timeout=FOR_EVER_S)
    with pytest.raises(PeerLostError, match="rank 1"):
        party.channel.broadcast(bytes(30 * MIB))
    other.kill()  # it may wait for the rest
    control.map.close()


def test_a_rank_that_ends_is_looked_at_at_once(start, raw):
    """Not half a second later: the watch is asked because the bell was rung."""
    party = start(2)
    one, _ = party.children
    fill(party.channel)
    looks = []

    def watch():
        looks.append(1)
        if len(looks) == 1:
            one.send(("end",))
            assert one.receive() == "ended"
        elif party.fellows.words()[1][0] == ENDED:
            raise Noticed

    with pytest.raises(Noticed):
        party.channel.broadcast(b"", watch=watch)
    assert len(looks) == 2


# ---- the entry rank dies


def doomed(parent, namespace):
    """An entry rank that stops in the middle of a long message."""
    raw = Raw(namespace)
    parent.send((raw.id, _native.process_token()))
    tokens = parent.receive()
    channel = RingChannel(_native.Ring(raw.member, tokens, 0), 0, len(tokens), 0, timeout=0.0)
    channel.broadcast(b"whole")
    with pytest.raises(GroupTimeoutError):
        channel.broadcast(bytes(30 * MIB))
    parent.send("midway")
    parent.receive()


def bereaved(parent, namespace, arena, entry):
    """A rank that waits for the rest, and looks whether the entry rank is there."""
    member = joined(namespace, arena)
    ring, _ = meet(parent, member)
    channel = RingChannel(ring, 1, 3, 0, timeout=FOR_EVER_S)

    def watch():
        if not member.alive(entry):
            raise Noticed

    parent.send(channel.broadcast(watch=watch))
    with pytest.raises(Noticed):
        channel.broadcast(watch=watch)
    parent.send("noticed")
    parent.receive()


def test_an_entry_rank_that_is_killed_midway_is_noticed_by_watch(child, namespace):
    entry = child(doomed, namespace)
    arena, token = entry.receive()
    others = [child(bereaved, namespace, arena, token) for _ in range(2)]
    tokens = [token, *(process.receive() for process in others)]
    for process in others:
        process.send((tokens, 0, 0))
        assert process.receive() == "ready"
    entry.send(tokens)
    assert [process.receive() for process in others] == [b"whole"] * 2
    assert entry.receive() == "midway"
    entry.kill()
    assert [process.receive() for process in others] == ["noticed"] * 2
    for number in (1, 0):
        names.unlink(names.segment_name(namespace, arena, number))


# ---- garbage


def test_garbage_is_a_group_error_on_every_rank(start, raw):
    party = start(2)
    control = Control(raw)
    party.channel.broadcast(b"first")
    party.channel.broadcast(b"x" * 50)
    control.put(control.entry(1) + 48, 0)
    control.map.close()
    for process in party.children:
        wants(process, b"first")
        process.send(("receive", 1))
        assert process.receive().startswith("receive from the ring, entry 1: the entry's bytes hash to 0x")
