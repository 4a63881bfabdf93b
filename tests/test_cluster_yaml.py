"""cluster.yaml is valid for Ray's launcher and EC2, with the versions that the tests use."""

import copy
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore.model
import botocore.session
import botocore.validate
import pytest
import ray
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.tags import TAG_RAY_CLUSTER_NAME
from ray.scripts.scripts import start

ROOT = Path(__file__).parent.parent
CONFIG: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
NODE_TYPES: dict[str, Any] = CONFIG["available_node_types"]

HARDWARE = {"m6i.2xlarge": {"CPU": 8}, "g5.xlarge": {"CPU": 4, "GPU": 1}}
"""What an instance of each type has, as AWS lists it: there is no asking it here."""


# -------------------------------------------------------------------------------------------- launcher


def test_the_launcher_takes_the_file() -> None:
    validate_config(prepare_config(copy.deepcopy(CONFIG)))


def test_the_launcher_refuses_a_misspelt_key() -> None:
    with pytest.raises(Exception, match="unexpected"):
        validate_config(prepare_config({**CONFIG, "idle_timeout_minuts": 1}))


def test_the_head_has_no_gpu_and_workers_come_and_go() -> None:
    head, gpu = NODE_TYPES[CONFIG["head_node_type"]], NODE_TYPES["gpu"]
    assert "GPU" not in head["resources"]
    assert (gpu["min_workers"], gpu["max_workers"]) == (0, CONFIG["max_workers"])
    assert gpu["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert gpu["node_config"]["IamInstanceProfile"] and head["node_config"]["IamInstanceProfile"]


@pytest.mark.parametrize("name", NODE_TYPES)
def test_resources_are_those_of_the_instance_type(name: str) -> None:
    assert NODE_TYPES[name]["resources"] == HARDWARE[NODE_TYPES[name]["node_config"]["InstanceType"]]


def test_ray_start_has_the_options_it_is_given() -> None:
    known = {name for option in start.params for name in option.opts}
    for command in [*CONFIG["head_start_ray_commands"], *CONFIG["worker_start_ray_commands"]]:
        given = {word.partition("=")[0] for word in shlex.split(command) if word.startswith("--")}
        assert given <= known, command


def test_every_container_has_the_token_and_asks_for_it() -> None:
    assert CONFIG["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    assert "--env RAY_AUTH_MODE=token" in CONFIG["docker"]["run_options"]
    assert "--dashboard-host=127.0.0.1" in CONFIG["head_start_ray_commands"][-1]


# ------------------------------------------------------------------------------------------------- EC2


def complaints(node_config: dict[str, Any]) -> list[str]:
    """Faults of a node_config by EC2's own service model, as the launcher passes it to RunInstances."""
    model = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    asked = {key: value for key, value in node_config.items() if key != "SubnetIds"} | {"MinCount": 1, "MaxCount": 8}
    report = botocore.validate.ParamValidator().validate(asked, model)
    return [*report.generate_report().splitlines(), *no_choices(asked, model)]


def no_choices(value: Any, shape: botocore.model.Shape, place: str = "") -> Iterator[str]:
    """Values that the model does not list: botocore itself leaves this check to the service."""
    if isinstance(value, dict):
        for key in value.keys() & getattr(shape, "members", {}).keys():
            yield from no_choices(value[key], shape.members[key], f"{place}.{key}")
    elif isinstance(value, list):
        for item in value:
            yield from no_choices(item, shape.member, place)
    elif getattr(shape, "enum", None) and value not in shape.enum:
        yield f"{place.removeprefix('.')}: {value} is no choice"


@pytest.mark.parametrize("name", NODE_TYPES)
def test_ec2_takes_the_node_config(name: str) -> None:
    assert complaints(NODE_TYPES[name]["node_config"]) == []


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"InstanceTyp": "g5.xlarge"}, 'Unknown parameter in input: "InstanceTyp"'),
        ({"InstanceType": "g5.xlarg"}, "InstanceType: g5.xlarg is no choice"),
        ({"InstanceMarketOptions": {"MarketTyp": "spot"}}, 'Unknown parameter in InstanceMarketOptions: "MarketTyp"'),
        ({"InstanceMarketOptions": {"MarketType": "sport"}}, "InstanceMarketOptions.MarketType: sport is no choice"),
        ({"BlockDeviceMappings": [{"Ebs": {"VolumeSize": "150"}}]}, "Invalid type for parameter"),
        ({"IamInstanceProfile": "notbugs-worker"}, "Invalid type for parameter IamInstanceProfile"),
    ],
)
def test_a_wrong_node_config_is_refused(wrong: dict[str, Any], said: str) -> None:
    assert any(said in line for line in complaints({**NODE_TYPES["gpu"]["node_config"], **wrong}))


# -------------------------------------------------------------------------------------------- versions


def pins() -> dict[str, str]:
    """Package → version in constraints.txt for the images: Linux, x86-64, Python 3.11."""
    python = {"python_version": "3.11", "python_full_version": "3.11.0"}
    here = {
        **default_environment(),
        **python,
        "sys_platform": "linux",
        "platform_machine": "x86_64",
        "os_name": "posix",
    }
    lines = (line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    wanted = [Requirement(line) for line in lines if line]
    return {str(r.name): str(r.specifier) for r in wanted if r.marker is None or r.marker.evaluate(here)}


def test_the_images_hold_the_locked_ray() -> None:
    assert pins()["ray"] == f"=={ray.__version__}"
    for role, processor in (("head", "cpu"), ("worker", "gpu")):
        assert CONFIG["docker"][f"{role}_image"] == f"rayproject/ray:{ray.__version__}-py311-{processor}"


def test_the_machines_install_what_notbugs_needs_as_locked() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert CONFIG["file_mounts"]["/home/ray/constraints.txt"] == "constraints.txt"
    (command,) = CONFIG["setup_commands"]
    before, _, packages = command.partition(" -c /home/ray/constraints.txt ")
    assert before.startswith("pip install")
    asked, needed = [Requirement(word) for word in shlex.split(packages)], [Requirement(text) for text in declared]
    assert {(r.name, frozenset(r.extras)) for r in asked} == {(r.name, frozenset(r.extras)) for r in needed}
    locked = pins()
    assert {canonicalize_name(r.name) for r in asked} <= locked.keys()
    assert all(r.specifier.contains(locked[canonicalize_name(r.name)].removeprefix("==")) for r in needed)


def test_the_head_has_the_boto3_of_the_model_that_is_tested_against() -> None:
    (command,) = CONFIG["head_setup_commands"]
    assert command.endswith(f"boto3=={botocore.__version__}")


# ----------------------------------------------------------------------------------------------- roles


def test_the_documented_roles_are_those_of_the_machines() -> None:
    text = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
    policies = [json.loads(body) for body in re.findall(r"^```json\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)]
    known = {"Effect", "Principal", "Action", "Resource", "Condition"}
    assert [policy["Version"] for policy in policies] == ["2012-10-17"] * 3
    assert all(
        rule.keys() <= known and rule["Effect"] == "Allow" for policy in policies for rule in policy["Statement"]
    )
    head, worker = (NODE_TYPES[name]["node_config"]["IamInstanceProfile"]["Name"] for name in ("head", "gpu"))
    assert f"for role in {head} {worker}; do" in text
    rules = {str(rule["Action"]): rule for rule in policies[2]["Statement"]}
    assert rules["iam:PassRole"]["Resource"] == f"arn:aws:iam::ACCOUNT:role/{worker}"
    only_its_own = {f"aws:ResourceTag/{TAG_RAY_CLUSTER_NAME}": CONFIG["cluster_name"]}
    assert rules["ec2:TerminateInstances"]["Condition"] == {"StringEquals": only_its_own}


# --------------------------------------------------------------------------------------------- secrets


@pytest.mark.parametrize("path", ["cluster.yaml", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("deploy/*"))])
def test_no_secret_stands_in_a_file(path: str) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    assert not re.search(r"\b(AKIA|ASIA)[A-Z0-9]{16}\b|-----BEGIN", text)
    assert not re.search(r"(?i)(secret|password|access_key\w*|auth_token)\"?\s*[:=]\s*\"?[\w+/]{8,}", text)
    assert not re.search(
        r"\b[0-9a-f]{32,}\b|[A-Za-z0-9+/]{40,}={0,2}(?![\w/.-])", re.sub(r"[\w.:/-]+/[\w./-]+", "", text)
    )
