# SPDX-License-Identifier: Apache-2.0
"""linear_act on a GPU against fp64, at 2,500 random shapes for each implementation.

The other tests of linear_act run on a GPU too, where there is one; these are for it alone. bench/device.sh runs those that are
not generated.
"""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from mpkernels.functional import linear_act
from mpkernels.ops.linear_act import Activation, backward_op, forward_op, sm90
from mpkernels.ops.linear_act.call import CallKey
from tests import bounds
from tests.linear_act_cases import DTYPES, Case, Dtypes, backward, forward, generated_case, run, same_bits

f16, bf16, f32 = torch.float16, torch.bfloat16, torch.float32
BACKENDS = ("eager", "triton", "native")
SEEDS, CASES = range(50), 50
REPEATS = 20
SELECTING = (Activation.NONE, Activation.RELU)  # those of native
HALVES = [name for name, dtypes in DTYPES.items() if dtypes.compute in (f16, bf16)]

pytestmark = pytest.mark.gpu


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch) -> str:
    """Forced, with what is allocated filled with NaN until it is written."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    for op in (forward_op, backward_op):
        reason = op.why_not(request.param, torch.device("cuda"), f16)
        if reason is not None:
            pytest.skip(f"{request.param}: {reason}")
    monkeypatch.setenv("MPKERNELS_BACKEND", f"linear_act={request.param},linear_act_backward={request.param}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cuBLAS asks for an environment variable
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield request.param
        torch.use_deterministic_algorithms(False)


def suited(case: Case, backend: str, random: np.random.Generator) -> Case:
    """The case as `backend` takes it. native: 16-bit, ReLU or none, sizes in vectors of 16 bytes: see sm90.py."""
    if backend != "native":
        return case
    dtypes = DTYPES[random.choice(HALVES)]
    out = dtypes.out if dtypes.out in (dtypes.compute, f32) else f32
    activation = case.activation if case.activation in SELECTING else SELECTING[random.integers(len(SELECTING))]
    N, K = (-(-size // 8) * 8 for size in (case.N, case.K))
    return replace(case, N=N, K=K, dtypes=replace(dtypes, out=out), activation=activation)


def cases_of(seed: int, backend: str) -> list[Case]:
    random = np.random.default_rng(seed)
    return [suited(generated_case(random), backend, random) for _ in range(CASES)]


@pytest.mark.parametrize("seed", SEEDS)
def test_linear_act_gpu_generated_shapes(seed, backend, generator):
    for case in cases_of(seed, backend):
        try:
            run(case, generator, torch.device("cuda"))
        except Exception as error:
            raise AssertionError(f"{backend}: {case}") from error


# Several tiles of every kernel, with and without partial ones; one long sum for each role.
LARGE = ((512, 1024, 768), (1000, 520, 264), (129, 4104, 72), (4096, 136, 40), (64, 64, 16384), (2056, 2056, 128))


@pytest.mark.parametrize("dtype", [f16, bf16])
@pytest.mark.parametrize("sizes", LARGE)
def test_linear_act_gpu_large_shapes(sizes, dtype, backend, generator):
    for grad in (dtype, f32):
        run(Case(*sizes, Dtypes(dtype, dtype, dtype, dtype, grad)), generator, torch.device("cuda"))


@pytest.mark.parametrize("dtype", [f16, bf16])
def test_linear_act_gpu_repeats_have_the_same_bits(dtype, backend, generator):
    dtypes = Dtypes(dtype, dtype, dtype, dtype, f32)
    x, weight, bias, grad_out = Case(1000, 520, 264, dtypes).tensors(generator, torch.device("cuda"))
    results = []
    for _ in range(REPEATS):
        out, saved, _ = forward(x, weight, bias, dtypes)
        results.append((out, saved, *backward(grad_out, x, weight, saved, dtypes)))
    for again in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], again, strict=True))


def test_linear_act_gpu_offsets_pass_2_to_the_31(backend):
    """out has 2**31 + 2**21 elements; what lies behind the 2**31st is right."""
    M, N, K = (1 << 20) + 1024, 1 << 11, 16
    if torch.cuda.mem_get_info()[0] < 80 << 30:  # eager packs its mask from int64
        pytest.skip("needs 80 GB of GPU memory")
    x, weight = torch.randn(M, K, device="cuda").half(), torch.randn(N, K, device="cuda").half()
    out, saved, _ = forward(x, weight, None, DTYPES["float16"])
    last = slice(M - 256, M)
    bounds.check_forward(out[last], x[last], weight, None, Activation.RELU, f16, 2.0**-23)
    again, mask, _ = forward(x[last], weight, None, DTYPES["float16"])
    assert torch.equal(~(out[last] <= 0), ~(again <= 0))
    assert torch.equal(saved[last], mask)


def test_linear_act_gpu_step_does_not_sync(backend):
    """Forward and backward in a mode that refuses to wait for the GPU, after one run that compiles."""
    x = torch.randn(64, 64, device="cuda", dtype=f16, requires_grad=True)
    layer = torch.nn.Linear(64, 64, device="cuda", dtype=f16)
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            linear_act(x, layer.weight, layer.bias, activation="relu").backward(torch.ones_like(x))
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_linear_act_gpu_is_captured(backend, generator):
    """Replaying a CUDA graph of the forward on new values gives what the call gives."""
    x, weight, bias, _ = Case(136, 264, 72, DTYPES["float16"]).tensors(generator, torch.device("cuda"))
    forward(x, weight, bias, DTYPES["float16"])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _, _ = forward(x, weight, bias, DTYPES["float16"])
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert same_bits(out, forward(x, weight, bias, DTYPES["float16"])[0])


def test_linear_act_gpu_has_enough_shapes():
    """This runs anywhere: 2,000 for each implementation are asked for, and those of native are what it takes."""
    assert len(SEEDS) * CASES >= 2000
    made = [case for seed in SEEDS[:8] for case in cases_of(seed, "native")]
    for case in made:
        d = case.dtypes
        key = CallKey(torch.device("cuda"), d.compute, d.out, int(case.activation), case.N, case.K)
        reason = sm90.why_not(key)
        assert reason is None, f"{case}: {reason}"
        assert d.compute in (f16, bf16)
    assert {case.activation for case in made} == set(SELECTING)
    assert len({(case.M, case.N, case.K) for case in made}) > len(made) // 2
