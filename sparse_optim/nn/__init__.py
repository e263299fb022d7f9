"""What no optimizer can hold: modules that change the forward pass while a model trains, and then leave."""

from .random_autoencoders import RandomAutoencoders
from .weight_mixing import WeightMixing, mix_weights, mixout

__all__ = ["RandomAutoencoders", "WeightMixing", "mix_weights", "mixout"]
