"""Correctness before speed: what a row computes is compared with float64 arithmetic before it is timed.

The error of float32 (bfloat16) results may exceed that of the same equations in plain PyTorch by eight
roundings of the largest value; masks, statistics and entries that are not trained must agree bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.operands import Operands
from sparse_optim import Bernoulli, MaskedAdamW, TopK
from sparse_optim.backends import reference

# one entry, one short of a word of bits, one more than a tile of random words, and an odd matrix
SHAPES: list[tuple[int, ...]] = [(1,), (31,), (1025,), (37, 53)]
CPU = torch.device("cpu")


class Outcome(NamedTuple):
    """What a kernel writes, and which entries of the weights it trains (None: all, or not to be checked)."""

    values: Sequence[Tensor]  # compared with float64
    exact: Sequence[Tensor] = ()  # compared with the reference, bit for bit
    trained: Sequence[Tensor] | None = None


# sets up calls of a verb: the module, its operands and the learning rate give the call and its outcome
Setup = Callable[[ModuleType, Operands, float], tuple[Callable[[], object], Outcome]]


def wrong_kernel(
    setup: Setup,
    module: ModuleType,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    moments: torch.dtype | None = None,
) -> str | None:
    """Compares three calls on a small problem with the reference, in this dtype and in float64."""
    runs = []
    for backend, where, stored in (
        (module, device, None),
        (reference, CPU, None),
        (reference, CPU, torch.float64),
    ):
        operands = Operands(SHAPES, where, dtype, moments=moments, stored=stored, source=CPU)
        before = [w.clone() for w in operands.weights]
        call, outcome = setup(backend, operands, 1e-2)
        for _ in range(3):
            call()
            operands.renew_gradients()
        runs.append((operands, before, outcome))
    (tested, before, outcome), (_, _, plain), (_, _, truth) = runs
    for mine, theirs in zip(outcome.exact, plain.exact, strict=True):
        if not torch.equal(mine.cpu(), theirs):
            return "differs from the reference in values that must agree bit for bit"
    if outcome.trained is not None:
        for w, old, mask in zip(tested.weights, before, outcome.trained, strict=True):
            if not torch.equal(_raw(w[~mask]), _raw(old[~mask])):
                return "entries that are not selected moved"
    return _too_far(outcome.values, plain.values, truth.values)


def _raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def _too_far(
    tested: Sequence[Tensor], plain: Sequence[Tensor], truth: Sequence[Tensor], allowance: float = 0.0
) -> str | None:
    """What is wrong if any tested value is further from the truth than it may be."""
    for mine, theirs, exact in zip(tested, plain, truth, strict=True):
        if not mine.numel():
            continue
        allowed = furthest([theirs], [exact]) + 8 * torch.finfo(mine.dtype).eps * float(exact.abs().max())
        allowed += allowance
        error = furthest([mine], [exact])
        if error > allowed:
            return f"error {error:.2g} against float64, {allowed:.2g} allowed"
    return None


def furthest(values: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest difference from the exact values; infinite if anything is not a number."""
    worst = max(
        float((value.detach().cpu().double() - truth.cpu()).abs().max())
        for value, truth in zip(values, exact, strict=True)
    )
    return float("inf") if math.isnan(worst) else worst


@torch.no_grad()
def adamw_with_masks(
    params: Sequence[Tensor],
    moments: Sequence[list[Tensor]],
    masks: Sequence[Tensor],
    unselected: str,
    t: int,
    lr: float,
) -> None:
    """AdamW under given masks, written once more and independently, in the dtype of `params`."""
    for p, (exp_avg, exp_avg_sq), mask in zip(params, moments, masks, strict=True):
        grad = torch.where(mask, p.grad, 0.0)
        touched = torch.ones_like(mask) if unselected == "zero_grad" else mask
        exp_avg.copy_(torch.where(touched, 0.9 * exp_avg + 0.1 * grad, exp_avg))
        exp_avg_sq.copy_(torch.where(touched, 0.999 * exp_avg_sq + 0.001 * grad**2, exp_avg_sq))
        move = exp_avg / (1 - 0.9**t) / ((exp_avg_sq / (1 - 0.999**t)).sqrt() + 1e-8)
        p.copy_(torch.where(touched, p * (1 - lr * 0.01) - lr * move, p))


def wrong_adamw(
    build: Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer], device: torch.device, dtype: torch.dtype
) -> str | None:
    """Compares four steps of an AdamW that others wrote, on a small problem, with float64 arithmetic."""
    lr = 1e-2
    small = Operands(SHAPES, device, dtype, source=CPU)
    exact, plain = [w.cpu().double() for w in small.weights], [w.cpu().clone() for w in small.weights]
    exact_moments = [[torch.zeros_like(p), torch.zeros_like(p)] for p in exact]
    plain_moments = [[torch.zeros_like(p, dtype=torch.float32) for _ in range(2)] for p in plain]
    everything = [torch.ones_like(p, dtype=torch.bool) for p in exact]
    optimizer = build(small.params)
    for group in optimizer.param_groups:
        group["lr"] = lr
    for step in range(1, 5):
        small.renew_gradients()
        for params in (exact, plain):
            for p, grad in zip(params, small.grads, strict=True):
                p.grad = grad.to(p)
        optimizer.step()
        adamw_with_masks(exact, exact_moments, everything, "frozen", step, lr)
        adamw_with_masks(plain, plain_moments, everything, "frozen", step, lr)
    # in float32 1 - 0.999 has an error of 6e-5, and so a first move of 1e-2 one of 3e-7; without weight
    # decay the error is 1e-5
    return _too_far(small.weights, plain, exact, allowance=1e-6)


class _Given(torch.autograd.Function):
    """A link of a chain: its backward pass makes the gradient of one parameter, then goes on."""

    @staticmethod
    def forward(ctx: Any, before: Tensor, p: Tensor, grad: Tensor) -> Tensor:
        ctx.grad = grad
        return before.clone()

    @staticmethod
    def backward(ctx: Any, *after: Tensor) -> tuple[Tensor, Tensor, None]:
        # a new tensor that nobody else holds, as a layer's backward pass makes it: autograd copies no further
        return after[0], ctx.grad.clone(), None


def backward(params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """A backward pass whose gradients are copies of these: made one at a time, the last parameter's first.

    It holds nothing else than the gradient that is being made, and a number per parameter. Hooks run.
    """
    loss = torch.zeros((), device=params[0].device)
    for p, grad in zip(params, grads, strict=True):
        loss = _Given.apply(loss, p, grad)
    loss.backward()


def wrong_optimizer(
    policy: Bernoulli | TopK | None, unselected: str, backend: str, device: torch.device, **memory: Any
) -> str | None:
    """Compares four steps of a float32 optimizer on a small problem with float64 arithmetic; masks with those
    of the reference backend, which is given whole gradients.

    Args:
        memory: further options of the optimizer, that save memory and change no result; a statistic in
            bfloat16 may select entries whose scores are a rounding too low.
    """
    lr = 1e-2
    generator = torch.Generator().manual_seed(1)
    start = [torch.randn(shape, generator=generator) for shape in SHAPES]
    tested = [nn.Parameter(p.to(device, copy=True)) for p in start]
    by_reference = [nn.Parameter(p.to(device, copy=True)) for p in start]
    exact, plain = [p.double() for p in start], [p.clone() for p in start]
    exact_moments = [[torch.zeros_like(p), torch.zeros_like(p)] for p in exact]
    plain_moments = [[torch.zeros_like(p), torch.zeros_like(p)] for p in plain]
    options = {"lr": lr, "policy": policy, "unselected": unselected, "seed": 2**40 + 3}
    optimizer = MaskedAdamW(tested, backend=backend, **options, **memory)
    whole = memory | {"release_gradients": False, "observe_unit": "step"}
    by_the_book = MaskedAdamW(by_reference, backend="reference", **options, **whole)
    observed = 1 if isinstance(policy, TopK) else 0
    masks: list[Tensor] = []
    scores = torch.zeros(0)
    for step in range(4):
        grads = [torch.randn(shape, generator=generator) for shape in SHAPES]
        for group in (by_reference, exact, plain):
            for p, grad in zip(group, grads, strict=True):
                p.grad = grad.to(p)
        optimizer.zero_grad()
        backward(tested, [grad.to(device) for grad in grads])
        optimizer.step()
        by_the_book.step()
        if step < observed:
            scores = torch.cat([grad.view(-1).square() for grad in grads])
            continue
        masks = [optimizer.mask(p).cpu() for p in tested]
        expected = [by_the_book.mask(p).cpu() for p in by_reference]
        if not all(map(torch.equal, masks, expected)):
            return f"the mask of step {step} differs from the reference backend's"
        adamw_with_masks(exact, exact_moments, masks, unselected, step + 1 - observed, lr)
        adamw_with_masks(plain, plain_moments, masks, unselected, step + 1 - observed, lr)

    if isinstance(policy, TopK):
        chosen = torch.cat([mask.view(-1) for mask in masks])
        count = int(policy.density * chosen.numel())
        # squares of magnitudes that may each be off by one part in 128
        lowest = 1 - 2**-5 if memory.get("statistic_dtype") == torch.bfloat16 else 1
        if int(chosen.sum()) != count or scores[chosen].min() < lowest * scores[~chosen].max():
            return f"selected {int(chosen.sum())} entries that are not the {count} highest"
    if unselected == "frozen" and isinstance(policy, TopK):
        for p, before, mask in zip(tested, start, masks, strict=True):
            if not torch.equal(p.detach().cpu()[~mask], before[~mask]):
                return "unselected weights moved"
    return _too_far([p.detach().cpu() for p in tested], plain, exact)
