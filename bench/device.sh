#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What only a GPU can decide, the most decisive first: no network, no venv, the python3 that has torch.
#
#   bench/device.sh [--out DIR] [--list] [first|second|part ...]
#
# Each part is a process of its own with a time limit, and says one line as it ends: one that hangs, or leaves the GPU in
# an error, costs the others nothing. DIR (default bench/out/device) gets log.tgz, probes.npz, rows.jsonl, verdicts.json and
# device.txt, the lines, all of them after every part. What passed is not run again while the sources are the same: name it,
# or delete its line in device.txt, to do so. Exit code 1 if a part did not pass.
# shellcheck disable=SC2329 # the parts are called by name
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

FIRST=(build prove probes sweep race step) # 300 s
SECOND=(replay native triton memcheck)     # 195 s
PARTS=("${FIRST[@]}" "${SECOND[@]}")
declare -A SECONDS_FOR=([build]=90 [prove]=60 [probes]=30 [sweep]=45 [race]=35 [step]=40)
SECONDS_FOR+=([replay]=35 [native]=55 [triton]=60 [memcheck]=45)
GRACE=5 # seconds between the signal that asks a part to end and the one that ends it

out=bench/out/device
list=
chosen=()
while [ $# -gt 0 ]; do
  case $1 in
    --out) out=${2:?--out needs a folder}; shift ;;
    --list) list=1 ;;
    first) chosen+=("${FIRST[@]}") ;;
    second) chosen+=("${SECOND[@]}") ;;
    -*) echo "usage: bench/device.sh [--out DIR] [--list] [first|second|part ...]; parts: ${PARTS[*]}" >&2; exit 2 ;;
    *) [[ " ${PARTS[*]} " == *" $1 "* ]] || { echo "no part $1; parts: ${PARTS[*]}" >&2; exit 2; }; chosen+=("$1") ;;
  esac
  shift
done

python=${PYTHON:-python3}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 MAX_JOBS=${MAX_JOBS:-16}
export CUBLAS_WORKSPACE_CONFIG=:4096:8 # what torch asks for where tests turn deterministic algorithms on

pytest_gpu() { # processes, then arguments; in one process where pytest-xdist is absent. Skipped is not passed
  local several=()
  "$python" -c "import xdist" 2>/dev/null && several=(-n "$1")
  shift
  "$python" -m pytest -p no:cacheprovider --durations=0 "${several[@]}" "$@" && grep -q '[0-9] passed' "$log"
}

# The library that is there, where it runs on this GPU; else one for Hopper alone.
part_build() {
  local why_not="import torch; from mpkernels.runtime import native; print(native.cuda_why_not(torch.device('cuda')) or 'loads')"
  local found
  found=$("$python" -c "$why_not" | tail -n 1)
  [ "$found" = loads ] && { echo "the library that is there loads"; return; }
  echo "$found: building one"
  TORCH_CUDA_ARCH_LIST=9.0a "$python" setup.py -q build_ext --inplace && "$python" -c "$why_not" | tail -n 1 | grep -x loads
}
part_prove() { # `python -m mpkernels prove`, but an implementation that says nothing for 20 s is given up
  "$python" -c "
import importlib, runpy, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that it ends the process that proves
importlib.import_module('mpkernels.prove').LIMIT = 20.0
runpy.run_module('mpkernels', run_name='__main__')" prove --out "$out/verdicts.json"
}
part_probes() { "$python" tests/device/probes.py --out "$out/probes.npz"; }
part_sweep() { "$python" -m tests.device.sweep --rows "$out/rows.jsonl"; }
part_race() { "$python" -m bench.race gemm --rows "$out/rows.jsonl"; }
part_step() { MPKERNELS_BACKEND=grad_stats_=native,adamw_=native,update_scale_=native "$python" -m bench.race step --rows "$out/rows.jsonl"; }
part_replay() { pytest_gpu 0 -m gpu -k native tests/ops/optimizer_update/test_step_gpu.py; }
part_native() { # what is generated is in the sweep
  pytest_gpu 8 -m "not sweep and not release" -k "not generated and not triton and (native and gpu or cuda and (hopper or native))" \
    tests/ops/{linear_act/test_{linear_act_gpu,sm90},optimizer_update/test_{rules,skips,state_dtype},grad_stats/test_grad_stats,update_scale/test_update_scale}.py
}
part_triton() { # each of these compiles kernels of its own; none takes the time
  pytest_gpu 16 -m gpu -k "triton and not generated and not pass_2 and not almost" tests/ops/linear_act/test_linear_act_gpu.py tests/ops/optimizer_update/test_step_gpu.py
}
part_memcheck() { # without torch's cache of memory every tensor ends where its allocation ends
  command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not installed"; return 1; }
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 "$python" -m bench.sanitize native
}

if [ -n "$list" ]; then
  for part in "${PARTS[@]}"; do
    echo "$part, ${SECONDS_FOR[$part]} s: $(declare -f "part_$part" | sed '1,2d;$d' | tr -s ' \n' ' ')"
  done
  exit 0
fi

mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
done_file=$out/device.txt
logs=$(mktemp -d) || exit 1
trap 'rm -rf "$logs"' EXIT
touch "$done_file"
[ -f "$out/log.tgz" ] && tar -xzf "$out/log.tgz" -C "$logs"
# A checksum of what is run: a commit says nothing of a changed tree, and there may be no git.
sources=$(find csrc mpkernels tests bench setup.py -type f \( -name '*.py' -o -name '*.sh' -o -name '*.c[cpu]*' -o -name '*.h' \) \
  -not -path '*/__pycache__/*' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -c1-12)
gpu=$(timeout 60 "$python" -c "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')" 2>/dev/null)
failed=0

run() { # part
  local part=$1 limit=${SECONDS_FOR[$1]} began=$SECONDS code outcome said log=$logs/$1.log
  if [ ${#chosen[@]} -eq 0 ] && grep -q "^$part: passed, .* of $sources:" "$done_file"; then
    echo "$part: passed before"
    return
  fi
  if [ -z "$gpu" ]; then
    echo "$part: there is no GPU"
    failed=1
    return
  fi
  export -f "part_$part" pytest_gpu
  export python out log
  timeout --kill-after="$GRACE" "$limit" bash -c "part_$part" >"$log" 2>&1 </dev/null
  code=$?
  case $code in
    0) outcome=passed ;;
    124 | 137) outcome="CUT OFF" ;;
    *) outcome="FAILED ($code)" ;;
  esac
  [ "$outcome" = passed ] || failed=1
  said=$(grep -v '^[[:space:]]*$' "$log" | tail -n 1 | cut -c1-160)
  sed -i "/^$part: /d" "$done_file"
  echo "$part: $outcome, $((SECONDS - began)) s, $gpu, of $sources: $said" | tee -a "$done_file"
  tar -czf "$out/log.tgz.new" -C "$logs" . && mv "$out/log.tgz.new" "$out/log.tgz"
}

[ ${#chosen[@]} -gt 0 ] && selected=("${chosen[@]}") || selected=("${PARTS[@]}")
for part in "${selected[@]}"; do run "$part"; done
exit $failed
