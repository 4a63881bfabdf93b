"""What is written after a node and after a run. None of it may fail a run."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pipeline.experiment.spec import About
from pipeline.run.artifacts import Artifact
from pipeline.run.engines import reason_of
from pipeline.store import Store
from pipeline.terminal import echo, visible


def after_node(store: Store, about: About) -> Callable[[Artifact], None]:
    """A function that writes the card of a dataset that was made, and ignores other nodes."""

    def published(made: Artifact) -> None:
        if made.folder.startswith("datasets/"):
            with _unharmed(f"The card of {made.folder}", f"notbugs card {made.folder}"):
                from pipeline.publish import card  # here: templates and images take a while to load

                card.write(store, made, about)

    return published


def after_run(store: Store, run: Mapping[str, Any]) -> None:
    """Write the cards of a run's datasets again, now with results, and the index of the store."""
    with _unharmed("The cards of the datasets", "notbugs card NAME"):
        from pipeline.publish import card

        card.write_all(store, run)
    with _unharmed("The index", "notbugs index"):
        from pipeline.publish import index

        index.write(store)


@contextmanager
def _unharmed(what: str, retry: str) -> Iterator[None]:
    """Report an error in place of raising it: the data stands without."""
    try:
        yield
    except Exception as error:  # noqa: BLE001
        echo(f"{what} could not be written: {visible(reason_of(error))}; retry with: {retry}", err=True)
