"""How large a model fits, and how fast does it train?

    python -m benchmarks.large                         on a CPU what fits into 4 GiB, on a GPU what fits into
    it python -m benchmarks.large --numel 2e8             a model of roughly so many weights python -m
    benchmarks.large --rows TopK             rows whose name contains this; nothing is kept

A Llama-shaped model with random weights, built from a config in bfloat16, as deep as `estimate_memory` allows
with what is set aside for activations. Each optimizer trains it in a process of its own: 2 steps that
observe, then 4 that train, on one batch of random tokens, so that the loss falls if training works.

Bytes that the ideal implementation holds per weight: ours, at density d, 2 for the weights and 20 d between
steps; while observing a statistic of 2 (bfloat16, rounded stochastically) on top, and in both the largest
gradient. AdamW in bfloat16 holds 8.

Measured is the most that the process grew by, from before the model was built: resident memory on a CPU,
torch's allocator on a GPU. Activations and all slack count. On a CPU the process runs with
MALLOC_MMAP_THRESHOLD_=65536, without which glibc keeps much of what is freed. Tokens per second are those of
whole training steps.
"""

from __future__ import annotations

import functools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.harness import REPOSITORY, Options, Record, finish, first_line, keep, parse, progress
from sparse_optim import MaskedAdamW, Schedule, SignedGradient, TopK, estimate_memory

QUESTIONS = ("the largest model",)
DENSITY = 0.01
OBSERVE, TRAIN = 2, 4
GIB = 1 << 30
# what may be used, and what of it activations, the tokens' embeddings and the allocator get
CPU_BUDGET, CPU_RESERVE = 4 * GIB, GIB // 4
GPU_SHARE, GPU_RESERVE = 0.92, 3 * GIB
# by default glibc keeps freed blocks of up to 32 MiB: half a gigabyte for a model of 440 million weights
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}
POLICY = TopK(DENSITY, statistic=SignedGradient(), schedule=Schedule(observe=OBSERVE))
SETTINGS: dict[str, Any] = {"policy": POLICY, "release_gradients": True, "statistic_dtype": torch.bfloat16}


@dataclass(frozen=True)
class Shape:
    """A model like Llama: width, layers, and the width of the feed-forward part."""

    width: int
    layers: int
    inner: int
    vocabulary: int = 32_000

    def config(self) -> Any:
        """That of transformers."""
        from transformers import LlamaConfig

        return LlamaConfig(
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            intermediate_size=self.inner,
            num_attention_heads=max(1, self.width // 128),
            vocab_size=self.vocabulary,
            max_position_embeddings=4096,
            use_cache=False,
        )


def shapes(options: Options) -> tuple[int, int, int]:
    """Width, inner width and vocabulary for what there is room for."""
    if options.quick or (options.numel is not None and options.numel < 50_000_000):
        return 128, 344, 1_000
    if options.device.type == "cuda" and (options.numel is None or options.numel > 4_000_000_000):
        return 6_656, 17_920, 32_000
    return 2_048, 5_632, 32_000


@functools.cache
def parameters_of(shape: Shape) -> int:
    """Without a byte of memory."""
    return estimate_memory(shape.config(), policy=None, dtype=torch.bfloat16).parameters


def fitting(options: Options) -> Shape:
    """The deepest model whose peak fits."""
    width, inner, vocabulary = shapes(options)
    one, two = (parameters_of(Shape(width, layers, inner, vocabulary)) for layers in (1, 2))
    if options.numel is not None:
        layers = max(1, round((options.numel - one) / (two - one)) + 1)
        return Shape(width, layers, inner, vocabulary)
    room = budget(options.device)
    fits = 1
    while True:
        shape = Shape(width, fits + 1, inner, vocabulary)
        if estimate_memory(shape.config(), dtype=torch.bfloat16, **SETTINGS).peak > room:
            return replace(shape, layers=fits)
        fits += 1


def budget(device: torch.device) -> float:
    """Bytes for weights, gradients and the optimizer."""
    if device.type == "cuda":
        return GPU_SHARE * torch.cuda.mem_get_info(device)[0] - GPU_RESERVE
    return CPU_BUDGET - CPU_RESERVE


# what each row runs, in a process of its own

ROWS = {
    f"TopK, indexed, {100 * DENSITY:g} %, released": lambda model: MaskedAdamW(
        model.named_parameters(), lr=1e-3, max_grad_norm=1.0, **SETTINGS
    ),
    "torch.optim.AdamW fused": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True),
}


def grown(device: torch.device) -> int:
    """The most bytes held so far: of the process, or on the device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def train(row: str, shape: Shape, device: torch.device) -> dict[str, Any]:
    """Builds the model, trains it, and says what that took."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    # whatever is loaded lazily is no part of the growth
    small = AutoModelForCausalLM.from_config(Shape(128, 1, 128, 100).config(), dtype=torch.bfloat16).to(
        device
    )
    step(small, ROWS[row](small), torch.zeros(1, 8, dtype=torch.long, device=device))
    del small
    before = grown(device)
    with device:
        model: nn.Module = AutoModelForCausalLM.from_config(shape.config(), dtype=torch.bfloat16)
    model.train()
    tokens = torch.randint(shape.vocabulary, (1, 2048 if device.type == "cuda" else 32), device=device)
    optimizer = ROWS[row](model)
    losses, seconds = [], []
    for _ in progress(range(OBSERVE + TRAIN), row):
        started = time.perf_counter()
        losses.append(step(model, optimizer, tokens))
        seconds.append(time.perf_counter() - started)
    trained = seconds[OBSERVE:]
    return {
        "grown": grown(device) - before,
        "seconds": trained,
        "tokens_per_second": tokens.numel() / statistics.median(trained),
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def step(model: Any, optimizer: torch.optim.Optimizer, tokens: torch.Tensor) -> float:
    """One training step on one batch."""
    optimizer.zero_grad()
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def in_own_process(row: str, shape: Shape, options: Options) -> dict[str, Any]:
    """What `train` says, from a fresh process; how it failed otherwise."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        task = {"row": row, "shape": shape.__dict__, "device": options.device.type, "answer": str(answer)}
        program = "import benchmarks.large; benchmarks.large.child()"
        done = subprocess.run(
            [sys.executable, "-c", program],
            input=json.dumps(task),
            text=True,
            cwd=REPOSITORY,
            check=False,
            env=os.environ | GIVE_BACK,
        )
        if done.returncode or not answer.exists():
            killed = "killed, most likely for want of memory" if done.returncode < 0 else "failed"
            return {"note": f"{killed} (exit code {done.returncode})"}
        result: dict[str, Any] = json.loads(answer.read_text())
        return result


def child() -> None:
    """Reads a task from standard input, and writes the answer to the file that it names."""
    task = json.load(sys.stdin)
    try:
        answer = train(task["row"], Shape(**task["shape"]), torch.device(task["device"]))
    except torch.OutOfMemoryError as error:
        answer = {"note": first_line(error)}
    Path(task["answer"]).write_text(json.dumps(answer))


def measured(row: str, shape: Shape, options: Options) -> Record:
    """One row."""
    n = parameters_of(shape)
    ours = row.startswith("TopK")
    ideal = estimate_memory(
        shape.config(), dtype=torch.bfloat16, **(SETTINGS if ours else {"optimizer": "adamw_fused"})
    )
    record = Record(
        "large",
        QUESTIONS[0],
        row,
        n,
        "bfloat16",
        density=DENSITY if ours else 1.0,
        ideal_bytes=float(ideal.peak),
    )
    answer = in_own_process(row, shape, options)
    if "note" in answer:
        return replace(record, note=answer["note"])
    low, median, high = (
        statistics.quantiles([1000 * s for s in answer["seconds"]], n=5, method="inclusive")[i]
        for i in (0, 1, 3)
    )
    median = 1000 * statistics.median(answer["seconds"])
    note = (
        f"{answer['grown'] / GIB:.2f} GiB, {answer['tokens_per_second']:.1f} tokens per second, loss "
        f"{answer['first_loss']:.3f} to {answer['last_loss']:.3f}"
    )
    if not (math.isfinite(answer["last_loss"]) and answer["last_loss"] < answer["first_loss"]):
        note = f"wrong: the loss does not fall; {note}"
    return replace(
        record, ms=median, ms_20=low, ms_80=high, samples=TRAIN, peak=answer["grown"] / n, note=note
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures all rows; keeps them in one CSV."""
    options = parse((__doc__ or "").splitlines()[0], arguments)
    shape = fitting(options)
    print(f"{parameters_of(shape):,} weights in bfloat16: {shape.layers} layers of width {shape.width}")
    records = []
    for row in [row for row in ROWS if options.only.lower() in row.lower()]:
        record = measured(row, shape, options)
        records.append(record)
        held = f"{record.peak:.2f} bytes per weight" if record.peak is not None else "-"
        print(
            f"{row:<36} {held}, {(record.ideal_bytes or 0) / record.parameters:.2f} without activations; "
            f"{record.note}"
        )
    keep("large", records, options, QUESTIONS)
    finish(records)


if __name__ == "__main__":
    main()
