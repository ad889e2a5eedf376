"""The parent's end of groups: three ranks each, made together, ended together, or broken by a kill or a long pause."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from . import party
from .board import Board
from .herd import Herd, Process
from .link import ClosedError, Link

BROKEN = ("PeerLostError", "GroupTimeoutError", "GroupError", "ArenaGoneError")


class Group:
    """The ranks of one group."""

    def __init__(self, ranks: list[Process], end_by: float) -> None:
        self.ranks, self.end_by = ranks, end_by
        self.size = len(ranks)
        self.arena: int | None = None
        """Id, once the entry rank has told."""
        self.killed = self.late = self.going = False
        """A rank was killed; one was paused for longer than a group waits; survivors were told to go."""
        self.ended: dict[int, tuple[str, int, str, str]] = {}
        """How, by process id: kind, steps, class of the error, text."""


class Groups:
    """All groups that live. ``complain``: takes a violation as text."""

    def __init__(
        self,
        rng: random.Random,
        herd: Herd,
        namespace: str,
        complain: Callable[[str], None],
        close: Callable[[], None],
    ) -> None:
        self._random, self._herd, self._namespace = rng, herd, namespace
        self._complain, self._close = complain, close
        self.live: list[Group] = []
        self.steps = self.broken = self.closed = self.timeouts = 0

    def start(self) -> None:
        """Fork the ranks of one more."""
        seed = self._random.getrandbits(64)
        pairs = [Link.pair() for _ in range(1, party.SIZE)]
        ours = [one for one, _ in pairs], *([other] for _, other in pairs)

        def main(rank: int, link: Link, board: Board) -> None:
            for one, other in pairs:
                for end in (one, other):
                    if end not in ours[rank]:
                        end.close()
            party.serve(link, board, self._namespace, rank, list(ours[rank]), seed)

        ranks = [self._herd.fork(f"rank {rank}", partial(main, rank), self._close) for rank in range(party.SIZE)]
        for one, other in pairs:
            one.close()
            other.close()
        self.live.append(Group(ranks, time.monotonic() + self._random.uniform(1, 6)))

    def of(self, process: Process) -> Group | None:
        """The group that it is in."""
        return next((group for group in self.live if process in group.ranks), None)

    def heard(self, process: Process, kind: str, value: Any) -> None:
        """A rank has said something."""
        group = self.of(process)
        if group is None:
            return
        if kind == "made":
            if value[0]:
                group.arena = value[0]
            return
        group.ended[process.pid] = (kind, *value)
        if kind not in ("closed", "broken"):
            self._complain(f"{process}: {kind} in step {value[0]}: {value[2]}")
        elif kind == "broken":
            self._judge(process, group, value[1], value[2])

    def _judge(self, process: Process, group: Group, name: str, text: str) -> None:
        """Is it right of that rank to give its group up?"""
        if name not in BROKEN:
            self._complain(f"{process}: a group ends with {name}: {text}")
        if group.killed or group.late:
            return
        if name == "GroupTimeoutError":
            self.timeouts += 1  # a machine that is slow enough looks like that
        elif not any("GroupTimeoutError" in other for other in group.ended.values()):
            self._complain(f"{process}: every rank lives, and none was late: {name}: {text}")

    def bury(self, process: Process) -> None:
        """A rank is dead."""
        group = self.of(process)
        if group is not None:
            group.ranks.remove(process)
            if not group.ranks:
                self.live.remove(group)

    def tend(self) -> None:
        """End what is due; let go those of whom all have said how it ended."""
        now = time.monotonic()
        for group in self.live:
            if not group.going and all(rank.pid in group.ended for rank in group.ranks):
                self._finish(group)
            elif now > group.end_by and group.arena is not None and not group.killed:
                group.end_by = float("inf")
                self._tell(group.ranks[0], ("end",))
            for rank in group.ranks:
                rounds = rank.board.rounds
                if rounds != rank.rounds or rank.pid in group.ended or rank.resume_by:
                    rank.rounds, rank.since = rounds, now

    def _finish(self, group: Group) -> None:
        group.going = True
        ended = [group.ended[rank.pid] for rank in group.ranks]
        for rank in group.ranks:
            self._tell(rank, ("go",))
        steps = {steps for _, steps, *_ in ended}
        kinds = {kind for kind, *_ in ended}
        if len(steps) > 1 or len(kinds) > 1:
            told = "; ".join(f"{kind} after {steps} steps {name}: {text}" for kind, steps, name, text in ended)
            self._complain(f"a group of which {len(ended)} are left does not end alike: {told}")
        self.steps += max(steps, default=0)
        self.broken += "broken" in kinds
        self.closed += "closed" in kinds

    @staticmethod
    def _tell(process: Process, message: tuple[str]) -> None:
        try:
            process.link.send(message)
        except ClosedError:
            pass
