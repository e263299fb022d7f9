"""Child-Tuning is what methods.md 1 says: counts, clipping, decay, shares and whole runs, against NumPy.

The quirks of the released code have the numbers that methods.md 1.3 gives them.
"""

import math
from fractions import Fraction

import pytest
import torch
from oracles import child_tuning as oracle
from torch import nn

from sparse_optim import (
    Bernoulli,
    ChildTuningAdamW,
    MaskedAdamW,
    Schedule,
    SquaredGradient,
    TopK,
    param_groups,
)

np = pytest.importorskip("numpy")
hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

reproducible = hypothesis.settings(deadline=None, max_examples=150, derandomize=True, database=None)


def observed(gradients, density=0.3, fidelity="release", shapes=None, dtype=torch.float32, **options):
    """An optimizer of variant D that has observed gradients (by step, by tensor) and made one update."""
    shapes = shapes or [np.shape(g) for g in gradients[0]]
    params = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]
    optimizer = ChildTuningAdamW(
        params, variant="D", density=density, observe_steps=len(gradients), fidelity=fidelity, **options
    )
    for step in [*gradients, gradients[0]]:
        for p, g in zip(params, step, strict=True):
            p.grad = torch.as_tensor(np.asarray(g), dtype=dtype).reshape(p.shape)
        optimizer.step()
    return params, optimizer


def masks_of(params, optimizer):
    return [optimizer.mask(p).numpy() for p in params]


# --- D: how many entries are selected ---------------------------------------------------------------------


@reproducible
@hypothesis.given(
    n=st.integers(1, 400), density=st.one_of(st.sampled_from([0.1, 0.2, 0.3]), st.floats(0.01, 0.99))
)
def test_release_selects_n_minus_ceil_of_n_minus_1_times_1_minus_p_without_ties(n, density):
    # distinct squares, all exact; a norm far below 1, so that C2 does not clip
    g = np.random.default_rng(n).permutation(n).astype(np.float32) / 2**20
    params, optimizer = observed([[g]], density)
    (mask,) = masks_of(params, optimizer)
    # not in doubles: 70 is not 70.00000000000001, and 0.3333333333333333 is a third
    expected = n - math.ceil((n - 1) * (1 - Fraction(density).limit_denominator(10**9)))
    assert mask.sum() == expected
    assert expected == n or g[mask].min() > g[~mask].max()
    assert mask.tolist() == (g**2 >= np.percentile(g**2, (1 - density) * 100)).tolist()


@reproducible
@hypothesis.given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    density=st.one_of(st.sampled_from([0.1, 0.3, 0.5]), st.floats(0.01, 0.99)),
    levels=st.integers(1, 12),
    zeros=st.floats(0, 1),
    seed=st.integers(0, 999),
)
def test_release_selects_what_reaches_numpys_percentile_ties_and_zeros_included(
    sizes, density, levels, zeros, seed
):
    random = np.random.default_rng(seed)
    grads = [
        (random.integers(0, levels, n) * (random.random(n) >= zeros)).astype(np.float32) / 1024 for n in sizes
    ]
    params, optimizer = observed([grads], density)
    scores = np.concatenate(grads) ** 2
    expected = scores >= np.percentile(scores, (1 - density) * 100)
    assert np.concatenate(masks_of(params, optimizer)).tolist() == expected.tolist()


def test_release_selects_everything_when_the_percentile_falls_on_0():
    grads = np.zeros(100)
    grads[:29] = np.arange(1, 30) / 1000
    params, optimizer = observed([[grads]], 0.3)
    assert masks_of(params, optimizer)[0].all()
    grads[:31] = np.arange(1, 32) / 1000
    params, optimizer = observed([[grads]], 0.3)
    assert masks_of(params, optimizer)[0].sum() == 30


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize(
    ("density", "n", "k"), [(0.3, 100, 30), (0.29, 100, 28), (0.1, 999, 99), (0.2, 5, 1)]
)
def test_paper_selects_exactly_int_of_p_times_n(density, n, k, ties):
    grads = np.full(n, 0.5) if ties else np.random.default_rng(0).standard_normal(n)
    params, optimizer = observed([[grads[: n // 3], grads[n // 3 :]]], density, "paper")
    mask = np.concatenate(masks_of(params, optimizer))
    assert mask.sum() == k
    if ties:
        assert mask[:k].all(), "ties go to the lowest index"
    else:
        assert np.abs(grads)[mask].min() > np.abs(grads)[~mask].max()


def test_release_selects_more_than_the_paper_where_the_two_formulas_differ():
    grads = np.random.default_rng(0).permutation(101) / 4096
    counts = {f: masks_of(*observed([[grads]], 0.3, f))[0].sum() for f in ("paper", "release")}
    assert counts == {"paper": 30, "release": 31}


# --- D: the Fisher pass, C1 and C2 ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fidelity", ["paper", "release"])
@pytest.mark.parametrize("seed", range(4))
def test_the_fisher_pass_is_numpys(seed, fidelity, dtype):
    """C1, C2: squared batch gradients, in the release clipped to norm 1 by tensor; a global threshold."""
    random = np.random.default_rng(seed)
    scales = {"small": 1e-3, "edge": 0.15, "large": 20.0}  # norms around 0.02, 1 and 300
    steps = [
        {
            n: random.standard_normal((7, 6 + i)) * s * random.uniform(0.5, 2)
            for i, (n, s) in enumerate(scales.items())
        }
        for _ in range(5)
    ]
    rounded = [{n: torch.as_tensor(g).to(dtype).double().numpy() for n, g in step.items()} for step in steps]
    params, optimizer = observed([list(step.values()) for step in rounded], 0.3, fidelity, dtype=dtype)
    scores = oracle.fisher(rounded, list(scales), 1.0 if fidelity == "release" else None)
    expected = oracle.child(scores, 0.3, fidelity == "release")
    for name, mask in zip(scales, masks_of(params, optimizer), strict=True):
        assert mask.tolist() == expected[name].tolist(), name


def test_clipping_costs_a_tensor_with_large_gradients_its_global_rank():
    """C2: unclipped, the child lies in the tensor with norm 319; clipped, both tensors share it."""
    random = np.random.default_rng(0)
    large, small = (random.standard_normal(100) for _ in range(2))
    grads = [large * 319 / np.linalg.norm(large), small * 0.9 / np.linalg.norm(small)]
    counts = {f: [int(m.sum()) for m in masks_of(*observed([grads], 0.3, f))] for f in ("paper", "release")}
    assert counts["paper"] == [60, 0]
    assert sum(counts["release"]) == 60 and min(counts["release"]) >= 25


def test_a_gradient_at_norm_1_or_below_is_not_clipped():
    """In one tensor a common factor changes nothing, so it takes a second step to see it."""
    first, second = np.zeros(4), np.zeros(4)
    first[0], second[1] = (
        0.8,
        0.9,
    )  # squares 0.64 and 0.81: entry 1 wins; with both scaled to norm 1 it were a tie
    (mask,) = masks_of(*observed([[first], [second]], 0.25))
    assert mask.tolist() == [False, True, False, False]


# --- D: what happens to the others, C5 --------------------------------------------------------------------


def test_release_decays_the_others_by_the_product_of_1_minus_lr_wd():
    """C5, in methods.md's numbers: 468 steps, 4e-5 decaying linearly, wd 0.01: factor 0.999906."""
    p = nn.Parameter(torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    start = p.detach().clone()
    optimizer = ChildTuningAdamW(
        [p], lr=4e-5, weight_decay=0.01, variant="D", observe_steps=3, fidelity="release"
    )
    scale = nn.Parameter(torch.ones(200, dtype=torch.float64))
    product, steps = 1.0, 468
    for t in range(3 + steps):
        lr = 4e-5 * (1 - max(t - 3, 0) / steps)
        optimizer.param_groups[0]["lr"] = lr
        p.grad = (
            torch.randn(200, generator=torch.Generator().manual_seed(t), dtype=torch.float64) * scale.detach()
        )
        optimizer.step()
        if t < 3:
            assert torch.equal(p, start), "nothing moves while observing"
        else:
            product *= 1 - lr * 0.01
    others = ~optimizer.mask(p)
    assert others.sum() == math.ceil(199 * 0.7) == 140
    torch.testing.assert_close(p[others], start[others] * product, rtol=1e-12, atol=0)
    assert round(product, 6) == 0.999906
    assert ((p - start * product)[~others].abs() > 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_paper_freezes_the_others_to_the_bit(dtype):
    p = nn.Parameter(torch.randn(200, generator=torch.Generator().manual_seed(0)).to(dtype))
    start = p.detach().clone()
    optimizer = ChildTuningAdamW([p], lr=0.1, weight_decay=0.9, variant="D", observe_steps=2)
    for t in range(12):
        p.grad = torch.randn(200, generator=torch.Generator().manual_seed(t)).to(dtype)
        optimizer.step()
    mask = optimizer.mask(p)
    assert int(mask.sum()) == 60
    assert torch.equal(p[~mask], start[~mask]) and (p != start)[mask].all()


def test_the_defaults_of_variants_and_fidelities():
    def made(**options):
        optimizer = ChildTuningAdamW([nn.Parameter(torch.ones(3))], **options)
        return optimizer.policy, optimizer.unselected

    assert made(variant="F") == (Bernoulli(0.3, rescale=True), "zero_grad")
    assert made(variant="F", keep=0.2, fidelity="release") == (Bernoulli(0.2, rescale=True), "zero_grad")
    fisher = TopK(0.3, SquaredGradient(), "global", Schedule(observe=9))
    assert made(variant="D", observe_steps=9) == (fisher, "frozen")
    clipped = TopK(0.1, SquaredGradient(clip_norm=1.0), "global", Schedule(observe=9), cut="percentile")
    assert made(variant="D", observe_steps=9, density=0.1, fidelity="release") == (clipped, "zero_grad")
    assert made(variant="D", observe_steps=None) == (TopK(0.3), "frozen")
    assert made(variant="D", observe_steps=None, unselected="track") == (TopK(0.3), "track")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "F", "density": 0.3}, "density must not be given for variant='F', got 0.3; .*keep"),
        ({"variant": "F", "observe_steps": 5}, "observe_steps must not be given for variant='F', got 5"),
        (
            {"variant": "F", "observe_steps": None},
            "observe_steps must not be given for variant='F', got None",
        ),
        (
            {"variant": "D", "observe_steps": 5, "keep": 0.3},
            "keep must not be given for variant='D', got 0.3",
        ),
        ({"variant": "D"}, r"observe_steps must be given for variant='D', .* len\(dataloader\)"),
        (
            {"variant": "F", "keep": 0.0},
            r"keep must be in \(0, 1\], got 0.0",
        ),  # C10: NaN weights in the release
        ({"variant": "D", "observe_steps": 5, "density": 0.0}, r"density must be in \(0, 1\], got 0.0"),
        ({"variant": "E"}, "variant must be 'F' or 'D', got 'E'"),
        ({"variant": "F", "fidelity": "code"}, "fidelity must be 'paper' or 'release', got 'code'"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_options_that_a_variant_does_not_use_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        ChildTuningAdamW([nn.Parameter(torch.ones(3))], **options)


# --- F ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.1, 0.3, 0.7])
@pytest.mark.parametrize("fidelity", ["paper", "release"])
def test_the_share_of_entries_that_have_moved_is_1_minus_1_minus_p_to_the_t(fidelity, keep):
    """C7: an entry moves from the first step that selects it on, by momentum. 30, 83 and 97 % at keep=0.3."""
    n = 100_000
    p = nn.Parameter(torch.randn(n, generator=torch.Generator().manual_seed(0)))
    start = p.detach().clone()
    optimizer = ChildTuningAdamW(
        [p], lr=0.01, weight_decay=0.0, variant="F", keep=keep, fidelity=fidelity, seed=3
    )
    ever = torch.zeros(n, dtype=torch.bool)
    shares = {}
    for t in range(1, 11):
        p.grad = torch.randn(n, generator=torch.Generator().manual_seed(t)).sign()
        before = p.detach().clone()
        optimizer.step()
        coasting = ever & ~optimizer.mask(p)
        assert (p.detach() != before)[coasting].float().mean() > 0.999 or t == 1, (
            "momentum moves the unselected"
        )
        ever |= optimizer.mask(p)
        moved = p.detach() != start
        assert not (moved & ~ever).any()
        expected = 1 - (1 - keep) ** t
        shares[t] = float(ever.float().mean())
        assert abs(shares[t] - expected) <= 5 * math.sqrt(expected * (1 - expected) / n)
        # momentum can bring a few back to the very number where they began
        assert float((ever & ~moved).float().mean()) < 1e-3
    if keep == 0.3:
        assert [round(100 * shares[t]) for t in (1, 5, 10)] == [30, 83, 97]


def test_with_decay_every_entry_moves_at_the_first_step():
    p = nn.Parameter(torch.ones(1000))
    optimizer = ChildTuningAdamW([p], lr=0.01, weight_decay=0.1, variant="F")
    p.grad = torch.ones(1000)
    optimizer.step()
    mask = optimizer.mask(p)
    torch.testing.assert_close(p[~mask], torch.full_like(p[~mask], 1 - 0.01 * 0.1))
    torch.testing.assert_close(p[mask], torch.full_like(p[mask], 1 - 0.01 * 0.1 - 0.01))


def followed(policy, eps, steps=40):
    p = nn.Parameter(torch.randn(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    start = p.detach().clone()
    optimizer = MaskedAdamW(
        [p], lr=0.01, eps=eps, weight_decay=0.01, policy=policy, unselected="zero_grad", seed=1
    )
    for t in range(steps):
        noise = torch.randn(2000, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
        p.grad = noise + p.detach()
        optimizer.step()
    return p.detach(), p.detach() - start


@pytest.mark.parametrize("keep", [0.2, 0.3, 0.5])
def test_rescaling_is_a_no_op_but_for_eps(keep):
    """C8: Adam's ratio does not see a factor on all gradients; with eps=0.1 it does."""
    for eps, tolerance in ((1e-30, 1e-12), (1e-8, 1e-5)):
        (with_it, moved), (without, _) = (followed(Bernoulli(keep, rescale=r), eps) for r in (True, False))
        assert (with_it - without).abs().max() < tolerance * moved.abs().max()
    (with_it, moved), (without, _) = (followed(Bernoulli(keep, rescale=r), 0.1) for r in (True, False))
    assert (with_it - without).abs().max() > 0.01 * moved.abs().max()


@pytest.mark.usefixtures("torchs_own_bits")
@pytest.mark.parametrize("fidelity", ["paper", "release"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_keep_1_is_adamw(dtype, fidelity):
    ours, theirs = (
        nn.Parameter(torch.randn(33, 31, generator=torch.Generator().manual_seed(0), dtype=dtype))
        for _ in range(2)
    )
    optimizer = ChildTuningAdamW([ours], lr=0.01, variant="F", keep=1.0, fidelity=fidelity)
    dense = torch.optim.AdamW([theirs], lr=0.01, foreach=False)
    for t in range(5):
        ours.grad = torch.randn(33, 31, generator=torch.Generator().manual_seed(t), dtype=dtype)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        dense.step()
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("rescale", [True, False], ids=["rescaled", "as_is"])
@pytest.mark.parametrize("keep", [0.2, 0.5])
def test_the_mean_masked_gradient_is_the_gradient_with_rescale_and_p_times_it_without(keep, rescale):
    """With beta1=0 the first moment is the masked gradient itself."""
    draws, g = 400, torch.linspace(-3, 3, 1500, dtype=torch.float64) + 0.001
    p = nn.Parameter(torch.zeros(1500, dtype=torch.float64))
    optimizer = MaskedAdamW(
        [p], betas=(0.0, 0.999), policy=Bernoulli(keep, rescale=rescale), unselected="zero_grad", seed=5
    )
    total = torch.zeros_like(g)
    for _ in range(draws):
        p.grad = g.clone()
        optimizer.step()
        masked = optimizer.state[p]["exp_avg"]
        torch.testing.assert_close(
            masked, g * optimizer.mask(p) / (keep if rescale else 1), rtol=1e-15, atol=0
        )
        total += masked
    ratio = total / draws / g
    sigma = math.sqrt((1 - keep) / keep / draws) * (1 if rescale else keep)
    expected = 1.0 if rescale else keep
    assert abs(float(ratio.mean()) - expected) < 5 * sigma / math.sqrt(1500)
    assert float((ratio - expected).abs().max()) < 5 * sigma
    assert 0.9 < float(ratio.std()) / sigma < 1.1, "draws of an entry are independent"


# --- whole runs, against the oracle -----------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.query, self.key, self.value, self.dense = (nn.Linear(width, width) for _ in range(4))
        self.LayerNorm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        scores = self.query(x) @ self.key(x).transpose(1, 2) / math.sqrt(x.shape[-1])
        return self.LayerNorm(x + self.dropout(self.dense(scores.softmax(-1) @ self.value(x))))


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attention = Attention(width)
        self.intermediate, self.output = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.LayerNorm = nn.LayerNorm(width)

    def forward(self, x):
        x = self.attention(x)
        return self.LayerNorm(x + self.output(nn.functional.gelu(self.intermediate(x))))


class Transformer(nn.Module):
    """Two encoder layers of width 8, with the names of BERT, in float64."""

    def __init__(self, width=8, words=20, labels=3):
        super().__init__()
        torch.manual_seed(0)
        self.embeddings = nn.ModuleDict(
            {"word_embeddings": nn.Embedding(words, width), "LayerNorm": nn.LayerNorm(width)}
        )
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Layer(width) for _ in range(2))})
        self.pooler, self.classifier = nn.Linear(width, width), nn.Linear(width, labels)
        self.double()

    def forward(self, words):
        x = self.embeddings["LayerNorm"](self.embeddings["word_embeddings"](words))
        for layer in self.encoder["layer"]:
            x = layer(x)
        return self.classifier(torch.tanh(self.pooler(x[:, 0])))


def gradients(model, t):
    """Gradients by name of batch t, with its dropout: they depend on the weights and on t alone."""
    torch.manual_seed(1000 + t)
    words, labels = torch.randint(20, (16, 5)), torch.randint(3, (16,))
    model.train()
    model.zero_grad()
    nn.functional.cross_entropy(model(words), labels).backward()
    return {name: p.grad.numpy().copy() for name, p in model.named_parameters()}


def arrays(model):
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}


def put(model, weights):
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.from_numpy(weights[name]))


def assert_close(model, weights, t):
    """Within 1e-6 of the largest weight of a tensor.

    The release decays after the step, the package (as torch) before it: lr^2 wd an update, here 1e-7 in sum.
    """
    for name, p in model.named_parameters():
        error = np.abs(p.detach().numpy() - weights[name]).max() / np.abs(weights[name]).max()
        assert error < 1e-6, f"{name} after step {t}: {error}"


STEPS, LR, WEIGHT_DECAY = 60, 4e-4, 0.01


def learning_rate(t):
    return LR * (1 - t / STEPS)


@pytest.mark.parametrize("fidelity", ["paper", "release"])
def test_variant_f_follows_the_oracle(fidelity):
    model, shadow = Transformer(), Transformer()
    groups = param_groups(model, method="child_tuning_f", fidelity=fidelity, weight_decay=WEIGHT_DECAY)
    optimizer = ChildTuningAdamW(groups, lr=LR, variant="F", keep=0.3, fidelity=fidelity, seed=8)
    adam = oracle.Adam(arrays(shadow), WEIGHT_DECAY, decay_last=fidelity == "release")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: learning_rate(t) / LR)
    start = arrays(model)
    for t in range(STEPS):
        gradients(model, t)
        optimizer.step()
        schedule.step()
        masks = {name: optimizer.mask(p).numpy() for name, p in model.named_parameters()}
        assert 0.2 < np.mean(np.concatenate([m.ravel() for m in masks.values()])) < 0.4
        put(shadow, adam.weights)
        oracle.step_f(adam, gradients(shadow, t), masks, 0.3, learning_rate(t))
        assert_close(model, adam.weights, t)
    moved = {name: np.abs(w - start[name]).max() for name, w in arrays(model).items()}
    # but for a key's bias, whose gradient is zero: softmax does not see it
    assert all(most > 1e-4 for name, most in moved.items() if not name.endswith("key.bias")), (
        "head and embeddings too"
    )


@pytest.mark.parametrize("fidelity", ["paper", "release"])
def test_variant_d_follows_the_oracle(fidelity):
    release, observe = fidelity == "release", 10
    model, shadow = Transformer(), Transformer()
    groups = param_groups(model, method="child_tuning_d", fidelity=fidelity, weight_decay=WEIGHT_DECAY)
    optimizer = ChildTuningAdamW(
        groups, lr=LR, variant="D", density=0.3, observe_steps=observe, fidelity=fidelity
    )
    start = arrays(model)
    # 1.2: the encoder stack in the release; the paper's masks leave out the fresh head alone
    names = [n for n in start if ("layer" in n if release else not n.startswith("classifier"))]
    passes = []
    for t in range(observe):
        gradients(model, STEPS + t)
        optimizer.step()
        passes.append(gradients(shadow, STEPS + t))
    assert all(np.array_equal(w, start[name]) for name, w in arrays(model).items()), (
        "nothing moves while observing"
    )
    masks = oracle.child(oracle.fisher(passes, names, 1.0 if release else None), 0.3, release)
    adam = oracle.Adam(start, WEIGHT_DECAY, decay_last=release)
    for t in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(t)
        gradients(model, t)
        optimizer.step()
        put(shadow, adam.weights)
        oracle.step_d(adam, gradients(shadow, t), masks, learning_rate(t), release)
        for name, p in model.named_parameters():
            assert np.array_equal(optimizer.mask(p).numpy(), masks.get(name, np.ones(p.shape, bool))), name
        assert_close(model, adam.weights, t)
    n = sum(m.size for m in masks.values())
    assert sum(int(m.sum()) for m in masks.values()) == (
        n - math.ceil((n - 1) * Fraction("0.7")) if release else int(0.3 * n)
    )
    factor = np.prod([1 - learning_rate(t) * WEIGHT_DECAY for t in range(STEPS)])
    for name, p in model.named_parameters():
        others = ~masks.get(name, np.ones(p.shape, bool))
        decayed = release and "bias" not in name and "LayerNorm" not in name
        expected = start[name] * (factor if decayed else 1.0)
        np.testing.assert_allclose(p.detach().numpy()[others], expected[others], rtol=1e-12 if decayed else 0)


# --- parameter groups -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert():
    transformers = pytest.importorskip("transformers")
    return transformers, transformers.BertConfig(
        vocab_size=40, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16,
    )  # fmt: skip


def names_where(groups, **what):
    return {
        name
        for group in groups
        if all(bool(group[k]) == v for k, v in what.items())
        for name, _ in group["params"]
    }


EXEMPT = {
    (None, "paper"): (),
    ("child_tuning_f", "paper"): (),
    ("child_tuning_f", "release"): (),
    ("child_tuning_d", "paper"): ("classifier.",),
    ("child_tuning_d", "release"): ("bert.embeddings.", "bert.pooler.", "classifier."),
}


@pytest.mark.parametrize(("method", "fidelity"), EXEMPT, ids=str)
def test_groups_of_bert_have_the_exemptions_and_the_decay_split_of_the_method(bert, method, fidelity):
    transformers, config = bert
    model = transformers.BertForSequenceClassification(config)
    groups = param_groups(model, method=method, fidelity=fidelity, weight_decay=0.05)
    everything = dict(model.named_parameters())
    listed = [(name, p) for group in groups for name, p in group["params"]]
    assert len(listed) == len(everything) and all(everything[name] is p for name, p in listed)
    prefixes = EXEMPT[method, fidelity]
    assert names_where(groups, masked=False) == {n for n in everything if prefixes and n.startswith(prefixes)}
    plain = {n for n in everything if n.endswith("bias") or "LayerNorm" in n}
    assert names_where(groups, weight_decay=False) == plain and plain != set(everything)
    assert {group["weight_decay"] for group in groups} == {0.05, 0.0}
    assert all(group["params"] for group in groups)
    MaskedAdamW(groups)
    torch.optim.AdamW([{k: v for k, v in group.items() if k != "masked"} for group in groups])


def test_the_decay_split_is_transformers_own(bert):
    transformers, config = bert
    model = transformers.BertForSequenceClassification(config)
    trainer = pytest.importorskip("transformers.trainer_pt_utils")
    decayed = trainer.get_parameter_names(model, [nn.LayerNorm], ["bias"])
    assert names_where(param_groups(model), weight_decay=True) == set(decayed)


def test_tied_weights_appear_once(bert):
    transformers, config = bert
    model = transformers.BertForMaskedLM(config)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    groups = param_groups(model, method="child_tuning_f")
    listed = [p for group in groups for _, p in group["params"]]
    assert len(listed) == len({id(p) for p in listed}) == len(list(model.parameters()))
    assert sum(p is model.get_input_embeddings().weight for p in listed) == 1


def test_parameters_that_do_not_require_a_gradient_are_left_out(bert):
    transformers, config = bert
    model = transformers.BertForSequenceClassification(config)
    model.bert.embeddings.requires_grad_(False)
    listed = {name for group in param_groups(model, method="child_tuning_d") for name, _ in group["params"]}
    assert listed == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any("embeddings" in name for name in listed)


def test_exempt_replaces_the_methods_exemptions(bert):
    transformers, config = bert
    model = transformers.BertForSequenceClassification(config)
    groups = param_groups(model, method="child_tuning_d", exempt=[r"embeddings\.", r"layer\.1\."])
    assert names_where(groups, masked=False) == {
        n for n, _ in model.named_parameters() if "embeddings" in n or "layer.1." in n
    }
    assert names_where(param_groups(model, method="child_tuning_d", exempt=[]), masked=False) == set()


class Norms(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
        self.block = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
        self.embed_norm = nn.RMSNorm(3)


def test_a_norm_somewhere_does_not_take_the_decay_from_parameters_elsewhere():
    groups = param_groups(Norms())
    assert names_where(groups, weight_decay=True) == {"weight", "block.0.weight"}


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm(4),
        nn.BatchNorm1d(4),
        nn.GroupNorm(2, 4),
        nn.RMSNorm(4),
        nn.InstanceNorm1d(4, affine=True),
    ],
    ids=lambda module: type(module).__name__,
)
def test_parameters_of_normalisation_layers_are_not_decayed(norm):
    groups = param_groups(nn.Sequential(nn.Linear(4, 4), norm))
    assert names_where(groups, weight_decay=True) == {"0.weight"}


def test_release_splits_by_name_and_so_decays_norms_with_other_names():
    """C9: XLNet's layer_norm weights are decayed under the released Child-Tuning."""
    model = nn.ModuleDict(
        {"layer": nn.ModuleDict({"layer_norm": nn.LayerNorm(3), "LayerNorm": nn.LayerNorm(3)})}
    )
    assert names_where(param_groups(model, fidelity="release"), weight_decay=True) == {
        "layer.layer_norm.weight"
    }
    assert names_where(param_groups(model), weight_decay=True) == set()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"method": "child_tuning"},
            "method must be None or one of child_tuning_f, child_tuning_d.*got 'child_tuning'",
        ),
        ({"fidelity": "code"}, "fidelity must be 'paper' or 'release', got 'code'"),
        # C14: no name contains "layer"
        (
            {"method": "child_tuning_d", "fidelity": "release"},
            "method='child_tuning_d' must leave something to mask",
        ),
        (
            {"method": "child_tuning_d", "exempt": ["."]},
            "must leave something to mask in ModuleDict.*exempt=",
        ),
    ],
    ids=["method", "fidelity", "no_layer_in_names", "everything_exempt"],
)
def test_groups_that_cannot_be_made_are_errors(options, message):
    model = nn.ModuleDict({"h": nn.ModuleList([nn.Linear(2, 2)])})
    with pytest.raises(ValueError, match=message):
        param_groups(model, **options)
