# SPDX-License-Identifier: Apache-2.0
"""Layers on many ranks: tensor parallelism by DTensors, and checkpoints saved sharded, loaded into a plain model."""

import pytest
import torch
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import mpkernels as mpk
from mpkernels.ops.linear_act import activation_of
from tests.bounds import check_backward, check_forward
from tests.ranks import run_ranks
from tests.steps import raw

LAYOUTS = {  # of x, weight and bias; columns that do not divide by the ranks, too
    "replicated": (Replicate(), Replicate(), Replicate()),
    "rows": (Shard(0), Replicate(), Replicate()),
    "column": (Replicate(), Shard(0), Shard(0)),
    "row": (Shard(1), Shard(1), None),
}


def operands(policy: mpk.Policy) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(shape, generator=generator)
    weight, bias = (make(*shape).to(policy.param_dtype) for shape in ((37, 24), (37,)))
    return [make(6, 24), weight, bias, make(6, 37)]


def sharded_linear(rank, layout, policy, activation):
    mesh, policy = init_device_mesh("cpu", (distributed.get_world_size(),)), mpk.Policy.parse(policy)
    x, weight, bias, grad_out = operands(policy)
    if layout == "row":
        bias = activation = None
    leaves = [
        None if t is None else distribute_tensor(t, mesh, [placement]).requires_grad_()
        for t, placement in zip((x, weight, bias), LAYOUTS[layout], strict=True)
    ]
    out = mpk.functional.linear_act(*leaves, activation, policy)
    assert out.placements[0] == {"rows": Shard(0), "column": Shard(1)}.get(layout, out.placements[0])
    assert out.placements[0].is_partial() == (layout == "row")
    check_forward(out.full_tensor(), x, weight, bias, activation_of(activation), policy.compute_dtype)
    out.backward(distribute_tensor(grad_out.to(out.dtype), mesh, [LAYOUTS[layout][0] if layout == "rows" else Replicate()]))
    grads = [None if leaf is None else leaf.grad.full_tensor() for leaf in leaves]
    positive = ~(out.full_tensor() <= 0) if activation else None
    check_backward(grads, grad_out, x, weight, positive, policy.compute_dtype)
    assert layout == "rows" or leaves[1].grad.placements == leaves[1].placements  # no weight is gathered


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_linear_act_is_sharded(layout, policy, activation):
    if layout != "row" or activation is None:
        run_ranks(2, sharded_linear, layout, policy, activation)


def refused(rank):
    mesh = init_device_mesh("cpu", (2,))
    x, weight, bias, _ = operands(mpk.Policy.parse("float32"))
    x, weight = (distribute_tensor(t, mesh, [Shard(1)]) for t in (x, weight))
    bias = distribute_tensor(bias, mesh, [Replicate()])
    for arguments, reason in (
        ((bias, None, "float32"), "a bias"),
        ((None, "relu", "float32"), "an activation"),
        ((None, None, "mixed_float16,output=float16"), "an output in torch.float16"),
    ):
        with pytest.raises(RuntimeError, match=f"row-parallel.* cannot have {reason}"):
            mpk.functional.linear_act(x, weight, *arguments)


def test_row_parallel_is_refused_with_a_reason():
    run_ranks(2, refused)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 37), nn.ReLU(), nn.Linear(37, 5))


def save_and_load(rank, folder):
    """Sharded by FSDP2 after a step under `to_fsdp()`; a plain model of nn.Linear loads every bit."""
    policy = mpk.Policy.parse("mixed_float16")
    sharded = mpk.convert(model(), policy)
    for module in (sharded[0], sharded[2], sharded):
        fully_shard(module, mp_policy=policy.to_fsdp())
    optimizer = mpk.optim.AdamW(sharded.parameters(), lr=0.1)
    sharded(torch.randn(6, 24)).float().square().sum().backward()
    optimizer.step()
    checkpoint.save(get_model_state_dict(sharded), checkpoint_id=folder)
    plain = model()
    before = raw(plain.parameters())
    state = get_model_state_dict(plain)
    checkpoint.load(state, checkpoint_id=folder)
    set_model_state_dict(plain, state)
    assert raw(plain.parameters()) == raw(p.full_tensor() for p in sharded.parameters()) != before
    assert type(plain[0]) is nn.Linear


def test_sharded_checkpoint_goes_to_a_plain_model(tmp_path):
    run_ranks(2, save_and_load, str(tmp_path))


def test_safetensors_go_to_a_plain_model_and_back(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    converted = mpk.convert(model(), "mixed_float16")
    safetensors.save_model(converted, tmp_path / "model.safetensors")
    plain = nn.Sequential(nn.Linear(24, 37), nn.ReLU(), nn.Linear(37, 5))
    safetensors.load_model(plain, tmp_path / "model.safetensors")
    assert raw(plain.parameters()) == raw(converted.parameters())


def sharded_quantize(rank, dim, axis):
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    x = torch.randn((5, 6), generator=torch.Generator().manual_seed(0))
    placed = distribute_tensor(x, mesh, [Replicate() if dim is None else Shard(dim)])
    results = mpk.functional.quantize(placed, torch.float8_e4m3fn, axis)
    kept = dim is not None and axis is not None and dim != axis % 2
    assert all(result.placements == ((Shard(dim),) if kept else (Replicate(),)) for result in results)
    back = mpk.functional.dequantize(*results)
    expected = mpk.functional.quantize(x, torch.float8_e4m3fn, axis)
    assert torch.equal(results[1].full_tensor(), expected[1])
    assert torch.equal(back.full_tensor(), mpk.functional.dequantize(*expected))


@pytest.mark.parametrize("dim, axis", [(0, -1), (1, -1), (1, 0), (0, None)])
def test_quantize_is_sharded(dim, axis):
    run_ranks(2, sharded_quantize, dim, axis)
