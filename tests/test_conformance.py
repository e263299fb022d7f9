"""Every method where it is AdamW, on every backend, passes the checks of PyTorch's own suite of optimizers.

The cases (inputs and error inputs) are those that ship inside torch; the checks are ours, in the spirit of
test/test_optim.py::TestOptimRenewed, and stricter: with the reference backend, "as torch.optim.AdamW" means
the same bits on the CPU. The other backends are held to the bar that torch holds its own fused kernels to.

Loaded with `-p`, this file is a plug-in that shows torch's suite our classes and no others. It is proved here
with an imitation of that suite; with SPARSE_OPTIM_TORCH_CHECKOUT naming a PyTorch checkout, the last tests
run the real one.
"""

import copy
import functools
import inspect
import io
import itertools
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler, swa_utils
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing import assert_close
from torch.testing._internal import common_optimizers
from torch.testing._internal.common_utils import TestCase as TorchTestCase

from sparse_optim import (
    Bernoulli,
    ChildTuningAdamW,
    DPSAdamW,
    GradDropAdamW,
    MaskedAdamW,
    Schedule,
    SecondOrderAdamW,
    TopK,
    backends,
)

# torch's own tests and states are matched bit for bit
pytestmark = pytest.mark.usefixtures("torchs_own_bits")


class Limit(NamedTuple):
    """A method with arguments that make it train every entry, as AdamW does."""

    method: type[MaskedAdamW]
    options: dict[str, Any]
    # whether masks are made and applied all the same: a masked parameter must be real
    masks: bool = False


ALMOST_1 = 1 - 1e-12  # drops no entry of so few
LIMITS = {
    "policy_None": Limit(MaskedAdamW, {}),
    "Bernoulli_1": Limit(MaskedAdamW, {"policy": Bernoulli(1.0)}),
    "TopK_1": Limit(MaskedAdamW, {"policy": TopK(1.0, schedule=Schedule(observe=2))}),
    "ChildTuning_F": Limit(ChildTuningAdamW, {"variant": "F", "keep": 1.0}),
    "ChildTuning_D": Limit(ChildTuningAdamW, {"variant": "D", "density": 1.0, "observe_steps": 2}),
    "DPS_dense": Limit(DPSAdamW, {"variant": "dense", "density": 1.0, "update_steps": 2}),
    "DPS_mix": Limit(DPSAdamW, {"variant": "mix", "density": 1.0, "update_steps": 2}),
    "SecondOrder": Limit(SecondOrderAdamW, {"density": 1.0, "observe_steps": 2}),
    "GradDrop": Limit(GradDropAdamW, {"keep": 1.0}),
    # these three go through statistics, selections and masks on their way to the same numbers
    "GradDrop_drawn": Limit(GradDropAdamW, {"keep": ALMOST_1}, masks=True),
    "DPS_first_stage": Limit(
        DPSAdamW, {"variant": "dense", "density": 0.5, "update_steps": 1000}, masks=True
    ),
    # a dense step and one of the selected entries in turn; the release's cut rounds up, to all of them
    "DPS_selected": Limit(
        DPSAdamW,
        {"variant": "dense", "density": ALMOST_1, "update_steps": 1, "fidelity": "release"},
        masks=True,
    ),
}
DEVICES = [torch.device("cpu"), *[torch.device("cuda")] * torch.cuda.is_available()]
BACKENDS = list(dict.fromkeys(name for place in DEVICES for name in backends.available(place)))
# where pickle finds the classes: all have the same name
classes = types.SimpleNamespace()


def adamw_class(limit, backend):
    """The limit of a method under the name that torch's suite looks for when it chooses learning rates."""
    method, options, _ = LIMITS[limit]
    place = f"{limit}_on_{backend}"

    def init(self, *args, **kwargs):
        method.__init__(self, *args, **{"backend": backend, **options, **kwargs})

    body = {"__init__": init, "__module__": __name__, "__qualname__": f"classes.{place}"}
    setattr(classes, place, type("AdamW", (method,), body))
    return getattr(classes, place)


# what torch's suite may ask for, by backend. The three switches choose one: foreach, differentiable and
# fused=False the reference, fused any of the others. They are refused beside the name of a backend that they
# would not choose, and torch's suite sets those that are declared to False. What fused has to be, to be
# declared, says `fused_as_in_torch`
IMPLEMENTATIONS = {
    "reference": ("foreach", "differentiable"),
    "auto": ("foreach", "differentiable", "fused"),
    "native": (),
    "triton": (),
}
TORCHS = {info.optim_cls: info for info in common_optimizers.optim_db}


class Info(common_optimizers.OptimizerInfo):
    """One of our classes as torch's suite wants to know it; `name` tells them apart in the names of tests.

    What is declared runs there, so that it is what works as in torch. Not declared are, beside what
    `IMPLEMENTATIONS` says,

    - complex parameters where they are masked,
    - sparse gradients, which torch.optim.AdamW does not take either,
    - capturable, which torch asks for on GPUs and under torch.compile only.
    """

    def __init__(self, limit, backend):
        super().__init__(
            adamw_class(limit, backend),
            optim_inputs_func=common_optimizers.optim_inputs_func_adamw,
            optim_error_inputs_func=common_optimizers.optim_error_inputs_func_adamw,
            # torch tries more schedulers with Adam than with AdamW
            scheduler_inputs=TORCHS[torch.optim.Adam].scheduler_inputs,
            supported_impls=IMPLEMENTATIONS[backend],
            supports_fused_on=("cpu", "cuda"),
            # its tolerances for fused
            decorators=TORCHS[torch.optim.AdamW].decorators,
            supports_complex=not LIMITS[limit].masks,
            not_og_supported_flags=("foreach", "differentiable", "fused", "maximize", "capturable"),
        )
        self.limit, self.backend = limit, backend

    @property
    def name(self):
        return f"{self.limit}_on_{self.backend}"


INFOS = [
    Info(limit, backend)
    for backend in ["reference", "auto", *[name for name in BACKENDS if name != "reference"]]
    for limit in LIMITS
    # "auto" is one of the others, and Triton's interpreter is slow
    if backend in ("reference", "native")
    or limit == "policy_None"
    or (backend == "triton" and limit in ("GradDrop_drawn", "DPS_selected"))
]
INFO = INFOS[0]
AdamW = INFO.optim_cls


def pytest_configure(config):
    """Shows torch's suite our classes and no others; called only when this file is loaded with `-p`."""
    common_optimizers.optim_db[:] = INFOS


def inputs_of(info, *, differentiable=False):
    """torch's inputs for AdamW, by their descriptions: all of them where the class has no policy, and one
    where kernels are interpreted.
    """
    inputs = {optim_input.desc: optim_input.kwargs for optim_input in info.optim_inputs_func("cpu")}
    if info.backend == "triton":
        return {"amsgrad": inputs["amsgrad"]}
    if info.limit != "policy_None":
        return {desc: inputs[desc] for desc in ("maximize", "amsgrad")}
    # as they are, and once per implementation; torch's helper leaves foreach out on the CPU
    skip = () if differentiable else ("differentiable",)
    helper = common_optimizers._get_optim_inputs_including_global_cliquey_kwargs
    cases = {case.desc: case.kwargs for case in helper("cpu", torch.float32, info, skip)} | inputs
    if "foreach" in info.supported_impls:
        cases |= {f"{desc} & foreach": {**kwargs, "foreach": True} for desc, kwargs in inputs.items()}
    return cases


def every_case(*, differentiable=False, only=lambda info: True, **crossed):
    """Parametrizes `cls` and `kwargs`. What else is named, the first class is crossed with in full, and the
    others in part: a dict of values by their ids, and the ids for the others.
    """
    cases = []
    for info in filter(only, INFOS):
        choices = [
            [(key, values[key]) for key in (values if info is INFO else part)]
            for values, part in crossed.values()
        ]
        for (desc, kwargs), *chosen in itertools.product(
            inputs_of(info, differentiable=differentiable).items(), *choices
        ):
            words = [*[info.name] * (info is not INFO), desc, *[key for key, _ in chosen]]
            case = "-".join(words).replace(" & ", "-").replace(" ", "_")
            cases.append(pytest.param(info.optim_cls, kwargs, *[value for _, value in chosen], id=case))
    return pytest.mark.parametrize(("cls", "kwargs", *crossed), cases)


def every_class(only):
    return pytest.mark.parametrize(
        "cls", [pytest.param(info.optim_cls, id=info.name) for info in INFOS if only(info)]
    )


def is_compiled(info):
    return info.backend != "triton"


every_configuration = every_case(differentiable=True)
every_compiled_configuration = every_case(differentiable=True, only=is_compiled)
every_in_place_configuration = every_case()
every_compiled_in_place_configuration = every_case(only=is_compiled)
every_differentiable_configuration = every_case(only=lambda info: "differentiable" in info.supported_impls)
every_complex_configuration = every_case(only=lambda info: info.supports_complex)
every_compiled_complex_configuration = every_case(
    only=lambda info: info.supports_complex and is_compiled(info)
)
# what has no policy, and so can exchange states with torch
every_configuration_without_a_policy = every_case(only=lambda info: info.limit == "policy_None")
every_configuration_of_one_class = every_case(only=lambda info: info is INFO)
every_method_and_backend = every_class(lambda info: True)
every_compiled_method_and_backend = every_class(is_compiled)
every_method = every_class(lambda info: info.backend == "reference")
every_backend = every_class(lambda info: info.limit == "policy_None")
every_compiled_backend = every_class(lambda info: info.limit == "policy_None" and is_compiled(info))
every_class_with_foreach = every_class(lambda info: "foreach" in info.supported_impls)

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
every_scheduled_configuration = every_case(
    only=is_compiled, schedulers=(SCHEDULERS, ["no_schedule", "OneCycleLR_cycling_betas"])
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


@pytest.fixture(autouse=True)
def _a_backend_that_runs_there(request):
    """Triton needs a GPU, or its interpreter, which a machine with a GPU does without."""
    chosen = getattr(request.node, "callspec", None)
    cls, place = (chosen.params.get(name) if chosen else None for name in ("cls", "device"))
    for info in INFOS:
        if info.optim_cls is cls and info.backend != "auto":
            problem = backends.why_not(info.backend, torch.device(place or "cpu"))
            if problem:
                pytest.skip(problem)


def adamw_of_torch(params, **kwargs):
    """The oracle: torch's for-loop, whatever implementation the case asks of ours."""
    return torch.optim.AdamW(params, **{**kwargs, "foreach": False, "fused": None})


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


# what torch's suite allows between its fused kernels and its for-loop: five times the defaults of
# assert_close, and for the short dtypes what AdamW's entry in its database says
CLOSE = {
    torch.float64: {"rtol": 5e-7, "atol": 5e-7},
    torch.float32: {"rtol": 6.5e-6, "atol": 5e-5},
    torch.bfloat16: {"rtol": 5e-3, "atol": 5e-3},
    torch.float16: {"rtol": 5e-3, "atol": 5e-3},
}


def assert_same(ours, theirs, *, exactly=True):
    """The same bits on the CPU; close on a GPU, where nobody promises bits."""
    assert len(ours) == len(theirs)
    for left, right in zip(ours, theirs, strict=True):
        assert (left.shape, left.dtype, left.device) == (right.shape, right.dtype, right.device)
        if not exactly:
            assert_close(left, right, **CLOSE[left.dtype.to_real()])
        elif left.device.type == "cpu":
            assert torch.equal(bits(left), bits(right)), f"{left} != {right}"
        else:
            assert_close(left, right)


def promises_bits(ours, theirs):
    """The reference computes as torch does, and every backend as it did the last time."""
    return ours.backend == "reference" or isinstance(theirs, MaskedAdamW)


def assert_same_losses(ours, theirs, *, exactly):
    assert ours == (theirs if exactly else pytest.approx(theirs, rel=1e-5))


KEYS = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")  # of torch


def assert_same_state(ours, theirs):
    """Both optimizers hold the same moments and counts under torch's keys, parameter by parameter."""
    for left, right in zip(parameters_of(ours), parameters_of(theirs), strict=True):
        state = {key: value for key, value in theirs.state.get(right, {}).items() if key in KEYS}
        assert state.keys() <= ours.state.get(left, {}).keys()
        assert_same(
            [ours.state[left][key] for key in state],
            list(state.values()),
            exactly=promises_bits(ours, theirs),
        )


def assert_same_run(ours, theirs):
    assert_same(parameters_of(ours), parameters_of(theirs), exactly=promises_bits(ours, theirs))
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


@every_method_and_backend
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=f"{number}_{case.optimizer_error_input.desc.replace(' ', '_')}")
        for number, case in enumerate(INFO.optim_error_inputs_func("cpu", torch.float32))
    ],
)
def test_bad_inputs_of_torch_raise_what_torch_raises(cls, case):
    assert case.error_on is common_optimizers.OptimizerErrorEnum.CONSTRUCTION_ERROR
    params, kwargs = case.optimizer_error_input.params, case.optimizer_error_input.kwargs
    expect = pytest.warns if issubclass(case.error_type, Warning) else pytest.raises
    with expect(case.error_type, match=case.error_regex):
        cls(params, **kwargs)


@every_configuration
def test_repr_shows_the_class_and_every_option_of_every_group(cls, kwargs):
    left, right = tensors((3,), (2, 2))
    lines = repr(cls([{"params": [left]}, {"params": [right], "lr": 0.25}], **kwargs)).splitlines()
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


@every_scheduled_configuration
def test_loss_goes_the_right_way_and_as_with_torch(cls, schedulers, kwargs):
    net, twin = TinyNet(), TinyNet()
    ours, theirs = cls(net.parameters(), **kwargs), adamw_of_torch(twin.parameters(), **kwargs)
    losses = fit(ours, net, schedulers)
    assert (losses[-1] > losses[0]) if kwargs.get("maximize") else (losses[-1] < losses[0])
    assert_same_losses(losses, fit(theirs, twin, schedulers), exactly=promises_bits(ours, theirs))
    assert_same_run(ours, theirs)
    assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"]
    assert ours.param_groups[0]["betas"] == theirs.param_groups[0]["betas"]


@every_case(only=lambda info: is_compiled(info) or info.limit == "policy_None")
def test_loss_goes_the_right_way_on_non_contiguous_parameters(cls, device, kwargs):
    net, twin = (TinyNet(device=device, layout="non_contiguous") for _ in range(2))
    losses = fit(cls(net.parameters(), **kwargs), net)
    assert (losses[-1] > losses[0]) if kwargs.get("maximize") else (losses[-1] < losses[0])
    assert losses == pytest.approx(fit(adamw_of_torch(twin.parameters(), **kwargs), twin), rel=1e-5)


@every_compiled_in_place_configuration
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_step_is_that_of_torch(cls, device, dtype, kwargs):
    shapes = [(), (1,), (31,), (33, 31), (2, 3, 5, 7), (1025,)]
    ours = cls(tensors(*shapes, dtype=dtype, device=device), **kwargs)
    theirs = adamw_of_torch(tensors(*shapes, dtype=dtype, device=device), **kwargs)
    for step in range(8):
        train(ours, [step])
        train(theirs, [step])
        assert_same_run(ours, theirs)


@every_configuration_of_one_class
@pytest.mark.parametrize(
    "policy",
    [Bernoulli(1.0), TopK(1.0, schedule=Schedule(observe=3)), TopK(1.0, schedule=Schedule(observe=None))],
    ids=["keep=1", "density=1", "density=1_chosen_by_hand"],
)
@pytest.mark.parametrize("unselected", ["frozen", "zero_grad", "track"])
def test_dense_limits_are_torch(cls, unselected, policy, kwargs):
    ours = cls(tensors((9, 4), (4,)), policy=policy, unselected=unselected, **kwargs)
    theirs = adamw_of_torch(tensors((9, 4), (4,)), **kwargs)
    train(ours)
    train(theirs)
    assert_same_run(ours, theirs)


@every_scheduled_configuration
def test_groups_keep_their_own_lr_and_weight_decay(cls, schedulers, kwargs):
    net, twin = TinyNet(), TinyNet()

    def groups(module):
        return [{"params": [module.weight], "weight_decay": 0.9}, {"params": [module.bias], "lr": 0.02}]

    ours, theirs = cls(groups(net), **kwargs), adamw_of_torch(groups(twin), **kwargs)
    losses = fit(ours, net, schedulers), fit(theirs, twin, schedulers)
    assert_same_losses(*losses, exactly=promises_bits(ours, theirs))
    assert_same_run(ours, theirs)
    assert [group["lr"] for group in ours.param_groups] == [group["lr"] for group in theirs.param_groups]


@every_compiled_method_and_backend
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
def test_a_group_has_its_own_numbers(cls, own):
    runs = [
        make([{"params": tensors((4, 3))}, {"params": tensors((4, 3)), **own}], weight_decay=0.1)
        for make in (cls, adamw_of_torch)
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


@every_method
def test_groups_of_a_torch_optimizer_can_be_taken_over(cls):
    theirs = adamw_of_torch([{"params": tensors((4, 3)), "lr": 0.5}, {"params": tensors((3,))}], amsgrad=True)
    ours = cls(copy.deepcopy(theirs.param_groups))
    train(ours)
    train(theirs)
    assert_same_run(ours, theirs)


@every_in_place_configuration
def test_a_group_without_lr_stands_still(cls, kwargs):
    still, moving = tensors((5, 5), (5, 5))
    before = still.detach().clone()
    optimizer = cls([{"params": [still], "lr": 0.0}, {"params": [moving]}], **kwargs)
    train(optimizer)
    assert torch.equal(still, before)
    assert not torch.equal(moving, before)


@every_compiled_backend
@pytest.mark.parametrize("schedule", ["no_schedule", "StepLR", "OneCycleLR_cycling_betas"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(), (1,)], ids=["zero_dimensional", "one_element"])
def test_tensor_lr_equals_float_lr_and_stays_the_same_tensor(cls, shape, dtype, schedule):
    # 2**-6 has the same value as a float32 tensor, a float64 tensor and a Python number
    lr = torch.full(shape, 2.0**-6, dtype=dtype)
    net, twin, oracle = TinyNet(), TinyNet(), TinyNet()
    ours, by_float = cls(net.parameters(), lr=lr), cls(twin.parameters(), lr=2.0**-6)
    theirs = adamw_of_torch(oracle.parameters(), lr=lr.clone())
    losses = fit(ours, net, SCHEDULERS[schedule]), fit(theirs, oracle, SCHEDULERS[schedule])
    assert_same_losses(*losses, exactly=promises_bits(ours, theirs))
    assert_same_run(ours, theirs)
    # torch rounds 1 - lr * weight_decay to the dtype of the tensor: an ulp away from its own float lr
    fit(by_float, twin, SCHEDULERS[schedule])
    assert_close(list(net.parameters()), list(twin.parameters()), rtol=1e-6, atol=1e-6)
    assert ours.param_groups[0]["lr"] is lr
    assert (lr.item() == 2.0**-6) == (schedule == "no_schedule")


@every_backend
def test_tensor_betas_equal_float_betas(cls):
    # 0.875 and 0.9375 are exact in float32
    ours = cls(tensors((4, 3)), betas=(torch.tensor(0.875), torch.tensor([[0.9375]])))
    theirs = cls(tensors((4, 3)), betas=(0.875, 0.9375))
    train(ours)
    train(theirs)
    assert_close(parameters_of(ours), parameters_of(theirs))


@every_complex_configuration
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_parameters_train_as_in_torch(cls, device, dtype, kwargs):
    shapes = [(), (3,), (10, 5)]
    ours = cls(tensors(*shapes, dtype=dtype, device=device), **kwargs)
    theirs = adamw_of_torch(tensors(*shapes, dtype=dtype, device=device), **kwargs)
    train(ours)
    train(theirs)
    assert_same_run(ours, theirs)


@every_complex_configuration
def test_complex_parameters_train_like_their_two_parts(cls, kwargs):
    (whole,) = tensors((10, 5), dtype=torch.complex64)
    parts = [nn.Parameter(part.detach().clone()) for part in (whole.real, whole.imag)]
    ours, in_parts = cls([whole], **kwargs), cls(parts, **kwargs)
    for step in range(5):
        train(ours, [step])
        for part, gradient in zip(parts, (whole.grad.real, whole.grad.imag), strict=True):
            part.grad = gradient.clone()
        in_parts.step()
        assert_close(
            torch.view_as_real(whole.detach()), torch.stack([part.detach() for part in parts], dim=-1)
        )


@every_class_with_foreach
@pytest.mark.parametrize("foreach", [True, False, None])
def test_foreach_changes_nothing_while_layers_freeze_and_thaw(cls, foreach):
    net, twin = TinyNet(dtype=torch.float64), TinyNet(dtype=torch.float64)
    scale, twin_scale = (nn.Parameter(torch.tensor(1.5, dtype=torch.float64)) for _ in range(2))
    ours = cls([*net.parameters(), scale], weight_decay=0.1, foreach=foreach)
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


@every_compiled_in_place_configuration
def test_every_milestone_is_close_to_foreach_and_fused_of_torch(cls, kwargs):
    for implementation in ("foreach", "fused"):
        tracker = common_optimizers.TensorTracker()
        theirs = torch.optim.AdamW(
            tensors((), (6, 5), dtype=torch.float64),
            **{**kwargs, "foreach": None, "fused": None, implementation: True},
        )
        ours = cls(tensors((), (6, 5), dtype=torch.float64), **kwargs)
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


@every_compiled_complex_configuration
def test_mixed_dtypes_in_one_group_train_as_if_alone(cls, device, kwargs):
    dtypes = [torch.float64, torch.bfloat16, torch.float32, torch.complex64, torch.float16, torch.float32]
    values = [tensors((9, 5), dtype=dtype, device=device)[0] for dtype in dtypes]
    together = cls(values, **{**kwargs, "eps": 1e-3})  # 1e-8 is zero in float16
    alone = [cls([nn.Parameter(value.detach().clone())], **{**kwargs, "eps": 1e-3}) for value in values]
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


@every_compiled_in_place_configuration
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_no_further_from_the_truth_than_torch(cls, device, dtype, kwargs):
    kwargs = {**kwargs, "eps": 1e-3}
    starts = tensors((64, 33), dtype=dtype, device=device)
    runs = {
        "ours": cls([nn.Parameter(start.detach().clone()) for start in starts], **kwargs),
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


@every_differentiable_configuration
def test_differentiable_steps_are_close_to_the_others(cls, kwargs):
    ours = cls(
        tensors((6, 5), (), kwargs={"differentiable": True}),
        **{**kwargs, "foreach": False, "fused": None},
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


@every_method_and_backend
def test_autograd_notices_that_a_step_wrote_the_weights(cls):
    (weight,) = tensors((4, 4))
    loss = weight.pow(2).sum()
    train(cls([weight]), [0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- fused=True ------------------------------------------------------------------------------------------


def fused_as_in_torch():
    """What torch's suite asks of `fused=True`, and whether it is so here."""
    skipped = classes.policy_None_on_auto(tensors((3,)), fused=True)
    (parameter,) = parameters_of(skipped)
    parameter.grad, before = torch.ones(3), parameter.detach().clone()
    skipped.grad_scale, skipped.found_inf = None, torch.ones(())
    skipped.step()
    absent = nn.Parameter(torch.ones(3, device="meta"))
    absent.grad = torch.ones_like(absent)
    try:
        classes.policy_None_on_auto([absent], fused=True).step()
        refusal = ""
    except RuntimeError as error:
        refusal = str(error)
    return {
        "a step that an attached found_inf forbids is not made": torch.equal(parameter, before),
        "meta tensors are refused in its words": refusal.startswith(
            "`fused=True` requires all the params to be floating point Tensors of supported devices"
        ),
    }


needs_native = pytest.mark.skipif("native" not in BACKENDS, reason="needs the native library")


@needs_native
def test_fused_is_declared_if_and_only_if_it_is_all_that_torch_asks_of_it():
    asked = fused_as_in_torch()
    assert ("fused" in IMPLEMENTATIONS["auto"]) == all(asked.values()), asked


@needs_native
@every_class(lambda info: info.backend == "native" or (info.limit, info.backend) == ("policy_None", "auto"))
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)
)
def test_fused_is_as_close_to_the_for_loop_as_torch_asks(cls, dtype):
    for optim_input in INFO.optim_inputs_func("cpu", dtype):
        ours = cls(tensors((10, 5), (10,), (), dtype=dtype), **optim_input.kwargs, fused=True)
        theirs = adamw_of_torch(tensors((10, 5), (10,), (), dtype=dtype), **optim_input.kwargs)
        for step in range(7):
            for optimizer in (ours, theirs):
                if step == 3:
                    optimizer.zero_grad()
                    optimizer.step()
                train(optimizer, [step])
        for left, right in zip(parameters_of(ours), parameters_of(theirs), strict=True):
            assert_close(left, right, **CLOSE[dtype])
            for name, value in theirs.state[right].items():
                assert_close(ours.state[left][name], value, **CLOSE[dtype])


@needs_native
@every_class(lambda info: info.backend == "native")
def test_fused_refuses_meta_parameters_and_steps_once_they_have_values(cls):
    net = nn.Sequential(nn.Linear(2, 2, device="meta"), nn.Linear(2, 2, device="meta"))
    optimizer = cls(net.parameters(), fused=True)
    for parameter in net.parameters():
        parameter.grad = torch.rand_like(parameter)
    with pytest.raises(RuntimeError, match=r"fused=True|backend='native' cannot be used"):
        optimizer.step()
    assert not any(optimizer.state.get(parameter) for parameter in net.parameters())
    optimizer.zero_grad(set_to_none=True)
    net.to_empty(device="cpu")
    # the module has new parameters now
    optimizer.param_groups[0]["params"][:] = net.parameters()
    for parameter in net.parameters():
        parameter.detach().fill_(1.0)
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all((parameter < 1.0).all() for parameter in net.parameters())


# --- parameters of every kind ----------------------------------------------------------------------------


@every_configuration
def test_no_gradients_mean_no_step_and_no_state(cls, device, kwargs):
    values = tensors((4, 3), (), device=device, kwargs=kwargs)
    before = [value.detach().clone() for value in values]
    optimizer = cls(values, **kwargs)
    for _ in range(3):
        optimizer.step()
    assert_same(values, before)
    assert all(len(optimizer.state[value]) == 0 for value in values if value in optimizer.state)


@every_configuration
def test_zero_gradients_move_nothing_but_decay(cls, device, kwargs):
    values = tensors((5, 1), (3,), device=device, kwargs=kwargs)
    expected = [value.detach().clone() for value in values]
    optimizer = cls(values, **kwargs)
    for _ in range(3):
        for value, twin in zip(values, expected, strict=True):
            value.grad = torch.zeros_like(value)
            twin.mul_(1 - kwargs.get("lr", 1e-3) * kwargs.get("weight_decay", 1e-2))
        optimizer.step()
    assert_same(values, expected, exactly=optimizer.backend == "reference")


@every_configuration
def test_every_parameter_that_stepped_has_state_under_the_keys_of_torch(cls, kwargs):
    values = tensors((4, 3), (), kwargs=kwargs)
    optimizer = cls(values, **kwargs)
    train(optimizer, range(3))
    for value in values:
        state = optimizer.state[value]
        names = {"step", "exp_avg", "exp_avg_sq"} | ({"max_exp_avg_sq"} if kwargs.get("amsgrad") else set())
        assert names <= state.keys()
        assert (state["step"].shape, state["step"].device.type, state["step"].item()) == ((), "cpu", 3)
        assert all(state[name].shape == value.shape for name in names - {"step"})


@every_backend
@pytest.mark.parametrize("default", [torch.float32, torch.float64], ids=str)
def test_step_counts_in_the_default_dtype_as_in_torch(cls, default):
    usual = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        ours = cls(tensors((4, 3)))
        train(ours, [0])
    finally:
        torch.set_default_dtype(usual)
    assert ours.state[parameters_of(ours)[0]]["step"].dtype == default


@every_in_place_configuration
def test_empty_and_zero_dimensional_parameters_train_as_in_torch(cls, device, kwargs):
    shapes = [(0,), (), (3, 0), (4, 3), (0, 5, 2)]
    ours = cls(tensors(*shapes, device=device), **kwargs)
    theirs = adamw_of_torch(tensors(*shapes, device=device), **kwargs)
    train(ours, range(3))
    train(theirs, range(3))
    assert_same_run(ours, theirs)


@every_in_place_configuration
def test_integer_and_frozen_parameters_are_left_alone(cls, kwargs):
    integers, booleans = torch.arange(5), torch.tensor([True, False])
    frozen, moving = tensors((3, 3), (3, 3))
    frozen.requires_grad_(False)
    before = frozen.detach().clone()
    optimizer = cls([integers, frozen, moving, booleans], **kwargs)
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


@every_method_and_backend
def test_a_thawed_parameter_counts_from_its_own_first_step(cls):
    ours, theirs = cls(tensors((3, 3), (3, 3))), adamw_of_torch(tensors((3, 3), (3, 3)))
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


LAYOUTS = {name: name for name in ("contiguous", "channels_last", "transposed", "sliced")}


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


@every_case(layout=(LAYOUTS, ["sliced"]), gradient_layout=(LAYOUTS, ["contiguous", "transposed"]))
def test_any_strides_train_like_contiguous_copies(cls, device, layout, gradient_layout, kwargs):
    (start,) = tensors((3, 4, 5, 2), device=device)
    view, storage = laid_out(start.detach(), layout)
    outside = storage == 77.0
    # a slice of a leaf has no .grad; the parameter is a leaf that shares the memory of the slice
    ours = cls([view.detach().requires_grad_()], **kwargs)
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
def test_an_expanded_gradient_is_read_as_if_it_were_copied(cls, kwargs):
    ours, theirs = cls(tensors((4, 3)), **kwargs), adamw_of_torch(tensors((4, 3)), **kwargs)
    for _ in range(3):
        parameters_of(ours)[0].grad = torch.tensor(0.5).expand(4, 3)
        parameters_of(theirs)[0].grad = torch.full((4, 3), 0.5)
        ours.step()
        theirs.step()
    assert_same_run(ours, theirs)
    assert parameters_of(ours)[0].grad.unique().tolist() == [0.5]


@every_in_place_configuration
def test_gradients_are_read_not_written(cls, kwargs):
    optimizer = cls(tensors((4, 3), (2,)), max_grad_norm=None, **kwargs)
    for value in parameters_of(optimizer):
        value.grad = torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    before = [value.grad.clone() for value in parameters_of(optimizer)]
    optimizer.step()
    assert_same([value.grad for value in parameters_of(optimizer)], before)


# --- state dicts -----------------------------------------------------------------------------------------


@every_compiled_configuration
@pytest.mark.parametrize("named", [False, True], ids=["from_unnamed", "from_named"])
@pytest.mark.parametrize("named_copy", [False, True], ids=["to_unnamed", "to_named"])
def test_a_loaded_copy_goes_on_bit_for_bit(cls, named, named_copy, kwargs):
    def make(values, with_names):
        return cls(list(zip(("weight", "bias"), values, strict=True)) if with_names else values, **kwargs)

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


@every_method
def test_names_come_with_the_load_and_stay_without(cls):
    def make(*names):
        return cls(list(zip(names, tensors((2, 2), (2,)), strict=True)) if names else tensors((2, 2), (2,)))

    renamed = make("a", "b")
    renamed.load_state_dict(make("c", "d").state_dict())
    assert renamed.param_groups[0]["param_names"] == ["c", "d"]
    renamed.load_state_dict(make().state_dict())
    assert renamed.param_groups[0]["param_names"] == ["c", "d"]


@every_configuration
def test_a_saved_and_loaded_state_dict_is_equal(cls, kwargs):
    optimizer = cls(tensors((10, 5), (10,), kwargs=kwargs), **kwargs)
    train(optimizer)
    before = copy.deepcopy(optimizer.state_dict())
    loaded = through_disk(optimizer.state_dict())
    optimizer.load_state_dict(state_dict=loaded)  # by keyword, as torch.distributed.checkpoint calls it
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert after["state"].keys() == before["state"].keys()
    for number, state in before["state"].items():
        assert list(after["state"][number]) == list(state)
        for key, value in state.items():
            if isinstance(value, Tensor):
                assert_same([after["state"][number][key]], [value])
            else:
                assert after["state"][number][key] == value


@every_configuration_without_a_policy
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.bfloat16], ids=str)
def test_a_run_begun_in_torch_goes_on_here(cls, dtype, kwargs):
    theirs = adamw_of_torch(tensors((10, 5), (), dtype=dtype), **kwargs)
    train(theirs, range(5))
    ours = cls([nn.Parameter(value.detach().clone()) for value in parameters_of(theirs)], **kwargs)
    ours.load_state_dict(through_disk(theirs.state_dict()))
    assert_same_run(ours, theirs)
    if dtype is torch.bfloat16:
        return  # from here on ours rounds less often than torch
    train(theirs, range(5, 10))
    train(ours, range(5, 10))
    assert_same_run(ours, theirs)


@every_configuration_without_a_policy
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
def test_a_run_begun_here_goes_on_in_torch(cls, dtype, kwargs):
    ours = cls(tensors((10, 5), (), dtype=dtype), **kwargs)
    train(ours, range(5))
    theirs = adamw_of_torch([nn.Parameter(value.detach().clone()) for value in parameters_of(ours)], **kwargs)
    theirs.load_state_dict(through_disk(ours.state_dict()))
    theirs.param_groups[0].update(foreach=False, fused=None)  # which torch loads
    train(theirs, range(5, 10))
    train(ours, range(5, 10))
    assert_same_run(ours, theirs)


def older(optimizer, missing, count):
    """The state dict of an optimizer as an earlier version would have written it."""
    old = copy.deepcopy(optimizer.state_dict())
    for name in INFO.not_og_supported_flags if missing == "all" else (missing,):
        del old["param_groups"][0][name]
    for state in old["state"].values():
        state["step"] = count(state["step"])
    return old


def assert_goes_on_as_torch(old, cls, kwargs):
    ours, theirs = cls(tensors((4, 3), ()), **kwargs), adamw_of_torch(tensors((4, 3), ()), **kwargs)
    for optimizer in (ours, theirs):
        optimizer.load_state_dict(copy.deepcopy(old))
        for group in optimizer.param_groups:
            # torch minimizes and picks foreach where the file does not say; ours does as it was constructed
            group["maximize"], group["foreach"] = kwargs.get("maximize", False), False
        train(optimizer, range(3, 6))
    assert_same_run(ours, theirs)
    assert isinstance(ours.state[parameters_of(ours)[0]]["step"], Tensor)


FLAGS = {name: name for name in (*INFO.not_og_supported_flags, "all")}
every_count = pytest.mark.parametrize("count", [float, int], ids=["float_step", "int_step"])


@every_case(only=is_compiled, missing=(FLAGS, ["all"]))
@every_count
def test_older_state_dicts_load_as_in_torch(cls, missing, count, kwargs):
    writer = cls(tensors((4, 3), ()), **kwargs)
    train(writer, range(3))
    assert_goes_on_as_torch(older(writer, missing, count), cls, kwargs)


@every_case(missing=(FLAGS, ["all"]), only=lambda info: info.limit == "policy_None")
@every_count
def test_older_state_dicts_of_torch_load_as_in_torch(cls, missing, count, kwargs):
    writer = torch.optim.AdamW(tensors((4, 3), ()), **kwargs)
    train(writer, range(3))
    assert_goes_on_as_torch(older(writer, missing, count), cls, kwargs)


@every_method
def test_loading_takes_lr_from_the_state_dict_and_keeps_its_kind(cls):
    fast, slow = cls(tensors((2, 2)), lr=torch.tensor(0.5)), cls(tensors((2, 2)), lr=0.25)
    train(fast, [0])
    slow.load_state_dict(fast.state_dict())
    assert isinstance(slow.param_groups[0]["lr"], Tensor)
    assert slow.param_groups[0]["lr"].item() == 0.5


@every_method
def test_a_state_dict_of_another_model_is_refused(cls):
    optimizer = cls(tensors((2, 2), (2,)))
    with pytest.raises(ValueError, match="parameter group that doesn't match the size"):
        optimizer.load_state_dict(cls(tensors((2, 2))).state_dict())
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(cls([{"params": tensors((2, 2))}, {"params": tensors((2,))}]).state_dict())


# --- hooks -----------------------------------------------------------------------------------------------


def trained(cls):
    optimizer = cls(tensors((4, 3)))
    train(optimizer, [0])
    return optimizer


@every_method
@pytest.mark.parametrize(
    "kind", ["state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post"]
)
def test_state_dict_hooks_fire_once_in_order_until_removed(cls, kind):
    optimizer, calls = trained(cls), []
    register = getattr(optimizer, f"register_{kind}_hook")
    register(lambda *_: calls.append("first registered"))
    handle = register(lambda *_: calls.append("prepended"), prepend=True)
    register(lambda *_: calls.append("last"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["prepended", "first registered", "last"]
    handle.remove()
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls[3:] == ["first registered", "last"]


@every_method
def test_state_dict_hooks_see_and_change_what_is_saved(cls):
    optimizer = trained(cls)

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


@every_method
def test_load_hooks_see_and_change_what_is_loaded(cls):
    optimizer = trained(cls)
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


@every_method
def test_a_step_pre_hook_may_replace_the_closure(cls):
    optimizer = trained(cls)
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
@every_compiled_configuration
def test_copies_keep_public_attributes_and_behaviour(cls, kwargs, duplicate):
    optimizer = cls(tensors((10, 5), (10,), kwargs=kwargs), **kwargs)
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


@every_method_and_backend
def test_a_copy_of_a_fresh_optimizer_works_too(cls):
    optimizer = cls(tensors((3, 3)))
    twin = copy.deepcopy(optimizer)
    train(optimizer)
    train(twin)
    assert_same_run(twin, optimizer)


@every_in_place_configuration
def test_steps_that_the_scaler_skips_change_nothing(cls, kwargs):
    net, twin = TinyNet(), TinyNet()
    ours, theirs = cls(net.parameters(), **kwargs), adamw_of_torch(twin.parameters(), **kwargs)
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


@every_compiled_in_place_configuration
@pytest.mark.parametrize("by_keyword", [False, True], ids=["positional", "by_keyword"])
def test_a_closure_runs_once_with_gradients_on_and_its_loss_comes_back(cls, by_keyword, kwargs):
    net, twin = TinyNet(), TinyNet()
    ours, theirs = cls(net.parameters(), **kwargs), adamw_of_torch(twin.parameters(), **kwargs)
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


@every_method_and_backend
def test_zero_grad_drops_or_zeroes_gradients(cls):
    optimizer = trained(cls)
    (parameter,) = parameters_of(optimizer)
    optimizer.zero_grad(set_to_none=False)
    assert parameter.grad.abs().sum() == 0
    optimizer.zero_grad()
    assert parameter.grad is None


@every_compiled_in_place_configuration
def test_a_group_that_joins_late_starts_from_zero_with_the_defaults(cls, kwargs):
    ours, theirs = cls(tensors((4, 3)), **kwargs), adamw_of_torch(tensors((4, 3)), **kwargs)
    for optimizer in (ours, theirs):
        train(optimizer, range(4))
        optimizer.add_param_group({"params": tensors((2, 2), (2,), seed=9), "lr": 0.5})
        train(optimizer, range(4, 8))
    assert_same_run(ours, theirs)
    assert [group["lr"] for group in ours.param_groups] == [kwargs.get("lr", 1e-3), 0.5]
    assert ours.param_groups[0].keys() == ours.param_groups[1].keys()
    assert [ours.state[value]["step"].item() for value in parameters_of(ours)] == [8, 4, 4]


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


@every_method_and_backend
def test_tied_parameters_step_once(cls):
    net, single = nn.Linear(3, 3, bias=False), tensors((3, 3))
    net.tied = nn.Linear(3, 3, bias=False)
    net.tied.weight = net.weight
    with torch.no_grad():
        net.weight.copy_(single[0])
    ours, theirs = cls(net.parameters()), adamw_of_torch(single)
    train(ours)
    train(theirs)
    assert_same_run(ours, theirs)


# --- what only a GPU shows -------------------------------------------------------------------------------

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_cuda
@every_class(lambda info: info.backend not in ("auto", "reference"))
def test_a_step_on_a_gpu_takes_less_memory_than_one_parameter(cls):
    if problem := backends.why_not(cls(tensors((1,))).backend, torch.device("cuda")):
        pytest.skip(problem)
    size = 1 << 20
    optimizer = cls(tensors(*[(size,)] * 5, device="cuda"))
    train(optimizer, range(2))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    assert torch.cuda.max_memory_allocated() - before < 4 * size


@pytest.mark.gpu
@needs_cuda
def test_one_group_may_hold_parameters_of_several_devices():
    mixed = AdamW([*tensors((4, 3)), *tensors((4, 3), device="cuda"), *tensors((5,), seed=8)])
    alone = AdamW([*tensors((4, 3)), *tensors((4, 3)), *tensors((5,), seed=8)])
    train(mixed)
    train(alone)
    for left, right in zip(parameters_of(mixed), parameters_of(alone), strict=True):
        assert_close(left.cpu(), right)
        assert mixed.state[left]["exp_avg"].device == left.device


@pytest.mark.gpu
@needs_cuda
@every_configuration_without_a_policy
def test_state_from_the_cpu_moves_to_the_gpu_of_its_parameters(cls, kwargs):
    here = adamw_of_torch(tensors((4, 3)), **kwargs)
    train(here, range(3))
    there = AdamW([nn.Parameter(value.detach().cuda()) for value in parameters_of(here)], **kwargs)
    there.load_state_dict(copy.deepcopy(here.state_dict()))
    train(here, range(3, 6))
    train(there, range(3, 6))
    for left, right in zip(parameters_of(there), parameters_of(here), strict=True):
        assert_close(left.cpu(), right)
        assert there.state[left]["exp_avg"].device == left.device
        # it is counted on the host as long as nothing is captured
        assert there.state[left]["step"].device.type == "cpu"


# --- torch's own suite -----------------------------------------------------------------------------------


def run_suite(suite, report, *options):
    """Runs a checkout's test/test_optim.py with this file as plug-in; what became of every test, by name."""
    here = Path(__file__).resolve().parent
    paths = [str(here), str(here.parent), str(suite), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--noconftest", f"--junitxml={report}"]
    # tests/conftest.py is what the tests here run under too
    command += ["-p", "no:cacheprovider", "-p", "conftest", "-p", Path(__file__).stem, *options]
    run = subprocess.run(
        [*command, str(suite / "test_optim.py")],
        cwd=suite,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert report.exists(), run.stdout[-5000:] + run.stderr[-2000:]
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        outcomes[f"{case.get('classname').rpartition('.')[2]}.{case.get('name')}"] = [*kinds, "passed"][0]
    return run, outcomes


IMITATION = """
import copy

import torch
from optim.sibling import one_dimension
from torch.testing._internal.common_device_type import instantiate_device_type_tests, onlyCPU, onlyCUDA
from torch.testing._internal.common_optimizers import (
    _get_optim_inputs_including_global_cliquey_kwargs,
    optim_db,
    optims,
)
from torch.testing._internal.common_utils import TestCase, parametrize, run_tests


class TestOptimRenewed(TestCase):
    @onlyCPU
    @optims(optim_db)
    def test_cliquey(self, device, dtype, optim_info):
        for optim_input in optim_info.optim_inputs_func(device=device):
            self.assertFalse({"foreach", "fused", "differentiable"} & optim_input.kwargs.keys())

    @onlyCUDA
    @optims(optim_db)
    def test_multigpu(self, device, dtype, optim_info):
        self.fail("this machine was to be the CPU")

    @optims([info for info in optim_db if info.optim_error_inputs_func is not None])
    def test_errors(self, device, dtype, optim_info):
        for case in optim_info.optim_error_inputs_func(device=device, dtype=dtype):
            expect = self.assertWarnsRegex if issubclass(case.error_type, Warning) else self.assertRaisesRegex
            with expect(case.error_type, case.error_regex):
                optim_info.optim_cls(case.optimizer_error_input.params, **case.optimizer_error_input.kwargs)

    @parametrize("contiguous", [True, False])
    @optims(optim_db, dtypes=[torch.float32])
    def test_direction(self, device, dtype, optim_info, contiguous):
        for make in [lambda optimizer: [], *optim_info.scheduler_inputs[:2]]:
            for optim_input in optim_info.optim_inputs_func(device=device):
                if "foreach" in optim_info.supported_impls:
                    optim_input.kwargs["foreach"] = False
                weight = torch.randn(one_dimension, 2, device=device, dtype=dtype)
                weight = torch.nn.Parameter(weight[:, 0].contiguous() if contiguous else weight[:, 0])
                optimizer = optim_info.optim_cls([weight], **optim_input.kwargs)
                schedulers = [one(optimizer) for one in make] if isinstance(make, list) else make(optimizer)
                first = weight.detach().pow(2).sum()
                for _ in range(3):
                    optimizer.zero_grad()
                    loss = weight.pow(2).sum()
                    loss.backward()
                    optimizer.step()
                    for scheduler in schedulers:
                        with_loss = type(scheduler).__name__ == "ReduceLROnPlateau"
                        scheduler.step(*[loss.detach()] * with_loss)
                compare = self.assertGreater if optim_input.kwargs.get("maximize") else self.assertLess
                compare(weight.detach().pow(2).sum(), first)

    @optims([info for info in optim_db if "foreach" in info.supported_impls], dtypes=[torch.float64])
    def test_foreach(self, device, dtype, optim_info):
        start = torch.randn(one_dimension, device=device, dtype=dtype)
        for optim_input in optim_info.optim_inputs_func(device=device):
            ends = []
            for foreach in (False, True):
                weight = start.clone().requires_grad_()
                optimizer = optim_info.optim_cls([weight], **optim_input.kwargs, foreach=foreach)
                weight.grad = torch.ones_like(weight)
                optimizer.step()
                ends.append(weight.detach())
            self.assertEqual(*ends)

    @optims([info for info in optim_db if "fused" in info.supported_impls])
    def test_fused(self, device, dtype, optim_info):
        weight = torch.ones(one_dimension, device=device, dtype=dtype)
        optimizer = optim_info.optim_cls([weight], fused=True)
        weight.grad, optimizer.grad_scale, optimizer.found_inf = weight.clone(), None, torch.ones(())
        optimizer.step()
        self.assertEqual(weight, torch.ones_like(weight))

    @optims([info for info in optim_db if info.supports_complex], dtypes=[torch.complex64])
    def test_complex(self, device, dtype, optim_info):
        weight = torch.ones(one_dimension, device=device, dtype=dtype, requires_grad=True)
        optimizer = optim_info.optim_cls([weight])
        weight.abs().sum().backward()
        optimizer.step()
        self.assertTrue(weight.is_complex() and (weight.abs() < 1).all())

    @optims([info for info in optim_db if info.only_supports_sparse_grads])
    def test_sparse(self, device, dtype, optim_info):
        self.fail("no class of ours wants sparse gradients")

    @optims(optim_db)
    def test_life(self, device, dtype, optim_info):
        inputs = _get_optim_inputs_including_global_cliquey_kwargs(
            device, dtype, optim_info, skip=("differentiable",)
        )
        for optim_input in inputs:
            weight = torch.ones(one_dimension, device=device, dtype=dtype, requires_grad=True)
            if optim_info.optim_cls.__name__ == "AdamW":
                optim_input.kwargs["lr"] = 1e-8
            optimizer = optim_info.optim_cls([weight], **optim_input.kwargs)
            weight.grad = torch.zeros_like(weight)
            for _ in range(3):
                optimizer.step()
            self.assertEqual(weight, torch.ones_like(weight))
            saved = copy.deepcopy(optimizer.state_dict())
            for state in saved["state"].values():
                state["step"] = state["step"].item()
            copy.deepcopy(optimizer).load_state_dict(saved)


instantiate_device_type_tests(TestOptimRenewed, globals(), allow_mps=True)

if __name__ == "__main__":
    run_tests()
"""


@pytest.fixture
def imitation(tmp_path):
    """The folder of tests of a checkout of PyTorch, as far as the plug-in can tell."""
    suite = tmp_path / "checkout" / "test"
    (suite / "optim").mkdir(parents=True)
    (suite / "optim" / "sibling.py").write_text("one_dimension = 5\n")
    (suite / "test_optim.py").write_text(IMITATION)
    return suite


def names_of_imitated_tests():
    for info in INFOS:
        for test, holds in {
            "test_cliquey_{}_cpu_float32": True,
            "test_errors_{}_cpu_float32": True,
            "test_direction_contiguous_True_{}_cpu_float32": True,
            "test_direction_contiguous_False_{}_cpu_float32": True,
            "test_foreach_{}_cpu_float64": "foreach" in info.supported_impls,
            "test_fused_{}_cpu_float32": "fused" in info.supported_impls,
            "test_complex_{}_cpu_complex64": info.supports_complex,
            "test_life_{}_cpu_float32": True,
        }.items():
            if holds:
                yield f"TestOptimRenewedCPU.{test.format(info.name)}"


def test_the_plug_in_shows_a_suite_our_classes_and_no_others(imitation, tmp_path):
    # the interpreter is slow, and one test shows that its classes are there
    chosen = "TestOptimRenewedCPU and (errors or not on_triton)"
    run, outcomes = run_suite(imitation, tmp_path / "report.xml", "-k", chosen)
    expected = dict.fromkeys(names_of_imitated_tests(), "passed")
    # made for every device, and skipped where it is not CUDA
    expected |= {f"TestOptimRenewedCPU.test_multigpu_{info.name}_cpu_float32": "skipped" for info in INFOS}
    expected = {
        name: outcome for name, outcome in expected.items() if "errors" in name or "on_triton" not in name
    }
    assert outcomes == expected, run.stdout[-5000:]
    assert run.returncode == 0


WRONG_SIGN = """
from sparse_optim import MaskedAdamW

init = MaskedAdamW.__init__


def climb(self, *args, maximize=False, **kwargs):
    init(self, *args, maximize=not maximize, **kwargs)


MaskedAdamW.__init__ = climb
"""


def test_a_class_with_the_wrong_sign_fails_where_the_plug_in_shows_it(imitation, tmp_path):
    (imitation / "wrong_sign.py").write_text(WRONG_SIGN)
    few = "ChildTuning_F_on_reference or policy_None_on_auto"
    run, outcomes = run_suite(imitation, tmp_path / "report.xml", "-p", "wrong_sign", "-k", few)
    failed = {name for name, outcome in outcomes.items() if outcome != "passed" and "multigpu" not in name}
    assert failed >= {
        f"TestOptimRenewedCPU.test_direction_contiguous_{contiguous}_{name}_cpu_float32"
        for contiguous in (True, False)
        for name in ("ChildTuning_F_on_reference", "policy_None_on_auto")
    }
    assert all("_direction_" in name or "_complex_" in name for name in failed)
    assert run.returncode == 1


@pytest.mark.slow
@pytest.mark.skipif(
    "SPARSE_OPTIM_TORCH_CHECKOUT" not in os.environ,
    reason="SPARSE_OPTIM_TORCH_CHECKOUT names no PyTorch checkout of the installed version",
)
@pytest.mark.parametrize("backend", list(dict.fromkeys(info.backend for info in INFOS)))
def test_the_file_of_torch_itself_passes(backend, tmp_path):
    suite = Path(os.environ["SPARSE_OPTIM_TORCH_CHECKOUT"]).resolve() / "test"
    chosen = f"TestOptimRenewedCPU and on_{backend}"
    run, outcomes = run_suite(suite, tmp_path / "report.xml", "-k", chosen)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert "passed" in outcomes.values()
