"""Under a real Slurm the job script saves whatever ends a job, and goes on exactly.

Measured with Slurm 22.05 and Open MPI 5.0.11: who gets SIGTERM, for each way Slurm has to end a job.

| | batch shell | processes below it | a step's first process | below that |
|---|---|---|---|---|
| scancel, requeue by an admin, the time limit, the end of a preemption's grace | yes | linuxproc | yes | linuxproc |
| the beginning of a preemption's grace | no | no | yes | linuxproc |
| scancel --batch --signal=TERM | yes | no | no | no |

Below the batch shell are `mlm-mpi run`, mpirun (in a session of its own, which proctrack/pgid misses) and the ranks
of this node. A step's first process is a rank of srun, or mpirun's daemon on another node. "linuxproc" is that
setting of ProctrackType only; with cgroup, what most clusters have, and pgid Slurm signals first processes only.
KillWait seconds after SIGTERM comes SIGKILL. `scontrol requeue` would revive a job that is being cancelled.
"""

import time

import pytest
from cluster import LAB, LAB_FOLDER, STEPS, Cluster, command

ONE_WAY = pytest.mark.parametrize("slurm", ["linuxproc"], indirect=True)
EACH_WAY = pytest.mark.parametrize("slurm", ["linuxproc", "pgid"], indirect=True)
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")


@ONE_WAY
def test_the_time_limit_saves_and_the_requeued_job_goes_on(cluster: Cluster, undisturbed: str):
    """Slurm looks at time limits every 30 s and warns 30 s too early: here when the job is two seconds old."""
    begun = (LAB_FOLDER / "slurmctld.pid").stat().st_mtime
    time.sleep((28 - (time.time() - begun)) % 30)
    job = cluster.submit(*TWO_NODES, "--time=1", "--signal=B:USR1@29")
    job.steps_are_made(1)
    job.leaves("PENDING", restarts=1)
    assert job.saved() < STEPS
    job.wait(lambda: (job.run / "DONE").exists())
    job.leaves("COMPLETED")
    assert job.weights() == undisturbed


@EACH_WAY
def test_scancel_on_two_nodes_saves_and_another_job_goes_on_with_three_ranks(cluster: Cluster, undisturbed: str):
    job = cluster.submit(*TWO_NODES)
    job.steps_are_made()
    command("scancel", job.number)
    job.leaves("CANCELLED", restarts=0)
    saved = job.saved()
    assert saved < STEPS
    again = cluster.submit("--nodes=1", "--ntasks-per-node=3")
    again.wait(lambda: (again.run / "DONE").exists())
    again.leaves("COMPLETED", restarts=0)
    assert f"steps {saved} to {STEPS}" in again.text()
    assert again.weights() == undisturbed


@EACH_WAY
@pytest.mark.parametrize(
    ("launch", "nodes"), [("mpirun", ("--nodes=1", "--ntasks-per-node=2")), ("srun", TWO_NODES)], ids=["mpirun", "srun"]
)
def test_scancel_saves_on_one_node_and_under_srun(cluster: Cluster, launch: str, nodes: tuple[str, ...]):
    job = cluster.submit(*nodes, LAUNCH=launch)
    job.steps_are_made()
    command("scancel", job.number)
    job.leaves("CANCELLED", restarts=0)
    assert job.saved() < STEPS


@ONE_WAY
@pytest.mark.parametrize(("signal", "state", "restarts"), [("TERM", "FAILED", 0), ("USR1", "PENDING", 1)])
def test_a_signal_to_the_batch_shell_saves(cluster: Cluster, signal: str, state: str, restarts: int):
    """SIGTERM, as the log advises, stops for good; SIGUSR1 stops as before the time limit."""
    job = cluster.submit(*TWO_NODES, LAUNCH="mpirun")
    job.steps_are_made()
    assert f"scancel --batch --signal=TERM {job.number}" in job.text()
    command("scancel", "--batch", f"--signal={signal}", job.number)
    job.leaves(state, restarts)
    assert job.saved() < STEPS


@ONE_WAY
def test_a_requeue_by_an_admin_saves_and_is_not_doubled(cluster: Cluster):
    job = cluster.submit(*TWO_NODES)
    job.steps_are_made()
    command("scontrol", "requeue", job.number)
    job.leaves("PENDING", restarts=1)
    assert job.saved() < STEPS
    assert "pending execution" not in job.text()


@ONE_WAY
def test_a_lost_daemon_is_one_line_and_the_job_is_requeued(cluster: Cluster):
    job = cluster.submit(*TWO_NODES)
    job.steps_are_made()
    command(LAB, "exec", "node2", "pkill", "-KILL", "-x", "prted")
    job.leaves("PENDING", restarts=1)
    lines = [line for line in job.text().splitlines() if line.startswith("mlm-mpi run:")]
    assert lines == ["mlm-mpi run: lost node2; start again to go on from the last checkpoint"]
