# SPDX-License-Identifier: Apache-2.0
"""What linear_act launches through Triton's compiler, with no GPU: `python -m tests.toolchain.triton_launches`, asked by
tests/toolchain/test_triton_launches.py. Exit status 1 and a traceback where a launch is not what Triton itself would launch.
"""

import torch
from triton.runtime.jit import JITFunction

from mpkernels.ops.linear_act import triton
from mpkernels.ops.linear_act.call import BackwardCall, ForwardCall
from tests.toolchain.triton_stub_driver import Launch, StubDriver

SHARED = 232448
f16, f32 = torch.float16, torch.float32


def main() -> None:
    driver = StubDriver(90, SHARED)
    driver.install()
    triton._device = lambda device: (90, 132, triton.specializes())
    triton._allocate = lambda size, alignment, stream: torch.empty(size, dtype=torch.int8)
    by_triton, run = [], JITFunction.run
    JITFunction.run = lambda self, *args, **how: by_triton.append(self) or run(self, *args, **how)
    again = lambda function: _again(driver, by_triton, function)

    x, weight, bias, grad_out = torch.randn(136, 64), torch.randn(72, 64), torch.randn(72), torch.randn(136, 72)
    x, weight, grad_out = x.half(), weight.half(), grad_out.half()
    forward = lambda x, bias=bias: triton.linear_act(ForwardCall(x, weight, bias, None, 1, f16, f16, 1))
    mask = forward(x)[1]
    prev_mask = torch.zeros(136, 2, dtype=torch.int32)
    call = BackwardCall(grad_out, x, weight, None, mask, 1, f16, f16, f16, f32, [True] * 3, prev_mask, 1, f32)
    backward = lambda: triton.linear_act_backward(call)
    assert [launch.name for launch in again(lambda: forward(x))] == ["gemm_tma_kernel"]
    names = ["select_kernel", "sum_kernel", "gemm_tma_kernel", "sum_kernel", "gemm_tma_kernel"]
    assert [launch.name for launch in again(backward)] == names

    # A sum that wgrad is added to, and one that is not at a multiple of 16 bytes.
    stored, room = again(backward)[-1], torch.zeros(72 * 64 + 1)
    for sum_, name in ((room[:-1].view(72, 64), "gemm_tma_kernel"), (room[1:].view(72, 64), "gemm_kernel")):
        added = again(lambda sum_=sum_: triton.linear_act_backward(call._replace(grad_weight_sum=sum_)))[-1]
        assert added.name == name
        assert added.function != stored.function

    # A view whose rows are not at multiples of 16 bytes, a bias that is not: each has a kernel of its own.
    moved = torch.randn(136, 66).half()[:, 1:65]
    assert [launch.name for launch in again(lambda: forward(moved))] == ["gemm_kernel"]
    aligned = again(lambda: forward(x))[0]
    offset = again(lambda: forward(x, torch.randn(73)[1:]))[0]
    assert aligned.function != offset.function
    assert again(lambda: forward(x))[0].function == aligned.function


def _again(driver: StubDriver, by_triton: list, function) -> list[Launch]:
    """The launches of `function`; the second time it launches the same, and Triton does not look at an argument."""
    found = []
    for _ in range(2):
        driver.launches, by_triton[:] = [], []
        function()
        found.append(driver.launches)
    assert found[0] == found[1]
    assert not by_triton, by_triton
    return found[0]


if __name__ == "__main__":
    main()
