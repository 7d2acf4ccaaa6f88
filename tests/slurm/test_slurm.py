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

import re
import shutil
import time
from pathlib import Path

import pytest
from cluster import LAB, LAB_FOLDER, SCRIPT, SITE, STEPS, Cluster, command

ONE_WAY = pytest.mark.parametrize("slurm", ["linuxproc"], indirect=True)
EACH_WAY = pytest.mark.parametrize("slurm", ["linuxproc", pytest.param("pgid", marks=pytest.mark.slow)], indirect=True)
ONE_NODE = ("--nodes=1", "--ntasks-per-node=2")
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")
RANKS = "mlm_mpi train"  # in their command lines, and not in those of launchers and lookouts

NOT_HEARD = (
    r"^mlm-mpi: node2 is not heard for \d+ s: rank 1 \(process \d+ on node2, last seen \d+ s ago: .*\): its link "
)


def running(node: str, what: str = "mlm[_-]mpi") -> str:
    """Processes on a node: ours (ranks, lookouts, `mlm-mpi run`), or others. A pattern that is not in its own words."""
    return command(LAB, "exec", node, "bash", "-c", f"pgrep -af '{what}' || true")


@ONE_WAY
def test_the_time_limit_saves_and_the_requeued_job_goes_on(cluster: Cluster, undisturbed: str):
    """Slurm looks at time limits every 30 s and warns 30 s too early: here when the job is two seconds old."""
    begun = (LAB_FOLDER / "slurmctld.pid").stat().st_mtime
    time.sleep((28 - (time.time() - begun)) % 30)
    job = cluster.submit(*TWO_NODES, "--time=2", "--signal=B:USR1@89")
    job.steps_are_made(1)
    job.leaves("PENDING", restarts=1)
    job.requeued()
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
    assert f"steps {saved + 1} to {STEPS}" in again.text()
    assert again.weights() == undisturbed


@EACH_WAY
@pytest.mark.parametrize(
    ("launch", "nodes"),
    [("mpirun", ONE_NODE), ("srun", ONE_NODE), ("srun", TWO_NODES)],
    ids=["mpirun", "srun", "srun2"],
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
    job.requeued()
    lines = [line for line in job.text().splitlines() if line.startswith("mlm-mpi run:")]
    # whether mpirun hears first of its daemon or of srun, which had started it, is a race; srun names the node itself
    lost = {"mlm-mpi run: lost node2", "mlm-mpi run: lost a node: srun ended with 137"}
    assert len(lines) == 1 and set(lines) <= {f"{line}; start again to go on from the last checkpoint" for line in lost}
    assert "node2" in job.text()


@ONE_WAY
def test_a_lost_node_ends_the_job_which_goes_on_when_the_node_is_back(cluster: Cluster, undisturbed: str):
    """A power loss: nobody resets a connection, so the lookout of the other node is the first to know."""
    job = cluster.submit(*TWO_NODES, "checkpoint.every=20")
    job.steps_are_made(60)
    command(LAB, "crash", "node2")
    try:
        job.leaves("PENDING", restarts=1)
        assert re.search(NOT_HEARD, job.text(), re.MULTILINE), job.text()
        job.requeued()
    finally:
        command(LAB, "boot", "node2")
    job.wait(lambda: (job.run / "DONE").exists())
    job.leaves("COMPLETED")
    assert job.weights() == undisturbed


@ONE_WAY
def test_a_rank_that_is_stopped_alone_on_its_node_is_killed_and_the_job_goes_on(cluster: Cluster, undisturbed: str):
    """Nobody of its node waits for it, so its lookout looks at it."""
    job = cluster.submit(*TWO_NODES)
    job.steps_are_made()
    assert "lookouts          2 nodes watch each other\n" in job.text()
    command(LAB, "exec", "node2", "pkill", "-STOP", "-f", RANKS)
    job.wait(lambda: (job.run / "DONE").exists())
    job.leaves("COMPLETED", restarts=0)
    lines = [line for line in job.text().splitlines() if line.startswith("mlm-mpi")]
    assert len(lines) == 1 and lines[0].startswith("mlm-mpi: rank 1 did last, "), lines
    assert re.search(r"\(process \d+ on node2, stopped\): killed, and the others go on$", lines[0])
    assert job.weights() == undisturbed


@ONE_WAY
def test_a_cut_link_ends_both_sides_and_the_job_goes_on_when_it_is_back(cluster: Cluster, undisturbed: str):
    """Nobody resets a connection: without lookouts both sides would wait for comm.timeout_s."""
    job = cluster.submit(*TWO_NODES, "checkpoint.every=20", "comm.timeout_s=100000")
    job.steps_are_made(60)
    command(LAB, "cut", "node2")
    try:
        for node in ("node1", "node2"):
            job.wait(lambda node=node: not running(node))
        lines = [line for line in job.text().splitlines() if line.startswith("mlm-mpi")]
        assert len(lines) == 1, lines
        assert re.match(NOT_HEARD, lines[0]), lines
    finally:
        command(LAB, "mend", "node2")
    job.leaves("PENDING", restarts=1)
    assert not running("node2", "[p]rted"), "mpirun's daemon is Slurm's to end"
    job.wait(lambda: (job.run / "DONE").exists())
    job.leaves("COMPLETED")
    assert job.weights() == undisturbed


@ONE_WAY
def test_plain_sbatch_from_any_folder_finds_the_site_beside_the_original(
    cluster: Cluster, tmp_path: Path, undisturbed: str
):
    """As pip installs it. Two nodes without a number of ranks: one on each. Slurm's own log says where the log is."""
    home = tmp_path / "ein env" / "jobs"
    (home / "sites").mkdir(parents=True)
    shutil.copy(SCRIPT, home)
    (home / "sites" / "example.sh").write_text(SITE)
    job = cluster.submit("--nodes=2", plain=home / SCRIPT.name)
    job.wait(lambda: (job.run / "DONE").exists())
    job.leaves("COMPLETED", restarts=0)
    assert f"ranks: 2 on 2 node(s), 1 CPUs each, 0 GPUs a node; site: {home}/sites/example.sh\n" in job.text()
    assert job.weights() == undisturbed
    slurms = (cluster.folder / f"job-{job.number}.log").read_text()
    assert slurms == f"train.sbatch: the log is {job.log.relative_to(cluster.folder)}\n"


@ONE_WAY
def test_the_last_task_of_an_array_is_requeued_alone(cluster: Cluster, undisturbed: str):
    """Its SLURM_JOB_ID is that of the whole array."""
    array = cluster.submit("--array=1-2", "--ntasks=1", "log.every=10%a", run="läufe/%a")
    first, last = (cluster.job(f"{array.number}_{task}", f"läufe/{task}") for task in (1, 2))
    last.steps_are_made()
    command("scancel", "--batch", "--signal=USR1", last.number)
    last.leaves("PENDING", restarts=1)
    last.requeued()
    assert last.saved() < STEPS
    for job, restarts in ((first, 0), (last, 1)):
        job.wait(lambda run=job.run: (run / "DONE").exists())
        job.leaves("COMPLETED", restarts)
        assert job.weights() == undisturbed
    assert {path.name for path in last.run.parent.iterdir()} == {
        "1", "2", f"slurm-{first.number}.log", f"slurm-{last.number}.log"
    }  # fmt: skip
    assert "every = 102\n" in (last.run / "config.toml").read_text()


@ONE_WAY
def test_gpus_get_a_rank_each_and_the_trainer_its_device(cluster: Cluster):
    """The two GPUs of a node are files, and there is no CuPy: what the trainer says of that shows how it was asked."""
    job = cluster.submit("--gres=gpu:2", "backend.device=gpu")
    job.leaves("FAILED", restarts=0)
    assert " TresPerNode=gres:gpu:2\n" in job.record()
    assert "ranks: 2 on 1 node(s), 1 CPUs each, 2 GPUs a node; " in job.text()
    assert "CuPy" in job.text() and "train.sbatch: exit code 2, " in job.text()


@ONE_WAY
def test_partition_and_account_come_from_the_site_file_and_ranks_from_slurm(cluster: Cluster):
    """Nodes have 4 CPUs, so 8 ranks would never start. Nor will this job: its 4 hours exceed the partition's limit."""
    (cluster.folder / "short.sh").write_text(f"{SITE}export SBATCH_PARTITION=short SBATCH_ACCOUNT=physics\n")
    words = [SCRIPT, "--cpus-per-task=2", cluster.config, "runs/a"]
    out = command("bash", "-c", '"$@" 2>&1', "bash", *words, cwd=cluster.folder, SITE="short.sh")
    number = out.split()[3].rstrip(",")
    record = command("scontrol", "show", "job", number)
    command("scancel", number)
    assert all(f"{fact} " in record for fact in ("   Partition=short", " Account=physics", " NumTasks=2"))
    assert out.splitlines() == [
        f"Submitted batch job {number}, --ntasks=2, log: runs/a/slurm-{number}.log",
        f"train.sbatch: as it is it will never start (PartitionTimeLimit): scancel {number}, and change that",
    ]
