# SPDX-License-Identifier: Apache-2.0
"""Write docs/formats.md: the number formats of training, from torch.finfo, and which policy uses which where.

python docs/make_formats.py
"""

from pathlib import Path

import torch

from mpkernels import Policy

PAGE = Path(__file__).with_name("formats.md")
FORMATS = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip
POLICIES = (
    "float64", "float32", "mixed_float32", "mixed_float16", "mixed_bfloat16", "mixed_float8", "mixed_float8_hybrid", "float16",
    "bfloat16",
)  # fmt: skip

INTRODUCTION = """\
<!-- Written by docs/make_formats.py: change that, not this. -->
# Number formats

The numbers come from `torch.finfo`. *Unit roundoff* u is the largest relative error of one rounding to nearest, half of
`finfo.eps`. Below the least normal number precision falls bit by bit until, below half the least subnormal, a number
becomes 0. The significand counts the hidden bit.
"""

NOTES = """\
fp16 and bf16 are the same size: fp16 has 8 times the precision, bf16 the range of fp32. float8 is for operands of products
that have a scale, under `mixed_float8` and `mixed_float8_hybrid`, and for what is kept for backward. e4m3fn has no infinity;
e5m2 has one.
"""

EIGHT_BITS = """\
`q, scale = mpkernels.functional.quantize(x, torch.float8_e4m3fn, axis=-1)` writes a tensor in eight bits with a scale per
row, and `dequantize(q, scale)` is `q * scale` in fp32.

- A scale is the least power of two that brings the largest magnitude of what it scales to {e4m3_max} (e4m3fn) or {e5m2_max}
  (e5m2) or below. Dividing by it is exact, so x is rounded once, to nearest even: q * scale is off by at most {e4m3_u} (e4m3fn)
  or {e5m2_u} (e5m2) of x, and by half a least subnormal times the scale where that is more.
- e4m3fn is for weights and activations, e5m2 for gradients, which have more range and need less precision.
- Every number of either format is one of fp16, and e5m2 is fp16 without its last eight bits. A product of any two is exact in
  fp32.

What becomes of a number that is too large:

| | above the largest | inf | NaN |
| --- | --- | --- | --- |
| `x.to(torch.float8_e4m3fn)`, torch 2.13 | {e4m3_max} | {e4m3_max} | NaN |
| `x.to(torch.float8_e5m2)`, torch 2.13 | inf | inf | NaN |
| `quantize`, either format | cannot be: the scale is that of this very tensor | scale and q are NaN | scale and q are NaN |

An inf that becomes {e4m3_max} hides an overflow from the loss scaler, which then neither skips the step nor backs off. Here all
that shares the scale is NaN, and so is what a layer computes from it: the scaler, or `skip_nonfinite=True` of an optimizer,
skips that step and its report names the parameter. Without either the NaN goes into the weights, as it does in 16 bits.

What a layer does with eight bits, all of it from the same ops:

| | `mixed_float8` | `mixed_float8_hybrid` |
| --- | --- | --- |
| `out = x @ weight.T` | e4m3fn, a scale for each row of x and of weight | e4m3fn, one scale for x, one for weight |
| `grad_x = grad_z @ weight` | e4m3fn, a scale for each row of grad_z, each column of weight | grad_z in e5m2, one scale each |
| `grad_weight = grad_z.T @ x` | bf16, of x as it was kept | the same |
| kept for backward | x in eight bits; a bit per output of a ReLU, 16 of another activation | the same |

- Scales are made from the very tensor, in each call. Products are summed unscaled in fp32; both scales multiply the sum, x's
  first, the bias is added, the activation applied, and the output rounded once. So a row of x whose largest number is above
  2^128 / (448 * in_features) may overflow, however small the weights: 7.4e32 with 1,024 in_features.
- A row of the result depends on its own row of x alone with scales by row, which `batch_invariant` therefore takes, and not
  with one scale for a tensor.
- The weight is quantized in each call, along K and again along N in backward: no copy of it is kept from step to step.
- `mixed_float16,saved=float8_e4m3fn` computes in 16 bits and keeps x, and the preactivation of what is no ReLU, in eight bits
  with scales by row. Its output is that of `mixed_float16` bit for bit; `grad_weight` is made of x as it was kept. fp16 ends at
  65504, which eight bits round up to 65536: it is decoded to 65504 again.
"""

POLICY_NOTES = """\
"Sums" is the accumulator of a matrix product: fp32, or fp64 for fp64, whatever the operands are. The optimizer's moments
have the master's dtype, or bf16 with `state_dtype=torch.bfloat16`. A 16-bit number that is written, be it an output, a
parameter or a compute copy, was rounded once.

- `mixed_*` may be combined with `grad=float16` (`Policy.parse("mixed_float16,grad=float16")`): half the gradient memory.
- The 16-bit copy of the weights that `mixed_float16` and `mixed_bfloat16` multiply with is written by the optimizer in
  the pass that updates the parameter; it is not in the state_dict.
- The loss scaler is for fp16 alone: {fp16_tiny} and smaller gradients are 0 in fp16, whereas bf16 reaches {bf16_tiny}.
"""


def number(value: float) -> str:
    return f"{value:.5g}"


def least_subnormal(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def significand_bits(dtype: torch.dtype) -> int:
    """With the hidden bit: eps is 2 to the power of 1 - bits."""
    return 1 - int(torch.tensor(torch.finfo(dtype).eps, dtype=torch.float64).log2())


def name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def table(header: str, rows: list[tuple]) -> str:
    """A Markdown table; the columns of `header` are separated by bars."""
    columns = [column.strip() for column in header.split("|")]
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def formats_table() -> str:
    rows = []
    for dtype in FORMATS:
        info, bits = torch.finfo(dtype), significand_bits(dtype)
        rows.append((
            f"`{name(dtype)}`", info.bits, bits, info.bits - bits, number(info.max), number(info.smallest_normal),
            number(least_subnormal(dtype)), f"2^-{bits} = {number(info.eps / 2)}",
        ))  # fmt: skip
    return table(
        "format | bits | significand bits | exponent bits | largest | least normal | least subnormal | unit roundoff", rows
    )


def policy_table() -> str:
    rows = []
    for policy_name in POLICIES:
        policy = Policy.parse(policy_name)
        param, compute = policy.param_dtype, policy.compute_dtype
        operands = name(compute) if policy.dgrad_dtype in (None, compute) else f"{name(compute)}, {name(policy.dgrad_dtype)}"
        wide = torch.promote_types(param, torch.float32)
        holder = "the parameter" if wide == param else f"{name(wide)}, kept by the optimizer"
        output = "that of the input" if policy.mixed else name(param)
        sums = torch.promote_types(policy.wgrad_dtype or compute, torch.float32)
        rows.append((
            f"`{policy_name}`", name(param), operands, name(sums), output, name(policy.grad_dtype or param), holder,
        ))  # fmt: skip
    return table("policy | parameters | operands | sums | output | weight gradients | master", rows)


def misstatements() -> str:
    """Common statements and what is true, the figures from torch.finfo."""
    fp16, bf16, fp32, fp64 = (torch.finfo(d) for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64))
    whole = {d: 2 ** significand_bits(d) for d in (torch.float16, torch.bfloat16, torch.float32)}
    pairs = (
        ("fp32 represents 10^38 numbers.",
         f"It has fewer than 2^32, about 4.3e9. {number(fp32.max)} is the largest of them, not how many there are."),
        ("fp32 is exact to 7 digits, so whole numbers are safe.",
         f"Up to 2^24 = {whole[torch.float32]:,} they are; {whole[torch.float32] + 1:,} is not an fp32 number. "
         f"For fp16 the limit is {whole[torch.float16]:,}, for bf16 {whole[torch.bfloat16]}."),
        ("`eps` is the smallest number of a format.",
         f"It is the gap after 1: {number(fp16.eps)} in fp16, whose least number above 0 is "
         f"{number(least_subnormal(torch.float16))}. A rounding errs by at most half of `eps`, relatively."),
        ("`finfo.tiny` is the smallest positive number.",
         f"It is the least normal one, {number(fp16.tiny)} in fp16; subnormals go on, down to "
         f"{number(least_subnormal(torch.float16))}, with less and less precision."),
        ("autocast computes in 16 bits and returns to float64 (or to fp32) afterwards.",
         "Under autocast a linear layer returns 16 bits, and so does what follows until an operation that autocast runs in "
         "fp32. It leaves fp64 tensors alone and converts none to fp64. Parameters and their gradients stay fp32."),
        ("autocast halves the memory of the weights.",
         "The fp32 weights stay, and 16-bit casts of them come on top in every forward. What shrinks is what is saved "
         "for backward."),
        ("`model.half()` is mixed precision.",
         f"It is fp16 alone: an update of less than {number(fp16.eps / 4)} of a weight is always lost. The `float16` policy "
         "keeps an fp32 master in the optimizer for this."),
        ("Loss scaling prevents overflow.",
         "It prevents underflow: it lifts small gradients into the range of fp16. Overflow is its cost, which is why the "
         "scale backs off and the step is skipped."),
        ("bf16 is more precise than fp16 because its range is larger.",
         f"Its unit roundoff is {number(bf16.eps / 2)}, 8 times that of fp16, {number(fp16.eps / 2)}. It needs no loss "
         "scaling, and rounds 8 times as coarsely."),
        (f"fp16 overflows above {number(fp16.max)}, exactly.",
         "65504 is the largest finite number. What lies below 65520 rounds to it; 65520 and above become infinite."),
        ("Tensor cores sum fp16 products in fp16.",
         "They can sum in fp32, as everything here does. Libraries may still round partial sums of a split product to "
         "16 bits (`allow_fp16_reduced_precision_reduction`); here no partial sum is."),
        ("Casting fp64 to fp16 rounds once.",
         "torch goes through fp32 and rounds twice: 1 + 2^-11 + 2^-40 becomes 1 that way, and rounded once it is "
         "1 + 2^-10. The ops here round once."),
        ("fp64 has twice the precision of fp32.",
         f"It has {significand_bits(torch.float64)} bits instead of {significand_bits(torch.float32)}: its unit roundoff is "
         f"{number(fp64.eps / 2)}, about 5e8 times smaller than {number(fp32.eps / 2)}."),
        ("TF32 is a 32-bit format.",
         "It is fp32 cut to 11 bits of significand for the operands of a product, the precision of fp16 with the range "
         "of fp32. The policy `float32` means fp32."),
    )  # fmt: skip
    return table("often said | true", [(f'"{said}"', true) for said, true in pairs])


def eight_bits() -> str:
    e4m3, e5m2 = map(torch.finfo, (torch.float8_e4m3fn, torch.float8_e5m2))
    return EIGHT_BITS.format(
        e4m3_max=number(e4m3.max), e5m2_max=number(e5m2.max), e4m3_u=number(e4m3.eps / 2), e5m2_u=number(e5m2.eps / 2)
    )


def page() -> str:
    """The whole of docs/formats.md."""
    notes = POLICY_NOTES.format(
        fp16_tiny=number(least_subnormal(torch.float16) / 2), bf16_tiny=number(least_subnormal(torch.bfloat16))
    )
    return "\n".join((
        INTRODUCTION, formats_table(), NOTES,
        "## Eight bits\n", eight_bits(),
        "## Which policy uses which where\n", policy_table(), notes,
        "## Put right\n", misstatements(),
    ))  # fmt: skip


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE}")
