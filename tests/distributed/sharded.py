# SPDX-License-Identifier: Apache-2.0
"""Parameters and models on many ranks, in the layouts of FSDP, HSDP and by hand, and what the ranks must agree on."""

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import mpkernels as mpk
from tests.ranks import gathered
from tests.steps import raw

# With 4 ranks 9 rows lie as 3, 3, 3 and 0; 2 rows and 1 row leave ranks empty in every world but one; 8 rows leave none.
SHAPES = ((8, 3), (9, 2), (2, 4), (1,), (0, 3))
OPTIMIZERS = {
    "AdamW": (mpk.optim.AdamW, {"lr": 0.01}),
    "amsgrad": (mpk.optim.Adam, {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1}),
    "momentum": (mpk.optim.SGD, {"lr": 0.01, "momentum": 0.9, "nesterov": True}),
}
# How parameters lie: mesh shape and dimension names, and the placements that they take in turn. "by hand": plain shards.
LAYOUTS = {
    "fsdp": (None, ((Shard(0),),)),
    "hsdp": ((2, 2), ((Replicate(), Shard(0)),)),
    "hsdp on one node": ((1, 2), ((Replicate(), Shard(0)),)),
    "mixed": ((2, 2), ((Shard(0), Shard(0)), (Shard(0), Replicate()), (Replicate(), Shard(0)), (Replicate(), Replicate()))),
    "replicated": (None, ((Replicate(),),)),
}
everywhere = pytest.mark.parametrize(
    "world, layout",
    [(2, "hsdp on one node"), (3, "fsdp"), (4, "fsdp"), (4, "hsdp"), (4, "mixed"), (2, "replicated"), (3, "by hand")],
)


def values(seed: int, shape, dtype=torch.float32) -> torch.Tensor:
    """The same on all ranks."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Sharded:
    """Parameters that lie as a layout says, and their gradients from the whole ones."""

    def __init__(self, layout: str, dtype=torch.float32, shapes=SHAPES):
        self.shapes, self.by_hand = shapes, layout == "by hand"
        if not self.by_hand:
            sizes, self.placements = LAYOUTS[layout]
            self.mesh = init_device_mesh("cpu", sizes or (distributed.get_world_size(),))
        self.params = [nn.Parameter(self.shard(i, values(i, shape, dtype))) for i, shape in enumerate(shapes)]
        self.options = {"process_group": distributed.group.WORLD} if self.by_hand else {}

    def shard(self, i: int, whole: torch.Tensor) -> torch.Tensor:
        if not self.by_hand:
            return distribute_tensor(whole, self.mesh, self.placements[i % len(self.placements)])
        parts = whole.tensor_split(distributed.get_world_size())
        return parts[distributed.get_rank()].clone()

    def give_grads(self, t: int, scale=1.0) -> None:
        for i, parameter in enumerate(self.params):
            parameter.grad = self.shard(i, values(100 * t + i, self.shapes[i]).mul(scale).to(parameter.dtype))

    def poison(self, value: float) -> None:
        """On this rank alone, as an overflow in a local reduction is."""
        local(self.params[0].grad).view(-1)[-1] = value

    def whole(self, tensors) -> list[torch.Tensor]:
        if not self.by_hand:
            return [t.full_tensor() for t in tensors]
        return [torch.cat(parts) for parts in zip(*gathered(t.detach() for t in tensors), strict=True)]


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def everything(params, optimizer) -> list[bytes]:
    return raw(local(t) for p in params for t in (p, *(v for _, v in sorted(optimizer.state[p].items()))))


def assert_agree(*scalars) -> None:
    """Bit for bit on all ranks."""
    ranks = [raw(tensors) for tensors in gathered(torch.as_tensor(s) for s in scalars)]
    assert all(rank == ranks[0] for rank in ranks), gathered(scalars)


def step_by(way: str, scaler, optimizer) -> None:
    if way == "scaler's clip":
        scaler.clip_grad_norm_(optimizer, 1.0)
    if way in ("unscale_", "torch's clip"):
        scaler.unscale_(optimizer)
    if way == "torch's clip":
        scaler.clip_grad_norm_(optimizer, 1.0)
    scaler.step(optimizer)
    scaler.update()


def replicas_agree(sharded, optimizer) -> None:
    """What two ranks both hold has the same bits on both."""
    if sharded.by_hand:
        return
    states = {}
    for p in sharded.params:
        first = sharded.mesh.get_coordinate()
        where = tuple(c for c, placement in zip(first, p.placements, strict=True) if not placement.is_replicate())
        states[len(states), where] = raw(local(t) for t in (p, *optimizer.state[p].values()))
    everywhere = [None] * distributed.get_world_size()
    distributed.all_gather_object(everywhere, states)
    for rank in everywhere:
        assert all(states.get(key, value) == value for key, value in rank.items())


def no_collective(*args, **kwargs):
    raise AssertionError("a collective on one rank")


class Net(nn.Sequential):
    """Every gradient of the weighted sum of its outputs is exact in fp32, whatever the order of the sums."""

    def __init__(self, policy="float32"):
        super().__init__(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters()):
                parameter.copy_(values(i, parameter.shape).mul(4).round().div(4))
        mpk.convert(self, policy)


def batch(t: int, rows: int = 12):
    return values(t, (rows, 4)).mul(2).round(), values(t + 50, (rows, 3)).mul(2).round()


def sharded_net(policy: str, mesh=None) -> nn.Module:
    model = Net(policy)
    mesh = mesh or init_device_mesh("cpu", (distributed.get_world_size(),))
    mp_policy = mpk.Policy.parse(policy).to_fsdp()
    for module in (*(m for m in model if isinstance(m, nn.Linear)), model):
        fully_shard(module, mesh=mesh, mp_policy=mp_policy)
    return model


def train_net(model, optimizer, scaler, steps=30) -> list[float]:
    x, _ = batch(distributed.get_rank(), 32)
    y = torch.stack([x[:, 0] * x[:, 1], x[:, 2], x[:, 3].abs()], dim=1) / 4
    losses = []
    for _ in range(steps):
        loss = (model(x).float() - y).square().mean()
        losses.append(loss.item())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return losses


def wholes(state) -> list[torch.Tensor]:
    return [value.full_tensor() if isinstance(value, DTensor) else value for _, value in sorted(state.items())]
