# SPDX-License-Identifier: Apache-2.0
"""advise, watch and plan of policies of 8 bits: what scales do to ranges and errors, per row and per tensor; what is said."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mpkernels as mpk
from mpkernels.precision import verdict
from mpkernels.precision.ranges import Range
from tests.precision import measured
from tests.precision.test_advise import FP16, FP32, Net, advise, step, wrong

ROW, TENSOR, HYBRID = "mixed_float8", "mixed_float8,scaling=tensor", "mixed_float8_hybrid"
SAVED = "mixed_bfloat16,saved=float8_e4m3fn"
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def made(sizes=1.0):
    """A linear, x and grad_out. sizes: of the rows of x; those of grad_out are the other way round, so that each counts."""
    torch.manual_seed(0)
    return nn.Linear(40, 24), torch.randn(33, 40) * sizes, torch.randn(33, 24) / sizes


def of_a_linear(*policies, change=lambda x: None, sizes=1.0):
    linear, x, grad = made(sizes)
    change(x)
    return measured.rows_of(linear, x, grad, policies)


# ----- planted tensors ----------------------------------------------------------------------


def test_advise_of_large_numbers_with_scales():
    """Which fp16 does not hold; scales bring them to where 8 bits do."""
    advice = advise(Net(before=1e5, after=1e-5), policies=[FP32, FP16, ROW, TENSOR])
    assert set(wrong(advice, FP16)) == {"planted"}
    for policy in (ROW, TENSOR):
        assert not wrong(advice, policy)
        assert advice["planted"].policies[policy].range["x"].overflows == 0
    assert "a scale per row" in advice.why("planted", ROW)
    assert "one scale for the tensor" in advice.why("planted", TENSOR)


def test_advise_of_an_outlier_token():
    """Under one scale for the tensor all other rows become 0; with a scale per row they do not know of it."""

    def plant(x):
        x[7] *= 1e7

    row, tensor = of_a_linear(ROW, TENSOR, change=plant)
    assert row.range["x"].zero_share == 0
    assert tensor.range["x"].zero_share > 0.9
    plain, _ = of_a_linear(ROW, TENSOR)
    assert row.range["x"].subnormal_share == plain.range["x"].subnormal_share


def test_advise_of_an_outlier_channel():
    """In every row: a scale per row mends nothing."""

    def plant(x):
        x[:, 3] *= 1e7

    for found in of_a_linear(ROW, TENSOR, change=plant):
        assert found.range["x"].zero_share == pytest.approx(39 / 40, abs=0.03)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_advise_of_what_no_scale_mends(value):
    def plant(x):
        x[7, 5] = value

    for found in of_a_linear(ROW, TENSOR, change=plant):
        assert found.range["x"].overflows == 1
        assert found.range["x"].margin_bits == -math.inf
        assert found.bound_ratio is None
        said = "x has inf in forward" if value == math.inf else "x has NaN in forward"
        assert verdict.problem(found, 1.0).startswith(said)


def test_advise_of_a_dead_layer_in_eight_bits():
    (found,) = of_a_linear(ROW, change=torch.Tensor.zero_)
    assert found.range["x"].amax == found.range["x"].zero_share == found.range["x"].overflows == 0


def test_advise_chooses_scales_per_row_where_a_token_stands_out():
    """The tensor's one scale, which products read as cheaply, is beyond a budget that a scale per row keeps."""

    class Token(nn.Module):
        def forward(self, x):
            return x * torch.where(torch.arange(len(x))[:, None] == 3, 1e7, 1.0)

    class Back(nn.Module):
        def forward(self, x):
            return x / torch.where(torch.arange(len(x))[:, None] == 3, 1e7, 1.0)

    model = Net()
    model.before, model.after = Token(), Back()
    with torch.no_grad():
        model.planted.bias.zero_()
    free = advise(model, policies=[FP32, TENSOR, ROW])
    noise = {p: free["planted"].policies[p].noise for p in (TENSOR, ROW)}
    assert noise[TENSOR] > 3 * noise[ROW]
    others = sum(free[name].policies[TENSOR].noise for name in ("first", "last"))
    advice = advise(model, policies=[FP32, TENSOR, ROW], loss_budget=1.01 * (noise[ROW] + others))
    assert advice.policy["planted"] == ROW
    assert advise(model, policies=[FP32, TENSOR], loss_budget=1.01 * (noise[ROW] + others)).policy["planted"] == FP32


# ----- numbers ----------------------------------------------------------------------


@pytest.mark.parametrize("policy", [ROW, TENSOR, HYBRID, "mixed_float8,wgrad=float32", "mixed_float8,grad=bfloat16"])
@pytest.mark.parametrize("block", [None, 300])
def test_advise_errors_in_eight_bits_are_those_of_the_layer(policy, block, monkeypatch):
    """And blocks of rows change nothing, with one scale for the tensor neither."""
    if block is not None:
        monkeypatch.setattr("mpkernels.precision.layer.BLOCK", block)
    sizes = torch.logspace(-4, 0, 33)[:, None]
    (row,) = of_a_linear(policy, sizes=sizes)
    linear, x, grad = made(sizes)
    w, b = linear.weight.detach().double(), linear.bias.detach().double()
    exact = {"out": F.linear(x.double(), w, b), "grad_x": grad.double() @ w, "grad_weight": grad.double().t() @ x.double()}
    mine = mpk.convert(linear, policy)
    inputs = x.clone().requires_grad_()
    out = mine(inputs)
    out.backward(grad)
    for name, t in {"out": out.detach(), "grad_x": inputs.grad, "grad_weight": mine.weight.grad}.items():
        assert row.error[name] == pytest.approx(float((t.double() - exact[name]).norm() / exact[name].norm()), rel=1e-2)
    assert row.noise == pytest.approx(float((grad.double() * (out.detach().double() - exact["out"])).norm()))
    assert 0.02 < row.bound_ratio < 1


def test_advise_counts_in_eight_bits_what_the_op_makes():
    sizes = torch.logspace(-6, 0, 33)[:, None]
    (row,) = of_a_linear(HYBRID, sizes=sizes)
    _, x, _ = made(sizes)
    q = mpk.functional.quantize(x, E4M3)[0].float()
    found = row.range["x"]
    assert (found.format, found.scaling) == (E4M3, "tensor")
    assert (row.range["grad_out"].format, row.range["grad_out"].scaling) == (E5M2, "tensor")
    assert found.zero_share == pytest.approx(float(((q == 0) & (x != 0)).double().mean()))
    assert found.zero_share > 0.1
    assert found.subnormal_share == pytest.approx(float(((q != 0) & (q.abs() < 2**-6)).double().mean()))
    assert found.norm_lost == pytest.approx(float(x[q == 0].double().norm() / x.double().norm()))
    assert row.range["out"].scaling is row.range["grad_weight"].scaling is None


def test_advise_of_bytes_in_eight_bits():
    """Kept for backward are one byte an element and the scales, and no copy of the weight."""
    row, tensor, bf16 = of_a_linear(ROW, TENSOR, "mixed_bfloat16")
    parameters = 4 * (24 * 40 + 24)
    assert row.bytes == parameters + 33 * 40 + 4 * 33
    assert tensor.bytes == parameters + 33 * 40 + 4
    assert bf16.bytes == parameters + 2 * 24 * 40 + 2 * 33 * 40
    assert row.traffic < bf16.traffic


def test_advise_of_what_is_saved_in_eight_bits():
    """What is computed forward is as without, what comes of the saved x is not."""
    saved, plain = of_a_linear(SAVED, "mixed_bfloat16")
    assert saved.bytes == plain.bytes - 33 * 40 + 4 * 33
    assert saved.error["out"] == plain.error["out"]
    assert saved.error["grad_weight"] > plain.error["grad_weight"]


@pytest.mark.parametrize("policies", [(SAVED, "mixed_bfloat16"), ("mixed_bfloat16", SAVED)])
def test_advise_saves_in_eight_bits_where_memory_asks_for_it(policies):
    """There are passes more, and gradients off by more: no policy for where the other one fits as well."""
    free = advise(Net(), policies=policies)
    assert set(free.policy.values()) == {"mixed_bfloat16"}
    held = sum(free[name].policies[SAVED].bytes for name in free.policy)
    assert set(advise(Net(), policies=policies, memory=held).policy.values()) == {SAVED}


@pytest.mark.parametrize("layers", [40, pytest.param(2_000, marks=pytest.mark.sweep)])
def test_advise_bound_holds_in_eight_bits(layers):
    largest = {}
    for policy, activation, ratio in measured.bound_ratios(1, layers, (ROW, TENSOR, "mixed_float8,output=bfloat16")):
        assert ratio is None or ratio <= 1, (policy, activation, ratio)
        largest[policy] = max(largest.get(policy, 0.0), ratio or 0.0)
    assert min(largest.values()) > 0.3


@pytest.mark.parametrize("name", ["plain_mlp", pytest.param("vit", marks=pytest.mark.sweep)])
def test_advise_predicts_the_change_of_the_loss_in_eight_bits(name):
    changes = list(measured.loss_changes(name, 48, torch.float32, measured.EIGHT_BITS))
    correlation, within = measured.agreement(changes)
    assert correlation >= 0.95
    assert within >= 0.85


# ----- what it says ----------------------------------------------------------------------


def test_advice_of_eight_bits_prints(tmp_path):
    advice = mpk.advise(Net(), step, policies=[FP32, ROW, HYBRID], loss_budget=1e-8)
    said = advice.why("planted")
    error = advice["planted"].policies[ROW].error["out"]
    assert f"not mixed_float8: adds {advice['planted'].policies[ROW].loss_change:.1e} to the loss" in said
    assert f"errors with a scale per row: out {100 * error:.2g} %, grad_x " in said
    assert "errors with one scale for the tensor: out " in said
    assert ", of 1.0e-08 for all layers" in said
    advice.to_html(tmp_path / "advice.html")
    text = (tmp_path / "advice.html").read_text()
    assert ">float8_e4m3fn</text>" not in text  # a band where no tensor has to lie
    assert '"scaling": "row"' in advice.to_json()
    mpk.convert(Net(), mpk.advise(Net(), step, policies=[FP32, ROW], loss_budget=1.0).policy)


def test_advice_of_a_norm_that_is_lost_under_a_scale():
    """No loss scale mends it."""
    (row,) = of_a_linear(TENSOR)
    lost = Range(E4M3, 3.0, 1e-9, 0.5, 0.1, 0.02, 0, 120.0, "tensor")
    assert verdict._problem("grad_out", lost, row, 1024.0) == (
        "grad_out loses 2 % of its norm to 0 in backward at loss scale 1024 (amax 3), below what float8_e4m3fn holds with one "
        "scale for the tensor"
    )


# ----- watch and plan ----------------------------------------------------------------------


def test_watch_has_the_room_of_the_output_in_eight_bits():
    model = mpk.convert(nn.Sequential(nn.Linear(16, 8)), ROW)
    with mpk.watch(model) as watch:
        model(1e4 * torch.randn(4, 16).requires_grad_()).sum().backward()
        (layer,) = watch.report().layers
    assert layer.room == pytest.approx(math.log2(torch.finfo(torch.bfloat16).max / layer.out))
    assert layer.grad_x is not None
    with pytest.raises(ValueError, match="mixed_bfloat16 has no wider range than mixed_float8"):
        mpk.Adapt(ladder=(ROW, "mixed_bfloat16"))
    mpk.Adapt(ladder=(ROW, "float32"))


@pytest.mark.parametrize("policy", [ROW, HYBRID])
@pytest.mark.parametrize("case", ["mlp", pytest.param("gpt2", marks=pytest.mark.sweep)])
def test_plan_in_eight_bits_is_what_real_steps_show(policy, case):
    for row in mpk.plan(*measured.STEPS[case], policies=[policy], batch_sizes=(8, 24, 64)).rows:
        found = measured.of_real_steps(*measured.STEPS[case], row.batch_size, row.policy, row.optimizer)
        assert {name: getattr(row, name) for name in found} == pytest.approx(found, rel=0.01)


def test_plan_in_eight_bits_saves_one_byte_an_element():
    make = lambda: nn.Sequential(*(nn.Linear(256, 256) for _ in range(8)))
    policies = [f"{policy},output=float16" for policy in ("mixed_float16", ROW, "mixed_float16,saved=float8_e4m3fn")]
    plan = mpk.plan(make, lambda n: torch.randn(n, 256), policies=policies, batch_sizes=[4096])
    sixteen, *eight = (row.activations for row in plan.rows)
    inputs = 8 * 4096 * 256 * 2  # of the layers, in 16 bits
    assert all(0.45 * inputs <= sixteen - kept <= 0.5 * inputs for kept in eight)
    assert [row.copies > 0 for row in plan.rows] == [True, False, True]
