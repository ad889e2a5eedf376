"""`Alone`: how a rank goes on when the group is broken and every rank was given the raw requests.

Without a message there is nobody who decides, so there is nothing to decide: every rank materializes everything that is
pending, and has the outcomes of all of it in its next step, in the order in which it came. All ranks have the same then,
though not always in the same step as the group broke in: one may have had outcomes of the last message that another missed.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

from . import lockstep
from .errors import GroupError, HandleError, MaterializeError
from .group import Group
from .ledger import Ledger
from .outcome import Outcome
from .replicas import Replicas

FOR_EVER_S = 1e9

_log = logging.getLogger("shmcast")


CLOSED = "the caster was closed before it was materialized"
Ending: TypeAlias = Literal["", "cancelled", "failed"]
"""How requests end that nobody waits for any more; "": they are waited for."""


class Alone:
    """The requests of one rank, should its group break."""

    def __init__(self, group: Group, ledger: Ledger, raws: "Mapping[int, Any] | None", replicas: Replicas) -> None:
        """``raws``: by serial number, what this rank was given; None: nothing, so it can not go on."""
        self._group = group
        self._ledger = ledger
        self._raws = raws
        self._replicas = replicas
        self.cause: GroupError | None = None
        """Why it goes on alone, if it does."""
        self._forbidden = False

    def forbid(self) -> None:
        """This rank was given something else than the others: what it would have alone is not what they have."""
        self._forbidden = True

    def check(self, cause: GroupError) -> None:
        """Raises the cause where this rank can not go on: it has no raw requests, or other ones, or the group could."""
        if self._raws is None or self._forbidden or self._group.closed or self._group.broken is None:
            raise cause

    @contextmanager
    def unless_whole(self) -> Iterator[None]:
        """Around all that is done with a message: who is interrupted in there has no outcomes where the others have some, and
        can not go on with them."""
        try:
            yield
        except (GroupError, HandleError):
            raise
        except BaseException as error:
            text = f"step {self._group.step}: interrupted by {type(error).__name__}: rank {self._group.rank} lacks its outcomes"
            self._group.give_up(GroupError(text))
            raise

    def go(self, cause: GroupError) -> None:
        """Go on alone from here on: begin what is pending."""
        # Another one: its frames hold what callers hold.
        self.cause = type(cause)(*cause.args)
        _log.error("the ranks go on without each other, each materializes everything: %s", self.cause)
        for serial in self._ledger.rids:
            self.begin(serial)

    def begin(self, serial: int) -> None:
        """Materialize a request in the background, unless that has begun."""
        raw = self._raw(serial)
        if raw is not None and not self._replicas.has(serial):
            self._replicas.begin(serial, raw)

    def outcomes(self, serials: "Iterable[int] | None", ending: Ending, patience: float = FOR_EVER_S) -> list[Outcome]:
        """Of these, or of all that is pending; waits for each of them, up to ``patience`` seconds, unless nobody does. They are
        still pending then."""
        serials = tuple(self._ledger.rids if serials is None else serials)
        return [self._outcome(serial, ending, patience) for serial in serials]

    def _raw(self, serial: int) -> Any:
        return None if self._raws is None else self._raws.get(serial)

    def _outcome(self, serial: int, ending: Ending, patience: float) -> Outcome:
        rid = self._ledger.rids[serial]
        if ending == "cancelled":
            return Outcome(rid, cancelled=True)
        if self._raw(serial) is None:
            return Outcome(rid)
        try:
            if ending:
                raise GroupError(CLOSED)
            self.begin(serial)  # where an interrupt has come between its value and its outcome
            return Outcome(rid, self._replicas.take(serial, patience))
        except Exception as error:
            return Outcome(rid, error=MaterializeError.of(rid, *lockstep.failure_of(error)))
