"""The experiment file: valid content is read, and every fault is reported in one sentence."""

import time

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from support import TINY, Peak

from pipeline.cli import main
from pipeline.experiment.graph import build
from pipeline.experiment.spec import parse, read
from pipeline.run.preflight import wanted
from stages.errors import BadInput


def test_on_is_a_word_and_1e_3_a_number(write):
    text = "name: t\nmodels:\n  m: {train: {on: clean, arch: small_cnn, lr: 1e-3}}\n"
    train = read(write(text)).models["m"].train
    assert (train.on, train.lr) == ("clean", 0.001)


def test_anchors_and_merge_keys_repeat_parts(write):
    text = (
        "name: t\nmodels:\n  a: {train: &a {on: clean, arch: small_cnn, epochs: 3}}\n"
        "  b: {train: {<<: *a, epochs: 4}}\n"
    )
    models = read(write(text)).models
    assert (models["a"].train.epochs, models["b"].train.epochs, models["b"].train.arch) == (3, 4, "small_cnn")


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("# mine\nname: a\ndatasets: {d: {load: {source: sklearn-digits}}}\n", True),
        ("# https://me:pw@host/x\nname: a\ndatasets: {d: {load: {source: sklearn-digits}}}\n", False),
        ("# API_TOKEN=abc\nname: a\ndatasets: {d: {load: {source: sklearn-digits}}}\n", False),
        ('{"name": "a", "datasets": {"d": {"load": {"source": "sklearn-digits"}}}}', False),
    ],
)
def test_the_text_of_an_experiment_is_kept_as_it_was_written_without_secrets(tmp_path, text, kept):
    (tmp_path / "a.yaml").write_text(text)
    assert read(tmp_path / "a.yaml").written == (text if kept else None)


def test_what_a_run_records_of_an_experiment_reads_back_the_same(tiny):
    experiment = parse(tiny)
    assert parse(experiment.model_dump(mode="json", exclude_defaults=True)) == experiment


RULES = "must be one of random, other, next, least_likely, map, or a mapping"


@pytest.mark.parametrize("group, name, key, value, shown", [
    ("datasets", "other", "relabel", 12, "12"),
    ("datasets", "other", "relabel", True, "True"),
    ("evaluations", "accuracy", "agreement", ["next", "other"], r"\['next', 'other'\]"),
    ("evaluations", "accuracy", "attacks", [{"target_rule": 1}], "1"),
])  # fmt: skip
def test_where_a_rule_belongs_the_rules_are_named(tiny, group, name, key, value, shown):
    tiny[group][name][key] = value
    place = f"{group}.{name}.{key}" + (".0.target_rule" if key == "attacks" else "")
    with pytest.raises(BadInput, match=f"^{place}: {RULES}, got {shown}$"):
        parse(tiny)


RENAMED = {
    "datasets.other.attack": ("freeze", 1.0, "stop_at_margin"),
    "models.standard.train": ("drops", [1], "milestones"),
    "models.from_other.train": ("watch", 0, "eval_images"),
    "models.standard": ("load", {"arch": "small_cnn", "weights": "w.pt", "shape": [1, 8, 8]}, "pretrained"),
    "evaluations.accuracy.attacks.0": ("source", ["standard"], "surrogate"),
    "evaluations.accuracy.attacks.1": ("toward", "next", "target_rule"),
}


@pytest.mark.parametrize("place", RENAMED)
def test_a_key_by_its_old_name_is_refused_with_the_new_one(tiny, place):
    old, value, new = RENAMED[place]
    tiny["evaluations"]["accuracy"]["attacks"] = [{"eps": 1}, {"eps": 2}]
    part = tiny
    for key in place.split("."):
        part = part[int(key) if key.isdecimal() else key]
    part[old] = value
    with pytest.raises(BadInput, match=f"^{place}.{old}: `{old}` is called `{new}` now$"):
        parse(tiny)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
PLACES = st.sampled_from(
    [
        ("datasets", "other"),
        ("datasets", "other", "attack", "eps"),
        ("datasets", "other", "attack"),
        ("datasets", "clean", "load"),
        ("datasets", "clean", "load", "source"),
        ("datasets", "other", "relabel"),
        ("models", "standard", "train"),
        ("models", "standard", "train", "milestones"),
        ("evaluations", "accuracy"),
        ("evaluations", "accuracy", "attacks"),
        ("models",),
    ]
)


@given(place=PLACES, value=VALUES)
def test_any_value_anywhere_is_read_or_refused_in_one_sentence(place, value):
    import copy

    experiment = copy.deepcopy(TINY)
    part = experiment
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    try:
        parse(experiment)
    except BadInput as error:
        assert "\n" not in str(error)
        assert str(error).startswith(place[0])


@given(found=VALUES)
def test_any_document_is_refused_in_one_sentence(found):
    with pytest.raises(BadInput) as refused:
        parse(found)
    assert "\n" not in str(refused.value)


def attack(**said):
    return {"datasets.other.attack": {"images": "clean", "model": "standard", **said}}


def source(kind, **said):
    return {"datasets.clean.load": {"source": kind, **said}}


def shards(pattern, **said):
    return source("webdataset", shards={"train": pattern}, **said)


def scored(**said):
    return {"evaluations.accuracy.attacks": [said]}


def put(experiment, changes):
    for place, value in changes.items():
        *way, last = place.split(".")
        inside = experiment
        for key in way:
            inside = inside[key]
        inside[last] = value


LEVELS = "if it is meant in 8-bit levels, write eps:"

REFUSED = {
    # Beyond all limits: at once, whatever it would take.
    "a billion images": (source("synthetic", images={"train": 10**9}), "load.images.train: must be less than or equal"),
    "a billion classes": (source("synthetic", classes=10**9), "load.classes: must be less than or equal to 100000"),
    "a million pixels a side": (source("synthetic", size=10**6), "load.size: must be less than or equal to 1024"),
    "an image a shard": (source("synthetic", shard_size=1), "clean.load: shard_size 1 makes 1,350,000 shards, at most"),
    "shards beyond memory": (source("synthetic", size=1024, shard_size=9000), "takes 26.4 GiB, at most 8 GiB are ta"),
    "a billion tars": (shards("x-{0..999999999}.tar"), "load.shards: the braces stand for 1,000,000,000 tars"),
    "2^40 tars": (shards("{a,b}" * 40), "load.shards: the braces stand for 1,099,511,627,776 tars, at most 100,000"),
    "52^600 tars": (shards("{a..z}" * 600), "load.shards: the braces stand for "),
    "braces that do not close": (shards("{0..9"), "{0..9 has braces that do not close"),
    "a map of many classes": (source("synthetic", classes=100_000, size=8) | {
        "datasets.other.relabel": {"rule": "map", "map": {n: n for n in range(9_000)}}}, "relabel map leaves out 9000"),
    "a batch beyond the shard": (attack(batch_size=10**6), "attack: batch_size 1000000 is more than the 64 images"),
    "a batch to train on": ({"models.standard.train.batch_size": 10**9}, "is more than the 192 images of clean train"),
    "a batch to score": ({"evaluations.accuracy.batch_size": 10**9}, "accuracy: batch_size 1000000000 is more than"),
    "a batch to attack": (scored(batch_size=10**9), "accuracy: attacks.0: batch_size 1000000000 is more than the 64"),
    "a million attacks": (scored(eps=[n / 300 for n in range(1, 200)], steps=[*range(1, 200)]), "more than 1,000"),
    # What moves nothing, or has no room.
    "L∞ 8": (attack(norm="linf", eps=8), f"eps 8 is more than 1, the whole range of a pixel; {LEVELS} 8/255"),
    "L2 128": (attack(eps=128), f"eps 128 is more than 8.0, the diagonal of all images of 1×8×8; {LEVELS} 128/255"),
    "eps 1e30": (attack(eps=1e30), "attack: eps 1e+30 is more than 8.0, the diagonal of all images of 1×8×8"),
    "step 1e38": (attack(step_size=1e38), "attack: step_size 1e+38 is more than 8.0, the diagonal"),
    "small steps": (attack(norm="linf", eps=0.03, step_size=0.0001, steps=7), "less than half an 8-bit level"),
    "small steps in L2": (attack(eps=0.5, step_size=0.001, steps=1), "1 steps of 0.001 lead no further than 0.001"),
    "L2 0.004 at 32 pixels": (attack(eps=0.004) | source("synthetic", size=32), "at most 1 of the 3,072 values"),
    "a turn by nothing": (attack(method="spatial", spatial={"grid": [1, 1, 1]}), "the untouched image alone"),
    "scored under L∞ 8": (scored(norm="linf", eps=8), "accuracy.attacks.0: eps 8 is more than 1, the whole"),
    "scored under L2 128": (scored(eps=128), "accuracy: attacks.0: eps 128 is more than 8.0, the diagonal"),
    "scored under nothing": (scored(norm="linf", eps=0.03, step_size=1e-5, steps=7), "attacks.0: 7 steps of 1e-05"),
    "trained against L2 30": ({"models.standard.train.adversarial": {"eps": 30}}, "train: adversarial: eps 30 is more"),
    "useful within 30": ({"evaluations.u": {"usefulness": {"models": ["standard"], "on": "clean", "eps": 30}}}, "eps"),
    # What has no meaning.
    "filters that cannot whiten": ({"models.standard.train.whiten": True}, "takes an even number of them, at most 18"),
    "a name with slashes": ({"models.from_other.train.on": "../../x"}, "on: names '../../x', which is not one of the"),
    "half a fraction": (attack(eps="8/0"), "attack.eps: must be a valid number, unable to parse string as a number"),
    "not a number": (attack(eps=float("nan")), "attack.eps: must be a finite number, got nan"),
    "true for a number": (attack(steps=True), "datasets.other.attack: steps must not be true or false"),
    "a class map of numbers": (source("image-folder", root="x", classes={"a": 5}), "classes.a: must be a valid list"),
    "a class map of lists": (source("image-folder", root="x", classes={"a": [[]]}), "a valid integer or a valid"),
    "a class map of nothing": (source("image-folder", root="x", classes=5), "'restricted-imagenet' or a mapping"),
    "a key of a source by its name": (source("mnist", limit=0), "clean.load.limit: must be greater than or equal to 1"),
    "a leakage of a number": ({"evaluations.l": {"leakage": 5}}, "l.leakage: must be a valid string, got 5"),
    "a share of NaN": ({"evaluations.l": {"leakage": "other", "share": float("nan")}}, "l.share: must be a finite"),
    "a secret among values": ({"models.b": {"pretrained": {"arch": "resnet18", "weights": ["https://u:pw@h/x", "y"]}}},
                              "models.b.pretrained.weights.0: a URL with credentials would be stored"),
    "a secret in a folder's name": (source("image-folder", root="s3://k:pw@b/x"), "load.root: a URL with credentials"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_or_has_no_end_is_refused_at_once_in_one_sentence(what, tiny, write, tmp_path):
    changes, sentence = REFUSED[what]
    put(tiny, changes)
    file = write(tiny)
    began = time.process_time()
    with Peak() as peak:
        result = CliRunner().invoke(main, ["plan", str(file), "--store", str(tmp_path / "s"), "--data", str(tmp_path)])
    took = time.process_time() - began
    assert result.exit_code == 2, f"{result.output} {result.exception!r}"
    (line,) = result.stderr.splitlines()
    assert sentence in line and len(line) < 400 and "pw" not in line
    assert took < 5 and peak.bytes < 2**30


@pytest.mark.parametrize("change", [
    attack(norm="linf", eps="8/255"), attack(norm="linf", eps=["4/255", "8/255"], steps=5), attack(eps=0.25, steps=1),
    attack(method="none", eps=1e30, step_size=1e-30), attack(batch_size=256), scored(norm="linf", eps=0.002, steps=7),
    scored(eps=0.001, steps=5),
])  # fmt: skip
def test_what_is_small_or_beside_the_point_is_planned(change, tiny, write, tmp_path):
    put(tiny, change)
    result = CliRunner().invoke(main, ["plan", str(write(tiny)), "--store", str(tmp_path / "s")])
    assert result.exit_code == 0, result.stderr


def test_a_name_that_is_no_url_may_hold_what_a_url_may_not(tiny):
    names = ["why?", "a=b", "#1", "me@home", "50%", "50%25"]
    put(tiny, shards("me@home/x.tar", classes=names))
    assert parse(tiny).datasets["clean"].load.classes == names


def test_a_fraction_and_its_value_are_one_version(tiny):
    versions = []
    for said in ("8/255", 8 / 255):
        put(tiny, attack(norm="linf", eps=said))
        versions.append([node.version for node in build(parse(tiny))])
    assert versions[0] == versions[1]


NAMES = [("x" * 64, True), ("x" * 65, False), ("x" * 64 + "@" + "y" * 128, True), ("x" * 64 + "@" + "y" * 129, False),
         ("@a=1", False), ("a@", False), ("a/b", False), ("..", False), (".a", False), ("a b", False)]  # fmt: skip


@pytest.mark.parametrize(("name", "fits"), NAMES, ids=range(len(NAMES)))
def test_a_name_has_64_characters_and_its_place_in_a_sweep_128(name, fits):
    asked = {"name": "x", "datasets": {name: TINY["datasets"]["clean"]}}
    if fits:
        assert list(parse(asked).datasets) == [name]
    else:
        with pytest.raises(BadInput, match="a name holds letters, digits"):
            parse(asked)


def test_only_says_what_is_near_and_not_all_there_is(tiny):
    nodes = build(parse(tiny))
    with pytest.raises(BadInput, match="--only othr: the experiment has no such node; did you mean 'other'"):
        wanted(nodes, ("othr",))
    tiny["datasets"] |= {f"d{n}": tiny["datasets"]["clean"] for n in range(500)}
    with pytest.raises(BadInput) as refused:
        wanted(build(parse(tiny)), ("x" * 500,))
    assert len(str(refused.value)) < 400
