"""`channels.zmq`: trees over sockets, sync and asyncio; what is sent n times is published once, and what is not sent, not at all."""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import Iterator

import numpy as np
import pytest

import shmcast
from shmcast.errors import ArenaFullError, ArenaGoneError, HandleError, StaleHandleError, UnsupportedArrayError

pytest.importorskip("zmq")
pytestmark = pytest.mark.zmq

import zmq  # noqa: E402
import zmq.asyncio  # noqa: E402

from shmcast.attach import lease_of  # noqa: E402
from shmcast.channels.zmq import recv, send  # noqa: E402

SIZE = 50_000


def features(value: int = 1) -> dict[str, object]:
    return {"pixels": np.full(SIZE, value, "uint8"), "grid": (1, 2, 3), "small": np.arange(4)}


def is_alike(tree, value: int = 1) -> bool:
    return (
        bool((tree["pixels"] == value).all()) and tree["grid"] == (1, 2, 3) and tree["small"].tolist() == [0, 1, 2, 3]
    )


@pytest.fixture
def context() -> Iterator[zmq.Context]:
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


@pytest.fixture
def pair(context, tmp_path):
    """``pair(kind, other)``: two sockets that are connected."""

    def make(kind=zmq.PUSH, other=zmq.PULL, maker=context):
        address = f"ipc://{tmp_path}/{kind}-{other}"
        out, into = maker.socket(kind), maker.socket(other)
        into.bind(address)
        out.connect(address)
        return out, into

    return make


@pytest.fixture
def arena():
    with shmcast.Arena.create("4MiB", segment_bytes="4MiB") as arena:
        yield arena


def live(arena) -> int:
    gc.collect()
    return arena.stats()["slots_used"]


def copies(arena) -> int:
    """How often bytes were put into the arena."""
    counters = shmcast.metrics.snapshot(arena)["counters"]
    return counters["published"] - counters["aliased"]


# ---- there and back


@pytest.mark.parametrize(
    ("kind", "other"), [(zmq.PUSH, zmq.PULL), (zmq.PAIR, zmq.PAIR), (zmq.DEALER, zmq.DEALER), (zmq.REQ, zmq.REP)]
)
def test_there(arena, pair, kind, other) -> None:
    out, into = pair(kind, other)
    assert send(out, features(), arena) is None
    tree = recv(into)
    assert is_alike(tree)
    assert not tree["pixels"].flags.writeable
    assert live(arena) == 1
    del tree
    assert live(arena) == 0


def test_messages_are_small(arena, pair) -> None:
    out, into = pair()
    send(out, {"a": np.zeros(SIZE)}, arena)
    assert len(into.recv()) < 300


def test_without_an_arena(pair) -> None:
    out, into = pair()
    send(out, features())
    tree = recv(into)
    assert is_alike(tree)
    assert lease_of(tree["pixels"]) is None


def test_asyncio(arena, pair) -> None:
    async def run() -> None:
        context = zmq.asyncio.Context()
        out, into = pair(maker=context)
        waiting = asyncio.ensure_future(recv(into))
        await send(out, features(1), arena)
        await send(out, features(2), arena)
        assert is_alike(await waiting, 1)
        assert is_alike(await recv(into), 2)
        context.destroy(linger=0)

    asyncio.run(run())
    assert live(arena) == 0


def test_a_full_arena_travels_in_the_message(arena, pair) -> None:
    out, into = pair()
    kept = arena.publish(np.zeros(4_000_000, "uint8"), readers=0, keep=True)
    big = {"a": np.full(500_000, 3, "uint8")}
    with pytest.raises(ArenaFullError):
        send(out, big, arena, on_full="raise")
    send(out, big, arena)
    assert (recv(into)["a"] == 3).all()
    assert shmcast.metrics.snapshot(arena)["counters"]["inline_full"] == 1
    arena.release(kept)


def test_hashes_travel(arena, pair) -> None:
    out, into = pair()
    send(out, np.arange(SIZE), arena, hash="sha256")
    array = recv(into)
    assert shmcast.digest(array, hash="sha256") == shmcast.digest(np.arange(SIZE), hash="sha256")


# ---- sent n times


def test_n_sends_are_one_publish(arena, pair) -> None:
    out, into = pair()
    shared = shmcast.share(features(), arena)
    assert copies(arena) == 1
    send(out, {"rid": "warm-up", "features": shared}, arena)
    warm_up = recv(into)
    assert is_alike(warm_up["features"])
    del warm_up  # it has finished before the samples are sent
    for number in range(8):
        send(out, {"rid": number, "features": shared}, arena)
    del shared  # the request has ended here; what is under way lives on
    got = [recv(into) for _ in range(8)]
    assert [message["rid"] for message in got] == list(range(8))
    assert all(is_alike(message["features"]) for message in got)
    assert copies(arena) == 1
    del got
    assert live(arena) == 0


def test_one_message_for_several_readers(arena, pair, child, context, tmp_path) -> None:
    """PUB: as many readers as there are subscribers."""
    address = f"ipc://{tmp_path}/pub"
    out = context.socket(zmq.XPUB)
    out.xpub_verbose = 1  # every subscription is told, not each kind once
    out.bind(address)
    subscribers = [child(subscriber, address) for _ in range(3)]
    for _ in subscribers:
        out.recv()  # it is there
    send(out, features(), arena, readers=3)
    for peer in subscribers:
        assert peer.receive() is True
        peer.join()
    assert copies(arena) == 1
    assert live(arena) == 0


def subscriber(parent, address: str) -> None:
    context = zmq.Context()
    socket = context.socket(zmq.SUB)
    socket.connect(address)
    socket.subscribe(b"")
    parent.send(is_alike(recv(socket)))
    context.destroy(linger=0)


# ---- what is not sent is not published


def test_what_can_not_be_sent_is_taken_back(arena, context) -> None:
    out = context.socket(zmq.PUSH)
    out.bind("inproc://nobody")
    with pytest.raises(zmq.Again):
        send(out, features(), arena, flags=zmq.NOBLOCK)
    assert live(arena) == 0
    shared = shmcast.share(features(), arena)
    with pytest.raises(zmq.Again):
        send(out, shared, arena, flags=zmq.NOBLOCK)
    assert live(arena) == 1
    out.close()
    with pytest.raises(zmq.ZMQError):
        send(out, shared, arena)
    assert live(arena) == 1
    del shared
    assert live(arena) == 0


def test_a_future_that_is_cancelled_or_fails_takes_back(arena) -> None:
    async def run() -> None:
        context = zmq.asyncio.Context()
        out = context.socket(zmq.PUSH)
        out.bind("inproc://nobody")
        sent = send(out, features(), arena)
        assert not sent.done()
        assert live(arena) == 1
        sent.cancel()
        await asyncio.sleep(0)
        assert live(arena) == 0
        with pytest.raises(zmq.Again):
            await send(out, features(), arena, flags=zmq.NOBLOCK)
        await asyncio.sleep(0)
        assert live(arena) == 0
        late = send(out, features(), arena)
        out.close(linger=0)
        with pytest.raises((asyncio.CancelledError, zmq.ZMQError)):
            await late
        await asyncio.sleep(0)
        assert live(arena) == 0
        context.destroy(linger=0)

    asyncio.run(run())


def test_what_can_not_be_pickled_is_not_published(arena, pair) -> None:
    out, _ = pair()
    with pytest.raises(TypeError):
        send(out, [features(), (item for item in ())], arena)
    assert live(arena) == 0


@pytest.mark.torch
def test_a_tensor_that_is_not_in_host_memory_is_refused(arena, pair) -> None:
    import torch

    out, into = pair()
    elsewhere = torch.empty(SIZE, device="meta")  # what there is without a GPU
    with pytest.raises(UnsupportedArrayError, match="meta"):
        send(out, {"ours": np.zeros(SIZE), "theirs": elsewhere}, arena)
    assert live(arena) == 0
    send(out, {"ours": np.zeros(SIZE)}, arena)
    recv(into)


# ---- what comes is looked at


@pytest.mark.parametrize("frames", [[b""], [b"garbage" * 100], [b"shmT" + bytes(100)], [b"one", b"two"]])
def test_garbage_concerns_one_message(arena, pair, frames) -> None:
    out, into = pair()
    send(out, features(1), arena)
    out.send_multipart(frames)
    send(out, features(2), arena)
    assert is_alike(recv(into), 1)
    with pytest.raises(HandleError):
        recv(into)
    assert is_alike(recv(into), 2)


def test_garbage_over_asyncio(arena, pair) -> None:
    async def run() -> None:
        context = zmq.asyncio.Context()
        out, into = pair(maker=context)
        await out.send(b"garbage")
        await send(out, features(2), arena)
        with pytest.raises(HandleError):
            await recv(into)
        assert is_alike(await recv(into), 2)
        context.destroy(linger=0)

    asyncio.run(run())


def test_a_recv_that_is_cancelled_before_takes_nothing(arena, pair) -> None:
    """Begun or not: what is sent after that is the next one's, also in the same turn of the loop."""

    async def run() -> None:
        context = zmq.asyncio.Context()
        out, into = pair(maker=context)
        for has_begun in (False, True):
            waiting = asyncio.ensure_future(recv(into))
            if has_begun:
                await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            await send(out, features(3), arena)
            assert is_alike(await asyncio.wait_for(recv(into), 20.0), 3)
        context.destroy(linger=0)

    asyncio.run(run())
    assert live(arena) == 0


def test_of_another_host(arena, pair) -> None:
    out, into = pair()
    handle = arena.publish(np.zeros(SIZE), readers=0, keep=True)
    stranger = handle._replace(host=handle.host ^ 1)
    send(out, features(1), arena)
    out.send(shmcast.dumps(stranger))
    assert is_alike(recv(into))
    with pytest.raises(HandleError, match="this is host"):
        shmcast.attach(recv(into))


def test_without_pickles(arena, pair) -> None:
    out, into = pair()
    send(out, features(), arena)
    assert is_alike(recv(into, allow_pickle=False))
    send(out, {"features": features(), "what": pytest.raises}, arena)
    with pytest.raises(HandleError, match="allow_pickle=False"):
        recv(into, allow_pickle=False)
    assert live(arena) == 0  # refused or not, the promise was kept


# ---- who dies


def tokenizer(parent, address: str) -> None:
    """Sends two messages, and waits."""
    context = zmq.Context()
    out = context.socket(zmq.PUSH)
    out.connect(address)
    arena = shmcast.Arena.create("4MiB")
    for value in (1, 2):
        send(out, features(value), arena)
    parent.send(arena.id)
    parent.receive()


def test_a_tokenizer_that_has_died(pair, child, context, tmp_path, namespace) -> None:
    into = context.socket(zmq.PULL)
    into.bind(f"ipc://{tmp_path}/late")
    peer = child(tokenizer, f"ipc://{tmp_path}/late")
    peer.receive()
    first = recv(into)
    peer.kill()
    assert is_alike(first)
    shmcast.sweep(namespace)
    with pytest.raises((ArenaGoneError, StaleHandleError)):
        recv(into)  # of the arena that was swept
    assert is_alike(first)  # what is held stays
    with shmcast.Arena.create("4MiB") as other:
        out = context.socket(zmq.PUSH)
        out.connect(f"ipc://{tmp_path}/late")
        send(out, features(5), other)
        assert is_alike(recv(into), 5)


def holder(parent, address: str) -> None:
    context = zmq.Context()
    socket = context.socket(zmq.PULL)
    socket.connect(address)
    kept = [recv(socket), recv(socket)]
    parent.send(len(kept))
    parent.receive()


def test_a_receiver_that_dies_gives_all_back(arena, child, context, tmp_path) -> None:
    out = context.socket(zmq.PUSH)
    out.bind(f"ipc://{tmp_path}/pull")
    peer = child(holder, f"ipc://{tmp_path}/pull")
    shared = shmcast.share(features(2), arena)
    send(out, features(1), arena)
    send(out, shared, arena)
    assert peer.receive() == 2
    assert live(arena) == 3  # two blocks, one of them sent under another handle
    peer.signal(signal.SIGKILL)
    peer.kill()
    shmcast.sweep()
    assert live(arena) == 1
    del shared
    assert live(arena) == 0


def test_what_nobody_reads_is_taken_back_when_room_is_needed(pair) -> None:
    out, into = pair()
    with shmcast.Arena.create("1MiB", grant_timeout=0.001) as arena:
        for value in range(100):
            send(out, {"a": np.full(400_000, value, "uint8")}, arena, timeout=60.0)
        seen = 0
        for value in range(100):
            try:
                assert (recv(into)["a"] == value).all()
                seen += 1
            except StaleHandleError:
                pass
        assert 1 <= seen < 100
        assert shmcast.metrics.snapshot(arena)["counters"]["inline_full"] == 0
