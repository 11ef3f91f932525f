# SPDX-License-Identifier: Apache-2.0
"""A 3-2-1 network worked by hand: forward, loss, gradients and updated weights, as derived on paper.

The network, with ReLU between the layers:

    x = (1, 2, 1/2)      W1 = [ 1/2  -1/4    1 ]   b1 = ( 1/4)      W2 = [ 2  -3/2 ]   b2 = (1/4)      y* = 5/4
                              [  -1   1/2  1/4 ]        (-1/2)

Forward
    z1 = 1/2 * 1 - 1/4 * 2 + 1 * 1/2 + 1/4  = 1/2 - 1/2 + 1/2 + 1/4 =  3/4     h1 = 3/4
    z2 =  -1 * 1 + 1/2 * 2 + 1/4 * 1/2 - 1/2 = -1 + 1 + 1/8 - 1/2   = -3/8     h2 = 0: this unit is off
    y  = 2 * 3/4 - 3/2 * 0 + 1/4 = 7/4
    L  = 1/2 (y - y*)^2 = 1/2 (1/2)^2 = 1/8

Backward
    e   = dL/dy = y - y* = 1/2
    dW2 = e h = (3/8, 0)                   db2 = e = 1/2
    dh  = e W2 = (1, -3/4)                 dz = (1, 0): ReLU lets through what was on
    dW1 = dz x^T = [ 1  2  1/2 ]           db1 = dz = (1, 0)
                   [ 0  0   0  ]
    dx  = dz W1 = (1/2, -1/4, 1)

Update, SGD with a learning rate of 1/16
    W1 -> [ 7/16  -3/8  31/32 ]   b1 -> (3/16)      W2 -> [ 253/128  -3/2 ]   b2 -> 7/32
          [  -1    1/2   1/4  ]        (-1/2)

Forward again, with the new weights
    z1 = 7/16 - 3/4 + 31/64 + 3/16 = 23/64,  z2 = -3/8 as before
    y  = 253/128 * 23/64 + 7/32 = 5819/8192 + 1792/8192 = 7611/8192
    L  = 1/2 (7611/8192 - 10240/8192)^2 = 1/2 (2629/8192)^2

Every number but the last y and L fits fp16 (11 bits), so no rounding hides an error; y leaves the network in the dtype of
x, from a sum in fp32, and L is computed from it in fp64.
"""

import pytest
import torch

import mpkernels as mpk

POLICIES = ("mixed_float32", "mixed_float16")
LR = 1 / 16

X, TARGET = [[1, 2, 1 / 2]], [[5 / 4]]
W1, B1 = [[1 / 2, -1 / 4, 1], [-1, 1 / 2, 1 / 4]], [1 / 4, -1 / 2]
W2, B2 = [[2, -3 / 2]], [1 / 4]

Y, LOSS = 7 / 4, 1 / 8
GRADS = {"0.weight": [[1, 2, 1 / 2], [0, 0, 0]], "0.bias": [1, 0], "1.weight": [[3 / 8, 0]], "1.bias": [1 / 2]}
GRAD_X = [[1 / 2, -1 / 4, 1]]
UPDATED = {
    "0.weight": [[7 / 16, -3 / 8, 31 / 32], [-1, 1 / 2, 1 / 4]],
    "0.bias": [3 / 16, -1 / 2],
    "1.weight": [[253 / 128, -3 / 2]],
    "1.bias": [7 / 32],
}
NEXT_Y = 7611 / 8192
NEXT_LOSS = (2629 / 8192) ** 2 / 2


def network(policy):
    model = torch.nn.Sequential(mpk.MPLinear(3, 2, activation="relu", policy=policy), mpk.MPLinear(2, 1, policy=policy))
    with torch.no_grad():
        for parameter, values in zip(model.parameters(), (W1, B1, W2, B2), strict=True):
            parameter.copy_(torch.tensor(values))
    return model


def half_squared_error(y):
    return (y.double() - torch.tensor(TARGET, dtype=torch.float64)).square().sum() / 2


def is_exactly(tensor, values):
    return tensor.detach().double().tolist() == torch.tensor(values, dtype=torch.float64).tolist()


@pytest.mark.parametrize("policy", POLICIES)
def test_hand_network_forward(policy):
    model, x = network(policy), torch.tensor(X)
    hidden = model[0](x)
    assert is_exactly(hidden, [[3 / 4, 0]])
    y = model[1](hidden)
    assert is_exactly(y, [[Y]])
    assert half_squared_error(y).item() == LOSS


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("policy", POLICIES)
def test_hand_network_gradients(policy, scaled):
    model, x = network(policy), torch.tensor(X, requires_grad=True)
    scale = 1024.0 if scaled else 1.0
    (half_squared_error(model(x)) * scale).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == parameter.dtype == mpk.Policy.parse(policy).param_dtype
        assert is_exactly(parameter.grad / scale, GRADS[name]), name
    assert is_exactly(x.grad / scale, GRAD_X)


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("policy", POLICIES)
def test_hand_network_update(policy, scaled):
    model, x = network(policy), torch.tensor(X)
    optimizer = mpk.optim.SGD(model.named_parameters(), lr=LR)
    scaler = mpk.GradScaler(init_scale=1024.0, enabled=scaled)
    scaler.scale(half_squared_error(model(x))).backward()
    scaler.step(optimizer)
    scaler.update()
    for name, parameter in model.named_parameters():
        assert is_exactly(parameter, UPDATED[name]), name
    y = model(x)  # through the compute copies that the step has written
    assert is_exactly(y, [[NEXT_Y]])
    assert half_squared_error(y).item() == NEXT_LOSS < LOSS


# What the narrow format cannot hold: W2 + d, with d half of what would change the narrow number, is multiplied as W2, and
# so nothing above changes; but the update starts from W2 + d, which the parameter keeps.
@pytest.mark.parametrize("policy, d", [("mixed_float32", 2.0**-30), ("mixed_float16", 2.0**-12)])
def test_hand_network_parameters_keep_what_the_arithmetic_cannot(policy, d):
    model, x = network(policy), torch.tensor(X)
    with torch.no_grad():
        model[1].weight += d
    optimizer = mpk.optim.SGD(model.named_parameters(), lr=LR)
    y = model(x)
    assert is_exactly(y, [[Y]])
    half_squared_error(y).backward()
    assert all(is_exactly(parameter.grad, GRADS[name]) for name, parameter in model.named_parameters())
    optimizer.step()
    assert is_exactly(model[1].weight, [[253 / 128 + d, -3 / 2 + d]])
    assert is_exactly(model(x), [[NEXT_Y]])
