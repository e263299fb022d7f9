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
import random
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparse_optim import (
    ChildTuningAdamW,
    DPSAdamW,
    GradDropAdamW,
    MaskedAdamW,
    SecondOrderAdamW,
    TopK,
    param_groups,
)

# what Trainer's arguments say already, by the name that they have there
_FROM_ARGUMENTS = {
    "lr": "learning_rate",
    "betas": "adam_beta1 and adam_beta2",
    "eps": "adam_epsilon",
    "weight_decay": "weight_decay",
}


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

    Trainer clips to `args.max_grad_norm`, which is 1 unless it is set, by the norm of whole gradients: what
    is not selected then shrinks what is. To clip by what is applied, set it to 0 and give `max_grad_norm`
    here.

    Args:
        optimizer_class: `ChildTuningAdamW`, `DPSAdamW`, `SecondOrderAdamW`, `GradDropAdamW` or `MaskedAdamW`.
        args: the very arguments that Trainer gets. Their learning_rate, adam_beta1, adam_beta2, adam_epsilon
            and weight_decay (0 unless it is set, as with Trainer's own optimizers) are read when the
            optimizer is made, and so is their seed, unless `seed` is given.
        exempt: regular expressions of parameter names that train densely, in place of the paper's.
        options: everything else that the class takes.

    Raises:
        TypeError: for a class that is not of this package, and arguments that are no TrainingArguments.
        ValueError: for an option that `args` holds. What the class refuses it refuses when training begins;
            released gradients on several processes need a parameter that is exempt.

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
        return optimizer


def _method(optimizer_class: type[MaskedAdamW], options: dict[str, Any]) -> str | None:
    """What `param_groups` calls the method."""
    if issubclass(optimizer_class, ChildTuningAdamW):
        return "child_tuning_d" if options.get("variant") == "D" else "child_tuning_f"
    names = {DPSAdamW: "dps", SecondOrderAdamW: "second_order", GradDropAdamW: "grad_drop"}
    return next((name for known, name in names.items() if issubclass(optimizer_class, known)), None)


class SparseOptimCallback(TrainerCallback):
    """Does for an optimizer of this package what Trainer does not: observe, tell of epochs, report.

    - *Observing.* A policy with `Schedule(observe=None)` (`observe_steps=None`) selects before training
      begins: batches of the training set are drawn in an order of their own, their gradients observed, and
      nothing moves. Every random state is afterwards what it was. On resume the masks are in the checkpoint,
      and nothing is observed (`save_only_model=True` saves none, and it is done again).
    - *Epochs.* `optimizer.new_epoch()` is called for policies with `every="epoch"`, once an epoch, however
      often the run is interrupted.
    - *Reports.* Whenever Trainer logs, so are `density`, the share of all entries that the last update
      trained, and `optimizer_state_bytes`; after each selection but the first also `mask_churn`, the share of
      the entries selected before that were left out. `logging_strategy="no"` switches this off.
    - *Clipping.* With `release_gradients=True`, `args.max_grad_norm` becomes `optimizer.max_grad_norm`
      (unless that is set) and is 0 from then on, since Trainer would clip by gradients that are gone.

    Args:
        trainer: which the callback is added to.
        observe_batches: how many batches each process observes, for `Schedule(observe=None)` only; None: the
            whole training set, once.
        observe_batch_size: examples a batch and process; None: `per_device_train_batch_size`. 1 gives the
            papers' sum over examples.
        seed: of the order of these batches and the dropout on them; None: `args.seed`.

    Raises:
        TypeError, ValueError: for what is no Trainer, and bad numbers. When training begins, before any
            weight moves: for an optimizer that is not of this package, sharded training, and what cannot be
            observed.

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

    # what Trainer calls

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check, observe and select."""
        optimizer = self._optimizer()
        self._check(optimizer)
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

    # what it does then

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
                raise ValueError(
                    f"parameters must be whole on every process in this version, got {engine}, which shards "
                    "them; use DistributedDataParallel, which Trainer does without it."
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
                f"{args.max_grad_norm!r} is now 0; give max_grad_norm= to trainer_optimizer() and 0 to "
                "TrainingArguments to say so yourself.",
                stacklevel=3,
            )
            args.max_grad_norm = 0.0
        # Trainer measures the norm for its log even where it clips nothing
        warnings.filterwarnings("ignore", message="the norm of a released gradient is that of its selected")

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
            numbers = {"density": optimizer.density(), "optimizer_state_bytes": _state_bytes(optimizer)}
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


def _state_bytes(optimizer: MaskedAdamW) -> int:
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )


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
