# SPDX-License-Identifier: Apache-2.0
"""Policies with accumulate_grad: weight gradients that backward adds to `weight.grad` itself, and where it must not."""

import contextlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import mpkernels as mpk
from mpkernels.ops.linear_act import eager
from mpkernels.ops.linear_act.epilogues import Activation, name_of
from tests import bounds
from tests.dispatch_count import Counting
from tests.linear_act_cases import same_bits

f16, f32, f64 = torch.float16, torch.float32, torch.float64
POLICIES = ("float32", "mixed_float16", "mixed_bfloat16", "float16,grad=float32", "mixed_float8")
MICRO_BATCHES = 3


class Seen:
    """Of each backward, whether autograd was left with a gradient to add for a weight."""

    def __init__(self, weight: nn.Parameter):
        self.added: list[bool] = []
        self.node = weight.expand_as(weight).grad_fn.next_functions[0][0]
        self.node.register_prehook(lambda grads: self.added.append(grads[0] is not None))


def layer(policy: str | None = "mixed_float16,accumulate_grad", N=24, K=40, seed=0, **options) -> mpk.MPLinear:
    torch.manual_seed(seed)
    return mpk.MPLinear(K, N, policy=policy, **options)


def inputs(*shape, dtype=f32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(MICRO_BATCHES)]


def accumulate(module, batches) -> list[torch.Tensor]:
    """Gradients of the parameters, summed over micro-batches."""
    for x in batches:
        module(x).float().square().sum().backward()
    return [p.grad for p in module.parameters()]


@pytest.fixture
def once():
    """A layer with one gradient already there, what autograd adds from now on, and the same sum by autograd alone."""
    module, plain = layer(), layer("mixed_float16")
    seen = Seen(module.weight)
    for each in (module, plain):
        accumulate(each, inputs(8, 40)[:1])
    assert seen.added == [True]
    seen.added.clear()
    return module, seen, plain


# ----- sums ---------------------------------------------------------------


@pytest.mark.usefixtures("by_eager_and_auto")
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("activation", [name_of(activation) for activation in Activation])
def test_accumulate_grad_has_the_bits_of_autograds_sum(policy, activation):
    for shape, N in (((33, 40), 24), ((2, 3, 40), 7), ((1, 40), 24), ((40,), 5), ((0, 40), 3)):
        module = layer(f"{policy},accumulate_grad", N, activation=activation)
        plain = layer(policy, N, activation=activation)
        seen, batches = Seen(module.weight), inputs(*shape, dtype=module.weight.dtype)
        for grad, expected in zip(accumulate(module, batches), accumulate(plain, batches), strict=True):
            assert same_bits(grad, expected)
        assert seen.added == [True, False, False]


@pytest.mark.usefixtures("by_eager_and_auto")
def test_accumulate_grad_of_many_blocks():
    """A sum that is several blocks of the GEMM, down and across, and of k-blocks."""
    module, plain = (layer(policy, N=300, K=520) for policy in ("mixed_float16,accumulate_grad", "mixed_float16"))
    batches = inputs(700, 520)
    for grad, expected in zip(accumulate(module, batches), accumulate(plain, batches), strict=True):
        assert same_bits(grad, expected)


def of_backward(policy: str) -> tuple[int, list[int]]:
    """How often a tensor is added to another in the backward of a second micro-batch, and bytes of what is allocated there."""
    module, (first, second, _) = layer(policy, N=256, K=512, bias=False), inputs(64, 512)
    accumulate(module, [first])
    loss = module(second).square().sum()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss.backward()
    events = profile.profiler.kineto_results.events()
    return sum(e.name() == "aten::add_" for e in events), [e.nbytes() for e in events if e.name() == "[memory]"]


@pytest.mark.parametrize("backend", ["native", "eager"])
def test_accumulate_grad_moves_half_of_the_bytes(backend, monkeypatch):
    """Not the product of N x K, written and read once more each, beside the sum: nothing so large comes up."""
    if backend == "native" and not mpk.is_available("native"):
        pytest.skip(mpk.why_not("native"))
    monkeypatch.setenv("MPKERNELS_BACKEND", f"linear_act={backend},linear_act_backward={backend}")
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")
    monkeypatch.setattr(eager, "BLOCK_ELEMENTS", 64 * 64)
    product = 256 * 512 * 4
    additions, allocated = of_backward("mixed_float16")
    assert additions == 1
    assert allocated.count(product) == 1
    additions, allocated = of_backward("mixed_float16,accumulate_grad")
    assert additions == (0 if backend == "native" else 512 // 64)
    assert max(allocated) < product // 2


def test_accumulate_grad_by_blocks_of_torchs_ops(monkeypatch):
    monkeypatch.setenv("MPKERNELS_BACKEND", "linear_act=eager,linear_act_backward=eager")
    monkeypatch.setattr(eager, "BLOCK_ELEMENTS", 64 * 8)
    for policy in POLICIES:
        modules = [layer(name, K=150) for name in (f"{policy},accumulate_grad", policy)]
        batches = inputs(8, 150, dtype=modules[0].weight.dtype)
        sums = [accumulate(module, batches) for module in modules]
        assert all(same_bits(*pair) for pair in zip(*sums, strict=True))


def test_accumulate_grad_of_layers_whose_backward_is_joined():
    models = []
    for policy in ("mixed_float16,accumulate_grad", "mixed_float16"):
        torch.manual_seed(0)
        models.append(mpk.MPMLP([40, 24, 16, 8], policy=policy))
    seen = [Seen(linear.weight) for linear in models[0] if isinstance(linear, mpk.MPLinear)]
    sums = [accumulate(model, inputs(8, 40)) for model in models]
    assert all(same_bits(*pair) for pair in zip(*sums, strict=True))
    assert [each.added for each in seen] == [[True, False, False]] * 3


@pytest.mark.usefixtures("by_eager_and_auto")
@pytest.mark.parametrize("policy", POLICIES[:3])
def test_accumulate_grad_matches_reference(policy):
    """Four micro-batches are one large batch: fp64's sum over all rows, within the bounds of one GEMM."""
    module, x, grad_out = layer(f"{policy},accumulate_grad"), torch.randn(64, 40), torch.randn(64, 24)
    for part, grad in zip(x.chunk(4), grad_out.chunk(4), strict=True):
        module(part).backward(grad)
    compute = module.policy.compute_dtype
    bounds.check_backward(
        (None, module.weight.grad, module.bias.grad), grad_out, x, module.weight, None, compute, random_sign=True
    )


def test_accumulate_grad_trains_as_one_large_batch():
    """Bound 8: weights after each step beside fp64 and the loop of torch in fp32, both with whole batches."""
    steps, x, y = 12, torch.randn(12, 32, 8, dtype=f64), torch.randn(12, 32, 4, dtype=f64)

    def trained(model, optimizer, parts: int, dtype) -> np.ndarray:
        found = []
        for t in range(steps):
            for inputs, targets in zip(x[t].to(dtype).chunk(parts), y[t].to(dtype).chunk(parts), strict=True):
                ((model(inputs) - targets).square().mean() / parts).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=bool(t % 2))
            found.append(torch.cat([p.detach().double().flatten() for p in model.parameters()]).numpy())
        return np.stack(found)

    def made(dtype=f32):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)).to(dtype)

    def sgd(model):
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)

    ours, single, exact = mpk.convert(made(), "float32,accumulate_grad"), made(), made(f64)
    w = trained(ours, mpk.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9), 4, f32)
    bounds.check_trajectory(w, trained(exact, sgd(exact), 1, f64), trained(single, sgd(single), 1, f32))


def test_accumulate_grad_keeps_inf_and_the_scaler_skips():
    module = layer()
    optimizer, scaler = mpk.optim.SGD(module.parameters(), lr=0.1), mpk.GradScaler(init_scale=1024.0)
    before = module.weight.detach().clone()
    for x, factor in zip(inputs(8, 40), (1.0, float("inf"), 1.0), strict=True):
        scaler.scale(module(x).sum() * factor).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.last_step_skipped
    assert same_bits(module.weight.detach(), before)
    assert "weight" in scaler.overflow_report(optimizer) or "forward" in scaler.overflow_report(optimizer)


@pytest.mark.parametrize("set_to_none, added", [(True, [True, False] * 2), (False, [True, False, False, False])])
def test_accumulate_grad_after_zero_grad(set_to_none, added):
    module, plain, (x, y, _) = layer(), layer("mixed_float16"), inputs(8, 40)
    seen = Seen(module.weight)
    for _ in range(2):
        for each in (module, plain):
            each.zero_grad(set_to_none=set_to_none)
            accumulate(each, (x, y))
    assert same_bits(module.weight.grad, plain.weight.grad)
    assert seen.added == added


def test_accumulate_grad_into_a_flat_buffer_in_place():
    """`weight.grad` stays the tensor it was, here a view of memory that a user owns, and torch sees that it was written."""
    module, plain = layer(N=3, K=5), layer("mixed_float16", N=3, K=5)
    flat = torch.zeros(16)
    module.weight.grad = flat[1:].view(3, 5)
    grad, version = module.weight.grad, flat._version
    accumulate(plain, inputs(8, 5)[:1])
    assert accumulate(module, inputs(8, 5)[:1])[0] is grad
    assert same_bits(flat[1:].view(3, 5), plain.weight.grad)
    assert flat[0] == 0
    assert flat._version == version + 1


def test_accumulate_grad_invalidates_what_was_saved_of_the_sum(once):
    module, _, _ = once
    scale = torch.ones((), requires_grad=True)
    saved = (module.weight.grad * scale).sum()
    module(torch.ones(8, 40)).sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


@pytest.mark.parametrize("uses", ["layers", "F.linear"])
def test_accumulate_grad_of_a_weight_with_two_uses(uses):
    """Each use adds by itself, so the order of the sum is another one."""
    module, plain = layer("float32,accumulate_grad", N=40), layer("float32", N=40)
    for each in (module, plain):
        other = layer(each.policy, N=40)
        other.weight = each.weight
        for x in inputs(8, 40):
            y = other(x) if uses == "layers" else F.linear(x, each.weight)
            each(y).sin().sum().backward()
    bounds.check_rearranged(module.weight.grad, plain.weight.grad)


def ones(**options) -> torch.Tensor:
    return torch.ones(8, 40, **options)


def twice(each) -> None:
    loss = each(ones()).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()


RUNS = {  # a backward of a layer, and what autograd adds in it
    "twice through one graph": (twice, [False, False]),
    "checkpoint": (
        lambda each: checkpoint(each, ones(requires_grad=True), use_reentrant=False).square().sum().backward(), [False]
    ),
    "reentrant checkpoint": (
        lambda each: checkpoint(each, ones(requires_grad=True), use_reentrant=True).square().sum().backward(), [False]
    ),
    "create_graph": (lambda each: each(ones(requires_grad=True)).square().sum().backward(create_graph=True), [True]),
    "compiled": (lambda each: torch.compile(each, backend="aot_eager")(ones()).square().sum().backward(), [True]),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("name", RUNS)
def test_accumulate_grad_by_any_backward(once, name):
    """What is traced, or has a graph of its own, returns gradients."""
    (module, seen, plain), (run, added) = once, RUNS[name]
    for each in (module, plain):
        run(each)
    assert same_bits(module.weight.grad.detach(), plain.weight.grad.detach())
    assert seen.added == added


# ----- what must see the gradient of the layer ---------------------------------------------------------------


def tensor_hook(module, stack):
    module.weight.register_hook(lambda grad: grad * 2)


def post_accumulate_hook(module, stack):
    def double(weight):
        weight.grad.mul_(2)

    module.weight.register_post_accumulate_grad_hook(double)


def anomaly_mode(module, stack):
    stack.enter_context(torch.autograd.detect_anomaly(check_nan=True))


def dispatch_mode(module, stack):
    stack.enter_context(Counting())


def sum_in_columns(module, stack):
    module.weight.grad = module.weight.grad.t().contiguous().t()


def sum_with_a_graph(module, stack):
    module.weight.grad = module.weight.grad.requires_grad_()


def negated_sum(module, stack):
    module.weight.grad = torch._neg_view(module.weight.grad)


def frozen_weight(module, stack):
    module.weight.requires_grad_(False)


@pytest.mark.filterwarnings("ignore:Anomaly Detection", "ignore:grad and param do not obey")
@pytest.mark.parametrize(
    "change",
    [
        tensor_hook, post_accumulate_hook, anomaly_mode, dispatch_mode, sum_in_columns, sum_with_a_graph,
        negated_sum, frozen_weight,
    ],
)  # fmt: skip
def test_accumulate_grad_leaves_it_to_autograd(once, change):
    module, seen, plain = once
    for each in (module, plain):
        with contextlib.ExitStack() as stack:
            change(each, stack)
            each(torch.ones(8, 40)).square().sum().backward()
    assert same_bits(module.weight.grad.detach(), plain.weight.grad.detach())
    assert seen.added == ([] if change is frozen_weight else [True])


def test_accumulate_grad_of_a_weight_that_was_frozen_after_forward(once):
    """Whose gradient autograd drops."""
    for each in once[::2]:
        loss = each(torch.ones(8, 40)).square().sum()
        each.weight.requires_grad_(False)
        loss.backward()
    assert same_bits(once[0].weight.grad, once[2].weight.grad)


@pytest.mark.usefixtures("by_eager_and_auto")
def test_accumulate_grad_refuses_a_sum_of_another_shape():
    """Of a weight whose data were replaced, as a vocabulary grows: torch's own error, and no kernel writes past the sum."""
    for policy in ("mixed_float16,accumulate_grad", "mixed_float16"):
        module, sums = layer(policy, bias=False), torch.zeros(2 * 24 * 40)
        module.weight.grad = sums[: 24 * 40].view(24, 40)
        module.weight.data = torch.ones(48, 40)
        with pytest.raises(RuntimeError, match=r"The size of tensor a \(24\) must match the size of tensor b \(48\)"):
            module(torch.ones(8, 40)).sum().backward()
        assert sums.count_nonzero() == 0


@pytest.mark.usefixtures("by_eager_and_auto")
@pytest.mark.parametrize("of", ["x", "grad_out"])
def test_accumulate_grad_of_operands_in_the_memory_of_the_sum(of):
    """wgrad reads what it would write: a layer is given its own sum of gradients, as a network that learns updates is."""
    sums = []
    for policy in ("float32,accumulate_grad", "float32"):
        module = layer(policy, N=600, K=600)
        module.weight.grad = torch.randn(600, 600, generator=torch.Generator().manual_seed(1))
        x, grad_out = torch.ones(600, 600), torch.ones(600, 600)
        module(module.weight.grad if of == "x" else x).backward(module.weight.grad if of == "grad_out" else grad_out)
        sums.append(module.weight.grad)
    assert same_bits(*sums)


@pytest.mark.parametrize("made", ["leaf", "view", "product"])
def test_accumulate_grad_of_a_function_call(once, made):
    """Autograd carries on the gradient of what is made of a weight."""
    module, seen, plain = once
    for each, policy in ((module, "mixed_float16,accumulate_grad"), (plain, "mixed_float16")):
        weight = {"leaf": each.weight, "view": each.weight[:7], "product": each.weight * 2}[made]
        mpk.functional.linear_act(torch.ones(8, 40), weight, policy=policy).square().sum().backward()
    assert same_bits(module.weight.grad, plain.weight.grad)
    assert seen.added == [made != "leaf"]


def test_accumulate_grad_of_narrower_gradients():
    """What the function rounds to the dtype of the weight is rounded before it is added to a wider sum, too."""
    sums = []
    for policy in ("mixed_float16,accumulate_grad", "mixed_float16"):
        weight = torch.ones(3, 4, dtype=f16, requires_grad=True)
        weight.grad_dtype = f32
        for x in inputs(5, 4):
            mpk.functional.linear_act(x, weight, policy=policy).square().sum().backward()
        sums.append(weight.grad)
    assert sums[0].dtype == f32
    assert same_bits(*sums)


def test_accumulate_grad_under_a_watch(once):
    """Which may ask for the gradient of the layer."""
    module, seen, plain = once
    optimizer = mpk.optim.SGD(module.parameters(), lr=0.1)
    mpk.watch(module, optimizer)
    for each in (module, plain):
        each(torch.ones(8, 40)).square().sum().backward()
    assert same_bits(module.weight.grad, plain.weight.grad)
    assert seen.added == [True]


@pytest.mark.parametrize("of", ["weight", "x", "both"])
def test_accumulate_grad_of_autograd_grad(once, of):
    """`torch.autograd.grad` returns gradients and leaves `.grad` as it was."""
    module, seen, plain = once
    before = module.weight.grad.clone()
    found = []
    for each in (module, plain):
        x = torch.ones(8, 40, requires_grad=True)
        wanted = {"weight": (each.weight,), "x": (x,), "both": (x, each.weight)}[of]
        found.append(torch.autograd.grad(each(x).square().sum(), wanted))
    assert all(same_bits(*pair) for pair in zip(*found, strict=True))
    assert same_bits(module.weight.grad, before)
    assert seen.added == []


def test_accumulate_grad_of_batched_gradients(once):
    module, _, plain = once
    before = module.weight.grad.clone()
    found = []
    for each in (module, plain):
        out = each(torch.ones(8, 40))
        found += torch.autograd.grad(out, each.weight, torch.stack([out, -out]).detach(), is_grads_batched=True)
    assert same_bits(*found)
    assert same_bits(module.weight.grad, before)


@pytest.mark.parametrize("of, added", [("weight", [False]), ("x", [])])
def test_accumulate_grad_of_backward_with_inputs(once, of, added):
    module, seen, plain = once
    before = module.weight.grad.clone()
    for each in (module, plain):
        x = torch.ones(8, 40, requires_grad=True)
        each(x).square().sum().backward(inputs=[each.weight if of == "weight" else x])
    assert same_bits(module.weight.grad, plain.weight.grad)
    assert same_bits(module.weight.grad, before) == (of == "x")
    assert seen.added == added


def test_accumulate_grad_under_torch_func(once):
    module, _, plain = once
    x, found = torch.ones(8, 40), []
    before = module.weight.grad.clone()
    for each in (module, plain):
        parameters = {name: p.detach() for name, p in each.named_parameters()}
        loss = lambda p, each=each: torch.func.functional_call(each, p, (x,)).square().sum()
        found.append(torch.func.grad(loss)(parameters)["weight"])
    assert same_bits(*found)
    assert same_bits(module.weight.grad, before)
