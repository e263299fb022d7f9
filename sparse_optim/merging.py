"""One delta of several: disjoint, summed, or merged as TIES does."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from .checkpoints import Kind, Source, bits_of, content_hash, weights_of
from .deltas import Delta, Mode, TensorDelta, index_dtype, value_dtype
from .patching import names_in, other_weights


def merge_deltas(
    deltas: Sequence[Delta],
    *,
    how: Literal["disjoint", "sum", "ties"] = "disjoint",
    base: Source | None = None,
    weights: Sequence[float] | None = None,
    density: float = 0.2,
) -> Delta:
    """One delta of several of the same base, in their mode.

    Args:
        deltas: two or more, of one base and one mode.
        how: "disjoint": each entry is changed by one of them at most, or by all of them alike. "sum": the
            base plus the weighted differences, where two or more meet. "ties": of each delta the largest
            differences are kept, the sign with the larger sum wins, and the differences of that sign are
            averaged. Entries that one delta alone changes, with weight 1, keep its bits.
        base: the base, of which "sum" and "ties" need the values, unless the mode is "add".
        weights: one for each delta; by default 1. Not with "disjoint".
        density: of "ties": share of the changed entries of each delta that is kept.

    Returns:
        A delta; its `conflicts` are the entries that more than one changes, with "ties" of those that are
        kept.

    Raises:
        ValueError: for deltas of different bases or modes, and for conflicts with "disjoint".

    References:
        Yadav et al., TIES-Merging: Resolving Interference When Merging Models (NeurIPS 2023).
    """
    if len(deltas) < 2 or not all(isinstance(delta, Delta) for delta in deltas):
        raise ValueError(f"deltas must be two or more Deltas, got {deltas!r}; load them first.")
    if how not in ("disjoint", "sum", "ties"):
        raise ValueError(f"how must be 'disjoint', 'sum' or 'ties', got {how!r}; choose one of them.")
    if how == "disjoint" and weights is not None:
        raise ValueError(f"weights must be left out with how='disjoint', got {weights!r}; use how='sum'.")
    scales = [1.0] * len(deltas) if weights is None else [float(weight) for weight in weights]
    if len(scales) != len(deltas) or not all(map(math.isfinite, scales)):
        raise ValueError(
            f"weights must be one number for each of {len(deltas)} deltas, got {weights!r}; count them."
        )
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density!r}; 1 keeps all differences.")
    first = deltas[0]
    _check_same_base(deltas)
    needs_base = how != "disjoint" and first.mode != "add"
    if needs_base and base is None:
        raise ValueError(
            f"base must be given for how={how!r} and mode {first.mode!r}, got None; pass the weights."
        )
    parts: dict[str, list[tuple[int, TensorDelta]]] = defaultdict(list)
    for number, delta in enumerate(deltas):
        for name, part in delta.tensors.items():
            parts[name].append((number, part))
    whole = {name: _same_whole(name, parts[name]) for name in parts if parts[name][0][1].indices is None}
    read = _reader(base, first, parts.keys() - whole.keys()) if needs_base and base is not None else None
    meetings = {name: _meeting(name, parts[name], read, how) for name in parts if name not in whole}
    cuts = [0.0] * len(deltas)
    if how == "ties":
        cuts = [
            _cut([m.differences[i] for m in meetings.values() if i in m.differences], density)
            for i in range(len(deltas))
        ]
    tensors, conflicts = {}, 0
    for name in parts:
        if name in whole:
            tensors[name] = whole[name]
        elif how == "disjoint":
            tensors[name], met = _joined(meetings[name], first.mode)
            conflicts += met
        else:
            tensors[name], met = _summed(meetings[name], first.mode, scales, cuts, elect=how == "ties")
            conflicts += met
    if how == "disjoint" and conflicts:
        raise ValueError(
            f"deltas must change different entries for how='disjoint', got {conflicts} entries that several "
            "change differently; use how='sum' or 'ties'."
        )
    return replace(
        first,
        tensors=tensors,
        base_model=next((delta.base_model for delta in deltas if delta.base_model), None),
        aliases={alias: name for delta in deltas for alias, name in delta.aliases.items()},
        # two tasks have two heads and two sets of labels
        config=first.config if all(delta.config == first.config for delta in deltas) else None,
        conflicts=conflicts,
    )


class _Meeting(NamedTuple):
    """What several deltas have for one tensor."""

    part: TensorDelta  # the first one's, for what they share
    indices: np.ndarray[Any, Any]  # entries that any of them changes, ascending
    places: dict[int, np.ndarray[Any, Any]]  # of each delta's entries among these
    bits: dict[int, np.ndarray[Any, Any]]  # its values, or the tuned ones where the base is known
    old: Tensor | None  # the base's values of these entries
    differences: dict[int, np.ndarray[Any, Any]]  # tuned - base, where they count


def _check_same_base(deltas: Sequence[Delta]) -> None:
    first = deltas[0]
    seen: dict[str, TensorDelta] = {}
    for delta in deltas:
        if (delta.mode, delta.prefix) != (first.mode, first.prefix):
            raise ValueError(
                f"deltas must have one mode and prefix, got {(first.mode, first.prefix)} and "
                f"{(delta.mode, delta.prefix)}; extract them alike."
            )
        for name, part in delta.tensors.items():
            other = seen.setdefault(name, part)
            same_kind = (part.dtype, part.shape) == (other.dtype, other.shape)
            same_hash = None in (part.base, other.base) or part.base == other.base
            if not same_kind or not same_hash or (part.indices is None) != (other.indices is None):
                raise ValueError(
                    f"deltas must be of one base, got two of {name!r}; extract them from the same weights, "
                    "or leave the tensor out by without(), --without."
                )


def _same_whole(name: str, parts: Sequence[tuple[int, TensorDelta]]) -> TensorDelta:
    part = parts[0][1]
    if not all(torch.equal(bits_of(other.values), bits_of(part.values)) for _, other in parts):
        raise ValueError(
            f"deltas must have the same {name!r}, which they store whole, got different ones; leave it out "
            "by without(), --without."
        )
    return part


def _reader(base: Source, delta: Delta, names: Iterable[str]) -> Callable[[str, TensorDelta], Tensor]:
    """The base's tensors, once they are known to be the base's."""
    held = weights_of(base)
    found = names_in(held, delta, names)

    def read(name: str, part: TensorDelta) -> Tensor:
        own = found.get(name)
        if own is None or held.kinds[own] != (part.dtype, part.shape):
            got = "none" if own is None else str(held.kinds[own])
            raise ValueError(
                f"base must have {name!r} as {Kind(part.dtype, part.shape)}, got {got}; pass the base of the "
                "deltas."
            )
        old = held.read(own).cpu()
        if part.base is not None and content_hash(old) != part.base:
            raise ValueError(other_weights("the base's", [name], len(found), delta))
        return old

    return read


def _meeting(
    name: str,
    parts: Sequence[tuple[int, TensorDelta]],
    read: Callable[[str, TensorDelta], Tensor] | None,
    how: str,
) -> _Meeting:
    lists = {number: cast(Tensor, part.indices).cpu().numpy() for number, part in parts}
    indices = np.unique(np.concatenate(list(lists.values())))
    places = {number: np.searchsorted(indices, listed) for number, listed in lists.items()}
    # the one that knows most of the base
    part = max((part for _, part in parts), key=lambda part: part.base is not None)
    bits, differences, old = {}, {}, None
    if how != "disjoint" and indices.size and not part.dtype.is_floating_point:
        raise ValueError(
            f"tensors must be floating-point for how={how!r}, got {name!r}, {part.dtype}; leave it out by "
            "without()."
        )
    if read is not None and indices.size:
        old = read(name, part).reshape(-1)[torch.from_numpy(indices).long()]
    for number, mine in parts:
        values = mine.values.cpu()
        if old is not None:
            before = old[torch.from_numpy(places[number])]
            # xor is told by the integers that its values are
            is_xor = not values.dtype.is_floating_point
            tuned = (bits_of(before) ^ values).view(mine.dtype) if is_xor else values
            wide = value_dtype(mine.dtype, "add")
            differences[number] = (tuned.to(wide) - before.to(wide)).numpy()
            values = tuned
        elif how != "disjoint":
            differences[number] = values.numpy()
        bits[number] = bits_of(values).numpy()
    return _Meeting(part, indices, places, bits, old, differences)


def _cut(differences: Sequence[np.ndarray[Any, Any]], density: float) -> float:
    """The smallest magnitude that is kept."""
    sizes = np.abs(np.concatenate([np.zeros(0, np.float32), *differences]))
    if not np.isfinite(sizes).all():
        raise ValueError(
            "differences must be finite for how='ties', got others; leave them out by without()."
        )
    kept = math.ceil(density * sizes.size)
    return float(np.partition(sizes, sizes.size - kept)[sizes.size - kept]) if kept else 0.0


def _joined(meeting: _Meeting, mode: Mode) -> tuple[TensorDelta, int]:
    part, indices, places, bits, _, _ = meeting
    values = np.zeros(indices.size, bits_of(part.values).numpy().dtype)
    taken = np.zeros(indices.size, bool)
    conflicts = 0
    for number, where in places.items():
        conflicts += int((taken[where] & (values[where] != bits[number])).sum())
        values[where], taken[where] = bits[number], True
    joined = torch.from_numpy(values).view(value_dtype(part.dtype, mode))
    return _listed(part, indices, joined), conflicts


def _summed(
    meeting: _Meeting, mode: Mode, scales: Sequence[float], cuts: Sequence[float], *, elect: bool
) -> tuple[TensorDelta, int]:
    part, indices, places, bits, old, differences = meeting
    if not indices.size:
        return _joined(meeting, mode)
    wide = torch.zeros(0, dtype=value_dtype(part.dtype, "add")).numpy().dtype
    total, count = np.zeros(indices.size, wide), np.zeros(indices.size, np.int64)
    kept = (
        {i: np.abs(changed) >= cuts[i] for i, changed in differences.items()}
        if elect
        else {i: np.ones(changed.size, bool) for i, changed in differences.items()}
    )
    for i, changed in differences.items():
        total[places[i]] += np.where(kept[i], scales[i] * changed, 0)
        count[places[i]] += kept[i]
    conflicts = int((count > 1).sum())
    if elect:
        sign = np.sign(total)
        for i, changed in differences.items():
            kept[i] &= np.sign(scales[i] * changed) == sign[places[i]]
        total, count = np.zeros_like(total), np.zeros_like(count)
        for i, changed in differences.items():
            total[places[i]] += np.where(kept[i], scales[i] * changed, 0)
            count[places[i]] += kept[i]
        total /= np.maximum(count, 1)
    if old is None:
        stays = (count == 0) | (total == 0)
        return _listed(part, indices[~stays], torch.from_numpy(total[~stays])), conflicts
    tuned = bits_of((old.to(value_dtype(part.dtype, "add")) + torch.from_numpy(total)).to(part.dtype)).numpy()
    before = bits_of(old).numpy()
    tuned[count == 0] = before[count == 0]
    for i, where in places.items():
        alone = kept[i] & (count[where] == 1) & (scales[i] == 1)
        tuned[where[alone]] = bits[i][alone]
    stays = tuned == before
    values = torch.from_numpy((before ^ tuned if mode == "xor" else tuned)[~stays])
    return _listed(part, indices[~stays], values.view(value_dtype(part.dtype, mode))), conflicts


def _listed(part: TensorDelta, indices: np.ndarray[Any, Any], values: Tensor) -> TensorDelta:
    listed = torch.from_numpy(indices).to(index_dtype(part.numel))
    return TensorDelta(part.shape, part.dtype, listed, values, part.base)
