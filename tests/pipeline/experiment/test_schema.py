"""The JSON Schema of the experiment file accepts what the file may say, and marks what it may not."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from click.testing import CliRunner

from pipeline.cli import main
from pipeline.experiment import spec, yaml12
from stages.errors import BadInput

ROOT = Path(__file__).parents[3]
PUBLISHED = ROOT / "docs/experiment.schema.json"
CHECK = jsonschema.Draft202012Validator(json.loads(PUBLISHED.read_text(encoding="utf-8")))
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))

CLEAN = "clean: {load: {source: sklearn-digits}}"
ATTACK = "images: clean, model: standard"
STANDARD = "standard: {train: {on: clean, arch: small_cnn}}"


def file(datasets: str = "", models: str = STANDARD, evaluations: str = "", top: str = "") -> dict[str, Any]:
    text = f"name: x\n{top}\ndatasets: {{{CLEAN}{', ' if datasets else ''}{datasets}}}\nmodels: {{{models}}}\n"
    return yaml12.load(f"{text}evaluations: {{{evaluations}}}\n".encode())


def test_the_published_schema_is_what_the_command_prints_and_is_a_schema():
    printed = CliRunner().invoke(main, ["schema"])
    assert printed.exit_code == 0 and json.loads(printed.stdout) == CHECK.schema, "run `make docs`"
    CHECK.check_schema(CHECK.schema)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_fits_and_names_the_schema_for_editors(config):
    first = config.read_text(encoding="utf-8").partition("\n")[0]
    assert first == "# yaml-language-server: $schema=../docs/experiment.schema.json"
    CHECK.validate(yaml12.load(config.read_bytes()))


RIGHT = {
    "a sweep": file(f"other: {{attack: {{{ATTACK}, steps: [1, 2]}}, relabel: other}}"),
    "fractions": file(f"other: {{attack: {{{ATTACK}, norm: linf, eps: 8/255, step_size: 2/255}}, relabel: other}}"),
    "a sweep of fractions": file(f"other: {{attack: {{{ATTACK}, eps: [64/255, 1]}}, relabel: other}}"),
    "rules": file(f"other: {{attack: {{{ATTACK}}}, relabel: [other, {{rule: next}}]}}"),
    "seeds": file(f"other: {{seeds: [3, 4], attack: {{{ATTACK}}}, relabel: random}}", top="seeds: [3, 4]"),
    "controls": file(
        f"rand: {{attack: {{{ATTACK}}}, relabel: random}}",
        f"{STANDARD}, learner: {{train: {{on: rand, arch: small_cnn}}}}",
        "leaks: {leakage: rand}",
    ),
    "a curve": file(evaluations="a: {models: [standard], on: clean, attacks: [{eps: [0.1, 0.2], steps: 2}]}"),
    "a nested sweep": file(models="m: {train: {on: clean, arch: small_cnn, adversarial: {eps: [0.5, 1]}}}"),
    "an agreement": file(evaluations="a: {models: [standard], on: clean, agreement: next}"),
}

WRONG = {
    "an unknown key": file(f"other: {{attack: {{{ATTACK}, epss: 1}}, relabel: other}}"),
    "a source that is none": file("x: {load: {source: clipart}}"),
    "a radius below zero": file(f"other: {{attack: {{{ATTACK}, eps: -1}}, relabel: other}}"),
    "no rule": file(f"other: {{attack: {{{ATTACK}}}}}"),
    "two ways": file("x: {load: {source: sklearn-digits}, select: {images: clean, keep: top, share: 0.5}}"),
    "a truth for a number": file(models="m: {train: {on: clean, arch: small_cnn, epochs: true}}"),
    "text for a number": file(models="m: {train: {on: clean, arch: small_cnn, epochs: many}}"),
    "a name that is none": file("'a b': {load: {source: sklearn-digits}}"),
    "a list where none is a sweep": file(evaluations="a: {models: [standard], on: [clean]}"),
    "a missing key": file(models="m: {train: {arch: small_cnn}}"),
    "an empty sweep": file(f"other: {{attack: {{{ATTACK}, steps: []}}, relabel: other}}"),
}


@pytest.mark.parametrize("case", RIGHT)
def test_what_the_program_accepts_fits(case):
    spec.parse(RIGHT[case])
    CHECK.validate(RIGHT[case])


@pytest.mark.parametrize("case", WRONG)
def test_what_the_program_refuses_does_not_fit(case):
    with pytest.raises(BadInput):
        spec.parse(WRONG[case])
    assert not CHECK.is_valid(WRONG[case])
