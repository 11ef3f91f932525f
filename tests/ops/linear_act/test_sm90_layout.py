# SPDX-License-Identifier: Apache-2.0
"""csrc/linear_act/sm90/layout.h against plain definitions: swizzle, descriptors, fragments, mask words, tile order, split-K."""

import ctypes
import itertools
import shutil
import subprocess

import numpy as np
import pytest

from tests.paths import ROOT


@pytest.fixture(scope="module")
def layout(tmp_path_factory) -> ctypes.CDLL:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    path = tmp_path_factory.mktemp("layout") / "layout.so"
    source = ROOT / "tests/emulator/linear_act_layout.cpp"
    subprocess.run(["g++", "-std=c++17", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}", source, "-o", path], check=True)
    library = ctypes.CDLL(str(path))
    library.layout_swizzled.restype = library.layout_word_bits.restype = ctypes.c_uint32
    library.layout_descriptor.restype = library.layout_descriptor_step.restype = ctypes.c_uint64
    return library


def ints(function, count, *args):
    found = (ctypes.c_int * count)()
    function(*args, found)
    return tuple(found)


def test_layout_swizzle_exchanges_chunks_by_address_bits(layout):
    """Bits 4 to 6 of a byte's address are those of where it would lie unswizzled, xor bits 7 to 9: every byte has a place."""
    places = {}
    for row, chunk in itertools.product(range(64), range(8)):
        plain = row * 128 + chunk * 16
        places[plain] = layout.layout_swizzled(row, chunk)
        assert places[plain] == plain ^ ((plain >> 7 & 7) << 4)
    assert sorted(places.values()) == sorted(places)


def test_layout_swizzle_spares_the_banks(layout):
    """Eight rows of one column of chunks, as a warp stores them, lie in eight different groups of four banks."""
    for chunk in range(8):
        assert {layout.layout_swizzled(row, chunk) % 128 // 16 for row in range(8)} == set(range(8))


@pytest.mark.parametrize("address", (0, 1024, 48 * 1024, 0x38000))
@pytest.mark.parametrize("leading, stride", ((8192, 1024), (16, 1024), (16384, 2048)))
def test_layout_descriptor_fields(layout, address, leading, stride):
    """The fields as the PTX ISA lists them, in units of 16 bytes; swizzle mode 1 is that of 128 bytes."""
    word = layout.layout_descriptor(address, leading, stride)
    assert word & 0x3FFF == address // 16
    assert word >> 16 & 0x3FFF == leading // 16
    assert word >> 32 & 0x3FFF == stride // 16
    assert word >> 49 & 7 == 0  # base offset: operands start at multiples of 1024 bytes
    assert word >> 62 == 1
    assert word & ~(0x3FFF | 0x3FFF << 16 | 0x3FFF << 32 | 3 << 62) == 0


def test_layout_descriptor_step_moves_the_start(layout):
    for step in (32, 64, 96, 2048, 6144):
        moved = layout.layout_descriptor(4096, 8192, 1024) + layout.layout_descriptor_step(step)
        assert moved == layout.layout_descriptor(4096 + step, 8192, 1024)


@pytest.mark.parametrize("columns", (64, 128, 256))
def test_layout_fragments_cover_the_accumulator_once(layout, columns):
    """64 x N values: warp w has rows 16 w to 16 w + 15; a quad of lanes a row and the one 8 below; two neighbours a lane."""
    seen = np.zeros((64, columns), int)
    for thread, j, half in itertools.product(range(128), range(columns // 8), range(2)):
        row, column, index = ints(layout.layout_acc, 3, thread, j, half)
        assert row // 16 == thread // 32
        assert row % 8 == thread % 32 // 4
        assert row % 16 // 8 == half
        assert column // 8 == j
        assert column % 8 == 2 * (thread % 4)
        assert index == 4 * j + 2 * half
        seen[row, column : column + 2] += 1
    assert (seen == 1).all()


def test_layout_word_bits(layout):
    for left in range(-5, 70):
        expected = sum(1 << j for j in range(32) if j < left)
        assert layout.layout_word_bits(ctypes.c_int64(left)) == expected


@pytest.mark.parametrize("rows, columns, group", ((1, 1, 8), (3, 5, 8), (8, 4, 8), (17, 3, 8), (16, 16, 4), (9, 1, 2)))
def test_layout_tiles_in_bands(layout, rows, columns, group):
    expected = []
    for first in range(0, rows, group):
        band = range(first, min(first + group, rows))
        expected += [(row, column) for column in range(columns) for row in band]
    assert [ints(layout.layout_grouped_tile, 2, i, rows, columns, group) for i in range(rows * columns)] == expected


@pytest.mark.parametrize("k_blocks, splits", ((1, 1), (7, 1), (7, 3), (64, 8), (9, 8), (2**30, 7)))
def test_layout_splits_are_consecutive_and_even(layout, k_blocks, splits):
    ranges = [ints(layout.layout_split_range, 2, k_blocks, split, splits) for split in range(splits)]
    assert ranges[0][0] == 0
    assert ranges[-1][1] == k_blocks
    assert all(before[1] == after[0] for before, after in itertools.pairwise(ranges))
    lengths = [end - begin for begin, end in ranges]
    assert max(lengths) - min(lengths) <= 1
    assert min(lengths) >= 1


@pytest.mark.parametrize("block_n", (128, 192, 256))
@pytest.mark.parametrize("cluster", (1, 2))
@pytest.mark.parametrize("transposed", (False, True))
def test_layout_shares_of_b_cover_the_tile(layout, block_n, cluster, transposed):
    shares = [ints(layout.layout_share_of_b, 2, block_n, transposed, cluster, rank) for rank in range(cluster)]
    assert shares[0][0] == 0
    assert shares[-1][1] == block_n
    assert all(before[1] == after[0] for before, after in itertools.pairwise(shares))
    if transposed:
        assert all(begin % 64 == 0 < end - begin for begin, end in shares), "boxes have 64 columns"
    else:
        assert {end - begin for begin, end in shares} == {block_n // cluster}, "the box that the tensor map describes"
