"""The published methods, each one constructor call, and the parameter groups that their papers use."""

from __future__ import annotations

import re
from collections.abc import Iterable
from types import EllipsisType
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from .optimizer import MaskedAdamW, Unselected
from .policies import Bernoulli, Policy, Schedule, TopK
from .scores import (
    CountedSquaredGradient,
    CurvatureScaledGradient,
    SignedGradient,
    SquaredGradient,
    Statistic,
    check_steps,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

Fidelity = Literal["paper", "release"]
Betas = tuple[float | Tensor, float | Tensor]


class Options(TypedDict, total=False):
    """Keyword arguments that every method hands on to `MaskedAdamW`, which documents them."""

    seed: int
    backend: str
    state_dtype: torch.dtype | None
    stochastic_rounding: bool
    release_gradients: bool
    max_grad_norm: float | None
    observe_unit: Literal["step", "microbatch"]
    statistic_dtype: torch.dtype | None
    statistic_device: str | torch.device | None
    maximize: bool
    foreach: bool | None
    capturable: bool
    differentiable: bool
    fused: bool | None


class ChildTuningAdamW(MaskedAdamW):
    r"""Child-Tuning: AdamW on a child network, random at each step (F) or chosen by Fisher information once
    (D).

    Variant F, task-free: every entry survives with probability `keep`, drawn anew at each step, and surviving
    gradients are divided by `keep`,

    .. math:: \tilde g_t = g_t \odot m_t / keep, \quad m_t \sim \mathrm{Bernoulli}(keep).

    Unselected entries take the update of a zero gradient in the paper and in the release, so left-over
    momentum moves them. Under AdamW the division is a no-op but for `eps`, and displacement is about
    sqrt(keep) of AdamW's: compare with AdamW at lr * sqrt(keep).

    Variant D, task-driven: the first `observe_steps` calls of `step()` only observe, and nothing moves. Then
    the `density` of masked entries with the largest sum of squared gradients trains, for ever.

    Args:
        params: as in `MaskedAdamW`; `param_groups(model, method="child_tuning_d")` leaves out what the method
            does not mask. Plain `model.parameters()` masks everything.
        lr, betas, eps, weight_decay, amsgrad: as in `torch.optim.AdamW`.
        variant: "F" or "D".
        keep: F only: probability that an entry survives; 0.3 when not given. The paper's p_F.
        density: D only: share of masked entries that trains; 0.3 when not given. The paper's p_D. (The
            released code calls both `reserve_p`.)
        observe_steps: D only, and needed there: how many `step()` calls observe. The released code makes one
            pass over the training set, `len(dataloader)`. None: observation is explicit, by
            `optimizer.observe()`.
        fidelity: "paper", or "release" for what the authors' code does:

            | | "paper" | "release" |
            | --- | --- | --- |
            | F | as above | the same |
            | D, statistic | squared gradients, as observed | clipped to norm 1 per tensor before |
            | D, selected | int(density n), exactly | at or above NumPy's percentile, all ties |
            | D, the others | frozen | weight decay still moves them |

            Observe batches of one example for the paper's sum over examples. The release decays weights after
            the update and torch before it, which differs by lr^2 weight_decay; this is torch's order.

        unselected: as in `MaskedAdamW`; None follows the method.
        options: as in `MaskedAdamW`.

    Raises:
        ValueError: for `keep` with variant D, `density` or `observe_steps` with variant F, and bad values.

    Example:
        >>> import torch
        >>> from sparse_optim import ChildTuningAdamW
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = ChildTuningAdamW(model.parameters(), lr=4e-5, variant="D", observe_steps=100)

    References:
        Xu et al., Raise a Child in Large Language Model: Towards Effective and Generalizable Fine-tuning,
        EMNLP 2021.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        variant: Literal["F", "D"],
        keep: float | None = None,
        density: float | None = None,
        observe_steps: int | EllipsisType | None = ...,
        fidelity: Fidelity = "paper",
        unselected: Unselected | None = None,
        **options: Unpack[Options],
    ) -> None:
        release = _is_release(fidelity)
        policy: Policy
        published: Unselected
        if variant == "F":
            _refuse("density", density, None, variant, "keep")
            _refuse("observe_steps", observe_steps, ..., variant, "keep")
            policy = Bernoulli(0.3 if keep is None else keep, rescale=True)
            published = "zero_grad"
        elif variant == "D":
            _refuse("keep", keep, None, variant, "density")
            observe = _observe(
                observe_steps, "variant='D'", "one pass over the training set: use len(dataloader)"
            )
            policy = TopK(
                0.3 if density is None else density,
                statistic=SquaredGradient(clip_norm=1.0 if release else None),
                schedule=Schedule(observe=observe),
                cut="percentile" if release else "exact",
            )
            published = "zero_grad" if release else "frozen"
        else:
            raise ValueError(
                f"variant must be 'F' or 'D', got {variant!r}; F draws at random, D selects by Fisher."
            )
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad,
            policy=policy, unselected=published if unselected is None else unselected, **options,
        )  # fmt: skip


class DPSAdamW(MaskedAdamW):
    r"""Dynamic parameter selection: `update_steps` dense steps that observe, as many that train a selection,
    and again.

    In stage I everything trains while squared gradients are summed; then, per tensor, the `density` of masked
    entries with the highest score trains in stage II, and the sum starts anew in the next stage I. Stages
    count optimizer steps, never micro-batches.

    Variant "dense" ranks by the sum of squared gradients. Variant "mix" lets stage I mix pre-trained weights
    into the forward pass (`sparse_optim.nn.mix_weights`, which reports how often each input feature took
    part) and ranks by

    .. math:: G / \max(C, 1) \cdot e^{-C / u}, \quad u = \text{update\_steps}.

    Args:
        params: as in `MaskedAdamW`; `param_groups(model, method="dps")` masks the weights of linear layers
            only, as the release does.
        lr, betas, eps, weight_decay, amsgrad: as in `torch.optim.AdamW`.
        variant: "dense" or "mix".
        density: share of each masked tensor that stage II trains. The released scripts pass `reserve_p=0.3`,
            which drops 30 % and keeps 70 %; which of the two the paper's p means is not known.
        update_steps: steps u of each stage.
        update_ratio, total_steps: in place of `update_steps`, u = int(total_steps * update_ratio); the
            scripts use 0.05.
        fidelity: "paper", or "release" for what the authors' code does. The release also sets the model's
            dropout to zero, and clips gradients after the mask (`max_grad_norm=` does): both are yours to
            choose.

            | | "paper" | "release" |
            | --- | --- | --- |
            | selected | int(density n), exactly (our reading) | the top ceil(density n), all ties |
            | the others in stage II | frozen | left-over momentum and weight decay move them |
            | frequency penalty of "mix" | always (our reading) | only when update_steps >= 50 |

        unselected: as in `MaskedAdamW`; None follows the method.
        options: as in `MaskedAdamW`.

    Raises:
        ValueError: when the stage length is missing, given twice, or less than one step; and for bad values.

    Example:
        >>> import torch
        >>> from sparse_optim import DPSAdamW
        >>> model = torch.nn.Linear(4, 2)
        >>> stages = {"update_ratio": 0.05, "total_steps": 690}
        >>> optimizer = DPSAdamW(model.parameters(), lr=2e-5, variant="dense", **stages)
        >>> optimizer.policy.schedule.train
        34

    References:
        Zhang et al., Fine-Tuning Pre-Trained Language Models Effectively by Optimizing Subnetworks
        Adaptively, NeurIPS 2022.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        variant: Literal["dense", "mix"],
        density: float = 0.7,
        update_steps: int | None = None,
        update_ratio: float | None = None,
        total_steps: int | None = None,
        fidelity: Fidelity = "paper",
        unselected: Unselected | None = None,
        **options: Unpack[Options],
    ) -> None:
        release = _is_release(fidelity)
        if variant not in ("dense", "mix"):
            raise ValueError(
                f"variant must be 'dense' or 'mix', got {variant!r}; mix needs sparse_optim.nn.mix_weights."
            )
        steps = _stage_length(update_steps, update_ratio, total_steps)
        statistic: Statistic = SquaredGradient()
        if variant == "mix":
            statistic = CountedSquaredGradient(steps if steps >= 50 or not release else None)
        policy = TopK(
            density,
            statistic=statistic,
            scope="tensor",
            schedule=Schedule(observe=steps, train=steps, meanwhile="everything"),
            cut="ceil" if release else "exact",
        )
        published: Unselected = "zero_grad" if release else "frozen"
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad,
            policy=policy, unselected=published if unselected is None else unselected, **options,
        )  # fmt: skip


class SecondOrderAdamW(MaskedAdamW):
    r"""Second-order approximation method: train the few entries whose training promises the largest decrease.

    The paper calls it SAM; it has nothing to do with sharpness-aware minimisation. For a loss with a diagonal
    Hessian h at the start, the best k entries to train are those with the largest :math:`g_i^2 / h_i`; with h
    bounded by a constant these are the largest :math:`|g_i|`, which is the published rule. The first
    `observe_steps` calls of `step()` sum the gradients with their sign, and nothing moves; then the top
    `density` trains, for ever.

    Args:
        params: as in `MaskedAdamW`; `param_groups(model, method="second_order")` leaves a fresh task head
            unmasked.
        lr, betas, eps, weight_decay, amsgrad: as in `torch.optim.AdamW`.
        density: share of masked entries that trains; the script's 0.005.
        observe_steps: needed: how many `step()` calls observe. The released code sums 599 batches. None:
            observation is explicit, by `optimizer.observe()`.
        scope: "global" or "tensor"; None follows `fidelity`.
        curvature: None, or "hutchinson": rank by g^2 / h with the diagonal Hessian that
            `optimizer.observe_curvature(loss)` estimates. Not the published rule, but the theorem behind it.
        fidelity: "paper", or "release" for what the authors' code does (clip gradients to norm 1 before
            `step()`, as its trainer does):

            | | "paper" | "release" |
            | --- | --- | --- |
            | scope | global | per tensor: those with fewer than 1/density entries get none |
            | the others | frozen | weight decay still moves them |

        unselected: as in `MaskedAdamW`; None follows the method.
        options: as in `MaskedAdamW`.

    Raises:
        ValueError: when `observe_steps` is missing, and for bad values.

    Example:
        >>> import torch
        >>> from sparse_optim import SecondOrderAdamW
        >>> model = torch.nn.Linear(100, 10)
        >>> optimizer = SecondOrderAdamW(model.parameters(), lr=1e-4, observe_steps=599)

    References:
        Fu et al., On the Effectiveness of Parameter-Efficient Fine-Tuning, AAAI 2023.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        density: float = 0.005,
        observe_steps: int | EllipsisType | None = ...,
        scope: Literal["global", "tensor"] | None = None,
        curvature: Literal["hutchinson"] | None = None,
        fidelity: Fidelity = "paper",
        unselected: Unselected | None = None,
        **options: Unpack[Options],
    ) -> None:
        release = _is_release(fidelity)
        observe = _observe(observe_steps, "SecondOrderAdamW", "599 batches")
        if curvature not in (None, "hutchinson"):
            raise ValueError(
                f"curvature must be None or 'hutchinson', got {curvature!r}; None is the published rule."
            )
        policy = TopK(
            density,
            statistic=CurvatureScaledGradient() if curvature else SignedGradient(),
            scope=("tensor" if release else "global") if scope is None else scope,
            schedule=Schedule(observe=observe),
        )
        published: Unselected = "zero_grad" if release else "frozen"
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad,
            policy=policy, unselected=published if unselected is None else unselected, **options,
        )  # fmt: skip


class GradDropAdamW(MaskedAdamW):
    r"""GradDrop: gradients dropped at random before the optimizer sees them, by entry or by layer.

    .. math:: \tilde g = g \odot m, \quad m \sim \mathrm{Bernoulli}(keep)

    The paper has no released code, and its details were not at hand: which of `keep` and drop its p means,
    the meaning of its variants (here {entry, layer} x {step, epoch}), that left-over momentum moves dropped
    entries, and that a fresh head always trains (`param_groups(model, method="grad_drop")`) are our
    definitions.

    | the paper's name | arguments |
    | --- | --- |
    | GradDrop | `granularity="entry", refresh="step"` |
    | GradDrop-Epoch | `granularity="entry", refresh="epoch"` |
    | Layer-GradDrop | `granularity="layer", refresh="step"` |
    | Layer-GradDrop-Epoch | `granularity="layer", refresh="epoch"` |

    Its baseline, gradual unfreezing, is `MaskedAdamW(..., policy=GradualUnfreezing())`.

    Args:
        params: as in `MaskedAdamW`; named for `granularity="layer"`.
        lr, betas, eps, weight_decay, amsgrad: as in `torch.optim.AdamW`.
        keep: probability that an entry, or a layer, keeps its gradient.
        granularity: "entry" or "layer": a numbered layer with all its tensors; parameters outside numbered
            layers (embeddings, pooler) form a layer with the others of their module.
        refresh: draw anew every "step", every "epoch" (begun by `optimizer.new_epoch()`), or every so many
            steps.
        rescale: divide surviving gradients by `keep`; under AdamW only `eps` sees it.
        layers: regular expression that finds a parameter's layer in its name, where the usual rule does not
            fit.
        unselected: as in `MaskedAdamW`; None follows the method ("zero_grad").
        options: as in `MaskedAdamW`.

    Raises:
        ValueError: for bad values. RuntimeError: at the first step when `refresh="epoch"` and `new_epoch()`
            was not called.

    Example:
        >>> import torch
        >>> from sparse_optim import GradDropAdamW
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = GradDropAdamW(model.parameters(), lr=2e-5, keep=0.5)

    References:
        Gradient Sparsification For Masked Fine-Tuning of Transformers, arXiv 2307.10098.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        keep: float,
        granularity: Literal["entry", "layer"] = "entry",
        refresh: Literal["step", "epoch"] | int = "step",
        rescale: bool = False,
        layers: str | None = None,
        unselected: Unselected | None = None,
        **options: Unpack[Options],
    ) -> None:
        if granularity not in ("entry", "layer"):
            raise ValueError(
                f"granularity must be 'entry' or 'layer', got {granularity!r}; choose one of them."
            )
        if refresh not in ("step", "epoch"):
            check_steps("refresh", refresh, "or 'step', or 'epoch'")
        every: Literal["epoch"] | int = 1 if refresh == "step" else refresh
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad,
            policy=Bernoulli(keep, unit=granularity, every=every, rescale=rescale, layers=layers),
            unselected="zero_grad" if unselected is None else unselected, **options,
        )  # fmt: skip


def _is_release(fidelity: str) -> bool:
    if fidelity not in ("paper", "release"):
        raise ValueError(
            f"fidelity must be 'paper' or 'release', got {fidelity!r}; 'paper' follows the paper, 'release' "
            "its code."
        )
    return fidelity == "release"


def _refuse(name: str, value: object, not_given: object, variant: str, instead: str) -> None:
    if value != not_given:
        raise ValueError(
            f"{name} must not be given for variant={variant!r}, got {value!r}; leave it out, or use "
            f"{instead}=."
        )


def _observe(observe_steps: int | EllipsisType | None, where: str, released: str) -> int | None:
    remedy = f"the released code observes {released}, or use None to call optimizer.observe() yourself"
    if isinstance(observe_steps, EllipsisType):
        raise ValueError(f"observe_steps must be given for {where}, got none; {remedy}.")
    if observe_steps is not None:
        check_steps("observe_steps", observe_steps, remedy)
    return observe_steps


def _stage_length(update_steps: int | None, update_ratio: float | None, total_steps: int | None) -> int:
    if update_steps is not None:
        if update_ratio is not None or total_steps is not None:
            raise ValueError(
                f"update_steps must come alone, got {update_steps!r} with update_ratio={update_ratio!r} and "
                f"total_steps={total_steps!r}; give one or the other."
            )
        check_steps("update_steps", update_steps, "or give update_ratio and total_steps")
        return update_steps
    if update_ratio is None or total_steps is None:
        raise ValueError(
            "update_steps must be given, got none; or give update_ratio=0.05 and total_steps=, as the "
            "released scripts do."
        )
    steps = int(total_steps * update_ratio)
    if steps < 1:
        raise ValueError(
            f"update_ratio must give stages of at least one step, got {steps} steps from {update_ratio!r} of "
            f"{total_steps!r}; raise update_ratio, or give update_steps."
        )
    return steps


# heads that a pre-trained checkpoint does not contain, by the names that model families give them
_FRESH_HEAD = re.compile(
    r"(^|\.)(classifier|score|classification_head|qa_outputs|pre_classifier|sequence_summary)\."
)
_NORM_NAMES = re.compile(r"bias$|layernorm|rmsnorm|(^|\.)norm($|\.)|_norm($|\.)", re.IGNORECASE)
_METHODS = ("child_tuning_f", "child_tuning_d", "dps", "second_order", "grad_drop")


def param_groups(
    model: nn.Module,
    *,
    method: str | None = None,
    fidelity: Fidelity = "paper",
    weight_decay: float = 1e-2,
    exempt: Iterable[str] | None = None,
) -> list[dict[str, Any]]:
    """Named parameter groups with the usual split of weight decay and the exemptions of a method.

    Biases and the parameters of normalisation layers are not decayed (`fidelity="release"`: those whose name
    contains "bias" or "LayerNorm.weight"). Parameters that do not require a gradient are left out, tied ones
    appear once.

    | method | trained densely (`masked=False`) |
    | --- | --- |
    | None | nothing |
    | `"child_tuning_f"` | nothing, in paper and release |
    | `"child_tuning_d"` | a fresh task head; `"release"`: whatever has no "layer" in its name |
    | `"dps"` | everything but the weights of linear layers, as released; the paper's set is not known |
    | `"second_order"`, `"grad_drop"` | a fresh task head (for the second, our definition) |

    Args:
        model: any module. method: None or a name from the table.
        weight_decay: of the decayed groups.
        exempt: regular expressions, searched in parameter names, in place of the table's exemptions.

    Returns:
        Groups for any optimizer that takes named parameters, `torch.optim.AdamW` included; empty ones are
        left out.

    Raises:
        ValueError: for an unknown method, or a model in which the method would mask nothing.

    Example:
        >>> import torch
        >>> from sparse_optim import param_groups
        >>> model = torch.nn.ModuleDict({"layer": torch.nn.Linear(2, 2), "classifier": torch.nn.Linear(2, 2)})
        >>> groups = param_groups(model, method="child_tuning_d")
        >>> [(group["masked"], group["weight_decay"]) for group in groups]
        [(True, 0.01), (True, 0.0), (False, 0.01), (False, 0.0)]
    """
    release = _is_release(fidelity)
    if method is not None and method not in _METHODS:
        raise ValueError(
            f"method must be None or one of {', '.join(_METHODS)}, got {method!r}; choose one of them."
        )
    if isinstance(exempt, str):
        raise TypeError(f"exempt must be a list of regular expressions, got {exempt!r}; write [{exempt!r}].")
    patterns = None if exempt is None else [re.compile(pattern) for pattern in exempt]

    def parameters_of(*kinds: type[nn.Module], named: str = "") -> set[int]:
        modules = [m for m in model.modules() if isinstance(m, kinds) or type(m).__name__ == named]
        return {id(p) for module in modules for p in module.parameters()}

    norms = parameters_of(nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
    # GPT-2's linear layers have a class of their own, and an output layer tied to the embeddings is one of
    # these
    linear = parameters_of(nn.Linear, named="Conv1D") - parameters_of(nn.Embedding)

    def masked(name: str, p: Tensor) -> bool:
        if patterns is not None:
            return not any(pattern.search(name) for pattern in patterns)
        if method == "child_tuning_d" and release:
            return "layer" in name
        if method == "dps":
            return id(p) in linear and p.dim() == 2
        return method in (None, "child_tuning_f") or not _FRESH_HEAD.search(name)

    def decayed(name: str, p: Tensor) -> bool:
        if release:
            return "bias" not in name and "LayerNorm.weight" not in name
        return id(p) not in norms and not _NORM_NAMES.search(name)

    groups: dict[tuple[bool, bool], list[tuple[str, Tensor]]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups.setdefault((masked(name, p), decayed(name, p)), []).append((name, p))
    if not any(is_masked for is_masked, _ in groups):
        raise ValueError(
            f"method={method!r} must leave something to mask in {type(model).__name__}, got only exempt "
            "parameters; "
            "give exempt= for a model with other names."
        )
    return [
        {"params": params, "weight_decay": weight_decay if is_decayed else 0.0, "masked": is_masked}
        for (is_masked, is_decayed), params in sorted(groups.items(), reverse=True)
    ]
