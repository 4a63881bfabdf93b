"""``python -m pipeline``: the command, where it is not installed, as on a cluster."""

from pipeline.cli import main

main(prog_name="notbugs")
