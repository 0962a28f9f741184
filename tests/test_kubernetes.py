"""Image and manifests: they agree with the systemd unit, the alert rules and each other. `packaging/try-container.sh` and
`packaging/try-kubernetes.sh` build them."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from doctor import __version__
from doctor.cli import cli
from doctor.door.address import address

ROOT = Path(__file__).parent.parent
PACKAGING = ROOT / "packaging"
BASE = PACKAGING / "kubernetes" / "base"
MONITORING = PACKAGING / "kubernetes" / "monitoring"
ENTRYPOINT = PACKAGING / "container" / "entrypoint.sh"
INSTALL = (ROOT / "docs" / "install.md").read_text()

TO_BECOME_A_USER = {"SETUID", "SETGID"}


def document(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def pod() -> dict[str, Any]:
    return document(BASE / "daemonset.yaml")["spec"]["template"]["spec"]


def container() -> dict[str, Any]:
    (only,) = pod()["containers"]
    return only


def reading() -> set[str]:
    """The capabilities that the systemd unit gives."""
    unit = (PACKAGING / "systemd" / "gpu-doctor.service").read_text()
    (line,) = re.findall(r"^AmbientCapabilities=(.+)$", unit, re.MULTILINE)
    return {name.removeprefix("CAP_") for name in line.split()}


# Rights -------------------------------------------------------------------------------------------------------------


def test_the_pod_has_the_rights_of_the_unit_and_what_it_takes_to_become_a_user() -> None:
    context = container()["securityContext"]
    assert context["capabilities"] == {"drop": ["ALL"], "add": [*context["capabilities"]["add"]]}
    assert set(context["capabilities"]["add"]) == reading() | TO_BECOME_A_USER


def test_the_entrypoint_keeps_the_rights_of_the_unit() -> None:
    kept = re.findall(r"^keep (\w+) \d+", ENTRYPOINT.read_text(), re.MULTILINE)
    assert {name.upper() for name in kept} == reading()


def test_the_documents_run_a_container_with_those_rights() -> None:
    runs = [run for run in INSTALL.split("docker run")[1:] if "--root /host" in run.partition("```")[0]]
    assert len(runs) == 2
    for run in runs:
        added = set(re.findall(r"--cap-add (\w+)", run.partition("```")[0]))
        assert added == reading() | TO_BECOME_A_USER


def test_nothing_in_the_pod_is_privileged_or_may_become_more_than_it_is() -> None:
    for each in (container(), *pod()["initContainers"]):
        context = each["securityContext"]
        assert not context.get("privileged")
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod()["automountServiceAccountToken"] is False


def test_only_its_recordings_can_be_written() -> None:
    writable = {mount["name"] for mount in container()["volumeMounts"] if not mount.get("readOnly")}
    assert writable == {"state", "tmp"}


def test_it_requests_no_gpu() -> None:
    assert set(container()["resources"]["requests"]) == {"cpu", "memory"}


# The entrypoint -----------------------------------------------------------------------------------------------------


def permitted(*bits: int) -> str:
    return f"CapPrm:\t{sum(1 << bit for bit in bits):016x}\n"


@pytest.mark.parametrize(
    ("uid", "status", "run"),
    [
        (1000, permitted(), "gpu-doctor check"),
        (0, permitted(), "gpu-doctor check"),
        (0, permitted(6, 7), "setpriv {user} --inh-caps=-all --ambient-caps=-all gpu-doctor check"),
        (
            0,
            permitted(0, 1, 2, 6, 7, 19, 21, 34),
            "setpriv {user} --inh-caps=-all,{reading} --ambient-caps=-all,{reading} gpu-doctor check",
        ),
    ],
)
def test_root_becomes_a_user_with_what_it_may_read(tmp_path: Path, uid: int, status: str, run: str) -> None:
    """Run with programs that say how they are called. Bits as in linux/capability.h: 6 and 7 are SETGID and SETUID."""
    for name, script in (
        ("id", f"echo {uid}"),
        ("setpriv", 'echo "setpriv $*"'),
        ("gpu-doctor", 'echo "gpu-doctor $*"'),
    ):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    (tmp_path / "status").write_text(status)
    script = ENTRYPOINT.read_text().replace("/proc/self/status", str(tmp_path / "status"))
    script = script.replace("/opt/gpu-doctor/bin/gpu-doctor", str(tmp_path / "gpu-doctor"))
    ended = subprocess.run(
        ["sh", "-c", script, "entrypoint", "check"],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    user = "--reuid=65532 --regid=65532 --clear-groups --no-new-privs"
    assert ended.stdout.strip().replace(f"{tmp_path}/", "") == run.format(
        user=user, reading="+dac_read_search,+sys_ptrace,+syslog"
    )
    assert ("stays root" in ended.stderr) == (uid == 0 and "setpriv" not in run)


# What runs ----------------------------------------------------------------------------------------------------------


def test_the_daemon_understands_what_the_pod_tells_it() -> None:
    daemon, *arguments = container()["args"]
    known = CliRunner().invoke(cli, [daemon, "--help"]).output
    options = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert all(option in known for option in options)
    (port,) = container()["ports"]
    assert address(options["--listen"]).port == port["containerPort"]
    mounts = {mount["mountPath"] for mount in container()["volumeMounts"]}
    assert {options["--root"], options["--state-dir"]} <= mounts


def test_a_report_from_a_container_names_the_node(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/hostname").write_text("gpu-node-7\n")
    told = CliRunner().invoke(cli, ["check", "--root", str(tmp_path), "--for", "0", "--format", "json"])
    assert json.loads(told.stdout)["node"]["name"] == "gpu-node-7"


def test_blindness_restarts_nothing() -> None:
    """/healthz says no where nothing can be seen, which no restart cures; /report says no where nobody judges."""
    assert container()["livenessProbe"]["httpGet"]["path"] == "/report"
    assert "readinessProbe" not in container()


def test_the_node_is_mounted_so_that_it_can_unmount() -> None:
    (node,) = [mount for mount in container()["volumeMounts"] if mount["name"] == "node"]
    assert node["readOnly"]
    assert node["mountPropagation"] == "HostToContainer"


def test_the_image_is_that_of_this_version() -> None:
    (image,) = document(BASE / "kustomization.yaml")["images"]
    assert image["newTag"] == __version__
    assert {each["image"] for each in (container(), *pod()["initContainers"])} == {image["name"]}


@pytest.mark.parametrize("folder", [BASE, MONITORING], ids=lambda folder: folder.name)
def test_every_manifest_is_named_by_its_kustomization(folder: Path) -> None:
    named = document(folder / "kustomization.yaml")["resources"]
    assert {"kustomization.yaml", *named} == {path.name for path in folder.glob("*.yaml")}


def test_prometheus_operator_gets_the_same_rules_as_prometheus() -> None:
    operators, own = (
        document(MONITORING / "prometheus-rule.yaml"),
        document(PACKAGING / "prometheus" / "gpu-doctor.rules.yml"),
    )
    assert operators["spec"] == own


def test_the_base_has_no_image_of_one_registry() -> None:
    for path in (PACKAGING / "kubernetes").rglob("*.yaml"):
        assert not re.search(r"image: \S*/", path.read_text()), path.name
