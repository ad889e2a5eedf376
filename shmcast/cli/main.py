"""`shmcast`: `ls` shows the arenas of this host, `doctor` what is wrong with it."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from .. import doctor, looks, names
from ..sizes import parse_bytes
from . import output

USAGE = 64
"""Exit status where the command line is wrong, or nothing can be looked at: 1 and 2 are what `doctor` finds."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(USAGE, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    options = _parser().parse_args(arguments)
    status: int = options.run(options)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="shmcast", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="ls | doctor")
    ls = commands.add_parser("ls", help="every arena of this host: owner, bytes, blocks, holders, why it stays")
    ls.add_argument("--namespace", type=_namespace, help="only of this one; default: all")
    ls.add_argument("--json", action="store_true", help="a list of objects instead of text")
    ls.set_defaults(run=_ls)
    doc = commands.add_parser(
        "doctor",
        help="what is wrong with this host, why it matters, and what mends it",
        epilog="exit status: 0 nothing to mend, 1 warnings, 2 faults, 64 wrong command line",
    )
    doc.add_argument(
        "--expect",
        type=_size,
        help="bytes of arenas that are to fit, such as 4GiB; default: SHMCAST_MAX_BYTES, until there is such an arena",
    )
    doc.add_argument("--json", action="store_true", help="an object instead of text")
    doc.set_defaults(run=_doctor)
    return parser


def _namespace(text: str) -> str:
    try:
        return names.check_namespace(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _size(text: str) -> int:
    try:
        return parse_bytes(int(text) if text.isdecimal() else text, "--expect")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


# ---- ls


def _ls(options: argparse.Namespace) -> int:
    try:
        seen = looks.survey(options.namespace)
    except OSError as error:
        output.complain(f"list the arenas in {names.DIRECTORY}: {error}")
        return USAGE
    if options.json:
        output.show(json.dumps(seen, indent=2).splitlines())
        return 0
    output.show(line for arena in seen for line in _arena(arena))
    if not seen:
        output.complain(f"no arenas in {names.DIRECTORY}")
    return 0


def _arena(arena: dict[str, Any]) -> list[str]:
    lines = [f"{arena['namespace']} {arena['arena']}  {arena['state']}: {arena['why']}"]
    if "blocks" not in arena:
        return [*lines, f"    uid {arena['uid']}, {_bytes(arena['file_bytes'])} in {names.DIRECTORY}"]
    owner, blocks = arena["owner"], arena["blocks"]
    if owner is not None:
        lines.append(
            f"    owner   {_process(owner)}, uid {arena['uid']}, mode {arena['mode']}, {_age(arena['age_s'])} old"
        )
    lines.append(
        f"    bytes   {_bytes(arena['used_bytes'])} used, {_bytes(arena['peak_used_bytes'])} at most, "
        f"{_bytes(arena['reserved_bytes'])} reserved in {arena['segments']} segments, {_bytes(arena['max_bytes'])} allowed"
    )
    lines.append(
        f"    blocks  {blocks['claimed']} live: {blocks['held']} held, {blocks['granted']} promised ({blocks['awaited']} to "
        f"anybody, {blocks['entrusted']} until a deadline); {blocks['free']} free; {arena['published']} ever published"
    )
    for peer in arena["holders"]:
        lines.append(
            f"    holder  {_process(peer)}: holds {peer['holds']} ({_bytes(peer['held_bytes'])}), promised {peer['grants']}"
        )
    return lines


def _process(peer: dict[str, Any]) -> str:
    lock = "alive" if peer["alive"] else "dead"
    return f"pid {peer['pid']} ({peer['command'] or '?'}), {lock} by its lock, {peer['state']}"


def _bytes(amount: int) -> str:
    for power, prefix in ((4, "T"), (3, "G"), (2, "M"), (1, "K")):
        if amount >= 1 << 10 * power:
            return f"{amount / (1 << 10 * power):.1f} {prefix}iB"
    return f"{amount} B"


def _age(seconds: float) -> str:
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


# ---- doctor


def _doctor(options: argparse.Namespace) -> int:
    findings = doctor.judge(doctor.read(), options.expect)
    status = doctor.status(findings)
    if options.json:
        said = {"status": status, "findings": [finding._asdict() for finding in findings]}
        output.show(json.dumps(said, indent=2).splitlines())
        return status
    output.show(line for finding in findings for line in _finding(finding))
    return status


def _finding(finding: doctor.Finding) -> list[str]:
    lines = [f"{finding.level:8}{finding.what}"]
    if finding.level != "ok":
        lines += [f"        why:  {finding.why}", f"        mend: {finding.mend}"]
    return lines
