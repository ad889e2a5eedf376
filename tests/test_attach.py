"""Readers' side: leases, views that outlive them, the wrong handles, and other processes."""

import gc
import os
import random
import resource
import weakref

import numpy as np
import pytest

import shmcast
from shmcast import names
from shmcast.attach import lease_of
from shmcast.errors import (
    ArenaGoneError,
    HandleError,
    IntegrityError,
    ShmcastError,
    StaleHandleError,
)

BIG = 100_000


@pytest.fixture
def arena():
    with shmcast.Arena.create("16MiB", max_blocks=20000) as arena:
        yield arena


def numbers(start: int = 0) -> np.ndarray:
    return np.arange(start, start + BIG // 4, dtype=np.int32)


# ---- leases


def test_views_keep_the_lease_alive(arena) -> None:
    handle = arena.publish(numbers())
    lease = shmcast.attach(handle)
    watched = weakref.ref(lease)
    part = lease.array.reshape(-1, 5)[3:7].T
    del lease
    assert watched() is not None
    assert (part == numbers().reshape(-1, 5)[3:7].T).all()
    with pytest.raises(BufferError, match="1 arrays or buffers"):
        watched().release()
    del part
    assert watched() is None
    with pytest.raises(StaleHandleError):
        shmcast.attach(handle)


def test_release_is_idempotent_and_final(arena) -> None:
    lease = shmcast.attach(arena.publish(numbers()))
    lease.release()
    lease.release()
    assert lease.released
    for use in (
        lambda: lease.array,
        lease.verify,
        lease.to_private,
        lambda: memoryview(lease),
        lambda: lease.pass_on(1),
    ):
        with pytest.raises(ValueError, match="released"):
            use()
    assert "released" in repr(lease)


def test_buffer_protocol(arena) -> None:
    lease = shmcast.attach(arena.publish(numbers()))
    with memoryview(lease) as view:
        assert view.readonly
        assert bytes(view) == numbers().tobytes()
        with pytest.raises(BufferError):
            lease.release()
    lease.release()


def test_context_manager(arena) -> None:
    with shmcast.attach(arena.publish(numbers())) as lease:
        assert lease.array[3] == 3
    assert lease.released
    with pytest.raises(BufferError), shmcast.attach(arena.publish(numbers())) as lease:
        held = lease.array
    with pytest.raises(KeyError), shmcast.attach(arena.publish(numbers())) as lease:  # not hidden by a BufferError
        held = lease.array
        raise KeyError
    del held
    lease.release()


def test_nobody_writes_through_a_view(arena) -> None:
    lease = shmcast.attach(arena.publish(numbers()))
    array = lease.array
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1
    with pytest.raises(ValueError, match="cannot set WRITEABLE"):
        array.flags.writeable = True
    with pytest.raises(ValueError):
        np.frombuffer(lease, np.int32).flags.writeable = True
    private = lease.to_private()
    private[0] = 77
    assert array[0] == 0


def test_attach_any_number_of_times(arena) -> None:
    handle = arena.publish(numbers())
    leases = [shmcast.attach(handle) for _ in range(100)]
    assert all(lease.array[1] == 1 for lease in leases)
    leases.pop(50).release()
    assert (leases[0].array == numbers()).all()
    del leases
    gc.collect()
    assert arena.publish(numbers()).slot == handle.slot


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_attach_bytes(arena, kind) -> None:
    raw = arena.publish(numbers()).to_bytes()
    assert (shmcast.attach(kind(raw)).array == numbers()).all()


def test_verify(arena) -> None:
    handle = arena.publish(numbers(), readers=0, keep=True)
    shmcast.attach(handle, verify=True).verify()
    wrong = handle._replace(hash=handle.hash ^ 1)
    with pytest.raises(IntegrityError, match=rf"{handle.hash:032x} \(xxh3\), {wrong.hash:032x} was"):
        shmcast.attach(wrong, verify=True)
    with pytest.raises(ValueError, match="without a hash"):
        shmcast.attach(handle._replace(hash=None), verify=True)


def test_changed_bytes_are_noticed(arena) -> None:
    """What only somebody who opens the segment for writing could do."""
    handle = arena.publish(numbers(), readers=0, keep=True)
    lease = shmcast.attach(handle)
    fd = names.open_writable(names.segment_name(handle.namespace, handle.arena, handle.segment))
    os.pwrite(fd, b"\xff", handle.offset + 1234)
    os.close(fd)
    with pytest.raises(IntegrityError):
        lease.verify()


# ---- the wrong handles


def test_handle_of_another_host(arena) -> None:
    handle = arena.publish(numbers())
    stray = handle._replace(host=handle.host ^ 1)
    with pytest.raises(HandleError, match=f"{stray.host:016x}.*{handle.host:016x}"):
        shmcast.attach(stray)


@pytest.mark.parametrize("changes", [{"arena": 1}, {"namespace": "nobody"}])
def test_handle_of_no_arena(arena, changes) -> None:
    with pytest.raises(ArenaGoneError, match="there is no arena"):
        shmcast.attach(arena.publish(numbers())._replace(**changes))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda h: {"slot": 20000}, "names slot 20000"),
        (lambda h: {"slot": h.slot + 1}, "generation"),
        (lambda h: {"generation": h.generation + 1}, "generation"),
        (lambda h: {"segment": h.segment + 1}, "segment"),
        (lambda h: {"offset": h.offset + 64}, "bytes into its segment"),
        (lambda h: {"nbytes": h.nbytes + 1}, "bytes into its segment"),
        (lambda h: {"offset": (1 << 63) - 1 - h.nbytes}, "bytes into its segment"),
    ],
)
def test_handle_that_does_not_fit_the_block(arena, change, what) -> None:
    handle = arena.publish(numbers(), readers=0, keep=True)
    with pytest.raises(HandleError, match=what):
        shmcast.attach(handle._replace(**change(handle)))
    assert (shmcast.attach(handle).array == numbers()).all()


def test_stale_handle_never_gives_other_bytes(arena) -> None:
    handle = arena.publish(numbers())
    shmcast.attach(handle).release()
    for start in range(50):
        arena.publish(numbers(start), readers=0, keep=True)
        with pytest.raises(StaleHandleError, match=f"generation {handle.generation}"):
            shmcast.attach(handle)


@pytest.mark.parametrize("junk", [b"", b"x", b"shmH" + bytes(100), os.urandom(111)])
def test_garbage(junk) -> None:
    with pytest.raises(HandleError, match="decode handle"):
        shmcast.attach(junk)


@pytest.mark.parametrize("junk", [None, "text", [1]])
def test_what_is_no_handle_at_all(junk) -> None:
    with pytest.raises((TypeError, HandleError)):
        shmcast.attach(junk)


# ---- the way back from an array to its block


def test_parts_of_a_block(arena) -> None:
    handle = arena.publish(numbers().reshape(100, -1), readers=0, keep=True)
    array = shmcast.attach(handle).array
    assert lease_of(array).handle == handle
    rows = lease_of(array[10:20]).handle
    assert (rows.shape, rows.offset, rows.digest) == ((10, 250), handle.offset + 10000, None)
    assert (shmcast.attach(rows).array == array[10:20]).all()
    assert lease_of(array.reshape(-1)).handle.hash == handle.hash
    seen = lease_of(array.view("u1")).handle
    assert (seen.dtype, seen.shape) == ("uint8", (100, 1000))
    inner = shmcast.attach(rows)
    assert lease_of(inner.array[1:]).handle.offset == rows.offset + 1000


def test_what_is_not_a_view_of_a_block(arena) -> None:
    array = shmcast.attach(arena.publish(numbers().reshape(100, -1))).array
    for other in (numbers(), array.copy(), array[:, ::2], array.T, np.frombuffer(b"abc", np.uint8), [1], None):
        assert lease_of(other) is None


def test_digest_of_views_and_lists(arena) -> None:
    original = numbers()
    handle = arena.publish(original, readers=0, keep=True)
    view = shmcast.attach(handle).array
    assert shmcast.digest(view) == shmcast.digest(original) == handle.digest
    assert shmcast.digest(view[1:]) == shmcast.digest(original[1:]) != handle.digest
    assert shmcast.digest(view.reshape(5, -1)) == shmcast.digest(original.reshape(5, -1)) != handle.digest
    assert shmcast.digest(view.view("f4")) == shmcast.digest(original.view("f4"))
    assert shmcast.digest([view, [original]]) == shmcast.digest((original, (view,)))
    assert len({shmcast.digest(x) for x in (original, [original], [[original]], [], [[]], [original, original])}) == 6
    given = arena.publish(original, digest=5)
    assert given.digest == 5
    assert shmcast.digest(shmcast.attach(given).array) == handle.digest


# ---- other processes


def reader(parent, raw: bytes) -> None:
    lease = shmcast.attach(raw, verify=True)
    array = lease.array
    del lease
    parent.send(shmcast.process_token())
    parent.receive()
    parent.send(array.tobytes())
    del array
    parent.send("released")
    parent.receive()


def test_a_view_outlives_its_lease_while_the_publisher_recycles(child, arena) -> None:
    original = numbers()
    handle = arena.publish(original)
    peer = child(reader, handle.to_bytes())
    token = peer.receive()
    assert arena.peers == (token,)
    for start in range(300):  # far more than the arena has room for at once
        shmcast.attach(arena.publish(numbers(start))).release()
    peer.send("look")
    assert peer.receive() == original.tobytes()
    assert peer.receive() == "released"
    with pytest.raises(StaleHandleError):
        shmcast.attach(handle)


def test_a_killed_reader_gives_its_hold_back(child) -> None:
    with shmcast.Arena.create("1MiB") as arena:
        peer = child(reader, arena.publish(np.zeros(700_000, np.uint8)).to_bytes())
        peer.receive()
        with pytest.raises(shmcast.ArenaFullError):
            arena.publish(np.zeros(700_000, np.uint8))
        peer.kill()
        assert arena.publish(np.zeros(700_000, np.uint8)).nbytes == 700_000


def reads_all_the_time(parent) -> None:
    """Attach, look, drop, as fast as it goes; whoever sees other bytes than were published says so."""
    parent.send(shmcast.process_token())
    leases = []
    while True:
        raw, value = parent.receive()
        try:
            leases.append(shmcast.attach(raw, verify=True))
        except StaleHandleError:
            continue  # revoked while it was in the pipe
        if (leases[-1].array != value).any():
            parent.send("wrong")
        if len(leases) > 3:
            leases.pop(0).release()


def test_readers_are_killed_at_any_moment(child, seed) -> None:
    """No synchronisation with the kill: it may come within an attach, a release, or a join."""
    rng = random.Random(seed)
    with shmcast.Arena.create("4MiB", grant_timeout=0) as arena:
        for _ in range(6):
            peers = [child(reads_all_the_time) for _ in range(2)]
            for peer in peers:
                peer.receive()
            for value in range(rng.randrange(1, 60)):
                nbytes = rng.choice([100, 5000, BIG, 700_000])
                handle = arena.publish(np.full(nbytes, value, np.uint8), readers=2, timeout=30)
                for peer in peers:
                    peer.send((handle.to_bytes(), value))
            for peer in peers:
                peer.kill()
        assert arena.publish(np.zeros(4 << 20, np.uint8)).nbytes == 4 << 20  # nothing of the dead is left


def test_pass_on(child, arena) -> None:
    """By name, by number, and to a process that has not joined: the passer's hold may end before they attach."""
    original = numbers()
    first = child(reader, arena.publish(original).to_bytes())
    token = first.receive()
    for peers in ([token], 1, [token, shmcast.process_token() ^ 1]):
        handle = arena.publish(original)
        with shmcast.attach(handle) as lease:
            assert lease.pass_on(peers) == handle
        second = child(reader, handle.to_bytes())
        second.receive()
        second.send("look")
        assert second.receive() == original.tobytes()
    with shmcast.attach(arena.publish(original)) as lease, pytest.raises(ValueError, match="-1"):
        lease.pass_on(-1)
    first.send("look")
    assert first.receive() == original.tobytes()


def owner(parent) -> None:
    with shmcast.Arena.create("4MiB") as arena:
        handle = arena.publish(numbers(), readers=0, keep=True)
        parent.send(handle.to_bytes())
        if parent.receive() == "close":
            arena.close()
            parent.send("closed")
        parent.receive()


@pytest.mark.parametrize("end", ["close", "kill", "kill and sweep"])
def test_the_end_of_the_owner(child, namespace, end) -> None:
    peer = child(owner)
    raw = peer.receive()
    array = shmcast.attach(raw).array
    if end == "close":
        peer.send("close")
        peer.receive()
    else:
        peer.kill()
        if end == "kill":
            # nobody has said so yet: what was published can be had for as long as it lies there
            assert (shmcast.attach(raw).array == numbers()).all()
        report = shmcast.sweep()
        assert (report.arenas, len(report.segments)) == (1, 2)
    assert names.listing(namespace) == []
    assert (array == numbers()).all()  # leases stay valid
    with pytest.raises(ArenaGoneError):
        shmcast.attach(raw)
    assert (array == numbers()).all()


def holds_many(parent, count: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    raws = parent.receive()
    views = [shmcast.attach(raw).array for raw in raws]
    parent.send(len(views))
    parent.send(all(int(view[0]) == number for number, view in enumerate(views)))
    parent.send(len(os.listdir("/proc/self/fd")) < 30)


def test_ten_thousand_leases_need_no_descriptors(child, arena) -> None:
    handles = arena.publish_many([np.array([number], np.int64) for number in range(10_000)])
    peer = child(holds_many, 10_000)
    peer.send([handle.to_bytes() for handle in handles])
    assert peer.receive() == 10_000
    assert peer.receive() is True
    assert peer.receive() is True
    peer.join()


def forks(parent, raw: bytes) -> None:
    """Exit status 0 of the grandchild: all that it has to find, it found."""
    lease = shmcast.attach(raw)
    array = shmcast.attach(raw).array
    with shmcast.Arena.create("1MiB") as arena:
        own = arena.publish(numbers(5), readers=0, keep=True)
        pid = os.fork()
        if pid == 0:
            try:
                os._exit(0 if in_the_child(arena, own, lease, array) else 1)
            except BaseException as error:
                print(repr(error), flush=True)
                os._exit(2)
        _, status = os.waitpid(pid, 0)
        assert status == 0, status
        assert (shmcast.attach(own).array == numbers(5)).all()
        for number in (0, 1):  # the child's close() has closed nothing
            assert names.exists(names.segment_name(own.namespace, own.arena, number))
        assert (array == numbers()).all()
        assert not lease.released
    parent.send("done")


def in_the_child(arena, own, lease, array) -> bool:
    assert (array == numbers()).all()
    for use in (lambda: arena.publish(numbers()), lambda: arena.reserve(3, "u1"), lambda: lease.pass_on(1)):
        try:
            use()
        except ShmcastError as error:
            assert "forked" in str(error), error
        else:
            raise AssertionError(use)
    handle = lease.handle
    lease.release()  # does nothing: the hold is the parent's
    assert (shmcast.attach(own).array == numbers(5)).all()  # joins anew, as itself
    assert (shmcast.attach(handle).array == numbers()).all()
    arena.close()
    mine = shmcast.Arena.create("1MiB")
    assert shmcast.attach(mine.publish(numbers())).array[7] == 7
    mine.close()
    return True


def test_fork(child, arena) -> None:
    handle = arena.publish(numbers())
    peer = child(forks, handle.to_bytes())
    assert peer.receive() == "done"
    peer.join()


def says_what_is_imported(parent) -> None:
    import sys

    with shmcast.Arena.create("1MiB") as arena:
        shmcast.attach(arena.publish(np.ones(3))).array.sum()
        shmcast.loads(shmcast.dumps([np.ones(10_000)], arena))
    parent.send([name for name in ("torch", "zmq") if name in sys.modules])


def test_the_core_imports_neither_torch_nor_zmq(child) -> None:
    assert child(says_what_is_imported).receive() == []
