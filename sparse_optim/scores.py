"""Statistics: what is remembered about gradients, and the score that ranks the entries in the end.

A statistic is an immutable record; the optimizer owns the memory. `init` makes the tensor, `accumulates` says
what a gradient adds to it, and `score` reads it out when entries are selected: usually the tensor itself, or
its magnitude (`absolute`).
The last three are controls, which a fair comparison needs: `RandomScore`, `Magnitude`, `Lowest`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from .backends.reference import CONTROL_DRAWS, philox_words, purpose_draw

_KINDS = ("squares", "signed", "absolute", "")


def check_steps(name: str, value: object, remedy: str) -> None:
    """Refuse what is not a positive number of steps; policies and methods count in them too."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}; {remedy}.")


class Statistic:
    """What a `TopK` policy remembers; subclass it as a frozen dataclass to rank entries by something else.

    A subclass says what gradients add with `accumulates`, or writes an `update` of its own.
    """

    accumulates: ClassVar[str]  # "squares", "signed" or "absolute" gradients; "" learns nothing from them
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

    @property
    def begins_at_zero(self) -> bool:
        """Whether `init` makes zeros, which can then be made in any dtype and on any device."""
        return type(self).init is Statistic.init

    def grad_scales(self, grads: Sequence[Tensor]) -> list[Tensor] | None:
        """0-dim factors on the gradients before they are added, or None for 1."""
        del grads
        return None

    def update(
        self,
        statistics: Sequence[Tensor],
        grads: Sequence[Tensor],
        nonfinite: Sequence[Tensor],
        backend: ModuleType,
    ) -> None:
        """Add one gradient per tensor; raise the 0-dim bool flag of a tensor with a non-finite entry."""
        if self.accumulates:
            scales = self.grad_scales(grads)
            backend.accumulate_(statistics, grads, nonfinite, kind=self.accumulates, grad_scales=scales)

    @property
    def is_accumulated(self) -> bool:
        """Whether `accumulates` and `grad_scales` are all there is to an update, so that other passes over
        the gradients can do it along with their own work.
        """
        return type(self).update is Statistic.update and self.accumulates != ""

    @property
    def is_linear(self) -> bool:
        """Whether adding the gradients of micro-batches one by one is adding their sum."""
        plain = type(self).update is Statistic.update and type(self).grad_scales is Statistic.grad_scales
        return plain and self.accumulates in ("signed", "")

    def score(self, statistic: Tensor, state: Mapping[str, Any]) -> Tensor:
        """What ranks the entries, without changing the statistic. `state` is the parameter's whole state."""
        del state
        return statistic

    @property
    def is_its_own_score(self) -> bool:
        """Whether `score` returns the statistic as it is."""
        return type(self).score is Statistic.score

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        kind = getattr(cls, "accumulates", None)
        if cls.update is Statistic.update and kind not in _KINDS:
            raise TypeError(
                f"accumulates of {cls.__name__} must be one of {', '.join(map(repr, _KINDS))}, got {kind!r}; "
                "say what gradients add, or write update()."
            )


def check_statistic(value: object) -> None:
    """Refuse what could not be asked for a score."""
    if not isinstance(value, Statistic) or type(value) is Statistic:
        raise TypeError(
            f"statistic must be a statistic such as SquaredGradient(), got {value!r}; pass an instance."
        )


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

    accumulates: ClassVar[str] = "squares"
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        if self.clip_norm is not None and not 0.0 < self.clip_norm < math.inf:
            raise ValueError(
                f"clip_norm must be positive and finite, got {self.clip_norm!r}; use None to square "
                "gradients as they are."
            )

    def grad_scales(self, grads: Sequence[Tensor]) -> list[Tensor] | None:
        """Factors that clip each gradient's norm."""
        if self.clip_norm is None:
            return None
        # the small constant is that of torch.nn.utils.clip_grad_norm_, which the release calls per tensor
        wide = [torch.float64 if g.dtype == torch.float64 else torch.float32 for g in grads]
        norms = [torch.linalg.vector_norm(g, dtype=dtype) for g, dtype in zip(grads, wide, strict=True)]
        return [(self.clip_norm / (norm + 1e-6)).clamp(max=1.0) for norm in norms]


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

    accumulates: ClassVar[str] = "squares"
    counts: ClassVar[bool] = True
    penalty_steps: int | None = None

    def __post_init__(self) -> None:
        if self.penalty_steps is not None:
            check_steps("penalty_steps", self.penalty_steps, "use None for no penalty")

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

    accumulates: ClassVar[str] = "signed"
    absolute: ClassVar[bool] = True


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

    accumulates: ClassVar[str] = "signed"
    needs_curvature: ClassVar[bool] = True
    random: ClassVar[bool] = True

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

    accumulates: ClassVar[str] = ""
    random: ClassVar[bool] = True

    def init(self, param: Tensor, *, seed: int, key: int) -> Tensor:
        """24 random bits per entry, from the optimizer's seed and the parameter's key."""
        entries = torch.arange(param.numel(), device=param.device)
        words = philox_words(seed, purpose_draw(CONTROL_DRAWS, 0), key, entries)
        return (words >> 8).to(torch.float32).view(param.shape)


@dataclass(frozen=True)
class Magnitude(Statistic):
    """|w| when observation begins: magnitude selection, a control."""

    accumulates: ClassVar[str] = ""

    def init(self, param: Tensor, *, seed: int, key: int) -> Tensor:
        """The magnitudes."""
        del seed, key
        return param.detach().to(torch.float32, memory_format=torch.contiguous_format).abs()


@dataclass(frozen=True)
class Lowest(Statistic):
    """The entries that another statistic ranks last: the control that should do worse.

    Args:
        statistic: whose ranking is turned round.
    """

    statistic: Statistic

    def __post_init__(self) -> None:
        check_statistic(self.statistic)
        for name in ("needs_curvature", "counts", "random"):
            object.__setattr__(self, name, getattr(self.statistic, name))
        # absent where the other statistic has an update of its own
        object.__setattr__(self, "accumulates", getattr(self.statistic, "accumulates", ""))

    def init(self, param: Tensor, *, seed: int, key: int) -> Tensor:
        """That of the other statistic."""
        return self.statistic.init(param, seed=seed, key=key)

    @property
    def begins_at_zero(self) -> bool:
        """As the other statistic does."""
        return self.statistic.begins_at_zero

    def grad_scales(self, grads: Sequence[Tensor]) -> list[Tensor] | None:
        """Those of the other statistic."""
        return self.statistic.grad_scales(grads)

    def update(
        self,
        statistics: Sequence[Tensor],
        grads: Sequence[Tensor],
        nonfinite: Sequence[Tensor],
        backend: ModuleType,
    ) -> None:
        """That of the other statistic."""
        self.statistic.update(statistics, grads, nonfinite, backend)

    @property
    def is_accumulated(self) -> bool:
        """As the other statistic is."""
        return self.statistic.is_accumulated

    @property
    def is_linear(self) -> bool:
        """As the other statistic is."""
        return self.statistic.is_linear

    def score(self, statistic: Tensor, state: Mapping[str, Any]) -> Tensor:
        """Its score, negated."""
        score = self.statistic.score(statistic, state)
        return -(score.abs() if self.statistic.absolute else score)
