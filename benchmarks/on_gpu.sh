#!/usr/bin/env bash
# One stage on a GPU, from a bare checkout: bash benchmarks/on_gpu.sh STAGE [--again] [--dry-run]
#
#   first     what a new card is asked first, in eight minutes: benchmarks/first/__main__.py, [--minutes M] [--dry-run]
#   floors    what the card can do: bandwidth, products, launches, graph nodes, grid barriers
#   tests     the gpu lane, then as much of the rest of the suite as there is time for
#   kernels   every op beside its peers, and how its time grows
#   sweep     launch constants
#   train     training steps, their memory
#   decode    generation, time to the first token, the cost of one more token
#   profile   steps by part, ncu on the kernels furthest from their floors; clocks as they are
#
# Records go to $OUT where it is set, else to benchmarks/results/<gpu>/. A stage stops by itself within nine minutes, leaves what it
# has, and goes on there when it is called again; records of an earlier call in benchmarks/results/<gpu>/ are taken up.
# --dry-run, without a GPU, runs the same code at tiny sizes in Triton's interpreter.
set -euo pipefail
[ -z "${OUT:-}" ] || OUT=$(realpath -m "$OUT")
cd "$(dirname "$0")/.."
stage=${1:?"usage: bash benchmarks/on_gpu.sh first|floors|tests|kernels|sweep|train|decode|profile [--again] [--dry-run]"}
shift
python=${PYTHON:-python3}
export PYTHONPATH=.:kernels PYTHONUNBUFFERED=1
[ "$stage" != first ] || exec "$python" -m benchmarks.first ${OUT:+--out "$OUT"} "$@"
dry= again=
for option in "$@"; do
  case $option in
    --dry-run) dry=--dry-run TRITON_INTERPRET=1 && export TRITON_INTERPRET ;;
    --again) again=1 ;;
    *) echo "unknown option $option" >&2 && exit 2 ;;
  esac
done

machine=$("$python" -c 'from benchmarks.harness.record import machine_name; print(machine_name())')
kept=benchmarks/results/$machine
[ -n "$dry" ] && kept=$(mktemp -d)/$machine
out=${OUT:-$kept}
mkdir -p "$out" && rm -f "$out/$stage.log"
kinds=("floors.json" "$stage.json")
[ "$stage" != profile ] || kinds+=(kernels.json)
[ "$stage" != tests ] || kinds=(passed-gpu.txt passed-rest.txt)
for file in "${kinds[@]}"; do # what an earlier call left: gone on with, or read
  if [ "$out" != "$kept" ] && [ -f "$kept/$file" ] && [ ! -f "$out/$file" ]; then cp "$kept/$file" "$out/"; fi
done

suite() { # benchmarks of a group, within so many seconds; in a new process where one lost the device
  local left keep=
  while left=$(($2 - SECONDS)) && [ "$left" -gt 20 ]; do
    status=0
    timeout $((left + 50)) "$python" -m pytest benchmarks --only="$1" --minutes="$((left / 60)).$((left % 60 * 10 / 60))" --out="$out" \
      --no-report --quiet --benchmark-quiet -p no:cacheprovider --tb=line $keep "${@:3}" >>"$out/$stage.log" 2>&1 || status=$?
    [ $status = 77 ] || break
    keep=--keep-failures
  done
  grep -E '^(FAILED|ERROR|[0-9]+ (passed|failed|skipped))' "$out/$stage.log" | cut -c1-200 || true
  "$python" -m benchmarks.report "$out" --summary "$1"
}

checked() { # tests with a mark that no earlier call saw pass, begun within so many seconds
  local failed=0
  [ "$again" ] && rm -f "$out/passed-$1.txt"
  timeout $(($2 + 30)) "$python" -m pytest -p benchmarks.harness.resumed --passed="$out/passed-$1.txt" --until="$2" "${@:4}" -m "$3" --quiet \
    --tb=short -p no:cacheprovider --continue-on-collection-errors >"$out/tests-$1.log" 2>&1 || failed=$?
  [ $failed = 0 ] || [ $failed = 5 ] || status=$failed # 5: nothing left to run
}

status=0
case $stage in
  floors) "$python" -m benchmarks.harness.floors --out "$out" "$@" ;;
  tests)
    rm -f "$out"/tests-*.log
    lane=(tests) engine=(tests/inference/test_engine.py tests/inference/test_same_answers.py tests/kernels/test_gpt.py) rest=(tests)
    [ -n "$dry" ] && lane=(tests/kernels/test_gelu.py) && engine=(tests/inference/test_speculation.py) && rest=(tests/inference/test_sampling.py)
    checked gpu 300 gpu "${lane[@]}"
    checked engine $((420 - SECONDS)) "not gpu" "${engine[@]}"
    checked rest $((500 - SECONDS)) "not gpu" "${rest[@]}"
    tail -n 40 "$out/tests-gpu.log" | cut -c1-200
    tail -n 15 "$out/tests-engine.log" | cut -c1-200
    tail -n 15 "$out/tests-rest.log" | cut -c1-200
    ;;
  kernels) suite kernels 480 "$@" ;;
  sweep) "$python" -m benchmarks.sweep --out "$out" --minutes 7 "$@" ;;
  train) suite train 430 "$@" ;;
  decode) suite decode 450 "$@" ;;
  profile) timeout 520 "$python" -m benchmarks.profiling --out "$out" "$@" ;;
  *) echo "unknown stage $stage" >&2 && exit 2 ;;
esac
exit $status
