"""Policies decide which entries train at this step. A policy is an immutable record and owns no memory.

There are two mechanisms: `Bernoulli` draws entries at random, `TopK` ranks them by a statistic of their
gradients. `Schedule` says when a TopK policy looks and when it trains.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from .backends.reference import BEYOND_ALL_KEYS, EVERY_TIE, FIRST_WIDTH, Cuts, Geometry, key_bits
from .masks import Bits, Indexed, Mask, Seeded
from .scores import SquaredGradient, Statistic, check_statistic, check_steps

Reduce = Callable[[Tensor], Tensor]


def _check_fraction(name: str, value: float, remedy: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value <= 1.0:
        raise ValueError(f"{name} must be in (0, 1], got {value!r}; {remedy}.")


def _check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        listed = " or ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be {listed}, got {value!r}; choose one of them.")


@dataclass(frozen=True)
class Schedule:
    """When a TopK policy observes and when it trains, counted in applied optimizer steps.

    Args:
        observe: observe during this many `step()` calls, then select. None: observation is explicit, through
            `optimizer.observe()` after a backward pass, and the next `step()` (or `optimizer.select()`)
            selects.
        train: train the selection for this many steps, then observe again, and so on. None: train it for
            ever.
        meanwhile: what a `step()` that observes trains: "nothing" or "everything".
    """

    observe: int | None = None
    train: int | None = None
    meanwhile: Literal["nothing", "everything"] = "nothing"

    def __post_init__(self) -> None:
        _check_choice("meanwhile", self.meanwhile, ("nothing", "everything"))
        if self.observe is not None:
            check_steps("observe", self.observe, "use None to call optimizer.observe() yourself")
        if self.train is not None:
            check_steps("train", self.train, "use None to train the selection for ever")
            if self.observe is None:
                raise ValueError(
                    f"train must be None when observe is None, got {self.train!r}; "
                    "give observe=n to alternate, or select again with optimizer.observe() and "
                    "optimizer.select()."
                )
        if self.observe is None and self.meanwhile == "everything":
            raise ValueError(
                "meanwhile must be 'nothing' when observe is None, got 'everything'; "
                "give observe=n for steps that observe and train."
            )

    def phase(self, clock: int) -> int:
        """The phase after `clock` applied steps: 0, 2, 4, ... observe and 1, 3, 5, ... train."""
        if self.observe is None:
            raise ValueError("an explicit schedule has no clock; the optimizer keeps its phase.")
        if self.train is None:
            return int(clock >= self.observe)
        cycles, within = divmod(clock, self.observe + self.train)
        return 2 * cycles + int(within >= self.observe)


_NUMBERED_LAYER = r"^(?:.*?\.)??\d+(?=\.)"
_BELOW_ALL_LAYERS = re.compile(r"embed|(^|\.)(wte|wpe|shared)(\.|$)")


def _numbered_layer(name: str, pattern: str | None) -> str | None:
    found = re.search(_NUMBERED_LAYER if pattern is None else pattern, name)
    return found.group() if found else None


def layer_of(name: str, pattern: str | None = None) -> str:
    """The layer that a parameter belongs to.

    Its name up to the first number ("encoder.layer.3"), or what `pattern` finds in it; for a name without
    either, the module that holds the parameter.
    """
    return _numbered_layer(name, pattern) or name.rpartition(".")[0] or name


def _check_pattern(pattern: str | None) -> None:
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise ValueError(
            f"layers must be a regular expression, got {pattern!r} ({error}); None finds numbered layers by "
            "itself."
        ) from error


@dataclass(frozen=True)
class Bernoulli:
    """Select every entry with probability `keep`, drawn from a counter-based generator and never stored.

    The mask depends on the optimizer's seed, the number of the draw, the parameter's name and the entry's
    index alone: not on the device, the backend, the order of updates or the number of ranks.

    Args:
        keep: probability that an entry is selected, in (0, 1].
        unit: what is selected as a whole: "entry", "tensor", or "layer" (all tensors of a numbered layer;
            needs named parameters).
        every: draw anew every so many steps, or "epoch": whenever `optimizer.new_epoch()` is called, which
            then has to happen at the start of every epoch.
        rescale: divide surviving gradients by `keep`, so that their mean is that of the dense gradient. Under
            AdamW only `eps` sees it.
        layers: regular expression whose match in a parameter's name is its layer, for `unit="layer"`; None
            takes the name up to the first number. Parameters of neither form a layer with the others of their
            module.
    """

    keep: float
    unit: Literal["entry", "tensor", "layer"] = "entry"
    every: int | Literal["epoch"] = 1
    rescale: bool = False
    layers: str | None = None

    def __post_init__(self) -> None:
        _check_pattern(self.layers)
        _check_fraction("keep", self.keep, "to train nothing, leave the parameters out of the optimizer")
        object.__setattr__(self, "keep", float(self.keep))
        if self.keep < 2**-32:
            raise ValueError(f"keep must be at least 2**-32, got {self.keep!r}; less selects nothing.")
        _check_choice("unit", self.unit, ("entry", "tensor", "layer"))
        if self.layers is not None and self.unit != "layer":
            raise ValueError(
                f"layers must be None unless unit='layer', got {self.layers!r} with unit={self.unit!r}."
            )
        if self.every != "epoch":
            check_steps("every", self.every, "use every=1 for a fresh mask at each step, or 'epoch'")

    @property
    def trains_everything(self) -> bool:
        """keep = 1 is AdamW."""
        return self.keep == 1

    def draw(self, clock: int, epoch: int) -> int:
        """The number of the mask that applies after `clock` applied steps, in the `epoch`-th epoch."""
        return epoch - 1 if self.every == "epoch" else clock // self.every

    def mask(self, seed: int, draw: int, key: int) -> Seeded:
        """The mask of one tensor."""
        return Seeded(seed, draw, math.floor(self.keep * 2**32), key, self.unit != "entry")


@dataclass(frozen=True)
class TopK:
    """Select the `int(density * n)` entries with the highest scores, exactly, ties to the lowest index.

    n counts the entries of masked parameters that received a gradient while observing. Non-finite scores are
    never selected.

    Args:
        density: selected / all, in (0, 1].
        statistic: what is remembered about gradients while observing: `SquaredGradient()` or
            `SignedGradient()`.
        scope: one threshold for all tensors ("global"), or one for each ("tensor", rounded down in each).
        schedule: when to observe and when to train.
        cut: "exact", or "percentile": every entry at or above the (1 - density) percentile, found by linear
            interpolation, as released code has it, or "ceil": every entry at or above the ceil(density n)-th
            highest. Both select more when there are ties.
    """

    density: float
    statistic: Statistic = field(default_factory=SquaredGradient)
    scope: Literal["global", "tensor"] = "global"
    schedule: Schedule = field(default_factory=Schedule)
    cut: Literal["exact", "percentile", "ceil"] = "exact"

    def __post_init__(self) -> None:
        _check_fraction(
            "density", self.density, "to train nothing, leave the parameters out of the optimizer"
        )
        object.__setattr__(self, "density", float(self.density))
        _check_choice("scope", self.scope, ("global", "tensor"))
        _check_choice("cut", self.cut, ("exact", "percentile", "ceil"))
        if not isinstance(self.schedule, Schedule):
            raise TypeError(f"schedule must be a Schedule, got {self.schedule!r}; write Schedule(observe=n).")
        check_statistic(self.statistic)

    @property
    def trains_everything(self) -> bool:
        """density = 1 is AdamW."""
        return self.density == 1

    def select(
        self,
        statistics: Sequence[Tensor],
        backend: ModuleType,
        *,
        as_bits: bool,
        geometries: Sequence[Geometry] | None = None,
        reduce: Reduce = lambda counts: counts,
        counted: Sequence[bool] | None = None,
        first_counts: Tensor | None = None,
    ) -> list[Mask]:
        """The masks of the selected entries, by radix histograms: no sort, and no copy of the scores.

        Args:
            statistics: one tensor per parameter, in the order that breaks ties.
            as_bits: `Bits` rather than `Indexed` masks.
            reduce: sums int64 counts over ranks.
            counted: whether this rank counts a tensor, of which others may hold a copy; None: all of them.
            first_counts: what `accumulate_` counted of these very statistics, int64 [rows, 2048]; None counts
                here.

        Raises:
            RuntimeError: when fewer finite scores than k are left, or a global k is 0.
        """
        mine = statistics
        if counted is not None:
            mine = [s if counts else s.flatten()[:0] for s, counts in zip(statistics, counted, strict=True)]
        selection = _Selection(mine, backend, self.statistic.absolute, self.scope, geometries, reduce)
        cuts = selection.cuts(self.density, self.cut, first_counts)
        masks = backend.compact(
            statistics, cuts=cuts, as_bits=as_bits, absolute=self.statistic.absolute, geometries=geometries
        )
        return [Bits(mask) if as_bits else Indexed(mask) for mask in masks]


@dataclass(frozen=True)
class GradualUnfreezing:
    """Train the head first, then one layer more at each stage, top layer first: GradDrop's baseline.

    In stage s = 0, 1, 2, ... the s highest numbered layers train, and everything above them. Parameters
    outside the
    numbered layers count as above, unless their name speaks of embeddings: these train once all layers do.
    The paper does not give its schedule; this one is that of Howard and Ruder. Layers that do not train yet
    are frozen.

    Args:
        every: steps a stage lasts, or "epoch": as long as an epoch, each begun by `optimizer.new_epoch()`.
        layers: regular expression whose match in a parameter's name is its layer; None takes the name up to
            the first number.

    References:
        Howard and Ruder, Universal Language Model Fine-tuning for Text Classification, ACL 2018.
    """

    every: int | Literal["epoch"] = "epoch"
    layers: str | None = None

    def __post_init__(self) -> None:
        _check_pattern(self.layers)
        if self.every != "epoch":
            check_steps("every", self.every, "give the steps of a stage, or 'epoch'")

    @property
    def trains_everything(self) -> bool:
        """Never from the start."""
        return False

    def draw(self, clock: int, epoch: int) -> int:
        """The stage after `clock` applied steps, in the `epoch`-th epoch."""
        return epoch - 1 if self.every == "epoch" else clock // self.every

    def depth(self, names: Iterable[str]) -> dict[str, int]:
        """For each parameter name the first stage in which it trains."""
        layer = {name: _numbered_layer(name, self.layers) for name in names}
        numbers = {found: [int(n) for n in re.findall(r"\d+", found)] for found in layer.values() if found}
        first = {
            found: 1 + i
            for i, found in enumerate(sorted(numbers, key=lambda f: (numbers[f], f), reverse=True))
        }
        return {
            name: first[found] if found else 1 + len(first) if _BELOW_ALL_LAYERS.search(name) else 0
            for name, found in layer.items()
        }


Policy = Bernoulli | TopK | GradualUnfreezing


@dataclass
class _Selection:
    """One exact selection: rounds of histograms that narrow the threshold of each row of counts.

    A row is the whole model in global scope, and one tensor in tensor scope. All rows go through a round
    together and stay where the scores are; the host reads five numbers a row, once, after the last round.
    """

    statistics: Sequence[Tensor]
    backend: ModuleType
    absolute: bool
    scope: str
    geometries: Sequence[Geometry] | None
    reduce: Reduce

    def cuts(self, density: float, cut: str, first_counts: Tensor | None) -> Cuts:
        per_tensor = self.scope == "tensor"
        tensors = len(self.statistics)
        bits = max((key_bits(s) for s in self.statistics), default=32)
        device = self.statistics[0].device if tensors else torch.device("cpu")
        prefixes = torch.zeros(tensors if per_tensor else 1, dtype=torch.int64, device=device)
        above = torch.zeros_like(prefixes)  # keys above the prefix so far
        finite = total = wanted = tied = prefixes
        for number, (width, shift) in enumerate(_rounds(bits)):
            if number == 0:
                counts = self._first_counts(width, shift, prefixes, first_counts)
                finite, total = counts[:, :-1].sum(1), counts[:, -1]
                wanted = _wanted(density, cut, finite, total)
                counts = counts[:, :-1]
            else:
                counts = self._count(range(tensors), prefixes, shift=shift, width=width, rows=len(prefixes))
            digits, passed = _descend(counts, wanted - above)
            # in the last round, the entries whose key is the threshold
            tied = counts.gather(1, digits.unsqueeze(1)).squeeze(1)
            prefixes, above = prefixes << width | digits, above + passed
        missing = wanted - above
        facts = torch.stack([finite, total, wanted, missing, tied]).T.tolist()
        for row_finite, row_total, row_wanted, _, _ in facts:
            self._check(density, row_finite, row_total, row_wanted)
        keys = torch.where(wanted == 0, BEYOND_ALL_KEYS, prefixes)
        last_ties = torch.full_like(keys, EVERY_TIE).expand(tensors).clone()
        split = [
            row
            for row, (_, _, row_wanted, row_missing, row_tied) in enumerate(facts)
            if cut == "exact" and row_wanted and row_missing < row_tied
        ]
        if split and per_tensor:
            last_ties[split] = self._cut_ties(split, keys[split], missing[split])
        elif split:
            self._cut_ties_across_tensors(keys, facts[0][3], last_ties)
        return Cuts(keys.expand(tensors), last_ties)

    def _check(self, density: float, finite: int, total: int, wanted: int) -> None:
        if wanted == 0 and self.scope == "global":
            raise RuntimeError(
                f"density must select at least one of the {total} observed entries, got {density!r}; raise "
                "the density."
            )
        if wanted > finite:
            raise RuntimeError(
                f"density {density!r} needs {wanted} finite scores, got {finite} of {total}; observe finite "
                "gradients, or lower the density."
            )

    def _first_counts(self, width: int, shift: int, prefixes: Tensor, counts: Tensor | None) -> Tensor:
        """Counts of the first round, and in a last column the number of entries, finite or not."""
        if counts is None:
            counts = self.backend.histogram(
                self.statistics,
                shift=shift,
                width=width,
                prefixes=prefixes.expand(len(self.statistics)),
                per_tensor=self.scope == "tensor",
                absolute=self.absolute,
            )
        numels = torch.tensor([score.numel() for score in self.statistics], device=counts.device)
        numels = numels.long() if self.scope == "tensor" else numels.long().sum(0, keepdim=True)
        return self.reduce(torch.cat([counts, numels.unsqueeze(1)], dim=1))

    def _count(
        self,
        tensors: Sequence[int],
        prefixes: Tensor,
        *,
        shift: int,
        width: int,
        rows: int,
        ties: Tensor | None = None,
    ) -> Tensor:
        """Counts summed over ranks: a row for each of these tensors, or one for all."""
        counts: Tensor = self.backend.histogram(
            [self.statistics[i] for i in tensors],
            shift=shift,
            width=width,
            prefixes=prefixes.expand(len(tensors)),
            per_tensor=rows == len(tensors),
            absolute=self.absolute,
            ties=None if ties is None else ties.expand(len(tensors)),
            geometries=None if self.geometries is None else [self.geometries[i] for i in tensors],
        )
        return self.reduce(counts)

    def _cut_ties(self, tensors: Sequence[int], keys: Tensor, missing: Tensor) -> Tensor:
        """Of each tensor's entries equal to its threshold take the `missing` lowest: the last global
        index.
        """
        last, before = torch.zeros_like(missing), torch.zeros_like(missing)
        for width, shift in _rounds(_INDEX_BITS):
            counts = self._count(tensors, last, shift=shift, width=width, rows=len(tensors), ties=keys)
            # ascending, hence from the other end
            digits, passed = _descend(counts.flip(1), missing - before)
            last = last << width | (1 << width) - 1 - digits
            before += passed
        return last

    def _cut_ties_across_tensors(self, key: Tensor, missing: int, last_ties: Tensor) -> None:
        """Of all entries equal to one threshold take those with the lowest (tensor, global index)."""
        everywhere = range(len(last_ties))
        ties = self._count(
            everywhere, torch.zeros_like(key), shift=_INDEX_BITS, width=0, rows=len(last_ties), ties=key
        )
        for tensor, count in enumerate(ties[:, 0].tolist()):
            if missing == 0:
                last_ties[tensor] = -1
            elif missing < count:
                last_ties[tensor] = self._cut_ties([tensor], key, torch.full_like(key, missing))[0]
            missing -= min(missing, count)


def _wanted(density: float, cut: str, finite: Tensor, total: Tensor) -> Tensor:
    """How many entries each row selects, in double arithmetic."""
    if cut == "percentile":
        # the percentile lies between two neighbours in the order: entries from the upper one on pass, or
        # from the lower one on where the double that says how far it lies between them is nothing but
        # rounding
        place = (finite - 1).clamp(min=0).double() * ((1 - density) * 100 / 100)
        lower = place.floor()
        return finite - torch.where(place - lower <= place * 2**-50, lower, lower + 1).long()
    wanted = total.double() * density
    return (wanted.ceil() if cut == "ceil" else wanted).long()


_INDEX_BITS = 44  # 2**44 entries in one tensor


def _rounds(bits: int) -> list[tuple[int, int]]:
    """(width, shift) of radix rounds of at most 11 bits, highest bits first: 11 + 11 + 10 for 32."""
    rounds = []
    while bits > 0:
        width = min(FIRST_WIDTH, bits)
        bits -= width
        rounds.append((width, bits))
    return rounds


def _descend(counts: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """In each row, from the highest bin down, the bin that holds the `wanted`-th entry, and how many lie
    above it.
    """
    reached = counts.flip(1).cumsum(1)
    places = torch.searchsorted(reached, wanted.clamp(min=1).unsqueeze(1)).clamp(max=counts.shape[1] - 1)
    passed = torch.where(places > 0, reached.gather(1, (places - 1).clamp(min=0)), 0)
    return counts.shape[1] - 1 - places.squeeze(1), passed.squeeze(1)
