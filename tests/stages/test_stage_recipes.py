"""Valid recipes of each stage, and refused ones."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from stages import recipes
from stages.recipes import (
    Attack,
    Digits,
    EvalAttack,
    Evaluate,
    ImageFolder,
    Invert,
    Perturbation,
    Pretrained,
    Relabel,
    Select,
    Spatial,
    Torchvision,
    Train,
    Usefulness,
)
from stages.recipes import WebDataset as Shards

ALL = [
    Digits(source="sklearn-digits"),
    Torchvision(source="cifar10"),
    ImageFolder(source="image-folder", root="x"),
    Shards(source="webdataset", shards={"train": "a.tar"}),
    Attack(images="clean", model="net"),
    Attack(images="clean", model="net", method="spatial"),
    Attack(images="clean", method="noise"),
    Invert(images="clean", model="net"),
    Select(images="rand", keep="top", share=0.4),
    Relabel(rule="next"),
    Train(on="clean", arch="small_cnn"),
    Train(on="clean", probe="net", adversarial={"eps": 1}),
    Train(on="clean", arch="airnet", ema=0.9, whiten=True, logit_scale=0.5, norm_bias_lr=64),
    Pretrained(arch="resnet18", weights="w.pt"),
    Evaluate(models=["net"], on="clean", attacks=[{"eps": [0.5, 1], "surrogate": ["net", "other"]}]),
    Usefulness(models=["net"], on="clean"),
]
EACH = pytest.mark.parametrize("recipe", ALL, ids=lambda recipe: type(recipe).__name__)


@EACH
def test_an_unknown_key_is_refused(recipe):
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        type(recipe)(**recipe.model_dump(), sprinkles=3)


@EACH
def test_a_recipe_cannot_be_changed(recipe):
    field = next(iter(type(recipe).model_fields))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(recipe, field, "other")


@EACH
def test_parameters_are_all_fields_but_places_and_names_of_other_nodes(recipe):
    kind = type(recipe)
    left_out = kind.where | set(kind.inputs) | recipe.unused | recipe.implied
    assert set(recipe.parameters()) == set(kind.model_fields) - left_out
    assert kind.where <= set(kind.model_fields)
    assert all(hasattr(recipe, name) for name in kind.inputs)


@EACH
def test_what_parameters_and_names_say_makes_the_same_recipe_again(recipe):
    kept = {*type(recipe).where, *type(recipe).inputs} & set(type(recipe).model_fields)
    names = {name: getattr(recipe, name) for name in kept}
    assert type(recipe)(**recipe.parameters(), **names) == recipe


@EACH
def test_every_field_is_described(recipe):
    undescribed = [n for n, f in type(recipe).model_fields.items() if not f.description and n != "source"]
    assert not undescribed


def test_where_the_data_lies_is_not_part_of_the_version():
    one, two = (Torchvision(source="mnist", root=root, download=d) for root, d in (("a", True), ("b", False)))
    assert one.parameters() == two.parameters()


UNUSED = [
    (Attack(images="a", model="m"), {"seed": 1}),
    (Attack(images="a", model="m", method="universal"), {"seed": 1}),
    (Attack(images="a", model="m", method="spatial"), {"spatial": Spatial(tries=3)}),
    (Relabel(rule="next"), {"seed": 1}),
    (Relabel(rule="map", map={0: 1}), {"seed": 1}),
    (Relabel(rule="least_likely"), {"seed": 1}),
    (EvalAttack(method="apgd"), {"step_size": 0.3}),
    (Spatial(), {"tries": 3, "seed": 1}),
    (Spatial(search="random"), {"grid": [1, 1, 3]}),
    (Evaluate(models=["a"], on="b"), {"agreement": None, "spatial": []}),
    (Evaluate(models=["a"], on="b", agreement="next"), {"agreement": Relabel(rule="next", seed=1)}),
    (Evaluate(models=["a"], on="b", spatial=[{}]), {"spatial": [Spatial(seed=1)]}),
    (
        Evaluate(models=["a"], on="b", attacks=[{"target_rule": "next"}, {"method": "apgd"}]),
        {"attacks": [EvalAttack(target_rule=Relabel(rule="next", seed=1)), EvalAttack(method="apgd", step_size=0.3)]},
    ),
]


@pytest.mark.parametrize(("recipe", "changed"), UNUSED)
def test_what_plays_no_part_is_not_part_of_the_version_at_any_depth(recipe, changed):
    assert recipe.model_copy(update=changed).parameters() == recipe.parameters()


USED = [
    (Attack(images="a", model="m", method="noise"), {"seed": 1}),
    (Attack(images="a", method="leakage"), {"seed": 1}),
    (Attack(images="a", model="m", method="spatial"), {"spatial": Spatial(grid=[1, 1, 3])}),
    (Relabel(rule="random"), {"seed": 1}),
    (Relabel(rule="other"), {"seed": 1}),
    (EvalAttack(), {"step_size": 0.3}),
    (Spatial(search="random"), {"tries": 3}),
    (Evaluate(models=["a"], on="b", attacks=[{}]), {"attacks": [EvalAttack(target_rule="next")]}),
    (Evaluate(models=["a"], on="b", agreement="other"), {"agreement": Relabel(rule="other", seed=1)}),
    (Train(on="a", arch="n", adversarial={"eps": 1}), {"adversarial": recipes.Ball(eps=2)}),
]


@pytest.mark.parametrize(("recipe", "changed"), USED)
def test_what_plays_a_part_is_part_of_the_version_at_any_depth(recipe, changed):
    assert recipe.model_copy(update=changed).parameters() != recipe.parameters()


def test_features_can_be_measured_without_a_radius_and_the_record_says_so_again():
    recipe = Usefulness(models=["net"], on="clean", eps=0)
    assert recipe.step == 0
    assert Usefulness(**recipe.model_dump()) == recipe


def test_the_source_names_the_kind_of_load():
    for recipe in ALL[:4]:
        assert TypeAdapter(recipes.Load).validate_python(recipe.model_dump()) == recipe


# ---------------------------------------------------------------------------------- perturbations


@given(st.floats(1e-3, 10))
def test_a_step_is_a_fifth_of_the_radius_unless_said(eps):
    assert Perturbation(eps=eps).step == eps / 5
    assert Perturbation(eps=eps).parameters() == Perturbation(eps=eps, step_size=eps / 5).parameters()
    assert Perturbation(eps=eps, step_size=0.3).step == 0.3


def test_adversarial_training_takes_the_papers_seven_steps_unless_said():
    asked, said = ({"eps": 0.5} | more for more in ({}, {"steps": 7, "step_size": 0.1, "norm": "l2"}))
    one, two = (Train(on="a", arch="n", adversarial=ball).parameters() for ball in (asked, said))
    assert one == two


@pytest.mark.parametrize(
    "wrong", [{"eps": 0}, {"eps": -1}, {"steps": 0}, {"step_size": 0}, {"batch_size": 0}, {"norm": "l1"}]
)
def test_a_ball_without_a_size_or_steps_is_refused(wrong):
    with pytest.raises(ValidationError):
        Perturbation(**wrong)


@pytest.mark.parametrize(("said", "number"), [("8/255", 8 / 255), (" 1 / 4 ", 0.25), ("1.5/3", 0.5), ("0.5", 0.5)])
def test_a_length_may_be_a_fraction(said, number):
    assert Perturbation(eps=said, step_size=said).eps == Perturbation(eps=said, step_size=said).step == number
    assert Perturbation(eps=said).parameters() == Perturbation(eps=number).parameters()


@pytest.mark.parametrize("wrong", ["1/0", "1/", "/2", "1/2/3", "-1/2", "1e3/2", "9" * 400 + "/1", "", "8/255 or so"])
def test_what_is_no_fraction_is_refused(wrong):
    with pytest.raises(ValidationError):
        Perturbation(eps=wrong)


@pytest.mark.parametrize("wrong", [
    {"norm": "linf", "eps": 8}, {"norm": "linf", "eps": 1.01}, {"norm": "linf", "eps": 0.5, "step_size": 2},
    {"eps": 1e-300}, {"eps": 9e-5}, {"eps": 0.5, "step_size": 0.0001, "steps": 7}, {"eps": 3, "step_size": 1e-40},
    {"eps": 1e30, "step_size": 1},
])  # fmt: skip
@pytest.mark.parametrize("kind", [recipes.Ball, recipes.Adversary, Perturbation, EvalAttack, Usefulness, Attack])
def test_a_ball_without_room_or_a_search_that_stays_in_its_middle_is_refused(kind, wrong):
    named = {Usefulness: {"models": ["m"], "on": "a"}, Attack: {"images": "a", "model": "m"}}.get(kind, {})
    with pytest.raises(ValidationError, match=r"is more than 1, the whole|is less than 0\.0001|lead no further than"):
        kind(**named, **wrong)


def test_who_counts_in_levels_is_told_how_to_write_them():
    with pytest.raises(ValidationError, match="if it is meant in 8-bit levels, write eps: 8/255"):
        EvalAttack(norm="linf", eps=8)
    assert "write eps: 128/255" in str(EvalAttack(eps=128).misfit([3, 32, 32], 1000))


def test_what_a_method_does_not_use_may_say_anything():
    for method in ("none", "spatial"):
        Attack(images="a", model="m", method=method, norm="linf", eps=8, step_size=1e-9, steps=1)
    Attack(images="a", method="noise", eps=1, step_size=1e-9, steps=1)
    EvalAttack(method="apgd", norm="linf", eps=0.1, step_size=50)
    assert Attack(images="a", method="none", eps=1e30).misfit([1, 8, 8], 10) is None


MISFITS = [
    (Attack(images="a", model="m", eps=60), "eps 60 is more than 55.4, the diagonal of all images of 3×32×32"),
    (Attack(images="a", model="m", eps=1, step_size=1e38), "step_size 1e+38 is more than 55.4"),
    (Attack(images="a", model="m", eps=0.004), "changes at most 1 of the 3,072 values of an image by a level"),
    (Attack(images="a", method="noise", eps=0.004), "changes at most 1 of the 3,072 values"),
    (Attack(images="a", model="m", eps=0.2, step_size=0.003, steps=1), "changes at most 2 of the 3,072 values"),
    (Attack(images="a", model="m", method="universal", eps=56), "eps 56 is more than 55.4"),
    (Invert(images="a", model="m", step_size=1e38), "step_size 1e+38 is more than 55.4"),
    (Train(on="a", arch="n", adversarial={"eps": 60}), "adversarial: eps 60 is more than 55.4"),
    (Evaluate(models=["m"], on="a", attacks=[{}, {"eps": 60}]), "attacks.1: eps 60 is more than 55.4"),
    (Usefulness(models=["m"], on="a", eps=60), "eps 60 is more than 55.4"),
    (
        Attack(images="a", model="m", batch_size=1001),
        "batch_size 1001 is more than the 1000 images of the largest shard",
    ),
    (Invert(images="a", model="m", batch_size=10**9), "batch_size 1000000000 is more than the 1000 images"),
    (Evaluate(models=["m"], on="a", batch_size=1001), "batch_size 1001 is more than the 1000 images"),
    (Evaluate(models=["m"], on="a", attacks=[{"batch_size": 1001}]), "attacks.0: batch_size 1001 is more than"),
    (Usefulness(models=["m"], on="a", batch_size=10**6), "take 11.4 GiB as float32, at most 8 GiB are taken"),
]


@pytest.mark.parametrize(("recipe", "why"), MISFITS)
def test_what_does_not_go_with_the_images_is_told(recipe, why):
    assert why in str(recipe.misfit([3, 32, 32], 1000))


@EACH
def test_the_defaults_go_with_small_images_and_large_ones(recipe):
    assert recipe.misfit([3, 32, 32], 1000) is None
    assert recipe.misfit([3, 224, 224], 100) is None


@pytest.mark.parametrize(("eps", "side"), [(0.25, 8), (0.25, 32), (0.5, 224), (0.1, 224)])
def test_small_radii_that_move_images_are_taken(eps, side):
    assert Attack(images="a", model="m", eps=eps).misfit([3, side, side], 1000) is None


@given(
    st.sampled_from(["l2", "linf"]),
    st.floats(1 / 255, 1),
    st.floats(1e-4, 1),
    st.integers(1, 30),
    st.integers(0, 2**32),
)
def test_no_more_values_change_than_can(norm, eps, step_size, steps, seed):
    """Whatever the gradient, also one of few values alone."""
    import numpy as np
    import torch

    from stages.pgd import pgd, quantize

    try:
        recipe = Attack(images="a", model="m", norm=norm, eps=eps, step_size=step_size, steps=steps)
    except ValidationError:
        return
    draw = np.random.default_rng(seed)
    clean = draw.integers(0, 256, (1, 4, 4, 3), dtype=np.uint8)
    slope = torch.from_numpy(draw.standard_normal((1, 3, 4, 4)) ** 9).float()
    x = torch.from_numpy(clean).permute(0, 3, 1, 2).float() / 255
    moved = pgd(lambda x: (x * slope).sum(), x, norm=norm, eps=eps, step_size=recipe.step, steps=steps)
    saved = quantize(moved, clean, norm, eps)
    assert (saved != clean).sum() <= recipe.most_changed(clean.size) + 1e-3


@pytest.mark.parametrize("wrong", [{"norm": "linf", "eps": 0.03, "step_size": 0.0001, "steps": 19}, {"eps": 0.0039},
                                   {"eps": 0.1, "step_size": 0.0019, "steps": 1}])  # fmt: skip
def test_an_attack_that_moves_no_pixel_by_half_a_level_is_refused(wrong):
    with pytest.raises(ValidationError, match="the saved images would not change"):
        Attack(images="a", model="m", **wrong)


@pytest.mark.parametrize("wrong", [
    {"rotation": 0, "translation": 0}, {"grid": [1, 1, 1]}, {"grid": [5, 5, 1], "translation": 0},
    {"search": "random", "rotation": 0, "translation": 0},
])  # fmt: skip
def test_a_space_that_holds_the_untouched_image_alone_is_refused(wrong):
    with pytest.raises(ValidationError, match="the space holds the untouched image alone"):
        Spatial(**wrong)


@pytest.mark.parametrize(("kind", "wrong"), [
    (Spatial, {"grid": [400, 400, 400]}), (Spatial, {"tries": 10**6}), (Perturbation, {"steps": 10**6}),
    (recipes.Synthetic, {"source": "synthetic", "classes": 10**6}),
    (recipes.Synthetic, {"source": "synthetic", "size": 10**6}),
    (recipes.Synthetic, {"source": "synthetic", "images": {"train": 10**9}}),
    (Train, {"on": "a", "arch": "n", "epochs": 10**6}), (EvalAttack, {"restarts": 10**6}),
    (Pretrained, {"arch": "n", "weights": "w", "classes": 10**6}),
    (Pretrained, {"arch": "n", "weights": "w", "outputs": [0, 10**6]}),
    (Pretrained, {"arch": "n", "weights": "w", "shape": [3, 10**6, 10**6]}),
    (Pretrained, {"arch": "n", "weights": "w", "shape": [224, 224, 3]}),
    (ImageFolder, {"source": "image-folder", "root": "x", "resize": 10**6}),
    (ImageFolder, {"source": "image-folder", "root": "x", "crop": 10**6}),
    (Shards, {"source": "webdataset", "shards": {"a": "x"}, "classes": 10**9}),
    (Shards, {"source": "webdataset", "shards": {"a": "x"}, "classes": 0}),
    (Shards, {"source": "webdataset", "shards": {"a": "x"}, "classes": []}),
    (Shards, {"source": "webdataset", "shards": {"a": "x"}, "classes": ["a", "a"]}),
    (Train, {"on": "a", "arch": "n", "mean": [1e300]}), (Train, {"on": "a", "arch": "n", "std": [1e-320]}),
    (Train, {"on": "a", "arch": "n", "split": "a" * 65}),
    (Train, {"on": "a", "arch": "n", "mean": []}), (Pretrained, {"arch": "n", "weights": "w", "std": []}),
    (Evaluate, {"models": ["m"], "on": "a", "attacks": [{"eps": [0.1] * 40, "steps": [1] * 40}]}),
])  # fmt: skip
def test_what_has_no_end_or_no_entry_is_refused(kind, wrong):
    with pytest.raises(ValidationError):
        kind(**wrong)


PATTERNS = [
    ("x-{0..999999999}.tar", 10**9), ("{a,b}" * 40, 2**40), ("{a..z}" * 40, None), ("{0..999999..3}", 333_334),
    ("{{a,b}{a,b}" + "{c,d}" * 30 + ",x}", None), ("{999999999..0}", 10**9), ("{-9..999999}", 1_000_009),
]  # fmt: skip


@pytest.mark.parametrize(("pattern", "count"), PATTERNS)
def test_braces_that_stand_for_too_much_are_refused_without_writing_them_out(pattern, count):
    with pytest.raises(ValidationError, match=f"stand for {count or '':,} tars" if count else "stand for"):
        Shards(source="webdataset", shards={"train": pattern})


@given(st.recursive(
    st.sampled_from(["a", "", "{1..3}", "{03..01}", "{a..e..2}", "{5..9..2}", "{-2..2}", "{x}", "1", ","]),
    lambda inner: st.tuples(inner, inner).map("".join) | st.lists(inner, min_size=1, max_size=3).map(
        lambda parts: "{" + ",".join(parts) + "}"), max_leaves=6,
))  # fmt: skip
def test_braces_stand_for_no_more_than_is_counted(pattern):
    from braceexpand import braceexpand

    assert len(list(braceexpand(pattern))) <= recipes._alternatives(pattern)


@pytest.mark.parametrize(("kind", "said"), [
    (Perturbation, {"steps": True}), (Perturbation, {"eps": True}),
    (Train, {"on": "a", "arch": "n", "milestones": [True]}),
    (Relabel, {"rule": "map", "map": {"a": True}}), (Spatial, {"grid": [True, 3, 3]}),
    (recipes.Synthetic, {"source": "synthetic", "images": {"train": True}}), (Evaluate, {"models": [True], "on": "a"}),
])  # fmt: skip
def test_true_and_false_are_no_numbers(kind, said):
    with pytest.raises(ValidationError, match="must not be true or false"):
        kind(**said)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_radius_that_is_no_number_is_refused(wrong):
    with pytest.raises(ValidationError):
        Perturbation(eps=wrong)


def test_pgd_without_a_model_is_refused_and_noise_needs_none():
    with pytest.raises(ValidationError, match="add `model: NAME`"):
        Attack(images="clean")
    assert Attack(images="clean", method="noise").model is None


# --------------------------------------------------------------------------------------- the others


def test_a_rule_alone_is_short_for_a_relabelling():
    assert Relabel.model_validate("next") == Relabel(rule="next")
    assert Evaluate(models=["a"], on="b", agreement="next").agreement == Relabel(rule="next")


@pytest.mark.parametrize("wrong", [{"rule": "map"}, {"rule": "next", "map": {"a": "b"}}])
def test_a_map_goes_with_rule_map_only(wrong):
    with pytest.raises(ValidationError, match="`map` goes with rule map"):
        Relabel(**wrong)


def test_agreement_with_least_likely_is_refused():
    with pytest.raises(ValidationError, match="differs from model to model"):
        Evaluate(models=["a"], on="b", agreement="least_likely")


@pytest.mark.parametrize("wrong", [{"schedule": "steps"}, {"milestones": [3]}])
def test_drops_go_with_schedule_steps_only(wrong):
    with pytest.raises(ValidationError, match="`milestones` goes with schedule steps"):
        Train(on="a", arch="small_cnn", **wrong)


def test_a_crop_larger_than_the_image_is_refused():
    with pytest.raises(ValidationError, match="crop 300 is larger than resize 256"):
        ImageFolder(source="image-folder", root="x", resize=256, crop=300)


@pytest.mark.parametrize(("said", "kept"), [({}, True), ({"resize": 8}, False), ({"crop": 8}, False)])
def test_files_are_kept_where_their_pixels_are(said, kept):
    assert ImageFolder(source="image-folder", root="x", **said).keeps_bytes is kept


@pytest.mark.parametrize("name", ["Train", "a-b", "", "1a", "a/b", ".."])
def test_a_split_name_is_a_word_that_can_be_part_of_a_file_name(name):
    with pytest.raises(ValidationError):
        Shards(source="webdataset", shards={name: "x.tar"})


# ------------------------------------------------------------------------------------------- secrets

SECRET = [
    "s3://AKIA:secret@bucket/train.tar",
    "https://user@host/w.pt",
    "https://host/w.pt?X-Amz-Signature=abc",
    "https://host/w.pt?region=x&token=abc",
    "https://host/w.pt?abcdef0123456789",
    "https://host/w.pt?token=",
    "https://host/w.pt?REGION=x",
    "https://host/w.pt?=abc",
    "https://host/w.pt?region=x;token=abc",
    "https://host/w.pt?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIA&X-Amz-Security-Token=abc",
    # In a URL inside it, whichever way it is written.
    "s3://bucket?endpoint_override=http://user:secret@host",
    "s3://bucket?endpoint_override=user@host",
    "s3://bucket?endpoint_override=http%3A%2F%2Fuser%3Asecret%40host",
    "s3://bucket?region=x&endpoint_override=http://host/?token=abc",
    "s3://bucket?scheme=http://user:secret@host",
    "s3://bucket?region=https://user:secret@host",
    "https://proxy/https://user:secret@host/w.pt",
    "https://proxy/https%3A%2F%2Fuser%3Asecret%40host/w.pt",
    "https://proxy/https%253A%252F%252Fuser%253Asecret%2540host/w.pt",
    "simplecache::s3://AKIA:secret@bucket/x.tar",
    "//user:secret@host/w.pt",
    "s3://AKIA%3Asecret%40bucket/x.tar",
    "s3://AKIA%253Asecret%2540bucket/x.tar",
    "s3://:secret@bucket/x.tar",
    "s3://@bucket/x.tar",
    "https:///user:secret@host/w.pt",
    "https://user:secret@ho\uff03st/w.pt",
    "S3://AKIA:secret@bucket/x.tar",
    # In parts that braces put together.
    "s3://{AKIA:secret@,}bucket/x.tar",
    "{https:,}//user:secret@host/x.tar",
    "https://host/x.tar?{to,}ken=abc",
    "https://host/x.tar{?token=abc,}",
]
HARMLESS = [
    "s3://bucket/x.tar?endpoint_override=https://minio.example.org:9000/",
    "s3://bucket/x.tar?endpoint_override=http%3A%2F%2Flocalhost%3A9000",
    "s3://bucket/x.tar?endpoint_override=[::1]:9000&region=&scheme=https",
    "s3://bucket/50%25/x.tar",
    "train-{000000..000146}.tar",
    "s3://bucket/train-{0..3}.tar?region=eu-west-1&endpoint_override=localhost:9000&scheme=http",
    "file:///data/x.tar",
    "folder/me@home/w.pt",
    "https://host/w.pt",
]


@pytest.mark.parametrize("url", SECRET)
def test_a_url_with_credentials_is_refused_without_repeating_them(url):
    with pytest.raises(ValueError, match="put the keys in the environment") as caught:
        recipes.refuse_secrets(url)
    assert url not in str(caught.value)
    with pytest.raises(ValidationError):
        Pretrained(arch="resnet18", weights=url)
    with pytest.raises(ValidationError):
        Shards(source="webdataset", shards={"train": url})


@pytest.mark.parametrize("url", ["s3://bucket/a#b.tar", "https://host/w.pt#token=abc"])
def test_a_fragment_is_refused_for_it_would_be_lost(url):
    with pytest.raises(ValueError, match="is read up to it; if it is part of a name, write %23"):
        recipes.refuse_secrets(url)


@pytest.mark.parametrize("url", HARMLESS)
def test_a_url_without_credentials_is_taken(url):
    recipes.refuse_secrets(url)
    assert Pretrained(arch="resnet18", weights=url).weights == url


@given(st.sampled_from(["s3", "https", "gs", "abfss"]), st.text("abcXYZ019/+", min_size=1), st.text("abc", min_size=1))
def test_a_user_part_is_refused_whatever_the_scheme(scheme, secret, bucket):
    with pytest.raises(ValueError, match="credentials"):
        recipes.refuse_secrets(f"{scheme}://{secret.replace('/', '%2F')}@{bucket}/x.tar")


def test_lists_of_radii_and_sources_stand_for_one_attack_each():
    recipe = Evaluate(models=["a"], on="clean", attacks=[{"eps": [0.5, 1.0], "surrogate": ["b", "c"]}, {"eps": 2}])
    assert [(attack.eps, attack.surrogate) for attack in recipe.attacks] == [
        (0.5, "b"), (0.5, "c"), (1.0, "b"), (1.0, "c"), (2.0, None),
    ]  # fmt: skip
    assert recipe.surrogates == ["b", "c"]


@pytest.mark.parametrize("method", ["pgd", "universal", "spatial"])
def test_a_method_that_searches_needs_a_model(method):
    with pytest.raises(ValidationError, match=f"method {method} needs a model to attack"):
        Attack(images="clean", method=method)


def test_only_pgd_spares_other_models_and_never_the_one_it_attacks():
    with pytest.raises(ValidationError, match="goes with method pgd, not with noise"):
        Attack(images="clean", method="noise", not_transferring_to=["net"])
    with pytest.raises(ValidationError, match="the model that is attacked"):
        Attack(images="clean", model="net", not_transferring_to=["net"])


@pytest.mark.parametrize(("given_", "sentence"), [
    ({"probe": "net", "whiten": True}, "`whiten` is that of the model that is probed"),
    ({"probe": "net", "logit_scale": 0.2}, "`logit_scale` is that of the model that is probed"),
    ({"arch": "n", "alternating_flip": True}, "goes with an `augment` that flips, not with none"),
    ({"arch": "n", "alternating_flip": True, "augment": "spatial"}, "that flips, not with spatial"),
])  # fmt: skip
def test_what_a_training_has_no_use_for_is_refused(given_, sentence):
    with pytest.raises(ValidationError, match=sentence):
        Train(on="clean", **given_)


@pytest.mark.parametrize("key", ["alternating_flip", "ema", "logit_scale", "norm_bias_lr", "whiten"])
def test_keys_of_a_training_that_came_later_make_no_other_version_at_their_default(key):
    assert key not in Train(on="clean", arch="small_cnn", augment="flip").parameters()
    said = {"alternating_flip": True, "ema": 0.9, "logit_scale": 0.2, "norm_bias_lr": 2, "whiten": True}[key]
    assert Train(on="clean", arch="small_cnn", augment="flip", **{key: said}).parameters()[key] == said


@pytest.mark.parametrize("given_", [{}, {"arch": "small_cnn", "probe": "net"}])
def test_a_training_has_an_arch_or_probes_a_model(given_):
    with pytest.raises(ValidationError, match="either `arch` or `probe`"):
        Train(on="clean", **given_)


@pytest.mark.parametrize(
    ("arch", "own"),
    [("small_cnn", False), ("resnet50", False), (None, False), ("", False), ("a.b:net", True), ("./a/b.py:net", True)],
)
def test_an_arch_is_the_users_own_where_it_names_a_module_or_a_file(arch, own):
    assert recipes.is_own(arch) is own
