# SPDX-License-Identifier: Apache-2.0
"""Policy: in which dtypes a layer stores, computes, returns and differentiates."""

import contextlib
import contextvars
import difflib
import re
from collections.abc import Iterator
from dataclasses import Field, dataclass, fields
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
_NAMED = {  # name: (param, compute)
    "float64": ("float64", "float64"),
    "float32": ("float32", "float32"),
    "mixed_float32": ("float64", "float32"),
    "mixed_float16": ("float32", "float16"),
    "mixed_bfloat16": ("float32", "bfloat16"),
    "float16": ("float16", "float16"),
    "bfloat16": ("bfloat16", "bfloat16"),
}
# For type checkers: the names, and what mostly follows them. Other texts are for Policy.parse.
PolicyName = Literal[
    "float64", "float32", "mixed_float32", "mixed_float16", "mixed_bfloat16", "float16", "bfloat16",
    "float64,batch_invariant", "float32,batch_invariant", "mixed_float32,batch_invariant", "mixed_float16,batch_invariant",
    "mixed_bfloat16,batch_invariant", "float16,batch_invariant", "bfloat16,batch_invariant",
    "float32,accumulate_grad", "mixed_float16,accumulate_grad", "mixed_bfloat16,accumulate_grad",
    "mixed_float32,grad=float32", "mixed_float16,grad=float16", "mixed_bfloat16,grad=bfloat16",
]  # fmt: skip
_OTHER_WORDS = {
    "float16": ("fp16", "half", "f16", "16"),
    "bfloat16": ("bf16", "bfloat"),
    "float32": ("fp32", "float", "single", "f32", "32"),
    "float64": ("fp64", "double", "f64", "64"),
}
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
    gradient, autograd adds. Not for threads that run backward at once.
    Raises ValueError for a dtype that is not floating point with 16 bits or more, a `compute_dtype` wider than
    `param_dtype`, a `grad_dtype` narrower than `compute_dtype` and `accumulate_grad` of gradients that are not fp32.
    """

    param_dtype: torch.dtype
    compute_dtype: torch.dtype
    output_dtype: torch.dtype | None = None
    grad_dtype: torch.dtype | None = None
    batch_invariant: bool = False
    accumulate_grad: bool = False

    def __post_init__(self) -> None:
        for name in _WORDS:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for field in _dtype_fields(self):
            value = getattr(self, field.name)
            if value not in _DTYPES.values() and not (value is None and field.default is None):
                hint = "; names are for Policy.parse" if isinstance(value, str) else ""
                raise ValueError(f"{field.name} must be one of {', '.join(_DTYPES)}, got {value!r}{hint}")
        if self.compute_dtype.itemsize > self.param_dtype.itemsize:
            raise ValueError(
                f"compute_dtype {self.compute_dtype} is wider than param_dtype {self.param_dtype}: store in it too"
            )
        if self.compute_dtype != self.param_dtype and self.compute_dtype.itemsize == self.param_dtype.itemsize:
            raise ValueError(f"compute_dtype {self.compute_dtype} cannot hold param_dtype {self.param_dtype}: store in float32")
        if self.grad_dtype is not None and not _holds(self.grad_dtype, self.compute_dtype):
            raise ValueError(
                f"grad_dtype {self.grad_dtype} is narrower than compute_dtype {self.compute_dtype}: leave it out "
                "for the parameter's"
            )
        if self.accumulate_grad and (grad_dtype := self.grad_dtype or self.param_dtype) != torch.float32:
            raise ValueError(f"accumulate_grad needs gradients in float32, got {grad_dtype}")

    @property
    def mixed(self) -> bool:
        """Whether storage and arithmetic differ."""
        return self.param_dtype != self.compute_dtype

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
        values: dict[str, Any] = {}
        for part in text.split(","):
            key, equals, value = part.strip().partition("=")
            if not equals and key in _NAMED and not values:
                param, compute = _NAMED[key]
                values = {"param_dtype": _DTYPES[param], "compute_dtype": _DTYPES[compute]}
            elif not equals and key in _WORDS:
                values[key] = True
            elif equals and f"{key}_dtype" in {f.name for f in fields(cls)} and value in _DTYPES:
                values[f"{key}_dtype"] = _DTYPES[value]
            else:
                raise ValueError(
                    f"unknown policy {text!r}: expected one of {', '.join(_NAMED)}, or "
                    f"param=, compute=, output=, grad= with one of {', '.join(_DTYPES)}; {' and '.join(_WORDS)} may follow"
                    f"{_did_you_mean(part.strip())}"
                )
        if missing := {"param_dtype", "compute_dtype"} - values.keys():
            raise ValueError(
                f"policy {text!r} lacks {', '.join(sorted(missing))}: begin with a name, as 'mixed_float16,grad=float16', or "
                "give both param= and compute="
            )
        return cls(**values)

    def __str__(self) -> str:
        short = {f.name: str(getattr(self, f.name)).removeprefix("torch.") for f in _dtype_fields(self)}
        pair = (short.pop("param_dtype"), short.pop("compute_dtype"))
        names = [name for name, dtypes in _NAMED.items() if dtypes == pair]
        head = names if names else [f"param={pair[0]}", f"compute={pair[1]}"]
        head += [f"{k.removesuffix('_dtype')}={v}" for k, v in short.items() if v != "None"]
        return ",".join(head + [word for word in _WORDS if getattr(self, word)])

    def to_fsdp(self) -> "MixedPrecisionPolicy":
        """The same for `torch.distributed.fsdp.fully_shard(mp_policy=...)`; gradients are reduced in `grad_dtype`, else fp32.

        Raises ValueError for a `grad_dtype` narrower than the parameter's: FSDP2 refuses that mixture.
        """
        from torch.distributed.fsdp import MixedPrecisionPolicy

        if self.grad_dtype not in (None, self.param_dtype) and self.grad_dtype.itemsize < self.param_dtype.itemsize:
            raise ValueError(f"FSDP2 refuses gradients of {self.grad_dtype} for {self.param_dtype}: use grad_dtype=None")
        return MixedPrecisionPolicy(
            param_dtype=self.compute_dtype,
            reduce_dtype=self.grad_dtype or torch.promote_types(torch.float32, self.compute_dtype),
            output_dtype=self.output_dtype,
        )


def _did_you_mean(part: str) -> str:
    """What a part of a policy may have been meant as: another library's word for a dtype, or a slip of the pen."""
    key, equals, value = part.lower().removeprefix("torch.").partition("=")
    words = re.split("[^a-z0-9]+", value if equals else key)
    found = [name for word in words for name, others in _OTHER_WORDS.items() if word in (name, *others)]
    if found and equals:
        meant = [f"{key}={found[0]}"]
    elif found:
        meant = [name for name in (f"mixed_{found[0]}", found[0]) if name in _NAMED]
        meant = meant[: 1 if _MIXED & set(words) or found[0] == "float64" else 2]
    elif not equals and _MIXED & set(words):
        meant = ["mixed_float16", "mixed_bfloat16"]
    else:
        fields = [f"{name}={dtype}" for name in ("param", "compute", "output", "grad") for dtype in _DTYPES]
        meant = difflib.get_close_matches(part.lower(), fields if equals else [*_NAMED, *_WORDS], 2, 0.75)
    return f"; did you mean {' or '.join(map(repr, meant))}?" if meant else ""


def _dtype_fields(policy: Policy) -> list[Field[Any]]:
    return [field for field in fields(policy) if field.name.endswith("_dtype")]


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
