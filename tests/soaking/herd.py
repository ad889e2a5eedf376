"""The processes: fork, pause, kill, reap. All are children of one process, which has imported everything before."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

from shmcast import _native

from .board import STEP_NAMES, Board, Boards
from .link import Link

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1
_MOST = 128
# Between a look and what is done on the strength of it, and between two things that belong together.
_BETWEEN = (
    "ATTACH_PIN_SEE ATTACH_PIN ATTACH_LOOK_AGAIN ATTACH_TOOK ATTACH_CONSUME CLEAR_BITS PASS_GRANT PASS_RECHECK "
    "PUBLISH_EXCHANGE PUBLISH_RECHECK REVOKE RECLAIM_SEE RETIRE_MARK RETIRE_NUMBER GROW_NUMBER TAKE_INCARNATION TAKE_READY "
    "SCRUB_SEE SCRUB_T SWEEP_SEE PEER_LOCK PEER_UNLOCK ANCHOR_DROP CONTROL_END NAME_IS_CURRENT NAME_UNLINK NAME_SIZE "
    "RECORD_WORD DECIDE_VERDICT GIVE_UP RING_HEAD RING_READ BELL_SLEEPER BELL_WAKE"
)
BETWEEN = frozenset(_native.STEPS[name] for name in _BETWEEN.split())


class Process:
    """The parent's end of one child."""

    def __init__(self, role: str, pid: int, link: Link, board: Board, board_index: int) -> None:
        self.role, self.pid, self.link, self.board, self.board_index = role, pid, link, board, board_index
        self.elder = False
        """Lives as long as the run: may be paused, never killed."""
        self.doomed = False
        """Is about to be killed, nobody knows when."""
        self.kill_by = 0.0
        """When it is killed where it is, if it has not reached its step."""
        self.resume_by = 0.0
        """When it goes on; 0: it is not paused."""
        self.busy: Callable[[str, Any], None] | None = None
        """What to do with the answer that it owes."""
        self.asked = ""
        self.since = time.monotonic()
        """When it was asked, or went on."""
        self.token = 0
        self.rounds = 0
        """Of a rank: where it was at the last look."""
        self.descriptors = 0
        """How many it has when nothing is under way."""

    def __repr__(self) -> str:
        return f"{self.role} {self.pid}"


class Deaths:
    """Where those that were killed were."""

    def __init__(self) -> None:
        self.kills = self.held = self.inside = self.either = 0
        self.steps: Counter[str] = Counter()

    def count(self, process: Process) -> None:
        board = process.board
        self.kills += 1
        self.held += board.held > 0
        self.inside += board.inside
        self.either += board.inside or board.held > 0
        self.steps[board.last if board.inside else "outside"] += 1


class Herd:
    """All children that live."""

    def __init__(self, rng: random.Random, deaths: Deaths) -> None:
        self.processes: dict[int, Process] = {}
        self.deaths = deaths
        self._random = rng
        self._boards = Boards(_MOST)
        # Steps that each role is known to pass: where to arm. A guess at first, which its boards correct.
        self._passed: dict[str, set[int]] = defaultdict(set)

    # ---- life

    def fork(self, role: str, main: Callable[[Link, Board], None], close: Callable[[], None]) -> Process:
        """A child that runs ``main`` and ends; ``close``: gives up, in the child, what is its parent's."""
        ours, theirs = Link.pair()
        index, board = self._boards.take()
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            status = 70
            try:
                become_child(parent)
                ours.close()
                for process in self.processes.values():
                    process.link.close()
                close()
                board.watch()
                main(theirs, board)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        theirs.close()
        process = Process(role, pid, ours, board, index)
        self.processes[pid] = process
        return process

    def reap(self, process: Process, timeout: float) -> int | None:
        """Its exit status, minus the signal's number for a signal; None where it does not end. Its link is closed."""
        deadline = time.monotonic() + timeout
        while True:
            pid, status = os.waitpid(process.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() > deadline:
                return None
            time.sleep(0.0005)
        process.link.close()
        self._boards.give_back(process.board_index)
        del self.processes[process.pid]
        return os.waitstatus_to_exitcode(status)

    def end_all(self) -> None:
        """SIGKILL whatever is left, and reap it."""
        for process in list(self.processes.values()):
            signal_to(process, signal.SIGKILL)
            os.waitpid(process.pid, 0)
            process.link.close()
        self.processes.clear()

    # ---- harm

    def learn(self, process: Process) -> None:
        """Which steps its role passes."""
        self._passed[process.role] |= process.board.trace & STEP_NAMES.keys()

    def step_for(self, process: Process, between: float) -> int:
        """One that its role passes; with that probability one of `BETWEEN`."""
        known = self._passed[process.role] or set(STEP_NAMES)
        chosen = known & BETWEEN if self._random.random() < between else known
        return self._random.choice(sorted(chosen or known))

    def doom(self, process: Process, armed: bool, patience: float) -> None:
        """Kill it: now, or at some step, or, where it does not get there, after so many seconds."""
        process.doomed = True
        if armed:
            process.board.arm(self.step_for(process, 0.3), self._random.choice((1, 1, 1, 2, 3, 7)), signal.SIGKILL)
            process.kill_by = time.monotonic() + patience
            self.resume(process)
        else:
            process.kill_by = 0.0
            signal_to(process, signal.SIGKILL)

    def pause(self, process: Process, armed: bool, seconds: float) -> None:
        """SIGSTOP, now or at some step; it goes on in so many seconds."""
        process.resume_by = time.monotonic() + seconds
        if armed:
            process.board.arm(self.step_for(process, 0.7), 1, signal.SIGSTOP)
        else:
            signal_to(process, signal.SIGSTOP)

    def resume(self, process: Process) -> None:
        """It goes on, wherever it is."""
        if not process.doomed:
            process.board.disarm()
        process.resume_by = 0.0
        process.since = time.monotonic()
        signal_to(process, signal.SIGCONT)

    def tend(self) -> None:
        """What is due: kill who did not get to its step, let go on who was paused long enough."""
        now = time.monotonic()
        for process in self.processes.values():
            if process.doomed and process.kill_by and now > process.kill_by:
                process.kill_by = 0.0
                signal_to(process, signal.SIGKILL)
            if process.resume_by and now > process.resume_by:
                self.resume(process)


def signal_to(process: Process, number: signal.Signals) -> None:
    """It has not been reaped, so the number is still its own."""
    os.kill(process.pid, number)


def become_child(parent: int) -> None:
    """A group of its own, so that Ctrl-C reaches the parent alone; ends with the parent; says where it is when asked."""
    os.setpgid(0, 0)
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(71)
    signal.alarm(0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    faulthandler.register(signal.SIGUSR2, all_threads=True, chain=False)
