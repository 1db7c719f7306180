"""Remove what nobody needs any more: old checkpoints, half-written saves, old caches.

  python -m experiments.clean --workdir=runs            # lists it, and removes nothing
  python -m experiments.clean --workdir=runs --yes      # removes it
  python -m experiments.clean --cache --older_than=30d --yes

In --workdir, the directory of a run or of a sweep: checkpoints of runs that have finished and have their
record, but for the newest; saves and files that a kill left half-written; leases of dead workers. With
--cache: prepared data with their tokenizers, and compiled programs, not used for --older_than. Both are made
again when needed. Runs that somebody is working on are left alone.
"""

import os
import re
from pathlib import Path

from absl import flags

from configs import base
from experiments import cli
from experiments.runner import cleaning
from mobilellm_jax.errors import UserError
from mobilellm_jax.storage.files import local_directory

FLAGS = flags.FLAGS

_SECONDS = {"m": 60, "h": 3600, "d": 86400}


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "directory of a run or of a sweep")
    flags.DEFINE_bool("all", False, "remove the newest checkpoint of finished runs too")
    flags.DEFINE_bool("cache", False, "look into the caches too")
    flags.DEFINE_string("cache_dir", base.get_config().data.cache_dir, "the cache of prepared data")
    flags.DEFINE_string("older_than", "30d", "age of what is removed from the caches, such as 12h or 30d")
    flags.DEFINE_bool("yes", False, "remove what is listed")


def main() -> int:
    """Lists or removes, and returns the exit status."""
    if not FLAGS.workdir and not FLAGS.cache:
        raise UserError("--workdir: missing; name a directory, such as --workdir=runs, or use --cache")
    age, found = seconds(FLAGS.older_than), list[cleaning.Item]()
    if FLAGS.workdir:
        workdir = local_directory("workdir", FLAGS.workdir)
        if not workdir.is_dir():
            raise UserError(f"--workdir={FLAGS.workdir}: no such directory")
        found, busy = cleaning.in_workdir(workdir, newest_too=FLAGS.all)
        for run in busy:
            print(f"left alone, it is being worked on: {run}")
    if FLAGS.cache:
        cache = local_directory("cache_dir", FLAGS.cache_dir)
        compiled = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", cache / "xla"))
        found += cleaning.in_cache(cache, compiled, age)
    finish(found, FLAGS.yes)
    return 0


def finish(found: list[cleaning.Item], yes: bool) -> None:
    """Prints all items, removes them if `yes`, and prints their sum."""
    for item in found:
        print(f"{item.size:>15,} bytes  {item.what}: {item.path}")
    if not yes:
        hint = "; --yes removes them" if found else ""
        print(f"{len(found):,} items, {cleaning.total(found):,} bytes{hint}")
        return
    removed = [item for item in found if cleaning.remove(item)]
    print(f"{len(removed):,} of {len(found):,} items removed, {cleaning.total(removed):,} bytes freed")


def seconds(age: str) -> int:
    """Parses an age such as "30d", "12h" or "5m"."""
    found = re.fullmatch(r"(\d+)([mhd])", age)
    if not found:
        raise UserError(f"--older_than={age}: expected a number with m, h or d behind it, such as 30d")
    return int(found[1]) * _SECONDS[found[2]]


if __name__ == "__main__":
    cli.run(main, define_flags=define_flags)
