"""Training runs: config, step, loop, evaluation, metrics, checkpoints.

from lowprec.training import default, train
config = default()
config.recipe = "nvfp4"
summary = train(config, "runs/first")
"""

from lowprec.training.config import (
    CheckpointConfig,
    EvalConfig,
    LogConfig,
    MeshConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ProfileConfig,
    RunConfig,
    TrainConfig,
    default,
    resolve,
)
from lowprec.training.launch import train

__all__ = [
    "CheckpointConfig",
    "EvalConfig",
    "LogConfig",
    "MeshConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ProfileConfig",
    "RunConfig",
    "TrainConfig",
    "default",
    "resolve",
    "train",
]
