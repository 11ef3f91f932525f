# SPDX-License-Identifier: Apache-2.0
"""Masters of 16-bit parameters: taking over what others wrote, finding what strayed, swapping them in."""

import contextlib
from collections.abc import Iterable

import torch

from mpkernels.ops.common.cast import cast
from mpkernels.optim.distributed import is_dtensor, local
from mpkernels.runtime.fake import copy_


def pairs(state: dict) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(parameter, master) for each parameter that has one."""
    own = ((p, s) for p, s in state.items() if isinstance(p, torch.Tensor) and isinstance(s, dict))
    return [(p, s["master"]) for p, s in own if isinstance(s.get("master"), torch.Tensor)]


def take_over(master: torch.Tensor, parameter: torch.Tensor) -> None:
    """What was written to the parameter becomes the master's; where the parameter is the master rounded, it stays."""
    master, parameter = local(master), local(parameter)
    copy_(master, torch.where(cast(master, parameter.dtype) == parameter, master, parameter))


def in_state_dict(model: torch.nn.Module, state: dict) -> dict[str, torch.Tensor]:
    """`model.state_dict()` with the masters in it."""
    masters = {id(p): master for p, master in pairs(state)}
    result = model.state_dict()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in masters and name in result:
            result[name] = masters[id(parameter)].detach()
    return result


def strays(rounded: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> list[bool]:
    """Whether the first of two tensors is not the second, rounded; waits for the device, once for each there is."""
    flags: dict[torch.device, list[torch.Tensor]] = {}
    places = []
    for narrow, wide in rounded:
        narrow, expected = local(narrow), cast(local(wide), narrow.dtype)
        on_device = flags.setdefault(narrow.device, [])
        places.append((narrow.device, len(on_device)))
        on_device.append(~((narrow == expected) | (narrow.isnan() & expected.isnan())).all())
    values = {device: torch.stack(on_device).tolist() for device, on_device in flags.items()}
    return [values[device][i] for device, i in places]


@contextlib.contextmanager
def all_swapped_in(state: dict):
    """Inside, each parameter that has a master is it."""
    masters = pairs(state)
    if any(is_dtensor(p) for p, _ in masters):
        raise RuntimeError("master_weights cannot put masters in the place of DTensors: use master_state_dict")
    with contextlib.ExitStack() as swaps:
        for parameter, master in masters:
            swaps.enter_context(_swapped_in(parameter, master))
        yield


@contextlib.contextmanager
def _swapped_in(parameter: torch.Tensor, master: torch.Tensor):
    """Inside, `parameter` is `master`.

    NOTE: `parameter.data = master` would change its dtype, for which torch drops the node that accumulates its gradient,
    and with it, silently, the hooks by which DDP averages gradients. Here the whole parameter steps aside.
    """
    view = master.detach().requires_grad_(parameter.requires_grad)
    version = master._version
    torch._C._swap_tensor_impl(parameter, view)  # what torch.utils.swap_tensors does, which refuses weak references
    try:
        yield
    finally:
        torch._C._swap_tensor_impl(parameter, view)
        if master._version != version:
            with torch.no_grad():
                parameter.copy_(cast(master, parameter.dtype))
