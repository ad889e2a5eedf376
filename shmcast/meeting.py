"""How a group comes about: its ranks find out, all together, whether they share memory.

::

    entry rank                                   other ranks
    open the arena, publish a random probe
    hello: the probe's handle and contents  ──►  join the arena, map it, read the probe
    ◄────────  answers, to all: could I, or why not; my token; what I have read  ────────►
    every rank judges the same answers, so all of them come to the same end

A host name would prove nothing: containers have the same one, and a container may have a /dev/shm of its own. The hello
is JSON. An answer is `_ANSWER`, or a zero byte and the reason, UTF-8.
"""

import json
import os
import sys
import weakref
from dataclasses import dataclass
from struct import Struct
from struct import error as struct_error
from typing import Any, Literal, NamedTuple, TypeAlias

from . import _native, arrays, names, process
from .arena import Arena
from .attach import Peer, attach
from .channels import RECORD_BYTES, Channel, LoopbackChannel, Rendezvous
from .channels.ring import RingChannel
from .errors import GroupError
from .handle import Handle

Fallback: TypeAlias = Literal["raise", "object"]
ChannelChoice: TypeAlias = Literal["auto", "group"]


class Terms(NamedTuple):
    """What the entry rank alone decides, and all ranks do."""

    fallback: Fallback
    channel: ChannelChoice
    consensus: bool


_PROBE_BYTES = 64
_ANSWER = Struct(f"<BQQ16s{_PROBE_BYTES}s")
_TERMS = {"fallback": str, "channel": str, "consensus": bool}
_FOUND = {"probe": str, "secret": str, "nonce": str, "owned": bool, "ring": int, "name": int}
"""What a hello has besides the terms, unless it says which error there was."""

_serving: "weakref.WeakSet[Arena]" = weakref.WeakSet()
"""Arenas of this process that a group uses: the step words of an arena tell about one group."""


@dataclass
class Memory:
    """What one rank has of the memory that a group shares."""

    member: _native.Member
    """This process in the arena."""
    peers: tuple[Peer, ...]
    """Tokens of all ranks."""
    arena: Arena | None
    """On the entry rank."""
    owned: bool
    """Whether the arena ends with the group."""
    key: process.Key | None
    """Of the membership, where it ends with the group."""
    name: int
    """Of the group in the arena: see `Fellows.begin`."""
    ring_start: int
    """Where in the arena's ring this group's messages begin."""

    def release(self, handles: list[Handle]) -> None:
        """On the entry rank: end the arena's own hold on blocks."""
        if self.arena is not None and not self.arena.closed:
            for handle in handles:
                self.arena.release(handle)

    def withdraw(self, handles: list[Handle]) -> None:
        """On the entry rank: take back what no rank will take any more."""
        if self.arena is not None and not self.arena.closed:
            for handle in handles:
                self.arena.withdraw(handle)

    def give_up(self) -> None:
        """End this rank's part."""
        _give_up(self.arena, self.owned, self.key)


class _Opened:
    """What this rank has opened so far, and has to give up if it comes to nothing."""

    arena: Arena | None = None
    owned = False
    key: process.Key | None = None
    member: _native.Member | None = None


def meet(
    rendezvous: Rendezvous, arena: Arena | None, max_bytes: int | str, terms: Terms, timeout: float | None
) -> tuple[Memory | None, Terms, str]:
    """Collective. The memory that all ranks share, or None, and why, if the entry rank's ``fallback`` is "object"; and
    the entry rank's terms.

    GroupError on every rank with the same text if they do not share memory; GroupTimeoutError, PeerLostError. Nothing is
    left behind then."""
    opened = _Opened()
    try:
        memory, terms, refusal = _meet(rendezvous, opened, arena, max_bytes, terms, timeout)
    except BaseException:
        _give_up(opened.arena, opened.owned, opened.key)
        raise
    if memory is None:
        _give_up(opened.arena, opened.owned, opened.key)
    return memory, terms, refusal


def ring_channel(memory: Memory, rendezvous: Rendezvous, timeout: float) -> Channel:
    """The way through the arena's ring, for ranks that have met."""
    ring = _native.Ring(memory.member, memory.peers, memory.ring_start)
    return RingChannel(ring, rendezvous.rank, rendezvous.size, rendezvous.entry, timeout=timeout)


def _meet(
    rendezvous: Rendezvous,
    opened: _Opened,
    arena: Arena | None,
    max_bytes: int | str,
    terms: Terms,
    timeout: float | None,
) -> tuple[Memory | None, Terms, str]:
    first, cause, probe = b"", None, None
    at_entry = rendezvous.rank == rendezvous.entry
    if at_entry:
        try:
            probe, hello = _open(opened, arena, max_bytes)
        except Exception as error:
            cause = error
            hello = {"error": f"{type(error).__name__}: {error}"[:RECORD_BYTES]}
        first = json.dumps({**hello, **terms._asdict()}).encode()
    hello = _read_hello(rendezvous.broadcast(first, timeout=timeout))
    terms = Terms(hello["fallback"], hello["channel"], hello["consensus"])
    answers = rendezvous.gather(_answer(hello, opened, at_entry), timeout=timeout)
    if opened.arena is not None and probe is not None:
        opened.arena.release(probe)
    refusals, tokens = _judge(hello, answers, rendezvous.entry)
    if not refusals and opened.member is not None:
        memory = Memory(
            opened.member, tuple(tokens), opened.arena, opened.owned, opened.key, hello["name"], hello["ring"]
        )
        return memory, terms, ""
    text = "; ".join(refusals)
    if terms.fallback == "object":
        return None, terms, text
    raise GroupError(
        f"make a group: its {rendezvous.size} ranks do not share memory: {text}. All of them have to be on one host and to "
        "see one /dev/shm; fallback='object' sends pickles instead"
    ) from cause


def _open(opened: _Opened, arena: Arena | None, max_bytes: int | str) -> tuple[Handle, dict[str, Any]]:
    """On the entry rank: the arena, and a block in it that proves that the others see it."""
    if arena is None:
        arena = Arena.create(max_bytes)
        opened.owned = True
    elif arena in _serving:
        raise ValueError(f"{arena!r} serves another group already")
    opened.arena = arena
    _serving.add(arena)
    secret = os.urandom(_PROBE_BYTES)
    probe = arena.publish(arrays.flat(bytearray(secret), _PROBE_BYTES), readers=0, keep=True)
    member = process.join((arena.namespace, arena.id, names.host_id()))
    ring = _native.Ring.position(member)
    hello = {"secret": secret.hex(), "nonce": arena.nonce.hex(), "owned": opened.owned, "ring": ring}
    return probe, {"probe": probe.to_bytes().hex(), "name": _native.Fellows.begin(member), **hello}


def _answer(hello: dict[str, Any], opened: _Opened, at_entry: bool) -> bytes:
    """Join, map and read; what this rank found goes to all."""
    if "error" in hello:
        return b"\0"
    try:
        handle = Handle.from_bytes(bytes.fromhex(hello["probe"]))
        key = handle[:3]
        known = key in process.members
        member = opened.member = process.join(key)
        if not at_entry and (hello["owned"] or not known):
            opened.key = key
        with attach(handle) as lease:
            seen = lease.array.tobytes()
        # Before the answer, so that nobody takes what an earlier group left here for ours.
        _native.Fellows.reset(member)
        # Off the hot path: the page tables of what is warm already.
        member.map_segment(handle.segment, True)
        return _ANSWER.pack(1, _native.process_token(), member.index, member.nonce, seen)
    except Exception as error:
        return b"\0" + f"{type(error).__name__}: {error}".encode()[: RECORD_BYTES - 1]


def _judge(hello: dict[str, Any], answers: list[bytes], entry: int) -> tuple[list[str], list[Peer]]:
    """What speaks against sharing, the same list on every rank, and the tokens of the ranks."""
    if "error" in hello:
        return [f"rank {entry}, the entry rank, has no arena: {hello['error']}"], []
    refusals: list[str] = []
    tokens: list[Peer] = []
    for rank, answer in enumerate(answers):
        try:
            if answer[:1] != b"\1":
                refusals.append(f"rank {rank}: {answer[1:].decode(errors='replace')}")
                continue
            _, token, _, nonce, seen = _ANSWER.unpack(answer)
        except struct_error:
            refusals.append(f"rank {rank}: an answer of {len(answer)} bytes, {_ANSWER.size} were expected")
            continue
        tokens.append(token)
        for what, found, expected in (
            ("control segment", nonce.hex(), hello["nonce"]),
            ("probe", seen.hex(), hello["secret"]),
        ):
            if found != expected:
                refusals.append(
                    f"rank {rank}: it reads {found[:16]} in its {what}, not {expected[:16]}: other memory by the same name"
                )
    if not refusals and len(set(tokens)) != len(tokens):
        refusals.append(f"ranks are one process: tokens {[f'{token:016x}' for token in tokens]}")
    return refusals, tokens


def _read_hello(raw: bytes) -> dict[str, Any]:
    try:
        hello = json.loads(raw)
        wanted = _TERMS | ({"error": str} if "error" in hello else _FOUND)
        wrong = [key for key, kind in wanted.items() if type(hello.get(key)) is not kind]
        if not wrong:
            return dict(hello)
        raise ValueError(f"of {sorted(wanted)} it lacks, or has as something else, {wrong}")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise GroupError(f"make a group: the entry rank's first message is no hello: {error}") from None


def _give_up(arena: Arena | None, owned: bool, key: process.Key | None) -> None:
    if arena is not None:
        _serving.discard(arena)
        if owned:
            arena.close()
    elif key is not None:
        # Not `leave`: views that exist hold on to the membership until they are gone.
        process.forget(key)


def rendezvous(cpu_group: Any, entry: int, timeout: float | None, channel: str) -> Rendezvous:
    """What the ranks meet over: their process group; this process alone where there is none."""
    if cpu_group is None and channel == "auto" and not _torch_is_initialised():
        if entry != 0:
            raise ValueError(f"entry {entry}: torch.distributed is not initialised, so the group is this process alone")
        return LoopbackChannel()
    from .channels.group import GroupChannel

    return GroupChannel(cpu_group, entry, timeout=timeout)


def _torch_is_initialised() -> bool:
    # Who has not imported it can not have initialised it, and it takes seconds to import.
    if "torch.distributed" not in sys.modules:
        return False
    from .channels.group import available

    return available()
