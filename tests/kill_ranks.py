"""Roles of `killing.py` in a group: ranks that send, take in, agree, give up, and end.

The group is made of `_native.Ring` and `_native.Fellows` alone, so that it needs nothing but processes. Whoever dies when:
the ranks that live come to the same end.
"""

from __future__ import annotations

from types import SimpleNamespace

import shmcast
from kill_roles import PeerRole, create, membership
from killing import Actor, Role, Violation, pattern
from shmcast import _native

SLICE_NS = 50_000_000
ENDED = 1 << 63
MESSAGE = pattern(11, 20_000).tobytes()
"""Longer than one entry of the ring."""


def reset(state: SimpleNamespace) -> int:
    _native.Fellows.reset(membership())
    return shmcast.process_token()


def begin(state: SimpleNamespace) -> tuple[int, int]:
    """The owner's part: where the messages of the group begin, and its name."""
    member = membership()
    return _native.Fellows.begin(member), _native.Ring.position(member)


def meet(state: SimpleNamespace, tokens: list[int], group: int, start: int) -> None:
    member = membership()
    state.tokens = tokens
    state.ring = _native.Ring(member, tokens, start)
    state.fellows = _native.Fellows(member, tokens, group)


def all_alive(state: SimpleNamespace) -> bool:
    return all(membership().alive(token) for token in state.tokens)


def transfer(state: SimpleNamespace) -> bool:
    """Send or take in one message; False where a rank that is gone is in the way."""
    if membership().index == 0:
        done = 0
        while done < len(MESSAGE):
            now = state.ring.send(MESSAGE, done, SLICE_NS)
            done = done if now is None else now
            if now is None and not all_alive(state):
                return False
        return True
    while (got := state.ring.receive(SLICE_NS)) is None:
        if not membership().alive(state.tokens[0]):
            return False
    if got != MESSAGE:
        raise Violation(f"a message of {len(got)} bytes is not the one that was sent, of {len(MESSAGE)}")
    return True


def take_part(state: SimpleNamespace, step: int, failures: int) -> object:
    """One message from its beginning to what became of it: what all agreed on, or None where it was given up."""
    if transfer(state):
        state.fellows.record(2 * step, failures)
        answer = agree_late(state, step)
        if answer is not None:
            state.fellows.record(2 * step + 1)
        return answer
    if not state.fellows.give_up(step):
        raise Violation("others have agreed on what this rank has not taken in")
    return None


def record_only(state: SimpleNamespace, step: int) -> None:
    """Send or take in, say so, and let others find out what it amounts to."""
    if not transfer(state):
        raise Violation("a rank that lives does not send")
    state.fellows.record(2 * step)


def agree_late(state: SimpleNamespace, step: int) -> object:
    while (answer := state.fellows.agree(step, SLICE_NS)) is None:
        if state.fellows.given_up():
            return None
        if not all_alive(state) and state.fellows.give_up(step):
            return None
    return answer


def wait_for_rank(state: SimpleNamespace, rank: int, step: int) -> None:
    while state.fellows.words()[rank][0] != 2 * step:
        pass


def end(state: SimpleNamespace, step: int) -> None:
    state.fellows.words()
    state.fellows.record(ENDED | 2 * step, 1)


class RankRole(PeerRole):
    """Three ranks: the arena's owner, and two others, one of which is the victim."""

    kind = "rank"
    failures = 0

    def prepare(self) -> tuple[object, ...]:
        self.victim, _ = self.joined()
        self.other, _ = self.joined()
        self.gather([self.owner, self.victim, self.other])
        for rank in (self.owner, self.other):
            rank.start(take_part, 1, 0)
        return (1, self.failures)

    def gather(self, ranks: list[Actor]) -> None:
        """A group of these, from now on."""
        self.ranks = ranks
        tokens = [rank.call(reset) for rank in ranks]
        terms = ranks[0].call(begin)
        for rank in ranks:
            rank.call(meet, tokens, *terms)

    operation = staticmethod(take_part)

    def check(self, died: bool) -> None:
        ends = [rank.wait() for rank in (self.owner, self.other)]
        if ends[0] != ends[1]:
            raise Violation(f"the ranks that live came to different ends: {ends}")
        if not died and ends[0] != (self.failures, 2 if self.failures else 0):
            raise Violation(f"nobody died before the end, and they agreed on {ends}")
        self.other.kill()
        super().check(died)


class TakeIn(RankRole):
    name = "take in and agree"


class TakeInFailed(RankRole):
    name = "take in with a failure and agree"
    failures = 5


class TakeInLast(RankRole):
    """The victim comes last, and wakes the others."""

    name = "be the last to agree"

    def prepare(self) -> tuple[object, ...]:
        arguments = super().prepare()
        self.victim.call(wait_for_rank, 2, 1)
        return arguments


class Decide(RankRole):
    """The victim alone looks what all have recorded; the others ask when it is done, or dead."""

    name = "decide"

    def prepare(self) -> tuple[object, ...]:
        self.victim, _ = self.joined()
        self.other, _ = self.joined()
        self.gather([self.owner, self.victim, self.other, *self.dead()])
        for rank in (self.owner, self.other):
            rank.call(record_only, 1)
        return (1, self.failures)

    def dead(self) -> list[Actor]:
        return []

    def check(self, died: bool) -> None:
        for rank in (self.owner, self.other):
            rank.start(agree_late, 1)
        super().check(died)


class DecideFailed(Decide):
    name = "decide that it has failed"
    failures = 5


class AgreeLate(Decide):
    """All have recorded and one has decided already; the victim reads what."""

    name = "read what was decided"

    def prepare(self) -> tuple[object, ...]:
        arguments = super().prepare()
        self.victim.call(record_only, 1)
        self.other.call(agree_late, 1)
        return arguments[:1]

    operation = staticmethod(agree_late)


class FallAsleep(RankRole):
    """The victim waits for a message that the owner does not send before it sleeps, or is dead."""

    name = "wait for a message"

    def prepare(self) -> tuple[object, ...]:
        self.victim, _ = self.joined()
        self.other, _ = self.joined()
        self.gather([self.owner, self.victim, self.other])
        return (1, 0)

    def meanwhile(self) -> None:
        while self.victim.runs() and self.lab.board.last != "BELL_SLEEP":
            pass
        for rank in (self.owner, self.other):
            rank.start(take_part, 1, 0)


class GiveUp(Decide):
    """A rank has died before the message: the victim notices, and gives up for all."""

    name = "give up"

    def prepare(self) -> tuple[object, ...]:
        arguments = super().prepare()
        self.ranks[3].kill()
        return arguments

    def dead(self) -> list[Actor]:
        return [self.joined()[0]]

    def check(self, died: bool) -> None:
        ends = [rank.call(agree_late, 1) for rank in (self.owner, self.other)]
        if ends != [None, None]:
            raise Violation(f"a rank has died before the message, and they agreed on {ends}")
        self.other.kill()
        PeerRole.check(self, died)


class Meet(RankRole):
    """The victim dies while the group is being made: the others have nothing to give up but say who is missing."""

    name = "meet"

    def prepare(self) -> tuple[object, ...]:
        self.victim, token = self.joined()
        tokens = [self.owner.call(reset), token]
        return (tokens, *self.owner.call(begin))

    @staticmethod
    def operation(state: SimpleNamespace, tokens: list[int], group: int, start: int) -> None:
        reset(state)
        meet(state, tokens, group, start)
        membership().set_step(3, True)

    def check(self, died: bool) -> None:
        PeerRole.check(self, died)


class End(RankRole):
    name = "end"

    def prepare(self) -> tuple[object, ...]:
        super().prepare()
        return (1,)

    @staticmethod
    def operation(state: SimpleNamespace, step: int) -> None:
        end(state, 0)

    def check(self, died: bool) -> None:
        ends = [rank.wait() for rank in (self.owner, self.other)]
        if ends != [None, None]:
            raise Violation(f"a rank has ended before the message, and they agreed on {ends}")
        self.other.kill()
        PeerRole.check(self, died)


class Send(Role):
    """The victim is the owner, who sends; the two others agree, or are left alone, alike."""

    name = "send and agree"
    kind = "rank"

    def prepare(self) -> tuple[object, ...]:
        self.victim = self.lab.actor()
        self.victim.call(create)
        self.others = [self.lab.actor() for _ in range(2)]
        entrance = self.victim.call(_entrance)
        for rank in self.others:
            rank.call(_enter, entrance)
        ranks = [self.victim, *self.others]
        tokens = [rank.call(reset) for rank in ranks]
        if type(self) is Send:
            terms = self.victim.call(begin)
            for rank in ranks:
                rank.call(meet, tokens, *terms)
            for rank in self.others:
                rank.start(take_part, 1, 0)
            return (1, 0)
        return (tokens,)

    operation = staticmethod(take_part)

    def check(self, died: bool) -> None:
        ends = [rank.wait() for rank in self.others]
        if ends[0] != ends[1] or (not died and ends[0] != (0, 0)):
            raise Violation(f"the ranks that live came to different ends: {ends}")
        self.finish()

    def finish(self) -> None:
        for rank in self.others:
            rank.kill()
        self.lab.sweep_leaves_nothing()


class Begin(Send):
    """The owner begins a group, and dies before anybody knows of it."""

    name = "begin a group"

    @staticmethod
    def operation(state: SimpleNamespace, tokens: list[int]) -> None:
        meet(state, tokens, *begin(state))

    def check(self, died: bool) -> None:
        self.finish()


def _entrance(state: SimpleNamespace) -> bytes:
    return state.arena.publish(pattern(1, 5000), readers=0, keep=True).to_bytes()


def _enter(state: SimpleNamespace, raw: bytes) -> None:
    shmcast.attach(raw).release()


RANKS: list[type[Role]] = [
    TakeIn,
    TakeInFailed,
    TakeInLast,
    Decide,
    DecideFailed,
    AgreeLate,
    FallAsleep,
    GiveUp,
    Meet,
    End,
    Send,
    Begin,
]
