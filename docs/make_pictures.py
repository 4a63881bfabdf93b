"""Draw the pictures of the README from a finished run: a terminal as SVG, the page as PNG.

    python docs/make_pictures.py STORE        a store whose latest run is the one to show

The terminal shows what `notbugs show` prints at 100 columns. The page is opened in chromium, as in the browser tests.
"""

import contextlib
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

DOCS = Path(__file__).parent
COLUMNS = 100
WIDTH, HEIGHT = 1200, 720
"""Size of the browser's window, in pixels: the first screen."""


def on_a_terminal(*command: str) -> str:
    """What a command prints on a terminal of `COLUMNS` columns."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"COLUMNS": str(COLUMNS), "TERM": "xterm-256color"}
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, stdin=theirs, env=environment) as process:
        os.close(theirs)
        printed = b""
        with contextlib.suppress(OSError):  # the terminal is closed when the command has ended
            while part := os.read(ours, 2**16):
                printed += part
    os.close(ours)
    if process.returncode:
        raise SystemExit(printed.decode())
    return printed.decode().replace("\r\n", "\n")


def terminal(store: Path) -> None:
    notbugs = str(Path(sys.executable).with_name("notbugs"))
    lines = on_a_terminal(notbugs, "show", "--store", str(store)).strip("\n").split("\n")
    table = "\n".join(lines[lines.index("") + 1 :])  # after the names of run and store
    console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    console.print(Text.from_ansi(f"$ notbugs show\n\n{table}"))
    drawn = re.sub(
        r"@font-face \{.*?\}\s*", "", console.export_svg(title="notbugs show"), flags=re.DOTALL
    )  # from a network
    (DOCS / "terminal.svg").write_text(drawn, encoding="utf-8")


def page(store: Path) -> None:
    from playwright.sync_api import sync_playwright

    latest = max((store / "runs").glob("*/report.html"))
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        tab.goto(latest.as_uri())
        tab.screenshot(path=str(DOCS / "page.png"))
        browser.close()


if __name__ == "__main__":
    terminal(Path(sys.argv[1]).absolute())
    page(Path(sys.argv[1]).absolute())
