"""`release_gradients=True`: the same training, bit for bit, with one dense gradient at a time.

What several processes do is in test_two_processes.py.
"""

import copy
import gc
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks.harness import extra_bytes, storages
from sparse_optim import (
    ChildTuningAdamW,
    CountedSquaredGradient,
    MaskedAdamW,
    RandomScore,
    Schedule,
    SecondOrderAdamW,
    SignedGradient,
    SquaredGradient,
    TopK,
    backends,
)
from sparse_optim.gradient_release import ReleasedGradient

CPU = torch.device("cpu")
BACKENDS = [name for name in backends.available(CPU) if name != "triton"]
OBSERVED = 3
# 250 of 1,607 entries
POLICY = TopK(0.156, schedule=Schedule(observe=OBSERVED))
pytestmark = pytest.mark.filterwarnings("error")


class Net(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.first, self.second = nn.Linear(33, 40), nn.Linear(40, 7, bias=False)
        self.to(dtype)

    def forward(self, x):
        return self.second(nn.functional.gelu(self.first(x)))


def build(policy=POLICY, dtype=torch.float32, release=True, **options):
    torch.manual_seed(0)
    model = Net(dtype)
    options = {"lr": 1e-2, "weight_decay": 0.1} | options
    return model, MaskedAdamW(model.named_parameters(), policy=policy, release_gradients=release, **options)


def batch(step, micro=0, dtype=torch.float32):
    return torch.randn(5, 33, generator=torch.Generator().manual_seed(100 * step + micro)).to(dtype)


def backward(model, step, micro_batches=1, scale=1.0):
    dtype = next(model.parameters()).dtype
    for micro in range(micro_batches):
        loss = model(batch(step, micro, dtype)).float().square().mean() / micro_batches
        (loss * scale).backward()


def train(model, optimizer, steps, micro_batches=1):
    for step in steps:
        optimizer.zero_grad()
        backward(model, step, micro_batches)
        optimizer.step()


def everything(model, optimizer):
    """Weights and state, in order."""
    params = list(model.parameters())
    states = [optimizer.state[p] for p in params]
    found = {f"weight {i}": p.detach() for i, p in enumerate(params)}
    for i, state in enumerate(states):
        found |= {f"{key} {i}": value for key, value in state.items() if isinstance(value, torch.Tensor)}
    return found


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype, name
        assert torch.equal(got[name], want[name]), name


# the same training


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("again", [False, True], ids=["once", "again"])
def test_weights_and_state_are_those_of_whole_gradients(backend, dtype, max_grad_norm, micro_batches, again):
    schedule = Schedule(observe=OBSERVED, train=4) if again else Schedule(observe=OBSERVED)
    policy = TopK(0.156, schedule=schedule)
    results = []
    for release in (False, True):
        model, optimizer = build(
            policy, dtype, release, backend=backend, max_grad_norm=max_grad_norm, amsgrad=True, maximize=True
        )
        train(model, optimizer, range(14), micro_batches)
        assert any(type(p.grad) is ReleasedGradient for p in model.parameters()) == release
        results.append(everything(model, optimizer))
    assert_same(results[1], results[0])


def test_published_methods_take_it():
    for method in (
        lambda p, r: ChildTuningAdamW(p, variant="D", observe_steps=2, release_gradients=r),
        lambda p, r: SecondOrderAdamW(p, density=0.1, observe_steps=2, release_gradients=r),
    ):
        results = []
        for release in (False, True):
            torch.manual_seed(0)
            model = Net()
            optimizer = method(model.named_parameters(), release)
            train(model, optimizer, range(5))
            results.append(everything(model, optimizer))
        assert_same(results[1], results[0])


def test_bfloat16_gradients_add_up_in_float32():
    policy, micro_batches, last = TopK(0.3, schedule=Schedule(observe=1)), 16, 4
    results = {}
    for release in (False, True):
        model, optimizer = build(policy, torch.bfloat16, release)
        errors = []
        for step in range(last):
            optimizer.zero_grad()
            backward(model, step, micro_batches)
            if step:
                # the same weights in float32, and the gradient of each batch as bfloat16 has it
                sums = [torch.zeros(p.shape) for p in model.parameters()]
                for micro in range(micro_batches):
                    loss = model(batch(step, micro, torch.bfloat16)).float().square().mean() / micro_batches
                    for total, grad in zip(
                        sums, torch.autograd.grad(loss, list(model.parameters())), strict=True
                    ):
                        total += grad.float()
                for p, total in zip(model.parameters(), sums, strict=True):
                    chosen = optimizer.state[p]["indices"].long()
                    kept = p.grad.kept.values if release else p.grad.float().view(-1)[chosen]
                    errors.append((kept - total.view(-1)[chosen]).square().sum())
            optimizer.step()
        results[release] = torch.stack(errors).sum()
    assert results[True] == 0
    assert results[False] > 0


def test_bfloat16_follows_the_float32_trajectory_closer_than_with_whole_gradients():
    """Thirty-two micro-batches: bfloat16 sums of gradients lose what float32 sums keep."""

    def run(dtype, release):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(20, 30).to(torch.bfloat16).to(dtype))
        policy = TopK(0.3, statistic=RandomScore(), schedule=Schedule(observe=1))
        optimizer = MaskedAdamW(
            [("weight", weight)], lr=1e-2, eps=1e-3, policy=policy, release_gradients=release
        )
        generator = torch.Generator().manual_seed(1)
        for _ in range(12):
            optimizer.zero_grad()
            for _ in range(32):
                x = torch.randn(8, 30, generator=generator)
                (x @ weight.float().T - x[:, :20]).square().mean().div(32).backward()
            optimizer.step()
        state = optimizer.state[weight]
        chosen = weight.detach().view(-1)[state["indices"].long()]
        return state.get("master", chosen)

    exact = run(torch.float32, False)
    released, whole = ((run(torch.bfloat16, release) - exact).norm() for release in (True, False))
    assert released < 0.5 * whole


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("through", ["optimizer", "model"])
def test_gradients_are_dropped_as_whole_ones_are(set_to_none, through):
    results = []
    for release in (False, True):
        model, optimizer = build(TopK(0.156, schedule=Schedule(observe=2, train=3)), release=release)
        for step in range(11):
            (optimizer if through == "optimizer" else model).zero_grad(set_to_none=set_to_none)
            if step % 4 != 3:
                backward(model, step)
            if step % 4 == 3 and not set_to_none:
                # nothing arrives: a zero gradient
                model.second.weight.grad = None
            optimizer.step()
        results.append(everything(model, optimizer))
    assert_same(results[1], results[0])


def test_without_zero_grad_gradients_go_on_adding_up():
    results = []
    for release in (False, True):
        model, optimizer = build(release=release)
        train(model, optimizer, range(OBSERVED))
        optimizer.zero_grad()
        for step in range(4):
            backward(model, step)
            optimizer.step()
        results.append(everything(model, optimizer))
    assert_same(results[1], results[0])


def shared(model, x):
    return (
        model.second(nn.functional.gelu(model.first(x))).square().mean() + model.first(2 * x).square().mean()
    )


def twice(model, x):
    loss = model(x).square().mean()
    loss.backward(retain_graph=True)
    return loss


def checkpointed(reentrant):
    def loss(model, x):
        x = x.clone().requires_grad_()
        return (
            checkpoint(model, x, use_reentrant=reentrant).square().mean()
            + checkpoint(model, 2 * x, use_reentrant=reentrant).square().mean()
        )

    return loss


@pytest.mark.parametrize(
    "loss",
    [shared, twice, checkpointed(True), checkpointed(False)],
    ids=["shared", "twice", "reentrant", "checkpoint"],
)
def test_a_parameter_may_be_used_and_arrive_several_times(loss):
    results = []
    for release in (False, True):
        model, optimizer = build(release=release)
        for step in range(7):
            optimizer.zero_grad()
            loss(model, batch(step)).backward()
            optimizer.step()
        results.append(everything(model, optimizer))
    assert_same(results[1], results[0])


def test_tied_parameters_have_one_gradient():
    results = []
    for release in (False, True):
        torch.manual_seed(0)
        embedding, head = nn.Embedding(30, 8), nn.Linear(8, 30, bias=False)
        head.weight = embedding.weight
        model = nn.ModuleList([embedding, head])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = MaskedAdamW(model.parameters(), policy=POLICY, release_gradients=release)
        for step in range(6):
            optimizer.zero_grad()
            head(embedding(torch.arange(step, step + 9))).square().mean().backward()
            optimizer.step()
        results.append(everything(model, optimizer))
    assert_same(results[1], results[0])


def test_layers_may_be_frozen_and_thawed_between_steps():
    results = []
    for release in (False, True):
        model, optimizer = build(release=release)
        for step in range(12):
            model.first.weight.requires_grad_(not 4 <= step < 8)
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step()
        results.append(everything(model, optimizer))
    assert_same(results[1], results[0])


def test_a_parameter_that_is_frozen_at_first_is_released_once_it_trains():
    model, optimizer = build(release=False)
    model.first.weight.requires_grad_(False)
    optimizer = MaskedAdamW(model.named_parameters(), policy=TopK(0.3), release_gradients=True)
    model.first.weight.requires_grad_(True)
    backward(model, 0)
    optimizer.observe()
    optimizer.select()
    optimizer.zero_grad()
    for step in range(2):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    assert type(model.first.weight.grad) is ReleasedGradient


def test_groups_that_train_densely_keep_whole_gradients():
    torch.manual_seed(0)
    model = Net()
    groups = [{"params": model.first.parameters()}, {"params": model.second.parameters(), "masked": False}]
    optimizer = MaskedAdamW(groups, policy=POLICY, release_gradients=True)
    train(model, optimizer, range(5))
    assert type(model.first.weight.grad) is ReleasedGradient
    assert type(model.second.weight.grad) is torch.Tensor


def test_hooks_follow_parameters_that_come_later_or_are_replaced():
    model, optimizer = build()
    extra = nn.Parameter(torch.ones(50))
    optimizer.add_param_group({"params": [("extra", extra)]})
    old = model.second.weight
    model.second.weight = optimizer.param_groups[0]["params"][2] = nn.Parameter(old.detach().clone())
    for step in range(5):
        optimizer.zero_grad()
        (model(batch(step)).square().mean() + extra.square().sum()).backward()
        optimizer.step()
    assert type(extra.grad) is ReleasedGradient
    assert type(model.second.weight.grad) is ReleasedGradient
    assert not old._post_accumulate_grad_hooks


def test_a_copied_optimizer_releases_the_gradients_of_its_own_parameters():
    model, optimizer = build()
    train(model, optimizer, range(4))
    model.zero_grad()
    pair = copy.deepcopy((model, optimizer))
    for some_model, some_optimizer in ((model, optimizer), pair):
        train(some_model, some_optimizer, range(4, 7))
        assert type(some_model.first.weight.grad) is ReleasedGradient
    assert_same(everything(*pair), everything(model, optimizer))


# gradient scaling


def train_scaled(release, steps=10, attach=True, policy=POLICY):
    """float16 overflows now and then, in an entry that is not selected."""
    model, optimizer = build(policy, release=release, max_grad_norm=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    if attach:
        optimizer.attach_scaler(scaler)
    skipped = []
    for step in range(steps):
        optimizer.zero_grad()
        for micro in range(2):
            loss = model(batch(step, micro)).square().mean() / 2
            if step in (1, 6) and micro == 0:
                chosen = optimizer.state.get(model.first.weight, {}).get("indices")
                free = next(i for i in range(1320) if chosen is None or i not in chosen.tolist())
                mask = torch.zeros(1320)
                mask[free] = float("inf")
                loss = (
                    loss
                    + (model.first.weight * mask.view(40, 33)).nan_to_num(posinf=1e30, neginf=-1e30).mean()
                )
                loss = loss + (model.first.weight.view(-1)[free] * 3e38) * 3e38
            scaler.scale(loss).backward()
        before = model.first.weight.detach().clone()
        scaler.step(optimizer)
        skipped.append(torch.equal(before, model.first.weight))
        scaler.update()
    return everything(model, optimizer), skipped, scaler.get_scale()


def test_an_attached_scaler_skips_the_steps_that_it_skips_with_whole_gradients():
    want, skipped, scale = train_scaled(False)
    got, skipped_too, scale_too = train_scaled(True)
    assert skipped_too == skipped and scale_too == scale
    assert skipped[6] and not skipped[5]
    assert_same(got, want)


def test_statistics_do_not_count_steps_that_a_scaler_skips():
    policy = TopK(0.156, statistic=SignedGradient(), schedule=Schedule(observe=OBSERVED))
    assert_same(train_scaled(True, policy=policy)[0], train_scaled(False, policy=policy)[0])


def test_a_zeroed_gradient_is_checked_anew():
    for release in (False, True):
        model, optimizer = build(release=release)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        optimizer.attach_scaler(scaler)
        scales = []
        for step in range(8):
            optimizer.zero_grad(set_to_none=False)
            if step != 5:
                scaler.scale(
                    model(batch(step)).square().mean() * (float("inf") if step == 4 else 1)
                ).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        assert scales == [4.0] * 4 + [2.0] * 4


def test_a_scaler_is_attached_before_the_first_micro_batch():
    model, optimizer = build()
    train(model, optimizer, range(OBSERVED))
    scaler = torch.amp.GradScaler("cpu")
    optimizer.zero_grad()
    scaler.scale(model(batch(4)).square().mean()).backward()
    optimizer.attach_scaler(scaler)
    scaler.scale(model(batch(5)).square().mean()).backward()
    with pytest.raises(RuntimeError, match=r"call optimizer\.attach_scaler\(scaler\) before training"):
        scaler.step(optimizer)
    with pytest.raises(TypeError, match=r"must be a torch\.amp\.GradScaler, got 3"):
        optimizer.attach_scaler(3)


def test_a_scaler_that_is_switched_off_changes_nothing():
    policy = TopK(0.156, statistic=SignedGradient(), schedule=Schedule(observe=OBSERVED))
    model, optimizer = build(policy)
    optimizer.attach_scaler(torch.amp.GradScaler("cpu", enabled=False))
    backward(model, 0)
    assert type(model.first.weight.grad) is ReleasedGradient


def test_a_scaler_that_is_not_attached_is_refused():
    with pytest.raises(RuntimeError, match=r"optimizer\.attach_scaler\(scaler\)"):
        train_scaled(True, attach=False)


# state, and an end


def test_stopping_and_going_on_is_going_on(tmp_path):
    policy = TopK(0.156, statistic=SignedGradient(), schedule=Schedule(observe=2, train=3))
    whole_model, whole = build(policy)
    wanted = []
    for step in range(12):
        train(whole_model, whole, [step], micro_batches=2)
        wanted.append(everything(whole_model, whole))
    for stop in range(1, 12):
        model, optimizer = build(policy)
        train(model, optimizer, range(stop), micro_batches=2)
        torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "saved")
        weights, state = torch.load(tmp_path / "saved", weights_only=True)
        model, optimizer = build(policy)
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        train(model, optimizer, range(stop, 12), micro_batches=2)
        assert_same(everything(model, optimizer), wanted[-1])


def test_removing_the_hooks_leaves_the_model_as_it_was():
    model, optimizer = build()
    train(model, optimizer, range(5))
    hookless, other = build(release=False)
    train(hookless, other, range(5))
    optimizer.gradient_release.remove()
    assert optimizer.gradient_release is None and not optimizer.release_gradients
    for p in model.parameters():
        assert p.grad is None and not p._post_accumulate_grad_hooks
    train(model, optimizer, range(5, 8))
    train(hookless, other, range(5, 8))
    assert type(model.first.weight.grad) is torch.Tensor
    assert_same(everything(model, optimizer), everything(hookless, other))


def test_without_its_optimizer_a_model_has_whole_gradients_and_both_are_freed():
    model, optimizer = build()
    train(model, optimizer, range(4))
    model.zero_grad()
    del optimizer
    gc.collect()
    backward(model, 0)
    assert type(model.first.weight.grad) is torch.Tensor


def test_saving_and_copying_a_model_keep_no_hooks(tmp_path):
    model, optimizer = build()
    train(model, optimizer, range(4))
    assert not copy.deepcopy(model).first.weight._post_accumulate_grad_hooks
    torch.save(model.state_dict(), tmp_path / "weights")
    del optimizer


# what is left of a gradient


def trained(**options):
    model, optimizer = build(**options)
    train(model, optimizer, range(OBSERVED))
    optimizer.zero_grad()
    backward(model, 7)
    return model, optimizer


def test_a_released_gradient_says_what_it_is():
    model, _ = trained()
    p = model.first.weight
    assert p.grad.shape == p.shape and p.grad.dtype == p.dtype and p.grad.device == p.device
    entries = p.grad.kept.values.numel()
    assert repr(p.grad) == f"ReleasedGradient({entries} entries kept of (40, 33))"
    assert storages(p.grad.kept.values) == {p.grad.kept.values.data_ptr(): 4 * entries}


@pytest.mark.parametrize("foreach", [None, True])
def test_clipping_with_torch_warns_and_clips_what_is_applied(foreach):
    model, optimizer = trained()
    values = [p.grad.kept.values for p in model.parameters()]
    expected = torch.cat(values).norm()
    with pytest.warns(UserWarning, match="max_grad_norm="):
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3, foreach=foreach)
    torch.testing.assert_close(norm, expected)
    torch.testing.assert_close(torch.cat(values).norm(), torch.tensor(1e-3), rtol=1e-3, atol=0)
    optimizer.step()


def test_a_norm_that_is_only_logged_disturbs_nothing():
    """As transformers.Trainer does it, while a statistic takes the gradients too."""
    policy = TopK(0.156, statistic=SignedGradient(), schedule=Schedule(observe=2))
    results = []
    for logs in (False, True):
        model, optimizer = build(policy)
        for step in range(5):
            optimizer.zero_grad()
            backward(model, step)
            if logs:
                with pytest.warns(UserWarning, match="zero where all of it went into the statistic"):
                    norm = nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
                assert (norm == 0) == (step < 2)
            optimizer.step()
        results.append(everything(model, optimizer))
    assert_same(results[1], results[0])


def test_clipping_values_with_torch_is_that_of_whole_gradients():
    results = []
    for release in (False, True):
        model, optimizer = trained(release=release)
        nn.utils.clip_grad_value_(model.parameters(), 1e-4, foreach=False)
        optimizer.step()
        results.append(everything(model, optimizer))
    assert_same(results[1], results[0])


@pytest.mark.parametrize(
    "use",
    [
        lambda p: p.grad + 1,
        lambda p: p.grad.abs().max(),
        lambda p: p.grad.clone(),
        lambda p: copy.deepcopy(p.grad),
        lambda p: p.grad.add_(torch.ones(2)),
        lambda p: p.grad.mul_(torch.ones_like(p)),
        lambda p: torch.zeros_like(p).copy_(p.grad),
        lambda p: p.grad.to(torch.bfloat16),
        lambda p: torch.zeros_like(p).add_(p.grad),
        lambda p: torch.ones_like(p) + p.grad,
        lambda p: torch.ones_like(p).mul_(p.grad),
        lambda p: torch._foreach_mul_([torch.ones_like(p)], p.grad),
        lambda p: p.data.add_(p.grad),
        lambda p: setattr(p.grad, "data", torch.zeros_like(p)),
        lambda p: p.grad.norm(dim=0),
        lambda p: p.grad.add_(torch.zeros_like(p).to_sparse()),
    ],
)
def test_what_needs_the_other_entries_is_refused(use):
    model, _ = trained()
    with pytest.raises(
        RuntimeError, match=r"gradient of 'first\.weight' was released \(\d+ of its 1320 entries"
    ):
        use(model.first.weight)


def test_a_model_moves_with_gradients_that_a_step_has_used():
    model, optimizer = trained()
    optimizer.step()
    before = [p.detach().clone() for p in model.parameters()]
    model.cpu()
    assert all(type(p.grad) is ReleasedGradient for p in model.parameters())
    model.to(torch.float64)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, b.double()) for p, b in zip(model.parameters(), before, strict=True))
    for p in model.parameters():
        moved = p.to("meta")
        assert moved.device.type == "meta"


def test_a_model_does_not_move_with_gradients_that_a_step_still_needs():
    model, optimizer = trained()
    model.cpu()  # where it is
    with pytest.raises(RuntimeError, match=r"was released .*, so it cannot be moved .* before step\(\) has"):
        model.to(torch.float64)
    optimizer.zero_grad(set_to_none=False)
    model.first.to(torch.float64)


def test_a_program_ends_without_a_word():
    program = """
import torch
from sparse_optim import MaskedAdamW, Schedule, TopK
model = torch.nn.Linear(4, 4)
policy = TopK(0.5, schedule=Schedule(observe=1))
optimizer = MaskedAdamW(model.named_parameters(), policy=policy, release_gradients=True)
for _ in range(3):
    optimizer.zero_grad()
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_a_graph_of_gradients_is_refused():
    model, optimizer = trained()
    for first in (False, True):
        if first:
            optimizer.zero_grad()
        with pytest.raises(
            RuntimeError, match=r"without create_graph=True|gradient of 'second\.weight' was released"
        ):
            model(batch(1)).square().mean().backward(create_graph=True)


def test_a_gradient_that_another_optimizer_released_is_refused():
    model, first = trained()
    second = MaskedAdamW(model.named_parameters(), policy=None)
    weights = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"released for another one; call gradient_release\.remove\(\)"):
        second.step()
    assert all(map(torch.equal, weights, model.parameters()))
    first.gradient_release.remove()
    train(model, second, [8])


def test_gradients_released_before_a_checkpoint_is_loaded_are_refused():
    for statistic in (SquaredGradient(), SignedGradient()):
        model, optimizer = build(TopK(0.156, statistic=statistic, schedule=Schedule(observe=2, train=2)))
        for steps in (1, 3):
            train(model, optimizer, range(steps))
            optimizer.zero_grad()
            saved = copy.deepcopy(optimizer.state_dict())
            backward(model, steps)
            optimizer.load_state_dict(saved)
            if type(model.first.weight.grad) is ReleasedGradient:
                with pytest.raises(RuntimeError, match=r"selected or loaded anew; call zero_grad\(\)"):
                    optimizer.step()
            optimizer.zero_grad()
            train(model, optimizer, [steps])


def test_entries_selected_anew_between_micro_batches_need_a_new_gradient():
    model, optimizer = build(TopK(0.156))
    backward(model, 0)
    optimizer.observe()
    optimizer.select()
    optimizer.zero_grad()
    backward(model, 1)
    kept = [p.grad for p in model.parameters()]
    for p in model.parameters():
        p.grad = None
    with optimizer.gradient_release.paused():
        backward(model, 2)
    optimizer.observe()
    optimizer.select()
    for p, grad in zip(model.parameters(), kept, strict=True):
        p.grad = grad
    with pytest.raises(RuntimeError, match="released before entries were selected or loaded anew"):
        optimizer.step()


def test_gradients_are_whole_only_while_release_is_paused():
    policy = TopK(0.156, statistic=SignedGradient(), schedule=Schedule(observe=2))
    model, optimizer = build(policy)
    with optimizer.gradient_release.paused():
        backward(model, 0)
        assert type(model.first.weight.grad) is torch.Tensor
    optimizer.zero_grad()
    backward(model, 0)
    assert type(model.first.weight.grad) is ReleasedGradient
    with (
        optimizer.gradient_release.paused(),
        pytest.raises(RuntimeError, match="nothing can be added to it any more"),
    ):
        backward(model, 1)
    optimizer.step()
    train(model, optimizer, range(1, 4))
    optimizer.zero_grad(set_to_none=False)
    with optimizer.gradient_release.paused():
        backward(model, 4)
    assert type(model.first.weight.grad) is torch.Tensor


def test_what_a_statistic_has_taken_cannot_be_taken_back():
    """A backward pass that is made again would count twice."""
    policy = TopK(0.156, statistic=SignedGradient(), schedule=Schedule(observe=3))
    for set_to_none in (True, False):
        model, optimizer = build(policy)
        train(model, optimizer, [0])
        optimizer.zero_grad()
        backward(model, 1)
        optimizer.zero_grad(set_to_none=set_to_none)
        before = {name: value.clone() for name, value in everything(model, optimizer).items()}
        with pytest.raises(RuntimeError, match=r"call step\(\) once after what has arrived"):
            backward(model, 1)
        assert_same(everything(model, optimizer), before)


def test_sparse_gradients_are_refused_as_always():
    embedding = nn.Embedding(30, 8, sparse=True)
    optimizer = MaskedAdamW(embedding.parameters(), policy=POLICY, release_gradients=True)
    embedding(torch.arange(4)).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()


def test_a_parameter_that_was_not_observed_needs_no_gradient():
    model, optimizer = build()
    for step in range(5):
        optimizer.zero_grad()
        model(batch(step)).square().mean().backward()
        if step < OBSERVED:
            model.first.bias.grad = None
        optimizer.step()
    assert model.first.bias.grad is None
    assert not optimizer.mask(model.first.bias).any()


def test_negative_zeros_keep_their_sign():
    model, optimizer = trained()
    kept = model.first.weight.grad.kept
    optimizer.zero_grad()
    (model.first.weight * -torch.zeros(40, 33)).sum().backward()
    values = model.first.weight.grad.kept.values
    assert values.shape == kept.values.shape
    assert values.signbit().all() and not values.any()


def test_hooks_of_an_optimizer_that_is_gone_are_taken_off():
    model, optimizer = build()
    for _ in range(3):
        optimizer = MaskedAdamW(model.named_parameters(), policy=POLICY, release_gradients=True)
    assert len(model.first.weight._post_accumulate_grad_hooks) == 1
    del optimizer
    assert not model.first.weight._post_accumulate_grad_hooks


def test_gradients_of_an_earlier_selection_are_refused():
    policy = TopK(0.156, schedule=Schedule(observe=1, train=1))
    model, optimizer = build(policy)
    train(model, optimizer, range(2))
    weights = everything(model, optimizer)
    backward(model, 2)
    with pytest.raises(RuntimeError, match=r"got that of 'first\.weight', .* call zero_grad\(\)"):
        optimizer.step()
    assert_same(everything(model, optimizer), weights)
    train(model, optimizer, range(2, 6))


def test_a_folded_gradient_takes_no_more_after_its_step():
    policy = TopK(0.156, statistic=SignedGradient(), schedule=Schedule(observe=2))
    model, optimizer = build(policy)
    train(model, optimizer, range(1))
    assert "added to the statistic" in repr(model.first.weight.grad)
    with pytest.raises(RuntimeError, match=r"after that step.* call zero_grad\(set_to_none=True\) first"):
        backward(model, 1)
    with pytest.raises(RuntimeError, match=r"call zero_grad\(\) after every step\(\)"):
        optimizer.step()


def test_observing_explicitly_needs_whole_gradients():
    model, optimizer = build(TopK(0.156))
    backward(model, 0)
    assert type(model.first.weight.grad) is torch.Tensor
    optimizer.observe()
    optimizer.select()
    train(model, optimizer, range(3))
    with pytest.raises(RuntimeError, match=r"with optimizer\.gradient_release\.paused\(\):"):
        optimizer.observe()
    optimizer.zero_grad()
    with optimizer.gradient_release.paused():
        backward(model, 3)
    optimizer.observe()
    optimizer.zero_grad()
    train(model, optimizer, range(4, 6))
    # the first of the two steps has selected anew, the second is released again
    assert type(model.first.weight.grad) is ReleasedGradient
    assert "age" in optimizer.state[model.first.weight]


@pytest.mark.parametrize(
    ("options", "got"),
    [
        ({"policy": None}, "policy=None"),
        ({"policy": TopK(1.0)}, "density=1.0"),
        ({"unselected": "zero_grad"}, "unselected='zero_grad'"),
        ({"policy": TopK(0.1, schedule=Schedule(observe=1, train=1, meanwhile="everything"))}, "everything"),
        ({"differentiable": True}, "differentiable=False"),
    ],
)
def test_ways_to_train_that_need_whole_gradients_are_refused(options, got):
    with pytest.raises(ValueError, match=r"release_gradients=True needs a TopK policy") as error:
        build(**options)
    assert got in str(error.value)


# observing


@pytest.mark.parametrize("statistic", [SignedGradient(), RandomScore()])
def test_statistics_of_sums_take_gradients_as_they_arrive(statistic):
    policy = TopK(0.156, statistic=statistic, schedule=Schedule(observe=OBSERVED))
    model, optimizer = build(policy)
    plain, other = build(policy, release=False)
    for step in range(OBSERVED - 1):
        for some, mine in ((model, optimizer), (plain, other)):
            mine.zero_grad()
            backward(some, step, 3)
        assert all("added to the statistic" in repr(p.grad) for p in model.parameters())
        optimizer.step()
        other.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(optimizer.state[p]["statistic"], other.state[q]["statistic"])


def test_squares_wait_for_the_step():
    model, optimizer = build()
    backward(model, 0, 3)
    assert all(type(p.grad) is torch.Tensor for p in model.parameters())
    whole = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    for p, grad in zip(model.parameters(), whole, strict=True):
        assert torch.equal(optimizer.state[p]["statistic"], grad.square())


def test_squares_of_micro_batches_do_not_wait():
    model, optimizer = build(observe_unit="microbatch")
    squares = [torch.zeros_like(p) for p in model.parameters()]
    for micro in range(3):
        loss = model(batch(0, micro)).square().mean()
        for total, grad in zip(squares, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            total += grad.square()
        model(batch(0, micro)).square().mean().backward()
        assert all(type(p.grad) is ReleasedGradient for p in model.parameters())
    optimizer.step()
    for p, total in zip(model.parameters(), squares, strict=True):
        assert torch.equal(optimizer.state[p]["statistic"], total)


@pytest.mark.parametrize("unit", ["microbatch", "epoch"])
def test_an_observe_unit_that_means_nothing_is_refused(unit):
    with pytest.raises(ValueError, match="observe_unit must be"):
        build(release=unit == "epoch", observe_unit=unit)


def test_gradients_are_dropped_before_entries_are_selected(monkeypatch):
    model, optimizer = build()
    seen = []
    select = TopK.select

    def look(self, *args, **kwargs):
        seen.append([type(p.grad) for p in model.parameters()])
        return select(self, *args, **kwargs)

    monkeypatch.setattr(TopK, "select", look)
    train(model, optimizer, range(OBSERVED))
    assert seen == [[ReleasedGradient] * 3]


# memory


def deep(layers=12, width=128):
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(layers)])


@pytest.mark.parametrize("statistic", [SquaredGradient(), SignedGradient()])
def test_dense_gradients_live_one_at_a_time(statistic):
    model = deep()
    layer = 4 * 128 * 128
    optimizer = MaskedAdamW(
        model.named_parameters(),
        policy=TopK(0.01, statistic=statistic, schedule=Schedule(observe=2)),
        release_gradients=True,
    )
    x = torch.randn(2, 128)

    def once():
        model(x).square().mean().backward()

    once()
    optimizer.step()
    optimizer.zero_grad()
    observing, _ = extra_bytes(once, CPU)
    optimizer.step()
    optimizer.zero_grad()
    training, _ = extra_bytes(once, CPU)
    optimizer.step()
    # the layer that is worked on, its successor before it is dropped, and activations
    assert training < 3 * layer
    assert (observing < 3 * layer) == (statistic == SignedGradient())
    held = storages(*(p.grad.kept.values for p in model.parameters()))
    assert sum(held.values()) == 4 * int(0.01 * 12 * 128 * 128)


def test_selecting_needs_little_more_than_what_it_returns():
    model = deep(2, 1500)
    optimizer = MaskedAdamW(model.parameters(), policy=TopK(0.01))
    model(torch.randn(2, 1500)).square().mean().backward()
    optimizer.observe()
    optimizer.zero_grad()
    extra, _ = extra_bytes(optimizer.select, CPU)
    assert extra < 2 * 4 * int(0.01 * 2 * 1500**2) + (16 << 20)


def test_selecting_anew_frees_what_was_selected_before():
    model = deep(2, 300)
    optimizer = MaskedAdamW(
        model.named_parameters(),
        policy=TopK(0.05, schedule=Schedule(observe=1, train=2)),
        release_gradients=True,
    )
    held = []
    for step in range(13):
        optimizer.zero_grad()
        model(torch.randn(2, 300, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
        if step % 3 == 2:
            gc.collect()
            held.append(sum(storages(dict(optimizer.state)).values()))
    # from the second selection on entries have ages
    assert len(set(held[1:])) == 1
    assert held[-1] == 2 * 4 + int(0.05 * 2 * 300**2) * (4 + 8 + 4)


# faults


def test_a_gradient_that_is_not_a_number_does_what_it_does_whole():
    results = []
    for release in (False, True):
        model, optimizer = trained(release=release)
        model.zero_grad()
        (model(batch(1)).square().mean() + model.first.bias.sum() * float("nan")).backward()
        optimizer.step()
        results.append(everything(model, optimizer))
    for name in results[0]:
        torch.testing.assert_close(results[1][name], results[0][name], rtol=0, atol=0, equal_nan=True)


def test_a_backward_pass_that_fails_halfway_can_be_made_again():
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise ZeroDivisionError

    results = []
    for fails in (False, True):
        model, optimizer = build(TopK(0.156, statistic=SquaredGradient(), schedule=Schedule(observe=1)))
        train(model, optimizer, range(3))
        before = everything(model, optimizer)
        before = {name: value.clone() for name, value in before.items()}
        if fails:
            optimizer.zero_grad()
            with pytest.raises(ZeroDivisionError):
                model.second(Fails.apply(model.first(batch(3)))).square().mean().backward()
            assert model.second.weight.grad is not None and model.first.weight.grad is None
            assert_same(everything(model, optimizer), before)
        train(model, optimizer, range(3, 6))
        results.append(everything(model, optimizer))
    assert_same(results[1], results[0])


@pytest.mark.parametrize("fault", ["histogram", "compact", "remap_"])
@pytest.mark.parametrize("statistic", [SquaredGradient(), SignedGradient()])
def test_a_selection_that_runs_out_of_memory_can_be_made_again(monkeypatch, fault, statistic):
    policy = TopK(0.156, statistic=statistic, schedule=Schedule(observe=2, train=2))
    results = []
    for fails in (False, True):
        model, optimizer = build(policy, backend="reference")
        train(model, optimizer, range(5))
        optimizer.zero_grad()
        backward(model, 5)
        if fails:
            before = {name: value.clone() for name, value in everything(model, optimizer).items()}
            with monkeypatch.context() as patch:

                def out_of_memory(*_, **__):
                    raise torch.OutOfMemoryError("simulated")

                patch.setattr(backends.reference, fault, out_of_memory)
                with pytest.raises(torch.OutOfMemoryError, match="simulated"):
                    optimizer.step()
            after = everything(model, optimizer)
            for name in before:
                if not name.startswith(("statistic", "nonfinite")):
                    assert torch.equal(after[name], before[name]), name
        optimizer.step()
        train(model, optimizer, range(6, 12))
        results.append(everything(model, optimizer))
    assert_same(results[1], results[0])


def test_a_hook_that_runs_out_of_memory_leaves_a_gradient_that_is_whole(monkeypatch):
    model, optimizer = trained(backend="reference")
    optimizer.zero_grad()
    before = everything(model, optimizer)
    before = {name: value.clone() for name, value in before.items()}
    with monkeypatch.context() as patch:

        def out_of_memory(*_, **__):
            raise torch.OutOfMemoryError("simulated")

        patch.setattr(backends.reference, "gather_", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError, match="simulated"):
            backward(model, 3)
    assert_same(everything(model, optimizer), before)
    other, unharmed = trained(backend="reference")
    train(model, optimizer, range(3, 5))
    train(other, unharmed, range(3, 5))
    assert_same(everything(model, optimizer), everything(other, unharmed))


# bounded statistics


def test_bfloat16_statistics_are_half_as_large_and_select_exactly_k():
    model, optimizer = build(statistic_dtype=torch.bfloat16)
    total = sum(p.numel() for p in model.parameters())
    train(model, optimizer, range(OBSERVED - 1))
    assert all(optimizer.state[p]["statistic"].dtype == torch.bfloat16 for p in model.parameters())
    train(model, optimizer, range(OBSERVED - 1, OBSERVED))
    assert sum(optimizer.state[p]["indices"].numel() for p in model.parameters()) == int(0.156 * total)


def test_bfloat16_statistics_do_not_stand_still():
    """A thousand small squares after a large one: rounding to nearest would lose all of them."""
    p = nn.Parameter(torch.zeros(4096))
    policy = TopK(0.5, schedule=Schedule(observe=2000))
    optimizer = MaskedAdamW([("p", p)], policy=policy, statistic_dtype=torch.bfloat16)
    for step in range(1001):
        p.grad = torch.full_like(p, 1.0 if step == 0 else 0.03)
        optimizer.step()
    mean = optimizer.state[p]["statistic"].float().mean()
    torch.testing.assert_close(mean, torch.tensor(1 + 1000 * 0.03**2), rtol=5e-3, atol=0)


def test_bfloat16_statistics_go_on_where_they_stopped(tmp_path):
    policy = TopK(0.156, schedule=Schedule(observe=4, train=3))
    model, optimizer = build(policy, statistic_dtype=torch.bfloat16)
    train(model, optimizer, range(13))
    wanted = everything(model, optimizer)
    for stop in (2, 6, 9):
        model, optimizer = build(policy, statistic_dtype=torch.bfloat16)
        train(model, optimizer, range(stop))
        torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "saved")
        weights, state = torch.load(tmp_path / "saved", weights_only=True)
        model, optimizer = build(policy, statistic_dtype=torch.bfloat16)
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        train(model, optimizer, range(stop, 13))
        assert_same(everything(model, optimizer), wanted)


@pytest.mark.parametrize(
    "options",
    [
        {"statistic_dtype": torch.float16},
        {"statistic_device": "cuda"},
        {"statistic_device": "cpu", "policy": TopK(0.1, statistic=CountedSquaredGradient())},
        {"statistic_dtype": torch.bfloat16, "policy": None, "release": False},
    ],
)
def test_statistics_that_cannot_be_stored_so_are_refused(options):
    with pytest.raises(ValueError, match="statistic_d"):
        build(**options)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("statistic", [SquaredGradient(), SignedGradient()])
def test_statistics_on_the_host_select_as_those_on_the_gpu_do(statistic):
    results = []
    for device in (None, "cpu"):
        torch.manual_seed(0)
        model = Net().cuda()
        policy = TopK(0.156, statistic=statistic, schedule=Schedule(observe=OBSERVED, train=4))
        optimizer = MaskedAdamW(
            model.named_parameters(), policy=policy, statistic_device=device, release_gradients=True
        )
        for step in range(12):
            optimizer.zero_grad()
            model(batch(step).cuda()).square().mean().backward()
            optimizer.step()
            if device and step == 1:
                assert all(optimizer.state[p]["statistic"].device == CPU for p in model.parameters())
        results.append(everything(model, optimizer))
    assert_same(results[1], results[0])


def test_gradients_on_their_way_to_the_host_are_all_added_up():
    from sparse_optim.gradient_release import Waiting

    added = []
    waiting = Waiting(lambda p, grad: added.append((int(p), grad.tolist())))
    for i in range(4):
        waiting.put(torch.tensor(i), torch.full((2,), float(i)))
        assert len(added) == max(0, i)
    waiting.finish()
    assert added == [(i, [float(i)] * 2) for i in range(4)]


# bfloat16 that trains


@pytest.mark.parametrize("release", [False, True])
def test_bfloat16_weights_move_at_a_small_learning_rate(release):
    """torch's AdamW leaves every bfloat16 weight where it was, ours follows float32."""
    steps, lr = 60, 1e-6

    def moved(make, dtype):
        torch.manual_seed(0)
        weight = nn.Parameter((1 + torch.rand(64, 64)).to(torch.bfloat16).to(dtype))
        optimizer = make([("weight", weight)])
        for step in range(steps):
            optimizer.zero_grad()
            noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(step))
            (weight.float() * (1 + noise)).sum().backward()
            optimizer.step()
        return weight.detach(), optimizer.state[weight]

    def plain(params):
        return torch.optim.AdamW([p for _, p in params], lr=lr)

    def ours(params):
        policy = TopK(0.5, statistic=RandomScore(), schedule=Schedule(observe=1))
        return MaskedAdamW(params, lr=lr, policy=policy, release_gradients=release)

    torch.manual_seed(0)
    start = (1 + torch.rand(64, 64)).to(torch.bfloat16)
    stuck, _ = moved(plain, torch.bfloat16)
    assert torch.equal(stuck, start)
    exact, exact_state = moved(ours, torch.float32)
    _, state = moved(ours, torch.bfloat16)
    assert torch.equal(state["indices"], exact_state["indices"])
    chosen = state["indices"].long()
    want = exact.view(-1)[chosen] - start.float().view(-1)[chosen]
    got = state["master"] - start.float().view(-1)[chosen]
    assert want.abs().min() > 0.3 * steps * lr
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05 * float(want.abs().mean()))


def test_stochastic_rounding_moves_dense_bfloat16_weights_as_float32_moves_on_average():
    steps, lr = 100, 1e-5
    torch.manual_seed(0)
    start = (1 + torch.rand(200, 200)).to(torch.bfloat16)
    weight = nn.Parameter(start.clone())
    optimizer = MaskedAdamW(
        [("weight", weight)], lr=lr, weight_decay=0.0, stochastic_rounding=True, state_dtype=torch.float32
    )
    for _ in range(steps):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    mean = float((weight.detach().float() - start.float()).mean())
    # a step of 2**-7 happens with probability lr * 2**7 at each step; three standard errors
    assert abs(mean + steps * lr) < 3 * (steps * lr * 2**-7 / start.numel()) ** 0.5
