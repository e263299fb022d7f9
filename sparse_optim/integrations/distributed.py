"""Parameters that are spread over processes as DTensors: FSDP2, tensor parallel, and both at once.

Each process updates what it holds, in place. Masks are those of the whole model: random ones are drawn by
where an entry lies in the full tensor, and a selection adds up counts over all processes. Nothing else
crosses between them, but for one number when gradients are clipped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

Geometry = tuple[int, int, int]  # offset, inner, stride, see backends.reference


class Shards:
    """What this process holds of an optimizer's parameters.

    Args:
        params: of which some are DTensors, over one mesh or over parts of one.
        name: of a parameter, for errors.

    Raises:
        NotImplementedError: for parameters over several meshes, and shards that are not one block.
    """

    def __init__(self, params: Sequence[Tensor], name: Callable[[Tensor], str]) -> None:
        meshes = [p.device_mesh._get_root_mesh() for p in params if isinstance(p, DTensor)]
        self._mesh: DeviceMesh = meshes[0]
        if any(mesh != self._mesh for mesh in meshes):
            raise NotImplementedError(
                "parameters must be spread over one mesh, or parts of one, got "
                f"{len(set(meshes))} meshes; make all from one init_device_mesh()."
            )
        self._geometries: dict[Tensor, Geometry] = {}
        self._counted: dict[Tensor, bool] = {}
        for p in params:
            self._geometries[p] = _geometry(p, name)
            self._counted[p] = self._is_first_copy(p)

    def geometry(self, p: Tensor) -> Geometry:
        """Where the entries that this process holds lie in the full tensor."""
        return self._geometries[p]

    def is_counted(self, p: Tensor) -> bool:
        """Whether this process, of all that hold the same entries, is the one that counts them."""
        return self._counted[p]

    def add_up(self, number: Tensor) -> Tensor:
        """A tensor summed over all processes."""
        total = number.clone()
        for dim in range(self._mesh.ndim):
            if self._mesh.size(dim) > 1:
                # a GPU's processes talk about what is on GPUs
                there = total.to(self._mesh.device_type)
                dist.all_reduce(there, group=self._mesh.get_group(dim))
                total = there.to(number.device)
        return total

    def _is_first_copy(self, p: Tensor) -> bool:
        names = self._mesh.mesh_dim_names or tuple(map(str, range(self._mesh.ndim)))
        coordinate = self._mesh.get_coordinate()
        assert coordinate is not None
        sharded: set[str] = set()
        if isinstance(p, DTensor):
            own = p.device_mesh.mesh_dim_names or names
            sharded = {
                name for name, how in zip(own, p.placements, strict=True) if not isinstance(how, Replicate)
            }
        return all(place == 0 for name, place in zip(names, coordinate, strict=True) if name not in sharded)


def gradient_of(p: Tensor, grad: Tensor) -> Tensor:
    """What this process holds of a gradient."""
    if not isinstance(p, DTensor) or not isinstance(grad, DTensor):
        return grad
    if grad.placements != p.placements:
        grad = grad.redistribute(p.device_mesh, p.placements)
    shard: Any = grad.to_local()
    # one that is still on its way
    arrived: Tensor = shard.wait() if hasattr(shard, "wait") else shard
    return arrived


def spread_like(p: Tensor, shard: Tensor) -> Tensor:
    """A DTensor of what each process holds, spread as the parameter is."""
    assert isinstance(p, DTensor)
    return DTensor.from_local(
        shard, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )


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
