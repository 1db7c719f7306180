"""Copy the records of one workdir into another, so that they are reported together.

  python -m experiments.merge --workdir=runs --source=from_another_machine

Records in <source>/results are verified by their checksums and copied as they are, all or none. A run that
both have must have the same record in both, and the runs of a study must be comparable: same data, tokenizer,
batch and steps. Checkpoints stay where they are. Afterwards: python -m experiments.report --workdir=runs
"""

from absl import flags

from experiments import cli
from experiments.reporting import merging
from mobilellm_jax.errors import UserError
from mobilellm_jax.storage.files import local_directory

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "directory that receives the records")
    flags.DEFINE_string("source", None, "directory whose records are copied")


def main() -> int:
    """Copies, and returns the exit status."""
    for name in ("workdir", "source"):
        if not FLAGS[name].value:
            raise UserError(f"--{name}: missing; name a directory, such as --{name}=runs")
    target, source = local_directory("workdir", FLAGS.workdir), local_directory("source", FLAGS.source)
    found = merging.plan(source, target)
    merging.copy(found.new, source, target)
    for warning in found.warnings:
        print(f"Warning: {warning}")
    print(f"{len(found.new)} records copied to {target}/results, {len(found.same)} were there already")
    return 0


if __name__ == "__main__":
    cli.run(main, define_flags=define_flags)
