"""Write docs/experiment-file.md: every key of the experiment file, from the models that read it.

    python docs/make_experiment_file.py            print the document
    python docs/make_experiment_file.py --write    write it beside this file

The tables come from the pydantic models, the error messages from parsing wrong files. Only the text between them is
written here.
"""

import ast
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import torch
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from torch.utils.flop_counter import FlopCounterMode

from pipeline.experiment import controls, schema, spec, sweeps
from pipeline.experiment.graph import build
from pipeline.run.jobs import Context
from pipeline.run.preflight import preflight
from pipeline.store import Store
from stages import limits, nets, recipes
from stages.errors import BadInput

HERE = Path(__file__).parent / "experiment-file.md"

INTRO = """\
<!-- Written by docs/make_experiment_file.py: change that file or the models, then run `make docs`. -->
# The experiment file

An experiment file is a YAML file that defines datasets, models and evaluations, each from the others.
`notbugs plan FILE` checks it and prints the graph; `notbugs run FILE` makes whatever is missing.

```yaml
name: digits
datasets:
  clean: {load: {source: sklearn-digits}}
  other: {attack: {images: clean, model: standard, eps: 1.5, steps: 50}, relabel: other}
models:
  standard: {train: &train {on: clean, arch: small_cnn, epochs: 20}}
  from_other: {train: {<<: *train, on: other, epochs: 30, lr: 0.02}}
evaluations:
  accuracy: {models: [standard, from_other], on: clean, split: test}
```

## What makes a node

| key | what it makes |
|---|---|
| `attack` | Adversarial images: targeted PGD (L2, L∞), optionally not transferring to given models \
(`not_transferring_to`); one universal perturbation per class; rotations and shifts. Controls: noise, leakage only, \
no change. |
| `invert` | The robust and non-robust datasets D_R and D_NR: images that match the originals in the features of a \
robust or a standard model, with their true labels. |
| `select` | The images with the largest or smallest margin, confidence or perturbation. |
| `train` | A network; with `adversarial`, by adversarial training; with `probe`, a linear layer on another model's \
features. |
| `load`, `pretrained` | Images from a source; a model trained elsewhere. |
| an evaluation | Clean accuracy, and robust accuracy under PGD with restarts, APGD, transfer attacks, rotations \
and shifts: worst case beside average case. `usefulness`: useful and robustly useful features. `leakage: rand`: \
every leakage control of `rand`. |

## Experiments that come with it

| experiment | content |
|---|---|
| `configs/digits.yaml` | The quick start, on digits. |
| `configs/digits-full.yaml` | Every kind of node, on digits. |
| `configs/digits-sweep.yaml`, `configs/cifar10-sweep.yaml` | Clean accuracy against attack steps and against ε. |
| `configs/digits-spatial.yaml` | Does spatial augmentation give robustness to rotations and shifts? |
| `configs/cifar10.yaml` | The paper's datasets on all of CIFAR-10 at its radius, with leakage controls, sized for \
two CPU cores. |
| `configs/cifar10-resnet18.yaml` | The same datasets with a ResNet-18 and the paper's 100 steps; minutes on one GPU. |
| `configs/cifar10-sources.yaml` | Which source model's perturbations does another network take for its target? |
| `configs/imagenette.yaml` | Photographs at 224 pixels, with a pretrained ImageNet network as the source model. |
| `configs/paper-cifar10.yaml`, `configs/paper-restricted-imagenet.yaml` | The paper's tables, with its parameters; \
for GPUs. |
| `configs/imagenet1k.yaml` | All thousand classes of ImageNet; for a GPU cluster. |

## References

`datasets`, `models` and `evaluations` are separate namespaces. The key determines the namespace of a reference:

| key | refers to |
|---|---|
| `images` of `attack`, `invert` and `select`; `on` of `train` and of an evaluation | a dataset |
| `model` and `not_transferring_to` of `attack`; `model` of `invert`; `probe` of `train`; `models` of an evaluation, \
`surrogate` of its attacks | a model |

The order in the file does not matter. The nodes form a graph: an unknown name or a cycle is refused before anything
runs. A name becomes a folder in the store: it consists of letters, digits, `_`, `.` and `-`, starts with a letter or
a digit, and has at most 64 characters, including suffixes from `leakage` (`.robust-source`). A suffix from a sweep
(`@steps=10,seed=0`) has at most 128.

## Splits

A dataset has one or more splits.

| source | splits |
|---|---|
| `sklearn-digits` | `train`, `test` (`test_share` of the images, drawn with `seed`) |
| `cifar10`, `cifar100`, `mnist`, `fashion-mnist` | `train`, `test`, as published |
| `image-folder` | the keys of `splits` |
| `webdataset` | the keys of `shards` |
| `parquet` | the keys of `files` |
| `synthetic` | the keys of `images` |

A dataset made by `attack` or `invert` has the splits listed in its `splits`, by default only `train`: the test images
stay clean. A dataset made by `select` has the splits of its input. `train` and evaluations use the split in `split`.

## Seeds and sweeps

A list in place of a single value creates one node per value, and one per value of every node made from it:

```yaml
name: sweep
seeds: [0, 1, 2]
datasets:
  clean: {load: {source: sklearn-digits}}
  other: {attack: {images: clean, model: standard, eps: 1.5, steps: [1, 10, 100]}, relabel: other}
models:
  standard: {train: &train {on: clean, arch: small_cnn}}
  from_other: {train: {<<: *train, on: other, lr: 0.02}}
evaluations:
  accuracy: {models: [standard, from_other], on: clean}
```

creates `other@steps=1,seed=0` and eight more, nine of `from_other`, three of `standard`, and one evaluation of all.

- `seeds`, at the top level or in one dataset or model, repeats every stochastic node with each seed, wherever `seed` is
  not given. A source is loaded and split only once, unless its own entry has `seeds`. Tables show mean and standard
  deviation over the seeds. Seeds without an effect are refused.
- A learner never shares its initial weights with the source model: with the same seed, the perturbations would transfer
  unusually well and inflate its accuracy. A model uses another random stream for each generation of models that its
  dataset was made from.
- An axis is named after its key (`steps`, `adversarial.eps`). Nodes with the same axis are paired along it, so its
  values must be the same; different axes form a grid.
- An evaluation includes every node that a name expands to. On a swept dataset, there is one evaluation per point. A
  list in `usefulness` creates one evaluation per value.

## Leakage

`leakage: NAME` in place of an evaluation expands to the leakage controls of an attacked dataset: it makes each control,
trains a learner on it in the same way as the dataset's own learner, and evaluates all of them. With
`controls: [leakage]`, only this one.

| model | trained on |
|---|---|
| `LEARNER` | the dataset: the main result |
| `LEARNER.probe` | the dataset, as a linear probe on the robust model's features (Goh 2019) |
| `LEARNER.leakage` | noise in place of the attack; unchanged images where the label is the true class or the source \
model's prediction |
| `LEARNER.robust-source` | the same attack with the robust model as the source model |
| `LEARNER.top`, `LEARNER.bottom` | the images with the largest margins, and the rest |

## Versions

A node's version is a digest of its stage and the stage's revision, of every parameter with defaults filled in, of the
label rule, and of the versions of its inputs. The node is stored at `<group>/<name>/<version>`. So:

- Writing out a default, or changing comments, order or layout, does not change the version.
- Changing a parameter changes the version of the node and of every node made from it. The old versions stay.
- Two experiments with the same name and recipe share a node. The same recipe under another name has the same version,
  and points at what is there.
- An evaluation's version also depends on the names of its models.

Not part of a version: `about`; `--store`, `--data`, `--engine`, `--workers`, `--gpu`, `--shard-timeout`,
`--address`; `root` and `download` of the
torchvision sources; `eval_images` of a training; those parameters of an attack that its method does not use.

A version identifies a request, not bytes. The contents of your files are not part of it: the images of a folder, the
shards of a `webdataset` source, a checkpoint, the code of your own `arch`. They are recorded beside the node instead:
if such a file changes, `notbugs plan` says so, and the node is made again
([operations](operations.md#changed-files)).

## Paths

- `root`, `shards`, `files` and `weights` are relative to `--data` (default: `data`). Absolute paths are allowed, and
  URLs (`s3://`, `gs://`, and, except for an image folder, which has to be listed, `https://`). A URL must not contain
  credentials; set them in the environment.
- `weights: package://PACKAGE/FILE` is a file inside an installed Python package, whose code is not run. `weights` may
  start with `~`. Files at `http`, `https`, `s3` and `gs` URLs are downloaded to a temporary file.
- Your own `arch` is searched for in the Python environment, then in the working directory; `./nets/own.py:net` is a
  file relative to the working directory ([arch](#arch)).
- Nothing is relative to the experiment file.

## Images

Images from an image folder, from WebDataset shards, from parquet files, and in `notbugs attack`:

- **Formats**: PNG, JPEG, WebP, GIF, BMP, PPM and uncompressed TIFF, detected by content, not by name. Other formats are
  not decoded.
- **Limits**: 89,478,485 pixels and 16,383 per side, checked in the header before decoding and again after `resize`;
  512 MiB per file; 8 GiB for the pixels of a shard with images of one size.
- **Pixels**: 8 bits per channel, grey or RGB. Palettes, CMYK and the like are converted. The alpha channel is dropped,
  as in torchvision. 16-bit grey and float images are refused; 16-bit colours are truncated to their upper 8 bits.
  Colour profiles are ignored.
- **Frames**: the first frame or page.
- **EXIF**: images are rotated upright according to their EXIF orientation, unlike in torchvision's ImageFolder.

An image that cannot be decoded or exceeds a limit is left out, up to a fraction `max_undecodable` of a shard.
`notbugs run` and `notbugs show` report how many and why, and `samples.parquet` has a row for each. Files that are not
images are counted by kind, also by `notbugs plan`.

**Kept files.** Without `resize` and `crop`, the original files are kept if all are named png, all jpg or all webp. A
file that is not 8-bit, grey or RGB, upright, opaque, of one frame and of the format in its name is re-encoded as png.
In a dataset of jpg or webp, where re-encoding is not lossless, it is left out. `keep_files: false` stores every image
as png and keeps all of these.

## YAML

One document, in UTF-8 (or UTF-16 with a byte-order mark), with the plain values of YAML 1.2:

- `on`, `off`, `yes` and `no` are strings: `on: clean` needs no quotes. Only `true` and `false` are booleans.
- `1e-3` is a number, and `010` is ten; `12:30` and `2020-01-01` are strings.
- Tags such as `!!int` are refused, and so are duplicate keys and keys that are neither strings nor integers.
- Avoid repetition with an anchor (`&train`), an alias (`*train`) and the merge key (`<<: *train`). A merge takes the
  keys of one mapping, or of a list of mappings, `<<: [*a, *b]`, in which the first has precedence; keys beside the
  merge override it. Nested mappings are not merged. An alias is a copy.
- Unknown keys are refused, and so are control characters and URLs with credentials in any string.
"""

LIMITS = """\
## Limits

A request beyond a limit is refused with an error before it costs time or memory.

| at most | of |
|---|---|
"""

SECTIONS: list[tuple[str, str, type[BaseModel]]] = [
    ("The file", "", spec.Experiment),
    (
        "about",
        "Each dataset's card (`README.md`, `croissant.json`) repeats it. After a change, run the experiment again, "
        "which makes nothing anew, then `notbugs card NAME`.",
        spec.About,
    ),
    ("datasets.NAME", "", spec.Dataset),
    ("datasets.NAME.load: sklearn-digits", "", recipes.Digits),
    ("datasets.NAME.load: torchvision", "", recipes.Torchvision),
    (
        "datasets.NAME.load: image-folder",
        "Reads the files of torchvision's ImageFolder in the same order: jpg, jpeg, png, ppm, bmp, pgm, tif, tiff or "
        "webp, in a class's folder or deeper, following links. Hidden files and folders, other files, pipes and "
        "circular links are skipped and counted, as are system files (`._*`, `.DS_Store`, `__MACOSX`, `Thumbs.db`, "
        "`.ipynb_checkpoints`). A class without images in a split is refused. In an object store "
        "(`root: s3://bucket/photos`), each split is listed once, 1,000 files per request. See [Images](#images). "
        "Images of different sizes can be stored, but not attacked or trained on: set `resize` and `crop`.",
        recipes.ImageFolder,
    ),
    (
        "datasets.NAME.load: webdataset",
        "Uncompressed tars at a path or a URL (`s3://`, `gs://`, `abfs://`, `hdfs://`, `https://`); a web server must "
        "answer range requests. A sample consists of "
        "consecutive files with the same key, which is the path up to the first dot of the file name. Its image is the "
        "file whose whole extension is png, jpg, jpeg or webp: `000.png`, not `000.seg.png`. Ambiguous samples are "
        "refused by name: two images, a duplicate file, a label that is no class. So are damaged tars, and tars "
        "without the zeros at the end, because they were truncated or never closed (if nothing else is missing, "
        "`head -c 1024 /dev/zero >> FILE` ends such a tar). Links, folders, devices, hidden files and system files "
        "(`._000.png`, `__MACOSX`, `Thumbs.db`) are skipped and counted. An image file has at most 512 MiB, a label's "
        "file 1 MiB; there are at most 100,000 classes. See [Images](#images). If all images are grey, so is the "
        "dataset, unless `channels` is set.",
        recipes.WebDataset,
    ),
    (
        "datasets.NAME.load: parquet",
        "Tables as Hugging Face's `datasets` writes them, or with the bytes of images in a plain column; `files: "
        "{train: https://huggingface.co/datasets/USER/SET/resolve/main/data/train-{00000..00003}-of-00004.parquet}` "
        "reads them from the Hub. All files must have the same columns and class names. Rows without a label, and "
        "labels that are no class, are refused; rows without an image are left out and counted. A shard takes rows "
        "from all files, and a row group is read whole even for one image of it: write large sets with about a hundred "
        "photographs per group, as Hugging Face does. More than 1 GiB in a group is refused. See [Images](#images). If "
        "all images are grey, so is the dataset, unless `channels` is set.",
        recipes.Parquet,
    ),
    ("datasets.NAME.load: synthetic", "", recipes.Synthetic),
    (
        "datasets.NAME.attack",
        "A targeted attack: minimise cross-entropy to the target class, starting at the image itself, and keep the "
        "last iterate, rounded to 8 bits inside the ball. An attack that cannot change a pixel by half an 8-bit level, "
        "or whose ball exceeds the image space, is refused before anything runs. A dataset in which less than half of "
        "the images with another target have changed is not published: under its new labels it would be the control.",
        recipes.Attack,
    ),
    (
        "datasets.NAME.relabel",
        "`relabel: random` is short for `relabel: {rule: random}`.",
        recipes.Relabel,
    ),
    ("datasets.NAME.attack.spatial", "Also one of the entries of `evaluations.NAME.spatial`.", recipes.Spatial),
    (
        "datasets.NAME.invert",
        "The search is bounded by [0, 1] only, not by a ball; its last iterate is rounded to 8 bits.",
        recipes.Invert,
    ),
    ("datasets.NAME.select", "", recipes.Select),
    ("models.NAME", "", spec.Model),
    ("models.NAME.train", "", recipes.Train),
    ("models.NAME.train.adversarial", "", recipes.Adversary),
    (
        "models.NAME.pretrained",
        "torch.save and safetensors files are detected by content, not by name, and no code in them is run. The "
        "weights may have any key and prefix (`model`, `module.`, `_orig_mod.`) and may lie beside an optimizer, "
        "arguments or a copy of themselves; a pickled network is read like its state dict. If a file holds several "
        "different weights, `key` selects. The weights must match the network's exactly, except for batch counters, "
        "which PyTorch before 0.4.1 did not save. Floats are converted to the network's dtype, usually float32; "
        "quantised, sparse, NaN or infinite weights are refused. `mean` and `std` default to those of torchvision's "
        "weights, or to those stored beside the weights by a normalisation layer (`normalizer.new_mean`, "
        "`normalizer.new_std`), against which given values are checked; else to 0 and 1: no normalisation. A file has "
        "at most 16 GiB.",
        recipes.Pretrained,
    ),
    (
        "evaluations.NAME",
        "Each model is attacked itself, unless the attack names a `surrogate`. Under attack, an image counts as "
        "correct if the model still predicts its label.",
        recipes.Evaluate,
    ),
    ("evaluations.NAME.attacks", "A list of mappings with these keys.", recipes.EvalAttack),
    ("evaluations.NAME.usefulness", "", recipes.Usefulness),
    ("evaluations.NAME: leakage", "See [above](#leakage).", controls.Leakage),
]

NETWORKS = """\
### arch

| arch | network | parameters, million | multiply–adds per image, million |
|---|---|---|---|
{small}
| torchvision's, such as `resnet18` | Any classifier of `torchvision.models`; grey is repeated to three channels. | | |
| `package.module:name` | Your own: a class or function that returns a `torch.nn.Module`, in an installed module or \
one in the working directory. | | |
| `./nets/own.py:net` | The same in a file, relative to the working directory. | | |

Both counts are for ten classes and three channels, the multiply–adds for an image of 32 pixels and one forward pass; a
step of an attack takes about twice as many, a step of training three times. [Results](results.md) has accuracies.

Installed modules take precedence: your `random.py` or `stages/` never replaces Python's or notbugs' own, here, in
workers or in jobs. If an installed module hides yours, the error says so; give the path of the file instead. A file may
import its neighbours, by name and as `from .blocks import …`. Before anything is made, the network is built and run
once in a process of its own, for at most two minutes.

Your function is called with the number of classes, as its parameter `classes` or `num_classes` if it has one, else as
its first argument, and with the number of channels if it has a parameter `channels` or `in_channels`. The module maps
a batch of normalised images, N × channels × H × W, to N × classes logits. In evaluation mode, samples in a batch must
not depend on each other.
"""

OUTRO = """\
## Errors

A wrong file gets one sentence and exit code 2, and nothing is made. The message starts with the path of the key.

| in the file | the message |
|---|---|
"""

CLEAN = "datasets: {clean: {load: {source: sklearn-digits}}"
MODEL = "models: {m: {train: {on: clean, arch: small_cnn}}"

WRONG: list[tuple[str, str]] = [
    ("`attack: {…, stepsize: 1}`", "rand: {attack: {images: clean, model: m, stepsize: 1}, relabel: random}"),
    ("`attack: {…, eps: -1}`", "rand: {attack: {images: clean, model: m, eps: -1}, relabel: random}"),
    (
        "`attack: {…, norm: linf, eps: 8}`",
        "rand: {attack: {images: clean, model: m, norm: linf, eps: 8}, relabel: next}",
    ),
    ("`attack: {…, eps: 128}`", "rand: {attack: {images: clean, model: m, eps: 128}, relabel: next}"),
    (
        "`attack: {…, norm: linf, eps: 0.03, step_size: 0.0001, steps: 7}`",
        "rand: {attack: {images: clean, model: m, norm: linf, eps: 0.03, step_size: 0.0001, steps: 7}, relabel: next}",
    ),
    (
        "`attack: {…, batch_size: 10000}`",
        "rand: {attack: {images: clean, model: m, batch_size: 10000}, relabel: next}",
    ),
    ("`attack: {…, steps: many}`", "rand: {attack: {images: clean, model: m, steps: many}, relabel: random}"),
    ("`attack` without `relabel`", "rand: {attack: {images: clean, model: m}}"),
    ("`load: {source: cifar-10}`", "c: {load: {source: cifar-10}}"),
    ("`attack: {images: claen, …}`", "rand: {attack: {images: claen, model: m}, relabel: random}"),
    ("`attack: {…, model: late}`, where `late` is trained on `rand`", "LATE"),
    ("`attack: {…, splits: [val]}`", "rand: {attack: {images: clean, model: m, splits: [val]}, relabel: random}"),
    (
        "`relabel: {rule: map, map: {cat: dog}}`",
        "rand: {attack: {images: clean, model: m}, relabel: {rule: map, map: {cat: dog}}}",
    ),
    ("`attack: {…, method: leak}`", "rand: {attack: {images: clean, method: leak}, relabel: random}"),
    ("`invert: {…, layer: fc}`", "d_r: {invert: {images: clean, model: m, layer: fc}}"),
    ("`train: {on: clean, arch: mynets:net}`", "OWN"),
]
"""What is shown, and the dataset that is asked for beside `clean` and `m`."""

BASES = {int: "integer", float: "number", str: "text", bool: "`true` or `false`", NoneType: "`null`", Any: "anything"}
LINKS = {model: title for title, _, model in SECTIONS}


def document() -> str:
    """The whole page."""
    parts = [INTRO, LIMITS + "\n".join(_limits()) + "\n", "## Every key\n"]
    for title, text, model in SECTIONS:
        said = " ".join(line.strip() for line in (model.__doc__ or "").replace("``", "`").strip().splitlines())
        parts.append("\n".join(filter(None, [f"### {title}\n", f"{said} {text}".strip() + "\n", _table(model)])))
    parts.append(NETWORKS.format(small="\n".join(_networks())))
    lines = [f"| {shown} | {_cell(_message(asked))} |" for shown, asked in WRONG]
    return "\n".join([*parts, OUTRO + "\n".join(lines) + "\n"])


def _networks() -> Iterator[str]:
    """A row for each network of ours, counted without memory for its weights."""
    for name, make in nets.OURS.items():
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            network = make(10, 3).eval()
            network(torch.empty(1, 3, 32, 32))
        about = (make.__doc__ or "").splitlines()[0]
        millions = sum(p.numel() for p in network.parameters()) / 1e6, counter.get_total_flops() / 2e6
        counts = (f"{round(count):,}" if count >= 100 else f"{count:.3g}" for count in millions)
        yield f"| `{name}` | {about} | {' | '.join(counts)} |"


def _limits() -> Iterator[str]:
    """A row for each constant of `stages/limits.py`, from the text below it."""
    lines = ast.parse(Path(limits.__file__).read_text(encoding="utf-8")).body
    for name, text in itertools.pairwise(lines):
        match name, text:
            case ast.Assign(targets=[ast.Name(id=constant)]), ast.Expr(value=ast.Constant(value=str(words))):
                value = getattr(limits, constant)
                yield f"| {'2⁶³' if value == 2**63 else format(value, ',')} | {' '.join(words.split())} |"


def _table(model: type[BaseModel]) -> str:
    lines = ["| key | type or choices | default | meaning |", "|---|---|---|---|"]
    for name, field in sorted(model.model_fields.items(), key=lambda item: not item[1].is_required()):
        meaning = field.description or "Which source this is."
        kind = _type(field.annotation, field.metadata)
        lines.append(f"| `{name}` | {_cell(kind)} | {_default(field)} | {_cell(meaning)} |")
    if model in (spec.Experiment, spec.Dataset, spec.Model):  # written out before the models read the file
        lines.append(f"| `{sweeps.SEEDS}` | list of integer (≥ 0) | none | {schema.SEEDS['description']} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    if isinstance(field.default, BaseModel):
        return "its defaults"
    return f"`{json.dumps(field.default)}`"


def _type(kind: Any, metadata: Any = ()) -> str:
    """An annotation in words."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        own = [m for part in inner[1:] for m in (part.metadata if isinstance(part, FieldInfo) else [part])]
        return _type(inner[0], [*own, *metadata])
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in inner)
    if origin in (Union, UnionType):
        if all("source" in getattr(k, "model_fields", {}) for k in inner):
            return "a source, one of " + ", ".join(f"[`{k}`](#{_anchor(LINKS[m])})" for k, m in recipes.SOURCES.items())
        if spec.Measurement in [get_args(k)[0] if get_origin(k) is Annotated else k for k in inner]:
            return f"[an evaluation](#{_anchor(LINKS[recipes.Evaluate])})"
        said = " or ".join(_type(k, metadata) for k in inner if k is not NoneType)
        return f"{said}, or `null`" if NoneType in inner else said
    if origin is list:
        return f"list of {_type(inner[0])}{_bounds(metadata, 'entries')}"
    if origin is dict:
        return f"map: {_type(inner[0])} → {_type(inner[1])}{_bounds(metadata, 'entries')}"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return f"[`{LINKS[kind]}`](#{_anchor(LINKS[kind])})"
    return BASES[kind] + _bounds(metadata, "characters")


def _anchor(title: str) -> str:
    """As GitHub makes it."""
    return "".join(c for c in title.lower().replace(" ", "-") if c.isalnum() or c in "-_")


def _bounds(metadata: Any, what: str) -> str:
    """Limits in words; patterns are told in the text."""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    said = []
    for limit in metadata:
        for name, sign in signs.items():
            if (value := getattr(limit, name, None)) is not None:
                said.append(f"{sign} {'2⁶³' if value == 2**63 else value}")
        least, most = getattr(limit, "min_length", None), getattr(limit, "max_length", None)
        if least:
            said.append(f"at least {least} {what if least > 1 else what.replace('ies', 'y').removesuffix('s')}")
        if most:
            said.append(f"at most {most} {what}")
    if len(said) == 2 and said[0].split()[2:] == said[1].split()[2:] and said[0].startswith("at least"):
        said = [f"exactly {' '.join(said[0].split()[2:])}"]
    return f" ({', '.join(said)})" if said else ""


def _message(asked: str) -> str:
    """What a wrong file is told, found by asking."""
    models = MODEL
    if asked == "LATE":
        asked, models = "rand: {attack: {images: clean, model: late}, relabel: next}", MODEL.replace("m:", "late:", 1)
        models = models.replace("on: clean", "on: rand")
    elif asked == "OWN":
        asked, models = "also: {load: {source: sklearn-digits}}", MODEL.replace("small_cnn", "mynets:net")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "wrong.yaml"
        file.write_text(f"name: wrong\n{CLEAN}, {asked}}}\n{models}}}\n", encoding="utf-8")
        try:
            preflight(build(spec.read(file)), Context(Store(f"{folder}/store"), file.parent, file.parent))
        except BadInput as error:
            return str(error)
    raise AssertionError(f"nothing is wrong with {asked}")


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        HERE.write_text(document(), encoding="utf-8")
    else:
        sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
        sys.stdout.write(document())
