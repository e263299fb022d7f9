"""Parameters that are spread over processes train the entries that one process would train, to the same bits.

The test process trains whole tensors and writes down what it saw. Two, three and four processes then train
shards of them with the same gradients, and note wherever they differ; the tests read these notes.
"""

import functools
import json
import logging
import math
import multiprocessing
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple

import pytest
import torch
from torch import nn

from sparse_optim import (
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
from sparse_optim.gradient_release import released_of
from sparse_optim.integrations.distributed import check_masks
from sparse_optim.scores import Lowest, Magnitude, RandomScore

distributed = pytest.importorskip("torch.distributed")
if not (distributed.is_available() and distributed.is_gloo_available()):
    pytest.skip("torch.distributed was built without gloo", allow_module_level=True)
if "forkserver" not in multiprocessing.get_all_start_methods():
    pytest.skip("processes would each load torch anew", allow_module_level=True)

from torch.distributed.checkpoint.state_dict import (  # noqa: E402
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard  # noqa: E402
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor  # noqa: E402
from torch.distributed.tensor.parallel import (  # noqa: E402
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

pytestmark = pytest.mark.filterwarnings("error")

STEPS = 7
LOOK_AHEAD = (1, 4)  # steps after which the masks to come are compared
# what a process spends its first seconds on, loaded once for all of them
PRELOADED = [
    "pytest",
    "sparse_optim",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
]


# models: shapes that divide evenly, unevenly, and into less rows than there are processes


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)


class Net(nn.Module):
    """Never called: its gradients are given."""

    def __init__(self):
        super().__init__()
        self.embeddings = nn.Embedding(5, 4)
        self.layer = nn.ModuleList(Block() for _ in range(2))
        # more entries than one tile of random words
        self.wide = nn.Linear(40, 33, bias=False)
        self.odd, self.one, self.norm = nn.Linear(7, 3, bias=False), nn.Linear(5, 1), nn.LayerNorm(3)
        self.filters = nn.Conv1d(3, 4, 5, bias=False)
        # without a gradient at first
        self.late = nn.Linear(4, 2, bias=False)
        self.classifier = nn.Linear(4, 2, bias=False)
        # beside the sharded ones
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 5))
        self.temperature = nn.Parameter(torch.tensor(0.75))


class Few(nn.Module):
    """Less rows than processes, so that some hold nothing at all."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(5, 1)


class Corner(nn.Module):
    """One tensor of three dimensions."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 6 * 4 * 10).view(6, 4, 10))


PLAIN = ("scale", "temperature")
GATHERED = ("one.weight", "odd.weight", "wide.weight", "layer.0.up.weight", "filters.weight")


def gradients(model, number, case):
    """Whole gradients of one step: multiples of 1/16, whose squares and sums are exact and often equal."""
    found = {}
    for i, (name, p) in enumerate(model.named_parameters()):
        generator = torch.Generator().manual_seed(1000 * number + i + case.salt)
        grad = torch.randint(-32, 33, p.shape, generator=generator) / 16 * 2 ** (number % 2)
        if case.equal:
            grad = torch.full(p.shape, 0.5)
        if name == "one.weight":
            grad = grad / 16
        if case.spoiled and name == "wide.weight" and number == 1:
            grad[-1, -1] = float("nan")
        if name.startswith("late") and number < 5:
            continue
        found[name] = grad.to(case.dtype)
    return found


# cases


class Case(NamedTuple):
    build: Callable[[nn.Module], MaskedAdamW]
    dtype: torch.dtype = torch.float32
    model: type[nn.Module] = Net
    explicit: bool = False  # call observe() and select()
    exact: bool = True  # to the bit
    equal: bool = False  # all gradients are
    spoiled: bool = False  # one gradient has an entry that is no number
    salt: int = 0


def masked(**options):
    return lambda model: MaskedAdamW(model.named_parameters(), lr=0.02, **options)


def method(kind, groups=None, **options):
    """A method on all parameters, or on those that its paper masks."""

    def build(model):
        params = param_groups(model, method=groups) if groups else model.named_parameters()
        return kind(params, lr=0.02, **options)

    return build


def with_idle_group(model):
    named = list(model.named_parameters())
    groups = [
        {"params": [(n, p) for n, p in named if n.startswith("one") == idle], "weight_decay": 0.1 * idle}
        for idle in (False, True)
    ]
    return MaskedAdamW(groups, lr=0.02, policy=TopK(0.02, schedule=Schedule(observe=2)))


child_d = functools.partial(method, ChildTuningAdamW, variant="D", density=0.3, observe_steps=2)
dps = functools.partial(method, DPSAdamW, variant="dense", density=0.6, update_steps=2)
second = functools.partial(method, SecondOrderAdamW, density=0.1, observe_steps=3)
drop = functools.partial(method, GradDropAdamW, keep=0.5)
again = Schedule(observe=2, train=2)

METHODS = {
    "child_tuning_f": Case(method(ChildTuningAdamW, variant="F", keep=0.4)),
    "child_tuning_d": Case(child_d()),
    "child_tuning_d_groups": Case(child_d(groups="child_tuning_d")),
    "dps_dense": Case(dps()),
    "dps_dense_release": Case(dps(fidelity="release")),
    "dps_groups": Case(dps(groups="dps")),
    "second_order": Case(second()),
    "second_order_release": Case(second(fidelity="release")),
    "grad_drop_entry": Case(drop()),
    "grad_drop_entry_epoch": Case(drop(refresh="epoch")),
    "grad_drop_layer": Case(drop(granularity="layer")),
    "gradual_unfreezing": Case(masked(policy=GradualUnfreezing())),
    "policy_none": Case(masked()),
    "bernoulli_track": Case(masked(policy=Bernoulli(0.4), unselected="track", seed=1 << 45)),
    "bernoulli_zero_grad": Case(masked(policy=Bernoulli(0.4), unselected="zero_grad")),
    "bernoulli_frozen": Case(masked(policy=Bernoulli(0.4), unselected="frozen")),
    "bernoulli_tensor": Case(masked(policy=Bernoulli(0.5, unit="tensor"))),
    "top_k_zero_grad": Case(masked(policy=TopK(0.2, schedule=again), unselected="zero_grad")),
}
OTHERS = {
    "top_k_again": Case(masked(policy=TopK(0.2, schedule=again), amsgrad=True, maximize=True)),
    "top_k_track": Case(masked(policy=TopK(0.2, schedule=again), unselected="track")),
    "top_k_explicit": Case(masked(policy=TopK(0.2)), explicit=True),
    "ceil_global": Case(masked(policy=TopK(0.01, cut="ceil", schedule=Schedule(observe=2)))),
    "all_equal": Case(masked(policy=TopK(0.3, schedule=Schedule(observe=2))), equal=True),
    "all_equal_per_tensor": Case(
        masked(policy=TopK(0.3, scope="tensor", schedule=Schedule(observe=2))), equal=True
    ),
    "lowest": Case(masked(policy=TopK(0.3, Lowest(SquaredGradient()), schedule=Schedule(observe=2)))),
    "density_one": Case(masked(policy=TopK(1.0, schedule=Schedule(observe=2)))),
    "reference": Case(child_d(backend="reference")),
    "reference_f": Case(method(ChildTuningAdamW, variant="F", backend="reference")),
    "bfloat16_dense": Case(masked(stochastic_rounding=True), torch.bfloat16),
    "bfloat16_bernoulli": Case(drop(stochastic_rounding=True, state_dtype=torch.float32), torch.bfloat16),
    "bfloat16_dps": Case(dps(stochastic_rounding=True), torch.bfloat16),
    "bfloat16_masters": Case(child_d(), torch.bfloat16),
    "bfloat16_statistic": Case(child_d(statistic_dtype=torch.bfloat16)),
    "not_a_number": Case(child_d(), spoiled=True),
    "idle_group": Case(with_idle_group),
    "clipped_dense": Case(masked(max_grad_norm=1.0, eps=0.1), exact=False),
    "clipped_draws": Case(
        masked(max_grad_norm=1.0, eps=0.1, policy=Bernoulli(0.4, rescale=True)), exact=False
    ),
    "clipped_list": Case(child_d(max_grad_norm=1.0, eps=0.1), exact=False),
    "clipped_bits": Case(dps(max_grad_norm=1.0, eps=0.1), exact=False),
}
FEW = {
    "few_top_k": Case(child_d(), model=Few),
    "few_again": Case(masked(policy=TopK(0.4, scope="tensor", schedule=again)), model=Few),
    "few_draws": Case(drop(), model=Few),
    "few_clipped": Case(masked(max_grad_norm=0.1, eps=0.1), model=Few, exact=False),
}
CORNERS = {
    "corner_top_k": Case(child_d(), model=Corner),
    "corner_draws": Case(drop(), model=Corner),
}
HALVES = {
    f"half_{half}_{name}": Case(build, salt=77 * half)
    for half in (0, 1)
    for name, build in (("top_k", child_d()), ("clipped", masked(max_grad_norm=1.0, eps=0.1)))
}
HALVES = {name: case._replace(exact="clipped" not in name) for name, case in HALVES.items()}
CASES = METHODS | OTHERS
EVERY_CASE = CASES | FEW | CORNERS | HALVES
# where the layout makes a difference
FEWER = ["child_tuning_f", "child_tuning_d", "all_equal", "clipped_list"]
COUNTING = ["child_tuning_d", "dps_dense", "clipped_draws", "not_a_number"]
SOME_OTHERS = ["top_k_again", "all_equal", "all_equal_per_tensor", "bfloat16_bernoulli", "clipped_draws"]
SOME_OTHERS += ["clipped_list", "not_a_number", "idle_group"]
SOME = ["child_tuning_f", "child_tuning_d", "dps_dense", "second_order_release", *SOME_OTHERS]


# what an optimizer shows of itself


def clock(optimizer):
    numbers = ("clock", "draw", "phase", "epoch")
    return [[int(group[number]) for number in numbers] for group in optimizer.param_groups]


def steps_of(case, model, optimizer, place, first=0):
    """Train, and yield the warnings of each step. `place` turns whole gradients into those of a parameter."""
    for number in range(first, STEPS):
        if number % 3 == 0:
            optimizer.new_epoch()
        optimizer.zero_grad()
        grads = gradients(model, number, case)
        for name, p in model.named_parameters():
            if name in grads:
                p.grad = place(name, p, grads[name])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if case.explicit and number in (0, 1, 4):
                optimizer.observe()
                if number == 4:
                    optimizer.select()
            else:
                optimizer.step()
        yield [str(warning.message) for warning in caught]


def built(case):
    torch.manual_seed(0)
    return case.model().to(case.dtype)


@torch.no_grad()
def train_whole(case):
    """What one process sees after each step."""
    model = built(case)
    optimizer = case.build(model)
    rows = []
    for caught in steps_of(case, model, optimizer, lambda name, p, grad: grad):
        row = {"density": optimizer.density(), "clock": clock(optimizer), "warnings": caught}
        row["masks"] = joined(map(optimizer.mask, model.parameters()))
        row["weights"] = joined(model.parameters())
        if len(rows) in LOOK_AHEAD:
            row["upcoming"] = joined(optimizer.mask(p, upcoming=True) for p in model.parameters())
        rows.append(row)
    return rows


def joined(tensors):
    """One tensor in place of many, which are slow to save and to load."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def apart(tensor, model):
    """By name what was joined."""
    named = dict(model.named_parameters())
    parts = tensor.split([p.numel() for p in named.values()])
    return {name: part.view(p.shape) for (name, p), part in zip(named.items(), parts, strict=True)}


def local(tensor):
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def places(p):
    """Where the entries of a shard are in the whole tensor, by torch's own account."""
    entries = torch.arange(p.numel()).view(p.shape)
    if isinstance(p, DTensor):
        entries = distribute_tensor(entries, p.device_mesh, p.placements, src_data_rank=None).to_local()
    return entries


def as_placed(p, tensor):
    """A shard like that of the parameter."""
    shape = {"run_check": False, "shape": p.shape, "stride": p.stride()}
    return DTensor.from_local(tensor, p.device_mesh, p.placements, **shape)


def spread_as(seen, p):
    """Whether both are DTensors and alike, or neither is one."""
    if not isinstance(p, DTensor):
        return not isinstance(seen, DTensor) and seen.shape == p.shape
    return isinstance(seen, DTensor) and (
        (seen.placements, seen.device_mesh, seen.shape) == (p.placements, p.device_mesh, p.shape)
    )


def same(a, b, exact):
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if exact and a.dtype.is_floating_point:
        bits = {2: torch.int16, 4: torch.int32}[a.itemsize]
        return torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))
    return torch.equal(a, b) if exact else torch.allclose(a, b, rtol=1e-5, atol=1e-7)


@torch.no_grad()
def train_sharded(case, layout, expected):
    """Where this process differs from the one that had whole tensors."""
    model = built(case)
    layout(model)
    named = dict(model.named_parameters())
    optimizer = case.build(model)
    where = {name: places(p) for name, p in named.items()}
    problems = []

    def place(name, p, grad):
        return as_placed(p, grad.flatten()[where[name]]) if isinstance(p, DTensor) else grad

    for number, caught in enumerate(steps_of(case, model, optimizer, place)):
        row, density = expected[number], optimizer.density()
        wholes = {key: apart(row[key], model) for key in ("masks", "weights", "upcoming") if key in row}
        if density != row["density"]:
            problems.append(f"step {number}: density {density}, not {row['density']}")
        if clock(optimizer) != row["clock"]:
            problems.append(f"step {number}: clock {clock(optimizer)}, not {row['clock']}")
        if caught != row["warnings"]:
            problems.append(f"step {number}: warned of {caught}, not {row['warnings']}")
        for name, p in named.items():
            shown = {"masks": optimizer.mask(p), "weights": p}
            if number in LOOK_AHEAD:
                shown["upcoming"] = optimizer.mask(p, upcoming=True)
            for key, seen in shown.items():
                exact = case.exact or key != "weights"
                if not spread_as(seen, p):
                    problems.append(f"step {number}: {key} of {name} is a {type(seen)} of {seen.shape}")
                elif not same(local(seen), wholes[key][name].flatten()[where[name]], exact):
                    problems.append(
                        f"step {number}: {key} of {name}, where {tuple(where[name].shape)} is held"
                    )
    for name, p in named.items():
        # gathers take their time: for one of each shape
        if isinstance(p, DTensor) and name in GATHERED:
            for key, seen in {"masks": optimizer.mask(p), "weights": p.detach()}.items():
                if not same(seen.full_tensor(), wholes[key][name], case.exact or key != "weights"):
                    problems.append(f"at the end: {key} of {name}, gathered")
    problems += [text for name, p in named.items() for text in unlike_a_shard(name, p, optimizer)]
    return problems


def unlike_a_shard(name, p, optimizer):
    """What is wrong with the state of a parameter: it has to be plain tensors, of this process's entries."""
    state, own = optimizer.state.get(p, {}), local(p)
    tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    for key, value in tensors.items():
        if isinstance(value, DTensor):
            yield f"{key} of {name} is a DTensor"
        elif key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master", "age"):
            if "indices" in tensors and value.shape != tensors["indices"].shape:
                yield f"{key} of {name} has {tuple(value.shape)}, not one for each index"
            elif "indices" not in tensors and value.shape != own.shape:
                yield f"{key} of {name} has {tuple(value.shape)}, not {tuple(own.shape)}"


class Weighted(nn.Module):
    """Its gradients are the factors that it is called with."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, factors):
        named = dict(self.model.named_parameters())
        return sum((named[name] * factor).sum() for name, factor in factors.items())


def train_copies(case, rank, world, expected):
    """Where this process, which has a share of each gradient, differs from the one that had it all."""
    model = built(case)
    parallel = nn.parallel.DistributedDataParallel(Weighted(model), find_unused_parameters=True)
    optimizer = case.build(model)
    check_masks(optimizer)
    problems = []
    for number in range(STEPS):
        if number % 3 == 0:
            optimizer.new_epoch()
        optimizer.zero_grad()
        shares = {}
        for i, (name, grad) in enumerate(gradients(model, number, case).items()):
            generator = torch.Generator().manual_seed(7 * number + i)
            parts = torch.randint(-32, 33, (world - 1, *grad.shape), generator=generator) / 16
            # multiples of 1/16, whose sum is the whole one; DDP divides by the number of processes
            shares[name] = world * (parts[rank - 1] if rank else grad - parts.sum(0))
        parallel(shares).backward()
        optimizer.step()
        # of one that no process has a gradient for
        row = expected[number]
        with torch.no_grad():
            seen = {"masks": map(optimizer.mask, model.parameters()), "weights": model.parameters()}
            problems += [
                f"step {number}: {key}" for key, own in seen.items() if not same(joined(own), row[key], True)
            ]
    return problems


# layouts


def shard_by(model, mesh, choose):
    """Every parameter but the plain ones as `choose` says."""
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if name != "scale":
                whole = p.detach()
                spread = distribute_tensor(whole, mesh, choose(whole), src_data_rank=None)
                module.register_parameter(name, nn.Parameter(spread))


def fsdp(model, mesh):
    beside = {p for name, p in model.named_parameters() if name in PLAIN}
    fully_shard(model, mesh=mesh, ignored_params=beside)


def tensor_parallel(model, mesh):
    plan = {
        "embeddings": RowwiseParallel(),
        "layer.*.up": ColwiseParallel(),
        "layer.*.down": RowwiseParallel(),
        "wide": ColwiseParallel(),
        "odd": RowwiseParallel(),
        "one": ColwiseParallel(),
    }
    parallelize_module(model, mesh, plan, src_data_rank=None)


def fsdp_and_tensor_parallel(model):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    tensor_parallel(model, mesh["tensor"])
    fsdp(model, mesh["data"])


def hsdp(model):
    fsdp(model, init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards")))


def columns(ranks):
    def layout(model):
        mesh = init_device_mesh("cpu", (ranks,))
        shard_by(model, mesh, lambda p: [Shard(min(1, p.dim() - 1)) if p.dim() else Replicate()])

    return layout


def replicated(model):
    shard_by(model, init_device_mesh("cpu", (2,)), lambda p: [Replicate()])


def blocks(model):
    by_dim = [[Replicate(), Replicate()], [Shard(0), Shard(0)]] + [[Shard(0), Shard(1)]] * 2
    shard_by(model, init_device_mesh("cpu", (2, 2)), lambda p: by_dim[p.dim()])


def flattened(model):
    """Two dimensions of a mesh made one, as contexts and data are."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context"))
    fsdp(model, mesh["data", "context"]._flatten("both"))


def two_parts(model):
    """Layers are spread over one dimension of a mesh, and all else over the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    shard_by(model.layer, mesh["tensor"], lambda p: [Shard(p.dim() - 1)])
    for name, module in model.named_children():
        if name != "layer":
            shard_by(module, mesh["data"], lambda p: [Shard(0)])


def half(model):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "data"))
    fsdp(model, mesh["data"])


def corner(*dims):
    def layout(model):
        shard_by(model, init_device_mesh("cpu", (2, 2)), lambda p: [Shard(dim) for dim in dims])

    return layout


# every method under each engine, beside what is listed for it; takes minutes
EVERY_METHOD = ("fsdp_3", "fsdp_4", "fsdp_and_tensor_parallel_4", "ddp_3", "ddp_4")
LAYOUTS = {
    "fsdp_2": (2, lambda model: fsdp(model, init_device_mesh("cpu", (2,))), list(CASES)),
    "columns_2": (2, columns(2), FEWER),
    "tensor_parallel_2": (2, lambda model: tensor_parallel(model, init_device_mesh("cpu", (2,))), FEWER),
    "replicated_2": (2, replicated, FEWER),
    "fsdp_3": (3, lambda model: fsdp(model, init_device_mesh("cpu", (3,))), [*FEWER, *COUNTING, *FEW]),
    "columns_3": (3, columns(3), FEWER),
    "fsdp_4": (4, lambda model: fsdp(model, init_device_mesh("cpu", (4,))), FEWER),
    "fsdp_and_tensor_parallel_4": (4, fsdp_and_tensor_parallel, SOME),
    "hsdp_4": (4, hsdp, [*FEWER, *COUNTING]),
    "flattened_4": (4, flattened, FEWER),
    "two_parts_4": (4, two_parts, FEWER),
    "blocks_4": (4, blocks, FEWER),
    "first_and_last_4": (4, corner(0, 2), list(CORNERS)),
}
WORLDS = sorted({ranks for ranks, _, _ in LAYOUTS.values()})
# copies of the model, whose gradients DistributedDataParallel averages
COPIES = {"ddp_2": (2, list(METHODS)), "ddp_3": (3, FEWER[:2]), "ddp_4": (4, FEWER[:2])}


def cases_of(layout, cases, every_case):
    """What is tried under a layout."""
    return list(dict.fromkeys([*cases, *(METHODS if every_case and layout in EVERY_METHOD else ())]))


# what only sharded parameters can do


def small():
    """Two sharded parameters."""
    mesh = init_device_mesh("cpu", (2,))
    wholes = [torch.linspace(-1, 1, 12).view(6, 2), torch.linspace(1, 2, 3)]
    return [
        (name, nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)))
        for name, whole in zip(("first.weight", "second.weight"), wholes, strict=True)
    ]


def ones_for(named):
    for _, p in named:
        p.grad = as_placed(p, torch.ones_like(local(p)))


def text_of(call):
    """What it is refused with."""
    try:
        call()
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


def refuse_released_gradients():
    """Those of replicated weights that only summing over processes would make."""
    mesh = init_device_mesh("cpu", (2,))
    p = nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Replicate()], src_data_rank=None))
    policy = TopK(0.5, schedule=Schedule(observe=1))
    optimizer = MaskedAdamW([("weight", p)], policy=policy, release_gradients=True)
    p.grad = DTensor.from_local(torch.ones(4, 2), mesh, [Partial()])
    for hook in p._post_accumulate_grad_hooks.values():
        hook(p)
    optimizer.step()


def refuse_counts():
    named = small()
    optimizer = DPSAdamW(named, variant="mix", update_steps=2)
    optimizer.set_count("first.weight", torch.ones(2))


def refuse_start(statistic, **schedule):
    named = small()
    policy = TopK(0.5, statistic, schedule=Schedule(observe=2, **schedule))
    optimizer = MaskedAdamW(named, policy=policy)
    ones_for(named)
    optimizer.step()


SCALED = {"by torch": {}, "fused": {"fused": True}, "capturable": {"capturable": True}}
REFUSALS = {
    "release_gradients": refuse_released_gradients,
    "set_count": refuse_counts,
    "random_scores": functools.partial(refuse_start, RandomScore()),
    "magnitudes": functools.partial(refuse_start, Magnitude()),
    "clipped_squares": functools.partial(refuse_start, SquaredGradient(clip_norm=1.0)),
    "clipped_squares_of_dps": functools.partial(
        refuse_start, SquaredGradient(clip_norm=1.0), train=2, meanwhile="everything"
    ),
}


def refuse_last_dims():
    model = Corner()
    corner(1, 2)(model)
    optimizer = MaskedAdamW(model.named_parameters(), policy=Bernoulli(0.5))
    ones_for(model.named_parameters())
    optimizer.step()


def saved_before_any_step():
    """An optimizer without state is saved and loaded, which some training loops do at the start."""
    named = small()
    optimizer = MaskedAdamW(named, policy=Bernoulli(0.5))
    optimizer.load_state_dict(optimizer.state_dict())
    ones_for(named)
    optimizer.step()
    return clock(optimizer)[0][0]


def skipped_steps(rank, **options):
    """The clock after each of three steps, and whether weights moved; one process's second gradient is
    infinite.
    """
    named, rows = small(), []
    policy = TopK(0.5, schedule=Schedule(observe=1, train=3, meanwhile="everything"))
    optimizer = MaskedAdamW(named, lr=0.1, policy=policy, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for number in range(3):
        scaler.scale(torch.ones(()))
        ones_for(named)
        if number == 1 and rank == 1:
            local(named[0][1].grad)[0, 0] = float("inf")
        before = [local(p).clone() for _, p in named]
        scaler.step(optimizer)
        scaler.update()
        moved = any(not torch.equal(local(p), old) for (_, p), old in zip(named, before, strict=True))
        rows.append([round(optimizer.density() * 15), clock(optimizer)[0][0], moved])
    return rows


def swapped_in(rank, folder):
    """Whether an optimizer of whole parameters trains those that others put into its groups before a step."""
    case = CASES["child_tuning_d"]
    expected = torch.load(f"{folder}/whole.pt", weights_only=True)["child_tuning_d"]
    model = built(case)
    optimizer = case.build(model)
    names = [name for name, _ in model.named_parameters()]
    LAYOUTS["fsdp_2"][1](model)
    named = dict(model.named_parameters())
    optimizer.param_groups[0]["params"] = [named[name] for name in names]
    where = {name: places(p) for name, p in named.items()}

    def place(name, p, grad):
        return as_placed(p, grad.flatten()[where[name]]) if isinstance(p, DTensor) else grad

    with torch.no_grad():
        for _ in steps_of(case, model, optimizer, place):
            pass
    weights = apart(expected[-1]["weights"], model)
    return [n for n, p in named.items() if not torch.equal(local(p), weights[n].flatten()[where[n]])]


def gradients_placed_otherwise(rank):
    """Weights after steps with gradients that are spread like the parameters, and otherwise."""
    found = {}
    mesh = init_device_mesh("cpu", (2,))
    for own, other in (
        (Shard(0), Replicate()),
        (Shard(0), Shard(1)),
        (Replicate(), Partial()),
        (Shard(0), Partial()),
        (Replicate(), Shard(0)),
    ):
        runs = []
        for placement in (own, other):
            whole = torch.linspace(-1, 1, 24).view(6, 4)
            p = nn.Parameter(distribute_tensor(whole, mesh, [own], src_data_rank=None))
            # squared gradients, so that halves of a sum would select others
            policy = TopK(0.3, schedule=Schedule(observe=2))
            optimizer = MaskedAdamW([("weight", p)], lr=0.1, policy=policy)
            generator = torch.Generator().manual_seed(3)
            for _ in range(4):
                grad = torch.randint(-32, 33, (6, 4), generator=generator) / 16
                part = torch.randint(-32, 33, (6, 4), generator=generator) / 16
                if placement.is_partial():
                    p.grad = DTensor.from_local(part if rank else grad - part, mesh, [placement])
                else:
                    p.grad = distribute_tensor(grad, mesh, [placement], src_data_rank=None)
                optimizer.step()
            runs.append(p.detach().full_tensor())
        found[f"{own} from {other}"] = torch.equal(*runs)
    return found


class Real(nn.Module):
    """One that is called."""

    def __init__(self):
        super().__init__()
        self.embeddings = nn.Embedding(7, 6)
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 10), nn.Linear(10, 6)
        self.classifier = nn.Linear(6, 3)

    def forward(self, tokens):
        hidden = self.embeddings(tokens)
        hidden = hidden + self.down(nn.functional.gelu(self.up(self.norm(hidden))))
        return self.classifier(hidden)


REAL = {
    "policy_none": lambda m: MaskedAdamW(m.named_parameters(), lr=0.05, eps=1e-2),
    "child_tuning_f": lambda m: ChildTuningAdamW(m.named_parameters(), lr=0.05, eps=1e-2, variant="F"),
    "second_order": lambda m: SecondOrderAdamW(
        m.named_parameters(), lr=0.05, eps=1e-2, density=0.25, observe_steps=2
    ),
}


def train_real(name, share, layout=None):
    """Weights and masks after steps with gradients from a backward pass over this process's data."""
    torch.manual_seed(0)
    model = Real()
    if layout is not None:
        layout(model)
    optimizer = REAL[name](model)
    generator = torch.Generator().manual_seed(5)
    for _ in range(5):
        tokens = torch.randint(0, 7, (12,), generator=generator)
        labels = torch.randint(0, 3, (12,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(share(tokens)), share(labels)).backward()
        optimizer.step()
    named = dict(model.named_parameters())
    whole = {n: p.detach().full_tensor() if isinstance(p, DTensor) else p.detach() for n, p in named.items()}
    masks = {n: optimizer.mask(p) for n, p in named.items()}
    masks = {n: mask.full_tensor() if isinstance(mask, DTensor) else mask for n, mask in masks.items()}
    return {"weights": whole, "masks": masks}


def real_fsdp(ranks):
    def layout(model):
        fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))

    return layout


def real_fsdp_and_tensor_parallel(model):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    parallelize_module(model, mesh["tensor"], plan, src_data_rank=None)
    fully_shard(model, mesh=mesh["data"])


# other ways of FSDP2; the first as it is by default
ENGINES = {
    "resharded": {},
    "kept": {"reshard_after_forward": False},
    "offloaded": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    "accumulated": {},
    "bfloat16": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
}
REAL_AND_TORCHS = REAL | {
    "torch": lambda m: torch.optim.AdamW(m.named_parameters(), lr=0.05, eps=1e-2, foreach=False),
    "policy_none": lambda m: MaskedAdamW(m.named_parameters(), lr=0.05, eps=1e-2, backend="reference"),
}


def engine(how, name, rank):
    """What this process holds of weights and masks after some steps, and whether what is frozen moved."""
    torch.manual_seed(0)
    model = Real()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)), **ENGINES[how])
    before = [local(p).clone() for p in model.parameters()]
    optimizer = REAL_AND_TORCHS[name](model)
    generator = torch.Generator().manual_seed(5 + rank)
    for _ in range(5):
        optimizer.zero_grad()
        tokens = torch.randint(0, 7, (12,), generator=generator)
        labels = torch.randint(0, 3, (12,), generator=generator)
        for micro in range(2 if how == "accumulated" else 1):
            model.set_requires_gradient_sync(how != "accumulated" or micro == 1)
            nn.functional.cross_entropy(model(tokens).float(), labels).backward()
        optimizer.step()
    weights = [local(p) for p in model.parameters()]
    masks = [local(optimizer.mask(p)) for p in model.parameters()] if name != "torch" else []
    moved = [
        not torch.equal(p[~mask], old[~mask]) for p, mask, old in zip(weights, masks, before, strict=False)
    ]
    return {
        "weights": joined(weights).tolist(),
        "masks": joined(masks).tolist() if masks else [],
        "moved": any(moved),
    }


AGAIN = {"policy": TopK(0.2, schedule=again), "lr": 0.05, "eps": 1e-2}
RELEASED = {
    "squares": AGAIN,
    "signed": AGAIN | {"policy": TopK(0.2, SignedGradient(), schedule=again)},
    "clipped": AGAIN | {"max_grad_norm": 0.05},
    "kept as a flag": AGAIN,
    "accumulated": AGAIN,
    "reduced once": AGAIN,
    "clipped by torch": AGAIN,
    "scaled": AGAIN,
    "saved and loaded": AGAIN,
}


def train_released(how, rank, release, folder):
    """Weights after each step, and the bytes of all gradients before it."""
    torch.manual_seed(0)
    model = Real()
    for layer in (model.up, model.down, model):
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    optimizer = MaskedAdamW(model.named_parameters(), release_gradients=release, **RELEASED[how])
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=how == "scaled")
    optimizer.attach_scaler(scaler)
    generator = torch.Generator().manual_seed(5 + rank)
    rows = []
    for number in range(9):
        if how == "saved and loaded" and number in (1, 3, 5):
            state = get_optimizer_state_dict(model, optimizer)
            distributed.checkpoint.save(state, checkpoint_id=f"{folder}/{release}_{number}")
            optimizer = MaskedAdamW(model.named_parameters(), release_gradients=release, **RELEASED[how])
            model.zero_grad()
            state = get_optimizer_state_dict(model, optimizer)
            distributed.checkpoint.load(state, checkpoint_id=f"{folder}/{release}_{number}")
            set_optimizer_state_dict(model, optimizer, state)
        optimizer.zero_grad(set_to_none=how != "kept as a flag")
        for micro in range(3 if how in ("accumulated", "reduced once") else 1):
            model.set_requires_gradient_sync(how != "reduced once" or micro == 2)
            tokens = torch.randint(0, 7, (12,), generator=generator)
            labels = torch.randint(0, 3, (12,), generator=generator)
            loss = nn.functional.cross_entropy(model(tokens), labels)
            if how == "scaled" and rank == 1 and number in (1, 6):
                loss = loss * float("inf")
            scaler.scale(loss).backward()
        held = 0
        for p in model.parameters():
            released = released_of(p.grad)
            held += local(p).nbytes if released is None else 0 * released.numel()
        if how == "clipped by torch":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "nothing was selected")
            scaler.step(optimizer)
        scaler.update()
        rows.append([joined(map(local, model.parameters())).tolist(), held])
    return [*rows, scaler.get_scale()]


def compare_real(rank, expected, layout, shares):
    """The largest distance from one process's weights, and whether masks are equal."""
    found = {}
    for name in REAL:
        seen = train_real(name, lambda data: data.chunk(shares[0])[shares[1]], layout)
        whole = expected[name]
        far = [float((seen["weights"][n] - whole["weights"][n]).abs().max()) for n in whole["weights"]]
        equal = all(torch.equal(seen["masks"][n], whole["masks"][n]) for n in whole["masks"])
        found[name] = [max(far), equal]
    return found


# processes


def attempt(call, *arguments):
    try:
        return call(*arguments)
    except Exception:
        return ["raised " + traceback.format_exc()]


def work(rank, world, folder, every_case):
    """What one process does."""
    warnings.simplefilter("error")
    # some gathers are slower than they might be, and torch says so
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet_{world}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    try:
        expected = torch.load(f"{folder}/whole.pt", weights_only=True)
        seen = {}
        for name, (ranks, layout, cases) in LAYOUTS.items():
            if ranks == world:
                seen[name] = {
                    case: attempt(train_sharded, EVERY_CASE[case], layout, expected[case])
                    for case in cases_of(name, cases, every_case)
                }
        for name, (ranks, cases) in COPIES.items():
            if ranks == world:
                seen[name] = {
                    case: attempt(train_copies, EVERY_CASE[case], rank, world, expected[case])
                    for case in cases_of(name, cases, every_case)
                }
        real = expected["real"]
        if world == 2:
            seen["refused"] = {name: text_of(call) for name, call in REFUSALS.items()}
            seen["saved"] = attempt(saved_before_any_step)
            seen["swapped"] = attempt(swapped_in, rank, folder)
            seen["skipped"] = {
                name: attempt(functools.partial(skipped_steps, **options), rank)
                for name, options in SCALED.items()
            }
            seen["engines"] = {
                f"{how} {name}": attempt(engine, how, name, rank)
                for how in ENGINES
                for name in REAL_AND_TORCHS
            }
            seen["released"] = {
                how: [attempt(train_released, how, rank, release, folder) for release in (False, True)]
                for how in RELEASED
            }
            seen["otherwise"] = attempt(gradients_placed_otherwise, rank)
        if world < 4:
            seen["real"] = attempt(compare_real, rank, real, real_fsdp(world), (world, rank))
        else:
            seen["refused"] = {"last_dims": text_of(refuse_last_dims)}
            seen["real"] = attempt(compare_real, rank, real, real_fsdp_and_tensor_parallel, (2, rank // 2))
            seen["halves"] = {
                name: attempt(train_sharded, HALVES[name], half, expected[name])
                for name in (f"half_{rank // 2}_top_k", f"half_{rank // 2}_clipped")
            }
        with open(f"{folder}/rank_{world}_{rank}.json", "w") as file:
            json.dump(seen, file)
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def whole():
    """What one process saw of every case."""
    return {name: train_whole(case) for name, case in EVERY_CASE.items()}


@pytest.fixture(scope="module")
def seen_by(whole, tmp_path_factory, request):
    """What each of some processes saw, by how many there are."""
    every_case = request.config.getoption("--every-case")
    folder = tmp_path_factory.mktemp("sharded")
    real = {name: train_real(name, lambda data: data) for name in REAL}
    torch.save({**whole, "real": real}, folder / "whole.pt")
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)

    @functools.cache
    def run(world):
        try:
            torch.multiprocessing.start_processes(
                work, args=(world, str(folder), every_case), nprocs=world, start_method="forkserver"
            )
        except Exception as error:
            return error
        return [json.loads((folder / f"rank_{world}_{rank}.json").read_text()) for rank in range(world)]

    def seen(world):
        found = run(world)
        if isinstance(found, Exception):
            raise found
        return found

    return seen


def pairs(layouts):
    """Layouts and cases, of which those for EVERY_METHOD run only with --every-case."""
    found = []
    for layout, (*_, cases) in layouts.items():
        for case in cases_of(layout, cases, every_case=True):
            marks = [] if case in cases else [pytest.mark.one_in(0)]
            found.append(pytest.param(layout, case, marks=marks))
    return found


@pytest.mark.parametrize(("layout", "case"), pairs(COPIES))
def test_copies_hold_the_masks_and_weights_of_one_process_that_has_the_whole_gradient(seen_by, layout, case):
    for seen in seen_by(COPIES[layout][0]):
        problems = seen[layout][case]
        assert not problems, "\n".join(problems[:12])


@pytest.mark.parametrize(("layout", "case"), pairs(LAYOUTS))
def test_shards_hold_the_masks_weights_density_and_clock_of_one_process_at_every_step(seen_by, layout, case):
    """Weights to the bit, but for those of `clipped` cases, whose norm is summed in another order."""
    for seen in seen_by(LAYOUTS[layout][0]):
        problems = seen[layout][case]
        assert not problems, "\n".join(problems[:12])


@pytest.mark.parametrize("case", EVERY_CASE)
def test_every_case_trains_some_entries_and_leaves_others(whole, case):
    """The test above has something to compare."""
    rows = whole[case]
    densities = [row["density"] for row in rows]
    assert any(densities)
    policy = EVERY_CASE[case].build(built(EVERY_CASE[case])).policy
    if policy is not None and not policy.trains_everything:
        assert any(0 < density < 1 for density in densities)
    first, last = (rows[number]["weights"] for number in (0, -1))
    assert not torch.equal(first, last)
    warned = [text for row in rows for text in row["warnings"]]
    assert [("non-finite" in text, "nothing was selected" in text) for text in warned] == {
        "not_a_number": [(True, False)],
        "idle_group": [(False, True)],
    }.get(case, [])


@pytest.mark.parametrize("case", ["child_tuning_d", "all_equal", "second_order"])
def test_the_last_selected_entry_has_equals_that_are_not_selected(whole, case):
    """So that cases above do cut ties, and in the order of names and of indices in the whole tensor."""
    observing = {"child_tuning_d": 2, "all_equal": 2, "second_order": 3}[case]
    density = {"second_order": 0.1}.get(case, 0.3)
    model = Net()
    steps = [gradients(model, number, EVERY_CASE[case]) for number in range(observing)]
    names = [name for name, _ in model.named_parameters() if name in steps[0]]
    flat = [torch.cat([step[name].flatten() for name in names]).double() for step in steps]
    score = sum(flat).abs() if case == "second_order" else sum(grad.square() for grad in flat)
    best = score.sort(descending=True, stable=True).indices[: math.floor(density * len(score))]
    wanted = torch.zeros(len(score), dtype=torch.bool)
    wanted[best] = True
    masks = apart(whole[case][observing]["masks"], model)
    assert torch.equal(torch.cat([masks[name].flatten() for name in names]), wanted)
    assert (score[~wanted] == score[best[-1]]).any()


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", REAL)
def test_training_with_backward_passes_follows_one_process(seen_by, world, name):
    """Gradients are summed in another order there, and nothing else differs."""
    for seen in seen_by(world):
        far, equal = seen["real"][name]
        assert far < 2e-6
        assert equal


@pytest.mark.parametrize("name", sorted(HALVES))
def test_parameters_on_a_part_of_the_processes_are_a_world_of_their_own(seen_by, name):
    """As the stages of a pipeline are, each with an optimizer."""
    both = [seen["halves"][name] for seen in seen_by(4) if name in seen["halves"]]
    assert len(both) == 2
    for problems in both:
        assert not problems, "\n".join(problems[:12])


@pytest.mark.parametrize("how", SCALED)
def test_a_step_that_is_infinite_on_one_process_is_skipped_on_all(seen_by, how):
    for seen in seen_by(2):
        # all entries, the same again, and the half that was selected
        assert seen["skipped"][how] == [[15, 1, True], [15, 1, False], [7, 2, True]]


def test_shards_may_take_the_place_of_whole_parameters_before_the_first_step(seen_by):
    for seen in seen_by(2):
        assert seen["swapped"] == []


def test_gradients_that_are_placed_otherwise_count_like_those_placed_as_their_parameter(seen_by):
    for seen in seen_by(2):
        assert len(seen["otherwise"]) == 5
        assert all(seen["otherwise"].values()), seen["otherwise"]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("release_gradients", "release_gradients=True needs gradients that are spread as their parameters"),
        ("set_count", "count"),
        ("random_scores", "RandomScore"),
        ("magnitudes", "Magnitude"),
        ("clipped_squares", "clip_norm"),
        ("clipped_squares_of_dps", "clip_norm"),
    ],
)
def test_what_does_not_work_on_shards_is_refused_in_one_sentence_with_a_remedy(seen_by, name, part):
    for seen in seen_by(2):
        check_refusal(seen["refused"][name], part)


def test_shards_that_are_no_regular_part_of_the_whole_tensor_are_refused(seen_by):
    for seen in seen_by(4):
        check_refusal(seen["refused"]["last_dims"], "weight")


def check_refusal(text, part):
    kind, _, sentence = text.partition(": ")
    assert kind in ("RuntimeError", "NotImplementedError", "ValueError"), text
    assert part in sentence
    # value, need and remedy in one sentence
    assert ", got " in sentence and "; " in sentence and sentence.endswith(".") and ". " not in sentence


def test_an_optimizer_of_shards_without_state_is_saved_and_loaded(seen_by):
    for seen in seen_by(2):
        assert seen["saved"] == 1


@pytest.mark.parametrize("how", ENGINES)
def test_fsdp_may_reshard_offload_accumulate_and_compute_in_bfloat16(seen_by, how):
    for seen in seen_by(2):
        engines = seen["engines"]
        assert engines[f"{how} policy_none"]["weights"] == engines[f"{how} torch"]["weights"]
        for name in REAL:
            found = engines[f"{how} {name}"]
            assert any(found["masks"])
            if how in ("kept", "offloaded"):
                assert found == engines[f"resharded {name}"]
            if name == "second_order":
                assert not found["moved"] and not all(found["masks"])
            assert (found["weights"] == engines[f"resharded {name}"]["weights"]) == (
                how in ("resharded", "kept", "offloaded")
            )


@pytest.mark.parametrize("how", RELEASED)
def test_released_gradients_of_shards_train_as_whole_ones_do(seen_by, how):
    for seen in seen_by(2):
        whole, released = seen["released"][how]
        assert [weights for weights, _ in released[:-1]] == [weights for weights, _ in whole[:-1]]
        assert released[-1] == whole[-1]
        assert len({str(weights) for weights, _ in released[:-1]}) > 3
        # steps that train keep the selected entries alone
        assert all(held for _, held in whole[:-1])
        assert 0 in [held for _, held in released[:-1]]
