#!/usr/bin/env bash
# Everything that a machine with a GPU and without a network is asked for, in parts that take less than 9 minutes together:
#
#   install     from the wheels in WHEELS what is missing (pytest and pytest-benchmark are needed, the rest is optional)
#   build       csrc, with nvcc where it is there
#   tests       the correctness tests that take the GPU
#   benchmarks  every bench_*.py, one results file each
#   report      README's table and the plots
#   ablation    two short trainings on the shards train-*.tar and val-*.tar of PHOTOS: without and with the paper's parts
#
# make gpu                            all of them; what is done is skipped, so a run that was cut off goes on
# make gpu PART="tests ablation"      these, done or not; a single benchmark too: PART=bench_focal_itc
# make gpu-clean                      forget what is done
#
# WHEELS (default: wheels), PHOTOS (default: none), PYTHON, TESTS (default: tests), ABLATION_STEPS (default: 200).
# SOFTMASK_FAST_ALLOW_CPU=1 runs the same on the CPU.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
WHEELS=${WHEELS:-wheels}
STATE=${GPU_STATE:-runs/gpu}
mkdir -p "$STATE"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

give_up() { echo "make gpu: $*" >&2; exit 2; }
device=$("$PYTHON" -c "import torch; print('cuda' if torch.cuda.is_available() else 'cpu')") ||
    give_up "$PYTHON cannot import torch: name an interpreter that can, PYTHON=..."
[ "$device" = cuda ] || [ "${SOFTMASK_FAST_ALLOW_CPU:-}" = 1 ] ||
    give_up "torch sees no GPU. SOFTMASK_FAST_ALLOW_CPU=1 runs the same on the CPU"

has() { "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

part_install() {
    local module package
    for pair in pytest:pytest pytest_benchmark:pytest-benchmark setuptools:setuptools matplotlib:matplotlib \
        open_clip:open_clip_torch liger_kernel:liger-kernel inf_cl:inf_cl; do
        module=${pair%%:*} package=${pair#*:}
        has "$module" && continue
        if [ -d "$WHEELS" ]; then
            "$PYTHON" -m pip install --quiet --no-index --find-links "$WHEELS" "$package" || true
        fi
        has "$module" || echo "$package is not installed, and not in the folder $WHEELS"
    done
    has pytest && has pytest_benchmark
}

part_build() {
    command -v nvcc || echo "nvcc is not on PATH: the extension is built for the CPU alone"
    SOFTMASK_FAST_REQUIRE_EXTENSION=1 "$PYTHON" setup.py --quiet build_ext --inplace
}

part_tests() { limited 170 "$PYTHON" -m pytest -q -x -p no:cacheprovider -k "$device" ${TESTS:-tests}; }

# An interrupted pytest still writes the results that it has.
limited() { timeout --signal INT --kill-after 20 "$@"; }

benchmark() { limited 240 "$PYTHON" -m pytest "benchmarks/$1.py" --benchmark-only -q -p no:cacheprovider --save-results; }

part_report() { "$PYTHON" benchmarks/report.py; }

part_ablation() {
    local run flags
    [ -n "${PHOTOS:-}" ] || { echo "PHOTOS names no folder with train-*.tar and val-*.tar: no ablation"; return 0; }
    for run in without with; do
        flags=()
        [ $run = with ] || flags=(--soft_mask false --focal_gamma 0)
        echo "-- $run soft masks and focal contrast"
        limited 60 "$PYTHON" -m deepspeed.launcher.runner softmask_fast/train.py --deepspeed ds.json --preset small \
            --data "$PHOTOS/train-*.tar" --eval_data "$PHOTOS/val-*.tar" --eval_size 200 \
            --max_steps "${ABLATION_STEPS:-200}" --output_dir "$STATE/ablation-$run" "${flags[@]}" || return
    done
}

failed=()
run_part() {
    local name=$1 start=$SECONDS
    shift
    if [ -z "${PART:-}" ] && [ -e "$STATE/$name.done" ]; then
        echo "== $name: done before"
        return
    fi
    echo "== $name"
    rm -f "$STATE/$name.done"
    if "$@" 2>&1 | tee "$STATE/$name.log"; then
        date -u +%FT%TZ >"$STATE/$name.done"
        echo "== $name: $((SECONDS - start)) s"
    else
        failed+=("$name")
        echo "== $name: FAILED after $((SECONDS - start)) s, see $STATE/$name.log"
    fi
}

for part in ${PART:-install build tests benchmarks report ablation}; do
    case $part in
    install | build | tests | report | ablation) run_part "$part" "part_$part" ;;
    benchmarks) for file in benchmarks/bench_*.py; do run_part "$(basename "$file" .py)" benchmark "$(basename "$file" .py)"; done ;;
    bench_*) [ -e "benchmarks/$part.py" ] || give_up "PART: there is no benchmarks/$part.py"; run_part "$part" benchmark "$part" ;;
    *) give_up "PART: expected install, build, tests, benchmarks, bench_..., report or ablation, got $part" ;;
    esac
done
[ ${#failed[@]} -eq 0 ] || give_up "these parts failed: ${failed[*]}"
