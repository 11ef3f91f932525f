# SPDX-License-Identifier: Apache-2.0
"""README: its examples run and say what is printed, its matrix is the registry's, the important stands first."""

import re

import pytest
import torch
from torch import nn

import mpkernels as mpk
from bench import report
from bench.models import Transformer
from mpkernels.runtime import native
from mpkernels.runtime.resolve import ops, triton_why_not
from tests.paths import ROOT

README = (ROOT / "README.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def data(count: int):
    return [(torch.randn(8, 16), torch.randint(4, (8,))) for _ in range(count)]


def test_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 120
    for what in (
        "**Status**",
        "pip install",
        "```python",
        "plots/bytes.svg",
        "plots/speed.svg",
        "**The overflow has a name**",
    ):
        assert next(i for i, line in enumerate(lines) if what in line) < 45, what


def test_readme_first_example_runs(capsys):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    found = {"model": model, "loader": data(3)}
    exec(CODE[0], found)
    assert capsys.readouterr().out == "the last step was taken\n"
    assert all(type(linear) is mpk.MPLinear for linear in found["model"][::2])


def test_readme_second_example_runs():
    """A GPT under autocast: every linear is converted, what lies between is 16-bit, the step is taken."""
    torch.manual_seed(0)
    gpt = Transformer(nn.Embedding(50, 32), 8, 32, 2, 2, 50, causal=True, pooled=False)
    before, seen = gpt.head.weight.detach().clone(), set()
    gpt.blocks[0].down.register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    found = {"torch": torch, "mpk": mpk, "gpt": gpt, "batches": [torch.randint(50, (2, 9)) for _ in range(3)]}
    exec(CODE[1], found)
    assert all(row.converted for row in mpk.convert_report(found["model"]))
    assert seen == {torch.bfloat16}
    assert not torch.equal(gpt.head.weight, before)
    assert found["opt"].grad_norm > 0


def test_readme_has_no_other_code():
    assert len(CODE) == 2
    assert README.count("```") == 4


def test_readme_shows_a_report_that_is_printed():
    """Of a GPT's step in which three elements of one gradient are not finite."""
    (shown,) = re.findall(r"`(step .* skipped .*)`", README)
    weight = nn.Parameter(torch.zeros(32, 32))
    optimizer = mpk.optim.AdamW([("fc2.weight", weight)], lr=1e-3)
    scaler = mpk.GradScaler()
    for step in range(4):
        weight.grad = None
        scaler.scale((weight * 2.0**-17).sum()).backward()
        if step == 3:
            weight.grad.view(-1)[:3] = torch.inf
        scaler.step(optimizer)
        scaler.update()
    assert scaler.overflow_report(optimizer) == shown


def test_readme_small_gradients_arrive():
    """A weight gradient of 1e-8 under fp16 compute, which is 0 in fp16."""
    layer = mpk.MPLinear(1, 1, bias=False, policy="mixed_float16")
    (layer(torch.full((1, 1), 1e-4)) * 1e-4).sum().backward()
    assert layer.weight.grad.item() == pytest.approx(1e-8, rel=2**-10)
    assert torch.tensor(1e-8).half() == 0


@pytest.mark.parametrize("capability", [(7, 0), (7, 5), (8, 0), (9, 0)])
def test_readme_matrix_knows_the_least_gpus(monkeypatch, capability):
    """Triton needs sm80 and CUDA C++ sm75, as the matrix has it; sm90 of the GEMM is in the registry."""
    device, text = torch.device("cuda", 7), f"sm{capability[0]}{capability[1]}"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    least = {backend: sm.removesuffix("+") for backend, sm in report.LEAST_SM.items()}
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    triton_why_not.cache_clear()
    assert (triton_why_not(device) is None) == (text >= least["triton"])
    triton_why_not.cache_clear()
    assert (native._old_gpu(capability) is None) == (text >= least["native"])


def test_readme_matrix_has_every_op_and_backend():
    lines = {name: line for line in report.support({}).splitlines()[2:] for name in line.split("`")[1::2]}
    assert lines.keys() == ops.keys()
    for name, op in ops.items():
        cells = [cell.strip() for cell in lines[name].split("|")[2:-1]]
        assert len([cell for cell in cells[:2] if cell]) == len({"eager", "native"} & set(op.backends))
        assert bool(cells[4]) == ("triton" in op.backends)
        on_gpu = op.implementation("native", torch.device("cuda"))
        assert cells[3] == ("" if on_gpu is None else "sm90" if on_gpu.sm == 90 else report.LEAST_SM["native"])


def test_readme_says_when_to_use_autocast():
    assert "Wherever more than linears touch the activations, run the converted model inside" in " ".join(README.split())
    assert "Linears only: combine with autocast for convolutions." in " ".join(README.split())
    assert "nothing has run on one yet" in " ".join(README.split())
