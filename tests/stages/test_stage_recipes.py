"""What can be asked of each stage, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from stages import recipes
from stages.recipes import (
    Attack,
    Bring,
    Digits,
    Evaluate,
    ImageFolder,
    Invert,
    Perturbation,
    Relabel,
    Select,
    Spatial,
    Threat,
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
    Bring(arch="resnet18", weights="w.pt"),
    Evaluate(models=["net"], on="clean", attacks=[{"eps": [0.5, 1], "source": ["net", "other"]}]),
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
    assert set(recipe.parameters()) == set(kind.model_fields) - kind.where - set(kind.inputs) - recipe.unused
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
    (Threat(method="apgd"), {"step_size": 0.3}),
    (Spatial(), {"tries": 3, "seed": 1}),
    (Spatial(search="random"), {"grid": [1, 1, 3]}),
    (Evaluate(models=["a"], on="b"), {"agreement": None, "spatial": []}),
    (Evaluate(models=["a"], on="b", agreement="next"), {"agreement": Relabel(rule="next", seed=1)}),
    (Evaluate(models=["a"], on="b", spatial=[{}]), {"spatial": [Spatial(seed=1)]}),
    (
        Evaluate(models=["a"], on="b", attacks=[{"toward": "next"}, {"method": "apgd"}]),
        {"attacks": [Threat(toward=Relabel(rule="next", seed=1)), Threat(method="apgd", step_size=0.3)]},
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
    (Threat(), {"step_size": 0.3}),
    (Spatial(search="random"), {"tries": 3}),
    (Evaluate(models=["a"], on="b", attacks=[{}]), {"attacks": [Threat(toward="next")]}),
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


@pytest.mark.parametrize("wrong", [{"schedule": "steps"}, {"drops": [3]}])
def test_drops_go_with_schedule_steps_only(wrong):
    with pytest.raises(ValidationError, match="`drops` goes with schedule steps"):
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
]
HARMLESS = [
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
        Bring(arch="resnet18", weights=url)
    with pytest.raises(ValidationError):
        Shards(source="webdataset", shards={"train": url})


@pytest.mark.parametrize("url", HARMLESS)
def test_a_url_without_credentials_is_taken(url):
    recipes.refuse_secrets(url)
    assert Bring(arch="resnet18", weights=url).weights == url


@given(st.sampled_from(["s3", "https", "gs", "abfss"]), st.text("abcXYZ019/+", min_size=1), st.text("abc", min_size=1))
def test_a_user_part_is_refused_whatever_the_scheme(scheme, secret, bucket):
    with pytest.raises(ValueError, match="credentials"):
        recipes.refuse_secrets(f"{scheme}://{secret.replace('/', '%2F')}@{bucket}/x.tar")


def test_lists_of_radii_and_sources_stand_for_one_attack_each():
    recipe = Evaluate(models=["a"], on="clean", attacks=[{"eps": [0.5, 1.0], "source": ["b", "c"]}, {"eps": 2}])
    assert [(attack.eps, attack.source) for attack in recipe.attacks] == [
        (0.5, "b"), (0.5, "c"), (1.0, "b"), (1.0, "c"), (2.0, None),
    ]  # fmt: skip
    assert recipe.sources == ["b", "c"]


@pytest.mark.parametrize("method", ["pgd", "universal", "spatial"])
def test_a_method_that_searches_needs_a_model(method):
    with pytest.raises(ValidationError, match=f"method {method} needs a model to attack"):
        Attack(images="clean", method=method)


def test_only_pgd_spares_other_models_and_never_the_one_it_attacks():
    with pytest.raises(ValidationError, match="goes with method pgd, not with noise"):
        Attack(images="clean", method="noise", not_transferring_to=["net"])
    with pytest.raises(ValidationError, match="the model that is attacked"):
        Attack(images="clean", model="net", not_transferring_to=["net"])


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
