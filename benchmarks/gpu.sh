#!/usr/bin/env bash
# Everything that is measured on a machine with a GPU and without a network. All parts together take less than 8 minutes:
#
#   install     what PACKED holds and this machine lacks: PACKED/wheels/*.whl, and DALI in parts, PACKED/dali/part-*
#   build       csrc for this machine's GPU, where there is nvcc
#   tests       the tests that touch a GPU (marked gpu in tests/conftest.py), in 12 processes, each failure named at once
#   benchmarks  every bench_*.py in its short form
#   job         the training itself, demo, small and base: 30 s of steady steps each
#   report      README's table and the plots
#   ablation    two short trainings on the shards train-*.tar and val-*.tar of PHOTOS: without and with the paper's parts
#
# make gpu                            all parts; finished ones are skipped, so an interrupted run continues
# make gpu PART="tests job"           these parts, finished or not, or single ones: PART="bench_focal_itc job_base"
# make gpu-clean                      forget what is finished
#
# After each part benchmarks/results/<device>/<date>.json holds the results so far. A part that fails stops no other.
#
# PACKED (default: packed), WHEELS (default: PACKED/wheels, else wheels), PHOTOS (default: none; the job takes scenes that
# are drawn), PYTHON, TESTS (default: tests), JOB_OPTIONS (more options of train.py), ABLATION_STEPS (default: 200),
# RESULTS (default: benchmarks/results).
# SOFTMASK_FAST_ALLOW_CPU=1 runs the same on the CPU; the job then trains only the demo, for a moment.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
PACKED=${PACKED:-packed}
WHEELS=${WHEELS:-$([ -d "$PACKED/wheels" ] && echo "$PACKED/wheels" || echo wheels)}
STATE=${GPU_STATE:-runs/gpu}
RESULTS=${RESULTS:-benchmarks/results}
mkdir -p "$STATE"
STATE=$(cd "$STATE" && pwd)
SITE=$STATE/site
export PYTHONPATH="$PWD:$PWD/benchmarks:$SITE${PYTHONPATH:+:$PYTHONPATH}"
export LD_LIBRARY_PATH="$SITE/nvidia/cu13/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"

give_up() { echo "make gpu: $*" >&2; exit 2; }
device=$("$PYTHON" -c "import torch; print('cuda' if torch.cuda.is_available() else 'cpu')") ||
    give_up "$PYTHON cannot import torch: name an interpreter that can, PYTHON=..."
[ "$device" = cuda ] || [ "${SOFTMASK_FAST_ALLOW_CPU:-}" = 1 ] ||
    give_up "torch sees no GPU. SOFTMASK_FAST_ALLOW_CPU=1 runs the same on the CPU"

PROCESSES=12 SHORT=0.4 JOBS="tiny small base" STEADY=30
[ "$device" = cuda ] || PROCESSES=0 SHORT=0.05 JOBS=tiny STEADY=1

has() { "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)" 2>/dev/null; }

# An interrupted pytest still writes the results so far.
limited() { timeout --signal INT --kill-after 20 "$@"; }

part_install() {
    local module package
    mkdir -p "$SITE"
    if [ -d "$WHEELS" ]; then
        "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$SITE" "$WHEELS"/*.whl ||
            echo "not all wheels in $WHEELS could be installed"
    fi
    if [ -d "$PACKED/dali" ] && [ ! -d "$SITE/nvidia/dali" ]; then
        cat "$PACKED"/dali/part-* | xz -dc | tar xf - -C "$SITE"
        [ ! -e "$PACKED/dali/nvjpeg.tar.xz" ] || xz -dc "$PACKED/dali/nvjpeg.tar.xz" | tar xf - -C "$SITE"
        # the folder nvidia has parts here and in torch's own place
        echo "__path__ = __import__('pkgutil').extend_path(__path__, __name__)" >"$SITE/nvidia/__init__.py"
    fi
    for pair in pytest:pytest pytest_benchmark:pytest-benchmark xdist:pytest-xdist setuptools:setuptools \
        matplotlib:matplotlib deepspeed:deepspeed nvidia.dali:nvidia-dali-cuda130 timm:timm transformers:transformers \
        open_clip:open_clip_torch liger_kernel:liger-kernel inf_cl:inf_cl xformers:xformers; do
        module=${pair%%:*} package=${pair#*:}
        has "$module" || echo "$package is not installed, and not in $WHEELS or $PACKED/dali"
    done
    has pytest && has pytest_benchmark
}

part_build() {
    if [ "$device" = cuda ]; then
        SOFTMASK_FAST_CUDA_ARCHS=$("$PYTHON" -c "import torch; print('%d%d' % torch.cuda.get_device_capability())")
        export SOFTMASK_FAST_CUDA_ARCHS
        command -v nvcc || echo "nvcc is not on PATH: the extension is built for the CPU alone"
    fi
    SOFTMASK_FAST_REQUIRE_EXTENSION=1 limited 90 "$PYTHON" setup.py --quiet build_ext --inplace
}

part_tests() {
    local parallel=(-n "$PROCESSES" --dist worksteal)  # 0: in this process
    has xdist || parallel=()
    # two files are named after GPUs and need none
    limited 150 "$PYTHON" -m pytest -v --tb short -p no:cacheprovider -m gpu "${parallel[@]}" \
        --ignore tests/test_cuda_on_cpu.py --ignore tests/test_imports.py \
        -p gpu_parts --failures "$STATE/part-tests.json" ${TESTS:-tests}
}

benchmark() {
    rm -rf "$STATE/benchmarks/$1"
    limited 60 "$PYTHON" -m pytest "benchmarks/$1.py" --benchmark-only -q -p no:cacheprovider --short "$SHORT" \
        -p gpu_parts --failures "$STATE/part-$1.json" --save-results "$STATE/benchmarks/$1"
}

job() {
    local options=(--max_steps 100000 --batch_size 128)
    [ "$1" != tiny ] || options=(--max_steps 100000)
    [ -z "${PHOTOS:-}" ] || options+=(--data "$PHOTOS/train-*.tar")
    # shellcheck disable=SC2206
    options+=(${JOB_OPTIONS:-})
    rm -rf "$STATE/job_$1"
    limited 260 "$PYTHON" benchmarks/gpu_parts.py job "$STATE" "$1" "$STEADY" "${options[@]}"
}

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
    echo "$name $((SECONDS - start)) $([ -e "$STATE/$name.done" ] && echo done || echo failed)" >>"$STATE/times.txt"
    "$PYTHON" benchmarks/gpu_parts.py collect "$STATE" "$RESULTS" || failed+=("results of $name")
}

for part in ${PART:-install build tests benchmarks job report ablation}; do
    case $part in
    install | build | tests | report | ablation) run_part "$part" "part_$part" ;;
    benchmarks) for file in benchmarks/bench_*.py; do run_part "$(basename "$file" .py)" benchmark "$(basename "$file" .py)"; done ;;
    bench_*) [ -e "benchmarks/$part.py" ] || give_up "PART: there is no benchmarks/$part.py"; run_part "$part" benchmark "$part" ;;
    job) for preset in $JOBS; do run_part "job_$preset" job "$preset"; done ;;
    job_*) run_part "$part" job "${part#job_}" ;;
    *) give_up "PART: expected install, build, tests, benchmarks, bench_..., job, job_..., report or ablation, got $part" ;;
    esac
done
[ ${#failed[@]} -eq 0 ] || give_up "these parts failed: ${failed[*]}"
