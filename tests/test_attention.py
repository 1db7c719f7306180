"""Attention in chunks, and `ops.linear`, against NumPy in float64 and against what JAX derives."""

import csv
import functools
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config

from mobilellm_jax.config import MeshConfig
from mobilellm_jax.errors import UserError
from mobilellm_jax.model.ops import attention_kernels, linear
from mobilellm_jax.model.ops.attention import attend_causally, plain_attention
from mobilellm_jax.model.ops.attention_kernels import attend_by_jax, attend_by_splash
from mobilellm_jax.parallel import partition
from mobilellm_jax.runs.run import check

# One chunk, one and a bit, several with a short last one, and more than 8 chunks' worth of positions.
LENGTHS = (7, 65, 150, 600)


def numpy_attention(q_BTNH, k_BTKH, v_BTKH):
    """One query after the other."""
    B, T, N, H = q_BTNH.shape
    G = N // k_BTKH.shape[2]
    out_BTNH = np.zeros_like(q_BTNH)
    for b, t, n in np.ndindex(B, T, N):
        scores = k_BTKH[b, : t + 1, n // G] @ q_BTNH[b, t, n] / np.sqrt(H)
        weights = np.exp(scores - scores.max())
        out_BTNH[b, t, n] = weights / weights.sum() @ v_BTKH[b, : t + 1, n // G]
    return out_BTNH


def random_inputs(length, rows=2, heads=4, kv_heads=2, size=6):
    rng = np.random.default_rng(0)
    shapes = [(rows, length, n, size) for n in (heads, kv_heads, kv_heads)]
    return [2 * rng.normal(size=shape) for shape in shapes]


@pytest.mark.parametrize("length", LENGTHS)
def test_every_query_attends_to_itself_and_to_what_is_before_it(length):
    q, k, v = random_inputs(length)
    out = jax.jit(attend_causally)(*map(jnp.float32, (q, k, v)))
    np.testing.assert_allclose(out, numpy_attention(q, k, v), atol=2e-5)


@pytest.mark.parametrize(("size", "padded"), [(6, 8), (8, 8), (20, 24)])
def test_heads_padded_for_cudnn_change_nothing(size, padded, monkeypatch):
    """With XLA's own attention in the place of cuDNN's, which needs a GPU."""
    sizes, plain = set(), jax.nn.dot_product_attention

    def attend(q, k, v, **how):
        sizes.update(x.shape[-1] for x in (q, k, v))
        return plain(q, k, v, **how)

    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    q, k, v = random_inputs(65, size=size)
    out = attend_by_jax(*map(jnp.float32, (q, k, v)), implementation="xla")
    np.testing.assert_allclose(out, numpy_attention(q, k, v), atol=2e-5)
    assert sizes == {padded}


@pytest.mark.parametrize(
    ("capability", "dtype", "size", "attends"),
    [
        ("9.0", "bfloat16", 64, True),
        ("8.0", "float16", 128, True),
        ("12.0", "bfloat16", 64, True),
        ("7.5", "bfloat16", 64, False),  # a T4
        ("gfx90a", "bfloat16", 64, False),  # of AMD
        ("9.0", "float32", 64, False),
        ("9.0", "bfloat16", 129, False),
    ],
)
def test_cudnn_attends_where_it_has_a_kernel(capability, dtype, size, attends, monkeypatch):
    calls, device = [], types.SimpleNamespace(compute_capability=capability, device_kind="a GPU")
    monkeypatch.setattr(attention_kernels.jax, "devices", lambda: [device])
    monkeypatch.setitem(attention_kernels.KERNELS, "cudnn", lambda q, k, v: calls.append("cudnn") or q)
    attend_causally(*(jnp.asarray(x, dtype) for x in random_inputs(7, size=size)))
    assert calls == (["cudnn"] if attends else [])


def head_sizes_of_the_paper():
    """Of table 13."""
    with Path("experiments/paper/table13_fig5_heads_kvheads.csv").open() as file:
        return sorted({int(row["dim"]) // int(row["heads"]) for row in csv.DictReader(file)})


def test_the_paper_has_six_head_sizes():
    assert head_sizes_of_the_paper() == [28, 40, 56, 80, 112, 160]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model.attention": "splash"}, "'splash' needs a TPU, but this process runs on cpu; use 'auto'"),
        (
            {"model.attention": "cudnn"},
            "'cudnn' needs an NVIDIA GPU from Ampere on, but this process runs on cpu",
        ),
    ],
)
def test_a_kernel_that_the_devices_lack_is_refused(overrides, message):
    with pytest.raises(UserError, match=f"^model.attention: {message}"):
        check(tiny_config(**overrides))


@pytest.mark.parametrize(
    ("dtype", "size", "message"),
    [
        ("float32", 64, "model.compute_dtype=bfloat16, but it is float32"),
        ("bfloat16", 160, "heads of size 128 at most, but they have 160"),
        ("bfloat16", 128, ""),
    ],
)
def test_what_cudnn_lacks_on_a_gpu(dtype, size, message, monkeypatch):
    device = types.SimpleNamespace(compute_capability="9.0", device_kind="a GPU")
    monkeypatch.setattr(attention_kernels.jax, "devices", lambda: [device])
    assert attention_kernels.missing("cudnn", dtype, size) == message


def test_tpus_attend_by_splash_where_rows_fill_its_lanes(monkeypatch):
    monkeypatch.setattr(attention_kernels.jax, "default_backend", lambda: "tpu")
    assert [attention_kernels.fastest("float32", length, 64) for length in (127, 128)] == ["chunks", "splash"]


@pytest.mark.slow  # an emulated kernel takes seconds to compile
@pytest.mark.parametrize("size", head_sizes_of_the_paper())
def test_splash_attends_as_the_plain_attention(size):
    """150 tokens become two blocks of 128."""
    inputs = [jnp.float32(x) for x in random_inputs(150, rows=1, size=size)]
    dout = jnp.float32(np.random.default_rng(1).normal(size=inputs[0].shape))
    out, pullback = jax.vjp(jax.jit(functools.partial(attend_by_splash, interpret=True)), *inputs)
    expected, plain_pullback = jax.vjp(jax.jit(plain_attention), *inputs)
    for a, b in zip((out, *pullback(dout)), (expected, *plain_pullback(dout)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


@pytest.mark.slow
def test_splash_attends_on_a_mesh():
    """Rows and heads split over 8 devices."""
    inputs = [jnp.float32(x) for x in random_inputs(20, rows=4)]
    mesh = partition.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    inputs = [jax.device_put(x, partition.batch_sharding(mesh)) for x in inputs]
    with partition.in_use(mesh):
        out = jax.jit(functools.partial(attend_by_splash, interpret=True))(*inputs)
    expected = plain_attention(*inputs)
    np.testing.assert_allclose(out, expected, atol=1e-5 * np.abs(expected).max())


def test_the_plain_attention_is_that_of_float64():
    q, k, v = random_inputs(7)
    np.testing.assert_allclose(
        plain_attention(*map(jnp.float32, (q, k, v))), numpy_attention(q, k, v), atol=2e-5
    )


@pytest.mark.parametrize("length", LENGTHS[:3])
def test_gradients_are_finite_differences_in_float64(length):
    inputs = random_inputs(length, rows=1)
    rng = np.random.default_rng(1)
    dout = rng.normal(size=inputs[0].shape)
    _, pullback = jax.vjp(jax.jit(attend_causally), *map(jnp.float32, inputs))
    for i, gradient in enumerate(pullback(jnp.float32(dout))):
        direction = rng.normal(size=inputs[i].shape)

        def along(step, i=i, direction=direction):
            moved = [x + step * direction if j == i else x for j, x in enumerate(inputs)]
            return np.sum(dout * numpy_attention(*moved))

        expected = (along(1e-5) - along(-1e-5)) / 2e-5
        np.testing.assert_allclose(np.sum(np.float64(gradient) * direction), expected, rtol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_gradients_are_those_of_the_plain_attention_of_jax(dtype, tolerance, kv_heads):
    inputs = [jnp.asarray(x, dtype) for x in random_inputs(150, kv_heads=kv_heads)]

    def plain(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)

    dout = jnp.asarray(np.random.default_rng(1).normal(size=inputs[0].shape), dtype)
    gradients, expected = (jax.vjp(jax.jit(f), *inputs)[1](dout) for f in (attend_causally, plain))
    for a, b in zip(gradients, expected, strict=True):
        assert a.dtype == dtype
        a, b = np.float32(a), np.float32(b)
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("product", "x", "w"),
    [
        ("BTD,DNH->BTNH", (2, 3, 4), (4, 3, 5)),
        ("BTNH,NHD->BTD", (2, 3, 3, 5), (3, 5, 4)),  # the narrower operand comes first in its gradient
        ("BTD,DF->BTF", (2, 3, 4), (4, 6)),
        ("BTF,FD->BTD", (2, 3, 6), (6, 4)),
    ],
)
def test_gradients_of_linear_are_those_that_jax_derives(product, x, w, dtype):
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=shape), dtype) for shape in (x, w))
    y, pullback = jax.vjp(lambda x, w: linear.linear(product, x, w), x, w)
    expected_y, expected = jax.vjp(lambda x, w: jnp.einsum(product, x, w), x, w)
    dy = jnp.asarray(rng.normal(size=y.shape), dtype)
    digits = {"rtol": 1e-5, "atol": 1e-6} if dtype == "float32" else {"rtol": 2e-2, "atol": 2e-2}
    np.testing.assert_allclose(y.astype("float32"), expected_y.astype("float32"), **digits)
    for a, b in zip(pullback(dy), expected(dy), strict=True):
        assert a.dtype == dtype
        assert a.shape == b.shape
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=1e-5 if dtype == "float32" else 2e-2)


def test_swiglu_and_its_gradient_are_those_of_silu_in_float64():
    rng = np.random.default_rng(0)
    gate, up, dy = (3 * rng.normal(size=(2, 5, 7)) for _ in range(3))
    y, pullback = jax.vjp(jax.jit(linear.swiglu), jnp.float32(gate), jnp.float32(up))

    def expected(gate, up):
        return gate / (1 + np.exp(-gate)) * up

    np.testing.assert_allclose(y, expected(gate, up), rtol=1e-5, atol=1e-6)
    moved = [(expected(gate + h, up), expected(gate, up + h)) for h in (1e-6, -1e-6)]
    for i, gradient in enumerate(pullback(jnp.float32(dy))):
        difference = dy * (moved[0][i] - moved[1][i]) / 2e-6
        np.testing.assert_allclose(gradient, difference, rtol=1e-4, atol=1e-5)
