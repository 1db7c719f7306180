"""Run a study: tune every point, run its seeds, then say what was found.

  python -m experiments.sweep                                                  # the first look, on a laptop
  python -m experiments.sweep --config=configs/layer_sharing.py:small --workdir=runs/small
  python -m experiments.sweep --config=configs/depth_vs_width.py:paper_125m --list
  python -m experiments.sweep --workdir=runs/small --status   # done, missing, at work
  python -m experiments.sweep --only='4 x 48,8 x 32' --seeds=8 --config.train.steps=1000
  python -m experiments.sweep --workdir=/shared/runs                 # on every node: they share the points
  python -m experiments.sweep --workdir=/shared/runs --shard=0/4     # or each has a part of its own
  python -m experiments.sweep --workdir=/shared/runs --distributed   # every run on all hosts
  python -m experiments.sweep --devices_per_run=1                    # a run on each device of this host
  python -m experiments.sweep --trials_per_program=8                 # 8 runs of a point in one program
  python -m experiments.sweep --tasks=mobilellm --data_dir=eval      # and zero-shot accuracy of every run
  python -m experiments.sweep --quantize=w8a8,w4:32                  # and what quantization costs it
  python -m experiments.sweep --diagnose                             # and what each of its layers does
  python -m experiments.sweep --sample='The list of'                 # and what its designs write
  python -m experiments.sweep --num_repeats=1,2,4                    # and scores with other numbers of loops
  python -m experiments.sweep --config=configs/api_calls.py:tiny --calls=combinations,values,wordings:200
  python -m experiments.sweep --config=configs/chat.py:tiny --instructions=all
  python -m experiments.sweep --config=configs/repeats.py:tiny --profile   # and what its designs learn apart

Every point looks for its own learning rate first, with a seed of its own. When all are through, parabolas of
one curvature are fitted to the searches of a study, and every point trains with the same seeds as all others
at its own optimum. So a sweep that has a part of the points (--shard, or beside others) tunes its own, helps
with the rest, and waits for it; --only fits the chosen points alone. A study may run its designs under
several parameterizations, and --arms=completep chooses one.

Finished runs are skipped and a half-done one is resumed, so the same command again goes on after an
interruption; SIGTERM saves checkpoints and exits with status 75, "start me again". A run that fails or
diverges is recorded as such, and the others go on; a process that a signal ended is started once more.
Sweeps that share a --workdir share the points; the point of one that died is taken over (`runner/leases.py`).
With --tasks, every finished run answers them at the end, also one that was there before; what its record has
is not asked again. So it is with the schemes of --quantize (`experiments.quantize`), with --diagnose
(`experiments.diagnose`), with --num_repeats, for models that have loops, with --calls and --instructions, and
with --sample, for the first run of every design. With --profile, every design is trained on the abilities of
the playground as well, in profile/ (`experiments.profile`). Points chosen by --only are compared as the study
asks, or, where it asks for no pair of them, all with each other. In --workdir: results/ has one JSON record
for each run, reports/ and figures/ what they show, runs/ checkpoints and logs.
"""

import os
from collections.abc import Sequence

from absl import flags

from experiments import cli
from experiments.runner import devices, hosts, needed, profiles
from experiments.runner.flags import (
    DEFAULT_STUDY,
    asked_loops,
    asked_points,
    asked_questions,
    asked_schemes,
    asked_trials,
    define_sweep,
)
from experiments.runner.listing import said_to_compare, said_to_cost, table
from experiments.runner.points import Point
from experiments.runner.studies import shard
from mobilellm_jax.errors import UserError
from mobilellm_jax.storage.files import AnyPath

FLAGS = flags.FLAGS


def main() -> int:
    """Runs the sweep, and returns the exit status."""
    questions, schemes, whole = asked_questions(), asked_schemes(), asked_points()
    loops, trials, speaking = asked_loops(), asked_trials(), None
    if FLAGS.calls or FLAGS.instructions:
        from experiments.runner.calling import asked_speaking  # here: it loads jax

        speaking = asked_speaking(FLAGS.calls, FLAGS.instructions)
    points = shard(whole, FLAGS.shard)
    profile = _profile(whole) if FLAGS.profile else None
    if FLAGS.status:
        return _print_status(points)
    groups = None
    if not FLAGS.list:
        needed.check(points)
        groups = _groups()
        hosts.start()
    if FLAGS.only:
        print(said_to_compare(points))
    listed = [*points, *(profile.points if profile else [])]
    print("\n".join([table(listed), *(profile.warnings() if profile else [])]))
    if FLAGS.list:
        print(f"\n{said_to_cost(listed, FLAGS.jobs)}")
        return 0
    from experiments.runner.sweeping import sweep  # here: half of what is imported, --status needs none of it

    workdir = cli.directory("workdir", FLAGS.workdir)
    every = FLAGS.lines_every
    status = sweep(
        points,
        workdir,
        FLAGS.jobs,
        groups,
        questions,
        whole,
        quantized=schemes,
        lines_every=every,
        diagnosed=FLAGS.diagnose,
        loops=loops,
        speaking=speaking,
        trials=trials,
        prompts=FLAGS.sample,
    )
    if profile:
        more = {"jobs": FLAGS.jobs, "groups": groups, "lines_every": every, "trials": trials}
        status = max(status, profiles.run(profile, workdir / "profile", _on_record(), **more))
    return status


def _profile(points: Sequence[Point]) -> profiles.Profile:
    """The profile of all designs of the sweep.

    Raises:
      UserError: several processes share the sweep, or it is that of the playground.
    """
    if FLAGS.shard != "0/1" or hosts.asked():
        raise UserError("--profile: cannot be combined with --shard or --distributed; run it afterwards")
    if any(point.facts["study"] == profiles.STUDY for point in points):
        raise UserError("--profile: this study is the playground; leave the flag out")
    return profiles.planned(profiles.designs_of(points), "tiny", _on_record(), FLAGS.seeds)


def _on_record() -> AnyPath:
    return cli.ROOT / "experiments"


def _print_status(points: Sequence[Point]) -> int:
    from experiments.runner.status import status

    workdir = cli.directory("workdir", FLAGS.workdir)
    if not workdir.exists():
        raise UserError(f"--workdir={FLAGS.workdir}: there is no such directory; no sweep has run there")
    print(status(points, workdir))
    return 0


def _groups() -> list[dict[str, str]] | None:
    """The environments of the processes that --devices_per_run asks for; None if it is not given."""
    size = FLAGS.devices_per_run
    if size is None:
        return None
    if FLAGS.jobs is not None or hosts.asked():
        raise UserError(
            f"--devices_per_run={size}: cannot be combined with --jobs or --distributed; it starts one "
            "process for each group of devices of this host"
        )
    groups = devices.groups(*devices.of_host(), size, os.environ)
    devices.stay_off(size)
    return groups


def define_flags() -> None:
    define_sweep()
    flags.DEFINE_bool("profile", False, "train every design on the abilities of the playground as well")


if __name__ == "__main__":
    cli.run(main, default_config=DEFAULT_STUDY, define_flags=define_flags)
