"""`Delivery`: what a rank does with a message before all ranks agree on it, and the outcomes that come of it then."""

import time
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

from . import lockstep
from .errors import BackpressureError, HandleError, MaterializeError, shown
from .lockstep import Head, Record
from .outcome import Outcome
from .parts import Parts, Received
from .replicas import Replicas

_INTERRUPT = -1
"""Among the causes of values: it is no value's."""
_NO_RAW = "this rank was given no raw request: all ranks are to be, with raw_everywhere=True"


class Delivery:
    """Goes through the records of a message: takes values, begins what is to begin, materializes what is to be done at once."""

    def __init__(
        self, replicas: Replicas, raws: Mapping[int, Any], timeout: float, *, always_agree: bool = False
    ) -> None:
        """``raws``: by serial number, what this rank was given itself. ``timeout``: seconds that the entry rank may have to wait
        for this one. ``always_agree``: on every message that ends a request, so that it has ended on all ranks or on none."""
        self._replicas = replicas
        self._raws = raws
        self._timeout = timeout
        self._always_agree = always_agree
        self.said: Head | HandleError = HandleError("decode head: none has come")
        """What the last message has said, or why it is none."""

    def finish(self, head: bytes, parts: Parts) -> Parts:
        """See `parts.Finish`: one value for each record that can fail, in their order; if there is none and the ranks are to
        agree, one more."""
        until = time.monotonic() + self._timeout  # for all of them together
        self._replicas.expire()
        try:
            self.said = said = lockstep.read(head, len(parts.values))
        except HandleError as none:
            self.said = none
            return parts
        done = Parts()
        came = iter(range(len(parts.values)))
        for record in said.records:
            part = next(came) if record.end in lockstep.HAVE_PART else None
            error = parts.causes.get(part) if part is not None else None
            value = parts.values[part] if part is not None else self._raws.get(record.serial)
            if record.end in lockstep.BEGINS:
                self._begin(done, record.serial, value, error)
            elif record.end in lockstep.CAN_FAIL:
                self._add(done, record, value, error, until)
        if self._always_agree and not done.values and any(record.end not in lockstep.BEGINS for record in said.records):
            done.values.append(None)
        return done

    def _begin(self, done: Parts, serial: int, raw: Any, error: BaseException | None) -> None:
        """What can not begin here fails once all ranks were to have made it: so no rank has an end of its own."""
        if error is None and raw is not None:
            self._replicas.begin(serial, raw)
            return
        if error is None:
            error = ValueError(_NO_RAW)
        elif not isinstance(error, Exception):
            done.causes[_INTERRUPT] = error
            error = RuntimeError(f"interrupted by {type(error).__name__}")
        self._replicas.fail(serial, error)

    def _add(self, done: Parts, record: Record, came: Any, error: BaseException | None, until: float) -> None:
        number = len(done.values)
        done.values.append(None)
        if error is not None:
            done.causes[number] = error
        elif done.interrupt is None:
            try:
                done.values[number] = self._done(record, came, until)
            except (Exception, KeyboardInterrupt) as failure:
                done.fail(number, failure)
            except BaseException as failure:  # what ends a program where it is raised on purpose ends one request here
                done.fail(number, RuntimeError(f"{type(failure).__name__}: {failure}"))

    def _done(self, record: Record, came: Any, until: float) -> Any:
        if record.end == lockstep.VALUE:
            return came
        if record.end == lockstep.BEGUN:
            return self._replicas.take(record.serial, max(until - time.monotonic(), 0.0))
        if came is None:
            raise ValueError(_NO_RAW)
        return self._replicas.now(came)

    def outcome(self, rid: Hashable, record: Record, values: Iterator[Received]) -> Outcome | None:
        """What a record makes of its request, None where it has only begun; ``values``: what came of those that can fail."""
        serial, end, failure = record
        if end in lockstep.BEGINS:
            return None
        if end in lockstep.CAN_FAIL:
            came = next(values)
            if came.error is None or end == lockstep.VALUE:
                return Outcome(rid, *came)
            error = MaterializeError.of(rid, "GroupError", f"not every rank has materialized it: {came.error}", "")
            error.__cause__ = came.error.__cause__
            return Outcome(rid, error=error)
        if end == lockstep.CANCELLED:
            self._replicas.drop(serial)
            return Outcome(rid, cancelled=True)
        if failure is None:
            return Outcome(rid)
        self._replicas.drop(serial, 0.0)
        if end == lockstep.REFUSED:
            return Outcome(rid, error=BackpressureError(f"request {shown(rid)} was shed: {failure.text}"))
        return Outcome(rid, error=MaterializeError.of(rid, *failure))
