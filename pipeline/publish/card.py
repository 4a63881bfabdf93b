"""The card of a dataset: ``README.md`` for the Hugging Face Hub, ``croissant.json``, and a picture of samples.

They lie beside the manifest, are part of no digest, and can be made again at any time.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml

from pipeline.catalog.words import in_words, recipe_file
from pipeline.experiment.spec import About
from pipeline.publish import croissant
from pipeline.publish import pictures as sheets
from pipeline.publish.pictures import Pictures
from pipeline.report import results
from pipeline.report.scores import SUCCESS_RATE, percent, result_columns
from pipeline.report.scores import results as grouped
from pipeline.run import artifacts, runs
from pipeline.run.artifacts import Artifact
from pipeline.store import Store
from pipeline.terminal import size, visible
from stages.errors import BadInput
from stages.shard import COLUMNS

NAME = "README.md"

TEMPLATE = Path(__file__).with_name("card.md")

LICENSES = {
    *("afl-3.0", "apache-2.0", "bsd", "bsd-2-clause", "bsd-3-clause", "c-uda", "cc", "cc0-1.0", "cc-by-2.0"),
    *("cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0"),
    *("cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0"),
    *("cc-by-nc-sa-4.0", "cdla-sharing-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "etalab-2.0", "gfdl"),
    *("gpl-3.0", "mit", "odc-by", "odbl", "pddl", "unlicense", "unknown"),
}
"""The Hub's identifiers of licences for data: https://huggingface.co/docs/hub/repositories-licenses."""

SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M", 10_000_000: "1M<n<10M"}
"""Samples, at most → the Hub's size category."""

FIGURES = {
    "success_rate": (SUCCESS_RATE, percent),
    "l2_mean": ("mean L2 distance to the original", "{:.4g}".format),
    "linf_max": ("largest L∞ distance to the original", "{:.4g}".format),
    "distance_mean": ("mean distance to the features of the original", "{:.4g}".format),
}
"""Key of the manifest → what it is, and its form."""

FEATURES = {"string": "string", "int64": "int64", "bool": "bool"}
"""Arrow's name of a type → that of `datasets`; any other is float64, as JSON has it."""


@dataclass(frozen=True)
class Layout:
    """The files that a card describes.

    Attributes:
        path: glob of a split's files.
        tags: what they are.
        image, label: columns as `datasets` names them; the image's is that of the members if empty.
        text: a sentence about the files.
    """

    path: str
    tags: Sequence[str]
    image: str
    label: str
    text: str


SHARDS = Layout(
    "{split}-*.tar",
    ("webdataset", "croissant"),
    "",
    "cls",
    "The shards are WebDataset tars, `{split}-000000.tar` and on; a sample has the members {members}. "
    "`samples.parquet` has a row per sample, `manifest.json` every file with its sha256.",
)

PARQUET = Layout(
    "data/{split}-*.parquet",
    ("parquet",),
    "image",
    "label",
    "`data/` has Parquet files with the image files and the columns of `samples.parquet`.",
)


def write(store: Store, made: Artifact, about: About, rows: Sequence[Mapping[str, Any]] = ()) -> list[str]:
    """Write the card of a dataset.

    Args:
        store: the store.
        made: the dataset.
        about: what the experiment says of the images.
        rows: results of models, as from `results.result_rows`; those trained on the dataset, or on one of its
            controls, are listed.

    Returns:
        The paths of its files in the store. There is no picture where no sample could be read.

    Raises:
        BadData: the recipe is damaged.
    """
    recipe = recipe_file(store, made)
    shown = sheets.pictures(store, made)
    text = f"{_sentence(in_words(made.manifest, recipe))} {_warning(recipe)}".strip()
    document = croissant.describe(made.manifest, recipe, about, text)
    files = {
        **({sheets.NAME: shown.picture} if shown else {}),
        croissant.NAME: json.dumps(document, indent=1, ensure_ascii=False).encode() + b"\n",
        NAME: render(made, recipe, about, shown, rows).encode(),
    }
    for name, content in files.items():
        store.put(f"{made.folder}/{name}", content)
    return [f"{made.folder}/{name}" for name in files]


def write_again(store: Store, made: Artifact) -> list[str]:
    """Write a card with what the newest run that names the dataset says of it; returns the paths of its files.

    Raises:
        BadData: the recipe of the dataset, or a result of the run, is damaged.
    """
    return write(store, made, *told_of(store, made))


def told_of(store: Store, made: Artifact) -> tuple[About, Sequence[Mapping[str, Any]]]:
    """What the newest run that names a dataset says of its images, and the run's results.

    Raises:
        BadData: a result of the run is damaged.
    """
    node, _, version = made.folder.rpartition("/")
    for run in filter(None, (runs.find(store, name) for name in runs.names(store))):
        if run["nodes"].get(node, {}).get("version") == version:
            return about(run), results.result_rows(store, run)
    return About(), ()


def write_all(store: Store, run: Mapping[str, Any]) -> None:
    """Write the cards of the datasets that models of a run were trained on again, with its results, if those are new.

    Raises:
        BadData: a recipe or a result is damaged.
    """
    states = {node: progress["state"] for node, progress in run["nodes"].items()}
    if "done" not in {state for node, state in states.items() if not node.startswith("models/")}:
        return
    rows = results.result_rows(store, run)
    for node, state in states.items():
        name = node.removeprefix("datasets/")
        if name != node and state in ("done", "cached") and any(_is_of(row["trained_on"], name) for row in rows):
            folder = f"{node}/{run['nodes'][node]['version']}"
            made = artifacts.artifact_at(store, folder)
            if made is not None and made.folder == folder:  # else the card lies with the files, under another name
                write(store, made, about(run), rows)


def about(run: Mapping[str, Any]) -> About:
    """What the experiment of a run says of its images."""
    try:
        return About.model_validate(run["experiment"].get("about", {}))
    except ValueError as error:
        raise BadInput(f"`about` of run {run['run']} is not one of this program: {error}") from error


def render(
    made: Artifact,
    recipe: Mapping[str, Any],
    about: About,
    shown: Pictures | None,
    rows: Sequence[Mapping[str, Any]] = (),
    layout: Layout | None = None,
) -> str:
    """``README.md``: YAML for the Hub, then Markdown for people. The arguments are those of `write`, and the files."""
    layout = layout or SHARDS
    manifest, controls = made.manifest, _controls(made.manifest["name"], rows)
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["cell"] = _cell
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=manifest["name"],
        version=manifest["version"],
        content=manifest["content"],
        how=_sentence(in_words(manifest, recipe)),
        mislabelled=_warning(recipe),
        about=about,
        facts=_facts(manifest),
        pictures=shown,
        picture=sheets.NAME,
        pictures_text=_caption(shown) if shown else "",
        figures=[(what, form(manifest[key])) for key, (what, form) in FIGURES.items() if key in manifest],
        controlled=recipe["stage"] == "attack",
        controls=controls,
        controls_text=_about_controls(manifest["name"], controls["measured"]),
        loading=_loading(manifest, layout),
        parents=list(manifest["parents"].items()),
        recipe=json.dumps({k: v for k, v in recipe.items() if k in ("stage", "parameters", "relabel")}),
        citation=croissant.CITATION,
    )
    return f"---\n{_metadata(manifest, about, shown, layout)}---\n" + "\n".join(map(visible, text.split("\n"))) + "\n"


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


def _cell(text: Any) -> str:
    """Text in a cell of a table."""
    return str(text).replace("|", "\\|").replace("\n", " ")


def _warning(recipe: Mapping[str, Any]) -> str:
    if recipe["stage"] == "attack":
        return "The label of an image is the class it was perturbed toward, not the class that it shows."
    if recipe["stage"] == "select":
        return "The images come from an attack: their labels are the classes that they were perturbed toward."
    return ""


def _facts(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    shape = manifest["image_shape"]
    return [
        ("samples", ", ".join(f"{split}: {count:,}" for split, count in manifest["counts"].items())),
        ("images", "×".join(map(str, shape)) + " (channels, height, width)" if shape else "of different sizes"),
        ("classes", f"{len(manifest['classes']):,}"),
        ("left out", f"{manifest['failures']:,}"),
        ("size", f"{size(sum(file['bytes'] for file in manifest['files']))} in {len(manifest['shards']):,} shards"),
        ("version", f"`{manifest['version']}`"),
        ("made", f"{manifest['made']}, with notbugs {manifest['environment'].get('notbugs', '')}"),
    ]


def _caption(shown: Pictures) -> str:
    if len(shown.rows) == 2:
        return f"Above, the original images; below, the saved ones. First samples of each class in `{shown.shard}`."
    return f"First samples of each class in `{shown.shard}`, not chosen by hand."


def _controls(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Scores of the models trained on a dataset and on its controls."""
    mine = [row for row in rows if row["kind"] == "accuracy" and _is_of(row["trained_on"], name)]
    columns = result_columns(grouped(mine)) if mine else {}
    measured = any(row["trained_on"] != name for row in mine)
    return {"head": list(columns), "lines": list(zip(*columns.values(), strict=True)), "measured": measured}


def _is_of(trained_on: str | None, name: str) -> bool:
    return trained_on is not None and (trained_on == name or trained_on.startswith(f"{name}."))


def _about_controls(name: str, measured: bool) -> str:
    if not measured:
        return (
            "No control was measured. A learner may profit from labels that stayed right, or from images that the "
            f"source model misclassified anyway; `leakage: {name}` in the experiment file makes the controls that tell."
        )
    return (
        f"Accuracy of the models trained on this dataset and on its controls (`{name}.leakage`, `{name}.top`, …). What "
        "a control reaches without the attack is not due to the attack."
    )


def _loading(manifest: Mapping[str, Any], layout: Layout) -> str:
    image, label = layout.image or manifest["members"][0], layout.label
    split = "train" if "train" in manifest["counts"] else min(manifest["counts"])
    members = ", ".join(f"`.{member}`" for member in manifest["members"])
    return (
        "With the Hugging Face library, from a clone of this folder or from the Hub:\n\n"
        "```python\nfrom datasets import load_dataset\n\n"
        f'dataset = load_dataset("PATH", split="{split}")\n'
        f'print(dataset[0]["{image}"], dataset.features["{label}"].int2str(dataset[0]["{label}"]))\n```\n\n'
        f"{layout.text.format(split=split, members=members)}"
    )


# --------------------------------------------------------------------------------- the Hub's metadata


def _metadata(manifest: Mapping[str, Any], about: About, shown: Pictures | None, layout: Layout) -> str:
    info = _dataset_info(manifest, shown) if layout is SHARDS else None
    said = {
        "pretty_name": manifest["name"],
        **_license(about),
        "task_categories": ["image-classification"],
        "size_categories": [_size_category(sum(manifest["counts"].values()))],
        "tags": ["adversarial-examples", "robustness", *layout.tags],
        "configs": [
            {
                "config_name": "default",
                "data_files": [
                    {"split": split, "path": layout.path.format(split=split)} for split in manifest["counts"]
                ],
            }
        ],
        **({"dataset_info": info} if info else {}),
    }
    return yaml.safe_dump(said, sort_keys=False, allow_unicode=True, width=120)


def _license(about: About) -> dict[str, str]:
    said = about.license or "unknown"
    if said.lower() in LICENSES:
        return {"license": said.lower()}
    named = {"license": "other", "license_name": said}
    return {**named, "license_link": said} if "://" in said else named


def _size_category(count: int) -> str:
    return next((name for most, name in SIZES.items() if count < most), "10M<n<100M")


def _dataset_info(manifest: Mapping[str, Any], shown: Pictures | None) -> dict[str, Any] | None:
    """Features and splits as `datasets` has them; None where no sample could be read."""
    if shown is None:
        return None
    names = {str(i): name for i, name in enumerate(manifest["classes"])}
    columns = {name: FEATURES.get(str(COLUMNS[name]), "float64") for name in shown.facts}
    rest = {"index": "int64", "split": "string", "source_label": "int64", **columns}
    sizes = {file["name"]: file["bytes"] for file in manifest["files"]}
    total = dict.fromkeys(manifest["counts"], 0)
    for shard in manifest["shards"]:
        total[shard.rpartition("-")[0]] += sizes[f"{shard}.tar"]
    return {
        "features": [
            {"name": "__key__", "dtype": "string"},
            {"name": "__url__", "dtype": "string"},
            {"name": manifest["members"][0], "dtype": "image"},
            {"name": "cls", "dtype": {"class_label": {"names": names}}},
            {"name": "json", "struct": [{"name": name, "dtype": kind} for name, kind in rest.items()]},
        ],
        "splits": [
            {"name": split, "num_bytes": total[split], "num_examples": count}
            for split, count in manifest["counts"].items()
        ],
        "download_size": sum(total.values()),
        "dataset_size": sum(total.values()),
    }
