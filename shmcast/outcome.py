"""`Outcome`: what a request has become, the same on every rank."""

from concurrent.futures import CancelledError
from typing import Any, NamedTuple

from .tally import Tally


class Outcome(NamedTuple):
    """What a request has become, the same on every rank."""

    rid: Any
    value: Any = None
    """What was materialized, with large arrays as views; None where there is none."""
    error: Exception | None = None
    """MaterializeError; BackpressureError (shed); GroupError (some rank could not take the value in)."""
    cancelled: bool = False

    @property
    def ok(self) -> bool:
        """Whether it has a value, be it None."""
        return self.error is None and not self.cancelled

    def result(self) -> Any:
        """The value; raises the error, or ``concurrent.futures.CancelledError``."""
        if self.error is not None:
            raise self.error
        if self.cancelled:
            raise CancelledError(f"request {self.rid!r} was cancelled")
        return self.value


def count(outcomes: list[Outcome], tally: Tally) -> None:
    """In the metrics: what came of them, in one step."""
    for outcome in outcomes:
        name = "cancelled" if outcome.cancelled else "ok" if outcome.error is None else "failed"
        tally.add(f"outcomes_{name}")
    tally.observe("batch_requests", len(outcomes))
