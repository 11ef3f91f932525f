# SPDX-License-Identifier: Apache-2.0
"""sgd_: one pass over memory that unscales, clips, updates the masters and writes the 16-bit copies.

    factor = min(1, max_norm / (grad_norm + 1e-6)) / grad_scale
    g = grad * factor  (-g with maximize)                   g = g + weight_decay * w
    b = g at a tensor's first step, else momentum * b + (1 - dampening) * g           (with momentum)
    d = g + momentum * b with nesterov, else b              (g without momentum)
    w = w - lr * d                                          copy = round(w)

Shapes and dtypes: lists of equal length, i for i of the same shape, on one device
    | tensor           | dtype                                                                                    |
    | masters          | fp32 or fp64: what the update is applied to; the parameter itself under `mixed_*`          |
    | grads            | fp16, bf16, fp32, fp64, not wider than the master; read, never written                   |
    | momentum_buffers | the master's or bf16; the list is empty without momentum                                 |
    | copies           | fp16, bf16, fp32: the master rounded once; a tensor of size 0 where none is wanted         |
    | steps            | 0-d fp32, as torch's: steps taken so far, advanced by the op, up to 2^24; 0 means "first step"        |
    | lr               | 0-d fp32 or fp64, on the CPU (read at the call) or on the device (read by the kernel)      |
    | grad_scale, found_inf, grad_norm | 0-d fp32, fp32, fp64 on the device, or None                               |
    Any layout, any size, 0 included; what is written shares no memory, with itself, with the rest or with what is read.

Numerics
    Arithmetic in the master's dtype; the factor in fp64. A copy equals its master rounded once.
    `found_inf` not 0 (NaN included), or a `grad_scale` that is not positive and finite: not a byte of any list or of
    `steps` changes, a first step stays a first step. Bounds: numerics 8 to 10 in tests/bounds.py.
    `eager` on a GPU, which cannot know of a skip, writes the copies of a skipped step too: they are their masters rounded
    as before. Where only some of its tensors take their first step it takes their buffers for zeros, as new ones are.
    A buffer in bf16 is widened, used unrounded, and rounded once at its store, to nearest even; a momentum above 0.99 would
    stall. Bytes per parameter with 16-bit gradients and copies: 18 instead of 22, the check included.
Raises
    RuntimeError for lists of unequal length and for shapes, dtypes, devices or layouts other than these, before anything is
    written.
Source: torch.optim.SGD.
"""

from mpkernels.ops.common.multi_tensor import check_update
from mpkernels.runtime.op import Implementation, Op


def _check(
    masters, grads, momentum_buffers, copies, steps, lr, momentum, dampening, weight_decay, nesterov, maximize,
    grad_scale=None, found_inf=None, grad_norm=None, max_norm=None,
) -> None:  # fmt: skip
    if (momentum != 0) != bool(momentum_buffers):
        raise RuntimeError("sgd_: momentum_buffers and a momentum other than 0 go together")
    states = {"momentum_buffers": momentum_buffers}
    check_update("sgd_", masters, grads, states, copies, steps, lr, grad_scale, found_inf, grad_norm, max_norm)


op = Op(
    "sgd_(Tensor(a!)[] masters, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor(c!)[] copies, Tensor(d!)[] steps, "
    "Tensor lr, float momentum, float dampening, float weight_decay, bool nesterov, bool maximize, "
    "Tensor? grad_scale=None, Tensor? found_inf=None, Tensor? grad_norm=None, float? max_norm=None) -> ()",
    __name__,
    (
        Implementation("native", ("cpu", "cuda"), module="impl_native"),
        Implementation("eager", ("cpu", "cuda"), module="impl_eager"),
        Implementation("triton", ("cuda", "cpu"), module="impl_triton"),
    ),
    check=_check,
    fake=lambda *_, **__: None,
    key=lambda masters, *_, **__: (masters[0].device, masters[0].dtype),
    mutated=lambda masters, grads, momentum_buffers, copies, steps, *_, **__: ([*masters, *momentum_buffers, *copies, *steps]),
)

sgd_ = op
