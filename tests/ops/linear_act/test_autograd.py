# SPDX-License-Identifier: Apache-2.0
"""linear_act under autograd, torch.func, torch.compile and torch.library's own checks."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from mpkernels.ops.linear_act import Activation, autograd, linear_act, reference
from tests import bounds
from tests.levels import each_once
from tests.linear_act_cases import DTYPES, Case, Dtypes, backward, bf16, f16, f32, f64, forward, same_bits

NONE, RELU = Activation.NONE, Activation.RELU
by_dtypes = pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES.keys())


def call(x, weight, bias, dtypes: Dtypes, activation=RELU):
    return linear_act(
        x, weight, bias, activation=activation, compute_dtype=dtypes.compute, out_dtype=dtypes.out, grad_dtype=dtypes.grad
    )


def leaves(case, generator, device):
    """x, weight, bias that require gradients, in the dtypes of the case, and grad_out."""
    x, weight, bias, grad_out = case.tensors(generator, device)
    for tensor in (x, weight, bias):
        tensor.requires_grad_()
    for tensor in (weight, bias):
        tensor.grad_dtype = case.dtypes.grad
    return x, weight, bias, grad_out


# ----- reference ---------------------------------------------------------------


@pytest.mark.parametrize("activation", [NONE, RELU])
def test_linear_act_reference_is_torchs_fp64(activation, generator):
    """The formula in fp64 is F.linear and its autograd, up to the order of the sums."""
    x, weight, bias, grad_out = leaves(Case(9, 12, 31, DTYPES["float64"]), generator, "cpu")
    out = F.linear(x, weight, bias)
    out = out.relu() if activation else out
    expected = reference.linear_act(x, weight, bias, activation, f64)
    bounds.check_forward(expected, x, weight, bias, activation, f64)
    bounds.check_forward(out, x, weight, bias, activation, f64)
    positive = out > 0 if activation else None
    bounds.check_backward(reference.linear_act_backward(grad_out, x, weight, positive, f64), grad_out, x, weight, positive, f64)
    grads = torch.autograd.grad(out, (x, weight, bias), grad_out)
    bounds.check_backward(grads, grad_out, x, weight, positive, f64)


@pytest.mark.parametrize("compute", [f16, bf16], ids=["fp16", "bf16"])
def test_linear_act_reference_rounds_operands_once(compute, generator):
    x, weight, bias, _ = Case(9, 12, 31, Dtypes(f64, f64, compute, f64, f64)).tensors(generator)
    above_middle = 1 + bounds.unit_roundoff(compute) + 2.0**-40
    x[0, 0] = weight[0, 0] = above_middle
    bounds.check_forward(reference.linear_act(x, weight, bias, RELU, compute), x, weight, bias, RELU, compute)


# ----- gradients ---------------------------------------------------------------


@pytest.mark.parametrize("activation", Activation)
def test_linear_act_gradcheck(activation, generator, device):
    x, weight, bias, _ = leaves(Case(5, 4, 6, DTYPES["float64"], lead=(1, 5)), generator, device)
    function = lambda *args: call(*args, DTYPES["float64"], activation)
    assert torch.autograd.gradcheck(function, (x, weight, bias))
    assert torch.autograd.gradcheck(lambda x, w: function(x, w, None), (x, weight))


@by_dtypes
@pytest.mark.parametrize("activation", [NONE, RELU])
def test_linear_act_gradients(dtypes, activation, generator, device):
    """Autograd delivers the op's gradients unchanged, each in its own dtype."""
    x, weight, bias, grad_out = leaves(Case(15, 37, 41, dtypes, lead=(3, 5)), generator, device)
    out = call(x, weight, bias, dtypes, activation)
    out.backward(grad_out)
    _, saved, x_compute = forward(x.detach(), weight.detach(), bias.detach(), dtypes, activation)
    operand = x_compute if x_compute.numel() else x.detach()
    expected = backward(grad_out, operand, weight.detach(), saved if activation else None, dtypes, activation)
    for tensor, grad in zip((x, weight, bias), expected, strict=True):
        assert same_bits(tensor.grad, grad)
    positive = ~(out <= 0) if activation else None
    v = bounds.accumulator_roundoff(device, dtypes.compute)
    bounds.check_backward((x.grad, weight.grad, bias.grad), grad_out, x, weight, positive, dtypes.compute, v, random_sign=True)


def test_linear_act_gradients_default_to_the_parameters_dtype(generator, device):
    x, weight, bias, _ = leaves(Case(4, 5, 6, DTYPES["mixed_float16"]), generator, device)
    out = linear_act(x, weight, bias, activation=RELU, compute_dtype=f16, out_dtype=f16)
    out.sum().backward()
    assert [t.grad.dtype for t in (x, weight, bias)] == [f32, f32, f32]


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_linear_act_gradients_of_what_requires_them(frozen, generator, device):
    tensors = leaves(Case(4, 33, 6), generator, device)
    expected = torch.autograd.grad(call(*tensors[:3], DTYPES["mixed_float16"]), tensors[:3], tensors[3])
    for index in frozen:
        tensors[index].requires_grad_(False)
    call(*tensors[:3], DTYPES["mixed_float16"]).backward(tensors[3])
    for index, (tensor, grad) in enumerate(zip(tensors[:3], expected, strict=True)):
        assert tensor.grad is None if index in frozen else same_bits(tensor.grad, grad)


def test_linear_act_gradients_of_an_expanded_sum(generator, device):
    """`sum().backward()` hands down a gradient of strides 0; twice through one graph adds up."""
    x, weight, bias, _ = leaves(Case(4, 33, 6, DTYPES["float32"]), generator, device)
    out = call(x, weight, bias, DTYPES["float32"])
    expected = torch.autograd.grad(out, (x, weight, bias), torch.ones_like(out), retain_graph=True)
    out.sum().backward(retain_graph=True)
    assert all(same_bits(t.grad, g) for t, g in zip((x, weight, bias), expected, strict=True))
    out.sum().backward()
    assert all(same_bits(t.grad, 2 * g) for t, g in zip((x, weight, bias), expected, strict=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_linear_act_without_gradients(mode, generator, device):
    x, weight, bias, _ = leaves(Case(4, 33, 6), generator, device)
    expected = call(x, weight, bias, DTYPES["mixed_float16"])
    with mode():
        out = call(x, weight, bias, DTYPES["mixed_float16"])
        same = call(x.clone(), weight, bias, DTYPES["mixed_float16"])
    assert not out.requires_grad
    assert same_bits(out, expected.detach())
    assert same_bits(same, expected.detach())


def test_linear_act_keeps_only_what_backward_needs(generator, device):
    """x for the weight's gradient, in compute dtype; the output for the mask, and nothing fp32 besides the weight."""
    x, weight, bias, _ = leaves(Case(16, 33, 8), generator, device)

    def kept(*args, activation=RELU):
        found = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append((tuple(t.shape), t.dtype)), lambda t: t):
            linear_act(*args, activation=activation, compute_dtype=f16, out_dtype=f16)
        return sorted(found, key=str)

    assert kept(x, weight, bias) == sorted([((16, 8), f16), ((33, 8), f32), ((16, 33), f16)], key=str)
    assert kept(x, weight, bias, activation=NONE) == sorted([((16, 8), f16), ((33, 8), f32)], key=str)
    assert kept(x, weight.detach(), bias) == sorted([((33, 8), f32), ((16, 33), f16)], key=str)


class NoGradient(torch.autograd.Function):
    """Passes its input on and no gradient back."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


def test_linear_act_of_an_output_without_a_gradient(generator, device):
    """None comes back, as from F.linear, and no zeros, which weight decay and a norm would take for a gradient."""
    for function in (lambda *args: call(*args, DTYPES["float32"], NONE), F.linear, lambda *args: by_the_op(*args)[0]):
        x, weight, bias, _ = leaves(Case(4, 5, 6, DTYPES["float32"]), generator, device)
        NoGradient.apply(function(x, weight, bias)).sum().backward()
        assert [t.grad for t in (x, weight, bias)] == [None] * 3


def by_the_op(x, weight, bias):
    return torch.ops.mpkernels.linear_act(x, weight, bias, None, int(Activation.GELU), f16, f32, 1)


def test_linear_act_other_outputs_have_no_gradient(generator, device):
    out, saved, x_compute = by_the_op(*leaves(Case(4, 5, 6), generator, device)[:3])
    assert saved.numel()
    assert x_compute.numel()
    assert [t.requires_grad for t in (out, saved, x_compute)] == [True, False, False]


@pytest.mark.parametrize("grad_dtype", [None, f16])
def test_linear_act_bias_gradient_is_rounded_to_its_own_dtype_alone(grad_dtype, device):
    """A bias wider than its weight: its gradient never goes through the weight's dtype, but for grad_dtype."""
    x, weight = (torch.zeros(s, dtype=f16, device=device, requires_grad=True) for s in ((3, 2), (1, 2)))
    bias = torch.zeros(1, device=device, requires_grad=True)
    bias.grad_dtype = grad_dtype or f32
    grad_out = torch.tensor([[1.0], [2.0**-12], [2.0**-13]], device=device)
    out = linear_act(x, weight, bias, activation=NONE, compute_dtype=f16, out_dtype=f32, grad_dtype=grad_dtype)
    out.backward(grad_out)
    assert bias.grad.dtype == (grad_dtype or f32)
    assert bias.grad.item() == (1.0 if grad_dtype else 1 + 2.0**-12 + 2.0**-13)


@pytest.mark.parametrize("write", [lambda t: t.mul_(2), torch.relu_, lambda t: t.add_(t)], ids=["mul", "relu", "add"])
@pytest.mark.parametrize("lead", [(), (4,), (2, 3)], ids=str)
def test_linear_act_output_may_be_changed_in_place(write, lead, generator, device):
    """Without an activation backward does not read `out`, and what follows a layer may work in place, as after nn.Linear."""
    x, weight, bias, _ = leaves(Case(1, 5, 6, DTYPES["float64"], lead=lead), generator, device)
    out = call(x, weight, bias, DTYPES["float64"], NONE)
    expected = torch.autograd.grad(write(out.clone()).sum(), (x, weight, bias), retain_graph=True)
    grads = torch.autograd.grad(write(out).sum(), (x, weight, bias))
    assert all(same_bits(a, b) for a, b in zip(grads, expected, strict=True))


@pytest.mark.parametrize("changed", ["x", "weight", "out"])
def test_linear_act_changed_before_backward_raises(changed, generator, device):
    """A saved tensor that is written in place before backward is an error, never a wrong gradient."""
    x, weight, bias, _ = leaves(Case(4, 5, 6, DTYPES["float32"]), generator, device)
    out = call(x, weight, bias, DTYPES["float32"])
    with torch.no_grad():
        {"x": x, "weight": weight, "out": out}[changed].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_linear_act_changed_x_does_not_matter_where_it_was_cast(generator, device):
    """backward reads the cast that the forward kept."""
    x, weight, bias, grad_out = leaves(Case(4, 5, 6), generator, device)
    expected = torch.autograd.grad(call(x, weight, bias, DTYPES["mixed_float16"]), (x, weight, bias), grad_out)
    out = call(x, weight, bias, DTYPES["mixed_float16"])
    with torch.no_grad():
        x.zero_()
    grads = torch.autograd.grad(out, (x, weight, bias), grad_out)
    assert all(same_bits(a, b) for a, b in zip(grads, expected, strict=True))


# ----- torch.library, torch.compile ---------------------------------------------------------------


@pytest.mark.parametrize("name, save", each_once(("float32", "mixed_float16", "bfloat16", "fp64 to bf16"), (0, 1)))
def test_linear_act_opcheck(name, save, generator, device):
    dtypes = DTYPES[name]
    for activation in Activation if save else (NONE, RELU):
        x, weight, bias, _ = Case(6, 37, 9, dtypes, lead=(2, 3)).tensors(generator, device)
        for tensor in (x, weight, bias):
            tensor.requires_grad_()
        for maybe_bias in (bias, None):
            args = (x, weight, maybe_bias, None, int(activation), dtypes.compute, dtypes.out, save, False, None)
            torch.library.opcheck(torch.ops.mpkernels.linear_act.default, args)


MASKS = ((True, True, True), (True, False, False), (False, True, True))


@pytest.mark.parametrize("name, output_mask", each_once(("float32", "mixed_float16", "bfloat16", "fp64 to bf16"), MASKS))
def test_linear_act_backward_opcheck(name, output_mask, generator, device):
    dtypes = DTYPES[name]
    x, weight, bias, grad_out = Case(6, 37, 9, dtypes).tensors(generator, device)
    out, saved, x_compute = forward(x, weight, bias, dtypes)
    operand = x_compute if x_compute.numel() else x
    for selector, activation in ((saved, 1), (out, 1), (None, 0)):
        args = (grad_out, operand, weight, None, selector, activation, dtypes.compute, dtypes.x, dtypes.grad, dtypes.grad)
        torch.library.opcheck(torch.ops.mpkernels.linear_act_backward.default, (*args, list(output_mask)))


@pytest.mark.parametrize(
    "name, dynamic, activation", [*each_once(DTYPES, (False, True), (RELU,)), ("mixed_float16", False, Activation.GELU)]
)
def test_linear_act_compiles(name, dynamic, activation, generator, device):
    """One graph, forward and backward, with the bits of eager."""
    dtypes = DTYPES[name]
    function = lambda *args: call(*args, dtypes, activation)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    torch.compiler.reset()
    for M in (4, 7):
        x, weight, bias, grad_out = leaves(Case(M, 5, 6, dtypes), generator, device)
        out = compiled(x, weight, bias)
        expected = call(x, weight, bias, dtypes, activation)
        assert same_bits(out.detach(), expected.detach())
        grads = torch.autograd.grad(out, (x, weight, bias), grad_out)
        for grad, eager in zip(grads, torch.autograd.grad(expected, (x, weight, bias), grad_out), strict=True):
            if dtypes.weight.itemsize < dtypes.grad.itemsize:  # AOTAutograd knows no Tensor.grad_dtype: 16-bit on the way
                eager = eager.to(dtypes.weight).to(eager.dtype)
            assert same_bits(grad, eager)


def test_linear_act_exports(generator):
    class Model(torch.nn.Module):
        def forward(self, x, weight, bias):
            return call(x, weight, bias, DTYPES["mixed_float16"])

    x, weight, bias, _ = Case(4, 5, 6).tensors(generator)
    exported = torch.export.export(Model(), (x, weight, bias))
    assert same_bits(exported.module()(x, weight, bias), call(x, weight, bias, DTYPES["mixed_float16"]))


# ----- torch.func ---------------------------------------------------------------

MIXED = [DTYPES["float32"], DTYPES["mixed_float16"], DTYPES["mixed_bfloat16 inside"]]
by_mixed = pytest.mark.parametrize("dtypes", MIXED, ids=["float32", "mixed_float16", "mixed_bfloat16 inside"])


@by_mixed
def test_linear_act_func_grad(dtypes, generator, device):
    x, weight, bias, _ = Case(4, 33, 6, dtypes).tensors(generator, device)
    loss = lambda x, weight, bias: call(x, weight, bias, dtypes).float().square().sum()
    grads = torch.func.grad(loss, argnums=(0, 1, 2))(x, weight, bias)
    leaf = [t.clone().requires_grad_() for t in (x, weight, bias)]
    for grad, expected in zip(grads, torch.autograd.grad(loss(*leaf), leaf), strict=True):
        assert same_bits(grad, expected)


@by_mixed
@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize(
    "in_dims", [(0, None, None), (1, None, None), (2, None, None), (None, 0, None), (None, None, 0), (0, 0, 0), (1, 2, 1)]
)
def test_linear_act_vmap(dtypes, activation, in_dims, generator, device):
    x, weight, bias, _ = Case(4, 33, 6, dtypes).tensors(generator, device)
    stacked = [
        t if dim is None else torch.stack([t, -t, t * 2], dim) for t, dim in zip((x, weight, bias), in_dims, strict=True)
    ]
    function = lambda *args: call(*args, dtypes, activation)
    out = torch.func.vmap(function, in_dims)(*stacked)
    for i in range(3):
        sample = [t if dim is None else t.select(dim, i) for t, dim in zip(stacked, in_dims, strict=True)]
        v = bounds.accumulator_roundoff(device, dtypes.compute)
        bounds.check_forward(out[i], *sample, activation, dtypes.compute, v, random_sign=True)


@by_mixed
def test_linear_act_vmap_nested_and_single_rows(dtypes, generator, device):
    x, weight, bias, _ = Case(24, 33, 6, dtypes, lead=(2, 3, 4)).tensors(generator, device)
    function = lambda x: call(x, weight, bias, dtypes)
    out = torch.func.vmap(torch.func.vmap(torch.func.vmap(function)), 1)(x)
    v = bounds.accumulator_roundoff(device, dtypes.compute)
    bounds.check_forward(out, x.transpose(0, 1), weight, bias, RELU, dtypes.compute, v, random_sign=True)


@by_mixed
@pytest.mark.parametrize("activation", [NONE, RELU])
def test_linear_act_per_sample_gradients(dtypes, activation, generator, device):
    x, weight, bias, grad_out = Case(12, 33, 6, dtypes, lead=(3, 4)).tensors(generator, device)

    def loss(weight, bias, x, grad_out):
        return (call(x, weight, bias, dtypes, activation).double() * grad_out.double()).sum()

    gradients = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)), (None, None, 0, 0))(weight, bias, x, grad_out)
    for i in range(3):
        grad_weight, grad_bias, grad_x = (g[i] for g in gradients)
        positive = ~(call(x[i], weight, bias, dtypes) <= 0) if activation else None
        v = bounds.accumulator_roundoff(device, dtypes.compute)
        bounds.check_backward((grad_x, grad_weight, grad_bias), grad_out[i], x[i], weight, positive, dtypes.compute, v, True)


def test_linear_act_jacobian(generator, device):
    x, weight, bias, _ = Case(2, 3, 4, DTYPES["float64"]).tensors(generator, device)
    jacobian = torch.func.jacrev(lambda x: call(x, weight, bias, DTYPES["float64"], NONE))(x)
    expected = torch.einsum("mp,nk->mnpk", torch.eye(2, dtype=f64, device=device), weight)
    assert torch.equal(jacobian, expected)


def test_linear_act_forward_mode_raises(generator, device):
    """Never a silent zero: both torch.func.jvp and dual numbers are refused."""
    x, weight, bias, _ = Case(2, 3, 4, DTYPES["float32"]).tensors(generator, device)
    function = lambda x: call(x, weight, bias, DTYPES["float32"])
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(function, (x,), (x,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="jvp"):
        function(torch.autograd.forward_ad.make_dual(x, x))


def test_linear_act_op_has_a_gradient_for_each_argument(monkeypatch):
    """No more and no less: torch 2.14 counts them."""
    arguments = len(torch.ops.mpkernels.linear_act.default._schema.arguments)
    monkeypatch.setattr(autograd, "_grads", lambda *_: (None,) * 4)
    ctx = SimpleNamespace(is_scaled=False, needs_input_grad=(False,) * (arguments + 1))
    assert len(autograd._backward(ctx, None, None, None)) == arguments
