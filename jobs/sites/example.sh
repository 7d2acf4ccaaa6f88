# A site: sourced before sbatch (which reads SBATCH_*) and again inside the job. Copy it, name it in SITE.
export SBATCH_PARTITION=${SBATCH_PARTITION:-main}
# export SBATCH_ACCOUNT=my_project
# export SITE=jobs/sites/my_cluster.sh
# module load openmpi/5
if [[ -e .venv/bin/activate ]]; then source .venv/bin/activate; fi
