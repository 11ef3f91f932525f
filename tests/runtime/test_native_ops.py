# SPDX-License-Identifier: Apache-2.0
"""How native ops read what Python gives them: arguments by position, tensors through DLPack, errors as exceptions."""

import contextlib
import sys
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


def test_native_op_refuses_another_dtype_than_it_reads():
    scale, skipped, counter = torch.ones(()), torch.zeros(2, dtype=torch.int64), torch.zeros((), dtype=torch.int32)
    for found_inf in (torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int32)):
        with pytest.raises(RuntimeError, match="another dtype"):
            native.ops.update_scale_(scale, counter, counter, skipped, found_inf, 2.0, 0.5, 1, 1, 0.0, 1.0)
    assert scale == 1
    assert counter == 0


@pytest.mark.skipif(not hasattr(native.ops, "linear_act_sum"), reason="the library was built without nvcc")
def test_native_op_of_gpus_refuses_the_cpu():
    with pytest.raises(NotImplementedError, match="not implemented on the CPU"):
        native.ops.linear_act_sum(torch.ones(2, 3, 4), torch.empty(3, 4))


def test_native_op_counts_references():
    """Of what it is given and what it returns, where it raises too."""
    a, b, out = torch.ones(2, 4), torch.ones(3, 4), torch.empty(2, 3)
    operands = a.to(torch.bfloat16), b.to(torch.bfloat16)
    objects = [a, b, out, *operands, f32, None, True]

    def counts():
        return [sys.getrefcount(each) for each in objects]

    before = counts()
    for _ in range(1000):
        multiply(a, b, out)
        assert native.ops.linear_act_products_stay_normal(*operands, None)
        with contextlib.suppress(RuntimeError):
            multiply(a, b, out[:1])
    assert all(abs(now - then) < 100 for now, then in zip(counts(), before, strict=True))


class Wrapper(torch.Tensor):
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return NotImplemented


def freed():
    t = torch.ones(2, 4)
    t.untyped_storage().resize_(0)
    return t


NO_MEMORY = {
    "wrapper": lambda: torch.Tensor._make_wrapper_subclass(Wrapper, (2, 4)),
    "zeros that are not there": lambda: torch._efficientzerotensor((2, 4)),
    "functional": lambda: torch._to_functional_tensor(torch.ones(2, 4)),
    "freed": freed,
}


@pytest.mark.parametrize("make", NO_MEMORY.values(), ids=NO_MEMORY.keys())
def test_native_op_refuses_what_has_no_memory(make):
    """Which would end the process."""
    with pytest.raises(RuntimeError, match="a tensor has no memory"):
        multiply(make(), torch.ones(3, 4), torch.empty(2, 3))
    with pytest.raises(RuntimeError, match="a tensor has no memory"):
        native.ops.amax_(make(), torch.zeros(1, 4), 0)


def test_native_op_takes_what_has_no_elements():
    assert multiply(torch.empty(0, 4), torch.ones(3, 4), torch.empty(0, 3)).shape == (0, 3)


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
