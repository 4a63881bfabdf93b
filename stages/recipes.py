"""What can be asked of each stage: frozen, checked, and free of torch so that they load fast.

A recipe is what an experiment file says of one node. Everything in it that changes the result is part
of the node's version; the fields named in ``where`` only say where data lies, and are not.
`docs/experiment-file.md` is generated from this file.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, get_args
from urllib.parse import parse_qsl, unquote, urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from stages.errors import short
from stages.limits import ATTACKS, CLASSES, IMAGES, MEMORY, NAME, PADDING, SHARDS, SIDE, STEPS

Precision = Literal["float32", "tf32", "bfloat16", "float16"]
Norm = Literal["l2", "linf"]
Augmentation = Literal["none", "flip", "crop-flip", "spatial", "resized-crop", "imagenet"]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Split = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=NAME)]


def _distinct(values: list[Any]) -> list[Any]:
    if len(set(values)) < len(values):
        raise ValueError(f"names {next(v for v in values if values.count(v) > 1)!r} twice")
    return values


T = TypeVar("T")
Distinct = Annotated[list[T], AfterValidator(_distinct)]


def _in_order(splits: dict[str, T]) -> dict[str, T]:
    return dict(sorted(splits.items()))


InOrder = Annotated[dict[Split, T], AfterValidator(_in_order)]
"""Something of each split, in the order of their names: in this order images are numbered, whatever the file's is."""

Mean = Annotated[float, Field(ge=-(10**6), le=10**6)]
Deviation = Annotated[float, Field(ge=1e-6, le=10**6)]
"""Beyond any images, and well within float32."""


def fraction(value: Any) -> Any:
    """8/255, as radii are written, as a number; what is no fraction as it is."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*/\s*(\d+(?:\.\d+)?)\s*", value) if isinstance(value, str) else None
    return float(found[1]) / float(found[2]) if found and float(found[2]) else value


Length = Annotated[float, BeforeValidator(fraction)]
"""In pixel units of [0, 1]; also as a fraction, `8/255`."""

ClassMap = dict[str, list[int | str]]


class _Later:
    """Marks a key that was added to a recipe which stored versions already name."""


Later = Annotated[T, _Later()]
"""A key added later. A version includes it only where its value is not the default, so recipes written before the key
existed keep their versions. Keys that were there from the start are always part of a version, default or not."""


class Recipe(BaseModel):
    """Base of all recipes: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    where: ClassVar[frozenset[str]] = frozenset()
    """Fields that say where something lies, not what it is: not part of the version."""
    inputs: ClassVar[Mapping[str, str]] = {}
    """Fields that name other nodes, and the group they name: the nodes' versions take the place of their names."""

    @property
    def unused(self) -> frozenset[str]:
        """Fields that play no part in this recipe, whatever they say."""
        return frozenset()

    @property
    def implied(self) -> frozenset[str]:
        """Fields added `Later` that have their default: a recipe written before them means the same."""
        return frozenset(
            name
            for name, field in type(self).model_fields.items()
            if any(isinstance(mark, _Later) for mark in field.metadata) and getattr(self, name) == field.get_default()
        )

    @model_validator(mode="before")
    @classmethod
    def _numbers_are_not_booleans(cls, said: Any) -> Any:
        """`epochs: true` would be one epoch."""
        for key, value in said.items() if isinstance(said, dict) else ():
            if key in cls.model_fields and _holds_boolean(value) and not _takes_boolean(cls, key):
                raise ValueError(f"{key} must not be true or false")
        return said

    def misfit(self, shape: Sequence[int], shard: int) -> str | None:
        """Why it cannot be done with some images, as far as these alone tell; None where it can.

        Args:
            shape: channels, height and width.
            shard: images of the largest shard.
        """
        return None

    def parameters(self) -> dict[str, Any]:
        """Every parameter that changes the result, defaults filled in except those of keys added `Later`; likewise for
        nested recipes. This is what a version is the digest of."""
        said = self.model_dump(mode="json", exclude={*self.where, *self.inputs, *self.unused, *self.implied})
        return {name: _parameters(getattr(self, name), dumped) for name, dumped in said.items()}


def _holds_boolean(value: Any) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return isinstance(value, bool) or any(map(_holds_boolean, inner))


@cache
def _takes_boolean(recipe: type[Recipe], field: str) -> bool:
    """Whether a field is for booleans, or for recipes, which see to it themselves."""

    def takes(kind: Any) -> bool:
        if isinstance(kind, type) and issubclass(kind, bool | BaseModel):
            return True
        return any(map(takes, get_args(kind)))

    return takes(recipe.model_fields[field].annotation)


def _parameters(value: Any, dumped: Any) -> Any:
    """What a field's value comes to, given how it is dumped."""
    match value:
        case Recipe():
            return value.parameters()
        case list():
            return [_parameters(*pair) for pair in zip(value, dumped, strict=True)]
        case _:
            return dumped


# ---------------------------------------------------------------------------------------------- load


class _Source(Recipe):
    shard_size: int = Field(1000, ge=1, description="Images per shard.")
    seed: Seed = Field(0, description="Seed of the permutation that spreads the images over the shards.")
    limit: int | None = Field(
        None, ge=1, description="Keep at most this many images of each split, drawn with the seed."
    )
    max_undecodable: float = Field(
        0.01, ge=0, le=1, description="Largest share of a shard's images that may fail to decode."
    )


class Digits(_Source):
    """scikit-learn's 1,797 handwritten digits, 8 × 8, one channel: real images that need no download."""

    source: Literal["sklearn-digits"]
    test_share: float = Field(0.2, gt=0, lt=1, description="Share of the images held out as the test split.")


class Torchvision(_Source):
    """A torchvision dataset, downloaded, or found in a folder without network."""

    source: Literal["cifar10", "cifar100", "mnist", "fashion-mnist"]
    root: str = Field(".", description="Folder that holds it, relative to `--data`. Not part of the version.")
    download: bool = Field(True, description="Download what is not there. Not part of the version.")

    where = frozenset({"root", "download"})


class _Geometry(_Source):
    resize: int | None = Field(
        None, ge=1, le=SIDE, description="Shorter side after resizing (bilinear, antialiased), in pixels."
    )
    crop: int | None = Field(None, ge=1, le=SIDE, description="Side of the centre crop, in pixels.")
    channels: Later[Literal[1, 3] | None] = Field(
        None,
        description="`1`: grey, `3`: RGB; images are converted. By default RGB; or grey for WebDataset shards, if all "
        "images are.",
    )
    keep_files: Later[bool] = Field(
        True,
        description="Without `resize` and `crop`: store files as they are, where all are png, jpg or webp; `false` "
        "stores every image as png.",
    )

    @model_validator(mode="after")
    def _crop_fits(self) -> "_Geometry":
        if self.resize is not None and self.crop is not None and self.crop > self.resize:
            raise ValueError(f"crop {self.crop} is larger than resize {self.resize}")
        return self

    @property
    def unused(self) -> frozenset[str]:
        """Images that are resized or cropped are not stored as their files."""
        return _unless(self.keeps_sizes, "keep_files")

    @property
    def keeps_sizes(self) -> bool:
        """Whether images are stored in the size that they have, be it each in its own."""
        return self.resize is None and self.crop is None

    @property
    def keeps_bytes(self) -> bool:
        """Whether files are stored as they are, without decoding and encoding again, where they can be."""
        return self.keeps_sizes and self.keep_files


class ImageFolder(_Geometry):
    """A folder in ImageNet's layout: ``root/<split folder>/<class>/<image>``."""

    source: Literal["image-folder"]
    root: str = Field(description="The folder, relative to `--data`.")
    splits: InOrder[str] = Field(
        {"test": "val", "train": "train"}, min_length=1, description="Split name → sub-folder of root."
    )
    classes: Literal["restricted-imagenet"] | ClassMap | None = Field(
        None,
        description="Grouping of the folder's classes: `restricted-imagenet`, or a map from a new class's name to "
        "folder names, class ids (position in the sorted folder names) or id ranges such as `151-268`; "
        "classes in no group are left out.",
    )
    balance: bool = Field(False, description="Keep equally many images of every class, drawn with the seed.")


class WebDataset(_Geometry):
    """WebDataset shards at a path, brace URL or object-store URL; images png, jpg, jpeg or webp."""

    source: Literal["webdataset"]
    shards: InOrder[str] = Field(
        min_length=1, description="Split name → path or URL, braces allowed: `train-{000000..000146}.tar`."
    )
    image: Later[str | None] = Field(
        None,
        description="Extension of the image, all that follows the first dot of its name; needed where a sample has "
        "several images, or one such as `rgb.png`.",
    )
    label: Later[str] = Field(
        "cls",
        description="Extension of the file that holds the label, or `json.KEY`, its place in the sample's JSON; "
        "`json.meta.label` if it is nested. A label is a whole number from 0, or a name that `classes` lists.",
    )
    classes: Annotated[Distinct[str], Field(min_length=1)] | Annotated[int, Field(ge=1, le=CLASSES)] | None = Field(
        None, description="Class names, or their number; by default one more than the largest label."
    )

    @field_validator("image", "label")
    @classmethod
    def _is_extension(cls, said: str | None) -> str | None:
        if said is not None and ("" in said.split(".") or "/" in said):
            raise ValueError(f"must be an extension, without the first dot, such as `jpg` or `rgb.png`, got {said!r}")
        if said == "json":
            raise ValueError("must say which key of the JSON, for example `json.label`")
        return said

    @field_validator("shards")
    @classmethod
    def _no_secrets(cls, shards: dict[str, str]) -> dict[str, str]:
        for url in shards.values():
            refuse_secrets(url)
            if (tars := _alternatives(url)) > SHARDS:
                raise ValueError(f"the braces stand for {short(f'{tars:,}')} tars, at most {SHARDS:,} are read")
        return shards


class Synthetic(_Source):
    """Images that are made, not stored, each from the seed and its index: a smooth pattern of colours for each class,
    shifted, under noise. As many as one likes, to try the pipeline at a size for which there are no images at hand."""

    source: Literal["synthetic"]
    images: InOrder[Annotated[int, Field(ge=1, le=IMAGES)]] = Field(
        {"test": 50_000, "train": 1_300_000}, min_length=1, description="Split name → number of its images."
    )
    classes: int = Field(1000, ge=1, le=CLASSES, description="Number of classes, equally frequent.")
    size: int = Field(224, ge=1, le=SIDE, description="Side of the images, in pixels.")
    seed: Seed = Field(0, description="Seed of the images, and of the permutation that spreads them over the shards.")


Load = Annotated[Digits | Torchvision | ImageFolder | WebDataset | Synthetic, Field(discriminator="source")]


def _alternatives(pattern: str) -> int:
    """How many texts a pattern with braces stands for, at most: every choice in it times every other."""
    count, open_ = 1, list[int]()
    for letter in pattern:
        if letter == "{":
            open_.append(1)
        elif open_ and letter == ",":
            open_[-1] += 1
        elif open_ and letter == "}":
            count *= open_.pop()
    for first, last, step in re.findall(r"{(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?}", pattern):
        count *= abs(int(last) - int(first)) // (int(step or 1) or 1) + 1
    letters = len(re.findall(r"{[A-Za-z]\.\.[A-Za-z](?:\.\.-?\d+)?}", pattern))
    return int(count * 52**letters)


HARMLESS = {
    "region": r"[\w-]*",
    "scheme": r"https?|",
    "endpoint_override": r"(https?://)?([\w.-]+|\[[\da-fA-F:.]+\])?(:\d+)?/?",
    "allow_bucket_creation": r"\w*",
}
"""What a URL's query may ask for, and how: whatever else stands there may be a secret."""


def refuse_secrets(url: str) -> None:
    """Raise if a URL, or one inside it, carries credentials: recipes are stored, shown and shared.

    Raises:
        ValueError: it has a user part, a query other than `HARMLESS`, or a fragment. The message does not repeat it.
    """
    layers = [url]  # an escape may hide another
    while (inner := unquote(layers[-1])) != layers[-1]:
        layers.append(inner)
    secret = "a URL with credentials would be stored and shown; put the keys in the environment instead"
    if any(re.search(r"//[^/?#]*@", layer) for layer in layers):
        raise ValueError(secret)
    parts = urlsplit(url)  # after that: what it refuses, it repeats
    asked = parse_qsl(parts.query, keep_blank_values=True)
    if not all(re.fullmatch(HARMLESS.get(key, "(?!)"), value, re.ASCII) for key, value in asked):
        raise ValueError(secret)
    if parts.fragment and parts.scheme:
        raise ValueError("a URL with a # is read up to it; if it is part of a name, write %23")


# ------------------------------------------------------------------------------------ attack, relabel


LEAST = 1e-4
"""The smallest radius: on the pixels of a photograph it is a few of float32's own steps, 6e-8."""

LEAST_REACH = 0.01
"""Share of the radius that the steps must be able to go: a shorter search scores, or saves, the images as they are."""

ROUNDING = 1e-5
"""What float32 may add to the way of many steps, as a share of it."""

LEAST_CHANGED = 0.001
"""Share of an image's values that an attack must be able to change; no gradient is as sparse as to do with fewer."""


def _in_levels(name: str, length: float) -> str:
    """A hint to those who count in levels of 8 bits."""
    return f"; if it is meant in 8-bit levels, write {name}: {length:g}/255" if length <= 255 else ""


def _by(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def _beyond(name: str, length: float, shape: Sequence[int]) -> str | None:
    """Why a length in L2 is more than the images have room for, if it is."""
    if length <= (diagonal := math.sqrt(math.prod(shape))):
        return None
    return (
        f"{name} {length:g} is more than {diagonal:.1f}, the diagonal of all images of {_by(shape)}"
        f"{_in_levels(name, length)}"
    )


class Ball(Recipe):
    """A ball and a way to move in it, in pixel units of [0, 1], before any normalisation."""

    norm: Norm = Field("l2", description="Norm of the ball.")
    eps: Length = Field(0.5, gt=0, description="Radius of the ball, in pixel units of [0, 1], as 0.5 or 8/255.")
    steps: int = Field(100, ge=1, le=STEPS, description="Steps of projected gradient descent.")
    step_size: Length | None = Field(None, gt=0, description="Length of a step, in pixel units; by default eps / 5.")

    @model_validator(mode="after")
    def _fill_step_size(self) -> Self:
        if self.step_size is None:
            object.__setattr__(self, "step_size", self.eps / 5)
        return self

    @model_validator(mode="after")
    def _stays_in_the_box_and_moves(self) -> Self:
        """Refuse what no image has room for, and a search that does not leave the middle of its ball."""
        for name, length in self._lengths():
            if name == "eps" and 0 < length < LEAST:
                raise ValueError(f"eps {length:g} is less than {LEAST:g}, too small for float32 to move in")
            if self.norm == "linf" and length > 1:
                hint = _in_levels(name, length)
                raise ValueError(f"{name} {length:g} is more than 1, the whole range of a pixel{hint}")
        way = self.steps * self.step
        if not self.unused & {"steps", "step_size"} and way < LEAST_REACH * self.eps:
            raise ValueError(
                f"{self.steps} steps of {self.step:g} lead no further than {way:g}, less than {LEAST_REACH:.0%} of eps "
                f"{self.eps:g}: raise step_size or steps"
            )
        return self

    def _lengths(self) -> Iterator[tuple[str, float]]:
        """Key and value of the lengths that play a part."""
        yield from ((name, getattr(self, name)) for name in ("eps", "step_size") if name not in self.unused)

    @property
    def step(self) -> float:
        """`step_size`, filled in."""
        assert self.step_size is not None
        return self.step_size

    def misfit(self, shape: Sequence[int], shard: int) -> str | None:
        beyond = (_beyond(*each, shape) for each in self._lengths() if self.norm == "l2")
        return next(filter(None, beyond), None) or super().misfit(shape, shard)


class Adversary(Ball):
    """The ball of adversarial training: the paper's few steps, for every batch pays for them."""

    steps: int = Field(7, ge=1, le=STEPS, description="Steps of projected gradient descent.")
    fold: bool = Field(True, description="Put batch norm into the weights of the convolution before it, for the steps.")


Deterministic = Annotated[
    Later[bool],
    Field(
        description="Kernels that give the same bits every time. Turn it off for a network that has a layer without "
        "such a kernel on a GPU; its bytes then differ from run to run."
    ),
]


def _unless(used: bool, name: str) -> frozenset[str]:
    """A field that is not used: it makes no other version, whatever it says."""
    return frozenset() if used else frozenset({name})


class Compute(Recipe):
    """How the gradients of a search are computed: each choice rounds in its own way, so it is part of the version."""

    precision: Precision = Field(
        "float32",
        description="Precision of the network's forward and backward pass; normalisation, loss, steps and projection "
        "are float32. On a GPU `tf32` rounds what goes into the products of float32 to ten bits, which is faster, and "
        "`float16` is as fast as `bfloat16` and closer to float32; on a processor `tf32` is float32, and `float16` "
        "slow.",
    )
    fold: bool = Field(True, description="Put batch norm into the weights of the convolution before it.")
    compile: Literal["reduce-overhead"] | bool = Field(
        False,
        description="Compile the network with `torch.compile`: takes each worker about half a minute and needs a C++ "
        "compiler, or a GPU's; `notbugs plan --cost` says whether it pays. `reduce-overhead` has it make the CUDA "
        "graphs, which else hold a whole step.",
    )
    batch_size: int = Field(128, ge=1, description="Images searched together; the last batch is padded to it.")
    deterministic: Deterministic = True

    def misfit(self, shape: Sequence[int], shard: int) -> str | None:
        return _too_large(self.batch_size, shape, shard) or super().misfit(shape, shard)


def _too_large(batch: int, shape: Sequence[int], shard: int) -> str | None:
    """Why a batch is larger than what it is of, if it is."""
    if batch > max(shard, PADDING):
        return f"batch_size {batch} is more than the {shard} images of the largest shard, and no batch goes beyond one"
    if (size := 4 * batch * math.prod(shape)) > MEMORY:
        return (
            f"batch_size {batch}: so many images of {_by(shape)} take {size / 2**30:.1f} GiB as float32, at most "
            f"{MEMORY / 2**30:g} GiB are taken; lower it"
        )
    return None


class Perturbation(Ball, Compute):
    """A ball, a way to move in it, and how to compute that."""


class Spatial(Recipe):
    """Rotations and translations (Engstrom et al. 2019): of an image, with black where it had no pixels."""

    rotation: float = Field(30, ge=0, le=180, description="Largest rotation either way, in degrees.")
    translation: float = Field(
        0.1, ge=0, le=0.5, description="Largest shift either way, as a share of the width and of the height."
    )
    search: Literal["grid", "random"] = Field(
        "grid", description="All points of `grid`, or `tries` of the space at random for each image."
    )
    grid: list[Annotated[int, Field(ge=1, le=SIDE)]] = Field(
        [5, 5, 31], min_length=3, max_length=3, description="Points of the grid: shifts down, shifts right, rotations."
    )
    tries: int = Field(10, ge=1, le=STEPS, description="For search `random`: transformations tried of each image.")
    seed: Seed = Field(0, description="For search `random`: seed; drawn per image, by its index.")

    @property
    def candidates(self) -> int:
        """Transformations that are tried of each image."""
        return math.prod(self.grid) if self.search == "grid" else self.tries

    @model_validator(mode="after")
    def _moves(self) -> Self:
        down, right, turns = self.grid
        if self.search == "grid" and self.candidates > STEPS:
            raise ValueError(f"grid {self.grid} has {self.candidates:,} points, at most {STEPS:,} are tried")
        random = self.search == "random"
        shifted = self.translation > 0 and (random or max(down, right) > 1)
        turned = self.rotation > 0 and (random or turns > 1)
        if not shifted and not turned:
            raise ValueError("the space holds the untouched image alone: raise rotation, translation or grid")
        return self

    @property
    def unused(self) -> frozenset[str]:
        """Parameters of the other search: they make no other version."""
        return frozenset({"grid"} if self.search == "random" else {"tries", "seed"})


class Attack(Perturbation):
    """Move every image toward its target class, inside the ball, and save it on the 8-bit grid."""

    images: str = Field(description="Dataset whose images are perturbed.")
    model: str | None = Field(
        None,
        description="Model that is attacked; needed by `pgd`, `universal`, `spatial` and by `least_likely`. "
        "For `leakage`, the reference whose answers are left alone.",
    )
    method: Literal["pgd", "universal", "spatial", "noise", "leakage", "none"] = Field(
        "pgd",
        description="`pgd`; `universal`: one perturbation for each target class; `spatial`: the rotation and "
        "translation that does most. Or for controls: `noise` (random, of the same radius), `leakage` (untouched where "
        "the target is the true class or the model's answer already, noise elsewhere), `none` (untouched).",
    )
    not_transferring_to: Distinct[str] = Field(
        [],
        description="For `pgd`: models that shall go on answering the true class; their cross-entropy to it is added "
        "to the loss (Nakkiran 2019).",
    )
    spatial: Spatial = Field(Spatial(), description="For `spatial`: the space, and how it is searched.")
    stop_at_margin: Later[float | None] = Field(
        None,
        ge=0,
        description="For `pgd`: an image whose target leads all other classes by this much (logits) is moved no "
        "further, and the next takes its place in the batch; looked at every 5 steps. By default all are moved `steps` "
        "times.",
    )
    fit_shards: int = Field(
        1, ge=1, le=SHARDS, description="For `universal`: how many of the first shards the perturbations are found on."
    )
    splits: Distinct[Split] = Field(["train"], min_length=1, description="Splits of the images to make.")
    seed: Seed = Field(0, description="Seed of the noise.")

    inputs = {"images": "datasets", "model": "models", "not_transferring_to": "models"}

    @model_validator(mode="after")
    def _method_has_what_it_needs(self) -> "Attack":
        if self.most_changed(math.inf) < 1:
            if self.eps < 1 / 255:
                why = f"eps {self.eps:g} is less than one 8-bit level (1/255 = 0.0039)"
            else:
                why = f"{self.steps} steps of {self.step:g} are together less than half an 8-bit level (1/510 = 0.002)"
            raise ValueError(f"{why}: the saved images would not change")
        if self.method in ("pgd", "universal", "spatial") and self.model is None:
            raise ValueError(f"method {self.method} needs a model to attack: add `model: NAME`")
        if self.not_transferring_to and self.method != "pgd":
            raise ValueError(f"`not_transferring_to` goes with method pgd, not with {self.method}")
        if self.stop_at_margin is not None and (self.method != "pgd" or self.not_transferring_to):
            raise ValueError("`stop_at_margin` goes with method pgd, and not with `not_transferring_to`")
        if self.model in self.not_transferring_to:
            raise ValueError(f"not_transferring_to names {self.model!r}, the model that is attacked")
        return self

    def most_changed(self, values: float) -> float:
        """How many of an image's values (pixels × channels) can be another 8-bit level once it is saved, at most.

        With r = min(eps, steps × step_size), or eps where there are no steps: a value is saved as another level only
        if it moves by half of one, 1/510, and then differs by a whole one. In L∞ each of them moves by r at most: none
        changes if 255 eps < 1 or 510 r < 1. In L2 the squares of all moves add up to r² at most, and those of the
        levels saved to (255 eps)² (`pgd.to_grid`): no more than min((510 r)², (255 eps)²) of them change.
        """
        if "eps" in self.unused:  # none, or turned and shifted as a whole
            return values
        reach = self.eps if "steps" in self.unused else min(self.eps, self.steps * self.step)
        if self.eps < 1 / 255 or 510 * reach < 1 - ROUNDING:
            return 0
        return values if self.norm == "linf" else min(values, (510 * reach) ** 2, (255 * self.eps) ** 2 + ROUNDING)

    def misfit(self, shape: Sequence[int], shard: int) -> str | None:
        values = math.prod(shape)
        if (most := self.most_changed(values)) < LEAST_CHANGED * values:
            return (
                f"an L2 attack with eps {self.eps:g} and {self.steps} steps of {self.step:g} changes at most "
                f"{most:.0f} of the {values:,} values of an image by a level of 8 bits: raise them"
            )
        return super().misfit(shape, shard)

    @property
    def unused(self) -> frozenset[str]:
        """Parameters that the method does not use: they make no other version of the dataset."""
        ball, moves = {"norm", "eps"}, {"steps", "step_size"}
        idle = moves | {"precision", "fold", "compile", "spatial", "fit_shards", "stop_at_margin"}
        by_method = {
            "pgd": {"spatial", "fit_shards", "seed"},
            "universal": {"spatial", "stop_at_margin", "seed"},
            "spatial": ball | moves | {"fit_shards", "stop_at_margin", "seed"},
            "noise": idle,
            "leakage": idle,
            "none": ball | idle | {"seed"},
        }
        return super().unused | by_method.get(self.method, frozenset())


class Invert(Compute):
    """Find, for every image, another that a model represents alike: with its true label, D_R of a robust
    model and D_NR of a standard one (Ilyas et al. 2019, appendix C)."""

    images: str = Field(description="Dataset whose images are represented anew.")
    model: str = Field(description="Model whose features are matched.")
    layer: str | None = Field(
        None, description="Module whose output is the features; by default the input of the last linear layer."
    )
    start: Literal["other", "noise"] = Field(
        "other", description="Where the search starts: `other`, another image of the same shard; or uniform `noise`."
    )
    steps: int = Field(1000, ge=1, le=STEPS, description="Steps of normalised gradient descent.")
    step_size: Length = Field(0.1, gt=0, description="Length of a step (L2), in pixel units of [0, 1].")
    splits: Distinct[Split] = Field(["train"], min_length=1, description="Splits of the images to make.")
    seed: Seed = Field(0, description="Seed of the starts.")

    inputs = {"images": "datasets", "model": "models"}

    def misfit(self, shape: Sequence[int], shard: int) -> str | None:
        return _beyond("step_size", self.step_size, shape) or super().misfit(shape, shard)


class Select(Recipe):
    """Keep a share of each shard's images (a shard is a fair sample), by what an attack did to them."""

    images: str = Field(description="Dataset to select from; one that was made by an attack on a model.")
    by: Literal["margin", "confidence", "l2"] = Field("margin", description="Column of `samples.parquet`.")
    keep: Literal["top", "bottom"] = Field(description="The largest values or the smallest.")
    share: float = Field(gt=0, lt=1, description="Share of every shard's images that is kept.")

    inputs = {"images": "datasets"}


class Relabel(Recipe):
    """The rule that names each image's target class, which becomes its label."""

    rule: Literal["random", "other", "next", "least_likely", "map"] = Field(
        description="`random` over all classes, the true one included (about 1/C of the labels stay right); `other` "
        "over the classes that are not the true one; `next`: y + 1, cyclically; `least_likely` by the "
        "attacked model; `map`: as `map` says."
    )
    seed: Seed = Field(0, description="Seed of the random rules; one draw per image, by its index.")
    map: dict[str | int, str | int] | None = Field(
        None,
        description="For rule `map`: true class → target class, by name or number; every class must be there.",
    )

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"rule": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _map_if_and_only_if(self) -> "Relabel":
        if (self.rule == "map") != (self.map is not None):
            raise ValueError("`map` goes with rule map, and rule map needs it")
        return self

    @property
    def unused(self) -> frozenset[str]:
        """Rules that draw nothing have no seed."""
        return frozenset({} if self.rule in ("random", "other") else {"seed"})


RULES: tuple[str, ...] = get_args(Relabel.model_fields["rule"].annotation)
"""The rules of a relabelling; each but `map` may stand for the whole mapping."""


# -------------------------------------------------------------------------------------- train, bring


def is_own(arch: str | None) -> bool:
    """Whether an arch names code of the user's, as ``package.module:name`` or ``./folder/file.py:name``."""
    return arch is not None and ":" in arch


class Train(Recipe):
    """SGD on one split of a dataset; the last epoch is the model."""

    on: str = Field(description="Dataset to train on.")
    split: Split = Field("train", description="Its split.")
    arch: str | None = Field(
        None,
        description="`small_cnn`, `fast_resnet`, `resnet9`, any torchvision classifier, or your own, as "
        "`package.module:name` or `./folder/file.py:name`.",
    )
    probe: str | None = Field(
        None,
        description="Instead of an arch: a model whose features are kept as they are; only its last linear layer is "
        "trained, from new weights (a linear probe).",
    )
    adversarial: Later[Adversary | None] = Field(
        None,
        description="Adversarial training: every batch is first moved away from its labels by PGD in this ball.",
    )
    epochs: int = Field(30, ge=1, le=STEPS, description="Passes over the split.")
    batch_size: int = Field(128, ge=2, description="Images per step; the last incomplete batch of an epoch is dropped.")
    lr: float = Field(0.05, gt=0, description="Peak learning rate.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of SGD.")
    nesterov: bool = Field(False, description="Nesterov's momentum.")
    weight_decay: float = Field(5e-4, ge=0, description="L2 penalty, on every parameter.")
    schedule: Literal["one-cycle", "steps", "cosine", "constant"] = Field(
        "one-cycle",
        description="Learning rate over time: up and down (cosine), ÷ 10 at `milestones`, cosine to 0, or constant.",
    )
    milestones: list[int] = Field([], description="Epochs at which schedule `steps` divides the rate by 10.")
    warmup: float = Field(0.25, ge=0, lt=1, description="Share of a one-cycle schedule in which the rate rises.")
    augment: Augmentation = Field(
        "none",
        description="`flip`: left–right at random; `crop-flip`: also shifted by up to an eighth of the width; "
        "`spatial`: rotated by up to 30 degrees and shifted by up to a tenth of the width and height; `resized-crop`: "
        "torchvision's `RandomResizedCrop` and `flip`; `imagenet`: these, brightness, contrast and saturation changed "
        "by up to a tenth, and the lighting noise of AlexNet, as the paper's networks were trained.",
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Share of the target spread over all classes.")
    mean: list[Mean] | None = Field(
        None, min_length=1, description="Per-channel mean inside the model; by default the dataset's."
    )
    std: list[Deviation] | None = Field(
        None, min_length=1, description="Per-channel deviation inside the model; by default the dataset's."
    )
    precision: Literal["float32", "tf32", "bfloat16"] = Field(
        "float32", description="Precision of the forward and backward pass; `tf32` as in an attack."
    )
    compile: Later[Literal["reduce-overhead"] | bool] = Field(
        False,
        description="Compile the network with `torch.compile`, as in an attack; `reduce-overhead` is for small images "
        "on a GPU.",
    )
    deterministic: Deterministic = True
    seed: Seed = Field(
        0,
        description="Seed of initial weights, order, augmentation and dropout. Models that stand behind the dataset "
        "draw other numbers from the same seed.",
    )
    threads: int = Field(2, ge=1, le=256, description="CPU threads; more threads, other rounding: part of the version.")
    workers: int = Field(
        1,
        ge=1,
        description="Processes that train side by side on Ray, a GPU each where there are any, each on its share of "
        "the shards and of every batch; as many of them as there is room for. Other rounding: part of the version.",
    )
    memory_budget: int = Field(
        4096,
        ge=0,
        description="MiB of pixels that each process may hold in memory; a larger split streams from its shards.",
    )

    eval_images: int = Field(
        1000,
        ge=0,
        description="Images of the source's test split that are scored after every epoch, for the learning curve. Not "
        "part of the version.",
    )

    where = frozenset({"eval_images"})
    inputs = {"on": "datasets", "probe": "models"}

    def misfit(self, shape: Sequence[int], shard: int) -> str | None:
        why = self.adversarial and self.adversarial.misfit(shape, shard)
        return f"adversarial: {why}" if why else super().misfit(shape, shard)

    @model_validator(mode="after")
    def _arch_or_probe(self) -> "Train":
        if (self.arch is None) == (self.probe is None):
            raise ValueError("a training has either `arch` or `probe`")
        if self.probe is not None and (self.mean or self.std):
            raise ValueError("`mean` and `std` are those of the model that is probed")
        return self

    @model_validator(mode="after")
    def _two_images_each(self) -> "Train":
        if self.batch_size < 2 * self.workers:
            raise ValueError(
                f"batch_size {self.batch_size} is of all {self.workers} workers together: it must be at least "
                f"{2 * self.workers}, two images for each"
            )
        return self

    @model_validator(mode="after")
    def _milestones_and_schedule(self) -> "Train":
        if any(not 0 < milestone < self.epochs for milestone in self.milestones):
            raise ValueError(f"milestones must lie between 1 and {self.epochs - 1}, the epochs before the last")
        if bool(self.milestones) != (self.schedule == "steps"):
            raise ValueError("`milestones` goes with schedule steps, and schedule steps needs it")
        return self


class Pretrained(Recipe):
    """A model made elsewhere: torchvision's pretrained weights, or a checkpoint with the arch that reads it."""

    arch: str = Field(description="As in `train`.")
    weights: str = Field(
        description="Name of torchvision weights (`IMAGENET1K_V1`, `DEFAULT`), or path (below `--data`), URL or "
        "`package://PACKAGE/FILE` (a file of an installed Python package) of what torch.save or safetensors wrote."
    )
    key: Later[str | None] = Field(
        None,
        description="Where the file has several weights that fit, or others beside them, those to take: "
        "`state_dict_ema`, `teacher.backbone`.",
    )
    sha256: str | None = Field(
        None,
        pattern="^[0-9a-f]{64}$",
        description="Digest that the file must have. A model is brought once and kept: to bring other bytes from "
        "the same place, name their digest.",
    )
    classes: int | None = Field(
        None, ge=2, le=CLASSES, description="Number of classes; by default what the checkpoint's last layer says."
    )
    outputs: Distinct[Annotated[int, Field(ge=0, lt=CLASSES)]] | None = Field(
        None,
        min_length=2,
        description="Of all the network's classes only these, in this order: a network for ImageNet's thousand serves "
        "a dataset of some of them.",
    )
    shape: list[Annotated[int, Field(ge=1, le=SIDE)]] = Field(
        [3, 224, 224], min_length=3, max_length=3, description="Channels, height and width it takes."
    )
    mean: list[Mean] | None = Field(
        None, min_length=1, description="Per-channel mean that the network expects to be subtracted."
    )
    std: list[Deviation] | None = Field(
        None, min_length=1, description="Per-channel deviation that it expects to be divided by."
    )

    @field_validator("shape")
    @classmethod
    def _grey_or_colours(cls, shape: list[int]) -> list[int]:
        if shape[0] not in (1, 3):
            raise ValueError(f"images have 1 or 3 channels, got {shape[0]}: channels come first, as in [3, 224, 224]")
        return shape

    @field_validator("weights")
    @classmethod
    def _no_secrets(cls, weights: str) -> str:
        # What Zenodo, Hugging Face and Dropbox put there is none.
        refuse_secrets(re.sub(r"\?(download|dl|raw)=(1|true)$", "", weights))
        return weights


# ------------------------------------------------------------------------------------------ evaluate


class EvalAttack(Perturbation):
    """An attack that models are scored under."""

    method: Literal["pgd", "apgd"] = Field(
        "pgd",
        description="`pgd`, or `apgd`: the step-size-free APGD of AutoAttack (Croce and Hein 2020), once with "
        "cross-entropy and once with the DLR loss; the worse counts. It does not use `step_size`.",
    )
    restarts: int = Field(
        1,
        ge=1,
        le=ATTACKS,
        description="The first search starts at the image, the others at random in the ball; the worst counts.",
    )
    target_rule: Relabel | None = Field(
        None, description="For a targeted attack: the rule that names the target class. By default untargeted."
    )
    surrogate: str | None = Field(
        None, description="Model that the attack is made on (a transfer attack); by default each model itself."
    )
    seed: Seed = Field(0, description="Seed of the random starts and of the average case; drawn per image.")

    @property
    def unused(self) -> frozenset[str]:
        """APGD chooses its step size."""
        return super().unused | _unless(self.method != "apgd", "step_size")

    @field_validator("target_rule")
    @classmethod
    def _no_model_needed(cls, rule: Relabel | None) -> Relabel | None:
        return _refuse_least_likely(rule)


def _refuse_least_likely(rule: Relabel | None) -> Relabel | None:
    if rule is not None and rule.rule == "least_likely":
        raise ValueError("least_likely is not a labelling of its own: it differs from model to model")
    return rule


def _each(attack: Any, key: str) -> list[Any]:
    listed = attack.get(key) if isinstance(attack, dict) else None
    return [{**attack, key: value} for value in listed] if isinstance(listed, list) else [attack]


class Evaluate(Recipe):
    """Accuracy of some models on one split of a dataset, clean and under attack."""

    models: Distinct[str] = Field(min_length=1, description="Models to score.")
    on: str = Field(description="Dataset to score them on.")
    split: Split = Field("test", description="Its split.")
    attacks: list[EvalAttack] = Field(
        [],
        description="Attacks to score them under as well, each beside the average case: noise of the same radius. "
        "Where `norm`, `eps`, `steps` or `surrogate` is a list, one attack for each.",
    )
    spatial: list[Spatial] = Field(
        [], description="Rotations and translations to score them under as well, worst beside average case."
    )
    agreement: Relabel | None = Field(
        None,
        description="Another labelling to score against as well: `next` counts answers that equal y + 1.",
    )
    batch_size: int = Field(250, ge=1, description="Images per forward pass.")
    deterministic: Deterministic = True

    inputs = {"on": "datasets", "models": "models", "surrogates": "models"}

    def misfit(self, shape: Sequence[int], shard: int) -> str | None:
        each = {f"attacks.{i}: ": attack.misfit(shape, shard) for i, attack in enumerate(self.attacks)}
        first = next((place + why for place, why in each.items() if why), None)
        return _too_large(self.batch_size, shape, shard) or first

    @field_validator("attacks", mode="before")
    @classmethod
    def _one_for_each(cls, attacks: Any) -> Any:
        """A list of radii or of surrogates stands for one attack each: a curve, a row of a transfer matrix."""
        for key in ("norm", "eps", "steps", "surrogate"):
            if isinstance(attacks, list):
                attacks = [one for attack in attacks for one in _each(attack, key)]
                if len(attacks) > ATTACKS:
                    raise ValueError(f"the lists stand for more than {ATTACKS:,} attacks: shorten them")
        return attacks

    @field_validator("agreement")
    @classmethod
    def _no_model_needed(cls, rule: Relabel | None) -> Relabel | None:
        return _refuse_least_likely(rule)

    @property
    def surrogates(self) -> list[str]:
        """Models that attacks are made on, besides those scored."""
        return list(dict.fromkeys(a.surrogate for a in self.attacks if a.surrogate is not None))


class Usefulness(Ball, Compute):
    """Usefulness and robust usefulness of each penultimate feature (Ilyas et al. 2019, section 2)."""

    models: Distinct[str] = Field(min_length=1, description="Models whose features are measured.")
    on: str = Field(description="Dataset to measure them on.")
    split: Split = Field("test", description="Its split.")
    normalise: Split = Field("train", description="Split on which features get mean 0 and deviation 1.")
    layer: str | None = Field(
        None, description="Module whose output is the features; by default the input of the last linear layer."
    )
    eps: Length = Field(0.5, ge=0, description="Radius of the ball, in pixel units of [0, 1], as 0.5 or 8/255.")
    steps: int = Field(
        10, ge=1, le=STEPS, description="Steps of projected gradient descent, for each feature both ways."
    )
    step_size: Length | None = Field(None, ge=0, description="Length of a step, in pixel units; by default eps / 5.")
    limit: int = Field(
        200, ge=1, description="Images of the split that are attacked, for γ, spread over its shards; ρ is of all."
    )
    useful: float = Field(
        0.1,
        ge=0,
        le=1,
        description="A feature is useful for a class if its ρ is at least this share of the largest that there can be, "
        "2√(p(1 − p)) for a class that p of the images are of. A useful feature is robust if its γ is above 0.",
    )
    batch_size: int = Field(250, ge=1, description="Images searched together; the last batch is padded to it.")

    inputs = {"on": "datasets", "models": "models"}

    def misfit(self, shape: Sequence[int], shard: int) -> str | None:
        return super().misfit(shape, max(shard, self.batch_size))  # a batch holds an image many times over


STAGES: dict[str, dict[str, type[Recipe]]] = {
    "datasets": {"attack": Attack, "invert": Invert, "select": Select},
    "models": {"train": Train, "pretrained": Pretrained},
    "evaluations": {"usefulness": Usefulness},
}
"""Group → key in the experiment file → what it asks for. A dataset's `load` is one of SOURCES, an evaluation without
a key is `Evaluate`."""

SOURCES: dict[str, type[Recipe]] = {
    tag: member for member in get_args(get_args(Load)[0]) for tag in get_args(member.model_fields["source"].annotation)
}
"""Source name → the recipe that reads it."""
