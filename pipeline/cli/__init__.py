"""The command line: a file for each group of commands."""

from pipeline.cli import attack, begin, experiments, jobs, stored
from pipeline.cli.group import main

__all__ = ["attack", "begin", "experiments", "jobs", "main", "stored"]
