# SPDX-License-Identifier: Apache-2.0
"""Converted nn.TransformerEncoder layers: in evaluation they call their linears, and compute what they do in training."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import mpkernels as mpk
from tests import bounds
from tests.linear_act_cases import same_bits


def layer(**options) -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, **options)


def encoder() -> nn.TransformerEncoder:
    return nn.TransformerEncoder(layer(), 3)


class Own(nn.TransformerEncoderLayer):
    pass


MODELS = {
    "layer": layer,
    "gelu": lambda: layer(activation="gelu"),
    "norm first": lambda: layer(norm_first=True),
    "subclass": lambda: Own(16, 2, 32, dropout=0.0, batch_first=True),
    "encoder": encoder,
    "inside": lambda: nn.Sequential(nn.Linear(16, 16), encoder()),
}


def data(dtype=torch.float32) -> torch.Tensor:
    return torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(1)).to(dtype)


def padding() -> torch.Tensor:
    """At the end of two sequences: what has nn.TransformerEncoder make nested tensors on its fast path."""
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[1, 3:] = mask[2, 4:] = True
    return mask


def evaluated(model, *args, **kwargs):
    training = model.training
    with torch.no_grad():
        out = model.eval()(*args, **kwargs)
    model.train(training)
    return out


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16,batch_invariant", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_encoders_evaluate_as_they_train(name, policy):
    model = mpk.convert(MODELS[name](), policy)
    x = data(next(model.parameters()).dtype)
    assert same_bits(evaluated(model, x), model(x).detach())
    called = []
    for module in model.modules():
        if isinstance(module, mpk.MPLinear):
            module.register_forward_hook(lambda module, args, out: called.append(module))
    linears = sum(isinstance(module, mpk.MPLinear) for module in model.modules())
    evaluated(model, x)
    assert len(called) == linears


@pytest.mark.parametrize("left", [(), "0.*", "[12].*", "2.linear*"])
def test_encoders_with_padding(left):
    """Whichever of the layers was converted: no layer is given a nested tensor that it would not take."""
    options = {} if left == () else {"exclude": f"layers.{left}"}
    model = mpk.convert(encoder(), "float32", **options)
    out = evaluated(model, data(), src_key_padding_mask=padding())
    plain = encoder()
    expected = plain(data(), src_key_padding_mask=padding()).detach()
    keep = ~padding()
    bounds.check_rearranged(out[keep], expected[keep])


def test_encoders_without_a_converted_linear_are_left():
    model = mpk.convert(nn.ModuleList([layer(), layer(), nn.MultiheadAttention(16, 2)]), exclude="1")
    assert [m.activation_relu_or_gelu for m in model[:2]] == [0, 1]
    assert type(model[1].self_attn) is type(model[2]) is nn.MultiheadAttention


def test_encoders_of_which_layers_were_converted_say_what_to_do():
    """The encoder does not know, and makes a nested tensor of the padding; and no layer can be given one."""
    alone, whole = encoder(), mpk.convert(encoder(), "float32")
    mpk.convert(alone.layers[0], "float32")
    nested = torch.nested.nested_tensor([torch.ones(3, 16), torch.ones(5, 16)])
    for model, args in ((alone, (data(), None, padding())), (whole, (nested,))):
        with pytest.raises(RuntimeError, match=r"convert the whole nn.TransformerEncoder, .* use_nested_tensor = False"):
            evaluated(model, *args)
    alone.use_nested_tensor = False
    bounds.check_rearranged(evaluated(alone, data(), None, padding())[0], evaluated(whole, data(), None, padding())[0])


@pytest.mark.parametrize("name", MODELS)
def test_encoders_are_reverted(name):
    model, plain = MODELS[name](), MODELS[name]()
    plain.load_state_dict(model.state_dict())
    before = [(type(m), sorted(vars(m)), str(m)) for m in model.modules()]
    mpk.convert(mpk.convert(model, "mixed_float16"), "mixed_bfloat16")
    assert str(model).replace("MPLinear", "Linear").count("MultiheadAttention") == str(plain).count("MultiheadAttention")
    assert "MPMultihead" not in str(model)
    mpk.revert(model)
    assert [(type(m), sorted(vars(m)), str(m)) for m in model.modules()] == before
    assert same_bits(evaluated(model, data()), evaluated(plain, data()))


@pytest.mark.parametrize("renew", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_encoders_are_copied(renew):
    model = mpk.convert(encoder())
    twin = renew(model)
    assert same_bits(evaluated(twin, data()), model(data()).detach())
    assert evaluated(mpk.revert(twin), data()).isfinite().all()


def test_encoders_leave_the_switch_as_it_was():
    """In threads, too, and where a call raises; what is not converted keeps its fast path."""
    model = mpk.convert(encoder(), "float32")
    expected = evaluated(model, data())
    model.eval()

    def run(_):
        with torch.no_grad():
            return model(data())

    with ThreadPoolExecutor(4) as pool:
        assert all(same_bits(out, expected) for out in pool.map(run, range(20)))
    assert torch.backends.mha.get_fastpath_enabled()
    with pytest.raises((RuntimeError, AssertionError)):
        model(torch.ones(4, 5, 3))
    assert torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        run(0)
        assert not torch.backends.mha.get_fastpath_enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
