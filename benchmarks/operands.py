"""The tensors that kernels and optimizers are measured on: weights in the shapes of a transformer, gradients,
moments, masks.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sparse_optim.backends import reference
from sparse_optim.backends.reference import EVERY_TIE, Cuts, Draws

# tiny, so that weights stay what they are over thousands of steps
LR = 1e-7
SEED = 2**40 + 3

Shapes = list[tuple[int, ...]]


def transformer_shapes(hidden: int, layers: int, vocabulary: int) -> Shapes:
    """Shapes of a BERT-like encoder with its pooler."""
    h, norm = hidden, [(hidden,), (hidden,)]
    layer = [(h, h), (h,)] * 4 + norm + [(4 * h, h), (4 * h,), (h, 4 * h), (h,)] + norm
    return [(vocabulary, h), (512, h), (2, h), *norm, *layer * layers, (h, h), (h,)]


BERT_BASE = transformer_shapes(768, 12, 30522)
# as many tensors as BERT-base, of 2.6 million entries in all: the cost of many small calls shows
SMALL_BERT = transformer_shapes(128, 12, 1000)


def shapes_of(numel: int) -> Shapes:
    """Transformer shapes with about this many entries: 199 tensors, or 23 where they would be tiny."""
    layers = 12 if numel >= 1_000_000 else 1
    # 12 h^2 a layer, a vocabulary of 16 h, and the pooler
    hidden = max(8, 8 * round((numel / (12 * layers + 17)) ** 0.5 / 8))
    return transformer_shapes(hidden, layers, 16 * hidden)


def touched(density: float, device: torch.device, element_size: int = 4) -> float:
    """The share of memory lines (32 bytes on a GPU, 64 on a CPU) with at least one selected entry."""
    entries = (32 if device.type == "cuda" else 64) // element_size
    return 1 - (1 - density) ** entries


class Operands:
    """What the verbs take. Everything is made when it is first asked for, and kept.

    Args:
        dtype: to which weights and gradients are rounded.
        stored: in which they, and moments, are then kept; None for `dtype`.
        source: where random numbers are drawn; None for `device`.
    """

    def __init__(
        self,
        shapes: Shapes,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        *,
        moments: torch.dtype | None = None,
        stored: torch.dtype | None = None,
        source: torch.device | None = None,
    ) -> None:
        self.shapes, self.device, self.dtype = shapes, device, dtype
        self.stored = stored or dtype
        self.moment_dtype = stored or moments or dtype
        self.source = source or device
        self.generator = torch.Generator(self.source).manual_seed(0)
        self.params = [nn.Parameter(self._normal(shape, 0.02)) for shape in shapes]
        self.renew_gradients()
        self.numel = sum(p.numel() for p in self.params)

    def with_moments(self, dtype: torch.dtype) -> Operands:
        """The same weights and gradients with moments of their own, of this dtype."""
        other = copy.copy(self)
        for name in ("exp_avgs", "exp_avg_sqs"):
            vars(other).pop(name, None)
        other.moment_dtype = dtype
        return other

    def _normal(self, shape: tuple[int, ...], scale: float) -> Tensor:
        drawn = torch.randn(shape, generator=self.generator, device=self.source, dtype=torch.float32)
        return drawn.mul_(scale).to(self.dtype).to(self.device, self.stored)

    def renew_gradients(self) -> None:
        """Draws other gradients."""
        for p, shape in zip(self.params, self.shapes, strict=True):
            drawn = self._normal(shape, 1e-3)
            p.grad = drawn if p.grad is None else p.grad.copy_(drawn)

    @functools.cached_property
    def weights(self) -> list[Tensor]:
        """The parameters without autograd; verbs write them."""
        return [p.data for p in self.params]

    @property
    def grads(self) -> list[Tensor]:
        """The gradients."""
        return [p.grad for p in self.params if p.grad is not None]

    @functools.cached_property
    def exp_avgs(self) -> list[Tensor]:
        """Parameter-shaped first moments; all rows that keep such share these."""
        return [torch.zeros_like(w, dtype=self.moment_dtype) for w in self.weights]

    @functools.cached_property
    def exp_avg_sqs(self) -> list[Tensor]:
        """Parameter-shaped second moments."""
        return [torch.zeros_like(w, dtype=self.moment_dtype) for w in self.weights]

    def steps(self) -> list[Tensor]:
        """New step counts, on the CPU as in the optimizer."""
        return [torch.zeros(()) for _ in self.params]

    @functools.cached_property
    def scores(self) -> list[Tensor]:
        """float32, uniform in [0, 1)."""
        drawn = (
            torch.rand(shape, generator=self.generator, device=self.source, dtype=torch.float32)
            for shape in self.shapes
        )
        return [t.to(self.device) for t in drawn]

    def cuts(self, density: float) -> Cuts:
        """The threshold that selects this share of `scores`."""
        # the sort key of a positive float32 is its bits above 2^31
        key = int(torch.tensor(1 - density, dtype=torch.float32).view(torch.int32)) + (1 << 31)
        keys = torch.full((len(self.shapes),), key, dtype=torch.int64, device=self.device)
        return Cuts(keys, torch.full_like(keys, EVERY_TIE))

    def masks(self, density: float) -> list[Tensor]:
        """The entries above that threshold, bool."""
        return [score > 1 - density for score in self.scores]

    def draws(self, keep: float) -> Draws:
        """A seeded mask."""
        return Draws(SEED, 0, int(keep * 2**32), list(range(len(self.shapes))))

    def drawn_masks(self, keep: float) -> list[Tensor]:
        """The same as bool."""
        return [
            reference.seeded_mask(self.draws(keep), i, w.numel(), reference.whole(w), w.device).view(w.shape)
            for i, w in enumerate(self.weights)
        ]

    def bits(self, density: float) -> list[Tensor]:
        """`masks`, packed."""
        return [reference.pack_bits(mask.view(-1)) for mask in self.masks(density)]

    def compact(self, density: float) -> Compact:
        """`masks` as lists, with moments of their own."""
        return Compact(self, density)

    def statistics(self) -> list[Tensor]:
        """New statistics, zero."""
        return [torch.zeros_like(w, dtype=torch.float32) for w in self.weights]

    def flags(self) -> list[Tensor]:
        """New flags of non-finite gradients."""
        return [torch.zeros((), dtype=torch.bool, device=self.device) for _ in self.params]

    def with_own_gradients(self) -> tuple[list[nn.Parameter], Callable[[], None]]:
        """The same weights with a copy of the gradients, for formulations that write to these, and what
        restores them.
        """
        aliases = [nn.Parameter(w) for w in self.weights]
        for alias, grad in zip(aliases, self.grads, strict=True):
            alias.grad = grad.clone()

        def restore() -> None:
            torch._foreach_copy_([alias.grad for alias in aliases], self.grads)

        return aliases, restore


class Compact:
    """Lists of selected entries, with moments (and masters of low-precision weights) as long as they are."""

    def __init__(self, operands: Operands, density: float) -> None:
        self.indices = [
            mask.view(-1).nonzero().view(-1).to(reference.index_dtype(mask.numel()))
            for mask in operands.masks(density)
        ]
        dtype = torch.float64 if operands.stored == torch.float64 else torch.float32
        self.exp_avgs = [torch.zeros(i.numel(), dtype=dtype, device=i.device) for i in self.indices]
        self.exp_avg_sqs = [torch.zeros_like(exp_avg) for exp_avg in self.exp_avgs]
        self.masters: list[Tensor] = []
        if operands.dtype not in (torch.float32, torch.float64):
            self.masters = [
                w.view(-1)[where.long()].to(dtype)
                for w, where in zip(operands.weights, self.indices, strict=True)
            ]
