"""What one invocation measures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from parts.figures import MIB

COLUMNS = 1024
"""Of a feature; rows by its size."""
ITEM_BYTES = 4


class Size(NamedTuple):
    """What a request carries."""

    name: str
    """As it is given on the command line: MiB, or count x MiB."""
    items: tuple[int, ...]
    """Bytes of each feature, float32."""

    @property
    def title(self) -> str:
        """As it is printed."""
        return f"{self.name.replace('x', ' x ')} MiB"


def size_of(name: str) -> Size:
    """``"64"``: one feature of 64 MiB; ``"16x4"``: sixteen of 4 MiB. ValueError for anything else."""
    count, _, mib = name.rpartition("x")
    nbytes = int(float(mib) * MIB)
    row_bytes = COLUMNS * ITEM_BYTES
    if nbytes < row_bytes or nbytes % row_bytes or int(count or 1) < 1:
        raise ValueError(f"size {name!r}: a feature has rows of {row_bytes} bytes")
    return Size(name, (nbytes,) * int(count or 1))


SIZES = ("1", "10", "64", "16x4")
TPS = (2, 4)


class Variant(NamedTuple):
    """One way for a request to travel."""

    name: str
    installed: bool
    """Whether shmcast is under SGLang."""
    summary: str
    hash: str = "sha256"
    """What `install` is told, where it is installed."""
    skip_hash: bool = False
    """``SGLANG_MM_SKIP_COMPUTE_HASH=1``: items get a random name on each rank."""
    built_once: bool = False
    """``--enable-broadcast-mm-inputs-process``: rank 0 builds and names the inputs, and broadcasts them."""


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("sglang", False, "as it is: SHA-256 on each rank"),
        Variant("sglang-nohash", False, "SGLANG_MM_SKIP_COMPUTE_HASH=1", skip_hash=True),
        Variant("sglang-once", False, "--enable-broadcast-mm-inputs-process: SHA-256 on rank 0", built_once=True),
        Variant("shmcast", True, "installed, nothing set: SHA-256 in the tokenizer"),
        Variant("shmcast-xxh3", True, "SHMCAST_SGLANG_HASH=xxh3", hash="xxh3"),
        Variant("shmcast-nohash", True, "installed, SGLANG_MM_SKIP_COMPUTE_HASH=1", skip_hash=True),
        Variant("shmcast-once", True, "installed, --enable-broadcast-mm-inputs-process", built_once=True),
    )
}


@dataclass(frozen=True)
class Plan:
    """One invocation."""

    tps: tuple[int, ...]
    sizes: tuple[Size, ...]
    variants: tuple[Variant, ...]
    rounds: int
    seed: int
    timeout_s: float = 120.0
    """That any process may take for anything."""
