"""Ranks for tests: real processes in one gloo group, started once for a module because importing torch takes seconds.

A test module has the fixture::

    @pytest.fixture(scope="module")
    def ranks():
        with Ranks(4) as started:
            yield started

and functions that run on the ranks and return a literal::

    def doubled(here, number):           # here: a Rank
        return here.rank * number

    def test_something(ranks):
        assert ranks.run(doubled, 2) == [0, 2, 4, 6]
        assert ranks.run(doubled, 2, ranks=(1, 3)) == [0, 2]

Each run has a new process group and the namespace of its test. A test that kills a rank makes `Ranks` of its own.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import shmcast
from child import Child, ChildFailedError, Link, LinkClosedError

IDLE_S = 3600.0
"""How long a rank waits for something to do: the test process ends it before."""


@dataclasses.dataclass
class Rank:
    """What a function that runs on a rank knows."""

    rank: int
    """Within the group of this run."""
    size: int
    group: Any
    """Process group of this run."""
    ranks: tuple[int, ...]
    """Ranks of the default group that are in it, in order."""
    parent: Link
    """The test's end: ``here.parent.send(...)`` and ``receive()``."""


class Ranks:
    """The test's end."""

    def __init__(self, size: int) -> None:
        self._directory = tempfile.TemporaryDirectory()
        store = os.path.join(self._directory.name, "store")
        self.children = [Child(serve, rank, size, store) for rank in range(size)]
        self._usable = True

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            for child in self.children:
                if not self._usable:
                    child.kill()
            for child in self.children:
                child.finish()
        finally:
            self._directory.cleanup()

    def start(self, function: Callable[..., object], *args: object, ranks: Sequence[int] | None = None) -> list[Child]:
        """Run a function on these ranks of the default group, in their order; returns their processes to talk with."""
        assert self._usable, "an earlier test has left the ranks in the middle of something"
        self._usable = False  # until every rank has said that it is done
        chosen = tuple(range(len(self.children)) if ranks is None else sorted(ranks))
        namespace = os.environ["SHMCAST_NAMESPACE"]
        for child in self.children:
            child.send((function.__code__.co_filename, function.__qualname__, namespace, chosen, args))
        return [self.children[rank] for rank in chosen]

    def results(self, chosen: Sequence[Child]) -> list[Any]:
        """What the function has returned, by rank in its group. ChildFailedError where it has raised."""
        for child in self.children:
            if child not in chosen:
                assert child.receive() == ("done", None)
        answers = [child.receive() for child in chosen]
        failed = [f"rank {rank}:\n{answer[1]}" for rank, answer in enumerate(answers) if answer[0] != "done"]
        self._usable = all(answer[0] in ("done", "failed") for answer in answers)
        if failed:
            raise ChildFailedError("\n".join(failed))
        return [answer[1] for answer in answers]

    def run(self, function: Callable[..., object], *args: object, ranks: Sequence[int] | None = None) -> list[Any]:
        """`start` and `results`."""
        return self.results(self.start(function, *args, ranks=ranks))


def serve(parent: Link, rank: int, size: int, store: str) -> None:
    """One rank: run what the test asks for until it closes the link."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
    while True:
        path, name, namespace, chosen, args = parent.receive(timeout=IDLE_S)
        os.environ["SHMCAST_NAMESPACE"] = namespace
        group = dist.new_group(sorted(chosen), backend="gloo")
        result: tuple[str, Any] = ("done", None)
        if rank in chosen:
            try:
                here = Rank(sorted(chosen).index(rank), len(chosen), group, tuple(sorted(chosen)), parent)
                result = ("done", getattr(_module(path), name)(here, *args))
            except (KeyboardInterrupt, SystemExit, LinkClosedError):
                raise
            except BaseException:  # what pytest raises is no Exception
                result = ("failed", traceback.format_exc())
            # A rank that keeps its group's sockets open keeps others, who wait on them, from destroying theirs.
            here = None
            dist.destroy_process_group(group)
        del group
        parent.send(result)


def _module(path: str) -> Any:
    name = Path(path).stem
    if name not in sys.modules:
        sys.path.append(str(Path(path).parent))  # what the module imports from its own folder
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


# ---- for functions that run on ranks


def together(here: Rank) -> None:
    """No rank goes on before all are here."""
    import torch.distributed as dist

    dist.barrier(here.group)


def settle(here: Rank, group: shmcast.Group) -> None:
    """All ranks have taken in all messages, and the entry rank knows."""
    gc.collect()
    together(here)
    group.broadcast()


def in_use(arena: shmcast.Arena) -> int:
    """Blocks of an arena that somebody has a claim on."""
    gc.collect()
    arena._owner.reclaim()
    return arena.stats()["slots_used"]


class Patched:
    """Another function in a module for a while."""

    def __init__(self, module: Any = None, name: str = "", function: Any = None) -> None:
        self._module, self._name, self._function = module, name, function

    def __enter__(self) -> None:
        if self._module is not None:
            self._before = getattr(self._module, self._name)
            setattr(self._module, self._name, self._function)

    def __exit__(self, *_: object) -> None:
        if self._module is not None:
            setattr(self._module, self._name, self._before)
