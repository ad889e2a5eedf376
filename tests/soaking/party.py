"""What the ranks of a group do: broadcast over the ring, check every byte, until the group ends or breaks. No torch: what
ranks say to each other before they share memory goes through sockets that their parent has made."""

from __future__ import annotations

import time
import traceback
from collections import deque
from typing import Any

import shmcast
import shmcast.meeting
from shmcast.channels import Rendezvous, check_payload
from shmcast.errors import GroupTimeoutError, PeerLostError

from .actors import Spec, WrongBytesError, check, pattern
from .board import Board
from .link import ClosedError, Link

SIZE = 3
TIMEOUT_S = 5.0
_KEEP = 3
_PACE_S = 0.002
"""Between two messages, so that a group does not have a core to itself."""


class Star(Rendezvous):
    """The entry rank has a link to each of the others, and they one to it."""

    name = "star"
    entry = 0

    def __init__(self, rank: int, size: int, links: list[Link], timeout: float) -> None:
        self.rank, self.size, self.timeout = rank, size, timeout
        self._links = links

    def broadcast(self, payload: bytes | None = None, *, timeout: float | None = None, watch: Any = None) -> bytes:
        if self.rank != self.entry:
            return bytes(self._receive(self._links[0], timeout))
        payload = check_payload(payload)
        self._send(payload)
        return payload

    def gather(self, record: bytes, *, timeout: float | None = None, watch: Any = None) -> list[bytes]:
        if self.rank != self.entry:
            self._send(record)
            return list(self._receive(self._links[0], timeout))
        records = [record, *(self._receive(link, timeout) for link in self._links)]
        self._send(records)
        return records

    def poll(self) -> bool:
        return self.rank != self.entry and self._links[0].poll()

    def close(self) -> None:
        for link in self._links:
            link.close()

    def _send(self, message: Any) -> None:
        try:
            for link in self._links:
                link.send(message)
        except ClosedError as error:
            raise PeerLostError(f"star: {error}") from None

    def _receive(self, link: Link, timeout: float | None) -> Any:
        try:
            return link.receive(self.timeout if timeout is None else timeout)
        except ClosedError as error:
            raise PeerLostError(f"star: {error}") from None
        except TimeoutError as error:
            raise GroupTimeoutError(f"star: {error}") from None


def tree_of(seed: int, step: int, end: bool) -> dict[str, Any]:
    """What is sent in that step. Sizes are spread over what shares pages and what does not."""
    return {"step": step, "end": end, "arrays": [pattern(spec) for spec in specs_of(seed, step)]}


def specs_of(seed: int, step: int) -> list[Spec]:
    mixed = (seed ^ step * 0xD1342543DE82EF95) & (1 << 64) - 1
    sizes = [1024 + mixed % 3000, 1024 + (mixed >> 16) % 60_000][: 1 + (mixed >> 40) % 2]
    return [Spec((mixed + at) & (1 << 64) - 1, size) for at, size in enumerate(sizes)]


def verify(tree: dict[str, Any], seed: int, step: int, where: str) -> None:
    """WrongBytesError unless that is what was sent in that step."""
    specs = specs_of(seed, step)
    if tree["step"] != step or len(tree["arrays"]) != len(specs):
        raise WrongBytesError(f"{where}: the message of step {tree['step']} in step {step}")
    for array, spec in zip(tree["arrays"], specs, strict=True):
        check(array, spec, f"{where}, step {step}")


def serve(link: Link, board: Board, namespace: str, rank: int, links: list[Link], seed: int) -> None:
    """One rank. Says ``("made", (arena id or 0, token))``, then how it ended: ``(kind, (steps, class, text))``; goes when
    it is told to, as who goes at once looks to the others like one that has died."""
    # a group asks for its rendezvous there; the only other one needs torch
    shmcast.meeting.rendezvous = lambda *_: Star(rank, SIZE, links, TIMEOUT_S)
    steps = 0
    group = None
    kept: deque[tuple[dict[str, Any], int]] = deque(maxlen=_KEEP)
    board.enter()
    try:
        group = shmcast.Group(object(), max_bytes="2MiB", timeout=TIMEOUT_S)
        link.send(("made", (group.arena.id if group.arena else 0, shmcast.process_token())))
        end = False
        while not end:
            if rank == 0:
                time.sleep(_PACE_S)
                tree = group.broadcast(tree_of(seed, steps, link.poll()))
            else:
                tree = group.broadcast()
            verify(tree, seed, steps, "broadcast")
            kept.append((tree, steps))
            verify(*kept[0][:1], seed, kept[0][1], "hold")
            steps, end = steps + 1, tree["end"]
            board.progress(steps)
            board.holds(len(kept))
        kept.clear()
        group.close()
        answer = "closed", (steps, "", "")
    except WrongBytesError as error:
        answer = "wrong", (steps, "", str(error))
    except shmcast.ShmcastError as error:
        answer = "broken", (steps, type(error).__name__, str(error))
    except ClosedError:
        return
    except Exception:
        answer = "crashed", (steps, "", traceback.format_exc())
    board.leave()
    _finish(link, kept, seed, answer)
    if group is not None:
        group.close()


def _finish(link: Link, kept: deque[tuple[dict[str, Any], int]], seed: int, answer: tuple[str, Any]) -> None:
    """Say how it ended, with a last look at what is still held: whoever died, that is unchanged."""
    try:
        for tree, step in kept:
            verify(tree, seed, step, "after the end")
    except WrongBytesError as error:
        answer = "wrong", (*answer[1][:2], str(error))
    try:
        link.send(answer)
        while link.receive() != ("go",):
            pass
    except ClosedError:
        pass
