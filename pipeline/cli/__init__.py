"""The command line: a file for each group of commands, imported when one of them is called (`group.MODULES`)."""

from pipeline.cli.group import main

__all__ = ["main"]
