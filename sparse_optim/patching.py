"""Deltas on and off: extracted from two models or checkpoints, applied, reverted, switched; in memory and in
files.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from . import backends
from .backends import reference
from .checkpoints import (
    INTEGERS,
    Kind,
    Source,
    Weights,
    bits_of,
    config_of,
    content_hash,
    overlaps_itself,
    place_of,
    renamed_key,
    rewrite_checkpoint,
    weights_of,
)
from .deltas import Delta, Mode, TensorDelta, check_mode, index_dtype, matches, value_dtype

# moving bits goes through the verbs, which know floating-point tensors of these widths
_FLOATS = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
# threads share the work of hashing, which lets go of Python's lock
_THREADS = min(4, os.cpu_count() or 1)
# entries compared at a time: two chunks and their mask stay in the cache
_CHUNK = 1 << 18
T = TypeVar("T")


def _each(function: Callable[[str], T], sizes: Mapping[str, int], what: str) -> dict[str, T]:
    """`function` of each name, in a few threads, with a bar (of bytes) where that takes a while."""
    results: dict[str, T] = {}
    with _bar(sum(sizes.values()), what) as advance, ThreadPoolExecutor(_THREADS) as pool:
        try:
            # no more tensors are held than there are threads
            for name, result in zip(sizes, pool.map(function, sizes), strict=True):
                results[name] = result
                advance(sizes[name])
        finally:
            pool.shutdown(cancel_futures=True)
    return results


@contextmanager
def _bar(total: int, what: str) -> Iterator[Callable[[int], object]]:
    try:
        from tqdm.auto import tqdm
    except ModuleNotFoundError:
        yield lambda _: None
        return
    # on a terminal, after two seconds
    with tqdm(total=total, desc=what, unit="B", unit_scale=True, delay=2, disable=None) as bar:
        yield bar.update


# --- extracting -------------------------------------------------------------------------------------------


def extract_delta(
    base: Source,
    tuned: Source,
    *,
    mode: Mode = "xor",
    base_model: str | None = None,
    ignore: Sequence[str] = (),
) -> Delta:
    """What a tuned model has that its base has not, bit by bit; for any way of training.

    Tensors are read one after the other: from files, never are two models in memory. Names are those of the
    plain models, without what DistributedDataParallel, `torch.compile` and others add; tied weights count
    once. Tensors that only the tuned model has, such as a new head, are stored whole; a prefix that all its
    other names have ("bert.") is recognised. Integers and rotary frequencies that only the base has, buffers
    which later versions of a library do not save, are left out.

    Args:
        base: a module, a mapping of tensors, a .safetensors file, a folder with one or with shards and their
            index, or a name on the Hugging Face hub.
        tuned: likewise.
        mode: "xor" stores old bits xor new bits, so that the delta applies and reverts, to the bit; "replace"
            the new values; "add" the differences, to be added to other weights as well: exact but for
            rounding, of finite numbers whose difference is finite.
        base_model: the base's name, for people; by default its name on the hub, or its folder's.
        ignore: patterns of names (of the tuned model, or of the base) to leave out, such as "pooler.*".

    Returns:
        A `Delta` on the CPU.

    Raises:
        ValueError: for tensors of the base that the tuned model lacks, or has in another shape or dtype.

    Example:
        >>> import torch
        >>> from sparse_optim import apply_delta, extract_delta
        >>> model, tuned = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        >>> delta = extract_delta(model, tuned)
        >>> apply_delta(model, delta)
        >>> torch.equal(model.weight, tuned.weight)
        True
    """
    check_mode(mode)
    before, after = _kept(weights_of(base), ignore), _kept(weights_of(tuned), ignore)
    if not before.kinds:
        raise ValueError("base must have tensors, got none; pass the model that was tuned.")
    prefix = _prefix(before, after)
    pairs, aliases = _pairs(before, after, prefix)
    missing = [name for name in before.kinds.keys() - pairs.values() if not _is_no_longer_saved(before, name)]
    if missing:
        raise ValueError(
            f"tuned must have every tensor of the base, got no {min(missing)!r} ({len(missing)} are missing);"
            " pass two forms of one model, or leave out what does not train with ignore=, --ignore."
        )
    for name, other in pairs.items():
        new, old = after.kinds[after.aliases.get(name, name)], before.kinds[other]
        if new != old:
            raise ValueError(
                f"tuned must have {name!r} as {old}, got {new}; convert one of them first, or "
                "leave it out with ignore=."
            )

    def compare(name: str) -> TensorDelta:
        new = after.read(after.aliases.get(name, name))
        if name not in pairs:
            # a copy: what was in a file or a model may change
            return TensorDelta(tuple(new.shape), new.dtype, None, new.to("cpu", copy=True).contiguous())
        return _difference(before.read(pairs[name]), new, mode)

    kinds = {name: after.kinds[after.aliases.get(name, name)] for name in [*after.kinds, *pairs]}
    sizes = {name: kind.nbytes for name, kind in kinds.items()}
    tensors = _each(compare, sizes, "comparing")
    return Delta(tensors, mode, base_model or _called(base), prefix, aliases, _configs(before, after))


def _difference(old: Tensor, new: Tensor, mode: Mode) -> TensorDelta:
    old, new = old.detach(), new.detach()
    if old.device != new.device:
        old, new = old.cpu(), new.cpu()
    places, values = [], []
    for where, before, after in _differing(bits_of(old), bits_of(new)):
        places.append(where.to(index_dtype(new.numel())))
        values.append(_values(before, after, new.dtype, mode))
    indices = torch.cat(places).cpu()
    return TensorDelta(tuple(new.shape), new.dtype, indices, torch.cat(values).cpu(), content_hash(old))


def _differing(old: Tensor, new: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Entries that differ, and what both have there, chunk by chunk: no mask of a whole tensor is made."""
    if old.device.type != "cpu":
        where = (old != new).nonzero().view(-1)
        yield where, old[where], new[where]
        return
    for start in range(0, max(1, old.numel()), _CHUNK):
        before, after = (bits[start : start + _CHUNK].numpy() for bits in (old, new))
        # a quarter of the time of torch's nonzero, and no threads within threads
        places = np.flatnonzero(before != after)
        pair = torch.from_numpy(before[places]), torch.from_numpy(after[places])
        yield torch.from_numpy(places + start), *pair


def _values(old: Tensor, new: Tensor, dtype: torch.dtype, mode: Mode) -> Tensor:
    """What a delta stores of entries whose bits these are."""
    if mode == "xor":
        return old ^ new
    if mode == "replace" or not old.numel():
        return new.view(dtype).to(value_dtype(dtype, mode))
    wide = value_dtype(dtype, mode)
    return new.view(dtype).to(wide) - old.view(dtype).to(wide)


def _kept(weights: Weights, ignore: Sequence[str]) -> Weights:
    if isinstance(ignore, str):
        raise TypeError(f"ignore must be a list of patterns, got {ignore!r}; write [{ignore!r}].")
    kinds = {name: kind for name, kind in weights.kinds.items() if not matches(name, ignore)}
    aliases = {name: first for name, first in weights.aliases.items() if first in kinds}
    return weights._replace(kinds=kinds, aliases=aliases)


def _is_no_longer_saved(weights: Weights, name: str) -> bool:
    """Whether it is a buffer that older checkpoints have and newer ones lack: positions, causal masks."""
    kind = weights.kinds[name]
    is_number = kind.dtype.is_floating_point or kind.dtype.is_complex
    return not is_number or name.rpartition(".")[2] in ("inv_freq", "masked_bias")


def _prefix(before: Weights, after: Weights) -> str:
    """What names get when a model becomes part of another."""
    mine = {name for name in before.kinds if not _is_no_longer_saved(before, name)}
    theirs = {*after.kinds, *after.aliases}
    if not mine or mine & theirs:
        return ""
    # the first name says which are possible
    first = min(mine)
    for name in sorted(theirs):
        if name.endswith("." + first):
            prefix = name.removesuffix(first)
            if len({prefix + other for other in mine} & theirs) > len(mine) // 2:
                return prefix
    return ""


def _pairs(before: Weights, after: Weights, prefix: str) -> tuple[dict[str, str], dict[str, str]]:
    """Names of the tuned model and the base's for each; and names of tied tensors."""
    known = {prefix + name: name for name in before.kinds}
    known |= {prefix + alias: first for alias, first in before.aliases.items()}
    tied = defaultdict(list)
    for alias, first in after.aliases.items():
        tied[first].append(alias)
    pairs, aliases = {}, {}
    for name in after.kinds:
        found = [known[other] for other in (name, *tied[name]) if other in known]
        if found:
            pairs[name] = found[0]
        for alias in tied[name]:
            # what the base keeps apart is compared apart
            if alias in known and known[alias] != found[0]:
                pairs[alias] = known[alias]
            else:
                aliases[alias] = name
    # the base's further names
    aliases |= {
        prefix + alias: prefix + first
        for alias, first in before.aliases.items()
        if prefix + first in pairs and prefix + alias not in {*after.kinds, *aliases}
    }
    return pairs, aliases


def _called(source: Source) -> str | None:
    if not isinstance(source, str | os.PathLike):
        return None
    # a path says where it was on one machine
    return Path(source).resolve().name if Path(source).exists() else str(source)


def _configs(before: Weights, after: Weights) -> dict[str, Any] | None:
    base, tuned = config_of(before), config_of(after)
    return None if base is None or tuned is None or base == tuned else {"base": base, "tuned": tuned}


# --- applying and reverting -------------------------------------------------------------------------------


class _Change(NamedTuple):
    """What is to be done to one tensor."""

    name: str
    part: TensorDelta
    tensor: Tensor
    # what the listed entries, or all of them, are to be: integers, where the tensor is; None: what they are
    # xor the part's values
    bits: Tensor | None

    def outcome(self) -> Tensor:
        return tuned_bits(self.part, self.tensor, "xor") if self.bits is None else self.bits


def _change(name: str, part: TensorDelta, tensor: Tensor, mode: Mode) -> _Change:
    combines = mode == "xor" and part.indices is not None
    return _Change(name, part, tensor, None if combines else tuned_bits(part, tensor, mode))


def apply_delta(model: nn.Module | Mapping[str, Tensor], delta: Delta, *, verify: bool = True) -> None:
    """Turn a base into the tuned model, in place. Nothing is changed unless all of it can be.

    Args:
        model: the base, on a CPU or GPUs, or a mapping of its tensors.
        verify: compare the hashes of the base's weights first, which takes about a second for a gigabyte;
            else only names, shapes and dtypes are, and a delta in mode "add" can be added to other weights.

    Raises:
        ValueError: for weights that are not those of the base, missing tensors, other shapes or dtypes.
    """
    changes = [_change(*target, delta.mode) for target in _targets(model, delta)]
    if verify:
        _require("the base's", changes, _makes_tuned, delta)
    _write(changes)


def revert_delta(
    model: nn.Module | Mapping[str, Tensor],
    delta: Delta,
    *,
    base: Source | None = None,
    verify: bool = True,
) -> None:
    """Turn a tuned model back into its base, in place and to the bit.

    Args:
        model: what `apply_delta` made, or the model that the delta was extracted from.
        base: where the old values are. A delta in mode "xor" needs none, unless tensors are stored whole.
            Whole tensors that the base does not have stay as they are.
        verify: see `apply_delta`; here it is the outcome that has to be the base.

    Raises:
        ValueError: for weights that are not those of the tuned model; where `base` is needed and not given.
    """
    targets = _targets(model, delta)
    if base is None:
        _check_reverts(delta)
        changes = [_change(*target, "xor") for target in targets]
    else:
        changes = _base_changes(targets, delta, base)
    if verify:
        listed = [change for change in changes if change.part.indices is not None]
        _require("the tuned model's", listed, _makes_base, delta)
    _write(changes)


def _targets(model: nn.Module | Mapping[str, Tensor], delta: Delta) -> list[tuple[str, TensorDelta, Tensor]]:
    if not isinstance(model, nn.Module | Mapping):
        raise TypeError(
            f"model must be a module or a mapping of tensors, got {type(model).__name__}; files are changed "
            "by patch_checkpoint."
        )
    if not isinstance(delta, Delta):
        raise TypeError(
            f"delta must be a Delta, got {type(delta).__name__}; load_delta reads one from a file."
        )
    held = weights_of(model)
    found = names_in(held, delta)
    targets = []
    for name, part in delta.tensors.items():
        if (own := found[name]) is None:
            raise ValueError(
                f"model must have {name!r}, got no tensor of that name; pass the model that the delta was "
                "made for, or leave the tensor out by delta.without()."
            )
        if held.kinds[own] != (part.dtype, part.shape):
            raise ValueError(
                f"model must have {name!r} as {Kind(part.dtype, part.shape)}, got "
                f"{held.kinds[own]}; load the model with the dtype and the labels that it has there."
            )
        tensor = held.read(own)
        if overlaps_itself(tensor):
            raise ValueError(f"{name!r} must have memory for each entry, got an expanded view; clone it.")
        targets.append((name, part, tensor))
    _check_ties(held, found, delta)
    return targets


def _check_ties(held: Weights, found: Mapping[str, str | None], delta: Delta) -> None:
    """Refuse weights in which other tensors are one than in the delta."""
    owners = Counter(own for own in found.values() if own is not None)
    for name, own in found.items():
        if own is not None and owners[own] > 1:
            raise ValueError(
                f"model must have {name!r} apart from others, as the delta has it, got a tensor that is "
                "tied; untie it first."
            )
    for alias, name in delta.aliases.items():
        if alias in held.kinds and found.get(name) not in (None, alias):
            raise ValueError(
                f"model must have {alias!r} tied to {name!r}, as the delta has it, got a tensor of its own; "
                "tie it, or extract the delta from models that have both."
            )


def names_in(held: Weights, delta: Delta, names: Iterable[str] | None = None) -> dict[str, str | None]:
    """What `held` calls each tensor of the delta; None where it has none."""
    others = defaultdict(list)
    for alias, name in delta.aliases.items():
        others[name].append(alias)
    known = dict.fromkeys(held.kinds) | held.aliases

    def find(name: str) -> str | None:
        candidates = [name, *others[name]]
        bare = [other.removeprefix(delta.prefix) for other in candidates if other.startswith(delta.prefix)]
        for other in [*candidates, *bare]:
            if other in known:
                return known[other] or other
        return None

    return {name: find(name) for name in (delta.tensors if names is None else names)}


def tuned_bits(part: TensorDelta, tensor: Tensor, mode: Mode) -> Tensor:
    """What the listed entries, or all of them, are in the tuned model: integers, on the tensor's device."""
    values = part.values.to(tensor.device)
    if part.indices is None or mode == "replace":
        return bits_of(values)
    old = bits_of(tensor)[part.indices.to(tensor.device).long()]
    if mode == "xor":
        return old ^ values
    return bits_of((old.view(tensor.dtype).to(values.dtype) + values).to(tensor.dtype))


def differences_of(model: nn.Module, delta: Delta, names: Sequence[str]) -> dict[str, Tensor]:
    """Tuned minus base of the listed entries, in float32 (float64 for float64), on the CPU.

    Raises:
        ValueError: for a model that is not the base.
    """
    targets = {name: (part, tensor) for name, part, tensor in _targets(model, delta) if name in set(names)}
    changes = [_change(name, *target, delta.mode) for name, target in targets.items()]
    _require("the base's", changes, _makes_tuned, delta)
    differences = {}
    for change in changes:
        name, part, tensor, _ = change
        wide = value_dtype(part.dtype, "add")
        if delta.mode == "add":
            differences[name] = part.values
        else:
            old = tensor.reshape(-1)[cast(Tensor, part.indices).to(tensor.device).long()]
            differences[name] = (change.outcome().view(part.dtype).to(wide) - old.to(wide)).cpu()
    return differences


def _base_changes(
    targets: Sequence[tuple[str, TensorDelta, Tensor]], delta: Delta, base: Source
) -> list[_Change]:
    old = weights_of(base)
    known = names_in(old, delta)
    changes = []
    for name, part, tensor in targets:
        own = known[name]
        if own is None and part.indices is None:
            continue
        if own is None or old.kinds[own] != (part.dtype, part.shape):
            got = "none" if own is None else str(old.kinds[own])
            raise ValueError(
                f"base must have {name!r} as {Kind(part.dtype, part.shape)}, got {got}; pass the "
                "weights that were tuned."
            )
        bits = bits_of(old.read(own))
        if part.indices is not None:
            bits = bits[part.indices.to(bits.device).long()]
        changes.append(_Change(name, part, tensor, bits.to(tensor.device)))
    return changes


def _makes_tuned(change: _Change) -> bool:
    part = change.part
    if part.base is not None:
        return content_hash(change.tensor) == part.base
    # what is stored whole is the outcome, whatever was there before
    if part.tuned is None or part.indices is None:
        return True
    return part.tuned == content_hash(change.tensor, part.indices, change.outcome())


def _makes_base(change: _Change) -> bool:
    part = change.part
    return part.base is None or part.base == content_hash(change.tensor, part.indices, change.outcome())


def _whole_names(delta: Delta) -> list[str]:
    return [name for name, part in delta.tensors.items() if part.indices is None]


def _check_reverts(delta: Delta) -> None:
    whole = _whole_names(delta)
    if whole or delta.mode != "xor":
        got = f"mode {delta.mode!r}" if delta.mode != "xor" else f"all of {whole[0]!r}"
        raise ValueError(
            f"delta must hold old bits xor new bits to be reverted without its base, got {got}; pass base=."
        )


def _require(whose: str, changes: Sequence[_Change], fits: Callable[[_Change], bool], delta: Delta) -> None:
    by_name = {change.name: change for change in changes}
    sizes = {change.name: change.tensor.nbytes for change in changes}
    right = _each(lambda name: fits(by_name[name]), sizes, "verifying")
    if wrong := [name for name in right if not right[name]]:
        raise ValueError(other_weights(whose, wrong, len(right), delta))


def other_weights(whose: str, wrong: Sequence[str], count: int, delta: Delta) -> str:
    of = f" ({delta.base_model})" if delta.base_model else ""
    return (
        f"weights must be {whose}{of}, got others in {len(wrong)} of {count} tensors, {wrong[0]!r} first; "
        "load those that the delta was made from, and apply or revert it once."
    )


def _write(changes: Sequence[_Change]) -> None:
    """One call of the verb for all tensors of a device."""
    groups: dict[Any, list[_Change]] = defaultdict(list)
    with torch.no_grad():
        for change in changes:
            if change.part.indices is None:
                whole = change.outcome().view(change.tensor.dtype)
                change.tensor.copy_(whole.view(change.tensor.shape))
            elif change.part.changed:
                groups[change.tensor.device, "xor" if change.bits is None else "replace"].append(change)
        for (device, mode), group in groups.items():
            lists = [cast(Tensor, change.part.indices).to(device) for change in group]
            bits = [change.part.values.to(device) if change.bits is None else change.bits for change in group]
            move_bits([change.tensor for change in group], lists, bits, mode)


def move_bits(
    tensors: Sequence[Tensor], indices: Sequence[Tensor], bits: Sequence[Tensor], mode: str
) -> None:
    """`apply_delta_` of the device's backend, for tensors of any dtype: bits are stored or combined."""
    accelerated = backends.resolve("auto", tensors[0].device, wants_reference=False)
    groups: dict[ModuleType, list[int]] = defaultdict(list)
    for i, tensor in enumerate(tensors):
        groups[accelerated if tensor.element_size() in _FLOATS else reference].append(i)
    for verbs, places in groups.items():
        words = INTEGERS if verbs is reference else _FLOATS
        viewed = [
            [column[i].view(words[tensors[i].element_size()]) for i in places] for column in (tensors, bits)
        ]
        verbs.apply_delta_(viewed[0], [indices[i] for i in places], viewed[1], mode=mode)


class DeltaSwitcher:
    """One model in memory that is its base, or any of many tuned models, at a word.

    A switch takes the active delta's bits off and puts the next one's on: milliseconds where reading a
    checkpoint takes seconds, and byte-exact in both directions. Deltas lie on the devices of the weights that
    they change, in 4 bytes an index and the weight's own width.

    Args:
        model: the base: a module, or a mapping of tensors.
        deltas: by name, each of this base.
        verify: see `apply_delta`; once for each delta, not at each switch.

    Raises:
        ValueError: as `apply_delta` does.

    Example:
        >>> import torch
        >>> from sparse_optim import DeltaSwitcher, extract_delta
        >>> base = {"weight": torch.zeros(3)}
        >>> delta = extract_delta(base, {"weight": torch.tensor([0.0, 2.0, 0.0])})
        >>> switcher = DeltaSwitcher(base, {"task": delta})
        >>> switcher.activate("task")
        >>> base["weight"].tolist()
        [0.0, 2.0, 0.0]
        >>> switcher.activate(None)
        >>> base["weight"].tolist()
        [0.0, 0.0, 0.0]
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, Tensor],
        deltas: Mapping[str, Delta] | None = None,
        *,
        verify: bool = True,
    ) -> None:
        self._model = model
        self._steps: dict[str, list[tuple[list[Tensor], list[Tensor], list[Tensor]]]] = {}
        self._active: str | None = None
        # of the weights, as the last switch left them
        self._versions: list[tuple[Tensor, int]] = []
        for name, delta in (deltas or {}).items():
            self.add(name, delta, verify=verify)

    @property
    def active(self) -> str | None:
        """The delta whose weights the model has; None: the base's."""
        return self._active

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._steps)

    def add(self, name: str, delta: Delta, *, verify: bool = True) -> None:
        """One more delta. Base weights have to be active.

        Raises:
            ValueError: while another delta is active, for a name that is taken, and as `apply_delta` does.
        """
        if self._active is not None:
            raise ValueError(f"the base must be active, got {self._active!r}; activate(None) first.")
        if name in self._steps:
            raise ValueError(f"name must be new, got {name!r}; remove() the other first.")
        groups: dict[torch.device, tuple[list[Tensor], list[Tensor], list[Tensor]]] = {}
        changes = [_change(*target, delta.mode) for target in _targets(self._model, delta)]
        if verify:
            _require("the base's", changes, _makes_tuned, delta)
        for change in changes:
            _, part, tensor, bits = change
            if part.indices is None:
                # what is stored whole is put on and taken off like the rest
                old, new = bits_of(tensor), change.outcome()
                indices = (old != new).nonzero().view(-1).to(index_dtype(tensor.numel()))
                values = old[indices.long()] ^ new[indices.long()]
            else:
                indices = part.indices.to(tensor.device)
                if bits is None:
                    values = part.values.to(tensor.device)
                else:
                    values = bits_of(tensor)[indices.long()] ^ bits
            if indices.numel():
                columns = groups.setdefault(tensor.device, ([], [], []))
                for column, item in zip(columns, (tensor, indices, values), strict=True):
                    column.append(item)
        self._steps[name] = list(groups.values())
        self._versions += [
            (tensor, _version(tensor)) for tensors, *_ in groups.values() for tensor in tensors
        ]

    def remove(self, name: str) -> None:
        """Forget a delta that is not active.

        Raises:
            ValueError: for one that is active, or unknown.
        """
        self._check(name)
        if name == self._active:
            raise ValueError(f"name must not be active, got {name!r}; activate(None) first.")
        del self._steps[name]
        kept = {id(t) for groups in self._steps.values() for tensors, *_ in groups for t in tensors}
        self._versions = [(tensor, version) for tensor, version in self._versions if id(tensor) in kept]

    def activate(self, name: str | None) -> None:
        """Give the model the weights of one delta, or with None the base's.

        Raises:
            ValueError: for an unknown name, and for weights that others have changed or replaced since the
                last switch. What is changed through `.data` is not seen.
        """
        if name is not None:
            self._check(name)
        held = self._model.state_dict() if isinstance(self._model, nn.Module) else self._model
        places = {place_of(tensor) for tensor in held.values() if isinstance(tensor, Tensor)}
        if any(place_of(each) not in places or _version(each) != version for each, version in self._versions):
            raise ValueError(
                f"weights must be as the last switch left them, got others under {self._active!r}; "
                "make a new switcher of the base, or extract what was trained as a delta of its own."
            )
        if name == self._active:
            return
        for each in (self._active, name):
            for tensors, indices, bits in self._steps[each] if each is not None else ():
                with torch.no_grad():
                    move_bits(tensors, indices, bits, "xor")
        self._active = name
        self._versions = [(tensor, _version(tensor)) for tensor, _ in self._versions]

    def _check(self, name: str) -> None:
        if name not in self._steps:
            raise ValueError(f"name must be one of {sorted(self._steps)}, got {name!r}; add() it first.")


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


# --- files ---


def patch_checkpoint(
    source: str | os.PathLike[str], delta: Delta, output: str | os.PathLike[str], *, revert: bool = False
) -> None:
    """Write the tuned model's files from the base's, or with `revert` the base's from the tuned ones.

    Tensor by tensor, so that no more than one is in memory. A folder's texts, configs and tokenizer files are
    copied, but not its subfolders; config.json is that of the tuned model, if the delta knows it.
    What is under the name `output` is what was there before, or all that is new.

    Args:
        source: a .safetensors file, a folder with one or with shards, or a name on the Hugging Face hub.
        output: a file, which is replaced if it exists, or, for a folder, a folder that does not.

    Raises:
        ValueError: as `apply_delta` and `revert_delta` do, and for a folder that exists.
    """
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            f"source must be a path, got {type(source).__name__}; models are changed by apply_delta."
        )
    if revert:
        _check_reverts(delta.without(*whole) if (whole := _whole_names(delta)) else delta)
    held, output = weights_of(source), Path(output)
    if not output.parent.is_dir() or (held.folder is None and output.is_dir()):
        raise ValueError(f"output must be in a folder that exists, got {str(output)!r}; make the folder.")
    found = names_in(held, delta)
    _check_ties(held, found, delta)
    own_parts: dict[str, tuple[str, TensorDelta]] = {}
    added: dict[str, TensorDelta] = {}
    for name, part in delta.tensors.items():
        own = found[name]
        if own is None and part.indices is None:
            added[name] = part
        elif own is None or held.kinds[own] != (part.dtype, part.shape):
            got = "none" if own is None else str(held.kinds[own])
            raise ValueError(
                f"weights must have {name!r} as {Kind(part.dtype, part.shape)}, got {got}; name the "
                "checkpoint that the delta was made for."
            )
        else:
            own_parts[own] = name, part
    bare = any(own not in (None, name, *delta.aliases) for name, own in found.items())
    names = {}
    for own in held.kinds:
        if revert and own in own_parts and own_parts[own][1].indices is None:
            continue
        new = own.removeprefix(delta.prefix) if revert else delta.prefix * bare + own
        names[own] = renamed_key(held.names[own], own, new)
    owners = {new: own for own, new in names.items()}
    if len(owners) < len(names):
        twice = next(new for own, new in names.items() if owners[new] != own)
        raise ValueError(
            f"names must differ without {delta.prefix!r}, got two that become {twice!r}; rename one "
            "of the tensors."
        )
    total = sum(held.kinds[own].nbytes for own in names)
    with _bar(total, "writing") as advance:

        def read(new: str) -> Tensor:
            if new in added:
                return added[new].values
            own = owners[new]
            tensor = held.read(own)
            advance(tensor.nbytes)
            if own not in own_parts:
                return tensor
            name, part = own_parts[own]
            change = _change(name, part, tensor, delta.mode)
            if not (_makes_base if revert else _makes_tuned)(change):
                whose = "the tuned model's" if revert else "the base's"
                raise ValueError(other_weights(whose, [name], len(own_parts), delta))
            if part.indices is None:
                return part.values
            result = bits_of(tensor).clone()
            result[part.indices.long()] = change.outcome()
            return result.view(tensor.dtype).view(tensor.shape)

        config = delta.config["base" if revert else "tuned"] if delta.config else None
        new_kinds = {} if revert else {name: Kind(part.dtype, part.shape) for name, part in added.items()}
        rewrite_checkpoint(held, output, names, new_kinds, read, config)
