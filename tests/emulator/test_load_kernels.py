# SPDX-License-Identifier: Apache-2.0
"""Every kernel of the library is known to what loads them all before a capture, and is loaded once per device."""

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from mpkernels.runtime import native
from tests.emulator import host_kernels
from tests.paths import ROOT
from tests.toolchain import test_cuda_machine_code as machine_code

COUNT = "from tests.emulator import host_kernels; print(host_kernels.library({!r}).host_load_kernels())"


@pytest.mark.skipif(host_kernels.why_not() is not None, reason=str(host_kernels.why_not()))
def test_load_kernels_knows_every_kernel():
    """As many as there are in the machine code, without a launch; each library in a process of its own."""
    if not machine_code.has_cuda():
        pytest.skip("the library was built without nvcc")
    known = 0
    for name in host_kernels.SOURCES:
        command = [sys.executable, "-c", COUNT.format(name)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        known += int(done.stdout)
    text = "".join(machine_code.of_architecture(machine_code.run("-res-usage"), 80))
    assert known == len(set(re.findall(r"Function (\S+):", text))) > 60


def test_load_kernels_are_those_that_are_launched():
    """launch<kernel>() makes a kernel known; a kernel that is chosen at run time would not be."""
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in (ROOT / "csrc").rglob("*.cu*")
        for line in path.read_text().splitlines()
        if re.search(r"\b(launch(_clusters)?|cudaLaunchKernelEx)\(", line) or "<<<" in line
    ]
    assert not found


@pytest.fixture
def a_gpu(monkeypatch):
    """A machine with a new driver and two GPUs; the devices on which kernels were loaded."""
    devices = []
    ops = SimpleNamespace(cuda_versions=lambda: (13000, 13000), load_kernels=devices.append)
    monkeypatch.setattr(native, "why_not", lambda: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(native, "ops", ops)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    native.cuda_why_not.cache_clear()
    yield ops, devices
    native.cuda_why_not.cache_clear()


def test_load_kernels_once_per_device(a_gpu):
    for index in (0, 1, 0, 1):
        assert native.cuda_why_not(torch.device("cuda", index)) is None
    assert a_gpu[1] == [0, 1]
    assert native.cuda_why_not(torch.device("cuda")) is None
    assert a_gpu[1] == [0, 1, 1], "the current device"


def test_load_kernels_asks_no_gpu_without_a_driver(a_gpu, monkeypatch):
    """torch would raise: a node without a GPU, on which tensors are fake."""

    def raises(device):
        raise RuntimeError("Found no NVIDIA driver on your system")

    monkeypatch.setattr(torch.cuda, "get_device_capability", raises)
    monkeypatch.setattr(a_gpu[0], "cuda_versions", lambda: (13000, 0))
    assert native.cuda_why_not(torch.device("cuda", 0)) == "needs a driver for CUDA 13.0, got none"


def test_load_kernels_says_what_does_not_load(a_gpu, monkeypatch):
    def fails(device):
        raise RuntimeError("CUDA error: no kernel image is available")

    monkeypatch.setattr(a_gpu[0], "load_kernels", fails)
    assert native.cuda_why_not(torch.device("cuda", 0)) == "its kernels do not load: CUDA error: no kernel image is available"


def test_load_kernels_where_none_can_run(a_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    assert native.cuda_why_not(torch.device("cuda", 0)) == "needs sm75, got sm70"
    assert a_gpu[1] == []
