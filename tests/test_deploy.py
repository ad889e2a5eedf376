"""deploy/: the files parse, and what they pass to shmcast-gc is understood by it."""

from __future__ import annotations

import configparser
import shlex
from pathlib import Path
from typing import Any

import pytest

from shmcast.cli import gc as cli

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(delimiters=("=",), comment_prefixes=("#",), interpolation=None, strict=True)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string((DEPLOY / "shmcast-gc.service").read_text())
    return parser


def pod() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((DEPLOY / "kubernetes.yaml").read_text())


def test_the_unit_passes_what_is_understood() -> None:
    program, *arguments = shlex.split(unit()["Service"]["ExecStart"])
    assert Path(program).is_absolute()
    assert Path(program).name == "shmcast-gc"
    options = cli.options_of(arguments)
    assert options.watch
    assert options.metrics_port


def test_the_unit_sees_the_shared_dev_shm_and_keeps_it() -> None:
    service = unit()["Service"]
    assert (service["RemoveIPC"], service["PrivateIPC"], service["DynamicUser"]) == ("no", "no", "no")
    assert service["User"] != "root"
    assert service["RestartPreventExitStatus"] == str(cli.NOT_BEGUN)
    assert int(service["TimeoutStopSec"]) > 1
    assert not {"TemporaryFileSystem", "PrivateDevices", "InaccessiblePaths"} & set(service)
    assert set(unit().sections()) == {"Unit", "Service", "Install"}


def test_the_pod_passes_what_is_understood() -> None:
    once, watch = pod()["spec"]["initContainers"]
    for container in (once, watch):
        program, *arguments = container["command"]
        assert program == "shmcast-gc"
        options = cli.options_of(arguments)
        assert options.watch == (container is watch)
    assert watch["restartPolicy"] == "Always"
    assert "restartPolicy" not in once
    port = cli.options_of(watch["command"][1:]).metrics_port
    assert [entry["containerPort"] for entry in watch["ports"]] == [port]
    assert pod()["metadata"]["annotations"]["prometheus.io/port"] == str(port)
    assert cli.options_of(watch["command"][1:]).metrics_address == "0.0.0.0"


def test_all_containers_share_one_dev_shm_and_one_user() -> None:
    spec = pod()["spec"]
    (volume,) = spec["volumes"]
    assert volume["emptyDir"]["medium"] == "Memory"
    for container in [*spec["initContainers"], *spec["containers"]]:
        assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/dev/shm"}]
        assert "runAsUser" not in container.get("securityContext", {})
    assert spec["securityContext"]["runAsUser"]


def test_the_files_are_explained() -> None:
    readme = (DEPLOY.parent / "README.md").read_text()
    for path in DEPLOY.iterdir():
        assert f"deploy/{path.name}" in readme
