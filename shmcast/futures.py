"""`FutureCaster`: a caster for code that is written with ``concurrent.futures``."""

from collections.abc import Hashable
from concurrent.futures import Future
from typing import Any

from .caster import Caster, Predicate
from .errors import GroupError
from .outcome import Outcome


class FutureCaster:
    """Gives a future for each request. Futures are done in `step`, `apply` and `close`, which somebody has to call, on all ranks
    as for the caster itself; so the thread that calls them must not wait for one.

    It runs no collective of its own. Requests that go to the caster by itself are left to whoever submits them."""

    def __init__(self, caster: Caster) -> None:
        self._caster = caster
        self._futures: dict[Hashable, _Future] = {}

    @property
    def caster(self) -> Caster:
        """What is behind it."""
        return self._caster

    def submit(self, rid: Hashable, raw: Any = None, *, timeout: float | None = None) -> "Future[Any]":
        """See `Caster.submit`. The future's exception is the outcome's error."""
        future = _Future(self._caster, rid)
        # Before it can have an outcome, which may be at once.
        if self._futures.setdefault(rid, future) is not future:
            raise ValueError(f"submit {rid!r}: a request with this id is pending; an id is free again with its outcome")
        try:
            self._caster.submit(rid, raw, timeout=timeout)
        except BaseException:
            del self._futures[rid]
            raise
        return future

    def cancel(self, which: "Hashable | Predicate") -> None:
        """See `Caster.cancel`."""
        self._caster.cancel(which)

    def step(self, timeout: float = 0.0) -> list[Outcome]:
        """See `Caster.step`; the futures concerned are done when it returns."""
        return self._resolved(self._caster.step(timeout))

    def collect(self) -> bytes:
        """See `Caster.collect`."""
        return self._caster.collect()

    def apply(self, blob: "bytes | bytearray | memoryview") -> list[Outcome]:
        """See `Caster.apply`; the futures concerned are done when it returns."""
        return self._resolved(self._caster.apply(blob))

    def close(self, wait: bool = True, cancel_pending: bool = False) -> list[Outcome]:
        """See `Caster.close`; all futures are done when it returns."""
        return self._resolved(self._caster.close(wait, cancel_pending))

    def __enter__(self) -> "FutureCaster":
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            self.close()
            return
        self._caster.__exit__(*error)
        lost = GroupError("the caster was left by an exception")
        self._resolved([Outcome(rid, error=lost) for rid in tuple(self._futures)])

    def _resolved(self, outcomes: list[Outcome]) -> list[Outcome]:
        for outcome in outcomes:
            future = self._futures.pop(outcome.rid, None)
            if future is not None:
                future.resolve(outcome)
        return outcomes


class _Future(Future[Any]):
    def __init__(self, caster: Caster, rid: Hashable) -> None:
        super().__init__()
        self._caster = caster
        self._rid = rid

    def cancel(self) -> bool:
        """Ask the caster. True only once the future is cancelled, which a step says, to all ranks in the same one."""
        if not self.done():
            self._caster.cancel(self._rid)
        return self.cancelled()

    def resolve(self, outcome: Outcome) -> None:
        if outcome.cancelled:
            super().cancel()
            self.set_running_or_notify_cancel()
        elif outcome.error is not None:
            self.set_exception(outcome.error)
        else:
            self.set_result(outcome.value)
