# SPDX-License-Identifier: Apache-2.0
"""The host emulator of sm_90a against definitions written here from the PTX ISA, and wrong kernels that it must detect.

The definitions use numpy and nothing of csrc or tests/emulator. Whether a Hopper GPU agrees is for test_sm90_probes.py to say.
"""

import numpy as np
import pytest
import torch

from tests import bounds
from tests.device import probes
from tests.emulator import host_kernels

REASON = host_kernels.why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

LIBRARY = "mpkernels_hopper"
SEEDS = 6
DTYPES = (torch.float16, torch.bfloat16)
IMAGE = 2 * probes.IMAGE_WORDS  # halves of shared memory that a probe fills
NAN = -1  # as bits of 16


def emulator(seed, written, read=()):
    """The library, its events in the order of `seed`, for a kernel that may touch these tensors."""
    library = host_kernels.library(LIBRARY)
    library.host_seed(seed)
    host_kernels.set_memory(list(written), list(read), LIBRARY)
    return library


def probe(name, parameters, given, out, seed=0):
    """What a probe of tests/device/probes.cu makes of `given`, in `out`; both of any dtype."""
    probes.ask(name, parameters, emulator(seed, [out], [given]), given.data_ptr(), out.data_ptr())
    return out


def copy_of(tensor, c0, c1, rows, *more):
    """Parameters of a probe of TMA: a box of `rows` at column c0 and row c1 of the tensor."""
    parameters = (c0, c1, *(more or (rows * 128,)))
    is_wide = tensor.itemsize == 4
    return (*parameters, *(0,) * (8 - len(parameters)), is_wide, *tensor.shape, tensor.stride(0), rows)


def random_bits(*shape, generator):
    return torch.randint(-(2**15), 2**15, shape, generator=generator).short()


# ----- TMA ------------------------------------------------------------------------------------------


def swizzled(byte):
    """Where the 128-byte swizzle puts a byte of an image of 128-byte rows: 16-byte chunk c of row r at chunk c xor r % 8."""
    row, chunk = byte // 128, byte % 128 // 16
    return row * 128 + (chunk ^ row % 8) * 16 + byte % 16


def box(tensor, rows, c0, c1):
    """The bits that a box of `rows` x 128 bytes has in shared memory, as int16."""
    width = 128 // tensor.itemsize
    padded = np.zeros((rows, width), dtype=f"i{tensor.itemsize}")
    bits = tensor.view({2: torch.int16, 4: torch.int32}[tensor.itemsize]).numpy()
    for r in range(rows):
        for c in range(width):
            if 0 <= c1 + r < bits.shape[0] and 0 <= c0 + c < bits.shape[1]:
                padded[r, c] = bits[c1 + r, c0 + c]
    plain, image = padded.view(np.int16).ravel(), np.empty(rows * 64, np.int16)
    halves = np.arange(rows * 64)
    image[swizzled(2 * halves) // 2] = plain
    return torch.from_numpy(image)


BOXES = [(64, 0, 0), (64, 64, 8), (256, 32, 0), (8, -3, -2), (16, 77, 60), (64, 5, -70), (64, 1000, 0), (200, -64, 0)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("at", BOXES, ids=str)
def test_tma_load_is_the_swizzled_box(dtype, at, generator):
    """And nothing behind it: 128 bytes stay as they were."""
    rows, c0, c1 = at
    tensor = random_bits(70, 104 * dtype.itemsize // 2, generator=generator).view(dtype)[:, :96]
    out = probe("load", copy_of(tensor, c0, c1, rows), tensor, torch.zeros(rows * 64 + 64, dtype=torch.int16))
    assert out[:-64].equal(box(tensor, rows, c0, c1))
    assert out[-64:].eq(0xABAB - 2**16).all()


def test_tma_multicast_writes_both_blocks(generator):
    tensor = random_bits(70, 64, generator=generator).view(torch.float16)
    for seed in range(SEEDS):
        halves = torch.full((2, 64 * 64), NAN, dtype=torch.int16)
        probe("multicast", copy_of(tensor, 8, 30, 32, 32 * 128, 32), tensor, halves, seed)
        assert halves.equal(box(tensor, 64, 8, 30).expand(2, -1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("at", BOXES, ids=str)
def test_tma_store_writes_what_lies_inside(dtype, at, generator):
    rows, c0, c1 = at
    source = random_bits(rows, 64, generator=generator).view(dtype)
    image = torch.nn.functional.pad(box(source, rows, 0, 0), (0, IMAGE - rows * 64))
    memory = torch.full((70, 104 * dtype.itemsize // 2), NAN, dtype=torch.int16).view(dtype)
    probe("store", copy_of(memory[:, :96], c0, c1, rows), image, memory)
    expected = torch.full_like(memory.view(torch.int16), NAN).view(dtype)
    for r in range(max(c1, 0), min(c1 + rows, 70)):
        begin, end = max(c0, 0), min(c0 + source.shape[1], 96)
        if begin < end:
            expected[r, begin:end] = source[r - c1, begin - c0 : end - c0]
    assert memory.view(torch.int16).equal(expected.view(torch.int16))


@pytest.mark.parametrize("tensor, rows", [
    (torch.zeros(64, 72).half()[:, 4:], 64), (torch.zeros(64, 68).half(), 64), (torch.zeros(0, 64).half(), 64),
    (torch.zeros(64, 72).half(), 257),
], ids=["address", "pitch", "empty", "box"])  # fmt: skip
def test_tensor_map_is_refused(tensor, rows):
    with pytest.raises(RuntimeError, match="cuTensorMapEncodeTiled refuses"):
        probe("load", copy_of(tensor, 0, 0, rows), tensor, torch.zeros(1))


def test_loads_are_checked_against_memory():
    """The map claims more rows than memory has."""
    memory = torch.zeros(66, 64).half()
    with pytest.raises(RuntimeError, match="a load outside of every tensor"):
        probe("load", copy_of(memory, 0, 0, 66), memory[:-1], torch.zeros(67 * 64).short())


# ----- stmatrix and rounding ------------------------------------------------------------------------


def test_stmatrix_places_pairs():
    """Row r of matrix i is where lane 8 i + r says; lane 4 r + c has its elements 2 c and 2 c + 1."""
    image = probe("stmatrix", (), torch.zeros(1), torch.zeros(2048, dtype=torch.int16))
    expected = torch.full_like(image, 0xABAB - 2**16)
    for i, r, c in np.ndindex(4, 8, 4):
        row, value = 8 * i + r, 4 * r + c
        at = swizzled(row % 16 * 128 + (2 + row // 16) * 16 + 4 * c) // 2
        expected[at], expected[at + 1] = value + 0x1000 * i, value + 0x100
    assert image.equal(expected)


def rounding(pairs):
    """By thread the words of the probe: packed fp16, bf16, the same of max(x, 0); max(x, 0) of both; which are nonzero."""
    return probe("round", (), pairs, torch.zeros(128, 8, dtype=torch.int32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_pack_rounds_to_nearest_even(dtype, generator):
    values = torch.randn(256, generator=generator) * torch.logspace(-30, 20, 256, base=2)
    ties = [1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 2.0**-25, 3 * 2.0**-25, 65519.0, 65520.0]
    special = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45, 3e38, -3e38]
    values[:16] = torch.tensor(ties + special)
    words, column = rounding(values), DTYPES.index(dtype)
    plain = bounds.rounded(values.double().numpy(), dtype)
    for packed, expected in ((words[:, column], plain), (words[:, 2 + column], np.where(plain < 0, 0, plain))):
        np.testing.assert_array_equal(packed.contiguous().view(dtype).double().numpy(), expected)
    np.testing.assert_array_equal(words[:, 4:6].reshape(-1).view(torch.float32), values.clamp(min=0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nonzero_of_every_value(dtype):
    """All 65536 patterns in either half, either sign of zero, subnormals and NaN included."""
    nonzero = lambda bits: ~(bits.short().view(dtype).float() == 0)
    column = DTYPES.index(dtype)  # of the probe: the first value of a thread is fp16, the second bf16
    for low in torch.arange(0x10000, dtype=torch.int32).split(128):
        high = low * 0x9E37 & 0xFFFF
        words = rounding((low | high << 16)[:, None].expand(128, 2).contiguous())
        assert words[:, 6 + column].equal((8 * nonzero(low) + 16 * nonzero(high)).int())


# ----- WGMMA ----------------------------------------------------------------------------------------


def place(image, operand, start, form, transposed):
    """Puts `operand` (MN, 16) into an image of bits from byte `start` on.

    Canonical layouts with the swizzle of 128 bytes, in elements of 16 bits: along K ((8, m), (64)) : ((64, stride), (1)),
    along MN ((64, m), (8, k)) : ((1, leading), (64, stride)).
    """
    mn, k = np.indices(operand.shape)
    leading, stride = form
    if transposed:
        byte = start + mn % 64 * 2 + mn // 64 * leading + k % 8 * 128 + k // 8 * stride
    else:
        byte = start + mn % 8 * 128 + mn // 8 * stride + k * 2
    image[swizzled(byte) // 2] = operand


FORMS = {  # of b: whether it lies along N, its first byte behind 16 KB, (leading, stride)
    "along K": (False, 0, (16, 1024)),
    "along K, its third k-step": (False, 64, (16, 1024)),
    "along K, spread": (False, 32, (16, 2048)),
    "along N": (True, 0, (2048, 1024)),
    "along N, the other order": (True, 0, (1024, 4096)),
    "along N, its third k-step": (True, 4096, (8192, 1024)),
}


PRODUCTS = [(64, torch.float16), (128, torch.float16), (128, torch.bfloat16), (192, torch.float16), (256, torch.float16)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n, dtype", PRODUCTS)
def test_wgmma_matches_its_definition(form, n, dtype, generator):
    """Both operands, all layouts; integers, so that sums are exact."""
    trans_b, start_b, form_b = FORMS[form]
    for accumulate, trans_a in enumerate((False, True)):
        start_a, form_a = (0, (4096, 1024)) if trans_a else (32, (0, 2048))
        a, b = (torch.randint(-8, 9, (size, 16), generator=generator) for size in (64, n))
        image = np.full(IMAGE, NAN, np.int16)
        bits = lambda t: t.to(dtype).view(torch.int16).numpy()
        place(image, bits(a), start_a, form_a, trans_a)
        place(image, bits(b), (1 << 14) + start_b, form_b, trans_b)
        parameters = (start_a, (1 << 14) + start_b, *form_a, *form_b, accumulate, 0)
        parameters += (dtype == torch.bfloat16, n, trans_a, trans_b)
        floats = torch.full((128, n // 2), torch.nan)
        probe("wgmma", parameters, torch.from_numpy(image), floats, seed=accumulate)
        thread, i = np.indices(floats.shape)
        row = thread // 32 * 16 + i // 2 % 2 * 8 + thread % 32 // 4
        column = i // 4 * 8 + thread % 4 * 2 + i % 2
        before = accumulate * torch.from_numpy(1000 * thread + i)
        assert floats.equal(((a @ b.T)[row, column] + before).float())


# ----- a pipeline, and what can be wrong with it ----------------------------------------------------

TILES, K_BLOCKS = 3, 5
FENCE = "TMA or WGMMA meets ordinary stores to shared memory with no fence.proxy.async since"
PENDING_READ = "shared memory is written that a TMA store may still read"
LOADING = "wgmma reads what TMA is still loading"
WRONG = [  # (what, the error that must detect it; None: the values are wrong)
    ("swapped parity", LOADING),
    ("no wait for full stages", LOADING),
    ("no wait for empty stages", "more arrivals than an mbarrier expects"),
    ("early release", "TMA loads over what wgmma may still read"),
    ("one arrival too many is expected", "deadlock"),
    ("one arrival too few", "TMA loads over what wgmma may still read"),
    ("too many bytes are expected", "deadlock"),
    ("too few bytes", "more bytes than an mbarrier expects"),
    ("shifted swizzle", None),
    ("shifted descriptor", None),
    ("no proxy fence", FENCE),
    ("no wait for the stores' reading", PENDING_READ),
    ("no wait for the stores", "a block ends before a TMA store has read its memory"),
    ("no commit", PENDING_READ),
    ("no wait for products", None),
    ("no wgmma fence", "wgmma with no wgmma.fence"),
    ("no fence of barriers", "TMA meets an mbarrier with no fence"),
    ("wrong count at a named barrier", "deadlock"),
    ("no named barrier", FENCE),
    ("a load past shared memory", "shared memory that the block does not have"),
    ("a load too many", "a block ends with bytes that an mbarrier expects"),
    ("half a warp at stmatrix", "deadlock"),
]


def run_pipeline(wrong, seed, generator, tiles=TILES):
    """(error, whether the result is right)."""
    a, b = (torch.randint(-4, 5, (rows, 64 * K_BLOCKS), generator=generator).half() for rows in (64 * tiles, 64))
    out = torch.full((64 * tiles, 64), torch.nan).half()
    emulator(seed, [out], [a, b])
    error = host_kernels.run("host_run_pipeline", a, b, out, tiles, K_BLOCKS, wrong, name=LIBRARY)
    return error, out.float().equal(a.float() @ b.float().T)


def test_pipeline_is_right_in_any_order(generator):
    assert [run_pipeline(0, seed, generator) for seed in range(8 * SEEDS)] == [("", True)] * 8 * SEEDS


@pytest.mark.parametrize("wrong", range(1, len(WRONG) + 1), ids=lambda i: WRONG[i - 1][0])
def test_wrong_pipeline_is_detected(wrong, generator):
    results = [run_pipeline(wrong, seed, generator) for seed in range(SEEDS)]
    message = WRONG[wrong - 1][1]
    detected = [not right if message is None else message in error for error, right in results]
    assert any(detected), results


def test_stores_need_a_group(generator):
    wrong = [what for what, _ in WRONG].index("no commit") + 1
    errors = {run_pipeline(wrong, seed, generator, tiles=1)[0] for seed in range(SEEDS)}
    assert any("a TMA store that is in no group" in error for error in errors)
    assert "" not in errors


def test_deadlock_report_names_threads_and_waits(generator):
    error, _ = run_pipeline([what for what, _ in WRONG].index("too many bytes are expected") + 1, 0, generator)
    assert "deadlock in block 0: threads 0-128 at an mbarrier, parity 0;" in error


def test_wrong_pipelines_leave_nothing_behind(generator):
    for wrong in range(1, len(WRONG) + 1):
        run_pipeline(wrong, wrong, generator)
        assert run_pipeline(0, wrong, generator) == ("", True)


# ----- misuse that PTX does not allow ----------------------------------------------------------------------

MISUSE = [
    ("arrives twice", "a thread arrives at the cluster's barrier twice"),
    ("waits and has not arrived", "a thread waits at the cluster's barrier and has not arrived"),
    ("ends and has not waited", "a thread ends that has arrived at the cluster's barrier and not waited"),
    ("two counts at a named barrier", "a named barrier for"),
    ("a part of a warp at a named barrier", "a named barrier with a part of a warp"),
    ("a named barrier too many", "no named barrier 16"),
    ("a named barrier for half a warp", "a named barrier for 48 threads"),
    ("initializes twice", "an mbarrier is initialized twice"),
    ("does not initialize", "an mbarrier that is not initialized"),
    ("misaligned mbarrier", "an mbarrier at no multiple of 8 bytes"),
    ("arrives at an ended block", "an arrival reaches a block that has ended"),
    ("arrives at no block", "the cluster has no block 2"),
    ("arrives too often", "more arrivals than an mbarrier expects"),
    ("expects too many bytes", "an mbarrier's tx-count is out of range"),
    ("misaligned stmatrix", "stmatrix at no multiple of 16 bytes"),
    ("misaligned box", "TMA to shared memory at no multiple of 128 bytes"),
    ("no tensor map", "this is no tensor map"),
    ("a warp at two instructions", "lanes of a warp at"),
    ("wgmma of two descriptors", "the threads of a warpgroup differ in their wgmma"),
    ("unfinished wgmma", "a thread ends before its wgmma"),
    ("three accumulators", "the emulator has two accumulators at a time"),
    ("wgmma by three warps", "wgmma by a part of a warpgroup"),
    ("ends while its warp shuffles", "while"),
    ("arrives relaxed past an mbarrier", "a relaxed arrival after an mbarrier with no fence"),
    ("multicasts before the other block's barrier is there", "an mbarrier that is not initialized"),
    ("wgmma without the swizzle", "a matrix descriptor without the swizzle of 128 bytes"),
    ("wgmma with a base offset", "a matrix descriptor with a base offset"),
    ("wgmma past shared memory", "shared memory that the block does not have"),
    ("more shared memory than there is", "no 232449 bytes of shared memory for a block"),
]
CLUSTERS = ("arrives at an ended block", "multicasts before the other block's barrier is there")  # of two blocks


@pytest.mark.parametrize("which", range(len(MISUSE)), ids=lambda i: MISUSE[i][0])
def test_misuse_is_refused(which):
    what, message = MISUSE[which]
    tensor = torch.zeros(64, 64).half()
    errors = []
    for seed in range(4 * SEEDS):
        emulator(seed, [tensor])
        errors.append(host_kernels.run("host_run_misuse", tensor, 1 + (what in CLUSTERS), which, name=LIBRARY))
    assert any(message in error for error in errors), set(errors)
    assert what in CLUSTERS or "" not in errors


def test_schedules_differ(generator):
    """The seed decides whether a block that does not wait for its stores is in time."""
    wrong = [what for what, _ in WRONG].index("no wait for the stores") + 1
    assert {run_pipeline(wrong, seed, generator)[0] == "" for seed in range(8 * SEEDS)} == {True, False}
