"""Who materializes on the entry rank, by the arguments of `Caster`."""

import os
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

from .content import Hash
from .desk import Desk
from .group import Group
from .intake import Intake
from .materializing import ByWay, Here, Maker
from .sending import Sender
from .tally import Tally
from .workers import Workers, pickled

Executor: TypeAlias = Literal["thread", "process", "inline"]
_MAX_WORKERS = 4


def checked(executor: Executor, materialize: Callable[..., Any], workers: int | None) -> int:
    """How many workers there are to be. ValueError, TypeError, on all ranks alike, for what can not be."""
    if executor not in ("thread", "process", "inline"):
        raise ValueError(f"executor is 'thread', 'process' or 'inline', not {executor!r}")
    if not callable(materialize):
        raise TypeError(f"materialize: a function of the raw request is needed, not {materialize!r}")
    if executor == "process":
        pickled(materialize)
    count = default_workers() if workers is None else workers
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"workers: a number of threads or processes, or None, not {count!r}")
    if count < 1:
        raise ValueError(f"workers={count}: at least 1 is needed")
    return count


def make_maker(
    executor: Executor,
    group: Group,
    sender: Sender,
    materialize: Callable[..., Any],
    workers: int,
    *,
    tally: Tally,
    hash: Hash,
) -> Maker:
    """``hash``: of what is made in place. RuntimeError where worker processes do not come up."""
    if executor == "process":
        return ByWay(sender, Workers(group, sender, materialize, count=workers, tally=tally, hash=hash))
    return ByWay(sender, Here(group, sender, materialize, tally=tally, hash=hash))


def make_intake(
    executor: Executor,
    group: Group,
    sender: Sender,
    materialize: Callable[..., Any],
    workers: int,
    *,
    max_bytes: int | None,
    desk: Desk | None,
    tally: Tally,
    hash: Hash,
) -> Intake:
    """Who takes requests on. Where none can be made, which raises what `make_maker` raises, ``desk`` is closed."""
    try:
        maker = make_maker(executor, group, sender, materialize, workers, tally=tally, hash=hash)
    except BaseException:
        if desk is not None:
            desk.close()  # or the arena would ask it for room as long as it lives
        raise
    threads = 0 if executor == "inline" else workers
    return Intake(maker, workers=threads, max_bytes=max_bytes, tally=tally, desk=desk)


def default_workers() -> int:
    """One a core that this process may use, a few at most: the ranks need cores too."""
    return min(len(os.sched_getaffinity(0)), _MAX_WORKERS)
