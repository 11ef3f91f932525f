# SPDX-License-Identifier: Apache-2.0
"""Every row of docs/differences.md is so: a test of its name for each, and none without a row."""

import contextlib
import copy
import math
import re

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import fx, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.utils import parametrizations, prune

import mpkernels as mpk
from mpkernels.nn import MPLinear
from tests.linear_act_cases import same_bits
from tests.paths import ROOT

PAGE = ROOT / "docs" / "differences.md"


def plain_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def model_of(policy="mixed_float16", **kwargs):
    return mpk.convert(plain_model(), policy, **kwargs)


def types_of(model) -> list[str]:
    return [type(module).__name__ for module in model.modules()]


def test_every_row_has_its_test():
    rows = [
        line for line in PAGE.read_text().splitlines() if line.startswith("|") and not re.match(r"\|---|.*\| test \|$", line)
    ]
    named = [re.search(r"\| `(\w+)` \|$", row) for row in rows]
    assert rows
    assert all(named), [row for row, name in zip(rows, named, strict=True) if not name]
    tests = {name for name in globals() if name.startswith("test_differs_")}
    assert sorted(f"test_differs_{name[1]}" for name in named) == sorted(tests)


# ----- refused ---------------------------------------------------------------


def test_differs_second_derivatives():
    layer = mpk.convert(nn.Sequential(nn.Linear(3, 2, dtype=torch.float64)), "float64")
    x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match="not supported"):
        torch.func.hessian(lambda x: layer(x).square().sum())(x)
    (grad,) = torch.autograd.grad(mpk.revert(layer)(x).square().sum(), x, create_graph=True)
    grad.sum().backward()


def test_differs_forward_mode():
    layer, x = MPLinear(3, 2, policy="float32"), torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(layer, (x,), (x,))
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jacfwd(layer)(x)
    assert same_bits(torch.func.jacrev(layer)(x).detach()[0, :, 0], layer.weight.detach())


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64], ids=str)
def test_differs_integers_and_complex(dtype):
    x, weight = torch.ones(2, 3).to(dtype), torch.ones(4, 3).to(dtype)
    assert F.linear(x, weight).shape == (2, 4)
    with pytest.raises(RuntimeError, match="x must be float16, bfloat16, float32 or float64"):
        mpk.functional.linear_act(x, weight)


@pytest.mark.filterwarnings("ignore")  # torch calls them prototypes
def test_differs_layouts():
    layer, dense = MPLinear(3, 2, policy="float32"), torch.ones(2, 3)
    nested = torch.nested.nested_tensor([dense, dense])
    for x in (dense.to_sparse(), dense.to_mkldnn(), torch.quantize_per_tensor(dense, 0.1, 0, torch.qint8), nested):
        with pytest.raises(RuntimeError, match="x must be a dense strided tensor"):
            layer(x)
    jagged = torch.nested.nested_tensor([dense, dense], layout=torch.jagged)
    assert layer(jagged).is_nested


@pytest.mark.parametrize("policy", ["mixed_float8", "mixed_float8_hybrid"])
def test_differs_float64_in_eight_bits(policy):
    layer = MPLinear(8, 4, policy=policy)
    with pytest.raises(RuntimeError, match="linear_act: x must be float16, bfloat16 or float32, got torch"):
        layer(torch.ones(2, 8, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="linear_act: weight must be float16, bfloat16 or float32, got"):
        layer.double()(torch.ones(2, 8))


RECORDERS = {
    "export": lambda model, x: torch.export.export(model, (x,)).module(),
    "strict": lambda model, x: torch.export.export(model, (x,), strict=True).module(),
    "trace": torch.jit.trace,
}


@pytest.mark.parametrize("record", RECORDERS.values(), ids=RECORDERS)
def test_differs_recorded_eight_bits(record):
    """No gradient arrives at the layer before it without what came through it, nor one of None at its weight."""
    model, x = nn.Sequential(nn.Linear(8, 8), MPLinear(8, 8, bias=False, policy="mixed_float8")), torch.ones(2, 8)
    recorded = record(model, x)
    for frozen in (False, True):
        model.requires_grad_(not frozen)
        given = x.clone().requires_grad_()
        out = recorded(given)
        assert same_bits(out.detach(), model(x).detach())
        with pytest.raises(RuntimeError, match="where it was not exported or traced"):
            (out + given).sum().backward()
    with pytest.raises(NotImplementedError, match="8-bit operands have no decomposition"):
        torch.export.export(model, (x,)).run_decompositions(mpk.functional.decompositions())


def test_differs_jit_script():
    model = model_of()
    with pytest.raises(RuntimeError, match=r"script cannot read MPLinear: mpk\.revert\(model\) first, or use torch\.jit\.tr"):
        torch.jit.script(model)
    x = torch.ones(2, 8)
    assert same_bits(torch.jit.trace(model, (x,))(x).detach(), model(x).detach())
    assert torch.jit.script(mpk.revert(model))(x).shape == (2, 4)


def test_differs_batch_invariant_compiled_transforms():
    layer, x = MPLinear(3, 2, policy="float32,batch_invariant"), torch.ones(2, 3)
    torch.compiler.reset()
    with pytest.raises(RuntimeError, match=r"batch_invariant does not hold where torch\.compile traces"):
        torch.compile(torch.func.vmap(layer), backend="eager", fullgraph=True)(x)
    assert same_bits(torch.func.vmap(layer)(x).detach(), layer(x).detach())


def test_differs_sparse_and_complex_parameters():
    for parameter in (torch.ones(3, dtype=torch.complex64), torch.ones(3, 3).to_sparse()):
        with pytest.raises(ValueError, match="parameter 0 must be a dense float16, bfloat16, float32 or float64 tensor"):
            mpk.optim.AdamW([parameter.requires_grad_()])
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        mpk.optim.SGD(embedding.parameters(), lr=0.1).step()


def test_differs_differentiable():
    with pytest.raises(RuntimeError, match="use torch's optimizer for it"):
        mpk.optim.AdamW([nn.Parameter(torch.ones(3))], differentiable=True)


def test_differs_float16_losses():
    scaler, loss = mpk.GradScaler("cpu"), torch.ones((), dtype=torch.float16)
    with pytest.raises(ValueError, match="loss is float16"):
        scaler.scale(loss)
    assert scaler.scale(loss.float()).isfinite()


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is CUDA")
def test_differs_scaler_without_cuda():
    with pytest.raises(RuntimeError, match="device cuda is not there"):
        mpk.GradScaler("cuda")
    assert not mpk.GradScaler("cuda", enabled=False).is_enabled()


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("wrap", [nn.parallel.DistributedDataParallel, FullyShardedDataParallel])
@pytest.mark.filterwarnings("ignore")  # FSDP1 is deprecated, and warns of one rank
def test_differs_cast_inside_ddp(wrap, group):
    def wrapped(model):
        return wrap(model, **({"device_id": torch.device("cpu")} if wrap is FullyShardedDataParallel else {}))

    model = wrapped(plain_model())
    with pytest.raises(RuntimeError, match=r"would be lost by a cast to torch\.bfloat16: convert first, then wrap"):
        mpk.convert(model, "bfloat16")
    mpk.convert(wrapped(plain_model()), "mixed_bfloat16")
    wrapped(mpk.convert(plain_model(), "bfloat16"))


def encoder_of() -> nn.TransformerEncoder:
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).eval()


@torch.no_grad()
def test_differs_nested_tensors_in_encoders():
    nested = torch.nested.nested_tensor([torch.ones(3, 8), torch.ones(5, 8)])
    assert encoder_of()(nested).is_nested
    with pytest.raises(RuntimeError, match=r"convert the whole nn\.TransformerEncoder"):
        mpk.convert(encoder_of())(nested)
    x, padding = torch.ones(2, 5, 8), torch.tensor([[False] * 3 + [True] * 2, [False] * 5])
    part = encoder_of()
    mpk.convert(part.layers[0])
    with pytest.raises(RuntimeError, match=r"convert the whole nn\.TransformerEncoder"):
        part(x, src_key_padding_mask=padding)
    assert mpk.convert(part)(x, src_key_padding_mask=padding).shape == x.shape


def test_differs_compiled_with_an_eager_grad():
    x = torch.ones(2, 8)
    model = model_of("mixed_bfloat16,grad=bfloat16")
    model(x).sum().backward()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="dtype mismatch between tensor and its gradient"):
        compiled(x)
    model.zero_grad()
    for _ in range(2):
        compiled(x).sum().backward()


def test_differs_closures_by_position():
    model = model_of()
    optimizer, scaler = mpk.optim.SGD(model.parameters(), lr=0.1), mpk.GradScaler("cpu")
    scaler.scale(model(torch.ones(2, 8)).sum()).backward()
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        scaler.step(optimizer, lambda: None)
    scaler.step(optimizer)


@pytest.mark.parametrize(
    ("name", "value"),
    [("growth_factor", 1.0), ("growth_factor", math.nan), ("backoff_factor", 1.0), ("growth_interval", 0)],
)
def test_differs_scaler_setters(name, value):
    for scaler, refuses in ((mpk.GradScaler("cpu"), True), (torch.amp.GradScaler("cpu"), False)):
        with pytest.raises(ValueError, match=name) if refuses else contextlib.nullcontext():
            getattr(scaler, f"set_{name}")(value)


@pytest.mark.parametrize("lr", [math.inf, math.nan, "1e-3", torch.tensor(1)], ids=str)
def test_differs_learning_rates_at_a_step(lr):
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    optimizer = mpk.optim.SGD([parameter], lr=0.1)
    optimizer.param_groups[0]["lr"] = lr
    with pytest.raises(ValueError, match="Invalid learning rate"):
        optimizer.step()
    assert parameter.tolist() == [1.0] * 3


def test_differs_hyperparameters_on_meta():
    value = torch.tensor(0.5, device="meta")
    for options in ({"betas": (value, value)}, {"weight_decay": value}):
        with pytest.raises(ValueError, match="on meta"):
            mpk.optim.AdamW([nn.Parameter(torch.ones(3))], lr=0.1, **options)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_differs_parameters_twice():
    parameter = nn.Parameter(torch.ones(3))
    torch.optim.SGD([parameter, parameter], lr=0.1)
    with pytest.raises(ValueError, match="parameter 1 stands twice in one group"):
        mpk.optim.SGD([parameter, parameter], lr=0.1)


def test_differs_adam_is_not_adamw():
    parameter = nn.Parameter(torch.ones(3))
    for ours in (False, True):
        adam, adamw = (getattr(mpk.optim if ours else torch.optim, name)([parameter], lr=0.1) for name in ("Adam", "AdamW"))
        for target, source in ((adam, adamw), (adamw, adam)):
            with pytest.raises(ValueError, match="decoupled_weight_decay") if ours else contextlib.nullcontext():
                target.load_state_dict(copy.deepcopy(source.state_dict()))


# ----- other than torch ---------------------------------------------------------------


def scaled_backward(model, **kwargs):
    scaler, optimizer = mpk.GradScaler("cpu", init_scale=8.0), mpk.optim.SGD(model.parameters(), lr=0.1, **kwargs)
    scaler.scale(model(torch.ones(2, 8)).float().sum()).backward()
    return scaler, optimizer, [p.grad.clone() for p in model.parameters()]


def test_differs_grads_stay_scaled():
    model = model_of()
    scaler, optimizer, scaled = scaled_backward(model)
    scaler.step(optimizer)
    assert all(same_bits(p.grad, g) for p, g in zip(model.parameters(), scaled, strict=True))
    model = model_of()
    scaler, optimizer, scaled = scaled_backward(model)
    scaler.unscale_(optimizer)
    assert all(same_bits(p.grad, g / 8) for p, g in zip(model.parameters(), scaled, strict=True))
    model = model_of()
    scaler, optimizer, scaled = scaled_backward(model, write_grads=True)
    scaler.step(optimizer)
    assert all(same_bits(p.grad, g / 8) for p, g in zip(model.parameters(), scaled, strict=True))


def test_differs_clipping_happens_in_the_step():
    model = model_of()
    scaler, optimizer, scaled = scaled_backward(model)
    before = [p.detach().clone() for p in model.parameters()]
    norm = scaler.clip_grad_norm_(optimizer, 1e-3)
    assert all(same_bits(p.grad, g) for p, g in zip(model.parameters(), scaled, strict=True))
    assert norm > 1e-3
    scaler.step(optimizer)
    moved = torch.cat([(p.detach() - b).flatten() for p, b in zip(model.parameters(), before, strict=True)])
    assert 0 < moved.norm() < 0.1 * 1e-3 * 1.01


def test_differs_clips_what_is_there_at_the_step():
    """Of two gradients of norm 3 and 4 one goes: clipped to 1 the other has norm 1, torch's 3 / 5."""
    moved = []
    for cls, scaler in ((mpk.optim.SGD, mpk.GradScaler(init_scale=1.0)), (torch.optim.SGD, torch.amp.GradScaler("cpu", 1.0))):
        params = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
        optimizer = cls(params, lr=1.0)
        scaler.scale(3 * params[0] + 4 * params[1]).backward()
        if isinstance(scaler, mpk.GradScaler):
            assert scaler.clip_grad_norm_(optimizer, 1.0) == 5
        else:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(params, 1.0)
        params[1].grad = None
        scaler.step(optimizer)
        moved.append(-params[0].item())
    assert moved == pytest.approx([1.0, 0.6], rel=1e-5)


def test_differs_grad_dtype_under_compiled_autograd():
    enable = pytest.importorskip("torch._dynamo.compiled_autograd")._enable
    for policy, refused in (("mixed_float16,grad=float16", True), ("mixed_float16", False)):
        layer, x = MPLinear(3, 2, policy=policy), torch.ones(2, 3)
        layer(x).sum().backward()
        assert layer.weight.grad.dtype == (torch.float16 if refused else torch.float32)
        layer.zero_grad()
        torch.compiler.reset()
        with enable(torch.compile(backend="eager")):
            loss = layer(x).sum()
            if refused:
                with pytest.raises(RuntimeError, match="grad_dtype"):
                    loss.backward()
            else:
                loss.backward()


def test_differs_grad_dtype_of_copies():
    layer = MPLinear(3, 2, policy="mixed_float16,grad=float16")
    assert copy.deepcopy(layer).weight.grad_dtype == torch.float16
    assert copy.deepcopy(fx.symbolic_trace(layer)).weight.grad_dtype == torch.float32
    assert fx.symbolic_trace(layer).weight.grad_dtype == torch.float16


def test_differs_compiled_transforms():
    """A weight's gradient beyond float16: kept in fp32 by the op, inf where autocast's casts are differentiated."""
    layer, x = MPLinear(1, 1, bias=False, policy="mixed_float16"), torch.full((2, 1), 60000.0)
    loss = lambda weight: torch.func.functional_call(layer, {"weight": weight}, (x,)).sum()
    torch.compiler.reset()
    assert torch.func.grad(loss)(layer.weight.detach()) > 65504
    assert torch.compile(torch.func.grad(loss), backend="aot_eager", fullgraph=True)(layer.weight.detach()).isinf()


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_differs_slope_at_infinity(activation):
    layer, x = MPLinear(1, 1, bias=False, activation=activation, policy="float32"), torch.tensor([[torch.inf], [-torch.inf]])
    with torch.no_grad():
        layer.weight.fill_(1)
    x.requires_grad_()
    assert torch.autograd.grad(layer(x), x, torch.ones(2, 1))[0].tolist() == [[1.0], [0.0]]
    torch_act = F.silu if activation == "silu" else F.gelu
    assert torch.autograd.grad(torch_act(x), x, torch.ones(2, 1))[0].isnan().any()


def test_differs_exported_programs():
    program = torch.export.export(model_of().eval(), (torch.ones(2, 8),))
    assert "mpkernels.linear_act" in str(program.graph)
    assert "mpkernels" not in str(program.run_decompositions(mpk.functional.decompositions()).graph)


@pytest.mark.parametrize("name", ["foreach", "fused", "capturable"])
def test_differs_options_without_effect(name):
    results = []
    for options in ({}, {name: True}):
        parameter = nn.Parameter(torch.ones(3))
        parameter.grad = torch.full((3,), 0.5)
        optimizer = mpk.optim.AdamW([parameter], lr=0.1, **options)
        assert optimizer.param_groups[0][name] is (True if options else optimizer.defaults[name])
        optimizer.step()
        results.append(parameter.detach())
    assert same_bits(*results)


def test_differs_names_of_a_loaded_state():
    for ours in (True, False):
        made, saved = ((mpk.optim if ours else torch.optim).SGD([(name, nn.Parameter(torch.ones(3)))], lr=0.1) for name in "ab")
        made.load_state_dict(saved.state_dict())
        assert made.param_groups[0]["param_names"] == ["a" if ours else "b"]


def test_differs_state_from_construction():
    def size(policy):
        return len(mpk.optim.AdamW(model_of(policy).parameters(), lr=0.1).state)

    assert (size("mixed_float16,grad=float16"), size("mixed_float16")) == (4, 0)


def test_differs_gradients_of_a_cast():
    model, plain = plain_model(), plain_model()
    for m in (model, plain):
        m(torch.ones(2, 8)).sum().backward()
    assert mpk.convert(model, "float16")[0].weight.grad is None
    assert plain.half()[0].weight.grad.dtype == torch.float16


def test_differs_autocast_around_policies():
    x = torch.ones(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert plain_model()(x).dtype == MPLinear(8, 4)(x).dtype == model_of()(x).dtype == torch.bfloat16
        inside = model_of("float32")(x)
    assert same_bits(inside.detach(), model_of("float32")(x).detach())


def test_differs_encoders_in_evaluation(monkeypatch):
    calls, x = [], torch.ones(2, 5, 8)
    for model in (encoder_of(), mpk.convert(encoder_of())):
        linear = type(model.layers[0].linear1)
        monkeypatch.setattr(
            linear, "forward", lambda self, x, call=linear.forward: (calls.append(type(self)), call(self, x))[1]
        )
        with torch.no_grad():
            model(x)
    assert calls == [MPLinear] * 2


def test_differs_layers_by_hand_in_encoders(monkeypatch):
    calls, x = [], torch.ones(2, 5, 8)
    model = encoder_of()
    for name in ("linear1", "linear2"):
        setattr(model.layers[0], name, MPLinear.from_linear(getattr(model.layers[0], name), policy="mixed_bfloat16"))
    call = MPLinear.forward
    monkeypatch.setattr(MPLinear, "forward", lambda self, x: (calls.append(self), call(self, x))[1])
    with torch.no_grad():
        model(x)
        assert not calls
        mpk.convert(model, "mixed_bfloat16")(x)
    assert calls == [model.layers[0].linear1, model.layers[0].linear2]


# ----- exact types ---------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # torch.ao.quantization is deprecated
def test_differs_quantization_by_type():
    quantization = pytest.importorskip("torch.ao.quantization")
    model, x = model_of(), torch.ones(2, 8)
    assert isinstance(model[0], nn.Linear)
    expected = types_of(model)
    assert types_of(quantization.quantize_dynamic(model, {nn.Linear})) == expected
    with_config = copy.deepcopy(model)
    with_config.qconfig = quantization.get_default_qat_qconfig()
    assert types_of(quantization.prepare_qat(with_config)) == expected
    with_config.eval().qconfig = quantization.get_default_qconfig()
    assert types_of(quantization.prepare(with_config)) == expected
    mapping = quantization.get_default_qconfig_mapping()
    prepared = pytest.importorskip("torch.ao.quantization.quantize_fx").prepare_fx(copy.deepcopy(model).eval(), mapping, (x,))
    assert [node.target for node in prepared.graph.nodes].count(mpk.functional.linear_act) == 2
    assert [type(m).__module__ for m in quantization.quantize_dynamic(mpk.revert(model), {nn.Linear})][::2] == [
        "torch.ao.nn.quantized.dynamic.modules.linear"
    ] * 2


def test_differs_sparsifiers_by_type():
    pruning = pytest.importorskip("torch.ao.pruning")
    for reverted, groups in ((False, 0), (True, 2)):
        model = mpk.revert(model_of()) if reverted else model_of()
        sparsifier = pruning.WeightNormSparsifier()
        sparsifier.prepare(model, None)
        assert len(sparsifier.groups) == groups


def test_differs_apply_by_type():
    found = []
    model_of().apply(lambda m: found.append((type(m) is nn.Linear, isinstance(m, nn.Linear))))
    assert sum(exact for exact, _ in found) == 0
    assert sum(kind for _, kind in found) == 2


def test_differs_sequentials_by_type():
    model = nn.ModuleList([plain_model(), nn.Sequential(nn.Linear(8, 8), nn.Tanh())])
    mpk.convert(model)
    assert [type(m) is nn.Sequential for m in model] == [False, True]
    assert all(isinstance(m, nn.Sequential) for m in model)


def test_differs_by_name():
    layer, x = model_of()[0], torch.ones(2, 8)
    prune.l1_unstructured(layer, "weight", 0.5)
    layer(x).sum().backward()
    assert (layer.weight == 0).float().mean() == 0.5
    assert layer.weight_orig.grad is not None
    layer = parametrizations.weight_norm(model_of()[0])
    layer(x).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


# ----- writes ---------------------------------------------------------------


def check_unseen(write) -> None:
    """`write` doubles a parameter without a sign of it: lost, unless the copy and the master are told of it."""
    layer, x = MPLinear(8, 4, policy="mixed_float16"), torch.ones(2, 8)
    optimizer = mpk.optim.SGD(layer.parameters(), lr=0.0)
    for _ in range(2):
        layer(x).sum().backward()
        optimizer.step()
    before = layer(x).detach()
    write(layer.weight)
    write(layer.bias)
    assert not torch.equal(layer(x).detach(), before * 2)
    mpk.refresh_(layer)
    assert torch.equal(layer(x).detach(), before * 2)

    for told in (False, True):
        parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        optimizer = mpk.optim.SGD([parameter], lr=0.0)
        for i in range(2):
            if i:
                write(parameter)
                if told:
                    optimizer.sync_masters_()
            parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
        assert parameter.tolist() == [2.0 if told else 1.0] * 3


def test_differs_writes_through_data():
    check_unseen(lambda p: p.data.mul_(2))


def test_differs_writes_through_numpy():
    def double(p):
        array = p.detach().view(torch.int16).numpy() if p.dtype == torch.bfloat16 else p.detach().numpy()
        array[...] = (p.detach() * 2).view(torch.int16).numpy() if p.dtype == torch.bfloat16 else array * 2

    check_unseen(double)


def test_differs_writes_by_collectives(group):
    check_unseen(lambda p: dist.scatter(p, [p.detach() * 2]))
