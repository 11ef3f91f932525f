# SPDX-License-Identifier: Apache-2.0
"""linear_act by torch's own ops: on a GPU, counted without one, beside F.linear and relu; in bf16 on a CPU."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

import mpkernels as mpk
from mpkernels.ops.linear_act import Activation, backward_op, eager, forward_op, linear_act, onednn
from tests import bounds
from tests.dispatch_count import Counting
from tests.linear_act_cases import bf16, data, f16, f32, same_bits
from tests.paths import ROOT

M, N, K = 4096, 2048, 64  # more outputs than any operand has elements
TABLE = ROOT / "docs" / "fallback.md"
RELU = int(Activation.RELU)


def counts(run) -> tuple[int, float]:
    """Launches, and bytes per output of the tensors that are as large as the output."""
    with FakeTensorMode(), Counting() as counted:
        run()
    return counted.launches, counted.bytes_of(M * N) / (M * N)


def of(shape, dtype):
    return torch.empty(shape, dtype=dtype, device="cuda")


def forward(bias_dtype, out_dtype, batch_invariant=False):
    bias = None if bias_dtype is None else of(N, bias_dtype)
    args = (of((M, K), f16), of((N, K), f16), bias, None, RELU, f16, out_dtype, 0, batch_invariant)
    forward_op.function("eager")(*args)


def backward(grad_weight_dtype):
    args = (of((M, N), f16), of((M, K), f16), of((N, K), f16), None, of((M, N), f16), RELU, f16, f16, grad_weight_dtype, f32)
    backward_op.function("eager")(*args, [True] * 3)


def torchs_forward():
    F.relu(F.linear(of((M, K), f16), of((N, K), f16), of(N, f16)))


def torchs_backward():
    """What autograd calls of the same."""
    grad, x, weight = of((M, N), f16), of((M, K), f16), of((N, K), f16)
    grad = torch.ops.aten.threshold_backward(grad, of((M, N), f16), 0)
    return torch.mm(grad, weight), torch.mm(grad.t(), x), grad.sum(0)


ROWS = {
    "forward, bias in fp16": lambda: forward(f16, f16),
    "forward, no bias": lambda: forward(None, f16),
    "forward, bias in fp32": lambda: forward(f32, f16),
    "forward, bias and output in fp32": lambda: forward(f32, f32),
    "forward, batch_invariant, bias in fp32": lambda: forward(f32, f16, batch_invariant=True),
    "torch: F.linear and relu in fp16": torchs_forward,
    "backward, weight gradient in fp32": lambda: backward(f32),
    "backward, weight gradient in fp16": lambda: backward(f16),
    "torch: backward of the same in fp16": torchs_backward,
}


@pytest.mark.parametrize("bias, most", [(f16, 6), (None, 6), (f32, 14)], ids=str)
def test_fallback_bytes_per_output(bias, most):
    launches, moved = counts(lambda: forward(bias, f16))
    assert moved <= most
    assert launches <= 3
    assert counts(torchs_forward)[1] == 6


def test_fallback_batch_invariant_is_not_a_launch_per_few_rows():
    """Whole blocks are multiplied where they lie: a product each, the bias, ReLU and the rounding."""
    launches, _ = counts(lambda: forward(f32, f16, batch_invariant=True))
    assert launches <= M // eager.GPU_ROWS + 4


@pytest.mark.parametrize("rows", [0, 1, 511, 512, 1300])
def test_fallback_batch_invariant_products_have_one_size(rows, generator, monkeypatch):
    """On a CPU, whose mm has no out_dtype: what is multiplied, and that all of it arrives."""
    a, b = (torch.randint(-4, 5, shape, generator=generator).half() for shape in ((rows, 7), (7, 5)))
    exact, sizes = a.double() @ b.double(), set()

    def mm(a, b, *, out_dtype, out=None):
        sizes.add(tuple(a.shape))
        product = (a.double() @ b.double()).to(out_dtype)
        return product if out is None else out.copy_(product)

    monkeypatch.setattr(torch, "mm", mm)
    assert torch.equal(eager._by_equal_gemms(a, b).double(), exact)
    assert sizes == {(eager.GPU_ROWS, 7)}


def test_fallback_backward_is_torchs():
    """Select, sum, two products: what autograd does, the sum in fp32."""
    assert counts(lambda: backward(f16)) == counts(torchs_backward)


def test_fallback_table_is_what_is_counted():
    """docs/fallback.md, whose table `python tests/ops/test_fallback.py` writes."""
    assert table() in TABLE.read_text(), "run python tests/ops/test_fallback.py"


@pytest.mark.parametrize("accumulation", [False, True])
def test_fallback_sums_in_fp32_whatever_is_allowed(accumulation, monkeypatch):
    """Within a product nothing is allowed, after it everything is as it was, after an exception too."""
    matmul = torch.backends.cuda.matmul
    names = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction", "allow_fp16_accumulation")
    before = {name: getattr(matmul, name) for name in names}
    state = lambda: [getattr(matmul, name) for name in names]
    try:
        matmul.allow_fp16_accumulation = accumulation
        matmul.allow_fp16_reduced_precision_reduction = True
        expected, seen = state(), []
        addmm = torch.addmm

        def watched(*args):
            seen.append(state())
            return addmm(*args)

        monkeypatch.setattr(torch, "addmm", watched)
        with FakeTensorMode():
            forward(f16, f16)
            with pytest.raises(RuntimeError):
                eager._matmul_nt_rounded_once(of((4, 3), f16), of((2, 5), f16), of(5, f16), RELU)
        assert seen == [[False] * 3] * 2
        assert state() == expected
    finally:
        for name, value in before.items():
            setattr(matmul, name, value)


def table() -> str:
    lines = ["| call | launches | bytes per output |", "|---|---|---|"]
    for name, run in ROWS.items():
        launches, moved = counts(run)
        lines.append(f"| {name} | {launches} | {moved:g} |")
    return "\n".join(lines)


if __name__ == "__main__":
    head, mark, _ = TABLE.read_text().partition("| call |")
    TABLE.write_text(f"{head}{table()}\n")


# ----- bf16 on a CPU, by oneDNN ---------------------------------------------------------------

by_bf16 = pytest.mark.skipif(not onednn.has_bf16_instructions(), reason="this CPU has no instructions for bf16")


@by_bf16
@pytest.mark.parametrize("K", [5, 31, 50, 64, 784])
def test_fallback_bf16_rounds_once(K, generator, monkeypatch):
    """As `test_linear_act_correctly_rounded`, whatever K; and that oneDNN's bf16 is what computed it."""
    linear, seen = torch.ops.mkldnn._linear_pointwise, []
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *args: seen.append(args[0].dtype) or linear(*args))
    x, weight = (data(shape, bf16, "normal", generator) for shape in ((70, K), (60, K)))
    bias = data((60,), f32, "normal", generator)
    out = forward_op.function("eager")(x, weight, bias, None, 0, bf16, bf16, 0)[0]
    assert seen == [bf16]
    bounds.check_correctly_rounded(out, x, weight, bias, Activation.NONE, bf16)


@by_bf16
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("K", [33, 50, 64])
def test_fallback_bf16_keeps_nan_in_its_row(K, value, generator):
    """Which oneDNN itself does not where AMX reads on into the next row."""
    x, weight = (data(shape, bf16, "normal", generator) for shape in ((40, K), (60, K)))
    call = lambda: forward_op.function("eager")(x, weight, None, None, 0, bf16, bf16, 0)[0]
    clean = call()
    x[7] = value
    out = call()
    assert same_bits(torch.cat([out[:7], out[8:]]), torch.cat([clean[:7], clean[8:]]))
    assert not out[7].isfinite().any()


@pytest.mark.parametrize("exponents", [(-133, 100), (-60, 0), (0, -60), (-51, 51), (-50, -50), (-49, -40)], ids=str)
@pytest.mark.parametrize("bias", [None, 0.0, 2.0**-130, 2.0**-99, -(2.0**-120)])
def test_fallback_bf16_loses_nothing_small(exponents, bias, generator):
    """These instructions take what is below 2^-126 for 0, a result too."""
    a, b = (data((40, 64), bf16, "normal", generator).sign() * 2.0**exponent for exponent in exponents)
    a[3], a[4, 1:], b[5] = 0, 0, 0
    bias = None if bias is None else torch.full((40,), bias)
    out = forward_op.function("eager")(a, b, bias, None, 0, bf16, bf16, 0)[0]
    bounds.check_forward(out, a, b, bias, Activation.NONE, bf16)


@pytest.fixture
def looked_at(monkeypatch):
    """The shapes of what was looked at for small numbers, where any CPU multiplies bf16 as one with instructions for it."""
    look, shapes = onednn._least_exponent, []
    monkeypatch.setattr(onednn, "seen", {})
    monkeypatch.setattr(onednn, "has_bf16_instructions", lambda: True)
    monkeypatch.setattr(onednn, "_least_exponent", lambda tensor: shapes.append(tuple(tensor.shape)) or look(tensor))
    return shapes


def trained(generator):
    """x and the weight of a layer in bf16, and a forward of it by eager."""
    x, weight = (data(shape, bf16, "normal", generator).requires_grad_() for shape in ((40, 64), (50, 64)))
    return x, weight, lambda: linear_act(x, weight, activation=Activation.RELU, compute_dtype=bf16, out_dtype=bf16)


def test_fallback_bf16_looks_once_at_an_operand(looked_at, generator, monkeypatch):
    """Three products have three operands, each in two of them; a forward looks anew."""
    monkeypatch.setenv("MPKERNELS_BACKEND", "eager")
    forward = trained(generator)[-1]
    for _ in range(2):
        looked_at.clear()
        forward().sum().backward()
        assert looked_at == [(40, 64), (50, 64), (40, 50)]
        assert not onednn.seen


@pytest.mark.skipif(not mpk.is_available("native"), reason="needs the compiled library")
def test_fallback_bf16_looks_anew_after_a_forward_in_cpp(looked_at, generator, monkeypatch):
    """A tuned table may have forward in C++ and backward by eager: what eager saw before the weight changed is not of it."""
    _, weight, forward = trained(generator)
    monkeypatch.setenv("MPKERNELS_BACKEND", "eager")
    with torch.no_grad():
        forward()
        weight.mul_(2.0**-60)
    monkeypatch.setenv("MPKERNELS_BACKEND", "linear_act=native,linear_act_backward=eager")
    looked_at.clear()
    forward().sum().backward()
    assert looked_at == [(40, 50), (50, 64), (40, 64)]


@pytest.mark.parametrize("rows", [5, 41, 64])
def test_fallback_bf16_weight_gradient_rounds_once(rows, looked_at, generator):
    """Whose operands both lie by columns; looked at, it is by oneDNN."""
    grad_out, x, weight = (data(shape, bf16, "normal", generator) for shape in ((rows, 70), (rows, 60), (70, 60)))
    args = (grad_out, x, weight, None, None, 0, bf16, bf16, bf16, f32, [False, True, False])
    grad_weight = backward_op.function("eager")(*args)[1]
    assert looked_at == [(rows, 70), (rows, 60)]
    bounds.check_correctly_rounded(grad_weight, grad_out.t(), x.t(), None, Activation.NONE, bf16)


def test_fallback_bf16_sees_what_torch_does_not(looked_at, generator, monkeypatch):
    """A write through `.data` moves no version, and what one forward found is not another's."""
    monkeypatch.setenv("MPKERNELS_BACKEND", "eager")
    x, weight, forward = trained(generator)
    forward()  # without a backward
    weight.data.mul_(2.0**-130)
    looked_at.clear()
    out = forward()
    assert looked_at == [(40, 64), (50, 64)]
    bounds.check_forward(out.detach(), x.detach(), weight.detach(), None, Activation.RELU, bf16)
    looked_at.clear()
    linear_act(x, weight, activation=Activation.NONE, compute_dtype=bf16, out_dtype=f32).sum().backward()
    assert (50, 64) in looked_at  # this forward, which is in fp32, has forgotten what that one found


def test_fallback_bf16_forgets_what_was_freed(looked_at, generator, monkeypatch):
    """No backward follows in evaluation, where every batch is another tensor: what remains of each would pile up."""
    monkeypatch.setenv("MPKERNELS_BACKEND", "eager")
    weight = data((50, 64), bf16, "normal", generator)
    for _ in range(3 * onednn.FREED):
        linear_act(torch.ones(40, 64, dtype=bf16), weight, activation=Activation.NONE, compute_dtype=bf16, out_dtype=bf16)
    assert len(looked_at) == 6 * onednn.FREED
    assert len(onednn.seen) <= onednn.FREED


def test_fallback_bf16_looks_anew_at_a_gradient(looked_at, generator):
    """Which is not what it was, where a buffer is given again."""
    grad_out, x, weight = (data(shape, bf16, "normal", generator) for shape in ((40, 70), (40, 60), (70, 60)))
    args = (grad_out, x, weight, None, None, 0, bf16, bf16, bf16, f32, [True, False, False])
    for _ in range(2):
        looked_at.clear()
        grad_x = backward_op.function("eager")(*args)[0]
        assert looked_at[0] == (40, 70)
        bounds.check_forward(grad_x, grad_out, weight.t(), None, Activation.NONE, bf16)
        grad_out.data.mul_(2.0**-130)


@pytest.mark.parametrize("dtype", [bf16, f32], ids=str)
def test_fallback_bf16_finds_the_least_exponent(dtype):
    """Of every pattern of the upper 16 bits, beside 0 and a larger number."""
    bits = torch.arange(1 << 16, dtype=torch.int32)
    values = (bits.to(torch.int16).view(bf16) if dtype == bf16 else (bits << 16).view(f32)).tolist()
    for i in range(0, 1 << 16, 37):
        found = onednn._least_exponent(torch.tensor([0.0, 3.0e38, values[i]], dtype=dtype))
        magnitude = i & 0x7FFF
        assert found == min(magnitude >> 7, 254) if magnitude else found == 254
    assert onednn._least_exponent(torch.zeros(3, dtype=dtype)) > 254
    assert onednn._least_exponent(torch.full((3,), torch.inf, dtype=dtype)) == 255
