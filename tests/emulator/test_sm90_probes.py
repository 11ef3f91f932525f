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
    probes.ask(probe.name, probe.parameters, library, given.data_ptr(), out.data_ptr())
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
