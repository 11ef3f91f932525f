# SPDX-License-Identifier: Apache-2.0
"""What a call of linear_act says of itself, with any number of leading dimensions."""

import pytest
import torch

from mpkernels.ops.linear_act import Activation, autograd, backward_op, forward_op, linear_act
from mpkernels.ops.linear_act.call import BackwardCall, ForwardCall
from mpkernels.runtime.op import Op

f16, f32 = torch.float16, torch.float32
LEADING = [(), (6,), (2, 3), (1, 3, 2)]


def forward_call(leading) -> ForwardCall:
    return ForwardCall(torch.ones(*leading, 4), torch.ones(5, 4), None, None, Activation.NONE, f32, f32, 0)


def backward_call(leading) -> BackwardCall:
    grad_out, x = torch.ones(*leading, 5), torch.ones(*leading, 4)
    return BackwardCall(grad_out, x, torch.ones(5, 4), None, None, Activation.NONE, f32, f32, f32, f32, [True, True, True])


class Own(torch.Tensor):
    pass


# A class of its own may change what an op does; of a lazily negated view a kernel would not see that it is one.
not_plain = pytest.mark.parametrize("change", [lambda t: torch._neg_view(-t), lambda t: t.as_subclass(Own)], ids=["neg", "own"])


@pytest.fixture
def dispatched(monkeypatch) -> list[str]:
    """The ops that the dispatcher has seen a call of."""
    names, dispatch = [], Op.dispatch
    monkeypatch.setattr(Op, "dispatch", lambda op, call: names.append(op.name) or dispatch(op, call))
    return names


@not_plain
@pytest.mark.parametrize("name", ["x", "weight", "bias", "weight_copy"])
def test_the_dispatcher_sees_a_call_of_what_is_not_plain(name, change, dispatched):
    good = {"x": torch.randn(6, 4), "weight": torch.randn(5, 4), "bias": torch.randn(5), "weight_copy": torch.randn(5, 4)}
    call = lambda tensors: linear_act(**tensors, activation=Activation.NONE, compute_dtype=f32, out_dtype=f32)
    expected = call(good)
    assert dispatched == []
    assert call(good | {name: change(good[name])}).equal(expected)
    assert dispatched == ["linear_act"]


@not_plain
@pytest.mark.parametrize("name", ["saved", "prev_saved"])
def test_the_dispatcher_sees_a_call_of_what_was_saved_and_is_not_plain(name, change, dispatched):
    """As what a hook on saved tensors returns."""
    relu = {"activation": Activation.RELU, "prev_activation": Activation.RELU}
    good = backward_call((6,))._replace(saved=torch.randn(6, 5), prev_saved=torch.randn(6, 4), **relu)
    expected = autograd.run_backward(good)
    assert dispatched == []
    grads = autograd.run_backward(good._replace(**{name: change(getattr(good, name))}))
    assert all(a.equal(b) for a, b in zip(grads[:3], expected[:3], strict=True))
    assert dispatched == ["linear_act_backward"]


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


@pytest.mark.parametrize(("trains_weight", "with_grad", "keeps_x"), [(1, 1, True), (1, 0, False), (0, 1, False)])
def test_x_is_kept_for_the_gradient_of_the_weight_alone(trains_weight, with_grad, keeps_x, monkeypatch):
    calls, execute = [], forward_op.execute
    monkeypatch.setattr(forward_op, "execute", lambda call, kernel: calls.append(call) or execute(call, kernel))
    x, weight = torch.ones(6, 4, requires_grad=True), torch.ones(5, 4, requires_grad=bool(trains_weight))
    with torch.set_grad_enabled(bool(with_grad)):
        linear_act(x, weight, activation=Activation.NONE, compute_dtype=f16, out_dtype=f32)
    assert [call.keeps_x for call in calls] == [keeps_x]
