"""Each command is in its file, and a file is imported only when one of its commands is called."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.cli import group, main

FOLDER = Path(cli.__file__).parent

LIGHT = """
import sys
from click.testing import CliRunner
from pipeline.cli import main
for line, code in [("--version", 0), ("--help", 0), ("run --help", 0), ("resume -h", 0), ("run", 2), ("runn", 2)]:
    result = CliRunner().invoke(main, line.split())
    assert result.exit_code == code, (line, result.output)
print(*sorted(set(sys.modules) & {"numpy", "pyarrow", "pydantic", "ray", "rich", "sklearn", "torch", "yaml"}))
"""


def test_every_command_of_every_file_is_entered_under_its_file():
    """Else it is missing from the help, and no one can call it."""
    for file in FOLDER.glob("*.py"):
        import_module(f"pipeline.cli.{file.stem}" if file.stem != "__init__" else "pipeline.cli")
    found = {name: command.callback.__module__ for name, command in main.commands.items()}
    assert found == {name: f"pipeline.cli.{module}" for name, module in group.MODULES.items()}


def test_the_help_names_each_command_by_its_own_first_sentence(capsys):
    with pytest.raises(SystemExit):
        main(["--help"], terminal_width=300)
    listed = capsys.readouterr().out.partition("Commands:\n")[2].splitlines()
    lines = dict(line.split(maxsplit=1) for line in listed)
    assert lines == {name: command.get_short_help_str(300) for name, command in main.commands.items()}


def test_help_version_and_misuse_load_nothing_heavy():
    """They answer in a fifth of a second: with everything loaded, in one to two."""
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout.strip(), done.stderr) == ("", "")
