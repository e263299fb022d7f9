"""Mixed weights are what the formulas say while a layer trains, raw at other times, gone after `remove()`.

DPS is followed by an oracle in float64 NumPy (tests/oracles/dps.py) that is told the draws: they are those of
torch's generator, seeded anew before each forward, in the order of the layers.
"""

import copy
import functools
import io
import os
import re

import numpy as np
import pytest
import torch
from oracles import dps as oracle
from torch import nn
from torch.utils.checkpoint import checkpoint

from sparse_optim import Bernoulli, ChildTuningAdamW, DPSAdamW, MaskedAdamW, Schedule, TopK, param_groups
from sparse_optim.nn import mix_weights, mixout

FIDELITIES = ["paper", "release"]
DENSITY = 0.7


# --- models, and what they draw ---------------------------------------------------------------------------


class Block(nn.Module):
    """Self-attention and a feed-forward part, each with residual and norm; every linear layer runs once."""

    def __init__(self, width=12):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 20), nn.Linear(20, width)

    def forward(self, h):
        q, k, v = self.query(h), self.key(h), self.value(h)
        weights = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1)
        h = self.norm1(h + self.out(weights @ v))
        return self.norm2(h + self.down(torch.tanh(self.up(h))))


class Transformer(nn.Module):
    """Two blocks and a classifier, without dropout."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.embeddings = nn.Embedding(24, 12)
        self.layer = nn.ModuleList(Block() for _ in range(2))
        self.classifier = nn.Linear(12, 3)
        self.use_reentrant = None
        self.to(dtype)

    def forward(self, tokens):
        h = self.embeddings(tokens)
        for layer in self.layer:
            if self.use_reentrant is None:
                h = layer(h)
            else:
                h = checkpoint(layer, h, use_reentrant=self.use_reentrant)
        return self.classifier(h[:, 0])


def batch(number):
    """Eight labelled sentences of six tokens; they come back after four batches."""
    generator = torch.Generator().manual_seed(100 + number % 4)
    tokens = torch.randint(0, 24, (8, 6), generator=generator)
    return tokens, torch.randint(0, 3, (8,), generator=generator)


def loss_of(model, number):
    tokens, labels = batch(number)
    return nn.functional.cross_entropy(model(tokens), labels)


def linear_weights(model):
    """Input features by name of linear weight, in the order in which a forward uses them."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {f"{name}.weight": module.in_features for name, module in linears.items()}


def draws(seed, features, keep):
    """What a forward draws under this seed: a 0/1 vector by name."""
    generator = torch.Generator().manual_seed(seed)
    return {name: (torch.rand(n, generator=generator) < keep).numpy() for name, n in features.items()}


def raw(linear):
    return linear.parametrizations.weight.original


class Net(nn.Module):
    """Two linear layers that mix, and one that an optimizer may leave out."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 2)
        self.to(dtype)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))

    def loss(self, number):
        generator = torch.Generator().manual_seed(number % 5)
        x = torch.randn(7, 6, generator=generator).to(self.head.bias.dtype)
        return (self(x) - x[:, :2]).square().mean()


def groups_of(net):
    named = list(net.named_parameters())
    return [
        {"params": [(n, p) for n, p in named if not n.startswith("head")]},
        {"params": [(n, p) for n, p in named if n.startswith("head")], "masked": False},
    ]


def mixed(fidelity="paper", *, u=3, density=0.6, seed=0, dtype=torch.float32, **options):
    """A net, its optimizer and its handle."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Net(dtype)
    settings = {"lr": 0.05, "weight_decay": 0.1, "fidelity": fidelity, **options}
    optimizer = DPSAdamW(groups_of(net), variant="mix", density=density, update_steps=u, **settings)
    return net, optimizer, mix_weights(net, optimizer, fidelity=fidelity)


def advance(net, optimizer, number, micro_batches=1):
    optimizer.zero_grad()
    for micro in range(micro_batches):
        net.loss(number + micro).backward()
    optimizer.step()


def stage_two(optimizer):
    return optimizer.param_groups[0]["phase"] % 2 == 1


def bits_of(*tensors):
    """Copies to compare later, signed zeros included."""
    return [t.detach().clone().reshape(-1).view(torch.uint8) for t in tensors]


def same_bits(left, right):
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


# --- the oracle -------------------------------------------------------------------------------------------

# in the release the penalty needs u >= 50; every row selects at least three times
FOLLOWED = [
    ("dense", "paper", 10, 65),
    ("dense", "release", 10, 65),
    ("mix", "paper", 10, 65),
    ("mix", "release", 10, 65),
    ("mix", "paper", 50, 260),
    ("mix", "release", 50, 260),
]


@pytest.mark.parametrize(("variant", "fidelity", "u", "steps"), FOLLOWED)
def test_dps_follows_its_oracle(variant, fidelity, u, steps):
    torch.manual_seed(1)
    model, plain = Transformer(), Transformer()
    groups = param_groups(model, method="dps", fidelity=fidelity, weight_decay=0.1)
    features = linear_weights(model)
    follower = oracle.DPS(
        {name: p.detach().numpy().copy() for name, p in model.named_parameters()},
        masked=features,
        variant=variant,
        fidelity=fidelity,
        density=DENSITY,
        u=u,
        lr=2e-3,
        decay={name: group["weight_decay"] for group in groups for name, _ in group["params"]},
    )
    parameters = dict(model.named_parameters())
    optimizer = DPSAdamW(groups, lr=2e-3, variant=variant, density=DENSITY, update_steps=u, fidelity=fidelity)
    if variant == "mix":
        mix_weights(model, optimizer, fidelity=fidelity)
    for number in range(steps):
        columns = draws(number, features, DENSITY)
        weights = {
            name: follower.effective(name, columns[name]) if name in features else w
            for name, w in follower.weights.items()
        }
        grads = gradients_at(plain, weights, number)
        for name in features:
            grads[name] = follower.gradient(name, columns[name], grads[name])
        follower.step(grads, {name: [m] for name, m in columns.items()} if variant == "mix" else None)

        torch.manual_seed(number)
        optimizer.zero_grad()
        loss_of(model, number).backward()
        optimizer.step()
        for name, p in parameters.items():
            mask = optimizer.mask(p).numpy()
            np.testing.assert_array_equal(mask, follower.trained[name], err_msg=f"{name} after {number}")
            # a step moves a weight by about lr = 2e-3: the absolute part is a millionth of that
            np.testing.assert_allclose(
                p.detach().numpy(),
                follower.weights[name],
                rtol=1e-6,
                atol=2e-9,
                err_msg=f"{name} after {number}",
            )
        if variant == "mix" and number % (2 * u) == u - 1:
            # every factor of the score decides something, so that none could be missing
            squares, counted, penalised = selections_without(follower)
            assert (squares != counted).any()
            assert (counted != penalised).any()
    assert follower.selections >= 3
    # scores are float32 in the package: thresholds that rounding could move would say nothing
    assert follower.gap > 1e-5


def gradients_at(model, weights, number):
    """The gradients of the oracle's trajectory: those of a plain model with these weights."""
    tokens, labels = batch(number)
    leaves = {name: torch.tensor(w, requires_grad=True) for name, w in weights.items()}
    loss = nn.functional.cross_entropy(torch.func.functional_call(model, leaves, (tokens,)), labels)
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {name: g.numpy() for name, g in zip(leaves, grads, strict=True)}


def selections_without(follower):
    """What the last stage would have selected by squares, by squares per count, and with a penalty."""
    probe = copy.copy(follower)
    masks = []
    for rank in (
        lambda g, c: g,
        lambda g, c: g / np.maximum(c, 1),
        lambda g, c: g / np.maximum(c, 1) * np.exp(-c / probe.u),
    ):
        scores = [rank(probe.squares[name], probe.counts[name]) for name in sorted(probe.masked)]
        masks.append(np.concatenate([probe._select(score).ravel() for score in scores]))
    return masks


# --- the effective weight ---------------------------------------------------------------------------------


def moved_linear(p, fidelity="paper", dtype=torch.float64):
    """A linear layer under mixout whose raw weight has left the initial one."""
    linear = nn.Linear(7, 4, dtype=dtype)
    handle = mixout(linear, p, fidelity=fidelity)
    initial = raw(linear).detach().clone()
    with torch.no_grad():
        raw(linear).add_(torch.randn_like(initial))
    return linear, initial, handle


@pytest.mark.parametrize("p", [0.1, 0.3, 0.9])
def test_a_draw_is_the_formula_with_one_decision_for_each_input_feature(p):
    linear, initial, _ = moved_linear(p)
    for seed in range(20):
        active = draws(seed, {"weight": 7}, 1 - p)["weight"]
        torch.manual_seed(seed)
        expected = oracle.mix(raw(linear).detach().numpy(), initial.numpy(), active, p)
        np.testing.assert_allclose(linear.weight.detach().numpy(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("p", [0.1, 0.3, 0.9])
def test_the_mean_over_draws_is_the_weight(p):
    linear, initial, _ = moved_linear(p)
    count = 6000
    with torch.no_grad():
        mean = sum(linear.weight for _ in range(count)) / count
    # one draw has variance (W - W0)^2 p / (1 - p)
    sigma = (raw(linear) - initial).abs() * (p / (1 - p) / count) ** 0.5
    assert ((mean - raw(linear)).abs() < 5 * sigma).all()


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_the_mean_over_draws_of_stage_one_is_the_weight(fidelity):
    net, optimizer, handle = mixed(fidelity, u=20, dtype=torch.float64)
    for number in range(15):
        advance(net, optimizer, number)
    assert not stage_two(optimizer)
    initial = torch.as_tensor(handle.state_dict()["weights"]["first.weight"]["initial"])
    count = 6000
    with torch.no_grad():
        mean = sum(net.first.weight for _ in range(count)) / count
    weight = raw(net.first).detach()
    sigma = (weight - initial).abs() * (0.4 / 0.6 / count) ** 0.5
    assert sigma.min() > 0
    assert ((mean - weight).abs() < 5 * sigma).all()


def test_every_forward_draws_anew():
    linear, _, _ = moved_linear(0.5)
    x = torch.randn(3, 7, dtype=torch.float64)
    outputs = {tuple(linear(x).flatten().tolist()) for _ in range(30)}
    assert len(outputs) > 15


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_both_stages_begin_where_the_weight_is(fidelity):
    # equal and not merely close: W - A is zero there
    net, optimizer, _ = mixed(fidelity)
    x = torch.randn(4, 6)
    for number in range(7):
        output, plain = net(x), net.eval()(x)
        net.train()
        if number in (0, 3):
            assert torch.equal(output, plain)
        # the second stage I, at 6, mixes with the weights before training again
        elif number in (2, 6) or fidelity == "release":
            assert not torch.equal(output, plain)
        advance(net, optimizer, number)


def test_stage_two_of_the_release_is_the_formula_with_the_mask_and_the_weight_it_began_with():
    net, optimizer, _ = mixed("release", u=4, dtype=torch.float64)
    for number in range(4):
        advance(net, optimizer, number)
    began = {linear: raw(linear).detach().numpy().copy() for linear in (net.first, net.second)}
    for number in range(4, 8):
        assert stage_two(optimizer)
        state = torch.get_rng_state()
        seen = {linear: linear.weight.detach().numpy() for linear in began}
        assert torch.equal(state, torch.get_rng_state())
        if number > 4:
            for linear, start in began.items():
                mask = optimizer.mask(raw(linear)).numpy()
                assert mask.mean() == pytest.approx(0.6)
                assert (raw(linear).detach().numpy() != start).all()
                expected = oracle.mix(raw(linear).detach().numpy(), start, mask, 0.4)
                np.testing.assert_allclose(seen[linear], expected, rtol=1e-12)
                np.testing.assert_array_equal(seen[linear][~mask], start[~mask])
        advance(net, optimizer, number)
    assert not stage_two(optimizer)


def test_stage_two_of_the_paper_is_the_weight_itself():
    net, optimizer, _ = mixed("paper", u=4)
    for number in range(8):
        advance(net, optimizer, number)
        if stage_two(optimizer):
            assert net.first.weight is raw(net.first)


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_evaluation_uses_the_raw_weight_and_draws_nothing(fidelity):
    net, optimizer, _ = mixed(fidelity)
    x = torch.randn(4, 6)
    for number in range(14):
        advance(net, optimizer, number)
        net.eval()
        plain = Net()
        plain.load_state_dict(
            {re.sub(r"parametrizations\.(\w+)\.original", r"\1", k): v for k, v in net.state_dict().items()}
        )
        state = torch.get_rng_state()
        assert same_bits(bits_of(net(x)), bits_of(plain(x)))
        assert torch.equal(state, torch.get_rng_state())
        net.train()


def test_a_model_in_evaluation_stays_in_evaluation():
    linear = nn.Linear(5, 5).eval()
    mixout(linear, 0.9)
    with torch.no_grad():
        raw(linear).add_(1.0)
    assert linear.weight is raw(linear)
    assert not any(module.training for module in linear.modules())


@pytest.mark.usefixtures("torchs_own_bits")
@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_nothing_is_mixed_when_everything_is_kept(fidelity):
    net, optimizer, handle = mixed(fidelity, density=1.0)
    plain = Net()
    plain.load_state_dict(
        {k.replace("parametrizations.weight.original", "weight"): v for k, v in net.state_dict().items()}
    )
    adamw = torch.optim.AdamW(plain.parameters(), lr=0.05, weight_decay=0.1)
    state = torch.get_rng_state()
    for number in range(10):
        advance(net, optimizer, number)
        advance(plain, adamw, number)
        for linear, other in ((net.first, plain.first), (net.head, plain.head)):
            weight = linear.parametrizations.weight.original if linear is net.first else linear.weight
            assert same_bits(bits_of(weight, linear.bias), bits_of(other.weight, other.bias))
    assert torch.equal(state, torch.get_rng_state())
    assert all(count.sum() == 0 for count in handle.counts().values())


def test_mixout_with_probability_zero_is_no_mixout():
    linear, _, _ = moved_linear(0.0)
    state = torch.get_rng_state()
    assert linear.weight is raw(linear)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_stay_in_their_dtype(dtype):
    linear, _, _ = moved_linear(0.5, dtype=dtype)
    out = linear(torch.randn(2, 7, dtype=dtype))
    out.sum().backward()
    assert out.dtype == linear.weight.dtype == raw(linear).grad.dtype == dtype


def test_autocast_mixes_in_the_precision_of_the_weight():
    linear, initial, _ = moved_linear(0.5, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(0)
        assert linear(torch.randn(2, 7)).dtype == torch.bfloat16
        torch.manual_seed(0)
        weight = linear.weight
    assert weight.dtype == torch.float32
    expected = oracle.mix(raw(linear).detach().numpy(), initial.numpy(), draws(0, {"w": 7}, 0.5)["w"], 0.5)
    np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-5, atol=1e-6)


# --- gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fidelity", "scale"), [("paper", 1 / 0.7), ("release", 1.0)])
def test_the_gradient_of_a_draw_is_masked_and_only_the_papers_is_divided(fidelity, scale):
    linear, _, _ = moved_linear(0.3, fidelity)
    g = torch.randn(4, 7, dtype=torch.float64)
    for seed in range(5):
        torch.manual_seed(seed)
        raw(linear).grad = None
        (linear.weight * g).sum().backward()
        active = torch.as_tensor(draws(seed, {"w": 7}, 0.7)["w"])
        assert torch.equal(raw(linear).grad, g * active * scale)


@pytest.mark.parametrize(("fidelity", "scale"), [("paper", 1 / 0.6), ("release", 1.0)])
def test_the_gradient_under_dps_is_that_of_mixout_in_stage_one_and_masked_in_stage_two(fidelity, scale):
    net, optimizer, _ = mixed(fidelity, u=3)
    g = torch.randn(5, 6)
    firsts = []
    for number in range(7):
        torch.manual_seed(number)
        optimizer.zero_grad()
        (net.first.weight * g).sum().backward()
        seen = raw(net.first).grad.clone()
        if number < 3 or number == 6:
            assert torch.equal(seen, g * torch.as_tensor(draws(number, {"w": 6}, 0.6)["w"]) * scale)
        elif fidelity == "paper":
            assert torch.equal(seen, g)
        else:
            # from the first step of the stage on, which optimizer.mask() does not know before it
            firsts.append(seen)
        advance(net, optimizer, number)
        if firsts and number == 3:
            assert torch.equal(firsts[0], g * optimizer.mask(raw(net.first)))
    assert all(torch.equal(seen, firsts[0]) for seen in firsts)


# --- counts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_counts_are_those_of_the_draws_since_stage_one_began(fidelity, micro_batches, monkeypatch):
    net, optimizer, handle = mixed(fidelity, u=4)
    features = {"first.weight": 6, "second.weight": 5}
    given = []
    set_count = optimizer.set_count
    monkeypatch.setattr(
        optimizer,
        "set_count",
        lambda name, count: (given.append((name, count.clone())), set_count(name, count)),
    )
    direct = {name: np.zeros(n) for name, n in features.items()}
    for number in range(21):
        optimizer.zero_grad()
        for micro in range(micro_batches):
            seed = number * micro_batches + micro
            if not stage_two(optimizer):
                for name, active in draws(seed, features, 0.6).items():
                    direct[name] += active
            torch.manual_seed(seed)
            net.loss(number).backward()
        # neither of these trains
        with torch.no_grad():
            net.loss(number)
        net.eval()
        net.loss(number).backward(inputs=[net.head.bias])
        net.train()
        for name, count in handle.counts().items():
            np.testing.assert_array_equal(count.numpy(), direct[name])
        given.clear()
        optimizer.step()
        if number % 8 == 3:
            assert [name for name, _ in given] == list(features)
            for name, count in given:
                np.testing.assert_array_equal(count.numpy(), direct[name])
        else:
            assert not given
        if number % 8 == 7:
            direct = {name: np.zeros(n) for name, n in features.items()}
            assert all(count.sum() == 0 for count in handle.counts().values())
    assert sum(count.sum() for count in direct.values()) > 0


def test_counts_decide_what_is_selected():
    net, optimizer, handle = mixed("release", u=1, density=0.5)
    for number in range(4):
        # a backward pass of which no gradient is kept
        torch.autograd.grad(net.loss(number), raw(net.first))
    raw(net.first).grad = torch.randn(5, 6)
    squares, count = raw(net.first).grad.square(), handle.counts()["first.weight"]
    assert len(count.unique()) > 2
    optimizer.step()
    optimizer.step()
    # release, and u < 50: no penalty
    expected = (squares / count.clamp(min=1)).flatten().topk(15).indices.sort().values
    assert torch.equal(optimizer.mask(raw(net.first)).flatten().nonzero()[:, 0], expected)
    assert not torch.equal(squares.flatten().topk(15).indices.sort().values, expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_checkpointing_repeats_draws_and_counts_once(fidelity, use_reentrant):
    torch.manual_seed(0)
    model = Transformer()
    again = copy.deepcopy(model)
    again.use_reentrant = use_reentrant
    runs = []
    for net in (model, again):
        groups = param_groups(net, method="dps")
        optimizer = DPSAdamW(groups, lr=1e-2, variant="mix", update_steps=2, fidelity=fidelity)
        handle = mix_weights(net, optimizer, fidelity=fidelity)
        torch.manual_seed(3)
        trace = []
        for number in range(7):
            optimizer.zero_grad()
            loss = loss_of(net, number)
            loss.backward()
            trace += [loss, *(p.grad for p in net.parameters()), *handle.counts().values()]
            optimizer.step()
        runs.append(bits_of(*trace))
    assert same_bits(*runs)


def test_a_closure_is_counted_before_the_selection():
    runs = []
    for with_closure in (False, True):
        net, optimizer, _ = mixed("release", u=2)
        torch.manual_seed(5)
        for number in range(8):

            def closure(net=net, optimizer=optimizer, number=number):
                optimizer.zero_grad()
                loss = net.loss(number)
                loss.backward()
                return loss

            if with_closure:
                assert optimizer.step(closure) > 0 if number % 2 else optimizer.step(closure=closure) > 0
            else:
                closure()
                optimizer.step()
        runs.append(bits_of(*net.parameters()))
    assert same_bits(*runs)


def test_a_layer_without_gradient_is_not_counted_and_rests_in_stage_two():
    net, optimizer, _ = mixed("release", u=2)
    for p in (raw(net.first), net.first.bias):
        p.requires_grad_(False)
    before = bits_of(raw(net.first))
    for number in range(7):
        advance(net, optimizer, number)
    assert same_bits(before, bits_of(raw(net.first)))
    assert not optimizer.state.get(raw(net.first), {})


def test_a_step_that_a_scaler_skips_keeps_handle_and_optimizer_together():
    net, optimizer, handle = mixed("release", u=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    applied = 0
    for number in range(9):
        optimizer.zero_grad()
        scaler.scale(net.loss(number)).backward()
        if number in (1, 4):
            net.head.bias.grad[0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        applied += number not in (1, 4)
        assert handle.state_dict()["clock"] == optimizer.param_groups[0]["clock"] == applied


# --- which layers, and whose parameters -------------------------------------------------------------------


def is_mixed(module):
    return nn.utils.parametrize.is_parametrized(module)


def test_the_usual_layers_are_those_that_the_optimizer_masks():
    net, _, handle = mixed()
    assert [is_mixed(module) for module in (net.first, net.second, net.head)] == [True, True, False]
    assert list(handle.counts()) == ["first.weight", "second.weight"]


def test_layers_can_be_chosen_by_patterns():
    net = Net()
    optimizer = DPSAdamW(net.named_parameters(), variant="mix", update_steps=2)
    mix_weights(net, optimizer, modules=["^sec", "head"])
    assert [is_mixed(module) for module in (net.first, net.second, net.head)] == [False, True, True]


def test_mixout_takes_every_linear_layer_that_trains():
    net = Net()
    net.first.requires_grad_(False)
    mixout(net, 0.2)
    assert [is_mixed(module) for module in (net.first, net.second, net.head)] == [False, True, True]


def test_parameters_stay_the_same_objects_under_cleaned_names():
    # masks are drawn by name: an optimizer built before mixing and one built after agree
    net = Net()
    before = [id(p) for p in net.parameters()]
    masks = []
    first = ChildTuningAdamW(param_groups(net), variant="F", keep=0.5)
    mixout(net, 0.5)
    assert sorted(before) == sorted(id(p) for p in net.parameters())
    for optimizer in (first, ChildTuningAdamW(param_groups(net), variant="F", keep=0.5)):
        advance(net, optimizer, 0)
        masks.append([optimizer.mask(p) for p in (raw(net.first), net.first.bias, raw(net.head))])
    assert all(torch.equal(a, b) for a, b in zip(*masks, strict=True))
    assert not masks[0][0].all()


def test_an_optimizer_built_after_another_mixing_was_removed_or_stays_elsewhere_works():
    net = Net()
    handle = mixout(net, 0.5, modules=["first"])
    optimizer = DPSAdamW(net.named_parameters(), lr=0.05, variant="mix", density=0.5, update_steps=2)
    own = mix_weights(net, optimizer, modules=["second"])
    handle.remove()
    for number in range(6):
        advance(net, optimizer, number)
    assert 0 < own.counts()["second.weight"].max() <= 2


def test_snapshots_follow_the_model_and_stay_out_of_its_state_dict():
    net, optimizer, handle = mixed("release", u=1)
    advance(net, optimizer, 0)
    assert set(net.state_dict()) == {
        "first.bias", "first.parametrizations.weight.original", "second.bias",
        "second.parametrizations.weight.original", "head.weight", "head.bias",
    }  # fmt: skip
    assert not list(net.buffers())
    net.double()
    memory = handle.state_dict()["weights"]["first.weight"]
    assert {name: tensor.dtype for name, tensor in memory.items()} == {
        "initial": torch.float64, "start": torch.float64, "count": torch.float32,
    }  # fmt: skip
    assert net.first.weight.dtype == torch.float64


def test_the_second_snapshot_lasts_as_long_as_stage_two_of_the_release():
    for fidelity in FIDELITIES:
        net, optimizer, handle = mixed(fidelity, u=2)
        for number in range(8):
            held = "start" in handle.state_dict()["weights"]["first.weight"]
            assert held == (fidelity == "release" and stage_two(optimizer))
            advance(net, optimizer, number)


def test_a_copy_evaluates_as_the_model_and_does_not_train_or_copy_the_optimizer():
    net, optimizer, _ = mixed("release", u=2)
    for number in range(3):
        advance(net, optimizer, number)
    twin = copy.deepcopy(net)
    x = torch.randn(3, 6)
    assert torch.equal(twin.eval()(x), net.eval()(x))
    assert twin.first.parametrizations.weight[0].stages is net.first.parametrizations.weight[0].stages
    twin.train()
    with pytest.raises(RuntimeError, match=r"must train as itself, got a copy of 'first.weight'; call eval"):
        twin(x)
    single = nn.Linear(3, 3)
    mixout(single, 0.5)
    twin = copy.deepcopy(single)
    with torch.no_grad():
        raw(twin).zero_()
        assert (twin.weight != 0).any()


# --- removal ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fidelity", FIDELITIES)
@pytest.mark.parametrize("steps", [0, 2, 4])
def test_remove_restores_the_model(fidelity, steps):
    net, optimizer, handle = mixed(fidelity, u=3)
    for number in range(steps):
        advance(net, optimizer, number)
    weights = {linear: raw(linear) for linear in (net.first, net.second)}
    bits = bits_of(*weights.values())
    handle.remove()
    plain = Net()
    assert list(net.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in net.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert [name for name, _ in net.named_modules()] == [name for name, _ in plain.named_modules()]
    for linear, weight in weights.items():
        assert linear.weight is weight
        assert type(linear) is nn.Linear
        assert vars(linear).keys() == vars(plain.first).keys()
    assert same_bits(bits, bits_of(*weights.values()))
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    handle.remove()
    state = torch.get_rng_state()
    for number in range(8):
        advance(net, optimizer, number)
    assert torch.equal(state, torch.get_rng_state())


def test_remove_leaves_other_parametrizations_alone():
    linear = nn.Linear(4, 4)
    nn.utils.parametrize.register_parametrization(linear, "bias", nn.Identity())
    mixout(linear, 0.5).remove()
    assert nn.utils.parametrize.is_parametrized(linear, "bias")
    assert not nn.utils.parametrize.is_parametrized(linear, "weight")


# --- save and resume --------------------------------------------------------------------------------------


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def everything(net, optimizer, handle):
    tensors = [*net.parameters(), *handle.counts().values()]
    tensors += [
        t for p in net.parameters() for t in optimizer.state.get(p, {}).values() if torch.is_tensor(t)
    ]
    return bits_of(*tensors)


@pytest.mark.parametrize("handle_first", [False, True], ids=["optimizer_first", "handle_first"])
@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_a_run_that_stops_after_any_step_ends_as_one_that_does_not(fidelity, handle_first):
    net, optimizer, handle = mixed(fidelity)
    whole, saved = [], []
    for number in range(14):
        advance(net, optimizer, number)
        whole.append(everything(net, optimizer, handle))
        state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "handle": handle.state_dict()}
        saved.append(through_a_file(state | {"rng": torch.get_rng_state()}))
    for stop in range(13):
        # other weights, and so other initial ones: everything comes from the file
        net, optimizer, handle = mixed(fidelity, seed=1)
        net.load_state_dict(saved[stop]["net"])
        loads = [(optimizer, "optimizer"), (handle, "handle")]
        for which, key in reversed(loads) if handle_first else loads:
            which.load_state_dict(saved[stop][key])
        torch.set_rng_state(saved[stop]["rng"])
        for number in range(stop + 1, 14):
            advance(net, optimizer, number)
            assert same_bits(everything(net, optimizer, handle), whole[number]), (
                f"stopped after {stop}: {number}"
            )


def test_a_saved_state_does_not_change_with_the_run():
    net, optimizer, handle = mixed("release", u=2)
    for number in range(3):
        advance(net, optimizer, number)
    state = handle.state_dict()
    kept = copy.deepcopy(state)
    for number in range(9):
        advance(net, optimizer, number)
    for name, memory in kept["weights"].items():
        for key, tensor in memory.items():
            assert torch.equal(state["weights"][name][key], tensor)


def test_mixout_resumes_with_the_initial_weights_of_the_first_run():
    first, initial, handle = moved_linear(0.5)
    second, _, again = moved_linear(0.5)
    again.load_state_dict(through_a_file(handle.state_dict()))
    second.load_state_dict(first.state_dict())
    for linear in (first, second):
        torch.manual_seed(2)
        linear.drawn = linear.weight
    assert torch.equal(first.drawn, second.drawn)
    assert not torch.equal(initial, raw(first))


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_a_checkpoint_loaded_without_the_handles_state_is_an_error(fidelity):
    net, optimizer, handle = mixed(fidelity)
    advance(net, optimizer, 0)
    saved, own = optimizer.state_dict(), handle.state_dict()
    net, optimizer, handle = mixed(fidelity)
    loss = net.loss(0)
    optimizer.load_state_dict(saved)
    message = r"must be at the optimizer's step 1, got 0; give handle.load_state_dict\(\) what was saved"
    with pytest.raises(RuntimeError, match=message):
        net.loss(0)
    loss.backward()
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    net.eval().loss(0)
    handle.load_state_dict(own)
    net.train().loss(0)
    optimizer.step()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(keep=0.5), r"the saved keep must be this handle's 0.6, got 0.5; mix the weights"),
        (
            lambda s: s.update(fidelity="release"),
            "the saved fidelity must be this handle's 'paper', got 'release'",
        ),
        (lambda s: s["weights"].pop("first.weight"), "got 'first.weight' in one alone; mix the same layers"),
        (
            lambda s: s["weights"]["second.weight"].update(count=torch.zeros(6)),
            r"saved count of 'second.weight' must have shape \(5,\), got \(6,\); load",
        ),
        (
            lambda s: s["weights"]["second.weight"].update(initial=torch.zeros(6, 5)),
            r"saved initial of 'second.weight' must have shape \(5, 5\), got \(6, 5\); load",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_an_error_before_anything_changes(change, message):
    net, optimizer, handle = mixed()
    advance(net, optimizer, 0)
    before = copy.deepcopy(handle.state_dict())
    state = copy.deepcopy(before)
    for memory in state["weights"].values():
        memory["initial"] += 1
    change(state)
    with pytest.raises(ValueError, match=message):
        handle.load_state_dict(state)
    after = handle.state_dict()
    assert after["clock"] == before["clock"]
    for name, memory in before["weights"].items():
        assert all(torch.equal(after["weights"][name][key], tensor) for key, tensor in memory.items())


# --- errors: value, need, remedy --------------------------------------------------------------------------


def tied_to_embedding():
    net = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5)})
    net["head"].weight = net["embed"].weight
    return net


def tied_layers():
    net = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    net["b"].weight = net["a"].weight
    return net


def parametrized():
    net = Net()
    nn.utils.parametrize.register_parametrization(net.first, "weight", nn.Identity())
    return net


def twice():
    net = Net()
    mixout(net, 0.5)
    return net


MIXOUT_ERRORS = {
    "p_is_one": (Net, {"p": 1.0}, ValueError, r"p must be in \[0, 1\), got 1.0; the share of features"),
    "p_is_negative": (Net, {"p": -0.1}, ValueError, r"p must be in \[0, 1\), got -0.1"),
    "p_is_nan": (Net, {"p": float("nan")}, ValueError, r"p must be in \[0, 1\), got nan"),
    "p_is_text": (Net, {"p": "0.1"}, ValueError, r"p must be in \[0, 1\), got '0.1'"),
    "p_is_bool": (Net, {"p": False}, ValueError, r"p must be in \[0, 1\), got False"),
    "fidelity": (Net, {"fidelity": "code"}, ValueError, "fidelity must be 'paper' or 'release', got 'code'"),
    "string": (Net, {"modules": "first"}, TypeError, r"list of patterns, got 'first'; write \['first'\]"),
    "no_match": (Net, {"modules": ["first", "3rd"]}, ValueError, "got '3rd', which finds none of 3; patt"),
    "no_regex": (Net, {"modules": ["("]}, ValueError, r"be regular expressions, got '\(' \(.*\); escape"),
    "no_patterns": (Net, {"modules": []}, ValueError, "weights require a gradient, got none in Net; other"),
    "no_linear": (lambda: nn.Conv1d(2, 2, 2), {}, ValueError, "got none in Conv1d; other kinds of layers"),
    "frozen": (
        lambda: Net().requires_grad_(False), {"modules": ["first"]}, ValueError,
        "whose weights require a gradient, got 'first'; leave the layer out",
    ),
    "tied_to_embedding": (tied_to_embedding, {}, ValueError, "got 'embed' and 'head', which do; untie"),
    "tied_layers": (tied_layers, {}, ValueError, "must not share weights, got 'a' and 'b', which do; untie"),
    "parametrized": (parametrized, {}, ValueError, "got 'first', which is parametrized already; remove that"),
    "twice": (twice, {}, ValueError, "must have plain weights, got 'first', which is parametrized already"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "options", "kind", "message"), MIXOUT_ERRORS.values(), ids=MIXOUT_ERRORS)
def test_mixout_refuses_before_it_changes_anything(make, options, kind, message):
    net = make()
    names, state = [name for name, _ in net.named_modules()], torch.get_rng_state()
    with pytest.raises(kind, match=message):
        mixout(net, **{"p": 0.5, **options})
    assert names == [name for name, _ in net.named_modules()]
    assert torch.equal(state, torch.get_rng_state())


def dps(net, **options):
    return DPSAdamW(net.named_parameters(), **{"variant": "mix", "update_steps": 2, **options})


MIX_ERRORS = {
    "adamw": (lambda n: torch.optim.AdamW(n.parameters()), {}, TypeError, r"='mix'\), got AdamW; pass"),
    "dense": (lambda n: dps(n, variant="dense"), {}, ValueError, r"got policy=TopK.*; construct it"),
    "bernoulli": (
        lambda n: MaskedAdamW(n.named_parameters(), policy=Bernoulli(0.5)), {}, ValueError,
        "got policy=Bernoulli.*; construct it with variant='mix'",
    ),
    "once": (
        lambda n: MaskedAdamW(
            n.named_parameters(), policy=TopK(0.5, dps(n).policy.statistic, schedule=Schedule(observe=2))
        ),
        {}, ValueError, "got policy=TopK.*; construct it with variant='mix'",
    ),
    "release_optimizer": (
        lambda n: dps(n, fidelity="release"), {}, ValueError,
        "when fidelity='paper', got unselected='zero_grad'; give mix_weights",
    ),
    "unnamed": (
        lambda n: DPSAdamW(n.parameters(), variant="mix", update_steps=2), {}, ValueError,
        "must know the names of its parameters, got unnamed ones; build it from param_groups",
    ),
    "fidelity": (dps, {"fidelity": None}, ValueError, "fidelity must be 'paper' or 'release', got None; "),
    "not_masked": (
        lambda n: DPSAdamW(groups_of(n), variant="mix", update_steps=2), {"modules": ["head"]}, ValueError,
        "whose weights the optimizer masks, got 'head'; leave the layer out",
    ),
    "another_models": (lambda n: dps(Net()), {}, ValueError, "the optimizer masks, got none in Net; other"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "options", "kind", "message"), MIX_ERRORS.values(), ids=MIX_ERRORS)
def test_mix_weights_refuses_before_it_changes_anything(make, options, kind, message):
    net = Net()
    optimizer = make(net)
    with pytest.raises(kind, match=message):
        mix_weights(net, optimizer, **options)
    assert not any(is_mixed(module) for module in net.modules())
    assert not optimizer._optimizer_step_pre_hooks


def test_mix_weights_refuses_tied_weights_that_it_would_take():
    net = tied_to_embedding()
    with pytest.raises(ValueError, match="must not share weights, got 'embed' and 'head', which do"):
        mix_weights(net, dps(net))


def test_a_weight_that_the_optimizer_lost_is_an_error():
    net, optimizer, _ = mixed("release", u=1)
    advance(net, optimizer, 0)
    net.first.parametrizations.weight.original = nn.Parameter(raw(net.first).detach().clone())
    with pytest.raises(ValueError, match="param must be a parameter of this optimizer"):
        net.loss(1)


# --- beyond one process, and a real model -----------------------------------------------------------------


def run_rank(rank, folder, fidelity):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(os.path.join(folder, "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    net, optimizer, handle = mixed(fidelity, u=3)
    wrapped = nn.parallel.DistributedDataParallel(net)
    torch.manual_seed(rank)
    seen = []
    for _ in range(10):
        optimizer.zero_grad()
        x = torch.randn(7, 6)
        (wrapped(x) - x[:, :2]).square().mean().backward()
        counts = handle.counts()
        optimizer.step()
        seen.append({"weights": [p.detach().clone() for p in net.parameters()], "counts": counts})
        seen[-1]["masks"] = [optimizer.mask(p) for p in net.parameters()]
    torch.save(seen, os.path.join(folder, f"{rank}.pt"))
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")
def test_two_processes_with_draws_of_their_own_hold_the_same_masks(tmp_path):
    torch.multiprocessing.spawn(run_rank, (str(tmp_path), "release"), nprocs=2)
    left, right = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for a, b in zip(left, right, strict=True):
        assert same_bits(bits_of(*a["weights"], *a["masks"]), bits_of(*b["weights"], *b["masks"]))
    # they did draw on their own, and two selections happened
    assert any(
        not torch.equal(left[2]["counts"][name], right[2]["counts"][name]) for name in left[2]["counts"]
    )
    assert not left[4]["masks"][1].all() or not left[4]["masks"][0].all()


@functools.cache
def bert_settings():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForSequenceClassification, config


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_bert_trains_with_mixed_weights(fidelity, checkpointed):
    kind, config = bert_settings()
    torch.manual_seed(0)
    model = kind(config)
    if checkpointed:
        # older versions have only the name that newer ones warn about
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model.train()
    groups = param_groups(model, method="dps", fidelity=fidelity)
    optimizer = DPSAdamW(groups, lr=2e-3, variant="mix", update_steps=6, fidelity=fidelity)
    handle = mix_weights(model, optimizer, fidelity=fidelity)
    # two encoder layers of six, the pooler and the classifier
    assert len(handle.counts()) == 14
    tokens = torch.randint(0, 40, (16, 8))
    labels = (tokens[:, 1] < 20).long()
    losses = []
    for number in range(30):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        if number == 5:
            assert all((count <= 6).all() and count.any() for count in handle.counts().values())
        optimizer.step()
        losses.append(float(loss.detach()))
    handle.remove()
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert set(model.state_dict()) == set(kind(config).state_dict())
