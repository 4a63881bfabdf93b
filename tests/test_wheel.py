"""The wheel gives a working command away from the checkout."""

import subprocess
import sys
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_wheel_in_an_empty_environment_gives_a_working_command(tmp_path):
    """The environment holds the wheel alone and borrows this one's third-party packages by path."""

    def run(*args):
        return subprocess.run(args, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    run(sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path / "dist"), str(ROOT))
    run(sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env"))
    (wheel,) = (tmp_path / "dist").glob("notbugs-*.whl")
    python = str(tmp_path / "env/bin/python")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", str(wheel))
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    (Path(site) / "borrowed.pth").write_text(str(Path(click.__file__).parent.parent))
    assert (
        run(python, "-c", "import pipeline, stages; print(pipeline.__path__[0], stages.__path__[0])").count(site) == 2
    )
    run(str(tmp_path / "env/bin/notbugs"), "init", "digits", "--out", "mine.yaml")
    assert "ready" in run(str(tmp_path / "env/bin/notbugs"), "doctor", "--json", "--store", "s")
    file = tmp_path / "e.yaml"
    file.write_text("name: e\ndatasets: {clean: {load: {source: sklearn-digits}}}\n")
    for name in ("stages", "torch", "random"):  # the user stands among files of these names
        (tmp_path / f"{name}.py").write_text("raise RuntimeError")
    run(str(tmp_path / "env/bin/notbugs"), "run", str(file), "--store", "s", "--engine", "inline")
    assert "1438 train" in run(str(tmp_path / "env/bin/notbugs"), "show", "clean", "--store", "s")
