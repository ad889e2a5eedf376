"""Strategies over the process group alone: what engines did before shared memory."""

from __future__ import annotations

import math
import pickle
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tp.rank import Rank
from tp.strategies import Strategy
from tp.workloads import Array, Features

Layout = tuple[tuple[int, ...], np.dtype[Any]]


class Replicate(Strategy):
    """Every rank materializes the raw request that it already has. No message at all."""

    def serve(self, batch: Sequence[int]) -> None:
        rank = self.rank
        for i in batch:
            rank.sending(i)
            rank.received(i)
            features = rank.materialize(i)
            rank.usable(i)
            rank.consume(i, features)


class Raw(Strategy):
    """The entry rank broadcasts the raw requests of a batch, every rank materializes them (delayed materialization)."""

    def serve(self, batch: Sequence[int]) -> None:
        rank = self.rank
        payload = None
        if rank.is_entry:
            rank.sending(*batch)
            with rank.span("publish", *batch):
                payload = rank.collectives.pickle([rank.raw(i) for i in batch])
            rank.messaging(*batch)
        message = rank.collectives.broadcast(payload)
        rank.received(*batch)
        with rank.span("attach", *batch):
            raws = pickle.loads(message)
        for i, raw in zip(batch, raws, strict=True):
            with rank.span("materialize", i):
                features = rank.make(i, raw)
            rank.usable(i)
            rank.consume(i, features)


class Object(Strategy):
    """The entry rank materializes and broadcasts the pickled object, request by request."""

    def serve(self, batch: Sequence[int]) -> None:
        for i in batch:
            (features,) = self.share([i])
            self.rank.usable(i)
            self.rank.consume(i, features)

    def share(self, batch: Sequence[int]) -> list[Features]:
        """Materialize these requests on the entry rank; one message; the objects on every rank."""
        rank = self.rank
        if not rank.is_entry:
            message = rank.collectives.broadcast(None)
            rank.received(*batch)
            with rank.span("attach", *batch):
                received: list[Features] = pickle.loads(message)
            return received
        made = [rank.produce(i) for i in batch]
        rank.sending(*batch)
        with rank.span("publish", *batch):
            payload = rank.collectives.pickle(made)
        rank.messaging(*batch)
        rank.collectives.broadcast(payload)
        rank.received(*batch)
        return made


class ObjectBatch(Object):
    """One message for all requests of a batch into a bounded FIFO of results; what is not there is made locally.

    As the origin wrote it: every rank has the raw requests too, and a rank for which the message failed, or whose
    FIFO has dropped a result before it was asked for, materializes for itself.
    """

    CAPACITY = 64  # results

    def setup(self) -> None:
        self.results: OrderedDict[int, Features] = OrderedDict()

    def serve(self, batch: Sequence[int]) -> None:
        rank = self.rank
        try:
            shared = self.share(batch)
        except (RuntimeError, pickle.PickleError) as error:  # gloo raises RuntimeError
            rank.report(f"object-batch: broadcast failed, materializing locally: {error}")
        else:
            for i, features in zip(batch, shared, strict=True):
                self.results[i] = features
                if len(self.results) > self.CAPACITY:
                    self.results.popitem(last=False)
            del shared, features
        rank.usable(*batch)
        for i in batch:
            result = self.results.pop(i, None)
            if result is None:
                rank.fallbacks += 1
                result = rank.materialize(i)
                rank.usable(i)
            rank.consume(i, result)

    def teardown(self) -> None:
        self.results.clear()


class Tensor(Strategy):
    """Shapes in one small message, then `dist.broadcast` of each array into a tensor that is already there.

    Arrays smaller than `PACKED_BYTES` are packed into one, since a broadcast costs as much as copying that many bytes.
    """

    PACKED_BYTES = 1 << 20

    def __init__(self, rank: Rank) -> None:
        super().__init__(rank)
        self._pool: list[Array] = []  # uint8, grown when one is too small; the first for what is packed

    def serve(self, batch: Sequence[int]) -> None:
        rank = self.rank
        if rank.is_entry:
            made = [rank.produce(i) for i in batch]
            rank.sending(*batch)
            with rank.span("publish", *batch):
                payload = rank.collectives.pickle([(f.meta, [(a.shape, a.dtype) for a in f.arrays]) for f in made])
            rank.messaging(*batch)
            rank.collectives.broadcast(payload)
        else:
            made = self._receivers(pickle.loads(rank.collectives.broadcast(None)))
        small = [a for f in made for a in f.arrays if a.nbytes < self.PACKED_BYTES]
        tensors = [_flat(a) for f in made for a in f.arrays if a.nbytes >= self.PACKED_BYTES]
        packed = self._take(0, (sum(a.nbytes for a in small),), np.dtype(np.uint8))
        if small:
            if rank.is_entry:
                np.concatenate([a.reshape(-1).view(np.uint8) for a in small], out=packed)
            tensors.append(_flat(packed))
        rank.collectives.broadcast_arrays(tensors)
        del tensors, small
        rank.received(*batch)
        rank.usable(*batch)
        for i, features in zip(batch, made, strict=True):
            rank.consume(i, features)

    def _receivers(self, message: list[tuple[dict[str, Any], list[Layout]]]) -> list[Features]:
        """Arrays over the pool, of the layouts that the message names."""
        sizes = [_nbytes(layout) for _, layouts in message for layout in layouts]
        packed = self._take(0, (sum(size for size in sizes if size < self.PACKED_BYTES),), np.dtype(np.uint8))
        made, large, at = [], 0, 0
        for meta, layouts in message:
            arrays = []
            for shape, dtype in layouts:
                nbytes = _nbytes((shape, dtype))
                if nbytes < self.PACKED_BYTES:
                    arrays.append(packed[at : at + nbytes].view(dtype).reshape(shape))
                    at += nbytes
                else:
                    large += 1
                    arrays.append(self._take(large, shape, dtype))
            made.append(Features(meta, arrays))
        return made

    def _take(self, at: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        nbytes = _nbytes((shape, dtype))
        if at == len(self._pool):
            self._pool.append(np.empty(0, np.uint8))
        if len(self._pool[at]) < nbytes:
            self._pool[at] = np.empty(nbytes, np.uint8)
        return self._pool[at][:nbytes].view(dtype).reshape(shape)


def _nbytes(layout: Layout) -> int:
    shape, dtype = layout
    return math.prod(shape) * dtype.itemsize


def _flat(array: Array) -> torch.Tensor:
    return torch.from_numpy(array.reshape(-1).view(np.uint8))
