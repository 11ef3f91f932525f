# SPDX-License-Identifier: Apache-2.0
"""How native ops read what Python gives them: arguments by position, tensors through DLPack, errors as exceptions."""

import threading
import time

import pytest
import torch

from mpkernels.runtime import native

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=f"native: {native.why_not()}")

f32, f16 = torch.float32, torch.float16


def multiply(a, b, out, *, bias=None, compute=f32, activation=0):
    native.ops.linear_act_multiply(a, b, bias, compute, activation, False, out)
    return out


def test_native_op_has_its_schema():
    assert native.ops.schemas == list(native.schemas().values())
    for name, schema in native.schemas().items():
        op = getattr(native.ops, name, None)  # those for GPUs may be missing
        assert op is None or (op.__name__, op.__doc__) == (name, schema)


@pytest.mark.parametrize("count", [0, 6, 12])
def test_native_op_counts_its_arguments(count):
    """linear_act_multiply has seven, and four with defaults."""
    with pytest.raises(TypeError, match=f"got {count} arguments for linear_act_multiply"):
        native.ops.linear_act_multiply(*[None] * count)


@pytest.mark.parametrize("a", [None, "a", 1.0, [1.0]])
def test_native_op_refuses_what_is_no_tensor(a):
    out = torch.full((2, 3), torch.nan)
    with pytest.raises((TypeError, RuntimeError)):
        multiply(a, torch.ones(3, 4), out)
    assert out.isnan().all()


def test_native_op_refuses_other_arguments():
    a, b, out = torch.ones(2, 4), torch.ones(3, 4), torch.full((2, 3), torch.nan)
    for wrong in ({"compute": "float32"}, {"compute": torch.complex64}, {"activation": "relu"}, {"activation": None}):
        with pytest.raises(TypeError):
            multiply(a, b, out, **wrong)
    for wrong in (a.to(torch.complex64), a.to("meta"), a.to(torch.int16)):
        with pytest.raises(RuntimeError):
            multiply(wrong, b, out)
    with pytest.raises(RuntimeError, match="a result must be as large as the product"):
        multiply(a, b, out[:1])
    assert out.isnan().all()
    assert multiply(a, b, out).eq(4).all(), "a failed call leaves nothing behind"


def test_native_op_reads_sizes_and_strides():
    a, b = torch.randn(7, 10)[::2, 1:9], torch.randn(8, 12)[:, 3:9]
    torch.testing.assert_close(multiply(a, b.t(), torch.empty(4, 6)), a @ b)


def test_native_op_takes_parameters_and_what_has_a_graph():
    a, b = torch.randn(2, 4), torch.nn.Parameter(torch.randn(3, 4))
    expected = multiply(a, b.detach(), torch.empty(2, 3))
    assert multiply((a.requires_grad_() * 1), b, torch.empty(2, 3)).equal(expected)


def test_native_op_takes_an_enum_for_an_int_and_an_int_for_a_float():
    table, last = torch.zeros(1, 4), torch.empty(1, 4)
    native.ops.end_step_(table, last, None, 0, -1)
    assert table.eq(-1).all()


def test_native_op_lets_other_threads_run():
    """A second of products in another thread, in which this one counts on."""
    a, out, ended = torch.ones(1500, 1500), torch.empty(1500, 1500), []

    def work():
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        start = time.perf_counter()
        multiply(a, a, out)
        ended.append((start, time.perf_counter()))
        torch.set_num_threads(before)

    thread = threading.Thread(target=work)
    thread.start()
    ticks = []
    while thread.is_alive():
        ticks.append(time.perf_counter())
        time.sleep(0.001)
    ((start, end),) = ended
    assert sum(start < tick < end for tick in ticks) >= 3
