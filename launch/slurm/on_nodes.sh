# shellcheck shell=bash
# Sourced by the batch scripts beside it, on the first node of a job.
#
#   on_nodes COMMAND...    runs `torchrun COMMAND...` on all nodes of the job as one world
#
# Reads IMAGE, MOUNTS, REPO, NPROC, MAX_RESTARTS and, where the command knows --stop-file, STOP_FILE and GRACE of
# the batch script. The command must be one that goes on where it stopped when it is started again. When USR1
# comes (sbatch's --signal, before the time limit) or TERM (preemption), STOP_FILE is made, which distill.py
# answers with a checkpoint. After GRACE seconds, or at once where no such file can be made, torchrun gets TERM,
# and its ranks KILL 30 seconds later. Then the job goes back into the queue. A command that fails by itself is
# not queued again.

on_nodes_stop() {
    echo "== told to stop, $(date)"
    if [[ -n ${STOP_FILE-} ]] && touch "$STOP_FILE"; then
        sleep "$GRACE"
        echo "== not ended in $GRACE seconds, $(date)"
    fi
    scancel --signal=TERM "$SLURM_JOB_ID"
}

on_nodes() {
    local first restarts=${SLURM_RESTART_COUNT:-0} code=0 step
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    first=${first%%$'\n'*}

    local srun=(srun --nodes="$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=1 --cpu-bind=none)
    if [[ -n $IMAGE ]]; then # pyxis
        srun+=(--container-image="$IMAGE" --container-mounts="$MOUNTS" --container-workdir="$REPO")
        srun+=(--no-container-mount-home)
    else
        srun+=(--chdir="$REPO")
    fi
    local torchrun=(
        torchrun --nnodes="$SLURM_NNODES" --nproc-per-node="$NPROC" --rdzv-backend=c10d
        --rdzv-id="$SLURM_JOB_ID.$restarts" --rdzv-endpoint="$first:$((20000 + SLURM_JOB_ID % 20000))"
    )
    export PYTHONUNBUFFERED=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    [[ -z ${STOP_FILE-} ]] || rm -f "$STOP_FILE"

    echo "== $SLURM_JOB_NAME $SLURM_JOB_ID, start $((restarts + 1)): $SLURM_NNODES x $NPROC ranks, $(date)"
    printf '%q ' "${torchrun[@]}" "$@"
    echo

    on_nodes_told='' on_nodes_stopping=''
    trap 'if [[ -z $on_nodes_told ]]; then on_nodes_told=1; on_nodes_stop & on_nodes_stopping=$!; fi' USR1 TERM
    "${srun[@]}" "${torchrun[@]}" "$@" &
    step=$!
    # A signal ends `wait` early: the step is still there then.
    while true; do
        code=0
        wait "$step" || code=$?
        kill -0 "$step" 2>/dev/null || break
    done
    trap - USR1 TERM
    [[ -z $on_nodes_stopping ]] || kill "$on_nodes_stopping" 2>/dev/null || true

    echo "== ended with $code, $(date)"
    if [[ -z $on_nodes_told || $code -eq 0 ]]; then
        return "$code"
    fi
    if ((restarts >= MAX_RESTARTS)); then
        echo "== started $((restarts + 1)) times: not queued again (MAX_RESTARTS)" >&2
        return "$code"
    fi
    scontrol requeue "$SLURM_JOB_ID" && echo "== queued again"
}
