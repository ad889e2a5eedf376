#!/usr/bin/env python3
"""The main job: one request's arrays on every tensor-parallel rank, by every strategy, measured side by side.

N real processes in a gloo group serve the same sequence of requests by each strategy in turn, round by round. The
window of a request: it arrives → the last rank has read every byte once, copied out into a private buffer (the
stand-in for the transfer to its GPU), and given everything back. Contents are verified outside the window, on every
rank, against arrays that the parent materialized. CPU is that of all processes of the run without their start-up; the
parent stands for the world outside and is not counted. A benchmark asserts nothing: it measures and reports.

With --rate or --concurrency the requests come as a stream instead, while others are served, to ranks that run the loop
of an engine: see `tp/engine.py`.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        from tp.children import main as child_main

        child_main(sys.argv[2:])
    else:
        from tp.run import main

        sys.exit(main(sys.argv[1:]))
