"""The notebook of the documents runs from its first cell to its last, and shows what its text claims."""

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parent.parent / "docs" / "notebook.ipynb"


@pytest.mark.slow
def test_every_cell_runs_and_the_learner_beats_its_control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cells run in one namespace, as Jupyter runs them; a figure that a cell leaves open is shown there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    shown: dict[str, Any] = {}
    for number, cell in enumerate(json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "clear the outputs before the notebook is committed"
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), shown)
    accuracy = shown["table"]["accuracy"]
    assert accuracy["from_control"] < shown["table"]["chance"].max() < accuracy["from_other"] < accuracy["standard"]
    assert shown["reached"] > 0.5 and shown["longest"] <= 1.5
    shown["plt"].close(shown["figure"])
