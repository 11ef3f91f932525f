# SPDX-License-Identifier: Apache-2.0
"""Where tests of Triton kernels run: on a GPU, or through Triton's interpreter, whose bf16 is mended first.

A test file of kernels takes the fixture `device`, the test of the interpreter, and what `forcing` makes for its ops as names of
its own. Where neither is there, to import this skips the file.
"""

import pytest
import torch

INTERPRETED = pytest.importorskip("triton").knobs.runtime.interpret
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU or TRITON_INTERPRET=1, which test_triton_interpreter.py sets", allow_module_level=True)
if INTERPRETED:
    from tests.toolchain import triton_interpreter

    triton_interpreter.install()


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.mark.skipif(not INTERPRETED, reason="of the interpreter")
def test_interpreter_computes_bf16_by_value():
    """First, and not to be skipped there: without it no bf16 test below means anything."""
    triton_interpreter.check()


def forcing(*ops: str):
    """A fixture that forces Triton for these ops in every test of the file."""

    @pytest.fixture(autouse=True)
    def force_triton(monkeypatch):
        monkeypatch.setenv("MPKERNELS_BACKEND", ",".join(f"{op}=triton" for op in ops))

    return force_triton
