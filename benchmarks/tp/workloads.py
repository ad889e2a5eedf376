"""Workloads: how a raw request is made (before the run) and how it becomes arrays (in the run).

Every request of a workload differs from every other one, and both steps are deterministic: the same seed gives
the same raw requests, the same raw request the same bytes in whatever process it is materialized. Contents can
therefore be verified against a copy that another process materialized, without any hash.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from tp import photos
from tp.config import MIB, Config

Array = NDArray[Any]
NewArray = Callable[[tuple[int, ...], DTypeLike], Array]  # where an array shall lie: np.empty, or a reservation


@dataclass
class Features:
    """What a request became. `meta` is small and picklable; `arrays` are what costs."""

    meta: dict[str, Any]
    arrays: list[Array] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays together."""
        return sum(a.nbytes for a in self.arrays)


class Workload(ABC):
    """One kind of request."""

    name: ClassVar[str]
    summary: ClassVar[str]
    requests: ClassVar[int] = 10  # a run, unless the user says otherwise

    costs_alike: ClassVar[bool] = False  # every request costs the same
    sizes: ClassVar[tuple[str, ...]] = ("large",)  # that requests come in

    def __init__(self, config: Config) -> None:
        self.config = config

    @abstractmethod
    def make(self, count: int) -> list[Any]:
        """`count` raw requests by the configured seed, the largest that there are; picklable."""

    def make_sized(self, sizes: Sequence[str]) -> list[Any]:
        """One raw request of each of these `sizes`."""
        return self.make(len(sizes))

    @abstractmethod
    def materialize(self, raw: Any, new: NewArray = np.empty) -> Features:
        """The arrays of `raw`; those that are large are asked of `new` and written where it puts them."""

    def expected(self, raw: Any) -> Features:
        """What `materialize` must give; for verification, so it need not cost what `materialize` costs."""
        return self.materialize(raw)


class Images(Workload):
    """Photographs: base64 → JPEG → resize → normalize → patches, one array an image."""

    name = "images"
    summary = "one or two photographs of 4 to 8 megapixels as base64 JPEG; 14 to 46 MiB of float32 patches"
    sizes = tuple(photos.SIZES)

    def make(self, count: int) -> list[Any]:
        return self.make_sized(["large"] * count)

    def make_sized(self, sizes: Sequence[str]) -> list[Any]:
        sources = photos.load(self.config.images)
        return [photos.image_request(sources, [self.config.seed, i], size) for i, size in enumerate(sizes)]

    def materialize(self, raw: Any, new: NewArray = np.empty) -> Features:
        arrays, grids = [], []
        for image in raw["images"]:
            patches, grid = photos.image_patches(image["base64"], image["max_pixels"], new)
            arrays.append(patches)
            grids.append(grid)
        return Features({"grid_thw": grids}, arrays)


class Video(Workload):
    """Stacks of frames: JPEG → resize → normalize → patches, three arrays a clip."""

    name = "video"
    summary = "two clips of 20 to 56 JPEG frames; 100 to 300 MiB of float32 patches, with time stamps and positions"
    requests = 4

    def make(self, count: int) -> list[Any]:
        sources = photos.load(self.config.images)
        return [photos.video_request(sources, [self.config.seed, i]) for i in range(count)]

    def materialize(self, raw: Any, new: NewArray = np.empty) -> Features:
        arrays: list[Array] = []
        grids = []
        for clip in raw["clips"]:
            patches, grid = photos.clip_patches(clip["frames"], new)
            seconds = np.arange(grid[0], dtype=np.float64) * 2 / clip["fps"]
            positions = np.stack(np.unravel_index(np.arange(len(patches)), grid), axis=-1)
            arrays += [patches, seconds, positions]
            grids.append(grid)
        return Features({"grid_thw": grids}, arrays)


class Many(Workload):
    """Many small arrays: what is dear a message or an array shows here."""

    name = "many"
    summary = "64 arrays of 64 KiB"
    requests = 50
    ARRAYS, SIDE = 64, 128

    def make(self, count: int) -> list[Any]:
        shape = (self.ARRAYS, self.SIDE, self.SIDE)
        rngs = (np.random.default_rng([self.config.seed, i]) for i in range(count))
        return [rng.integers(0, 256, shape, dtype=np.uint8) for rng in rngs]

    def materialize(self, raw: Any, new: NewArray = np.empty) -> Features:
        arrays = []
        for levels in raw:
            out = new(levels.shape, np.float32)
            np.multiply(levels, np.float32(1 / 127.5), out=out)
            np.subtract(out, np.float32(1), out=out)
            arrays.append(out)
        return Features({}, arrays)


class Spin(Workload):
    """The historical shape: a fixed amount of CPU, one array."""

    name = "spin"
    summary = "--work-ms of CPU and one float32 array of --array-mb"
    costs_alike = True

    def make(self, count: int) -> list[Any]:
        return [(self.config.seed << 20) + i for i in range(count)]

    def materialize(self, raw: Any, new: NewArray = np.empty) -> Features:
        end_ns = time.thread_time_ns() + round(self.config.work_ms * 1e6)
        features = self.expected(raw, new)
        while time.thread_time_ns() < end_ns:
            pass
        return features

    def expected(self, raw: Any, new: NewArray = np.empty) -> Features:
        out = new((round(self.config.array_mb * MIB) // 4,), np.float32)
        out.view(np.uint32)[:] = np.arange(raw, raw + out.size, dtype=np.uint32) & 0x3FFFFFFF  # no NaN
        return Features({"seed": raw}, [out])


class Wait(Spin):
    """Sleeps where `spin` works: what the transport costs when cores are no limit."""

    name = "wait"
    summary = "--work-ms of sleep and one float32 array of --array-mb"

    def materialize(self, raw: Any, new: NewArray = np.empty) -> Features:
        end_ns = time.monotonic_ns() + round(self.config.work_ms * 1e6)
        features = self.expected(raw, new)
        time.sleep(max(0, end_ns - time.monotonic_ns()) / 1e9)
        return features


WORKLOADS: dict[str, type[Workload]] = {w.name: w for w in (Images, Video, Many, Spin, Wait)}


def make_workload(config: Config) -> Workload:
    """The workload that `config` names."""
    return WORKLOADS[config.workload](config)
