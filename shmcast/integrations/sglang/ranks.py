"""Among the ranks: SGLang's broadcasts and its agreement on features, over shared memory."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from ... import compat
from ...group import Group
from ...parts import LAST_BIT
from . import patches, stubs

GROUP_BYTES = "128MiB"
"""Arena of each group of ranks: features lie in the tokenizers' arenas, so this is for what else requests carry."""

_log = logging.getLogger(__name__)


def broadcast_pyobj(data: Any, rank: int, dist_group: Any = None, src: int = 0, force_cpu_device: bool = True) -> Any:
    """SGLang's function of that name; see `shmcast.broadcast_pyobj`. Features of requests are taken in on the way."""
    intake = _Intake(dist_group)
    with stubs.handed_round():
        received, failures = compat.broadcast_list(
            data, rank, dist_group, src, force_cpu_device, max_bytes=GROUP_BYTES, take_in=intake
        )
    if intake.requests:  # other broadcasts, of what controls the ranks, may follow before `finalize_shm_features`
        _settled.clear()
        _settled.update({id(req): (req, bool(failures >> n & 1)) for n, req in enumerate(intake.requests)})
    return received


class _Intake:
    """Makes tensors of the stubs in requests that are broadcast, as `finalize_shm_features` would do a moment later, so that
    one agreement says both that all ranks have the requests and what of their features somebody could not attach.

    Only where the ranks of this broadcast are all that take these requests in: otherwise there is more to agree on."""

    def __init__(self, process_group: Any) -> None:
        self.requests: list[Any] = []
        self._process_group = process_group
        self._held: list[Any] = []  # until all ranks have theirs: small tensors are copies

    def __call__(self, data: Any) -> int:
        requests = _with_stubs(data)
        if not requests or len(requests) > LAST_BIT:
            return 0
        coordinators = _coordinators()
        if len(coordinators) != 1 or coordinators[0].cpu_group is not self._process_group:
            return 0
        held = [stub for req in requests for stub in _stubs(req)]
        if not all(stubs.is_ours(stub) for stub in held):
            return 0
        self._held, self.requests = held, requests
        return sum((not _materialized(req)) << number for number, req in enumerate(requests))


_settled: dict[int, tuple[Any, bool]] = {}
"""By id: requests of the last broadcast whose features were taken in with it, and whether that failed on some rank."""


def finalize_shm_features(self: Any, recv_reqs: Any) -> None:
    """``SchedulerRequestReceiver._finalize_shm_features``: stubs become tensors, or the request fails on every rank.

    No barrier: every rank holds a block before any rank goes on, and blocks end with their last holder. No reduction: ranks
    read in shared memory what the others could not attach; mostly they have done so when the requests came (`_Intake`)."""
    from sglang.srt.managers.scheduler_components.request_receiver import SchedulerRequestReceiver

    settled = dict(_settled)
    _settled.clear()
    if not recv_reqs or not self.model_config.is_multimodal:
        return
    requests = [req for req in _with_stubs(recv_reqs) if id(req) not in settled]
    held = [stub for req in requests for stub in _stubs(req)]  # as in `_Intake`
    failed = [False] * len(requests)
    if not all(stubs.is_ours(stub) for stub in held):
        # Segments of others are unlinked by who opens them, so all must have opened them first.
        patches.original(SchedulerRequestReceiver, "_finalize_shm_features")(self, recv_reqs)
    elif requests:
        failed = [not _materialized(req) for req in requests]
        for coordinator in _coordinators():
            failed = _agreed(_group_of(coordinator), failed)
    held.clear()
    _refuse([req for req, has_failed in [*settled.values(), *zip(requests, failed, strict=True)] if has_failed])


def _refuse(requests: Sequence[Any]) -> None:
    from sglang.srt.managers import mm_utils
    from sglang.srt.managers.io_struct import MMInputsProcessError

    for req in requests:
        mm_utils.discard_shm_features(req)
        req.mm_inputs = MMInputsProcessError(
            "Failed to materialize shared-memory multimodal features on a scheduler rank."
        )


def process_and_broadcast_mm_inputs(self: Any, raw_mm_inputs: Any) -> Any:
    """``Scheduler._process_and_broadcast_mm_inputs``: built on the entry rank, handed to the others as handles."""
    from sglang.srt.managers import scheduler

    ranks, process_group = self.dp_tp_group, self.dp_tp_cpu_group
    if raw_mm_inputs is None or process_group is None or ranks.world_size == 1:
        return patches.original(scheduler.Scheduler, "_process_and_broadcast_mm_inputs")(self, raw_mm_inputs)
    group = _group(process_group, ranks.first_rank, ranks.ranks)
    result = _built(self, raw_mm_inputs) if group.rank == group.entry else None
    try:
        result = group.broadcast(result, local=True)
    except Exception as error:
        if group.broken is not None or group.closed:
            raise
        # On all ranks: where the inputs can not be encoded the entry rank has whatever says so, the others a GroupError.
        raise scheduler._MultimodalInputProcessingError(str(error)) from error
    if result.error is not None:
        raise scheduler._MultimodalInputProcessingError(result.error)
    return result.inputs


def _built(self: Any, raw_mm_inputs: Any) -> Any:
    from sglang.srt.managers import scheduler

    try:
        inputs = scheduler.MultimodalInputs.from_processor_output(
            raw_mm_inputs, requires_mm_token_modalities=self.model_config.requires_mm_token_modalities
        )
    except Exception as error:
        text = f"Multimodal input processing failed on the TP entry rank: {type(error).__name__}: {error}"
        return scheduler._MultimodalInputBroadcast(error=text)
    return scheduler._MultimodalInputBroadcast(inputs=inputs)


def _tokenized(recv_reqs: Sequence[Any]) -> Iterator[Any]:
    from sglang.srt.managers import io_struct

    single = (io_struct.TokenizedGenerateReqInput, io_struct.TokenizedEmbeddingReqInput)
    batch = (io_struct.BatchTokenizedGenerateReqInput, io_struct.BatchTokenizedEmbeddingReqInput)
    for req in recv_reqs:
        if isinstance(req, single):
            yield req
        elif isinstance(req, batch):
            yield from req.batch


def _with_stubs(recv_reqs: Any) -> list[Any]:
    from sglang.srt.managers import mm_utils

    return [req for req in _tokenized(recv_reqs) if mm_utils.has_shm_features([req])]


def _stubs(req: Any) -> list[Any]:
    from sglang.srt.managers.mm_utils import ShmPointerMMData

    values = [value for item in req.mm_inputs.mm_items for value in (item.feature, item.precomputed_embeddings)]
    flat = [part for value in values for part in (value if isinstance(value, (list, tuple)) else [value])]
    return [part for part in flat if isinstance(part, ShmPointerMMData)]


def _materialized(req: Any) -> bool:
    """Whether its stubs are tensors now."""
    from sglang.srt.managers import mm_utils

    try:
        mm_utils.unwrap_shm_features(req)
    except Exception:
        _log.exception("Failed to materialize shared-memory multimodal features for rid=%s", req.rid)
        return False
    return True


def _coordinators() -> list[Any]:
    """Of the groups whose ranks take in the same requests, as SGLang has them: one after the other they reach everybody."""
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    if not parallel.attn_dp_enabled:
        return [parallel.tp_group] if parallel.tp_size > 1 else []
    return ([parallel.attn_tp_group] if parallel.attn_tp_size > 1 else []) + (
        [parallel.attn_cp_group] if parallel.attn_cp_size > 1 else []
    )


def _group_of(coordinator: Any) -> Group:
    return _group(coordinator.cpu_group, coordinator.ranks[0], coordinator.ranks)


def _group(process_group: Any, first: int, ranks: Sequence[int]) -> Group:
    return compat.group_for(process_group, first, ranks.index(first), max_bytes=GROUP_BYTES)


def _agreed(group: Group, failed: list[bool]) -> list[bool]:
    """Failed on some rank, by request."""
    together: list[bool] = []
    for start in range(0, len(failed), LAST_BIT):
        part = failed[start : start + LAST_BIT]
        mask, _ = group.agree(sum(has_failed << bit for bit, has_failed in enumerate(part)))
        together += [bool(mask >> bit & 1) for bit in range(len(part))]
    return together
