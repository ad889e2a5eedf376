"""The parent: starts everybody, tells them what to do, kills and pauses them at random, and looks whether all is well."""

from __future__ import annotations

import faulthandler
import os
import random
import selectors
import signal
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import shmcast

from . import census, party
from .actors import ROLES, Spec, Terms
from .board import Board
from .herd import Deaths, Herd, Process, signal_to
from .link import ClosedError, Link
from .parties import Groups
from .work import Work

BOUND_S = 30.0
"""An operation that takes longer hangs; pauses do not count."""
TICK_S = 0.004
QUIET_S = 2.0
"""Between two looks at everything."""
DRAIN_EVERY = 4
"""Looks, of which one finds everything free."""
VIOLATIONS_MOST = 10
PATIENCE_S = 1.0
"""How long a victim may take to get to its step."""


@dataclass(frozen=True)
class Size:
    """How many of each there are at any time; one of the owners and one of the readers live as long as the run."""

    owners: int = 4
    readers: int = 7
    sweepers: int = 2
    groups: int = 2
    harm_per_s: float = 24.0


class Conductor:
    """One run."""

    def __init__(self, seed: int, size: Size, namespace: str) -> None:
        self._random = random.Random(seed)
        self._size, self._namespace = size, namespace
        self._seed = seed
        self.violations: list[str] = []
        self.deaths = Deaths()
        self.pauses = self.quiets = self.drains = 0
        self._herd = Herd(self._random, self.deaths)
        self._processes = self._herd.processes
        self.work = Work(self._random, self._processes, self.complain, namespace)
        self._selector = selectors.DefaultSelector()
        self.groups = Groups(self._random, self._herd, namespace, self.complain, self._selector.close)
        self._flat = census.Flatness(namespace)
        self._next_harm = self._next_quiet = 0.0
        self._quiet = False
        self.interrupted = False

    def complain(self, what: str) -> None:
        """A violation."""
        self.violations.append(what)
        print(f"VIOLATION (seed {self._seed}): {what}", flush=True)

    def interrupt(self, *_: object) -> None:
        """Handler of signals. It raises nothing: that would be ignored where one is just forking."""
        self.interrupted = True
        print("interrupted", flush=True)

    def run(self, seconds: float) -> None:
        """Until the time is up, there were enough violations, or it is interrupted. Leaves no process behind, whatever happens."""
        end = time.monotonic() + seconds
        signal.signal(signal.SIGALRM, self._stuck)
        try:
            self._next_quiet = time.monotonic() + QUIET_S
            while not self.interrupted and time.monotonic() < end and len(self.violations) < VIOLATIONS_MOST:
                self._populate()
                self._harm()
                self._pump()
                if time.monotonic() > self._next_quiet:
                    self._look()
            if not self.violations and not self.interrupted:
                self._look(drain=True)
                for problem in self._flat.problems():
                    self.complain(problem)
        finally:
            signal.alarm(0)
            self._herd.end_all()
            self._selector.close()

    def _stuck(self, *_: object) -> None:
        raise RuntimeError("the parent itself has not come round for a long time")

    # ---- who there is

    def _populate(self) -> None:
        there: dict[str, list[Process]] = {role: [] for role in ROLES}
        for process in self._processes.values():
            if process.role in there:
                there[process.role].append(process)
        for role, wanted in (
            ("owner", self._size.owners),
            ("reader", self._size.readers),
            ("sweeper", self._size.sweepers),
        ):
            for _ in range(wanted - len(there[role])):
                elder = role != "sweeper" and not any(process.elder for process in there[role])
                there[role].append(self._start(role, elder))
        while len(self.groups.live) < self._size.groups:
            self.groups.start()
        for process in self._processes.values():
            if process.link.fileno() not in self._selector.get_map():
                self._selector.register(process.link, selectors.EVENT_READ, process)

    def _start(self, role: str, elder: bool) -> Process:
        def main(link: Link, board: Board) -> None:
            ROLES[role](link, board, self._namespace).serve()

        process = self._herd.fork(role, main, self._selector.close)
        process.elder = elder

        def done(kind: str, value: Any) -> None:
            process.token, process.descriptors = value

        process.busy, process.asked = done, "start"
        return process

    # ---- what they say

    def _pump(self) -> None:
        """Tell the idle what to do, hear what there is to hear, see to what is due."""
        signal.alarm(int(4 * BOUND_S))
        if not self._quiet:
            for process in list(self._processes.values()):
                if process.busy is None and process.role in ROLES:
                    self.work.next(process)
        for key, _ in self._selector.select(TICK_S):
            self._hear(key.data)
        self._herd.tend()
        self.groups.tend()
        self._find_hanging()

    def _hear(self, process: Process) -> None:
        try:
            kind, value = process.link.receive()
        except ClosedError:
            self._bury(process)
            return
        if process.role not in ROLES:
            self.groups.heard(process, kind, value)
            return
        done, process.busy = process.busy, None
        if self._random.random() < 0.1:
            self._herd.learn(process)
        process.board.forget_trace()
        if done is not None:
            done(kind, value)

    def _bury(self, process: Process) -> None:
        self._selector.unregister(process.link)
        group = self.groups.of(process)
        status = self._herd.reap(process, BOUND_S)
        if status is None:
            self.complain(f"{process}: has closed its link and does not end")
            signal_to(process, signal.SIGKILL)
            self._herd.reap(process, BOUND_S)
        elif process.doomed and status == -signal.SIGKILL:
            self.deaths.count(process)
        elif status != 0 or group is None or not group.going:
            self.complain(f"{process}: ended by itself with status {status}, at step {process.board.last}")
        self.work.bury(process)
        self.groups.bury(process)

    def _find_hanging(self) -> None:
        now = time.monotonic()
        for process in list(self._processes.values()):
            if (process.busy is None and process.role in ROLES) or process.resume_by:
                continue
            if now - process.since > BOUND_S / 6 and not process.doomed:
                signal_to(process, signal.SIGCONT)  # stopped at its step after all, when it had gone on already
            if now - process.since > BOUND_S:
                self._dump_stacks()
                self.complain(
                    f"{process}: {process.asked or 'broadcast'} has taken {BOUND_S} s, at {process.board.last}"
                )
                self._doom(process, armed=False)

    def _dump_stacks(self) -> None:
        """Of all processes, to stderr."""
        faulthandler.dump_traceback(all_threads=True)
        for process in self._processes.values():
            print(f"--- {process}, {process.asked}, step {process.board.last}", file=sys.stderr, flush=True)
            signal_to(process, signal.SIGUSR2)
            time.sleep(0.1)

    # ---- harm

    def _harm(self) -> None:
        now = time.monotonic()
        if now < self._next_harm:
            return
        self._next_harm = now + self._random.expovariate(self._size.harm_per_s)
        weights = {"owner": 3, "reader": 4, "sweeper": 2}
        victims = [
            process
            for process in self._processes.values()
            if not process.doomed and not process.resume_by and (process.token or process.role not in ROLES)
        ]
        if not victims:
            return
        victim = self._random.choices(victims, [weights.get(process.role, 2) for process in victims])[0]
        if victim.elder or self._random.random() < 0.25:
            self._pause(victim)
        elif victim.role in ROLES or not self._is_ending(victim):
            self._doom(victim, armed=self._random.random() < 0.7)

    def _is_ending(self, rank: Process) -> bool:
        """Whether a group is on its way out already, so that a kill would hit nothing."""
        group = self.groups.of(rank)
        return group is None or group.going or group.killed

    def _doom(self, process: Process, armed: bool) -> None:
        self.work.doom(process)
        group = self.groups.of(process)
        if group is not None:
            group.killed = True
        self._herd.doom(process, armed, PATIENCE_S)

    def _pause(self, process: Process) -> None:
        self.pauses += 1
        seconds = self._random.uniform(0.05, 1.2)
        group = self.groups.of(process)
        if group is not None and self._random.random() < 0.05:
            group.late = True
            seconds = party.TIMEOUT_S + 1
        self._herd.pause(process, self._random.random() < 0.75, seconds)

    # ---- looks at everything

    def _look(self, drain: bool = False) -> None:
        """Let what is under way come to its end, then count what there is."""
        self._quiet = True
        self._settle()
        self.quiets += 1
        if drain or self.quiets % DRAIN_EVERY == 0:
            self._drain()
        shmcast.sweep(self._namespace)
        self._until(self._lost_arenas)
        for process in self._owners():
            self._until(partial(self._wrong_segments, process))
        for process in self._processes.values():
            if process.role in ROLES:
                self._until(partial(self._wrong_descriptors, process))
        self._still_serves()
        self._flat.see("the parent", os.getpid(), besides=len(self._processes))
        for process in self._processes.values():
            if process.elder:
                self._flat.see(f"the {process.role} that lives", process.pid)
        self._quiet = False
        self._next_quiet = time.monotonic() + QUIET_S

    def _settle(self) -> None:
        """Nobody is paused or about to be killed, and nobody owes an answer."""
        for process in self._processes.values():
            process.kill_by = min(process.kill_by, 1e-9) if process.doomed and process.kill_by else 0.0
            if process.resume_by or not process.doomed:
                self._herd.resume(process)
        while any(
            process.doomed or (process.busy is not None and process.role in ROLES)
            for process in self._processes.values()
        ):
            self._pump()

    def _owners(self) -> list[Process]:
        return [self._processes[pid] for pid in self.work.arenas if pid in self._processes]

    def _ask(self, process: Process, verb: str, *args: Any) -> tuple[str, Any]:
        """A message and its answer; ("dead", None) where there is none."""
        answers: list[tuple[str, Any]] = []
        self.work.tell(process, verb, *args, done=lambda kind, value: answers.append((kind, value)))
        while not answers and process.pid in self._processes:
            self._pump()
        return answers[0] if answers else ("dead", None)

    def _until(self, problem: Any) -> None:
        """A violation unless there is no problem, now or a little later: ranks go on meanwhile, and keepers of arenas."""
        for _ in range(10):
            if not problem():
                return
            for _ in range(5):
                self._pump()
        found = problem()
        if found:
            self.complain(found)

    def _lost_arenas(self) -> str:
        """After one sweep every arena has a live owner, and it is one that is known."""
        lost = census.orphans(self._namespace)
        if lost:
            left = {f"{arena:016x}": sorted(numbers) for arena, numbers in census.segments(self._namespace).items()}
            return f"after a sweep there is no live owner of {[f'{arena:016x}' for arena in lost]}: {left}"
        known = {arena.id for arena in self.work.arenas.values()} | {group.arena for group in self.groups.live}
        unknown = set(census.segments(self._namespace)) - known
        return f"nobody's arenas: {unknown}" if unknown and None not in known else ""

    def _wrong_segments(self, process: Process) -> str:
        kind, value = self._ask(process, "report")
        arena = self.work.arenas.get(process.pid)
        if kind != "ok" or arena is None:
            return f"{process}: report: {kind}: {value}"
        wanted, found = {0, *value[0]}, census.segments(self._namespace).get(arena.id, set())
        return "" if wanted == found else f"{process}: it has segments {sorted(wanted)}, there are {sorted(found)}"

    def _wrong_descriptors(self, process: Process) -> str:
        found = census.descriptors(process.pid)
        if process.pid not in self._processes or len(found) == process.descriptors:
            return ""
        return f"{process}: {len(found)} descriptors, {process.descriptors} at first: {found}"

    def _drain(self) -> None:
        """Everybody lets go of everything: not a byte is left in use."""
        self.drains += 1
        owed = self.work.dropped()
        for process in [process for process in self._processes.values() if process.role == "reader"]:
            kind, value = self._ask(process, "drop")
            if kind != "ok":
                self.complain(f"{process}: drop: {kind}: {value}")
        waiting = self._owners()
        for process in waiting:
            self.work.tell(process, "drain", owed[process.pid], done=partial(self._drained, process))
        while any(process.busy is not None for process in waiting):
            self._pump()

    def _drained(self, process: Process, kind: str, value: Any) -> None:
        if kind != "ok" or value["slots_used"] or value["used_bytes"]:
            self.complain(f"{process}: nobody holds anything, and still: {kind}: {value}")

    def _still_serves(self) -> None:
        """What is published by any owner that lives can be read."""
        reader = next(process for process in self._processes.values() if process.role == "reader" and process.elder)
        for process in self._owners():
            spec = Spec(self._random.getrandbits(64), 3000)
            kind, value = self._ask(process, "publish", spec, Terms(0, True, 1.0, True), 1.0)
            if kind == "refused" and value[0] == "ArenaFullError":
                continue  # of what readers hold, and what is promised
            if kind == "ok":
                kind, raw = kind, value
                kind, value = self._ask(reader, "attach", 0, raw, spec, False)
                self._ask(process, "release", raw)
                arena = self.work.arenas.get(process.pid)
                if arena is not None:
                    arena.join(reader.pid, reader.token)
            if kind != "ok":
                self.complain(f"{process}: it lives and does not serve: {kind}: {value}")
