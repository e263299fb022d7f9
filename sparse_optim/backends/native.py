"""The verbs in C++ for the CPU and in CUDA C++ for NVIDIA GPUs: csrc/ says how, `reference` says what.

They run through `torch.ops`, where an argument that is not given is an empty list. Arithmetic and rounding
are the reference's, operation by operation; only the order of the additions in `norm` is another, and it does
not depend on the number of threads.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .reference import Cuts, Draws, Geometry, index_dtype, remap_

__all__ = [
    "accumulate_", "adamw_", "adamw_indexed_", "apply_delta_", "compact", "gather_", "histogram", "norm",
    "remap_", "why_not",
]  # fmt: skip


_BUILD = "python setup.py build_ext --inplace"


def _load(name: str) -> str:
    """Registers the operators of a library; why that cannot be, or nothing."""
    found = importlib.util.find_spec(f".{name}", __package__.rpartition(".")[0])
    if found is None or found.origin is None:
        return f"the native library {name} is not built; `{_BUILD}` builds it or says why not"
    try:
        torch.ops.load_library(found.origin)  # type: ignore[no-untyped-call]
    except OSError as error:
        why = f"does not load with torch {torch.__version__} ({error})"
        return f"the native library {name} {why}; `{_BUILD}` rebuilds it"
    if not hasattr(torch.ops.sparse_optim, "gpu_problem"):
        return f"the native library {name} is that of an older version; `{_BUILD}` rebuilds it"
    return ""


def _count_bins(
    scores: list[Tensor], shift: int, width: int, prefixes: Tensor, per_tensor: bool, *others: object
) -> Tensor:
    return prefixes.new_empty((len(scores) if per_tensor else 1, 1 << width))


def _select(
    scores: list[Tensor], cuts: list[Tensor], as_bits: bool, absolute: bool, geometries: list[int]
) -> list[Tensor]:
    if as_bits:
        return [s.new_empty(-(-s.numel() // 32) * 4, dtype=torch.uint8) for s in scores]
    context = torch.library.get_ctx()
    return [s.new_empty(context.new_dynamic_size(), dtype=index_dtype(s.numel())) for s in scores]


def _add_up_squares(grads: list[Tensor], *others: object) -> Tensor:
    return grads[0].new_empty((), dtype=torch.float64)


_ops = torch.ops.sparse_optim
_IS_LOADED = hasattr(_ops, "gpu_problem")
_UNUSABLE = _load("_C")
if not _UNUSABLE and not _IS_LOADED:
    # the shapes of results, for torch.compile; the other verbs have none
    for _verb, _shapes in (("histogram", _count_bins), ("compact", _select), ("norm", _add_up_squares)):
        torch.library.register_fake(f"sparse_optim::{_verb}", _shapes)


@functools.cache
def _why_not_cuda(index: int | None) -> str:
    """Why the CUDA verbs cannot run on a GPU; empty when they can. Loads them when first asked for."""
    if torch.version.cuda is None:
        return "this torch is not a CUDA build"
    if unusable := _UNUSABLE or _load("_cuda"):
        return unusable
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    problem: str = _ops.gpu_problem(torch.cuda.current_device() if index is None else index)
    return f"its kernels do not run on this GPU ({problem}); `{_BUILD}` builds them for it" if problem else ""


def why_not(device: torch.device | None) -> str:
    """Why these verbs cannot update tensors on `device` (None: on any); empty when they can."""
    if device is None or device.type == "cpu":
        return _UNUSABLE
    if device.type == "cuda":
        return _why_not_cuda(device.index)
    return _UNUSABLE or f"it has no verbs for {device.type} tensors"


class _Numbers:
    """Hyperparameters as the operators take them. What lies on a GPU stays there, unless the steps are
    counted on the host: these must be known there, so that the rest is read out as well.
    """

    def __init__(
        self,
        steps: Sequence[Tensor],
        lr: float | Tensor,
        beta1: float | Tensor,
        beta2: float | Tensor,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        there = _counted_there(steps)
        self.skipped = found_inf is not None and not there and bool(found_inf.item())
        given = (lr, beta1, beta2)
        kept = [x if there and isinstance(x, Tensor) else None for x in given]
        self.values = [
            0.0 if k is not None else x.item() if isinstance(x, Tensor) else x
            for k, x in zip(kept, given, strict=True)
        ]
        self.tensors = (*kept, grad_scale, found_inf if there else None)


def _counted_there(steps: Sequence[Tensor]) -> bool:
    """Whether a kernel counts the steps."""
    return bool(steps) and isinstance(steps[0], Tensor) and not steps[0].is_cpu


def _flat(geometries: Sequence[Geometry] | None) -> list[int]:
    return [] if geometries is None else [number for geometry in geometries for number in geometry]


def _drawn(draws: Draws | None) -> list[int]:
    if draws is None:
        return []
    seed = draws.seed - (1 << 64) if draws.seed >> 63 else draws.seed  # the same 64 bits, signed
    number = draws.draw if _clock(draws) is not None else draws.number
    return [seed, number, draws.threshold, draws.one_word, *draws.keys]


def _clock(*draws: Draws | None) -> Tensor | None:
    """What counts these draws, where kernels read it; a draw for a whole tensor is made on the host."""
    return next((d.clock for d in draws if d and d.clock is not None and _is_there(d.clock, d)), None)


def _is_there(clock: Tensor, draws: Draws) -> bool:
    return not clock.is_cpu and not draws.one_word


def _wrote_to(params: Sequence[Tensor]) -> None:
    """Autograd finds out, as after any operation in place, when a saved tensor has changed."""
    increment_version([param for param in params if not param.is_inference()])


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta1: float | Tensor,
    beta2: float | Tensor,
    eps: float,
    weight_decay: float,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    geometries: Sequence[Geometry] | None = None,
    bits: Sequence[Tensor] | None = None,
    seeded: Draws | None = None,
    scores: Sequence[Tensor] | None = None,
    cuts: Cuts | None = None,
    unselected: str = "frozen",
    rescale: float = 1.0,
    rounding: Draws | None = None,
    found_inf: Tensor | None = None,
    statistics: Sequence[Tensor] = (),
    nonfinite: Sequence[Tensor] = (),
    kind: str = "squares",
    statistic_scales: Sequence[Tensor] | None = None,
    differentiable: bool = False,
) -> None:
    """See `reference.adamw_`. Each gradient is read once, for the statistic and for the update."""
    numbers = _Numbers(steps, lr, beta1, beta2, grad_scale, found_inf)
    if not params or numbers.skipped:
        return
    _ops.adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
        steps,
        *numbers.values,
        eps,
        weight_decay,
        maximize,
        *numbers.tensors,
        _flat(geometries),
        bits or (),
        _drawn(seeded),
        (scores if cuts is not None else None) or (),
        cuts or (),
        unselected,
        rescale,
        _drawn(rounding),
        _clock(seeded, rounding),
        statistics,
        nonfinite,
        kind,
        statistic_scales or (),
    )
    _wrote_to(params)


def adamw_indexed_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    indices: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    masters: Sequence[Tensor],
    ages: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta1: float | Tensor,
    beta2: float | Tensor,
    eps: float,
    weight_decay: float,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    compact_grads: bool = False,
    found_inf: Tensor | None = None,
    differentiable: bool = False,
) -> None:
    """See `reference.adamw_indexed_`."""
    numbers = _Numbers(steps, lr, beta1, beta2, grad_scale, found_inf)
    if not params or numbers.skipped:
        return
    _ops.adamw_indexed_(
        params,
        grads,
        indices,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
        masters,
        ages,
        steps,
        *numbers.values,
        eps,
        weight_decay,
        maximize,
        *numbers.tensors,
        compact_grads,
    )
    _wrote_to(params)


def accumulate_(
    statistics: Sequence[Tensor],
    grads: Sequence[Tensor],
    nonfinite: Sequence[Tensor],
    *,
    kind: str,
    grad_scales: Sequence[Tensor] | None = None,
    first_counts: Tensor | None = None,
    absolute: bool = False,
    rounding: Draws | None = None,
    geometries: Sequence[Geometry] | None = None,
) -> None:
    """See `reference.accumulate_`. `first_counts` rides along: nothing is read again for it."""
    if statistics:
        _ops.accumulate_(
            statistics,
            grads,
            nonfinite,
            kind,
            grad_scales or (),
            () if first_counts is None else (first_counts,),
            absolute,
            _drawn(rounding),
            _flat(geometries),
        )


def histogram(
    scores: Sequence[Tensor],
    *,
    shift: int,
    width: int,
    prefixes: Tensor,
    per_tensor: bool,
    absolute: bool = False,
    ties: Tensor | None = None,
    geometries: Sequence[Geometry] | None = None,
) -> Tensor:
    """See `reference.histogram`."""
    counts: Tensor = _ops.histogram(
        scores,
        shift,
        width,
        prefixes,
        per_tensor,
        absolute,
        () if ties is None else (ties,),
        _flat(geometries),
    )
    return counts


def compact(
    scores: Sequence[Tensor],
    *,
    cuts: Cuts,
    as_bits: bool,
    absolute: bool = False,
    geometries: Sequence[Geometry] | None = None,
) -> list[Tensor]:
    """See `reference.compact`."""
    masks: list[Tensor] = _ops.compact(scores, cuts, as_bits, absolute, _flat(geometries))
    return masks


def gather_(buffers: Sequence[Tensor], tensors: Sequence[Tensor], indices: Sequence[Tensor]) -> None:
    """See `reference.gather_`."""
    if buffers:
        _ops.gather_(buffers, tensors, indices)


def norm(
    grads: Sequence[Tensor],
    *,
    indices: Sequence[Tensor] | None = None,
    geometries: Sequence[Geometry] | None = None,
    bits: Sequence[Tensor] | None = None,
    seeded: Draws | None = None,
) -> Tensor:
    """See `reference.norm`."""
    if not grads:
        return torch.zeros((), dtype=torch.float64)
    total: Tensor = _ops.norm(
        grads, indices or (), _flat(geometries), bits or (), _drawn(seeded), _clock(seeded)
    )
    return total


def apply_delta_(
    params: Sequence[Tensor], indices: Sequence[Tensor], values: Sequence[Tensor], *, mode: str = "replace"
) -> None:
    """See `reference.apply_delta_`."""
    if params:
        _ops.apply_delta_(params, indices, values, mode)
        _wrote_to(params)
