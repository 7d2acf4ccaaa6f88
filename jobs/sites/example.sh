# shellcheck shell=bash source=/dev/null
# The site file: jobs/train.sbatch sources it before it submits, because sbatch reads SBATCH_…, and again in the job.
# Edit it, or copy it and name the copy: SITE=mine.sh (beside this one) or SITE=path/to/mine.sh.
# export SBATCH_PARTITION=${SBATCH_PARTITION:-main}
# export SBATCH_ACCOUNT=${SBATCH_ACCOUNT:-my_project}
# export LAUNCH=${LAUNCH:-srun}
# module load openmpi/5

# The environment: the active one, else that of this checkout, or the one that pip has put this file into.
if ! command -v mlm-mpi >/dev/null; then
    for folder in "${BASH_SOURCE[0]%/*}"/../../{.venv,../..}; do
        if [[ -e $folder/bin/activate ]]; then source "$folder/bin/activate" && break; fi
    done
fi
