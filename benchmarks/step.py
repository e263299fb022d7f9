"""How fast is a step? Ours against torch's own, against what released code writes with torch ops, and against
other packages.

    python -m benchmarks.step                          on the GPU if there is one, else smaller, on the CPU
    python -m benchmarks.step --rows indexed           rows whose name contains this; nothing is kept
    python -m benchmarks.step --backend native --quick

Bytes that the ideal implementation moves, for n float32 weights of which a share d is selected
- plain copy: 8 n, the roof that every other row is held against. (A processor reads the lines that it
  writes: a copy moves half as much again there, and more than 100 % of it can be reached.)
- dense AdamW: 28 n. It reads weight, gradient and two moments, and writes all but the gradient.
- masks under "zero_grad": as dense; stored bits n / 8 more, scores 4 n more, a seeded mask nothing.
- masks under "frozen": only memory lines (32 bytes on a GPU, 64 on a CPU) with a selected entry have to
  move: 28 n (1 - (1 - d)^8), or ^16, and bits or scores.
- indexed: 20 d n for compact moments (read and written) and indices, and 12 bytes of weight and gradient for
  every entry of a line that holds a selected one.
- observing and training at once: 36 n, since the statistic is read and written too; in two launches 40 n,
  since the gradient is read twice.
- bfloat16 weights: 14 n with bfloat16 moments, 22 n with float32 moments; indexed, moments, masters and
  indices 28 d n, and 6 bytes for every entry of a line that holds a selected one.

Rows named `adamw_` and `adamw_indexed_` call a backend's verb; those named MaskedAdamW are whole steps of the
optimizer. Results go to benchmarks/results, one CSV per machine; `benchmarks.report` renders them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.gates import Outcome, Setup, wrong_kernel, wrong_optimizer
from benchmarks.harness import (
    Faster,
    OfCopy,
    Options,
    Record,
    Row,
    Step,
    finish,
    free,
    keep,
    measure,
    parse,
    show,
)
from benchmarks.operands import BERT_BASE, LR, SMALL_BERT, Operands, shapes_of, touched
from benchmarks.peers import DISTRIBUTIONS, FOR_LOOP, FOREACH, FUSED, MULTIPLY, RAND
from sparse_optim import Bernoulli, MaskedAdamW, Schedule, TopK, backends

KEEP = 0.3
DENSITY = 0.3
LISTED = (0.01, 0.1, 0.3)
# what the first question holds per weight at once: weights and gradients 8, the copy 8, moments of torch's
# fused and foreach, of the masked gradients, of our optimizer and of the kernels 40, a copy of gradients 4,
# scores, statistics and masks 13, lists and their moments 12, other packages 15, temporaries 8, and a reserve
HELD_BYTES = 120
WEIGHTS = {"cuda": 1_000_000_000, "cpu": 23_000_000}
QUESTIONS = ("float32", "bfloat16", "many small tensors")

BETAS = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}


def dense_name(backend: str) -> str:
    """The row that masks are held against."""
    return f"adamw_ dense, {backend}"


# calls of verbs


def adamw(
    unselected: str = "frozen",
    select: Callable[[Operands], dict[str, Any]] = lambda operands: {},
    trained: Callable[[Operands], list[Tensor]] | None = None,
    *,
    observes: bool = False,
) -> Setup:
    """A call of `adamw_`."""

    def setup(module: ModuleType, operands: Operands, lr: float) -> tuple[Step, Outcome]:
        arguments = (
            operands.weights, operands.grads, operands.exp_avgs, operands.exp_avg_sqs, [], operands.steps()
        )  # fmt: skip
        options = {"lr": lr, **BETAS, "unselected": unselected, **select(operands)}
        statistics = operands.statistics() if observes else []
        if observes:
            options |= {"statistics": statistics, "nonfinite": operands.flags()}
        masks = trained(operands) if trained is not None and lr > LR and unselected == "frozen" else None
        values = [*operands.weights, *operands.exp_avgs, *operands.exp_avg_sqs]
        return lambda: module.adamw_(*arguments, **options), Outcome(values, statistics, masks)

    return setup


def two_launches(module: ModuleType, operands: Operands, lr: float) -> tuple[Step, Outcome]:
    """`accumulate_`, then `adamw_`."""
    step, outcome = adamw()(module, operands, lr)
    statistics, flags = operands.statistics(), operands.flags()

    def both() -> None:
        module.accumulate_(statistics, operands.grads, flags, kind="squares")
        step()

    return both, outcome._replace(exact=statistics)


def indexed(density: float) -> Setup:
    """A call of `adamw_indexed_`."""

    def setup(module: ModuleType, operands: Operands, lr: float) -> tuple[Step, Outcome]:
        compact = operands.compact(density)
        arguments = (
            operands.weights, operands.grads, compact.indices, compact.exp_avgs, compact.exp_avg_sqs, [],
            compact.masters, [], operands.steps(),
        )  # fmt: skip
        values = [*operands.weights, *compact.exp_avgs, *compact.exp_avg_sqs, *compact.masters]
        masks = operands.masks(density) if lr > LR else None
        return lambda: module.adamw_indexed_(*arguments, lr=lr, **BETAS), Outcome(values, (), masks)

    return setup


def by_bits(operands: Operands) -> dict[str, Any]:
    """Stored masks."""
    return {"bits": operands.bits(DENSITY)}


def by_scores(operands: Operands) -> dict[str, Any]:
    """A threshold that is already known."""
    return {"scores": operands.scores, "cuts": operands.cuts(DENSITY)}


def by_draws(operands: Operands) -> dict[str, Any]:
    """Seeded masks."""
    return {"seeded": operands.draws(KEEP)}


class Builder:
    """Rows of one question, for every wanted backend. The reference is held to a bar where it is alone."""

    def __init__(self, operands: Operands, options: Options, moments: torch.dtype | None = None) -> None:
        self.operands, self.options, self.moments = operands, options, moments
        self.on_gpu = options.device.type == "cuda"

    def kernel(
        self,
        name: str,
        setup: Setup,
        bytes_per_weight: float,
        bars: Callable[[str], Sequence[Faster | OfCopy]] = lambda backend: (),
        *,
        peers: Callable[[str], Sequence[str]] = lambda backend: (),
        density: float | None = None,
    ) -> list[Row]:
        """One row per backend that calls its verb."""
        operands, device = self.operands, self.options.device
        rows = []
        for backend in self.options.backends:
            module = backends.resolve(backend, device, wants_reference=False)
            rows.append(
                Row(
                    f"{name}, {backend}",
                    bytes_per_weight * operands.numel,
                    lambda module=module: setup(module, operands, LR)[0],
                    check=lambda module=module: wrong_kernel(
                        setup, module, device, operands.dtype, self.moments
                    ),
                    bars=tuple(bars(backend)) if self.held(backend) else (),
                    peers=(FUSED, *peers(backend)),
                    backend=backend,
                    density=density,
                )
            )
        return rows

    def optimizer(
        self,
        name: str,
        policy: Bernoulli | TopK | None,
        unselected: str,
        bytes_per_weight: float,
        bars: Sequence[Faster | OfCopy] = (),
        *,
        density: float | None = None,
    ) -> list[Row]:
        """One row per backend that runs a whole step."""
        operands, device = self.operands, self.options.device
        rows = []
        for backend in self.options.backends:

            def make(backend: str = backend) -> Step:
                optimizer = MaskedAdamW(
                    operands.params, lr=LR, policy=policy, unselected=unselected, backend=backend
                )
                if isinstance(policy, TopK):
                    # observes and selects: no part of a step that trains
                    optimizer.step()
                return optimizer.step

            rows.append(
                Row(
                    f"MaskedAdamW {name}, {backend}",
                    bytes_per_weight * operands.numel,
                    make,
                    check=lambda backend=backend: wrong_optimizer(policy, unselected, backend, device),
                    bars=tuple(bars) if self.held(backend) else (),
                    backend=backend,
                    density=density,
                )
            )
        return rows

    def held(self, backend: str) -> bool:
        """Whether a backend has to reach the bars."""
        return backend != "reference" or len(self.options.backends) == 1


def float32(operands: Operands, options: Options) -> list[Row]:
    """Every way to say which entries train."""
    build = Builder(operands, options)
    on_gpu, device = build.on_gpu, options.device
    masked = peers.MaskedGradients(operands)
    share = touched(KEEP, device)

    def like_dense(backend: str, bytes_per_weight: float) -> Faster:
        # 1.05 x the dense row, and what it has to move beyond that row on top
        return Faster(1 / (1.05 * max(1.0, bytes_per_weight / 28)), (dense_name(backend),))

    def bernoulli_bars(unselected: str) -> Callable[[str], list[Faster]]:
        if on_gpu:
            # float32 mask written and read, gradient read and written once more: 28 becomes 44 bytes
            return lambda backend: [like_dense(backend, 28), Faster(0.9 * 44 / 28, (DISTRIBUTIONS, RAND))]
        if unselected == "zero_grad":
            return lambda backend: [Faster(1 / 1.5, (FUSED,)), Faster(18, (DISTRIBUTIONS,))]
        return lambda backend: []

    def bits_bars(unselected: str) -> Callable[[str], list[Faster]]:
        if on_gpu:
            # bool mask read, gradient read and written once more: 28 becomes 37 bytes
            return lambda backend: [like_dense(backend, 28.125), Faster(0.9 * 37 / 28, (MULTIPLY,))]
        if unselected == "zero_grad":
            return lambda backend: [Faster(1 / 1.3, (FUSED,))]
        return lambda backend: []

    n = operands.numel
    rows = [
        peers.plain_copy(n, device),
        peers.torch_adamw(operands, FUSED, fused=True),
        peers.torch_adamw(operands, FOREACH, foreach=True),
        masked.row(DISTRIBUTIONS, peers.by_distributions(KEEP), 28 * n, KEEP),
        masked.row(RAND, peers.by_rand(KEEP), 28 * n, KEEP),
        masked.row(
            MULTIPLY,
            peers.by_stored_mask(lambda: operands.masks(DENSITY), DENSITY),
            28.125 * n,
            DENSITY,
        ),
        *(peers.gathered(operands, density) for density in LISTED),
        *peers.package_rows(operands),
        *build.kernel(
            "adamw_ dense", adamw(), 28, lambda backend: [Faster(1.0, (FUSED,))],
            peers=lambda backend: (FOREACH,), density=1.0,
        ),
        *build.optimizer("policy=None", None, "frozen", 28, [Faster(1.0, (FUSED,))], density=1.0),
    ]  # fmt: skip
    for unselected, moved in (("zero_grad", 28.0), ("frozen", 28 * share)):
        rows += build.kernel(
            f"adamw_ Bernoulli {unselected}, {KEEP:.0%}",
            adamw(unselected, by_draws, lambda operands: operands.drawn_masks(KEEP)),
            moved,
            bernoulli_bars(unselected),
            peers=lambda backend: (dense_name(backend), DISTRIBUTIONS, RAND),
            density=KEEP,
        )
        rows += build.kernel(
            f"adamw_ bits {unselected}, {DENSITY:.0%}",
            adamw(unselected, by_bits, lambda operands: operands.masks(DENSITY)),
            moved + 1 / 8,
            bits_bars(unselected),
            peers=lambda backend: (dense_name(backend), MULTIPLY),
            density=DENSITY,
        )
    rows += build.kernel(
        f"adamw_ threshold frozen, {DENSITY:.0%}",
        adamw("frozen", by_scores, lambda operands: operands.masks(DENSITY)),
        28 * share + 4,
        (lambda backend: [like_dense(backend, 32)]) if on_gpu else (lambda backend: []),
        peers=lambda backend: (dense_name(backend), MULTIPLY),
        density=DENSITY,
    )
    at_least = dict(zip(LISTED, (12, 2, 1) if on_gpu else (8, 1.8, 1.2), strict=True))
    for density in LISTED:
        rows += build.kernel(
            f"adamw_indexed_ frozen, {density:.0%}",
            indexed(density),
            20 * density + 12 * touched(density, device),
            lambda backend, density=density: [Faster(at_least[density], (FUSED,))],
            peers=lambda backend, density=density: (peers.gather(density),),
            density=density,
        )
    rows += build.kernel("observe, then train: two launches", two_launches, 40, density=1.0)
    rows += build.kernel(
        "observe and train: one launch",
        adamw(observes=True),
        36,
        peers=lambda backend: (f"observe, then train: two launches, {backend}",),
        density=1.0,
    )
    return rows


def bfloat16(operands: Operands, options: Options) -> list[Row]:
    """bfloat16 weights: with moments of either precision, and lists with float32 masters."""
    build = Builder(operands, options, torch.bfloat16)
    wide = Builder(operands.with_moments(torch.float32), options, torch.float32)
    rows = [
        peers.plain_copy(operands.numel, options.device),
        peers.torch_adamw(operands, FUSED, fused=True),
        peers.torch_adamw(operands, FOREACH, foreach=True),
        *peers.package_rows(operands),
        *build.kernel(
            "adamw_ dense, bfloat16 moments", adamw(), 14,
            lambda backend: [Faster(1.0, (FUSED,))] if build.on_gpu else [], density=1.0,
        ),
        # torch has no such optimizer
        *wide.kernel(
            "adamw_ dense, float32 moments", adamw(), 22,
            (lambda backend: [OfCopy(90)]) if build.on_gpu else (lambda backend: []), density=1.0,
        ),
    ]  # fmt: skip
    for density in (0.01, 0.1):
        rows += build.kernel(
            f"adamw_indexed_ frozen with masters, {density:.0%}",
            indexed(density),
            28 * density + 6 * touched(density, options.device, element_size=2),
            density=density,
        )
    return rows


def small_tensors(operands: Operands, options: Options) -> list[Row]:
    """Whole steps on as many tensors as BERT-base has: launches, and what the host does, count."""
    build = Builder(operands, options)
    bars = [Faster(1.0, (FUSED,))] if build.on_gpu else []
    n = operands.numel
    listed = TopK(0.01, schedule=Schedule(observe=1))
    return [
        peers.plain_copy(n, options.device),
        peers.torch_adamw(operands, FUSED, fused=True),
        peers.torch_adamw(operands, FOREACH, foreach=True),
        peers.torch_adamw(operands, FOR_LOOP, foreach=False, fused=False),
        *build.optimizer("policy=None", None, "frozen", 28, bars, density=1.0),
        *build.optimizer("Bernoulli zero_grad, 30%", Bernoulli(KEEP), "zero_grad", 28, bars, density=KEEP),
        *build.optimizer(
            "TopK frozen, 1%", listed, "frozen", 0.2 + 12 * touched(0.01, options.device), bars, density=0.01
        ),
    ]  # fmt: skip


def size_for(options: Options) -> int:
    """How many weights to measure: what was asked for, else what the machine can hold of the default."""
    if options.numel is not None:
        return options.numel
    default = WEIGHTS[options.device.type]
    if options.device.type == "cuda":
        return min(default, torch.cuda.mem_get_info(options.device)[0] // HELD_BYTES)
    return default


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures all questions; keeps them in one CSV."""
    started = time.perf_counter()
    options = parse((__doc__ or "").splitlines()[0], arguments)
    numel = size_for(options)
    small = shapes_of(numel) if options.quick else BERT_BASE if options.device.type == "cuda" else SMALL_BERT
    records: list[Record] = []
    for question, shapes, dtype, rows_of in (
        (QUESTIONS[0], shapes_of(numel), torch.float32, float32),
        (QUESTIONS[1], shapes_of(numel), torch.bfloat16, bfloat16),
        (QUESTIONS[2], small, torch.float32, small_tensors),
    ):
        operands = Operands(shapes, options.device, dtype)
        found = measure(
            "step",
            question,
            rows_of(operands, options),
            parameters=operands.numel,
            anchor=FUSED,
            device=options.device,
            seconds=options.seconds,
            dtype=str(dtype).removeprefix("torch."),
            only=options.only,
        )
        show(found)
        keep("step", found, options, QUESTIONS)
        records += found
        del operands
        free(options.device)
    print(f"\n{time.perf_counter() - started:.0f} s")
    finish(records)


if __name__ == "__main__":
    main()
