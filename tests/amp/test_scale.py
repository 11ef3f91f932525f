# SPDX-License-Identifier: Apache-2.0
"""GradScaler's scale: torch's sequences, bounds and hysteresis, what may be scaled, and what makes no scaler."""

import math

import numpy as np
import pytest
import torch

import mpkernels as mpk
from tests.amp.scaling import give_grads, iteration
from tests.optimizers import parameters

# ----- the scale ----------------------------------------------------------------------

PATTERNS = ("." * 30, "x" * 30, "..x" * 10, "x....." * 5, "xx..x." * 5)


@pytest.mark.filterwarnings("ignore:the last 20 steps")
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    "options", [{}, {"growth_interval": 3}, {"init_scale": 8.0, "growth_factor": 1.5, "backoff_factor": 0.375}]
)
def test_scaler_sequence_is_that_of_torch(pattern, options):
    ours, theirs = mpk.GradScaler(**options), torch.amp.GradScaler("cpu", **options)
    for scaler, make in ((ours, mpk.optim.SGD), (theirs, torch.optim.SGD)):
        scaler.scales, scaler.params = [], parameters(torch.float32)
        scaler.optimizer = make(scaler.params, lr=0.1)
    for event in pattern:
        for scaler in (ours, theirs):
            iteration(scaler.params, scaler.optimizer, scaler, math.inf if event == "x" else None)
            scaler.scales.append((scaler.get_scale(), scaler._get_growth_tracker()))
    assert ours.scales == theirs.scales


def test_scaler_default_sequence_grows_after_2000_steps():
    scaler, params = mpk.GradScaler(), parameters(torch.float32)
    optimizer = mpk.optim.SGD(params, lr=0.0)
    give_grads(params, scaler)
    scaler.load_state_dict(scaler.state_dict() | {"_growth_tracker": 1990})
    for i in range(10):
        assert scaler.get_scale() == 2.0**16, i
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**17


@pytest.mark.filterwarnings("ignore:the last 20 steps")
def test_scaler_bounds_hold_in_a_storm_and_after_it():
    scaler, params = mpk.GradScaler(growth_interval=1, min_scale=2.0**-3, max_scale=2.0**20), parameters(torch.float32)
    optimizer = mpk.optim.SGD(params, lr=0.1)
    for _ in range(40):
        iteration(params, optimizer, scaler, math.nan)
    assert scaler.get_scale() == 2.0**-3
    assert (scaler.skipped_steps.item(), scaler.skipped_in_a_row.item(), scaler.last_step_skipped.item()) == (40, 40, True)
    before = params[0].detach().clone()
    for _ in range(40):
        iteration(params, optimizer, scaler)
    assert scaler.get_scale() == 2.0**20
    assert (scaler.skipped_steps.item(), scaler.skipped_in_a_row.item(), scaler.last_step_skipped.item()) == (40, 0, False)
    assert not torch.equal(before, params[0])


def test_scaler_default_bounds():
    scaler, params = mpk.GradScaler(init_scale=2.0**-124), parameters(torch.float32)
    optimizer = mpk.optim.SGD(params, lr=0.1)
    for _ in range(5):
        iteration(params, optimizer, scaler, math.inf)
    assert scaler.get_scale() == 2.0**-126
    scaler.update(2.0**127)
    scaler.set_growth_interval(1)
    for _ in range(3):
        give_grads(params, scaler, size=2.0**-127)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**127


def test_scaler_hysteresis():
    scaler, params = mpk.GradScaler(hysteresis=3, growth_interval=2, init_scale=64.0), parameters(torch.float32)
    optimizer = mpk.optim.SGD(params, lr=0.1)
    scales = []
    for event in "xx.xx..xxx":
        iteration(params, optimizer, scaler, math.inf if event == "x" else None)
        scales.append(scaler.get_scale())
    # Two overflows pass, the third and fourth back off; two good steps grow and refill; again the third backs off.
    assert scales == [64, 64, 64, 32, 16, 16, 32, 32, 32, 16]


def test_scaler_growth_step_is_unscaled_with_the_scale_of_its_gradients():
    scaler, params = mpk.GradScaler(growth_interval=1, init_scale=4.0), parameters(torch.float32)
    optimizer = mpk.optim.SGD(params, lr=1.0)
    start = params[0].detach().clone()
    for t in range(1, 5):
        iteration(params, optimizer, scaler)
        assert scaler.get_scale() == 4.0 * 2**t
    expected = start
    for _ in range(4):
        expected = expected - 1.0
    assert torch.equal(params[0], expected)


def test_scaler_update_with_a_new_scale():
    scaler = mpk.GradScaler()
    scaler.scale(torch.zeros(()))
    scaler.update(8.0)
    assert scaler.get_scale() == 8
    scaler.update(torch.tensor(32.0))
    assert scaler.get_scale() == 32
    scaler.update(64)
    assert scaler.get_scale() == 64
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="new_scale must be between"):
            scaler.update(bad)
    with pytest.raises(AssertionError, match="1-element"):
        scaler.update(torch.ones(2))
    assert scaler.get_scale() == 64


@pytest.mark.parametrize("new_scale", [8.0, torch.tensor(8.0)], ids=str)
def test_scaler_update_with_a_new_scale_counts(new_scale):
    """Of the last step no more than whether it was taken; scale, growth and hysteresis are left to what set the scale."""
    params, scaler = parameters(torch.float32), mpk.GradScaler(hysteresis=2)
    optimizer = mpk.optim.SGD(params, lr=0.1)
    iteration(params, optimizer, scaler)
    for poison, skipped in ((math.inf, 1), (math.inf, 2), (None, 0)):
        give_grads(params, scaler, poison=poison)
        scaler.step(optimizer)
        scaler.update(new_scale)
        assert scaler.skipped_in_a_row == skipped
        assert scaler.state_dict() == {
            **torch.amp.GradScaler("cpu", init_scale=8.0).state_dict(),
            "_growth_tracker": 1,
            "hysteresis_tracker": 2,
            "skipped": [2 if skipped == 0 else skipped, skipped],
        }


# ----- scale() ----------------------------------------------------------------------


@pytest.mark.parametrize("scale", [2.0**20, 8.0, 2.0**-10])
@pytest.mark.parametrize(
    "wrap", [lambda t: t, lambda t: [t], lambda t: (torch.zeros(()), t), lambda t: [[torch.zeros(())], (t,)]]
)
def test_scale_refuses_float16(wrap, scale):
    """Whatever the scale is, for the same reason: it is the gradient of the loss, and changes."""
    scaler = mpk.GradScaler(init_scale=scale)
    message = rf"^loss is float16: .* the scale itself \({scale:.9g} at first\), .* compute the loss in float32"
    with pytest.raises(ValueError, match=message):
        scaler.scale(wrap(torch.ones((), dtype=torch.float16)))
    assert scaler._scale is None, "nothing may have happened"
    disabled = mpk.GradScaler(enabled=False)
    assert disabled.scale(wrap(torch.ones((), dtype=torch.float16))) is not None


def test_scale_refuses_float16_from_a_generator():
    losses = mpk.GradScaler().scale(torch.ones((), dtype=dtype) for dtype in (torch.float32, torch.float16))
    assert next(losses) == 2.0**16
    with pytest.raises(ValueError, match="loss is float16"):
        next(losses)


def test_scale_values_and_containers():
    scaler = mpk.GradScaler(init_scale=4.0)
    assert scaler.scale(torch.ones((), dtype=torch.bfloat16)).item() == 4
    result = scaler.scale([torch.ones(2), (torch.ones(()), torch.ones((), dtype=torch.float64))])
    assert [type(result), type(result[1])] == [list, tuple]
    assert [result[0].tolist(), result[1][0].item(), result[1][1].item()] == [[4, 4], 4, 4]
    with pytest.raises(ValueError, match="outputs must be a Tensor or an iterable"):
        scaler.scale(1.0)


def test_scale_is_placed_where_the_first_loss_is():
    scaler = mpk.GradScaler()
    scaler.scale(torch.ones((), device="meta"))
    assert scaler._scale.device.type == scaler._growth_tracker.device.type == "meta"
    scaler = mpk.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    assert scaler._scale.device.type == scaler.skipped_steps.device.type == "cpu"


# ----- construction ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        *(({"init_scale": v}, f"init_scale .*got {v}") for v in (0.0, -1.0, math.nan, math.inf)),
        *(({"min_scale": v}, f"min_scale .*got {v}") for v in (0.0, -1.0, math.nan, math.inf, 1e-300)),
        *(({"max_scale": v}, f"max_scale .*got {v}") for v in (0.0, -1.0, math.nan, math.inf)),
        *(({"growth_factor": v}, f"growth_factor .*got {v}") for v in (1.0, 0.5, math.nan, math.inf)),
        *(({"backoff_factor": v}, f"backoff_factor .*got {v}") for v in (0.0, 1.0, -0.5, math.nan)),
        *(({"growth_interval": v}, f"growth_interval .*got {v}") for v in (0, -1, 2.5, True, 2**63)),
        *(({"hysteresis": v}, f"hysteresis .*got {v}") for v in (0, -1, 1.5, True, 2**31)),
        *(
            ({name: "8"}, f"{name} must be")
            for name in ("init_scale", "min_scale", "max_scale", "growth_factor", "growth_interval")
        ),
        ({"init_scale": 1.0, "min_scale": 2.0}, "init_scale must be between min_scale 2.0"),
        ({"init_scale": 8.0, "max_scale": 4.0}, "max_scale 4.0, got 8.0"),
    ],
)
def test_scaler_construction_errors(options, message):
    with pytest.raises(ValueError, match=message):
        mpk.GradScaler(**options)


def test_scaler_takes_numpy_numbers():
    scaler = mpk.GradScaler(
        init_scale=np.float32(8), growth_factor=np.float64(4), backoff_factor=np.float32(0.25), growth_interval=np.int64(2),
        min_scale=np.float64(0.5), max_scale=np.int64(512), hysteresis=np.int32(1),
    )  # fmt: skip
    params = parameters(torch.float32)
    optimizer, scales = mpk.optim.SGD(params, lr=0.0), []
    for event in "..x....":
        iteration(params, optimizer, scaler, math.inf if event == "x" else None)
        scales.append(scaler.get_scale())
    assert scales == [8, 32, 8, 8, 32, 32, 128]
    scaler.update(np.float32(16))
    assert scaler.get_scale() == 16
    scaler.set_growth_interval(np.int64(3))
    scaler.set_growth_factor(np.float32(2))
    scaler.set_backoff_factor(np.float32(0.5))
    assert (scaler.get_growth_interval(), scaler.get_growth_factor(), scaler.get_backoff_factor()) == (3, 2.0, 0.5)


@pytest.mark.parametrize(
    "name, bad", [("growth_interval", 0), ("growth_interval", 2**63), ("growth_factor", 1.0), ("backoff_factor", 1)]
)
def test_scaler_setters_refuse_what_construction_refuses(name, bad):
    scaler = mpk.GradScaler()
    with pytest.raises(ValueError, match=f"{name} must be"):
        getattr(scaler, f"set_{name}")(bad)
    assert getattr(scaler, f"get_{name}")() == getattr(mpk.GradScaler(), f"get_{name}")()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_scaler_on_an_absent_device():
    with pytest.raises(RuntimeError, match="GradScaler: device cuda is not there"):
        mpk.GradScaler("cuda")
    assert not mpk.GradScaler("cuda", enabled=False).is_enabled()
