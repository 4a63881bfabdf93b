"""The command, and ``python -m pipeline`` where it is not installed, as on a cluster."""

import sys

from pipeline import terminal


def main() -> None:
    """Make ready for what the terminal may do before anything else is loaded, which takes a second."""
    terminal.name_files_in_utf_8()
    terminal.open_streams()
    terminal.listen()
    try:
        from pipeline import cli
    except terminal.Interrupted as interrupted:
        terminal.say_interrupted()
        sys.exit(interrupted.code)
    cli.main(prog_name="notbugs")


if __name__ == "__main__":
    main()
