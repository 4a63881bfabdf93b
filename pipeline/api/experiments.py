"""An experiment run, and a model of a store opened, from Python."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline import picture
from pipeline.api.dataset import STORE
from pipeline.experiment import spec
from pipeline.experiment.graph import build
from pipeline.experiment.spec import Experiment
from pipeline.report import page, results
from pipeline.run import runs
from pipeline.run.engines import Inline
from pipeline.run.jobs import Context
from pipeline.run.on_ray import OnRay
from pipeline.run.preflight import preflight, wanted
from pipeline.store import Store
from stages.errors import BadData

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

DATA = "data"
"""The folder of local sources that the command line uses too where none is named."""


@dataclass(frozen=True)
class Results:
    """What a run left.

    Attributes:
        run: its name in the store.
        page: path or URL of its page.
        rows: one per model and evaluation: `result.json` of each, as docs/data-format.md has it.
    """

    run: str
    page: str
    rows: list[dict[str, Any]]

    def to_pandas(self) -> "pd.DataFrame":
        """The rows as a table; what is nested in a row becomes a column of its own, as ``agreement.rule``."""
        import pandas as pd

        return pd.json_normalize(self.rows)


def run(
    experiment: str | Path | Mapping[str, Any] | Experiment,
    store: str | Path = STORE,
    data: str | Path = DATA,
    engine: Literal["ray", "inline"] = "ray",
    only: Sequence[str] = (),
    workers: int | None = None,
    address: str | None = None,
) -> Results:
    """Make what is missing of an experiment, as ``notbugs run`` does.

    Args:
        experiment: path of an experiment file; or what would stand in it, as a mapping or an `Experiment`.
        store: folder, or s3:// or gs:// URL.
        data: folder of local sources and checkpoints; downloads go there too.
        engine: ``inline`` works in this process, without Ray.
        only: make these nodes and what they need.
        workers, address: of Ray, as the options of ``notbugs run``.

    Raises:
        BadInput: the experiment, or what it names, cannot be.
        BadData: a node failed; the message names it. What was made is kept, and the next call goes on with the rest.
    """
    if isinstance(experiment, str | Path):
        experiment = spec.read(Path(experiment))
    elif isinstance(experiment, Mapping):
        experiment = spec.parse(dict(experiment))
    context = Context(Store(str(store)), Path(data), Path.cwd())
    checked = preflight(wanted(build(experiment), tuple(only)), context)
    context.store.refuse_unless_writable()
    attempt = runs.Run(experiment, context, tuple(only), checked=checked)
    made = Inline() if engine == "inline" else OnRay(address=address, workers=workers)
    try:
        complete = attempt.go(made)
    finally:
        made.close()
    record = runs.load_run(context.store, attempt.record.id)
    where = context.store.at(page.write(context.store, record))
    if not complete:
        failed = [f"{node}: {progress['why']}" for node, progress in record["nodes"].items() if progress["why"]]
        raise BadData(f"run {attempt.record.id} failed; {'; '.join(failed)}")
    return Results(attempt.record.id, where, results.result_rows(context.store, record))


def model(name: str, store: str | Path = STORE, arch: str | None = None, data: str | Path = DATA) -> "nn.Module":
    """A model of a store, or one of torchvision's classifiers, ready for use.

    Args:
        name: ``standard`` or ``standard/<version>`` of the store, the newest by default; or a torchvision classifier,
            whose default weights are then fetched.
        store: folder, or s3:// or gs:// URL.
        arch: the network, where it is code of your own: no code is run because a store names it.
        data: folder that downloads go to.

    Returns:
        A network from images in [0, 1], N × C × H × W, to logits, N × classes; in evaluation mode, its weights without
        gradient, on the GPU where there is one. Its attribute `classes` has the names.

    Raises:
        BadInput: there is none.
        BadData: its weights are damaged.
    """
    found, classes = picture.find_model(Context(Store(str(store)), Path(data), Path.cwd()), name, arch)
    found.classes = classes  # type: ignore[assignment]
    return found
