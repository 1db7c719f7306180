"""Kill real runs and damage real files, and count how often nothing was lost and nothing went unseen.

  python -m experiments.soak           # 20 kills, 40 signals, 36 bits: about 20 minutes on 2 CPU cores
  python -m experiments.soak --kills=2 --signals=4 --flips=6
  python -m experiments.soak --kills=0 --flips=0 --signals=200

A tiny run is killed by SIGKILL at random moments of its start, of a step, of a save and of an evaluation, and
started again, up to four times. What it ends with has to be the same, bit for bit, as what the run that was
left alone ends with: parameters, optimizer state, every line of metrics.jsonl but the times and the saves,
the record. What a kill met is told by what it left on disk and what was printed last, not by what was aimed
at. Another is sent SIGINT, SIGTERM or SIGHUP, from the first import of the command on, also while it imports
and compiles: it has to end within 10 s, with one line and with 130 or 75, and in the end as the run left
alone. A fourth as many go to sweeps and `plan`, SIGKILL also to a sweep of two processes, which have to end
with it. Then single bits are flipped in checkpoints, prepared data, records, logs and configs, and files of a
checkpoint cut, emptied and deleted: each has to be noticed and the file named, and the newest intact
checkpoint used. Exit status 1 where a count is not full, or one kind of moment was not met by 8 or more kills
or signals. On the CPU, unless JAX_PLATFORMS says otherwise.
"""

import collections
import itertools
import os
import random
import signal

import jax
from absl import flags

from experiments import cli
from experiments.soaks import ends
from experiments.soaks.damage import damaged_checkpoints, damaged_data, damaged_words
from experiments.soaks.runs import TINY, SoakRun, Trials
from mobilellm_jax.training.signals import scratch_directory

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_integer("kills", 20, "how many runs to kill", 0)
    flags.DEFINE_integer("signals", 40, "how many runs to stop by a signal", 0)
    flags.DEFINE_integer("flips", 36, "how many bits to flip in each kind of file; 0 damages none", 0)
    flags.DEFINE_integer("seed", 0, "of the random moments and bits", 0)


def hear_signals() -> None:
    """Lets the runs hear all signals: under nohup or behind a script's `&`, some are ignored.

    What is ignored is inherited, a handler is not.
    """
    for number in ends.SIGNALS:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


def main() -> int:
    """Runs all trials, and returns the exit status."""
    hear_signals()
    jax.config.update("jax_platforms", os.environ.setdefault("JAX_PLATFORMS", "cpu"))  # the runs inherit it
    with scratch_directory("soak-") as folder:
        rng = random.Random(FLAGS.seed)
        for i in range(60):
            words = [
                f"{rng.randrange(10**6):b} and {rng.choice(('one', 'two', 'three'))}." for _ in range(30)
            ]
            (folder / f"{i}.txt").write_text(f"Document {i}. {' '.join(words)}")
        straight = SoakRun(folder, folder / "straight")
        _, start_s, training_s = straight.finish()
        times = start_s, training_s / TINY["train.steps"], rng
        killed = ends.runs(straight, FLAGS.kills, *times, [signal.SIGKILL], ends.KILLED)
        signalled = ends.runs(straight, FLAGS.signals, *times, ends.SIGNALS, ends.SIGNALLED)
        others = ends.commands(straight, FLAGS.signals // 4, start_s, rng)
        parts = [
            ("kills, then the same as without", killed),
            ("signals, one line and the status at once, then the same as without", signalled),
            ("signals to sweeps and plan, all processes ended, no lease left", others),
        ]
        damaged = (damaged_checkpoints, damaged_data, damaged_words) if FLAGS.flips else ()
        damages = itertools.chain.from_iterable(damage(straight, FLAGS.flips, rng) for damage in damaged)
        counts = [count(what, trials) for what, trials in itertools.chain(parts, damages)]
    return 0 if all(counts) else 1


def count(what: str, trials: Trials) -> bool:
    """Runs the trials and prints how many succeeded, which did not, and how many of each kind there were."""
    good, kinds = [], collections.Counter[str]()
    for ok, kind in trials:
        good.append(ok)
        kinds[kind] += 1
        if not ok:
            print(f"  NOT: {what}: {kind}", flush=True)
    listed = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))
    print(f"{what}: {sum(good)} of {len(good)} ({listed})", flush=True)
    return all(good)


if __name__ == "__main__":
    cli.run(main, define_flags=define_flags)
