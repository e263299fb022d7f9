"""Whatever a training loop does around AdamW, it may do around these optimizers: schedules, weight averages,
loss scaling, groups that come late, layers that freeze, and accelerate.
"""

import copy
import functools
import io

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler, swa_utils

from sparse_optim import (
    Bernoulli,
    ChildTuningAdamW,
    DPSAdamW,
    GradDropAdamW,
    GradualUnfreezing,
    MaskedAdamW,
    Schedule,
    SecondOrderAdamW,
    TopK,
)
from sparse_optim.nn import mix_weights

STEPS = 7
DTYPES = [torch.float32, torch.bfloat16]
ONCE = TopK(0.3, schedule=Schedule(observe=2))
REPEATING = TopK(0.3, schedule=Schedule(observe=1, train=2))
METHODS = {
    "dense": MaskedAdamW,
    "bernoulli_zero_grad": functools.partial(MaskedAdamW, policy=Bernoulli(0.4), unselected="zero_grad"),
    "bernoulli_frozen": functools.partial(MaskedAdamW, policy=Bernoulli(0.4)),
    "topk_once": functools.partial(MaskedAdamW, policy=ONCE),
    "topk_repeating": functools.partial(MaskedAdamW, policy=REPEATING),
    "child_tuning_d": functools.partial(
        ChildTuningAdamW, variant="D", density=0.2, observe_steps=3, fidelity="release"
    ),
    "dps": functools.partial(DPSAdamW, variant="dense", update_steps=2),
    "released": functools.partial(
        MaskedAdamW, policy=REPEATING, release_gradients=True, statistic_dtype=torch.bfloat16
    ),
}
# the rest of what is published, for loops of other packages
OTHERS = {
    "child_tuning_f": functools.partial(ChildTuningAdamW, variant="F"),
    "child_tuning_d_paper": functools.partial(ChildTuningAdamW, variant="D", density=0.2, observe_steps=3),
    "dps_mix": functools.partial(DPSAdamW, variant="mix", update_steps=2),
    "second_order": functools.partial(SecondOrderAdamW, density=0.2, observe_steps=3),
    "grad_drop": functools.partial(GradDropAdamW, keep=0.5),
    "grad_drop_epochs": functools.partial(GradDropAdamW, keep=0.5, granularity="layer", refresh="epoch"),
    "unfreezing": functools.partial(MaskedAdamW, policy=GradualUnfreezing(every="epoch")),
}
# methods whose moments are kept for selected entries only
COMPACT = ("topk_once", "topk_repeating", "released")
DENSE = {
    "no_policy": MaskedAdamW,
    "keep_1": functools.partial(MaskedAdamW, policy=Bernoulli(1.0), unselected="zero_grad"),
    "density_1": functools.partial(MaskedAdamW, policy=TopK(1.0, schedule=Schedule(observe=2))),
    "dps_density_1": functools.partial(DPSAdamW, variant="dense", density=1.0, update_steps=2),
}
# the definition of correct has the bits of torch's for-loop; other backends are compared in test_backends.py
DENSE = {name: functools.partial(make, backend="reference") for name, make in DENSE.items()}
ADAMW = functools.partial(torch.optim.AdamW, foreach=False)
NUMBERS = {"lr": 0.02, "weight_decay": 0.1}

every_method = pytest.mark.parametrize("method", METHODS)
every_dense_limit = pytest.mark.parametrize("limit", DENSE)


def network(dtype=torch.float32, norm=nn.LayerNorm):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), norm(7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def batch(step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    inputs, targets = torch.randn(8, 5, generator=generator), torch.randn(8, 3, generator=generator)
    return inputs.to(dtype), targets.to(dtype)


def loss_of(model, step):
    inputs, targets = batch(step, next(model.parameters()).dtype)
    return (model(inputs) - targets).square().mean()


def started(method, dtype=torch.float32, norm=nn.LayerNorm):
    model = network(dtype, norm)
    make = (METHODS | OTHERS)[method] if isinstance(method, str) else method
    return model, make(model.named_parameters(), **NUMBERS)


def backward(model, optimizer, step):
    optimizer.zero_grad()
    loss = loss_of(model, step)
    loss.backward()
    return loss.item()


def bits(value):
    """Nested state with every tensor as dtype, shape and bytes, which compare exactly."""
    if isinstance(value, torch.Tensor):
        flat = value.detach().reshape(-1).contiguous().view(torch.uint8)
        return str(value.dtype), tuple(value.shape), bytes(flat.tolist())
    if isinstance(value, dict):
        return {key: bits(inner) for key, inner in value.items()}
    return [bits(inner) for inner in value] if isinstance(value, list | tuple) else value


def everything(model, optimizer):
    """Weights, moments, statistics, masks and the numbers of all groups, draws and clocks among them."""
    seen = bits([model.state_dict(), optimizer.state_dict()])
    if isinstance(optimizer, MaskedAdamW):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        seen += [bits([optimizer.mask(p), optimizer.mask(p, upcoming=True)]) for p in params]
    return seen


def same_run(ours, theirs, groups=slice(None)):
    """Weights, moments and what torch's groups hold, between one of ours and `torch.optim.AdamW`."""
    (model, optimizer), (twin, other) = ours, theirs
    assert bits(model.state_dict()) == bits(twin.state_dict())
    for group, their_group in zip(optimizer.param_groups[groups], other.param_groups[groups], strict=True):
        shared = their_group.keys() - {"params", "param_names", "foreach"}
        assert shared <= group.keys()
        assert bits({k: group[k] for k in shared}) == bits({k: their_group[k] for k in shared})
        for p, q in zip(group["params"], their_group["params"], strict=True):
            assert bits(dict(other.state[q])) == bits(
                {key: optimizer.state[p][key] for key in other.state[q]}
            )


def through_disk(value, weights_only=True):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


# --- every schedule ---------------------------------------------------------------------------------------


def chained(optimizer):
    return lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(optimizer, 0.2, total_iters=3), lr_scheduler.ExponentialLR(optimizer, 0.9)],
        optimizer=optimizer,
    )


def sequential(optimizer):
    warmup = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
    then = lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)
    return lr_scheduler.SequentialLR(optimizer, [warmup, then], milestones=[3])


SCHEDULERS = {
    "StepLR": functools.partial(lr_scheduler.StepLR, step_size=2, gamma=0.5),
    "MultiStepLR": functools.partial(lr_scheduler.MultiStepLR, milestones=[1, 4], gamma=0.5),
    "LinearLR": functools.partial(lr_scheduler.LinearLR, start_factor=0.2, total_iters=4),
    "ExponentialLR": functools.partial(lr_scheduler.ExponentialLR, gamma=0.8),
    "CosineAnnealingLR": functools.partial(lr_scheduler.CosineAnnealingLR, T_max=5),
    "CosineAnnealingWarmRestarts": functools.partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=2),
    "OneCycleLR": functools.partial(lr_scheduler.OneCycleLR, max_lr=0.05, total_steps=STEPS + 1),
    "CyclicLR": functools.partial(lr_scheduler.CyclicLR, base_lr=0.01, max_lr=0.05, step_size_up=3),
    "ReduceLROnPlateau": functools.partial(lr_scheduler.ReduceLROnPlateau, patience=0, threshold=0.5),
    "SequentialLR": sequential,
    "ChainedScheduler": chained,
    # as transformers builds it: the first step has lr 0
    "LambdaLR": functools.partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: min(step / 3, 1.0)),
    "MultiplicativeLR": functools.partial(lr_scheduler.MultiplicativeLR, lr_lambda=lambda step: 0.9),
    "ConstantLR": functools.partial(lr_scheduler.ConstantLR, factor=0.3, total_iters=3),
    "PolynomialLR": functools.partial(lr_scheduler.PolynomialLR, total_iters=6, power=2.0),
}
every_scheduler = pytest.mark.parametrize("schedule", SCHEDULERS)


def go_on(scheduler, loss):
    scheduler.step(*[loss] * isinstance(scheduler, lr_scheduler.ReduceLROnPlateau))


def test_every_schedule_of_torch_is_in_the_table():
    listed = {name for name in lr_scheduler.__all__ if name not in ("LRScheduler", "_LRScheduler")}
    assert listed == SCHEDULERS.keys()


@every_scheduler
@every_dense_limit
def test_a_schedule_drives_the_dense_limit_as_it_drives_adamw(limit, schedule):
    runs = [started(DENSE[limit]), started(ADAMW)]
    schedulers = [SCHEDULERS[schedule](optimizer) for _, optimizer in runs]
    seen = set()
    for step in range(STEPS):
        for (model, optimizer), scheduler in zip(runs, schedulers, strict=True):
            loss = backward(model, optimizer, step)
            optimizer.step()
            go_on(scheduler, loss)
        same_run(*runs)
        seen.add((runs[0][1].param_groups[0]["lr"], runs[0][1].param_groups[0]["betas"]))
    assert len(seen) > 1, "the schedule changes something"


def numbers_of_adamw(schedule, losses):
    """What the schedule makes of AdamW's learning rate and betas, step by step."""
    optimizer = ADAMW([nn.Parameter(torch.zeros(1))], **NUMBERS)
    scheduler = SCHEDULERS[schedule](optimizer)
    numbers = []
    for loss in losses:
        numbers.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"]))
        optimizer.step()
        go_on(scheduler, loss)
    return numbers


class Written:
    """The table of `unselected`, written out for one float64 tensor, with the mask given."""

    def __init__(self, p, method, unselected):
        self.compact, self.unselected = method in COMPACT, unselected
        self.first, self.second, self.age = (torch.zeros_like(p) for _ in range(3))

    def step(self, p, grad, mask, lr, betas, weight_decay=NUMBERS["weight_decay"], eps=1e-8):
        moves = mask
        if self.compact:
            for kept in (self.first, self.second, self.age):
                kept[~mask] = 0
        if self.unselected == "zero_grad":
            moves, grad = torch.ones_like(mask), grad * mask
        self.age += mask if self.compact else 1
        self.first = torch.where(moves, betas[0] * self.first + (1 - betas[0]) * grad, self.first)
        self.second = torch.where(moves, betas[1] * self.second + (1 - betas[1]) * grad**2, self.second)
        moved = self.first / (1 - betas[0] ** self.age)
        moved = moved / ((self.second / (1 - betas[1] ** self.age)).sqrt() + eps)
        return torch.where(moves, p * (1 - lr * weight_decay) - lr * moved, p)


@every_scheduler
@every_method
def test_an_update_uses_the_numbers_that_the_schedule_gives_adamw(method, schedule):
    model, optimizer = started(method, torch.float64)
    scheduler = SCHEDULERS[schedule](optimizer)
    written = {p: Written(p.detach(), method, optimizer.unselected) for p in model.parameters()}
    grads, losses, checks = {}, [], []
    for p in written:
        p.register_hook(functools.partial(grads.__setitem__, p))
    for step in range(STEPS):
        losses.append(backward(model, optimizer, step))
        before = {p: (p.detach().clone(), grads[p].clone()) for p in written}
        optimizer.step()
        masks = {p: optimizer.mask(p) for p in before}
        checks.append((before, masks, {p: p.detach().clone() for p in before}))
        go_on(scheduler, losses[-1])
    trained = 0
    for (lr, betas), (before, masks, after) in zip(numbers_of_adamw(schedule, losses), checks, strict=True):
        if any(mask.any() for mask in masks.values()):
            trained += 1
            for p, (weight, grad) in before.items():
                expected = written[p].step(weight, grad, masks[p], lr, betas)
                torch.testing.assert_close(after[p], expected, rtol=1e-11, atol=1e-13)
        else:
            assert all(torch.equal(after[p], weight) for p, (weight, _) in before.items())
    assert trained >= 4


@every_method
def test_a_schedule_that_writes_into_a_tensor_lr_is_followed(method):
    runs = []
    for lr in (NUMBERS["lr"], torch.tensor(NUMBERS["lr"], dtype=torch.float64)):
        model = network(torch.float64)
        optimizer = METHODS[method](model.named_parameters(), lr=lr)
        scheduler = SCHEDULERS["OneCycleLR"](optimizer)
        for step in range(STEPS):
            backward(model, optimizer, step)
            optimizer.step()
            scheduler.step()
        runs.append(model.state_dict())
    assert optimizer.param_groups[0]["lr"] is lr
    torch.testing.assert_close(*runs, rtol=1e-12, atol=1e-14)


@pytest.mark.one_in(3, by="method")
@every_scheduler
@every_method
def test_a_run_with_a_schedule_resumes_at_every_step(method, schedule):
    model, optimizer = started(method)
    scheduler = SCHEDULERS[schedule](optimizer)
    resumed = started(method)
    resumed = (*resumed, SCHEDULERS[schedule](resumed[1]))
    for step in range(STEPS):
        runs = [(model, optimizer, scheduler), resumed]
        for some_model, some_optimizer, some_scheduler in runs:
            loss = backward(some_model, some_optimizer, step)
            some_optimizer.step()
            go_on(some_scheduler, loss)
        fresh = started(method)
        fresh = (*fresh, SCHEDULERS[schedule](fresh[1]))
        fresh[0].load_state_dict(through_disk(resumed[0].state_dict()))
        fresh[1].load_state_dict(through_disk(resumed[1].state_dict()))
        # torch's own schedules hold a Counter, and others of their kind
        fresh[2].load_state_dict(through_disk(resumed[2].state_dict(), weights_only=False))
        resumed = fresh
        assert everything(model, optimizer) == everything(*resumed[:2])


# --- averages of weights ----------------------------------------------------------------------------------


def averaging(make, ema):
    """A run, its average with batch statistics of its own, and the weights that went into the average."""
    model, optimizer = started(make, norm=nn.BatchNorm1d)
    average = swa_utils.AveragedModel(
        model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.7) if ema else None
    )
    schedule = swa_utils.SWALR(optimizer, swa_lr=0.05, anneal_epochs=3)
    path = []
    for epoch in range(5):
        for step in (2 * epoch, 2 * epoch + 1):
            backward(model, optimizer, step)
            optimizer.step()
        average.update_parameters(model)
        schedule.step()
        path.append([p.detach().clone() for p in model.parameters()])
    swa_utils.update_bn([batch(step) for step in range(4)], average)
    return (model, optimizer), average, path


@pytest.mark.parametrize("ema", [False, True], ids=["mean", "ema"])
@every_dense_limit
def test_averages_in_the_dense_limit_are_those_of_adamw(limit, ema):
    ours, average, _ = averaging(DENSE[limit], ema)
    theirs, their_average, _ = averaging(ADAMW, ema)
    same_run(ours, theirs)
    assert ours[1].param_groups[0]["swa_lr"] == 0.05
    assert bits(average.state_dict()) == bits(their_average.state_dict())


@every_method
def test_an_average_is_that_of_the_weights_on_the_way(method):
    (_, optimizer), average, path = averaging(METHODS[method], ema=False)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    for p, *visited in zip(average.module.parameters(), *path, strict=True):
        torch.testing.assert_close(p.detach(), torch.stack(visited).mean(0))
    assert not torch.equal(average.module[0].weight, path[-1][0])


def exchange(model, values, how="copied"):
    """Put these values into the model, and return what was there."""
    kept = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p, value in zip(model.parameters(), values, strict=True):
            if how == "copied":
                p.copy_(value)
            else:
                p.data = value.detach().clone()
    return kept


@pytest.mark.parametrize("how", ["copied", "assigned_to_data"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_method
def test_looking_at_the_average_between_steps_changes_nothing(method, dtype, how):
    model, optimizer = started(method, dtype)
    looked, other = started(method, dtype)
    average, different = swa_utils.AveragedModel(looked, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5)), 0
    for step in range(STEPS):
        for some_model, some_optimizer in ((model, optimizer), (looked, other)):
            backward(some_model, some_optimizer, step)
            some_optimizer.step()
        average.update_parameters(looked)
        kept = exchange(looked, average.parameters(), how)
        different += bits(looked.state_dict()) != bits(model.state_dict())
        exchange(looked, kept, how)
        assert everything(model, optimizer) == everything(looked, other)
    assert different >= 3


@every_method
def test_training_goes_on_from_an_average_that_was_put_into_the_model(method):
    """Masters of bfloat16 weights restart, moments and masks stay: a run whose weights were always these."""
    model, optimizer = started(method, torch.bfloat16)
    average = swa_utils.AveragedModel(model)
    for step in range(4):
        backward(model, optimizer, step)
        optimizer.step()
        average.update_parameters(model)
    exchange(model, average.parameters())
    twin, other = started(method, torch.bfloat16)
    twin.load_state_dict(model.state_dict())
    state = copy.deepcopy(optimizer.state_dict())
    restarted = 0
    for p, number in zip(model.parameters(), state["state"], strict=True):
        entries = state["state"][number]
        if "master" in entries:
            now = p.detach().reshape(-1)[entries["indices"].long()]
            restarts = entries["master"].bfloat16() != now
            restarted += int(restarts.sum())
            entries["master"] = torch.where(restarts, now.float(), entries["master"])
    assert bool(restarted) == (method in COMPACT)
    other.load_state_dict(state)
    for step in range(4, STEPS):
        frozen = [p.detach().clone() for p in model.parameters()]
        for some_model, some_optimizer in ((model, optimizer), (twin, other)):
            backward(some_model, some_optimizer, step)
            some_optimizer.step()
        assert bits(model.state_dict()) == bits(twin.state_dict())
        if optimizer.unselected == "frozen":
            for p, before in zip(model.parameters(), frozen, strict=True):
                assert torch.equal(p[~optimizer.mask(p)], before[~optimizer.mask(p)])


# --- loss scaling -----------------------------------------------------------------------------------------


def scaled_step(model, optimizer, scaler, step, *, clip=True, bad=False):
    optimizer.zero_grad()
    spoil = torch.zeros(3, 7)
    spoil[1, 2] = (torch.inf if step % 2 else torch.nan) if bad else 0
    hook = model[3].weight.register_hook(lambda grad: grad + spoil)
    if isinstance(optimizer, MaskedAdamW):
        optimizer.attach_scaler(scaler)
    scaler.scale(loss_of(model, step)).backward()
    hook.remove()
    if clip:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    scaler.step(optimizer)
    scaler.update()


def scaler():
    return torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=3)


@pytest.mark.parametrize("clip", [True, False], ids=["unscaled_and_clipped", "scaled"])
@every_dense_limit
def test_scaled_losses_train_the_dense_limit_as_adamw(limit, clip):
    runs = [started(DENSE[limit]), started(ADAMW)]
    scalers = [scaler(), scaler()]
    for step in range(STEPS + 3):
        for (model, optimizer), its_scaler in zip(runs, scalers, strict=True):
            scaled_step(model, optimizer, its_scaler, step, clip=clip, bad=step in (0, 4, 5))
        if step:
            same_run(*runs)
    assert runs[0][1].state[runs[0][0][0].weight]["step"] == STEPS
    assert scalers[0].state_dict() == scalers[1].state_dict()


@pytest.mark.parametrize(
    ("method", "clip"),
    # released gradients are clipped by max_grad_norm= only
    [(method, clip) for method in METHODS for clip in (False, True) if not (clip and method == "released")],
)
def test_a_step_that_the_scaler_skips_might_not_have_been(method, clip):
    """A bad step before every good one, against a run that has the good ones only and no scaler."""
    model, optimizer = started(method)
    plain, other = started(method)
    its_scaler = scaler()
    for step in range(STEPS):
        before, scale = everything(model, optimizer), its_scaler.get_scale()
        scaled_step(model, optimizer, its_scaler, 50 + step, clip=clip, bad=True)
        assert everything(model, optimizer) == before
        assert its_scaler.get_scale() == scale / 2
        scaled_step(model, optimizer, its_scaler, step, clip=clip)
        backward(plain, other, step)
        if clip:
            nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        other.step()
        assert everything(model, optimizer) == everything(plain, other)
        assert everything(model, optimizer) != before


# --- groups, and layers that freeze -----------------------------------------------------------------------


def grouped(make, extra):
    """Every group with numbers of its own; `extra(group)` adds to them. The first is there to be masked."""
    model, companion = network(), nn.Parameter(torch.ones(10))
    modules = [model[0], model[1], model[3]]
    groups = [
        {"params": list(modules[0].parameters()), "lr": 0.05, "betas": (0.7, 0.9)},
        {"params": list(modules[1].parameters()), "weight_decay": 0.0, "eps": 1e-3},
        {"params": list(modules[2].parameters()), "lr": 0.01, "weight_decay": 0.3, "amsgrad": True},
    ]
    optimizer = make([{"params": [companion]}, extra(groups[0])], **NUMBERS)
    for step in range(STEPS + 2):
        if step in (2, 4):
            optimizer.add_param_group(extra(groups[step // 2]))
        for module in modules:
            # one layer at a time, as a loop that unfreezes and freezes again has it
            module.requires_grad_(step in (0, 5) or modules.index(module) != step % 3)
        if step == 6:
            optimizer.param_groups[2]["lr"] = 0.07
        backward(model, optimizer, step)
        companion.grad = torch.linspace(-1, 1, 10) * step
        optimizer.step()
        yield model, optimizer


@pytest.mark.parametrize(
    ("method", "masked"),
    [(method, masked) for method in DENSE for masked in (True, False)]
    # the other methods leave these groups alone while they observe
    + [(method, False) for method in ("bernoulli_zero_grad", "bernoulli_frozen", "dps")],
)
def test_groups_that_train_densely_are_those_of_adamw(method, masked):
    """With numbers of their own, added late, freezing and thawing."""
    make = DENSE.get(method) or functools.partial(METHODS[method], backend="reference")
    ours = grouped(make, lambda group: {**group, "masked": masked})
    for run, twin in zip(ours, grouped(ADAMW, dict), strict=True):
        same_run(run, twin, groups=slice(1, None))
    assert len(set(clocks(run[1]))) == 1 and run[1].param_groups[3]["clock"] == STEPS + 2


def clocks(optimizer):
    own = ("seed", "clock", "phase", "draw", "epoch", "masking")
    return [tuple(group[name] for name in own) for group in optimizer.param_groups]


def pushed(params, optimizer, step, frozen=()):
    """A step with gradients that depend on the step and the place alone."""
    for place, p in enumerate(params):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + place))
        if place in frozen:
            p.grad = None
    optimizer.step()


@every_method
def test_a_frozen_layer_keeps_its_state_and_the_others_do_not_notice(method):
    model, optimizer = started(method)
    twin, other = started(method)
    params, others = list(model.parameters()), list(twin.parameters())
    # steps that train only: a layer that is not observed is not selected from
    train_only = {"topk_repeating": (4, 5), "released": (4, 5), "dps": (6, 7)}.get(method, (4, 6))
    for step in range(9):
        frozen = (0, 1) if step in train_only else ()
        kept = bits([[p, dict(optimizer.state[p])] for p in params[:2]])
        pushed(params, optimizer, step, frozen)
        pushed(others, other, step)
        assert bits(params[2:]) == bits(others[2:])
        if step >= 4:
            assert (kept == bits([[p, dict(optimizer.state[p])] for p in params[:2]])) == bool(frozen)
    assert optimizer.param_groups[0]["clock"] == other.param_groups[0]["clock"] == 9


@every_method
def test_a_group_that_joins_late_shares_the_clock_and_trains_when_its_method_says(method):
    model, optimizer = started(method)
    params = list(model.named_parameters())
    late, exempt = nn.Parameter(torch.ones(40)), nn.Parameter(torch.ones(6))
    for step in range(4):
        pushed([p for _, p in params], optimizer, step)
    optimizer.add_param_group({"params": [("late", late)], "lr": 0.5, "betas": (0.5, 0.6)})
    optimizer.add_param_group({"params": [("exempt", exempt)], "masked": False})
    assert len(set(clocks(optimizer))) == 1
    moved = False
    for step in range(4, 10):
        before = late.detach().clone(), exempt.detach().clone()
        pushed([p for _, p in params] + [late, exempt], optimizer, step)
        still = ~optimizer.mask(late)
        if optimizer.unselected == "frozen" or still.all():
            assert torch.equal(late[still], before[0][still])
        moved |= bool((late != before[0]).any())
        observing = optimizer.policy == REPEATING and step % 3 == 0
        assert torch.equal(exempt, before[1]) == observing
    # one selection for ever was made before it joined
    assert moved == (method not in ("topk_once", "child_tuning_d"))
    twins = [nn.Parameter(p.detach().clone()) for p in (*model.parameters(), late, exempt)]
    names = [*(name for name, _ in params), "late", "exempt"]
    groups = [
        {"params": list(zip(names, twins, strict=True))[:-2]},
        {"params": [("late", twins[-2])], "lr": 0.5, "betas": (0.5, 0.6)},
        {"params": [("exempt", twins[-1])], "masked": False},
    ]
    twin = METHODS[method](groups, **NUMBERS)
    twin.load_state_dict(through_disk(optimizer.state_dict()))
    for step in range(10, 14):
        pushed(twins, twin, step)
        pushed([*model.parameters(), late, exempt], optimizer, step)
        assert bits(twins) == bits([*model.parameters(), late, exempt])
    assert bits(twin.state_dict()) == bits(optimizer.state_dict())


# --- accelerate -------------------------------------------------------------------------------------------

MICRO_BATCHES = 2


@pytest.fixture
def accelerate():
    accelerate = pytest.importorskip("accelerate")
    yield accelerate
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


PER_EPOCH = 3
every_method_there_is = pytest.mark.parametrize(
    ("method", "dtype"),
    [pytest.param(name, dtype, id=f"{name}-{dtype}") for name in METHODS for dtype in DTYPES]
    + [pytest.param(name, torch.float32, id=name) for name in OTHERS],
)


def mixed(method, model, optimizer):
    """The forward half of DPS mix, where it is asked for."""
    return mix_weights(model, optimizer) if method == "dps_mix" else None


def say_epoch(optimizer, step):
    if getattr(optimizer.policy, "every", None) == "epoch":
        optimizer.new_epoch(step // PER_EPOCH)


def prepared(accelerate, method, dtype=torch.float32):
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=MICRO_BATCHES)
    model, optimizer = started(method, dtype)
    mixing = mixed(method, model, optimizer)
    if mixing is not None:
        accelerator.register_for_checkpointing(mixing)
    scheduler = SCHEDULERS["OneCycleLR"](optimizer)
    return accelerator, *accelerator.prepare(model, optimizer, scheduler)


def accelerated_step(run, step):
    accelerator, model, optimizer, scheduler = run
    say_epoch(optimizer.optimizer, step)
    for micro in range(MICRO_BATCHES):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, MICRO_BATCHES * step + micro))
            if accelerator.sync_gradients and not optimizer.optimizer.release_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


@pytest.mark.filterwarnings("ignore")  # accelerate's own imports are not ours to judge
@every_method_there_is
def test_accelerate_trains_as_a_plain_loop(accelerate, method, dtype):
    run = prepared(accelerate, method, dtype)
    model, optimizer = started(method, dtype)
    _mixing = mixed(method, model, optimizer)
    scheduler = SCHEDULERS["OneCycleLR"](optimizer)
    for step in range(STEPS):
        torch.manual_seed(step)  # of mixed weights
        accelerated_step(run, step)
        torch.manual_seed(step)
        say_epoch(optimizer, step)
        optimizer.zero_grad()
        for micro in range(MICRO_BATCHES):
            (loss_of(model, MICRO_BATCHES * step + micro) / MICRO_BATCHES).backward()
        if not optimizer.release_gradients:
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
        assert everything(model, optimizer) == everything(run[1], run[2].optimizer)


@pytest.mark.filterwarnings("ignore")  # accelerate's own imports are not ours to judge
@every_method_there_is
def test_a_run_that_accelerate_interrupts_after_any_step_ends_the_same(accelerate, tmp_path, method, dtype):
    run = prepared(accelerate, method, dtype)
    for step in range(STEPS):
        run[0].save_state(str(tmp_path / str(step)))
        accelerated_step(run, step)
    end = everything(run[1], run[2].optimizer)
    for at in range(STEPS):
        resumed = prepared(accelerate, method, dtype)
        resumed[0].load_state(str(tmp_path / str(at)))
        for step in range(at, STEPS):
            accelerated_step(resumed, step)
        assert everything(resumed[1], resumed[2].optimizer) == end
    # and a run that has come to its end goes back
    for at in (0, STEPS - 2, 2, 1, STEPS // 2):
        resumed[0].load_state(str(tmp_path / str(at)))
        for step in range(at, STEPS):
            accelerated_step(resumed, step)
        assert everything(resumed[1], resumed[2].optimizer) == end


@pytest.mark.filterwarnings("ignore")  # accelerate's own imports are not ours to judge
@every_method
def test_a_step_that_accelerate_skips_might_not_have_been(accelerate, method):
    """accelerate sees the skip, so that schedules wait too. It scales losses on a GPU by itself."""
    plain = accelerate.Accelerator(cpu=True)
    scaled = accelerate.Accelerator(cpu=True)
    scaled.scaler = scaler()
    runs = []
    for accelerator in (plain, scaled):
        model, optimizer = started(method)
        if accelerator is scaled:
            optimizer.attach_scaler(scaled.scaler)
        runs.append(accelerator.prepare(model, optimizer, SCHEDULERS["OneCycleLR"](optimizer)))
    for step in range(STEPS):
        for bad in (True, False):
            model, optimizer, scheduler = runs[1]
            before = everything(model, optimizer.optimizer), scheduler.get_last_lr()
            scaled.backward(loss_of(model, step) * (torch.inf if bad else 1.0))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            assert optimizer.step_was_skipped == bad
            assert ((everything(model, optimizer.optimizer), scheduler.get_last_lr()) == before) == bad
        model, optimizer, scheduler = runs[0]
        plain.backward(loss_of(model, step))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        assert everything(model, optimizer.optimizer) == everything(runs[1][0], runs[1][1].optimizer)
