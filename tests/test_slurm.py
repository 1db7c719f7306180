"""The Slurm launcher: real tasks through submitit, on this machine and on a Slurm of a few lines."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import start
from test_sweep import write_study

from mobilellm_jax.analysis.records import read_records

pytest.importorskip("submitit", reason="needs pip install -e '.[slurm]'")

# What Slurm does with a job array, for tasks that are alone on a node: environment, logs, requeue, and USR2
# when the file "preempt" appears.
SBATCH = r"""
import os, re, subprocess, sys, time
here = os.path.dirname(os.path.abspath(__file__))
text = open(sys.argv[1]).read()
open(f"{here}/script", "w").write(text)
first, last = map(int, (re.search(r"--array=(\d+)-(\d+)", text) or re.match("()()", "")).groups())
print("Submitted batch job 7", flush=True)
if os.fork():
    os._exit(0)
os.dup2(os.open(f"{here}/slurm.log", os.O_WRONLY | os.O_CREAT), 1)
os.dup2(1, 2)
for index in range(first, last + 1):
    ids = {"SLURM_JOB_ID": str(8 + index), "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(index)}
    again = f"{here}/requeue-7_{index}"
    while True:
        subprocess.run(["bash", sys.argv[1]], env={**os.environ, **ids})
        if not os.path.exists(again):
            break
        os.unlink(again)
open(f"{here}/over", "w").close()
"""
SRUN = r"""
import os, signal, subprocess, sys, time
here, arguments = os.path.dirname(os.path.abspath(__file__)), sys.argv[1:]
ids = os.environ["SLURM_ARRAY_JOB_ID"], os.environ["SLURM_ARRAY_TASK_ID"]
files = {}
while arguments[0].startswith("--"):
    option = arguments.pop(0)
    if option in ("--output", "--error"):
        name = arguments.pop(0)
        for pattern, value in (("%A", ids[0]), ("%a", ids[1]), ("%t", "0"), ("%j", "_".join(ids))):
            name = name.replace(pattern, value)
        os.makedirs(os.path.dirname(name), exist_ok=True)
        files[option] = open(name, "a")
task = subprocess.Popen(
    arguments, stdout=files["--output"], stderr=files["--error"], start_new_session=True
)
while task.poll() is None:
    if os.path.exists(f"{here}/preempt"):
        os.unlink(f"{here}/preempt")
        os.killpg(task.pid, signal.SIGUSR2)
    time.sleep(0.1)
"""
SCONTROL = r"""
import os, sys
assert sys.argv[1] == "requeue"
open(f"{os.path.dirname(os.path.abspath(__file__))}/requeue-{sys.argv[2]}", "w").close()
"""


@pytest.fixture
def study(tmp_path):
    return write_study(tmp_path)


@pytest.fixture
def slurm(tmp_path):
    """The folder of a Slurm that runs the tasks of an array one after the other."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL)):
        path = folder / name
        path.write_text(f"#!{sys.executable}\n{text}")
        path.chmod(0o755)
    return folder


def launch(study: Path, workdir: Path, *flags: str, path: str = os.environ["PATH"]) -> subprocess.Popen:
    environment = {"PATH": path, "JAX_NUM_CPU_DEVICES": "1"}
    return start("experiments.slurm", f"--config={study}", f"--workdir={workdir}", *flags, env=environment)


def end(process: subprocess.Popen) -> tuple[int, str, str]:
    output, errors = process.communicate(timeout=300)
    return process.returncode, output, errors


def wait_for(path: Path, text: str = "") -> str:
    """Content of the file, once it contains `text`."""
    for _ in range(3000):
        if path.exists() and text in (found := path.read_text()):
            return found
        time.sleep(0.1)
    raise AssertionError(f"{path}: {path.read_text() if path.exists() else 'is not there'}")


# So long that it is in the middle of the run when it is told to stop.
LONG = [
    "--seeds=1",
    "--config.train.steps=1000",
    "--config.train.log_every=10",
    "--config.train.eval_every=1000",
    "--lines_every=0",
]


@pytest.mark.slow
def test_a_task_here_that_is_preempted_resumes_and_what_is_complete_is_not_submitted(study, tmp_path):
    workdir, name = tmp_path / "w", "mini/tiny/reverse"
    process = launch(study, workdir, "--cluster=local", "--only=reverse", *LONG)
    try:
        lines = iter(process.stdout.readline, "")
        job, log = next(m.groups() for line in lines if (m := re.search(r"job (\d+), log (.*)$", line)))
        wait_for(Path(log), "step 10/")
        children = Path(f"/proc/{job}/task/{job}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGUSR2)  # as Slurm does
        status, _, errors = end(process)
    finally:
        process.kill()
    text = Path(log).read_text()
    assert (status, errors) == (0, ""), text
    assert "a checkpoint was saved" in Path(log).with_suffix(".err").read_text()
    step = int(re.search(f"{name}-s0  resuming after step (\\d+)", text)[1])
    assert 10 <= step < 1000
    assert text.count("held-out loss") == 1
    (record,) = read_records(workdir / "results")
    assert (record.point, record.status, record.steps) == ("reverse", "finished", 1000)
    status, output, errors = end(launch(study, workdir, "--cluster=local", "--only=reverse", *LONG))
    assert (status, errors) == (0, "")
    assert "1 of 1 points are complete" in output
    assert "job" not in output


@pytest.mark.slow
def test_an_array_in_slurm_is_put_into_the_queue_again_after_a_signal(study, tmp_path, slurm):
    """Two points; the first is told to stop in the middle of its run."""
    path = f"{slurm}:{os.environ['PATH']}"
    status, output, errors = end(launch(study, tmp_path / "w", "--gpus=1", *LONG, path=path))
    assert (status, errors) == (0, "")
    logs = [Path(log) for log in re.findall(r"log (\S+)", output)]
    assert len(logs) == 2
    wait_for(logs[0], "step 10/")
    (slurm / "preempt").touch()
    wait_for(slurm / "over")
    texts = [log.read_text() for log in logs]
    assert "mini/tiny/none-s0  resuming after step" in texts[0], (slurm / "slurm.log").read_text()
    assert "resuming" not in texts[1]
    assert {r.point: r.status for r in read_records(tmp_path / "w/results")} == {
        "none": "finished",
        "reverse": "finished",
    }


@pytest.mark.slow
def test_what_is_asked_of_slurm(study, tmp_path, slurm):
    flags = [
        "--partition=gpu",
        "--gpus=2",
        "--cpus=8",
        "--time=60",
        "--sbatch=qos=low, exclusive",
        "--parallel=3",
    ]
    (slurm / "sbatch").write_text(f'#!/bin/sh\ncp "$1" {slurm}/script\necho Submitted batch job 7\n')
    path = f"{slurm}:{os.environ['PATH']}"
    status, output, errors = end(launch(study, tmp_path / "w", *flags, path=path))
    assert (status, errors) == (0, "")
    assert re.search(r"mini/tiny/none  job 7_0, log .*\nmini/tiny/reverse  job 7_1, log .*\n$", output)
    lines = (slurm / "script").read_text().splitlines()
    asked = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")}
    assert asked >= {"array=0-1%2", "partition=gpu", "gpus-per-node=2", "cpus-per-task=8", "time=60"}
    assert asked >= {"signal=USR2@120", "requeue", "open-mode=append", "qos=low", "exclusive"}


@pytest.mark.slow
def test_a_dry_run_needs_no_slurm_and_writes_nothing(study, tmp_path):
    flags = ["--partition=gpu", "--gpus=2", "--parallel=3", "--sbatch=qos=low", "--seeds=1", "--dry_run"]
    status, output, errors = end(launch(study, tmp_path / "w", *flags))
    assert (status, errors) == (0, "")
    *_, first, second, last = output.splitlines()
    assert first.startswith("mini/tiny/none  ")
    assert second.endswith(f"--workdir={tmp_path}/w --seeds=1 --shard=1/2")
    assert last == (
        "tasks to submit: 2, at most 3 at once, each with 240 minutes, 2 CPU cores, 2 GPUs, "
        "partition=gpu, qos=low"
    )
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--cluster=slurm: srun was not found"),
        (["--jobs=2"], "--jobs: leave it out; on Slurm each point is a task of its own"),
        (["--status"], "--status: leave it out; python -m experiments.sweep --status prints it"),
        (["--quantize=w4:32"], "groups of 32 do not divide"),
        (["--calls=combination:5"], "--calls: 'combination:5' is not valid; did you mean combinations?"),
        (["--distributed"], "--distributed: leave it out"),
        (["--sbatch=array=0-3"], "--sbatch=array=0-3: expected name=value; array and signal are set already"),
        (["--only=revers"], "--only=revers: no such point; did you mean 'reverse'?"),
    ],
    ids=str,
)
def test_flags_that_do_not_fit(study, tmp_path, flags, message):
    status, output, errors = end(launch(study, tmp_path / "w", *flags))
    assert (status, output, errors.count("\n")) == (2, "", 1), errors
    assert message in errors
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
def test_without_submitit_the_extra_is_named(study, tmp_path):
    (tmp_path / "submitit.py").write_text("raise ImportError")
    command = [sys.executable, "-m", "experiments.slurm", f"--config={study}", f"--workdir={tmp_path}/w"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:."}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stderr) == (
        2,
        "error: submitit is missing: pip install -e '.[slurm]'\n",
    )
