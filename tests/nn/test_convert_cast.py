# SPDX-License-Identifier: Apache-2.0
"""The cast of `float16` and `bfloat16`: of sharded and wrapped parameters too, and refused where it would drop hooks."""

import pytest
import torch
from torch import distributed, nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

import mpkernels as mpk
from tests.nn.test_convert import snapshot
from tests.ranks import run_ranks
from tests.steps import raw


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 4))


def check_refused(model, dtypes=("float16", "bfloat16")) -> None:
    before = snapshot(model)
    for policy in dtypes:
        with pytest.raises(RuntimeError, match="convert first, then wrap the model in DDP or FSDP"):
            mpk.convert(model, policy)
        assert snapshot(model) == before


# ----- tensors that wrap tensors ----------------------------------------------------------------------


class Wrapper(torch.Tensor):
    """Holds another tensor and does on it what is asked of it."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return Wrapper(inner["inner"])

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        unwrap = lambda t: t.inner if isinstance(t, Wrapper) else t
        args, kwargs = pytree.tree_map(unwrap, (args, kwargs or {}))
        return pytree.tree_map(lambda t: Wrapper(t) if isinstance(t, torch.Tensor) else t, func(*args, **kwargs))


def wrapped() -> nn.Sequential:
    model = mlp()
    model[0].weight = nn.Parameter(Wrapper(model[0].weight.detach()))
    model[2].weight = nn.Parameter(Wrapper(model[2].weight.detach()), requires_grad=False)
    return model


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_cast_reaches_into_wrappers(dtype):
    model, expected = wrapped(), mlp().to(dtype)
    parameters = list(model.parameters())
    mpk.convert(model, str(dtype).removeprefix("torch."))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    for parameter, plain in zip(model.parameters(), expected.parameters(), strict=True):
        inner = parameter.inner if isinstance(parameter, Wrapper) else parameter
        assert parameter.dtype == inner.dtype == dtype
        assert raw([inner]) == raw([plain])
    assert [p.requires_grad for p in model.parameters()] == [i != 2 for i in range(6)]
    kept = mpk.convert(wrapped(), "float16", keep="2")
    assert kept[2].weight.inner.dtype == torch.float32


def test_cast_with_tied_wrappers():
    model = wrapped()
    model.append(nn.Linear(6, 8))
    model[4].weight = model[0].weight
    mpk.convert(model, "float16")
    assert model[4].weight is model[0].weight
    assert model[0].weight.inner.dtype == torch.float16


@pytest.mark.parametrize("flag", ["swap_module_params", "overwrite_module_params"])
def test_cast_by_torchs_other_ways(flag):
    """Parameters stay the same objects where torch keeps them; a model that has run is cast too."""
    set_flag = getattr(torch.__future__, f"set_{flag}_on_conversion")
    model, expected = mlp(), mlp().half()
    mpk.convert(model, "mixed_float16")
    model(torch.ones(2, 6)).sum().backward()
    parameters = list(model.parameters())
    set_flag(True)
    try:
        mpk.convert(model, "float16")
    finally:
        set_flag(False)
    assert raw(model.parameters()) == raw(expected.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    same = [a is b for a, b in zip(model.parameters(), parameters, strict=True)]
    assert all(same) if flag.startswith("swap") else not any(same)


def sharded(rank):
    mesh = init_device_mesh("cpu", (2,))
    plan = {"0": ColwiseParallel(), "3": RowwiseParallel()}
    for shard in (
        fsdp.fully_shard,
        lambda m: [fsdp.fully_shard(child) for child in (m[0], m[3], m)],
        lambda m: parallelize_module(nn.Sequential(*m[:2], nn.Identity(), m[3]), mesh, plan),
    ):
        for dtype in (torch.float16, torch.bfloat16):
            model, expected = mlp(), dict(mlp().to(dtype).named_parameters())
            shard(model)
            mpk.convert(model, str(dtype).removeprefix("torch."))
            assert any(isinstance(p, DTensor) for p in model.parameters())
            for name, parameter in model.named_parameters():
                local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                assert parameter.dtype == local.dtype == dtype, name
                whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
                assert raw([whole]) == raw([expected[name]]), name
    model = mpk.convert(mlp(), "mixed_bfloat16")
    fsdp.fully_shard(model[0])
    for undo in (mpk.revert, mpk.convert):
        with pytest.raises(RuntimeError, match="0 was converted, then made a FSDPMPLinear: fully_shard comes last"):
            undo(model)
        assert type(model[3]) is mpk.MPLinear
    model = mlp()
    fsdp.fully_shard(model)
    mpk.convert(model, "bfloat16")
    optimizer = mpk.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(2, 6).bfloat16()).float().square().sum().backward()
    before = raw(p.to_local() for p in model.parameters())
    optimizer.step()
    assert raw(p.to_local() for p in model.parameters()) != before
    assert model(torch.ones(2, 6).bfloat16()).dtype == torch.bfloat16


def test_cast_of_sharded_parameters():
    run_ranks(2, sharded)


# ----- hooks ----------------------------------------------------------------------


def test_cast_keeps_hooks_that_it_can_keep():
    model, seen = mlp(), []
    model[0].weight.register_hook(lambda grad: seen.append("hook"))
    model[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append("after"))
    mpk.convert(model, "bfloat16")
    model(torch.ones(2, 6).bfloat16()).sum().backward()
    assert seen == ["hook", "after"]


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_cast_that_would_lose_hooks_is_refused(register):
    """Of a tensor that wraps another, torch makes a new one."""
    model = wrapped()
    getattr(model[0].weight, register)(lambda *args: None)
    with pytest.raises(RuntimeError, match=r"hooks lie on 0.weight, and would be lost by a cast to torch.float16"):
        mpk.convert(model, "float16")
    assert model[0].weight.inner.dtype == torch.float32
    assert type(model[0]) is nn.Linear


def averaged(model, rank) -> None:
    model.zero_grad()
    model(torch.full((2, 6), float(rank + 1)).to(next(model.parameters()).dtype)).float().sum().backward()
    grads = [p.grad.float() for p in model.parameters() if p.grad is not None]
    for grad in grads:
        others = [torch.empty_like(grad) for _ in range(2)]
        distributed.all_gather(others, grad.contiguous())
        assert raw(others[:1]) == raw(others[1:])


def refused(rank):
    ddp = DistributedDataParallel(mlp())
    inside = nn.ModuleDict({"backbone": DistributedDataParallel(mlp()), "head": nn.Linear(4, 2)})
    for model in (ddp, inside, mpk.convert(DistributedDataParallel(mlp()), "mixed_bfloat16")):
        check_refused(model)
    check_refused(ddp.module)  # which does not know that it is wrapped
    check_refused(ddp.module[0])
    check_refused(fsdp.FullyShardedDataParallel(mlp(), device_id="cpu"))
    check_refused(fsdp.FullyShardedDataParallel(mlp(), device_id="cpu", use_orig_params=True))
    averaged(ddp, rank)
    averaged(mpk.convert(ddp, "mixed_bfloat16"), rank)
    averaged(DistributedDataParallel(mpk.convert(mlp(), "bfloat16")), rank)
    half = DistributedDataParallel(mlp().bfloat16())
    averaged(mpk.convert(half, "bfloat16"), rank)  # there is nothing to cast
    try:
        from torch.distributed._composable.replicate import replicate
    except ImportError:  # a private name
        return
    lazily = replicate(mlp())  # is DDP from its first forward on
    averaged(mpk.convert(lazily, "bfloat16"), rank)
    check_refused(lazily, dtypes=("float16",))


def test_cast_of_what_ddp_has_wrapped_is_refused():
    run_ranks(2, refused)
