#!/usr/bin/env bash
# Test and measure on a GPU, in stages of less than 3 minutes but for the study. Works from a bare checkout without
# network.
#
#   bench/gpu.sh tests|layers|tune|steps|memory|experts|all [OUT]      PYTHON=python3 by default; JSON goes to OUT
#   bench/gpu.sh study [OUT [FOLDER]]        the runs of examples/multitask that LIMIT seconds (240 by default) allow, on
#                                            a FOLDER (or PREPARED) of examples.multitask.prepare, resumed in OUT/study;
#                                            WORKERS at once (4 by default, 6 after a failed capture); ARGS go to the study;
#                                            PAGE=0 leaves its page, which needs no GPU, for later
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH=.
stage=${1:-}
status=0

run() { # seconds, command: SIGINT at the limit, so that finished measurements are still written
    timeout --signal=INT --kill-after=15 "$@" || status=1
}
bench() { # name, seconds to start cases in, seconds in total
    run "$3" "$python" -m pytest -q --benchmark-timer=torch.utils.benchmark.utils.timer.timer \
        "bench/test_$1.py" --seconds "$2" --benchmark-json="$out/$1.json"
}

case $stage in
tests | layers | tune | steps | memory | experts | study | all) ;;
*)
    echo "bench/gpu.sh: the stage must be tests, layers, tune, steps, memory, experts, study or all, not '$stage'." >&2
    exit 2
    ;;
esac
prepared=${3:-${PREPARED:-}}
if [ "$stage" = study ] && [ ! -f "$prepared/prepared.json" ]; then
    echo "bench/gpu.sh: study takes the folder of python -m examples.multitask.prepare, not '$prepared'." >&2
    exit 2
fi
out=${2:-bench/results/$("$python" -m bench.environment)}
mkdir -p "$out"

case $stage in
tests) # the kernels, the op and the clock on the device
    parallel=()
    if "$python" -c "import xdist" 2>/dev/null; then parallel=(-n 6); fi
    run 170 "$python" -m pytest -q ${parallel[@]+"${parallel[@]}"} --junitxml="$out/tests.xml" \
        tests/test_gpu.py tests/kernels/test_{kernels,dropout,product,grouped}.py \
        tests/ops/test_{selfcheck,op,mask,determinism,compile,grouped}.py tests/benchmark/test_clock.py \
        tests/examples/test_{cuda_graph,steps}.py tests/test_long.py::test_more_than_two_to_the_31_elements_on_a_gpu
    "$python" -m bench.junit "$out/tests.xml" "$out/tests.json" || status=1
    ;;
layers) # wall clock, device time and host time
    bench layer 80 115
    bench group 35 60
    ;;
tune) # rows for kernels/configs.py with their timings, then every use of the present kernels
    run 115 "$python" -m bench.tune --seconds 95 --out "$out"
    bench ops 40 60
    ;;
steps) bench step 150 175 ;;
memory)
    run 110 "$python" -m bench.plan_check --out "$out"
    run 65 "$python" -m bench.memory_profile --out "$out" --tokens 2048
    ;;
experts) bench experts 100 150 ;;
study) # whole runs and a page of them, within LIMIT; what came back is resumed by the next call
    limit=${LIMIT:-240}
    # shellcheck disable=SC2206  # ARGS are words
    study=("$python" -u -m examples.multitask --profile gpu --prepared "$prepared" --output "$out/study" ${ARGS:-})
    runs() { # seconds for whole runs, further arguments; 15 seconds more end what was begun
        local minutes
        minutes=$(printf '%d.%02d' $(($1 / 60)) $(($1 % 60 * 100 / 60)))
        timeout --signal=INT --kill-after=10 "$(($1 + 15))" "${study[@]}" --minutes "$minutes" \
            --workers "${WORKERS:-4}" --threads 2 --no-report "${@:2}"
    }
    mkdir -p "$out/study"
    last=$((${PAGE:-1} ? 55 : 20)) # seconds of what follows the runs, 15 of them to end those that are late
    runs $((limit - last)) || status=$?
    if [ $status = 3 ]; then # a step could not be captured
        left=$((limit - SECONDS - last))
        if ((left > 0)); then
            status=0
            runs $left --eager --workers "${WORKERS:-6}" || status=$? # each waits for Python
        fi
    fi
    if ((${PAGE:-1})); then run 35 "${study[@]}" --report-only; fi
    tar -czf "$out/study.tar.gz" -C "$out" study || status=1
    ls -l "$out/study.tar.gz"
    ;;
all)
    for each in tests layers tune steps memory experts; do
        bash bench/gpu.sh "$each" "$out" || status=1
    done
    ;;
esac
exit $status
