"""The parameters of every stage, as frozen and validated models. Free of torch, so that they import fast.

A recipe holds the parameters of one node of an experiment file. Every parameter that changes the result is part of
the node's version; the fields in ``where`` only locate data and are not. `docs/experiment-file.md` is generated from
this file.
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
from stages.limits import ATTACKS, CLASSES, CONFUSED, IMAGES, MEMORY, NAME, PADDING, SHARDS, SIDE, STEPS

Precision = Literal["float32", "tf32", "bfloat16", "float16"]
Norm = Literal["l2", "linf"]
Augmentation = Literal["none", "flip", "crop-flip", "shift-flip", "spatial", "resized-crop", "imagenet"]
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
"""One value per split, sorted by the split's name: images are numbered in this order, not in the file's."""

Mean = Annotated[float, Field(ge=-(10**6), le=10**6)]
Deviation = Annotated[float, Field(ge=1e-6, le=10**6)]
"""Bounds beyond the statistics of any images, and well within float32."""


def fraction(value: Any) -> Any:
    """Convert a fraction such as `8/255` to a number; return anything else unchanged."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*/\s*(\d+(?:\.\d+)?)\s*", value) if isinstance(value, str) else None
    return float(found[1]) / float(found[2]) if found and float(found[2]) else value


Length = Annotated[float, BeforeValidator(fraction)]
"""In pixel units of [0, 1]; a fraction such as `8/255` is accepted."""

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
    """Fields that locate data without changing the result: not part of the version."""
    inputs: ClassVar[Mapping[str, str]] = {}
    """Fields that name other nodes → their group. A version contains these nodes' versions, not their names."""

    @property
    def unused(self) -> frozenset[str]:
        """Fields that have no effect in this recipe: not part of the version."""
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
        """Why the recipe cannot run on images of this shape; None if it can.

        Args:
            shape: channels, height, width.
            shard: number of images in the largest shard.
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
    """Whether a field accepts booleans, or is a recipe, which checks its own fields."""

    def takes(kind: Any) -> bool:
        if isinstance(kind, type) and issubclass(kind, bool | BaseModel):
            return True
        return any(map(takes, get_args(kind)))

    return takes(recipe.model_fields[field].annotation)


def _parameters(value: Any, dumped: Any) -> Any:
    """The parameters in a field's value; `dumped` is the value as pydantic dumps it."""
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
    seed: Seed = Field(0, description="Seed of the permutation that assigns images to shards.")
    limit: int | None = Field(
        None, ge=1, description="Keep at most this many images of each split, drawn with the seed."
    )
    max_undecodable: float = Field(
        0.01, ge=0, le=1, description="Largest fraction of a shard's images that may fail to decode."
    )


class Digits(_Source):
    """scikit-learn's 1,797 handwritten digits, 8 × 8, one channel: real images, no download."""

    source: Literal["sklearn-digits"]
    test_share: float = Field(0.2, gt=0, lt=1, description="Fraction of the images held out as the test split.")


class Torchvision(_Source):
    """A torchvision dataset, downloaded or read from a local folder."""

    source: Literal["cifar10", "cifar100", "mnist", "fashion-mnist"]
    root: str = Field(".", description="Folder of the dataset, relative to `--data`. Not part of the version.")
    download: bool = Field(True, description="Download the dataset if the folder lacks it. Not part of the version.")

    where = frozenset({"root", "download"})


class _Geometry(_Source):
    resize: int | None = Field(
        None, ge=1, le=SIDE, description="Shorter side after resizing (bilinear, antialiased), in pixels."
    )
    crop: int | None = Field(None, ge=1, le=SIDE, description="Side of the centre crop, in pixels.")
    channels: Later[Literal[1, 3] | None] = Field(
        None,
        description="Convert images to grey (`1`) or RGB (`3`). Default: RGB; for WebDataset shards grey if every "
        "image is grey.",
    )
    keep_files: Later[bool] = Field(
        True,
        description="Without `resize` and `crop`: keep the original files if all are png, jpg or webp. `false`: store "
        "every image as png.",
    )

    @model_validator(mode="after")
    def _crop_fits(self) -> "_Geometry":
        if self.resize is not None and self.crop is not None and self.crop > self.resize:
            raise ValueError(f"crop {self.crop} is larger than resize {self.resize}: set crop to {self.resize} or less")
        return self

    @property
    def unused(self) -> frozenset[str]:
        """Images that are resized or cropped are not stored as their files."""
        return _unless(self.keeps_sizes, "keep_files")

    @property
    def keeps_sizes(self) -> bool:
        """Whether images keep their sizes, which may differ."""
        return self.resize is None and self.crop is None

    @property
    def keeps_bytes(self) -> bool:
        """Whether the original files are kept where possible, without re-encoding."""
        return self.keeps_sizes and self.keep_files


class ImageFolder(_Geometry):
    """A folder in ImageNet's layout, on disk or in an object store: ``root/<split folder>/<class>/<image>``."""

    source: Literal["image-folder"]
    root: str = Field(description="The folder, relative to `--data`, or its URL.")
    splits: InOrder[str] = Field(
        {"test": "val", "train": "train"}, min_length=1, description="Split name → sub-folder of root."
    )
    classes: Literal["restricted-imagenet"] | ClassMap | None = Field(
        None,
        description="Group the folder's classes: `restricted-imagenet`, or a map from the name of a new class to "
        "folder names, class ids (positions in the sorted folder names) or id ranges such as `151-268`. Classes in no "
        "group are left out.",
    )
    balance: bool = Field(False, description="Keep the same number of images of every class, drawn with the seed.")
    test_share: Later[float | None] = Field(
        None,
        gt=0,
        lt=1,
        description="Share of the folder of `train` that becomes the split `test`, for folders without one: of each "
        "class the images whose names have the lowest hashes, at least one. They are in no other split.",
    )

    @model_validator(mode="after")
    def _one_test_split(self) -> Self:
        if self.test_share is not None and set(self.splits) != {"train"}:
            raise ValueError("test_share makes `test` from `train`: `splits` must be the folder of train alone")
        return self

    @field_validator("root")
    @classmethod
    def _no_secrets(cls, root: str) -> str:
        if "://" in root:
            refuse_secrets(root)
        return root


_Classes = Annotated[Distinct[str], Field(min_length=1)] | Annotated[int, Field(ge=1, le=CLASSES)] | None


class WebDataset(_Geometry):
    """WebDataset shards at a path, a brace pattern or a URL, with png, jpg, jpeg or webp images."""

    source: Literal["webdataset"]
    shards: InOrder[str] = Field(
        min_length=1, description="Split name → path or URL, braces allowed: `train-{000000..000146}.tar`."
    )
    image: Later[str | None] = Field(
        None,
        description="Extension of the image: everything after the first dot of its name. Required if samples have "
        "several images, or an extension such as `rgb.png`.",
    )
    label: Later[str] = Field(
        "cls",
        description="Extension of the label's file, or `json.KEY` for a key of the sample's JSON (nested: "
        "`json.meta.label`). A label is an integer ≥ 0, or a name listed in `classes`.",
    )
    classes: _Classes = Field(
        None, description="Class names, or the number of classes. Default: the largest label + 1."
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
        return _patterns(shards, "tars")


class Parquet(_Geometry):
    """Parquet files with a column of images and one of labels, as Hugging Face's datasets have them, at a path, a
    pattern or a URL."""

    source: Literal["parquet"]
    files: InOrder[str] = Field(
        min_length=1,
        description="Split name → path or URL, braces allowed: `train-{00000..00003}.parquet`; on disk and in object "
        "stores also `*`.",
    )
    image: str | None = Field(
        None,
        description="Column of the images: bytes of png, jpg, webp and other files, or a struct that has them as "
        "`bytes`. Required if several columns have images.",
    )
    label: str | None = Field(
        None,
        description="Column of the labels: integers ≥ 0, or text. Default: `label`, or the only column of labels.",
    )
    classes: _Classes = Field(
        None,
        description="Class names, or the number of classes. Default: the names in the file's `huggingface` metadata; "
        "else the different texts, sorted; else the largest label + 1.",
    )

    @field_validator("files")
    @classmethod
    def _no_secrets(cls, files: dict[str, str]) -> dict[str, str]:
        return _patterns(files, "files")


class Synthetic(_Source):
    """Procedural images, each from the seed and its index: a smooth colour pattern per class, shifted, plus noise. Any
    number of them, to try the pipeline at scale without a dataset."""

    source: Literal["synthetic"]
    images: InOrder[Annotated[int, Field(ge=1, le=IMAGES)]] = Field(
        {"test": 50_000, "train": 1_300_000}, min_length=1, description="Split name → number of images."
    )
    classes: int = Field(1000, ge=1, le=CLASSES, description="Number of classes, equally frequent.")
    size: int = Field(224, ge=1, le=SIDE, description="Side of the images, in pixels.")
    seed: Seed = Field(0, description="Seed of the images, and of the permutation that assigns them to shards.")


Load = Annotated[Digits | Torchvision | ImageFolder | WebDataset | Parquet | Synthetic, Field(discriminator="source")]


def _patterns(places: dict[str, str], what: str) -> dict[str, str]:
    """Refuse patterns of paths and URLs that carry credentials or stand for too many files."""
    for url in places.values():
        refuse_secrets(url)
        if (count := _alternatives(url)) > SHARDS:
            raise ValueError(f"the braces stand for {short(f'{count:,}')} {what}, at most {SHARDS:,} are read")
    return places


def _alternatives(pattern: str) -> int:
    """Upper bound on the number of expansions of a brace pattern: the product of all its choices."""
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
"""Query parameters allowed in a URL → pattern of their values. Anything else may be a secret."""


def refuse_secrets(url: str) -> None:
    """Refuse a URL that carries credentials, also in a nested URL: recipes are stored, shown and shared.

    Raises:
        ValueError: the URL has a user part, a query parameter outside `HARMLESS`, or a fragment. The message does not
            repeat the URL.
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
"""Smallest radius. Spread over the pixels of a photograph, it is a few float32 ulps (6e-8)."""

LEAST_REACH = 0.01
"""Smallest fraction of the radius that all steps together must cover: a shorter search leaves the images unchanged."""

ROUNDING = 1e-5
"""Relative rounding error of float32 over many steps."""

LEAST_CHANGED = 0.001
"""Smallest fraction of an image's values that an attack must be able to change; no useful gradient is sparser."""


def _in_levels(name: str, length: float) -> str:
    """A hint for users who give lengths in 8-bit levels."""
    return f"; if it is meant in 8-bit levels, write {name}: {length:g}/255" if length <= 255 else ""


def _by(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def _beyond(name: str, length: float, shape: Sequence[int]) -> str | None:
    """Why an L2 length exceeds the diagonal of the image space; None if it does not."""
    if length <= (diagonal := math.sqrt(math.prod(shape))):
        return None
    return (
        f"{name} {length:g} is more than {diagonal:.1f}, the diagonal of all images of {_by(shape)}"
        f"{_in_levels(name, length)}"
    )


class Ball(Recipe):
    """A norm ball and the steps of PGD in it, in pixel units of [0, 1], before normalisation."""

    norm: Norm = Field("l2", description="Norm of the ball.")
    eps: Length = Field(0.5, gt=0, description="Radius of the ball, in pixel units of [0, 1], as 0.5 or 8/255.")
    steps: int = Field(100, ge=1, le=STEPS, description="Steps of projected gradient descent.")
    step_size: Length | None = Field(None, gt=0, description="Length of a step, in pixel units. Default: eps / 5.")

    @model_validator(mode="after")
    def _fill_step_size(self) -> Self:
        if self.step_size is None:
            object.__setattr__(self, "step_size", self.eps / 5)
        return self

    @model_validator(mode="after")
    def _stays_in_the_box_and_moves(self) -> Self:
        """Refuse a ball larger than the image space, and a search too short to leave the centre of its ball."""
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
        """Key and value of the lengths that have an effect."""
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
    """The ball of adversarial training. Few steps by default, as in the paper: every training batch pays for them."""

    steps: int = Field(7, ge=1, le=STEPS, description="Steps of projected gradient descent.")
    fold: bool = Field(True, description="Fold batch norm into the preceding convolution for the attack's steps.")


Deterministic = Annotated[
    Later[bool],
    Field(
        description="Use deterministic kernels. Turn it off for a network with a layer that has none on a GPU; "
        "results then differ between runs."
    ),
]


def _unless(used: bool, name: str) -> frozenset[str]:
    """The field, unless it is used: an unused field is not part of the version."""
    return frozenset() if used else frozenset({name})


class Compute(Recipe):
    """How an attack computes its gradients. Each choice rounds differently, so all are part of the version."""

    precision: Precision = Field(
        "float32",
        description="Precision of the network's forward and backward passes; normalisation, loss, steps and projection "
        "stay in float32. On a GPU `tf32` is faster than float32, with ten bits of mantissa, and `float16` is as fast "
        "as `bfloat16` and closer to float32. On a CPU `tf32` is float32, and `float16` is slow.",
    )
    fold: bool = Field(True, description="Fold batch norm into the preceding convolution.")
    compile: Literal["reduce-overhead"] | bool = Field(
        False,
        description="Compile the network with `torch.compile`: costs each worker about half a minute and needs a C++ "
        "compiler, or Triton on a GPU; `notbugs plan --cost` estimates whether it pays off. `reduce-overhead`: "
        "`torch.compile` captures the CUDA graphs; otherwise each graph holds a whole PGD step.",
    )
    batch_size: int = Field(128, ge=1, description="Images attacked together; the last batch is padded.")
    deterministic: Deterministic = True

    def misfit(self, shape: Sequence[int], shard: int) -> str | None:
        return _too_large(self.batch_size, shape, shard) or super().misfit(shape, shard)


def _too_large(batch: int, shape: Sequence[int], shard: int) -> str | None:
    """Why a batch is too large for its shard or for memory; None if it is not."""
    if batch > max(shard, PADDING):
        return f"batch_size {batch} is more than the {shard} images of the largest shard, and no batch goes beyond one"
    if (size := 4 * batch * math.prod(shape)) > MEMORY:
        return (
            f"batch_size {batch}: so many images of {_by(shape)} take {size / 2**30:.1f} GiB as float32, at most "
            f"{MEMORY / 2**30:g} GiB are taken; lower it"
        )
    return None


class Perturbation(Ball, Compute):
    """A norm ball, the steps of PGD in it, and how to compute them."""


class Spatial(Recipe):
    """Rotations and translations of an image (Engstrom et al. 2019), padded with black."""

    rotation: float = Field(30, ge=0, le=180, description="Largest rotation in either direction, in degrees.")
    translation: float = Field(
        0.1,
        ge=0,
        le=0.5,
        description="Largest shift in either direction, as a fraction of the width and of the height.",
    )
    search: Literal["grid", "random"] = Field(
        "grid", description="`grid`: try every point of `grid`. `random`: try `tries` random transformations per image."
    )
    grid: list[Annotated[int, Field(ge=1, le=SIDE)]] = Field(
        [5, 5, 31],
        min_length=3,
        max_length=3,
        description="Points of the grid: vertical shifts, horizontal shifts, rotations.",
    )
    tries: int = Field(10, ge=1, le=STEPS, description="For search `random`: transformations per image.")
    seed: Seed = Field(0, description="For search `random`: seed, combined with the image's index.")

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
        """Parameters of the other search: not part of the version."""
        return frozenset({"grid"} if self.search == "random" else {"tries", "seed"})


class Attack(Perturbation):
    """Perturb every image toward its target class within the ball, and save it in 8 bits."""

    images: str = Field(description="Dataset whose images are perturbed.")
    model: str | None = Field(
        None,
        description="Source model, which is attacked. Required by `pgd`, `universal`, `spatial` and by the rule "
        "`least_likely`. For `leakage`: the reference model.",
    )
    method: Literal["pgd", "universal", "spatial", "noise", "leakage", "none"] = Field(
        "pgd",
        description="`pgd`; `universal`: one perturbation per target class; `spatial`: the rotation and translation "
        "with the lowest loss. Controls: `noise` (random, same radius), `leakage` (unchanged if the target is the "
        "true class or already the model's prediction, else noise), `none` (unchanged).",
    )
    not_transferring_to: Distinct[str] = Field(
        [],
        description="For `pgd`: models that should keep predicting the true class; their cross-entropy to it is added "
        "to the loss (Nakkiran 2019).",
    )
    spatial: Spatial = Field(
        Spatial(), description="For `spatial`: the space of transformations, and the search in it."
    )
    views: Later[int] = Field(
        1,
        ge=1,
        le=8,
        description="For `pgd`: average each step's gradient over this many views of the image: itself, its mirror "
        "image, and both shifted by up to a sixteenth of the width (after Athalye et al. 2018). Costs as many passes; "
        "a learner that flips and shifts its images then sees more of the perturbation.",
    )
    stop_at_margin: Later[float | None] = Field(
        None,
        ge=0,
        description="For `pgd`: stop an image early once its target's logit leads all others by this margin, and give "
        "its place in the batch to the next image. Checked every 5 steps. Default: every image takes all `steps`.",
    )
    fit_shards: int = Field(
        1, ge=1, le=SHARDS, description="For `universal`: number of leading shards to fit the perturbations on."
    )
    splits: Distinct[Split] = Field(["train"], min_length=1, description="Splits to make.")
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
        if self.views > 1 and self.method != "pgd":
            raise ValueError(f"`views` goes with method pgd, not with {self.method}")
        if self.stop_at_margin is not None and (self.method != "pgd" or self.not_transferring_to):
            raise ValueError("`stop_at_margin` goes with method pgd, and not with `not_transferring_to`")
        if self.model in self.not_transferring_to:
            raise ValueError(f"not_transferring_to names {self.model!r}, the model that is attacked")
        return self

    def most_changed(self, values: float) -> float:
        """Upper bound on the number of an image's values (pixels × channels) that change in the saved 8-bit image.

        Let r = min(eps, steps × step_size), or eps for a method without steps. A saved value changes only if it moves
        by at least half a level, 1/510, and then differs by a whole level. In L∞ each value moves by at most r: none
        changes if 255 eps < 1 or 510 r < 1. In L2 the squared moves sum to at most r², and the squared saved levels to
        at most (255 eps)² (`pgd.round_in_ball`): at most min((510 r)², (255 eps)²) values change.
        """
        if "eps" in self.unused:  # no perturbation, or a rotation and translation
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
        """Parameters that the method does not use: not part of the version."""
        ball, moves = {"norm", "eps"}, {"steps", "step_size"}
        idle = moves | {"precision", "fold", "compile", "spatial", "fit_shards", "views", "stop_at_margin"}
        by_method = {
            "pgd": {"spatial", "fit_shards", "seed"},
            "universal": {"spatial", "views", "stop_at_margin", "seed"},
            "spatial": ball | moves | {"fit_shards", "views", "stop_at_margin", "seed"},
            "noise": idle,
            "leakage": idle,
            "none": ball | idle | {"seed"},
        }
        return super().unused | by_method.get(self.method, frozenset())


class Invert(Compute):
    """Find, for every image, another image with the same features under a model. With the true labels this is D_R for a
    robust model and D_NR for a standard one (Ilyas et al. 2019, appendix C)."""

    images: str = Field(description="Dataset whose images are reconstructed from their features.")
    model: str = Field(description="Model whose features are matched.")
    layer: str | None = Field(
        None, description="Module whose output is the features; by default the input of the last linear layer."
    )
    start: Literal["other", "noise"] = Field(
        "other", description="Start of the search: `other`, another image of the same shard, or uniform `noise`."
    )
    steps: int = Field(1000, ge=1, le=STEPS, description="Steps of normalised gradient descent.")
    step_size: Length = Field(0.1, gt=0, description="Length of a step (L2), in pixel units of [0, 1].")
    splits: Distinct[Split] = Field(["train"], min_length=1, description="Splits to make.")
    seed: Seed = Field(0, description="Seed of the starts.")

    inputs = {"images": "datasets", "model": "models"}

    def misfit(self, shape: Sequence[int], shard: int) -> str | None:
        return _beyond("step_size", self.step_size, shape) or super().misfit(shape, shard)


class Select(Recipe):
    """Keep a fraction of each shard's images, ranked by an attack's effect on them. A shard is a random sample."""

    images: str = Field(description="Dataset to select from, made by an attack on a model.")
    by: Literal["margin", "confidence", "l2"] = Field("margin", description="Column of `samples.parquet` to rank by.")
    keep: Literal["top", "bottom"] = Field(description="`top`: the largest values; `bottom`: the smallest.")
    share: float = Field(gt=0, lt=1, description="Fraction of each shard's images to keep.")

    inputs = {"images": "datasets"}


class Relabel(Recipe):
    """The rule that assigns each image its target class, which becomes its label."""

    rule: Literal["random", "other", "next", "least_likely", "map"] = Field(
        description="`random`: uniform over all classes, so about 1/C of the labels stay correct; `other`: uniform "
        "over the wrong classes; `next`: y + 1, cyclically; `least_likely`: the source model's least likely class; "
        "`map`: the mapping in `map`."
    )
    seed: Seed = Field(0, description="Seed of the random rules, combined with the image's index.")
    map: dict[str | int, str | int] | None = Field(
        None,
        description="For rule `map`: true class → target class, by name or number. Every class is required.",
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
        """The seed of a deterministic rule is not part of the version."""
        return frozenset({} if self.rule in ("random", "other") else {"seed"})


RULES: tuple[str, ...] = get_args(Relabel.model_fields["rule"].annotation)
"""Every rule; each but `map` may be given alone, in place of the mapping."""


# --------------------------------------------------------------------------------- train, pretrained


def is_own(arch: str | None) -> bool:
    """Whether an arch names the user's own code, as ``package.module:name`` or ``./folder/file.py:name``."""
    return arch is not None and ":" in arch


class Train(Recipe):
    """SGD on one split of a dataset. The model is the one after the last epoch."""

    on: str = Field(description="Dataset to train on.")
    split: Split = Field("train", description="Its split.")
    arch: str | None = Field(
        None,
        description="`small_cnn`, `fast_resnet`, `slim_resnet`, `resnet9`, `airnet`, any torchvision classifier, or "
        "your own network as `package.module:name` or `./folder/file.py:name`.",
    )
    probe: str | None = Field(
        None,
        description="Linear probe, instead of an arch: the model whose features are frozen. Only a new last linear "
        "layer is trained.",
    )
    adversarial: Later[Adversary | None] = Field(
        None,
        description="Adversarial training: train on every batch after untargeted PGD in this ball.",
    )
    epochs: int = Field(30, ge=1, le=STEPS, description="Passes over the split.")
    batch_size: int = Field(128, ge=2, description="Images per step; an epoch's last, incomplete batch is dropped.")
    lr: float = Field(0.05, gt=0, description="Peak learning rate.")
    norm_bias_lr: Later[float] = Field(
        1,
        gt=0,
        description="Factor of the learning rate of batch norm's biases. Their weight decay is divided by it, so that "
        "a step shrinks all parameters alike.",
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of SGD.")
    nesterov: bool = Field(False, description="Nesterov's momentum.")
    weight_decay: float = Field(5e-4, ge=0, description="L2 penalty, on every parameter.")
    schedule: Literal["one-cycle", "triangular", "steps", "cosine", "constant"] = Field(
        "one-cycle",
        description="Learning rate schedule: `one-cycle` (up and down, cosine), `triangular` (up and down, linear), "
        "`steps` (÷ 10 at each milestone), `cosine` (to 0), or `constant`.",
    )
    milestones: list[int] = Field([], description="For schedule `steps`: epochs at which the rate is divided by 10.")
    warmup: float = Field(
        0.25, ge=0, lt=1, description="Fraction of a one-cycle or triangular schedule in which the rate rises."
    )
    ema: Later[float | None] = Field(
        None,
        gt=0,
        lt=1,
        description="Decay of an exponential moving average of the weights, which becomes the model; smaller in the "
        "first steps.",
    )
    whiten: Later[bool] = Field(
        False,
        description="Fix the first convolution: its filters are the principal directions of the patches of the split's "
        "images, scaled to variance 1, and their negatives.",
    )
    logit_scale: Later[float | None] = Field(
        None,
        gt=0,
        le=1000,
        description="Factor of the network's outputs, in training and after it. `airnet` has a factor of 1/9 besides.",
    )
    augment: Augmentation = Field(
        "none",
        description="`flip`: random horizontal flips; `crop-flip`: also shifts by up to an eighth of the width, "
        "padded with black; `shift-flip`: by up to a sixteenth, padded by reflection; "
        "`spatial`: rotations by up to 30 degrees and shifts by up to a tenth of the width and height; "
        "`resized-crop`: torchvision's `RandomResizedCrop` with `flip`; `imagenet`: also brightness, contrast and "
        "saturation jitter of up to a tenth and AlexNet's lighting noise, as in the paper.",
    )
    alternating_flip: Later[bool] = Field(
        False,
        description="Flip each image in every other epoch, starting with the first or the second at random, instead of "
        "independently: two epochs show both views (Jordan 2024).",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="Probability mass of the target spread evenly over all classes."
    )
    mean: list[Mean] | None = Field(
        None, min_length=1, description="Per-channel mean of the model's normalisation. Default: the split's."
    )
    std: list[Deviation] | None = Field(
        None,
        min_length=1,
        description="Per-channel standard deviation of the model's normalisation. Default: the split's.",
    )
    precision: Literal["float32", "tf32", "bfloat16"] = Field(
        "float32", description="Precision of the forward and backward passes; `tf32` as in an attack."
    )
    compile: Later[Literal["reduce-overhead"] | bool] = Field(
        False,
        description="Compile the network with `torch.compile`, as in an attack; `reduce-overhead` is for small images "
        "on a GPU.",
    )
    deterministic: Deterministic = True
    seed: Seed = Field(
        0,
        description="Seed of the initial weights, data order, augmentation and dropout. Models that the dataset was "
        "made from use other random streams of the same seed.",
    )
    threads: int = Field(
        2, ge=1, le=256, description="CPU threads. Their number changes rounding: part of the version."
    )
    workers: int = Field(
        1,
        ge=1,
        description="Data-parallel processes on Ray, with one GPU each if there are GPUs; each takes its part of the "
        "shards and of every batch. Fewer start if the cluster lacks room. Their number changes rounding: part of the "
        "version.",
    )
    memory_budget: int = Field(
        4096,
        ge=0,
        description="MiB of pixels that each process may hold in memory. A larger split is streamed from its shards.",
    )

    eval_images: int = Field(
        1000,
        ge=0,
        description="Number of the source's test images to evaluate after every epoch, for the learning curve. Not "
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
        own = {"mean": self.mean, "std": self.std, "whiten": self.whiten, "logit_scale": self.logit_scale}
        if self.probe is not None and (given := [name for name, value in own.items() if value]):
            raise ValueError(f"`{given[0]}` is that of the model that is probed: leave it out")
        return self

    @model_validator(mode="after")
    def _something_to_alternate(self) -> "Train":
        if self.alternating_flip and self.augment in ("none", "spatial"):
            raise ValueError(f"`alternating_flip` goes with an `augment` that flips, not with {self.augment}")
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
    """Pretrained weights: torchvision's, or a checkpoint for an arch."""

    arch: str = Field(description="As in `train`.")
    weights: str = Field(
        description="Name of torchvision weights (`IMAGENET1K_V1`, `DEFAULT`); or the path (relative to `--data`), "
        "URL or `package://PACKAGE/FILE` (a file of an installed Python package) of a torch.save or safetensors file."
    )
    key: Later[str | None] = Field(
        None,
        description="Key of the weights to take if the file holds several: `state_dict_ema`, `teacher.backbone`.",
    )
    sha256: str | None = Field(
        None,
        pattern="^[0-9a-f]{64}$",
        description="SHA-256 that the file must have. A file from a URL is imported once and kept: give the digest to "
        "import a changed one.",
    )
    classes: int | None = Field(
        None, ge=2, le=CLASSES, description="Number of classes. Default: the outputs of the checkpoint's last layer."
    )
    outputs: Distinct[Annotated[int, Field(ge=0, lt=CLASSES)]] | None = Field(
        None,
        min_length=2,
        description="Keep only these of the network's outputs, in this order: a network for ImageNet's 1000 classes "
        "then serves a dataset of some of them.",
    )
    shape: list[Annotated[int, Field(ge=1, le=SIDE)]] = Field(
        [3, 224, 224], min_length=3, max_length=3, description="Input shape: channels, height, width."
    )
    mean: list[Mean] | None = Field(
        None, min_length=1, description="Per-channel mean of the network's input normalisation."
    )
    std: list[Deviation] | None = Field(
        None, min_length=1, description="Per-channel standard deviation of the network's input normalisation."
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
        # Zenodo, Hugging Face and Dropbox append these to download links.
        refuse_secrets(re.sub(r"\?(download|dl|raw)=(1|true)$", "", weights))
        return weights


# ------------------------------------------------------------------------------------------ evaluate


class EvalAttack(Perturbation):
    """An attack that models are evaluated under."""

    method: Literal["pgd", "apgd"] = Field(
        "pgd",
        description="`pgd`, or `apgd`: AutoAttack's step-size-free APGD (Croce and Hein 2020), with cross-entropy and "
        "with the DLR loss; the worse result counts. `apgd` ignores `step_size`.",
    )
    restarts: int = Field(
        1,
        ge=1,
        le=ATTACKS,
        description="Number of runs: the first starts at the image, the others at random in the ball. The worst "
        "counts.",
    )
    target_rule: Relabel | None = Field(
        None, description="For a targeted attack: the rule that names the target class. By default untargeted."
    )
    surrogate: str | None = Field(
        None,
        description="Model that the adversarial examples are made on (a transfer attack). Default: each model itself.",
    )
    seed: Seed = Field(
        0, description="Seed of the random starts and of the average case's noise, combined with the image's index."
    )

    @property
    def unused(self) -> frozenset[str]:
        """APGD adapts its step size itself."""
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


LISTED = ("norm", "eps", "steps", "surrogate")
"""Keys of an evaluation's attack in which a list stands for one attack per value."""


class Evaluate(Recipe):
    """Accuracy of models on one split of a dataset, clean and under attack."""

    models: Distinct[str] = Field(min_length=1, description="Models to evaluate.")
    on: str = Field(description="Dataset to evaluate on.")
    split: Split = Field("test", description="Its split.")
    attacks: list[EvalAttack] = Field(
        [],
        description="Attacks to evaluate robust accuracy under, each beside the average case: noise of the same "
        "radius. A list in `norm`, `eps`, `steps` or `surrogate` stands for one attack per value.",
    )
    spatial: list[Spatial] = Field(
        [], description="Rotations and translations to evaluate under: worst and average case."
    )
    agreement: Relabel | None = Field(
        None,
        description="A second labelling to evaluate against: `next` counts predictions that equal y + 1.",
    )
    confusion: Later[bool] = Field(
        False,
        description="Count for each true class how often each class is predicted; the page of a run shows it. For at "
        f"most {CONFUSED} classes.",
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
        """Expand a list, such as radii or surrogates, to one attack per value: a curve, a row of a transfer matrix."""
        for key in LISTED:
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
        """Models that transfer attacks are made on."""
        return list(dict.fromkeys(a.surrogate for a in self.attacks if a.surrogate is not None))


class Usefulness(Ball, Compute):
    """Usefulness (ρ) and robust usefulness (γ) of each penultimate feature (Ilyas et al. 2019, section 2)."""

    models: Distinct[str] = Field(min_length=1, description="Models whose features to measure.")
    on: str = Field(description="Dataset to measure them on.")
    split: Split = Field("test", description="Its split.")
    normalise: Split = Field(
        "train", description="Split on which features are normalised to mean 0 and standard deviation 1."
    )
    layer: str | None = Field(
        None, description="Module whose output is the features; by default the input of the last linear layer."
    )
    eps: Length = Field(0.5, ge=0, description="Radius of the ball, in pixel units of [0, 1], as 0.5 or 8/255.")
    steps: int = Field(
        10, ge=1, le=STEPS, description="Steps of projected gradient descent, per feature and direction."
    )
    step_size: Length | None = Field(None, ge=0, description="Length of a step, in pixel units. Default: eps / 5.")
    limit: int = Field(
        200, ge=1, description="Number of images to attack for γ, spread over the split's shards; ρ uses all images."
    )
    useful: float = Field(
        0.1,
        ge=0,
        le=1,
        description="A feature is useful for a class if its ρ is at least this fraction of the largest possible ρ, "
        "2√(p(1 − p)) for a class with a fraction p of the images. A useful feature is robust if its γ is above 0.",
    )
    batch_size: int = Field(250, ge=1, description="Images attacked together; the last batch is padded.")

    inputs = {"on": "datasets", "models": "models"}

    def misfit(self, shape: Sequence[int], shard: int) -> str | None:
        return super().misfit(shape, max(shard, self.batch_size))  # a batch repeats each image


STAGES: dict[str, dict[str, type[Recipe]]] = {
    "datasets": {"attack": Attack, "invert": Invert, "select": Select},
    "models": {"train": Train, "pretrained": Pretrained},
    "evaluations": {"usefulness": Usefulness},
}
"""Group → key in the experiment file → recipe. A dataset's `load` is one of SOURCES; an evaluation without a key is
`Evaluate`."""

SOURCES: dict[str, type[Recipe]] = {
    tag: member for member in get_args(get_args(Load)[0]) for tag in get_args(member.model_fields["source"].annotation)
}
"""Source name → the recipe that reads it."""
