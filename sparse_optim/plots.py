"""Pictures of masks, of what changes in them, and of what they cost. Needs matplotlib: the extra `plots`.

Each function that draws writes two files: a PNG, and beside it, with the same stem, a CSV file of the numbers
in it. Both are written under hidden names first, so that a run that is stopped leaves the old ones. A share
of nothing (0 / 0) is not defined: it is NaN in the rows that are returned, an empty cell in the CSV file, "-"
in the picture. Everything is drawn without a display, and without matplotlib's global state.
"""

from __future__ import annotations

import csv
import math
import os
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy
import torch
from torch import Tensor

from . import Delta, MaskedAdamW

_BLUE, _ORANGE, _DARK = "#2f6db0", "#d9822b", "#444444"
# of weights, gradients, states and masks, as in the figures of the benchmarks
_SHADES = ("#8c96a6", "#c9ced6", _ORANGE, _BLUE)
_DPI = 130
# inches; a picture of 65,536 pixels is the largest that matplotlib draws
_BAR, _MOST = 0.22, 400.0
_KINDS = ("weights", "gradients", "states", "masks", "gradient_buffers")


class Estimate(Protocol):
    """What is needed of the result of `estimate_memory`, in bytes."""

    @property
    def weights(self) -> int: ...
    @property
    def gradients(self) -> int: ...
    @property
    def states(self) -> int: ...
    @property
    def masks(self) -> int: ...
    @property
    def gradient_buffers(self) -> int: ...
    @property
    def peak(self) -> int: ...


Selection = MaskedAdamW | Mapping[str, Tensor] | Delta
NamedParameters = Iterable[tuple[str, Tensor]]


class TensorDensity(NamedTuple):
    """How much of one tensor is selected: trained, or changed."""

    name: str
    layer: str
    module_type: str
    entries: int
    selected: int
    density: float


class GroupDensity(NamedTuple):
    """How much of one layer, or of one type of module in all layers, is selected."""

    by: str  # "layer" or "module type"
    name: str
    entries: int
    selected: int
    density: float


class Overlap(NamedTuple):
    """Of the entries that at least one of two selections has, the share that both have, |A n B| / |A u B|.

    Attributes:
        layer: in which it is counted; "" for all layers together.
        first, second: the names of the two.
        entries: of the tensors that all selections have.
        selected_first, selected_second, intersection, union: numbers of entries.
        overlap: intersection / union.
        chance: what to expect of two selections of these sizes that know nothing of each other: x / (a + b -
            x), where x = a b / n is the mean of the intersection.
        chance_by_tensor: the same for two that have in every tensor as many entries as these; what it
            exceeds `chance` by comes from a preference for the same tensors.
    """

    layer: str
    first: str
    second: str
    entries: int
    selected_first: int
    selected_second: int
    intersection: int
    union: int
    overlap: float
    chance: float
    chance_by_tensor: float


class Churn(NamedTuple):
    """What `MaskHistory.record` counts.

    Attributes:
        step: as given.
        density: share of all entries that are selected.
        entered: share of the selected entries that were not selected at the record before. Not defined for
            the first record, and where nothing is selected; 1 after a record without a selected entry.
        overlap_with_first: overlap, as in `Overlap`, with the first record that has a selected entry. Not
            defined before that one.
    """

    step: int
    density: float
    entered: float
    overlap_with_first: float


class Cost(NamedTuple):
    """What one way of training holds and how long it takes.

    Attributes:
        name: in words.
        sizes: bytes by kind, {"weights": 2e9, "states": 8e9}, say; or the result of `estimate_memory`, of
            which the kinds between two steps are taken and the peak.
        ms: milliseconds a step; None where it was not measured.
    """

    name: str
    sizes: Mapping[str, float] | Estimate
    ms: float | None = None


def density_rows(
    selection: Selection, named_parameters: NamedParameters | None = None, *, upcoming: bool = False
) -> list[TensorDensity]:
    """How many entries of each tensor are selected.

    The layer is the name up to the first number ("encoder.layer.3"), or else the module that holds the
    tensor. The module type is what is left of the name without the layer, numbers and a last "weight":
    "attention.self.query", "mlp.gate_proj"; every bias is of the type "bias".

    Args:
        selection: an optimizer, of which the mask of the last update is read; masks by name, bool, each in
            its tensor's shape, True where selected; or a delta. Of DTensors all processes have to ask
            together.
        named_parameters: for an optimizer: what `model.named_parameters()` returns, in which nothing is
            selected of parameters that the optimizer does not have. None takes the optimizer's own, if it was
            given names.
        upcoming: for an optimizer: what the next update trains, as in `optimizer.mask(p, upcoming=True)`.

    Returns:
        A row for each tensor, in order.

    Raises:
        TypeError: for anything else. ValueError: for bad masks, missing names, or nothing at all.

    Example:
        >>> import torch
        >>> from sparse_optim.plots import density_rows
        >>> mask = torch.tensor([True, False, False, False])
        >>> density_rows({"layer.0.mlp.dense.weight": mask})[0][1:]
        ('layer.0', 'mlp.dense', 4, 1, 0.25)
    """
    rows = []
    for name, mask in _masks_of(selection, named_parameters, upcoming).items():
        selected = int(mask.read().sum())
        layer, module_type = _layer_and_module_type(name)
        rows.append(
            TensorDensity(name, layer, module_type, mask.entries, selected, _share(selected, mask.entries))
        )
    return rows


def draw_density(
    selection: Selection,
    path: str | os.PathLike[str],
    named_parameters: NamedParameters | None = None,
    *,
    upcoming: bool = False,
) -> list[GroupDensity]:
    """Draws which layers and which types of modules would train, or did change.

    Densities are drawn on a logarithmic axis where they differ by a factor of more than 30.

    Args:
        selection, named_parameters, upcoming: as in `density_rows`.
        path: of the picture, a .png file.

    Returns:
        The rows of the CSV file: first all layers, then all module types.

    Raises:
        TypeError, ValueError: as in `density_rows`, or for a bad path. ImportError: without matplotlib.

    Example:
        >>> import tempfile, torch
        >>> from sparse_optim.plots import draw_density
        >>> masks = {f"layer.{i}.mlp.weight": torch.arange(4) < i for i in range(3)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     rows = draw_density(masks, f"{folder}/density.png")
        >>> [(row.name, row.density) for row in rows]
        [('layer.0', 0.0), ('layer.1', 0.25), ('layer.2', 0.5), ('mlp', 0.25)]
    """
    target = _target(path)
    tensors = density_rows(selection, named_parameters, upcoming=upcoming)
    rows = []
    for by, key in (("layer", "layer"), ("module type", "module_type")):
        groups: dict[str, list[TensorDensity]] = {}
        for tensor in tensors:
            groups.setdefault(getattr(tensor, key), []).append(tensor)
        for name, members in groups.items():
            entries, selected = (sum(getattr(m, count) for m in members) for count in ("entries", "selected"))
            rows.append(GroupDensity(by, name, entries, selected, _share(selected, entries)))
    panels = [[row for row in rows if row.by == by] for by in ("layer", "module type")]
    figure = _figure("draw_density", 7.5, 1.6 + _bars_height(*panels))
    heights = [len(panel) + 1 for panel in panels]
    total = _share(sum(t.selected for t in tensors), sum(t.entries for t in tensors))
    for axes, panel in zip(figure.subplots(2, 1, sharex=True, height_ratios=heights), panels, strict=True):
        percent = [100 * row.density for row in panel]
        _draw_bars(axes, [row.name for row in panel], percent, [_text(x, "{:.3g} %") for x in percent])
        _scale(axes, [100 * row.density for row in rows])
        if total > 0:
            axes.axvline(100 * total, color=_ORANGE, linestyle="--", linewidth=1, zorder=0)
        axes.set_title(f"by {panel[0].by}", loc="left", fontsize=10)
    axes.set_xlabel(f"selected entries, %; dashed: {_text(100 * total, '{:.3g} %')} of all", fontsize=9)
    _save(figure, target, GroupDensity._fields, rows)
    return rows


def overlap_rows(selections: Mapping[str, Selection], *, by_layer: bool = False) -> list[Overlap]:
    """The overlap of every pair of selections, each with itself included, and what chance would give.

    Tensors are matched by name. In one that not all selections have, nothing may be selected; it is left out.

    Args:
        selections: two or more by name, each as in `density_rows`; an optimizer has to know its names. An
            optimizer's last mask counts.
        by_layer: whether to count every layer for itself.

    Returns:
        A row for each layer, if `by_layer`, and pair.

    Raises:
        TypeError: for a selection that is none. ValueError: for fewer than two, and for tensors that do not
            match.

    Example:
        >>> import torch
        >>> from sparse_optim.plots import overlap_rows
        >>> first, second = torch.arange(8) < 4, torch.arange(8) % 2 == 0
        >>> row = overlap_rows({"first": {"w": first}, "second": {"w": second}})[1]
        >>> row.intersection, row.union, row.overlap == row.chance
        (2, 6, True)
    """
    if not isinstance(selections, Mapping) or len(selections) < 2:
        got = repr(list(selections)) if isinstance(selections, Mapping) else _kind(selections)
        raise ValueError(
            f"selections must be two or more by name, got {got}; write {{'first': mask, 'second': other}}."
        )
    masks = {label: _masks_of(selection, None, False) for label, selection in selections.items()}
    # one tensor of each selection is held at a time
    sums: dict[tuple[str, str, str], list[float]] = {}
    for name in _names_of_all(masks):
        entries = next(iter(masks.values()))[name].entries
        layer = _layer_and_module_type(name)[0] if by_layer else ""
        flat = {label: own[name].read() for label, own in masks.items()}
        counts = {label: int(mask.sum()) for label, mask in flat.items()}
        for first, second in combinations_with_replacement(flat, 2):
            both = int((flat[first] & flat[second]).sum())
            expected = counts[first] * counts[second] / max(1, entries)
            new = (entries, counts[first], counts[second], both, expected)
            old = sums.setdefault((layer, first, second), [0, 0, 0, 0, 0.0])
            sums[layer, first, second] = [a + b for a, b in zip(old, new, strict=True)]
    rows = []
    for (layer, first, second), (*counted, expected) in sums.items():
        n, a, b, both = map(int, counted)
        union = a + b - both
        chances = [_share(x, a + b - x) for x in (a * b / max(1, n), expected)]
        rows.append(Overlap(layer, first, second, n, a, b, both, union, _share(both, union), *chances))
    return rows


def draw_overlap(selections: Mapping[str, Selection], path: str | os.PathLike[str]) -> list[Overlap]:
    """Draws the overlap of every pair of two or more selections, with what chance would give in brackets.

    Args:
        selections: as in `overlap_rows`.
        path: of the picture, a .png file.

    Returns:
        The rows of the CSV file.

    Raises:
        TypeError, ValueError: as in `overlap_rows`, or for a bad path. ImportError: without matplotlib.

    Example:
        >>> import tempfile, torch
        >>> from sparse_optim.plots import draw_overlap
        >>> masks = {name: {"w": torch.rand(1000) < 0.3} for name in ("seed 0", "seed 1", "seed 2")}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     len(draw_overlap(masks, f"{folder}/overlap.png"))
        6
    """
    target = _target(path)
    rows = overlap_rows(selections)
    labels = list(selections)
    place = {label: number for number, label in enumerate(labels)}
    values = numpy.full((len(labels), len(labels)), math.nan)
    size = 0.7 * len(labels)
    figure = _figure("draw_overlap", 3.4 + size, 2.2 + size)
    axes = figure.subplots()
    for row in rows:
        for y, x in {(place[row.first], place[row.second]), (place[row.second], place[row.first])}:
            values[y, x] = row.overlap
            text = _text(row.overlap, "{:.2f}")
            if row.first != row.second:
                text += f"\n({_text(row.chance, '{:.2f}')})"
            color = "white" if row.overlap > 0.5 else "black"
            axes.annotate(text, (x, y), ha="center", va="center", fontsize=8, color=color)
    image = axes.imshow(values, vmin=0, vmax=1, cmap="Blues")
    shown = [_short(label) for label in labels]
    axes.set_xticks(range(len(labels)), shown, rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(range(len(labels)), shown, fontsize=8)
    axes.set_title("selected by both / by at least one\n(in brackets: by chance)", fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.8)
    _save(figure, target, Overlap._fields, rows)
    return rows


def draw_overlap_by_layer(selections: Mapping[str, Selection], path: str | os.PathLike[str]) -> list[Overlap]:
    """Draws the overlap of exactly two selections in each layer, with what chance would give.

    The axis is logarithmic where they differ by a factor of more than 30.

    Args:
        selections: two, as in `overlap_rows`.
        path: of the picture, a .png file.

    Returns:
        The rows of the CSV file, one for each layer.

    Raises:
        TypeError, ValueError: as in `overlap_rows`, for more than two, or for a bad path. ImportError:
            without matplotlib.

    Example:
        >>> import tempfile, torch
        >>> from sparse_optim.plots import draw_overlap_by_layer
        >>> first = {f"layer.{i}.weight": torch.arange(8) < 4 for i in range(2)}
        >>> second = {f"layer.{i}.weight": torch.arange(8) < 2 + 2 * i for i in range(2)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     rows = draw_overlap_by_layer({"a": first, "b": second}, f"{folder}/layers.png")
        >>> [(row.layer, row.overlap) for row in rows]
        [('layer.0', 0.5), ('layer.1', 1.0)]
    """
    target = _target(path)
    rows = [row for row in overlap_rows(selections, by_layer=True) if row.first != row.second]
    if len(selections) != 2:
        raise ValueError(
            f"selections must be two for an overlap by layer, got {len(selections)}; draw_overlap takes more."
        )
    figure = _figure("draw_overlap_by_layer", 7.5, 1.3 + _bars_height(rows))
    axes = figure.subplots()
    chances = [row.chance for row in rows]
    texts = [f"{_text(row.overlap, '{:.3g}')} ({_text(row.chance, '{:.3g}')})" for row in rows]
    _draw_bars(axes, [row.layer for row in rows], [row.overlap for row in rows], texts, chances)
    axes.scatter(chances, range(len(rows)), marker="|", s=90, color="black", label="by chance", zorder=3)
    _scale(axes, [*(row.overlap for row in rows), *chances])
    first, second = map(_short, selections)
    axes.set_title(f"{first} and {second}", loc="left", fontsize=10)
    axes.set_xlabel("selected by both / by at least one (in brackets: by chance)", fontsize=9)
    figure.legend(loc="outside upper right", fontsize=8)
    _save(figure, target, Overlap._fields, rows)
    return rows


class MaskHistory:
    """How an optimizer's mask changes over time, for `draw_churn`.

    Of the masks that were recorded only the last and the first with a selected entry are kept, on the host,
    as a bit for each entry. All parameters of the optimizer count, those with `masked=False` too.

    Each record is compared with the one before: where a schedule alternates, recording every step compares a
    selection with steps that train everything or nothing, and recording once after each selection compares
    selections.

    Example:
        >>> import torch
        >>> from sparse_optim import GradualUnfreezing, MaskedAdamW
        >>> from sparse_optim.plots import MaskHistory
        >>> params = {name: torch.nn.Parameter(torch.ones(10)) for name in ("layer.0.w", "head.w")}
        >>> optimizer = MaskedAdamW(params.items(), policy=GradualUnfreezing(every=1))
        >>> history = MaskHistory()
        >>> for step in range(2):
        ...     for p in params.values():
        ...         p.grad = torch.ones(10)
        ...     optimizer.step()
        ...     history.record(optimizer, step)
        Churn(step=0, density=0.5, entered=nan, overlap_with_first=1.0)
        Churn(step=1, density=1.0, entered=0.5, overlap_with_first=0.5)
    """

    def __init__(self) -> None:
        self._rows: list[Churn] = []
        self._entries: list[int] = []
        # [ceil(numel / 8)] uint8 for each parameter, on the host
        self._before: list[Any] = []
        self._first: list[Any] = []

    @property
    def rows(self) -> list[Churn]:
        """What was recorded, in order."""
        return list(self._rows)

    def record(self, optimizer: MaskedAdamW, step: int) -> Churn:
        """Count what the last update trained, `optimizer.mask(p)`, and remember it.

        Args:
            optimizer: always the same, with the same parameters. With DTensors all processes have to record
                together.
            step: of the training loop; larger than the one before.

        Returns:
            The new row.

        Raises:
            TypeError: for another optimizer. ValueError: for a step that is not larger, and for parameters of
                other sizes. Nothing is recorded then.
        """
        _check_optimizer(optimizer)
        after = self._rows[-1].step if self._rows else -1
        if isinstance(step, bool) or not isinstance(step, int) or step <= after:
            raise ValueError(
                f"step must be an integer above {after}, got {step!r}; record each step once, in order."
            )
        params = [p for group in optimizer.param_groups for p in group["params"]]
        entries = [p.numel() for p in params]
        if self._rows and entries != self._entries:
            raise ValueError(
                f"the optimizer must have the {len(self._entries)} parameters of the record before, got "
                f"{len(entries)} or other sizes; begin a MaskHistory for each optimizer."
            )
        packed, selected, stayed, shared, first = [], 0, 0, 0, 0
        for place, p in enumerate(params):
            mask = _flat(optimizer.mask(p)).numpy()
            packed.append(numpy.packbits(mask))
            selected += int(mask.sum())
            if self._before:
                stayed += int((mask & _unpacked(self._before[place], mask.size)).sum())
            if self._first:
                old = _unpacked(self._first[place], mask.size)
                shared, first = shared + int((mask & old).sum()), first + int(old.sum())
        entered = _share(selected - stayed, selected) if self._before else math.nan
        if not self._first and selected:
            self._first, shared, first = packed, selected, selected
        self._before, self._entries = packed, entries
        overlap = _share(shared, selected + first - shared)
        row = Churn(step, _share(selected, sum(entries)), entered, overlap)
        self._rows.append(row)
        return row


def draw_churn(
    histories: MaskHistory | Mapping[str, MaskHistory], path: str | os.PathLike[str]
) -> dict[str, list[Churn]]:
    """Draws how masks change over time: density, share of new entries, overlap with the first.

    Args:
        histories: one, or several by name. Each has at least one record.
        path: of the picture, a .png file.

    Returns:
        The rows of the CSV file, by the names that its column "history" has; "" for one without a name.

    Raises:
        TypeError: for anything else. ValueError: for a history without a record, or a bad path. ImportError:
            without matplotlib.

    Example:
        >>> import tempfile, torch
        >>> from sparse_optim import Bernoulli, MaskedAdamW
        >>> from sparse_optim.plots import MaskHistory, draw_churn
        >>> optimizer = MaskedAdamW([torch.nn.Parameter(torch.zeros(10))], policy=Bernoulli(0.5))
        >>> history = MaskHistory()
        >>> row = history.record(optimizer, 0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     draw_churn(history, f"{folder}/churn.png")
        {'': [Churn(step=0, density=0.0, entered=nan, overlap_with_first=nan)]}
    """
    target = _target(path)
    named = {"": histories} if isinstance(histories, MaskHistory) else histories
    if not isinstance(named, Mapping) or not all(isinstance(h, MaskHistory) for h in named.values()):
        raise TypeError(
            f"histories must be a MaskHistory or several by name, got {_kind(histories)}; write "
            "{'first': history, 'second': other}."
        )
    empty = [name for name, history in named.items() if not history.rows]
    if empty or not named:
        got = repr(empty[0]) if empty else "no history"
        raise ValueError(
            f"histories must have a record each, got none in {got}; call record(optimizer, step)."
        )
    figure = _figure("draw_churn", 7.5, 6.0)
    titles = ("density, %", "new since the record before,\n% of selected", "overlap with the first, %")
    for axes, key, title in zip(figure.subplots(3, 1, sharex=True), Churn._fields[1:], titles, strict=True):
        for name, history in named.items():
            values = [100 * getattr(row, key) for row in history.rows]
            # a single point between two that are not defined has no line
            marker = "o" if len(values) < 60 else "."
            steps = [row.step for row in history.rows]
            axes.plot(steps, values, marker=marker, markersize=3, linewidth=1, label=_short(name))
        axes.set_ylabel(title, fontsize=8)
        axes.set_ylim(bottom=0)
        axes.margins(x=0.02)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    axes.set_xlabel("step", fontsize=9)
    axes.locator_params(axis="x", integer=True)
    if "" not in named:
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=min(3, len(named)), fontsize=8)
    rows = {name: history.rows for name, history in named.items()}
    lines = [(name, *row) for name, own in rows.items() for row in own]
    _save(figure, target, ("history", *Churn._fields), lines)
    return rows


def draw_costs(
    costs: Iterable[Cost | tuple[Any, ...]], path: str | os.PathLike[str], *, adamw: str = "AdamW"
) -> list[dict[str, Any]]:
    """Draws bytes by kind, and the time of a step, beside AdamW's.

    Args:
        costs: at least one `Cost`, or tuple like it, under different names.
        path: of the picture, a .png file.
        adamw: the name of the row that the others are compared with, and that is marked.

    Returns:
        The rows of the CSV file: name, whether it is the marked one, bytes of each kind that any row has,
        their total, the peak of a `MemoryEstimate`, ms, and both as multiples of the marked row's.

    Raises:
        TypeError: for sizes that are none. ValueError: for numbers that are negative or not finite, the same
            name twice, no row named `adamw`, or a bad path. ImportError: without matplotlib.

    Example:
        >>> import tempfile, torch
        >>> from sparse_optim import Schedule, TopK, estimate_memory
        >>> from sparse_optim.plots import Cost, draw_costs
        >>> model, topk = torch.nn.Linear(1000, 1000), TopK(0.01, schedule=Schedule(observe=1))
        >>> costs = [
        ...     Cost("AdamW", estimate_memory(model, optimizer="adamw_fused"), ms=2.0),
        ...     Cost("TopK, 1 %", estimate_memory(model, policy=topk), ms=0.5),
        ... ]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     rows = draw_costs(costs, f"{folder}/costs.png")
        >>> [(row["name"], row["total"], row["times_the_ms"]) for row in rows]
        [('AdamW', 16016000, 1.0), ('TopK, 1 %', 8128120, 0.25)]
    """
    target = _target(path)
    rows, kinds = _cost_rows(costs, adamw)
    ends = [max(row["total"], row["peak"] or 0) for row in rows]
    units = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
    unit, divisor = next(((unit, size) for unit, size in units if max(ends) >= size), ("bytes", 1))
    timed = any(row["ms"] is not None for row in rows)
    figure = _figure("draw_costs", 10.5 if timed else 7.5, 1.6 + 1.3 * _bars_height(rows))
    panels = figure.subplots(1, 1 + timed, squeeze=False, sharey=True, width_ratios=[2, 1][: 1 + timed])[0]
    left = [0.0] * len(rows)
    for number, kind in enumerate(kinds):
        widths = [row[kind] / divisor for row in rows]
        color = _SHADES[number] if number < len(_SHADES) else f"C{number}"
        panels[0].barh(
            range(len(rows)), widths, left=left, color=color, label=kind.replace("_", " "), height=0.7
        )
        left = [start + width for start, width in zip(left, widths, strict=True)]
    peaks = [(row["peak"] / divisor, place) for place, row in enumerate(rows) if row["peak"] is not None]
    if peaks:
        panels[0].scatter(*zip(*peaks, strict=True), marker="|", s=90, color="black", label="peak", zorder=3)
    texts = [f"{row['total'] / divisor:.3g} {unit}" + _times(row, "times_the_bytes") for row in rows]
    for place, row in enumerate(rows):
        if row["peak"] is not None and row["peak"] > row["total"]:
            texts[place] += f"; peak {row['peak'] / divisor:.3g}"
    _compare(panels[0], rows, "total", [end / divisor for end in ends], texts, divisor)
    panels[0].set_xlabel(f"{unit} between steps" if peaks else unit, fontsize=9)
    if timed:
        times = [row["ms"] or 0.0 for row in rows]
        panels[1].barh(range(len(rows)), times, color=_DARK, height=0.7)
        texts = ["not measured" if row["ms"] is None else f"{row['ms']:.3g} ms" for row in rows]
        texts = [text + _times(row, "times_the_ms") for text, row in zip(texts, rows, strict=True)]
        _compare(panels[1], rows, "ms", times, texts)
        panels[1].set_xlabel("ms a step", fontsize=9)
    panels[0].set_yticks(range(len(rows)), [_short(row["name"]) for row in rows], fontsize=8)
    panels[0].get_yticklabels()[[row["name"] for row in rows].index(adamw)].set_fontweight("bold")
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    figure.legend(loc="outside upper center", ncols=4, fontsize=8)
    _save(figure, target, list(rows[0]), [row.values() for row in rows])
    return rows


# what is drawn


class _Mask(NamedTuple):
    """One tensor's mask, which is read when it is needed."""

    entries: int
    read: Callable[[], Tensor]  # [entries] bool, on the host


def _masks_of(
    selection: Selection, named_parameters: NamedParameters | None, upcoming: bool
) -> dict[str, _Mask]:
    """The one form that all selections are brought into."""
    if isinstance(selection, MaskedAdamW):
        masks = _masks_of_optimizer(selection, named_parameters, upcoming)
    elif named_parameters is not None or upcoming:
        raise ValueError(
            f"named_parameters and upcoming must be left out unless an optimizer is given, got them with "
            f"{_kind(selection)}; its names and masks are its own."
        )
    elif isinstance(selection, Mapping):
        masks = {
            name: _Mask(_check_mask(name, m).numel(), partial(_flat, m)) for name, m in selection.items()
        }
    elif isinstance(selection, Delta):
        masks = {name: _mask_of_delta(part.numel, part.indices) for name, part in selection.tensors.items()}
    else:
        raise TypeError(
            f"selection must be an optimizer of sparse_optim, masks by name or a delta, got "
            f"{_kind(selection)}; unwrap the optimizer, or write {{name: mask}}."
        )
    if not masks:
        raise ValueError("selection must have at least one tensor, got none; pass that of a model.")
    return masks


def _masks_of_optimizer(
    optimizer: MaskedAdamW, named_parameters: NamedParameters | None, upcoming: bool
) -> dict[str, _Mask]:
    groups = optimizer.param_groups
    own = [p for group in groups for p in group["params"]]
    if named_parameters is None:
        names = [name for group in groups for name in group.get("param_names", ())]
        if len(names) != len(own):
            raise ValueError(
                "the optimizer must know its parameters' names, got one that was made without; pass "
                "model.named_parameters(), here or to the optimizer."
            )
        pairs = list(zip(names, own, strict=True))
    else:
        pairs = [_check_pair(pair) for pair in named_parameters]
        missing = {id(p) for p in own} - {id(p) for _, p in pairs}
        if missing:
            shape = tuple(next(p for p in own if id(p) in missing).shape)
            raise ValueError(
                f"named_parameters must have all parameters of the optimizer, got {len(missing)} fewer, the "
                f"first of shape {shape}; pass those of the whole model."
            )
    ids = {id(p) for p in own}
    return {
        name: _Mask(
            p.numel(),
            partial(_optimizers_mask, optimizer, p, upcoming)
            if id(p) in ids
            else partial(_nothing, p.numel()),
        )
        for name, p in pairs
    }


def _optimizers_mask(optimizer: MaskedAdamW, p: Tensor, upcoming: bool) -> Tensor:
    return _flat(optimizer.mask(p, upcoming=upcoming))


def _nothing(entries: int) -> Tensor:
    return torch.zeros(entries, dtype=torch.bool)


def _mask_of_delta(entries: int, indices: Tensor | None) -> _Mask:
    if indices is None:
        return _Mask(entries, partial(torch.ones, entries, dtype=torch.bool))
    return _Mask(entries, partial(_listed, entries, indices))


def _listed(entries: int, indices: Tensor) -> Tensor:
    return _nothing(entries).index_fill_(0, indices.cpu().long(), True)


def _flat(mask: Tensor) -> Tensor:
    """[numel] bool on the host; of a DTensor the whole, for which processes wait for one another."""
    whole: Tensor = mask.full_tensor() if hasattr(mask, "full_tensor") else mask
    return whole.detach().cpu().reshape(-1)


def _unpacked(bits: Any, entries: int) -> Any:
    return numpy.unpackbits(bits, count=entries).view(bool)


def _names_of_all(masks: Mapping[str, Mapping[str, _Mask]]) -> list[str]:
    """The names that every selection has; nothing is selected under any other."""
    labels = list(masks)
    for label, own in masks.items():
        for name, mask in own.items():
            others = {other: masks[other].get(name) for other in labels}
            lacking = next((other for other, its in others.items() if its is None), None)
            if lacking is not None and bool(mask.read().any()):
                raise ValueError(
                    f"every selection must have the tensors that one has entries of, got {name!r} in "
                    f"{label!r} but not in {lacking!r}; name the same tensors alike in all."
                )
            for other, its in others.items():
                if its is not None and its.entries != mask.entries:
                    raise ValueError(
                        f"{name!r} must have the same size in every selection, got {mask.entries} entries in "
                        f"{label!r} and {its.entries} in {other!r}; compare selections of one model."
                    )
    names = [name for name in masks[labels[0]] if all(name in own for own in masks.values())]
    if not names:
        raise ValueError(
            f"selections must have a tensor in common, got none for {', '.join(map(repr, labels))}; "
            "name the same tensors alike in all."
        )
    return names


def _layer_and_module_type(name: str) -> tuple[str, str]:
    """See `density_rows`; layers are those of `Bernoulli(unit="layer")`."""
    parts = name.split(".")
    number = next((place for place, part in enumerate(parts[:-1]) if part.isdecimal()), None)
    layer = ".".join(parts[:-1] if number is None else parts[: number + 1]) or name
    rest = [part for part in parts[0 if number is None else number + 1 :] if not part.isdecimal()]
    if rest and rest[-1].endswith("bias"):
        return layer, "bias"
    if len(rest) > 1 and rest[-1] == "weight":
        rest = rest[:-1]
    return layer, ".".join(rest) or name


def _cost_rows(costs: Iterable[Cost | tuple[Any, ...]], adamw: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Lines of the CSV file, and the kinds among their columns."""
    given = [_check_cost(cost) for cost in costs]
    names = [cost.name for cost in given]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"costs must have different names, got {twice!r} twice; rename one.")
    if adamw not in names:
        raise ValueError(
            f"adamw must be the name of one of the costs, got {adamw!r} beside {names}; add that row, or say "
            "adamw='its name'."
        )
    sizes = {cost.name: _sizes(cost) for cost in given}
    kinds = list(dict.fromkeys(kind for own in sizes.values() for kind in own))
    # a kind that nobody holds would only be a colour in the legend
    kinds = [kind for kind in kinds if any(own.get(kind) for own in sizes.values())]
    for cost in given:
        if cost.ms is not None:
            _check_number(f"ms of {cost.name!r}", cost.ms)
    rows: list[dict[str, Any]] = []
    for cost in given:
        row: dict[str, Any] = {"name": cost.name, "is_adamw": cost.name == adamw}
        row |= {kind: sizes[cost.name].get(kind, 0) for kind in kinds}
        row["total"] = sum(sizes[cost.name].values())
        row["peak"] = None if isinstance(cost.sizes, Mapping) else cost.sizes.peak
        rows.append(row | {"ms": cost.ms})
    marked = next(row for row in rows if row["name"] == adamw)
    for row in rows:
        row["times_the_bytes"] = _share(row["total"], marked["total"])
        known = row["ms"] is not None and marked["ms"] is not None
        row["times_the_ms"] = _share(row["ms"], marked["ms"]) if known else None
    return rows, kinds


def _sizes(cost: Cost) -> dict[str, float]:
    """Bytes by kind, of numbers that are sizes."""
    if isinstance(cost.sizes, Mapping):
        sizes = dict(cost.sizes)
        taken = sizes.keys() & {"name", "is_adamw", "total", "peak", "ms", "times_the_bytes", "times_the_ms"}
        if taken:
            raise ValueError(
                f"kinds of {cost.name!r} must not be called {min(taken)!r}, which is a column of its own; "
                "give the kinds that add up."
            )
    elif all(hasattr(cost.sizes, kind) for kind in (*_KINDS, "peak")):
        sizes = {kind: getattr(cost.sizes, kind) for kind in _KINDS}
    else:
        raise TypeError(
            f"sizes of {cost.name!r} must be bytes by kind or what estimate_memory returns, got "
            f"{_kind(cost.sizes)}; write {{'weights': 2e9}}."
        )
    for kind, size in sizes.items():
        _check_number(f"bytes of {kind!r} of {cost.name!r}", size)
    return sizes


# what is refused


def _kind(value: object) -> str:
    return type(value).__name__


def _check_optimizer(optimizer: object) -> None:
    if not isinstance(optimizer, MaskedAdamW):
        raise TypeError(
            f"optimizer must be one of sparse_optim, got {_kind(optimizer)}; unwrap it, or make a "
            "MaskedAdamW."
        )


def _check_mask(name: object, mask: object) -> Tensor:
    if not isinstance(name, str) or not isinstance(mask, Tensor):
        raise TypeError(
            f"masks must be tensors by name, got {_kind(mask)} for {name!r}; write {{name: weight != 0}}."
        )
    if mask.dtype != torch.bool:
        raise ValueError(f"masks must be bool, got {mask.dtype} for {name!r}; write mask != 0.")
    return mask


def _check_pair(pair: object) -> tuple[str, Tensor]:
    if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], Tensor)):
        raise TypeError(
            f"named_parameters must be pairs of name and tensor, got {_kind(pair)}; pass "
            "model.named_parameters()."
        )
    return str(pair[0]), pair[1]


def _check_cost(cost: object) -> Cost:
    if not isinstance(cost, tuple) or len(cost) not in (2, 3) or not isinstance(cost[0], str):
        raise TypeError(f"costs must be Cost(name, sizes, ms), got {cost!r}; leave out ms where unknown.")
    return Cost(*cost)


def _check_number(what: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise ValueError(
            f"{what} must be a finite number from 0 on, got {value!r}; leave out what is unknown."
        )


def _target(path: str | os.PathLike[str]) -> Path:
    """Where the picture goes, before anything is drawn."""
    target = Path(path)
    if target.suffix.lower() != ".png":
        raise ValueError(f"path must end in .png, got {str(target)!r}; the CSV file gets the same stem.")
    if not target.parent.is_dir():
        raise ValueError(f"path must be in a folder that exists, got {str(target)!r}; make the folder first.")
    for file in (target, target.with_suffix(".csv")):
        if file.is_dir():
            raise ValueError(f"path must not be taken by a folder, got {str(file)!r}; choose another name.")
    return target


# how it is drawn


def _figure(function: str, width: float, height: float) -> Any:
    """An empty one that no window and no global state knows of."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"{function} needs matplotlib, got none ({error}); pip install 'sparse_optim[plots]'."
        ) from error
    return Figure(figsize=(width, min(height, _MOST)), layout="constrained")


def _bars_height(*panels: Sequence[Any]) -> float:
    return _BAR * sum(len(panel) + 1 for panel in panels)


def _draw_bars(
    axes: Any,
    names: Sequence[str],
    values: Sequence[float],
    texts: Sequence[str],
    also: Sequence[float] | None = None,
) -> None:
    """One bar a name, from the top, and its text right of the bar and of what else is drawn there."""
    places = range(len(names))
    ends = [[0.0 if math.isnan(x) else x for x in xs] for xs in (values, values if also is None else also)]
    axes.barh(places, ends[0], color=_BLUE, height=0.7)
    for place, (text, end) in enumerate(zip(texts, map(max, *ends), strict=True)):
        _annotate(axes, end, place, text)
    # by place, not by name: two that are shortened alike are two bars
    axes.set_yticks(places, [_short(name) for name in names], fontsize=7)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(alpha=0.3, axis="x")


def _scale(axes: Any, values: Iterable[float]) -> None:
    """From zero on, or logarithmic, with place for text at the right."""
    positive = [value for value in values if value > 0]
    if not positive or max(positive) <= 30 * min(positive):
        axes.set_xlim(0, 1.15 * max(positive, default=1.0))
        return
    low, high = min(positive) / 2, max(positive)
    axes.set(xscale="log", xlim=(low, high * (high / low) ** 0.15))
    axes.xaxis.set_major_formatter("{x:g}")


def _compare(
    axes: Any,
    rows: Sequence[Mapping[str, Any]],
    key: str,
    ends: Sequence[float],
    texts: Sequence[str],
    divisor: float = 1,
) -> None:
    """Texts right of the bars, and a line through the end of AdamW's."""
    for place, (end, text) in enumerate(zip(ends, texts, strict=True)):
        _annotate(axes, end, place, text)
    marked = next(row[key] for row in rows if row["is_adamw"])
    if marked is not None:
        axes.axvline(marked / divisor, color=_ORANGE, linestyle="--", linewidth=1, zorder=0)
    axes.set_xlim(0, 1.4 * max(ends) or 1)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(alpha=0.3, axis="x")


def _annotate(axes: Any, x: float, y: float, text: str) -> None:
    # a logarithmic axis has no zero: text without a bar stands at its left end
    place, transform = (x, "data") if x > 0 else (0, axes.get_yaxis_transform())
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    axes.annotate(
        text, (place, y), xycoords=transform, xytext=(6, 0), textcoords="offset points", va="center",
        fontsize=7, bbox=box,
    )  # fmt: skip


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _text(value: float, form: str) -> str:
    return "-" if math.isnan(value) else form.format(value)


def _times(row: Mapping[str, Any], key: str) -> str:
    known = row[key] is not None and not math.isnan(row[key]) and not row["is_adamw"]
    return f", {row[key]:.2g} x" if known else ""


def _short(name: str, most: int = 38) -> str:
    """Both ends of a name, which tell it from others."""
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-(most // 2) :]}"


def _save(figure: Any, target: Path, header: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
    """Both files, or none: whoever is stopped leaves the old ones."""
    token = secrets.token_hex(8)
    picture, numbers = (target.with_name(f".{token}{suffix}") for suffix in (".png", ".csv"))
    try:
        with numbers.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(header)
            for row in rows:
                writer.writerow("" if isinstance(v, float) and math.isnan(v) else v for v in row)
        figure.savefig(picture, format="png", dpi=_DPI)
        os.replace(numbers, target.with_suffix(".csv"))
        os.replace(picture, target)
    finally:
        for file_left in (picture, numbers):
            file_left.unlink(missing_ok=True)
