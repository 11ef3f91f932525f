# SPDX-License-Identifier: Apache-2.0
"""Models leave the process: torch.export with our op, in ATen without it, and ONNX, all with the numerics of the op."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import mpkernels as mpk
from mpkernels.ops.linear_act import Activation
from tests.bounds import check_forward
from tests.levels import each_once
from tests.linear_act_cases import same_bits

POLICIES = ("float64", "mixed_float32", "mixed_float16", "mixed_bfloat16,output=bfloat16", "float16", "float64,compute=float16")
BATCH = ({0: torch.export.Dim("batch")},)


def layer_of(policy, activation=None, bias=True, generator=None) -> tuple[mpk.MPLinear, torch.Tensor]:
    torch.manual_seed(0)
    layer = mpk.MPLinear(48, 33, bias, activation=activation, policy=policy)
    return layer, torch.randn(5, 48, generator=generator).to(layer.policy.param_dtype)


def decomposed(model, x) -> torch.export.ExportedProgram:
    program = torch.export.export(model, (x,), dynamic_shapes=BATCH)
    return program.run_decompositions(mpk.functional.decompositions())


@pytest.mark.parametrize("policy, bias, activation", each_once(POLICIES, (True, False), Activation))
def test_decomposition_has_the_numerics_of_the_op(policy, bias, activation, generator):
    name = None if activation == Activation.NONE else activation.name.lower()
    layer, x = layer_of(policy, name, bias, generator)
    program = decomposed(layer, x)
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert {target.namespace for target in targets if isinstance(target, torch._ops.OpOverload)} == {"aten"}
    more = torch.cat([x, -x, x / 3])
    out = program.module()(more).detach()
    assert out.dtype == layer(x).dtype
    check_forward(out, more, layer.weight, layer.bias, activation, layer.policy.compute_dtype, random_sign=True)


@pytest.mark.parametrize("activation", [a for a in Activation if a])
@pytest.mark.parametrize("policy", ["mixed_float16", "float64"])
def test_decomposition_saves_what_the_op_saves(policy, activation, generator):
    layer, x = layer_of(policy, activation.name.lower(), generator=generator)
    op = torch.ops.mpkernels.linear_act.default
    for N in (layer.out_features, 0):
        parameters = layer.weight[:N].detach(), layer.bias[:N].detach()
        args = (x, *parameters, None, int(activation), layer.policy.compute_dtype, x.dtype, 1)
        for got, expected in zip(mpk.functional.decompositions()[op](*args), op(*args), strict=True):
            assert got.shape == expected.shape
            assert got.dtype == expected.dtype
        assert same_bits(got, expected)  # x_compute


@pytest.mark.sweep
def test_decomposition_under_inductor_rounds_where_casts_are_emulated(generator):
    """As its docstring says; without that setting operands keep the bits that the policy cuts off."""
    layer, x = layer_of("mixed_float16", "relu", True, generator)
    layer.requires_grad_(False)
    model = decomposed(layer, x).module()
    with torch._inductor.config.patch(emulate_precision_casts=True):
        out = torch.compile(model)(x)
    torch.compiler.reset()
    check_forward(out, x, layer.weight, layer.bias, Activation.RELU, layer.policy.compute_dtype, random_sign=True)


RELOAD = """
import sys, torch
folder = sys.argv[1]
x = torch.load(f"{folder}/x.pt")
plain = torch.export.load(f"{folder}/plain.pt2").module()(x)
assert not any(name.startswith("mpkernels") for name in sys.modules)
import mpkernels
out = torch.export.load(f"{folder}/ours.pt2").module()(x)
torch.save([plain.detach(), out.detach()], f"{folder}/out.pt")
"""


def test_exported_programs_reload_in_another_process(tmp_path):
    """Ours with mpkernels imported and the bits of eager; the decomposed one without it."""
    torch.manual_seed(0)
    model = mpk.convert(nn.Sequential(nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 4)), "mixed_float16")
    x = torch.randn(3, 8)
    torch.export.save(torch.export.export(model, (x,), dynamic_shapes=BATCH), tmp_path / "ours.pt2")
    program = decomposed(model, x)
    torch.export.save(program, tmp_path / "plain.pt2")
    more = torch.randn(7, 8)
    torch.save(more, tmp_path / "x.pt")
    done = subprocess.run([sys.executable, "-c", RELOAD, tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    plain, ours = torch.load(tmp_path / "out.pt")
    assert same_bits(ours, model(more).detach())
    assert same_bits(plain, program.module()(more).detach())


@pytest.mark.parametrize("activation", [None, "relu"])
def test_onnx_has_the_numerics_of_the_op(activation, generator, tmp_path):
    """Through onnxruntime, whose optimizer could drop a cast to fp16 and back."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    layer, x = layer_of("mixed_float16", activation, generator=generator)
    torch.onnx.export(decomposed(layer, x), (x,), dynamo=True, verbose=False).save(tmp_path / "layer.onnx")
    session = runtime.InferenceSession(tmp_path / "layer.onnx", providers=["CPUExecutionProvider"])
    more = torch.cat([x, -x, x / 3])
    (out,) = session.run(None, {session.get_inputs()[0].name: more.numpy()})
    assert out.dtype == np.float32
    check_forward(torch.from_numpy(out), more, layer.weight, layer.bias, layer._activation, torch.float16, random_sign=True)
