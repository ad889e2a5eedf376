"""`Workers`: a `Maker` whose materializations run in processes of their own, which write into the rank's arena.

The rank reserves what a worker asks for, hashes and publishes it once the worker has answered; array bytes never go through
the connection where the arena has room. A block that was reserved for a worker is given to nobody else before the worker has
answered or is known to have ended.

A worker that means harm can do what any process of the same user can: README, "Security". What one does by mistake stays its
own: it has mapped its blocks alone, between pages that nobody may touch, and only until it answers.
"""

import pickle
from collections.abc import Callable
from multiprocessing import spawn
from typing import Any

from . import arrays, codec, drafts, lockstep, worker
from .content import Hash
from .errors import MaterializeError, shown
from .group import Group
from .in_place import InPlace
from .lockstep import Failure
from .materializing import Made, place_for
from .request import Request
from .sending import Sender
from .staff import LostError, Process, Staff
from .tally import Tally


def pickled(materialize: Callable[..., Any]) -> bytes:
    """What workers get. TypeError where the function can not be sent to another process."""
    try:
        return pickle.dumps(materialize, 5)
    except Exception as error:
        raise TypeError(
            f"materialize {shown(materialize)} can not be sent to worker processes: {error}; with executor='process' it is a "
            "function of a module, no lambda and none of inside a function, or an object that can be pickled"
        ) from None


class Workers:
    """See above. Its processes have been started and are ready once it is made."""

    def __init__(
        self,
        group: Group,
        sender: Sender,
        materialize: Callable[..., Any],
        *,
        count: int,
        tally: Tally,
        hash: Hash = True,
    ) -> None:
        """``hash``: of what is made in place. TypeError as for `pickled`; RuntimeError where workers do not come up."""
        arena = group.arena
        preparation = spawn.get_preparation_data("shmcast-worker")
        preparation.pop("authkey", None)  # refuses to be pickled; nobody needs it
        place = None if arena is None else (arena.namespace, arena.id)
        setup = worker.Setup(preparation, pickled(materialize), place)
        self._group = group
        self._sender = sender
        self._tally = tally
        self._hash = hash
        self._staff = Staff(
            pickle.dumps(tuple(setup), 5),
            preparation["sys_path"],
            count,
            started=lambda: tally.add("workers_started"),
            lost=lambda: tally.add("workers_lost"),
        )

    @property
    def pids(self) -> list[int]:
        """See `Maker`."""
        return self._staff.pids

    def make(self, request: Request, raw: Any, begun: Callable[[], object]) -> Made:
        """See `Maker`."""
        place = None
        try:
            try:
                job = worker.JOB + pickle.dumps(raw, 5)
            except Exception as error:
                raise TypeError(f"the raw request can not be sent to a worker process: {error}") from error
            place = place_for(self._group, request, lambda nbytes: None, self._hash)
            draft = self._ask(request, job, place, begun)
            if draft is None:
                return Made(lockstep.NONE)
            tree = codec.put_together(*draft)
            del draft
            return Made(lockstep.VALUE, self._sender.prepare(request, tree, place))
        except BaseException as error:
            return Made(lockstep.FAILED, failure=lockstep.failure_of(error))
        finally:
            if place is not None:
                place.end()

    def give_up(self, request: Request) -> None:
        """See `Maker`: its worker is killed."""
        self._staff.give_up(request)

    def close(self) -> None:
        """See `Maker`. Its processes have ended when this returns."""
        self._staff.close()

    # ---- one request

    def _ask(
        self, request: Request, job: bytes, place: InPlace, begun: Callable[[], object]
    ) -> "tuple[memoryview, list[Any]] | None":
        """A draft that can be put together; None where the value is None. Raises what is to be told of a failure."""
        process = self._staff.hire(request)
        begun()  # not before: it may have waited for another one's successor
        answered = False
        blocks: list[arrays.ndarray] = []
        try:
            answer = _answer_in(self._converse(process, job, place, blocks), blocks)
            answered = True
        except LostError as error:
            process.bury()
            raise self._loss(request, process, str(error)) from None
        finally:
            self._staff.dismiss(request, process, answered)
        if isinstance(answer, Failure):
            raise MaterializeError.of(None, *answer)
        return answer

    def _converse(self, process: Process, job: bytes, place: InPlace, blocks: list[arrays.ndarray]) -> bytes:
        """Give a worker a request, and the blocks that it asks for; its answer."""
        process.send(job)
        while (message := process.receive())[:1] == worker.WANT:
            if len(message) != 1 + worker.WANTED.size:
                raise LostError(f"it asked for a block in {len(message)} bytes")
            nbytes, wanted = worker.WANTED.unpack(message[1:])
            block = place.block(nbytes)
            if block is None:
                if wanted and place.shared:
                    self._tally.add("out_full")
                process.send(worker.NO_ROOM)
                continue
            number, array, where = block
            blocks.append(array)
            process.send(worker.BLOCK + worker.PLACE.pack(number, *where))
        return message

    def _loss(self, request: Request, process: Process, why: str) -> MaterializeError:
        """``why``: it was ended, if it was."""
        if request.given_up or self._staff.closed:
            why = "the caster was closed" if self._staff.closed else "nobody waited for it any more"
        how = f"was ended: {why}" if why else process.end_text
        return MaterializeError.of(None, "WorkerLostError", f"worker process {process.pid} {how}", "")


def _answer_in(message: bytes, blocks: list[arrays.ndarray]) -> "tuple[memoryview, list[Any]] | Failure | None":
    """A draft that can be put together; how it has failed; None for None. LostError where it is none of these."""
    kind, rest = message[:1], memoryview(message)[1:]
    try:
        if kind == worker.DRAFT:
            return drafts.read(rest, blocks)
        if kind == worker.FAILED:
            return worker.failure_in(message)
    except (ValueError, TypeError) as error:
        raise LostError(f"its answer could not be read: {error}") from None
    if kind != worker.NONE:
        raise LostError(f"it answered with {message[:16]!r}, {len(message)} bytes, which is no answer")
    return None
