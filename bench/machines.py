# SPDX-License-Identifier: Apache-2.0
"""The machines that rows are of."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """A machine with a page in docs/benchmarks.

    device: as its rows name it. files: of bench/results; of a case that several have, the last one's rows are shown, since
    bench/device.sh writes one per forced backend. note: what a reader of its tables has to know.
    """

    name: str
    device: str
    kind: str
    files: tuple[str, ...]
    note: str = ""


MACHINES = {  # by the name of their page
    "zen3": Machine("AMD EPYC, Zen 3 (AVX2)", "AMD EPYC family 25 model 1", "cpu", ("cpu",)),
    "zen4": Machine("AMD EPYC, Zen 4 (AVX-512 BF16)", "AMD EPYC family 25 model 17", "cpu", ("cpu-zen4",)),
    "intel": Machine(
        "Intel Xeon (AVX-512 FP16, AMX)",
        "Intel(R) Xeon(R) Processor family 6 model 167",
        "cpu",
        ("cpu-intel",),
        "In forward, in chains and in models `oneDNN on fp32 copies`, `fp32, oneDNN` and `torch fp32, oneDNN` multiply in\n"
        "bf16 on this CPU, which is how oneDNN reads the setting that selects it (the error is in the rows); with ReLU fused,\n"
        "and in backward, they compute in fp32. The targets for training against torch's fp16 were set for a CPU without fp16\n"
        "instructions, which this is not.",
    ),
    "icelake": Machine(
        "Intel Xeon, Ice Lake (AVX-512 VNNI)",
        "Intel(R) Xeon(R) Processor @ 2.60GHz family 6 model 106",
        "cpu",
        ("cpu-icelake",),
    ),
    "h200": Machine("NVIDIA H200", "NVIDIA H200", "cuda", ("cuda", "cuda-triton", "cuda-step", "cuda-native")),
}
