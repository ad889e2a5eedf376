"""Roles of `killing.py`: sweepers, of dead arenas and of dead peers, and those that come after a killed sweeper."""

from __future__ import annotations

from types import SimpleNamespace

import shmcast
from kill_owners import OwnerRole
from kill_roles import SEGMENT_BYTES, Join, PeerRole, hold, membership, publish_with
from killing import Role, Violation, play
from shmcast import _native, names


class SweepPeers(PeerRole):
    name = "scrub dead peers"
    kind = "sweeper"

    def prepare(self) -> tuple[object, ...]:
        self.victim, _ = self.joined()
        dead, token = self.joined()
        dead.call(hold, self.publish(5, 90_000, readers=[token]), 5, 90_000)
        self.publish(6, 500, readers=[token])
        dead.call(hold, self.publish(8, 500, readers=1), 8, 500)
        dead.kill()
        return ()

    @staticmethod
    def operation(state: SimpleNamespace) -> int:
        return membership().sweep_peers()


class ScrubHalfAttached(SweepPeers):
    """A peer died between taking the last of `readers=n` and dropping T."""

    name = "scrub a peer that died while attaching"

    def prepare(self) -> tuple[object, ...]:
        self.victim, _ = self.joined()
        dead, _ = self.joined()
        self.lab.board.arm(_native.STEPS["ATTACH_CONSUME"], 1)
        dead.start(Join.operation, self.publish(5, 90_000, readers=1), watched=True)
        if not dead.ends():
            raise Violation("it attached without dropping T")
        return ()


class Sweep(OwnerRole):
    name = "sweep a dead owner's arena"
    kind = "sweeper"

    def prepare(self) -> tuple[object, ...]:
        self.own(self.lab.actor())
        self.victim.call(publish_with, 5, SEGMENT_BYTES, {"readers": 0, "keep": True})
        self.victim.kill()
        self.victim = self.lab.actor()
        return ()

    @staticmethod
    def operation(state: SimpleNamespace) -> None:
        shmcast.sweep()


class SweepData(Sweep):
    """Data segments whose control segment is gone."""

    name = "sweep data without control"

    def prepare(self) -> tuple[object, ...]:
        super().prepare()
        (control,) = [found for found in names.listing(self.lab.namespace) if found.number == 0]
        names.unlink(names.segment_name(*control))
        return ()

    def check_gone(self) -> None:
        """Nobody has marked the arena as ended: who has joined it may still attach."""


class SweepAfterSweeper(Sweep):
    """Another sweeper was killed at it before, at each of its steps."""

    name = "sweep what a killed sweeper left"
    kind = "sweeper's sweeper"

    def variants(self) -> list[object]:
        first = Sweep(self.lab)
        first.witness, first.heir = self.witness, self.heir
        return [(step, 1) for step in dict.fromkeys(play(first, 0, 0)[1])]

    def prepare(self) -> tuple[object, ...]:
        super().prepare()
        step, nth = self.variant
        self.lab.board.arm(step, nth)
        self.victim.start(self.operation, watched=True)
        self.victim.ends()
        self.victim = self.lab.actor()
        return ()


class ScrubAfterSweeper(SweepPeers):
    """The same for the claims of dead peers."""

    name = "scrub what a killed scrubber left"
    kind = "sweeper's sweeper"

    def variants(self) -> list[object]:
        first = SweepPeers(self.lab)
        first.__dict__.update(self.__dict__)
        return [(step, 1) for step in dict.fromkeys(play(first, 0, 0)[1])]

    def prepare(self) -> tuple[object, ...]:
        super().prepare()
        step, nth = self.variant
        self.lab.board.arm(step, nth)
        self.victim.start(self.operation, watched=True)
        self.victim.ends()
        self.victim, _ = self.joined()
        return ()


SWEEPERS: list[type[Role]] = [SweepPeers, ScrubHalfAttached, Sweep, SweepData, ScrubAfterSweeper, SweepAfterSweeper]
