#!/usr/bin/env bash
# Everything that only a GPU can show, on this machine: `bash tests/gpu.sh`, after README's test command.
# STAGES: which of those below, in this order. BUDGET: seconds for all of them. OUT: folder of the results.
# WORKERS: processes that tests are run by at once on the one GPU; half the time of a test is the host's.
# Each stage has its share of the time and goes on where an earlier one has failed; where there is no GPU all are skipped.
# In OUT: summary.txt, a log of each stage, and results.json and what the benchmarks write, for kernels/benchmarks.
# Exit code: 0, or 1 where a stage has failed or was stopped.
set -uo pipefail
STAGES=${STAGES:-facts kernels sanitizer training wkv step}
BUDGET=${BUDGET:-1800}
cores=$(nproc)
WORKERS=${WORKERS:-$((cores < 4 ? 1 : cores < 12 ? cores / 2 : 6))}
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
OUT=$(realpath -m -- "${OUT:-gpu-results}")
PYTHON=${PYTHON:-$PWD/.venv/bin/python}
[ -x "$PYTHON" ] || PYTHON=$(command -v python3)
mkdir -p "$OUT" || exit 1
rm -f "$OUT"/{facts,kernels,sanitizer,training,wkv,step}.log "$OUT"/{facts,wkv,step,results}.json "$OUT"/{summary,stages}.txt
export PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1 # SAFEPATH: kernels/ of this folder is no package of its own

facts() { # the ceilings of all that follows
    "$PYTHON" tests/support/gpu_facts.py "$OUT/facts.json"
}

tests() { # FOLDER...
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} "$PYTHON" -m pytest -m gpu -n "$WORKERS" -q --no-header --tb=short \
        -p no:cacheprovider --durations=5 "$@"
}

kernels() { # outputs and gradients against float64, streams, graphs, torch.compile
    tests -k 'not sanitizer' tests/kernels
}

sanitizer() {
    tests -k sanitizer tests/kernels
}

training() { # beside the CPU's curve in each precision and version, killed and continued, ZeRO
    tests tests/train tests/planning tests/doctor
}

wkv() { # the operators, and their rivals in the same run
    "$PYTHON" -m rwkv_cluster bench wkv --device cuda --output "$OUT/wkv.json"
}

step() { # whole steps: tokens/s, memory and MFU
    "$PYTHON" -m rwkv_cluster bench step --device cuda --output "$OUT/step.json"
}

share() { # STAGE: its part of BUDGET, in percent
    case $1 in
        facts) echo 5 ;;
        kernels | sanitizer | wkv) echo 20 ;;
        training | step) echo 30 ;;
        *)
            echo "tests/gpu.sh: no stage '$1'; there are facts, kernels, sanitizer, training, wkv and step" >&2
            return 1
            ;;
    esac
}

say() {
    printf '%s\n' "$*" | tee -a "$OUT/summary.txt"
}

run() { # STAGE SECONDS
    local began=$SECONDS outcome rc
    timeout -k 10 "$2" bash -c "$1" >"$OUT/$1.log" 2>&1
    rc=$?
    case $rc in
        0) outcome=ok ;;
        124 | 137) outcome=stopped ;;
        *) outcome=failed ;;
    esac
    [ "$outcome" = ok ] || failures=$((failures + 1))
    echo "$1 $outcome $((SECONDS - began))" >>"$OUT/stages.txt"
    say "$1: $outcome in $((SECONDS - began)) s"
    grep -v '^ *$' "$OUT/$1.log" | tail -n 8 | cut -c1-160 | sed 's/^/    /' | tee -a "$OUT/summary.txt"
}

for stage in $STAGES; do
    share "$stage" >/dev/null || exit 2
done
export -f facts tests kernels sanitizer training wkv step
export PYTHON OUT WORKERS
failures=0
has_gpu=$("$PYTHON" -c 'import torch; print(torch.cuda.is_available())') || exit 1
for stage in $STAGES; do
    left=$((BUDGET - SECONDS))
    seconds=$((BUDGET * $(share "$stage") / 100))
    if [ "$has_gpu" != True ]; then
        say "$stage: skipped: no GPU"
        echo "$stage skipped 0" >>"$OUT/stages.txt"
    elif [ "$left" -lt 10 ]; then
        say "$stage: skipped: no time left of $BUDGET s, see BUDGET"
        echo "$stage skipped 0" >>"$OUT/stages.txt"
    else
        run "$stage" $((seconds < left ? seconds : left))
    fi
done
"$PYTHON" tests/support/gpu_facts.py --collect "$OUT" || exit 1
say "results: $OUT/results.json"
[ "$failures" = 0 ]
