"""Write docs/experiment-file.md: every key of the experiment file, from the models that read it.

    python docs/make_experiment_file.py            print the document
    python docs/make_experiment_file.py --write    write it beside this file

The tables come from the pydantic models, the error messages from asking for what is wrong; only the
text between them is written here.
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

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from pipeline.experiment import controls, spec
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

An experiment file names datasets, models and evaluations, and says how each is made from the others.
It is YAML. `notbugs plan FILE` checks it and prints the graph; `notbugs run FILE` makes what is missing.

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

## How names refer

`datasets`, `models` and `evaluations` are three groups of names. The key decides which group is meant:

| key | names |
|---|---|
| `images` of `attack`, `invert` and `select`; `on` of `train` and of an evaluation | a dataset |
| `model` and `not_transferring_to` of `attack`; `model` of `invert`; `probe` of `train`; `models` of an evaluation, \
`surrogate` of its attacks | a model |

The order in the file does not matter. What is made is a graph: a name that is not there, or a circle, is
refused before anything runs. A name becomes a folder of the store, so it holds letters, digits, `_`, `.`
and `-`, begins with a letter or a digit and has at most 64 characters, with what `leakage` adds to it
(`.robust-source`); what a sweep adds (`@steps=10,seed=0`) has at most 128.

## Splits

A dataset has one or more splits.

| source | splits |
|---|---|
| `sklearn-digits` | `train`, `test` (`test_share` of the images, drawn with `seed`) |
| `cifar10`, `cifar100`, `mnist`, `fashion-mnist` | `train`, `test`, as published |
| `image-folder` | the keys of `splits` |
| `webdataset` | the keys of `shards` |
| `synthetic` | the keys of `images` |

A dataset made by `attack` or `invert` has the splits that its `splits` lists, by default only `train`: the test
images stay clean. One made by `select` has those of its images. `train` and the evaluations choose one with `split`.

## Seeds and sweeps

A list where a key takes one value makes a node for each value, and again of all that is made from it:

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

makes `other@steps=1,seed=0` and eight more, as many of `from_other`, three of `standard`, and one evaluation of all.

- `seeds`, of the whole file or of one dataset or model, repeats what chance has a part in, each with its seed in
  every `seed` that is not given; how a source is loaded and split does not change with it, unless its own entry asks
  for `seeds`. The tables give mean and standard deviation over the seeds. Seeds that would repeat nothing are refused.
- A learner never begins with the weights that the attacked model began with: of one seed, a model draws other numbers
  for each model that stands behind its dataset, one made from the other. (It would learn more from the set than any
  other network does.)
- An axis has the name of its key (`steps`, `adversarial.eps`). Nodes that meet with the same axis are paired along it,
  so its values must be the same; with different axes they make a grid.
- An evaluation takes every node that a name stands for; on a swept dataset, there is one for each of its points.
  A list in `usefulness` makes one evaluation for each value.

## Leakage

`leakage: NAME` in place of an evaluation stands for the controls of an attacked dataset: it makes each of them, a
learner for each, trained as the dataset's own learner is, and the evaluation of all beside the headline accuracy.

| model | what it learns from |
|---|---|
| `LEARNER` | the dataset: the headline |
| `LEARNER.probe` | the dataset, seen through the robust model's features alone (a linear probe; Goh 2019) |
| `LEARNER.leakage` | noise in place of the attack, and untouched images where the label fits them already: where it \
is the true class, or the attacked model's answer |
| `LEARNER.robust-source` | the attack made on the robust model |
| `LEARNER.top`, `LEARNER.bottom` | the images with the largest margins toward their targets, and the others |

## Versions

Each node has a version: the digest of its stage and the stage's revision, of every parameter with
defaults filled in, of the label rule, and of the versions of its inputs. In the store it stands at
`<group>/<name>/<version>`. So:

- Writing out a default, changing comments, order or layout gives the same version.
- Changing a parameter gives another version of the node and of all that is made from it. The old one stays.
- Two experiments that use the same name and the same recipe share what is made. The name is a folder: the
  same recipe under another name has the same version and is made again.
- An evaluation's version also holds the names of the models that it scores.

Not part of a version: `--store`, `--data`, `--engine`, `--workers`, `--gpu`, `--shard-timeout`,
`--address`; `root` and `download` of the
torchvision sources; `eval_images` of a training; those parameters of an attack that its method does not use.

A version names a request, not bytes. **Files of yours are named in it, not read into it**: the images of a
folder, the shards of a `webdataset` source, a checkpoint, the code of an `arch` of your own. If you change
such a file, give it another name (or a checkpoint its new `sha256`), or the node that was made from the old one
counts as there.

## Paths

- `root`, `shards` and `weights` are relative to the folder given by `--data` (default: `data`). Absolute paths
  and, for `shards` and `weights`, URLs are taken as they are. A URL must not hold credentials; put them in the
  environment.
- `weights: package://PACKAGE/FILE` is a file inside an installed Python package, none of whose code is run. `weights`
  may begin with `~`. What lies at an `http`, `https`, `s3` or `gs` URL is fetched into a temporary file.
- An `arch` of your own is looked for in the Python environment, then in the folder where the command runs;
  `./nets/own.py:net` is a file, relative to that folder ([arch](#arch)).
- Nothing is relative to the experiment file.

## Images

What is decoded from an image folder, from the shards of others, and by `notbugs attack`:

- **Formats**: PNG, JPEG, WebP, GIF, BMP, PPM, and TIFF without compression, told by their content, whatever their
  names. No other is tried.
- **Limits**: 89,478,485 pixels and 16,383 along a side, by the file's header and before it is decoded, and as many
  after `resize`; 512 MiB for a file; 8 GiB for the pixels of a shard, where its images have one size.
- **Pixels**: 8 bits per channel, grey or RGB. Palettes, CMYK and the like are converted, transparency is dropped:
  what lies under it shows, as with torchvision. 16-bit grey and float images are refused; of 16-bit colours the upper
  8 bits are taken. Colour profiles are passed over.
- **Frames**: of an animation, or a file of several pages, the first.
- **EXIF**: an image is turned as its orientation says, as people see it. torchvision's ImageFolder leaves it as it
  stands on the sensor.

An image that does not decode, or breaks a limit, is left out, up to the share `max_undecodable` of a shard; how many
were left out, and why, `notbugs run` and `notbugs show` tell, and `samples.parquet` has a row for each. What is no
image at all is counted by kind in the same places, and by `notbugs plan`.

**Kept files.** Without `resize` and `crop`, files that are all png, all jpg or all webp by their names are stored as
they are. One that is not 8 bits, grey or RGB, upright, opaque, of one frame and of the format that its name says is
encoded anew, as png; in a dataset of jpg or webp, where that is not possible without loss, it is left out.
`keep_files: false` stores every image as png, and leaves none of these out.

## YAML as it is read

One document, in UTF-8 (or UTF-16 with its byte-order mark), of plain values as in YAML 1.2:

- `on`, `off`, `yes` and `no` are words: `on: clean` needs no quotes. Only `true` and `false` are booleans.
- `1e-3` is a number, and `010` is ten; `12:30` and `2020-01-01` are text.
- Tags such as `!!int` have no meaning and are refused; so is a key given twice, and one that is neither text nor a
  whole number.
- Repetition is avoided with an anchor (`&train`), an alias (`*train`) and the merge key (`<<: *train`). A merge
  takes the keys of one mapping, or of a list of them, `<<: [*a, *b]`, of which the first that has a key wins; keys
  written beside it win over all. It does not reach into nested mappings. An alias is a copy.
- Unknown keys are refused, and a text that no key takes wherever it stands: control characters, URLs with credentials.
"""

LIMITS = """\
## Limits

What is over one of these is refused in a sentence, before it takes time or memory.

| at most | of what |
|---|---|
"""

SECTIONS: list[tuple[str, str, type[BaseModel]]] = [
    ("The file", "", spec.Experiment),
    ("datasets.NAME", "", spec.Dataset),
    ("datasets.NAME.load: sklearn-digits", "", recipes.Digits),
    ("datasets.NAME.load: torchvision", "", recipes.Torchvision),
    (
        "datasets.NAME.load: image-folder",
        "Read is what torchvision's ImageFolder reads, in its order: files named jpg, jpeg, png, ppm, bmp, pgm, tif, "
        "tiff or webp, in a class's folder or deeper, links followed. Hidden files and folders, other files, pipes and "
        "circles of links are passed over and counted; so is what systems leave behind (`._*`, `.DS_Store`, "
        "`__MACOSX`, `Thumbs.db`, `.ipynb_checkpoints`). A class without an image in some split is refused. "
        "See [Images](#images). Images of differing sizes can be stored, but not attacked or trained on: give `resize` "
        "and `crop`.",
        recipes.ImageFolder,
    ),
    (
        "datasets.NAME.load: webdataset",
        "Tars that are not compressed, at a path or at a URL (`s3://`, `gs://`, `abfs://`, `hdfs://`). A sample is"
        " the files that stand one behind the other under one key, the path up to the first dot of the name. Its "
        "image is the file whose whole extension is png, jpg, jpeg or webp: `000.png`, not `000.seg.png`. What can"
        " be read in two ways is refused by the name of its sample: two images, a file twice, a label that is no "
        "class. So is a tar that is damaged, or that lacks the zeros at its end because it was cut or never closed"
        " (if nothing is missing otherwise, `head -c 1024 /dev/zero >> FILE` ends it). Links, folders, devices, "
        "hidden files and files of the system (`._000.png`, `__MACOSX`, `Thumbs.db`) are passed over and counted. "
        "An image's file has at most 512 MiB, a label's 1 MiB; there are at most 100,000 classes. "
        "See [Images](#images). If all images are grey, the dataset is; `channels` decides otherwise.",
        recipes.WebDataset,
    ),
    ("datasets.NAME.load: synthetic", "", recipes.Synthetic),
    (
        "datasets.NAME.attack",
        "A targeted attack: cross-entropy to the target class is minimised, starting at the image itself; the last "
        "iterate is kept, rounded to 8 bits inside the ball. What cannot move a pixel by half a level of 8 bits, or "
        "has no room in the images, is refused before anything runs; a set in which fewer than half of the images with "
        "a way to go have changed is not published: under its new labels it would be the control.",
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
        "No ball: the search goes wherever the features are alike, inside [0, 1]; its end is rounded to 8 bits.",
        recipes.Invert,
    ),
    ("datasets.NAME.select", "", recipes.Select),
    ("models.NAME", "", spec.Model),
    ("models.NAME.train", "", recipes.Train),
    ("models.NAME.train.adversarial", "", recipes.Adversary),
    (
        "models.NAME.pretrained",
        "What torch.save or safetensors wrote is told by its content, whatever it is called, and nothing in it is "
        "run. The weights may lie under any key and behind any prefix (`model`, `module.`, `_orig_mod.`), beside an "
        "optimizer, arguments or a copy of themselves; a whole network that was saved is read like its state dict. "
        "Where several differ, `key` chooses. They must be all of the network's, and no others: what PyTorch before "
        "0.4.1 did not count may be missing. Floats become the network's own, as a rule float32; what is quantised, "
        "sparse, NaN or infinite is refused. `mean` and `std` default to those that torchvision's weights were "
        "trained with, or that lie beside the weights as a layer's (`normalizer.new_mean`, `normalizer.new_std`), "
        "against which they are checked if given; else to 0 and 1: no normalisation. A file has at most 16 GiB.",
        recipes.Pretrained,
    ),
    (
        "evaluations.NAME",
        "Each model is attacked on its own, unless the attack names a `surrogate`; under an attack an image counts as "
        "right if the model still answers its "
        "label.",
        recipes.Evaluate,
    ),
    ("evaluations.NAME.attacks", "A list of mappings with these keys.", recipes.EvalAttack),
    ("evaluations.NAME.usefulness", "", recipes.Usefulness),
    ("evaluations.NAME: leakage", "See [above](#leakage).", controls.Leakage),
]

NETWORKS = """\
### arch

| arch | network |
|---|---|
{small}
| torchvision's, such as `resnet18` | Any classifier of `torchvision.models`; grey is repeated to three channels. |
| `package.module:name` | Your own: a class or function that gives a `torch.nn.Module`, of a module that is installed, \
or that lies in the folder where the command runs. |
| `./nets/own.py:net` | The same, of a file: its path is relative to the folder where the command runs. |

What is installed comes first: a `random.py` or a `stages/` of yours is not taken for Python's or for notbugs' own,
here, in workers or in jobs. Where such a name hides the module that is meant, a sentence says so; the path of its
file avoids the question. A file may import what lies beside it, by name and as `from .blocks import …`. Before
anything is made, the network is built and tried once in a process of its own, for at most two minutes.

Your own is called with the number of classes, as its parameter `classes` or `num_classes` if it has one, else as
its first argument, and with the number of channels if it has a parameter `channels` or `in_channels`. The
module gets a batch of images, N × channels × H × W, mean subtracted and divided by the deviation, and gives N ×
classes logits. Samples of a batch must not depend on each other in evaluation mode.
"""

OUTRO = """\
## What a wrong file says

One sentence, exit code 2, and nothing of the experiment is made. The place is a path into the file.

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
    small = "\n".join(f"| `{name}` | {(make.__doc__ or '').splitlines()[0]} |" for name, make in nets.OURS.items())
    parts.append(NETWORKS.format(small=small))
    lines = [f"| {shown} | {_cell(_message(asked))} |" for shown, asked in WRONG]
    return "\n".join([*parts, OUTRO + "\n".join(lines) + "\n"])


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
            said.append(f"at least {least} {what if least > 1 else what.replace('ies', 'y')}")
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
