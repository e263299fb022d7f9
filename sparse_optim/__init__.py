"""Drop-in optimizers that update a chosen subset of a model's weights, and pay only for that subset."""

from .methods import ChildTuningAdamW, DPSAdamW, GradDropAdamW, SecondOrderAdamW, param_groups
from .optimizer import MaskedAdamW
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
    "TopK",
    "estimate_memory",
    "param_groups",
]
