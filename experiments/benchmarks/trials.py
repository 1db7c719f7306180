"""Runs of one shape that differ in seed and learning rate, trained together in one program (`jax.vmap`).

The potential gain: a step of a small model does not fill an accelerator. The sweep does not do this yet; on a
CPU it runs points at the same time in several processes instead.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import measure as m
from experiments.benchmarks.shapes import config_of
from mobilellm_jax.training.step import TrainState, init_state, train_step

_TRIALS = (1, 4, 16)


def measure(quick: bool) -> list[m.Line]:
    """Measures tokens per second of 1, 4 and 16 trials together, and the ratios to one alone."""
    rows, length = (2, 16) if quick else (8, 64)
    trials = _TRIALS[:2] if quick else _TRIALS
    seconds = m.alternate({str(n): _steps(n, rows, length, quick) for n in trials}, 2 if quick else 7)
    tokens = {n: m.rates(n * rows * length, seconds[str(n)]) for n in trials}
    size = f"4 blocks of 48, {rows} x {length} tokens each"
    lines = [m.Line(f"{size}: {n} together", "tokens/s", rates) for n, rates in tokens.items()]
    return lines + [m.Line(f"{n} together / 1", "x", m.ratios(tokens[n], tokens[1])) for n in trials[1:]]


def _steps(trials: int, rows: int, length: int, quick: bool) -> Callable[[], object]:
    config = config_of("4 x 48", rows, length, quick)
    model, optimizer = config.model, config.optimizer

    def step(state: TrainState, rows_BS: jax.Array, rate: jax.Array) -> object:
        return train_step(state, rows_BS, rate, model, optimizer, 1)

    together = jax.jit(jax.vmap(step), donate_argnums=0)
    keys = jax.random.split(jax.random.key(0), trials)
    state = jax.jit(jax.vmap(lambda key: init_state(key, model, optimizer)))(keys)
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (trials, rows, length + 1), np.int32)
    rates = jnp.linspace(1e-3, 2e-3, trials)

    def call() -> None:
        nonlocal state
        state, metrics = together(state, tokens, rates)
        jax.block_until_ready(metrics)

    return call
