# shellcheck shell=bash
# The body of every training job. slurm/taco_large.sh and its siblings hold #SBATCH headers, name a configuration, and
# read this file; docs/slurm.md says what happens in which fault, and lists the settings (TACO_...).
#
#   plan        what run this is; refused, stopped, and finished runs end here
#   preflight   every node looks at itself, all ranks meet once; failing nodes are left out at the requeue
#   train       one step of the job: srun per rank, or torchrun per node
#   end         done by the mark that training leaves, never by an exit code; else requeued, with a cap
set -euo pipefail

say() { echo "job $SLURM_JOB_ID: $*"; }
fail() {
    echo "error: $1" >&2
    exit "${2:-1}"
}

# The number of an array's first task is also that of the whole array.
job=$SLURM_JOB_ID
[ -z "${SLURM_ARRAY_JOB_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID

# SLURM signals this shell alone before the time limit; ranks save and end when they hear it. Heard from the first moment
# on, because a shell without a trap would die of it.
asked_to_stop='' num_signals=0
# shellcheck disable=SC2329  # called by the traps
forward() {
    asked_to_stop=$1 num_signals=$((num_signals + 1))
    say "SIG$1: the ranks save and end"
    scancel --signal=USR1 "$job" 2>/dev/null || true
}
trap 'forward USR1' USR1
trap 'forward TERM' TERM
trap 'forward HUP' HUP

# sbatch runs a copy of the script, so its own folder says nothing.
cd "$SLURM_SUBMIT_DIR"
config=${TACO_CONFIG:-$config}
project_python=.venv/bin/python
[ -x "$project_python" ] || project_python=python3 # of the environment that was active when the job was submitted
python=${TACO_PYTHON:-$project_python}
launcher=${TACO_LAUNCHER:-srun}
max_restarts=${TACO_MAX_RESTARTS:-100}
max_failures=${TACO_MAX_FAILURES:-3}
preflight_seconds=${TACO_PREFLIGHT_SECONDS:-300}
case $launcher in srun | torchrun) ;; *) fail "TACO_LAUNCHER=$launcher: srun (one task per rank) or torchrun" 2 ;; esac

restart=${SLURM_RESTART_COUNT:-0}
# What was asked for ("2", "a100:2"): a node that is had alone counts all its GPUs in SLURM_GPUS_ON_NODE.
gpus=${SLURM_GPUS_PER_NODE:-}
gpus=${gpus##*:}
processes=${TACO_PROCESSES_PER_NODE:-${gpus:-${SLURM_GPUS_ON_NODE:-1}}}
for number in "$max_restarts" "$max_failures" "$preflight_seconds" "$processes"; do
    [[ $number =~ ^[0-9]+$ ]] ||
        fail "TACO_MAX_RESTARTS, TACO_MAX_FAILURES, TACO_PREFLIGHT_SECONDS, TACO_PROCESSES_PER_NODE: no number: $number" 2
done
[ "$processes" -gt 0 ] || fail "no GPU asked for: say with TACO_PROCESSES_PER_NODE how many ranks each node gets" 2
num_nodes=$SLURM_JOB_NUM_NODES
num_ranks=$((num_nodes * processes))
cpus=$((${SLURM_CPUS_ON_NODE:-processes} / processes))
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
run='' steps=0

# -- environment of the ranks; what the user has set stays ----------------------------------------------------------

export MASTER_ADDR=${TACO_MASTER_ADDR:-${nodes[0]}}
# Jobs that share a node must not share a port; those below 32768 are not handed out to outgoing connections.
export MASTER_PORT=${TACO_MASTER_PORT:-$((10000 + SLURM_JOB_ID % 20000))}
export TACO_PROCESSES_PER_NODE=$processes TACO_LAUNCHER=$launcher
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PYTHONFAULTHANDLER=${PYTHONFAULTHANDLER:-1}
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} TRANSFORMERS_OFFLINE=${TRANSFORMERS_OFFLINE:-1}
export HF_DATASETS_OFFLINE=${HF_DATASETS_OFFLINE:-1} TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
# The last collectives of every rank, written when one times out.
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
# torchrun hands these signals on and gives its ranks time to save; it would die of them, or kill after 30 s.
export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2}
export PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-3600}

container=()
if [ -n "${TACO_CONTAINER:-}" ]; then
    container=("--container-image=$TACO_CONTAINER" "--container-workdir=$SLURM_SUBMIT_DIR")
    container+=("--container-mounts=${TACO_CONTAINER_MOUNTS:-$SLURM_SUBMIT_DIR:$SLURM_SUBMIT_DIR}")
fi

# -- steps -------------------------------------------------------------------------------------------------------------

# A command in the background, because bash runs traps only between commands; its exit code.
supervise() {
    local code before child
    "$@" <&0 & # without the redirection its input were /dev/null
    child=$!
    while :; do
        before=$num_signals code=0
        wait "$child" || code=$?
        # A signal ends the waiting, not the command.
        [ "$before" -ne "$num_signals" ] || return "$code"
    done
}

# What ends of SIGTERM or SIGUSR1 without a handler was not broken, but preempted, or at its time limit.
is_signal() { [ "$1" -eq $((128 + 15)) ] || [ "$1" -eq $((128 + 10)) ]; }

# srun gets every size by name: since 22.05 it does not inherit --cpus-per-task. Checks overlap, so that no step waits for
# the end of another one to be noticed.
on_one_node() {
    supervise "${limit[@]}" srun --overlap --nodes=1 --ntasks=1 --cpus-per-task=1 --mpi=none "${container[@]}" "$@"
}
on_all_nodes() {
    supervise "${limit[@]}" srun --nodes="$num_nodes" --ntasks="$num_nodes" --ntasks-per-node=1 --mpi=none \
        --cpus-per-task=$((cpus * processes > 0 ? cpus * processes : 1)) "${container[@]}" "$@"
}
# --kill-on-bad-exit ends the other ranks when one fails; without it they wait for the collectives to time out.
on_all_ranks() {
    supervise "${limit[@]}" srun --nodes="$num_nodes" --ntasks="$num_ranks" --ntasks-per-node="$processes" \
        --cpus-per-task=$((cpus > 0 ? cpus : 1)) --cpu-bind="${TACO_CPU_BIND:-cores}" --distribution=block \
        --label --kill-on-bad-exit=1 --wait=60 --mpi=none "${container[@]}" "$@"
}
limit=()

# -- how a job ends ---------------------------------------------------------------------------------------------------

# What SLURM says of this job; a controller that is busy, or started again just now, is asked for a minute.
job_state() {
    local _
    for _ in 1 2 3 4 5 6; do
        squeue --noheader --job "$job" --format=%T && return
        sleep 10
    done
    echo unknown
}

# To the queue again, without the given nodes; does not return.
requeue() {
    local state excluded='' command
    # A job that was cancelled, or that SLURM requeues by itself, is not RUNNING any more: requeueing would revive it.
    state=$(job_state)
    # SIGNALING: it runs, and a signal is on its way, for one that by which srun ends the other ranks of a step.
    [[ $state == @(RUNNING|SIGNALING) ]] || fail "$1; SLURM says $state, so nothing is requeued from here"
    if [ "$restart" -ge "$max_restarts" ]; then
        fail "$1; $restart restarts are the most (TACO_MAX_RESTARTS); submit again${2:+ with sbatch --exclude=$2 ...}"
    fi
    if [ -z "${2:-}" ]; then
        say "$1; requeued"
        trap - TERM
        scontrol requeue "$job" || fail "SLURM does not requeue: submit with --requeue, or submit again by hand"
        sleep 600 # until SLURM ends this shell: what comes after a requeue is not done any more
        exit 1
    fi
    excluded=$(scontrol -o show job "$job" | sed -n 's/.* ExcNodeList=\([^ ]*\) .*/\1/p')
    [ "$excluded" != '(null)' ] || excluded=''
    say "$1; requeued without $2 (undo: scontrol update JobId=$job ExcNodeList=)"
    # Only a pending job can be changed, and this shell gets SIGTERM as soon as it pends: one scontrol does both.
    trap '' TERM
    command="update JobId=$job ExcNodeList=${excluded:+$excluded,}$2"
    printf '%s\n' "requeue $job" "$command" | scontrol >/dev/null || true
    [[ $(job_state) != @(RUNNING|SIGNALING) ]] ||
        fail "SLURM does not requeue; leave the nodes out by hand: sbatch --exclude=$2 ..."
    exit 0
}

# Again, unless it has got nowhere too often.
requeue_or_give_up() {
    if [ "$(newest_step)" -gt "$first_step" ]; then stuck=0; else stuck=$((stuck + 1)); fi
    if [ "$stuck" -ge "$max_failures" ]; then
        fail "$1; $stuck starts in a row have got no further than step $first_step (TACO_MAX_FAILURES): see above and \
$run/logs, mend the cause, submit again${2:+ without what fails: sbatch --exclude=$2 ...}"
    fi
    requeue "$@"
}

# -- what the run's folder says ---------------------------------------------------------------------------------------

make_plan() {
    local answer=$scratch/plan text
    on_one_node "$python" -m pretrain.preflight plan --processes "$num_ranks" --config "$config" "$@" \
        >"$answer" || return
    text=$(<"$answer")
    steps=${text%% *} run=${text#* }
    run=${run%/}
}

is_done() {
    [ -e "$run/done.json" ] || return
    [[ $(<"$run/done.json") =~ \"step\":\ *([0-9]+) ]] && [ "${BASH_REMATCH[1]}" -ge "$steps" ]
}

newest_step() {
    local folder newest=0
    for folder in "$run"/checkpoints/step-*; do
        [[ ${folder##*/step-} =~ ^[0-9]{7,}$ ]] || continue # .tmp and .bad
        ((10#${BASH_REMATCH[0]} <= newest)) || newest=$((10#${BASH_REMATCH[0]}))
    done
    echo "$newest"
}

# Starts of this job, one line each with the step it began from; how many in a row before this one got no further.
count_stuck_starts() {
    local step stuck=0
    [ -e "$records.starts" ] || {
        echo 0
        return
    }
    while read -r step; do if [ "$step" -ge "$1" ]; then stuck=$((stuck + 1)); else stuck=0; fi; done <"$records.starts"
    echo "$stuck"
}

# What somebody needs who asks in a year what ran here. Not the whole environment: it may hold passwords.
save_records() {
    local folder=$records.$restart
    local kept='^(SLURM_|NCCL_|GLOO_|FI_|UCX_|TORCH|PET_|TACO_|OMP_|CUDA_|MASTER_|PYTHON|PATH=|LD_|HF_)'
    local secret='(TOKEN|KEY|SECRET|PASSWORD|SLURM_JWT)[A-Z_]*='
    mkdir -p "$folder"
    cp -- "$0" "$folder/script.sh"
    cp -- slurm/job.sh slurm/task.sh "$folder/"
    printf '%q ' "$config" "$@" >"$folder/arguments"
    env -0 | grep -zE "$kept" | grep -zvE "$secret" | sort -z | tr '\0' '\n' >"$folder/environment"
    scontrol show job "$job" >"$folder/job"
    {
        git describe --always --dirty --abbrev=40 >"$folder/revision" && git diff HEAD >"$folder/changes.patch"
    } 2>/dev/null || true
}

# -- before and during training ---------------------------------------------------------------------------------------

preflight() {
    local code=0 failing
    limit=(timeout --kill-after=30 "$preflight_seconds")
    on_all_nodes --overlap --kill-on-bad-exit=0 --wait=0 "$python" -m pretrain.preflight report --gpus "$processes" \
        --config "$config" "$@" >"$scratch/reports" || code=$?
    [ -z "$asked_to_stop" ] || return 0
    ! is_signal "$code" || requeue_or_give_up "preflight: stopped by a signal"
    code=0
    on_one_node "$python" -m pretrain.preflight compare --nodes "${nodes[*]}" \
        <"$scratch/reports" >"$scratch/failing" || code=$?
    if [ "$code" -eq 0 ] && [ "$num_ranks" -gt 1 ]; then
        # By srun, whoever starts the ranks later: here every task has to know which rank it is.
        TACO_LAUNCHER=srun on_all_ranks --overlap slurm/task.sh "$python" -m pretrain.preflight all-reduce --nodes "${nodes[*]}" \
            --timeout "$((preflight_seconds / 3))" --config "$config" "$@" >"$scratch/failing" || code=1
    fi
    limit=()
    [ "$code" -ne 0 ] && [ -z "$asked_to_stop" ] || return 0
    failing=$(sed 's/^[0-9]*: //' "$scratch/failing" | tail -n 1)
    [ "$code" -ne 2 ] || fail "preflight: what fails, fails on all nodes; see above"
    requeue_or_give_up "preflight: ${failing:-a check} failed" "$failing"
}

train() {
    if [ "$launcher" = srun ]; then
        on_all_ranks slurm/task.sh "$python" -m pretrain.train --config "$config" "$@"
    else
        on_all_nodes --label --kill-on-bad-exit=1 --wait=60 slurm/task.sh "$python" -m torch.distributed.run \
            --nnodes "$num_nodes" --nproc-per-node "$processes" --rdzv-backend c10d \
            --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-id "$SLURM_JOB_ID.$restart" \
            -m pretrain.train --config "$config" "$@"
    fi
}

say "start $restart on ${nodes[*]}: $num_ranks ranks by $launcher, $config $*"
code=0
make_plan "$@" || code=$?
! is_signal "$code" || requeue "stopped by a signal before it began"
[ "$code" -eq 0 ] || fail "the run cannot start; see above" "$code"
if is_done; then
    say "done: all $steps steps were there already; checkpoints are in $run/checkpoints"
    exit 0
fi
[ ! -e "$run/stop" ] || fail "$run/stop is there: remove it, and submit again, to go on" 75
mkdir -p "$run/slurm"
records=$run/slurm/$SLURM_JOB_ID
export TORCH_FR_DUMP_TEMP_FILE=${TORCH_FR_DUMP_TEMP_FILE:-$records.$restart/nccl_trace_rank_}
save_records "$@"
first_step=$(newest_step)
stuck=$(count_stuck_starts "$first_step")
if [ "$stuck" -ge "$max_failures" ]; then
    fail "$stuck starts in a row have got no further than step $first_step (TACO_MAX_FAILURES); see $run/logs"
fi
echo "$first_step" >>"$records.starts"

[ "${TACO_PREFLIGHT:-on}" = off ] || preflight "$@"
code=0
[ -n "$asked_to_stop" ] || train "$@" || code=$?

if is_done; then
    say "done: $steps steps; checkpoints are in $run/checkpoints"
    exit 0
fi
[ ! -e "$run/stop" ] || fail "stopped by $run/stop at step $(newest_step) of $steps; remove it, and submit again" 75
# Refused by training as well: another job was quicker, or the configuration does not fit.
planned=0
make_plan "$@" || planned=$?
[ "$planned" -ne 2 ] && [ "$code" -ne 2 ] || fail "the run cannot go on; see above" 2
requeue_or_give_up "ended with code $code at step $(newest_step) of $steps${asked_to_stop:+ after SIG$asked_to_stop}"
