"""A peer that writes what it likes into the memory that it shares with us: what the owner knows it knows from private
memory, nothing is followed that was not checked, and what honest code gets to see of it is an error of ours."""

import contextlib
import mmap
import os
import random
import struct

import numpy as np
import pytest

import shmcast
from raw import MIB, PAYLOAD, Raw
from shmcast import _native, meeting, message, metrics, names

HEADER_MAX_BYTES, HEADER_ARENA_ID = 64, 24
SEGMENTS_OFFSET, WORDS_OFFSET = 12288, 20480
SLOTS = 64
RECORDS_OFFSET = WORDS_OFFSET + 8 * SLOTS
RECORD = struct.Struct("<QQQQIIQQ")  # generation, took, offset, size, segment, flags, hash low, hash high
RING_OFFSET = -(-(RECORDS_OFFSET + 64 * SLOTS) // 4096) * 4096


@pytest.fixture
def arena(namespace):
    made = Raw(namespace, slots=SLOTS)
    yield made
    made.close()


@pytest.fixture
def control(arena):
    """The control segment as a peer has it: all of it writable."""
    fd = arena.open(0)
    with mmap.mmap(fd, 0) as mapped:
        os.close(fd)
        yield mapped


def put(mapped, offset, value):
    mapped[offset : offset + 8] = value.to_bytes(8, "little")


def overwrite_record(control, slot):
    at = RECORDS_OFFSET + 64 * slot
    control[at : at + RECORD.size] = RECORD.pack(99, 0, 1 << 40, 1 << 40, 77, 0, 5, 6)


# ---- what the owner remembers


def test_a_release_is_of_what_was_published(arena, control):
    slot, generation, *_ = arena.publish(keep=True)
    overwrite_record(control, slot)
    assert not arena.owner.release(slot, 99)
    assert arena.owner.release(slot, generation)
    assert arena.used() == 0


def test_a_block_is_published_again_as_it_was(arena, control):
    slot, generation, segment, offset, _ = arena.publish(keep=True)
    overwrite_record(control, slot)
    again = arena.owner.alias(slot, generation, 1, (), False, 0)
    assert again[2:] == (segment, offset, _native.hash128(PAYLOAD))
    with memoryview(arena.attach((*again[:4], len(PAYLOAD)))) as view:
        assert view == PAYLOAD
    assert arena.owner.withdraw(again[0], again[1])


def test_bound_and_names_are_private(arena, control):
    known = arena.member.arena_id, arena.member.max_bytes, arena.member.nonce
    put(control, HEADER_MAX_BYTES, 0)
    put(control, HEADER_ARENA_ID, 1)
    control[32:48] = bytes(16)
    assert arena.publish() is not None
    assert (arena.member.arena_id, arena.member.max_bytes, arena.member.nonce) == known


def test_what_the_owner_holds_is_not_reused(arena, control):
    kept = [arena.publish(keep=True) for _ in range(3)]
    for slot, *_ in kept:
        put(control, WORDS_OFFSET + 8 * slot, 0)
    assert arena.used(revoke=True) == 3
    places = {(segment, offset) for _, _, segment, offset, _ in kept}
    while (block := arena.publish(keep=True)) is not None:
        assert (block[2], block[3]) not in places
        kept.append(block)
    for slot, generation, *_ in kept:
        assert arena.owner.release(slot, generation)
    assert arena.used() == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [(2, 1 << 63), (2, MIB - 4096), (3, 1 << 63), (3, MIB + 1), (3, (1 << 64) - 1), (4, 5)],
    ids=["offset far", "offset near the end", "size far", "size beyond", "size wraps", "segment"],
)
def test_a_record_that_leads_out_of_its_segment_is_refused(arena, control, field, value):
    block = arena.publish(keep=True)
    at = RECORDS_OFFSET + 64 * block[0]
    fields = list(RECORD.unpack_from(control, at))
    fields[field] = value
    RECORD.pack_into(control, at, *fields)
    with pytest.raises((shmcast.HandleError, shmcast.LayoutMismatchError)):
        arena.attach(block)


def test_the_number_of_a_segment_is_looked_for_by_name(arena, control):
    block = arena.publish(keep=True)
    control[SEGMENTS_OFFSET : SEGMENTS_OFFSET + 8192] = b"\xff" * 8192
    arena.attach(block).release()
    arena.add_segment(MIB)
    assert arena.publish() is not None


# ---- messages


@pytest.mark.parametrize("error", [b"[" * 100_000, b'{"type": 1}', b"[]", b"\xff"])
def test_an_error_that_is_none_is_refused(error):
    with pytest.raises(shmcast.HandleError):
        message.unpack(message._pack(message._ERROR, 1, error, ()))


def test_a_hello_of_other_types_is_refused():
    hello = '{"probe": "00", "secret": "00", "nonce": 1, "owned": true, "ring": 0, "name": 0, %s}'
    terms = '"fallback": "raise", "channel": "auto", "consensus": true'
    for raw in (hello % terms, '{"error": 1, %s}' % terms, "{%s}" % terms, "[" * 100_000, "1", ""):  # noqa: UP031
        with pytest.raises(shmcast.GroupError, match="no hello"):
            meeting._read_hello(raw.encode())


# ---- handles


def test_handles_that_somebody_made_up(namespace, seed):
    rng = random.Random(seed)
    edges = (0, 1, 2, 63, 64, 4096, 65535, 65536, (1 << 31) - 1, (1 << 63) - 1, (1 << 64) - 1)
    with shmcast.Arena.create("1MiB", segment_bytes="64KiB", max_blocks=SLOTS) as arena:
        real = [arena.publish(np.full(100 * n, n, "uint16"), keep=True) for n in range(1, 9)]
        expected = {handle: handle.nbytes // 2 * (handle.shape[0] // 100) for handle in real}
        attached = 0
        for _ in range(5000):
            handle = rng.choice(real)
            for field in rng.sample(("slot", "generation", "segment", "offset", "nbytes", "arena", "host"), 2):
                value = rng.choice(edges) if rng.random() < 0.5 else getattr(rng.choice(real), field)
                value = value + rng.randrange(-2, 3) if rng.random() < 0.2 else value
                handle = handle._replace(**{field: max(0, value)})
            try:
                raw = handle.to_bytes()
                with shmcast.attach(raw) as lease:
                    attached += 1
                    total = int(lease.array.sum())
                    assert handle not in expected or total == expected[handle]
            except (shmcast.HandleError, shmcast.ArenaGoneError):
                continue
        assert attached


# ---- real processes


def hostile_peer(parent, namespace, arena, spared, seed):
    """Write all the time until the test closes the link; where it is small more often than where it is large."""
    rng = random.Random(seed)
    areas = (0, 4096), (4096, 12288), (SEGMENTS_OFFSET, WORDS_OFFSET), (WORDS_OFFSET, RING_OFFSET)
    fd = names.open_writable(names.segment_name(namespace, arena, 0))
    with mmap.mmap(fd, 0) as control:
        parent.send("ready")
        while True:
            for _ in range(200):
                start, end = rng.choice((*areas, (0, len(control))))
                at = rng.randrange(start, end - 8) & ~7
                if spared and at < 256:
                    continue  # else the arena says that it has ended, or is none, and nothing more happens
                old = int.from_bytes(control[at : at + 8], "little")
                new = rng.choice((0, 1, old ^ 1 << rng.randrange(64), rng.getrandbits(64), old + 64, -1))
                put(control, at, new & (1 << 64) - 1)
            with contextlib.suppress(TimeoutError):
                parent.receive(0.0005)


def honest_owner(parent, namespace, seed):
    """Publish, and look after every publication whether any other byte of the data segments has changed."""
    rng = random.Random(seed)
    images, kept = {}, []
    with shmcast.Arena.create("1MiB", segment_bytes="256KiB", max_blocks=SLOTS, grant_timeout=0.01) as arena:
        parent.send(arena.id)
        while True:
            parent.receive()
            data = np.frombuffer(rng.randbytes(rng.choice((10, 3000, 20000, 100_000))), "uint8")
            handle = None
            try:
                handle = arena.publish(data, readers=2, keep=rng.random() < 0.3)
                kept.append(handle)
                look_at_segments(namespace, arena.id, images, handle, data.tobytes())
                shmcast.attach(handle).release()
                again = arena.publish(shmcast.attach(handle).array, readers=1)  # the block itself, once more
                look_at_segments(namespace, arena.id, images, again, b"")
            except shmcast.ArenaFullError:
                while kept:
                    arena.release(kept.pop())
            except (shmcast.HandleError, shmcast.ArenaError):
                pass  # what it has published itself may look different by now
            parent.send(None if handle is None else handle.to_bytes())


def look_at_segments(namespace, arena, images, handle, data):
    """Every data segment is what it was, but for what has just been published."""
    numbers = sorted(found.number for found in names.listing(namespace) if found.arena == arena and found.number)
    for number in numbers:
        fd = names.open_readable(names.segment_name(namespace, arena, number))
        with open(fd, "rb") as file:
            now = file.read()
        image = images.setdefault(number, bytearray(len(now)))
        if number == handle.segment and data:
            image[handle.offset : handle.offset + handle.nbytes] = data
        assert now == image, (
            f"segment {number} has changed outside of the block at {handle.offset}, {handle.nbytes} bytes"
        )
    for number in set(images) - set(numbers):
        del images[number]


def honest_reader(parent):
    while True:
        raw = parent.receive()
        try:
            with shmcast.attach(raw) as lease:
                lease.array.sum()
                lease.verify()
            parent.send("read")
        except (shmcast.HandleError, shmcast.ArenaError, shmcast.IntegrityError) as error:
            parent.send(type(error).__name__)


@pytest.mark.parametrize("spared", [True, False], ids=["all but the header", "everything"])
def test_a_peer_that_writes_everywhere(child, namespace, seed, spared):
    owner = child(honest_owner, namespace, seed)
    arena = owner.receive()
    readers = [child(honest_reader) for _ in range(2)]
    hostile = child(hostile_peer, namespace, arena, spared, seed)
    assert hostile.receive() == "ready"
    outcomes = {}
    for number in range(200):
        owner.send()
        raw = owner.receive()
        for reader in readers:
            if raw is not None:
                reader.send(raw)
        for reader in readers:
            if raw is not None:
                outcome = reader.receive()
                outcomes[outcome] = outcomes.get(outcome, 0) + 1
        if number % 20 == 0:
            metrics.read(namespace)
            assert shmcast.sweep(namespace).segments == (), "the owner lives, whatever its arena says of it"
    print(outcomes)
    hostile.join()
    for reader in readers:
        reader.join()
    owner.join()
