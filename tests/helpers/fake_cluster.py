"""Programs in the place of SLURM's and of training that note how they were called, for tests of the job scripts."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from project import ROOT

# Each one notes how it was called. srun runs the words after its options; a cluster of two nodes.
PROGRAMS = {
    "srun": 'while [[ $1 == --* ]]; do shift; done\n[ "$1" != slurm/task.sh ] || shift\n"$@"',
    "scontrol": """[ "$1" != -o ] || shift
case "$1" in
show)
    case "$2" in
    hostnames) printf 'n1\\nn2\\n' ;;
    *) echo "JobId=7 ExcNodeList=$(cat "$FAKE/excluded" || echo '(null)') X=1" ;;
    esac ;;
requeue) echo PENDING >"$FAKE/state" ;;
'') cat >>"$FAKE/scontrol.input"; echo PENDING >"$FAKE/state" ;;
esac""",
    "squeue": '[ -e "$FAKE/answers" ] || { touch "$FAKE/answers"; exit 1; }\ncat "$FAKE/state"',
    "scancel": 'kill -s USR1 "$(cat "$FAKE/training.pid")"',
    "sleep": '[ "$1" != 600 ] || kill "$PPID"',  # after a requeue the shell is killed; other pauses are left out
    "git": "exit 1",
}

PYTHON = """case "$*" in
*'preflight plan'*) [ ! -e "$FAKE/plan.code" ] || exit "$(cat "$FAKE/plan.code")"; echo "10 $RUN/" ;;
*'preflight report'*) [ ! -e "$FAKE/report.code" ] || exit "$(cat "$FAKE/report.code")"; echo '{"node": 1}' ;;
*'preflight compare'*) grep -q node || exit 3; cat "$FAKE/failing"; exit "$(cat "$FAKE/compare.code" || echo 0)" ;;
*'preflight all-reduce'*) exit 0 ;;
*) echo $$ >"$FAKE/training.pid"; . "$FAKE/train" ;;
esac 2>/dev/null"""

SAVE_5 = 'mkdir -p "$RUN/checkpoints/step-0000005"\n'

DONE = 'echo \'{"step": 10, "time": "now"}\' >"$RUN/done.json"\n'


@dataclass
class FakeCluster:
    """A folder of fake programs, and a run; jobs are submitted from `project`."""

    folder: Path
    run: Path
    project: Path = ROOT

    def start(self, *arguments: str, script: str = "taco_large", **settings: str) -> subprocess.Popen[str]:
        """Begin a job of two nodes with two processes each."""
        environment = {
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            "FAKE": str(self.folder),
            "RUN": str(self.run),
            "TMPDIR": str(self.folder),
            "SLURM_SUBMIT_DIR": str(self.project),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_GPUS_PER_NODE": "a100:2",
            "SLURM_CPUS_ON_NODE": "16",
            "TACO_PYTHON": f"{self.folder}/python",
            **settings,
        }
        return subprocess.Popen(
            [self.project / "slurm" / f"{script}.sh", *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def submit(self, *arguments: str, script: str = "taco_large", **settings: str) -> tuple[int, str]:
        """A job from start to end: exit code (negative: ended by that signal, as after a requeue) and output."""
        process = self.start(*arguments, script=script, **settings)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    def calls(self, name: str) -> list[list[str]]:
        """The arguments of every call of a program."""
        path = self.folder / f"{name}.calls"
        text = path.read_text() if path.exists() else ""
        return [call.split("\0") for call in text.split("\0\0\n")[:-1]]

    def is_requeued(self) -> bool:
        return ["requeue", "7"] in self.calls("scontrol")


def make_cluster(folder: Path, run: Path) -> FakeCluster:
    """Write the fake programs into `folder`, which is created."""
    folder.mkdir()
    for name, body in {**PROGRAMS, "python": PYTHON, "python3": PYTHON}.items():
        note = f'printf \'%s\\0\' "$@" "" >>"$FAKE/{name}.calls"; echo >>"$FAKE/{name}.calls"'
        (folder / name).write_text(f"#!{shutil.which('bash')}\n{note}\n{body}\n")
        (folder / name).chmod(0o755)
    (folder / "state").write_text("RUNNING\n")
    (folder / "failing").write_text("")
    (folder / "train").write_text(DONE)
    return FakeCluster(folder, run)
