"""Where casters count what they do: the one place that knows how metrics are written. What each counts: ``_native.METRICS``."""

from . import _native

_INDEX = {name: _native.metric(name) for name, *_ in _native.METRICS}


class Tally:
    """Counts by the metrics' names."""

    def __init__(self, meter: _native.Meter) -> None:
        self._meter = meter

    def add(self, name: str, more: int = 1) -> None:
        """A counter."""
        self._meter.add(_INDEX[name], more)

    def level(self, name: str, value: int) -> None:
        """A gauge, and the peak that goes with it."""
        self._meter.set(_INDEX[name], value)
        self._meter.peak(_INDEX[f"peak_{name}"], value)

    def gauge(self, name: str, value: int) -> None:
        """A gauge that has no peak."""
        self._meter.set(_INDEX[name], value)

    def observe(self, name: str, value: int) -> None:
        """A histogram, of ns or of counts."""
        self._meter.observe(_INDEX[name], value)
