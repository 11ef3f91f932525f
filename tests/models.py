# SPDX-License-Identifier: Apache-2.0
"""Small models of the kinds that people train, from their configurations; and a mode that refuses what CUDA refuses."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import transformers
from sklearn.datasets import load_digits
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

# ----- models by hand ----------------------------------------------------------------------


class LoRA(nn.Module):
    """A linear that is frozen, and the product of two thin ones beside it."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a, self.b = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))

    @torch.no_grad()
    def merge(self):
        self.base.weight += self.b.weight @ self.a.weight
        self.b.weight.zero_()


class PlainMLP(nn.Module):
    """The example of every tutorial."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(64, 48), nn.Linear(48, 32), nn.Linear(32, 10)

    def forward(self, x):
        x = torch.relu(self.fc1(x))
        return self.fc3(F.relu(self.fc2(x)))


class NormBlock(nn.Module):
    """Linear, LayerNorm, Linear around a residual."""

    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down, self.head = nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x):
        return self.head(x + self.down(F.gelu(self.norm(self.up(x)))))


class ResidualBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x):
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class ResNet(nn.Module):
    """Convolutions are not converted; the two linears of the head are."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.blocks = nn.Sequential(ResidualBlock(8), ResidualBlock(8))
        self.head = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, x):
        x = self.blocks(self.stem(x.view(-1, 1, 8, 8)))
        return self.head(F.adaptive_avg_pool2d(x, 2).flatten(1))


class ViTBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Patches of 2 x 2 of an 8 x 8 digit."""

    def __init__(self):
        super().__init__()
        self.patch, self.position = nn.Linear(4, 32), nn.Parameter(torch.randn(16, 32) / 8)
        self.blocks = nn.Sequential(ViTBlock(32, 4), ViTBlock(32, 4))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 10)

    def forward(self, x):
        patches = x.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
        return self.head(self.norm(self.blocks(self.patch(patches) + self.position)).mean(1))


class DLRM(nn.Module):
    """Dense features through an MLP, categories through embeddings, their products through another MLP."""

    def __init__(self):
        super().__init__()
        self.bottom = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
        self.tables = nn.ModuleList(nn.EmbeddingBag(20, 16, mode="sum") for _ in range(3))
        self.top = nn.Sequential(nn.Linear(22, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 2))

    def forward(self, dense, categories):
        dense = self.bottom(dense)
        vectors = torch.stack([dense] + [table(categories[:, i]) for i, table in enumerate(self.tables)], 1)
        rows, columns = torch.triu_indices(4, 4, 1)
        products = torch.bmm(vectors, vectors.transpose(1, 2))[:, rows, columns]
        return self.top(torch.cat([dense, products], 1))


class Encoder(nn.Module):
    """nn.TransformerEncoder, whose fast path in evaluation reads the weights of its linears without calling them."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.embed, self.encoder, self.head = nn.Embedding(40, 32), nn.TransformerEncoder(layer, 2), nn.Linear(32, 10)

    def forward(self, tokens):
        return self.head(self.encoder(self.embed(tokens)).mean(1))


# ----- models of transformers ----------------------------------------------------------------------


def bert(activation: str) -> nn.Module:
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, num_labels=10,
            max_position_embeddings=16, hidden_act=activation, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=40, n_positions=16, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


class T5(nn.Module):
    """The encoder with a head."""

    def __init__(self):
        super().__init__()
        self.encoder = transformers.T5EncoderModel(
            transformers.T5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0)
        )
        self.head = nn.Linear(32, 10)

    def forward(self, tokens):
        return self.head(self.encoder(tokens).last_hidden_state.mean(1))


# ----- cases ----------------------------------------------------------------------


def digits(rows: int) -> tuple:
    x, y = load_digits(return_X_y=True)
    return (torch.tensor(x[:rows], dtype=torch.float32) / 16,), torch.tensor(y[:rows])


def sentences(rows: int) -> tuple:
    """Tokens, and a label that they decide: how often the first token occurs."""
    tokens = torch.randint(40, (rows, 12), generator=torch.Generator().manual_seed(1))
    tokens[:, 6:] = torch.where(tokens[:, 6:] < 25, tokens[:, :1], tokens[:, 6:])
    return (tokens,), (tokens == tokens[:, :1]).sum(1).clamp(max=9)


def text(rows: int) -> tuple:
    """Tokens, and those that follow."""
    (tokens,), _ = sentences(rows)
    return (tokens[:, :-1],), tokens[:, 1:]


def clicks(rows: int) -> tuple:
    generator = torch.Generator().manual_seed(2)
    dense, categories = torch.randn(rows, 16, generator=generator), torch.randint(20, (rows, 3, 2), generator=generator)
    return (dense, categories), (dense[:, 0] + categories[:, 0, 0] / 10 > 1).long()


@dataclass(frozen=True)
class Case:
    """How to make a model, its data, (inputs, labels) of so many rows, and its largest learning rate."""

    make: Callable[[], nn.Module]
    data: Callable[[int], tuple]
    lr: float

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make()


CASES = {
    "plain_mlp": Case(PlainMLP, digits, 1e-3),
    "norm_block": Case(NormBlock, digits, 1e-3),
    "resnet": Case(ResNet, digits, 5e-4),
    "vit": Case(ViT, digits, 5e-4),
    "dlrm": Case(DLRM, clicks, 1e-3),
    "encoder": Case(Encoder, sentences, 3e-3),
    "bert_relu": Case(lambda: bert("relu"), sentences, 3e-3),
    "bert_gelu": Case(lambda: bert("gelu"), sentences, 3e-3),
    "gpt2": Case(gpt2, text, 3e-3),
    "t5": Case(T5, sentences, 3e-3),
}


def logits(model: nn.Module, inputs: tuple) -> torch.Tensor:
    """What `model` says of its inputs, which are first cast to the dtype it is stored in, as its user would."""
    dtype = next(model.parameters()).dtype
    out = model(*(x.to(dtype) if x.is_floating_point() else x for x in inputs))
    return out if isinstance(out, torch.Tensor) else out.logits


def loss(model: nn.Module, inputs: tuple, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits(model, inputs).float().flatten(0, -2), labels.flatten())


# ----- what CUDA refuses ----------------------------------------------------------------------

_aten = torch.ops.aten
_ONE_DTYPE = {
    _aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm, _aten.addbmm, _aten.mv, _aten.addmv, _aten.dot, _aten.linear,
    _aten.convolution, _aten.native_layer_norm, _aten.native_layer_norm_backward, _aten.native_group_norm,
    _aten._scaled_dot_product_flash_attention_for_cpu, _aten._scaled_dot_product_attention_math,
    _aten._transformer_encoder_layer_fwd, _aten._native_multi_head_attention, _aten.index_put_, _aten.index_add,
    _aten.scatter_add, _aten._fused_rms_norm,
}  # fmt: skip
_AUTOCAST_TO_FP32 = {
    _aten.native_layer_norm, _aten.native_layer_norm_backward, _aten.native_group_norm, _aten._fused_rms_norm
}  # fmt: skip


class RefuseAsCUDA(TorchDispatchMode):
    """Raises for mixtures of floating-point dtypes that an op takes on a CPU and refuses on CUDA.

    autocast: CUDA's casts what goes into a normalization to fp32; the CPU's, under which this runs, does not.
    NOTE: statistics of normalizations are fp32 whatever the input is: of their backward only the first two are compared.
    """

    def __init__(self, autocast: bool = False):
        super().__init__()
        self.refused = _ONE_DTYPE - _AUTOCAST_TO_FP32 if autocast else _ONE_DTYPE

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in self.refused and "dtype" not in func._overloadname:
            tensors = [a for a in (*args, *(kwargs or {}).values()) if isinstance(a, torch.Tensor) and a.is_floating_point()]
            tensors = tensors[:2] if func.overloadpacket is _aten.native_layer_norm_backward else tensors
            dtypes = {tensor.dtype for tensor in tensors}
            if len(dtypes) > 1:
                raise RuntimeError(f"CUDA refuses {func} of {', '.join(map(str, dtypes))}")
        return func(*args, **(kwargs or {}))
