"""MaskedAdamW with policy=None passes the checks that PyTorch's own suite makes of torch.optim.AdamW.

The cases (inputs and error inputs) are those that ship inside torch; the checks are ours, in the spirit of
test/test_optim.py::TestOptimRenewed, and stricter: on the CPU "as torch.optim.AdamW" means the same bits.
With SPARSE_OPTIM_TORCH_CHECKOUT naming a PyTorch checkout, the last test also runs the real file.
"""

import copy
import functools
import inspect
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler, swa_utils
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing import assert_close
from torch.testing._internal import common_optimizers
from torch.testing._internal.common_utils import TestCase as TorchTestCase

from sparse_optim import Bernoulli, ChildTuningAdamW, MaskedAdamW, Schedule, TopK

# torch's own tests and states are matched bit for bit
pytestmark = pytest.mark.usefixtures("torchs_own_bits")


class AdamW(MaskedAdamW):
    """MaskedAdamW under the name that torch's suite looks for when it chooses learning rates."""


INFO = common_optimizers.OptimizerInfo(
    AdamW,
    optim_inputs_func=common_optimizers.optim_inputs_func_adamw,
    optim_error_inputs_func=common_optimizers.optim_error_inputs_func_adamw,
    supported_impls=("foreach", "differentiable"),
    not_og_supported_flags=("foreach", "differentiable", "fused", "maximize", "capturable"),
)


def pytest_configure(config):
    """Shows torch's suite our class and no other; called only when this file is loaded with `-p`."""
    common_optimizers.optim_db[:] = [INFO]


def configurations(*, differentiable):
    """torch's inputs for AdamW, once per implementation; torch's helper leaves foreach out on the CPU."""
    skip = () if differentiable else ("differentiable",)
    inputs = common_optimizers._get_optim_inputs_including_global_cliquey_kwargs(
        "cpu", torch.float32, INFO, skip
    )
    cases = {optim_input.desc: optim_input.kwargs for optim_input in inputs}
    for optim_input in INFO.optim_inputs_func("cpu"):
        cases[f"{optim_input.desc} & foreach"] = {**optim_input.kwargs, "foreach": True}
    return [
        pytest.param(kwargs, id=desc.replace(" & ", "-").replace(" ", "_")) for desc, kwargs in cases.items()
    ]


every_configuration = pytest.mark.parametrize("kwargs", configurations(differentiable=True))
every_in_place_configuration = pytest.mark.parametrize("kwargs", configurations(differentiable=False))

SCHEDULERS = {
    "no_schedule": [],
    "StepLR": [functools.partial(lr_scheduler.StepLR, step_size=3, gamma=0.9)],
    "ExponentialLR": [functools.partial(lr_scheduler.ExponentialLR, gamma=0.9)],
    "PolynomialLR": [functools.partial(lr_scheduler.PolynomialLR, power=0.9, total_iters=15)],
    "CosineAnnealingLR": [functools.partial(lr_scheduler.CosineAnnealingLR, T_max=20)],
    "CosineAnnealingWarmRestarts": [functools.partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=4)],
    "OneCycleLR_cycling_betas": [
        functools.partial(lr_scheduler.OneCycleLR, max_lr=0.01, total_steps=25, cycle_momentum=True)
    ],
    "CyclicLR_cycling_betas": [
        functools.partial(
            lr_scheduler.CyclicLR, base_lr=1e-3, max_lr=0.01, step_size_up=4, cycle_momentum=True
        )
    ],
    "ReduceLROnPlateau": [functools.partial(lr_scheduler.ReduceLROnPlateau, patience=0, threshold=0.5)],
    "ConstantLR_then_ExponentialLR": [
        functools.partial(lr_scheduler.ConstantLR, factor=0.4, total_iters=4),
        functools.partial(lr_scheduler.ExponentialLR, gamma=0.9),
    ],
    "StepLR_then_ReduceLROnPlateau": [
        functools.partial(lr_scheduler.StepLR, step_size=10, gamma=0.9),
        lr_scheduler.ReduceLROnPlateau,
    ],
    "ChainedScheduler": [
        lambda optimizer: lr_scheduler.ChainedScheduler(
            [
                lr_scheduler.LinearLR(optimizer, start_factor=0.4, total_iters=4),
                lr_scheduler.ExponentialLR(optimizer, gamma=0.95),
            ]
        )
    ],
    "SequentialLR": [
        lambda optimizer: lr_scheduler.SequentialLR(
            optimizer,
            [
                lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=5),
                lr_scheduler.CosineAnnealingLR(optimizer, T_max=15),
            ],
            milestones=[5],
        )
    ],
}
every_scheduler = pytest.mark.parametrize(
    "schedulers", [pytest.param(makers, id=name) for name, makers in SCHEDULERS.items()]
)


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ]
)
def device(request):
    return request.param


def adamw_of_torch(params, **kwargs):
    """The oracle: torch's for-loop, whatever implementation the case asks of ours."""
    return torch.optim.AdamW(params, **{**kwargs, "foreach": False})


class TinyNet(nn.Module):
    """A loss of 60 numbers in which every entry of both parameters gets a gradient."""

    def __init__(self, *, device="cpu", dtype=torch.float32, layout="contiguous"):
        super().__init__()
        generator = torch.Generator().manual_seed(2024)

        def parameter(*shape):
            values = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
            return nn.Parameter(
                values if layout == "contiguous" else torch.stack([values, values], dim=-1)[..., 0]
            )

        self.weight, self.bias = parameter(10, 5), parameter(10)
        self.register_buffer("input", torch.randn(5, generator=generator).to(device, dtype))

    def forward(self):
        return (self.weight.mv(self.input) + self.bias).pow(2).sum()


def fit(optimizer, net, schedulers=(), steps=20):
    """Trains `net` and returns its losses, the last one after the last step."""
    schedulers = [make(optimizer) for make in schedulers]
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = net()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        for scheduler in schedulers:
            scheduler.step(*[loss.item()] * isinstance(scheduler, lr_scheduler.ReduceLROnPlateau))
    return [*losses, net().item()]


def tensors(*shapes, dtype=torch.float32, device="cpu", seed=7, kwargs=None):
    """Parameters to train with `train`; plain tensors when `kwargs` ask for differentiable steps."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    values = [torch.randn(shape, generator=generator, dtype=wide).to(device, dtype) for shape in shapes]
    return values if (kwargs or {}).get("differentiable") else [nn.Parameter(value) for value in values]


def parameters_of(optimizer):
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def train(optimizer, steps=range(5)):
    """Steps whose gradients depend on the number of the step alone, so that a resumed run sees them again."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters_of(optimizer):
            wide = torch.complex128 if parameter.is_complex() else torch.float64
            gradient = torch.randn(parameter.shape, generator=generator, dtype=wide)
            parameter.grad = gradient.to(parameter.device, parameter.dtype)
        optimizer.step()


def bits(tensor):
    return tensor.detach().cpu().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def assert_same(ours, theirs):
    """The same bits on the CPU; close on a GPU, where nobody promises bits."""
    assert len(ours) == len(theirs)
    for left, right in zip(ours, theirs, strict=True):
        assert (left.shape, left.dtype, left.device) == (right.shape, right.dtype, right.device)
        if left.device.type == "cpu":
            assert torch.equal(bits(left), bits(right)), f"{left} != {right}"
        else:
            assert_close(left, right)


def assert_same_state(ours, theirs):
    """Both optimizers hold the same moments and counts under torch's keys, parameter by parameter."""
    for left, right in zip(parameters_of(ours), parameters_of(theirs), strict=True):
        state = theirs.state.get(right, {})
        assert state.keys() <= ours.state.get(left, {}).keys()
        assert_same([ours.state[left][key] for key in state], list(state.values()))


def assert_same_run(ours, theirs):
    assert_same(parameters_of(ours), parameters_of(theirs))
    assert_same_state(ours, theirs)


def through_disk(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# --- the constructor -------------------------------------------------------------------------------------


def test_signature_begins_with_that_of_torch():
    ours = inspect.signature(MaskedAdamW.__init__).parameters
    theirs = inspect.signature(torch.optim.AdamW.__init__).parameters
    positional = [
        name for name, argument in theirs.items() if argument.kind is argument.POSITIONAL_OR_KEYWORD
    ]
    assert list(ours)[: len(positional)] == positional
    for name, argument in theirs.items():
        assert (ours[name].kind, ours[name].default) == (argument.kind, argument.default)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=f"{number}_{case.optimizer_error_input.desc.replace(' ', '_')}")
        for number, case in enumerate(INFO.optim_error_inputs_func("cpu", torch.float32))
    ],
)
def test_bad_inputs_of_torch_raise_what_torch_raises(case):
    assert case.error_on is common_optimizers.OptimizerErrorEnum.CONSTRUCTION_ERROR
    params, kwargs = case.optimizer_error_input.params, case.optimizer_error_input.kwargs
    expect = pytest.warns if issubclass(case.error_type, Warning) else pytest.raises
    with expect(case.error_type, match=case.error_regex):
        AdamW(params, **kwargs)


@every_configuration
def test_repr_shows_the_class_and_every_option_of_every_group(kwargs):
    left, right = tensors((3,), (2, 2))
    lines = repr(AdamW([{"params": [left]}, {"params": [right], "lr": 0.25}], **kwargs)).splitlines()
    assert lines[0] == "AdamW ("
    assert lines[-1] == ")"
    assert [line for line in lines if "Group" in line] == ["Parameter Group 0", "Parameter Group 1"]
    assert "    lr: 0.25" in lines
    for name, value in kwargs.items():
        assert f"    {name}: {value}" in lines


@pytest.mark.parametrize("policy", [None, Bernoulli(0.5), TopK(0.1, schedule=Schedule(observe=2))], ids=repr)
def test_groups_hold_plain_values_only(policy):
    optimizer = MaskedAdamW(tensors((8, 8)), policy=policy)
    train(optimizer)
    for values in (optimizer.param_groups[0], optimizer.state_dict()["param_groups"][0]):
        rest = {name: value for name, value in values.items() if name not in ("params", "betas")}
        assert {
            name for name, value in rest.items() if not isinstance(value, int | float | str | None)
        } == set()
        assert values["betas"] == (0.9, 0.999)


# --- one step after another ------------------------------------------------------------------------------


@every_in_place_configuration
@every_scheduler
def test_loss_goes_the_right_way_and_every_bit_with_torch(schedulers, kwargs):
    net, twin = TinyNet(), TinyNet()
    ours, theirs = AdamW(net.parameters(), **kwargs), adamw_of_torch(twin.parameters(), **kwargs)
    losses = fit(ours, net, schedulers)
    assert (losses[-1] > losses[0]) if kwargs.get("maximize") else (losses[-1] < losses[0])
    assert losses == fit(theirs, twin, schedulers)
    assert_same_run(ours, theirs)
    assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"]
    assert ours.param_groups[0]["betas"] == theirs.param_groups[0]["betas"]


@every_in_place_configuration
def test_loss_goes_the_right_way_on_non_contiguous_parameters(device, kwargs):
    net, twin = (TinyNet(device=device, layout="non_contiguous") for _ in range(2))
    losses = fit(AdamW(net.parameters(), **kwargs), net)
    assert (losses[-1] > losses[0]) if kwargs.get("maximize") else (losses[-1] < losses[0])
    assert losses == pytest.approx(fit(adamw_of_torch(twin.parameters(), **kwargs), twin), rel=1e-5)


@every_in_place_configuration
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_step_has_the_bits_of_torch(device, dtype, kwargs):
    shapes = [(), (1,), (31,), (33, 31), (2, 3, 5, 7), (1025,)]
    ours = AdamW(tensors(*shapes, dtype=dtype, device=device), **kwargs)
    theirs = adamw_of_torch(tensors(*shapes, dtype=dtype, device=device), **kwargs)
    for step in range(8):
        train(ours, [step])
        train(theirs, [step])
        assert_same_run(ours, theirs)


@every_in_place_configuration
@pytest.mark.parametrize(
    "policy",
    [Bernoulli(1.0), TopK(1.0, schedule=Schedule(observe=3)), TopK(1.0, schedule=Schedule(observe=None))],
    ids=["keep=1", "density=1", "density=1_chosen_by_hand"],
)
@pytest.mark.parametrize("unselected", ["frozen", "zero_grad", "track"])
def test_dense_limits_are_torch(unselected, policy, kwargs):
    ours = AdamW(tensors((9, 4), (4,)), policy=policy, unselected=unselected, **kwargs)
    theirs = adamw_of_torch(tensors((9, 4), (4,)), **kwargs)
    train(ours)
    train(theirs)
    assert_same_run(ours, theirs)


@every_in_place_configuration
@every_scheduler
def test_groups_keep_their_own_lr_and_weight_decay(schedulers, kwargs):
    net, twin = TinyNet(), TinyNet()

    def groups(module):
        return [{"params": [module.weight], "weight_decay": 0.9}, {"params": [module.bias], "lr": 0.02}]

    ours, theirs = AdamW(groups(net), **kwargs), adamw_of_torch(groups(twin), **kwargs)
    assert fit(ours, net, schedulers) == fit(theirs, twin, schedulers)
    assert_same_run(ours, theirs)
    assert [group["lr"] for group in ours.param_groups] == [group["lr"] for group in theirs.param_groups]


@pytest.mark.parametrize(
    "own",
    [
        {"betas": (0.5, 0.9)},
        {"eps": 0.1},
        {"amsgrad": True},
        {"maximize": True},
        {"weight_decay": 0.0},
        {"lr": 1.0},
    ],
    ids=lambda own: next(iter(own)),
)
def test_a_group_has_its_own_numbers(own):
    runs = [
        make([{"params": tensors((4, 3))}, {"params": tensors((4, 3)), **own}], weight_decay=0.1)
        for make in (AdamW, adamw_of_torch)
    ]
    for optimizer in runs:
        train(optimizer)
    assert_same_run(*runs)


GROUP_EDITS = {
    "a_number_is_set": lambda groups: groups[0].update(lr=0.5, weight_decay=0.3, betas=(0.5, 0.5)),
    "a_parameter_is_removed": lambda groups: groups[0]["params"].pop(1),
    "a_parameter_is_appended": lambda groups: groups[0]["params"].extend(tensors((3, 3), seed=9)),
    "a_parameter_is_inserted": lambda groups: groups[0]["params"].insert(0, tensors((3, 3), seed=9)[0]),
    "parameters_are_reordered": lambda groups: groups[0]["params"].reverse(),
    "a_parameter_changes_groups": lambda groups: groups[1]["params"].append(groups[0]["params"].pop(0)),
    "a_group_is_removed": lambda groups: groups.pop(),
    "a_group_is_appended": lambda groups: groups.append({**groups[0], "params": tensors((3, 3), seed=9)}),
    "groups_are_reordered": lambda groups: groups.reverse(),
}


@pytest.mark.parametrize("alike", [True, False], ids=["equal_shapes", "different_shapes"])
@pytest.mark.parametrize("edit", GROUP_EDITS.values(), ids=GROUP_EDITS)
def test_parameters_keep_their_state_when_groups_are_edited(edit, alike):
    shapes = [(3, 3)] * 4 if alike else [(3, 3), (2,), (4, 4), (5,)]
    runs = []
    for make in (AdamW, adamw_of_torch):
        values = tensors(*shapes)
        optimizer = make([{"params": values[:3]}, {"params": values[3:], "lr": 0.5}])
        train(optimizer, range(3))
        edit(optimizer.param_groups)
        train(optimizer, range(3, 6))
        runs.append((values, optimizer))
    assert_same(runs[0][0], runs[1][0])
    assert_same_run(runs[0][1], runs[1][1])


def test_groups_of_a_torch_optimizer_can_be_taken_over():
    theirs = adamw_of_torch([{"params": tensors((4, 3)), "lr": 0.5}, {"params": tensors((3,))}], amsgrad=True)
    ours = AdamW(copy.deepcopy(theirs.param_groups))
    train(ours)
    train(theirs)
    assert_same_run(ours, theirs)


@every_in_place_configuration
def test_a_group_without_lr_stands_still(kwargs):
    still, moving = tensors((5, 5), (5, 5))
    before = still.detach().clone()
    optimizer = AdamW([{"params": [still], "lr": 0.0}, {"params": [moving]}], **kwargs)
    train(optimizer)
    assert torch.equal(still, before)
    assert not torch.equal(moving, before)


@pytest.mark.parametrize("schedule", ["no_schedule", "StepLR", "OneCycleLR_cycling_betas"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(), (1,)], ids=["zero_dimensional", "one_element"])
def test_tensor_lr_equals_float_lr_and_stays_the_same_tensor(shape, dtype, schedule):
    # 2**-6 has the same value as a float32 tensor, a float64 tensor and a Python number
    lr = torch.full(shape, 2.0**-6, dtype=dtype)
    net, twin, oracle = TinyNet(), TinyNet(), TinyNet()
    ours, by_float = AdamW(net.parameters(), lr=lr), AdamW(twin.parameters(), lr=2.0**-6)
    theirs = adamw_of_torch(oracle.parameters(), lr=lr.clone())
    assert fit(ours, net, SCHEDULERS[schedule]) == fit(theirs, oracle, SCHEDULERS[schedule])
    assert_same_run(ours, theirs)
    # torch rounds 1 - lr * weight_decay to the dtype of the tensor: an ulp away from its own float lr
    fit(by_float, twin, SCHEDULERS[schedule])
    assert_close(list(net.parameters()), list(twin.parameters()), rtol=1e-6, atol=1e-6)
    assert ours.param_groups[0]["lr"] is lr
    assert (lr.item() == 2.0**-6) == (schedule == "no_schedule")


def test_tensor_betas_equal_float_betas():
    # 0.875 and 0.9375 are exact in float32
    ours = AdamW(tensors((4, 3)), betas=(torch.tensor(0.875), torch.tensor([[0.9375]])))
    theirs = AdamW(tensors((4, 3)), betas=(0.875, 0.9375))
    train(ours)
    train(theirs)
    assert_close(parameters_of(ours), parameters_of(theirs))


@every_in_place_configuration
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_parameters_train_as_in_torch(device, dtype, kwargs):
    shapes = [(), (3,), (10, 5)]
    ours = AdamW(tensors(*shapes, dtype=dtype, device=device), **kwargs)
    theirs = adamw_of_torch(tensors(*shapes, dtype=dtype, device=device), **kwargs)
    train(ours)
    train(theirs)
    assert_same_run(ours, theirs)


@every_in_place_configuration
def test_complex_parameters_train_like_their_two_parts(kwargs):
    (whole,) = tensors((10, 5), dtype=torch.complex64)
    parts = [nn.Parameter(part.detach().clone()) for part in (whole.real, whole.imag)]
    ours, in_parts = AdamW([whole], **kwargs), AdamW(parts, **kwargs)
    for step in range(5):
        train(ours, [step])
        for part, gradient in zip(parts, (whole.grad.real, whole.grad.imag), strict=True):
            part.grad = gradient.clone()
        in_parts.step()
        assert_close(
            torch.view_as_real(whole.detach()), torch.stack([part.detach() for part in parts], dim=-1)
        )


@pytest.mark.parametrize("foreach", [True, False, None])
def test_foreach_changes_nothing_while_layers_freeze_and_thaw(foreach):
    net, twin = TinyNet(dtype=torch.float64), TinyNet(dtype=torch.float64)
    scale, twin_scale = (nn.Parameter(torch.tensor(1.5, dtype=torch.float64)) for _ in range(2))
    ours = AdamW([*net.parameters(), scale], weight_decay=0.1, foreach=foreach)
    theirs = adamw_of_torch([*twin.parameters(), twin_scale], weight_decay=0.1)
    for step in range(7):
        for module, factor, optimizer in ((net, scale, ours), (twin, twin_scale, theirs)):
            optimizer.zero_grad()
            module.bias.requires_grad_(step < 2 or step > 4)
            if step != 3:  # the fourth step sees no gradient at all
                (factor * module()).backward()
            optimizer.step()
        assert_same_run(ours, theirs)
    assert [ours.state[p]["step"].item() for p in parameters_of(ours)] == [6, 4, 6]


@every_in_place_configuration
def test_every_milestone_is_close_to_foreach_and_fused_of_torch(kwargs):
    for implementation in ("foreach", "fused"):
        tracker = common_optimizers.TensorTracker()
        theirs = torch.optim.AdamW(
            tensors((), (6, 5), dtype=torch.float64), **{**kwargs, "foreach": None, implementation: True}
        )
        ours = AdamW(tensors((), (6, 5), dtype=torch.float64), **kwargs)
        for step in range(7):
            train(theirs, [step])
            for parameter in parameters_of(theirs):
                tracker.add(parameter)
                for value in theirs.state[parameter].values():
                    tracker.add(value)
        for step in range(7):
            train(ours, [step])
            for parameter, twin in zip(parameters_of(ours), parameters_of(theirs), strict=True):
                tracker.pop_check_set(parameter, TorchTestCase())
                for name in theirs.state[twin]:
                    tracker.pop_check_set(ours.state[parameter][name], TorchTestCase())
        assert tracker.all_popped()


@every_in_place_configuration
def test_mixed_dtypes_in_one_group_train_as_if_alone(device, kwargs):
    dtypes = [torch.float64, torch.bfloat16, torch.float32, torch.complex64, torch.float16, torch.float32]
    values = [tensors((9, 5), dtype=dtype, device=device)[0] for dtype in dtypes]
    together = AdamW(values, **{**kwargs, "eps": 1e-3})  # 1e-8 is zero in float16
    alone = [AdamW([nn.Parameter(value.detach().clone())], **{**kwargs, "eps": 1e-3}) for value in values]
    for step in range(5):
        for optimizer, value in zip(alone, values, strict=True):
            train(optimizer, [step])
            value.grad = parameters_of(optimizer)[0].grad.clone()
        together.step()
    for optimizer, value in zip(alone, values, strict=True):
        assert_same([value], parameters_of(optimizer))
        assert_same(
            [together.state[value]["exp_avg"]], [optimizer.state[parameters_of(optimizer)[0]]["exp_avg"]]
        )


@every_in_place_configuration
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_no_further_from_the_truth_than_torch(device, dtype, kwargs):
    kwargs = {**kwargs, "eps": 1e-3}
    starts = tensors((64, 33), dtype=dtype, device=device)
    runs = {
        "ours": AdamW([nn.Parameter(start.detach().clone()) for start in starts], **kwargs),
        "torch": adamw_of_torch([nn.Parameter(start.detach().clone()) for start in starts], **kwargs),
        "truth": adamw_of_torch([nn.Parameter(start.detach().double()) for start in starts], **kwargs),
    }
    for step in range(5):
        train(runs["torch"], [step])
        for name in ("ours", "truth"):
            for parameter, twin in zip(parameters_of(runs[name]), parameters_of(runs["torch"]), strict=True):
                parameter.grad = twin.grad.to(parameter.dtype)
            runs[name].step()
    (truth,) = parameters_of(runs["truth"])
    error = {name: (parameters_of(runs[name])[0].double() - truth).abs().max() for name in ("ours", "torch")}
    assert error["ours"] <= error["torch"] + torch.finfo(dtype).eps
    assert error["ours"] > 0  # the run is long enough to round at all


@every_in_place_configuration
def test_differentiable_steps_are_close_to_the_others(kwargs):
    ours = AdamW(
        tensors((6, 5), (), kwargs={"differentiable": True}),
        **{**kwargs, "foreach": False},
        differentiable=True,
    )
    theirs = adamw_of_torch(tensors((6, 5), ()), **kwargs)
    train(ours)
    train(theirs)
    assert_close(parameters_of(ours), [parameter.detach() for parameter in parameters_of(theirs)])


every_input = pytest.mark.parametrize(
    "kwargs",
    [
        pytest.param(optim_input.kwargs, id=optim_input.desc.replace(" ", "_"))
        for optim_input in INFO.optim_inputs_func("cpu")
    ],
)


@every_input
def test_gradients_flow_through_a_differentiable_step(kwargs):
    names = ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"][: 3 if kwargs.get("amsgrad") else 2]

    def one_step(weight, gradient, *moments):
        weight = weight.clone()
        optimizer = AdamW([weight], differentiable=True, **kwargs)
        optimizer.state[weight]["step"] = torch.tensor(10.0)
        optimizer.state[weight].update(zip(names, [moment.clone() for moment in moments], strict=True))
        weight.grad = gradient
        optimizer.step()
        assert optimizer.state[weight]["step"].item() == 11
        return weight, *(optimizer.state[weight][name] for name in names)

    inputs = [
        value.detach().abs() + 0.1 for value in tensors(*[(3, 2)] * (2 + len(names)), dtype=torch.float64)
    ]
    assert torch.autograd.gradcheck(one_step, [value.requires_grad_() for value in inputs])


@every_input
def test_gradients_flow_through_two_differentiable_steps(kwargs):
    if kwargs.get("amsgrad"):
        pytest.skip("torch.optim.AdamW overwrites what the backward of its first amsgrad step needs")

    def two_steps(weight, first, second):
        weight = weight.clone()
        optimizer = AdamW([weight], differentiable=True, **kwargs)
        for gradient in (first, second):
            weight.grad = gradient
            optimizer.step()
        return weight

    inputs = [
        value.detach().requires_grad_() for value in tensors((3, 2), (3, 2), (3, 2), dtype=torch.float64)
    ]
    assert torch.autograd.gradcheck(two_steps, inputs)
    before = inputs[0].detach().clone()
    two_steps(*inputs).sum().backward()
    assert all(value.grad.abs().sum() > 0 for value in inputs)
    assert torch.equal(inputs[0], before)


def test_gradients_flow_to_a_tensor_lr():
    def one_step(lr, weight, gradient):
        weight = weight.clone()
        optimizer = AdamW([weight], lr=lr, differentiable=True)
        weight.grad = gradient
        optimizer.step()
        return weight

    lr = torch.tensor(0.01, dtype=torch.float64, requires_grad=True)
    weight, gradient = (value.detach() for value in tensors((3, 2), (3, 2), dtype=torch.float64))
    assert torch.autograd.gradcheck(one_step, (lr, weight, gradient))


def test_autograd_notices_that_a_step_wrote_the_weights():
    (weight,) = tensors((4, 4))
    loss = weight.pow(2).sum()
    train(AdamW([weight]), [0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- parameters of every kind ----------------------------------------------------------------------------


@every_configuration
def test_no_gradients_mean_no_step_and_no_state(device, kwargs):
    values = tensors((4, 3), (), device=device, kwargs=kwargs)
    before = [value.detach().clone() for value in values]
    optimizer = AdamW(values, **kwargs)
    for _ in range(3):
        optimizer.step()
    assert_same(values, before)
    assert all(len(optimizer.state[value]) == 0 for value in values if value in optimizer.state)


@every_configuration
def test_zero_gradients_move_nothing_but_decay(device, kwargs):
    values = tensors((5, 1), (3,), device=device, kwargs=kwargs)
    expected = [value.detach().clone() for value in values]
    optimizer = AdamW(values, **kwargs)
    for _ in range(3):
        for value, twin in zip(values, expected, strict=True):
            value.grad = torch.zeros_like(value)
            twin.mul_(1 - kwargs.get("lr", 1e-3) * kwargs.get("weight_decay", 1e-2))
        optimizer.step()
    assert_same(values, expected)


@every_configuration
def test_every_parameter_that_stepped_has_state_under_the_keys_of_torch(kwargs):
    values = tensors((4, 3), (), kwargs=kwargs)
    optimizer = AdamW(values, **kwargs)
    train(optimizer, range(3))
    for value in values:
        state = optimizer.state[value]
        names = {"step", "exp_avg", "exp_avg_sq"} | ({"max_exp_avg_sq"} if kwargs.get("amsgrad") else set())
        assert names <= state.keys()
        assert (state["step"].shape, state["step"].device.type, state["step"].item()) == ((), "cpu", 3)
        assert all(state[name].shape == value.shape for name in names - {"step"})


@pytest.mark.parametrize("default", [torch.float32, torch.float64], ids=str)
def test_step_counts_in_the_default_dtype_as_in_torch(default):
    usual = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        ours = AdamW(tensors((4, 3)))
        train(ours, [0])
    finally:
        torch.set_default_dtype(usual)
    assert ours.state[parameters_of(ours)[0]]["step"].dtype == default


@every_in_place_configuration
def test_empty_and_zero_dimensional_parameters_train_as_in_torch(device, kwargs):
    shapes = [(0,), (), (3, 0), (4, 3), (0, 5, 2)]
    ours = AdamW(tensors(*shapes, device=device), **kwargs)
    theirs = adamw_of_torch(tensors(*shapes, device=device), **kwargs)
    train(ours, range(3))
    train(theirs, range(3))
    assert_same_run(ours, theirs)


@every_in_place_configuration
def test_integer_and_frozen_parameters_are_left_alone(kwargs):
    integers, booleans = torch.arange(5), torch.tensor([True, False])
    frozen, moving = tensors((3, 3), (3, 3))
    frozen.requires_grad_(False)
    before = frozen.detach().clone()
    optimizer = AdamW([integers, frozen, moving, booleans], **kwargs)
    for _ in range(3):
        optimizer.zero_grad()
        moving.pow(2).sum().backward()
        optimizer.step()
    assert torch.equal(integers, torch.arange(5))
    assert booleans.tolist() == [True, False]
    assert torch.equal(frozen, before)
    assert not torch.equal(moving, before)
    assert [len(optimizer.state.get(value, {})) for value in (integers, booleans, frozen)] == [0, 0, 0]
    assert optimizer.state_dict()["state"].keys() == {2}


def test_a_thawed_parameter_counts_from_its_own_first_step():
    ours, theirs = AdamW(tensors((3, 3), (3, 3))), adamw_of_torch(tensors((3, 3), (3, 3)))
    for optimizer in (ours, theirs):
        frozen, moving = parameters_of(optimizer)
        for step in range(6):
            frozen.grad = moving.grad = None
            moving.grad = torch.full((3, 3), 1.0 + step)
            if step > 3:
                frozen.grad = torch.full((3, 3), -1.0 - step)
            optimizer.step()
    assert_same_run(ours, theirs)
    assert ours.state[parameters_of(ours)[0]]["step"].item() == 2


def laid_out(values, layout):
    """`values` copied into memory of another layout, with the storage behind it."""
    if layout == "channels_last":
        storage = torch.empty_like(values, memory_format=torch.channels_last)
        view = storage
    elif layout == "transposed":
        storage = torch.empty(values.shape[::-1], dtype=values.dtype, device=values.device)
        view = storage.permute(*reversed(range(values.dim())))
    elif layout == "sliced":
        storage = values.new_full([2 * size + 1 for size in values.shape], 77.0)
        view = storage[tuple(slice(1, None, 2) for _ in values.shape)]
    else:
        storage = view = torch.empty_like(values, memory_format=torch.contiguous_format)
    view.copy_(values)
    return view, storage


@every_in_place_configuration
@pytest.mark.parametrize("gradient_layout", ["contiguous", "channels_last", "transposed", "sliced"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "sliced"])
def test_any_strides_train_like_contiguous_copies(device, layout, gradient_layout, kwargs):
    (start,) = tensors((3, 4, 5, 2), device=device)
    view, storage = laid_out(start.detach(), layout)
    outside = storage == 77.0
    # a slice of a leaf has no .grad; the parameter is a leaf that shares the memory of the slice
    ours = AdamW([view.detach().requires_grad_()], **kwargs)
    theirs = adamw_of_torch([nn.Parameter(start.detach().clone())], **kwargs)
    (parameter,), (twin,) = parameters_of(ours), parameters_of(theirs)
    for step in range(4):
        train(theirs, [step])
        parameter.grad = laid_out(twin.grad, gradient_layout)[0]
        ours.step()
    assert parameter.data_ptr() == view.data_ptr()
    assert parameter.stride() == view.stride()
    assert_close(parameter.detach(), twin.detach(), rtol=1e-6, atol=1e-7)
    for name, value in theirs.state[twin].items():
        assert_close(ours.state[parameter][name], value, rtol=1e-6, atol=1e-7)
    assert outside.sum() == (storage.numel() - start.numel())
    assert (storage[outside] == 77.0).all()


@every_in_place_configuration
def test_an_expanded_gradient_is_read_as_if_it_were_copied(kwargs):
    ours, theirs = AdamW(tensors((4, 3)), **kwargs), adamw_of_torch(tensors((4, 3)), **kwargs)
    for _ in range(3):
        parameters_of(ours)[0].grad = torch.tensor(0.5).expand(4, 3)
        parameters_of(theirs)[0].grad = torch.full((4, 3), 0.5)
        ours.step()
        theirs.step()
    assert_same_run(ours, theirs)
    assert parameters_of(ours)[0].grad.unique().tolist() == [0.5]


@every_in_place_configuration
def test_gradients_are_read_not_written(kwargs):
    optimizer = AdamW(tensors((4, 3), (2,)), max_grad_norm=None, **kwargs)
    for value in parameters_of(optimizer):
        value.grad = torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    before = [value.grad.clone() for value in parameters_of(optimizer)]
    optimizer.step()
    assert_same([value.grad for value in parameters_of(optimizer)], before)


# --- state dicts -----------------------------------------------------------------------------------------


@every_configuration
@pytest.mark.parametrize("named", [False, True], ids=["from_unnamed", "from_named"])
@pytest.mark.parametrize("named_copy", [False, True], ids=["to_unnamed", "to_named"])
def test_a_loaded_copy_goes_on_bit_for_bit(named, named_copy, kwargs):
    def make(values, with_names):
        return AdamW(list(zip(("weight", "bias"), values, strict=True)) if with_names else values, **kwargs)

    optimizer = make(tensors((10, 5), (10,), kwargs=kwargs), named)
    train(optimizer, range(5))
    copied = make(tensors((10, 5), (10,), seed=8, kwargs=kwargs), named_copy)
    for value, original in zip(parameters_of(copied), parameters_of(optimizer), strict=True):
        value.detach().copy_(original.detach())
    first = optimizer.state_dict()
    copied.load_state_dict(copy.deepcopy(first))
    assert_close(copied.state_dict()["state"], first["state"], rtol=0, atol=0)
    assert_close(optimizer.state_dict()["state"], first["state"], rtol=0, atol=0)
    for step in range(5, 10):
        train(optimizer, [step])
        train(copied, [step])
        assert_same_run(copied, optimizer)
    names = ["weight", "bias"] if named or named_copy else None
    assert copied.param_groups[0].get("param_names") == names


def test_names_come_with_the_load_and_stay_without():
    def make(*names):
        return AdamW(list(zip(names, tensors((2, 2), (2,)), strict=True)) if names else tensors((2, 2), (2,)))

    renamed = make("a", "b")
    renamed.load_state_dict(make("c", "d").state_dict())
    assert renamed.param_groups[0]["param_names"] == ["c", "d"]
    renamed.load_state_dict(make().state_dict())
    assert renamed.param_groups[0]["param_names"] == ["c", "d"]


@every_configuration
def test_a_saved_and_loaded_state_dict_is_equal(kwargs):
    optimizer = AdamW(tensors((10, 5), (10,), kwargs=kwargs), **kwargs)
    train(optimizer)
    before = copy.deepcopy(optimizer.state_dict())
    loaded = through_disk(optimizer.state_dict())
    optimizer.load_state_dict(state_dict=loaded)  # by keyword, as torch.distributed.checkpoint calls it
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert after["state"].keys() == before["state"].keys()
    for number, state in before["state"].items():
        assert_same(list(after["state"][number].values()), list(state.values()))
        assert list(after["state"][number]) == list(state)


@every_in_place_configuration
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.bfloat16], ids=str)
def test_a_run_begun_in_torch_goes_on_here(dtype, kwargs):
    theirs = adamw_of_torch(tensors((10, 5), (), dtype=dtype), **kwargs)
    train(theirs, range(5))
    ours = AdamW([nn.Parameter(value.detach().clone()) for value in parameters_of(theirs)], **kwargs)
    ours.load_state_dict(through_disk(theirs.state_dict()))
    assert_same_run(ours, theirs)
    if dtype is torch.bfloat16:
        return  # from here on ours rounds less often than torch
    train(theirs, range(5, 10))
    train(ours, range(5, 10))
    assert_same_run(ours, theirs)


@every_in_place_configuration
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
def test_a_run_begun_here_goes_on_in_torch(dtype, kwargs):
    ours = AdamW(tensors((10, 5), (), dtype=dtype), **kwargs)
    train(ours, range(5))
    theirs = adamw_of_torch([nn.Parameter(value.detach().clone()) for value in parameters_of(ours)], **kwargs)
    theirs.load_state_dict(through_disk(ours.state_dict()))
    train(theirs, range(5, 10))
    train(ours, range(5, 10))
    assert_same_run(ours, theirs)


@every_in_place_configuration
@pytest.mark.parametrize("count", [float, int], ids=["float_step", "int_step"])
@pytest.mark.parametrize("written_by", [torch.optim.AdamW, AdamW], ids=["torch", "ours"])
@pytest.mark.parametrize("missing", [*INFO.not_og_supported_flags, "all"])
def test_older_state_dicts_load_as_in_torch(missing, written_by, count, kwargs):
    writer = written_by(tensors((4, 3), ()), **kwargs)
    train(writer, range(3))
    old = copy.deepcopy(writer.state_dict())
    for name in INFO.not_og_supported_flags if missing == "all" else (missing,):
        del old["param_groups"][0][name]
    for state in old["state"].values():
        state["step"] = count(state["step"])
    ours, theirs = AdamW(tensors((4, 3), ()), **kwargs), adamw_of_torch(tensors((4, 3), ()), **kwargs)
    for optimizer in (ours, theirs):
        optimizer.load_state_dict(copy.deepcopy(old))
        for group in optimizer.param_groups:
            # torch minimizes and picks foreach where the file does not say; ours does as it was constructed
            group["maximize"], group["foreach"] = kwargs.get("maximize", False), False
        train(optimizer, range(3, 6))
    assert_same_run(ours, theirs)
    assert isinstance(ours.state[parameters_of(ours)[0]]["step"], Tensor)


def test_loading_takes_lr_from_the_state_dict_and_keeps_its_kind():
    fast, slow = AdamW(tensors((2, 2)), lr=torch.tensor(0.5)), AdamW(tensors((2, 2)), lr=0.25)
    train(fast, [0])
    slow.load_state_dict(fast.state_dict())
    assert isinstance(slow.param_groups[0]["lr"], Tensor)
    assert slow.param_groups[0]["lr"].item() == 0.5


def test_a_state_dict_of_another_model_is_refused():
    optimizer = AdamW(tensors((2, 2), (2,)))
    with pytest.raises(ValueError, match="parameter group that doesn't match the size"):
        optimizer.load_state_dict(AdamW(tensors((2, 2))).state_dict())
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(
            AdamW([{"params": tensors((2, 2))}, {"params": tensors((2,))}]).state_dict()
        )


# --- hooks -----------------------------------------------------------------------------------------------


def trained():
    optimizer = AdamW(tensors((4, 3)))
    train(optimizer, [0])
    return optimizer


@pytest.mark.parametrize(
    "kind", ["state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post"]
)
def test_state_dict_hooks_fire_once_in_order_until_removed(kind):
    optimizer, calls = trained(), []
    register = getattr(optimizer, f"register_{kind}_hook")
    register(lambda *_: calls.append("first registered"))
    handle = register(lambda *_: calls.append("prepended"), prepend=True)
    register(lambda *_: calls.append("last"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["prepended", "first registered", "last"]
    handle.remove()
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls[3:] == ["first registered", "last"]


def test_state_dict_hooks_see_and_change_what_is_saved():
    optimizer = trained()

    def note(optimizer):
        optimizer.state["note"] = 1

    def move_note(optimizer, state_dict):
        return {**state_dict, "note": state_dict["state"].pop("note", None)}

    handle = optimizer.register_state_dict_pre_hook(note)
    assert optimizer.state_dict()["state"]["note"] == 1
    optimizer.register_state_dict_post_hook(move_note)
    saved = optimizer.state_dict()
    assert saved["note"] == 1
    assert saved["state"].keys() == {0}
    handle.remove()
    del optimizer.state["note"]
    assert optimizer.state_dict()["note"] is None


@pytest.mark.parametrize("policy", [None, TopK(0.5, schedule=Schedule(observe=1))], ids=["no_policy", "TopK"])
def test_state_under_a_name_survives_steps_loading_and_copying(policy):
    optimizer, loaded = (MaskedAdamW(tensors((4, 3)), policy=policy) for _ in range(2))
    optimizer.state["note"] = 1
    train(optimizer, range(3))
    loaded.load_state_dict(optimizer.state_dict())
    assert loaded.state["note"] == 1
    assert copy.deepcopy(optimizer).state["note"] == 1


def test_load_hooks_see_and_change_what_is_loaded():
    optimizer = trained()
    saved = optimizer.state_dict()
    (parameter,) = parameters_of(optimizer)

    def halve_lr(optimizer, state_dict):
        state_dict["param_groups"][0]["lr"] = 0.002

    def replace(optimizer, state_dict):
        state_dict = copy.deepcopy(state_dict)
        state_dict["param_groups"][0]["lr"] = 0.003
        state_dict["state"][0]["exp_avg"].fill_(5.0)
        return state_dict

    def look(optimizer):
        optimizer.state["seen"] = (
            optimizer.param_groups[0]["lr"],
            optimizer.state[parameter]["exp_avg"].mean().item(),
        )

    optimizer.register_load_state_dict_pre_hook(halve_lr)
    optimizer.register_load_state_dict_post_hook(look)
    optimizer.load_state_dict(copy.deepcopy(saved))
    assert optimizer.state["seen"] == (0.002, saved["state"][0]["exp_avg"].mean().item())
    optimizer.register_load_state_dict_pre_hook(replace, prepend=True)
    optimizer.load_state_dict(copy.deepcopy(saved))
    assert optimizer.state["seen"] == (0.002, 5.0)  # the prepended hook ran first, so 0.002 came last


def child_tuning(params):
    return ChildTuningAdamW(params, variant="F", keep=0.5)


@pytest.mark.parametrize("after_plain_adamw", [False, True], ids=["alone", "after_plain_AdamW_was_created"])
@pytest.mark.parametrize(
    "make", [MaskedAdamW, AdamW, child_tuning], ids=["MaskedAdamW", "subclass", "ChildTuningAdamW"]
)
def test_step_hooks_fire_once_each_in_order(make, after_plain_adamw):
    if after_plain_adamw:
        train(torch.optim.AdamW(tensors((2, 2))), [0])
    optimizer, calls = make(tensors((2, 2))), []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: calls.append("global post")),
    ]
    try:
        optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
        optimizer.register_step_post_hook(lambda *_: calls.append("post"))
        optimizer.step(lambda: calls.append("step"))
    finally:
        for handle in handles:
            handle.remove()
    assert calls == ["global pre", "pre", "step", "post", "global post"]
    optimizer.step(lambda: calls.append("step"))
    assert calls[5:] == ["pre", "step", "post"]


def test_a_step_pre_hook_may_replace_the_closure():
    optimizer = trained()
    optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: ((optimizer, lambda: 2.0), {}))
    assert optimizer.step(lambda: 1.0) == 2.0


@pytest.mark.parametrize("make", [AdamW, child_tuning], ids=["AdamW", "ChildTuningAdamW"])
def test_the_profiler_finds_each_step_once_under_the_name_of_the_class(make):
    optimizer = make(tensors((2, 2)))
    with torch.autograd.profiler.profile() as profile:
        train(optimizer, range(3))
    name = f"Optimizer.step#{type(optimizer).__name__}.step"
    assert [
        (event.key, event.count) for event in profile.key_averages() if "Optimizer.step" in event.key
    ] == [(name, 3)]


# --- life around the optimizer ---------------------------------------------------------------------------


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer))}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
@every_configuration
def test_copies_keep_public_attributes_and_behaviour(kwargs, duplicate):
    optimizer = AdamW(tensors((10, 5), (10,), kwargs=kwargs), **kwargs)
    train(optimizer, range(3))
    twin = duplicate(optimizer)

    def public(thing):
        return {name for name in vars(thing) if not name.startswith("_")}

    assert public(twin) == public(optimizer)
    assert repr(twin) == repr(optimizer)
    assert twin.defaults == optimizer.defaults
    for step in range(3, 6):
        train(optimizer, [step])
        train(twin, [step])
        assert_same_run(twin, optimizer)
    assert not {value.data_ptr() for value in parameters_of(twin)} & {
        value.data_ptr() for value in parameters_of(optimizer)
    }


def test_a_copy_of_a_fresh_optimizer_works_too():
    optimizer = AdamW(tensors((3, 3)))
    twin = copy.deepcopy(optimizer)
    train(optimizer)
    train(twin)
    assert_same_run(twin, optimizer)


@every_in_place_configuration
def test_steps_that_the_scaler_skips_change_nothing(kwargs):
    net, twin = TinyNet(), TinyNet()
    ours, theirs = AdamW(net.parameters(), **kwargs), adamw_of_torch(twin.parameters(), **kwargs)
    runs = [(net, ours), (twin, theirs)]
    scalers = [torch.amp.GradScaler("cpu", init_scale=4.0) for _ in runs]
    for step in range(4):
        before = copy.deepcopy((list(net.parameters()), ours.state_dict()))
        for (module, optimizer), scaler in zip(runs, scalers, strict=True):
            optimizer.zero_grad()
            scaler.scale(module()).backward()
            if step == 2:
                module.weight.grad[3, 1] = torch.inf
            scaler.step(optimizer)
            scaler.update()
        assert_same_run(ours, theirs)
        if step == 2:
            assert_same(list(net.parameters()), before[0])
            assert ours.state_dict()["param_groups"] == before[1]["param_groups"]
            assert_close(ours.state_dict()["state"], before[1]["state"], rtol=0, atol=0)
            assert scalers[0].get_scale() == 2.0
    assert ours.state[net.weight]["step"].item() == 3


@every_in_place_configuration
@pytest.mark.parametrize("by_keyword", [False, True], ids=["positional", "by_keyword"])
def test_a_closure_runs_once_with_gradients_on_and_its_loss_comes_back(by_keyword, kwargs):
    net, twin = TinyNet(), TinyNet()
    ours, theirs = AdamW(net.parameters(), **kwargs), adamw_of_torch(twin.parameters(), **kwargs)
    losses = []

    def closure():
        assert torch.is_grad_enabled()
        ours.zero_grad()
        losses.append(net())
        losses[-1].backward()
        return losses[-1]

    for _ in range(3):
        with torch.no_grad():
            returned = ours.step(closure=closure) if by_keyword else ours.step(closure)
            assert not torch.is_grad_enabled()
        assert returned is losses[-1]
    fit(theirs, twin, steps=3)
    assert len(losses) == 3
    assert_same_run(ours, theirs)
    assert ours.step() is None


def test_zero_grad_drops_or_zeroes_gradients():
    optimizer = trained()
    (parameter,) = parameters_of(optimizer)
    optimizer.zero_grad(set_to_none=False)
    assert parameter.grad.abs().sum() == 0
    optimizer.zero_grad()
    assert parameter.grad is None


@every_in_place_configuration
def test_a_group_that_joins_late_starts_from_zero_with_the_defaults(kwargs):
    ours, theirs = AdamW(tensors((4, 3)), **kwargs), adamw_of_torch(tensors((4, 3)), **kwargs)
    for optimizer in (ours, theirs):
        train(optimizer, range(3))
        optimizer.add_param_group({"params": tensors((2, 2), (2,), seed=9), "lr": 0.5})
        train(optimizer, range(3, 6))
    assert_same_run(ours, theirs)
    assert [group["lr"] for group in ours.param_groups] == [kwargs.get("lr", 1e-3), 0.5]
    assert ours.param_groups[0].keys() == ours.param_groups[1].keys()
    assert [ours.state[value]["step"].item() for value in parameters_of(ours)] == [6, 3, 3]


def test_weight_averaging_and_its_schedule_see_the_same_weights_as_with_torch():
    averages = []
    for make in (AdamW, adamw_of_torch):
        net = TinyNet()
        optimizer = make(net.parameters(), lr=0.01)
        averaged = swa_utils.AveragedModel(net)
        schedule = swa_utils.SWALR(optimizer, swa_lr=0.05, anneal_epochs=4)
        for _ in range(6):
            fit(optimizer, net, steps=2)
            averaged.update_parameters(net)
            schedule.step()
        averages.append(
            [*averaged.parameters(), *net.parameters(), torch.tensor(optimizer.param_groups[0]["lr"])]
        )
    assert_same(*averages)


def test_tied_parameters_step_once():
    net, single = nn.Linear(3, 3, bias=False), tensors((3, 3))
    net.tied = nn.Linear(3, 3, bias=False)
    net.tied.weight = net.weight
    with torch.no_grad():
        net.weight.copy_(single[0])
    ours, theirs = AdamW(net.parameters()), adamw_of_torch(single)
    train(ours)
    train(theirs)
    assert_same_run(ours, theirs)


# --- the real file ---------------------------------------------------------------------------------------


@pytest.mark.skipif(
    "SPARSE_OPTIM_TORCH_CHECKOUT" not in os.environ,
    reason="SPARSE_OPTIM_TORCH_CHECKOUT names no PyTorch checkout of the installed version",
)
def test_the_file_of_torch_itself_passes():
    suite = Path(os.environ["SPARSE_OPTIM_TORCH_CHECKOUT"]).resolve() / "test"
    here = Path(__file__).resolve().parent
    paths = [str(here), str(here.parent), str(suite), os.environ.get("PYTHONPATH", "")]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-c",
        os.devnull,
        "-p",
        "no:cacheprovider",
        "--noconftest",
    ]
    command += ["-p", Path(__file__).stem, "-k", "TestOptimRenewedCPU", str(suite / "test_optim.py")]
    run = subprocess.run(
        command,
        cwd=suite,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
