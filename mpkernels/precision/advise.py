# SPDX-License-Identifier: Apache-2.0
"""advise: which format each linear of a model should have, by what it computes in a step of training on real data."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from mpkernels.nn.convert.linears import linears, uncompiled, why_not
from mpkernels.policy import Policy, PolicyName
from mpkernels.precision import choose
from mpkernels.precision.advice import Advice, AdviceRow
from mpkernels.precision.capture import Call, capture, check_is_module, check_is_step, is_positive, several
from mpkernels.precision.layer import Layer, PolicyRow, Ranges, cost_of
from mpkernels.precision.tables import size_text
from mpkernels.precision.verdict import problem
from mpkernels.runtime import tuned_table

POLICIES = ("float32", "mixed_bfloat16", "mixed_float16")
LOSS_BUDGET = 1e-3  # of the loss


def advise(
    model: nn.Module, step: Callable[[nn.Module], torch.Tensor], *, policies: Iterable[PolicyName | Policy] = POLICIES,
    loss_scale: float = 65536.0, loss_budget: float | None = None, memory: float | None = None,
) -> Advice:  # fmt: skip
    """Run one step of training, measure each linear under each policy, and choose one for each of them.

    step: runs one forward on real data and returns the loss, a scalar with a graph, not scaled. policies: names or Policies,
    of parameters as the model has them or of 16 bits; of operands in 8 bits too, by the error that is left with their scales.
    Gradients are judged times `loss_scale`.
    Each call of a linear is analysed in fp64 when its gradient arrives: the range of its tensors in the formats of each
    policy, the error of the policy's own arithmetic, and the first order of what that does to the loss. See `PolicyRow`. On a
    GPU errors are those of at most 256 rows of a call, which stand for all, and ranges are seen in the model's dtype.
    Chosen is, for each linear, what stays in range (nothing overflows, less than 1 % of a gradient's norm becomes 0), so that
    the noise of all together is at most `loss_budget` (None: a thousandth of the loss, or what the widest policies add), and
    their bytes at most `memory`. Of what is left, the least time where `mpk.tune` has measured all of them, else the fewest
    bytes that products read and write; then the least noise, then the least error of out. The last decides for a frozen linear
    before all that are trained: no gradient comes to it, so its noise is unknown and is not counted. Linears with the same
    weight get the same policy. One that no policy keeps in range gets the widest, and `why` says so; one that was not called
    gets none.
    The model stays what it was: parameters, gradients, buffers, modes, hooks, random numbers.
    Raises TypeError for what is no module or function, and for a loss that is no tensor; ValueError for a loss that is no
    scalar, a model without linears, an unknown policy, one whose parameters are wider than the model's, a model that is stored
    in 16 bits, with which there is nothing wider to compare, and a budget that nothing meets (it says what comes nearest);
    RuntimeError for a model on meta, a loss without a graph, and a step that calls an optimizer, before that writes.
    """
    check_is_module("advise", model)
    check_is_step("advise", step)
    model = uncompiled(model)
    candidates = [Policy.parse(p) for p in several("advise", "policies", policies)]
    reasons = {name: why_not(model, name, linear) for name, linear in linears(model)}
    convertible = {name for name, reason in reasons.items() if reason is None}
    _check_comparable({model.get_submodule(name).weight.dtype for name in convertible}, candidates)
    for name, value in (("loss_scale", loss_scale), ("loss_budget", loss_budget), ("memory", memory)):
        if value is not None and not is_positive(value):
            raise ValueError(f"advise: {name} must be a positive number, got {value!r}")
    modules = _with_parameters(model)
    layers = {name: Layer(m, candidates, loss_scale) for name, m in modules.items() if name in convertible}
    others = {name: Ranges(candidates, loss_scale) for name in modules if name not in layers}

    def analyse(call: Call) -> None:
        if call.name in layers:
            layers[call.name].add(call)
        else:
            for tensor, values in (("x", call.x), ("out", call.out), ("grad_out", call.grad_out)):
                others[call.name].add(tensor, values)
                others[call.name].add_scaled(tensor, values)

    loss = capture(model, step, modules, analyse)
    tuned = tuned_table.entries(next(iter(layers.values())).weight.device)
    found = {name: layer.by_policy(tuned) for name, layer in layers.items() if layer.rows}
    budget = _loss_budget(loss, loss_budget, found)
    chosen = _choose(modules, found, candidates, loss_scale, budget, math.inf if memory is None else memory)
    rows = []
    for name in modules:
        note, by_policy = "", found.get(name, {})
        if name in others:
            note = reasons.get(name) or f"{type(modules[name]).__name__} is not converted"
            by_policy = {str(p): PolicyRow(p, others[name].of(p)) for p in candidates}
        elif name not in found:
            note = "was not called in this step: nothing was measured"
        rows.append(AdviceRow(name, chosen.get(name), by_policy, note))
    return Advice(tuple(rows), loss, budget, loss_scale)


def _check_comparable(stored: set[torch.dtype], policies: Sequence[Policy]) -> None:
    """stored: the dtypes of the linears that can be converted."""
    if not stored:
        raise ValueError("advise: the model has no linear that can be converted")
    if narrow := [d for d in stored if d.itemsize < 4]:
        raise ValueError(f"advise: the model is stored in {narrow[0]}, with nothing wider to compare: give it in float32")
    for policy in policies:
        if policy.param_dtype.itemsize > min(d.itemsize for d in stored):
            raise ValueError(f"advise: {policy} has wider parameters than the model, which is stored in {stored.pop()}")


def _with_parameters(model: nn.Module) -> dict[str, nn.Module]:
    """The modules with parameters of their own, but for those that an nn.MultiheadAttention does not call."""
    inside = {name for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)}
    return {
        name: module for name, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False)) and name.rpartition(".")[0] not in inside
    }  # fmt: skip


def _loss_budget(loss: float, given: float | None, found: dict[str, dict[str, PolicyRow]]) -> float:
    """By default not below what the most exact choice makes of itself; no limit where the loss is no number."""
    if given is not None:
        return float(given)
    least = sum(min((r.noise for r in rows.values() if _is_number(r.noise)), default=0.0) for rows in found.values())
    return max(LOSS_BUDGET * abs(loss), least) if math.isfinite(loss) else math.inf


def _is_number(noise: float | None) -> bool:
    return noise is not None and math.isfinite(noise)


def _choose(
    modules: dict[str, nn.Module], found: dict[str, dict[str, PolicyRow]], policies: Sequence[Policy], loss_scale: float,
    budget: float, memory: float,
) -> dict[str, str]:  # fmt: skip
    """The policy of each linear, by name; ValueError where no choice meets the budgets."""
    tied: dict[int, list[str]] = {}
    for name in found:
        tied.setdefault(id(modules[name].weight), []).append(name)
    groups, priced_by = list(tied.values()), cost_of(row for rows in found.values() for row in rows.values())
    tried, choices = [], []
    for family in _families(policies):
        allowed = [_allowed([found[name] for name in names], family, loss_scale) for names in groups]
        items = [[_option([found[name][p] for name in names], priced_by) for p in some] for names, some in zip(groups, allowed)]
        tried.append(items)
        picks = choose.choose(items, budget, memory)
        if picks is not None:
            cost = tuple(choose.total(items, picks, field) for field in ("cost", "noise"))
            choices.append((cost, {n: some[i] for names, some, i in zip(groups, allowed, picks) for n in names}))
    if not choices:
        raise ValueError(f"advise: {_nearest(tried, budget, memory)}")
    return min(choices, key=lambda choice: choice[0])[1]


def _families(policies: Sequence[Policy]) -> list[list[str]]:
    """Which of `policies` go together in one model: 16-bit parameters with wide ones, mixed ones without them."""
    narrow = sorted({p.param_dtype for p in policies if p.param_dtype.itemsize == 2}, key=str)
    families = [[str(p) for p in policies if p.param_dtype.itemsize > 2]]
    families += [
        [str(p) for p in policies if p.param_dtype == dtype or (p.param_dtype.itemsize > 2 and not p.mixed)] for dtype in narrow
    ]
    return [family for family in families if family]


def _allowed(group: list[dict[str, PolicyRow]], family: list[str], loss_scale: float) -> list[str]:
    """The policies that keep all linears of a group in range, the least error of out first; if none, the widest arithmetic."""
    if kept := [p for p in family if all(problem(rows[p], loss_scale) is None for rows in group)]:
        return sorted(kept, key=lambda p: sum(rows[p].error["out"] for rows in group))
    widths = {p: (torch.finfo(row.policy.range_dtype).max, row.policy.compute_dtype.itemsize) for p, row in group[0].items()}
    return [max(family, key=widths.get)]


def _option(rows: list[PolicyRow], priced_by: str) -> choose.Option:
    """Of linears with one weight; what has no finite noise was chosen for want of better, and is not counted."""
    noise = sum(row.noise for row in rows if _is_number(row.noise))
    return choose.Option(sum(getattr(row, priced_by) for row in rows), noise, sum(row.bytes for row in rows))


def _nearest(tried: list[list[list[choose.Option]]], budget: float, memory: float) -> str:
    """What comes nearest to budgets that nothing meets. tried: the options of each family."""
    noise = min(sum(min(option.noise for option in options) for options in items) for items in tried)
    size = min(sum(min(option.bytes for option in options) for options in items) for items in tried)
    if noise > budget:
        return f"no choice that stays in range adds less than {noise:.2g} to the loss, and loss_budget is {budget:.2g}"
    if size > memory:
        return f"no choice that stays in range needs less than {size_text(size)}, and memory is {size_text(memory)}"
    least = f"{noise:.2g} of a loss_budget of {budget:.2g}, and {size_text(size)} of {size_text(memory)}"
    return f"no choice that stays in range meets both budgets; each alone can be met: {least}"
