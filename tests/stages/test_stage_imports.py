"""The source files of the user's network, found without running them."""

from pathlib import Path

import pytest

from stages.imports import sources

FILES = {
    "nets/mine.py": "import torch, common\nfrom .beside import x\nfrom pkg.sub import deep\nraise SystemExit\n",
    "nets/beside.py": "def build():\n    import late\n",
    "common.py": "import common, stages.nets, json\n",
    "late.py": "from common import *\nimport no_such_module\n",
    "pkg/__init__.py": "",
    "pkg/sub/__init__.py": "from .. import up\n",
    "pkg/sub/deep.py": "if False:\n    from . import more\n",
    "pkg/sub/more.py": "this is no Python",
    "pkg/up.py": "",
    "unused.py": "",
}
PACKAGE = ["pkg/__init__.py", "pkg/sub/__init__.py", "pkg/sub/deep.py", "pkg/sub/more.py", "pkg/up.py"]
FOUND = {
    "./nets/mine.py:net": ["../common.py", "../late.py", *(f"../{name}" for name in PACKAGE), "beside.py", "mine.py"],
    "pkg.sub.deep:net": PACKAGE,
    "late:net": ["common.py", "late.py"],
    "nowhere:net": [],
    "./nowhere.py:net": [],
    "torchvision.models:resnet18": ["torchvision/__init__.py", "torchvision/models/__init__.py"],
}


@pytest.fixture
def here(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize("arch", FOUND)
def test_a_module_the_users_modules_that_it_imports_and_no_library(arch, here):
    found = sources(arch, here)
    assert list(found) == FOUND[arch]
    assert all(path.is_file() for path in found.values())


def test_names_are_the_same_wherever_the_folder_lies(here, tmp_path_factory):
    moved = tmp_path_factory.mktemp("moved") / "deeper"
    before = list(sources("./nets/mine.py:net", here))
    here.rename(moved)
    assert list(sources("./nets/mine.py:net", moved)) == before
    assert {path.parts[: len(moved.parts)] for path in sources("pkg.sub:net", moved).values()} == {Path(moved).parts}
