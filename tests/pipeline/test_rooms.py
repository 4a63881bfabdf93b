"""The rooms of pipeline/ import in one direction."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import pipeline

HOME = Path(pipeline.HOME)
FLOORS = [
    {"pipeline", "store", "terminal"},
    {"experiment"},
    {"run"},
    {"report"},
    {"catalog"},
    {"publish"},
    {"cost"},
    {"picture", "cluster"},
    {"launch"},
    {"api", "begin"},
    {"cli"},
    {"__main__"},
]
"""From the ground up; a room, or a file that lies in none, imports from floors below its own and from itself."""


def floor(name: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if name in rooms)


def room(file: Path) -> str:
    first = file.relative_to(HOME / "pipeline").parts[0]
    return "pipeline" if first == "__init__.py" else first.removesuffix(".py")


def imported(source: str) -> Iterator[str]:
    """Rooms from which a module imports, at any place in it."""
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module == "pipeline":
            names = [f"pipeline.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [str(node.module)]
        for name in names:
            if name.split(".")[0] == "pipeline":
                yield [*name.split("."), "pipeline"][1]


@pytest.mark.parametrize(
    "file", sorted((HOME / "pipeline").rglob("*.py")), ids=lambda file: f"{room(file)}-{file.stem}"
)
def test_no_room_imports_from_above_it(file):
    own = room(file)
    for other in imported(file.read_text(encoding="utf-8")):
        assert other == own or floor(other) < floor(own), f"{own} imports {other}"


def test_the_check_itself_sees_every_form_of_import():
    source = (
        "import pipeline.run.runs\ndef f():\n    from pipeline import store\n    from pipeline.cost.trial import Rate\n"
    )
    assert list(imported(source)) == ["run", "store", "cost"]
