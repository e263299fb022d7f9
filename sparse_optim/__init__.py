"""Drop-in optimizers that update a chosen subset of a model's weights, and pay only for that subset."""

from .deltas import Delta, TensorDelta, load_delta, push_delta, save_delta
from .merging import merge_deltas
from .methods import ChildTuningAdamW, DPSAdamW, GradDropAdamW, SecondOrderAdamW, param_groups
from .optimizer import MaskedAdamW
from .patching import DeltaSwitcher, apply_delta, extract_delta, patch_checkpoint, revert_delta
from .policies import Bernoulli, GradualUnfreezing, Schedule, TopK
from .scores import (
    CountedSquaredGradient,
    CurvatureScaledGradient,
    Lowest,
    Magnitude,
    RandomScore,
    SignedGradient,
    SquaredGradient,
    Statistic,
)

# it uses the names above
from .planning import estimate_memory  # isort: skip

__version__ = "0.1.0"

__all__ = [
    "Bernoulli",
    "ChildTuningAdamW",
    "CountedSquaredGradient",
    "CurvatureScaledGradient",
    "DPSAdamW",
    "Delta",
    "DeltaSwitcher",
    "GradDropAdamW",
    "GradualUnfreezing",
    "Lowest",
    "Magnitude",
    "MaskedAdamW",
    "RandomScore",
    "Schedule",
    "SecondOrderAdamW",
    "SignedGradient",
    "SquaredGradient",
    "Statistic",
    "TensorDelta",
    "TopK",
    "apply_delta",
    "estimate_memory",
    "extract_delta",
    "load_delta",
    "merge_deltas",
    "param_groups",
    "patch_checkpoint",
    "push_delta",
    "revert_delta",
    "save_delta",
]
