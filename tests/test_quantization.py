"""Quantization against plain loops in NumPy, against integer arithmetic, and against another library."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import apply, equations, random_batch, tiny_model
from conftest import random_params as numpy_params

from mobilellm_jax import model
from mobilellm_jax.config import ModelConfig
from mobilellm_jax.data.rows import inputs_and_targets
from mobilellm_jax.errors import UserError
from mobilellm_jax.inference.generate import Generator, Sampling
from mobilellm_jax.inference.quantized import answers
from mobilellm_jax.model import block
from mobilellm_jax.model.ops.rounding import round_tokens, to_integers
from mobilellm_jax.parallel import partition
from mobilellm_jax.parameters import declared, parameter
from mobilellm_jax.quantization.apply import (
    QuantizedModel,
    check_groups,
    quantize,
    round_weights,
    weight_bytes,
)
from mobilellm_jax.quantization.schemes import Scheme, parse
from mobilellm_jax.training.step import eval_step

SCHEMES = ["w8a8", "w3", "w4:8", "w4:5"]  # of the inputs 24, 40, 32, groups of 5 divide one


def random_params(config: ModelConfig):
    return jax.tree.map(jnp.asarray, numpy_params(config))


def rounded(values: np.ndarray, bits: int) -> np.ndarray:
    """One set of weights that share a scale, in float64, number by number."""
    most = max(abs(float(value)) for value in values)
    scale = most / (2 ** (bits - 1) - 1)
    return np.array([round(float(value) / scale) * scale for value in values])


def rounded_in_a_loop(path: str, w: np.ndarray, scheme: Scheme) -> np.ndarray:
    """A parameter, output by output and group by group."""
    of = parameter(path)
    if of.kind == "embedding":
        rows = [w[v] for v in range(w.shape[0])]
        shape = None
    else:
        first = 1 + len(of.inputs)
        shape = w.shape[1:first]
        inputs = math.prod(shape)
        rows = [block.reshape(inputs, -1)[:, j] for block in w for j in range(w[0].size // inputs)]
    done = []
    for row in rows:
        size = scheme.group or len(row)
        parts = [rounded(row[i : i + size], scheme.weight_bits) for i in range(0, len(row), size)]
        done.append(np.concatenate(parts))
    if shape is None:
        return np.stack(done)
    outputs = len(done) // len(w)
    blocks = [np.stack(done[u * outputs :][:outputs], axis=1) for u in range(len(w))]
    return np.stack(blocks).reshape(w.shape)


@pytest.mark.parametrize(("name", "tied"), [*((name, True) for name in SCHEMES), ("w8a8", False)])
def test_weights_are_those_of_a_plain_loop(name, tied):
    config, scheme = tiny_model(share_embedding=tied), parse(name)
    params = numpy_params(config)
    found, of_config = quantize(params, config, scheme, short_groups=True)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    for path, w in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        new = np.asarray(found["embedding"] if name == "embedding" else _at(found, name))
        expected = w if name.endswith("gain") else rounded_in_a_loop(name, w, scheme)
        np.testing.assert_allclose(new, expected, rtol=1e-6, atol=1e-7, err_msg=name)
    assert of_config.activation_bits == scheme.activation_bits
    assert (of_config is config) == (not scheme.activation_bits)


def _at(tree, path):
    for key in path.split("/"):
        tree = tree[key]
    return tree


def test_activations_are_rounded_token_by_token():
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    x[1, 2] = 0
    expected = np.zeros(x.shape)
    for b, t in np.ndindex(2, 3):
        if x[b, t].any():
            expected[b, t] = rounded(x[b, t].ravel(), 8).reshape(4, 5)
    np.testing.assert_allclose(round_tokens(jnp.asarray(x), 8), expected, rtol=1e-6, atol=1e-7)
    q, scale = to_integers(jnp.asarray(x), 8, (2, 3))
    assert np.abs(q).max() == 127
    assert (np.asarray(q) == np.round(q)).all()
    assert scale.shape == (2, 3, 1, 1)


def test_no_bits_change_nothing():
    """Bit for bit: the program in full precision has no rounding; the other, one before every product."""
    config, counts = tiny_model(), []
    tokens = jnp.asarray(random_batch(config)[0])
    for of in (config, QuantizedModel(**vars(config), of=config, rounded_to=8)):
        program = jax.make_jaxpr(lambda params, of=of: model.apply(params, tokens, of))(random_params(config))
        done = [(equation.primitive.name, times) for equation, times in equations(program.jaxpr)]
        counts.append(sum(times for name, times in done if name == "round"))
    assert config.activation_bits == 0
    assert counts == [0, 7 * config.depth + 1]  # seven matrices of a block, and the head


def integer_linear(product: str, x, w):
    """x w by int8 x int8 -> int32, and the scales afterwards."""
    x_axes, w_axes, y_axes = product.replace("->", ",").split(",")
    lost = [axis for axis in w_axes if axis in x_axes]
    q_x, scale_x = to_integers(x, 8, range(2, x.ndim))
    q_w, scale_w = to_integers(w, 8, [w_axes.index(axis) for axis in lost])
    sums = jnp.einsum(product, q_x.astype(jnp.int8), q_w.astype(jnp.int8), preferred_element_type=jnp.int32)
    assert sums.dtype == jnp.int32
    gained = len(y_axes) - 2
    scale_x = scale_x.reshape(*scale_x.shape[:2], *[1] * gained)
    scale_w = scale_w.reshape(1, 1, *[n for n, axis in zip(w.shape, w_axes, strict=True) if axis not in lost])
    return sums.astype(jnp.float32) * scale_x * scale_w


@pytest.mark.parametrize("sharing", ["none", "reverse"])
def test_integer_arithmetic_gives_the_same_logits(sharing, monkeypatch, record_property):
    repeats = 1 if sharing == "none" else 2
    config = tiny_model(sharing=sharing, num_repeats=repeats, vocab_size=64)
    params, fake = quantize(random_params(config), config, parse("w8a8"))
    tokens = jnp.asarray(random_batch(config)[0][:2])
    expected = np.asarray(apply(params, tokens, fake))
    monkeypatch.setattr(block, "round_tokens", lambda x, bits: x)  # integer_linear does it
    monkeypatch.setattr(block, "linear", integer_linear)
    params = jax.tree.map(jnp.asarray, params)
    x_BTD = model.hidden(params, tokens, fake)  # rounded already
    found = np.asarray(integer_linear("BTD,VD->BTV", x_BTD, params["embedding"]))
    error = np.abs(found - expected).max() / np.abs(expected).max()
    record_property("figures", {"int8 x int8 against fake quantization, of the largest logit": float(error)})
    assert error < 1e-5
    plain = np.asarray(apply(random_params(config), tokens, config))
    assert np.abs(plain - expected).max() / np.abs(expected).max() > 1e-3  # it does round


@pytest.mark.parametrize("bits", [8, 4])
def test_one_layer_is_that_of_qwix(bits):
    """Within a rounding step: its scale is absmax / (2^(bits - 1) - 0.5)."""
    reason = "qwix is not installed: pip install qwix==0.1.8"
    qarray = pytest.importorskip("qwix._src.core.qarray", reason=reason)
    of, rng = parameter("blocks/ffn/up"), np.random.default_rng(0)
    w = rng.normal(size=(1, 64, 24)).astype(np.float32)
    how = qarray.HowToQuantize(qtype=f"int{bits}", channelwise_axes=(1,), calibration_method="absmax")
    theirs = qarray.dequantize(qarray.quantize(jnp.asarray(w[0]), how))
    ours = round_weights(of, w, Scheme(bits))[0]
    step = np.abs(w[0]).max(axis=0, keepdims=True) / (2 ** (bits - 1) - 1)
    assert (np.abs(ours - theirs) <= step * 1.01).all()
    assert np.abs(ours - theirs).max() > 0
    nearest = np.abs(ours - w[0]) <= step / 2 * 1.0001
    assert nearest.all()


# --- evaluation and generation --------------------------------------------------------------------------


def test_answers_are_those_of_evaluation_and_of_the_logits():
    config = tiny_model()
    params, mesh = random_params(config), partition.make_mesh(_mesh())
    rows = np.random.default_rng(0).integers(0, config.vocab_size, (8, 10), dtype=np.int32)
    rows[3, 5:] = ~rows[3, 5:]
    tokens, targets = inputs_and_targets(rows)
    for scheme in (None, parse("w8a8"), parse("w3:4")):
        new, of_config = quantize(params, config, scheme, True) if scheme else (params, config)
        found = answers(new, of_config, mesh, [rows])
        sums = jax.jit(eval_step, static_argnums=(2, 3))(new, rows, of_config, False)
        assert found.loss == pytest.approx(float(sums["nats"].sum() / sums["targets"]), rel=1e-5)
        best = np.asarray(apply(new, tokens, of_config)).argmax(axis=-1)
        assert (found.best == best[np.asarray(targets) >= 0]).all()
    full = answers(params, config, mesh, [rows])
    assert full.agreement(full) == 1.0
    assert 0 < full.agreement(found) < 1
    flipped = answers(params, config, mesh, [rows])
    flipped.best[:4] += 1
    assert full.agreement(flipped) == pytest.approx(1 - 4 / len(full.best))


def _mesh():
    from mobilellm_jax.config import MeshConfig

    return MeshConfig(data=-1, fsdp=1, tensor=1)


def test_generation_is_greedy_over_the_same_logits():
    config = tiny_model()
    params, quantized = quantize(random_params(config), config, parse("w8a8"))
    sampling = Sampling(temperature=0.0, top_k=0, top_p=1.0)
    prompt = [3, 9, 4]
    made = [ids[0] for ids in Generator(params, quantized, sampling, 16).start([prompt], 6, None, 0)]
    tokens = list(prompt)
    for token in made:
        padded = jnp.array([[*tokens, *[0] * (9 - len(tokens))]])  # what comes later is not seen
        assert token is not None
        assert token == int(apply(params, padded, quantized)[0, len(tokens) - 1].argmax())
        tokens.append(token)
    assert len(made) == 6


# --- names, sizes and bad input -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["w8a8", "w8", "w4:32", "w3:32", "w4a8:16", "w2"])
def test_names_are_read_back(name):
    assert parse(name).name == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("int8", r"'int8': expected w<bits>\[a<bits>\]\[:<group>\], such as w8a8"),
        ("w0", "0 bits for weights; expected 2 to 8"),
        ("w9", "9 bits for weights"),
        ("w8a1", "1 bits for activations"),
        ("w8a8:0", "groups of 0 weights"),
        ("w4:", "expected w<bits>"),
        ("", "expected w<bits>"),
    ],
)
def test_unknown_schemes_are_refused(name, message):
    with pytest.raises(UserError, match=message):
        parse(name)


def test_groups_that_do_not_divide_are_refused():
    config = tiny_model()  # inputs: 24, 40 of the attention's output, 32 of ffn/down
    message = (
        r"scheme 'w4:16': groups of 16 do not divide the rows of embedding \(24 inputs\), .*"
        r"blocks/attention/output \(40 inputs\), .*; groups that divide all rows: 2, 4, 8\. "
        r"Or allow a shorter last group \(--short_groups\), or take one scale .*'w4'"
    )
    with pytest.raises(UserError, match=message) as error:
        quantize(random_params(config), config, parse("w4:16"))
    assert "ffn/down" not in str(error.value)
    check_groups(config, parse("w4:8"))
    check_groups(config, parse("w4:16"), short_groups=True)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, "parameter blocks/ffn/up: holds NaN or infinite values"),
        (math.inf, "parameter blocks/ffn/up: holds NaN or infinite values"),
        (0.0, "parameter blocks/ffn/up of block 1: all weights are 0"),
    ],
)
def test_weights_without_a_range_are_refused(value, message):
    config = tiny_model()
    params = numpy_params(config)
    params["blocks"]["ffn"]["up"][1] = value
    with pytest.raises(UserError, match=message):
        quantize(params, config, parse("w8a8"))


def test_bytes_are_counted_weight_by_weight():
    for config in (tiny_model(), tiny_model(share_embedding=False, sharing="immediate", num_repeats=2)):
        params = random_params(config)
        assert weight_bytes(config, None) == sum(w.nbytes for w in jax.tree.leaves(params))
        gains = sum(w.nbytes for p, w in jax.tree_util.tree_leaves_with_path(params) if p[-1].key == "gain")
        for name in ("w8a8", "w4:8", "w3:5"):
            scheme, bits = parse(name), 0
            for of in declared(config):
                if not of.is_gain:
                    w = _at(params, of.path)
                    inputs = 24 if of.kind == "embedding" else math.prod(w.shape[1 : 1 + len(of.inputs)])
                    groups = math.ceil(inputs / scheme.group) if scheme.group else 1
                    bits += w.size // inputs * (inputs * scheme.weight_bits + 32 * groups)
            assert weight_bytes(config, scheme) == math.ceil(bits / 8) + gains


def test_a_quantized_model_is_another_model():
    """Programs are kept by config: the two must never be taken for each other."""
    config = tiny_model()
    other = QuantizedModel(**vars(config), of=config, rounded_to=8)
    assert isinstance(other, ModelConfig)
    assert other != config
    assert other != QuantizedModel(**vars(config), of=config, rounded_to=4)
