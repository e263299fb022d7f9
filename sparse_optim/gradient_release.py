"""Hooks that keep the selected entries of each gradient and drop the rest, so that dense gradients live one
at a time.

When the backward pass has made a gradient, a hook takes from it what `step()` will need. What then stands in
`p.grad` is a `ReleasedGradient`: further micro-batches add to it, and `zero_grad()`, `GradScaler` and torch's
clipping find in it what they look for. It has the shape of the parameter, and the memory of its selected
entries. Of a parameter that is spread over processes it is the local part of a DTensor.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

# what ranks exchange at once, in entries: 16 MiB of float32
_CHUNK = 1 << 22


class _Optimizer(Protocol):
    """What hooks ask the optimizer."""

    release_gradients: bool
    gradient_release: GradientRelease | None

    def _name(self, param: Tensor) -> str: ...

    def _number(self, name: str) -> int: ...

    def _backend(self, device: torch.device) -> ModuleType: ...

    def _listed(self, param: Tensor) -> Tensor | None:
        """The entries that the coming step trains, where it trains a list."""

    def _ignores(self, param: Tensor) -> bool:
        """Whether the coming step has no use for the parameter's gradient."""

    def _fold(self, param: Tensor, grad: Tensor) -> bool:
        """Adds a gradient to the parameter's statistic, where that may be done before `step()`."""


@dataclass
class _Kept:
    """What is left of a gradient: entries of a list, or nothing, since all of it went into the statistic."""

    release: GradientRelease
    param: weakref.ref[Tensor]
    name: str
    stamp: tuple[int, int]  # of the step that it is for
    indices: Tensor | None = None  # [nnz]
    values: Tensor | None = None  # [nnz] float32, float64 for float64 parameters
    found_inf: Tensor | None = None  # 0-dim float32: 1 where an entry, selected or not, was not finite
    is_zero: bool = False  # zeroed since: nothing has arrived yet, and nothing is stored
    whole: Tensor | None = None  # what arrived since, where it is not released; the hook puts it into p.grad


class ReleasedGradient(Tensor):
    """What stands in `p.grad` for a gradient of which only selected entries were kept.

    Shape, dtype and device are those of the gradient. It can be added to (which autograd does), zeroed,
    scaled, clamped, and asked for its norm, which is that of the kept entries; what would need the others
    raises.
    """

    kept: _Kept

    @staticmethod
    def __new__(
        cls,
        like: Tensor,
        kept: _Kept,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> ReleasedGradient:
        made: ReleasedGradient = Tensor._make_wrapper_subclass(
            cls, like.shape, dtype=dtype or like.dtype, device=device or like.device
        )
        made.kept = kept
        return made

    @property
    def data(self) -> Tensor:
        """The gradient itself."""
        return self

    @data.setter
    def data(self, value: Tensor) -> None:
        # what module.to(...) assigns: nothing where everything is already, and what no step needs any more
        # need not follow a model elsewhere
        p = self.kept.param()
        if isinstance(value, ReleasedGradient) and value.kept is self.kept:
            if (value.device, value.dtype) != (self.device, self.dtype) and p is not None:
                p.grad = None
            return
        raise _gone(self, "its data cannot be replaced; assign to the parameter's grad")

    # every operation arrives in __torch_dispatch__
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """What was kept, not what is gone."""
        values = self.kept.values
        what = "added to the statistic" if values is None else f"{values.numel()} entries kept"
        return f"ReleasedGradient({what} of {tuple(self.shape)})"

    def __reduce_ex__(self, protocol: object) -> Any:
        """Refused: the entries are gone."""
        raise _gone(self, "it cannot be copied or saved")

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Does what can be done with the kept entries."""
        kwargs = kwargs or {}
        action = _ACTIONS.get(func)
        if action is not None:
            return action(func, *args, **kwargs)
        found = next(
            (a for a in _flattened([*args, *kwargs.values()]) if isinstance(a, ReleasedGradient)), None
        )
        assert found is not None
        remedy = f"{func} cannot be computed"
        if func in (aten.mul.out, aten.copy_.default):
            remedy += (
                "; under DistributedDataParallel call optimizer.gradient_release.exclude_from_ddp(model) "
                "before the model is wrapped"
            )
        raise _gone(found, remedy)


def _flattened(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from value
        else:
            yield value


def _gone(grad: ReleasedGradient, what: str) -> RuntimeError:
    values = grad.kept.values
    left = (
        "it was added to the statistic"
        if values is None
        else f"{values.numel()} of its {grad.numel()} entries were kept"
    )
    return RuntimeError(
        f"the gradient of {grad.kept.name!r} was released ({left}), so {what}; set release_gradients=False "
        "to keep whole gradients, or call zero_grad(set_to_none=True) first."
    )


def _needed_values(grad: ReleasedGradient, what: str) -> Tensor:
    if grad.kept.values is None:
        raise _gone(grad, what)
    return grad.kept.values


# what can be done with a released gradient

aten = torch.ops.aten


def _add(func: Any, grad: Tensor, other: Any, alpha: float = 1) -> Tensor:
    """Autograd's accumulation of one more gradient, and what looks like it."""
    whole = isinstance(other, Tensor) and not isinstance(other, ReleasedGradient)
    if not isinstance(grad, ReleasedGradient):
        raise _gone(other, f"{func} cannot be computed")
    if not whole or other.shape != grad.shape or alpha != 1:
        raise _gone(grad, f"{func} cannot be computed")
    if other.layout is not torch.strided:
        raise _gone(grad, "no sparse gradient can be added to it")
    grad.kept.release._add(grad, other)
    return grad


def _itself(func: Any, grad: ReleasedGradient) -> Tensor:
    return ReleasedGradient(grad, grad.kept)


def _elsewhere(
    func: Any, grad: ReleasedGradient, *, dtype: Any = None, device: Any = None, **kwargs: Any
) -> Tensor:
    """What `module.to(...)` makes, once a step has used the gradient."""
    kept = grad.kept
    if not kept.is_zero and kept.stamp == kept.release.stamp:
        raise _gone(grad, "it cannot be moved or converted before step() has used it")
    return ReleasedGradient(grad, kept, dtype, device)


def _zero(func: Any, grad: ReleasedGradient) -> Tensor:
    kept = grad.kept
    kept.indices = kept.values = kept.found_inf = kept.whole = None
    kept.is_zero = True
    return grad


def _scale(func: Any, grad: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """An operation in place on each entry."""
    others = (*args, *kwargs.values())
    if not isinstance(grad, ReleasedGradient):
        raise _gone(next(x for x in others if isinstance(x, ReleasedGradient)), f"{func} cannot be computed")
    if any(isinstance(other, Tensor) and other.dim() for other in others):
        raise _gone(grad, f"{func} cannot be computed with a tensor")
    kept = grad.kept
    # clipping that changes nothing
    if kept.is_zero or (func in _BY_FACTOR and float(args[0]) == 1):
        return grad
    if kept.release.is_shared:
        raise _gone(
            grad, "ranks average it in step(), which clips with max_grad_norm=, and nothing before does"
        )
    func(_needed_values(grad, f"{func} comes too late"), *args, **kwargs)
    return grad


def _norm(
    func: Any, grad: ReleasedGradient, order: float = 2, dim: Any = None, keepdim: bool = False, **kwargs: Any
) -> Tensor:
    if dim or keepdim:
        raise _gone(grad, "it has no norm but that of all its entries")
    warnings.warn(
        "the norm of a released gradient is that of its selected entries on this rank, and zero where all of "
        "it went into the statistic; to clip by what is applied, give the optimizer max_grad_norm= and clip "
        "nothing yourself.",
        stacklevel=2,
    )
    values = torch.zeros(1, device=grad.device) if grad.kept.values is None else grad.kept.values
    norm: Tensor = func(values, order, **kwargs)
    return norm


def _each(func: Any, grads: Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:
    """An operation on a list of tensors, of which some are released."""
    single = _SINGLE[func]
    for other in _flattened([*args, *kwargs.values()]):
        if isinstance(other, ReleasedGradient):
            raise _gone(other, f"{func} cannot be computed")
    results = [
        _ACTIONS[single](single, grad, *args, **kwargs)
        if isinstance(grad, ReleasedGradient)
        else single(grad, *args, **kwargs)
        for grad in grads
    ]
    return results if func is aten._foreach_norm.Scalar else None


def _unscale(func: Any, grads: Sequence[Tensor], found_inf: Tensor, inv_scale: Tensor) -> None:
    """What GradScaler does with gradients before a step."""
    for grad in grads:
        if not isinstance(grad, ReleasedGradient):
            func([grad], found_inf, inv_scale)
            continue
        kept = grad.kept
        if kept.is_zero:
            continue
        if kept.found_inf is None:
            raise RuntimeError(
                f"GradScaler must be known before gradients are released, got that of {kept.name!r}, of "
                "which only selected entries were checked; call optimizer.attach_scaler(scaler) before "
                "training, or use bfloat16 without a scaler."
            )
        func([_needed_values(grad, "it cannot be unscaled")], found_inf, inv_scale)
        found_inf.copy_(torch.maximum(found_inf, kept.found_inf.to(found_inf.device)))


_SINGLE = {
    aten._foreach_norm.Scalar: aten.linalg_vector_norm.default,
    aten._foreach_mul_.Tensor: aten.mul_.Tensor,
    aten._foreach_mul_.Scalar: aten.mul_.Scalar,
    aten._foreach_zero_.default: aten.zero_.default,
}
_BY_FACTOR = (aten.mul_.Tensor, aten.mul_.Scalar)
_ACTIONS: dict[Any, Callable[..., Any]] = {
    aten.add_.Tensor: _add,
    aten.detach.default: _itself,
    aten.alias.default: _itself,
    aten.zero_.default: _zero,
    aten._to_copy.default: _elsewhere,
    aten.mul_.Tensor: _scale,
    aten.mul_.Scalar: _scale,
    aten.div_.Tensor: _scale,
    aten.div_.Scalar: _scale,
    aten.clamp_.default: _scale,
    aten.linalg_vector_norm.default: _norm,
    aten.norm.Scalar: _norm,
    aten._amp_foreach_non_finite_check_and_unscale_.default: _unscale,
    **dict.fromkeys(_SINGLE, _each),
}


class Waiting:
    """Gradients on their way to the host, where their statistics are: while one is added up, the next is
    copied.

    Args:
        add: adds one parameter's gradient, then on the host, to its statistic.
    """

    def __init__(self, add: Callable[[Tensor, Tensor], None]) -> None:
        self._add = add
        self._queue: list[tuple[Tensor, Tensor, Any]] = []

    def put(self, p: Tensor, grad: Tensor) -> None:
        """Begin to copy a gradient, and add up the one before."""
        event = None
        if grad.device.type == "cuda":
            copied = torch.empty(grad.shape, dtype=grad.dtype, pin_memory=True)
            copied.copy_(grad, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(grad.device))
        else:
            copied = grad.to("cpu")
        self._queue.append((p, copied, event))
        self.finish(leave=1)

    def finish(self, leave: int = 0) -> None:
        """Add up all but so many of those that wait."""
        while len(self._queue) > leave:
            p, copied, event = self._queue.pop(0)
            if event is not None:
                event.synchronize()
            self._add(p, copied)


class GradientRelease:
    """The hooks of `MaskedAdamW(..., release_gradients=True)`, as `optimizer.gradient_release`.

    Args:
        optimizer: whose masked parameters are watched. It is not kept alive; without it hooks do nothing.
    """

    def __init__(self, optimizer: _Optimizer) -> None:
        # by parameters, which hold their hooks and so this object
        self._hooks: Any = WeakIdKeyDictionary()
        self._watched: Any = WeakIdKeyDictionary()
        hooks, excluded = self._hooks, WeakIdKeyDictionary()

        def orphaned(_: object, at_exit: Callable[[], bool] = sys.is_finalizing) -> None:
            # then nobody hooks anything any more, and modules are half gone
            if at_exit():
                return
            # hooks of parameters that nobody else averages over ranks stay, and refuse gradients
            for p in [p for p in hooks if p not in excluded]:
                hooks.pop(p).remove()  # type: ignore[no-untyped-call]

        self._optimizer = weakref.ref(optimizer, orphaned)
        self._paused = False
        self._scaler: Any = None
        self._loads = 0
        # the step for which a parameter's gradient was last folded
        self._folded: Any = WeakIdKeyDictionary()
        # parameters whose gradients other ranks have not seen
        self._arrived: Any = WeakIdKeyDictionary()
        self._group: dist.ProcessGroup | None = None
        self._excluded_params: Any = excluded

    @property
    def _excluded(self) -> list[Tensor]:
        return list(self._excluded_params)

    @property
    def stamp(self) -> tuple[int, int]:
        """What tells the coming step from all others: how often state was loaded, and steps taken since."""
        optimizer = self._optimizer()
        return self._loads, -1 if optimizer is None else optimizer._number("clock")

    def loaded(self) -> None:
        """State was loaded: what was released before is of no use."""
        self._loads += 1

    @property
    def has_scaler(self) -> bool:
        """Whether a GradScaler may skip steps after gradients were seen."""
        return self._scaler is not None

    def watch(self, params: Iterable[Tensor]) -> None:
        """Put hooks on these parameters, where they train, and take them off all others."""
        wanted = dict.fromkeys(params)
        self._watched = WeakIdKeyDictionary(wanted)
        for p in [p for p in self._hooks if p not in wanted]:
            self._hooks.pop(p).remove()
        for p in wanted:
            # one that is frozen gets its hook at the first step after it was unfrozen
            if p not in self._hooks and p.requires_grad:
                hook = p.register_post_accumulate_grad_hook(self._take)  # type: ignore[no-untyped-call]
                self._hooks[p] = hook

    def remove(self) -> None:
        """Take all hooks off: gradients stay whole from now on, and those that were released are dropped.

        The optimizer goes on without release; `observe_unit="microbatch"` then means "step".

        Raises:
            RuntimeError: after `exclude_from_ddp`, since a wrapper that exists would leave the gradients
                alone.
        """
        if self._excluded:
            raise RuntimeError(
                "remove() must come before exclude_from_ddp(), got parameters that DistributedDataParallel "
                "leaves alone; wrap a new model and make a new optimizer."
            )
        optimizer = self._optimizer()
        if optimizer is not None:
            optimizer.release_gradients, optimizer.gradient_release = False, None
        for p in self._hooks:
            if released_of(p.grad) is not None:
                p.grad = None
        self.watch(())
        self._scaler = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Gradients of backward passes in this block stay whole, for `optimizer.observe()`."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    @torch.no_grad()
    def _take(self, p: Tensor) -> None:
        """What happens to a gradient once autograd has added it to `p.grad`."""
        optimizer, grad = self._optimizer(), p.grad
        if grad is None:
            return
        if optimizer is None:
            if p in self._excluded_params:
                raise RuntimeError(
                    "a parameter that exclude_from_ddp() has excluded needs the optimizer that averages its "
                    "gradient, got a backward pass after that optimizer was deleted; build model and "
                    "optimizer "
                    "anew."
                )
            return
        if p in self._excluded_params:
            self._arrived[p] = True
        released = released_of(grad)
        if released is not None:
            if released.kept.whole is not None:
                p.grad = _spread(p, released.kept.whole)
            return
        if self._paused or grad.layout is not torch.strided:
            return
        if grad.requires_grad:
            raise RuntimeError(
                "release_gradients=True must not meet a graph of gradients, got one for "
                f"{optimizer._name(p)!r}; call backward() without create_graph=True."
            )
        placements = getattr(grad, "placements", None)
        if placements != getattr(p, "placements", None):
            raise RuntimeError(
                "release_gradients=True needs gradients that are spread as their parameters, got "
                f"{placements} for {optimizer._name(p)!r}; use fully_shard(), or whole gradients."
            )
        kept = self._kept(p)
        if optimizer._ignores(p):
            p.grad = None
        elif self._release(p, kept, _held(grad)):
            p.grad = _spread(p, ReleasedGradient(_held(p), kept))

    def _kept(self, p: Tensor, indices: Tensor | None = None, values: Tensor | None = None) -> _Kept:
        optimizer = self._optimizer()
        assert optimizer is not None
        return _Kept(self, weakref.ref(p), optimizer._name(p), self.stamp, indices, values)

    def _release(self, p: Tensor, kept: _Kept, grad: Tensor) -> bool:
        """Take from the first gradient what will be needed; False where that is the whole of it."""
        optimizer = self._optimizer()
        assert optimizer is not None
        indices = None if self._paused else optimizer._listed(p)
        if indices is not None:
            values = _empty_values(p, indices)
            self._add_listed(kept, values, indices, grad)
            kept.indices, kept.values = indices, values
            return True
        if not self._paused and kept.stamp == self.stamp and self._folded.get(p) == self.stamp:
            raise RuntimeError(
                f"what a statistic has taken cannot be taken back, got another gradient of {kept.name!r} "
                f"after "
                "zero_grad() and before step(); call step() once after what has arrived, or load the last "
                "checkpoint."
            )
        return self._fold(p, grad)

    def _fold(self, p: Tensor, grad: Tensor) -> bool:
        optimizer = self._optimizer()
        assert optimizer is not None
        if self._paused or not optimizer._fold(p, grad):
            return False
        self._folded[p] = self.stamp
        return True

    def _add(self, grad: ReleasedGradient, other: Tensor) -> None:
        """Add a further gradient to one that was released."""
        kept, optimizer = grad.kept, self._optimizer()
        if optimizer is None:
            raise _gone(grad, "nothing can be added to it without its optimizer")
        if kept.values is not None and kept.indices is not None:
            self._add_listed(kept, kept.values, kept.indices, other)
            return
        p = kept.param()
        if p is None or not (kept.is_zero or kept.stamp == self.stamp):
            raise _gone(grad, "nothing can be added to it after that step")
        if not kept.is_zero:
            if not self._fold(p, other):
                raise _gone(grad, "nothing can be added to it any more")
            return
        kept.stamp = self.stamp
        if optimizer._ignores(p):
            return
        if self._release(p, kept, other):
            kept.is_zero = False
        else:
            kept.whole = other.clone()

    def _add_listed(self, kept: _Kept, values: Tensor, indices: Tensor, grad: Tensor) -> None:
        optimizer = self._optimizer()
        assert optimizer is not None
        backend = optimizer._backend(grad.device)
        is_first = kept.values is None
        # of a gradient whose first part was not checked nothing is known
        if self._scaler is not None and (is_first or kept.found_inf is not None):
            # a sum of squares in float64 is finite if all entries of fewer bits are, and needs no copy
            wide = grad.dtype == torch.float64
            finite = grad.isfinite().all() if wide else backend.norm([grad]).isfinite()
            spoiled = finite.logical_not().to(torch.float32)
            kept.found_inf = spoiled if kept.found_inf is None else torch.maximum(kept.found_inf, spoiled)
        backend.gather_([values], [grad], [indices])

    def check(self) -> None:
        """Refuse gradients that were released for another step than the coming one, before anything is
        changed.
        """
        optimizer = self._optimizer()
        assert optimizer is not None
        for p in self._hooks:
            released = released_of(p.grad)
            if released is None:
                continue
            kept, indices = released.kept, optimizer._listed(p)
            if kept.is_zero and indices is not None:
                kept.indices, kept.values = indices, torch.zeros_like(_empty_values(p, indices))
                kept.is_zero = False
            elif not kept.is_zero and (
                kept.indices is not indices or (indices is None and kept.stamp != self.stamp)
            ):
                raise RuntimeError(
                    f"a gradient must be released for the step that uses it, got that of {kept.name!r}, "
                    "released before entries were selected or loaded anew; call zero_grad() after every "
                    "step() and select()."
                )

    def dropped(self, p: Tensor) -> None:
        """Drop a whole gradient that has been observed."""
        p.grad = _spread(p, ReleasedGradient(_held(p), self._kept(p)))

    def attach_scaler(self, scaler: torch.amp.GradScaler) -> None:
        """Check every entry of a gradient before it is released, as this scaler would.

        While observing, gradients then stay whole until `step()`, since a step that is skipped must not
        count.
        """
        if not isinstance(scaler, torch.amp.GradScaler):
            raise TypeError(
                f"scaler must be a torch.amp.GradScaler, got {scaler!r}; pass the one that steps."
            )
        if self._scaler is scaler or not scaler.is_enabled():
            return
        self._scaler = scaler
        self._settle_before_unscaling()

    def _settle_before_unscaling(self) -> None:
        """Ranks have to agree on whether a step is skipped."""
        if self._scaler is None or not self.is_shared:
            return
        unscale = self._scaler._unscale_grads_

        def settled(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            if optimizer is self._optimizer():
                self.settle()
            return unscale(optimizer, *args, **kwargs)

        self._scaler._unscale_grads_ = settled

    # several processes

    @property
    def is_shared(self) -> bool:
        """Whether the optimizer, not DistributedDataParallel, averages the gradients over ranks."""
        return len(self._excluded_params) > 0

    def exclude_from_ddp(self, model: nn.Module, process_group: dist.ProcessGroup | None = None) -> None:
        """Let `DistributedDataParallel` leave the watched parameters alone; call it before wrapping the
        model.

        Their gradients are averaged in `step()`: 4 bytes per selected entry cross the network, once a step,
        however many micro-batches there are. While observing, whole gradients are averaged, or statistics
        once, before entries are selected: until then statistics differ from rank to rank, and a checkpoint of
        one rank is not that of all. Rank 0's weights are sent to all, as DDP does.

        Where the optimizer masks everything that trains, DDP refuses to wrap the model: leave it unwrapped.
        `join()` and subclasses that change gradients in hooks of their own are not supported. With three
        ranks and more the sums may be rounded in another order than DDP's.

        Args:
            model: not yet wrapped. process_group: None for all ranks.

        Raises:
            RuntimeError: without a process group. TypeError: for a model that is wrapped already. ValueError:
                for a model without parameters of this optimizer.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "exclude_from_ddp() needs a process group, got none; call "
                "torch.distributed.init_process_group() first."
            )
        wrapper = nn.parallel.DistributedDataParallel
        if isinstance(model, wrapper):
            raise TypeError(
                "model must not be wrapped yet, got a DistributedDataParallel; call exclude_from_ddp(model) "
                "and then DistributedDataParallel(model)."
            )
        optimizer = self._optimizer()
        assert optimizer is not None
        pairs = list(model.named_parameters(remove_duplicate=False))
        names = [name for name, p in pairs if p in self._watched]
        spread = [name for name in names if hasattr(model.get_parameter(name), "_local_tensor")]
        if spread:
            raise ValueError(
                f"model must hold whole parameters, got a DTensor for {spread[0]!r}; leave the call out, "
                "their gradients are averaged before they are released."
            )
        if not names:
            raise ValueError(
                "model must have parameters of this optimizer, got none; pass the model whose parameters it "
                "trains."
            )
        already = getattr(model, "_ddp_params_and_buffers_to_ignore", ())
        ignored = [*already, *names]
        wrapper._set_params_and_buffers_to_ignore_for_model(model, ignored)  # type: ignore[no-untyped-call]
        for name, p in pairs:
            if p in self._watched:
                self._excluded_params[p] = name
        self._group = process_group
        first = 0 if process_group is None else dist.get_global_rank(process_group, 0)
        for excluded in self._excluded:
            dist.broadcast(excluded.detach(), first, group=process_group)
        self._settle_before_unscaling()
        if not any(p.requires_grad and name not in ignored for name, p in pairs):
            warnings.warn(
                "every parameter that trains is excluded from DistributedDataParallel, which would refuse to "
                "wrap the model; leave it unwrapped: step() averages the gradients.",
                stacklevel=2,
            )

    @torch.no_grad()
    def settle(self) -> None:
        """Average over ranks what arrived since the last time. Every rank has to call it."""
        if not self._excluded:
            return
        later = [p for p in self._watched if p not in self._excluded_params]
        if later:
            raise RuntimeError(
                f"exclude_from_ddp() must know every masked parameter, got {self._label(later[0])} later; "
                "call it after the last change of parameters, on a model that is not wrapped."
            )
        forms = [form_of(p.grad) if p in self._arrived else "none" for p in self._excluded]
        listed, whole, folded = self._present(
            [[form == name for form in forms] for name in ("listed", "whole", "folded")]
        )
        self._arrived.clear()
        both = [p for p in listed if p in set(whole)]
        if both:
            raise RuntimeError(
                f"ranks must release the same gradients, got a whole one of {self._label(both[0])} on some; "
                "do the same on every rank."
            )
        self._check_lists(listed)
        for p in [p for p in listed if form_of(p.grad) != "listed"]:
            # it has no gradient here, but elsewhere
            optimizer = self._optimizer()
            assert optimizer is not None
            indices = optimizer._listed(p)
            assert indices is not None
            values = torch.zeros_like(_empty_values(p, indices))
            p.grad = ReleasedGradient(p, self._kept(p, indices, values))
        for p in [p for p in whole if p.grad is None or type(p.grad) is ReleasedGradient]:
            p.grad = torch.zeros_like(p)
        for p in [p for p in folded if p.grad is None]:
            p.grad = ReleasedGradient(p, self._kept(p))
        released = [p.grad.kept for p in listed if isinstance(p.grad, ReleasedGradient)]
        self._average([kept.values for kept in released if kept.values is not None])
        self._average([p.grad for p in whole if p.grad is not None])
        if self._scaler is not None and released:
            device = self._excluded[0].device
            zero = torch.zeros((), device=device)
            flags = torch.stack([zero if k.found_inf is None else k.found_inf.to(device) for k in released])
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._group)
            for kept, flag in zip(released, flags, strict=True):
                kept.found_inf = flag.clone()

    def _check_lists(self, params: list[Tensor]) -> None:
        """Refuse to average entries of different lists."""
        if not params:
            return
        optimizer = self._optimizer()
        assert optimizer is not None
        lists = [optimizer._listed(p) for p in params]
        sizes = [-1 if indices is None else indices.numel() for indices in lists]
        device = self._excluded[0].device
        extremes = torch.tensor([sizes, [-size for size in sizes]], device=device)
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=self._group)
        for p, most, least in zip(params, *extremes.tolist(), strict=True):
            if most != -least:
                raise RuntimeError(
                    f"ranks must select the same entries, got {-least} to {most} of {self._label(p)}; load "
                    "the same checkpoint on every rank, and exclude_from_ddp() before anything is observed."
                )

    def share_statistics(
        self, states: Mapping[Tensor, Mapping[str, Any]], begin: Callable[[list[Tensor]], object]
    ) -> None:
        """Average over ranks the statistics into which each rank has folded its own gradients.

        Args:
            states: of the parameters. begin: makes a statistic of parameters that have none on this rank.
        """
        (begun,) = self._present([["statistic" in states.get(p, {}) for p in self._excluded]])
        if not begun:
            return
        begin(begun)
        self._average([states[p]["statistic"] for p in begun])
        device = self._excluded[0].device
        flags = torch.stack([states[p]["nonfinite"].to(device, torch.int32) for p in begun])
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._group)
        for p, flag in zip(begun, flags.bool(), strict=True):
            states[p]["nonfinite"].copy_(flag)

    def _present(self, columns: list[list[bool]]) -> list[list[Tensor]]:
        """The parameters whose flag is set on any rank, for each column of flags of excluded parameters."""
        flags = torch.tensor(columns, dtype=torch.int32, device=self._excluded[0].device)
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._group)
        return [
            [p for p, flag in zip(self._excluded, column, strict=True) if flag] for column in flags.tolist()
        ]

    def _average(self, tensors: Sequence[Tensor]) -> None:
        """As DistributedDataParallel does it: each rank's share first, then the sum."""
        share = 1 / dist.get_world_size(self._group)
        device = self._excluded[0].device
        for pieces in _chunks([t.view(-1) if t.is_contiguous() else t for t in tensors]):
            dtype = torch.promote_types(pieces[0].dtype, torch.float32)
            flat = torch.cat([piece.reshape(-1).to(device, dtype) for piece in pieces]).mul_(share)
            dist.all_reduce(flat, group=self._group)
            means = torch.split(flat, [piece.numel() for piece in pieces])
            for piece, mean in zip(pieces, means, strict=True):
                piece.copy_(mean.view(piece.shape))

    def _label(self, p: Tensor) -> str:
        optimizer = self._optimizer()
        return repr(optimizer._name(p)) if optimizer is not None else "a parameter"


def form_of(grad: Tensor | None) -> str:
    """How a gradient is kept: "whole", as "listed" entries, "folded" into a statistic, or "none"."""
    released = released_of(grad)
    if released is None:
        return "none" if grad is None else "whole"
    return "folded" if released.kept.values is None else "listed"


def released_of(grad: Tensor | None) -> ReleasedGradient | None:
    """What stands in for a gradient, or for the part of it that this process holds."""
    own = None if grad is None else _held(grad)
    return own if type(own) is ReleasedGradient else None


def _held(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, itself: `to_local()` may return a view of it."""
    held: Tensor = getattr(tensor, "_local_tensor", tensor)
    return held


def _spread(p: Tensor, held: Tensor) -> Tensor:
    """A gradient of which this process holds so much, spread as its parameter is."""
    if not hasattr(p, "_local_tensor"):
        return held
    from torch.distributed.tensor import DTensor

    # as FSDP2 makes it: from_local() would look at a tensor of which only the selected entries are there
    spread: Tensor = DTensor(held, p._spec, requires_grad=False)  # type: ignore[attr-defined, no-untyped-call]
    return spread


def _empty_values(p: Tensor, indices: Tensor) -> Tensor:
    """[nnz] float32, or float64, of negative zeros: adding to them changes no bit, and no sign."""
    dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
    return torch.full(indices.shape, -0.0, dtype=dtype, device=p.device)


def _chunks(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Pieces of tensors of one dtype, together at most `_CHUNK` entries; what is not flat stays whole."""
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        gathered: list[Tensor] = []
        size = 0
        for tensor in (t for t in tensors if t.dtype == dtype and t.numel()):
            for piece in torch.split(tensor, _CHUNK) if tensor.dim() == 1 else [tensor]:
                if gathered and size + piece.numel() > _CHUNK:
                    yield gathered
                    gathered, size = [], 0
                gathered.append(piece)
                size += piece.numel()
        if gathered:
            yield gathered
