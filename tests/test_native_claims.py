"""The core's claims on blocks, seen through _native alone: grants, readers=n, pass on, revoke, death, takeover."""

import mmap
import os
import secrets
import signal

import pytest

from raw import FOR_EVER, MIB, PAYLOAD, Raw, joined
from shmcast import _native, names
from shmcast.errors import (
    ArenaError,
    ArenaFullError,
    ArenaGoneError,
    HandleError,
    LayoutMismatchError,
    PeerLostError,
    StaleHandleError,
)

AT_ONCE = 1  # ns: past by the time that anybody looks
SEGMENT_MARK = 12288 + 16  # of the first data segment's record


@pytest.fixture
def raw(namespace):
    arena = Raw(namespace)
    yield arena
    arena.close()


def peer(parent, namespace, arena):
    """Joins, then does what it is told."""
    member = joined(namespace, arena)
    parent.send((member.index, _native.process_token()))
    leases = {}
    while True:
        verb, *args = parent.receive()
        if verb == "attach":
            block = args[0]
            try:
                lease = member.attach(_native.Lease, *block)
                leases.setdefault(tuple(block), []).append(lease)
                parent.send(bytes(lease) == PAYLOAD[: block[4]])
                del lease
            except StaleHandleError as error:
                parent.send(type(error).__name__)
        elif verb == "release":
            leases.pop(tuple(args[0])).clear()
            parent.send("released")
        elif verb == "pass_on":
            block, token = args
            parent.send(leases[tuple(block)][0].grant_to([token]))
        elif verb == "fork":
            if os.fork() == 0:
                signal.pause()  # outlives us; the end of the test ends it
                os._exit(0)
            parent.send("forked")
        elif verb == "leave":
            member.leave()
            parent.send("left")


@pytest.fixture
def start(child, raw):
    def start_peer():
        process = child(peer, raw.namespace, raw.id)
        process.index, process.token = process.receive()
        return process

    return start_peer


def ask(process, *words):
    process.send(words)
    return process.receive()


def test_a_block_without_a_claim_is_taken_back(raw):
    block = raw.publish(keep=True)
    assert raw.used() == 1
    assert raw.owner.release(block[0], block[1])
    assert not raw.owner.release(block[0], block[1])
    assert raw.used() == 0
    with pytest.raises(StaleHandleError, match="generation 1"):
        raw.attach(block)


def test_a_hold_keeps_the_block(raw):
    block = raw.publish(count=1)
    first, second = raw.attach(block), raw.attach(block)
    first.release()
    assert raw.used() == 1
    assert bytes(second) == PAYLOAD
    second.release()
    second.release()
    assert raw.used() == 0


def test_a_stale_handle_does_not_touch_the_block_that_came_after(raw):
    old = raw.publish(keep=True)
    raw.owner.release(*old[:2])
    new = raw.publish(b"n" * len(PAYLOAD), keep=True)
    assert new[0] == old[0]
    lease = raw.attach(new)
    with pytest.raises(StaleHandleError):
        raw.attach(old)  # must not end in giving up our own hold on the same slot
    raw.owner.release(*new[:2])
    assert raw.used() == 1
    assert bytes(lease) == b"n" * len(PAYLOAD)


def test_readers_counts_processes_not_leases(raw, start):
    one, two = start(), start()
    block = raw.publish(count=2)
    assert ask(one, "attach", block) is True
    assert ask(one, "release", block) == "released"
    assert ask(one, "attach", block) is True  # again: not counted again
    assert ask(one, "release", block) == "released"
    assert raw.used() == 1
    assert ask(two, "attach", block) is True
    assert ask(two, "release", block) == "released"
    assert raw.used() == 0
    assert ask(two, "attach", block) == "StaleHandleError"


def test_a_dead_reader_was_counted(raw, start):
    one, two = start(), start()
    block = raw.publish(count=2)
    assert ask(one, "attach", block) is True
    one.kill()
    assert ask(two, "attach", block) is True
    assert ask(two, "release", block) == "released"
    assert raw.used() == 1  # the dead one's hold
    assert raw.member.sweep_peers() == 1
    assert raw.member.sweep_peers() == 0
    assert raw.owner.stats()["swept"] == 1
    assert raw.used() == 0


def test_a_grant_waits_for_its_process_alone(raw, start):
    one, two = start(), start()
    block = raw.publish(tokens=[one.token])
    lease = raw.attach(block)
    assert lease.pending([one.token, two.token]) == 1
    assert ask(two, "attach", block) is True
    assert ask(two, "release", block) == "released"
    lease.release()
    assert raw.used(revoke=True) == 1  # granted for ever
    assert ask(one, "attach", block) is True
    assert ask(one, "release", block) == "released"
    assert raw.used() == 0


def test_a_grant_ends_with_its_process(raw, start):
    one = start()
    raw.publish(tokens=[one.token])
    one.kill()
    assert not raw.member.alive(one.token)
    assert raw.used(revoke=True) == 1
    assert raw.member.sweep_peers() == 1
    assert raw.used() == 0


def test_who_takes_a_dead_peers_byte_gets_none_of_its_claims(raw, start):
    one = start()
    held, granted = raw.publish(count=1), raw.publish(tokens=[one.token])
    assert ask(one, "attach", held) is True
    one.kill()
    two = start()
    assert (two.index, two.token != one.token) == (one.index, True)
    assert raw.used() == 0
    assert ask(two, "attach", granted) == "StaleHandleError"
    with pytest.raises(PeerLostError, match=f"{one.token:#x}"):
        raw.publish(tokens=[one.token])
    assert raw.used() == 0


def test_a_dead_process_is_dead_though_its_forked_child_lives(raw, start):
    one = start()
    block = raw.publish(count=1)
    assert ask(one, "attach", block) is True
    assert ask(one, "fork") == "forked"
    assert raw.member.alive(one.token)
    one.kill()
    assert not raw.member.alive(one.token)
    assert raw.member.sweep_peers() == 1
    assert raw.used() == 0


def test_leaving_gives_everything_up(raw, start):
    one = start()
    raw.publish(tokens=[one.token])
    assert ask(one, "leave") == "left"
    assert raw.used() == 0
    assert one.token not in raw.member.tokens()
    assert start().index == one.index


def test_pass_on_outlives_the_passer(raw, start):
    one, two = start(), start()
    block = raw.publish(count=1, timeout_ns=AT_ONCE)
    assert ask(one, "attach", block) is True
    assert ask(one, "pass_on", block, two.token) == 1
    one.kill()
    raw.member.sweep_peers()
    assert raw.used() == 1
    assert ask(two, "attach", block) is True
    assert ask(two, "release", block) == "released"
    assert raw.used() == 0


def test_two_in_flight_to_one_process_do_not_collapse(raw, start):
    one, two = start(), start()
    block = raw.publish(count=1)
    assert ask(one, "attach", block) is True
    ask(one, "pass_on", block, two.token)
    ask(one, "pass_on", block, two.token)
    assert ask(one, "release", block) == "released"
    assert ask(two, "attach", block) is True
    assert ask(two, "release", block) == "released"
    assert raw.used() == 1  # the second message is still under way
    assert ask(two, "attach", block) is True


def test_pass_on_to_who_has_not_joined_makes_the_owner_trustee(raw, start):
    one = start()
    block = raw.publish(count=1, timeout_ns=AT_ONCE)
    lease = raw.attach(block)
    assert lease.grant_to([secrets.randbits(64) | 1]) == 0
    lease.release()
    assert raw.used() == 1
    assert raw.used(revoke=True) == 1  # a pass-on is seen: the deadline starts again
    assert ask(one, "attach", block) is True  # anybody may come
    assert ask(one, "release", block) == "released"
    assert raw.used(revoke=True) == 0


def test_pass_on_to_the_dead_is_said(raw, start):
    one = start()
    lease = raw.attach(raw.publish(count=1))
    one.kill()
    raw.member.sweep_peers()
    # not joined any more: as good as a process that never was
    assert lease.grant_to([one.token]) == 0


def test_unclaimed_grants_are_revoked_past_their_deadline_only(raw, start):
    one = start()
    late = raw.publish(count=1, timeout_ns=AT_ONCE)
    raw.publish(tokens=[one.token], timeout_ns=AT_ONCE)
    in_time = raw.publish(count=1, timeout_ns=3600 * 10**9)
    assert raw.used() == 3
    assert raw.used(revoke=True) == 1
    assert ask(one, "attach", late) == "StaleHandleError"
    assert ask(one, "attach", in_time) is True
    assert raw.owner.stats()["revoked"] == 2


def test_a_revoked_grant_does_not_end_a_hold(raw, start):
    one = start()
    block = raw.publish(count=2, timeout_ns=AT_ONCE)
    assert ask(one, "attach", block) is True
    assert raw.used(revoke=True) == 1
    lease = raw.attach(block)  # late, while somebody holds: still good
    assert bytes(lease) == PAYLOAD


def test_an_alias_has_a_life_of_its_own(raw, start):
    one = start()
    block = raw.publish(keep=True)
    again = raw.owner.alias(block[0], block[1], 1, [], False, FOR_EVER)
    assert again[2:4] == block[2:4]
    assert again[:2] != block[:2]
    raw.owner.release(*block[:2])
    assert raw.used() == 1
    before = raw.owner.stats()["used_bytes"]
    assert before == len(PAYLOAD)
    assert ask(one, "attach", (*again[:4], len(PAYLOAD))) is True
    assert ask(one, "release", (*again[:4], len(PAYLOAD))) == "released"
    assert raw.used() == 0
    assert raw.owner.stats()["used_bytes"] == 0
    with pytest.raises(StaleHandleError):
        raw.owner.alias(block[0], block[1], 1, [], False, FOR_EVER)


def test_withdraw_ends_what_nobody_has_used(raw, start):
    one = start()
    block = raw.publish(count=3, tokens=[one.token], keep=True)
    assert ask(one, "attach", block) is True
    assert raw.owner.withdraw(*block[:2])
    assert raw.used() == 1
    assert ask(one, "release", block) == "released"
    assert raw.used() == 0
    assert not raw.owner.withdraw(*block[:2])


def test_withdraw_leaves_what_a_reader_has_passed_on(raw, start):
    one, two = start(), start()
    block = raw.publish(count=3, keep=True)
    assert ask(one, "attach", block) is True
    assert ask(one, "pass_on", block, two.token) == 1
    assert ask(one, "release", block) == "released"
    assert raw.owner.withdraw(*block[:2])
    assert raw.used(revoke=True) == 1  # a deadline of its own has begun
    assert ask(two, "attach", block) is True


def test_the_32nd_process_is_told(raw, start):
    peers = [start() for _ in range(_native.PEER_COUNT - 1)]
    assert sorted(process.index for process in peers) == list(range(1, _native.PEER_COUNT))
    with pytest.raises(ArenaError, match="31 of 31 peer bytes"):
        joined(raw.namespace, raw.id)
    peers[7].kill()
    member = joined(raw.namespace, raw.id)  # a dead peer's byte is free
    assert member.index == peers[7].index


def test_all_slots_in_use_is_said_and_changes_nothing(namespace):
    arena = Raw(namespace, slots=3)
    blocks = [arena.publish(b"x", keep=True) for _ in range(3)]
    with pytest.raises(ArenaFullError, match="3 of 3 slots"):
        arena.publish(b"x", keep=True)
    used = arena.owner.stats()["used_bytes"]
    arena.owner.release(*blocks[1][:2])
    assert arena.publish(b"x", keep=True)[0] == blocks[1][0]
    assert arena.owner.stats()["used_bytes"] == used
    arena.close()


def test_publish_many_is_all_or_nothing(raw):
    assert raw.owner.publish_many([PAYLOAD] * 17, 1, [], True, FOR_EVER, True) is None  # 1 MiB holds 16
    assert raw.used() == 0
    with pytest.raises(TypeError):
        raw.owner.publish_many([PAYLOAD, object()], 1, [], True, FOR_EVER, True)
    assert raw.used() == 0
    many = raw.owner.publish_many([PAYLOAD] * 16, 1, [], False, FOR_EVER, True)
    assert len({block[3] for block in many}) == 16
    assert many[0][4] == _native.hash128(PAYLOAD)


@pytest.mark.parametrize("bad", ["slot", "segment", "offset", "size"])
def test_a_handle_that_names_other_bytes_is_refused(raw, bad):
    slot, generation, segment, offset, size = raw.publish(keep=True)
    block = {
        "slot": (64, generation, segment, offset, size),
        "segment": (slot, generation, 2, offset, size),
        "offset": (slot, generation, segment, offset + 1, size),
        "size": (slot, generation, segment, offset, 2**64 - 1),
    }[bad]
    with pytest.raises(HandleError):
        raw.attach(block)
    raw.owner.release(slot, generation)
    assert raw.used() == 0  # the pin was taken back


def test_a_segment_that_was_cut_is_refused_before_it_is_read(raw, start, namespace):
    block = raw.publish(keep=True)
    fd = names.open_writable(raw.name(1))
    member = joined(namespace, raw.id)
    os.truncate(fd, 4096)
    os.close(fd)
    with pytest.raises(LayoutMismatchError, match=f"{block[3] + block[4]}"):
        member.attach(_native.Lease, *block)


def test_after_the_end_leases_stay_and_attaches_fail(namespace):
    arena = Raw(namespace)
    block = arena.publish(keep=True)
    lease = arena.attach(block)
    other = arena.publish(keep=True)
    arena.close()
    assert bytes(lease) == PAYLOAD
    with pytest.raises(ArenaGoneError):
        arena.attach(other)
    with pytest.raises(ArenaError, match="closed"):
        arena.publish()


def test_an_empty_segment_is_punched_and_a_used_one_is_not(raw):
    raw.add_segment(MIB)
    block = raw.publish(b"x" * (MIB // 2 + 4096), keep=True)
    again = raw.publish(b"x" * (MIB // 2 + 4096), keep=True)
    assert {block[2], again[2]} == {1, 2}
    assert not raw.owner.retire_segment(block[2])
    raw.owner.release(*block[:2])
    raw.owner.reclaim()
    fd = raw.open(block[2])
    assert os.fstat(fd).st_blocks > 0
    assert raw.owner.retire_segment(block[2])
    assert os.fstat(fd).st_blocks == 0
    os.close(fd)
    assert [segment[0] for segment in raw.owner.segments()] == [again[2]]
    assert bytes(raw.attach(again)) == b"x" * (MIB // 2 + 4096)


FIRST_MARK = 12288 + 16  # segments[0].mark in native/layout.h


def test_a_pinned_segment_is_not_punched_until_its_peer_is_dead(raw, start):
    one = start()
    fd = raw.open(0)
    with mmap.mmap(fd, 0) as control:
        os.close(fd)
        control[FIRST_MARK : FIRST_MARK + 8] = (1 << one.index).to_bytes(8, "little")
        assert not raw.owner.retire_segment(1)
        # A pin is no claim on a block: a sweep has something to do for it only where there is a process that died.
        one.kill()
        assert raw.member.sweep_peers() == 1
        assert raw.owner.retire_segment(1)
        assert control[FIRST_MARK + 7] == 0x80  # retired


def test_a_reader_unmaps_what_was_given_back_when_it_maps_something_else(raw, namespace):
    reader = joined(namespace, raw.id)
    first = raw.publish(keep=True)
    lease = reader.attach(_native.Lease, *first)
    raw.add_segment(MIB)
    second = raw.publish(b"x" * MIB, keep=True)
    assert (first[2], second[2]) == (1, 2)
    lease.release()
    raw.owner.release(*first[:2])
    raw.owner.reclaim()
    assert raw.owner.retire_segment(1)

    def mapped(number):
        with open("/proc/self/maps") as maps:
            return raw.name(number) + "\n" in maps.read()

    assert mapped(1)
    lease = reader.attach(_native.Lease, *second)
    assert mapped(2)
    assert not mapped(1)


def test_written_private_pages_are_a_lease_s_own_and_go_with_it(raw):
    block = raw.publish(keep=True)
    first, second = raw.attach(block), raw.attach(block)
    private = memoryview(first.view(True))
    private[5] = 77
    assert first.modified()
    assert bytes(second.view(True)) == PAYLOAD
    assert not second.modified()
    assert bytes(second) == bytes(first) == PAYLOAD  # and the shared one beside it
    private.release()
    first.release()
    third = raw.attach(block)
    assert bytes(third.view(True)) == PAYLOAD
    assert not third.modified()


def test_two_threads_that_map_a_lease_privately_at_once_see_the_same_pages(raw):
    block = raw.publish(keep=True)
    lease, other = raw.attach(block), raw.attach(block)
    views = []
    original = raw.opened

    def open_slowly(number):
        raw.opened = original
        views.append(memoryview(lease.view(True)))  # another thread is faster while the opener runs
        views.append(memoryview(other.view(True)))
        return original(number)

    raw.opened = open_slowly
    views.append(memoryview(lease.view(True)))
    assert len(views) == 3
    views[0][0] = 77
    assert views[2][0] == 77
    assert bytes(views[1]) == PAYLOAD
    assert lease.modified() and not other.modified()


def test_a_lease_can_not_be_released_while_it_is_being_mapped(raw):
    lease = raw.attach(raw.publish(keep=True))
    original = raw.opened

    def open_and_release(number):
        raw.opened = original
        with pytest.raises(BufferError):
            lease.release()
        return original(number)

    raw.opened = open_and_release
    assert bytes(lease.view(True)) == PAYLOAD


@pytest.mark.parametrize("through", ["memoryview", "lease"])
def test_memory_that_numpy_keeps_by_address_stays(raw, through):
    numpy = pytest.importorskip("numpy")
    block = raw.publish(keep=True)
    lease = raw.attach(block)
    array = numpy.ndarray((len(PAYLOAD),), "u1", memoryview(lease) if through == "memoryview" else lease)
    raw.owner.release(*block[:2])
    if through == "memoryview":
        with pytest.raises(BufferError):
            lease.release()
    else:
        lease.release()
        assert lease.released
        with pytest.raises(ValueError, match="released"):
            lease.view()
    del lease
    assert raw.used() == 1
    assert raw.publish(b"n" * len(PAYLOAD), keep=True)
    assert bytes(array) == PAYLOAD
    del array
    assert raw.used() == 1


def test_a_small_block_is_never_mapped_privately(raw):
    lease = raw.attach(raw.publish(b"small", keep=True))
    assert not lease.owns_pages
    with pytest.raises(ValueError, match="shares pages"):
        lease.view(True)


def test_a_reservation_is_writable_until_it_is_sealed(raw):
    reservation = raw.owner.reserve(len(PAYLOAD))
    memoryview(reservation)[:] = PAYLOAD
    with pytest.raises(PeerLostError):
        reservation.seal(0, [12345], False, FOR_EVER, True)
    block = reservation.seal(1, [], False, FOR_EVER, True)
    assert block[4] == _native.hash128(PAYLOAD)
    with pytest.raises(BufferError, match="sealed"):
        memoryview(reservation)
    with pytest.raises(ValueError, match="sealed"):
        reservation.seal(1, [], False, FOR_EVER, True)
    reservation.abort()
    assert bytes(raw.attach((*block[:4], len(PAYLOAD)))) == PAYLOAD


def test_an_aborted_reservation_gives_its_bytes_back(raw):
    reservation = raw.owner.reserve(MIB)
    assert raw.owner.reserve(1) is None
    reservation.abort()
    assert raw.owner.reserve(1) is not None
    del reservation


def test_steps_are_told_with_their_failures(raw, start):
    one = start()
    raw.member.set_step(7, True)
    raw.member.set_step(8)
    assert raw.member.steps() == {_native.process_token(): (8, 7), one.token: (0, 0)}
    assert raw.member.step == 8


def test_an_owner_that_waits_is_woken_by_a_release(raw, start):
    one = start()
    block = raw.publish(count=1)
    assert ask(one, "attach", block) is True
    assert not raw.owner.wait_freed(1)
    one.send(("release", block))
    while raw.used():  # a notice may have come before the wait: the look is what counts
        raw.owner.wait_freed(10_000_000)
    assert one.receive() == "released"


def test_a_sweep_that_was_killed_before_the_marks_is_finished(raw, child) -> None:
    """What a peer has pinned is never given back, so its marks are looked for even where nothing else of it is left."""
    reader = child(peer, raw.namespace, raw.id)
    index, _ = reader.receive()
    reader.kill()
    assert raw.member.sweep_peers() == 1
    fd = raw.open(0)
    with mmap.mmap(fd, 0) as control:
        os.close(fd)
        control[SEGMENT_MARK : SEGMENT_MARK + 8] = (1 << index).to_bytes(8, "little")
        assert not raw.owner.retire_segment(1)
        assert raw.member.sweep_peers() == 1
        assert raw.member.sweep_peers() == 0
        assert raw.owner.retire_segment(1)
