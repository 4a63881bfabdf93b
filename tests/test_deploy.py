"""deploy/ is valid for Kubernetes, KubeRay, SkyPilot and SLURM, and describes the same cluster as cluster.yaml.

tests/data/README.md describes the schemas and their gaps.
"""

import copy
import json
import os
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.scripts.scripts import start
from ray.scripts.symmetric_run import curate_and_validate_ray_start_args, symmetric_run

from pipeline.cli import main

ROOT = Path(__file__).parent.parent
DATA = ROOT / "tests/data"
CONFIG: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
MANIFESTS: dict[str, Any] = {path.name: yaml.safe_load(path.read_text()) for path in (ROOT / "deploy").glob("*.yaml")}
SKY: dict[str, Any] = MANIFESTS.pop("skypilot.yaml")
SLURM = (ROOT / "deploy/slurm.sh").read_text()
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
    copied = {
        name for line in re.findall(r"^COPY --chown=ray (.*) \S+$", dockerfile, re.MULTILINE) for name in line.split()
    }
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert all((ROOT / name).exists() for name in copied)
    assert {name.partition(".")[0] for name in packages} <= copied


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


def test_a_job_that_fails_is_submitted_again_on_a_new_cluster() -> None:
    assert JOB["backoffLimit"] >= 1 and JOB["submitterConfig"]["backoffLimit"] >= 1
    assert JOB["shutdownAfterJobFinishes"] and "clusterSelector" not in JOB  # KubeRay retries on clusters it makes


def command_of(script: str, variables: dict[str, str], *programs: str) -> list[list[str]]:
    """The calls of some programs in a shell script, as bash makes them: each program prints its arguments instead."""
    # One write each, so that no line falls into that of a program in the background.
    stub = "{0}() {{ local said; said=$(printf '%q ' {0} \"$@\"); printf '%s\\n' \"$said\" >&3; }}\n"
    stubs = "".join(stub.format(name) for name in programs)
    ran = subprocess.run(
        ["bash", "-euc", f"exec 3>&1 >/dev/null\n{stubs}{script}\nwait", "script", "imagenet.yaml", "--only", "other"],
        env={"PATH": os.environ["PATH"], "HOME": "/nowhere", **variables},
        capture_output=True, text=True, timeout=20, check=True,
    )  # fmt: skip
    return [shlex.split(line) for line in ran.stdout.splitlines()]


def is_run(arguments: list[str]) -> dict[str, Any]:
    """The parameters of `notbugs run` with these arguments."""
    assert arguments[:2] == ["notbugs", "run"]
    with main.commands["run"].make_context("run", arguments[2:]) as context:
        return context.params


def test_slurm_starts_ray_on_every_node_and_the_run_on_one() -> None:
    variables = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "8"}
    script = 'scontrol() { printf "n1\\nn2\\n"; }\n' + SLURM
    (call,) = command_of(script, variables | {"SLURM_GPUS_ON_NODE": "1", "STORE": "s3://b/store"}, "srun")
    at = call.index("ray")
    (_, ray, *own), run = call[at - 1 : call.index("--")], call[call.index("--") + 1 :]
    context = symmetric_run.make_context("symmetric-run", [*own[1:], "--", *run])
    assert (ray, own[0]) == ("ray", "symmetric-run")
    assert (context.params["address"], context.params["min_nodes"]) == ("n1:6379", 2)
    started = start.make_context("start", curate_and_validate_ray_start_args(own[1:])).params
    assert (started["num_cpus"], started["num_gpus"]) == (8, 1)
    params = is_run(run)
    assert (str(params["file"]), params["store"], params["only"]) == ("imagenet.yaml", "s3://b/store", ("other",))
    assert params["address"] == "n1:6379" and params["gpu"]
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", SLURM, re.MULTILINE))
    assert asked["ntasks-per-node"] == "1" and {"requeue", "exclusive"} <= set(asked)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_skypilot_starts_a_ray_of_its_own_and_the_run_on_the_first_machine(rank: str) -> None:
    jsonschema.validate(SKY, json.loads((DATA / "skypilot.json").read_text()))
    assert SKY["resources"]["use_spot"] and SKY["resources"]["job_recovery"]["max_restarts_on_errors"] > 0
    variables = {
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NODE_RANK": rank,
        "SKYPILOT_NUM_GPUS_PER_NODE": "1",
    }
    script = SKY["run"].replace("trap 'kill", "trap ': kill")  # what is started in the background has ended already
    calls = command_of(script, variables | SKY["envs"], "ray", "notbugs", "mkdir")
    starts = [call for call in calls if call[:2] == ["ray", "start"]]
    (started,) = [start.make_context("start", call[2:]).params for call in starts]
    assert started["block"] and started["num_gpus"] == 1 and started["head"] == (rank == "0")
    assert (started["port"] == 6479) if rank == "0" else (started["address"] == "10.0.0.1:6479")
    runs = [is_run(call) for call in calls if call[0] == "notbugs"]
    assert [(str(run["file"]), run["store"]) for run in runs] == (
        [(SKY["envs"]["EXPERIMENT"], SKY["envs"]["STORE"])] if rank == "0" else []
    )
    assert not any("stop" in call for call in calls)
