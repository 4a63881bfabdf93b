"""Run experiments and open models from Python."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline import picture
from pipeline.experiment import spec
from pipeline.experiment.spec import Experiment
from pipeline.launch import DATA, STORE, RunOptions, prepare
from pipeline.publish.after import after_run
from pipeline.report import page, results
from pipeline.run import runs
from pipeline.run.jobs import Context
from pipeline.store import Store
from stages.errors import BadData

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn


@dataclass(frozen=True)
class Results:
    """The results of a run.

    Attributes:
        run: its name in the store.
        page: path or URL of its page.
        rows: the rows of each evaluation's `result.json`, one per model; see docs/data-format.md.
    """

    run: str
    page: str
    rows: list[dict[str, Any]]

    def to_pandas(self) -> "pd.DataFrame":
        """The rows as a table; nested values become columns of their own, such as ``agreement.rule``."""
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
    check_files: bool = False,
) -> Results:
    """Make the missing nodes of an experiment, as ``notbugs run`` does.

    Args:
        experiment: path of an experiment file, or its content as a mapping or an `Experiment`.
        store: folder, or s3:// or gs:// URL.
        data: folder of local sources and checkpoints, and of downloads.
        engine: ``inline`` runs in this process, without Ray.
        only: make these nodes and their inputs.
        check_files: compare all images, shards and checkpoints with those of the last run by content, not only
            those of the same size and another time.
        workers, address: as the options of ``notbugs run``, for Ray.

    Raises:
        BadInput: the experiment is invalid, or a source, network or checkpoint that it names is missing or unfit.
        BadData: a node failed; the message names it. Finished work is kept, and the next call continues.
    """
    if isinstance(experiment, str | Path):
        experiment = spec.read(Path(experiment))
    elif isinstance(experiment, Mapping):
        experiment = spec.parse(dict(experiment))
    context = Context(Store(str(store)), Path(data), Path.cwd(), check_files)
    options = RunOptions(workers=workers, engine=engine, address=address)
    attempt, begin, _ = prepare(experiment, context, options, tuple(only), shown=False)
    made = begin()
    try:
        complete = attempt.go(made)
    finally:
        made.close()
    record = runs.load_run(context.store, attempt.record.id)
    where = context.store.at(page.write(context.store, record).path)
    after_run(context.store, record)
    if not complete:
        failed = [f"{node}: {progress['why']}" for node, progress in record["nodes"].items() if progress["why"]]
        raise BadData(f"run {attempt.record.id} failed; {'; '.join(failed)}")
    return Results(attempt.record.id, where, results.result_rows(context.store, record))


def model(name: str, store: str | Path = STORE, arch: str | None = None, data: str | Path = DATA) -> "nn.Module":
    """Load a model of a store, or a torchvision classifier.

    Args:
        name: ``standard`` (the newest version) or ``standard/<version>`` in the store; or a torchvision classifier,
            whose default weights are downloaded.
        store: folder, or s3:// or gs:// URL.
        arch: import path of the network if it is your own code: a store alone never causes code to run.
        data: folder for downloads.

    Returns:
        A network from images in [0, 1], N × C × H × W, to logits, N × classes; in evaluation mode, with frozen weights,
        on the GPU if there is one. Its attribute `classes` lists the class names.

    Raises:
        BadInput: there is no such model.
        BadData: its weights are damaged.
    """
    found, classes = picture.find_model(Context(Store(str(store)), Path(data), Path.cwd()), name, arch)
    found.classes = classes  # type: ignore[assignment]
    return found
