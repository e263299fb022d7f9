"""How does a step scale: with the number of threads, and with the number of entries?

    python -m benchmarks.scaling                       threads and sizes on a CPU, sizes on a GPU
    python -m benchmarks.scaling --rows TopK           rows whose name contains this; nothing is kept
    python -m benchmarks.scaling --numel 1e6           no tensor with more entries than this

Threads: whole steps and an exact selection on 1, 2, 4, ... threads of one process, of one huge tensor and of
as many tiny ones as LoRA of rank 8 gives a large encoder. In one huge tensor there is room for all threads,
and memory is what they share. Tiny tensors are too small to be divided one by one: only what takes them
together can use two threads, and what the host does for each tensor stays with one.

Sizes: one tensor of 10^4, 10^4.5, ... entries, up to 10^8 on a CPU and 10^9 on a GPU. The left end shows what
a step costs whatever its size, the right one what it costs per entry. Short steps are repeated within a
measurement: small tensors lie in a cache by then, as they do in no training loop.

Bytes that the ideal implementation moves, and the rows themselves, are those of `benchmarks.step` and
`benchmarks.topk`. The gate of a row on several threads is that one thread gives the same bits.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks import peers, topk
from benchmarks.harness import (
    INTERPRETED,
    Faster,
    Options,
    Record,
    Row,
    Step,
    finish,
    free,
    keep,
    measure,
    on_threads,
    parse,
    progress,
    show,
)
from benchmarks.operands import Operands, Shapes, touched
from benchmarks.peers import FUSED
from benchmarks.step import DENSITY, KEEP, Builder
from sparse_optim import Bernoulli, MaskedAdamW, Schedule, TopK, backends

ONE, MANY, SIZES = "threads, one huge tensor", "threads, 300 tiny tensors", "sizes"
QUESTIONS = (ONE, MANY, SIZES)
HUGE = 32_000_000
# rank 8 on a width of 768
TINY: Shapes = [(8, 768)] * 300
LARGEST = {"cuda": 1_000_000_000, "cpu": 100_000_000}
# per weight at the largest size: weights, gradients and a copy 16, moments of torch's fused, of the dense
# step and of Bernoulli 24, the statistic of a selection 4, and a reserve
HELD_BYTES = 56
# a measurement of a small size takes roughly as long as one step of so many entries
ENTRIES_AT_ONCE = 1_000_000
MOST_CALLS = 100
# how much faster two threads have to be than one; with tiny tensors less, since most of a step is the host's
GAIN = {ONE: 1.6, MANY: 1.2}
# large enough for several threads, alone and together
SHARED: Shapes = [(100_003,), *TINY[:40]]

Policy = Bernoulli | TopK | None
RowsOf = Callable[[Operands, Options], list[Row]]


def _once(density: float) -> TopK:
    return TopK(density, schedule=Schedule(observe=1))


def methods(device: torch.device, question: str) -> dict[str, tuple[Policy, str, float, float]]:
    """The optimizers of a question: policy, what happens to the rest, ideal bytes per weight, density."""

    def listed(density: float) -> tuple[Policy, str, float, float]:
        return _once(density), "frozen", 20 * density + 12 * touched(density, device), density

    found: dict[str, tuple[Policy, str, float, float]] = {
        "policy=None": (None, "frozen", 28, 1.0),
        f"Bernoulli zero_grad, {KEEP:.0%}": (Bernoulli(KEEP), "zero_grad", 28, KEEP),
        "TopK indexed, 1%": listed(0.01),
    }
    if question != SIZES:
        found["TopK indexed, 10%"] = listed(0.1)
        found[f"TopK bits, {DENSITY:.0%}"] = _once(DENSITY), "zero_grad", 28.125, DENSITY
    return found


# sizes


def by_size(operands: Operands, options: Options) -> list[Row]:
    """Whole steps of one size."""
    build = Builder(operands, options)
    rows = [
        peers.plain_copy(operands.numel, options.device),
        peers.torch_adamw(operands, FUSED, fused=True),
    ]
    for name, (policy, unselected, moved, density) in methods(options.device, SIZES).items():
        rows += build.optimizer(name, policy, unselected, moved, density=density)
    calls = 1 if INTERPRETED else max(1, min(MOST_CALLS, ENTRIES_AT_ONCE // operands.numel))
    return [replace(row, calls=calls) for row in rows]


def sizes(options: Options) -> list[int]:
    """Two a decade, as far as memory and what was asked for allow."""
    most = options.numel or LARGEST[options.device.type]
    if options.device.type == "cuda":
        most = min(most, torch.cuda.mem_get_info(options.device)[0] // HELD_BYTES)
    found = [round(10 ** (half / 2)) for half in range(8, 19)]
    return [size for size in found if size <= most] or [most]


# threads


def thread_counts() -> list[int]:
    """1, 2, 4, ... and all."""
    most = torch.get_num_threads()
    return [*(1 << power for power in range(most.bit_length()) if 1 << power < most), most]


def with_threads(name: str, count: int) -> str:
    """The name of a row on so many threads."""
    return f"{name}, {count} thread{'s' if count > 1 else ''}"


def on_each(
    row: Row,
    question: str,
    counts: Sequence[int],
    run: Callable[[], list[Tensor]] | None = None,
    *,
    fused: bool = True,
) -> list[Row]:
    """A row for each number of threads, which share what the row sets up.

    Args:
        run: a small problem, whose results must not depend on the number of threads.
        fused: whether the row compares with torch's fused step.
    """
    make = functools.cache(row.make)
    # threads that have slept take microseconds to wake, which a training loop does not see
    awake = torch.zeros(1 << 18)

    def made() -> tuple[Step, Step]:
        step = make()
        assert not isinstance(step, tuple)
        return step, lambda: awake.add_(1)

    rows = []
    for count in counts:
        alone = with_threads(row.name, 1)
        check = row.check
        if run is not None and count > 1:
            check = functools.partial(depends_on_threads, run, count)
        rows.append(
            replace(
                row,
                name=with_threads(row.name, count),
                make=made,
                check=check,
                bars=(Faster(GAIN[question], (alone,)),) if row.backend and count == 2 else (),
                peers=(alone, with_threads(FUSED, count)) if fused else (alone,),
                threads=count,
            )
        )
    return rows


def depends_on_threads(run: Callable[[], list[Tensor]], count: int) -> str | None:
    """Compares the results of one thread with those of several, bit for bit."""
    outcomes = []
    for threads in (1, count):
        with on_threads(threads):
            outcomes.append(run())
    alone, together = outcomes
    if len(alone) == len(together) and all(map(torch.equal, alone, together)):
        return None
    return f"{count} threads give other bits than one"


def three_steps(policy: Policy, unselected: str, backend: str) -> list[Tensor]:
    """Weights and moments after a few steps of a small problem."""
    operands = Operands(SHARED, torch.device("cpu"))
    optimizer = MaskedAdamW(operands.params, lr=1e-2, policy=policy, unselected=unselected, backend=backend)
    for _ in range(3):
        optimizer.step()
    held = [value for state in optimizer.state.values() for value in state.values()]
    return [*operands.weights, *(value for value in held if isinstance(value, Tensor))]


def one_selection(backend: str) -> list[Tensor]:
    """The lists of a small selection."""
    cpu = torch.device("cpu")
    scores = topk.Scores(SHARED, cpu, torch.float32)
    module = backends.resolve(backend, cpu, wants_reference=False)
    return [mask.indices for mask in topk.selection(scores, module, "global", False, False)()]


def by_threads(operands: Operands, options: Options, question: str) -> list[Row]:
    """Whole steps, and selections, on every number of threads."""
    device, counts = options.device, thread_counts()
    build = Builder(operands, options)
    copy = peers.plain_copy(operands.numel, device)
    rows = [
        # the roof of all rows
        copy,
        *on_each(copy, question, counts, fused=False),
        *on_each(peers.torch_adamw(operands, FUSED, fused=True), question, counts),
    ]
    for name, (policy, unselected, moved, density) in methods(device, question).items():
        for row in build.optimizer(name, policy, unselected, moved, density=density):
            run = functools.partial(three_steps, policy, unselected, row.backend)
            rows += on_each(row, question, counts, run)
    scores = topk.Scores(operands.shapes, device, torch.float32)
    for row in topk.ours(scores, options, ()):
        if row.name == f"select, global, {row.backend}":
            rows += on_each(
                replace(row, name=f"exact top-k, {topk.DENSITY:.0%}, {row.backend}"),
                question,
                counts,
                functools.partial(one_selection, row.backend),
                fused=False,
            )
    return rows


def ask(
    question: str, shapes: Shapes, rows_of: RowsOf, anchor: str, options: Options, seconds: float
) -> list[Record]:
    """Measures one question, or one size of it."""
    operands = Operands(shapes, options.device)
    return measure(
        "scaling",
        question,
        rows_of(operands, options),
        parameters=operands.numel,
        anchor=anchor,
        device=options.device,
        seconds=seconds,
        only=options.only,
    )


def show_sizes(records: Sequence[Record]) -> None:
    """Prints nanoseconds per entry, a column for each size."""
    if not records:
        return
    measured = sorted({record.parameters for record in records})
    print(f"\n{'ns per entry':<44}" + "".join(f"{size:>13,}" for size in measured))
    for name in dict.fromkeys(record.row for record in records):
        ms = {record.parameters: record.ms for record in records if record.row == name}
        cells = (1e6 * (ms.get(size) or math.nan) / size for size in measured)
        print(f"{name:<44}" + "".join(f"{cell:13.4g}" for cell in cells))
        for note in sorted({record.note for record in records if record.row == name and record.note}):
            print(f"  {note}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures all questions; keeps them in one CSV."""
    started = time.perf_counter()
    options = parse((__doc__ or "").splitlines()[0], arguments)
    records: list[Record] = []
    counts = thread_counts()
    if options.device.type == "cpu" and len(counts) == 1:
        print("threads are not measured: torch has only one")
    elif options.device.type == "cpu" and not INTERPRETED:
        huge = HUGE if options.numel is None else min(HUGE, options.numel)
        for question, shapes in ((ONE, [(huge,)]), (MANY, TINY[:3] if options.quick else TINY)):
            rows_of = functools.partial(by_threads, question=question)
            anchor = with_threads(FUSED, counts[-1])
            found = ask(question, shapes, rows_of, anchor, options, options.seconds)
            show(found)
            keep("scaling", found, options, QUESTIONS)
            records += found
    found, asked = [], sizes(options)
    for size in progress(asked, SIZES):
        found += ask(SIZES, [(size,)], by_size, FUSED, options, options.seconds / len(asked))
        free(options.device)
    show_sizes(found)
    keep("scaling", found, options, QUESTIONS)
    records += found
    print(f"\n{time.perf_counter() - started:.0f} s")
    finish(records)


if __name__ == "__main__":
    main()
