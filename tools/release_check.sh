#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Install the wheel in dist/ with every supported torch under every Python that is here, and run the tests of ops and layers from
# it, outside the checkout. Downloads gigabytes: part of `make release`. For less: PYTHONS=3.11 TORCHES=2.13.0 TESTS=tests/nn.
# A pair without a torch is left out, and said; exit 1 where tests fail or no pair was tested.
set -u

root=$(cd "$(dirname "$0")/.." && pwd)
wheel=$(ls "$root"/dist/mpkernels-*-abi3-*.whl) || { echo "run make wheel first" >&2; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tests="pytest pytest-xdist pytest-timeout hypothesis expecttest ml_dtypes"

# What the tests import of the checkout; nothing that would stand before the installed package.
mkdir "$work/outside"
cp -r "$root/tests" "$root/bench" "$root/csrc" "$root/docs" "$root/pyproject.toml" "$work/outside"

# Tests on one torch under one Python, from an environment of their own; prints one line of what came of it.
check() {
    rm -rf "$work/venv"
    "python$1" -m venv "$work/venv" 2>"$work/log" || { echo "no Python $1"; return; }
    sed "/^triton==/d; /^setuptools==/d; s/^torch==.*/torch==$2/" "$root/constraints.txt" >"$work/constraints.txt"
    # shellcheck disable=SC2086
    if ! "$work/venv/bin/python" -m pip install -c "$work/constraints.txt" "$wheel" $tests >"$work/log" 2>&1; then
        grep -q "No matching distribution found for torch" "$work/log" && { echo "no torch $2"; return; }
        tail -n 20 "$work/log" >&2
        echo "FAILED to install"
        return
    fi
    if ! (cd "$work/outside" && "$work/venv/bin/python" -m mpkernels && "$work/venv/bin/python" -m pytest -n "${MAX_JOBS:-2}" \
        ${TESTS:-tests/ops tests/nn} -m "not sweep and not release") >"$work/log" 2>&1; then
        tail -n 50 "$work/log" >&2
        printf "FAILED: "
    fi
    tail -n 1 "$work/log"
}

for torch in ${TORCHES:-2.11.0 2.13.0 2.15.0}; do
    for python in ${PYTHONS:-3.11 3.12 3.13 3.14}; do
        echo "torch $torch, Python $python: $(check "$python" "$torch")" | tee -a "$work/table"
    done
done
printf "\n%s\n" "$(basename "$wheel")" && cat "$work/table"
grep -q passed "$work/table" && ! grep -q FAILED "$work/table"
