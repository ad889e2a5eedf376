"""`point_to_point_pyobj`: the function of that name that engines hand requests on with, from one pipeline stage to the next.

Both ranks call it; nothing is agreed on beforehand, and an asynchronous sender waits for nobody. So the sender learns from
shared memory alone whether the other rank sees it: with a message goes a *receipt*, the handle of a tiny block, which the
receiver attaches after all else. The first one is for anybody; who has taken it is known by name from then on, and arrays
travel to it as handles. Until then, or for ever where the ranks share no memory, they are pickled. What a message promises
is held until its receipt has been taken.

What a message is, in the payload of `channels.pair`::

    1  kind: 0 nothing (an empty list), 1 pickle, 2 tree, see `codec`     2  length of the receipt, bytes, little-endian
    the receipt's handle; the rest: the pickle or the tree
"""

import os
import pickle
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from . import arrays, codec
from .arena import Arena
from .attach import Peer, attach
from .codec import Encoded
from .errors import ArenaError, GroupError, HandleError, IntegrityError
from .handle import Handle
from .own_arena import own_arena
from .terms import Readers

if TYPE_CHECKING:
    from .channels.pair import Pair, Work

_NOTHING, _PICKLE, _TREE = 0, 1, 2
_HEAD_BYTES = 3
_RECEIPT_BYTES = 64


class _Sent(NamedTuple):
    receipt: Handle
    encoded: Encoded
    """What was promised, and leases that are held until it has been taken."""


class _Sender:
    """One way to another rank."""

    def __init__(self, pair: "Pair") -> None:
        self.pair = pair
        self._arena: Arena | None = None
        self._question: Handle | None = None
        """The receipt that anybody may take, as long as nobody has."""
        self._reader: Peer | None = None
        """The other rank, once it has."""
        self._sent: deque[_Sent] = deque()

    def send(self, data: list[Any]) -> "list[Work]":
        return self.pair.send(self._pack(data))

    def _pack(self, data: list[Any]) -> bytes:
        arena = self._open()
        if not data:
            return bytes(_HEAD_BYTES)
        if arena is None or self._reader is None:
            return _packed(_PICKLE, self._ask(arena), pickle.dumps(data, 5))
        encoded = codec.encode(data, arena, readers=[self._reader], grant_timeout=None, on_full="inline")
        if not encoded.handles and not encoded.leases:
            return _packed(_TREE, b"", encoded.blob)
        receipt = _receipt(arena, [self._reader])
        if receipt is None:
            encoded.withdraw()
            return _packed(_PICKLE, b"", pickle.dumps(data, 5))
        self._sent.append(_Sent(receipt, encoded))
        return _packed(_TREE, receipt.to_bytes(), encoded.blob)

    def _ask(self, arena: Arena | None) -> bytes:
        """The receipt that anybody may take, with one message; empty with the others, and where there is no room."""
        if arena is None or self._question is not None:
            return b""
        self._question = _receipt(arena, 1)
        return b"" if self._question is None else self._question.to_bytes()

    def _open(self) -> Arena | None:
        """The arena; None where none can be made, so that all is pickled. Looks at what has been taken meanwhile."""
        try:
            arena = own_arena()
        except (ArenaError, ValueError):
            return None
        if arena is not self._arena:
            self._arena, self._question, self._reader = arena, None, None
            self._sent.clear()
        if self._reader is None and self._question is not None:
            takers = arena.takers(self._question)
            if takers:
                self._reader = takers[0]
                arena.release(self._question)
        while self._sent and not arena.is_live(self._sent[0].receipt):
            self._sent.popleft()
        return arena

    def withdraw(self) -> None:
        """Nobody will come for it any more."""
        arena = self._arena
        receipts = [sent.receipt for sent in self._sent]
        if self._reader is None and self._question is not None:
            receipts.append(self._question)
        for sent in self._sent:
            sent.encoded.withdraw()
        if arena is not None and not arena.closed:
            for receipt in receipts:
                arena.withdraw(receipt)
        self._sent.clear()


_senders: "dict[tuple[int, int], tuple[Any, _Sender]]" = {}
_receivers: "dict[tuple[int, int], tuple[Any, Pair]]" = {}
"""By id of the process group and the other rank. The process group is kept along, so that no other one gets its id."""


def point_to_point_pyobj(
    data: list[Any],
    rank: int,
    group: Any = None,
    src: int = 0,
    dst: int = 1,
    async_send: bool = False,
) -> Any:
    """Send a list of picklable objects from one rank to another; both of them call it.

    ``data``: on the source; ignored elsewhere. ``rank``: this process's rank in the default group, as ``src`` and ``dst``.
    ``group``: a gloo group that has both of them; None: the default group.

    Returns on the destination what was sent, large arrays as views: ndarrays are read-only, tensors copy what they write.
    On the source ``[]``, or with ``async_send`` what to wait for: ``for sent in works: sent.work.wait()``. Elsewhere ``[]``.
    Raises ValueError (not two ranks of the group), PeerLostError, GroupTimeoutError, GroupError (what came is not the next
    message), and what `codec.loads` and `codec.dumps` raise."""
    if rank == src:
        sender = _sender(_resolved(group), dst)
        works = sender.send(data)
        if async_send:
            return works
        sender.pair.wait(works)
    elif rank == dst:
        return _unpack(_receiver(_resolved(group), src).receive())
    return []


def close_stages() -> None:
    """Forget all ways, and take back what was sent and not read. Not collective."""
    for _, sender in _senders.values():
        sender.withdraw()
    _senders.clear()
    _receivers.clear()


def _unpack(payload: bytes) -> list[Any]:
    if len(payload) < _HEAD_BYTES or payload[0] > _TREE:
        raise GroupError(f"receive from a stage: a payload of {len(payload)} bytes that begins with {payload[:3]!r}")
    kind, body_at = payload[0], _HEAD_BYTES + int.from_bytes(payload[1:3], "little")
    try:
        if kind == _NOTHING:
            return []
        body = memoryview(payload)[body_at:]
        data: list[Any] = pickle.loads(body) if kind == _PICKLE else codec.loads(body)
        return data
    finally:
        _take(payload[_HEAD_BYTES:body_at])


def _take(receipt: bytes) -> None:
    """Say that the message has been taken in, whatever became of it: by having attached, where memory is shared."""
    if receipt:
        try:
            attach(receipt, verify=True).release()
        except (HandleError, IntegrityError, ArenaError):
            pass  # other memory, or another host: the sender goes on with pickles


def _receipt(arena: Arena, readers: Readers) -> Handle | None:
    """A tiny block for them; None where there is no room. Kept where it is not known who they are."""
    block = bytearray(os.urandom(_RECEIPT_BYTES))
    try:
        return arena.publish(
            arrays.flat(block, _RECEIPT_BYTES), readers=readers, keep=isinstance(readers, int), grant_timeout=None
        )
    except ArenaError:
        return None


def _packed(kind: int, receipt: bytes, body: bytes) -> bytes:
    return b"".join((bytes([kind]), len(receipt).to_bytes(2, "little"), receipt, body))


def _resolved(group: Any) -> Any:
    from .channels import group as torch_groups

    _forget_destroyed(torch_groups.is_alive)
    return torch_groups.resolve(group)


def _sender(group: Any, other: int) -> _Sender:
    key = (id(group), other)
    if key not in _senders:
        _senders[key] = group, _Sender(_pair(group, other))
    return _senders[key][1]


def _receiver(group: Any, other: int) -> "Pair":
    key = (id(group), other)
    if key not in _receivers:
        _receivers[key] = group, _pair(group, other)
    return _receivers[key][1]


def _pair(group: Any, other: int) -> "Pair":
    from .channels.pair import Pair

    return Pair(group, other)


def _forget_destroyed(is_alive: Any) -> None:
    for key, (group, sender) in list(_senders.items()):
        if not is_alive(group):
            sender.withdraw()
            del _senders[key]
    for key, (group, _) in list(_receivers.items()):
        if not is_alive(group):
            del _receivers[key]
