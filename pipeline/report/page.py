"""``report.html``: the results of a run on one self-contained page."""

import base64
import re
from collections import Counter
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup, escape

from pipeline.report.overview import overview
from pipeline.report.results import RunResults
from pipeline.report.sections import sections
from pipeline.report.verdict import advice, remarks, verdict, words
from pipeline.store import Store
from pipeline.terminal import visible

TEMPLATE, SCRIPT = (Path(__file__).with_name(f"page.{suffix}") for suffix in ("html", "js"))


class Written(NamedTuple):
    """A page: its path in the store, its verdict, and what to mend first, if anything."""

    path: str
    verdict: str
    advice: str | None


def write(store: Store, run: Mapping[str, Any]) -> Written:
    """Write the page of a run, in whatever state, from its results in the store.

    Raises:
        BadInput: this version cannot read the experiment of the record.
    """
    path = f"runs/{run['run']}/report.html"
    results = RunResults(store, run)
    found = _verdict(results)
    store.put(path, _rendered(results, found).encode())
    return Written(path, found, advice(results.held_out))


def render(store: Store, run: Mapping[str, Any]) -> str:
    """The page as HTML."""
    results = RunResults(store, run)
    return _rendered(results, _verdict(results))


def _rendered(results: RunResults, found: str) -> str:
    run = results.run
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_unbroken
    )
    environment.filters |= {"breakable": _breakable, "prose": _prose}
    limits = list(remarks(results.held_out))
    script = Markup(SCRIPT.read_text(encoding="utf-8"))
    html = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        run=run,
        state=state(run),
        reasons=reasons(run),
        overview=overview(results),
        verdict=found,
        remarks=limits,
        words=words(" ".join([found, *(remark.text for remark in limits)])),
        sections=sections(results),
        script=script,
        script_digest=base64.b64encode(sha256(script.encode()).digest()).decode(),
    )
    return "\n".join(map(visible, html.split("\n")))  # a page is read in a pager, too


def _unbroken(value: Any) -> Any:
    """Keep a number, its deviation and its percent sign on one line."""
    return value.replace(" %", "\u00a0%").replace(" ± ", "\u00a0±\u00a0") if isinstance(value, str) else value


def _prose(text: str) -> Markup:
    """A text with its `code` marked up as such."""
    return Markup(re.sub(r"`([^`\n]+)`", r"<code>\1</code>", str(escape(text))))


def _breakable(name: str) -> Markup:
    """Let a long name break after the characters that join its parts."""
    return Markup(re.sub(r"([/@,._=-])(?=\w)", r"\1<wbr>", str(escape(name))))


# ---------------------------------------------------------------------------------------------- state


def state(run: Mapping[str, Any]) -> str | None:
    """The first sentence of an incomplete run; None for a complete one."""
    counts = Counter(progress["state"] for progress in run["nodes"].values())
    there, total = counts["done"] + counts["cached"], len(run["nodes"])
    made = f"{there} of {total} nodes are finished"
    match run["state"]:
        case "done":
            return None
        case "failed":
            return f"This run failed: {made}."
        case "running":
            return f"This run is not finished: {made}."
        case "lost":
            return f"This run was lost, {run['why']}: {made}."
    return f"This run was {run['state']}: {made}."


def reasons(run: Mapping[str, Any]) -> list[str]:
    """Why nodes failed or did not start."""
    nodes = sorted(run["nodes"].items(), key=lambda item: item[1]["state"] != "failed")
    return [f"{node} {progress['state']}: {progress['why']}" for node, progress in nodes if progress["why"]]


def _verdict(results: RunResults) -> str:
    """The verdict; without accuracies, what there is."""
    if (found := verdict(results.held_out)) is not None:
        return found
    groups = Counter(node.partition("/")[0] for node in results.manifests)
    finished = ", ".join(f"{number} {group if number > 1 else group[:-1]}" for group, number in groups.items())
    return f"Finished: {finished or 'nothing'}. There is no accuracy yet, as no evaluation is among them."
