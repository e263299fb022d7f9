"""Statistics: what is remembered about gradients, and the score that ranks the entries in the end.

A statistic is an immutable record with three parts, of which the optimizer owns the memory:
`init` makes the tensor, `update` adds one gradient, and the score is the tensor itself, or its magnitude (`absolute`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Statistic(Protocol):
    """What a policy needs to know of a statistic."""

    @property
    def absolute(self) -> bool:
        """Whether entries are ranked by the magnitude of the statistic."""

    def init(self, param: Tensor) -> Tensor:
        """A fresh statistic for a parameter: same shape, float32, zeros."""

    def update(
        self, statistics: Sequence[Tensor], grads: Sequence[Tensor], nonfinite: Sequence[Tensor], backend: ModuleType
    ) -> None:
        """Add one gradient per tensor; raise the 0-dim bool flag of a tensor with a non-finite entry."""


def _zeros(param: Tensor) -> Tensor:
    return torch.zeros(param.shape, dtype=torch.float32, device=param.device)


@dataclass(frozen=True)
class SquaredGradient:
    """Sum of squared gradients: the empirical diagonal Fisher information up to a constant factor.

        statistic <- statistic + g^2

    g is the gradient that `step()` or `observe()` sees, so that a batch enters as the square of its mean. Observe
    batches of one example for the Fisher information itself.

    Args:
        clip_norm: scale each tensor's gradient down to at most this norm before it is squared, as the released code
            of Child-Tuning does; None leaves it as it is.

    References:
        Xu et al., Raise a Child in Large Language Model: Towards Effective and Generalizable Fine-tuning, EMNLP 2021.
    """

    clip_norm: float | None = None
    absolute: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.clip_norm is not None and not 0.0 < self.clip_norm < math.inf:
            raise ValueError(
                f"clip_norm must be positive and finite, got {self.clip_norm!r}; use None to square gradients as they are."
            )

    def init(self, param: Tensor) -> Tensor:
        """Zeros in the shape of the parameter, float32."""
        return _zeros(param)

    def update(
        self, statistics: Sequence[Tensor], grads: Sequence[Tensor], nonfinite: Sequence[Tensor], backend: ModuleType
    ) -> None:
        """Add the squares."""
        scales = None
        if self.clip_norm is not None:
            # the small constant is that of torch.nn.utils.clip_grad_norm_, which the release calls per tensor
            scales = [
                (self.clip_norm / (torch.linalg.vector_norm(g, dtype=torch.float32) + 1e-6)).clamp(max=1.0)
                for g in grads
            ]
        backend.accumulate_(statistics, grads, nonfinite, kind="squares", grad_scales=scales)


@dataclass(frozen=True)
class SignedGradient:
    """Sum of gradients with their sign; entries are ranked by its magnitude.

        statistic <- statistic + g,  score = |statistic|

    Rewards a consistent direction, where `SquaredGradient` rewards variance.

    References:
        Fu et al., On the Effectiveness of Parameter-Efficient Fine-Tuning, AAAI 2023.
    """

    absolute: ClassVar[bool] = True

    def init(self, param: Tensor) -> Tensor:
        """Zeros in the shape of the parameter, float32."""
        return _zeros(param)

    def update(
        self, statistics: Sequence[Tensor], grads: Sequence[Tensor], nonfinite: Sequence[Tensor], backend: ModuleType
    ) -> None:
        """Add the gradients."""
        backend.accumulate_(statistics, grads, nonfinite, kind="signed")
