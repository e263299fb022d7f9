"""The published methods, each one constructor call, and the parameter groups that their papers use."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from .optimizer import MaskedAdamW, Unselected
from .policies import Bernoulli, Policy, Schedule, TopK
from .scores import SquaredGradient

Fidelity = Literal["paper", "release"]


class ChildTuningAdamW(MaskedAdamW):
    r"""Child-Tuning: AdamW on a child network, random at each step (F) or chosen by Fisher information once (D).

    Variant F, task-free: every entry survives with probability `keep`, drawn anew at each step, and surviving
    gradients are divided by `keep`,

    .. math:: \tilde g_t = g_t \odot m_t / keep, \quad m_t \sim \mathrm{Bernoulli}(keep).

    Unselected entries take the update of a zero gradient in the paper and in the release, so left-over momentum moves
    them. Under AdamW the division is a no-op but for `eps`, and displacement is about sqrt(keep) of AdamW's: compare
    with AdamW at lr * sqrt(keep).

    Variant D, task-driven: the first `observe_steps` calls of `step()` only observe, and nothing moves. Then the
    `density` of masked entries with the largest sum of squared gradients trains, for ever.

    Args:
        params: as in `MaskedAdamW`; `param_groups(model, method="child_tuning_d")` leaves out what the method does not
            mask. Plain `model.parameters()` masks everything.
        variant: "F" or "D".
        keep: F only: probability that an entry survives; 0.3 when not given. The paper's p_F.
        density: D only: share of masked entries that trains; 0.3 when not given. The paper's p_D. (The released code
            calls both `reserve_p`.)
        observe_steps: D only, and needed there: how many `step()` calls observe. The released code makes one pass over
            the training set, `len(dataloader)`. None: observation is explicit, by `optimizer.observe()`.
        fidelity: "paper", or "release" for what the authors' code does:

            | | "paper" | "release" |
            | --- | --- | --- |
            | F | as above | the same |
            | D, Fisher information | squared gradients, as observed (use batches of one for the paper's sum over examples) | of gradients clipped to norm 1 per tensor |
            | D, selected | exactly int(density n), ties to the lowest index | at or above NumPy's percentile: all ties |
            | D, the others | frozen | weight decay still moves them |

        Everything else as in `MaskedAdamW`.

    Raises:
        ValueError: for `keep` with variant D, `density` or `observe_steps` with variant F, and bad values.

    Example:
        >>> import torch
        >>> from sparse_optim import ChildTuningAdamW
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = ChildTuningAdamW(model.parameters(), lr=4e-5, variant="D", density=0.3, observe_steps=100)

    References:
        Xu et al., Raise a Child in Large Language Model: Towards Effective and Generalizable Fine-tuning, EMNLP 2021.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        variant: Literal["F", "D"],
        keep: float | None = None,
        density: float | None = None,
        observe_steps: int | None = 0,
        fidelity: Fidelity = "paper",
        unselected: Unselected | None = None,
        seed: int = 0,
        backend: str = "auto",
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        release_gradients: bool = False,
        max_grad_norm: float | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        _check_fidelity(fidelity)
        policy: Policy
        if variant == "F":
            _refuse("density", density, None, variant, "keep")
            _refuse("observe_steps", observe_steps, 0, variant, "keep")
            policy = Bernoulli(0.3 if keep is None else keep, rescale=True)
            published: Unselected = "zero_grad"
        elif variant == "D":
            _refuse("keep", keep, None, variant, "density")
            if observe_steps == 0:
                raise ValueError(
                    "observe_steps must be given for variant='D', got none; the released code observes one pass over the "
                    "training set: use len(dataloader), or None to call optimizer.observe() yourself."
                )
            release = fidelity == "release"
            policy = TopK(
                0.3 if density is None else density,
                statistic=SquaredGradient(clip_norm=1.0 if release else None),
                schedule=Schedule(observe=observe_steps),
                cut="percentile" if release else "exact",
            )
            published = "zero_grad" if release else "frozen"
        else:
            raise ValueError(f"variant must be 'F' or 'D', got {variant!r}; F draws at random, D selects by Fisher.")
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            policy=policy,
            unselected=published if unselected is None else unselected,
            seed=seed,
            backend=backend,
            state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding,
            release_gradients=release_gradients,
            max_grad_norm=max_grad_norm,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )


def _check_fidelity(fidelity: str) -> None:
    if fidelity not in ("paper", "release"):
        raise ValueError(
            f"fidelity must be 'paper' or 'release', got {fidelity!r}; 'paper' follows the paper, 'release' its code."
        )


def _refuse(name: str, value: object, not_given: object, variant: str, instead: str) -> None:
    if value != not_given:
        raise ValueError(f"{name} must not be given for variant={variant!r}, got {value!r}; it uses {instead}.")


# heads that a pre-trained checkpoint does not contain, by the names that model families give them
_FRESH_HEADS = re.compile(r"(^|\.)(classifier|score|classification_head|qa_outputs|pre_classifier|sequence_summary)\.")
_NORM_NAMES = re.compile(r"bias$|layernorm|rmsnorm|(^|\.)norm($|\.)|_norm($|\.)", re.IGNORECASE)
_METHODS = ("child_tuning_f", "child_tuning_d")


def param_groups(
    model: nn.Module,
    *,
    method: str | None = None,
    fidelity: Fidelity = "paper",
    weight_decay: float = 1e-2,
    exempt: Iterable[str] | None = None,
) -> list[dict[str, Any]]:
    """Named parameter groups with the usual split of weight decay and the exemptions of a method.

    Biases and the parameters of normalisation layers are not decayed (`fidelity="release"`: those whose name contains
    "bias" or "LayerNorm.weight"). Parameters that do not require a gradient are left out, tied ones appear once.

    | method | trained densely (`masked=False`) |
    | --- | --- |
    | None | nothing |
    | `"child_tuning_f"` | nothing, in paper and release |
    | `"child_tuning_d"` | a fresh task head; `"release"`: everything whose name lacks "layer" (embeddings, pooler, head) |

    Args:
        model: any module. method: None or a name from the table.
        weight_decay: of the decayed groups.
        exempt: regular expressions, searched in parameter names, in place of the table's exemptions.

    Returns:
        Groups for any optimizer that takes named parameters, `torch.optim.AdamW` included; empty ones are left out.

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
    _check_fidelity(fidelity)
    if method is not None and method not in _METHODS:
        raise ValueError(f"method must be None or one of {', '.join(_METHODS)}, got {method!r}; choose one of them.")
    patterns = None if exempt is None else [re.compile(pattern) for pattern in exempt]
    norms = {
        name
        for module_name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for name in (f"{module_name}.weight", f"{module_name}.bias", "weight", "bias")
        if module_name or "." not in name
    }
    groups: dict[tuple[bool, bool], list[tuple[str, Tensor]]] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if patterns is not None:
            masked = not any(pattern.search(name) for pattern in patterns)
        elif method == "child_tuning_d":
            masked = "layer" in name if fidelity == "release" else not _FRESH_HEADS.search(name)
        else:
            masked = True
        if fidelity == "release":
            decayed = "bias" not in name and "LayerNorm.weight" not in name
        else:
            decayed = name not in norms and not _NORM_NAMES.search(name)
        groups.setdefault((masked, decayed), []).append((name, p))
    if not any(masked for masked, _ in groups):
        raise ValueError(
            f"method={method!r} must leave something to mask in {type(model).__name__}, got only exempt parameters; "
            "give exempt= for a model with other names."
        )
    return [
        {"params": params, "weight_decay": weight_decay if decayed else 0.0, "masked": masked}
        for (masked, decayed), params in sorted(groups.items(), reverse=True)
    ]
