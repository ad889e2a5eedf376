"""What names a content: hashes of bytes, and digests of arrays, which cover dtype and shape too.

A digest depends on the values alone, and on what a deployment has configured: not on the process that computes it, nor on
how the array has travelled.
"""

import functools
import hashlib
import os
from typing import Any, Literal, TypeAlias

from . import _native

HashName: TypeAlias = Literal["xxh3", "sha256"]
"""``xxh3``: XXH3-128 with seed 0, which rides in the copy; finds damage and equal content, by no means an identity against an
adversary. ``sha256``: the first 16 bytes of SHA-256 (FIPS 180-4), one more pass; nobody makes two contents that have one."""
Hash: TypeAlias = bool | HashName
"""What callers say: True is "xxh3", False is none."""

SEED_VARIABLE = "SHMCAST_DIGEST_SEED"
"""Environment variable: 64-bit seed of digests by XXH3, the same in all processes that compare them; 0 where it is not set."""

_NAMES: tuple[HashName, ...] = ("xxh3", "sha256")
_MAX_64 = (1 << 64) - 1
_MAX_128 = (1 << 128) - 1


def hash_name(wanted: Hash) -> HashName | None:
    """The hash that is meant, None for none. ValueError where there is no such one."""
    if wanted is True:
        return "xxh3"
    if wanted is False:
        return None
    if wanted not in _NAMES:
        raise ValueError(f"hash is True, False, {' or '.join(map(repr, _NAMES))}, not {wanted!r}")
    return wanted


def hash_bytes(buffer: Any, name: HashName) -> int:
    """128 bits of a C-contiguous buffer."""
    return _native.hash128(buffer) if name == "xxh3" else int.from_bytes(_sha256(buffer), "big")


def array_digest(dtype: str, shape: tuple[int, ...], content: int, name: HashName = "xxh3") -> int:
    """128 bits that name an array: its dtype, its shape and the hash of its bytes in C order, by the same function.

    That function of ``array``, NUL, the dtype as in a handle, NUL, the lengths of the dimensions in decimal and separated by
    commas, NUL, and the 16 bytes of the content's hash, most significant first. XXH3 takes the seed of `SEED_VARIABLE`."""
    text = f"array\0{dtype}\0{','.join(map(str, shape))}\0"
    return _digest(text.encode() + content.to_bytes(16, "big"), name)


def list_digest(digests: list[int], name: HashName = "xxh3") -> int:
    """128 bits that name a sequence of things that have digests: as above, of ``list``, NUL and theirs, 16 bytes each."""
    return _digest(b"list\0" + b"".join(digest.to_bytes(16, "big") for digest in digests), name)


def check_digest(digest: int) -> int:
    """The same number, or ValueError where it does not fit 128 bits."""
    if isinstance(digest, bool) or not isinstance(digest, int):
        raise TypeError(f"digest: an int of at most 128 bits, not {type(digest).__name__}")
    if not 0 <= digest <= _MAX_128:
        raise ValueError(f"digest: {digest:#x} does not fit 128 bits")
    return digest


@functools.cache
def digest_seed() -> int:
    """The seed that is configured. ValueError where it is no 64-bit number."""
    given = os.environ.get(SEED_VARIABLE) or "0"
    try:
        seed = int(given, 0)
    except ValueError:
        seed = -1
    if not 0 <= seed <= _MAX_64:
        raise ValueError(f"{SEED_VARIABLE}: {given!r} is no number from 0 to 2**64 - 1")
    return seed


def _digest(raw: bytes, name: HashName) -> int:
    if name == "xxh3":
        return _native.hash128(raw, digest_seed())
    return int.from_bytes(_sha256(raw), "big")


def _sha256(buffer: Any) -> bytes:
    return hashlib.sha256(buffer).digest()[:16]
