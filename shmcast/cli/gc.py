"""shmcast-gc: remove what dead processes have left in /dev/shm, once or as it happens, and say why the rest stays."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .. import gc, names
from ..sizes import format_bytes
from . import output
from .codes import DONE, LEFT, NOT_BEGUN, WOULD_REMOVE, NotBegunError

if TYPE_CHECKING:
    from ..foreign import Census, Leftover

JSON_VERSION = 1
"""Of the documents; raised when a field changes its meaning or goes."""

DESCRIPTION = """Remove what dead processes have left in /dev/shm, and say for each segment why it goes or stays.
Only segments of the user that runs it, and only those whose owner's file lock the kernel has dropped: a paused process is
alive. It is never needed for correctness, as processes sweep when they create an arena, join one or find no room; it
makes it sooner."""

EPILOG = """exit codes:
  0  nothing is left that should be gone; with --watch: ended by SIGTERM or SIGINT
  1  something should be gone and could not be removed; the output says what and why
  2  not begun: wrong options, a missing extra, a port that is taken, /dev/shm (--foreign: /proc) can not be read or watched
  3  --dry-run: there is something to remove

It is what was done, also where the output can not be written: nobody who reads a pipe is no failure, anything else is said
on stderr.
"""


def parser() -> argparse.ArgumentParser:
    """The options."""
    result = argparse.ArgumentParser(
        "shmcast-gc", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    mode = result.add_mutually_exclusive_group()
    mode.add_argument("--once", action="store_true", help="look, remove, end (the default)")
    mode.add_argument("--watch", action="store_true", help="stay, and remove what processes leave as they die")
    result.add_argument("--dry-run", action="store_true", help="say what would be removed, and remove nothing")
    result.add_argument("--json", action="store_true", help="one JSON document; with --watch one a line")
    result.add_argument("--namespace", metavar="NAME", help="this namespace only (default: all that this user has)")
    watch = result.add_argument_group("with --watch")
    watch.add_argument(
        "--rescan", metavar="SECONDS", type=_seconds, default=60.0, help="look at everything that often (60)"
    )
    watch.add_argument("--metrics-port", metavar="PORT", type=int, help="serve Prometheus metrics; 0: any free port")
    watch.add_argument("--metrics-address", metavar="ADDRESS", default="127.0.0.1", help="where to listen (127.0.0.1)")
    foreign = result.add_argument_group("what other programs have left")
    foreign.add_argument("--foreign", action="store_true", help="report their segments, and which processes use them")
    foreign.add_argument("--remove", action="store_true", help="with --foreign: remove those that provably nobody uses")
    foreign.add_argument(
        "--pattern",
        metavar="GLOB",
        action="append",
        help="with --foreign: these names, instead of the usual ones; may be repeated",
    )
    foreign.add_argument(
        "--min-age", metavar="SECONDS", type=_seconds, help="with --foreign: what was touched later than that stays"
    )
    foreign.add_argument(
        "--sole-pid-namespace",
        action="store_true",
        help="with --foreign: you know that all processes that use this /dev/shm are in this pid namespace",
    )
    return result


def _seconds(text: str) -> float:
    value = float(text)
    if not value >= 0:
        raise ValueError(text)
    return value


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options given, checked against each other. SystemExit(2) where they make no sense."""
    result = parser()
    options = result.parse_args(arguments)
    if options.namespace is not None:
        try:
            names.check_namespace(options.namespace)
        except ValueError as error:
            result.error(str(error))
    if options.watch and (options.dry_run or options.foreign):
        result.error(f"--watch can not be combined with {'--dry-run' if options.dry_run else '--foreign'}")
    if options.metrics_port is not None and not options.watch:
        result.error("--metrics-port needs --watch: a process that ends can not be asked")
    if not options.foreign and (
        options.remove or options.pattern or options.min_age is not None or options.sole_pid_namespace
    ):
        result.error("--remove, --pattern, --min-age and --sole-pid-namespace need --foreign")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script; returns the exit code."""
    options = options_of(arguments)
    try:
        if options.watch:
            from .watch import watch

            return watch(options)
        return once(options)
    except NotBegunError as error:
        output.complain(f"shmcast-gc: {error}")
        return NOT_BEGUN


# ---- once


def once(options: argparse.Namespace) -> int:
    """Look, remove, report. Whatever may be missing is looked at first: NotBegunError means that nothing was done."""
    census = look_at_others(options) if options.foreign else None
    began = time.monotonic()
    try:
        todo = gc.plan(gc.scan(options.namespace, closely=True))
    except OSError as error:
        raise NotBegunError(f"read {names.DIRECTORY}: {error}") from None
    report = gc.Report() if options.dry_run else gc.apply(todo)
    result = document(options, todo, report)
    result["seconds"] = round(time.monotonic() - began, 6)
    states: set[str] = set()
    if census is not None:
        result["foreign"] = foreign(options, census)
        states = {one["state"] for one in result["foreign"]["leftovers"]}
    left = report.failed or "left" in states
    to_go = options.dry_run and (todo.removals or todo.scrubs or "would remove" in states)
    result["exit_code"] = code = LEFT if left else WOULD_REMOVE if to_go else DONE
    output.show(json.dumps(result, indent=1).splitlines() if options.json else text(result))
    return code


def document(options: argparse.Namespace, todo: gc.Plan, report: gc.Report) -> dict[str, Any]:
    """What there was and what has become of it, fit for JSON."""
    free, total = names.room()
    return {
        "version": JSON_VERSION,
        "namespace": options.namespace,
        "dry_run": options.dry_run,
        "shm": {"total_bytes": total, "free_bytes": free},
        "segments": segments(todo, report, options.dry_run),
        "removed": {"arenas": report.arenas, "segments": len(report.removed), "nbytes": report.nbytes},
        "scrubbed": [
            {"namespace": space, "arena": f"{arena:016x}", "processes": count}
            for (space, arena), count in report.scrubbed.items()
        ],
        "failed": [{"name": name, "why": why} for name, why in report.failed],
    }


def segments(todo: gc.Plan, report: gc.Report, dry_run: bool) -> list[dict[str, Any]]:
    """One dict a segment. "state": kept, removed, would remove, failed, or left: another sweeper, or life, came between."""
    removed = {one.name for one in report.removed}
    failed = dict(report.failed)
    result = []
    for (name, key, number, kind, nbytes, uid), action, reason, why in todo.verdicts:
        state = "kept"
        if action == "remove":
            state = (
                "removed" if name in removed else "failed" if name in failed else "would remove" if dry_run else "left"
            )
        result.append(
            {
                "name": name,
                "namespace": key[0] if key else None,
                "arena": f"{key[1]:016x}" if key else None,
                "number": number if key else None,
                "kind": kind,
                "nbytes": nbytes,
                "uid": uid,
                "verdict": action,
                "reason": reason,
                "why": f"{why}; {failed[name]}" if name in failed else why,
                "state": state,
            }
        )
    return result


def look_at_others(options: argparse.Namespace) -> "Census":
    """What others have left. NotBegunError where one can not look."""
    from .. import foreign as others

    terms: dict[str, Any] = {}
    if options.pattern:
        terms["patterns"] = tuple(options.pattern)
    if options.min_age is not None:
        terms["min_age_s"] = options.min_age
    if options.sole_pid_namespace:
        terms["sole_pid_namespace"] = True
    try:
        return others.scan(**terms)
    except OSError as error:
        raise NotBegunError(f"look for what others have left: {error}") from None


def foreign(options: argparse.Namespace, census: "Census") -> dict[str, Any]:
    """What others have left, and what has become of it. "state": kept, removable, would remove, removed, left, or
    gone: somebody else has removed it."""
    found = []
    for one in census.leftovers:
        state, trouble = _settle(options, one)
        users = [{"pid": user.pid, "command": user.command, "how": user.how} for user in one.users]
        found.append(
            {
                "name": one.name,
                "nbytes": one.nbytes,
                "age_s": round(one.age_s, 3),
                "uid": one.uid,
                "users": users,
                "removable": one.removable,
                "reason": f"{one.reason}; {trouble}" if trouble else one.reason,
                "state": state,
            }
        )
    return {"complete": census.complete, "why": census.why, "leftovers": found}


def _settle(options: argparse.Namespace, one: "Leftover") -> tuple[str, str]:
    """What becomes of it, and what went wrong."""
    from .. import foreign as others

    if not one.removable:
        return "kept", ""
    if not options.remove:
        return "removable", ""
    if options.dry_run:
        return "would remove", ""
    try:
        return ("removed" if others.remove(one) else "gone"), ""
    except OSError as error:
        return "left", str(error)


# ---- text


def text(result: dict[str, Any]) -> list[str]:
    """The document as lines for people."""
    rows = [(one["state"], one["name"], one["nbytes"], one["why"]) for one in result["segments"]]
    rows += [
        ("scrubbed", f"shmcast.{one['namespace']}.{one['arena']}.0", None, f"{one['processes']} dead processes in it")
        for one in result["scrubbed"]
    ]
    known = {one["name"] for one in result["segments"]}
    rows += [("failed", one["name"], None, one["why"]) for one in result["failed"] if one["name"] not in known]
    removed, shm = result["removed"], result["shm"]
    to_go = sum(one["verdict"] == "remove" for one in result["segments"])
    done = (
        f"{to_go} to remove"
        if result["dry_run"]
        else f"{removed['segments']} removed ({format_bytes(removed['nbytes'])})"
    )
    lines = [
        *_aligned(rows),
        f"{len(result['segments'])} segments, {done}, {len(result['failed'])} failed; "
        f"{names.DIRECTORY}: {format_bytes(shm['free_bytes'])} free of {format_bytes(shm['total_bytes'])}",
    ]
    others = result.get("foreign")
    if others is not None:
        found = [(one["state"], one["name"], one["nbytes"], _why_foreign(one)) for one in others["leftovers"]]
        why = "" if others["complete"] else f"; {others['why']}"
        lines += ["", *_aligned(found), f"{len(found)} segments of others{why}"]
    return lines


def _why_foreign(one: dict[str, Any]) -> str:
    users = ", ".join(f"pid {user['pid']} ({user['command']}) {user['how']} it" for user in one["users"])
    return f"{one['reason']}; {one['age_s']:.0f} s old" + (f"; {users}" if users else "")


def _aligned(rows: list[tuple[str, str, int | None, str]]) -> list[str]:
    width = max((len(name) for _, name, _, _ in rows), default=0)
    state_width = max((len(state) for state, _, _, _ in rows), default=0)
    lines = []
    for state, name, nbytes, why in rows:
        size = "" if nbytes is None else format_bytes(nbytes)
        lines.append(f"{state:{state_width}}  {name:{width}}  {size:>9}  {why}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
