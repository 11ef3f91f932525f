# SPDX-License-Identifier: Apache-2.0
"""The update of an optimizer: one pass over memory that unscales, clips, updates the masters and writes the 16-bit copies.

    factor = min(1, max_norm / (grad_norm + 1e-6)) / grad_scale
    g = grad * factor  (-g with maximize)
    w, states = the rule's formula, of g, w and states          copy = round(w)

An op for each rule: `adamw_`, `sgd_`, `lion_`; the formulas are in rules/.

Shapes and dtypes: lists of equal length, i for i of the same shape, on one device
    | tensor           | dtype                                                                                    |
    | masters          | fp32 or fp64: what the update is applied to; the parameter itself under `mixed_*`          |
    | grads            | fp16, bf16, fp32, fp64, not wider than the master; read, never written                   |
    | the rule's states | the master's or bf16; lists that the options make superfluous are empty                 |
    | copies           | fp16, bf16, fp32: the master rounded once; a tensor of size 0 where none is wanted         |
    | steps            | 0-d fp32, as torch's: steps taken so far, advanced by the op, up to 2^24                             |
    | lr               | 0-d fp32 or fp64, on the CPU (read at the call) or on the device (read by the kernel)      |
    | grad_scale, found_inf, grad_norm | 0-d fp32, fp32, fp64 on the device, or None                               |
    Any layout, any size, 0 included; what is written shares no memory, with itself, with the rest or with what is read.

Numerics
    Arithmetic in the master's dtype; what the elements of a tensor share (factor, powers of beta) in fp64. A copy equals its
    master rounded once.
    `found_inf` not 0 (NaN included), or a `grad_scale` that is not positive and finite: not a byte of any list or of
    `steps` changes. Bounds: numerics 8 to 10 in tests/bounds.py.
    `eager` on a GPU, which cannot know of a skip, writes the copies of a skipped step too: they are their masters rounded
    as before.
    States in bf16 are widened, used unrounded, and rounded once at their store, to nearest even, or where the rule says so up
    or down with the probability that makes it right on average. The choice is a function of step count and place in memory:
    the same bits in every run and from every checkpoint, others for a tensor sharded or laid out otherwise.
Raises
    RuntimeError for lists of unequal length and for shapes, dtypes, devices or layouts other than these, before anything is
    written.
"""

from mpkernels.ops.common.multi_tensor import IMPLEMENTATIONS
from mpkernels.ops.optimizer_update.checks import check_update
from mpkernels.ops.optimizer_update.rules import Rule, adamw, lion, sgd
from mpkernels.runtime.op import Op


def _op(rule: Rule) -> Op:
    return Op(rule.schema, __name__, IMPLEMENTATIONS, call=rule.call, check=check_update, function="update")


adamw_, sgd_, lion_ = map(_op, (adamw.RULE, sgd.RULE, lion.RULE))
