# SPDX-License-Identifier: Apache-2.0
"""Which Python functions of the package a call goes through."""

import sys
from collections import Counter
from pathlib import Path

import mpkernels

PACKAGE = str(Path(mpkernels.__file__).parent)


def trace(function) -> Counter:
    """How often each was called, by (file, name)."""
    calls = Counter()

    def note(frame, event, argument):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE):
            calls[Path(code.co_filename).relative_to(PACKAGE).as_posix(), code.co_name] += 1

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls
