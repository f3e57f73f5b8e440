#!/bin/bash
# Trains on several hosts of a Slurm cluster. Change the lines below, and type: sbatch examples/slurm.sh
#SBATCH --job-name=finetune
#SBATCH --nodes=2
# One process per host uses all GPUs of its host.
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
# Five minutes before the end of the time, the run saves its last step and ends with exit code 143.
#SBATCH --signal=TERM@300
# If a host fails, Slurm starts the job again.
#SBATCH --requeue
#SBATCH --open-mode=append

source .venv/bin/activate
bash examples/restart.sh srun --kill-on-bad-exit=0 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
  python run_train.py --image_folder=PHOTOS --batch_size=64 --ckpt_dir=runs/slurm
code=$?
if [[ $code == 143 ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
