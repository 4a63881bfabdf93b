"""stages/ does not depend on anything that runs it."""

import ast
from pathlib import Path

import pytest

import stages.errors

FILES = sorted(Path(stages.errors.__file__).parent.rglob("*.py"))
FOREIGN = {"ray", "click", "rich", "pipeline"}


def imported(source: str) -> set[str]:
    """Top-level packages that a module imports, at any place in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." if node.level else str(node.module).partition(".")[0])
    return found


def test_the_check_itself_sees_imports_inside_functions_and_in_from_form():
    assert imported("def f():\n    import ray.train\n    from pipeline.store import x\n") == {"ray", "pipeline"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_no_stage_imports_what_runs_it(file):
    assert not imported(file.read_text(encoding="utf-8")) & FOREIGN


def test_the_layering_test_looks_at_every_stage():
    assert {"webdataset.py", "attack.py", "relabel.py", "shard.py", "train.py", "evaluate.py"} <= {
        f.name for f in FILES
    }


def test_recipes_load_without_torch():
    # An experiment file is checked before anything heavy is imported: seconds on a laptop.
    assert "torch" not in imported(Path(stages.errors.__file__).with_name("recipes.py").read_text(encoding="utf-8"))
