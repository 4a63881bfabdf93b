"""A store with two versions of an attacked dataset, made once and copied for each test."""

import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from catalog_support import experiment, invoke

from pipeline.store import Store


@pytest.fixture(scope="session")
def made_twice(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Two runs: ``old`` with eps 1.5, ``new`` with eps 1; their files, and the store."""
    folder = tmp_path_factory.mktemp("catalog")
    for name, eps in (("old", 1.5), ("new", 1.0)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(experiment(eps)))
        invoke("run", folder / f"{name}.yaml", "--store", folder / "store", "--engine", "inline")
        time.sleep(1)  # a manifest has the second in which it was made
    runs = sorted(path.name for path in (folder / "store/runs").iterdir())
    return SimpleNamespace(folder=folder, store=folder / "store", runs=runs)


@pytest.fixture
def twice(made_twice: SimpleNamespace, tmp_path: Path) -> SimpleNamespace:
    """A copy that a test may change."""
    store = shutil.copytree(made_twice.store, tmp_path / "store")
    return SimpleNamespace(**{**vars(made_twice), "store": store})


@pytest.fixture(params=["folder", "s3"])
def anywhere(request: pytest.FixtureRequest, made_twice: SimpleNamespace, tmp_path: Path) -> SimpleNamespace:
    """A copy in a folder, and on an object store."""
    if request.param == "folder":
        store = str(shutil.copytree(made_twice.store, tmp_path / "store"))
    else:
        store = request.getfixturevalue("s3_url")
        for path in Store(str(made_twice.store)).files("", recursive=True):
            Store(store).put(path, (made_twice.store / path).read_bytes())
    return SimpleNamespace(**{**vars(made_twice), "store": store})
