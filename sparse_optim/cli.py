"""The `sparse-optim` command: plan, fine-tune, evaluate, share and measure. Needs typer and rich.

Results go to stdout, everything else to stderr. The exit status is 0, or 2 for wrong input, with one
sentence, 130 when interrupted, 1 for anything else.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import os
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, TypedDict

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from typer.core import TyperGroup

from . import (
    Bernoulli,
    ChildTuningAdamW,
    DPSAdamW,
    GradDropAdamW,
    MaskedAdamW,
    Schedule,
    SecondOrderAdamW,
    TopK,
    estimate_memory,
    param_groups,
)
from .__main__ import report
from .checkpoints import one_line
from .planning import MemoryEstimate, model_on_meta

# what a path can have that another would not
_ABOUT_PATHS = {
    errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS,
    errno.ENAMETOOLONG,
}  # fmt: skip


class _Commands(TyperGroup):
    """Turns what goes wrong into the exit status and the sentence that the module's docstring promises."""

    def main(self, args: Any = None, *, standalone_mode: bool = True, **options: Any) -> Any:  # type: ignore[override]
        """Run a command line."""
        try:
            status = super().main(args, standalone_mode=False, **options)
        except Exception as error:
            # click's, whichever copy of it typer uses
            if not standalone_mode or not hasattr(error, "format_message"):
                raise
            where = getattr(getattr(error, "ctx", None), "command_path", "sparse-optim")
            words = " ".join(error.format_message().split()).rstrip(".")
            given = _given_to(getattr(error, "param", None), sys.argv[1:] if args is None else args)
            typer.echo(f"{words}{given}; see {where} --help.", err=True)
            sys.exit(2)
        if standalone_mode:
            sys.exit(status if isinstance(status, int) else 0)
        return status

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was found."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None
        except (ValueError, TypeError, ImportError, RuntimeError) as error:
            if not _is_about_input(error):
                raise
            _refuse(str(error))
        except OSError as error:
            if error.filename is None or error.errno not in _ABOUT_PATHS:
                raise
            _refuse(f"{error.filename!r} must be a path to use here, got: {error.strerror}; check it.")


def _given_to(option: Any, arguments: Sequence[str]) -> str:
    """What stood behind an option, which not every version of typer says."""
    names = getattr(option, "opts", ())
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name in names and name.startswith("-"):
            return f", got {value if equals else following!r}"
    return ""


def _is_about_input(error: BaseException) -> bool:
    """Whether it was raised by this package, in the words that it has for wrong input."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    raised_in = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__"))
    return raised_in.partition(".")[0] == "sparse_optim" and " got " in str(error)


app = typer.Typer(name="sparse-optim", cls=_Commands, pretty_exceptions_enable=False, rich_markup_mode=None)
delta = typer.Typer(rich_markup_mode=None)
app.add_typer(delta, name="delta")


class Policy(str, Enum):
    """What `--policy` takes."""

    TOPK = "topk"
    BERNOULLI = "bernoulli"
    NONE = "none"


class Method(str, Enum):
    """What `--method` takes: the names of `param_groups`."""

    CHILD_TUNING_F = "child_tuning_f"
    CHILD_TUNING_D = "child_tuning_d"
    DPS = "dps"
    SECOND_ORDER = "second_order"
    GRAD_DROP = "grad_drop"


class Fidelity(str, Enum):
    """What `--fidelity` takes."""

    PAPER = "paper"
    RELEASE = "release"


class Unselected(str, Enum):
    """What `--unselected` takes."""

    FROZEN = "frozen"
    ZERO_GRAD = "zero_grad"
    TRACK = "track"


class Width(str, Enum):
    """What the options for dtypes take."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT64 = "float64"

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.value)
        return found


class _Settings(TypedDict, total=False):
    """Keyword arguments of `estimate_memory` that all rows of ours share."""

    policy: Any
    unselected: Literal["frozen", "zero_grad", "track"]
    dtype: torch.dtype | None
    state_dtype: torch.dtype | None
    release_gradients: bool
    statistic_dtype: torch.dtype | None
    statistic_device: str | None
    observe_unit: Literal["step", "microbatch"]
    budget_bytes: float | None


class Training(str, Enum):
    """What `finetune --method` takes."""

    TOPK = "topk"
    CHILD_TUNING_F = "child_tuning_f"
    CHILD_TUNING_D = "child_tuning_d"
    DPS = "dps"
    SECOND_ORDER = "second_order"
    GRAD_DROP = "grad_drop"
    ADAMW = "adamw"


class Ranking(str, Enum):
    """What `mask --method` takes: the methods that observe."""

    TOPK = "topk"
    CHILD_TUNING_D = "child_tuning_d"
    DPS = "dps"
    SECOND_ORDER = "second_order"


class Task(str, Enum):
    """What `--task` takes."""

    CLASSIFICATION = "classification"
    CAUSAL_LM = "causal-lm"


class Compared(str, Enum):
    """What `--compare` takes."""

    ADAMW = "adamw"


class Mode(str, Enum):
    """What `delta extract --mode` takes."""

    XOR = "xor"
    REPLACE = "replace"
    ADD = "add"


class How(str, Enum):
    """What `delta merge --how` takes."""

    DISJOINT = "disjoint"
    SUM = "sum"
    TIES = "ties"


class Kind(str, Enum):
    """What `delta to-peft --kind` takes."""

    SHIRA = "shira"
    SUPERTUNING = "supertuning"


# what several commands take
AsJson = Annotated[bool, typer.Option("--json", help="one JSON document on stdout, for programs")]
ModelName = Annotated[str, typer.Argument(help="a folder, or a name on the Hugging Face hub; safetensors")]
DataName = Annotated[
    str, typer.Argument(help="a csv, json, jsonl or parquet file, or NAME[:SPLIT] on the hub")
]
TaskOption = Annotated[Task, typer.Option(help="what is learned: labels of texts, or the texts")]
TextColumn = Annotated[str, typer.Option(help="column of the texts")]
LabelColumn = Annotated[str, typer.Option(help="column of the labels")]
MaxLength = Annotated[int, typer.Option(help="tokens of a text; longer ones are cut")]
Seed = Annotated[int, typer.Option(help="of everything random")]
DtypeOption = Annotated[Width | None, typer.Option(help="of the weights; default: as they are stored")]
Density = Annotated[float | None, typer.Option(help="share trained; 0.01, or what the paper used")]
ObserveBatches = Annotated[
    int | None, typer.Option(help="batches observed before training; default: what the release used, or all")
]
FidelityOption = Annotated[Fidelity, typer.Option(help="of the method, to its paper or its released code")]
BatchSize = Annotated[int, typer.Option(help="texts a step")]
DeltaFile = Annotated[Path, typer.Argument(help="a file that `delta extract` or `finetune` wrote")]
Output = Annotated[Path, typer.Option("-o", "--output", help="where to write")]
Without = Annotated[list[str] | None, typer.Option(help="tensors to leave out, as 'classifier.*'; repeats")]
Picture = Annotated[Path | None, typer.Option(help="a .png file; the numbers go beside it, as .csv")]


@app.callback(invoke_without_command=True)
def main(context: typer.Context) -> None:
    """Optimizers that update a chosen subset of a model's weights: try, compare, share.

    Example: sparse-optim plan config.json --density 0.01 --dtype bfloat16 --release-gradients
    """
    if context.invoked_subcommand is None:
        info()


@app.command()
def info(as_json: AsJson = False) -> None:
    """Versions, GPUs, and what each backend works on. The default.

    Example: sparse-optim info
    """
    if as_json:
        _print_json({line[:19].strip(): line[19:] for line in report().splitlines()})
    else:
        print(report())


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="a folder, a config.json, or a name on the Hugging Face hub")],
    density: Annotated[float | None, typer.Option(help="share of entries that a TopK policy trains")] = None,
    policy: Annotated[Policy | None, typer.Option(help="default: topk, unless there is a method")] = None,
    method: Annotated[Method | None, typer.Option(help="a published method, with what it exempts")] = None,
    fidelity: Annotated[Fidelity, typer.Option(help="of the method")] = Fidelity.PAPER,
    unselected: Annotated[Unselected | None, typer.Option(help="default: frozen, or the method's")] = None,
    dtype: Annotated[Width | None, typer.Option(help="of the weights; default: what the config says")] = None,
    state_dtype: Annotated[Width | None, typer.Option(help="of parameter-shaped moments")] = None,
    release_gradients: Annotated[bool, typer.Option("--release-gradients")] = False,
    statistic_dtype: Annotated[Width | None, typer.Option(help="float32 or bfloat16")] = None,
    statistic_device: Annotated[str | None, typer.Option(help="cpu: keep it in the host's memory")] = None,
    observe_unit: Annotated[str, typer.Option(help="step or microbatch")] = "step",
    auto_class: Annotated[str | None, typer.Option(help="AutoModelForSequenceClassification, say")] = None,
    budget: Annotated[str | None, typer.Option(help="what the device has: 24GB, 80GiB, or bytes")] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="with AdamW, and ours at 0.1, 1 and 10 %")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="bytes, for programs")] = False,
) -> None:
    """How many bytes weights, gradients and the optimizer would hold; activations are not estimated.

    Only the config is read, and no weight is allocated.

    Example: sparse-optim plan config.json --density 0.01 --dtype bfloat16 --release-gradients --budget 24GB
    """
    try:
        given = None if budget is None else parse_bytes(budget)
        built = model_on_meta(read_config(model), auto_class)
        groups = param_groups(built, method=method, fidelity=fidelity.value)
        chosen, others = _policy(built, density, policy, method, fidelity.value)
        settings: _Settings = {
            "policy": chosen,
            "unselected": others if unselected is None else unselected.value,
            "dtype": None if dtype is None else dtype.dtype,
            "state_dtype": None if state_dtype is None else state_dtype.dtype,
            "release_gradients": release_gradients,
            "statistic_dtype": None if statistic_dtype is None else statistic_dtype.dtype,
            "statistic_device": statistic_device,
            "observe_unit": observe_unit,  # type: ignore[typeddict-item]  # checked by the optimizer
            "budget_bytes": given,
        }
        rows = {"as asked": estimate_memory(groups, **settings)}
        if compare:
            rows |= _comparison(built, settings["dtype"])
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, NotImplementedError) as error:
        _refuse(str(error))
    if as_json:
        sizes = {name: _sizes(row) for name, row in rows.items()}
        _print_json(sizes if compare else sizes["as asked"])
        return
    _show(rows, Console())


@app.command()
def mask(
    model: ModelName,
    data: DataName,
    method: Annotated[Ranking, typer.Option(help="by what is selected")] = Ranking.TOPK,
    density: Density = None,
    observe_batches: ObserveBatches = None,
    fidelity: FidelityOption = Fidelity.PAPER,
    task: TaskOption = Task.CLASSIFICATION,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "label",
    batch_size: BatchSize = 16,
    max_length: MaxLength = 128,
    seed: Seed = 0,
    dtype: DtypeOption = None,
    save_mask: Annotated[Path | None, typer.Option(help="a .safetensors file for the masks")] = None,
    picture: Picture = None,
    as_json: AsJson = False,
) -> None:
    """What would train: observe gradients of a model, change nothing, and show the layers selected.

    Example: sparse-optim mask distilbert/distilbert-base-uncased train.csv --density 0.01
    """
    finetuning = _finetuning("mask")
    _check_picture(picture)
    _check_file(save_mask, "save_mask")
    recipe = finetuning.Recipe(
        model=model, data=data, task=task.value, text_column=text_column, label_column=label_column,
        method=method.value, fidelity=fidelity.value, density=density, observe_batches=observe_batches,
        batch_size=batch_size, max_length=max_length, seed=seed, dtype=None if dtype is None else dtype.value,
    )  # fmt: skip
    with _talking_to_stderr():
        masks, _ = finetuning.observe(recipe, bar=_shows_bars(as_json))
        if save_mask is not None:
            finetuning.save_masks(masks, save_mask, {"model": Path(model).name, "method": method.value})
        _draw_density(masks, picture)
    _show_density(masks, as_json)


@app.command()
def finetune(
    model: ModelName,
    data: DataName,
    method: Annotated[Training, typer.Option(help="which weights train")] = Training.TOPK,
    density: Density = None,
    keep: Annotated[
        float | None, typer.Option(help="probability that an entry trains, of random masks")
    ] = None,
    observe_batches: ObserveBatches = None,
    update_steps: Annotated[
        int | None, typer.Option(help="steps of a stage of dps; default: 5 % of all")
    ] = None,
    fidelity: FidelityOption = Fidelity.PAPER,
    release_gradients: Annotated[
        bool, typer.Option("--release-gradients", help="keep gradients of what is selected only")
    ] = False,
    task: TaskOption = Task.CLASSIFICATION,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "label",
    eval_data: Annotated[
        str | None, typer.Option(help="a file, or NAME:SPLIT on the hub, to evaluate on")
    ] = None,
    eval_share: Annotated[
        float | None, typer.Option(help="share of DATA kept for evaluation; 0.1 without --eval-data")
    ] = None,
    epochs: Annotated[float, typer.Option(help="times that DATA is seen")] = 3.0,
    max_steps: Annotated[int | None, typer.Option(help="in place of --epochs")] = None,
    batch_size: BatchSize = 16,
    lr: Annotated[float, typer.Option(help="learning rate, which falls to 0")] = 5e-5,
    weight_decay: Annotated[float, typer.Option(help="not of biases and norms")] = 0.01,
    max_grad_norm: Annotated[float, typer.Option(help="to which gradients are clipped; 0: not")] = 1.0,
    max_length: MaxLength = 128,
    seed: Seed = 0,
    dtype: DtypeOption = None,
    output: Annotated[Path | None, typer.Option(help="folder for model, tokenizer and results.json")] = None,
    delta_file: Annotated[
        Path | None, typer.Option("--delta", help="a .safetensors file for what has changed")
    ] = None,
    compare: Annotated[
        Compared | None, typer.Option(help="run torch's AdamW, too, on the same batches")
    ] = None,
    pictures: Annotated[Path | None, typer.Option(help="folder for pictures of densities and costs")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="from the last checkpoint in --output")] = False,
    save_steps: Annotated[int | None, typer.Option(help="between checkpoints; default: an epoch")] = None,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a classifier or a language model with Hugging Face's Trainer, and evaluate it.

    Example: sparse-optim finetune distilbert/distilbert-base-uncased train.csv --density 0.01 --output out
    """
    finetuning = _finetuning("finetune")
    recipe = finetuning.Recipe(
        model=model, data=data, task=task.value, text_column=text_column, label_column=label_column,
        eval_data=eval_data, eval_share=eval_share, method=method.value, fidelity=fidelity.value,
        density=density, keep=keep, observe_batches=observe_batches, update_steps=update_steps,
        release_gradients=release_gradients, epochs=epochs, max_steps=max_steps, batch_size=batch_size, lr=lr,
        weight_decay=weight_decay, max_grad_norm=max_grad_norm, max_length=max_length, seed=seed,
        dtype=None if dtype is None else dtype.value,
    )  # fmt: skip
    checkpoints = _checkpoints(output, resume)
    _check_picture(None if pictures is None else pictures / "costs.png")
    _check_file(delta_file, "delta")
    if save_steps is not None and (save_steps < 1 or output is None):
        _refuse(f"save_steps must be positive, with an output, got {save_steps!r}; leave it out.")
    bar = _shows_bars(as_json)
    with _talking_to_stderr():
        both = finetuning.read_both(recipe)
        run = finetuning.finetune(recipe, both, checkpoints, bar=bar, resume=resume, save_steps=save_steps)
        runs = {method.value: run.record}
        if output is not None:
            finetuning.save_model(run, output)
        if delta_file is not None:
            finetuning.save_difference(run, recipe, delta_file)
        if pictures is not None:
            _draw_density(run.changed(), pictures / "density.png")
        weights = sum(p.nbytes for p in run.model.parameters())
        del run
        if compare is not None and method is not Training.ADAMW:
            plain = finetuning.as_adamw(recipe)
            runs["adamw"] = finetuning.finetune(plain, both, None, bar=bar).record
        if pictures is not None and "adamw" in runs:
            _draw_costs(runs, weights, pictures / "costs.png")
    document = finetuning.document(recipe, runs)
    if output is not None:
        with finetuning.replacing(output / "results.json") as file:
            file.write_text(json.dumps(document, indent=2) + "\n")
    if as_json:
        _print_json(document)
        return
    _show_runs(runs)


@app.command()
def evaluate(
    model: ModelName,
    data: DataName,
    delta_file: Annotated[
        Path | None, typer.Option("--delta", help="applied to the model in memory; it is then the base")
    ] = None,
    task: TaskOption = Task.CLASSIFICATION,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "label",
    max_length: MaxLength = 128,
    dtype: DtypeOption = None,
    as_json: AsJson = False,
) -> None:
    """The metrics of a saved model, or of a base and a delta: the digits that finetune reported.

    Example: sparse-optim evaluate out test.csv --json
    """
    finetuning = _finetuning("evaluate")
    recipe = finetuning.Recipe(
        model=model, data=data, task=task.value, text_column=text_column, label_column=label_column,
        max_length=max_length, dtype=None if dtype is None else dtype.value,
    )  # fmt: skip
    with _talking_to_stderr():
        found = finetuning.evaluate_saved(recipe, delta_file, bar=_shows_bars(as_json))
    if as_json:
        _print_json(found)
        return
    table = Table("metric", "value")
    for name, value in found["metrics"].items():
        table.add_row(_word(name), "-" if value is None else f"{value:.6g}")
    Console().print(table)


@app.command()
def bench(
    model: Annotated[str | None, typer.Argument(help="a config, whose weights' shapes are taken")] = None,
    parameters: Annotated[float | None, typer.Option(help="size of a BERT-like model; default: 4e6")] = None,
    density: Annotated[
        list[float] | None, typer.Option(help="of TopK; may be repeated; 0.01 and 0.1")
    ] = None,
    keep: Annotated[float, typer.Option(help="of Bernoulli")] = 0.3,
    rounds: Annotated[int, typer.Option(help="steps measured of each row")] = 20,
    dtype: Annotated[Width, typer.Option(help="of the weights")] = Width.FLOAT32,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one")] = None,
    picture: Picture = None,
    as_json: AsJson = False,
) -> None:
    """Time of a step and memory of the optimizer, against torch's AdamW, on this machine.

    Every row runs once in each round, in a new order. Before anything is timed, and after it, the weights are
    checked: finite, and outside of the mask those of the start, to the bit.

    Example: sparse-optim bench --parameters 1e7 --density 0.01 --density 0.1
    """
    if rounds < 1:
        _refuse(f"rounds must be positive, got {rounds!r}; 20 give a fair median.")
    if model is not None and parameters is not None:
        _refuse(f"parameters must be left out with a model, got {parameters!r}; leave one of them out.")
    if parameters is not None and not 1e3 <= parameters <= 1e11:
        _refuse(f"parameters must be in [1e3, 1e11], got {parameters!r}; 4e6 fits everywhere.")
    _check_picture(picture)
    known = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    if device is not None and device not in known:
        _refuse(f"device must be {' or '.join(known)} on this machine, got {device!r}; leave it out.")
    place = torch.device(device or known[-1])
    if model is not None:
        shapes = [tuple(p.shape) for p in model_on_meta(read_config(model)).parameters()]
    else:
        shapes = _bert_like(4e6 if parameters is None else parameters)
    rows = _measure(shapes, place, dtype.dtype, density or [0.01, 0.1], keep, rounds)
    if picture is not None:
        from .plots import Cost, draw_costs

        costs = [Cost(row.name, {"states": row.state_bytes}, row.quantiles()[1]) for row in rows]
        draw_costs(costs, picture, adamw=rows[0].name)
    count = sum(torch.Size(shape).numel() for shape in shapes)
    if as_json:
        _print_json(
            {
                "device": str(place), "dtype": dtype.value, "parameters": count, "tensors": len(shapes),
                "rounds": rounds, "torch": torch.__version__,
                "rows": {row.name: row.numbers(rows[0]) for row in rows},
            }
        )  # fmt: skip
        return
    console = Console()
    console.print(f"{count:,} parameters in {len(shapes)} tensors, {dtype.value}, {place}", highlight=False)
    table = Table("", *(f"{word}" for word in ("ms", "20 - 80 %", "times as fast", "optimizer MiB")))
    for row in rows:
        low, middle, high = row.quantiles()
        speed = row.numbers(rows[0])["times_as_fast"]
        cells = (f"{middle:.3g}", f"{low:.3g} - {high:.3g}", f"{speed:.2f}", f"{row.state_bytes / 2**20:.2f}")
        table.add_row(row.name, *cells)
    console.print(table)


@delta.callback()
def deltas() -> None:
    """What fine-tuning changed, as a file: extract, apply, revert, merge, show, share.

    Example: sparse-optim delta extract base tuned -o delta.safetensors
    """


@delta.command()
def extract(
    base: Annotated[str, typer.Argument(help="the model that was tuned: folder, file or name on the hub")],
    tuned: Annotated[str, typer.Argument(help="the same after fine-tuning")],
    output: Output,
    mode: Annotated[
        Mode, typer.Option(help="of values: xor can be reverted, add fits other bases")
    ] = Mode.XOR,
    base_model: Annotated[str | None, typer.Option(help="the base's name, for people")] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="names to leave out, as 'pooler.*'; repeats")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write what a tuned model has that its base has not.

    Example: sparse-optim delta extract bert-base tuned-bert -o delta.safetensors --ignore 'pooler.*'
    """
    from . import extract_delta, save_delta

    found = extract_delta(base, tuned, mode=mode.value, base_model=base_model, ignore=ignore or ())
    save_delta(found, output)
    _show_written(found, output, as_json)


@delta.command("apply")
def apply_(
    base: Annotated[str, typer.Argument(help="the model that the delta was made from")],
    file: DeltaFile,
    output: Output,
    as_json: AsJson = False,
) -> None:
    """Write the tuned model, from its base and a delta.

    Example: sparse-optim delta apply bert-base delta.safetensors -o tuned
    """
    from . import load_delta, patch_checkpoint

    found = load_delta(file)
    patch_checkpoint(base, found, output)
    _show_written(found, output, as_json)


@delta.command()
def revert(
    tuned: Annotated[str, typer.Argument(help="the model after fine-tuning")],
    file: DeltaFile,
    output: Output,
    as_json: AsJson = False,
) -> None:
    """Write the base, from a tuned model and its delta, to the bit.

    Example: sparse-optim delta revert tuned delta.safetensors -o base
    """
    from . import load_delta, patch_checkpoint

    found = load_delta(file)
    patch_checkpoint(tuned, found, output, revert=True)
    _show_written(found, output, as_json)


@delta.command()
def merge(
    files: Annotated[list[Path], typer.Argument(help="two or more deltas of one base")],
    output: Output,
    how: Annotated[How, typer.Option(help="what happens where they meet")] = How.DISJOINT,
    base: Annotated[str | None, typer.Option(help="the base, which sum and ties need")] = None,
    weights: Annotated[str | None, typer.Option(help="one for each delta, as 0.5,0.5")] = None,
    density: Annotated[float, typer.Option(help="of ties: share of each delta that is kept")] = 0.2,
    without: Without = None,
    as_json: AsJson = False,
) -> None:
    """Write one delta of several.

    Example: sparse-optim delta merge one.safetensors two.safetensors -o sum.safetensors --how sum --base bert
    """
    from . import load_delta, merge_deltas, save_delta

    scales = None if weights is None else _numbers(weights)
    found = merge_deltas(
        [load_delta(file).without(*(without or ())) for file in files],
        how=how.value, base=base, weights=scales, density=density,
    )  # fmt: skip
    save_delta(found, output)
    _show_written(found, output, as_json)


@delta.command()
def show(
    file: DeltaFile,
    top: Annotated[int, typer.Option(help="how many tensors, those with the highest density first")] = 10,
    picture: Picture = None,
    as_json: AsJson = False,
) -> None:
    """Sizes of a delta, and where it changes most.

    Example: sparse-optim delta show delta.safetensors --top 5
    """
    from . import load_delta

    _check_picture(picture)
    found = load_delta(file)
    _draw_density(found, picture)
    numbers = found.info()
    if as_json:
        _print_json(numbers)
        return
    console = Console()
    each = numbers.pop("per_tensor")
    table = Table("", "")
    for name, value in numbers.items():
        text = f"{value:,}" if isinstance(value, int) else str(value or "-")
        if isinstance(value, float):
            text = f"{value:.4%}" if name == "density" else f"{value:.2f}"
        table.add_row(_word(name), text)
    console.print(table)
    table = Table("tensor", "shape", "entries", "changed", "density", "bytes")
    ranked = sorted(each, key=lambda name: each[name]["density"], reverse=True)
    for name in ranked[: max(0, top)]:
        row = each[name]
        counts = (f"{row['entries']:,}", f"{row['changed']:,}", f"{row['density']:.4%}", f"{row['bytes']:,}")
        table.add_row(name, " x ".join(map(str, row["shape"])), *counts)
    console.print(table)


@delta.command("to-peft")
def to_peft_(
    file: DeltaFile,
    model: ModelName,
    output: Output,
    kind: Annotated[Kind, typer.Option(help="of PEFT's adapters")] = Kind.SHIRA,
    task: Annotated[Task | None, typer.Option(help="default: what the delta's model is for")] = None,
    dtype: DtypeOption = None,
    without: Without = None,
    as_json: AsJson = False,
) -> None:
    """Write a delta as an adapter that PEFT loads.

    Example: sparse-optim delta to-peft delta.safetensors meta-llama/Llama-3.2-1B -o adapter --kind shira
    """
    from . import load_delta
    from .integrations.peft import to_peft

    finetuning = _finetuning("delta to-peft")
    found = load_delta(file).without(*(without or ()))
    tuned = str(found.config["tuned"].get("architectures") if found.config else "")
    task = task or (Task.CLASSIFICATION if "ForSequenceClassification" in tuned else Task.CAUSAL_LM)
    recipe = finetuning.Recipe(
        model=model, data="", task=task.value, dtype=None if dtype is None else dtype.value
    )
    with _talking_to_stderr():
        loaded = finetuning.load_base(recipe, found, None)
        to_peft(found, output, model=loaded.model, kind=kind.value)
    _show_written(found, output, as_json)


@delta.command()
def push(
    file: DeltaFile,
    repository: Annotated[str, typer.Argument(help="a name on the Hugging Face hub, made if there is none")],
    private: Annotated[bool | None, typer.Option(help="default: what the hub's settings say")] = None,
    as_json: AsJson = False,
) -> None:
    """Publish a delta on the Hugging Face hub.

    Example: sparse-optim delta push delta.safetensors me/bert-base-topics --private
    """
    from . import load_delta, push_delta

    found = load_delta(file)
    with _talking_to_stderr():
        try:
            url = push_delta(found, repository, private=private)
        except ImportError:
            raise
        except Exception as error:  # the hub's own, and those of the libraries under it
            raise ValueError(
                f"repository must be one that can be written, got {repository!r} ({one_line(error)}); log "
                "in, or name another."
            ) from error
    if as_json:
        _print_json({"url": url})
    else:
        print(url)


def parse_bytes(text: str) -> float:
    """The bytes that "24GB" (1e9 each), "24GiB" (2**30 each) or a plain number means.

    Raises:
        ValueError: for anything else.

    Example:
        >>> from sparse_optim.cli import parse_bytes
        >>> parse_bytes("24GB"), parse_bytes("1.5 GiB"), parse_bytes("8e9")
        (24000000000.0, 1610612736.0, 8000000000.0)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:[eE]\d+)?)\s*(?:([kKmMgGtT]?)(i?)[bB])?\s*", text)
    size = 0.0
    if found:
        number, prefix, binary = found.groups()
        size = float(number) * (1024.0 if binary else 1000.0) ** " kmgt".index((prefix or " ").lower())
    if size <= 0:
        raise ValueError(f"budget must be a size such as 24GB or 80GiB, got {text!r}; write number and unit.")
    return size


def read_config(model: str) -> Any:
    """The Hugging Face config of a folder, a file, or a name on the hub; no weights are read.

    Raises:
        ImportError: without transformers. ValueError: where there is no config.
    """
    try:
        from transformers import AutoConfig
    except ModuleNotFoundError as error:
        raise ImportError(
            f"plan needs transformers to read {model!r}, got none; pip install 'sparse_optim[hf]'."
        ) from error
    path = Path(model)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(
            f"model must have a config.json, got the folder {model!r} without one; name its folder."
        )
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"model must be a folder, a config.json or a name on the hub, got {model!r} ({reason}); "
            "give the path of a config.json."
        ) from error


def _policy(
    model: nn.Module, density: float | None, policy: Policy | None, method: Method | None, fidelity: Any
) -> tuple[Any, Literal["frozen", "zero_grad", "track"]]:
    """Policy and `unselected`; those of a method are the method's own."""
    if method is not None and policy is not None:
        raise ValueError(
            f"policy must be left out with a method, got {policy.value!r} and {method.value!r}; "
            "give one of them."
        )
    takes = policy in (None, Policy.TOPK) and method not in (Method.CHILD_TUNING_F, Method.GRAD_DROP)
    if density is not None and not takes:
        name = method.value if method is not None else policy.value if policy is not None else ""
        raise ValueError(
            f"density must be left out for {name}, got {density!r}; its memory is that of AdamW."
        )
    if method is None:
        observing = Schedule(observe=1)
        if policy is None or policy is Policy.TOPK:
            return TopK(0.01 if density is None else density, schedule=observing), "frozen"
        return (None, "frozen") if policy is Policy.NONE else (Bernoulli(0.5), "zero_grad")
    params = list(model.named_parameters())
    share: Any = {} if density is None else {"density": density}
    made: MaskedAdamW
    if method is Method.CHILD_TUNING_F:
        made = ChildTuningAdamW(params, variant="F", fidelity=fidelity)
    elif method is Method.CHILD_TUNING_D:
        made = ChildTuningAdamW(params, variant="D", observe_steps=1, fidelity=fidelity, **share)
    elif method is Method.DPS:
        made = DPSAdamW(params, variant="dense", update_steps=1, fidelity=fidelity, **share)
    elif method is Method.SECOND_ORDER:
        made = SecondOrderAdamW(params, observe_steps=1, fidelity=fidelity, **share)
    else:
        made = GradDropAdamW(params, keep=0.5)
    return made.policy, made.unselected


def _comparison(model: nn.Module, dtype: torch.dtype | None) -> dict[str, MemoryEstimate]:
    """What others hold, and what ours hold at three densities."""
    rows = {}
    for width in (torch.float32, torch.bfloat16):
        name = str(width).removeprefix("torch.")
        rows[f"AdamW, {name}"] = estimate_memory(model, optimizer="adamw_fused", dtype=width)
        # as its documentation has it: a byte an entry for each moment, and a float32 scale for 256
        rows[f"8-bit AdamW, {name}"] = estimate_memory(model, optimizer="adamw_8bit", dtype=width)
    for density in (0.001, 0.01, 0.1):
        policy = TopK(density, schedule=Schedule(observe=1))
        for release in (False, True):
            name = f"TopK, {100 * density:g} %" + (", released" if release else "")
            rows[name] = estimate_memory(model, policy=policy, dtype=dtype, release_gradients=release)
    return rows


def _sizes(row: MemoryEstimate) -> dict[str, Any]:
    derived = {"states": row.states, "between_steps": row.between_steps, "peak": row.peak}
    per_parameter = {"bytes_per_parameter": row.per_parameter(row.between_steps)}
    return asdict(row) | derived | per_parameter


_KINDS = ("weights", "gradients", "states", "masks", "gradient_buffers", "between_steps")
_PEAKS = ("training_peak", "observing_peak", "selecting_peak")
_COMPARED = ("states", *_PEAKS, "between_steps")


def _show(rows: dict[str, MemoryEstimate], console: Console) -> None:
    """GiB, and below bytes per parameter."""
    first = rows["as asked"]
    counts = f"{first.parameters:,} parameters, {first.trained:,} with gradients, {first.selected:,} selected"
    console.print(counts, highlight=False, soft_wrap=True)
    table = Table()
    if len(rows) == 1:
        # one row reads better downwards
        for column in ("", "GiB", "bytes per parameter"):
            table.add_column(column, justify="right" if column else "left")
        for kind in (*_KINDS, *_PEAKS, "host_statistic"):
            size = getattr(first, kind)
            if size:
                table.add_row(_word(kind), f"{size / 2**30:.3f}", f"{first.per_parameter(size):.3f}")
    else:
        table.add_column("GiB", no_wrap=True)
        for kind in _COMPARED:
            table.add_column(_word(kind), justify="right")
        table.add_column("bytes per parameter", justify="right")
        for name, row in rows.items():
            sizes = [getattr(row, kind) for kind in _COMPARED]
            cells = ["-" if size is None else f"{size / 2**30:.2f}" for size in sizes]
            table.add_row(name, *cells, f"{row.per_parameter(row.between_steps):.2f}")
    console.print(table)
    console.print("Activations are not estimated.", highlight=False)
    if first.advice:
        console.print(first.advice, highlight=False, soft_wrap=True)


def _word(kind: str) -> str:
    words = {
        "training_peak": "a step that trains",
        "observing_peak": "while observing",
        "selecting_peak": "while selecting",
        "host_statistic": "statistic on the host",
    }
    return words.get(kind, kind.replace("_", " "))


# --- what the commands share ------------------------------------------------------------------------------


def _finetuning(command: str) -> Any:
    """The module, whose packages take seconds to import."""
    try:
        from . import finetuning
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing == "sparse_optim":
            raise
        raise ImportError(
            f"{command} needs transformers, accelerate and datasets, got no {missing}; "
            "pip install 'sparse_optim[cli,hf]'."
        ) from error
    return finetuning


@contextlib.contextmanager
def _talking_to_stderr() -> Iterator[None]:
    """What other packages print, Trainer for one, is not the result."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _shows_bars(as_json: bool) -> bool:
    """Whether progress is shown; other packages are told."""
    from .finetuning import hide_bars

    if as_json or not sys.stderr.isatty():
        hide_bars()
        return False
    return True


def _refuse(sentence: str) -> NoReturn:
    """One sentence, and the exit status of a wrong command."""
    typer.echo(" ".join(sentence.split()), err=True)
    raise typer.Exit(2)


def _print_json(document: Any) -> None:
    print(json.dumps(document, indent=2, allow_nan=False))


def _checkpoints(output: Path | None, resume: bool) -> Path | None:
    """Where checkpoints go, if a run may use the folder."""
    if output is None:
        if resume:
            raise ValueError("output must be given with resume, got none; name the folder of the first run.")
        return None
    folder = output / "checkpoints"
    if resume and not list(folder.glob("checkpoint-*")):
        raise ValueError(
            f"output must have checkpoints to resume from, got {str(output)!r} without any; leave out "
            "--resume."
        )
    if not resume and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(
            f"output must be a new or an empty folder, got {str(output)!r}; name another, or give --resume."
        )
    return folder


def _check_picture(path: Path | None) -> None:
    """Before the work that is to be drawn."""
    if path is not None and path.suffix != ".png":
        raise ValueError(f"picture must be a .png file, got {str(path)!r}; change its ending.")
    if path is not None and importlib.util.find_spec("matplotlib") is None:
        raise ImportError(f"{str(path)!r} needs matplotlib, got none; pip install matplotlib.")
    _check_file(path, "picture")


def _check_file(path: Path | None, option: str) -> None:
    """Make the folder of what is to be written after the work, before it."""
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{option} must be a file, got the folder {str(path)!r}; name a file in it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise ValueError(
            f"{option} must be in a folder that can be written, got {str(path)!r}; name another."
        )


def _draw_density(selection: Any, path: Path | None) -> None:
    if path is not None:
        from .plots import draw_density

        path.parent.mkdir(parents=True, exist_ok=True)
        draw_density(selection, path)


def _draw_costs(runs: Mapping[str, dict[str, Any]], weights: int, path: Path) -> None:
    from .plots import Cost, draw_costs

    sizes = {name: {"weights": weights, "states": run["optimizer_bytes"]} for name, run in runs.items()}
    seconds = {name: run["seconds_per_step"] for name, run in runs.items()}
    costs = [Cost(name, sizes[name], s and 1000 * s) for name, s in seconds.items()]
    draw_costs(costs, path, adamw="adamw")


def _show_density(masks: Mapping[str, Tensor], as_json: bool) -> None:
    """Shares by layer and by type of module, and in JSON by parameter."""
    from .plots import density_rows

    rows = density_rows(masks)
    groups = {
        by: {
            name: [row for row in rows if getattr(row, by) == name]
            for name in {getattr(r, by): 0 for r in rows}
        }
        for by in ("layer", "module_type")
    }

    def counts(rows: Sequence[Any]) -> dict[str, Any]:
        entries, selected = sum(row.entries for row in rows), sum(row.selected for row in rows)
        return {"entries": entries, "selected": selected, "density": selected / max(1, entries)}

    if as_json:
        summed = {
            f"{by}s": {name: counts(own) for name, own in found.items()} for by, found in groups.items()
        }
        _print_json(counts(rows) | summed | {"parameters": [row._asdict() for row in rows]})
        return
    for by, found in groups.items():
        table = Table(_word(by), "entries", "selected", "density")
        for name, own in [*found.items(), ("all", rows)]:
            numbers = counts(own)
            cells = (f"{numbers['entries']:,}", f"{numbers['selected']:,}", f"{numbers['density']:.4%}")
            table.add_row(name, *cells)
        Console().print(table)


def _show_runs(runs: Mapping[str, dict[str, Any]]) -> None:
    metrics = list(next(iter(runs.values()))["metrics"])
    table = Table("method", *map(_word, metrics), "ms a step", "optimizer MiB", "weights changed")
    for name, run in runs.items():
        seconds = run["seconds_per_step"]
        cells = ["-" if value is None else f"{value:.4f}" for value in run["metrics"].values()]
        cells += ["-" if seconds is None else f"{1000 * seconds:.1f}"]
        table.add_row(name, *cells, f"{run['optimizer_bytes'] / 2**20:.2f}", f"{run['share_changed']:.4%}")
    Console().print(table)


def _show_written(found: Any, output: Path, as_json: bool) -> None:
    numbers = found.info()
    if as_json:
        del numbers["per_tensor"]
        _print_json({"output": str(output)} | numbers)
        return
    changed, density = numbers["changed"], numbers["density"]
    words = f"{output}: {changed:,} changed entries ({density:.4%}), {numbers['whole_tensors']} tensors whole"
    Console().print(words, highlight=False, soft_wrap=True)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"weights must be numbers, got {text!r}; write 0.5,0.5.") from error


# --- measuring --------------------------------------------------------------------------------------------

# tiny, so that weights stay what they are over all steps
_LR = 1e-6


def _bert_like(parameters: float) -> list[tuple[int, ...]]:
    """Shapes of an encoder like BERT-base with about so many entries."""
    layers = 12 if parameters >= 1e6 else 1
    # 12 h^2 a layer, a vocabulary of 16 h, and the pooler
    h = max(8, 8 * round((parameters / (12 * layers + 17)) ** 0.5 / 8))
    layer: list[tuple[int, ...]] = [(h, h), (h,)] * 4 + [(h,)] * 2 + [(4 * h, h), (4 * h,), (h, 4 * h), (h,)]
    ends: list[tuple[int, ...]] = [(16 * h, h), (512, h), (2, h), (h,), (h,), (h, h), (h,)]
    return ends + (layer + [(h,)] * 2) * layers


class _Row(NamedTuple):
    """One optimizer on weights of its own."""

    name: str
    optimizer: torch.optim.Optimizer
    params: list[Tensor]
    ms: list[float]

    @property
    def state_bytes(self) -> int:
        values = [v for state in self.optimizer.state.values() for v in state.values()]
        return sum(v.nbytes for v in values if isinstance(v, Tensor))

    def quantiles(self) -> tuple[float, float, float]:
        """20, 50 and 80 % of the milliseconds."""
        if len(self.ms) == 1:
            return (self.ms[0],) * 3
        cuts = statistics.quantiles(self.ms, n=10, method="inclusive")
        return cuts[1], cuts[4], cuts[7]

    def numbers(self, adamw: _Row) -> dict[str, float]:
        """What JSON says of it; ratios are medians over the rounds."""
        low, middle, high = self.quantiles()
        speed = statistics.median(theirs / ours for theirs, ours in zip(adamw.ms, self.ms, strict=True))
        return {
            "ms": middle, "ms_20": low, "ms_80": high, "times_as_fast": speed,
            "optimizer_bytes": self.state_bytes,
        }  # fmt: skip


def _measure(
    shapes: Sequence[tuple[int, ...]], device: torch.device, dtype: torch.dtype, densities: Sequence[float],
    keep: float, rounds: int,
) -> list[_Row]:  # fmt: skip
    """All rows, checked, timed and checked again."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    # every row reads the same gradients
    grads = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    make: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {}
    make["torch AdamW, fused"] = lambda params: torch.optim.AdamW(params, _LR, fused=True)
    make["dense"] = lambda params: MaskedAdamW(params, _LR)
    make[f"Bernoulli, {100 * keep:g} %"] = lambda params: MaskedAdamW(params, _LR, policy=Bernoulli(keep))
    for density in dict.fromkeys(densities):
        policy = TopK(density, schedule=Schedule(observe=1))
        make[f"TopK, {100 * density:g} %"] = lambda params, policy=policy: MaskedAdamW(  # type: ignore[misc]
            params, _LR, policy=policy
        )
    rows = []
    for name, build in make.items():
        params: list[Tensor] = [nn.Parameter(value.clone()) for value in start]
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        try:
            optimizer = build(params)
        except RuntimeError:
            # fused does not know the device
            name, optimizer = "torch AdamW", torch.optim.AdamW(params, _LR)
        rows.append(_Row(name, optimizer, params, []))
        # observing, selecting, and whatever is allocated once
        for _ in range(3):
            optimizer.step()
    _check_rows(rows, start)
    order = random.Random(0)
    for _ in range(rounds):
        for row in order.sample(rows, len(rows)):
            row.ms.append(_milliseconds(row.optimizer.step, device))
    _check_rows(rows, start)
    return rows


def _milliseconds(step: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - began)


def _check_rows(rows: Sequence[_Row], start: Sequence[Tensor]) -> None:
    """Finite everywhere, and outside of the mask of a frozen selection the bits of the start."""
    for row in rows:
        for p, before in zip(row.params, start, strict=True):
            frozen = torch.zeros_like(before, dtype=torch.bool)
            if isinstance(row.optimizer, MaskedAdamW) and isinstance(row.optimizer.policy, TopK):
                frozen = ~row.optimizer.mask(p)
            if not bool(p.isfinite().all()) or not torch.equal(p[frozen], before[frozen]):
                raise RuntimeError(
                    f"{row.name} has moved weights that it must not, or to no number; nothing is reported."
                )
