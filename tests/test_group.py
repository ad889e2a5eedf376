"""Groups of real ranks over gloo: what every rank gets, and what happens when one of them can not go on."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import os
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import shmcast
from child import Link
from ranks import Rank, Ranks
from shmcast import GroupError, GroupTimeoutError, PeerLostError, codec, meeting, process

torch_only = pytest.mark.torch
SIZES = [(0,), (0, 1), (0, 1, 2, 3)]
NUMPY_DTYPES = [
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64",
    "longdouble", "complex64", "complex128", ">f4", "M8[ns]", "m8[s]", "S7", "U3", "V5",
]  # fmt: skip
TORCH_DTYPES = [
    "bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64", "complex64",
    "complex128", "float8_e4m3fn", "float8_e5m2",
]  # fmt: skip


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(4) as started:
        yield started


@dataclasses.dataclass
class Item:
    """Stands for an engine's multimodal item."""

    name: str
    feature: Any
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


def noise(nbytes: int, seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


def a_tree(seed: int, plain_pickle: bool = False) -> dict[str, Any]:
    """Every dtype, layouts that are not contiguous, nested objects, small and empty and 0-d arrays.

    ``plain_pickle``: without the dtypes that torch's own pickling gets wrong."""
    import torch

    tree: dict[str, Any] = {}
    for number, name in enumerate(NUMPY_DTYPES):
        dtype = np.dtype(name)
        raw = noise(3000 * dtype.itemsize, seed + number)
        if name == "bool":
            raw &= 1
        if dtype.kind == "U":
            array = np.array(["a", "bc", "déf"] * 1000, dtype)
        else:
            array = raw.view(dtype)
        tree[f"numpy {name}"] = array.reshape(30, 100)
    for number, name in enumerate(TORCH_DTYPES):
        if plain_pickle and "float8" in name:
            continue
        dtype = getattr(torch, name)
        raw = noise(30_000 * dtype.itemsize, seed + 100 + number)
        if name == "bool":
            raw &= 1
        tree[f"torch {name}"] = torch.from_numpy(raw).view(dtype).reshape(10, 3000)
    base = noise(400_000, seed).reshape(200, 2000)
    tree["layouts"] = [base.T, base[::-2, ::3], np.asfortranarray(base), np.array(7.5), np.empty((0, 3), "f4")]
    item = Item("one", base.view("f4").copy(), {"shared": (base, base)})
    tree["nested"] = Item("two", [item, None, "text"], {"same": item})
    return tree


def same(left: Any, right: Any) -> bool:
    """Equal trees: values bit by bit, dtypes, shapes."""
    import torch

    if type(left) is not type(right):
        return False
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()
    if isinstance(left, torch.Tensor):
        bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right)]
        return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*bits)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, Item):
        return same(vars(left), vars(right))
    return bool(left == right)


def in_use(arena: shmcast.Arena) -> int:
    """Blocks of an arena that somebody has a claim on."""
    gc.collect()
    arena._owner.reclaim()
    return arena.stats()["slots_used"]


def together(here: Rank) -> None:
    """No rank goes on before all are here."""
    import torch.distributed as dist

    dist.barrier(here.group)


def settle(here: Rank, group: shmcast.Group) -> None:
    """All ranks have taken in all messages, and the entry rank knows."""
    gc.collect()
    together(here)
    group.broadcast()


# ---- without torch.distributed


def test_a_process_alone_is_a_group() -> None:
    with shmcast.Group(max_bytes="32MiB") as group:
        assert (group.rank, group.size, group.entry, group.mode) == (0, 1, 0, "shared")
        assert group.peers == (shmcast.process_token(),)
        source = np.arange(100_000.0)
        received = group.broadcast({"array": source, "text": "x"})
        source[:] = 0
        assert received["text"] == "x"
        assert np.array_equal(received["array"], np.arange(100_000.0))
        assert not received["array"].flags.writeable
        assert group.broadcast(source, local=True) is source
        assert group.stats()["messages"] == 2
        del received
        assert in_use(group._memory.arena) == 0
    group.close()
    with pytest.raises(GroupError, match="closed"):
        group.broadcast(1)


def test_views_outlive_the_group() -> None:
    with shmcast.Group(max_bytes="32MiB") as group:
        received = group.broadcast(np.arange(100_000.0))
    assert np.array_equal(received, np.arange(100_000.0))


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="fallback"):
        shmcast.Group(fallback="hope")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="channel"):
        shmcast.Group(channel="pigeon")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="entry 1"):
        shmcast.Group(entry=1)
    with pytest.raises(GroupError, match="no arena: ValueError: max_bytes: '3 furlongs'"):
        shmcast.Group(max_bytes="3 furlongs")


def test_an_arena_serves_one_group_at_a_time() -> None:
    with shmcast.Arena.create("32MiB") as arena:
        with shmcast.Group(arena=arena) as group:
            received = group.broadcast(np.ones(10_000))
            with pytest.raises(GroupError, match="serves another group"):
                shmcast.Group(arena=arena)
        assert not arena.closed
        assert in_use(arena) == 1
        with shmcast.Group(arena=arena) as group:
            assert np.array_equal(group.broadcast(received), np.ones(10_000))
        del received
        assert in_use(arena) == 0


class Reenters:
    """Broadcasts while it is pickled."""

    def __init__(self, group: shmcast.Group) -> None:
        self.group = group

    def __reduce__(self) -> Any:
        return self.group.broadcast(1), ()


def test_broadcast_is_not_reentered() -> None:
    with shmcast.Group(max_bytes="16MiB") as group:
        with pytest.raises(GroupError, match="under way"):
            group.broadcast(Reenters(group))
        assert group.broadcast("fine") == "fine"


def test_a_forked_child_is_no_rank() -> None:
    with shmcast.Group(max_bytes="16MiB") as group:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                group.broadcast(1)
            except GroupError as error:
                group.close()
                status = 0 if "forked" in str(error) else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert group.broadcast(np.ones(10_000)).sum() == 10_000


# ---- ranks


def everything(here: Rank, entry: int) -> list[Any]:
    import torch

    from shmcast.channels.group import INLINE_BYTES

    def options() -> dict[str, Any]:
        return {"max_bytes": "64MiB", "fallback": "object"} if here.rank == entry else {}

    group = shmcast.Group(here.group, entry, **options())
    assert group.mode == "shared"
    assert (group.rank, group.size, group.entry) == (here.rank, here.size, entry)
    for seed in range(3):
        expected = a_tree(seed)
        received = group.broadcast(expected if here.rank == entry else None)
        assert same(received, expected), seed
        large = received["numpy int64"]
        assert isinstance(large, np.ndarray)
        assert not large.flags.writeable
        # one object in the tree is one object there
        assert received["nested"].extra["same"] is received["nested"].feature[0]
    large_message = [np.full(100, number) for number in range(200)]
    for tree in (None, [], 17, b"x" * (3 * INLINE_BYTES), large_message, "again"):
        assert same(group.broadcast(tree if here.rank == entry else None), tree)
    # what one rank writes is its own
    tensor = group.broadcast(torch.arange(50_000) if here.rank == entry else None)
    tensor += here.rank
    assert torch.equal(group.broadcast(tensor + 0 if here.rank == entry else None), torch.arange(50_000) + entry)
    assert torch.equal(tensor, torch.arange(50_000) + here.rank)
    del received, large, tensor
    settle(here, group)
    assert group.stats()["unconfirmed"] == 0
    peers = list(group.peers)
    group.close()
    return peers


@torch_only
@pytest.mark.parametrize(
    ("members", "entry"), [((0,), 0), ((0, 1), 0), ((0, 1, 2, 3), 0), ((0, 1, 2, 3), 3), ((1, 3), 1), ((1, 2, 3), 0)]
)
def test_every_rank_gets_the_same(ranks: Ranks, members: tuple[int, ...], entry: int) -> None:
    seen = ranks.run(everything, entry, ranks=members)
    assert all(peers == seen[0] for peers in seen)
    assert len(set(seen[0])) == len(members)


def views_go_on(here: Rank) -> bool:
    with shmcast.Group(here.group, 1, max_bytes="64MiB") as group:
        first = group.broadcast(noise(1_000_000, 1) if here.rank == 1 else None)
        # A view of the entry rank's own arena gets a new handle, a part of one too; neither is copied.
        second = group.broadcast({"whole": first, "half": first[500_000:]} if here.rank == 1 else None)
        assert np.array_equal(second["whole"], noise(1_000_000, 1))
        assert np.array_equal(second["half"], noise(1_000_000, 1)[500_000:])
        if here.rank == 1:
            assert group._memory.arena.stats()["used_bytes"] < 1_100_000
        del first, second
        for seed in range(12):
            array = group.broadcast(noise(8_000_000, seed) if here.rank == 1 else None)
            assert np.array_equal(array, noise(8_000_000, seed))
            del array
            settle(here, group)
        if here.rank == 1:
            stats = group.stats()
            assert stats["arrays"] == 15
            assert stats["inline_bytes"] == 0, "memory did not come back"
            assert in_use(group._memory.arena) == 0
    return True


@torch_only
def test_views_are_sent_on_and_memory_comes_back(ranks: Ranks) -> None:
    assert all(ranks.run(views_go_on, ranks=(0, 1, 2)))


def without_room(here: Rank) -> list[dict[str, int]]:
    seen = []
    with shmcast.Group(here.group, max_bytes="1MiB") as group:
        for count in (1, 3, 0, 1):
            trees = [noise(600_000, seed) for seed in range(count)]
            received = group.broadcast(trees if here.rank == 0 else None)
            assert same(received, trees)
            seen.append(group.stats())
            del received
            settle(here, group)
    return seen


@torch_only
def test_what_finds_no_room_travels_in_the_message(ranks: Ranks) -> None:
    entry, other = ranks.run(without_room, ranks=(0, 1))
    assert [stats["inline_bytes"] for stats in entry] == [0, 1_200_000, 1_200_000, 1_200_000]
    assert [stats["arrays"] for stats in entry] == [1, 2, 2, 3]
    assert other[1]["message_bytes"] > 1_200_000


# ---- trees that one rank can not handle

_fails_here = False


def rebuilt(value: int) -> int:
    if _fails_here:
        raise LookupError(f"no {value} here")
    return value


class FailsSomewhere:
    def __init__(self, value: int) -> None:
        self.value = value

    def __reduce__(self) -> Any:
        return rebuilt, (self.value,)


def bad_trees(here: Rank, mode: str) -> list[str]:
    global _fails_here
    said = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        refuse = mode == "object" and here.rank == 2
        with Patched(process, "join", _no_memory) if refuse else Patched():
            group = shmcast.Group(here.group, max_bytes="64MiB", fallback="object")
    with group:
        assert group.mode == mode
        array = noise(100_000, 7)
        if here.rank == 0:
            with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
                group.broadcast([array, lambda: None])
        else:
            with pytest.raises(GroupError, match=r"step 1: rank 0 could not encode .*lambda") as caught:
                group.broadcast()
            assert "Traceback" in str(caught.value)
            said.append(str(caught.value).splitlines()[0])
        _fails_here = here.rank == 2
        tree = [array, FailsSomewhere(5)]
        if _fails_here:
            with pytest.raises(GroupError, match="step 2: rank 2 can not rebuild the tree: LookupError: no 5 here"):
                group.broadcast()
            _fails_here = False
        else:
            assert same(group.broadcast(tree if here.rank == 0 else None), [array, 5])
        assert same(group.broadcast(array if here.rank == 0 else None), array)
        settle(here, group)
        if here.rank == 0 and mode == "shared":
            failed = {rank: group._member.steps()[token][1] // 2 for rank, token in enumerate(group.peers)}
            assert failed == {0: 1, 1: 1, 2: 2}
            assert in_use(group._memory.arena) == 0
        together(here)
    return said


class Patched:
    """Another function in a module for a while."""

    def __init__(self, module: Any = None, name: str = "", function: Any = None) -> None:
        self._module, self._name, self._function = module, name, function

    def __enter__(self) -> None:
        if self._module is not None:
            self._before = getattr(self._module, self._name)
            setattr(self._module, self._name, self._function)

    def __exit__(self, *_: object) -> None:
        if self._module is not None:
            setattr(self._module, self._name, self._before)


def _no_memory(key: Any) -> Any:
    raise shmcast.ArenaGoneError(2, "there is no such arena (says the test)")


@torch_only
@pytest.mark.parametrize("mode", ["shared", "object"])
def test_a_bad_tree_leaves_the_group_usable(ranks: Ranks, mode: str) -> None:
    entry, *others = ranks.run(bad_trees, mode, ranks=(0, 1, 2))
    assert entry == []
    assert others[0] == others[1]


def attach_fails(here: Rank) -> bool:
    def stale(handle: Any, **_: Any) -> Any:
        raise shmcast.StaleHandleError("gone (says the test)")

    with shmcast.Group(here.group, max_bytes="64MiB") as group:
        tree = [noise(100_000, 1), noise(100_000, 2)]
        if here.rank == 1:
            with Patched(codec, "attach", stale), pytest.raises(shmcast.StaleHandleError, match="says the test"):
                group.broadcast()
        else:
            assert same(group.broadcast(tree if here.rank == 0 else None), tree)
        assert group.broadcast("go on" if here.rank == 0 else None) == "go on"
        settle(here, group)
        if here.rank == 0:
            # What was granted to the rank that failed is taken back.
            assert in_use(group._memory.arena) == 0
            assert group._member.steps()[group.peers[1]][1] // 2 == 1
        together(here)
    return True


@torch_only
def test_a_rank_that_can_not_attach_says_so(ranks: Ranks) -> None:
    assert all(ranks.run(attach_fails, ranks=(0, 1)))


# ---- ranks that do not share memory


def private_shm() -> Any:
    """A /dev/shm of this thread's own; None where the system does not allow it. Returns how to go back."""
    libc = ctypes.CDLL(None, use_errno=True)
    before = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY)
    if libc.unshare(0x00020000) != 0:  # CLONE_NEWNS
        os.close(before)
        return None

    def back() -> None:
        assert libc.setns(before, 0) == 0
        os.close(before)

    private = libc.mount(b"none", b"/", None, 0x44000, None)  # MS_REC | MS_PRIVATE
    if private != 0 or libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, None) != 0:
        back()
        return None
    return back


def other_answer(hello: Any, opened: Any, at_entry: bool) -> bytes:
    answer = bytearray(_answer(hello, opened, at_entry))
    answer[20] ^= 0xFF
    return bytes(answer)


_answer = meeting._answer


def apart(here: Rank, how: str, blind: int, fallback: str) -> str:
    back = None
    patch = Patched()
    if here.rank == blind:
        if how == "own tmpfs":
            back = private_shm()
        elif how == "same name":
            patch = Patched(meeting, "_answer", other_answer)
        elif how == "no arena":
            patch = Patched(meeting.Arena, "create", _full)
    try:
        with patch, warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            # The entry rank alone decides.
            group = shmcast.Group(here.group, fallback=fallback if here.rank == 0 else "raise", max_bytes="16MiB")
    except GroupError as error:
        return "raised " + str(error)
    finally:
        if back is not None:
            back()
    if group.mode == "shared":
        assert how == "own tmpfs"
        group.close()
        return "impossible"
    with group:
        assert group.mode == "object"
        for seed in range(3):
            expected = a_tree(seed, plain_pickle=group.mode == "object")
            assert same(group.broadcast(expected if here.rank == 0 else None), expected)
    return " ".join(str(warning.message) for warning in warned if warning.category is RuntimeWarning)


def _full(*_: Any, **__: Any) -> Any:
    raise shmcast.ArenaFullError(28, "/dev/shm has 0 bytes free of 67108864 (says the test)")


APART = {
    "own tmpfs": (2, "rank 2: ArenaGoneError: "),
    "same name": (1, "in its control segment, not "),
    "no arena": (0, "rank 0, the entry rank, has no arena: ArenaFullError: [Errno 28] /dev/shm has 0 bytes free"),
}


@torch_only
@pytest.mark.parametrize("how", APART)
def test_ranks_apart_all_raise_the_same(ranks: Ranks, how: str) -> None:
    blind, expected = APART[how]
    said = ranks.run(apart, how, blind, "raise", ranks=(0, 1, 2))
    if "impossible" in said:
        pytest.skip("this process may not have a /dev/shm of its own")
    assert len(set(said)) == 1
    assert said[0].startswith("raised make a group: its 3 ranks do not share memory: ")
    assert expected in said[0]
    assert "fallback='object'" in said[0]


@torch_only
@pytest.mark.parametrize("how", APART)
def test_ranks_apart_send_pickles(ranks: Ranks, how: str) -> None:
    blind, expected = APART[how]
    entry, *others = ranks.run(apart, how, blind, "object", ranks=(0, 1, 2))
    if entry == "impossible":
        pytest.skip("this process may not have a /dev/shm of its own")
    assert expected in entry
    assert others == ["", ""]


# ---- ranks that do not come


def killed(here: Rank) -> None:
    arena = shmcast.Arena.create("64MiB") if here.rank == 0 else None
    group = shmcast.Group(here.group, arena=arena)
    kept = group.broadcast(noise(300_000, 1) if here.rank == 0 else None)
    here.parent.send("ready")
    here.parent.receive()
    with pytest.raises(GroupError) as first:
        for _ in range(10):  # a rank without a connection to the dead one may get a message or two through
            group.broadcast(noise(300_000, 2) if here.rank == 0 else None)
    with pytest.raises(GroupError, match="broken since step"):
        group.broadcast()
    assert np.array_equal(kept, noise(300_000, 1))
    del kept
    group.close()
    here.parent.send((type(first.value).__name__, str(first.value)))
    here.parent.receive()
    if arena is not None:
        # Everybody who lives has let go, and of what the dead one had nothing is left after a scrub.
        arena._member.sweep_peers()
        here.parent.send(in_use(arena))
        arena.close()


@torch_only
@pytest.mark.parametrize("victim", [3, 0])
def test_a_killed_rank_is_named(victim: int) -> None:
    with Ranks(4) as own:
        running = own.start(killed)
        for child in running:
            assert child.receive() == "ready"
        running[victim].kill()
        survivors = [child for rank, child in enumerate(running) if rank != victim]
        for child in survivors:
            child.send("go on")
        for child in survivors:
            kind, text = child.receive()
            assert kind == PeerLostError.__name__, text
            assert f"rank {victim} died or closed the group" in text
        for child in survivors:
            child.send("all have let go")
        if victim != 0:
            assert running[0].receive() == 0
            assert running[0].receive() == ("done", None)
    shmcast.sweep()


def late(here: Rank, absent: int) -> tuple[str, str]:
    with shmcast.Group(here.group, max_bytes="16MiB") as group:
        for _ in range(2):
            group.broadcast()
        here.parent.send("ready")
        here.parent.receive()
        group._timeout = 2.0
        with pytest.raises(GroupError) as first:
            for _ in range(10):  # a message may reach a rank that gets it without the one that is late
                group.broadcast()
        here.parent.send("gave up")
        with pytest.raises(GroupError, match="broken since step") as second:
            group.broadcast()
        assert second.value.__cause__ is first.value
        assert str(first.value) in str(second.value)
    return type(first.value).__name__, str(first.value)


@torch_only
@pytest.mark.parametrize("absent", [1, 0])
def test_a_late_rank_is_named(ranks: Ranks, absent: int) -> None:
    running = ranks.start(late, absent, ranks=(0, 1, 2))
    others = [child for rank, child in enumerate(running) if rank != absent]
    for child in running:
        assert child.receive() == "ready"
    for child in others:
        child.send("go on")
    for child in others:
        assert child.receive() == "gave up"
    running[absent].send("go on")
    assert running[absent].receive() == "gave up"
    results = ranks.results(running)
    kind, text = results.pop(absent)
    assert kind in ("GroupError", "PeerLostError")  # the others have given the group up, or closed it by now
    assert "closed the group" in text
    named = [kind for kind, text in results if f"rank {absent} is at step 2, this is step " in text]
    assert GroupTimeoutError.__name__ in named


def leaves_early(here: Rank) -> str:
    group = shmcast.Group(here.group, max_bytes="16MiB")
    group.broadcast()
    if here.rank == 1:
        group.close()
        here.parent.send("closed")
        return ""
    here.parent.receive()
    with pytest.raises(GroupError) as caught:
        for _ in range(3):
            group.broadcast()
    group.close()
    return str(caught.value)


@torch_only
def test_a_rank_that_closes_early_is_named(ranks: Ranks) -> None:
    running = ranks.start(leaves_early, ranks=(0, 1, 2))
    assert running[1].receive() == "closed"
    running[0].send("go on")
    running[2].send("go on")
    results = ranks.results(running)
    assert any("rank 1 " in text for text in results)
    assert all("closed the group" in text for text in (results[0], results[2]))


# ---- slow ranks


def slow_loads(here: Rank) -> Patched:
    """The next rebuilding of a tree waits for the test."""
    loads = codec.loads

    def wait(blob: bytes) -> Any:
        here.parent.send("has the message")
        here.parent.receive()
        return loads(blob)

    return Patched(codec, "loads", wait)


def closes_at_once(here: Rank) -> bool:
    with shmcast.Group(here.group, max_bytes="64MiB") as group:
        if here.rank == 0:
            group.broadcast(noise(1_000_000, 3))
            here.parent.send("closing")
        else:
            with slow_loads(here):
                received = group.broadcast()
            assert np.array_equal(received, noise(1_000_000, 3))
    return True


@torch_only
def test_the_last_message_reaches_slow_ranks(ranks: Ranks) -> None:
    entry, other = running = ranks.start(closes_at_once, ranks=(0, 1))
    assert entry.receive() == "closing"
    assert other.receive() == "has the message"
    other.send("go on")
    assert ranks.results(running) == [True, True]


def tokenizer(parent: Link, nbytes: int) -> None:
    """Publishes into an arena of its own with a short deadline, and takes back what nobody has attached."""
    with shmcast.Arena.create(f"{4 * nbytes}", segment_bytes=nbytes, grant_timeout=0.02) as arena:
        parent.send(arena.publish(noise(nbytes, 11), readers=1).to_bytes())
        parent.receive()
        # Everything that is not held is revoked many times over while we fill the arena with what nobody attaches.
        for _ in range(20):
            arena.publish(noise(nbytes, 12), readers=1, timeout=30.0)
        parent.send(arena.stats()["revoked"])
        parent.receive()
        parent.send(in_use(arena))


def passes_on(here: Rank, raw: bytes | None) -> int:
    with shmcast.Group(here.group, max_bytes="16MiB") as group:
        if here.rank == 0:
            lease = shmcast.attach(shmcast.Handle.from_bytes(raw))
            tree = Item("from elsewhere", lease.array)
            received = group.broadcast(tree)
            assert group.stats()["passed_on"] == 1
            del lease, tree, received
            gc.collect()
            # The engine on rank 0 is done with it. The group is not, as rank 1 has not attached.
            here.parent.send("done with it")
            here.parent.receive()
        else:
            with slow_loads(here):
                received = group.broadcast()
            assert np.array_equal(received.feature, noise(received.feature.nbytes, 11))
            del received
        settle(here, group)
        return group.stats()["unconfirmed"]


@torch_only
def test_a_block_of_a_tokenizer_is_passed_on_whatever_its_deadline(ranks: Ranks, child: Any) -> None:
    publisher = child(tokenizer, 1 << 20)
    raw = publisher.receive()
    entry, other = running = ranks.start(passes_on, raw, ranks=(0, 1))
    assert entry.receive() == "done with it"
    assert other.receive() == "has the message"
    publisher.send("go on")
    assert publisher.receive() > 10
    other.send("go on")
    entry.send("go on")
    assert ranks.results(running) == [0, 0]
    publisher.send("count")
    publisher.receive()
    publisher.join()
