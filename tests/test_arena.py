"""Publishers' side: what lives how long, growth and its bounds, reservations, a full host."""

import ctypes
import gc
import os
import random
import threading
from pathlib import Path

import numpy as np
import pytest

import shmcast
from shmcast import growth, names
from shmcast.errors import ArenaError, ArenaFullError, HandleError, PeerLostError, StaleHandleError

MIB = 1 << 20
PAGE = 4096


def block(nbytes: int, value: int = 1) -> np.ndarray:
    return np.full(nbytes, value, np.uint8)


def is_there(handle) -> bool:
    try:
        shmcast.attach(handle).release()
    except StaleHandleError:
        return False
    return True


@pytest.fixture
def arena():
    with shmcast.Arena.create("8MiB") as arena:
        yield arena


# ---- create and close


def test_create_and_close(namespace) -> None:
    arena = shmcast.Arena.create("1MiB")
    assert arena.namespace == namespace
    assert {found.number for found in names.listing(namespace)} == {0, 1}
    assert arena.stats()["reserved_bytes"] == MIB
    handle = arena.publish(block(10))
    lease = shmcast.attach(handle)
    arena.close()
    arena.close()
    assert arena.closed
    assert arena.stats() == {}
    assert "closed" in repr(arena)
    assert names.listing(namespace) == []
    assert (lease.array == 1).all()
    with pytest.raises(shmcast.ArenaGoneError):
        shmcast.attach(handle)


@pytest.mark.parametrize(
    "use",
    [
        lambda arena, handle: arena.publish(block(1)),
        lambda arena, handle: arena.publish(block(100)[::2]),
        lambda arena, handle: arena.publish_many([block(1)]),
        lambda arena, handle: arena.reserve(5, "u1"),
        lambda arena, handle: arena.alias(handle),
        lambda arena, handle: shmcast.dumps(block(100_000), arena),
    ],
)
def test_use_after_close(use) -> None:
    with shmcast.Arena.create("1MiB") as arena:
        handle = arena.publish(block(10), keep=True)
    with pytest.raises(ArenaError, match="arena is closed"):
        use(arena, handle)
    assert arena.release(handle) is False
    assert arena.withdraw(handle) is False


def test_an_arena_that_is_not_closed_warns_and_can_be_swept(namespace) -> None:
    arena = shmcast.Arena.create("1MiB")
    with pytest.warns(ResourceWarning, match="not closed"):
        del arena
        gc.collect()
    assert len(names.listing(namespace)) == 2
    assert shmcast.sweep().arenas == 1


def test_no_constructor() -> None:
    with pytest.raises(TypeError):
        shmcast.Arena()


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"max_bytes": 100}, "at least one page"),
        ({"max_bytes": "huge"}, "max_bytes: 'huge'"),
        ({"max_bytes": "1MiB", "segment_bytes": "2MiB"}, "segment_bytes '2MiB' is more"),
        ({"max_blocks": 0}, "max_blocks 0"),
        ({"max_blocks": 1 << 21}, "max_blocks"),
        ({"namespace": "a/b"}, "namespace 'a/b'"),
        ({"grant_timeout": -1}, "grant_timeout"),
        ({"idle_timeout": float("nan")}, "idle_timeout"),
    ],
)
def test_bad_arguments_leave_nothing(namespace, arguments, what) -> None:
    with pytest.raises(ValueError, match=what):
        shmcast.Arena.create(**arguments)
    assert names.listing(namespace) == []


def test_default_segment_bytes() -> None:
    assert growth.default_segment_bytes(2 << 30) == 256 * MIB
    assert growth.default_segment_bytes(64 * MIB) == 16 * MIB
    assert growth.default_segment_bytes(MIB) == MIB
    assert growth.default_segment_bytes(64 << 30) == 1 << 30


def test_two_arenas_in_one_process() -> None:
    with shmcast.Arena.create("1MiB") as one, shmcast.Arena.create("1MiB") as two:
        first, second = one.publish(block(9, 1)), two.publish(block(9, 2))
        assert (shmcast.attach(first).array.sum(), shmcast.attach(second).array.sum()) == (9, 18)
        for action in (two.release, two.withdraw, two.alias):
            with pytest.raises(HandleError, match="another arena"):
                action(first)


# ---- how long a block lives


def test_readers_count(arena) -> None:
    handle = arena.publish(block(10), readers=1)
    lease = shmcast.attach(handle)
    assert is_there(handle)  # as long as it lives it can be attached again
    lease.release()
    assert not is_there(handle)
    handle = arena.publish(block(10), readers=2)  # one process counts once
    for _ in range(5):
        assert is_there(handle)


def test_keep_and_release(arena) -> None:
    handle = arena.publish(block(10), readers=0, keep=True)
    assert is_there(handle)
    lease = shmcast.attach(handle)
    assert arena.release(handle) is True
    assert arena.release(handle) is False
    assert is_there(handle)
    lease.release()
    assert not is_there(handle)
    both = arena.publish(block(10), readers=1, keep=True)
    assert is_there(both)
    arena.release(both)
    assert not is_there(both)


def test_withdraw(arena) -> None:
    for keep in (False, True):
        handle = arena.publish(block(10), readers=3, keep=keep)
        assert arena.withdraw(handle) is True
        assert not is_there(handle)
        arena.publish(block(10))
        assert arena.withdraw(handle) is False
    held = arena.publish(block(10), readers=3)
    lease = shmcast.attach(held)
    arena.withdraw(held)
    assert (lease.array == 1).all()
    lease.release()
    assert not is_there(held)


@pytest.mark.parametrize(
    ("readers", "what"),
    [(0, "nobody"), (-1, "nobody"), (32, "31"), ("all", "nobody"), ("some", "'all'"), ([], "nobody"), ((), "nobody")],
)
def test_bad_readers(arena, readers, what) -> None:
    with pytest.raises(ValueError, match=what):
        arena.publish(block(10), readers=readers)
    with pytest.raises(ValueError, match=what):
        arena.publish_many([block(10)], readers=readers)
    assert arena.stats()["slots_used"] == 0


def test_stats_count_what_somebody_has_a_claim_on(arena) -> None:
    leases = [shmcast.attach(arena.publish(block(100_000))) for _ in range(3)]
    used = arena.stats()["used_bytes"]
    assert arena.stats()["slots_used"] == 3
    leases.pop().release()
    assert arena.stats()["slots_used"] == 2
    assert arena.stats()["used_bytes"] < used
    for lease in leases:
        lease.release()
    assert arena.stats()["slots_used"] == arena.stats()["used_bytes"] == 0


def test_named_reader_that_has_not_joined(arena) -> None:
    with pytest.raises(PeerLostError, match="0x7b"):
        arena.publish(block(10), readers=[123])
    with pytest.raises(PeerLostError):
        arena.publish_many([block(10)] * 3, readers=[123])
    arena.publish(block(10))
    assert arena.stats()["slots_used"] == 1


def joins(parent, raw: bytes) -> None:
    shmcast.attach(raw).release()
    parent.send(shmcast.process_token())
    while True:
        raw = parent.receive()
        lease = shmcast.attach(raw)
        parent.send(int(lease.array[0]))
        lease.release()
        parent.send("released")


@pytest.mark.parametrize("which", ["token", "all"])
def test_named_readers(child, arena, which) -> None:
    peer = child(joins, arena.publish(block(10), readers=2).to_bytes())
    token = peer.receive()
    handle = arena.publish(block(5 * MIB, 7), readers=[token, shmcast.process_token()] if which == "token" else "all")
    with pytest.raises(ArenaFullError):
        arena.publish(block(5 * MIB))
    peer.send(handle.to_bytes())
    assert peer.receive() == 7
    assert peer.receive() == "released"
    assert not is_there(handle)
    unclaimed = arena.publish(block(5 * MIB, 8), readers=[token])
    peer.kill()
    assert arena.publish(block(5 * MIB, 9)).nbytes == 5 * MIB  # the dead reader's grant has ended with it
    assert not is_there(unclaimed)


def test_all_readers_are_those_that_are_there(child, arena, monkeypatch) -> None:
    """One that leaves after it was counted is not missed: the caller has named nobody."""
    raw = arena.publish(block(10), readers=0, keep=True).to_bytes()
    peers = [child(joins, raw) for _ in range(2)]
    tokens = [peer.receive() for peer in peers]

    def look(self: shmcast.Arena) -> tuple[int, ...]:
        peers[0].finish()
        return tuple(tokens)

    monkeypatch.setattr(shmcast.Arena, "peers", property(look))
    handle = arena.publish(block(1000, 6), readers="all")
    peers[1].send(handle.to_bytes())
    assert peers[1].receive() == 6
    with pytest.raises(PeerLostError):
        arena.publish(block(1000), readers=tokens)


def test_a_grant_that_nobody_claims_is_revoked_when_space_is_needed() -> None:
    with shmcast.Arena.create("1MiB", grant_timeout=0) as arena:
        lost = arena.publish(block(700_000))
        kept = arena.publish(block(100_000), readers=0, keep=True)
        assert is_there(kept)
        arena.publish(block(700_000, 2))
        assert not is_there(lost)
        assert is_there(kept)
        assert arena.stats()["revoked"] >= 1


@pytest.mark.parametrize("how", ["create", "publish"])
def test_a_grant_without_deadline_is_not_revoked(how) -> None:
    with shmcast.Arena.create("1MiB", grant_timeout=None if how == "create" else 0) as arena:
        handle = arena.publish(block(700_000), **({} if how == "create" else {"grant_timeout": None}))
        with pytest.raises(ArenaFullError):
            arena.publish(block(700_000))
        assert is_there(handle)


# ---- publish


def test_views_of_a_block_are_published_without_a_copy(arena) -> None:
    handle = arena.publish(np.arange(50_000), digest=5)
    lease = shmcast.attach(handle)
    used = arena.stats()["used_bytes"]
    again = arena.publish(lease.array, readers=0, keep=True)
    assert arena.stats()["used_bytes"] == used
    assert (again.segment, again.offset, again.hash) == (handle.segment, handle.offset, handle.hash)
    assert (again.slot, again.generation) != (handle.slot, handle.generation)
    lease.release()
    assert not is_there(handle)
    seen = shmcast.attach(again, verify=True).array  # the bytes live as long as either
    assert seen[49_999] == 49_999
    part = arena.publish(seen[100:])
    assert part.offset != handle.offset
    reshaped = arena.publish(seen.reshape(2, -1))
    assert (reshaped.offset, reshaped.shape, reshaped.digest) == (
        handle.offset,
        (2, 25_000),
        shmcast.digest(seen.reshape(2, -1)),
    )
    aliased = arena.alias(again, digest=9)
    assert (aliased.offset, aliased.digest, aliased.dtype) == (again.offset, 9, again.dtype)
    del seen
    arena.release(again)
    arena.publish(block(10))
    with pytest.raises(StaleHandleError):
        arena.alias(again)
    assert (shmcast.attach(aliased).array == np.arange(50_000)).all()


def test_publish_many_is_all_or_nothing(arena) -> None:
    handles = arena.publish_many([block(1000, value) for value in range(200)], readers=0, keep=True)
    assert [int(shmcast.attach(handle).array[999]) for handle in handles] == list(range(200))
    before = arena.stats()["used_bytes"]
    with pytest.raises(ArenaFullError):
        arena.publish_many([block(3 * MIB)] * 3)
    arena.publish(block(1))
    assert arena.stats()["used_bytes"] <= before + PAGE
    assert arena.publish_many([]) == []


def test_publish_many_over_several_segments() -> None:
    with shmcast.Arena.create("4MiB", segment_bytes="1MiB") as arena:
        handles = arena.publish_many([block(MIB, value) for value in range(4)], readers=0, keep=True)
        assert len({handle.segment for handle in handles}) == 4
        assert [int(shmcast.attach(handle).array[-1]) for handle in handles] == [0, 1, 2, 3]


def test_hash_and_digest(arena) -> None:
    array = np.arange(1000)
    assert arena.publish(array).hash == shmcast.hash128(array)
    bare = arena.publish(array, hash=False)
    assert (bare.hash, bare.digest) == (None, None)
    assert arena.publish(array, digest=3).digest == 3
    assert arena.publish(array, digest=3, hash=False).hash is None
    for bad in (-1, 1 << 128):
        with pytest.raises(ValueError, match="128 bits"):
            arena.publish(array, digest=bad)


def test_many_threads_publish_and_attach(seed) -> None:
    """Growth, giving back and publishing from eight threads at once; every array comes back as it went in."""
    failures: list[str] = []

    def work(number: int) -> None:
        rng = random.Random(seed + number)
        for turn in range(60):
            array = block(rng.choice([100, 20_000, 300_000, MIB]), (number * 60 + turn) % 251)
            handle = arena.publish(array, timeout=30)
            seen = shmcast.attach(handle, verify=True).array
            if not (seen == array).all():
                failures.append(f"thread {number}, turn {turn}")

    with shmcast.Arena.create("16MiB", segment_bytes="2MiB", idle_timeout=0.01) as arena:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert arena.stats()["reserved_bytes"] <= 16 * MIB


# ---- growth and bounds


def test_grows_by_segments_up_to_the_bound(namespace) -> None:
    with shmcast.Arena.create("4MiB", segment_bytes="1MiB") as arena:
        handles = [arena.publish(block(MIB, n), readers=0, keep=True) for n in range(4)]
        assert arena.stats()["reserved_bytes"] == 4 * MIB
        with pytest.raises(ArenaFullError, match=r"publish 64 bytes.*max_bytes 4194304.*largest free 0"):
            arena.publish(block(64))
        for n, handle in enumerate(handles):
            assert (shmcast.attach(handle).array == n).all()
        arena.release(handles[2])
        assert arena.publish(block(MIB, 9)).segment == handles[2].segment
    assert names.listing(namespace) == []


def test_an_array_that_can_never_fit(arena) -> None:
    for timeout in (0, 60):
        with pytest.raises(ArenaFullError, match=r"publish 8388609 bytes.*max_bytes 8388608.*larger max_bytes"):
            arena.publish(block(8 * MIB + 1), timeout=timeout)
    with pytest.raises(ArenaFullError, match="reserve"):
        arena.reserve((1 << 40, 1 << 20), "f8")
    arena.publish(block(8 * MIB))


def test_a_block_larger_than_a_segment_gets_its_own_and_idle_ones_make_way() -> None:
    with shmcast.Arena.create("8MiB", segment_bytes="1MiB") as arena:
        large = arena.publish(block(5 * MIB, 3))
        assert arena.stats()["segments"] >= 2
        shmcast.attach(large).release()
        whole = arena.publish(block(8 * MIB, 4))
        assert arena.stats()["segments"] == 1
        assert (shmcast.attach(whole).array == 4).all()


def test_slots_run_out() -> None:
    with shmcast.Arena.create("1MiB", max_blocks=3) as arena:
        handles = [arena.publish(block(1), readers=0, keep=True) for _ in range(3)]
        for action in (
            lambda: arena.publish(block(1)),
            lambda: arena.alias(handles[0]),
            lambda: arena.publish_many([block(1)]),
        ):
            with pytest.raises(ArenaFullError, match=r"slots 3 of 3.*max_blocks"):
                action()
        with pytest.raises(ArenaFullError, match="max_blocks"), arena.reserve(1, "u1") as reservation:
            pass
        assert "aborted" in repr(reservation)
        used = arena.stats()["used_bytes"]
        with pytest.raises(ArenaFullError) as caught:
            arena.publish(block(200)[::2])
        assert arena.stats()["used_bytes"] == used, caught
        arena.release(handles[1])
        assert is_there(arena.publish(block(1)))


def test_waits_for_room() -> None:
    with shmcast.Arena.create("1MiB") as arena:
        lease = shmcast.attach(arena.publish(block(700_000)))
        with pytest.raises(ArenaFullError, match="waited"):
            arena.publish(block(700_000), timeout=0.05)
        timer = threading.Timer(0.05, lease.release)
        timer.start()
        assert arena.publish(block(700_000, 2), timeout=60).nbytes == 700_000
        timer.join()


def wait_until(condition) -> None:
    """For what a background thread does; the watchdog ends it."""
    turn = threading.Event()
    while not condition():
        turn.wait(0.005)


def test_idle_segments_are_given_back(namespace) -> None:
    with shmcast.Arena.create("4MiB", segment_bytes="1MiB", idle_timeout=0.02) as arena:
        handles = [arena.publish(block(MIB, n), readers=0, keep=True) for n in range(4)]
        lease = shmcast.attach(handles[3])
        for handle in handles:
            arena.release(handle)
        wait_until(lambda: arena.stats()["segments"] == 2)
        assert (lease.array == 3).all()  # what is held is not given back
        lease.release()
        wait_until(lambda: arena.stats()["segments"] == 1)
        wait_until(lambda: {found.number for found in names.listing(namespace)} == {0, 1})


def test_names_that_a_stranger_has_taken_cost_another_try(namespace) -> None:
    with shmcast.Arena.create("4MiB", segment_bytes="1MiB") as arena:
        taken = [Path(f"{names.DIRECTORY}{names.segment_name(namespace, arena.id, number)}") for number in range(2, 40)]
        for path in taken:
            path.touch()
        handles = [arena.publish(np.full(900_000, value, np.uint8), keep=True) for value in range(3)]
        assert [int(shmcast.attach(handle).array[-1]) for handle in handles] == [0, 1, 2]
    assert {found.number for found in names.listing(namespace)} == set(range(2, 40))
    for path in taken:
        path.unlink()


def test_grows_ahead_of_need() -> None:
    with shmcast.Arena.create("256MiB", segment_bytes="16MiB") as arena:
        for n in range(15):
            arena.publish(block(MIB, n), readers=0, keep=True)
        wait_until(lambda: arena.stats()["segments"] == 2)


# ---- a host without room


def on_a_small_host(parent, size: str) -> None:
    """In a mount namespace of our own, with a /dev/shm of that size."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_namespace, private = 0x20000, (1 << 18) | (1 << 14)
    if (
        libc.unshare(new_namespace)
        or libc.mount(b"none", b"/", None, private, None)
        or libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, f"size={size}".encode())
    ):
        parent.send(f"unshare and mount: {os.strerror(ctypes.get_errno())}")
        return
    parent.send("ready")
    for action in (lambda: shmcast.Arena.create("2GiB"), lambda: shmcast.Arena.create("4MiB", max_blocks=1 << 20)):
        try:
            action()
        except ArenaFullError as error:
            assert "/dev/shm" in str(error) and "--shm-size" in str(error), error
        else:
            raise AssertionError("there was room")
        assert os.listdir("/dev/shm") == []
    with shmcast.Arena.create("64MiB", segment_bytes="2MiB", max_blocks=100) as arena:
        handles = []
        try:
            while True:
                handles.append(arena.publish(block(MIB, len(handles)), readers=0, keep=True))
        except ArenaFullError as error:
            assert "/dev/shm has" in str(error), error
        assert len(handles) >= 6, len(handles)
        assert all((shmcast.attach(handle).array == n).all() for n, handle in enumerate(handles))
        with arena._segments.lock:  # the keeper may be trying to grow
            segments = arena.stats()["segments"] + 1
            assert len(os.listdir("/dev/shm")) == segments
        arena.release(handles[3])
        assert is_there(arena.publish(block(MIB)))
        with arena._segments.lock:
            assert len(os.listdir("/dev/shm")) == segments
    assert os.listdir("/dev/shm") == []
    parent.send("done")


def test_a_small_host(child) -> None:
    peer = child(on_a_small_host, "8m")
    answer = peer.receive()
    if answer != "ready":
        pytest.skip(answer)
    assert peer.receive() == "done"
    peer.join()


class Interrupted:
    """An owner whose process gets a signal just when a segment has been added."""

    def __init__(self, owner) -> None:
        self.owner = owner

    def __getattr__(self, name: str) -> object:
        return getattr(self.owner, name)

    def add_segment(self, *arguments: int) -> None:
        self.owner.add_segment(*arguments)
        raise KeyboardInterrupt


def test_an_interrupt_while_growing_leaves_the_name_of_a_segment_in_service(namespace) -> None:
    with shmcast.Arena.create("2MiB", segment_bytes="1MiB") as arena:
        segments, owner = arena._segments, arena._segments.owner
        segments.owner = Interrupted(owner)
        with pytest.raises(KeyboardInterrupt):
            segments.add(MIB)
        segments.owner = owner
        numbers = [number for number, *_ in owner.segments()]
        assert numbers == [1, 2]
        assert all(os.path.exists(f"/dev/shm{segments.name(number)}") for number in numbers)


def test_what_can_be_given_up_makes_room() -> None:
    with shmcast.Arena.create("4MiB", segment_bytes="1MiB") as arena:
        held = {name: [arena.publish(block(MIB // 2), readers=0, keep=True) for _ in range(3)] for name in "ab"}
        calls: list[str] = []

        def giver(name: str):
            def give_up() -> bool:
                calls.append(name)
                if not held[name]:
                    return False
                return arena.release(held[name].pop(0))

            return give_up

        givers = [giver(name) for name in "ab"]
        for give_up in givers:
            arena.on_pressure(give_up)
        live = [arena.publish(block(MIB // 2), readers=0, keep=True) for _ in range(2)]
        assert not calls
        live.append(arena.publish(block(MIB), readers=0, keep=True))  # two that lie side by side
        assert set(calls) == {"a"}
        calls.clear()
        arena.off_pressure(givers[0])
        with pytest.raises(ArenaFullError):
            arena.publish(block(3 * MIB))
        assert calls == ["b"] * 4
        assert not held["b"]
        with pytest.raises(ArenaFullError):  # not even then, so nothing need be given up
            arena.publish(block(5 * MIB))
        assert calls == ["b"] * 4
        arena.off_pressure(givers[1])
        assert all(arena.is_live(handle) for handle in live)
