"""How each kind of node is made, step by step; where the steps run is up to `engines`."""

from pipeline.run.jobs.base import (
    JOBS,
    AttackJob,
    DatasetJob,
    EvaluateJob,
    InvertJob,
    LoadJob,
    ModelJob,
    Place,
    SelectJob,
    ShardJob,
    Unit,
    UsefulnessJob,
    design_of,
    open_model,
)

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
