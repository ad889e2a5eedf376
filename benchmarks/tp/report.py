"""Tables for the terminal, a plot, and whether the published targets are met."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tp import counted_report
from tp.config import MIB, Config
from tp.workloads import WORKLOADS

Result = dict[str, Any]
Document = dict[str, Any]
Columns = Sequence[tuple[str, Callable[[Result], str]]]


def heading(config: Config, machine: dict[str, Any]) -> list[str]:
    """What is run, and where."""
    size = f"{machine['memory_bytes'] / 2**30:.0f} GiB, /dev/shm {machine['shm_bytes'] / 2**30:.1f} GiB"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    what = f"{config.workload} ({WORKLOADS[config.workload].summary})"
    return [
        f"{what}, {config.producer} materializes, TP={config.tp}, rounds: {config.rounds}, seed {config.seed}",
        f"{machine['cpu']}, {machine['cores']} cores, {size}, Linux {machine['kernel']}, load {machine['load'][0]:.2f}",
        f"Python {machine['python']}, {versions}",
    ]


def tables(document: Document) -> list[str]:
    """All that is printed at the end."""
    lines: list[str] = []
    for scenario in document["config"]["scenarios"]:
        results = [r for r in document["results"] if r["batch_size"] == scenario["batch"]]
        lines += [f"{scenario['requests']} requests in batches of {scenario['batch']}", ""]
        lines += [*table(_summary(results), results), "", *table(_SPLIT, results), ""]
    lines += _bounds(document["bounds"], document["config"]["tp"])
    lines += counted_report.lines(document)
    lines += _notes(document)
    if document["config"]["preset"] == "origin":
        lines += ["", *_origin(document["results"])]
    return lines


def ms(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def mib(value: float) -> str:
    return f"{value / MIB:.0f}"


def worst(percentiles: dict[str, float | None]) -> str:
    p99 = percentiles["p99"]
    return f"{ms(percentiles['max'])} max" if p99 is None else f"{ms(p99)} p99"


def _summary(results: list[Result]) -> Columns:
    replicate = next((r.get("cpu_s") for r in results if r["strategy"] == "replicate"), None)

    def ratio(result: Result) -> str:
        return f"{result['cpu_s'] / replicate:.2f}" if replicate else "-"

    return (
        ("wall s", lambda r: f"{r['wall_s']:.3f}"),
        ("min-max", lambda r: "{:.3f}-{:.3f}".format(*r["wall_range_s"])),
        ("CPU s", lambda r: f"{r['cpu_s']:.3f}"),
        ("min-max", lambda r: "{:.3f}-{:.3f}".format(*r["cpu_range_s"])),
        ("of repl.", ratio),
        ("CPU %", lambda r: f"{r['cpu_percent']:.0f}"),
        ("req/s", lambda r: f"{r['throughput_rps']:.2f}"),
        ("latency ms", lambda r: ms(r["latency_ms"]["p50"])),
        ("worst", lambda r: worst(r["latency_ms"])),
        ("handle only", lambda r: ms(r["handle_ms"]["p50"])),
        ("cold", lambda r: ms(r["cold_ms"])),
        ("late ticks", lambda r: f"{r['late_ticks']:.0f}/{r['ticks']:.0f}"),
        ("shm MiB", lambda r: mib(r["peak_shm_bytes"])),
        ("private", lambda r: mib(r["peak_private_bytes"])),
        ("verified", lambda r: "yes" if r["verified"] else "NO"),
    )


def _split(name: str) -> Callable[[Result], str]:
    return lambda r: ms(r["split_ms"][f"{name}_ms"])


_SPLIT: Columns = (
    ("transport ms", lambda r: ms(r["transport_ms"]["p50"])),
    ("worst", lambda r: worst(r["transport_ms"])),
    ("materialize", _split("materialize")),
    ("publish", _split("publish")),
    ("message", _split("message")),
    ("attach", _split("attach")),
    ("first read", _split("read")),
    ("release", _split("release")),
    ("skew", lambda r: ms(r["skew_ms"]["p50"])),
    ("broadcasts", lambda r: str(r["broadcasts"])),
    ("collectives", lambda r: str(r["collectives"])),
    ("bytes sent", lambda r: f"{r['bytes_broadcast']:,}"),
    ("fall-backs", lambda r: str(r["fallbacks"])),
)


def table(columns: Columns, results: list[Result]) -> list[str]:
    rows = [["strategy", *(name for name, _ in columns)]]
    for result in results:
        rows.append([result["strategy"], *(cell(result) for _, cell in columns)] if "wall_s" in result else
                    [result["strategy"], "failed", *[""] * (len(columns) - 1)])  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def _bounds(limits: dict[str, Any], tp: int) -> list[str]:
    return [
        f"bounds for {limits['requests']} requests, {limits['bytes'] / MIB:.0f} MiB:",
        f"  CPU   {limits['cpu_s']:8.3f} s  one materialization of each",
        f"  wall  {limits['wall_once_s']:8.3f} s  one after another by one thread",
        f"        {limits['wall_replicate_s']:8.3f} s  by each of {tp} ranks, work spread over the cores",
        f"        {limits['wall_cores_s']:8.3f} s  one materialization of each, spread over the cores",
        f"  copy  {limits['copy_floor_s']:8.3f} s  {tp} ranks read every byte, {limits['copy_bytes_per_s'] / 1e9:.1f} GB/s a core",
    ]


def _notes(document: Document) -> list[str]:
    notes = [
        "",
        "wall: arrival to the last rank that has read every byte and freed it, summed over batches; CPU: all processes.",
        "latency: the same for one request; handle only: until the last rank has the arrays, unread; cold: the first one.",
        "transport: from materialized (raw: arrived) until the last rank has it; split: of the slowest rank; medians.",
        "worst: p99 from 200 samples on, else the maximum. shm, private: peak over all processes, beyond the idle state.",
        "ticks: a 10 ms decode step on each rank's own thread while a batch is served; late: by more than 1 ms.",
    ]
    for result in document["results"]:
        for problem in result.get("problems", []):
            notes.append(f"{result['strategy']}: WRONG CONTENTS: {problem}")
        if "error" in result:
            notes.append(f"{result['strategy']}: FAILED: {result['error'].rstrip().splitlines()[-1]}")
    if document["left_in_shm"]:
        notes.append(f"LEFT in /dev/shm, removed now: {', '.join(document['left_in_shm'])}")
    return notes


def _origin(results: list[Result]) -> list[str]:
    """The targets that the origin published, each against what was measured."""
    found = {(r["strategy"], r["batch_size"]): r for r in results if "wall_s" in r}
    lines = ["published targets"]

    def line(text: str, measured: str, met: bool) -> None:
        lines.append(f"  {'met    ' if met else 'NOT MET'}  {text}: {measured}")

    for name in ("object-batch", "shm"):
        if (one := found.get((name, 1))) is None:
            continue
        if replicate := found.get(("replicate", 1)):
            saved = 1 - one["cpu_s"] / replicate["cpu_s"]
            line(f"{name}: CPU at least 70 % under replicate", f"{saved:.0%}", saved >= 0.7)
        p99, maximum = one["latency_ms"]["p99"], one["latency_ms"]["max"]
        worst, which = (maximum, "maximum") if p99 is None else (p99, "p99")
        line(f"{name}: p99 under 600 ms", f"{worst:.0f} ms ({which})", worst < 600)
        for batch in sorted({size for _, size in found} - {1}):
            many, single = found.get((name, batch)), found.get(("object", batch))
            if many is None or single is None:
                continue
            gain = many["throughput_rps"] / single["throughput_rps"] - 1
            line(f"{name}: throughput 5 to 10 % over object in batches of {batch}", f"{gain:+.1%}", gain >= 0.05)
            batches = len(many["batch_sizes"])
            measured = f"{many['broadcasts']} for {batches} batches, {many['requests']} requests"
            line(f"{name}: broadcasts per batch, not per request", measured, many["broadcasts"] <= batches)
    return lines


def plot(document: Document, path: str) -> None:
    """Wall, CPU and transport of every strategy, one group of bars a batch size; the suffix decides the format."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # text as text: two thirds of the size
    from matplotlib import pyplot

    results = [r for r in document["results"] if "wall_s" in r]
    names = list(dict.fromkeys(r["strategy"] for r in results))
    batches = sorted({r["batch_size"] for r in results})
    limits = document["bounds"]
    config = document["config"]
    panels: list[tuple[str, Callable[[Result], tuple[float, float, float]], float | None]] = [
        ("wall, s a request", lambda r: _per_request(r, r["wall_s"], r["wall_range_s"]), limits["wall_once_s"]),
        ("CPU of all processes, s a request", lambda r: _per_request(r, r["cpu_s"], r["cpu_range_s"]), limits["cpu_s"]),
        ("transport, ms a request (log)", lambda r: (max(1e-3, r["transport_ms"]["p50"]), 0.0, 0.0), None),
    ]
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 0.9 + 0.5 * len(names) * max(1.0, len(batches) / 2)), sharey=True)
    height = 0.8 / len(batches)
    for axis, (title, value, bound) in zip(axes, panels, strict=True):
        for k, batch in enumerate(batches):
            rows = [r for r in results if r["batch_size"] == batch]
            places = [names.index(r["strategy"]) + (k + 0.5) * height - 0.4 for r in rows]
            values = [value(r) for r in rows]
            errors = [[v[1] for v in values], [v[2] for v in values]]
            axis.barh(places, [v[0] for v in values], height * 0.9, xerr=errors, label=f"batch {batch}")
        if bound is not None:
            axis.axvline(bound / limits["requests"], color="black", linestyle=":", label="bound: one materialization")
        axis.set_title(title, fontsize=10)
        axis.grid(axis="x", alpha=0.3)
        axis.margins(y=0.02)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, ncols=len(batches) + 1, loc="lower center")
    axes[2].set_xscale("log")
    where = f"TP={config['tp']} on {document['machine']['cores']} cores"
    figure.suptitle(f"{config['workload']}, {where}, rounds: {config['rounds']}; median, min to max")
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path)
    pyplot.close(figure)


def _per_request(result: Result, value: float, limits: Iterable[float]) -> tuple[float, float, float]:
    """Value, and distances to the lowest and highest, divided by the number of requests."""
    low, high = limits
    count = result["requests"]
    return value / count, (value - low) / count, (high - value) / count
