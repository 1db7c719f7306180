"""Held-out scores against a plain loop over rows; what is input only does not count."""

import itertools

import jax
import numpy as np
import pytest
from conftest import apply, random_params, tiny_model

from mobilellm_jax.training.held_out import by_document, by_position, scores
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
    tokens = np.where(rows < 0, ~rows, rows)[:, :-1]
    np.testing.assert_array_equal(sums["guesses"], np.argmax(apply(params, tokens, config), axis=-1))
    assert float(sums["nats"].sum()) == pytest.approx(nats, rel=1e-5)
    assert (np.asarray(sums["nats"]) > 0).tolist() == (rows[:, 1:] >= 0).tolist()
    loss, error = scores([sums, sums])
    assert loss == pytest.approx(nats / targets, rel=1e-5)
    assert error == 0.8


def test_text_has_no_error(case):
    config, params, rows = case
    sums = eval_step(params, rows, config, False)
    assert sums.keys() == {"nats", "targets"}
    assert scores([sums])[1] is None


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9])
def test_loss_by_position_is_that_of_a_loop(length):
    nats = np.random.default_rng(0).random((5, length), np.float32)
    found = by_position(nats)
    ends = sorted({1, 2, 4, 8} & set(range(1, length)) | {length})
    bins = list(zip([0, *ends], ends, strict=False))
    assert found["to"] == ends
    assert found["targets"] == [5 * (end - start) for start, end in bins]
    expected = [np.float64(nats[:, start:end]).mean() for start, end in bins]
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-12)


@pytest.mark.parametrize("documents", [3, 700, 1499])
def test_sums_by_document_are_those_of_a_loop(documents):
    rng = np.random.default_rng(0)
    of_target = np.sort(rng.integers(0, documents, (800, 6)).ravel()).reshape(800, 6)
    order = rng.permutation(800)[:600]
    nats, of_target = rng.random((600, 6), np.float32), of_target[order]
    expected: dict[int, list[float]] = {}
    for value, document in zip(nats.ravel(), of_target.ravel(), strict=True):
        expected.setdefault(int(document), []).append(float(value))
    sums = [(sum(expected[document]), len(expected[document])) for document in sorted(expected)]
    found = by_document(nats, of_target)
    if len(sums) > 500:
        parts = [len(sums) * i // 500 for i in range(501)]
        assert {end - start for start, end in itertools.pairwise(parts)} <= {1, 2, 3}
        joined = [sums[start:end] for start, end in itertools.pairwise(parts)]
        sums = [(sum(n for n, _ in part), sum(t for _, t in part)) for part in joined]
    np.testing.assert_allclose(found["nats"], [nats for nats, _ in sums], rtol=1e-9)
    assert found["targets"] == [targets for _, targets in sums]
    assert sum(found["targets"]) == 3600
