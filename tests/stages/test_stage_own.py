"""The user's own code, found by name or by file, after installed modules; its errors are reported with their place."""

import random
import sys
from pathlib import Path

import pytest

from stages import own
from stages.errors import BadInput


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The user's folder, as the working directory; afterwards, none of its modules stays loaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def write(here, files):
    """Write modules, given as path without suffix → code."""
    for name, text in files.items():
        path = here / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def refused(arch, here):
    with pytest.raises(BadInput) as error:
        own.find(arch, here)
    return str(error.value).removeprefix(f"arch {arch} ")


# ------------------------------------------------------------------------------------------- what is found


LAYOUTS = {
    "a module": ("mine:net", {"mine": "def net(): return 1"}),
    "a module of a folder": ("nets.mine:net", {"nets/mine": "def net(): return 1"}),
    "a sibling by its name": ("mine:net", {"mine": "from helpers import net", "helpers": "def net(): return 1"}),
    "a sibling by a dot": (
        "nets.mine:net",
        {"nets/mine": "from .blocks import net", "nets/blocks": "def net(): return 1"},
    ),
    "a file": ("./mine.py:net", {"mine": "def net(): return 1"}),
    "a file without a slash": ("mine.py:net", {"mine": "def net(): return 1"}),
    "a file and its sibling by name": (
        "./nets/mine.py:net",
        {"nets/mine": "from helpers import net", "nets/helpers": "def net(): return 1"},
    ),
    "a file and one of the current folder": (
        "./nets/mine.py:net",
        {"nets/mine": "from helpers import net", "helpers": "def net(): return 1"},
    ),
    "a file and its sibling by a dot": (
        "nets/mine.py:net",
        {"nets/mine": "from .blocks import net", "nets/blocks": "def net(): return 1"},
    ),
    "a file of a package, and another package of the same": (
        "./all/nets/mine.py:net",
        {
            "all/__init__": "",
            "all/nets/__init__": "",
            "all/nets/mine": "from ..blocks import net",
            "all/blocks": "def net(): return 1",
        },
    ),
    "a package by its file": (
        "./nets/__init__.py:net",
        {"nets/__init__": "from .mine import net", "nets/mine": "def net(): return 1"},
    ),
    "a file with a dot in its name": ("./v1.2.py:net", {"v1.2": "def net(): return 1"}),
    "a file of a name that is installed": ("./random.py:net", {"random": "def net(): return 1"}),
    "a file in a package of our name": (
        "./stages/own.py:net",
        {"stages/__init__": "", "stages/own": "from .train import net", "stages/train": "def net(): return 1"},
    ),
}


@pytest.mark.parametrize(("arch", "files"), LAYOUTS.values(), ids=LAYOUTS)
def test_it_is_found_with_what_it_imports(arch, files, here):
    write(here, files)
    assert own.find(arch, here)() == 1
    assert own.find(arch, here) is own.find(arch, here), "read once"
    assert sys.modules["random"] is random and sys.modules["stages.own"] is own


def test_a_file_is_looked_for_in_the_users_folder_wherever_the_process_stands(here, tmp_path_factory, monkeypatch):
    write(here, {"mine": "def net(): return 1"})
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert own.find("./mine.py:net", here)() == own.find(f"{here}/mine.py:net", here)() == 1


def test_two_files_of_one_name_do_not_meet(here):
    write(here, {"a/mine": "def net(): return 1", "b/mine": "def net(): return 2"})
    assert [own.find(f"./{folder}/mine.py:net", here)() for folder in "ab"] == [1, 2]


def test_the_users_folder_comes_after_everything_that_is_installed(here, monkeypatch):
    write(here, {"mine": "from statistics import mean as net", "statistics": "raise RuntimeError"})
    monkeypatch.delitem(sys.modules, "statistics", raising=False)
    assert own.find("mine:net", here)([1, 2, 3]) == 2
    assert sys.path.index(str(here)) > max(i for i, entry in enumerate(sys.path) if "python3" in entry)


# -------------------------------------------------------------------------------------- what hides it


def test_a_module_that_an_installed_one_hides_is_refused_with_the_way_round(here):
    write(here, {"random": "def net(): return 1", "stages/__init__": "", "stages/mine": "def net(): return 1"})
    file = Path(random.__file__)
    assert refused("random:net", here) == (
        f"cannot be imported: {file} is installed and comes before random.py: name the file, `./random.py:…`"
    )
    assert refused("stages.mine:net", here) == (
        f"cannot be imported: {Path(own.__file__).with_name('__init__.py')} is installed and comes before "
        "stages/mine.py: name the file, `./stages/mine.py:…`"
    )


def test_a_module_of_which_an_installed_copy_comes_first_is_taken_while_they_are_the_same(here, tmp_path_factory):
    installed = tmp_path_factory.mktemp("installed")
    sys.path.insert(0, str(installed))
    for folder in (installed, here):
        write(folder, {"research/nets": "def net(): return 1"})
    assert own.find("research.nets:net", here)() == 1
    write(here, {"research/nets": "def net(): return 2"})
    assert "is installed and comes before research/nets.py" in refused("research.nets:net", here)


@pytest.mark.parametrize("text", ["from random import net", "import random\nnet = random.net"])
def test_what_a_module_does_not_find_because_an_installed_one_hides_it_is_said(text, here):
    write(here, {"mine": text, "random": "def net(): return 1"})
    said = refused("mine:net", here)
    assert said.startswith(f"cannot be imported: mine.py line {len(text.splitlines())}: ")
    assert said.endswith(
        f"({random.__file__} is installed and comes before random.py: give that another name, or import it relatively)"
    )


# ----------------------------------------------------------------------------------- what is said of it


NOWHERE = {
    "mine:nett": "cannot be imported: mine has no 'nett'; did you mean 'net'?",
    "mine:missing": "cannot be imported: mine has no 'missing'",
    "nowhere_at_all:net": "cannot be imported: there is no module nowhere_at_all, neither installed nor in the current "
    "folder",
    "nowhere.at.all:net": "cannot be imported: there is no module nowhere.at.all, neither installed nor in the current "
    "folder",
    "a:b:net": "cannot be imported: there is no module a:b, neither installed nor in the current folder",
    "./nowhere.py:net": "cannot be imported: there is no file ./nowhere.py in the current folder",
    "./folder.py:net": "cannot be imported: there is no file ./folder.py in the current folder",
    "./:net": "cannot be imported: ./ is no Python file (.py)",
    "./notes.txt:net": "cannot be imported: ./notes.txt is no Python file (.py)",
    **dict.fromkeys(
        [":net", "mine:", ":", ".mine:net", "mine.:net", "a..b:net"],
        "names no code, expected `package.module:name` or `./folder/file.py:name`",
    ),
}


@pytest.mark.parametrize("arch", NOWHERE)
def test_what_is_not_there_is_said(arch, here):
    write(here, {"mine": "def net(): return 1"})
    (here / "folder.py").mkdir()
    (here / "notes.txt").write_text("")
    assert refused(arch, here) == NOWHERE[arch]


FAILING = {
    "def net(:": "mine.py line 1: invalid syntax",
    "x = 1\n\nraise ZeroDivisionError('one\\ntwo')": "mine.py line 3: one",
    "import nowhere_at_all": "mine.py line 1: No module named 'nowhere_at_all'",
    "import helpers\nhelpers.fail()": "helpers.py line 2: not today",
    "import json\njson.loads('?')": "mine.py line 2: Expecting value: line 1 column 1 (char 0)",
    "{}['x']": "mine.py line 1: there is no key 'x'",
    "assert 1 == 2": "mine.py line 1: fails at `assert 1 == 2`",
    "raise NotImplementedError": "mine.py line 1: fails at `raise NotImplementedError`",
    "open('nowhere.txt')": "mine.py line 1: No such file or directory: nowhere.txt",
    "def f(): f()\nf()": "mine.py line 1: maximum recursion depth exceeded",
    "import sys\nsys.exit(3)": "mine.py line 2: it ends the program (3)",
    "raise SystemExit": "mine.py line 1: it ends the program",
    "class Odd(BaseException):\n    def __str__(self): 1 / 0\nraise Odd": "mine.py line 3: fails at `raise Odd`",
    "exec('raise ValueError')": "mine.py line 1: fails at `exec('raise ValueError')`",
    "x = '\0'": "source code string cannot contain null bytes",
}


@pytest.mark.parametrize("how", ["mine:net", "./mine.py:net"])
@pytest.mark.parametrize("text", FAILING)
def test_what_fails_in_the_users_module_is_said_with_file_and_line_and_without_the_name_of_an_exception(
    text, how, here
):
    write(here, {"mine": text, "helpers": "def fail():\n    raise RuntimeError('not today')"})
    assert refused(how, here) == f"cannot be imported: {FAILING[text]}"
    assert refused(how, here) == f"cannot be imported: {FAILING[text]}", "and again, not half imported"


def test_a_file_that_is_not_utf8_is_said_with_its_name(here):
    (here / "mine.py").write_bytes(b"x = '\xff'\n")
    assert refused("mine:net", here).startswith("cannot be imported: mine.py line 1: (unicode error)")


def test_ctrl_c_is_nobodys_error(here):
    write(here, {"mine": "raise KeyboardInterrupt"})
    with pytest.raises(KeyboardInterrupt):
        own.find("mine:net", here)


def test_what_a_module_prints_goes_to_standard_error(here, capsys):
    write(here, {"mine": "print('told')\nnet = 1"})
    assert own.find("mine:net", here) == 1
    assert capsys.readouterr() == ("", "told\n")
