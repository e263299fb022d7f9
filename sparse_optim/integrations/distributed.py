"""Several processes that train one model: with its parameters spread over them, or with a copy in each.

Parameters are spread as DTensors, by FSDP2, tensor parallel, or both at once. Each process updates what it
holds, in place. Masks are those of the whole model: random ones are drawn by where an entry lies in the full
tensor, and a selection adds up counts over all processes. Nothing else crosses between them, but for what a
selection warns of (a flag a parameter and a group), one number when gradients are clipped, and gradients that
are placed otherwise than their parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from sparse_optim import MaskedAdamW

Geometry = tuple[int, int, int]  # offset, inner, stride, see backends.reference


class Shards:
    """What this process holds of an optimizer's parameters.

    Args:
        params: of which some are DTensors, over one mesh or over parts of one.
        name: of a parameter, for errors.

    Raises:
        NotImplementedError: for parameters over meshes that have no mesh in common, and shards that are not
            one block.
    """

    def __init__(self, params: Sequence[Tensor], name: Callable[[Tensor], str]) -> None:
        meshes = [p.device_mesh for p in params if isinstance(p, DTensor)]
        # of a part of a mesh, the processes outside of it train something else
        widest = max(meshes, key=DeviceMesh.size)
        held = set[int]().union(*map(_ranks, meshes))
        fitting = [mesh for mesh in (widest, widest._get_root_mesh()) if held <= _ranks(mesh)]
        if not fitting:
            raise NotImplementedError(
                "parameters must be spread over one mesh, or parts of one, got "
                f"{len(set(meshes))} meshes; make all from one init_device_mesh()."
            )
        self._mesh = fitting[0]
        self._geometries = {p: _geometry(p, name) for p in params}
        self._counted = {p: self._is_first_copy(p, name) for p in params}

    def geometry(self, p: Tensor) -> Geometry:
        """Where the entries that this process holds lie in the full tensor."""
        return self._geometries[p]

    def is_counted(self, p: Tensor) -> bool:
        """Whether this process, of all that hold the same entries, is the one that counts them."""
        return self._counted[p]

    def add_up(self, numbers: Tensor) -> Tensor:
        """A tensor summed over all processes."""
        total = numbers.to(self._mesh.device_type, copy=True)
        for dim in range(self._mesh.ndim):
            if self._mesh.size(dim) > 1:
                dist.all_reduce(total, group=self._mesh.get_group(dim))
        return total.to(numbers.device)

    def held(self, p: Tensor, tensor: Tensor) -> Tensor:
        """What this process holds of a tensor in a parameter's shape: of its gradient, or of its state."""
        if not isinstance(p, DTensor):
            return tensor
        if not isinstance(tensor, DTensor):
            # the whole of it, which every process has
            tensor = distribute_tensor(tensor, p.device_mesh, p.placements, src_data_rank=None)
        elif tensor.placements != p.placements:
            tensor = tensor.redistribute(p.device_mesh, p.placements)
        shard: Any = tensor.to_local()
        # one that is still on its way
        arrived: Tensor = shard.wait() if hasattr(shard, "wait") else shard
        return arrived

    def like(self, p: Tensor, shard: Tensor) -> Tensor:
        """What each process holds, put together as the parameter is."""
        if not isinstance(p, DTensor):
            return shard
        whole: Tensor = DTensor.from_local(
            shard, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
        )
        # of parameters that wait in the host's memory the mesh is another device's
        return whole.to(shard.device)

    def _is_first_copy(self, p: Tensor, name: Callable[[Tensor], str]) -> bool:
        everywhere = isinstance(p, DTensor) and _ranks(p.device_mesh) == _ranks(self._mesh)
        places: list[int] = []  # along what makes copies
        if isinstance(p, DTensor):
            own = zip(p.placements, _place(p.device_mesh), strict=True)
            places += [place for how, place in own if isinstance(how, Replicate)]
        if not everywhere:
            names = self._mesh.mesh_dim_names or ()
            parts = (p.device_mesh.mesh_dim_names or ()) if isinstance(p, DTensor) else ()
            if not set(parts) <= set(names) or (parts == () and isinstance(p, DTensor)):
                raise NotImplementedError(
                    f"the dimensions of a parameter's mesh must be among {names}, got {parts} for "
                    f"{name(p)!r}; name them in init_device_mesh(), and shard over these."
                )
            whole = zip(names or range(self._mesh.ndim), _place(self._mesh), strict=True)
            places += [place for dim, place in whole if dim not in parts]
        return not any(places)


def check_masks(optimizer: MaskedAdamW, group: dist.ProcessGroup | None = None) -> RemovableHandle:
    """Have processes that hold a copy of the model each, as under `DistributedDataParallel`, compare masks.

    Masks agree there by themselves: they follow from gradients that are averaged, or from a seed that all
    share. After the first step, after each selection and in each epoch the processes tell each other 8 bytes
    a parameter, to see that it is so. What is loaded later is compared after the next of these.

    Args:
        optimizer: of which each of the processes has its own. They have to step together.
        group: the processes that share the model; None: all.

    Returns:
        A handle; `handle.remove()` ends the comparing.

    Raises:
        ValueError: for DTensors, which are not copies, and a group of others. RuntimeError: out of
            `optimizer.step()`, where masks differ.
    """
    params = [p for one in optimizer.param_groups for p in one["params"]]
    if any(isinstance(p, DTensor) for p in params):
        raise ValueError(
            "check_masks() needs a copy of the model in each process, got DTensors; leave it out, their "
            "masks are parts of one."
        )
    if dist.get_rank(group) < 0:
        raise ValueError("group must have this process in it, got one without; make it of all that step.")
    seen: list[tuple[int, int]] = []

    def compare(*_: object) -> None:
        numbers = optimizer.param_groups[0]
        now = (numbers["phase"], numbers["epoch"])
        if numbers["clock"] == 0 or seen == [now]:
            return
        seen[:] = [now]
        names = optimizer._all_names()
        own = [_hash(optimizer.mask(p, upcoming=True)).to(params[0].device) for p in names]
        hashes = [torch.stack(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(hashes, hashes[0].clone(), group)
        differs = (torch.stack(hashes) != hashes[0]).tolist()
        for place, name in enumerate(names.values()):
            for rank, column in enumerate(differs):
                if column[place]:
                    raise RuntimeError(
                        f"masks must be the same on all processes, got another of {name!r} on rank {rank} "
                        "than on rank 0; give all the same seed, and gradients that are averaged, while "
                        "observing too."
                    )

    return optimizer.register_step_post_hook(compare)


def _hash(mask: Tensor) -> Tensor:
    """64 bits of a bool tensor."""
    flat = mask.flatten()
    words = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(torch.int64)
    place = torch.arange(1, words.numel() + 1, device=words.device) * 0x1E3779B97F4A7C15
    # mixed as in splitmix64, before the sum: of a word's highest byte a product keeps 8 bits
    mixed = words + place
    mixed = (mixed ^ (mixed >> 30)) * 0x3F58476D1CE4E5B9
    mixed = (mixed ^ (mixed >> 27)) * 0x14D049BB133111EB
    return (mixed ^ (mixed >> 31)).sum()


def _ranks(mesh: DeviceMesh) -> set[int]:
    return set(mesh.mesh.flatten().tolist())


def _place(mesh: DeviceMesh) -> Sequence[int]:
    place = mesh.get_coordinate()
    assert place is not None
    return place


def _geometry(p: Tensor, name: Callable[[Tensor], str]) -> Geometry:
    if not isinstance(p, DTensor):
        numel = max(p.numel(), 1)
        return (0, numel, numel)
    if p.to_local().numel() == 0:
        return (0, 1, 1)
    starts, lengths = (
        zip(*(_held(p, dim, name) for dim in range(p.dim())), strict=True) if p.dim() else ((), ())
    )
    cut = [dim for dim in range(p.dim()) if lengths[dim] != p.shape[dim]]
    if not cut:
        return (0, p.numel(), p.numel())
    # local rows of the last dimension that is cut, one after the other; what lies around them has to be one
    # run
    last, before = cut[-1], cut[:-1]
    if len(before) > 1 or (before and any(p.shape[dim] != 1 for dim in range(before[0]))):
        raise NotImplementedError(
            f"a shard must be one block of rows, or of columns, got {name(p)!r} of shape {tuple(p.shape)} "
            f"cut along the dimensions {cut}; shard it along one dimension."
        )
    strides = [p.shape[dim + 1 :].numel() for dim in range(p.dim())]
    offset = sum(starts[dim] * strides[dim] for dim in cut)
    return (offset, lengths[last] * strides[last], p.shape[last] * strides[last])


def _held(p: DTensor, dim: int, name: Callable[[Tensor], str]) -> tuple[int, int]:
    """Which rows of a dimension this process holds: the first, and how many."""
    size = p.shape[dim]
    if not any(how.is_shard(dim) or getattr(how, "dim", None) == dim for how in p.placements):
        return 0, size
    # asked of torch, which knows uneven and strided shards; no process needs another for that
    rows = torch.arange(size, device=p.device_mesh.device_type)
    how = [
        _along_first(placement) if getattr(placement, "dim", None) == dim else Replicate()
        for placement in p.placements
    ]
    held = distribute_tensor(rows, p.device_mesh, how, src_data_rank=None).to_local().tolist()
    if held != list(range(held[0], held[0] + len(held))):
        raise NotImplementedError(
            f"a shard must be one block of rows, got rows {held[:4]}... of {name(p)!r}; shard it along one "
            "dimension of a mesh, or along two in the order that FSDP2 after tensor parallel has."
        )
    return held[0], len(held)


def _along_first(placement: Any) -> Any:
    """The same shards, of a tensor with one dimension."""
    if type(placement) is Shard:
        return Shard(0)
    return type(placement)(0, split_factor=placement.split_factor)
