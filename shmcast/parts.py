"""What a message has brought on one rank, before the ranks have agreed on it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any, NamedTuple, TypeAlias

from .errors import GroupError, without_frames

LAST_BIT = 63
"""Failures of parts travel as 64 bits: part i has bit i, and the last bit stands for this part and all after it."""
ALL_BITS = (1 << 64) - 1


class Received(NamedTuple):
    """One tree of a message, or the error that all ranks have in its place."""

    value: Any
    error: GroupError | None


TakeIn: TypeAlias = Callable[[Any], int]
"""What a rank does with a tree that has come: returns what of it it could not do, up to 63 bits, which is agreed on in the same
step. What it raises counts as if the tree could not be rebuilt."""


@dataclass
class Parts:
    """Trees by number, and why there is none here."""

    values: list[Any] = field(default_factory=list)
    causes: dict[int, BaseException] = field(default_factory=dict)
    missed: int = 0
    """Bits of ``take_in``, behind the first part's."""

    def fail(self, number: int, error: BaseException) -> None:
        """Record why one could not be made; an interrupt is raised once the ranks have agreed."""
        self.causes[number] = without_frames(error) if isinstance(error, Exception) else error

    @property
    def interrupt(self) -> BaseException | None:
        """What is to be raised in this thread, whatever the ranks agree on."""
        return next((cause for cause in self.causes.values() if not isinstance(cause, Exception)), None)

    @property
    def failures(self) -> int:
        """The bits for the other ranks."""
        if self.interrupt is not None:
            return ALL_BITS
        return self.missed | sum({1 << min(number, LAST_BIT) for number in self.causes})


Finish: TypeAlias = Callable[[bytes, Parts], Parts]
"""What else a rank does with a message's head and parts before the ranks agree on it: returns what there is to agree on. Must
raise nothing."""


def rebuild(
    raw: Sequence[memoryview], loads: Callable[[Any], Any], own: list[Any] | None, take_in: TakeIn | None
) -> Parts:
    """The trees of a message; ``own``: those that this rank has already."""
    parts = Parts()
    for number, part in enumerate(raw):
        value = None
        try:
            value = own[number] if own is not None else loads(part)
            if take_in is not None:
                parts.missed = _checked_bits(take_in(value)) << 1
        except BaseException as error:
            parts.fail(number, error)
        parts.values.append(value)
    return parts


def _checked_bits(missed: int) -> int:
    """What a rank says that it could not do, beside the bit for the whole. ValueError where it does not fit a word with that."""
    missed = index(missed)
    if not 0 <= missed < 1 << 63:
        raise ValueError(f"take_in: it returned {missed:#x}, which is not 63 bits")
    return missed
