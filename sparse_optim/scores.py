"""Statistics: what is remembered about gradients, and the score that ranks the entries in the end.

A statistic is an immutable record; the optimizer owns the memory. `init` makes the tensor, `update` adds one
gradient, and `score` reads it out when entries are selected: usually the tensor itself, or its magnitude
(`absolute`).
The last three are controls, which a fair comparison needs: `RandomScore`, `Magnitude`, `Lowest`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from .backends.reference import CONTROL_DRAWS, philox_words, purpose_draw


class Statistic(ABC):
    """What a `TopK` policy remembers; subclass it as a frozen dataclass to rank entries by something else."""

    absolute: ClassVar[bool] = False  # rank by the magnitude of the score
    needs_curvature: ClassVar[bool] = False  # optimizer.observe_curvature() has to be called before selecting
    counts: ClassVar[bool] = False  # optimizer.set_count() means something
    random: ClassVar[bool] = False  # draws words, so that parameters need keys that differ

    def init(self, param: Tensor, *, seed: int, key: int) -> Tensor:
        """A fresh statistic: float32, in the shape of the parameter. `seed` and `key` are those of its
        random words.
        """
        del seed, key
        return torch.zeros(param.shape, dtype=torch.float32, device=param.device)

    @abstractmethod
    def update(
        self,
        statistics: Sequence[Tensor],
        grads: Sequence[Tensor],
        nonfinite: Sequence[Tensor],
        backend: ModuleType,
    ) -> None:
        """Add one gradient per tensor; raise the 0-dim bool flag of a tensor with a non-finite entry."""

    def score(self, statistic: Tensor, state: Mapping[str, Any]) -> Tensor:
        """What ranks the entries, without changing the statistic. `state` is the parameter's whole state."""
        del state
        return statistic


@dataclass(frozen=True)
class SquaredGradient(Statistic):
    """Sum of squared gradients: the empirical diagonal Fisher information up to a constant factor.

        statistic <- statistic + g^2

    g is the gradient that `step()` or `observe()` sees, so that a batch enters as the square of its mean.
    Observe batches of one example for the Fisher information itself.

    Args:
        clip_norm: scale each tensor's gradient down to at most this norm before it is squared, as the
            released code of Child-Tuning does; None leaves it as it is.

    References:
        Xu et al., Raise a Child in Large Language Model: Towards Effective and Generalizable Fine-tuning,
        EMNLP 2021.
    """

    clip_norm: float | None = None

    def __post_init__(self) -> None:
        if self.clip_norm is not None and not 0.0 < self.clip_norm < math.inf:
            raise ValueError(
                f"clip_norm must be positive and finite, got {self.clip_norm!r}; use None to square "
                "gradients as they are."
            )

    def update(
        self,
        statistics: Sequence[Tensor],
        grads: Sequence[Tensor],
        nonfinite: Sequence[Tensor],
        backend: ModuleType,
    ) -> None:
        """Add the squares."""
        scales = None
        if self.clip_norm is not None:
            # the small constant is that of torch.nn.utils.clip_grad_norm_, which the release calls per tensor
            wide = [torch.float64 if g.dtype == torch.float64 else torch.float32 for g in grads]
            norms = [torch.linalg.vector_norm(g, dtype=dtype) for g, dtype in zip(grads, wide, strict=True)]
            scales = [(self.clip_norm / (norm + 1e-6)).clamp(max=1.0) for norm in norms]
        backend.accumulate_(statistics, grads, nonfinite, kind="squares", grad_scales=scales)


@dataclass(frozen=True)
class CountedSquaredGradient(Statistic):
    """Sum of squared gradients per time that an entry took part, with a penalty on those that often did.

        score = statistic / max(count, 1) * exp(-count / penalty_steps)

    The counts come from whoever switches entries off, through `optimizer.set_count(name, count)`; a parameter
    without counts took part each time, and is ranked by its squares.

    Args:
        penalty_steps: steps after which the penalty is 1/e; None for no penalty.

    References:
        Zhang et al., Fine-Tuning Pre-Trained Language Models Effectively by Optimizing Subnetworks
        Adaptively, NeurIPS 2022 (DPS Mix). The formula is that of the released code.
    """

    counts: ClassVar[bool] = True
    penalty_steps: int | None = None

    def update(
        self,
        statistics: Sequence[Tensor],
        grads: Sequence[Tensor],
        nonfinite: Sequence[Tensor],
        backend: ModuleType,
    ) -> None:
        """Add the squares."""
        backend.accumulate_(statistics, grads, nonfinite, kind="squares")

    def score(self, statistic: Tensor, state: Mapping[str, Any]) -> Tensor:
        """Squares per count, penalised."""
        count = state.get("count")
        if count is None:
            return statistic
        factor: Tensor = 1 / count.clamp(min=1)
        if self.penalty_steps is not None:
            factor = factor * torch.exp(-count / self.penalty_steps)
        return statistic * factor


@dataclass(frozen=True)
class SignedGradient(Statistic):
    """Sum of gradients with their sign; entries are ranked by its magnitude.

        statistic <- statistic + g,  score = |statistic|

    Rewards a consistent direction, where `SquaredGradient` rewards variance.

    References:
        Fu et al., On the Effectiveness of Parameter-Efficient Fine-Tuning, AAAI 2023.
    """

    absolute: ClassVar[bool] = True

    def update(
        self,
        statistics: Sequence[Tensor],
        grads: Sequence[Tensor],
        nonfinite: Sequence[Tensor],
        backend: ModuleType,
    ) -> None:
        """Add the gradients."""
        backend.accumulate_(statistics, grads, nonfinite, kind="signed")


@dataclass(frozen=True)
class CurvatureScaledGradient(Statistic):
    """Square of the summed gradient over the curvature: the decrease that training one entry promises.

        statistic <- statistic + g,  score = statistic^2 / |curvature|

    For a loss with a diagonal, positive Hessian the top k of g^2 / h are the best k entries to train (the
    theorem behind the second-order approximation method). The curvature is what
    `optimizer.observe_curvature(loss)` adds up; sums stand for means, which changes no ranking. An entry
    without curvature promises more than any with.

    References:
        Fu et al., On the Effectiveness of Parameter-Efficient Fine-Tuning, AAAI 2023.
    """

    needs_curvature: ClassVar[bool] = True
    random: ClassVar[bool] = True

    def update(
        self,
        statistics: Sequence[Tensor],
        grads: Sequence[Tensor],
        nonfinite: Sequence[Tensor],
        backend: ModuleType,
    ) -> None:
        """Add the gradients."""
        backend.accumulate_(statistics, grads, nonfinite, kind="signed")

    def score(self, statistic: Tensor, state: Mapping[str, Any]) -> Tensor:
        """Squared gradient over curvature."""
        limits = torch.finfo(torch.float32)
        curvature: Tensor = state["curvature"].abs().clamp(min=limits.tiny)
        return (statistic.square() / curvature).clamp(max=limits.max)


@dataclass(frozen=True)
class RandomScore(Statistic):
    """A score that knows nothing: a fixed random mask of exactly the right size, the control for any
    selection.
    """

    random: ClassVar[bool] = True

    def init(self, param: Tensor, *, seed: int, key: int) -> Tensor:
        """24 random bits per entry, from the optimizer's seed and the parameter's key."""
        entries = torch.arange(param.numel(), device=param.device)
        words = philox_words(seed, purpose_draw(CONTROL_DRAWS, 0), key, entries)
        return (words >> 8).to(torch.float32).view(param.shape)

    def update(
        self,
        statistics: Sequence[Tensor],
        grads: Sequence[Tensor],
        nonfinite: Sequence[Tensor],
        backend: ModuleType,
    ) -> None:
        """Nothing is learnt from gradients."""
        del statistics, grads, nonfinite, backend


@dataclass(frozen=True)
class Magnitude(Statistic):
    """|w| when observation begins: magnitude selection, a control."""

    def init(self, param: Tensor, *, seed: int, key: int) -> Tensor:
        """The magnitudes."""
        del seed, key
        return param.detach().to(torch.float32, memory_format=torch.contiguous_format).abs()

    def update(
        self,
        statistics: Sequence[Tensor],
        grads: Sequence[Tensor],
        nonfinite: Sequence[Tensor],
        backend: ModuleType,
    ) -> None:
        """Nothing is learnt from gradients."""
        del statistics, grads, nonfinite, backend


@dataclass(frozen=True)
class Lowest(Statistic):
    """The entries that another statistic ranks last: the control that should do worse.

    Args:
        statistic: whose ranking is turned round.
    """

    statistic: Statistic

    def __post_init__(self) -> None:
        for needed in ("needs_curvature", "counts", "random"):
            object.__setattr__(self, needed, getattr(self.statistic, needed))

    def init(self, param: Tensor, *, seed: int, key: int) -> Tensor:
        """That of the other statistic."""
        return self.statistic.init(param, seed=seed, key=key)

    def update(
        self,
        statistics: Sequence[Tensor],
        grads: Sequence[Tensor],
        nonfinite: Sequence[Tensor],
        backend: ModuleType,
    ) -> None:
        """That of the other statistic."""
        self.statistic.update(statistics, grads, nonfinite, backend)

    def score(self, statistic: Tensor, state: Mapping[str, Any]) -> Tensor:
        """Its score, negated."""
        score = self.statistic.score(statistic, state)
        return -(score.abs() if self.statistic.absolute else score)
