# SPDX-License-Identifier: Apache-2.0
"""The step on many ranks: one found_inf, one norm, and the local tensors that the ops work on.

found_inf is agreed on by all ranks of the meshes of the optimizer's DTensors and of `process_group`. Each of them joins the
collectives whether its shards are empty or not, and also without any gradient. The norm sums a DTensor over the mesh
dimensions that shard it (of replicas the first counts) and plain tensors over `process_group`; without one they are taken
for the same on every rank. All ranks get the same bits. Meshes come in the order of the parameters, which is the same on
all ranks; two that share only some of their ranks must be slices of one mesh.
"""

from dataclasses import dataclass

import torch
from torch import distributed

from mpkernels.runtime.op import is_dtensor

LOCAL, UNCOUNTED = "local", "uncounted"  # parts of the norm without a collective: the same on all ranks; a later replica's
_SCALES = 1.0, 2.0**600, 2.0**-600  # of norms before they are squared: as they are, for tiny ones, for huge ones


def squares_of(norm: torch.Tensor) -> torch.Tensor:
    """The squares of a norm, or the sums of those of several, (3,) fp64: one of them neither over- nor underflows."""
    return torch.stack([norm * scale for scale in _SCALES]).square().reshape(len(_SCALES), -1).sum(1)


def norm_of(squares: torch.Tensor) -> torch.Tensor:
    """The norm of sums of `squares_of`."""
    plain, up, down = squares.sqrt().unbind()
    tiny, huge = up / _SCALES[1], down / _SCALES[2]
    return torch.where(plain.isinf(), huge, torch.where(plain < 2.0**-400, tiny, plain))


@dataclass(eq=False)
class _Mesh:
    """The ranks that hold something together, as the process groups whose collectives reach all of them in turn."""

    shard_groups: list  # one per dimension that shards a tensor
    replicate_groups: list
    is_first: tuple[bool, ...] = ()  # per mesh dimension: whether this rank's coordinate is 0

    def reduce_(self, packed: torch.Tensor, norm: bool) -> None:
        """Sum over all ranks. A group per row of a mesh may add in another order than the next row's: they agree by maximum."""
        for group in self.shard_groups:
            distributed.all_reduce(packed, distributed.ReduceOp.SUM, group=group)
        for group in self.shard_groups[:-1] if norm else ():
            distributed.all_reduce(packed, distributed.ReduceOp.MAX, group=group)
        for group in self.replicate_groups:  # squares come from the first replica alone: an exact sum
            distributed.all_reduce(packed, distributed.ReduceOp.SUM, group=group)


class Ranks:
    """The ranks that take part in the steps of one optimizer.

    dtensors: whether a parameter is a DTensor. many: whether found_inf needs a collective.
    """

    def __init__(self, params: list[torch.Tensor], process_group=None):
        placed = [p for p in params if is_dtensor(p)]
        self.dtensors = bool(placed)
        self._meshes = {mesh: _mesh(mesh, placed) for mesh in dict.fromkeys(p.device_mesh for p in placed)}
        if process_group is not None:
            alone = distributed.get_world_size(process_group) == 1
            self._meshes[None] = _Mesh([] if alone else [process_group], [])
        self._plain = LOCAL if process_group is None else None
        self.many = any(m.shard_groups or m.replicate_groups for m in self._meshes.values())

    def part_of(self, parameter: torch.Tensor):
        """What the squares of its gradient are summed over: a mesh, None (the process group), LOCAL or UNCOUNTED."""
        if not self.many:
            return LOCAL
        if not is_dtensor(parameter):
            return self._plain
        mesh, is_first = parameter.device_mesh, self._meshes[parameter.device_mesh].is_first
        counts = all(is_first[dim] for dim, where in enumerate(parameter.placements) if where.is_replicate())
        return mesh if counts else UNCOUNTED

    def agree(self, found_inf: torch.Tensor, squares: dict | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """found_inf and the norm of all ranks, from this rank's found_inf and `squares_of` its parts (None: no norm)."""
        nothing = torch.zeros(len(_SCALES), dtype=torch.float64, device=found_inf.device)
        found, total = found_inf.double().reshape(1), None if squares is None else squares.get(LOCAL, nothing)
        for key, mesh in self._meshes.items():
            packed = torch.cat([found, nothing if squares is None else squares.get(key, nothing)])
            mesh.reduce_(packed, norm=squares is not None)
            found = packed[:1]
            total = None if total is None else total + packed[1:]
        return (found != 0).to(found_inf.dtype).reshape(()), None if total is None else norm_of(total)


def _mesh(mesh, placed: list[torch.Tensor]) -> _Mesh:
    coordinate = mesh.get_coordinate()
    if coordinate is None:  # this rank holds nothing of it
        return _Mesh([], [], (False,) * mesh.ndim)
    sharded = {
        dim
        for parameter in placed
        if parameter.device_mesh == mesh
        for dim, where in enumerate(parameter.placements)
        if not where.is_replicate()
    }
    several = [dim for dim in range(mesh.ndim) if mesh.size(dim) > 1]
    return _Mesh(
        shard_groups=[mesh.get_group(dim) for dim in several if dim in sharded],
        replicate_groups=[mesh.get_group(dim) for dim in several if dim not in sharded],
        is_first=tuple(c == 0 for c in coordinate),
    )


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of `tensor`; call it without gradients. A plain tensor is its own."""
    if not is_dtensor(tensor):
        return tensor
    result = tensor.to_local()
    wait = getattr(result, "wait", None)  # the result of a collective under way
    return result if wait is None else wait()


def redistribute_grads(params: list[torch.Tensor]) -> None:
    """Lay each DTensor's gradient out as the parameter lies, as torch's optimizers do.

    Sequence parallelism leaves Partial sums for replicated parameters. Every rank of the mesh has the gradient then, as of
    any DTensor, and enters the collective here, in the order of the parameters.
    """
    for parameter in params:
        grad = parameter.grad
        if grad is None or not (is_dtensor(parameter) and is_dtensor(grad)):
            continue
        (mesh, wanted), (grad_mesh, got) = placement(parameter), placement(grad)
        if mesh == grad_mesh and wanted != got:
            parameter.grad = grad.redistribute(mesh, wanted)


def check_placements(name: str, parameter: torch.Tensor, grad: torch.Tensor) -> None:
    """Raise RuntimeError unless the gradient lies as the parameter does: on another mesh nothing brings it there."""
    mesh, wanted = placement(parameter)
    grad_mesh, got = placement(grad)
    if mesh != grad_mesh or wanted != got:
        raise RuntimeError(
            f"the gradient of {name} has placements {got} on {grad_mesh}, expected {wanted} on {mesh}: "
            "redistribute it before the step"
        )


def placement(tensor: torch.Tensor) -> tuple:
    """Mesh and placements; of a plain tensor none."""
    return (tensor.device_mesh, tensor.placements) if is_dtensor(tensor) else (None, ())


def laid_out_as(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """`value`, whole or sharded in whatever way, as the plain tensor or DTensor that `parameter` is; all ranks call it."""
    if not is_dtensor(parameter):
        return value.full_tensor() if is_dtensor(value) else value
    mesh, placements = parameter.device_mesh, parameter.placements
    if is_dtensor(value):
        if value.device_mesh == mesh:
            return value.redistribute(mesh, placements)
        value = value.full_tensor()
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, mesh, placements, src_data_rank=None)
