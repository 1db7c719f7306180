"""Placement on a mesh of 8 simulated devices: complete, refused where it does not fit, and without effect
on any number."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import (
    FFN_KINDS,
    SHARING,
    assert_trees_close,
    init,
    loss_and_gradients,
    random_batch,
    random_params,
    shapes,
    tiny_config,
    tiny_model,
)
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from configs import mobilellm
from mobilellm_jax import model
from mobilellm_jax.config import MeshConfig, from_config_dict
from mobilellm_jax.errors import UserError
from mobilellm_jax.parallel import partition
from mobilellm_jax.training.programs import make_programs

MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (4, 1, 2)]


def make_mesh(data, fsdp, tensor):
    config = MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
    return partition.make_mesh(config, jax.devices()[: data * fsdp * tensor])


# --- the table -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides", [{"share_embedding": False}, *({"ffn_kind": kind} for kind in FFN_KINDS), *SHARING], ids=str
)
def test_table_fits_every_parameter(overrides):
    """Matrices are split once by "fsdp", over D, and once by "tensor", over heads, F or V; gains are not."""
    m = tiny_model(**{**overrides, "depth": 2, "num_kv_heads": 1, "num_heads": 3})
    letters = {m.vocab_size: "V", m.width: "D", m.num_heads: "N", 1: "K", m.ffn_width: "F", m.head_dim: "H"}
    params = shapes(m)
    specs = partition.shardings(params, make_mesh(2, 2, 2))
    assert jax.tree.structure(specs) == jax.tree.structure(params)
    for (path, leaf), sharding in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(specs), strict=True
    ):
        assert len(sharding.spec) == leaf.ndim, path
        split = sorted(
            (axis, letters.get(n)) for n, axis in zip(leaf.shape, sharding.spec, strict=True) if axis
        )
        if path[-1].key == "gain":
            assert split == []
        else:
            assert split in [[("fsdp", "D"), ("tensor", letter)] for letter in "NKFV"], path
        if path[0].key == "blocks":
            assert sharding.spec[0] is None  # splitting the stack would move a block for every layer


def test_unknown_parameter_is_refused():
    with pytest.raises(
        UserError, match=r"'blocks/router': has no row in mobilellm_jax/parameters.py; add one"
    ):
        partition.shardings({"blocks": {"router": jnp.zeros((2, 3))}}, make_mesh(1, 1, 1))
    with pytest.raises(UserError, match="'my_embedding'"):  # the end of a name is not the end of a path
        partition.parameter_spec("my_embedding", 2)


def test_optimizer_state_is_split_like_its_parameters():
    params = random_params(tiny_model(share_embedding=False))
    state = optax.adam(1e-3).init(params)
    mesh = make_mesh(2, 2, 2)
    specs, moments = partition.shardings(params, mesh), partition.shardings(state, mesh)[0]
    assert moments.mu == specs
    assert moments.nu == specs
    assert moments.count.spec == PartitionSpec()
    placed = jax.device_put(state, partition.shardings(state, mesh))
    query_UDNH = placed[0].nu["blocks"]["attention"]["query"]
    assert query_UDNH.addressable_shards[0].data.shape == (2, 24 // 2, 4 // 2, 10)


# --- the mesh ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "devices", "shape"),
    [
        ((1, 1, 1), 1, (1, 1, 1)),
        ((-1, 1, 1), 8, (8, 1, 1)),
        ((2, -1, 2), 8, (2, 2, 2)),
        ((1, 4, -1), 4, (1, 4, 1)),
        ((3, 2, 1), 6, (3, 2, 1)),
    ],
)
def test_mesh_shape(sizes, devices, shape):
    assert partition.mesh_shape(MeshConfig(**dict(zip(partition.AXES, sizes, strict=True))), devices) == shape


@pytest.mark.parametrize(
    ("sizes", "devices"), [((2, 2, 1), 8), ((4, 4, 1), 8), ((-1, 3, 1), 8), ((-1, 9, 1), 8)]
)
def test_mesh_that_does_not_fill_the_devices(sizes, devices):
    with pytest.raises(UserError) as error:
        partition.mesh_shape(MeshConfig(**dict(zip(partition.AXES, sizes, strict=True))), devices)
    assert f"data={sizes[0]}, fsdp={sizes[1]}, tensor={sizes[2]}" in str(error.value)
    assert "8 device" in str(error.value)


@pytest.mark.parametrize(
    ("mesh", "overrides", "parts"),
    [
        (
            (8, 1, 1),
            {"train.batch_size": 12},
            ["train.batch_size", "12", "fsdp=8", "could be 1, 2, 3, 4, 6, 12"],
        ),
        (
            (2, 2, 1),
            {"train.accumulation_steps": 4},
            ["train.batch_size / train.accumulation_steps: 2", "=4"],
        ),
        ((8, 1, 1), {"train.eval_batch_size": 4}, ["train.eval_batch_size: 4", "could be 1, 2, 4"]),
        ((1, 5, 1), {"train.batch_size": 5, "train.eval_batch_size": 5}, ["model.width: 24", "mesh.fsdp=5"]),
        ((1, 1, 8), {}, ["model.num_heads: 4", "mesh.tensor=8", "could be 1, 2, 4"]),
        ((1, 1, 4), {}, ["model.num_kv_heads: 2", "mesh.tensor=4", "could be 1, 2"]),
        (
            (1, 1, 2),
            {"model.ffn_width": 33},
            ["model.ffn_width: 33", "mesh.tensor=2", "could be 1, 3, 11, 33"],
        ),
        ((1, 1, 2), {"model.vocab_size": 49}, ["model.vocab_size: 49", "mesh.tensor=2", "could be 1, 7, 49"]),
    ],
)
def test_axis_that_does_not_divide(mesh, overrides, parts):
    abstract = AbstractMesh(mesh, partition.AXES, axis_types=(AxisType.Auto,) * 3)
    with pytest.raises(UserError) as error:
        partition.check_divisible(tiny_config(**overrides), abstract)
    for part in parts:
        assert part in str(error.value)


def test_axes_that_divide():
    for sizes in MESHES:
        partition.check_divisible(tiny_config(), make_mesh(*sizes))


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_rows_are_split_over_data_and_fsdp(sizes):
    data, fsdp, _ = sizes
    assert partition.batch_sharding(make_mesh(*sizes)).shard_shape((8, 9)) == (8 // (data * fsdp), 9)


# --- the same numbers, and the work really split -------------------------------------------------------


@functools.cache
def compiled_loss_and_gradients(m, sizes):
    """Returns the compiled program of the loss and its gradients, with all shardings pinned."""
    mesh = make_mesh(*sizes)
    params, batch = partition.shardings(shapes(m), mesh), partition.batch_sharding(mesh)
    function = jax.jit(
        lambda *arrays: jax.value_and_grad(model.loss, has_aux=True)(*arrays, m),
        in_shardings=(params, batch, batch),
        out_shardings=(None, params),
    )
    with partition.in_use(mesh):
        return function.lower(shapes(m), *random_batch(m)).compile()


@pytest.mark.parametrize(
    ("sizes", "sharing"),
    [
        ((2, 2, 2), SHARING[3]),
        *(pytest.param(sizes, SHARING[3], marks=pytest.mark.slow) for sizes in MESHES if sizes != (2, 2, 2)),
        *(pytest.param((2, 2, 2), s, marks=pytest.mark.slow) for s in SHARING if s != SHARING[3]),
    ],
    ids=str,
)
def test_one_device_equals_eight(sizes, sharing):
    """Loss and gradients with grouped heads: one strategy on every mesh, every strategy on the full mesh."""
    m = tiny_model(**sharing)
    params, batch = random_params(m), random_batch(m)
    (nats, count), gradients = compiled_loss_and_gradients(m, sizes)(params, *batch)
    (expected_nats, expected_count), expected = loss_and_gradients(params, *batch, m)
    assert len(nats.sharding.device_set) == 8
    assert count == expected_count
    np.testing.assert_allclose(nats, expected_nats, rtol=1e-6)
    assert_trees_close(gradients, expected, 1e-5)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_work_and_memory_are_split(sizes):
    """Each of eight devices does an eighth of the work, and holds not much more than an eighth.

    Unless activations are told to stay split by rows, the compiler splits them over D as "fsdp" splits the
    weights; every device then computes the attention of all rows: twice the work, six times the memory.
    """
    m = tiny_model(**SHARING[3])
    whole, part = compiled_loss_and_gradients(m, (1, 1, 1)), compiled_loss_and_gradients(m, sizes)
    assert 8 * part.cost_analysis()["flops"] < 1.15 * whole.cost_analysis()["flops"]
    memory = [program.memory_analysis().temp_size_in_bytes for program in (whole, part)]
    assert 8 * memory[1] < 1.8 * memory[0]


@pytest.mark.parametrize("sizes", [pytest.param((1, 8, 1), marks=pytest.mark.slow), (2, 2, 2)], ids=str)
def test_initial_parameters_do_not_depend_on_the_mesh(sizes):
    """To the last bit."""
    m = tiny_model(share_embedding=False)
    shardings = partition.shardings(shapes(m), make_mesh(*sizes))
    actual = jax.jit(model.init, static_argnums=1, out_shardings=shardings)(jax.random.key(0), m)
    jax.tree.map(np.testing.assert_array_equal, actual, init(jax.random.key(0), m))
    assert jax.tree.map(lambda x: x.sharding, actual) == shardings


# --- a published model, lowered for other machines -----------------------------------------------------


def test_train_step_lowers_for_tpu_and_cuda():
    """From a CPU, on a mesh of devices that are not there: 4 x 2, with the state donated.

    `test_plan.py` does so for all published models, on larger meshes.
    """
    config = from_config_dict(mobilellm.get_config("ls_125m"))
    mesh = AbstractMesh((4, 2, 1), partition.AXES, axis_types=(AxisType.Auto,) * 3)
    partition.check_divisible(config, mesh)
    programs = make_programs(config, mesh)
    text = programs.trace_step().lower(lowering_platforms=("tpu", "cuda")).as_text()
    assert '"data"=4, "fsdp"=2, "tensor"=1' in text
    assert "sdy.sharding_constraint" in text  # the step runs with the mesh in use
    donated = text.count("jax.buffer_donor") + text.count("tf.aliasing_output")
    assert donated == len(jax.tree.leaves(programs.state))
