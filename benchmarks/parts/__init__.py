"""What `core.py` is made of: one module a part of what it measures, each with its own lines of the report.

memory      publish, attach, reserve and seal: one process and a reader
broadcast   arrays to all ranks, by four ways
messages    one small message to all ranks: latency beside a futex, CPU beside nothing
casting     `Caster` while photographs are being materialized
ranks       processes in one gloo group
board       words that they share, and a futex on each
figures     from samples to figures
"""
