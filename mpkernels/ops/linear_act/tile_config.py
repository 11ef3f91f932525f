# SPDX-License-Identifier: Apache-2.0
"""Which Triton kernel a GEMM of linear_act runs by, and with which tile: plain functions of architecture and operands."""

import enum
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch

TMA_SMS = (0, 90, 100)  # 0 is the interpreter


class Float8(enum.IntEnum):
    """How 8-bit floats are multiplied. NONE: there are none.

    PROMOTED: tensor cores of sm_89 and sm_90 add products of 8-bit floats in about 14 bits, so that the sum of each block of
    K is added in fp32. PLAIN: those of sm_100 add in fp32. DECODED: to fp16, of which each is one, for GPUs that multiply none.
    """

    NONE = 0
    PLAIN = 1
    PROMOTED = 2
    DECODED = 3


def float8(sm: int) -> Float8:
    """How 8-bit floats are multiplied on `sm` (90; 0 is the interpreter)."""
    if 0 < sm < 89:
        return Float8.DECODED
    return Float8.PLAIN if sm in (100, 103) else Float8.PROMOTED


@dataclass(frozen=True)
class Tile:
    """What one program computes and how; BLOCK_N is a multiple of 32, so that words of the mask do not straddle tiles."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    GROUP_M: int = 8


@dataclass(frozen=True)
class TmaTile(Tile):
    """The same for the descriptor kernel. SUBTILES: parts that it is stored in. SPECIALIZE: a warp loads, others multiply."""

    SUBTILES: int = 1
    SPECIALIZE: bool = False


# From large to small, by the operands: of one 16-bit dtype; 16-bit with a wider weight; 16-bit not in vectors of 16
# bytes (an address per element: more registers); fp32; fp64; 8-bit, and those not in vectors.
_SM80 = {
    "16bit": (Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 4, 3), Tile(64, 64, 64, 4, 3)),
    "mixed_16bit": (Tile(128, 128, 32, 8, 3), Tile(64, 128, 32, 4, 3), Tile(64, 64, 32, 4, 3)),
    "unaligned_16bit": (Tile(64, 128, 32, 8, 3), Tile(64, 64, 32, 4, 3)),
    "fp32": (Tile(64, 64, 16, 8, 3), Tile(32, 32, 16, 4, 3)),
    "fp64": (Tile(64, 64, 16, 8, 3),),
    "8bit": (Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 4, 3), Tile(64, 64, 64, 8, 3)),  # with 4 warps the smallest spills
    "unaligned_8bit": (Tile(64, 64, 32, 4, 3),),
}
_8BIT = {  # where they are multiplied as they are; BLOCK_K is at most 128, as often as the sum has to be added in fp32
    "8bit": (Tile(128, 128, 128, 8, 3), Tile(64, 128, 128, 4, 3), Tile(64, 64, 128, 4, 3)),
    "unaligned_8bit": (Tile(64, 64, 64, 4, 3),),
}
_SM86 = _SM80 | {"16bit": (Tile(128, 128, 32, 8, 3), Tile(64, 128, 32, 4, 3), Tile(64, 64, 32, 4, 3))}
_SM89 = _SM86 | _8BIT
_SM90 = (
    _SM80
    | _8BIT
    | {
        "16bit": (Tile(128, 256, 64, 8, 3), *_SM80["16bit"]),
        "fp32": (Tile(64, 64, 16, 8, 2), Tile(32, 32, 16, 4, 3)),
    }
)
_SM100 = (
    _SM80
    | _8BIT
    | {  # with 4 warps the smallest spill, with GELU 128 x 128 of 8 bits
        "8bit": (Tile(64, 128, 128, 8, 3), Tile(64, 64, 128, 4, 3)),
        "16bit": (*_SM80["16bit"][:-1], Tile(64, 64, 64, 8, 3)),
        "mixed_16bit": (*_SM80["mixed_16bit"][:-1], Tile(64, 64, 32, 8, 3)),
    }
)
_BY_SM = {86: _SM86, 89: _SM89, 120: _SM89, 121: _SM89, 90: _SM90, 100: _SM100, 103: _SM100}
_INTERPRETER = Tile(16, 32, 32, 1, 1)

# Of the descriptor kernel, by the bytes of an element of the result: staged tiles of fp32 leave room for a stage less.
# Where it specializes, 4 warps are a consumer; Triton makes two of them, each with half of BLOCK_M, and a producer.
_SM90_TMA = {
    2: (TmaTile(128, 256, 64, 8, 4, SUBTILES=2), TmaTile(128, 128, 64, 8, 4), TmaTile(64, 128, 64, 4, 4)),
    4: (TmaTile(128, 256, 64, 8, 3, SUBTILES=2), TmaTile(128, 128, 64, 8, 4), TmaTile(64, 128, 64, 4, 4)),
}
_SM90_SPECIALIZED = {
    2: (TmaTile(128, 256, 64, 4, 4, SUBTILES=2, SPECIALIZE=True), TmaTile(128, 128, 64, 4, 4, SUBTILES=2, SPECIALIZE=True)),
    4: (_SM90_TMA[4][0], TmaTile(128, 128, 64, 4, 4, SPECIALIZE=True)),
}
_SM90_TMA_8BIT = (TmaTile(128, 128, 128, 8, 4), TmaTile(64, 128, 128, 4, 4))
_SM90_SPECIALIZED_8BIT = {
    2: TmaTile(128, 128, 128, 4, 4, SUBTILES=2, SPECIALIZE=True),
    4: TmaTile(128, 128, 128, 4, 4, SPECIALIZE=True),
}
_INTERPRETER_TMA = {
    2: (TmaTile(16, 64, 32, 1, 1, SUBTILES=2, SPECIALIZE=True),),
    4: (TmaTile(16, 32, 32, 1, 1, GROUP_M=2),),
}

# A card that has fewer tiles than this to work on idles: take a smaller tile then.
ENOUGH_TILES = 100
LARGEST_HEAVY = 128 * 128  # elements of a tile with a heavy epilogue: 128 registers of a thread are the sums
INVARIANT_M = 1024  # of the tile that batch_invariant takes for every M


def tiles(sm: int, a: torch.dtype, b: torch.dtype, vectors: bool, heavy_epilogue: bool = False) -> tuple[Tile, ...]:
    """The tiles for operands of dtypes a and b on `sm` (90; 0 is the interpreter), from large to small.

    vectors: whether they and the result can be read and written 16 bytes at a time. heavy_epilogue: it does more than bias,
    ReLU and mask; large tiles spill then.
    """
    if sm == 0:
        return (_INTERPRETER,)
    by_kind = _BY_SM.get(sm, _SM80)
    if a.itemsize > 2:
        kind = "fp32" if a.itemsize == 4 else "fp64"
    elif a.itemsize == 1:
        kind = "8bit" if vectors else "unaligned_8bit"
    else:
        kind = "unaligned_16bit" if not vectors else "16bit" if b.itemsize == 2 else "mixed_16bit"
    return tuple(tile for tile in by_kind[kind] if not heavy_epilogue or tile.BLOCK_M * tile.BLOCK_N <= LARGEST_HEAVY)


def tma_tiles(sm: int, operand: torch.dtype, out: torch.dtype, specializes: bool) -> tuple[TmaTile, ...]:
    """The tiles of the descriptor kernel for a result of dtype `out` on `sm` (0 is the interpreter), from large to small.

    specializes: whether this Triton can.
    """
    if sm == 0:
        return _INTERPRETER_TMA[out.itemsize]
    if operand.itemsize == 1:
        first = (_SM90_SPECIALIZED_8BIT[out.itemsize],) if sm == 90 and specializes else _SM90_TMA_8BIT[:1]
        return (*first, _SM90_TMA_8BIT[-1])
    if sm == 90 and specializes:
        return (*_SM90_SPECIALIZED[out.itemsize], _SM90_TMA[out.itemsize][-1])
    return _SM90_TMA[out.itemsize]


def choose(M: int, N: int, candidates: tuple[Tile, ...]) -> Tile:
    """The first tile, the largest, of which there are enough for an (M, N) result, else the last."""
    for tile in candidates:
        if count(M, N, tile) >= ENOUGH_TILES:
            return tile
    return candidates[-1]


def count(M: int, N: int, tile: Tile) -> int:
    """How many such tiles an (M, N) result has."""
    return -(-M // tile.BLOCK_M) * -(-N // tile.BLOCK_N)


class Operand(NamedTuple):
    """What the choice of a kernel depends on; misalignment is that of the address from 16 bytes."""

    dtype: torch.dtype
    shape: tuple[int, int]
    stride: tuple[int, int]
    misalignment: int

    @property
    def inner(self) -> int:
        """The dimension along which elements follow each other, where one does."""
        return int(self.stride[1] == 1)

    @property
    def pitch(self) -> int:
        """Elements from one row (or column) in memory to the next."""
        return self.stride[1 - self.inner]


class Plan(NamedTuple):
    """Which kernel multiplies, by what grid, and its constants and options."""

    by_tma: bool
    grid: tuple[int]
    options: dict


def plan(
    sm: int, programs: int, specializes: bool, a: Operand, b: Operand, out: Operand, tuned: tuple | None = None, *,
    fuses_prev=False, non_relu_activation=False, batch_invariant=False, accumulates=False,
) -> Plan:  # fmt: skip
    """The kernel for out (M, N) = a (M, K) @ b (K, N) on a GPU that has room for `programs` persistent programs.

    tuned: the (name, value) pairs of a tile from a tuned table; left aside where it is none of this kernel's here: the other
    one has to serve, this Triton does not specialize, or a file says anything else.
    fuses_prev: the epilogue selects by the mask of the previous layer and sums columns: Triton 3.7 and 3.9 fail to specialize
    that. non_relu_activation: it has a slope, or an activation other than ReLU; by pointers alone. batch_invariant: one tile
    for every M, another may sum in another order. accumulates: the epilogue adds to what is in `out`, which it reads.
    """
    M, N = out.shape
    rows = INVARIANT_M if batch_invariant else M
    by_tma = not non_relu_activation and tma_why_not(sm, a, b, out) is None
    heavy_epilogue = fuses_prev or non_relu_activation or accumulates
    found = candidates(sm, specializes and not fuses_prev, a, b, out, by_tma, heavy_epilogue)
    tile = _tile(tuned, by_tma)
    if tile not in found + candidates(sm, False, a, b, out, by_tma, heavy_epilogue):
        tile = choose(rows, N, found)
    options = asdict(tile) | {"FLOAT8": int(float8(sm) if a.dtype.itemsize == 1 else Float8.NONE)}
    if by_tma:
        majors = {"A_IS_KM": a.inner == 0, "B_IS_NK": b.inner == 0}
        return Plan(True, (min(programs, count(M, N, tile)),), options | majors)
    return Plan(False, (count(M, N, tile),), options)


def candidates(
    sm: int, specializes: bool, a: Operand, b: Operand, out: Operand, by_tma: bool, heavy_epilogue: bool = False
) -> tuple[Tile, ...]:
    """The tiles that a GEMM may run with, from large to small; `heavy_epilogue` as of `tiles`."""
    if by_tma:
        return tma_tiles(sm, a.dtype, out.dtype, specializes)
    return tiles(sm, a.dtype, b.dtype, all(map(_vectors, (a, b, out))), heavy_epilogue)


def _tile(tuned: tuple | None, by_tma: bool) -> Tile | None:
    """A tile from a table, where it has the fields of that kernel's."""
    kind = TmaTile if by_tma else Tile
    fields = dict(tuned or ())
    return kind(**fields) if fields.keys() == kind.__dataclass_fields__.keys() else None


def tma_why_not(sm: int, a: Operand, b: Operand, out: Operand) -> str | None:
    """Why tensor descriptors do not serve out = a @ b, or None; the rungs are the GPU, the dtypes and a tensor map's rules."""
    if sm not in TMA_SMS:
        return f"needs sm90 or sm100, got sm{sm}"
    fit = a.dtype.itemsize == b.dtype.itemsize and (a.dtype.itemsize == 1 or (a.dtype.itemsize == 2 and a.dtype == b.dtype))
    if not fit or out.dtype.itemsize > 4:
        dtypes = f"{a.dtype}, {b.dtype} and {out.dtype}"
        return f"needs operands of one 16-bit dtype or of 8 bits and at most 32 bits of result, got {dtypes}"
    for name, operand in (("a", a), ("b", b), ("out", out)):
        reason = _map_why_not(operand)
        if reason is not None:
            return f"{name} {reason}"
    return None


def _map_why_not(operand: Operand) -> str | None:
    """Why no tensor map describes a matrix, or None."""
    if not (min(operand.shape) > 0 and max(operand.shape) < 1 << 31):
        return f"needs sizes from 1 to 2**31 - 1, got {tuple(operand.shape)}"
    if operand.stride[operand.inner] != 1:
        return f"needs a stride of 1, got {operand.stride}"
    return rows_why_not(operand)


def rows_why_not(operand: Operand) -> str | None:
    """Why TMA cannot read or write the rows (or columns) of a matrix, elements of which follow each other; or None."""
    if operand.pitch < operand.shape[operand.inner]:
        return f"needs rows that do not overlap, got a pitch of {operand.pitch} for {operand.shape[operand.inner]} elements"
    pitch = operand.pitch * operand.dtype.itemsize
    if pitch % 16 or operand.misalignment:
        return f"needs rows at multiples of 16 bytes, got a pitch of {pitch} and an address {operand.misalignment} past one"
    return None


def _vectors(operand: Operand) -> bool:
    """Whether Triton finds, by what it knows of arguments (divisible by 16 or not), that 16 bytes may move at once."""
    aligned = operand.pitch % 16 == 0 and operand.shape[operand.inner] % 16 == 0 and operand.misalignment == 0
    return operand.stride[operand.inner] == 1 and aligned
