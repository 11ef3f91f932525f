# SPDX-License-Identifier: Apache-2.0
"""What convert answers to bad and to odd input: refused before anything changed, left alone with a reason, or right."""

import copy
import itertools

import pytest
import torch
from torch import nn

import mpkernels as mpk
from tests.bounds import check_forward
from tests.nn.test_convert import snapshot
from tests.steps import raw

POLICIES = ("mixed_float16", "float16", "bfloat16")
policies = pytest.mark.parametrize("policy", POLICIES)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


# ----- refused ----------------------------------------------------------------------

BAD_POLICIES = [
    ("mixed_float4", ValueError, "unknown policy 'mixed_float4': expected one of float64, .*mixed_float16"),
    ("mixed_float16,width=float16", ValueError, "expected one of .* or param=, compute=, output=, grad="),
    ("param=float16,compute=float32", ValueError, "compute_dtype torch.float32 is wider than param_dtype torch.float16"),
    ("mixed_float32,grad=float16", ValueError, "grad_dtype torch.float16 is narrower than compute_dtype torch.float32"),
    ("mixed_float16,grad=bfloat16", ValueError, "grad_dtype torch.bfloat16 is narrower than compute_dtype torch.float16"),
    (16, TypeError, "policy must be a Policy or a string, got int"),
    (torch.float16, TypeError, "policy must be a Policy or a string, got dtype"),
    (["mixed_float16"], TypeError, "policy must be a Policy or a string, got list"),
]


@pytest.mark.parametrize("where", ["alone", "first of a mapping", "last of a mapping"])
@pytest.mark.parametrize(("policy", "error", "message"), BAD_POLICIES)
def test_convert_refuses_policies(policy, error, message, where):
    mapping = {"first of a mapping": {"*": policy, "2": "float32"}, "last of a mapping": {"*": "float32", "2": policy}}
    for model in (mlp(), mpk.convert(mlp(), "mixed_bfloat16")):
        before = snapshot(model)
        with pytest.raises(error, match=message):
            mpk.convert(model, mapping.get(where, policy))
        assert snapshot(model) == before


@policies
@pytest.mark.parametrize(
    "name, glob",
    [
        *itertools.product(("policy", "include", "exclude", "keep"), ("head", "0.weight", "[", "3", "*x*", "0*2")),
        *itertools.product(("policy", "include", "exclude"), ("1",)),  # a module that is no linear
    ],
)
def test_convert_refuses_globs_that_match_nothing(name, glob, policy):
    """By name, and whichever argument it is in; nothing is a pattern that matches nothing."""
    options = {"policy": {"*": policy, glob: policy}} if name == "policy" else {"policy": policy, name: ["0", glob]}
    model = mlp()
    before = snapshot(model)
    with pytest.raises(ValueError, match="of the model matches") as refused:
        mpk.convert(model, **options)
    assert repr(glob) in str(refused.value)
    assert snapshot(model) == before


@pytest.mark.parametrize("model", [None, 3, "model", [nn.Linear(2, 2)], nn.Linear, nn.Parameter(torch.ones(2, 2))], ids=repr)
def test_convert_refuses_what_is_no_module(model):
    for function in (mpk.convert, mpk.revert, mpk.convert_report):
        with pytest.raises(TypeError, match=f"model must be a Module, got {type(model).__name__}"):
            function(model)


@pytest.mark.parametrize(
    ("glob", "advice"),
    [
        ("haed", r"did you mean 'head'\?$"),
        ("body.layer.0", r"did you mean 'body\.layers\.0' or 'body\.layers\.[123]'\?$"),
        ("layers.0", r"did you mean '\*\.layers\.0'\? A glob is held against the whole name$"),
        ("[01]", r"did you mean '\*\.\[01\]'\? A glob"),
        ("zzz", r"there are 'body\.layers\.0', 'body\.layers\.1', 'body\.layers\.2', 'body\.layers\.3', \.\.\.$"),
    ],
)
def test_convert_says_what_a_glob_may_have_meant(glob, advice):
    body = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(2, 2) for _ in range(4))})
    model = nn.ModuleDict({"body": body, "head": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=advice):
        mpk.convert(model, include=["*", glob])


def test_convert_says_where_there_is_no_linear():
    with pytest.raises(ValueError, match=r"no linear of the model matches 'head': it has no linear$"):
        mpk.convert(nn.Tanh(), include="head")


@pytest.mark.parametrize(
    ("policy", "advice"),
    [
        ({}, r'give a name, or globs with theirs, as \{"\*": "mixed_float16"\}$'),
        ({"*": "float16", "2": "bfloat16"}, "beside which float32 and float64 may stand$"),
        ({"*": "float16", "2": "mixed_float16"}, "give all of it mixed_\\* policies, or one 16-bit policy"),
    ],
)
def test_convert_says_which_policies_go_together(policy, advice):
    for model in (mlp(), mpk.convert(mlp(), "mixed_bfloat16")):
        before = snapshot(model)
        with pytest.raises(ValueError, match=advice):
            mpk.convert(model, policy)
        assert snapshot(model) == before


# ----- left alone, with a reason ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.int64], ids=str)
def test_convert_leaves_weights_of_other_dtypes(dtype):
    odd = nn.Linear(4, 4)
    odd.weight = nn.Parameter(torch.zeros(4, 4).to(dtype), requires_grad=False)
    model = mpk.convert(nn.ModuleList([nn.Linear(4, 4), odd]), "mixed_float16")
    assert type(odd) is nn.Linear
    assert odd.weight.dtype == dtype
    assert [row.note for row in mpk.convert_report(model)] == ["", f"has a weight of {dtype}"]


# ----- right ----------------------------------------------------------------------


def odd_models() -> dict:
    """Models whose parameters are not laid out as their classes made them."""
    strided, tied, flat, frozen = (mlp() for _ in range(4))
    for linear in (strided[0], strided[2]):
        linear.weight = nn.Parameter(linear.weight.detach().t().contiguous().t())
        linear.bias = nn.Parameter(torch.stack([linear.bias.detach(), linear.bias.detach()], 1)[:, 0])
    tied.append(nn.Linear(4, 6))
    tied[3].weight, tied[3].bias = tied[0].weight, tied[0].bias
    tied[2] = nn.Linear(6, 4)
    buffer, at = torch.cat([p.detach().flatten() for p in flat.parameters()]), 0
    for parameter in flat.parameters():
        parameter.data = buffer[at : at + parameter.numel()].view(parameter.shape)
        at += parameter.numel()
    return {
        "strided": strided, "tied": tied, "views of one buffer": flat, "frozen": frozen.requires_grad_(False),
        "expanded": _with_weight(torch.randn(1).expand(6, 4)), "unaligned": _with_weight(torch.randn(25)[1:].view(6, 4)),
        "fp64": mlp().double(), "no bias": nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU()),
        "without rows": nn.Sequential(nn.Linear(4, 0)), "without columns": nn.Sequential(nn.Linear(0, 3), nn.ReLU()),
    }  # fmt: skip


def _with_weight(weight) -> nn.Sequential:
    model = mlp()
    model[0].weight = nn.Parameter(weight)
    return model


ODD = ("strided", "tied", "views of one buffer", "frozen", "expanded", "unaligned", "fp64", "no bias", "without rows",
       "without columns")  # fmt: skip


@pytest.mark.parametrize("policy", [*POLICIES, "float32"])
@pytest.mark.parametrize("name", ODD)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_convert_of_odd_parameters(name, policy):
    """Right, with the same Parameters, of the values that convert gives a plain model; and revert is exact."""
    model = odd_models()[name]
    plain, parameters = copy.deepcopy(model), list(model.parameters())
    for parameter in plain.parameters():
        parameter.data = parameter.detach().clone(memory_format=torch.contiguous_format)
    x = torch.randn(3, model[0].in_features, generator=torch.Generator().manual_seed(0)).to(parameters[0].dtype)
    for converted in (model, plain):
        mpk.convert(converted, policy)
    layer = model[0]
    out = layer(x.to(layer.weight.dtype))
    check_forward(out, x.to(layer.weight.dtype), layer.weight, layer.bias, layer._activation, layer.policy.compute_dtype)
    assert model(x.to(layer.weight.dtype)).isfinite().all()
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert raw(model.parameters()) == raw(plain.parameters())
    assert all(type(m) is nn.Linear for m in mpk.revert(model) if isinstance(m, nn.Linear))


@policies
def test_convert_under_inference_mode(policy):
    """A model made there is for inference; what it says is what the plain one in the same precision says, shapes and all."""
    with torch.inference_mode():
        model = mpk.convert(mlp(), policy).eval()
        dtype = next(model.parameters()).dtype
        with mpk.cached_weights(model):
            out = model(torch.ones(2, 4, dtype=dtype))
    assert torch.equal(out, mpk.convert(mlp(), policy)(torch.ones(2, 4, dtype=dtype)))


@policies
def test_convert_on_meta(policy):
    """Before the weights are there, as for a model too large to be made twice."""
    model = mpk.convert(mlp().to("meta"), policy)
    assert model(torch.ones(2, 4, device="meta", dtype=next(model.parameters()).dtype)).shape == (2, 2)
    filled, expected = model.to_empty(device="cpu"), mpk.convert(mlp(), policy)
    filled.load_state_dict(expected.state_dict())
    x = torch.ones(2, 4, dtype=next(filled.parameters()).dtype)
    assert torch.equal(filled(x), expected(x))


@policies
@pytest.mark.parametrize("answer", [None, lambda module, name: 1 / 0])
def test_convert_asks_filter_fn_before_it_changes_anything(answer, policy):
    for model in (mlp(), mpk.convert(mlp(), "mixed_bfloat16")):
        before = snapshot(model)
        with pytest.raises((TypeError, ZeroDivisionError)):
            mpk.convert(model, policy, filter_fn=answer or "0")
        assert snapshot(model) == before


def test_convert_leaves_a_sparse_weight():
    model = mlp()
    model[0].weight = nn.Parameter(model[0].weight.detach().to_sparse())
    mpk.convert(model)
    assert [row.note for row in mpk.convert_report(model)] == ["has a weight of torch.sparse_coo", ""]


def test_convert_under_inference_mode_leaves_parameters_that_train():
    model = mlp()
    with torch.inference_mode():
        mpk.convert(model, "float16")
    optimizer = mpk.optim.SGD(model.parameters(), lr=0.1)
    before = raw(model.parameters())
    model(torch.ones(3, 4).half()).sum().backward()
    optimizer.step()
    assert all(a != b for a, b in zip(raw(model.parameters()), before, strict=True))


@pytest.mark.parametrize("policy", ["float16", "bfloat16"])
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_convert_casts_a_lazy_linear_as_half_does(policy):
    """It takes part in a 16-bit model, is a plain linear when it has a weight, and is converted the next time."""
    model = mpk.convert(nn.Sequential(nn.Linear(6, 8), nn.LazyLinear(4)), policy)
    dtype = model[0].weight.dtype
    assert [row.note for row in mpk.convert_report(model)][1] == "is lazy and has no weight yet: call the model once before"
    assert nn.parameter.is_lazy(model[1].weight)
    assert model[1].weight.dtype == dtype
    assert model(torch.ones(2, 6, dtype=dtype)).dtype == model[1].weight.dtype == dtype
    assert type(model[1]) is nn.Linear
    assert type(mpk.convert(model, policy)[1]) is mpk.MPLinear
