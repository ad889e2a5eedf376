"""What ties the model of `tests/model` to the code: every kind of step there names the function and the numbered steps
(native/steps.h) that it stands for. `problems` says where one side has what the other lacks."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import steps

PACKAGE = steps.ROOT / "shmcast"

# Steps that no transition stands for, and why. Keys are names, or (first, last) numbers.
HINT = "a hint that shortens a wait: losing it costs one bounded wait, no more"
OWN = "memory that no other process looks at"
EXEMPT: dict[str | tuple[int, int], str] = {
    (201, 204): "the process token: memory of this process alone, chosen before it joins anything",
    "ANCHOR_UNDO": "the lock goes with it, as in a death at ANCHOR_MAP",
    "PEER_PROBE": "asks, and nothing is decided by the answer",
    (212, 215): "words of a group and of its ring: tests/test_model_agree.py",
    (301, 303): HINT,
    (408, 412): HINT,
    (507, 510): OWN,
    (601, 699): "agreement: tests/test_model_agree.py",
    (701, 799): "bells: tests/test_model_bell.py",
    (801, 899): "the ring has one writer, and a head and counts that only grow: tests/test_native_ring.py",
    (901, 902): "the word of a group, for people",
    "SWEEP_CLOSE": "the byte was unlocked before, at PEER_UNLOCK",
}

# Which step stands in which function of names.py; callers of these are held to be tied, or exempt with a reason.
NAMES = {
    "create": "NAME_CREATE",
    "open_writable": "NAME_OPEN",
    "open_readable": "NAME_OPEN",
    "unlink": "NAME_UNLINK",
    "is_current": "NAME_IS_CURRENT",
    "listing": "NAME_LIST",
    "status": "NAME_SIZE",
}
LOOKS = "looks, to tell; nothing is decided by it"
EXEMPT_CALLERS = {  # (module, or function, step): why
    ("metrics", "NAME_LIST"): LOOKS,
    ("metrics", "NAME_OPEN"): LOOKS,
    ("looks", "NAME_LIST"): LOOKS,
    ("looks", "NAME_OPEN"): LOOKS,
    ("looks", "NAME_SIZE"): LOOKS,
    ("gc._look_inside", "NAME_OPEN"): "looks, to plan; apply looks again, with the byte",
    ("gc._described", "NAME_SIZE"): "looks, to plan; apply looks again, with the byte",
    ("worker", "NAME_OPEN"): "a block that the owner has reserved and gives to nobody else before the worker has ended",
}


class Tie(NamedTuple):
    """One function that one transition stands for a part of."""

    transition: str
    function: str
    steps: tuple[str, ...]
    reason: str
    """Why there is no step, where there is none."""


class Code(NamedTuple):
    """What stands where: ``{function: steps}``, and ``{function: functions that it calls}``."""

    steps: dict[str, set[str]]
    calls: dict[str, set[str]]

    def reached(self, function: str, depth: int = 1) -> set[str]:
        """Steps that stand in the function, or in what it calls, ``depth`` calls away at most."""
        found = set(self.steps.get(function, ()))
        for called in self.calls.get(function, ()) if depth else ():
            found |= self.reached(called, depth - 1)
        return found


def parse(rows: Iterable[tuple[str, str]]) -> tuple[list[Tie], list[str]]:
    """Ties of rows ``(transition, what it stands for)``; the transitions whose text is none."""
    ties, wrong = [], []
    for transition, text in rows:
        if text in ("(kernel)", "(layout.h)"):
            continue
        for part in re.split(r",\s*(?![^(]*\))", text):
            match = re.fullmatch(r"([\w.]+)(?: \(([^)]+)\)|((?: [A-Z_0-9]+)+))", part)
            if match is None:
                wrong.append(f"{transition}: {part!r} is not a function with steps, or with a reason in brackets")
            else:
                ties.append(Tie(transition, match[1], tuple((match[3] or "").split()), match[2] or ""))
    return ties, wrong


@functools.cache
def c_code(native: Path = steps.NATIVE) -> Code:
    """The core. Python's names of its functions are in it as well: ``_native.take_owner_byte``."""
    code = Code({}, {})
    for path in sorted([*native.glob("*.c"), *native.glob("*.h")]):
        text = path.read_text()
        source = steps.without_comments(text)
        for name, start, end in steps.functions(source):
            body = source[start:end]
            code.steps.setdefault(name, set()).update(steps.STEP.findall(body))
            code.calls.setdefault(name, set()).update(re.findall(r"\b(\w+)\s*\(", body))
        for method, function in re.findall(r'\{"(\w+)",\s*(?:\([^;{}]*?\))*\s*(\w+),\s*METH_', text):
            code.calls.setdefault(f"_native.{method}", set()).add(function)
    return code


def _functions(tree: ast.Module, prefix: str) -> Iterator[tuple[str, ast.AST]]:
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield f"{prefix}.{node.name}", node
        elif isinstance(node, ast.ClassDef):
            yield from _functions(ast.Module(node.body, []), f"{prefix}.{node.name}")


@functools.cache
def python_code(package: Path = PACKAGE) -> Code:
    """The package: ``module.function`` and ``module.Class.function``. Calls are known by name alone."""
    code = Code({}, {})
    for path in sorted(package.rglob("*.py")):
        module = path.relative_to(package).with_suffix("").as_posix().replace("/", ".")
        functions = dict(_functions(ast.parse(path.read_text()), module))
        for name, node in functions.items():
            found, called = code.steps.setdefault(name, set()), code.calls.setdefault(name, set())
            for part in ast.walk(node):
                if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id == "names":
                    found |= {NAMES[part.attr]} if part.attr in NAMES else set()
                elif (
                    isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id == "_native"
                ):
                    called.add(f"_native.{part.attr}")
                if isinstance(part, (ast.Attribute, ast.Name)):
                    short = part.attr if isinstance(part, ast.Attribute) else part.id
                    called |= {other for other in functions if other.rpartition(".")[2] == short}
    return code


def exempt(step: str, number: int) -> bool:
    """Whether there is a written reason for no transition to stand for it."""
    ranges = (key for key in EXEMPT if isinstance(key, tuple))
    return step in EXEMPT or any(first <= number <= last for first, last in ranges)


def problems(
    rows: Iterable[tuple[str, str]], native: Path = steps.NATIVE, package: Path = PACKAGE, table: Path | None = None
) -> list[str]:
    """What is wrong, one line each."""
    ties, lines = parse(rows)
    core, python = c_code(native), python_code(package)
    both = Code(core.steps | python.steps, core.calls | python.calls)
    numbers = {name: number for name, (number, _) in steps.table(table or native / "steps.h").items()}
    for tie in ties:
        if tie.function not in core.steps and tie.function not in python.steps:
            lines.append(f"{tie.transition}: there is no function {tie.function}")
            continue
        # Python calls a method of the core, which is a function of module_*.c, which calls the one that has the step
        reached = both.reached(tie.function, 3 if "." in tie.function else 1)
        lines += [
            f"{tie.transition}: {tie.function} has no step {step}, nor has what it calls"
            for step in tie.steps
            if step not in reached
        ]
    lines += _untied(ties, numbers, python)
    return lines


def _untied(ties: list[Tie], numbers: dict[str, int], python: Code) -> list[str]:
    tied = {step for tie in ties for step in tie.steps}
    lines = [f"ties: there is no step {step} in steps.h" for step in sorted(tied - set(numbers))]
    for step, number in numbers.items():
        if step not in tied and not exempt(step, number):
            lines.append(f"steps.h: no transition stands for {number} {step}, and no reason is written")
        if step in tied and exempt(step, number):
            lines.append(f"steps.h: {number} {step} has a transition, and a reason to have none")
    pairs = {(tie.function, step) for tie in ties for step in tie.steps}
    for function, found in python.steps.items():
        callers = {function} | {name for name, called in python.calls.items() if function in called}
        lines += [
            f"{function}: no transition stands for its {step}, and no reason is written"
            for step in sorted(found)
            if not any((caller, step) in pairs for caller in callers) and not _only_looks(function, step)
        ]
    return lines


def _only_looks(function: str, step: str) -> bool:
    whole = function + "."
    return any(whole.startswith(name + ".") and step == known for name, known in EXEMPT_CALLERS)
