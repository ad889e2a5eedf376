#!/usr/bin/env python3
"""A continuous-batching loop with shmcast in it: what to copy into a scheduler of your own.

    .venv/bin/python examples/scheduler_loop.py [--tp 2] [--requests 16] [--json]

One round of the loop::

    front end            rank 0                                                     other ranks
    requests, aborts ──► Loop.next_round   images go to worker threads              sleep in the broadcast
    (ZMQ)                Loop.share ─────► new requests, aborts, collect()'s blob ► Loop.share
                         Loop.take_in      apply, submit, cancel                    the same
    answers ◄─────────── Loop.decode       a token for each request                 the same

Raw images stay on rank 0, and features in shared memory: all ranks read the same pages. The loop has one broadcast a round,
as it would without images, and the caster rides in it. "Here:" says what is easily done wrong. Below `serve` there is only
a front end to try it with.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import multiprocessing
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import zmq
from PIL import Image

import shmcast

PATCH, LONGEST_SIDE, STRIDE, VOCABULARY = 14, 672, 8, 50257  # of what stands for a model
MAX_BATCH, HEARTBEAT_MS = 8, 1000


def materialize(raw: bytes, out: Callable[..., Any]) -> dict[str, Any]:
    """JPEG to patches, in a thread of rank 0, once for all ranks. What it raises fails this request and no other."""
    with Image.open(io.BytesIO(raw)) as image:
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
        rows, columns = max(image.height // PATCH, 1), max(image.width // PATCH, 1)
        pixels = np.asarray(image.convert("RGB").resize((columns * PATCH, rows * PATCH)))
    patches = out((rows * columns, PATCH * PATCH * 3), "float32")  # in shared memory: nothing is copied afterwards
    by_patch = pixels.reshape(rows, PATCH, columns, PATCH, 3).swapaxes(1, 2)
    np.divide(by_patch, 127.5, out=patches.reshape(rows, columns, PATCH, PATCH, 3))
    patches -= 1.0
    return {"patches": patches, "grid": (rows, columns)}


def partial_token(features: dict[str, Any] | None, number: int, rank: int, size: int) -> int:
    """This rank's part of a token, of some rows and its own columns. Sums of bits, so that a wrong one shows."""
    if features is None:
        return 0
    shard = features["patches"][number % STRIDE :: STRIDE, rank::size]
    return int(shard.view(np.uint32).sum(dtype=np.int64))


@dataclasses.dataclass
class Request:
    """What all ranks know of a request; its raw image is not among it."""

    rid: str
    prompt: str
    max_tokens: int
    has_image: bool
    features: dict[str, Any] | None = None
    tokens: list[int] = dataclasses.field(default_factory=list)


class Round(NamedTuple):
    """What rank 0 tells the others, and so all that a decision may depend on."""

    requests: list[Request]
    aborts: list[str]
    stop: bool
    blob: bytes = b""


class Door:
    """The sockets of rank 0, and the raw images of requests that came in."""

    def __init__(self, directory: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._inbox, self._outbox = self._context.socket(zmq.PULL), self._context.socket(zmq.PUSH)
        self._inbox.bind(f"ipc://{directory}/requests")
        self._outbox.connect(f"ipc://{directory}/answers")
        # Here: a front end that was killed can not say "stop". Its end of this pipe is closed then, whatever it died of.
        parent = multiprocessing.parent_process()
        self._parent = -1 if parent is None else parent.sentinel
        self._poller = zmq.Poller()
        for each in (self._inbox, self._parent):
            self.watch(each)
        self.images: deque[bytes] = deque()

    def watch(self, what: Any) -> None:
        """Have `read` end its wait also when this becomes readable."""
        self._poller.register(what, zmq.POLLIN)

    def read(self, wait_ms: int) -> Round:
        """What has come; waits for it, but not longer than this."""
        requests: list[Request] = []
        aborts: list[str] = []
        stop = self._parent in dict(self._poller.poll(wait_ms))
        while self._inbox.poll(0):
            head, *images = self._inbox.recv_multipart()
            said = json.loads(head)  # no pickle: that would let whoever reaches the socket run code here
            if "stop" in said:
                stop = True
            elif "abort" in said:
                aborts.append(said["abort"])
            else:
                requests.append(Request(said["rid"], said["prompt"], said["max_tokens"], bool(images)))
                self.images.extend(images[:1])
        return Round(requests, aborts, stop)

    def send(self, **message: Any) -> None:
        """To the front end."""
        self._outbox.send_json(message)

    def close(self) -> None:
        """Send what is left, if anybody still listens."""
        self._context.destroy(linger=1000)


class Loop:
    """The scheduler, on every rank. Ranks differ only in who has the door: the same rounds give the same decisions."""

    def __init__(self, tp_group: Any, caster: shmcast.Caster, door: Door | None) -> None:
        self.tp_group, self.caster, self.door = tp_group, caster, door
        self.waiting: dict[str, Request] = {}  # for their features
        self.running: dict[str, Request] = {}  # in order of admission, which is the same everywhere

    def run(self) -> None:
        """Rounds, up to one that says stop."""
        stop = False
        while not stop:
            stop = self.take_in(self.share(None if self.door is None else self.next_round(self.door)))
            self.decode()
        # Here: after the same round everywhere, as close() is a step of all ranks together.
        for outcome in self.caster.close(cancel_pending=True):
            self.end(self.waiting.pop(outcome.rid), "aborted")
        while self.running:
            self.end(self.running.popitem()[1], "aborted")

    def next_round(self, door: Door) -> Round:
        """On rank 0: what the others must hear. Without anything to decode it waits until there is something."""
        latest = time.monotonic() + HEARTBEAT_MS / 1000  # far below the timeout of the broadcast, in which they wait
        while True:
            # Here: wakes up for what has been materialized too, as the caster is among what the door watches.
            this_round = door.read(0 if self.running else HEARTBEAT_MS)._replace(blob=self.caster.collect())
            if self.running or any(this_round) or time.monotonic() > latest:
                return this_round

    def share(self, this_round: Round | None) -> Round:
        """The loop's own broadcast. Any will do that takes bytes to all ranks."""
        box: list[Any] = [this_round]
        dist.broadcast_object_list(box, src=dist.get_global_rank(self.tp_group, 0), group=self.tp_group)
        received: Round = box[0]
        return received

    def take_in(self, this_round: Round) -> bool:
        """The same calls in the same order on every rank. Returns whether this was the last round.

        GroupError from `apply` says that a rank is lost or out of step. Let it end the process, so that all of them end."""
        for outcome in self.caster.apply(this_round.blob):
            self.admit(self.waiting.pop(outcome.rid), outcome)
        for request in this_round.requests:
            raw = self.door.images.popleft() if self.door is not None and request.has_image else None
            if request.rid in self.waiting or request.rid in self.running:
                # Here: submit() would raise, on all ranks. They know alike what is under way, so they refuse alike.
                self.end(request, "failed", error="a request with this id is under way")
            elif request.has_image:
                self.waiting[request.rid] = request
                self.caster.submit(request.rid, raw)  # other ranks than 0 only count it
            else:
                self.running[request.rid] = request
        # Here: last, because they may be of any of these.
        for rid in this_round.aborts:
            if rid in self.running:
                self.end(self.running.pop(rid), "aborted")
            else:
                self.caster.cancel(rid)  # it ends with its outcome, in a later round; one that has ended is left alone
        return this_round.stop

    def admit(self, request: Request, outcome: shmcast.Outcome) -> None:
        """Into the batch, or not: as its outcome says, so on all ranks or on none."""
        if outcome.cancelled:
            self.end(request, "aborted")
        elif outcome.error is not None:  # MaterializeError; BackpressureError where it was shed
            self.end(request, "failed", error=str(outcome.error))
        else:
            request.features = outcome.value
            self.running[request.rid] = request

    def decode(self) -> None:
        """A token for each request of the batch, of the sum over all ranks' parts."""
        batch = list(itertools.islice(self.running.values(), MAX_BATCH))
        if not batch:
            return
        rank, size = dist.get_rank(self.tp_group), dist.get_world_size(self.tp_group)
        sums = torch.tensor([partial_token(each.features, len(each.tokens), rank, size) for each in batch])
        dist.all_reduce(sums, group=self.tp_group)
        for request, total in zip(batch, sums.tolist(), strict=True):
            request.tokens.append((total + sum(request.prompt.encode())) % VOCABULARY)
            if len(request.tokens) == request.max_tokens:
                self.end(self.running.pop(request.rid), "answered", tokens=request.tokens)

    def end(self, request: Request, state: str, **more: Any) -> None:
        """Forget a request, and say so to whoever sent it."""
        # Here: the memory is free when no rank has a view of it any more, so none may stay in logs or in closures.
        request.features = None
        if self.door is not None:
            self.door.send(rid=request.rid, state=state, **more)


def serve(rank: int, size: int, directory: str) -> None:
    """The process of one rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=size)
    tp_group = dist.group.WORLD  # in an engine: the CPU (gloo) group of its TP ranks
    with (
        contextlib.closing(Door(directory)) if rank == 0 else contextlib.nullcontext() as door,
        shmcast.Group(tp_group, max_bytes="48MiB") as group,  # of what lives at once; Docker's /dev/shm has 64 MB
        # Here: a decoder that hangs, and more than there is memory for, are to cost requests and not the loop.
        shmcast.Caster(group, materialize, timeout=30.0, max_inflight_bytes="32MiB", on_full="shed") as caster,
    ):
        if door is not None:
            door.watch(caster)  # by its fileno()
        Loop(tp_group, caster, door).run()
        dist.barrier(tp_group)  # no rank has features any more
        if door is not None and group.arena is not None:
            door.send(closed=True, blocks=group.arena.stats()["slots_used"])
    dist.destroy_process_group()


# ---- no scheduler any more, but what is in front of one: starts the ranks, and plays clients

WINDOW = 12  # requests under way


def workload(count: int) -> Iterator[tuple[dict[str, Any], list[bytes], str]]:
    """``(request, [image] or [], when its client hangs up)``: "", "at once", or when that other request is answered."""
    for number in range(count):
        rid, max_tokens, hang_up, size = f"r{number}", 1 + number % STRIDE, "", (280 + 56 * (number % 9), 420)
        if number in (0, 7):  # these go on until they are aborted: one while it is materialized, one before
            max_tokens, hang_up, size = 1 << 30, "at once" if number else "r1", (4000, 3000)
        images = [] if number == 1 or number % 4 == 2 else [b"no image" if number == 3 else photo(number, size)]
        yield {"rid": rid, "prompt": f"What is in picture {number}?", "max_tokens": max_tokens}, images, hang_up


def photo(number: int, size: tuple[int, int]) -> bytes:
    """A JPEG file."""
    bands = [Image.linear_gradient("L"), Image.radial_gradient("L"), Image.new("L", (1, 1), number * 37 % 256)]
    stream = io.BytesIO()
    Image.merge("RGB", [band.resize(size) for band in bands]).save(stream, "jpeg")
    return stream.getvalue()


def play(directory: str, ranks: list[Any], count: int, say: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Have so many requests answered, or fewer where somebody presses Ctrl-C. Returns what the scheduler said at its end."""
    with zmq.Context() as context, context.socket(zmq.PUSH) as outbox, context.socket(zmq.PULL) as inbox:
        outbox.linger = 1000  # ms; nobody reads it where the ranks have failed
        outbox.connect(f"ipc://{directory}/requests")
        inbox.bind(f"ipc://{directory}/answers")

        def receive() -> dict[str, Any]:
            while not inbox.poll(200):
                if any(rank.exitcode for rank in ranks):
                    raise SystemExit(f"ranks have ended with {[rank.exitcode for rank in ranks]}")
            message: dict[str, Any] = json.loads(inbox.recv())
            return message

        arrivals, hang_ups, under_way = workload(count), {}, 0
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            while True:
                for request, images, when in itertools.islice(arrivals, WINDOW - under_way):
                    outbox.send_multipart([json.dumps(request).encode(), *images])
                    under_way += 1
                    hang_ups[when] = request["rid"]
                    if when == "at once":
                        outbox.send_json({"abort": request["rid"]})
                if not under_way:
                    break
                answer = receive()
                say(answer)
                under_way -= 1
                if answer["rid"] in hang_ups:
                    outbox.send_json({"abort": hang_ups[answer["rid"]]})
        except KeyboardInterrupt:
            pass
        finally:
            outbox.send_json({"stop": True})
        while "closed" not in (answer := receive()):
            say(answer)
        return answer


def main() -> int:
    parser = argparse.ArgumentParser(description="A small continuous-batching loop on tensor-parallel ranks.")
    parser.add_argument("--tp", type=int, default=2, help="ranks (2)")
    parser.add_argument("--requests", type=int, default=16, help="at least 2 (16)")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each answer")
    options = parser.parse_args()
    if options.tp < 1 or options.requests < 2:
        parser.error("--tp is 1 at least, --requests 2")
    answers: list[dict[str, Any]] = []

    def say(answer: dict[str, Any]) -> None:
        answers.append(answer)
        text = answer.get("error") or f"{len(answer.get('tokens', ()))} tokens"
        print(json.dumps(answer) if options.json else f"{answer['rid']} {answer['state']}: {text}", flush=True)

    with tempfile.TemporaryDirectory(prefix="loop-") as directory:
        # Here: a terminal gives Ctrl-C to all processes, but ranks must end in the same round. So they are born deaf to it.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        spawn = multiprocessing.get_context("spawn")
        ranks = [spawn.Process(target=serve, args=(rank, options.tp, directory)) for rank in range(options.tp)]
        for rank in ranks:
            rank.start()
        try:
            end = play(directory, ranks, options.requests, say)
        finally:
            for rank in ranks:
                rank.join()
            shmcast.sweep()  # of a rank that was killed; otherwise the next arena does that
    states = [answer["state"] for answer in answers]
    errors = "".join([f" ({answer['error']})" for answer in answers if answer["state"] == "failed"])
    print(
        f"{len(answers)} requests: {states.count('answered')} answered, {states.count('failed')} failed{errors}, "
        f"{states.count('aborted')} aborted; shared memory back to {end['blocks']} blocks"
    )
    return int(end["blocks"] != 0 or len(answers) != options.requests)


if __name__ == "__main__":
    sys.exit(main())
