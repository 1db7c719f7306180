"""Coordinate checks (Yang et al. 2022, appendix D.1): what a few steps change must not depend on the shape.

The sizes are those of the residual stream before the final norm, from a plain loop over the plan, and of the
logits. Where a parameterization makes no promise, the check has to fail: that is tested too.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import init, loss_and_gradients, tiny_config

from mobilellm_jax import model
from mobilellm_jax.model.block import Block, rope_table
from mobilellm_jax.model.parameterization import Multipliers, multipliers
from mobilellm_jax.training.step import init_state, train_step

LENGTH, ROWS, VOCAB, STEPS, RATE = 16, 8, 64, 5, 2**-7
init_run = jax.jit(init_state, static_argnums=(1, 2))
step = jax.jit(train_step, static_argnums=(3, 4, 5))


def config(parameterization, width=32, depth=2, sharing="none", num_repeats=1):
    shape = {
        "vocab_size": VOCAB,
        "width": width,
        "num_heads": width // 16,
        "num_kv_heads": width // 16,
        "head_dim": 16,
        "ffn_width": 2 * width,
        "depth": depth,
        "sharing": sharing,
        "num_repeats": num_repeats,
        "parameterization": parameterization,
        "base_width": 32,
        "base_depth": 2,
        "loss_chunk": LENGTH,
    }
    settings = {f"model.{name}": value for name, value in shape.items()}
    return tiny_config(**settings, **{"data.sequence_length": LENGTH, "optimizer.warmup_steps": 0})


@functools.partial(jax.jit, static_argnums=2)
def stream_and_logits(params, tokens, c):
    x, rope = params["embedding"][tokens], rope_table(jnp.arange(LENGTH)[None, :], c)

    def layer(x, u):
        return Block(c).apply({"params": jax.tree.map(lambda w: w[u], params["blocks"])}, x, rope)[0], None

    x, _ = jax.lax.scan(layer, x, jnp.array(c.plan))
    return x, model.apply(params, tokens, c)


@functools.cache
def changes(c):
    """Returns the root mean square change of the residual stream and of the logits after a few steps."""
    rows = np.random.default_rng(0).integers(0, VOCAB, (ROWS, LENGTH + 1)).astype(np.int32)
    state = init_run(jax.random.key(0), c.model, c.optimizer)
    before = stream_and_logits(state.params, rows[:, :-1], c.model)
    for _ in range(STEPS):
        state, _ = step(state, rows, jnp.float32(RATE), c.model, c.optimizer, 1)
    after = stream_and_logits(state.params, rows[:, :-1], c.model)
    return [float(jnp.sqrt(jnp.mean((a - b) ** 2))) for a, b in zip(after, before, strict=True)]


def growth(small, large):
    """Returns change of the large model over change of the small one: stream, logits."""
    return np.divide(changes(large), changes(small))


@pytest.mark.parametrize("parameterization", [pytest.param("mup", marks=pytest.mark.slow), "completep"])
def test_changes_do_not_grow_with_width(parameterization):
    """8 times the width. The logits of the narrow model still hold noise of the initialisation."""
    stream, logits = growth(config(parameterization), config(parameterization, width=256))
    assert 0.8 < stream < 1.25
    assert 0.6 < logits < 1.25


@pytest.mark.slow
def test_standard_changes_grow_with_width():
    stream, logits = growth(config("standard"), config("standard", width=256))
    assert stream > 8
    assert logits > 2


@pytest.mark.parametrize(
    ("sharing", "num_repeats"),
    [
        ("immediate", 2),
        pytest.param("none", 1, marks=pytest.mark.slow),
        pytest.param("repeat_all", 2, marks=pytest.mark.slow),
        pytest.param("reverse", 2, marks=pytest.mark.slow),
    ],
)
def test_completep_changes_do_not_grow_with_depth(sharing, num_repeats):
    """From 2 layers applied to 32, with and without sharing."""
    small, large = (
        config("completep", depth=layers // num_repeats, sharing=sharing, num_repeats=num_repeats)
        for layers in (2, 32)
    )
    stream, logits = growth(small, large)
    assert 0.8 < stream < 1.25
    assert 0.8 < logits < 1.25


@pytest.mark.parametrize("parameterization", ["standard", pytest.param("mup", marks=pytest.mark.slow)])
def test_other_changes_grow_with_depth(parameterization):
    stream, _ = growth(config(parameterization), config(parameterization, depth=32))
    assert stream > 4


def gradient_size(c):
    """Returns the root mean square gradient of the FFN's last matrix at initialisation."""
    rows = np.random.default_rng(0).integers(0, VOCAB, (ROWS, LENGTH + 1)).astype(np.int32)
    params = init(jax.random.key(0), c.model)
    _, gradient = loss_and_gradients(params, rows[:, :-1], rows[:, 1:], c.model)
    return float(jnp.sqrt(jnp.mean(gradient["blocks"]["ffn"]["down"] ** 2)))


@pytest.mark.parametrize(
    ("sharing", "num_repeats"),
    [
        ("none", 1),
        pytest.param("immediate", 4, marks=pytest.mark.slow),
        pytest.param("repeat_all", 4, marks=pytest.mark.slow),
    ],
)
def test_epsilon_follows_the_gradient_of_a_block(sharing, num_repeats):
    """8 times the blocks: each has an eighth of the gradient, however often it is used."""
    small, large = (
        config("completep", depth=blocks, sharing=sharing, num_repeats=num_repeats) for blocks in (2, 16)
    )
    expected = multipliers(large.model).epsilon_blocks / multipliers(small.model).epsilon_blocks
    assert expected == pytest.approx(1 / 8)
    assert gradient_size(large) / gradient_size(small) == pytest.approx(expected, rel=0.3)


def test_table():
    """Dey et al. 2025, table 1, alpha = 1; width x4, 12 layers of 6 blocks over a base of 2 layers."""
    shape = {"width": 128, "depth": 6, "sharing": "repeat_all", "num_repeats": 2}
    assert multipliers(config("standard", **shape).model) == Multipliers()
    assert multipliers(config("mup", **shape).model) == Multipliers(0.5, 1.0, 0.25, 0.25, 0.25, 0.25, 0.25)
    expected = Multipliers(0.5, 1 / 6, 0.25, 0.25, 0.25 / 3, 0.25 / 6, 0.25)
    assert multipliers(config("completep", **shape).model) == expected


@pytest.mark.parametrize("parameterization", ["mup", "completep"])
def test_base_shape_is_standard(parameterization):
    assert multipliers(config(parameterization).model) == Multipliers()


def test_initialisation():
    """Matrices of blocks shrink with the width; embedding and gains do not."""
    c = config("mup", width=512).model
    params = jax.jit(model.init, static_argnums=1)(jax.random.key(0), c)
    std = {name: float(jnp.std(w)) for name, w in params["blocks"]["attention"].items()}
    std |= {name: float(jnp.std(w)) for name, w in params["blocks"]["ffn"].items()}
    assert std == pytest.approx(dict.fromkeys(std, c.init_std / 4), rel=0.02)
    assert len(std) == 7
    assert float(jnp.std(params["embedding"])) == pytest.approx(c.init_std, rel=0.02)
    assert all(np.all(leaf["gain"] == 1) for name, leaf in params["blocks"].items() if name.endswith("norm"))
