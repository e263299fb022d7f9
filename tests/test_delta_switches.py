"""Deltas that are put on and taken off many times, in pieces, and with tensors that are stored whole."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from sparse_optim import (
    DeltaSwitcher,
    MaskedAdamW,
    Schedule,
    TopK,
    apply_delta,
    extract_delta,
    patching,
    revert_delta,
)
from sparse_optim.checkpoints import bits_of


def changed(base: dict[str, Tensor], seed: int, share: float = 0.1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    for tensor in tuned.values():
        where = torch.rand(tensor.shape, generator=generator) < share
        tensor[where] += 1
    return tuned


def same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return all(torch.equal(bits_of(got[name]), bits_of(expected[name])) for name in expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_a_switcher_goes_round_among_deltas_as_often_as_it_is_told(dtype: torch.dtype) -> None:
    base = {"a": torch.zeros(33, 7, dtype=dtype), "b": torch.ones(50, dtype=dtype)}
    tuned = {str(seed): changed(base, seed) for seed in range(3)}
    model = {name: tensor.clone() for name, tensor in base.items()}
    switcher = DeltaSwitcher(model, {name: extract_delta(base, each) for name, each in tuned.items()})
    for name in ("0", "1", "0", "2", None, "1", "2", "2", "0"):
        switcher.activate(name)
        assert same(model, base if name is None else tuned[name])
    model["a"][0, 0] += 1
    with pytest.raises(ValueError, match="as the last switch left them"):
        switcher.activate("1")


@pytest.mark.parametrize("mode", ["xor", "replace", "add"])
@pytest.mark.parametrize("numel", [0, 1, 63, 64, 65, 200])
def test_places_of_all_chunks_are_found(numel: int, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patching, "_CHUNK", 64)
    base = {"w": torch.arange(numel, dtype=torch.float32)}
    tuned = {"w": base["w"].clone()}
    tuned["w"][::63] += 0.5
    tuned["w"][-1:] += 0.25
    delta = extract_delta(base, tuned, mode=mode)
    expected = (base["w"] != tuned["w"]).nonzero().view(-1)
    assert torch.equal(delta.tensors["w"].indices.long(), expected)
    if mode == "add":
        assert delta.tensors["w"].values.tolist() == (tuned["w"] - base["w"])[expected].tolist()
    model = {"w": base["w"].clone()}
    apply_delta(model, delta)
    assert same(model, tuned)
    revert_delta(model, delta, base=None if mode == "xor" else base)
    assert same(model, base)


def test_what_an_optimizer_stores_whole_is_applied_to_the_base_it_was_trained_from() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8))
    base = copy.deepcopy(model)
    named = dict(model.named_parameters())
    groups = [
        {"params": [item for item in named.items() if item[0].startswith("0.")]},
        {"params": [item for item in named.items() if item[0].startswith("1.")], "masked": False},
    ]
    optimizer = MaskedAdamW(groups, lr=0.01, policy=TopK(0.1, schedule=Schedule(observe=1)))
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
    delta = optimizer.delta()
    assert [name for name, part in delta.tensors.items() if part.indices is None] == ["1.weight", "1.bias"]
    apply_delta(base, delta)
    assert same(base.state_dict(), model.state_dict())
    # the others are still compared
    base.get_parameter("0.weight").data[0] += 1
    with pytest.raises(ValueError, match=r"got others in 1 of 4 tensors, '0\.weight'"):
        apply_delta(base, delta)
