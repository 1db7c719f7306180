"""The schedule at points computed by hand, and AdamW against NumPy in float64."""

import jax
import numpy as np
import pytest
from conftest import random_params, shapes, tiny_config, tiny_model

from mobilellm_jax.optimizer import is_matrix, learning_rate_schedule, make_optimizer

# 110 steps, 10 of warm-up, peak 2, final 10 %; "wsd" decays over the last 20 % = 22 steps.
SCHEDULE = {"learning_rate": 2.0, "warmup_steps": 10, "final_fraction": 0.1, "decay_fraction": 0.2}


def optimizer_config(**overrides):
    return tiny_config(
        **{"train.steps": 110, **{f"optimizer.{name}": value for name, value in overrides.items()}}
    ).optimizer


@pytest.mark.parametrize(
    ("schedule", "points"),
    [
        # Half way between 10 and 110 the cosine is half way between peak and final.
        ("cosine", {0: 0.0, 5: 1.0, 10: 2.0, 60: 1.1, 110: 0.2, 200: 0.2}),
        ("wsd", {0: 0.0, 5: 1.0, 10: 2.0, 60: 2.0, 88: 2.0, 99: 1.1, 110: 0.2, 200: 0.2}),
        ("constant", {0: 0.0, 5: 1.0, 10: 2.0, 60: 2.0, 110: 2.0}),
    ],
)
def test_schedule(schedule, points):
    rate = learning_rate_schedule(optimizer_config(**SCHEDULE, schedule=schedule), 110)
    for step, expected in points.items():
        assert rate(step) == pytest.approx(expected, abs=1e-6), step


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize(
    ("warmup_steps", "decay_fraction"),
    [(0, 0.2), (110, 0.2), (109, 0.2), (100, 0.5), (0, 1.0), (10, 0.0)],
)
def test_schedule_at_its_limits(schedule, warmup_steps, decay_fraction):
    """No warm-up, nothing but warm-up, a decay that the warm-up leaves no room for: peak, then final."""
    shape = {**SCHEDULE, "warmup_steps": warmup_steps, "decay_fraction": decay_fraction}
    rate = learning_rate_schedule(optimizer_config(**shape, schedule=schedule), 110)
    rates = np.array([rate(step) for step in range(111)])
    assert np.all(np.diff(rates[: warmup_steps + 1]) > 0)
    assert np.all(np.diff(rates[warmup_steps:]) <= 0)
    assert rates[warmup_steps] == pytest.approx(2.0)
    if schedule != "constant" and 0 < warmup_steps < 110:
        assert rates[110] == pytest.approx(0.2)


@pytest.mark.parametrize("share_embedding", [True, False])
def test_decay_applies_to_matrices_only(share_embedding):
    """Gains of the blocks are stacked and so have two axes, but are not matrices."""
    flags = is_matrix(shapes(tiny_model(share_embedding=share_embedding)))
    decayed = {jax.tree_util.keystr(p) for p, flag in jax.tree_util.tree_leaves_with_path(flags) if not flag}
    assert decayed == {
        "['blocks']['attention_norm']['gain']",
        "['blocks']['ffn_norm']['gain']",
        "['final_norm']['gain']",
    }


@pytest.mark.parametrize("clip_norm", [0.7, 1e9])
def test_steps_equal_numpy_adamw(clip_norm):
    """Five steps with the paper's constants; gradients are clipped in all steps, or in none."""
    config = optimizer_config(clip_norm=clip_norm)
    optimizer = make_optimizer(config)
    params = random_params(tiny_model())
    expected, paths = jax.tree.map(np.float64, params), jax.tree_util.tree_leaves_with_path(params)
    means, squares = jax.tree.map(np.zeros_like, expected), jax.tree.map(np.zeros_like, expected)
    rng = np.random.default_rng(3)

    @jax.jit
    def step(params, state, gradients, rate):
        updates, state = optimizer.update(gradients, state, params)
        return jax.tree.map(lambda p, u: p - rate * u, params, updates), state

    state = optimizer.init(params)
    for t in range(1, 6):
        rate = 0.01 * t
        gradients = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params)
        params, state = step(params, state, gradients, rate)

        norm = np.sqrt(sum(np.sum(np.float64(g) ** 2) for g in jax.tree.leaves(gradients)))
        assert norm > 0.7
        gradients = jax.tree.map(lambda g, norm=norm: g * min(1, clip_norm / norm), gradients)
        means = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, means, gradients)
        squares = jax.tree.map(lambda v, g: 0.95 * v + 0.05 * g**2, squares, gradients)
        decay = [0.0 if path[-1].key == "gain" else 0.1 for path, _ in paths]
        decay = jax.tree.unflatten(jax.tree.structure(params), decay)

        def adamw(p, m, v, decay, t=t, rate=rate):
            return p - rate * (m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8) + decay * p)

        expected = jax.tree.map(adamw, expected, means, squares, decay)
    for actual, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-6)
