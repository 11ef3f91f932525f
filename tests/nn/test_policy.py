# SPDX-License-Identifier: Apache-2.0
"""Policy: parsing, printing, what is refused, FSDP2's counterpart, and the default in a context."""

import contextlib
import dataclasses
import itertools
import re
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.fsdp import MixedPrecisionPolicy

import mpkernels as mpk
from mpkernels import policy as policies
from mpkernels.policy import Policy

f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
NAMES = {
    "float64": (f64, f64),
    "float32": (f32, f32),
    "mixed_float32": (f64, f32),
    "mixed_float16": (f32, f16),
    "mixed_bfloat16": (f32, bf16),
    "mixed_float8": (f32, e4m3),
    "mixed_float8_hybrid": (f32, e4m3),
    "float16": (f16, f16),
    "bfloat16": (bf16, bf16),
}
SHORT = {f64: "float64", f32: "float32", f16: "float16", bf16: "bfloat16"}


def allowed(param, compute, grad) -> bool:
    """By the rules: computing is not wider than storing, nor in the other 16-bit format; gradients hold what is computed."""
    narrower = compute == param or compute.itemsize < param.itemsize
    return narrower and (grad is None or grad == compute or grad.itemsize > compute.itemsize)


ALLOWED = [c for c in itertools.product(SHORT, SHORT, (None, *SHORT), (None, *SHORT)) if allowed(c[0], c[1], c[3])]
REFUSED = [c for c in itertools.product(SHORT, SHORT, (None, *SHORT), (None, *SHORT)) if not allowed(c[0], c[1], c[3])]


@pytest.fixture(autouse=True)
def _no_default():
    yield
    assert mpk.get_default_policy() is None


# ----- parse and print ---------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_policy_names(name):
    policy = Policy.parse(name)
    assert (policy.param_dtype, policy.compute_dtype, policy.output_dtype, policy.grad_dtype) == (*NAMES[name], None, None)
    assert str(policy) == name
    assert policy.mixed == name.startswith("mixed_")


@pytest.mark.parametrize("combination", ALLOWED, ids=lambda c: ",".join(map(str, c)).replace("torch.", ""))
def test_policy_round_trip(combination):
    policy = Policy(*combination)
    assert Policy.parse(str(policy)) == policy
    assert Policy.parse(policy) is policy
    assert str(Policy.parse(str(policy))) == str(policy)


@given(st.sampled_from(ALLOWED), st.permutations(range(4)), st.sampled_from(["", " ", "  "]))
def test_policy_fields_in_any_order(combination, order, space):
    keys = ("param", "compute", "output", "grad")
    parts = [f"{space}{keys[i]}={SHORT[combination[i]]}{space}" for i in order if combination[i] is not None]
    assert Policy.parse(",".join(parts)) == Policy(*combination)


@given(
    st.sampled_from([name for name in sorted(NAMES) if "float8" not in name]),
    st.sampled_from([None, *SHORT]),
    st.sampled_from([None, *SHORT]),
)
def test_policy_name_followed_by_fields(name, output, grad):
    text = name + "".join(f",{key}={SHORT[d]}" for key, d in (("output", output), ("grad", grad)) if d is not None)
    if allowed(*NAMES[name], grad):
        assert Policy.parse(text) == Policy(*NAMES[name], output, grad)
    else:
        with pytest.raises(ValueError, match="grad_dtype"):
            Policy.parse(text)


@given(st.text())
def test_policy_any_text_parses_or_raises_value_error(text):
    with contextlib.suppress(ValueError):
        policy = Policy.parse(text)
        assert Policy.parse(str(policy)) == policy


def test_policy_is_frozen_and_hashable():
    policy = Policy.parse("mixed_float16")
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.compute_dtype = bf16
    assert len({policy, Policy.parse("param=float32,compute=float16"), Policy.parse("float32")}) == 2


# ----- what is refused ---------------------------------------------------------------


@pytest.mark.parametrize("combination", REFUSED, ids=lambda c: ",".join(map(str, c)).replace("torch.", ""))
def test_policy_refuses_combinations(combination):
    with pytest.raises(ValueError, match=r"compute_dtype .*(wider than|cannot hold) param_dtype|grad_dtype .* narrower than"):
        Policy(*combination)


@pytest.mark.parametrize(
    "text",
    [
        "mixed_fp16", "half", "Float32", "float8", "mixed_float8,scaling=block", "float8_e4m3fn", "",
        "float32,float16", "param=float32,mixed_float16", "weight=float32",
        "param=fp32,compute=float16", "param=float32,compute=", "=float32", "param", "param_dtype=float32", "mixed_float16,",
        "mixed_float16;grad=float16", "param=int64,compute=int64", "mixed_float16,grad=None",
    ],
)  # fmt: skip
def test_policy_refuses_text(text):
    """The message has what was given and everything that is allowed."""
    with pytest.raises(ValueError, match=re.escape(repr(text))) as refused:
        Policy.parse(text)
    for word in (*NAMES, "param=", "compute=", "output=", "grad=", "scaling=", "dgrad=", "wgrad="):
        assert word in str(refused.value)


@pytest.mark.parametrize(
    ("text", "missing"),
    [("param=float32", "compute_dtype"), ("compute=float16", "param_dtype"), ("grad=float32", "compute_dtype, param_dtype")],
)
def test_policy_refuses_half_a_policy(text, missing):
    with pytest.raises(ValueError, match=f"lacks {missing}"):
        Policy.parse(text)


@pytest.mark.parametrize("value", [None, 1, f16, ["mixed_float16"]], ids=str)
def test_policy_refuses_what_is_no_text(value):
    with pytest.raises(TypeError, match=f"policy must be a Policy or a string, got {type(value).__name__}"):
        Policy.parse(value)


@pytest.mark.parametrize("field", ["param_dtype", "compute_dtype", "output_dtype", "grad_dtype"])
@pytest.mark.parametrize("value", [torch.int64, torch.complex64, torch.float8_e8m0fnu, e4m3, "float32", 1], ids=str)
def test_policy_refuses_dtypes(field, value):
    fields = {"param_dtype": f32, "compute_dtype": f32} | {field: value}
    if (field, value) == ("compute_dtype", e4m3):
        return
    eight = ", float8_e4m3fn, float8_e5m2" if field == "compute_dtype" else ""
    with pytest.raises(ValueError, match=f"{field} must be one of float64, float32, float16, bfloat16{eight}, got"):
        Policy(**fields)


@pytest.mark.parametrize("field", ["param_dtype", "compute_dtype"])
def test_policy_needs_both_dtypes(field):
    with pytest.raises(ValueError, match=f"{field} must be one of"):
        Policy(**{"param_dtype": f32, "compute_dtype": f32} | {field: None})


# ----- eight bits ---------------------------------------------------------------

EIGHT = [
    dict(zip(("grad_dtype", "output_dtype", "batch_invariant", "scaling", "dgrad_dtype", "wgrad_dtype"), values, strict=True))
    for values in itertools.product(
        (None, bf16, f32), (None, f16), (False, True), (None, "row", "tensor"), (None, e4m3, e5m2), (None, f32)
    )
    if not (values[2] and values[3] == "tensor") and not (values[0] == bf16 and values[5] == f32)
]


@pytest.mark.parametrize("compute", [e4m3, e5m2])
def test_policy_of_eight_bits_round_trip(compute):
    for fields in EIGHT:
        policy = Policy(f32, compute, **fields)
        assert policy.float8
        assert policy.mixed
        assert Policy.parse(str(policy)) == policy
        assert str(Policy.parse(str(policy))) == str(policy)


@pytest.mark.parametrize(
    "text, fields",
    [
        ("mixed_float8", ("row", e4m3, bf16)),
        ("mixed_float8_hybrid", ("tensor", e5m2, bf16)),
        ("param=float32,compute=float8_e5m2", ("row", e5m2, bf16)),
        ("mixed_float8,wgrad=float32", ("row", e4m3, f32)),
        ("mixed_float8 , scaling=tensor", ("tensor", e4m3, bf16)),
    ],
)
def test_policy_of_eight_bits_says_all_of_it(text, fields):
    policy = Policy.parse(text)
    assert (policy.scaling, policy.dgrad_dtype, policy.wgrad_dtype) == fields


@pytest.mark.parametrize(
    "text, printed",
    [
        ("mixed_float8,scaling=row", "mixed_float8"),
        ("mixed_float8,scaling=tensor,dgrad=float8_e5m2", "mixed_float8_hybrid"),
        ("mixed_float8_hybrid,scaling=row", "mixed_float8,dgrad=float8_e5m2"),
        ("mixed_float8,batch_invariant,grad=bfloat16", "mixed_float8,grad=bfloat16,batch_invariant"),
    ],
)
def test_policy_of_eight_bits_is_printed_by_the_nearest_name(text, printed):
    assert str(Policy.parse(text)) == printed


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"param_dtype": bf16}, "is for parameters in float32, got torch.bfloat16"),
        ({"param_dtype": f64}, "is for parameters in float32"),
        ({"output_dtype": f64}, "output_dtype float64 is more than"),
        ({"grad_dtype": f16}, "grad_dtype torch.float16 is narrower than wgrad_dtype torch.bfloat16"),
        ({"grad_dtype": bf16, "wgrad_dtype": f32}, "is narrower than wgrad_dtype torch.float32"),
        ({"wgrad_dtype": f16}, "wgrad_dtype must be one of bfloat16, float32, got torch.float16"),
        ({"dgrad_dtype": bf16}, "dgrad_dtype must be one of float8_e4m3fn, float8_e5m2, got"),
        ({"scaling": "block"}, "scaling must be one of row, tensor, got 'block'"),
        ({"scaling": "tensor", "batch_invariant": True}, "batch_invariant needs scaling='row'"),
        ({"compute_dtype": f16, "scaling": "row"}, "scaling is for a compute_dtype of float8_e4m3fn or float8_e5m2, got"),
        ({"compute_dtype": f16, "dgrad_dtype": e5m2}, "dgrad_dtype is for a compute_dtype of"),
        ({"compute_dtype": f16, "wgrad_dtype": bf16}, "wgrad_dtype is for a compute_dtype of"),
    ],
)
def test_policy_of_eight_bits_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        Policy(**{"param_dtype": f32, "compute_dtype": e4m3} | fields)


@pytest.mark.parametrize(
    "text, meant",
    [
        *((text, "'mixed_float8'") for text in ("fp8", "float8", "e4m3", "FP8", "mixed_fp8", "torch.float8_e4m3fn", "8-mixed")),
        *((text, "'mixed_float8_hybrid'") for text in ("e5m2", "fp8_hybrid", "float8_e5m2", "torch.float8_e5m2")),
        ("mixed_float8,dgrad=e5m2", "'dgrad=float8_e5m2'"), ("mixed_float8,wgrad=bf16", "'wgrad=bfloat16'"),
        ("mixed_float8,scaling=rows", "'scaling=row'"), ("param=fp8", "'compute=float8_e4m3fn'"),
        ("mixed_float16,grad=fp8", "'compute=float8_e4m3fn'"),
        ("mixed_float16,saved=float8_e5m2", "'saved=float8_e4m3fn'"),
        ("mixed_float8,wgrad=float16", "'wgrad=bfloat16' or 'wgrad=float32'"),
        ("mixed_float8,dgrad=bf16", "'dgrad=float8_e4m3fn' or 'dgrad=float8_e5m2'"),
    ],
)  # fmt: skip
def test_policy_of_eight_bits_says_what_may_be_meant(text, meant):
    with pytest.raises(ValueError, match="unknown policy") as caught:
        Policy.parse(text)
    assert str(caught.value).endswith(f"; did you mean {meant}?")


# ----- FSDP2 ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("float32", (f32, f32, None)),
        ("float64", (f64, f64, None)),
        ("mixed_float32", (f32, f32, None)),
        ("mixed_float16", (f16, f32, None)),
        ("mixed_bfloat16,output=bfloat16", (bf16, f32, bf16)),
        ("mixed_float16,grad=float32", (f16, f32, None)),
        ("float16", (f16, f32, None)),
        ("bfloat16,grad=bfloat16", (bf16, bf16, None)),
        ("float16,grad=float32", (f16, f32, None)),
        ("mixed_float8", (None, f32, None)),
        ("mixed_float8_hybrid,output=bfloat16,grad=float32", (None, f32, bf16)),
    ],
)
def test_policy_to_fsdp(text, expected):
    param, reduce, output = expected
    assert Policy.parse(text).to_fsdp() == MixedPrecisionPolicy(param_dtype=param, reduce_dtype=reduce, output_dtype=output)


@pytest.mark.parametrize("text", ["mixed_float16,grad=float16", "mixed_bfloat16,grad=bfloat16", "mixed_float32,grad=float32"])
def test_policy_to_fsdp_refuses_narrow_gradients(text):
    with pytest.raises(ValueError, match="use grad_dtype=None"):
        Policy.parse(text).to_fsdp()


# ----- the default ---------------------------------------------------------------


def test_policy_default_is_set_and_unset():
    mpk.set_default_policy("mixed_float16")
    assert mpk.get_default_policy() == Policy.parse("mixed_float16")
    assert mpk.MPLinear(2, 3).policy == Policy.parse("mixed_float16")
    assert mpk.MPLinear(2, 3, policy="float32").policy == Policy.parse("float32")
    mpk.set_default_policy(None)
    assert mpk.MPLinear(2, 3).policy is None


def test_policy_default_contexts_nest():
    with mpk.default_policy("mixed_float16"):
        with mpk.default_policy("bfloat16"):
            assert mpk.get_default_policy() == Policy.parse("bfloat16")
            with mpk.default_policy(None):
                assert mpk.get_default_policy() is None
            assert mpk.get_default_policy() == Policy.parse("bfloat16")
        assert mpk.get_default_policy() == Policy.parse("mixed_float16")


def test_policy_default_is_restored_after_an_exception():
    with mpk.default_policy("mixed_float16"):
        with pytest.raises(KeyError), mpk.default_policy("bfloat16"):
            raise KeyError
        assert mpk.get_default_policy() == Policy.parse("mixed_float16")


def test_policy_default_refuses_bad_text_and_stays():
    with mpk.default_policy("mixed_float16"):
        for change in (mpk.set_default_policy, lambda text: mpk.default_policy(text).__enter__()):
            with pytest.raises(ValueError, match="unknown policy"):
                change("half")
        assert mpk.get_default_policy() == Policy.parse("mixed_float16")


def test_policy_default_context_does_not_leak_into_threads():
    seen = []
    with mpk.default_policy("mixed_float16"):
        thread = threading.Thread(target=lambda: seen.append(mpk.get_default_policy()))
        thread.start()
        thread.join()
    assert seen == [None]


@pytest.mark.parametrize("word", ["batch_invariant", "accumulate_grad"])
def test_policy_words_are_parsed_and_printed(word):
    policy = Policy.parse(f"mixed_float16,{word}")
    assert getattr(policy, word)
    assert str(policy) == f"mixed_float16,{word}"
    assert Policy.parse(str(policy)) == policy
    assert not getattr(Policy.parse("mixed_float16"), word)
    with pytest.raises(ValueError, match=f"{word} must be True or False, got 1"):
        Policy(torch.float32, torch.float16, **{word: 1})
    both = Policy.parse("mixed_float16,accumulate_grad,batch_invariant")
    assert (both.batch_invariant, both.accumulate_grad) == (True, True)
    assert str(both) == "mixed_float16,batch_invariant,accumulate_grad"


@pytest.mark.parametrize("combination", ALLOWED, ids=lambda c: ",".join(map(str, c)).replace("torch.", ""))
def test_policy_accumulates_fp32_gradients_alone(combination):
    grad = combination[3] or combination[0]
    if grad == f32:
        assert Policy(*combination, accumulate_grad=True).accumulate_grad
    else:
        with pytest.raises(ValueError, match=f"accumulate_grad needs gradients in float32, got {grad}"):
            Policy(*combination, accumulate_grad=True)


@pytest.mark.parametrize(
    "text, meant",
    [
        *((text, "'mixed_float16' or 'float16'") for text in ("fp16", "half", "FP16", "f16", "torch.float16", "16-true")),
        *((text, "'mixed_bfloat16' or 'bfloat16'") for text in ("bf16", "bfloat", "BF16", "torch.bfloat16", "bf16-true")),
        *((text, "'mixed_float16' or 'mixed_bfloat16'") for text in ("amp", "mixed", "autocast", "mixed_precision")),
        *((text, "'mixed_float16'") for text in ("16-mixed", "mixed_fp16", "amp_half", "Mixed_Float16")),
        ("bf16-mixed", "'mixed_bfloat16'"), ("fp32", "'mixed_float32' or 'float32'"), ("double", "'float64'"),
        ("mixed_floaat16", "'mixed_float16' or 'mixed_bfloat16'"), ("mixed_bfloat61", "'mixed_float16' or 'mixed_bfloat16'"),
        ("mixed_float16,grad=fp16", "'grad=float16'"), ("mixed_float16,output=bf16", "'output=bfloat16'"),
        ("mixed_float16,batch_invarant", "'batch_invariant'"), ("float32,accumulate", "'accumulate_grad'"),
        ("mixed_float16,grads=float16", "'grad=float16'"), ("param_dtype=float32,compute=float16", "'param=float32'"),
    ],
)  # fmt: skip
def test_policy_that_is_unknown_says_what_may_be_meant(text, meant):
    with pytest.raises(ValueError, match="unknown policy") as caught:
        Policy.parse(text)
    assert str(caught.value).endswith(f"; did you mean {meant}?")


@pytest.mark.parametrize("key", [*policies._SHORT, *policies._ALLOWED, "grads", "params", "weight", "precision", ""])
def test_policy_suggests_what_it_takes(key):
    fields = {f"{short}={value}" for short, name in policies._SHORT.items() for value in policies._ALLOWED[name]}
    for value in ("rows", *itertools.chain(*policies._OTHER_WORDS.values())):
        with pytest.raises(ValueError, match="unknown policy") as caught:
            Policy.parse(f"mixed_float16,{key}={value}")
        _, _, meant = str(caught.value).partition("; did you mean ")
        assert set(re.findall("'(.*?)'", meant)) <= {*fields, *policies._NAMED, *policies._WORDS}, str(caught.value)


@pytest.mark.parametrize("text", ["O2", "", "x", "mixed_float16,=", "grad=mixed"])
def test_policy_that_is_unknown_does_not_guess_wildly(text):
    with pytest.raises(ValueError, match="unknown policy") as caught:
        Policy.parse(text)
    assert "expected one of float64" in str(caught.value)


def test_policy_of_a_dtype_says_what_may_be_meant():
    with pytest.raises(TypeError, match=r"got dtype torch.float16; did you mean 'mixed_float16' or 'float16'"):
        mpk.convert(torch.nn.Linear(2, 2), torch.float16)
    with pytest.raises(ValueError, match=r"param_dtype must be one of float64, .*, got 'float16'; names are for Policy.parse"):
        Policy("float16", "float16")


def test_policy_names_two_that_may_be_meant_at_most():
    """Three are as near."""
    with pytest.raises(ValueError, match=r"; did you mean 'mixed_float16' or 'mixed_bfloat16'\?$"):
        Policy.parse("mixedfloat16")
