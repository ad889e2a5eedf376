"""A group made by hand over an arena made by hand: its owner in the test, the other ranks in processes of their own."""

import mmap
import os

from raw import joined
from shmcast import _native
from shmcast.errors import ShmcastError

LONG_NS = 100 * 10**9
"""Longer than any test waits for a child."""
ENDED = 1 << 63
SENT, READ, AGREED = 256, 320, 384
"""Offsets of the bells in the control segment."""
MASK_64 = (1 << 64) - 1


class Party:
    """The owner's end. ``function(parent, namespace, arena, *args)`` runs in every child; the first it does is `meet`."""

    def __init__(self, raw, child, others, function=None, *args):
        self.raw = raw
        self.children = [child(function or obey, raw.namespace, raw.id, *args) for _ in range(others)]
        self.begin()

    def begin(self):
        """A group of all of them, from where the ring is now."""
        tokens = [process.receive() for process in self.children]
        self.name = _native.Fellows.begin(self.raw.member)
        self.tokens = [_native.process_token(), *tokens]
        self.start = _native.Ring.position(self.raw.member)
        self.ring = _native.Ring(self.raw.member, self.tokens, self.start)
        self.fellows = _native.Fellows(self.raw.member, self.tokens, self.name)
        self.tell((self.tokens, self.start, self.name))
        assert self.answers() == ["ready"] * len(self.children)
        there = self.raw.member.tokens()
        self.indices = [there[token] for token in self.tokens]

    @property
    def ring_read(self):
        """Where the first child's count of what it has read lies in the control segment."""
        return 4096 + 256 * self.indices[1] + 152

    def tell(self, words):
        for process in self.children:
            process.send(words)

    def answers(self):
        return [process.receive() for process in self.children]

    def ask(self, *words):
        self.tell(words)
        return self.answers()

    def send(self, payload):
        """The whole message."""
        done = 0
        while (now := self.ring.send(payload, done, LONG_NS)) != len(payload):
            done = done if now is None else now


def meet(parent, member):
    """A child's ends of the ring and of the agreement."""
    _native.Fellows.reset(member)
    parent.send(_native.process_token())
    tokens, start, name = parent.receive()
    ends = _native.Ring(member, tokens, start), _native.Fellows(member, tokens, name)
    parent.send("ready")
    return ends


def obey(parent, namespace, arena):
    """Does what it is told with its ends, and answers with what came of it."""
    member = joined(namespace, arena)
    ring, fellows = meet(parent, member)
    while True:
        verb, *args = parent.receive()
        try:
            if verb == "receive":
                parent.send([receive(ring) for _ in range(*args)])
            elif verb == "receive once":
                parent.send(ring.receive(*args))
            elif verb == "meet":
                ring, fellows = meet(parent, member)
            elif verb == "leave":
                member.leave()
                parent.send("left")
            else:
                parent.send(getattr(ring if verb == "poll" else fellows, verb)(*args))
        except ShmcastError as error:
            parent.send(f"{type(error).__name__}: {error}")


def receive(ring):
    """The next message."""
    while (message := ring.receive(LONG_NS)) is None:
        pass
    return message


def agree(fellows, step):
    """What all agree on."""
    while (answer := fellows.agree(step, LONG_NS)) is None:
        pass
    return answer


class Control:
    """The bytes of a control segment, to read, and to damage."""

    def __init__(self, raw):
        fd = raw.opened(0)
        self.map = mmap.mmap(fd, 0)
        os.close(fd)
        self.ring = len(self.map) - (_native.RING_ENTRIES + 1) * 4096

    def word(self, offset, bytes_=8):
        return int.from_bytes(self.map[offset : offset + bytes_], "little")

    def put(self, offset, value, bytes_=8):
        self.map[offset : offset + bytes_] = value.to_bytes(bytes_, "little")

    def entry(self, position):
        """Where that entry of the ring lies."""
        return self.ring + 4096 + position % _native.RING_ENTRIES * 4096

    def wait_for_sleepers(self, bell, count=1):
        """Returns once so many peers sleep at a bell, or are about to."""
        while self.word(bell + 4, 4).bit_count() < count:
            pass
