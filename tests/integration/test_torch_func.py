# SPDX-License-Identifier: Apache-2.0
"""Gradients by vmap: torch.func, is_grads_batched and vectorized Jacobians of an MPLinear are those of nn.Linear."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, jacrev, stack_module_state, vjp, vmap

from mpkernels.nn import MPMLP, MPLinear, convert
from mpkernels.ops.linear_act import Activation
from tests import bounds
from tests.levels import each_once
from tests.linear_act_cases import same_bits

M, N, K, BATCH = 3, 4, 5, 6

TORCH = {
    None: lambda z: z,
    "relu": torch.relu,
    "relu2": lambda z: torch.relu(z).square(),
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
}
by_activation = pytest.mark.parametrize("activation", TORCH)


class Plain(nn.Linear):
    """nn.Linear with its activation, in torch's own ops."""

    def __init__(self, activation):
        super().__init__(K, N)
        self.act = TORCH[activation]

    def forward(self, x):
        return self.act(super().forward(x))


@pytest.fixture
def layers(activation, generator):
    """An MPLinear and torch's, of the same parameters, and x."""
    assert len(TORCH) == len(Activation)
    ours, plain = MPLinear(K, N, activation=activation, policy="float32"), Plain(activation)
    with torch.no_grad():
        for p in ours.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    plain.load_state_dict(ours.state_dict())
    return ours, plain, torch.randn(M, K, generator=generator, requires_grad=True)


def tensors_of(tree) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def batched(model, x):
    out, directions = model(x), torch.randn(BATCH, M, N, generator=torch.Generator().manual_seed(1))
    return torch.autograd.grad(out, (x, *model.parameters()), directions, is_grads_batched=True)


def ensemble(model):
    models = [copy.deepcopy(model) for _ in range(3)]
    with torch.no_grad():
        for i, other in enumerate(models):
            for p in other.parameters():
                p.mul_(i - 0.5)
    return stack_module_state(models)[0]


def loss(model):
    return lambda parameters, x: functional_call(model, parameters, (x,)).square().sum()


def ensemble_backward(model, x):
    parameters = ensemble(model)
    out = vmap(lambda p, x: functional_call(model, p, (x,)), (0, None))(parameters, x)
    return out, torch.autograd.grad(out.square().sum(), (x, *parameters.values()))


WAYS = {
    "is_grads_batched": batched,
    "is_grads_batched after vmap": lambda m, x: torch.autograd.grad(
        vmap(m)(x), (x, *m.parameters()), torch.eye(M * N).view(-1, M, N), is_grads_batched=True
    ),
    "jacobian": lambda m, x: torch.autograd.functional.jacobian(m, x, vectorize=True),
    "jacobian with a graph": lambda m, x: torch.autograd.functional.jacobian(m, x, vectorize=True, create_graph=True),
    "jacrev": lambda m, x: jacrev(m)(x),
    "jacrev of parameters": lambda m, x: jacrev(lambda p: functional_call(m, p, (x,)))(dict(m.named_parameters())),
    "jacrev in chunks": lambda m, x: jacrev(m, chunk_size=2)(x),
    "vmap of vjp": lambda m, x: vmap(vjp(m, x)[1])(torch.eye(M * N).view(-1, M, N)),
    "per sample": lambda m, x: vmap(grad(loss(m)), (None, 0))(dict(m.named_parameters()), x),
    "per sample jacrev": lambda m, x: vmap(jacrev(m))(x),
    "ensemble": lambda m, x: vmap(grad(loss(m)), (0, None))(ensemble(m), x),
    "ensemble with its own x": lambda m, x: vmap(grad(loss(m), argnums=(0, 1)), (0, 0))(ensemble(m), x),
    "ensemble, then backward": ensemble_backward,
    "ensemble of per sample": lambda m, x: vmap(vmap(grad(loss(m)), (None, 0)), (0, None))(ensemble(m), x),
}


@by_activation
@pytest.mark.parametrize("way", WAYS)
def test_gradients_by_vmap_are_torchs(way, activation, layers):
    ours, plain, x = layers
    got, expected = (tensors_of(WAYS[way](model, x)) for model in (ours, plain))
    assert [g.shape for g in got] == [e.shape for e in expected]
    for g, e in zip(got, expected, strict=True):
        bounds.check_rearranged(g.detach(), e.detach())


@by_activation
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16,grad=bfloat16", "bfloat16", "float64"])
def test_batched_gradients_are_those_one_by_one(activation, policy, generator):
    """Of a batch of directions, the same bits as each alone; in a chain with backward fused across its layers, too."""
    model = MPMLP([K, 8, N], activation=activation, output_activation=activation, policy=policy)
    x = torch.randn(M, K, generator=generator).to(model[0].weight.dtype).requires_grad_()
    out = model(x)
    directions = torch.randn(BATCH, M, N, generator=generator).to(out.dtype)
    inputs = (x, *model.parameters())
    together = torch.autograd.grad(out, inputs, directions, is_grads_batched=True, retain_graph=True)
    for i, direction in enumerate(directions):
        alone = torch.autograd.grad(out, inputs, direction, retain_graph=True)
        assert all(same_bits(t[i], a) for t, a in zip(together, alone, strict=True))


@by_activation
def test_per_sample_gradients_are_those_one_by_one(activation, generator):
    """Where x is cast and the preactivation saved: what is kept of each sample is that sample's."""
    layer = MPLinear(K, N, activation=activation, policy="mixed_float16,batch_invariant")
    x = torch.randn(M, 2, K, generator=generator)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    total = lambda p, x: functional_call(layer, p, (x,)).sum()
    together = vmap(grad(total), (None, 0))(parameters, x)
    for i in range(M):
        alone = grad(total)(parameters, x[i])
        assert all(same_bits(together[name][i], alone[name]) for name in alone)


def test_batched_gradients_of_the_op_itself(generator):
    x, weight = (torch.randn(s, generator=generator, requires_grad=True) for s in ((M, K), (N, K)))
    out = torch.ops.mpkernels.linear_act(x, weight, None, None, 1, torch.float32, torch.float32, 0)[0]
    directions = torch.randn(BATCH, M, N, generator=generator)
    together = torch.autograd.grad(out, (x, weight), directions, is_grads_batched=True, retain_graph=True)
    alone = [torch.autograd.grad(out, (x, weight), d, retain_graph=True) for d in directions]
    assert all(same_bits(t, torch.stack(a)) for t, a in zip(together, zip(*alone, strict=True), strict=True))


# ----- under torch.compile ---------------------------------------------------------------

COMPILED = {
    "grad": lambda m: grad(lambda x: m(x).square().sum()),
    "grad of parameters": lambda m: lambda x: grad(loss(m))(dict(m.named_parameters()), x),
    "vmap": lambda m: vmap(m),
    "vmap of grad": lambda m: lambda x: vmap(grad(loss(m)), (None, 0))(dict(m.named_parameters()), x),
    "jacrev": lambda m: jacrev(m),
}


@pytest.mark.parametrize("way, activation", each_once(COMPILED, (None, "gelu")))
def test_transforms_compile_as_torchs(way, activation, layers):
    """In one graph; the op in ATen takes their place."""
    ours, plain, x = layers
    torch.compiler.reset()
    got = tensors_of(torch.compile(COMPILED[way](ours), backend="aot_eager", fullgraph=True)(x.detach()))
    for g, e in zip(got, tensors_of(COMPILED[way](plain)(x.detach())), strict=True):
        bounds.check_rearranged(g.detach(), e.detach())


# ----- of what convert made ---------------------------------------------------------------


def converted(generator, policy="float32"):
    """A converted model, the plain one, of the same parameters, and x."""
    plain = nn.Sequential(nn.Linear(K, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.GELU(), nn.Linear(8, N))
    with torch.no_grad():
        for p in plain.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / 2)
    return convert(copy.deepcopy(plain), policy), plain, torch.randn(M, K, generator=generator, requires_grad=True)


@pytest.mark.parametrize("way", WAYS)
def test_gradients_by_vmap_of_converted_models_are_torchs(way, generator):
    ours, plain, x = converted(generator)
    got, expected = (tensors_of(WAYS[way](model, x)) for model in (ours, plain))
    for g, e in zip(got, expected, strict=True):
        bounds.check_rearranged(g.detach(), e.detach())


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "bfloat16"])
def test_vmap_of_a_converted_model_is_the_model(policy, generator):
    """Of what lies between its layers, too, which is narrow inside and wide outside."""
    model, _, x = converted(generator, policy)
    x = x.detach().to(model[0].weight.dtype)
    out = vmap(model)(x)
    assert out.dtype == model(x).dtype
    assert same_bits(out, model(x))
