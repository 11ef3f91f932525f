# SPDX-License-Identifier: Apache-2.0
"""adamw_: one pass over memory that unscales, clips, updates the masters and writes the 16-bit copies (AdamW and Adam).

    factor = min(1, max_norm / (grad_norm + 1e-6)) / grad_scale
    g = grad * factor  (-g with maximize)                   t = step + 1
    w = w * (1 - lr * weight_decay)  (decoupled, AdamW)     or  g = g + weight_decay * w  (Adam)
    m = m + (1 - beta1) * (g - m)                           v = beta2 * v + (1 - beta2) * g * g
    w = w - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)          copy = round(w)
    With max_exp_avg_sqs (amsgrad) their running maximum stands for v in the last line.

Shapes and dtypes: lists of equal length, i for i of the same shape, on one device
    | tensor           | dtype                                                                                    |
    | masters          | fp32 or fp64: what the update is applied to; the parameter itself under `mixed_*`          |
    | grads            | fp16, bf16, fp32, fp64, not wider than the master; read, never written                   |
    | exp_avgs, exp_avg_sqs, max_exp_avg_sqs | the master's or bf16; the last list is empty without amsgrad        |
    | copies           | fp16, bf16, fp32: the master rounded once; a tensor of size 0 where none is wanted         |
    | steps            | 0-d fp32, as torch's: steps taken so far, advanced by the op, up to 2^24                             |
    | lr               | 0-d fp32 or fp64, on the CPU (read at the call) or on the device (read by the kernel)      |
    | grad_scale, found_inf, grad_norm | 0-d fp32, fp32, fp64 on the device, or None                               |
    Any layout, any size, 0 included; what is written shares no memory, with itself, with the rest or with what is read.

Numerics
    Arithmetic in the master's dtype; scalars (factor, powers of beta) in fp64. A copy equals its master rounded once.
    `found_inf` not 0 (NaN included), or a `grad_scale` that is not positive and finite: not a byte of any list or of
    `steps` changes. Bounds: numerics 8 to 10 in tests/bounds.py.
    `eager` on a GPU, which cannot know of a skip, writes the copies of a skipped step too: they are their masters rounded
    as before.
    Moments in bf16 are widened, used unrounded, and rounded once at their store: exp_avgs and max_exp_avg_sqs to nearest
    even, exp_avg_sqs up or down with the probability that makes it right on average. To nearest, a v that changes by
    less than 2^-9 of itself a step (beta2 = 0.999) would only ever rise. The choice is a function of step count and place in
    memory: the same bits in every run and from every checkpoint, others for a tensor sharded or laid out otherwise. After
    1,000 steps v was within 16 % (mean error 0.1 %) and the way of the weights within 0.7 % of fp64's; beta1 above 0.99
    is not for bf16, whose exp_avg would stall in the same way. Bytes per parameter with 16-bit gradients and copies:
    22 instead of 30, the check included.
Raises
    RuntimeError for lists of unequal length and for shapes, dtypes, devices or layouts other than these, before anything is
    written.
Source: torch.optim.AdamW, torch.optim.Adam (Loshchilov and Hutter, "Decoupled Weight Decay Regularization").
"""

from mpkernels.ops.common.multi_tensor import check_update
from mpkernels.runtime.op import Implementation, Op


def _check(
    masters, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, copies, steps, lr, beta1, beta2, eps, weight_decay,
    decoupled, maximize, grad_scale=None, found_inf=None, grad_norm=None, max_norm=None,
) -> None:  # fmt: skip
    states = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "max_exp_avg_sqs": max_exp_avg_sqs}
    if not exp_avgs or not exp_avg_sqs:
        raise RuntimeError("adamw_: exp_avgs and exp_avg_sqs must not be empty")
    check_update("adamw_", masters, grads, states, copies, steps, lr, grad_scale, found_inf, grad_norm, max_norm)


op = Op(
    "adamw_(Tensor(a!)[] masters, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] copies, Tensor(f!)[] steps, Tensor lr, float beta1, float beta2, float eps, "
    "float weight_decay, bool decoupled, bool maximize, Tensor? grad_scale=None, Tensor? found_inf=None, "
    "Tensor? grad_norm=None, float? max_norm=None) -> ()",
    __name__,
    (
        Implementation("native", ("cpu", "cuda"), module="impl_native"),
        Implementation("eager", ("cpu", "cuda"), module="impl_eager"),
        Implementation("triton", ("cuda", "cpu"), module="impl_triton"),
    ),
    check=_check,
    fake=lambda *_, **__: None,
    key=lambda masters, *_, **__: (masters[0].device, masters[0].dtype),
    mutated=lambda masters, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, copies, steps, *_, **__: (
        [*masters, *exp_avgs, *exp_avg_sqs, *max_exp_avg_sqs, *copies, *steps]
    ),
)

adamw_ = op
