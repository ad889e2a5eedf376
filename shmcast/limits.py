"""`Limits`: how many requests and bytes a caster takes at once, and what happens at a limit.

Has no lock of its own: but for `wait`, its caster's is held.
"""

import time
from collections.abc import Hashable
from typing import Literal, TypeAlias

from .errors import BackpressureError
from .intake import Intake
from .sizes import format_bytes, parse_bytes
from .tally import Tally

OnFull: TypeAlias = Literal["block", "raise", "shed"]


class Limits:
    """What `Caster.submit` says of limits, on one rank."""

    def __init__(
        self, max_pending: int, max_bytes: int | str | None, on_full: OnFull, block_timeout: float, tally: Tally
    ) -> None:
        """As for `Caster`. ValueError for arguments that are wrong."""
        if on_full not in ("block", "raise", "shed"):
            raise ValueError(f"on_full is 'block', 'raise' or 'shed', not {on_full!r}")
        if max_pending < 1:
            raise ValueError(f"max_pending={max_pending}: at least 1 is needed")
        self.max_bytes = None if max_bytes is None else parse_bytes(max_bytes, "max_inflight_bytes")
        self.reported_bytes = 0
        """In flight on the entry rank, as the last message said."""
        self._max_pending = max_pending
        self._on_full = on_full
        self._block_timeout = self._block_left = block_timeout
        self._tally = tally

    def check(self, rid: Hashable, pending: int, decides: bool) -> None:
        """BackpressureError where it is to be raised: by what all ranks know alike. ``decides``: whether this is the entry rank."""
        problem = ""
        if self._on_full != "raise":
            return
        if pending >= self._max_pending:
            problem = f"{pending} requests are pending, max_pending is {self._max_pending}"
        elif self.max_bytes is not None and self.reported_bytes >= self.max_bytes:
            problem = f"{format_bytes(self.reported_bytes)} are in flight, max_inflight_bytes is {format_bytes(self.max_bytes)}"
        if problem:
            if decides:  # all ranks refuse it alike, and it is one request
                self._tally.add("backpressure_raised")
            raise BackpressureError(f"submit {rid!r}: {problem}")

    def wait(self, intake: Intake, raw_bytes: int, steps: bool) -> None:
        """Where that is what to do, wait for room, without the lock. ``steps``: whether it is this thread that sends messages,
        so that none is sent meanwhile."""
        if self._on_full != "block" or not self._refusal(intake, raw_bytes, intake.unfinished):
            return
        if steps and not intake.goes_on:
            return
        began_ns = time.monotonic_ns()
        intake.wait_room(raw_bytes, self._max_pending, self._block_left, only_while_it_goes_on=steps)
        waited_ns = time.monotonic_ns() - began_ns
        # The others wait in their step: all waits before the next message together are bounded.
        self._block_left = max(self._block_left - waited_ns / 1e9, 0.0)
        self._tally.add("backpressure_waits")
        self._tally.add("backpressure_wait_ns", waited_ns)

    def may_wait_again(self) -> None:
        """A message goes out, so the others have waited."""
        self._block_left = self._block_timeout

    def shed(self, intake: Intake, raw_bytes: int, pending: int) -> str:
        """Why a request is not to be materialized, "" if it is."""
        if self._on_full == "raise":
            return ""
        refusal = self._refusal(intake, raw_bytes, intake.unfinished if self._on_full == "block" else pending)
        if refusal:
            self._tally.add("backpressure_shed")
        return refusal

    def _refusal(self, intake: Intake, raw_bytes: int, count: int) -> str:
        if count >= self._max_pending:
            return f"{count} requests are pending, max_pending is {self._max_pending}"
        if not intake.room(raw_bytes):
            return (
                f"{format_bytes(raw_bytes)} and {format_bytes(intake.inflight_bytes)} in flight are more than "
                f"max_inflight_bytes, {format_bytes(self.max_bytes or 0)}"
            )
        return ""


def seconds(name: str, value: float) -> float:
    """The same as a float. ValueError where it is no number of seconds."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise ValueError(f"{name}: {value!r} is not a number of seconds")
    return float(value)
