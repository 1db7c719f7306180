"""The chunked loss against NumPy in float64 and the plain loss; the full logits never exist."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    LENGTH,
    apply,
    assert_trees_close,
    equations,
    loss_and_gradients,
    random_batch,
    random_params,
    shapes,
    tiny_model,
)

from mobilellm_jax import model
from mobilellm_jax.model.ops.cross_entropy import cross_entropy, plain_cross_entropy, token_cross_entropy


def numpy_cross_entropy(x_BTD, head_VD, targets_BT):
    """Returns the summed loss and its gradients with respect to x and head, in float64."""
    x_BTD, head_VD, targets_BT = np.float64(x_BTD), np.float64(head_VD), np.asarray(targets_BT)
    nats, dx_BTD, dhead_VD = 0.0, np.zeros_like(x_BTD), np.zeros_like(head_VD)
    for b, t in np.argwhere(targets_BT >= 0):
        logits_V = head_VD @ x_BTD[b, t]
        softmax_V = np.exp(logits_V - logits_V.max())
        softmax_V /= softmax_V.sum()
        nats -= np.log(softmax_V[targets_BT[b, t]])
        softmax_V[targets_BT[b, t]] -= 1
        dx_BTD[b, t] = softmax_V @ head_VD
        dhead_VD += np.outer(softmax_V, x_BTD[b, t])
    return nats, dx_BTD, dhead_VD


def random_inputs(length=LENGTH, dtype=np.float32):
    """Returns x, head and targets; logits spread over tens of nats, so that a naive softmax would show."""
    m = tiny_model()
    rng = np.random.default_rng(2)
    _, targets_BT = random_batch(m, length)
    x_BTD = rng.normal(0, 3, (*targets_BT.shape, m.width)).astype(np.float32)
    head_VD = rng.normal(0, 1, (m.vocab_size, m.width)).astype(np.float32)
    return jnp.asarray(x_BTD, dtype), jnp.asarray(head_VD), jnp.asarray(targets_BT)


@pytest.mark.parametrize("chunk", [1, 3, 4, LENGTH, LENGTH + 7])
def test_equals_numpy(chunk):
    """Chunks that divide the length of 9, that do not, and one that is longer."""
    x_BTD, head_VD, targets_BT = random_inputs()

    @jax.jit
    def both(x_BTD, head_VD):
        def scaled(x_BTD, head_VD):  # the incoming gradient is not always 1
            return 2.5 * cross_entropy(x_BTD, head_VD, targets_BT, chunk)

        plain = cross_entropy(x_BTD, head_VD, targets_BT, chunk)
        return plain, *jax.value_and_grad(scaled, argnums=(0, 1))(x_BTD, head_VD)

    plain, scaled, (dx_BTD, dhead_VD) = both(x_BTD, head_VD)
    expected = numpy_cross_entropy(x_BTD, head_VD, targets_BT)
    np.testing.assert_allclose([plain, scaled / 2.5], [expected[0], expected[0]], rtol=1e-6)
    assert_trees_close([dx_BTD / 2.5, dhead_VD / 2.5], list(expected[1:]), 1e-5)


@pytest.mark.parametrize("chunk", [1, 4, LENGTH, LENGTH + 7])
def test_loss_of_each_token_equals_numpy(chunk):
    x_BTD, head_VD, targets_BT = random_inputs()
    found_BT = jax.jit(token_cross_entropy, static_argnums=3)(x_BTD, head_VD, targets_BT, chunk)
    assert (found_BT.shape, found_BT.dtype) == (targets_BT.shape, jnp.float32)
    for b, t in np.ndindex(targets_BT.shape):
        expected, *_ = numpy_cross_entropy(x_BTD[b, t][None, None], head_VD, targets_BT[b, t][None, None])
        assert found_BT[b, t] == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert targets_BT[b, t] >= 0 or found_BT[b, t] == 0


@pytest.mark.parametrize("differentiated", [False, True])
def test_large_logits_cost_no_digits(differentiated):
    """All logits moved up by 1,000, which changes no probability; they are exact in float32."""
    rng = np.random.default_rng(0)
    x_BTD = rng.integers(-8, 9, (8, 256, 4)).astype(np.float32) / 8
    head_VD = rng.integers(-8, 9, (64, 4)).astype(np.float32) / 8
    x_BTD[..., -1], head_VD[:, -1] = 1, 1000
    targets_BT = rng.integers(0, 64, (8, 256))
    loss = jax.value_and_grad(cross_entropy) if differentiated else cross_entropy
    found = jax.jit(loss, static_argnums=3)(x_BTD, head_VD, targets_BT, 256)
    expected, *_ = numpy_cross_entropy(x_BTD, head_VD, targets_BT)
    np.testing.assert_allclose(found[0] if differentiated else found, expected, rtol=1e-6)


@pytest.mark.parametrize("share_embedding", [True, False])
def test_gradients_equal_those_of_the_plain_loss(share_embedding):
    """Also of the tied embedding, whose gradient comes from both ends of the network."""
    m = tiny_model(share_embedding=share_embedding)
    params, (tokens_BT, targets_BT) = random_params(m), random_batch(m)

    @jax.jit
    @jax.value_and_grad
    def plain(params):
        x_BTD = model.hidden(params, jnp.asarray(tokens_BT), m)
        head_VD = params["embedding"] if share_embedding else params["head"]
        return plain_cross_entropy(x_BTD, head_VD, jnp.asarray(targets_BT))

    (nats, count), gradients = loss_and_gradients(params, tokens_BT, targets_BT, m)
    expected_nats, expected = plain(params)
    assert count == (targets_BT >= 0).sum() < targets_BT.size
    np.testing.assert_allclose(nats, expected_nats, rtol=1e-6)
    assert_trees_close(gradients, expected, 1e-5)


def test_bfloat16_gradients_are_close():
    """The gradient of the head adds up over chunks in float32; rounded at each chunk, it would drift."""
    x_BTD, head_VD, targets_BT = random_inputs(300, jnp.bfloat16)
    dx_BTD, dhead_VD = jax.jit(jax.grad(cross_entropy, (0, 1)), static_argnums=3)(
        x_BTD, head_VD, targets_BT, 1
    )
    assert (dx_BTD.dtype, dhead_VD.dtype) == (jnp.bfloat16, jnp.float32)
    _, *expected = numpy_cross_entropy(x_BTD, head_VD.astype(jnp.bfloat16), targets_BT)
    assert_trees_close([dx_BTD.astype(jnp.float32), dhead_VD], expected, 0.01)


def test_no_target_at_all():
    m = tiny_model()
    params, (tokens_BT, targets_BT) = random_params(m), random_batch(m)
    (nats, count), gradients = loss_and_gradients(params, tokens_BT, np.full_like(targets_BT, -1), m)
    assert (nats, count) == (0, 0)
    assert all((g == 0).all() for g in jax.tree.leaves(gradients))


def test_ignored_targets_change_nothing():
    """Whatever the tokens at ignored positions' ends, only counted targets contribute."""
    m = tiny_model()
    params, (tokens_BT, targets_BT) = random_params(m), random_batch(m)
    (nats, _), _ = loss_and_gradients(params, tokens_BT, targets_BT, m)
    (same, _), _ = loss_and_gradients(params, tokens_BT, np.where(targets_BT < 0, -100, targets_BT), m)
    assert same == nats
    log_p_BTV = np.asarray(jax.nn.log_softmax(apply(params, tokens_BT, m)))
    expected = -sum(log_p_BTV[b, t, targets_BT[b, t]] for b, t in np.argwhere(targets_BT >= 0))
    np.testing.assert_allclose(nats, expected, rtol=1e-5)


# --- memory --------------------------------------------------------------------------------------------


def _largest_array(chunk):
    """Returns the elements of the largest array in the programs of the loss and of its gradient."""
    m = tiny_model(vocab_size=300, loss_chunk=chunk)
    value_and_grad = jax.value_and_grad(model.loss, has_aux=True)
    programs = [
        jax.make_jaxpr(function, static_argnums=3)(shapes(m), *random_batch(m), m).jaxpr
        for function in (model.loss, model.token_losses, value_and_grad)
    ]
    return [max(v.aval.size for e, _ in equations(p) for v in e.outvars) for p in programs]


def test_full_logits_never_exist():
    logits = random_batch(tiny_model())[0].size * 300
    assert all(size < logits for size in _largest_array(4))
    assert all(size >= logits for size in _largest_array(LENGTH))  # the test sees them where they do exist


def _memory(length, chunk):
    """Returns the temporary bytes of the compiled gradient for 2 rows of a vocabulary of 4,096."""
    arrays = [((2, length, 8), jnp.float32), ((4096, 8), jnp.float32), ((2, length), jnp.int32)]
    gradient = jax.jit(jax.value_and_grad(cross_entropy, (0, 1)), static_argnums=3)
    compiled = gradient.lower(*(jax.ShapeDtypeStruct(*array) for array in arrays), chunk).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_grows_with_the_chunk_only():
    more_logits = 2 * (128 - 32) * 4096 * 4
    assert _memory(128, 16) - _memory(32, 16) < 0.02 * more_logits
    assert _memory(128, 128) - _memory(32, 32) > 0.5 * more_logits  # as it does where the chunk grows
