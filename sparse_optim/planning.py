"""How many bytes a fine-tuning run holds, worked out before anything is allocated.

The bytes of each kind follow from shapes, dtypes and the optimizer's settings alone; `estimate_memory` adds
them up as they are alive together: between steps, in a step that trains, while observing, while selecting.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from . import Bernoulli, GradualUnfreezing, MaskedAdamW, TopK

Optimizer = Literal["masked", "adamw", "adamw_fused", "adamw_8bit"]
_OPTIMIZERS = ("masked", "adamw", "adamw_fused", "adamw_8bit")
# the counts of one round of a selection, int64, for each row; five arrays of that size are alive at once, one
# of them counted while the last gradient was accumulated. Measured with the native backend, 20 and 40 tensors
# of 50,000 entries, a row each
_COUNTS = 8 * 2048
_COUNTED = 5
# carried from one list to the next, each entry of a tensor has a place, int64, a flag and one value
_CARRYING = 13
_LARGEST_INT32 = 2**31 - 1
# bitsandbytes keeps smaller tensors in float32, and a float32 scale for each block
_SMALLEST_8BIT = 4096
_BLOCK_8BIT = 256


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by kind, and the most that is held at once. `str()` is a table.

    Activations, temporary tensors of the model, buffers that are no parameters, and slack of the allocator
    are not contained.

    Attributes:
        parameters: entries of all weights, tied ones once. trained: of those that require a gradient.
        selected: entries that an update trains (Bernoulli: expected).
        weights: all parameters, trained or not.
        gradients: dense ones that live between steps.
        moments, masters, ages: the optimizer's states.
        masks: indices or bits.
        gradient_buffers: of selected entries, where gradients are released.
        statistic: while observing, on the device of the weights. host_statistic: the same on the host.
        training_peak, observing_peak, selecting_peak: bytes on the device of the weights; None where a policy
            does not observe.
        advice: what fits into the budget that was given, in one sentence; "" without one.
    """

    parameters: int
    trained: int
    selected: int
    weights: int
    gradients: int
    moments: int
    masters: int
    ages: int
    masks: int
    gradient_buffers: int
    statistic: int
    host_statistic: int
    training_peak: int
    observing_peak: int | None
    selecting_peak: int | None
    advice: str = ""

    @property
    def states(self) -> int:
        """Moments, masters and ages."""
        return self.moments + self.masters + self.ages

    @property
    def between_steps(self) -> int:
        """What is alive between two steps that train."""
        return self.weights + self.gradients + self.states + self.masks + self.gradient_buffers

    @property
    def peak(self) -> int:
        """The most that is ever held at once."""
        return max(self.training_peak, self.observing_peak or 0, self.selecting_peak or 0)

    def per_parameter(self, size: int) -> float:
        """Bytes divided by all parameters."""
        return size / max(1, self.parameters)

    def __str__(self) -> str:
        kinds = ["weights", "gradients", "moments", "masters", "ages", "masks", "gradient_buffers"]
        rows: list[tuple[str, int | None]] = [(kind, getattr(self, kind) or None) for kind in kinds]
        rows += [
            ("between steps", self.between_steps),
            ("a step that trains", self.training_peak),
            ("while observing", self.observing_peak),
            ("while selecting", self.selecting_peak),
            ("statistic on the host", self.host_statistic or None),
        ]
        lines = [
            f"{self.parameters:,} parameters, {self.trained:,} with gradients, {self.selected:,} selected",
            f"{'':<22}{'GiB':>10}  bytes per parameter",
        ]
        for name, size in rows:
            if size is not None:
                shown = name.replace("_", " ")
                lines.append(f"{shown:<22}{size / 2**30:>10.3f}  {self.per_parameter(size):.3f}")
        lines.append("Activations are not estimated.")
        return "\n".join(lines + [self.advice] * bool(self.advice))


class _Tensor(NamedTuple):
    """One parameter."""

    numel: int
    dtype: torch.dtype
    trained: bool
    masked: bool
    group: int

    @property
    def size(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class _Settings:
    optimizer: Optimizer
    policy: Bernoulli | TopK | GradualUnfreezing | None
    unselected: str
    state_dtype: torch.dtype | None
    amsgrad: bool
    release_gradients: bool
    statistic_dtype: torch.dtype
    on_host: bool
    observe_unit: str

    @property
    def selecting(self) -> TopK | None:
        """The policy, if it selects by what it observes."""
        if isinstance(self.policy, TopK) and not self.policy.trains_everything:
            return self.policy
        return None

    @property
    def compact(self) -> bool:
        """Whether moments are kept for selected entries only."""
        policy = self.selecting
        return policy is not None and self.unselected == "frozen" and policy.schedule.meanwhile == "nothing"

    @property
    def folds(self) -> bool:
        """Whether a gradient that is observed enters the statistic at once, and is dropped."""
        policy = self.selecting
        at_once = policy is not None and policy.schedule.observe is not None
        linear = policy is not None and policy.statistic.is_linear
        return self.release_gradients and at_once and (linear or self.observe_unit == "microbatch")


def estimate_memory(
    model_or_config: Any,
    *,
    optimizer: Optimizer = "masked",
    policy: Bernoulli | TopK | GradualUnfreezing | None = None,
    unselected: Literal["frozen", "zero_grad", "track"] = "frozen",
    dtype: torch.dtype | None = None,
    state_dtype: torch.dtype | None = None,
    amsgrad: bool = False,
    release_gradients: bool = False,
    statistic_dtype: torch.dtype | None = None,
    statistic_device: str | torch.device | None = None,
    observe_unit: Literal["step", "microbatch"] = "step",
    auto_class: Any = None,
    budget_bytes: float | None = None,
) -> MemoryEstimate:
    """How many bytes weights, gradients and the optimizer hold, by kind and at their peaks.

    Nothing is allocated: a model may lie on the meta device, and a config is built there. Activations are not
    estimated, nor is what a second micro-batch holds while its gradient is added. A policy that observes
    explicitly is taken to select once, and `GradualUnfreezing` to have reached its last stage. An accelerated
    backend is assumed: the reference needs temporary tensors besides.

    Args:
        model_or_config: a module; a Hugging Face config; parameter groups, as `param_groups(model)` returns
            them, in which `masked=False` counts and frozen weights are not seen; or a list of parameters, of
            (name, parameter), or of (name, shape, dtype). Tied parameters count once.
        optimizer: "masked" for `MaskedAdamW` and the methods; to compare, "adamw" (torch's default on a GPU,
            with temporary tensors for a group at a time), "adamw_fused", or "adamw_8bit" (bitsandbytes, as it
            is documented). These take no policy.
        policy, unselected, state_dtype, amsgrad, release_gradients, statistic_dtype, statistic_device,
            observe_unit: as in `MaskedAdamW`.
        dtype: of floating weights, in place of their own.
        auto_class: for a config: class, or name of a class, of transformers that builds the model. None takes
            the first of `AutoModelForCausalLM`, `AutoModelForSeq2SeqLM` and `AutoModel` that knows the
            config.
        budget_bytes: what there is; `advice` then says whether that is enough, and what helps.

    Returns:
        The bytes.

    Raises:
        TypeError: for an unknown kind of model. ValueError: for bad values, and settings that contradict each
            other. ImportError: for `auto_class` without transformers.

    Example:
        >>> import torch
        >>> from sparse_optim import Schedule, TopK, estimate_memory
        >>> policy = TopK(0.01, schedule=Schedule(observe=100))
        >>> with torch.device("meta"):
        ...     model = torch.nn.Linear(10_000, 100_000, dtype=torch.bfloat16)
        >>> print(estimate_memory(model, policy=policy, release_gradients=True))
        1,000,100,000 parameters, 1,000,100,000 with gradients, 10,001,000 selected
                                     GiB  bytes per parameter
        weights                    1.863  2.000
        moments                    0.075  0.080
        masters                    0.037  0.040
        masks                      0.037  0.040
        gradient buffers           0.037  0.040
        between steps              2.049  2.200
        a step that trains         3.912  4.200
        while observing            7.451  8.000
        while selecting            7.489  8.040
        Activations are not estimated.
    """
    settings = _check(
        optimizer, policy, unselected, state_dtype, amsgrad, release_gradients,
        statistic_dtype, statistic_device, observe_unit,
    )  # fmt: skip
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating dtype or None, got {dtype!r}; use torch.bfloat16.")
    if budget_bytes is not None and not budget_bytes > 0:
        raise ValueError(f"budget_bytes must be positive, got {budget_bytes!r}; 24 GB are 24e9.")
    tensors = list(_tensors(model_or_config, auto_class))
    if not tensors:
        raise ValueError("model_or_config must have parameters, got none; pass the model that is trained.")
    if dtype is not None:
        tensors = [t._replace(dtype=dtype) if t.dtype.is_floating_point else t for t in tensors]
    estimate = _estimate(tensors, settings)
    return (
        estimate
        if budget_bytes is None
        else replace(estimate, advice=_advice(tensors, settings, budget_bytes))
    )


def model_on_meta(config: Any, auto_class: Any = None) -> nn.Module:
    """The model of a Hugging Face config, without memory for its weights.

    Args:
        config: a `transformers.PretrainedConfig`. auto_class: as in `estimate_memory`.

    Raises:
        ValueError: for an unknown class, or one that does not know the config.
    """
    import transformers

    if isinstance(auto_class, str):
        if not hasattr(transformers, auto_class):
            raise ValueError(
                f"auto_class must be a class of transformers, got {auto_class!r}; "
                "use AutoModelForSequenceClassification, say."
            )
        auto_class = getattr(transformers, auto_class)
    if auto_class is None:
        auto_class = next(
            (
                tried
                for tried in (transformers.AutoModelForCausalLM, transformers.AutoModelForSeq2SeqLM)
                if type(config) in tried._model_mapping
            ),
            transformers.AutoModel,
        )
    if not hasattr(auto_class, "from_config"):
        raise ValueError(
            f"auto_class must have from_config, got {auto_class!r}; "
            "use AutoModelForSequenceClassification, say."
        )
    with torch.device("meta"):
        model: nn.Module = auto_class.from_config(config)
    return model


def _check(
    optimizer: Optimizer,
    policy: Bernoulli | TopK | GradualUnfreezing | None,
    unselected: Literal["frozen", "zero_grad", "track"],
    state_dtype: torch.dtype | None,
    amsgrad: bool,
    release_gradients: bool,
    statistic_dtype: torch.dtype | None,
    statistic_device: str | torch.device | None,
    observe_unit: Literal["step", "microbatch"],
) -> _Settings:
    """Refuses what the optimizer would refuse, and what means nothing."""
    if optimizer not in _OPTIMIZERS:
        raise ValueError(
            f"optimizer must be one of {', '.join(map(repr, _OPTIMIZERS))}, got {optimizer!r}; "
            "'masked' is ours."
        )
    # the constructor knows what it refuses
    MaskedAdamW(
        [torch.zeros(1)], policy=policy, unselected=unselected, state_dtype=state_dtype,
        release_gradients=release_gradients, statistic_dtype=statistic_dtype,
        statistic_device=statistic_device, observe_unit=observe_unit,
    )  # fmt: skip
    ours = {"policy": policy, "state_dtype": state_dtype}
    for name, value in ours.items():
        if optimizer != "masked" and value is not None:
            raise ValueError(
                f"{name} must be left out for optimizer={optimizer!r}, got {value!r}; use optimizer='masked'."
            )
    return _Settings(
        optimizer, policy, unselected, state_dtype, amsgrad, release_gradients,
        statistic_dtype or torch.float32, statistic_device is not None, observe_unit,
    )  # fmt: skip


def _tensors(model_or_config: Any, auto_class: Any) -> Iterable[_Tensor]:
    """Every parameter once."""
    transformers = sys.modules.get("transformers")
    if transformers is not None and isinstance(model_or_config, transformers.PretrainedConfig):
        model_or_config = model_on_meta(model_or_config, auto_class)
    elif auto_class is not None:
        raise ValueError(
            f"auto_class must be None unless a config is given, got {auto_class!r} with "
            f"{type(model_or_config).__name__}; leave it out."
        )
    if isinstance(model_or_config, nn.Module):
        model_or_config = model_or_config.parameters()
    if isinstance(model_or_config, str | bytes | Tensor) or not isinstance(model_or_config, Iterable):
        raise TypeError(
            "model_or_config must be a module, a Hugging Face config, parameter groups, or a list of "
            f"(name, shape, dtype), got {model_or_config!r}; sparse-optim plan takes names and paths."
        )
    seen: set[int] = set()
    items = list(model_or_config)
    for number, item in enumerate(items):
        is_group = isinstance(item, Mapping)
        members = item["params"] if is_group else [item]
        members = [members] if isinstance(members, Tensor) else members
        masked = bool(item.get("masked", True)) if is_group else True
        group = number if is_group else 0
        for member in members:
            if isinstance(member, tuple) and len(member) == 3:
                _, shape, dtype = member
                yield _Tensor(torch.Size(shape).numel(), dtype, True, masked, group)
                continue
            p = member[1] if isinstance(member, tuple) and len(member) == 2 else member
            if not isinstance(p, Tensor):
                raise TypeError(
                    f"parameters must be tensors, (name, tensor) or (name, shape, dtype), got {member!r}; "
                    "pass model.named_parameters()."
                )
            if id(p) not in seen:
                seen.add(id(p))
                yield _Tensor(p.numel(), p.dtype, p.requires_grad, masked, group)


def _estimate(tensors: Sequence[_Tensor], settings: _Settings) -> MemoryEstimate:
    """Adds up what is alive together."""
    policy, compact = settings.selecting, settings.compact
    trained = [t for t in tensors if t.trained]
    masked = [t for t in trained if t.masked]
    others = [t for t in trained if not t.masked]
    weights, gradients = _size(tensors), _size(trained)
    selected = _selected(masked, settings)
    n = _numel(masked)

    each = [_list_bytes(t, k, settings) for t, k in zip(masked, selected, strict=True)]
    lists = _Lists(*(sum(column) for column in zip(*each, strict=True)))
    moments = sum(_dense_moments(t, settings) for t in (others if compact else trained)) + lists.moments
    masks = lists.masks if compact or policy is None else sum(4 * -(-t.numel // 32) for t in masked)
    states = moments + lists.masters + lists.ages
    kept = _size(others) if settings.release_gradients else gradients
    between = weights + kept + states + masks + lists.buffers

    largest = max((t.size for t in masked), default=0)
    training = between
    if settings.release_gradients:
        training += largest
    elif settings.optimizer == "adamw":
        # the root of the second moments, for all parameters that one call updates
        training += max(
            _size([t for t in trained if t.group == group]) for group in {t.group for t in tensors}
        )

    statistic = 0 if policy is None else n * settings.statistic_dtype.itemsize
    host_statistic = statistic if settings.on_host else 0
    statistic -= host_statistic
    observing = selecting = None
    if policy is not None:
        repeats = policy.schedule.train is not None
        statistic += 4 * n if policy.statistic.needs_curvature else 0
        given = weights + (kept if settings.folds else gradients)
        if repeats:
            # what was selected before stays until the next selection; buffers end with the step before
            given += states + masks
        elif policy.schedule.meanwhile == "everything":
            given += moments
        observing = given + statistic + (largest if settings.folds else 0)
        new = masks
        if repeats and compact:
            # all compact state is there twice while it is carried over to the new lists
            new += lists.moments + lists.masters + lists.ages + _CARRYING * max(selected, default=0)
        selecting = given + statistic + max(new, _counting(policy, masked, masks, settings))
    return MemoryEstimate(
        parameters=_numel(tensors),
        trained=_numel(trained),
        selected=sum(selected) + _numel(others),
        weights=weights,
        gradients=kept,
        moments=moments,
        masters=lists.masters,
        ages=lists.ages,
        masks=masks,
        gradient_buffers=lists.buffers,
        statistic=statistic,
        host_statistic=host_statistic,
        training_peak=training,
        observing_peak=observing,
        selecting_peak=selecting,
    )


class _Lists(NamedTuple):
    """Bytes for the selected entries of compact parameters."""

    moments: int = 0
    masters: int = 0
    ages: int = 0
    masks: int = 0
    buffers: int = 0


def _list_bytes(t: _Tensor, k: int, settings: _Settings) -> _Lists:
    """What `k` selected entries of one parameter hold."""
    if not settings.compact or settings.selecting is None:
        return _Lists()
    wide = 8 * k if t.dtype == torch.float64 else 4 * k
    return _Lists(
        moments=(3 if settings.amsgrad else 2) * wide,
        masters=wide if t.dtype.itemsize < 4 else 0,
        # entries have ages of their own once a second selection has let some of them stay
        ages=4 * k if settings.selecting.schedule.train is not None else 0,
        masks=4 * k if t.numel <= _LARGEST_INT32 else 8 * k,
        buffers=wide if settings.release_gradients else 0,
    )


def _dense_moments(t: _Tensor, settings: _Settings) -> int:
    """Parameter-shaped moments of one parameter."""
    columns = 3 if settings.amsgrad else 2
    if settings.optimizer == "adamw_8bit":
        small = t.numel < _SMALLEST_8BIT
        return columns * (4 * t.numel if small else t.numel + 4 * -(-t.numel // _BLOCK_8BIT))
    dtype = t.dtype if settings.state_dtype is None or t.dtype.is_complex else settings.state_dtype
    return columns * t.numel * dtype.itemsize


def _selected(masked: Sequence[_Tensor], settings: _Settings) -> list[int]:
    """Entries of each masked parameter that an update trains; a global choice is taken as spread evenly."""
    policy, n = settings.policy, _numel(masked)
    share = 1.0
    if isinstance(policy, TopK):
        share = policy.density
        if policy.scope == "tensor":
            return [int(share * t.numel) for t in masked]
    elif isinstance(policy, Bernoulli):
        share = policy.keep
    total = int(share * n)
    before, result = 0, []
    for t in masked:
        result.append(total * (before + t.numel) // n - total * before // n)
        before += t.numel
    return result


def _counting(policy: TopK, masked: Sequence[_Tensor], masks: int, settings: _Settings) -> int:
    """What a selection holds besides the statistic: its counts, new masks, and scores of their own."""
    if settings.on_host:
        return masks
    counts = _COUNTS * (len(masked) if policy.scope == "tensor" else 1)
    if policy.statistic.is_its_own_score:
        return max(_COUNTED * counts, masks + counts)
    return 4 * _numel(masked) + max((_COUNTED - 1) * counts, masks)


def _numel(tensors: Iterable[_Tensor]) -> int:
    return sum(t.numel for t in tensors)


def _size(tensors: Iterable[_Tensor]) -> int:
    return sum(t.size for t in tensors)


def _advice(tensors: Sequence[_Tensor], settings: _Settings, budget: float) -> str:
    """Whether the budget suffices, and the mildest change that helps where it does not."""
    now = _estimate(tensors, settings)
    if now.peak <= budget:
        return f"The peak of {_gb(now.peak)} fits into {_gb(budget)}."
    meanwhile = " while observing and selecting" if now.training_peak <= budget else ""
    need = f"The peak of {_gb(now.peak)}{meanwhile}"
    # the mildest first
    smaller: list[dict[str, Any]] = []
    if settings.selecting is not None and settings.selecting.statistic.is_its_own_score:
        smaller = [{"statistic_dtype": torch.bfloat16}, {"on_host": True}]
    changes = list(smaller)
    if settings.compact:
        release: dict[str, Any] = {"release_gradients": True}
        changes += [release | change for change in ({}, *smaller)]
        changes += [release | {"observe_unit": "microbatch"} | change for change in ({}, *smaller)]
    tried = [(change, _estimate(tensors, replace(settings, **change))) for change in changes]
    for change, then in tried:
        if then.peak <= budget:
            words = ", ".join(f"{name}={value!r}" for name, value in change.items())
            words = words.replace("on_host=True", "statistic_device='cpu'")
            host = f" and {_gb(then.host_statistic)} on the host" if then.host_statistic else ""
            return f"{need} does not fit into {_gb(budget)}; with {words} it is {_gb(then.peak)}{host}."
    least = min([now.peak, *(then.peak for _, then in tried)])
    return (
        f"{need} does not fit into {_gb(budget)}, and no setting of this optimizer brings it below "
        f"{_gb(least)}; train fewer parameters, or keep them in fewer bytes."
    )


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
