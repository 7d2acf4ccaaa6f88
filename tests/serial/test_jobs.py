"""The job script, run with stubs in place of Slurm and the trainer; and the configurations it starts."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlm_mpi import __main__ as entry
from mlm_mpi import config

JOBS = Path(__file__).parents[2] / "jobs"
SCRIPT = JOBS / "train.sbatch"

# Records its name, process id and arguments, makes a step if told to, and ends at the first SIGUSR1 or at once.
STUB = """#!/bin/bash
name=${0##*/}
case "$name $1" in
    "scontrol show") printf '   Partition=main\\n   Command=%s\\n   WorkDir=x\\n' "$COMMAND"; exit 0 ;;
    "sleep 2") exit 0 ;; # the submission waits for Slurm
    "sleep "*) exec /bin/sleep "$1" ;;
    "mlm-mpi run")
        [[ $2 == --check && $4 -gt ${LANES:-8} ]] && { echo "$4 ranks: no" >&2; exit 2; }
        [[ $2 == --check ]] && exit 0 ;;
    "squeue "*) echo "${REASON:-Priority}"; exit 0 ;;
    "sbatch --test-only") echo "sbatch: no, allocation failure: too big" >&2; ((${2#*=} <= ${FITS:-8})); exit ;;
esac
echo "$name $*" >>"$RECORD"
printf '%s\\0' "$@" >"$RECORD.$name"
echo "coll=${OMPI_MCA_coll:-} ntasks=${SLURM_NTASKS:-} partition=${SBATCH_PARTITION:-}" >>"$RECORD.env"
[[ $name == scontrol ]] && exit "${SCONTROL:-0}"
[[ $name == sbatch ]] && { echo "Submitted batch job 42"; exit 0; }
[[ -n ${STEP:-} ]] && echo '{}' >>"$RUN/metrics.jsonl"
[[ -n ${FINISHES:-} ]] && touch "$RUN/DONE"
[[ -n ${LASTS:-} ]] || exit "${CODE:-0}"
exec "$PYTHON" -Sc "$LISTENER" # bash cannot listen to a signal that was ignored when it began
"""
LISTENER = """
import os, signal, time
def begin():
    with open(os.environ["RECORD"] + ".pid", "w") as file:
        file.write(str(os.getpid()))
late, heard, record = float(os.environ.get("LATE", 0)), [], open(os.environ["RECORD"], "a", buffering=1)
if late:
    begin()
    time.sleep(late)
signal.signal(signal.SIGUSR1, lambda *what: heard.append(what))
if not late:
    begin()
while not heard:
    time.sleep(0.02)
print(os.getpid(), "got USR1", file=record)
time.sleep(0.1)
print("saved", file=record)
"""


class Site:
    """A folder in which the script finds stubs for all it calls.

    home/jobs   the script and its sites       work    from where it is submitted
    spool       Slurm's copy of the script     bin     the stubs
    """

    def __init__(self, folder: Path) -> None:
        self.home, self.work, spool, self.stubs = (folder / name for name in ("ho me/jobs", "work", "spool", "bin"))
        self.record = folder / "record"
        for path in (self.home / "sites", self.work, spool, self.stubs):
            path.mkdir(parents=True)
        self.script, self.copy = self.home / "train.sbatch", spool / "slurm_script"
        for path in (self.script, self.copy):
            shutil.copy(SCRIPT, path)
        for name in ("mlm-mpi", "srun", "mpirun", "scontrol", "sbatch", "squeue", "sleep"):
            (self.stubs / name).write_text(STUB)
            (self.stubs / name).chmod(0o755)
        (self.home / "sites" / "example.sh").write_text("echo example.sh was read\n")
        (self.work / "c.toml").touch()
        self.environment = {"PATH": f"{self.stubs}:{os.environ['PATH']}", "RECORD": str(self.record)}
        self.environment |= {"PYTHON": sys.executable, "LISTENER": LISTENER}

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        """The job, as Slurm starts it: a copy of the script, in any folder."""
        words = words or ("c.toml", "run")
        slurm = {
            "SLURM_SUBMIT_DIR": str(self.work), "SLURM_JOB_ID": "42", "SLURM_JOB_NUM_NODES": "1",
            "COMMAND": f"{self.script} {' '.join(words)}", "RUN": str(self.work / words[-1]),
        }  # fmt: skip
        return self._popen([str(self.copy), *words], "/", slurm | environment)

    def run(self, *words: str, **environment: str) -> tuple[int, list[str], str]:
        """(exit code, programs started, what it said on stderr, in its log or not) of the job."""
        return self._ended(self.start(*words, **environment))

    def submit(self, *words: str, **environment: str) -> tuple[int, list[str], str]:
        """The same of the script when it is started by hand."""
        return self._ended(self._popen([str(self.script), *words], str(self.work), environment))

    def said(self, run: str = "run", job: str = "42") -> str:
        log = self.work / run / f"slurm-{job}.log"
        return log.read_text() if log.exists() else ""

    def started(self, name: str) -> list[str]:
        """The words that a program was started with."""
        return self.record.with_suffix(f".{name}").read_text().split("\0")[:-1]

    def seen(self) -> str:
        """Some of the environment of the last program."""
        return self.record.with_suffix(".env").read_text().splitlines()[-1]

    def lines(self) -> list[str]:
        return self.record.read_text().splitlines() if self.record.exists() else []

    def _popen(self, words: list[str], folder: str, environment: dict[str, str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", *words], env=self.environment | environment, cwd=folder,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def _ended(self, process: subprocess.Popen[str]) -> tuple[int, list[str], str]:
        self.out, err = process.communicate(timeout=20)
        log = "".join(line for line in self.said().splitlines(True) if line.startswith("train.sbatch"))
        return process.returncode, self.lines(), err + log


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_the_script_is_short_and_correct_bash():
    assert len(SCRIPT.read_text().splitlines()) <= 120
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
    assert "requeued 50 times" in err and "requeue " not in err


def test_srun_is_the_other_way_to_start(site):
    _, lines, _ = site.run(LAUNCH="srun", STEP="1", FINISHES="1", SLURM_CPUS_PER_TASK="2")
    assert lines == ["srun --mpi=pmix --kill-on-bad-exit=1 --cpus-per-task=2 mlm-mpi train c.toml --run run"]


def test_several_nodes_avoid_the_wrong_collectives(site):
    site.run(STEP="1", FINISHES="1", SLURM_JOB_NUM_NODES="2")
    assert site.seen().startswith("coll=^han ")
    site.run(STEP="1", FINISHES="1", SLURM_JOB_NUM_NODES="1")
    assert site.seen().startswith("coll= ")


@pytest.mark.parametrize("launch", ["mpirun", "srun"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 0), (signal.SIGTERM, 143)])
def test_the_signal_reaches_the_launcher_which_may_save(site, launch, number, code):
    """SIGUSR1 is the time limit: requeue. SIGTERM is scancel, or Slurm's own requeue: no other."""
    pid = _interrupted(site, number, code, LAUNCH=launch)
    assert site.lines()[1:] == [f"{pid} got USR1", "saved", *(["scontrol requeue 42"] if code == 0 else [])]


def test_a_signal_that_comes_before_the_launcher_listens_is_repeated(site):
    """Else it would kill `mlm-mpi run` while Python imports (seen in CI): no step made, no requeue."""
    pid = _interrupted(site, signal.SIGUSR1, 0, LATE="0.5")
    assert site.lines()[1:] == [f"{pid} got USR1", "saved", "scontrol requeue 42"]


def test_a_signal_that_comes_before_the_launcher_is_started_is_kept(site):
    """Else it would kill the job's shell (seen in CI, where it was warned at its second second)."""
    (site.home / "sites" / "example.sh").write_text("kill -USR1 $$\n")
    returned, lines, err = site.run(LASTS="1", STEP="1")
    assert returned == 0 and "requeue 1 of 50" in err
    assert lines[1].endswith(" got USR1") and lines[2:] == ["saved", "scontrol requeue 42"]


def _interrupted(site: Site, number: int, code: int, **environment: str) -> str:
    """The process id of the program of a job that got a signal, and had to end with an exit code."""
    process = site.start(LASTS="1", STEP="1", **environment)
    pid_file = site.record.with_suffix(".pid")
    end = time.monotonic() + 10
    while not (pid_file.exists() and pid_file.read_text().strip()) and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == code
    return pid_file.read_text().strip()


def test_the_log_says_how_to_stop_without_losing_work(site):
    site.run(STEP="1", FINISHES="1")
    assert "to save: scancel --batch --signal=TERM 42 (" in site.said()


def test_a_requeue_is_counted(site):
    """Slurm sets no count at the first start."""
    assert site.run(STEP="1")[2] == "train.sbatch: requeue 1 of 50\n"
    assert site.run(STEP="1", SLURM_RESTART_COUNT="6", MAX_REQUEUES="7")[2].endswith("requeue 7 of 7\n")


def test_a_requeue_that_slurm_refuses_is_none(site):
    code, _, err = site.run(STEP="1", SCONTROL="1")
    assert (code, err.splitlines()[-1]) == (1, "train.sbatch: not requeued: submit again")


def test_further_arguments_arrive_as_they_were_written(site):
    more = ["--set", "train.steps=10", "--device", "gpu", "--set", "log.title=a  'b' \"c\" $(touch x) * \\ ü & %a", ""]
    run = "runs/mit Umläuten und  'q'"
    (site.work / "my käse.toml").touch()
    site.run("my käse.toml", run, *more)
    assert site.started("mlm-mpi") == ["run", "--", "train", "my käse.toml", "--run", run, *more]
    site.run("my käse.toml", run, *more, LAUNCH="srun")
    assert site.started("srun")[-10:] == ["my käse.toml", "--run", run, *more]
    assert site.submit("--comment=a  'b' $(touch x) *", "my käse.toml", run, *more)[0] == 0
    assert site.started("sbatch")[2] == "--comment=a  'b' $(touch x) *"
    assert site.started("sbatch")[-9:] == ["my käse.toml", run, *more]
    assert not (site.work / "x").exists() and not Path("/x").exists()


WAYS = pytest.mark.parametrize("way", ["run", "submit"])


@WAYS
@pytest.mark.parametrize("words", [("",), ("c.toml",), ("c.toml", ""), ("", "run"), ("c.toml", "", "--set", "a.b=1")])
def test_an_empty_configuration_or_run_folder_is_refused(site, way, words):
    code, lines, err = getattr(site, way)(*words)
    assert (code, lines, err.count("\n")) == (2, [], 1)
    assert "is empty: jobs/train.sbatch CONFIG RUN" in err


@WAYS
@pytest.mark.parametrize("name", ["MAX_REQUEUES", "LAUNCH"])
@pytest.mark.parametrize("junk", ["junk", "-1", "a[$(touch x)]", "1 2"])
def test_junk_in_its_own_settings_is_refused(site, way, name, junk):
    code, lines, err = getattr(site, way)("c.toml", "run", **{name: junk})
    assert (code, lines, err.count("\n")) == (2, [], 1)
    assert f"{name} '{junk}' must be" in err
    assert not (site.work / "x").exists() and not Path("/x").exists()


@pytest.mark.parametrize(
    "name", ["SLURM_RESTART_COUNT", "SLURM_JOB_NUM_NODES", "SLURM_CPUS_PER_TASK", "SLURM_GPUS_ON_NODE", "SLURM_NTASKS"]
)
@pytest.mark.parametrize("junk", ["", "junk", "a[$(touch x)]", "08"])
def test_junk_from_slurm_runs_no_code_and_stops_no_run(site, name, junk):
    code, lines, err = site.run(STEP="1", CODE="1", **{name: junk})
    number = 9 if (name, junk) == ("SLURM_RESTART_COUNT", "08") else 1
    assert (code, lines[1:]) == (0, ["scontrol requeue 42"])
    assert err.splitlines()[-1] == f"train.sbatch: requeue {number} of 50"
    assert not (site.work / "x").exists() and not Path("/x").exists()


def test_the_number_of_nodes_may_be_missing(site):
    site.run(STEP="1", FINISHES="1", SLURM_JOB_NUM_NODES="")
    assert site.seen().startswith("coll= ntasks=1 ")


def test_slurm_names_no_ranks_that_nobody_asked_for(site):
    """SLURM_NTASKS is unset then, also on two nodes, where `mlm-mpi run` would start one rank."""
    site.run(FINISHES="1", SLURM_JOB_NUM_NODES="2")
    assert " ntasks=2 " in site.seen() and site.said().startswith("ranks: 2 on 2 node(s)")
    site.run(FINISHES="1", SLURM_JOB_NUM_NODES="2", SLURM_NTASKS="6")
    assert " ntasks=6 " in site.seen()


def test_idle_gpus_are_named(site):
    site.run(FINISHES="1", SLURM_JOB_NUM_NODES="2", SLURM_NTASKS="2", SLURM_GPUS_ON_NODE="4")
    assert "train.sbatch: a rank uses one GPU: ask for --ntasks-per-node=4\n" in site.said()
    site.run("c.toml", "b", RUN=str(site.work / "b"), FINISHES="1", SLURM_NTASKS="4", SLURM_GPUS_ON_NODE="4")
    assert "4 GPUs a node" in site.said("b") and "a rank uses" not in site.said("b")


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"SLURM_SUBMIT_DIR": ""}, "submit this with sbatch"),
        ({"SITE": "nowhere.sh"}, "SITE 'nowhere.sh' is no file, neither from "),
    ],
)
def test_a_wrong_start_is_one_line(site, wrong, text):
    code, lines, err = site.run(**wrong)
    assert (code, lines, err.count("\n")) == (2, [], 1)
    assert text in err


@WAYS
def test_a_program_that_is_not_there_is_one_line(site, way):
    (site.stubs / "mlm-mpi").unlink()
    code, lines, err = getattr(site, way)("c.toml", "run", PATH=f"{site.stubs}:/usr/bin:/bin")
    assert (code, lines, err.count("\n")) == (2, [], 1)
    assert "no mlm-mpi on PATH: activate its environment" in err


@WAYS
def test_a_configuration_that_is_not_there_is_one_line(site, way):
    """As where sbatch's option and its value are two words, and the value would be the configuration."""
    code, lines, err = getattr(site, way)("2", "c.toml", "run")
    assert (code, lines, err.count("\n")) == (2, [], 1)
    assert f"CONFIG '2' is no file in {site.work}; options of sbatch go first, like --nodes=2" in err


def test_options_of_sbatch_in_the_wrong_place_are_named(site):
    """`sbatch jobs/train.sbatch --nodes=2 CONFIG RUN`: nobody would read them."""
    code, lines, err = site.run("--nodes=2", "c.toml", "run")
    assert (code, lines, err.count("\n")) == (2, [], 1)
    assert "'--nodes=2'" in err


def test_a_refused_start_leaves_only_its_log(site):
    assert site.run(CODE="2")[0] == 2
    assert [path.name for path in (site.work / "run").iterdir()] == ["slurm-42.log"]


@WAYS
def test_a_run_folder_that_takes_no_log_is_one_line(site, way):
    (site.work / "run").touch()
    code, lines, err = getattr(site, way)("c.toml", "run")
    assert code != 0 and lines == [] and err.count("\n") == 1 and "File exists" in err


def test_a_finished_metrics_file_of_before_is_no_step(site):
    (site.work / "run").mkdir()
    (site.work / "run" / "metrics.jsonl").write_text("{}\n")
    assert site.run(CODE="1")[0] == 1


def test_the_done_of_an_earlier_start_is_no_success(site):
    """train.steps raised, or the corpus moved: the trainer refuses to start, and says so with 2."""
    (site.work / "run").mkdir()
    (site.work / "run" / "DONE").touch()
    code, lines, _ = site.run(CODE="2")
    assert code == 2
    assert not [line for line in lines if line.startswith("scontrol")]


def test_the_log_is_in_the_run_folder_and_slurms_own_says_where(site):
    site.run(FINISHES="1")
    assert site.out == "example.sh was read\ntrain.sbatch: the log is run/slurm-42.log\n"
    assert site.said().startswith("ranks: 1 on 1 node(s), 1 CPUs each, 0 GPUs a node; site: ")
    with (site.work / "run" / "slurm-43.log").open("a") as log:  # Slurm opened it there already
        environment = {"SLURM_JOB_ID": "43", "SLURM_SUBMIT_DIR": str(site.work), "RUN": str(site.work / "run")}
        subprocess.run(
            ["bash", str(site.copy), "c.toml", "run"], env=site.environment | environment | {"COMMAND": "x"},
            stdout=log, check=False, stderr=subprocess.PIPE,
        )  # fmt: skip
    assert "the log is" not in site.said("run", "43") and "to save: scancel" in site.said("run", "43")


@WAYS
@pytest.mark.parametrize(
    "named", ["", "home.sh", "here.sh", "sub/here.sh", "ABSOLUTE"], ids=["none", "beside", "here", "below", "absolute"]
)
def test_the_site_file_is_found(site, way, named):
    """By SITE, from the folder of submission or beside the script's original; else the example there."""
    (site.work / "sub").mkdir()
    for path in ("home/sites/home.sh", "work/here.sh", "work/sub/here.sh", "elsewhere.sh"):
        target = site.record.parent / path.replace("home/", "ho me/jobs/")
        target.write_text('echo "$BASH_SOURCE"; export SBATCH_PARTITION="${BASH_SOURCE##*/}"')
    if named == "ABSOLUTE":
        named = str(site.record.parent / "elsewhere.sh")
    getattr(site, way)("c.toml", "run", **({"SITE": named} if named else {}))
    assert f"partition={Path(named).name}" in site.seen()
    assert ("example.sh was read" in site.out) == (not named)


def test_a_script_without_sites_needs_none(site):
    shutil.rmtree(site.home / "sites")
    assert site.run(FINISHES="1")[0] == 0 and "; site: none\n" in site.said()
    assert site.submit("c.toml", "run")[0] == 0


@WAYS
def test_a_site_file_that_fails_is_one_line(site, way):
    (site.work / "site.sh").write_text("false")
    code, lines, err = getattr(site, way)("c.toml", "run", SITE="site.sh")
    assert (code, lines, err.count("\n")) == (2, [], 1)
    assert "its last command must succeed" in err


def test_by_hand_it_submits_itself_with_what_it_found(site):
    """SITE as a path that holds in the job, whatever Slurm does with the environment."""
    assert site.submit("--nodes=2", "--time=5", "c.toml", "runs/a", "--device", "gpu")[0] == 0
    *before, script, found, config_file, run, device, gpu = site.started("sbatch")
    assert before == ["--ntasks=8", "--output=runs/a/slurm-%j.log", "--nodes=2", "--time=5"]
    assert (script, found) == (str(site.script), f"--site={site.home}/sites/example.sh")
    assert (config_file, run, device, gpu) == ("c.toml", "runs/a", "--device", "gpu")
    assert site.out.splitlines()[1:] == ["Submitted batch job 42, --ntasks=8, log: runs/a/slurm-42.log"]
    assert (site.work / "runs/a").is_dir()
    shutil.rmtree(site.home)  # the record of the job is not asked
    (site.work / "other.sh").write_text("echo other.sh was read")
    site.run(f"--site={site.work}/other.sh", "c.toml", "run", "--device", "gpu", FINISHES="1")
    assert site.out.startswith("other.sh was read")
    assert site.started("mlm-mpi") == ["run", "--", "train", "c.toml", "--run", "run", "--device", "gpu"]


@pytest.mark.parametrize(("fits", "lanes", "ranks"), [("100", 100, 8), ("7", 8, 4), ("1", 8, 1), ("8", 2, 2)])
def test_it_asks_for_as_many_ranks_as_there_are_lanes_and_slurm_can_start(site, fits, lanes, ranks):
    code, _, err = site.submit("c.toml", "run", FITS=fits, LANES=str(lanes))
    assert (code, err) == (0, "")
    assert site.started("sbatch")[0] == f"--ntasks={ranks}"


@pytest.mark.parametrize(("option", "lanes"), [("--time=5", 0), ("--ntasks=9", 8), ("-n9", 8)])
def test_what_the_trainer_would_refuse_is_not_submitted(site, option, lanes):
    code, lines, err = site.submit(option, "c.toml", "run", LANES=str(lanes))
    assert (code, lines, err.count("\n")) == (2, [], 1)
    assert err in ("1 ranks: no\n", "9 ranks: no\n") and not (site.work / "run").exists()


@pytest.mark.parametrize(
    ("ranks", "more", "text"), [("8", [], ""), ("9", [], "9 ranks"), ("1", ["--set", "data.a=1"], "data.a")]
)
def test_how_the_submission_asks_the_trainer(capsys, ranks, more, text):
    words = ["run", "--check", "-n", ranks, "--", "train", str(JOBS / "configs" / "tiny.toml"), "--run", "a", *more]
    assert entry.main(words) == (2 if text else 0)
    out, err = capsys.readouterr()
    assert out == "" and text in err and err.count("\n") == bool(text)


def test_a_cluster_that_can_start_no_rank_is_one_line(site):
    code, lines, err = site.submit("c.toml", "run", FITS="0")
    assert (code, lines, err.count("\n")) == (2, [], 1)
    assert "one rank: sbatch: no, allocation failure: too big (--ntasks=N would wait for nodes)" in err
    assert not (site.work / "run").exists()
    assert site.submit("--ntasks=4", "c.toml", "run", FITS="0")[0] == 0


@pytest.mark.parametrize(
    ("options", "environment", "first"),
    [
        (["-n4"], {}, "--output"),
        (["--ntasks-per-node=3", "--gres=gpu:4"], {}, "--output"),
        (["--gres=gpu:4"], {}, "--ntasks-per-node=4"),
        (["--gres=gpu:1g.10gb:2", "--nodes=2"], {}, "--ntasks-per-node=2"),
        (["--gres=lustre:1,gpu:a100:3,x:1"], {}, "--ntasks-per-node=3"),
        (["--gpus-per-node=h100:16"], {}, "--ntasks-per-node=16"),
        ([], {"SBATCH_GRES": "gpu:5"}, "--ntasks-per-node=5"),
        ([], {"SBATCH_GPUS_PER_NODE": "5"}, "--ntasks-per-node=5"),
    ],
)
def test_ranks_are_those_asked_for_or_one_for_each_gpu(site, options, environment, first):
    assert site.submit(*options, "c.toml", "run", **environment)[0] == 0
    assert site.started("sbatch")[0].startswith(first)


@pytest.mark.parametrize("option", ["--gres=gpu", "--gres=gpu:a100", "-G4", "--gpus=4", "--gpus-per-task=1"])
def test_gpus_without_a_number_for_a_node_are_one_line(site, option):
    code, lines, err = site.submit(option, "c.toml", "run")
    assert (code, lines, err.count("\n")) == (2, [], 1)
    assert "Give --gres=gpu:N, or --ntasks-per-node=N too" in err


@pytest.mark.parametrize(("reason", "told"), [("PartitionTimeLimit", True), ("Priority", False), ("Resources", False)])
def test_a_job_that_can_never_start_is_told(site, reason, told):
    code, _, err = site.submit("c.toml", "run", REASON=reason)
    assert code == 0
    assert err == (f"train.sbatch: as it is it will never start ({reason}): scancel 42, and change that\n" * told)


def test_an_array_is_a_run_for_each_task(site):
    """A requeue names the task: the last one bears the job number of the whole array."""
    task = {"SLURM_ARRAY_JOB_ID": "42", "SLURM_ARRAY_TASK_ID": "7"}
    words = ("c.toml", "runs/50%/seed-%a", "--set", "train.seed=%a")
    assert site.submit("--array=0-7", *words)[0] == 0
    assert "--output=runs/50%%/slurm-%A_%a.log" in site.started("sbatch")
    assert site.started("sbatch")[-4:] == list(words)
    assert ", log: runs/50%/seed-%a/slurm-42_%a.log\n" in site.out
    assert site.run(*words, STEP="1", RUN=str(site.work / "runs/50%/seed-7"), **task)[0] == 0
    assert site.started("mlm-mpi")[2:] == ["train", "c.toml", "--run", "runs/50%/seed-7", "--set", "train.seed=7"]
    assert site.lines()[-1] == "scontrol requeue 42_7"
    said = site.said("runs/50%/seed-7", "42_7")
    assert "--signal=TERM 42_7 " in said and "requeue 1 of 50" in said


@pytest.mark.parametrize("option", ["--array=0-3", "-a0-3", "SBATCH_ARRAY_INX"])
def test_tasks_of_an_array_may_not_share_a_run_folder(site, option):
    environment = {option: "0-3"} if option.startswith("S") else {}
    code, lines, err = site.submit(*([] if environment else [option]), "c.toml", "run", **environment)
    assert (code, lines, err.count("\n")) == (2, [], 1)
    assert "RUN 'run' would be that of all tasks" in err
    assert "would be that of all tasks" in site.run(SLURM_ARRAY_JOB_ID="42", SLURM_ARRAY_TASK_ID="7")[2]


@WAYS
def test_a_task_number_without_an_array_is_refused(site, way):
    code, lines, err = getattr(site, way)("c.toml", "runs/%a")
    assert (code, lines, err.count("\n")) == (2, [], 1)
    assert "this is no array" in err
