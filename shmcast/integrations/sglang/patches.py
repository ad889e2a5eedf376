"""Replacing functions of a package that is imported already, and giving them back."""

import inspect
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ...errors import ShmcastError

_MISSING: Any = object()


class Target(NamedTuple):
    """One attribute of a module or class of the engine."""

    owner: Any
    name: str
    replacement: Any
    parameters: tuple[str, ...] | None = None
    """What the original takes, by name and in order: who finds another function refuses. None: it is not one."""
    everywhere: bool = False
    """Also in modules that have imported the function by name."""

    @property
    def text(self) -> str:
        """How it is called in messages."""
        return f"{getattr(self.owner, '__qualname__', getattr(self.owner, '__name__', self.owner))}.{self.name}"


class _Change(NamedTuple):
    owner: Any
    name: str
    before: Any
    replacement: Any


_changes: list[_Change] = []


def apply(targets: Callable[[], Sequence[Target]]) -> None:
    """Put all replacements in place, or none. Nothing where that has been done already. ShmcastError where a target is not
    what it was when this was written."""
    if _changes:
        return
    wanted = targets()
    wrong = [problem for target in wanted if (problem := _problem(target))]
    if wrong:
        raise ShmcastError(
            "install under SGLang: it is not the one that this build knows, and goes on as it is: " + "; ".join(wrong)
        )
    try:
        for target in wanted:
            original = vars(target.owner).get(target.name, _MISSING)
            _change(target.owner, target.name, target.replacement)
            if target.everywhere:
                for module in _importers(original, target):
                    _change(module, target.name, target.replacement)
    except BaseException:
        take_back()
        raise


def take_back() -> None:
    """Everything as it was, also in modules of the engine that have imported what stood there meanwhile."""
    while _changes:
        change = _changes.pop()
        if isinstance(change.owner, types.ModuleType):
            for module in _modules():
                if _is_of_package(module, change.owner) and vars(module).get(change.name) is change.replacement:
                    setattr(module, change.name, change.before)
        if change.before is _MISSING:
            delattr(change.owner, change.name)
        else:
            setattr(change.owner, change.name, change.before)


def applied() -> bool:
    """Whether something is replaced now."""
    return bool(_changes)


def original(owner: Any, name: str) -> Any:
    """What stood there before."""
    for change in _changes:
        if change.owner is owner and change.name == name:
            return change.before
    return vars(owner)[name]


def _change(owner: Any, name: str, replacement: Any) -> None:
    before = vars(owner).get(name, _MISSING)
    setattr(owner, name, replacement)
    _changes.append(_Change(owner, name, before, replacement))


def _importers(function: Any, target: Target) -> list[types.ModuleType]:
    return [module for module in _modules() if vars(module).get(target.name) is function and module is not target.owner]


def _modules() -> list[types.ModuleType]:
    return [module for module in list(sys.modules.values()) if isinstance(module, types.ModuleType)]


def _is_of_package(module: types.ModuleType, other: types.ModuleType) -> bool:
    return module.__name__.partition(".")[0] == other.__name__.partition(".")[0]


def _problem(target: Target) -> str:
    found = vars(target.owner).get(target.name, _MISSING)
    if target.parameters is None:
        return ""
    if found is _MISSING:
        return f"there is no {target.text}"
    try:
        parameters = tuple(inspect.signature(found).parameters)
    except (TypeError, ValueError):
        return f"{target.text} is {found!r}, no function of ({', '.join(target.parameters)})"
    if parameters != target.parameters:
        return f"{target.text} takes ({', '.join(parameters)}), not ({', '.join(target.parameters)})"
    return ""
