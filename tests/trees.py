"""Trees of arrays for tests: of every dtype and layout, and how to tell that two are the same."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

NUMPY_DTYPES = [
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64",
    "longdouble", "complex64", "complex128", ">f4", "M8[ns]", "m8[s]", "S7", "U3", "V5",
]  # fmt: skip
TORCH_DTYPES = [
    "bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64", "complex64",
    "complex128", "float8_e4m3fn", "float8_e5m2",
]  # fmt: skip


@dataclasses.dataclass
class Item:
    """Stands for an engine's multimodal item."""

    name: str
    feature: Any
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


def noise(nbytes: int, seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


def a_tree(seed: int, plain_pickle: bool = False) -> dict[str, Any]:
    """Every dtype, layouts that are not contiguous, nested objects, small and empty and 0-d arrays.

    ``plain_pickle``: without the dtypes that torch's own pickling gets wrong."""
    import torch

    tree: dict[str, Any] = {}
    for number, name in enumerate(NUMPY_DTYPES):
        dtype = np.dtype(name)
        raw = noise(3000 * dtype.itemsize, seed + number)
        if name == "bool":
            raw &= 1
        if dtype.kind == "U":
            array = np.array(["a", "bc", "déf"] * 1000, dtype)
        else:
            array = raw.view(dtype)
        tree[f"numpy {name}"] = array.reshape(30, 100)
    for number, name in enumerate(TORCH_DTYPES):
        if plain_pickle and "float8" in name:
            continue
        dtype = getattr(torch, name)
        raw = noise(30_000 * dtype.itemsize, seed + 100 + number)
        if name == "bool":
            raw &= 1
        tree[f"torch {name}"] = torch.from_numpy(raw).view(dtype).reshape(10, 3000)
    base = noise(400_000, seed).reshape(200, 2000)
    tree["layouts"] = [base.T, base[::-2, ::3], np.asfortranarray(base), np.array(7.5), np.empty((0, 3), "f4")]
    item = Item("one", base.view("f4").copy(), {"shared": (base, base)})
    tree["nested"] = Item("two", [item, None, "text"], {"same": item})
    return tree


def same(left: Any, right: Any) -> bool:
    """Equal trees: values bit by bit, dtypes, shapes."""
    import torch

    if type(left) is not type(right):
        return False
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()
    if isinstance(left, torch.Tensor):
        bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right)]
        return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*bits)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, Item):
        return same(vars(left), vars(right))
    return bool(left == right)
