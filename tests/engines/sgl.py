"""SGLang's own objects for tests and benchmarks: requests with features, and a scheduler's receiver on a rank.

Importing SGLang takes seconds and some 600 MB a process, so everything here is imported when it is called.
"""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

_library: list[Any] = []


def prepare() -> None:
    """Before SGLang is imported: what torchvision, built for CUDA, would declare of its operators."""
    import torch

    warnings.simplefilter("ignore")
    if not _library:
        library = torch.library.Library("torchvision", "DEF")
        for schema in ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
                       "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"):  # fmt: skip
            library.define(schema)
        _library.append(library)


def request(rid: str, features: Sequence[Any], **fields: Any) -> Any:
    """A tokenized request with an item for each feature: a tensor, or a list of tensors."""
    prepare()
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
    from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem, MultimodalProcessorOutput
    from sglang.srt.sampling.sampling_params import SamplingParams

    items = [
        MultimodalDataItem(modality=Modality.IMAGE, feature=feature, offsets=[(number, number)])
        for number, feature in enumerate(features)
    ]
    return TokenizedGenerateReqInput(
        rid=rid,
        input_text="",
        input_ids=array("q", [1, 2, 3]),
        input_embeds=None,
        mm_inputs=MultimodalProcessorOutput(mm_items=items),
        token_type_ids=None,
        sampling_params=SamplingParams(max_new_tokens=1),
        return_logprob=False,
        logprob_start_len=0,
        top_logprobs_num=0,
        token_ids_logprob=None,
        stream=False,
        **fields,
    )


@contextmanager
def context(**parallel: Any) -> Iterator[None]:
    """SGLang's process-wide configuration, as far as the paths under test read it."""
    prepare()
    from sglang.srt import runtime_context
    from sglang.srt.managers import mm_utils

    bags = {
        "serving": SimpleNamespace(skip_tokenizer_init=False),
        "disagg": SimpleNamespace(language_only=False, encoder_transfer_backend=""),
        "exec": SimpleNamespace(moe=SimpleNamespace(is_ep_scale_joiner=False)),
        "mm": SimpleNamespace(enable_broadcast_mm_inputs_process=True),
    }
    known = runtime_context._CONTEXT.config_bag
    with ExitStack() as stack:
        stack.enter_context(
            patched(type(runtime_context._CONTEXT), "config_bag", lambda self, name: bags.get(name) or known(name))
        )
        stack.enter_context(patched(mm_utils, "_is_default_tensor_transport", False))
        stack.enter_context(runtime_context.get_parallel().override(**parallel))
        yield


@contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Another attribute for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def coordinator(process_group: Any, ranks: Sequence[int], rank: int) -> Any:
    """What SGLang's GroupCoordinator says of a group. ``ranks``, ``rank``: of the default group."""
    return SimpleNamespace(
        cpu_group=process_group,
        ranks=list(ranks),
        rank=rank,
        rank_in_group=list(ranks).index(rank),
        world_size=len(ranks),
        first_rank=ranks[0],
    )


@contextmanager
def tensor_parallel(process_group: Any, ranks: Sequence[int], rank: int, **more: Any) -> Iterator[None]:
    """A scheduler rank of a tensor-parallel group without attention-DP and pipeline."""
    group = coordinator(process_group, ranks, rank)
    with context(
        tp_size=len(ranks), tp_rank=group.rank_in_group, tp_group=group, pp_rank=0, pp_size=1, attn_tp_size=len(ranks),
        attn_tp_rank=group.rank_in_group, attn_cp_rank=0, attn_cp_size=1, attn_dp_rank=0, attn_dp_size=1,
        attn_dp_enabled=False, **more,
    ):  # fmt: skip
        yield


def receiver(socket: Any) -> Any:
    """A scheduler's request receiver over a socket from the tokenizer; None elsewhere than on rank 0."""
    prepare()
    import zmq
    from sglang.srt.managers.scheduler_components.request_receiver import SchedulerRequestReceiver

    unused = zmq.Context.instance().socket(zmq.PULL) if socket is not None else None
    return SchedulerRequestReceiver(
        recv_from_tokenizer=socket,
        recv_from_rpc=unused,
        recv_skipper=None,
        input_blocker=None,
        mm_receiver=None,
        server_args=None,
        model_config=SimpleNamespace(is_multimodal=True),
        max_recv_per_poll=-1,
        stream_output=lambda *_: None,
        get_last_batch=lambda: None,
    )


def receive(receiver: Any, wanted: int) -> list[Any]:
    """Requests as the scheduler's loop gets them, until there are so many; all ranks loop equally often."""
    got: list[Any] = []
    while len(got) < wanted:
        got += receiver.recv_requests()
    return got
