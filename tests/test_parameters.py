"""The table of parameters is what the model makes; one more row is all that a new one needs elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import optax.contrib
import pytest
from conftest import FFN_KINDS, SHARING, shapes, tiny_config, tiny_model
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from safetensors.numpy import load_file

from mobilellm_jax import parameters
from mobilellm_jax.costs import accounting
from mobilellm_jax.errors import UserError
from mobilellm_jax.formats.huggingface_weights import WEIGHTS, places, read_params, write_params
from mobilellm_jax.model.stack import cast
from mobilellm_jax.parallel import partition
from mobilellm_jax.parameters import Parameter
from mobilellm_jax.training.optimizer import make_optimizer, muon_axes

USES = {
    "sharing": "0 1 0 0",
    "loop_gains": True,
    "loop_rank": 3,
    "loop_scale": "learned",
    "loop_embedding": True,
    "loop_norm": True,
}


@pytest.mark.parametrize(
    "overrides",
    [{"share_embedding": False}, USES, *({"ffn_kind": kind} for kind in FFN_KINDS), *SHARING],
    ids=str,
)
def test_the_table_is_what_init_makes(overrides):
    m = tiny_model(**overrides)
    made = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes(m))
    assert made == parameters.nest({p.path: (p.shape(m), np.float32) for p in parameters.declared(m)})


def test_rows_are_whole():
    for p in parameters.PARAMETERS.values():
        assert (p.kind in ("matrix", "adapter", "update")) == ("->" in p.letters), p.path
        assert (p.hugging_face == "") == (p.kind == "adapter" or p.path.startswith("loops/")), p.path
    rows = [p for p in parameters.PARAMETERS.values() if p.hugging_face]
    for p in rows:
        assert bool(p.stack) == ("{layer}" in p.hugging_face), p.path
    assert len({p.hugging_face for p in rows}) == len(rows)


# --- three that no model has ---------------------------------------------------------------------------

GAIN = "blocks/attention/query_gain"
MATRIX = "blocks/mixer"
PER_LAYER = "loops/bottleneck"
IMAGINARY = {
    p.path: p
    for p in (
        Parameter(GAIN, "U N H", "gain", "model.layers.{layer}.self_attn.q_norm.weight"),
        Parameter(MATRIX, "U D -> D", "matrix", "model.layers.{layer}.mixer.weight", multiplier="residual"),
        Parameter(PER_LAYER, "L N H -> F", "matrix", "model.layers.{layer}.bottleneck.weight"),
    )
}
# The sizes of the tiny model: 2 blocks in 3 layers, D = 24, N = 4, H = 10, F = 32.
SHAPES = {GAIN: (2, 4, 10), MATRIX: (2, 24, 24), PER_LAYER: (3, 4, 10, 32)}
PLAN = {"depth": 2, "sharing": "0 0 1"}


@pytest.fixture(name="imaginary")
def add_rows(monkeypatch):
    for path, row in IMAGINARY.items():
        monkeypatch.setitem(parameters.PARAMETERS, path, row)


with_imaginary = pytest.mark.usefixtures("imaginary")


def values():
    rng = np.random.default_rng(0)
    return parameters.nest({path: rng.normal(size=SHAPES[path]).astype(np.float32) for path in IMAGINARY})


def by_path(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: leaf is None)
    }


def without_imaginary(cost, monkeypatch):
    with monkeypatch.context() as patch:
        for path in IMAGINARY:
            patch.delitem(parameters.PARAMETERS, path)
        return cost()


@with_imaginary
def test_new_parameters_are_counted(monkeypatch):
    m = tiny_model(**PLAN)
    old = without_imaginary(lambda: accounting.parameters(m), monkeypatch)
    new = accounting.parameters(m)
    assert new.norms - old.norms == 2 * 40
    assert new.attention + new.ffn - old.attention - old.ffn == 2 * 24**2 + 3 * 40 * 32
    assert new.total - old.total == 2 * 40 + 2 * 24**2 + 3 * 40 * 32
    for cost, more in (
        (lambda: accounting.forward_flops_per_token(m, 9), 2 * 3 * (24**2 + 40 * 32)),
        (lambda: accounting.decode_bytes_per_token(m), 4 * (2 * (40 + 24**2) + 3 * 40 * 32)),
        (lambda: accounting.optimizer_bytes(m), 16 * (new.total - old.total)),
    ):
        assert cost() - without_imaginary(cost, monkeypatch) == more


@with_imaginary
def test_new_parameters_are_sharded():
    """A gain is whole on every device, and no mesh axis splits two axes of a matrix; moments likewise."""
    mesh = AbstractMesh((2, 2, 2), partition.AXES, axis_types=(AxisType.Auto,) * 3)
    expected = {
        GAIN: PartitionSpec(None, None, None),
        MATRIX: PartitionSpec(None, "fsdp", None),
        PER_LAYER: PartitionSpec(None, "tensor", None, None),
    }
    moments = optax.adam(1.0).init(values())[0].mu
    for tree in (values(), {"0": {"mu": moments}}):
        specs = {
            path.removeprefix("0/mu/"): s.spec for path, s in by_path(partition.shardings(tree, mesh)).items()
        }
        assert specs == expected


@with_imaginary
@pytest.mark.parametrize("gradient", [0.0, 1.0])
def test_new_matrices_are_decayed_and_have_a_learning_rate_of_their_own(gradient):
    """Adam's first step is the sign of the gradient, times the multiplier: 1/4 at 4 times the base width."""
    config = tiny_config(**{"optimizer.weight_decay": 0.5, "optimizer.clip_norm": 1e9})
    m = tiny_model(**PLAN, parameterization="mup", base_width=6)
    optimizer, params = make_optimizer(config.optimizer, m), values()
    gradients = jax.tree.map(lambda w: np.full_like(w, gradient), params)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    params, updates = by_path(params), by_path(updates)
    np.testing.assert_allclose(updates[GAIN], np.full(SHAPES[GAIN], gradient), rtol=1e-4)
    for path in (MATRIX, PER_LAYER):
        np.testing.assert_allclose(updates[path], gradient / 4 + 0.5 * params[path], rtol=1e-4, atol=1e-5)


@with_imaginary
def test_new_matrices_have_rows_and_columns_for_muon():
    numbers = optax.contrib.MuonDimensionNumbers
    assert muon_axes(values()) == parameters.nest(
        {GAIN: None, MATRIX: numbers((1,), (2,)), PER_LAYER: numbers((1, 2), (3,))}
    )


@with_imaginary
def test_new_matrices_are_cast():
    m = tiny_model(**PLAN, compute_dtype="bfloat16")
    dtypes = {
        path: leaf.dtype for path, leaf in by_path(cast(jax.tree.map(jnp.asarray, values()), m)).items()
    }
    assert dtypes == {GAIN: jnp.float32, MATRIX: jnp.bfloat16, PER_LAYER: jnp.bfloat16}
    block = cast({"query_gain": jnp.ones((4, 10))}, m, "blocks/attention/")
    assert block["query_gain"].dtype == jnp.float32


@with_imaginary
def test_new_parameters_are_exported_and_come_back(tmp_path):
    """Of a block used twice once for each layer, of a layer once; a matrix as [outputs, inputs], scaled."""
    m = tiny_model(**PLAN, parameterization="completep", base_depth=12, base_width=24)
    rng = np.random.default_rng(1)
    leaves = {p.path: rng.normal(size=p.shape(m)).astype(np.float32) for p in parameters.declared(m)}
    write_params(tmp_path / WEIGHTS, parameters.nest(leaves), m, "float32")
    shape = {name: place.shape for name, place in places(m, m.plan).items()}
    assert [shape[f"model.layers.{i}.self_attn.q_norm.weight"] for i in range(3)] == [(4, 10)] * 3
    assert [shape[f"model.layers.{i}.bottleneck.weight"] for i in range(3)] == [(32, 40)] * 3
    back = by_path(read_params(tmp_path, tiny_model(**PLAN), m.plan))
    assert back.keys() == leaves.keys()
    for path in (GAIN, PER_LAYER):
        np.testing.assert_array_equal(back[path], leaves[path])
    np.testing.assert_array_equal(back[MATRIX], 4 * leaves[MATRIX])  # 12 layers over 3
    np.testing.assert_array_equal(
        load_file(tmp_path / WEIGHTS)["model.layers.2.mixer.weight"], back[MATRIX][1].T
    )


def test_a_parameter_without_a_row_is_refused():
    message = r"parameter 'blocks/mixer': has no row in mobilellm_jax/parameters\.py; add one"
    config = tiny_config()
    optimizer = make_optimizer(config.optimizer, config.model)
    tree = {"blocks": {"mixer": np.ones((2, 3), np.float32)}}
    with pytest.raises(UserError, match=message):
        cast(tree, config.model)
    with pytest.raises(UserError, match=message):
        optimizer.update(tree, optimizer.init(tree), tree)
