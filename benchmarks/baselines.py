"""How fast is a step? Ours against torch's own and against what released code writes with torch ops.

    python -m benchmarks.baselines                 on the GPU if there is one, else smaller, on the CPU
    python -m benchmarks.baselines --only top-k    questions whose name contains this

Bytes that the ideal implementation moves, for n float32 weights of which a share d is selected
- plain copy: 8 n, the roof that every other row is held against. (A processor reads the lines that it writes:
  a copy moves half as much again there, and more than 100 % of it can be reached.)
- dense AdamW: 28 n. It reads weight, gradient and two moments, and writes all but the gradient. Masks with
  parameter-shaped moments cost the same, and stored bits n / 8 more; a seeded mask is never stored and costs
  nothing.
- compact moments: 20 d n for moments (read and written) and indices, and 12 bytes of weight and gradient for
  every entry of a memory line (32 bytes on a GPU, 64 on a CPU) that holds a selected one.
- exact top-k: 16 n + 4 d n. Three histogram rounds and one compaction read the scores; indices are written.

Results go to benchmarks/results, one CSV per machine; `benchmarks.report` renders it.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.harness import Bar, Record, Row, Step, free, measure, results_path, surroundings, write_csv
from sparse_optim import Bernoulli, MaskedAdamW, Schedule, TopK, backends

# tiny, so that weights stay what they are over thousands of steps
LR = 1e-7
KEEP = 0.3
BITS_DENSITY = 0.3
TOP_K_DENSITY = 0.01
FUSED = "torch fused"
COPY = "plain copy"

Shapes = list[tuple[int, ...]]


def transformer_shapes(hidden: int, layers: int, vocabulary: int) -> Shapes:
    """Shapes of a BERT-like encoder with its pooler."""
    h, norm = hidden, [(hidden,), (hidden,)]
    layer = [(h, h), (h,)] * 4 + norm + [(4 * h, h), (4 * h,), (h, 4 * h), (h,)] + norm
    return [(vocabulary, h), (512, h), (2, h), *norm, *layer * layers, (h, h), (h,)]


BERT_BASE = (768, 12, 30522)
MINI_LM = (384, 6, 30522)
# largest first: 1.0e9, 335e6, 109e6 and 23e6 parameters
GPU_SIZES = ((2048, 19, 32000), (1024, 24, 30522), BERT_BASE, MINI_LM)
# as many tensors as BERT-base, of 2.6 million entries in all: the cost of many small calls shows
SMALL_TENSORS = (128, 12, 1000)
CPU_SCORES = (512, 6, 25000)
# what the hungriest question holds per parameter: weights, gradients, the copy's two buffers, the moments of
# six optimizers, and the temporaries of a foreach step
HELD_BYTES = 84


class Weights:
    """Parameters with random gradients, shared by all rows of a question."""

    def __init__(self, shapes: Shapes, device: torch.device) -> None:
        torch.manual_seed(0)
        self.device = device
        self.params = [nn.Parameter(torch.randn(shape, device=device) * 0.02) for shape in shapes]
        for p in self.params:
            p.grad = torch.randn_like(p) * 1e-3
        self.numel = sum(p.numel() for p in self.params)

    def with_own_gradients(self) -> list[nn.Parameter]:
        """The same weights with a copy of the gradients, for formulations that write to them."""
        aliases = [nn.Parameter(p.data) for p in self.params]
        for alias, p in zip(aliases, self.params, strict=True):
            alias.grad = None if p.grad is None else p.grad.clone()
        return aliases


# what torch offers


def plain_copy(weights: Weights) -> Row:
    """The bandwidth roof."""

    def make() -> Step:
        source = torch.zeros(weights.numel, device=weights.device)
        target = torch.zeros_like(source)
        return lambda: target.copy_(source)

    return Row(COPY, 8 * weights.numel, make)


def torch_adamw(weights: Weights, name: str, **implementation: bool) -> Row:
    """AdamW of torch.optim, dense."""
    return Row(
        name, 28 * weights.numel, lambda: torch.optim.AdamW(weights.params, lr=LR, **implementation).step
    )


def masked_gradient(
    weights: Weights, name: str, mask_: Callable[[int, Tensor], object], ideal_bytes: float
) -> Row:
    """A torch op zeroes gradient entries in place, then AdamW (fused) runs: what released code does."""

    def make() -> Step:
        params = weights.with_own_gradients()
        optimizer = torch.optim.AdamW(params, lr=LR, fused=True)

        @torch.no_grad()
        def step() -> None:
            for number, p in enumerate(params):
                mask_(number, p.grad)
            optimizer.step()

        return step

    return Row(name, ideal_bytes, make)


def mask_by_distributions(number: int, grad: Tensor) -> object:
    """The line of Child-Tuning's release."""
    mask = torch.distributions.Bernoulli(grad.new_full(grad.size(), KEEP))
    return grad.mul_(mask.sample() / KEEP)


def mask_by_rand(number: int, grad: Tensor) -> object:
    """The same with torch.rand."""
    return grad.mul_(torch.rand_like(grad) < KEEP)


class GatheredAdamW:
    """AdamW on selected entries with compact moments, in plain torch: gather, update, scatter."""

    def __init__(self, params: Sequence[Tensor], selected: Sequence[Tensor], lr: float = LR) -> None:
        self.params, self.lr, self.t = params, lr, 0
        self.indices = [mask.view(-1).nonzero().view(-1) for mask in selected]
        self.exp_avgs = [torch.zeros(where.numel(), device=where.device) for where in self.indices]
        self.exp_avg_sqs = [torch.zeros_like(exp_avg) for exp_avg in self.exp_avgs]

    @torch.no_grad()
    def step(self) -> None:
        """Updates the selected entries."""
        self.t += 1
        for p, where, exp_avg, exp_avg_sq in zip(
            self.params, self.indices, self.exp_avgs, self.exp_avg_sqs, strict=True
        ):
            grad, flat = p.grad.view(-1)[where], p.data.view(-1)
            value = flat[where].mul_(1 - self.lr * 0.01)
            exp_avg.lerp_(grad, 1 - 0.9)
            exp_avg_sq.mul_(0.999).addcmul_(grad, grad, value=1 - 0.999)
            denom = (exp_avg_sq.sqrt() / (1 - 0.999**self.t) ** 0.5).add_(1e-8)
            flat[where] = value.addcdiv_(exp_avg, denom, value=-self.lr / (1 - 0.9**self.t))


# ours


def ours(
    weights: Weights,
    ideal_bytes: float,
    *,
    policy: Bernoulli | TopK | None,
    unselected: str = "frozen",
    bars: tuple[Bar, ...] = (),
    label: str = "",
) -> list[Row]:
    """One row per backend. The reference is held to a bar only where nothing else is installed."""
    rows = []
    for backend in backends.available():

        def make(backend: str = backend) -> Step:
            optimizer = MaskedAdamW(
                weights.params, lr=LR, policy=policy, unselected=unselected, backend=backend
            )
            if isinstance(policy, TopK):
                # observes and selects: no part of a step that trains
                optimizer.step()
            return optimizer.step

        rows.append(
            Row(
                f"sparse_optim{label}, {backend}",
                ideal_bytes,
                make,
                check=lambda backend=backend: wrong(policy, unselected, backend, weights.device),
                bars=bars if len(backends.available()) == 1 or backend != "reference" else (),
            )
        )
    return rows


def observe_once(density: float) -> TopK:
    """The policy that selects at the end of its first step, and trains the selection for ever."""
    return TopK(density, schedule=Schedule(observe=1))


# correctness before speed


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


def wrong(policy: Bernoulli | TopK | None, unselected: str, backend: str, device: torch.device) -> str | None:
    """Compares four steps on a small problem with float64 arithmetic; returns what is wrong, or None.

    The error may exceed that of the same equations in float32 by eight roundings of the largest weight.
    """
    lr = 1e-2
    generator = torch.Generator().manual_seed(1)
    shapes = [(1,), (31,), (1025,), (37, 53)]
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    tested = [nn.Parameter(p.to(device, copy=True)) for p in start]
    by_reference = [nn.Parameter(p.to(device, copy=True)) for p in start]
    exact, plain = [p.double() for p in start], [p.clone() for p in start]
    exact_moments = [[torch.zeros_like(p), torch.zeros_like(p)] for p in exact]
    plain_moments = [[torch.zeros_like(p), torch.zeros_like(p)] for p in plain]
    options = {"lr": lr, "policy": policy, "unselected": unselected, "seed": 2**40 + 3}
    optimizer = MaskedAdamW(tested, backend=backend, **options)
    reference = MaskedAdamW(by_reference, backend="reference", **options)
    observed = 1 if isinstance(policy, TopK) else 0
    masks: list[Tensor] = []
    for step in range(4):
        grads = [torch.randn(shape, generator=generator) for shape in shapes]
        for group in (tested, by_reference, exact, plain):
            for p, grad in zip(group, grads, strict=True):
                p.grad = grad.to(p)
        optimizer.step()
        reference.step()
        if step < observed:
            scores = torch.cat([grad.view(-1).square() for grad in grads])
            continue
        masks = [optimizer.mask(p).cpu() for p in tested]
        expected = [reference.mask(p).cpu() for p in by_reference]
        if not all(map(torch.equal, masks, expected)):
            return f"the mask of step {step} differs from the reference backend's"
        adamw_with_masks(exact, exact_moments, masks, unselected, step + 1 - observed, lr)
        adamw_with_masks(plain, plain_moments, masks, unselected, step + 1 - observed, lr)

    if isinstance(policy, TopK):
        chosen = torch.cat([mask.view(-1) for mask in masks])
        count = int(policy.density * chosen.numel())
        if int(chosen.sum()) != count or scores[chosen].min() < scores[~chosen].max():
            return f"selected {int(chosen.sum())} entries that are not the {count} highest"
        if unselected == "frozen" and any(
            not torch.equal(p.detach().cpu()[~mask], before[~mask])
            for p, before, mask in zip(tested, start, masks, strict=True)
        ):
            return "unselected weights moved"
    largest = max(float(p.abs().max()) for p in exact)
    allowed = furthest(plain, exact) + 8 * torch.finfo(torch.float32).eps * largest
    error = furthest([p.detach().cpu() for p in tested], exact)
    return None if error <= allowed else f"error {error:.2g} against float64, {allowed:.2g} allowed"


def furthest(values: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest difference from the exact values; infinite if anything is not a number."""
    worst = max(
        float((value.double() - truth).abs().max()) for value, truth in zip(values, exact, strict=True)
    )
    return float("inf") if math.isnan(worst) else worst


def wrong_gather(device: torch.device) -> str | None:
    """The same check for the gather and scatter formulation."""
    torch.manual_seed(1)
    tested = [nn.Parameter(torch.randn(37, 53, device=device))]
    mask = torch.rand(37, 53) < 0.3
    exact = [tested[0].detach().cpu().double()]
    moments = [[torch.zeros_like(exact[0]), torch.zeros_like(exact[0])]]
    optimizer = GatheredAdamW(tested, [mask.to(device)], lr=1e-2)
    for step in range(4):
        tested[0].grad = torch.randn(37, 53, device=device)
        exact[0].grad = tested[0].grad.cpu().double()
        optimizer.step()
        adamw_with_masks(exact, moments, [mask], "frozen", step + 1, 1e-2)
    error = furthest([tested[0].detach().cpu()], exact)
    return None if error < 1e-5 else f"error {error:.2g} against float64"


# the questions: name, anchor, rows


def dense(weights: Weights) -> list[Row]:
    """Everything trains."""
    return [
        plain_copy(weights),
        torch_adamw(weights, FUSED, fused=True),
        torch_adamw(weights, "torch foreach", foreach=True),
        torch_adamw(weights, "torch for-loop", foreach=False, fused=False),
        *ours(weights, 28 * weights.numel, policy=None, bars=(Bar(1.0, (FUSED,)),)),
    ]


def bernoulli(weights: Weights) -> list[Row]:
    """Every entry is selected with probability 0.3, drawn anew at each step; moments of the others decay."""
    ideal, released, rand = 28 * weights.numel, "torch.distributions mask, fused", "torch.rand mask, fused"
    on_gpu = weights.device.type == "cuda"
    # mask written and read as float32, gradient read and written once more: 28 becomes 44 bytes
    bars = (
        (Bar(1 / 1.05, (FUSED,)), Bar(0.9 * 44 / 28, (released, rand)))
        if on_gpu
        else (Bar(1 / 1.5, (FUSED,)), Bar(18, (released,)))
    )
    return [
        plain_copy(weights),
        torch_adamw(weights, FUSED, fused=True),
        masked_gradient(weights, released, mask_by_distributions, ideal),
        masked_gradient(weights, rand, mask_by_rand, ideal),
        *ours(weights, ideal, policy=Bernoulli(KEEP), unselected="zero_grad", bars=bars),
    ]


def bits(weights: Weights) -> list[Row]:
    """A fixed mask of 30 % with parameter-shaped moments; moments of the others decay."""
    ideal, multiplied = (28 + 1 / 8) * weights.numel, "bool mask multiply, fused"
    on_gpu = weights.device.type == "cuda"
    # bool mask read, gradient read and written once more: 28 becomes 37 bytes
    bars = (
        (Bar(1 / 1.05, (FUSED,)), Bar(0.9 * 37 / 28, (multiplied,))) if on_gpu else (Bar(1 / 1.3, (FUSED,)),)
    )
    masks = [torch.rand_like(p) < BITS_DENSITY for p in weights.params]
    return [
        plain_copy(weights),
        torch_adamw(weights, FUSED, fused=True),
        masked_gradient(weights, multiplied, lambda number, grad: grad.mul_(masks[number]), ideal),
        *ours(weights, ideal, policy=observe_once(BITS_DENSITY), unselected="zero_grad", bars=bars),
    ]


def indexed(weights: Weights, density: float) -> list[Row]:
    """A fixed selection with compact moments; everything else is frozen."""
    on_gpu = weights.device.type == "cuda"
    factor = {0.01: 12, 0.1: 2, 0.3: 1}[density] if on_gpu else {0.01: 8, 0.1: 1.8, 0.3: 1.2}[density]
    entries_per_line = 8 if on_gpu else 16
    ideal = (20 * density + 12 * (1 - (1 - density) ** entries_per_line)) * weights.numel
    gathered = Row(
        "gather, update, scatter in torch",
        ideal,
        lambda: GatheredAdamW(weights.params, [torch.rand_like(p) < density for p in weights.params]).step,
        check=lambda: wrong_gather(weights.device),
    )
    return [
        plain_copy(weights),
        torch_adamw(weights, FUSED, fused=True),
        gathered,
        *ours(weights, ideal, policy=observe_once(density), bars=(Bar(factor, (FUSED,)),)),
    ]


def small_tensors(weights: Weights) -> list[Row]:
    """As many tensors as BERT-base has: launches count."""
    return [
        plain_copy(weights),
        torch_adamw(weights, FUSED, fused=True),
        torch_adamw(weights, "torch foreach", foreach=True),
        torch_adamw(weights, "torch for-loop", foreach=False, fused=False),
        *ours(weights, 28 * weights.numel, policy=None, bars=(Bar(1.0, (FUSED,)),), label=" dense"),
        *ours(
            weights,
            28 * weights.numel,
            policy=Bernoulli(KEEP),
            unselected="zero_grad",
            bars=(Bar(1.0, (FUSED,)),),
            label=" Bernoulli",
        ),
    ]


def top_k(weights: Weights) -> list[Row]:
    """The highest 1 % of all scores, exactly. torch and numpy get them as one flat tensor for nothing."""
    ideal = (16 + 4 * TOP_K_DENSITY) * weights.numel
    count = int(TOP_K_DENSITY * weights.numel)
    names = ("torch.topk", "torch.kthvalue (threshold only)", "np.percentile (threshold only)")
    on_gpu = weights.device.type == "cuda"

    def scores() -> Tensor:
        return torch.cat([p.grad.view(-1).square() for p in weights.params])

    def make_topk() -> Step:
        flat = scores()
        return lambda: torch.topk(flat, count, sorted=False)

    def make_kthvalue() -> Step:
        flat = scores()
        return lambda: torch.kthvalue(flat, flat.numel() - count + 1)

    def make_percentile() -> Step:
        flat = scores()
        return lambda: np.percentile(flat.cpu().numpy(), 100 * (1 - TOP_K_DENSITY))

    def make_ours(backend: str) -> tuple[Step, Step]:
        holder: list[MaskedAdamW] = []

        def before() -> None:
            # a statistic is dropped at selection: each one needs its own optimizer and observation
            holder[:] = [MaskedAdamW(weights.params, lr=LR, policy=TopK(TOP_K_DENSITY), backend=backend)]
            holder[0].observe()

        return lambda: holder[0].select(), before

    bar = Bar(5, names[:1]) if on_gpu else Bar(8, names)
    return [
        plain_copy(weights),
        *(
            Row(name, ideal, make)
            for name, make in zip(names, (make_topk, make_kthvalue, make_percentile), strict=True)
        ),
        *(
            Row(
                f"sparse_optim select(), {backend}",
                ideal,
                lambda backend=backend: make_ours(backend),
                check=lambda backend=backend: wrong(
                    observe_once(TOP_K_DENSITY), "frozen", backend, weights.device
                ),
                bars=(bar,) if len(backends.available()) == 1 or backend != "reference" else (),
            )
            for backend in backends.available()
        ),
    ]


def questions(
    device: torch.device,
) -> list[tuple[str, str, tuple[int, int, int], Callable[[Weights], list[Row]]]]:
    """Name, anchor, size and rows of every question."""
    if device.type == "cuda":
        memory = torch.cuda.mem_get_info(device)[0]
        large = next(
            size
            for size in GPU_SIZES
            if size is GPU_SIZES[-1] or numel(transformer_shapes(*size)) * HELD_BYTES < memory
        )
        small, scores = BERT_BASE, large
    else:
        large, small, scores = MINI_LM, SMALL_TENSORS, CPU_SCORES
    return [
        ("dense", FUSED, large, dense),
        ("Bernoulli, keep 0.3, zero_grad", FUSED, large, bernoulli),
        ("bits, density 0.3, zero_grad", FUSED, large, bits),
        *(
            (f"indexed, density {d}, frozen", FUSED, large, lambda weights, d=d: indexed(weights, d))
            for d in (0.01, 0.1, 0.3)
        ),
        (f"small tensors ({len(transformer_shapes(*small))})", FUSED, small, small_tensors),
        (f"exact top-k, density {TOP_K_DENSITY}", "torch.topk", scores, top_k),
    ]


def numel(shapes: Shapes) -> int:
    """Entries of all shapes together."""
    return sum(int(np.prod(shape)) for shape in shapes)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures all questions and writes them to one CSV, after each question."""
    started = time.perf_counter()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="questions whose name contains this")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=8.0, help="measuring time per question")
    parser.add_argument("--output", type=Path, help="the CSV; default: benchmarks/results/<machine>.csv")
    options = parser.parse_args(arguments)

    device = torch.device(options.device)
    output = options.output or results_path(device)
    shared = surroundings(device)
    records: list[Record] = []
    for name, anchor, size, build in questions(device):
        if options.only not in name:
            continue
        weights = Weights(transformer_shapes(*size), device)
        found = measure(
            name,
            build(weights),
            parameters=weights.numel,
            anchor=anchor,
            device=device,
            seconds=options.seconds,
        )
        print_question(name, found)
        records += [Record(**{**vars(record), **shared}) for record in found]
        write_csv(records, output)
        del weights
        free(device)
    print(f"{output}: {len(records)} rows in {time.perf_counter() - started:.0f} s")
    if any(record.note.startswith("wrong") for record in records):
        sys.exit("a formulation computes wrong results: see the notes")


def print_question(name: str, records: Sequence[Record]) -> None:
    """Shows the results of one question while the rest is running."""
    print(f"\n{name}, {records[0].parameters:,} parameters")
    for record in records:
        if record.ms is None:
            print(f"  {record.row:<42} {record.note}")
            continue
        fast = record.times_as_fast_as_anchor
        print(
            f"  {record.row:<42} {record.ms:9.2f} ms {record.gb_per_s or 0:8.1f} GB/s "
            f"{record.percent_of_copy or 0:5.0f} % of copy  "
            f"{f'{fast:.2f}' if fast else '-':>6} x {record.anchor}"
            + (f"   bar {record.bars}: {record.reached} ({record.met})" if record.bars else "")
        )


if __name__ == "__main__":
    main()
