"""Every verb of every backend on sizes that fit a cache: what a kernel costs before memory does.

    pytest benchmarks/bench_kernels.py --benchmark-only
    pytest benchmarks/bench_kernels.py --benchmark-only -k "indexed and 256k" --benchmark-save NAME

Not part of the test suite. `--benchmark-compare` holds a run against a saved one.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from benchmarks import step, topk
from benchmarks.operands import LR, Operands
from sparse_optim import TopK, backends

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = {"16k": [(128, 128)], "256k": [(512, 512)], "256k in 64 tensors": [(64, 64)] * 64}

Call = Callable[[], object]


def _statistic(operands: Operands, *, counted: bool = False) -> Callable[[ModuleType], Call]:
    def setup(module: ModuleType) -> Call:
        statistics, flags = operands.statistics(), operands.flags()
        counts = topk.empty_counts(statistics, "global") if counted else None
        return lambda: module.accumulate_(
            statistics, operands.grads, flags, kind="squares", first_counts=counts
        )

    return setup


def _select(operands: Operands, scope: str) -> Callable[[ModuleType], Call]:
    policy = TopK(0.1, scope="tensor" if scope == "tensor" else "global")
    return lambda module: lambda: policy.select(operands.scores, module, as_bits=False)


def _listed(operands: Operands, verb: str) -> Callable[[ModuleType], Call]:
    def setup(module: ModuleType) -> Call:
        compact = operands.compact(0.1)
        indices, buffers = compact.indices, compact.exp_avgs
        others = [listed[::2].clone() for listed in indices]
        calls: dict[str, Call] = {
            "gather_": lambda: module.gather_(buffers, operands.grads, indices),
            "norm": lambda: module.norm(operands.grads, indices=indices),
            "apply_delta_": lambda: module.apply_delta_(operands.weights, indices, buffers),
            "remap_": lambda: module.remap_(indices, others, [[buffer] for buffer in buffers]),
        }
        return calls[verb]

    return setup


def _update(operands: Operands, setup: Callable[..., tuple[Call, object]]) -> Callable[[ModuleType], Call]:
    return lambda module: setup(module, operands, LR)[0]


VERBS: dict[str, Callable[[Operands], Callable[[ModuleType], Call]]] = {
    "adamw_ dense": lambda operands: _update(operands, step.adamw()),
    "adamw_ seeded": lambda operands: _update(operands, step.adamw("zero_grad", step.by_draws)),
    "adamw_ bits": lambda operands: _update(operands, step.adamw("frozen", step.by_bits)),
    "adamw_ threshold": lambda operands: _update(operands, step.adamw("frozen", step.by_scores)),
    "adamw_ observing": lambda operands: _update(operands, step.adamw(observes=True)),
    "adamw_indexed_": lambda operands: _update(operands, step.indexed(0.1)),
    "accumulate_": lambda operands: _statistic(operands),
    "accumulate_ counting": lambda operands: _statistic(operands, counted=True),
    "select, global": lambda operands: _select(operands, "global"),
    "select, per tensor": lambda operands: _select(operands, "tensor"),
    **{
        verb: lambda operands, verb=verb: _listed(operands, verb)
        for verb in ("gather_", "norm", "apply_delta_", "remap_")
    },
}


@pytest.mark.parametrize("backend", backends.available(DEVICE))
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("verb", VERBS)
def test_verb(benchmark, verb: str, size: str, backend: str) -> None:
    operands = Operands(SIZES[size], DEVICE)
    module = backends.resolve(backend, DEVICE, wants_reference=False)
    call = VERBS[verb](operands)(module)

    def finished() -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize(DEVICE)

    benchmark.group = f"{verb}, {size}"
    benchmark(finished)
