# SPDX-License-Identifier: Apache-2.0
"""linear_act in Triton against fp64: on a GPU, or through Triton's interpreter (test_triton_interpreter.py starts it)."""

import dataclasses
import importlib
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from mpkernels.functional import linear_act
from mpkernels.nn import MPMLP
from mpkernels.ops.linear_act import Activation, backward_op, forward_op, tile_config, triton
from mpkernels.runtime import tuned_table
from mpkernels.testing import checks, linear_act_cases
from tests import bounds, triton_target
from tests import linear_act_cases as cases
from tests.levels import each_once
from tests.linear_act_cases import DTYPES, Case, backward, bits_of, forward, same_bits
from tests.ops.linear_act import test_activations, test_fused_backward, test_linear_act

INTERPRETED = triton_target.INTERPRETED
device, _force_triton = triton_target.device, triton_target.forcing("linear_act", "linear_act_backward")
test_interpreter_computes_bf16_by_value = triton_target.test_interpreter_computes_bf16_by_value

# The same of every backend, and soon done.
test_activation_of_the_previous_layer = test_activations.test_activation_of_the_previous_layer
test_linear_act_below_selects = test_fused_backward.test_linear_act_below_selects
test_linear_act_below_small_gradients_sum_unrounded = test_fused_backward.test_linear_act_below_small_gradients_sum_unrounded
test_linear_act_bias_is_not_rounded_to_compute = test_linear_act.test_linear_act_bias_is_not_rounded_to_compute
test_linear_act_double_operands_are_rounded_once = test_linear_act.test_linear_act_double_operands_are_rounded_once
test_linear_act_gradient_follows_the_mask = test_linear_act.test_linear_act_gradient_follows_the_mask
test_linear_act_mask_layout = test_linear_act.test_linear_act_mask_layout
test_linear_act_mask_of_zeros_underflow_and_nan = test_linear_act.test_linear_act_mask_of_zeros_underflow_and_nan
test_linear_act_overflow = test_linear_act.test_linear_act_overflow
test_linear_act_small_weight_gradient_arrives = test_linear_act.test_linear_act_small_weight_gradient_arrives

f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
NAN, INF = float("nan"), float("inf")


def test_linear_act_runs_in_triton(device):
    assert forward_op.backend(device, f16) == backward_op.backend(device, f16) == "triton"


@pytest.mark.parametrize("name", DTYPES)
def test_linear_act_matches_reference(name, generator, device):
    cases.run(Case(19, 70, 45, DTYPES[name], copy=name == "mixed_float16 inside"), generator, device)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 3, 1), (1, 97, 31), (37, 1, 64), (16, 32, 32), (17, 33, 65), (5, 128, 7)])
@pytest.mark.parametrize("name", ["float16", "mixed_bfloat16"])
def test_linear_act_odd_shapes(sizes, name, generator, device):
    cases.run(Case(*sizes, DTYPES[name], save=sizes[0] % 2, bias=sizes[1] != 33), generator, device)


@pytest.mark.skipif(not INTERPRETED, reason="a GPU would take 2 GiB that a CPU hardly touches")
@pytest.mark.parametrize("name", ["x", "weight", "bias"])
def test_linear_act_rows_beyond_int32_bytes_apart(name, generator):
    tensors = dict(zip(("x", "weight", "bias"), Case(3, 5, 7, DTYPES["mixed_float16 inside"]).tensors(generator), strict=False))
    out = forward(**tensors | {name: cases.far_apart(tensors[name])}, dtypes=DTYPES["mixed_float16 inside"])[0]
    assert same_bits(out, forward(**tensors, dtypes=DTYPES["mixed_float16 inside"])[0])


SIZES = ((19, 70, 45), (33, 5, 97), (1, 1, 1), (0, 5, 7), (5, 0, 7), (5, 7, 0))


@pytest.mark.parametrize("name, sizes", each_once(("float32", "mixed_float16", "mixed_bfloat16 inside", "fp64 to fp16"), SIZES))
def test_linear_act_below(name, sizes, generator, device):
    """The dgrad epilogue does the previous layer's pass: the bits of dgrad and then the selection, sums of the unrounded."""
    test_fused_backward.run(Case(*sizes, DTYPES[name]), generator, device, by_epilogue=True)


@pytest.mark.parametrize("activation, name", each_once(list(Activation)[2:], ("float64", "mixed_float16", "bfloat16")))
def test_linear_act_activations(activation, name, generator, device):
    """Value, saved preactivation and gradients."""
    cases.run(Case(19, 70, 45, DTYPES[name], activation=activation), generator, device)


@pytest.mark.parametrize("policy", ["float16", "mixed_float16", "mixed_bfloat16"])
def test_linear_act_mlp_moves_up(policy, generator, device):
    """Through MPMLP: forward and the gradients of x and weights have the bits of the layers one by one, biases the bound."""
    torch.manual_seed(0)
    model = MPMLP([21, 34, 40, 10], policy=policy, device=device)
    x = torch.randn(19, 21, generator=generator).to(device, model[0].weight.dtype)
    grads = []
    for function in (model, lambda x: model[4](model[2](model[0](x)))):
        leaf = x.clone().requires_grad_()
        out = function(leaf)
        grads.append((out, *torch.autograd.grad(out.square().sum(), (leaf, *model.parameters()))))
    for i, (joined, single) in enumerate(zip(*grads, strict=True)):
        if i in (3, 5):  # biases of inner layers: summed before they are rounded
            bounds.check_bias_summed_unrounded(joined, single, 19, model[0].policy.compute_dtype)
            assert policy == "float16" or not same_bits(joined, single)
        else:
            assert same_bits(joined, single), i


@pytest.mark.parametrize("name", ["mixed_float16", "float32", "bfloat16"])
def test_linear_act_batch_invariant(name, generator, device):
    """A row has its bits at every M and every place."""
    dtypes = DTYPES[name]
    x, weight, bias, _ = Case(37, 40, 70, dtypes).tensors(generator, device)
    call = lambda x: forward(x, weight, bias, dtypes, save=0, batch_invariant=True)[0]
    out = call(x)
    for M in (1, 2, 15, 16, 17, 33):
        assert same_bits(call(x[:M]), out[:M])
        assert same_bits(call(x[-M:].t().contiguous().t()), out[-M:])


@pytest.mark.parametrize("layout", cases.LAYOUTS[1:])
def test_linear_act_strided(layout, generator, device):
    cases.run(Case(19, 37, 21, DTYPES["mixed_float16"], layout=layout, lead=(19,)), generator, device)


@pytest.mark.parametrize("sizes", [(0, 5, 7), (5, 0, 7), (5, 7, 0), (0, 0, 0)])
def test_linear_act_empty(sizes, generator, device):
    cases.run(Case(*sizes, DTYPES["mixed_float16"]), generator, device)


@pytest.mark.parametrize("sizes", [(3, 5, 1000), (2 * triton.SELECT_ROWS + 45, 3, 5)])
def test_linear_act_long_sums(sizes, generator, device):
    cases.run(Case(*sizes, DTYPES["bfloat16, fp32 gradients"], activation=Activation.NONE), generator, device)


def test_linear_act_keeps_leading_dimensions(generator, device):
    cases.run(Case(6, 9, 11, DTYPES["mixed_float16"], lead=(2, 3)), generator, device)


@pytest.mark.parametrize("dtype", [f16, bf16, f32])
def test_linear_act_exact_integers(dtype, generator, device):
    """Every sum is an integer below 2**24, so nothing may be off by a bit."""
    x, weight, bias, grad_out = _integers(((33, 70), (40, 70), (40,), (33, 40)), dtype, generator, device)
    dtypes = cases.Dtypes(dtype, dtype, dtype, f32, f32)
    out, saved, _ = forward(x, weight, bias, dtypes)
    assert torch.equal(out.double(), (x.double() @ weight.double().T + bias.double()).relu())
    _, grad_weight, grad_bias = backward(grad_out.float(), x, weight, saved, dtypes)
    grad_z = torch.where(out > 0, grad_out.double(), 0)
    assert torch.equal(grad_weight.double(), grad_z.T @ x.double())
    assert torch.equal(grad_bias.double(), grad_z.sum(0))


def test_linear_act_is_right_in_every_case(device, monkeypatch):
    monkeypatch.setattr(linear_act_cases, "FEW", ((9, 24, 40),))
    for op in (forward_op, backward_op):
        assert checks.wrong(op, "triton", device) is None


def test_linear_act_nonfinite_stays_in_its_row(generator, device):
    x, weight, bias, _ = Case(20, 40, 33, DTYPES["float16"]).tensors(generator, device)
    expected, _, _ = forward(x, weight, bias, DTYPES["float16"])
    x[7, 3], x[11, 0] = NAN, INF
    out, _, _ = forward(x, weight, bias, DTYPES["float16"])
    bounds.check_forward(out, x, weight, bias, Activation.RELU, f16, bounds.accumulator_roundoff(device, f16))
    others = [row for row in range(20) if row not in (7, 11)]
    assert same_bits(out[others], expected[others])


def test_linear_act_reads_nothing_behind_the_edges(generator, device):
    """Every operand lies inside NaN: an edge without its mask shows, on K even where the other operand is 0 there."""
    dtypes = DTYPES["mixed_float16"]
    tensors = Case(19, 37, 21, dtypes).tensors(generator, device)
    results = []
    for x, weight, bias, grad_out in (tensors, map(_inside_nan, tensors)):
        out, saved, _ = forward(x, weight, bias, dtypes)
        results.append((out, saved, *backward(grad_out, _inside_nan(x.half()), weight, saved, dtypes)))
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("mask", [(True, False, False), (False, True, False), (False, False, True), (False, False, False)])
def test_linear_act_computes_what_is_asked_for(mask, generator, device):
    dtypes = DTYPES["mixed_float16"]
    x, weight, bias, grad_out = Case(5, 6, 7, dtypes).tensors(generator, device)
    _, saved, x_compute = forward(x, weight, bias, dtypes)
    every = backward(grad_out, x_compute, weight, saved, dtypes)
    some = backward(grad_out, x_compute if mask[1] else None, weight, saved, dtypes, output_mask=mask)
    for wanted, grad, full in zip(mask, some, every, strict=True):
        assert same_bits(grad, full) if wanted else grad.numel() == 0


def test_linear_act_deterministic(generator, device):
    """Twice the same bits, and rows in another order have the bits of their own."""
    dtypes = DTYPES["float16"]
    x, weight, bias, grad_out = Case(40, 33, 50, dtypes).tensors(generator, device)
    order = torch.randperm(40, generator=generator).to(device)
    out, saved, _ = forward(x, weight, bias, dtypes)
    again, saved_again, _ = forward(x, weight, bias, dtypes)
    assert same_bits(out, again)
    assert torch.equal(saved, saved_again)
    assert same_bits(forward(x[order], weight, bias, dtypes)[0], out[order])
    grads, grads_again = (backward(grad_out, x, weight, saved, dtypes) for _ in range(2))
    assert all(same_bits(a, b) for a, b in zip(grads, grads_again, strict=True))


def test_linear_act_opcheck(generator, device):
    """Schema and fake agree with what the kernels return: strides of the mask included."""
    dtypes = DTYPES["mixed_float16"]
    x, weight, bias, grad_out = Case(3, 35, 5, dtypes).tensors(generator, device)
    utils = ("test_schema", "test_faketensor")
    args = (x, weight, bias, None, 1, dtypes.compute, dtypes.out, 1)
    torch.library.opcheck(torch.ops.mpkernels.linear_act, args, test_utils=utils)
    _, saved, x_compute = forward(x, weight, bias, dtypes)
    args = (grad_out, x_compute, weight, None, saved, 1, dtypes.compute, f32, f32, f32, [True, False, True])
    torch.library.opcheck(torch.ops.mpkernels.linear_act_backward, args, test_utils=utils)


# ----- by tensor descriptors ---------------------------------------------------------------


@pytest.fixture
def gemms(device, monkeypatch) -> list[triton._Launch]:
    """The GEMMs that were launched since; skips where the GPU has no descriptors."""
    if not INTERPRETED and torch.cuda.get_device_capability(device)[0] not in (9, 10):
        pytest.skip("descriptors are for sm_90 and sm_100")
    return _noted(monkeypatch)


def _noted(monkeypatch) -> list[triton._Launch]:
    launches, make = [], triton._gemm_launch.__wrapped__  # without its cache, as tests change what it depends on
    monkeypatch.setattr(triton, "_gemm_launch", lambda *args: launches.append(make(*args)) or launches[-1])
    return launches


def _by_tma(gemms) -> list[bool]:
    return [launch.by_tma for launch in gemms]


ALIGNED = {  # M, N, K of whole and of partial tiles, several to a program; the smallest that a descriptor takes
    "whole tiles": (64, 128, 64),
    "partial": (40, 104, 72),
    "many tiles": (72, 200, 40),
    "smallest": (8, 8, 8),
}


@pytest.mark.parametrize(
    "name, sizes", each_once(("float16", "bfloat16", "bfloat16, fp32 gradients", "float16, fp32 gradients"), ALIGNED)
)
def test_linear_act_by_descriptors(sizes, name, generator, device, gemms):
    cases.run(Case(*ALIGNED[sizes], DTYPES[name]), generator, device)
    assert _by_tma(gemms) == [True] * 5  # forward, and backward by the mask and by the output


def test_linear_act_by_descriptors_without_bias_and_mask(generator, device, gemms):
    cases.run(Case(24, 72, 40, DTYPES["float16"], bias=False, activation=Activation.NONE), generator, device)
    assert _by_tma(gemms) == [True] * 3


@pytest.mark.parametrize("name, sizes", each_once(("float16", "bfloat16, fp32 gradients"), ALIGNED))
def test_linear_act_below_by_descriptors(sizes, name, generator, device, gemms):
    """The same, by the pointer kernel where x is what is selected by, with the same bits."""
    case = Case(*ALIGNED[sizes], DTYPES[name], activation=Activation.NONE)
    test_fused_backward.run(case, generator, device, by_epilogue=True)
    assert _by_tma(gemms) == [True] * 5 + [False] + [True] * 5  # forward; dgrad and wgrad, five times, the third by x


def test_linear_act_below_by_descriptors_selects(device, gemms):
    """An inf or NaN behind a 0 of the previous layer is 0 in both gradients; rows behind the edge add nothing, not even NaN."""
    x = torch.tensor([0.0, 1.0, 1.0] + [0.0] * 37, dtype=f16, device=device).repeat(8, 1)
    _, mask, _ = forward(x, torch.eye(40, dtype=f16, device=device), None, DTYPES["float16"])
    gemms.clear()
    for value in (3.0, INF, NAN):
        grad_out, weight = torch.ones(8, 8, dtype=f16, device=device), torch.zeros(8, 40, dtype=f16, device=device)
        weight[0] = value
        grads = cases.backward_below(grad_out, x, weight, None, mask, DTYPES["float16"], Activation.NONE)
        expected = torch.where(x > 0, value, 0.0).half()
        assert same_bits(grads[0], expected)
        assert same_bits(grads[3], 8 * expected[0])
    assert _by_tma(gemms) == [True] * 6


def test_linear_act_casts_a_wide_weight_for_descriptors(generator, device, gemms):
    """fp32 weights of many rows are cast in a pass of their own, of few rows in the kernel that takes any."""
    cases.run(Case(triton.CAST_FIRST, 40, 24, DTYPES["mixed_float16 inside"], save=0), generator, device)
    assert _by_tma(gemms) == [True] * 3
    gemms.clear()
    cases.run(Case(16, 40, 24, DTYPES["mixed_float16 inside"], save=0), generator, device)
    assert _by_tma(gemms) == [False, False, True]  # wgrad reads no weight


def test_linear_act_descriptors_and_pointers_agree(generator, device, gemms, monkeypatch):
    """On integers, where every sum is exact: bit for bit, the mask and its tail included, a NaN row too."""
    tensors = _integers(((40, 72), (104, 72), (104,), (40, 104)), f16, generator, device)
    tensors[0][3, 5] = NAN
    results = []
    for sms in (tile_config.TMA_SMS, ()):
        monkeypatch.setattr(tile_config, "TMA_SMS", sms)
        x, weight, bias, grad_out = tensors
        out, saved, _ = forward(x, weight, bias, DTYPES["float16"])
        results.append((out, saved, *backward(grad_out, x, weight, saved, DTYPES["float16"])))
        assert not bits_of(saved, 104)[:, 104:].any()
    assert _by_tma(gemms) == [True] * 3 + [False] * 3
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


def test_linear_act_descriptors_read_nothing_behind_the_edges(generator, device, gemms):
    """Operands inside NaN, on rows that a tensor map can describe."""
    dtypes = DTYPES["float16"]
    x, weight, bias, grad_out = Case(40, 104, 72, dtypes).tensors(generator, device)
    results = []
    for wrap in (lambda tensor: tensor, _inside_nan):
        out, saved, _ = forward(wrap(x), wrap(weight), bias, dtypes)
        results.append((out, saved, *backward(wrap(grad_out), wrap(x), wrap(weight), saved, dtypes)))
    assert _by_tma(gemms) == [True] * 6
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


def test_linear_act_allocator_is_there_in_autograds_thread_and_ours_alone(generator, device, gemms, monkeypatch):
    """triton.set_allocator fills a ContextVar: other threads do not see it, and the user's is not to be replaced."""
    allocation = importlib.import_module("triton.runtime._allocation")
    before, seen, launch = allocation._allocator.get(), [], triton._launch_tma

    def launch_and_look(*args):
        launch(*args)
        seen.append(allocation._allocator.get())

    monkeypatch.setattr(triton, "_launch_tma", launch_and_look)
    x, weight, bias, grad_out = Case(16, 32, 24, DTYPES["float16"]).tensors(generator, device)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    with ThreadPoolExecutor(1) as pool:
        out = linear_act(*leaves, activation="relu")
        pool.submit(out.backward, grad_out).result()
        assert pool.submit(allocation._allocator.get).result() is before
    assert seen == [triton._allocate] * 3
    assert allocation._allocator.get() is before
    assert _by_tma(gemms) == [True] * 3


def test_linear_act_tuned_tiles_are_checked_written_and_used(generator, device, gemms, monkeypatch, tmp_path):
    """A tile that nothing else chooses, to tell it: raced, written, read by the next process, launched."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    other, tma_tiles = tile_config.TmaTile(32, 32, 32, 4, 1), tile_config.tma_tiles
    monkeypatch.setattr(tile_config, "tma_tiles", lambda sm, operand, out, specializes: (other,))
    tune = importlib.import_module("mpkernels.tune")
    found = {(device, tuned_table.gemm_key(*p)): 24 for p in (
        ("fprop", 24, 40, 16, Activation.RELU, f16, f16, f16), ("backward", 24, 40, 16, Activation.RELU, f16, f16, f16, f16),
    )}  # fmt: skip
    monkeypatch.setattr(tuned_table, "tables", {})
    written = tune.tune_problems(found, rounds=1)
    assert sorted(name.split()[0] for name in written) == ["backward", "dgrad", "fprop", "wgrad"]
    assert "triton 32x32x32 w4 s1 parts1" in tune.shown(written)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("MPKERNELS_BACKEND", "linear_act=triton,linear_act_backward=triton")
    monkeypatch.setattr(tuned_table, "tables", {})
    monkeypatch.setattr(tile_config, "tma_tiles", lambda *args: (other, *tma_tiles(*args)))
    launched = _noted(monkeypatch)
    cases.run(Case(24, 40, 16, DTYPES["float16"], save=0), generator, device)
    assert [launch.constants["BLOCK_M"] for launch in launched] == [32] * 3
    launched.clear()
    cases.run(Case(24, 40, 24, DTYPES["float16"], save=0), generator, device)
    assert 32 not in [launch.constants["BLOCK_M"] for launch in launched]


# ----- which kernel, which tile ---------------------------------------------------------------


def _operand(shape, dtype=f16, stride=None, misalignment=0):
    return tile_config.Operand(dtype, shape, stride or (shape[1], 1), misalignment)


A, B, OUT = _operand((64, 32)), _operand((32, 48), stride=(1, 32)), _operand((64, 48))
BIG = [_operand((8192, 8192)), _operand((8192, 8192), stride=(1, 8192)), _operand((8192, 8192))]
RUNGS = {
    "sm80": (dict(sm=80), "needs sm90 or sm100, got sm80"),
    "fp32": (dict(a=A._replace(dtype=f32)), "one 16-bit dtype"),
    "a wider weight": (dict(b=B._replace(dtype=f32)), "one 16-bit dtype"),
    "two 16-bit dtypes": (dict(b=B._replace(dtype=bf16)), "one 16-bit dtype"),
    "fp64 out": (dict(out=OUT._replace(dtype=f64)), "at most 32 bits of result"),
    "K=0": (dict(a=_operand((64, 0)), b=_operand((0, 48))), "a needs sizes from 1"),
    "M=2**31": (dict(a=A._replace(shape=(1 << 31, 32))), "a needs sizes from 1 to 2"),
    "every second column": (dict(a=A._replace(stride=(64, 2))), "a needs a stride of 1"),
    "expanded": (dict(a=A._replace(stride=(0, 1))), "a needs rows that do not overlap"),
    "overlapping columns": (dict(b=B._replace(stride=(1, 24))), "b needs rows that do not overlap"),
    "odd pitch": (dict(b=B._replace(stride=(1, 36))), "b needs rows at multiples of 16 bytes, got a pitch of 72"),
    "odd address": (dict(a=A._replace(misalignment=2)), "a needs rows at multiples of 16 bytes.*address 2 past"),
    "odd rows of out": (dict(b=_operand((32, 44), stride=(1, 32)), out=_operand((64, 44))), "out needs rows at multiples"),
}


@pytest.mark.parametrize(("change", "reason"), RUNGS.values(), ids=RUNGS)
def test_linear_act_alignment_ladder(change, reason):
    """One rung at a time, each with its reason; then the pointer kernel has a tile."""
    ladder = dict(sm=90, a=A, b=B, out=OUT)
    assert tile_config.tma_why_not(**ladder) is None
    assert re.search(reason, tile_config.tma_why_not(**ladder | change))
    operands = ladder | change
    assert not tile_config.plan(operands.pop("sm"), 132, True, *operands.values()).by_tma


@pytest.mark.parametrize("sm", [80, 86, 89, 90, 100])
def test_linear_act_tile_follows_the_size(sm):
    """Large results get the largest tile, small ones the smallest; odd strides get few registers."""
    every = tile_config.tiles(sm, f16, f16, True)
    assert tile_config.choose(8192, 8192, every) == every[0]
    assert tile_config.choose(64, 64, every) == every[-1]
    assert tile_config.choose(8192, 8192, tile_config.tiles(sm, f16, f32, False)) not in every


def test_linear_act_plan_is_persistent_and_specialized_where_it_can_be():
    for sm, specializes in ((90, True), (90, False), (100, True)):
        plan = tile_config.plan(sm, 132, specializes, *BIG)
        assert plan.by_tma
        assert plan.grid == (132,)
        assert plan.options["SPECIALIZE"] == (sm == 90 and specializes)
        assert (plan.options["A_IS_KM"], plan.options["B_IS_NK"]) == (False, True)
    small = tile_config.plan(90, 132, True, A, B, OUT)
    assert small.grid == (1,)


@pytest.mark.parametrize("sm", [80, 86, 89, 90, 100])
def test_linear_act_plan_of_richer_epilogues(sm):
    """By descriptors for the previous layer, not specialized; by pointers for a slope, never with a tile that spills then."""
    fused = tile_config.plan(sm, 132, True, *BIG, fuses_prev=True)
    assert fused.by_tma == (sm in tile_config.TMA_SMS)
    assert not fused.options.get("SPECIALIZE")
    for how in (dict(non_relu_activation=True), dict(non_relu_activation=True, fuses_prev=True)):
        plan = tile_config.plan(sm, 132, True, *BIG, **how)
        assert not plan.by_tma
        assert plan.options["BLOCK_M"] * plan.options["BLOCK_N"] <= tile_config.LARGEST_HEAVY
    assert tile_config.plan(sm, 132, True, *BIG, accumulates=True) == tile_config.plan(sm, 132, True, *BIG)
    odd = tile_config.plan(sm, 132, True, *BIG[:2], BIG[2]._replace(dtype=f32, misalignment=4), accumulates=True)
    assert odd.options["BLOCK_M"] * odd.options["BLOCK_N"] <= tile_config.LARGEST_HEAVY


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({}, True),
        ({"specializes": False}, False),
        ({"fuses_prev": True}, False),
        ({"non_relu_activation": True}, False),
        ({"BLOCK_M": 3}, False),
        ({"num_stages": 99}, False),
        ({"more": 1}, False),
    ],
    ids=str,
)
def test_linear_act_plan_takes_a_tuned_tile_where_it_is_one_of_its_own(change, taken):
    """A packaged table outlives Triton's versions, and a file may say anything: what cannot run here is left aside."""
    tuned = tile_config._SM90_SPECIALIZED[2][1]
    fields = dataclasses.asdict(tuned) | {n: v for n, v in change.items() if n in ("BLOCK_M", "num_stages", "more")}
    how = {n: v for n, v in change.items() if n in ("fuses_prev", "non_relu_activation")}
    plan = tile_config.plan(90, 132, change.get("specializes", True), *BIG, tuple(fields.items()), **how)
    assert (plan.options.items() >= dataclasses.asdict(tuned).items()) == taken
    assert all(plan.options[name] != 3 for name in ("BLOCK_M", "BLOCK_N"))


@pytest.mark.parametrize("sm", [80, 86, 89, 90, 100])
@pytest.mark.parametrize("N, K", [(64, 64), (4096, 1024), (4096, 16384), (100, 36)])
def test_linear_act_plan_is_the_same_for_every_batch(sm, N, K):
    """batch_invariant: one kernel and one tile whatever M is; without it a larger M gets a larger tile."""
    found = [
        tile_config.plan(
            sm, 132, True, _operand((M, K)), _operand((K, N), stride=(1, K)), _operand((M, N)), batch_invariant=True
        )
        for M in (1, 2, 17, 128, 129, 4096, 100_000)
    ]  # fmt: skip
    assert len({(plan.by_tma, *plan.options.items()) for plan in found}) == 1


def _integers(shapes, dtype, generator, device):
    return [torch.randint(-3, 4, shape, generator=generator).to(device, dtype) for shape in shapes]


def _inside_nan(tensor):
    """The same values as a view with NaN on every side."""
    room = tensor.new_full([size + 64 for size in tensor.shape], NAN)
    view = room[tuple(slice(32, 32 + size) for size in tensor.shape)]
    return view.copy_(tensor)
