"""Which way a request goes: how that is said, and that every process chooses alike."""

from __future__ import annotations

import uuid
from typing import Any

import pytest

import shmcast
from child import Link
from shmcast import Caster, modes
from shmcast.modes import Mode, Route, Way


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(modes.VARIABLE, raising=False)


# ---- what may be said


@pytest.mark.parametrize("way", Way)
@pytest.mark.parametrize(("when", "sync"), [("", False), ("-async", False), ("-sync", True)])
@pytest.mark.parametrize(
    ("share", "percent"), [("", 100.0), (":0%", 0.0), (":10%", 10.0), (":2.5%", 2.5), (":100%", 100.0), (":007%", 7.0)]
)
def test_every_form(way: Way, when: str, sync: bool, share: str, percent: float) -> None:
    text = f"{way.value}{when}{share}"
    assert Mode.parse(text, True) == (text, Route(way, sync), percent, Route(Way.REPLICATE, sync))
    if way is not Way.REPLICATE:
        assert Mode.parse(text, False) == (text, Route(way, sync), percent, Route(Way.OBJECT, sync))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "SHM",
        "shm ",
        "shm\n",
        "shmem",
        "sync",
        "shm-",
        "shm-later",
        "shm-sync-async",
        "shm:",
        "shm:10",
        "shm:%",
        "shm:-1%",
        "shm:1e1%",
        "shm:.5%",
        "shm:5.%",
        "shm:١٠%",
        "shm:nan%",
        "shm:10%-sync",
        "shm:10%:10%",
        None,
        3,
        b"shm",
        ["shm"],
    ],
)
def test_what_is_no_mode(text: Any) -> None:
    with pytest.raises(ValueError, match="one of shm, object, raw, replicate is needed") as caught:
        Mode.parse(text, True)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("percent", ["101", "100.1", "1" + "0" * 400])
def test_more_than_all(percent: str) -> None:
    with pytest.raises(ValueError, match="of the requests is more than all of them"):
        Mode.parse(f"shm:{percent}%", False)


@pytest.mark.parametrize("text", ["replicate", "replicate-sync", "replicate:0%"])
def test_replicate_needs_raw_requests_everywhere(group: shmcast.Group, text: str) -> None:
    with pytest.raises(ValueError, match="raw_everywhere=True"):
        Caster(group, len, mode=text)
    with Caster(group, len) as caster:
        with pytest.raises(ValueError, match="raw_everywhere=True"):
            caster.switch(text)
        assert caster.mode == "shm"
    with Caster(group, len, mode=text, raw_everywhere=True) as caster:
        assert caster.mode == text


def test_an_unknown_mode_changes_nothing(group: shmcast.Group) -> None:
    with pytest.raises(ValueError, match="one of shm, object, raw, replicate"):
        Caster(group, len, mode="gpu")
    with Caster(group, len, mode="object") as caster:
        with pytest.raises(ValueError, match="one of shm, object, raw, replicate"):
            caster.switch("gpu")
        assert caster.mode == "object"
        assert shmcast.metrics.snapshot(group)["counters"]["mode_switches"] == 0
        caster.switch("raw-sync:50%")
        assert caster.mode == "raw-sync:50%"
        assert shmcast.metrics.snapshot(group)["counters"]["mode_switches"] == 1


# ---- the environment


@pytest.mark.parametrize("mode", [None, "object", "nonsense"])
def test_the_variable_overrides(group: shmcast.Group, monkeypatch: pytest.MonkeyPatch, mode: str | None) -> None:
    monkeypatch.setenv(modes.VARIABLE, "raw:10%")
    with Caster(group, len, mode=mode) as caster:
        assert caster.mode == "raw:10%"
        caster.switch("object")  # ... until somebody says otherwise
        assert caster.mode == "object"


def test_an_empty_variable_is_none(group: shmcast.Group, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(modes.VARIABLE, "")
    with Caster(group, len, mode="object") as caster:
        assert caster.mode == "object"
    with Caster(group, len) as caster:
        assert caster.mode == "shm"


@pytest.mark.parametrize("text", ["gpu", "shm:200%", "replicate"])
def test_a_wrong_variable_is_named(group: shmcast.Group, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(modes.VARIABLE, text)
    with pytest.raises(ValueError, match="SHMCAST_MODE: mode") as caught:
        Caster(group, len)
    assert repr(text) in str(caught.value)


# ---- shares

IDS: list[Any] = [
    *range(3000),
    *(f"request {number}" for number in range(3000)),
    *((1, "a", number) for number in range(3000)),
]
IDS += [uuid.UUID(int=number) for number in range(3000)]


def chosen(text: str, raw_everywhere: bool = False) -> list[bool]:
    mode = Mode.parse(text, raw_everywhere)
    return [mode.route_of(rid) == mode.route for rid in IDS]


def test_none_and_all() -> None:
    assert not any(chosen("shm:0%"))
    assert not any(chosen("shm:0.0%"))
    assert all(chosen("shm:100%"))
    assert all(chosen("shm"))
    assert Mode.parse("shm-sync:0%", True).route_of("a") == Route(Way.REPLICATE, True)
    assert Mode.parse("shm-sync:0%", False).route_of("a") == Route(Way.OBJECT, True)


@pytest.mark.parametrize("percent", [0.5, 10, 50, 99.9])
def test_a_share_is_about_that_share(percent: float) -> None:
    found = chosen(f"shm:{percent}%")
    expected = len(IDS) * percent / 100
    # The ids are the same in every run: this is no matter of luck.
    assert abs(sum(found) - expected) < 4 * (expected * (1 - percent / 100)) ** 0.5 + 1


def test_who_was_chosen_stays_so_when_more_are() -> None:
    before = chosen("shm:1%")
    for percent in ("10", "33.3", "80"):
        now = chosen(f"raw:{percent}%")
        assert all(after for was, after in zip(before, now, strict=True) if was)
        before = now


def in_a_child(parent: Link, texts: list[str]) -> None:
    parent.send([chosen(text) for text in texts])


def test_every_process_chooses_alike(child: Any) -> None:
    texts = ["shm:1%", "object:10%", "raw-sync:66.6%"]
    processes = [child(in_a_child, texts, PYTHONHASHSEED=seed) for seed in ("1", "2")]
    expected = [chosen(text) for text in texts]
    for process in processes:
        assert process.receive() == expected
