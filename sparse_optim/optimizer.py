"""`MaskedAdamW`: AdamW that trains the entries a policy selects. Validation, clock and state; no arithmetic.

p.grad --accumulate_--> statistic --score--> policy --histogram, compact--> mask --adamw_--> p, exp_avg,
exp_avg_sq
"""

from __future__ import annotations

import functools
import itertools
import sys
import warnings
import weakref
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import ParamsT

from . import backends
from .backends.reference import (
    CONTROL_DRAWS,
    FIRST_WIDTH,
    MASK_DRAWS,
    STATISTIC_ROUNDING_DRAWS,
    WEIGHT_ROUNDING_DRAWS,
    Draws,
    purpose_draw,
    seeded_mask,
    unpack_bits,
    whole,
)
from .gradient_release import GradientRelease, Waiting, form_of, released_of
from .masks import EVERYTHING, NOTHING, Bits, Indexed, Mask, Seeded
from .policies import Bernoulli, GradualUnfreezing, Policy, TopK, layer_of
from .state import (
    CLOCK,
    SurvivingOptimizer,
    clean_name,
    compact_dtype,
    is_dtensor,
    local,
    make_master,
    match_dtype,
    step_dtype,
)

if TYPE_CHECKING:
    from .deltas import Delta
    from .integrations.distributed import Shards

Unselected = Literal["frozen", "zero_grad", "track"]
_UNSELECTED = ("frozen", "zero_grad", "track")


class _Call(NamedTuple):
    """Parameters of one bucket whose masks are of one kind, so that one call of a verb updates them."""

    places: list[int]  # in the bucket
    params: list[Tensor]
    kind: type[Mask]
    mask_keys: list[int]  # of drawn masks
    rounding_keys: list[int]
    sizes: list[int]  # of each state, in keys


class _Bucket(NamedTuple):
    """Parameters of one group, device and dtype, and their gradients."""

    group: dict[str, Any]
    backend: ModuleType
    params: list[Tensor]
    grads: list[Tensor]
    form: str  # of the gradients, see `form_of`
    calls: dict[tuple[bool, int], list[_Call]]  # by what decides about masks; filled when first asked for


class _Plan(NamedTuple):
    """How parameters fall into buckets: worked out once, for as long as `signature` stays the same.

    It holds no gradient and no state, which others may free, replace or move between steps.
    """

    signature: tuple[object, ...]
    # the group's number, places among all parameters, and the bucket but for its group and gradients
    buckets: list[tuple[int, list[int], _Bucket]]


class MaskedAdamW(SurvivingOptimizer):
    r"""AdamW on the entries that a policy selects; a drop-in for `torch.optim.AdamW`, which `policy=None` is.

    At each step the policy gives a mask :math:`M_t`, and selected entries take the update of AdamW. What
    happens to the others is said by `unselected`:

    | value | their weights | their moments | weight decay on them | moments stored |
    | --- | --- | --- | --- | --- |
    | `"frozen"` | bit-identical, always | untouched | none | `[nnz]` for a list, else as below |
    | `"zero_grad"` | moved by momentum and decay | take a zero gradient | yes | parameter-shaped |
    | `"track"` | bit-identical | take the full gradient | none | parameter-shaped |

    A `TopK` policy whose observing steps train nothing keeps compact moments under `"frozen"`, and a float32
    master of every selected entry of a bfloat16 or float16 parameter. Under `Bernoulli` with `"frozen"` an
    entry's first updates can be larger than AdamW's (typically 0.5 to 1/sqrt(keep) times), since one step
    count serves the whole tensor.

    Args:
        params: parameters, `model.named_parameters()`, or groups as in torch. Names make masks independent of
            the order of parameters. A group may override numbers, and set `masked=False`: its parameters
            train densely, except while a schedule trains nothing.
        lr, betas, eps, weight_decay, amsgrad, maximize: as in `torch.optim.AdamW`.
        policy: `Bernoulli(...)`, `TopK(...)`, or None for every entry. One per optimizer.
        unselected: "frozen", "zero_grad" or "track".
        seed: of every random mask, in [0, 2**63).
        backend: "auto", "reference", "native" or "triton".
        state_dtype: torch.float64, float32 or bfloat16 for parameter-shaped moments; None follows the
            parameter, as torch does.
        stochastic_rounding: round bfloat16 parameters with parameter-shaped moments stochastically.
        release_gradients: keep of each gradient the selected entries only, as soon as the backward pass has
            made it: 4 bytes per selected entry instead of one dense gradient per parameter. For a `TopK`
            policy with compact moments. `optimizer.gradient_release` is the handle; `p.grad` then is a
            `ReleasedGradient`.
        max_grad_norm: scale the gradients down so that the norm of the *selected* entries is at most this.
        observe_unit: "step": a statistic sees the gradient that `step()` sees, the sum over micro-batches.
            "microbatch" (with `release_gradients` only): it sees each micro-batch on its own, so that no
            gradient has to wait; for squares that is another statistic.
        statistic_dtype: torch.bfloat16 halves a statistic, which is then rounded stochastically; None is
            float32.
        statistic_device: "cpu" keeps statistics in the host's memory, and selects there; None: where the
            parameter is.
        foreach, fused: for compatibility. `foreach` and `fused=False` run the reference backend, `fused=True`
            demands an accelerated one, counts steps on the device, and takes what a `GradScaler` finds there,
            without waiting for it once steps repeat (as for `capturable`).
        capturable: count everything on the device, so that a CUDA graph can capture steps. Within one phase
            only: dense, `Bernoulli` with `every=1`, or a `TopK` whose schedule has observed for the last
            time; random masks are drawn anew at each replay.
        differentiable: run the reference backend under autograd.

    Raises:
        ValueError, TypeError: for bad values and types, before anything is changed.
        RuntimeError: for a backend that is missing, sparse gradients, and a step that has nothing to select
            from.
        NotImplementedError: for what is not available yet.

    State: per parameter `step`, `exp_avg`, `exp_avg_sq` (and `max_exp_avg_sq`) as in torch, plus where needed
    `indices` or `bits` (the mask), `master`, `age`, `statistic`, `nonfinite`, `count`, `curvature`, `key`.

    Example:
        >>> import torch
        >>> from sparse_optim import MaskedAdamW, Schedule, TopK
        >>> model = torch.nn.Linear(10, 10)
        >>> optimizer = MaskedAdamW(
        ...     model.named_parameters(), lr=1e-2, policy=TopK(density=0.1, schedule=Schedule(observe=2))
        ... )
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(4, 10)).square().sum().backward()
        ...     optimizer.step()
        >>> round(optimizer.density() * 110)
        11

    References:
        Loshchilov and Hutter, Decoupled Weight Decay Regularization, ICLR 2019.
    """

    _configuration = (
        "policy",
        "unselected",
        "backend",
        "state_dtype",
        "stochastic_rounding",
        "max_grad_norm",
        "release_gradients",
        "observe_unit",
        "statistic_dtype",
        "statistic_device",
        "dense_state_dict",
    )
    gradient_release: GradientRelease | None
    # whether the state holds names alone
    _shows: bool = False
    # whether devices may have counted what the host has not
    _replayed: bool = False
    _waiting: Waiting | None = None
    _depths: dict[str, int] | None = None
    _keys_checked: bool = False
    _plan: _Plan | None = None
    _in_graphs: int = -1
    # what was known when it was looked for, and what was found
    _group_of: tuple[list[list[Tensor]], dict[Tensor, dict[str, Any]]] | None = None
    _sharding: tuple[list[list[Tensor]], Shards] | None = None

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        policy: Policy | None = None,
        unselected: Unselected = "frozen",
        seed: int = 0,
        backend: str = "auto",
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        release_gradients: bool = False,
        max_grad_norm: float | None = None,
        observe_unit: Literal["step", "microbatch"] = "step",
        statistic_dtype: torch.dtype | None = None,
        statistic_device: str | torch.device | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        betas = _check_hyperparameters(lr, betas, eps, weight_decay, foreach=foreach, capturable=capturable)
        backends.check(backend, fused=fused, foreach=foreach, differentiable=differentiable)
        if policy is not None and not isinstance(policy, Policy):
            raise TypeError(
                f"policy must be a Bernoulli, TopK, GradualUnfreezing or None, got {policy!r}; pass an "
                "instance."
            )
        if unselected not in _UNSELECTED:
            raise ValueError(
                f"unselected must be one of {', '.join(map(repr, _UNSELECTED))}, got {unselected!r}; "
                "choose what happens to the other entries."
            )
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 63:
            raise ValueError(
                f"seed must be an integer in [0, 2**63), got {seed!r}; use any number in that range."
            )
        if state_dtype not in (None, torch.float64, torch.float32, torch.bfloat16):
            raise ValueError(
                f"state_dtype must be torch.float64, float32, bfloat16 or None, got {state_dtype!r}; "
                "squares of gradients vanish in dtypes with fewer exponents."
            )
        if max_grad_norm is not None and not (isinstance(max_grad_norm, int | float) and max_grad_norm > 0):
            raise ValueError(
                f"max_grad_norm must be positive, got {max_grad_norm!r}; use None for no clipping."
            )
        if isinstance(policy, Bernoulli) and policy.rescale and unselected == "track":
            raise ValueError(
                "rescale must be False when unselected='track', got True; the moments take the full gradient "
                "there."
            )
        if isinstance(policy, GradualUnfreezing) and unselected != "frozen":
            raise ValueError(
                f"unselected must be 'frozen' under GradualUnfreezing, got {unselected!r}; its layers start "
                "untouched."
            )
        alone = policy is None or (isinstance(policy, TopK) and policy.scope == "tensor")
        if not alone and _is_partitioned():
            raise ValueError(
                "under ZeroRedundancyOptimizer, which gives each process some of the parameters and no "
                f"names, policy must be None or TopK(scope='tensor'), got {policy!r}; use fully_shard() or "
                "DistributedDataParallel."
            )
        self.policy = policy
        self.unselected = unselected
        self.backend = backend
        self.state_dtype = state_dtype
        self.stochastic_rounding = stochastic_rounding
        self.max_grad_norm = max_grad_norm
        self.release_gradients = release_gradients
        self.observe_unit = observe_unit
        self.statistic_dtype = statistic_dtype
        self.statistic_device = None if statistic_device is None else torch.device(statistic_device)
        self.dense_state_dict = False
        self._check_memory_options(differentiable)
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": True,
            "masked": True,
            "masking": self._masking(),
            **dict.fromkeys(CLOCK, 0),
            "seed": seed,
        }
        self._clocks = {}
        # a wrapper that only pretends to be this class, Lightning's for one, must not find that of the class
        self.gradient_release = None
        super().__init__(params, defaults)
        self._watch_gradients()
        self._enter_graphs()

    def _check_memory_options(self, differentiable: bool) -> None:
        policy = self._selecting_policy
        if self.release_gradients and (policy is None or not self._compact or differentiable):
            raise ValueError(
                "release_gradients=True needs a TopK policy below density 1 with unselected='frozen', "
                "Schedule(meanwhile='nothing') and differentiable=False, got "
                f"{self._masking()}; other ways to train need whole gradients in step()."
            )
        if self.observe_unit not in ("step", "microbatch") or (
            self.observe_unit == "microbatch" and not self.release_gradients
        ):
            raise ValueError(
                "observe_unit must be 'step', or 'microbatch' with release_gradients=True, got "
                f"{self.observe_unit!r}; without release, observe each micro-batch with "
                "Schedule(observe=None)."
            )
        if self.statistic_dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(
                "statistic_dtype must be torch.float32, torch.bfloat16 or None, got "
                f"{self.statistic_dtype!r}; torch.bfloat16 is the smallest."
            )
        if self.statistic_device is not None and self.statistic_device.type != "cpu":
            raise ValueError(
                f"statistic_device must be 'cpu' or None, got {str(self.statistic_device)!r}; None keeps a "
                "statistic where its parameter is."
            )
        bounded = self.statistic_dtype == torch.bfloat16 or self.statistic_device is not None
        if bounded and (policy is None or not policy.statistic.is_its_own_score):
            raise ValueError(
                "statistic_dtype and statistic_device need a TopK policy whose score is its statistic, such "
                f"as SquaredGradient() or SignedGradient(), got policy={self.policy!r}; leave them None."
            )

    # the step

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Perform one optimization step. Parameters without a gradient are skipped.

        Args:
            closure: reevaluates the model and returns the loss, which `step` then returns.
        """
        if torch.compiler.is_compiling():
            # a graph has no place for gradients of our own kind, and a differentiable step is no operator
            plain = self.gradient_release is None and not self._is_sharded
            if not self.defaults["differentiable"] and plain:
                return self._step_in_graph(closure)
        else:
            # refuses a graph that captures a step which counts on the host; the name depends on torch's
            # version
            check = getattr(self, "_accelerator_graph_capture_health_check", None)
            (check or self._cuda_graph_capture_health_check)()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            self._step()
        return loss

    def _step_in_graph(self, closure: Callable[[], float] | None) -> float | None:
        """What torch.compile sees of a step: one operator, which takes this very step when it runs.

        So nothing that changes from step to step is compiled in, a learning rate for one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # not those of the last step, of which somebody may have replaced some
        once = list(dict.fromkeys(p for params in self._lists for p in params))
        places = [i for i, p in enumerate(once) if p.grad is not None]
        params = [once[i] for i in places]
        # not under no_grad, which a graph that raises would not switch off again: the operator sees to it
        torch.ops.sparse_optim.step_(params, [p.grad for p in params], places, self._in_graphs)
        return loss

    @torch.no_grad()
    def _step_on(self, values: list[Tensor], grads: list[Tensor], places: list[int]) -> None:
        """A step on the parameters at these places, whose values and gradients are in a compiled graph."""
        groups = [group["params"] for group in self.param_groups]
        if list(map(id, groups)) != list(map(id, self._lists)):
            self._follow_swapped_parameters()
            self._remember_parameters()
            raise RuntimeError(
                "a compiled step must know its parameters, got groups whose lists were replaced since the "
                "last step; call it again."
            )
        self._follow_swapped_parameters()
        params = [self._once[i] for i in places]
        kept = [p.grad for p in self._once]
        try:
            for p in self._once:
                p.grad = None
            for p, value, grad in zip(params, values, grads, strict=True):
                p.grad = grad
                if value.data_ptr() != p.data_ptr():
                    # the graph works on a copy, and stores it in the parameter at its end
                    p.copy_(value)
            self._step()
            for p, value in zip(params, values, strict=True):
                if value.data_ptr() != p.data_ptr():
                    value.copy_(p)
            # what schedulers look at, whose wrapper of `step` a compiled one goes around
            self._opt_called = True
        finally:
            for p, former in zip(self._once, kept, strict=True):
                p.grad = former

    @_disable_dynamo
    def _step(self) -> None:
        self._finish_waiting()
        if self.gradient_release is not None:
            self._watch_gradients()
            self.gradient_release.settle()
            self.gradient_release.check()
        buckets = self._buckets()
        if buckets and self._is_capturing:
            self._check_capture(buckets)
        if not buckets or self._is_only_for_show(buckets):
            return
        self._require_new_epoch()
        found_inf = self._unscale(buckets)
        if found_inf is not None and not self._repeats:
            # what comes next depends on whether this step counts
            if found_inf.item():
                return
            found_inf = None
        policy, selected, spoiled = self._selecting_policy, None, ""
        observing = policy is not None and self._number("phase") % 2 == 0
        if policy is not None and observing and policy.schedule.observe is None:
            self.select()
            # what was selected has changed the calls that update
            buckets = self._buckets()
            observing = False
        if policy is not None and observing:
            masked = [bucket for bucket in buckets if bucket.group["masked"]]
            if policy.schedule.phase(self._number("clock") + 1) % 2 == 1:
                # found before and applied after the update: an error leaves the weights alone
                if self.gradient_release is not None and self.gradient_release.is_shared and self._folds:
                    self.gradient_release.share_statistics(self.state, self._statistics)
                observed = self._observed(masked)
                selected, spoiled = self._selection(observed, self._accumulate(masked, observed))
            elif not self._accumulates_in_update:
                self._accumulate(masked)
        if not observing or self._trains_while_observing:
            accumulating = observing and selected is None and self._accumulates_in_update
            self._update(buckets, observing, found_inf, accumulating=accumulating)
        if selected is not None:
            self._apply_selection(selected)
        self._advance(found_inf)
        if spoiled:
            warnings.warn(spoiled, stacklevel=6)

    def _unscale(self, buckets: list[_Bucket]) -> Tensor | None:
        """Divide gradients by the scale of a `GradScaler` that leaves it to us, as its `unscale_` does.

        Returns what it found: 0-dim, not zero where the step must not count.
        """
        scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if scale is not None:
            factor = scale.double().reciprocal().float()
            for bucket in buckets:
                device = bucket.params[0].device
                ignored = torch.zeros((), device=device)
                torch._amp_foreach_non_finite_check_and_unscale_(
                    bucket.grads, ignored, factor.to(device, non_blocking=True)
                )
        return found_inf

    @property
    def _is_capturing(self) -> bool:
        return self._counts_there and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()

    def _check_capture(self, buckets: list[_Bucket]) -> None:
        """Refuse to capture what a replay would not repeat."""
        if not self._repeats:
            raise RuntimeError(
                "a captured step must be of a phase that stays (dense, Bernoulli with every=1, or TopK after "
                f"the last selection), got {self._masking()} in phase {self._number('phase')}; step outside "
                "of the capture until then."
            )
        if self.gradient_release is not None:
            raise RuntimeError(
                "a captured step needs whole gradients, got release_gradients=True; call "
                "optimizer.gradient_release.remove() before the capture."
            )
        for bucket in buckets:
            # what never was observed never trains, and never has state
            fresh = [
                p
                for p in bucket.params
                if not self.state.get(p)
                and self._mask(p, bucket.group, observing=False, draw=0) is not NOTHING
            ]
            if fresh or bucket.params[0].device not in self._clocks:
                raise RuntimeError(
                    f"a captured step needs state that is there, got none for "
                    f"{self._name((fresh or bucket.params)[0])!r}; call step() at least once before the "
                    "capture."
                )
            if bucket.backend is backends.reference:
                raise RuntimeError(
                    "a captured step needs a backend that leaves its numbers on the device, got the "
                    "reference; leave foreach, fused and backend as they are by default."
                )

    def _buckets(self) -> list[_Bucket]:
        """Parameters with gradients, by group, device and dtype. Refuses what cannot be stepped before any
        change.
        """
        self._follow_swapped_parameters()
        params = [p for known in self._known for p in known]
        grads: list[Any] = [p.grad for p in params]
        for p, grad in zip(params, grads, strict=True):
            released = released_of(grad)
            if released is not None and released.kept.release is not self.gradient_release:
                raise RuntimeError(
                    "a gradient must be released for the optimizer that uses it, got that of "
                    f"{self._name(p)!r}, released for another one; call "
                    "gradient_release.remove() of the other optimizer first."
                )
        kinds = [
            None if grad is None else (form_of(grad), p.dtype, p.device, grad.dtype, grad.layout)
            for p, grad in zip(params, grads, strict=True)
        ]
        switches = [(group["masked"], group["amsgrad"]) for group in self.param_groups]
        signature = (self.policy, self.unselected, self.backend, switches, kinds)
        if self._plan is None or self._plan.signature != signature:
            self._plan = _Plan(signature, self._plan_buckets(kinds))
        if self._shards:
            held = self._shards.held
            grads = [None if grad is None else held(p, grad) for p, grad in zip(params, grads, strict=True)]
        return [
            bucket._replace(
                group=self.param_groups[number],
                grads=[grads[i].kept.values if bucket.form == "listed" else grads[i] for i in places],
            )
            for number, places, bucket in self._plan.buckets
        ]

    def _plan_buckets(self, kinds: Sequence[tuple[Any, ...] | None]) -> list[tuple[int, list[int], _Bucket]]:
        buckets: dict[tuple[object, ...], tuple[int, list[int], _Bucket]] = {}
        seen: set[Tensor] = set()
        place = 0
        for number, group in enumerate(self.param_groups):
            for p in group["params"]:
                kind = kinds[place]
                if kind is not None and p not in seen:
                    self._check_gradient(p, group)
                    key = (number, kind)
                    if key not in buckets:
                        bucket = _Bucket({}, self._backend(p.device), [], [], kind[0], {})
                        buckets[key] = (number, [], bucket)
                    _, places, bucket = buckets[key]
                    places.append(place)
                    bucket.params.append(p)
                    seen.add(p)
                place += 1
        if self._uses_keys:
            self._check_keys()
        return list(buckets.values())

    def _is_only_for_show(self, buckets: list[_Bucket]) -> bool:
        """Whether torch.distributed.checkpoint makes this step to see the state: then it counts as none.

        No state yet, every lr 0 and every gradient zero. A policy without statistics gets its moments;
        another the names of all that a checkpoint may bring, until the optimizer is next used. From then on
        state dicts are dense.
        """
        if any(isinstance(p, Tensor) for p in self.state) or any(
            bool(g["lr"] != 0) for g in self.param_groups
        ):
            return False
        found = torch.tensor(int(any(bool(grad.any()) for bucket in buckets for grad in bucket.grads)))
        if self._shards:
            found = self._shards.add_up(found)
        if found:
            return False
        self._shows = self._selecting_policy is not None
        self.dense_state_dict = True
        for bucket in buckets:
            for p in bucket.params:
                state = self._start(p, NOTHING if self._shows else EVERYTHING, bucket.group["amsgrad"])
                if self._shows:
                    state.update(dict.fromkeys(self._dense_state(p).keys() - state.keys()))
        return True

    def _follow_swapped_parameters(self) -> None:
        if self._shows:
            self._shows = False
            for p in [p for p in self.state if isinstance(p, Tensor)]:
                del self.state[p]
        super()._follow_swapped_parameters()

    def _require_new_epoch(self) -> None:
        if self._waits_for_epoch:
            raise RuntimeError(
                "every='epoch' needs optimizer.new_epoch() at the start of every epoch, the first included, "
                "got no call; call it, or give every= a number of steps."
            )

    def _accumulate(self, buckets: list[_Bucket], observed: Sequence[Tensor] = ()) -> Tensor | None:
        """p.grad --accumulate_--> statistic.

        Returns what the first round of a selection among the `observed` counts, row by row in their order,
        where these gradients complete all of their scores; else None.
        """
        assert isinstance(self.policy, TopK)
        statistic, per_tensor = self.policy.statistic, self.policy.scope == "tensor"
        # what is folded was added when it arrived
        buckets = [bucket for bucket in buckets if bucket.form == "whole"]
        columns = [self._statistics(bucket.params)[0] for bucket in buckets]
        arriving = [p for bucket in buckets for p in bucket.params]
        counts = None
        rides = (
            statistic.is_accumulated
            and statistic.is_its_own_score
            and self.statistic_device is None
            # a selection that fails is made again from gradients that were added up and dropped
            and self.gradient_release is None
            # copies of an entry are counted once
            and not self._shards
        )
        if rides and observed and len(arriving) == len(observed):
            kinds = {(t.device, t.dtype) for statistics in columns for t in statistics}
            device, dtype = kinds.pop()
            if not kinds and dtype in (torch.float32, torch.bfloat16):
                rows = len(arriving) if per_tensor else 1
                counts = torch.zeros(rows, 1 << FIRST_WIDTH, dtype=torch.int64, device=device)
        row = 0
        for bucket in buckets:
            more = row + len(bucket.params)
            own = counts[row:more] if per_tensor and counts is not None else counts
            self._add_up(bucket.params, bucket.grads, own)
            row = more
            self._finish_waiting()
            if self.gradient_release is not None and observed:
                # selecting needs memory too
                for p in bucket.params:
                    self.gradient_release.dropped(p)
        if counts is not None and per_tensor:
            rows_of = {p: row for row, p in enumerate(arriving)}
            counts = counts[[rows_of[p] for p in observed]]
        return counts

    @torch.no_grad()
    def _add_up(self, params: list[Tensor], grads: list[Tensor], counts: Tensor | None = None) -> None:
        """Gradients of one device and dtype --accumulate_--> statistic, and its first counts."""
        assert isinstance(self.policy, TopK)
        if self.statistic_device is not None and grads[0].device != self.statistic_device:
            if self._waiting is None:
                mine = weakref.proxy(self)
                self._waiting = Waiting(lambda p, grad: mine._add_up([p], [grad]))
            for p, grad in zip(params, grads, strict=True):
                self._waiting.put(p, grad)
            return
        statistic, backend = self.policy.statistic, self._backend(grads[0].device)
        statistics, nonfinite = self._statistics(params)
        parts: list[tuple[list[int], dict[str, Any]]] = [(list(range(len(params))), {})]
        if self.statistic_dtype == torch.bfloat16:
            parts = self._rounded_parts(params)
        for places, rounding in parts:
            some = [[column[i] for i in places] for column in (statistics, grads, nonfinite)]
            if counts is None:
                verbs: Any = _Rounding(backend, rounding) if rounding else backend
                statistic.update(some[0], some[1], some[2], verbs)
            else:
                per_tensor = self.policy.scope == "tensor"
                own = counts[places] if per_tensor else counts
                backend.accumulate_(
                    *some, kind=statistic.accumulates, grad_scales=statistic.grad_scales(some[1]),
                    first_counts=own, absolute=statistic.absolute, **rounding,
                )  # fmt: skip
                if per_tensor:
                    counts[places] = own

    def _rounded_parts(self, params: list[Tensor]) -> list[tuple[list[int], dict[str, Any]]]:
        """Parameters by how often their statistic has been rounded, which numbers its random words."""
        by_number: dict[int, list[int]] = {}
        for i, p in enumerate(params):
            state = self.state[p]
            state["roundings"] = int(state.get("roundings", 0)) + 1
            by_number.setdefault(state["roundings"], []).append(i)
        seed = self._number("seed")
        parts: list[tuple[list[int], dict[str, Any]]] = []
        for number, places in by_number.items():
            keys = [self._tensor_key(params[i]) for i in places]
            draws = Draws(seed, purpose_draw(STATISTIC_ROUNDING_DRAWS, number % (1 << 28)), 0, keys)
            geometries = self._geometries([params[i] for i in places])
            parts.append((places, {"rounding": draws, "geometries": geometries}))
        return parts

    def _statistics(self, params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The statistics of parameters and their flags for non-finite gradients, begun where there are
        none.
        """
        if self._shows:
            self._follow_swapped_parameters()
        assert isinstance(self.policy, TopK)
        statistic, states = self.policy.statistic, [self.state[p] for p in params]
        if self._is_sharded and statistic.grad_scales([]) is not None:
            raise NotImplementedError(
                f"{statistic!r} needs whole gradients in this version, got DTensors; use a statistic without "
                "clip_norm, as with fidelity='paper'."
            )
        for p, state in zip(params, states, strict=True):
            if "statistic" not in state:
                home = p.device if self.statistic_device is None else self.statistic_device
                dtype = self.statistic_dtype
                if statistic.begins_at_zero:
                    fresh = torch.zeros(local(p).shape, dtype=dtype or torch.float32, device=home)
                elif is_dtensor(p):
                    raise NotImplementedError(
                        f"{type(statistic).__name__} must start from a whole tensor in this version, got a "
                        f"DTensor for {self._name(p)!r}; use SquaredGradient() or SignedGradient()."
                    )
                else:
                    fresh = statistic.init(p, seed=self._number("seed"), key=self._tensor_key(p))
                    if fresh.device != p.device:
                        raise ValueError(
                            f"init of {type(statistic).__name__} must make a tensor on {p.device}, where "
                            f"{self._name(p)!r} is, got one on {fresh.device}; make it with "
                            "device=param.device."
                        )
                    fresh = fresh.to(home, dtype or fresh.dtype)
                self._start(p)
                state["statistic"] = fresh
                state["nonfinite"] = torch.zeros((), dtype=torch.bool, device=home)
        return [state["statistic"] for state in states], [state["nonfinite"] for state in states]

    def _observed(self, buckets: Sequence[_Bucket] = ()) -> list[Tensor]:
        """Every parameter that was observed, or is about to be, in the order that breaks ties.

        Refuses what no selection can come of, before a gradient is counted: the step can then be made again.
        What only the counts tell, too few finite scores or a k of 0, no further gradient would mend.
        """
        assert isinstance(self.policy, TopK)
        arriving = {p for bucket in buckets for p in bucket.params}
        observed = [p for p in self._all_names() if p in arriving or "statistic" in self.state.get(p, {})]
        if not observed:
            explicit = self.policy.schedule.observe is None
            remedy = (
                "call optimizer.observe() after a backward pass first" if explicit else "give them gradients"
            )
            raise RuntimeError(
                "step() has nothing to select from: no gradient of a masked parameter was observed; "
                f"{remedy}."
            )
        statistic = self.policy.statistic
        missing = [
            p for p in observed if statistic.needs_curvature and "curvature" not in self.state.get(p, {})
        ]
        if missing:
            raise RuntimeError(
                f"{type(statistic).__name__} needs the curvature of every observed parameter, got none for "
                f"{self._name(missing[0])!r}; call optimizer.observe_curvature(loss) while observing."
            )
        return observed

    def _selection(
        self, observed: list[Tensor], first_counts: Tensor | None = None
    ) -> tuple[dict[Tensor, Mask], str]:
        """statistic --score--> policy --histogram, compact--> mask, for every parameter that was observed.

        Also returns what there is to warn of once everything is done.
        """
        assert isinstance(self.policy, TopK)
        statistic = self.policy.statistic
        scores = [statistic.score(self.state[p]["statistic"], self.state[p]) for p in observed]
        masks = self.policy.select(
            scores,
            self._backend(scores[0].device),
            as_bits=not self._compact,
            first_counts=first_counts,
            geometries=self._geometries(observed),
            **self._among_ranks(observed),
        )
        raised = torch.stack([self.state[p]["nonfinite"].to(observed[0].device) for p in observed]).int()
        flags = (self._shards.add_up(raised) if self._shards else raised).tolist()
        spoiled = [p for p, flag in zip(observed, flags, strict=True) if flag]
        warning = ""
        if spoiled:
            warning = (
                f"{len(spoiled)} of {len(observed)} observed parameters had non-finite gradient entries, "
                f"which counted as zero; the first is {self._name(spoiled[0])!r}."
            )
        selected = {p: _moved(mask, p.device) for p, mask in zip(observed, masks, strict=True)}
        warning = warning or self._idle_group(selected)
        return selected, warning

    def _idle_group(self, selected: Mapping[Tensor, Mask]) -> str:
        """What there is to say of a group in which nothing was selected."""
        groups = [[p for p in group["params"] if p in selected and p.numel()] for group in self.param_groups]
        idle = torch.tensor([not any(_selects(selected[p]) for p in group) for group in groups])
        if self._shards:
            idle = self._shards.add_up(1 - idle.int()) == 0
        for number, (group, is_idle) in enumerate(zip(groups, idle.tolist(), strict=True)):
            if group and is_idle:
                return (
                    f"nothing was selected in parameter group {number} ({len(group)} parameters, "
                    f"{self._name(group[0])!r} the first), which does not train now; raise density, or "
                    "give the group masked=False to train it densely."
                )
        return ""

    def _apply_selection(self, masks: Mapping[Tensor, Mask]) -> None:
        """Store new masks, carry compact state over to them, and drop the statistics.

        Everything is made before anything is stored: an error, memory that runs out for one, leaves all as
        it was.
        """
        new: dict[Tensor, dict[str, Any]] = {}
        for p, state in self.state.items():
            # not observed this time: nothing of it is selected any more (users may keep notes under other
            # keys)
            mask = masks.get(p) if isinstance(p, Tensor) else None
            if isinstance(mask, Bits):
                new[p] = {"bits": mask.bits}
            elif isinstance(mask, Indexed):
                new[p] = {"indices": mask.indices}
            elif isinstance(p, Tensor) and "bits" in state:
                new[p] = {"bits": torch.zeros_like(state["bits"])}
            elif isinstance(p, Tensor) and "indices" in state:
                new[p] = {"indices": state["indices"][:0]}
        self._remap([p for p in new if "indices" in new[p] and "exp_avg" in self.state[p]], new)
        self._plan = None
        for p, changed in new.items():
            state = self.state[p]
            state.update(changed)
            if p in masks:
                for key in ("statistic", "nonfinite", "count", "curvature"):
                    state.pop(key, None)

    def _remap(self, params: list[Tensor], new: dict[Tensor, dict[str, Any]]) -> None:
        """Add to the new lists the compact state that goes with them."""
        for device in dict.fromkeys(p.device for p in params):
            here = [p for p in params if p.device == device]
            states = []
            for p in here:
                state = self.state[p]
                age = state.get("age")
                if age is None:
                    age = torch.full_like(state["indices"], int(state["step"]), dtype=torch.int32)
                states.append(state | {"age": age})
            names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master", "age")
            compact = [[name for name in names if name in state] for state in states]
            carried = self._backend(device).remap_(
                [state["indices"] for state in states],
                [new[p]["indices"] for p in here],
                [[state[key] for key in keys] for state, keys in zip(states, compact, strict=True)],
            )
            for p, keys, values in zip(here, compact, carried, strict=True):
                new[p].update(zip(keys, values, strict=True))

    def _update(
        self, buckets: list[_Bucket], observing: bool, found_inf: Tensor | None, *, accumulating: bool
    ) -> None:
        """mask --adamw_--> p, exp_avg, exp_avg_sq: one call per bucket and kind of mask. `accumulating`, the
        same calls do p.grad --accumulate_--> statistic.
        """
        if self._counts_there and self._repeats:
            self._start_clocks(bucket.params[0].device for bucket in buckets)
        verbs = [
            self._verb(bucket, call, states, accumulating and bucket.group["masked"])
            for bucket in buckets
            for call, states in self._calls(bucket, observing)
        ]
        grad_scale = self._clip([norm for _, norm in verbs]) if self.max_grad_norm is not None else None
        for update, _ in verbs:
            update(grad_scale, found_inf)

    def _calls(self, bucket: _Bucket, observing: bool) -> list[tuple[_Call, list[dict[str, Any]]]]:
        """A bucket by kinds of masks, with the states of its parameters, which have what an update needs."""
        draw = self._draw()
        key = (observing, draw if isinstance(self.policy, GradualUnfreezing) else 0)
        known = bucket.calls.get(key)
        if known is not None:
            pairs = [(call, [self.state[p] for p in call.params]) for call in known]
            # a selection or a loaded state ends the plan; what others add or drop shows in the sizes
            if all(list(map(len, states)) == call.sizes for call, states in pairs):
                return pairs
        masks = [self._mask(p, bucket.group, observing=observing, draw=draw) for p in bucket.params]
        # tensors whose entries have ages of their own cannot share a call with those that have one step
        # for all
        kinds = [(type(m), "age" in self.state.get(p, {})) for p, m in zip(bucket.params, masks, strict=True)]
        pairs = []
        for kind in dict.fromkeys(kinds):
            places = [i for i, mask in enumerate(masks) if kinds[i] == kind and mask is not NOTHING]
            if places:
                params = [bucket.params[i] for i in places]
                states = [self._start(bucket.params[i], masks[i], bucket.group["amsgrad"]) for i in places]
                rounded = self.stochastic_rounding and params[0].dtype == torch.bfloat16
                call = _Call(
                    places,
                    params,
                    kind[0],
                    [self._mask_key(p) for p in params] if kind[0] is Seeded else [],
                    [self._tensor_key(p) for p in params] if rounded else [],
                    [len(state) for state in states],
                )
                pairs.append((call, states))
        bucket.calls[key] = [call for call, _ in pairs]
        return pairs

    def _verb(
        self, bucket: _Bucket, call: _Call, states: list[dict[str, Any]], accumulating: bool
    ) -> tuple[Callable[[Tensor | None, Tensor | None], None], Callable[[], Tensor]]:
        """One call that updates, and the squared norm of the gradients that it applies."""
        group, backend = bucket.group, bucket.backend
        params, geometries, mine = call.params, None, list(range(len(call.params)))
        grads = [bucket.grads[i] for i in call.places]
        if self._shards:
            params, geometries = list(map(local, call.params)), self._geometries(call.params)
            # of several copies of the same entries, one counts
            mine = [i for i in mine if self._shards.is_counted(call.params[i])]

        def column(key: str) -> list[Tensor]:
            return [state[key] for state in states] if key in states[0] else []

        moments = [
            column("exp_avg"),
            column("exp_avg_sq"),
            column("max_exp_avg_sq") if group["amsgrad"] else [],
        ]
        if params[0].is_complex():
            grads, params = [torch.view_as_real(g) for g in grads], [torch.view_as_real(p) for p in params]
            moments = [[torch.view_as_real(m) for m in column] for column in moments]
        hyper = {
            "lr": _squeezed(group["lr"]),
            "beta1": group["betas"][0],
            "beta2": group["betas"][1],
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
            "maximize": group["maximize"],
            "differentiable": self.defaults["differentiable"],
        }
        if call.kind is Indexed:
            indices, listed = column("indices"), bucket.form == "listed"

            def update_indexed(grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
                backend.adamw_indexed_(
                    params, grads, indices, *moments, column("master"), column("age"), column("step"),
                    **hyper, grad_scale=_moved_to(params[0], grad_scale), compact_grads=listed,
                    found_inf=_moved_to(params[0], found_inf),
                )  # fmt: skip

            counted = None if listed else [indices[i] for i in mine]
            return update_indexed, lambda: backend.norm([grads[i] for i in mine], indices=counted)
        selection: dict[str, Any] = {}
        observation: dict[str, Any] = {}
        rescale, rounding = 1.0, None
        # numbers that the device counts
        clock = self._clocks.get(params[0].device) if self._repeats else None
        if call.kind is Bits:
            selection = {"bits": column("bits")}
        elif call.kind is Seeded:
            assert isinstance(self.policy, Bernoulli)
            draw = self._draw() if clock is None else 0
            mask = self.policy.mask(self._number("seed"), draw, 0)
            selection = {"seeded": _draws(mask, call.mask_keys)._replace(clock=clock)}
            rescale = 1 / self.policy.keep if self.policy.rescale else 1.0
        if call.rounding_keys:
            number = self._number("clock") if clock is None else 0
            draw = purpose_draw(WEIGHT_ROUNDING_DRAWS, number)
            rounding = Draws(self._number("seed"), draw, 0, call.rounding_keys, clock=clock)
        if accumulating:
            assert isinstance(self.policy, TopK)
            statistic = self.policy.statistic
            statistics, nonfinite = self._statistics(call.params)
            observation = {
                "statistics": statistics,
                "nonfinite": nonfinite,
                "kind": statistic.accumulates,
                "statistic_scales": statistic.grad_scales(grads),
            }

        def update(grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
            backend.adamw_(
                params, grads, *moments, column("step"), **hyper, **selection, **observation,
                grad_scale=_moved_to(params[0], grad_scale), unselected=self.unselected, rescale=rescale,
                rounding=rounding, found_inf=_moved_to(params[0], found_inf), geometries=geometries,
            )  # fmt: skip

        def squared_norm() -> Tensor:
            chosen = dict(selection)
            if "bits" in chosen:
                chosen["bits"] = [chosen["bits"][i] for i in mine]
            if "seeded" in chosen:
                keys = chosen["seeded"].keys
                chosen["seeded"] = chosen["seeded"]._replace(keys=[keys[i] for i in mine])
            places = None if geometries is None else [geometries[i] for i in mine]
            norm: Tensor = backend.norm([grads[i] for i in mine], geometries=places, **chosen)
            return norm * rescale**2

        return update, squared_norm

    def _clip(self, squared_norms: list[Callable[[], Tensor]]) -> Tensor:
        """The factor that brings the norm of everything that is applied down to `max_grad_norm`."""
        assert self.max_grad_norm is not None
        parts = [squared_norm() for squared_norm in squared_norms]
        total = (
            torch.stack([part.to(parts[0].device) for part in parts]).sum().sqrt()
            if parts
            else torch.zeros(())
        )
        if self._shards:
            total = self._shards.add_up(total.square()).sqrt()
        return (self.max_grad_norm / (total + 1e-6)).clamp(max=1.0)

    def _mask(self, p: Tensor, group: dict[str, Any], *, observing: bool, draw: int) -> Mask:
        """What an update trains of one parameter."""
        if self.policy is None or self.policy.trains_everything or not group["masked"]:
            return EVERYTHING
        if isinstance(self.policy, Bernoulli):
            return self.policy.mask(self._number("seed"), draw, self._mask_key(p))
        if isinstance(self.policy, GradualUnfreezing):
            return EVERYTHING if draw >= self._depth(p) else NOTHING
        if observing:
            return EVERYTHING
        state = self.state.get(p, {})
        if "indices" in state:
            return Indexed(state["indices"])
        return Bits(state["bits"]) if "bits" in state else NOTHING

    def _start(self, p: Tensor, mask: Mask = NOTHING, amsgrad: bool = False) -> dict[str, Any]:
        """The parameter's state, with everything that an update under this mask needs."""
        state: dict[str, Any] = self.state[p]
        if not state:
            # torch's fused steps are float32, whatever the default
            dtype = torch.float32 if self.defaults["fused"] else step_dtype()
            state["step"] = torch.zeros((), dtype=dtype, device=self._home("step", p))
        if self._uses_keys:
            # kept, so that a later renaming of parameters changes nothing
            state.setdefault("key", self._tensor_key(p))
        if mask is NOTHING:
            return state
        if "exp_avg" not in state:
            if isinstance(mask, Indexed):
                fresh = torch.zeros(mask.indices.numel(), dtype=compact_dtype(p), device=p.device)
                make_master(p, state)
            else:
                # a complex parameter keeps complex moments, as in torch
                dtype = p.dtype if p.is_complex() or self.state_dtype is None else self.state_dtype
                fresh = torch.zeros_like(
                    local(p), dtype=dtype, memory_format=torch.preserve_format, requires_grad=False
                )
            state["exp_avg"], state["exp_avg_sq"] = fresh, fresh.clone()
        match_dtype(p, state)
        if amsgrad and "max_exp_avg_sq" not in state:
            state["max_exp_avg_sq"] = torch.zeros_like(state["exp_avg"])
        return state

    # the clock, and what follows from it

    def _draw(self) -> int:
        """The number of the mask that the next update uses."""
        if isinstance(self.policy, Bernoulli | GradualUnfreezing):
            return self.policy.draw(self._number("clock"), self._number("epoch"))
        return self._number("draw")

    def _start_clocks(self, devices: Iterable[torch.device]) -> None:
        """Have the clock counted on these devices too."""
        for device in devices:
            if device not in self._clocks:
                self._read_clocks()
                self._clocks[device] = torch.tensor(self._number("clock"), device=device)

    def _read_clocks(self) -> None:
        """Count on the host what devices have counted without it, in graphs and by what a scaler found."""
        if self._replayed and self._clocks:
            clock = int(next(iter(self._clocks.values())))
            self._set_numbers(clock=clock)
            if isinstance(self.policy, Bernoulli):
                self._set_numbers(draw=self.policy.draw(max(clock - 1, 0), self._number("epoch")))

    def _advance(self, found_inf: Tensor | None) -> None:
        """Count one applied step; none where an infinity was found, which only the device knows."""
        for counted in self._clocks.values():
            counted.add_(1 if found_inf is None else found_inf.to(counted.device) == 0)
        if self._is_capturing or found_inf is not None:
            self._replayed = True
        if self._is_capturing:
            return
        draw, clock, phase = self._draw(), self._number("clock") + 1, self._number("phase")
        if isinstance(self.policy, TopK) and self.policy.schedule.observe is not None:
            phase = self.policy.schedule.phase(clock)
        self._set_numbers(clock=clock, draw=draw, phase=phase)

    @property
    def _counts_there(self) -> bool:
        """Whether steps are counted where the parameters are."""
        return bool(self.defaults["capturable"] or self.defaults["fused"])

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a GradScaler leaves to `step()` what it found; torch's name, which it looks for."""
        return self._counts_there and self.gradient_release is None

    @property
    def _repeats(self) -> bool:
        """Whether the host decides nothing any more: all steps to come do the same on the device."""
        policy = self.policy
        if policy is None or policy.trains_everything:
            return True
        if isinstance(policy, Bernoulli):
            return policy.every == 1
        return isinstance(policy, TopK) and policy.schedule.train is None and self._number("phase") % 2 == 1

    @property
    def _selecting_policy(self) -> TopK | None:
        """The policy, if it selects by what it observes."""
        return self.policy if isinstance(self.policy, TopK) and not self.policy.trains_everything else None

    @property
    def _waits_for_epoch(self) -> bool:
        """Whether there is no mask before the first `new_epoch()`."""
        by_epoch = isinstance(self.policy, Bernoulli | GradualUnfreezing) and self.policy.every == "epoch"
        return by_epoch and self._number("epoch") == 0

    @property
    def _trains_while_observing(self) -> bool:
        return isinstance(self.policy, TopK) and self.policy.schedule.meanwhile == "everything"

    @property
    def _accumulates_in_update(self) -> bool:
        """Whether steps that observe and train everything read each gradient once, for both."""
        return (
            isinstance(self.policy, TopK)
            and self._trains_while_observing
            and self.policy.statistic.is_accumulated
            # an update adds to statistics where the parameter is, and does not round them
            and self.statistic_dtype != torch.bfloat16
            and self.statistic_device is None
            # autograd would record the statistic with the update
            and not self.defaults["differentiable"]
        )

    @property
    def _uses_keys(self) -> bool:
        if isinstance(self.policy, TopK):
            rounds = self.stochastic_rounding or self.statistic_dtype == torch.bfloat16
            return rounds or self.policy.statistic.random
        drawn = isinstance(self.policy, Bernoulli) and not self.policy.trains_everything
        return self.stochastic_rounding or drawn

    @property
    def _compact(self) -> bool:
        """Whether moments are kept for selected entries only."""
        return self.unselected == "frozen" and not self._trains_while_observing

    # compiled graphs

    def _enter_graphs(self) -> None:
        """Have a number of its own, by which graphs find this optimizer."""
        if _IN_GRAPHS.get(self._in_graphs) is not self:
            self._in_graphs = next(_numbers)
            _IN_GRAPHS[self._in_graphs] = self

    # parameters that are spread over processes

    @property
    def _shards(self) -> Shards | None:
        """What this process holds of DTensors, where there are any."""
        if not self._is_sharded:
            return None
        if self._sharding is None or self._sharding[0] is not self._known:
            from .integrations.distributed import Shards

            self._sharding = (self._known, Shards(self._once, self._name))
        return self._sharding[1]

    def _geometries(self, params: Sequence[Tensor]) -> list[tuple[int, int, int]] | None:
        return [self._shards.geometry(p) for p in params] if self._shards else None

    def _among_ranks(self, params: Sequence[Tensor]) -> dict[str, Any]:
        """How a selection among these parameters counts where others hold parts of them."""
        shards = self._shards
        return {"reduce": shards.add_up, "counted": list(map(shards.is_counted, params))} if shards else {}

    # gradients that are released

    def _watch_gradients(self) -> None:
        if not self.release_gradients:
            return
        if self.gradient_release is None:
            self.gradient_release = GradientRelease(self)
        self.gradient_release.watch(self._masked_parameters())

    def _ignores(self, param: Tensor) -> bool:
        """Whether the coming step has no use for the parameter's gradient: it was not observed in time."""
        return self._number("phase") % 2 == 1 and "indices" not in self.state.get(param, {})

    def _listed(self, param: Tensor) -> Tensor | None:
        """The entries that the coming step trains, where it trains a list."""
        if self._number("phase") % 2 == 0:
            return None
        indices: Tensor | None = self.state.get(param, {}).get("indices")
        return indices

    @property
    def _folds(self) -> bool:
        """Whether a statistic takes gradients before `step()`: where their sum would make no difference, or
        is not asked for, and the step cannot be skipped.
        """
        policy, release = self._selecting_policy, self.gradient_release
        return (
            policy is not None
            and policy.schedule.observe is not None
            and (self.observe_unit == "microbatch" or policy.statistic.is_linear)
            and release is not None
            and not release.has_scaler
        )

    def _fold(self, param: Tensor, grad: Tensor) -> bool:
        """Adds a gradient to the parameter's statistic, where that may be done before `step()`."""
        if self._number("phase") % 2 or not self._folds:
            return False
        if self._uses_keys:
            self._check_keys()
        self._add_up([param], [grad])
        return True

    def attach_scaler(self, scaler: torch.amp.GradScaler) -> None:
        """Tell the optimizer of the GradScaler that may skip its steps; needed with `release_gradients=True`
        only.

        Every entry of a gradient is then checked before the gradient is released, and while observing
        gradients stay whole until `step()`. Without `release_gradients` there is nothing to do, and nothing
        is done.

        Example:
            >>> import torch
            >>> from sparse_optim import MaskedAdamW, Schedule, TopK
            >>> policy, params = TopK(0.5, schedule=Schedule(observe=1)), [torch.nn.Parameter(torch.ones(4))]
            >>> optimizer = MaskedAdamW(params, policy=policy, release_gradients=True)
            >>> optimizer.attach_scaler(torch.amp.GradScaler("cpu"))
        """
        if self.gradient_release is not None:
            self.gradient_release.attach_scaler(scaler)

    # observing and looking

    @_disable_dynamo
    @torch.no_grad()
    def observe(self, *, grad_scale: float | Tensor | None = None) -> None:
        """Add the gradients that the parameters hold now to the statistic of an explicit schedule.

        Call it after a backward pass, and `zero_grad()` after it. The next `step()`, or `select()`, then
        selects.

        Args:
            grad_scale: what the loss was multiplied with, `scaler.get_scale()` for a `GradScaler` that has
                not unscaled; the statistic sees gradients divided by it, in float32. Entries that the scale
                made infinite count as zero, and are warned of at the selection.

        Raises:
            RuntimeError: unless the policy is a `TopK` with `Schedule(observe=None)`. ValueError: for a scale
                that is not positive.
        """
        self._require_explicit("observe")
        if grad_scale is not None:
            one = isinstance(grad_scale, Tensor) and grad_scale.numel() == 1
            number = isinstance(grad_scale, int | float) and not isinstance(grad_scale, bool)
            if not (one or number) or not 2**-126 <= float(grad_scale) < float("inf"):
                raise ValueError(
                    "grad_scale must be one number, positive and finite in float32, got "
                    f"{grad_scale!r}; pass scaler.get_scale()."
                )
        if self._selecting_policy is None:
            return
        self._read_clocks()
        if self.gradient_release is not None:
            self.gradient_release.settle()
        buckets = [bucket for bucket in self._buckets() if bucket.group["masked"]]
        released = [p for bucket in buckets if bucket.form != "whole" for p in bucket.params]
        if released:
            raise RuntimeError(
                f"observe() needs whole gradients, got a released one for {self._name(released[0])!r}; call "
                f"backward() "
                "inside `with optimizer.gradient_release.paused():`."
            )
        if not buckets:
            raise RuntimeError(
                "observe() needs the gradient of a masked parameter, got none; call it after backward(), "
                "before zero_grad()."
            )
        if grad_scale is None:
            self._accumulate(buckets)
        else:
            # one copy of one gradient at a time
            for bucket in buckets:
                for p, grad in zip(bucket.params, bucket.grads, strict=True):
                    self._add_up([p], [grad.to(torch.float32) * (1 / float(grad_scale))])
            self._finish_waiting()
        phase = self._number("phase")
        self._set_numbers(phase=phase + phase % 2)

    @_disable_dynamo
    @torch.no_grad()
    def select(self) -> None:
        """Select entries by what was observed explicitly; called again after more `observe()`, select anew.

        Entries that stay selected keep their moments and their age, those that leave lose them.

        Raises:
            RuntimeError: when nothing was observed, or the schedule is not explicit.
        """
        self._require_explicit("select")
        self._follow_swapped_parameters()
        self._read_clocks()
        if self._selecting_policy is None:
            return
        selected, spoiled = self._selection(self._observed())
        self._apply_selection(selected)
        self._set_numbers(phase=self._number("phase") // 2 * 2 + 1)
        if spoiled:
            warnings.warn(spoiled, stacklevel=5)

    def set_count(self, name: str, count: Tensor) -> None:
        """Say how often the entries of a parameter took part since observation began.

        Args:
            name: of a masked parameter. count: any shape that broadcasts to the parameter's, such as [in
                features].

        Raises:
            RuntimeError: when the policy's statistic does not use counts. ValueError: for an unknown name or
                shape.
        """
        if not isinstance(self.policy, TopK) or not self.policy.statistic.counts:
            raise RuntimeError(
                f"set_count() needs a TopK policy with CountedSquaredGradient, got policy={self.policy!r}; "
                "DPSAdamW(variant='mix') has one."
            )
        self._follow_swapped_parameters()
        if self.policy.trains_everything:
            return
        masked = set(self._masked_parameters())
        known = {own: p for p, own in self._all_names().items() if p in masked}
        p = known.get(clean_name(name)) if self._named else None
        if p is None:
            raise ValueError(
                f"name must be that of a named parameter of this optimizer that is masked, got {name!r}; "
                "pass model.named_parameters()."
            )
        if is_dtensor(p):
            raise NotImplementedError(
                f"set_count() needs whole parameters in this version, got a DTensor for {name!r}; use "
                "DPSAdamW(variant='dense'), or DistributedDataParallel."
            )
        if not isinstance(count, Tensor):
            raise TypeError(f"count must be a tensor, got {count!r}; write torch.tensor(...).")
        try:
            count = count.detach().to(device=p.device, dtype=torch.float32, copy=True)
            count.expand(p.shape)
        except RuntimeError as error:
            raise ValueError(
                f"count must broadcast to {tuple(p.shape)}, got {tuple(count.shape)}; for counts of input "
                f"features of a linear weight give [{p.shape[-1] if p.dim() else 1}]."
            ) from error
        self._start(p)["count"] = count

    def observe_curvature(self, loss: Tensor) -> None:
        """Add one Hutchinson estimate of the diagonal of the Hessian: z * (H z) with random signs z.

        Call it while observing, with a loss whose graph is still there, before `loss.backward()`; it leaves
        `.grad` alone. Costs about two backward passes and needs operations that can be differentiated twice.

        Args:
            loss: 0-dim, a function of the masked parameters.

        Raises:
            RuntimeError: when the policy's statistic does not use curvature, or several processes train
                together (their estimates would differ).

        References:
            Yao et al., AdaHessian, AAAI 2021.
        """
        if not isinstance(self.policy, TopK) or not self.policy.statistic.needs_curvature:
            raise RuntimeError(
                "observe_curvature() needs a TopK policy with CurvatureScaledGradient, got "
                f"policy={self.policy!r}; SecondOrderAdamW(curvature='hutchinson') has one."
            )
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            if torch.distributed.get_world_size() > 1:
                raise RuntimeError(
                    f"observe_curvature() works in one process, got {torch.distributed.get_world_size()} "
                    "ranks; use SecondOrderAdamW without curvature."
                )
        if self.policy.trains_everything:
            return
        if self.policy.schedule.observe is not None and self._number("phase") % 2:
            raise RuntimeError(
                "observe_curvature() must be called while observing, got a step that trains; "
                "call it during the first `observe` steps only."
            )
        self._follow_swapped_parameters()
        self._check_keys()
        params = [p for p in self._masked_parameters() if p.requires_grad]
        draw = self._number("draw") + 1
        with torch.enable_grad():
            grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
            signs = {}
            product = loss.new_zeros(())
            for p, grad in zip(params, grads, strict=True):
                if grad is not None and grad.requires_grad:
                    signs[p] = self._signs(p, draw).to(grad.dtype)
                    product = product + (grad * signs[p]).sum()
            if not signs:
                raise RuntimeError(
                    "observe_curvature() needs a loss that can be differentiated twice, got one without "
                    "second derivatives; leave curvature out."
                )
            try:
                products = torch.autograd.grad(product, list(signs), retain_graph=True, allow_unused=True)
            except RuntimeError as error:
                raise RuntimeError(
                    "observe_curvature() needs operations that can be differentiated twice, got one that "
                    f"cannot ({error}); fused attention is one: load the model with "
                    "attn_implementation='eager'."
                ) from error
        for p, grad in zip(params, grads, strict=True):
            if grad is not None and "curvature" not in self._start(p):
                # one that enters the loss linearly has none, and keeps this zero
                self.state[p]["curvature"] = torch.zeros(p.shape, dtype=torch.float32, device=p.device)
        for (p, sign), curved in zip(signs.items(), products, strict=True):
            if curved is not None:
                self.state[p]["curvature"] += (sign * curved).to(torch.float32)
        self._set_numbers(draw=draw)

    def _signs(self, p: Tensor, draw: int) -> Tensor:
        key, number = self._tensor_key(p), purpose_draw(CONTROL_DRAWS, draw)
        coin = Draws(self._number("seed"), number, 1 << 31, [key])
        heads = seeded_mask(coin, 0, p.numel(), whole(p), p.device)
        return 2 * heads.view(p.shape).to(torch.int8) - 1

    def _require_explicit(self, method: str) -> None:
        if not isinstance(self.policy, TopK) or self.policy.schedule.observe is not None:
            raise RuntimeError(
                f"{method}() needs a TopK policy with Schedule(observe=None), got policy={self.policy!r}; "
                "with observe=n the first n calls of step() observe by themselves."
            )

    @_disable_dynamo
    def new_epoch(self, epoch: int | None = None) -> None:
        """Say that an epoch begins, the first included: a policy with `every="epoch"` then draws, or goes on
        a stage.

        Args:
            epoch: which one, counted from 0; saying the same again changes nothing. None: the next one.

        Raises:
            ValueError: for a number that is none.
        """
        if epoch is not None and (isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0):
            raise ValueError(f"epoch must be an integer from 0 on, got {epoch!r}; None counts by itself.")
        self._set_numbers(epoch=self._number("epoch") + 1 if epoch is None else epoch + 1)

    @_disable_dynamo
    @torch.no_grad()
    def mask(self, param: Tensor, *, upcoming: bool = False) -> Tensor:
        """Which entries of a parameter the last update trained: bool, in the parameter's shape.

        With `upcoming`, what the next update trains, as far as that is known: all False while a selection is
        still to be made.

        All False before the first update, while a schedule trains nothing, and for a parameter that never had
        a gradient. A parameter without a gradient in the last update counts as if it had had one. Of a
        DTensor it is a DTensor, with the parameter's placements.

        Raises:
            ValueError: for a tensor that is not a parameter of this optimizer.
        """
        self._follow_swapped_parameters()
        self._read_clocks()
        group = next((g for g in self.param_groups if any(param is p for p in g["params"])), None)
        if group is None:
            got = f"a tensor of shape {tuple(param.shape)}" if isinstance(param, Tensor) else repr(param)
            raise ValueError(
                f"param must be a parameter of this optimizer, got {got}; "
                "pass the object that the model holds."
            )
        mask = self._next_mask(param, group) if upcoming else self._last_mask(param, group)
        held = local(param.detach())
        selected = torch.full((held.numel(),), mask is EVERYTHING, device=held.device)
        if isinstance(mask, Bits):
            selected = unpack_bits(mask.bits, held.numel())
        elif isinstance(mask, Indexed):
            selected[mask.indices.long()] = True
        elif isinstance(mask, Seeded):
            geometry = self._shards.geometry(param) if self._shards else whole(param)
            selected = seeded_mask(_draws(mask, [mask.key]), 0, held.numel(), geometry, held.device)
        selected = selected.view(held.shape)
        return self._shards.like(param, selected) if self._shards else selected

    def _last_mask(self, p: Tensor, group: dict[str, Any]) -> Mask:
        clock = self._number("clock")
        state = self.state.get(p, {})
        if clock == 0 or "exp_avg" not in state or not state["step"]:
            return NOTHING
        policy, observed = self._selecting_policy, False
        if policy is not None and policy.schedule.observe is not None:
            observed = policy.schedule.phase(clock - 1) % 2 == 0
            if observed and not self._trains_while_observing:
                return NOTHING
        return self._mask(p, group, observing=observed, draw=self._number("draw"))

    def _next_mask(self, p: Tensor, group: dict[str, Any]) -> Mask:
        observing = False
        policy = self._selecting_policy
        if self._waits_for_epoch:
            return NOTHING
        if policy is not None:
            observing = self._number("phase") % 2 == 0
            moves = self._trains_while_observing
            if observing and not moves and (group["masked"] or policy.schedule.observe is not None):
                return NOTHING
        return self._mask(p, group, observing=observing, draw=self._draw())

    @_disable_dynamo
    def density(self) -> float:
        """The share of all entries in this optimizer that the last update trained.

        With DTensors it is that of all processes, which have to ask together.
        """
        params = list(self._all_names())
        mine = [p for p in params if not self._shards or self._shards.is_counted(p)]
        trained = sum(int(local(self.mask(p)).sum()) for p in mine)
        if self._shards:
            trained = int(self._shards.add_up(torch.tensor(trained)))
        return float(trained / max(1, sum(p.numel() for p in params)))

    def state_bytes(self) -> int:
        """Bytes of all tensors in the optimizer's state: moments, masks, statistics, masters."""
        values = [value for state in self.state.values() for value in state.values()]
        return sum(value.nbytes for value in values if isinstance(value, Tensor))

    def delta(self, *, base_model: str | None = None) -> Delta:
        """What training has changed, without the base: the selected entries as they are now.

        For one mask that was selected once and stays, and `unselected="frozen"`. The delta is in mode
        "replace"; parameters of groups with `masked=False` are stored whole, and buffers are not in it.

        Args:
            base_model: the base's name, for people.

        Returns:
            A `Delta` on the CPU, to be saved or applied to the base.

        Raises:
            ValueError: without names of the parameters, and for any other way of training.
            RuntimeError: before the selection.
        """
        from .deltas import delta_of

        policy = self._selecting_policy
        if policy is None or not self._compact or policy.schedule.train is not None:
            raise ValueError(
                "delta() needs a TopK policy with one mask that stays, and unselected='frozen', got "
                f"{self._masking()}; use extract_delta(base, model)."
            )
        self._follow_swapped_parameters()
        self._read_clocks()
        if not self._named:
            raise ValueError(
                "delta() needs named parameters, got none; pass param_groups(model) or "
                "model.named_parameters(), or use extract_delta(base, model)."
            )
        if self._shards:
            raise ValueError(
                "delta() needs whole parameters, got DTensors; save the model, and use extract_delta."
            )
        if self._number("phase") != 1:
            found = "none yet" if self._number("phase") == 0 else "several"
            raise RuntimeError(
                f"delta() needs one selection, got {found}; train first, or use extract_delta(base, model)."
            )
        changed: dict[str, tuple[Tensor, Tensor | None]] = {}
        for group in self.param_groups:
            for p in group["params"]:
                nothing = torch.zeros(0, dtype=torch.int32, device=p.device)
                indices = self.state[p].get("indices", nothing) if p in self.state else nothing
                changed[self._name(p)] = p.detach(), indices if group["masked"] else None
        return delta_of(changed, base_model)

    # names and keys

    def _masked_parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups if group["masked"] for p in group["params"]]

    def _remember_parameters(self) -> None:
        super()._remember_parameters()
        self._depths = None
        self._keys_checked = False
        self._plan = None
        if self.gradient_release is not None:
            self._watch_gradients()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As in `SurvivingOptimizer`; a copy releases gradients as the original does."""
        self.__dict__.setdefault("gradient_release", None)
        super().__setstate__(state)
        if self.gradient_release is not None:
            self.gradient_release.loaded()
        self._watch_gradients()
        self._enter_graphs()

    def state_dict(self) -> dict[str, Any]:
        """As in torch; every tensor has the dtype that it has while training.

        With `optimizer.dense_state_dict = True`, and always where a parameter is a DTensor, every trainable
        parameter has an entry of the same tensors in every phase, in its own shape and spread as it is, so
        that `torch.distributed.checkpoint` can load them into any number of processes. Set it right after
        construction, on this object and not on a wrapper; a look of `torch.distributed.checkpoint` at an
        optimizer that has not stepped sets it too.
        """
        self._finish_waiting()
        self._read_clocks()
        return super().state_dict()

    def _dense_form(self, p: Tensor) -> dict[str, torch.dtype | int]:
        group = self._groups()[p]
        policy = self._selecting_policy if group["masked"] else None
        compact = policy is not None and self._compact
        wanted = None if p.is_complex() else self.state_dtype
        moments = compact_dtype(p) if compact else wanted or p.dtype
        form: dict[str, torch.dtype | int] = {"exp_avg": moments, "exp_avg_sq": moments}
        if group["amsgrad"]:
            form["max_exp_avg_sq"] = moments
        if self._uses_keys:
            form["key"] = self._tensor_key(p)
        if policy is None:
            return form
        if compact and p.dtype != compact_dtype(p):
            form["master"] = compact_dtype(p)
        if compact and (policy.schedule.train is not None or policy.schedule.observe is None):
            # of entries selected anew
            form["age"] = torch.int32
        statistic = self.statistic_dtype or torch.float32
        if self.statistic_dtype is None and not policy.statistic.begins_at_zero:
            statistic = policy.statistic.init(p, seed=self._number("seed"), key=self._tensor_key(p)).dtype
        form |= {"mask": torch.uint8, "statistic": statistic}
        if self.statistic_dtype == torch.bfloat16:
            form["roundings"] = 0
        if policy.statistic.counts:
            form["count"] = torch.float32
        if policy.statistic.needs_curvature:
            form["curvature"] = torch.float32
        return form

    def _groups(self) -> dict[Tensor, dict[str, Any]]:
        """Every parameter with its group."""
        if self._group_of is None or self._group_of[0] is not self._known:
            self._group_of = (self._known, {p: g for g in self.param_groups for p in g["params"]})
        return self._group_of[1]

    def _spread(self, p: Tensor, shard: Tensor) -> Tensor:
        return self._shards.like(p, shard) if self._shards else shard

    def _held(self, p: Tensor, tensor: Tensor) -> Tensor:
        return self._shards.held(p, tensor) if self._shards else tensor

    def __getstate__(self) -> dict[str, Any]:
        """As in `SurvivingOptimizer`, with what devices have counted."""
        self._read_clocks()
        return super().__getstate__()

    def _finish_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.finish()

    def _home(self, key: str, p: Tensor) -> torch.device:
        if key == "step" and not self._counts_there:
            return torch.device("cpu")
        own = key in ("statistic", "nonfinite") and self.statistic_device is not None
        return self.statistic_device if own and self.statistic_device is not None else p.device

    def _depth(self, p: Tensor) -> int:
        """The stage in which gradual unfreezing lets a parameter train."""
        if not self._named:
            raise ValueError(
                "GradualUnfreezing needs named parameters, got none; pass model.named_parameters() or "
                "param_groups(model)."
            )
        if self._depths is None:
            assert isinstance(self.policy, GradualUnfreezing)
            self._depths = self.policy.depth(self._all_names().values())
        return self._depths[self._name(p)]

    def _mask_key(self, p: Tensor) -> int:
        if isinstance(self.policy, Bernoulli) and self.policy.unit == "layer":
            return zlib.crc32(layer_of(self._name(p), self.policy.layers).encode())
        return self._tensor_key(p)

    def _check_keys(self) -> None:
        """Refuse names that random words could not tell apart."""
        if self._keys_checked:
            return
        names = self._all_names()
        units = [(self._tensor_key(p), i, name) for i, (p, name) in enumerate(names.items())]
        if isinstance(self.policy, Bernoulli) and self.policy.unit == "layer":
            if not self._named:
                raise ValueError(
                    "unit='layer' needs named parameters, got none; pass model.named_parameters() or "
                    "param_groups(model)."
                )
            layers = sorted({layer_of(name, self.policy.layers) for name in names.values()})
            units = [(zlib.crc32(layer.encode()), i, layer) for i, layer in enumerate(layers)]
        seen: dict[int, tuple[int, str]] = {}
        for key, i, name in units:
            other = seen.setdefault(key, (i, name))
            if other[0] != i:
                raise ValueError(
                    f"names must have different CRC-32 keys, got {key} for both {other[1]!r} and {name!r}; "
                    "rename one."
                )
        self._keys_checked = True

    def _masking(self) -> str:
        return (
            "policy=None"
            if self.policy is None
            else f"policy={self.policy!r}, unselected={self.unselected!r}"
        )

    def _check_saved_masks(self, final: dict[str, Any], states: list[tuple[Tensor, Any]]) -> None:
        if self._selecting_policy is None or not final["param_groups"]:
            return
        # the saved groups are those that will be
        saved = [group.get("masked", True) for group in final["param_groups"] for _ in group["params"]]
        masked = {p for (p, _), is_masked in zip(states, saved, strict=False) if is_masked}
        masks = [state for p, state in states if "indices" in state or "bits" in state]
        if final["param_groups"][0].get("phase", 0) and not masks:
            raise ValueError(
                "saved state must have the masks of a policy that has selected, got none; "
                "load an unchanged state dict."
            )
        for p, state in states:
            if self._compact and p in masked and "exp_avg" in state and "indices" not in state:
                raise ValueError(
                    f"saved state of {self._name(p)!r} must have indices, got {sorted(state)}; "
                    "load an unchanged state dict of groups with the same masked=."
                )

    def _backend(self, device: torch.device) -> ModuleType:
        switches = self.defaults
        wants_reference = (
            switches["foreach"] is not None or switches["fused"] is False or switches["differentiable"]
        )  # fmt: skip
        return backends.resolve(
            self.backend, device, wants_reference=wants_reference, wants_accelerated=bool(switches["fused"])
        )

    def _check_gradient(self, p: Tensor, group: dict[str, Any]) -> None:
        assert p.grad is not None
        if p.grad.layout is not torch.strided:
            raise RuntimeError("Adam does not support sparse gradients, please consider SparseAdam instead")
        if is_dtensor(p) != is_dtensor(p.grad):
            raise RuntimeError(
                f"a parameter and its gradient must be spread alike, got {type(p.grad).__name__} for "
                f"{self._name(p)!r}, a {type(p).__name__}; make it with distribute_tensor()."
            )
        masked = group["masked"] and self.policy is not None and not self.policy.trains_everything
        state = self.state.get(p, {})
        now_dense = not masked and not {"indices", "bits", "statistic"}.isdisjoint(state)
        now_masked = masked and isinstance(self.policy, TopK) and self._compact
        if now_dense or (now_masked and "exp_avg" in state and "indices" not in state):
            raise RuntimeError(
                f"masked must stay as it was at a parameter's first step, got {group['masked']} for "
                f"{self._name(p)!r}; construct a new optimizer to change it."
            )
        if p.is_complex() and masked:
            raise ValueError(
                f"a masked parameter must be real, got {p.dtype} for {self._name(p)!r}; "
                "put it in a group with masked=False."
            )


_IN_GRAPHS: weakref.WeakValueDictionary[int, MaskedAdamW] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def _step_of(params: list[Tensor], grads: list[Tensor], places: list[int], optimizer: int) -> None:
    _IN_GRAPHS[optimizer]._step_on(params, grads, places)


# it decides on the host what to do, so that no graph may be replayed without asking it
_UNSAFE = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()
# kept: its operators end with it
_LIBRARY: Any = torch.library.Library("sparse_optim", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("step_(Tensor(a!)[] params, Tensor[] grads, int[] places, int optimizer) -> ()", tags=_UNSAFE)
_LIBRARY.impl("step_", _step_of, "CompositeExplicitAutograd")
torch.library.register_fake("sparse_optim::step_", lambda *arguments: None, lib=_LIBRARY)


def _is_partitioned() -> bool:
    """Whether ZeroRedundancyOptimizer is making an optimizer."""
    zero = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    frame = sys._getframe() if zero is not None else None
    while frame is not None and frame.f_globals is not vars(zero):
        frame = frame.f_back
    return frame is not None


class _Rounding:
    """A backend that rounds statistics stochastically."""

    def __init__(self, backend: ModuleType, rounding: dict[str, Any]) -> None:
        self._backend = backend
        self.accumulate_ = functools.partial(backend.accumulate_, **rounding)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


def _moved_to(param: Tensor, number: Tensor | None) -> Tensor | None:
    """A 0-dim tensor where a parameter is."""
    return None if number is None else number.to(param.device, non_blocking=True)


def _selects(mask: Mask) -> bool:
    """Whether a selection has left anything."""
    if isinstance(mask, Indexed):
        return mask.indices.numel() > 0
    return bool(mask.bits.any()) if isinstance(mask, Bits) else mask is EVERYTHING


def _moved(mask: Mask, device: torch.device) -> Mask:
    """A mask on the device of its parameter."""
    if isinstance(mask, Indexed):
        return Indexed(mask.indices.to(device))
    return Bits(mask.bits.to(device)) if isinstance(mask, Bits) else mask


def _draws(mask: Seeded, keys: Sequence[int]) -> Draws:
    """Masks that differ in their keys alone, in the form in which backends take them."""
    return Draws(mask.seed, purpose_draw(MASK_DRAWS, mask.draw), mask.threshold, keys, mask.one_word)


def _check_hyperparameters(
    lr: float | Tensor,
    betas: tuple[float | Tensor, float | Tensor],
    eps: float,
    weight_decay: float,
    *,
    foreach: bool | None,
    capturable: bool,
) -> tuple[float | Tensor, float | Tensor]:
    """torch.optim.AdamW's checks in its own words, which programs match on."""
    if isinstance(lr, Tensor):
        if foreach and not capturable:
            raise ValueError("lr as a Tensor is not supported for capturable=False and foreach=True")
        if lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
    if not lr >= 0.0:
        raise ValueError(f"Invalid learning rate: {lr}")
    if not eps >= 0.0:
        raise ValueError(f"Invalid epsilon value: {eps}")
    for i, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
    if not weight_decay >= 0.0:
        raise ValueError(f"Invalid weight_decay value: {weight_decay}")
    if isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor):
        raise ValueError("betas must be either both floats or both Tensors")
    for i, beta in enumerate(betas):
        if isinstance(beta, Tensor):
            if foreach and not capturable:
                raise ValueError(
                    f"betas[{i}] as a Tensor is not supported for capturable=False and foreach=True"
                )
            if beta.numel() != 1:
                raise ValueError(f"Tensor betas[{i}] must be 1-element")
    return _squeezed(betas[0]), _squeezed(betas[1])


def _squeezed(value: float | Tensor) -> float | Tensor:
    return value.squeeze() if isinstance(value, Tensor) and value.dim() != 0 else value
