"""Adapters: entries are selected inside LoRA's weights or in what else trains, on whole and 4-bit bases."""

import copy
import gc

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5")
peft = pytest.importorskip("peft")

from sparse_optim import (  # noqa: E402
    ChildTuningAdamW,
    DPSAdamW,
    GradDropAdamW,
    GradualUnfreezing,
    MaskedAdamW,
    SecondOrderAdamW,
    param_groups,
)
from sparse_optim.integrations.transformers import SparseOptimCallback, trainer_optimizer  # noqa: E402

pytestmark = [
    # PEFT asks transformers for what newer versions call by another name
    pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning"),
]
LENGTH = 6
HEAD = {f"base_model.model.classifier.modules_to_save.default.{part}" for part in ("weight", "bias")}


@pytest.fixture(autouse=True, scope="module")
def _collect_little_garbage():
    """Trainer collects garbage whenever it begins, which takes half of a short run: modules are left out."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def examples():
    tokens = torch.randint(5, 40, (16, LENGTH), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": int(row[0] > 20)} for row in tokens]


def make_base():
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(3)
    return transformers.BertForSequenceClassification(config)


def make_quantized(folder):
    """The same base, its linear layers but the head in 4 bits, on the processor."""
    pytest.importorskip("bitsandbytes")
    make_base().save_pretrained(folder)
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=["classifier"]
    )
    try:
        model = transformers.BertForSequenceClassification.from_pretrained(
            folder, quantization_config=quantization, device_map="cpu"
        )
    except (ImportError, RuntimeError, ValueError) as error:
        pytest.skip(f"this bitsandbytes does not load 4-bit weights on the processor: {error}")
    return peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def adapted(base, **changes):
    """LoRA on the attention, and a head that trains whole: what PEFT does for sequence classification."""
    torch.manual_seed(4)
    config = peft.LoraConfig(
        **{"task_type": "SEQ_CLS", "r": 4, "target_modules": ["query", "value"], "lora_alpha": 64} | changes
    )
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            # with B at zero no gradient reaches A
            if "lora_B" in name:
                p.normal_(std=0.1)
    return model


BASES = {"float32": lambda folder: make_base(), "4-bit": make_quantized}


def make_trainer(folder, model, optimizer_class, *, observe=None, extra=None, **options):
    args = transformers.TrainingArguments(
        **{
            "output_dir": str(folder), "use_cpu": True, "report_to": "none", "disable_tqdm": True,
            "per_device_train_batch_size": 4, "num_train_epochs": 2, "learning_rate": 1e-2,
            "weight_decay": 0.1, "logging_steps": 1, "save_strategy": "no", "seed": 5,
        } | (extra or {})
    )  # fmt: skip
    trainer = transformers.Trainer(
        model, args, train_dataset=examples(),
        optimizer_cls_and_kwargs=trainer_optimizer(optimizer_class, args, **options),
    )  # fmt: skip
    trainer.add_callback(SparseOptimCallback(trainer, **(observe or {})))
    return trainer


def state(model):
    """Every tensor of the model: parameters, 4-bit weights and what belongs to them."""
    return {name: copy.deepcopy(t.detach()) for name, t in model.state_dict().items()}


def changed(before, after):
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def ours(trainer):
    return trainer.optimizer.optimizer


METHODS = {
    "child_tuning_f": (ChildTuningAdamW, {"variant": "F", "keep": 0.5}, None),
    "child_tuning_d": (ChildTuningAdamW, {"variant": "D", "observe_steps": 3}, None),
    "observed_before": (
        ChildTuningAdamW,
        {"variant": "D", "observe_steps": None},
        {"observe_batches": 3},
    ),
    "dps": (DPSAdamW, {"variant": "dense", "update_steps": 2}, None),
    "second_order": (SecondOrderAdamW, {"observe_steps": 2, "density": 0.1}, None),
    "grad_drop": (GradDropAdamW, {"keep": 0.5, "granularity": "layer", "refresh": "epoch"}, None),
    "gradual_unfreezing": (MaskedAdamW, {"policy": GradualUnfreezing()}, None),
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", METHODS)
def test_frozen_parameters_are_in_no_optimizer_and_never_move(tmp_path, name, base):
    optimizer_class, options, observe = METHODS[name]
    model = adapted(BASES[base](tmp_path / "base"))
    assert base == "float32" or any(type(m).__name__ == "Linear4bit" for m in model.modules())
    start = state(model)
    trainer = make_trainer(tmp_path, model, optimizer_class, observe=observe, **options)
    trainer.train()
    own = trainable(trainer.model)
    assert {n.rsplit(".", 3)[-3] for n in own if n not in HEAD} == {"lora_A", "lora_B"}
    groups = ours(trainer).param_groups
    assert {n for group in groups for n in group["param_names"]} == own.keys()
    assert {p for group in groups for p in group["params"]} == set(own.values())
    assert set(ours(trainer).state) <= set(own.values())
    moved = changed(start, state(trainer.model))
    assert len(moved) > 2
    assert moved <= own.keys()
    # the share of what is in the optimizer, not of the model
    trained = sum(int(ours(trainer).mask(p).sum()) for p in own.values())
    assert ours(trainer).density() == pytest.approx(trained / sum(p.numel() for p in own.values()))


@pytest.mark.parametrize("base", BASES)
def test_entries_are_selected_inside_adapters_and_the_saved_head_trains_densely(tmp_path, base):
    model = adapted(BASES[base](tmp_path / "base"))
    start = state(model)
    trainer = make_trainer(
        tmp_path, model, SecondOrderAdamW, observe_steps=None, density=0.1, observe={"observe_batches": 2}
    )
    trainer.train()
    own = trainable(trainer.model)
    masked = {n for group in ours(trainer).param_groups if group["masked"] for n in group["param_names"]}
    assert own.keys() - masked == HEAD
    selected = 0
    for name, p in own.items():
        mask = ours(trainer).mask(p)
        if name in HEAD:
            assert mask.all()
        else:
            assert torch.equal(p[~mask], start[name][~mask])
            selected += int((p[mask] != start[name][mask]).sum())
    # each selected entry of the adapters has moved
    assert selected == int(0.1 * sum(own[name].numel() for name in masked))


@pytest.mark.parametrize("release", [False, True], ids=["whole", "released"])
@pytest.mark.parametrize("base", BASES)
def test_entries_are_selected_in_the_rest_and_adapters_train_densely(tmp_path, base, release):
    model = adapted(BASES[base](tmp_path / "base"), modules_to_save=["classifier"])
    # and embeddings of the base, which somebody has left to train
    name = "base_model.model.bert.embeddings.word_embeddings.weight"
    dict(model.named_parameters())[name].requires_grad = True
    start = state(model)
    trainer = make_trainer(
        tmp_path, model, ChildTuningAdamW, variant="D", observe_steps=2, density=0.2, exempt=["lora_"],
        release_gradients=release, max_grad_norm=1.0, extra={"max_grad_norm": 0.0},
    )  # fmt: skip
    trainer.train()
    rest, own = {name, *HEAD}, trainable(trainer.model)
    masked = {n for group in ours(trainer).param_groups if group["masked"] for n in group["param_names"]}
    assert masked == rest
    assert sum(int(ours(trainer).mask(own[n]).sum()) for n in rest) == int(
        0.2 * sum(own[n].numel() for n in rest)
    )
    for n, p in own.items():
        mask = ours(trainer).mask(p)
        assert mask.all() if n not in rest else torch.equal(p[~mask], start[n][~mask])
    moved = changed(start, state(trainer.model))
    assert moved <= own.keys()
    assert {n for n in own if "lora_" in n} <= moved


@pytest.mark.parametrize("method", ["child_tuning_d", "second_order", "grad_drop"])
def test_the_usual_exemptions_know_the_names_that_adapters_give(method):
    groups = param_groups(adapted(make_base()), method=method)
    dense = {name for group in groups if not group["masked"] for name, _ in group["params"]}
    assert dense == HEAD
    # of a second adapter, and of one that is called otherwise
    model = peft.get_peft_model(make_base(), peft.LoraConfig(task_type="SEQ_CLS"), adapter_name="mine")
    model.add_adapter("other", peft.LoraConfig(task_type="SEQ_CLS"))
    model.set_adapter("other")
    names = [name for group in param_groups(model, method=method) for name, _ in group["params"]]
    dense = [name for g in param_groups(model, method=method) if not g["masked"] for name, _ in g["params"]]
    assert all(".other." in name for name in names)
    assert {name.rpartition(".")[0] for name in dense} == {
        "base_model.model.classifier.modules_to_save.other"
    }


def test_target_modules_choose_among_adapters(tmp_path):
    for targets, chosen in (
        ("all-linear", lambda name: "lora_" in name or name in HEAD),
        (["lora_A"], lambda name: "lora_A" in name),
        (["layer.1"], lambda name: "layer.1" in name),
        (r".*query\.lora_B\.default", lambda name: "query.lora_B" in name),
    ):
        model = adapted(make_base())
        trainer = make_trainer(
            tmp_path, model, ChildTuningAdamW, variant="F", extra={"optim_target_modules": targets}
        )
        groups = trainer.create_optimizer().param_groups
        masked = {name for group in groups if group["masked"] for name in group["param_names"]}
        assert masked == {name for name in trainable(model) if chosen(name) and name.endswith("weight")}
        assert masked


@pytest.mark.parametrize("base", BASES)
def test_adapters_resume_bit_for_bit(tmp_path, base):
    def build(folder, **extra):
        model = adapted(BASES[base](tmp_path / "base"))
        return make_trainer(
            tmp_path / folder, model, ChildTuningAdamW, variant="D", observe_steps=3, extra=extra
        )

    whole = build("whole", save_strategy="steps", save_steps=1)
    whole.train()
    # while observing, at the selection, while training
    for step in (1, 3, 6):
        resumed = build("resumed")
        with torch.no_grad():
            for p in trainable(resumed.model).values():
                p.zero_()
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert changed(state(whole.model), state(resumed.model)) == set()


def test_adapters_that_trained_masked_merge_and_load(tmp_path):
    model = adapted(make_base())
    trainer = make_trainer(tmp_path, model, SecondOrderAdamW, observe_steps=2, density=0.1)
    trainer.train()
    trainer.model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(make_base(), tmp_path / "adapter")
    batch = transformers.default_data_collator(examples())
    with torch.no_grad():
        expected = trainer.model.eval()(**batch).logits
        assert torch.equal(loaded.eval()(**batch).logits, expected)
        merged = loaded.merge_and_unload()
        assert torch.allclose(merged(**batch).logits, expected, atol=1e-5)
