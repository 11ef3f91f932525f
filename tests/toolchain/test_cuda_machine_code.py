# SPDX-License-Identifier: Apache-2.0
"""The machine code of the step's CUDA kernels in the built library: no spills, no stack, 16-byte loads and stores."""

import functools
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from mpkernels.runtime import native

ARCHITECTURES = (75, 80, 90)
# Kernels by what their names contain; those of a rule of csrc/optimizer_update are update_kernel<Rule, ...>.
RULES = ("Adamw", "Sgd", "Lion")  # their memory traffic is loads and stores of 16 bytes
VECTOR_LOADS = (*RULES, "stats_kernel")
KERNELS = {  # how many there are for each architecture
    "scalars_kernel": 6, "Adamw": 16, "Sgd": 6, "Lion": 4, "stats_kernel": 2, "update_scale_kernel": 1,
}  # fmt: skip
NARROW_MOMENTS = "BFloat16"  # in a kernel's name: moments of half the master's width, read and written 8 bytes at a time
DTYPES = 4
MOST_PER_ELEMENT = 5.6  # instructions of a loop over 16-bit gradients, loads and addresses included
BLOCKS_PER_SM, THREADS, REGISTERS_PER_SM = 2, 256, 65536


def cuobjdump() -> str:
    """The tool, of the toolkit or of Triton's wheel."""
    found = shutil.which("cuobjdump")
    if found is None:
        triton = pytest.importorskip("triton", reason="neither the CUDA toolkit nor triton is here")
        found = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return str(found)


@functools.cache
def run(*options: str) -> str:
    """What the tool says of the library."""
    return subprocess.run([cuobjdump(), *options, str(native.LIBRARY)], check=True, capture_output=True, text=True).stdout


@functools.cache
def has_cuda() -> bool:
    return native.why_not() is None and hasattr(native.ops, "cuda_versions")


@pytest.fixture(autouse=True)
def needs_cuda_part():
    if not has_cuda():
        pytest.skip("the library was built without nvcc")


@functools.cache
def usage(sm: int) -> dict[str, dict[str, int]]:
    """Registers and bytes of stack and local memory (REG, STACK, LOCAL, ...) by mangled name."""
    text = "".join(of_architecture(run("-res-usage"), sm))
    found = re.findall(r"Function (\S+):\s*\n?\s*(REG:.*)", text)
    return {name: {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)} for name, line in found if kind(name)}


@functools.cache
def blocks(sm: int) -> dict[str, list[list[tuple[str, str]]]]:
    """(opcode, operands) of each instruction of each kernel, by mangled name, cut at the branches."""
    text = run("-sass", "-arch", f"sm_{sm}{'a' if sm == 90 else ''}")
    parts = re.split(r"Function : (\S+)", text)[1:]
    line = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)\s*(.*?);")
    result = {}
    for name, code in zip(parts[::2], parts[1::2]):
        if kind(name):
            result[name] = [[]]
            for instruction in line.findall(code):
                result[name][-1].append(instruction)
                if instruction[0].startswith(("BRA", "EXIT")):
                    result[name].append([])
    return result


def loads_in_flight(block: list[tuple[str, str]], load: str) -> int:
    """How many of these loads are issued before the first instruction that reads what one of them brings."""
    on_their_way, count = set(), 0
    for opcode, operands in block:
        to, _, rest = operands.partition(",")
        if on_their_way & set(re.findall(r"\bR\d+", rest)):
            break
        if opcode.startswith("LDG") and load in opcode:
            first = int(re.match(r"R(\d+)", to)[1])
            on_their_way |= {f"R{first + i}" for i in range(4 if ".128" in opcode else 2 if ".64" in opcode else 1)}
            count += 1
    return count


def instructions(sm: int) -> dict[str, list[str]]:
    """The opcodes of each kernel, in order, by mangled name."""
    return {name: [opcode for part in parts for opcode, _ in part] for name, parts in blocks(sm).items()}


def stats_kernels(sm: int) -> dict[str, list[list[tuple[str, str]]]]:
    return {name: parts for name, parts in blocks(sm).items() if kind(name) == "stats_kernel"}


def of_architecture(text: str, sm: int) -> list[str]:
    """The parts of a dump that belong to one architecture."""
    return [part for part in text.split("Fatbin elf code:") if re.search(rf"arch = sm_{sm}a?\b", part)]


def kind(name: str) -> str | None:
    """Which of KERNELS a mangled name is of; None for those of other ops."""
    return next((k for k in KERNELS if k in name), None)


@pytest.fixture(params=ARCHITECTURES, ids="sm_{}".format)
def sm(request) -> int:
    if not usage(request.param):
        pytest.skip(f"the library was not built for sm_{request.param}")
    return request.param


def test_cuda_kernels_use_registers_only(sm):
    used = usage(sm)
    assert Counter(map(kind, used)) == KERNELS
    for name, use in used.items():
        print(f"sm_{sm} {use['REG']:3d} registers, {use['SHARED']:4d} bytes shared: {name}")
        assert (use["STACK"], use["LOCAL"]) == (0, 0), name
        assert use["REG"] * THREADS * BLOCKS_PER_SM <= REGISTERS_PER_SM, name


def test_cuda_kernels_spill_nothing(sm):
    for name, code in instructions(sm).items():
        assert not [op for op in code if op.startswith(("LDL", "STL"))], name


def test_cuda_kernels_move_16_bytes_at_a_time(sm):
    wide = {kernel: wide_accesses(code) for kernel, code in instructions(sm).items()}
    assert Counter(map(kind, wide)) == KERNELS
    for name, (loads, stores) in wide.items():
        if kind(name) in VECTOR_LOADS:
            lists = 1 if NARROW_MOMENTS in name else 2  # at least, that are read 16 bytes at a time; two vectors in flight
            assert loads >= 2 * lists, f"{name}: {loads} loads of 16 bytes"
        if kind(name) in RULES:
            assert stores >= 2, f"{name}: {stores} stores of 16 bytes"


def wide_accesses(code: list[str]) -> tuple[int, int]:
    return tuple(sum(op.startswith(f"{what}.E") and ".128" in op for op in code) for what in ("LDG", "STG"))


def test_cuda_skip_comes_before_any_other_load(sm):
    """A skipped step reads found_inf and grad_scale and ends."""
    for name, code in instructions(sm).items():
        if kind(name) in (*RULES, "scalars_kernel"):
            before = [op.split(".")[0] for op in code[: code.index("EXIT")]]
            assert before.count("LDG") == 2, name
            assert not {"STG", "LD", "ST", "BAR"} & set(before), name


def test_cuda_update_of_fp32_has_no_fp64_arithmetic(sm):
    """What a tensor's elements share is computed in fp64 once, by a thread of another kernel."""
    for name, code in instructions(sm).items():
        fp64 = [op for op in code if op.startswith(("DMUL", "DADD", "DFMA"))]
        if kind(name) in RULES:
            master = re.search(r"Variant[ILib\dE]*([fd])", name)[1]
            assert bool(fp64) == (master == "d"), name
        elif kind(name) == "scalars_kernel":
            assert fp64, name


def test_cuda_stats_loads_are_in_flight_together(sm):
    """Of each thread three or four vectors of a gradient, whatever its dtype, with the norm and without."""
    for name, parts in stats_kernels(sm).items():
        loops = [part for part in parts if sum(".128" in opcode for opcode, _ in part) == 4]
        assert len(loops) >= DTYPES, name  # fp64 a second time, scaled, for a norm
        assert min(loads_in_flight(part, ".128") for part in loops) >= 3, name


def test_cuda_stats_take_few_instructions_an_element(sm):
    """Without the norm: reading 16-bit gradients is then bound by memory and not by arithmetic."""
    ((_, parts),) = [(n, p) for n, p in stats_kernels(sm).items() if "ILb0E" in n]
    elements = 4 * 16 // 2
    shifts = lambda part: sum(opcode.startswith(("SHF", "IMAD.SHL", "IMAD.U32")) for opcode, _ in part)
    loops = [p for p in parts if sum(".128" in opcode for opcode, _ in p) == 4 and shifts(p) >= elements]
    assert len(loops) == 2, "fp16 and bf16, each by two shifts of a word"
    assert all(len(part) <= MOST_PER_ELEMENT * elements for part in loops), [len(part) / elements for part in loops]


def test_cuda_stats_are_summed_by_the_last_block(sm):
    """Two tickets, each between fences; the block that sums has two results of others, of three numbers each, on their way."""
    for name, parts in stats_kernels(sm).items():
        code = [opcode for part in parts for opcode, _ in part]
        assert sum(opcode.startswith("ATOMG") and ".INC" in opcode for opcode in code) == 2, name
        assert sum(opcode.startswith("MEMBAR") for opcode in code) == 4, name
        assert sum(loads_in_flight(part, ".64.STRONG.GPU") >= 6 for part in parts) >= 2, name


def test_cuda_library_needs_no_driver():
    runtime, driver = native.ops.cuda_versions()
    assert runtime >= 12000
    assert driver == 0 or driver >= 11000
    needed = subprocess.run(["readelf", "-d", str(native.LIBRARY)], check=True, capture_output=True, text=True).stdout
    assert not re.search(r"NEEDED.*(cuda|nvrtc|c10_cuda)", needed)
