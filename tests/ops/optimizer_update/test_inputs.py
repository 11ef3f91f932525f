# SPDX-License-Identifier: Apache-2.0
"""What the updates take: layouts, sizes, versions; and what they refuse, before anything is written."""

import math

import pytest
import torch

from tests import steps
from tests.ops.optimizer_update.rules import RULES
from tests.steps import counts, raw, scalar, step_counts


def test_update_strided(rule, device):
    """Whatever lies between the elements, the result is that of contiguous tensors, and the rest of memory stays."""
    shape, generator = (9, 13), torch.Generator().manual_seed(0)
    masters = steps.layouts(shape, torch.float32, device, generator)
    grads = list(steps.layouts(shape, torch.float16, device, generator).values())
    grads += [grads[0][:1, :1].expand(shape)]
    others = list(steps.layouts(shape, torch.float32, device, generator).values())
    for k, master in enumerate(masters.values()):
        for j, grad in enumerate(grads):
            args = rule.arguments([master], [grad], weight_decay=0.1, **rule.busy)
            *states, copy = (
                others[(k + j + s) % len(others)].clone(memory_format=torch.preserve_format)
                for s in range(len(rule.states) + 1)
            )
            args |= {name: [state.square_()] for name, state in zip(rule.states, states, strict=True)}
            args |= dict(copies=[copy.half()], steps=step_counts(1, device, 1))
            lists = [name for name, value in args.items() if isinstance(value, list) and name != "steps"]
            plain = args | {n: [t.clone(memory_format=torch.contiguous_format) for t in args[n]] for n in lists}
            plain["steps"] = [step.clone() for step in args["steps"]]
            rule.call(**args)
            rule.call(**plain)
            assert raw(rule.state(args)) == raw(rule.state(plain)), (list(masters)[k], j)


def test_update_writes_only_its_elements(rule, device):
    """Views into larger storages: what lies around them keeps its bytes."""
    storages = [torch.full((12, 12), math.nan, device=device) for _ in range(2 + len(rule.states))]
    views = [s[1:9, 2:7].t() if i % 2 else s[2:7, 1:9] for i, s in enumerate(storages)]
    for view in views:
        view.fill_(0.5)
    copies = torch.full((12, 12), math.nan, device=device, dtype=torch.float16)
    args = rule.arguments([views[0]], [views[1]], (torch.float16,), **rule.busy)
    args |= {name: [view] for name, view in zip(rule.states, views[2:], strict=True)} | dict(copies=[copies[3:8, 3:11]])
    args["copies"][0].zero_()
    outside = [s.isnan() for s in (*storages, copies)]
    rule.call(**args)
    assert all(torch.equal(s.isnan(), mask) for s, mask in zip((*storages, copies), outside, strict=True))
    steps.check_copies(args["copies"], args["masters"])


def test_update_empty(rule, device):
    empty = torch.empty(0, device=device)
    rule.call(**(args := rule.arguments([empty], [empty.half()])))
    assert steps.taken(args["steps"]) == [1]
    shapes = [(0,), (), (1,), (2, 0, 3), (1, 1, 1), (0,)]
    masters = [torch.ones(s, device=device) for s in shapes]
    args = rule.arguments(masters, [torch.ones(s, device=device).half() for s in shapes], **rule.busy)
    rule.call(**args)
    assert steps.taken(args["steps"]) == [1] * len(shapes)
    one = rule.arguments([torch.ones(1, device=device)], [torch.ones(1, device=device)], **rule.busy)
    rule.call(**one)
    assert masters[1].item() == masters[2].item() == masters[4].item() == one["masters"][0].item() != 1


def test_update_opcheck(rule, device):
    for given, options in ((("grad_scale", "found_inf"), rule.busy), ((), {})):
        args = rule.mixed(device, **options) | dict.fromkeys(given, scalar(0.0, device))
        order = [a.name for a in rule.call.default._schema.arguments if a.name in args and a.name not in given]
        torch.library.opcheck(rule.call.default, tuple(args[n] for n in order), {n: args[n] for n in given})


def test_update_bumps_versions(rule, device):
    args = rule.mixed(device, **rule.busy)
    before = [t._version for t in rule.state(args)]
    rule.call(**args)
    assert all(t._version > v for t, v in zip(rule.state(args), before, strict=True))
    assert all(g._version == 0 for g in args["grads"])


def test_update_makes_stale_saved_tensors_an_error(rule, device):
    steps.check_makes_saved_tensors_stale(rule.call, rule.arguments, device)


ones = torch.ones
OF_ALL = [
    (dict(masters=[]), "masters is empty|expected 0"),
    (dict(masters=[ones(3).half(), ones(2).half()]), r"masters\[0\] must be float32, float64, got torch.float16"),
    (dict(masters=[ones(3), ones(2, device="meta")]), r"masters\[1\] is on meta"),
    (dict(grads=[ones(3)]), "grads has 1 tensors, expected 2"),
    (dict(grads=[ones(3), ones(3)]), r"grads\[1\] has shape \(3,\), expected \(2,\)"),
    (dict(grads=[ones(3), ones(2).double()]), r"grads\[1\] is torch.float64, wider than torch.float32"),
    (dict(grads=[ones(3).to_sparse(), ones(2)]), r"grads\[0\] must be a dense strided tensor"),
    (dict(grads=[ones(3), ones(2).int()]), r"grads\[1\] must be float16"),
    (dict(copies=[ones(3).half()]), "copies has 1 tensors"),
    (dict(masters=[ones(3), ones(1).expand(2)]), r"masters\[1\] overlaps itself \(strides \(0,\)\)"),
    (dict(copies=[ones(3).half(), ones(1).half().expand(2)]), r"copies\[1\] overlaps itself"),
    (dict(copies=[ones(3).half(), ones(1).half()]), r"copies\[1\] has shape"),
    (dict(copies=[ones(3).half(), ones(2).int()]), r"copies\[1\] must be"),
    (dict(steps=step_counts(1)), "steps has 1 tensors, expected 2"),
    (dict(steps=[scalar(0.0), counts(1)[0]]), r"steps\[1\] must be \(\) torch.float32 on cpu, got \(\) torch.int64"),
    (dict(steps=[torch.zeros(1), scalar(0.0)]), r"steps\[0\] must be \(\) torch.float32 on cpu, got \(1,\)"),
    (dict(steps=[scalar(0.0), torch.zeros((), device="meta")]), r"steps\[1\] must be .* on cpu, got .* on meta"),
    (dict(lr=ones(1)), "lr must be a 0-d float32 or float64 tensor"),
    (dict(lr=ones((), dtype=torch.int64)), "lr must be"),
    (dict(lr=ones((), device="meta")), "lr must be on the CPU"),
    (dict(grad_scale=ones(1)), "grad_scale must be"),
    (dict(grad_scale=scalar(1.0, dtype=torch.float64)), "grad_scale must be"),
    (dict(found_inf=ones(2)), "found_inf must be"),
    (dict(found_inf=scalar(1.0, dtype=torch.float16)), "found_inf must be"),
    (dict(grad_norm=scalar(1.0), max_norm=1.0), "grad_norm must be"),
    (dict(grad_norm=scalar(1.0, dtype=torch.float64)), "grad_norm and max_norm go together"),
    (dict(max_norm=1.0), "grad_norm and max_norm go together"),
]
OF_STATES = [
    ([ones(3)], "{name} has 1 tensors"),
    ([ones(3), ones(2).double()], r"{name}\[1\] is torch.float64, expected torch.float32"),
    ([ones(3).half(), ones(2)], r"{name}\[0\] must be float32, float64, bfloat16"),
    ([ones(1).expand(3), ones(2)], r"{name}\[0\] overlaps itself"),
]
OF_ONE = {
    "adamw": [(dict(exp_avgs=[]), "must not be empty"), (dict(exp_avg_sqs=[]), "exp_avgs and exp_avg_sqs must not be empty")],
    "sgd": [
        (dict(momentum=0.0), "momentum_buffers and a momentum other than 0 go together"),
        (dict(momentum_buffers=[]), "momentum_buffers and a momentum other than 0 go together"),
    ],
    "lion": [(dict(exp_avgs=[]), "exp_avgs must not be empty")],
}


@pytest.mark.parametrize("change, message", OF_ALL)
def test_update_raises(rule, change, message):
    raises(rule, change, message)


@pytest.mark.parametrize("name, change, message", [(name, *case) for name, cases in OF_ONE.items() for case in cases])
def test_update_of_one_rule_raises(name, change, message):
    raises(RULES[name], change, message)


@pytest.mark.parametrize("tensors, message", OF_STATES)
def test_update_of_wrong_states_raises(rule, tensors, message):
    for name in rule.states:
        raises(rule, {name: tensors}, message.format(name=name))


def raises(rule, change, message):
    args = rule.arguments([ones(3), ones(2)], [ones(3), ones(2).half()], **rule.busy)
    steps.check_raises_unchanged(rule.call, args, change, message)
