"""Held-out scores against a plain loop over rows; what is input only does not count."""

import jax
import numpy as np
import pytest
from conftest import apply, random_params, tiny_model

from mobilellm_jax.training.held_out import scores
from mobilellm_jax.training.step import eval_step

ROWS = 6
eval_step = jax.jit(eval_step, static_argnums=(2, 3))


def make_rows(config):
    """Returns int32 rows of which some are text, some are hidden in part, one has no target at all."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, config.vocab_size, (ROWS, 10), dtype=np.int32)
    hidden = rng.random(rows.shape) < np.array([0.0, 0.5, 0.9, 0.9, 0.0, 1.0])[:, None]
    hidden[:5, -1] = False
    hidden[-1] = True
    return np.where(hidden, ~rows, rows)


@pytest.fixture(scope="module")
def case():
    config = tiny_model()
    params, rows = random_params(config), make_rows(config)
    tokens = np.where(rows < 0, ~rows, rows)[:, :-1]
    logits = np.asarray(apply(params, tokens, config), np.float64)
    # one row that is right throughout: its answers are what the model says
    said = logits[3].argmax(axis=1)
    last = rows[3, 1:] >= 0
    rows[3, 1:] = np.where(last & (np.arange(9) == 8), said, np.where(last, ~rows[3, 1:], rows[3, 1:]))
    return config, params, rows


def test_sums_equal_a_loop(case):
    config, params, rows = case
    nats = targets = wrong = count = 0
    for row in rows:
        tokens = np.array([~t if t < 0 else t for t in row[:-1]], np.int32)
        logits = np.asarray(apply(params, tokens[None], config), np.float64)[0]
        mistakes = [int(np.argmax(logits[i])) != t for i, t in enumerate(row[1:]) if t >= 0]
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        nats -= sum(log_p[i, t] for i, t in enumerate(row[1:]) if t >= 0)
        targets += len(mistakes)
        wrong += any(mistakes)
        count += len(mistakes) > 0
    assert (wrong, count) == (4, 5)  # one row is right, one has no target
    sums = eval_step(params, rows, config, True)
    assert (int(sums["targets"]), int(sums["wrong"]), int(sums["rows"])) == (targets, wrong, count)
    assert float(sums["nats"]) == pytest.approx(nats, rel=1e-5)
    loss, error = scores([sums, sums])
    assert loss == pytest.approx(nats / targets, rel=1e-5)
    assert error == 0.8


def test_text_has_no_error(case):
    config, params, rows = case
    sums = eval_step(params, rows, config, False)
    assert sums.keys() == {"nats", "targets"}
    assert scores([sums])[1] is None
