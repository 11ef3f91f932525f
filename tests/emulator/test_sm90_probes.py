# SPDX-License-Identifier: Apache-2.0
"""The host emulator against the hardware: the probes of tests/device give the recorded bits of a Hopper GPU, once recorded."""

import numpy as np
import pytest
import torch

from tests.device import probes
from tests.emulator import host_kernels

LIBRARY = "mpkernels_hopper"
PROBES = probes.probes()
REASON = host_kernels.why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def ask(name: str, seed: int) -> np.ndarray:
    """The emulator's answer, its events in the order of `seed`."""
    library, probe = host_kernels.library(LIBRARY), PROBES[name]
    library.host_seed(seed)
    given, out = (torch.from_numpy(a.view(np.int32).copy()) for a in (probe.given, probe.out))
    host_kernels.set_memory([out], [given], LIBRARY)
    probes.ask(probe, library, given.data_ptr(), out.data_ptr())
    return out.numpy().view(np.uint32)


@pytest.mark.parametrize("name", PROBES)
def test_sm90_probe_answers_do_not_depend_on_the_seed(name):
    first = ask(name, 0)
    for seed in (1, 2):
        assert np.array_equal(ask(name, seed), first)


def test_sm90_probes_answer_like_the_gpu():
    if not probes.ANSWERS.exists():
        pytest.skip(f"not recorded on a Hopper GPU: python tests/device/probes.py writes {probes.ANSWERS.name}")
    with np.load(probes.ANSWERS) as answers:
        wrong = [name for name in PROBES if not np.array_equal(ask(name, 0), answers[name])]
        assert not wrong, f"other bits than on {answers['gpu']}: {wrong}"


def test_sm90_probes_show_what_they_should():
    """A few answers by hand: a swizzled box with zeros outside of the tensor; one element of a product."""
    box = ask("load fp16 box of 16 rows at 0 33", 0).view(np.uint16)
    for row, column in ((0, 0), (1, 9), (6, 63), (7, 0), (15, 20)):
        place = row * 64 + ((column // 8) ^ (row % 8)) * 8 + column % 8
        assert box[place] == (0 if 33 + row >= 40 else (33 + row) * 104 + column + 1)
    assert (box[16 * 64 :] == 0xABAB).all()

    name = "wgmma fp16 N=64 trans=00 k=0 accumulate=0"
    image, acc = PROBES[name].given.view(np.float16).astype(float), ask(name, 0).view(np.float32).reshape(128, 32)
    place = lambda start, row, k: start // 2 + row * 64 + ((k // 8) ^ (row % 8)) * 8 + k % 8
    row, column = 32 + 8 + 3, 8 * 5 + 2 * 1 + 1  # of warp 2, second half, lane 4 * 3 + 1, value 4 * 5 + 3
    expected = sum(image[place(1024, row, k)] * image[place(16384, column, k)] for k in range(16))
    assert acc[2 * 32 + 4 * 3 + 1, 4 * 5 + 3] == expected
