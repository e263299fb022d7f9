"""Every published method does what its paper, or its release, says: oracles, invariants, controls.

The oracles (tests/oracles) are float64 NumPy written from descriptions of the methods, followed step by step.
Models are float64 too, so that scores have digits to spare over the float32 statistics of the package.
"""

import io
import itertools
import re
import warnings
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparse_optim import (
    Bernoulli,
    ChildTuningAdamW,
    CountedSquaredGradient,
    CurvatureScaledGradient,
    DPSAdamW,
    GradDropAdamW,
    GradualUnfreezing,
    Lowest,
    Magnitude,
    MaskedAdamW,
    RandomScore,
    Schedule,
    SecondOrderAdamW,
    SignedGradient,
    SquaredGradient,
    Statistic,
    TopK,
    param_groups,
)
from sparse_optim.backends import reference

np = pytest.importorskip("numpy")

from oracles.grad_drop import GradDrop  # noqa: E402
from oracles.second_order import SecondOrder  # noqa: E402

pytestmark = pytest.mark.filterwarnings("error")


# --- a tiny transformer, and models that only have names --------------------------------------------------


class TinyTransformer(nn.Module):
    """Two post-norm encoder layers and a classifier, float64, without dropout."""

    def __init__(self):
        super().__init__()
        self.embeddings = nn.Embedding(24, 16)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True) for _ in range(2)
        )
        self.classifier = nn.Linear(16, 3)
        self.to(torch.float64)

    def forward(self, tokens):
        hidden = self.embeddings(tokens)
        # the fused attention of the CPU cannot be differentiated twice
        with sdpa_kernel(SDPBackend.MATH):
            for layer in self.encoder.layer:
                hidden = layer(hidden)
        return self.classifier(hidden[:, 0])


HEADS = {"classifier.weight", "classifier.bias"}


def batch(number):
    """Eight labelled sentences of six tokens; they come back after four batches."""
    generator = torch.Generator().manual_seed(100 + number % 4)
    tokens = torch.randint(0, 24, (8, 6), generator=generator)
    return tokens, torch.randint(0, 3, (8,), generator=generator)


def loss_of(model, number):
    tokens, labels = batch(number)
    return nn.functional.cross_entropy(model(tokens), labels)


def gradients_at(model, weights, number):
    """The gradients of another trajectory: those of the model with these weights, as NumPy arrays."""
    tokens, labels = batch(number)
    leaves = {name: torch.tensor(w, requires_grad=True) for name, w in weights.items()}
    loss = nn.functional.cross_entropy(torch.func.functional_call(model, leaves, (tokens,)), labels)
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {name: g.numpy() for name, g in zip(leaves, grads, strict=True)}


def start(method, fidelity="paper"):
    """A model, its groups with the method's exemptions, and what an oracle needs to know of both."""
    torch.manual_seed(1)
    model = TinyTransformer()
    # norms and biases away from the ones and zeros that they begin with
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, dtype=p.dtype) * 0.05)
    groups = param_groups(model, method=method, fidelity=fidelity, weight_decay=0.1)
    decay = {name: group["weight_decay"] for group in groups for name, _ in group["params"]}
    heads = {name for group in groups if not group["masked"] for name, _ in group["params"]}
    assert heads == HEADS
    assert set(decay.values()) == {0.0, 0.1}
    # copied: the oracle must not see the model move
    weights = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    return model, groups, {"weights": weights, "decay": decay, "heads": heads}


def assert_same_weights(model, oracle, where):
    for name, p in model.named_parameters():
        # a step moves a weight by about lr = 2e-3: the absolute part is a millionth of that
        np.testing.assert_allclose(
            p.detach().numpy(), oracle.weights[name], rtol=1e-6, atol=2e-9, err_msg=f"{name} after {where}"
        )


LAYERS = 3


def tiny(family):
    """A small transformers model: bert, gpt2 and llama have a fresh head, their "_lm" a tied one."""
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 40, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    if family.startswith("bert"):
        config = transformers.BertConfig(
            **small, hidden_size=8, num_hidden_layers=LAYERS, num_attention_heads=2, intermediate_size=12,
            max_position_embeddings=10, num_labels=3,
        )  # fmt: skip
        kind = (
            transformers.BertForMaskedLM
            if family == "bert_lm"
            else transformers.BertForSequenceClassification
        )
    elif family.startswith("gpt2"):
        config = transformers.GPT2Config(
            **small, n_embd=8, n_layer=LAYERS, n_head=2, n_positions=10, num_labels=3
        )
        kind = (
            transformers.GPT2LMHeadModel
            if family == "gpt2_lm"
            else transformers.GPT2ForSequenceClassification
        )
    else:
        config = transformers.LlamaConfig(
            **small, hidden_size=8, num_hidden_layers=LAYERS, num_attention_heads=2, num_key_value_heads=2,
            intermediate_size=12, max_position_embeddings=10, num_labels=3, tie_word_embeddings=True,
        )  # fmt: skip
        kind = (
            transformers.LlamaForCausalLM
            if family == "llama_lm"
            else transformers.LlamaForSequenceClassification
        )
    return kind(config)


def give_gradients(params, seed=0):
    """Independent normal gradients."""
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def named(shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in shapes.items()
    }


def bits_of(*tensors):
    """Copies to compare later, NaN payloads and signed zeros included."""
    return [t.detach().clone().reshape(-1).view(torch.uint8) for t in tensors]


def same_bits(left, right):
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def masks_of(optimizer, params):
    return {name: optimizer.mask(p) for name, p in params.items()}


# --- the second-order method ------------------------------------------------------------------------------


@pytest.mark.parametrize("fidelity", ["paper", "release"])
@pytest.mark.parametrize(("density", "observe"), [(0.02, 7), (0.3, 12)], ids=["2_percent", "30_percent"])
def test_second_order_follows_its_oracle(fidelity, density, observe):
    model, groups, known = start("second_order", fidelity)
    options = {"lr": 2e-3, "density": density, "fidelity": fidelity}
    optimizer = SecondOrderAdamW(groups, observe_steps=observe, **options)
    oracle = SecondOrder(**known, observe=observe, **options)
    # 2 % of a bias is less than an entry
    warnings.filterwarnings("ignore", "nothing was selected in parameter group")
    for number in range(70):
        optimizer.zero_grad()
        loss_of(model, number).backward()
        if fidelity == "release":
            # its trainer clips the dense gradient before anything else sees it
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        oracle.step(gradients_at(model, oracle.weights, number))
        for name, mask in oracle.masks().items():
            assert np.array_equal(optimizer.mask(model.get_parameter(name)).numpy(), mask), (name, number)
        assert_same_weights(model, oracle, number)
    # float32 statistics could not have gone wrong by rounding, and there was something to select and to leave
    assert oracle.gap > 1e-5
    assert (
        0
        < sum(mask.sum() for mask in oracle.selected.values())
        < sum(m.size for m in oracle.selected.values())
    )


@pytest.mark.parametrize("fidelity", ["paper", "release"])
@pytest.mark.parametrize("curvature", [None, "hutchinson"])
def test_second_order_moves_nothing_while_it_observes(fidelity, curvature):
    model, groups, _ = start("second_order", fidelity)
    optimizer = SecondOrderAdamW(
        groups, lr=0.1, weight_decay=0.5, observe_steps=5, density=0.1, fidelity=fidelity, curvature=curvature
    )
    before = bits_of(*model.parameters())
    for number in range(5):
        optimizer.zero_grad()
        loss = loss_of(model, number)
        if curvature:
            optimizer.observe_curvature(loss)
        loss.backward()
        optimizer.step()
        assert same_bits(bits_of(*model.parameters()), before), number
        assert not any(optimizer.mask(p).any() for p in model.parameters()), number
    optimizer.zero_grad()
    loss_of(model, 5).backward()
    optimizer.step()
    # head and selection both go
    assert not torch.equal(model.classifier.weight.view(torch.uint8), before[-2])
    assert any(optimizer.mask(p).any() for name, p in model.named_parameters() if name not in HEADS)


SHAPES = {"layer.0.weight": (30, 20), "layer.0.bias": (30,), "layer.1.weight": (7, 41), "norm": (3,)}


@pytest.mark.parametrize("density", [0.005, 0.02, 0.29, 0.7])
@pytest.mark.parametrize("fidelity", ["paper", "release"])
def test_second_order_selects_the_documented_number_for_ever(fidelity, density):
    params = named(SHAPES)
    optimizer = SecondOrderAdamW(
        params.items(), lr=0.01, weight_decay=0.1, density=density, observe_steps=3, fidelity=fidelity
    )
    history = []
    for number in range(12):
        give_gradients(params.values(), seed=number)
        optimizer.step()
        history.append(masks_of(optimizer, params))
    counts = {name: int(mask.sum()) for name, mask in history[3].items()}
    if fidelity == "release":
        assert counts == {name: int(density * p.numel()) for name, p in params.items()}
        assert counts["norm"] == (2 if density == 0.7 else 0)
    else:
        assert sum(counts.values()) == int(density * sum(p.numel() for p in params.values()))
    for masks in history[3:]:
        assert all(torch.equal(mask, history[3][name]) for name, mask in masks.items())


@pytest.mark.parametrize("fidelity", ["paper", "release"])
def test_second_order_keeps_no_momentum_of_what_it_does_not_train(fidelity):
    params = named(SHAPES)
    before = {name: p.detach().clone() for name, p in params.items()}
    optimizer = SecondOrderAdamW(
        params.items(), lr=0.01, weight_decay=0.1, density=0.2, observe_steps=2, fidelity=fidelity
    )
    for number in range(10):
        give_gradients(params.values(), seed=number)
        optimizer.step()
        if number < 2:
            continue
        for name, p in params.items():
            mask, state = optimizer.mask(p), optimizer.state[p]
            decayed = before[name] * (1 - 0.01 * 0.1) ** (number - 1)
            if fidelity == "release":
                assert not state["exp_avg"][~mask].any()
                assert not state["exp_avg_sq"][~mask].any()
                assert state["exp_avg"].shape == p.shape
                torch.testing.assert_close(p[~mask], decayed[~mask], rtol=1e-5, atol=1e-7)
            else:
                assert state["exp_avg"].shape == state["exp_avg_sq"].shape == (int(mask.sum()),)
                assert same_bits(bits_of(p[~mask]), bits_of(before[name][~mask]))
            assert (p[mask] != before[name][mask]).all()


def test_second_order_ranks_by_the_signed_sum_not_by_squares():
    # one entry is consistent, the other large and of changing sign
    p = nn.Parameter(torch.zeros(2))
    optimizer = SecondOrderAdamW([p], density=0.5, observe_steps=4)
    for sign in (1, -1, 1, -1):
        p.grad = torch.tensor([-0.1, 3.0 * sign])
        optimizer.step()
    optimizer.step()
    assert optimizer.mask(p).tolist() == [True, False]


def quadratic(gradients, hessian, w, origin):
    """gradients (w - origin) + (w - origin) H (w - origin) / 2."""
    d = w - origin
    return gradients @ d + d @ hessian @ d / 2


QUADRATICS = [(7, 3), (9, 4), (10, 2)]


@pytest.mark.parametrize(("n", "k"), QUADRATICS, ids=[f"{k}_of_{n}" for n, k in QUADRATICS])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("observe", [1, 3], ids=["one_batch", "three_batches"])
def test_curvature_selects_the_optimal_set_of_a_quadratic(n, k, seed, observe):
    """With a diagonal positive Hessian the best k entries to train are those with the largest g^2 / h."""
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(observe, n, generator=generator, dtype=torch.float64)
    curvatures = torch.randn(observe, n, generator=generator, dtype=torch.float64).mul(1.5).exp()
    origin = torch.randn(n, generator=generator, dtype=torch.float64)
    # two tensors, so that the selection is global
    params = [nn.Parameter(origin[:3].clone()), nn.Parameter(origin[3:].clone())]
    optimizer = SecondOrderAdamW(
        params, lr=0.01, density=(k + 0.5) / n, observe_steps=observe, curvature="hutchinson", seed=seed
    )
    for g, h in zip(gradients, curvatures, strict=True):
        optimizer.zero_grad()
        loss = quadratic(g, torch.diag(h), torch.cat(params), origin)
        optimizer.observe_curvature(loss)
        loss.backward()
        optimizer.step()
    give_gradients(params)
    optimizer.step()
    selected = set(torch.cat([optimizer.mask(p) for p in params]).nonzero().flatten().tolist())

    # the loss that the batches stand for
    g, hessian = gradients.mean(0), torch.diag(curvatures.mean(0))

    def best_loss_within(subset):
        index = torch.tensor(subset)
        w = origin.clone()
        w[index] -= torch.linalg.solve(hessian[index][:, index], g[index])
        return float(quadratic(g, hessian, w, origin))

    brute_force = min(itertools.combinations(range(n), k), key=best_loss_within)
    closed_form = (g.square() / curvatures.mean(0)).topk(k).indices.tolist()
    assert selected == set(brute_force) == set(closed_form)


def test_curvature_matters_in_the_quadratics_above():
    """The rule without curvature must not pass the test above by chance."""
    differs = 0
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        g = torch.randn(1, 9, generator=generator, dtype=torch.float64)[0]
        h = torch.randn(1, 9, generator=generator, dtype=torch.float64)[0].mul(1.5).exp()
        differs += set((g.square() / h).topk(4).indices.tolist()) != set(g.abs().topk(4).indices.tolist())
    assert differs >= 3


def test_curvature_is_an_unbiased_estimate_of_the_diagonal():
    generator = torch.Generator().manual_seed(3)
    root = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    hessian = root @ root.T
    p = nn.Parameter(torch.randn(3, 4, generator=generator, dtype=torch.float64))
    optimizer = SecondOrderAdamW([p], density=0.5, observe_steps=5, curvature="hutchinson")
    draws = 600
    for _ in range(draws):
        optimizer.observe_curvature(p.flatten() @ hessian @ p.flatten() / 2)
    estimate = optimizer.state[p]["curvature"].double().flatten() / draws
    # z (H z) = H_ii + sum of +-H_ij: its variance is the sum of squares off the diagonal
    spread = ((hessian.square().sum(1) - hessian.diagonal().square()) / draws).sqrt()
    error = (estimate - hessian.diagonal()).abs() / spread
    assert error.max() < 4
    # fresh signs at each call: equal ones would leave the error of a single draw
    assert error.max() > 1e-3


def test_observing_curvature_leaves_gradients_alone():
    model, groups, _ = start("second_order")
    reference, _, _ = start("second_order")
    optimizer = SecondOrderAdamW(groups, observe_steps=2, curvature="hutchinson")
    # gradients of an earlier micro-batch are there already, but not for the head
    for m in (model, reference):
        loss_of(m, 0).backward()
        m.classifier.weight.grad = None
    loss = loss_of(model, 1)
    held = {
        name: (p.grad, None if p.grad is None else bits_of(p.grad)) for name, p in model.named_parameters()
    }
    optimizer.observe_curvature(loss)
    for name, p in model.named_parameters():
        assert p.grad is held[name][0]
        assert p.grad is None or same_bits(bits_of(p.grad), held[name][1])
    loss.backward()
    loss_of(reference, 1).backward()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
        assert not p.grad.requires_grad


def curved(**options):
    params = named({"weight": (4, 3), "bias": (4,)}, dtype=torch.float64)
    return params, SecondOrderAdamW(params.items(), density=0.5, curvature="hutchinson", **options)


@pytest.mark.parametrize(
    "make",
    [
        lambda params: SecondOrderAdamW(params, observe_steps=2),
        lambda params: DPSAdamW(params, variant="dense", update_steps=2),
        lambda params: GradDropAdamW(params, keep=0.5),
        lambda params: MaskedAdamW(params, policy=GradualUnfreezing()),
        lambda params: MaskedAdamW(params),
    ],
    ids=["second_order_without_it", "dps", "grad_drop", "gradual_unfreezing", "no_policy"],
)
def test_curvature_for_a_policy_that_ignores_it_is_an_error(make):
    params = named({"layer.0.weight": (4, 3)})
    optimizer = make(params.items())
    with pytest.raises(
        RuntimeError, match=r"needs a TopK policy with CurvatureScaledGradient, got policy=.*hutchinson"
    ):
        optimizer.observe_curvature(params["layer.0.weight"].square().sum())


def test_a_loss_without_second_derivative_is_an_error():
    params, optimizer = curved(observe_steps=2)
    with pytest.raises(RuntimeError, match="differentiated twice, got one without second derivatives; leave"):
        optimizer.observe_curvature(sum(p.sum() for p in params.values()))
    assert not optimizer.state


@pytest.mark.parametrize("explicit", [False, True], ids=["by_schedule", "explicit"])
def test_selecting_without_curvature_is_an_error_before_anything_moves(explicit):
    params, optimizer = curved(observe_steps=None if explicit else 1)
    before = bits_of(*params.values())
    give_gradients(params.values())
    if explicit:
        optimizer.observe()
    with pytest.raises(
        RuntimeError, match=r"needs the curvature .* got none for 'weight'; call optimizer.observe_curv"
    ):
        optimizer.step()
    assert same_bits(bits_of(*params.values()), before)
    # what the message asks for repairs it
    optimizer.observe_curvature(sum(p.pow(4).sum() for p in params.values()))
    optimizer.step()
    give_gradients(params.values())
    optimizer.step()
    assert sum(int(optimizer.mask(p).sum()) for p in params.values()) == 8


def test_a_selection_that_lacked_curvature_can_be_made_again():
    """The gradient of the refused step counts once."""

    def run(forgets):
        p = nn.Parameter(torch.linspace(-1, 1, 12))
        policy = TopK(0.25, CurvatureScaledGradient(), schedule=Schedule(observe=2))
        optimizer = MaskedAdamW([p], policy=policy)
        for t in range(3):
            slope = torch.randn(12, generator=torch.Generator().manual_seed(t))
            p.grad = slope.clone()
            if forgets and t == 1:
                optimizer.state[p].pop("curvature")
                before = optimizer.state[p]["statistic"].clone()
                with pytest.raises(RuntimeError, match="observe_curvature"):
                    optimizer.step()
                assert torch.equal(optimizer.state[p]["statistic"], before)
            if t < 2:
                optimizer.observe_curvature((p**4 * slope).sum())
                optimizer.state[p]["curvature"] = torch.arange(1.0, 13.0)
            optimizer.step()
        return p.detach(), optimizer.mask(p)

    (weights, mask), (again, remade) = run(False), run(True)
    assert mask.sum() == 3 and torch.equal(mask, remade) and torch.equal(weights, again)


def test_an_entry_without_curvature_promises_more_than_any_with():
    """g^2 / h grows without bound as h falls to 0, however large g is."""
    p = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = SecondOrderAdamW([p], density=0.5, observe_steps=1, curvature="hutchinson")
    slope = torch.tensor([1.0, 50.0, 1.0, 1.0], dtype=torch.float64)
    hessian = torch.tensor([1.0, 0.0, 2.0, 3.0], dtype=torch.float64)
    loss = (slope * p + hessian * p.square() / 2).sum()
    optimizer.observe_curvature(loss)
    loss.backward()
    optimizer.step()
    optimizer.step()
    assert optimizer.mask(p).tolist() == [True, True, False, False]


# --- GradDrop ---------------------------------------------------------------------------------------------

GRAD_DROPS = {
    f"{granularity}_every_{refresh}": (granularity, refresh)
    for granularity in ("entry", "layer")
    for refresh in ("step", "epoch", 5)
}
grad_drops = pytest.mark.parametrize(("granularity", "refresh"), GRAD_DROPS.values(), ids=GRAD_DROPS)


@pytest.mark.parametrize(
    ("granularity", "refresh", "rescale"),
    [(*variant, False) for variant in GRAD_DROPS.values()]
    + [("entry", "step", True), ("layer", "epoch", True)],
    ids=[*GRAD_DROPS, "entry_every_step_rescaled", "layer_every_epoch_rescaled"],
)
def test_grad_drop_follows_its_oracle(granularity, refresh, rescale):
    model, groups, known = start("grad_drop")
    # an eps that rescaling can be seen against
    options = {"lr": 2e-3, "keep": 0.6, "rescale": rescale, "eps": 1e-3}
    optimizer = GradDropAdamW(groups, granularity=granularity, refresh=refresh, seed=3, **options)
    oracle = GradDrop(**known, **options)
    for number in range(60):
        if number % 7 == 0:
            optimizer.new_epoch()
        optimizer.zero_grad()
        loss_of(model, number).backward()
        optimizer.step()
        masks = {name: optimizer.mask(p).numpy() for name, p in model.named_parameters()}
        oracle.step(gradients_at(model, oracle.weights, number), masks)
        assert_same_weights(model, oracle, number)
        assert all(masks[name].all() for name in HEADS)
    if granularity == "entry":
        trained = np.mean([masks[name].mean() for name in masks if name not in HEADS])
        assert 0.4 < trained < 0.8


# layers 0 to 9 and two modules outside: that all of their decisions agree by chance has probability 2^-12
LAYERED = {f"encoder.layer.{i}.{name}": (6, 5) for i in range(10) for name in ("weight", "bias")}
LAYERED |= {"embeddings.word.weight": (40, 5), "pooler.dense.weight": (5, 5), "pooler.dense.bias": (5,)}


@grad_drops
def test_a_grad_drop_mask_lasts_as_long_as_it_says_and_changes_then(granularity, refresh):
    params = named(LAYERED)
    optimizer = GradDropAdamW(params.items(), keep=0.5, granularity=granularity, refresh=refresh)
    epochs, masks = [], []
    for number in range(30):
        if number in (0, 4, 6, 17):  # epochs of different lengths
            optimizer.new_epoch()
        epochs.append(sum(number >= first for first in (0, 4, 6, 17)))
        give_gradients(params.values(), seed=number)
        optimizer.step()
        masks.append(torch.cat([optimizer.mask(p).flatten() for p in params.values()]))
    draws = {"step": list(range(30)), "epoch": epochs, 5: [number // 5 for number in range(30)]}[refresh]
    for number in range(1, 30):
        assert torch.equal(masks[number], masks[number - 1]) == (draws[number] == draws[number - 1]), number
    assert len({tuple(mask.tolist()) for mask in masks}) == len(set(draws))


def decisions(optimizer, params, draws):
    """For each draw, what was decided about each parameter; every tensor was kept or dropped as a whole."""
    rows = []
    for number in range(draws):
        give_gradients(params.values(), seed=number)
        optimizer.step()
        masks = masks_of(optimizer, params)
        assert all(mask.all() or not mask.any() for mask in masks.values())
        rows.append({name: bool(mask.all()) for name, mask in masks.items()})
    return rows


def units(rows):
    """Names that were decided alike at every draw, as a set of sets."""
    columns = {}
    for name in rows[0]:
        columns.setdefault(tuple(row[name] for row in rows), set()).add(name)
    return {frozenset(names) for names in columns.values()}


# what forms a unit: a numbered layer, or the module that holds the parameter
FAMILIES = {
    "bert": r"bert\.encoder\.layer\.\d+\.",
    "gpt2_lm": r"transformer\.h\.\d+\.",
    "llama_lm": r"model\.layers\.\d+\.",
}


@pytest.mark.parametrize(("family", "layer"), FAMILIES.items(), ids=FAMILIES)
def test_all_tensors_of_a_layer_share_its_decision(family, layer):
    model = tiny(family)
    params = dict(model.named_parameters())
    optimizer = GradDropAdamW(params.items(), keep=0.5, granularity="layer")
    expected = {}
    for name in params:
        found = re.match(layer, name)
        expected.setdefault(found.group() if found else name.rpartition(".")[0], set()).add(name)
    assert sum(bool(re.match(layer, unit)) for unit in expected) == LAYERS
    # two of about 9 units agree on all 20 draws by chance with probability 4e-5
    rows = decisions(optimizer, params, 20)
    assert units(rows) == {frozenset(names) for names in expected.values()}
    kept = sum(row[next(iter(names))] for row in rows for names in expected.values()) / (20 * len(expected))
    assert 0.35 < kept < 0.65
    if family == "bert":
        outside = {unit for unit in units(rows) if not any(".layer." in name for name in unit)}
        assert outside == {
            frozenset({"bert.embeddings.word_embeddings.weight"}),
            frozenset({"bert.embeddings.position_embeddings.weight"}),
            frozenset({"bert.embeddings.token_type_embeddings.weight"}),
            frozenset({"bert.embeddings.LayerNorm.weight", "bert.embeddings.LayerNorm.bias"}),
            frozenset({"bert.pooler.dense.weight", "bert.pooler.dense.bias"}),
            frozenset({"classifier.weight", "classifier.bias"}),
        }


def test_layers_can_be_said_by_a_regular_expression():
    params = named(
        {f"{side}.block_{i}.{x}": (3, 2) for side in ("enc", "dec") for i in "ab" for x in ("w", "v.w")}
    )
    params |= named({"head.w": (2,), "head.b": (2,)})

    def found(layers):
        optimizer = GradDropAdamW(params.items(), keep=0.5, granularity="layer", layers=layers)
        return {tuple(sorted(unit)) for unit in units(decisions(optimizer, params, 40))}

    outside = {("head.b", "head.w")}
    assert found(r"^\w+\.block_\w") == outside | {
        (f"{side}.block_{i}.v.w", f"{side}.block_{i}.w") for side in ("enc", "dec") for i in "ab"
    }
    assert found(r"^(enc|dec)\.") == outside | {
        tuple(sorted(name for name in params if name.startswith(side))) for side in ("enc", "dec")
    }
    # without it no number is found, and the modules that hold the parameters are the layers
    assert found(None) == outside | {(name,) for name in params if not name.startswith("head")}


@pytest.mark.parametrize("granularity", ["entry", "layer"])
def test_a_missing_new_epoch_is_an_error_that_says_so_before_any_weight_moves(granularity):
    params = named(SHAPES)
    before = bits_of(*params.values())
    optimizer = GradDropAdamW(params.items(), keep=0.5, granularity=granularity, refresh="epoch")
    give_gradients(params.values())
    with pytest.raises(
        RuntimeError, match=r"optimizer\.new_epoch\(\) at the start of every epoch.*got no call; call it"
    ):
        optimizer.step()
    assert same_bits(bits_of(*params.values()), before)
    assert not optimizer.state
    optimizer.new_epoch()
    optimizer.step()
    assert not same_bits(bits_of(*params.values()), before)


@pytest.mark.parametrize("unselected", ["frozen", "zero_grad", "track"])
def test_a_step_that_selects_by_itself_is_a_selection_and_a_step(unselected):
    """Also where a parameter is observed for the first time in a later round."""
    runs = []
    for explicitly in (True, False):
        params = named({"first": (6, 4), "second": (5,)})
        policy = TopK(0.5, schedule=Schedule(observe=None))
        optimizer = MaskedAdamW(params.items(), lr=0.1, policy=policy, unselected=unselected)
        for number, observed in enumerate((["first"], [], ["first"], [], ["first", "second"], [])):
            give_gradients(params.values())
            if observed:
                kept = {name: p.grad for name, p in params.items()}
                for name, p in params.items():
                    p.grad = kept[name] if name in observed else None
                optimizer.observe()
                for name, p in params.items():
                    p.grad = kept[name]
                if explicitly:
                    optimizer.select()
            optimizer.step()
            assert number < 4 or optimizer.state[params["second"]]["step"] > 0
        runs.append(bits_of(*params.values()))
    assert same_bits(*runs)


def test_an_epoch_that_is_named_twice_begins_once():
    optimizers = []
    for epochs in ((None, None, None), (0, 0, 1, 1, 1, 2), (None, 1, 2)):
        params = named(SHAPES)
        optimizer = GradDropAdamW(params.items(), keep=0.5, granularity="entry", refresh="epoch")
        for epoch in epochs:
            optimizer.new_epoch(epoch)
        give_gradients(params.values())
        optimizer.step()
        optimizers.append([optimizer.mask(p) for p in params.values()])
    first, *others = optimizers
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    for bad in (-1, 1.0, True, "1"):
        with pytest.raises(ValueError, match=r"^epoch must be an integer from 0 on, got .*; None counts"):
            optimizer.new_epoch(bad)


def test_the_bytes_of_the_state_are_those_of_its_tensors():
    params = named(SHAPES)
    optimizer = GradDropAdamW(params.items(), keep=0.5)
    assert optimizer.state_bytes() == 0
    give_gradients(params.values())
    optimizer.step()
    # two float32 moments, and a float32 step for each parameter
    assert optimizer.state_bytes() == sum(8 * p.numel() + 4 for p in params.values())


@grad_drops
def test_rescaling_under_adamw_is_seen_by_eps_only(granularity, refresh):
    def weights(rescale, eps):
        model, groups, _ = start("grad_drop")
        optimizer = GradDropAdamW(
            groups,
            lr=2e-3,
            eps=eps,
            keep=0.4,
            rescale=rescale,
            granularity=granularity,
            refresh=refresh,
            seed=3,
        )
        for number in range(20):
            if number % 7 == 0:
                optimizer.new_epoch()
            optimizer.zero_grad()
            loss_of(model, number).backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    # steps are 2e-3 long. A smaller eps would train the keys' biases on gradients that are rounding errors
    torch.testing.assert_close(weights(True, 1e-11), weights(False, 1e-11), rtol=0, atol=1e-7)
    assert (weights(True, 1e-2) - weights(False, 1e-2)).abs().max() > 1e-4


@pytest.mark.usefixtures("torchs_own_bits")
@grad_drops
@pytest.mark.parametrize("rescale", [False, True], ids=["as_is", "rescaled"])
def test_grad_drop_that_keeps_everything_is_adamw_bit_for_bit(granularity, refresh, rescale):
    params, expected = named(SHAPES), named(SHAPES)
    optimizer = GradDropAdamW(
        params.items(), lr=0.01, keep=1, granularity=granularity, refresh=refresh, rescale=rescale
    )
    reference = torch.optim.AdamW(expected.items(), lr=0.01)
    for number in range(10):
        if number % 3 == 0:
            optimizer.new_epoch()
        give_gradients(params.values(), seed=number)
        give_gradients(expected.values(), seed=number)
        optimizer.step()
        reference.step()
        assert same_bits(bits_of(*params.values()), bits_of(*expected.values()))
        assert all(optimizer.mask(p).all() for p in params.values())


def test_a_dropped_layer_coasts_on_momentum_and_decays():
    params = named({f"layer.{i}.weight": (4, 3) for i in range(8)})
    optimizer = GradDropAdamW(params.items(), lr=0.01, keep=0.5, granularity="layer", weight_decay=0.1)
    coasted = 0
    seen = set()
    for number in range(6):
        give_gradients(params.values(), seed=number)
        before = {name: p.detach().clone() for name, p in params.items()}
        optimizer.step()
        for name, p in params.items():
            if optimizer.mask(p).all():
                seen.add(name)
            elif name in seen:
                coasted += 1
                moved = p.detach() - before[name]
                assert ((moved + 0.01 * 0.1 * before[name]).abs() > 1e-5).any()
            else:
                torch.testing.assert_close(p.detach(), before[name] * (1 - 0.001))
    assert coasted > 3


# --- gradual unfreezing -----------------------------------------------------------------------------------

STACK = {
    "embeddings.word.weight": (9, 4),
    "embeddings.LayerNorm.weight": (4,),
    "encoder.layer.0.weight": (4, 4),
    "encoder.layer.1.weight": (4, 4),
    "encoder.layer.2.weight": (4, 4),
    # ten comes after two, and not between one and two
    "encoder.layer.10.weight": (4, 4),
    "pooler.weight": (4, 4),
    "classifier.bias": (4,),
}
STAGES = [
    {"pooler.weight", "classifier.bias"},
    {"encoder.layer.10.weight"},
    {"encoder.layer.2.weight"},
    {"encoder.layer.1.weight"},
    {"encoder.layer.0.weight"},
    {"embeddings.word.weight", "embeddings.LayerNorm.weight"},
]


@pytest.mark.parametrize("every", ["epoch", 1, 3])
def test_gradual_unfreezing_trains_the_head_first_and_embeddings_last(every):
    params = named(STACK)
    optimizer = MaskedAdamW(params.items(), lr=0.01, weight_decay=0.1, policy=GradualUnfreezing(every=every))
    epoch_starts = (0, 2, 3, 7, 8, 11)
    for number in range(24):
        stage = number // every if every != "epoch" else sum(number >= first for first in epoch_starts) - 1
        if every == "epoch" and number in epoch_starts:
            optimizer.new_epoch()
        trained = set().union(*STAGES[: stage + 1])
        before = {name: bits_of(p) for name, p in params.items()}
        give_gradients(params.values(), seed=number)
        optimizer.step()
        changed = {name for name, p in params.items() if not same_bits(bits_of(p), before[name])}
        assert changed == trained, (number, stage)
        for name, p in params.items():
            mask = optimizer.mask(p)
            assert mask.all() if name in trained else not mask.any()
            # what does not train yet has no moments to start from
            assert ("exp_avg" in optimizer.state.get(p, {})) == (name in trained)
    assert trained == set(params)


def test_a_layer_that_thaws_starts_as_adamw_would():
    params = named(STACK)
    optimizer = MaskedAdamW(params.items(), lr=0.01, policy=GradualUnfreezing(every=2))
    late = params["encoder.layer.2.weight"]
    twin = nn.Parameter(late.detach().clone())
    reference = torch.optim.AdamW([twin], lr=0.01)
    for number in range(10):
        give_gradients(params.values(), seed=number)
        optimizer.step()
        if number >= 4:
            twin.grad = late.grad.clone()
            reference.step()
        assert same_bits(bits_of(late), bits_of(twin)), number


def test_gradual_unfreezing_refuses_unnamed_parameters_before_any_weight_moves():
    params = list(named(STACK).values())
    before = bits_of(*params)
    optimizer = MaskedAdamW(params, policy=GradualUnfreezing(every=2))
    give_gradients(params)
    with pytest.raises(
        ValueError, match=r"GradualUnfreezing needs named parameters, got none; pass model\.named_param"
    ):
        optimizer.step()
    assert same_bits(bits_of(*params), before)


def test_gradual_unfreezing_says_when_new_epoch_is_missing():
    params = named(STACK)
    optimizer = MaskedAdamW(params.items(), policy=GradualUnfreezing())
    give_gradients(params.values())
    with pytest.raises(RuntimeError, match=r"needs optimizer\.new_epoch\(\)"):
        optimizer.step()


DEPTHS = {
    "bert": (
        r"encoder\.layer\.(\d+)\.",
        {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"},
        r"^bert\.embeddings\.",
    ),
    "gpt2": (
        r"h\.(\d+)\.",
        {"transformer.ln_f.weight", "transformer.ln_f.bias", "score.weight"},
        r"^transformer\.w[tp]e\.",
    ),
    "gpt2_lm": (
        r"h\.(\d+)\.",
        {"transformer.ln_f.weight", "transformer.ln_f.bias"},
        r"^transformer\.w[tp]e\.",
    ),
    "llama": (r"layers\.(\d+)\.", {"model.norm.weight", "score.weight"}, r"^model\.embed_tokens\."),
}


@pytest.mark.parametrize(
    ("family", "layer", "head", "bottom"), [(f, *d) for f, d in DEPTHS.items()], ids=DEPTHS
)
def test_depth_counts_layers_from_the_top(family, layer, head, bottom):
    names = [name for name, _ in tiny(family).named_parameters()]
    depth = GradualUnfreezing().depth(names)
    assert set(depth) == set(names)
    assert {name for name, stage in depth.items() if stage == 0} == head
    for name, stage in depth.items():
        found = re.search(layer, name)
        if found:
            assert stage == LAYERS - int(found.group(1)), name
        elif name not in head:
            assert re.search(bottom, name), name
            assert stage == LAYERS + 1, name


def test_depth_follows_an_override_of_layers():
    names = ["blocks_a.weight", "blocks_b.weight", "embed.weight", "out.weight"]
    depth = GradualUnfreezing(layers=r"^blocks_\w").depth(names)
    assert depth == {"blocks_a.weight": 2, "blocks_b.weight": 1, "embed.weight": 3, "out.weight": 0}


# --- dynamic parameter selection, dense -------------------------------------------------------------------

# no two entries of a tensor tie, and 0.7 n is a whole number in none of them
DPS_SHAPES = {"layer.0.weight": (9, 7), "layer.1.weight": (31, 5), "layer.1.bias": (11,)}


@pytest.mark.parametrize("fidelity", ["paper", "release"])
@pytest.mark.parametrize("u", [1, 2, 3, 5])
def test_dps_alternates_u_dense_steps_and_u_sparse_ones(u, fidelity):
    params = named(DPS_SHAPES)
    optimizer = DPSAdamW(
        params.items(), lr=0.01, variant="dense", update_steps=u, density=0.7, fidelity=fidelity
    )
    rounded = {
        "paper": {"layer.0.weight": 44, "layer.1.weight": 108, "layer.1.bias": 7},
        "release": {"layer.0.weight": 45, "layer.1.weight": 109, "layer.1.bias": 8},
    }[fidelity]
    last = {}
    for t in range(1, 6 * u + 1):
        give_gradients(params.values(), seed=t)
        before = {name: p.detach().clone() for name, p in params.items()}
        optimizer.step()
        observing = -(-t // u) % 2 == 1
        assert optimizer.param_groups[0]["phase"] == t // u  # of the next step
        masks = masks_of(optimizer, params)
        counts = {name: int(mask.sum()) for name, mask in masks.items()}
        assert counts == ({name: p.numel() for name, p in params.items()} if observing else rounded), t
        if not observing:
            # the same selection during all of stage II
            assert t % u == 1 % u or all(torch.equal(mask, last[name]) for name, mask in masks.items()), t
            for name, p in params.items():
                left_alone = p.detach()[~masks[name]] == before[name][~masks[name]]
                # momentum of stage I moves the others in the release
                assert left_alone.all() if fidelity == "paper" else not left_alone.any()
        last = masks


@pytest.mark.parametrize("fidelity", ["paper", "release"])
def test_dps_sums_squares_anew_in_each_stage_one(fidelity):
    u, params = 3, named(DPS_SHAPES)
    optimizer = DPSAdamW(
        params.items(), lr=0.01, variant="dense", update_steps=u, density=0.4, fidelity=fidelity
    )
    sums = {}
    for number in range(4 * 2 * u):
        give_gradients(params.values(), seed=number)
        # first cycles are loud: a sum that is not reset keeps their ranking
        for p in params.values():
            p.grad *= 10.0 ** -(number // (2 * u))
        if number % (2 * u) == 0:
            sums = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in params.items()}
        observing = number % (2 * u) < u
        optimizer.step()
        for name, p in params.items():
            if observing:
                sums[name] += p.grad.double().square()
            else:
                count = int(optimizer.mask(p).sum())
                chosen = set(optimizer.mask(p).flatten().nonzero().flatten().tolist())
                assert chosen == set(sums[name].flatten().topk(count).indices.tolist()), (name, number)
            # dropped at selection, not when the next stage I begins
            held = number % (2 * u) < u - 1
            assert ("statistic" in optimizer.state[p]) == held, (name, number)
            assert ("nonfinite" in optimizer.state[p]) == held, (name, number)


# max_steps of three epochs and the u of the released scripts at their ratio
RELEASED = [(690, 34), (468, 23), (1080, 54), (1605, 80), (1500, 75), (20, 1), (39, 1), (63, 3)]


@pytest.mark.parametrize(("total", "u"), RELEASED, ids=[f"{total}_steps" for total, _ in RELEASED])
def test_update_ratio_gives_the_stages_of_the_scripts(total, u):
    params = named(DPS_SHAPES)
    optimizer = DPSAdamW(params.items(), variant="dense", update_ratio=0.05, total_steps=total)
    assert optimizer.policy.schedule == Schedule(observe=u, train=u, meanwhile="everything")
    same = DPSAdamW(params.items(), variant="dense", update_steps=u)
    assert same.policy == optimizer.policy


BAD_STAGES = {
    "ratio_of_too_few_steps": (
        {"update_ratio": 0.05, "total_steps": 19},
        r"^update_ratio must .* at least one step, got 0 .*0\.05 of 19; raise update_ratio, or give",
    ),
    "total_steps_unknown": (
        {"update_ratio": 0.05, "total_steps": -1},
        r"^update_ratio must .*got 0 steps from 0\.05 of -1; raise update_ratio, or give update_steps",
    ),
    "steps_and_ratio": (
        {"update_ratio": 0.05, "total_steps": 100, "update_steps": 5},
        r"^update_steps must come alone, got 5 with update_ratio=0\.05 and total_steps=100; give one",
    ),
    "steps_and_total": ({"update_steps": 5, "total_steps": 100}, r"^update_steps must come alone, got 5"),
    "steps_and_only_ratio": (
        {"update_steps": 5, "update_ratio": 0.05},
        r"^update_steps must come alone, got 5",
    ),
    "nothing": ({}, r"^update_steps must be given, got none; or give update_ratio=0\.05 and total_steps="),
    "ratio_alone": ({"update_ratio": 0.05}, r"^update_steps must be given, got none; or give update_ratio"),
    "total_alone": ({"total_steps": 100}, r"^update_steps must be given, got none; or give update_ratio"),
    "no_steps": ({"update_steps": 0}, r"^update_steps must be a positive integer, got 0"),
    "half_a_step": ({"update_steps": 0.5}, r"^update_steps must be a positive integer, got 0\.5"),
}


@pytest.mark.parametrize(("options", "message"), BAD_STAGES.values(), ids=BAD_STAGES)
@pytest.mark.parametrize("variant", ["dense", "mix"])
def test_stages_that_cannot_be_are_an_error_with_a_remedy(variant, options, message):
    with pytest.raises(ValueError, match=message):
        DPSAdamW(named(DPS_SHAPES).items(), variant=variant, **options)


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda p: SecondOrderAdamW(p, observe_steps=-3), "observe_steps"),
        (lambda p: ChildTuningAdamW(p, variant="D", observe_steps=-3), "observe_steps"),
        (lambda p: GradDropAdamW(p, keep=0.5, refresh=0), "refresh"),
    ],
    ids=["second_order", "child_tuning_d", "grad_drop"],
)
def test_a_bad_number_of_steps_is_reported_under_the_name_that_was_given(make, argument):
    with pytest.raises(ValueError, match=rf"^{argument} must be"):
        make(named(DPS_SHAPES).items())


@pytest.mark.usefixtures("torchs_own_bits")
@pytest.mark.parametrize("fidelity", ["paper", "release"])
@pytest.mark.parametrize("variant", ["dense", "mix"])
def test_dps_that_keeps_everything_is_adamw_bit_for_bit(variant, fidelity):
    params, expected = named(DPS_SHAPES), named(DPS_SHAPES)
    optimizer = DPSAdamW(
        params.items(), lr=0.01, variant=variant, update_steps=2, density=1.0, fidelity=fidelity
    )
    reference = torch.optim.AdamW(expected.items(), lr=0.01)
    for number in range(9):
        give_gradients(params.values(), seed=number)
        give_gradients(expected.values(), seed=number)
        optimizer.step()
        reference.step()
        assert same_bits(bits_of(*params.values()), bits_of(*expected.values()))
    for p, q in zip(params.values(), expected.values(), strict=True):
        assert set(optimizer.state[p]) == set(reference.state[q])


def state_bytes(optimizer):
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("fidelity", ["paper", "release"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dps_costs_4_bytes_a_weight_more_while_it_observes_and_an_eighth_after(fidelity, dtype):
    shapes = {"layer.0.weight": (70, 67), "layer.1.weight": (33, 129)}
    params, expected = named(shapes, dtype), named(shapes, dtype)
    optimizer = DPSAdamW(params.items(), lr=0.01, variant="dense", update_steps=2, fidelity=fidelity)
    reference = torch.optim.AdamW(expected.items(), lr=0.01)
    n = sum(p.numel() for p in params.values())
    for number in range(8):
        give_gradients(params.values(), seed=number)
        give_gradients(expected.values(), seed=number)
        optimizer.step()
        reference.step()
        extra = (state_bytes(optimizer) - state_bytes(reference)) / n
        # the last step of stage I selects and drops the sum; before the first selection there are no bits
        if number % 4 == 0:
            assert 4.0 <= extra <= 4.2, number
        else:
            assert 0.12 <= extra <= 0.13, number


# --- controls ---------------------------------------------------------------------------------------------

CONTROL_SHAPES = {"a": (31, 20), "b": (31, 20), "c": (7, 3), "d": (5,)}


def selected_by(
    statistic, *, density=0.1, scope="global", seed=0, gradients=0, observe=2, meanwhile="nothing", lr=0.01
):
    """The masks of one selection, and the gradients that were observed before it."""
    params = named(CONTROL_SHAPES)
    optimizer = MaskedAdamW(
        params.items(),
        lr=lr,
        seed=seed,
        policy=TopK(density, statistic, scope=scope, schedule=Schedule(observe=observe, meanwhile=meanwhile)),
    )
    seen = {name: [] for name in params}
    for number in range(observe + 1):
        give_gradients(params.values(), seed=100 * gradients + number)
        if number < observe:
            for name, p in params.items():
                seen[name].append(p.grad.double())
        optimizer.step()
    return masks_of(optimizer, params), {name: torch.stack(grads) for name, grads in seen.items()}


def same_masks(left, right):
    return all(torch.equal(left[name], right[name]) for name in left)


def top(scores, density, scope):
    """The exact top of float64 scores, by sorting."""
    if scope == "tensor":
        return {
            name: top({name: score}, density, "global")[name]
            if int(density * score.numel())
            else score.isnan()
            for name, score in scores.items()
        }
    flat = torch.cat([score.flatten() for score in scores.values()])
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[flat.sort(descending=True, stable=True).indices[: int(density * flat.numel())]] = True
    parts = chosen.split([score.numel() for score in scores.values()])
    return {name: part.view(scores[name].shape) for name, part in zip(scores, parts, strict=True)}


def counts_are_exact(masks, density, scope):
    counts = [int(mask.sum()) for mask in masks.values()]
    if scope == "tensor":
        return counts == [int(density * mask.numel()) for mask in masks.values()]
    return sum(counts) == int(density * sum(mask.numel() for mask in masks.values()))


scopes = pytest.mark.parametrize("scope", ["global", "tensor"])


@scopes
@pytest.mark.parametrize("density", [0.005, 0.1, 0.5, 0.93])
def test_a_random_score_selects_exactly_k_by_its_seed_alone(scope, density):
    masks, _ = selected_by(RandomScore(), density=density, scope=scope)
    assert counts_are_exact(masks, density, scope)
    assert same_masks(selected_by(RandomScore(), density=density, scope=scope)[0], masks)
    other_gradients = selected_by(
        RandomScore(), density=density, scope=scope, gradients=1, observe=3, lr=0.5
    )[0]
    assert same_masks(other_gradients, masks)
    assert not same_masks(selected_by(RandomScore(), density=density, scope=scope, seed=1)[0], masks)
    # tensors of the same shape have masks of their own
    assert not torch.equal(masks["a"], masks["b"])


def test_a_random_score_favours_no_place():
    total = torch.zeros(31, 20)
    for seed in range(60):
        total += selected_by(RandomScore(), density=0.3, scope="tensor", seed=seed, observe=1)[0]["a"]
    # 620 counts of Binomial(60, 0.3): mean 18, standard deviation 3.5
    assert 3 < total.min() < 12
    assert 24 < total.max() < 36
    assert 2.9 < total.std() < 4.2
    for half in (total[:, :10], total[:15]):
        assert abs(half.mean() - 18) < 0.8


@scopes
@pytest.mark.parametrize("meanwhile", ["nothing", "everything"])
def test_magnitude_selects_the_largest_weights_when_observation_begins(scope, meanwhile):
    # with this lr three steps reorder the weights
    masks, _ = selected_by(Magnitude(), scope=scope, meanwhile=meanwhile, lr=0.3, observe=3)
    assert same_masks(
        masks, top({name: p.detach().abs() for name, p in named(CONTROL_SHAPES).items()}, 0.1, scope)
    )
    # not at all what the gradients say
    assert not same_masks(masks, selected_by(SquaredGradient(), scope=scope)[0])


LOWEST = {
    "squares": (SquaredGradient(), lambda g: g.square().sum(0)),
    "signed_sum": (SignedGradient(), lambda g: g.sum(0).abs()),
}


@scopes
@pytest.mark.parametrize(("statistic", "score"), LOWEST.values(), ids=LOWEST)
@pytest.mark.parametrize("density", [0.1, 0.6])
def test_lowest_selects_the_other_end(statistic, score, scope, density):
    masks, seen = selected_by(Lowest(statistic), scope=scope, density=density)
    assert same_masks(masks, top({name: -score(g) for name, g in seen.items()}, density, scope))
    highest, _ = selected_by(statistic, scope=scope, density=density)
    assert same_masks(highest, top({name: score(g) for name, g in seen.items()}, density, scope))
    overlap = sum(int((masks[name] & highest[name]).sum()) for name in masks)
    size = sum(mask.numel() for mask in masks.values())
    assert overlap == 0 if density == 0.1 else abs(overlap - 0.2 * size) < 5


def test_lowest_magnitude_and_lowest_random_score_turn_their_rankings_round():
    weights = {name: p.detach().abs() for name, p in named(CONTROL_SHAPES).items()}
    lowest, _ = selected_by(Lowest(Magnitude()), density=0.25)
    assert same_masks(lowest, top({name: -w for name, w in weights.items()}, 0.25, "global"))
    # the two ends of one permutation share nothing and leave nothing out
    low, high = (
        selected_by(statistic, density=0.5)[0] for statistic in (Lowest(RandomScore()), RandomScore())
    )
    assert all(torch.equal(low[name], ~high[name]) for name in low)


def test_lowest_of_a_curvature_scaled_gradient_selects_the_other_end():
    p = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = MaskedAdamW(
        [p], policy=TopK(0.5, Lowest(CurvatureScaledGradient()), schedule=Schedule(observe=1))
    )
    loss = (p + torch.tensor([1.0, 4.0, 2.0, 3.0], dtype=torch.float64) * p.square() / 2).sum()
    optimizer.observe_curvature(loss)
    loss.backward()
    optimizer.step()
    optimizer.step()
    assert optimizer.mask(p).tolist() == [False, True, False, True]


def test_lowest_of_counted_squares_takes_counts():
    params = named({"weight": (2, 2)})
    optimizer = MaskedAdamW(
        params.items(), policy=TopK(0.5, Lowest(CountedSquaredGradient()), schedule=Schedule(observe=1))
    )
    optimizer.set_count("weight", torch.tensor([1.0, 100.0]))
    params["weight"].grad = torch.tensor([[1.0, 9.0], [2.0, 8.0]])
    optimizer.step()
    optimizer.step()
    assert optimizer.mask(params["weight"]).tolist() == [[False, True], [False, True]]


# --- what reads the gradients -----------------------------------------------------------------------------


@pytest.fixture
def verbs(monkeypatch):
    """Calls of the reference backend's verbs from outside it: (name, keywords)."""
    made, inside = [], []

    def record(name, verb):
        def call(*args, **kwargs):
            if not inside:
                made.append((name, kwargs))
            inside.append(name)
            try:
                return verb(*args, **kwargs)
            finally:
                inside.pop()

        monkeypatch.setattr(reference, name, call)

    for name in ("adamw_", "accumulate_", "histogram"):
        record(name, getattr(reference, name))
    return made


@dataclass(frozen=True)
class OwnUpdate(SquaredGradient):
    """Squares that only it knows how to add."""

    def update(self, statistics, grads, nonfinite, backend):
        for statistic, grad in zip(statistics, grads, strict=True):
            statistic += 4 * grad.square()


@dataclass(frozen=True)
class Absolute(Statistic):
    """A statistic by data alone."""

    accumulates: ClassVar[str] = "absolute"


EVERYTHING_MOVES = Schedule(observe=3, train=1, meanwhile="everything")
TAKEN_ALONG = {
    "squares": (SquaredGradient(), True),
    "clipped": (SquaredGradient(clip_norm=1.0), True),
    "signed": (SignedGradient(), True),
    "absolute": (Absolute(), True),
    "counted": (CountedSquaredGradient(2), True),
    "lowest": (Lowest(SignedGradient()), True),
    "own_update": (OwnUpdate(), False),
    "lowest_of_own_update": (Lowest(OwnUpdate()), False),
    "random": (RandomScore(), False),
    "magnitude": (Magnitude(), False),
}


@pytest.mark.parametrize(("statistic", "along"), TAKEN_ALONG.values(), ids=TAKEN_ALONG)
def test_a_step_that_observes_and_trains_reads_each_gradient_once(statistic, along, verbs):
    body, head = nn.Parameter(torch.zeros(10)), nn.Parameter(torch.zeros(10))
    optimizer = MaskedAdamW(
        [{"params": [("body", body)]}, {"params": [("head", head)], "masked": False}],
        policy=TopK(0.5, statistic, schedule=EVERYTHING_MOVES),
        backend="reference",
    )
    reads = []
    for t in range(4):
        body.grad = head.grad = torch.randn(10, generator=torch.Generator().manual_seed(t))
        verbs.clear()
        optimizer.step()
        reads.append([(name, bool(k.get("statistics"))) for name, k in verbs if name != "histogram"])
    update, both, alone = ("adamw_", False), ("adamw_", True), ("accumulate_", False)
    # the selection of the third step has to be found before anything moves
    assert reads[:2] == [[both, update] if along else [update, update]] * 2
    assert reads[2] == ([alone, update, update] if along else [update, update])
    assert reads[3] == [update, update]


def test_a_statistic_can_have_an_update_of_its_own():
    p = nn.Parameter(torch.zeros(4))
    optimizer = MaskedAdamW([p], policy=TopK(0.5, OwnUpdate(), schedule=EVERYTHING_MOVES))
    for _ in range(2):
        p.grad = torch.tensor([1.0, -2.0, 0.5, 3.0])
        optimizer.step()
    assert optimizer.state[p]["statistic"].tolist() == [8.0, 32.0, 2.0, 72.0]
    for _ in range(2):
        optimizer.step()
    assert optimizer.mask(p).tolist() == [False, True, False, True]


def test_a_statistic_that_says_nothing_about_gradients_is_an_error():
    message = r"^accumulates of Mine must be one of 'squares', 'signed', .*, got {}; .*update\(\)\.$"
    with pytest.raises(TypeError, match=message.format("None")):

        class Mine(Statistic):
            pass

    with pytest.raises(TypeError, match=message.format("'cubes'")):

        class Mine(Statistic):
            accumulates = "cubes"


def test_a_statistic_stays_out_of_a_graph_that_autograd_records():
    p = nn.Parameter(torch.ones(4))
    optimizer = MaskedAdamW(
        [p], policy=TopK(0.5, schedule=EVERYTHING_MOVES), unselected="zero_grad", differentiable=True
    )
    factor = torch.tensor(2.0, requires_grad=True)
    optimizer.param_groups[0]["params"][0] = weight = p.clone()
    weight.grad = factor * torch.arange(4.0)
    optimizer.step()
    assert weight.grad_fn is not None
    assert not optimizer.state[weight]["statistic"].requires_grad


RIDES = {
    "squares": (SquaredGradient(), "global", True),
    "squares_per_tensor": (SquaredGradient(), "tensor", True),
    "clipped": (SquaredGradient(clip_norm=1.0), "tensor", True),
    "signed": (SignedGradient(), "global", True),
    "signed_per_tensor": (SignedGradient(), "tensor", True),
    "lowest": (Lowest(SquaredGradient()), "global", False),
    "counted": (CountedSquaredGradient(2), "tensor", False),
    "own_update": (OwnUpdate(), "global", False),
}


@pytest.mark.parametrize("gap", [False, True], ids=["all_have_gradients", "one_has_none_in_the_end"])
@pytest.mark.parametrize("meanwhile", ["nothing", "everything"])
@pytest.mark.parametrize(("statistic", "scope", "rides"), RIDES.values(), ids=RIDES)
def test_the_first_round_of_a_selection_rides_on_the_last_accumulation(
    statistic, scope, rides, meanwhile, gap, verbs
):
    # the second of three cannot share a call with the others, so rows arrive in another order
    dtypes = (torch.float32, torch.float64, torch.float32)
    params = [nn.Parameter(torch.zeros(30, dtype=dtype)) for dtype in dtypes]
    head = nn.Parameter(torch.zeros(3))
    optimizer = MaskedAdamW(
        [{"params": params}, {"params": [head], "masked": False}],
        policy=TopK(0.4, statistic, scope, Schedule(observe=2, meanwhile=meanwhile)),
        backend="reference",
    )
    sums = [torch.zeros(30) for _ in params]
    for t in range(2):
        for i, p in enumerate(params):
            generator = torch.Generator().manual_seed(10 * t + i)
            # magnitudes that differ by tensor: rows that change places would change every mask
            p.grad = (torch.randn(30, generator=generator) * 10.0**i).to(p.dtype)
            if gap and t == 1 and i == 0:
                p.grad = None
            else:
                g = p.grad.float()
                norm = torch.linalg.vector_norm(g) + 1e-6
                clip = min(1.0, float(1 / norm)) if getattr(statistic, "clip_norm", None) else 1.0
                sums[i] += g if isinstance(statistic, SignedGradient) else (clip * g).square()
        head.grad = torch.ones(3)
        verbs.clear()
        optimizer.step()
    counted = [k for name, k in verbs if name == "histogram" and k["shift"] == 21]
    assert len(counted) == (0 if rides and not gap else 1)
    scores = [s.abs() if not isinstance(statistic, Lowest) else -s for s in sums]
    if scope == "global":
        cut = [torch.cat(scores).sort(descending=True).values[35]] * 3
    else:
        cut = [s.sort(descending=True).values[11] for s in scores]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for p, score, least in zip(params, scores, cut, strict=True):
        assert torch.equal(optimizer.mask(p), score >= least)


# --- counts -----------------------------------------------------------------------------------------------


def mix(params, u=2, **options):
    return DPSAdamW(params, lr=0.01, variant="mix", update_steps=u, density=0.5, **options)


def test_counts_rank_squares_per_time_that_an_entry_took_part():
    params = named({"weight": (2, 3)})
    optimizer = mix(params.items(), u=1, fidelity="release")  # u < 50: no penalty
    params["weight"].grad = torch.tensor([[3.0, 2.0, 1.0], [3.5, 1.5, 1.2]])
    optimizer.set_count("weight", torch.tensor([16.0, 4.0, 0.0]))
    optimizer.step()
    optimizer.step()
    # 9/16 12.25/16, 4/4 2.25/4, 1/1 1.44/1
    assert optimizer.mask(params["weight"]).tolist() == [[False, True, True], [False, False, True]]
    assert "count" not in optimizer.state[params["weight"]]


def test_paper_counts_are_penalised_and_those_of_short_release_stages_are_not():
    def selected(u, fidelity):
        params = named({"weight": (1, 2)})
        optimizer = mix(params.items(), u=u, fidelity=fidelity)
        # per count the first is better, 6 against 4; with exp(-C/u) it is not
        optimizer.set_count("weight", torch.tensor([float(u), u / 4]))
        for _ in range(u):
            params["weight"].grad = torch.tensor([[6.0**0.5, 1.0]])
            optimizer.step()
        optimizer.step()
        return optimizer.mask(params["weight"]).tolist()

    first, second = [[True, False]], [[False, True]]
    assert selected(4, "release") == selected(48, "release") == first
    assert selected(52, "release") == selected(4, "paper") == selected(52, "paper") == second


@pytest.mark.parametrize(
    "make",
    [
        lambda params: DPSAdamW(params, variant="dense", update_steps=2),
        lambda params: SecondOrderAdamW(params, observe_steps=2),
        lambda params: GradDropAdamW(params, keep=0.5),
        lambda params: MaskedAdamW(params),
    ],
    ids=["dps_dense", "second_order", "grad_drop", "no_policy"],
)
def test_counts_for_a_policy_that_ignores_them_are_an_error(make):
    optimizer = make(named({"weight": (4, 3)}).items())
    with pytest.raises(
        RuntimeError, match=r"set_count\(\) needs a TopK policy with CountedSquaredGradient, got .*mix"
    ):
        optimizer.set_count("weight", torch.ones(3))


BAD_COUNTS = {
    "unknown_name": ("wieght", torch.ones(3), r"^name must be .*got 'wieght'; pass model\.named_parameters"),
    "empty_name": ("", torch.ones(3), r"^name must be .*got ''"),
    "rows_for_columns": ("weight", torch.ones(4), r"^count must broadcast to \(4, 3\), got \(4,\); .*\[3\]"),
    "too_many_dimensions": (
        "weight",
        torch.ones(2, 4, 3),
        r"^count must broadcast to \(4, 3\), got \(2, 4, 3\)",
    ),
    "of_another_parameter": ("bias", torch.ones(3), r"^count must broadcast to \(4,\), got \(3,\); .*\[4\]"),
    "not_masked": ("head", torch.ones(3), r"^name must be"),
}


@pytest.mark.parametrize(
    "count", [[1.0, 2.0, 3.0], 3, None, np.ones(3)], ids=["list", "int", "None", "numpy"]
)
def test_counts_that_are_no_tensor_are_an_error(count):
    optimizer = mix(named({"weight": (4, 3)}).items())
    with pytest.raises(TypeError, match=r"^count must be a tensor, got .*; write torch\.tensor"):
        optimizer.set_count("weight", count)
    assert not optimizer.state


@pytest.mark.parametrize(("name", "count", "message"), BAD_COUNTS.values(), ids=BAD_COUNTS)
def test_counts_that_fit_no_parameter_are_an_error(name, count, message):
    params = named({"weight": (4, 3), "bias": (4,), "head": (2, 3)})
    groups = [
        {"params": [("weight", params["weight"]), ("bias", params["bias"])]},
        {"params": [("head", params["head"])], "masked": False},
    ]
    optimizer = mix(groups)
    with pytest.raises(ValueError, match=message):
        optimizer.set_count(name, count)
    assert not optimizer.state


def test_counts_need_named_parameters():
    optimizer = mix(named({"weight": (4, 3)}).values())
    with pytest.raises(
        ValueError, match=r"^name must be that of a named parameter .* pass model\.named_parameters"
    ):
        optimizer.set_count("0", torch.ones(3))


def test_counts_are_copied_and_take_wrapped_names():
    params = named({"module.weight": (4, 3)})
    optimizer = mix(params.items())
    count = torch.ones(3)
    optimizer.set_count("module.weight", count)
    count += 5
    held = optimizer.state[params["module.weight"]]["count"]
    assert held.tolist() == [1.0, 1.0, 1.0]
    assert held.dtype == torch.float32
    optimizer.set_count("weight", count)
    assert optimizer.state[params["module.weight"]]["count"].tolist() == [6.0, 6.0, 6.0]


# --- stop, save, load, go on ------------------------------------------------------------------------------


class Net(nn.Module):
    """Small, twice differentiable, with embeddings, layers and a head."""

    def __init__(self, seed):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embeddings = nn.Embedding(6, 5)
            self.layer = nn.ModuleList(nn.Linear(5, 5) for _ in range(2))
            self.classifier = nn.Linear(5, 3)

    def loss(self, number):
        generator = torch.Generator().manual_seed(number)
        tokens = torch.randint(0, 6, (7,), generator=generator)
        labels = torch.randint(0, 3, (7,), generator=generator)
        hidden = self.embeddings(tokens)
        for layer in self.layer:
            hidden = torch.tanh(layer(hidden))
        return nn.functional.cross_entropy(self.classifier(hidden), labels)


def once(statistic, density=0.3):
    return TopK(density, statistic, schedule=Schedule(observe=3))


METHODS = {
    "child_tuning_f": lambda p, **o: ChildTuningAdamW(p, variant="F", keep=0.4, **o),
    "child_tuning_d": lambda p, **o: ChildTuningAdamW(p, variant="D", density=0.3, observe_steps=4, **o),
    "child_tuning_d_explicit": lambda p, **o: ChildTuningAdamW(p, variant="D", observe_steps=None, **o),
    "dps_dense": lambda p, **o: DPSAdamW(p, variant="dense", update_steps=2, **o),
    "dps_mix": lambda p, **o: DPSAdamW(p, variant="mix", update_steps=3, **o),
    "second_order": lambda p, **o: SecondOrderAdamW(p, density=0.2, observe_steps=4, **o),
    "second_order_explicit": lambda p, **o: SecondOrderAdamW(p, density=0.2, observe_steps=None, **o),
    "second_order_curvature": lambda p, **o: SecondOrderAdamW(
        p, density=0.2, observe_steps=4, curvature="hutchinson", **o
    ),
}
WITHOUT_FIDELITY = {
    f"grad_drop_{name}": lambda p, granularity=granularity, refresh=refresh: GradDropAdamW(
        p, lr=0.02, weight_decay=0.1, keep=0.5, granularity=granularity, refresh=refresh
    )
    for name, (granularity, refresh) in GRAD_DROPS.items()
}
CONTROLS = {
    "gradual_unfreezing_by_epoch": GradualUnfreezing(),
    "gradual_unfreezing_by_steps": GradualUnfreezing(every=2),
    "random_score": once(RandomScore()),
    "magnitude": once(Magnitude()),
    "lowest_squares": once(Lowest(SquaredGradient())),
    "lowest_signed_sum": once(Lowest(SignedGradient())),
    "bernoulli_layer": Bernoulli(0.5, unit="layer"),
}
RESUMED = {
    f"{name}_{fidelity}": lambda p, make=make, fidelity=fidelity: make(
        p, lr=0.02, weight_decay=0.1, seed=7, fidelity=fidelity
    )
    for name, make in METHODS.items()
    for fidelity in ("paper", "release")
}
RESUMED |= WITHOUT_FIDELITY
RESUMED |= {
    name: lambda p, policy=policy: MaskedAdamW(p, lr=0.02, weight_decay=0.1, seed=7, policy=policy)
    for name, policy in CONTROLS.items()
}
STEPS = 13


def groups_of(net):
    return [
        {"params": [(n, p) for n, p in net.named_parameters() if not n.startswith("classifier")]},
        {
            "params": [(n, p) for n, p in net.named_parameters() if n.startswith("classifier")],
            "masked": False,
        },
    ]


def advance(net, optimizer, number):
    """One step with everything that any of the methods asks for."""
    if number % 4 == 0:
        optimizer.new_epoch()
    optimizer.zero_grad()
    loss = net.loss(number)
    policy, explicit = optimizer.policy, False
    if isinstance(policy, TopK):
        observing = optimizer.param_groups[0]["phase"] % 2 == 0
        explicit = policy.schedule.observe is None
        if policy.statistic.needs_curvature and observing:
            optimizer.observe_curvature(loss)
        if policy.statistic.counts and observing:
            optimizer.set_count("layer.1.weight", torch.arange(5) + number % 3)
    loss.backward()
    if explicit and number % 6 < 3:
        optimizer.observe()
    else:
        optimizer.step()


def snapshot(net, optimizer):
    """All bits that training leaves behind."""
    own = [optimizer.mask(p) for p in net.parameters()]
    own += [
        t
        for p in net.parameters()
        for _, t in sorted(optimizer.state.get(p, {}).items())
        if torch.is_tensor(t)
    ]
    return bits_of(*net.parameters(), *own)


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("make", RESUMED.values(), ids=RESUMED)
def test_a_run_that_stops_after_any_step_ends_as_one_that_does_not(make):
    net = Net(0)
    optimizer = make(groups_of(net))
    whole, weights, saved = [], [], []
    for number in range(STEPS):
        advance(net, optimizer, number)
        whole.append(snapshot(net, optimizer))
        weights.append(bits_of(*net.parameters()))
        saved.append(through_a_file({"model": net.state_dict(), "optimizer": optimizer.state_dict()}))
    for stop in range(STEPS - 1):
        # other weights, and another seed would do: everything comes from the file
        net = Net(1)
        net.load_state_dict(saved[stop]["model"])
        optimizer = make(groups_of(net))
        optimizer.load_state_dict(saved[stop]["optimizer"])
        assert same_bits(snapshot(net, optimizer), whole[stop]), f"loaded after {stop}"
        for number in range(stop + 1, STEPS):
            advance(net, optimizer, number)
            assert same_bits(bits_of(*net.parameters()), weights[number]), (
                f"stopped after {stop}, differs at {number}"
            )
        assert same_bits(snapshot(net, optimizer), whole[-1]), f"stopped after {stop}"


def test_those_runs_visit_every_phase():
    phases, draws, masks = {}, {}, {}
    for name, make in RESUMED.items():
        net = Net(0)
        optimizer = make(groups_of(net))
        for number in range(STEPS):
            advance(net, optimizer, number)
            phases.setdefault(name, set()).add(optimizer.param_groups[0]["phase"])
            draws.setdefault(name, set()).add(optimizer.param_groups[0]["draw"])
            mask = torch.cat([optimizer.mask(p).flatten() for p in net.parameters()])
            masks.setdefault(name, set()).add(tuple(mask.tolist()))
    for name in RESUMED:
        if name.startswith("dps_dense"):
            assert phases[name] == set(range(7))
        elif name.startswith("dps_mix") or "explicit" in name:
            assert phases[name] == set(range(5))
        elif name.startswith(("grad_drop", "child_tuning_f", "gradual", "bernoulli")):
            assert len(draws[name]) >= 3, name
        else:
            assert phases[name] == {0, 1}, name
        assert len(masks[name]) >= 2, name


# --- what each method masks -------------------------------------------------------------------------------


def masked_names(model, method, **options):
    groups = param_groups(model, method=method, **options)
    names = [name for group in groups for name, _ in group["params"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    # the usual split of decay
    for group in groups:
        for name, p in group["params"]:
            undecayed = name.endswith("bias") or re.search(r"LayerNorm|\.ln_|norm", name)
            assert group["weight_decay"] == (0.0 if undecayed else 0.01), name
            assert p is model.get_parameter(name)
    return {name for group in groups if group["masked"] for name, _ in group["params"]}


def test_dps_masks_the_linear_weights_of_bert_and_nothing_else():
    model = tiny("bert")
    within_layers = (
        "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
        "intermediate.dense", "output.dense",
    )  # fmt: skip
    expected = {f"bert.encoder.layer.{i}.{name}.weight" for i in range(LAYERS) for name in within_layers}
    expected |= {"bert.pooler.dense.weight", "classifier.weight"}
    assert masked_names(model, "dps") == expected
    assert masked_names(model, "dps", fidelity="release") == expected


@pytest.mark.parametrize("method", ["second_order", "grad_drop"])
@pytest.mark.parametrize(
    ("family", "head"),
    [
        ("bert", {"classifier.weight", "classifier.bias"}),
        ("gpt2", {"score.weight"}),
        ("llama", {"score.weight"}),
        # the head of a language model is not fresh
        ("bert_lm", set()),
        ("gpt2_lm", set()),
    ],
    ids=["bert", "gpt2", "llama", "bert_lm", "gpt2_lm"],
)
def test_only_a_fresh_head_is_exempt(method, family, head):
    model = tiny(family)
    assert masked_names(model, method) == {name for name, _ in model.named_parameters()} - head


@pytest.mark.parametrize(
    ("family", "embedding", "head"),
    [
        ("gpt2_lm", "transformer.wte.weight", "lm_head"),
        ("bert_lm", "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder"),
        ("llama_lm", "model.embed_tokens.weight", "lm_head"),
    ],
    ids=["gpt2", "bert", "llama"],
)
@pytest.mark.parametrize("method", [None, "child_tuning_f", "second_order", "grad_drop"])
def test_a_head_tied_to_the_embeddings_appears_once_under_their_name(family, embedding, head, method):
    model = tiny(family)
    assert model.get_submodule(head).weight is model.get_parameter(embedding)
    groups = param_groups(model, method=method)
    holders = [name for g in groups for name, p in g["params"] if p is model.get_submodule(head).weight]
    assert holders == [embedding]
    assert embedding in masked_names(model, method)


@pytest.mark.parametrize(
    ("family", "head", "some_masked"),
    [
        ("bert_lm", "cls.predictions.decoder", "bert.encoder.layer.2.output.dense.weight"),
        ("llama_lm", "lm_head", "model.layers.2.mlp.up_proj.weight"),
    ],
    ids=["bert", "llama"],
)
def test_dps_does_not_mask_an_output_layer_tied_to_the_embeddings(family, head, some_masked):
    model = tiny(family)
    masked = masked_names(model, "dps")
    tied = next(name for name, p in model.named_parameters() if p is model.get_submodule(head).weight)
    assert tied not in masked
    assert some_masked in masked
    assert not any("embed" in name or name.endswith("bias") for name in masked)


def test_dps_in_gpt2_masks_the_matrices_of_the_blocks_and_not_the_tied_head():
    """GPT-2 writes its linear layers as Conv1D."""
    masked = masked_names(tiny("gpt2_lm"), "dps")
    assert masked and all(re.search(r"\.h\.\d+\..*weight$", name) for name in masked)
    assert not any("ln_" in name for name in masked)


@pytest.mark.parametrize("method", ["dps", "second_order", "grad_drop"])
def test_groups_of_bert_train_in_their_optimizer(method):
    make = {
        "dps": lambda groups: DPSAdamW(groups, variant="dense", update_steps=1),
        "second_order": lambda groups: SecondOrderAdamW(groups, density=0.1, observe_steps=1),
        "grad_drop": lambda groups: GradDropAdamW(groups, keep=0.5, granularity="layer", seed=1),
    }[method]
    model = tiny("bert")
    groups = param_groups(model, method=method)
    masked = {name for group in groups if group["masked"] for name, _ in group["params"]}
    optimizer = make(groups)
    for number in range(2):
        give_gradients(model.parameters(), seed=number)
        optimizer.step()
    masks = {name: optimizer.mask(p) for name, p in model.named_parameters()}
    assert all(mask.all() for name, mask in masks.items() if name not in masked)
    part = sum(int(masks[name].sum()) for name in masked) / sum(masks[name].numel() for name in masked)
    # rounding down in each tensor takes a little from the 70 % of DPS, whose tensors are small here
    expected = {"dps": (0.69, 0.7), "second_order": (0.099, 0.1), "grad_drop": (0.1, 0.9)}[method]
    assert expected[0] < part <= expected[1]
