"""What others offer: torch's own AdamW, the formulations of released code in torch ops, and other packages.

Packages are measured where they import; a missing one is a row that says so. Those that do not quantise the
moments pass a gate, as do the formulations written here; the others are trusted to compute what they say.
Those that need to know a model, its layers or their names, are measured by what they hold for a small one.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.gates import CPU, SHAPES, adamw_with_masks, furthest, wrong_adamw
from benchmarks.harness import COPY, Row, Step, UnavailableError, first_line
from benchmarks.operands import LR, Operands, touched

FUSED, FOREACH, FOR_LOOP = "torch fused", "torch foreach", "torch for-loop"
DISTRIBUTIONS = "torch.distributions mask, then fused"
RAND = "torch.rand mask, then fused"
MULTIPLY = "bool mask multiplied, then fused"


def gather(density: float) -> str:
    """The name of the formulation with index_select."""
    return f"index_select, update, index_copy, {density:.0%}"


def plain_copy(numel: int, device: torch.device) -> Row:
    """The bandwidth roof: a copy of as many float32 values."""

    def make() -> Step:
        source = torch.rand(numel, device=device)
        target = torch.zeros_like(source)
        return lambda: target.copy_(source)

    return Row(COPY, 8 * numel, make)


def torch_adamw(operands: Operands, name: str, **implementation: bool) -> Row:
    """AdamW of torch.optim, whose moments have the dtype of the weights."""
    moved = 7 * operands.dtype.itemsize * operands.numel
    return Row(name, moved, lambda: torch.optim.AdamW(operands.params, lr=LR, **implementation).step)


class MaskedGradients:
    """Torch ops zero gradient entries in place, then AdamW (fused) runs: what released code does.

    All formulations share one copy of the gradients, restored off the clock, and one optimizer.
    """

    def __init__(self, operands: Operands) -> None:
        self.operands = operands
        self.made: tuple[list[nn.Parameter], Callable[[], None], torch.optim.AdamW] | None = None

    def row(self, name: str, mask_: Callable[[int, Tensor], object], ideal_bytes: float, keep: float) -> Row:
        """The formulation that applies `mask_` to each gradient."""

        def make() -> tuple[Step, Step]:
            if self.made is None:
                params, restore = self.operands.with_own_gradients()
                self.made = params, restore, torch.optim.AdamW(params, lr=LR, fused=True)
            params, restore, optimizer = self.made

            @torch.no_grad()
            def step() -> None:
                for number, p in enumerate(params):
                    mask_(number, p.grad)
                optimizer.step()

            return step, restore

        def check() -> str | None:
            grad = torch.ones(100_000, device=self.operands.device)
            mask_(-1, grad)
            share = float((grad != 0).double().mean())
            return None if abs(share - keep) < 0.02 else f"{share:.3f} of the gradients are left, not {keep}"

        return Row(name, ideal_bytes, make, check=check, density=keep)


def by_distributions(keep: float) -> Callable[[int, Tensor], object]:
    """The line of Child-Tuning's release."""

    def mask_(number: int, grad: Tensor) -> object:
        mask = torch.distributions.Bernoulli(grad.new_full(grad.size(), keep))
        return grad.mul_(mask.sample() / keep)

    return mask_


def by_rand(keep: float) -> Callable[[int, Tensor], object]:
    """The same with torch.rand."""
    return lambda number, grad: grad.mul_(torch.rand_like(grad) < keep)


def by_stored_mask(masks: Callable[[], Sequence[Tensor]], keep: float) -> Callable[[int, Tensor], object]:
    """Multiplication with a stored bool mask."""
    made: list[Sequence[Tensor]] = []

    def mask_(number: int, grad: Tensor) -> object:
        if number < 0:
            return grad.mul_(torch.rand_like(grad) < keep)
        if not made:
            made.append(masks())
        return grad.mul_(made[0][number])

    return mask_


class GatheredAdamW:
    """AdamW on selected entries with compact moments, in plain torch: index_select, update, index_copy."""

    def __init__(self, params: Sequence[Tensor], selected: Sequence[Tensor], lr: float = LR) -> None:
        self.params, self.lr, self.t = params, lr, 0
        self.indices = [mask.view(-1).nonzero().view(-1) for mask in selected]
        self.exp_avgs = [torch.zeros(where.numel(), device=where.device) for where in self.indices]
        self.exp_avg_sqs = [torch.zeros_like(exp_avg) for exp_avg in self.exp_avgs]

    @torch.no_grad()
    def step(self) -> None:
        """Updates the selected entries."""
        self.t += 1
        for p, where, exp_avg, exp_avg_sq in zip(
            self.params, self.indices, self.exp_avgs, self.exp_avg_sqs, strict=True
        ):
            flat = p.data.view(-1)
            grad, value = p.grad.view(-1).index_select(0, where), flat.index_select(0, where)
            value.mul_(1 - self.lr * 0.01)
            exp_avg.lerp_(grad, 1 - 0.9)
            exp_avg_sq.mul_(0.999).addcmul_(grad, grad, value=1 - 0.999)
            denom = (exp_avg_sq.sqrt() / (1 - 0.999**self.t) ** 0.5).add_(1e-8)
            flat.index_copy_(0, where, value.addcdiv_(exp_avg, denom, value=-self.lr / (1 - 0.9**self.t)))


def gathered(operands: Operands, density: float) -> Row:
    """The same mask and arithmetic as ours, in torch ops; held to the same ideal."""
    share = touched(density, operands.device)

    def check() -> str | None:
        small = Operands(SHAPES, operands.device, source=CPU)
        masks = [mask.cpu() for mask in small.masks(density)]
        exact = [nn.Parameter(w.cpu().double()) for w in small.weights]
        moments = [[torch.zeros_like(w), torch.zeros_like(w)] for w in exact]
        optimizer = GatheredAdamW(small.params, small.masks(density), lr=1e-2)
        for step in range(4):
            small.renew_gradients()
            for p, grad in zip(exact, small.grads, strict=True):
                p.grad = grad.cpu().double()
            optimizer.step()
            adamw_with_masks(exact, moments, masks, "frozen", step + 1, 1e-2)
        error = furthest(small.weights, [p.detach() for p in exact])
        return None if error < 1e-6 else f"error {error:.2g} against float64"

    return Row(
        gather(density),
        (20 * density + 12 * share) * operands.numel,
        lambda: GatheredAdamW(operands.params, operands.masks(density)).step,
        check=check,
        density=density,
    )


# other packages

Build = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]
# these quantise nothing: two moments of float32, whatever the weights
WHOLE = ("bitsandbytes AdamW", "deepspeed CPUAdam")


def packages(dtype: torch.dtype) -> dict[str, tuple[str, str, float, Build]]:
    """Optimizers by row: the package, its module, the bytes a step moves per weight, and how it is built.

    States of 8 bits are read and written: 4 bytes, and 4 for every 256 entries, twice. FlashOptim's have
    16-bit scales for every 32 entries, and a byte that brings bfloat16 weights to 24 bits.
    """
    size = dtype.itemsize
    low = dtype != torch.float32

    def build(module: str, name: str, **options: object) -> Build:
        return lambda params: getattr(importlib.import_module(module), name)(params, lr=LR, **options)

    def on_cpu(params: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        if params[0].device.type != "cpu":
            raise UnavailableError("updates weights on a CPU only")
        # compiled when the first one is made, which takes a minute, and kept by torch
        return build("deepspeed.ops.adam", "DeepSpeedCPUAdam", weight_decay=0.01)(params)

    return {
        "bitsandbytes AdamW": (
            "bitsandbytes",
            "bitsandbytes.optim",
            3 * size + 16,
            build("bitsandbytes.optim", "AdamW"),
        ),
        "bitsandbytes AdamW8bit": (
            "bitsandbytes",
            "bitsandbytes.optim",
            3 * size + 4.0625,
            build("bitsandbytes.optim", "AdamW8bit"),
        ),
        "torchao AdamW8bit": (
            "torchao",
            "torchao.optim",
            3 * size + 4.0625,
            build("torchao.optim", "AdamW8bit"),
        ),
        "flashoptim FlashAdamW": (
            "flashoptim",
            "flashoptim",
            3 * size + 4.25 + 2 * low,
            build("flashoptim", "FlashAdamW", master_weight_bits=24 if low else None),
        ),
        "deepspeed CPUAdam": ("deepspeed", "deepspeed.ops.adam", 3 * size + 16, on_cpu),
    }


def package_rows(operands: Operands) -> list[Row]:
    """A row for each optimizer of an installed package, and one for each package that is missing."""
    rows = []
    for name, (package, module, moved, build) in packages(operands.dtype).items():
        missing = why_missing(module)
        if missing:
            if package not in [row.name for row in rows]:
                rows.append(Row(package, 0.0, lambda text=missing: _raise(UnavailableError(text))))
            continue

        def make(build: Build = build) -> Step:
            try:
                step = build(operands.params).step
                # some compile at their first step, and fail there
                step()
            except Exception as error:
                raise UnavailableError(first_line(error)) from error
            return step

        rows.append(
            Row(name, moved * operands.numel, make, check=gate(name, build, operands.device, operands.dtype))
        )
    return rows


def gate(name: str, build: Build, device: torch.device, dtype: torch.dtype) -> Callable[[], str | None]:
    """What compares an optimizer of a package with float64 arithmetic, where it does not quantise."""
    if name not in WHOLE:
        return lambda: None
    return lambda: wrong_adamw(build, device, dtype)


def release_flashoptim(params: Sequence[nn.Parameter], dtype: torch.dtype) -> torch.optim.Optimizer:
    """FlashAdamW that updates a weight as soon as its gradient has arrived, and drops that."""
    flashoptim = importlib.import_module("flashoptim")
    low = dtype != torch.float32
    optimizer = flashoptim.FlashAdamW(params, lr=LR, master_weight_bits=24 if low else None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # it asks for a model; a list of parameters is one
        flashoptim.enable_gradient_release(nn.ParameterList(params), optimizer)
    return optimizer


# methods that need a model

LORA_RANK, GALORE_RANK = 8, 64


@dataclass(frozen=True)
class ModelPeer:
    """A method that is given a model, which it may change.

    Args:
        package, module: what it needs; empty for torch's own.
        ideal: the bytes that it holds between steps, for a model that it has not been given yet.
    """

    package: str
    module: str
    build: Callable[[nn.Module], torch.optim.Optimizer]
    ideal: Callable[[nn.Module], float]


def model_peers(dtype: torch.dtype) -> dict[str, ModelPeer]:
    """What others offer for fine-tuning a model in little memory, by row."""
    size = dtype.itemsize

    def dense(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=LR, fused=True)

    def lora(model: nn.Module) -> torch.optim.Optimizer:
        peft = importlib.import_module("peft")
        config = peft.LoraConfig(r=LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        # layers are replaced inside the model; adapters are float32, the rest is frozen. It may use names of
        # transformers that are on their way out
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft.get_peft_model(model, config)
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, fused=True)

    def badam(model: nn.Module) -> torch.optim.Optimizer:
        base = torch.optim.AdamW(model.parameters(), lr=LR)
        named = list(model.named_parameters())
        block = importlib.import_module("badam").BlockOptimizer
        # it prints the names of a block, and warns of float32 weights
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return block(base, named, switch_block_every=50, switch_mode="descending")

    def galore(model: nn.Module) -> torch.optim.Optimizer:
        matrices = [m.weight for m in _linears(model)]
        known = set(matrices)
        groups = [
            {"params": [p for p in model.parameters() if p not in known]},
            {
                "params": matrices,
                "rank": GALORE_RANK,
                "update_proj_gap": 200,
                "scale": 0.25,
                "proj_type": "std",
            },
        ]
        made = importlib.import_module("galore_torch").GaLoreAdamW
        return made(groups, lr=LR, weight_decay=0.01, no_deprecation_warning=True)

    def lora_ideal(model: nn.Module) -> float:
        # weight, gradient and two moments of every adapter, in float32
        adapters = sum(LORA_RANK * sum(m.weight.shape) for m in _linears(model))
        return size * _numel(model.parameters()) + 16 * adapters

    def badam_ideal(model: nn.Module) -> float:
        # master and two moments of one layer, in float32; gradients go before the step ends
        last = list(model.model.layers)[-1]
        return size * _numel(model.parameters()) + 12 * _numel(last.parameters())

    def galore_ideal(model: nn.Module) -> float:
        # each matrix keeps two moments of its longer side and a projector of its shorter, of `rank` columns
        total, low = _numel(model.parameters()), 0
        for matrix in (m.weight for m in _linears(model)):
            rank = min(GALORE_RANK, *matrix.shape)
            low += rank * (2 * max(matrix.shape) + min(matrix.shape)) - 2 * matrix.numel()
        return size * (4 * total + low)

    return {
        "torch.optim.AdamW fused": ModelPeer("", "", dense, lambda m: 4 * size * _numel(m.parameters())),
        f"LoRA, rank {LORA_RANK}, AdamW": ModelPeer("peft", "peft", lora, lora_ideal),
        "BAdam, one layer at a time": ModelPeer("badam", "badam", badam, badam_ideal),
        f"GaLore, rank {GALORE_RANK}": ModelPeer("galore-torch", "galore_torch", galore, galore_ideal),
    }


def _linears(model: nn.Module) -> list[nn.Linear]:
    """The matrices between embedding and head."""
    named = model.named_modules()
    return [m for name, m in named if isinstance(m, nn.Linear) and "head" not in name]


def _numel(params: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in params)


def small_llama(dtype: torch.dtype, device: torch.device, *, tiny: bool = False) -> nn.Module:
    """A Llama of 10 million weights with random values, or one of a few thousand."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = (
        {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": 64}
        if tiny
        else {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 10, "vocab_size": 4096}
    )
    config = LlamaConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=False, use_cache=False
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).to(device, dtype)


def why_missing(module: str) -> str:
    """Why a package cannot be imported; empty if it can."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        return f"not installed ({error})" if error.name != module.partition(".")[0] else "not installed"
    except Exception as error:
        return f"cannot be imported: {first_line(error)}"
    return ""


def _raise(error: Exception) -> Step:
    raise error
