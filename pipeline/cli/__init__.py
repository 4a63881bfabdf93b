"""The command line: a file for each group of commands."""

from pipeline.cli import attack, begin, catalog, experiments, jobs, publish, stored
from pipeline.cli.group import main

__all__ = ["attack", "begin", "catalog", "experiments", "jobs", "main", "publish", "stored"]
