"""Cost of checkpoints: training time lost to a save in the background, and the time of a restore.

MobileLLM-125M with its optimizer state, 1.5 GB. Enough steps for a save to finish are timed with and without
one; the difference, divided by 100 steps, is the cost for a run that saves every 100. On a CPU, the batch is
one row of 512 tokens: the step is short, so that the share is large. A restore checks the sha256 of all files
first; it reads from the page cache of the operating system, since the files were just written.
"""

import math
import time
from itertools import count

import jax

from experiments.benchmarks import measure as m
from experiments.benchmarks.shapes import config_of
from experiments.benchmarks.trainer import Trainer
from mobilellm_jax.storage.checkpoint import Checkpoints, newest_intact
from mobilellm_jax.training.signals import scratch_directory

_EVERY = 100  # steps between two saves
_MOST_STEPS = 50  # in one turn


def measure(quick: bool) -> list[m.Line]:
    """Measures seconds of a step, of a save and of a restore, and the share of the loop that saves take."""
    on_cpu = jax.default_backend() == "cpu"
    shape = (1, 512) if on_cpu else (32, 2048)
    trainer = Trainer(config_of("125m", *((1, 32) if quick else shape), quick))
    batches, numbers, blocked = trainer.random_batches(), count(1), list[float]()
    with scratch_directory("bench-") as folder:
        directory = folder / "checkpoints"
        checkpoints = Checkpoints(directory)

        def save(steps: int) -> None:
            start = time.perf_counter()
            checkpoints.save(next(numbers), trainer.state, None)
            blocked.append(time.perf_counter() - start)
            trainer.train(batches, steps)
            checkpoints.finish()  # time beyond the steps counts as lost

        start = time.perf_counter()
        trainer.train(batches, 1)
        step_s = time.perf_counter() - start
        start = time.perf_counter()
        save(0)
        steps = min(_MOST_STEPS, math.ceil(1.5 * (time.perf_counter() - start) / step_s) + 1)
        sides = {"without": lambda: trainer.train(batches, steps), "with": lambda: save(steps)}
        seconds = m.alternate(sides, 2 if quick else 4)
        lost = [b - a for a, b in zip(seconds["without"], seconds["with"], strict=True)]
        shares = [100 * s / (_EVERY * a / steps) for s, a in zip(lost, seconds["without"], strict=True)]
        sides = {
            "verify": lambda: newest_intact(directory),
            "restore": lambda: jax.block_until_ready(checkpoints.restore_latest(trainer.programs.state)),
        }
        reading = m.alternate(sides, 2 if quick else 4)
        size = sum(path.stat().st_size for path in (directory / str(next(numbers) - 1)).rglob("*"))
        checkpoints.close()
    tokens = trainer.config.train.batch_size * trainer.config.data.sequence_length
    return [
        m.Line(f"125M, a step of {tokens:,} tokens", "s", tuple(s / steps for s in seconds["without"])),
        m.Line(f"a save of {size / 1e9:.2f} GB: the loop stands still", "s", tuple(blocked[2:])),
        m.Line(f"a save: lost to it in all, over {steps} steps", "s", tuple(lost)),
        m.Line(f"a save every {_EVERY} steps: share of time lost", "%", tuple(shares), at_most=5),
        m.Line("a restore, with verification", "s", tuple(reading["restore"])),
        m.Line(
            "verification, share of a restore",
            "%",
            tuple(100 * share for share in m.ratios(reading["verify"], reading["restore"])),
        ),
    ]
