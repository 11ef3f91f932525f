# SPDX-License-Identifier: Apache-2.0
"""watch(adapt=): the layer that cannot do with its format gets the next, the same steps give the same changes on every rank."""

import io
import math

import pytest
import torch
from torch import distributed, nn

import mpkernels as mpk
from mpkernels.precision.adapt import LAG
from mpkernels.precision.taps import NOTHING, OUT
from mpkernels.runtime import compute_copy
from tests.precision.test_find_nonfinite import Scale
from tests.precision.test_watch import hooks_of
from tests.ranks import gathered, run_ranks

LADDER = ("mixed_float16", "mixed_bfloat16", "float32")
X = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
Y = X[:, :4].sin()


def model_with(before, after, policy):
    """Linears 0, 3 and 6; what `before` does to the input of 3, `after` undoes of its output."""
    torch.manual_seed(0)
    layers = [nn.Linear(8, 16), nn.Tanh(), before, nn.Linear(16, 16), after, nn.Tanh(), nn.Linear(16, 4)]
    return mpk.convert(nn.Sequential(*layers), policy)


class Run:
    """A model in training, watched or not."""

    def __init__(self, planted=(Scale, Scale), policy="mixed_float16", adapt=None, group=None, init_scale=2.0**16):
        self.model = model_with(planted[0](), planted[1](), policy)
        self.optimizer = mpk.optim.AdamW(self.model.named_parameters(), lr=0.01)
        self.scaler = mpk.GradScaler(init_scale=init_scale)
        self.watch = None
        if adapt is not None:
            self.watch = mpk.watch(self.model, self.optimizer, self.scaler, adapt=adapt, process_group=group)

    def step(self, x=X, y=Y):
        loss = (self.model(x).float() - y).square().mean()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return loss.item()

    def train(self, steps):
        return [self.step() for _ in range(steps)]

    @property
    def policies(self):
        return {name: str(m.policy) for name, m in self.model.named_modules() if isinstance(m, mpk.MPLinear)}

    @property
    def changes(self):
        return self.watch.report().changes

    def state(self):
        """Through a file, as a checkpoint is."""
        file = io.BytesIO()
        torch.save([part.state_dict() for part in (self.model, self.optimizer, self.scaler, self.watch)], file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    def load(self, state):
        for part, loaded in zip((self.model, self.optimizer, self.scaler, self.watch), state, strict=True):
            part.load_state_dict(loaded)


FORWARD = (lambda: Scale(1e5), lambda: Scale(1e-5))  # x of linear 3 leaves float16's range
BACKWARD = (Scale, lambda: Scale(backward=1e12))  # its gradient does, at every loss scale of 1 and more


# ----- what it is for ---------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:the last 20 steps were skipped")
@pytest.mark.parametrize("planted, raised", [(FORWARD, {"3"}), (BACKWARD, {"0", "3"})], ids=["forward", "backward"])
def test_adapt_reaches_the_loss_of_float32(planted, raised):
    alone, exact, adapted = Run(planted), Run(planted, "float32"), Run(planted, adapt=mpk.Adapt())
    losses = [run.train(150)[-1] for run in (alone, exact, adapted)]
    assert not losses[0] < 2 * losses[1]
    assert adapted.train(int(adapted.scaler.skipped_steps))[-1] < 1.1 * losses[1]
    assert {name for name, policy in adapted.policies.items() if policy != "mixed_float16"} == raised
    assert {c.layer for c in adapted.changes} == raised
    assert all((c.before, c.after) == ("mixed_float16", "mixed_bfloat16") for c in adapted.changes)
    assert adapted.scaler.get_scale() == 2.0**16


def test_adapt_changes_nothing_that_is_in_range():
    """Bit for bit what it is without; the scale that has to be found is no layer's fault."""
    plain, adapted = Run(init_scale=2.0**40), Run(adapt=mpk.Adapt(), init_scale=2.0**40)
    assert plain.train(40) == adapted.train(40)
    assert adapted.scaler.skipped_steps > 5
    assert adapted.changes == ()


def test_adapt_says_what_it_changed(caplog):
    run = Run(FORWARD, adapt=mpk.Adapt(raise_after=3, window=50))
    with caplog.at_level("INFO"):
        run.train(12)
    (change,) = run.changes
    assert change[:4] == (3 + LAG, "3", "mixed_float16", "mixed_bfloat16")
    assert change.why in ("out reaches inf, in 3 of the last 50 steps", "out has NaN, in 3 of the last 50 steps")
    assert f"step {3 + LAG}: 3 from mixed_float16 to mixed_bfloat16: {change.why}" in str(run.watch.report())
    assert [record.getMessage() for record in caplog.records] == [str(run.watch.report()).splitlines()[-1]]


def test_adapt_follows_after_a_fixed_number_of_steps():
    run = Run(adapt=mpk.Adapt(raise_after=1))
    for step in range(1, 12):
        run.step(X * (1e6 if step == 3 else 1))
    assert [(c.step, c.layer) for c in run.changes] == [(3 + LAG, "0")]


def test_adapt_by_an_optimizer_that_skips():
    """Without a scaler its steps are the steps, skipped ones too."""
    model = model_with(FORWARD[0](), FORWARD[1](), "mixed_float16")
    optimizer = mpk.optim.AdamW(model.parameters(), lr=0.01, skip_nonfinite=True)
    with mpk.watch(model, optimizer, adapt=mpk.Adapt()) as watch:
        for _ in range(2 + LAG + 1):
            loss = (model(X).float() - Y).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert [(c.step, c.layer) for c in watch.report().changes] == [(2 + LAG, "3")]
    assert loss.isfinite()


def test_adapt_is_a_change_of_the_policy_alone():
    """The parameters stay, and the optimizer; from the change on the bits are those of a model converted like that."""
    run = Run(FORWARD, adapt=mpk.Adapt())
    parameters = list(run.model.parameters())
    run.train(2 + LAG)
    other = Run(FORWARD, policy={"*": "mixed_float16", "3": "mixed_bfloat16"})
    for part, copied in ((run.model, other.model), (run.optimizer, other.optimizer), (run.scaler, other.scaler)):
        copied.load_state_dict(part.state_dict())
    assert run.policies == other.policies
    assert run.train(3) == other.train(3)
    assert all(a is b for a, b in zip(run.model.parameters(), parameters, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), other.model.parameters(), strict=True))
    assert {c.tensor.dtype for c in compute_copy.of_model(run.model)} == {torch.float16, torch.bfloat16}
    assert {c.tensor.dtype for c in compute_copy.of_model(run.model[3])} == {torch.bfloat16}


def test_adapt_drops_the_copy_that_float32_does_not_read():
    run = Run(FORWARD, adapt=mpk.Adapt(ladder=("mixed_float16", "float32")))
    run.train(4 + LAG)
    assert run.policies["3"] == "float32"
    assert not compute_copy.of_model(run.model[3])


@pytest.mark.parametrize("saved_at", [1, 4, 2 + LAG, 9, 30])
def test_adapt_replays_bit_for_bit(saved_at):
    """Whether decisions are still to come, or made."""
    adapt = mpk.Adapt(lower_after=15, margin_bits=0)
    run = Run(FORWARD, adapt=adapt)
    run.train(saved_at)
    state = run.state()
    expected = torch.tensor(run.train(20))
    again = Run(FORWARD, adapt=adapt)
    again.load(state)
    assert torch.equal(torch.tensor(again.train(20)).view(torch.int32), expected.view(torch.int32))
    assert again.changes == run.changes
    assert again.policies == run.policies
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), again.model.parameters(), strict=True))
    assert again.scaler.state_dict() == run.scaler.state_dict()


# ----- many ranks ---------------------------------------------------------------


def _train_on_ranks(rank):
    for ranks in ([[r] for r in range(4)], [[0, 1], [2, 3]], [[0, 1, 2, 3]]):
        groups = [distributed.new_group(each) for each in ranks]
        mine = next(i for i, each in enumerate(ranks) if rank in each)
        _train_on(groups[mine], ranks[mine], rank)
    if rank < 2:
        return
    with pytest.raises(ValueError, match="adapt on 4 ranks: give process_group="):
        Run(adapt=mpk.Adapt())


def _sum_in_order(group, bucket):
    """gloo's order of a sum of four depends on where in its bucket a gradient lies, which differs in the first step of DDP."""
    parts = [torch.empty_like(bucket.buffer()) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(parts, bucket.buffer(), group)
    done = torch.futures.Future()
    done.set_result(sum(parts) / len(parts))
    return done


def _train_on(group, ranks, rank):
    """The last rank alone is given what overflows, at steps 2 and 5; its gradients reach the others as DDP would have it."""
    x = X[16 * rank : 16 * rank + 16]

    def run_of(steps, state=None):
        run = Run(adapt=mpk.Adapt(raise_after=2), group=group)
        run.model = nn.parallel.DistributedDataParallel(run.model, process_group=group)
        run.model.register_comm_hook(group, _sum_in_order)
        if state is not None:
            run.load(state)
        for step in steps:
            run.step(x * (1e6 if rank == ranks[-1] and step in (2, 5) else 1), Y[16 * rank : 16 * rank + 16])
        return run

    run = run_of(range(8))
    state = run.state()
    assert run.changes == ()
    for _ in range(8, 14):
        run.step(x, Y[16 * rank : 16 * rank + 16])
    assert [(c.step, c.layer, c.after) for c in run.changes] == [(6 + LAG, "0", "mixed_bfloat16")]
    again = run_of(range(8, 14), state)
    assert again.changes == run.changes
    for mine, other in zip(run.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(mine, other)
    by_rank = gathered([p.detach() for p in run.model.parameters()])
    assert all(torch.equal(a, b) for r in ranks for a, b in zip(by_rank[r], by_rank[rank], strict=True))


def test_adapt_ranks_agree():
    run_ranks(4, _train_on_ranks)


def _other_layers(rank):
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(1 + rank)))
    with pytest.raises(ValueError, match="rank 1 of process_group has other linears than its rank 0"):
        mpk.watch(model, process_group=distributed.group.WORLD)
    assert not model[0]._forward_hooks


def _negative_nan(rank):
    """Of inf - inf on x86, as a compiled model hands it on: the bits of an integer below those of every finite magnitude."""
    watch = mpk.watch(nn.Linear(2, 2), process_group=distributed.group.WORLD)
    watch._table[1, OUT] = torch.tensor(-1, dtype=torch.int32).view(torch.float32) if rank == 1 else 35.0
    watch._end_step(None)
    assert watch._last[1, OUT].isnan()


def _two_ranks(rank):
    _other_layers(rank)
    _negative_nan(rank)


def test_watch_ranks_have_the_same_layers_and_lose_no_nan():
    run_ranks(2, _two_ranks)


# ----- the rule, by tables made by hand ---------------------------------------------------------------


def rows(out=(), grad_x=(), scale=1024.0, data=1.0, x=1.0):
    """A table of three layers, the given values of which are not 1."""
    table = [[data, scale, NOTHING, NOTHING, NOTHING], *([1.0, 1.0, NOTHING, x, x] for _ in range(3))]
    for column, values in enumerate((out, grad_x)):
        for row, value in dict(values).items():
            table[row][column] = value
    return table


def decide(run, tables, start=1):
    """The scales to go back to, from tables of one step after another."""
    adaptation = run.watch._adaptation
    return [adaptation.decide(step + LAG, step, table, [1, 2, 3]) for step, table in enumerate(tables, start)]


BAD = rows(out={2: math.inf, 3: math.nan}, grad_x={1: math.nan, 2: math.nan, 3: math.nan})
GOOD = rows()


def test_adapt_counts_in_a_window():
    run = Run(adapt=mpk.Adapt(raise_after=2, window=3))
    decide(run, [BAD, GOOD, GOOD, BAD, GOOD, BAD])
    (change,) = run.watch._adaptation.changes
    assert change == (6 + LAG, "3", "mixed_float16", "mixed_bfloat16", "out reaches inf, in 2 of the last 3 steps")
    assert run.policies == {"0": "mixed_float16", "3": "mixed_bfloat16", "6": "mixed_float16"}


def test_adapt_does_not_count_what_ran_before_the_change():
    """Steps up to the one that changed it were still in the format that was too small."""
    run = Run(adapt=mpk.Adapt(raise_after=1))
    decide(run, [BAD] * (1 + LAG))
    assert run.policies["3"] == "mixed_bfloat16"
    decide(run, [BAD], start=2 + LAG)
    assert run.policies["3"] == "float32"
    with pytest.warns(UserWarning, match=r"^3: out reaches inf, .*in float32, the last of the ladder") as warned:
        decide(run, [BAD] * 3, start=3 + 2 * LAG)
    assert [warning.filename for warning in warned] == [__file__]


def test_adapt_of_a_model_that_is_a_linear(caplog):
    model = mpk.convert(nn.Linear(8, 4), "mixed_float16")
    optimizer = mpk.optim.SGD(model.parameters(), lr=0.01, skip_nonfinite=True)
    with torch.no_grad():
        model.weight.fill_(math.inf)
    adapt = mpk.Adapt(raise_after=1, ladder=LADDER[:2])

    def train(steps):
        for _ in range(steps):
            model(X).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    with caplog.at_level("INFO"), mpk.watch(model, optimizer, adapt=adapt) as watch:
        with pytest.warns(UserWarning, match="^the model: out has NaN, "):
            train(2 * LAG + 2)
        state = watch.state_dict()
        state["adapt"]["layers"][""]["policy"] = "float32"
        with pytest.raises(ValueError, match="has the model in float32, which the ladder has not"):
            watch.load_state_dict(state)
    assert caplog.messages == [
        "step 5: the model from mixed_float16 to mixed_bfloat16: out has NaN, in 1 of the last 100 steps"
    ]


@pytest.mark.parametrize("scale, least, counts", [(2.0, 2.0**-126, False), (1.0, 2.0**-126, True), (2.0, 4.0, True)])
def test_adapt_in_backward_by_the_scale(scale, least, counts):
    run = Run(adapt=mpk.Adapt())
    run.watch._adaptation.least_scale = max(1.0, least)
    decide(run, [rows(grad_x={1: math.inf, 2: math.inf}, scale=scale)] * 2)
    assert run.policies["3"] == ("mixed_bfloat16" if counts else "mixed_float16")
    assert run.policies["0"] == "mixed_float16"


def test_adapt_takes_the_least_scale_of_the_scaler():
    model = model_with(Scale(), Scale(), "mixed_float16")
    optimizer = mpk.optim.AdamW(model.parameters())
    with mpk.watch(model, optimizer, mpk.GradScaler(min_scale=64.0), adapt=mpk.Adapt()) as watch:
        assert watch._adaptation.least_scale == 64.0
    optimizer = mpk.optim.AdamW(model.parameters(), skip_nonfinite=True)
    with mpk.watch(model, optimizer, adapt=mpk.Adapt()) as watch:
        assert watch._adaptation.least_scale == 1.0


def test_adapt_blames_no_layer_for_the_data():
    run = Run(adapt=mpk.Adapt(raise_after=1))
    decide(run, [rows(out={1: math.nan}, data=math.nan)])
    assert run.changes == ()


def test_adapt_restores_the_scale_where_a_layer_made_it_fall():
    fault = lambda scale: rows(out={2: math.inf}, scale=scale)
    run = Run(adapt=mpk.Adapt())
    tables = [fault(64.0), fault(32.0), fault(16.0), rows(scale=8.0), rows(scale=8.0)]
    assert decide(run, tables) == [None, None, None, 64.0, None]
    run = Run(adapt=mpk.Adapt())
    overflow = lambda scale: rows(grad_x={2: math.inf}, scale=scale)
    assert decide(run, [overflow(64.0), overflow(32.0), rows(scale=16.0)]) == [None] * 3


def test_adapt_goes_down_where_there_is_room():
    run = Run(adapt=mpk.Adapt(raise_after=1, lower_after=3, margin_bits=2))
    decide(run, [BAD])
    end, start = torch.finfo(torch.float16).max, 2 + LAG
    tight, fits = rows(out={2: end / 3}), rows(out={2: end / 4})
    decide(run, [fits, fits, tight, fits, fits, rows(x=end), BAD[:2] + GOOD[2:], fits, fits], start)
    assert run.policies["3"] == "mixed_bfloat16"
    assert run.watch._adaptation.layers[2].tap.reads_operands
    decide(run, [rows(out={2: NOTHING}), fits], start + 9)
    assert run.policies["3"] == "mixed_float16"
    assert run.watch._adaptation.changes[-1].why == "3 steps with 2 bits to spare"
    assert not run.watch._adaptation.layers[2].tap.reads_operands
    decide(run, [fits] * 9, start + 40)
    assert set(run.policies.values()) == {"mixed_float16"}


def test_adapt_does_not_go_below_where_it_began():
    run = Run(policy="mixed_bfloat16", adapt=mpk.Adapt(lower_after=1))
    decide(run, [GOOD] * 5)
    assert set(run.policies.values()) == {"mixed_bfloat16"}


def test_adapt_looks_at_operands_of_what_it_raised():
    """Whose out fits float16 while x does not: it stays."""
    run = Run(FORWARD, adapt=mpk.Adapt(lower_after=3))
    run.train(30)
    assert run.policies["3"] == "mixed_bfloat16"
    assert len(run.changes) == 1
    x, weight = run.watch._last[2, 3:].tolist()
    assert x > 65504
    assert 0 < weight < 1


# ----- bad input ---------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(raise_after=0), "raise_after must be an int of 1 or more, got 0"),
        (dict(raise_after=True), "raise_after must be an int"),
        (dict(lower_after=1.5), "lower_after must be an int"),
        (dict(window=1), "window must be at least raise_after 2, got 1"),
        (dict(margin_bits=-1), "margin_bits must be a number of 0 or more"),
        (dict(margin_bits=math.nan), "margin_bits must be a number of 0 or more"),
        (dict(ladder=("mixed_float16",)), "ladder must have two policies or more"),
        (dict(ladder=5), "ladder must have two policies or more, got 5"),
        (dict(ladder="mixed_float16"), "ladder must have two policies or more"),
        (dict(ladder=("mixed_fp16", "float32")), "did you mean 'mixed_float16'"),
        (dict(ladder=("float32", "mixed_float16")), "ladder must go up: mixed_float16 has no wider range than float32"),
        (dict(ladder=("mixed_float16", "mixed_float16")), "ladder must go up"),
        (dict(ladder=("float16", "float32")), "store parameters or gradients in other dtypes"),
        (dict(ladder=("mixed_float16,grad=float16", "float32")), "store parameters or gradients in other dtypes"),
    ],
)
def test_adapt_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        mpk.Adapt(**options)


def test_watch_refuses_to_adapt():
    model = model_with(Scale(), Scale(), "mixed_float16")
    optimizer, scaler = mpk.optim.AdamW(model.parameters()), mpk.GradScaler()
    with pytest.raises(TypeError, match=r"adapt must be an mpkernels.Adapt, got bool"):
        mpk.watch(model, optimizer, scaler, adapt=True)
    for options in ((optimizer,), (optimizer, mpk.GradScaler(enabled=False))):
        with pytest.raises(ValueError, match="nothing skips a step that overflows"):
            mpk.watch(model, *options, adapt=mpk.Adapt())
    with pytest.raises(ValueError, match=r"has a policy of the ladder \(mixed_bfloat16, float32\): they have mixed_float16"):
        mpk.watch(model, optimizer, scaler, adapt=mpk.Adapt(ladder=LADDER[1:]))
    assert not hooks_of(model)
    assert scaler._layer_watch is None


def test_watch_refuses_to_adapt_inside_a_capture(monkeypatch):
    run = Run(adapt=mpk.Adapt())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    run.step()  # of a CPU: nothing captures it
    for tap in run.watch._taps:
        tap.may_be_captured = False  # as on a GPU
    with pytest.raises(RuntimeError, match="adapt cannot change what a CUDA graph has captured"):
        run.step()


def test_adapt_loads_no_other_state():
    run, plain = Run(adapt=mpk.Adapt()), Run()
    state = run.watch.state_dict()
    with mpk.watch(plain.model) as watch:
        without = watch.state_dict()
        with pytest.raises(ValueError, match="state_dict is of a watch with adapt="):
            watch.load_state_dict(state)
    for bad, message in (
        (without, "adapt of the state_dict is not that of a watch made with adapt="),
        (dict(state, adapt=dict(state["adapt"], layers={})), "adapts other layers than this watch: 0, 3, 6"),
        (dict(state, pending=[torch.zeros(1)]), r"pending\[0\] of the state_dict must be a tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            run.watch.load_state_dict(bad)
    short = Run(adapt=mpk.Adapt(ladder=("mixed_float16", "float32")))
    clean = state["adapt"]["layers"]["6"].pop("clean")
    with pytest.raises(ValueError, match="state_dict lacks clean of 6"):
        run.watch.load_state_dict(state)
    state["adapt"]["layers"]["6"]["clean"] = clean
    state["adapt"]["layers"]["0"]["policy"] = "mixed_bfloat16"
    with pytest.raises(ValueError, match="has 0 in mixed_bfloat16, which the ladder has not"):
        short.watch.load_state_dict(state)
    assert set(short.policies.values()) == {"mixed_float16"}
