"""Quantization-aware training: rounded forward, straight-through backward, exact resume, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LENGTH, assert_trees_close, random_params, tiny_config
from test_train import corpus, run_loop  # noqa: F401, a fixture

from mobilellm_jax.data.rows import inputs_and_targets
from mobilellm_jax.errors import UserError
from mobilellm_jax.model.stack import loss as model_loss
from mobilellm_jax.model.stack import map_parameters
from mobilellm_jax.parallel import partition
from mobilellm_jax.quantization.apply import quantize, quantized_config
from mobilellm_jax.quantization.aware import straight_through, trained_model
from mobilellm_jax.quantization.schemes import parse
from mobilellm_jax.runs.run import check
from mobilellm_jax.storage.checkpoint import Checkpoints
from mobilellm_jax.training.programs import make_programs
from mobilellm_jax.training.step import eval_step, gradients

SHARED = {"model.sharing": "immediate", "model.num_repeats": 2}
gradients = jax.jit(gradients, static_argnums=2)


def rows_of(config):
    shape = (8, LENGTH + 1)
    return jnp.asarray(np.random.default_rng(0).integers(0, config.model.vocab_size, shape, dtype=np.int32))


def given(scheme, **overrides):
    """A config that trains so, its model, random parameters, and rows."""
    config = tiny_config(**{"train.quantize": scheme, **overrides})
    return config, trained_model(config), random_params(config.model), rows_of(config)


@pytest.mark.parametrize("scheme", ["w4:4", pytest.param("w8a8", marks=pytest.mark.slow)])
def test_the_forward_pass_is_that_of_the_quantized_model_bit_for_bit(scheme):
    config, m, params, rows = given(scheme, **SHARED)
    rounded, quantized = quantize(params, config.model, parse(scheme))
    through = jax.device_get(jax.jit(straight_through, static_argnums=1)(params, m))
    assert_trees_close(through, rounded, tolerance=0)
    (losses, _), (expected, _) = gradients(params, rows[None], m), gradients(rounded, rows[None], quantized)
    assert losses["loss"] == expected["loss"] != gradients(params, rows[None], config.model)[0]["loss"]
    evaluate = jax.jit(eval_step, static_argnums=(2, 3))
    found, wanted = evaluate(params, rows, m, True), evaluate(rounded, rows, quantized, True)
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name])


def test_gradients_are_those_at_the_rounded_weights():
    """Of a shared block too, whose uses add up."""
    config, m, params, rows = given("w3", **SHARED)
    rounded, _ = quantize(params, config.model, parse("w3"))
    _, found = gradients(params, rows[None], m)
    _, expected = gradients(rounded, rows[None], config.model)
    assert_trees_close(found, expected, tolerance=1e-5)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(found))


def test_gradients_of_gains_are_finite_differences():
    """Nothing is rounded between a gain and the loss but weights, which stay as they are."""
    _, m, params, rows = given("w4:4")
    _, found = gradients(params, rows[None], m)
    rng = np.random.default_rng(1)
    change = map_parameters(
        lambda of, w: rng.normal(size=w.shape) * of.is_gain, jax.tree.map(np.asarray, params)
    )
    step = 1e-2

    def moved(by):
        at = jax.tree.map(lambda w, d: (w + by * d).astype(np.float32), params, change)
        return float(gradients(at, rows[None], m)[0]["loss"])

    difference = (moved(step) - moved(-step)) / (2 * step)
    expected = sum(float(np.sum(g * d)) for g, d in zip(*map(jax.tree.leaves, (found, change)), strict=True))
    assert difference == pytest.approx(expected, rel=0.02)


@pytest.mark.slow
def test_gradients_through_rounded_activations():
    """Against JAX's own way to write a straight-through estimator."""
    config, m, params, rows = given("w8a8")
    _, found = gradients(params, rows[None], m)
    from mobilellm_jax.model import block, stack
    from mobilellm_jax.model.ops.rounding import round_tokens

    def plain(x, bits):
        return x + jax.lax.stop_gradient(round_tokens(x, bits) - x)

    rounded, _ = quantize(params, config.model, parse("w8a8"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block, "round_tokens", plain)
        patch.setattr(stack, "round_tokens", plain)
        quantized = quantized_config(config.model, parse("w8a8"))
        batch = inputs_and_targets(rows)
        mean = jax.jit(jax.grad(lambda p: model_loss(p, *batch, quantized)[0] / batch[1].size))
        expected = mean(rounded)
    assert_trees_close(found, expected, tolerance=1e-5)


@pytest.mark.slow
def test_a_stopped_run_resumes_bit_for_bit(tmp_path, corpus):  # noqa: F811
    config = tiny_config(**{**corpus, "train.quantize": "w3", "train.steps": 4, "train.checkpoint_every": 2})

    def state(name):
        checkpoints = Checkpoints(tmp_path / name / "checkpoints")
        mesh = partition.make_mesh(config.mesh)
        return jax.device_get(checkpoints.restore_latest(make_programs(config, mesh).state)[1])

    straight, _ = run_loop(config, tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        run_loop(config, tmp_path / "stopped", signal_at="step 2/4")
    resumed, lines = run_loop(config, tmp_path / "stopped")
    assert any("resuming after step" in str(line) for line in lines)
    assert resumed.evaluations[-1] == straight.evaluations[-1]
    assert_trees_close(state("stopped"), state("straight"), tolerance=0)
    plain = tiny_config(**{**corpus, "train.steps": 4, "train.checkpoint_every": 2})
    assert run_loop(plain, tmp_path / "plain")[0].evaluations[-1]["loss"] != straight.evaluations[-1]["loss"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.quantize": "w0"}, "scheme 'w0': 0 bits for weights"),
        ({"train.quantize": "w4:7"}, "scheme 'w4:7': groups of 7 do not divide the rows"),
        (
            {"train.quantize": "w4", "train.lora_rank": 2, "train.init_from": "a"},
            "train.quantize: 'w4' does not go with train.lora_rank=2",
        ),
        (
            {"train.quantize": "w4", "train.loops": "1..2", **SHARED},
            r"train.quantize: 'w4' does not go with train.loops='1..2'",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        check(tiny_config(**changes))
