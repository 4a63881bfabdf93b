"""The stages make the same bytes as before: digests that no change of names, files or prose may change.

Decoded, drawn or copied pixels and labels are the same on every machine. Those of a trained network are not, so no
attack and no training is tested here. If one of these digests must change, raise the stage's number in `REVISIONS`.
"""

import hashlib

import numpy as np
import pytest
from click.testing import CliRunner

from pipeline.cli import main
from stages.shard import unpack

RULES = ("random", "other", "next")
FROZEN = {
    "clean": {
        "index": "9665d9fce5f05210",
        "label": "72d016ffe1374967",
        "source_label": "72d016ffe1374967",
        "pixels": "625dd61e1db55dee",
    },
    **{
        rule: {
            "index": "64d909032892a105",
            "label": label,
            "source_label": "14a74eb9f459a506",
            "pixels": "0c4aff4015ad257f",
        }
        for rule, label in zip(RULES, ("787ae15a94a6b33a", "89ccc28400b1424e", "30603ba669c61872"), strict=True)
    },
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Digits, and their controls under each rule of configs/digits.yaml: dataset → digest of each column."""
    folder = tmp_path_factory.mktemp("contents")
    lines = ["name: frozen", "datasets:", "  clean: {load: {source: sklearn-digits, shard_size: 360}}"]
    lines += [f"  {rule}: {{attack: {{images: clean, method: none}}, relabel: {rule}}}" for rule in RULES]
    (folder / "e.yaml").write_text("\n".join(lines))
    ended = CliRunner().invoke(main, ["run", f"{folder}/e.yaml", "--engine", "inline", "--store", f"{folder}/s"])
    assert ended.exit_code == 0, ended.output
    return {name: _digests(sorted(folder.glob(f"s/datasets/{name}/*/*.tar"))) for name in ("clean", *RULES)}


def _digests(tars):
    shards = [unpack(tar.stem, tar.read_bytes(), channels=1) for tar in tars]
    columns = {"index": [s.index for s in shards], "label": [s.label for s in shards]}
    columns["source_label"] = [s.source_label for s in shards]
    columns["pixels"] = [s.images() for s in shards]
    return {name: _digest(np.concatenate(parts)) for name, parts in columns.items()}


def _digest(values):
    kind = np.uint8 if values.dtype == np.uint8 else "<i8"
    return hashlib.sha256(np.ascontiguousarray(values, kind).tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("name", ["clean", *RULES])
def test_contents_are_what_they_were(made, name):
    assert made[name] == FROZEN[name]
