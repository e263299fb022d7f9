"""Sparse deltas as adapters that stock PEFT loads: SHiRA and Supertuning."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparse_optim import Delta, TensorDelta
from sparse_optim.checkpoints import Kind, replacing, write_safetensors
from sparse_optim.patching import differences_of

_FILE = "adapter_model.safetensors"


def to_peft(
    delta: Delta,
    folder: str | os.PathLike[str],
    *,
    model: nn.Module,
    kind: Literal["shira", "supertuning"] = "shira",
) -> None:
    """Write a delta as a PEFT adapter, for `PeftModel.from_pretrained(model, folder)`.

    PEFT gives every layer of an adapter the same share of trained entries: layers that changed less are
    padded with zeros at entries that did not change. Adapters add float32 differences: merged weights are
    those of the tuned model but for a rounding, where `apply_delta` gives the bits. Tensors that the delta
    stores whole, a new head for one, become `modules_to_save`.

    Args:
        delta: of the weights of `nn.Linear` modules, whatever the mode.
        folder: which does not exist yet; adapter_config.json and adapter_model.safetensors go there.
        model: the base, in memory, with the delta's names.
        kind: "shira" (8 bytes of indices an entry, and a multiple of in + out features of them) or
            "supertuning" (4 bytes of indices an entry).

    Raises:
        ImportError: without peft, or with one that does not know the kind. ValueError: for other weights than
            the base's, changes outside of Linear weights, and a folder that exists.

    References:
        Bhardwaj et al., Sparse High Rank Adapters (NeurIPS 2024).
    """
    if kind not in ("shira", "supertuning"):
        raise ValueError(f"kind must be 'shira' or 'supertuning', got {kind!r}; choose one of them.")
    folder = Path(folder)
    if folder.exists() or not folder.parent.is_dir():
        raise ValueError(f"folder must be a new one in one that exists, got {str(folder)!r}; name another.")
    config_class = _config_class(kind)
    modules = dict(model.named_modules())
    saved = _saved_modules(delta, modules)
    layers: dict[str, TensorDelta] = {}
    others = []
    for name, part in delta.tensors.items():
        owner, _, attribute = name.rpartition(".")
        if part.indices is None or not part.changed or owner in saved:
            continue
        if attribute != "weight" or not isinstance(modules.get(owner), nn.Linear):
            others.append(name)
            continue
        layers[owner] = part
    if others:
        raise ValueError(
            f"only weights of nn.Linear can be changed in a PEFT adapter, got {others[0]!r} and "
            f"{len(others) - 1} others; train these alone, leave out the others by delta.without() or "
            "--without, or apply the delta itself."
        )
    if not layers:
        raise ValueError(
            f"delta must change a weight of an nn.Linear for a PEFT adapter, got {delta!r}; extract another."
        )
    differences = differences_of(model, delta, [f"{owner}.weight" for owner in layers])
    share, sizes = (_shira_sizes if kind == "shira" else _supertuning_sizes)(layers)
    tensors: dict[str, Tensor] = {}
    for owner, part in layers.items():
        indices, values = _padded(part, differences[f"{owner}.weight"], sizes[owner])
        if kind == "shira":
            columns = part.shape[1]
            indices = torch.stack([indices // columns, indices % columns])
        tensors[f"base_model.model.{owner}.{kind}_indices"] = indices.int()
        tensors[f"base_model.model.{owner}.{kind}_{'weight' if kind == 'shira' else 'values'}"] = values
    tensors |= {
        f"base_model.model.{name}": tensor for each in saved.values() for name, tensor in each.items()
    }
    config = config_class(
        **share,
        target_modules=sorted(layers),
        modules_to_save=sorted(saved) or None,
        base_model_name_or_path=delta.base_model,
        inference_mode=True,
    )
    # a set has no order, a file is to be the same every time
    config.target_modules = sorted(layers)
    kinds = {name: Kind(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with replacing(folder) as temporary:
        temporary.mkdir()
        config.save_pretrained(temporary)
        write_safetensors(temporary / _FILE, kinds, tensors.__getitem__, {"format": "pt"})


def _config_class(kind: str) -> Any:
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ImportError("to_peft needs peft, got none; pip install 'sparse_optim[peft]'.") from error
    name = "ShiraConfig" if kind == "shira" else "SupertuningConfig"
    if not hasattr(peft, name):
        raise ImportError(f"kind={kind!r} needs a later peft, got {peft.__version__}; pip install -U peft.")
    return getattr(peft, name)


def _saved_modules(delta: Delta, modules: Mapping[str, nn.Module]) -> dict[str, dict[str, Tensor]]:
    """All tensors of each module of which the delta stores one whole."""
    saved: dict[str, dict[str, Tensor]] = {}
    for name, part in delta.tensors.items():
        owner = name.rpartition(".")[0]
        if part.indices is None and owner not in saved:
            if owner not in modules:
                raise ValueError(
                    f"model must have {owner!r}, got no such module; pass the one that was tuned."
                )
            saved[owner] = {f"{owner}.{key}": tensor for key, tensor in modules[owner].state_dict().items()}
        if part.indices is None:
            saved[owner][name] = part.values
    for owner in saved:
        for name in saved[owner]:
            listed = delta.tensors.get(name)
            if listed is not None and listed.indices is not None and listed.changed:
                raise ValueError(
                    f"a module must be stored whole or not at all in an adapter, got {name!r} in a delta of "
                    "both kinds; leave one out by delta.without()."
                )
    return saved


def _shira_sizes(layers: Mapping[str, TensorDelta]) -> tuple[dict[str, Any], dict[str, int]]:
    r = max(-(-part.changed // sum(part.shape)) for part in layers.values())
    for owner, part in layers.items():
        if r * sum(part.shape) > part.numel:
            raise ValueError(
                f"a SHiRA adapter of r={r} must fit into every layer, got {owner!r} of {list(part.shape)}; "
                "use kind='supertuning'."
            )
    return {"r": r}, {owner: r * sum(part.shape) for owner, part in layers.items()}


def _supertuning_sizes(layers: Mapping[str, TensorDelta]) -> tuple[dict[str, Any], dict[str, int]]:
    sparsity = 1 - max(part.changed / part.numel for part in layers.values())

    def sizes() -> dict[str, int]:
        # as peft rounds
        return {owner: int(part.numel * (1 - sparsity)) for owner, part in layers.items()}

    while any(sizes()[owner] < max(1, part.changed) for owner, part in layers.items()):
        sparsity = max(0.0, math.nextafter(sparsity, 0.0) - 1e-9)
    return {"sparsity": sparsity}, sizes()


def _padded(part: TensorDelta, difference: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """`size` entries: those that changed, and then the first ones that did not."""
    assert part.indices is not None
    changed = part.indices.long()
    free = torch.ones(part.numel, dtype=torch.bool)
    free[changed] = False
    padding = free.nonzero().view(-1)[: size - changed.numel()]
    return torch.cat([changed, padding]), torch.cat([difference.float(), torch.zeros(padding.numel())])
