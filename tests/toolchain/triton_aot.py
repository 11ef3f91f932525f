# SPDX-License-Identifier: Apache-2.0
"""Compile Triton kernels ahead of time, for GPUs that are not here, and measure the machine code.

    python -m tests.toolchain.triton_aot linear_act --sm 80 90 [--all] [--kernel gemm_tma_kernel]

prints one JSON object per line for each kernel x tile x architecture. The cases of an op are in
`tests/triton_aot_<op>.py`: `cases(sm, all)` yields `(kernel, signature, constexprs, options)`, those that the op would
launch on that architecture; with `all=False` a few that take under a minute together.

NOTE: a process of its own, without TRITON_INTERPRET: a function made under the interpreter cannot be compiled.
"""

import argparse
import importlib
import json
import re
import subprocess
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Bytes of shared memory that one block may ask for, by architecture.
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448}

# Tensor cores by generation, of 8-bit floats too, TMA's loads and stores, additions in fp32, conversions of 8-bit floats.
TENSOR_CORES = ("HMMA", "HGMMA", "UTCHMMA", "DMMA", "QMMA", "QGMMA", "UTCQMMA")
OPCODES = (*TENSOR_CORES, "UTMALDG", "UTMASTG", "FADD", "F2FP.F16.E")


@dataclass
class Compiled:
    """One kernel compiled for one architecture. shared and stack in bytes; n_spills counts loads and stores of spills."""

    name: str
    sm: int
    signature: dict[str, str]
    constexprs: dict
    options: dict
    shared: int
    n_regs: int
    n_spills: int
    stack: int
    ptx: str = field(repr=False)
    sass: str = field(repr=False)

    def count(self, opcode: str) -> int:
        """How often an instruction stands in the machine code, by the start of its name."""
        return len(re.findall(rf"\b{re.escape(opcode)}", self.sass))

    def maxima_that_drop_nan(self) -> list[str]:
        """Floating-point maxima that return the other operand for a NaN: a ReLU made of one turns NaN into 0.

        NOTE: PTX has no max.NaN.f64; in fp64 Triton puts a select around the maximum.
        """
        ptx = re.findall(r"\bmax(?:\.ftz)?\.(?:f16|bf16|f32).*", self.ptx)
        sass = re.findall(r"\b(?:FMNMX|HMNMX2)(?!\S*\.NAN)\S* .*", self.sass)
        return ptx + sass


def compile_for(kernel, signature: dict[str, str], constexprs: dict, sm: int, **options) -> Compiled:
    """Compile `kernel` for `sm` (90 for sm_90a).

    signature: type of each argument that is not in constexprs, `"*fp16"`, `"i64"`, `"fp32"`; with `:16` where Triton
    would find it divisible by 16 at launch (aligned pointers and strides), `:1` where it would find it equal to 1.
    """
    values = constexprs | {name: 1 for name, kind in signature.items() if kind.endswith(":1")}
    types = {name: "constexpr" if name in values else signature[name].split(":")[0] for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if signature.get(n, "").endswith(":16")}
    source = ASTSource(kernel, types, values, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    sass, usage = _disassemble(compiled.asm["cubin"])
    return Compiled(
        name=compiled.metadata.name,
        sm=sm,
        signature=signature,
        constexprs={name: v.__name__ if callable(v) else v for name, v in constexprs.items()},  # functions are no JSON
        options=options,
        shared=compiled.metadata.shared,
        n_regs=usage["REG"],
        n_spills=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        stack=usage["STACK"] + usage["LOCAL"],
        ptx=compiled.asm["ptx"],
        sass=sass,
    )


def _disassemble(cubin: bytes) -> tuple[str, dict[str, int]]:
    """Machine code as text, and what it uses (REG, STACK, LOCAL, ...), by the tools in Triton's wheel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass = _cuobjdump("-sass", file.name)
        usage = _cuobjdump("-res-usage", file.name)
    return sass, {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", usage)}


def _cuobjdump(*arguments: str) -> str:
    return subprocess.run([triton.knobs.nvidia.cuobjdump.path, *arguments], check=True, capture_output=True, text=True).stdout


def compile_cases(op: str, sms: Iterable[int], every: bool, name: str | None) -> Iterable[dict]:
    """What the command prints, row by row; `name`: of one kernel, the others are left out."""
    cases = importlib.import_module(f"tests.toolchain.triton_aot_{op}").cases
    for sm in sms:
        for kernel, signature, constexprs, options in cases(sm, every):
            if name not in (None, kernel.__name__):
                continue
            start = time.perf_counter()
            compiled = compile_for(kernel, signature, constexprs, sm, **options)
            row = {"triton": triton.__version__} | asdict(compiled)
            del row["ptx"], row["sass"]
            row["maxima_that_drop_nan"] = compiled.maxima_that_drop_nan()
            row["opcodes"] = {opcode: compiled.count(opcode) for opcode in OPCODES}
            row["specialized"] = "setmaxnreg" in compiled.ptx and ".reqntid 384" in compiled.ptx
            row["seconds"] = round(time.perf_counter() - start, 2)
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.toolchain.triton_aot", description=__doc__.splitlines()[0])
    parser.add_argument("op")
    parser.add_argument("--sm", type=int, nargs="+", default=sorted(SHARED_LIMIT))
    parser.add_argument("--all", action="store_true", help="every tile instead of a few")
    parser.add_argument("--kernel", help="compile this kernel alone")
    arguments = parser.parse_args()
    for row in compile_cases(arguments.op, arguments.sm, arguments.all, arguments.kernel):
        print(json.dumps(row, default=str), flush=True)


if __name__ == "__main__":
    main()
