"""Contract under test: a delta turns its base into the tuned model and back, to the bit, in memory and in
files, and whatever is not its base is refused before anything is changed.
"""

import copy
import hashlib
import itertools
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import sparse_optim
from sparse_optim import (
    Bernoulli,
    ChildTuningAdamW,
    Delta,
    DeltaSwitcher,
    DPSAdamW,
    GradDropAdamW,
    GradualUnfreezing,
    MaskedAdamW,
    Schedule,
    SecondOrderAdamW,
    SquaredGradient,
    TensorDelta,
    TopK,
    apply_delta,
    extract_delta,
    load_delta,
    merge_deltas,
    patch_checkpoint,
    patching,
    push_delta,
    revert_delta,
    save_delta,
)
from sparse_optim.nn import mix_weights

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
MODES = ("xor", "replace", "add")


def integers(tensor):
    wide = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(wide)


def same_bits(left, right):
    """Whether two mappings of tensors, or two modules, have the same names and bytes."""
    left, right = (each.state_dict() if isinstance(each, nn.Module) else each for each in (left, right))
    return list(left) == list(right) and all(
        left[name].dtype == right[name].dtype and torch.equal(integers(left[name]), integers(right[name]))
        for name in left
    )


def fingerprint(model):
    tensors = model.state_dict() if isinstance(model, nn.Module) else model
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode() + integers(tensor).cpu().reshape(-1).numpy().tobytes())
    return digest.hexdigest()


def clone(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def random_bits(shape, dtype, generator):
    """Any bits: NaN payloads, infinities, denormals, both zeros."""
    width = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 256, (*shape, width), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


def a_base(dtype=F32, generator=None):
    generator = generator or torch.Generator().manual_seed(1)
    return {
        "embed.weight": random_bits((50, 40), dtype, generator),
        "layer.weight": random_bits((33, 31), dtype, generator),
        "layer.bias": random_bits((33,), dtype, generator),
        "steps": torch.tensor(7),
        "scale": random_bits((), dtype, generator),
        "nothing": torch.zeros(0, 4, dtype=dtype),
        "unchanged": random_bits((5, 5), dtype, generator),
    }


def tuned_from(base, density=0.05, seed=2):
    generator = torch.Generator().manual_seed(seed)
    tuned = clone(base)
    for name, tensor in tuned.items():
        if name != "unchanged" and tensor.is_floating_point():
            chosen = torch.rand(tensor.shape, generator=generator) < density
            tensor[chosen] = random_bits(tensor.shape, tensor.dtype, generator)[chosen]
    if "steps" in tuned:
        tuned["steps"] += 1
    return tuned


def saved_and_loaded(delta, folder):
    save_delta(delta, folder / "delta.safetensors")
    return load_delta(folder / "delta.safetensors")


def one_sentence(error):
    """What is wrong, and after a semicolon what to do."""
    text = str(error.value)
    assert text.endswith(".") and "\n" not in text and "; " in text and ", got " in text
    return text


def refuses(model, act, match):
    """`act` fails with one sentence, and the model has its bytes."""
    before = fingerprint(model)
    with pytest.raises((ValueError, TypeError), match=match) as error:
        act()
    one_sentence(error)
    assert fingerprint(model) == before


# --- apply, revert ----------------------------------------------------------------------------------------

SHAPES = st.lists(st.integers(0, 7), max_size=3).map(tuple)


@st.composite
def pairs(draw):
    """Two models of the same names, with any bits."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    base = {
        f"layer.{i}.weight": random_bits(shape, draw(st.sampled_from([F32, BF16, F16])), generator)
        for i, shape in enumerate(draw(st.lists(SHAPES, min_size=1, max_size=4)))
    }
    tuned = clone(base)
    density = draw(st.sampled_from([0.0, 0.05, 0.5, 1.0]))
    for tensor in tuned.values():
        chosen = torch.rand(tensor.shape, generator=generator) < density
        tensor[chosen] = random_bits(tensor.shape, tensor.dtype, generator)[chosen]
    return base, tuned


@settings(max_examples=150, deadline=None, derandomize=True)
@given(pairs())
def test_apply_then_revert_restores_every_byte_of_any_model(pair):
    base, tuned = pair
    model = clone(base)
    delta = extract_delta(base, tuned)
    apply_delta(model, delta)
    assert same_bits(model, tuned)
    revert_delta(model, delta)
    assert same_bits(model, base)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(pairs())
def test_replace_on_the_base_gives_the_tuned_bytes_and_the_base_gives_them_back(pair):
    base, tuned = pair
    model = clone(base)
    delta = extract_delta(base, tuned, mode="replace")
    apply_delta(model, delta)
    assert same_bits(model, tuned)
    revert_delta(model, delta, base=base)
    assert same_bits(model, base)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [F32, BF16, F16, torch.float64], ids=str)
def test_a_saved_delta_says_what_the_delta_says(dtype, mode, tmp_path):
    base, tuned = a_base(dtype), tuned_from(a_base(dtype))
    if mode == "add":
        del base["steps"], tuned["steps"]
    delta = extract_delta(base, tuned, mode=mode, base_model="the base")
    again = saved_and_loaded(delta, tmp_path)
    assert (again.mode, again.base_model, list(again.tensors)) == (mode, "the base", list(delta.tensors))
    for name, part in delta.tensors.items():
        other = again.tensors[name]
        assert (part.shape, part.dtype, part.base) == (other.shape, other.dtype, other.base)
        assert torch.equal(part.indices, other.indices) and part.indices.dtype == torch.int32
        assert torch.equal(integers(part.values), integers(other.values))
        expected = integers(base[name]).reshape(-1) != integers(tuned[name]).reshape(-1)
        assert torch.equal(expected.nonzero().view(-1), part.indices.long())


def test_add_is_exact_but_for_rounding_and_moves_other_weights_too():
    torch.manual_seed(0)
    base = {"weight": torch.randn(100, 100)}
    tuned = {"weight": base["weight"] + 0.01 * torch.randn(100, 100) * (torch.rand(100, 100) < 0.1)}
    delta = extract_delta(base, tuned, mode="add")
    other = {"weight": torch.ones(100, 100)}
    refuses(other, lambda: apply_delta(other, delta), "weights must be the base's")
    apply_delta(other, delta, verify=False)
    assert torch.equal(other["weight"], 1 + (tuned["weight"] - base["weight"]))
    model = clone(base)
    apply_delta(model, delta)
    torch.testing.assert_close(model, tuned, rtol=1e-6, atol=1e-7)
    refuses(model, lambda: revert_delta(model, delta), "to be reverted without its base, got mode 'add'")


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_the_pre_trained_encoder_gets_every_byte_back_in_memory_and_in_files(dtype, tmp_path):
    data = pytest.importorskip("benchmarks.data")
    try:
        weights = data.locate(data.MODEL)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    base = {name: t.to(dtype) if t.is_floating_point() else t for name, t in load_file(weights).items()}
    tuned = tuned_from(base, density=0.01)
    model = clone(base)
    delta = saved_and_loaded(extract_delta(base, tuned), tmp_path)
    apply_delta(model, delta)
    assert same_bits(model, tuned)
    revert_delta(model, delta)
    assert same_bits(model, base)
    save_file(base, tmp_path / "base.safetensors")
    patch_checkpoint(tmp_path / "base.safetensors", delta, tmp_path / "tuned.safetensors")
    assert same_bits(
        dict(sorted(load_file(tmp_path / "tuned.safetensors").items())), dict(sorted(tuned.items()))
    )
    patch_checkpoint(tmp_path / "tuned.safetensors", delta, tmp_path / "again.safetensors", revert=True)
    assert same_bits(
        dict(sorted(load_file(tmp_path / "again.safetensors").items())), dict(sorted(base.items()))
    )
    # what the format promises: at 1 % about 3 bytes for a 16-bit entry all told, 5 for 32 bits
    size = (tmp_path / "delta.safetensors").stat().st_size
    per_entry = size / delta.info()["changed"]
    assert per_entry < (5.2 if dtype == F32 else 3.2), per_entry


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("numel", [0, 1, 63, 64, 65, 200])
def test_places_of_all_chunks_are_found(numel, mode, monkeypatch):
    monkeypatch.setattr(patching, "_CHUNK", 64)
    base = {"w": torch.arange(numel, dtype=F32)}
    tuned = clone(base)
    tuned["w"][::63] += 0.5
    tuned["w"][-1:] += 0.25
    delta = extract_delta(base, tuned, mode=mode)
    expected = (base["w"] != tuned["w"]).nonzero().view(-1)
    assert torch.equal(delta.tensors["w"].indices.long(), expected)
    if mode == "add":
        assert torch.equal(delta.tensors["w"].values, (tuned["w"] - base["w"])[expected])
    model = clone(base)
    apply_delta(model, delta)
    assert same_bits(model, tuned)
    revert_delta(model, delta, base=None if mode == "xor" else base)
    assert same_bits(model, base)


def test_views_strides_and_parameters_are_changed_in_place():
    layer = nn.Linear(8, 6)
    base = copy.deepcopy(layer)
    with torch.no_grad():
        layer.weight[2, 3] += 1
    delta = extract_delta(base, layer)
    turned = {"weight": base.weight.detach().t().contiguous().t(), "bias": base.bias.detach().clone()}
    assert not turned["weight"].is_contiguous()
    apply_delta(turned, delta)
    assert same_bits(turned, layer)
    pointer = base.weight.data_ptr()
    apply_delta(base, delta)
    assert base.weight.data_ptr() == pointer and same_bits(base, layer) and base.weight.requires_grad
    # autograd knows that what it has saved is no longer there
    x = torch.randn(2, 8, requires_grad=True)
    loss = base(x).sum()
    revert_delta(base, delta)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_tensors_are_changed_too():
    base = {"weight": torch.zeros(4)}
    with torch.inference_mode():
        model = {"weight": torch.zeros(4)}
    delta = extract_delta(base, {"weight": torch.tensor([0.0, 1, 0, 0])})
    apply_delta(model, delta)
    assert model["weight"].tolist() == [0, 1, 0, 0]
    revert_delta(model, delta)
    switcher = DeltaSwitcher(model, {"task": delta})
    switcher.activate("task")
    assert model["weight"].tolist() == [0, 1, 0, 0]


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["xor", "replace"])
@pytest.mark.parametrize("place", ["a listed entry", "another entry", "another tensor"])
def test_another_base_is_refused_wherever_it_differs(place, mode):
    base, tuned = a_base(), tuned_from(a_base())
    delta = extract_delta(base, tuned, mode=mode, base_model="acme/base")
    model = clone(base)
    name = "unchanged" if place == "another tensor" else "layer.weight"
    listed = delta.tensors[name].indices.long()
    free = torch.ones(model[name].numel(), dtype=torch.bool)
    free[listed] = False
    where = listed[0] if place == "a listed entry" else free.nonzero()[0]
    integers(model[name]).view(-1)[where] ^= 1
    refuses(
        model, lambda: apply_delta(model, delta), rf"\(acme/base\), got others in 1 of 7 tensors, '{name}'"
    )


def test_applying_or_reverting_twice_is_refused():
    base, tuned = a_base(), tuned_from(a_base())
    delta = extract_delta(base, tuned)
    model = clone(base)
    refuses(model, lambda: revert_delta(model, delta), "weights must be the tuned model's")
    apply_delta(model, delta)
    refuses(model, lambda: apply_delta(model, delta), "weights must be the base's")


def test_other_dtypes_shapes_and_names_are_refused():
    base, tuned = a_base(), tuned_from(a_base())
    delta = extract_delta(base, tuned)
    for model, match in [
        (
            {name: t.bfloat16() if t.is_floating_point() else t for name, t in base.items()},
            "load the model with the dtype",
        ),
        (
            base | {"layer.weight": base["layer.weight"][:-1]},
            r"as float32 \[33, 31\], got float32 \[32, 31\]",
        ),
        ({f"model.{name}": tensor for name, tensor in base.items()}, "no tensor of that name"),
        ({name: tensor for name, tensor in base.items() if name != "unchanged"}, "must have 'unchanged'"),
    ]:
        model = clone(model)
        refuses(model, lambda model=model: apply_delta(model, delta), match)
        refuses(model, lambda model=model: revert_delta(model, delta), match)
    with pytest.raises(TypeError, match="model must be a module or a mapping") as error:
        apply_delta("model.safetensors", delta)
    one_sentence(error)
    with pytest.raises(TypeError, match="load_delta reads one") as error:
        apply_delta(base, "task.safetensors")
    one_sentence(error)


INDEX = torch.tensor([1, 3], dtype=torch.int32)


@pytest.mark.parametrize(
    ("part", "match"),
    [
        (TensorDelta((4,), F32, INDEX.flip(0), torch.zeros(2)), "indices of 'w' must ascend"),
        (TensorDelta((4,), F32, INDEX[:1].repeat(2), torch.zeros(2)), "indices of 'w' must ascend"),
        (TensorDelta((3,), F32, INDEX, torch.zeros(2)), "indices of 'w' must ascend from 0 to 2 at most"),
        (TensorDelta((4,), F32, INDEX - 2, torch.zeros(2)), "indices of 'w' must ascend from 0"),
        (TensorDelta((4,), F32, INDEX.long(), torch.zeros(2)), "must be torch.int32, got torch.int64"),
        (TensorDelta((4,), F32, INDEX, torch.zeros(3)), r"one for each index, got torch.float32 \[3\]"),
        (TensorDelta((4,), BF16, INDEX, torch.zeros(2)), r"must be torch.bfloat16 \[2\]"),
        (TensorDelta((4,), F32, None, torch.zeros(2, 2)), r"the whole tensor, torch.float32 \[4\]"),
    ],
    ids=["unsorted", "twice", "too large", "negative", "wide", "more values", "wide values", "whole"],
)
def test_a_delta_cannot_be_made_of_what_does_not_fit(part, match):
    with pytest.raises(ValueError, match=match) as error:
        Delta({"w": part}, "replace")
    one_sentence(error)
    with pytest.raises(ValueError, match="mode must be"):
        Delta({}, "swap")
    with pytest.raises(ValueError, match="config must be None or hold"):
        Delta({}, "xor", config={"labels": 3})


def test_extracting_refuses_two_models_that_are_not_of_one_kind():
    base = a_base()
    for tuned, match in [
        ({name: t for name, t in base.items() if name != "scale"}, r"no 'scale' \(1 are missing\)"),
        (base | {"layer.bias": torch.zeros(34)}, r"'layer.bias' as float32 \[33\], got float32 \[34\]"),
        (base | {"layer.bias": torch.zeros(33).half()}, r"'layer.bias' as float32 \[33\], got float16"),
        (base | {"layer.bias": torch.zeros(33, device="meta")}, "one on the meta device"),
        (base | {"layer.bias": torch.zeros(33).to_sparse()}, "must be a plain dense tensor"),
        (base | {"layer.bias": [1]}, "must be a tensor, got list"),
        (base | {"layer.bias": torch.zeros(33, dtype=torch.complex128)}, "at most 8 bytes"),
        (base | {"module.layer.bias": base["layer.bias"]}, "must differ without what wrappers add"),
        (base | {"layer.bias": base["embed.weight"].view(-1)[3:36]}, "overlap"),
    ]:
        with pytest.raises((ValueError, TypeError), match=match) as error:
            extract_delta(base, tuned)
        one_sentence(error)
    with pytest.raises(ValueError, match="base must have tensors, got none"):
        extract_delta({}, base)
    with pytest.raises(TypeError, match=r"write \['scale'\]"):
        extract_delta(base, base, ignore="scale")
    with pytest.raises(ValueError, match=r"not\s+floating-point"):
        extract_delta(base, base | {"steps": torch.tensor(8)}, mode="add")
    assert (
        "scale"
        not in extract_delta(base, {n: t for n, t in base.items() if n != "scale"}, ignore=["sc*"]).tensors
    )


def test_buffers_that_are_no_longer_saved_may_be_missing_and_stay_in_the_base(tmp_path):
    base, tuned = a_base(), tuned_from(a_base())
    older = base | {"position_ids": torch.arange(5), "rotary.inv_freq": torch.ones(2)}
    # also where the tuned model's names have a prefix, which is not to be looked for in these
    wrapped = {f"bert.{name}": tensor for name, tensor in tuned.items()}
    for other in (tuned, wrapped):
        delta = extract_delta(older, other)
        assert delta.info()["changed"] == extract_delta(base, tuned).info()["changed"]
        save_file(older, tmp_path / "base.safetensors")
        patch_checkpoint(tmp_path / "base.safetensors", delta, tmp_path / "tuned.safetensors")
        found = load_file(tmp_path / "tuned.safetensors")
        assert same_bits({name: found[name] for name in other}, other) and len(found) == len(older)
        patch_checkpoint(tmp_path / "tuned.safetensors", delta, tmp_path / "again.safetensors", revert=True)
        again = load_file(tmp_path / "again.safetensors")
        assert again.keys() == older.keys() and same_bits({name: again[name] for name in older}, older)
    with pytest.raises(ValueError, match="got no 'weight'"):
        extract_delta(base | {"weight": torch.ones(2)}, tuned)


# --- names: wrappers, prefixes, ties, heads ---------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))


def test_tied_weights_count_once_and_follow_each_other(tmp_path):
    base = Tied()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.embed.weight[3, 2] += 1
        tuned.seen += 5
    delta = saved_and_loaded(extract_delta(base, tuned), tmp_path)
    assert delta.aliases == {"head.weight": "embed.weight"} and "head.weight" not in delta.tensors
    model = copy.deepcopy(base)
    apply_delta(model, delta)
    assert same_bits(model, tuned) and model.head.weight is model.embed.weight
    # a checkpoint that has either name
    for name in ("embed.weight", "head.weight"):
        stored = {
            "body.weight": base.body.weight.detach(),
            "body.bias": base.body.bias.detach(),
            "seen": base.seen,
        }
        stored = clone(stored | {name: base.embed.weight.detach()})
        again = extract_delta(stored, tuned)
        apply_delta(stored, again)
        assert torch.equal(stored[name], tuned.embed.weight)
        assert extract_delta(tuned, stored).info()["changed"] == 0


def test_what_is_tied_here_and_apart_there_is_compared_apart_and_refused_where_both_are_one():
    base = {"a": torch.zeros(3), "b": torch.ones(3)}
    shared = torch.tensor([1.0, 2, 3])
    delta = extract_delta(base, {"a": shared, "b": shared})
    model = clone(base)
    apply_delta(model, delta)
    assert torch.equal(model["a"], shared) and torch.equal(model["b"], shared)
    tied = torch.zeros(3)
    model = {"a": tied, "b": tied}
    refuses(model, lambda: apply_delta(model, delta, verify=False), "tied; untie it first")


def test_wrappers_leave_no_trace_in_names():
    base = Tied()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.body.bias += 1
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in tuned.state_dict().items()}
    delta = extract_delta(torch.compile(base, backend="eager"), wrapped)
    assert delta.info()["changed"] == 6
    apply_delta(nn.DataParallel(base), delta)
    assert same_bits(base, tuned)


def test_a_model_inside_another_with_a_new_head_is_its_base_with_a_prefix(tmp_path):
    base = a_base()
    tuned = {f"bert.{name}": tensor for name, tensor in tuned_from(base).items()}
    tuned |= {"classifier.weight": torch.randn(3, 5), "classifier.bias": torch.randn(3)}
    delta = saved_and_loaded(extract_delta(base, tuned), tmp_path)
    assert (delta.prefix, delta.info()["whole_tensors"]) == ("bert.", 2)
    start = clone({f"bert.{name}": tensor for name, tensor in base.items()})
    start |= {"classifier.weight": torch.zeros(3, 5), "classifier.bias": torch.zeros(3)}
    model = clone(start)
    refuses(model, lambda: revert_delta(model, delta), "without its base, got all of 'classifier.weight'")
    apply_delta(model, delta)
    assert same_bits(model, tuned)
    revert_delta(model, delta, base=start)
    assert same_bits(model, start)
    # a base without the head gives back what it has
    apply_delta(model, delta)
    revert_delta(model, delta, base=base)
    assert same_bits(
        {n: t for n, t in model.items() if "bert" in n}, {n: t for n, t in start.items() if "bert" in n}
    )
    assert torch.equal(model["classifier.weight"], tuned["classifier.weight"])
    # and in files, the names are the tuned model's, then the base's again
    save_file(base, tmp_path / "base.safetensors")
    patch_checkpoint(tmp_path / "base.safetensors", delta, tmp_path / "tuned.safetensors")
    assert load_file(tmp_path / "tuned.safetensors").keys() == tuned.keys()
    assert same_bits({n: load_file(tmp_path / "tuned.safetensors")[n] for n in tuned}, tuned)
    patch_checkpoint(tmp_path / "tuned.safetensors", delta, tmp_path / "again.safetensors", revert=True)
    assert same_bits({n: load_file(tmp_path / "again.safetensors")[n] for n in base}, base)
    assert load_file(tmp_path / "again.safetensors").keys() == base.keys()
    bare = delta.without("classifier.*")
    apply_delta(bare_model := clone(base), bare)
    assert same_bits(
        {f"bert.{n}": t for n, t in bare_model.items()}, {n: tuned[n] for n in tuned if "bert" in n}
    )
    with pytest.raises(ValueError, match="matches none"):
        delta.without("klassifier.*")


# --- files ------------------------------------------------------------------------------------------------


def sharded(folder, tensors, shards=3):
    """A model's folder as transformers saves it."""
    folder.mkdir()
    names = sorted(tensors)
    places = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, folder / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def all_tensors(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return dict(sorted(found.items()))


def test_every_form_of_a_checkpoint_gives_the_same_delta(tmp_path):
    base, tuned = a_base(BF16), tuned_from(a_base(BF16))
    one = tmp_path / "one"
    one.mkdir()
    save_file(base, one / "model.safetensors")
    forms = [base, one, str(one), one / "model.safetensors", sharded(tmp_path / "three", base)]
    sharded(tmp_path / "tuned", tuned, shards=2)
    expected = None
    for form in forms:
        for other in (tuned, tmp_path / "tuned"):
            path = tmp_path / "delta.safetensors"
            save_delta(extract_delta(form, other, base_model="base"), path)
            expected = expected or path.read_bytes()
            delta = load_delta(path)
            model = clone(base)
            apply_delta(model, delta)
            assert same_bits(model, tuned)
    assert extract_delta(one, tuned).base_model == "one"


def test_a_sharded_folder_becomes_the_tuned_folder_and_the_base_again(tmp_path):
    base, tuned = a_base(BF16), tuned_from(a_base(BF16))
    tuned |= {"head": torch.ones(2)}
    folder, other = sharded(tmp_path / "base", base), sharded(tmp_path / "tuned", tuned, shards=1)
    (folder / "config.json").write_text('{"labels": 2}')
    (folder / "tokenizer.json").write_text("words")
    (folder / "pytorch_model.bin").write_text("a pickle")
    (other / "config.json").write_text('{"labels": 3, "x": 1e-12}')
    delta = saved_and_loaded(extract_delta(folder, other), tmp_path)
    out = tmp_path / "out"
    patch_checkpoint(folder, delta, out)
    assert same_bits(all_tensors(out), dict(sorted(tuned.items())))
    assert json.loads((out / "config.json").read_text()) == {"labels": 3, "x": 1e-12}
    assert (out / "tokenizer.json").read_text() == "words" and not (out / "pytorch_model.bin").exists()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tuned.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tuned.values())
    for name, file in index["weight_map"].items():
        assert name in load_file(out / file)
    patch_checkpoint(out, delta, tmp_path / "again", revert=True)
    assert same_bits(all_tensors(tmp_path / "again"), dict(sorted(base.items())))
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == {"labels": 2}
    with pytest.raises(ValueError, match="output must be a new folder") as error:
        patch_checkpoint(folder, delta, out)
    one_sentence(error)
    with pytest.raises(ValueError, match="weights must be the base's"):
        patch_checkpoint(out, delta, tmp_path / "twice")
    assert not (tmp_path / "twice").exists() and not list(tmp_path.glob(".*"))
    with pytest.raises(ValueError, match="must hold old bits xor new bits"):
        patch_checkpoint(out, extract_delta(folder, other, mode="replace"), tmp_path / "x", revert=True)
    with pytest.raises(TypeError, match="source must be a path"):
        patch_checkpoint(base, delta, tmp_path / "x")


def test_two_tensors_of_a_delta_that_are_one_in_a_checkpoint_are_refused(tmp_path):
    base = {"w": torch.zeros(3), "v": torch.zeros(2)}
    tuned = {"m.w": torch.ones(3), "m.v": torch.zeros(2), "w": torch.ones(3)}
    delta = extract_delta(base, {name: t for name, t in tuned.items() if name != "w"})
    both = Delta(
        {**delta.tensors, "w": TensorDelta((3,), F32, INDEX - 1, torch.zeros(2, dtype=torch.int32))}, "xor",
        prefix="m.",
    )  # fmt: skip
    save_file(base, tmp_path / "base.safetensors")
    with pytest.raises(ValueError, match="apart from others") as error:
        patch_checkpoint(tmp_path / "base.safetensors", both, tmp_path / "out.safetensors")
    one_sentence(error)
    # and back, two names that would become one
    save_file(tuned, tmp_path / "tuned.safetensors")
    with pytest.raises(ValueError, match=r"names must differ without 'm\.'") as error:
        patch_checkpoint(tmp_path / "tuned.safetensors", delta, tmp_path / "out.safetensors", revert=True)
    one_sentence(error)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_file_can_be_patched_in_its_own_place(tmp_path):
    base, tuned = a_base(), tuned_from(a_base())
    path = tmp_path / "model.safetensors"
    save_file(base, path)
    delta = extract_delta(path, tuned)
    patch_checkpoint(path, delta, path)
    assert same_bits({n: load_file(path)[n] for n in tuned}, tuned)
    patch_checkpoint(path, delta, path, revert=True)
    assert same_bits({n: load_file(path)[n] for n in base}, base)


def test_pickles_are_never_opened(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save(a_base(), path)
    with pytest.raises(ValueError, match="may hold a pickle") as error:
        extract_delta(path, a_base())
    one_sentence(error)
    with pytest.raises(ValueError, match="got none, but pickles") as error:
        extract_delta(tmp_path, a_base())
    one_sentence(error)
    (tmp_path / "renamed.safetensors").write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="must be a safetensors file"):
        extract_delta(tmp_path / "renamed.safetensors", a_base())


def test_the_same_delta_is_the_same_file(tmp_path):
    base, tuned = a_base(), tuned_from(a_base())
    for name in ("one", "two"):
        save_delta(extract_delta(base, tuned), tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    save_delta(load_delta(tmp_path / "one"), tmp_path / "three")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "three").read_bytes()


def test_extraction_holds_a_few_tensors_and_never_two_models(tmp_path):
    """Anonymous memory, which is what is allocated: pages of mapped files can be given back."""
    layers, size = 40, 1 << 20
    generator = torch.Generator().manual_seed(0)
    base = {f"layer.{i}.weight": torch.randn(size, generator=generator) for i in range(layers)}
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    for tensor in tuned.values():
        tensor[::1000] += 1
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    program = """
import re, sys, threading, time
from sparse_optim import extract_delta, save_delta, patch_checkpoint, load_delta
import torch, numpy, safetensors.torch, tqdm.auto
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
before, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)
watching = threading.Thread(target=watch, daemon=True); watching.start()
delta = extract_delta("base.safetensors", "tuned.safetensors")
patch_checkpoint("base.safetensors", delta, "out.safetensors")
done = True; watching.join()
print(peak - before)
"""
    done = sparse_optim_in(program, tmp_path)
    one_tensor, model = 4 * size, 4 * size * layers
    # of each of two threads: the comparison, bits of both, a piece to be hashed
    assert int(done) < 16 * one_tensor < model / 2, int(done) / one_tensor


def sparse_optim_in(program, folder, **environment):
    import subprocess

    root = Path(sparse_optim.__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- merging ----------------------------------------------------------------------------------------------


def two_tasks(dtype=F32, shared=0.02, own=0.03):
    generator = torch.Generator().manual_seed(3)
    base = {"weight": torch.randn(64, 64, generator=generator).to(dtype)}
    draw = torch.rand(64, 64, generator=generator)
    tasks = []
    for i in range(2):
        chosen = (draw < shared) | ((draw >= shared + i * own) & (draw < shared + (i + 1) * own))
        step = torch.randn(64, 64, generator=generator).to(dtype)
        # adding a difference to what is a billion times as large does not give what it was taken of
        new = torch.where(draw < shared + (i + 0.5) * own, base["weight"] + step, base["weight"] * 1e-9)
        tasks.append({"weight": torch.where(chosen, new, base["weight"])})
    changed = [task["weight"] != base["weight"] for task in tasks]
    return base, tasks, int((changed[0] & changed[1]).sum())


@pytest.mark.parametrize("mode", MODES)
def test_disjoint_deltas_merge_to_both_and_conflicts_are_counted(mode):
    base, tasks, _ = two_tasks(shared=0.0)
    deltas = [extract_delta(base, task, mode=mode) for task in tasks]
    merged = merge_deltas(deltas)
    one_by_one, at_once = clone(base), clone(base)
    apply_delta(at_once, merged)
    for delta in deltas:
        apply_delta(one_by_one, delta, verify=False)
    assert same_bits(one_by_one, at_once)
    assert merged.conflicts == 0 and merged.info()["changed"] == sum(d.info()["changed"] for d in deltas)
    base, tasks, shared = two_tasks()
    deltas = [extract_delta(base, task, mode=mode) for task in tasks]
    with pytest.raises(ValueError, match=f"got {shared} entries that several change differently") as error:
        merge_deltas(deltas)
    one_sentence(error)
    # what both change alike is no conflict
    assert merge_deltas([deltas[0], deltas[0]]).info()["changed"] == deltas[0].info()["changed"]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_a_sum_is_the_base_and_all_differences(mode, dtype, tmp_path):
    base, tasks, shared = two_tasks(dtype)
    deltas = [extract_delta(base, task, mode=mode) for task in tasks]
    merged = saved_and_loaded(merge_deltas(deltas, how="sum", base=None if mode == "add" else base), tmp_path)
    assert (merged.conflicts, merged.mode) == (shared, mode)
    model = clone(base)
    apply_delta(model, merged)
    wide = {name: tensor.double() for name, tensor in base.items()}
    expected = wide["weight"] + sum(task["weight"].double() - wide["weight"] for task in tasks)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(model["weight"].double(), expected, rtol=eps, atol=eps)
    if mode != "add":
        # what one task alone has changed has that task's bits
        for mine, other in itertools.permutations(tasks):
            alone = (mine["weight"] != base["weight"]) & (other["weight"] == base["weight"])
            assert torch.equal(model["weight"][alone], mine["weight"][alone])
    half = merge_deltas(deltas, how="sum", base=base, weights=[0.5, 0.5])
    apply_delta(model := clone(base), half)
    expected = wide["weight"] + 0.5 * sum(task["weight"].double() - wide["weight"] for task in tasks)
    torch.testing.assert_close(model["weight"].double(), expected, rtol=eps, atol=eps)


@pytest.mark.parametrize("mode", MODES)
def test_ties_trims_elects_a_sign_and_averages_what_agrees(mode):
    base = {"w": torch.zeros(6)}
    #                      all agree | two against one | small ones go | alone
    tasks = [
        {"w": torch.tensor([1.0, 2.0, 3.0, 0.001, 0.0, 4.0])},
        {"w": torch.tensor([3.0, -5.0, 1.0, 0.002, 0.0, 0.0])},
        {"w": torch.tensor([2.0, 2.0, -1.0, 0.0, 0.001, 0.0])},
    ]
    deltas = [extract_delta(base, task, mode=mode) for task in tasks]
    merged = merge_deltas(deltas, how="ties", base=base, density=0.75)
    apply_delta(model := clone(base), merged)
    # 5 entries of the first are trimmed to 4, 4 of the second to 3, 4 of the third to 3
    # second entry: 2 - 5 + 2 < 0, so -5 alone; third: 3 + 1 - 1 > 0, so (3 + 1) / 2
    assert model["w"].tolist() == [2.0, -5.0, 2.0, 0.0, 0.0, 4.0]
    assert merged.conflicts == 3
    scaled = merge_deltas(deltas, how="ties", base=base, density=0.75, weights=[0.5] * 3)
    apply_delta(model := clone(base), scaled)
    assert model["w"].tolist() == [1.0, -2.5, 1.0, 0.0, 0.0, 2.0]


def test_what_cannot_be_merged_is_refused():
    base, tasks, _ = two_tasks()
    one, two = (extract_delta(base, task) for task in tasks)
    other = extract_delta({"weight": torch.zeros(64, 64)}, tasks[0])
    whole = [Delta({"h": TensorDelta((1,), F32, None, torch.tensor([float(i)]))}, "xor") for i in range(2)]
    counted = [extract_delta({"n": torch.tensor(1)}, {"n": torch.tensor(i)}) for i in (2, 3)]
    for act, match in [
        (lambda: merge_deltas([one]), "two or more"),
        (lambda: merge_deltas([one, other]), "deltas must be of one base, got two of 'weight'"),
        (lambda: merge_deltas([one, extract_delta(base, tasks[1], mode="add")]), "one mode and prefix"),
        (lambda: merge_deltas([one, two], how="sum"), "base must be given"),
        (lambda: merge_deltas([one, two], how="sum", base=tasks[0]), "weights must be the base's"),
        (lambda: merge_deltas([one, two], how="sum", base={"v": torch.zeros(1)}), "base must have 'weight'"),
        (lambda: merge_deltas([one, two], how="average", base=base), "how must be"),
        (lambda: merge_deltas([one, two], weights=[1, 2]), "weights must be left out"),
        (lambda: merge_deltas([one, two], how="sum", base=base, weights=[1]), "one number for each"),
        (lambda: merge_deltas([one, two], how="ties", base=base, density=0.0), "density must be in"),
        (lambda: merge_deltas(whole), "the same 'h', which they store whole"),
        (lambda: merge_deltas(counted, how="sum", base={"n": torch.tensor(1)}), "must be floating-point"),
    ]:
        with pytest.raises(ValueError, match=match) as error:
            act()
        one_sentence(error)


# --- switching --------------------------------------------------------------------------------------------


def test_a_switcher_goes_between_any_of_many_and_the_base_to_the_bit():
    base = a_base(BF16)
    head = {"head": torch.zeros(3)}
    tuned = {f"task {i}": tuned_from(base, seed=i) | {"head": torch.full((3,), float(i))} for i in range(4)}
    modes = dict(zip(tuned, ["xor", "replace", "xor", "replace"], strict=True))
    deltas = {name: extract_delta(base, tuned[name], mode=modes[name]) for name in tuned}
    model = clone(base | head)
    switcher = DeltaSwitcher(model, deltas)
    assert switcher.active is None and switcher.names == tuple(tuned)
    pointers = [tensor.data_ptr() for tensor in model.values()]
    order = [*tuned, None, "task 2", "task 2", "task 0", None, None, "task 3"]
    for name in order:
        switcher.activate(name)
        assert switcher.active == name
        assert same_bits(model, base | head if name is None else tuned[name])
    assert pointers == [tensor.data_ptr() for tensor in model.values()]
    refuses(model, lambda: switcher.remove("task 3"), "name must not be active")
    refuses(model, lambda: switcher.add("more", deltas["task 0"]), "the base must be active")
    refuses(model, lambda: switcher.activate("task 9"), "name must be one of")
    switcher.activate(None)
    switcher.remove("task 3")
    refuses(model, lambda: switcher.activate("task 3"), "name must be one of")
    refuses(model, lambda: switcher.add("task 0", deltas["task 0"]), "name must be new")
    other = clone(base | head)
    integers(other["unchanged"])[0] ^= 1
    refuses(other, lambda: DeltaSwitcher(other, deltas), "weights must be the base's")


def test_a_switcher_sees_that_somebody_has_trained():
    layer = nn.Linear(4, 4)
    tuned = copy.deepcopy(layer)
    with torch.no_grad():
        tuned.weight[0] += 1
    switcher = DeltaSwitcher(layer, {"task": extract_delta(layer, tuned)})
    switcher.activate("task")
    with torch.no_grad():
        layer.weight.mul_(2)
    refuses(layer, lambda: switcher.activate(None), "as the last switch left them")


# --- from training ----------------------------------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.layer = nn.ModuleList(nn.Linear(12, 12) for _ in range(2))
        self.norm = nn.LayerNorm(12)
        self.classifier = nn.Linear(12, 3)
        # as peft asks for it
        self.config = {"model_type": "custom"}

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layer:
            x = torch.tanh(layer(x))
        return self.classifier(self.norm(x.mean(1)))


def make(seed=0):
    torch.manual_seed(seed)
    return Encoder()


def train(model, optimizer, steps=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        if step % 3 == 0 and getattr(optimizer.policy, "every", None) == "epoch":
            optimizer.new_epoch()
        tokens = torch.randint(0, 20, (8, 5), generator=generator)
        loss = nn.functional.cross_entropy(model(tokens), torch.randint(0, 3, (8,), generator=generator))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def linear_weights(model):
    return [(name, p) for name, p in model.named_parameters() if name.startswith("layer") and p.dim() == 2]


def dps_mix(params, model):
    optimizer = DPSAdamW(params, lr=0.01, variant="mix", density=0.3, update_steps=2)
    mix_weights(model, optimizer, modules=["layer.0", "layer.1"])
    return optimizer


METHODS = {
    "Child-Tuning F": lambda params, model: ChildTuningAdamW(params, lr=0.01, variant="F", keep=0.3),
    "Child-Tuning D": lambda params, model: ChildTuningAdamW(
        params, lr=0.01, variant="D", density=0.1, observe_steps=2
    ),
    "DPS dense": lambda params, model: DPSAdamW(
        params, lr=0.01, variant="dense", density=0.3, update_steps=2
    ),
    "DPS mix": dps_mix,
    "second order": lambda params, model: SecondOrderAdamW(params, lr=0.01, density=0.05, observe_steps=2),
    "GradDrop": lambda params, model: GradDropAdamW(params, lr=0.01, keep=0.5),
    "Layer-GradDrop": lambda params, model: GradDropAdamW(params, lr=0.01, keep=0.5, granularity="layer"),
    "TopK": lambda params, model: MaskedAdamW(
        params, lr=0.01, policy=TopK(0.02, statistic=SquaredGradient(), schedule=Schedule(observe=1))
    ),
    "Bernoulli, frozen": lambda params, model: MaskedAdamW(params, lr=0.01, policy=Bernoulli(0.1)),
    "gradual unfreezing": lambda params, model: MaskedAdamW(params, lr=0.01, policy=GradualUnfreezing()),
}


@pytest.mark.filterwarnings("ignore:nothing was selected:UserWarning")
@pytest.mark.parametrize("method", METHODS)
def test_each_method_is_extracted_applied_merged_and_reverted(method, tmp_path):
    base = make()
    deltas, tuned = [], []
    for seed in (1, 2):
        model = copy.deepcopy(base)
        optimizer = METHODS[method](linear_weights(model), model)
        train(model, optimizer, seed=seed)
        if method == "DPS mix":
            state = {
                name.replace("parametrizations.weight.original", "weight"): t
                for name, t in model.state_dict().items()
            }
            model = copy.deepcopy(base)
            model.load_state_dict(state)
        tuned.append(model)
        deltas.append(saved_and_loaded(extract_delta(base, model), tmp_path))
        assert deltas[-1].info()["changed"] > 0
        again = copy.deepcopy(base)
        apply_delta(again, deltas[-1])
        assert same_bits(again, model)
        revert_delta(again, deltas[-1])
        assert same_bits(again, base)
    merged = saved_and_loaded(merge_deltas(deltas, how="sum", base=base), tmp_path)
    model = copy.deepcopy(base)
    apply_delta(model, merged)
    for name, tensor in model.state_dict().items():
        old, one, two = (each.state_dict()[name].double() for each in (base, *tuned))
        torch.testing.assert_close(tensor.double(), old + (one - old) + (two - old), rtol=1e-6, atol=1e-6)
    revert_delta(model, merged)
    assert same_bits(model, base)


@pytest.mark.filterwarnings("ignore:nothing was selected:UserWarning")
@pytest.mark.filterwarnings("ignore::Warning:(torch|transformers|peft).*")
@pytest.mark.parametrize("kind", ["shira", "supertuning"])
@pytest.mark.parametrize("method", METHODS)
def test_each_method_is_exported_to_stock_peft(method, kind, tmp_path):
    peft = pytest.importorskip("peft")
    if not hasattr(peft, "ShiraConfig" if kind == "shira" else "SupertuningConfig"):
        pytest.skip(f"peft {peft.__version__} does not know {kind}")
    from sparse_optim.integrations.peft import to_peft

    base = make()
    model = copy.deepcopy(base)
    optimizer = METHODS[method](linear_weights(model), model)
    train(model, optimizer)
    state = {
        name.replace("parametrizations.weight.original", "weight"): t
        for name, t in model.state_dict().items()
    }
    tuned = copy.deepcopy(base)
    tuned.load_state_dict(state)
    with torch.no_grad():
        # of these 144 entries an adapter of r = 5 holds 120
        for layer, old in zip(tuned.layer, base.layer, strict=True):
            layer.weight.view(-1)[100:] = old.weight.view(-1)[100:]
    delta = extract_delta(base, tuned)
    to_peft(delta, tmp_path / "adapter", model=base, kind=kind)
    for name, indices in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items():
        if name.endswith("indices"):
            entries = indices.tolist() if indices.dim() == 1 else list(zip(*indices.tolist(), strict=True))
            assert len(set(entries)) == len(entries) and indices.dtype == torch.int32
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    tokens = torch.arange(20).view(4, 5)
    torch.testing.assert_close(loaded(tokens), tuned(tokens), rtol=1e-5, atol=1e-5)
    merged = loaded.merge_and_unload()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, tuned.state_dict()[name], rtol=1e-6, atol=1e-7)
    unchanged = torch.cat(
        [(a.weight == b.weight).view(-1) for a, b in zip(tuned.layer, base.layer, strict=True)]
    )
    kept = torch.cat([(a.weight == b.weight).view(-1) for a, b in zip(merged.layer, base.layer, strict=True)])
    assert torch.equal(unchanged, kept)


@pytest.mark.filterwarnings("ignore::Warning:(torch|transformers|peft).*")
def test_a_new_head_goes_along_to_peft_and_what_peft_cannot_hold_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    from sparse_optim.integrations.peft import to_peft

    base, tuned = make(), make()
    with torch.no_grad():
        tuned.layer[0].weight[0, 0] += 1
        tuned.classifier.weight *= 2
    headless = {name: t for name, t in base.state_dict().items() if not name.startswith("classifier")}
    delta = extract_delta(headless, tuned)
    to_peft(delta, tmp_path / "adapter", model=base)
    loaded = peft.PeftModel.from_pretrained(make(), tmp_path / "adapter")
    tokens = torch.arange(20).view(4, 5)
    torch.testing.assert_close(loaded(tokens), tuned(tokens), rtol=1e-6, atol=1e-6)
    changed = {"embed.weight": "embed", "norm.weight": "norm", "layer.0.bias": "bias"}
    for name in changed:
        model = make()
        with torch.no_grad():
            model.get_parameter(name).view(-1)[0] += 1
        with pytest.raises(
            ValueError, match=f"only weights of nn.Linear .* got '{name}' and 0 others"
        ) as error:
            to_peft(extract_delta(base, model), tmp_path / "x", model=base)
        one_sentence(error)
    for act, match in [
        (lambda: to_peft(delta, tmp_path / "adapter", model=base), "folder must be a new one"),
        (lambda: to_peft(delta, tmp_path / "x", model=base, kind="lora"), "kind must be"),
        (lambda: to_peft(delta, tmp_path / "x", model=make(5)), "weights must be the base's"),
        (lambda: to_peft(extract_delta(base, base), tmp_path / "x", model=base), "extract another"),
    ]:
        with pytest.raises(ValueError, match=match) as error:
            act()
        one_sentence(error)
    dense = make()
    with torch.no_grad():
        dense.layer[0].weight += 1
        # 3 x 12 entries cannot hold as many for each row and column as all of 12 x 12
        dense.classifier.weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"use\s+kind='supertuning'"):
        to_peft(extract_delta(base, dense), tmp_path / "x", model=base)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("observe", [2, None], ids=["observing first", "explicit"])
def test_an_optimizer_gives_its_delta_without_the_base(observe, dtype, tmp_path):
    base = make().to(dtype)
    model = copy.deepcopy(base)
    groups = [
        {"params": [(n, p) for n, p in model.named_parameters() if "classifier" not in n]},
        {"params": list(model.classifier.named_parameters(prefix="classifier")), "masked": False},
    ]
    policy = TopK(0.05, statistic=SquaredGradient(), schedule=Schedule(observe=observe))
    optimizer = MaskedAdamW(groups, lr=0.01, policy=policy)
    with pytest.raises(RuntimeError, match=r"delta\(\) needs one selection, got none yet") as error:
        optimizer.delta()
    one_sentence(error)
    if observe is None:
        model(torch.arange(20).view(4, 5)).square().sum().backward()
        optimizer.observe()
    train(model, optimizer)
    delta = saved_and_loaded(optimizer.delta(base_model="acme/base"), tmp_path)
    assert (delta.mode, delta.base_model) == ("replace", "acme/base")
    again = copy.deepcopy(base)
    apply_delta(again, delta)
    assert same_bits(again, model)
    info = delta.info()
    assert info["whole_tensors"] == 2
    assert info["changed"] == int(0.05 * info["entries"])
    other = make(seed=7).to(dtype)
    refuses(other, lambda: apply_delta(other, delta), "weights must be the base's")
    revert_delta(again, delta, base=base)
    assert same_bits(again, base)


@pytest.mark.filterwarnings("ignore:nothing was selected:UserWarning")
def test_an_optimizer_without_one_static_frozen_mask_points_at_extract_delta():
    for method, make_optimizer in METHODS.items():
        model = make()
        optimizer = make_optimizer(linear_weights(model), model)
        train(model, optimizer)
        if method in ("TopK", "second order", "Child-Tuning D"):
            assert optimizer.delta().info()["changed"] > 0
            continue
        with pytest.raises(ValueError, match=r"extract_delta\(base, model\)") as error:
            optimizer.delta()
        one_sentence(error)
    model = make()
    policy = TopK(0.1, statistic=SquaredGradient(), schedule=Schedule(observe=None))
    optimizer = MaskedAdamW(list(model.named_parameters()), policy=policy)
    for _ in range(2):
        model(torch.arange(20).view(4, 5)).square().sum().backward()
        optimizer.observe()
        optimizer.select()
    with pytest.raises(RuntimeError, match="needs one selection, got several"):
        optimizer.delta()
    policy = TopK(0.1, statistic=SquaredGradient(), schedule=Schedule(observe=1))
    unnamed = MaskedAdamW(model.parameters(), policy=policy)
    with pytest.raises(ValueError, match="needs named parameters"):
        unnamed.delta()
    zero = MaskedAdamW(list(model.named_parameters()), policy=policy, unselected="zero_grad")
    with pytest.raises(ValueError, match="one mask that stays, and unselected='frozen'"):
        zero.delta()


# --- the hub ----------------------------------------------------------------------------------------------


def test_push_uploads_a_card_and_the_delta_and_the_name_loads_them(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    calls = {}

    class Api(hub.HfApi):
        def create_repo(self, repo_id, **options):
            calls["repo"] = repo_id, options

        def upload_folder(self, *, repo_id, folder_path, **options):
            shutil.copytree(folder_path, tmp_path / "hub" / repo_id)
            return f"https://hub/{repo_id}"

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "hf_hub_download", lambda repo, file: str(tmp_path / "hub" / repo / file))
    monkeypatch.setattr(hub, "snapshot_download", lambda repo, **_: str(tmp_path / "hub" / repo))
    base, tuned = a_base(), tuned_from(a_base())
    delta = extract_delta(base, tuned, base_model='acme/"base"')
    assert push_delta(delta, "me/task", private=True) == "https://hub/me/task"
    assert calls["repo"] == ("me/task", {"private": True, "exist_ok": True})
    card = (tmp_path / "hub/me/task/README.md").read_text()
    assert card.startswith("---\nlibrary_name: sparse_optim\n") and 'base_model: "acme/\\"base\\""' in card
    model = clone(base)
    apply_delta(model, load_delta("me/task"))
    assert same_bits(model, tuned)
    (tmp_path / "hub/me/base").mkdir()
    save_file(base, tmp_path / "hub/me/base/model.safetensors")
    assert extract_delta("me/base", tuned).base_model == "me/base"


def test_a_path_that_is_not_there_is_refused_without_asking_the_hub(tmp_path):
    for path in (tmp_path / "none.safetensors", "./no/where", "model.bin", ""):
        with pytest.raises(ValueError, match=r"path must exist|must be|one \.safetensors file"):
            extract_delta(path, a_base())
        with pytest.raises(ValueError, match=r"a path must exist|must be a delta"):
            load_delta(path)
    with pytest.raises(ValueError, match="path must be a file in a folder that exists"):
        save_delta(extract_delta(a_base(), a_base()), tmp_path / "no" / "delta.safetensors")


def test_bars_appear_on_terminals_after_two_seconds_and_tqdm_is_not_needed(monkeypatch):
    base, tuned = a_base(), tuned_from(a_base())
    tqdm = pytest.importorskip("tqdm.auto")
    seen = []
    bar = tqdm.tqdm
    monkeypatch.setattr(tqdm, "tqdm", lambda **options: (seen.append(options), bar(**options))[1])
    delta = extract_delta(base, tuned)
    apply_delta(clone(base), delta)
    assert [each["desc"] for each in seen] == ["comparing", "verifying"]
    assert all(each["delay"] == 2 and each["disable"] is None for each in seen)
    assert [each["total"] for each in seen] == [sum(t.nbytes for t in base.values())] * 2
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    assert extract_delta(base, tuned).info() == delta.info()


@pytest.mark.parametrize("lead", ["", "module."], ids=["parametrized", "in DistributedDataParallel"])
def test_a_patched_checkpoint_keeps_the_names_that_its_base_has(lead, tmp_path):
    base = {
        lead + "body.bias": torch.zeros(3),
        lead + "conv.parametrizations.weight.original0": torch.zeros(2),
    }
    tuned = {name: tensor + 1 for name, tensor in base.items()}
    save_file(base, tmp_path / "base.safetensors")
    delta = extract_delta(base, tuned)
    patch_checkpoint(tmp_path / "base.safetensors", delta, tmp_path / "tuned.safetensors")
    assert same_bits(dict(sorted(load_file(tmp_path / "tuned.safetensors").items())), tuned)
    patch_checkpoint(tmp_path / "tuned.safetensors", delta, tmp_path / "again.safetensors", revert=True)
    assert same_bits(dict(sorted(load_file(tmp_path / "again.safetensors").items())), base)


def test_a_prefix_comes_before_the_names_that_the_base_has(tmp_path):
    base = {"bias": torch.zeros(3), "conv.parametrizations.weight.original0": torch.zeros(2)}
    tuned = {"body." + name: tensor + 1 for name, tensor in base.items()} | {"head": torch.ones(1)}
    save_file(base, tmp_path / "base.safetensors")
    delta = extract_delta(base, tuned)
    patch_checkpoint(tmp_path / "base.safetensors", delta, tmp_path / "tuned.safetensors")
    assert set(load_file(tmp_path / "tuned.safetensors")) == set(tuned)
    patch_checkpoint(tmp_path / "tuned.safetensors", delta, tmp_path / "again.safetensors", revert=True)
    assert set(load_file(tmp_path / "again.safetensors")) == set(base)


REPLACED = {
    "converted": lambda model: model.double(),
    "assigned": lambda model: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True),
    "another parameter": lambda model: setattr(model, "weight", nn.Parameter(model.weight.detach().clone())),
    "other data": lambda model: setattr(model.weight, "data", model.weight.data.clone()),
}


@pytest.mark.parametrize("how", REPLACED)
def test_a_switcher_refuses_a_model_whose_weights_were_replaced(how):
    model, tuned = nn.Linear(3, 2), nn.Linear(3, 2)
    switcher = DeltaSwitcher(model, {"task": extract_delta(model, tuned)})
    REPLACED[how](model)
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match="as the last switch left them"):
        switcher.activate("task")
    assert same_bits(model, before)
    assert switcher.active is None


def test_weights_of_a_removed_delta_may_change():
    model = {"one": torch.zeros(3), "two": torch.zeros(3)}
    deltas = {name: extract_delta(model, model | {name: torch.ones(3)}) for name in model}
    switcher = DeltaSwitcher(model, deltas)
    switcher.remove("one")
    model["one"] += 1
    switcher.activate("two")
    assert model["two"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=str)
@pytest.mark.parametrize("whole", [False, True], ids=["listed", "whole"])
def test_entries_that_share_memory_are_refused_before_anything_changes(dtype, whole):
    base = {"first": torch.zeros(3), "view": torch.zeros(1, dtype=dtype).expand(4)}
    tuned = {"first": torch.ones(3), "view": torch.ones(4, dtype=dtype)}
    delta = extract_delta(base, tuned)
    if whole:
        delta = Delta({n: TensorDelta(tuple(t.shape), t.dtype, None, t) for n, t in tuned.items()}, "xor")
    with pytest.raises(ValueError, match="must have memory for each entry, got an expanded view; clone it"):
        apply_delta(base, delta)
    assert base["first"].tolist() == [0, 0, 0]


def test_weights_that_are_apart_are_refused_where_the_delta_has_them_tied(tmp_path):
    weight, changed = torch.zeros(3), torch.ones(3)
    delta = extract_delta({"a": weight, "b": weight}, {"a": changed, "b": changed})
    apart = {"a": torch.zeros(3), "b": torch.zeros(3)}
    save_file(apart, tmp_path / "apart.safetensors")
    sentence = "model must have 'b' tied to 'a', as the delta has it, got a tensor of its own"
    with pytest.raises(ValueError, match=sentence):
        apply_delta(apart, delta)
    with pytest.raises(ValueError, match=sentence):
        patch_checkpoint(tmp_path / "apart.safetensors", delta, tmp_path / "tuned.safetensors")
    # a file has one of them
    save_file({"b": torch.zeros(3)}, tmp_path / "one.safetensors")
    patch_checkpoint(tmp_path / "one.safetensors", delta, tmp_path / "tuned.safetensors")
    assert load_file(tmp_path / "tuned.safetensors")["b"].tolist() == [1, 1, 1]


def test_a_delta_is_loaded_onto_the_cpu_whatever_the_default_device(tmp_path):
    base = {"a": torch.zeros(3), "b": torch.zeros(3)}
    save_delta(extract_delta(base, base | {"b": torch.ones(3)}), tmp_path / "delta.safetensors")
    with torch.device("meta"):
        loaded = load_delta(tmp_path / "delta.safetensors")
    assert {t.device.type for part in loaded.tensors.values() for t in (part.indices, part.values)} == {"cpu"}


@pytest.mark.parametrize("name", ["source.spm", "vocab.bpe", "qwen.tiktoken"])
def test_what_a_tokenizer_needs_is_copied(name, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    save_file({"a": torch.zeros(3)}, base / "model.safetensors")
    (base / name).write_bytes(b"kept")
    (base / "flax_model.msgpack").write_bytes(b"stale")
    patch_checkpoint(base, extract_delta(base, {"a": torch.ones(3)}), tmp_path / "tuned")
    assert {path.name for path in (tmp_path / "tuned").iterdir()} == {"model.safetensors", name}
