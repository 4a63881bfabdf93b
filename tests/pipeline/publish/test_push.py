"""Pushing to other stores, and to a stand-in for the Hugging Face Hub."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from hub import TOKEN, Hub
from support import files

import notbugs
from pipeline.cli import main
from pipeline.publish import hub as hubs
from pipeline.store import Store

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own upload


def invoke(*args, code=0):
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def hub(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # set where other tests import it
    huggingface_hub.close_session()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with Hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


# ------------------------------------------------------------------------------------------- other stores


@pytest.mark.parametrize("node", ["other", "standard", "accuracy"])
def test_a_node_in_another_folder_is_the_same_and_whole(opened, tmp_path, node):
    invoke("push", node, tmp_path / "copy", "--store", opened[0])
    invoke("verify", "--store", tmp_path / "copy")
    place = next(tmp_path.glob(f"copy/*/{node}"))
    source = Path(opened[0]) / place.relative_to(tmp_path / "copy")
    assert files(place) == files(source)
    assert all((place / name).read_bytes() == (source / name).read_bytes() for name in files(place))
    assert list((tmp_path / "copy").iterdir()) == [place.parent], "nothing else is left there"


def test_a_push_goes_on_where_it_was_cut_and_the_manifest_comes_last(opened, s3_url, s3_server, monkeypatch):
    real, written = Store.put, []

    def dies(self, path, content):
        if self.url == s3_url and path.startswith("datasets/"):
            if len(written) > 5:
                raise KeyboardInterrupt
            written.append(path)
        real(self, path, content)

    monkeypatch.setattr(Store, "put", dies)
    monkeypatch.setattr("pipeline.publish.push.WORKERS", 1)
    invoke("push", "other", s3_url, "--store", opened[0], code=130)
    assert not any(path.endswith("manifest.json") for path in s3_server.contents(s3_url.removeprefix("s3://")))
    monkeypatch.setattr(Store, "put", real)
    planned = invoke("push", "other", s3_url, "--store", opened[0], "--dry-run")
    done = json.loads(invoke("push", "other", s3_url, "--store", opened[0], "--json"))
    assert f"{len(done['files'])} files" in planned and len(done["files"]) == 15 - 6
    assert done["files"][-1]["name"] == "manifest.json"
    assert json.loads(invoke("push", "other", s3_url, "--store", opened[0], "--json"))["files"] == []
    ours, theirs = (notbugs.open("other", store=store) for store in (opened[0], s3_url))
    assert theirs.manifest == ours.manifest and theirs[5].image.tolist() == ours[5].image.tolist()


def test_the_same_version_with_other_bytes_is_neither_replaced_nor_mixed(opened, tmp_path):
    from support import reseal

    copy = tmp_path / "copy"
    invoke("push", "standard", copy, "--store", opened[0])
    manifest = next(copy.glob("models/*/*/manifest.json"))
    other = "0" * 64

    def change(value):
        listed = [{**f, "sha256": other} if f["name"] == "weights.safetensors" else f for f in value["files"]]
        return {**value, "content": other, "files": listed}

    reseal(copy, manifest, change)
    before = manifest.read_bytes()
    output = invoke("push", "standard", copy, "--store", opened[0], code=2)
    assert "same version with other bytes" in output and manifest.read_bytes() == before


def test_a_damaged_shard_is_not_pushed(opened, tmp_path):
    store = tmp_path / "store"
    shutil.copytree(opened[0], store)
    tar = next(store.glob("datasets/other/*/train-000001.tar"))
    tar.write_bytes(tar.read_bytes()[:-1] + b"x")
    output = invoke("push", "other", tmp_path / "copy", "--store", store, code=1)
    assert "train-000001.tar is missing or damaged" in output
    assert not list((tmp_path / "copy").glob("datasets/*/*/manifest.json"))


# -------------------------------------------------------------------------------------------------- the Hub


def test_a_dry_run_on_the_hub_says_what_would_go_and_changes_nothing(opened, hub):
    output = invoke("push", "other", "hf://me/other", "--store", opened[0], "--dry-run")
    assert "train-000002.tar  205 kB" in output and "9 files" in output and "would be sent" in output
    assert hub.files == {} and hub.commits == [] and hub.sent == []


def test_the_hub_gets_shards_card_and_manifest_and_the_version_as_tag(opened, hub):
    found = notbugs.open("other", store=opened[0])
    invoke("push", "other", "hf://datasets/me/other", "--store", opened[0], "--private")
    there, folder = hub.files["me/other"], Path(found.path)
    assert set(there) == {path.name for path in folder.iterdir() if path.is_file()} and hub.private["me/other"]
    assert all(content == (folder / name).read_bytes() for name, content in there.items())
    assert hub.tags["me/other"] == {found.version: there}
    assert "manifest.json" in hub.commits[-1][1] and len(hub.commits) == 2
    sent = len(hub.sent)
    assert "0 files" in invoke("push", "other", "hf://me/other", "--store", opened[0])
    assert (len(hub.sent), len(hub.commits)) == (sent, 2), "nothing is sent twice"


def test_a_push_to_the_hub_goes_on_where_it_was_cut(opened, hub, monkeypatch):
    monkeypatch.setattr(hubs, "COMMIT_FILES", 1)
    hub.refuse = lambda method, path: method == "PUT" and len(hub.sent) == 2
    output = invoke("push", "other", "hf://me/other", "--store", opened[0], code=2)
    assert "the Hub refuses a request for me/other (403): no more today" in output
    assert sorted(hub.files["me/other"]) == ["train-000000.tar", "train-000001.tar"] and not hub.tags["me/other"]
    hub.refuse = lambda method, path: False
    assert "2 were there already" in invoke("push", "other", "hf://me/other", "--store", opened[0])
    assert len(hub.sent) == len(set(hub.sent)) and len(hub.tags["me/other"]) == 1


def test_shards_of_another_version_are_deleted_for_the_cards_pattern_would_match_them(opened, hub):
    invoke("push", "clean", "hf://me/digits", "--store", opened[0])
    hub.files["me/digits"]["notes.md"] = b"mine"
    assert "is deleted" in invoke("push", "other", "hf://me/digits", "--store", opened[0], "--dry-run")
    invoke("push", "other", "hf://me/digits", "--store", opened[0])
    assert sorted(name for name in hub.files["me/digits"] if name.endswith(".tar")) == [
        f"train-00000{i}.tar" for i in range(3)
    ]
    assert hub.files["me/digits"]["notes.md"] == b"mine" and len(hub.tags["me/digits"]) == 2
    versions = {notbugs.open(name, store=opened[0]).version for name in ("clean", "other")}
    assert set(hub.tags["me/digits"]) == versions


@pytest.mark.parametrize(
    ("dest", "token", "sentence"),
    [
        ("hf://me/other", "wrong", "log in with `hf auth login`, or set HF_TOKEN"),
        ("hf://other", TOKEN, "hf://other: names no dataset of the Hub, expected hf://user/repo"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(opened, hub, monkeypatch, dest, token, sentence):
    monkeypatch.setenv("HF_TOKEN", token)
    output = invoke("push", "other", dest, "--store", opened[0], code=2)
    assert sentence in output and "wrong" not in output and len(output.splitlines()) == 1


def test_without_the_library_the_extra_is_named(opened, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    output = invoke("push", "other", "hf://me/other", "--store", opened[0], code=2)
    assert "pip install 'notbugs[hub]'" in output
