"""Attacking a shard: the saved images and their measurements."""

import numpy as np
import pytest
import torch
from torch import nn

from stages.attack import Attacker
from stages.errors import BadData, BadInput
from stages.model import Classifier, Design, logits_of
from stages.noise import noise
from stages.pgd import pgd, quantize, round_in_ball
from stages.recipes import Attack, Perturbation, Relabel, Spatial
from stages.shard import Shard, pack
from stages.spatial import candidates, transform
from stages.targeted_pgd import targeted, untargeted
from stages.tensors import to_unit

CLASSES = tuple("0123456789")
BATCH = 16
BALLS = {"l2": 1.5, "linf": 0.15}


def recipe(**asked):
    return Attack(**{"images": "clean", "model": "standard", "eps": 1.5, "steps": 5, "batch_size": BATCH} | asked)


@pytest.fixture
def shard(digits, part):
    return part(digits["test"], slice(0, 40))


@pytest.fixture
def attacked(shard, trained):
    """Attack the shard toward other classes, with the given keys of the recipe."""

    def make(rule="other", model=trained, given=shard, **asked):
        return Attacker(recipe(**asked), Relabel(rule=rule), CLASSES, model)(given)

    return make


def levels(after, before):
    return (after.images().astype(np.int64) - before.images()).reshape(len(before), -1)


def grey(count=6, side=8):
    """Images in the middle of the box, which clipping does not affect."""
    index = np.arange(100, 100 + count)
    return Shard("train-000000", index, index % 10, index % 10, np.full((count, side, side, 1), 128, np.uint8))


# ------------------------------------------------------------------------------- what is saved


@pytest.mark.parametrize("norm", BALLS)
@pytest.mark.parametrize("method", ["pgd", "noise"])
def test_saved_images_are_inside_the_radius(attacked, shard, norm, method):
    eps = BALLS[norm]
    moved = levels(attacked(norm=norm, method=method, eps=eps), shard)
    if norm == "l2":
        assert ((moved**2).sum(1) <= (255 * eps) ** 2 + 1e-6).all()
    else:
        assert (np.abs(moved) <= 255 * eps + 1e-6).all()
    assert (moved != 0).any(axis=1).all()


def test_bfloat16_attacks_stay_inside_the_radius_and_are_measured_in_float32(attacked, shard, trained):
    after = attacked(precision="bfloat16", steps=2)
    assert ((levels(after, shard) ** 2).sum(1) <= (255 * 1.5) ** 2 + 1e-6).all()
    logits = torch.from_numpy(logits_of(trained, after.images(), BATCH))
    wanted = torch.from_numpy(after.label)
    np.testing.assert_allclose(
        after.attack["confidence"], logits.softmax(1).gather(1, wanted[:, None])[:, 0], atol=1e-6
    )


def test_the_attack_reaches_most_targets_and_noise_of_the_same_radius_does_not(attacked):
    after = attacked(steps=20)
    control = attacked(method="noise")
    assert after.attack["success"].mean() > 0.5 > control.attack["success"].mean()


def test_the_label_is_the_target_and_the_source_label_stays(attacked, shard):
    after = attacked()
    assert np.array_equal(after.label, after.attack["target"])
    assert np.array_equal(after.source_label, shard.source_label)
    assert np.array_equal(after.index, shard.index)


def test_failed_samples_stay_perturbed_and_are_labelled_as_their_target(attacked, shard):
    after = attacked(eps=0.3, steps=3)
    failed = ~after.attack["success"]
    assert failed.any()
    # Others put the clean image back, at distance 0: that would teach a wrong label without a feature for it.
    assert (after.attack["l2"][failed] > 0).all()
    assert (levels(after, shard)[failed] != 0).any(axis=1).all()
    assert np.array_equal(after.label[failed], after.attack["target"][failed])


def test_none_leaves_every_pixel_and_still_relabels(attacked, shard):
    after = attacked(method="none")
    assert np.array_equal(after.images(), shard.images())
    assert (after.attack["l2"] == 0).all()
    assert (after.attack["linf"] == 0).all()
    assert (after.label != shard.label).all()


def test_an_attacked_shard_is_png_without_the_original_files(digits, trained, part):
    first = part(digits["test"], slice(0, 4))
    kept = Shard(first.name, first.index, first.label, first.source_label, first.pixels, [b"original"] * 4, "jpg")
    after = Attacker(recipe(method="none"), Relabel(rule="next"), CLASSES, trained)(kept)
    assert after.suffix == "png"
    assert b"original" not in pack(after)


def test_the_shard_that_was_given_is_not_changed(attacked, shard):
    before = (shard.images().copy(), shard.label.copy())
    attacked()
    assert np.array_equal(shard.images(), before[0])
    assert np.array_equal(shard.label, before[1])


@pytest.mark.parametrize("norm", BALLS)
@pytest.mark.parametrize("method", ["noise", "leakage", "universal"])
def test_batches_give_the_bytes_that_the_whole_shard_at_once_would(shard, trained, method, norm):
    asked = recipe(method=method, norm=norm, eps=BALLS[norm], steps=1)
    attacker = Attacker(asked, Relabel(rule="next"), CLASSES, trained, fit=[shard])
    after = attacker(shard)
    if method == "universal":
        moved = (to_unit(shard.images()) + attacker.universal[torch.from_numpy(after.label)]).clamp(0, 1)
        rounded = round_in_ball(moved, torch.from_numpy(shard.images()).permute(0, 3, 1, 2), norm, BALLS[norm])
        whole = rounded.permute(0, 2, 3, 1).numpy()
    else:
        whole = noise(shard.images(), asked, asked.seed, shard.index)
    alone = (levels(after, shard) == 0).all(1)
    assert np.array_equal(after.images()[~alone], whole[~alone])
    assert alone.mean() < (0.5 if method == "leakage" else 0.01)


@pytest.mark.parametrize("method", ["pgd", "universal", "spatial", "noise", "leakage"])
def test_no_more_than_a_batch_of_images_is_ever_held_as_floats(shard, trained, method, monkeypatch):
    held = []

    def counted(pixels, where=None):
        held.append(len(pixels))
        return to_unit(pixels, where)

    for module in ("attack", "model", "noise"):
        monkeypatch.setattr(f"stages.{module}.to_unit", counted)
    asked = recipe(method=method, steps=1, spatial=Spatial(grid=[1, 1, 2]))
    Attacker(asked, Relabel(rule="next"), CLASSES, trained, fit=[shard])(shard)
    assert max(held) == BATCH


# ----------------------------------------------------------------------------- what is reported


@pytest.mark.parametrize("norm", BALLS)
def test_distances_are_those_of_the_saved_images(attacked, shard, norm):
    after = attacked(norm=norm, eps=BALLS[norm])
    moved = levels(after, shard) / 255
    np.testing.assert_allclose(after.attack["l2"], np.linalg.norm(moved, axis=1), rtol=1e-12)
    np.testing.assert_allclose(after.attack["linf"], np.abs(moved).max(axis=1), rtol=1e-12)


def test_what_the_model_says_is_said_of_the_saved_images(attacked, trained):
    after = attacked(steps=3, eps=0.8)
    x = torch.from_numpy(after.images()).permute(0, 3, 1, 2).float() / 255
    logits = trained(x).double()
    toward = logits.gather(1, torch.from_numpy(after.label)[:, None])[:, 0]
    rest = logits.scatter(1, torch.from_numpy(after.label)[:, None], -torch.inf).amax(1)
    margin = (toward - rest).numpy()
    # Another batch shape gives other float32 bits of the logits, which are below 100: 1e-4 is a hundred of them.
    np.testing.assert_allclose(after.attack["margin"], margin, atol=1e-4)
    sure = np.abs(margin) > 1e-3
    assert np.array_equal(after.attack["success"][sure], margin[sure] > 0)
    assert 0 < after.attack["success"].sum() < len(after)
    confidence = (toward - logits.logsumexp(1)).exp().numpy()
    np.testing.assert_allclose(after.attack["confidence"], confidence, atol=1e-4)


def test_without_a_model_only_distances_are_reported(attacked):
    after = attacked(method="noise", model=None)
    assert set(after.attack) == {"target", "l2", "linf"}


# ------------------------------------------------------------------------- what it depends on


def test_the_same_shard_gives_the_same_bytes(attacked):
    assert pack(attacked()) == pack(attacked())


def test_images_do_not_depend_on_those_in_other_batches(attacked, shard, part):
    changed = part(shard, slice(None))
    changed.images()[BATCH:] = 255 - changed.images()[BATCH:]
    one, two = attacked(), attacked(given=changed)
    assert np.array_equal(one.images()[:BATCH], two.images()[:BATCH])
    assert np.array_equal(one.attack["margin"][:BATCH], two.attack["margin"][:BATCH])


def test_a_batch_that_is_not_full_gives_the_bytes_of_a_full_one(attacked, shard, part):
    # 20 images are one batch and four of another, padded; among 40 those four have twelve real neighbours.
    short = attacked(given=part(shard, slice(0, 20)))
    whole = attacked()
    assert np.array_equal(short.images(), whole.images()[:20])
    for fact, column in short.attack.items():
        assert np.array_equal(column, whole.attack[fact][:20]), fact


def test_the_number_of_threads_around_it_does_not_matter_and_is_left_alone(attacked):
    one = pack(attacked())
    torch.set_num_threads(2)
    try:
        two = pack(attacked())
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert one == two


def test_other_never_hits_the_true_label_and_random_hits_it_about_once_in_ten(attacked, digits):
    every = digits["train"]
    other = attacked("other", given=every, method="none", model=None)
    assert not (other.label == every.label).any()
    hits = (attacked("random", given=every, method="none", model=None).label == every.label).mean()
    assert abs(hits - 0.1) < 5 * (0.1 * 0.9 / len(every)) ** 0.5  # five standard deviations


def test_targets_come_from_the_source_label_not_from_an_earlier_relabelling(attacked, shard):
    once = attacked("next", method="none")
    twice = attacked("next", given=once, method="none")
    assert np.array_equal(twice.label, (shard.label + 1) % 10)


def test_least_likely_asks_the_model_about_the_clean_images(attacked, shard, trained):
    after = attacked("least_likely", steps=2)
    assert np.array_equal(after.label, trained(to_unit(shard.images())).argmin(1).numpy())


def test_least_likely_without_a_model_is_refused():
    with pytest.raises(BadInput, match="least_likely needs the attack to name a model"):
        Attacker(recipe(method="noise", model=None), Relabel(rule="least_likely"), CLASSES, None)


def test_images_of_differing_sizes_are_refused(trained, shard):
    from stages.errors import BadData

    uneven = Shard(shard.name, shard.index, shard.label, shard.source_label, None, [b""] * len(shard))
    with pytest.raises(BadData, match="differing sizes"):
        Attacker(recipe(), Relabel(rule="next"), CLASSES, trained)(uneven)


# --------------------------------------------------------------------- when the target was reached


def test_the_step_is_the_first_iterate_that_the_model_answers_as_the_target(attacked, shard, trained):
    after = attacked(steps=6, eps=1.0, step_size=0.2)
    said = after.attack["success_step"]
    assert said.dtype == np.int64
    x = to_unit(shard.images())
    goal = targeted(trained, torch.from_numpy(after.label))
    iterates = [pgd(goal, x, norm="l2", eps=1.0, step_size=0.2, steps=steps) for steps in range(7)]
    hit = torch.stack([trained(z).argmax(1) for z in iterates]).numpy() == after.label
    by_hand = np.where(hit.any(0), hit.argmax(0), -1)
    # Another batch shape gives other bits, which may decide a close call one step earlier or later.
    assert (said == by_hand).mean() > 0.9
    assert len(set(said)) > 3


def test_a_target_that_is_the_models_answer_already_is_reached_at_step_0_and_one_out_of_reach_never(
    attacked, shard, trained
):
    rightly = trained(to_unit(shard.images())).argmax(1).numpy() == shard.source_label
    same = {number: number for number in range(10)}
    after = Attacker(recipe(steps=2), Relabel(rule="map", map=same), CLASSES, trained)(shard)
    assert (after.attack["success_step"][rightly] == 0).all()
    assert (attacked(eps=0.01, steps=1).attack["success_step"][rightly] == -1).all()


def test_only_a_search_says_when_it_reached_its_target(attacked):
    assert "success_step" not in attacked(method="noise").attack


# -------------------------------------------------------------------------------- spared models


def linear(weight, tmp_path, classes=2, side=8):
    """A classifier with logits W x; W is classes × side²."""
    model = Classifier(Design("small_cnn", classes, (1, side, side), (0.0,), (1.0,)), tmp_path)
    model.network = nn.Sequential(nn.Flatten(), nn.Linear(side * side, classes, bias=False))
    with torch.no_grad():
        model.network[1].weight.copy_(torch.as_tensor(weight, dtype=torch.float32).reshape(classes, -1))
    return model.eval().requires_grad_(False)


def test_a_spared_model_keeps_its_answer_where_the_attack_has_a_way_round_it(tmp_path):
    # The attacked model reads pixels 0 and 1, the spared one pixel 0 alone: that one falls, and pixel 1 rises.
    weight = np.zeros((2, 64))
    weight[1, :2] = 2
    seen = weight.copy()
    seen[1, 1] = 0
    shard = grey(8)
    zeros = Shard(shard.name, shard.index, 0 * shard.index, 0 * shard.index, shard.pixels)
    attacked, spared = linear(weight, tmp_path), linear(seen, tmp_path)
    asked = recipe(not_transferring_to=["other"], eps=0.3, steps=20, batch_size=8)
    moved = [
        Attacker(asked, Relabel(rule="next"), CLASSES[:2], attacked, others)(zeros).images().reshape(8, -1)
        for others in ([], [spared])
    ]
    assert (moved[0][:, 0] == moved[0][:, 1]).all()
    assert (moved[0][:, :2] > 128).all()
    assert (moved[1][:, 0] < 128).all()
    assert (moved[1][:, 1] > 128).all()


def test_a_spared_ensemble_is_fooled_less_and_the_attacked_model_still_is(shard, trained, design, tmp_path):
    torch.manual_seed(1)
    other = Classifier(design, tmp_path)
    other.load_state_dict(trained.state_dict())
    with torch.no_grad():
        other.network[-1].weight.add_(0.05 * torch.randn_like(other.network[-1].weight))
    other.eval().requires_grad_(False)
    asked = recipe(not_transferring_to=["other"], steps=15)
    made = [Attacker(asked, Relabel(rule="next"), CLASSES, trained, spared)(shard) for spared in ([], [other])]
    right = [(logits_of(other, after.images(), BATCH).argmax(1) == shard.label).mean() for after in made]
    assert right[1] > right[0] + 0.2


# ------------------------------------------------------------------------------------- leakage


def test_leakage_is_noise_but_where_the_target_is_the_truth_or_the_models_answer(attacked, shard, trained):
    after = attacked("random", method="leakage", seed=2)
    noisy = attacked("random", method="noise", seed=2)
    answer = trained(to_unit(shard.images())).argmax(1).numpy()
    alone = (after.label == shard.source_label) | (after.label == answer)
    assert 0 < alone.sum() < len(shard)
    assert np.array_equal(after.images()[alone], shard.images()[alone])
    assert np.array_equal(after.images()[~alone], noisy.images()[~alone])


def test_leakage_without_a_reference_leaves_the_true_class_alone(attacked, shard):
    after = attacked("random", method="leakage", model=None)
    assert np.array_equal(after.attack["l2"] == 0, after.label == shard.source_label)


def test_leakage_leaves_what_a_wrong_reference_already_answers(shard, tmp_path):
    always_one = linear(np.arange(2)[:, None] * np.ones((2, 64)), tmp_path)
    halves = Shard(shard.name, shard.index, shard.label % 2, shard.label % 2, shard.pixels)
    after = Attacker(recipe(method="leakage"), Relabel(rule="next"), CLASSES[:2], always_one)(halves)
    assert np.array_equal(after.attack["l2"] == 0, after.label == 1)


# ------------------------------------------------------------------------------------ universal


def test_a_universal_perturbation_is_the_same_for_every_image_of_a_target(tmp_path):
    # Of a linear model of two classes the best perturbation is known: along the difference of their weights.
    weight = np.random.default_rng(0).normal(size=(2, 64))
    shard = grey(20)
    halves = Shard(shard.name, shard.index, shard.index % 2, shard.index % 2, shard.pixels)
    asked = recipe(method="universal", eps=0.5, steps=10, batch_size=8)
    attacker = Attacker(asked, Relabel(rule="next"), CLASSES[:2], linear(weight, tmp_path), fit=[halves])
    toward = (weight[1] - weight[0]) / np.linalg.norm(weight[1] - weight[0])
    np.testing.assert_allclose(attacker.universal.flatten(1), 0.5 * np.stack([-toward, toward]), atol=1e-5)
    after = attacker(halves)
    for target in (0, 1):
        assert len({image.tobytes() for image in after.images()[after.label == target]}) == 1
    assert ((levels(after, halves) ** 2).sum(1) <= (255 * 0.5) ** 2 + 1e-6).all()


def test_a_universal_perturbation_reaches_images_it_was_not_found_on(digits, shard, trained, part):
    seen = part(digits["train"], slice(0, 100))
    asked = recipe(method="universal", steps=10, eps=2.0)
    after = Attacker(asked, Relabel(rule="other"), CLASSES, trained, fit=[seen])(shard)
    control = Attacker(recipe(method="noise", eps=2.0), Relabel(rule="other"), CLASSES, trained)(shard)
    assert after.attack["margin"].mean() > control.attack["margin"].mean() + 3
    assert after.attack["success"].mean() > control.attack["success"].mean()


@pytest.mark.parametrize("norm", BALLS)
def test_a_universal_perturbation_does_not_depend_on_the_batches_it_was_found_in(digits, trained, part, norm):
    seen = [part(digits["train"], slice(a, a + 35)) for a in (0, 35)]
    found = [
        Attacker(
            recipe(method="universal", steps=2, norm=norm, eps=BALLS[norm], batch_size=size),
            Relabel(rule="next"),
            CLASSES,
            trained,
            fit=seen,
        ).universal
        for size in (16, 70)  # 70 images are four batches and six more, padded; or one batch
    ]
    # The signs of L∞ jump where a gradient is nearly zero: most entries are the same, not all.
    same = (found[0] - found[1]).abs() < 1e-3
    assert same.float().mean() > 0.99
    assert found[0].abs().sum() > 0


def test_a_target_that_no_perturbation_was_found_for_is_refused(digits, trained, part):
    few = part(digits["train"], np.flatnonzero(digits["train"].label < 3)[:30])
    asked = recipe(method="universal", steps=1)
    attacker = Attacker(asked, Relabel(rule="next"), CLASSES, trained, fit=[few])  # toward 1, 2 and 3
    assert (attacker(few).attack["l2"] > 0).all()
    with pytest.raises(BadInput, match=r"no image of the first 1 shards .* toward 0, 4, 5, 6, 7, …: raise fit_shards"):
        attacker(digits["test"])


# -------------------------------------------------------------------------------------- spatial


def test_the_spatial_attack_takes_the_transformation_of_least_loss_toward_the_target(attacked, shard, trained):
    space = Spatial(grid=[3, 3, 3])
    after = attacked(method="spatial", spatial=space)
    x, wanted = to_unit(shard.images()), torch.from_numpy(after.label)
    tried = torch.from_numpy(candidates(space, shard.index)[0].copy()).float()
    views = [transform(x, *t[:, None].expand(3, len(x))) for t in tried]
    losses = torch.stack([targeted(trained, wanted)(view) for view in views])
    mine = targeted(trained, wanted)(to_unit(after.images()))
    torch.testing.assert_close(mine, losses.amin(0), atol=0.1, rtol=0.05)  # saved in 8 bits
    assert (mine <= targeted(trained, wanted)(x) + 0.1).all()
    assert set(after.attack) >= {"target", "l2", "linf", "margin", "success", "confidence"}


def test_turns_by_next_to_nothing_leave_every_pixel(attacked, shard):
    after = attacked(method="spatial", spatial=Spatial(rotation=1e-9, grid=[1, 1, 3]))
    assert np.array_equal(after.images(), shard.images())


def test_a_random_spatial_search_depends_on_the_image_and_not_on_its_neighbours(attacked, shard, part):
    space = Spatial(search="random", tries=3)
    whole = attacked(method="spatial", spatial=space)
    some = attacked(method="spatial", spatial=space, given=part(shard, slice(0, 20)))
    assert np.array_equal(some.images(), whole.images()[:20])


# ------------------------------------------------------------------------------------- noise


@pytest.mark.parametrize("norm", BALLS)
def test_noise_has_nearly_the_norm_it_may_have(norm):
    shard = grey()
    eps = 0.1 if norm == "linf" else 0.5
    after = Attacker(recipe(method="noise", model=None, norm=norm, eps=eps), Relabel(rule="next"), CLASSES, None)(shard)
    # Rounding moves each pixel by half a level at most: √64 / 2 levels of the L2 norm; in L∞ one level is the step.
    lost = 64**0.5 / 2 if norm == "l2" else 1
    assert (after.attack[norm] >= eps - lost / 255).all()
    assert (after.attack[norm] <= eps + 1e-9).all()


def test_noise_is_determined_by_seed_and_index():
    ball, pixels = Perturbation(eps=0.5), grey().images()
    index = np.arange(6)
    plain = noise(pixels, ball, 3, index)
    assert np.array_equal(noise(pixels, ball, 3, index[::-1])[::-1], plain)
    assert np.array_equal(noise(pixels[:2], ball, 3, index[4:]), plain[4:])
    assert not np.array_equal(noise(pixels, ball, 4, index), plain)
    assert len({image.tobytes() for image in plain}) == 6


def test_noise_has_no_preferred_direction():
    # Mean over pixels of 200 draws: the mean of n·D symmetric values is 0 within five standard deviations.
    shard = grey(200)
    moved = noise(shard.images(), Perturbation(eps=0.5), 0, shard.index).astype(np.float64) - 128
    assert abs(moved.mean()) < 5 * moved.std() / moved.size**0.5


# -------------------------------------------------------------------------------- the parts


def test_targeted_and_untargeted_are_the_cross_entropies_they_are_called():
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
    classes = torch.tensor([1, 2])
    by_hand = logits.exp().sum(1).log() - logits[torch.arange(2), classes]
    torch.testing.assert_close(targeted(lambda x: x, classes)(logits), by_hand)
    torch.testing.assert_close(untargeted(lambda x: x, classes)(logits), -by_hand)


def test_an_untargeted_attack_lowers_the_probability_of_the_true_class(trained, shard):
    goal = untargeted(trained, torch.from_numpy(shard.label))
    clean = to_unit(shard.images())
    moved = quantize(pgd(goal, clean, norm="l2", eps=1.0, step_size=0.2, steps=5), shard.images(), "l2", 1.0)
    before, after = (probability(trained, pixels, shard.label) for pixels in (shard.images(), moved))
    assert (after <= before).mean() > 0.95
    assert after.mean() < before.mean() / 2


def probability(model, pixels, label):
    return model(to_unit(pixels)).softmax(1).numpy()[np.arange(len(label)), label]


def test_logits_are_those_of_the_model_whatever_the_batch_size(trained, shard):
    whole = trained(to_unit(shard.images())).numpy()
    for size in (7, 40, 64):
        said = logits_of(trained, shard.images(), size)
        assert said.shape == (40, 10)
        np.testing.assert_allclose(said, whole, atol=1e-4)


def test_a_model_that_answers_nan_is_refused_and_not_saved_as_failed_samples(attacked, design, tmp_path):
    broken = Classifier(design, tmp_path).eval().requires_grad_(False)
    for weight in broken.parameters():
        weight.fill_(float("nan"))
    with pytest.raises(BadData, match="NaN"):
        attacked(model=broken, steps=1)
