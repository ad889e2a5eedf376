"""Tables for the terminal, the project's bars beside what was measured, and a plot."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from relay.plan import VARIANTS, size_of
from tp.report import ms

Result = dict[str, Any]
Document = dict[str, Any]


class Bar(NamedTuple):
    """How much less than SGLang's own path it is to take, at TP=4."""

    size: str
    other: str
    times: float
    what: str = "time"


BAR_TP = 4
BARS = (
    Bar("1", "sglang-nohash", 2.5),
    Bar("1", "sglang", 2.5),
    Bar("16x4", "sglang-nohash", 5),
    Bar("16x4", "sglang", 5),
    Bar("64", "sglang-nohash", 6),
    Bar("64", "sglang", 15),
    Bar("64", "sglang-nohash", 5, "CPU"),
    Bar("64", "sglang", 5, "CPU"),
)


def heading(document: Document) -> list[str]:
    """What is run, and where."""
    machine, config = document["machine"], document["config"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    lines = [
        f"SGLang's tokenizer to its ranks, float32, rounds: {config['rounds']}, seed {config['seed']}",
        f"{machine['cpu']}, {machine['cores']} cores, Linux {machine['kernel']}, load {machine['load'][0]:.2f}",
        f"Python {machine['python']}, {versions}",
    ]
    cores = machine["cores"]
    if max(config["tps"]) + 1 > cores:
        lines.append(
            f"warning: a tokenizer and up to {max(config['tps'])} ranks on {cores} cores: waiting for a core is in all"
        )
    if machine["load"][0] > 0.3 * cores:
        lines.append(f"warning: the machine is busy: load {machine['load'][0]:.2f} at start")
    return lines


def tables(document: Document) -> list[str]:
    """All that is printed at the end."""
    lines: list[str] = []
    for tp in document["config"]["tps"]:
        for size in document["config"]["sizes"]:
            rows = [r for r in document["results"] if (r["tp"], r["size"]) == (tp, size)]
            if rows:
                lines += ["", f"TP={tp}, {size_of(size).title}, {rows[0]['samples']} samples of each", *_table(rows)]
    lines += ["", *_notes(document)]
    bars = list(_bars(document["results"]))
    return lines + (["", f"bars, TP={BAR_TP}: how many times less than SGLang's own path", *bars] if bars else [])


_COLUMNS: Sequence[tuple[str, Callable[[Result], str]]] = (
    ("wrap ms", lambda r: ms(r["wrap_ms"]["p50"])),
    ("window ms", lambda r: ms(r["window_ms"]["p50"])),
    ("p99", lambda r: ms(r["window_ms"]["p99"])),
    ("both ms", lambda r: ms(r["total_ms"]["p50"])),
    ("p99", lambda r: ms(r["total_ms"]["p99"])),
    ("first", lambda r: ms(r["first_ms"]["total"])),
    ("received", lambda r: ms(r["split_ms"]["received"])),
    ("named", lambda r: ms(r["split_ms"]["built"])),
    ("read", lambda r: ms(r["split_ms"]["read"])),
    ("freed", lambda r: ms(r["split_ms"]["freed"])),
    ("polls", lambda r: f"{r['polls']:.0f}"),
    ("CPU: wrap", lambda r: ms(r["cpu_ms"]["wrap"])),
    ("window", lambda r: ms(r["cpu_ms"]["window"])),
    ("reading", lambda r: ms(r["cpu_ms"]["read"])),
    ("both", lambda r: ms(r["cpu_ms"]["total"])),
)


def _table(results: Sequence[Result]) -> list[str]:
    rows = [["", *(name for name, _ in _COLUMNS)]]
    rows += [[result["variant"], *(cell(result) for _, cell in _COLUMNS)] for result in results]
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def _notes(document: Document) -> list[str]:
    notes = [f"{name:<15}{VARIANTS[name].summary}" for name in document["config"]["variants"]]
    overhead = ", ".join(f"{name} {value:.2f}" for name, value in document["overhead_cpu_ms"].items())
    notes += [
        "wrap: in the tokenizer, its hashing included; window: from there until the last rank has freed; both: added up; medians.",
        "received: until the last rank has it; named, read, freed: of the slowest rank; p99: the largest, below 100 samples.",
        "first: both, of the very first request of that kind; polls: of rank 0, empty broadcasts before the request came.",
        "CPU: tokenizer and all ranks, ms a request; window: a rank's from the poll on that was under way when it was sent;",
        f"reading: of it, of all ranks, the one look at every byte. In each window an answer to the benchmark ({overhead}).",
    ]
    notes += [f"WRONG: {problem}" for problem in document["problems"]]
    if document["left_in_shm"]:
        notes.append(f"LEFT in /dev/shm, removed now: {', '.join(document['left_in_shm'])}")
    return notes


def _bars(results: Sequence[Result]) -> Iterator[str]:
    found = {(r["size"], r["variant"]): r for r in results if r["tp"] == BAR_TP}
    for bar in BARS:
        other = found.get((bar.size, bar.other))
        if other is None:
            continue
        for name in (name for name, variant in VARIANTS.items() if variant.installed and not variant.built_once):
            ours = found.get((bar.size, name))
            if ours is None:
                continue
            if bar.what == "CPU":
                window, both = (other["cpu_ms"][part] / ours["cpu_ms"][part] for part in ("window", "total"))
            else:
                window, both = (other[part]["p50"] / ours[part]["p50"] for part in ("window_ms", "total_ms"))
            verdict = "met    " if window >= bar.times else "NOT MET"
            yield (
                f"  {verdict}  {size_of(bar.size).title:>10}  {bar.what:<4}  {name:<14} against {bar.other:<13}  "
                f"{window:5.1f} x in the window ({bar.times:g} wanted), {both:5.1f} x with wrapping"
            )


def plot(document: Document, path: str) -> None:
    """Wrapping and window of every variant, a panel for each TP and size; the suffix decides the format."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    config, results = document["config"], document["results"]
    names, tps, sizes = config["variants"], config["tps"], config["sizes"]
    figure, axes = pyplot.subplots(
        len(tps), len(sizes), figsize=(3 + 3.2 * len(sizes), 1.4 + (0.6 + 0.3 * len(names)) * len(tps)), squeeze=False,
        sharey=True,
    )  # fmt: skip
    for row, tp in zip(axes, tps, strict=True):
        for axis, size in zip(row, sizes, strict=True):
            rows = [r for r in results if (r["tp"], r["size"]) == (tp, size)]
            places = [names.index(r["variant"]) for r in rows]
            wraps, windows = [r["wrap_ms"]["p50"] for r in rows], [r["window_ms"]["p50"] for r in rows]
            worst = [max(0.0, r["total_ms"]["p99"] - r["wrap_ms"]["p50"] - r["window_ms"]["p50"]) for r in rows]
            axis.barh(places, wraps, 0.7, color="lightgray", label="wrapping, in the tokenizer")
            axis.barh(
                places, windows, 0.7, left=wraps, xerr=[[0.0] * len(rows), worst], ecolor="gray",
                color=["tab:green" if VARIANTS[r["variant"]].installed else "tab:orange" for r in rows],
            )  # fmt: skip
            axis.plot([r["cpu_ms"]["total"] for r in rows], places, "kd", markersize=4, label="CPU of all processes")
            axis.set_title(f"TP={tp}, {size_of(size).title}", fontsize=10)
            axis.grid(axis="x", alpha=0.3)
            axis.tick_params(labelsize=8)
        row[0].set_yticks(range(len(names)), names)
    axes[0][0].invert_yaxis()
    for axis in axes[-1]:
        axis.set_xlabel("ms a request", fontsize=8)
    figure.legend(*axes[0][0].get_legend_handles_labels(), fontsize=8, ncols=2, loc="lower center")
    cores, rounds = document["machine"]["cores"], config["rounds"]
    figure.suptitle(
        f"SGLang's tokenizer to its ranks, on {cores} cores, rounds: {rounds}; medians, to the 99th percentile"
    )
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path)
    pyplot.close(figure)
