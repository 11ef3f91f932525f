# SPDX-License-Identifier: Apache-2.0
"""Tests of convert, revert and convert_report: what becomes MPLinear, what stays, and that it can be undone."""

import copy
import gc
import io
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import mpkernels as mpk
from mpkernels.nn import MPSequential
from tests.steps import raw


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


class Block(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.up, self.down, self.activation = nn.Linear(6, 8), nn.Linear(8, 6), activation

    def forward(self, x):
        return self.down(self.activation(self.up(x)))


def snapshot(model) -> list:
    """All that convert may change: class, attributes and children of every module, the bits of the parameters."""
    modules = [
        (name, type(m), sorted(k for k in vars(m) if k != "training"), list(m._modules), m.training)
        for name, m in model.named_modules()
    ]
    parameters = [(name, id(p), p.dtype, p.grad_dtype) for name, p in model.named_parameters()]
    return [modules, parameters, raw([*model.parameters(), *model.buffers()])]


# ----- what is converted ----------------------------------------------------------------------


def test_sequential_is_fused_in_place():
    model, twin = mlp(), mlp()
    modules, params = list(model), list(model.parameters())
    assert mpk.convert(model, "mixed_float16") is model
    assert type(model) is MPSequential
    assert list(model) == modules
    assert [type(m) for m in model] == [mpk.MPLinear, nn.ReLU] * 2 + [mpk.MPLinear]
    assert [m.activation for m in model[0::2]] == [None] * 3
    assert [row.activation for row in mpk.convert_report(model)] == ["relu", "relu", None]
    assert all(a is b for a, b in zip(model.parameters(), params, strict=True))
    assert list(model.state_dict()) == list(twin.state_dict())
    assert raw(model.state_dict().values()) == raw(twin.state_dict().values())
    twin.load_state_dict(model.state_dict())
    model.load_state_dict(twin.state_dict())


def test_root_linear():
    model = nn.Linear(6, 2)
    x = torch.randn(3, 6)
    expected = model(x)
    assert type(mpk.convert(model, "float32")) is mpk.MPLinear
    assert model(x).dtype == torch.float32
    assert type(mpk.revert(model)) is nn.Linear
    assert torch.equal(model(x), expected)


def test_converted_models_are_copied_and_saved():
    model = mpk.convert(mlp(), "mixed_float16,grad=float16")
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    twin = copy.deepcopy(model)
    twin.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(3, 6)
    assert torch.equal(twin(x), model(x))
    twin(x).sum().backward()
    assert twin[0].weight.grad.dtype == torch.float16
    before = snapshot(copy.deepcopy(mlp()))
    assert [m[1:] for m in snapshot(mpk.revert(twin))[0]] == [m[1:] for m in before[0]]


def test_optimizer_made_before_a_mixed_convert_stays_valid():
    model = mlp()
    optimizer = mpk.optim.AdamW(model.parameters(), lr=0.1)
    mpk.convert(model, "mixed_float16")
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 6)).sum().backward()
        before = raw(model.parameters())
        optimizer.step()
        assert raw(model.parameters()) != before
    assert torch.equal(model[0]._weight_copy(model[0].weight), model[0].weight.half())


def test_torch_optimizer_made_before_a_mixed_convert_stays_valid():
    """Through a conversion and back in the middle of training: its state, its scheduler and its parameters are the same."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for change in (lambda m: m, mpk.convert, mpk.revert):
        change(model)
        optimizer.zero_grad()
        model(torch.ones(2, 6)).sum().backward()
        before, velocity = raw(model.parameters()), [raw([s["momentum_buffer"]]) for s in optimizer.state.values()]
        optimizer.step()
        scheduler.step()
        assert raw(model.parameters()) != before
        assert len(optimizer.state) == 6
        assert velocity != [raw([s["momentum_buffer"]]) for s in optimizer.state.values()]
    assert scheduler.get_last_lr() == [0.1 / 8]


def test_tied_weights_stay_tied():
    """An embedding and the head that reads it, and two linears of one weight."""
    for policy, dtype in (("mixed_float16", torch.float32), ("float16", torch.float16)):
        model = nn.ModuleDict(
            {"embedding": nn.Embedding(9, 6), "head": nn.Linear(6, 9, False), "other": nn.Linear(6, 9, False)}
        )
        model["head"].weight = model["other"].weight = model["embedding"].weight
        mpk.convert(model, policy)
        assert [type(m) for m in model.values()] == [nn.Embedding, mpk.MPLinear, mpk.MPLinear]
        assert model["head"].weight is model["other"].weight is model["embedding"].weight
        x = model["embedding"](torch.tensor([1, 2]))
        (model["head"](x) + model["other"](x)).float().sum().backward()
        assert model["embedding"].weight.grad.dtype == dtype
        optimizer = mpk.optim.SGD(model.parameters(), lr=1.0)
        optimizer.step()  # one weight, one master, one copy
        assert torch.equal(model["head"](x), model["other"](x))
        mpk.revert(model)
        assert model["head"].weight is model["other"].weight is model["embedding"].weight


def test_other_modules_keep_their_dtype_under_mixed():
    model = mpk.convert(with_norm(), "mixed_bfloat16")
    assert {v.dtype for v in model.state_dict().values() if v.is_floating_point()} == {torch.float32}
    seen = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, args, out, name=name: seen.update({name: (args[0].dtype, out.dtype)}))
    model(torch.ones(3, 6))
    assert set(seen.values()) == {(torch.float32, torch.float32)}, "nothing that is no linear sees 16 bits"


# ----- what is left alone ----------------------------------------------------------------------


class Named(nn.Linear):
    """Of a class that other code may ask for."""


class Special(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def test_skipped_linears_have_reasons():
    model = nn.ModuleDict(
        {
            "attention": nn.MultiheadAttention(6, 2),
            "special": Special(6, 6),
            "parametrized": nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)),
            "kept": nn.Linear(6, 6),
            "plain": nn.Linear(6, 6),
        }
    )
    before = {name: type(module) for name, module in model.named_modules()}
    mpk.convert(model, "mixed_float16", keep="kept")
    rows = {row.name: row for row in mpk.convert_report(model)}
    assert [name for name, row in rows.items() if row.converted] == ["plain"]
    assert rows["attention.out_proj"].note == "its weight is used by nn.MultiheadAttention without calling it"
    assert rows["special"].note == "is a Special, which has its own forward"
    assert rows["parametrized"].note == "is parametrized"
    assert rows["kept"].note == "left as it was"
    after = {name: type(module) for name, module in model.named_modules()}
    assert {name for name in after if before[name] is not after[name]} == {"plain"}


def test_report_prints_a_table():
    model = mpk.convert(mlp(), {"*": "mixed_float16", "4": "float32"}, keep=["2"])
    lines = str(mpk.convert_report(model)).splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["0", "mixed_float16", "relu"],
        ["2", "not", "converted"],
        ["4", "float32", "-"],
    ]
    assert str(mpk.convert_report(mpk.convert(nn.Linear(2, 2)))).startswith("(model) ")


class Quantized(nn.Module):
    """A linear of torch.ao, which is no nn.Linear."""

    def __init__(self):
        super().__init__()
        self.inner = torch.ao.nn.quantized.dynamic.Linear(6, 6)


@pytest.mark.parametrize(
    "make, note",
    [
        (Quantized, "is quantized"),
        (
            lambda: nn.Sequential(torch.ao.nn.qat.Linear(6, 6, qconfig=torch.ao.quantization.default_qat_qconfig)),
            "is quantized",
        ),
        (lambda: nn.Sequential(nn.LazyLinear(6)), "is lazy and has no weight yet: call the model once before"),
        (lambda: nn.Sequential(with_own_forward(nn.Linear(6, 6))), "is a Linear, which has its own forward"),
        (lambda: nn.Sequential(Named(6, 6)), "is a Named, which an MPLinear is not"),
        (lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 6))), "is parametrized"),
        (lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(6, 6))), "is parametrized"),
        (lambda: nn.Sequential(prune.random_unstructured(nn.Linear(6, 6), "weight", 0.5)), "is parametrized"),
        (lambda: nn.Sequential(prune.random_unstructured(nn.Linear(6, 6), "bias", 0.5)), "is parametrized"),
    ],
    ids=["quantized", "qat", "lazy", "instance", "subclass", "weight_norm", "spectral_norm", "pruned", "bias pruned"],
)
@pytest.mark.filterwarnings("ignore")  # torch.ao is deprecated, lazy modules are young
def test_skipped_kinds_have_reasons(make, note):
    model = make()
    kinds = [type(module) for module in model.modules()]
    (row,) = mpk.convert_report(mpk.convert(model, "mixed_float16,grad=float16"))
    assert (row.converted, row.note) == (False, note)
    assert [type(module) for module in model.modules()] == kinds


def with_own_forward(linear):
    linear.forward = lambda x: x
    return linear


# ----- which ones ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, converted",
    [
        ({"include": "0"}, ["0"]),
        ({"include": ["0", "[4-9]"]}, ["0", "4"]),
        ({"include": ()}, []),
        ({"exclude": "2"}, ["0", "4"]),
        ({"include": "[02]", "exclude": ["2"]}, ["0"]),
        ({"filter_fn": lambda module, name: module.out_features % 8 == 0}, ["0", "2"]),
        ({"filter_fn": lambda module, name: name == "4", "keep": "0"}, ["4"]),
    ],
)
def test_include_exclude_and_filter(options, converted):
    for policy, dtype in (("mixed_float16", torch.float32), ("float16", torch.float16)):
        model = mpk.convert(mlp(), policy, **options)
        assert [row.name for row in mpk.convert_report(model) if row.converted] == converted
        assert len(mpk.convert_report(model)) == 3
        kept = {"0.weight", "0.bias"} if "keep" in options else set()
        assert {v.dtype for name, v in model.state_dict().items() if name not in kept} == {dtype}, "what is left is cast too"


def test_filter_is_asked_about_what_is_left():
    asked = []
    model = mpk.convert(mlp())
    mpk.convert(
        model, exclude="0", keep="4", filter_fn=lambda module, name: asked.append((isinstance(module, nn.Linear), name))
    )
    assert asked == [(True, "2")]


# ----- what is too small to pay ----------------------------------------------------------------------


def compiled_by_method(model):
    model.compile(backend="eager")
    return model


def sizes() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 255), nn.ReLU(), nn.Linear(255, 258))


def converted(model) -> list[bool]:
    return [row.converted for row in mpk.convert_report(model)]


@pytest.mark.parametrize("wrap", [lambda model: torch.compile(model, backend="eager"), compiled_by_method])
def test_small_linears_of_a_compiled_model_are_left(wrap):
    model = wrap(sizes())
    before, x = snapshot(model), torch.randn(3, 64)
    expected = model(x)
    mpk.convert(model, "mixed_float16")
    rows = mpk.convert_report(model)
    assert converted(model) == [False, False, True]
    assert [row.note for row in rows][:2] == [f"too small to pay: {n} weights (min_size=65536)" for n in (16384, 65280)]
    assert raw([model(x)]) != raw([expected])
    assert converted(mpk.convert(model, "mixed_float16", min_size=0)) == [True] * 3
    assert converted(mpk.convert(model, "mixed_bfloat16")) == [False, False, True]
    assert snapshot(mpk.revert(model)) == before
    assert raw([model(x)]) == raw([expected])
    assert "too small" not in str(mpk.convert_report(model))
    assert converted(mpk.convert(model, "float16")) == [True] * 3, "left, they would compute by torch's numerics"


@pytest.mark.filterwarnings("ignore")  # torch.ao is deprecated
def test_small_linears_are_left_where_the_user_says_so():
    assert converted(mpk.convert(sizes())) == [True] * 3
    model = mpk.convert(sizes(), min_size=65280)
    assert converted(model) == [False, True, True]
    assert [type(m) for m in model][:2] == [nn.Linear, nn.ReLU]
    part = nn.ModuleList([torch.compile(sizes(), backend="eager"), sizes()])
    assert converted(mpk.convert(part)) == [False, False, True, True, True, True]
    on_a_gpu = torch.compile(sizes().to("meta"), backend="eager")  # or on anything else that no row speaks of
    assert converted(mpk.convert(on_a_gpu)) == [True] * 3
    assert converted(mpk.convert(torch.compile(Quantized(), backend="eager"))) == [False]
    own = nn.Sequential(mpk.MPLinear(6, 6, policy="float32"))
    mpk.convert(own, min_size=1000)
    assert own[0].policy.compute_dtype == torch.float16
    for bad in (True, 1.5, "all"):
        before = snapshot(model)
        with pytest.raises(ValueError, match="min_size must be 0 or more, got -1"):
            mpk.convert(sizes(), min_size=-1)
        with pytest.raises(TypeError, match="min_size must be an int or None, got"):
            mpk.convert(model, min_size=bad)
        assert snapshot(model) == before


# ----- globs ----------------------------------------------------------------------


def policies_of(model) -> list[str]:
    return [str(m.policy) for m in model.modules() if isinstance(m, mpk.MPLinear)]


def test_last_matching_glob_wins():
    f16, bf16, f32 = "mixed_float16", "mixed_bfloat16", "float32"
    assert policies_of(mpk.convert(mlp(), {"*": f16, "4": f32})) == [f16, f16, f32]
    assert policies_of(mpk.convert(mlp(), {"4": f32, "*": f16})) == [f16] * 3
    assert policies_of(mpk.convert(mlp(), {"[02]": bf16, "2": f16})) == [bf16, f16]
    nested = nn.ModuleDict({"body": mlp(), "head": nn.Linear(4, 2)})
    assert policies_of(mpk.convert(nested, {"*": f16, "body": bf16})) == [bf16] * 3 + [f16], "a module means what is in it"
    assert policies_of(mpk.convert(nested, {"*": f16, "*.2": f32})) == [f16, f32, f16, f16]


def test_a_glob_may_be_a_name_with_brackets():
    """As advise gives them."""
    model = nn.ModuleDict({"a[0]": nn.Linear(2, 2), "b[*]": mlp()})
    mpk.convert(model, {"a[0]": "float32", "b[*].4": "mixed_float16"}, keep="b[*].2")
    assert [(row.name, row.converted) for row in mpk.convert_report(model)] == [
        ("a[0]", True), ("b[*].0", False), ("b[*].2", False), ("b[*].4", True)
    ]  # fmt: skip


def test_policy_objects_and_mappings_of_them():
    policy = mpk.Policy.parse("mixed_bfloat16")
    assert policies_of(mpk.convert(mlp(), policy)) == ["mixed_bfloat16"] * 3
    assert policies_of(mpk.convert(mlp(), {"0": policy})) == ["mixed_bfloat16"]


# ----- revert and convert again ----------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16,grad=bfloat16", {"0": "mixed_float16"}])
def test_revert_is_exact(policy):
    model, x = nn.Sequential(mlp(), nn.ReLU(), nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)).eval()), torch.randn(3, 6)
    before, modules, expected = snapshot(model), list(model.modules()), model(x)
    mpk.convert(model, policy if isinstance(policy, str) else {"0.0": "mixed_float16"})
    assert snapshot(model) != before
    assert mpk.revert(model) is model
    assert snapshot(model) == before
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert torch.equal(model(x), expected)
    mpk.revert(model)
    assert snapshot(model) == before


def test_revert_leaves_the_layers_of_the_user():
    own = mpk.MPLinear(6, 6, policy="mixed_bfloat16")
    model = nn.Sequential(own, nn.ReLU(), nn.Linear(6, 6))
    mpk.convert(model, "mixed_float16,grad=float16")
    assert str(own.policy).startswith("mixed_float16")
    assert own.activation is None
    mpk.revert(model)
    assert (type(own), str(own.policy), own.activation) == (mpk.MPLinear, "mixed_bfloat16", None)
    assert own.weight.grad_dtype == torch.float32
    assert type(model[1]) is nn.ReLU
    relu = nn.Sequential(mpk.MPLinear(6, 6, activation="relu", policy="float32"), nn.ReLU())
    mpk.convert(relu, "mixed_float16")
    assert relu[0].activation == "relu"
    assert type(relu[1]) is nn.ReLU


def test_convert_is_idempotent_and_changes_policies():
    once, twice = mpk.convert(mlp(), "mixed_float16"), mpk.convert(mpk.convert(mlp(), "mixed_float16"), "mixed_float16")
    assert str(mpk.convert_report(once)) == str(mpk.convert_report(twice))
    changed = mpk.convert(mpk.convert(mlp(), "mixed_float16,grad=float16"), "mixed_bfloat16")
    fresh = mpk.convert(mlp(), "mixed_bfloat16")
    assert str(mpk.convert_report(changed)) == str(mpk.convert_report(fresh))
    assert [p.grad_dtype for p in changed.parameters()] == [torch.float32] * 6
    x = torch.randn(3, 6)
    assert torch.equal(changed(x), fresh(x))
    fewer = mpk.convert(mpk.convert(mlp(), "mixed_float16"), {"0": "mixed_float16"})
    assert [type(m) for m in fewer] == [mpk.MPLinear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]


# ----- parameters in 16 bits ----------------------------------------------------------------------


def with_norm() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.BatchNorm1d(6), nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 2)))
    model[2].running_mean.fill_(1 + 2.0**-20)
    return model


@pytest.mark.parametrize("policy, dtype", [("float16", torch.float16), ("bfloat16", torch.bfloat16)])
def test_cast_is_that_of_half(policy, dtype):
    model, expected = mpk.convert(with_norm(), policy), with_norm().to(dtype)
    assert list(model.state_dict()) == list(expected.state_dict())
    assert raw(model.state_dict().values()) == raw(expected.state_dict().values())
    assert [v.dtype for v in model.state_dict().values()] == [v.dtype for v in expected.state_dict().values()]


def test_cast_leaves_what_is_kept():
    model = mpk.convert(with_norm(), "float16", keep=["2", "3.0"])
    wide = {name for name, value in model.state_dict().items() if value.dtype == torch.float32}
    assert wide == {"2.weight", "2.bias", "2.running_mean", "2.running_var", "3.0.weight", "3.0.bias"}
    whole = mpk.convert(with_norm(), "float16", keep="3")
    assert {p.dtype for p in whole[3].parameters()} == {torch.float32}
    assert type(whole[3][1]) is nn.Linear
    tied = with_norm()
    tied[0].bias = tied[2].bias
    mpk.convert(tied, "float16", keep="2")
    assert tied[0].bias.dtype == torch.float32, "what a kept module has stays, whatever else has it"


def test_cast_of_buffers_that_are_tied():
    model = mlp()
    model.register_buffer("a", torch.ones(2))
    for module, name in ((model, "b"), (model[0], "c")):
        module.register_buffer(name, model.a)
    mpk.convert(model, "float16")
    assert model.a is model.b is model[0].c
    assert model.a.dtype == torch.float16


def test_cast_leaves_linears_of_a_wider_policy():
    model = mpk.convert(mlp(), {"*": "float16", "4": "float32"})
    assert [m.weight.dtype for m in model[0::2]] == [torch.float16, torch.float16, torch.float32]
    assert model(torch.ones(2, 6)).dtype == torch.float32


def test_cast_rounds_fp64_once():
    model = nn.Linear(1, 1).double()
    with torch.no_grad():
        model.weight.fill_(1 + 2.0**-11 + 2.0**-40)
    mpk.convert(model, "float16")
    assert model.weight.item() == 1 + 2.0**-10


def test_optimizer_stepped_before_a_cast_raises():
    """One that has no state yet makes what the parameters need when it first steps."""
    for stepped in (False, True):
        model = mlp()
        optimizer = mpk.optim.AdamW(model.named_parameters())
        if stepped:
            model(torch.ones(2, 6)).sum().backward()
            optimizer.step()
        mpk.convert(model, "float16")
        assert model[0].weight.grad is None
        model(torch.ones(2, 6)).float().sum().backward()
        before = raw(model.parameters())
        if stepped:
            with pytest.raises(RuntimeError, match=r"parameter 0 \(0.weight\) changed dtype since .*: torch.float32 then"):
                optimizer.step()
        else:
            optimizer.step()
        assert (raw(model.parameters()) == before) == stepped


# ----- what it leaves behind ----------------------------------------------------------------------


def test_conversion_calls_nothing_and_draws_no_random_number():
    model, seen = nn.Sequential(Block(torch.relu), nn.Linear(6, 2)), []
    model[0].register_forward_hook(lambda *args: seen.append(args))
    state = torch.get_rng_state()
    mpk.convert(model)
    assert not seen
    assert torch.equal(torch.get_rng_state(), state)


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), 2, enable_nested_tensor=False)


@pytest.mark.parametrize("policy", ["mixed_float16,grad=float16", "float16"])
@pytest.mark.parametrize("make", [mlp, encoder, lambda: Block(torch.relu)])
def test_converted_models_are_freed_with_their_last_reference(make, policy):
    """Without the garbage collector: nothing in a model leads back to it. After training, and after revert, too."""
    gc.collect()
    gc.disable()
    try:
        for reverted in (False, True):
            model = mpk.convert(make(), policy)
            x = torch.ones(2, 3, 6, dtype=next(model.parameters()).dtype)
            model(x).float().sum().backward()
            if reverted:
                mpk.revert(model)
            gone = [weakref.ref(module) for module in model.modules()] + [weakref.ref(p) for p in model.parameters()]
            del model
            assert not [ref() for ref in gone if ref() is not None]
    finally:
        gc.enable()


def test_mlps_of_the_user_stay():
    model = mpk.nn.MPMLP([6, 6, 2], policy="mixed_bfloat16")
    mpk.revert(mpk.convert(nn.ModuleList([model]), "mixed_float16"))
    assert type(model) is mpk.nn.MPMLP
    assert {str(m.policy) for m in model.modules() if isinstance(m, mpk.MPLinear)} == {"mixed_bfloat16"}
