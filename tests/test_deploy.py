"""deploy/ is valid for Kubernetes and KubeRay, and describes the same cluster as cluster.yaml.

tests/data/README.md describes the schemas and their gaps.
"""

import copy
import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from pipeline.cli import main

ROOT = Path(__file__).parent.parent
DATA = ROOT / "tests/data"
CONFIG: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
MANIFESTS: dict[str, Any] = {path.name: yaml.safe_load(path.read_text()) for path in (ROOT / "deploy").glob("*.yaml")}
CLUSTER: dict[str, Any] = MANIFESTS["raycluster.yaml"]["spec"]
JOB: dict[str, Any] = MANIFESTS["rayjob.yaml"]["spec"]


def strict(schema: Any) -> Any:
    """The schema as Kubernetes enforces it: unknown fields are refused."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: strict(part) for key, part in schema.items()}
    if isinstance(schema.get("properties"), dict):
        closed.setdefault("additionalProperties", False)
    return closed


SCHEMAS = {
    name: definition
    for file in ("kubernetes.json", "kuberay.json")
    for name, definition in strict(json.loads((DATA / file).read_text())["$defs"]).items()
}


def check(manifest: dict[str, Any]) -> None:
    jsonschema.validate(manifest, {"$ref": f"#/$defs/{manifest['kind']}", "$defs": SCHEMAS})


def pods() -> dict[str, Any]:
    """The one container of each kind of pod."""
    groups = {"head": CLUSTER["headGroupSpec"], "gpu": CLUSTER["workerGroupSpecs"][0]}
    return {name: group["template"]["spec"]["containers"][0] for name, group in groups.items()}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_fits_its_schema(name: str) -> None:
    check(MANIFESTS[name])


@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        ("spec", {"enableInTreeAutoscalin": True}),
        ("spec", {"rayVersion": 2.6}),
        ("spec.authOptions", {"mode": "tokens"}),
        ("spec.authOptions", {"modus": "token"}),
        ("spec.headGroupSpec", {"rayStartParams": {"num-cpus": 0}}),
        ("spec.headGroupSpec.template.spec", {"serviceAcountName": "notbugs"}),
        ("spec.workerGroupSpecs.0", {"maxReplicas": "8"}),
        ("spec.workerGroupSpecs.0", {"groupNames": "gpu"}),
        ("spec.workerGroupSpecs.0.template.spec.tolerations.0", {"ky": "nvidia.com/gpu"}),
        ("spec.workerGroupSpecs.0.template.spec.containers.0", {"resource": {}}),
        ("spec.workerGroupSpecs.0.template.spec.containers.0.resources", {"limit": {}}),
    ],
)
def test_a_wrong_manifest_is_refused(place: str, wrong: dict[str, Any]) -> None:
    manifest = copy.deepcopy(MANIFESTS["raycluster.yaml"])
    inside = manifest
    for step in place.split("."):
        inside = inside[int(step) if step.isdigit() else step]
    inside |= wrong
    with pytest.raises(jsonschema.ValidationError):
        check(manifest)


def test_a_worker_group_needs_its_bounds() -> None:
    manifest = copy.deepcopy(MANIFESTS["raycluster.yaml"])
    del manifest["spec"]["workerGroupSpecs"][0]["minReplicas"]
    with pytest.raises(jsonschema.ValidationError, match="'minReplicas' is a required property"):
        check(manifest)


def test_the_job_starts_the_cluster_that_stands_alone() -> None:
    assert JOB["rayClusterSpec"] == CLUSTER


def test_the_cluster_is_that_of_the_launcher() -> None:
    (group,) = CLUSTER["workerGroupSpecs"]
    assert CLUSTER["enableInTreeAutoscaling"] and CLUSTER["authOptions"] == {"mode": "token"}
    assert (group["minReplicas"], group["maxReplicas"]) == (0, CONFIG["max_workers"])
    assert CLUSTER["autoscalerOptions"]["idleTimeoutSeconds"] == CONFIG["idle_timeout_minutes"] * 60
    limits = {name: pod["resources"]["limits"] for name, pod in pods().items()}
    assert "nvidia.com/gpu" not in limits["head"] and limits["gpu"]["nvidia.com/gpu"] == "1"
    for name, limit in limits.items():  # a pod must fit the machine that cluster.yaml would start for it
        assert int(limit["cpu"]) < CONFIG["available_node_types"][name]["resources"]["CPU"]


def test_image_and_versions_are_pinned() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert {pod["image"] for pod in pods().values()} == {f"REGISTRY/notbugs:{version}"}
    dockerfile = (ROOT / "deploy/Dockerfile").read_text()
    (base,) = re.findall(r"^FROM (\S+)$", dockerfile, re.MULTILINE)
    assert base == CONFIG["docker"]["worker_image"]
    assert base.split(":")[1].startswith(f"{CLUSTER['rayVersion']}-")
    assert f"/notbugs:{version} " in dockerfile
    for line in re.findall(r"^COPY --chown=ray (.*) \S+$", dockerfile, re.MULTILINE):
        assert all((ROOT / name).exists() for name in line.split())


def test_credentials_come_by_role() -> None:
    account = MANIFESTS["serviceaccount.yaml"]
    assert "eks.amazonaws.com/role-arn" in account["metadata"]["annotations"]
    for group in (CLUSTER["headGroupSpec"], *CLUSTER["workerGroupSpecs"]):
        assert group["template"]["spec"]["serviceAccountName"] == account["metadata"]["name"]
    assert not any("env" in pod or "envFrom" in pod for pod in pods().values())


def test_the_entrypoint_is_a_command_that_exists() -> None:
    name, command, file, *rest = shlex.split(JOB["entrypoint"])
    with main.commands[command].make_context(command, [file, *rest]) as context:
        assert name == "notbugs" and context.params["address"] == "auto" and context.params["gpu"]
    head = CLUSTER["headGroupSpec"]["template"]["spec"]
    mounts = {mount["name"]: mount["mountPath"] for mount in pods()["head"]["volumeMounts"]}
    (volume,) = head["volumes"]
    assert Path(file).parent == Path(mounts[volume["name"]]) and volume["configMap"]["optional"]
