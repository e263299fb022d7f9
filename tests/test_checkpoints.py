"""What torch.distributed.checkpoint saves is loaded into any number of processes, in every phase, to the bit.

Two processes train shards and save after some steps. One process without torch.distributed, three, and four
load that and train on with the gradients that one process with whole tensors had all the time.
"""

import copy
import functools
import json
import logging
import multiprocessing
import re
import warnings
from datetime import timedelta

import pytest
import torch
from test_sharded import (
    METHODS,
    OTHERS,
    PRELOADED,
    Net,
    apart,
    as_placed,
    attempt,
    built,
    clock,
    fsdp,
    fsdp_and_tensor_parallel,
    local,
    places,
    same,
    steps_of,
    train_whole,
)
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from sparse_optim import Bernoulli, DPSAdamW, GradDropAdamW, MaskedAdamW, Schedule, SecondOrderAdamW, TopK
from sparse_optim.scores import Magnitude, RandomScore

pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]


class Smaller(Net):
    """Fewer tensors of each kind: each takes its time."""

    def __init__(self):
        super().__init__()
        del self.layer[1], self.norm, self.filters


SOME_OTHERS = ("top_k_again", "top_k_explicit", "bfloat16_masters", "bfloat16_statistic", "bfloat16_dps")
CASES = METHODS | {name: OTHERS[name] for name in (*SOME_OTHERS, "bfloat16_dense", "not_a_number")}
CASES = {name: case._replace(model=Smaller) for name, case in CASES.items()}
# steps after which is saved: the first, the last before a selection or the first after it, and late enough
# for state of an earlier selection, a later observation and a parameter that came late
SAVED = (1, 4)
ALSO_SAVED = (0, 5)  # with --every-case
# where they are slowest, without --every-case
ON_FOUR = ("child_tuning_f", "child_tuning_d_groups", "top_k_again", "bfloat16_masters", "not_a_number")
TOPOLOGIES = {
    "one process without torch.distributed": 1,
    "FSDP over three": 3,
    "FSDP and tensor parallel over four": 4,
}
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def layout_of(world):
    if world == 4:
        return fsdp_and_tensor_parallel
    return lambda model: fsdp(model, init_device_mesh("cpu", (world,))) if world > 1 else None


def placed(model):
    """Whole gradients as a process holds them."""
    where = {name: places(p) for name, p in model.named_parameters()}

    def place(name, p, grad):
        return as_placed(p, grad.flatten()[where[name]]) if isinstance(p, DTensor) else grad

    return where, place


def made(case, world, *, fresh=False):
    model = built(case)
    if fresh:
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(7)
    layout_of(world)(model)
    return model, case.build(model)


def save(folder, model, optimizer, options=None):
    weights, state = get_state_dict(model, optimizer, options=options)
    checkpoint.save({"model": weights, "optimizer": state}, checkpoint_id=folder)


def load(folder, model, optimizer, options=None):
    weights, state = get_state_dict(model, optimizer, options=options)
    whole = {"model": weights, "optimizer": state}
    checkpoint.load(whole, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=weights, optim_state_dict=whole["optimizer"], options=options
    )


def train_on(case, model, optimizer, first, expected):
    """Wherever a loaded optimizer differs from one that has trained all the time in one process."""
    where, place = placed(model)
    problems = []
    wanted = {key: apart(expected[first - 1][key], model) for key in ("masks", "weights")}
    for name, p in model.named_parameters():
        if not same(local(p), wanted["weights"][name].flatten()[where[name]], case.exact):
            problems.append(f"{name} is not what was saved")
        if not same(local(optimizer.mask(p)), wanted["masks"][name].flatten()[where[name]], True):
            problems.append(f"the last mask of {name} is not what was saved")
    for number, caught in enumerate(steps_of(case, model, optimizer, place, first), first):
        row = expected[number]
        if caught != row["warnings"]:
            problems.append(f"step {number}: warned of {caught}, not {row['warnings']}")
        if clock(optimizer) != row["clock"]:
            problems.append(f"step {number}: clock {clock(optimizer)}, not {row['clock']}")
    wanted = {key: apart(row[key], model) for key in ("masks", "weights")}
    for name, p in model.named_parameters():
        for key, seen in {"masks": optimizer.mask(p), "weights": p}.items():
            if not same(local(seen), wanted[key][name].flatten()[where[name]], case.exact):
                problems.append(f"at the end: {key} of {name}")
    return problems


@torch.no_grad()
def save_all(case, folder, every_case):
    model, optimizer = made(case, 2)
    _, place = placed(model)
    for number, _ in enumerate(steps_of(case, model, optimizer, place)):
        if number in SAVED or (every_case and number in ALSO_SAVED):
            save(f"{folder}/{number}", model, optimizer)
    return []


@torch.no_grad()
def load_all(case, world, folder, expected, every_case):
    problems = {}
    for number in SAVED + (ALSO_SAVED if every_case else ()):
        model, optimizer = made(case, world, fresh=True)
        load(f"{folder}/{number}", model, optimizer)
        problems[f"saved after step {number}"] = train_on(case, model, optimizer, number + 1, expected)
    return [f"{when}, {text}" for when, texts in problems.items() for text in texts]


# other ways of saving and of loading

WAYS = ("child_tuning_d", "top_k_again", "bfloat16_dps", "grad_drop_entry")
FEW_WAYS = ("top_k_again", "grad_drop_entry")


def trained(case, world, steps):
    model, optimizer = made(case, world)
    _, place = placed(model)
    for number, _ in enumerate(steps_of(case, model, optimizer, place)):
        if number + 1 == steps:
            break
    return model, optimizer


def names_of(model, optimizer):
    names = {p: name for name, p in model.named_parameters()}
    return [names[p] for group in optimizer.param_groups for p in group["params"]]


@torch.no_grad()
def ways(rank, world, folder, expected, every_case):
    """What two processes find when they save and load in other ways than the plainest."""
    found = {}
    for name in WAYS if every_case else FEW_WAYS:
        case, rows = CASES[name], expected[name]
        for steps in (1, 5):
            found |= attempt_ways(f"{name} after {steps}", rank, world, folder, case, rows, steps)
    return found


def attempt_ways(name, rank, world, folder, case, rows, steps):
    found = {}
    model, optimizer = trained(case, world, steps)
    weights = {n: local(p).clone() for n, p in model.named_parameters()}

    def fresh():
        other, another = made(case, world, fresh=True)
        for n, p in other.named_parameters():
            local(p).copy_(weights[n])
        return other, another

    # whole tensors, which one process has and the others are sent
    # of plain tensors in it there is no copy, as torch has it
    full = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=FULL))
    if rank == 0:
        torch.save(full, f"{folder}/{name}.full.pt")
    for options, brought in (
        (StateDictOptions(full_state_dict=True, broadcast_from_rank0=True), {} if rank else full),
        (StateDictOptions(full_state_dict=True), None),
    ):
        torch.distributed.barrier()
        if brought is None:
            brought = torch.load(f"{folder}/{name}.full.pt", weights_only=True)
        other, another = fresh()
        set_optimizer_state_dict(other, another, brought, options=options)
        how = "sent by one" if options.broadcast_from_rank0 else "whole"
        found[f"{name}, {how}"] = train_on(case, other, another, steps, rows)
    # one level of names
    save(f"{folder}/{name}.flat", model, optimizer, FLAT)
    other, another = fresh()
    load(f"{folder}/{name}.flat", other, another, FLAT)
    found[f"{name}, flat"] = train_on(case, other, another, steps, rows)
    # into one that has trained something else
    save(f"{folder}/{name}.plain", model, optimizer)
    other, another = trained(case, world, 3)
    load(f"{folder}/{name}.plain", other, another)
    found[f"{name}, into one that trained"] = train_on(case, other, another, steps, rows)
    # while training goes on; the copies are whole before it does
    writing = torch.distributed.new_group(backend="gloo")
    weights_now, state = get_state_dict(model, optimizer)
    whole = {"model": weights_now, "optimizer": state}
    pending = checkpoint.async_save(whole, checkpoint_id=f"{folder}/{name}.later", process_group=writing)
    found[f"{name}, trained on while saving"] = train_on(case, model, optimizer, steps, rows)
    pending.result()
    other, another = made(case, world, fresh=True)
    load(f"{folder}/{name}.later", other, another)
    found[f"{name}, saved while training"] = train_on(case, other, another, steps, rows)
    # what one process with whole tensors saved by torch.save
    other, another = made(case, world, fresh=True)
    whole = torch.load(f"{folder}/{name}.pt", weights_only=True)
    for n, p in other.named_parameters():
        local(p).copy_(whole["model"][n].flatten()[places(p)])
    another.load_state_dict(whole["optimizer"])
    found[f"{name}, of one process"] = train_on(case, other, another, steps, rows)
    return found


def work(rank, world, folder, every_case):
    """What one process does."""
    warnings.simplefilter("error")
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
        if world == 2:
            seen = {
                name: attempt(save_all, case, f"{folder}/{name}", every_case) for name, case in CASES.items()
            }
            seen["ways"] = attempt(ways, rank, world, folder, expected, every_case)
        else:
            seen = {
                name: attempt(load_all, case, world, f"{folder}/{name}", expected[name], every_case)
                for name, case in CASES.items()
                if world < 4 or every_case or name in ON_FOUR
            }
        with open(f"{folder}/rank_{world}_{rank}.json", "w") as file:
            json.dump(seen, file)
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def expected():
    return {name: train_whole(case) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def seen_by(expected, tmp_path_factory, request):
    """What each of some processes saw, by how many there are; two have saved before others load."""
    every_case = request.config.getoption("--every-case")
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.save(expected, folder / "whole.pt")
    for name in WAYS:
        for steps in (1, 5):
            model, optimizer = trained(CASES[name], 1, steps)
            whole = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(whole, folder / f"{name} after {steps}.pt")
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)

    @functools.cache
    def run(world):
        if world != 2:
            run(2)
        if world == 1:
            return [
                {
                    name: attempt(load_all, case, 1, str(folder / name), expected[name], every_case)
                    for name, case in CASES.items()
                }
            ]
        torch.multiprocessing.start_processes(
            work, args=(world, str(folder), every_case), nprocs=world, start_method="forkserver"
        )
        return [json.loads((folder / f"rank_{world}_{rank}.json").read_text()) for rank in range(world)]

    return run


@pytest.mark.parametrize(
    ("case", "topology"),
    [
        pytest.param(
            case, topology, marks=[pytest.mark.one_in(0)] if world == 4 and case not in ON_FOUR else []
        )
        for case in CASES
        for topology, world in TOPOLOGIES.items()
    ],
)
def test_what_two_processes_saved_is_trained_on_by_others_to_the_bit(seen_by, case, topology):
    for seen in (*seen_by(2), *seen_by(TOPOLOGIES[topology])):
        assert not seen[case], "\n".join(seen[case][:12])


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if case in FEW_WAYS else [pytest.mark.one_in(0)]) for case in WAYS],
)
def test_whole_flat_asynchronous_and_one_process_checkpoints_are_loaded_to_the_bit(seen_by, case):
    for seen in seen_by(2):
        assert isinstance(seen["ways"], dict), seen["ways"]
        own = {how: problems for how, problems in seen["ways"].items() if how.startswith(case + " ")}
        assert len(own) == 14
        wrong = {how: problems[:12] for how, problems in own.items() if problems}
        assert not wrong, json.dumps(wrong, indent=1)


# in one process


def on(**options):
    return lambda model: MaskedAdamW(model.named_parameters(), lr=0.02, **options)


AGAIN = Schedule(observe=2, train=2)
ALONE = {
    "mix": lambda model: DPSAdamW(
        model.named_parameters(), lr=0.02, variant="mix", density=0.6, update_steps=2
    ),
    "magnitudes": on(policy=TopK(0.3, Magnitude(), schedule=AGAIN)),
    "random": on(policy=TopK(0.3, RandomScore(), schedule=AGAIN)),
    "host": on(policy=TopK(0.3, schedule=AGAIN), statistic_device="cpu"),
    "released": on(policy=TopK(0.3, schedule=AGAIN), release_gradients=True),
    "released_bfloat16": on(
        policy=TopK(0.3, schedule=AGAIN), release_gradients=True, statistic_dtype=torch.bfloat16
    ),
    "drawn_layers": lambda model: GradDropAdamW(
        model.named_parameters(), lr=0.02, keep=0.5, granularity="layer"
    ),
    "amsgrad": on(policy=TopK(0.3, schedule=AGAIN), amsgrad=True),
    "moments_in_bfloat16": on(policy=Bernoulli(0.4), state_dtype=torch.bfloat16),
    "dense_beside": lambda model: MaskedAdamW(
        [
            {"params": [("up.weight", model.up.weight), ("up.bias", model.up.bias)]},
            {"params": [("down.weight", model.down.weight)], "masked": False},
            # never has a gradient
            {"params": [("down.bias", model.down.bias)]},
        ],
        lr=0.02,
        policy=TopK(0.3, schedule=AGAIN),
    ),
    "curvature": lambda model: SecondOrderAdamW(
        model.named_parameters(), lr=0.02, density=0.3, observe_steps=3, curvature="hutchinson"
    ),
}


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, hidden):
        return self.down(torch.tanh(self.up(hidden)))


def alone(name, dtype=torch.float32):
    torch.manual_seed(0)
    model = Two().to(dtype)
    return model, ALONE[name](model)


def step(name, model, optimizer, number):
    optimizer.zero_grad()
    if name == "mix":
        optimizer.set_count("up.weight", torch.arange(5.0) + 1)
    generator = torch.Generator().manual_seed(number)
    hidden = torch.randn(4, 5, generator=generator).to(model.up.weight.dtype)
    loss = model(hidden).square().sum()
    if name == "curvature" and optimizer.param_groups[0]["phase"] % 2 == 0:
        optimizer.observe_curvature(loss)
    loss.backward()
    if name == "dense_beside":
        model.down.bias.grad = None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "nothing was selected")
        optimizer.step()


def everything(optimizer):
    """All that an optimizer holds, comparable."""
    states = [
        {
            k: (v.dtype, v.tolist()) if isinstance(v, torch.Tensor) else v
            for k, v in optimizer.state[p].items()
        }
        for group in optimizer.param_groups
        for p in group["params"]
        if optimizer.state.get(p)
    ]
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return states, groups


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ALONE)
def test_one_process_loads_what_it_saved_after_any_step_to_the_bit(name, dtype, flat, tmp_path):
    options = FLAT if flat else None
    for first in range(8):
        model, optimizer = alone(name, dtype)
        optimizer.dense_state_dict = True
        for number in range(first):
            step(name, model, optimizer, number)
        save(tmp_path / str(first), model, optimizer, options)
        other, another = alone(name, dtype)
        with torch.no_grad():
            for p in other.parameters():
                p.fill_(7)
        load(tmp_path / str(first), other, another, options)
        if first and name not in ("mix", "dense_beside"):  # counts get their parameter's shape
            assert everything(another) == everything(optimizer)
        for number in range(first, 9):
            for one in ((model, optimizer), (other, another)):
                step(name, *one, number)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert same(p.detach(), q.detach(), True)


def test_every_phase_saves_the_same_tensors():
    for name in ALONE:
        model, optimizer = alone(name)
        optimizer.dense_state_dict = True
        forms = []
        for number in range(8):
            forms.append(
                {
                    (i, key): (value.dtype, value.shape) if isinstance(value, torch.Tensor) else type(value)
                    for i, state in optimizer.state_dict()["state"].items()
                    for key, value in state.items()
                }
            )
            step(name, model, optimizer, number)
        assert {i for i, _ in forms[0]} == {0, 1, 2, 3}
        assert all(form == forms[0] for form in forms), name


def test_looking_at_the_state_before_training_changes_nothing():
    runs = []
    for looks in (False, True):
        model, optimizer = alone("released")
        if looks:
            get_state_dict(model, optimizer)
            get_optimizer_state_dict(model, optimizer, options=FLAT)
        for number in range(6):
            step("released", model, optimizer, number)
        runs.append((everything(optimizer), [p.tolist() for p in model.parameters()]))
    assert runs[0] == runs[1]


def test_compact_state_becomes_dense_and_dense_state_compact():
    model, optimizer = alone("amsgrad")
    for number in range(4):
        step("amsgrad", model, optimizer, number)
    compact = copy.deepcopy(optimizer.state_dict())
    optimizer.dense_state_dict = True
    dense = copy.deepcopy(optimizer.state_dict())
    assert "indices" in compact["state"][0] and "mask" in dense["state"][0]
    assert dense["state"][0]["mask"].bool().equal(optimizer.mask(model.up.weight))
    for saved in (compact, dense):
        another = alone("amsgrad")[1]
        another.load_state_dict(saved)
        assert everything(another) == everything(optimizer)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mask": torch.zeros(7, 5)}, "bytes of shape (7, 5) as mask, got torch.float32"),
        ({"mask": torch.zeros(5, 7, dtype=torch.uint8)}, "bytes of shape (7, 5) as mask"),
        ({"mask": 3}, "a tensor as mask, got int"),
        ({"parts": "all"}, "an integer below 128 as parts, got all"),
        ({"parts": 1 << 40}, "an integer below 128 as parts"),
        ({"parts": -1}, "an integer below 128 as parts"),
        ({"parts": 7}, "what parts=7 names"),
        ({"parts": 0}, "the moments of its steps, got parts=0"),
        ({"count": None}, "a tensor as count, got NoneType"),
        ({"parts": None}, "mask and parts together"),
        ({"statistic": torch.zeros(3)}, "statistic of shape (7, 5), got (3,)"),
        ({"count": torch.zeros(3, 3, 3)}, "count of shape (7, 5)"),
    ],
)
def test_dense_state_that_fits_nothing_is_refused_before_anything_is_loaded(change, words):
    model, optimizer = alone("mix")
    optimizer.dense_state_dict = True
    for number in range(3):
        step("mix", model, optimizer, number)
    saved = optimizer.state_dict()
    broken = {**saved, "state": {**saved["state"], 0: saved["state"][0] | change}}
    if change.get("parts", 0) is None:
        del broken["state"][0]["parts"]
    before = everything(optimizer)
    with pytest.raises(ValueError, match=re.escape(words)):
        optimizer.load_state_dict(broken)
    assert everything(optimizer) == before


def test_a_flat_checkpoint_is_refused_by_an_optimizer_that_has_selected(tmp_path):
    model, optimizer = alone("amsgrad")
    optimizer.dense_state_dict = True
    for number in range(3):
        step("amsgrad", model, optimizer, number)
    save(tmp_path, model, optimizer, FLAT)
    with pytest.raises(ValueError, match=r"a flat checkpoint must be .*; construct a new one, or leave out"):
        load(tmp_path, model, optimizer, FLAT)


def test_counts_that_an_optimizer_holds_are_loaded_over(tmp_path):
    runs = []
    for _ in range(2):
        model, optimizer = alone("mix")
        optimizer.dense_state_dict = True
        for number in range(3):
            step("mix", model, optimizer, number + 5 * len(runs))
        runs.append((model, optimizer))
    save(tmp_path, *runs[0])
    load(tmp_path, *runs[1])
    for number in range(3, 8):
        for run in runs:
            step("mix", *run, number)
    weights = [[p.tolist() for p in model.parameters()] for model, _ in runs]
    assert weights[0] == weights[1]


def test_amsgrad_that_only_the_checkpoint_has_is_refused(tmp_path):
    model = Two()
    optimizer = MaskedAdamW(model.named_parameters(), amsgrad=True)
    for number in range(3):
        step("", model, optimizer, number)
    save(tmp_path, model, optimizer)
    model = Two()
    optimizer = MaskedAdamW(model.named_parameters())
    with pytest.raises(ValueError, match=r"must have max_exp_avg_sq, .*; construct .* with amsgrad=True"):
        load(tmp_path, model, optimizer)


def test_another_masked_than_the_saved_one_is_refused(tmp_path):
    policy = TopK(0.3, schedule=AGAIN)

    def groups(model, masked):
        return [
            {"params": list(model.up.named_parameters("up"))},
            {"params": list(model.down.named_parameters("down")), "masked": masked},
        ]

    for saved, made in ((True, False), (False, True)):
        model = Two()
        optimizer = MaskedAdamW(groups(model, saved), policy=policy)
        optimizer.dense_state_dict = True
        for number in range(4):
            step("", model, optimizer, number)
        save(tmp_path / str(saved), model, optimizer)
        model = Two()
        optimizer = MaskedAdamW(groups(model, made), policy=policy)
        # the words are torch's where the checkpoint lacks what a masked parameter needs
        with pytest.raises((ValueError, checkpoint.api.CheckpointException), match=r"masked=|Missing key"):
            load(tmp_path / str(saved), model, optimizer)


def test_states_that_are_empty_and_those_of_others_are_let_be():
    model, optimizer = alone("amsgrad")
    optimizer.dense_state_dict = True
    for number in range(4):
        step("amsgrad", model, optimizer, number)
    optimizer.state["notes"] = {"a": 1}
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0] = {}
    model, optimizer = alone("amsgrad")
    optimizer.load_state_dict(saved)
    assert optimizer.state["notes"] == {"a": 1}
    assert not optimizer.state[model.up.weight] and optimizer.state[model.up.bias]


def test_a_look_at_an_untrained_optimizer_shows_no_masks():
    model = Two()
    optimizer = MaskedAdamW(model.named_parameters(), policy=Bernoulli(0.5))
    get_optimizer_state_dict(model, optimizer)
    model(torch.ones(2, 5)).square().sum().backward()
    model.up.bias.grad = None
    optimizer.step()
    assert not optimizer.mask(model.up.bias).any() and optimizer.mask(model.up.weight).any()
