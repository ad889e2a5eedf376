"""shmcast-gc: remove what dead processes have left in /dev/shm, once or as it happens, and say why the rest stays."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from .. import gc, names
from ..sizes import format_bytes
from .codes import DONE, LEFT, NOT_BEGUN, WOULD_REMOVE, NotBegunError

JSON_VERSION = 1
"""Of the documents; raised when a field changes its meaning or goes."""

DESCRIPTION = """Remove what dead processes have left in /dev/shm, and say for each segment why it goes or stays.
Only segments of the user that runs it, and only those whose owner's file lock the kernel has dropped: a paused process is
alive. It is never needed for correctness, as processes sweep when they create an arena, join one or find no room; it
makes it sooner."""

EPILOG = """exit codes:
  0  nothing is left that should be gone; with --watch: ended by SIGTERM or SIGINT
  1  something should be gone and could not be removed; the output says what and why
  2  not begun: wrong options, a missing extra, a port that is taken, /dev/shm can not be read or watched
  3  --dry-run: there is something to remove
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
        print(f"shmcast-gc: {error}", file=sys.stderr)
        return NOT_BEGUN


# ---- once


def once(options: argparse.Namespace) -> int:
    """Look, remove, report."""
    began = time.monotonic()
    try:
        todo = gc.plan(gc.scan(options.namespace, closely=True))
        report = gc.Report() if options.dry_run else gc.apply(todo)
    except OSError as error:
        raise NotBegunError(f"read {names.DIRECTORY}: {error}") from None
    result = document(options, todo, report)
    result["seconds"] = round(time.monotonic() - began, 6)
    left = bool(report.failed)
    if options.foreign:
        result["foreign"], failed = foreign(options)
        left = left or failed
    code = LEFT if left else WOULD_REMOVE if options.dry_run and (todo.removals or todo.scrubs) else DONE
    result["exit_code"] = code
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        print_text(result)
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


def foreign(options: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """What others have left, what was removed of it, and whether something that should have gone is still there."""
    from .. import foreign as others

    terms: dict[str, Any] = {}
    if options.pattern:
        terms["patterns"] = tuple(options.pattern)
    if options.min_age is not None:
        terms["min_age_s"] = options.min_age
    if options.sole_pid_namespace:
        terms["sole_pid_namespace"] = True
    try:
        census = others.scan(**terms)
    except OSError as error:
        raise NotBegunError(f"look for what others have left: {error}") from None
    left = False
    found = []
    for one in census.leftovers:
        state = "kept"
        if one.removable:
            state = "removable"
            if options.remove and not options.dry_run:
                state = "removed" if others.remove(one) else "left"
            left = left or state == "left"
        users = [{"pid": user.pid, "command": user.command, "how": user.how} for user in one.users]
        found.append(
            {
                "name": one.name,
                "nbytes": one.nbytes,
                "age_s": round(one.age_s, 3),
                "uid": one.uid,
                "users": users,
                "removable": one.removable,
                "reason": one.reason,
                "state": state,
            }
        )
    return {"complete": census.complete, "why": census.why, "leftovers": found}, left


# ---- text


def print_text(result: dict[str, Any]) -> None:
    """The document as lines for people."""
    rows = [(one["state"], one["name"], one["nbytes"], one["why"]) for one in result["segments"]]
    rows += [
        ("scrubbed", f"shmcast.{one['namespace']}.{one['arena']}.0", None, f"{one['processes']} dead processes in it")
        for one in result["scrubbed"]
    ]
    _print_rows(rows)
    removed, shm = result["removed"], result["shm"]
    to_go = sum(one["verdict"] == "remove" for one in result["segments"])
    done = (
        f"{to_go} to remove"
        if result["dry_run"]
        else f"{removed['segments']} removed ({format_bytes(removed['nbytes'])})"
    )
    print(
        f"{len(result['segments'])} segments, {done}, {len(result['failed'])} failed; "
        f"{names.DIRECTORY}: {format_bytes(shm['free_bytes'])} free of {format_bytes(shm['total_bytes'])}"
    )
    others = result.get("foreign")
    if others is not None:
        print()
        _print_rows([(one["state"], one["name"], one["nbytes"], _why_foreign(one)) for one in others["leftovers"]])
        print(f"{len(others['leftovers'])} segments of others" + ("" if others["complete"] else f"; {others['why']}"))


def _why_foreign(one: dict[str, Any]) -> str:
    users = ", ".join(f"pid {user['pid']} ({user['command']}) {user['how']} it" for user in one["users"])
    return f"{one['reason']}; {one['age_s']:.0f} s old" + (f"; {users}" if users else "")


def _print_rows(rows: list[tuple[str, str, int | None, str]]) -> None:
    if rows:
        width = max(len(name) for _, name, _, _ in rows)
        state_width = max(len(state) for state, _, _, _ in rows)
        for state, name, nbytes, why in rows:
            size = "" if nbytes is None else format_bytes(nbytes)
            print(f"{state:{state_width}}  {name:{width}}  {size:>9}  {why}")


if __name__ == "__main__":
    sys.exit(main())
