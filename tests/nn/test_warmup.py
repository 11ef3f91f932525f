# SPDX-License-Identifier: Apache-2.0
"""mpk.warmup runs the kernels of a model and leaves no trace in it."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import mpkernels as mpk
from mpkernels.runtime import native, resolve
from mpkernels.runtime.op import Op
from tests.ranks import run_ranks
from tests.steps import raw


class Model(nn.Module):
    """Everything that a forward may change: running statistics, a buffer that is replaced, random numbers."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("absent", None)

    def forward(self, x, scale=1.0):
        self.calls = self.calls + 1
        return {"out": self.inner(x) * scale, "none": None}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return mpk.convert(Model(), "mixed_float16")


def everything(model) -> list:
    tensors = [*model.parameters(), *model.buffers(), torch.get_rng_state()]
    grads = [p.grad for p in model.parameters()]
    modes = [(m.training, len(m._forward_hooks), len(m._backward_hooks)) for m in model.modules()]
    return [*raw(tensors), *raw(g for g in grads if g is not None), [g is None for g in grads], modes]


def spied(monkeypatch) -> list[str]:
    """Names of the ops that ran, in order."""
    ran, run = [], Op.execute
    monkeypatch.setattr(Op, "execute", lambda op, *a, **k: (ran.append(op.name), run(op, *a, **k))[1])
    return ran


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("inputs", [torch.ones(3, 6), (torch.ones(3, 6), 2.0), {"x": torch.ones(3, 6)}], ids=type)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_warmup_leaves_no_trace(context, inputs, training, model, monkeypatch):
    model.train(training)
    model.inner[0].weight.grad = torch.full((8, 6), 0.5)
    model.inner[0].weight.register_post_accumulate_grad_hook(lambda p: p.data.zero_())  # an optimizer inside backward
    calls, before, ran = model.calls, everything(model), spied(monkeypatch)
    with context():
        assert mpk.warmup(model, inputs) is None
    assert ran == ["linear_act"] * 2 + ["linear_act_backward"] * 2
    assert everything(model) == before
    assert model.calls is calls


def test_warmup_leaves_no_trace_of_a_model_that_raises(model):
    before = everything(model)
    with pytest.raises(RuntimeError, match="last dimension"):
        mpk.warmup(model, torch.ones(3, 5))
    assert everything(model) == before


def test_warmup_asks_for_every_op(model, monkeypatch):
    """The step's kernels are chosen too, and what chooses is asked outside of any compile."""
    asked = set()
    choose = resolve.choose
    monkeypatch.setattr(resolve, "choose", lambda name, *key: (asked.add(name), choose(name, *key))[1])
    mpk.warmup(model, torch.ones(3, 6))
    assert asked == set(resolve.ops) - {"quantize"}  # which no layer calls


@pytest.mark.skipif(native.why_not() is not None, reason=f"native: {native.why_not()}")
def test_warmup_asks_of_a_layer_what_it_computes_in(monkeypatch):
    """linear_act in C++ on a CPU has no float64, and a float64 parameter that is rounded to float32 needs none."""
    monkeypatch.setenv("MPKERNELS_BACKEND", "native")
    mpk.warmup(mpk.MPLinear(6, 4, policy="mixed_float32"), torch.ones(3, 6, dtype=torch.float64))


def test_warmup_runs_compiled_models_uncompiled(model):
    graphs = []
    compiled = torch.compile(model.inner, backend=lambda module, inputs: (graphs.append(module), module.forward)[1])
    mpk.warmup(compiled, torch.ones(3, 6))
    assert not graphs
    compiled(torch.ones(3, 6))
    assert graphs


def test_warmup_of_what_has_no_gradient(model, monkeypatch):
    ran = spied(monkeypatch)
    mpk.warmup(model.requires_grad_(False), torch.ones(3, 6))
    assert ran == ["linear_act"] * 2


def test_warmup_inside_of_a_compiled_function(model, monkeypatch):
    """A graph break, as a step is."""
    ran = spied(monkeypatch)
    assert torch.compile(lambda x: (mpk.warmup(model, x), x + 1)[1], backend="eager")(torch.ones(3, 6)).sum() == 36
    assert len(ran) == 4


def test_warmup_raises(model, monkeypatch):
    with pytest.raises(TypeError, match="got function"):
        mpk.warmup(lambda x: x, torch.ones(3, 6))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="before the capture"):
        mpk.warmup(model, torch.ones(3, 6))


def wrapped_models(rank):
    model = mpk.convert(Model(), "mixed_float16")
    mpk.warmup(model, torch.ones(3, 6))
    for wrapped in (nn.parallel.DistributedDataParallel(model), fully_shard(model)):
        with pytest.raises(RuntimeError, match="is distributed already: call it before DDP and fully_shard"):
            mpk.warmup(wrapped, torch.ones(3, 6))


def test_warmup_refuses_distributed_models():
    run_ranks(1, wrapped_models)


def test_warmup_keeps_gradients_of_another_dtype():
    """As they are where `p.data` was replaced by a narrower copy: torch takes none of them back once it is taken away."""
    layer = mpk.MPLinear(4, 3, policy="mixed_float16")
    layer(torch.ones(2, 4)).sum().backward()
    layer.weight.data, before = layer.weight.data.half(), layer.weight.grad
    mpk.warmup(layer, torch.ones(2, 4))
    assert layer.weight.grad is before
