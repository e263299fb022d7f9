"""Mixout, and the forward half of DPS Mix: linear layers that train with initial weights mixed in.

Both put a parametrization on the weight of chosen `nn.Linear` layers. The raw weight stays the same parameter
object, so the optimizer, weight decay and evaluation know nothing of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from sparse_optim import MaskedAdamW, TopK

Fidelity = Literal["paper", "release"]


class WeightMixing:
    """The handle of `mixout` and `mix_weights`: removes the mixing, saves and loads what it remembers.

    Weights mix while their layer is in training mode. Whoever reads `layer.weight` then sees a fresh draw;
    `layer.parametrizations.weight.original` is the raw weight.
    """

    def __init__(
        self, linears: Mapping[str, nn.Linear], keep: float, fidelity: Fidelity, stages: _Stages | None
    ) -> None:
        """Use `mixout` or `mix_weights`."""
        self._keep, self._fidelity, self._stages = keep, fidelity, stages
        self._attached = {name: (linear, list(linear._parameters)) for name, linear in linears.items()}
        self._layers: dict[str, _MixedWeight] = {}
        for name, linear in linears.items():
            scale = 1.0 if fidelity == "release" else 1.0 / keep
            self._layers[name] = layer = _MixedWeight(name, linear.weight, keep, scale, stages)
            # unsafe means that registering does not call it, which would draw random numbers
            parametrize.register_parametrization(linear, "weight", layer, unsafe=True)
            cast(nn.Module, linear.parametrizations).train(linear.training)
        if stages is not None:
            stages.attach(self._layers)

    def counts(self) -> dict[str, Tensor]:
        """How often each input feature took part since stage I began, by weight name: [in features] float32.

        Always zero under `mixout`, which does not count.
        """
        return {name: layer.count.clone() for name, layer in self._layers.items()}

    def remove(self) -> None:
        """Give every layer its raw weight back as a plain parameter, and leave the optimizer alone.

        The second call does nothing.
        """
        for linear, order in self._attached.values():
            parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)
            # it comes back as the last parameter
            for name in order:
                linear._parameters[name] = linear._parameters.pop(name)
        self._attached = {}
        if self._stages is not None:
            self._stages.detach()

    def state_dict(self) -> dict[str, Any]:
        """Numbers and tensors, fit for `torch.load(weights_only=True)`: initial weights, counts, weights T.

        Draws come from torch's default generators; to go on bit for bit, save their state too.
        """
        return {
            "keep": self._keep,
            "fidelity": self._fidelity,
            "clock": 0 if self._stages is None else self._stages.clock,
            "weights": {name: layer.memory() for name, layer in self._layers.items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state dict of the same layers and settings; nothing changes when it does not fit.

        Under `mix_weights`, load what the optimizer's state dict was at the same time into the optimizer.

        Raises:
            ValueError: when layers, shapes or settings are others than the saved ones.
        """
        for key, own in (("keep", self._keep), ("fidelity", self._fidelity)):
            if state_dict[key] != own:
                raise ValueError(
                    f"the saved {key} must be this handle's {own!r}, got {state_dict[key]!r}; "
                    "mix the weights as they were when saved."
                )
        saved: Mapping[str, Mapping[str, Tensor]] = state_dict["weights"]
        differing = sorted(saved.keys() ^ self._layers.keys())
        if differing:
            raise ValueError(
                f"the saved weights must be those of this handle, got {differing[0]!r} in one alone; "
                "mix the same layers as when saved."
            )
        for name, layer in self._layers.items():
            for key, tensor in saved[name].items():
                shape = (layer.count if key == "count" else layer.initial).shape
                if tensor.shape != shape:
                    raise ValueError(
                        f"saved {key} of {name!r} must have shape {tuple(shape)}, got {tuple(tensor.shape)}; "
                        "load the state dict of a model with the same shapes."
                    )
        for name, layer in self._layers.items():
            layer.remember(saved[name])
        if self._stages is not None:
            self._stages.clock = int(state_dict["clock"])


def mixout(
    model: nn.Module, p: float, *, modules: Iterable[str] | None = None, fidelity: Fidelity = "paper"
) -> WeightMixing:
    r"""Mixout: in training, columns of a linear weight W are replaced by initial ones, W0.

    .. math:: \tilde W = \frac{m W + (1 - m) W_0 - p W_0}{1 - p}, \quad m_j \sim \mathrm{Bernoulli}(1 - p)

    One m_j for each input feature j, shared by all output rows, drawn anew in every forward. The mean of
    :math:`\tilde W` is W: dropout towards W0 instead of zero. Evaluation uses W itself, bit for bit. p = 0
    changes nothing and draws nothing. Draws come from torch's default generator.

    Memory: one copy of the chosen weights (W0), and in training one temporary of each (:math:`\tilde W`).

    Args:
        model: any module. Its parameters stay the same objects, so that the optimizer may exist already; one
            that is built now sees the weights after the biases of their layers.
        p: probability that an input feature uses its initial weights, in [0, 1).
        modules: regular expressions, searched in the names of `nn.Linear` modules; None takes every one
            whose weight requires a gradient. A fresh head is better left out: its initial weights are noise.
        fidelity: the gradient of W. "paper": that of the formula, m g / (1 - p) (our reading). "release":
            m g, as in the authors' code, whose backward pass does not divide.

    Returns:
        A handle; `handle.remove()` restores the model.

    Raises:
        ValueError: for a bad p, patterns that find no linear layer, weights that are shared, frozen or
            parametrized already.
        TypeError: for a string instead of a list of patterns.

    Example:
        >>> import torch
        >>> from sparse_optim.nn import mixout
        >>> model = torch.nn.Linear(3, 2)
        >>> handle = mixout(model, 0.5)
        >>> raw = model.parametrizations.weight.original
        >>> initial = raw.detach().clone()
        >>> with torch.no_grad():
        ...     _ = raw.add_(1.0)
        >>> moved = (model.weight - initial).detach().round()  # by nothing, or by twice as much
        >>> bool(((moved == 0) | (moved == 2)).all())
        True
        >>> handle.remove()

    References:
        Lee, Cho, Kang, Mixout: Effective Regularization to Finetune Large-scale Pretrained Language Models,
        ICLR 2020.
    """
    if isinstance(p, bool) or not isinstance(p, int | float) or not 0.0 <= p < 1.0:
        raise ValueError(
            f"p must be in [0, 1), got {p!r}; the share of features with initial weights; 0 mixes nothing."
        )
    _check_fidelity(fidelity)
    linears = _choose(model, modules, lambda weight: weight.requires_grad, "require a gradient")
    return WeightMixing(linears, 1.0 - p, fidelity, None)


def mix_weights(
    model: nn.Module,
    optimizer: MaskedAdamW,
    *,
    modules: Iterable[str] | None = None,
    fidelity: Fidelity = "paper",
) -> WeightMixing:
    r"""The forward half of DPS Mix, in step with the stages of a `DPSAdamW(variant="mix")`.

    Let q = 1 - density. In stage I a linear weight W mixes with W0, its value at this call, by input feature
    as in `mixout`; in stage II the release mixes it with T, its value when stage II began, by selected entry:

    .. math:: \tilde W = \frac{m W + (1 - m) A - q A}{1 - q}

    with A = W0 and m_j ~ Bernoulli(1 - q) in stage I, with A = T and m the mask in stage II, where unselected
    entries then act as T and selected ones as T + (W - T)/(1 - q). Evaluation uses W itself, bit for bit.
    Density 1 changes nothing and draws nothing.

    | | `"paper"` | `"release"`, all of it known |
    | --- | --- | --- |
    | stage I, forward | known: Mixout-like with W0; our reading: as released | the formula, drawn anew |
    | gradient of W | our reading: of the formula, m g / (1 - q) | m g, not divided |
    | counts C | known: how often an entry was active; our reading: as released | C += m |
    | stage II, forward | known: unselected entries rest at T; our reading: W itself | the formula |
    | gradient of W | our reading: g, which the optimizer masks | m g, not divided |

    AdamW does not see a constant factor of all gradients, but for `eps`; clipping does.

    **Counts.** A draw counts when the backward pass of its layer runs, once per forward that trains.
    Checkpointing's recomputation repeats the draw (with `preserve_rng_state`, the default) and counts once; a
    forward without backward does not count. Every micro-batch of an accumulated gradient counts, while the
    optimizer's u counts steps; so does a batch whose step a gradient scaler skips. Counts start from zero in
    each stage I and reach the optimizer (`optimizer.set_count`) right before it selects, averaged over the
    processes of `torch.distributed`, where each makes draws of its own, so that all select the same entries.

    Memory: one copy of the chosen weights (W0), in the release another in stage II (T). While mixing, one
    temporary of each weight, and a byte per entry for the mask in stage II of the release.

    Args:
        model: the module that holds the parameters of the optimizer; they stay the same objects.
        optimizer: a `DPSAdamW(variant="mix")` with named parameters, before its first step, or before a state
            dict is loaded. One that is built while some weights are mixed sees them after their biases.
        modules: regular expressions, searched in the names of `nn.Linear` modules; None takes every one
            whose weight the optimizer masks.
        fidelity: "paper" or "release", as in the table; the same as the optimizer's.

    Returns:
        A handle; `handle.remove()` restores the model. To go on from a checkpoint, load the state dicts of
        optimizer and handle, in any order, and the state of torch's generators.

    Raises:
        TypeError: for an optimizer of another class, and for a string instead of a list of patterns.
        ValueError: for an optimizer with another policy or unnamed parameters, for "paper" with
            `unselected="zero_grad"`, for patterns that find no linear layer, and for weights that are shared,
            parametrized already or not masked.
        RuntimeError: in a training forward or a step, when the handle is not at the optimizer's step; in a
            training forward of a copy of the model.

    Example:
        >>> import torch
        >>> from sparse_optim import DPSAdamW
        >>> from sparse_optim.nn import mix_weights
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = DPSAdamW(model.named_parameters(), variant="mix", density=0.5, update_steps=2)
        >>> handle = mix_weights(model, optimizer)
        >>> for _ in range(6):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(3, 4)).square().sum().backward()
        ...     optimizer.step()
        >>> bool(handle.counts()["weight"].max() <= 2)  # the third stage was a stage I
        True
        >>> handle.remove()

    References:
        Zhang et al., Fine-Tuning Pre-Trained Language Models Effectively by Optimizing Subnetworks
        Adaptively, NeurIPS 2022.
    """
    _check_fidelity(fidelity)
    policy = _check_optimizer(optimizer, fidelity)
    masked = {id(p) for group in optimizer.param_groups if group["masked"] for p in group["params"]}
    linears = _choose(model, modules, lambda weight: id(weight) in masked, "the optimizer masks")
    stages = _Stages(optimizer, policy, {name: linear.weight for name, linear in linears.items()}, fidelity)
    return WeightMixing(linears, policy.density, fidelity, stages)


class _MixedWeight(nn.Module):
    """The parametrization of one weight. Its tensors stay out of the model's state dict."""

    def __init__(
        self, name: str, weight: Tensor, keep: float, gradient_scale: float, stages: _Stages | None
    ) -> None:
        super().__init__()
        self.name, self.keep, self.gradient_scale, self.stages = name, keep, gradient_scale, stages
        self.initial = weight.detach().clone()
        self.count = torch.zeros(weight.shape[1], dtype=torch.float32, device=weight.device)
        # T, while stage II of the release lasts
        self.start: Tensor | None = None

    def forward(self, weight: Tensor) -> Tensor:
        """What the layer computes with."""
        if not self.training or self.keep == 1.0:
            return weight
        if self.stages is not None and self.stages.second(self):
            if self.start is None:
                return weight
            return _mix(weight, self.start, self.stages.mask(weight), self, False)
        drawn = torch.rand(weight.shape[1], dtype=torch.float32, device=weight.device) < self.keep
        return _mix(weight, self.initial, drawn, self, self.stages is not None)

    def memory(self) -> dict[str, Tensor]:
        """What has to be saved."""
        memory = {"initial": self.initial, "count": self.count.clone()}
        return memory if self.start is None else {**memory, "start": self.start}

    def remember(self, memory: Mapping[str, Tensor]) -> None:
        """The inverse of `memory`."""
        # copies, because `memory` may be in somebody's hands or another layer's
        self.initial = memory["initial"].to(self.initial, copy=True)
        self.count = memory["count"].to(self.count, copy=True)
        self.start = memory["start"].to(self.initial, copy=True) if "start" in memory else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _MixedWeight:
        # moves as a buffer does; DistributedDataParallel would overwrite a buffer with that of rank 0
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.initial = fn(self.initial)
        self.start = None if self.start is None else fn(self.start)
        self.count = self.count.to(self.initial.device)
        return self


class _Mix(torch.autograd.Function):
    """anchor + active (weight - anchor) / keep: the documented formula, and exact where weight = anchor."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, anchor: Tensor, active: Tensor, layer: _MixedWeight, counted: bool
    ) -> Tensor:
        ctx.save_for_backward(active)
        ctx.layer, ctx.counted = layer, counted
        return torch.addcmul(anchor, weight - anchor, active.to(weight.dtype), value=1.0 / layer.keep)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (active,) = ctx.saved_tensors
        if ctx.counted:
            # not in forward, which checkpointing runs twice
            ctx.layer.count += active
        grad = grads[0] * active
        return grad * ctx.layer.gradient_scale, None, None, None, None


def _mix(weight: Tensor, anchor: Tensor, active: Tensor, layer: _MixedWeight, counted: bool) -> Tensor:
    return cast(Tensor, _Mix.apply(weight, anchor, active, layer, counted))  # type: ignore[no-untyped-call]


class _Stages:
    """Where the optimizer is, stage I or II; the mask of stage II; the hand-over of counts between them."""

    def __init__(
        self, optimizer: MaskedAdamW, policy: TopK, weights: Mapping[str, Tensor], fidelity: Fidelity
    ) -> None:
        self.clock = 0  # the optimizer's, as it was when this object last heard of it
        self._optimizer, self._policy = optimizer, policy
        self._keeps_start = fidelity == "release" and not policy.trains_everything
        self._layers: dict[str, _MixedWeight] = {}
        self._hooks: list[RemovableHandle] = []
        names = {
            id(p): (name, (number, position))
            for number, group in enumerate(optimizer.param_groups)
            for position, (name, p) in enumerate(zip(group["param_names"], group["params"], strict=True))
        }
        # by place, which survives a replaced parameter object
        self._names = {name: names[id(weight)] for name, weight in weights.items()}

    def __deepcopy__(self, memo: dict[int, Any]) -> _Stages:
        # a copied model, such as a moving average, can be evaluated; to train it would need an optimizer
        return self

    def attach(self, layers: Mapping[str, _MixedWeight]) -> None:
        """Listen to the optimizer."""
        self._layers = dict(layers)
        self._hooks = [
            self._optimizer.register_step_pre_hook(self._before_step),
            self._optimizer.register_step_post_hook(self._after_step),
        ]

    def detach(self) -> None:
        """Stop listening."""
        for hook in self._hooks:
            hook.remove()

    def second(self, layer: _MixedWeight) -> bool:
        """Whether stage II is on."""
        if self._layers[layer.name] is not layer:
            raise RuntimeError(
                f"a model under mix_weights() must train as itself, got a copy of {layer.name!r}; "
                "call eval() on the copy, or copy before mix_weights()."
            )
        self._check_clock()
        return bool(self._optimizer.param_groups[0]["phase"] % 2)

    def mask(self, weight: Tensor) -> Tensor:
        """What the next update trains, [out, in] bool."""
        return self._optimizer.mask(weight, upcoming=True)

    def _check_clock(self) -> None:
        clock = self._optimizer.param_groups[0]["clock"]
        if clock != self.clock:
            raise RuntimeError(
                f"the handle of mix_weights() must be at the optimizer's step {clock}, got {self.clock}; "
                "give handle.load_state_dict() what was saved together with the optimizer."
            )

    def _before_step(
        self, optimizer: object, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        del optimizer
        self._check_clock()
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._hand_over()
            return None

        def counted_closure() -> Any:
            loss = closure()
            self._hand_over()
            return loss

        return (args[0], counted_closure), {}

    def _hand_over(self) -> None:
        """Give the optimizer the counts, if the coming step selects."""
        now, after = (self._policy.schedule.phase(clock) for clock in (self.clock, self.clock + 1))
        if self._policy.trains_everything or now % 2 == 1 or after % 2 == 0:
            return
        counts = [layer.count for layer in self._layers.values()]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            together = torch.cat(counts)
            torch.distributed.all_reduce(together)
            together /= torch.distributed.get_world_size()
            counts = list(torch.split(together, [count.numel() for count in counts]))
        for name, count in zip(self._layers, counts, strict=True):
            # without a backward pass there is nothing to rank either
            if count.any():
                self._optimizer.set_count(self._names[name][0], count)

    def _after_step(self, optimizer: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del optimizer, args, kwargs
        groups, before = self._optimizer.param_groups, self._policy.schedule.phase(self.clock)
        self.clock = groups[0]["clock"]
        phase = groups[0]["phase"]
        if phase == before:
            return
        for name, layer in self._layers.items():
            if phase % 2 == 0:
                layer.count.zero_()
                layer.start = None
            elif self._keeps_start:
                number, position = self._names[name][1]
                layer.start = groups[number]["params"][position].detach().clone()


def _check_fidelity(fidelity: object) -> None:
    if fidelity not in ("paper", "release"):
        raise ValueError(
            f"fidelity must be 'paper' or 'release', got {fidelity!r}; 'release' is the authors' code."
        )


def _check_optimizer(optimizer: object, fidelity: Fidelity) -> TopK:
    """Its policy, if it is that of DPS Mix."""
    if not isinstance(optimizer, MaskedAdamW):
        raise TypeError(
            f"optimizer must be a DPSAdamW(variant='mix'), got {type(optimizer).__name__}; "
            "pass the optimizer itself, not a wrapper, or use mixout() with any optimizer."
        )
    policy = optimizer.policy
    if (
        not isinstance(policy, TopK)
        or not policy.statistic.counts
        or policy.schedule.train is None
        or policy.schedule.meanwhile != "everything"
    ):
        raise ValueError(
            f"optimizer must be a DPSAdamW(variant='mix'), got policy={policy!r}; "
            "construct it with variant='mix', or use mixout() with any optimizer."
        )
    if fidelity == "paper" and optimizer.unselected == "zero_grad":
        raise ValueError(
            "optimizer must hold unselected weights still when fidelity='paper', got unselected='zero_grad'; "
            "give mix_weights() fidelity='release', or the optimizer 'paper'."
        )
    if not all("param_names" in group for group in optimizer.param_groups):
        raise ValueError(
            "optimizer must know the names of its parameters, got unnamed ones; "
            "build it from param_groups(model, method='dps') or model.named_parameters()."
        )
    return policy


def _choose(
    model: nn.Module, patterns: Iterable[str] | None, wanted: Callable[[Tensor], bool], what: str
) -> dict[str, nn.Linear]:
    """The linear layers to mix, by the names of their weights: plain ones that belong to one layer only."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if patterns is None:
        chosen = {name: linear for name, linear in linears.items() if wanted(_raw_weight(linear))}
    else:
        chosen = _find(linears, patterns)
    if not chosen:
        raise ValueError(
            f"modules must be nn.Linear layers whose weights {what}, got none in {type(model).__name__}; "
            "other kinds of layers cannot be mixed."
        )
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    for name, linear in chosen.items():
        if parametrize.is_parametrized(linear, "weight"):
            raise ValueError(
                f"modules must have plain weights, got {name!r}, which is parametrized already; "
                "remove that first, or leave the layer out with modules=."
            )
        shared = owners.get(id(linear.weight), [])
        if len(shared) > 1:
            raise ValueError(
                f"modules must not share weights, got {' and '.join(map(repr, shared))}, which do; "
                "untie them, or leave the layer out with modules=."
            )
        if not wanted(linear.weight):
            raise ValueError(
                f"modules must be nn.Linear layers whose weights {what}, got {name!r}; "
                "leave the layer out with modules=."
            )
    return {f"{name}.weight" if name else "weight": linear for name, linear in chosen.items()}


def _find(linears: Mapping[str, nn.Linear], patterns: Iterable[str]) -> dict[str, nn.Linear]:
    if isinstance(patterns, str):
        raise TypeError(f"modules must be a list of patterns, got {patterns!r}; write [{patterns!r}].")
    found: set[str] = set()
    for pattern in patterns:
        try:
            names = {name for name in linears if re.search(pattern, name)}
        except re.error as error:
            raise ValueError(
                f"modules must be regular expressions, got {pattern!r} ({error}); escape special characters."
            ) from error
        if not names:
            raise ValueError(
                f"modules must each find an nn.Linear layer, got {pattern!r}, which finds none of "
                f"{len(linears)}; patterns are searched in the names of model.named_modules()."
            )
        found |= names
    return {name: linear for name, linear in linears.items() if name in found}


def _raw_weight(linear: nn.Linear) -> Tensor:
    # a parametrized weight is computed when it is read, perhaps at random
    if parametrize.is_parametrized(linear, "weight"):
        original = cast(nn.ModuleDict, linear.parametrizations)["weight"]
        return next(original.parameters(recurse=False), torch.empty(0))
    return linear.weight
