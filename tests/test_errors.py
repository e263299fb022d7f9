"""Bad input gets a sentence, value, need, remedy, before any weight moves; torch's errors keep torch's text.

Bad calls are data, in the spirit of torch's OptimizerInfo: a call, the exception, a regex of the message.
"""

import copy
import sys
import types

import pytest
import torch
from torch import nn

from sparse_optim import (
    Bernoulli,
    ChildTuningAdamW,
    CountedSquaredGradient,
    Lowest,
    MaskedAdamW,
    Schedule,
    SquaredGradient,
    Statistic,
    TopK,
    backends,
)

# small groups next to others, of which some are left without a selected entry
pytestmark = pytest.mark.filterwarnings("ignore:nothing was selected in parameter group")


def weight(*shape, dtype=torch.float32):
    return nn.Parameter(torch.linspace(-1, 1, 12).reshape(shape or (4, 3)).to(dtype))


def table(rows):
    """(id, ...) rows for parametrize; tensors are made by functions, so that no two tests share one."""
    return [pytest.param(*row[1:], id=row[0]) for row in rows]


# --- what torch refuses, we refuse in the same words ------------------------------------------------------


def shared():
    tensor = weight()
    return [{"params": [tensor]}, {"params": [tensor]}]


TORCH_REFUSES = table(
    [
        (
            "params_is_a_tensor",
            weight,
            {},
            TypeError,
            "params argument given to the optimizer should be an iterable",
        ),
        ("no_parameters", list, {}, ValueError, "optimizer got an empty parameter list"),
        (
            "group_is_a_set",
            lambda: [{"params": {weight()}}],
            {},
            TypeError,
            "optimizer parameters need to be organized in ordered collections",
        ),
        (
            "item_is_not_a_tensor",
            lambda: [weight(), 3.0],
            {},
            TypeError,
            "optimizer can only optimize Tensors, but one of the params is float",
        ),
        ("not_a_leaf", lambda: [weight() * 2], {}, ValueError, "can't optimize a non-leaf Tensor"),
        (
            "same_parameter_in_two_groups",
            shared,
            {},
            ValueError,
            "some parameters appear in more than one parameter group",
        ),
        ("lr=-1.0", lambda: [weight()], {"lr": -1.0}, ValueError, r"Invalid learning rate: -1\.0"),
        ("lr=nan", lambda: [weight()], {"lr": float("nan")}, ValueError, "Invalid learning rate: nan"),
        ("eps=-1e-8", lambda: [weight()], {"eps": -1e-8}, ValueError, "Invalid epsilon value: -1e-08"),
        (
            "weight_decay=-0.1",
            lambda: [weight()],
            {"weight_decay": -0.1},
            ValueError,
            r"Invalid weight_decay value: -0\.1",
        ),
        (
            "beta1=1.0",
            lambda: [weight()],
            {"betas": (1.0, 0.999)},
            ValueError,
            r"Invalid beta parameter at index 0: 1\.0",
        ),
        (
            "beta2=-0.5",
            lambda: [weight()],
            {"betas": (0.9, -0.5)},
            ValueError,
            r"Invalid beta parameter at index 1: -0\.5",
        ),
        (
            "tensor_lr_of_two_elements",
            lambda: [weight()],
            {"lr": torch.ones(2)},
            ValueError,
            "Tensor lr must be 1-element",
        ),
        (
            "tensor_lr_and_foreach",
            lambda: [weight()],
            {"lr": torch.tensor(0.1), "foreach": True},
            ValueError,
            "lr as a Tensor is not supported for capturable=False and foreach=True",
        ),
        (
            "one_tensor_beta",
            lambda: [weight()],
            {"betas": (torch.tensor(0.9), 0.999)},
            ValueError,
            "betas must be either both floats or both Tensors",
        ),
        (
            "tensor_betas_and_foreach",
            lambda: [weight()],
            {"betas": (torch.tensor(0.9), torch.tensor(0.999)), "foreach": True},
            ValueError,
            r"betas\[0\] as a Tensor is not supported for capturable=False and foreach=True",
        ),
        (
            "tensor_beta1_of_two_elements",
            lambda: [weight()],
            {"betas": (torch.tensor([0.9]), torch.tensor([0.9, 0.9]))},
            (ValueError, RuntimeError),
            r"Tensor betas\[1\] must be 1-element|Boolean value of Tensor",
        ),
        (
            "fused_and_foreach",
            lambda: [weight()],
            {"fused": True, "foreach": True},
            RuntimeError,
            "`fused` and `foreach` cannot be `True` together",
        ),
        (
            "fused_and_differentiable",
            lambda: [weight()],
            {"fused": True, "differentiable": True},
            RuntimeError,
            "`fused` does not support `differentiable`",
        ),
        (
            "partly_named",
            lambda: [("weight", weight()), weight()],
            {},
            ValueError,
            "all optimizer params should be with/without names. Some param names are missing",
        ),
        (
            "named_group_after_unnamed",
            lambda: [{"params": [weight()]}, {"params": [("weight", weight())]}],
            {},
            ValueError,
            "all optimizer param groups should be with/without names. cannot add param group with names",
        ),
        (
            "unnamed_group_after_named",
            lambda: [{"params": [("weight", weight())]}, {"params": [weight()]}],
            {},
            ValueError,
            "all optimizer param groups should be with/without names. cannot add param group without names",
        ),
    ]
)


@pytest.mark.parametrize(("make_params", "kwargs", "error", "message"), TORCH_REFUSES)
@pytest.mark.parametrize("make", [MaskedAdamW, ChildTuningAdamW], ids=lambda cls: cls.__name__)
def test_what_torch_refuses_is_refused_in_the_words_of_torch(make, make_params, kwargs, error, message):
    if make is ChildTuningAdamW:
        kwargs = {"variant": "F", **kwargs}
    with pytest.raises(error, match=message) as ours:
        make(make_params(), **kwargs)
    kwargs.pop("variant", None)
    with pytest.raises(error, match=message) as theirs:
        torch.optim.AdamW(make_params(), **kwargs)
    assert str(ours.value) == str(theirs.value)


def test_a_duplicate_in_a_group_warns_in_the_words_of_torch():
    tensor = weight()
    with pytest.warns(UserWarning, match="optimizer contains a parameter group with duplicate parameters"):
        MaskedAdamW([tensor, tensor])


def test_what_torch_accepts_is_accepted():
    MaskedAdamW([weight() * 2], differentiable=True)  # a non-leaf, under autograd
    MaskedAdamW([weight()], lr=0.0, betas=(0.0, 0.0), eps=0.0, weight_decay=0.0)
    MaskedAdamW([weight()], lr=torch.tensor([0.1]), betas=(torch.tensor([0.9]), torch.tensor([[0.99]])))
    MaskedAdamW(iter([weight()]), lr=1, weight_decay=1)
    MaskedAdamW({"params": [weight()]} for _ in range(2))


# --- what only we refuse ---------------------------------------------------------------------------------


D = {"variant": "D", "density": 0.3, "observe_steps": 4}

WE_REFUSE = table(
    [
        ("keep=0.0", lambda: Bernoulli(keep=0.0), ValueError, r"keep must be in \(0, 1\], got 0\.0; "),
        ("keep=1.5", lambda: Bernoulli(keep=1.5), ValueError, r"keep must be in \(0, 1\], got 1\.5; "),
        ("keep=-0.5", lambda: Bernoulli(keep=-0.5), ValueError, r"keep must be in \(0, 1\], got -0\.5; "),
        (
            "keep=nan",
            lambda: Bernoulli(keep=float("nan")),
            ValueError,
            r"keep must be in \(0, 1\], got nan; ",
        ),
        (
            "keep='half'",
            lambda: Bernoulli(keep="half"),
            (TypeError, ValueError),
            r"keep must be .*, got 'half'; ",
        ),
        ("keep=None", lambda: Bernoulli(keep=None), ValueError, r"keep must be .*, got None; "),
        (
            "unit='row'",
            lambda: Bernoulli(0.5, unit="row"),
            ValueError,
            r"unit must be .*'entry'.*, got 'row'; ",
        ),
        ("every=0", lambda: Bernoulli(0.5, every=0), ValueError, r"every must be .*, got 0; "),
        (
            "every=2.5",
            lambda: Bernoulli(0.5, every=2.5),
            (TypeError, ValueError),
            r"every must be .*, got 2\.5; ",
        ),
        (
            "every='step'",
            lambda: Bernoulli(0.5, every="step"),
            ValueError,
            r"every must be .*, got 'step'; .*'epoch'",
        ),
        ("density=0.0", lambda: TopK(density=0.0), ValueError, r"density must be in \(0, 1\], got 0\.0; "),
        ("density=1.01", lambda: TopK(density=1.01), ValueError, r"density must be in \(0, 1\], got 1\.01; "),
        (
            "density=nan",
            lambda: TopK(density=float("nan")),
            ValueError,
            r"density must be in \(0, 1\], got nan; ",
        ),
        (
            "scope='row'",
            lambda: TopK(0.5, scope="row"),
            ValueError,
            r"scope must be .*'global'.*, got 'row'; ",
        ),
        (
            "statistic='squares'",
            lambda: TopK(0.5, statistic="squares"),
            TypeError,
            r"statistic must be .*SquaredGradient\(\).*, got 'squares'; ",
        ),
        (
            "statistic_is_a_class",
            lambda: TopK(0.5, statistic=SquaredGradient),
            TypeError,
            r"statistic must be .*SquaredGradient\(\).*, got <class .*SquaredGradient'>; ",
        ),
        (
            "statistic_is_the_base_class",
            lambda: TopK(0.5, statistic=Statistic()),
            TypeError,
            r"statistic must be .*SquaredGradient\(\).*, got <.*Statistic object.*>; ",
        ),
        (
            "lowest_of_a_class",
            lambda: Lowest(SquaredGradient),
            TypeError,
            r"statistic must be .*SquaredGradient\(\).*, got <class .*SquaredGradient'>; ",
        ),
        (
            "lowest_of_the_base_class",
            lambda: Lowest(Statistic()),
            TypeError,
            r"statistic must be .*SquaredGradient\(\).*, got <.*Statistic object.*>; ",
        ),
        (
            "lowest_of_a_word",
            lambda: Lowest("squares"),
            TypeError,
            r"statistic must be .*, got 'squares'; ",
        ),
        *(
            (
                f"penalty_steps={steps!r}",
                lambda steps=steps: CountedSquaredGradient(steps),
                ValueError,
                rf"penalty_steps must be a positive integer, got {steps!r}; ",
            )
            for steps in (0, -1, 2.5, "10", True)
        ),
        ("schedule=5", lambda: TopK(0.5, schedule=5), TypeError, r"schedule must be a Schedule.*, got 5; "),
        ("observe=0", lambda: Schedule(observe=0), ValueError, r"observe must be .*, got 0; "),
        ("observe=-3", lambda: Schedule(observe=-3), ValueError, r"observe must be .*, got -3; "),
        (
            "observe=2.0",
            lambda: Schedule(observe=2.0),
            (TypeError, ValueError),
            r"observe must be .*, got 2\.0; ",
        ),
        ("train=0", lambda: Schedule(observe=5, train=0), ValueError, r"train must be .*, got 0; "),
        (
            "train_without_observe",
            lambda: Schedule(observe=None, train=5),
            ValueError,
            r"train must be None when observe is None, got 5; ",
        ),
        (
            "meanwhile='all'",
            lambda: Schedule(observe=5, meanwhile="all"),
            ValueError,
            r"meanwhile must be 'nothing' or 'everything', got 'all'; ",
        ),
        (
            "meanwhile_everything_without_observe",
            lambda: Schedule(observe=None, meanwhile="everything"),
            ValueError,
            r"meanwhile must be 'nothing' when observe is None, got 'everything'; ",
        ),
        (
            "clip_norm=0.0",
            lambda: SquaredGradient(clip_norm=0.0),
            ValueError,
            r"clip_norm must be positive.*, got 0\.0; ",
        ),
        (
            "policy='topk'",
            lambda: MaskedAdamW([weight()], policy="topk"),
            TypeError,
            r"policy must be .*Bernoulli.*, got 'topk'; ",
        ),
        (
            "policy=0.1",
            lambda: MaskedAdamW([weight()], policy=0.1),
            TypeError,
            r"policy must be .*TopK.*, got 0\.1; ",
        ),
        (
            "policy_is_a_class",
            lambda: MaskedAdamW([weight()], policy=TopK),
            TypeError,
            r"policy must be .*TopK.*, got <class .*TopK'>; ",
        ),
        (
            "policy_is_a_schedule",
            lambda: MaskedAdamW([weight()], policy=Schedule(observe=1)),
            TypeError,
            r"policy must be .*TopK.*, got Schedule\(.*\); ",
        ),
        (
            "unselected='freeze'",
            lambda: MaskedAdamW([weight()], unselected="freeze"),
            ValueError,
            r"unselected must be .*'frozen'.*'zero_grad'.*'track'.*, got 'freeze'; ",
        ),
        (
            "unselected=None",
            lambda: MaskedAdamW([weight()], unselected=None),
            ValueError,
            r"unselected must be .*'frozen'.*, got None; ",
        ),
        ("seed=-1", lambda: MaskedAdamW([weight()], seed=-1), ValueError, r"seed must be .*, got -1; "),
        (
            "seed=2**64",
            lambda: MaskedAdamW([weight()], seed=2**64),
            ValueError,
            rf"seed must be .*, got {2**64}; ",
        ),
        (
            "seed=0.5",
            lambda: MaskedAdamW([weight()], seed=0.5),
            (TypeError, ValueError),
            r"seed must be .*, got 0\.5; ",
        ),
        (
            "seed=None",
            lambda: MaskedAdamW([weight()], seed=None),
            (TypeError, ValueError),
            r"seed must be .*, got None; ",
        ),
        (
            "backend='cuda'",
            lambda: MaskedAdamW([weight()], backend="cuda"),
            ValueError,
            r"backend must be .*reference.*, got 'cuda'; ",
        ),
        (
            "backend=None",
            lambda: MaskedAdamW([weight()], backend=None),
            (TypeError, ValueError),
            r"backend must be .*reference.*, got None; ",
        ),
        (
            "state_dtype=int8",
            lambda: MaskedAdamW([weight()], state_dtype=torch.int8),
            ValueError,
            r"state_dtype must be .*, got torch\.int8; ",
        ),
        (
            "state_dtype=float8",
            lambda: MaskedAdamW([weight()], state_dtype=torch.float8_e5m2),
            ValueError,
            r"state_dtype must be .*, got torch\.float8_e5m2; ",
        ),
        (
            "state_dtype=float16",
            lambda: MaskedAdamW([weight()], state_dtype=torch.float16),
            ValueError,
            r"state_dtype must be .*, got torch\.float16; ",
        ),
        (
            "state_dtype='bf16'",
            lambda: MaskedAdamW([weight()], state_dtype="bf16"),
            (TypeError, ValueError),
            r"state_dtype must be .*, got 'bf16'; ",
        ),
        (
            "max_grad_norm=0.0",
            lambda: MaskedAdamW([weight()], max_grad_norm=0.0),
            ValueError,
            r"max_grad_norm must be positive.*, got 0\.0; ",
        ),
        (
            "max_grad_norm=nan",
            lambda: MaskedAdamW([weight()], max_grad_norm=float("nan")),
            ValueError,
            r"max_grad_norm must be positive.*, got nan; ",
        ),
        (
            "rescale_and_track",
            lambda: MaskedAdamW([weight()], policy=Bernoulli(0.5, rescale=True), unselected="track"),
            ValueError,
            r"rescale must be False when unselected='track', got True; ",
        ),
        (
            "release_gradients=True",
            lambda: MaskedAdamW([weight()], release_gradients=True),
            ValueError,
            r"release_gradients=True needs .*, got policy=None; ",
        ),
        (
            "variant='E'",
            lambda: ChildTuningAdamW([weight()], variant="E"),
            ValueError,
            r"variant must be .*'F'.*'D'.*, got 'E'; ",
        ),
        (
            "fidelity='code'",
            lambda: ChildTuningAdamW([weight()], variant="F", fidelity="code"),
            ValueError,
            r"fidelity must be .*'paper'.*'release'.*, got 'code'; ",
        ),
        (
            "keep_with_variant_D",
            lambda: ChildTuningAdamW([weight()], **D, keep=0.3),
            ValueError,
            r"keep must not be given for variant='D', got 0\.3; .*density",
        ),
        (
            "density_with_variant_F",
            lambda: ChildTuningAdamW([weight()], variant="F", density=0.3),
            ValueError,
            r"density must not be given for variant='F', got 0\.3; .*keep",
        ),
        (
            "observe_steps_with_variant_F",
            lambda: ChildTuningAdamW([weight()], variant="F", observe_steps=4),
            ValueError,
            r"observe_steps must not be given for variant='F', got 4; ",
        ),
        (
            "variant_D_without_observe_steps",
            lambda: ChildTuningAdamW([weight()], variant="D", density=0.3),
            ValueError,
            r"observe_steps must be given for variant='D', got none; .*len\(dataloader\)",
        ),
        (
            "observe_steps=0",
            lambda: ChildTuningAdamW([weight()], variant="D", observe_steps=0),
            ValueError,
            r"observe_steps must be .*, got 0; ",
        ),
        (
            "variant_F_with_keep=0.0",
            lambda: ChildTuningAdamW([weight()], variant="F", keep=0.0),
            ValueError,
            r"keep must be in \(0, 1\], got 0\.0; ",
        ),
        (
            "variant_D_with_density=2",
            lambda: ChildTuningAdamW([weight()], **{**D, "density": 2}),
            ValueError,
            r"density must be in \(0, 1\], got 2; ",
        ),
        (
            "child_unselected='freeze'",
            lambda: ChildTuningAdamW([weight()], variant="F", unselected="freeze"),
            ValueError,
            r"unselected must be .*'frozen'.*, got 'freeze'; ",
        ),
    ]
)


@pytest.mark.parametrize(("call", "error", "message"), WE_REFUSE)
def test_bad_arguments_are_refused_with_value_need_and_remedy(call, error, message):
    with pytest.raises(error, match=rf"^(?s:{message}).*\.$") as caught:
        call()
    value_and_need, _, remedy = str(caught.value).partition("; ")
    assert value_and_need
    assert remedy


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("policy", Bernoulli(0.5)),
        ("unselected", "track"),
        ("seed", 3),
        ("backend", "reference"),
        ("state_dtype", torch.float32),
        ("stochastic_rounding", True),
        ("max_grad_norm", 1.0),
        ("release_gradients", True),
        ("observe_unit", "microbatch"),
        ("statistic_dtype", torch.bfloat16),
        ("statistic_device", "cpu"),
        ("keep", 0.5),
        ("density", 0.5),
        ("differentiable", True),
        ("capturable", True),
        ("fused", True),
        ("clock", 7),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_group_overrides_numbers_and_masked_and_nothing_else(name, value):
    optimizer = MaskedAdamW([weight()], policy=Bernoulli(0.5))
    message = rf"^a parameter group must override .* only, got '{name}'; \S.*\.$"
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.add_param_group({"params": [weight()], name: value})
    assert len(optimizer.param_groups) == 1
    with pytest.raises((TypeError, ValueError), match=message):
        MaskedAdamW([{"params": [weight()], name: value}], policy=Bernoulli(0.5))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"fused": True}, r"^fused=True needs an accelerated backend.*native.*not built.*triton.*; use "),
        ({"backend": "native"}, r"^backend='native' cannot be used: it is not built; use backend='auto'\.$"),
        ({"backend": "triton"}, r"^backend='triton' cannot be used: it is not built; use backend='auto'\.$"),
    ],
    ids=["fused", "native", "triton"],
)
def test_a_backend_that_the_installation_lacks_is_refused_with_the_reason(asked, message, monkeypatch):
    monkeypatch.setattr(backends, "_load", lambda name: "it is not built")
    with pytest.raises(RuntimeError, match=message):
        MaskedAdamW([weight()], **asked)


def test_fused_on_a_device_that_nothing_accelerates_is_refused_before_anything_moves(monkeypatch):
    class Elsewhere:
        """Accelerates another device than the CPU."""

        def why_not(self, device):
            return "" if device is None or device.type != "cpu" else "no verbs for the CPU"

    monkeypatch.setattr(backends, "_load", lambda name: Elsewhere())
    optimizer = MaskedAdamW([with_gradient(weight())], fused=True)
    before = snapshot(optimizer)
    with pytest.raises(
        RuntimeError, match=r"^`fused=True` requires all the params to be .*cpu.*; use fused=None"
    ):
        optimizer.step()
    assert_untouched(optimizer, before)


def test_a_group_that_restates_the_defaults_is_welcome():
    groups = [{"params": [weight()], "foreach": None, "masked": True, "lr": 0.1, "weight_decay": 0.0}]
    assert MaskedAdamW(groups, policy=Bernoulli(0.5)).param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize(
    ("policy", "names", "message"),
    [
        (Bernoulli(0.5, unit="layer"), None, r"^unit='layer' needs named parameters, got none; \S.*\.$"),
        # two words with the same CRC-32
        (
            Bernoulli(0.5),
            ("plumless", "buckeroo"),
            r"^names must have different CRC-32 keys, got .*'plumless'.*'buckeroo'; \S.*\.$",
        ),
    ],
    ids=["layers_without_names", "names_with_the_same_hash"],
)
def test_names_that_cannot_key_a_random_mask_are_refused_before_the_first_step(policy, names, message):
    values = [with_gradient(weight()), with_gradient(weight(12))]
    optimizer = MaskedAdamW(zip(names, values, strict=True) if names else values, policy=policy)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert_untouched(optimizer, before)


@pytest.mark.parametrize("meanwhile", ["nothing", "everything"])
def test_non_finite_gradients_while_observing_warn_once_with_the_name(meanwhile):
    good, bad = weight(), weight(12)
    policy = TopK(0.5, schedule=Schedule(observe=2, meanwhile=meanwhile))
    optimizer = MaskedAdamW([("good", good), ("bad", bad)], policy=policy)
    good.grad, bad.grad = torch.ones_like(good), torch.full_like(bad, float("inf"))
    optimizer.step()
    bad.grad = torch.ones_like(bad)
    with pytest.warns(UserWarning, match="non-finite.*'bad'") as caught:
        optimizer.step()
    assert len(caught) == 1
    assert optimizer.state_dict()["param_groups"][0]["clock"] == 2


@pytest.mark.parametrize("value", ["no", 0, None], ids=repr)
def test_masked_of_a_group_is_a_boolean(value):
    with pytest.raises((TypeError, ValueError), match=rf"^masked must be .*, got {value!r}; \S.*\.$"):
        MaskedAdamW([{"params": [weight()], "masked": value}], policy=Bernoulli(0.5))


# --- calls at the wrong time -----------------------------------------------------------------------------


def with_gradient(value):
    value.grad = torch.full_like(value, 0.5)
    return value


def test_observe_is_refused_where_steps_observe():
    optimizer = MaskedAdamW([with_gradient(weight())], policy=TopK(0.5, schedule=Schedule(observe=2)))
    with pytest.raises(RuntimeError, match=r"observe.*2.*; \S.*\.$"):
        optimizer.observe()


@pytest.mark.parametrize("policy", [None, Bernoulli(0.5)], ids=["no_policy", "Bernoulli"])
@pytest.mark.parametrize("method", ["observe", "select"])
def test_observe_and_select_are_refused_where_nothing_is_selected(method, policy):
    optimizer = MaskedAdamW([with_gradient(weight())], policy=policy)
    with pytest.raises(RuntimeError, match=rf"^{method}.*; \S.*\.$"):
        getattr(optimizer, method)()


@pytest.mark.parametrize("method", ["step", "select"])
@pytest.mark.parametrize("unselected", ["frozen", "zero_grad", "track"])
def test_nothing_observed_is_an_error_before_any_weight_moves(unselected, method):
    optimizer = MaskedAdamW(
        [{"params": [with_gradient(weight())]}, {"params": [with_gradient(weight())], "masked": False}],
        policy=TopK(0.5, schedule=Schedule(observe=None)),
        unselected=unselected,
    )
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"observe.*; \S.*\.$"):
        getattr(optimizer, method)()
    assert_untouched(optimizer, before)


def test_select_is_refused_where_steps_select():
    optimizer = MaskedAdamW([with_gradient(weight())], policy=TopK(0.5, schedule=Schedule(observe=2)))
    with pytest.raises(RuntimeError, match=r"select.*; \S.*\.$"):
        optimizer.select()


@pytest.mark.parametrize("policy", [None, Bernoulli(0.5), TopK(0.5, schedule=Schedule(observe=1))], ids=repr)
def test_the_mask_of_a_foreign_tensor_is_an_error(policy):
    optimizer = MaskedAdamW([with_gradient(weight())], policy=policy)
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"^param must be a parameter of this optimizer, got .*\(4, 3\); \S.*\.$"
        ):
            optimizer.mask(weight())
        optimizer.step()


@pytest.mark.parametrize(
    ("density", "gradient", "message"),
    [
        (0.01, 0.5, r"^density must select at least one of the 12 observed entries, got 0\.01; \S.*\.$"),
        (0.5, 1e25, r"^density 0\.5 needs 6 finite scores, got 0 of 12; \S.*\.$"),
    ],
    ids=["too_few_entries", "squares_overflow"],
)
@pytest.mark.parametrize("unselected", ["frozen", "zero_grad", "track"])
@pytest.mark.parametrize("meanwhile", ["nothing", "everything"])
def test_an_impossible_selection_is_an_error_and_moves_no_weight(
    meanwhile, unselected, density, gradient, message
):
    policy = TopK(density, schedule=Schedule(observe=1, meanwhile=meanwhile))
    value = weight()
    value.grad = torch.full_like(value, gradient)
    before = value.detach().clone()
    with pytest.raises(RuntimeError, match=message):
        MaskedAdamW([value], policy=policy, unselected=unselected).step()
    assert torch.equal(value, before)


class Elsewhere(SquaredGradient):
    """Remembers gradients on a device of its own."""

    def init(self, param, *, seed, key):
        return torch.zeros(param.shape, device="meta")


@pytest.mark.parametrize("backend", backends.available(torch.device("cpu")))
@pytest.mark.parametrize("meanwhile", ["nothing", "everything"])
@pytest.mark.parametrize("observe", [1, 3], ids=["about_to_select", "observing"])
def test_a_statistic_on_another_device_is_refused_before_any_weight_moves(observe, meanwhile, backend):
    policy = TopK(0.5, statistic=Elsewhere(), schedule=Schedule(observe=observe, meanwhile=meanwhile))
    good, value = with_gradient(weight()), with_gradient(weight(12))
    optimizer = MaskedAdamW(
        [{"params": [("good", good)], "masked": False}, {"params": [("value", value)]}],
        policy=policy, backend=backend,
    )  # fmt: skip
    before = [p.detach().clone() for p in (good, value)]
    message = r"^init of Elsewhere must make a tensor on cpu, where 'value' is, got one on meta; \S.*\.$"
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            optimizer.step()
    assert optimizer.state_dict()["param_groups"][0]["clock"] == 0
    assert all(torch.equal(p, old) for p, old in zip((good, value), before, strict=True))


# --- errors of step() come before the first change -------------------------------------------------------


def snapshot(optimizer):
    weights = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    return weights, copy.deepcopy(optimizer.state_dict())


def assert_untouched(optimizer, before):
    weights, state_dict = snapshot(optimizer)
    assert all(torch.equal(new, old) for new, old in zip(weights, before[0], strict=True))
    assert state_dict["param_groups"] == before[1]["param_groups"]
    assert state_dict["state"].keys() == before[1]["state"].keys()
    for number, state in state_dict["state"].items():
        assert state.keys() == before[1]["state"][number].keys()
        for new, old in zip(state.values(), before[1]["state"][number].values(), strict=True):
            assert type(new) is type(old)
            assert torch.equal(torch.as_tensor(new), torch.as_tensor(old))


POLICIES = {
    "no_policy": None,
    "Bernoulli": Bernoulli(0.5),
    "TopK_observing": TopK(0.5, schedule=Schedule(observe=9)),
    "TopK_observing_and_training": TopK(0.5, schedule=Schedule(observe=9, meanwhile="everything")),
    "TopK_about_to_select": TopK(0.5, schedule=Schedule(observe=3)),
    "TopK_selected": TopK(0.5, schedule=Schedule(observe=1)),
}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("unselected", ["frozen", "zero_grad", "track"])
@pytest.mark.parametrize("place", [0, 1, 2], ids=["first", "second", "in_another_group"])
def test_a_sparse_gradient_among_dense_ones_changes_nothing(place, unselected, policy):
    values = [weight(), weight(3, 4), weight(12)]
    optimizer = MaskedAdamW(
        [{"params": values[:2]}, {"params": values[2:], "lr": 0.1}], policy=policy, unselected=unselected
    )
    for _ in range(2):
        for value in values:
            with_gradient(value)
        optimizer.step()
    before = snapshot(optimizer)
    values[place].grad = torch.zeros_like(values[place]).to_sparse()
    with pytest.raises(
        RuntimeError, match=r"^Adam does not support sparse gradients, please consider SparseAdam instead$"
    ):
        optimizer.step()
    assert_untouched(optimizer, before)
    with_gradient(values[place])
    optimizer.step()  # and it goes on when the gradient is dense again
    assert optimizer.state_dict()["param_groups"][0]["clock"] == 3


@pytest.mark.parametrize(
    "policy", [p for p in POLICIES.values() if p], ids=[name for name in POLICIES if POLICIES[name]]
)
@pytest.mark.parametrize("unselected", ["frozen", "zero_grad", "track"])
@pytest.mark.parametrize("place", [0, 1, 2], ids=["first", "second", "in_another_group"])
def test_a_masked_complex_parameter_is_refused_and_changes_nothing(place, unselected, policy):
    values = [weight(), weight(3, 4), weight(12)]
    values[place] = weight(dtype=torch.complex64)
    optimizer = MaskedAdamW(
        [{"params": values[:2]}, {"params": values[2:], "lr": 0.1}], policy=policy, unselected=unselected
    )
    for _ in range(2):
        for number, value in enumerate(values):
            value.grad = None if number == place else torch.full_like(value, 0.5)
        optimizer.step()
    before = snapshot(optimizer)
    with_gradient(values[place])
    with pytest.raises((TypeError, ValueError, RuntimeError), match=r"complex.*; .*masked=False.*\.$"):
        optimizer.step()
    assert_untouched(optimizer, before)


def test_a_complex_parameter_outside_the_mask_trains():
    value = with_gradient(weight(dtype=torch.complex64))
    before = value.detach().clone()
    optimizer = MaskedAdamW(
        [{"params": [value], "masked": False}, {"params": [with_gradient(weight())]}], policy=Bernoulli(0.5)
    )
    optimizer.step()
    assert not torch.equal(value, before)


def test_observe_refuses_a_sparse_gradient_and_changes_nothing():
    values = [with_gradient(weight()), with_gradient(weight(12))]
    optimizer = MaskedAdamW(values, policy=TopK(0.5, schedule=Schedule(observe=None)))
    optimizer.observe()
    before = snapshot(optimizer)
    values[1].grad = values[1].grad.to_sparse()
    with pytest.raises(RuntimeError, match=r"^Adam does not support sparse gradients"):
        optimizer.observe()
    assert_untouched(optimizer, before)


# --- loading what was saved by something else --------------------------------------------------------------


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ({"policy": Bernoulli(0.5)}, {"policy": Bernoulli(0.3)}),
        ({"policy": Bernoulli(0.5)}, {"policy": None}),
        (
            {"policy": TopK(0.5, schedule=Schedule(observe=1))},
            {"policy": TopK(0.5, schedule=Schedule(observe=2))},
        ),
        (
            {"policy": Bernoulli(0.5), "unselected": "frozen"},
            {"policy": Bernoulli(0.5), "unselected": "track"},
        ),
    ],
    ids=["another_keep", "no_policy", "another_schedule", "another_unselected"],
)
def test_a_state_dict_of_another_masking_is_refused_and_changes_nothing(saved, loaded):
    writer, reader = (
        MaskedAdamW([with_gradient(weight())], **saved),
        MaskedAdamW([with_gradient(weight())], **loaded),
    )
    writer.step()
    reader.step()
    before = snapshot(reader)
    with pytest.raises((ValueError, RuntimeError)) as caught:
        reader.load_state_dict(writer.state_dict())
    for kwargs in (saved, loaded):
        named = kwargs["policy"] if "unselected" not in kwargs else kwargs["unselected"]
        assert str(named) in str(caught.value)
    assert_untouched(reader, before)


# --- what other engines make of parameters -----------------------------------------------------------------


@pytest.mark.parametrize("step_before", [False, True], ids=["fresh", "trained"])
def test_the_flat_partitions_of_deepspeed_are_refused(monkeypatch, step_before):
    params = [with_gradient(weight()), with_gradient(weight(12))]
    optimizer = MaskedAdamW([(f"weight{i}", p) for i, p in enumerate(params)], policy=Bernoulli(0.5))
    if step_before:
        optimizer.step()
    before = snapshot(optimizer)
    monkeypatch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))
    flat = with_gradient(nn.Parameter(torch.ones(24)))
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(
        RuntimeError, match=r"^parameters must keep .*, got 1 flat partition.*; use its stage 0"
    ):
        optimizer.step()
    assert torch.equal(flat, torch.ones(24))
    optimizer.param_groups[0]["params"] = params
    assert_untouched(optimizer, before)
    optimizer.step()


def test_a_parameter_that_somebody_else_swaps_is_followed_beside_deepspeed(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))
    optimizer = MaskedAdamW([with_gradient(weight(12)), with_gradient(weight())], policy=Bernoulli(0.5))
    optimizer.step()
    optimizer.param_groups[0]["params"] = [with_gradient(weight(12)), with_gradient(weight())]
    optimizer.step()
    assert all(int(state["step"]) == 2 for state in optimizer.state.values())


@pytest.mark.filterwarnings("default:nothing was selected in parameter group")
@pytest.mark.parametrize("unselected", ["frozen", "zero_grad"])
@pytest.mark.parametrize("explicit", [False, True])
def test_a_group_in_which_nothing_is_selected_is_named_before_it_fails_to_train(unselected, explicit):
    large, small = nn.Parameter(torch.ones(100, 3)), weight(12)
    large.grad, small.grad = torch.ones_like(large), torch.zeros_like(small)
    schedule = Schedule(observe=None if explicit else 1)
    optimizer = MaskedAdamW(
        [{"params": [("large", large)]}, {"params": [("small", small)]}],
        policy=TopK(0.1, schedule=schedule), unselected=unselected,
    )  # fmt: skip
    before = [large.detach().clone(), small.detach().clone()]
    message = (
        r"^nothing was selected in parameter group 1 \(1 parameters, 'small' the first\).*; .*masked=False"
    )
    if explicit:
        optimizer.observe()
    with pytest.warns(UserWarning, match=message):
        optimizer.select() if explicit else optimizer.step()
    assert torch.equal(large, before[0]) and torch.equal(small, before[1])
    assert optimizer.mask(small, upcoming=True).sum() == 0 < optimizer.mask(large, upcoming=True).sum()
