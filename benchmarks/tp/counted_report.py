"""What strategies have counted themselves, below the other tables: caches beside their model, requests by mode."""

from __future__ import annotations

from typing import Any

from tp.config import MIB
from tp.repeats import SEQUENCE


def lines(document: dict[str, Any]) -> list[str]:
    """For batches and streams alike; none where nothing was counted."""
    results = [result for result in document["results"] if "wall_s" in result]
    return _cache_lines(document["config"], results) + _mode_lines(document["config"], results)


def described_keys(config: dict[str, Any]) -> dict[str, Any]:
    """Which requests repeat an earlier one, and what a cache may keep, for the JSON."""
    return {
        "ratio": config["repeat_ratio"],
        "seed": config["seed"] if config["stream"] is None else [[config["seed"], n] for n in range(config["rounds"])],
        "sequence": SEQUENCE,
        "budget_bytes": config["cache_bytes"],
        "budget_entries": config["cache_entries"],
    }


def _cache_lines(config: dict[str, Any], results: list[dict[str, Any]]) -> list[str]:
    found = [result for result in results if "cache" in result]
    if not found:
        return []
    entries = "any number of" if config["cache_entries"] is None else f"{config['cache_entries']}"
    seed = config["seed"] if config["stream"] is None else f"[{config['seed']}, round]"
    lines = [
        "",
        f"cache: at most {config['cache_bytes'] / MIB:g} MiB, {entries} results; repeats: ratio {config['repeat_ratio']:g}, seed {seed}:",
        f"  {SEQUENCE}",
    ]
    for result in found:
        cache = result["cache"]
        batch = f", batches of {result['batch_size']}" if "batch_size" in result else ""
        lines.append(
            f"  {result['strategy']}{batch}: {cache['hits']} hits + {cache['joined']} joined, {cache['misses']} misses, "
            f"{cache['evicted']} evicted; an exact LRU: {cache['simulated_hits']} hits, {cache['simulated_misses']} misses, "
            f"{cache['simulated_evicted']} evicted; {_verdict(cache)}"
        )
    return lines


def _verdict(cache: dict[str, Any]) -> str:
    if not cache["same_hits"] and cache["evicted"] and cache["joined"]:
        return "not to be compared: several were under way at once, and what was evicted then no model knows"
    return f"hits and joined the same: {'yes' if cache['same_hits'] else 'NO'}"


def _mode_lines(config: dict[str, Any], results: list[dict[str, Any]]) -> list[str]:
    stream = config["stream"]
    if stream is None or not stream["switch_every_s"]:
        return []
    lines = [
        "",
        f"another mode every {stream['switch_every_s']:g} s, without a pause; requests by the mode they came in:",
    ]
    for result in results:
        counters = result.get("counters", {})
        submitted = [f"{name[10:]} {n}" for name, n in counters.items() if name.startswith("submitted_")]
        served = [f"{name[5:]} {n}" for name, n in counters.items() if name.startswith("mode_")]
        lines += [
            f"  {result['strategy']}: {counters.get('switches', 0)} switches: {', '.join(submitted)}",
            f"    served by {', '.join(served) or 'unknown'}; outcomes alike on all ranks: "
            f"{'yes' if result['outcomes_identical'] else 'NO'}, contents right: {'yes' if result['verified'] else 'NO'}",
        ]
    return lines
