"""Trainer with the optimizers of this package: the factory, the callback, and runs that are interrupted."""

import copy
import gc
import itertools
import os
import random
import re
import socket

import numpy
import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5")
accelerate = pytest.importorskip("accelerate")

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
from sparse_optim.integrations import transformers as integration  # noqa: E402
from sparse_optim.integrations.transformers import SparseOptimCallback, trainer_optimizer  # noqa: E402
from sparse_optim.nn import mix_weights, mixout  # noqa: E402

EXAMPLES, BATCH = 16, 4
STEPS_PER_EPOCH = EXAMPLES // BATCH
LENGTH = 6


@pytest.fixture(autouse=True, scope="module")
def _collect_little_garbage():
    """Trainer collects garbage whenever it begins, which takes half of a short run: modules are left out."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


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
    mix=False,
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
    observe = dict(observe or {})
    if mix:
        observe["mixing"] = mix_weights(trainer.model, trainer.create_optimizer())
    trainer.add_callback(SparseOptimCallback(trainer, **observe))
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
    "dps_mix": (DPSAdamW, {"variant": "mix", "update_steps": 2}),
    "second_order": (SecondOrderAdamW, {"observe_steps": 3, "density": 0.1}),
    "second_order_released": (
        SecondOrderAdamW,
        {"observe_steps": 3, "density": 0.1, "release_gradients": True, "max_grad_norm": 1.0},
    ),
    "grad_drop": (GradDropAdamW, {"keep": 0.5}),
    "grad_drop_epoch": (GradDropAdamW, {"keep": 0.5, "refresh": "epoch"}),
    "grad_drop_layer": (GradDropAdamW, {"keep": 0.5, "granularity": "layer"}),
    "grad_drop_layer_epoch": (GradDropAdamW, {"keep": 0.5, "granularity": "layer", "refresh": "epoch"}),
    "gradual_unfreezing": (MaskedAdamW, {"policy": GradualUnfreezing()}),
    "again_and_again": (MaskedAdamW, {"policy": TopK(0.2, schedule=Schedule(observe=2, train=1))}),
}
NAMES = {
    name: next((m for m in ("child_tuning_f", "child_tuning_d", "dps", "second_order", "grad_drop")
                if name.startswith(m)), None)
    for name in METHODS
}  # fmt: skip


def clipping(options):
    """What Trainer clips to; where gradients are released, the optimizer clips instead."""
    return {"max_grad_norm": 0.0 if options.get("release_gradients") else 1.0}


# the factory


def seeded(model):
    """Every forward pass draws from a seed of its own: dropout and mixing are those of its number."""
    calls = itertools.count()

    def seed(*_):
        torch.manual_seed(next(calls))

    model.register_forward_pre_hook(seed)
    return model


def loop(name, batches, accumulation, accelerated):
    """The weights at the end of a loop that somebody wrote by hand, without Trainer."""
    optimizer_class, options = METHODS[name]
    model = seeded(make_model(dropout=0.1))
    groups = param_groups(
        model, method=NAMES[name], weight_decay=0.1, fidelity=options.get("fidelity", "paper")
    )
    masked = optimizer = optimizer_class(groups, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, seed=5, **options)
    if name == "dps_mix":
        mix_weights(model, optimizer)
    steps = len(batches) // accumulation
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 0, steps)
    clip_to = clipping(options)["max_grad_norm"]
    if accelerated:
        # Trainer leaves its data loader behind, at whose end gradients are not accumulated
        accelerate.state.GradientState._reset_state()
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
        model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    model.train()
    for i, batch in enumerate(batches):
        if i % STEPS_PER_EPOCH == 0:
            masked.new_epoch()
        # undivided: Trainer takes it that this model divides by num_items_in_batch, which it does not
        loss = model(**batch).loss
        if accelerated:
            with accelerator.accumulate(model):
                accelerator.backward(loss * accumulation)
                if accelerator.sync_gradients and clip_to:
                    accelerator.clip_grad_norm_(model.parameters(), clip_to)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            continue
        loss.backward()
        if (i + 1) % accumulation == 0:
            if clip_to:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip_to)
            optimizer.step()
            scheduler.step()
            model.zero_grad()
    return {n: p.detach() for n, p in model.named_parameters()}


# Trainer takes the norm of released gradients for its log, which makes the optimizer speak up
@pytest.mark.filterwarnings("ignore:the norm of a released gradient")
@pytest.mark.one_in(2, by="name")
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_trainer_and_accelerate_end_at_the_weights_of_a_plain_loop(tmp_path, name, accumulation):
    optimizer_class, options = METHODS[name]
    batches = []

    def collate(examples):
        batches.append(transformers.default_data_collator(examples))
        return dict(batches[-1])

    extra = {"gradient_accumulation_steps": accumulation, "data_collator": collate, "num_train_epochs": 3}
    trainer = make_trainer(
        tmp_path, optimizer_class, extra=extra | clipping(options), model=seeded(make_model(dropout=0.1)),
        mix=name == "dps_mix", **options,
    )  # fmt: skip
    start = weights(trainer)
    trainer.train()
    assert len(batches) == 3 * STEPS_PER_EPOCH
    moved = [n for n, p in weights(trainer).items() if not torch.equal(p, start[n])]
    assert len(moved) > 2
    assert_same(weights(trainer), loop(name, batches, accumulation, accelerated=False))
    assert_same(weights(trainer), loop(name, batches, accumulation, accelerated=True))


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


# target modules, as GaLore has them


def masked_names(trainer):
    groups = trainer.create_optimizer().param_groups
    return {name for group in groups if group["masked"] for name in group["param_names"]}


LINEAR = {
    *(f"bert.encoder.layer.{i}.attention.self.{part}" for i in (0, 1) for part in ("query", "key", "value")),
    *(f"bert.encoder.layer.{i}.attention.output.dense" for i in (0, 1)),
    *(f"bert.encoder.layer.{i}.{part}.dense" for i in (0, 1) for part in ("intermediate", "output")),
    *("bert.pooler.dense", "classifier"),
}


@pytest.mark.parametrize(
    ("targets", "modules"),
    [
        ("all-linear", LINEAR),
        ("all_linear", LINEAR),
        (["query", "value"], {name for name in LINEAR if name.endswith(("query", "value"))}),
        # a part of a name, and an expression that the whole name matches
        (["attention", r".*1\.output\.dense"], {
            name for name in LINEAR if "attention" in name or name.endswith("layer.1.output.dense")
        }),
        (["classifier"], {"classifier"}),
        (r".*layer\.0.*(key|query)", {
            name for name in LINEAR if ".0." in name and name.endswith(("key", "query"))
        }),
    ],
    ids=["all-linear", "all_linear", "names", "part_and_expression", "head", "expression"],
)  # fmt: skip
def test_target_modules_are_masked_and_all_else_trains_densely(tmp_path, targets, modules):
    trainer = make_trainer(
        tmp_path, ChildTuningAdamW, variant="D", observe_steps=1, density=0.1,
        extra={"optim_target_modules": targets, "max_steps": 2},
    )  # fmt: skip
    assert masked_names(trainer) == {f"{name}.weight" for name in modules}
    start = weights(trainer)
    trainer.train()
    assert ours(trainer).param_groups[-1]["weight_decay"] == 0.0
    entries = sum(start[f"{name}.weight"].numel() for name in modules)
    selected = sum(int(ours(trainer).mask(p).sum()) for n, p in trainer.model.named_parameters()
                   if n.removesuffix(".weight") in modules)  # fmt: skip
    assert selected == int(0.1 * entries)
    for name, p in trainer.model.named_parameters():
        mask = ours(trainer).mask(p)
        assert mask.all() or name.removesuffix(".weight") in modules
        assert torch.equal(p[~mask], start[name][~mask])


def test_target_modules_are_those_of_galore(tmp_path):
    trainer_module = pytest.importorskip("transformers.trainer_optimizer")
    if not hasattr(trainer_module, "_setup_low_rank_optimizer"):
        pytest.skip("this version of transformers keeps GaLore's choice elsewhere")
    for targets in ("all-linear", ["attention", r".*1\.output\.dense"], r".*layer\.0.*(key|query)"):
        extra = {"optim_target_modules": targets}
        trainer = make_trainer(tmp_path, ChildTuningAdamW, variant="F", extra=extra)
        _, theirs = trainer_module._setup_low_rank_optimizer(
            trainer.args, trainer.model, "galore_adamw", {"galore_adamw": None}, {}, {}
        )
        names = {p: name for name, p in trainer.model.named_parameters()}
        assert masked_names(trainer) == {names[p] for p in theirs["params"][1]["params"]}


def test_target_modules_include_gpt2s_and_leave_out_a_tied_output_layer(tmp_path):
    config = transformers.GPT2Config(vocab_size=40, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    assert model.lm_head.weight is model.transformer.wte.weight
    extra = {"optim_target_modules": "all-linear"}
    trainer = make_trainer(tmp_path, ChildTuningAdamW, variant="F", model=model, extra=extra)
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert masked_names(trainer) == {f"transformer.h.0.{part}.weight" for part in parts}


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        (["query", "querry"], ValueError, r"that train, got 'querry' in BertForSequenceC.*, where those are "
         r"called query, key, value, dense, classifier; give names of theirs, or the string 'all-"),
        # a string is an expression that the whole name has to match
        ("query", ValueError, r"match linear layers that train, got 'query' in Bert"),
        (["word_embeddings"], ValueError, r"match linear layers that train, got 'word_embeddings' in Bert"),
        ([], ValueError, r"match linear layers that train, got \[\] in Bert"),
        (["quer(y"], ValueError, r"must be names or regular expressions, got \['quer\(y'\] \(.*\); escape"),
        ([3], ValueError, r"must be names or regular expressions, got \[3\] \(.*\); escape"),
        (3, TypeError, r"optim_target_modules must be a list of names, .* got 3; write \['query'"),
    ],
    ids=["misspelt", "not_whole", "no_linear_layer", "empty", "no_expression", "number_in_list", "number"],
)  # fmt: skip
def test_target_modules_that_match_nothing_are_refused(tmp_path, targets, error, message):
    trainer = make_trainer(tmp_path, ChildTuningAdamW, variant="F", extra={"optim_target_modules": targets})
    with pytest.raises(error, match=message):
        trainer.train()


def test_names_of_targets_are_taken_literally_and_whole():
    (pattern,) = integration._all_but(["a.weight", "b.weight"])
    names = ["a.weight", "b.weight", "a.weight_g", "c.a.weight", "a_weight"]
    assert [name for name in names if not re.search(pattern, name)] == ["a.weight", "b.weight"]


def test_frozen_layers_are_no_targets(tmp_path):
    model = make_model()
    for name, p in model.named_parameters():
        p.requires_grad = "query" not in name
    extra = {"optim_target_modules": ["query"]}
    trainer = make_trainer(tmp_path, ChildTuningAdamW, variant="F", model=model, extra=extra)
    with pytest.raises(ValueError, match=r"got 'query' in Bert.*, where those are called key, value, dense"):
        trainer.train()


def test_target_modules_and_exemptions_contradict_each_other(tmp_path):
    args = arguments(tmp_path, optim_target_modules=["query"])
    message = r"exempt must not come with optim_target_modules, got \['key'\] and \['query'\], .*; leave one"
    with pytest.raises(ValueError, match=message):
        trainer_optimizer(ChildTuningAdamW, args, variant="F", exempt=["key"])
    later = make_trainer(tmp_path, ChildTuningAdamW, variant="F", exempt=["key"])
    later.args.optim_target_modules = ["query"]
    with pytest.raises(ValueError, match=message):
        later.train()


# interrupted and resumed

RESUMED = {
    **{name: (options[0], options[1], None, {}) for name, options in METHODS.items()},
    "observed_before": (
        ChildTuningAdamW,
        {"variant": "D", "observe_steps": None},
        {"observe_batches": 3},
        {},
    ),
    "bfloat16": (SecondOrderAdamW, {"observe_steps": 3, "density": 0.1}, None, {"dtype": torch.bfloat16}),
}
# with observe_steps=3: while observing (1, 2), exactly at the selection (3), right after it and at the end of
# an epoch (4), while training (5 to 7); DPS selects at 2 and 6. Two micro-batches make epochs of two steps
INTERRUPTED = {1: range(1, 8), 2: (1, 2, 3, 5, 6)}


@pytest.mark.one_in(2, by="name")
@pytest.mark.parametrize("accumulation", INTERRUPTED)
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_bit_equal_to_one_that_was_not_interrupted(tmp_path, name, accumulation):
    optimizer_class, options, observe, model_options = RESUMED[name]

    def build(folder, **extra):
        extra = {"num_train_epochs": 2 * accumulation, "gradient_accumulation_steps": accumulation} | extra
        return make_trainer(
            tmp_path / folder, optimizer_class, observe=observe, extra=extra | clipping(options),
            model=make_model(dropout=0.1, **model_options), mix=name == "dps_mix", **options,
        )  # fmt: skip

    whole = build("whole", save_strategy="steps", save_steps=1)
    whole.train()
    assert len([e for e in logged(whole) if "loss" in e]) == whole.state.global_step == 8
    for step in INTERRUPTED[accumulation]:
        resumed = build("resumed")
        for p in resumed.model.parameters():
            p.data.zero_()
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert_same(weights(whole), weights(resumed))
        assert logged(whole) == logged(resumed)


def test_what_mixing_remembers_is_loaded_with_the_optimizer(tmp_path):
    def build():
        trainer = make_trainer(tmp_path, DPSAdamW, variant="mix", update_steps=3, extra={"max_steps": 2})
        handle = mix_weights(trainer.model, trainer.create_optimizer())
        trainer.pop_callback(SparseOptimCallback)
        trainer.add_callback(SparseOptimCallback(trainer, mixing=handle))
        return trainer, handle

    trainer, handle = build()
    trainer.train()
    saved = copy.deepcopy(trainer.optimizer.state_dict())
    assert max(float(count.max()) for count in handle.counts().values()) > 0
    again, other = build()
    with torch.no_grad():
        for p in again.model.parameters():
            p.add_(1)
    again.optimizer.load_state_dict(saved)
    assert_same(handle.counts(), other.counts())
    assert_same(*[
        {name: memory["initial"] for name, memory in h.state_dict()["weights"].items()}
        for h in (handle, other)
    ])  # fmt: skip


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


class Gradients(transformers.TrainerCallback):
    """What `step()` gets and what it trained, at every step, and the norms by hand."""

    def __init__(self):
        self.taken, self.masked, self.dense = [], [], []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        self.taken.append(torch.cat([g.flatten() for g in gradients]).double())

    def on_step_end(self, args, state, control, optimizer, model, **kwargs):
        mask = torch.cat([optimizer.optimizer.mask(p).flatten() for p in model.parameters()])
        self.masked.append(self.taken[-1][mask].square().sum().sqrt().item())
        self.dense.append(self.taken[-1].square().sum().sqrt().item())


def column(trainer, name):
    return {entry["step"]: entry[name] for entry in logged(trainer) if name in entry}


@pytest.mark.parametrize("clip_to", [0.0, 0.1])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", ["child_tuning_f", "dps", "second_order", "gradual_unfreezing"])
def test_reported_norms_are_those_of_the_gradients_that_the_step_got(tmp_path, name, accumulation, clip_to):
    optimizer_class, options = METHODS[name]
    gradients = Gradients()
    extra = {"gradient_accumulation_steps": accumulation, "max_grad_norm": clip_to, "num_train_epochs": 3}
    trainer = make_trainer(tmp_path, optimizer_class, after=[gradients], extra=extra, **options)
    trainer.train()
    steps = range(1, 3 * STEPS_PER_EPOCH // accumulation + 1)
    masked, dense = column(trainer, "masked_grad_norm"), column(trainer, "dense_grad_norm")
    assert masked == pytest.approx(dict(zip(steps, gradients.masked, strict=True)), rel=1e-5)
    assert dense == pytest.approx(dict(zip(steps, gradients.dense, strict=True)), rel=1e-5)
    # Trainer's own norm is from before it clips
    before = column(trainer, "grad_norm")
    clipped = {step: min(norm, clip_to or norm) for step, norm in before.items()}
    assert dense == pytest.approx(clipped, rel=1e-4)
    assert clip_to == 0 or any(norm > clip_to for norm in before.values())
    assert any(0 < masked[step] < 0.999 * dense[step] for step in steps)
    if name == "second_order":
        # three steps observe, and train nothing
        assert [masked[step] == 0 for step in (1, 2, 3, 4)] == [True, True, True, False]


def test_norms_are_measured_at_the_steps_that_log(tmp_path, monkeypatch):
    measure, calls = integration._gradient_norms, []

    def counted(optimizer):
        calls.append(optimizer._number("clock"))
        return measure(optimizer)

    monkeypatch.setattr(integration, "_gradient_norms", counted)
    for settings, steps in (
        ({"logging_steps": 3}, [3, 6]),
        ({"logging_steps": 3, "logging_first_step": True}, [1, 3, 6]),
        ({"logging_steps": 0.5}, [4, 8]),
        ({"logging_strategy": "epoch"}, [4, 8]),
        ({"logging_strategy": "epoch", "max_steps": 6}, [4, 6]),
        ({"logging_strategy": "epoch", "gradient_accumulation_steps": 3}, [2, 4]),
        ({"logging_strategy": "no", "logging_first_step": True}, []),
    ):
        calls.clear()
        trainer = make_trainer(tmp_path, ChildTuningAdamW, variant="F", extra=settings)
        trainer.train()
        assert list(column(trainer, "masked_grad_norm")) == steps
        assert list(column(trainer, "dense_grad_norm")) == steps
        assert calls == steps


class AsksForALog(transformers.TrainerCallback):
    """Decides on a log after the third step, when its gradients are gone."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= state.global_step == 3


def test_a_log_that_nobody_foresaw_has_no_norms_of_another_step(tmp_path):
    extra = {"logging_steps": 2}
    trainer = make_trainer(tmp_path, ChildTuningAdamW, variant="F", before=[AsksForALog()], extra=extra)
    trainer.train()
    assert list(column(trainer, "density")) == [2, 3, 4, 6, 8]
    assert list(column(trainer, "masked_grad_norm")) == [2, 4, 6, 8]


@pytest.mark.filterwarnings("ignore:the norm of a released gradient")
@pytest.mark.parametrize("exempt", [None, []], ids=["head_exempt", "all_masked"])
def test_released_gradients_report_the_masked_norm_alone(tmp_path, exempt):
    options = {"observe_steps": 3, "density": 0.1, "exempt": exempt, "max_grad_norm": 0.05}
    extra = {"gradient_accumulation_steps": 2, "num_train_epochs": 4, "max_grad_norm": 0.0}
    whole = make_trainer(tmp_path, SecondOrderAdamW, extra=extra, **options)
    whole.train()
    released = make_trainer(tmp_path, SecondOrderAdamW, extra=extra, release_gradients=True, **options)
    released.train()
    norms = column(whole, "masked_grad_norm")
    assert column(released, "masked_grad_norm") == pytest.approx(norms, rel=1e-5)
    assert [norm > 0 for norm in norms.values()] == [False] * 3 + [True] * 5
    assert len(column(whole, "dense_grad_norm")) == 8
    assert column(released, "dense_grad_norm") == {}


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bfloat16, torch.float16])
def test_norms_take_every_dtype(dtype):
    p = torch.nn.Parameter(torch.ones(50_000, dtype=dtype))
    optimizer = MaskedAdamW([p], lr=0.0)
    # float16 has no number as large as the norm, bfloat16 none as close, and sums in float32 lose digits
    p.grad = torch.full_like(p, 300.0)
    if dtype.is_complex:
        p.grad += 400.0j
    optimizer.step()
    norms = integration._gradient_norms(optimizer)
    expected = 50_000**0.5 * (500.0 if dtype.is_complex else 300.0)
    assert norms == pytest.approx({"masked_grad_norm": expected, "dense_grad_norm": expected}, rel=1e-5)


def test_reports_keep_to_the_pace_of_the_log(tmp_path):
    for strategy, steps, churned in (("no", [], []), ("epoch", [4, 8], [5, 8]), ("steps", [3, 6], [5, 8])):
        optimizer_class, options = METHODS["again_and_again"]
        extra = {"logging_strategy": strategy, "logging_steps": 3}
        trainer = make_trainer(tmp_path, optimizer_class, extra=extra, **options)
        trainer.train()
        assert [e["step"] for e in logged(trainer) if "density" in e] == steps
        assert [e["step"] for e in logged(trainer) if "loss" in e] == steps
        assert [e["step"] for e in logged(trainer) if "mask_churn" in e] == churned


# hyperparameter search


@pytest.mark.filterwarnings("ignore:the norm of a released gradient", "ignore:gradients are released, so the")
@pytest.mark.parametrize("release", [False, True], ids=["whole", "released"])
def test_every_trial_of_a_search_is_a_run_of_its_own(tmp_path, release):
    optuna = pytest.importorskip("optuna")
    options = {"observe_steps": None, "density": 0.1, "release_gradients": release}
    extra = {"num_train_epochs": 1, "max_grad_norm": 0.05, "eval_dataset": Examples(8)}

    class Trials(transformers.TrainerCallback):
        """What each trial trained with, logged and ended at."""

        def __init__(self):
            self.ends = []

        def on_train_begin(self, args, state, control, optimizer, **kwargs):
            self.given = optimizer.optimizer
            # observed anew, by the callback before
            assert self.given.param_groups[0]["phase"] == 1
            assert {group["lr"] for group in self.given.param_groups} == {args.learning_rate}

        def on_train_end(self, args, state, control, model, **kwargs):
            own = {name: p.detach().clone() for name, p in model.named_parameters()}
            history = [entry for entry in state.log_history if "train_runtime" not in entry]
            self.ends.append((args.learning_rate, self.given.max_grad_norm, own, history))

    def build(folder, model, **more):
        args = arguments(tmp_path / folder, **{k: v for k, v in extra.items() if k != "eval_dataset"} | more)
        trainer = transformers.Trainer(
            args=args, train_dataset=Examples(), eval_dataset=Examples(8),
            optimizer_cls_and_kwargs=trainer_optimizer(SecondOrderAdamW, args, **options), **model,
        )  # fmt: skip
        trainer.add_callback(SparseOptimCallback(trainer, observe_batches=2))
        trials = Trials()
        trainer.add_callback(trials)
        return trainer, trials

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    searching, trials = build("search", {"model_init": lambda: make_model()})
    best = searching.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-1, log=True)},
        backend="optuna", n_trials=2, direction="minimize", sampler=optuna.samplers.RandomSampler(seed=1),
    )  # fmt: skip
    assert best.run_id in ("0", "1")
    first, second = (rate for rate, *_ in trials.ends)
    assert first != second
    for rate, clipped_to, end, history in trials.ends:
        # the same from a Trainer that searches nothing
        alone, run = build("alone", {"model_init": lambda: make_model()}, learning_rate=rate)
        alone.train()
        assert run.ends[0][1] == clipped_to == (0.05 if release else None)
        assert_same(run.ends[0][2], end)
        assert run.ends[0][3] == history
        assert {"density", "masked_grad_norm"} <= {key for entry in history for key in entry}


@pytest.mark.filterwarnings("ignore:the norm of a released gradient", "ignore:gradients are released, so the")
def test_a_run_that_failed_leaves_clipping_to_the_next(tmp_path):
    def build():
        return make_trainer(
            tmp_path, SecondOrderAdamW, observe_steps=2, density=0.1, release_gradients=True,
            extra={"max_grad_norm": 0.01},
        )  # fmt: skip

    clean = build()
    transformers.set_seed(1)
    clean.train()
    failing = build()
    failing.train_dataset.fails_at = 9
    with pytest.raises(OSError, match="the disk is gone"):
        failing.train()
    # a new model and optimizer, as a search has them
    failing.model = failing.model_wrapped = make_model()
    failing.optimizer = None
    transformers.set_seed(1)
    failing.train()
    assert ours(failing).max_grad_norm == 0.01
    assert_same(weights(clean), weights(failing))


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
    options = {"observe_steps": 2, "density": 0.1, "release_gradients": True}
    moved = make_trainer(tmp_path, SecondOrderAdamW, extra={"max_grad_norm": 0.01} | extra, **options)
    with pytest.warns(UserWarning, match=r"clips them, to max_grad_norm=0\.01 of .*0\.01 is 0 while"):
        moved.train()
    # while training Trainer clipped nothing, or the weights were others
    assert (ours(moved).max_grad_norm, moved.args.max_grad_norm) == (0.01, 0.01)
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
    assert (ours(both).max_grad_norm, both.args.max_grad_norm) == (0.01, 5.0)


def test_the_callback_clips_also_where_trainer_copies_the_arguments(tmp_path):
    # as TRL's trainers do with arguments of another class
    args = arguments(tmp_path, max_grad_norm=0.01)
    trainer = transformers.Trainer(
        make_model(), copy.copy(args), train_dataset=Examples(),
        optimizer_cls_and_kwargs=trainer_optimizer(
            SecondOrderAdamW, args, observe_steps=2, density=0.1, release_gradients=True
        ),
    )  # fmt: skip
    trainer.add_callback(SparseOptimCallback(trainer))
    with pytest.warns(UserWarning, match="so the optimizer clips them"):
        trainer.train()
    assert ours(trainer).max_grad_norm == 0.01
    assert trainer.state.global_step == 2 * STEPS_PER_EPOCH


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
    dtypes = []
    layer = trainer.model.bert.encoder.layer[0].intermediate.dense
    layer.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    trainer.train()
    # each backward pass computes it once more
    assert dtypes == [torch.bfloat16] * 2 * (2 + 2 * STEPS_PER_EPOCH)
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


def test_the_best_model_of_a_resumed_run_is_that_of_one_that_was_not_interrupted(tmp_path):
    def build(folder):
        return make_trainer(
            tmp_path / folder, SecondOrderAdamW, observe_steps=2, density=0.5,
            model=make_model(dropout=0.1),
            extra={
                "num_train_epochs": 3, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps",
                "save_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss",
                # the best is the worst, which comes early
                "greater_is_better": True, "learning_rate": 0.05, "eval_dataset": Examples(8),
            },
        )  # fmt: skip

    def history(trainer):
        times = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
        return [{k: v for k, v in entry.items() if k not in times} for entry in logged(trainer)]

    whole = build("whole")
    whole.train()
    best = whole.state.best_global_step
    assert best == 4
    # before it was found, right then, and after
    for step in (2, 4, 6):
        resumed = build("resumed")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert resumed.state.best_global_step == best
        assert_same(weights(whole), weights(resumed))
        assert history(whole) == history(resumed)


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
        norms = [column(trainer, name) for name in ("masked_grad_norm", "dense_grad_norm", "grad_norm")]
        torch.save((masks, weights(trainer), norms), f"{folder}/{rank}_{release}.pt")
    differing = make_trainer(folder, ChildTuningAdamW, variant="F", seed=rank, extra=extra)
    with pytest.raises(RuntimeError, match=r"got another of '.*' on rank 1 than on rank 0; give all"):
        differing.train()
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
    for masks, end, norms in ends[1:]:
        assert_same(ends[0][0], masks)
        assert_same(ends[0][1], end)
        assert norms[0] == pytest.approx(ends[0][2][0], rel=1e-5)
    # each process saw batches of its own, so that only averages are equal
    masked, dense, whole = ends[0][2]
    assert dense == pytest.approx(whole, rel=1e-5)
    assert all(0 < masked[step] < dense[step] for step in dense)
    assert [norms[1] for _, _, norms in ends] == [dense, {}, dense, {}]
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


@pytest.mark.parametrize("engine", ["FSDP", "DeepSpeed"])
def test_sharded_training_is_refused_before_there_is_a_trainer(tmp_path, monkeypatch, engine):
    args = arguments(tmp_path)
    trainer = make_trainer(tmp_path, ChildTuningAdamW, variant="F")
    if engine == "DeepSpeed":
        # as TrainingArguments have it once DeepSpeed is installed
        args.deepspeed_plugin = trainer.args.deepspeed_plugin = object()
    else:
        args.fsdp = True
        # as `accelerate launch` says it
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    message = rf"must be whole on every process .*, got {engine}, which shards them; use DistributedDataParal"
    with pytest.raises(ValueError, match=message):
        trainer_optimizer(ChildTuningAdamW, args, variant="F")
    with pytest.raises(ValueError, match=message):
        trainer.create_optimizer()


class Never(transformers.TrainerCallback):
    """Fails where a step has been taken."""

    def on_step_end(self, args, state, control, **kwargs):
        pytest.fail("a step was taken")


@pytest.mark.filterwarnings("ignore:the norm of a released gradient")
@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        (
            (GradDropAdamW, {"keep": 0.5, "refresh": "epoch"}),
            RuntimeError,
            r"every='epoch' needs SparseOptimCallback .*; write trainer\.add_callback\(.*every= a number of",
        ),
        (
            (MaskedAdamW, {"policy": GradualUnfreezing()}),
            RuntimeError,
            r"every='epoch' needs SparseOptimCallback .*, got no call of optimizer\.new_epoch\(\); write tr",
        ),
        (
            (SecondOrderAdamW, {"observe_steps": None}),
            RuntimeError,
            r"observe_steps=None needs SparseOptimCallback .*, got nothing observed; write .*observe_steps=n",
        ),
        (
            (SecondOrderAdamW, {"observe_steps": 1, "release_gradients": True}),
            ValueError,
            r"max_grad_norm of TrainingArguments must be 0 where gradients .*, got 0\.5; write .*, or give",
        ),
    ],
    ids=["drawn_by_epoch", "unfrozen_by_epoch", "observed_before", "released"],
)  # fmt: skip
def test_what_needs_the_callback_says_so_before_a_weight_moves(tmp_path, method, error, message):
    trainer = make_trainer(tmp_path, method[0], after=[Never()], extra={"max_grad_norm": 0.5}, **method[1])
    trainer.pop_callback(SparseOptimCallback)
    with pytest.raises(error, match=message):
        trainer.train()
    assert_same(weights(trainer), {n: p.detach() for n, p in make_model().named_parameters()})


def test_what_needs_no_callback_trains_without(tmp_path):
    for name in ("child_tuning_d", "grad_drop", "second_order_released"):
        optimizer_class, options = METHODS[name]
        trainer = make_trainer(
            tmp_path, optimizer_class, extra=clipping(options) | {"max_steps": 5}, **options
        )
        start = weights(trainer)
        trainer.pop_callback(SparseOptimCallback)
        if options.get("release_gradients"):
            with pytest.warns(UserWarning, match="the norm of a released gradient"):
                trainer.train()
        else:
            trainer.train()
        assert any(not torch.equal(start[n], p) for n, p in weights(trainer).items())


def test_an_optimizer_of_another_model_is_refused(tmp_path):
    # flat partitions, as DeepSpeed makes them, look the same from here
    args, other = arguments(tmp_path), torch.nn.Linear(3, 5)
    optimizer = ChildTuningAdamW(other.parameters(), variant="F")
    trainer = transformers.Trainer(make_model(), args, train_dataset=Examples(), optimizers=(optimizer, None))
    trainer.add_callback(SparseOptimCallback(trainer))
    with pytest.raises(
        ValueError, match=r"must be those of the model, got 2 others, .*\(5, 3\); let Trainer"
    ):
        trainer.train()


def test_a_callback_of_another_trainer_and_a_second_one_are_refused(tmp_path):
    trainer, other = (make_trainer(tmp_path, ChildTuningAdamW, variant="F") for _ in range(2))
    trainer.pop_callback(SparseOptimCallback)
    trainer.add_callback(SparseOptimCallback(other))
    with pytest.raises(ValueError, match=r"trainer must be the one that the callback is added to, got anoth"):
        trainer.train()

    class Own(SparseOptimCallback):
        """Trainer refuses two callbacks of one class with a warning."""

    other.add_callback(Own(other))
    with pytest.raises(ValueError, match=r"must have one SparseOptimCallback, got 2; leave the others out"):
        other.train()
    for refused in (trainer, other):
        assert_same(weights(refused), {n: p.detach() for n, p in make_model().named_parameters()})


def test_mixing_of_another_optimizer_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, DPSAdamW, variant="mix", update_steps=2)
    with pytest.raises(TypeError, match=r"mixing must be the handle of mix_weights\(\), got 3; pass what it"):
        SparseOptimCallback(trainer, mixing=3)
    handle = mixout(make_model(), 0.1)
    with pytest.raises(ValueError, match=r"got a handle before Trainer has one; write mixing=mix_weights\("):
        SparseOptimCallback(trainer, mixing=handle)
    trainer = make_trainer(tmp_path, DPSAdamW, variant="mix", update_steps=2, mix=True)
    trainer.optimizer = None
    with pytest.raises(
        ValueError, match=r"mixing must be of the optimizer that trains, got .* of another; mix"
    ):
        trainer.train()


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
