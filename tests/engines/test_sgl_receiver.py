"""SGLang's request receiver on tensor-parallel ranks, fed by a tokenizer over ZMQ: the original and ours, the same outcomes."""

from __future__ import annotations

import gc
import os
import tempfile
from contextlib import contextmanager

import pytest

import shmcast
from child import Link
from ranks import Rank, Ranks, together

THREE = (0, 1, 2)
IMPORT_S = 500.0  # four processes that import SGLang at once on two busy cores


@pytest.fixture(scope="module")
def ranks():
    with Ranks(4) as started:
        yield started


def is_ready(process) -> bool:
    return process.receive(timeout=IMPORT_S) == "ready"


@pytest.fixture
def address():
    with tempfile.TemporaryDirectory() as folder:
        yield f"ipc://{folder}/tokenizer"


# ---- the tokenizer


def features(number: int):
    """What request ``number`` has: a tensor, and a list of a part and a small one."""
    import torch

    pixels = torch.arange(60_000, dtype=torch.float32).reshape(200, 300) + number
    return [pixels, [pixels[:2].clone(), torch.full((7,), float(number), dtype=torch.bfloat16)]]


def tokenizer(parent: Link, address: str, install: bool) -> None:
    """Sends what it is told to; says at the end how often it has copied features, and what is left of them."""
    import sgl

    sgl.prepare()
    import zmq
    from sglang.srt.managers import tokenizer_manager
    from sglang.srt.managers.io_struct import BatchTokenizedGenerateReqInput, sock_send

    from shmcast.integrations import sglang

    if install:
        sglang.install()
    socket = zmq.Context.instance().socket(zmq.PUSH)
    socket.connect(address)
    kept = {}

    def wrapped(rid: str, number: int):
        kept.setdefault(number, features(number))
        obj = tokenizer_manager.wrap_shm_features(sgl.request(rid, kept[number]))
        obj.wrap_pickle_fields()
        return obj

    parent.send("ready")
    with sgl.context():
        while True:
            verb, *args = parent.receive(timeout=IMPORT_S)
            if verb == "send":
                for rid, number in args:
                    sock_send(socket, wrapped(rid, number))
            elif verb == "batch":
                sock_send(socket, BatchTokenizedGenerateReqInput(batch=[wrapped(rid, number) for rid, number in args]))
            elif verb == "abandon":
                wrapped(*args)
            elif verb == "forget":
                kept.clear()
                parent.send(report() if install else None)
            elif verb == "end":
                break
    socket.close()
    if install:
        sglang.uninstall()
    parent.send("ended")
    parent.receive()


def report() -> tuple[int, int]:
    from shmcast.own_arena import own_arena

    gc.collect()
    counters = shmcast.metrics.snapshot(own_arena())["counters"]
    return counters["published"] - counters["aliased"], own_arena().stats()["slots_used"]


# ---- the ranks


@contextmanager
def scheduler(here: Rank, address: str, install: bool):
    """A receiver of SGLang's on this rank."""
    import sgl

    sgl.prepare()
    import zmq

    from shmcast.integrations import sglang

    if install:
        sglang.install()
    socket = None
    if here.rank == 0:
        socket = zmq.Context.instance().socket(zmq.PULL)
        socket.bind(address)
    try:
        with sgl.tensor_parallel(here.group, here.ranks, here.ranks[here.rank]):
            yield sgl.receiver(socket)
    finally:
        together(here)
        if socket is not None:
            socket.close(linger=0)
        gc.collect()
        sglang.uninstall()


def seen(req) -> tuple:
    """What a rank has of a request."""
    import torch

    if not hasattr(req.mm_inputs, "mm_items"):
        return req.rid, req.mm_inputs.message
    sums = []
    for item in req.mm_inputs.mm_items:
        parts = item.feature if isinstance(item.feature, list) else [item.feature]
        assert all(type(part) is torch.Tensor for part in parts)
        sums.append([(str(part.dtype), tuple(part.shape), float(part.double().sum())) for part in parts])
        item.set_pad_value()
    return (
        req.rid,
        sums,
        [item.hash for item in req.mm_inputs.mm_items],
        [item.pad_value for item in req.mm_inputs.mm_items],
    )


def flat(requests):
    return [one for req in requests for one in (req.batch if hasattr(req, "batch") else [req])]


def receives(here: Rank, address: str, install: bool, wanted: int):
    import sgl

    with scheduler(here, address, install) as receiver:
        here.parent.send("ready")
        got = []
        while len(got) < wanted:
            got += flat(sgl.receive(receiver, 1))
        result = [seen(req) for req in got]
        writes(got)
        del got
        gc.collect()
    return result


def writes(requests) -> None:
    """As a model may: in place, which nobody else sees."""
    for req in requests:
        for item in getattr(req.mm_inputs, "mm_items", ()):
            for part in item.feature if isinstance(item.feature, list) else [item.feature]:
                part.zero_()


def served(ranks, child, address: str, install: bool, wanted: int, talk) -> tuple[list, object]:
    """Outcomes by rank, and what the tokenizer reports at the end."""
    running = ranks.start(receives, address, install, wanted, ranks=THREE)
    for rank in running:
        assert is_ready(rank)
    peer = child(tokenizer, address, install)
    assert is_ready(peer)
    talk(peer)
    results = ranks.results(running)
    peer.send(("forget",))
    reported = peer.receive()
    peer.send(("end",))
    assert peer.receive() == "ended"
    peer.join()
    return results, reported


def test_the_same_outcomes_as_the_original(ranks, child, address) -> None:
    """Dtypes, shapes, values, hashes and pad values, on every rank, for single requests and a batch."""

    def talk(peer) -> None:
        peer.send(("send", ("a", 1), ("b", 2)))
        peer.send(("batch", ("c", 3), ("d", 1)))

    theirs, _ = served(ranks, child, address, False, 4, talk)
    ours, (copies, left) = served(ranks, child, address, True, 4, talk)
    assert all(outcomes == theirs[0] for outcomes in theirs)
    assert ours == theirs
    assert [outcome[0] for outcome in ours[0]] == ["a", "b", "c", "d"]
    assert copies == 3 * 3  # three features of three tensors each, one of which was sent twice
    assert left == 0


def test_eight_samples_after_a_warm_up(ranks, child, address) -> None:
    def talk(peer) -> None:
        peer.send(("send", ("warm-up", 5)))
        peer.send(("send", *((f"sample {number}", 5) for number in range(8))))

    ours, (copies, left) = served(ranks, child, address, True, 9, talk)
    assert ours[0] == ours[1] == ours[2]
    assert len({str(outcome[1:]) for outcome in ours[0]}) == 1  # nobody saw what others wrote
    assert (copies, left) == (3, 0)


def test_what_is_never_sent_comes_back(ranks, child, address) -> None:
    def talk(peer) -> None:
        peer.send(("abandon", "x", 7))
        peer.send(("send", ("a", 7)))

    ours, (copies, left) = served(ranks, child, address, True, 1, talk)
    assert ours[0] == ours[1] == ours[2]
    assert (copies, left) == (3, 0)


# ---- one rank that can not


def fails_on(here: Rank, address: str, install: bool, victim: int):
    """Every second request can not be attached on one rank."""
    import sgl

    sgl.prepare()
    from sglang.srt.managers.mm_utils import ShmPointerMMData

    from shmcast.integrations.sglang import stubs

    with scheduler(here, address, install) as receiver:
        here.parent.send("ready")
        before, calls = ShmPointerMMData.materialize, []

        def refuse(self):
            calls.append(self)
            if here.rank == victim and len(calls) in (4, 8):
                raise RuntimeError("no memory, for this test")
            return before(self)

        got = []
        with sgl.patched(ShmPointerMMData, "materialize", refuse):
            while len(got) < 5:
                got += flat(sgl.receive(receiver, 1))
        result = [seen(req) for req in got]
        assert stubs.is_ours(calls[0]) is install
        got.clear()
        calls.clear()
        gc.collect()
    return result


@pytest.mark.parametrize("victim", THREE)
def test_one_rank_that_can_not(ranks, child, address, victim) -> None:
    """The same requests fail on all ranks, also where one alone could not; the others, and later ones, are served."""
    running = ranks.start(fails_on, address, True, victim, ranks=THREE)
    for rank in running:
        assert is_ready(rank)
    peer = child(tokenizer, address, True)
    assert is_ready(peer)
    peer.send(("batch", *((f"{number}", number) for number in range(4))))
    peer.send(("send", ("later", 9)))
    results = ranks.results(running)
    assert results[0] == results[1] == results[2]
    failed = [outcome[0] for outcome in results[0] if len(outcome) == 2]
    assert failed == ["1", "3"], results[0]
    assert results[0][4][0] == "later"
    peer.send(("forget",))
    _, left = peer.receive()
    assert left == 0
    peer.send(("end",))
    peer.join()


# ---- what SGLang imports by name, and the scheduler's own broadcast


def by_name(here: Rank):
    import importlib

    import sgl

    sgl.prepare()
    from shmcast.integrations import sglang
    from shmcast.integrations.sglang import ranks as ours
    from shmcast.stages import point_to_point_pyobj

    names = [
        "sglang.srt.utils.common", "sglang.srt.utils", "sglang.srt.managers.scheduler_components.request_receiver",
        "sglang.srt.distributed.communication_op", "sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller",
        "sglang.srt.managers.tp_worker", "sglang.srt.managers.scheduler_components.dynamic_chunk_sizer",
    ]  # fmt: skip
    modules = [importlib.import_module(name) for name in names]
    before = [module.broadcast_pyobj for module in modules]
    sglang.install()
    try:
        assert all(module.broadcast_pyobj is ours.broadcast_pyobj for module in modules)
        assert modules[2].point_to_point_pyobj is point_to_point_pyobj
        data = [{"a": 1}, "b"] if here.rank == 0 else []
        got = modules[3].broadcast_pyobj(data, here.ranks[here.rank], here.group, src=here.ranks[0])
        assert got == [{"a": 1}, "b"]
        assert modules[3].broadcast_pyobj([], here.ranks[here.rank], here.group, src=here.ranks[0]) == []
        together(here)
    finally:
        sglang.uninstall()
    assert [module.broadcast_pyobj for module in modules] == before


def test_functions_that_were_imported_by_name(ranks) -> None:
    ranks.run(by_name, ranks=THREE)


def broadcasts_inputs(here: Rank, install: bool, fail: bool | str):
    """`Scheduler._process_and_broadcast_mm_inputs`, as `--enable-broadcast-mm-inputs-process` has it called."""
    from types import SimpleNamespace

    import sgl

    sgl.prepare()
    from sglang.srt.managers import scheduler

    from shmcast.attach import lease_of
    from shmcast.integrations import sglang

    if install:
        sglang.install()
    try:
        group = sgl.coordinator(here.group, here.ranks, here.ranks[here.rank])
        self = SimpleNamespace(
            dp_tp_group=group,
            dp_tp_cpu_group=here.group,
            model_config=SimpleNamespace(requires_mm_token_modalities=False),
        )
        raw = sgl.request("a", features(3)).mm_inputs
        if fail == "pickling":
            raw.mm_items[0].model_specific_data["stream"] = (item for item in ())
        elif fail:
            raw.mm_items[0].feature = raw.mm_items[0].offsets = object()
        with sgl.tensor_parallel(here.group, here.ranks, here.ranks[here.rank]):
            try:
                made = scheduler.Scheduler._process_and_broadcast_mm_inputs(self, raw)
            except scheduler._MultimodalInputProcessingError as error:
                return str(error)
        sums = [
            float(part.double().sum())
            for item in made.mm_items
            for part in (item.feature if isinstance(item.feature, list) else [item.feature])
        ]
        shared = lease_of(made.mm_items[0].feature) is not None
        assert shared is (install and here.rank > 0)
        result = type(made).__name__, sums, [item.hash for item in made.mm_items]
        del made, raw
        gc.collect()
        together(here)
        return result
    finally:
        sglang.uninstall()


@pytest.mark.parametrize("fail", [False, True])
def test_the_schedulers_own_broadcast(ranks, fail) -> None:
    theirs, ours = (ranks.run(broadcasts_inputs, install, fail, ranks=THREE) for install in (False, True))
    assert theirs == ours
    assert ours[0] == ours[1] == ours[2]
    assert isinstance(ours[0], str) is fail


def test_inputs_that_can_not_be_sent_fail_on_all_ranks(ranks) -> None:
    """The request, and not the scheduler of the entry rank (with the original that one alone, and the others hang)."""
    found = ranks.run(broadcasts_inputs, True, "pickling", ranks=THREE)
    assert all(isinstance(text, str) and "generator" in text for text in found)


# ---- attention-DP: two shards of two ranks; context-parallel x tensor-parallel


def sharded(here: Rank, install: bool, cp: bool):
    """Four ranks; requests go to each shard by itself, and among its ranks along CP, then TP, or along TP alone."""
    import sgl

    sgl.prepare()
    import torch.distributed as dist
    import zmq

    from shmcast.integrations import sglang

    if install:
        sglang.install()
    mine = here.ranks[here.rank]
    pairs = {}
    for members in ((0, 1), (2, 3), (0, 2), (1, 3)):  # collective, so all of them on all ranks
        chosen = [here.ranks[number] for number in members]
        pairs[members] = dist.new_group(chosen, backend="gloo"), chosen
    row = next(pairs[members] for members in ((0, 1), (2, 3)) if here.rank in members)
    column = next(pairs[members] for members in ((0, 2), (1, 3)) if here.rank in members)
    tp, cp_group = sgl.coordinator(*row, mine), sgl.coordinator(*column, mine)
    alone = sgl.coordinator(None, [mine], mine)
    leads = here.rank == 0 if cp else here.rank in (0, 2)
    socket = None
    if leads:
        address = here.parent.receive()
        socket = zmq.Context.instance().socket(zmq.PULL)
        socket.bind(address)
    whole = sgl.coordinator(here.group, here.ranks, mine)
    layout = {
        "tp_size": 4, "tp_rank": here.rank, "tp_group": whole, "pp_rank": 0, "pp_size": 1, "attn_dp_enabled": True,
        "attn_tp_size": 2, "attn_tp_rank": tp.rank_in_group, "attn_tp_group": tp,
        "attn_cp_size": 2 if cp else 1, "attn_cp_rank": cp_group.rank_in_group if cp else 0,
        "attn_cp_group": cp_group if cp else alone, "attn_dp_size": 1 if cp else 2, "attn_dp_rank": 0 if cp else here.rank // 2,
        "enable_dp_attention_local_control_broadcast": True,
    }  # fmt: skip
    from sglang.srt.distributed import communication_op

    with (
        sgl.context(**layout),
        sgl.patched(communication_op, "get_attn_tp_group", lambda: tp),
        sgl.patched(communication_op, "get_attn_cp_group", lambda: cp_group if cp else alone),
    ):
        receiver = sgl.receiver(socket)
        here.parent.send("ready")
        result = [seen(req) for req in flat(sgl.receive(receiver, 3))]
        gc.collect()
    together(here)
    sglang.uninstall()
    for process_group, _ in pairs.values():
        if process_group is not None and process_group != dist.GroupMember.NON_GROUP_MEMBER:
            dist.destroy_process_group(process_group)
    return result


@pytest.mark.parametrize("cp", [False, True], ids=["DP", "CP x TP"])
def test_shards(ranks, child, namespace, cp) -> None:
    with tempfile.TemporaryDirectory() as folder:
        running = ranks.start(sharded, True, cp)
        leaders = [0] if cp else [0, 2]
        addresses = [f"ipc://{folder}/{rank}" for rank in leaders]
        for rank, address in zip(leaders, addresses, strict=True):
            running[rank].send(address)
        for rank in running:
            assert is_ready(rank)
        peers = [child(tokenizer, address, True) for address in addresses]
        for number, peer in enumerate(peers):
            assert is_ready(peer)
            peer.send(("send", *((f"{number}-{n}", n) for n in range(3))))
        results = ranks.results(running)
        assert results[0] == results[1]
        assert results[2] == results[3]
        assert (results[0] == results[2]) is cp
        for peer in peers:
            peer.send(("forget",))
            copies, left = peer.receive()
            assert (copies, left) == (9, 0)
            peer.send(("end",))
            peer.join()
    assert not [name for name in os.listdir("/dev/shm") if name.startswith(f"shmcast.{namespace}.")]
