# SPDX-License-Identifier: Apache-2.0
"""The gradients of the previous layer out of linear_act_backward, against fp64; and two calls with a link between them."""

import functools
import re
from itertools import product

import pytest
import torch

from mpkernels.ops import linear_act as ops
from mpkernels.ops.linear_act import Activation, FusedBackwardLink, linear_act, reference
from mpkernels.ops.linear_act.epilogues import pack_mask
from tests import bounds, wrong_kernels
from tests.linear_act_cases import (
    DTYPES,
    LAYOUTS,
    Case,
    Dtypes,
    backward,
    backward_below,
    bf16,
    f16,
    f32,
    forward,
    laid_out,
    same_bits,
    saving_masks,
)

pytestmark = pytest.mark.usefixtures("by_eager_and_auto")

NONE, RELU = Activation.NONE, Activation.RELU
by_dtypes = pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES.keys())


def tensors_of(case, generator, device):
    """grad_out, x in compute dtype and not negative, weight, what this layer saved, its output, and the mask that x implies."""
    x, weight, bias, grad_out = case.tensors(generator, device)
    x = laid_out(x.relu(), case.layout)
    out, saved, x_compute = forward(x, weight, bias, case.dtypes, case.activation)
    x = x if x.dtype == case.dtypes.compute else x_compute
    return grad_out, x, weight, saved, out, pack_mask(x.reshape(case.M, case.K))


def run(case, generator, device="cpu", by_epilogue=False):
    """Both of the previous layer's gradients, one, and without its activation. by_epilogue: they have the bits of dgrad."""
    grad_out, x, weight, saved, out, mask = tensors_of(case, generator, device)
    selector = saved if case.activation else None
    call = functools.partial(backward_below, grad_out, x, weight, selector, dtypes=case.dtypes, activation=case.activation)
    v = bounds.accumulator_roundoff(weight.device, case.dtypes.compute)
    positive = ~(out <= 0) if case.activation else None

    def check(grads, below):
        checked = grads[0], grads[3]
        bounds.check_backward_below(checked, grad_out, weight, positive, below, case.dtypes.compute, v, case.random_sign)

    grads = call(mask)
    check(grads, x > 0)
    assert grads[0].shape == (*grad_out.shape[:-1], case.K)
    assert (grads[0].dtype, grads[3].dtype, grads[3].shape) == (case.dtypes.x, case.dtypes.grad, (case.K,))
    plain = backward(grad_out, x, weight, selector, case.dtypes, case.activation)
    assert all(same_bits(a, b) for a, b in zip(grads[1:3], plain[1:], strict=True)), "grad_weight and grad_bias are its own"
    assert all(same_bits(a, b) for a, b in zip(grads, call(x), strict=True)), "by the mask and by x differ"
    no_bias = call(mask, wants_bias=False)
    assert same_bits(no_bias[0], grads[0])
    assert no_bias[3].shape == (0,)
    unselected = call(None, prev_activation=NONE)
    check(unselected, None)
    if by_epilogue:
        assert same_bits(grads[0], torch.where(x > 0, plain[0], 0))
        assert same_bits(unselected[0], plain[0])
    return grads


# ----- the op ---------------------------------------------------------------


@by_dtypes
@pytest.mark.parametrize("activation", [NONE, RELU])
def test_linear_act_below_matches_reference(dtypes, activation, generator, device):
    for shape in ((96, 80, 64), (7, 129, 35), (130, 3, 257), (1, 5, 6)):
        run(Case(*shape, dtypes, activation=activation), generator, device)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["float32", "mixed_float16 inside", "mixed_bfloat16"])
def test_linear_act_below_strided(name, layout, generator, device):
    for lead in ((15,), (3, 5)):
        run(Case(15, 37, 41, DTYPES[name], lead=lead, layout=layout), generator, device)


@pytest.mark.parametrize("name", ["float32", "mixed_float16", "bfloat16"])
def test_linear_act_below_empty(name, device):
    for M, N, K in product((0, 3), (0, 5), (0, 7)):
        grads = run(Case(M, N, K, DTYPES[name]), torch.Generator(), device)
        if M == 0 or N == 0:
            assert not any(g.any() for g in grads)


@by_dtypes
def test_linear_act_below_small_integers_are_exact(dtypes, device, generator):
    """Every sum is an integer that every dtype holds; the fp64 reference says which."""
    integers = (torch.randint(-2, 3, s, generator=generator).to(device) for s in ((9, 12), (12, 7), (9, 7)))
    grad_out, weight, x = (i.to(d) for i, d in zip(integers, (dtypes.out, dtypes.weight, dtypes.compute), strict=True))
    grads = backward_below(grad_out, x, weight, None, x, dtypes, NONE)
    expected = reference.linear_act_backward(grad_out, x, weight, None, dtypes.compute)
    grad_z = torch.where(x > 0, expected[0], 0)
    for grad, exact in zip(grads, (grad_z, *expected[1:], grad_z.sum(0)), strict=True):
        assert torch.equal(grad.double(), exact)


def test_linear_act_below_selects(device):
    """What is behind a 0 of the previous layer is 0 in grad_x and in its sum: inf and NaN too; a NaN lets through."""
    x = torch.tensor([[-1.0, 0.0, 1.0, torch.nan]], device=device)
    for value in (3.0, torch.inf, torch.nan):
        grad_out, weight = torch.full((1, 1), value, device=device), torch.ones(1, 4, device=device)
        grads = backward_below(grad_out, x, weight, None, x, DTYPES["float32"], NONE)
        expected = torch.tensor([0.0, 0.0, value, value], device=device)
        assert same_bits(grads[0][0], expected)
        assert same_bits(grads[3], expected)


def test_linear_act_below_small_gradients_sum_unrounded(device):
    """2**-26 is 0 in float16, and 64 of it are 2**-20 in the gradient of the previous layer's bias."""
    dtypes = Dtypes(f16, f32, f16, f16, f32)
    small = torch.full((64, 1), 2.0**-13, dtype=f16, device=device)
    grads = backward_below(small, small, torch.full((1, 1), 2.0**-13, device=device), None, small, dtypes, NONE)
    assert not grads[0].any()
    assert grads[3].item() == 2.0**-20


@by_dtypes
def test_linear_act_below_deterministic(dtypes, generator, device):
    grad_out, x, weight, saved, _, mask = tensors_of(Case(67, 45, 51, dtypes), generator, device)
    results = [backward_below(*(t.clone() for t in (grad_out, x, weight, saved, mask)), dtypes) for _ in range(3)]
    assert all(same_bits(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("rows", [8, 64, 1024])
@pytest.mark.parametrize("kernel", ["below_not_selected", "below_summed_unselected", "below_summed_in_16_bit", "below_by_row"])
@pytest.mark.parametrize("dtype", [f16, bf16], ids=["fp16", "bf16"])
def test_linear_act_below_bounds_reject(kernel, dtype, rows, generator):
    x, weight, _, grad_z = Case(rows, 48, 40, Dtypes(dtype, dtype, dtype, dtype, f32)).tensors(generator)
    check = lambda grads: bounds.check_backward_below(grads, grad_z, weight, None, x > 0, dtype, 2.0**-24, True)
    check(wrong_kernels.sound_backward_below(grad_z, x, weight, f32))
    with pytest.raises(AssertionError, match=r"bound|got through the mask"):
        check(getattr(wrong_kernels, kernel)(grad_z, x, weight, f32))


@pytest.mark.parametrize("name", ["float32", "mixed_float16", "bfloat16", "fp64 to bf16"])
def test_linear_act_below_opcheck(name, generator, device):
    dtypes = DTYPES[name]
    grad_out, x, weight, saved, _, mask = tensors_of(Case(6, 37, 9, dtypes), generator, device)
    types = (dtypes.compute, dtypes.x, dtypes.grad, dtypes.grad)
    for selector, activation, bias_dtype in ((mask, 1, f32), (x, 1, None), (None, 0, f32)):
        args = (grad_out, x, weight, None, saved, 1, *types, [True] * 3, selector, activation, bias_dtype)
        torch.library.opcheck(torch.ops.mpkernels.linear_act_backward.default, args)
    x, weight, bias, _ = Case(6, 37, 9, dtypes).tensors(generator, device)
    for tensor in (x, weight, bias):
        tensor.requires_grad_()
    prev_bias = torch.zeros(9, dtype=dtypes.weight, device=device, requires_grad=True)
    for activation_grad_fused in (True, False):
        args = (x, weight, bias, None, 1, dtypes.compute, dtypes.out, 1, False, None, activation_grad_fused, mask, 1, prev_bias)
        torch.library.opcheck(torch.ops.mpkernels.linear_act.default, args)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prev_saved": torch.zeros(2, 2, dtype=torch.int32)}, "prev_saved must be the mask (2, 1) int32 or x, got (2, 2)"),
        ({"prev_bias": torch.ones(3)}, "prev_bias must have shape (4,), got (3,)"),
        ({"prev_bias": torch.ones(4, dtype=torch.int8)}, "prev_bias must be float16, bfloat16, float32 or float64"),
        ({"prev_activation": -1}, "prev_activation must be one of"),
    ],
)
def test_linear_act_refuses_a_previous_layer(changed, message):
    good = {
        "x": torch.ones(2, 4), "weight": torch.ones(3, 4), "bias": None, "weight_copy": None, "activation": 0,
        "compute_dtype": f32, "out_dtype": f32, "save": 0, "prev_saved": torch.zeros(2, 1, dtype=torch.int32),
        "prev_activation": 1, "prev_bias": torch.ones(4),
    }  # fmt: skip
    torch.ops.mpkernels.linear_act(**good)
    with pytest.raises(RuntimeError, match=re.escape(f"linear_act: {message}")):
        torch.ops.mpkernels.linear_act(**good | changed)


# ----- two layers and the link between them ---------------------------------------------------------------


def two_layers(x, weights, biases, activations, *, joined):
    kwargs = {"compute_dtype": f16, "out_dtype": f16}
    link = FusedBackwardLink() if joined else None
    hidden = linear_act(x, weights[0], biases[0], activation=activations[0], next=link, **kwargs)
    return linear_act(hidden, weights[1], biases[1], activation=activations[1], prev=link, **kwargs)


@pytest.fixture
def moves_up(monkeypatch):
    monkeypatch.setattr(ops.forward_op, "_chosen", saving_masks())


@pytest.mark.parametrize("activations", [(RELU, RELU), (RELU, NONE), (NONE, RELU)], ids=str)
@pytest.mark.parametrize(
    "frozen",
    [
        (),
        ("x",),
        ("bias",),
        ("x", "weight"),
        ("x", "bias"),
        ("weight", "bias"),
        ("x", "weight", "bias"),
        ("above",),
        ("bias_above",),
    ],
    ids=str,
)
@pytest.mark.usefixtures("moves_up")
def test_linear_act_joined_layers_have_the_gradients_of_two(activations, frozen, generator, device):
    """Whichever of their inputs require a gradient. The lower bias's is summed from wider values than by two layers."""
    x, weight, bias, _ = Case(31, 20, 12).tensors(generator, device)
    _, above, bias_above, grad_out = Case(31, 9, 20, DTYPES["float16"]).tensors(generator, device)
    inputs = {"x": x, "weight": weight, "bias": bias, "above": above.float(), "bias_above": bias_above.float()}
    for name, tensor in inputs.items():
        tensor.requires_grad_(name not in frozen)
    results = []
    for joined in (False, True):
        args = ((inputs["weight"], inputs["above"]), (inputs["bias"], inputs["bias_above"]), activations)
        out = two_layers(inputs["x"], *args, joined=joined)
        wanted = [t for t in inputs.values() if t.requires_grad]
        results.append((out.detach(), torch.autograd.grad(out, wanted, grad_out)))
    assert same_bits(results[0][0], results[1][0])
    names = [name for name in inputs if name not in frozen]
    for name, two, joined in zip(names, results[0][1], results[1][1], strict=True):
        assert two.dtype == joined.dtype == f32
        if name != "bias":
            assert same_bits(two, joined), name
            continue
        hidden = linear_act(x, weight, bias, activation=activations[0], compute_dtype=f16, out_dtype=f16).detach()
        top = linear_act(hidden, above.float(), bias_above.float(), activation=activations[1], compute_dtype=f16, out_dtype=f16)
        positive, below = ((top > 0).detach() if activations[1] else None, hidden > 0 if activations[0] else None)
        operand = torch.where(positive, grad_out, 0) if activations[1] else grad_out
        grad_x = wrong_kernels.sound_backward_below(operand, hidden if activations[0] else hidden * 0 + 1, above, f32)[0]
        bounds.check_backward_below((grad_x, joined), grad_out, above, positive, below, f16, 2.0**-24, True)


@pytest.mark.usefixtures("moves_up")
def test_linear_act_joined_layers_save_no_more(generator, device):
    """The mask is kept once, by the next layer; the lower layer's node keeps neither mask nor output."""
    x, weight, bias, _ = Case(32, 33, 8).tensors(generator, device)
    _, above, bias_above, _ = Case(32, 9, 33, DTYPES["mixed_float16"]).tensors(generator, device)
    for tensor in (weight, bias, above, bias_above):
        tensor.requires_grad_()
    found = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append((tuple(t.shape), t.dtype)), lambda t: t):
        two_layers(x, (weight, above), (bias, bias_above), (RELU, NONE), joined=True)
    expected = [((32, 8), f16), ((33, 8), f32), ((32, 33), f16), ((9, 33), f32), ((32, 2), torch.int32)]
    assert sorted(found, key=str) == sorted(expected, key=str)


def test_linear_act_link_stays_empty_without_kernels(generator, device):
    """In eager, and by C++ on a CPU, the lower layer keeps what is its own."""
    x, weight, bias, _ = Case(4, 5, 6).tensors(generator, device)
    link = FusedBackwardLink()
    linear_act(x, weight.requires_grad_(), bias, activation=RELU, compute_dtype=f16, out_dtype=f16, next=link)
    assert not link.activation_grad_fused
