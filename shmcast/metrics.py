"""What an arena, a group or a caster has counted and timed: `snapshot` of one's own, `read` from any other process.

Every process of an arena adds to the same words of its control segment, so the numbers are those of all ranks together;
they outlive whoever counted them, up to the end of the arena's name. What each metric counts is in ``_native.METRICS``.

What a snapshot has, by name of the metric::

    "counters"    only grow                             {"published": 12, ...}
    "gauges"      as it is now, or was when who sets it died
    "peaks"       the largest value that was ever set
    "histograms"  {"count", "sum_ns", "mean_ns", "p50_ns", "p99_ns", "max_ns", "buckets": [[end_ns, n], ...]}
    "sizes"       the same of counts: {"count", "sum", "mean", "p50", "p99", "max", "buckets": [[end, n], ...]}

A bucket has the values from the end of the one before it on, up to but not including its own end; the last has no end
(None). Buckets double: a percentile is the point inside the bucket that it falls in, by linear interpolation between the
bucket's ends, so it is good to a factor of two at most; where the largest value lies in that bucket, it is the end of it.
Mean, percentiles and largest value of a histogram without values are None.

The words are copied one by one while others write: what is being counted at that moment may be seen in part. Nothing in
shared memory is believed; whatever lies there gives numbers.
"""

import os
from collections.abc import Sequence
from typing import Any, TypeAlias

from . import _native, names

Snapshot: TypeAlias = dict[str, dict[str, Any]]

_SECTIONS = {"counter": "counters", "gauge": "gauges", "peak": "peaks", "histogram": "histograms", "sizes": "sizes"}
_HISTOGRAMS = {"histogram": (_native.HISTOGRAM_ENDS_NS, "_ns"), "sizes": (_native.SIZES_ENDS, "")}


def snapshot(target: Any) -> Snapshot:
    """The metrics of an `Arena`, a `Group`, a caster, or a meter; of a group or caster that shares no memory, those of
    this process. TypeError for what has none."""
    for meter in (target, getattr(target, "meter", None), getattr(target, "_meter", None)):
        if isinstance(meter, _native.Meter):
            return of_words(meter.words())
    raise TypeError(f"metrics of {target!r}: it has no meter")


def read(namespace: str | None = None, arena: int | None = None) -> dict[int, dict[str, Any]]:
    """``{arena id: snapshot}`` of the arenas of a namespace (default: this process's own), or of one of them.

    Joins nothing and takes no lock. Besides what `snapshot` gives: "owner_alive", "ended" (closed, or swept), "created_ns"
    (since 1970), "owner" (pid and command, for people), "peers" (how many processes are in it and alive, the owner
    included). Left out: what is not ready yet, of another format, of another user, or gone meanwhile."""
    namespace = names.default_namespace() if namespace is None else names.check_namespace(namespace)
    found: dict[int, dict[str, Any]] = {}
    for segment in names.listing(namespace):
        if segment.number == names.CONTROL and arena in (None, segment.arena):
            try:
                found[segment.arena] = _look(names.segment_name(namespace, segment.arena, names.CONTROL))
            except OSError:
                continue
    return found


def of_words(words: Sequence[int]) -> Snapshot:
    """The snapshot of a block of words (`_native.Meter.words`, or "metrics" of `_native.inspect`)."""
    result: Snapshot = {section: {} for section in _SECTIONS.values()}
    for name, kind, first, _ in _native.METRICS:
        value: Any = words[first]
        if kind in _HISTOGRAMS:
            ends, unit = _HISTOGRAMS[kind]
            value = _histogram(words[first], words[first + 1], words[first + 2 : first + 3 + len(ends)], ends, unit)
        result[_SECTIONS[kind]][name] = value
    return result


def percentile(share: float, counts: Sequence[int], ends: Sequence[int], largest: int) -> float | None:
    """The value below which that share (0 to 1) of all values lies; None where there are none.

    ``counts``: by bucket; ``ends``: of all buckets but the last; ``largest``: the largest value."""
    total = sum(counts)
    if not total:
        return None
    left = share * total
    low = high = 0.0
    for bucket, count in enumerate(counts):
        if not count:
            continue
        low = ends[bucket - 1] if bucket else 0
        high = ends[bucket] if bucket < len(ends) else 2 * low
        if low <= largest < high or (bucket == len(ends) and largest > low):
            high = largest
        if left <= count:
            return low + (high - low) * left / count
        left -= count
    return high  # the sum was rounded


def _histogram(total: int, largest: int, counts: Sequence[int], ends: Sequence[int], unit: str) -> dict[str, Any]:
    count = sum(counts)
    return {
        "count": count,
        f"sum{unit}": total,
        f"mean{unit}": total / count if count else None,
        f"p50{unit}": percentile(0.50, counts, ends, largest),
        f"p99{unit}": percentile(0.99, counts, ends, largest),
        f"max{unit}": largest if count else None,
        "buckets": [[end, number] for end, number in zip((*ends, None), counts, strict=True)],
    }


def _look(name: str) -> dict[str, Any]:
    fd = names.open_readable(name)
    try:
        seen = _native.inspect(fd)
    finally:
        os.close(fd)
    owner = next((peer for peer in seen["peers"] if peer["index"] == 0), None)
    return {
        "owner_alive": owner is not None and owner["alive"],
        "ended": seen["ended"],
        "created_ns": seen["created_ns"],
        "owner": {} if owner is None else {"pid": owner["pid"], "command": owner["command"]},
        "peers": sum(peer["alive"] for peer in seen["peers"]),
        **of_words(seen["metrics"]),
    }
