"""A dataset's card: what it says, and that the readers it is for accept it."""

import json
import shutil
import time

import pytest
import yaml
from click.testing import CliRunner

import notbugs
from pipeline.cli import main
from pipeline.experiment import spec
from pipeline.experiment.graph import build
from pipeline.publish import card

LOADED = {"name": "loaded", "datasets": {"clean": {"load": {"source": "sklearn-digits", "limit": 12}}}}


def run(*args):
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == 0, result.output
    return result


def folder(store, name):
    return next((store / "datasets" / name).iterdir())


def metadata(readme):
    return yaml.safe_load(readme.read_text().split("---\n")[1])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "splits"), [("clean", ["test", "train"]), ("other", ["train"])])
def test_hugging_face_datasets_finds_splits_images_and_class_names_by_the_card(
    opened, tmp_path, monkeypatch, name, splits
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    read = datasets.load_dataset(str(folder(opened[0], name)), cache_dir=str(tmp_path))
    assert sorted(read) == splits
    found = notbugs.open(name, store=opened[0])
    for split in splits:
        rows, own = read[split], found.torch(split)
        assert rows.features["cls"].names == found.classes and len(rows) == len(own)
        sample = found[int(found.positions(split)[0])]
        assert (rows[0]["__key__"], rows[0]["cls"]) == (sample.key, sample.label)
        assert rows[0]["png"].size == (8, 8) and rows[0]["json"]["source_label"] == sample.source_label


@pytest.mark.filterwarnings("ignore")  # of pandas and rdflib, about mlcroissant's own code
def test_mlcroissant_accepts_the_file_without_a_warning_and_draws_records(opened, monkeypatch, tmp_path, caplog):
    import mlcroissant
    from mlcroissant._src.operation_graph.operations import extract

    monkeypatch.setattr(extract, "EXTRACT_PATH", extract.EXTRACT_PATH.__class__(tmp_path))
    found = notbugs.open("other", store=opened[0])
    read = mlcroissant.Dataset(jsonld=f"{found.path}/croissant.json")
    samples, image = list(read.records("samples")), next(iter(read.records("images")))
    assert [record for record in caplog.records if record.levelname != "INFO"] == []
    assert (read.metadata.ctx.issues.errors, read.metadata.ctx.issues.warnings) == (set(), set())
    assert [s["samples/label"] for s in samples] == found.table["label"].to_pylist()
    assert image["images/image"].size == (8, 8)
    assert image["images/key"].decode() in found.table["key"].to_pylist()
    assert read.metadata.license == ["cc-by-4.0"] and read.metadata.version.endswith(found.version)


def test_croissant_names_the_inputs_and_the_activity_in_the_terms_of_prov(opened):
    found = notbugs.open("other", store=opened[0])
    document = json.loads((folder(opened[0], "other") / "croissant.json").read_text())
    derived = {entity["@id"]: entity["sha256"] for entity in document["prov:wasDerivedFrom"]}
    assert derived == {
        f"urn:notbugs:{p['node'].replace('/', ':')}:{p['version']}": p["content"] for p in found.parents.values()
    }
    assert document["prov:wasGeneratedBy"]["name"] == f"attack, recipe {found.version}"
    clean = json.loads((folder(opened[0], "clean") / "croissant.json").read_text())
    assert clean["prov:wasDerivedFrom"][0]["name"] == "https://archive.ics.uci.edu/dataset/80"


def test_the_card_says_how_it_was_made_with_which_figures_and_that_labels_are_wrong(opened):
    text, made = (folder(opened[0], "other") / "README.md").read_text(), notbugs.open("other", store=opened[0])
    assert (
        "Clean attacked by targeted PGD on standard: L2 ε 1.5, 3 steps of 0.3; labelled with the target, a class"
        in text
    )
    assert "**The labels are wrong on purpose.**" in text and f"{100 * made.manifest['success_rate']:.1f} %" in text
    assert "| from_other |" in text and "| standard |" not in text, "the learners of this dataset, no others"
    assert "labels are wrong" not in (folder(opened[0], "clean") / "README.md").read_text()
    assert "![samples of other](samples.webp)" in text and "two rows" not in text
    assert (folder(opened[0], "other") / "samples.webp").stat().st_size < 20_000
    said = metadata(folder(opened[0], "other") / "README.md")
    assert (said["license"], said["size_categories"]) == ("cc-by-4.0", ["n<1K"])


def test_the_card_is_made_again_alike_and_is_part_of_no_digest(opened, tmp_path):
    store = tmp_path / "store"
    shutil.copytree(opened[0], store)
    names = ("README.md", "croissant.json", "samples.webp")
    before = {name: (folder(store, "other") / name).read_bytes() for name in names}
    for name in names:
        (folder(store, "other") / name).unlink()
    run("verify", "--store", store)
    run("card", "other", "--store", store)
    assert {name: (folder(store, "other") / name).read_bytes() for name in names} == before


def test_what_the_experiment_does_not_say_is_unknown_and_what_it_says_changes_no_version(tmp_path):
    file, store = tmp_path / "file.yaml", tmp_path / "store"
    file.write_text(json.dumps(LOADED))
    run("run", file, "--store", store, "--engine", "inline")
    readme = folder(store, "clean") / "README.md"
    text = readme.read_text()
    assert metadata(readme)["license"] == "unknown" and text.count("| unknown |") == 3
    assert json.loads((readme.parent / "croissant.json").read_text())["license"] == "unknown"
    about = {"license": "https://example.org/terms", "source": "a drawer | a shelf"}
    file.write_text(json.dumps({**LOADED, "about": about}))
    before = readme.stat().st_mtime_ns
    time.sleep(1)  # runs are named by the second
    run("run", file, "--store", store, "--engine", "inline")
    assert readme.stat().st_mtime_ns == before, "nothing was made, so no card is either"
    run("card", "clean", "--store", store)
    said = metadata(readme)
    assert (said["license"], said["license_link"]) == ("other", "https://example.org/terms")
    assert "a drawer \\| a shelf" in readme.read_text()
    assert len(list((store / "datasets/clean").iterdir())) == 1
    versions = [node.version for each in (LOADED, {**LOADED, "about": about}) for node in build(spec.parse(each))]
    assert versions[0] == versions[1]


def test_a_card_or_index_that_cannot_be_written_fails_no_run(tmp_path, monkeypatch):
    def fail(*args):
        raise ValueError("no ink")

    monkeypatch.setattr(card, "write", fail)
    monkeypatch.setattr("pipeline.publish.index.write", fail)
    file = tmp_path / "file.yaml"
    file.write_text(json.dumps(LOADED))
    result = run("run", file, "--store", tmp_path / "store", "--engine", "inline")
    assert "The card of datasets/clean" in result.output and "no ink" in result.output
    assert "The index could not be written" in result.output
    assert (folder(tmp_path / "store", "clean") / "manifest.json").exists()


@pytest.mark.parametrize(
    ("about", "sentence"),
    [
        ({"licence": "mit"}, "about.licence: unknown key, did you mean 'license'?"),
        ({"license": ""}, "about.license: must have at least 1 character"),
        ({"creators": "me"}, "about.creators: must be a valid list"),
    ],
)
def test_mistakes_in_about_are_named(about, sentence):
    with pytest.raises(notbugs.BadInput) as error:
        spec.parse({**LOADED, "about": about})
    assert sentence in str(error.value)
