"""Contract under test: `estimate_memory` says what real steps of real models then hold, within 3 % for each
kind of bytes and each peak, and needs no memory to say it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from benchmarks.harness import extra_bytes, storages
from sparse_optim import (
    Bernoulli,
    ChildTuningAdamW,
    DPSAdamW,
    GradDropAdamW,
    GradualUnfreezing,
    Lowest,
    MaskedAdamW,
    Schedule,
    SecondOrderAdamW,
    SignedGradient,
    SquaredGradient,
    TopK,
    estimate_memory,
    param_groups,
)
from sparse_optim.planning import MemoryEstimate

transformers = pytest.importorskip("transformers")

# torch looks up, once, which functions a device context redirects; within a test these are not torch's own
with torch.device("meta"):
    torch.empty(1)

CPU = torch.device("cpu")
CLOSE = 0.03
VOCABULARY = 300


def llama_config(**changes: Any) -> Any:
    sizes = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.LlamaConfig(vocab_size=VOCABULARY, **(sizes | changes))


def bert_config() -> Any:
    return transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=96, intermediate_size=160, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, num_labels=3,
    )  # fmt: skip


def llama(dtype: torch.dtype) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_config(llama_config()).to(dtype)


def bert(dtype: torch.dtype) -> nn.Module:
    return transformers.AutoModelForSequenceClassification.from_config(bert_config()).to(dtype)


def half_frozen(dtype: torch.dtype) -> nn.Module:
    model = llama(dtype)
    for name, p in model.named_parameters():
        p.requires_grad = "layers.1" in name or "lm_head" in name
    return model


def backward(model: nn.Module) -> None:
    """A real backward pass; what it leaves behind is gradients alone."""
    tokens = torch.randint(VOCABULARY, (2, 8))
    labels = tokens if "CausalLM" in type(model).__name__ else torch.tensor([0, 2])
    model(input_ids=tokens, labels=labels).loss.backward()


# what is measured

MASKS, AGES, MASTERS = ("indices", "bits"), ("age",), ("master",)
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


class Measured(NamedTuple):
    weights: int
    gradients: int
    moments: int
    masters: int
    ages: int
    masks: int
    between_steps: int
    training_peak: int | None
    observing_peak: int | None
    selecting_peak: int | None


def count(*values: object) -> int:
    return sum(storages(list(values)).values())


def states_of(optimizer: torch.optim.Optimizer, keys: Iterable[str] = ()) -> list[Tensor]:
    """The tensors of all states under these keys, or under all but the step counts."""
    return [
        value
        for state in optimizer.state.values()
        for key, value in state.items()
        if isinstance(value, Tensor) and (key in keys if keys else key != "step")
    ]


def gradient_tensors(params: Iterable[Tensor]) -> list[Tensor]:
    """Gradients, or of released ones the entries that were kept."""
    grads = [p.grad for p in params if p.grad is not None]
    values = [getattr(grad, "kept").values if hasattr(grad, "kept") else grad for grad in grads]  # noqa: B009
    return [value for value in values if value is not None]


def measure(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    backward: Callable[[nn.Module], None] = backward,
    *,
    with_backward: bool = False,
) -> Measured:
    """Takes steps, and sorts their peaks by what a step does; a torch optimizer only trains.

    Args:
        with_backward: count what is held during the backward pass, too, which then must make no activations.
    """
    policy = getattr(optimizer, "policy", None)
    schedule = policy.schedule if isinstance(policy, TopK) and not policy.trains_everything else None
    peaks: dict[str, int] = {}
    params = list(model.parameters())
    for clock in range(steps):
        kind = "training"
        if schedule is not None and schedule.phase(clock) % 2 == 0:
            kind = "selecting" if schedule.phase(clock + 1) % 2 else "observing"
        optimizer.zero_grad()
        if with_backward:
            before = count(params, states_of(optimizer), gradient_tensors(params))
            extra, _ = extra_bytes(lambda: backward(model), CPU)
            peaks[kind] = max(peaks.get(kind, 0), before + extra)
        else:
            backward(model)
        before = count(params, states_of(optimizer), gradient_tensors(params))
        # what garbage holds must not be given back during the step
        gc.disable()
        extra, _ = extra_bytes(optimizer.step, CPU)
        gc.enable()
        peaks[kind] = max(peaks.get(kind, 0), before + extra)
    assert kind == "training"
    return Measured(
        weights=count(params),
        gradients=count(
            [grad for grad in (p.grad for p in params) if grad is not None and type(grad) is Tensor]
        ),
        moments=count(states_of(optimizer, MOMENTS)),
        masters=count(states_of(optimizer, MASTERS)),
        ages=count(states_of(optimizer, AGES)),
        masks=count(states_of(optimizer, MASKS)),
        between_steps=count(params, states_of(optimizer), gradient_tensors(params)),
        training_peak=peaks["training"],
        observing_peak=peaks.get("observing"),
        selecting_peak=peaks.get("selecting"),
    )


def deviations(estimate: MemoryEstimate, measured: Measured) -> dict[str, float]:
    """Of each kind, relative to what was measured."""
    found = {}
    for kind, size in measured._asdict().items():
        estimated = getattr(estimate, kind)
        assert (estimated is None) == (size is None), kind
        if size is not None:
            found[kind] = abs(estimated - size) / size if size else float(estimated > 0)
    return found


def assert_close(estimate: MemoryEstimate, measured: Measured) -> None:
    wrong = {
        kind: (f"estimated {getattr(estimate, kind)}", f"measured {getattr(measured, kind)}")
        for kind, deviation in deviations(estimate, measured).items()
        if deviation > CLOSE
    }
    assert wrong == {}


# ours

ONCE = Schedule(observe=2)
AGAIN = Schedule(observe=2, train=1)
DENSE_FIRST = Schedule(observe=2, train=1, meanwhile="everything")
SETTINGS: dict[str, dict[str, Any]] = {
    "dense": {},
    "dense, amsgrad": {"amsgrad": True},
    "dense, float32 states": {"state_dtype": torch.float32},
    "Bernoulli": {"policy": Bernoulli(0.3), "unselected": "zero_grad"},
    "Bernoulli, frozen": {"policy": Bernoulli(0.3)},
    "list": {"policy": TopK(0.1, schedule=ONCE)},
    "list, amsgrad": {"policy": TopK(0.1, schedule=ONCE), "amsgrad": True},
    "list, signed": {"policy": TopK(0.02, statistic=SignedGradient(), schedule=ONCE)},
    "list, per tensor": {"policy": TopK(0.1, scope="tensor", schedule=ONCE)},
    "list, again": {"policy": TopK(0.1, schedule=AGAIN)},
    "long list, again": {"policy": TopK(0.4, schedule=AGAIN)},
    "list, again per tensor, amsgrad": {"policy": TopK(0.2, scope="tensor", schedule=AGAIN), "amsgrad": True},
    "list, scores of their own": {
        "policy": TopK(0.1, statistic=Lowest(SquaredGradient()), scope="tensor", schedule=ONCE)
    },
    "bits": {"policy": TopK(0.3, schedule=ONCE), "unselected": "zero_grad"},
    "bits, tracked, amsgrad": {"policy": TopK(0.3, schedule=ONCE), "unselected": "track", "amsgrad": True},
    "bits, everything meanwhile": {"policy": TopK(0.3, schedule=DENSE_FIRST)},
    "bits, everything before": {"policy": TopK(0.3, schedule=Schedule(observe=2, meanwhile="everything"))},
    "bits, again": {"policy": TopK(0.3, schedule=AGAIN), "unselected": "zero_grad"},
    "everything selected": {"policy": TopK(1.0, schedule=ONCE)},
}
LLAMA_TYPES = (torch.float32, torch.bfloat16)
CASES = [
    *((llama, dtype, name) for name in SETTINGS for dtype in LLAMA_TYPES),
    *((bert, torch.float64, name) for name in ("dense", "list, again", "bits")),
    *((half_frozen, torch.bfloat16, name) for name in ("dense", "list", "list, per tensor", "bits")),
]


def steps_of(policy: Any) -> int:
    """As many as show everything: three rounds of a schedule that repeats."""
    schedule = getattr(policy, "schedule", None)
    return 3 if schedule is None else 4 if schedule.train is None else 3 * (schedule.observe + schedule.train)


@pytest.mark.parametrize(
    ("make", "dtype", "name"), CASES, ids=[f"{m.__name__}-{str(d)[6:]}-{n}" for m, d, n in CASES]
)
def test_an_estimate_is_what_real_steps_hold(make: Any, dtype: torch.dtype, name: str) -> None:
    model, settings = make(dtype), SETTINGS[name]
    estimate = estimate_memory(model, **settings)
    measured = measure(
        model, MaskedAdamW(model.named_parameters(), **settings), steps_of(settings.get("policy"))
    )
    assert_close(estimate, measured)


METHODS: dict[str, tuple[str, Callable[[Any], MaskedAdamW]]] = {
    "Child-Tuning F": ("child_tuning_f", lambda groups: ChildTuningAdamW(groups, variant="F")),
    "Child-Tuning D": ("child_tuning_d", lambda g: ChildTuningAdamW(g, variant="D", observe_steps=2)),
    "Child-Tuning D as released": (
        "child_tuning_d",
        lambda groups: ChildTuningAdamW(groups, variant="D", observe_steps=2, fidelity="release"),
    ),
    "DPS": ("dps", lambda groups: DPSAdamW(groups, variant="dense", update_steps=2)),
    "second order": ("second_order", lambda groups: SecondOrderAdamW(groups, density=0.05, observe_steps=2)),
    "GradDrop": ("grad_drop", lambda groups: GradDropAdamW(groups, keep=0.5, granularity="layer")),
}


@pytest.mark.parametrize("name", METHODS)
def test_groups_with_dense_exceptions_are_estimated_as_they_train(name: str) -> None:
    # in low precision on a CPU, the norm that a clip_norm needs is taken of a float32 copy
    model = bert(torch.float32)
    method, make = METHODS[name]
    groups = param_groups(model, method=method)
    optimizer = make(groups)
    estimate = estimate_memory(groups, policy=optimizer.policy, unselected=optimizer.unselected)
    assert_close(estimate, measure(model, optimizer, steps_of(optimizer.policy)))


def test_gradual_unfreezing_is_estimated_at_its_last_stage() -> None:
    model = bert(torch.float32)
    policy = GradualUnfreezing(every=1)
    measured = measure(model, MaskedAdamW(model.named_parameters(), policy=policy), 8)
    assert_close(estimate_memory(model, policy=policy), measured)


# gradients that are released


class Arriving(torch.autograd.Function):
    """A loss that makes one gradient out of nothing."""

    @staticmethod
    def forward(ctx: Any, p: Tensor) -> Tensor:
        ctx.like = p.detach()
        return p.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Tensor:
        return torch.randn_like(ctx.like)


def one_by_one(model: nn.Module) -> None:
    """Gradients without activations, each parameter's when the one before it was dealt with."""
    for p in model.parameters():
        if p.requires_grad:
            Arriving.apply(p).backward()


RELEASED: dict[str, dict[str, Any]] = {
    "squares": {"policy": TopK(0.01, schedule=ONCE)},
    "signed": {"policy": TopK(0.05, statistic=SignedGradient(), schedule=ONCE)},
    "signed, again": {"policy": TopK(0.1, statistic=SignedGradient(), schedule=AGAIN)},
    "squares of micro-batches": {"policy": TopK(0.05, schedule=ONCE), "observe_unit": "microbatch"},
    "bfloat16 statistic": {"policy": TopK(0.05, schedule=ONCE), "statistic_dtype": torch.bfloat16},
    "host statistic": {"policy": TopK(0.05, schedule=ONCE), "statistic_device": "cpu"},
}


@pytest.mark.parametrize("dtype", LLAMA_TYPES, ids=str)
@pytest.mark.parametrize("name", RELEASED)
def test_an_estimate_of_released_gradients_is_what_real_steps_hold(name: str, dtype: torch.dtype) -> None:
    model, settings = llama(dtype), RELEASED[name] | {"release_gradients": True}
    try:
        optimizer = MaskedAdamW(model.named_parameters(), **settings)
    except (NotImplementedError, TypeError) as error:
        pytest.skip(str(error))
    # on this machine the host is where the weights are
    estimate = estimate_memory(model, **(settings | {"statistic_device": None}))
    measured = measure(model, optimizer, steps_of(settings["policy"]), one_by_one, with_backward=True)
    assert_close(estimate, measured)


def test_released_gradients_leave_their_buffers_and_one_whole_gradient() -> None:
    shapes = [("a", (1000, 100), torch.bfloat16), ("b", (50, 100), torch.bfloat16)]
    policy = TopK(0.01, schedule=Schedule(observe=1))
    whole, released = (estimate_memory(shapes, policy=policy, release_gradients=r) for r in (False, True))
    n, k, largest = 105_000, 1050, 2 * 100_000
    assert (whole.gradients, whole.gradient_buffers) == (2 * n, 0)
    assert (released.gradients, released.gradient_buffers) == (0, 4 * k)
    assert released.between_steps == 2 * n + 20 * k
    assert released.training_peak == released.between_steps + largest
    # squares of sums need the whole gradient
    assert released.observing_peak == 2 * n + 2 * n + 4 * n
    signed = TopK(0.01, statistic=SignedGradient(), schedule=Schedule(observe=1))
    folded = estimate_memory(shapes, policy=signed, release_gradients=True)
    assert folded.observing_peak == 2 * n + largest + 4 * n
    by_batch = estimate_memory(shapes, policy=policy, release_gradients=True, observe_unit="microbatch")
    assert by_batch.observing_peak == folded.observing_peak


def test_dense_exceptions_keep_their_gradients_where_others_release_them() -> None:
    a, b = nn.Parameter(torch.zeros(1000)), nn.Parameter(torch.zeros(10))
    groups = [{"params": [a]}, {"params": [b], "masked": False}]
    policy = TopK(0.1, schedule=Schedule(observe=1))
    estimate = estimate_memory(groups, policy=policy, release_gradients=True)
    assert (estimate.gradients, estimate.gradient_buffers, estimate.selected) == (40, 400, 110)
    assert estimate.moments == 2 * (400 + 40)


# torch's


@pytest.mark.parametrize("dtype", LLAMA_TYPES, ids=str)
@pytest.mark.parametrize(("optimizer", "switch"), [("adamw", "foreach"), ("adamw_fused", "fused")])
def test_an_estimate_of_torchs_adamw_is_what_it_holds(
    optimizer: Any, switch: str, dtype: torch.dtype
) -> None:
    model = llama(dtype)
    groups = param_groups(model)
    estimate = estimate_memory(groups, optimizer=optimizer)
    for group in groups:
        del group["masked"]
    assert_close(estimate, measure(model, torch.optim.AdamW(groups, **{switch: True}), 3))


def test_temporary_tensors_of_torchs_adamw_are_those_of_one_group() -> None:
    groups = [{"params": [nn.Parameter(torch.zeros(size))]} for size in (60, 100)]
    estimate = estimate_memory(groups, optimizer="adamw")
    assert estimate.training_peak - estimate.between_steps == 400


def test_eight_bit_adamw_is_estimated_as_documented() -> None:
    estimate = estimate_memory([("a", (1 << 20,), torch.bfloat16)], optimizer="adamw_8bit")
    assert estimate.per_parameter(estimate.between_steps) == 2 + 2 + 2 * (1 + 4 / 256)
    # small tensors keep float32 moments
    assert estimate_memory([("a", (100,), torch.bfloat16)], optimizer="adamw_8bit").moments == 800


# statistics


def test_a_statistic_in_bfloat16_or_on_the_host_takes_that_much_less() -> None:
    shapes, policy = [("a", (1000,), torch.float32)], TopK(0.1, schedule=Schedule(observe=1))
    plain = estimate_memory(shapes, policy=policy)
    half = estimate_memory(shapes, policy=policy, statistic_dtype=torch.bfloat16)
    host = estimate_memory(shapes, policy=policy, statistic_device="cpu", statistic_dtype=torch.bfloat16)
    assert [e.statistic for e in (plain, half, host)] == [4000, 2000, 0]
    assert [e.host_statistic for e in (plain, half, host)] == [0, 0, 2000]
    assert [e.observing_peak for e in (plain, half, host)] == [12_000, 10_000, 8_000]


def test_the_advice_names_what_brings_the_peak_below_the_budget() -> None:
    shapes = [("a", (1_000_000_000,), torch.bfloat16)]
    signed = TopK(0.01, statistic=SignedGradient(), schedule=Schedule(observe=1))

    def advice(budget: float, policy: Any = signed, **settings: Any) -> str:
        return estimate_memory(shapes, policy=policy, budget_bytes=budget, **settings).advice

    assert advice(9e9) == "The peak of 8.04 GB fits into 9.00 GB."
    assert advice(7e9) == (
        "The peak of 8.04 GB while observing and selecting does not fit into 7.00 GB; with "
        "statistic_dtype=torch.bfloat16 it is 6.04 GB."
    )
    assert "with statistic_device='cpu' it is 4.16 GB and 4.00 GB on the host." in advice(5e9)
    assert "no setting of this optimizer brings it below" in advice(1e9)
    squares = TopK(0.01, schedule=Schedule(observe=1))
    two = [*shapes, *[(str(i), (1_000_000,), torch.bfloat16) for i in range(1000)]]
    estimate = estimate_memory(two, policy=squares, budget_bytes=8e9)
    assert "release_gradients=True, observe_unit='microbatch', statistic_device='cpu'" in estimate.advice
    assert "no setting" in advice(3e9, policy=None)


# what is accepted


def test_a_model_on_the_meta_device_its_config_and_its_shapes_are_one_estimate() -> None:
    policy = TopK(0.1, schedule=ONCE)
    config = llama_config(tie_word_embeddings=True)
    real = transformers.AutoModelForCausalLM.from_config(config)
    with torch.device("meta"):
        meta = transformers.AutoModelForCausalLM.from_config(config)
    shapes = [(name, p.shape, p.dtype) for name, p in real.named_parameters()]
    several = [
        real,
        meta,
        config,
        shapes,
        real.named_parameters(),
        list(real.parameters()),
        param_groups(real),
    ]
    assert len({estimate_memory(each, policy=policy) for each in several}) == 1
    assert estimate_memory(config).parameters == sum(p.numel() for p in real.parameters())


def test_a_tied_parameter_counts_once() -> None:
    p = nn.Parameter(torch.zeros(100))
    groups = [{"params": [("a", p), ("b", p)]}, {"params": [nn.Parameter(torch.zeros(10))], "masked": False}]
    assert estimate_memory(groups).parameters == 110


def test_frozen_parameters_hold_weights_alone() -> None:
    frozen, trained = nn.Parameter(torch.zeros(100), requires_grad=False), nn.Parameter(torch.zeros(10))
    estimate = estimate_memory([frozen, trained])
    assert (estimate.parameters, estimate.trained) == (110, 10)
    assert (estimate.weights, estimate.gradients, estimate.moments) == (440, 40, 80)


def test_a_dtype_replaces_that_of_floating_weights_alone() -> None:
    shapes = [("a", (10,), torch.float32), ("codes", (10,), torch.int8)]
    assert estimate_memory(shapes, dtype=torch.bfloat16).weights == 20 + 10


def test_a_choice_in_each_tensor_is_rounded_down_in_each() -> None:
    shapes = [("a", (9,), torch.float32), ("b", (9,), torch.float32)]
    policy = {scope: TopK(0.5, scope=scope, schedule=ONCE) for scope in ("global", "tensor")}
    assert estimate_memory(shapes, policy=policy["global"]).selected == 9
    assert estimate_memory(shapes, policy=policy["tensor"]).selected == 8


def test_lists_of_huge_tensors_have_wide_indices() -> None:
    policy = TopK(1e-6, schedule=Schedule(observe=1))
    huge = estimate_memory([("a", (1 << 31,), torch.float32)], policy=policy)
    assert huge.masks == 8 * 2147
    assert estimate_memory([("a", ((1 << 31) - 1,), torch.float32)], policy=policy).masks == 4 * 2147


def test_a_config_of_seven_billion_weights_allocates_none_of_them() -> None:
    policy = TopK(0.01, schedule=Schedule(observe=1))
    settings = {"policy": policy, "dtype": torch.bfloat16, "release_gradients": True}
    found: list[MemoryEstimate] = []
    allocated, _ = extra_bytes(
        lambda: found.append(estimate_memory(transformers.LlamaConfig(), **settings)), CPU
    )
    assert allocated < 1 << 20
    assert found[0].parameters == 6_738_415_616
    assert found[0].per_parameter(found[0].between_steps) == pytest.approx(2.2, abs=1e-3)


def test_the_auto_class_decides_what_is_built_of_a_config() -> None:
    config = bert_config()
    for name in ("AutoModelForSequenceClassification", "AutoModel"):
        built = getattr(transformers, name).from_config(config)
        expected = sum(p.numel() for p in built.parameters())
        assert estimate_memory(config, auto_class=name).parameters == expected
        assert estimate_memory(config, auto_class=getattr(transformers, name)).parameters == expected
    # an encoder and decoder knows no causal language model
    t5 = transformers.T5Config(vocab_size=100, d_model=32, d_ff=64, d_kv=8, num_layers=1, num_heads=4)
    expected = sum(p.numel() for p in transformers.AutoModelForSeq2SeqLM.from_config(t5).parameters())
    assert estimate_memory(t5).parameters == expected


def test_the_table_shows_kinds_peaks_and_what_is_missing_from_it() -> None:
    policy = TopK(0.1, schedule=Schedule(observe=1))
    shapes = [("a", (1 << 28,), torch.float32)]
    lines = str(
        estimate_memory(shapes, policy=policy, statistic_device="cpu", budget_bytes=1e12)
    ).splitlines()
    rows = {line[:22].strip(): line[22:].split() for line in lines[2:-2]}
    assert rows["weights"] == rows["gradients"] == rows["statistic on the host"] == ["1.000", "4.000"]
    assert rows["moments"] == ["0.200", "0.800"]
    assert {
        "masks",
        "between steps",
        "a step that trains",
        "while observing",
        "while selecting",
    } < rows.keys()
    assert "ages" not in rows
    assert lines[-2] == "Activations are not estimated."
    assert lines[-1].endswith("fits into 1000.00 GB.")


REFUSED = [
    ({"optimizer": "sgd"}, "optimizer must be one of 'masked', 'adamw'"),
    ({"optimizer": "adamw", "policy": Bernoulli(0.5)}, "policy must be left out for optimizer='adamw'"),
    ({"unselected": "thawed"}, "unselected must be one of"),
    ({"dtype": torch.int8}, "dtype must be a floating dtype or None, got torch.int8"),
    ({"statistic_dtype": torch.float16}, "statistic_dtype must be torch.float32, torch.bfloat16 or None"),
    ({"statistic_device": "cuda"}, "statistic_device must be 'cpu' or None, got 'cuda'"),
    ({"observe_unit": "epoch"}, "observe_unit must be 'step'"),
    ({"release_gradients": True}, "release_gradients=True needs"),
    ({"release_gradients": True, "policy": TopK(0.5), "unselected": "track"}, "release_gradients=True needs"),
    ({"budget_bytes": 0}, "budget_bytes must be positive, got 0"),
    ({"auto_class": "AutoModel"}, "auto_class must be None unless a config is given"),
]


@pytest.mark.parametrize(("settings", "words"), REFUSED, ids=[" ".join(s) for s, _ in REFUSED])
def test_bad_settings_get_a_sentence(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as caught:
        estimate_memory([("a", (10,), torch.float32)], **settings)
    assert words in str(caught.value)
    assert ";" in str(caught.value)


@pytest.mark.parametrize("model", ["bert-base", torch.zeros(3), 7, ["a"]], ids=str)
def test_what_is_no_model_gets_a_sentence(model: Any) -> None:
    with pytest.raises(TypeError, match=r"must be .*, got .*; "):
        estimate_memory(model)


def test_a_model_without_parameters_and_unknown_auto_classes_get_a_sentence() -> None:
    with pytest.raises(ValueError, match="must have parameters, got none; "):
        estimate_memory(nn.ReLU())
    for wrong in ("AutoModelForNothing", int):
        with pytest.raises(ValueError, match=r"auto_class must .*, got .*; "):
            estimate_memory(bert_config(), auto_class=wrong)
