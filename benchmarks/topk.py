"""How fast is an exact selection of the highest scores, and how much memory does it need meanwhile?

    python -m benchmarks.topk                          1e9 scores on a GPU, 32 million on a CPU
    python -m benchmarks.topk --rows "per tensor"      rows whose name contains this; nothing is kept

Bytes that the ideal implementation moves, for n scores of which a share d is selected
- plain copy: 8 n, the roof.
- float32: 16 n + 4 d n. Three histogram rounds (11, 11 and 10 bits of the sort key) and one compaction read
  the scores; indices are written, or n / 8 for bits. Where the first round was counted while the statistic
  was accumulated, 12 n + 4 d n.
- bfloat16: 6 n + 4 d n, since two rounds (11 and 5 bits) do; 4 n + 4 d n with the first one counted before.
- accumulate_: 12 n. Gradient and statistic are read, the statistic is written; counting costs nothing more.

torch and numpy get all scores as one flat tensor for nothing, and are held to the same ideal. Ours select
from the tensors of a transformer; `torch.kthvalue` and `np.percentile` find the threshold alone. Scratch
memory is the most that a step holds beyond the scores and its result; it is measured on a GPU, where all of
it is counted.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.gates import SHAPES
from benchmarks.harness import (
    Faster,
    Options,
    Record,
    Row,
    ScratchBelow,
    Step,
    WrongResultError,
    finish,
    free,
    keep,
    measure,
    parse,
    show,
)
from benchmarks.operands import Shapes, shapes_of
from sparse_optim import TopK, backends
from sparse_optim.backends.reference import FIRST_WIDTH, key_bits, unpack_bits
from sparse_optim.masks import Bits, Indexed, Mask

DENSITY = 0.01
SCORES = {"cuda": 1_000_000_000, "cpu": 32_000_000}
# torch.kthvalue works on one multiprocessor: seconds for 1e8 scores
FEW = 1_000_000
# scores, their bfloat16 copy, another statistic and gradients, the copy, and what torch.topk allocates
HELD_BYTES = 32
TORCH_TOPK, KTHVALUE, PERCENTILE = "torch.topk", "torch.kthvalue", "np.percentile"
EACH = "torch.topk for each tensor"
QUESTIONS = ("float32 scores", "bfloat16 scores", "few float32 scores")


class Scores:
    """Squares of normal numbers, as one flat tensor and as views of it in the shapes of a model."""

    def __init__(self, shapes: Shapes, device: torch.device, dtype: torch.dtype) -> None:
        sizes = [math.prod(shape) for shape in shapes]
        generator = torch.Generator(device).manual_seed(0)
        self.flat = torch.randn(sum(sizes), generator=generator, device=device).square_().to(dtype)
        self.tensors = [part.view(shape) for part, shape in zip(self.flat.split(sizes), shapes, strict=True)]
        self.numel, self.device, self.dtype = self.flat.numel(), device, dtype

    @functools.cached_property
    def gradients(self) -> list[Tensor]:
        """For `accumulate_`."""
        return [torch.randn(t.shape, device=self.device) for t in self.tensors]

    @functools.cached_property
    def statistics(self) -> list[Tensor]:
        """What `accumulate_` adds to; scores stay as they are."""
        return [torch.zeros_like(t) for t in self.tensors]


def first_counts(module: ModuleType, statistics: Sequence[Tensor], scope: str) -> Tensor:
    """The first round of a selection, as `accumulate_` would have counted it."""
    prefixes = torch.zeros(len(statistics), dtype=torch.int64, device=statistics[0].device)
    shift = key_bits(statistics[0]) - FIRST_WIDTH
    counts: Tensor = module.histogram(
        statistics, shift=shift, width=FIRST_WIDTH, prefixes=prefixes, per_tensor=scope == "tensor"
    )
    return counts


def empty_counts(statistics: Sequence[Tensor], scope: str) -> Tensor:
    """Counts to which `accumulate_` adds."""
    rows = len(statistics) if scope == "tensor" else 1
    return torch.zeros(rows, 1 << FIRST_WIDTH, dtype=torch.int64, device=statistics[0].device)


def wrong_selection(
    module: ModuleType, device: torch.device, dtype: torch.dtype, scope: str, *, as_bits: bool, counted: bool
) -> str | None:
    """Compares a small selection, with many ties, with a stable sort."""
    generator = torch.Generator().manual_seed(2)
    # a few hundred different values
    grads = [torch.randn(shape, generator=generator).mul_(64).round_().div_(64) for shape in SHAPES]
    statistics = [torch.zeros(shape, dtype=dtype, device=device) for shape in SHAPES]
    flags = [torch.zeros((), dtype=torch.bool, device=device) for _ in SHAPES]
    counts = empty_counts(statistics, scope)
    module.accumulate_(
        statistics, [g.to(device) for g in grads], flags, kind="squares", first_counts=counts
    )  # fmt: skip
    scores = [g.square().to(dtype) for g in grads]
    if not all(torch.equal(mine.cpu(), score) for mine, score in zip(statistics, scores, strict=True)):
        return "accumulate_ does not add squares"
    if not torch.equal(counts, first_counts(backends.reference, statistics, scope).to(counts.device)):
        return "accumulate_ counts otherwise than the reference's histogram"
    for density in (DENSITY, 0.3):
        masks = TopK(density, scope=scope).select(
            statistics, module, as_bits=as_bits, first_counts=counts if counted else None
        )
        chosen = [selected(mask, score.numel()) for mask, score in zip(masks, scores, strict=True)]
        flat = [score.view(-1).float() for score in scores]
        if scope == "global":
            chosen, flat = [torch.cat(chosen)], [torch.cat(flat)]
        for mine, score in zip(chosen, flat, strict=True):
            expected = torch.zeros_like(mine)
            k = int(density * score.numel())
            expected[torch.sort(score, descending=True, stable=True).indices[:k]] = True
            if not torch.equal(mine, expected):
                return f"selected {int(mine.sum())} entries that are not the first {k} of a stable sort"
    return None


def selected(mask: Mask, numel: int) -> Tensor:
    """A stored mask as bool [numel], on the CPU."""
    if isinstance(mask, Bits):
        return unpack_bits(mask.bits, numel).cpu()
    assert isinstance(mask, Indexed)
    return torch.zeros(numel, dtype=torch.bool).index_fill_(0, mask.indices.long().cpu(), True)


def ours(scores: Scores, options: Options, anchor: tuple[str, ...]) -> list[Row]:
    """The selections of every wanted backend, and what riding on `accumulate_` costs."""
    rows = []
    on_gpu = options.device.type == "cuda"
    rounds = 2 if scores.dtype == torch.bfloat16 else 3
    size, n = scores.dtype.itemsize, scores.numel
    for backend in options.backends:
        module = backends.resolve(backend, options.device, wants_reference=False)
        held = backend != "reference" or len(options.backends) == 1
        for scope, as_bits, counted in (
            ("global", False, False),
            ("global", False, True),
            ("global", True, False),
            ("tensor", False, False),
            ("tensor", False, True),
        ):
            name = "select, " + ("global" if scope == "global" else "per tensor")
            name += (", as bits" if as_bits else "") + (", first round counted before" if counted else "")
            bars: list[Faster | ScratchBelow] = []
            if held and scope == "global" and not as_bits and not counted:
                bars = [Faster(5.0 if on_gpu else 8.0, anchor)] if scores.dtype == torch.float32 else []
                bars += [ScratchBelow(1.0)] if on_gpu else []
            rows.append(
                Row(
                    f"{name}, {backend}",
                    (rounds - counted + 1) * size * n + (n / 8 if as_bits else 4 * DENSITY * n),
                    functools.partial(selection, scores, module, scope, as_bits, counted),
                    check=functools.partial(
                        wrong_selection,
                        module,
                        options.device,
                        scores.dtype,
                        scope,
                        as_bits=as_bits,
                        counted=counted,
                    ),
                    bars=tuple(bars),
                    peers=(EACH,) if scope == "tensor" else tuple(anchor),
                    backend=backend,
                    density=DENSITY,
                    measures_scratch=on_gpu,
                )
            )
        if scores.dtype == torch.float32:
            plain = f"accumulate_, {backend}"
            for name, counts in ((plain, False), (f"accumulate_, first round counted, {backend}", True)):
                rows.append(
                    Row(
                        name,
                        12 * n,
                        functools.partial(_accumulation, scores, module, counts),
                        check=functools.partial(
                            wrong_selection,
                            module,
                            options.device,
                            scores.dtype,
                            "global",
                            as_bits=False,
                            counted=True,
                        ),
                        peers=(plain,),
                        backend=backend,
                    )
                )
    return rows


def selection(scores: Scores, module: ModuleType, scope: str, as_bits: bool, counted: bool) -> Step:
    policy = TopK(DENSITY, scope="tensor" if scope == "tensor" else "global")
    counts = first_counts(module, scores.tensors, scope) if counted else None

    def step() -> list[Mask]:
        return policy.select(scores.tensors, module, as_bits=as_bits, first_counts=counts)

    sizes = [t.numel() for t in scores.tensors]
    wanted = sum(int(DENSITY * size) for size in sizes) if scope == "tensor" else int(DENSITY * sum(sizes))
    # bits are packed: counted a byte at a time
    ones = torch.tensor([bin(byte).count("1") for byte in range(256)], device=scores.device)
    found = sum(
        int(ones[mask.bits.int()].sum()) if isinstance(mask, Bits) else mask.indices.numel()
        for mask in step()
        if isinstance(mask, Bits | Indexed)
    )
    if found != wanted:
        raise WrongResultError(f"{found} entries instead of {wanted}")
    return step


def _accumulation(scores: Scores, module: ModuleType, counts: bool) -> Step:
    statistics, gradients = scores.statistics, scores.gradients
    flags = [torch.zeros((), dtype=torch.bool, device=scores.device) for _ in statistics]
    first = empty_counts(statistics, "global") if counts else None
    return lambda: module.accumulate_(statistics, gradients, flags, kind="squares", first_counts=first)


def rows_of(scores: Scores, options: Options, *, kthvalue: bool, percentile: bool) -> list[Row]:
    """What torch and numpy offer, and ours."""
    n, size = scores.numel, scores.dtype.itemsize
    k = int(DENSITY * n)
    rounds, on_gpu = 2 if size == 2 else 3, options.device.type == "cuda"
    ideal = (rounds + 1) * size * n + 4 * DENSITY * n

    def row(name: str, step: Callable[[], object]) -> Row:
        return Row(name, ideal, lambda: step, density=DENSITY, measures_scratch=on_gpu)

    def each() -> list[object]:
        return [torch.topk(t.view(-1), int(DENSITY * t.numel()), sorted=False) for t in scores.tensors]

    def by_percentile() -> object:
        return np.percentile(scores.flat.numpy(), 100 * (1 - DENSITY))

    rows = [
        peers.plain_copy(n, scores.device),
        row(TORCH_TOPK, lambda: torch.topk(scores.flat, k, sorted=False)),
    ]
    fastest = [TORCH_TOPK]
    if kthvalue:
        rows.append(row(KTHVALUE, lambda: torch.kthvalue(scores.flat, n - k + 1)))
        fastest.append(KTHVALUE)
    if percentile:
        rows.append(row(PERCENTILE, by_percentile))
        fastest.append(PERCENTILE)
    return [*rows, row(EACH, each), *ours(scores, options, tuple(fastest))]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures all questions; keeps them in one CSV."""
    started = time.perf_counter()
    options = parse((__doc__ or "").splitlines()[0], arguments)
    device = options.device
    numel = options.numel or SCORES[device.type]
    if device.type == "cuda":
        numel = min(numel, torch.cuda.mem_get_info(device)[0] // HELD_BYTES)
    asked = [(QUESTIONS[0], numel, torch.float32), (QUESTIONS[1], numel, torch.bfloat16)]
    if device.type == "cuda":
        asked.append((QUESTIONS[2], min(numel, FEW), torch.float32))
    records: list[Record] = []
    for question, size, dtype in asked:
        scores = Scores(shapes_of(size), device, dtype)
        slow_too = device.type == "cpu" or question == QUESTIONS[2]
        found = measure(
            "topk",
            question,
            rows_of(
                scores,
                options,
                kthvalue=slow_too,
                percentile=device.type == "cpu" and dtype == torch.float32,
            ),
            parameters=scores.numel,
            anchor=TORCH_TOPK,
            device=device,
            seconds=options.seconds,
            dtype=str(dtype).removeprefix("torch."),
            only=options.only,
        )
        show(found)
        keep("topk", found, options, QUESTIONS)
        records += found
        del scores
        free(device)
    print(f"\n{time.perf_counter() - started:.0f} s")
    finish(records)


if __name__ == "__main__":
    main()
