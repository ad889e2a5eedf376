"""What is replaced in SGLang, and by what. Importing this imports SGLang."""

import sys
from collections.abc import Sequence

from sglang.srt.managers import mm_utils
from sglang.srt.managers.scheduler_components import request_receiver
from sglang.srt.utils import common

from ...stages import point_to_point_pyobj
from . import hashing, ranks, stubs
from .patches import Target

_SCHEDULER = "sglang.srt.managers.scheduler"


def targets() -> Sequence[Target]:
    """All that is to be replaced in what is imported by now. Of the scheduler only where this process has one: importing it
    takes seconds and hundreds of megabytes."""
    pointer = mm_utils.ShmPointerMMData
    found = [
        Target(pointer, "__init__", stubs.init, ("self", "tensor", "precomputed_hash")),
        Target(pointer, "__getstate__", stubs.getstate, ("self",)),
        Target(pointer, "__setstate__", stubs.setstate, ("self", "state")),
        Target(pointer, "materialize", stubs.materialize, ("self",)),
        Target(pointer, "close_and_unlink", stubs.close_and_unlink, ("self",)),
        Target(pointer, "__del__", stubs.delete, ("self",)),
        Target(pointer, "tensor", stubs.tensor),
        Target(mm_utils, "wrap_shm_features", hashing.wrap_shm_features, ("obj",), everywhere=True),
        Target(
            request_receiver.SchedulerRequestReceiver,
            "_finalize_shm_features",
            ranks.finalize_shm_features,
            ("self", "recv_reqs"),
        ),
        Target(
            common,
            "broadcast_pyobj",
            ranks.broadcast_pyobj,
            ("data", "rank", "dist_group", "src", "force_cpu_device"),
            everywhere=True,
        ),
        Target(
            common,
            "point_to_point_pyobj",
            point_to_point_pyobj,
            ("data", "rank", "group", "src", "dst", "async_send"),
            everywhere=True,
        ),
    ]
    scheduler = sys.modules.get(_SCHEDULER)
    if scheduler is not None:
        found.append(
            Target(
                scheduler.Scheduler,
                "_process_and_broadcast_mm_inputs",
                ranks.process_and_broadcast_mm_inputs,
                ("self", "raw_mm_inputs"),
            )
        )
    return found
