# SPDX-License-Identifier: Apache-2.0
"""The machine code of linear_act's kernels in the built library: Hopper's instructions, registers only, nothing serialized."""

import functools
import itertools
import re
from collections import Counter

import pytest

from tests.toolchain.test_cuda_machine_code import has_cuda, of_architecture, run

GEMMS = 48  # 3 roles x 2 operand dtypes x 2 result dtypes x 3 tiles, of which one has two schedules
FPROP, DGRAD, WGRAD = (f"RoleE{i}" for i in range(3))
THREADS = 384
REGISTERS = 168  # at launch: the most that 384 threads can have; setmaxnreg then moves them to the consumer warpgroups
MOVED_REGISTERS = (40, 232)  # of the producer and of the consumer warpgroups
REGISTERS_PER_SM = 65536
RESERVED_SHARED = 1024  # by the system, for every block on sm_90


@pytest.fixture(autouse=True)
def needs_cuda_part():
    if not has_cuda():
        pytest.skip("the library was built without nvcc")


@functools.cache
def code(sm: str) -> dict[str, list[str]]:
    """The instructions of each GEMM kernel by mangled name."""
    parts = re.split(r"Function : (\S+)", run("-sass", "-arch", sm))[1:]
    line = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][^;]*)")
    return {name: line.findall(text) for name, text in zip(parts[::2], parts[1::2]) if "gemm_kernel" in name}


@pytest.fixture(params=sorted(code("sm_90a")) if has_cuda() else [], ids=lambda name: name.split("gemm_kernel")[1])
def kernel(request) -> str:
    return request.param


def width_of(name: str) -> int:
    """Columns of the tile."""
    return int(re.search(r"TileILi(\d+)", name)[1])


def is_fp32(name: str) -> bool:
    """Whether the result is."""
    return "EfN" in name


def is_ping_pong(name: str) -> bool:
    return "ScheduleE1" in name


def parts_of(name: str) -> int:
    """Accumulators of 64 rows that a consumer warpgroup has."""
    return 1 + is_ping_pong(name)


def opcodes(name: str) -> Counter:
    return Counter(line.split()[0] for line in code("sm_90a")[name])


def families(name: str) -> Counter:
    counts = Counter()
    for opcode, count in opcodes(name).items():
        counts[opcode.split(".")[0]] += count
    return counts


def test_linear_act_gemms_are_all_there():
    assert len(code("sm_90a")) == GEMMS
    assert all(sum(role in name for name in code("sm_90a")) == GEMMS // 3 for role in (FPROP, DGRAD, WGRAD))
    assert sum(map(is_ping_pong, code("sm_90a"))) == GEMMS // 4


def test_linear_act_gemms_exist_on_hopper_only():
    for sm in ("sm_75", "sm_80"):
        for name, lines in code(sm).items():
            assert {line.split()[0] for line in lines} <= {"LDC", "MOV", "IMAD.MOV.U32", "EXIT", "BRA", "NOP"}, (sm, name)


def test_linear_act_gemm_uses_hopper(kernel):
    found = families(kernel)
    for instruction in ("HGMMA", "UTMALDG", "UTMASTG", "SYNCS"):
        assert found[instruction] > 0, instruction
    assert not any(found[other] for other in ("HMMA", "LDGSTS", "LDL", "STL")), found
    assert opcodes(kernel)["UTMALDG.2D.MULTICAST"] > 0


def test_linear_act_gemm_is_not_serialized(kernel):
    """A fence and a wait for the four instructions of a k-block, for each accumulator, and a wait at the end: ptxas adds others
    where it serializes."""
    found = opcodes(kernel)
    assert families(kernel)["HGMMA"] == 4 * parts_of(kernel)
    assert (found["WARPGROUP.ARRIVE"], found["WARPGROUP.DEPBAR.LE"]) == (1, 2)


def test_linear_act_gemm_has_no_barrier_in_the_loop(kernel):
    """No barrier of the block between the first and the last HGMMA."""
    lines = code("sm_90a")[kernel]
    at = [i for i, line in enumerate(lines) if line.startswith("HGMMA")]
    assert not [line for line in lines[at[0] : at[-1]] if line.startswith("BAR")]


def test_linear_act_gemm_has_no_fence_of_the_gpu_in_the_loop(kernel):
    """Arrivals and waits of the cluster's scope at mbarriers fence the whole GPU and empty the L1. What is left of that stands
    before the loop, behind it, and once in the arrival that ends the kernel."""
    lines = code("sm_90a")[kernel]
    costly = re.compile(r"MEMBAR\.\w+\.(?!CTA)|ERRBAR|CGAERRBAR|CCTL\.IVALL")
    waits = [i for i, line in enumerate(lines) if line.startswith("SYNCS.PHASECHK")]
    releases = [i for i, line in enumerate(lines) if line.startswith("SYNCS.ARRIVE.TRANS64.RED")]
    loads = [i for i, line in enumerate(lines) if line.startswith("UTMALDG")]
    for first, last in ((waits[0], releases[-1]), (max(i for i in waits if i < loads[0]), loads[-1])):
        assert not [line for line in lines[first:last] if costly.match(line)]
    found = Counter(costly.match(line).group() for line in lines if costly.match(line))
    assert found["CCTL.IVALL"] <= 3  # two waits of the cluster, one for the last stores
    assert sum(found.values()) - found["CCTL.IVALL"] <= 3  # MEMBAR, ERRBAR, CGAERRBAR


def test_linear_act_gemm_rounds_once_and_keeps_nan(kernel):
    found, columns = opcodes(kernel), width_of(kernel) * parts_of(kernel)
    relu = [op for op in found if op.startswith("F2FP.RELU")]
    if is_fp32(kernel):
        assert families(kernel)["F2FP"] == 0
        assert families(kernel)["STSM"] == 0
        assert found["FMNMX.NAN"] == (columns // 2 if FPROP in kernel else 0)
    else:
        assert families(kernel)["STSM"] == columns // 16
        assert sum(found[op] for op in relu) == (columns // 4 if FPROP in kernel else 0)
    assert families(kernel)["FMNMX"] == found["FMNMX.NAN"]


def test_linear_act_gemm_adds_in_pairs(kernel):
    """wgrad in fp32 reads a sum that it is added to as it reads nothing else: two numbers at a time, each once."""
    adds = WGRAD in kernel and is_fp32(kernel)
    assert opcodes(kernel)["LDG.E.EF.64"] == (width_of(kernel) * parts_of(kernel) // 4 if adds else 0)


# Instructions of an epilogue tile of 64 columns, from one TMA store to the next (of fp32, two), by role: 16-bit and fp32. In
# ping-pong addresses are computed again, for want of registers, and the other warpgroup's products go on meanwhile.
MOST_OF_AN_EPILOGUE_TILE = {FPROP: (195, 250), DGRAD: (225, 230), WGRAD: (45, 52)}
MOST_IN_PING_PONG = {FPROP: (215, 275), DGRAD: (245, 245), WGRAD: (60, 62)}
# From the wait for a tile to the first HGMMA; in ping-pong, the accumulators are cleared there.
MOST_BEFORE_THE_LOOP = {FPROP: 50, DGRAD: 95, WGRAD: 50}
CLEARED_BY_ONE = 2  # registers


def test_linear_act_gemm_exposes_few_instructions(kernel):
    lines = code("sm_90a")[kernel]
    (role,) = [role for role in MOST_OF_AN_EPILOGUE_TILE if role in kernel]
    stores = [i for i, line in enumerate(lines) if line.startswith("UTMASTG")][:: 1 + is_fp32(kernel)]
    tiles = width_of(kernel) // 64
    assert len(stores) == parts_of(kernel) * tiles
    of_a_part = [stores[i : i + tiles] for i in range(0, len(stores), tiles)]
    longest = max(after - before for part in of_a_part for before, after in itertools.pairwise(part))
    assert longest <= (MOST_IN_PING_PONG if is_ping_pong(kernel) else MOST_OF_AN_EPILOGUE_TILE)[role][is_fp32(kernel)]
    wait = next(i for i, line in enumerate(lines) if line.startswith("SYNCS.PHASECHK"))
    first = next(i for i, line in enumerate(lines) if line.startswith("HGMMA"))
    cleared = is_ping_pong(kernel) * parts_of(kernel) * width_of(kernel) // 2 // CLEARED_BY_ONE
    turn = 20 * is_ping_pong(kernel)
    assert first - wait <= MOST_BEFORE_THE_LOOP[role] + cleared + turn, "coordinates and bias are the producer's work"


def test_linear_act_gemm_registers(kernel):
    used = re.search(rf"Function {re.escape(kernel)}:\s*\n?\s*(REG:.*)", "".join(of_architecture(run("-res-usage"), 90)))
    use = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", used.group(1))}
    assert (use["REG"], use["STACK"], use["LOCAL"], use["SHARED"]) == (REGISTERS, 0, 0, RESERVED_SHARED)
    assert REGISTERS * THREADS <= REGISTERS_PER_SM
    producer, consumer = MOVED_REGISTERS
    assert (producer + 2 * consumer) * THREADS // 3 <= REGISTERS * THREADS
    moves = [line for line in code("sm_90a")[kernel] if line.startswith("USETMAXREG")]
    assert sorted(int(line.split()[-1], 0) for line in moves) == sorted(MOVED_REGISTERS)
