#!/usr/bin/env python3
"""From SGLang's tokenizer to every tensor-parallel rank: its own path and shmcast's, side by side in one run.

Real processes: a tokenizer that wraps with SGLang's `wrap_shm_features` and sends over ZMQ, ranks in a gloo group that call
SGLang's `SchedulerRequestReceiver.recv_requests` and build the request's inputs as its scheduler does. A set of them runs
SGLang as it is, a second one with shmcast installed; they take turns, request by request, and sleep while the other set
works. On both a request ends in the same way on all ranks.

The window begins when the tokenizer has wrapped, just before it sends, and ends when the last rank has named every item (hash,
pad value), has read every byte of every feature once, and has freed all. What wrapping takes, hashing in the tokenizer included,
is shown beside it, and both together. CPU is that of the tokenizer and all ranks in that time. Contents are verified on
every rank; what is wrong is reported and makes the exit code 1. A benchmark asserts nothing: it measures and reports.
"""

from __future__ import annotations

import sys
from pathlib import Path


def _find_the_package() -> None:
    """This file has the name of the package that it measures: its folder is searched last."""
    here = Path(__file__).resolve().parent
    sys.path[:] = [place for place in sys.path if Path(place).resolve() != here] + [str(here)]


if __name__ == "__main__":
    _find_the_package()
    from relay.run import main

    sys.exit(main(sys.argv[1:]))
