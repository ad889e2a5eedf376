"""Who is in a group, how far each rank has come, and who is to blame when one does not come.

Every rank has a word in the control segment of the entry rank's arena that the others read. It counts double: ``2 n`` when
message n has been taken in, ``2 n + 1`` while waiting for the next, so that a rank which has not come can be told from those
that wait for it. Its top bit says that the rank will take in no more: it has closed the group, or seen it break. What of
message n a rank could not take in stands beside the word, so that all ranks come to the same end without a collective.

Where no memory is shared there are no words: nobody is known to be late or dead then, but by what a socket tells.
"""

import time
from collections.abc import Callable

from . import _native
from .attach import Peer
from .errors import GroupError, GroupTimeoutError, PeerLostError

Watch = Callable[[], None]

_ENDED = 1 << 63
_ABSENT = 1 << 62
"""The word of a rank that has left: it is neither behind nor ahead, but not there, which `dead` finds."""
_DEATH_S = 2.0
"""A socket is closed a little before the lock of its dead process is gone; how long to wait for that at most."""
_LINGER_S = 5.0
_SLICE_S = 0.5


class Roster:
    """The ranks of a group, as one of them sees them through shared memory."""

    def __init__(self, member: _native.Member | None, peers: tuple[Peer, ...], entry: int, name: int = 0) -> None:
        """``member``: this process in the arena, None where no memory is shared. ``peers``: tokens by rank. ``name``: of the
        group in the arena, see `Fellows.begin`."""
        self.step = 0
        """The last message that this rank has taken in."""
        self._peers = peers
        self._entry = entry
        self._own = _native.process_token()
        self._joined = member
        self._fellows = None if member is None else _native.Fellows(member, peers, name)
        self._others = [rank for rank, token in enumerate(peers) if token != self._own]

    @property
    def member(self) -> _native.Member | None:
        """This process in the arena, where memory is shared and this is no forked child."""
        return None if self._joined is None or self._joined.inherited else self._joined

    # ---- what this rank says

    def wait_begins(self) -> None:
        """This rank waits for the next message from now on."""
        if self._fellows is not None:
            self._fellows.record(2 * self.step + 1)

    def taken_in(self, failures: int = 0) -> None:
        """This rank has message `step`; ``failures``: bit i: not its part i."""
        if self._fellows is not None:
            self._fellows.record(2 * self.step, failures)

    def ends(self) -> None:
        """This rank takes in no more."""
        if self._fellows is not None and self.member is not None:
            self._fellows.record(_ENDED | 2 * self.step)

    # ---- what the others say

    def agree(self, timeout: float) -> tuple[int, list[int]]:
        """Once all ranks have taken in message `step`: ``(what some rank could not, ranks that could not)``.

        Alike on all ranks, also in the end: either all of them get this, or all raise. GroupTimeoutError after
        ``timeout`` seconds, PeerLostError, GroupError where another rank has given the group up."""
        if self._fellows is None:
            raise ValueError("agree: there is no memory that ranks share")
        deadline = time.monotonic() + timeout
        while True:
            left = deadline - time.monotonic()
            agreed = self._fellows.agree(self.step, int(min(max(left, 0.0), _SLICE_S) * 1e9))
            if agreed is not None:
                parts, ranks = agreed
                return parts, [rank for rank in range(len(self._peers)) if ranks >> rank & 1]
            failure = self._no_agreement(left, timeout)
            # The first to give up decides for all, unless all have come meanwhile.
            if failure is not None and self._fellows.give_up(self.step):
                try:
                    raise failure
                finally:
                    del failure  # or it would keep itself, and with it all that callers hold

    def _no_agreement(self, left: float, timeout: float) -> GroupError | None:
        """Why the wait for the others has no sense any more; None: it still has. The same for who gives up first as for
        those who see that somebody has."""
        fellows = self._fellows
        if fellows is None:
            return None
        dead = [rank for rank in self.dead() if not fellows.has(rank, self.step)]
        if dead:
            return self._lost(dead)
        given_up, ended = fellows.given_up(), self.ended(self.step - 1)
        if ended and not given_up:
            return self.gave_up(ended)
        if left > 0 and not given_up:
            return None
        late = ", ".join(f"rank {rank} is at step {word >> 1}" for rank, word in self.behind(2 * self.step))
        if late or not ended:
            return GroupTimeoutError(
                f"{late or 'no rank'}, this is step {self.step}: a rank did not take it in in time"
            )
        return self.gave_up(ended)

    def confirmed(self) -> tuple[int, int]:
        """``(the last message that every rank has taken in or will never take in, the last that one could not)``."""
        if self._fellows is None:
            return self.step, 0
        low, failed = self.step, 0
        words = self._fellows.words()
        for rank in self._others:
            word, failed_word = words[rank]
            if word < _ABSENT:
                low, failed = min(low, word >> 1), max(failed, failed_word >> 1)
        return low, failed

    def ended(self, step: int | None = None) -> list[int]:
        """Ranks that will take in no message after ``step``, by default the last that this rank has taken in."""
        step = self.step if step is None else step
        if self._fellows is None or not self._others:
            return []
        words = self._fellows.words()
        return [rank for rank in self._others if (words[rank][0] ^ _ENDED) >> 1 <= step]

    def behind(self, word: int) -> list[tuple[int, int]]:
        """``[(rank, its word)]`` of those that live and go on, and have not come as far as ``word``."""
        if self._fellows is None or self.member is None:
            return []
        words = self._fellows.words()
        return [(rank, words[rank][0]) for rank in self._others if words[rank][0] < word and self._lives(rank)]

    def dead(self) -> list[int]:
        """Ranks whose process has died; else ranks that have left, which is also what the dead look like once they have
        been swept. Costs some 10 µs a rank."""
        member = self.member
        if member is None:
            return []
        there = member.tokens()
        died = [rank for rank in self._others if self._peers[rank] in there and not self._lives(rank)]
        return died or [rank for rank in self._others if self._peers[rank] not in there]

    def _lives(self, rank: int) -> bool:
        member = self.member
        try:
            return member is not None and member.alive(self._peers[rank])
        except FileNotFoundError:
            # The arena's name is gone: the entry rank closed it, or it died and was swept. Of the others nothing is known.
            return rank != self._entry
        except OSError:
            return True  # no descriptor to look with: who can not be asked counts as alive

    # ---- what to raise

    def watch(self) -> None:
        """Called while a rank waits: raises what no socket of this rank tells."""
        dead = self.dead()
        if dead:
            raise self._lost(dead)
        ended = self.ended()
        if ended:
            raise self.gave_up(ended)

    def diagnose(self, cause: GroupError) -> GroupError:
        """The same error of a wait for the next message with the names of the ranks concerned, as far as shared memory
        tells."""
        if self.member is None:
            return cause
        # A connection that breaks has a reason, which may be seen a little later; other causes need none.
        lost = isinstance(cause, PeerLostError)
        deadline = time.monotonic() + (_DEATH_S if lost else 0.0)
        while True:
            dead, ended = self.dead(), self.ended()
            if dead or ended or time.monotonic() >= deadline:
                break
            time.sleep(0.005)
        if dead:
            return self._lost(dead, cause)
        if not lost and not isinstance(cause, GroupTimeoutError):
            return cause
        late = ", ".join(f"rank {rank} is at step {at >> 1}" for rank, at in self.behind(2 * self.step + 1))
        if late:
            # Who times out closes connections, which others see as a loss: the reason is still who is late.
            return GroupTimeoutError(f"{late}, this is {self._where()}; {cause}")
        return self.gave_up(ended, cause) if ended else cause

    def gave_up(self, ranks: list[int], cause: GroupError | None = None) -> GroupError:
        """For ranks that have ended."""
        text = f"{self._where()}: {ranks_text(ranks)} closed the group or gave it up before"
        return GroupError(text if cause is None else f"{text}; {cause}")

    def _lost(self, ranks: list[int], cause: GroupError | None = None) -> PeerLostError:
        text = f"{self._where()}: {ranks_text(ranks)} died or closed the group"
        return PeerLostError(text if cause is None else f"{text}; {cause}")

    def _where(self) -> str:
        return f"step {self.step + 1}"

    # ---- the end

    def linger(self) -> None:
        """Wait for ranks that are there and have not taken in the last message: they need the arena for it, and to them a
        rank that has left looks like one that has died."""
        deadline = time.monotonic() + _LINGER_S
        pause = 0.0001
        while self.behind(2 * self.step) and time.monotonic() < deadline:
            time.sleep(pause)
            pause = min(2 * pause, 0.01)


def ranks_text(ranks: list[int], all_of_them: bool = True) -> str:
    """``rank 1`` or ``ranks 1, 3``; where it is not known of each of them, ``one or more of ranks 1, 3``."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return ("" if all_of_them else "one or more of ") + "ranks " + ", ".join(map(str, ranks))
