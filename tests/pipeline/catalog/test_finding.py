"""What is in a store is found, described and compared, in a folder and on an object store alike."""

import json

import pytest
from catalog_support import as_json, invoke, versions
from support import reseal

import notbugs
from pipeline.store import Store


def test_ls_lists_every_version_with_its_tags_and_sizes_the_newest_first(anywhere):
    new, old = versions(anywhere.store, "datasets/other")
    invoke("tag", "other", old, "v1", "--store", anywhere.store)
    found = as_json("ls", "--store", anywhere.store)
    assert [one["made"] for one in found["nodes"]] == sorted((one["made"] for one in found["nodes"]), reverse=True)
    other = {one["version"]: one for one in found["nodes"] if one["name"] == "other"}
    assert (other[old]["tags"], other[new]["tags"], other[new]["samples"]) == (["v1"], [], 64)
    files = json.loads(Store(anywhere.store).read(f"datasets/other/{new}/manifest.json"))["files"]
    assert other[new]["bytes"] == sum(file["bytes"] for file in files)
    assert [run["run"] for run in found["runs"]] == anywhere.runs[::-1]
    assert found["runs"][0]["nodes"] == {"cached": 3, "done": 3} and found["runs"][0]["state"] == "done"
    text = invoke("ls", "models", "--store", anywhere.store).stdout
    assert "models/from_other" in text and "datasets/" not in text and "v1" not in text
    assert invoke("ls", "runs", "--store", anywhere.store).stdout.count("tiny-") == 2


def test_ls_takes_few_requests_and_reads_no_shard(twice, s3, s3_url):
    for path in Store(str(twice.store)).files("", recursive=True):
        Store(s3_url).put(path, (twice.store / path).read_bytes())
    before = s3.requests()
    invoke("ls", "--store", s3_url)
    asked = s3.requests() - before
    assert asked["GET"] == 9 + 2, "one document for each version and each run"
    assert asked["LIST"] <= 2 + 3 + 6 + 1 + 1, "the store, its groups, their names, tags, runs"


def test_show_says_how_a_dataset_was_made_how_good_it_is_and_how_to_open_it(anywhere):
    new, old = versions(anywhere.store, "datasets/other")
    text = invoke("show", f"other/{old[:5]}", "--store", anywhere.store).stdout
    assert "clean attacked by targeted PGD on standard: L2 ε 1.5, 3 steps of 0.3; labelled with the target, a" in text
    assert "attack success rate" in text and "64 train images 1×8×8" in text and new not in text
    (line,) = (line for line in text.splitlines() if line.startswith("  open: "))
    assert eval(line.removeprefix("  open: "), {"notbugs": notbugs}).version == old
    assert f"  path: {Store(anywhere.store).at(f'datasets/other/{old}')}" in text
    assert f"  in run {anywhere.runs[0]}\n" in text, "the run that made it"
    of_both = invoke("show", "clean", "--store", anywhere.store).stdout
    assert f"  in run {anywhere.runs[1]}, and 1 before it\n" in of_both
    found = as_json("show", "other", "--store", anywhere.store)["found"]
    assert [one["version"] for one in found] == [new, old]
    assert found[1]["recipe"]["eps"] == 1.5 and found[1]["state"] == "finished"
    assert [one["runs"] for one in found] == [[anywhere.runs[1]], [anywhere.runs[0]]]


def test_show_has_the_accuracies_of_a_model_and_the_numbers_of_an_evaluation(made_twice):
    text = invoke("show", "from_other", "--store", made_twice.store).stdout
    assert "small_cnn trained on other train for 1 epoch from lr 0.05" in text
    assert text.count("accuracy on clean test images, in the last epoch: ") == 2
    assert text.count("evaluations/accuracy, clean test: accuracy ") == 2, "each version has its own evaluation's"
    rows = as_json("show", "--store", made_twice.store)["rows"]
    evaluation, _ = as_json("show", "accuracy", "--store", made_twice.store)["found"]
    assert evaluation["rows"] == rows, "the newest run's"
    assert "trained on" in invoke("show", "accuracy", "--store", made_twice.store).stdout


def test_what_is_not_finished_is_shown_and_verified_as_such(twice):
    (model,) = (twice.store / "models/standard").iterdir()
    for path in ("manifest.json", "recipe.json", "weights.safetensors", "metrics.jsonl"):
        (model / path).unlink()
    (model / "checkpoint.safetensors").write_bytes(b"after some epochs")
    shown = invoke("show", "standard", "--store", twice.store).stdout
    assert f"models/standard  version {model.name}  unfinished: a checkpoint there so far" in shown
    assert f"models/standard/{model.name}: unfinished\n" in invoke("verify", "--store", twice.store).stdout
    assert as_json("verify", "standard", "--store", twice.store)["unfinished"] == [f"models/standard/{model.name}"]
    assert "unfinished, a checkpoint" in invoke("ls", "models", "--store", twice.store).stdout
    assert "is unfinished" in invoke("diff", "standard", "from_other", "--store", twice.store, code=2).stderr
    other = twice.store / "datasets/other" / versions(twice.store, "datasets/other")[0]
    reseal(twice.store, other / "manifest.json", lambda value: value | {"format": 4})
    assert "damaged; `notbugs verify` checks it" in invoke("show", f"other/{other.name}", "--store", twice.store).stdout


def test_log_is_the_lineage_up_and_down(anywhere):
    new, old = versions(anywhere.store, "datasets/other")
    (standard,), (clean,) = (versions(anywhere.store, node) for node in ("models/standard", "datasets/clean"))
    learner, evaluation = (versions(anywhere.store, n)[1] for n in ("models/from_other", "evaluations/accuracy"))
    assert invoke("log", f"other/{old}", "--store", anywhere.store).stdout == (
        f"datasets/other {old}\n\nmade from\n├─ images: datasets/clean {clean}\n└─ model: models/standard {standard}\n"
        f"   └─ on: datasets/clean {clean}\n\nused by\n└─ on: models/from_other {learner}\n"
        f"   └─ models.from_other: evaluations/accuracy {evaluation}\n"
    )
    down = as_json("log", "clean", "--store", anywhere.store)["used_by"]
    assert {(one["node"], one["version"]) for one in down} >= {("datasets/other", new), ("datasets/other", old)}
    assert [one["node"] for one in as_json("log", "other", "--store", anywhere.store)["made_from"]] == [
        "datasets/clean",
        "models/standard",
    ]


def test_log_shows_branches_once_and_names_what_is_no_longer_there(twice):
    text = invoke("log", "clean", "--store", twice.store).stdout
    repeated = [line.strip(" │├└─").partition(": ")[2] for line in text.splitlines() if line.endswith(" …")]
    assert repeated and all(text.count(name.removesuffix(" …")) > 1 for name in repeated)
    (model,) = versions(twice.store, "models/standard")
    Store(str(twice.store)).delete_folder(f"models/standard/{model}")
    assert f"model: models/standard {model} not in the store" in invoke("log", "other", "--store", twice.store).stdout


def test_diff_of_versions_and_of_runs_names_what_differs_and_by_how_much(anywhere):
    new, old = versions(anywhere.store, "datasets/other")
    invoke("tag", "other", old, "paper-1", "--store", anywhere.store)
    found = as_json("diff", "other/paper-1", "other", "--store", anywhere.store)
    assert (found["a"], found["b"]) == (f"datasets/other/{old}", f"datasets/other/{new}")
    assert found["recipe"] == [
        {"key": "attack.eps", "a": 1.5, "b": 1.0, "difference": -0.5},
        {"key": "attack.step_size", "a": 0.3, "b": 0.2, "difference": pytest.approx(-0.1)},
    ]
    assert found["inputs"] == []
    a, b = (Store(anywhere.store).find_json(f"datasets/other/{version}/manifest.json") for version in (old, new))
    figures = {change["key"]: change["difference"] for change in found["figures"]}
    assert figures["l2_mean"] == b["l2_mean"] - a["l2_mean"] < 0
    earlier = versions(anywhere.store, "evaluations/accuracy")[1]
    inputs = as_json("diff", f"accuracy/{earlier}", "accuracy", "--store", anywhere.store)["inputs"]
    assert [change["key"] for change in inputs] == ["models.from_other"]
    runs = as_json("diff", *anywhere.runs, "--store", anywhere.store)
    assert {change["key"] for change in runs["recipe"]} == {
        "datasets.other.attack.eps",
        "datasets.other.attack.step_size",
    }
    assert {"key": "datasets/other", "a": old, "b": new, "difference": None} in runs["versions"]
    assert runs["states"] == []
    text = invoke("diff", *anywhere.runs, "--store", anywhere.store).stdout
    assert "datasets.other.attack.eps" in text
    assert invoke("diff", "clean", "clean", "--store", anywhere.store).stdout.endswith("\nno difference\n")


def test_a_tag_stands_wherever_a_version_does_and_stays(anywhere):
    new, old = versions(anywhere.store, "datasets/other")
    at = ("--store", anywhere.store)
    assert invoke("tag", "other", old[:6], "v1", *at).stdout == f"datasets/other {old}: v1\n"
    invoke("tag", "datasets/other", "v1", "paper", *at)
    invoke("tag", "other", old, "v1", *at)
    refused = invoke("tag", "other", new, "v1", *at, code=2).stderr
    assert f"datasets/other has the tag v1 already, for {old}" in refused and refused.count("\n") == 1
    assert notbugs.open("other", store=anywhere.store, tag="v1").version == old
    assert notbugs.open("other", store=anywhere.store, tag="paper").version == old
    with pytest.raises(notbugs.BadInput, match=r"has no tag papr; did you mean 'paper'\?"):
        notbugs.open("other", store=anywhere.store, tag="papr")
    with pytest.raises(notbugs.BadInput, match="got several"):
        notbugs.open("other", store=anywhere.store, tag="v1", version=old)
    assert f"{old} (paper, v1)" in invoke("log", "other/v1", *at).stdout
    assert f"datasets/other/{old}: whole\n" == invoke("verify", "other/v1", *at).stdout
    assert 'tag="paper"' in invoke("show", "datasets/other/v1", *at).stdout
    invoke("tag", "other", new, "v1", "--force", *at)
    assert notbugs.open("other", store=anywhere.store, tag="v1").version == new
    invoke("tag", "other", "v1", "--remove", *at)
    assert f"it has {new}, {old} (paper)\n" in invoke("show", "other/v1", *at, code=2).stderr


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["tag", "other", "v0", "v1"], "has no version or tag v0; it has "),
        (["tag", "othr", "v0", "v1"], "has no node named othr/v0; did you mean 'other'?"),
        (["tag", "control", "", "v 1"], "is empty"),
        (["tag", "control"], "Missing argument 'VERSION'"),
        (["tag", "control", "v1"], "a tag is set with NAME VERSION TAG"),
        (["tag", "control", "v1", "--remove"], "has no version or tag v1"),
        (["log", "../x"], "has no node named ../x"),
        (["diff", "clean", "standard"], "differ in kind"),
        (["diff", "clean", "nothing"], "has no node named nothing"),
        (["show", "clean/v9"], "has no version or tag v9; it has "),
        (["ls", "model"], "'model' is not one of"),
    ],
)
def test_a_request_that_makes_no_sense_is_one_sentence(args, sentence, made_twice):
    refused = invoke(*args, "--store", made_twice.store, code=2).stderr
    assert sentence in refused and refused.count("\n") == 1


@pytest.mark.parametrize("tag", ["a" * 65, "a/b", "..", "0123456789abcdef", "-v", "ä"])
def test_a_tag_is_a_plain_name(tag, made_twice):
    version = versions(made_twice.store, "datasets/clean")[0]
    refused = invoke("tag", "--store", made_twice.store, "--", "clean", version, tag, code=2).stderr
    assert "is no tag: a tag has letters" in refused
    assert not (made_twice.store / "tags").exists()


def test_a_damaged_tag_is_named_by_verify_and_set_again(twice):
    version = versions(twice.store, "datasets/clean")[0]
    invoke("tag", "clean", version, "v1", "--store", twice.store)
    path = twice.store / "tags/datasets/clean/v1.json"
    path.write_text(path.read_text().replace(version, "f" * 16))
    assert "tags/datasets/clean/v1.json is damaged" in invoke("show", "clean/v1", "--store", twice.store, code=1).stderr
    assert "tags: 1 damaged\n  datasets/clean/v1.json" in invoke("verify", "--store", twice.store, code=1).stdout
    assert not path.exists()
    invoke("tag", "clean", version, "v1", "--store", twice.store)
    invoke("verify", "--store", twice.store)
