#!/bin/bash
#SBATCH --job-name=pss
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append

# sbatch docs/slurm.sh RECIPE --data DIR --output DIR [...]: torchrun on every node, requeued until it is done.
set -uo pipefail

gpus=${SLURM_GPUS_ON_NODE:-8}
began=$(mktemp)
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$gpus" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$head:29400" \
    --no-python pss-train "$@" --resume
code=$?

# torchrun ends with 1 whatever its processes ended with. A run that was stopped has just said that it is not finished.
output=
for word in "$@"; do
    [ "${previous:-}" = --output ] && output=$word
    previous=$word
done
summary=$output/summary.json
if [ "$code" -ne 0 ] && [ "$summary" -nt "$began" ] && grep -q '"finished": false' "$summary"; then
    scontrol requeue "$SLURM_JOB_ID"
fi
rm -f "$began"
exit "$code"
