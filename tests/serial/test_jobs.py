"""The job script, run with stubs in place of Slurm and the trainer; and the configurations it starts."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from mlm_mpi import config

JOBS = Path(__file__).parents[2] / "jobs"
SCRIPT = JOBS / "train.sbatch"

# Records its name, process id and arguments, makes a step if told to, and ends at the first SIGUSR1 or at once.
STUB = """#!/bin/bash
echo "${0##*/} $*" >>"$RECORD"
printf '%s\\0' "$@" >"$RECORD.${0##*/}"
echo "coll=${OMPI_MCA_coll:-}" >>"$RECORD.env"
[[ ${0##*/} == scontrol ]] && exit 0
[[ -n ${STEP:-}${FINISHES:-} ]] && mkdir -p "$RUN"
[[ -n ${STEP:-} ]] && echo '{}' >>"$RUN/metrics.jsonl"
[[ -n ${FINISHES:-} ]] && touch "$RUN/DONE"
[[ -n ${LASTS:-} ]] || exit "${CODE:-0}"
trap 'echo "$$ got USR1" >>"$RECORD"; ended=1' USR1
echo $$ >"$RECORD.pid"
while [[ -z ${ended:-} ]]; do sleep 0.02; done
sleep 0.1
echo "saved" >>"$RECORD"
"""


class Site:
    """A folder in which the script finds stubs for all it calls."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record = folder / "record"
        bin_folder = folder / "bin"
        bin_folder.mkdir()
        for name in ("mlm-mpi", "srun", "mpirun", "scontrol", "sbatch"):
            (bin_folder / name).write_text(STUB)
            (bin_folder / name).chmod(0o755)
        (folder / "site.sh").write_text("true\n")
        self.environment = {
            "PATH": f"{bin_folder}:{os.environ['PATH']}", "RECORD": str(self.record), "SITE": "site.sh",
            "SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_ID": "42", "SLURM_JOB_NUM_NODES": "1",
        }  # fmt: skip

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        arguments = words or ("c.toml", "run")
        run = {"RUN": arguments[1]} if len(arguments) > 1 else {}
        return subprocess.Popen(
            ["bash", str(SCRIPT), *arguments], env=self.environment | run | environment, cwd="/",
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, *words: str, **environment: str) -> tuple[int, list[str], str]:
        process = self.start(*words, **environment)
        _, err = process.communicate(timeout=20)
        return process.returncode, self.lines(), err

    def started(self, name: str) -> list[str]:
        """The words that a program was started with."""
        return self.record.with_suffix(f".{name}").read_text().split("\0")[:-1]

    def lines(self) -> list[str]:
        return self.record.read_text().splitlines() if self.record.exists() else []


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_the_script_is_short_and_correct_bash():
    assert len(SCRIPT.read_text().splitlines()) < 40
    for path in (SCRIPT, JOBS / "sites" / "example.sh"):
        subprocess.run(["bash", "-n", str(path)], check=True)


def test_the_script_holds_no_hyper_parameter():
    text = "".join(line for line in SCRIPT.read_text().splitlines(True) if not line.startswith("#"))
    assert "--set" not in text
    for section, values in config.to_table(config.load(None)).items():
        for name in values:
            assert not re.search(rf"\b{section}\.{name}\b|\b{name}\s*=", text), name


def test_slurm_signals_the_batch_shell_only():
    directives = re.findall(r"^#SBATCH (\S+)", SCRIPT.read_text(), re.MULTILINE)
    assert "--signal=B:USR1@120" in directives
    assert "--requeue --open-mode=append" in SCRIPT.read_text()


@pytest.mark.parametrize("path", sorted((JOBS / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_configurations_load(path):
    assert config.load(path).train.steps > 0


def test_gpt2_has_the_published_batch():
    gpt2 = config.load(JOBS / "configs" / "gpt2-124m.toml")
    assert gpt2.train.micro_batches * gpt2.train.rows * gpt2.model.context == 2**19
    assert gpt2.train.lanes == 64


def test_a_finished_run_is_not_requeued(site):
    assert site.run(STEP="1", FINISHES="1")[:2] == (0, ["mlm-mpi run -- train c.toml --run run"])


@pytest.mark.parametrize("code", ["0", "1", "137"])
def test_an_unfinished_run_is_requeued_whatever_the_exit_code(site, code):
    returned, lines, _ = site.run(STEP="1", CODE=code)
    assert returned == 0
    assert lines == ["mlm-mpi run -- train c.toml --run run", "scontrol requeue 42"]


def test_a_finished_run_is_believed_over_its_exit_code(site):
    assert site.run(STEP="1", FINISHES="1", CODE="1")[0] == 0


def test_an_attempt_without_a_step_is_not_repeated_for_ever(site):
    returned, lines, err = site.run(CODE="1")
    assert returned == 1
    assert lines == ["mlm-mpi run -- train c.toml --run run"]
    assert "no step was made" in err


def test_an_error_that_a_new_start_would_meet_again_is_not_requeued(site):
    returned, lines, err = site.run(STEP="1", CODE="2")
    assert returned == 2
    assert lines == ["mlm-mpi run -- train c.toml --run run"]
    assert err.startswith("train.sbatch: exit code 2") and err.count("\n") == 1


def test_requeues_have_a_limit(site):
    returned, lines, err = site.run(STEP="1", CODE="1", SLURM_RESTART_COUNT="50")
    assert (returned, len(lines)) == (1, 1)
    assert "requeued 50 times" in err


def test_srun_is_the_other_way_to_start(site):
    _, lines, _ = site.run(LAUNCH="srun", STEP="1", FINISHES="1", SLURM_CPUS_PER_TASK="2")
    assert lines == ["srun --mpi=pmix --kill-on-bad-exit=1 --cpus-per-task=2 mlm-mpi train c.toml --run run"]


def test_several_nodes_avoid_the_wrong_collectives(site):
    site.run(STEP="1", FINISHES="1", SLURM_JOB_NUM_NODES="2")
    assert site.record.with_suffix(".env").read_text() == "coll=^han\n"


@pytest.mark.parametrize("launch", ["mpirun", "srun"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 0), (signal.SIGTERM, 143)])
def test_the_signal_reaches_the_launcher_which_may_save(site, launch, number, code):
    """SIGUSR1 is the time limit: requeue. SIGTERM is scancel, or Slurm's own requeue: no other."""
    process = site.start(LASTS="1", STEP="1", LAUNCH=launch)
    pid_file = site.record.with_suffix(".pid")
    end = time.monotonic() + 10
    while not (pid_file.exists() and pid_file.read_text().strip()) and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(number)
    process.communicate(timeout=20)
    pid = pid_file.read_text().strip()
    assert process.returncode == code
    assert site.lines()[1:] == [f"{pid} got USR1", "saved", *(["scontrol requeue 42"] if code == 0 else [])]


def test_the_log_says_how_to_stop_without_losing_work(site):
    out, _ = site.start(STEP="1", FINISHES="1").communicate(timeout=20)
    assert out.count("\n") == 1 and "scancel --batch --signal=TERM 42" in out


def test_further_arguments_arrive_as_they_were_written(site):
    more = ["--set", "train.steps=10", "--device", "gpu", "--set", "log.title=a  'b' \"c\" $(touch x) * \\ ü", ""]
    run = "runs/mit Umläuten und  'q'"
    assert site.run("my käse.toml", run, *more, STEP="1", FINISHES="1")[0] == 0
    assert site.started("mlm-mpi") == ["run", "--", "train", "my käse.toml", "--run", run, *more]
    site.run("my käse.toml", run, *more, LAUNCH="srun", STEP="1", FINISHES="1")
    assert site.started("srun")[-10:] == ["my käse.toml", "--run", run, *more]
    assert (site.folder / run / "DONE").exists() and not (site.folder / "x").exists()


@pytest.mark.parametrize("words", [("",), ("c.toml",), ("c.toml", ""), ("", "run"), ("c.toml", "", "--set", "a.b=1")])
def test_an_empty_configuration_or_run_folder_is_refused(site, words):
    code, lines, err = site.run(*words)
    assert (code, lines, err.count("\n")) == (2, [], 1)
    assert "is empty: sbatch jobs/train.sbatch CONFIG RUN_FOLDER" in err


@pytest.mark.parametrize("name", ["MAX_REQUEUES", "LAUNCH"])
@pytest.mark.parametrize("junk", ["junk", "-1", "a[$(touch x)]", "1 2"])
def test_junk_in_its_own_settings_is_refused(site, name, junk):
    code, lines, err = site.run(STEP="1", CODE="1", **{name: junk})
    assert (code, lines, err.count("\n")) == (2, [], 1)
    assert f"{name} '{junk}' must be" in err
    assert not (site.folder / "x").exists() and not Path("/x").exists()


@pytest.mark.parametrize("name", ["SLURM_RESTART_COUNT", "SLURM_JOB_NUM_NODES", "SLURM_CPUS_PER_TASK"])
@pytest.mark.parametrize("junk", ["", "junk", "a[$(touch x)]", "08"])
def test_junk_from_slurm_runs_no_code_and_stops_no_run(site, name, junk):
    code, lines, err = site.run(STEP="1", CODE="1", **{name: junk})
    assert (code, lines[1:], err) == (0, ["scontrol requeue 42"], "")
    assert not (site.folder / "x").exists() and not Path("/x").exists()


def test_the_number_of_nodes_may_be_missing(site):
    del site.environment["SLURM_JOB_NUM_NODES"]
    assert site.run(STEP="1", FINISHES="1")[0::2] == (0, "")
    assert site.record.with_suffix(".env").read_text() == "coll=\n"


@pytest.mark.parametrize("wrong", [{"SLURM_SUBMIT_DIR": ""}, {"SITE": "nowhere.sh"}])
def test_a_wrong_start_is_one_line(site, wrong):
    code, lines, err = site.run(**wrong)
    assert (code, lines, err.count("\n")) == (2, [], 1)


def test_a_refused_start_leaves_no_run_folder(site):
    """Also one in a folder that may not be written to, which the trainer refuses: nothing is repeated."""
    assert site.run(CODE="2")[0] == 2
    assert not (site.folder / "run").exists()


def test_a_finished_metrics_file_of_before_is_no_step(site):
    (site.folder / "run").mkdir()
    (site.folder / "run" / "metrics.jsonl").write_text("{}\n")
    assert site.run(CODE="1")[0] == 1


def test_the_done_of_an_earlier_start_is_no_success(site):
    """train.steps raised, or the corpus moved: the trainer refuses to start, and says so with 2."""
    (site.folder / "run").mkdir()
    (site.folder / "run" / "DONE").touch()
    code, lines, _ = site.run(CODE="2")
    assert code == 2
    assert not [line for line in lines if line.startswith("scontrol")]
