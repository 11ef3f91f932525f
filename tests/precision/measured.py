# SPDX-License-Identifier: Apache-2.0
"""What advise and plan say, and what is measured beside it: for the tests, and for the rows of bench/precision.py."""

import copy
import itertools
import random
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
import transformers
from torch import nn

import mpkernels as mpk
from mpkernels.precision import memory
from mpkernels.precision.capture import Call
from mpkernels.precision.layer import Layer, PolicyRow
from mpkernels.runtime import compute_copy
from tests import models

FORMATS = ("float32", "mixed_bfloat16", "mixed_float16", "bfloat16", "float16")
EIGHT_BITS = ("mixed_float8", "mixed_float8_hybrid")
WITH_EIGHT_BITS = ("float32", "mixed_bfloat16", *EIGHT_BITS, "mixed_float8,scaling=tensor")

# ----- the change of the loss ----------------------------------------------------------------------


class InPolicy(nn.Module):
    """One linear in its policy, in a model that computes in fp64."""

    def __init__(self, linear: nn.Module, policy: str):
        super().__init__()
        self.linear, self.policy = linear, mpk.Policy.parse(policy)

    def forward(self, x):
        dtype = self.policy.param_dtype
        weight = self.linear.weight if isinstance(self.linear, nn.Linear) else self.linear.weight.t()  # Conv1D
        bias = None if self.linear.bias is None else self.linear.bias.to(dtype)
        return mpk.functional.linear_act(x.to(dtype), weight.to(dtype), bias, policy=self.policy).double()


def loss_changes(name: str, rows: int, dtype: torch.dtype, formats=FORMATS) -> Iterator[tuple[str, float, float]]:
    """(format, predicted, measured) changes of the loss, of each linear in each format with all others in fp64.

    dtype: of the model that advise is given. What float32 itself adds is known of a model in fp64 alone.
    """
    case = models.CASES[name]
    model, (inputs, labels) = case.model(), case.data(rows)
    wide = copy.deepcopy(model).double()
    loss = lambda model: F.cross_entropy(models.logits(model, inputs).flatten(0, -2), labels.flatten())
    formats = [p for p in formats if dtype == torch.float64 or p != "float32"]
    advice = mpk.advise(wide if dtype == torch.float64 else model, loss, policies=formats, loss_budget=1e9)
    with torch.no_grad():
        exact = loss(wide).item()
        for layer, policy in itertools.product(advice.policy, formats):
            changed = copy.deepcopy(wide)
            changed.set_submodule(layer, InPolicy(model.get_submodule(layer), policy))
            yield policy, advice[layer].policies[policy].loss_change, loss(changed).item() - exact


def agreement(changes: list[tuple[str, float, float]]) -> tuple[float, float]:
    """(Pearson's correlation, the share within a factor of 2)."""
    _, predicted, measured = zip(*changes, strict=True)
    correlation = torch.corrcoef(torch.tensor([predicted, measured], dtype=torch.float64))[0, 1].item()
    within = [m / 2 <= p <= 2 * m or 2 * m <= p <= m / 2 for p, m in zip(predicted, measured, strict=True)]
    return correlation, sum(within) / len(within)


def rows_of(linear: nn.Module, x: torch.Tensor, grad: torch.Tensor | None, policies: Iterable[str]) -> list[PolicyRow]:
    """What each policy makes of one call of a linear, by itself. The loss scale is 64."""
    layer = Layer(linear, [mpk.Policy.parse(p) for p in policies], 64.0)
    with torch.no_grad():
        layer.add(Call("", x, grad))
    return list(layer.by_policy().values())


# ----- the bound ----------------------------------------------------------------------

OF_BOUND = (*FORMATS, "mixed_float16,output=float16", "mixed_bfloat16,output=bfloat16")
ACTIVATIONS = (None, "relu", "relu2", "gelu", "gelu_tanh", "silu")


def _random_call(rng: random.Random) -> tuple[nn.Linear, torch.Tensor]:
    M, K, N = rng.randint(1, 20), rng.choice([1, 2, 7, 16, 65, 300]), rng.randint(1, 9)
    linear = mpk.MPLinear(K, N, bias=rng.random() < 0.7, activation=rng.choice(ACTIVATIONS))
    x = torch.randn(M, K) * 10 ** rng.uniform(-6, 3)
    with torch.no_grad():
        linear.weight *= 10 ** rng.uniform(-5, 1)
        if rng.random() < 0.3:
            x = x.abs()
            linear.weight.abs_()
        if rng.random() < 0.2:
            x[rng.randrange(M)] *= 1e-4
    return linear, x


def bound_ratios(seed: int, layers: int, of=OF_BOUND) -> Iterator[tuple[str, str | None, float | None]]:
    """(policy, activation, error in units of the bound) of random layers under every policy; None where something overflows."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(layers):
        linear, x = _random_call(rng)
        for row in rows_of(linear, x, None, of):
            yield str(row.policy), linear.activation, row.bound_ratio


# ----- the memory of real steps ----------------------------------------------------------------------


def _mlp():
    return nn.Sequential(nn.Linear(96, 192), nn.ReLU(), nn.Linear(192, 256), nn.LayerNorm(256), nn.GELU(), nn.Linear(256, 128))


def _rows(n):
    return torch.randn(n, 96)


def _bert():
    config = transformers.BertConfig(
        vocab_size=500, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512, num_labels=10,
        max_position_embeddings=32,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def _sentences(n):
    return {"input_ids": torch.randint(500, (n, 24)), "labels": torch.randint(10, (n,))}


def _gpt2():
    config = transformers.GPT2Config(
        vocab_size=500, n_positions=32, n_embd=128, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def _tokens(n):
    ids = torch.randint(500, (n, 24))
    return {"input_ids": ids, "labels": ids}


# NOTE: the lists that the C++ step makes have some 100 bytes a parameter, which FakeTensors do not show: of anything smaller
# than these that would be more than 1 %.
STEPS = {"mlp": (_mlp, _rows), "bert": (_bert, _sentences), "gpt2": (_gpt2, _tokens)}  # (make_model, make_batch)
OPTIMIZERS = {
    "AdamW": mpk.optim.AdamW, "Adam": mpk.optim.Adam, "SGD": lambda p: mpk.optim.SGD(p, momentum=0.9), "Lion": mpk.optim.Lion,
    "torch": torch.optim.AdamW,
}  # fmt: skip
OURS = {name: make for name, make in OPTIMIZERS.items() if name != "torch"}  # the scaler refuses 16-bit gradients for others


def of_real_steps(make_model, make_batch, n: int, policy: str, optimizer: str) -> dict[str, int]:
    """The fields of a PlanRow by two steps on data: states and copies from the tensors, maxima from the tracker."""
    policy = mpk.Policy.parse(policy)
    model, batch = mpk.convert(make_model(), policy), make_batch(n)
    if not isinstance(batch, dict):
        batch = batch.to(policy.param_dtype)
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    scaler = mpk.GradScaler(enabled=policy.compute_dtype == torch.float16)

    def loss():
        out = model(**batch) if isinstance(batch, dict) else model(batch)
        return out.loss.float() if isinstance(batch, dict) else out.float().square().mean()

    def step():
        scaler.scale(loss()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    inputs = list(batch.values()) if isinstance(batch, dict) else [batch]
    usages = memory.trace(model, inputs, [step, step], torch.device("cpu")).usages
    tensors = {id(t): t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)}
    states = sum(t.nbytes for t in tensors.values())
    copies = sum(copy.tensor.nbytes for copy in compute_copy.of_model(model))
    return {
        "parameters": sum(t.nbytes for t in (*model.parameters(), *model.buffers())),
        "gradients": sum(p.nbytes for p in model.parameters() if p.requires_grad),
        "states": states,
        "copies": copies,
        "activations": max(u.activations for u in usages),
        "temporaries": max(u.temporaries + max(u.optimizer - states - copies, 0) for u in usages),
        "peak": max(u.total for u in usages),
    }


# ----- training ----------------------------------------------------------------------

ROWS, BATCH, SEEDS = 256, 32, 3


def _made(name: str, seed: int) -> tuple[nn.Module, tuple, torch.Tensor]:
    """A model and its data."""
    torch.manual_seed(seed)
    return models.CASES[name].make(), *models.CASES[name].data(ROWS)


def _first_loss(inputs: tuple, labels: torch.Tensor):
    return lambda model: models.loss(model, tuple(x[:BATCH] for x in inputs), labels[:BATCH])


def advised(name: str, seed: int, **options) -> mpk.precision.Advice:
    model, *data = _made(name, seed)
    return mpk.advise(model, _first_loss(*data), **options)


def trained(name: str, seed: int, steps: int, policy) -> float:
    """The loss over all rows after so many steps of AdamW, whose rate rises and falls to 0. policy: as convert takes it."""
    model, inputs, labels = _made(name, seed)
    mpk.convert(model, policy)
    optimizer, scaler = mpk.optim.AdamW(model.parameters(), lr=models.CASES[name].lr, max_norm=1.0), mpk.GradScaler("cpu")
    rate = lambda t: min(1.0, (t + 1) * 10 / steps) * (1 - t / steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for step in range(steps):
        rows = torch.arange(step * BATCH, (step + 1) * BATCH) % ROWS
        scaler.scale(models.loss(model, tuple(x[rows] for x in inputs), labels[rows])).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scheduler.step()
    with torch.no_grad():
        return models.loss(model.eval(), inputs, labels).item()


def trainings(name: str, steps: int) -> dict[str, float]:
    """Mean differences of the losses of the same seeds: advised to fp32's and to all-bf16's; the spread of fp32's."""
    fp32, bf16 = ([trained(name, seed, steps, p) for seed in range(SEEDS)] for p in ("float32", "mixed_bfloat16"))
    ours = [trained(name, seed, steps, advised(name, seed).policy) for seed in range(SEEDS)]
    mean = lambda a, b: sum(x - y for x, y in zip(a, b, strict=True)) / SEEDS
    return {"to_fp32": mean(ours, fp32), "to_bf16": mean(ours, bf16), "spread": max(fp32) - min(fp32)}


def contradicted(name: str, loss_scale: float) -> tuple[list[str], list[str], float]:
    """Of the step that advise was given, converted and with its loss scale.

    (parameters whose gradient is not finite as advised, the same under fp16, the change of the loss as advised over its budget)
    """
    advice = advised(name, 0, loss_scale=loss_scale)
    bad, losses = [], []
    for policy in (advice.policy, "mixed_float16"):
        model, *data = _made(name, 0)
        losses.append(_first_loss(*data)(mpk.convert(model, policy)))
        (losses[-1] * loss_scale).backward()
        bad.append([n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()])
    return *bad, abs(losses[0].item() - advice.loss) / advice.loss_budget
