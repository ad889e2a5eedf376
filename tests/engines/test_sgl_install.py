"""Coming and going: known versions only, all or nothing, a switch, the plugin, names of features, leftovers."""

from __future__ import annotations

import os
import time
from importlib import metadata
from types import SimpleNamespace

import pytest

import shmcast
from shmcast.integrations import sglang
from shmcast.integrations.sglang import leftovers, patches

without_sglang = pytest.mark.without_sglang


@pytest.fixture(autouse=True)
def leave_nothing():
    yield
    sglang.uninstall()
    assert not sglang.installed()


# ---- what is not known is left alone


@without_sglang
@pytest.mark.parametrize("version", ["0.5.22", "0.6.0", "0.5.23rc1"])
def test_another_version_is_refused(monkeypatch, version) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: version)
    with pytest.raises(shmcast.ShmcastError, match=f"SGLang {version}: this build of shmcast knows 0.5.23"):
        sglang.install()
    assert not sglang.installed()


@without_sglang
def test_without_sglang(monkeypatch) -> None:
    def missing(name: str):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(shmcast.ShmcastError, match="not installed"):
        sglang.install()


@without_sglang
def test_the_switch(monkeypatch) -> None:
    monkeypatch.setenv("SHMCAST_SGLANG", "0")
    assert sglang.install() is False
    sglang.plugin()
    assert not sglang.installed()


@without_sglang
@pytest.mark.parametrize("name", ["md5", "SHA256"])
def test_an_unknown_hash(monkeypatch, name) -> None:
    with pytest.raises(ValueError, match="hash is sha256, xxh3, off"):
        sglang.install(hash=name)
    monkeypatch.setenv("SHMCAST_SGLANG_HASH", name)
    with pytest.raises(ValueError, match="hash is sha256, xxh3, off"):
        sglang.install()


@without_sglang
def test_a_plugin_survives_an_unknown_hash(monkeypatch, caplog) -> None:
    monkeypatch.setenv("SHMCAST_SGLANG_HASH", "md5")
    sglang.plugin()
    assert "not 'md5', which SHMCAST_SGLANG_HASH says" in caplog.text


@without_sglang
def test_an_engine_that_has_lost_a_module_is_refused(monkeypatch, caplog) -> None:
    """A version that is known, and yet another package."""
    import sys
    import types

    monkeypatch.setattr(metadata, "version", lambda name: "0.5.23")
    monkeypatch.setitem(sys.modules, "sglang", types.ModuleType("sglang"))
    monkeypatch.delitem(sys.modules, "shmcast.integrations.sglang.targets", raising=False)
    with pytest.raises(shmcast.ShmcastError, match=r"SGLang 0\.5\.23: it is not the one .* ModuleNotFoundError"):
        sglang.install()
    sglang.plugin()
    assert "goes on as it is: ModuleNotFoundError" in caplog.text
    assert not sglang.installed()


def everything():
    """What may be replaced, as it is now."""
    from shmcast.integrations.sglang import targets

    return [vars(target.owner).get(target.name) for target in targets.targets()]


@pytest.mark.parametrize("what", ["gone", "other parameters"])
def test_an_engine_that_is_not_what_it_was_is_left_as_it_is(sgl, monkeypatch, what) -> None:
    """All or nothing: here the last target is wrong."""
    import sglang.srt.utils.common as common
    from sglang.srt.managers.mm_utils import ShmPointerMMData

    before = ShmPointerMMData.__init__
    if what == "gone":
        monkeypatch.delattr(common, "point_to_point_pyobj")
    else:
        monkeypatch.setattr(common, "point_to_point_pyobj", lambda data, rank: None)
    with pytest.raises(shmcast.ShmcastError, match=r"common\.point_to_point_pyobj"):
        sglang_install()
    assert not sglang.installed()
    assert ShmPointerMMData.__init__ is before


def sglang_install(**options) -> bool:
    return sglang.install(**options)


def test_there_and_back(sgl) -> None:

    before = everything()
    assert sglang_install() is True
    assert sglang_install() is True
    during = everything()
    assert all(was is not now for was, now in zip(before, during, strict=True))
    sglang_uninstall()
    sglang_uninstall()
    assert everything() == before


def sglang_uninstall() -> None:
    sglang.uninstall()


# ---- as a plugin


def test_sglang_finds_the_plugin(sgl, monkeypatch, caplog) -> None:
    from sglang.srt import plugins

    monkeypatch.setattr(plugins, "_plugins_loaded", False)
    monkeypatch.setenv("SGLANG_PLUGINS", "shmcast")
    plugins.load_plugins()
    assert sglang.installed()


def test_a_plugin_that_is_refused_says_so_and_no_more(sgl, monkeypatch, caplog) -> None:
    from sglang.srt import plugins

    monkeypatch.setattr(sglang, "KNOWN", ("9.9.9",))
    monkeypatch.setattr(plugins, "_plugins_loaded", False)
    plugins.load_plugins()
    assert not sglang.installed()
    assert "knows 9.9.9; SGLang goes on as it is" in caplog.text


# ---- how features are named


def items(sgl, value, **fields):
    """The item of a request with one feature, wrapped as the tokenizer does it."""
    from sglang.srt.managers import mm_utils

    with sgl.context():
        request = sgl.request("a", [value])
        for name, given in fields.items():
            setattr(request.mm_inputs.mm_items[0], name, given)
        return mm_utils.wrap_shm_features(request).mm_inputs.mm_items


def values():
    import torch

    whole = torch.arange(60_000, dtype=torch.float32).reshape(200, 300)
    return [whole, whole.bfloat16(), [whole, whole[:3].clone()], whole.t(), [torch.zeros(3), torch.zeros(0)]]


def test_names_are_what_sglang_makes_of_the_values(sgl, namespace) -> None:
    """64 bits of SHA-256 by default, so that caches of before, and of other hosts, stay good; computed once."""
    from sglang.srt.managers import mm_utils

    expected = [int(mm_utils.hash_feature(value)) for value in values()]
    sglang_install()
    assert [items(sgl, value)[0].hash for value in values()] == expected
    kept = values()[0]
    assert items(sgl, kept)[0].hash == expected[0]
    calls = []
    with sgl.patched(mm_utils, "hash_feature", lambda value: calls.append(1) or 5):
        assert [items(sgl, kept)[0].hash for _ in range(9)] == [expected[0]] * 9  # it is known by its block
        fresh = kept + 1
        assert [items(sgl, fresh)[0].hash for _ in range(9)] == [5] * 9
    assert calls == [1]


def test_names_do_not_lean_on_xxh3(sgl, namespace, monkeypatch) -> None:
    """Who makes two contents of one XXH3-128 must not have the second taken for the first."""
    from sglang.srt.managers import mm_utils

    sglang_install()
    monkeypatch.setattr(shmcast.Handle, "digest", property(lambda _: 7))  # all collide
    one, other = values()[0], values()[0] + 1
    assert [items(sgl, value)[0].hash for value in (one, other, one)] == [
        int(mm_utils.hash_feature(value)) for value in (one, other, one)
    ]


def test_names_by_xxh3(sgl, namespace) -> None:
    sglang_install(hash="xxh3")
    for value in values():
        parts = value if isinstance(value, list) else [value]
        expected = shmcast.digest(parts if len(parts) > 1 else parts[0]) & (1 << 64) - 1
        assert items(sgl, value)[0].hash == expected


@pytest.mark.parametrize("name", ["sha256", "xxh3", "off"])
def test_names_that_are_given_are_kept(sgl, namespace, name) -> None:
    sglang_install(hash=name)
    (item,) = items(sgl, values()[0], hash=77)
    assert (item.hash, item.feature.precomputed_hash) == (77, 77)


def test_names_are_left_to_the_ranks(sgl, namespace, monkeypatch) -> None:
    sglang_install(hash="off")
    (item,) = items(sgl, values()[0])
    assert item.hash is None
    sglang_uninstall()
    monkeypatch.setenv("SGLANG_MM_SKIP_COMPUTE_HASH", "1")
    sglang_install()
    (item,) = items(sgl, values()[0])
    assert item.hash is None


def test_a_name_does_not_depend_on_how_the_feature_travelled(sgl, namespace) -> None:
    """Shared, inline, or as a tensor of its own: one name, so one entry in the prefix cache."""
    import pickle

    from sglang.srt.managers import mm_utils

    sglang_install()
    value = values()[0]
    (item,) = items(sgl, value)
    shared = pickle.loads(pickle.dumps(item.feature))
    shared.precomputed_hash = None
    assert item.hash == mm_utils.hash_feature(shared) == mm_utils.hash_feature(shared.materialize())
    assert item.hash == mm_utils.hash_feature(value.clone())


# ---- leftovers of others


@without_sglang
def test_leftovers_are_reclaimed_at_the_start(monkeypatch, caplog) -> None:
    """What a crash of SGLang has left, by the rules for files of others: old enough, and used by nobody."""
    names = {what: f"sgl_shm_mm_{os.getpid()}_{what}" for what in ("old", "fresh", "used")}
    long_ago = time.time() - 3600
    monkeypatch.setattr(leftovers, "PATTERN", f"sgl_shm_mm_{os.getpid()}_*")
    with open(f"/dev/shm/{names['used']}", "wb") as held:
        held.write(bytes(100))
        held.flush()
        for name in names.values():
            with open(f"/dev/shm/{name}", "ab") as file:
                file.write(bytes(100))
        age = {f"/dev/shm/{names[what]}": long_ago for what in ("old", "used")}
        monkeypatch.setattr(leftovers.foreign, "_age_s", lambda file: 3600.0 if file.st_ino in inodes(age) else 1.0)
        removed = leftovers.reclaim()
    try:
        assert removed == [names["old"]]
    finally:
        for name in names.values():
            if os.path.exists(f"/dev/shm/{name}"):
                os.unlink(f"/dev/shm/{name}")


def inodes(paths) -> set[int]:
    return {os.stat(path).st_ino for path in paths if os.path.exists(path)}


@without_sglang
def test_a_start_does_not_fail_for_what_others_have_left(monkeypatch) -> None:
    def unreadable(*_: object, **__: object):
        raise OSError("no /proc")

    monkeypatch.setattr(leftovers.foreign, "scan", unreadable)
    assert leftovers.reclaim() == []
    stubborn = SimpleNamespace(name="sgl_shm_mm_1_x", nbytes=5, removable=True)
    monkeypatch.setattr(leftovers.foreign, "scan", lambda _: SimpleNamespace(leftovers=[stubborn]))
    monkeypatch.setattr(leftovers.foreign, "remove", unreadable)
    assert leftovers.reclaim() == []


@without_sglang
def test_patches_take_back_what_they_found() -> None:
    class Owner:
        kept = 1

    targets = [patches.Target(Owner, "kept", 2), patches.Target(Owner, "added", 3)]
    patches.apply(lambda: targets)
    assert (Owner.kept, Owner.added, patches.original(Owner, "kept")) == (2, 3, 1)
    patches.apply(lambda: pytest.fail("twice"))
    patches.take_back()
    assert Owner.kept == 1 and not hasattr(Owner, "added")


@without_sglang
def test_patches_are_all_or_none() -> None:
    """Also where one of them can not be put in place."""

    class Owner:
        kept = 1

    targets = [patches.Target(Owner, "kept", 2), patches.Target(int, "kept", 3), patches.Target(Owner, "added", 4)]
    with pytest.raises(TypeError):
        patches.apply(lambda: targets)
    assert Owner.kept == 1 and not hasattr(Owner, "added") and not patches.applied()
    no_function = patches.Target(Owner, "kept", 2, ("self",))
    with pytest.raises(shmcast.ShmcastError, match=r"Owner\.kept is 1, no function of \(self\)"):
        patches.apply(lambda: [no_function])
    assert Owner.kept == 1


@without_sglang
def test_modules_that_were_imported_meanwhile_get_the_original_back(monkeypatch) -> None:
    import sys
    import types

    def fetch(data):
        return "theirs"

    def replacement(data):
        return "ours"

    engine, early, late, ours = (
        types.ModuleType(name) for name in ("engine_x", "engine_x.early", "engine_x.late", "other")
    )
    engine.fetch = early.fetch = fetch
    ours.fetch = replacement
    for module in (engine, early, late, ours):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    patches.apply(lambda: [patches.Target(engine, "fetch", replacement, ("data",), everywhere=True)])
    assert engine.fetch is early.fetch is replacement
    late.fetch = engine.fetch  # from engine_x import fetch
    patches.take_back()
    assert engine.fetch is early.fetch is late.fetch is fetch
    assert ours.fetch is replacement
