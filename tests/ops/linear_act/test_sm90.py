# SPDX-License-Identifier: Apache-2.0
"""linear_act as `native` on Hopper: the op's implementation over its kernels, their source run on the CPU by tests/emulator."""

import functools
import itertools
import re
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mpkernels.ops.linear_act import Activation, schema, sm90
from mpkernels.ops.linear_act.call import BackwardCall, CallKey, ForwardCall
from mpkernels.ops.linear_act.epilogues import empty_mask
from mpkernels.runtime import native
from mpkernels.testing import gemm
from mpkernels.testing import linear_act_cases as proven
from tests import bounds, linear_act_cases
from tests.emulator import host_kernels
from tests.linear_act_cases import DTYPES, LAYOUTS, Case, bits_of, data, same_bits
from tests.ops.linear_act import test_fused_backward

f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
HALVES = (f16, bf16)


HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
LIBRARY = "mpkernels_hopper"


@pytest.fixture(params=["cpu"] + ["cuda"] * HOPPER)
def device(request, monkeypatch) -> torch.device:
    """A Hopper GPU where there is one, and tests/emulator as a chip of 4 multiprocessors on which every order may happen."""
    if request.param == "cpu":
        reason = host_kernels.why_not()
        if reason is not None:
            pytest.skip(reason)
        host_kernels.library(LIBRARY).host_seed(zlib.crc32(request.node.name.encode()))
        monkeypatch.setattr(native, "ops", host_kernels.HostOps(library=LIBRARY))
        monkeypatch.setattr(sm90, "_num_sms", lambda device: 4)
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def implementation(monkeypatch):
    """The cases of the op go to `native`; what is allocated there is NaN until it is written."""
    for module in (linear_act_cases, test_fused_backward):
        monkeypatch.setattr(module, "forward", forward)
        monkeypatch.setattr(module, "backward", backward)
    torch.use_deterministic_algorithms(True)  # so that torch fills what it allocates
    yield
    torch.use_deterministic_algorithms(False)


def forward(x, weight, bias, dtypes, activation=Activation.RELU, save=1, copy=None):
    call = ForwardCall(x, weight, bias, copy, int(activation), dtypes.compute, dtypes.out, save)
    return schema.fill_forward(call, sm90.linear_act(call))


def backward(grad_out, x, weight, saved, dtypes, activation=Activation.RELU, copy=None, output_mask=(True,) * 3, prev=()):
    gradients = (dtypes.x, dtypes.grad, dtypes.grad)
    call = BackwardCall(grad_out, x, weight, copy, saved, int(activation), dtypes.compute, *gradients, list(output_mask), *prev)
    return schema.fill_backward(call, sm90.linear_act_backward(call))[: 4 if prev else 3]


def fprop(x, weight, bias, relu, out_dtype, config):
    """(out, mask)."""
    M, N = x.shape[0], weight.shape[0]
    out, mask = x.new_full((M, N), torch.nan, dtype=out_dtype), empty_mask(x, M, N) if relu else None
    native.ops.linear_act_fprop(x, weight, bias, relu, out, mask, *sm90.TileConfig(*config), 1)
    return out, mask


# ----- the op ---------------------------------------------------------------

SIZES = (
    (1, 8, 8),
    (65, 72, 40),
    (130, 264, 64),
    (200, 136, 328),
    (257, 8, 72),
    (2, 520, 8),
    (1030, 8, 16),
)  # the last splits its rows


@pytest.mark.parametrize("name", [name for name, d in DTYPES.items() if d.compute in HALVES and d.out != f64])
def test_hopper_matches_reference(name, generator, device):
    """Forward, backward by the mask and by the output, every combination of dtypes that the kernels store."""
    for i, (M, N, K) in enumerate(SIZES[:3]):
        linear_act_cases.run(Case(M, N, K, DTYPES[name], bias=i != 1, activation=Activation(i != 2)), generator, device)


@pytest.mark.parametrize("M, N, K", SIZES)
@pytest.mark.parametrize("name", ["float16", "mixed_bfloat16"])
def test_hopper_odd_shapes(M, N, K, name, generator, device):
    linear_act_cases.run(Case(M, N, K, DTYPES[name]), generator, device)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "unaligned"])
def test_hopper_strided(layout, generator, device):
    linear_act_cases.run(Case(70, 136, 72, DTYPES["float16"], layout=layout), generator, device)
    linear_act_cases.run(
        Case(70, 136, 72, DTYPES["mixed_float16"], layout=layout, activation=Activation.NONE), generator, device
    )


@pytest.mark.parametrize("M, N, K", [(0, 8, 8), (8, 0, 8), (8, 16, 0), (0, 0, 0)])
def test_hopper_empty(M, N, K, generator, device):
    linear_act_cases.run(Case(M, N, K, DTYPES["mixed_float16"]), generator, device)


@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(N=12), "multiples of 8 .* got 16 and 12"),
        (dict(K=20), "multiples of 8 .* got 20 and 16"),
        (dict(out=f64), "torch.float16 or torch.float32, got torch.float64"),
        (dict(out=bf16), "torch.float16 or torch.float32, got torch.bfloat16"),
    ],
)
def test_hopper_refuses_with_the_reason(change, reason):
    sizes = dict(N=16, K=16, out=f16) | change
    key = CallKey(torch.device("cuda"), f16, sizes["out"], Activation.RELU, sizes["N"], sizes["K"])
    assert re.search(f"needs .*{reason}", sm90.why_not(key))


HALF = torch.zeros(40, 64, dtype=f16)
LADDER = {
    "as it is": (HALF, None),
    "rows of a wider one": (HALF[:, 8:40], None),
    "one column": (HALF[:, :1], None),
    "transposed": (HALF.t(), "needs contiguous rows, got a stride of 64"),
    "every second column": (HALF[:, ::2], "needs contiguous rows, got a stride of 2"),
    "expanded": (HALF[:1].expand(9, 64), "needs rows that do not overlap, got a pitch of 0 for 64 elements"),
    "overlapping": (HALF.view(-1).as_strided((9, 64), (8, 1)), "needs rows that do not overlap, got a pitch of 8"),
    "odd pitch": (HALF.view(-1)[:300].view(10, 30)[:, :24], "needs rows at multiples of 16 bytes, got a pitch of 60"),
    "odd address": (HALF[:, 1:41], "needs rows at multiples of 16 bytes, got a pitch of 128 and an address 2 past one"),
}


@pytest.mark.parametrize(("matrix", "reason"), LADDER.values(), ids=LADDER)
def test_hopper_alignment_ladder(matrix, reason):
    """What TMA cannot read is copied, what it can is not."""
    why_not = sm90.tma_why_not(matrix)
    assert (why_not or "").startswith(reason or "")
    assert (why_not is None) == (reason is None)
    given = sm90._matrix(matrix)
    assert (given is matrix) == (reason is None)
    assert torch.equal(given, matrix)
    assert sm90.tma_why_not(given) is None or matrix.shape[1] % 8


@pytest.mark.parametrize(
    "block", [pytest.param(n, marks=pytest.mark.sweep if n < 5 else pytest.mark.release) for n in range(10)]
)
def test_hopper_random_sizes(block, device):
    """Any sizes in multiples of 8, layouts and dtypes; 2000 on a GPU."""
    random, torch_random = np.random.default_rng(block), torch.Generator().manual_seed(block)
    names = [name for name, d in DTYPES.items() if d.compute in HALVES and d.out != f64]
    for _ in range(200 if device.type == "cuda" else 5):
        M, N, K = (int(random.integers(1, limit)) for limit in (600, 80, 80))
        case = Case(
            M, 8 * N, 8 * K, DTYPES[random.choice(names)], bool(random.random() < 0.7), Activation(int(random.random() < 0.8)),
            layout=random.choice([layout for layout in LAYOUTS if layout != "unaligned"]),
        )  # fmt: skip
        linear_act_cases.run(case, torch_random, device)


# ----- fprop ---------------------------------------------------------------


@pytest.mark.parametrize("bias_dtype", [f16, bf16, f32, f64])
def test_hopper_fprop_adds_the_bias_unrounded(bias_dtype, generator, device):
    x, weight = (torch.zeros(rows, 8, dtype=f16, device=device) for rows in (8, 136))
    bias = data((272,), bias_dtype, "normal", generator).to(device)[::2]
    out, _ = fprop(x, weight, bias, False, f32, (128, 1, 1))
    assert torch.equal(out, bias.float().expand(8, 136))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("out_dtype", [None, f32], ids=["16-bit", "fp32"])
def test_hopper_fprop_nan_zero_and_overflow(dtype, out_dtype, device):
    """NaN goes through and its bit is 1; both zeros and what underflows are 0; a row with NaN leaves the tail bits 0."""
    out_dtype = out_dtype or dtype
    tiny = bounds.least_subnormal(dtype) ** 0.5 / 2  # squared it rounds to 0
    values = [1.0, -1.0, torch.nan, torch.inf, -torch.inf, 0.0, -0.0, tiny, -tiny, 60000.0]
    x, weight = (torch.zeros(rows, 8, dtype=dtype, device=device) for rows in (len(values), 40))
    x[:, 0] = torch.tensor(values)
    weight[::2, 0] = tiny
    weight[1::2, 0] = 2.0
    out, mask = fprop(x, weight, None, True, out_dtype, (128, 1, 1))
    bounds.check_forward(out, x, weight, None, Activation.RELU, dtype, bounds.accumulator_roundoff(device, dtype))
    assert out[2].isnan().all()
    bits = bits_of(mask, 40)
    assert (bits[:, :40] == ~(out <= 0).cpu().numpy()).all()
    assert bits[2, :40].all()
    assert not bits[[1, 5, 6]][:, :40].any()
    assert bits[7, 0] == (out_dtype == f32)
    assert not bits[:, 40:].any()


def test_hopper_fprop_same_bits_for_any_number_of_rows(generator, device):
    x, weight = (data((rows, 200), f16, "normal", generator).to(device) for rows in (300, 136))
    out, _ = fprop(x, weight, None, True, f16, (128, 2, 2))
    for M in (1, 130):
        for config in ((128, 1, 1), (256, 2, 4)):
            assert same_bits(fprop(x[:M], weight, None, True, f16, config)[0], out[:M])


# ----- dgrad ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["float16", "mixed_bfloat16"])
@pytest.mark.parametrize("activation", [Activation.NONE, Activation.RELU])
def test_hopper_gradients_of_the_previous_layer(name, activation, generator, device):
    test_fused_backward.run(Case(130, 72, 136, DTYPES[name], activation=activation), generator, device)


# ----- wgrad ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("M, N, K", [(130, 72, 136), (1030, 8, 16), (0, 8, 8)])  # the second splits its rows
def test_hopper_adds_grad_weight(M, N, K, shift, dtype, generator, device):
    linear_act_cases.check_adds_grad_weight(sm90.linear_act_backward, (M, N, K), dtype, shift, generator, device)


# ----- tiles of a GEMM ---------------------------------------------------------------


SMS = 132
LENGTHS = (1, 128, 384, 512, 1024, 1536, 2304, 3072, 4096, 5120, 8192, 14336)


@pytest.mark.parametrize("num_sms", [1, 16, 114, SMS])
def test_hopper_config_is_the_best_by_the_model(num_sms):
    """Over a grid of shapes: one that runs, and no tile is done sooner; splits only where they pay."""
    for rows, columns, K in itertools.product(LENGTHS, LENGTHS, (8, 1024, 4096, 16384)):
        (whole, one), (config, splits) = (sm90.choose(rows, columns, K, num_sms, may_split=m) for m in (False, True))
        clocks = functools.partial(sm90.clocks, rows, columns, K)
        assert one == 1
        assert (whole.block_n, whole.ping_pong) in sm90.CLOCKS
        assert whole.cluster in (1, 2)
        assert 1 <= splits <= max(1, -(-K // 64) // sm90.K_BLOCKS_PER_SPLIT)
        assert all(clocks(whole) <= clocks(whole._replace(block_n=n, ping_pong=p)) for n, p in sm90.CLOCKS)
        assert splits == 1 or clocks(config, splits) < clocks(whole)


@pytest.mark.parametrize("rows, columns, K, block_n", [
    (8192, 8192, 8192, 256), (16384, 4096, 1024, 256), (4096, 4096, 4096, 256),  # most operations for a byte
    (3072, 3072, 3072, 192), (2304, 2304, 2304, 192), (1536, 1536, 1536, 192),  # 2.2, 1.2 and half a wave of 256
    (512, 4096, 1024, 128), (1024, 1024, 1024, 128), (1, 8, 8, 128),  # less than a wave of any
])  # fmt: skip
def test_hopper_config_of_known_shapes(rows, columns, K, block_n):
    assert sm90.choose(rows, columns, K, SMS, may_split=False)[0].block_n == block_n


@pytest.mark.parametrize("rows, columns, K, ping_pong", [
    (16384, 4096, 512, True), (16384, 3072, 768, True), (65536, 768, 256, True),  # many tiles of few k-blocks
    (16384, 4096, 2048, False), (8192, 8192, 8192, False),  # an epilogue is little of a tile
    (8192, 768, 768, False), (1536, 1536, 1536, False),  # three tiles for a block or fewer: the last epilogue is twice as long
])  # fmt: skip
def test_hopper_ping_pong_where_epilogues_count(rows, columns, K, ping_pong):
    config, splits = sm90.choose(rows, columns, K, SMS)
    assert (config.ping_pong, splits) == (ping_pong, 1)
    assert config.block_n == 192 or not ping_pong


@pytest.mark.parametrize("role", ["fprop", "dgrad", "wgrad"])
def test_hopper_proof_has_every_tile(role):
    """On the GPU that it is for: each tile is that of a case or of a race."""
    shapes = [*proven.MANY_TILES, *((M, N, K) for M, K, N in gemm._SIZES[False])]
    gemms = [{"fprop": (M, N, K), "dgrad": (M, K, N), "wgrad": (N, K, M)}[role] for M, N, K in shapes]
    chosen = [sm90.choose(*sizes, SMS)[0] for sizes in gemms]
    assert {(config.block_n, config.ping_pong) for config in chosen} == sm90.CLOCKS.keys()


def test_hopper_splits_fill_the_chip():
    """Where a small result leaves SMs idle and K is long; not where the parts cost more than they gain."""
    splits = lambda *sizes: sm90.choose(*sizes, SMS)[1]
    assert splits(1024, 1024, 16384) > 1
    assert splits(128, 4096, 4096) > 1
    assert splits(1024, 1024, 512) == splits(8192, 8192, 16384) == splits(4096, 4096, 1024) == 1


def test_hopper_split_sums_have_the_epilogue(monkeypatch, generator, device):
    """fprop and dgrad in parts, which are added in order: the bias, the ReLU and its mask are those of the sum."""
    monkeypatch.setattr(sm90, "_num_sms", lambda device: 16)
    monkeypatch.setattr(sm90, "SUM_CLOCKS", 0)
    monkeypatch.setattr(sm90, "K_BLOCKS_PER_SPLIT", 1)
    sm90.choose.cache_clear()
    M, N, K = 130, 200, 328
    x, weight, grad_out = (torch.randn(*s, generator=generator).half().to(device) for s in ((M, K), (N, K), (M, N)))
    bias = torch.randn(N, generator=generator).to(device)
    assert sm90.choose(M, N, K, 16)[1] > 1 < sm90.choose(M, K, N, 16)[1]
    out, mask, _ = sm90.linear_act(ForwardCall(x, weight, bias, None, Activation.RELU, f16, f16, 1))
    bounds.check_forward(out, x, weight, bias, 1, f16, random_sign=True)
    assert np.array_equal(bits_of(mask, N)[:, :N], (out != 0).cpu().numpy())
    again, _, _ = sm90.linear_act(ForwardCall(x, weight, bias, None, Activation.RELU, f16, f16, 0))
    assert same_bits(again, out)
    grad_x = sm90.linear_act_backward(
        BackwardCall(grad_out, None, weight, None, None, 0, f16, f16, f16, f16, [True, False, False])
    )[0]
    bounds.check_backward((grad_x, None, None), grad_out, grad_x, weight, None, f16, random_sign=True)
    sm90.choose.cache_clear()


@pytest.mark.parametrize("columns", [8, 1024, 4096, 16384])
def test_hopper_batch_invariant_has_one_config(columns, monkeypatch):
    """One config whatever the number of rows, and no sum in parts: fprop has none."""
    configs = []
    ops = SimpleNamespace(linear_act_fprop=lambda x, weight, bias, relu, out, mask, *config: configs.append(config[:-1]))
    monkeypatch.setattr(native, "ops", ops)
    monkeypatch.setattr(sm90, "_num_sms", lambda device: 132)
    weight = torch.zeros(columns, 8, dtype=f16)
    for rows in (1, 2, 127, 128, 129, 1024, 4096):
        for invariant in (True, False):
            x = torch.zeros(rows, 8, dtype=f16)
            sm90.linear_act(ForwardCall(x, weight, None, None, Activation.RELU, f16, f16, 0, invariant))
    assert len(set(configs[::2])) == 1
    assert len(set(configs[1::2])) > 1
