# SPDX-License-Identifier: Apache-2.0
"""batch_invariant: a row of linear_act has the same bits whatever the other rows are, how many, and where it stands."""

import os
import subprocess
import sys

import pytest
import torch

import mpkernels as mpk
from mpkernels.ops.linear_act import Activation
from mpkernels.runtime import native
from tests.levels import each_once
from tests.linear_act_cases import DTYPES, Case, backward, forward, grad_z_of, same_bits
from tests.paths import ROOT

pytestmark = pytest.mark.usefixtures("by_eager_and_auto")


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "mixed_float16", "float64"])
@pytest.mark.parametrize("sizes", [(5, 7), (33, 64), (1, 100), (300, 257)], ids=str)
def test_linear_act_batch_invariant(name, sizes, generator, device):
    dtypes, rows = DTYPES[name], 300
    x, weight, bias, _ = Case(rows, *sizes, dtypes).tensors(generator, device)
    call = lambda x: forward(x, weight, bias, dtypes, Activation.NONE, 0, batch_invariant=True)[0]
    out = call(x)
    for M in range(1, 71):
        assert same_bits(call(x[:M]), out[:M]), M
    for at in range(0, 64, 3):
        assert same_bits(call(torch.cat([x[70 : 70 + at], x[:1]]))[-1], out[0]), at
    order = torch.randperm(rows, generator=generator).to(device)
    assert same_bits(call(x[order]), out[order])


@pytest.mark.parametrize("policy", ["float16", "mixed_bfloat16", "float32"])
def test_linear_act_batch_invariant_policy(policy, generator):
    """Sampled one by one and trained in one batch of 4096: 0 bits apart."""
    layer = mpk.MPLinear(24, 16, activation="relu", policy=f"{policy},batch_invariant")
    assert layer.policy.batch_invariant
    x = torch.randn(4096, 24, generator=generator).to(layer.weight.dtype)
    out = layer(x)
    assert all(same_bits(layer(x[i : i + 1])[0], out[i]) for i in range(0, 4096, 61))


# ----- one function per element, wherever it stands ---------------------------------------------------------------

POLICIES = ("float32", "float64", "float16", "bfloat16", "mixed_float16", "mixed_bfloat16")


def assert_rows_stand_alone(activation, policy, rows):
    """`rows` at once and one by one, with one thread and with two: values, and gradients before the activation."""
    generator = torch.Generator().manual_seed(rows)
    name = None if activation == Activation.NONE else activation.name.lower()
    layer = mpk.MPLinear(23, 37, activation=name, policy=f"{policy},batch_invariant")
    dtypes = DTYPES[policy]
    x = (torch.randn(rows, 23, generator=generator) * 16).to(layer.weight.dtype)
    z, grad = (torch.randn(rows, 37, generator=generator).to(dtype) for dtype in (dtypes.compute, dtypes.out))
    slopes = lambda z, grad: grad_z_of(grad, z, activation, dtypes)
    before = torch.get_num_threads()
    try:
        with torch.no_grad():
            out, grad_z = layer(x), slopes(z, grad)
            for threads in (1, 2):
                torch.set_num_threads(threads)
                assert same_bits(layer(x), out)
                assert same_bits(slopes(z, grad), grad_z)
            for i in range(rows):
                assert same_bits(layer(x[i]), out[i]), f"row {i}"
                assert same_bits(slopes(z[i : i + 1], grad[i : i + 1])[0], grad_z[i]), f"row {i} of grad_z"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("activation", Activation, ids=lambda a: a.name.lower())
@pytest.mark.parametrize("policy", POLICIES)
def test_linear_act_batch_invariant_activation(activation, policy):
    """37 columns: a row ends within a vector of any length."""
    assert_rows_stand_alone(activation, policy, 150)


@pytest.mark.parametrize(
    "activation, policy", each_once(Activation, POLICIES, few=pytest.mark.sweep, others=pytest.mark.release)
)
def test_linear_act_batch_invariant_activation_of_many_rows(activation, policy):
    """More elements than a thread is given at once."""
    assert_rows_stand_alone(activation, policy, 4000)


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_linear_act_batch_invariant_with_other_instructions(capability):
    """A process whose libraries use AVX2 alone, or nothing that not every x86-64 has."""
    isa = {"avx2": "AVX2", "default": "SSE41"}[capability]
    code = (
        "from tests.ops.linear_act.test_batch_invariant import *\n"
        f"assert torch.backends.cpu.get_cpu_capability() == {capability.upper()!r}\n"
        "[assert_rows_stand_alone(a, p, 100) for a in Activation for p in ('float32', 'float64')]"
    )
    env = os.environ | {"ATEN_CPU_CAPABILITY": capability, "ONEDNN_MAX_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("activation", Activation, ids=lambda a: a.name.lower())
@pytest.mark.parametrize("name", ["mixed_float16", "bfloat16", "float32"])
def test_linear_act_threads_do_not_matter(activation, name, generator):
    """Of what C++ computes without batch_invariant too, the gradients included."""
    if native.why_not() is not None or os.environ["MPKERNELS_BACKEND"] != "auto":
        pytest.skip("not of C++")
    dtypes, before = DTYPES[name], torch.get_num_threads()
    x, weight, bias, grad_out = Case(190, 530, 70, dtypes).tensors(generator)
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out, saved, x_compute = forward(x, weight, bias, dtypes, activation)
            operand = x if x.dtype == dtypes.compute else x_compute
            results.append([out, *backward(grad_out, operand, weight, saved, dtypes, activation)])
    finally:
        torch.set_num_threads(before)
    assert all(same_bits(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
