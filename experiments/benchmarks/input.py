"""Input pipeline: the share of a training loop that is spent waiting for the next batch.

As in training, the loop requests a batch while the device computes the previous step, so that the wait is an
upper bound of the loss. The actual loss shows in comparison with the same loop on one repeated batch. Rows
are of bundled text. On a CPU, the model of the paper gets one row of 2,048 tokens a step.

Rows of tasks are drawn while training runs. They are set against the step of a small model at the batch that
it learns the task with: one wide block, the shape whose steps are fastest.
"""

import itertools
from collections import deque

import jax

from configs import base
from experiments.benchmarks import measure as m
from experiments.benchmarks.shapes import config_of
from experiments.benchmarks.trainer import Trainer, tiny_config
from mobilellm_jax import data
from mobilellm_jax.config import Config, from_config_dict
from mobilellm_jax.data.tasks import open_task

_ROWS = 32  # of a batch in the paper, on each of its GPUs
_TARGET = 1.0  # percent of the loop, at the shape of the paper
_FASTER = 20.0  # times that rows of a task are drawn faster than a step takes them
_TASKS = {  # rows of a batch, width of the block
    "khop:hops=2,min_hops=1,symbols=7,queries=4": (32, 64),
    "structure:levels=4,symbols=3,rules=2,grammar=1,tokens=128": (8, 96),
    "manipulation:modulus=5,operations=4,operators=3": (128, 64),
    "knowledge:people=800,attributes=8,values=32,wordings=2,symbols=10,exposures=100": (32, 48),
    "breadth:vertices=8,parents=2": (64, 64),
}


def measure(quick: bool) -> list[m.Line]:
    """Measures the share of waiting at the shape of the paper and at a tiny one, and tokens per second."""
    rows = 1 if jax.default_backend() == "cpu" else _ROWS
    sides = {
        "125M": (config_of("125m", rows, 64 if quick else 2048, quick), 2),
        "tiny": (tiny_config(), 10 if quick else 300),
    }
    lines = [line for name, (config, steps) in sides.items() for line in _lines(name, config, steps, quick)]
    tasks = [*_TASKS][:2] if quick else _TASKS
    return lines + [_task_line(spec, *_TASKS[spec], steps=2 if quick else 100) for spec in tasks]


def _task_line(spec: str, rows: int, width: int, steps: int) -> m.Line:
    """How many times faster rows of a task are drawn than training takes them."""
    config = base.update(base.get_config(), {"data.source": spec, "train.eval_rows": 1})
    task = open_task(from_config_dict(config).data).train
    shape = {
        "vocab_size": task.vocab_size,
        "depth": 1,
        "width": width,
        "num_heads": 2,
        "ffn_width": 5 * width // 2,
    }
    sizes = {"data.sequence_length": task.length, "train.batch_size": rows}
    base.update(config, {**sizes, **{f"model.{name}": value for name, value in shape.items()}})
    trainer = Trainer(from_config_dict(config))
    prepared = data.prepare(trainer.config.data, task.vocab_size)
    drawn, same = prepared.train_batches(batch_size=rows, seed=0), trainer.random_batches()
    batches = 10 * steps  # more than are drawn together
    sides = {
        "data": lambda: deque(itertools.islice(drawn, batches), maxlen=0),
        "training": lambda: trainer.train(same, steps),
    }
    seconds = m.alternate(sides, 3)
    times = tuple(10 * x for x in m.ratios(seconds["training"], seconds["data"]))
    kind = spec.partition(":")[0]
    return m.Line(f"{kind}, {rows} rows: one block's steps / rows drawn", "x", times, at_least=_FASTER)


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
