"""On what terms a block is published: who may attach it, until when, and how it is hashed."""

from collections.abc import Iterable
from typing import NamedTuple, TypeAlias

from . import _native
from .attach import Peer
from .content import Hash, HashName, hash_name

Readers: TypeAlias = int | str | Iterable[Peer]
"""How many processes, the first that come; which, by their tokens; or "all" that have joined."""

_FOR_EVER = 1 << 62


class Terms(NamedTuple):
    """What `Arena.publish` was told."""

    native: tuple[int, tuple[Peer, ...] | None, bool, int, bool]
    """As the core takes them: anonymous readers; named ones, None for whoever has joined; keep; ns that unclaimed grants are
    in force; whether XXH3 rides in the copy."""
    hash: HashName | None


def terms(readers: Readers, keep: bool, grant_ns: int, hash: Hash, *, alone: bool) -> Terms:
    """``alone``: whether nobody else has joined. ValueError where nobody would hold the block."""
    name = hash_name(hash)
    xxh3 = name == "xxh3"
    if isinstance(readers, int):
        return Terms((_checked_count(readers, keep), (), keep, grant_ns, xxh3), name)
    if isinstance(readers, str):
        if readers != "all":
            raise ValueError(f"publish: readers is a number, process tokens or 'all', not {readers!r}")
        if not keep and alone:
            raise ValueError("publish: readers='all', but nobody else has joined, and keep is False")
        return Terms((0, None, keep, grant_ns, xxh3), name)  # None: whoever is there at the exchange
    return Terms((0, _checked_tokens(readers, keep), keep, grant_ns, xxh3), name)


def timeout_ns(name: str, seconds: float | None) -> int:
    """Nanoseconds; 0 stands for never. ValueError for what is no number of seconds."""
    if seconds is None:
        return 0
    if not seconds >= 0:
        raise ValueError(f"{name}: {seconds!r} is not a number of seconds")
    return min(max(int(seconds * 1e9), 1), _FOR_EVER) if seconds < 1e9 else 0


def _checked_count(readers: int, keep: bool) -> int:
    if readers < 0 or (readers == 0 and not keep):
        raise ValueError(f"publish: readers={readers} and keep={keep}: nobody would hold the block")
    if readers > _native.PEER_COUNT:
        raise ValueError(
            f"publish: readers={readers}, but {_native.PEER_COUNT} processes can be in an arena; to name one "
            "process by its token, pass a list"
        )
    return readers


def _checked_tokens(readers: Iterable[Peer], keep: bool) -> tuple[Peer, ...]:
    own = _native.process_token()
    tokens = tuple([token for token in readers if token != own])
    if not all(isinstance(token, int) and 0 <= token < 1 << 64 for token in tokens):
        raise ValueError(f"publish: readers={tokens!r} are not all process tokens, 64-bit integers")
    if not tokens and not keep:
        raise ValueError(f"publish: readers={readers!r} names no other process and keep is False: nobody would hold it")
    return tokens
