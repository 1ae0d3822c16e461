#!/usr/bin/env bash
# Preprocesses a corpus in many jobs, each one part of it:
#
#   sbatch --array=0-15 slurm/preprocess.sh --input data/*.jsonl.zst --tokenizer vocab.txt --output-prefix data/train
#
# Arguments are those of `taco data preprocess`. Part I of N becomes data/train.part-I-of-N; each task prints the command
# that merges all parts. A task that reaches its time limit keeps what is done (exit code 75) and requeues itself; parts
# that are there already are left alone. Submitted from the project's root. Settings from the environment:
#   TACO_PYTHON   Python of the environment with the package installed (.venv/bin/python, or else python3)
#   TACO_SHARDS   number of parts, where only some of them are submitted again: TACO_SHARDS=16 sbatch --array=3,7 ...
#SBATCH --job-name=taco_preprocess
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=16G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@60
#SBATCH --output=%x-%A_%a.log
#SBATCH --open-mode=append
set -euo pipefail

fail() {
    echo "error: $*" >&2
    exit 2
}

# sbatch runs a copy of this file, so its own folder says nothing.
cd "$SLURM_SUBMIT_DIR"
project_python=.venv/bin/python
[ -x "$project_python" ] || project_python=python3 # of the environment that was active when the job was submitted
python=${TACO_PYTHON:-$project_python}

[ -n "${SLURM_ARRAY_TASK_ID:-}" ] || fail "not a job array; submit with sbatch --array=0-15 slurm/preprocess.sh ..."
index=$SLURM_ARRAY_TASK_ID
count=${TACO_SHARDS:-$SLURM_ARRAY_TASK_COUNT}
range="${SLURM_ARRAY_TASK_MIN:-}-${SLURM_ARRAY_TASK_MAX:-}"
if [ -z "${TACO_SHARDS:-}" ] && [ "$range" != "0-$((count - 1))" ]; then
    fail "--array must be 0 to N-1 without gaps; to submit some parts again, say how many there are with TACO_SHARDS"
fi

# The program's arguments with this part's prefix in the place of the whole's.
prefix='' workers='' overwrite=''
arguments=()
while [ "$#" -gt 0 ]; do
    case $1 in
        --output-prefix) [ "$#" -gt 1 ] || fail "--output-prefix needs a value"; prefix=$2; shift ;;
        --output-prefix=*) prefix=${1#*=} ;;
        --shard | --shard=*) fail "--shard is given by the job array" ;;
        *)
            case $1 in --workers | --workers=*) workers=given ;; --overwrite) overwrite=given ;; esac
            arguments+=("$1")
            ;;
    esac
    shift
done
[ -n "$prefix" ] || fail "--output-prefix is missing"
[ -n "$workers" ] || arguments+=(--workers "${SLURM_CPUS_PER_TASK:-1}")
part_of() { printf '%s.part-%05d-of-%05d' "$prefix" "$1" "$count"; }
part=$(part_of "$index")

say_how_to_merge() {
    local number
    printf 'when all parts are there: %q -m pretrain.cli data merge %q' "$python" "$prefix"
    for ((number = 0; number < count; number++)); do printf ' %q' "$(part_of "$number")"; done
    printf '\n'
}

if [ -e "$part.json" ] && [ ! -e "$part.journal" ] && [ -z "$overwrite" ]; then
    echo "$part is there already"
    say_how_to_merge
    exit 0
fi

"$python" -m pretrain.cli data preprocess "${arguments[@]}" --output-prefix "$part" --shard "$index/$count" &
program=$!
is_interrupted=''
trap 'is_interrupted=yes; kill -TERM "$program" 2>/dev/null || true' TERM INT
while :; do
    is_interrupted='' code=0
    wait "$program" || code=$?
    # A signal ends the waiting, not the program.
    [ -n "$is_interrupted" ] || break
done

case $code in
    0) say_how_to_merge ;;
    75)
        echo "part $index of $count goes on when it is started again"
        scontrol requeue "${SLURM_ARRAY_JOB_ID}_$index"
        ;;
esac
exit "$code"
