# SPDX-License-Identifier: Apache-2.0
"""Tests of MPLinear: a drop-in nn.Linear, in the dtypes of its policy, with a fused activation."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import mpkernels as mpk
from tests import bounds

POLICIES = ("float64", "float32", "mixed_float32", "mixed_float16", "mixed_bfloat16", "float16", "bfloat16")


# ----- a drop-in for nn.Linear ----------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("policy", [None, *POLICIES])
def test_is_an_nn_linear_with_its_keys(policy, bias):
    layer = mpk.MPLinear(3, 4, bias, policy=policy, activation="relu")
    assert isinstance(layer, nn.Linear)
    assert list(layer.state_dict()) == ["weight", "bias"][: 1 + bias]
    assert list(dict(layer.named_parameters())) == ["weight", "bias"][: 1 + bias]
    assert not list(layer.named_buffers())
    plain = nn.Linear(3, 4, bias, dtype=layer.weight.dtype)
    plain.load_state_dict(layer.state_dict())
    layer.load_state_dict(plain.state_dict())


def test_starts_as_nn_linear_does():
    layers = []
    for make in (nn.Linear, mpk.MPLinear):
        torch.manual_seed(0)
        layers.append(make(7, 5))
    assert all(torch.equal(a, b) for a, b in zip(*(layer.parameters() for layer in layers), strict=True))


def test_nested_autocast_behaves_as_nn_linear():
    """fp16, disabled inside of it, bf16 inside of that, and out again; with a policy of its own autocast does not count.

    Without torch's cache of casts: it gives the fp16 weight to the bf16 region, and `F.linear` raises there.
    """
    plain = nn.Linear(5, 4)
    layers, x, seen = (plain, mpk.MPLinear.from_linear(plain)), torch.ones(3, 5), []
    fixed = mpk.MPLinear.from_linear(plain, policy="mixed_float16,output=float32")

    def look():
        dtypes = [layer(x).dtype for layer in layers]
        assert dtypes[0] == dtypes[1]
        assert fixed(x).dtype == torch.float32
        seen.append(dtypes[0])

    with torch.autocast("cpu", torch.float16, cache_enabled=False):
        look()
        with torch.autocast("cpu", enabled=False, cache_enabled=False):
            look()
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                look()
            look()
        look()
    look()
    assert seen == [torch.float16, torch.float32, torch.bfloat16, torch.float32, torch.float16, torch.float32]


def test_from_linear_shares_parameters_and_hooks_see_calls():
    plain = nn.Linear(3, 4).eval()
    layer = mpk.MPLinear.from_linear(plain, activation="relu", policy="mixed_float16")
    assert layer.weight is plain.weight
    assert layer.bias is plain.bias
    assert not layer.training
    assert mpk.MPLinear.from_linear(nn.Linear(3, 4, bias=False)).bias is None
    seen = []
    layer.register_forward_pre_hook(lambda module, args: seen.append("before"))
    layer.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    layer.register_full_backward_hook(lambda module, grads_in, grads_out: seen.append(grads_in[0].shape))
    layer(torch.ones(2, 3, requires_grad=True)).sum().backward()
    assert seen == ["before", torch.float32, (2, 3)]


def test_from_linear_keeps_what_an_mplinear_has():
    layer = mpk.MPLinear(3, 4, activation="gelu", policy="mixed_bfloat16")
    same = mpk.MPLinear.from_linear(layer)
    assert (same.activation, same.policy) == (layer.activation, layer.policy)
    other = mpk.MPLinear.from_linear(layer, activation="silu", policy="mixed_float16")
    assert (other.activation, str(other.policy)) == ("silu", "mixed_float16")


def test_from_linear_of_a_lazy_linear_says_what_to_do():
    lazy = nn.LazyLinear(4)
    with pytest.raises(TypeError, match="a LazyLinear has no weight yet: call it, or its model, once before"):
        mpk.MPLinear.from_linear(lazy)
    lazy(torch.ones(2, 3))
    assert mpk.MPLinear.from_linear(lazy).in_features == 3


def test_from_linear_refuses_what_it_cannot_stand_for():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    hooked, patched = nn.Linear(3, 4), nn.Linear(3, 4)
    hooked.register_forward_hook(lambda *args: None)
    patched.forward = lambda x: x
    for linear in (Doubled(3, 4), hooked, patched, nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.ReLU()):
        with pytest.raises(TypeError, match=r"expected an nn[.]Linear or MPLinear without hooks"):
            mpk.MPLinear.from_linear(linear)


def test_default_policy():
    assert mpk.MPLinear(3, 4).policy is None
    with mpk.default_policy("mixed_bfloat16"):
        assert mpk.MPLinear(3, 4).policy == mpk.Policy.parse("mixed_bfloat16")
        assert mpk.MPLinear(3, 4, policy="float16").weight.dtype == torch.float16
        assert mpk.MPLinear.from_linear(nn.Linear(3, 4)).policy == mpk.get_default_policy()


def test_extra_repr():
    layer = mpk.MPLinear(3, 4, activation="relu", policy="mixed_float16,grad=float16")
    assert repr(layer) == (
        "MPLinear(in_features=3, out_features=4, bias=True, activation=relu, policy=mixed_float16,grad=float16)"
    )


@pytest.mark.parametrize("policy", [None, "mixed_float16"])
def test_meta_device(policy):
    layer = mpk.MPLinear(3, 4, device="meta", policy=policy)
    out = layer(torch.ones(2, 3, device="meta"))
    assert (out.shape, out.dtype, out.device.type) == ((2, 4), torch.float32, "meta")
    filled = layer.to_empty(device="cpu")
    assert filled(torch.ones(2, 3)).shape == (2, 4)


# ----- policies ----------------------------------------------------------------------


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("policy", POLICIES)
def test_policy_dtypes_and_values(policy, activation, generator):
    policy = mpk.Policy.parse(policy)
    layer = mpk.MPLinear(17, 9, policy=policy, activation=activation)
    assert layer.weight.dtype == layer.bias.dtype == policy.param_dtype
    x = torch.randn(5, 17, generator=generator, dtype=torch.float64).to(policy.param_dtype).requires_grad_()
    out = layer(x)
    assert out.dtype == policy.param_dtype
    grad_out = torch.randn(5, 9, generator=generator, dtype=torch.float64).to(out.dtype)
    out.backward(grad_out)
    assert x.grad.dtype == layer.weight.grad.dtype == layer.bias.grad.dtype == policy.param_dtype
    arguments = (x.detach(), layer.weight.detach())
    bounds.check_forward(out.detach(), *arguments, layer.bias.detach(), activation == "relu", policy.compute_dtype)
    positive = out.detach() > 0 if activation else None
    grads = (x.grad, layer.weight.grad, layer.bias.grad)
    bounds.check_backward(grads, grad_out, *arguments, positive, policy.compute_dtype)


def gradient_of_weight(policy, size) -> torch.Tensor:
    """weight.grad where x is 1 and grad_out is `size` in float32."""
    layer = mpk.MPLinear(2, 2, policy=policy)
    layer(torch.ones(1, 2)).backward(torch.full((1, 2), size))
    return layer.weight.grad


def test_mixed_small_gradients_arrive_in_fp32():
    """1e-8 is below half of fp16's least number; a scaled loss puts it where fp16 holds grad_out, not the product."""
    layer = mpk.MPLinear(2, 2, policy="mixed_float16")
    layer(torch.full((1, 2), 1e-4)).backward(torch.full((1, 2), 1e-4))
    expected = torch.tensor(1e-4).half().double() ** 2
    assert torch.equal(layer.weight.grad, torch.full((2, 2), expected.item()))
    assert gradient_of_weight("mixed_float16", 2.0**-24).dtype == torch.float32
    assert (gradient_of_weight("mixed_float16", 2.0**-24) == 2.0**-24).all()


def test_accumulated_gradients_are_those_of_one_batch(generator):
    """64 micro-batches beside one batch of all rows: fp32 gradients lose nothing to fp16, fp16 gradients do."""
    x, grad_out = (torch.randn(64 * 8, columns, generator=generator) for columns in (33, 17))

    def check(policy):
        layer = mpk.MPLinear(33, 17, policy=policy)
        for part, grad in zip(x.split(8), grad_out.split(8), strict=True):
            layer(part).backward(grad)
        grads = (None, layer.weight.grad, layer.bias.grad)
        bounds.check_backward(grads, grad_out, x, layer.weight.detach(), None, torch.float16, random_sign=True)

    check("mixed_float16")
    with pytest.raises(AssertionError, match="grad_weight, bound 1"):
        check("mixed_float16,grad=float16")


def test_grad_dtype_halves_the_gradient():
    assert gradient_of_weight("mixed_float16,grad=float16", 1.0).dtype == torch.float16
    assert gradient_of_weight("mixed_bfloat16,grad=bfloat16", 1.0).dtype == torch.bfloat16
    assert gradient_of_weight("float16", 1.0).dtype == torch.float16
    assert gradient_of_weight("float16,grad=float32", 1.0).dtype == torch.float32


def test_grad_dtype_wide_gradient_of_a_narrow_weight_is_not_rounded():
    layer = mpk.MPLinear(1, 1, policy="float16,grad=float32")
    x = torch.tensor([[1.0], [2.0**-13]]).half()
    layer(x).backward(torch.ones(2, 1).half())
    assert layer.weight.grad.item() == 1 + 2.0**-13


def _by_flag(name):
    def renew(layer):
        flag = getattr(torch.__future__, f"get_{name}")()
        getattr(torch.__future__, f"set_{name}")(True)
        try:
            return layer.double().float()
        finally:
            getattr(torch.__future__, f"set_{name}")(flag)

    return renew


def _by_meta(layer):
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.to("meta").load_state_dict(state, assign=True)
    return layer.requires_grad_()


def _by_assignment(layer):
    layer.load_state_dict({name: value.clone() for name, value in layer.state_dict().items()}, assign=True)
    return layer


NEW_PARAMETERS = {
    "overwrite": _by_flag("overwrite_module_params_on_conversion"),
    "swap": _by_flag("swap_module_params_on_conversion"),
    "meta": _by_meta,
    "to_empty": lambda layer: layer.to("meta").to_empty(device="cpu"),
    "assign": _by_assignment,
}


@pytest.mark.parametrize("name", NEW_PARAMETERS)
@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_grad_dtype_survives_new_parameters(name, kind):
    """torch makes them without it, and gradients would silently be as wide as the parameters."""
    if kind == "Conv1D":
        layer = mpk.convert(
            nn.Sequential(pytest.importorskip("transformers.pytorch_utils").Conv1D(2, 2)), "mixed_float16,grad=float16"
        )[0]
    else:
        layer = mpk.MPLinear(2, 2, policy="mixed_float16,grad=float16")
    layer = NEW_PARAMETERS[name](layer)
    layer(torch.ones(1, 2)).sum().backward()
    assert layer.weight.grad.dtype == layer.bias.grad.dtype == torch.float16


def test_grad_dtype_goes_back():
    layer = mpk.MPLinear(2, 2, policy="mixed_float16,grad=float16")
    layer(torch.ones(1, 2)).sum().backward()
    layer.adopt(layer._activation, mpk.Policy.parse("mixed_float16"))
    assert layer.weight.grad is None, "torch refuses to change the dtype under a gradient"
    layer(torch.ones(1, 2)).sum().backward()
    assert layer.weight.grad.dtype == torch.float32


def test_relu_keeps_nan_and_selects():
    layer = mpk.MPLinear(2, 2, activation="relu", policy="float32")
    with torch.no_grad():
        layer.weight.copy_(torch.eye(2))
        layer.bias.zero_()
    x = torch.tensor([[float("nan"), -1.0], [0.0, 2.0]], requires_grad=True)
    out = layer(x)
    assert out[0, 0].isnan()
    assert out[1].tolist() == [0, 2]
    (grad,) = torch.autograd.grad(out, x, torch.tensor([[1.0, float("inf")], [float("inf"), 3.0]]))
    assert grad[1].tolist() == [0, 3], "the gradient at 0 is 0, whatever arrives there"


@pytest.mark.parametrize("in_features, out_features, rows", [(0, 3, 2), (3, 0, 2), (3, 4, 0), (0, 0, 0)])
@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "float16"])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_empty(in_features, out_features, rows, policy):
    layer = mpk.MPLinear(in_features, out_features, policy=policy, activation="relu")
    x = torch.ones(rows, in_features, dtype=layer.weight.dtype, requires_grad=True)
    out = layer(x)
    assert torch.equal(out, layer.bias.relu().expand(rows, out_features))
    out.sum().backward()
    assert not x.grad.any()
    assert not layer.weight.grad.any()
    assert torch.equal(layer.bias.grad, (layer.bias > 0) * float(rows))


# ----- copies and files ----------------------------------------------------------------------


@pytest.mark.parametrize("renew", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_of_the_layer(renew):
    layer = mpk.MPLinear(3, 4, activation="relu", policy="mixed_float16,grad=float16")
    twin = renew(layer)
    assert (twin.activation, twin.policy) == ("relu", layer.policy)
    assert twin.weight is not layer.weight
    x = torch.randn(2, 3)
    assert torch.equal(twin(x), layer(x))
    for module in (layer, twin):
        module(x).sum().backward()
        assert module.weight.grad.dtype == module.bias.grad.dtype == torch.float16


# ----- cached_weights ----------------------------------------------------------------------


def casts(monkeypatch) -> list:
    """A list that grows by one whenever a weight is cast for the cache."""
    from mpkernels.nn import linear

    made, cast = [], linear.cast
    monkeypatch.setattr(linear, "cast", lambda *args: made.append(1) or cast(*args))
    return made


def test_cached_weights(monkeypatch):
    made = casts(monkeypatch)
    layer = mpk.MPLinear(3, 4, policy="mixed_float16").eval()
    x = torch.randn(2, 3)
    expected = layer(x)
    with mpk.cached_weights(layer) as model:
        assert model is layer
        for _ in range(3):
            assert torch.equal(layer(x), expected)
        assert len(made) == 1
        with torch.no_grad():
            layer.weight.mul_(2)
        assert torch.equal(layer(x), mpk.MPLinear.from_linear(layer, policy="mixed_float16").eval()(x))
        layer(x)
        assert len(made) == 2
        layer.load_state_dict({name: torch.ones_like(value) for name, value in layer.state_dict().items()})
        assert torch.equal(layer(torch.ones(1, 3)), torch.full((1, 4), 4.0))
    assert layer._weight_copy(layer.weight) is None


def test_cached_weights_end_with_an_exception():
    layer = mpk.MPLinear(3, 4, policy="mixed_float16").eval()
    with pytest.raises(RuntimeError, match="x has last dimension 5"), mpk.cached_weights(layer):
        layer(torch.ones(2, 5))
    assert layer._weight_copy(layer.weight) is None


def test_cached_weights_of_a_model_made_under_inference_mode():
    """Torch counts no writes to its tensors: a cast that was kept could not be told from a stale one."""
    with torch.inference_mode():
        layer, x = mpk.MPLinear(3, 4, policy="mixed_float16").eval(), torch.randn(2, 3)
        with mpk.cached_weights(layer):
            for _ in range(2):
                layer.weight.mul_(2)
                assert torch.equal(layer(x), mpk.MPLinear.from_linear(layer, policy="mixed_float16").eval()(x))


def test_cached_weights_leave_other_layers_alone():
    model = nn.Sequential(mpk.MPLinear(3, 3), mpk.MPLinear(3, 3, policy="float32"), nn.Linear(3, 3))
    with mpk.cached_weights(model):
        assert model[0]._weight_copy(model[0].weight) is None
        assert model[1]._weight_copy(model[1].weight) is None


# ----- bad input ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((-1, 4), {}, ValueError, "in_features must not be negative, got -1"),
        ((3, -4), {}, ValueError, "out_features must not be negative, got -4"),
        ((True, 4), {}, TypeError, "in_features must be an int, got True"),
        ((3, 4.0), {}, TypeError, "out_features must be an int, got 4.0"),
        ((3, "4"), {}, TypeError, "out_features must be an int, got '4'"),
        ((None, 4), {}, TypeError, "in_features must be an int, got None"),
        ((float("nan"), 4), {}, TypeError, "in_features must be an int, got nan"),
        ((3, np.bool_(True)), {}, TypeError, "out_features must be an int, got"),
        ((np.int64(-3), 4), {}, ValueError, "in_features must not be negative, got -3"),
        ((3, 4), {"activation": "tanh"}, ValueError, 'activation must be None or one of "relu", .*"silu", got \'tanh\''),
        ((3, 4), {"policy": "float8"}, ValueError, "unknown policy 'float8'"),
        ((3, 4), {"policy": 16}, TypeError, "policy must be a Policy or a string, got int"),
    ],
)
def test_bad_construction(arguments, options, error, message):
    with pytest.raises(error, match=message):
        mpk.MPLinear(*arguments, **options)


def test_sizes_may_be_numpys():
    """As nn.Linear takes them; torch.compile and pickle see no difference."""
    layer = mpk.MPLinear(np.int64(3), np.int32(4))
    assert layer(torch.ones(2, 3)).shape == (2, 4)
    assert repr(layer) == repr(mpk.MPLinear(3, 4))


BAD_DTYPES = (torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize("dtype", BAD_DTYPES, ids=str)
@pytest.mark.parametrize("policy", [None, "mixed_float16", "float16"])
def test_bad_dtypes(policy, dtype):
    """Without a policy the message has both dtypes and what would decide between them."""
    layer = mpk.MPLinear(4, 3, policy=policy)
    with pytest.raises(RuntimeError, match=str(dtype)) as refused:
        layer(torch.zeros(2, 4).to(dtype))
    if policy is None:
        assert "weight torch.float32" in str(refused.value)
        assert "no Policy" in str(refused.value)


@pytest.mark.parametrize("policy", [None, "mixed_float16"])
def test_bad_calls(policy):
    """More of them are in test_functional.py."""
    with pytest.raises(TypeError, match="x must be a Tensor, got list"):
        mpk.MPLinear(4, 3, policy=policy)([1.0])


class Doubled(nn.Module):
    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        return 2 * tensor


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_mplinear_reads_what_a_parametrization_makes(name):
    layer, x = mpk.MPLinear(4, 3, policy="mixed_bfloat16"), torch.ones(2, 4)
    expected = copy.deepcopy(layer)
    with torch.no_grad():
        getattr(expected, name).mul_(2)
    nn.utils.parametrize.register_parametrization(layer, name, Doubled())
    assert layer(x).equal(expected(x))
    layer(x).sum().backward()
    expected(x).sum().backward()
    grad = getattr(layer.parametrizations, name).original.grad
    assert grad.equal(2 * getattr(expected, name).grad)
