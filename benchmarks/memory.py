"""How many bytes per weight does an optimizer hold?

    python -m benchmarks.memory                        109 million weights on a GPU, 2.6 million on a CPU
    python -m benchmarks.memory --rows bfloat16        rows whose name contains this; nothing is kept

Bytes that the ideal implementation holds between steps, per weight, of which a share d is selected; weights
and gradients, 8 in float32 and 4 in bfloat16, are counted in
- AdamW: 16 in float32, 8 in bfloat16. A seeded mask is never stored; stored bits cost 1 / 8 more.
- indexed: 8 + 12 d in float32: two moments and an index for every selected weight. In bfloat16 4 + 16 d:
  moments and index as before, and a float32 master.

Measured on real steps, after a gate: all storages that weights, gradients and states hold afterwards, by
kind; the most that was held during a step that trains; and the most that was ever held, from the construction
of the optimizer on, observing and selecting included. Peaks are counted by torch's allocator; on a CPU that
leaves out what C++ takes for itself. No activations, no slack of the allocator.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.gates import wrong_optimizer
from benchmarks.harness import (
    Options,
    Record,
    UnavailableError,
    WrongResultError,
    extra_bytes,
    failure,
    finish,
    free,
    keep,
    parse,
    progress,
    storages,
)
from benchmarks.operands import BERT_BASE, LR, SMALL_BERT, Operands, Shapes, shapes_of
from sparse_optim import Bernoulli, MaskedAdamW, Schedule, TopK

QUESTIONS = ("bytes per weight",)
LISTED = (0.001, 0.01, 0.1)
# what a state's entry is, where it is no moment
MASK_KEYS = ("indices", "bits")

Build = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Method:
    """An optimizer whose memory is measured."""

    name: str
    dtype: torch.dtype
    ideal: float
    build: Build
    density: float = 1.0
    backend: str = ""
    check: Callable[[], str | None] = lambda: None


def masked(
    name: str,
    dtype: torch.dtype,
    ideal: float,
    policy: Bernoulli | TopK | None,
    unselected: str,
    backend: str,
    device: torch.device,
) -> Method:
    """One of our optimizers."""
    density = 1.0 if policy is None else policy.keep if isinstance(policy, Bernoulli) else policy.density
    return Method(
        f"{name}, {_short(dtype)}",
        dtype,
        ideal,
        lambda params: MaskedAdamW(params, lr=LR, policy=policy, unselected=unselected, backend=backend),
        density,
        backend,
        lambda: wrong_optimizer(policy, unselected, backend, device),
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def methods(options: Options) -> list[Method]:
    """All rows, in the order of the table. Ours run in one backend: memory hardly depends on it."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        size = dtype.itemsize
        rows.append(
            Method(
                f"torch.optim.AdamW fused, {_short(dtype)}",
                dtype,
                4 * size,
                lambda params: torch.optim.AdamW(params, lr=LR, fused=True),
            )
        )
        for name, (package, module, _, build) in peers.packages(dtype).items():
            missing = peers.why_missing(module)
            if not missing:
                ideal = _held_by_package(name, dtype)
                check = peers.gate(name, build, options.device, dtype)
                rows.append(Method(f"{name}, {_short(dtype)}", dtype, ideal, build, check=check))
            elif package not in [row.name for row in rows]:
                rows.append(Method(package, dtype, 0.0, _refuse(missing)))
        for backend in options.backends[:1]:

            def ours(
                name: str,
                ideal: float,
                policy: Bernoulli | TopK | None,
                unselected: str = "frozen",
                dtype: torch.dtype = dtype,
                backend: str = backend,
            ) -> Method:
                return masked(name, dtype, ideal, policy, unselected, backend, options.device)

            rows += [
                ours("policy=None", 4 * size, None),
                ours("Bernoulli, keep 30 %", 4 * size, Bernoulli(0.3), "zero_grad"),
                ours("TopK, bits, 30 %", 4 * size + 1 / 8, _observe_once(0.3), "zero_grad"),
            ]
            for density in LISTED:
                held = 2 * size + (12 if size == 4 else 16) * density
                rows.append(ours(f"TopK, indexed, {100 * density:g} %", held, _observe_once(density)))
    return rows


def _observe_once(density: float) -> TopK:
    return TopK(density, schedule=Schedule(observe=1))


def _held_by_package(name: str, dtype: torch.dtype) -> float:
    """What they document; 8-bit states have a float32 scale for 256 entries, or a float16 one for 32."""
    weights_and_gradients = 2 * dtype.itemsize
    if name.startswith("flashoptim"):
        return weights_and_gradients + 2.125 + (dtype != torch.float32)
    return weights_and_gradients + (8 if name in peers.WHOLE else 2 + 2 * 4 / 256)


def _refuse(reason: str) -> Build:
    def build(params: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        raise UnavailableError(reason)

    return build


def held(method: Method, shapes: Shapes, device: torch.device) -> Record:
    """Takes a few steps and counts what is there afterwards."""
    record = Record(
        "memory", QUESTIONS[0], method.name, 0, _short(method.dtype), method.backend, method.density
    )
    try:
        problem = method.check()
        if problem:
            raise WrongResultError(problem)
        operands = Operands(shapes, device, method.dtype)
        params = operands.params
        n = operands.numel
        record = replace(record, parameters=n, ideal_bytes=method.ideal * n)
        weights = storages([p.data for p in params])
        gradients = storages(operands.grads)
        given = sum((weights | gradients).values())
        made: list[torch.optim.Optimizer] = []

        def begin() -> None:
            made.append(method.build(params))
            # the first step observes where a policy does, and the second one starts the moments
            for _ in range(3):
                made[0].step()

        ever, _ = extra_bytes(begin, device)
        during, _ = extra_bytes(made[0].step, device)
        states, masks = _kinds(made[0], weights | gradients)
        between = given + states + masks
        return replace(
            record,
            weights=sum(weights.values()) / n,
            gradients=sum(gradients.values()) / n,
            states=states / n,
            masks=masks / n,
            step_peak=(between + during) / n,
            peak=max(given + ever, between + during) / n,
        )
    except WrongResultError as error:
        return replace(record, note=f"wrong, not measured: {error}")
    except UnavailableError as error:
        return replace(record, note=str(error))
    except Exception as error:
        return replace(record, note=failure(error, method.backend))


def _kinds(optimizer: torch.optim.Optimizer, known: dict[int, int]) -> tuple[int, int]:
    """Bytes of moments and the like, and of masks."""
    entries = [(key, value) for state in optimizer.state.values() for key, value in state.items()]
    masks = storages([value for key, value in entries if key in MASK_KEYS])
    others = storages([value for key, value in entries if key not in MASK_KEYS and not _is_step(key, value)])
    return (
        sum(size for place, size in others.items() if place not in masks and place not in known),
        sum(masks.values()),
    )


def _is_step(key: str, value: object) -> bool:
    """A number per tensor, on the host: not counted per weight."""
    return key == "step" and isinstance(value, Tensor) and value.numel() == 1


def show(records: Sequence[Record]) -> None:
    """Prints the table."""
    print(
        f"\n{'bytes per weight':<40} {'ideal':>7} {'weights':>8} {'grads':>7} {'states':>7} {'masks':>7}",
        end="",
    )
    print(f" {'total':>7} {'peak, step':>11} {'peak, ever':>11}")
    for record in records:
        if record.states is None or record.ideal_bytes is None:
            print(f"{record.row:<40} {record.note}")
            continue
        kinds = [record.weights or 0.0, record.gradients or 0.0, record.states, record.masks or 0.0]
        print(
            f"{record.row:<40} {record.ideal_bytes / record.parameters:7.3f} {kinds[0]:8.3f} {kinds[1]:7.3f} "
            f"{kinds[2]:7.3f} {kinds[3]:7.3f} {sum(kinds):7.3f} {record.step_peak:11.3f} {record.peak:11.3f}"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures all rows; keeps them in one CSV."""
    started = time.perf_counter()
    options = parse((__doc__ or "").splitlines()[0], arguments)
    shapes = (
        shapes_of(options.numel)
        if options.numel is not None
        else BERT_BASE
        if options.device.type == "cuda"
        else SMALL_BERT
    )
    wanted = [method for method in methods(options) if options.only.lower() in method.name.lower()]
    records = []
    for method in progress(wanted, "memory"):
        records.append(held(method, shapes, options.device))
        free(options.device)
    show(records)
    keep("memory", records, options, QUESTIONS)
    print(f"\n{time.perf_counter() - started:.0f} s")
    finish(records)


if __name__ == "__main__":
    main()
