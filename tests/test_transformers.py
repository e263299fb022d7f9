"""Trainer with the optimizers of this package: the factory, the callback, and runs that are interrupted."""

import copy
import os
import random
import socket

import numpy
import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5")
pytest.importorskip("accelerate")

from sparse_optim import (  # noqa: E402
    Bernoulli,
    ChildTuningAdamW,
    DPSAdamW,
    GradDropAdamW,
    GradualUnfreezing,
    MaskedAdamW,
    Schedule,
    SecondOrderAdamW,
    SignedGradient,
    SquaredGradient,
    TopK,
    param_groups,
)
from sparse_optim.integrations.transformers import SparseOptimCallback, trainer_optimizer  # noqa: E402

EXAMPLES, BATCH = 16, 4
STEPS_PER_EPOCH = EXAMPLES // BATCH
LENGTH = 6


class Examples(torch.utils.data.Dataset):
    """Sequences whose label is whether their first token is large."""

    def __init__(self, size=EXAMPLES):
        tokens = torch.randint(5, 40, (size, LENGTH), generator=torch.Generator().manual_seed(1))
        self.examples = [{"input_ids": row, "labels": int(row[0] > 20)} for row in tokens]
        self.fails_at = -1
        self.given = 0

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, i):
        self.given += 1
        if self.given == self.fails_at:
            raise OSError("the disk is gone")
        return self.examples[i]


def make_model(dropout=0.0, dtype=torch.float32):
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=8, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    torch.manual_seed(3)
    return transformers.BertForSequenceClassification(config).to(dtype)


def arguments(folder, **changes):
    return transformers.TrainingArguments(
        **{
            "output_dir": str(folder), "use_cpu": True, "report_to": "none", "disable_tqdm": True,
            "per_device_train_batch_size": BATCH, "num_train_epochs": 2, "learning_rate": 1e-2,
            "weight_decay": 0.1, "logging_steps": 1, "save_strategy": "no", "seed": 5,
        } | changes
    )  # fmt: skip


def make_trainer(
    folder,
    optimizer_class,
    *,
    observe=None,
    model=None,
    data=None,
    before=(),
    after=(),
    extra=None,
    **options,
):
    """`observe` are arguments of the callback, `extra` those of TrainingArguments and Trainer."""
    extra = dict(extra or {})
    own = {name: extra.pop(name) for name in ("eval_dataset", "data_collator") if name in extra}
    args = arguments(folder, **extra)
    trainer = transformers.Trainer(
        make_model() if model is None else model, args, train_dataset=data or Examples(),
        callbacks=list(before),
        optimizer_cls_and_kwargs=trainer_optimizer(optimizer_class, args, **options), **own,
    )  # fmt: skip
    trainer.add_callback(SparseOptimCallback(trainer, **(observe or {})))
    for callback in after:
        trainer.add_callback(callback)
    return trainer


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert different == []


def ours(trainer):
    return trainer.optimizer.optimizer


def logged(trainer):
    """What was logged but for times."""
    return [entry for entry in trainer.state.log_history if "train_runtime" not in entry]


METHODS = {
    "child_tuning_f": (ChildTuningAdamW, {"variant": "F", "keep": 0.5}),
    "child_tuning_d": (ChildTuningAdamW, {"variant": "D", "observe_steps": 3}),
    "child_tuning_d_release": (ChildTuningAdamW, {"variant": "D", "observe_steps": 3, "fidelity": "release"}),
    "dps": (DPSAdamW, {"variant": "dense", "update_steps": 2}),
    "second_order": (SecondOrderAdamW, {"observe_steps": 3, "density": 0.1}),
    "grad_drop": (GradDropAdamW, {"keep": 0.5, "granularity": "layer", "refresh": "epoch"}),
    "gradual_unfreezing": (MaskedAdamW, {"policy": GradualUnfreezing()}),
    "again_and_again": (MaskedAdamW, {"policy": TopK(0.2, schedule=Schedule(observe=2, train=1))}),
}
NAMES = {"dps": "dps", "second_order": "second_order", "grad_drop": "grad_drop"} | {
    name: name.removesuffix("_release") for name in METHODS if name.startswith("child")
}


# the factory


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_trainer_ends_at_the_weights_of_a_plain_loop(tmp_path, name, accumulation):
    optimizer_class, options = METHODS[name]
    batches = []

    def collate(examples):
        batches.append(transformers.default_data_collator(examples))
        return dict(batches[-1])

    extra = {"gradient_accumulation_steps": accumulation, "data_collator": collate, "num_train_epochs": 3}
    trainer = make_trainer(tmp_path, optimizer_class, extra=extra, **options)
    trainer.train()
    assert len(batches) == 3 * STEPS_PER_EPOCH

    model = make_model()
    groups = param_groups(
        model, method=NAMES.get(name), weight_decay=0.1, fidelity=options.get("fidelity", "paper")
    )
    optimizer = optimizer_class(groups, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, seed=5, **options)
    steps = len(batches) // accumulation
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 0, steps)
    model.train()
    for i, batch in enumerate(batches):
        if i % STEPS_PER_EPOCH == 0:
            optimizer.new_epoch()
        # undivided: Trainer takes it that this model divides by num_items_in_batch, which it does not
        model(**batch).loss.backward()
        if (i + 1) % accumulation == 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            model.zero_grad()
    moved = {n for n, p in make_model().named_parameters() if not torch.equal(p, weights(trainer)[n])}
    assert moved
    assert_same(weights(trainer), {n: p.detach() for n, p in model.named_parameters()})


def test_the_numbers_are_those_of_the_arguments_when_the_optimizer_is_made(tmp_path):
    trainer = make_trainer(
        tmp_path, ChildTuningAdamW, variant="F", exempt=[r"embeddings"],
        extra={"adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-5},
    )  # fmt: skip
    trainer.args.learning_rate = 0.125  # as a hyperparameter search does
    optimizer = trainer.create_optimizer()
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["seed"]) == (0.125, (0.8, 0.9), 1e-5, 5)
    masked = {name: g["masked"] for g in optimizer.param_groups for name in g["param_names"]}
    assert masked.keys() == dict(trainer.model.named_parameters()).keys()
    assert {name for name in masked if not masked[name]} == {name for name in masked if "embeddings" in name}
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.1, 0.0}


def test_it_works_with_model_init_and_a_seed_of_its_own(tmp_path):
    args = arguments(tmp_path, max_steps=1)
    trainer = transformers.Trainer(
        model_init=lambda: make_model(), args=args, train_dataset=Examples(),
        optimizer_cls_and_kwargs=trainer_optimizer(GradDropAdamW, args, keep=0.5, seed=17),
    )  # fmt: skip
    trainer.train()
    assert ours(trainer).param_groups[0]["seed"] == 17


# interrupted and resumed

RESUMED = {
    **{name: (options[0], options[1], None, {}) for name, options in METHODS.items()},
    "observed_before": (
        ChildTuningAdamW,
        {"variant": "D", "observe_steps": None},
        {"observe_batches": 3},
        {},
    ),
    "bfloat16": (SecondOrderAdamW, {"observe_steps": 3}, None, {"dtype": torch.bfloat16}),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_bit_equal_to_one_that_was_not_interrupted(tmp_path, name):
    optimizer_class, options, observe, model_options = RESUMED[name]

    def build(folder, **extra):
        return make_trainer(
            tmp_path / folder, optimizer_class, observe=observe, extra={"num_train_epochs": 2} | extra,
            model=make_model(dropout=0.1, **model_options), **options,
        )  # fmt: skip

    whole = build("whole", save_strategy="steps", save_steps=1)
    whole.train()
    # while observing, at the selection, at the end of an epoch, while training
    for step in (1, 3, STEPS_PER_EPOCH, 6):
        resumed = build(f"from{step}")
        for p in resumed.model.parameters():
            p.data.zero_()
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert_same(weights(whole), weights(resumed))
        assert logged(whole) == logged(resumed)
        assert len([e for e in logged(whole) if "loss" in e]) == 2 * STEPS_PER_EPOCH


# observing before training


class Probe(transformers.TrainerCallback):
    """What the world looks like when training begins."""

    def on_train_begin(self, args, state, control, model, train_dataloader, **kwargs):
        self.given = train_dataloader.dataset.given
        self.randomness = (torch.get_rng_state(), numpy.random.get_state(), random.getstate())
        self.modes = [module.training for module in model.modules()]
        self.tensors = copy.deepcopy(model.state_dict())
        self.gradients = [p.grad for p in model.parameters()]


class Probe2(Probe):
    """Trainer refuses two callbacks of one class with a warning."""


def test_observing_before_training_leaves_all_but_the_optimizer_as_it_was(tmp_path):
    before, after, model = Probe(), Probe2(), make_model(dropout=0.3)
    model.bert.encoder.layer[0].eval()
    # reads all three generators, and counts in a buffer as batch normalisation does
    model.register_buffer("seen", torch.zeros(()))

    def collate(examples):
        model.seen += random.random() + numpy.random.rand() + float(torch.rand(()))
        return transformers.default_data_collator(examples)

    trainer = make_trainer(
        tmp_path, SecondOrderAdamW, observe_steps=None, model=model, observe={"observe_batches": 2},
        before=[before], after=[after], extra={"max_steps": 1, "data_collator": collate},
    )  # fmt: skip
    trainer.train()
    assert torch.equal(before.randomness[0], after.randomness[0])
    assert all(
        numpy.array_equal(a, b) for a, b in zip(before.randomness[1], after.randomness[1], strict=True)
    )
    assert before.randomness[2] == after.randomness[2]
    assert before.modes == after.modes
    assert False in before.modes
    assert_same(before.tensors, after.tensors)
    assert set(after.gradients) == {None}
    assert (before.given, after.given) == (0, 2 * BATCH)


@pytest.mark.parametrize("release", [False, True])
def test_what_is_observed_are_the_gradients_of_the_training_set(tmp_path, release):
    options = {"release_gradients": True, "max_grad_norm": 1.0} if release else {}
    trainer = make_trainer(
        tmp_path, MaskedAdamW, policy=TopK(0.1, schedule=Schedule()), observe={"observe_batch_size": 1},
        extra={"max_steps": 1, "max_grad_norm": 0.0}, **options,
    )  # fmt: skip
    trainer.train()
    model, data = make_model(), Examples()
    fisher = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for example in data.examples:
        model.zero_grad()
        model(**transformers.default_data_collator([example])).loss.backward()
        for name, p in model.named_parameters():
            fisher[name] += p.grad**2
    flat = torch.cat([f.flatten() for f in fisher.values()])
    threshold = flat.sort(descending=True).values[int(0.1 * len(flat)) - 1]
    wrong = sum(
        int((ours(trainer).mask(p) != (fisher[name] >= threshold)).sum())
        for name, p in trainer.model.named_parameters()
    )
    # sums in another order may exchange the last two
    assert wrong <= 2


def test_the_seed_decides_on_the_dropout_of_the_observing_pass(tmp_path):
    masks = []
    for seed in (1, 1, 2):
        # one batch of everything: the order alone changes next to nothing
        trainer = make_trainer(
            tmp_path, MaskedAdamW, policy=TopK(0.1, schedule=Schedule()), model=make_model(dropout=0.5),
            observe={"observe_batch_size": EXAMPLES, "seed": seed}, extra={"max_steps": 1},
        )  # fmt: skip
        trainer.train()
        masks.append(torch.cat([ours(trainer).mask(p).flatten() for p in trainer.model.parameters()]))
    assert torch.equal(masks[0], masks[1])
    assert int((masks[0] != masks[2]).sum()) > 20


def test_a_pass_that_fails_leaves_nothing_behind(tmp_path):
    def build():
        return make_trainer(
            tmp_path, ChildTuningAdamW, variant="D", observe_steps=None, extra={"num_train_epochs": 1}
        )

    clean = build()
    clean.train()
    failing = build()
    failing.train_dataset.fails_at = 10
    with pytest.raises(OSError, match="the disk is gone"):
        failing.train()
    failing.train()
    assert_same(weights(clean), weights(failing))


def test_curvature_is_observed_where_the_method_needs_it(tmp_path):
    model = make_model()
    model.set_attn_implementation("eager")
    trainer = make_trainer(
        tmp_path, SecondOrderAdamW, observe_steps=None, curvature="hutchinson", model=model, density=0.1,
        observe={"observe_batches": 2}, extra={"max_steps": 2},
    )  # fmt: skip
    trainer.train()
    assert 0.05 < ours(trainer).density() < 0.2


# reports


class Masks(transformers.TrainerCallback):
    """Every mask, from the optimizer itself."""

    def __init__(self):
        self.taken = []

    def on_step_end(self, args, state, control, optimizer, model, **kwargs):
        mask = optimizer.optimizer.mask
        self.taken.append(torch.cat([mask(p).flatten() for p in model.parameters()]))


@pytest.mark.parametrize("name", ["dps", "again_and_again"])
def test_reported_numbers_are_right(tmp_path, name):
    optimizer_class, options = METHODS[name]
    masks = Masks()
    trainer = make_trainer(tmp_path, optimizer_class, after=[masks], **options)
    trainer.train()
    density = [entry["density"] for entry in logged(trainer) if "density" in entry]
    assert density == pytest.approx([mask.double().mean().item() for mask in masks.taken])
    assert len(density) == 2 * STEPS_PER_EPOCH
    losses = [entry["step"] for entry in logged(trainer) if "loss" in entry]
    assert losses == list(range(1, 2 * STEPS_PER_EPOCH + 1))
    # selections end steps 2 and 6 of DPS, and 2, 5 and 8 of the other; their masks show in the step after
    churn = {entry["step"]: entry["mask_churn"] for entry in logged(trainer) if "mask_churn" in entry}
    assert list(churn) == ([6] if name == "dps" else [5, 8])
    old, new = (masks.taken[i] for i in ((2, 6) if name == "dps" else (2, 5)))
    if name == "dps":  # what is not masked always trains, and is no part of a selection
        masked = torch.cat([
            torch.full((p.numel(),), any(p is q for q in group))
            for group in [[q for g in ours(trainer).param_groups if g["masked"] for q in g["params"]]]
            for p in trainer.model.parameters()
        ])  # fmt: skip
        old, new = old & masked, new & masked
    expected = 1 - float((old & new).sum() / old.sum())
    assert 0 < expected < 1
    assert next(iter(churn.values())) == pytest.approx(expected)


def test_reported_bytes_are_those_of_the_state(tmp_path):
    trainer = make_trainer(tmp_path, SecondOrderAdamW, observe_steps=2, density=0.1)
    trainer.train()
    reported = [entry["optimizer_state_bytes"] for entry in logged(trainer) if "density" in entry]
    groups = ours(trainer).param_groups
    masked = [p for g in groups if g["masked"] for p in g["params"]]
    dense = [p for g in groups if not g["masked"] for p in g["params"]]
    entries = sum(p.numel() for p in masked)
    # a float32 statistic and a flag; then moments and int32 indices; and a step for each
    assert reported[0] == 4 * entries + len(masked) * (1 + 4)
    trained = [p for p in masked if "exp_avg" in ours(trainer).state[p]]
    assert len(trained) == len(masked)
    assert reported[-1] == 12 * int(0.1 * entries) + 4 * len(masked) + sum(8 * p.numel() + 4 for p in dense)


def test_reports_keep_to_the_pace_of_the_log(tmp_path):
    for strategy, steps, churned in (("no", [], []), ("epoch", [4, 8], [5, 8]), ("steps", [3, 6], [5, 8])):
        optimizer_class, options = METHODS["again_and_again"]
        extra = {"logging_strategy": strategy, "logging_steps": 3}
        trainer = make_trainer(tmp_path, optimizer_class, extra=extra, **options)
        trainer.train()
        assert [e["step"] for e in logged(trainer) if "density" in e] == steps
        assert [e["step"] for e in logged(trainer) if "loss" in e] == steps
        assert [e["step"] for e in logged(trainer) if "mask_churn" in e] == churned


# what Trainer does besides


@pytest.mark.parametrize("statistic", [SquaredGradient(), SignedGradient()], ids=lambda s: type(s).__name__)
def test_released_gradients_train_the_same_weights(tmp_path, statistic):
    policy = TopK(0.1, statistic, schedule=Schedule(observe=2))
    extra = {"gradient_accumulation_steps": 2, "num_train_epochs": 4, "max_grad_norm": 0.0}
    options = {"policy": policy, "exempt": ["classifier"], "max_grad_norm": 0.01}
    whole = make_trainer(tmp_path, MaskedAdamW, extra=extra, **options)
    whole.train()
    released = make_trainer(tmp_path, MaskedAdamW, extra=extra, release_gradients=True, **options)
    released.train()
    assert_same(weights(whole), weights(released))


def test_clipping_moves_to_the_optimizer_where_gradients_are_released(tmp_path):
    extra = {"gradient_accumulation_steps": 2, "num_train_epochs": 4}
    options = {"observe_steps": 2, "release_gradients": True}
    moved = make_trainer(tmp_path, SecondOrderAdamW, extra={"max_grad_norm": 0.01} | extra, **options)
    with pytest.warns(UserWarning, match=r"clips them, to max_grad_norm=0\.01 of what .*0\.01 is now 0;"):
        moved.train()
    assert (ours(moved).max_grad_norm, moved.args.max_grad_norm) == (0.01, 0.0)
    said = make_trainer(
        tmp_path, SecondOrderAdamW, extra={"max_grad_norm": 0.0} | extra, max_grad_norm=0.01, **options
    )
    said.train()
    assert_same(weights(moved), weights(said))
    both = make_trainer(
        tmp_path, SecondOrderAdamW, extra={"max_grad_norm": 5.0}, max_grad_norm=0.01, **options
    )
    with pytest.warns(UserWarning, match=r"to max_grad_norm=0\.01 of what it applies"):
        both.train()
    assert (ours(both).max_grad_norm, both.args.max_grad_norm) == (0.01, 0.0)


def test_bf16_and_gradient_checkpointing_leave_unselected_entries_alone(tmp_path):
    start = make_model()
    # one name in newer versions, the other in older ones
    fields = transformers.TrainingArguments.__dataclass_fields__
    checkpointing = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if n in fields)
    trainer = make_trainer(
        tmp_path, ChildTuningAdamW, variant="D", observe_steps=None, release_gradients=True, density=0.1,
        max_grad_norm=1.0, observe={"observe_batches": 2},
        extra={"bf16": True, checkpointing: True, "max_grad_norm": 0.0},
    )  # fmt: skip
    trainer.train()
    changed = 0
    for (_, p), (_, q) in zip(trainer.model.named_parameters(), start.named_parameters(), strict=True):
        mask = ours(trainer).mask(p)
        assert torch.equal(p[~mask], q[~mask])
        changed += int((p[mask] != q[mask]).sum())
    assert changed > 100


def test_early_stopping_and_the_best_model_work(tmp_path):
    trainer = make_trainer(
        tmp_path, SecondOrderAdamW, observe_steps=2, density=0.5,
        extra={
            "num_train_epochs": 20, "learning_rate": 0.01, "eval_strategy": "steps", "eval_steps": 2,
            "save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss", "eval_dataset": Examples(8),
        },
        after=[transformers.EarlyStoppingCallback(2)],
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step < 20 * STEPS_PER_EPOCH
    assert 2 < trainer.state.best_global_step < trainer.state.global_step
    best = make_model().from_pretrained(trainer.state.best_model_checkpoint)
    assert_same(weights(trainer), dict(best.named_parameters()))
    start = make_model().state_dict()
    assert any(not torch.equal(start[name], weight) for name, weight in weights(trainer).items())


def test_the_scaler_is_made_known_where_gradients_are_released(tmp_path):
    trainer = make_trainer(
        tmp_path, SecondOrderAdamW, observe_steps=2, release_gradients=True, max_grad_norm=1.0,
        extra={"max_grad_norm": 0.0},
    )  # fmt: skip
    optimizer = trainer.create_optimizer()
    optimizer.scaler = torch.amp.GradScaler("cpu")  # as accelerate's wrapper has it
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, SparseOptimCallback))
    callback.on_train_begin(trainer.args, trainer.state, trainer.control, train_dataloader=None)
    assert optimizer.gradient_release.has_scaler


# two processes


def one_of_two(rank, port, folder):
    """A rank observes before training and trains, without and with release, and leaves what it ended at."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    for release in (False, True):
        extra = {"ddp_backend": "gloo", "max_grad_norm": 0.0, "gradient_accumulation_steps": 2}
        extra["ddp_find_unused_parameters"] = False
        trainer = make_trainer(
            folder, ChildTuningAdamW, variant="D", observe_steps=None, observe={"observe_batches": 2},
            extra=extra, release_gradients=release, max_grad_norm=0.05,
        )  # fmt: skip
        trainer.train()
        assert isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
        masks = {name: ours(trainer).mask(p) for name, p in trainer.model.named_parameters()}
        torch.save((masks, weights(trainer)), f"{folder}/{rank}_{release}.pt")
    with pytest.raises(ValueError, match=r"must be exempt where gradients are released, got none, and Distr"):
        make_trainer(
            folder, MaskedAdamW, policy=TopK(0.1, schedule=Schedule(observe=1)), release_gradients=True,
            extra=extra,
        ).create_optimizer()  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="torch.distributed was built without gloo",
)
def test_two_processes_observe_their_shares_and_stay_together(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(one_of_two, (port, str(tmp_path)), nprocs=2)
    ends = [torch.load(tmp_path / f"{rank}_{release}.pt") for rank in (0, 1) for release in (False, True)]
    for masks, end in ends[1:]:
        assert_same(ends[0][0], masks)
        assert_same(ends[0][1], end)
    # what two processes observe in batches of 4 is what one observes in batches of 8
    alone = make_trainer(
        tmp_path, ChildTuningAdamW, variant="D", observe_steps=None,
        observe={"observe_batches": 2, "observe_batch_size": 2 * BATCH}, extra={"max_steps": 1},
    )  # fmt: skip
    alone.train()
    wrong = [int((ours(alone).mask(p) != ends[0][0][n]).sum()) for n, p in alone.model.named_parameters()]
    # sums in another order may exchange the last two
    assert sum(wrong) <= 2


# what is refused


def test_a_class_of_others_and_numbers_that_the_arguments_hold_are_refused(tmp_path):
    args = arguments(tmp_path)
    with pytest.raises(TypeError, match=r"must be a class of sparse_optim, got <class 'torch.*; pass Child"):
        trainer_optimizer(torch.optim.AdamW, args)
    with pytest.raises(TypeError, match=r"args must be TrainingArguments, got None; pass those that Trainer"):
        trainer_optimizer(ChildTuningAdamW, None)
    with pytest.raises(ValueError, match=r"lr must come from .*, got lr=0\.1; set learning_rate there\."):
        trainer_optimizer(ChildTuningAdamW, args, variant="F", lr=0.1)


def test_bad_arguments_of_the_callback_are_refused(tmp_path):
    trainer = make_trainer(tmp_path, ChildTuningAdamW, variant="F")
    with pytest.raises(TypeError, match=r"trainer must be a transformers.Trainer, got None; write trainer"):
        SparseOptimCallback(None)
    for name in ("observe_batches", "observe_batch_size"):
        with pytest.raises(ValueError, match=rf"{name} must be a positive integer, got 0; or leave it None"):
            SparseOptimCallback(trainer, **{name: 0})


def test_an_optimizer_of_others_is_refused(tmp_path):
    args = arguments(tmp_path)
    trainer = transformers.Trainer(make_model(), args, train_dataset=Examples())
    trainer.add_callback(SparseOptimCallback(trainer))
    with pytest.raises(TypeError, match=r"needs an optimizer of sparse_optim, got AdamW; give Trainer opti"):
        trainer.train()


DRAWN = (MaskedAdamW, {"policy": Bernoulli(0.5)})
BEFORE = (SecondOrderAdamW, {"observe_steps": None})


@pytest.mark.parametrize(
    ("method", "observe", "message"),
    [
        (DRAWN, {"observe_batches": 2}, r"observe_batches and .* need a TopK policy .*; leave them out, or"),
        (DRAWN, {"observe_batch_size": 2}, r"observe_batches and .* need a TopK policy .*; leave them out"),
        (BEFORE, {"observe_batches": 5}, r"at most the 4 batches of the training set, got 5; None observes"),
        (
            (SecondOrderAdamW, {"observe_steps": 2, "curvature": "hutchinson"}),
            {},
            r"CurvatureScaledGradient must be observed before .*, got observe=2; give observe_steps=None",
        ),
    ],
)
def test_what_cannot_be_observed_is_refused(tmp_path, method, observe, message):
    trainer = make_trainer(tmp_path, method[0], observe=observe, **method[1])
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert_same(weights(trainer), {n: p.detach() for n, p in make_model().named_parameters()})


@pytest.mark.parametrize(("flag", "engine"), [("is_fsdp_enabled", "FSDP"), ("is_deepspeed_enabled", "DeepS")])
def test_sharded_training_is_refused(tmp_path, flag, engine):
    trainer = make_trainer(tmp_path, ChildTuningAdamW, variant="F")
    trainer.optimizer = trainer.create_optimizer()
    setattr(trainer, flag, True)
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, SparseOptimCallback))
    with pytest.raises(ValueError, match=rf"got {engine}.*, which shards them; use DistributedDataParallel"):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, train_dataloader=None)


def test_scaled_gradients_are_not_observed_before_training(tmp_path):
    trainer = make_trainer(tmp_path, SecondOrderAdamW, observe_steps=None)
    trainer.create_optimizer().scaler = torch.amp.GradScaler("cpu")  # as accelerate's wrapper has it
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, SparseOptimCallback))
    with pytest.raises(ValueError, match=r"gradients that are not scaled, got fp16=True; use bf16=True, or"):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, train_dataloader=None)


def test_a_training_set_without_a_length_needs_a_number_of_batches(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(Examples().examples)

    for number in (None, 3):
        trainer = make_trainer(
            tmp_path, SecondOrderAdamW, observe_steps=None, observe={"observe_batches": number},
            data=Stream(), extra={"max_steps": 1},
        )  # fmt: skip
        if number is None:
            with pytest.raises(
                ValueError, match=r"observe_batches must be given for .* got None; the authors"
            ):
                trainer.train()
        else:
            trainer.train()
            assert ours(trainer).density() > 0
