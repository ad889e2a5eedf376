"""`Group`: the ranks of one host, one of which sends object trees to the others through shared memory.

How a tree travels::

    prepare: publish its arrays, one grant a rank
    pack:    one message of the pickles and the handles
    carry:   the message through the channel  ──►  unpack: attach, rebuild the trees around views;
                                                   say so in the step word, and what could not be rebuilt
                                                   wait until all ranks have said so: the same end everywhere

`broadcast` is all of that for one tree. The entry rank alone decides what the others do (see `meeting` for how a group
comes about), and what it could not encode travels as a message too, so every rank runs the same steps whatever happens
on one of them. How far each rank has come, and who is to blame when one does not come: see `roster`. Bytes of a message:
see `message`.
"""

import pickle
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from operator import or_
from types import TracebackType
from typing import Any, Literal, NamedTuple

from . import _native, codec, meeting, message
from .arena import Arena
from .attach import Lease, Peer
from .channels import Channel
from .codec import Encoded
from .content import Hash
from .errors import GroupError, HandleError, PeerLostError
from .handle import Handle
from .in_place import InPlace
from .parts import ALL_BITS, LAST_BIT, Finish, Parts, Received, TakeIn, rebuild
from .roster import Roster, ranks_text

MIN_BYTES = 1024
"""Smaller arrays stay in the pickle. Lower than for `dumps`: a handle costs some 20 µs, but a message that no longer fits
into one frame costs another broadcast, 0.4 ms at 2 ranks and 1 ms at 4, and four arrays of 1 KiB do that."""

_MESSAGES, _MESSAGE_BYTES = _native.metric("messages"), _native.metric("message_bytes")
_OVERFLOWS, _MESSAGE_NS = _native.metric("overflows"), _native.metric("message_ns")
_ATTACH_NS = _native.metric("attach_ns")

_COUNTS = (
    "messages",
    "message_bytes",
    "arrays",
    "array_bytes",
    "passed_on",
    "inline_bytes",
    "errors",
    "encode_ns",
    "attach_ns",
)


class _Sent(NamedTuple):
    """A message that some rank may not have taken in yet."""

    step: int
    handles: list[Handle]
    leases: list[Lease]


class Group:
    """All ranks of a group, as one of them. Made once and by all ranks together, like a process group.

    On every rank `broadcast` is called equally often and by one thread. Not for forked children. Close it on every rank,
    or use it as a context manager."""

    def __init__(
        self,
        cpu_group: Any = None,
        entry: int = 0,
        *,
        arena: Arena | None = None,
        max_bytes: int | str = "2GiB",
        fallback: meeting.Fallback = "raise",
        min_bytes: int = MIN_BYTES,
        timeout: float | None = None,
        channel: meeting.ChannelChoice = "auto",
        consensus: bool = True,
    ) -> None:
        """``cpu_group``: a gloo group of ``torch.distributed``; None: the default group, or, where there is none, this
        process alone. ``entry``: the rank within the group that sends. ``timeout``: seconds that a rank may make the
        others wait; None: as the process group was made.

        The rest is the entry rank's to say; what other ranks pass is not looked at. ``arena``: one to publish in, which
        stays open; None: one of ``max_bytes``, which is closed with the group. ``fallback``: what all ranks do if they
        do not share memory: "raise", or send pickles ("object"), with a warning on the entry rank. ``min_bytes``: arrays
        that are smaller stay in the pickle. ``channel``: "auto": messages go through a ring in shared memory; "group":
        over the process group in any case. ``consensus=False``: no rank waits for what the others say of a message. That
        saves a wake-up a message, and what one rank alone could not take in is then an error on that rank alone.

        Raises on all ranks alike: GroupError (memory is not shared, and why, by rank), PeerLostError, GroupTimeoutError.
        ValueError for arguments that are wrong on this rank."""
        if fallback not in ("raise", "object"):
            raise ValueError(f"fallback is 'raise' or 'object', not {fallback!r}")
        if channel not in ("auto", "group"):
            raise ValueError(f"channel is 'auto' or 'group', not {channel!r}")
        self._rendezvous = meeting.rendezvous(cpu_group, entry, timeout, channel)
        self.rank = self._rendezvous.rank
        """Of this process, within the group."""
        self.size = self._rendezvous.size
        """How many ranks there are."""
        self.entry = self._rendezvous.entry
        """The rank that sends."""
        self.failures = 0
        """What some rank could not take in of the last message, as its ``take_in`` said."""
        self._token = _native.process_token()
        self._min_bytes = min_bytes
        self._timeout = self._rendezvous.timeout if timeout is None else timeout
        self._sent: deque[_Sent] = deque()
        # What is packed and not unpacked, by whether it rides; and how many that ride were unpacked.
        self._packed: dict[bool, list[Encoded]] = {}
        self._rides = 0
        self._broken: GroupError | None = None
        self._closed = False
        self._busy = threading.Lock()
        self._counts = dict.fromkeys(_COUNTS, 0)
        terms = meeting.Terms(fallback, channel, consensus)
        try:
            self._memory, terms, refusal = meeting.meet(self._rendezvous, arena, max_bytes, terms, timeout)
        except BaseException:
            self._rendezvous.close()
            raise
        self.mode: Literal["shared", "object"] = "object" if self._memory is None else "shared"
        """Whether arrays travel through shared memory, or everything as a pickle."""
        self.consensus = terms.consensus
        """Whether all ranks come to the same end of every message."""
        self.peers: tuple[Peer, ...] = () if self._memory is None else self._memory.peers
        """Process tokens by rank; see `shmcast.process_token`."""
        self._others = tuple(peer for peer in self.peers if peer != self._token)
        self._channel: Channel = self._rendezvous
        try:
            memory = self._memory
            self._roster = (
                Roster(None, (), self.entry)
                if memory is None
                else Roster(memory.member, memory.peers, self.entry, memory.name)
            )
            self.meter = _native.Meter(self._roster.member)
            """Where this group counts, together with its other ranks if memory is shared; see `shmcast.metrics`."""
            if self._memory is not None and self.size > 1 and terms.channel == "auto":
                self._channel = meeting.ring_channel(self._memory, self._rendezvous, self._timeout)
            # No rank may be gone before the others have found it in the arena.
            self._rendezvous.gather(b"", timeout=timeout)
        except BaseException:
            self._closed = True
            self._abandon()
            raise
        if self._memory is None and self.rank == self.entry:
            warnings.warn(f"shmcast sends pickles in this group: {refusal}", RuntimeWarning, stacklevel=2)

    # ---- trees

    def broadcast(
        self, tree: Any = None, *, local: bool = False, nothing: bool = False, take_in: TakeIn | None = None
    ) -> Any:
        """Send a tree from the entry rank to all ranks; every rank gets it back, made of views of the same memory.

        ``tree``: anything that can be pickled; large ndarrays and CPU tensors in it are published, and arrive as read-only
        ndarrays and copy-on-write tensors, which live as long as one keeps them. Views of blocks, of whatever arena,
        travel without a copy. What finds no room in the arena travels in the message (`stats`: ``inline_bytes``). On the
        other ranks ``tree`` is ignored, as it is by ``torch.distributed.broadcast``: an error there would come too late for
        the ranks that wait. ``local``: on the entry rank, return ``tree`` itself instead of views. ``nothing``: on the entry rank,
        send no tree: all ranks get None, and as nobody can fail at it, nobody waits for the others. ``take_in``, on all ranks
        or on none: called with the tree before any rank goes on; see `TakeIn` and `failures`.

        If the tree can not be encoded, the entry rank raises what encoding raised and the others GroupError with its
        text. If any rank can not rebuild it, all raise GroupError with the same text (without `consensus`: that rank
        alone). The group stays usable after both. After PeerLostError, GroupTimeoutError and any other GroupError that
        the channel raises it is broken on all ranks, and every later call says so."""
        with self._alone("broadcast"):
            blob = self._encode([] if nothing else [tree]) if self.rank == self.entry else None
            _, parts = self._exchange(blob, [tree] if local and self.rank == self.entry else None, take_in)
            if not parts:
                return None
            (received,) = parts
            if received.error is not None:
                try:
                    raise received.error
                finally:
                    del received, parts  # or the error would keep itself, and with it all that callers hold
            return received.value

    def agree(self, failures: int = 0) -> tuple[int, list[int]]:
        """A step without a message: every rank says what of something it could not do, and all learn the same.

        ``failures``: up to 64 bits. Returns all of them together, and the ranks that had one. For what a group has taken in by
        other ways; every rank holds what it has until this returns. Errors break the group, as for `broadcast`."""
        if not 0 <= failures <= ALL_BITS:
            raise ValueError(f"agree: failures={failures:#x} does not fit 64 bits")
        with self._alone("agree"):
            self._take_in(failures)
            return self._agree(failures) if self.size > 1 else (failures, [self.rank] if failures else [])

    def poll(self) -> bool:
        """On the other ranks: whether a message is there, so that `broadcast` would not wait for one. Does not wait.

        GroupError where the channel can not tell: a process group."""
        self._check_usable("poll")
        return self._channel.poll()

    # ---- for those who build messages of their own: `caster`

    def in_place(self, no_room: Callable[[int], object], hash: Hash = True) -> InPlace:
        """On the entry rank: where to make one tree for `prepare`. ``no_room``, ``hash``: see `InPlace`."""
        arena = None if self._memory is None else self._memory.arena
        return InPlace(arena, tokens=self._others, keep=True, grant_timeout=None, hash=hash, no_room=no_room)

    def prepare(
        self, tree: Any, in_place: InPlace | None = None, *, inline: bool = False, inline_below: int = 0
    ) -> Encoded:
        """On the entry rank, in any thread: pickle a tree and publish its arrays for all ranks, as part of a message to be.

        ``in_place``: where it was made, if it was. ``inline``: publish nothing; ``inline_below``: nor where there is as little
        to publish (bytes). `Encoded.withdraw` for what is not sent after all. Raises what encoding
        raises; GroupError once closed."""
        memory = self._memory
        if self._closed or self.rank != self.entry:
            raise GroupError("prepare: the group is closed" if self._closed else "prepare: only the entry rank sends")
        began_ns = time.monotonic_ns()
        if memory is None:
            encoded = Encoded(None)
            encoded.blob = pickle.dumps(tree, 5)
        else:
            encoded = codec.encode(
                tree,
                None if inline else memory.arena,
                readers=self._others,
                keep=True,
                grant_timeout=None,
                min_bytes=self._min_bytes,
                on_full="inline",
                in_place=None if inline else in_place,
                inline_below=inline_below,
            )
        self._counts["encode_ns"] += time.monotonic_ns() - began_ns
        return encoded

    def pack(self, head: bytes, parts: Sequence[Encoded], *, rides: bool = False) -> bytes:
        """On the entry rank: the next message for `exchange`, of what `prepare` gave. ``rides``: the next for `unpack`, on
        every rank, which takes it there by another broadcast, this group's own for example.

        ``head``: whatever the caller wants to travel along. GroupError while the last one for the same has not been
        unpacked."""
        with self._alone("pack"):
            return self._pack(head, parts, rides)

    def exchange(self, blob: bytes | None = None, finish: Finish | None = None) -> "tuple[bytes, list[Received]]":
        """Send what `pack` gave through the group's channel, and `unpack` it on every rank; ``blob`` is the entry rank's.

        A rank alone sends nothing. Errors break the group, as for `broadcast`."""
        with self._alone("exchange"):
            return self._exchange(blob, finish=finish)

    def unpack(
        self, blob: "bytes | bytearray | memoryview", finish: Finish | None = None
    ) -> "tuple[bytes, list[Received]]":
        """On every rank, what `pack` with ``rides`` was given, in order. With `consensus` it waits until all ranks have it.
        ``finish``: see `parts.Finish`; on all ranks or on none.

        Where a rank could not rebuild a tree, all get the same error in its place (of more than 63 trees, those from the
        64th on fail together). HandleError where the bytes are no message, or not the next: nothing has changed then.
        GroupError: the group broke, or the entry rank could not send."""
        with self._alone("unpack"):
            return self._unpack(blob, finish=finish)

    def check(self, action: str) -> None:
        """GroupError, which names ``action``, where the group can not be used any more, as far as that is known here."""
        self._check_usable(action)

    def give_up(self, cause: GroupError) -> GroupError:
        """Break the group on this rank, so that the others notice: this one can not go on with them. Returns the error."""
        return self._break(cause) if self._broken is None and not self._closed else cause

    # ---- what it is

    @property
    def timeout(self) -> float:
        """Seconds that a rank may make the others wait."""
        return self._timeout

    @property
    def arena(self) -> Arena | None:
        """On the entry rank, where memory is shared: what it publishes in."""
        return None if self._memory is None else self._memory.arena

    @property
    def channel(self) -> str:
        """How messages go: "ring", "group" or "loopback"."""
        return self._channel.name

    @property
    def step(self) -> int:
        """How many messages this rank has taken in."""
        return self._roster.step

    @property
    def broken(self) -> GroupError | None:
        """Why the group is of no use any more, as far as that is known here."""
        return self._broken

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def stats(self) -> dict[str, int]:
        """Counts since the group was made: messages, their bytes, and how many did not fit the fixed-size frame; time in
        ``encode_ns`` (pickle and publish) and ``attach_ns`` (attach and rebuild); on the entry rank also arrays and bytes that were
        published, arrays passed on, bytes that travelled in messages for want of room; errors; messages that are not
        known to have been taken in by all ranks."""
        return {
            **self._counts,
            "overflows": self._channel.overflows,
            "step": self.step,
            "unconfirmed": len(self._sent),
        }

    def close(self) -> None:
        """End the group on this rank. Involves no collective; views stay valid. Idempotent.

        It waits up to 5 s for ranks that live and have not taken in the last message yet. Then the entry rank takes back
        what nobody took, and closes the arena, unless it was given one."""
        if self._closed:
            return
        self._closed = True
        if self._roster.member is not None and self._broken is None:
            self._roster.linger()
            self._roster.ends()
        self._abandon()

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "broken" if self._broken else self.mode
        return f"<Group rank {self.rank} of {self.size}, entry {self.entry}, {state}, step {self.step}>"

    # ---- the entry rank

    def _encode(self, trees: list[Any]) -> bytes:
        try:
            parts = [self.prepare(tree) for tree in trees]
        except PeerLostError as error:
            raise self._break(error) from error.__cause__
        except BaseException as error:
            # Sent whatever it was, so that the others do not wait for a message that never comes.
            self._counts["errors"] += 1
            self._carry(message.pack_error(self.step + 1, error))
            self._take_in(ALL_BITS)
            raise
        return self._pack(b"", parts)

    def _pack(self, head: bytes, parts: Sequence[Encoded], rides: bool = False) -> bytes:
        number = (self._rides if rides else self.step) + 1
        if rides in self._packed:
            raise GroupError(f"pack: message {number} {'that rides ' if rides else ''}has not been unpacked yet")
        self._drop_confirmed()
        blob = message.pack(number, head, [part.blob for part in parts], rides)
        # From here on some rank may get it, whatever happens on this one.
        self._packed[rides] = list(parts)
        counts = self._counts
        counts["arrays"] += sum([len(part.handles) for part in parts])
        counts["array_bytes"] += sum([handle.nbytes for part in parts for handle in part.handles])
        counts["passed_on"] += sum([len(part.leases) for part in parts])
        counts["inline_bytes"] += sum([part.inline_bytes for part in parts])
        return blob

    def _release_packed(self, rides: bool) -> None:
        """End the arena's own hold on what has been sent: the ranks' claims are enough from here on."""
        parts = self._packed.pop(rides, [])
        handles = [handle for part in parts for handle in part.handles]
        leases = [lease for part in parts for lease in part.leases]
        if self._memory is not None:
            self._memory.release(handles)
        if handles or leases:
            self._sent.append(_Sent(self.step, handles, leases))

    def _drop_confirmed(self) -> None:
        """Forget messages that every rank has taken in or will never take in.

        A block that was passed on is held until then: its owner may revoke our grants at its own deadline."""
        if not self._sent or self._memory is None:
            return
        low, failed = self._roster.confirmed()
        while self._sent and self._sent[0].step <= low:
            sent = self._sent.popleft()
            if failed >= sent.step:
                self._memory.withdraw(sent.handles)

    # ---- every rank

    def _exchange(
        self,
        blob: bytes | None,
        own: list[Any] | None = None,
        take_in: TakeIn | None = None,
        finish: Finish | None = None,
    ) -> "tuple[bytes, list[Received]]":
        """``own``: the trees, on a rank that has them already."""
        blob = self._carry(blob)
        try:
            return self._unpack(blob, own, take_in, finish)
        except HandleError as error:
            raise self._break(GroupError(f"receive message {self.step + 1}: {error}")) from error

    def _carry(self, blob: bytes | None) -> bytes:
        """Through the channel; whatever goes wrong there breaks the group."""
        self._roster.wait_begins()
        began_ns, overflows = time.monotonic_ns(), self._channel.overflows
        try:
            blob = self._channel.broadcast(blob, timeout=self._timeout, watch=self._roster.watch)
        except GroupError as error:
            raise self._break(error) from error.__cause__
        except BaseException as error:
            self._break(GroupError(f"interrupted by {type(error).__name__}"))
            raise
        if self.size > 1:
            self._counts["messages"] += 1
            self._counts["message_bytes"] += len(blob)
            self.meter.observe(_MESSAGE_NS, time.monotonic_ns() - began_ns)
            if self.rank == self.entry:
                self.meter.add(_MESSAGES, 1)
                self.meter.add(_MESSAGE_BYTES, len(blob))
                self.meter.add(_OVERFLOWS, self._channel.overflows - overflows)
        return blob

    def _unpack(
        self,
        blob: "bytes | bytearray | memoryview",
        own: list[Any] | None = None,
        take_in: TakeIn | None = None,
        finish: Finish | None = None,
    ) -> "tuple[bytes, list[Received]]":
        received = message.unpack(blob)
        number = (self._rides if received.rides else self.step) + 1
        if received.number != number:
            raise HandleError(
                f"unpack: message {received.number}, this rank is to take in message {number}: every message is given to every "
                "rank once and in order"
            )
        if received.error is not None:
            self._counts["errors"] += 1
            self._take_in(ALL_BITS)
            raise GroupError(
                f"step {self.step}: rank {self.entry} could not encode the tree: {_error_text(received.error)}"
            )
        self._rides += received.rides
        parts = self._rebuild(received.parts, own, take_in)
        if finish is not None:
            parts = finish(received.head, parts)
        values, interrupt, failures = [Received(value, None) for value in parts.values], parts.interrupt, parts.failures
        causes = parts.causes
        parts.values = []  # a traceback that somebody keeps must not keep leases
        self._take_in(failures)
        ranks = [self.rank] if failures else []
        try:
            if self.consensus and self.size > 1 and values:
                failures, ranks = self._agree(failures)
            if interrupt is not None:
                raise interrupt  # only now: the others agree with us on this message, so we may not be at the next one
        except BaseException:
            values.clear()  # for the same reason
            raise
        finally:
            # Only now: until all ranks have their claims ours keeps the blocks.
            self._release_packed(received.rides)
        self._drop_confirmed()
        if take_in is not None:
            self.failures, failures = failures >> 1, failures & 1
        if failures:
            self._counts["errors"] += 1
            for number in range(len(values)):
                if failures >> min(number, LAST_BIT) & 1:
                    who = ranks_text(ranks, len(values) == 1 and take_in is None)  # no more is agreed on
                    values[number] = Received(None, self._failure(number, who, causes.get(number)))
        return received.head, values

    def _rebuild(self, raw: Sequence[memoryview], own: list[Any] | None, take_in: TakeIn | None) -> Parts:
        began_ns = time.monotonic_ns()
        parts = rebuild(raw, pickle.loads if self.mode == "object" else codec.loads, own, take_in)
        if raw:
            took_ns = time.monotonic_ns() - began_ns
            self._counts["attach_ns"] += took_ns
            self.meter.observe(_ATTACH_NS, took_ns)
        return parts

    def _take_in(self, failures: int) -> None:
        self._roster.step += 1
        self._roster.taken_in(failures)

    def _agree(self, failures: int) -> tuple[int, list[int]]:
        """What some rank could not take in of the last message, and which ranks; the same on all ranks."""
        try:
            if self._memory is not None:
                return self._roster.agree(self._timeout)
            # Where nothing is shared it takes a collective, for every message that carries something.
            answers = self._rendezvous.gather(failures.to_bytes(8, "little"), timeout=self._timeout)
            masks = [int.from_bytes(answer, "little") for answer in answers]
            return reduce(or_, masks), [rank for rank, mask in enumerate(masks) if mask]
        except GroupError as error:
            raise self._break(error, before=True) from error.__cause__
        except BaseException as error:
            self._break(GroupError(f"interrupted by {type(error).__name__}"), before=True)
            raise

    def _failure(self, number: int, who: str, cause: BaseException | None) -> GroupError:
        """The error in place of a part: the same text on every rank, and here also why, if it was here."""
        reason = "" if cause is None or self.consensus else f": {type(cause).__name__}: {cause}"
        error = GroupError(f"step {self.step}: {who} can not rebuild tree {number} of the message{reason}")
        error.__cause__ = cause
        return error

    def _check_usable(self, action: str) -> None:
        if self._closed:
            raise GroupError(f"{action}: the group is closed")
        if self._token != _native.process_token():
            raise GroupError(f"{action}: this process was forked from a rank; it is none itself")
        if self._broken is not None:
            raise GroupError(
                f"{action}: the group is broken since step {self.step + 1}: {self._broken}"
            ) from self._broken
        ended = self._roster.ended()
        if ended:
            raise self._break(self._roster.gave_up(ended))

    @contextmanager
    def _alone(self, action: str) -> Iterator[None]:
        if not self._busy.acquire(blocking=False):
            raise GroupError(f"{action}: one is under way in another thread, or in a method that pickle has called")
        try:
            self._check_usable(action)
            yield
        finally:
            self._busy.release()

    # ---- the end

    def _break(self, cause: GroupError, before: bool = False) -> GroupError:
        """Record that the group is of no use any more, here and for the other ranks to see; returns what to raise: ``cause``
        itself, which can not be its own cause, or another error with its text.

        ``before``: also the last message was not delivered."""
        error = cause if before else self._roster.diagnose(cause)
        # Another one: what is raised keeps the frames that it goes through, and what callers hold there.
        self._broken = type(error)(*error.args)
        if before:
            self._roster.step -= 1
        self._roster.ends()
        return error

    def _abandon(self) -> None:
        memory, self._memory = self._memory, None
        sent, self._sent = self._sent, deque()
        if memory is not None:
            # Grants in an arena that is closed with the group end with it.
            if not memory.owned and not memory.member.inherited:
                for each in sent:
                    memory.withdraw(each.handles)
                for parts in self._packed.values():
                    for part in parts:
                        memory.withdraw(part.handles)
            memory.give_up()
        self._channel.close()
        self._rendezvous.close()


def _error_text(error: dict[str, str]) -> str:
    return f"{error.get('type')}: {error.get('text')}\n{error.get('traceback')}"
