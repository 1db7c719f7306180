"""Profile a design: what it learns in each ability of the playground, beside the designs on record.

  python -m experiments.profile --workdir=runs/first                         # the model of a run
  python -m experiments.profile --workdir=runs/first --config.model.ffn_kind=gelu --fit   # with a change
  python -m experiments.profile --config=configs/mobilellm.py:tiny --fit
  python -m experiments.profile --config.model.depth=2 --config.model.ffn_kind=relu --fit --list

Takes depth, heads, widths, kind of FFN, sharing and all else of a model but its vocabulary and its
parameterization; the data, the length and the recipe are those of the ability. The learning rate is searched
and as many seeds are run as for the designs on record, so that the design is one more of the study. These
have equal sizes; a design of another size is profiled as it is, and the first lines say so. With --fit it
gets the width, heads and feed-forward width that make it equal.

The same command again goes on, or prints the profile again. In --out: results/ has one JSON record for each
run, reports/profile-<size> and figures/profile-<size>.png the profile.
"""

from collections.abc import Mapping
from typing import Any

from absl import flags

from experiments import cli
from experiments.runner import devices, profiles
from experiments.runner.listing import said_to_cost, table
from experiments.runner.profiles import Design
from mobilellm_jax.config import from_config_dict
from mobilellm_jax.dtypes import with_dtype
from mobilellm_jax.errors import UserError
from mobilellm_jax.runs.directory import read_config

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string(
        "workdir", None, "directory of a run whose model is profiled; default: that of --config"
    )
    flags.DEFINE_string(
        "name", None, "what the design is called; default: own design, or the run's directory"
    )
    flags.DEFINE_string("size", "tiny", "collection of configs/playground.py")
    flags.DEFINE_string("out", "runs/profile", "directory of the profile's own records, figures and report")
    flags.DEFINE_string(
        "against", None, "directory whose results/ has the designs on record; default: the checkout's"
    )
    flags.DEFINE_bool("fit", False, "change width, heads and ffn_width to the size of the designs on record")
    flags.DEFINE_bool("list", False, "print the points and what they cost; train nothing")
    flags.DEFINE_integer("seeds", None, "number of seeds of each ability; default: as the study says", 1)
    flags.DEFINE_integer("jobs", None, "abilities side by side; default: one for each CPU core", 1)


def main() -> int:
    """Profiles the design, and returns the exit status."""
    changes = _changes(cli.overrides())
    if FLAGS.workdir:
        workdir = cli.directory("workdir", FLAGS.workdir)
        path = workdir / "config.json"
        if not path.is_file():
            raise UserError(f"--workdir={workdir}: no run found, {path.name} is missing; check the path")
        values, name = read_config(path), workdir.name
        values["model"] |= changes
    else:
        values, name = cli.one_config(), "own design"
    config = with_dtype(from_config_dict(values), devices.platform)
    against = cli.directory("against", FLAGS.against or str(cli.ROOT / "experiments"))
    designs = [Design(FLAGS.name or name, config.model)]
    profile = profiles.planned(designs, FLAGS.size, against, FLAGS.seeds, FLAGS.fit)
    print("\n".join([table(profile.points), *profile.warnings()]))
    if FLAGS.list:
        print(f"\n{said_to_cost(profile.points, FLAGS.jobs)}")
        return 0
    return profiles.run(profile, cli.directory("out", FLAGS.out), against, jobs=FLAGS.jobs)


def _changes(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the model that the command line sets.

    Raises:
      UserError: another field is set, which a profile would not use.
    """
    for name in overrides:
        if name.removeprefix("model.") not in profiles.TAKEN:
            raise UserError(
                f"--config.{name}: a profile takes the model's shape alone; the ability sets this field"
            )
    return {name.removeprefix("model."): value for name, value in overrides.items()}


if __name__ == "__main__":
    cli.run(main, default_config="configs/base.py", define_flags=define_flags)
