"""Roles of `killing.py`: owners, whose arena is left for a sweep."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

import shmcast
from kill_roles import (
    HELD,
    MAX_BYTES,
    SEGMENT_BYTES,
    PassOnToAnybody,
    close,
    compare,
    create,
    hold,
    is_gone,
    join,
    let_go,
    publish,
    publish_with,
    read_once,
    settle,
    token_of,
)
from killing import Actor, Role, Violation, pattern
from shmcast import ArenaFullError


class OwnerRole(Role):
    """The victim owns the arena; what is left is the witness's, and goes when it lets go."""

    kind = "owner"

    def begin(self) -> None:
        self.witness = self.lab.actor()
        self.heir = self.lab.actor()

    def prepare(self) -> tuple[object, ...]:
        self.own(self.lab.actor())
        return ()

    def own(self, actor: Actor) -> None:
        """Let it be the owner of an arena with something in it."""
        self.victim = actor
        actor.call(create)
        self.raws = [actor.call(publish, seed, nbytes) for seed, nbytes in HELD]
        for raw, (seed, nbytes) in zip(self.raws, HELD, strict=True):
            self.witness.call(hold, raw, seed, nbytes)
        self.token = self.witness.call(token_of)

    def check(self, died: bool) -> None:
        self.witness.call(compare)
        self.lab.sweep_leaves_nothing()
        self.witness.call(compare)
        self.check_gone()
        self.witness.call(compare)
        self.witness.call(let_go)
        self.heir.call(create)
        self.witness.call(read_once, self.heir.call(publish, 7, 50_000), 7, 50_000)
        self.heir.call(close)
        self.witness.call(let_go)

    def check_gone(self) -> None:
        """New attaches are refused, from who has joined as from others."""
        if not self.witness.call(is_gone, self.raws[0]):
            raise Violation("attach to a dead owner's block after the sweep")


class Create(OwnerRole):
    """Creates an arena where a dead one's lies; the witness still reads that one."""

    name = "create"

    def prepare(self) -> tuple[object, ...]:
        self.own(self.lab.actor())
        self.victim.kill()
        self.victim = self.lab.actor()
        return ()

    operation = staticmethod(create)


class Publish(OwnerRole):
    name = "publish to anybody"

    @staticmethod
    def operation(state: SimpleNamespace) -> None:
        publish(state, 5, 200_000, readers=2)


class PublishNamed(OwnerRole):
    name = "publish by name"

    def prepare(self) -> tuple[object, ...]:
        super().prepare()
        return (self.token,)

    @staticmethod
    def operation(state: SimpleNamespace, token: int) -> None:
        publish(state, 5, 200_000, readers=[token])


class PublishToDead(PublishNamed):
    """One of the targets has died: its grant is taken back."""

    name = "publish to one that has died"

    def prepare(self) -> tuple[object, ...]:
        super().prepare()
        dead = self.lab.actor()
        token = dead.call(join, self.victim.call(publish, 6, 500))
        dead.kill()
        return (token,)


class PublishMany(OwnerRole):
    name = "publish many"

    @staticmethod
    def operation(state: SimpleNamespace) -> None:
        state.arena.publish_many([pattern(seed, 3000) for seed in range(5)], readers=1)


class Reserve(OwnerRole):
    name = "reserve and seal"

    @staticmethod
    def operation(state: SimpleNamespace) -> None:
        with state.arena.reserve(200_000, "uint8") as reservation:
            reservation.array[:] = 7


class KeepAndRelease(OwnerRole):
    name = "keep, alias, release, withdraw"

    @staticmethod
    def operation(state: SimpleNamespace) -> None:
        handle = state.arena.publish(pattern(5, 30_000), readers=0, keep=True)
        again = state.arena.alias(handle, readers=1)
        state.arena.release(handle)
        state.arena.withdraw(again)
        state.arena._owner.reclaim()


class OwnerReads(OwnerRole):
    name = "attach its own"

    @staticmethod
    def operation(state: SimpleNamespace) -> None:
        shmcast.attach(state.arena.publish(pattern(5, 30_000), readers=1)).release()


class Grow(OwnerRole):
    name = "grow"

    @staticmethod
    def operation(state: SimpleNamespace) -> None:
        publish(state, 5, SEGMENT_BYTES, readers=0, keep=True)


class Retire(OwnerRole):
    name = "give a segment back"

    def prepare(self) -> tuple[object, ...]:
        super().prepare()
        raw = self.victim.call(publish, 5, SEGMENT_BYTES)
        self.victim.call(_forget, raw)
        return ()

    @staticmethod
    def operation(state: SimpleNamespace) -> None:
        for number, _, used, _ in state.arena._segments.owner.segments():
            if used == 0:
                state.arena._segments.retire(number)


def _forget(state: SimpleNamespace, raw: bytes) -> None:
    state.arena.withdraw(state.kept[raw])
    state.arena._owner.reclaim()


class Revoke(OwnerRole):
    """Takes back what nobody came for, and what a peer that died had passed on."""

    name = "revoke"

    def prepare(self) -> tuple[object, ...]:
        super().prepare()
        self.victim.call(publish, 5, 3000)
        self.victim.call(publish_with, 6, 3000, {"readers": [self.token]})
        lasting = self.victim.call(publish_with, 6, 3000, {"readers": 1, "grant_timeout": None})
        dead = self.lab.actor()
        dead.call(hold, lasting, 6, 3000)
        dead.call(PassOnToAnybody.operation, 0)
        dead.kill()
        return ()

    @staticmethod
    def operation(state: SimpleNamespace) -> None:
        settle(state)


class WaitForSpace(OwnerRole):
    name = "wait for space"

    @staticmethod
    def operation(state: SimpleNamespace) -> None:
        try:
            state.arena.publish(np.zeros(MAX_BYTES, np.uint8), timeout=0.05)
        except ArenaFullError:
            return
        raise Violation("there was room for more than the arena may have")


class Close(OwnerRole):
    name = "close"

    def prepare(self) -> tuple[object, ...]:
        super().prepare()
        self.victim.call(publish_with, 5, SEGMENT_BYTES, {"readers": 0, "keep": True})
        return ()

    operation = staticmethod(close)


OWNERS: list[type[Role]] = [
    Create,
    Publish,
    PublishNamed,
    PublishToDead,
    PublishMany,
    Reserve,
    KeepAndRelease,
    OwnerReads,
    Grow,
    Retire,
    Revoke,
    WaitForSpace,
    Close,
]
