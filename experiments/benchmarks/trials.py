"""Runs of one shape that differ in seed and learning rate, trained together in one program.

The potential gain: a step of a small model does not fill an accelerator. `sweep --trials_per_program` does
this; on a CPU it runs points at the same time in several processes instead. Measured is what the loop does at
each step: rows to the device, a step, its loss.
"""

from collections.abc import Callable

import jax
import numpy as np

from experiments.benchmarks import measure as m
from experiments.benchmarks.shapes import config_of
from mobilellm_jax.runs.run import check
from mobilellm_jax.training.programs import make_programs
from mobilellm_jax.training.trials import place_rows, rates_of, stack

_TRIALS = (1, 4, 16, 64)


def measure(quick: bool) -> list[m.Line]:
    """Measures tokens per second of 1, 4, 16 and 64 trials together, and the ratios to one alone."""
    rows, length = (8, 16) if quick else (8, 64)  # tests see 8 devices
    trials = _TRIALS[:2] if quick else _TRIALS
    seconds = m.alternate({str(n): _steps(n, rows, length, quick) for n in trials}, 2 if quick else 7)
    tokens = {n: m.rates(n * rows * length, seconds[str(n)]) for n in trials}
    size = f"4 blocks of 48, {rows} x {length} tokens each"
    lines = [m.Line(f"{size}: {n} together", "tokens/s", rates) for n, rates in tokens.items()]
    return lines + [m.Line(f"{n} together / 1", "x", m.ratios(tokens[n], tokens[1])) for n in trials[1:]]


def _steps(trials: int, rows: int, length: int, quick: bool) -> Callable[[], object]:
    config = config_of("4 x 48", rows, length, quick)
    programs = make_programs(config, check(config), trials=trials)
    state = stack(programs, ((place, programs.init(jax.random.key(place))) for place in range(trials)))
    random = np.random.default_rng(0)
    tokens = random.integers(0, config.model.vocab_size, (trials, rows, length + 1), np.int32)
    rates = rates_of(programs, {place: np.float32(1e-3) for place in range(trials)})

    def call() -> None:
        nonlocal state
        placed = place_rows(programs, programs.rows, dict(enumerate(tokens)))
        state, metrics = programs.step(state, placed, rates)
        jax.block_until_ready(metrics)

    return call
