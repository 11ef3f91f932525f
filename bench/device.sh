#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that needs a GPU, in one call of less than 9 minutes: no network, no venv, the python3 that has torch.
#
#   bench/device.sh [--out DIR] [--list] [part ...]
#
# DIR (default bench/results) gets a log per part, rows as *.jsonl, and device.txt with the outcome of each. A part that
# passed is not run again: delete its line in device.txt, or name the part, to do so. Exit code 1 if a part failed or has
# still to run: call again then; benchmarks go on behind the last case of this commit that has rows. Where the library was
# built before, on any machine with this torch and nvcc, `build` takes seconds. What is worth most comes first.
# shellcheck disable=SC2329 # the parts are called by name
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

PARTS=(build probes report gemm shapes_native shapes_triton step bench_native bench_triton bench_step sanitizer tune bench)
# Seconds that a part may take; what is left of the budget, where that is less.
SECONDS_FOR="build=160 probes=60 report=60 gemm=100 shapes_native=60 shapes_triton=150 step=90 bench_native=120 "
SECONDS_FOR+="bench_triton=120 bench_step=60 sanitizer=180 tune=90 bench=150"
BUDGET=520 # seconds in all
LEAST=20   # seconds without which a part is not begun

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
part_gemm() { pytest_gpu -m "not sweep" -k "(cuda or gpu or triton) and not generated" tests/test_linear_act*.py; }
part_shapes_native() { pytest_gpu -k "generated_shapes and not triton" tests/test_linear_act_gpu.py; }
part_shapes_triton() { pytest_gpu -k "generated_shapes and triton" tests/test_linear_act_gpu.py; }
part_step() {
  pytest_gpu -m "not sweep" -k "cuda or triton or gpu" \
    tests/test_{adamw,sgd,grad_stats,update_scale,step_triton,step_gpu,optim,amp}.py
}
part_sanitizer() { # without torch's cache of memory every tensor ends where its allocation ends, and begins unwritten
  command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not installed"; return 1; }
  local backend tool failed=0
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for backend in native triton; do
    for tool in memcheck racecheck initcheck; do
      echo "== $tool, $backend"
      compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -m bench.sanitize "$backend" || failed=1
    done
  done
  return $failed
}
part_tune() {
  "$python" -m mpkernels tune --package --rounds 15 --shapes 4096,1024,4096 4096,4096,4096 &&
    cp mpkernels/tuned/*.json "$out/"
}
# Rows of one backend's GEMM, and of what its calls cost the host; with sizes that `native` takes, which are even here.
bench_gemm() {
  export MPKERNELS_BACKEND=linear_act=$1,linear_act_backward=$1
  "$python" -m bench --quick --missing --op overhead --case "overhead/forward*" --out "$out/cuda-$1.jsonl" &&
    "$python" -m bench --quick --missing --op linear_act --op mlp --case "*[02468]" --out "$out/cuda-$1.jsonl"
}
part_bench_native() { bench_gemm native; }
part_bench_triton() { bench_gemm triton; }
part_bench_step() {
  export MPKERNELS_BACKEND=grad_stats_=native,adamw_=native,sgd_=native,update_scale_=native
  "$python" -m bench --quick --missing --op step --out "$out/cuda-step.jsonl"
}
part_bench() { "$python" -m bench --quick --missing --op training --op overhead --out "$out"; }

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
  ((limit > BUDGET - SECONDS)) && limit=$((BUDGET - SECONDS))
  if ((limit < LEAST)); then
    echo "$part: no time left, call again"
    failed=1
    return
  fi
  export -f "part_$part" pytest_gpu bench_gemm
  export python out
  timeout --kill-after=5 "$limit" bash -c "part_$part" >"$out/$part.log" 2>&1
  code=$?
  sed -i "/^$part: /d" "$done_file"
  if [ $code -eq 124 ]; then
    echo "$part: cut off after $limit s, call again" | tee -a "$done_file"
    failed=1
  elif [ $code -eq 0 ]; then
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
