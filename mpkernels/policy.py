# SPDX-License-Identifier: Apache-2.0
"""Policy: in which dtypes a layer stores, computes, returns and differentiates."""

import contextlib
import contextvars
import difflib
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy

_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_FLOAT8 = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
_NAMED = {  # name: its fields
    "float64": "param=float64,compute=float64",
    "float32": "param=float32,compute=float32",
    "mixed_float32": "param=float64,compute=float32",
    "mixed_float16": "param=float32,compute=float16",
    "mixed_bfloat16": "param=float32,compute=bfloat16",
    "mixed_float8": "param=float32,compute=float8_e4m3fn",
    "mixed_float8_hybrid": "param=float32,compute=float8_e4m3fn,scaling=tensor,dgrad=float8_e5m2",
    "float16": "param=float16,compute=float16",
    "bfloat16": "param=bfloat16,compute=bfloat16",
}
# For type checkers: the names, and what mostly follows them. Other texts are for Policy.parse.
PolicyName = Literal[
    "float64", "float32", "mixed_float32", "mixed_float16", "mixed_bfloat16", "mixed_float8", "mixed_float8_hybrid",
    "float16", "bfloat16",
    "float64,batch_invariant", "float32,batch_invariant", "mixed_float32,batch_invariant", "mixed_float16,batch_invariant",
    "mixed_bfloat16,batch_invariant", "mixed_float8,batch_invariant", "float16,batch_invariant", "bfloat16,batch_invariant",
    "float32,accumulate_grad", "mixed_float16,accumulate_grad", "mixed_bfloat16,accumulate_grad",
    "mixed_float8,accumulate_grad", "mixed_float16,saved=float8_e4m3fn", "mixed_bfloat16,saved=float8_e4m3fn",
    "mixed_float32,grad=float32", "mixed_float16,grad=float16", "mixed_bfloat16,grad=bfloat16",
]  # fmt: skip
_ALLOWED: dict[str, dict[str, Any]] = {  # field: what it may be, as texts have it
    "param_dtype": _DTYPES,
    "compute_dtype": _DTYPES | _FLOAT8,
    "output_dtype": _DTYPES,
    "grad_dtype": _DTYPES,
    "scaling": {"row": "row", "tensor": "tensor"},
    "dgrad_dtype": _FLOAT8,
    "wgrad_dtype": {"bfloat16": torch.bfloat16, "float32": torch.float32},
    "saved_dtype": {"float8_e4m3fn": torch.float8_e4m3fn},
}
_SHORT = {field.removesuffix("_dtype"): field for field in _ALLOWED}
_OF_EIGHT_BITS = ("scaling", "dgrad_dtype", "wgrad_dtype")
_OTHER_WORDS = {
    "float16": ("fp16", "half", "f16", "16"),
    "bfloat16": ("bf16", "bfloat"),
    "float32": ("fp32", "float", "single", "f32", "32"),
    "float64": ("fp64", "double", "f64", "64"),
    "float8_e4m3fn": ("fp8", "float8", "f8", "e4m3", "e4m3fn", "8"),
    "float8_e5m2": ("e5m2", "bf8", "hybrid"),
}
_NAMES_OF_EIGHT_BITS = {"float8_e4m3fn": ["mixed_float8"], "float8_e5m2": ["mixed_float8_hybrid"]}
_MIXED = {"mixed", "amp", "autocast"}
_WORDS = ("batch_invariant", "accumulate_grad")  # of a policy's text; True where they stand in it


@dataclass(frozen=True)
class Policy:
    """In which dtypes a layer works. Frozen; `Policy.parse(str(policy)) == policy`.

    param_dtype: the Parameters. compute_dtype: the operands of the GEMM (the accumulator is fp32, fp64 for fp64).
    output_dtype: the result; None means the input's dtype under `mixed_*` (autocast's inside `torch.autocast`), else
    the parameter's. grad_dtype: gradients of weight and bias; None means the parameter's dtype. batch_invariant: a row of
    the result has the same bits whatever the other rows are and however many; slower, for training and sampling to agree.
    accumulate_grad: where `weight.grad` is there, backward adds to it as it computes, in fp32, and autograd gets nothing to
    add: half of the traffic and no temporary, for gradient accumulation. Where a hook or a watch, say, looks at the weight's
    gradient, autograd adds. Not for threads that run backward at once. saved_dtype: float8_e4m3fn keeps x for backward in
    eight bits with a scale per row, and so the preactivation of an activation other than ReLU; of a ReLU a bit. None: as
    computed.

    A compute_dtype of 8 bits, float8_e4m3fn or float8_e5m2, is for parameters in float32, and is that of x and weight. Then
    scaling: "row" (None) for a scale per row of each operand, "tensor" for one; dgrad_dtype: the gradient in the product
    that gives grad_x, None for compute_dtype; wgrad_dtype: both operands of the product that gives grad_weight, bfloat16
    (None) or float32. What is kept of x is the operand itself.
    Raises ValueError for a dtype that a field cannot have, a `compute_dtype` wider than `param_dtype`, a `grad_dtype`
    narrower than `compute_dtype` (for 8 bits: than `wgrad_dtype`), `accumulate_grad` of gradients that are not fp32, fields
    of 8 bits without such a `compute_dtype`, `saved_dtype` without one of 16 bits, and `batch_invariant` with one scale for
    a tensor.
    """

    param_dtype: torch.dtype
    compute_dtype: torch.dtype
    output_dtype: torch.dtype | None = None
    grad_dtype: torch.dtype | None = None
    batch_invariant: bool = False
    accumulate_grad: bool = False
    scaling: Literal["row", "tensor"] | None = None
    dgrad_dtype: torch.dtype | None = None
    wgrad_dtype: torch.dtype | None = None
    saved_dtype: torch.dtype | None = None
    float8: bool = field(init=False, repr=False, compare=False, default=False)  # whether operands have 8 bits, and scales

    def __post_init__(self) -> None:
        for name in _WORDS:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name, allowed in _ALLOWED.items():
            value = getattr(self, name)
            if value not in allowed.values() and not (value is None and name not in ("param_dtype", "compute_dtype")):
                hint = "; names are for Policy.parse" if isinstance(value, str) and allowed is not _ALLOWED["scaling"] else ""
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}{hint}")
        object.__setattr__(self, "float8", self.compute_dtype in _FLOAT8.values())
        if self.float8:
            self._settle_float8()
        elif given := [name for name in _OF_EIGHT_BITS if getattr(self, name) is not None]:
            raise ValueError(f"{given[0]} is for a compute_dtype of {' or '.join(_FLOAT8)}, got {self.compute_dtype}")
        if self.saved_dtype is not None and self.compute_dtype.itemsize != 2:
            raise ValueError(f"saved_dtype is for a compute_dtype of float16 or bfloat16, got {self.compute_dtype}")
        if self.compute_dtype.itemsize > self.param_dtype.itemsize:
            raise ValueError(
                f"compute_dtype {self.compute_dtype} is wider than param_dtype {self.param_dtype}: store in it too"
            )
        if self.compute_dtype != self.param_dtype and self.compute_dtype.itemsize == self.param_dtype.itemsize:
            raise ValueError(f"compute_dtype {self.compute_dtype} cannot hold param_dtype {self.param_dtype}: store in float32")
        narrowest = "wgrad_dtype" if self.float8 else "compute_dtype"
        if self.grad_dtype is not None and not _holds(self.grad_dtype, getattr(self, narrowest)):
            raise ValueError(
                f"grad_dtype {self.grad_dtype} is narrower than {narrowest} {getattr(self, narrowest)}: leave it out "
                "for the parameter's"
            )
        if self.accumulate_grad and (grad_dtype := self.grad_dtype or self.param_dtype) != torch.float32:
            raise ValueError(f"accumulate_grad needs gradients in float32, got {grad_dtype}")

    def _settle_float8(self) -> None:
        """Put in what None stands for, and raise for what eight bits cannot have."""
        if self.param_dtype != torch.float32:
            raise ValueError(f"compute_dtype {self.compute_dtype} is for parameters in float32, got {self.param_dtype}")
        if self.output_dtype == torch.float64:
            raise ValueError(f"output_dtype float64 is more than {self.compute_dtype} can be summed in: use float32")
        defaults = {"scaling": "row", "dgrad_dtype": self.compute_dtype, "wgrad_dtype": torch.bfloat16}
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.batch_invariant and self.scaling == "tensor":
            raise ValueError("batch_invariant needs scaling='row': one scale for a tensor depends on all of its rows")

    @property
    def mixed(self) -> bool:
        """Whether storage and arithmetic differ."""
        return self.param_dtype != self.compute_dtype

    @property
    def range_dtype(self) -> torch.dtype:
        """The format whose range operands have: of 8 bits with scales, powers of two in fp32, it is that of bfloat16."""
        return torch.bfloat16 if self.float8 else self.compute_dtype

    @classmethod
    def parse(cls, text: "str | Policy") -> "Policy":
        """A policy from its name (`"mixed_float16"`) or its fields (`"param=float32,compute=float16,output=float32"`).

        A name may be followed by fields: `"mixed_float16,grad=float16,batch_invariant"`. Raises ValueError, naming what is
        allowed.
        """
        if isinstance(text, Policy):
            return text
        if not isinstance(text, str):
            hint = f" {text}{_did_you_mean(str(text))}" if isinstance(text, torch.dtype) else ""
            raise TypeError(f"policy must be a Policy or a string, got {type(text).__name__}{hint}")
        name, comma, rest = text.partition(",")
        named = _NAMED.get(name.strip())
        values: dict[str, Any] = {}
        for part in (text if named is None else named + comma + rest).split(","):
            key, equals, value = part.strip().partition("=")
            if not equals and key in _WORDS:
                values[key] = True
            elif equals and key in _SHORT and value in _ALLOWED[_SHORT[key]]:
                values[_SHORT[key]] = _ALLOWED[_SHORT[key]][value]
            else:
                raise ValueError(
                    f"unknown policy {text!r}: expected one of {', '.join(_NAMED)}, or "
                    f"param=, compute=, output=, grad= with one of {', '.join(_DTYPES)}; {' and '.join(_WORDS)} may follow; "
                    f"of compute={' or '.join(_FLOAT8)} scaling=, dgrad=, wgrad=; of 16 bits saved="
                    f"{_did_you_mean(part.strip())}"
                )
        if missing := {"param_dtype", "compute_dtype"} - values.keys():
            raise ValueError(
                f"policy {text!r} lacks {', '.join(sorted(missing))}: begin with a name, as 'mixed_float16,grad=float16', or "
                "give both param= and compute="
            )
        return cls(**values)

    def __str__(self) -> str:
        own, heads = _texts(self), _named_texts()
        fitting = [name for name, texts in heads.items() if all(own.get(key) == texts[key] for key in ("param", "compute"))]
        name = min(fitting, key=lambda name: len(own.items() - heads[name].items()), default=None)
        rest = [f"{key}={value}" for key, value in own.items() if name is None or heads[name].get(key) != value]
        return ",".join([name] * (name is not None) + rest + [word for word in _WORDS if getattr(self, word)])

    def to_fsdp(self) -> "MixedPrecisionPolicy":
        """The same for `torch.distributed.fsdp.fully_shard(mp_policy=...)`; gradients are reduced in `grad_dtype`, else fp32.

        With a compute_dtype of 8 bits weights are gathered as they are stored, and each layer quantizes its own.
        Raises ValueError for a `grad_dtype` narrower than the parameter's: FSDP2 refuses that mixture.
        """
        from torch.distributed.fsdp import MixedPrecisionPolicy

        if self.grad_dtype not in (None, self.param_dtype) and self.grad_dtype.itemsize < self.param_dtype.itemsize:
            raise ValueError(f"FSDP2 refuses gradients of {self.grad_dtype} for {self.param_dtype}: use grad_dtype=None")
        gathered = self.param_dtype if self.float8 else self.compute_dtype
        return MixedPrecisionPolicy(
            param_dtype=None if self.float8 else gathered,
            reduce_dtype=self.grad_dtype or torch.promote_types(torch.float32, gathered),
            output_dtype=self.output_dtype,
        )


@functools.cache
def _named_texts() -> dict[str, dict[str, str]]:
    return {name: _texts(Policy.parse(fields)) for name, fields in _NAMED.items()}


def _texts(policy: Policy) -> dict[str, str]:
    """The fields that are not None, as texts have them."""
    values = ((short, getattr(policy, name)) for short, name in _SHORT.items())
    return {short: str(value).removeprefix("torch.") for short, value in values if value is not None}


def dtype_name(dtype: torch.dtype) -> str:
    """As policies have it: "float16"."""
    return str(dtype).removeprefix("torch.")


def _did_you_mean(part: str) -> str:
    """What a part of a policy may have been meant as: another library's word for a dtype, or a slip of the pen."""
    key, equals, value = part.lower().removeprefix("torch.").partition("=")
    words = re.split("[^a-z0-9]+", value if equals else key)
    found, meant = [name for word in words for name, others in _OTHER_WORDS.items() if word in (name, *others)], []
    if found and equals:
        if near := difflib.get_close_matches(key.removesuffix("_dtype"), _SHORT, 1):
            short, allowed = near[0], _ALLOWED[_SHORT[near[0]]]
            if found[-1] in allowed:
                meant = [f"{short}={found[-1]}"]
            else:  # parameters, output and gradients never have 8 bits: then operands are meant
                meant = [f"compute={found[-1]}"] if allowed is _DTYPES else [f"{short}={name}" for name in allowed]
    elif found and found[-1] in _FLOAT8:
        meant = _NAMES_OF_EIGHT_BITS[found[-1]]
    elif found:
        meant = [name for name in (f"mixed_{found[0]}", found[0]) if name in _NAMED]
        meant = meant[: 1 if _MIXED & set(words) or found[0] == "float64" else 2]
    elif not equals and _MIXED & set(words):
        meant = ["mixed_float16", "mixed_bfloat16"]
    else:
        fields = [f"{short}={value}" for short, name in _SHORT.items() for value in _ALLOWED[name]]
        meant = difflib.get_close_matches(part.lower(), fields if equals else [*_NAMED, *_WORDS], 2, 0.75)
    return f"; did you mean {' or '.join(map(repr, meant))}?" if meant else ""


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    return torch.promote_types(wide, narrow) == wide


_default: contextvars.ContextVar[Policy | None] = contextvars.ContextVar("mpkernels_default_policy", default=None)


def get_default_policy() -> Policy | None:
    """The policy of layers that are made without one; None: they behave as `nn.Linear`."""
    return _default.get()


def set_default_policy(policy: PolicyName | Policy | None) -> None:
    """Set the policy of layers made from now on without one, in this thread (its `contextvars` context): a new one has none."""
    _default.set(None if policy is None else Policy.parse(policy))


@contextlib.contextmanager
def default_policy(policy: PolicyName | Policy | None) -> Iterator[None]:
    """The same inside a `with` block."""
    token = _default.set(None if policy is None else Policy.parse(policy))
    try:
        yield
    finally:
        _default.reset(token)
