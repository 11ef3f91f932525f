# SPDX-License-Identifier: Apache-2.0
"""Fixtures of all tests: one thread per process, seeded data, the devices that are there."""

import os
import re
import zlib

import pytest
import torch

# One thread in each process, and in those that tests start: they run side by side, and the order of a sum must not depend on
# the machine.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

LONGEST = ("test_triton_interpreter.py", "test_triton_aot.py", "test_overflow_everywhere.py", "test_examples.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest goes first, so that no process is left with it when the others have done."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(autouse=True, scope="session")
def _cache_of_its_own(tmp_path_factory):
    """Self-checks and tuned tables of the user neither decide nor change; processes that tests start inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def generator(request) -> torch.Generator:
    """Random numbers of this test: the same at every run and by every backend, others in every other parametrization."""
    name = re.sub(r"\[(eager|auto)-?", "[", request.node.name)
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


@pytest.fixture(params=["linear_act=eager,linear_act_backward=eager", "auto"], ids=["eager", "auto"])
def by_eager_and_auto(request, monkeypatch):
    """linear_act by both. auto: on a CPU C++, but for fp64."""
    monkeypatch.setenv("MPKERNELS_BACKEND", request.param)


@pytest.fixture(params=["cpu"] + ["cuda"] * torch.cuda.is_available())
def device(request) -> torch.device:
    """Every device type that is there."""
    return torch.device(request.param)
