# SPDX-License-Identifier: Apache-2.0
"""What a call of linear_act says of itself, with any number of leading dimensions."""

import pytest
import torch

from mpkernels.ops.linear_act import Activation, backward_op, forward_op, linear_act
from mpkernels.ops.linear_act.call import BackwardCall, ForwardCall

f16, f32 = torch.float16, torch.float32
LEADING = [(), (6,), (2, 3), (1, 3, 2)]


def forward_call(leading) -> ForwardCall:
    return ForwardCall(torch.ones(*leading, 4), torch.ones(5, 4), None, None, Activation.NONE, f32, f32, 0)


def backward_call(leading) -> BackwardCall:
    grad_out, x = torch.ones(*leading, 5), torch.ones(*leading, 4)
    return BackwardCall(grad_out, x, torch.ones(5, 4), None, None, Activation.NONE, f32, f32, f32, f32, [True, True, True])


@pytest.mark.parametrize("make", [forward_call, backward_call])
@pytest.mark.parametrize("leading", LEADING)
def test_a_good_call_takes_the_fast_path(make, leading):
    assert make(leading).is_valid()


def backward_call_of(saved: torch.Tensor, prev_saved: torch.Tensor) -> BackwardCall:
    return backward_call((6,))._replace(
        activation=Activation.RELU, saved=saved, prev_activation=Activation.RELU, prev_saved=prev_saved
    )


def forward_call_of(prev_saved: torch.Tensor) -> ForwardCall:
    return forward_call((6,))._replace(prev_activation=Activation.RELU, prev_saved=prev_saved)


def test_a_call_of_what_is_not_plain_takes_the_slow_path():
    """What was saved, too, which a hook on saved tensors may have changed."""
    saved, prev_saved = torch.ones(6, 5), torch.ones(6, 4)
    assert backward_call_of(saved, prev_saved).is_valid()
    assert forward_call_of(prev_saved).is_valid()
    for change in (torch._neg_view, lambda t: t.as_subclass(type("Subclass", (torch.Tensor,), {}))):
        assert not backward_call_of(change(saved), prev_saved).is_valid()
        assert not backward_call_of(saved, change(prev_saved)).is_valid()
        assert not forward_call_of(change(prev_saved)).is_valid()


@pytest.mark.parametrize("activation", [Activation.RELU, Activation.SILU], ids=lambda a: a.name)
def test_a_saved_tensor_that_comes_back_negated(activation):
    """As a lazily negated view, whose negative bit a kernel does not see."""

    def grad_x(unpack):
        x, weight = torch.linspace(-1, 1, 24).view(6, 4).requires_grad_(), torch.linspace(-1, 1, 20).view(5, 4)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            out = linear_act(x, weight, activation=activation, compute_dtype=f32, out_dtype=f32)
        return torch.autograd.grad(out.sum(), x)[0]

    assert grad_x(lambda t: torch._neg_view(-t) if t.shape == (6, 5) else t).equal(grad_x(lambda t: t))


@pytest.mark.parametrize("make", [forward_call, backward_call])
@pytest.mark.parametrize("leading", LEADING)
def test_the_tuned_table_is_asked_by_the_number_of_rows(make, leading):
    rows = 6 if leading else 1
    assert make(leading).gemm_key == make((rows,)).gemm_key
    assert make((4 * rows,)).gemm_key != make((rows,)).gemm_key


@pytest.mark.parametrize("op", [forward_op, backward_op], ids=lambda op: op.name)
def test_a_call_has_the_arguments_of_the_schema(op):
    """In its order and with its defaults; what eager execution alone gives to an implementation comes after them."""
    schema = getattr(torch.ops.mpkernels, op.name).default._schema
    names, fields = [argument.name for argument in schema.arguments], op.call._fields
    assert fields[: len(names)] == tuple(names)
    assert fields[len(names) :] == (("grad_weight_sum",) if op is backward_op else ("keeps_x",))
    defaults = {argument.name: argument.default_value for argument in schema.arguments if argument.has_default_value()}
    assert {name: op.call._field_defaults[name] for name in defaults} == defaults


@pytest.mark.parametrize("name", ["x", "weight", "bias", "weight_copy"])
def test_a_call_that_the_dispatcher_has_to_see_takes_the_slow_path(name):
    """A class of its own may change what an op does; of a lazily negated view a kernel would not see that it is one."""
    x, weight, copy = torch.ones(6, 4), torch.ones(5, 4), torch.ones(5, 4)
    good = ForwardCall(x, weight, torch.ones(5), copy, Activation.NONE, f32, f32, 0)
    assert good.is_valid()
    assert not good._replace(**{name: getattr(good, name).as_subclass(Own)}).is_valid()
    negated = torch.complex(getattr(good, name), getattr(good, name)).conj().imag
    assert negated.is_neg()
    assert not good._replace(**{name: negated}).is_valid()


class Own(torch.Tensor):
    pass


@pytest.mark.parametrize(("trains_weight", "with_grad", "keeps_x"), [(1, 1, True), (1, 0, False), (0, 1, False)])
def test_x_is_kept_for_the_gradient_of_the_weight_alone(trains_weight, with_grad, keeps_x, monkeypatch):
    calls, execute = [], forward_op.execute
    monkeypatch.setattr(forward_op, "execute", lambda call, kernel: calls.append(call) or execute(call, kernel))
    x, weight = torch.ones(6, 4, requires_grad=True), torch.ones(5, 4, requires_grad=bool(trains_weight))
    with torch.set_grad_enabled(bool(with_grad)):
        linear_act(x, weight, activation=Activation.NONE, compute_dtype=f16, out_dtype=f32)
    assert [call.keeps_x for call in calls] == [keeps_x]
