# SPDX-License-Identifier: Apache-2.0
"""Load the compiled library if there is one, else remember why not."""

import functools
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("_C.abi3.so")


@functools.cache
def why_not() -> str | None:
    """None once the library is loaded, else one sentence."""
    if not LIBRARY.exists():
        return "not built; run pip install --no-build-isolation ."
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"{LIBRARY.name} does not load: {error}"
    return None
