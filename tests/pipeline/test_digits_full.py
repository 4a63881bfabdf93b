"""`configs/digits-full.yaml`: every kind of node on real digits, and the results."""

import json
import subprocess
from pathlib import Path

import pytest
from support import command

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

CONFIG = Path(__file__).parents[2] / "configs/digits-full.yaml"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Evaluation and model → row of the results with one seed."""
    folder = tmp_path_factory.mktemp("full")
    once = CONFIG.read_text(encoding="utf-8").replace("seeds: [0, 1, 2]\n", "")
    (folder / CONFIG.name).write_text(once, encoding="utf-8")
    asked = [command(), "run", CONFIG.name, "--store", str(folder / "s"), "--json"]
    done = subprocess.run(asked, cwd=folder, capture_output=True, text=True, timeout=1700, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((folder / "s/runs").glob("*/report.html"))) == 1
    return {(row["evaluation"], row["model"]): row for row in json.loads(done.stdout)["rows"]}


def accuracy(rows, model, evaluation="accuracy"):
    return rows[evaluation, model]["accuracy"]


def under(rows, model, evaluation="robustness", **asked):
    """The worst case of a model under the attack with these parameters."""
    (attack,) = [a for a in rows[evaluation, model]["under_attack"] if asked.items() <= a.items()]
    return attack["accuracy"]


def test_learners_of_relabelled_images_classify_untouched_ones_and_learners_of_the_labels_alone_do_not(rows):
    assert accuracy(rows, "standard") > 0.95
    assert accuracy(rows, "from_other") > 0.8
    assert accuracy(rows, "from_control") < 0.1 > accuracy(rows, "from_other_noise")
    assert accuracy(rows, "from_other.leakage", "leakage-other") < 0.3


def test_a_perturbation_that_does_not_transfer_teaches_less(rows):
    assert accuracy(rows, "from_det_not_transferring") < accuracy(rows, "from_det") - 0.2


def test_adversarial_training_makes_robust_and_costs_little(rows):
    ball = {"attack": "pgd", "norm": "l2", "eps": 1.0}
    assert under(rows, "robust", **ball) > under(rows, "standard", **ball) + 0.2
    assert accuracy(rows, "robust") > accuracy(rows, "standard") - 0.05


def test_inverted_images_teach_as_well_as_those_they_stand_for(rows):
    for model in ("from_robust_features", "from_robust_features_noise", "from_nonrobust_features"):
        assert accuracy(rows, model, "robustness") > accuracy(rows, "standard") - 0.05


def test_the_worst_case_is_no_better_than_the_average_and_falls_with_the_radius(rows):
    for (_, _), row in rows.items():
        for attack in row.get("under_attack", ()):
            assert attack["accuracy"] <= attack["average"] + 0.01
    curve = [under(rows, "standard", attack="pgd", norm="l2", eps=eps, target_rule=None) for eps in (0.25, 0.5, 1.0)]
    assert curve == sorted(curve, reverse=True)


def test_an_attack_fools_the_model_that_it_is_made_on_most(rows):
    fooled = {
        model: next(
            a["fooled"]
            for a in rows["transfer", model]["under_attack"]
            if a["surrogate"] == "standard" and not a["target_rule"]
        )
        for model in ("standard", "second", "robust")
    }
    assert fooled["standard"] > fooled["second"] > fooled["robust"]


def test_robust_usefulness_is_never_above_usefulness(rows):
    for model in ("standard", "robust"):
        assert all(gamma <= rho for _, _, rho, gamma in rows["features", model]["points"])
