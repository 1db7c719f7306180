"""The schedule at points computed by hand, AdamW and Muon against NumPy in float64."""

import jax
import numpy as np
import pytest
from conftest import random_params, shapes, tiny_config, tiny_model

from mobilellm_jax.training.optimizer import is_decayed, learning_rate_schedule, make_optimizer, muon_axes

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
        ("linear", {step: 2 * min(step / 10, 1 - 0.9 * (min(step, 110) - 10) / 100) for step in range(130)}),
        ("constant", {0: 0.0, 5: 1.0, 10: 2.0, 60: 2.0, 110: 2.0}),
    ],
)
def test_schedule(schedule, points):
    rate = learning_rate_schedule(optimizer_config(**SCHEDULE, schedule=schedule), 110)
    for step, expected in points.items():
        assert rate(step) == pytest.approx(expected, abs=1e-6), step


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
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
    flags = is_decayed(shapes(tiny_model(share_embedding=share_embedding)))
    decayed = {jax.tree_util.keystr(p) for p, flag in jax.tree_util.tree_leaves_with_path(flags) if not flag}
    assert decayed == {
        "['blocks']['attention_norm']['gain']",
        "['blocks']['ffn_norm']['gain']",
        "['final_norm']['gain']",
    }


# Factors on learning rate and epsilon by hand: width 24 over a base of 6, 2 blocks over a base of 1.
SCALED = {
    "standard": {"rate": 1, "epsilon_blocks": 1, "epsilon_others": 1},
    "mup": {"rate": 1 / 4, "epsilon_blocks": 1 / 4, "epsilon_others": 1 / 4},
    "completep": {"rate": 1 / 4, "epsilon_blocks": 1 / 8, "epsilon_others": 1 / 4},
}


@pytest.mark.parametrize("clip_norm", [0.7, 1e9])
@pytest.mark.parametrize("parameterization", SCALED)
def test_steps_equal_numpy_adamw(clip_norm, parameterization):
    """Five steps with the paper's constants, but an epsilon that matters; all gradients clipped, or none."""
    config = optimizer_config(clip_norm=clip_norm, epsilon=1e-2)
    shape = tiny_model(parameterization=parameterization, base_width=6, base_depth=1)
    factors = SCALED[parameterization]
    params = random_params(shape)
    expected, paths = jax.tree.map(np.float64, params), jax.tree_util.tree_leaves_with_path(params)
    means, squares = jax.tree.map(np.zeros_like, expected), jax.tree.map(np.zeros_like, expected)

    def by_path(value):
        return jax.tree.unflatten(jax.tree.structure(params), [value(path) for path, _ in paths])

    def is_block_matrix(path):
        return path[0].key == "blocks" and path[-1].key != "gain"

    decay = by_path(lambda path: 0.0 if path[-1].key == "gain" else 0.1)
    faster = by_path(lambda path: factors["rate"] if is_block_matrix(path) else 1.0)
    kind = by_path(lambda path: "epsilon_blocks" if path[0].key == "blocks" else "epsilon_others")
    epsilon = jax.tree.map(lambda name: 1e-2 * factors[name], kind)
    for t, rate, gradients, actual in steps(config, shape, params):  # noqa: B007
        norm = np.sqrt(sum(np.sum(np.float64(g) ** 2) for g in jax.tree.leaves(gradients)))
        assert norm > 0.7
        gradients = jax.tree.map(lambda g, norm=norm: g * min(1, clip_norm / norm), gradients)
        means = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, means, gradients)
        squares = jax.tree.map(lambda v, g: 0.95 * v + 0.05 * g**2, squares, gradients)

        def adamw(p, m, v, decay, faster, epsilon, t=t, rate=rate):
            adam = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + epsilon)
            return p - rate * (faster * adam + decay * p)

        expected = jax.tree.map(adamw, expected, means, squares, decay, faster, epsilon)
    for a, wanted in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, wanted, rtol=1e-5, atol=1e-6)


def steps(config, shape, params):
    """Yields (t, learning rate, gradients, parameters after it) of five steps on random gradients."""
    optimizer = make_optimizer(config, shape)
    rng = np.random.default_rng(3)

    @jax.jit
    def step(params, state, gradients, rate):
        updates, state = optimizer.update(gradients, state, params)
        return jax.tree.map(lambda p, u: p - rate * u, params, updates), state

    state = optimizer.init(params)
    for t in range(1, 6):
        gradients = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params)
        params, state = step(params, state, gradients, 0.01 * t)
        yield t, 0.01 * t, gradients, params


def test_muon_updates_every_block_by_itself():
    """Against NumPy: Nesterov momentum, five Newton-Schulz iterations, RMS of about 0.2, for each block."""
    config, shape = optimizer_config(name="muon", clip_norm=1e9, epsilon=1e-8), tiny_model(depth=3)
    params = random_params(shape)
    matrices = {
        "query": (24, 40),
        "key": (24, 20),
        "value": (24, 20),
        "output": (40, 24),
        "gate": (24, 32),
        "up": (24, 32),
        "down": (32, 24),
    }
    names = {name: group for group in ("attention", "ffn") for name in params["blocks"][group]}
    assert names.keys() == matrices.keys()
    expected = {name: np.float64(params["blocks"][group][name]) for name, group in names.items()}
    momentum = {name: np.zeros_like(value) for name, value in expected.items()}
    for t, rate, gradients, actual in steps(config, shape, params):  # noqa: B007
        for name, group in names.items():
            gradient = np.float64(gradients["blocks"][group][name])
            momentum[name] = 0.95 * momentum[name] + 0.05 * gradient
            debiased = 0.95 * momentum[name] / (1 - 0.95 ** (t + 1)) + 0.05 * gradient / (1 - 0.95**t)
            update = np.stack([orthogonal(m.reshape(matrices[name])) for m in debiased])
            update *= 0.2 * np.sqrt(max(matrices[name]))
            expected[name] -= rate * (update.reshape(gradient.shape) + 0.1 * expected[name])
    for name, group in names.items():
        np.testing.assert_allclose(actual["blocks"][group][name], expected[name], rtol=1e-3, atol=1e-4)


def orthogonal(x):
    """Newton-Schulz iteration of Jordan (2024) on one matrix, in float64."""
    x = x / np.linalg.norm(x)
    if transposed := x.shape[0] > x.shape[1]:
        x = x.T
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return x.T if transposed else x


def test_muon_leaves_embedding_and_gains_to_adam():
    """The embedding has two axes and stacked gains have two: neither is a matrix to orthogonalise."""
    axes = muon_axes(shapes(tiny_model(share_embedding=False)))
    is_leaf = lambda leaf: leaf is None or hasattr(leaf, "reduction_axis")  # noqa: E731
    flat = jax.tree_util.tree_leaves_with_path(axes, is_leaf=is_leaf)
    without = {jax.tree_util.keystr(path) for path, leaf in flat if leaf is None}
    assert without == {
        "['embedding']",
        "['head']",
        "['blocks']['attention_norm']['gain']",
        "['blocks']['ffn_norm']['gain']",
        "['final_norm']['gain']",
    }
    assert len(flat) - len(without) == 7
