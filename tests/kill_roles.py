"""The roles of `killing.py`: what actors do, and those of readers and of peers that pass on.

A survivor, the witness, holds blocks all the time and compares every byte of them after each death.
"""

from __future__ import annotations

import gc
import os
import time
from types import SimpleNamespace

import numpy as np

import shmcast
from killing import Actor, Role, Violation, pattern
from shmcast import ArenaFullError, ArenaGoneError, _native, process

SLOTS = 32
SEGMENT_BYTES = 2 << 20
MAX_BYTES = 8 << 20
SOON = 1e-6
"""Grants are overdue at once: whatever is not held may be taken back by an owner that needs the space."""
FUTEX = {"x86_64": 202, "aarch64": 98}[os.uname().machine]
HELD = ((2, 300), (3, 70_000), (4, 400_000))
"""Seed and bytes of what the witness holds."""


# ---- what actors do


def create(state: SimpleNamespace) -> None:
    state.arena = shmcast.Arena.create(MAX_BYTES, segment_bytes=SEGMENT_BYTES, max_blocks=SLOTS, grant_timeout=SOON)
    state.kept = {}


def publish(state: SimpleNamespace, seed: int, nbytes: int, **terms: object) -> bytes:
    handle = state.arena.publish(pattern(seed, nbytes), **terms)
    state.kept[handle.to_bytes()] = handle
    return handle.to_bytes()


def publish_waiting(state: SimpleNamespace, nbytes: int) -> bool:
    """Whether there was room for it in time."""
    handle = state.arena.publish(pattern(9, nbytes), readers=1, timeout=20)
    state.arena.withdraw(handle)
    return True


def membership() -> _native.Member:
    (member,) = process.members.values()
    return member


def settle(state: SimpleNamespace) -> tuple[int, int]:
    """Scrub the dead, end what is overdue; bytes and slots that are in use then."""
    membership().sweep_peers()
    for _ in range(2):  # a promise that was passed on gets a deadline of its own first, and that has to pass
        state.arena._owner.reclaim(True)
        overdue = time.monotonic() + 10 * SOON
        while time.monotonic() < overdue:
            pass
    state.arena._owner.reclaim(True)
    stats = state.arena._owner.stats()
    return stats["used_bytes"], stats["slots_used"]


def fill(state: SimpleNamespace) -> None:
    """Overwrite whatever is free."""
    handles = []
    try:
        while len(handles) < SLOTS:
            handles.append(state.arena.publish(np.full(100_000, 0xEE, np.uint8), readers=0, keep=True))
    except ArenaFullError:
        pass
    for handle in handles:
        state.arena.release(handle)
    state.arena._owner.reclaim()


def segments(state: SimpleNamespace) -> list[str]:
    """What this process has in /dev/shm, as it sees it."""
    numbers = [0, *(number for number, *_ in state.arena._owner.segments())]
    return sorted(f"{state.arena.id:016x}.{number}" for number in numbers)


def close(state: SimpleNamespace) -> None:
    state.arena.close()
    state.__dict__.clear()
    gc.collect()


def hold(state: SimpleNamespace, raw: bytes, seed: int, nbytes: int) -> None:
    held = state.__dict__.setdefault("held", [])
    held.append((shmcast.attach(raw), pattern(seed, nbytes)))


def compare(state: SimpleNamespace) -> int:
    """Compares what this process holds, byte by byte; how many blocks."""
    for lease, expected in state.held:
        if not np.array_equal(lease.array, expected):
            raise Violation(f"bytes of {lease.handle} have changed")
    return len(state.held)


def read_once(state: SimpleNamespace, raw: bytes, seed: int, nbytes: int) -> None:
    with shmcast.attach(raw) as lease:
        if not np.array_equal(lease.array, pattern(seed, nbytes)):
            raise Violation(f"bytes of {lease.handle} are wrong")


def is_gone(state: SimpleNamespace, raw: bytes) -> bool:
    try:
        shmcast.attach(raw)
    except ArenaGoneError:
        return True
    return False


def let_go(state: SimpleNamespace) -> None:
    for lease, _ in state.__dict__.pop("held", []):
        lease.release()
    state.__dict__.clear()
    gc.collect()
    process.leave_all()


def join(state: SimpleNamespace, raw: bytes) -> int:
    """Our token, once we are in."""
    shmcast.attach(raw).release()
    return shmcast.process_token()


# ---- peers of an arena that goes on


class PeerRole(Role):
    """The owner and the witness live through all cases."""

    kind = "reader"

    def begin(self) -> None:
        self.owner, self.witness = self.lab.actor(), self.lab.actor()
        self.owner.call(create)
        self.entrance = self.publish(1, 5000, readers=0, keep=True)
        for seed, nbytes in HELD:
            self.witness.call(hold, self.publish(seed, nbytes), seed, nbytes)
        self.before = self.owner.call(settle)

    def publish(self, seed: int, nbytes: int, **terms: object) -> bytes:
        handle = SimpleNamespace(**{"readers": 1, **terms})
        return self.owner.call(publish_with, seed, nbytes, vars(handle))

    def joined(self) -> tuple[Actor, int]:
        actor = self.lab.actor()
        return actor, actor.call(join, self.entrance)

    def check(self, died: bool) -> None:
        self.witness.call(compare)
        shmcast.sweep()
        after = self.owner.call(settle)
        if after != self.before:
            raise Violation(f"bytes and slots in use: {after} after one sweep, {self.before} before")
        self.owner.call(fill)
        self.witness.call(compare)
        self.witness.call(read_once, self.publish(7, 50_000), 7, 50_000)
        if self.lab.segments() != self.owner.call(segments):
            raise Violation(f"there are {self.lab.segments()}, the living owner has {self.owner.call(segments)}")
        if self.owner.call(settle) != self.before:
            raise Violation("a block that was read and released is not free")

    def end(self) -> None:
        self.owner.call(close)
        self.witness.call(let_go)


def publish_with(state: SimpleNamespace, seed: int, nbytes: int, terms: dict[str, object]) -> bytes:
    return publish(state, seed, nbytes, **terms)


class Join(PeerRole):
    name = "join and attach"

    def prepare(self) -> tuple[object, ...]:
        self.victim = self.lab.actor()
        return (self.publish(5, 90_000),)

    @staticmethod
    def operation(state: SimpleNamespace, raw: bytes) -> None:
        state.lease = shmcast.attach(raw)


class AttachGranted(Join):
    name = "attach by name"

    def prepare(self) -> tuple[object, ...]:
        self.victim, token = self.joined()
        return (self.publish(5, 90_000, readers=[token]),)


class AttachOneOfMany(Join):
    name = "attach one of two"

    def prepare(self) -> tuple[object, ...]:
        self.victim, _ = self.joined()
        return (self.publish(5, 90_000, readers=2),)


class AttachAgain(AttachGranted):
    name = "attach what is held"

    def prepare(self) -> tuple[object, ...]:
        (raw,) = super().prepare()
        self.victim.call(hold, raw, 5, 90_000)
        return (raw,)


class AttachStale(AttachGranted):
    name = "attach what is gone"

    def prepare(self) -> tuple[object, ...]:
        (raw,) = super().prepare()
        self.owner.call(settle)
        return (raw,)

    @staticmethod
    def operation(state: SimpleNamespace, raw: bytes) -> None:
        try:
            state.lease = shmcast.attach(raw)
        except shmcast.StaleHandleError:
            return
        raise Violation(f"{raw!r} is not stale")


class Release(AttachGranted):
    name = "release"

    def prepare(self) -> tuple[object, ...]:
        (raw,) = super().prepare()
        self.victim.call(hold, raw, 5, 90_000)
        return ()

    @staticmethod
    def operation(state: SimpleNamespace) -> None:
        state.held.pop()[0].release()


class ReleaseToWaiting(PeerRole):
    """The owner waits for the space; it gets it, from the release or from the scrub."""

    name = "release while the owner waits"

    def prepare(self) -> tuple[object, ...]:
        self.victim, _ = self.joined()
        big = 5 * MAX_BYTES // 8  # two do not fit
        self.victim.call(hold, self.publish(6, big), 6, big)
        self.owner.start(publish_waiting, big)
        return (self.owner.pid,)

    @staticmethod
    def operation(state: SimpleNamespace, owner: int) -> None:
        while not _sleeps(owner):
            pass
        state.held.pop()[0].release()

    def check(self, died: bool) -> None:
        if not self.owner.wait():
            raise Violation("the owner got no room")
        super().check(died)


def _sleeps(pid: int) -> bool:
    """In a futex, with its main thread."""
    with open(f"/proc/{pid}/syscall") as file:
        return file.read().split()[0] == str(FUTEX)


class PassOn(AttachGranted):
    name = "pass on by name"
    kind = "passer-on"

    def prepare(self) -> tuple[object, ...]:
        (raw,) = super().prepare()
        self.victim.call(hold, raw, 5, 90_000)
        self.target = self.witness.call(token_of)
        return (self.target,)

    @staticmethod
    def operation(state: SimpleNamespace, target: int) -> bytes:
        return state.held[0][0].pass_on([target]).to_bytes()


class PassOnTwice(PassOn):
    name = "pass on twice"

    @staticmethod
    def operation(state: SimpleNamespace, target: int) -> None:
        for _ in range(2):
            state.held[0][0].pass_on([target])


class PassOnToAnybody(PassOn):
    name = "pass on to who has not joined"

    @staticmethod
    def operation(state: SimpleNamespace, target: int) -> None:
        state.held[0][0].pass_on(1)


class Leave(PeerRole):
    name = "leave"

    def prepare(self) -> tuple[object, ...]:
        self.victim, _ = self.joined()
        return ()

    @staticmethod
    def operation(state: SimpleNamespace) -> None:
        process.leave_all()


class Private(AttachGranted):
    name = "write to a private mapping"

    def prepare(self) -> tuple[object, ...]:
        (raw,) = super().prepare()
        self.victim.call(hold, raw, 5, 90_000)
        return ()

    @staticmethod
    def operation(state: SimpleNamespace) -> None:
        lease, _ = state.held.pop()
        view = lease.view(True)
        np.asarray(view)[:] = 0xAA
        del view
        gc.collect()
        lease.release()


def token_of(state: SimpleNamespace) -> int:
    return shmcast.process_token()


READERS: list[type[Role]] = [
    Join,
    AttachGranted,
    AttachOneOfMany,
    AttachAgain,
    AttachStale,
    Release,
    ReleaseToWaiting,
    Leave,
    Private,
]
PASSERS_ON: list[type[Role]] = [PassOn, PassOnTwice, PassOnToAnybody]
