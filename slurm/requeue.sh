# shellcheck shell=bash
# What every batch script does around its step, which it starts in the background between `begin` and `finish`:
#
#   meet                     where the ranks meet; variables that are set after it override it
#   begin CELL MAX_RETRIES   notes that the cell in this directory starts, or ends the job where it must not
#   finish                   waits for the step, then ends the job: complete, failed, or queued again

meet() {
    restart=${SLURM_RESTART_COUNT:-0}
    # The number of an array's last element is that of the array: only this name means this element alone.
    this=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    this=${this:-$SLURM_JOB_ID}
    # A port for every start, so that what a lost node still runs cannot join. What the shell that submitted this had
    # been told of ranks is not meant for them.
    unset RANK LOCAL_RANK WORLD_SIZE
    MASTER_ADDR=$(plainly scontrol show hostnames "$SLURM_JOB_NODELIST" |
        grep -m 1 -x "${SLURM_JOB_NODELIST%%[[,]*}[^ ]*") # and no line that a site's wrapper prints
    MASTER_PORT=$((20000 + (SLURM_JOB_ID * 31 + restart) % 12000))
    export MASTER_ADDR MASTER_PORT
}

begin() {
    cell=$1 max_retries=$2
    export TPCHECK_ENDS=$cell/ends.jsonl # the ranks write there why they end
    rm -f "$TPCHECK_ENDS"
    printf '{"job": "%s", "array_index": %d, "restart": %d, "nodes": "%s", "began": "%s", "job_name": "%s"}\n' \
        "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}" "${SLURM_ARRAY_TASK_ID:-0}" "$restart" \
        "$SLURM_JOB_NODELIST" "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$SLURM_JOB_NAME" >>"$cell/attempts.jsonl"
    echo "tpcheck: ${cell##*/} on $SLURM_JOB_NODELIST, start $((restart + 1))"
    if [[ -e $cell/cancelled ]]; then
        echo "tpcheck: not started, but cancelled by tpcheck cancel"
        exit 0
    fi
    if ((restart > max_retries)); then # by Slurm itself: a lost node, a preemption
        echo "tpcheck: not started again, after $max_retries times: call tpcheck sweep to go on"
        exit 1
    fi
    trap '[[ $(state) != *TimeLimit ]] || again' TERM # too late to save: at least the last checkpoint counts
    # Slurm sends USR2 to the ranks, `scancel --full` to this shell as well and `scancel --batch` to it alone; srun
    # passes it on, and to be told twice is no more than to be told once.
    trap '[[ -z $! ]] || kill -USR2 $! 2>/dev/null' USR2
}

# Slurm's commands take options from the environment, too: a filter of the user's would hide this job from it.
plainly() (
    # shellcheck disable=SC2086 # names
    unset ${!SQUEUE_@} ${!SCONTROL_@} SLURM_CLUSTERS
    exec "$@"
)

# A controller that is being restarted does not answer for a while.
patiently() {
    local _
    for _ in {1..12}; do plainly "$@" && return 0; sleep 10; done
    return 1
}
state() { patiently squeue --noheader --job="$this" --states=all --format='tpcheck: %T %r' | sed -n 's/^tpcheck: //p'; }
ended() { grep -qs "\"kind\": \"$1\"" "$TPCHECK_ENDS"; }

# Queues this job again, to go on from the cell's last checkpoint. When Slurm itself is ending it, it was cancelled,
# and would come back to life, or preempted, which Slurm sees to; only at the time limit the choice is ours.
again() {
    [[ ! -e $cell/cancelled && $(state) =~ ^(RUNNING|SIGNALING)|TimeLimit$ ]] || return 0
    if ((restart >= max_retries)); then
        echo "tpcheck: not queued again, after $max_retries times: call tpcheck sweep to go on"
    elif patiently scontrol requeue "$this"; then
        echo "tpcheck: queued again"
        exit 0
    fi
}

# Defined last: a script that finds it has read this file to its end.
finish() {
    local step=$! code
    while :; do # a signal to this shell ends `wait`, not the step
        wait "$step"
        code=$?
        kill -0 "$step" 2>/dev/null || break
    done
    # Written last: the cell is complete. Unless it is older than this start, which then must have found nothing to do.
    if [[ $cell/digests.json -nt $cell/attempts.jsonl || (-e $cell/digests.json && $code == 0) ]]; then
        exit 0
    elif ended failed; then # an error of the user's or ours: it would recur
        exit "$((code ? code : 1))"
    elif ((code == 0 || code >= 128)) || ended stopped || ended lost; then # told to save and leave; killed; lost a rank
        again
    fi
    exit "$((code ? code : 1))"
}
