"""Fine-tunes a pre-trained encoder on a few hundred questions, once with each optimizer, and compares them.

    python -m benchmarks.demo            every method, two seeds, a few minutes on two cores
    python -m benchmarks.demo --quick    a smoke run: half of the encoder, one seed, a few steps

`fine_tune` is an ordinary PyTorch loop. One line differs between the rows, the one that makes the optimizer;
`METHODS` lists these lines. Every row starts from the same weights, and sees the same examples in the same
order.
"""

from __future__ import annotations

import argparse
import random
import statistics
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from benchmarks import data
from sparse_optim import (
    ChildTuningAdamW,
    DPSAdamW,
    GradDropAdamW,
    MaskedAdamW,
    Schedule,
    SecondOrderAdamW,
    SquaredGradient,
    TopK,
    param_groups,
)
from sparse_optim.nn import RandomAutoencoders, mix_weights

BATCH_SIZE = 16
MAX_GRAD_NORM = 1.0
# steps of each stage of DPS
STAGE = 5
FIGURE = Path(__file__).parent / "results" / "demo.png"


# what a method that acts on activations adds to the loss of each batch
ExtraLoss = Callable[[], Tensor]


@dataclass(frozen=True)
class Method:
    """One row: its learning rate, and the line that makes its optimizer of (model, lr, steps to observe)."""

    name: str
    lr: float
    optimizer: Callable[
        [nn.Module, float, int], torch.optim.Optimizer | tuple[torch.optim.Optimizer, ExtraLoss]
    ]
    observes: bool = False
    # whether the learning rate was searched for, rather than taken from a row alike
    tuned: bool = True


def dps_mix(model: nn.Module, lr: float, n: int) -> torch.optim.Optimizer:
    """The optimizer half and the forward half of DPS Mix."""
    groups = param_groups(model, method="dps")
    optimizer = DPSAdamW(groups, lr=lr, variant="mix", density=0.7, update_steps=STAGE)
    mix_weights(model, optimizer)
    return optimizer


def mvcr(model: nn.Module, lr: float, n: int) -> tuple[torch.optim.Optimizer, ExtraLoss]:
    """AdamW on the model and on random autoencoders behind its middle and its last layer."""
    depth = model.encoder.config.num_hidden_layers
    autoencoders = RandomAutoencoders.attach(
        model.encoder, layers=[depth // 2, depth - 1], dims=(64, 128, 192)
    )
    groups = [*param_groups(model), {"params": list(autoencoders.named_parameters()), "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, fused=True), autoencoders.reconstruction_loss


# learning rates: the best of a few on the validation part, about a factor of two apart, with two seeds. No
# test question took part; one point of that search: `--part validation --examples 240 --only NAME --lr LR`
METHODS = (
    Method(
        "AdamW (torch, fused)",
        2e-4,
        lambda model, lr, n: torch.optim.AdamW(param_groups(model), lr=lr, fused=True),
    ),
    Method(
        "Child-Tuning F, keep 30 %",
        4e-4,
        lambda model, lr, n: ChildTuningAdamW(
            param_groups(model, method="child_tuning_f"), lr=lr, variant="F", keep=0.3
        ),
    ),
    Method(
        "Child-Tuning D, density 30 %",
        5e-4,
        lambda model, lr, n: ChildTuningAdamW(
            param_groups(model, method="child_tuning_d"), lr=lr, variant="D", density=0.3, observe_steps=n
        ),
        observes=True,
    ),
    Method(
        "TopK, density 1 %",
        4e-3,
        lambda model, lr, n: MaskedAdamW(
            param_groups(model), lr=lr, policy=TopK(0.01, SquaredGradient(), schedule=Schedule(observe=n))
        ),
        observes=True,
    ),
    Method(
        "DPS dense, keep 70 %",
        2e-4,
        lambda model, lr, n: DPSAdamW(
            param_groups(model, method="dps"), lr=lr, variant="dense", density=0.7, update_steps=STAGE
        ),
        tuned=False,
    ),
    Method("DPS mix, keep 70 %", 2e-4, dps_mix, tuned=False),
    Method(
        "Second order, density 0.5 %",
        4e-3,
        lambda model, lr, n: SecondOrderAdamW(
            param_groups(model, method="second_order"), lr=lr, density=0.005, observe_steps=n
        ),
        observes=True,
        tuned=False,
    ),
    Method(
        "Layer-GradDrop, keep 50 %",
        2e-4,
        lambda model, lr, n: GradDropAdamW(
            param_groups(model, method="grad_drop"), lr=lr, keep=0.5, granularity="layer"
        ),
        tuned=False,
    ),
    Method("MVCR, two layers", 2e-4, mvcr, tuned=False),
)


@dataclass
class Run:
    """What one fine-tuning run showed."""

    accuracy: float = 0.0
    share_changed: float = 0.0
    state_bytes: int = 0
    most_state_bytes: int = 0
    step_seconds: list[float] = field(default_factory=list)
    loop_seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Task:
    """Everything that is the same in every row."""

    dataset: data.Dataset
    tokenizer: Any
    examples: int
    epochs: int
    part: str
    tested: int
    layers: int | None
    device: torch.device

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.examples // BATCH_SIZE)


def fine_tune(method: Method, lr: float, seed: int, task: Task, bar: tqdm[Any]) -> Run:
    """Fine-tunes and tests once."""
    torch.manual_seed(seed)
    order = random.Random(seed)
    examples = order.sample(task.dataset.train, task.examples)
    model = data.load_classifier(len(task.dataset.labels), layers=task.layers).to(task.device)
    before = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]
    run = Run()

    # the one line that differs
    made = method.optimizer(model, lr, task.steps_per_epoch)

    optimizer, extra_loss = made if isinstance(made, tuple) else (made, None)

    steps = task.epochs * task.steps_per_epoch
    schedule = LambdaLR(optimizer, lambda step: 1 - step / steps)
    model.train()
    for _ in range(task.epochs):
        for inputs, labels in batches(examples, task, order):
            started = now(task.device)
            loss = cross_entropy(model(**inputs), labels)
            if extra_loss is not None:
                loss = loss + extra_loss()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            before_step = now(task.device)
            optimizer.step()
            after_step = now(task.device)
            schedule.step()
            optimizer.zero_grad()

            run.loop_seconds.append(after_step - started)
            run.step_seconds.append(after_step - before_step)
            run.most_state_bytes = max(run.most_state_bytes, state_bytes(optimizer))
            bar.set_postfix_str(f"loss {loss.item():.2f}")
            bar.update()

    run.state_bytes = state_bytes(optimizer)
    run.share_changed = share_changed(before)
    run.accuracy = accuracy(model, task)
    return run


def batches(
    examples: Sequence[data.Example], task: Task, order: random.Random | None = None
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Batches of questions of similar length, which saves padding; in random order if `order` is given."""
    size = BATCH_SIZE if order else 64
    token_ids = data.encode(task.tokenizer, examples)
    places = list(range(len(examples)))
    chunk = len(places)
    if order:
        order.shuffle(places)
        chunk = 4 * size
    grouped = []
    for start in range(0, len(places), chunk):
        similar = sorted(places[start : start + chunk], key=lambda place: len(token_ids[place]))
        grouped += [similar[first : first + size] for first in range(0, len(similar), size)]
    if order:
        order.shuffle(grouped)
    for batch in grouped:
        inputs = {
            name: t.to(task.device) for name, t in data.pad([token_ids[place] for place in batch]).items()
        }
        yield inputs, torch.tensor([examples[place].label for place in batch], device=task.device)


@torch.no_grad()
def accuracy(model: nn.Module, task: Task) -> float:
    """The share of held-out questions that the model classifies correctly."""
    model.eval()
    held_out = getattr(task.dataset, task.part)[: task.tested]
    correct = sum(
        int((model(**inputs).argmax(1) == labels).sum()) for inputs, labels in batches(held_out, task)
    )
    return correct / len(held_out)


def share_changed(before: Sequence[tuple[Tensor, Tensor]]) -> float:
    """The share of weights, given each with a copy from before training, whose bits are others now."""
    changed = sum(int((p.detach().view(torch.int32) != copy.view(torch.int32)).sum()) for p, copy in before)
    return changed / sum(p.numel() for p, _ in before)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors that the optimizer keeps for its parameters."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))


def now(device: torch.device) -> float:
    """Seconds, after everything that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@dataclass(frozen=True)
class Summary:
    """One row of the table, over all seeds."""

    name: str
    lr: float
    accuracies: list[float]
    step_ms: float
    state_mib: float
    most_state_mib: float
    percent_changed: float
    observe_seconds: float | None

    @property
    def accuracy(self) -> float:
        return statistics.mean(self.accuracies)


def summarize(method: Method, lr: float, runs: Sequence[Run], observed: int) -> Summary:
    """Joins the runs of one method."""
    skipped = observed if method.observes else 0
    return Summary(
        name=method.name,
        lr=lr,
        accuracies=[100 * run.accuracy for run in runs],
        # steps that only observe are left out, so that they cannot make a method look fast
        step_ms=1000 * statistics.median(s for run in runs for s in run.step_seconds[skipped:]),
        state_mib=runs[0].state_bytes / 2**20,
        most_state_mib=max(run.most_state_bytes for run in runs) / 2**20,
        percent_changed=100 * statistics.mean(run.share_changed for run in runs),
        observe_seconds=statistics.median(sum(run.loop_seconds[:skipped]) for run in runs)
        if skipped
        else None,
    )


def make_table(rows: Sequence[Summary]) -> str:
    """Renders the rows as aligned text."""
    header = [
        "optimizer",
        "seeds",
        "accuracy %",
        "lowest - highest",
        "ms a step",
        "state MiB",
        "at most",
        "changed %",
    ]
    lines = [header]
    for row in rows:
        seeds = len(row.accuracies)
        spread = f"{min(row.accuracies):.1f} - {max(row.accuracies):.1f}" if seeds > 1 else "-"
        numbers = [row.step_ms, row.state_mib, row.most_state_mib, row.percent_changed]
        cells = [
            row.name,
            str(seeds),
            f"{row.accuracy:.1f}",
            spread,
            *(f"{number:.1f}" for number in numbers),
        ]
        lines.append(cells)
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(pairs)
        )
        for pairs in (list(zip(line, widths, strict=True)) for line in lines)
    )


def save_figure(rows: Sequence[Summary], caption: str, path: Path) -> None:
    """Draws the table: one line of four panels per optimizer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [row.name for row in rows]
    colors = [f"C{place}" for place in range(len(rows))]
    figure, axes = pyplot.subplots(
        1, 4, figsize=(14, 1.4 + 0.55 * len(rows)), sharey=True, layout="constrained"
    )
    for place, row in enumerate(rows):
        axes[0].plot(
            row.accuracies, [place] * len(row.accuracies), "o", color=colors[place], alpha=0.55, markersize=8
        )
        axes[0].plot(row.accuracy, place, "|", color="black", markersize=22, markeredgewidth=2)
    axes[0].set_title("test accuracy, %\n(dots: seeds, bar: mean)")
    axes[0].margins(x=0.15)
    most = [row.most_state_mib for row in rows]
    axes[1].barh(names, most, color="none", edgecolor="gray", linestyle="--")
    panels = (
        (axes[1], "optimizer state, MiB\n(dashed: at most)", [row.state_mib for row in rows], most),
        (axes[2], "weights changed, %\n", [row.percent_changed for row in rows], None),
        (axes[3], "optimizer.step(), ms\n(median)", [row.step_ms for row in rows], None),
    )
    for axis, title, values, ends in panels:
        axis.barh(names, values, color=colors)
        for place, value in enumerate(values):
            axis.annotate(
                f"{value:.1f}" if value < 100 else f"{value:.0f}",
                (ends[place] if ends else value, place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
            )
        axis.set_title(title)
        axis.margins(x=0.2)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    axes[0].grid(axis="x", alpha=0.3)
    axes[0].invert_yaxis()
    figure.suptitle(caption, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def footnotes(rows: Sequence[Summary], task: Task) -> str:
    """What a reader has to know before comparing the rows."""
    n, steps = task.steps_per_epoch, task.epochs * task.steps_per_epoch
    error = max((row.accuracy * (100 - row.accuracy) / task.tested) ** 0.5 for row in rows)
    rates = "; ".join(f"{row.name} {row.lr:g}" for row in rows)
    observers = [row for row in rows if row.observe_seconds is not None]
    observing = "; ".join(f"{row.name} {row.observe_seconds:.1f} s a seed" for row in observers)
    notes = [
        f"Every row makes the same {steps} step() calls per seed: {task.epochs} passes over {task.examples} "
        f"examples in batches of {BATCH_SIZE}.",
        f"Learning rates, falling linearly to zero: {rates}. Those of "
        f"{', '.join(method.name for method in METHODS if method.tuned)} were chosen on validation "
        "questions, the others are AdamW's, or TopK's.",
        f"Rows that select by gradients only observe in their first {n} step() calls: no weight moves, no "
        f"pass is added, and {steps - n} steps are left to train where the others have {steps}. "
        f"What observing and selecting took: {observing}.",
        '"ms a step" is the median of optimizer.step() alone, over the steps that move weights. Other '
        "programs on the machine disturb it; benchmarks.step measures speed properly.",
        '"state" is what the optimizer keeps between steps at the end, "at most" includes observing.',
        f"{task.tested} questions give an accuracy a standard error of about {error:.1f} points, and one or "
        "two seeds say little: this shows that all rows work, not which one is better.",
    ]
    if not observers:
        del notes[2]
    return "\n".join(textwrap.fill(note, 100, initial_indent="- ", subsequent_indent="  ") for note in notes)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison, print its table and save its figure."""
    started = time.perf_counter()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--examples", type=int, default=240, help="training questions per seed")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--tested", type=int, default=500, help="held-out questions")
    parser.add_argument("--part", choices=("test", "validation"), default="test")
    parser.add_argument("--lr", type=float, help="one learning rate for all rows instead of the chosen ones")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    # shared machines can be five times slower at times, and a demo that takes ten minutes is closed
    parser.add_argument(
        "--time-limit", type=float, default=240.0, help="seconds in which a further seed has to end"
    )
    parser.add_argument("--figure", type=Path, default=FIGURE)
    parser.add_argument(
        "--quick", action="store_true", help="smoke run: half of the encoder, one seed, a few steps"
    )
    options = parser.parse_args(arguments)
    if options.quick:
        options.seeds, options.examples, options.epochs, options.tested = 1, 32, 3, 64

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layers = 3 if options.quick else None
    dataset, tokenizer = data.load_trec(), data.load_tokenizer()
    task = Task(
        dataset,
        tokenizer,
        options.examples,
        options.epochs,
        options.part,
        options.tested,
        layers=layers,
        device=device,
    )
    methods = [method for method in METHODS if options.only in method.name]
    runs: dict[str, list[Run]] = {method.name: [] for method in methods}
    skipped = 0
    longest = 0.0
    for seed in range(options.seeds):
        for method in methods:
            begun = time.perf_counter()
            if seed and begun - started + longest > options.time_limit:
                skipped += 1
                continue
            total = task.epochs * task.steps_per_epoch
            with tqdm(total=total, desc=f"seed {seed}, {method.name}", ncols=100, mininterval=0.5) as bar:
                runs[method.name].append(fine_tune(method, options.lr or method.lr, seed, task, bar))
            longest = max(longest, time.perf_counter() - begun)
    if skipped:
        print(
            f"{skipped} runs skipped: on this machine they would have ended after {options.time_limit:.0f} s."
        )

    rows = [
        summarize(method, options.lr or method.lr, runs[method.name], task.steps_per_epoch)
        for method in methods
    ]
    weights = sum(
        p.numel()
        for p in data.load_classifier(len(dataset.labels), layers=layers).parameters()
        if p.requires_grad
    )
    caption = (
        f"all-MiniLM-L6-v2 on {options.examples} TREC questions, {len(dataset.labels)} classes, "
        f"{options.tested} {options.part} questions; "
        f"embeddings frozen in every row, {weights / 1e6:.1f} M weights can train"
    )
    print(f"\n{caption}\n\n{make_table(rows)}\n\n{footnotes(rows, task)}\n")
    save_figure(rows, caption, options.figure)
    print(f"figure: {options.figure}")
    print(f"{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
