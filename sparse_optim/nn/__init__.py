"""What no optimizer can hold: modules that change the forward pass while a model trains, and then leave."""

from .random_autoencoders import RandomAutoencoders

__all__ = ["RandomAutoencoders"]
