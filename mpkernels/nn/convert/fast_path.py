# SPDX-License-Identifier: Apache-2.0
"""torch's fast path of transformer encoders, which in evaluation reads the weights of linears without calling them.

torch turns it off for layers with hooks, and convert for layers of which it has converted a linear: what they compute in
evaluation is what they compute in training. What was off stays off; `attributes` of a module are what revert puts back.
"""

import threading

import torch
from torch import nn

from mpkernels.nn.linear import MPLinear

_lock = threading.RLock()


class MPMultiheadAttention(nn.MultiheadAttention):
    """The attention of such a layer, by the path of training, which takes no nested tensors."""

    def forward(self, query, *args, **kwargs):
        if self.training or torch.compiler.is_compiling():  # a compiled attention takes that path of itself
            return super().forward(query, *args, **kwargs)
        if query.is_nested:
            raise RuntimeError(
                "an encoder layer that convert has changed was given a nested tensor, which only torch's fast path takes: "
                "convert the whole nn.TransformerEncoder, which makes one of a padding mask, or set its "
                "use_nested_tensor = False; and give a padded tensor with src_key_padding_mask"
            )
        with _lock:  # the switch is the process's; what reads it meanwhile takes the slower path as well
            enabled = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
            try:
                return super().forward(query, *args, **kwargs)
            finally:
                torch.backends.mha.set_fastpath_enabled(enabled)

    def _get_name(self) -> str:
        return super()._get_name().replace("MPMultihead", "Multihead")


def turned_off(model: nn.Module) -> list[tuple[nn.Module, type, dict]]:
    """(module, class, attributes) of each module of `model` that must change for the fast path to be off."""
    changes, layers = [], set()
    for layer in model.modules():
        if isinstance(layer, nn.TransformerEncoderLayer) and any(isinstance(m, MPLinear) for m in layer.modules()):
            layers.add(layer)
            changes.append((layer, type(layer), {"activation_relu_or_gelu": 0}))
            if type(layer.self_attn) is nn.MultiheadAttention:
                changes.append((layer.self_attn, MPMultiheadAttention, {}))
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and not layers.isdisjoint(encoder.layers):
            changes.append((encoder, type(encoder), {"use_nested_tensor": False}))
    return changes
