"""Table and plot of streams; see `report` for batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tp import counted_report
from tp.config import MIB, Config, Stream
from tp.report import Columns, Document, Result, mib, ms, table, worst


def describe(config: Config, stream: Stream) -> str:
    """What arrives, and how it is served."""
    how = f"{stream.rate:g} a second (Poisson)" if stream.rate else "all at once"
    if stream.concurrency:
        how = f"{stream.concurrency} under way at any time"
    mix = ", ".join(f"{weight:g} {size}" for size, weight in stream.mix)
    lines = f"a stream of {config.requests} requests, drawn from {stream.distinct} (mix: {mix}), {how}"
    if stream.cancel_ratio or stream.fail_ratio:
        lines += f"; {stream.cancel_ratio:.0%} are cancelled, {stream.fail_ratio:.0%} fail"
    return f"{lines}; {config.workers} workers, a decode tick every {config.tick_ms:g} ms"


def tables(document: Document) -> list[str]:
    """All that is printed at the end."""
    results, config = document["results"], document["config"]
    lines = [*table(_summary(results), results), "", *table(_MORE, results), ""]
    lines += _bounds(document["bounds"], config["tp"], config["requests"])
    return lines + counted_report.lines(document) + _notes(document)


def _summary(results: list[Result]) -> Columns:
    replicate = next((r.get("cpu_s") for r in results if r["strategy"] == "replicate"), None)
    return (
        ("req/s", lambda r: f"{r['throughput_rps']:.2f}"),
        ("min-max", lambda r: "{:.2f}-{:.2f}".format(*r["throughput_range_rps"])),
        ("latency p50 ms", lambda r: ms(r["latency_ms"]["p50"])),
        ("worst", lambda r: worst(r["latency_ms"])),
        ("late ticks", lambda r: f"{r['late_ticks']:.0f}/{r['ticks']:.0f}"),
        ("CPU s", lambda r: f"{r['cpu_s']:.3f}"),
        ("min-max", lambda r: "{:.3f}-{:.3f}".format(*r["cpu_range_s"])),
        ("of repl.", lambda r: f"{r['cpu_s'] / replicate:.3f}" if replicate else "-"),
        ("wall s", lambda r: f"{r['wall_s']:.2f}"),
        ("alike", lambda r: "yes" if r["outcomes_identical"] else "NO"),
        ("verified", lambda r: "yes" if r["verified"] else "NO"),
    )


_MORE: Columns = (
    ("ok", lambda r: str(r["outcomes"]["ok"])),
    ("failed", lambda r: str(r["outcomes"]["failed"])),
    ("cancelled", lambda r: str(r["outcomes"]["cancelled"])),
    ("lateness p50 ms", lambda r: ms(r["lateness_ms"]["p50"])),
    ("worst", lambda r: worst(r["lateness_ms"])),
    ("iterations", lambda r: str(r["iterations"])),
    ("broadcasts", lambda r: str(r["broadcasts"])),
    ("collectives", lambda r: str(r["collectives"])),
    ("bytes sent", lambda r: f"{r['bytes_broadcast']:,}"),
    ("fall-backs", lambda r: str(r["fallbacks"])),
    ("shm MiB", lambda r: mib(r["peak_shm_bytes"])),
    ("private", lambda r: mib(r["peak_private_bytes"])),
)


def _bounds(limits: dict[str, Any], tp: int, requests: int) -> list[str]:
    return [
        f"bounds for the {limits['requests']} requests that can be served, {limits['bytes'] / MIB:.0f} MiB:",
        f"  CPU   {limits['cpu_s']:8.3f} s  one materialization of each",
        f"  rate  {requests / limits['wall_cores_s']:8.2f} /s  one materialization of each, spread over the cores",
        f"        {requests / limits['wall_replicate_s']:8.2f} /s  by each of {tp} ranks, spread over the cores",
        f"  copy  {limits['copy_floor_s']:8.3f} s  {tp} ranks read every byte, {limits['copy_bytes_per_s'] / 1e9:.1f} GB/s a core",
    ]


def _notes(document: Document) -> list[str]:
    config = document["config"]
    notes = [
        "",
        "latency: arrival to the last rank that has read every byte and freed it; worst: p99 from 200 samples on, else the",
        "maximum. req/s: those that ended well, a second of the whole run. CPU: all processes, with loops, ticks, messages.",
        f"late ticks: decode steps that began more than {config['late_ms']:g} ms after they were due, over all ranks.",
        "alike: the same requests ended in the same way, order and iteration on every rank. verified: that, and every",
        "request's contents by samples, the last ones whole. Synchronous strategies serve at most "
        f"{config['batch']} requests an iteration.",
    ]
    for result in document["results"]:
        notes += [f"{result['strategy']}: WRONG: {problem}" for problem in result.get("problems", [])]
        if "error" in result:
            notes.append(f"{result['strategy']}: FAILED: {result['error'].rstrip().splitlines()[-1]}")
    if document["left_in_shm"]:
        notes.append(f"LEFT in /dev/shm, removed now: {', '.join(document['left_in_shm'])}")
    return notes


def plot(document: Document, path: str) -> None:
    """Throughput, latency, late ticks and CPU of every strategy; the suffix decides the format."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = [r for r in document["results"] if "wall_s" in r]
    config, limits = document["config"], document["bounds"]
    places = range(len(results))
    figure, axes = pyplot.subplots(1, 4, figsize=(15, 1.2 + 0.35 * len(results)), sharey=True)
    panels: list[tuple[str, Callable[[Result], float], float | None]] = [
        ("requests a second", lambda r: r["throughput_rps"], config["requests"] / limits["wall_cores_s"]),
        ("latency, s: median, p99", lambda r: _tail_ms(r) / 1e3, None),
        ("late decode ticks, %", lambda r: 100 * r["late_ticks"] / max(1, r["ticks"]), None),
        ("CPU of all processes, s", lambda r: r["cpu_s"], limits["cpu_s"]),
    ]
    for axis, (title, value, bound) in zip(axes, panels, strict=True):
        axis.barh(places, [value(r) for r in results], 0.7, alpha=0.5 if title.startswith("latency") else 1.0)
        if bound is not None:
            axis.axvline(bound, color="black", linestyle=":", label="bound: one materialization")
        axis.set_title(title, fontsize=10)
        axis.grid(axis="x", alpha=0.3)
    axes[1].barh(places, [r["latency_ms"]["p50"] / 1e3 for r in results], 0.7, color="C0")
    axes[0].set_yticks(places, [r["strategy"] for r in results])
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="lower center")
    where = f"TP={config['tp']} on {document['machine']['cores']} cores"
    figure.suptitle(f"{config['workload']}, a stream of {config['requests']} requests, {where}; medians over rounds")
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path)
    pyplot.close(figure)


def _tail_ms(result: Result) -> float:
    latency = result["latency_ms"]
    return float(latency["max"] if latency["p99"] is None else latency["p99"])
