"""Datasets that separate robust from non-robust features: read them, and make them, from Python.

Each name is loaded when it is first used, so that ``import notbugs`` takes no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.api.dataset import Dataset as Dataset
    from pipeline.api.dataset import Sample as Sample
    from pipeline.api.dataset import open_dataset as open  # noqa: F401
    from pipeline.api.experiments import Results as Results
    from pipeline.api.experiments import model as model
    from pipeline.api.experiments import run as run
    from pipeline.api.tensors import attack as attack
    from pipeline.api.tensors import invert as invert
    from pipeline.experiment.spec import Experiment as Experiment
    from stages.errors import BadData as BadData
    from stages.errors import BadInput as BadInput

_PLACES = {
    "BadData": "stages.errors:BadData",
    "BadInput": "stages.errors:BadInput",
    "Dataset": "pipeline.api.dataset:Dataset",
    "Experiment": "pipeline.experiment.spec:Experiment",
    "Results": "pipeline.api.experiments:Results",
    "Sample": "pipeline.api.dataset:Sample",
    "attack": "pipeline.api.tensors:attack",
    "invert": "pipeline.api.tensors:invert",
    "model": "pipeline.api.experiments:model",
    "open": "pipeline.api.dataset:open_dataset",
    "run": "pipeline.api.experiments:run",
}

__all__ = sorted(_PLACES)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"notbugs has no {name}; it has {', '.join(__all__)}")
    module, _, attribute = _PLACES[name].partition(":")
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__
