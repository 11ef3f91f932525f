# SPDX-License-Identifier: Apache-2.0
"""Models that people train, converted: right forward, training like fp32, nothing that CUDA refuses, exact revert."""

import contextlib
import copy
import functools
import io

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import mpkernels as mpk
from tests.bounds import check_merged, check_model_not_worse_than, check_trained_loss
from tests.levels import each_once
from tests.models import CASES, LoRA, RefuseAsCUDA, logits, loss
from tests.steps import raw

ROWS = 256
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def outcome(model, inputs, autocast=None, refuse=True) -> torch.Tensor:
    with contextlib.ExitStack() as stack:
        if refuse:
            stack.enter_context(RefuseAsCUDA(autocast is not None))
        if autocast is not None:
            stack.enter_context(torch.autocast("cpu", dtype=autocast))
        return logits(model, inputs)


# ----- forward ----------------------------------------------------------------------


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@cases
def test_real_models_forward(case, train):
    """Alone and inside autocast, in storage of 16 bits too, beside torch in the same precision."""
    inputs, _ = case.data(ROWS)
    plain = case.model().train(train)
    with torch.set_grad_enabled(train):  # without it nn.TransformerEncoder takes its fast path
        exact = logits(copy.deepcopy(plain).double(), inputs).detach()
        torchs = outcome(copy.deepcopy(plain), inputs, torch.float16, refuse=False)
        model = mpk.convert(copy.deepcopy(plain), "mixed_float16")
        for autocast in (None, torch.float16):
            check_model_not_worse_than(outcome(model, inputs, autocast), torchs, exact)
        torchs = outcome(copy.deepcopy(plain).half(), inputs)
        check_model_not_worse_than(outcome(mpk.convert(copy.deepcopy(plain), "float16"), inputs), torchs, exact)


def test_real_models_bound_rejects_another_rounding():
    """The bound is not idle: weights rounded to 10 bits instead of 11 fail it."""
    case = CASES["bert_relu"]
    inputs, _ = case.data(ROWS)
    plain = case.model()
    exact = logits(copy.deepcopy(plain).double(), inputs).detach()
    torchs = outcome(copy.deepcopy(plain).half(), inputs)
    model = copy.deepcopy(plain)
    with torch.no_grad():
        for parameter in model.parameters():
            wide = parameter * (2**14 + 1)
            parameter.copy_(wide - (wide - parameter))
    with pytest.raises(AssertionError, match="error norm"):
        check_model_not_worse_than(outcome(mpk.convert(model, "float16"), inputs), torchs, exact)


def test_refuse_as_cuda_refuses():
    for module, x in ((nn.LayerNorm(4), torch.ones(2, 4).half()), (nn.GroupNorm(2, 4), torch.ones(2, 4).half())):
        module(x)
        with pytest.raises(RuntimeError, match="CUDA refuses"), RefuseAsCUDA():
            module(x)
    with pytest.raises(RuntimeError), RefuseAsCUDA():
        torch.mm(torch.ones(2, 2), torch.ones(2, 2).half())
    with RefuseAsCUDA():
        assert torch.nn.functional.layer_norm(torch.ones(2, 4).half(), (4,)).dtype == torch.float16


# ----- what is converted, and back ----------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16,grad=bfloat16", "float32"])
@cases
def test_real_models_report_and_revert(case, policy):
    model = case.model()
    before = {name: (type(m), sorted(vars(m))) for name, m in model.named_modules()}
    linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    state, parameters = copy.deepcopy(model.state_dict()), dict(model.named_parameters())
    mpk.convert(model, policy)
    report = mpk.convert_report(model)
    assert [row.name for row in report] == linears
    left = {row.name: row.note for row in report if not row.converted}
    assert all(name.endswith("out_proj") and "nn.MultiheadAttention" in note for name, note in left.items())
    assert list(model.state_dict()) == list(state)
    assert raw(model.state_dict().values()) == raw(state.values())
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    mpk.revert(model)
    assert {name: (type(m), sorted(vars(m))) for name, m in model.named_modules()} == before
    assert raw(model.state_dict().values()) == raw(state.values())
    assert {p.grad_dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("policy", ["mixed_float16", "float16"])
@pytest.mark.parametrize("name", ["gpt2", "bert_relu"])
def test_real_models_tied_weights_stay_tied(name, policy):
    import transformers

    config = CASES[name].model().config
    model = transformers.BertForMaskedLM(config) if name != "gpt2" else CASES[name].model()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    mpk.convert(model, policy)
    assert type(head) is mpk.MPLinear
    assert head.weight is embedding.weight
    model(torch.ones(1, 4, dtype=torch.int64)).logits.float().sum().backward()
    assert head.weight.grad.count_nonzero() > 0


def test_conv1d_is_the_linear_of_its_transpose(generator):
    plain = Conv1D(12, 7)
    linear = nn.Linear(7, 12)
    linear.weight = nn.Parameter(plain.weight.detach().t().clone())
    linear.bias = nn.Parameter(plain.bias.detach().clone())
    model = mpk.convert(nn.ModuleList([plain]), "mixed_float16")
    expected = mpk.convert(nn.ModuleList([linear]), "mixed_float16")
    assert isinstance(model[0], Conv1D)
    assert not isinstance(model[0], nn.Linear)
    optimizers = [mpk.optim.AdamW(m.parameters(), lr=0.1) for m in (model, expected)]
    for _ in range(3):  # the second step reads the optimizer's copy
        x = torch.randn(5, 7, generator=generator)
        outs = [m[0](x) for m in (model, expected)]
        assert torch.equal(*outs)
        for out, optimizer in zip(outs, optimizers, strict=True):
            optimizer.zero_grad()
            out.square().sum().backward()
            optimizer.step()
        assert torch.equal(plain.weight, linear.weight.t())
    assert model[0]._weight_copy(model[0].weight) is not None
    model.eval()
    expected, plain_copy = model[0](x), model[0]._weight_copy(model[0].weight)
    with mpk.cached_weights(model):
        assert model[0]._weight_copy(model[0].weight) is not None
        assert torch.equal(model[0](x), expected)
    assert plain_copy is model[0]._weight_copy(model[0].weight) is None


# ----- files, compiler, checkpointing ----------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["mixed_float16", "float16"])
@cases
def test_real_models_are_saved_whole(case, policy):
    inputs, _ = case.data(4)
    model, file = mpk.convert(case.model(), policy).eval(), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    expected = logits(model, inputs)
    for twin in (torch.load(file, weights_only=False), copy.deepcopy(model)):
        assert str(mpk.convert_report(twin)) == str(mpk.convert_report(model))
        assert torch.equal(logits(twin, inputs), expected)
        assert [type(m) for m in mpk.revert(twin).modules()] == [type(m) for m in case.model().modules()]


@cases
def test_real_models_through_safetensors(case, tmp_path):
    """From a converted model into a plain one, and back."""
    model, plain = mpk.convert(case.model(), "mixed_float16"), case.make()
    save_model(model, str(tmp_path / "converted"))
    load_model(plain, str(tmp_path / "converted"))
    assert raw(plain.state_dict().values()) == raw(model.state_dict().values())
    save_model(plain, str(tmp_path / "plain"))
    other = mpk.convert(case.make(), "mixed_float16")
    load_model(other, str(tmp_path / "plain"))
    assert raw(other.state_dict().values()) == raw(model.state_dict().values())


@pytest.mark.sweep
@cases
def test_real_models_compile_in_one_graph(case):
    inputs, _ = case.data(4)
    model = mpk.convert(case.model(), "mixed_float16")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out, expected = logits(compiled, inputs), logits(model, inputs)
    assert raw([out]) == raw([expected])
    gradients = []
    for result in (out, expected):
        model.zero_grad()
        result.float().square().mean().backward()
        gradients.append(raw(p.grad for p in model.parameters() if p.grad is not None))
    assert gradients[0] == gradients[1]


@pytest.mark.parametrize("use_reentrant", [False, True])
@cases
def test_real_models_checkpointed(case, use_reentrant):
    """Activation checkpointing runs the forward again in backward: the same bits."""
    inputs, labels = case.data(4)
    model, gradients = mpk.convert(case.model(), "mixed_float16"), []
    anchor = torch.zeros((), requires_grad=True)  # what the reentrant kind needs to see a gradient
    for run in (lambda f, a: f(a), lambda f, a: checkpoint(f, a, use_reentrant=use_reentrant)):
        model.zero_grad()
        run(lambda a: loss(model, inputs, labels) + a, anchor).backward()
        gradients.append(raw(p.grad for p in model.parameters() if p.grad is not None))
    assert gradients[0] == gradients[1]


# ----- adapters ----------------------------------------------------------------------


def test_adapters_train_and_merge():
    case = CASES["vit"]
    model = case.model().requires_grad_(False)
    for block in model.blocks:
        block.qkv = LoRA(block.qkv)
        block.mlp[0] = LoRA(block.mlp[0])
    mpk.convert(model, "mixed_float16")
    names = {row.name for row in mpk.convert_report(model) if row.converted}
    assert {"blocks.0.qkv.base", "blocks.0.qkv.a", "blocks.0.qkv.b", "blocks.1.mlp.0.base"} <= names
    frozen = raw(p for p in model.parameters() if not p.requires_grad)
    optimizer = mpk.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    inputs, labels = case.data(64)
    losses = []
    for _ in range(10):
        value = loss(model, inputs, labels)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    assert losses[-1] < losses[0]
    assert raw(p for p in model.parameters() if not p.requires_grad) == frozen
    before = logits(model, inputs)
    for module in model.modules():
        if isinstance(module, LoRA):
            module.merge()
    merged = logits(model, inputs)
    exact = logits(mpk.revert(copy.deepcopy(model)).double(), inputs)
    check_merged(merged, before, exact)


# ----- training ----------------------------------------------------------------------
#
# NOTE: a constant learning rate, as first tried, makes the last losses a matter of chance: of the ResNet and the ViT at 1e-3
# they were up to 26 % and 7 % off in `float16`, and as far off in fp32 that starts half an fp16 rounding away (52 % and 7 %);
# 1e-7 away were 7 % in one of 8 seeds. So the rate rises, falls to 0, and is one at which rounding is not amplified: in
# `test_real_models_train_is_well_conditioned` fp32 itself is put to the bound. That what is wrong fails is tested, too.

BATCH = 32
perturbed = "float32, weights half an fp16 rounding away"


def schedule(steps: int):
    return lambda t: min(1.0, (t + 1) * 10 / steps) * (1 - t / steps)


def train(model, case, steps: int, scale: float) -> list[float]:
    """Losses of so many steps of our AdamW."""
    inputs, labels = case.data(ROWS)
    optimizer, scaler = mpk.optim.AdamW(model.named_parameters(), lr=case.lr, max_norm=1.0), mpk.GradScaler("cpu", scale)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(steps))
    losses = []
    for step in range(steps):
        rows = torch.arange(step * BATCH, (step + 1) * BATCH) % ROWS
        with RefuseAsCUDA():
            value = loss(model, tuple(x[rows] for x in inputs), labels[rows])
            scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(value.item())
    assert scaler.skipped_steps == 0
    return losses


@functools.cache
def fp32_losses(name: str, steps: int) -> list[float]:
    losses = train(CASES[name].model(), CASES[name], steps, 1.0)
    assert sum(losses[-5:]) < sum(losses[:5]), "it does not learn"
    return losses


def check_training(name, policy, steps, scale=1024.0):
    case = CASES[name]
    model = case.model()
    if policy == perturbed:
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter *= 1 + 2.0**-12 * torch.randn(parameter.shape, generator=generator)
    else:
        mpk.convert(model, policy)
    check_trained_loss(train(model, case, steps, scale), fp32_losses(name, steps))


by_name = pytest.mark.parametrize("name", CASES)


@by_name
def test_real_models_train(name):
    check_training(name, "mixed_float16", 20)


@pytest.mark.parametrize(
    "name, policy", each_once(CASES, ("mixed_float16", "float16"), few=pytest.mark.sweep, others=pytest.mark.release)
)
def test_real_models_train_200_steps(name, policy):
    check_training(name, policy, 200)


@pytest.mark.release
@by_name
def test_real_models_train_is_well_conditioned(name):
    check_training(name, perturbed, 200)


@pytest.mark.sweep
@by_name
def test_real_models_bound_rejects_lost_gradients(name):
    """The bound is not idle: a scale at which 16-bit gradients underflow fails it."""
    with pytest.raises(AssertionError, match="in fp32"):
        check_training(name, "float16", 200, scale=2.0**-14)
