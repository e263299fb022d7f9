"""State keeps its dtypes and its parameter: saved, swapped, wrapped, tied, and no larger than it says.

What a resumed run does afterwards is in test_promises.py.
"""

import copy
import io
import math
import pickle
import random
import weakref
import zlib

import pytest
import torch
from torch import nn

from sparse_optim import Bernoulli, ChildTuningAdamW, MaskedAdamW, Schedule, SignedGradient, TopK

MEANWHILE_EVERYTHING = TopK(
    0.5, SignedGradient(), schedule=Schedule(observe=2, train=2, meanwhile="everything")
)
# id: policy, unselected, how many steps, keys that the state of the first parameter then has
MOMENTS = {"step", "exp_avg", "exp_avg_sq"}
SITUATIONS = {
    "observing": (TopK(0.3, schedule=Schedule(observe=3)), "frozen", 2, {"step", "statistic", "nonfinite"}),
    "selected": (TopK(0.3, schedule=Schedule(observe=2)), "frozen", 2, {"step", "indices"}),
    "compact": (TopK(0.3, schedule=Schedule(observe=1)), "frozen", 3, {*MOMENTS, "indices", "master"}),
    "compact_with_ages": (
        TopK(0.3, schedule=Schedule(observe=1, train=2)), "frozen", 5, {*MOMENTS, "indices", "master", "age"}
    ),
    "bits": (TopK(0.3, schedule=Schedule(observe=1)), "zero_grad", 3, {*MOMENTS, "bits"}),
    "bits_while_observing": (MEANWHILE_EVERYTHING, "track", 5, {*MOMENTS, "bits", "statistic", "nonfinite"}),
    "seeded": (Bernoulli(0.3), "frozen", 3, {*MOMENTS, "key"}),
    "dense": (None, "frozen", 3, MOMENTS),
}  # fmt: skip
DTYPE_OF = {
    "step": torch.float32,
    "statistic": torch.float32,
    "nonfinite": torch.bool,
    "indices": torch.int32,
    "master": torch.float32,
    "age": torch.int32,
    "bits": torch.uint8,
}


def model(dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    # more than 256 entries: bfloat16 cannot hold their indices
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in (("encoder.weight", (30, 20)), ("encoder.bias", (30,)), ("head.weight", (5, 7)))
    }


def make(situation, params, **options):
    policy, unselected, *_ = SITUATIONS[situation]
    settings = {"lr": 0.01, "policy": policy, "unselected": unselected, "seed": 5, "amsgrad": False}
    return MaskedAdamW(params.items(), **{**settings, **options})


def train(optimizer, params, steps, start=0):
    for t in range(start, start + steps):
        for i, p in enumerate(params.values()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * t + i)).to(p.dtype)
        optimizer.step()
        optimizer.zero_grad()


def started(situation, dtype=torch.bfloat16, **options):
    params = model(dtype)
    optimizer = make(situation, params, **options)
    train(optimizer, params, SITUATIONS[situation][2])
    return params, optimizer


def same_state(left, right):
    """Equality of two state dicts, with every dtype."""
    assert left["param_groups"] == right["param_groups"]
    assert left["state"].keys() == right["state"].keys()
    for number, state in left["state"].items():
        assert state.keys() == right["state"][number].keys()
        for key, value in state.items():
            other = right["state"][number][key]
            assert type(value) is type(other), key
            if isinstance(value, torch.Tensor):
                assert value.dtype == other.dtype and torch.equal(value, other), key
            else:
                assert value == other, key
    return True


# --- dtypes survive every way of saving -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("situation", SITUATIONS)
def test_state_is_what_the_table_says(situation, dtype):
    params, optimizer = started(situation, dtype)
    state = optimizer.state[params["encoder.weight"]]
    low = dtype in (torch.bfloat16, torch.float16)
    assert set(state) == SITUATIONS[situation][3] - (set() if low else {"master"})
    for key, value in state.items():
        if key == "key":
            assert value == zlib.crc32(b"encoder.weight")
        elif key.startswith("exp_avg"):
            assert value.dtype == (torch.float32 if low and "indices" in state else dtype), key
            assert value.shape == (state["indices"].shape if "indices" in state else (30, 20))
        else:
            assert value.dtype == DTYPE_OF[key], key
    if "indices" in state:
        assert state["indices"].diff().gt(0).all() and 256 < state["indices"].max() < 600
    if "bits" in state:
        assert state["bits"].shape == (76,)  # 600 bits in whole 4-byte words


def plain(params, optimizer, fresh):
    loaded = fresh()
    loaded[1].load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return loaded


def weights_only(params, optimizer, fresh):
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    loaded = fresh()
    loaded[1].load_state_dict(state_dict=torch.load(buffer, weights_only=True))  # by keyword, as DCP calls it
    return loaded


def loaded_twice(params, optimizer, fresh):
    return plain(*plain(params, optimizer, fresh), fresh)


def pickled(params, optimizer, fresh):
    return pickle.loads(pickle.dumps((params, optimizer)))


def deepcopied(params, optimizer, fresh):
    return copy.deepcopy((params, optimizer))


def through_accelerate(params, optimizer, fresh):
    """accelerate saves, moves and loads the state whenever an optimizer is prepared."""
    accelerate = pytest.importorskip("accelerate")
    from accelerate.optimizer import AcceleratedOptimizer

    accelerate.Accelerator(cpu=True)
    wrapped = AcceleratedOptimizer(optimizer, device_placement=True)
    loaded = fresh()
    prepared = AcceleratedOptimizer(loaded[1], device_placement=True)
    prepared.load_state_dict(copy.deepcopy(wrapped.state_dict()))
    return loaded


WAYS = [plain, weights_only, loaded_twice, pickled, deepcopied, through_accelerate]


@pytest.mark.filterwarnings("ignore")  # accelerate's own imports are not ours to judge
@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain_adam", "amsgrad"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("situation", SITUATIONS)
def test_dtypes_and_values_survive(situation, way, amsgrad):
    params, optimizer = started(situation, amsgrad=amsgrad)

    def fresh():
        others = model(seed=1)
        with torch.no_grad():
            for name, p in others.items():
                p.copy_(params[name])
        return others, make(situation, others, seed=77, lr=0.9, amsgrad=amsgrad)

    before = copy.deepcopy(optimizer.state_dict())
    others, other = way(params, optimizer, fresh)
    assert other is not optimizer and others["encoder.weight"] is not params["encoder.weight"]
    assert same_state(before, other.state_dict()) and same_state(before, optimizer.state_dict())
    for name, p in params.items():
        assert torch.equal(optimizer.mask(p), other.mask(others[name]))
    train(other, others, 4, start=50)
    train(optimizer, params, 4, start=50)
    assert same_state(optimizer.state_dict(), other.state_dict())
    assert all(torch.equal(p, others[name]) for name, p in params.items())


def test_a_copy_trains_on_its_own():
    params, optimizer = started("compact")
    others, other = copy.deepcopy((params, optimizer))
    before = copy.deepcopy(optimizer.state_dict())
    train(other, others, 3, start=9)
    assert same_state(before, optimizer.state_dict())
    assert not torch.equal(params["encoder.weight"], others["encoder.weight"])


def test_how_the_arithmetic_runs_stays_as_constructed():
    _, optimizer = started("compact", foreach=False)
    others = model()
    other = make("compact", others, fused=False)
    other.load_state_dict(optimizer.state_dict())
    group = other.param_groups[0]
    assert (group["foreach"], group["fused"]) == (None, False)


# --- users' hooks -----------------------------------------------------------------------------------------


def kinds(state):
    """What a hook can see of a state: keys and dtypes, by position."""
    return [
        {k: v.dtype if isinstance(v, torch.Tensor) else type(v) for k, v in s.items()} for s in state.values()
    ]


@pytest.mark.parametrize("prepend", [False, True], ids=["append", "prepend"])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_hooks_see_whole_state_before_and_after(situation, prepend):
    _, optimizer = started(situation)
    whole = kinds(optimizer.state)
    others = model()
    other = make(situation, others)
    train(other, others, 1)
    own = kinds(other.state)
    saved = optimizer.state_dict()
    seen = []
    optimizer.register_state_dict_pre_hook(
        lambda o: seen.append(("save pre", kinds(o.state))), prepend=prepend
    )
    optimizer.register_state_dict_post_hook(
        lambda o, d: seen.append(("save post", kinds(d["state"]))), prepend=prepend
    )
    other.register_load_state_dict_pre_hook(
        lambda o, d: seen.append(("load pre", kinds(d["state"]), kinds(o.state))), prepend=prepend
    )
    other.register_load_state_dict_post_hook(
        lambda o: seen.append(("load post", kinds(o.state))), prepend=prepend
    )
    other.load_state_dict(optimizer.state_dict())
    assert seen == [("save pre", whole), ("save post", whole), ("load pre", whole, own), ("load post", whole)]
    assert same_state(saved, other.state_dict())


def test_what_a_hook_returns_is_what_is_loaded_and_saved():
    _, optimizer = started("compact")
    others = model()
    other = make("compact", others)

    def halve(_, state_dict):
        state_dict = copy.deepcopy(state_dict)
        for state in state_dict["state"].values():
            state["exp_avg"] = state["exp_avg"] / 2
        state_dict["param_groups"][0]["lr"] = 0.125
        return state_dict

    other.register_load_state_dict_pre_hook(halve)
    other.load_state_dict(optimizer.state_dict())
    first = next(iter(optimizer.state.values()))
    loaded = other.state[others["encoder.weight"]]
    assert torch.equal(loaded["exp_avg"], first["exp_avg"] / 2) and loaded["exp_avg"].dtype == torch.float32
    assert other.param_groups[0]["lr"] == 0.125

    optimizer.register_state_dict_post_hook(lambda o, d: {**d, "note": "kept"})
    assert optimizer.state_dict()["note"] == "kept"
    with pytest.raises(AttributeError):
        _ = other.note


# --- what groups hold -------------------------------------------------------------------------------------


@pytest.mark.parametrize("situation", SITUATIONS)
def test_groups_hold_numbers_booleans_and_strings_only(situation):
    _, optimizer = started(situation, max_grad_norm=1.0, stochastic_rounding=True, state_dtype=torch.float32)
    late = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [("late", late)], "masked": False})
    for group in [*optimizer.param_groups, *optimizer.state_dict()["param_groups"]]:
        for name, value in group.items():
            if name in ("params", "param_names"):
                continue
            parts = value if isinstance(value, tuple) else (value,)
            assert all(part is None or type(part) in (int, float, bool, str) for part in parts), name
    assert all(isinstance(key, nn.Parameter) for key in optimizer.state), "no key but parameters"
    assert all(v is not None for state in optimizer.state.values() for v in state.values())


# --- a swapped parameter object ---------------------------------------------------------------------------


def swap(optimizer, params, dtype=None):
    """Replace every parameter object in its group, as FSDP2 and accelerate do."""
    fresh = {name: nn.Parameter(p.detach().clone().to(dtype or p.dtype)) for name, p in params.items()}
    by_id = {id(p): fresh[name] for name, p in params.items()}
    for group in optimizer.param_groups:
        group["params"] = [by_id.get(id(p), p) for p in group["params"]]
    return fresh


@pytest.mark.parametrize("at", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_swapped_parameter_finds_its_state_and_mask(situation, at):
    """Before the first step, in the middle of observing, after a selection: as if nothing had happened."""
    (params, optimizer), (others, other) = ((p, make(situation, p)) for p in (model(), model()))
    train(optimizer, params, 7)
    train(other, others, at)
    masks = [other.mask(p) for p in others.values()]
    swapped = swap(other, others)
    for old, new, mask in zip(others.values(), swapped.values(), masks, strict=True):
        assert torch.equal(other.mask(new), mask)
        with pytest.raises(ValueError, match="param must be a parameter of this optimizer"):
            other.mask(old)
    assert set(other.state) <= set(swapped.values())
    other.state_dict()  # no orphan keys
    train(other, swapped, 7 - at, start=at)
    assert same_state(optimizer.state_dict(), other.state_dict())
    assert all(torch.equal(p, swapped[name]) for name, p in params.items())


@pytest.mark.parametrize("first_use", ["state_dict", "load_state_dict", "step", "mask"])
def test_whatever_comes_first_after_a_swap_finds_the_state(first_use):
    params, optimizer = started("compact")
    before = copy.deepcopy(optimizer.state_dict())
    swapped = swap(optimizer, params)
    if first_use == "load_state_dict":
        optimizer.load_state_dict(before)
    elif first_use == "step":
        twins, twin = started("compact")
        train(optimizer, swapped, 1, start=3)
        train(twin, twins, 1, start=3)
        before = twin.state_dict()
    elif first_use == "mask":
        assert optimizer.mask(swapped["encoder.weight"]).any()
    assert same_state(before, optimizer.state_dict())


def test_parameters_that_change_places_keep_their_own_state():
    """Only an object that is new takes over the state of the one that stood there."""
    a, b = nn.Parameter(torch.zeros(10)), nn.Parameter(torch.zeros(10))
    optimizer = MaskedAdamW([a, b], policy=TopK(0.2, scope="tensor", schedule=Schedule(observe=1)))
    for _ in range(2):
        a.grad, b.grad = torch.arange(10.0), torch.arange(10.0).flip(0)
        optimizer.step()
    optimizer.param_groups[0]["params"] = [b, a]
    assert optimizer.mask(a).nonzero().flatten().tolist() == [8, 9]
    assert optimizer.mask(b).nonzero().flatten().tolist() == [0, 1]


UPCASTS = [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.float64)]


@pytest.mark.parametrize(("low", "high"), UPCASTS, ids=lambda dtype: str(dtype))
@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("at", [0, 2, 4])
def test_a_swapped_parameter_may_have_a_higher_precision(situation, low, high, at):
    """FSDP2 and accelerate upcast; masks stay, and training goes on close to the run without the swap."""
    params, others = model(low), model(low)
    optimizer, other = make(situation, params), make(situation, others)
    train(optimizer, params, at)
    train(other, others, at)
    masks = [other.mask(p) for p in others.values()]
    swapped = swap(other, others, high)
    assert all(torch.equal(other.mask(p), mask) for p, mask in zip(swapped.values(), masks, strict=True))
    before = [p.detach().clone() for p in swapped.values()]
    for t in range(at, at + 3):
        for i, (p, q) in enumerate(zip(params.values(), swapped.values(), strict=True)):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * t + i)).to(low)
            q.grad = p.grad.to(high)
        optimizer.step()
        other.step()
        if SITUATIONS[situation][1] != "zero_grad":
            for name, q in swapped.items():
                assert torch.equal(other.mask(q), optimizer.mask(params[name]))
                assert not ((q != before[list(swapped).index(name)]) & ~other.mask(q)).any()
        before = [p.detach().clone() for p in swapped.values()]
    for name, p in params.items():
        torch.testing.assert_close(swapped[name], p.detach().to(high), rtol=0.02, atol=0.01)
    assert all(torch.isfinite(p).all() for p in swapped.values())


def test_upcasting_one_parameter_of_two_leaves_the_other_its_own_master():
    a, b = nn.Parameter(torch.ones(10)), nn.Parameter(torch.ones(10, dtype=torch.bfloat16))
    optimizer = MaskedAdamW([a, b], lr=0.1, policy=TopK(0.5, scope="tensor", schedule=Schedule(observe=1)))
    twins = [nn.Parameter(torch.ones(10)), nn.Parameter(torch.ones(10))]
    twin = MaskedAdamW(twins, lr=0.1, policy=optimizer.policy)

    def step(*params, optimizer):
        for p, sign in zip(params, (1, -1), strict=True):
            p.grad = sign * torch.arange(10.0).to(p.dtype)
        optimizer.step()

    for _ in range(3):
        step(a, b, optimizer=optimizer)
        step(*twins, optimizer=twin)
    upcast = nn.Parameter(b.detach().float())
    optimizer.param_groups[0]["params"][1] = upcast
    for _ in range(2):
        step(a, upcast, optimizer=optimizer)
        step(*twins, optimizer=twin)
    assert torch.equal(a, twins[0])
    torch.testing.assert_close(upcast, twins[1], rtol=2**-7, atol=0)


@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_swapped_parameter_of_another_shape_is_refused(situation):
    params, optimizer = started(situation)
    weight = params["encoder.weight"]
    mask, before = optimizer.mask(weight), copy.deepcopy(optimizer.state_dict())
    values = {name: p.detach().clone() for name, p in params.items()}
    optimizer.param_groups[0]["params"][0] = reshaped = nn.Parameter(torch.ones(20, 30))
    reshaped.grad = torch.ones(20, 30)
    for use in (optimizer.step, optimizer.state_dict, lambda: optimizer.mask(reshaped)):
        with pytest.raises(RuntimeError, match=r"must keep its shape .* \(20, 30\) for .* \(30, 20\)"):
            use()
    assert (reshaped == 1).all()
    optimizer.param_groups[0]["params"][0] = weight
    assert same_state(before, optimizer.state_dict()) and torch.equal(optimizer.mask(weight), mask)
    assert all(torch.equal(p, values[name]) for name, p in params.items())


# --- the float32 master -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_master_restarts_where_somebody_wrote_other_weights(dtype):
    """A float32 shadow run in which exactly the written entries restart, with their moments."""
    param = nn.Parameter(torch.linspace(-2, 2, 41).to(dtype))
    shadow = nn.Parameter(param.detach().float())
    options = {"lr": 1e-3, "weight_decay": 0.1, "policy": TopK(0.5, schedule=Schedule(observe=1))}
    optimizer, twin = MaskedAdamW([param], **options), MaskedAdamW([shadow], **options)

    def step(t):
        param.grad = torch.randn(41, generator=torch.Generator().manual_seed(t)).to(dtype)
        shadow.grad = param.grad.float()
        optimizer.step()
        twin.step()
        assert torch.equal(param, shadow.to(dtype))

    for t in range(12):
        step(t)
    drifted = shadow.detach() != param.detach().float()
    assert drifted.any(), "the masters know more than the weights"
    with torch.no_grad():
        written = torch.arange(41) % 3 == 0
        param[written] += 0.5
        shadow[written] = param[written].float()
    assert (written & optimizer.mask(param)).any() and (~written & optimizer.mask(param)).any()
    for t in range(12, 20):
        step(t)
    # an exponential moving average swapped in and out again: the same numbers, so that nothing restarts
    kept = param.detach().clone()
    with torch.no_grad():
        param.zero_()
        param.copy_(kept)
    for t in range(20, 28):
        step(t)


def test_a_checkpoint_of_other_weights_wins_over_the_masters_of_the_state():
    _, optimizer = started("compact")
    others = model(seed=3)
    other = make("compact", others)
    other.load_state_dict(optimizer.state_dict())
    start = {name: p.detach().clone() for name, p in others.items()}
    train(other, others, 1, start=7)
    for name, p in others.items():
        assert (p - start[name]).abs().max() < 0.1, "one step away from the weights that were there"
    assert any((p != start[name]).any() for name, p in others.items())


# --- what may be loaded -----------------------------------------------------------------------------------

OTHERS = {
    "policy": {"policy": TopK(0.5, schedule=Schedule(observe=1))},
    "schedule": {"policy": TopK(0.3, schedule=Schedule(observe=2))},
    "mechanism": {"policy": Bernoulli(0.3)},
    "no_policy": {"policy": None},
    "unselected": {"unselected": "zero_grad"},
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_policy_or_unselected_is_an_error_that_prints_both_and_changes_nothing(what):
    _, optimizer = started("compact")
    saved = optimizer.state_dict()
    others = model(seed=4)
    other = make("compact", others, **OTHERS[what])
    train(other, others, 3)
    before, masks = copy.deepcopy(other.state_dict()), [other.mask(p) for p in others.values()]
    with pytest.raises(ValueError) as caught:
        other.load_state_dict(saved)
    for shown in (optimizer, other):
        assert repr(shown.policy) in str(caught.value)
        assert shown.policy is None or f"unselected={shown.unselected!r}" in str(caught.value)
    assert same_state(before, other.state_dict())
    assert all(torch.equal(other.mask(p), m) for p, m in zip(others.values(), masks, strict=True))
    train(other, others, 1, start=3)
    with pytest.raises(ValueError, match="must be this optimizer's"):  # and the other way round
        optimizer.load_state_dict(other.state_dict())


def test_fidelity_is_part_of_what_must_match():
    p = nn.Parameter(torch.ones(10))
    paper, release = (
        ChildTuningAdamW([p], variant="D", observe_steps=2, fidelity=fidelity, unselected="frozen")
        for fidelity in ("paper", "release")
    )
    with pytest.raises(ValueError, match="cut='percentile'"):
        paper.load_state_dict(release.state_dict())


@pytest.mark.usefixtures("torchs_own_bits")
@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain_adam", "amsgrad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_state_of_torch_adamw_loads_without_a_policy_and_goes_on_bit_for_bit(dtype, amsgrad):
    theirs, ours = model(dtype), model(dtype, seed=1)
    dense = torch.optim.AdamW(theirs.values(), lr=0.02, weight_decay=0.1, amsgrad=amsgrad, foreach=False)
    train(dense, theirs, 3)
    optimizer = MaskedAdamW(ours.values(), amsgrad=amsgrad)
    with torch.no_grad():
        for name, p in ours.items():
            p.copy_(theirs[name])
    optimizer.load_state_dict(copy.deepcopy(dense.state_dict()))
    assert optimizer.param_groups[0]["lr"] == 0.02
    train(dense, theirs, 3, start=3)
    train(optimizer, ours, 3, start=3)
    assert all(torch.equal(p, theirs[name]) for name, p in ours.items())
    with pytest.raises(ValueError, match=r"Bernoulli.*got \(policy=None\)"):
        MaskedAdamW(ours.values(), policy=Bernoulli(0.5)).load_state_dict(dense.state_dict())
    # and back
    dense.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(dense, theirs, 2, start=6)
    train(optimizer, ours, 2, start=6)
    assert all(torch.equal(p, theirs[name]) for name, p in ours.items())


def test_a_state_of_torch_adamw_with_bfloat16_moments_keeps_their_dtype():
    theirs, ours = model(), model()
    dense = torch.optim.AdamW(theirs.values(), foreach=False)
    train(dense, theirs, 2)
    optimizer = MaskedAdamW(ours.values())
    optimizer.load_state_dict(dense.state_dict())
    assert optimizer.state[ours["encoder.weight"]]["exp_avg"].dtype == torch.bfloat16
    train(optimizer, ours, 2)


# --- names ------------------------------------------------------------------------------------------------

WRAPPED = {
    "ddp": "module.encoder.layer.0.weight",
    "ddp_twice": "module.module.encoder.layer.0.weight",
    "compile": "_orig_mod.encoder.layer.0.weight",
    "compile_of_a_block": "encoder.layer.0._orig_mod.weight",
    "checkpoint": "encoder.layer.0._checkpoint_wrapped_module.weight",
    "parametrization": "encoder.layer.0.parametrizations.weight.original",
    "compile_of_ddp_of_compile": "_orig_mod.module._orig_mod.encoder.layer.0.weight",
    "ddp_of_compile_of_ddp": "module._orig_mod.module.encoder.layer.0.weight",
    "everything_repeatedly": (
        "module._orig_mod.module.encoder._checkpoint_wrapped_module._orig_mod.layer."
        "_orig_mod.0._checkpoint_wrapped_module.parametrizations.weight.original"
    ),
}
KEPT = [
    "encoder.module.weight",
    "encoder.original",
    "parametrizations.weight.0.base",
    "my_orig_mod.weight",
    "modules.weight",
]


def mask_of(name, unit="entry"):
    p = nn.Parameter(torch.ones(40, 50))
    optimizer = MaskedAdamW([(name, p)], policy=Bernoulli(0.5, unit=unit))
    masks = []
    for _ in range(1 if unit == "entry" else 24):
        p.grad = torch.ones_like(p)
        optimizer.step()
        masks.append(optimizer.mask(p).flatten() if unit == "entry" else optimizer.mask(p).flatten()[:1])
    return torch.cat(masks)


@pytest.mark.parametrize("unit", ["entry", "tensor", "layer"])
@pytest.mark.parametrize("wrapped", WRAPPED)
def test_wrapped_models_have_the_masks_of_the_plain_one(wrapped, unit):
    assert torch.equal(mask_of(WRAPPED[wrapped], unit), mask_of("encoder.layer.0.weight", unit))


@pytest.mark.parametrize("name", KEPT)
def test_names_that_only_look_wrapped_are_kept(name):
    masks = [mask_of(other) for other in (name, "weight", "encoder.weight", "encoder")]
    assert all(not torch.equal(masks[0], other) for other in masks[1:])


@pytest.mark.filterwarnings("ignore")  # torch.compile's own imports are not ours to judge
def test_wrappers_of_torch_give_the_names_that_are_cleaned():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.nn.utils import parametrize

    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 10))

    def masks(module):
        optimizer = MaskedAdamW(module.named_parameters(), policy=Bernoulli(0.5))
        for p in module.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        return {tuple(p.shape): optimizer.mask(p) for p in module.parameters()}

    plain_masks = masks(net())
    parametrized = net()
    parametrize.register_parametrization(parametrized[0], "weight", nn.Identity())
    checkpointed = net()
    checkpointed[1] = checkpoint_wrapper(checkpointed[1])
    for module in (torch.compile(net()), parametrized, checkpointed, torch.compile(checkpointed)):
        assert [n for n, _ in module.named_parameters()] != [n for n, _ in net().named_parameters()]
        found = masks(module)
        assert all(torch.equal(found[shape], mask) for shape, mask in plain_masks.items())


def test_the_two_tensors_of_a_weight_normalised_matrix_have_masks_of_their_own():
    layer = torch.nn.utils.parametrizations.weight_norm(nn.Linear(50, 400))
    optimizer = MaskedAdamW(layer.named_parameters(), policy=Bernoulli(0.5))
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    magnitude, direction = (p for p in layer.parameters() if p.dim() == 2)
    assert not torch.equal(optimizer.mask(magnitude).flatten(), optimizer.mask(direction).flatten()[:400])


def test_a_mask_stays_when_a_started_model_is_wrapped_or_renamed():
    params = model(torch.float32)
    optimizer = make("seeded", params)
    train(optimizer, params, 2)
    twins = model(torch.float32)
    twin = make("seeded", twins)
    train(twin, twins, 2)
    group = twin.param_groups[0]
    group["param_names"] = [f"wrapped.{name}" for name in group["param_names"]]
    train(optimizer, params, 2, start=2)
    train(twin, twins, 2, start=2)
    assert all(torch.equal(optimizer.mask(params[n]), twin.mask(twins[n])) for n in params)


def colliding(suffix):
    """Two short names with one CRC-32, by brute force: a birthday among 2**32 takes some 80,000."""
    letters, seen = random.Random(0), {}
    while True:
        name = "".join(letters.choices("abcdefghijklmnopqrstuvwxyz", k=8)) + suffix
        other = seen.setdefault(zlib.crc32(name.encode()), name)
        if other != name:
            return other, name


@pytest.mark.parametrize("unit", ["entry", "tensor", "layer"])
def test_names_with_the_same_key_are_refused_before_anything_moves(unit):
    units = colliding("" if unit == "layer" else ".w")
    names = (
        [f"{name}.w" for name in units] if unit == "layer" else units
    )  # the layer's name is what counts there
    params = {name: nn.Parameter(torch.ones(10)) for name in names}
    optimizer = MaskedAdamW(params.items(), policy=Bernoulli(0.5, unit=unit))
    for p in params.values():
        p.grad = torch.ones(10)
    with pytest.raises(ValueError, match="CRC-32") as caught:
        optimizer.step()
    assert all(repr(name) in str(caught.value) for name in units)
    assert all((p == 1).all() for p in params.values()) and not any(optimizer.state.values())
    # nothing is drawn here, so that nothing collides
    MaskedAdamW(params.items(), policy=TopK(0.5, schedule=Schedule(observe=1))).step()


# --- tied parameters --------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.decoder = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.decoder.weight = self.embedding.weight
        self.other = nn.Parameter(torch.randn(26))


TIED_POLICIES = {
    "no_policy": None,
    "bernoulli": Bernoulli(0.5),
    "topk_global": TopK(0.5, schedule=Schedule(observe=1)),
    "topk_per_tensor": TopK(0.5, scope="tensor", schedule=Schedule(observe=1)),
}


@pytest.mark.parametrize("unselected", ["frozen", "zero_grad"])
@pytest.mark.parametrize("policy_id", TIED_POLICIES)
def test_tied_parameters_count_and_step_once(policy_id, unselected):
    """A list that holds a tied tensor twice gets torch's warning, and the run of one that holds it once."""

    def run(repeat):
        net = Tied()
        items = list(net.named_parameters(remove_duplicate=not repeat))
        assert len(items) == (3 if repeat else 2)
        options = {"lr": 0.1, "policy": TIED_POLICIES[policy_id], "unselected": unselected}
        if repeat:
            with pytest.warns(UserWarning, match="duplicate parameters"):
                optimizer = MaskedAdamW([p for _, p in items], **options)
        else:
            optimizer = MaskedAdamW([p for _, p in items], **options)
        for t in range(3):
            for i, p in enumerate(net.parameters()):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * t + i))
            optimizer.step()
        masks = [optimizer.mask(p) for p in net.parameters()]
        assert optimizer.density() == sum(int(m.sum()) for m in masks) / 50
        assert all(float(state["step"]) in (2.0, 3.0) for state in optimizer.state.values())
        return list(net.parameters()), masks

    once, masks = run(False)
    twice, others = run(True)
    if policy_id.startswith("topk"):
        assert sum(int(m.sum()) for m in masks) == 25
    if policy_id != "bernoulli":  # there an unnamed tensor is keyed by its ordinal
        assert all(map(torch.equal, masks, others)) and all(map(torch.equal, once, twice))


def test_a_tied_parameter_that_is_named_twice_draws_one_mask():
    net = Tied()
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = MaskedAdamW(net.named_parameters(remove_duplicate=False), policy=Bernoulli(0.5), lr=0.1)
    start = net.embedding.weight.detach().clone()
    net.embedding.weight.grad = torch.ones(6, 4)
    optimizer.step()
    mask = optimizer.mask(net.embedding.weight)
    assert mask.any() and not mask.all()
    assert torch.equal(net.embedding.weight != start, mask)


# --- what a step works out about its parameters, and uses again while it holds ------------------------------


def replace_group(optimizer):
    optimizer.param_groups[1] = {**optimizer.param_groups[1], "lr": 0.3}


def forget_state(optimizer):
    optimizer.state.pop(optimizer.param_groups[0]["params"][1])


def replace_state(optimizer):
    p = optimizer.param_groups[1]["params"][0]
    optimizer.state[p] = {key: value / 2 for key, value in optimizer.state[p].items()}


def exchange_moments(optimizer):
    first, second = (optimizer.state[p] for p in optimizer.param_groups[0]["params"])
    first["exp_avg"], second["exp_avg"] = second["exp_avg"], first["exp_avg"]


EDITS = {
    "a_group_gets_another_lr": lambda optimizer: optimizer.param_groups[0].update(lr=0.2),
    "a_group_is_replaced": replace_group,
    "a_parameter_changes_its_group": lambda optimizer: optimizer.param_groups[1]["params"].append(
        optimizer.param_groups[0]["params"].pop()
    ),
    "groups_change_places": lambda optimizer: optimizer.param_groups.reverse(),
    "a_state_is_forgotten": forget_state,
    "a_state_is_replaced": replace_state,
    "moments_are_exchanged": exchange_moments,
    "a_note_is_kept_in_a_state": lambda optimizer: optimizer.state[
        optimizer.param_groups[0]["params"][0]
    ].update(note=1),
    "a_gradient_is_missing": lambda optimizer: setattr(optimizer.param_groups[0]["params"][0], "grad", None),
    "all_gradients_of_a_group_are_missing": lambda optimizer: setattr(
        optimizer.param_groups[1]["params"][0], "grad", None
    ),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_what_changes_between_steps_is_seen_as_torch_sees_it(edit):
    def run(make, **options):
        params = [nn.Parameter(torch.linspace(-1, 1, 12) * (i + 1)) for i in range(3)]
        optimizer = make([{"params": params[:2]}, {"params": params[2:], "lr": 0.05}], lr=0.1, **options)
        for t in range(6):
            for i, p in enumerate(params):
                p.grad = torch.randn(12, generator=torch.Generator().manual_seed(10 * t + i))
            if t in (2, 4):
                edit(optimizer)
            optimizer.step()
        return params

    ours = run(MaskedAdamW, backend="reference")
    theirs = run(torch.optim.AdamW, foreach=False)
    assert all(map(torch.equal, ours, theirs))


def test_switches_of_a_group_that_change_between_steps_are_seen():
    p = nn.Parameter(torch.zeros(200))
    optimizer = MaskedAdamW([p], lr=0.1, policy=Bernoulli(0.5))
    moved = []
    for t in range(6):
        optimizer.param_groups[0].update(masked=t not in (2, 3), amsgrad=t >= 4)
        before = p.detach().clone()
        p.grad = torch.ones(200)
        optimizer.step()
        moved.append(float((p != before).float().mean()))
        assert ("max_exp_avg_sq" in optimizer.state[p]) == (t >= 4)
    assert moved[2:4] == [1.0, 1.0] and all(0.3 < share < 0.7 for share in moved[:2] + moved[4:])


@pytest.mark.parametrize("situation", SITUATIONS)
def test_state_that_is_moved_away_is_not_kept_alive_and_may_come_back(situation):
    (params, optimizer), (twins, twin) = started(situation), started(situation)
    steps = SITUATIONS[situation][2]
    for t in range(steps, steps + 3):
        old = [weakref.ref(v) for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
        assert old
        for state in optimizer.state.values():
            state.update({k: v.clone() for k, v in state.items() if torch.is_tensor(v)})
        assert not any(reference() is not None for reference in old)
        train(optimizer, params, 1, start=t)
        train(twin, twins, 1, start=t)
        assert same_state(optimizer.state_dict(), twin.state_dict())
    assert all(map(torch.equal, params.values(), twins.values()))


# --- nothing is kept alive, and nothing is kept in vain ---------------------------------------------------


@pytest.mark.parametrize("situation", SITUATIONS)
def test_gradients_are_not_kept_alive(situation):
    params, optimizer = model(), None
    optimizer = make(situation, params, max_grad_norm=1.0)
    for t in range(5):
        for p in params.values():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(t)).to(p.dtype)
        watched = [weakref.ref(p.grad) for p in params.values()]
        optimizer.step()
        optimizer.zero_grad()
        assert all(reference() is None for reference in watched), f"after step {t}"


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("at", [0, 3])
def test_old_parameters_are_not_kept_alive(situation, at):
    params = model()
    optimizer = make(situation, params)
    train(optimizer, params, at)
    swapped = swap(optimizer, params)
    watched = [weakref.ref(p) for p in params.values()]
    params.clear()
    train(optimizer, swapped, 1, start=at)
    assert all(reference() is None for reference in watched)


def nbytes(state):
    return sum(v.numel() * v.element_size() for v in state.values() if isinstance(v, torch.Tensor))


@pytest.mark.parametrize(
    ("dtype", "each"), [(torch.float32, 12), (torch.bfloat16, 16), (torch.float16, 16)], ids=str
)
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_a_selected_entry_costs_12_bytes_and_16_in_low_precision(scope, dtype, each):
    """exp_avg, exp_avg_sq, index, and in low precision the master; at most 8 more for a tensor's step."""
    params = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((300, 100), (1000,), (50, 7))]
    optimizer = MaskedAdamW(params, policy=TopK(0.01, scope=scope, schedule=Schedule(observe=2)))
    dense = sum(p.numel() for p in params)
    for t in range(4):
        for p in params:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(t)).to(dtype)
        optimizer.step()
        sizes = [nbytes(optimizer.state[p]) for p in params]
        if t == 0:
            assert 4 * dense < sum(sizes) < 4 * dense + 64, "the statistic, and no moments"
        elif t == 1:
            assert sum(sizes) <= 4 * int(dense * 0.01) + 3 * 8, "the indices; the statistic is gone"
    selected = [int(optimizer.mask(p).sum()) for p in params]
    if scope == "global":
        assert sum(selected) == int(0.01 * dense)
    for p, count in zip(params, selected, strict=True):
        state = optimizer.state[p]
        assert nbytes(state) - nbytes({"step": state["step"]}) == each * count
        assert nbytes({"step": state["step"]}) <= 8
        assert not {"statistic", "nonfinite"} & set(state)


def test_a_statistic_is_dropped_at_selection_and_not_at_the_start_of_a_phase():
    p = nn.Parameter(torch.zeros(20))
    optimizer = MaskedAdamW([p], policy=TopK(0.5, schedule=Schedule(observe=2, train=2)))
    held = []
    for _ in range(8):
        p.grad = torch.arange(20.0)
        optimizer.step()
        held.append("statistic" in optimizer.state[p])
    assert held == [True, False, False, False, True, False, False, False]


def test_storage_of_state_is_no_larger_than_its_tensors():
    """A view of a parameter-sized buffer would be compact in name only."""
    p = nn.Parameter(torch.zeros(10_000, dtype=torch.bfloat16))
    optimizer = MaskedAdamW([p], policy=TopK(0.01, schedule=Schedule(observe=1, train=1)))
    for t in range(6):
        p.grad = torch.randn(10_000, generator=torch.Generator().manual_seed(t)).bfloat16()
        optimizer.step()
    for key, value in optimizer.state[p].items():
        assert value.untyped_storage().nbytes() <= max(8, math.prod(value.shape) * value.element_size()), key


# --- what checkpointing and editing do in between -----------------------------------------------------------


def gradients(module):
    for i, p in enumerate(module.parameters()):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))


@pytest.mark.parametrize(
    "policy",
    [None, Bernoulli(0.5), TopK(0.5, schedule=Schedule(observe=1)), TopK(0.5)],
    ids=["no_policy", "drawn", "observing", "explicit"],
)
def test_the_step_that_checkpointing_makes_to_see_the_state_counts_as_none(policy):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    results = []
    for looked_at in (False, True):
        torch.manual_seed(0)
        net = nn.Linear(6, 5)
        optimizer = MaskedAdamW(net.named_parameters(), lr=0.1, policy=policy)
        if looked_at:
            get_optimizer_state_dict(net, optimizer)
            assert optimizer.param_groups[0]["clock"] == 0
            assert not any("statistic" in state for state in optimizer.state.values())
        for _ in range(3):
            gradients(net)
            if policy == TopK(0.5):
                optimizer.observe()
            optimizer.step()
        results.append([p.detach().clone() for p in net.parameters()])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("between", ["add_param_group", "deepcopy", "pickle"])
def test_a_swapped_parameter_keeps_its_state_whatever_comes_before_the_next_step(between):
    net = nn.Linear(3, 2)
    optimizer = MaskedAdamW(net.parameters(), lr=0.1)
    gradients(net)
    optimizer.step()
    new = nn.Parameter(net.weight.detach().clone())
    optimizer.param_groups[0]["params"][0] = new
    if between == "add_param_group":
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    else:
        optimizer = (
            copy.deepcopy(optimizer) if between == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
        )
        new = optimizer.param_groups[0]["params"][0]
    new.grad = torch.ones(2, 3)
    optimizer.step()
    assert float(optimizer.state[new]["step"]) == 2
    optimizer.state_dict()


HOSTILE = {
    "no_step": lambda s: s.pop("step"),
    "no_second_moment": lambda s: s.pop("exp_avg_sq"),
    "no_moments": lambda s: [s.pop(k) for k in ("exp_avg", "exp_avg_sq", "indices")],
    "indices_too_high": lambda s: s.update(indices=s["indices"] + 1000),
    "indices_negative": lambda s: s.update(indices=s["indices"] - 1000),
    "indices_unsorted": lambda s: s.update(indices=s["indices"].flip(0)),
    "indices_float": lambda s: s.update(indices=s["indices"].float()),
    "integer_moments": lambda s: s.update(exp_avg=s["exp_avg"].long()),
    "a_list_for_a_tensor": lambda s: s.update(exp_avg=s["exp_avg"].tolist()),
    "three_steps": lambda s: s.update(step=torch.ones(3)),
    "short_moments": lambda s: s.update(exp_avg=s["exp_avg"][:1]),
}


@pytest.mark.parametrize("damage", HOSTILE)
def test_a_damaged_state_dict_is_refused_and_changes_nothing(damage):
    net = nn.Linear(6, 5, bias=False)
    optimizer = MaskedAdamW(net.parameters(), lr=0.1, policy=TopK(0.5, schedule=Schedule(observe=1)))
    for _ in range(3):
        gradients(net)
        optimizer.step()
    damaged = copy.deepcopy(optimizer.state_dict())
    HOSTILE[damage](damaged["state"][0])
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"must have .*got .*; load an unchanged state dict"):
        optimizer.load_state_dict(damaged)
    after = optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    for key, value in before["state"][0].items():
        assert torch.equal(value, after["state"][0][key])


def test_bits_and_masks_that_are_missing_or_damaged_are_refused():
    net = nn.Linear(6, 5, bias=False)
    policy = TopK(0.5, schedule=Schedule(observe=1))
    optimizer = MaskedAdamW(net.parameters(), lr=0.1, policy=policy, unselected="zero_grad")
    for _ in range(2):
        gradients(net)
        optimizer.step()
    for damage in (
        lambda s: s.clear(),
        lambda s: s[0].update(bits=s[0]["bits"][:1]),
        lambda s: s[0].pop("bits"),
    ):
        damaged = copy.deepcopy(optimizer.state_dict())
        damage(damaged["state"])
        with pytest.raises(ValueError, match="load an unchanged state dict"):
            optimizer.load_state_dict(damaged)


def test_masked_cannot_change_under_state_that_depends_on_it():
    for start, steps in ((False, 3), (True, 3), (True, 1)):
        net = nn.Linear(6, 5)
        groups = [{"params": [net.weight]}, {"params": [net.bias], "masked": start}]
        optimizer = MaskedAdamW(groups, lr=0.1, policy=TopK(0.5, schedule=Schedule(observe=2)))
        for _ in range(steps):
            gradients(net)
            optimizer.step()
        optimizer.param_groups[1]["masked"] = not start
        before = [p.detach().clone() for p in net.parameters()]
        gradients(net)
        with pytest.raises(RuntimeError, match="masked must stay as it was"):
            optimizer.step()
        assert all(map(torch.equal, before, net.parameters()))


@pytest.mark.parametrize(("first", "then"), [(torch.float32, torch.float64), (torch.float32, torch.bfloat16)])
def test_compact_state_follows_a_model_that_changes_dtype_in_place(first, then):
    net = nn.Linear(6, 5).to(first)
    optimizer = MaskedAdamW(net.parameters(), lr=0.1, policy=TopK(0.5, schedule=Schedule(observe=1)))
    for dtype in (first, first, then, then):
        net.to(dtype)
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    for p in net.parameters():
        state = optimizer.state[p]
        assert ("master" in state) == (then == torch.bfloat16)
        assert state["exp_avg"].dtype == (torch.float64 if then == torch.float64 else torch.float32)
