"""What a `Caster` is given to materialize, and how, in whatever thread or process that happens. No torch here."""

from __future__ import annotations

from typing import Any

from numpy.typing import DTypeLike

from tp.config import Config
from tp.workloads import Array, Features, NewArray, make_workload

Job = tuple[int, bool, Any]
"""A number, whether it fails, and the raw request. A cache looks at all of it: the number makes equal raw requests different
that do not count as repeats of each other (those of another round, for example)."""


class RequestError(ValueError):
    """A request that can not be materialized."""


def refuse(shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """In place of an array, for a request that fails."""
    raise RequestError("this request can not be materialized")


class Work:
    """`materialize` of a caster: of a `Job`. Can be pickled."""

    def __init__(self, config: Config) -> None:
        self.workload = make_workload(config)

    def __call__(self, job: Job, out: NewArray) -> Features:
        _, fails, raw = job
        return self.workload.materialize(raw, refuse if fails else out)
