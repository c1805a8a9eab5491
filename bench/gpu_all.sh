#!/usr/bin/env bash
# Everything that needs a card, in calls of at most six minutes, what decides most first.
#
#   bench/gpu_all.sh first  [OUTPUT]   install, a profile of every way of a step, gpu tests, ops
#   bench/gpu_all.sh second [OUTPUT]   a LoRA's blocks, the cost table, captured, compiled, peers
#   bench/gpu_all.sh rest   [OUTPUT]   where there is more time: launch tuning, compiled code, all rows
#
# Results are small files in OUTPUT [bench/results/gpu], written as they come. Each part has a time
# limit and none starts past BUDGET_S [350] seconds. What was done is left alone when it is called
# again, also half a table; --again as the last argument repeats it all. A part that fails stops no
# other. PYTHON [python3] is the interpreter that has the package. DEVICE=cpu tries it all on a tiny
# model without a card; DEVICE [cuda] without a card skips every part and names it.
set -uo pipefail

cd "$(dirname "$0")/.." || exit 1
CALL=${1:-}
case $CALL in first | second | rest) ;; *) sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2 ;; esac
OUTPUT=${2:-bench/results/gpu}
AGAIN=${3:-}
if [[ $OUTPUT == --again ]]; then OUTPUT=bench/results/gpu AGAIN=--again; fi
PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}
BUDGET_S=${BUDGET_S:-350}
STARTED=$SECONDS
declare -A RESULTS=()

export TRITON_DEFAULT_FP_FUSION=1 SPT_KERNELS_RATES=
mkdir -p "$OUTPUT/done" "$OUTPUT/logs" || exit 1
if [[ $AGAIN == --again ]]; then rm -f "$OUTPUT/done/$CALL"-*; fi

has_card() { "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; }
has_module() { "$PYTHON" -c "import importlib.util, sys; sys.exit(not importlib.util.find_spec('$1'))"; }

# say NAME RESULT SECONDS: a line on the screen and in parts.tsv
say() {
    printf '%-32s %-28s %5s s\n' "$1" "$2" "$3"
    printf '%s\t%s\t%s\t%s\n' "$(date -u +%FT%TZ)" "$1" "$2" "$3" >>"$OUTPUT/parts.tsv"
    RESULTS[${2%%[:(]*}]+=" $1"
}

# part NAME LIMIT_S COMMAND...: run it unless it was done, its output in logs/NAME.txt
part() {
    local name=$1 limit=$2 left=$((BUDGET_S - SECONDS + STARTED)) begun=$SECONDS status
    shift 2
    if [[ -e $OUTPUT/done/$CALL-$name ]]; then say "$name" "skipped: done before" 0; return; fi
    if [[ $CARD == no ]]; then say "$name" "skipped: no CUDA device" 0; return; fi
    if [[ $DEVICE == cpu ]]; then limit=$((5 * limit)); fi # however busy it is
    if ((left < 2)); then say "$name" "not begun: no time left" 0; return; fi
    timeout --kill-after=10 $((limit < left ? limit : left)) "$@" \
        >"$OUTPUT/logs/$name.txt" 2>"$OUTPUT/logs/$name.err"
    status=$?
    case $status in
    0) say "$name" ok $((SECONDS - begun)); touch "$OUTPUT/done/$CALL-$name" ;;
    124 | 137) say "$name" "out of time" $((SECONDS - begun)) ;;
    *) say "$name" "failed ($status)" $((SECONDS - begun)) ;;
    esac
}

if ! "$PYTHON" -c 'import torch, spt_kernels'; then
    echo "$PYTHON cannot import torch and spt_kernels: set PYTHON to an interpreter that can" >&2
    exit 2
fi
CARD=yes
if [[ $DEVICE != cpu ]] && ! has_card; then CARD=no; fi
{
    date -u +%FT%TZ
    git rev-parse HEAD 2>/dev/null
    "$PYTHON" -c 'import platform, torch; print(platform.python_version(), torch.__version__)'
    if [[ $DEVICE != cpu && $CARD == yes ]]; then
        nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,power.limit --format=csv
    fi
} >"$OUTPUT/machine.txt" 2>&1

# What a step is taken of: on a CPU a model so small that every part is done in a moment
SIZES=(--batch-size 64)
SMALL=(--batch-size 8)
WAYS=full,lora-16,peft-lora-16,spt-lora,spt-unstructured
if [[ $DEVICE == cpu ]]; then
    SIZES=(--model vit_tiny_patch16_224 --model-arg img_size=32 --model-arg patch_size=8)
    SIZES+=(--model-arg depth=2 --model-arg embed_dim=48 --batch-size 2)
    SMALL=("${SIZES[@]}")
    WAYS=full,spt-unstructured
fi

# profiles NAME DTYPE SIZES...: time, memory, kernels, operators and host of every way of a step
profiles() {
    local name=$1 dtype=$2
    shift 2
    part "profiles-$name" 75 "$PYTHON" -m bench.step_profiles --device "$DEVICE" --dtype "$dtype" \
        --output "$OUTPUT/profiles-$name.json" "$@"
}

# table7 NAME LIMIT_S DTYPE STEP METHODS...: rows of a cost table, each kept when it is measured
table7() {
    local name=$1 limit=$2 dtype=$3 how=$4
    shift 4
    part "table7-$name" "$limit" "$PYTHON" -m spt_kernels.cli bench table7 --device "$DEVICE" \
        --dtype "$dtype" --step "$how" --output "$OUTPUT" --resume --quiet "${SIZES[@]}" "$@"
}

# bench NAME CASES SMALLEST: an op beside what it replaces; on a CPU the smallest case alone
bench() {
    local chosen=$2
    if [[ $DEVICE == cpu ]]; then chosen=$3; fi
    part "bench-${1//_/-}" 60 "$PYTHON" -m pytest -q "bench/bench_$1.py" -k "$chosen" \
        --benchmark-only --benchmark-quiet --results "$OUTPUT"
}

first() {
    local workers=() tests=(tests)
    if has_module xdist; then workers=(-n 10 --dist worksteal); fi
    if [[ $DEVICE == cpu ]]; then workers=() tests=(tests/ops/test_top_tau.py); fi
    part install 30 "$PYTHON" -c 'import spt_kernels; print(spt_kernels.backends())'
    profiles autocast-64 bf16-autocast "${SIZES[@]}"
    profiles autocast-8 bf16-autocast "${SMALL[@]}"
    part tests 150 "$PYTHON" -m pytest -q -m gpu "${workers[@]}" "${tests[@]}"
    profiles fp32-64 fp32 "${SIZES[@]}"
    profiles bf16-64 bf16 "${SIZES[@]}"
    if [[ $DEVICE != cpu ]]; then # which has no ways to choose among
        part ways 60 env SPT_KERNELS_RATES="$OUTPUT/rates.json" \
            "$PYTHON" -m spt_kernels.cli bench tune --json --device "$DEVICE"
    fi
    if has_module pytest_benchmark; then
        bench top_tau "85m or allocate" "adversary and descending"
        bench sparse_adamw "04m" "growth_with_width and 384"
        bench sparse_weight_grad "not growth" "growth_with_width and 192"
        bench sensitivity "vit_b16 or peers" "growth_with_the_width and tiny"
        bench squared_grad "not growth" "growth_with_the_width and 192"
        bench rebuild_input "rebuild" "beside_the_forward and layer_norm"
        if [[ $DEVICE != cpu ]]; then # which has no such kernels, and no tiny model to swap in
            bench low_rank "down or up or grad" ""
            bench sparse_norm_grad "norm or bias" ""
            bench swap "swap_vit_b" ""
        fi
    else
        say benches "skipped: no pytest-benchmark" 0
    fi
}

second() {
    if [[ $DEVICE != cpu ]]; then
        part low-rank-blocks 90 "$PYTHON" -m bench.tune_low_rank \
            --json "$OUTPUT/low-rank-blocks.json"
    fi
    table7 autocast 110 bf16-autocast eager --methods "$WAYS,spt-adapter"
    if [[ $DEVICE != cpu ]]; then # whose steps cannot be captured
        table7 captured 90 bf16-autocast captured --methods "$WAYS"
        if has_module pytest_benchmark; then bench captured_step "captured_step_vit_b" ""; fi
    fi
    if has_module pytest_benchmark; then bench adapter "autocast" "fp32"; fi
    table7 compiled 170 bf16-autocast compiled --methods "$WAYS"
    table7 fp32 100 fp32 eager --methods "$WAYS"
    table7 bf16 100 bf16 eager --methods "$WAYS"
    table7 peers 60 bf16-autocast eager --methods peft-shira,peft-super-tuning,peft-lora-all
}

rest() {
    table7 all-fp32 300 fp32 eager
    table7 all-autocast 300 bf16-autocast eager
    table7 all-bf16 300 bf16 eager
    part offload 240 "$PYTHON" -m bench.offload measure --device "$DEVICE" \
        --output "$OUTPUT/offload.json"
    if [[ $DEVICE == cpu || $CARD == no ]]; then return; fi
    part launches 180 "$PYTHON" -m bench.tune_launches --json "$OUTPUT/launches.json"
    local arch
    arch=$("$PYTHON" -c 'import torch; print("sm_%d%d" % torch.cuda.get_device_capability())')
    case $arch in
    sm_80 | sm_86 | sm_90)
        part examine 200 "$PYTHON" -m bench.examine_kernels --arch "$arch" \
            --json "$OUTPUT/kernels-$arch.json" ;;
    *) say examine "skipped: $arch is not shipped for" 0 ;;
    esac
}

"$CALL"

printf '\n%s, results in %s after %s s\n' "$CALL" "$OUTPUT" $((SECONDS - STARTED))
status=0
for result in ok failed "out of time" "not begun" skipped; do
    for known in "${!RESULTS[@]}"; do
        if [[ ${known% } != "$result" ]]; then continue; fi
        printf '  %-12s%s\n' "$result:" "${RESULTS[$known]}"
        case $result in failed | "out of time" | "not begun") status=1 ;; esac
    done
done
exit "$status"
