"""Whether the device waits for data: the share of a training loop that is spent waiting for the next batch.

The loop is that of training: it asks for a batch while the device works on the step before. Rows are of
bundled text. On a CPU, the model of the paper gets one row of 2,048 tokens a step.
"""

import time

import jax

from experiments.benchmarks import measure as m
from experiments.benchmarks.shapes import config_of
from experiments.benchmarks.trainer import Trainer, tiny_config
from mobilellm_jax import data
from mobilellm_jax.config import Config

_ROWS = 32  # of a batch in the paper, on each of its GPUs
_TARGET = 1.0  # percent of the loop


def measure(quick: bool) -> list[m.Line]:
    """Returns the share of waiting at the shape of the paper and at a tiny one, and tokens per second."""
    rows = 1 if jax.default_backend() == "cpu" else _ROWS
    sides = {
        "125M": (config_of("125m", rows, 64 if quick else 2048, quick), 2),
        "tiny": (tiny_config(), 10 if quick else 300),
    }
    return [line for name, (config, steps) in sides.items() for line in _lines(name, config, steps, quick)]


def _lines(name: str, config: Config, steps: int, quick: bool) -> list[m.Line]:
    prepared, trainer = data.prepare(config.data, config.model.vocab_size), Trainer(config)
    size, length = config.train.batch_size, config.data.sequence_length
    batches = data.train_batches(prepared, batch_size=size, seed=0, **trainer.share)
    alone = data.train_batches(prepared, batch_size=_ROWS, seed=1)
    trainer.train(batches, 1)
    shares, speeds, rates = [], [], []
    for _ in range(2 if quick else 5):
        start = time.perf_counter()
        waited = trainer.train(batches, steps)
        seconds = time.perf_counter() - start
        shares.append(100 * waited / seconds)
        speeds.append(steps * size * length / seconds)
        start = time.perf_counter()
        for _ in range(100):
            next(alone)
        rates.append(100 * _ROWS * length / (time.perf_counter() - start))
    return [
        m.Line(f"{name}, {size} rows of {length:,}: waiting for data", "%", tuple(shares), at_most=_TARGET),
        m.Line(f"{name}: training", "tokens/s", tuple(speeds)),
        m.Line(f"{name}: data alone, {_ROWS} rows a batch", "tokens/s", tuple(rates)),
    ]
