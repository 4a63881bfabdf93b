"""How each kind of node is made, step by step; where the steps run is for `engines` to say.

A dataset or an evaluation is a `ShardJob`: shard by shard, read → work → commit. A model is a
`ModelJob`: epoch by epoch. Jobs are small and travel to workers; models and images are opened there.

What a kind of node checks and predicts before it is made, and the parts that its cost is estimated from, are methods of
its job too: nothing else asks what stage a node has.
"""

from pipeline.run.jobs.base import Context, Job, ShardJob, Unit, open_model
from pipeline.run.jobs.datasets import AttackJob, DatasetJob, InvertJob, LoadJob, SelectJob
from pipeline.run.jobs.evaluations import EvaluateJob, UsefulnessJob
from pipeline.run.jobs.models import ModelJob, PretrainedJob, TrainJob

__all__ = [
    "JOBS",
    "AttackJob",
    "Context",
    "DatasetJob",
    "EvaluateJob",
    "InvertJob",
    "Job",
    "LoadJob",
    "ModelJob",
    "PretrainedJob",
    "SelectJob",
    "ShardJob",
    "TrainJob",
    "Unit",
    "UsefulnessJob",
    "open_model",
]

JOBS: dict[str, type[ShardJob] | type[ModelJob]] = {
    "load": LoadJob,
    "attack": AttackJob,
    "invert": InvertJob,
    "select": SelectJob,
    "train": TrainJob,
    "pretrained": PretrainedJob,
    "evaluate": EvaluateJob,
    "usefulness": UsefulnessJob,
}
"""Stage → how it is made."""
