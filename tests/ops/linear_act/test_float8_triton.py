# SPDX-License-Identifier: Apache-2.0
"""linear_act of 8-bit operands in Triton: on a GPU, or through Triton's interpreter (test_triton_interpreter.py starts it).

A scaled call is one of bf16 operands `q * scale`, which are exact in bf16: its bounds are those of that call.
"""

import pytest
import torch

from mpkernels.ops.linear_act import Activation, forward_op, tile_config, triton
from mpkernels.ops.linear_act.tile_config import Float8
from mpkernels.testing import scaled_cases
from tests import bounds, triton_target
from tests.levels import each_once
from tests.linear_act_cases import bits_of, same_bits
from tests.ops.linear_act.test_scaled import call, decoded

INTERPRETED = triton_target.INTERPRETED
device, _force_triton = triton_target.device, triton_target.forcing("linear_act")
test_interpreter_computes_bf16_by_value = triton_target.test_interpreter_computes_bf16_by_value

bf16, f16, f32, f64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
PAIRS = ((e4m3, e4m3), (e5m2, e4m3), (e4m3, e5m2), (e5m2, e5m2))
NONE, RELU, GELU = Activation.NONE, Activation.RELU, Activation.GELU
NAN = float("nan")


@pytest.fixture(params=["as they are", "decoded"])
def how(request, monkeypatch):
    """As GPUs multiply that have 8-bit tensor cores, and as older ones do."""
    if request.param == "decoded":
        if not INTERPRETED:
            pytest.skip("depends on the GPU")
        monkeypatch.setattr(tile_config, "float8", lambda sm: Float8.DECODED)
        monkeypatch.setattr(triton, "float8", lambda sm: Float8.DECODED)
        clear = triton._gemm_launch.cache_clear
        clear()
        yield Float8.DECODED
        clear()
    else:
        yield tile_config.float8(triton._device(torch.device("cpu" if INTERPRETED else "cuda"))[0])


@pytest.fixture
def gemms(monkeypatch):
    launches, make = [], triton._gemm_launch
    monkeypatch.setattr(triton, "_gemm_launch", lambda *args: launches.append(make(*args)) or launches[-1])
    return launches


def operand(rows, K, dtype, generator, device, one_scale=False):
    """Numbers of many exponents, and powers of two."""
    exponents = torch.randint(-6, 5, (rows, K), generator=generator)
    q = (torch.randn((rows, K), generator=generator) * torch.exp2(exponents)).to(dtype)
    scale = torch.exp2(torch.randint(-20, 20, () if one_scale else (rows, 1), generator=generator).float())
    return q.to(device), scale.to(device)


def check(out, x, x_scale, weight, weight_scale, bias, activation):
    v = scaled_cases.roundoff(x.device, x.shape[-1])
    bounds.check_forward(out, decoded(x, x_scale), decoded(weight, weight_scale), bias, activation, bf16, v, random_sign=True)


def test_scaled_runs_in_triton(device):
    for dtype in (e4m3, e5m2):
        assert forward_op.backend(device, dtype) == "triton"


@pytest.mark.parametrize("dtype", [e4m3, e5m2])
def test_every_8_bit_float_is_read(dtype, how, device):
    """Times a 1; of NaN and inf, of which others would become NaN, one at a time."""
    q = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    finite = q.view(dtype).float().isfinite()
    ones = torch.ones(()).to(device)
    numbers = torch.where(finite, q, 0).view(16, 16).view(dtype).to(device)
    eye = torch.eye(16).to(device, dtype)
    for out in (call(numbers, ones, eye, ones)[0], call(eye, ones, numbers, ones)[0].t()):
        assert torch.equal(out, numbers.float())
    one = torch.ones(1, 1).to(device, dtype)
    columns = q.view(dtype)[:, None].to(device)
    for out in (call(columns, ones, one, ones)[0][:, 0], call(one, ones, columns, ones)[0][0]):
        assert torch.equal(out.nan_to_num(7), columns[:, 0].float().nan_to_num(7))


SIZES = {  # of whole tiles and of partial ones, by descriptors where rows have multiples of 16 bytes
    "descriptors": (40, 112, 80),
    "pointers": (19, 70, 45),
    "one": (1, 1, 1),
    "K=0": (5, 7, 0),
    "M=0": (0, 7, 5),
}


@pytest.mark.parametrize("sizes, pair", each_once(SIZES, PAIRS))
def test_scaled_matches_reference(pair, sizes, how, generator, device, gemms):
    M, N, K = SIZES[sizes]
    for activation, out_dtype, one_scale in ((NONE, f32, False), (RELU, f16, True), (GELU, bf16, False)):
        x, x_scale = operand(M, K, pair[0], generator, device, one_scale)
        weight, weight_scale = operand(N, K, pair[1], generator, device, one_scale)
        bias = None if activation == NONE else torch.randn(N, generator=generator).to(device)
        out, saved, _ = call(x, x_scale, weight, weight_scale, bias, activation, out_dtype, save=1)
        check(out, x, x_scale, weight, weight_scale, bias, activation)
        if activation == RELU and M:
            assert torch.equal(torch.from_numpy(bits_of(saved, N))[:, :N], ~(out <= 0).cpu())
        if activation == GELU:
            assert saved.dtype == bf16
            check(saved, x, x_scale, weight, weight_scale, bias, NONE)
    by_tma = sizes == "descriptors" and triton._device(device)[0] in tile_config.TMA_SMS
    assert [launch.by_tma for launch in gemms] == [by_tma, by_tma, False]
    assert {launch.constants["FLOAT8"] for launch in gemms} == {int(how)}


@pytest.mark.parametrize("sizes", ["descriptors", "pointers"])
def test_scaled_exact_integers(sizes, how, generator, device):
    """Sums below 2**11, which tensor cores that keep 14 bits have exactly, and scales from end to end."""
    M, N, K = SIZES[sizes]
    x, weight = (torch.randint(-3, 4, (rows, K), generator=generator) for rows in (M, N))
    x_scale, weight_scale = (torch.exp2(torch.arange(rows) % 90 - 45.0)[:, None] for rows in (M, N))
    x_scale[0], weight_scale[0] = 2.0**120, 2.0**-126
    acc = (x.double() @ weight.double().t()).float()
    arguments = (t.to(device) for t in (x.float().to(e4m3), x_scale, weight.float().to(e4m3), weight_scale))
    assert torch.equal(call(*arguments)[0].cpu(), acc * x_scale * weight_scale.t())


def test_scaled_layouts(how, generator, device):
    """As dgrad has its weight; slices; scales that are columns of more."""
    x, x_scale = operand(9, 48, e4m3, generator, device)
    weight, weight_scale = operand(32, 48, e4m3, generator, device)
    expected = call(x, x_scale, weight, weight_scale)[0]
    wide = torch.zeros(9, 96, dtype=torch.uint8, device=device)
    wide[:, ::2] = x.view(torch.uint8)
    for a in (x.view(torch.uint8).t().contiguous().t().view(e4m3), wide.view(e4m3)[:, ::2]):
        b = weight.view(torch.uint8).t().contiguous().t().view(e4m3)
        for scale in (weight_scale, weight_scale.expand(32, 3).contiguous()[:, 1:2]):
            assert same_bits(call(a, x_scale, b, scale)[0], expected)
    out = call(x.view(3, 3, 48), x_scale.view(3, 3, 1), weight, weight_scale)[0]
    assert same_bits(out.view(9, 32), expected)


@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (130, 7), (256, 128), (150, 131)])
def test_scaled_operands_are_turned(shape, generator, device):
    """So that K lies along memory, as tensor cores read it: every byte, and of part of a larger matrix."""
    wide = torch.randint(0, 256, (shape[0], shape[1] + 5), generator=generator).to(torch.uint8).to(device).view(e4m3)
    for x in (wide[:, : shape[1]].contiguous(), wide[:, 3 : 3 + shape[1]]):
        out = triton._transposed(x)
        assert out.is_contiguous()
        assert torch.equal(out.view(torch.uint8), x.view(torch.uint8).t())


def test_scaled_nan_stays_in_its_row_and_column(how, generator, device):
    """Neither does what lies behind the edges of a tile reach in: 0 times NaN."""
    x, x_scale = operand(9, 33, e4m3, generator, device)
    weight, weight_scale = operand(21, 33, e4m3, generator, device)
    sound = call(x, x_scale, weight, weight_scale, activation=RELU)[0]
    x_scale[3], weight_scale[7] = NAN, NAN
    out = call(x, x_scale, weight, weight_scale, activation=RELU)[0]
    expected = torch.zeros(9, 21, dtype=torch.bool, device=device)
    expected[3], expected[:, 7] = True, True
    assert torch.equal(out.isnan(), expected)
    assert same_bits(out[~expected], sound[~expected])


def test_scaled_batch_invariant(generator, device):
    x, x_scale = operand(37, 80, e4m3, generator, device)
    weight, weight_scale = operand(48, 80, e4m3, generator, device)
    out = call(x, x_scale, weight, weight_scale, batch_invariant=True)[0]
    for rows in (slice(0, 1), slice(3, 20), slice(20, 37)):
        assert same_bits(call(x[rows], x_scale[rows], weight, weight_scale, batch_invariant=True)[0], out[rows])


# ----- which kernel, which tile ---------------------------------------------------------------


@pytest.mark.parametrize("sm", [80, 86, 89, 90, 100, 120])
def test_scaled_plan(sm):
    """By descriptors from sm_90 on; where tensor cores keep 14 bits, every 128 of K or fewer are added in fp32."""
    how = {80: Float8.DECODED, 86: Float8.DECODED, 100: Float8.PLAIN}.get(sm, Float8.PROMOTED)
    a, b = tile_config.Operand(e5m2, (8192, 4096), (4096, 1), 0), tile_config.Operand(e4m3, (4096, 8192), (1, 4096), 0)
    for out_dtype in (bf16, f32):
        plan = tile_config.plan(sm, 132, True, a, b, tile_config.Operand(out_dtype, (8192, 8192), (8192, 1), 0))
        assert plan.by_tma == (sm in tile_config.TMA_SMS)
        assert plan.options["FLOAT8"] == how
        assert plan.options["BLOCK_K"] == (64 if how == Float8.DECODED else 128)
    odd = tile_config.plan(sm, 132, True, a._replace(stride=(4097, 1)), b, tile_config.Operand(f32, (8192, 8192), (8192, 1), 0))
    assert not odd.by_tma
    assert odd.options["BLOCK_K"] <= 64


def test_scaled_descriptors_take_no_pair_of_unlike_sizes():
    a, b = tile_config.Operand(e4m3, (64, 32), (32, 1), 0), tile_config.Operand(bf16, (32, 48), (1, 32), 0)
    out = tile_config.Operand(f32, (64, 48), (48, 1), 0)
    assert "of one 16-bit dtype or of 8 bits" in tile_config.tma_why_not(90, a, b, out)
