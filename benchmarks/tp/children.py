"""What every child process of a run does alike: serve commands from the parent until it says stop, or is gone."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


def command_loop(pipe: Connection, handlers: dict[str, Callable[..., Any]]) -> None:
    """Serve `(command, *arguments)` from `pipe` with `("ok", result)` or `("error", traceback)` until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    while True:
        try:
            command, *arguments = pipe.recv()
        except (EOFError, ConnectionResetError):  # the parent is gone
            with contextlib.suppress(Exception):
                handlers["stop"]()
            return
        try:
            answer = ("ok", handlers[command](*arguments))
        except BaseException:
            answer = ("error", traceback.format_exc())
        try:
            pipe.send(answer)
        except (BrokenPipeError, ConnectionResetError):
            return
        if command == "stop":
            return


def give_back_memory() -> None:
    """Collect garbage and return free heap to the system, so that one strategy's heap is not another's gain."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def reaped_cpu_ns() -> int:
    """CPU of this process's children that have ended and been waited for, since it began."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return round((usage.ru_utime + usage.ru_stime) * 1e9)


def main(arguments: list[str]) -> None:
    """`DESCRIPTOR[,DESCRIPTOR] rank N` or `DESCRIPTOR,DESCRIPTOR tokenizer`: the command pipe, the data pipe."""
    descriptors = [int(number) for number in arguments[0].split(",")]
    pipe = Connection(descriptors[0])
    if arguments[1] == "tokenizer":
        from tp.tokenizer import main as tokenizer

        tokenizer(pipe, Connection(descriptors[1], readable=False))
    else:
        from tp.process import main as rank

        inbox = Connection(descriptors[1], writable=False) if len(descriptors) > 1 else None
        rank(int(arguments[2]), pipe, inbox)
