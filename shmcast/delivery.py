"""`Delivery`: what a rank does with a message before all ranks agree on it, and the outcomes that come of it then."""

from collections.abc import Hashable, Iterator, Mapping
from typing import Any

from . import lockstep
from .errors import BackpressureError, HandleError, MaterializeError, shown
from .lockstep import Head, Record
from .outcome import Outcome
from .parts import Parts, Received
from .replicas import Replicas


class Delivery:
    """Goes through the records of a message: takes values, begins what is to begin, materializes what is to be done at once."""

    def __init__(self, replicas: Replicas, raws: Mapping[int, Any], timeout: float) -> None:
        """``raws``: by serial number, what this rank was given itself. ``timeout``: seconds that the entry rank may have to wait
        for this one."""
        self._replicas = replicas
        self._raws = raws
        self._timeout = timeout
        self.said: Head | HandleError = HandleError("decode head: none has come")
        """What the last message has said, or why it is none."""

    def finish(self, head: bytes, parts: Parts) -> Parts:
        """See `parts.Finish`: one value for each record that can fail, in their order."""
        try:
            self.said = said = lockstep.read(head, len(parts.values))
        except HandleError as error:
            self.said = error
            return parts
        if all(record.end == lockstep.VALUE for record in said.records if record.end in lockstep.CAN_FAIL):
            return parts
        done = Parts()
        came = iter(range(len(parts.values)))
        for record in said.records:
            if record.end in lockstep.CAN_FAIL:
                self._add(done, record, parts, came)
        return done

    def _add(self, done: Parts, record: Record, parts: Parts, came: Iterator[int]) -> None:
        number = len(done.values)
        done.values.append(None)
        part = next(came) if record.end in lockstep.HAVE_PART else None
        if part in parts.causes:
            done.causes[number] = parts.causes[part]
        elif done.interrupt is None:
            try:
                done.values[number] = self._done(record, None if part is None else parts.values[part])
            except (Exception, KeyboardInterrupt) as error:
                done.fail(number, error)
            except BaseException as error:  # what ends a program where it is raised on purpose ends one request here
                done.fail(number, RuntimeError(f"{type(error).__name__}: {error}"))

    def _done(self, record: Record, came: Any) -> Any:
        serial, end, _ = record
        if end == lockstep.VALUE:
            return came
        if end == lockstep.BEGUN:
            return self._replicas.take(serial, self._timeout)
        raw = came if end in lockstep.HAVE_PART else self._raws.get(serial)
        if raw is None:
            raise ValueError("this rank was given no raw request: all ranks are to be, with raw_everywhere=True")
        if end in lockstep.BEGINS:
            return self._replicas.begin(serial, raw)
        return self._replicas.now(raw)

    def outcome(self, rid: Hashable, record: Record, values: Iterator[Received]) -> Outcome | None:
        """What a record makes of its request, None where it has only begun; ``values``: what came of those that can fail."""
        serial, end, failure = record
        if end in lockstep.CAN_FAIL:
            came = next(values)
            if end in lockstep.BEGINS:
                if came.error is None:
                    return None
                self._replicas.drop(serial)
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
