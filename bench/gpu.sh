#!/usr/bin/env bash
# One stage of a run on a machine with a GPU, each under 9 minutes; without network, from a bare checkout.
#
#   bench/gpu.sh tests|tune|bench [OUT]        PYTHON=python3 by default; OUT for JSON and plots
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH=.
out=${2:-bench/results/$($python -m bench.environment)}
bench() {
    $python -m pytest -q --benchmark-timer=torch.utils.benchmark.utils.timer.timer "bench/test_$1.py" \
        --benchmark-json="$out/$1.json"
}
mkdir -p "$out"
case ${1:-} in
tests)
    $python -m pytest -q tests/test_gpu.py tests/kernels/test_kernels.py tests/kernels/test_dropout.py \
        tests/ops/test_{selfcheck,op,mask,determinism,compile}.py \
        tests/test_long.py::test_more_than_two_to_the_31_elements_on_a_gpu
    ;;
tune) $python -m bench.tune --out "$out" ;;
bench)
    bench ops
    bench layer
    bench group
    bench step
    $python -m bench.memory_profile --out "$out" --tokens 2048
    ;;
*)
    echo "bench/gpu.sh: the stage must be tests, tune or bench, not '${1:-}'." >&2
    exit 2
    ;;
esac
