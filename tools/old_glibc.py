# SPDX-License-Identifier: Apache-2.0
"""Make libraries to link with of an older glibc, from the lists of its symbols that zig has: tools/old_glibc.py 2.28 FOLDER.

A library takes the newest version of each symbol that the glibc it is linked with has, and asks for that at run time. Linked
with `-L FOLDER` it runs wherever that glibc or a later one is. A symbol that came later has no version then:
tests/toolchain/test_packages.py looks for such.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

LIBRARIES = ("libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1", "libld.so.2")


def make(version: str, folder: Path) -> None:
    """zig makes the libraries on its way to link something, and says where it put them."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as cache:
        source = Path(cache, "nothing.c")
        source.write_text("int nothing;\n")
        command = [sys.executable, "-m", "ziglang", "cc", "-target", f"{platform.machine()}-linux-gnu.{version}", "-O2", "-v"]
        command += ["-shared", "-o", f"{cache}/nothing.so", source, "-lm", "-lpthread", "-ldl", "-lrt"]
        environment = os.environ | {"ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache}
        said = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stderr
        linked = {Path(path).name: path for path in re.findall(r"\S+/lib\S+", said.splitlines()[-1])}
        for name in (*LIBRARIES, "libc_nonshared.a"):
            shutil.copy(linked[name], folder)
    for name in LIBRARIES[1:]:
        link = folder / name[: name.index(".so") + 3]
        link.unlink(missing_ok=True)
        link.symlink_to(name)
    (folder / "libc.so").write_text("GROUP ( libc.so.6 libc_nonshared.a libld.so.2 )\n")


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]))
