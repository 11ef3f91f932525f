# SPDX-License-Identifier: Apache-2.0
"""The tile that a Triton GEMM of linear_act runs with: a plain function of sizes, architecture and dtypes."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """What one program computes and how; BLOCK_N is a multiple of 32, so that words of the mask do not straddle tiles."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    GROUP_M: int = 8


# From large to small, by the operands: of one 16-bit dtype; 16-bit with a wider weight; 16-bit not in vectors of 16
# bytes (an address per element: more registers); fp32; fp64.
_SM80 = {
    "half": (Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 4, 3), Tile(64, 64, 64, 4, 3)),
    "mixed": (Tile(128, 128, 32, 8, 3), Tile(64, 128, 32, 4, 3), Tile(64, 64, 32, 4, 3)),
    "ragged": (Tile(64, 128, 32, 8, 3), Tile(64, 64, 32, 4, 3)),
    "single": (Tile(64, 64, 16, 8, 3), Tile(32, 32, 16, 4, 3)),
    "double": (Tile(64, 64, 16, 8, 3),),
}
_SM86 = _SM80 | {"half": (Tile(128, 128, 32, 8, 3), Tile(64, 128, 32, 4, 3), Tile(64, 64, 32, 4, 3))}
_SM90 = _SM80 | {"half": (Tile(128, 256, 64, 8, 3), *_SM80["half"])}
_LITTLE_SHARED_MEMORY = (86, 89, 120, 121)
_INTERPRETER = Tile(16, 32, 32, 1, 1)

# A card that has fewer tiles than this to work on idles: take a smaller tile then.
ENOUGH_TILES = 100


def tiles(sm: int, a: torch.dtype, b: torch.dtype, vectors: bool) -> tuple[Tile, ...]:
    """The tiles for operands of dtypes a and b on `sm` (90; 0 is the interpreter), from large to small.

    vectors: whether they and the result can be read and written 16 bytes at a time.
    """
    if sm == 0:
        return (_INTERPRETER,)
    by_kind = _SM86 if sm in _LITTLE_SHARED_MEMORY else _SM90 if sm == 90 else _SM80
    if a.itemsize > 2:
        return by_kind["single" if a.itemsize == 4 else "double"]
    return by_kind["ragged" if not vectors else "half" if b.itemsize == 2 else "mixed"]


def choose(M: int, N: int, sm: int, a: torch.dtype, b: torch.dtype, vectors: bool) -> Tile:
    """The largest tile of which there are enough for an (M, N) result, else the smallest."""
    candidates = tiles(sm, a, b, vectors)
    for tile in candidates:
        if -(-M // tile.BLOCK_M) * -(-N // tile.BLOCK_N) >= ENOUGH_TILES:
            return tile
    return candidates[-1]
