"""The `sparse-optim` command: what is installed, and what a run would hold. Needs typer and rich."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypedDict

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

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
from .planning import MemoryEstimate, model_on_meta

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


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


@app.callback(invoke_without_command=True)
def main(context: typer.Context) -> None:
    """Optimizers that update a chosen subset of a model's weights: what is there, and what they would hold.

    Example: sparse-optim plan config.json --density 0.01 --dtype bfloat16 --release-gradients
    """
    if context.invoked_subcommand is None:
        info()


@app.command()
def info() -> None:
    """Versions, GPUs, and what each backend works on. The default.

    Example: sparse-optim info
    """
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
        print(json.dumps(sizes if compare else sizes["as asked"], indent=2))
        return
    _show(rows, Console())


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


def _refuse(sentence: str) -> NoReturn:
    """One sentence, and the exit status of a wrong command."""
    typer.echo(sentence, err=True)
    raise typer.Exit(2)
