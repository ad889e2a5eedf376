"""What can be seen is what was promised: names, docstrings, the error tree, the types of the C core."""

from __future__ import annotations

import ast
import inspect
import types
from pathlib import Path

import pytest

import shmcast
from shmcast import _native, errors

PACKAGE = Path(shmcast.__file__).parent

# Each error is also the built-in by which a caller who does not know us would catch it.
ERROR_TREE: dict[str, tuple[str, ...]] = {
    "ShmcastError": ("Exception",),
    "ArenaError": ("ShmcastError", "OSError"),
    "ArenaFullError": ("ArenaError",),
    "ArenaGoneError": ("ArenaError",),
    "LayoutMismatchError": ("ArenaError",),
    "HandleError": ("ShmcastError", "ValueError"),
    "StaleHandleError": ("HandleError",),
    "IntegrityError": ("ShmcastError",),
    "UnsupportedArrayError": ("ShmcastError", "TypeError"),
    "GroupError": ("ShmcastError",),
    "PeerLostError": ("GroupError",),
    "GroupTimeoutError": ("GroupError", "TimeoutError"),
    "MaterializeError": ("ShmcastError",),
    "BackpressureError": ("ShmcastError",),
}


def visible_names(module: types.ModuleType) -> set[str]:
    """Public names of a module that are not its submodules."""
    return {name for name, value in vars(module).items() if name[0] != "_" and not inspect.ismodule(value)}


def test_all_is_what_is_visible() -> None:
    public = set(shmcast.__all__)
    assert len(shmcast.__all__) == len(public)
    assert visible_names(shmcast) - {"annotations"} == {name for name in public if name[0] != "_"}
    assert all(hasattr(shmcast, name) for name in public)


@pytest.mark.parametrize("name", [name for name in shmcast.__all__ if name[0] != "_"])
def test_everything_public_is_documented(name: str) -> None:
    value = getattr(shmcast, name)
    assert has_own_docstring(value), f"shmcast.{name} has no docstring"
    if inspect.isclass(value):
        for member, attribute in vars(value).items():
            function = getattr(attribute, "__func__", attribute)
            if member[0] != "_" and (inspect.isroutine(function) or isinstance(function, property)):
                assert has_own_docstring(function), f"shmcast.{name}.{member} has no docstring"


def has_own_docstring(value: object) -> bool:
    """Whether a thing is documented itself: neither by its base class nor by a generated signature."""
    text = getattr(value, "__doc__", None) or ""
    inherited = inspect.isclass(value) and "__doc__" not in vars(value)
    generated = inspect.isclass(value) and text.startswith(f"{value.__name__}(")
    return bool(text.strip()) and not inherited and not generated


@pytest.mark.parametrize("name", ERROR_TREE)
def test_error_bases(name: str) -> None:
    bases = {base.__name__ for base in getattr(errors, name).__mro__[1:]}
    assert set(ERROR_TREE[name]) <= bases


def test_error_tree_is_complete() -> None:
    found = {name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, Exception)}
    assert found == set(ERROR_TREE)
    assert found <= set(shmcast.__all__)
    assert all(getattr(shmcast, name) is getattr(errors, name) for name in found)


def test_types_are_shipped() -> None:
    assert (PACKAGE / "py.typed").exists()
    assert (PACKAGE / "_native.pyi").exists()


def stub_names() -> dict[str, set[str]]:
    """``{"": names in the module, "Class": names in that class}`` of ``_native.pyi``, underscored ones left out."""
    tree = ast.parse((PACKAGE / "_native.pyi").read_text())
    found = {"": declared_names(tree.body)}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name[0] != "_":
            found[node.name] = declared_names(node.body)
    return found


def declared_names(body: list[ast.stmt]) -> set[str]:
    names = set()
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) != "TypeAlias":
            names.add(ast.unparse(node.target))
    return {name for name in names if name[0] != "_"}


def test_native_stub_lists_what_is_there() -> None:
    assert stub_names()[""] == visible_names(_native)


@pytest.mark.parametrize("name", [name for name in stub_names() if name])
def test_native_stub_lists_members(name: str) -> None:
    members = {member for member in vars(getattr(_native, name)) if member[0] != "_"}
    assert members == stub_names()[name]
