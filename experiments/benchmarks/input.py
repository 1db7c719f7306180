"""Input pipeline: the share of a training loop that is spent waiting for the next batch.

As in training, the loop requests a batch while the device computes the previous step, so that the wait is an
upper bound of the loss. The actual loss shows in comparison with the same loop on one repeated batch. Rows
are of bundled text. On a CPU, the model of the paper gets one row of 2,048 tokens a step.
"""

import itertools
from collections import deque

import jax

from experiments.benchmarks import measure as m
from experiments.benchmarks.shapes import config_of
from experiments.benchmarks.trainer import Trainer, tiny_config
from mobilellm_jax import data
from mobilellm_jax.config import Config

_ROWS = 32  # of a batch in the paper, on each of its GPUs
_TARGET = 1.0  # percent of the loop, at the shape of the paper


def measure(quick: bool) -> list[m.Line]:
    """Measures the share of waiting at the shape of the paper and at a tiny one, and tokens per second."""
    rows = 1 if jax.default_backend() == "cpu" else _ROWS
    sides = {
        "125M": (config_of("125m", rows, 64 if quick else 2048, quick), 2),
        "tiny": (tiny_config(), 10 if quick else 300),
    }
    return [line for name, (config, steps) in sides.items() for line in _lines(name, config, steps, quick)]


def _lines(name: str, config: Config, steps: int, quick: bool) -> list[m.Line]:
    prepared, trainer = data.prepare(config.data, config.model.vocab_size), Trainer(config)
    size, length = config.train.batch_size, config.data.sequence_length
    batches = prepared.train_batches(batch_size=size, seed=0, **trainer.share)
    alone, same = prepared.train_batches(batch_size=_ROWS, seed=1), trainer.random_batches()
    waited: list[float] = []
    sides = {
        "data": lambda: waited.append(trainer.train(batches, steps)),
        "one batch": lambda: trainer.train(same, steps),
        "alone": lambda: deque(itertools.islice(alone, 100), maxlen=0),
    }
    seconds = m.alternate(sides, 2 if quick else 3)
    shares = m.ratios(waited[1:], seconds["data"])
    lost = tuple(100 * (1 - x) for x in m.ratios(seconds["one batch"], seconds["data"]))
    alone_rates = m.rates(100 * _ROWS * length, seconds["alone"])
    case, target = f"{name}, {size} rows of {length:,}", _TARGET if name == "125M" else None
    return [
        m.Line(f"{case}: waiting for data", "%", tuple(100 * x for x in shares), at_most=target),
        m.Line(f"{case}: lost to it", "%", lost),
        m.Line(f"{name}: training", "tokens/s", m.rates(steps * size * length, seconds["data"])),
        m.Line(f"{name}: data alone, {_ROWS} rows a batch", "tokens/s", alone_rates),
    ]
