"""What the processes of a run tell each other about time: plain values, no heavy imports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass
class Record:
    """What one rank knows of one request. Marks are instants, the others durations, all in nanoseconds."""

    index: int
    sent_ns: int = 0  # mark: the entry rank has what it will send, materialized (or raw)
    message_ns: int = 0  # mark: the entry rank hands the message to the transport
    received_ns: int = 0  # mark: the message is here
    usable_ns: int = 0  # mark: the arrays are here ("handle only")
    freed_ns: int = 0  # mark: every byte was read, everything is given back
    shared_by: int = 1  # requests that the message carried
    materialize_ns: int = 0
    publish_ns: int = 0  # serialize, or copy into shared memory, or reserve and seal
    early_publish_ns: int = 0  # the part of it that lies before `sent_ns`
    attach_ns: int = 0  # message → arrays
    read_ns: int = 0
    release_ns: int = 0


class Reply(NamedTuple):
    """A rank's answer to one batch."""

    records: list[Record]
    broadcasts: int  # messages, counted where they leave
    collectives: int  # calls of the process group
    bytes_broadcast: int
    fallbacks: int
    ticks: int
    late_ticks: int
    reaped_cpu_ns: int  # children that have ended, since the process began
    counters: dict[str, int]  # what the strategy itself has counted


class Arrival(NamedTuple):
    """What came from the tokenizer for one request: the payload, and what happened before."""

    payload_bytes: int
    materialized_ns: int  # mark
    materialize_ns: int
    publish_ns: int


class Ended(NamedTuple):
    """What this rank knows of a request in the end."""

    iteration: int
    number: int
    status: str
    freed_ns: int
    fingerprint: int


class StreamReply(NamedTuple):
    """A rank's answer to one stream."""

    ended: list[Ended]  # in the order in which it happened
    arrived_ns: dict[int, int]  # entry rank only
    iterations: int
    lateness_ns: list[int]  # of every tick
    broadcasts: int
    collectives: int
    bytes_broadcast: int
    fallbacks: int
    reaped_cpu_ns: int
    counters: dict[str, int]  # what the strategy itself has counted


def changes(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    """What was counted in between."""
    return {name: value - before.get(name, 0) for name, value in after.items()}
