"""SGLang's own objects, as the tests against it make them."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

_MAKER = Path(__file__).resolve().parents[2] / "tests" / "engines" / "sgl.py"
_NEEDED = (
    "sglang.srt.managers.mm_utils",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.scheduler_components.request_receiver",
    "sglang.srt.managers.tokenizer_manager",
    "shmcast.integrations.sglang.targets",
)


def maker() -> Any:
    """``tests/engines/sgl.py``: requests, receivers and what they read of SGLang's configuration."""
    name = "sgl"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, _MAKER)
        if spec is None or spec.loader is None:
            raise ImportError(f"{_MAKER} is not there")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def load() -> None:
    """Import all that the processes need, before they are forked: it takes seconds, and hundreds of megabytes."""
    maker().prepare()
    for name in _NEEDED:
        importlib.import_module(name)


def skip_hash(skip: bool) -> None:
    """For this process, from its next item on."""
    from sglang.srt.environ import envs

    envs.SGLANG_MM_SKIP_COMPUTE_HASH.set(skip)
