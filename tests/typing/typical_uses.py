# SPDX-License-Identifier: Apache-2.0
"""What users write, for mypy --strict and pyright: never run. What stands under `type: ignore` both must refuse."""

from collections.abc import Iterator, Mapping
from typing import Any, assert_type

import torch
from torch import Tensor, nn

import mpkernels as mpk
from mpkernels.functional import linear_act
from mpkernels.ops.linear_act import ActivationName


class Net(nn.Module):
    """A model with a method of its own, which convert must not lose."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16))
        self.head = mpk.MPLinear(
            16, 4, bias=False, activation="gelu", policy="mixed_bfloat16", device="cpu", dtype=torch.float32
        )

    def logits(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x))
        return out * 2


def layers(x: Tensor) -> None:
    assert_type(mpk.MPLinear(8, 8).forward(x), Tensor)
    assert_type(mpk.MPLinear.from_linear(nn.Linear(8, 8), "relu", "float16"), mpk.MPLinear)
    assert_type(mpk.MPMLP([8, 16, 4], activation="silu", output_activation=None, policy="float32,batch_invariant"), mpk.MPMLP)
    assert_type(mpk.MPMLP.from_sequential(nn.Sequential(nn.Linear(8, 8))), mpk.MPMLP)
    assert_type(linear_act(x, x, None, "relu2", "mixed_float16"), Tensor)
    assert_type(
        linear_act(x, x, bias=x, activation="gelu_tanh", policy=mpk.Policy.parse("mixed_float16,output=float32")), Tensor
    )
    assert_type(mpk.MPLinear(8, 8).activation, ActivationName | None)
    assert_type(mpk.MPLinear(8, 8).policy, mpk.Policy | None)
    mpk.MPLinear(8, 8, activation="swish")  # type: ignore[arg-type]
    mpk.MPLinear(8, 8, policy="mixed_fp16")  # type: ignore[arg-type]
    mpk.MPMLP([8, 8], activation="tanh")  # type: ignore[arg-type]
    linear_act(x, x, None, "elu")  # type: ignore[arg-type]


def policies(name: str) -> None:
    policy = mpk.Policy(torch.float32, torch.float16, grad_dtype=None, batch_invariant=True)
    assert_type(policy, mpk.Policy)
    assert_type(mpk.Policy.parse(name), mpk.Policy)
    assert_type(mpk.Policy.parse(policy).compute_dtype, torch.dtype)
    assert_type(policy.mixed, bool)
    assert_type(mpk.get_default_policy(), mpk.Policy | None)
    mpk.set_default_policy("mixed_float16")
    mpk.set_default_policy(None)
    with mpk.default_policy(policy):
        pass
    mpk.set_default_policy("float15")  # type: ignore[arg-type]


def conversion(by_glob: Mapping[str, mpk.Policy]) -> None:
    net = mpk.convert(Net(), policy="mixed_float16")
    assert_type(net, Net)
    assert_type(net.logits(torch.zeros(2, 8)), Tensor)
    assert_type(mpk.revert(net), Net)
    assert_type(mpk.convert(net, "float16", include="body.*", exclude="head", keep="head"), Net)
    mpk.convert(net, include=("a", "b"), exclude=["c"], keep={"d", "e"}, min_size=64)
    mpk.convert(net, {"*": "mixed_float16", "*.head": "float32"}, filter_fn=lambda module, name: "head" not in name)
    mpk.convert(net, {"*": "mixed_float16", "*.head": mpk.Policy.parse("float32")})
    mpk.convert(net, by_glob)
    mpk.convert(net, "mixed_float16,grad=float16")
    print(mpk.convert_report(net))
    for row in mpk.convert_report(net):
        assert_type(row.name, str)
        assert_type(row.converted, bool)
        assert_type(row.policy, mpk.Policy | None)
    with mpk.cached_weights(net) as cached:
        assert_type(cached, Net)
    mpk.refresh_(net)
    mpk.warmup(net, torch.zeros(2, 8))
    mpk.warmup(net, (torch.zeros(2, 8),))
    mpk.warmup(net, {"x": torch.zeros(2, 8)})
    mpk.convert(net, "half")  # type: ignore[arg-type]
    mpk.convert(net, include=3)  # type: ignore[arg-type]


def backends() -> None:
    assert_type(mpk.is_available("triton"), bool)
    assert_type(mpk.why_not("native"), str | None)
    mpk.is_available("cuda")  # type: ignore[arg-type]


def optimizers(net: Net) -> None:
    adamw = mpk.optim.AdamW(net.named_parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, max_norm=1.0, amsgrad=True)
    mpk.optim.AdamW(net.parameters(), lr=torch.tensor(1e-3), state_dtype=torch.bfloat16, master_dtype=torch.float64)
    mpk.optim.Adam([{"params": net.parameters(), "lr": 1e-3}, {"params": [torch.zeros(2)]}], eps=1e-7, skip_nonfinite=True)
    mpk.optim.Adam(list(net.named_parameters()), maximize=True, weight_decay=1e-4)
    sgd = mpk.optim.SGD(net.parameters(), 0.1, momentum=0.9, nesterov=True, write_grads=True, process_group=None)
    mpk.optim.SGD([nn.Parameter(torch.zeros(2))], lr=torch.tensor(0.1))
    torch.optim.lr_scheduler.CosineAnnealingLR(adamw, 100)
    assert_type(adamw.grad_norm, Tensor | None)
    assert_type(adamw.step(), None)
    assert_type(sgd.step(lambda: torch.zeros(())), Tensor)
    assert_type(sgd.step(lambda: 1.5), float)
    sgd.zero_grad(set_to_none=False)
    assert_type(sgd.state_dict(), dict[str, Any])
    sgd.load_state_dict(sgd.state_dict())
    sgd.add_param_group({"params": [torch.zeros(2)]})
    adamw.sync_masters_()
    assert_type(adamw.check_masters(), list[str])
    assert_type(adamw.master_state_dict(net), dict[str, Tensor])
    with adamw.master_weights():
        pass
    mpk.optim.AdamW(net.parameters(), lr="1e-3")  # type: ignore[arg-type]
    mpk.optim.SGD(net.parameters(), fast=True)  # type: ignore[call-arg]


def training(net: Net, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
    opt = mpk.optim.AdamW(net.named_parameters())
    scaler = mpk.GradScaler(init_scale=2.0**12, growth_interval=100, min_scale=1.0, max_scale=2.0**20, hysteresis=2)
    mpk.GradScaler("cuda", enabled=False)
    mpk.GradScaler(torch.device("cpu"))
    for x, y in batches:
        loss = nn.functional.cross_entropy(net(x), y)
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # torch's own
        assert_type(scaler.scale([loss, loss]), list[Tensor])
        assert_type(scaler.scale((loss, loss)), tuple[Tensor, ...])
        scaler.unscale_(opt)
        assert_type(scaler.clip_grad_norm_(opt, 1.0), Tensor)
        assert_type(scaler.step(opt), float | None)
        scaler.update()
        opt.zero_grad()
    assert_type(scaler.get_scale(), float)
    assert_type(scaler.last_step_skipped, Tensor)
    assert_type(scaler.skipped_steps, Tensor)
    print(scaler.overflow_report(opt) or "taken")
    scaler.load_state_dict(scaler.state_dict())
    mpk.GradScaler(init_scale="large")  # type: ignore[arg-type]


def tuning(net: Net) -> None:
    assert_type(mpk.tune(net, torch.zeros(2, 8), rounds=3), dict[str, dict[str, Any]])
