"""How many bytes per weight does an optimizer hold?

    python -m benchmarks.memory                        109 million weights on a GPU, 2.6 million on a CPU
    python -m benchmarks.memory --rows bfloat16        rows whose name contains this; nothing is kept

Bytes that the ideal implementation holds between steps, per weight, of which a share d is selected; weights
and gradients, 8 in float32 and 4 in bfloat16, are counted in
- AdamW: 16 in float32, 8 in bfloat16. A seeded mask is never stored; stored bits cost 1 / 8 more.
- indexed: 8 + 12 d in float32: two moments and an index for every selected weight. In bfloat16 4 + 16 d:
  moments and index as before, and a float32 master.
- indexed, gradients released: 4 + 16 d and 2 + 20 d: of the gradients only a float32 entry for every selected
  weight is left. A step that trains holds at most one layer's gradient more.

Every row trains in the same way, after a gate: a backward pass, `step()`, and `zero_grad()` before the next
one. That pass makes the gradients one at a time, the last layer's first, and holds nothing else, so that what
is measured is the optimizer. Gradients are therefore allocated and freed in every step: those that are there
between `step()` and `zero_grad()` are "gradients". For dense rows, which hold all of them in `step()`, the
figures are those of gradients that are handed in and stay. Where gradients are released, the first step,
which observes, adds each to the statistic and drops it; "squares" has to keep them until the step, since the
square of a sum of micro-batches is not the sum of their squares.

Counted: all storages that weights, gradients and states hold after a step, by kind, and under "states" what
else the allocator has given out since the optimizer was made, that is, what it hides; the most that was held
during a step that trains, backward pass included; and the most that was ever held, observing and selecting
included. Peaks are counted by torch's allocator; on a CPU that leaves out what C++ takes for itself. No
activations, no slack of the allocator.

The second question trains a Llama of 10 million weights with methods that need to know a model. Peaks there
include the activations of eight tokens. Bytes are divided by the weights that the model had before a method
added any.
- LoRA: the frozen weights, and 16 for every weight of an adapter, of which a layer [m, n] has 8 (m + n).
- BAdam: the weights, and 12 for every weight of the layer whose turn it is.
- GaLore: weights and gradients; for [m, n], m > n, two moments [m, 64] and a projector [n, 64]. In float32
  its projector is a view of all singular vectors, which therefore stay.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.gates import backward, wrong_optimizer
from benchmarks.harness import (
    Options,
    Record,
    UnavailableError,
    WrongResultError,
    balance,
    failure,
    finish,
    free,
    keep,
    parse,
    progress,
    storages,
    verdicts,
)
from benchmarks.operands import BERT_BASE, LR, SMALL_BERT, Operands, Shapes, shapes_of
from sparse_optim import Bernoulli, MaskedAdamW, Schedule, SignedGradient, SquaredGradient, TopK
from sparse_optim.gradient_release import ReleasedGradient

OPERANDS, LLAMA = "bytes per weight", "bytes per weight, a small Llama"
QUESTIONS = (OPERANDS, LLAMA)
LISTED = (0.001, 0.01, 0.1)
# what a state's entry is, where it is no moment
MASK_KEYS = ("indices", "bits")
# the bar for bfloat16 weights of which 1 % are selected, gradients released
MOST_BYTES = 2.22
TOKENS = 8

Build = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]
BuildForModel = Callable[[nn.Module], torch.optim.Optimizer]


@dataclass(frozen=True)
class Method:
    """An optimizer whose memory is measured.

    Args:
        most: the bytes per weight that it may hold between steps; 0 for no bar.
        layerwise: whether a step may hold one layer's gradient more than that, and nothing else.
    """

    name: str
    dtype: torch.dtype
    ideal: float
    build: Build
    density: float = 1.0
    backend: str = ""
    check: Callable[[], str | None] = lambda: None
    most: float = 0.0
    layerwise: bool = False


@dataclass(frozen=True)
class ModelMethod:
    """A method that is given a model. `ideal` says what it holds in all, for a model that is as it was."""

    name: str
    dtype: torch.dtype
    ideal: Callable[[nn.Module], float]
    build: BuildForModel
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
    **memory: object,
) -> Method:
    """One of our optimizers; `memory` is what else it is told to save memory."""
    density = 1.0 if policy is None else policy.keep if isinstance(policy, Bernoulli) else policy.density
    options = {"lr": LR, "policy": policy, "unselected": unselected, "backend": backend, **memory}
    released = bool(memory.get("release_gradients"))
    return Method(
        f"{name}, {_short(dtype)}",
        dtype,
        ideal,
        lambda params: MaskedAdamW(params, **options),
        density,
        backend,
        lambda: wrong_optimizer(policy, unselected, backend, device, **memory),
        MOST_BYTES if released and density == 0.01 and dtype == torch.bfloat16 else 0.0,
        released,
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
        if not peers.why_missing("flashoptim"):
            released = "flashoptim FlashAdamW"
            ideal = _held_by_package(released, dtype) - size
            name = f"{released}, released, {_short(dtype)}"
            rows.append(Method(name, dtype, ideal, functools.partial(peers.release_flashoptim, dtype=dtype)))
        for backend in options.backends[:1]:

            def ours(
                name: str,
                ideal: float,
                policy: Bernoulli | TopK | None,
                unselected: str = "frozen",
                dtype: torch.dtype = dtype,
                backend: str = backend,
                **memory: object,
            ) -> Method:
                return masked(name, dtype, ideal, policy, unselected, backend, options.device, **memory)

            rows += [
                ours("policy=None", 4 * size, None),
                ours("Bernoulli, keep 30 %", 4 * size, Bernoulli(0.3), "zero_grad"),
                ours("TopK, bits, 30 %", 4 * size + 1 / 8, _observe_once(0.3), "zero_grad"),
            ]
            for density in LISTED:
                row = f"TopK, indexed, {100 * density:g} %"
                rows.append(ours(row, _listed(size, density), _observe_once(density)))
            for density in LISTED:
                row = f"TopK, indexed, {100 * density:g} %, released"
                held = _listed(size, density, released=True)
                signed, squares = (
                    _observe_once(density, kind) for kind in (SignedGradient(), SquaredGradient())
                )
                rows.append(ours(row, held, signed, release_gradients=True))
                if density == 0.01 and dtype == torch.bfloat16:
                    short = {"release_gradients": True, "statistic_dtype": torch.bfloat16}
                    rows += [
                        ours(f"{row}, squares", held, squares, release_gradients=True),
                        ours(f"{row}, bfloat16 statistic", held, signed, **short),
                    ]
    return rows


def model_methods(options: Options) -> list[ModelMethod]:
    """All rows of the second question."""
    if importlib.util.find_spec("transformers") is None:
        nothing = _refuse("not installed")
        return [ModelMethod("transformers", torch.float32, lambda model: 0.0, nothing)]
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        end = f"Llama in {_short(dtype)}"
        for name, peer in peers.model_peers(dtype).items():
            missing = peers.why_missing(peer.module) if peer.module else ""
            if not missing:
                rows.append(ModelMethod(f"{name}, {end}", dtype, peer.ideal, peer.build))
            elif peer.package not in [row.name for row in rows]:
                rows.append(ModelMethod(peer.package, dtype, peer.ideal, _refuse(missing)))
        for backend in options.backends[:1]:
            rows += [
                _ours_in_model(density, dtype, backend, released, options.device, end)
                for released in (False, True)
                for density in LISTED
            ]
    return rows


def _ours_in_model(
    density: float, dtype: torch.dtype, backend: str, released: bool, device: torch.device, end: str
) -> ModelMethod:
    name = f"TopK, indexed, {100 * density:g} %" + released * ", released"
    policy = _observe_once(density, SignedGradient() if released else None)
    held = _listed(dtype.itemsize, density, released=released)

    def build(model: nn.Module) -> torch.optim.Optimizer:
        return MaskedAdamW(
            model.named_parameters(), lr=LR, policy=policy, backend=backend, release_gradients=released
        )

    return ModelMethod(
        f"{name}, {end}",
        dtype,
        lambda model: held * sum(p.numel() for p in model.parameters()),
        build,
        density,
        backend,
        lambda: wrong_optimizer(policy, "frozen", backend, device, release_gradients=released),
    )


def _listed(size: int, density: float, *, released: bool = False) -> float:
    """The ideal of a list: weights and gradients of this size, moments, indices, masters of short weights."""
    listed = (12 if size == 4 else 16) * density
    return listed + (size + 4 * density if released else 2 * size)


def _observe_once(density: float, statistic: SignedGradient | SquaredGradient | None = None) -> TopK:
    return TopK(density, statistic or SquaredGradient(), schedule=Schedule(observe=1))


def _held_by_package(name: str, dtype: torch.dtype) -> float:
    """What they document; 8-bit states have a float32 scale for 256 entries, or a float16 one for 32."""
    weights_and_gradients = 2 * dtype.itemsize
    if name.startswith("flashoptim"):
        return weights_and_gradients + 2.125 + (dtype != torch.float32)
    return weights_and_gradients + (8 if name in peers.WHOLE else 2 + 2 * 4 / 256)


def _refuse(reason: str) -> Callable[[object], torch.optim.Optimizer]:
    def build(params: object) -> torch.optim.Optimizer:
        raise UnavailableError(reason)

    return build


def held(method: Method, shapes: Shapes, device: torch.device) -> Record:
    """Takes a few steps and counts what is there afterwards."""

    def train(record: Record) -> Record:
        operands = Operands(shapes, device, method.dtype)
        params, grads = operands.params, operands.grads
        # from now on they come from a backward pass; these are what it copies, and not counted
        for p in params:
            p.grad = None
        record = replace(record, parameters=operands.numel, ideal_bytes=method.ideal * operands.numel)
        record = _trained(
            record, lambda: params, lambda: method.build(params), lambda: backward(params, grads), device
        )
        return _judged(record, method, max(storages(grads).values()) / operands.numel)

    return _row(OPERANDS, method, train)


def held_by_model(method: ModelMethod, device: torch.device, *, tiny: bool = False) -> Record:
    """The same for a method that is given a model."""

    def train(record: Record) -> Record:
        model = peers.small_llama(method.dtype, device, tiny=tiny)
        n = sum(p.numel() for p in model.parameters())
        record = replace(record, parameters=n, ideal_bytes=method.ideal(model))
        tokens = torch.arange(TOKENS, device=device).view(1, -1)

        def backward_pass() -> None:
            model(input_ids=tokens, labels=tokens).loss.backward()

        # libraries take memory of their own at the first call
        backward_pass()
        model.zero_grad()
        return _trained(
            record, lambda: list(model.parameters()), lambda: method.build(model), backward_pass, device
        )

    return _row(LLAMA, method, train)


def _row(question: str, method: Method | ModelMethod, train: Callable[[Record], Record]) -> Record:
    """What was measured, or why it was not."""
    record = Record("memory", question, method.name, 0, _short(method.dtype), method.backend, method.density)
    try:
        problem = method.check()
        if problem:
            raise WrongResultError(problem)
        return train(record)
    except WrongResultError as error:
        return replace(record, note=f"wrong, not measured: {error}")
    except UnavailableError as error:
        return replace(record, note=str(error))
    except Exception as error:
        return replace(record, note=failure(error, method.backend))


def _trained(
    record: Record,
    weights_of: Callable[[], Sequence[Tensor]],
    build: Callable[[], torch.optim.Optimizer],
    backward_pass: Callable[[], None],
    device: torch.device,
) -> Record:
    """Trains a few steps; fills in bytes per weight."""
    n = record.parameters
    given = storages([p.data for p in weights_of()])
    made: list[torch.optim.Optimizer] = []

    def step() -> None:
        made[0].zero_grad()
        backward_pass()
        made[0].step()

    def begin() -> None:
        made.append(build())
        # the first step observes where a policy does, and the second one starts the moments
        for _ in range(3):
            step()

    kept, ever = _balance(begin, device)
    weights = storages([p.data for p in weights_of()])
    gradients = storages([_held_by_gradient(p) for p in weights_of()])
    states, masks = _kinds(made[0], weights | gradients)
    known = weights | gradients | states | masks | storages(_steps(made[0], device))
    hidden = kept - _allocated([size for place, size in known.items() if place not in given], device)
    between = sum(sum(kind.values()) for kind in (weights, gradients, states, masks))
    # less than what a table shows may be a number per tensor
    hidden = hidden if hidden > 0.005 * n else 0
    between += hidden
    _, during = _balance(step, device)
    return replace(
        record,
        weights=sum(weights.values()) / n,
        gradients=sum(gradients.values()) / n,
        states=(sum(states.values()) + hidden) / n,
        masks=sum(masks.values()) / n,
        step_peak=(between + during) / n,
        peak=max(sum(given.values()) + ever, between + during) / n,
    )


def _balance(step: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """`balance` without garbage."""

    def collected() -> None:
        step()
        gc.collect()

    kept, most, _ = balance(collected, device)
    return kept, most


def _allocated(sizes: Iterable[int], device: torch.device) -> int:
    """What the allocator takes for storages of these sizes."""
    grain = 512 if device.type == "cuda" else 1
    return sum(-(-size // grain) * grain for size in sizes)


def _held_by_gradient(p: Tensor) -> object:
    if isinstance(p.grad, ReleasedGradient):
        return [p.grad.kept.values, p.grad.kept.whole, p.grad.kept.found_inf]
    return p.grad


def _judged(record: Record, method: Method, layer: float) -> Record:
    """The record with its bars; `layer` is the largest gradient, in bytes per weight of all."""
    bars = []
    total = sum(value or 0.0 for value in (record.weights, record.gradients, record.states, record.masks))
    if method.most:
        bars.append((f"at most {method.most:g} bytes per weight", f"{total:.3f}", total <= method.most))
    if method.layerwise:
        more = ((record.step_peak or 0.0) - total) / layer
        # a hundredth for numbers of which there is one per tensor
        bars.append(("a step holds at most one layer's gradient more", f"{more:.2f} of it", more <= 1.01))
    return replace(
        record,
        bars="; ".join(bar for bar, _, _ in bars),
        reached="; ".join(reached for _, reached, _ in bars),
        met="; ".join("yes" if met else "no" for _, _, met in bars),
    )


def _kinds(optimizer: torch.optim.Optimizer, known: dict[int, int]) -> tuple[dict[int, int], dict[int, int]]:
    """Storages of moments and the like, and of masks."""
    entries = [(key, value) for state in optimizer.state.values() for key, value in state.items()]
    masks = storages([value for key, value in entries if key in MASK_KEYS])
    others = storages([value for key, value in entries if key not in MASK_KEYS and not _is_step(key, value)])
    return {place: size for place, size in others.items() if place not in masks and place not in known}, masks


def _steps(optimizer: torch.optim.Optimizer, device: torch.device) -> list[Tensor]:
    """The step counts that this device's allocator counts."""
    entries = [(key, value) for state in optimizer.state.values() for key, value in state.items()]
    return [value for key, value in entries if _is_step(key, value) and value.device.type == device.type]


def _is_step(key: str, value: object) -> bool:
    """A number per tensor, on the host: not counted per weight."""
    return key == "step" and isinstance(value, Tensor) and value.numel() == 1


def show(records: Sequence[Record]) -> None:
    """Prints the table of one question."""
    if not records:
        return
    print(
        f"\n{records[0].question:<56} {'ideal':>7} {'weights':>8} {'grads':>7} {'states':>7} {'masks':>7}",
        end="",
    )
    print(f" {'total':>7} {'peak, step':>11} {'peak, ever':>11}")
    for record in records:
        if record.states is None or record.ideal_bytes is None:
            print(f"{record.row:<56} {record.note}")
            continue
        kinds = [record.weights or 0.0, record.gradients or 0.0, record.states, record.masks or 0.0]
        print(
            f"{record.row:<56} {record.ideal_bytes / record.parameters:7.3f} {kinds[0]:8.3f} {kinds[1]:7.3f} "
            f"{kinds[2]:7.3f} {kinds[3]:7.3f} {sum(kinds):7.3f} {record.step_peak:11.3f} {record.peak:11.3f}"
        )
        for bar, reached, met in verdicts(asdict(record)):
            print(f"  {'':<54} {bar}: {reached} ({met})")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures the rows of both questions; keeps them in one CSV."""
    started = time.perf_counter()
    options = parse((__doc__ or "").splitlines()[0], arguments)
    shapes = (
        shapes_of(options.numel)
        if options.numel is not None
        else BERT_BASE
        if options.device.type == "cuda"
        else SMALL_BERT
    )
    only = options.only.lower()
    records = []
    for method in progress([m for m in methods(options) if only in m.name.lower()], "memory"):
        records.append(held(method, shapes, options.device))
        free(options.device)
    show(records)
    by_models = []
    for method in progress([m for m in model_methods(options) if only in m.name.lower()], LLAMA):
        by_models.append(held_by_model(method, options.device, tiny=options.quick))
        free(options.device)
    show(by_models)
    records += by_models
    keep("memory", records, options, QUESTIONS)
    print(f"\n{time.perf_counter() - started:.0f} s")
    finish(records)


if __name__ == "__main__":
    main()
