"""Hugging Face's `Trainer` with the optimizers of this package: what makes one, and a callback that goes
along.

    trainer = Trainer(
        model, args, train_dataset=...,
        optimizer_cls_and_kwargs=trainer_optimizer(ChildTuningAdamW, args, variant="D", observe_steps=None),
    )
    trainer.add_callback(SparseOptimCallback(trainer, observe_batches=200))
"""

from __future__ import annotations

import contextlib
import copy
import random
import re
import warnings
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import numpy
import torch
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset
from torch.utils.hooks import RemovableHandle
from tqdm.auto import tqdm
from transformers import (
    DefaultFlowCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import check_target_module_exists, has_length

from sparse_optim import (
    ChildTuningAdamW,
    DPSAdamW,
    GradDropAdamW,
    MaskedAdamW,
    SecondOrderAdamW,
    TopK,
    param_groups,
)
from sparse_optim.integrations.distributed import check_masks
from sparse_optim.nn import WeightMixing

# what Trainer's arguments say already, by the name that they have there
_FROM_ARGUMENTS = {
    "lr": "learning_rate",
    "betas": "adam_beta1 and adam_beta2",
    "eps": "adam_epsilon",
    "weight_decay": "weight_decay",
}
_ADD_CALLBACK = "write trainer.add_callback(SparseOptimCallback(trainer))"
# before each step of these optimizers, until there is a callback
_CHECKS: weakref.WeakKeyDictionary[MaskedAdamW, RemovableHandle] = weakref.WeakKeyDictionary()


def trainer_optimizer(
    optimizer_class: type[MaskedAdamW],
    args: TrainingArguments,
    *,
    exempt: Iterable[str] | None = None,
    **options: Any,
) -> tuple[Any, dict[str, Any]]:
    """What `Trainer(optimizer_cls_and_kwargs=...)` takes, for any optimizer of this package.

    Trainer's own way hands over parameters without names, and knows of no parameters that a method exempts.
    This one gives the optimizer `param_groups(model, method=...)`: names, the usual split of weight decay,
    and the exemptions of the method's paper. It works with `model_init` and hyperparameter search too, since
    nothing is built before Trainer asks for it; and where gradients are released on several processes, it
    calls `exclude_from_ddp` before Trainer wraps the model.

    `args.optim_target_modules` says what is masked in place of the method's exemptions, and means what it
    means to GaLore and APOLLO in transformers: a regular expression that the whole name of a module matches,
    a list of parts of names or such expressions, or "all-linear". The weights of the linear layers that it
    matches are masked, and everything else trains densely: biases, embeddings, norms, other layers.

    Trainer clips to `args.max_grad_norm`, which is 1 unless it is set, by the norm of whole gradients: what
    is not selected then shrinks what is. To clip by what is applied, set it to 0 and give `max_grad_norm`
    here.

    Args:
        optimizer_class: `ChildTuningAdamW`, `DPSAdamW`, `SecondOrderAdamW`, `GradDropAdamW` or `MaskedAdamW`.
        args: the very arguments that Trainer gets. Their learning_rate, adam_beta1, adam_beta2, adam_epsilon
            and weight_decay (0 unless it is set, as with Trainer's own optimizers) are read when the
            optimizer is made, and so is their seed, unless `seed` is given.
        exempt: regular expressions of parameter names that train densely, in place of the paper's; not
            together with `args.optim_target_modules`.
        options: everything else that the class takes.

    Raises:
        TypeError: for a class that is not of this package, and arguments that are no TrainingArguments.
        ValueError: for an option that `args` holds, `exempt` with `args.optim_target_modules`, and sharded
            training. When Trainer makes the optimizer: for what the class refuses, for target modules that
            match no linear layer that trains, and for released gradients on several processes without a
            parameter that is exempt.
        RuntimeError, ValueError: at the first step, before any weight moves, for what works with
            `SparseOptimCallback` only, where there is none: policies with `every="epoch"`, observing before
            training, and `args.max_grad_norm` with released gradients.

    Example:
        >>> from transformers import TrainingArguments
        >>> from sparse_optim import ChildTuningAdamW
        >>> args = TrainingArguments("out", learning_rate=2e-5, weight_decay=0.01, use_cpu=True)
        >>> factory, options = trainer_optimizer(ChildTuningAdamW, args, variant="F", keep=0.3)
        >>> model = torch.nn.ModuleDict({"layer": torch.nn.Linear(4, 4)})
        >>> optimizer = factory()(model, **options)  # as Trainer does
        >>> [(group["param_names"], group["lr"]) for group in optimizer.param_groups]
        [(['layer.weight'], 2e-05), (['layer.bias'], 2e-05)]
    """
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, MaskedAdamW)):
        raise TypeError(
            f"optimizer_class must be a class of sparse_optim, got {optimizer_class!r}; pass "
            "ChildTuningAdamW, DPSAdamW, SecondOrderAdamW, GradDropAdamW or MaskedAdamW."
        )
    if not isinstance(args, TrainingArguments):
        raise TypeError(f"args must be TrainingArguments, got {args!r}; pass those that Trainer gets.")
    for name, source in _FROM_ARGUMENTS.items():
        if name in options:
            raise ValueError(
                f"{name} must come from TrainingArguments, got {name}={options[name]!r}; set {source} there."
            )
    _check_arguments(args, exempt)
    return _Factory, {"optimizer_class": optimizer_class, "args": args, "exempt": exempt, "options": options}


class _Factory:
    """What Trainer takes for a factory: it makes one without arguments, and calls it with the model."""

    def __call__(
        self,
        model: nn.Module,
        *,
        optimizer_class: type[MaskedAdamW],
        args: TrainingArguments,
        exempt: Iterable[str] | None,
        options: dict[str, Any],
    ) -> MaskedAdamW:
        """The optimizer, of the model's parameters."""
        # a search may have changed them
        _check_arguments(args, exempt)
        if args.optim_target_modules is not None:
            exempt = _all_but(_target_weights(model, args.optim_target_modules))
        groups = param_groups(
            model,
            method=_method(optimizer_class, options),
            fidelity=options.get("fidelity", "paper"),
            weight_decay=args.weight_decay,
            exempt=exempt,
        )
        optimizer = optimizer_class(
            groups,
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            **{"seed": args.seed, **options},
        )
        if optimizer.gradient_release is not None and args.world_size > 1:
            if all(group["masked"] for group in optimizer.param_groups):
                raise ValueError(
                    "on several processes some parameters must be exempt where gradients are released, got "
                    "none, and DistributedDataParallel takes no model without one; give exempt= the name of "
                    "one."
                )
            # Trainer wraps the model after this
            optimizer.gradient_release.exclude_from_ddp(model)
        _CHECKS[optimizer] = optimizer.register_step_pre_hook(_NeedsCallback(args))
        return optimizer


def _method(optimizer_class: type[MaskedAdamW], options: dict[str, Any]) -> str | None:
    """What `param_groups` calls the method."""
    if issubclass(optimizer_class, ChildTuningAdamW):
        return "child_tuning_d" if options.get("variant") == "D" else "child_tuning_f"
    names = {DPSAdamW: "dps", SecondOrderAdamW: "second_order", GradDropAdamW: "grad_drop"}
    return next((name for known, name in names.items() if issubclass(optimizer_class, known)), None)


def _check_arguments(args: TrainingArguments, exempt: Iterable[str] | None) -> None:
    if args.optim_target_modules is not None and exempt is not None:
        raise ValueError(
            f"exempt must not come with optim_target_modules, got {exempt!r} and "
            f"{args.optim_target_modules!r}, which both say what is masked; leave one of them out."
        )
    fsdp = bool(args.fsdp) or parse_flag_from_env("ACCELERATE_USE_FSDP")
    for engine, used in (("FSDP", fsdp), ("DeepSpeed", args.deepspeed_plugin is not None)):
        if used:
            raise _sharded(engine)


def _sharded(engine: str) -> ValueError:
    return ValueError(
        f"parameters must be whole on every process in this version, got {engine}, which shards them; use "
        "DistributedDataParallel, which Trainer does without it."
    )


def _target_weights(model: nn.Module, targets: Any) -> list[str]:
    """Names of the weights that `optim_target_modules` means: those of linear layers, as with GaLore."""
    if not isinstance(targets, str | list):
        raise TypeError(
            "optim_target_modules must be a list of names, a regular expression or 'all-linear', got "
            f"{targets!r}; write ['query', 'value'], for example."
        )
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    # an output layer that is tied to the embeddings is one of these, as in `param_groups`
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    linear = {
        name: names[id(module.weight)]
        for name, module in model.named_modules()
        # GPT-2's linear layers have a class of their own
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
        and id(module.weight) in names.keys() - embedded
    }
    if isinstance(targets, str) and targets.replace("_", "-") == "all-linear":
        matched = {targets: list(linear)}
    else:
        # in a list each has to be good for something; a string is a regular expression, its parts are not
        parts = [(targets, targets)] if isinstance(targets, str) else [(part, [part]) for part in targets]
        try:
            matched = {
                part: [name for name in linear if check_target_module_exists(target, name)]
                for part, target in parts
            }
        except (re.error, TypeError) as error:
            raise ValueError(
                f"optim_target_modules must be names or regular expressions, got {targets!r} ({error}); "
                "escape what is meant literally."
            ) from error
    idle = next((part for part in matched if not matched[part]), None)
    if idle is not None or not matched:
        found = ", ".join(list(dict.fromkeys(name.rpartition(".")[2] for name in linear))[:8]) or "none"
        raise ValueError(
            f"optim_target_modules must match linear layers that train, got {idle if matched else targets!r} "
            f"in {type(model).__name__}, where those are called {found}; give names of theirs, or "
            "the string 'all-linear'."
        )
    return [linear[name] for modules in matched.values() for name in modules]


def _all_but(names: Iterable[str]) -> list[str]:
    """What `param_groups` takes to exempt every parameter but these."""
    return [rf"^(?!(?:{'|'.join(re.escape(name) for name in names)})$)"]


class _NeedsCallback:
    """Refuses, before the first step changes anything, what only `SparseOptimCallback` makes work."""

    def __init__(self, args: TrainingArguments) -> None:
        self._args = args

    def __call__(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """What `torch.optim` calls before every step."""
        if getattr(optimizer.policy, "every", None) == "epoch" and _number(optimizer, "epoch") == 0:
            raise RuntimeError(
                "every='epoch' needs SparseOptimCallback under Trainer, got no call of "
                f"optimizer.new_epoch(); {_ADD_CALLBACK}, or give every= a number of steps."
            )
        if _observes_explicitly(optimizer) and _number(optimizer, "phase") == 0:
            if not any("statistic" in state for state in optimizer.state.values()):
                raise RuntimeError(
                    "observe_steps=None needs SparseOptimCallback under Trainer, got nothing observed; "
                    f"{_ADD_CALLBACK}, or observe while training with observe_steps=n."
                )
        if optimizer.release_gradients and self._args.max_grad_norm > 0:
            raise ValueError(
                "max_grad_norm of TrainingArguments must be 0 where gradients are released, got "
                f"{self._args.max_grad_norm!r}; {_ADD_CALLBACK}, which hands it to the optimizer, or give "
                "max_grad_norm= to trainer_optimizer() and 0 to TrainingArguments."
            )


class SparseOptimCallback(TrainerCallback):
    """Does for an optimizer of this package what Trainer does not: observe, tell of epochs, report.

    - *Observing.* A policy with `Schedule(observe=None)` (`observe_steps=None`) selects before training
      begins: batches of the training set are drawn in an order of their own, their gradients observed, and
      nothing moves. Every random state is afterwards what it was. On resume the masks are in the checkpoint,
      and nothing is observed (`save_only_model=True` saves none, and it is done again).
    - *Epochs.* `optimizer.new_epoch()` is called for policies with `every="epoch"`, once an epoch, however
      often the run is interrupted.
    - *Reports.* Whenever Trainer logs, and for `mask_churn` after each selection but the first, this goes to
      `Trainer.log`:

      | | |
      | --- | --- |
      | `density` | the share of all entries that the last update trained |
      | `masked_grad_norm` | 2-norm of the gradient at the entries that it trained |
      | `dense_grad_norm` | 2-norm of the whole gradient; not where any of it was released |
      | `optimizer_state_bytes` | of all tensors in the optimizer's state |
      | `mask_churn` | the share of the entries selected before that were left out |

      Norms are of what `step()` got: accumulated, averaged over processes, and *after* Trainer has clipped to
      `args.max_grad_norm`, while its own `grad_norm` is from before; the optimizer's own `max_grad_norm`
      comes after them. An entry that is not selected counts in the dense norm alone, also where momentum
      moves it. Where another callback decides on a log after the step, it has no norms.
      `logging_strategy="no"` switches all of this off.
    - *Clipping.* With `release_gradients=True`, `args.max_grad_norm` becomes `optimizer.max_grad_norm`
      (unless that is set) and is 0 while training, since Trainer would clip by gradients that are gone.

    Args:
        trainer: which the callback is added to.
        observe_batches: how many batches each process observes, for `Schedule(observe=None)` only; None: the
            whole training set, once.
        observe_batch_size: examples a batch and process; None: `per_device_train_batch_size`. 1 gives the
            papers' sum over examples.
        seed: of the order of these batches and the dropout on them; None: `args.seed`.
        mixing: the handle of `sparse_optim.nn.mix_weights(trainer.model, trainer.create_optimizer())`, for
            `DPSAdamW(variant="mix")`: checkpoints then hold what it remembers, and resuming loads it. Call
            `handle.remove()` before the model is saved for others.

    Raises:
        TypeError, ValueError: for what is no Trainer, a handle of another optimizer, and bad numbers. When
            training begins, before any weight moves: for an optimizer that is not of this package or not of
            this model, a second such callback, sharded training, and what cannot be observed.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
        >>> from sparse_optim import SecondOrderAdamW
        >>> args = TrainingArguments("out", use_cpu=True)
        >>> optimizer = trainer_optimizer(SecondOrderAdamW, args, observe_steps=None)
        >>> small = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        >>> model = BertForSequenceClassification(small)
        >>> trainer = Trainer(model, args, optimizer_cls_and_kwargs=optimizer)
        >>> trainer.add_callback(SparseOptimCallback(trainer, observe_batches=100))
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        observe_batches: int | None = None,
        observe_batch_size: int | None = None,
        seed: int | None = None,
        mixing: WeightMixing | None = None,
    ) -> None:
        if not isinstance(trainer, Trainer):
            raise TypeError(
                f"trainer must be a transformers.Trainer, got {trainer!r}; write "
                "trainer.add_callback(SparseOptimCallback(trainer))."
            )
        for name, value in (("observe_batches", observe_batches), ("observe_batch_size", observe_batch_size)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a positive integer, got {value!r}; or leave it None.")
        self._trainer = trainer
        self._batches, self._batch_size, self._seed = observe_batches, observe_batch_size, seed
        self._epoch_goes_on = False
        self._selection: dict[Tensor, Tensor] = {}
        self._steps_per_epoch = 0
        # the step that they belong to, and the norms
        self._norms: tuple[int, dict[str, float]] = (0, {})
        # of masks, among processes
        self._comparing: RemovableHandle | None = None
        # of Trainer's arguments, while the optimizer clips instead
        self._max_grad_norm: float | None = None
        self._mixed: MaskedAdamW | None = None
        if mixing is not None:
            self._save_mixing(mixing)

    # what Trainer calls

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check, observe and select."""
        if kwargs.get("optimizer", self._trainer.optimizer) is not self._trainer.optimizer:
            raise ValueError(
                f"trainer must be the one that the callback is added to, got another one; {_ADD_CALLBACK}."
            )
        optimizer = self._optimizer()
        self._check(optimizer)
        check = _CHECKS.pop(optimizer, None)
        if check is not None:
            check.remove()
        # a run that failed did not
        self._give_clipping_back(args)
        self._end_comparing()
        self._norms = (0, {})
        if args.world_size > 1:
            self._comparing = check_masks(optimizer)
        loader = kwargs.get("train_dataloader")
        batches = len(loader) if loader is not None and has_length(loader) else 0
        self._steps_per_epoch = -(-batches // args.gradient_accumulation_steps)
        scaler = getattr(self._trainer.optimizer, "scaler", None)
        if scaler is not None:
            optimizer.attach_scaler(scaler)
        if optimizer.release_gradients:
            self._move_clipping(optimizer, args)
        if _observes_explicitly(optimizer) and _number(optimizer, "phase") == 0:
            self._observe(optimizer, kwargs["train_dataloader"])
        # where Trainer was interrupted within an epoch, it begins that epoch once more
        within = state.global_step > 0 and state.epoch is not None and state.epoch != int(state.epoch)
        self._epoch_goes_on = within and _number(optimizer, "epoch") > 0
        self._selection = _selection(optimizer)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the optimizer, where its policy asks for that."""
        optimizer = self._optimizer()
        if getattr(optimizer.policy, "every", None) == "epoch" and not self._epoch_goes_on:
            optimizer.new_epoch()
        self._epoch_goes_on = False

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure gradients, which are gone when Trainer logs."""
        # after the step, which averages released gradients over processes and unscales those of fp16
        if args.logging_strategy != "no" and (control.should_log or self._will_log(args, state)):
            self._norms = (state.global_step + 1, _gradient_norms(self._optimizer()))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Report."""
        self._report(args, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Report, where logs are written once an epoch."""
        if args.logging_strategy == "epoch":
            self._report(args, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave nothing for the next run, of a search for one."""
        self._give_clipping_back(args)
        self._end_comparing()
        self._selection, self._norms = {}, (0, {})

    # what it does then

    def _end_comparing(self) -> None:
        if self._comparing is not None:
            self._comparing.remove()
        self._comparing = None

    def _optimizer(self) -> MaskedAdamW:
        # accelerate wraps it
        optimizer: Any = self._trainer.optimizer
        while not isinstance(optimizer, MaskedAdamW) and hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        if not isinstance(optimizer, MaskedAdamW):
            raise TypeError(
                f"SparseOptimCallback needs an optimizer of sparse_optim, got {type(optimizer).__name__}; "
                "give Trainer optimizer_cls_and_kwargs=trainer_optimizer(...), or leave the callback out."
            )
        return optimizer

    def _check(self, optimizer: MaskedAdamW) -> None:
        trainer, policy = self._trainer, optimizer.policy
        for engine, used in (
            ("DeepSpeed", trainer.is_deepspeed_enabled),
            ("FSDP", trainer.is_fsdp_enabled or trainer.is_fsdp_xla_enabled),
        ):
            if used:
                raise _sharded(engine)
        callbacks = [c for c in trainer.callback_handler.callbacks if isinstance(c, SparseOptimCallback)]
        if len(callbacks) > 1:
            raise ValueError(
                f"Trainer must have one SparseOptimCallback, got {len(callbacks)}; leave the others out."
            )
        if self._mixed not in (None, optimizer):
            raise ValueError(
                "mixing must be of the optimizer that trains, got the handle of another; mix the weights of "
                "trainer.model with trainer.create_optimizer(), and give Trainer a model instead of "
                "model_init."
            )
        # flat partitions, and whatever else is not the model's
        model: Any = trainer.model
        own = {id(p) for p in model.parameters()}
        others = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in own]
        if others:
            raise ValueError(
                f"parameters of the optimizer must be those of the model, got {len(others)} others, the "
                f"first of shape {tuple(others[0].shape)}; let Trainer make the optimizer, with "
                "optimizer_cls_and_kwargs=trainer_optimizer(...)."
            )
        explicit = _observes_explicitly(optimizer)
        if not explicit and (self._batches, self._batch_size) != (None, None):
            raise ValueError(
                f"observe_batches and observe_batch_size need a TopK policy with Schedule(observe=None), got "
                f"policy={policy!r}; leave them out, or give observe_steps=None to the optimizer."
            )
        if isinstance(policy, TopK) and policy.statistic.needs_curvature and not explicit:
            raise ValueError(
                f"{type(policy.statistic).__name__} must be observed before training under Trainer, got "
                f"observe={policy.schedule.observe!r}; give observe_steps=None to the optimizer."
            )
        if explicit and getattr(trainer.optimizer, "scaler", None) is not None:
            raise ValueError(
                "observing before training needs gradients that are not scaled, got fp16=True; use "
                "bf16=True, or observe while training with observe_steps=n."
            )

    def _move_clipping(self, optimizer: MaskedAdamW, args: TrainingArguments) -> None:
        if args.max_grad_norm > 0:
            if optimizer.max_grad_norm is None:
                optimizer.max_grad_norm = args.max_grad_norm
            warnings.warn(
                f"gradients are released, so the optimizer clips them, to max_grad_norm="
                f"{optimizer.max_grad_norm!r} of what it applies, and args.max_grad_norm="
                f"{args.max_grad_norm!r} is 0 while it trains; give max_grad_norm= to trainer_optimizer() "
                "and 0 to TrainingArguments to say so yourself.",
                stacklevel=3,
            )
            self._max_grad_norm, args.max_grad_norm = args.max_grad_norm, 0.0
        # Trainer measures the norm for its log even where it clips nothing
        warnings.filterwarnings("ignore", message="the norm of a released gradient is that of its selected")

    def _give_clipping_back(self, args: TrainingArguments) -> None:
        """What the arguments said before, which the optimizer of another run has to be told too."""
        if self._max_grad_norm is not None and args.max_grad_norm == 0:
            args.max_grad_norm = self._max_grad_norm
        self._max_grad_norm = None

    def _save_mixing(self, mixing: WeightMixing) -> None:
        """Let the optimizer's state dict hold what the handle remembers."""
        if not isinstance(mixing, WeightMixing):
            raise TypeError(
                f"mixing must be the handle of mix_weights(), got {mixing!r}; pass what it returns."
            )
        if self._trainer.optimizer is None:
            raise ValueError(
                "mixing must be of the optimizer that trains, got a handle before Trainer has one; write "
                "mixing=mix_weights(trainer.model, trainer.create_optimizer())."
            )

        def save(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
            return {**state_dict, "weight_mixing": mixing.state_dict()}

        def load(_: Any, state_dict: dict[str, Any]) -> None:
            # a copy, one level deep
            if "weight_mixing" in state_dict:
                mixing.load_state_dict(state_dict.pop("weight_mixing"))

        self._mixed = self._optimizer()
        self._mixed.register_state_dict_post_hook(save)
        self._mixed.register_load_state_dict_pre_hook(load)

    def _will_log(self, args: TrainingArguments, state: TrainerState) -> bool:
        """Whether Trainer logs after the step that `state` does not count yet."""
        coming, flow = copy.copy(state), TrainerControl()
        coming.global_step += 1
        DefaultFlowCallback().on_step_end(args, coming, flow)
        if args.logging_strategy != "epoch":
            return bool(flow.should_log)
        ends = self._steps_per_epoch > 0 and coming.global_step % self._steps_per_epoch == 0
        return bool(flow.should_log or flow.should_training_stop or ends)

    def _observe(self, optimizer: MaskedAdamW, train_dataloader: Any) -> None:
        """Observe batches and select; everything else stays as it was, the optimizer too when this fails."""
        trainer, args, policy = self._trainer, self._trainer.args, optimizer.policy
        assert isinstance(policy, TopK)
        seed = args.seed if self._seed is None else self._seed
        loader = self._loader(train_dataloader, seed)
        count = self._batches
        if not isinstance(loader.dataset, IterableDataset):
            if count is not None and count > len(loader):
                raise ValueError(
                    f"observe_batches must be at most the {len(loader)} batches of the training set, got "
                    f"{count}; None observes it once."
                )
            count = len(loader) if count is None else count
        elif count is None:
            raise ValueError(
                "observe_batches must be given for a training set without a length, got None; the authors of "
                "SecondOrderAdamW's method observe 599."
            )
        model = trainer.model_wrapped
        whole = (
            contextlib.nullcontext()
            if optimizer.gradient_release is None
            else optimizer.gradient_release.paused()
        )
        bar = tqdm(
            total=count, desc="observing", unit="batch", delay=2,
            disable=args.disable_tqdm or not trainer.is_local_process_zero(),
        )  # fmt: skip
        before = optimizer.state_dict()
        try:
            with bar, whole, _as_it_was(model, seed):
                model.train()
                for _, inputs in zip(range(count), loader, strict=False):
                    inputs = trainer._prepare_inputs(inputs)
                    with trainer.compute_loss_context_manager():
                        loss: Any = trainer.compute_loss(model, inputs)
                    loss = loss.mean()  # of several GPUs
                    if policy.statistic.needs_curvature:
                        optimizer.observe_curvature(loss)
                    loss.backward()
                    optimizer.observe()
                    model.zero_grad()
                    bar.update()
            optimizer.select()
        except BaseException:
            model.zero_grad()
            optimizer.load_state_dict(before)
            raise

    def _loader(self, train_dataloader: Any, seed: int) -> DataLoader[Any]:
        """Batches of the training set in an order of their own, each process its share."""
        args, dataset = self._trainer.args, train_dataloader.dataset
        generator = torch.Generator().manual_seed(seed)
        if not isinstance(dataset, IterableDataset):
            order = torch.randperm(len(dataset), generator=generator)
            order = order[: max(1, len(order) // args.world_size) * args.world_size]
            dataset = Subset(dataset, order[args.process_index :: args.world_size].tolist())
        return DataLoader(
            dataset,
            batch_size=args.train_batch_size if self._batch_size is None else self._batch_size,
            collate_fn=train_dataloader.collate_fn,
            num_workers=args.dataloader_num_workers,
            generator=generator,
        )

    def _report(self, args: TrainingArguments, control: TrainerControl) -> None:
        if args.logging_strategy == "no":
            return
        optimizer, numbers = self._optimizer(), {}
        if control.should_log:
            numbers = {"density": optimizer.density(), "optimizer_state_bytes": optimizer.state_bytes()}
            step, norms = self._norms
            if step == self._trainer.state.global_step:
                numbers |= norms
        selection = _selection(optimizer)
        if selection and any(selection[p] is not self._selection.get(p) for p in selection):
            if self._selection:
                numbers["mask_churn"] = _churn(self._selection, selection)
            self._selection = selection
        if numbers:
            should_log = control.should_log
            self._trainer.log(numbers)
            # logging takes it for done, and Trainer would leave its own numbers out
            control.should_log = should_log


def _number(optimizer: MaskedAdamW, name: str) -> int:
    """One of the numbers that are equal in every group."""
    return int(optimizer.param_groups[0][name])


def _observes_explicitly(optimizer: MaskedAdamW) -> bool:
    policy = optimizer.policy
    return isinstance(policy, TopK) and not policy.trains_everything and policy.schedule.observe is None


@contextlib.contextmanager
def _as_it_was(model: nn.Module, seed: int) -> Iterator[None]:
    """Random numbers from `seed`; afterwards generators, modes and buffers of the model are as before."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    python, legacy = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        numpy.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(legacy)
            for module, mode in modes:
                module.training = mode
            with torch.no_grad():
                for buffer, saved in buffers:
                    buffer.copy_(saved)


@torch.no_grad()
def _gradient_norms(optimizer: MaskedAdamW) -> dict[str, float]:
    """Of the gradients that the last step got, at the entries that it trained and, where all are there, of
    all.
    """
    masked: list[Tensor] = []
    dense: list[Tensor] = []
    released = False

    def squares(grad: Tensor) -> Tensor:
        # a sum in float64, as for `max_grad_norm`: torch's own norm of a large tensor loses digits
        if grad.is_complex():
            grad = torch.view_as_real(grad)
        total: Tensor = optimizer._backend(grad.device).norm([grad])
        return total

    for p in (p for group in optimizer.param_groups for p in group["params"]):
        kept = getattr(p.grad, "kept", None)
        if kept is not None:
            released = True
            # what went into a statistic trained nothing
            if kept.values is not None:
                masked.append(squares(kept.values))
        elif p.grad is not None:
            dense.append(squares(p.grad))
            masked.append(squares(p.grad.masked_fill(~optimizer.mask(p), 0)))
    norms = {"masked_grad_norm": _root(masked)}
    return norms if released else norms | {"dense_grad_norm": _root(dense)}


def _root(squares: list[Tensor]) -> float:
    return float(torch.stack([s.to(squares[0].device) for s in squares]).sum().sqrt()) if squares else 0.0


def _selection(optimizer: MaskedAdamW) -> dict[Tensor, Tensor]:
    """The lists or bits of what is selected, which every selection makes anew."""
    masks: dict[Tensor, Tensor] = {}
    for p, state in optimizer.state.items():
        mask = state.get("indices", state.get("bits"))
        if mask is not None:
            masks[p] = mask
    return masks


def _churn(before: dict[Tensor, Tensor], after: dict[Tensor, Tensor]) -> float:
    """The share of the entries selected before that are so no more."""

    def size(mask: Tensor) -> int:
        # bits are bytes, and lists are not
        return int(numpy.unpackbits(mask.cpu().numpy()).sum()) if mask.dtype == torch.uint8 else mask.numel()

    stayed = 0
    for p, mask in after.items():
        old = before.get(p)
        if old is not None:
            stayed += size(old & mask) if mask.dtype == torch.uint8 else int(torch.isin(old, mask).sum())
    return 1 - stayed / max(1, sum(size(mask) for mask in before.values()))
