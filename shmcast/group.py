"""`Group`: the ranks of one host, one of which broadcasts object trees to the others through shared memory.

How a tree travels::

    publish its arrays, one grant a rank
    one message: the pickle and the handles ──►  attach, rebuild the tree around views
                                                 step word: taken in, or failed

The entry rank alone decides what the others do (see `meeting` for how a group comes about), and what it could not encode
travels as a message too, so every rank runs the same collectives whatever happens on one of them. The other ranks answer
through their step words in shared memory. A word counts double: ``2 n`` when message n has been taken in, ``2 n + 1`` while waiting for
the next, so that a rank which has not come can be told from those that wait for it. Its top bit says that the rank will
take in no more: it has closed the group, or seen it break. Failures of a rank are recorded at ``2 n``.

Messages start with what they are: a tree ("shmT", see `codec`), a pickle where no memory is shared (0x80), or the
error of the entry rank ("shmE", then JSON).
"""

import json
import pickle
import sys
import threading
import time
import traceback
import warnings
from collections import deque
from types import TracebackType
from typing import Any, Literal, NamedTuple

from . import _native, codec, meeting
from .arena import Arena
from .attach import Lease, Peer
from .channels import Channel, LoopbackChannel, Rendezvous
from .errors import GroupError, GroupTimeoutError, PeerLostError, ShmcastError
from .handle import Handle

MIN_BYTES = 1024
"""Smaller arrays stay in the pickle. Lower than for `dumps`: a handle costs some 20 µs, but a message that no longer fits
into one frame costs another broadcast, 0.4 ms at 2 ranks and 1 ms at 4, and four arrays of 1 KiB do that."""

_ERROR = b"shmE"
_ENDED = 1 << 63
_ABSENT = (1 << 62, 0)
"""In place of the words of a rank that has left: it is neither behind nor ahead, but not there, which `_dead` finds."""
_DEATH_S = 2.0
"""A socket is closed a little before the lock of its dead process is gone; how long to wait for that at most."""
_LINGER_S = 5.0


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
        channel: Literal["auto", "group"] = "auto",
    ) -> None:
        """``cpu_group``: a gloo group of ``torch.distributed``; None: the default group, or, where there is none, this
        process alone. ``entry``: the rank within the group that sends. ``timeout``: seconds that a rank may make the
        others wait; None: as the process group was made. ``channel="group"``: over the process group in any case.

        The rest is the entry rank's to say; what other ranks pass is not looked at. ``arena``: one to publish in, which
        stays open; None: one of ``max_bytes``, which is closed with the group. ``fallback``: what all ranks do if they
        do not share memory: "raise", or send pickles ("object"), with a warning on the entry rank. ``min_bytes``: arrays
        that are smaller stay in the pickle.

        Raises on all ranks alike: GroupError (memory is not shared, and why, by rank), PeerLostError, GroupTimeoutError.
        ValueError for arguments that are wrong on this rank."""
        if fallback not in ("raise", "object"):
            raise ValueError(f"fallback is 'raise' or 'object', not {fallback!r}")
        self._channel: Channel
        self._channel = rendezvous = _rendezvous(cpu_group, entry, timeout, channel)
        self.rank = rendezvous.rank
        """Of this process, within the group."""
        self.size = rendezvous.size
        """How many ranks there are."""
        self.entry = rendezvous.entry
        """The rank that sends."""
        self.peers: tuple[Peer, ...] = ()
        """Process tokens by rank; see `shmcast.process_token`."""
        self.mode: Literal["shared", "object"] = "shared"
        """Whether arrays travel through shared memory, or everything as a pickle."""
        self._token = _native.process_token()
        self._others: tuple[Peer, ...] = ()
        self._memory: meeting.Memory | None = None
        self._min_bytes = min_bytes
        self._timeout = timeout
        self._step = 0
        self._sent: deque[_Sent] = deque()
        self._broken: GroupError | None = None
        self._closed = False
        self._busy = threading.Lock()
        self._counts = dict.fromkeys(
            (
                "messages",
                "message_bytes",
                "arrays",
                "array_bytes",
                "passed_on",
                "inline_bytes",
                "errors",
                "encode_ns",
                "attach_ns",
            ),
            0,
        )
        try:
            self._memory, refusal = meeting.meet(rendezvous, arena, max_bytes, fallback, timeout)
        except BaseException:
            rendezvous.close()
            raise
        if self._memory is not None:
            self.peers = self._memory.peers
            self._others = tuple(peer for peer in self.peers if peer != self._token)
        else:
            self.mode = "object"
            if self.rank == entry:
                warnings.warn(f"shmcast sends pickles in this group: {refusal}", RuntimeWarning, stacklevel=2)

    # ---- broadcast

    def broadcast(self, tree: Any = None, *, local: bool = False) -> Any:
        """Send a tree from the entry rank to all ranks; every rank gets it back, made of views of the same memory.

        ``tree``: anything that can be pickled; large ndarrays and CPU tensors in it are published, and arrive as read-only
        ndarrays and copy-on-write tensors, which live as long as one keeps them. Views of blocks, of whatever arena,
        travel without a copy. What finds no room in the arena travels in the message (`stats`: ``inline_bytes``). On the
        other ranks ``tree`` is ignored, as it is by ``torch.distributed.broadcast``: an error there would come too late for
        the ranks that wait. ``local``: on the entry rank, return ``tree`` itself instead of views.

        If the tree can not be encoded, the entry rank raises what encoding raised and the others GroupError with its
        text; if it can not be rebuilt on a rank, that rank raises the cause where it is one of shmcast's, else
        GroupError. The group stays usable after that. After PeerLostError, GroupTimeoutError and any other GroupError that
        the channel raises it is broken on all ranks, and every later call says so."""
        if not self._busy.acquire(blocking=False):
            raise GroupError("broadcast: one is under way in another thread, or in a method that pickle has called")
        try:
            self._check_usable()
            return self._send(tree, local) if self.rank == self.entry else self._receive()
        finally:
            self._busy.release()

    def stats(self) -> dict[str, int]:
        """Counts since the group was made: messages, their bytes, and how many did not fit the fixed-size frame; time in
        ``encode_ns`` (pickle and publish) and ``attach_ns`` (attach and rebuild); on the entry rank also arrays and bytes that were
        published, arrays passed on, bytes that travelled in messages for want of room; errors; messages that are not
        known to have been taken in by all ranks."""
        return {
            **self._counts,
            "overflows": self._channel.overflows,
            "step": self._step,
            "unconfirmed": len(self._sent),
        }

    def close(self) -> None:
        """End the group on this rank. Involves no collective; views stay valid. Idempotent.

        It waits up to 5 s for ranks that live and have not taken in the last message yet. Then the entry rank takes back
        what nobody took, and closes the arena, unless it was given one."""
        if self._closed:
            return
        self._closed = True
        if self._member is not None and self._broken is None:
            self._linger()
            self._member.set_step(_ENDED | 2 * self._step)
        self._abandon()

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "broken" if self._broken else self.mode
        return f"<Group rank {self.rank} of {self.size}, entry {self.entry}, {state}, step {self._step}>"

    # ---- the entry rank

    def _send(self, tree: Any, local: bool) -> Any:
        self._drop_confirmed()
        step = self._step + 1
        began_ns = time.monotonic_ns()
        try:
            encoded = self._encode(tree)
            self._counts["encode_ns"] += time.monotonic_ns() - began_ns
        except PeerLostError as error:
            raise self._break(error) from error
        except BaseException as error:
            # Sent whatever it was, so that the others do not wait for a message that never comes.
            self._counts["errors"] += 1
            self._transmit(_describe_error(error))
            self._step = step
            self._taken_in(failed=True)
            raise
        try:
            self._transmit(encoded.blob)
            self._step = step
            self._count(encoded)
            own = tree if local else self._rebuild(encoded.blob)
            self._taken_in()
            return own
        finally:
            if self._memory is not None:
                self._memory.release(encoded.handles)
            # Also where the channel has failed: some ranks may have got it all the same.
            if self._others and (encoded.handles or encoded.leases):
                self._sent.append(_Sent(step, encoded.handles, encoded.leases))

    def _encode(self, tree: Any) -> codec.Encoded:
        if self._memory is None:
            encoded = codec.Encoded(None)
            encoded.blob = pickle.dumps(tree, 5)
            return encoded
        return codec.encode(
            tree,
            self._memory.arena,
            tokens=self._others,
            keep=True,
            grant_timeout=None,
            min_bytes=self._min_bytes,
            on_full="inline",
        )

    def _count(self, encoded: codec.Encoded) -> None:
        counts = self._counts
        counts["arrays"] += len(encoded.handles)
        counts["array_bytes"] += sum([handle.nbytes for handle in encoded.handles])
        counts["passed_on"] += len(encoded.leases)
        counts["inline_bytes"] += encoded.inline_bytes

    def _drop_confirmed(self) -> None:
        """Forget messages that every rank has taken in or will never take in.

        A block that was passed on is held until then: its owner may revoke our grants at its own deadline."""
        if not self._sent or self._memory is None:
            return
        words = self._memory.member.steps()
        low, failed = self._step, 0
        for token in self._others:
            word, failed_word = words.get(token, _ABSENT)
            if word < _ABSENT[0]:
                low, failed = min(low, word >> 1), max(failed, failed_word >> 1)
        while self._sent and self._sent[0].step <= low:
            sent = self._sent.popleft()
            if failed >= sent.step:
                self._memory.withdraw(sent.handles)

    # ---- the other ranks

    def _receive(self) -> Any:
        blob = self._transmit(None)
        self._step += 1
        if blob[:4] == _ERROR:
            self._counts["errors"] += 1
            self._taken_in(failed=True)
            raise GroupError(f"broadcast, step {self._step}: {_error_text(blob, self.entry)}")
        tree = self._rebuild(blob)
        self._taken_in()
        return tree

    # ---- every rank

    @property
    def _member(self) -> _native.Member | None:
        """This process in the entry rank's arena, where memory is shared and this is no forked child."""
        member = None if self._memory is None else self._memory.member
        return None if member is None or member.inherited else member

    def _transmit(self, blob: bytes | None) -> bytes:
        """Through the channel; whatever goes wrong there breaks the group."""
        if self._member is not None:
            self._member.set_step(2 * self._step + 1)
        try:
            blob = self._channel.broadcast(blob, timeout=self._timeout, watch=self._watch)
        except GroupError as error:
            raise self._break(error) from error
        except BaseException as error:
            self._break(GroupError(f"interrupted by {type(error).__name__}"))
            raise
        self._counts["messages"] += 1
        self._counts["message_bytes"] += len(blob)
        return blob

    def _rebuild(self, blob: bytes) -> Any:
        began_ns = time.monotonic_ns()
        try:
            tree = pickle.loads(blob) if self.mode == "object" else codec.loads(blob)
            self._counts["attach_ns"] += time.monotonic_ns() - began_ns
            return tree
        except BaseException as error:
            self._counts["errors"] += 1
            self._taken_in(failed=True)
            if isinstance(error, ShmcastError) and self._ended(self._step - 1):
                # Not the tree's fault: whoever saw the group break while this was sent has taken the grants back.
                raise self._break(PeerLostError(f"broadcast, step {self._step}: {error}")) from error
            if isinstance(error, ShmcastError) or not isinstance(error, Exception):
                raise
            raise GroupError(
                f"broadcast, step {self._step}: rank {self.rank} can not rebuild the tree: {type(error).__name__}: {error}"
            ) from error

    def _taken_in(self, failed: bool = False) -> None:
        if self._member is not None:
            self._member.set_step(2 * self._step, failed)

    def _check_usable(self) -> None:
        if self._closed:
            raise GroupError("broadcast: the group is closed")
        if self._token != _native.process_token():
            raise GroupError("broadcast: this process was forked from a rank; it is none itself")
        if self._broken is not None:
            raise GroupError(
                f"broadcast: the group is broken since step {self._step + 1}: {self._broken}"
            ) from self._broken
        ended = self._ended()
        if ended:
            raise self._break(self._gave_up(ended))

    # ---- what breaks a group

    def _break(self, cause: GroupError) -> GroupError:
        """Record that the group is of no use any more, here and for the other ranks to see; returns what to raise."""
        error = self._diagnose(cause)
        self._broken = error
        if self._member is not None:
            self._member.set_step(_ENDED | 2 * self._step, True)
        return error

    def _watch(self) -> None:
        """Called while a rank waits: what no socket of this rank tells."""
        dead = self._dead()
        if dead:
            raise self._lost(dead)
        ended = self._ended()
        if ended:
            raise self._gave_up(ended)

    def _diagnose(self, cause: GroupError) -> GroupError:
        """The same error with the names of the ranks concerned, as far as shared memory tells."""
        if self._member is None:
            return cause
        # A connection that breaks has a reason, which may be seen a little later; other causes need none.
        lost = isinstance(cause, PeerLostError)
        deadline = time.monotonic() + (_DEATH_S if lost else 0.0)
        while True:
            dead, ended = self._dead(), self._ended()
            if dead or ended or time.monotonic() >= deadline:
                break
            time.sleep(0.005)
        if dead:
            return self._lost(dead, cause)
        if not lost and not isinstance(cause, GroupTimeoutError):
            return cause
        late = ", ".join(f"rank {rank} is at step {word >> 1}" for rank, word in self._behind(2 * self._step + 1))
        if late:
            # Who times out closes connections, which others see as a loss: the reason is still who is late.
            return GroupTimeoutError(f"broadcast: {late}, this is step {self._step + 1}; {cause}")
        return self._gave_up(ended, cause) if ended else cause

    def _lost(self, ranks: list[int], cause: GroupError | None = None) -> PeerLostError:
        text = f"broadcast, step {self._step + 1}: {_ranks(ranks)} died or closed the group"
        return PeerLostError(text if cause is None else f"{text}; {cause}")

    def _gave_up(self, ranks: list[int], cause: GroupError | None = None) -> GroupError:
        text = f"broadcast, step {self._step + 1}: {_ranks(ranks)} closed the group or gave it up before"
        return GroupError(text if cause is None else f"{text}; {cause}")

    def _dead(self) -> list[int]:
        """Ranks whose process has died; else ranks that have left, which is also what the dead look like once they have
        been swept. Costs some 10 µs a rank."""
        member = self._member
        if member is None:
            return []
        there = member.tokens()
        others = [rank for rank, token in enumerate(self.peers) if token != self._token]
        died = [rank for rank in others if self.peers[rank] in there and not self._lives(member, rank)]
        return died or [rank for rank in others if self.peers[rank] not in there]

    def _lives(self, member: _native.Member, rank: int) -> bool:
        try:
            return member.alive(self.peers[rank])
        except OSError:
            # The arena's name is gone: the entry rank closed it, or it died and was swept. Of the others nothing is known.
            return rank != self.entry

    def _ended(self, step: int | None = None) -> list[int]:
        """Ranks that will take in no message after ``step``, by default the last that this rank has taken in."""
        step = self._step if step is None else step
        if self._member is None or not self._others:
            return []
        words = self._member.steps()
        return [
            rank
            for rank, token in enumerate(self.peers)
            if (words.get(token, _ABSENT)[0] ^ _ENDED) >> 1 <= step and token != self._token
        ]

    def _behind(self, word: int) -> list[tuple[int, int]]:
        """``[(rank, its word)]`` of those that live and go on, and have not come as far as ``word``."""
        member = self._member
        if member is None:
            return []
        words = member.steps()
        found = [(rank, words.get(token, _ABSENT)[0]) for rank, token in enumerate(self.peers) if token != self._token]
        return [(rank, at) for rank, at in found if at < word and self._lives(member, rank)]

    # ---- the end

    def _linger(self) -> None:
        """Wait for ranks that are there and have not taken in the last message: they need the arena for it, and to them a
        rank that has left looks like one that has died."""
        deadline = time.monotonic() + _LINGER_S
        pause = 0.0001
        while self._behind(2 * self._step) and time.monotonic() < deadline:
            time.sleep(pause)
            pause = min(2 * pause, 0.01)

    def _abandon(self) -> None:
        memory, self._memory = self._memory, None
        sent, self._sent = self._sent, deque()
        if memory is not None:
            # Grants in an arena that is closed with the group end with it.
            if not memory.owned and not memory.member.inherited:
                for message in sent:
                    memory.withdraw(message.handles)
            memory.give_up()
        self._channel.close()


def _rendezvous(cpu_group: Any, entry: int, timeout: float | None, channel: str) -> Rendezvous:
    if channel not in ("auto", "group"):
        raise ValueError(f"channel is 'auto' or 'group', not {channel!r}")
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


def _describe_error(error: BaseException) -> bytes:
    try:
        text, trace = str(error), "".join(traceback.format_exception(error))
    except Exception as second:  # the others wait for a message, whatever the error's own __str__ does
        text, trace = f"its text can not be had: {type(second).__name__}", ""
    return _ERROR + json.dumps({"type": type(error).__name__, "text": text, "traceback": trace}).encode()


def _error_text(blob: bytes, entry: int) -> str:
    error = json.loads(blob[len(_ERROR) :])
    return f"rank {entry} could not encode the tree: {error['type']}: {error['text']}\n{error['traceback']}"


def _ranks(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
