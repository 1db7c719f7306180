"""Submit a study to Slurm, one task of a job array for each point; it needs `pip install -e '.[slurm]'`.

  python -m experiments.slurm --config=configs/khop.py:tiny --workdir=/shared/runs --partition=gpu --gpus=1
  python -m experiments.slurm --config=configs/khop.py:tiny --workdir=runs --cluster=local    # without Slurm
  python -m experiments.slurm ... --dry_run                   # what would be submitted, without Slurm
  python -m experiments.slurm ... --time=240 --parallel=16 --sbatch='qos=low,constraint=a100'

A task is `python -m experiments.sweep ... --shard=i/n`, started in this directory, which all nodes see, as
they do --workdir. As learning rates are fitted to all points of a study together, a task tunes its own point,
helps with those of tasks that have not started, waits for the others, and then compares its own. Points that
are complete are not submitted, so the same command again submits what is left.
Before its time limit a task saves a checkpoint and queues again. So it does when it is preempted, if the
cluster sends the signal for it (`PreemptParameters=send_user_signal`) or requeues by itself. `scancel` ends
it for good. Logs are in --workdir/slurm. Tried with submitit on one machine, and on an imitation of sbatch,
srun and scontrol; not on a cluster.
"""

import shlex
import sys
from pathlib import Path
from typing import Any

from absl import flags

from experiments import cli
from experiments.runner import after, hosts
from experiments.runner.calling import asked_speaking
from experiments.runner.flags import (
    DEFAULT_STUDY,
    PASSED_ON,
    asked_loops,
    asked_points,
    asked_questions,
    asked_schemes,
    asked_trials,
    define_sweep,
    refuse_listing,
)
from experiments.runner.listing import said_to_compare, table
from experiments.runner.progress import Progress
from experiments.runner.sweeping import make_workdir
from mobilellm_jax.errors import UserError
from mobilellm_jax.storage.files import local_directory

FLAGS = flags.FLAGS

_SAVE_S = 120  # between the signal and the time limit
_TIMEOUTS = 10_000  # a point may reach the time limit as often as it takes


def define_flags() -> None:
    flags.DEFINE_enum(
        "cluster", "slurm", ["slurm", "local"], "local: as processes on this machine, one after the other"
    )
    flags.DEFINE_string("partition", None, "partition of the cluster; default: its own")
    flags.DEFINE_string("account", None, "account that is charged")
    flags.DEFINE_integer("time", 240, "minutes until a task saves and queues again", 5)
    flags.DEFINE_integer("gpus", 0, "GPUs for each task", 0)
    flags.DEFINE_integer("cpus", 2, "CPU cores for each task", 1)
    flags.DEFINE_float("mem_gb", None, "memory for each task, in GB; default: the cluster's", 0.1)
    flags.DEFINE_integer("parallel", 256, "tasks that may run at once", 1)
    flags.DEFINE_list("sbatch", [], "more options of sbatch, such as qos=low,constraint=a100")
    flags.DEFINE_bool("dry_run", False, "print what would be submitted; submit and write nothing")
    define_sweep()


def main() -> int:
    """Submits what is missing, and returns the exit status."""
    refuse_listing()
    for name in ("jobs", "shard", "devices_per_run"):
        if FLAGS[name].present:
            raise UserError(f"--{name}: leave it out; on Slurm each point is a task of its own")
    if hosts.asked():
        raise UserError("--distributed: leave it out; on Slurm each point is a task of its own, on one node")
    extra = dict(_option(text) for text in FLAGS.sbatch)
    asked, points, schemes = asked_questions(), asked_points(), asked_schemes()
    speaking, loops = asked_speaking(FLAGS.calls, FLAGS.instructions), asked_loops()
    asked_trials()  # so that a wrong value is refused here, not in every task
    known = after.check(points, asked, schemes, FLAGS.sample, speaking)
    workdir = local_directory("workdir", FLAGS.workdir)  # submitit keeps its logs there
    executor = None if FLAGS.dry_run else _executor(workdir / "slurm", extra)
    if executor:
        make_workdir(workdir)
    if FLAGS.only:
        print(said_to_compare(points))
    print(table(points))
    missing = Progress(points, workdir).missing()
    tasks = after.tasks(asked, known, schemes, FLAGS.diagnose, loops, FLAGS.sample, speaking)
    lacks = [lacking for _, lacking in tasks]
    todo = [
        index
        for index, point in enumerate(points)
        if missing[point.name] or any(lacking(point, workdir) for lacking in lacks)
    ]
    print(f"\n{len(points) - len(todo)} of {len(points)} points are complete", flush=True)
    command = [sys.executable, "-m", "experiments.sweep", *cli.given(*PASSED_ON)]
    commands = [[*command, f"--shard={index}/{len(points)}"] for index in todo]
    names = [points[index].name for index in todo]
    if not executor:
        print("\n".join(_planned(names, commands)))
        return 0
    start = _run_here if FLAGS.cluster == "local" else _submit
    return start(executor, names, commands)


def _option(text: str) -> tuple[str, Any]:
    """An option of sbatch from "name=value", or from "name" one that takes no value."""
    name, equals, value = text.strip().lstrip("-").partition("=")
    if not name or name in ("array", "signal"):
        raise UserError(f"--sbatch={text}: expected name=value; array and signal are set already")
    return name, value if equals else True


def _executor(folder: Path, extra: dict[str, Any]) -> Any:
    """Submitit's executor, set up by the flags.

    Raises:
      UserError: submitit or Slurm is missing.
    """
    try:
        import submitit
    except ImportError:
        raise UserError("submitit is missing: pip install -e '.[slurm]'") from None
    timeouts = {f"{FLAGS.cluster}_max_num_timeout": _TIMEOUTS}
    try:
        executor = submitit.AutoExecutor(folder / "%j", cluster=FLAGS.cluster, **timeouts)
    except RuntimeError:
        raise UserError(
            "--cluster=slurm: srun was not found; run this on a node of the cluster, or use --cluster=local "
            "on this machine"
        ) from None
    executor.update_parameters(
        name="mobilellm",
        timeout_min=FLAGS.time,
        gpus_per_node=FLAGS.gpus or None,
        cpus_per_task=FLAGS.cpus,
        mem_gb=FLAGS.mem_gb,
        slurm_partition=FLAGS.partition,
        slurm_account=FLAGS.account,
        slurm_array_parallelism=FLAGS.parallel,
        slurm_signal_delay_s=_SAVE_S,
        slurm_additional_parameters={"requeue": True, **extra},
    )
    return executor


def _planned(names: list[str], tasks: list[list[str]]) -> list[str]:
    """What would be submitted: the command of each task, and what each gets."""
    counts = {"minutes": FLAGS.time, "CPU cores": FLAGS.cpus, "GPUs": FLAGS.gpus, "GB": FLAGS.mem_gb}
    words = {"partition": FLAGS.partition, "account": FLAGS.account}
    each = [
        *(f"{count:g} {unit}" for unit, count in counts.items() if count),
        *(f"{name}={word}" for name, word in words.items() if word),
        *FLAGS.sbatch,
    ]
    return [
        *(f"{name}  {shlex.join(task)}" for name, task in zip(names, tasks, strict=True)),
        f"tasks to submit: {len(tasks)}, at most {FLAGS.parallel} at once, each with {', '.join(each)}",
    ]


def _submit(executor: Any, names: list[str], tasks: list[list[str]]) -> int:
    from experiments.runner.requeue import Command

    with executor.batch():
        jobs = [executor.submit(Command(task)) for task in tasks]
    for name, job in zip(names, jobs, strict=True):
        print(f"{name}  job {job.job_id}, log {job.paths.stdout}")
    return 0


def _run_here(executor: Any, names: list[str], tasks: list[list[str]]) -> int:
    from experiments.runner.requeue import Command

    failed = []
    for name, task in zip(names, tasks, strict=True):
        job = executor.submit(Command(task))
        print(f"{name}  job {job.job_id}, log {job.paths.stdout}", flush=True)
        job.wait()
        if job.exception() is not None:
            failed.append(name)
            print(f"{name}  failed, see {job.paths.stderr}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    cli.run(main, default_config=DEFAULT_STUDY, define_flags=define_flags)
