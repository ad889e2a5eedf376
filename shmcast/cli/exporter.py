"""shmcast-gc --metrics-port: what is in /dev/shm, and what was removed, as Prometheus asks for it."""

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .. import gc, names

if TYPE_CHECKING:
    from .watch import Totals


class _Census(Collector):
    """Looks when it is asked, so that an idle daemon does nothing."""

    def __init__(self, namespace: str | None, totals: "Totals") -> None:
        self._namespace = namespace
        self._totals = totals
        self._last: list[Metric] = []

    def collect(self) -> Iterator[Metric]:
        totals = self._totals
        try:
            self._last = self._now()
        except OSError:
            totals.errors += 1
        # What was seen last: zeros would be an answer, and a wrong one.
        yield from self._last
        counters = (
            ("removed_arenas", "Dead arenas of which something was removed.", totals.arenas),
            ("removed_segments", "Segments removed.", totals.segments),
            ("removed_bytes", "Sum of the lengths of the segments removed.", totals.nbytes),
            ("scrubbed_processes", "Dead processes in live arenas whose claims were ended.", totals.processes),
            ("sweeps", "Looks at one arena, some or all.", totals.sweeps),
            ("errors", "Failures to look, or to remove what should be gone.", totals.errors),
        )
        for name, text, value in counters:
            yield CounterMetricFamily(f"shmcast_gc_{name}", text, value=value)

    def _now(self) -> list[Metric]:
        """OSError where one can not look."""
        seen = gc.scan(self._namespace, closely=True)
        room = os.statvfs(names.DIRECTORY)
        alive = [one for one in seen.controls.values() if one.held]
        gauges = (
            ("shmcast_arenas", "Arenas whose owner is alive.", len(alive)),
            ("shmcast_processes", "Places in arenas that live processes have.", sum(one.peers for one in alive)),
            ("shmcast_segments", "Segments there are, the dead's included.", len(seen.segments)),
            ("shmcast_segment_bytes", "Sum of their lengths.", sum(one.nbytes for one in seen.segments)),
            ("shmcast_used_bytes", "Bytes of live arenas that blocks occupy.", sum(one.used_bytes for one in alive)),
            (
                "shmcast_reserved_bytes",
                "Bytes of data segments of live arenas.",
                sum(one.reserved_bytes for one in alive),
            ),
            ("shmcast_shm_size_bytes", f"Size of {names.DIRECTORY}.", room.f_blocks * room.f_frsize),
            ("shmcast_shm_free_bytes", f"Free bytes of {names.DIRECTORY}.", room.f_bavail * room.f_frsize),
        )
        return [GaugeMetricFamily(name, text, value=value) for name, text, value in gauges]


def serve(address: str, port: int, namespace: str | None, totals: "Totals") -> tuple[int, Callable[[], None]]:
    """Serve in a thread; the port, and how to end it. OSError where one can not listen there."""
    registry = CollectorRegistry()
    registry.register(_Census(namespace, totals))
    server, thread = start_http_server(port, address, registry)

    def close() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return server.server_port, close
