"""Random autoencoders change a model while it trains, as drawn, and at no other time.

The tiny models have real layers of five families; the numbers come from an oracle that is told the draws.
"""

import copy
import io
import math

import numpy as np
import pytest
import torch
from oracles import mvcr
from torch import nn
from torch.utils.checkpoint import checkpoint

from sparse_optim import Bernoulli, ChildTuningAdamW, MaskedAdamW
from sparse_optim.nn import RandomAutoencoders

HIDDEN = 16
POSITIONS = 12
BATCH = 3
PLACEMENTS = ["between", "ffn"]


# --- models -----------------------------------------------------------------------------------------------


def tiny(family, *, dropout=0.0, **config):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if family in ("bert", "roberta"):
        kinds = {
            "bert": (transformers.BertConfig, transformers.BertForSequenceClassification),
            "roberta": (transformers.RobertaConfig, transformers.RobertaForSequenceClassification),
        }
        config = {
            "vocab_size": 40,
            "hidden_size": HIDDEN,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "max_position_embeddings": 32,
            "hidden_dropout_prob": dropout,
            "attention_probs_dropout_prob": dropout,
            **config,
        }
    elif family == "distilbert":
        kinds = {family: (transformers.DistilBertConfig, transformers.DistilBertForSequenceClassification)}
        config = {
            "vocab_size": 40,
            "dim": HIDDEN,
            "n_layers": 3,
            "n_heads": 2,
            "hidden_dim": 24,
            "max_position_embeddings": 32,
            "dropout": dropout,
            "attention_dropout": dropout,
            "seq_classif_dropout": dropout,
            **config,
        }
    elif family == "gpt2":
        kinds = {family: (transformers.GPT2Config, transformers.GPT2ForSequenceClassification)}
        config = {
            "vocab_size": 40,
            "n_embd": HIDDEN,
            "n_layer": 3,
            "n_head": 2,
            "n_positions": 32,
            "resid_pdrop": dropout,
            "embd_pdrop": dropout,
            "attn_pdrop": dropout,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **config,
        }
    else:
        kinds = {family: (transformers.LlamaConfig, transformers.LlamaForSequenceClassification)}
        config = {
            "vocab_size": 40,
            "hidden_size": HIDDEN,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 24,
            "max_position_embeddings": 32,
            "pad_token_id": 0,
            **config,
        }
    make_config, make_model = kinds[family]
    return make_model(make_config(**config))


FAMILIES = ["bert", "roberta", "distilbert", "gpt2", "llama"]
SITES = {
    "bert": "bert.encoder.layer.{}.output.dropout",
    "roberta": "roberta.encoder.layer.{}.output.dropout",
    "distilbert": "distilbert.transformer.layer.{}.ffn",
    "gpt2": "transformer.h.{}.mlp",
    "llama": "model.layers.{}.mlp",
}
LAYERS = {
    "bert": "bert.encoder.layer.{}",
    "roberta": "roberta.encoder.layer.{}",
    "distilbert": "distilbert.transformer.layer.{}",
    "gpt2": "transformer.h.{}",
    "llama": "model.layers.{}",
}


def batch(seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 40, (BATCH, POSITIONS), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(BATCH) % 2}


class Layer(nn.Module):
    """A layer whose output is a tuple, as in older model code."""

    def __init__(self, hidden):
        super().__init__()
        self.mlp = nn.Linear(hidden, hidden)
        self.experts = nn.ModuleList(nn.Linear(1, 1) for _ in range(7))

    def forward(self, h):
        return h + torch.tanh(self.mlp(h)), "attention"


class Plain(nn.Module):
    """No transformers needed; every layer may be checkpointed as a whole, hooks included."""

    def __init__(self, hidden=HIDDEN, layers=3, use_reentrant=None):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(hidden) for _ in range(layers))
        self.heads = nn.ModuleList(nn.Linear(hidden, 1) for _ in range(2))
        self.use_reentrant = use_reentrant

    def forward(self, h):
        for layer in self.layers:
            if self.use_reentrant is None:
                h, _ = layer(h)
            else:
                h, _ = checkpoint(layer, h, use_reentrant=self.use_reentrant)
        return h


def plain_attach(model=None, **settings):
    model = Plain() if model is None else model
    settings = {"layers": [1], "dims": (4, 6), "hidden_size": HIDDEN, **settings}
    return model, RandomAutoencoders.attach(model, **settings)


def path(handle, index):
    return handle.autoencoders[str(index)]


def hook_counts(model):
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


def gradients(module):
    return {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


def assert_same_gradients(one, other):
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        if gradient is None:
            assert other[name] is None, name
        else:
            assert torch.equal(gradient, other[name]), name


# --- the oracle -------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch):
    """Records what is drawn, in order: integers, normals, and dropout masks by probability."""
    record = {"integers": [], "normals": [], "masks": {}}
    randint, randn_like = torch.randint, torch.randn_like
    dropout = nn.functional.dropout

    def recording_randint(*args, **kwargs):
        result = randint(*args, **kwargs)
        record["integers"].append(result.clone())
        return result

    def recording_randn_like(*args, **kwargs):
        result = randn_like(*args, **kwargs)
        record["normals"].append(result.clone())
        return result

    def recording_dropout(x, p=0.5, training=True, inplace=False):
        if not training or p == 0.0:
            return x
        mask = dropout(torch.ones_like(x), p)
        record["masks"].setdefault(p, []).append(mask)
        return x * mask

    monkeypatch.setattr(torch, "randint", recording_randint)
    monkeypatch.setattr(torch, "randn_like", recording_randn_like)
    monkeypatch.setattr(nn.functional, "dropout", recording_dropout)
    return record


def arrays(module):
    return {name: p.detach().numpy() for name, p in module.named_parameters()}


def take_masks(masks, dims, positions, inners):
    """The next recorded masks, spread over all positions; NaN where nobody may read."""
    result = []
    for dim, where, inner in zip(dims, positions, inners, strict=True):
        pair = []
        for width, used in ((dim, True), (dim // 2, inner != 2)):
            full = np.full((BATCH, POSITIONS, width), np.nan)
            if used and len(where):
                full[:, where] = masks.pop(0).numpy()
            pair.append(full)
        result.append(pair)
    return result


@pytest.mark.parametrize("reconstruction", ["all", "chosen"])
@pytest.mark.parametrize("dims", [(6,), (4, 10), (4, 6, 7)], ids=["one_view", "two_views", "three_views"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_forward_and_reconstruction_loss_are_those_of_the_oracle(placement, dims, reconstruction, drawn):
    model = tiny("bert").double().train()
    layer, following = model.bert.encoder.layer[1], model.bert.encoder.layer[2]
    nn.init.normal_(layer.output.LayerNorm.weight)
    nn.init.normal_(layer.output.LayerNorm.bias)
    seen = {}
    # hooks run in the order of registration: this one sees what the path is given
    site = layer if placement == "between" else layer.output.dropout
    site.register_forward_hook(lambda m, args, out: seen.update(raw=out.detach().numpy()))
    layer.output.register_forward_pre_hook(lambda m, args: seen.update(residual=args[1].detach().numpy()))
    following.register_forward_pre_hook(lambda m, args: seen.update(result=args[0].detach().numpy()))
    settings = {"noise": 0.05} if placement == "between" else {}
    handle = RandomAutoencoders.attach(
        model,
        layers=[1],
        dims=dims,
        placement=placement,
        extra_dropout=0.3,
        reconstruction=reconstruction,
        **settings,
    )
    autoencoders = [arrays(autoencoder) for autoencoder in path(handle, 1)]
    optimizer = torch.optim.AdamW([*model.parameters(), *handle.parameters()], lr=1e-3)
    inputs = batch()
    # the oracle reads the weights in place, so that it follows them through training
    for seed in range(60):
        torch.manual_seed(seed)
        for entries in (drawn["integers"], drawn["normals"], drawn["masks"]):
            entries.clear()
        task_loss = model(**inputs).logits.square().mean()
        (draws, inners), (normal,) = ([d.tolist() for d in drawn["integers"]], drawn["normals"])
        assert len(draws) == POSITIONS
        assert len(inners) == len(dims)
        noise = {"between": 0.05, "ffn": 0.002}[placement]
        h = seen["raw"] + noise * normal.numpy()
        chosen = [[t for t, draw in enumerate(draws) if draw == j] for j in range(len(dims))]
        masks = take_masks(drawn["masks"][0.2], dims, chosen, inners)
        (extra,) = drawn["masks"][0.3]
        expected = mvcr.transform(h, autoencoders, draws, inners, masks, extra.numpy())
        if placement == "ffn":
            norm = layer.output.LayerNorm
            expected = mvcr.layer_norm(
                expected + seen["residual"],
                norm.weight.detach().numpy(),
                norm.bias.detach().numpy(),
                norm.eps,
            )
        np.testing.assert_allclose(seen["result"], expected, rtol=1e-11, atol=1e-12)
        assert not drawn["masks"][0.2], "a view that was not drawn was computed"

        loss = handle.reconstruction_loss()
        if reconstruction == "all":
            masks = take_masks(drawn["masks"][0.2], dims, [range(POSITIONS)] * len(dims), inners)
            expected = mvcr.reconstruction_loss(h, autoencoders, inners, masks)
        else:
            masks = take_masks(drawn["masks"][0.2], dims, chosen, inners)
            expected = mvcr.reconstruction_loss_chosen(h, autoencoders, draws, inners, masks)
        assert loss.dtype == torch.float64
        assert math.isclose(loss.item(), expected, rel_tol=1e-11)
        assert not drawn["masks"][0.2]
        (task_loss + loss).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_the_loss_of_several_layers_is_the_sum_of_theirs():
    model, handle = plain_attach(layers=[2, 0], dropout=0.0)
    model(torch.randn(BATCH, POSITIONS, HIDDEN))
    kept = {i: list(path(handle, i).kept) for i in (0, 2)}
    total = handle.reconstruction_loss()
    parts = []
    for i in (0, 2):
        path(handle, i).kept[:] = kept[i]
        parts.append(handle.reconstruction_loss())
    assert torch.equal(total, parts[0] + parts[1])


def test_the_loss_on_chosen_positions_is_the_full_loss_in_expectation():
    model, handle = plain_attach(reconstruction="chosen", dims=(4, 6, 6))
    # autoencoders of different quality, positions of different size: both must be weighted evenly
    with torch.no_grad():
        path(handle, 1)[0].up.bias.add_(2.0)
    x = torch.randn(2, 40, HIDDEN) * torch.linspace(0.1, 3, 40)[:, None]
    values = {}
    for reconstruction in ("all", "chosen"):
        handle._reconstruction = reconstruction
        torch.manual_seed(0)
        values[reconstruction] = []
        for _ in range(300):
            model(x)
            values[reconstruction].append(handle.reconstruction_loss().item())
    means = {name: np.mean(v) for name, v in values.items()}
    error = math.hypot(*(np.std(v) / math.sqrt(len(v)) for v in values.values()))
    assert abs(means["all"] - means["chosen"]) < 5 * error
    assert error < 0.05 * means["all"]


# --- draws ------------------------------------------------------------------------------------------------


def views_seen(model, handle, positions, rows=1):
    """Views by what they do: each autoencoder writes its own constant, and "unchanged" leaves -1."""
    with torch.no_grad():
        for j, autoencoder in enumerate(path(handle, 0)):
            autoencoder.up.weight.zero_()
            autoencoder.up.bias.fill_(float(j))
        seen = {}
        hook = model.layers[1].register_forward_pre_hook(lambda m, args: seen.update(h=args[0]))
        nn.init.zeros_(model.layers[0].mlp.weight)
        nn.init.zeros_(model.layers[0].mlp.bias)
        model(torch.full((rows, positions, HIDDEN), -1.0))
        hook.remove()
    views = seen["h"][..., 0]
    assert torch.equal(seen["h"], views[..., None].expand_as(seen["h"]))
    return views


@pytest.mark.parametrize("n", [1, 2, 3])
def test_views_have_the_documented_frequencies(n):
    model, handle = plain_attach(layers=[0], dims=(4,) * n)
    count = 30_000
    views = views_seen(model, handle, count)
    for view in range(-1, n):
        p = (n - 1) / (2 * n - 1) if view == -1 else 1 / (2 * n - 1)
        sigma = math.sqrt(p * (1 - p) / count)
        assert abs((views == view).double().mean().item() - p) <= 5 * sigma, view


@pytest.mark.parametrize("n", [2, 3])
def test_draws_of_neighbouring_positions_are_independent(n):
    model, handle = plain_attach(layers=[0], dims=(4,) * n)
    count = 30_000
    views = views_seen(model, handle, count)[0]
    same = (views[1:] == views[:-1]).double().mean().item()
    p = ((n - 1) / (2 * n - 1)) ** 2 + n / (2 * n - 1) ** 2
    assert abs(same - p) <= 5 * math.sqrt(p * (1 - p) / count)


def test_all_rows_of_a_batch_share_their_views_unless_told_otherwise():
    model, handle = plain_attach(layers=[0], dims=(4, 4))
    views = views_seen(model, handle, 500, rows=4)
    assert torch.equal(views, views[:1].expand_as(views))
    model, handle = plain_attach(layers=[0], dims=(4, 4), share_views=False)
    views = views_seen(model, handle, 5_000, rows=4)
    same = (views[0] == views[1]).double().mean().item()
    assert abs(same - 1 / 3) <= 5 * math.sqrt(2 / 9 / 5_000)


def test_inner_paths_are_drawn_evenly_once_per_autoencoder_and_forward():
    model, handle = plain_attach(dims=(4, 4))
    calls = []
    for j, autoencoder in enumerate(path(handle, 1)):
        for r, sub in enumerate(autoencoder.subs):
            sub["up"].register_forward_hook(lambda m, args, out, key=(j, r): calls.append(key))
    counts = {}
    x = torch.zeros(1, 60, HIDDEN)
    forwards = 900
    for _ in range(forwards):
        calls.clear()
        model(x)
        inner = [next((r for j, r in calls if j == which), 2) for which in (0, 1)]
        assert len(calls) == sum(r != 2 for r in inner), "two inner paths in one forward"
        # the loss goes through the inner paths of the forward
        forward_calls = sorted(calls)
        calls.clear()
        handle.reconstruction_loss()
        assert sorted(calls) == forward_calls
        counts[tuple(inner)] = counts.get(tuple(inner), 0) + 1
    for pair in [(a, b) for a in range(3) for b in range(3)]:
        assert abs(counts[pair] - forwards / 9) <= 5 * math.sqrt(forwards * 8 / 81), pair


def test_only_the_drawn_view_of_a_position_is_computed(drawn):
    model, handle = plain_attach(dims=(4, 6, 8))
    rows = [[], [], []]
    for j, autoencoder in enumerate(path(handle, 1)):
        autoencoder.register_forward_hook(lambda m, args, out, j=j: rows[j].append(tuple(out.shape[:-1])))
    skipped = 0
    for seed in range(20):
        torch.manual_seed(seed)
        drawn["integers"].clear()
        for reconstruction in ("all", "chosen"):
            handle._reconstruction = reconstruction
            for calls in rows:
                calls.clear()
            drawn["integers"].clear()
            model(torch.randn(2, 5, HIDDEN))
            counts = [int((drawn["integers"][0] == j).sum()) for j in range(3)]
            expected = [[(2, count)] if count else [] for count in counts]
            assert rows == expected
            skipped += counts.count(0)
            handle.reconstruction_loss()
            again = [[(2, 5)]] * 3 if reconstruction == "all" else expected
            assert rows == [first + second for first, second in zip(expected, again, strict=True)]
    assert skipped


def test_the_same_seed_gives_the_same_draws():
    model, handle = plain_attach(noise=0.1)
    x = torch.randn(BATCH, POSITIONS, HIDDEN)
    results = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        results.append((model(x), handle.reconstruction_loss()))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][0], results[2][0])


# --- families ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_is_the_untouched_model_bit_for_bit(family, placement):
    model = tiny(family, dropout=0.1).eval()
    inputs = batch()
    untouched = model(**inputs).logits
    names = list(model.state_dict())
    hooks = hook_counts(model)
    handle = RandomAutoencoders.attach(model, layers=[0, 2], dims=(4, 8), placement=placement)
    assert list(model.state_dict()) == names
    assert [name for name, _ in model.named_parameters() if "autoencoder" in name] == []
    state = torch.get_rng_state()
    assert torch.equal(model(**inputs).logits, untouched)
    assert torch.equal(torch.get_rng_state(), state), "evaluation drew random numbers"
    model.train()
    assert not torch.equal(model(**inputs).logits, untouched)
    model.eval()
    assert torch.equal(model(**inputs).logits, untouched)
    handle.detach()
    assert torch.equal(model(**inputs).logits, untouched)
    assert list(model.state_dict()) == names
    assert hook_counts(model) == hooks
    # in training mode too there is nothing left
    torch.manual_seed(5)
    detached = model.train()(**inputs).logits
    fresh = tiny(family, dropout=0.1).train()
    torch.manual_seed(5)
    assert torch.equal(fresh(**inputs).logits, detached)
    handle.detach()


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_path_stands_where_the_placement_says(family, placement):
    model = tiny(family, dropout=0.1).train()
    names = {"between": LAYERS, "ffn": SITES}[placement]
    site = model.get_submodule(names[family].format(1))
    seen = {}
    site.register_forward_hook(lambda m, args, out: seen.update(before=out))
    handle = RandomAutoencoders.attach(
        model, layers=[1], dims=(4, 8), placement=placement, noise=0.0, extra_dropout=0.0
    )
    site.register_forward_hook(lambda m, args, out: seen.update(after=out))
    with torch.no_grad():
        for autoencoder in path(handle, 1):
            autoencoder.up.weight.zero_()
            autoencoder.up.bias.fill_(7.0)
    model(**batch())
    before, after = (out[0] if isinstance(out, tuple) else out for out in (seen["before"], seen["after"]))
    compressed = (after == 7.0).all(-1)
    assert torch.equal(compressed, compressed[:1].expand_as(compressed))
    assert 0 < compressed[0].sum() < POSITIONS
    assert torch.equal(after[~compressed], before[~compressed])


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_task_gradients_reach_model_and_autoencoders(family, placement):
    model = tiny(family).train()
    handle = RandomAutoencoders.attach(model, layers=[0, 1], dims=(4,), placement=placement)
    torch.manual_seed(0)
    model(**batch()).loss.backward()
    for i in (0, 1):
        assert path(handle, i)[0].down.weight.grad.abs().sum() > 0
        assert path(handle, i)[0].up.weight.grad.abs().sum() > 0
    embeddings = model.get_input_embeddings().weight
    assert embeddings.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("family", "p"), [("bert", 0.1), ("roberta", 0.1), ("distilbert", 0.1), ("gpt2", 0.1), ("llama", 0.0)]
)
def test_placement_sets_noise_and_extra_dropout(family, p):
    model = tiny(family, dropout=0.1)
    between = RandomAutoencoders.attach(model, layers=[0], dims=(4,))
    assert (path(between, 0).noise, path(between, 0).extra_dropout) == (0.0, 0.0)
    between.detach()
    ffn = RandomAutoencoders.attach(model, layers=[0], dims=(4,), placement="ffn")
    assert (path(ffn, 0).noise, path(ffn, 0).extra_dropout) == (0.002, p)


# --- gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reconstruction", ["all", "chosen"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_reconstruction_loss_gives_the_model_no_gradient(placement, reconstruction):
    found = {}
    for which in ("task", "reconstruction", "both"):
        model = tiny("bert", dropout=0.1).train()
        torch.manual_seed(2)
        handle = RandomAutoencoders.attach(
            model, layers=[0, 2], dims=(4, 8), placement=placement, reconstruction=reconstruction
        )
        loss = model(**batch()).loss
        if which != "task":
            handle.reconstruction_loss().backward()
        if which != "reconstruction":
            loss.backward()
        found[which] = gradients(model), gradients(handle)
    assert_same_gradients(found["both"][0], found["task"][0])
    assert all(gradient is None for gradient in found["reconstruction"][0].values())
    touched = 0
    for name, both in found["both"][1].items():
        parts = [found[which][1][name] for which in ("task", "reconstruction")]
        parts = [part for part in parts if part is not None]
        assert (both is None) == (not parts)
        if parts:
            torch.testing.assert_close(both, sum(parts))
            touched += len(parts) == 2 and all(part.abs().sum() > 0 for part in parts)
    assert touched >= 8


def test_a_forward_with_all_positions_unchanged_has_loss_zero_and_a_backward():
    model, handle = plain_attach(reconstruction="chosen", dims=(4, 4, 4))
    zeros = 0
    for seed in range(40):
        torch.manual_seed(seed)
        model(torch.randn(2, 1, HIDDEN))
        loss = handle.reconstruction_loss()
        loss.backward()
        zeros += loss.item() == 0.0
    assert 5 < zeros < 30
    assert all(torch.isfinite(p.grad).all() for p in handle.parameters() if p.grad is not None)


OPTIMIZERS = {
    "torch": lambda params, lr: torch.optim.AdamW(params, lr=lr),
    "masked": lambda params, lr: MaskedAdamW(params, lr=lr, policy=Bernoulli(0.5)),
    "child_tuning": lambda params, lr: ChildTuningAdamW(params, lr=lr, variant="F", keep=0.5),
}


@pytest.mark.parametrize(
    ("name", "placement"),
    [("torch", "between"), ("torch", "ffn"), ("masked", "ffn"), ("child_tuning", "ffn")],
)
def test_one_optimizer_trains_model_and_autoencoders(name, placement):
    model = tiny("bert", num_hidden_layers=2).train()
    handle = RandomAutoencoders.attach(model, layers=[1], dims=(8, 12), placement=placement)
    optimizer = OPTIMIZERS[name]([*model.parameters(), *handle.parameters()], 1e-2)
    inputs = batch()
    task, rebuilt = [], []
    for _ in range(60):
        loss, reconstruction = model(**inputs).loss, handle.reconstruction_loss()
        (loss + reconstruction).backward()
        optimizer.step()
        optimizer.zero_grad()
        task.append(loss.item())
        rebuilt.append(reconstruction.item())
    assert np.mean(task[-10:]) < 0.5 * np.mean(task[:5])
    assert np.mean(rebuilt[-10:]) < 0.5 * np.mean(rebuilt[:5])


@pytest.mark.parametrize("name", ["torch", "masked"])
def test_two_optimizers_train_as_documented(name):
    model = tiny("bert", num_hidden_layers=2).train()
    handle = RandomAutoencoders.attach(model, layers=[0, 1], dims=(8, 12), placement="ffn")
    main = OPTIMIZERS[name]([*model.parameters(), *handle.parameters()], 2e-3)
    reconstruction = OPTIMIZERS[name](handle.parameters(), 1e-2)
    inputs = batch()
    task, rebuilt = [], []
    for _ in range(60):
        loss = model(**inputs).loss
        loss.backward()
        own = list(handle.parameters())
        rebuilt_loss = handle.reconstruction_loss()
        before = gradients(model)
        grads = torch.autograd.grad(rebuilt_loss, own, materialize_grads=True)
        assert_same_gradients(gradients(model), before)
        main.step()
        for p, grad in zip(own, grads, strict=True):
            p.grad = grad
        reconstruction.step()
        main.zero_grad()
        assert all(p.grad is None for p in own)
        task.append(loss.item())
        rebuilt.append(rebuilt_loss.item())
    assert np.mean(task[-10:]) < 0.5 * np.mean(task[:5])
    assert np.mean(rebuilt[-10:]) < 0.5 * np.mean(rebuilt[:5])


# --- what is kept -----------------------------------------------------------------------------------------


def test_only_the_last_forward_is_kept_and_asking_clears_it():
    model, handle = plain_attach(layers=[0, 2])
    x = torch.randn(BATCH, POSITIONS, HIDDEN)
    for _ in range(5):
        model(x)
        assert [len(path(handle, i).kept) for i in (0, 2)] == [1, 1]
    assert not path(handle, 0).kept[0].x.requires_grad
    handle.reconstruction_loss()
    assert [len(path(handle, i).kept) for i in (0, 2)] == [0, 0]
    with pytest.raises(
        RuntimeError, match="needs a training forward since its last call, got none; call it once"
    ):
        handle.reconstruction_loss()
    model(x)
    model.eval()(x)
    with pytest.raises(RuntimeError, match="needs a training forward"):
        handle.reconstruction_loss()
    model.train()(x)
    handle.detach()
    assert [len(path(handle, i).kept) for i in (0, 2)] == [0, 0]


def test_feed_forward_blocks_called_in_chunks_count_as_one_forward():
    model = tiny("bert", chunk_size_feed_forward=4).train()
    handle = RandomAutoencoders.attach(model, layers=[1], dims=(4,), placement="ffn", dropout=0.0)
    for _ in range(3):
        model(**batch())
        assert [kept.x.shape[-2] for kept in path(handle, 1).kept] == [4, 4, 4]
    chunks = list(path(handle, 1).kept)
    whole = handle.reconstruction_loss()
    parts = []
    for chunk in chunks:
        path(handle, 1).kept.append(chunk)
        parts.append(handle.reconstruction_loss())
    torch.testing.assert_close(whole, torch.stack(parts).mean())


def run_checkpointed(model, settings, inputs, enable):
    torch.manual_seed(4)
    handle = RandomAutoencoders.attach(model, **settings)
    if enable:
        enable(model)
    torch.manual_seed(6)
    out = model(**inputs)
    loss = out.loss if hasattr(out, "loss") else out.square().mean()
    state = torch.get_rng_state()
    loss.backward()
    kept = [len(p.kept) for p in handle.autoencoders.values()]
    torch.set_rng_state(state)
    rebuilt = handle.reconstruction_loss()
    rebuilt.backward()
    return loss, rebuilt, gradients(model), gradients(handle), kept


def enable_checkpointing(use_reentrant):
    def enable(model):
        enable = (
            getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        )
        enable({"use_reentrant": use_reentrant})

    return enable


def assert_same_run(plain, checkpointed):
    assert plain[4] == checkpointed[4] == [1, 1]
    assert torch.equal(plain[0], checkpointed[0])
    assert torch.equal(plain[1], checkpointed[1])
    assert_same_gradients(plain[2], checkpointed[2])
    assert_same_gradients(plain[3], checkpointed[3])


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non_reentrant", "reentrant"])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_gradient_checkpointing_changes_nothing(family, placement, use_reentrant):
    settings = {"layers": [0, 1], "dims": (4, 8), "placement": placement, "noise": 0.01, "extra_dropout": 0.1}
    runs = [
        run_checkpointed(tiny(family, dropout=0.1).train(), settings, batch(), enable)
        for enable in (None, enable_checkpointing(use_reentrant))
    ]
    assert_same_run(*runs)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non_reentrant", "reentrant"])
def test_checkpointing_whole_layers_with_their_hooks_changes_nothing(use_reentrant):
    settings = {"layers": [0, 1], "dims": (4, 8), "hidden_size": HIDDEN, "noise": 0.01}
    x = torch.randn(BATCH, POSITIONS, HIDDEN, requires_grad=True)
    runs = [
        run_checkpointed(Plain(use_reentrant=how), settings, {"h": x}, None) for how in (None, use_reentrant)
    ]
    assert_same_run(*runs)


# --- the handle -------------------------------------------------------------------------------------------


def test_a_handle_holds_its_autoencoders_and_nothing_of_the_model():
    model, handle = plain_attach(layers=[2, 0], dims=(4, 6))
    names = [name for name, _ in handle.named_parameters()]
    assert names == list(handle.state_dict())
    assert len(names) == 2 * 2 * 12
    assert "autoencoders.2.0.down.weight" in names
    assert "autoencoders.0.1.subs.1.up.bias" in names
    assert path(handle, 2)[1].down.weight.shape == (6, HIDDEN)
    assert path(handle, 2)[1].subs[0]["down"].weight.shape == (3, 6)
    ours = {id(p) for p in model.parameters()}
    assert not ours & {id(p) for p in handle.parameters()}
    assert not {id(m) for m in model.modules()} & {id(m) for m in handle.modules()}


def test_state_survives_a_file_of_weights_only():
    model, handle = plain_attach()
    file = io.BytesIO()
    torch.save(handle.state_dict(), file)
    file.seek(0)
    other_model, other = plain_attach()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1)
    x = torch.randn(BATCH, POSITIONS, HIDDEN)

    def results():
        outputs = []
        for one in (model, other_model):
            torch.manual_seed(1)
            outputs.append(one(x))
        return outputs

    assert not torch.equal(*results())
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(*results())
    _, wider = plain_attach(dims=(4, 8))
    with pytest.raises(RuntimeError, match="size mismatch"):
        wider.load_state_dict(handle.state_dict())


def test_handle_and_layer_must_both_be_in_training_mode():
    model, handle = plain_attach(dims=(4,))
    x = torch.randn(BATCH, POSITIONS, HIDDEN)
    untouched = model.eval()(x)
    model.train()
    assert not torch.equal(model(x), untouched)
    handle.eval()
    assert torch.equal(model(x), untouched)
    handle.train()
    assert not torch.equal(model(x), untouched)
    model.layers[1].eval()
    assert torch.equal(model(x), untouched)


def test_tuples_pass_with_their_other_items():
    model, _ = plain_attach()
    h, rest = model.layers[1](torch.randn(BATCH, POSITIONS, HIDDEN))
    assert h.shape == (BATCH, POSITIONS, HIDDEN)
    assert rest == "attention"


def flags(model):
    return [p.requires_grad for p in model.parameters()]


def test_warm_start_trains_the_autoencoders_alone_and_restores_requires_grad():
    model, handle = plain_attach()
    for p in list(model.parameters())[::3]:
        p.requires_grad_(False)
    before = flags(model)
    weights = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([*model.parameters(), *handle.parameters()], lr=1e-2)
    x = torch.randn(BATCH, POSITIONS, HIDDEN)
    losses = []
    with handle.warm_start():
        assert not any(flags(model))
        assert all(flags(handle))
        for _ in range(40):
            task, loss = model(x).mean(), handle.reconstruction_loss()
            (0.01 * task + loss).backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert flags(model) == before
    assert losses[-1] < losses[0]
    assert all(torch.equal(w, weights[name]) for name, w in model.state_dict().items())
    handle.warm_start()
    assert not any(flags(model))
    with pytest.raises(
        RuntimeError, match=r"needs the last one to have ended, got a second; call end_warm_start\(\)"
    ):
        handle.warm_start()
    handle.end_warm_start()
    assert flags(model) == before
    handle.end_warm_start()
    with pytest.raises(KeyError):
        with handle.warm_start():
            raise KeyError
    assert flags(model) == before
    handle.warm_start()
    handle.remove()
    assert flags(model) == before


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_noise_only_is_noise_and_nothing_else(placement):
    model = Plain()
    site, ffn = (
        (model.layers[1], {}) if placement == "between" else (model.layers[1].mlp, {"ffn_name": "mlp"})
    )
    seen = {}
    site.register_forward_hook(lambda m, args, out: seen.update(before=out))
    handle = RandomAutoencoders.attach(
        model, layers=[1], placement=placement, noise_only=True, hidden_size=HIDDEN, **ffn
    )
    site.register_forward_hook(lambda m, args, out: seen.update(after=out))
    x = torch.randn(BATCH, 4000, HIDDEN)
    model(x)
    before, after = (out[0] if isinstance(out, tuple) else out for out in seen.values())
    noise = (after - before).double()
    assert abs(noise.std().item() / 0.002 - 1) < 5 / math.sqrt(2 * noise.numel()) + 1e-3
    assert abs(noise.mean().item()) < 5 * 0.002 / math.sqrt(noise.numel())
    assert list(handle.parameters()) == []
    with pytest.raises(RuntimeError, match="not with noise_only=True"):
        handle.reconstruction_loss()
    assert torch.equal(model.eval()(x), Plain().eval()(x))


# --- dtypes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_autoencoders_have_the_dtype_of_their_layer(dtype, placement):
    model = tiny("bert").to(dtype).train()
    handle = RandomAutoencoders.attach(model, layers=[1], dims=(4, 8), placement=placement)
    assert {p.dtype for p in handle.parameters()} == {dtype}
    optimizer = torch.optim.AdamW([*model.parameters(), *handle.parameters()], lr=1e-3)
    for _ in range(3):
        out = model(**batch())
        assert out.logits.dtype == dtype
        loss = handle.reconstruction_loss()
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        (out.loss + loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.isfinite(p).all() for p in handle.parameters())


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_float32_autoencoders_serve_a_bf16_model_and_autocast(placement):
    for case in ("cast", "autocast"):
        model = tiny("bert", dropout=0.1).train()
        handle = RandomAutoencoders.attach(model, layers=[1], dims=(4, 8), placement=placement)
        if case == "cast":
            model.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
            loss = model(**batch()).loss
        (loss + handle.reconstruction_loss()).backward()
        assert {p.dtype for p in handle.parameters()} == {torch.float32}
        assert path(handle, 1)[0].up.bias.grad.dtype == torch.float32


# --- finding layers, and errors ---------------------------------------------------------------------------


def test_layers_are_the_longest_list_that_is_not_inside_another():
    model, handle = plain_attach(layers=[2])
    model.layers[2](torch.zeros(1, 2, HIDDEN))
    assert len(path(handle, 2).kept) == 1


def test_layers_can_be_given():
    model = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN))
    handle = RandomAutoencoders.attach(
        model, layers=[1], dims=(4,), layer_modules=list(model), hidden_size=HIDDEN
    )
    model(torch.zeros(1, 2, HIDDEN))
    assert len(path(handle, 1).kept) == 1


def twins():
    model = nn.Module()
    model.encoder = nn.Sequential(nn.ModuleList([nn.Identity()]))
    model.decoder = nn.ModuleList([nn.Identity()])
    return model


ERRORS = [
    (
        "beyond_the_last",
        {"layers": [0, 3]},
        "layers must be at most 2, got 3; the model has 3 layers, counted from 0",
    ),
    ("negative", {"layers": [-1]}, "layers must be at least 0, got -1; layers count from 0"),
    ("twice", {"layers": [1, 1]}, "layers must not repeat, got 1 twice; repeat dims="),
    ("none", {"layers": []}, "layers must hold at least one index, got none; the model has layers 0 to 2"),
    ("float_index", {"layers": [1.0]}, "layers must be of integers, got 1.0"),
    ("bool_index", {"layers": [True]}, "layers must be of integers, got True"),
    ("narrow", {"dims": (4, 1)}, "dims must be at least 2, got 1; inner autoencoders have half of it"),
    ("no_dims", {"dims": ()}, "dims must hold at least one width, got none"),
    ("placement", {"placement": "inside"}, "placement must be 'between' or 'ffn', got 'inside'"),
    ("reconstruction", {"reconstruction": "some"}, "reconstruction must be 'all' or 'chosen', got 'some'"),
    ("dropout", {"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0; 0.0 switches it off"),
    ("extra_dropout", {"extra_dropout": -0.1}, r"extra_dropout must be in \[0, 1\), got -0.1"),
    ("noise", {"noise": -1.0}, "noise must be finite and not negative, got -1.0; 0.0 switches it off"),
    ("nan_noise", {"noise": float("nan")}, "noise must be finite and not negative, got nan"),
    (
        "silent_noise",
        {"noise": 0.0, "noise_only": True},
        "noise must be positive with noise_only=True, got 0.0",
    ),
    (
        "ffn_name",
        {"ffn_name": "mlp"},
        "ffn_name must not be given for placement='between', got 'mlp'; use 'ffn'",
    ),
    (
        "no_such_ffn",
        {"placement": "ffn", "ffn_name": "mpl"},
        "ffn_name must name a module of layer 1, got 'mpl'; it has mlp, experts",
    ),
    (
        "no_ffn",
        {"placement": "ffn"},
        "must find output.dropout, ffn or mlp in layer 1, got a Layer without; give ffn_name=",
    ),
    (
        "hidden_size",
        {"hidden_size": None},
        "hidden_size must be given for a model without config.hidden_size",
    ),
    ("zero_width", {"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
    (
        "foreign",
        {"layer_modules": [nn.Identity()]},
        "layer_modules must be modules of the model, got a Identity",
    ),
]


@pytest.mark.parametrize(("settings", "message"), [pytest.param(*row[1:], id=row[0]) for row in ERRORS])
def test_bad_settings_get_a_sentence_and_leave_the_model_alone(settings, message):
    model = Plain()
    with pytest.raises((ValueError, TypeError), match=message):
        plain_attach(model, **settings)
    assert not any(hook_counts(model))


def test_bad_models_get_a_sentence():
    with pytest.raises(
        ValueError, match=r"must have one longest ModuleList, of its layers, got none; give layer_modules="
    ):
        plain_attach(nn.Linear(2, 2))
    with pytest.raises(
        ValueError, match=r"got 2 of equal length, encoder\.0 and decoder; give layer_modules="
    ):
        plain_attach(twins())
    model, _ = plain_attach(hidden_size=8)
    with pytest.raises(
        ValueError, match=r"must give hidden states \[\.\.\., positions, 8\], .* of shape \(1, 2, 16\); give"
    ):
        model(torch.zeros(1, 2, HIDDEN))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_second_handle_on_a_layer_is_refused(placement):
    model = tiny("bert")
    settings = {"dims": (4,), "placement": placement}
    first = RandomAutoencoders.attach(model, layers=[1], **settings)
    with pytest.raises(
        ValueError, match=r"layers must not have random autoencoders yet, got 1, which has; detach\(\)"
    ):
        RandomAutoencoders.attach(model, layers=[0, 1], **settings)
    RandomAutoencoders.attach(model, layers=[0], **settings)
    first.detach()
    RandomAutoencoders.attach(model, layers=[1], **settings)
