#!/usr/bin/env bash
# Scaling over the GPUs of one machine: the sweep spread, data parallel and latent sharding, strong and weak.
#
#     benchmarks/scale.sh [--dry-run]
#
# Prints rows for RESULTS.md; --dry-run prints the commands instead. Everything is set by variables:
#
#     DEVICE    auto (default), or cpu: then processes exchange through gloo, on one thread each
#     COUNTS    numbers of processes; default 1 2 4 8 as far as there are GPUs (or cores)
#     MODES     sweep data latents (default)
#     RECIPE    a recipe of one dictionary that data and latents divide; default: a CLT of the bundled model
#     STEPS     steps of the shorter run (default 50); the longer one does five times as many
#     PYTHON    the interpreter of an environment with thresher; default python
#
# A step's time is that of the longer run less that of the shorter one, over the steps between them: starting up,
# harvesting and the end cancel out. Strong: the same work for all numbers of processes, 1 being ideal. Weak: the batch
# (data) or the number of latents (latents) grows with them, and the time of one process over that of n is ideal at 1.

set -euo pipefail

DEVICE=${DEVICE:-auto}
MODES=${MODES:-sweep data latents}
STEPS=${STEPS:-50}
PYTHON=${PYTHON:-python}
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

if [[ $DEVICE == cpu ]]; then
    export OMP_NUM_THREADS=1
    available=$(nproc)
    batch=1024 latents=2048
else
    available=$( (nvidia-smi -L 2>/dev/null || true) | wc -l)
    batch=8192 latents=65536
fi
if [[ -z ${COUNTS:-} ]]; then
    COUNTS=1
    for count in 2 4 8; do
        if ((count <= available)); then COUNTS+=" $count"; fi
    done
fi

dry=0
case ${1:-} in
    --dry-run) dry=1 ;;
    "") ;;
    *)
        echo "usage: $0 [--dry-run]" >&2
        exit 2
        ;;
esac

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if [[ -z ${RECIPE:-} ]]; then
    RECIPE=$folder/clt.toml
    cat >"$RECIPE" <<'END'
[target]
model = "bundled:books-128"
[data]
source = "bundled:books"
context = 256
[harvest]
sites = ["mlp_in", "mlp_out"]
[dictionary]
kind = "clt"
firing = "batchtopk"
k = 16
n_latents = 1024
END
fi

# Do a command, its output into the log, or print it.
run() {
    if ((dry)); then
        printf '%q ' "$@"
        printf '\n'
    elif ! "$@" >>"$folder/log" 2>&1; then
        tail -n 20 "$folder/log" >&2
        echo "failed: $*" >&2
        exit 1
    fi
}

# Train for so many steps on so many processes: count, steps, further overrides.
train() {
    local count=$1 steps=$2 words=()
    shift 2
    for set in "train.steps=$steps" "train.checkpoint_every=1000000" "train.calibrate_rows=10000" \
        "train.heldout_rows=10000" "train.batch_rows=$batch" "dictionary.n_latents=$latents" "$@"; do
        words+=(--set "$set")
    done
    run "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$count" -m thresher train "$RECIPE" \
        --cache "$folder/cache.zarr" --runs "$folder/runs-$RANDOM$RANDOM" --device "$DEVICE" "${words[@]}"
}

# Seconds of one step: count, further overrides.
step_seconds() {
    local count=$1 start middle
    shift
    start=$(date +%s.%N)
    train "$count" "$STEPS" "$@"
    middle=$(date +%s.%N)
    train "$count" $((5 * STEPS)) "$@"
    seconds=$(awk -v a="$start" -v b="$middle" -v c="$(date +%s.%N)" -v n="$STEPS" \
        'BEGIN { print ((c - b) - (b - a)) / (4 * n) }')
}

# A row: mode, scaling, count, and how many times one process's time is ideal.
row() {
    if ((dry)); then return; fi
    if [[ $(awk -v s="$seconds" 'BEGIN { print (s > 0) }') == 0 ]]; then
        echo "$1, $2, $3 processes: the runs are too short for their difference to tell. Set STEPS higher." >&2
        exit 1
    fi
    awk -v mode="$1" -v scaling="$2" -v count="$3" -v one="$4" -v seconds="$seconds" 'BEGIN {
        ideal = scaling == "strong" ? one / count : one
        printf "| %s | %s | %d | %.2f | %.2f |\n", mode, scaling, count, 1000 * seconds, ideal / seconds }'
}

# Strong and weak scaling of one key of [parallel]: mode, the key that grows, its size for one process.
divided() {
    local mode=$1 grows=$2 size=$3 one scaling sets
    for scaling in strong weak; do
        for count in $COUNTS; do
            sets=()
            if ((count > 1)); then sets+=("parallel.$mode=$count"); fi
            if [[ $scaling == weak ]]; then sets+=("$grows=$((size * count))"); fi
            step_seconds "$count" "${sets[@]}"
            if [[ $count == "${COUNTS%% *}" ]]; then one=$seconds; fi
            row "$mode" "$scaling" "$count" "$one"
        done
    done
}

seconds=0
if [[ " $MODES " == *" sweep "* ]]; then
    for count in $COUNTS; do
        if ((count > 1)); then
            if ((dry)); then
                run "$PYTHON" "$HERE/scale.py" --processes "$count" --device "$DEVICE"
            else
                "$PYTHON" "$HERE/scale.py" --processes "$count" --device "$DEVICE"
            fi
        fi
    done
fi
if [[ $MODES != sweep ]]; then
    run "$PYTHON" -m thresher harvest "$RECIPE" --cache "$folder/cache.zarr" --device "$DEVICE"
    train 1 2 # compiles kernels, and does not count
    ((dry)) || printf '| divided | scaling | processes | ms a step | of ideal |\n|---|---|---|---|---|\n'
fi
for mode in $MODES; do
    case $mode in
        sweep) ;;
        data) divided data train.batch_rows "$batch" ;;
        latents) divided latents dictionary.n_latents "$latents" ;;
        *)
            echo "MODES has $mode; expected sweep, data or latents" >&2
            exit 2
            ;;
    esac
done
