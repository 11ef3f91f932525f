#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Build the wheel once, then load and use it under the oldest and the newest torch and every supported Python.
# Downloads gigabytes: not part of `make test`. Run from the repository root in an environment with torch and nvcc.
set -eu

dist=$(mktemp -d)
trap 'rm -rf "$dist"' EXIT
python -m pip wheel --no-build-isolation --no-deps -w "$dist" .

for torch in 2.11.0 2.15.0; do
    for python in 3.11 3.12 3.13 3.14; do
        echo "== torch $torch, Python $python"
        "python$python" -m venv "$dist/venv"
        "$dist/venv/bin/python" -m pip install --quiet "torch==$torch" "$dist"/mpkernels-*-abi3-*.whl
        # From elsewhere: the sources here must not shadow what was installed.
        (cd "$dist" && venv/bin/python -m mpkernels)
        rm -rf "$dist/venv"
    done
done
