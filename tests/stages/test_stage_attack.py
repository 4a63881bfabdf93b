"""A shard attacked: what is saved, and what is said of it."""

import numpy as np
import pytest
import torch

from stages.attack import Attacker, attack_batches, logits_of, noise, perturb, targeted, untargeted
from stages.errors import BadData, BadInput
from stages.model import Classifier, to_unit
from stages.recipes import Attack, Perturbation, Relabel
from stages.shard import Shard, pack

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
    """The shard under attack toward other classes, with what was asked."""

    def make(rule="other", model=trained, given=shard, **asked):
        return Attacker(recipe(**asked), Relabel(rule=rule), CLASSES, model)(given)

    return make


def levels(after, before):
    return (after.images().astype(np.int64) - before.images()).reshape(len(before), -1)


def grey(count=6, side=8):
    """Images in the middle of the box, which clipping does not touch."""
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
    assert after.attack["reached"].mean() > 0.5 > control.attack["reached"].mean()


def test_the_label_is_the_target_and_the_source_label_stays(attacked, shard):
    after = attacked()
    assert np.array_equal(after.label, after.attack["target"])
    assert np.array_equal(after.source_label, shard.source_label)
    assert np.array_equal(after.index, shard.index)


def test_failed_samples_stay_perturbed_and_are_labelled_as_their_target(attacked, shard):
    after = attacked(eps=0.3, steps=3)
    failed = ~after.attack["reached"]
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
    assert np.array_equal(after.attack["reached"][sure], margin[sure] > 0)
    assert 0 < after.attack["reached"].sum() < len(after)
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
    moved = attack_batches(trained, Perturbation(eps=1.0, steps=5, batch_size=BATCH), untargeted, *true(shard))
    before, after = (probability(trained, pixels, shard.label) for pixels in (shard.images(), moved))
    assert (after <= before).mean() > 0.95
    assert after.mean() < before.mean() / 2


def true(shard):
    return shard.images(), shard.label


def probability(model, pixels, label):
    return model(to_unit(pixels)).softmax(1).numpy()[np.arange(len(label)), label]


@pytest.mark.parametrize("norm", BALLS)
def test_perturb_takes_any_loss_and_gives_eight_bit_images_inside_the_ball(norm):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 4, 3), dtype=np.uint8)
    ball = Perturbation(norm=norm, eps=0.2, steps=5)
    darker = perturb(pixels, ball, lambda x: x.flatten(1).sum(1))
    assert darker.shape == pixels.shape
    assert darker.dtype == np.uint8
    assert (darker <= pixels).all()
    if norm == "linf":
        assert np.array_equal(darker, np.maximum(pixels.astype(int) - 51, 0))  # 0.2 · 255 = 51 levels


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
