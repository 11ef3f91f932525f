# SPDX-License-Identifier: Apache-2.0
"""Watch a training loop that knows nothing of it: count our ops, let one step overflow, take the norms of its gradients.

`python tests/framework_spy.py OUT EXAMPLE` runs a file under a spy and writes what it saw to OUT, a file per rank.
"""

import collections
import json
import os
import runpy
import sys
from contextlib import ExitStack
from unittest import mock

import torch

import mpkernels as mpk
from mpkernels.optim.distributed import local
from mpkernels.optim.grad_reading import GradReader
from mpkernels.optim.optimizer import Optimizer
from mpkernels.runtime.op import Op

OVERFLOW = 5  # the step whose loss is scaled by inf


class Spy(ExitStack):
    """Inside, `calls` counts our ops and what would be another pass; `squares` sums each step's unscaled gradients in fp64."""

    def __enter__(self):
        self.calls, self.squares, self.optimizers, self.scaled = collections.Counter(), [], {}, 0
        self._wrap(Op, "execute", lambda op, *_: self.calls.update([op.name]))
        self._wrap(Optimizer, "_current_plan", lambda optimizer: self.optimizers.update({id(optimizer): optimizer}))
        self._wrap(GradReader, "read", self._read)
        for owner, name in ((Optimizer, "_unscale_grads"), (torch.nn.utils, "clip_grad_norm_"), (torch.optim.AdamW, "step")):
            self._wrap(owner, name, lambda *_, name=name: self.calls.update([name]))
        scale = mpk.GradScaler.scale

        def overflow_once(scaler, outputs):
            self.scaled += 1
            return scale(scaler, outputs) * (torch.inf if self.scaled == OVERFLOW + 1 else 1)

        self.enter_context(mock.patch.object(mpk.GradScaler, "scale", overflow_once))
        return super().__enter__()

    def _wrap(self, owner, name, before):
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            before(*args)
            return original(*args, **kwargs)

        self.enter_context(mock.patch.object(owner, name, wrapped))

    def _read(self, _, plan, grad_scale, *__):
        scale = 1.0 if grad_scale is None else grad_scale.double()
        grads = [local(grad).double() / scale for grad in plan.grads_of_params()]
        self.squares.append(sum(grad.square().sum().item() for grad in grads))

    def seen(self) -> dict:
        """Plain data: the calls, the squares, and of the one optimizer its steps and how many of its groups are different."""
        (optimizer,) = self.optimizers.values()
        return {
            "calls": dict(self.calls),
            "squares": self.squares,
            "elements": sum(p.numel() for group in optimizer.param_groups for p in group["params"]),
            "steps": sorted({int(state["step"]) for state in optimizer.state.values()}),
            "groups": len({str({k: v for k, v in g.items() if not k.startswith("param")}) for g in optimizer.param_groups}),
        }


if __name__ == "__main__":
    out, example = sys.argv[1:]
    with Spy() as spy:
        runpy.run_path(example, run_name="__main__")
    with open(f"{out}/{os.environ['RANK']}.json", "w") as file:
        json.dump(spy.seen(), file)
    sys.stdout.flush()
    os._exit(0)  # NOTE: gloo's threads outlive destroy_process_group, and may abort while Python shuts down beside them
