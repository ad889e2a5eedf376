"""Every system call and every atomic access of the C core, and the numbered step (native/steps.h) that stands before it.

    python3 tests/steps.py          # lists them: place, function, step or the reason to have none; exit 1 if one has neither

A statement with such a call has its step directly before it, as `SHMC_STEP(NAME);`. Where a process dies at a step, what
follows has not happened yet; so reads that decide something have steps as well as writes: what was decided before them
and what after is not the same.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
NATIVE = ROOT / "native"

ATOMIC = re.compile(
    r"shmc_(?:seq|acquire|release|relaxed)_\w+|shmc_fence_streaming_stores|(?:__)?atomic_\w+|__sync_\w+"
)
CALL = re.compile(r"(?<![\w.>])[A-Za-z_]\w*(?=\s*\()")
# Whatever is called and is neither Python's, nor of the core, nor one of these, is held to be a system call.
HARMLESS = {
    *("if", "for", "while", "switch", "return", "sizeof", "offsetof", "void", "_Alignof", "_Static_assert", "__asm__"),
    *(
        "memcpy",
        "memset",
        "memcmp",
        "strchr",
        "strrchr",
        "strcmp",
        "strcspn",
        "strlen",
        "strerror",
        "strtoul",
        "strtoull",
    ),
    *("calloc", "malloc", "realloc", "free", "snprintf", "sscanf", "getenv"),
    *("end", "kernel_of", "met", "value"),  # pointers to functions of the core
}
FOREIGN = re.compile(r"_?Py[A-Z_]|_mm\d*_|__builtin_|[A-Z_0-9]+$")
STEP = re.compile(r"\bSHMC_STEP\((\w+)\);")
ROW = re.compile(r'^\s*X\((\d+), (\w+), "([^"]*)"\)', re.MULTILINE)

# (file, function or "*"): why nothing there is numbered. An entry that nothing needs is an error.
READ_TO_BE_TOLD = "read to be told; nothing is decided by it and nothing written"
PRIVATE = "memory or a descriptor that no other process can see"
WINDOW = "a worker's mapping: what it writes there nobody reads before the owner has sealed it"
METRIC = "a metric: nothing is decided by it, see metrics.h"
EXEMPT = {
    ("steps.c", "*"): "the steps themselves",
    ("atomics.h", "*"): "what the names of atomic accesses mean",
    ("clock.c", "*"): "reads a clock",
    ("cpu.c", "*"): "reads what the processor is, once",
    ("hash.c", "*"): PRIVATE,
    ("hash_long.h", "*"): "the payload, which COPY_PAYLOAD stands before and PUBLISH_FENCE after",
    ("metrics.c", "*"): METRIC,
    ("metrics.h", "*"): METRIC,
    ("module_meter.c", "*"): METRIC,
    ("module_inspect.c", "*"): READ_TO_BE_TOLD,
    ("control.c", "read_exactly"): READ_TO_BE_TOLD,
    ("control.c", "shmc_control_format"): PRIVATE,
    ("bell.c", "shmc_bell_spin_ns"): "asks how many processors there are",
    ("peers.c", "describe_process"): "for people, and TAKE_DESCRIBE stands before it",
    ("peers.c", "lock_operation"): "PEER_LOCK, PEER_UNLOCK and PEER_PROBE stand before it",
    ("segment.c", "huge_space"): PRIVATE,
    ("segment.c", "shmc_segment_map"): PRIVATE,
    ("segment.c", "shmc_segment_private_written"): PRIVATE,
    ("segment.c", "shmc_window_open"): WINDOW,
    ("segment.c", "shmc_window_close"): WINDOW,
    ("segment.c", "shmc_window_unmap"): WINDOW,
    ("module_worker.c", "module_end_with_parent"): "asks the kernel to end it with its parent",
    ("module_worker.c", "module_keep_freed"): PRIVATE,
    ("owner.c", "shmc_owner_takers"): READ_TO_BE_TOLD,
    ("slots.c", "shmc_slot_keep"): "read for the text of an error",
    ("module_lease.c", "lease_pending"): READ_TO_BE_TOLD,
    ("module_lease.c", "add_lane"): PRIVATE,
    ("module_member.c", "map_through_opener"): PRIVATE,
    ("module_member.c", "by_token"): READ_TO_BE_TOLD,
    ("module_member.c", "steps_of"): READ_TO_BE_TOLD,
    ("module_member.c", "member_alive"): PRIVATE,
    ("module_member.c", "member_get_incarnation"): READ_TO_BE_TOLD,
    ("module_member.c", "member_get_step"): READ_TO_BE_TOLD,
}


class Access(NamedTuple):
    """One system call or atomic access."""

    file: str
    line: int
    function: str
    call: str
    step: str
    """Name of the step before it, empty where there is none."""

    @property
    def exemption(self) -> str:
        """Why it needs none, empty where it does."""
        return EXEMPT.get((self.file, self.function)) or EXEMPT.get((self.file, "*")) or ""


def table(header: Path = NATIVE / "steps.h") -> dict[str, tuple[int, str]]:
    """``{name: (number, what it stands before)}`` as the header has them."""
    return {name: (int(number), text) for number, name, text in ROW.findall(header.read_text())}


def without_comments(source: str) -> str:
    """The same lines with comments, literals and preprocessor lines blanked."""

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match.group())

    source = re.sub(r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'', blank, source, flags=re.DOTALL)
    return re.sub(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", blank, source, flags=re.MULTILINE)


def functions(source: str) -> Iterator[tuple[str, int, int]]:
    """Name, first and last offset of the bodies of functions."""
    end = 0
    for match in re.finditer(r"^(?!static const)[^\s#/}][^;={}]*?\b(\w+)\s*\([^;{}]*\)\s*\{", source, re.MULTILINE):
        if match.end() > end:
            end = source.find("\n}", match.end())
            yield match.group(1), match.end(), end


def own_functions(native: Path) -> set[str]:
    """What the core defines itself."""
    sources = [without_comments(path.read_text()) for path in native.glob("*.[ch]")]
    return {name for source in sources for name, _, _ in functions(source)}


def calls(source: str, own: set[str]) -> list[str]:
    """System calls and atomic accesses in a text, in order."""
    return [name for name in CALL.findall(source) if touches(name, own)]


def touches(name: str, own: set[str]) -> bool:
    """Whether a call of that name may be seen by another process."""
    return bool(ATOMIC.fullmatch(name)) or not (name in HARMLESS or name in own or FOREIGN.match(name))


def accesses(path: Path, own: set[str]) -> list[Access]:
    """What one file has."""
    source = without_comments(path.read_text())
    found = []
    for name, start, end in functions(source):
        step, fresh, depth = "", False, 0
        for token in re.finditer(rf"{STEP.pattern}|{CALL.pattern}|[(){{;]", source[start:end]):
            text = token.group()
            if token.group(1):
                step, fresh = token.group(1), True
            elif text in "()":
                depth += 1 if text == "(" else -1
            elif text in "{;":
                fresh = fresh and depth > 0
            elif touches(text, own):
                line = source.count("\n", 0, start + token.start()) + 1
                found.append(Access(path.name, line, name, text, step if fresh else ""))
    return found


def all_accesses(native: Path = NATIVE) -> list[Access]:
    """What all files have."""
    own = own_functions(native)
    return [access for path in sorted(native.glob("*.[ch]")) for access in accesses(path, own)]


def used(native: Path = NATIVE, python: Path = ROOT / "shmcast") -> set[str]:
    """Names of the steps that stand somewhere, in C or in Python."""
    in_c = {name for path in native.glob("*.[ch]") for name in STEP.findall(without_comments(path.read_text()))}
    in_python = {name for path in python.rglob("*.py") for name in re.findall(r'_STEPS\["(\w+)"\]', path.read_text())}
    return in_c | in_python


def problems(native: Path = NATIVE) -> list[str]:
    """What is wrong, one line each."""
    found = all_accesses(native)
    steps = table(native / "steps.h")
    numbers = [number for number, _ in steps.values()]
    lines = [
        f"{access.file}:{access.line}: {access.call} in {access.function} has no step before it and no reason in EXEMPT"
        for access in found
        if not access.step and not access.exemption
    ]
    lines += [f"steps.h: number {number} stands twice" for number in sorted(set(numbers)) if numbers.count(number) > 1]
    lines += [f"steps.h: {name} stands nowhere in the code" for name in sorted(set(steps) - used(native))]
    needed = {(access.file, name) for access in found if not access.step for name in (access.function, "*")}
    lines += [f"EXEMPT: nothing needs {file} {function}" for file, function in EXEMPT if (file, function) not in needed]
    return lines


def main() -> int:
    steps = table()
    for access in all_accesses():
        number = f"{steps[access.step][0]:>5} {access.step}" if access.step in steps else f"    - {access.exemption}"
        print(f"{access.file + ':' + str(access.line):<24}{access.function:<32}{access.call:<28}{number}")
    wrong = problems()
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
