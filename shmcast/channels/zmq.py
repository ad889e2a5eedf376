"""`send` and `recv`: object trees over a ZeroMQ socket, beside pyzmq's own ``send_pyobj`` and ``recv_pyobj``.

From a process that has materialized (a tokenizer) to one that has not (rank 0), over whatever socket the engine has: PUSH,
PAIR, DEALER, PUB. A message is one frame, what `codec.dumps` writes; arrays lie in the sender's arena. Sockets of
``zmq.asyncio`` work as well: both functions return what can be awaited then.

A feature that is sent several times is shared first, and lives until the sender lets go of it *and* every process that a
message was meant for has let go of what it got::

    features = shmcast.share(materialize(request), arena)   # one pass over the bytes: copy and hash
    for rid in (warm_up, *samples):
        send(socket, {"rid": rid, "features": features}, arena)   # about 100 bytes an array
    del features                                            # once the request has ended

What was sent and never read is taken back after the arena's ``grant_timeout``, where its owner needs the room.
"""

import sys
from functools import partial
from typing import Any

import zmq

from .. import codec
from ..arena import DEFAULT, Arena
from ..codec import Encoded, OnFull
from ..content import Hash
from ..errors import HandleError
from ..terms import Readers


def send(
    socket: "zmq.Socket[Any]",
    tree: Any,
    arena: Arena | None = None,
    *,
    flags: int = 0,
    readers: Readers = 1,
    min_bytes: int = codec.MIN_BYTES,
    on_full: OnFull = "inline",
    hash: Hash = True,
    grant_timeout: float | None = DEFAULT,
    timeout: float = 0.0,
) -> Any:
    """Send a tree; on a socket of ``zmq.asyncio``, return the future of that.

    ``tree``, ``arena``, ``readers`` and the rest: see `codec.dumps`; what finds no room in the arena travels in the message
    unless ``on_full="raise"``. ``readers``: how many processes get this message, one unless the socket is a PUB. ``flags``:
    as for ``socket.send``.

    Raises what the socket raises (``zmq.Again``, ``zmq.ZMQError``) and what `codec.dumps` raises, and UnsupportedArrayError
    for a large tensor that is not in host memory. Nothing stays published for a message that was not sent."""
    encoded = codec.encode(
        tree,
        arena,
        readers=readers,
        min_bytes=min_bytes,
        on_full=on_full,
        hash=hash,
        grant_timeout=grant_timeout,
        timeout=timeout,
        refuse_devices=True,
    )
    try:
        sent: Any = socket.send(encoded.blob, flags)
    except BaseException:
        encoded.withdraw()
        raise
    if sent is not None and hasattr(sent, "add_done_callback"):
        sent.add_done_callback(partial(_sent, encoded))
    return sent


def recv(socket: "zmq.Socket[Any]", *, flags: int = 0, allow_pickle: bool = True) -> Any:
    """The tree of the next message; on a socket of ``zmq.asyncio``, what to await for it. Its large arrays are views.

    Unpickles: only from processes that you trust, unless ``allow_pickle=False``; see `codec.loads`, which also says what is
    raised for a message that is none, or whose arrays are gone. That concerns this message alone: the next `recv` gets the
    next one. ``flags``: as for ``socket.recv``, whose errors (``zmq.Again``, ``zmq.ZMQError``) are raised. On a socket of
    ``zmq.asyncio``, a `recv` that is cancelled after its message has come drops the message, and the blocks that were promised
    with it stay until the ``grant_timeout`` of their arena."""
    asyncio = sys.modules.get("zmq.asyncio")
    if asyncio is not None and isinstance(socket, asyncio.Socket):
        return _recv_later(socket, flags, allow_pickle)
    return _read(socket.recv_multipart(flags), allow_pickle)


async def _recv_later(socket: Any, flags: int, allow_pickle: bool) -> Any:
    # Not `recv_serialized`: a wait of its that was cancelled still takes what comes in the same turn of the loop.
    return _read(await socket.recv_multipart(flags), allow_pickle)


def _read(frames: "list[Any]", allow_pickle: bool) -> Any:
    if len(frames) != 1:
        raise HandleError(f"receive from a socket: a message of {len(frames)} frames, 1 was expected")
    return codec.loads(frames[0], allow_pickle=allow_pickle)


def _sent(encoded: Encoded, future: Any) -> None:
    """Of a future that has ended: what was not sent is nobody's."""
    if future.cancelled() or future.exception() is not None:
        encoded.withdraw()
