"""The dtype that "auto" stands for, by platform and processor; products and stacks in low precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config, tiny_model
from jax.extend.core import jaxprs_in_params

from experiments.runner import devices
from experiments.runner.studies import points_of
from mobilellm_jax import dtypes, model
from mobilellm_jax.dtypes import with_dtype
from mobilellm_jax.errors import UserError
from mobilellm_jax.model import stack
from mobilellm_jax.model.ops import linear, precision
from mobilellm_jax.runs.run import check

XEON = "processor\t: 0\nflags\t\t: fpu avx512_bf16 amx_bf16 amx_tile amx_int8\n"
ZEN_4 = "processor\t: 0\nflags\t\t: fpu avx2 fma avx512f avx512_bf16\n"
EPYC = "processor\t: 0\nflags\t\t: fpu avx2 fma\nmodel name: not_amx_bf16\n"


@pytest.fixture
def processor(tmp_path, monkeypatch):
    """Sets the text of /proc/cpuinfo."""

    def becomes(text):
        (tmp_path / "cpuinfo").write_text(text)
        dtypes.cpu_flags.cache_clear()

    monkeypatch.setattr(dtypes, "_CPUINFO", tmp_path / "cpuinfo")
    yield becomes
    dtypes.cpu_flags.cache_clear()


@pytest.mark.parametrize(
    ("text", "platform", "dtype"),
    [
        (XEON, "cpu", "bfloat16"),
        (ZEN_4, "cpu", "bfloat16"),
        (EPYC, "cpu", "float32"),
        (EPYC, "gpu", "bfloat16"),
        (EPYC, "tpu", "bfloat16"),
    ],
)
def test_auto_is_what_the_platform_is_fast_at(processor, text, platform, dtype):
    processor(text)
    config = tiny_config(**{"model.compute_dtype": "auto"})
    assert with_dtype(config, lambda: platform) == tiny_config(**{"model.compute_dtype": dtype})
    for given in ("float32", "bfloat16"):
        config = tiny_config(**{"model.compute_dtype": given})
        assert with_dtype(config, lambda: platform) is config


def test_a_system_without_cpuinfo_has_no_bfloat16(processor):
    dtypes.cpu_flags.cache_clear()
    assert not dtypes.has_bfloat16()


def test_points_of_a_sweep_have_a_dtype(monkeypatch):
    monkeypatch.setattr(devices, "platform", lambda: "tpu")
    points = points_of("configs/noise.py:tiny", {"model.compute_dtype": "auto"}, None, ())
    assert {point.config.model.compute_dtype for point in points} == {"bfloat16"}


def test_auto_is_refused_where_no_dtype_was_chosen():
    with pytest.raises(
        UserError, match=r"model\.compute_dtype: 'auto' is not valid; expected a dtype by now"
    ):
        check(tiny_config(**{"model.compute_dtype": "auto"}))


@pytest.mark.parametrize("text", [XEON, ZEN_4, EPYC])
@pytest.mark.parametrize(
    ("product", "w_shape"), [("BTD,DNH->BTNH", (24, 4, 8)), ("BTNH,NHD->BTD", (4, 8, 24))]
)
def test_bfloat16_products_round_sums_once(processor, text, product, w_shape):
    """Against float64 on the same bfloat16 numbers: half a unit in the last place, of 8 bits."""
    processor(text)
    jax.clear_caches()  # the choice is made when a product is traced
    rng = np.random.default_rng(0)
    x_shape = (2, 5, *w_shape[: len(product.split(",")[0]) - 2])
    x, w = (jnp.array(rng.normal(size=shape), jnp.bfloat16) for shape in (x_shape, w_shape))
    y, gradients = jax.vjp(lambda x, w: linear.linear(product, x, w), x, w)
    dy = jnp.array(rng.normal(size=y.shape), jnp.bfloat16)
    x64, w64, dy64 = (np.asarray(a, np.float64) for a in (x, w, dy))
    x_axes, w_axes, y_axes = product.replace("->", ",").split(",")
    expected = (
        np.einsum(product, x64, w64),
        np.einsum(f"{y_axes},{w_axes}->{x_axes}", dy64, w64),
        np.einsum(f"{x_axes},{y_axes}->{w_axes}", x64, dy64),
    )
    for actual, exact in zip((y, *gradients(dy)), expected, strict=True):
        assert actual.dtype == jnp.bfloat16
        assert actual.shape == exact.shape
        np.testing.assert_allclose(np.asarray(actual, np.float64), exact, rtol=2**-8, atol=1e-5)
    asked = jax.make_jaxpr(lambda x, w: linear.linear(product, x, w))(x, w)
    assert ("preferred_element_type=float32" in str(asked)) is (text is not EPYC)


def stacked_dtypes(jaxpr):
    """Dtypes of what the loops in a program stack, one entry for each layer."""
    for equation in jaxpr.eqns:
        for inner in jaxprs_in_params(equation.params):
            yield from stacked_dtypes(inner)
        if equation.primitive.name == "scan":
            yield from (str(out.aval.dtype) for out in equation.outvars[equation.params["num_carry"] :])


def gradient(config):
    """The gradient of the loss, as a function of the parameters."""
    tokens_BT = jnp.array(np.random.default_rng(0).integers(0, config.vocab_size, (2, 8)))
    return jax.grad(lambda params: model.loss(params, tokens_BT, tokens_BT, config)[0])


def products(jaxpr):
    """Dtypes of operands and result of all matrix products in a program."""
    for equation in jaxpr.eqns:
        for inner in jaxprs_in_params(equation.params):
            yield from products(inner)
        if equation.primitive.name == "dot_general":
            yield [str(v.aval.dtype) for v in (*equation.invars, *equation.outvars)]


HALF = {"depth": 3, "compute_dtype": "bfloat16", "remat": "dots"}


@pytest.mark.parametrize("text", [XEON, ZEN_4])
def test_no_bfloat16_product_gives_bfloat16_on_a_cpu_with_units(processor, text):
    """Those of attention and of the loss too; one of them takes four times as long that way."""
    processor(text)
    jax.clear_caches()
    config = tiny_model(**HALF)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), config))
    found = [
        kinds for kinds in products(jax.make_jaxpr(gradient(config))(params).jaxpr) if "bfloat16" in kinds
    ]
    assert len(found) > 30
    assert {kinds[-1] for kinds in found} == {"float32"}


def test_a_loop_stacks_no_numbers_of_16_bits_on_a_cpu(monkeypatch):
    """XLA would convert the whole stack to float32 for each layer."""

    config = tiny_model(**HALF)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), config))

    def dtypes():
        return set(stacked_dtypes(jax.make_jaxpr(gradient(config))(params).jaxpr))

    assert dtypes() == {"float32"}
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    jax.clear_caches()
    assert dtypes() == {"bfloat16", "float32"}


@pytest.mark.slow
def test_gradients_are_the_same_bits_however_they_are_stacked(monkeypatch):
    config = tiny_model(**HALF)
    params = model.init(jax.random.key(0), config)
    gradients = jax.jit(gradient(config))(params)
    for module in (precision, stack):
        monkeypatch.setattr(module, "stack_dtype", lambda dtype: dtype)
    jax.clear_caches()
    plain = jax.jit(gradient(config))(params)
    jax.tree.map(np.testing.assert_array_equal, gradients, plain)
