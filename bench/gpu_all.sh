#!/usr/bin/env bash
# Everything that needs a card, in one go: gpu tests, every op's bench, Table 7, launch tuning.
#
#   bench/gpu_all.sh [OUTPUT]        results as small files in OUTPUT [bench/results/gpu]
#
# Under 20 minutes: each step has a time limit, and none starts past BUDGET_S [1140] seconds. What
# succeeded is skipped when it is run again; --again as the second argument repeats it all. Without a
# card every step is skipped and named. PYTHON [python3] is the interpreter that has the package.
set -uo pipefail

cd "$(dirname "$0")/.." || exit 1
OUTPUT=${1:-bench/results/gpu}
AGAIN=${2:-}
PYTHON=${PYTHON:-python3}
BUDGET_S=${BUDGET_S:-1140}
STARTED=$SECONDS
FAILED=0

export TRITON_DEFAULT_FP_FUSION=1
mkdir -p "$OUTPUT/done" "$OUTPUT/logs" || exit 1
if [[ $AGAIN == --again ]]; then rm -f "$OUTPUT"/done/*; fi

has_card() { "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; }
has_module() { "$PYTHON" -c "import importlib.util, sys; sys.exit(not importlib.util.find_spec('$1'))"; }

# say NAME RESULT SECONDS: a line on the screen and in steps.tsv
say() {
    printf '%-32s %-28s %5s s\n' "$1" "$2" "$3"
    printf '%s\t%s\t%s\t%s\n' "$(date -u +%FT%TZ)" "$1" "$2" "$3" >>"$OUTPUT/steps.tsv"
}

# step NAME LIMIT_S COMMAND...: run it unless it was done, its output in logs/NAME.txt
step() {
    local name=$1 limit=$2 left=$((BUDGET_S - SECONDS + STARTED)) begun=$SECONDS status
    shift 2
    if [[ -e $OUTPUT/done/$name ]]; then say "$name" "skipped: done before" 0; return; fi
    if [[ $CARD == no ]]; then say "$name" "skipped: no CUDA device" 0; return; fi
    if ((left < 2)); then say "$name" "skipped: no time left" 0; FAILED=1; return; fi
    timeout --kill-after=10 $((limit < left ? limit : left)) "$@" >"$OUTPUT/logs/$name.txt" 2>&1
    status=$?
    case $status in
    0) say "$name" ok $((SECONDS - begun)); touch "$OUTPUT/done/$name" ;;
    124 | 137) say "$name" "out of time" $((SECONDS - begun)); FAILED=1 ;;
    *) say "$name" "failed ($status)" $((SECONDS - begun)); FAILED=1 ;;
    esac
}

if ! "$PYTHON" -c 'import torch, spt_kernels'; then
    echo "$PYTHON cannot import torch and spt_kernels: set PYTHON to an interpreter that can" >&2
    exit 2
fi
CARD=no
if has_card; then CARD=yes; fi

{
    date -u +%FT%TZ
    git rev-parse HEAD 2>/dev/null
    "$PYTHON" -c 'import platform, torch; print(platform.python_version(), torch.__version__)'
    if [[ $CARD == yes ]]; then
        nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,power.limit --format=csv
        "$PYTHON" -c 'import torch; print(torch.cuda.get_device_properties(0))'
    fi
} >"$OUTPUT/machine.txt" 2>&1

# table7 DTYPE LIMIT_S ...: rows of the cost table, each kept as soon as it is measured
table7() {
    local dtype=$1 limit=$2
    shift 2
    step "table7-$dtype" "$limit" "$PYTHON" -m spt_kernels.cli bench table7 --device cuda \
        --dtype "$dtype" --output "$OUTPUT" "$@"
}

# bench NAME: one bench, whose results stay if a later one fails
bench() {
    step "bench-${1//_/-}" 120 "$PYTHON" -m pytest -q "bench/bench_$1.py" --benchmark-only \
        --benchmark-quiet --results "$OUTPUT"
}

# the right answers first; then what the package is judged by; then what decides the design of the
# sparse weight gradient; bench_real_memory is of the CPU
step tests-kernels 240 "$PYTHON" -m pytest -q -m gpu tests/ops
table7 fp32 270
step ways-and-launches 180 "$PYTHON" -m bench.tune_launches --json "$OUTPUT/launches.json"
if has_module pytest_benchmark; then
    for name in sparse_weight_grad training_step sparse_adamw squared_grad; do bench "$name"; done
else
    say benches "skipped: no pytest-benchmark" 0
fi
MOST=full,lora-16,spt-lora-structured,spt-lora,spt-adapter,spt-unstructured,dense-gradient
table7 bf16-autocast 150 --methods "$MOST"
step tests-rest 120 "$PYTHON" -m pytest -q -m gpu \
    tests/memory tests/optim tests/task
if has_module pytest_benchmark; then
    for name in sensitivity top_tau rebuild_input swap; do bench "$name"; done
fi
table7 bf16 150 --methods "$MOST"
if [[ $CARD == yes ]]; then
    ARCH=$("$PYTHON" -c 'import torch; print("sm_%d%d" % torch.cuda.get_device_capability())')
    case $ARCH in
    sm_80 | sm_86 | sm_90)
        step examine 200 "$PYTHON" -m bench.examine_kernels --arch "$ARCH" \
            --json "$OUTPUT/kernels-$ARCH.json" ;;
    *) say examine "skipped: $ARCH is not shipped for" 0 ;;
    esac
else
    step examine 200 true
fi

echo "results in $OUTPUT after $((SECONDS - STARTED)) s"
exit "$FAILED"
