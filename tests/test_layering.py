"""Imports only point down, and each foreign library is behind one door: proved from the syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From the ground up. A module imports from rows above its own, and in its own row from what stands before it.
# A new module is placed here first; a package (`channels`) stands for its `__init__`.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "sizes"),
    ("_native",),
    ("names",),  # what segments are called; creates, opens and unlinks them
    ("gc",),  # what the dead have left, and giving it back, by name
    ("content", "handle", "arrays", "tensors"),  # hashes and digests; names of blocks; arrays as bytes
    ("process",),  # what this process has joined and mapped
    ("sweep",),
    ("attach", "terms", "growth", "reservation", "arena", "in_place"),
    ("plain", "codec"),
    ("channels", "channels.*"),
    (
        "message",
        "parts",
        "roster",
    ),  # the bytes of a message, what came of it here; who is there and how far they have come
    ("meeting", "group"),  # how a group comes about, and what it does
    ("own_arena", "compat", "stages"),  # stand in for functions of engines
    ("lockstep", "pool", "tally"),  # what the entry rank tells the others of requests; threads; counts
    ("inline", "modes", "outcome", "request", "ledger"),  # which way requests go; what becomes of them
    ("sending", "materializing", "replicas"),  # who makes a value of a request, and encodes it
    ("drafts", "worker", "staff", "workers"),  # the same in processes of their own
    ("delivery", "alone"),  # what a rank does with a message, and without any
    ("keys", "cache", "desk"),  # what equal requests have given
    ("intake", "executors"),  # requests on the entry rank; who makes values of them there
    ("limits", "caster"),  # on all ranks
    ("futures",),
)
# Looks at arenas from outside: sits on these and on each other in this order, and nothing is built on it.
TOOLS = ("procfs", "foreign", "metrics", "looks", "host", "doctor", "cli", "cli.*", "__main__")
TOOLS_SIT_ON = ("errors", "sizes", "_native", "names", "gc", "sweep", "handle", "arena")

# Who may import a foreign library, at run time. For annotations alone (under TYPE_CHECKING) everybody may.
DOORS: dict[str, tuple[str, ...]] = {
    "numpy": ("arrays",),
    "torch": ("tensors", "channels.group", "channels.pair"),
    "zmq": ("channels.zmq",),
    "posix_ipc": ("names",),
    "inotify_simple": ("cli.watch",),
    "prometheus_client": ("cli.exporter",),
    "sglang": tuple(f"integrations.sglang.{name}" for name in ("targets", "stubs", "hashing", "ranks")),
}
# Above everything: patches an engine, with whatever there is.
ENGINES = ("integrations", "integrations.*")
IMPORTERS = ("importlib.import_module", "import_module", "__import__")


def module_name(package: Path, path: Path) -> str:
    """``shmcast/channels/group.py`` → ``channels.group``; the package's own ``__init__`` → the empty name."""
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def row_name(module: str) -> str:
    """How a module is written in the tables: members of a subpackage share one entry."""
    return f"{module.split('.')[0]}.*" if "." in module else module


def below(module: str) -> set[str] | None:
    """Table entries that a module may import from; None for a module that has no place yet."""
    name = row_name(module)
    if name in ENGINES:
        return {*(entry for row in LAYERS for entry in row), *TOOLS, *ENGINES}
    if name in TOOLS:
        return {*TOOLS_SIT_ON, *TOOLS[: TOOLS.index(name) + 1]}
    reached: set[str] = set()
    for row in LAYERS:
        if name in row:
            return reached | set(row[: row.index(name) + name.endswith("*")])
        reached.update(row)
    return None


def imports(tree: ast.Module, module: str, is_package: bool) -> Iterator[tuple[int, str, bool]]:
    """``(line, absolute dotted name, only for annotations)`` of every import, also inside functions.

    ``from a import b`` gives ``a.b``: whether b is a module is the reader's question."""
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    here = ["shmcast", *module.split(".")] if module else ["shmcast"]
    package = here if is_package else here[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in IMPORTERS:
            names = [node.args[0].value if isinstance(node.args[0], ast.Constant) else "(computed)"]
        else:
            continue
        for name in names:
            yield node.lineno, name, id(node) in for_types


def layering_violations(package: Path) -> list[str]:
    """Every import of a package tree that goes up, sideways, or through a door that is not its own."""
    paths = sorted(package.rglob("*.py"))
    modules = {module_name(package, path) for path in paths} | {"_native"}
    found = []
    for path in paths:
        module = module_name(package, path)
        allowed = below(module)
        if module and allowed is None:
            found.append(f"{module}: has no place in LAYERS")
            continue
        for line, name, only_types in imports(ast.parse(path.read_text()), module, path.name == "__init__.py"):
            where = f"{module or '__init__'}:{line}: imports {name}"
            first, _, rest = name.partition(".")
            if first == "shmcast":
                target = rest
                while target and target not in modules:
                    target = target.rpartition(".")[0]  # from a module, not a module
                if not target:
                    found.append(f"{where}, the package itself")
                elif module and row_name(target) not in (allowed or ()):
                    found.append(f"{where}, which is not below it")
            elif first in DOORS and not only_types and module not in DOORS[first]:
                found.append(f"{where}, which only {' and '.join(DOORS[first])} may")
            elif name == "(computed)":
                found.append(f"{where} name; write the import out")
    return found


def test_imports_point_down() -> None:
    assert layering_violations(ROOT / "shmcast") == []


@pytest.mark.parametrize(
    ("module", "source", "report"),
    [
        ("handle", "from shmcast.arena import Arena", "handle:1: imports shmcast.arena.Arena, which is not below it"),
        ("handle", "from . import group", "handle:1: imports shmcast.group, which is not below it"),
        ("handle", "from .channels import group", "imports shmcast.channels.group, which is not below it"),
        ("channels.group", "from ..group import Group", "imports shmcast.group.Group, which is not below it"),
        ("arena", "def late():\n    import shmcast.codec", "arena:2: imports shmcast.codec, which is not below it"),
        ("attach", "from shmcast import arena", "imports shmcast.arena, which is not below it"),
        ("arena", "from shmcast import Handle", "imports shmcast.Handle, the package itself"),
        ("arena", "import shmcast", "imports shmcast, the package itself"),
        ("codec", "from shmcast import metrics", "imports shmcast.metrics, which is not below it"),
        ("gc", "from shmcast.group import Group", "imports shmcast.group.Group, which is not below it"),
        ("codec", "import numpy as np", "codec:1: imports numpy, which only arrays may"),
        (
            "codec",
            "def late():\n    from torch import distributed",
            "which only tensors and channels.group and channels.pair may",
        ),
        (
            "codec",
            "import importlib\nimportlib.import_module('zmq')",
            "codec:2: imports zmq, which only channels.zmq may",
        ),
        ("codec", "import importlib\nimportlib.import_module('z' + 'mq')", "write the import out"),
        ("newcomer", "", "newcomer: has no place in LAYERS"),
    ],
)
def test_a_wrong_import_is_reported(tmp_path: Path, module: str, source: str, report: str) -> None:
    package = synthetic_package(tmp_path)
    (package / f"{module.replace('.', '/')}.py").write_text(source)
    violations = layering_violations(package)
    assert len(violations) == 1
    assert report in violations[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("arrays", "import numpy as np\nfrom .errors import UnsupportedArrayError"),
        ("tensors", "from shmcast import arrays, errors\nimport torch"),
        ("channels.group", "import torch.distributed as dist\nfrom ..codec import dumps\nfrom . import base"),
        ("codec", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import numpy as np"),
        ("gc", "from . import _native, names"),
        ("metrics", "from . import _native, gc, names\nfrom .arena import Arena"),
        ("cli.ls", "from ..metrics import read\nfrom . import base"),
        ("__init__", "from .group import Group\nfrom .metrics import read"),
    ],
)
def test_a_right_import_is_not(tmp_path: Path, module: str, source: str) -> None:
    package = synthetic_package(tmp_path)
    (package / f"{module.replace('.', '/')}.py").write_text(source)
    assert layering_violations(package) == []


def synthetic_package(tmp_path: Path) -> Path:
    package = tmp_path / "shmcast"
    names = [name for row in (*LAYERS, TOOLS) for name in row]
    for name in names:
        path = package / name.replace(".*", "/base").replace(".", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        if f"{name}.*" in names:
            path.mkdir(exist_ok=True)
            (path / "__init__.py").touch()
        elif name != "_native":
            path.with_suffix(".py").touch()
    (package / "__init__.py").touch()
    return package


def test_the_table_names_nothing_twice() -> None:
    names = [name for row in (*LAYERS, TOOLS) for name in row]
    assert len(names) == len(set(names))
