"""Run a study: tune every point, run its seeds, then say what was found.

  python -m experiments.sweep                                                  # the first look, on a laptop
  python -m experiments.sweep --config=configs/layer_sharing.py:small --workdir=runs/small
  python -m experiments.sweep --config=configs/depth_vs_width.py:paper_125m --list
  python -m experiments.sweep --only='4 x 48,8 x 32' --seeds=8 --config.train.steps=1000
  python -m experiments.sweep --workdir=/shared/runs                 # on every node: they share the points
  python -m experiments.sweep --workdir=/shared/runs --shard=0/4     # or each has a part of its own
  python -m experiments.sweep --workdir=/shared/runs --distributed   # every run on all hosts
  python -m experiments.sweep --devices_per_run=1                    # a run on each device of this host
  python -m experiments.sweep --tasks=mobilellm --data_dir=eval      # and zero-shot accuracy of every run

Every point looks for its own learning rate first, with a seed of its own, and then trains with the same seeds
as all others. Finished runs are skipped and a half-done one is resumed, so the same command again goes on
after an interruption; SIGTERM saves checkpoints and exits with status 75, "start me again". A run that fails
or diverges is recorded as such, and the others go on; a process that a signal ended is started once more.
Sweeps that share a --workdir share the points; the point of one that died is taken over (`runner/leases.py`).
With --tasks, every finished run answers them at the end, also one that was there before; what its record has
is not asked again. Points chosen by --only are compared as the study asks, or, where it asks for no pair of
them, all with each other. In --workdir: results/ has one JSON record for each run, reports/ and figures/ what
they show, runs/ checkpoints and logs.
"""

import os

from absl import flags

from experiments import cli
from experiments.runner import devices, hosts, scoring
from experiments.runner.points import Point, points_of, said_to_compare, table
from experiments.runner.sweeping import shard, sweep
from mobilellm_jax.errors import UserError
from mobilellm_jax.storage.files import directory

_WORKDIR = flags.DEFINE_string("workdir", "runs", "directory of results/, figures/, reports/ and runs/")
_LIST = flags.DEFINE_bool("list", False, "print the points with what they cost, and train nothing")
_ONLY = flags.DEFINE_list(
    "only", [], 'labels of the points to run, separated by commas, in " where they hold one; empty runs all'
)
_SEEDS = flags.DEFINE_integer("seeds", None, "number of seeds for each point; default: as the study says", 1)
_JOBS = flags.DEFINE_integer(
    "jobs", None, "points that run side by side; default: one for each CPU core, 1 on an accelerator", 1
)
_DEVICES_PER_RUN = flags.DEFINE_integer(
    "devices_per_run", None, "points run side by side, each on so many devices of this host (TPU: chips)", 1
)
_SHARD = flags.DEFINE_string(
    "shard", "0/1", "i/n: only every n-th point, from the i-th on; i from 0 to n - 1"
)
_TASKS = flags.DEFINE_list("tasks", [], "ask every finished run these tasks, as experiments.evaluate does")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "folder with local files of --tasks; else the hub is asked")
_LIMIT = flags.DEFINE_integer("limit", None, "ask only so many questions of each of --tasks", 1)
# Flags that a launcher passes on to the sweeps it starts, besides those of the config.
PASSED_ON = ("workdir", "only", "seeds", "tasks", "data_dir", "limit")


def main() -> int:
    """Runs the sweep, and returns the exit status."""
    questions, points = asked_questions(), asked_points()
    groups = None
    if not _LIST.value:
        groups = _groups()
        hosts.start()
    print(table(points))
    if _LIST.value:
        return 0
    return sweep(points, directory("workdir", _WORKDIR.value), _JOBS.value, groups, questions)


def asked_questions() -> scoring.Questions | None:
    """Returns what the flags say to ask of every run; errors as in `zero_shot.questions_of`."""
    return scoring.questions_of(_TASKS.value, _DATA_DIR.value, _LIMIT.value)


def asked_points() -> list[Point]:
    """The points that the flags choose; errors as in `points_of` and `shard`."""
    points = points_of(cli.config_spec(), cli.overrides(), _SEEDS.value, _ONLY.value)
    if _ONLY.value:
        print(said_to_compare(points))
    return shard(points, _SHARD.value)


def _groups() -> list[dict[str, str]] | None:
    """Returns the environments of the processes that --devices_per_run asks for; None if it is not given."""
    size = _DEVICES_PER_RUN.value
    if size is None:
        return None
    if _JOBS.value is not None or hosts.asked():
        raise UserError(
            f"--devices_per_run={size}: goes neither with --jobs nor with --distributed: it starts as many "
            "processes as this host has groups of devices, and each run has one of them"
        )
    groups = devices.groups(*devices.of_host(), size, os.environ)
    devices.stay_off(size)
    return groups


if __name__ == "__main__":
    cli.run(main, default_config="configs/tour.py:tiny")
