"""Distillation: the loss against NumPy in float64, finite differences and the plain loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import (
    LENGTH,
    assert_trees_close,
    dot_flops,
    equations,
    random_batch,
    random_params,
    tiny_config,
    tiny_model,
)

from mobilellm_jax import model
from mobilellm_jax.costs import accounting
from mobilellm_jax.data.rows import inputs_and_targets
from mobilellm_jax.model.ops.cross_entropy import cross_entropy, distillation, plain_distillation
from mobilellm_jax.parallel import partition
from mobilellm_jax.training.programs import compile_key, make_programs
from mobilellm_jax.training.step import Distillation

VOCABULARY = 48


def random_inputs(length=LENGTH, dtype=np.float32):
    """Returns x, head, targets, and the teacher's x and head; logits spread over tens of nats."""
    rng = np.random.default_rng(3)
    _, targets_BT = random_batch(tiny_model(vocab_size=VOCABULARY), length)
    rows = len(targets_BT)
    x_BTD, teacher_x_BTE = rng.normal(0, 2, (rows, length, 24)), rng.normal(0, 2, (rows, length, 11))
    head_VD, teacher_head_VE = rng.normal(0, 1, (VOCABULARY, 24)), rng.normal(0, 1, (VOCABULARY, 11))
    x_BTD, teacher_x_BTE = jnp.asarray(x_BTD, dtype), jnp.asarray(teacher_x_BTE, dtype)
    return x_BTD, jnp.float32(head_VD), jnp.asarray(targets_BT), teacher_x_BTE, jnp.float32(teacher_head_VE)


def log_softmax(logits_V):
    shifted_V = logits_V - logits_V.max()
    return shifted_V - np.log(np.exp(shifted_V).sum())


def numpy_distillation(x_BTD, head_VD, targets_BT, teacher_x_BTE, teacher_head_VE, weight, tau):
    """Returns the loss and its two terms in float64, position by position."""
    x_BTD, head_VD, teacher_x_BTE, teacher_head_VE = map(
        np.float64, (x_BTD, head_VD, teacher_x_BTE, teacher_head_VE)
    )
    label = soft = 0.0
    for b, t in np.argwhere(np.asarray(targets_BT) >= 0):
        logits_V, teacher_V = head_VD @ x_BTD[b, t], teacher_head_VE @ teacher_x_BTE[b, t]
        label -= log_softmax(logits_V)[targets_BT[b, t]]
        soft -= np.exp(log_softmax(teacher_V / tau)) @ log_softmax(logits_V / tau)
    return (1 - weight) * label + weight * tau**2 * soft, label, soft


def slope(function, array, direction, step=1e-5):
    """Returns the derivative of a float64 function along a direction, by central differences."""
    array = np.float64(array)
    return (function(array + step * direction) - function(array - step * direction)) / (2 * step)


distilled = jax.jit(distillation, static_argnums=(5, 6, 7))


@jax.jit(static_argnums=(5, 6, 7))
def gradients(*arguments):
    """Returns the loss times 2.5 and its gradients: the incoming gradient is not always 1."""

    def scaled(x_BTD, head_VD, *others):
        loss, *terms = distillation(x_BTD, head_VD, *others)
        return 2.5 * loss, terms

    return jax.value_and_grad(scaled, argnums=(0, 1), has_aux=True)(*arguments)


@pytest.mark.parametrize(("chunk", "weight", "tau"), [(4, 0.3, 1.0), (3, 0.3, 2.0), (LENGTH + 7, 1, 0.5)])
def test_equals_numpy_and_finite_differences(chunk, weight, tau):
    """Chunks that divide the length of 9, that do not, and one that is longer."""
    arrays = random_inputs()
    expected = numpy_distillation(*arrays, weight, tau)
    np.testing.assert_allclose(distilled(*arrays, chunk, weight, tau), expected, rtol=1e-6)
    (loss, terms), (dx_BTD, dhead_VD) = gradients(*arrays, chunk, weight, tau)
    np.testing.assert_allclose([loss / 2.5, *terms], expected, rtol=1e-6)
    rng = np.random.default_rng(4)
    for place, found in ((0, dx_BTD), (1, dhead_VD)):
        direction = rng.normal(size=found.shape)

        def along(array, place=place):
            changed = [*arrays[:place], array, *arrays[place + 1 :]]
            return numpy_distillation(*changed, weight, tau)[0]

        np.testing.assert_allclose(
            np.sum(np.float64(found) / 2.5 * direction), slope(along, arrays[place], direction), rtol=2e-5
        )


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_gradients_equal_those_of_the_plain_loss(tau):
    """Element by element; positions without a target have none."""
    arrays = random_inputs()

    @jax.jit
    @jax.grad
    def plain(pair):
        return plain_distillation(*pair, *arrays[2:], 0.4, tau)[0]

    _, found = gradients(*arrays, 4, 0.4, tau)
    assert_trees_close([g / 2.5 for g in found], list(plain(list(arrays[:2]))), 1e-5)
    assert (found[0][np.asarray(arrays[2]) < 0] == 0).all()


def test_weight_0_has_the_bits_of_the_loss_without_a_teacher():
    arrays = random_inputs()
    loss = jax.jit(jax.value_and_grad(cross_entropy, (0, 1)), static_argnums=3)
    with_teacher = jax.jit(
        jax.value_and_grad(lambda *a: distillation(*a)[0], (0, 1)), static_argnums=(5, 6, 7)
    )
    found, expected = with_teacher(*arrays, 4, 0.0, 1.0), loss(*arrays[:3], 4)
    assert_trees_close(found, expected, tolerance=0)


def test_a_student_that_is_its_teacher_learns_from_tokens_alone():
    x_BTD, head_VD, targets_BT, *_ = random_inputs()
    _, found = gradients(x_BTD, head_VD, targets_BT, x_BTD, head_VD, 4, 0.75, 1.0)
    expected = jax.jit(jax.grad(cross_entropy, (0, 1)), static_argnums=3)(x_BTD, head_VD, targets_BT, 4)
    assert_trees_close([g / 2.5 for g in found], [0.25 * g for g in expected], 1e-5)
    _, found = gradients(x_BTD, head_VD, targets_BT, x_BTD, head_VD, 4, 1.0, 2.0)
    for g, other in zip(found, expected, strict=True):
        assert np.abs(g).max() < 1e-5 * np.abs(other).max()


def test_large_logits_cost_no_digits():
    """All logits of both moved up by 1,000, which changes no probability; they are exact in float32."""
    rng = np.random.default_rng(0)
    x_BTD, teacher_x_BTE = rng.integers(-8, 9, (2, 4, 64, 4)).astype(np.float32) / 8
    head_VD, teacher_head_VE = rng.integers(-8, 9, (2, 64, 4)).astype(np.float32) / 8
    for x, head in ((x_BTD, head_VD), (teacher_x_BTE, teacher_head_VE)):
        x[..., -1], head[:, -1] = 1, 1000
    targets_BT = rng.integers(0, 64, (4, 64))
    arrays = (x_BTD, head_VD, targets_BT, teacher_x_BTE, teacher_head_VE)
    found = distilled(*arrays, 64, 0.5, 2.0)
    np.testing.assert_allclose(found, numpy_distillation(*arrays, 0.5, 2.0), rtol=1e-6)


@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_bfloat16_gradients_are_close(tau):
    """The gradient of the head adds up over chunks in float32."""
    x_BTD, head_VD, targets_BT, teacher_x_BTE, teacher_head_VE = random_inputs(100, jnp.bfloat16)
    heads = (h.astype(jnp.bfloat16).astype(jnp.float32) for h in (head_VD, teacher_head_VE))
    exact = dict(zip(("head_VD", "teacher_head_VE"), heads, strict=True))

    @jax.grad
    def plain(pair):
        return plain_distillation(
            *pair, targets_BT, teacher_x_BTE.astype(jnp.float32), exact["teacher_head_VE"], 0.5, tau
        )[0]

    arrays = x_BTD, head_VD, targets_BT, teacher_x_BTE, teacher_head_VE
    _, (dx_BTD, dhead_VD) = gradients(*arrays, 1, 0.5, tau)
    assert (dx_BTD.dtype, dhead_VD.dtype) == (jnp.bfloat16, jnp.float32)
    expected = jax.jit(plain)([x_BTD.astype(jnp.float32), exact["head_VD"]])
    assert_trees_close([dx_BTD.astype(jnp.float32) / 2.5, dhead_VD / 2.5], list(expected), 0.02)


def test_full_logits_never_exist():
    """Neither the student's nor the teacher's."""
    arrays = random_inputs()
    full = arrays[2].size * VOCABULARY
    for chunk, exist in ((4, False), (LENGTH, True)):
        jaxpr = jax.make_jaxpr(gradients, static_argnums=(5, 6, 7))(*arrays, chunk, 0.5, 2.0).jaxpr
        assert exist == any(v.aval.size >= full for e, _ in equations(jaxpr) for v in e.outvars)


# --- a training step ------------------------------------------------------------------------------------

TEACHER = tiny_model(depth=3, width=32, num_heads=2, num_kv_heads=2, ffn_width=40)
DISTILLATION = Distillation(TEACHER, 0.4, 2.0)


PARAMS = random_params(TEACHER)
ROWS = np.random.default_rng(5).integers(0, 48, (8, LENGTH + 1), np.int32)
ROWS = np.where(np.random.default_rng(6).random(ROWS.shape) < 0.2, ~ROWS, ROWS)  # not all are targets


def one_step(config, distillation, devices=1):
    """Returns state and metrics after a step on a mesh of the first devices."""
    programs = make_programs(config, partition.make_mesh(config.mesh, jax.devices()[:devices]), distillation)
    teacher = jax.device_put((PARAMS,), jax.tree.map(lambda leaf: leaf.sharding, programs.teacher))
    state = programs.init(jax.random.key(0))
    return jax.device_get(programs.step(state, ROWS, np.float32(0.1), *teacher))


@pytest.mark.slow
def test_a_step_has_the_gradient_of_both_losses_in_parts_and_on_8_devices():
    d, in_parts = DISTILLATION, tiny_config(**{"train.accumulation_steps": 4, "mesh.data": 1})
    tokens_BT, targets_BT = inputs_and_targets(jnp.asarray(ROWS))
    params, teacher = model.init(jax.random.key(0), in_parts.model), jax.tree.map(jnp.asarray, PARAMS)

    @jax.jit
    @jax.value_and_grad
    def plain(params):
        x_BTD = model.hidden(params, tokens_BT, in_parts.model)
        teacher_x_BTE = model.hidden(teacher, tokens_BT, TEACHER)
        heads = params["embedding"], teacher["embedding"]
        arguments = x_BTD, heads[0], targets_BT, teacher_x_BTE, heads[1], d.weight, d.temperature
        return plain_distillation(*arguments)[0] / jnp.sum(targets_BT >= 0)

    loss, gradient = plain(params)
    state, metrics = one_step(in_parts, d)
    together = (1 - d.weight) * metrics["loss"] + d.weight * d.temperature**2 * metrics["teacher_loss"]
    np.testing.assert_allclose(together, loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(gradient), rtol=1e-5)
    split = one_step(tiny_config(**{"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}), d, 8)
    assert_trees_close(split[1], metrics, 1e-5)
    assert_trees_close(split[0].params, state.params, 1e-3)


def test_the_teacher_is_no_state_and_has_no_gradient():
    config = tiny_config()
    mesh = partition.make_mesh(config.mesh, jax.devices()[:1])
    alone, with_teacher = (make_programs(config, mesh, d) for d in (None, DISTILLATION))
    assert with_teacher.state == alone.state
    assert alone.teacher == ()
    # A backward pass through the teacher would cost two more forward passes of it.
    flops = [dot_flops(programs.trace_step().jaxpr) for programs in (alone, with_teacher)]
    tokens = 8 * LENGTH
    chunk = config.model.loss_chunk
    padded = -(-LENGTH // chunk) * chunk / LENGTH  # positions whose logits are computed
    expected = accounting.executed_flops_per_token(TEACHER, LENGTH)
    expected += (padded - 1) * 2 * TEACHER.width * TEACHER.vocab_size
    assert (flops[1] - flops[0]) / tokens == pytest.approx(expected, rel=0.02)


def test_a_teacher_is_kept_in_the_dtype_that_it_computes_in():
    config = tiny_config(**{"model.compute_dtype": "bfloat16"})
    mesh = partition.make_mesh(config.mesh, jax.devices()[:1])
    d = dataclasses.replace(DISTILLATION, model=dataclasses.replace(TEACHER, compute_dtype="bfloat16"))
    (teacher,) = make_programs(config, mesh, d).teacher
    assert {leaf.dtype.name for leaf in jax.tree.leaves(teacher)} == {"bfloat16", "float32"}
    assert teacher["embedding"].dtype == jnp.bfloat16


def test_programs_depend_on_the_part_of_the_teacher():
    config, d = tiny_config(), DISTILLATION
    others = [
        None,
        d,
        dataclasses.replace(d, weight=0.5),
        dataclasses.replace(d, temperature=1.0),
        dataclasses.replace(d, model=tiny_model()),
    ]
    assert len({compile_key(config, other) for other in others}) == len(others)
    assert compile_key(config, d) == compile_key(config, dataclasses.replace(d))
