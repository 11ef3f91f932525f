# SPDX-License-Identifier: Apache-2.0
"""linear_act's Hopper kernels on the host emulator: all roles against fp64, on poisoned memory, in any order of events.

What this cannot prove: speed, the memory model, and whatever the emulator gets wrong.
"""

import math
import zlib

import pytest
import torch

from tests import bounds
from tests.emulator import host_kernels
from tests.emulator.host_kernels import HostOps
from tests.steps import raw

REASON = host_kernels.why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

LIBRARY = "mpkernels_hopper"
BLOCK_M, BLOCK_K = 128, 64
SUM_ROWS = 64  # rows of the matrix per row of column sums
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
# (block_n, cluster, num_sms, ping_pong): one or several tiles per block, clusters of one or two, whose second tile may lie
# outside
CONFIGS = [(256, 1, 100, False), (256, 2, 2, False), (128, 1, 2, False), (128, 2, 100, False), (192, 2, 2, False)]
CONFIGS += [(192, 1, 2, True), (192, 2, 4, True)]
SHAPES = [(1, 8, 8), (128, 256, 64), (200, 264, 136), (257, 520, 320), (385, 136, 72)]  # M, N and K of the GEMM


@pytest.fixture(autouse=True)
def seed(request):
    seed = zlib.crc32(request.node.name.encode())
    host_kernels.library(LIBRARY).host_seed(seed)
    return seed


def ops():
    return HostOps(library=LIBRARY)


class Poisoned:
    """A matrix inside memory that must not be written: `pad` elements after each row, a row before and one after."""

    def __init__(self, rows, columns, dtype, pad=8):
        integer = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
        pitch = -(-columns // 8) * 8 + pad
        self.memory = torch.full((rows + 2, pitch), -1, dtype=integer)  # a NaN in every float format
        self.view = self.memory.view(dtype)[1 : rows + 1, :columns]

    def check_only_view_is_written(self):
        rows, columns = self.view.shape
        outside = torch.ones_like(self.memory, dtype=torch.bool)
        outside[1 : rows + 1, :columns] = False
        assert self.memory[outside].eq(-1).all(), "a store outside of the matrix"


def operand(rows, columns, dtype, generator, pad=8):
    """NOTE: the padding beside it is NaN."""
    result = torch.full((rows, -(-columns // 8) * 8 + pad), math.nan, dtype=dtype)[:, :columns]
    result.copy_(torch.randn(rows, columns, generator=generator))
    return result


def positive_bits(mask, columns):
    """bool (rows, columns) of a mask whose other bits are 0."""
    bits = (mask[:, :, None] >> torch.arange(32) & 1).bool().reshape(mask.shape[0], -1)
    assert not bits[:, columns:].any(), "a bit beside the matrix"
    return bits[:, :columns]


def random_mask(rows, columns, generator):
    """(mask, bool (rows, columns)); the mask's pitch is longer than its rows."""
    positive = torch.randint(2, (rows, columns), generator=generator).bool()
    words = -(-columns // 32)
    padded = torch.zeros(rows, words * 32, dtype=torch.int64)
    padded[:, :columns] = positive
    values = (padded.view(rows, words, 32) << torch.arange(32)).sum(2)
    mask = torch.full((rows, words + 3), -1, dtype=torch.int32)[:, :words]
    mask.copy_(torch.where(values >= 2**31, values - 2**32, values))
    return mask, positive


# ----- fprop ----------------------------------------------------------------------------------------


def check_fprop(shape, config, dtype, out_dtype, bias_dtype, relu, generator):
    (M, N, K), out = shape, Poisoned(*shape[:2], out_dtype)
    x, weight = operand(M, K, dtype, generator), operand(N, K, dtype, generator)
    bias = None if bias_dtype is None else torch.randn(2 * N, generator=generator).to(bias_dtype)[::2]
    mask = Poisoned(M, -(-N // 32), torch.float32) if relu else None
    words = mask.view.view(torch.int32) if relu else None
    ops().linear_act_fprop(x, weight, bias, relu, out.view, words, *config, 1)
    out.check_only_view_is_written()
    bounds.check_forward(out.view, x, weight, bias, int(relu), dtype, random_sign=True)
    if relu:
        mask.check_only_view_is_written()
        assert positive_bits(words, N).equal(out.view != 0), "the mask is not that of the rounded output"
        bounds.check_mask(positive_bits(words, N), x, weight, bias, dtype, out_dtype)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fprop_matches_reference(shape, config, generator):
    k = (SHAPES.index(shape) + CONFIGS.index(config)) % 4
    dtype, bias_dtype = (F16, BF16)[k % 2], (F16, BF16, F32, torch.float64)[k]
    check_fprop(shape, config, dtype, dtype, bias_dtype, True, generator)


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("out_dtype", ["compute", "fp32"])
@pytest.mark.parametrize("relu", [False, True])
def test_fprop_of_every_dtype(dtype, out_dtype, relu, generator):
    out_dtype = dtype if out_dtype == "compute" else F32
    check_fprop((150, 200, 104), (128, 1, 3, False), dtype, out_dtype, None if relu else F32, relu, generator)


# ----- dgrad ----------------------------------------------------------------------------------------


def run_dgrad(grad_z, weight, mask, out_dtype, sums, config):
    out = Poisoned(grad_z.shape[0], weight.shape[1], out_dtype)
    ops().linear_act_dgrad(grad_z, weight, mask, out.view, sums, *config, 1)
    out.check_only_view_is_written()
    return out.view


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dgrad_matches_reference(shape, config, generator):
    """Alone; masked by the previous layer's ReLU, bit for bit; and the column sums of the masked result."""
    M, K, N = shape
    k = SHAPES.index(shape) + CONFIGS.index(config)
    dtype, out_dtype = (F16, BF16)[k % 2], ((F16, BF16)[k % 2], F32)[k // 2 % 2]
    grad_z, weight = operand(M, N, dtype, generator), operand(N, K, dtype, generator)
    grad_x = run_dgrad(grad_z, weight, None, out_dtype, None, config)
    bounds.check_backward((grad_x, None, None), grad_z, grad_x, weight, None, dtype, random_sign=True)

    mask, positive = random_mask(M, K, generator)
    sums = Poisoned(1, -(-M // SUM_ROWS) * K, F32)
    bands = sums.view.view(-1, K)
    selected = run_dgrad(grad_z, weight, mask, out_dtype, bands, config)
    assert raw([selected.contiguous()]) == raw([torch.where(positive, grad_x, 0)])
    sums.check_only_view_is_written()

    exact = torch.where(positive, run_dgrad(grad_z, weight, None, F32, None, config), 0)
    for i, band in enumerate(exact.split(SUM_ROWS)):
        nothing = band.new_zeros(len(band), 1), band.new_zeros(K, 1)
        bounds.check_backward((None, None, bands[i]), band, *nothing, None, dtype)


def test_dgrad_mask_selects(generator):
    """An inf or a NaN where the mask is 0 becomes 0, and enters no sum."""
    grad_z, weight = torch.ones(64, 8, dtype=F16), torch.zeros(8, 64, dtype=F16)
    weight[0, :3] = torch.tensor([math.inf, math.nan, 1.0])
    mask, sums = torch.zeros(64, 2, dtype=torch.int32), torch.empty(1, 64)
    mask[:, 0] = ~0b011
    grad_x = run_dgrad(grad_z, weight, mask, F16, sums, (128, 1, 1, False))
    expected = torch.zeros(64)
    expected[2] = 1
    assert grad_x.float().equal(expected.expand(64, 64))
    assert sums[0].equal(64 * expected)


# ----- wgrad ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_wgrad_matches_reference(shape, config, generator):
    N, K, M = shape
    k = SHAPES.index(shape) + CONFIGS.index(config)
    dtype, out_dtype = (F16, BF16)[k % 2], ((F16, BF16)[k % 2], F32)[k // 2 % 2]
    N = -(-N // 8) * 8
    grad_z, x, out = operand(M, N, dtype, generator), operand(M, K, dtype, generator), Poisoned(N, K, out_dtype)
    ops().linear_act_wgrad(grad_z, x, out.view, 1, *config)
    out.check_only_view_is_written()
    bounds.check_backward((None, out.view, None), grad_z, x, out.view, None, dtype, random_sign=True)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("splits", [2, 5])
def test_wgrad_split_over_rows(splits, config, generator):
    """Split-K: the partial results are fp32, one below the other in a workspace, and are added in order."""
    M, N, K = 5 * BLOCK_K - 3, 136, 264
    grad_z, x = operand(M, N, F16, generator), operand(M, K, F16, generator)
    rows = -(-N // (2 * BLOCK_M)) * 2 * BLOCK_M
    parts, out = Poisoned(splits * rows, K, F32, pad=0), Poisoned(N, K, F16)
    ops().linear_act_wgrad(grad_z, x, parts.view, splits, *config)
    parts.check_only_view_is_written()
    parts = parts.view.view(splits, rows, K)[:, :N]
    ops().linear_act_sum(parts, out.view)
    out.check_only_view_is_written()
    bounds.check_backward((None, out.view, None), grad_z, x, out.view, None, F16, random_sign=True)
    edges = [5 * i // splits * BLOCK_K for i in range(splits)] + [M]
    for part, begin, end in zip(parts, edges, edges[1:]):
        bounds.check_backward((None, part, None), grad_z[begin:end], x[begin:end], part, None, F16, random_sign=True)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_wgrad_adds(shape, config, generator):
    """With the bits of a product that is added afterwards; each element is read once and stored once."""
    N, K, M = -(-shape[0] // 8) * 8, *shape[1:]
    dtype = (F16, BF16)[SHAPES.index(shape) % 2]
    grad_z, x, out = operand(M, N, dtype, generator), operand(M, K, dtype, generator), Poisoned(N, K, F32)
    product, before = torch.empty(N, K), torch.randn(N, K, generator=generator)
    ops().linear_act_wgrad(grad_z, x, product, 1, *config)
    out.view.copy_(before)
    host_kernels.take_counts(LIBRARY)
    ops().linear_act_wgrad(grad_z, x, out.view, 1, *config, True)
    counts = host_kernels.take_counts(LIBRARY)
    assert raw([out.view.contiguous()]) == raw([before + product])
    out.check_only_view_is_written()
    assert (counts.loaded, counts.tma_stored) == (4 * N * K, 4 * N * K)


@pytest.mark.parametrize("splits", [2, 5])
def test_wgrad_adds_the_sum_of_parts(splits, generator):
    M, N, K = 5 * BLOCK_K - 3, 136, 264
    grad_z, x, out = operand(M, N, F16, generator), operand(M, K, F16, generator), Poisoned(N, K, F32, pad=1)
    rows, before, product = -(-N // (2 * BLOCK_M)) * 2 * BLOCK_M, torch.randn(N, K, generator=generator), torch.empty(N, K)
    parts = torch.full((splits * rows, K), math.nan)
    ops().linear_act_wgrad(grad_z, x, parts, splits, *CONFIGS[0])
    parts = parts.view(splits, rows, K)[:, :N]
    ops().linear_act_sum(parts, product)
    out.view.copy_(before)
    ops().linear_act_sum(parts, out.view, None, False, None, True)
    assert raw([out.view.contiguous()]) == raw([before + product])
    out.check_only_view_is_written()


# ----- tensor maps ----------------------------------------------------------------------------------


def test_tensor_maps_are_cached_by_address_and_shape(generator):
    """The same memory as matrices of other sizes, pitches and dtypes: the cache does not confuse them."""
    memory, weight, out = (torch.randn(64 * 64, generator=generator).half() for _ in range(3))
    views = [((64, 64), (64, 1), F16), ((32, 64), (64, 1), F16), ((64, 32), (64, 1), F16), ((128, 32), (32, 1), F16)]
    views += [((64, 64), (64, 1), BF16), ((64, 32), (32, 1), F16)]
    for shape, stride, dtype in views + views[::-1]:
        x = memory.view(dtype).as_strided(shape, stride)
        w, y = weight.view(dtype)[: 16 * shape[1]].view(16, -1), out.view(dtype)[: 16 * shape[0]].view(-1, 16)
        ops().linear_act_fprop(x, w, None, False, y.fill_(math.nan), None, 128, 1, 1, False, 1)
        bounds.check_forward(y, x, w, None, 0, dtype, random_sign=dtype == F16)


# ----- all roles ------------------------------------------------------------------------------------


def every_role(config, generator, repeat):
    """`repeat(run)` of each role; run() makes new outputs."""
    M, N, K = 330, 392, 200
    x, weight, grad_z = (operand(*s, F16, generator) for s in ((M, K), (N, K), (M, N)))
    mask_below, _ = random_mask(M, K, generator)

    def fprop():
        out, mask = torch.empty(M, N, dtype=F16), torch.empty(M, -(-N // 32), dtype=torch.int32)
        ops().linear_act_fprop(x, weight, None, True, out, mask, *config, 1)
        return [out, mask]

    def dgrad():
        sums = torch.empty(-(-M // SUM_ROWS), K)
        return [run_dgrad(grad_z, weight, mask_below, F16, sums, config).contiguous(), sums]

    def wgrad():
        out = torch.empty(N, K, dtype=F16)
        ops().linear_act_wgrad(grad_z, x, out, 1, *config)
        return [out]

    return [repeat(run) for run in (fprop, dgrad, wgrad)]


@pytest.mark.parametrize("block_n, ping_pong", [(128, False), (192, False), (192, True), (256, False)])
def test_schedule_and_config_do_not_matter(block_n, ping_pong, generator):
    """The same bits in every order of threads, copies and products, and for every number of blocks and cluster size."""
    state, results = generator.get_state(), []
    for seed, (cluster, blocks) in enumerate([(1, 1), (1, 5), (2, 2), (2, 6), (1, 100), (1, 100)]):
        host_kernels.library(LIBRARY).host_seed(seed)
        generator.set_state(state)
        results.append(every_role((block_n, cluster, blocks, ping_pong), generator, lambda run: raw(run())))
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("K, blocks", [(8, 1), (136, 2), (392, 1), (392, 5)])  # fewer and more k-blocks than stages
def test_ping_pong_has_the_bits_of_cooperative(cluster, K, blocks, generator):
    """All that the epilogues write and read, in 16 bits and in fp32, with and without split-K in uneven parts."""
    M, N = 330, 392
    x, weight, grad_z = (operand(*s, BF16, generator) for s in ((M, K), (N, K), (M, N)))
    bias, (mask_below, _) = torch.randn(N, generator=generator), random_mask(M, K, generator)

    def results(ping_pong):
        config, found = (192, cluster, blocks * cluster, ping_pong), []  # of 9 or 6 tiles
        for dtype in (BF16, F32):
            out, mask = torch.empty(M, N, dtype=dtype), torch.empty(M, -(-N // 32), dtype=torch.int32)
            ops().linear_act_fprop(x, weight, bias, True, out, mask, *config, 1)
            sums = torch.empty(-(-M // SUM_ROWS), K)
            grad_x = run_dgrad(grad_z, weight, mask_below, dtype, sums, config).contiguous()
            grad_weight = torch.empty(N, K, dtype=dtype)
            ops().linear_act_wgrad(grad_z, x, grad_weight, 1, *config)
            found += [out, mask, grad_x, sums, grad_weight]
        ops().linear_act_wgrad(grad_z, x, grad_weight, 1, *config, True)
        splits, rows = min(3, -(-K // BLOCK_K)), 2 * 2 * BLOCK_M
        if splits > 1:
            parts = torch.empty(splits, rows, N)
            ops().linear_act_fprop(x, weight, None, False, parts.view(-1, N), None, *config, splits)
            found.append(parts[:, :M].contiguous())
        return raw([*found, grad_weight])

    assert results(True) == results(False)


@pytest.mark.parametrize("block_n", [128, 256])
def test_ping_pong_is_of_192_columns(block_n):
    x, weight, out = (torch.zeros(8, 8, dtype=F16) for _ in range(3))
    with pytest.raises(RuntimeError, match=f"ping-pong needs a block_n of 192, got {block_n}"):
        ops().linear_act_fprop(x, weight, None, False, out, None, block_n, 1, 1, True, 1)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_bytes_moved(config, generator):
    """Operands once per tile of the other, b once for both blocks of a cluster; outputs once."""
    M, N, K = 330, 392, 200
    block_n, cluster = config[:2]
    tiles = lambda rows, columns: (-(-rows // (BLOCK_M * cluster)), -(-columns // block_n))

    def moved(run):
        host_kernels.take_counts(LIBRARY)
        run()
        counts = host_kernels.take_counts(LIBRARY)
        return counts.tma_loaded, counts.tma_stored

    def expected(rows, columns, K):
        clusters, across = tiles(rows, columns)
        return 2 * K * (rows * across + columns * clusters), 2 * rows * columns

    sizes = [(M, N, K), (M, K, N), (N, K, M)]
    assert every_role(config, generator, moved) == [expected(*size) for size in sizes]


def test_shared_memory_is_asked_for_once(generator):
    """Not at every call: a driver call each."""
    x, weight, out = (torch.randn(8, 8, generator=generator).half() for _ in range(3))
    ops().linear_act_fprop(x, weight, None, False, out, None, 128, 1, 1, False, 1)
    host_kernels.take_counts(LIBRARY)
    ops().linear_act_fprop(x, weight, None, False, out, None, 128, 1, 1, False, 1)
    counts = host_kernels.take_counts(LIBRARY)
    assert (counts.launches, counts.attributes) == (1, 0)


def test_outside_of_a_tensor_is_refused(generator):
    """The emulator checks every address against the tensors of the call."""
    x, weight, out = (torch.randn(64, 64, generator=generator).half() for _ in range(3))
    host_kernels.set_memory([out[:-1]], [x, weight], LIBRARY)
    with pytest.raises(RuntimeError, match="a store outside of every tensor"):
        host_kernels.module(LIBRARY).linear_act_fprop(x, weight, None, False, out, None, 128, 1, 1, False, 1)


@pytest.mark.sweep
@pytest.mark.parametrize("case", range(40))
def test_every_role_on_random_sizes(case, generator):
    rand = lambda n: int(torch.randint(n, (), generator=generator))
    block_n, ping_pong = [(128, False), (192, False), (192, True), (256, False)][rand(4)]
    config = (block_n, 1 + rand(2), 1 + rand(6), ping_pong)
    M, N, K = 1 + rand(600), 8 + 8 * rand(90), 8 + 8 * rand(60)
    dtype = (F16, BF16)[rand(2)]
    check_fprop((M, N, K), config, dtype, (dtype, F32)[rand(2)], (None, F16, F32)[rand(3)], bool(rand(2)), generator)
    grad_z, weight = operand(M, K, dtype, generator), operand(K, N, dtype, generator)
    grad_x = run_dgrad(grad_z, weight, None, dtype, None, config)
    bounds.check_backward((grad_x, None, None), grad_z, grad_x, weight, None, dtype, random_sign=True)
    x, out = operand(M, N, dtype, generator), Poisoned(K, N, dtype)
    ops().linear_act_wgrad(grad_z, x, out.view, 1, *config)
    out.check_only_view_is_written()
    bounds.check_backward((None, out.view, None), grad_z, x, out.view, None, dtype, random_sign=True)
