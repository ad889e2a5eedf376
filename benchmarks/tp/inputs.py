"""The requests of a run and what they must become, made once by the parent before any clock starts.

They lie in a temporary directory: raw requests as one pickle, expected arrays as .npy files that each rank maps. The
expected arrays come from the parent process, which takes no part in the run.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tp.contents import aligned_bytes, fingerprint
from tp.workloads import Features, Workload


@dataclass(frozen=True)
class Cost:
    """One materialization of every request, alone on the machine."""

    cpu_s: float
    wall_s: float
    nbytes: int


@dataclass
class Inputs:
    """Raw requests of different contents, and where the expected arrays lie."""

    directory: str
    raws: list[Any]
    sizes: list[int]  # bytes of each request's arrays, each array rounded up to `ALIGN_BYTES`
    metas: list[dict[str, Any]]
    counts: list[int]  # arrays of each request
    prints: list[int]  # fingerprints of each request's arrays
    slots: int  # requests that a rank has room to read into at once
    keys: list[int]  # which of `raws` each request of a batch is; of streams: `arrivals.Request.source` says so

    @property
    def slot_bytes(self) -> int:
        """What the largest request needs in a rank's private buffer."""
        return max(self.sizes)

    def expected(self, index: int) -> Features:
        """The independently materialized arrays of a raw request, mapped from disk."""
        paths = (_path(self.directory, index, k) for k in range(self.counts[index]))
        return Features(self.metas[index], [np.load(path, mmap_mode="r") for path in paths])

    @staticmethod
    def load(directory: str) -> Inputs:
        """What `prepare` left in `directory`."""
        return Inputs(**pickle.loads((Path(directory) / "inputs.pickle").read_bytes()))


def prepare(
    workload: Workload, raws: list[Any], keys: list[int], slots: int, directory: str, progress: Callable[[], Any]
) -> tuple[Inputs, list[Cost]]:
    """Make the expected arrays of these raw requests; `progress` is called after each. Costs are one for each."""
    inputs = Inputs(directory, raws, [], [], [], [], slots, keys)
    workload.materialize(inputs.raws[0])  # imports, first page faults
    costs: list[Cost] = []
    for i, raw in enumerate(inputs.raws):
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        alike = workload.costs_alike and i > 0
        features = workload.expected(raw) if alike else workload.materialize(raw)
        cost = Cost(time.process_time() - cpu_s, time.perf_counter() - wall_s, features.nbytes)
        costs.append(Cost(costs[0].cpu_s, costs[0].wall_s, features.nbytes) if alike else cost)
        for k, array in enumerate(features.arrays):
            np.save(_path(directory, i, k), array)
        inputs.sizes.append(sum(aligned_bytes(a.nbytes) for a in features.arrays))
        inputs.counts.append(len(features.arrays))
        inputs.prints.append(fingerprint(features.meta, features.arrays))
        inputs.metas.append(features.meta)
        progress()
    (Path(directory) / "inputs.pickle").write_bytes(pickle.dumps(asdict(inputs), protocol=5))
    return inputs, costs


def _path(directory: str, index: int, array: int) -> Path:
    return Path(directory) / f"{index}.{array}.npy"
