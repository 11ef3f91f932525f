# SPDX-License-Identifier: Apache-2.0
"""Layers whose policy computes in eight bits, or keeps in them what backward needs: values, gradients, bytes, where it runs."""

import copy
import math

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import mpkernels as mpk
from mpkernels.nn.convert import report
from mpkernels.ops.linear_act import Activation, activation_of
from mpkernels.ops.linear_act.epilogues import activation_backward
from mpkernels.ops.quantize import reference
from tests import bounds
from tests.linear_act_cases import same_bits

bf16, f16, f32, e4m3, e5m2 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2
ROW, HYBRID, SAVED = "mixed_float8", "mixed_float8_hybrid", "mixed_bfloat16,saved=float8_e4m3fn"
POLICIES = (ROW, HYBRID, "mixed_float8,scaling=tensor,wgrad=float32,grad=float32", "param=float32,compute=float8_e5m2")
ACTIVATIONS = (None, "relu", "relu2", "gelu", "gelu_tanh", "silu")


def decoded(x, dtype, axis, policy):
    """q * scale as the reference has them: exact in bf16."""
    q, scale = reference.quantize(x.detach(), dtype, axis if policy.scaling == "row" else None)
    return (q * scale).to(bf16)


def run(layer, x, grad_out):
    """(out, grad_x, grad_weight, grad_bias) of a call."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    out = layer(x)
    out.backward(grad_out)
    return out.detach(), x.grad, layer.weight.grad, None if layer.bias is None else layer.bias.grad


@pytest.mark.usefixtures("by_eager_and_auto")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("text", POLICIES)
def test_float8_layer_matches_reference(text, activation, generator):
    """out and grad_x within bound 1 of the exact sums of what quantize makes of operands; grad_weight as in 16 bits."""
    policy, code = mpk.Policy.parse(text), activation_of(activation)
    for M, N, K, dtype in ((33, 48, 64, f32), (5, 7, 130, f16), (64, 3, 17, bf16)):
        layer = mpk.MPLinear(K, N, activation=activation, policy=text)
        x, grad_out = torch.randn(M, K, generator=generator).to(dtype), torch.randn(M, N, generator=generator).to(dtype)
        out, grad_x, grad_weight, grad_bias = run(layer, x, grad_out)
        assert (out.dtype, grad_x.dtype, grad_weight.dtype, grad_bias.dtype) == (dtype, dtype, f32, f32)
        q_x = decoded(x, policy.compute_dtype, -1, policy)
        bounds.check_forward(out, q_x, decoded(layer.weight, policy.compute_dtype, 1, policy), layer.bias.detach(), code, bf16)
        grad_z = grad_out
        if code == Activation.RELU:
            grad_z = torch.where(out > 0, grad_out, 0)
        elif code != Activation.NONE:
            z = mpk.functional.linear_act(x, layer.weight, layer.bias, policy=f"{text},output=bfloat16").detach()
            grad_z = activation_backward(code, z, grad_out, bf16)
        q_grad = decoded(grad_z, policy.dgrad_dtype, -1, policy)
        q_weight = decoded(layer.weight, policy.compute_dtype, 0, policy)
        bounds.check_forward(grad_x, q_grad, q_weight.t(), None, Activation.NONE, bf16)
        wgrad = policy.wgrad_dtype
        bounds.check_backward((None, grad_weight, grad_bias), grad_z, q_x.to(wgrad), layer.weight.detach(), None, wgrad)


@pytest.mark.parametrize("leading", [(), (3,), (2, 0, 3), (2, 3)])
@pytest.mark.parametrize("text", POLICIES[:2])
def test_float8_layer_leading_dimensions(text, leading, generator):
    layer = mpk.MPLinear(12, 5, activation="relu", policy=text)
    x, grad_out = torch.randn(*leading, 12, generator=generator), torch.randn(*leading, 5, generator=generator)
    grads = run(layer, x, grad_out)
    flat = run(layer, x.reshape(-1, 12), grad_out.reshape(-1, 5))
    for got, expected in zip(grads, flat, strict=True):
        assert same_bits(got.reshape(expected.shape), expected)


def test_float8_small_gradients_arrive(generator):
    """Of 1e-8 an fp32 weight gradient is that of the 16-bit product, to the rounding of x alone."""
    layer, x = mpk.MPLinear(64, 48, bias=False, policy=ROW), torch.randn(32, 64, generator=generator)
    grad_out = torch.full((32, 48), 1e-8)
    _, grad_x, grad_weight, _ = run(layer, x, grad_out)
    exact = grad_out.double().T @ x.double()
    assert (grad_weight - exact).norm() <= 2.0**-4 * exact.norm()
    assert (grad_x - grad_out.double() @ layer.weight.double()).norm() <= 2.0**-3 * grad_x.norm()


def test_float8_one_scale_is_that_of_the_tensor(generator):
    """Under it a row that is small beside another becomes 0, in every operand; with a scale of its own it does not."""
    spread = torch.tensor([[1.0], [1e-12]])
    x, grad_out = torch.randn(2, 24, generator=generator) * spread, torch.randn(2, 2, generator=generator) * spread
    for text, is_zero in ((ROW, False), (HYBRID, True)):
        layer = mpk.MPLinear(24, 2, bias=False, policy=text)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(2, 24, generator=generator) * spread)
        out, grad_x, grad_weight, _ = run(layer, x, grad_out)
        assert out[0, 0] != 0
        assert [(t == 0).all().item() for t in (out[1, 0], out[0, 1], grad_x[1])] == [is_zero] * 3
        assert torch.equal(grad_weight[1] == 0, torch.zeros(24, dtype=torch.bool))  # grad_out is in bf16 there


def test_float8_bias_gradient_has_its_own_dtype():
    x, weight = torch.ones(3, 8, dtype=f16), torch.ones(4, 8, dtype=f16, requires_grad=True)
    bias = torch.zeros(4, requires_grad=True)
    mpk.functional.linear_act(x, weight, bias, policy=f"{ROW},output=float32").backward(torch.full((3, 4), 1e-9))
    assert (weight.grad.dtype, bias.grad.dtype) == (f16, f32)
    assert torch.equal(bias.grad, torch.full((3, 4), 1e-9).sum(0))  # one rounding in any order


@pytest.mark.parametrize("where", ["x", "weight", "grad_out"])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_float8_not_finite_stays_visible(where, bad, activation, generator):
    layer, x = mpk.MPLinear(24, 16, activation=activation, policy=ROW), torch.randn(8, 24, generator=generator)
    grad_out = torch.ones(8, 16)
    with torch.no_grad():
        {"x": x, "weight": layer.weight, "grad_out": grad_out}[where][3, 5] = bad
        layer.bias.fill_(10)  # so that a ReLU lets all of it through
    out, grad_x, grad_weight, _ = run(layer, x, grad_out)
    assert out.isnan().any() == (where != "grad_out")
    assert not grad_weight.isfinite().all() or where == "weight"
    assert grad_x.isnan().any() == (where != "x" or activation == "gelu")


def test_float8_overflow_skips_the_step_and_is_named(generator):
    model = mpk.convert(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), ROW)
    optimizer, scaler = mpk.optim.AdamW(model.named_parameters(), lr=0.1), mpk.GradScaler()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(6, 8, generator=generator)
    x[2, 3] = math.inf
    scaler.scale(model(x).square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.last_step_skipped
    assert "2.bias has 4 non-finite of 4" in scaler.overflow_report(optimizer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_float8_sequence_is_its_layers(generator):
    """No activation is narrowed between layers that quantize, and no backward is fused."""
    torch.manual_seed(0)
    mlp = mpk.MPMLP([24, 32, 16, 4], policy=ROW)
    layers = [module for module in mlp if isinstance(module, mpk.MPLinear)]
    x, grad_out = torch.randn(9, 24, generator=generator), torch.randn(9, 4, generator=generator)
    out = mlp(x)
    out.backward(grad_out)
    grads = [p.grad.clone() for p in mlp.parameters()]
    mlp.zero_grad()
    h = x
    for layer in layers:
        h = layer(h)
    h.backward(grad_out)
    assert same_bits(out, h)
    assert all(same_bits(a, p.grad) for a, p in zip(grads, mlp.parameters(), strict=True))


@pytest.mark.parametrize(
    "text, of_16_bits, activation",
    [
        (ROW, "mixed_bfloat16", nn.ReLU),
        (HYBRID, "mixed_bfloat16", nn.ReLU),
        ("mixed_float16,saved=float8_e4m3fn", "mixed_float16", nn.GELU),
    ],
)
def test_float8_trains_as_16_bits_do(text, of_16_bits, activation):
    """A regression, paired: the final loss of eight bits is at most a tenth above that of 16."""
    final = []
    for policy in (text, of_16_bits):
        torch.manual_seed(0)
        model = mpk.convert(nn.Sequential(nn.Linear(16, 64), activation(), nn.Linear(64, 4)), policy)
        optimizer, scaler = mpk.optim.AdamW(model.named_parameters(), lr=3e-3), mpk.GradScaler()
        x = torch.randn(256, 16)
        y = torch.tanh(x @ torch.randn(16, 4) / 4)
        for _ in range(100):
            loss = nn.functional.mse_loss(model(x), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        final.append(loss.item())
    assert final[0] <= 1.1 * final[1]


# ----- what is kept ---------------------------------------------------------------


def kept_bytes(layer, x) -> int:
    """What backward holds besides the parameters, each tensor once."""
    kept, parameters = {}, {p.untyped_storage().data_ptr() for p in layer.parameters()}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = layer(x)
    assert out.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("K", [64, 512])
def test_float8_keeps_half_of_what_16_bits_keep(K, generator):
    x = torch.randn(128, K, generator=generator).requires_grad_()
    kept = {text: kept_bytes(mpk.MPLinear(K, 96, policy=text), x) for text in ("mixed_float16", *POLICIES)}
    assert kept["mixed_float16"] == 2 * 128 * K
    for text in POLICIES:
        assert kept[text] <= 0.55 * kept["mixed_float16"], text


@pytest.mark.parametrize("text", [*POLICIES, "mixed_float16,saved=float8_e4m3fn"])
def test_float8_keeps_an_x_for_each_that_reads_it(text, generator):
    """Of one in 16 bits that three linears read more than 16 bits keep, and half of that where one linear reads it."""
    x = torch.randn(128, 64, generator=generator).to(f16).requires_grad_()

    def kept(policy, count, N):
        layers = nn.ModuleList(mpk.MPLinear(64, N, policy=policy) for _ in range(count))
        layers.forward = lambda x: torch.cat([layer(x) for layer in layers], 1)
        return kept_bytes(layers, x)

    of_16_bits = kept("mixed_float16", 3, 8)
    assert kept("mixed_float16", 1, 24) == of_16_bits == 2 * 128 * 64
    assert kept(text, 3, 8) > 1.4 * of_16_bits
    assert kept(text, 1, 24) <= 0.55 * of_16_bits


def test_float8_relu_keeps_a_bit(generator):
    x = torch.randn(128, 64, generator=generator).requires_grad_()
    plain, relu = (kept_bytes(mpk.MPLinear(64, 256, activation=a, policy=ROW), x) for a in (None, "relu"))
    assert relu - plain == 128 * 256 // 8


def test_float8_keeps_what_is_wanted(generator):
    x = torch.randn(8, 64, generator=generator).requires_grad_()
    layer = mpk.MPLinear(64, 32, policy=ROW).requires_grad_(False)
    assert kept_bytes(layer, x) == 0
    (grad_x,) = torch.autograd.grad(layer(x).sum(), x)
    assert grad_x.shape == x.shape
    layer.bias.requires_grad_()
    layer(x.detach()).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((32,), 8.0))


# ----- where it runs ---------------------------------------------------------------


@pytest.mark.parametrize("text", [ROW, HYBRID, SAVED])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_float8_compiles(text, activation, generator):
    layer = mpk.MPLinear(24, 16, activation=activation, policy=text)
    torch._dynamo.reset()  # which counts how often the forward of layers was compiled
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (5, 9):
        x, grad_out = torch.randn(rows, 24, generator=generator), torch.randn(rows, 16, generator=generator)
        assert all(same_bits(a, b) for a, b in zip(run(compiled, x, grad_out), run(layer, x, grad_out), strict=True))


@pytest.mark.parametrize("text", [ROW, SAVED])
@pytest.mark.parametrize("strict", [False, True])
def test_float8_exports_and_traces(strict, text, generator):
    layer, x = mpk.MPLinear(24, 16, activation="relu", policy=text), torch.randn(5, 24, generator=generator)
    exported = torch.export.export(layer, (x,), strict=strict).module()
    assert same_bits(exported(2 * x), layer(2 * x))
    if not strict:
        assert same_bits(torch.jit.trace(layer, (x,))(2 * x), layer(2 * x))
        assert same_bits(torch.fx.symbolic_trace(layer)(2 * x), layer(2 * x))


@pytest.mark.parametrize("text", [ROW, SAVED])
def test_float8_under_transforms(text, generator):
    layer, x = mpk.MPLinear(24, 16, activation="gelu", policy=text), torch.randn(5, 24, generator=generator)
    parameters = dict(layer.named_parameters())
    loss = lambda p, x: torch.func.functional_call(layer, p, (x,)).square().sum()
    grads = torch.func.grad(loss)(parameters, x)
    loss(parameters, x).backward()
    assert all(same_bits(grads[name], p.grad) for name, p in layer.named_parameters())
    samples = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i in range(5):
        one = torch.func.grad(loss)(parameters, x[i])
        assert all(torch.allclose(samples[name][i], one[name]) for name in parameters)
    eye = torch.eye(16).unsqueeze(1).expand(16, 5, 16)
    x.requires_grad_()
    batched = torch.autograd.grad(layer(x), x, eye, is_grads_batched=True)[0]
    assert same_bits(batched[3], torch.autograd.grad(layer(x), x, eye[3])[0])


def test_float8_refuses_a_second_derivative(generator):
    layer, x = mpk.MPLinear(24, 16, policy=ROW), torch.randn(5, 24, generator=generator).requires_grad_()
    (grad_x,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad_x.sum().backward()


def test_float8_under_autocast(generator):
    layer, x = mpk.MPLinear(24, 16, policy=ROW), torch.randn(5, 24, generator=generator)
    with torch.autocast("cpu", dtype=bf16):
        out = layer(x)
    assert same_bits(out, mpk.functional.linear_act(x, layer.weight, layer.bias, policy=f"{ROW},output=bfloat16"))


def test_float8_jagged_rows(generator):
    layer, rows = mpk.MPLinear(24, 16, policy=ROW), [torch.randn(n, 24, generator=generator) for n in (3, 5)]
    out = layer(torch.nested.nested_tensor(rows, layout=torch.jagged))
    assert same_bits(out.values(), layer(torch.cat(rows)))


@pytest.mark.parametrize("rows", [1, 7])
def test_float8_batch_invariant(rows, generator):
    layer, x = mpk.MPLinear(200, 16, policy=f"{ROW},batch_invariant"), torch.randn(70, 200, generator=generator)
    assert same_bits(layer(x[:rows]), layer(x)[:rows])


def test_float8_has_no_copies(generator):
    """Nothing is kept of a weight from call to call: not by an optimizer, nor in the state_dict, nor in cached_weights."""
    model = mpk.convert(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), {"*": ROW, "2": "mixed_bfloat16"})
    assert list(model.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    optimizer, x = mpk.optim.AdamW(model.named_parameters()), torch.randn(6, 8, generator=generator)
    for _ in range(2):
        model(x).sum().backward()
        optimizer.step()
    assert [copy.tensor.shape for copy in mpk.runtime.compute_copy.of_model(model)] == [(4, 16)]
    with mpk.cached_weights(model.eval()), torch.no_grad():
        before = model(x)
        assert same_bits(before, model(x))
    assert same_bits(before, model(x))
    assert str(mpk.convert_report(model)).count(ROW) == 1
    again = copy.deepcopy(model)
    assert same_bits(again(x), model(x))


def test_float8_rows_of_x_end_before_fp32():
    """As docs/formats.md says: x's scale multiplies the sum first. Below that end nothing overflows that bf16 has."""
    K = 1024
    end = 2.0**128 / (448 * K)
    assert f"{end:.1e}" == "7.4e+32"
    x, weight = torch.ones(1, K), torch.full((4, K), 0.4375)  # 448 times its scale
    for size, reached in ((0.9 * end, True), (2 * end, False)):
        out = mpk.functional.linear_act(x * size, weight, policy=ROW)
        assert out.isfinite().all() == reached
        assert mpk.functional.linear_act(x * size, weight, policy="mixed_bfloat16").isfinite().all()


def test_float8_convert_refuses_float64():
    """As the first forward would; 16 bits of float64 parameters work."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8).double())
    with pytest.raises(ValueError, match=r"^1 has float64 parameters, which policy mixed_float8 cannot quantize"):
        mpk.convert(model, ROW)
    assert {type(module) for module in model} == {nn.Linear}
    assert mpk.convert(model, {"*": ROW, "1": "mixed_float16"}) is model
    assert mpk.convert(model.float(), ROW) is model


def test_float8_refuses():
    x, weight = torch.ones(3, 8), torch.ones(4, 8)
    with pytest.raises(RuntimeError, match="quantizes the weight itself and takes no weight_copy"):
        mpk.functional.linear_act(x, weight, policy=ROW, weight_copy=weight.to(bf16))
    with pytest.raises(RuntimeError, match=r"x must be float16, bfloat16 or float32, got torch.float64"):
        mpk.functional.linear_act(x.double(), weight, policy=ROW)
    with pytest.raises(RuntimeError, match="x has last dimension 8, weight expects 7"):
        mpk.functional.linear_act(x, weight[:, :7], policy=ROW)
    with pytest.raises(
        RuntimeError, match=r"x must be a dense strided tensor, got nested; a nested x may have layout=torch.jagged"
    ):
        mpk.functional.linear_act(torch.nested.nested_tensor([x, x]), weight, policy=ROW)
    with pytest.raises(RuntimeError, match="bias must have shape"):
        mpk.functional.linear_act(x, weight, torch.ones(3), policy=ROW)


# ----- what convert_report says ---------------------------------------------------------------


def test_float8_report_on_what_emulates():
    model = mpk.convert(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)), {"*": ROW, "1": "float32"})
    assert str(mpk.convert_report(model)).splitlines()[-1] == (
        "8-bit operands: cpu decodes them and multiplies in more bits, which saves memory and takes no less time"
    )
    assert "8-bit operands" not in str(mpk.convert_report(mpk.convert(model, "mixed_float16")))


@pytest.mark.parametrize(
    "K, N, text, is_small",
    [
        (1024, 8192, ROW, True), (8192, 2048, ROW, True), (2048, 4096, ROW, True), (4096, 4096, ROW, False),
        (2048, 8192, ROW, False), (512, 512, HYBRID, False), (512, 512, "mixed_float16", False),
    ],
)  # fmt: skip
def test_float8_report_on_what_multiplies(K, N, text, is_small, monkeypatch):
    monkeypatch.setattr(report, "multiplies_in_8_bits", lambda device: True)
    with torch.device("meta"):
        model = mpk.convert(nn.Sequential(nn.Linear(K, N)), text)
        transposed = mpk.convert(nn.Sequential(Conv1D(N, K)), text)
    for each in (model, transposed):
        (row,) = mpk.convert_report(each)
        assert (f"{K} x {N}: below the sizes at which 8 bits pay on an H100" in row.note) == is_small
        assert "8-bit operands" not in str(mpk.convert_report(each))


@pytest.mark.parametrize("capability, multiplies", [((7, 5), False), ((8, 6), False), ((8, 9), True), ((9, 0), True)])
def test_float8_report_asks_the_gpu(capability, multiplies, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert report.multiplies_in_8_bits(torch.device("cuda")) == (multiplies and torch.version.hip is None)
    assert not report.multiplies_in_8_bits(torch.device("cpu"))
