"""Kill a real process at each numbered step of an operation, and look at what it has left behind.

    env $(.venv/bin/python tests/variant.py faults -DSHMCAST_FAULTS=ON) .venv/bin/python tests/killing.py [ROLE ...]

needs a build with steps (native/steps.h). A role (`kill_*.py`) says who does what. It is played once to the end, which
gives the list of its steps; then once for every step: the victim, a process of its own, ends itself with SIGKILL directly
before that step. A step that is passed many times (a scan of all slots) is met the first time, in the middle, and the
last time. After each death the role's check looks at the shared memory and at the survivors. One line of JSON a role.
Exit status: 0: no violation; 1: some; 2: no such role.
"""

from __future__ import annotations

import ctypes
import dataclasses
import faulthandler
import json
import mmap
import os
import pickle
import secrets
import select
import signal
import struct
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

import shmcast
from child import untidy
from shmcast import _native, names

NUMBERS = {number: name for name, number in _native.STEPS.items()}
ANSWER_TIMEOUT_S = 30.0
CASE_TIMEOUT_S = 60
STEP, LEFT, SIGNAL, LAST, COUNT, TRACE = 0, 1, 2, 3, 4, 16
"""Words of the board, see steps.h."""


class Violation(AssertionError):
    """What must not be after a death."""


class Died(Exception):
    """The process at the other end is gone."""


class Board:
    """Words that the victim shares with us: where it is to end, and where it was."""

    def __init__(self, words: int = 1 << 16) -> None:
        self._map = mmap.mmap(-1, words * 4)
        self.words = memoryview(self._map).cast("I")

    def clear(self) -> None:
        self.words[:TRACE] = memoryview(bytes(TRACE * 4)).cast("I")

    def arm(self, step: int, nth: int, signum: int = signal.SIGKILL) -> None:
        """The step is written last: from then on it counts."""
        self.clear()
        self.words[SIGNAL], self.words[LEFT] = signum, nth
        self.words[STEP] = step

    @property
    def last(self) -> str:
        return NUMBERS.get(self.words[LAST], "none")

    def trace(self) -> list[int]:
        count = self.words[COUNT]
        if TRACE + count > len(self.words):
            raise Violation(f"{count} steps are more than the board has room for")
        return list(self.words[TRACE : TRACE + count])


class Actor:
    """A process that does what it is told: `call` runs a function of ours there, with its own `SimpleNamespace` first."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        here, there = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(here[1]), os.close(there[0])
            _serve(lab, here[0], there[1])
        os.close(here[0]), os.close(there[1])
        self._write, self._read = here[1], there[0]
        self.alive = True
        lab.actors.append(self)

    def start(self, function: Callable[..., object], *args: object, watched: bool = False) -> None:
        data = pickle.dumps((function, args, watched))
        os.write(self._write, struct.pack("I", len(data)) + data)

    def wait(self, timeout: float = 30.0) -> Any:
        """What the function returned. Died; Violation where it raised, or where nothing comes."""
        deadline, data = time.monotonic() + timeout, b""
        while len(data) < 4 or len(data) < 4 + struct.unpack_from("I", data)[0]:
            left = max(deadline - time.monotonic(), 0)
            if not select.select([self._read], [], [], left)[0]:
                raise Violation(f"process {self.pid} does not answer for {timeout} s; it was at {self._lab.board.last}")
            more = os.read(self._read, 1 << 16)
            if not more:
                self.reap()
                raise Died
            data += more
        done, result = pickle.loads(data[4:])
        if not done:
            raise Violation(f"process {self.pid}: {result}")
        return result

    def call(self, function: Callable[..., object], *args: object) -> Any:
        self.start(function, *args)
        return self.wait()

    def runs(self) -> bool:
        """Whether it is still at what it was told, and lives."""
        return not select.select([self._read], [], [], 0.001)[0]

    def ends(self) -> bool:
        """Wait for the answer or the end, then kill; whether it had ended by itself."""
        try:
            self.wait()
        except Died:
            return True
        self.kill()
        return False

    def kill(self) -> None:
        """SIGKILL, and it is gone when this returns. Idempotent."""
        if self.alive:
            os.kill(self.pid, signal.SIGKILL)
            self.reap()

    def reap(self) -> None:
        if self.alive:
            self.alive = False
            os.waitpid(self.pid, 0)
            os.close(self._read), os.close(self._write)
            self._lab.actors.remove(self)


def _serve(lab: Lab, read_fd: int, write_fd: int) -> None:
    """The life of an actor; does not return."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    state = SimpleNamespace()
    stream = os.fdopen(read_fd, "rb")
    while head := stream.read(4):
        function, args, watched = pickle.loads(stream.read(struct.unpack("I", head)[0]))
        if watched:
            _native.fault_board(lab.board.words)
        try:
            answer = True, function(state, *args)
        except BaseException:
            answer = False, traceback.format_exc()
        if watched:
            _native.fault_board(None)
        data = pickle.dumps(answer)
        os.write(write_fd, struct.pack("I", len(data)) + data)
    os._exit(0)


class Lab:
    """What roles are played in: a namespace of our own, a board, and the processes that live now."""

    def __init__(self) -> None:
        self.board = Board()
        self.actors: list[Actor] = []
        self.namespace = f"k{os.getpid()}x{secrets.token_hex(4)}"
        os.environ["SHMCAST_NAMESPACE"] = self.namespace

    def actor(self) -> Actor:
        return Actor(self)

    def segments(self) -> list[str]:
        return sorted(f"{found.arena:016x}.{found.number}" for found in names.listing(self.namespace))

    def sweep_leaves_nothing(self) -> None:
        """One sweep, and no segment of ours is there: nobody lives who owns one."""
        shmcast.sweep()
        if left := self.segments():
            raise Violation(f"one sweep has left {left}")

    def close(self) -> None:
        for actor in list(self.actors):
            actor.kill()
        for found in names.listing(self.namespace):
            names.unlink(names.segment_name(*found))


class Role(ABC):
    """One operation, who does it, and what has to be true once that process is dead.

    Subclasses give `prepare` (everything up to the operation; sets `victim`), `operation` (runs in the victim, with
    `arguments`) and `check`."""

    name = ""
    kind = ""
    """Class of the role, for the census: owner, reader, passer-on, sweeper, rank."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.victim: Actor
        self.variant: Any = None

    def begin(self) -> None:
        """Once, before all cases."""

    def variants(self) -> list[object]:
        """Each of them is played with all its steps, as `variant`."""
        return [None]

    @abstractmethod
    def prepare(self) -> tuple[object, ...]:
        """Before each case; returns the operation's arguments."""

    @staticmethod
    @abstractmethod
    def operation(state: SimpleNamespace, *args: object) -> object:
        """In the victim, watched."""

    def meanwhile(self) -> None:
        """While the victim is at it: what others do."""

    @abstractmethod
    def check(self, died: bool) -> None:
        """After the victim's death; Violation says what is wrong. ``died``: in the operation, else directly after it."""

    def end(self) -> None:
        """Once, after all cases."""


@dataclasses.dataclass
class Report:
    """What came of a role."""

    role: str
    kind: str
    steps: list[str]
    """Those at which the victim has died."""
    cases: int = 0
    missed: int = 0
    """Cases in which the operation was over before the step came that often: how often differs a little from run to run."""
    violations: list[str] = dataclasses.field(default_factory=list)


def occasions(trace: list[int]) -> list[tuple[int, int]]:
    """(step, how-manieth time) for every step of a trace: the first, the middle and the last time."""
    found = []
    for step in dict.fromkeys(trace):
        times = trace.count(step)
        found += [(step, nth) for nth in sorted({1, (times + 1) // 2, times})]
    return found


def play(role: Role, step: int, nth: int) -> tuple[bool, list[int]]:
    """One case. Whether the victim has died at the step, and the steps that it took."""
    arguments = role.prepare()
    role.lab.board.arm(step, nth)
    role.victim.start(role.operation, *arguments, watched=True)
    role.meanwhile()
    died = role.victim.ends()
    trace = role.lab.board.trace() if not died else []
    role.check(died)
    return died, trace


def play_all(played: type[Role]) -> Report:
    """A role once to its end, then once for each of its steps."""
    lab = Lab()
    report = Report(played.name, played.kind, [])
    reached: set[str] = set()
    case = "before"
    try:
        role = played(lab)
        role.begin()
        for variant in role.variants():
            role.variant = variant
            case = f"the end of variant {variant}"
            trace = _bounded(role, 0, 0)[1]
            report.cases += 1
            for step, nth in occasions(trace):
                case = f"{NUMBERS[step]} time {nth}, variant {variant}"
                died, _ = _bounded(role, step, nth)
                report.cases += 1
                report.missed += not died
                if died:
                    reached.add(NUMBERS[step])
        case = "after all"
        role.end()
        lab.sweep_leaves_nothing()
    except (Violation, Died, OSError, AssertionError, RuntimeError) as error:
        report.violations.append(f"{played.name}, killed at {case}: {type(error).__name__}: {error}")
    finally:
        lab.close()
    report.steps = sorted(reached)
    return report


def _bounded(role: Role, step: int, nth: int) -> tuple[bool, list[int]]:
    faulthandler.dump_traceback_later(CASE_TIMEOUT_S, exit=True)
    try:
        return play(role, step, nth)
    finally:
        faulthandler.cancel_dump_traceback_later()


def pattern(seed: int, nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Bytes that follow from a number."""
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


def main(arguments: list[str]) -> int:
    from kill_owners import OWNERS
    from kill_ranks import RANKS
    from kill_roles import PASSERS_ON, READERS
    from kill_sweepers import SWEEPERS

    roles = [*READERS, *PASSERS_ON, *OWNERS, *SWEEPERS, *RANKS]
    if unknown := set(arguments) - {role.name for role in roles} - {role.kind for role in roles}:
        print(
            f"no role {', '.join(sorted(unknown))}; there are: {', '.join(role.name for role in roles)}",
            file=sys.stderr,
        )
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))  # what has been begun is tidied up
    wrong = False
    for role in [role for role in roles if not arguments or role.name in arguments or role.kind in arguments]:
        with untidy():  # whoever is to reach a step reaches it itself
            report = play_all(role)
        wrong |= bool(report.violations)
        print(json.dumps(dataclasses.asdict(report)), flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.modules["killing"] = sys.modules["__main__"]
    sys.exit(main(sys.argv[1:]))
