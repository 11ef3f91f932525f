#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that needs a GPU, in one call of less than 9 minutes: no network, no venv, the python3 that has torch.
#
#   bench/device.sh [--out DIR] [--list] [part ...]
#
# DIR (default bench/results) gets a log per part, rows as *.jsonl, and device.txt with the outcome of each. A part that
# passed is not run again: delete its line in device.txt, or name the part, to do so. Exit code 1 if a part failed.
# shellcheck disable=SC2329 # the parts are called by name
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

PARTS=(build probes report gemm step sanitizer tune bench)
SECONDS_FOR="build=160 probes=60 report=60 gemm=150 step=90 sanitizer=60 tune=75 bench=150"
BUDGET=520 # seconds in all; a part that would begin later says so and waits for the next call

out=bench/results
list=
chosen=()
while [ $# -gt 0 ]; do
  case $1 in
    --out) out=${2:?--out needs a folder}; shift ;;
    --list) list=1 ;;
    -*) echo "usage: bench/device.sh [--out DIR] [--list] [part ...]; parts: ${PARTS[*]}" >&2; exit 2 ;;
    *) [[ " ${PARTS[*]} " == *" $1 "* ]] || { echo "no part $1; parts: ${PARTS[*]}" >&2; exit 2; }; chosen+=("$1") ;;
  esac
  shift
done

python=${PYTHON:-python3}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 MAX_JOBS=${MAX_JOBS:-16}
export CUBLAS_WORKSPACE_CONFIG=:4096:8 # what torch asks for where tests turn deterministic algorithms on

pytest_gpu() { # as many processes as share a GPU well, where pytest-xdist is there
  local several=()
  "$python" -c "import xdist" 2>/dev/null && several=(-n 8)
  "$python" -m pytest -q -p no:cacheprovider "${several[@]}" "$@"
}

part_build() { "$python" setup.py -q build_ext --inplace; }
part_probes() { "$python" tests/device/probes.py --out "$out/sm90_probes.npz"; }
part_report() { "$python" -m mpkernels; }
part_gemm() { pytest_gpu -m "not sweep" -k "cuda or gpu or triton" tests/test_linear_act*.py; }
part_step() {
  pytest_gpu -m "not sweep" -k "cuda or triton" tests/test_{adamw,sgd,grad_stats,update_scale,step_triton,optim,amp}.py
}
part_sanitizer() {
  command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not installed"; return 1; }
  local backend tool
  for backend in native triton; do
    for tool in memcheck racecheck; do
      echo "== $tool, $backend"
      compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -m bench.sanitize "$backend" || return 1
    done
  done
}
part_tune() {
  "$python" -m mpkernels tune --package --rounds 15 --shapes 4096,1024,4096 4096,4096,4096 &&
    cp mpkernels/tuned/*.json "$out/"
}
part_bench() { "$python" -m bench --quick --json --out "$out"; }

if [ -n "$list" ]; then
  for part in "${PARTS[@]}"; do echo "$part: $(declare -f "part_$part" | sed '1,2d;$d' | tr -s ' \n' ' ')"; done
  exit 0
fi

mkdir -p "$out"
done_file=$out/device.txt
touch "$done_file"
commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
gpu=$("$python" -c "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')" 2>/dev/null)
failed=0

run() { # part
  local part=$1 limit began=$SECONDS code
  limit=$(sed -E "s/.*\b$part=([0-9]+).*/\1/" <<<"$SECONDS_FOR")
  if [ ${#chosen[@]} -eq 0 ] && grep -q "^$part: passed, .* $commit\$" "$done_file"; then
    echo "$part: passed before"
    return
  fi
  if [ -z "$gpu" ] && [ "$part" != build ]; then
    echo "$part: there is no GPU"
    failed=1
    return
  fi
  if ((SECONDS + limit > BUDGET)); then
    echo "$part: no time left, call again"
    failed=1
    return
  fi
  export -f "part_$part" pytest_gpu
  export python out
  timeout --kill-after=5 "$limit" bash -c "part_$part" >"$out/$part.log" 2>&1
  code=$?
  sed -i "/^$part: /d" "$done_file"
  if [ $code -eq 0 ]; then
    echo "$part: passed, $((SECONDS - began)) s, $gpu, $commit" | tee -a "$done_file"
  else
    echo "$part: FAILED ($code), $((SECONDS - began)) s, $gpu, $commit" | tee -a "$done_file"
    tail -n 15 "$out/$part.log"
    failed=1
  fi
}

[ ${#chosen[@]} -gt 0 ] && selected=("${chosen[@]}") || selected=("${PARTS[@]}")
for part in "${selected[@]}"; do run "$part"; done
exit $failed
