"""Over ZMQ from who materializes, the tokenizer or the entry rank, to each rank that does not: no process group. No torch here.

`eager` sends the finished object, pickled, as the origin of this project had it; `shm-zmq` sends handles the same way, with
`shmcast.channels.zmq`. Nobody agrees on anything: how a request goes on from rank 0 to the others is in `shm`, with a
tokenizer too.
"""

from __future__ import annotations

import pickle
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import zmq

import shmcast
from shmcast.channels import zmq as trees
from tp.in_place import InPlace, views
from tp.inputs import Inputs
from tp.records import Arrival
from tp.strategies import Strategy, TokenizerSide
from tp.workloads import Features, NewArray

if TYPE_CHECKING:
    from tp.rank import Rank
    from tp.tokenizer import Tokenizer

HELLO = b""  # the first message of a connection: who has it is connected


class Out:
    """A socket to one rank, which counts what goes through it."""

    def __init__(self, context: zmq.Context[Any], address: str) -> None:
        self.nbytes = 0
        self._socket = context.socket(zmq.PUSH)
        self._socket.connect(address)

    def send(self, payload: bytes, flags: int = 0) -> None:
        """As of a socket; what is large is not copied first."""
        self._socket.send(payload, flags, copy=False)
        self.nbytes += len(payload)


class Sender(ABC):
    """In the process that materializes: sockets to the ranks that do not, and what goes through them."""

    def __init__(self, inputs: Inputs, addresses: Sequence[str]) -> None:
        self.inputs = inputs
        self.reserve_ns = self.seal_ns = 0  # of the last request, where it was materialized in place
        self._context = zmq.Context[Any]()
        self.outs: list[Any] = [Out(self._context, address) for address in addresses]
        for out in self.outs:
            out.send(HELLO)

    @abstractmethod
    def make(self, materialize: Callable[[NewArray], Features]) -> Features:
        """Materialize one request."""

    @abstractmethod
    def pack(self, features: Features) -> Any:
        """What `send` shall have of it: once, however many ranks there are."""

    @abstractmethod
    def send(self, packed: Any) -> None:
        """To each rank."""

    @property
    def nbytes(self) -> int:
        """Sent so far."""
        return sum(out.nbytes for out in self.outs)

    def close(self) -> None:
        """Outside every window."""
        self._context.destroy(linger=0)


class Pickles(Sender):
    """As `send_pyobj` does it, but pickled once for all ranks."""

    def make(self, materialize: Callable[[NewArray], Features]) -> Features:
        return materialize(np.empty)

    def pack(self, features: Features) -> bytes:
        return pickle.dumps(features, protocol=5)

    def send(self, packed: bytes) -> None:
        for out in self.outs:
            out.send(packed)


class Handles(Sender):
    """Materialized in an arena of this process."""

    def __init__(self, inputs: Inputs, addresses: Sequence[str]) -> None:
        super().__init__(inputs, addresses)
        self.producer = InPlace(inputs)

    def make(self, materialize: Callable[[NewArray], Features]) -> Features:
        meta, parts = self.producer.materialize(materialize)
        self.reserve_ns, self.seal_ns = self.producer.reserve_ns, self.producer.seal_ns
        return views(meta, parts)

    def pack(self, features: Features) -> Features:
        shared: Features = shmcast.share(features, self.producer.arena, hash=False)
        return shared

    def send(self, packed: Features) -> None:
        for out in self.outs:
            trees.send(out, packed, self.producer.arena, hash=False)

    def close(self) -> None:
        super().close()
        self.producer.arena.close()


class Eager(Strategy):
    """Request by request; who has materialized keeps what it has, the others receive it."""

    sender: ClassVar[type[Sender]] = Pickles

    def __init__(self, rank: Rank) -> None:
        super().__init__(rank)
        self._context = zmq.Context[Any]()
        self._socket: Any = None
        self._sender: Sender | None = None

    def setup(self) -> None:
        rank = self.rank
        if rank.is_entry and rank.inbox is None:
            self._sender = self.sender(rank.inputs, _addresses(self.sender, rank.inputs, range(1, rank.size)))
            return
        self._socket = self._context.socket(zmq.PULL)
        self._socket.bind(*_addresses(self.sender, rank.inputs, [rank.rank]))
        self._wait("the first message")
        self._socket.recv()

    def serve(self, batch: Sequence[int]) -> None:
        for i in batch:
            features = self._receive(i) if self._sender is None else self._produce(i, self._sender)
            self.rank.consume(i, features)

    def teardown(self) -> None:
        self._context.destroy(linger=0)
        if self._sender is not None:
            self._sender.close()

    def read(self, socket: Any) -> Features:
        """The next message, which is there."""
        features: Features = pickle.loads(socket.recv(copy=False).buffer)
        return features

    def _produce(self, index: int, sender: Sender) -> Features:
        rank, before = self.rank, sender.nbytes
        features = sender.make(lambda new: rank.materialize(index, new))
        record = rank.records[index]
        record.materialize_ns -= sender.reserve_ns
        record.publish_ns += sender.reserve_ns + sender.seal_ns
        rank.sending(index)
        with rank.span("publish", index):
            packed = sender.pack(features)
        rank.messaging(index)
        sender.send(packed)
        rank.received(index)
        rank.usable(index)
        rank.collectives.count(len(sender.outs), 0, sender.nbytes - before)
        return features

    def _receive(self, index: int) -> Features:
        rank = self.rank
        self._wait(f"request {index}")
        rank.received(index)
        with rank.span("attach", index):
            features = self.read(self._socket)
        rank.usable(index)
        if rank.is_entry:  # the tokenizer has sent it, to all ranks
            arrival = rank.arrival(index)
            rank.records[index].message_ns = arrival.materialized_ns + arrival.publish_ns
            rank.collectives.count(rank.size, 0, arrival.payload_bytes)
        return features

    def _wait(self, what: str) -> None:
        timeout_s = self.rank.config.timeout_s
        if not self._socket.poll(round(timeout_s * 1000)):
            raise TimeoutError(f"receive {what} over ZMQ: nothing in {timeout_s:.0f} s")


class EagerTokenizer(TokenizerSide):
    """The tokenizer materializes, and sends to each rank itself."""

    sender: ClassVar[type[Sender]] = Pickles

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        inputs = tokenizer.inputs
        self._sender = self.sender(inputs, _addresses(self.sender, inputs, range(tokenizer.config.tp)))

    def serve(self, index: int) -> None:
        sender, before = self._sender, self._sender.nbytes
        start_ns = time.monotonic_ns()
        features = sender.make(lambda new: self.tokenizer.materialize(index, new))
        made_ns = time.monotonic_ns()
        packed = sender.pack(features)
        publish_ns = sender.reserve_ns + sender.seal_ns + time.monotonic_ns() - made_ns
        materialized_ns = time.monotonic_ns() - publish_ns
        sender.send(packed)
        self.tokenizer.tell(Arrival(sender.nbytes - before, materialized_ns, materialized_ns - start_ns, publish_ns))

    def teardown(self) -> None:
        self._sender.close()


class ShmZmq(Eager):
    """The same with handles; what a rank receives are views."""

    sender = Handles

    def read(self, socket: Any) -> Features:
        features: Features = trees.recv(socket)
        return features


class ShmZmqTokenizer(EagerTokenizer):
    """The same with handles."""

    sender = Handles


def _addresses(sender: type[Sender], inputs: Inputs, ranks: Sequence[int]) -> list[str]:
    return [f"ipc://{inputs.directory}/{sender.__name__}.{rank}" for rank in ranks]
