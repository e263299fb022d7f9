"""Drop-in optimizers that update a chosen subset of a model's weights, and pay only for that subset."""

from .methods import ChildTuningAdamW, param_groups
from .optimizer import MaskedAdamW
from .policies import Bernoulli, Schedule, TopK
from .scores import SignedGradient, SquaredGradient

__version__ = "0.1.0"

__all__ = [
    "Bernoulli",
    "ChildTuningAdamW",
    "MaskedAdamW",
    "Schedule",
    "SignedGradient",
    "SquaredGradient",
    "TopK",
    "param_groups",
]
