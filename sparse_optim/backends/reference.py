"""Every verb in plain PyTorch: the definition of correct, on any device and in any floating dtype.

The other backends are compared with this module, and every equation of the package is written out here, once.

Conventions shared by all backends
- Verbs take lists with one item per tensor, and keyword-only scalars. A trailing underscore means that
  arguments are written. Arithmetic is done in float32 (float64 for float64 parameters) and rounded once into
  the stored dtype.
- A *geometry* `(offset, inner, stride)` places the local entries of a tensor in the full, unsharded one:
  local entry i has the global index `offset + (i // inner) * stride + i % inner`. `whole(t)` is that of an
  unsharded tensor.
- Which entries are selected is said in one of four ways: not at all (everything), `bits` (packed, one bit an
  entry), `seeded` (drawn from Philox, never stored), or `scores` with `cuts` (an exact threshold that is
  already known).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Geometry = tuple[int, int, int]  # offset, inner, stride

MASK_DRAWS, WEIGHT_ROUNDING_DRAWS, STATISTIC_ROUNDING_DRAWS, CONTROL_DRAWS = 0, 1, 2, 3
_PURPOSE_SHIFT = 28
_LOW_32 = 0xFFFFFFFF
_TILE, _QUARTER = 1024, 256
# counters a chunk; 10 million entries on 2 cores took 340, 144, 74 and 105 ms with 2^12, 2^14, 2^16 and 2^18
_PHILOX_CHUNK = 1 << 16
_LAST_INDEX = (1 << 63) - 1


class Draws(NamedTuple):
    """Masks that are drawn and never stored: an entry is selected iff its Philox word is below
    `threshold`.
    """

    seed: int
    draw: int
    threshold: int  # floor(keep * 2**32)
    keys: Sequence[int]  # one 32-bit key per tensor
    one_word: bool = False  # the word of entry 0 decides for the whole tensor
    # 0-dim int64 where the tensors are: `draw` then is that of number 0, and this is the number, so that a
    # captured graph draws anew whenever it is replayed
    clock: Tensor | None = None

    @property
    def number(self) -> int:
        """The draw, wherever its number is counted. On a GPU that waits for the device."""
        return self.draw if self.clock is None else self.draw | int(self.clock) % (1 << _PURPOSE_SHIFT)


class Cuts(NamedTuple):
    """Exact thresholds, one per tensor: selected are sort keys above `keys`, and those equal to it up to the
    global index `last_ties`. Both int64 [tensors], where the scores are.
    """

    keys: Tensor
    last_ties: Tensor


EVERY_TIE = _LAST_INDEX
BEYOND_ALL_KEYS = 1 << 32  # a threshold that selects nothing


def whole(tensor: Tensor) -> Geometry:
    """The geometry of a tensor that is not sharded."""
    numel = max(tensor.numel(), 1)
    return (0, numel, numel)


def global_index(local: Tensor, geometry: Geometry) -> Tensor:
    """Global indices of local flat indices. Both int64, any shape."""
    offset, inner, stride = geometry
    return offset + torch.div(local, inner, rounding_mode="floor") * stride + local % inner


# random masks


def purpose_draw(purpose: int, number: int) -> int:
    """The 32-bit draw of the `number`-th use for `purpose`: the top four bits keep the purposes apart."""
    return purpose << _PURPOSE_SHIFT | number % (1 << _PURPOSE_SHIFT)


def _philox(counter: Tensor, seed: int, draw: int, key: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-10 (Salmon et al., 2011) of the 128-bit counters `(counter low, counter high, draw,
    key)`.
    """
    # words live in int64: a 32 x 32 bit product wraps there without losing any of its 64 bits
    c0, c1 = counter & _LOW_32, counter >> 32
    c2, c3 = torch.full_like(counter, draw), torch.full_like(counter, key)
    key_0, key_1 = seed & _LOW_32, seed >> 32 & _LOW_32
    for _ in range(10):
        product_0, product_1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0 = (product_1 >> 32).bitwise_and_(_LOW_32).bitwise_xor_(c1).bitwise_xor_(key_0)
        c2 = (product_0 >> 32).bitwise_and_(_LOW_32).bitwise_xor_(c3).bitwise_xor_(key_1)
        c1, c3 = product_1.bitwise_and_(_LOW_32), product_0.bitwise_and_(_LOW_32)
        key_0, key_1 = key_0 + 0x9E3779B9 & _LOW_32, key_1 + 0xBB67AE85 & _LOW_32
    return c0, c1, c2, c3


def philox_words(seed: int, draw: int, key: int, entries: Tensor) -> Tensor:
    """The random word of each entry.

    Entry e lies in tile T = e // 1024; its counter is q = 256 T + e % 256 and its word number
    `(e % 1024) // 256` of the four that Philox returns for `(q low, q high, draw, key)` under `seed`. So a
    tile is four coalesced quarter-blocks.

    Args:
        seed: 64 bits. draw, key: 32 bits each.
        entries: global indices, int64, any shape.

    Returns:
        int64 of the same shape, values in [0, 2**32).
    """
    counter = torch.div(entries, _TILE, rounding_mode="floor") * _QUARTER + entries % _QUARTER
    words = torch.stack(_philox(counter, seed, draw, key))
    return words.gather(0, (entries % _TILE // _QUARTER).unsqueeze(0)).squeeze(0)


def _entry_words(
    seed: int, draw: int, key: int, numel: int, geometry: Geometry, device: torch.device
) -> Iterator[Tensor]:
    """Words of all local entries in order, in chunks, int64."""
    offset, inner, _ = geometry
    per_chunk = _PHILOX_CHUNK * 4
    if offset % _TILE == 0 and inner >= numel:
        # a run of whole tiles: each Philox call serves four entries instead of one
        for start in range(0, numel, per_chunk):
            first = (offset + start) // 4
            counter = torch.arange(
                first, first + -(-min(per_chunk, numel - start) // _TILE) * _QUARTER, device=device
            )
            words = torch.stack(
                _philox(counter.view(-1, _QUARTER), seed, draw, key), dim=1
            )  # [tiles, 4, 256]
            yield words.view(-1)[: numel - start]
        return
    for start in range(0, numel, _PHILOX_CHUNK):
        local = torch.arange(start, min(start + _PHILOX_CHUNK, numel), device=device)
        yield philox_words(seed, draw, key, global_index(local, geometry))


def seeded_mask(draws: Draws, i: int, numel: int, geometry: Geometry, device: torch.device) -> Tensor:
    """The mask that the seeded rule draws for the i-th tensor: bool [numel], True where the word is below
    the threshold.
    """
    seed, draw, threshold, key = draws.seed, draws.number, draws.threshold, draws.keys[i]
    if draws.one_word:
        word = philox_words(seed, draw, key, torch.zeros(1, dtype=torch.int64, device=device))
        return (word < threshold).expand(numel)
    selected = torch.empty(numel, dtype=torch.bool, device=device)
    start = 0
    for words in _entry_words(seed, draw, key, numel, geometry, device):
        torch.lt(words, threshold, out=selected[start : start + words.numel()])
        start += words.numel()
    return selected


def round_stochastically(values: Tensor, seed: int, draw: int, key: int, geometry: Geometry) -> Tensor:
    """float32 values rounded up or down to bfloat16 with the probabilities that make the mean exact.

    The low 16 bits of the entry's word are added below the 16 bits that bfloat16 keeps, and the rest is cut
    off. Non-finite values are rounded as usual.
    """
    flat = values.reshape(-1)
    words = torch.cat(
        [chunk & 0xFFFF for chunk in _entry_words(seed, draw, key, flat.numel(), geometry, flat.device)]
        or [torch.empty(0, dtype=torch.int64, device=flat.device)]
    )
    # an addition to the magnitude bits: the sign bit is above any carry that a finite value can produce
    carried = (flat.view(torch.int32) + words.to(torch.int32)) & -0x10000
    rounded = torch.where(flat.isfinite(), carried.view(torch.float32), flat)
    return rounded.to(torch.bfloat16).view(values.shape)


# stored masks


def pack_bits(selected: Tensor) -> Tensor:
    """Bool [numel] as uint8, eight entries a byte, lowest bit first, padded with zeros to a multiple of four
    bytes.
    """
    padded = torch.zeros(-(-selected.numel() // 32) * 32, dtype=torch.uint8, device=selected.device)
    padded[: selected.numel()] = selected
    shifts = torch.arange(8, dtype=torch.uint8, device=selected.device)
    return (padded.view(-1, 8) << shifts).sum(1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, numel: int) -> Tensor:
    """The inverse of `pack_bits`: bool [numel]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits.unsqueeze(1) >> shifts & 1).view(-1)[:numel].bool()


def _selected(
    i: int,
    param: Tensor,
    geometries: Sequence[Geometry] | None,
    bits: Sequence[Tensor] | None,
    seeded: Draws | None,
    scores: Sequence[Tensor] | None,
    cuts: Cuts | None,
) -> Tensor | None:
    """The mask of the i-th tensor in the parameter's shape, or None for everything."""
    geometry = whole(param) if geometries is None else geometries[i]
    if bits is not None:
        return unpack_bits(bits[i], param.numel()).view(param.shape)
    if seeded is not None:
        return seeded_mask(seeded, i, param.numel(), geometry, param.device).view(param.shape)
    if scores is not None and cuts is not None:
        return _above_cut(scores[i], cuts, i, geometry, absolute=False).view(param.shape)
    return None


# the update


def _adamw_entries(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    step: float,
    *,
    lr: float | Tensor,
    beta1: float | Tensor,
    beta2: float | Tensor,
    eps: float,
    weight_decay: float,
    differentiable: bool,
) -> None:
    """AdamW (Loshchilov and Hutter, 2019) on one tensor, everything in the dtype of the arithmetic.

        param      <- param (1 - lr weight_decay)
        exp_avg    <- exp_avg + (1 - beta1) (grad - exp_avg)
        exp_avg_sq <- beta2 exp_avg_sq + (1 - beta2) grad^2
        denom       = sqrt(exp_avg_sq) / sqrt(1 - beta2^step) + eps
        param      <- param - lr / (1 - beta1^step) exp_avg / denom

    With amsgrad, denom takes the largest exp_avg_sq so far.

    The operations and their order are those of torch's for-loop, so that float32 and float64 agree with it
    bit for bit.
    """
    if weight_decay != 0:
        param.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(grad, 1 - beta1)
    if isinstance(beta2, Tensor):
        exp_avg_sq.lerp_(grad.square(), 1 - beta2)
    else:
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    largest = exp_avg_sq
    if max_exp_avg_sq is not None:
        # autograd keeps the inputs of maximum, so they must not be overwritten under it
        previous = max_exp_avg_sq.clone() if differentiable else max_exp_avg_sq
        max_exp_avg_sq.copy_(torch.maximum(previous, exp_avg_sq))
        largest = max_exp_avg_sq
    step_size = lr / (1 - beta1**step)
    if isinstance(step_size, Tensor) and not differentiable:
        step_size = step_size.item()
    denom = (largest.sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
    if isinstance(step_size, Tensor):
        param.sub_(step_size * (exp_avg / denom))
    else:
        param.addcdiv_(exp_avg.clone() if differentiable else exp_avg, denom, value=-step_size)


def _arithmetic_dtype(param: Tensor) -> torch.dtype:
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def _numbers(*values: float | Tensor, differentiable: bool) -> list[float | Tensor]:
    """Hyperparameters given as tensors, read out unless autograd has to see them."""
    return [v.item() if isinstance(v, Tensor) and not differentiable else v for v in values]


def _prepare_grad(grad: Tensor, dtype: torch.dtype, maximize: bool, grad_scale: Tensor | None) -> Tensor:
    grad = grad.to(dtype)
    if grad_scale is not None:
        grad = grad * grad_scale.to(device=grad.device, dtype=dtype)
    return -grad if maximize else grad


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta1: float | Tensor,
    beta2: float | Tensor,
    eps: float,
    weight_decay: float,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    geometries: Sequence[Geometry] | None = None,
    bits: Sequence[Tensor] | None = None,
    seeded: Draws | None = None,
    scores: Sequence[Tensor] | None = None,
    cuts: Cuts | None = None,
    unselected: str = "frozen",
    rescale: float = 1.0,
    rounding: Draws | None = None,
    found_inf: Tensor | None = None,
    statistics: Sequence[Tensor] = (),
    nonfinite: Sequence[Tensor] = (),
    kind: str = "squares",
    statistic_scales: Sequence[Tensor] | None = None,
    differentiable: bool = False,
) -> None:
    """AdamW with parameter-shaped moments on the selected entries; see `_adamw_entries` for the equation.

    With g the gradient (times `grad_scale`, negated under `maximize`, times `rescale` where selected),
    entries that are not selected
    - under "frozen" keep parameter and moments, bit for bit;
    - under "zero_grad" take the update with g = 0: left-over momentum and weight decay move them;
    - under "track" keep their parameter bit for bit while their moments take g.

    Args:
        params: any shape and strides, float64, float32, bfloat16 or float16. grads: same shapes.
        exp_avgs, exp_avg_sqs: parameter-shaped, any floating dtype. max_exp_avg_sqs: the same for amsgrad,
            else empty.
        steps: 0-dim, counted up by one here; the bias correction uses the new value.
        grad_scale: 0-dim factor on every gradient entry, or None.
        bits, seeded, scores with cuts: which entries are selected (module docstring); none of them: all.
        rescale: factor on the gradient of selected entries; 1 / keep keeps its mean.
        rounding: rounds bfloat16 parameters stochastically; `threshold` is not used.
        found_inf: 0-dim; unless it is zero, nothing is written and no step is counted.
        statistics, nonfinite, kind, statistic_scales: `accumulate_` with the same gradients in the same call,
            as they are (without `grad_scale`).
    """
    if found_inf is not None and found_inf.item():
        return
    if statistics:
        accumulate_(statistics, grads, nonfinite, kind=kind, grad_scales=statistic_scales)
    beta1, beta2 = _numbers(beta1, beta2, differentiable=differentiable)
    for i, param in enumerate(params):
        steps[i].add_(1)
        dtype = _arithmetic_dtype(param)
        grad = _prepare_grad(grads[i], dtype, maximize, grad_scale)
        selected = _selected(i, param, geometries, bits, seeded, scores, cuts)
        if rescale != 1.0:
            grad = grad * rescale if selected is None else torch.where(selected, grad * rescale, grad)
        if selected is not None and unselected == "zero_grad":
            grad = torch.where(selected, grad, 0.0)
        stored = [param, exp_avgs[i], exp_avg_sqs[i], *max_exp_avg_sqs[i : i + 1]]
        keeps = [selected is not None and unselected != "zero_grad"]
        keeps += [selected is not None and unselected == "frozen"] * (len(stored) - 1)
        # whatever is already in the dtype of the arithmetic and has nothing to keep is updated where it lies
        values = [
            t.to(dtype, copy=True) if keep or t.dtype != dtype else t
            for t, keep in zip(stored, keeps, strict=True)
        ]
        _adamw_entries(
            values[0],
            grad,
            values[1],
            values[2],
            values[3] if max_exp_avg_sqs else None,
            float(steps[i]),
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
            differentiable=differentiable,
        )
        if rounding is not None and param.dtype == torch.bfloat16:
            geometry = whole(param) if geometries is None else geometries[i]
            values[0] = round_stochastically(
                values[0], rounding.seed, rounding.number, rounding.keys[i], geometry
            )
        for target, value, keep in zip(stored, values, keeps, strict=True):
            if value is not target:
                rounded = value.to(target.dtype)
                target.copy_(
                    torch.where(selected, rounded, target) if keep and selected is not None else rounded
                )


def adamw_indexed_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    indices: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    masters: Sequence[Tensor],
    ages: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta1: float | Tensor,
    beta2: float | Tensor,
    eps: float,
    weight_decay: float,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    compact_grads: bool = False,
    found_inf: Tensor | None = None,
    differentiable: bool = False,
) -> None:
    """AdamW on the entries listed in `indices`, with moments as long as the list; the rest stays as it is.

    Args:
        params, grads: as in `adamw_`; with `compact_grads` the gradients are [nnz], in the order of the
            indices.
        indices: selected entries of the flattened tensor, ascending. [nnz] int32; int64 when numel exceeds
            2**31 - 1.
        exp_avgs, exp_avg_sqs, max_exp_avg_sqs: [nnz] float32 (float64 for float64 parameters); the last may
            be empty.
        masters: [nnz] float32 values behind low-precision parameters, or empty. Where a parameter is no
            longer the rounded master (somebody wrote to it), the master restarts from the parameter.
        ages: [nnz] int32 updates that each entry has seen, counted up here, or empty: then `steps` counts for
            all.
        steps: 0-dim, counted up by one here.
        found_inf: 0-dim; unless it is zero, nothing is written and no step is counted.
    """
    if found_inf is not None and found_inf.item():
        return
    beta1, beta2 = _numbers(beta1, beta2, differentiable=differentiable)
    for i, param in enumerate(params):
        steps[i].add_(1)
        where = indices[i].long()
        dtype = _arithmetic_dtype(param)
        flat = param.reshape(-1)
        stored = flat[where]
        grad = grads[i] if compact_grads else grads[i].reshape(-1)[where]
        grad = _prepare_grad(grad, dtype, maximize, grad_scale)
        if masters:
            value = masters[i]
            value.copy_(torch.where(value.to(stored.dtype) == stored, value, stored.to(value.dtype)))
        else:
            value = stored.to(dtype, copy=True)
        state = [value, grad, exp_avgs[i], exp_avg_sqs[i], *max_exp_avg_sqs[i : i + 1]]
        # entries of equal age take the very same path as a tensor of their own would
        cohorts = torch.unique(ages[i].add_(1)).tolist() if ages else [None]
        for age in cohorts:
            alike = slice(None) if age is None else ages[i] == age
            part = [t[alike] for t in state]
            _adamw_entries(
                part[0],
                part[1],
                part[2],
                part[3],
                part[4] if max_exp_avg_sqs else None,
                float(steps[i]) if age is None else age,
                lr=lr,
                beta1=beta1,
                beta2=beta2,
                eps=eps,
                weight_decay=weight_decay,
                differentiable=differentiable,
            )
            if age is not None:
                for target, new in zip(state, part, strict=True):
                    if target is not grad:
                        target[alike] = new
        flat[where] = value.to(param.dtype)
        if not param.is_contiguous():
            param.copy_(flat.view(param.shape))


# statistics and exact selection


def accumulate_(
    statistics: Sequence[Tensor],
    grads: Sequence[Tensor],
    nonfinite: Sequence[Tensor],
    *,
    kind: str,
    grad_scales: Sequence[Tensor] | None = None,
    first_counts: Tensor | None = None,
    absolute: bool = False,
    rounding: Draws | None = None,
    geometries: Sequence[Geometry] | None = None,
) -> None:
    """Add what a gradient contributes to a statistic: multiply, then add, each rounded on its own.

        "squares":  statistic <- statistic + (s g)^2
        "signed":   statistic <- statistic + s g
        "absolute": statistic <- statistic + |s g|

    Rounded to nearest, a bfloat16 sum stops growing at 256 times what is added to it; with `rounding` its
    mean is exact.

    Args:
        statistics: parameter-shaped, float32 or bfloat16. grads: any floating dtype.
        nonfinite: 0-dim bool flags, raised where an entry of s g is not finite; such an entry adds zero.
        grad_scales: 0-dim factors s, one per tensor, or None for 1.
        first_counts: takes the first round of `histogram` over the new statistics, ranked by magnitude when
            `absolute`: int64 [1, 2**11] or [len(statistics), 2**11], added to. Statistics of one dtype.
        rounding: rounds bfloat16 statistics stochastically; `threshold` is not used.
    """
    for i, (statistic, grad) in enumerate(zip(statistics, grads, strict=True)):
        value = grad.to(torch.float32)
        if grad_scales is not None:
            value = value * grad_scales[i]
        finite = value.isfinite()
        nonfinite[i].logical_or_(finite.all().logical_not())
        value = torch.where(finite, value, 0.0)
        if kind == "squares":
            value = value * value
        elif kind == "absolute":
            value = value.abs()
        # not statistic.add_(value * value) in one kernel: a fused multiply-add would change the ranking's
        # last bits
        total = statistic.to(torch.float32) + value
        if rounding is not None and statistic.dtype == torch.bfloat16:
            geometry = whole(statistic) if geometries is None else geometries[i]
            total = round_stochastically(total, rounding.seed, rounding.number, rounding.keys[i], geometry)
        statistic.copy_(total)
    if first_counts is not None and statistics:
        first_counts += histogram(
            statistics,
            shift=key_bits(statistics[0]) - FIRST_WIDTH,
            width=FIRST_WIDTH,
            prefixes=first_counts.new_zeros(len(statistics)),
            per_tensor=first_counts.shape[0] == len(statistics),
            absolute=absolute,
        )


FIRST_WIDTH = 11  # bits of a sort key that the first round of a selection counts


def key_bits(scores: Tensor) -> int:
    """Length of the sort keys of these scores, in bits."""
    return 16 if scores.dtype == torch.bfloat16 else 32


def _sort_keys(scores: Tensor, absolute: bool) -> tuple[Tensor, Tensor]:
    """Integers [numel] int64 that order as the scores do, and where the scores are finite.

    -0.0 counts as 0.0. Of float32 all 32 bits, of bfloat16 the 16 that it has.
    """
    values = scores.reshape(-1).to(torch.float32)
    values = values.abs() if absolute else values + 0.0
    raw = values.view(torch.int32).to(torch.int64) & _LOW_32
    keys = torch.where(raw < 1 << 31, raw + (1 << 31), _LOW_32 - raw)
    return keys >> 32 - key_bits(scores), values.isfinite()


def _above_cut(scores: Tensor, cuts: Cuts, i: int, geometry: Geometry, *, absolute: bool) -> Tensor:
    keys, finite = _sort_keys(scores, absolute)
    place = global_index(torch.arange(keys.numel(), device=keys.device), geometry)
    tied = (keys == cuts.keys[i]) & (place <= cuts.last_ties[i])
    return finite & ((keys > cuts.keys[i]) | tied)


def histogram(
    scores: Sequence[Tensor],
    *,
    shift: int,
    width: int,
    prefixes: Tensor,
    per_tensor: bool,
    absolute: bool = False,
    ties: Tensor | None = None,
    geometries: Sequence[Geometry] | None = None,
) -> Tensor:
    """Count the finite scores by `width` bits of their sort keys: one round of an exact radix selection.

    Counted are keys with `key >> (shift + width) == prefix`, in the bin `(key >> shift) % 2**width`. With
    `ties`, only entries whose key equals the tie take part, and the number that is counted by its bits is
    their global index.

    Args:
        scores: any shape, float32 or bfloat16, all of one dtype. absolute: rank by magnitude.
        prefixes: int64 [len(scores)]; ties likewise.

    Returns:
        int64 [len(scores), 2**width] when `per_tensor`, else [1, 2**width].
    """
    bins = 1 << width
    device = scores[0].device if scores else torch.device("cpu")
    counts = torch.zeros(len(scores) if per_tensor else 1, bins, dtype=torch.int64, device=device)
    for i, score in enumerate(scores):
        keys, counted = _sort_keys(score, absolute)
        if ties is not None:
            counted = counted & (keys == ties[i])
            local = torch.arange(keys.numel(), device=keys.device)
            keys = global_index(local, whole(score) if geometries is None else geometries[i])
        keys = keys[counted & (keys >> shift + width == prefixes[i])]
        counts[i if per_tensor else 0] += torch.bincount(keys >> shift & bins - 1, minlength=bins).to(device)
    return counts


def compact(
    scores: Sequence[Tensor],
    *,
    cuts: Cuts,
    as_bits: bool,
    absolute: bool = False,
    geometries: Sequence[Geometry] | None = None,
) -> list[Tensor]:
    """The entries above each tensor's cut.

    Returns:
        Per tensor the ascending local indices, [nnz] int32 (int64 when numel > 2**31 - 1), or, `as_bits`,
        packed bits.
    """
    results = []
    for i, score in enumerate(scores):
        geometry = whole(score) if geometries is None else geometries[i]
        selected = _above_cut(score, cuts, i, geometry, absolute=absolute)
        results.append(
            pack_bits(selected) if as_bits else selected.nonzero().view(-1).to(index_dtype(score.numel()))
        )
    return results


def index_dtype(numel: int) -> torch.dtype:
    """int32 where it can hold every index."""
    return torch.int32 if numel <= 2**31 - 1 else torch.int64


# compact state, gradients and weights


def remap_(
    olds: Sequence[Tensor], news: Sequence[Tensor], states: Sequence[Sequence[Tensor]]
) -> list[list[Tensor]]:
    """Carry compact state from one ascending index list to another, for each tensor.

    Args:
        olds: [nnz] indices per tensor. news: [new nnz] indices per tensor, of the same dtype.
        states: per tensor its states, [nnz] each, any dtype.

    Returns:
        Per tensor, [new nnz] each: entries in both lists keep their value bit for bit, newcomers start at
        zero.
    """
    results = []
    for old, new, columns in zip(olds, news, states, strict=True):
        if old.numel():
            place = torch.searchsorted(old.contiguous(), new.contiguous()).clamp_(max=old.numel() - 1)
            stays = old[place] == new
            # not an assignment through the mask: with one value that is a fill, which changes a NaN's bits
            results.append([torch.where(stays, c[place], torch.zeros_like(c[:1])) for c in columns])
        else:
            results.append([column.new_zeros(new.numel()) for column in columns])
    return results


def gather_(buffers: Sequence[Tensor], tensors: Sequence[Tensor], indices: Sequence[Tensor]) -> None:
    """Add the listed entries of each tensor to its buffer. buffers: [nnz] float32 or float64."""
    for buffer, tensor, where in zip(buffers, tensors, indices, strict=True):
        buffer.add_(tensor.reshape(-1)[where.long()].to(buffer.dtype))


def norm(
    grads: Sequence[Tensor],
    *,
    indices: Sequence[Tensor] | None = None,
    geometries: Sequence[Geometry] | None = None,
    bits: Sequence[Tensor] | None = None,
    seeded: Draws | None = None,
) -> Tensor:
    """Sum of squares of the selected gradient entries, float64 and 0-dim, so that tensors and ranks add
    up.

    Listed entries give the same bits as a tensor of them alone, so that gradients which were gathered before
    are clipped exactly like dense ones.
    """
    total = torch.zeros((), dtype=torch.float64, device=grads[0].device if grads else None)
    for i, grad in enumerate(grads):
        selected = _selected(i, grad, geometries, bits, seeded, None, None)
        if indices is not None:
            grad = grad.reshape(-1)[indices[i].long()]
        elif selected is not None:
            grad = grad[selected]
        total += grad.to(torch.float64).square().sum()
    return total


def apply_delta_(
    params: Sequence[Tensor], indices: Sequence[Tensor], values: Sequence[Tensor], *, mode: str = "replace"
) -> None:
    """Write a sparse difference into parameters.

    Args:
        indices: flat, ascending, without duplicates, one list per tensor.
        values: [nnz], in the parameter's dtype. `mode` "replace" stores them, "add" adds them, and "xor"
            combines the bits (values then hold old bits xor new bits, so that applying twice restores the
            parameter exactly).
    """
    for param, where, value in zip(params, indices, values, strict=True):
        place = where.long()
        flat = param.reshape(-1)
        if mode == "add":
            flat[place] += value
        elif mode == "xor":
            integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[param.element_size()]
            flat[place] = (flat[place].view(integer) ^ value.view(integer)).view(param.dtype)
        else:
            flat[place] = value
        if not param.is_contiguous():
            param.copy_(flat.view(param.shape))
