"""How each kind of node is made, step by step; where the steps run is for `engines` to say.

A dataset or an evaluation is a `ShardJob`: shard by shard, read → work → commit. A model is a
`ModelJob`: epoch by epoch. Jobs are small and travel to workers; what is heavy they open there.
"""

from pipeline.run.jobs.base import Place, ShardJob, Unit, open_model
from pipeline.run.jobs.datasets import AttackJob, DatasetJob, InvertJob, LoadJob, SelectJob
from pipeline.run.jobs.evaluations import EvaluateJob, UsefulnessJob
from pipeline.run.jobs.models import ModelJob, design_of

__all__ = [
    "JOBS",
    "AttackJob",
    "DatasetJob",
    "EvaluateJob",
    "InvertJob",
    "LoadJob",
    "ModelJob",
    "Place",
    "SelectJob",
    "ShardJob",
    "Unit",
    "UsefulnessJob",
    "design_of",
    "open_model",
]

JOBS: dict[str, type[ShardJob] | type[ModelJob]] = {
    "load": LoadJob,
    "attack": AttackJob,
    "invert": InvertJob,
    "select": SelectJob,
    "train": ModelJob,
    "bring": ModelJob,
    "evaluate": EvaluateJob,
    "usefulness": UsefulnessJob,
}
"""Stage → how it is made."""
